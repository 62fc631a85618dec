"""Labelled images as one .npz of any size: `image` uint8 [N,H,W,3] and `label` int64 [N], class by
class."""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

from dnnlib.npz import npy_header
from dnnlib.util import atomic_path

ALIGNMENT = 32 << 10    # where images begin: systems copy faster between equal places in pages
PADDING_FIELD = 0xD935  # of a zip's header, as others pad too


def reserve(file: BinaryIO, size: int):
    """Takes the disk space of a file now: a full disk is noticed before anything is made, and
    copying is faster."""
    file.truncate(size)
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)


def write_npz(dest: str, image_shape: Sequence[int], counts: Sequence[int], append: Callable):
    """Writes an uncompressed .npz, whose images are never all in memory; `dest` appears only when
    complete.

    image_shape  (H, W, 3)
    counts       images of each class
    append       `append(file, crc)` writes the bytes of all images, in order, to the binary file
                 and returns the CRC-32 of them after bytes of the CRC-32 `crc`

    Raises OSError if the disk is full.
    """
    shape = (sum(counts), *image_shape)
    header = npy_header(shape, '|u1')
    image = zipfile.ZipInfo('image.npy')
    image.header_offset = 0
    image.file_size = image.compress_size = len(header) + math.prod(shape)
    image.CRC = zlib.crc32(header)
    padding = ALIGNMENT - len(image.FileHeader(zip64=True)) - 4
    image.extra = struct.pack('<HH', PADDING_FIELD, padding) + bytes(padding)
    # Not synchronised, as with cp: the files that it was made of are still there if the power
    # fails.
    with (atomic_path(dest, sync=False) as temp, open(temp, 'w+b') as file,
          zipfile.ZipFile(file, 'w') as z):
        reserve(file, image.file_size)
        file.seek(ALIGNMENT)
        file.write(header)
        image.CRC = append(file, image.CRC)
        z.start_dir = file.tell()
        file.seek(0)
        file.write(image.FileHeader(zip64=True))
        image.extra = b''
        z.filelist.append(image)
        with z.open('label.npy', 'w', force_zip64=True) as labels:
            labels.write(npy_header(shape[:1], '<i8'))
            for label, count in enumerate(counts):
                labels.write(struct.pack('<q', label) * count)
