"""Zip files without compression from pieces that are never all in memory, written at the speed of `cp`.

Nothing here needs NumPy, whose import takes half of the time in which 600 MB are copied; threads and bars are imported when
there is something to do for them.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from dnnlib import UserError
from dnnlib.util import atomic_path, core_count

PIECE_BYTES = 1 << 20  # that a thread reads and writes at a time: they stay in the cache of a core
PART_BYTES = 8 << 20   # of a file, that a thread copies and checks at a time: less costs time for each
ALIGNMENT = 32 << 10   # files in the zip begin at a multiple: systems copy large whole pages a quarter faster
BAR_AFTER = 2          # seconds

# A file system that cannot copy within the kernel (other ones on the two sides, an old kernel, a network) says one of these.
REFUSALS = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


# --- Pieces -----------------------------------------------------------------------------------------------------------


class Piece(Protocol):
    """Some bytes of a file in a zip. `write` is called once, from any thread; `computes` if threads make it faster."""

    size: int
    computes: bool

    def write(self, handle: int, offset: int) -> int:
        """Puts them into the file `handle`, from `offset` on; returns their CRC-32."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes in memory."""

    data: bytes
    computes = False

    @property
    def size(self):
        return len(self.data)

    def write(self, handle, offset):
        write_all(handle, self.data, offset)
        return zlib.crc32(self.data)


@dataclasses.dataclass(frozen=True)
class Computed:
    """Bytes that `fill(view)` puts into a writable memoryview of `size` bytes."""

    size: int
    fill: Callable
    computes = True

    def write(self, handle, offset):
        view = _buffer(self.size)
        self.fill(view)
        write_all(handle, view, offset)
        return zlib.crc32(view)


@dataclasses.dataclass(frozen=True)
class FilePart:
    """`size` bytes of the file `path`, from `start` on. With `crc`, their CRC-32, they never pass through this process."""

    path: str
    start: int
    size: int
    crc: int | None = None

    @property
    def computes(self):
        return self.crc is None

    def split(self) -> list['FilePart']:
        """Parts for threads; the whole if the checksum is known, since systems let one thread at a time write a file."""
        if self.crc is not None:
            return [self]
        return [FilePart(self.path, self.start + first, min(PART_BYTES, self.size - first))
                for first in range(0, self.size, PART_BYTES)]

    def write(self, handle, offset):
        """Raises UserError if the file ends before."""
        with open(self.path, 'rb', buffering=0) as source:
            with _copying:
                copied = copy_in_kernel(source.fileno(), handle, self.start, offset, self.size)
            for first in range(copied, self.size, PIECE_BYTES):
                view = _buffer(min(PIECE_BYTES, self.size - first))
                read_all(source.fileno(), view, self.start + first, self.path)
                write_all(handle, view, offset + first)
        return checksum(handle, offset, self.size) if self.crc is None else self.crc


# --- Reading and writing ----------------------------------------------------------------------------------------------

_buffers = threading.local()
_copying = threading.Lock()  # one thread at a time may write a file anyway, and the kernel would let the others wait busily


def _buffer(size: int) -> memoryview:
    """Memory of this thread: new memory for every piece would take half of the time."""
    if len(getattr(_buffers, 'bytes', b'')) < size:
        _buffers.bytes = bytearray(size)
    return memoryview(_buffers.bytes)[:size]


def write_all(handle: int, data, offset: int):
    """All bytes into a file from `offset` on; `os.pwrite` may write less."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def read_all(handle: int, view: memoryview, offset: int, path: str):
    """Fills `view` from a file. Raises UserError that names `path` if that ends before."""
    while len(view):
        count = os.preadv(handle, [view], offset)
        if not count:
            raise UserError(f'{path} is cut short; make it again')
        view, offset = view[count:], offset + count


def copy_in_kernel(source: int, dest: int, start: int, offset: int, size: int) -> int:
    """Copies without a detour through this process, as `cp` does; returns the number of bytes, which may be less than `size`
    (even 0) where the file system does not do that, or the file ends."""
    copied = 0
    while copied < size and hasattr(os, 'copy_file_range'):
        try:
            count = os.copy_file_range(source, dest, min(size - copied, 1 << 26), start + copied, offset + copied)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            break
        if not count:
            break
        copied += count
    return copied


def checksum(handle: int, start: int, size: int) -> int:
    """CRC-32 of a part of a file, which is mapped into memory PART_BYTES at a time: reading takes as long as the checksum."""
    crc, end = 0, start + size
    while start < end:
        before = start % mmap.ALLOCATIONGRANULARITY
        length = min(end - start, PART_BYTES)
        with mmap.mmap(handle, before + length, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=start - before) as pages, \
                memoryview(pages) as view, view[before:] as part:
            crc = zlib.crc32(part, crc)
        start += length
    return crc


def npy_header(shape: tuple, descr: str) -> bytes:
    """The header of an .npy file (format 1.0, C order; `descr` is e.g. '|u1'), 128 bytes whatever the number of rows."""
    text = repr({'descr': descr, 'fortran_order': False, 'shape': tuple(shape)})
    return b'\x93NUMPY\1\0' + struct.pack('<H', 118) + text.encode().ljust(117) + b'\n'


# --- The zip ----------------------------------------------------------------------------------------------------------


def write_zip(dest: str, members: dict[str, Sequence[Piece]], workers: int | None = None):
    """Writes a zip of files that are each made of pieces, in order; `dest` appears only when complete.

    The zip is of the 64-bit kind, so neither 4 GiB nor 65,535 files are limits. Raises OSError if the disk is full.
    """
    total = sum(piece.size for pieces in members.values() for piece in pieces)
    # Not synchronised, as with cp: the files that it was made of are still there if the power fails.
    with atomic_path(dest, sync=False) as temp, open(temp, 'r+b', buffering=0) as file:
        handle, entries, offset = file.fileno(), [], 0
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(handle, 0, total)  # a full disk is noticed now, and writing is faster
        with _Progress(total) as progress, _mapper(members, workers) as run:
            for name, pieces in members.items():
                entry = _Entry(name.encode(), offset)
                entry.write(handle, pieces, run, progress)
                entries.append(entry)
                offset = entry.end
        write_all(handle, _directory(entries, offset), offset)


@contextlib.contextmanager
def _mapper(members, workers):
    """`map`, by threads if they have enough to do."""
    workers = workers or min(core_count(), 8)
    if sum(piece.size for pieces in members.values() for piece in pieces if piece.computes) <= 4 * PIECE_BYTES:
        yield map
        return
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(workers) as pool:
        yield pool.map


class _Progress:
    """A bar, from the third second on."""

    def __init__(self, total):
        self.total, self.done, self.bar, self.begin = total, 0, None, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def update(self, count):
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() > self.begin + BAR_AFTER:
            from tqdm import tqdm
            self.bar = tqdm(total=self.total, initial=self.done, unit='B', unit_scale=True, disable=None)


@dataclasses.dataclass
class _Entry:
    """A stored file in a zip: where it lies, and its checksum and size once written."""

    name: bytes
    offset: int
    crc: int = 0
    size: int = 0

    @property
    def fields(self):
        """Bytes of the local header and what it must have: name, sizes, and the beginning of the padding."""
        return 30 + len(self.name) + 20 + 4

    @property
    def start(self):
        return -(-(self.offset + self.fields) // ALIGNMENT) * ALIGNMENT

    @property
    def end(self):
        return self.start + self.size

    def write(self, handle, pieces, run, progress):
        starts = itertools.accumulate((piece.size for piece in pieces), initial=self.start)
        for piece, crc in zip(pieces, run(lambda piece, start: piece.write(handle, start), pieces, starts), strict=True):
            self.crc, self.size = crc32_combine(self.crc, crc, piece.size), self.size + piece.size
            progress.update(piece.size)
        # Local header, zip version 4.5; sizes are in the extra field 1, and 0xD935 is the one that others pad with too.
        padding = self.start - self.offset - self.fields
        local = struct.pack('<4sHHHHHIIIHH', b'PK\3\4', 45, 0, 0, 0, 33, self.crc, 2**32 - 1, 2**32 - 1, len(self.name),
                            24 + padding)
        extra = struct.pack('<HHQQHH', 1, 16, self.size, self.size, 0xD935, padding)
        write_all(handle, local + self.name + extra + bytes(padding), self.offset)

    def entry(self) -> bytes:
        """Of the zip's directory."""
        fixed = struct.pack('<4sHHHHHHIIIHHHHHII', b'PK\1\2', 45, 45, 0, 0, 0, 33, self.crc, 2**32 - 1, 2**32 - 1,
                            len(self.name), 28, 0, 0, 0, 0o600 << 16, 2**32 - 1)
        return fixed + self.name + struct.pack('<HHQQQ', 1, 24, self.size, self.size, self.offset)


def _directory(files, offset) -> bytes:
    """Directory of the zip, its 64-bit end, the locator of that, and an old end that refers to them."""
    entries = b''.join(file.entry() for file in files)
    end = struct.pack('<4sQHHIIQQQQ', b'PK\6\6', 44, 45, 45, 0, 0, len(files), len(files), len(entries), offset)
    locator = struct.pack('<4sIQI', b'PK\6\7', 0, offset + len(entries), 1)
    return entries + end + locator + struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)


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
