"""Large .npz files, read without loading them, and what they are made of: zip entries and .npy."""

import io
import struct
import zipfile

import numpy as np

LOCAL_HEADER = 30  # bytes before the name of a file in a zip


def map_array(path: str, name: str) -> np.ndarray | None:
    """The array `name` of an .npz as a read-only memory map of the file, None if it is compressed.

    Raises KeyError if there is no such array, ValueError or zipfile.BadZipFile for a file that is
    damaged or holds objects.
    """
    with zipfile.ZipFile(path) as z:
        info = z.getinfo(f'{name}.npy')
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with z.open(info) as file:
            shape, fortran, dtype = read_npy_header(file)
            header_bytes = file.tell()
    with open(path, 'rb') as file:
        file.seek(info.header_offset)
        start = entry_start(file.read(LOCAL_HEADER), info.header_offset)
    return np.memmap(path, dtype, 'r', start + header_bytes, shape, order='F' if fortran else 'C')


def entry_start(local_header: bytes, offset: int) -> int:
    """Where the data of a zip's file begin whose local header (the first 30 bytes) is at `offset`.

    That header has lengths of its own, other than the zip's directory. Raises ValueError for others.
    """
    if len(local_header) != LOCAL_HEADER or bytes(local_header[:4]) != b'PK\3\4':
        raise ValueError('a file in the zip has no header')
    return offset + LOCAL_HEADER + sum(struct.unpack_from('<HH', local_header, 26))


def read_npy_header(file: io.BufferedIOBase) -> tuple:
    """(shape, Fortran order, dtype) of an .npy file, which is left at its first number.

    Raises ValueError for others, and for arrays of objects.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError('it holds an array in an unknown version of .npy')
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError('it holds objects')
    return shape, fortran, dtype
