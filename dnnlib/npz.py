"""Large .npz files, read without loading them."""

import io
import zipfile

import numpy as np


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
