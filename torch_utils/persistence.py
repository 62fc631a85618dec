"""Network pickles of EDM and EDM2, read without running the source text that they carry.

Such a file holds "persistent" objects: class name, constructor arguments and state of each, and the source of its
module, which the original loader executes. Here the source is skipped, and what remains are names, plain values and tensors.
"""

import dataclasses
import io
import math

import numpy as np
import torch

from torch_utils import foreign
from torch_utils.torchscript import STORAGES

_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c  # first number of torch.save's old format, which holds each storage


@dataclasses.dataclass
class Persistent:
    """A persistent object: the name of its class, and its attributes by name."""

    class_name: str
    state: dict

    @property
    def kwargs(self) -> dict:
        """Keyword arguments that it was constructed with."""
        return self.state.get('_init_kwargs') or {}


class _Frozen(type):
    """Metaclass of stand-ins that a pickle may name: it cannot change the class itself."""

    def __setattr__(cls, name, value):
        raise foreign.ForeignPickleError('it tries to change a class')


class _EasyDict(dict, metaclass=_Frozen):
    """Stand-in for dnnlib.util.EasyDict."""


class _Module(metaclass=_Frozen):
    """Stand-in for a plain torch module: its attributes."""

    __slots__ = ('state',)

    def __setstate__(self, state):
        object.__setattr__(self, 'state', state)


def _reconstruct(meta):
    if not isinstance(meta, dict) or meta.get('type') != 'class' or not isinstance(meta.get('state'), dict):
        raise foreign.ForeignPickleError('it holds a malformed persistent object')
    return Persistent(str(meta.get('class_name')), meta['state'])


def _rebuild_tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, torch.Tensor):
        raise foreign.ForeignPickleError('it holds a tensor without a storage')
    if math.prod(size) > len(storage):
        raise foreign.ForeignPickleError(f'a tensor of shape {list(size)} is larger than its storage')
    return torch.as_strided(storage, size, stride, offset).clone()  # refuses what lies outside the storage


def _scalar(dtype, data):
    """Stand-in for NumPy's scalar: a plain Python number."""
    value = np.frombuffer(data.encode('latin1') if isinstance(data, str) else data, dtype=dtype.numpy())
    if value.size != 1:
        raise foreign.ForeignPickleError('it holds a malformed number')
    return value.item()


class _StorageUnpickler(foreign.RestrictedUnpickler):
    """The pickles inside torch.save's old format: numbers, dictionaries, and references to storages."""

    def find_class(self, module, name):
        if module == 'torch' and name in STORAGES:
            return STORAGES[name]
        return super().find_class(module, name)

    def persistent_load(self, pid):
        kind, dtype, _, _, count, *_ = pid
        if kind != 'storage' or not isinstance(dtype, torch.dtype):
            raise foreign.ForeignPickleError('it refers to something that is no storage')
        return dtype, count


def _storage(data) -> torch.Tensor:
    """A storage from the bytes of a little torch file in the old format, as a flat tensor."""
    file = io.BytesIO(data.encode('latin1') if isinstance(data, str) else data)
    magic, _, _, reference, _ = (_StorageUnpickler(file, {}, encoding='utf-8').load() for _ in range(5))
    dtype, count = reference
    rest = file.read()
    if magic != _LEGACY_MAGIC or len(rest) != 8 + count * dtype.itemsize or int.from_bytes(rest[:8], 'little') != count:
        raise foreign.ForeignPickleError('the numbers of a tensor are not as many as it says')
    return torch.frombuffer(bytearray(rest), dtype=dtype, offset=8) if count else torch.empty(0, dtype=dtype)


_ALLOWED = foreign.NUMPY_ARRAYS | {
    ('torch_utils.persistence', '_reconstruct_persistent_obj'): _reconstruct,
    ('collections', 'OrderedDict'): dict,
    ('torch._utils', '_rebuild_parameter'): lambda data, *_: data,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch.storage', '_load_from_bytes'): _storage,
} | {(module, 'scalar'): _scalar for module in ('numpy.core.multiarray', 'numpy._core.multiarray')}

# Classes of which the pickle makes instances by itself, which only real classes allow.
_CLASSES = {('dnnlib.util', 'EasyDict'): _EasyDict} | {
    ('torch.nn.modules.container', name): _Module for name in ('ModuleDict', 'ModuleList', 'Sequential')}


class _Unpickler(foreign.RestrictedUnpickler):
    def find_class(self, module, name):
        return _CLASSES.get((module, name)) or super().find_class(module, name)


def read(path: str) -> dict:
    """Top-level dictionary of a snapshot of EDM or EDM2: `ema` is a `Persistent`, and so are `encoder` and `loss_fn`.

    Raises ForeignPickleError with one line for anything else.
    """
    with open(path, 'rb') as file:
        value = foreign.load_with(_Unpickler(file, _ALLOWED, encoding='utf-8'))
    if not isinstance(value, dict) or not isinstance(value.get('ema'), Persistent):
        raise foreign.ForeignPickleError('it holds no network of EDM or EDM2')
    return dict(value)


def state_dict(obj) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a `Persistent` network by dotted name, half precision as float32."""
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in _walk(obj, '')}


def _walk(obj, prefix):
    state = getattr(obj, 'state', None)
    if not isinstance(state, dict):
        raise foreign.ForeignPickleError(f'its part {prefix or "ema"!r} is no module')
    for kind in ('_parameters', '_buffers'):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
    for name, child in (state.get('_modules') or {}).items():
        if child is not None:
            yield from _walk(child, f'{prefix}{name}.')
