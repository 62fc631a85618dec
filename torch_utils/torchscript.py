"""Tensors out of a TorchScript archive, without loading, let alone running, the program that it holds."""

import math
import zipfile

import torch

from torch_utils import foreign

STORAGES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
}


class _Record:
    """Stand-in for every module and object of the archive's program: its attributes, nothing else."""

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(foreign.RestrictedUnpickler):
    """Reads data.pkl of the open zip `archive`, in its folder `root`."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        allowed = {('torch.jit._pickle', f'build_{kind}list'): list for kind in ('int', 'double', 'bool', 'tensor')}
        allowed |= {('torch.jit._pickle', 'restore_type_tag'): lambda value, _: value}
        allowed |= {('torch._utils', '_rebuild_tensor_v2'): _rebuild, ('collections', 'OrderedDict'): dict}
        super().__init__(archive.open(root + 'data.pkl'), allowed, encoding='utf-8')
        self._archive, self._root = archive, root

    def find_class(self, module, name):
        if module.partition('.')[0] == '__torch__':
            return _Record
        if module == 'torch' and name in STORAGES:
            return STORAGES[name]
        return super().find_class(module, name)

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        info = self._archive.getinfo(f'{self._root}data/{key}')
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != count * dtype.itemsize:
            raise foreign.ForeignPickleError(f'the numbers in {info.filename} are not as many as it says')
        data = bytearray(self._archive.read(info))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _rebuild(storage, offset, size, stride, *_):
    if math.prod(size) > len(storage):
        raise foreign.ForeignPickleError(f'a tensor of shape {list(size)} is larger than its storage')
    return torch.as_strided(storage, size, stride, offset).clone()  # refuses what lies outside the storage


def is_torchscript(path: str) -> bool:
    """True for a zip with the two pickles that `torch.jit.save` writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as z:
        names = {name.partition('/')[2] for name in z.namelist()}
    return {'data.pkl', 'constants.pkl'} <= names


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """State dictionary (parameters and buffers by dotted name) of the module in a TorchScript archive.

    Raises ForeignPickleError if the archive is damaged or holds anything unexpected.
    """
    try:
        with zipfile.ZipFile(path) as z:
            root = next(name for name in z.namelist() if name.endswith('/data.pkl')).removesuffix('data.pkl')
            return dict(_walk(_Unpickler(z, root).load(), ''))
    except foreign.ForeignPickleError:
        raise
    except Exception as error:  # damaged zips, pickles and tensors raise nearly anything
        raise foreign.ForeignPickleError(f'it is damaged ({type(error).__name__}: {str(error)[:100]})') from None


def _walk(record, prefix):
    if isinstance(record, _Record):
        for name, value in record.attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            else:
                yield from _walk(value, f'{prefix}{name}.')
