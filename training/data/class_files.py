"""A finished file of labelled images: `<class>.npy`, uint8 [N,H,W,3], and its record beside it.

Nothing here but `ClassFile.images` needs NumPy.
"""

import dataclasses
import itertools
import math
import os
import zlib
from collections.abc import Iterable, Iterator

from dnnlib import UserError, budget
from dnnlib.npz import read_npy_header, verifies
from dnnlib.util import finite, parse_int_list, write_json

CHUNK_BYTES = 1 << 20   # that are read at a time: they stay in the cache of a core


@dataclasses.dataclass
class Record:
    """What a class file holds, as its .json says."""

    seeds: list              # of each image
    made_by: dict            # what else they depend on, plain values
    crc32: int = 0           # of the images' bytes; 0: not all are there, or an earlier version
    label: int | None = None  # None: an earlier version

    def save(self, path: str):
        write_json(path, {'images': len(self.seeds), 'seeds': format_ranges(self.seeds),
                          'made_by': self.made_by, 'crc32': self.crc32, 'class': self.label})

    @classmethod
    def load(cls, path: str) -> 'Record | None':
        """None if there is no such file. Raises UserError for one that is damaged."""
        if not os.path.isfile(path):
            return None
        try:
            value = budget.read_json(path)
            made_by = finite(dict(value['made_by']))
            if made_by.get('discretization') == 'vp':  # of an earlier version
                made_by.setdefault('beta_d', 19.9)
            with budget.reading(path):
                seeds = parse_int_list(value['seeds'])
            return cls(seeds, made_by, int(value.get('crc32') or 0), value.get('class'))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path} is damaged; remove it and the images beside it') from None


@dataclasses.dataclass(frozen=True)
class ClassFile:
    """uint8 images [N,H,W,3] in an .npy file, of which nothing is kept in memory."""

    path: str
    shape: tuple
    offset: int  # of the first image in the file

    @classmethod
    def open(cls, path: str) -> 'ClassFile':
        """Raises UserError that names the file if it is missing, damaged, or of another type or
        shape."""
        if not os.path.isfile(path):
            raise UserError(f'{path}: no such file; generate.py makes one for each class')
        try:
            with open(path, 'rb') as file:
                shape, fortran, descr = read_npy_header(file)
                offset = file.tell()
        except (OSError, ValueError) as error:
            raise UserError(f'{path} is no .npy file of images ({error})') from None
        if descr != '|u1' or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise UserError(f'{path} holds {descr} {list(shape)} instead of images |u1 (uint8) '
                            '[N, H, W, 3]')
        if os.path.getsize(path) != offset + math.prod(shape):
            raise UserError(f'{path} is cut short or too long for {list(shape)}; make it again')
        return cls(path, shape, offset)

    def __len__(self):
        return self.shape[0]

    @property
    def image_shape(self) -> tuple:
        """(3, H, W)."""
        return self.shape[3], *self.shape[1:3]

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        return math.prod(self.shape)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes of all images, or those from `start` to `stop`."""
        left = (self.num_bytes if stop is None else stop) - start
        with open(self.path, 'rb', buffering=0) as file:
            file.seek(self.offset + start)
            while chunk := file.read(min(CHUNK_BYTES, left)):
                yield chunk
                left -= len(chunk)

    def images(self, indices):
        """uint8 [n,3,H,W] at `indices` (int [n]).

        The file is mapped for this moment only: mapped pages count as memory of the process.
        """
        import numpy as np
        images = np.memmap(self.path, np.uint8, 'r', self.offset, self.shape)
        return images[indices].transpose(0, 3, 1, 2)

    @property
    def record_path(self) -> str:
        return self.path.removesuffix('.npy') + '.json'

    def recorded_crc32(self) -> int:
        """CRC-32 of the images as the record has it; 0 if it has none.

        Raises UserError for the record of another class, or of more or fewer images.
        """
        record = Record.load(self.record_path)
        if record is None:
            return 0
        stem = os.path.basename(self.path).removesuffix('.npy')
        if len(record.seeds) != len(self) or str(record.label) not in ('None', stem):
            self._refuse('it has another number of images, or another class')
        return record.crc32

    @property
    def fingerprint(self) -> str:
        """Of all images if the record has it, else of a thousand."""
        some = slice(None, None, -(-len(self) // 1000))
        return f'{self.recorded_crc32() or crc32([self.images(some).tobytes()]):08x}'

    def compare(self, crc: int):
        """Raises UserError if `crc`, that of the images, is not that of the record, if any."""
        if self.recorded_crc32() not in (0, crc):
            self._refuse('wrong CRC')

    def verify(self):
        """Reads all images for `compare`, if `dnnlib.npz.verifies()`."""
        if verifies() and self.recorded_crc32():
            self.compare(crc32(self.chunks()))

    def _refuse(self, why):
        raise UserError(f'{self.path} is not what its record {self.record_path} says ({why}); '
                        'make both again, or remove the record if the images are right')


def crc32(chunks: Iterable[bytes], crc: int = 0) -> int:
    """CRC-32 of some bytes, after others whose CRC-32 is `crc`."""
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return crc


def format_ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> '0-2,7'; the order stays, and `parse_int_list` reads it."""
    ranges = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *more = (number for _, number in run)
        ranges.append(f'{first}-{more[-1]}' if more else str(first))
    return ','.join(ranges)
