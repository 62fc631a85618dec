"""What torch.save wrote, today's zips and the older format, read by our own reader of pickles.

torch.load(weights_only=True) runs no code either. This reader has the limits of the one for
pickles as well (steps, names, no strange keys, no compressed records), the same whatever the
version of torch, and says in one line what is wrong. Numbers of zips stay in the file, which is
mapped, until they are used.
"""

import functools
import math
import zipfile
import zlib

import numpy as np
import torch

from dnnlib import budget
from dnnlib.npz import LOCAL_HEADER, entry_start, verifies
from torch_utils.files import pickles
from torch_utils.files.pickles import ForeignPickleError

# How files of the older format begin: a pickle of the number 0x1950a86a20f9469cfc6c.
_LEGACY_HEAD = b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.'
MAX_PARTS, MAX_NAME = 100_000, 1000     # of a network: modules and tensors, letters
STORAGES = {
    'UntypedStorage': torch.uint8, 'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128,
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
}


def rebuild_tensor(storage, offset, size, stride, *_):
    """Stand-in for torch's: a view of a flat tensor, refused where it reaches outside or has more
    elements.
    """
    if not isinstance(storage, torch.Tensor) or type(size) is not tuple \
            or type(stride) is not tuple or not len(size) == len(stride) <= 16 \
            or not pickles.are_lengths((*size, *stride, offset)):
        raise ForeignPickleError('it holds a malformed tensor')
    if math.prod(size) > len(storage):
        text = f'a tensor of shape {list(size)} is larger than its storage'
        raise ForeignPickleError(text[:120])
    return torch.as_strided(storage, size, stride, offset)  # which it refuses outside the storage


def _rebuild_untyped(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    """Stand-in for torch's rebuilding of tensors whose storage has no type (uint16, float8,
    ...).
    """
    return rebuild_tensor(storage.view(dtype), offset, size, stride)


TENSORS = {
    ('collections', 'OrderedDict'): lambda: {},
    ('torch', 'Size'): lambda size: size,
    ('torch._utils', '_rebuild_parameter'): lambda data, *_: data,
    ('torch._utils', '_rebuild_tensor'): rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v3'): _rebuild_untyped,
}

_ALLOWED = TENSORS | pickles.NUMPY_ARRAYS


def is_legacy(data) -> bool:
    """True for bytes that start like a file of torch.save before version 1.6."""
    return bytes(data[:15]) == _LEGACY_HEAD


class StorageUnpickler(pickles.RestrictedUnpickler):
    """A pickle of plain values and tensors; `storage(key, dtype, count)` gives the numbers of each
    storage.
    """

    def __init__(self, data, storage, allowed=_ALLOWED):
        super().__init__(data, allowed)
        self._storage = functools.cache(storage)

    def find_class(self, module, name):
        if module in ('torch', 'torch.storage') and name in STORAGES:
            return STORAGES[name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return super().find_class(module, name)

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) \
                or type(count) is not int or count < 0:
            raise ForeignPickleError('it refers to something that is no storage')
        return self._storage(key[:200], dtype, count)


class ZipRecords:
    """The uncompressed records of a zip that torch wrote, as views of the mapped file `data`. Each
    is compared with its CRC when it is first asked for, if `dnnlib.npz.verifies()`.
    """

    def __init__(self, path: str, data: memoryview):
        self.data, self.left = data, len(data)
        self._verified, self._unread = set(), len(data)
        with zipfile.ZipFile(path) as z:
            infos = z.infolist()
        roots = [info.filename.removesuffix('data.pkl') for info in infos
                 if info.filename.endswith('/data.pkl')]
        if len(roots) != 1:
            raise ForeignPickleError(f'it is a zip with {len(roots)} data.pkl instead of one')
        self.root = roots[0]
        self.infos = {info.filename: info for info in infos}
        if len(self.infos) < len(infos):
            raise ForeignPickleError('it has two parts of one name')
        order = self.infos.get(self.root + 'byteorder')
        if order is not None and bytes(self.record('byteorder')) != b'little':
            raise ForeignPickleError('it was written on a machine with another order of bytes')

    def record(self, name: str) -> memoryview:
        """The bytes of the record `name`."""
        info = self.infos.get(self.root + name)
        if info is None:
            raise ForeignPickleError(f'its part {name[:100]} is missing')
        return self._view(info)

    def verify(self):
        """Reads every record once and compares its CRC with that of the directory."""
        for info in self.infos.values():
            self._view(info)

    def _view(self, info) -> memoryview:
        name, offset = info.filename[:100], info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 \
                or info.compress_size != info.file_size:
            raise ForeignPickleError(f'its part {name} is compressed, which torch never does')
        start = entry_start(self.data[offset:offset + LOCAL_HEADER], offset)
        view = self.data[start:start + info.file_size]
        if len(view) < info.file_size:
            raise ForeignPickleError(f'its part {name} is cut off')
        if info.filename not in self._verified:
            self._verified.add(info.filename)
            self._unread -= len(view)
            if self._unread < 0:  # records of a zip can share their bytes
                raise ForeignPickleError('its parts are larger than the file')
            if verifies() and zlib.crc32(view) != info.CRC:
                raise ForeignPickleError(f'its part {name} has changed since it was written '
                                         '(wrong CRC)')
        return view

    def storage(self, key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        """The numbers of a storage, which must be as many as the pickle says."""
        record = self.record(f'data/{key}')
        if len(record) != count * dtype.itemsize:
            raise ForeignPickleError(f'the numbers in data/{key[:100]} are not as many as it says')
        self.left -= len(record)
        if self.left < 0:  # one record as numbers of several types
            raise ForeignPickleError('its tensors are larger than the file')
        if not count:
            return torch.empty(0, dtype=dtype)
        raw = torch.frombuffer(record, dtype=torch.uint8)
        return (raw.clone() if raw.data_ptr() % dtype.itemsize else raw).view(dtype)

    def load(self, allowed=_ALLOWED):
        """The object that was saved: plain values, lists, dictionaries and tensors, whose memory
        is the mapped file (changes stay in memory). Arrays of NumPy stay `pickles.NumpyArray`.
        """
        return StorageUnpickler(self.record('data.pkl'), self.storage, allowed).load()


def read_legacy(data):
    """The object in a file of the older format, as `ZipRecords.load`, with its tensors in memory.

    The file holds magic number, version and machine, the object, the keys of its storages, and
    these in that order.
    """
    storages, left = {}, len(data)

    def storage(key, dtype, count):
        nonlocal left
        left -= count * dtype.itemsize
        if left < 0 or key in storages:
            raise ForeignPickleError('the numbers of its tensors are more than it has')
        storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    reader = StorageUnpickler(data, storage)
    _, _, _, content, keys = (reader.load() for _ in range(5))
    if type(keys) is not list or not all(isinstance(key, str) for key in keys) \
            or sorted(keys) != sorted(storages):
        raise ForeignPickleError('its list of storages is damaged')
    for key in keys:                        # the tensors are views of what is filled now
        numbers = storages[key]
        if int.from_bytes(reader.read(8), 'little') != len(numbers):
            raise ForeignPickleError('the numbers of a tensor are not as many as it says')
        raw = numbers.view(torch.uint8).numpy()
        raw[:] = np.frombuffer(reader.read(numbers.nbytes), np.uint8)
    return content


def named_tensors(module, children) -> dict[str, torch.Tensor]:
    """{dotted name: tensor} of nested modules; children(module) yields (name, tensor, module or
    None). Raises ForeignPickleError where they have no end.
    """
    tensors, pending, parts = {}, [('', module)], 0
    for prefix, part in pending:                        # grows on the way
        for name, child in children(part):
            parts += 1
            full = f'{prefix}{name}'
            if parts > MAX_PARTS or len(full) > MAX_NAME:
                raise ForeignPickleError('its modules are nested without end')
            budget.spend(memory=100 + len(full))
            if isinstance(child, torch.Tensor):
                tensors[full] = child
            elif child is not None:
                pending.append((f'{full}.', child))
    return tensors


def state_of(tensors: dict, file_size: int) -> dict[str, torch.Tensor]:
    """Tensors by name with half precision as float32, unless together they are much larger than
    their file: several may show the same numbers.
    """
    total = sum(value.numel() * 4 for value in tensors.values())
    if total > 4 * file_size + (1 << 20):
        raise ForeignPickleError('its tensors are larger than the file')
    budget.spend(memory=total)
    half = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in half else value
            for name, value in tensors.items()}
