"""The rooms of this project (training, metrics, torch_utils, dnnlib) as parts of `diffusion_data`.

Their modules import each other by the names that scripts of the checkout have, which EDM and EDM2
have as well. Here they are `diffusion_data.training` and so on, whatever else is called `training`
in this process: a module that is loaded here has an `__import__` of its own, which looks for the
rooms in this package. In a checkout they are beside this package, in an installation inside it.
"""

import builtins
import sys
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path

ROOMS = ('dnnlib', 'torch_utils', 'training', 'metrics')
PACKAGE = __name__.rpartition('.')[0]
_HERE = Path(__file__).resolve().parent
FOLDER = _HERE if (_HERE / ROOMS[0]).is_dir() else _HERE.parent


def _import(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002
    if level or name.partition('.')[0] not in ROOMS:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = builtins.__import__(f'{PACKAGE}.{name}', globals, locals, fromlist)
    return module if fromlist else getattr(module, name.partition('.')[0])


class _Loader(SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = vars(builtins) | {'__import__': _import}
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, rest = name.partition('.')
        if package != PACKAGE or rest.partition('.')[0] not in ROOMS:
            return None
        places = path if '.' in rest else [str(FOLDER)]
        specs = (FileFinder(place, (_Loader, ['.py'])).find_spec(name) for place in places)
        return next(filter(None, specs), None)


sys.meta_path.insert(0, _Finder)
