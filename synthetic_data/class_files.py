"""Folders of labelled images as one array file for each class: `<class>.npy`, uint8 [N,H,W,3].

`<class>.json` beside it says which seeds the images were made from, in order, and how. While images are made there are
also `<class>.npy.part`, `<class>.npy.done` and `<class>.part.json`: see `class_writer`.

NumPy is imported where it is needed only: `combine_data.py` does without, because the import would take a third of its time.
"""

import contextlib
import dataclasses
import math
import os
import re
import struct
from collections.abc import Sequence

from dnnlib import UserError
from synthetic_data.stored_zip import PIECE_BYTES, Bytes, Computed, FilePart, checksum, npy_header, read_all

# As written here and by numpy.save; all others are left to NumPy.
HEADER = re.compile(rb"\x93NUMPY\x01\x00v\x00"
                    rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d+), (\d+), (\d+), 3\),? ?\} *\n")

# An extended attribute of finished files: CRC-32 of the images, size of the file, time of its last change in ns. It is no
# part of the contents, so that these depend on seeds and network alone.
CHECKSUM = 'user.images_crc32'


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """uint8 images [N,H,W,3] in an .npy file, of which nothing is kept in memory."""

    path: str
    shape: tuple
    offset: int

    @classmethod
    def open(cls, path: str) -> 'ArrayFile':
        """Raises UserError that names the file if it is missing, damaged, or not of this type and shape."""
        if not os.path.isfile(path):
            raise UserError(f'{path}: no such file; generate.py makes one for each class')
        try:
            with open(path, 'rb') as file:
                match = HEADER.fullmatch(file.read(128))
                if match is None:
                    from dnnlib.npz import read_npy_header
                    file.seek(0)
                    shape, fortran, dtype = read_npy_header(file)
                else:
                    shape, fortran, dtype = (*map(int, match.groups()), 3), False, 'uint8'
                offset = file.tell()
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f'{path} is no .npy file of images ({" ".join(str(error).split())[:100]})') from None
        if dtype != 'uint8' or len(shape) != 4 or shape[3] != 3 or fortran or not all(shape):
            raise UserError(f'{path} holds {dtype} {list(shape)} instead of images uint8 [N, H, W, 3]')
        if os.path.getsize(path) != offset + math.prod(shape):
            raise UserError(f'{path} is cut short or too long for {list(shape)}; make it again')
        return cls(path, tuple(shape), offset)

    def __len__(self):
        return self.shape[0]

    def read_into(self, start: int, out):
        """Images from `start` on into the uint8 array `out` [n,H,W,3]. Read, not mapped: mapped pages count as memory of the
        process.

        Raises UserError if the file ends before.
        """
        with open(self.path, 'rb', buffering=0) as file:
            read_all(file.fileno(), memoryview(out).cast('B'), self.offset + start * math.prod(self.shape[1:]), self.path)

    def map(self):
        """All images as a read-only memory map."""
        import numpy as np
        return np.memmap(self.path, np.uint8, 'r', self.offset, self.shape)

    def remember_checksum(self):
        """Computes the CRC-32 of the images and keeps it with the file, if the file system can, for `known_checksum`."""
        with open(self.path, 'rb') as file:
            before = os.fstat(file.fileno())
            crc = checksum(file.fileno(), self.offset, math.prod(self.shape))
            if hasattr(os, 'setxattr'):
                with contextlib.suppress(OSError):
                    os.setxattr(file.fileno(), CHECKSUM, b'%d %d %d' % (crc, before.st_size, before.st_mtime_ns))

    def known_checksum(self) -> int | None:
        """CRC-32 of the images if it was computed when the file was made, and the file has not been changed since."""
        try:
            crc, *state = map(int, os.getxattr(self.path, CHECKSUM).split())
            now = os.stat(self.path)
        except (OSError, AttributeError, ValueError):  # none; no such thing on this system; damaged
            return None
        return crc if state == [now.st_size, now.st_mtime_ns] and crc >> 32 == 0 else None


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """The images of one class, which may lie in several files, one after the other."""

    files: tuple[ArrayFile, ...]

    def __len__(self):
        return sum(map(len, self.files))

    @property
    def image_shape(self) -> tuple:
        """(H, W, 3)."""
        return self.files[0].shape[1:]

    def read_into(self, start: int, out):
        """Images from `start` on into the uint8 array `out` [n,H,W,3], C order."""
        first, stop = 0, start + len(out)
        for file in self.files:
            low, high = max(start - first, 0), min(stop - first, len(file))
            if low < high:
                file.read_into(low, out[first + low - start:first + high - start])
            first += len(file)

    def read(self, start: int, stop: int):
        """Images start .. stop - 1, uint8 array [n,H,W,3]."""
        import numpy as np
        out = np.empty((stop - start, *self.image_shape), np.uint8)
        self.read_into(start, out)
        return out

    def take(self, indices):
        """The images at ascending `indices`, an array, uint8 [n,H,W,3]; one file at a time, through memory maps."""
        import numpy as np
        parts, first = [np.empty((0, *self.image_shape), np.uint8)], 0
        for file in self.files:
            mine = indices[(indices >= first) & (indices < first + len(file))] - first
            if len(mine):
                parts.append(file.map()[mine])  # a copy; the map ends here
            first += len(file)
        return np.concatenate(parts)


def open_classes(folders: str | Sequence[str], class_num: int) -> list[ClassImages]:
    """The images of classes 0 .. class_num - 1; those of several folders are joined.

    Raises UserError that names the file: one that is missing or damaged, images of another shape, a class too many, and
    folders that hold the same seeds of one network.
    """
    folders = [folders] if isinstance(folders, str) else list(folders)
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f'--data_dir={folder}: no such folder')
        beyond = [int(match[1]) for name in os.listdir(folder) if (match := re.fullmatch(r'(\d+)\.npy', name))]
        if max(beyond, default=0) >= class_num:
            raise UserError(f'{os.path.join(folder, str(max(beyond)))}.npy is of class {max(beyond)}, but --class_num is '
                            f'{class_num}')
    classes = [ClassImages(tuple(ArrayFile.open(os.path.join(folder, f'{label}.npy')) for folder in folders))
               for label in range(class_num)]
    shape = classes[0].image_shape
    for file in (file for images in classes for file in images.files):
        if file.shape[1:] != shape:
            raise UserError(f'{file.path} has images of {list(file.shape[1:])}, but those of {classes[0].files[0].path} are '
                            f'{list(shape)}')
    if len(folders) > 1:
        from synthetic_data.class_writer import check_overlap
        for label in range(class_num):
            check_overlap(folders, label)
    return classes


def stored(classes: Sequence[ClassImages]) -> dict[str, list]:
    """All images of all classes as arrays of an .npz for `write_zip`: `image` uint8 [N,H,W,3] and `label` int64 [N]."""
    images, labels = [], []
    for label, of_class in enumerate(classes):
        for file in of_class.files:
            images += FilePart(file.path, file.offset, math.prod(file.shape), file.known_checksum()).split()
        labels += _repeated(struct.pack('<q', label), len(of_class))
    total = sum(map(len, classes))
    return {'image.npy': [Bytes(npy_header((total, *classes[0].image_shape), '|u1')), *images],
            'label.npy': [Bytes(npy_header((total,), '<i8')), *labels]}


def _repeated(number: bytes, count: int) -> list[Computed]:
    def fill(view):
        view[:] = number * (len(view) // len(number))

    step = PIECE_BYTES // len(number)
    return [Computed(min(step, count - first) * len(number), fill) for first in range(0, count, step)]
