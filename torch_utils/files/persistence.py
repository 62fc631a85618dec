"""Network pickles of EDM and EDM2, read without running the source text that they carry.

Such a file holds "persistent" objects: class name, constructor arguments and state of each, and
the source of its module, which the original loader executes. Here the source is skipped, and what
remains are names, plain values and tensors.
"""

import dataclasses

import torch

from dnnlib import budget
from torch_utils.files import pickles, torchfile


@dataclasses.dataclass
class Persistent:
    """A persistent object: the name of its class, and its attributes by name."""

    class_name: str
    state: dict

    @property
    def kwargs(self) -> dict:
        """Keyword arguments that it was constructed with, arrays as lists. Raises
        ForeignPickleError unless they are plain values.
        """
        kwargs = dict(self.state.get('_init_kwargs') or {})
        for key, value in kwargs.items():
            if isinstance(value, pickles.NumpyArray):
                array = value.array()
                budget.spend(array.size)                # one array can be under many keys
                kwargs[key] = array.tolist()
        return pickles.check_plain(kwargs, 'its list of arguments')


def _reconstruct(meta):
    if not isinstance(meta, dict) or not isinstance(meta.get('state'), dict) \
            or not isinstance(meta.get('class_name'), str):
        raise pickles.ForeignPickleError('it holds a malformed persistent object')
    return Persistent(meta['class_name'][:100], meta['state'])


# What such a pickle may name; sets hold names of buffers.
ALLOWED = pickles.NUMPY_ARRAYS | torchfile.TENSORS | {
    ('torch_utils.persistence', '_reconstruct_persistent_obj'): _reconstruct,
    ('dnnlib.util', 'EasyDict'): lambda: {}, ('__builtin__', 'set'): lambda *_: None,
} | {('torch.nn.modules.container', name): pickles.StandIn
     for name in ('ModuleDict', 'ModuleList', 'Sequential')}


class _Unpickler(pickles.RestrictedUnpickler):
    """Reads storages as well, which together must not be larger than the file: one can be opened
    again and again.
    """

    stored = 0

    def find_class(self, module, name):
        if (module, name) == ('torch.storage', '_load_from_bytes'):
            return self._storage
        return super().find_class(module, name)

    def _storage(self, data):
        self.stored += len(data)
        if self.stored > len(self.data):
            raise pickles.ForeignPickleError('its tensors are larger than the file')
        return torchfile.read_legacy(data)


def load(data):
    """The object in a pickle that may hold networks of EDM and EDM2, or arrays."""
    return _Unpickler(data, ALLOWED).load()


def is_network(value, key: str = 'ema') -> bool:
    """True for the top-level dictionary of a snapshot of EDM or EDM2; `key`: where the network
    is.
    """
    return isinstance(value, dict) and isinstance(value.get(key), Persistent)


def state_dict(obj, file_size: int) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a `Persistent` network by dotted name, half precision as
    float32.
    """
    return torchfile.state_of(torchfile.named_tensors(obj, _children), file_size)


def _children(module):
    state = getattr(module, 'state', None)
    if not isinstance(state, dict):
        raise pickles.ForeignPickleError('it has something else in the place of a module')
    for kind in ('_parameters', '_buffers', '_modules'):
        table = state.get(kind) or {}
        if not isinstance(table, dict):
            raise pickles.ForeignPickleError(f'its {kind} are malformed')
        yield from table.items()
