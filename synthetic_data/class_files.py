"""Folders of labelled images as one array file for each class: `<class>.npy`, uint8 [N,H,W,3].

`<class>.json` beside it is its `Record`. While images are made there are also `<class>.npy.part`,
`<class>.npy.done` and `<class>.part.json`: see `class_writer`. Nothing here but
`ClassFile.images` needs NumPy, so that `combine_data.py` starts fast.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence

from dnnlib import UserError
from dnnlib.npz import read_npy_header
from dnnlib.util import matching_names, parse_int_list, write_json

# What reading a record raises that is not one.
DAMAGES = (OSError, ValueError, KeyError, TypeError)
CHUNK_BYTES = 1 << 20  # that are read at a time: they stay in the cache of a core


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

    def chunks(self) -> Iterator[bytes]:
        """The bytes of all images."""
        with open(self.path, 'rb') as file:
            file.seek(self.offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def images(self, indices):
        """uint8 [n,3,H,W] at `indices` (int [n]).

        The file is mapped for this moment only: mapped pages count as memory of the process.
        """
        import numpy as np
        images = np.memmap(self.path, np.uint8, 'r', self.offset, self.shape)
        return images[indices].transpose(0, 3, 1, 2)

    def recorded_crc32(self) -> int | None:
        """CRC-32 of the images as the record has it; None if it has none, or the images were
        changed after it."""
        path = self.path.removesuffix('.npy') + '.json'
        with contextlib.suppress(*DAMAGES):
            with open(path) as file:
                record = json.load(file)
            unchanged = os.path.getmtime(self.path) <= os.path.getmtime(path)
            if unchanged and record['images'] == len(self):
                return int(record['crc32'])
        return None


@dataclasses.dataclass
class Record:
    """What a class file holds, as its .json says."""

    seeds: list              # of each image
    made_by: dict            # what else they depend on, plain values
    crc32: int | None = None  # of the images' bytes, once all are there; not of earlier versions

    def save(self, path: str):
        write_json(path, {'images': len(self.seeds), 'seeds': format_ranges(self.seeds),
                          'made_by': self.made_by, 'crc32': self.crc32})

    @classmethod
    def load(cls, path: str) -> 'Record | None':
        """None if there is no such file. Raises UserError for one that is damaged."""
        if not os.path.isfile(path):
            return None
        try:
            with open(path) as file:
                value = json.load(file)
            return cls(parse_int_list(value['seeds']), dict(value['made_by']), value.get('crc32'))
        except DAMAGES:
            raise UserError(f'{path} is damaged; remove it and the images beside it') from None


def format_ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> '0-2,7'; the order stays, and `parse_int_list` reads it."""
    ranges = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *more = (number for _, number in run)
        ranges.append(f'{first}-{more[-1]}' if more else str(first))
    return ','.join(ranges)


def open_classes(folders: Sequence[str], class_num: int) -> list[list[ClassFile]]:
    """The files of each class 0 .. class_num - 1: one of every folder.

    Raises UserError that names the file: one that is missing or damaged, images of another shape,
    a class too many, and folders that hold the same seeds of one network.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f'{folder}: no such folder')
        last = max((int(match[1]) for match in matching_names(folder, r'(\d+)\.npy')), default=0)
        if last >= class_num:
            raise UserError(f'{os.path.join(folder, str(last))}.npy is of class {last}, but the '
                            f'number of classes is {class_num}')
    classes = [[ClassFile.open(os.path.join(folder, f'{label}.npy')) for folder in folders]
               for label in range(class_num)]
    first = classes[0][0]
    for file in itertools.chain(*classes):
        if file.shape[1:] != first.shape[1:]:
            raise UserError(f'{file.path} has images of {list(file.shape[1:])}, but those of '
                            f'{first.path} are {list(first.shape[1:])}')
    for a, b in itertools.combinations(folders, 2):
        for label in range(class_num):
            check_overlap(a, b, label)
    return classes


def check_overlap(a: str, b: str, label: int):
    """Raises UserError if two folders hold the same seeds of one network."""
    records = [Record.load(os.path.join(folder, f'{label}.json')) for folder in (a, b)]
    if None in records or records[0].made_by != records[1].made_by:
        return
    common = sorted(set(records[0].seeds) & set(records[1].seeds))
    if common:
        raise UserError(f'{a} and {b} both hold class {label} of the seeds '
                        f'{format_ranges(common)[:60]}; make one of them with other --seeds')
