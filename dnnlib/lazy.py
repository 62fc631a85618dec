"""Imports that wait until a script starts to work: --help and mistakes in options come at once.

    with lazy.imports(__name__ == '__main__'):
        import torch
        from scipy import linalg

A script that is run binds these names when its command has read its options (`load`, which
dnnlib.cli calls). Modules that it imports after that block, and that have such blocks without an
argument, wait with it. Everything that is imported without a waiting script, in tests or by
another process, gets its names at once. So no such name can be used where a module defines what
it has: as base classes, decorators, tables; in annotations they can, and as functions that are
called later.
"""

import builtins
import contextlib
import functools
import importlib

_waiting = []   # variables of modules with names that wait


class _Later:
    """Stands for a module, or for what is at the end of `path` in it."""

    def __init__(self, module: str, *path: str):
        self._module = module
        self._path = path

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)
        return _Later(self._module, *self._path, name)

    def __call__(self, *args, **kwargs):                       # before the others are needed
        return self._load()(*args, **kwargs)

    def __or__(self, other):                                   # in annotations
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases):
        raise TypeError(f'{self._module}: a base class cannot be imported later')

    def _load(self):
        if not self._path:
            return importlib.import_module(self._module)
        module = __import__(self._module, fromlist=self._path[:1])
        return functools.reduce(getattr, self._path, module)


def _import_later(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002
    if not any(names is globals for names in _waiting):
        _waiting.append(globals)
    return _Later(name if fromlist else name.partition('.')[0])


@contextlib.contextmanager
def imports(starts: bool = False):
    """The imports of the block wait if `starts`, or if those of a script already do."""
    if not (starts or _waiting):
        yield
        return
    before, builtins.__import__ = builtins.__import__, _import_later
    try:
        yield
    finally:
        builtins.__import__ = before


def load():
    """Imports what waits."""
    waiting = _waiting[:]
    _waiting.clear()
    for names in waiting:
        for name, value in list(names.items()):
            if isinstance(value, _Later):
                names[name] = value._load()
