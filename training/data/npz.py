"""Large .npz files: written piece by piece from many threads at the speed of the disk, and read without loading them."""

import dataclasses
import functools
import io
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from dnnlib.util import atomic_path

PIECE_BYTES = 1 << 20  # of an array, that a thread reads and writes at a time: it stays in the cache of a core


@dataclasses.dataclass
class Column:
    """An array of an .npz that exists in pieces only.

    shape, dtype  of the whole
    pieces        numbers of rows, in order
    read          `read(start, stop, out)` puts these rows into the array `out`; called from several threads, once a piece
    """

    shape: tuple
    dtype: np.dtype
    pieces: Sequence[tuple[int, int]]
    read: Callable


def pieces(count: int, row_bytes: int, limit: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of so many rows, of at most `limit` bytes (default: PIECE_BYTES)."""
    step = max((limit or PIECE_BYTES) // row_bytes, 1)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def npy_header(shape: tuple, dtype) -> bytes:
    """The header of an .npy file (format 1.0, C order), 128 bytes whatever the number of rows."""
    text = repr({'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False, 'shape': tuple(shape)})
    return np.lib.format.magic(1, 0) + struct.pack('<H', 118) + text.encode().ljust(117) + b'\n'


def write_npz(dest: str, columns: dict[str, Column], workers: int | None = None):
    """Writes an uncompressed .npz of arrays that need not fit into memory; `dest` appears only when complete.

    The zip is of the 64-bit kind, so neither 4 GiB nor 65,535 are limits. Raises OSError if the disk is full.
    """
    workers = workers or min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(), 8)
    # Not synchronised, as with cp: the files that it was made of are still there if the power fails.
    with atomic_path(dest, sync=False) as temp, open(temp, 'wb', buffering=0) as file:
        members, offset, buffers = [], 0, threading.local()
        total = sum(int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize for column in columns.values())
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(file.fileno(), 0, total)  # a full disk is noticed now, and writing is faster
        with tqdm(total=total, unit='B', unit_scale=True, delay=2, disable=None) as bar, ThreadPoolExecutor(workers) as pool:
            for name, column in columns.items():
                member = _Member(f'{name}.npy'.encode(), offset)
                member.write(file.fileno(), column, pool, buffers, bar)
                members.append(member)
                offset = member.end
        os.pwrite(file.fileno(), _directory(members, offset), offset)


@dataclasses.dataclass
class _Member:
    """A stored file in a zip: where it lies, and its checksum and size once written."""

    name: bytes
    offset: int
    crc: int = 0
    size: int = 0

    @property
    def start(self):
        return self.offset + 30 + len(self.name) + 20

    @property
    def end(self):
        return self.start + self.size

    def write(self, handle, column, pool, buffers, bar):
        header, dtype = npy_header(column.shape, column.dtype), np.dtype(column.dtype)
        row_bytes = dtype.itemsize * int(np.prod(column.shape[1:]))

        def copy(piece):
            start, stop = piece
            size = (stop - start) * row_bytes
            if len(getattr(buffers, 'bytes', b'')) < size:
                buffers.bytes = bytearray(size)  # one for each thread: new memory for every piece would take half of the time
            data = memoryview(buffers.bytes)[:size]
            column.read(start, stop, np.frombuffer(data, dtype).reshape(stop - start, *column.shape[1:]))
            _write_all(handle, data, self.start + len(header) + start * row_bytes)
            return zlib.crc32(data), size

        self.crc, self.size = zlib.crc32(header), len(header)
        _write_all(handle, header, self.start)
        for crc, length in pool.map(copy, column.pieces):
            self.crc, self.size = crc32_combine(self.crc, crc, length), self.size + length
            bar.update(length)
        # Local header, zip version 4.5; sizes are in the extra field 1.
        local = struct.pack('<4sHHHHHIIIHH', b'PK\3\4', 45, 0, 0, 0, 33, self.crc, 2**32 - 1, 2**32 - 1, len(self.name), 20)
        _write_all(handle, local + self.name + struct.pack('<HHQQ', 1, 16, self.size, self.size), self.offset)

    def entry(self) -> bytes:
        """Of the zip's directory."""
        fixed = struct.pack('<4sHHHHHHIIIHHHHHII', b'PK\1\2', 45, 45, 0, 0, 0, 33, self.crc, 2**32 - 1, 2**32 - 1,
                            len(self.name), 28, 0, 0, 0, 0o600 << 16, 2**32 - 1)
        return fixed + self.name + struct.pack('<HHQQQ', 1, 24, self.size, self.size, self.offset)


def _directory(members, offset) -> bytes:
    """Directory of the zip, its 64-bit end, the locator of that, and an old end that refers to them."""
    entries = b''.join(member.entry() for member in members)
    end = struct.pack('<4sQHHIIQQQQ', b'PK\6\6', 44, 45, 45, 0, 0, len(members), len(members), len(entries), offset)
    locator = struct.pack('<4sIQI', b'PK\6\7', 0, offset + len(entries), 1)
    return entries + end + locator + struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)


def _write_all(handle, data, offset):
    view = memoryview(data)
    while len(view):
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def crc32_combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two byte strings one after the other, from those of each and the second one's length.

    CRCs are remainders modulo a polynomial P over GF(2): crc(ab) = crc(a) x^(8 length) + crc(b) mod P.
    """
    return _multiply(first, _x_to_the(8 * length)) ^ second


def _multiply(a: int, b: int) -> int:
    """a b mod P, for polynomials whose highest bit is the coefficient of x^0."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)  # times x
    return product


@functools.lru_cache
def _x_to_the(n: int) -> int:
    """x^n mod P, by squaring."""
    result, square = 1 << 31, 1 << 30
    while n:
        if n & 1:
            result = _multiply(result, square)
        square, n = _multiply(square, square), n >> 1
    return result


def map_array(path: str, name: str) -> np.ndarray | None:
    """The array `name` of an .npz as a read-only memory map of the file, None if it is compressed.

    Raises KeyError if there is no such array, ValueError or zipfile.BadZipFile for a file that is damaged or holds objects.
    """
    with zipfile.ZipFile(path) as z:
        info = z.getinfo(f'{name}.npy')
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with z.open(info) as file:
            shape, fortran, dtype = read_npy_header(file)
            header = file.tell()
    with open(path, 'rb') as file:  # the local header has lengths of its own
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), '<u2')
    offset = info.header_offset + 30 + int(lengths.sum()) + header
    return np.memmap(path, dtype, 'r', offset, shape, order='F' if fortran else 'C')


def read_npy_header(file: io.BufferedIOBase) -> tuple:
    """(shape, Fortran order, dtype) of an .npy file, which is left at its first number. Raises ValueError for others."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError('it holds objects')
    return shape, fortran, dtype
