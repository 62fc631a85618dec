"""The .npy and .npz formats: headers, where files in a zip begin, arrays that stay on the disk.

NumPy is imported where arrays are made: programs that only copy their bytes start in half the
time.
"""

import ast
import io
import math
import os
import re
import struct
import zipfile

from dnnlib import budget

MAGIC = b'\x93NUMPY'
NUMBERS = re.compile(r'[<>|=]?[biufcSU]\d{1,9}')  # types of arrays: one number or text each
MAX_HEADER = 10_000  # bytes, as in NumPy: the parser of longer ones could run out of stack
LOCAL_HEADER = 30    # bytes before the name of a file in a zip
UNVERIFIED = 'SKIP_CHECKSUMS'  # the variable of --verify=False, which child processes have too


def verifies() -> bool:
    """Whether files are read once more to compare them with their CRC."""
    return UNVERIFIED not in os.environ


def npy_header(shape: tuple, descr: str) -> bytes:
    """The header of an .npy file (format 1.0, C order; `descr` is e.g. '|u1').

    It has 128 bytes for any number of rows.
    """
    text = repr({'descr': descr, 'fortran_order': False, 'shape': tuple(shape)})
    return MAGIC + b'\1\0' + struct.pack('<H', 118) + text.encode().ljust(117) + b'\n'


def read_npy_header(file: io.BufferedIOBase) -> tuple:
    """(shape, Fortran order, type like '|u1') of an .npy file, which is left at its first number.

    Raises ValueError for other files, structured arrays and objects.
    """
    magic = file.read(8)
    if len(magic) < 8 or not magic.startswith(MAGIC):
        raise ValueError('it does not begin as .npy files do')
    size = int.from_bytes(file.read(2 if magic[6] == 1 else 4), 'little')
    try:
        header = ast.literal_eval(file.read(min(size, MAX_HEADER)).decode('latin1'))
        shape, fortran, descr = header['shape'], header['fortran_order'], header['descr']
        plain = isinstance(descr, str) and NUMBERS.fullmatch(descr)
        sound = all(type(length) is int and 0 <= length < 1 << 62 for length in shape)
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError('its header is damaged') from None
    if not plain:
        raise ValueError('it holds objects, or tables')
    if not sound or len(shape) > 32:
        raise ValueError('its shape is none of an array')
    return tuple(shape), bool(fortran), descr


def open_entry(z: zipfile.ZipFile, info: zipfile.ZipInfo):
    """z.open(info) of a file that is stored or deflated. Raises ValueError for others, of which
    zipfile unpacks whatever they hold at once.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{info.filename[:60]} is compressed in an unusual way')
    return z.open(info)


def entry_start(local_header: bytes, offset: int) -> int:
    """Where the data of a zip's file begin whose local header (the first 30 bytes) is at `offset`.

    That header has lengths of its own, other than the zip's directory. Raises ValueError for
    others.
    """
    if len(local_header) != LOCAL_HEADER or bytes(local_header[:4]) != b'PK\3\4':
        raise ValueError('a file in the zip has no header')
    return offset + LOCAL_HEADER + sum(struct.unpack_from('<HH', local_header, 26))


def open_array(path: str, name: str, check=None):
    """The array `name` of an .npz: a memory map of the file, in memory if it is compressed.
    `check(shape)` is called before it is read.

    All of its bytes are compared with their CRC, those of a map if `verifies()`. Raises KeyError
    if there is no such array, OSError, ValueError or zipfile.BadZipFile for a file that is damaged
    or holds objects.
    """
    import numpy as np
    with zipfile.ZipFile(path) as z:
        info = z.getinfo(f'{name}.npy')
        if info.compress_type != zipfile.ZIP_STORED:
            with budget.reading(path), open_entry(z, info) as file:
                shape, _, descr = read_npy_header(file)
                if check:
                    check(shape)
                budget.spend(memory=math.prod(shape) * np.dtype(descr).itemsize)
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
        with z.open(info) as file:
            shape, fortran, descr = read_npy_header(file)
            header = file.tell()
            if check:
                check(shape)
            while verifies() and file.read(1 << 20):
                pass                               # raises BadZipFile at a wrong CRC
    with open(path, 'rb') as file:
        file.seek(info.header_offset)
        start = entry_start(file.read(LOCAL_HEADER), info.header_offset)
    try:
        return np.memmap(path, descr, 'r', start + header, shape, order='F' if fortran else 'C')
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
