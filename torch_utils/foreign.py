"""Reading pickles that other programs wrote, without running anything from them.

A pickle names functions to call. Here every name is looked up in an allow-list, whose entries are inert stand-ins
written for the purpose; any other name ends the reading.
"""

import pickle

import numpy as np


class ForeignPickleError(Exception):
    """A pickle that is damaged or asks for something that is not on the allow-list."""


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves global names through `allowed` ({(module, name): callable}) and through nothing else."""

    def __init__(self, file, allowed: dict, encoding='bytes'):
        super().__init__(file, fix_imports=False, encoding=encoding)
        self._allowed = allowed

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise ForeignPickleError(f'it asks for {module}.{name}, which is not allowed')
        return _Global(self._allowed[module, name])

    def persistent_load(self, pid):
        raise ForeignPickleError('it refers to data outside the file')


class _Global:
    """What a global name becomes: it can be called and passed on, but a pickle cannot change its attributes."""

    __slots__ = ('_function',)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise ForeignPickleError('it tries to change a function')


def load(file, allowed: dict, encoding='bytes'):
    """The object in a binary file. Raises ForeignPickleError with one line for damaged or unexpected content."""
    return load_with(RestrictedUnpickler(file, allowed, encoding))


def load_with(unpickler: RestrictedUnpickler):
    """The object that an unpickler reads. Raises ForeignPickleError as `load`."""
    try:
        return unpickler.load()
    except ForeignPickleError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        reason = ' '.join(str(error).split()) or 'damaged'
        raise ForeignPickleError(f'it is no readable pickle ({type(error).__name__}: {reason})') from None


class NumpyArray:
    """Stand-in for numpy.ndarray: keeps the pickled state, and makes the array when asked."""

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        """The array (a copy in memory of our own). Raises ForeignPickleError unless it holds plain numbers."""
        try:
            _, shape, dtype, fortran, data = self.state
            if isinstance(data, str):  # bytes as Python 3 wrote them for protocol 2
                data = data.encode('latin1')
            values = np.frombuffer(data, dtype=dtype.numpy())
            return values.reshape(tuple(shape), order='F' if fortran else 'C').copy()
        except (AttributeError, TypeError, ValueError) as error:
            raise ForeignPickleError(f'it holds a malformed array ({error})') from None


class NumpyDtype:
    """Stand-in for numpy.dtype of plain numbers."""

    def __init__(self, code, *_):
        self.code, self.order = code, '|'

    def __setstate__(self, state):
        self.order = _text(state[1])

    def numpy(self) -> np.dtype:
        code = _text(self.code)
        if len(code) != 2 or code[0] not in 'buif' or code[1] not in '1248':
            raise ValueError(f'type {code!r}')
        return np.dtype((self.order if self.order in '<>' else '=') + code)


def _text(value) -> str:
    return value.decode('latin1') if isinstance(value, bytes) else str(value)


def _reconstruct(*_):
    return NumpyArray()


def _encode(text, encoding=None):
    """Stand-in for _codecs.encode, which Python 3 uses to write bytes at protocol 2."""
    return text.encode('latin1')


def _only_named(*_):
    """Stand-in for a class that is passed as an argument and never made."""
    raise ForeignPickleError('it makes an object of a class that it should only name')


# What a pickle of numbers, strings and containers, with numpy arrays among them, may name.
NUMPY_ARRAYS = {
    ('numpy', 'ndarray'): _only_named,
    ('numpy', 'dtype'): NumpyDtype,
    ('_codecs', 'encode'): _encode,
} | {(module, '_reconstruct'): _reconstruct for module in ('numpy.core.multiarray', 'numpy._core.multiarray')}
