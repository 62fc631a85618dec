"""Making class files (see `class_files`), by any number of processes in any number of runs, and records of what they hold."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np

from dnnlib import UserError
from dnnlib.npz import read_npy_header
from dnnlib.util import parse_int_list, write_json
from synthetic_data.class_files import ArrayFile
from synthetic_data.stored_zip import npy_header

COPY_BYTES = 8 << 20


# --- Records ----------------------------------------------------------------------------------------------------------


def format_ranges(numbers) -> str:
    """[0, 1, 2, 7] -> '0-2,7'; the order stays, and `parse_int_list` reads it."""
    numbers = np.asarray(numbers, dtype=np.int64)
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return ','.join(f'{part[0]}-{part[-1]}' if len(part) > 1 else str(part[0])
                    for part in np.split(numbers, cuts) if len(part))


@dataclasses.dataclass
class Record:
    """What a class file holds: the seed of each image (int64 [N]), and what else they depend on (plain values)."""

    seeds: np.ndarray
    made_by: dict

    def save(self, path: str):
        write_json(path, {'images': len(self.seeds), 'seeds': format_ranges(self.seeds), 'made_by': self.made_by})

    @classmethod
    def load(cls, path: str) -> 'Record | None':
        """None if there is no such file. Raises UserError for one that is damaged."""
        if not os.path.isfile(path):
            return None
        try:
            with open(path) as file:
                value = json.load(file)
            return cls(np.array(parse_int_list(value['seeds']), dtype=np.int64), dict(value['made_by']))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f'{path} is damaged; remove it and the images beside it') from None


def read_record(folder: str, label: int) -> Record | None:
    """The record of a finished class, or None."""
    return Record.load(os.path.join(folder, f'{label}.json'))


def check_overlap(folders: Sequence[str], label: int):
    """Raises UserError if two folders hold the same seeds of one network."""
    records = [read_record(folder, label) for folder in folders]
    known = [(folder, record) for folder, record in zip(folders, records, strict=True) if record]
    for i, (folder, record) in enumerate(known):
        for other, theirs in known[:i]:
            common = np.intersect1d(record.seeds, theirs.seeds)
            if record.made_by == theirs.made_by and len(common):
                raise UserError(f'{folder} and {other} both hold class {label} of the seeds {format_ranges(common)[:60]}; '
                                'make one of them with other --seeds')


# --- Writing ----------------------------------------------------------------------------------------------------------


class ClassWriter:
    """The file of one class while it is made, by any number of processes and in any number of runs.

    Images stand in the order in which their seeds were first asked for: seeds that a later run asks for in addition come
    after those that are there, and seeds that are there are not made again. What a stopped run has not finished is made
    first. The whole space is reserved before the first image, so a full disk is noticed then, and never in a mapped page.

    `<class>.npy.part` has the final size and is mapped into memory a block at a time; a byte of `<class>.npy.done` is set
    after the image has been written; `<class>.part.json` is the record to be. The part takes the final name when it is
    whole; `<class>.npy` of an earlier run stays until then.
    """

    def __init__(self, folder: str, label: int):
        self.label, self.folder = label, folder
        self.npy, self.json = os.path.join(folder, f'{label}.npy'), os.path.join(folder, f'{label}.json')
        self.part, self.done = self.npy + '.part', self.npy + '.done'
        self.part_json = os.path.join(folder, f'{label}.part.json')
        self.seeds, self.shape, self.offset = None, None, 0

    def prepare(self, seeds: np.ndarray, made_by: dict, image_shape: tuple):
        """Makes the files of what is missing of these seeds (one process does it). Raises UserError if the class is of
        another network or other options, OSError if the disk is too small.
        """
        self._recover()
        finished, begun = read_record(self.folder, self.label), Record.load(self.part_json)
        for record in (finished, begun):
            if record is not None and record.made_by != made_by:
                changed = [key for key in made_by | record.made_by if made_by.get(key) != record.made_by.get(key)]
                raise UserError(f'--outdir={self.folder} holds images of class {self.label} made with another '
                                f'{", ".join(changed)}; choose another folder, or remove it')
        if finished is None and os.path.exists(self.npy):
            raise UserError(f'{self.npy} is there without its record {self.label}.json; choose another --outdir')
        known = (begun or finished or Record(np.empty(0, np.int64), made_by)).seeds
        new = seeds[~np.isin(seeds, known)]
        target = np.concatenate([known, new])
        if begun is None and not len(new):
            return
        shape = (len(target), *image_shape)
        if begun is None:
            self._begin(shape, 0 if finished is None else len(finished.seeds))
        else:
            self._reserve(shape, keep=True)  # also undoes an extension that was stopped before its record was written
        Record(target, made_by).save(self.part_json)

    def _begin(self, shape, kept: int):
        """New files in which the first `kept` images are those of the finished file."""
        try:
            self._reserve(shape)
            if kept:
                old = ArrayFile.open(self.npy)
                if old.shape != (kept, *shape[1:]):
                    raise UserError(f'{self.npy} has shape {list(old.shape)}, but its record says {kept} images')
                step = max(COPY_BYTES // int(np.prod(shape[1:])), 1)
                for start in range(0, kept, step):
                    images = np.empty((min(step, kept - start), *shape[1:]), np.uint8)
                    old.read_into(start, images)
                    self._write(len(npy_header(shape, '|u1')), start, images)
        except BaseException:
            for path in (self.part, self.done):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
            raise

    def _reserve(self, shape, keep: bool = False):
        """Room for so many images; the header has the same length whatever their number."""
        header = npy_header(shape, '|u1')
        for path, size in ((self.done, shape[0]), (self.part, len(header) + int(np.prod(shape)))):
            with open(path, 'r+b' if keep else 'wb') as file:
                file.truncate(size)
                if hasattr(os, 'posix_fallocate'):
                    os.posix_fallocate(file.fileno(), 0, size)
                if path == self.part:
                    file.write(header)

    def _recover(self):
        """Ends what a stop within `finish` has left, and removes files of a beginning that came to nothing."""
        if os.path.exists(self.part_json) and not os.path.exists(self.part):
            if len(ArrayFile.open(self.npy)) != len(Record.load(self.part_json).seeds):
                raise UserError(f'{self.part} is gone; remove {self.label}.part.json too')
            os.replace(self.part_json, self.json)
        if not os.path.exists(self.part_json):
            for path in (self.part, self.done):
                if os.path.exists(path):
                    os.remove(path)

    def open(self):
        """Reads the state after `prepare`, on every process."""
        record = Record.load(self.part_json)
        if record is not None:
            with open(self.part, 'rb') as file:
                self.shape, _, _ = read_npy_header(file)
                self.offset = file.tell()
            self.seeds = record.seeds
            if self.shape[0] != len(self.seeds) or os.path.getsize(self.done) != len(self.seeds):
                raise UserError(f'{self.part} is too short for its record; remove {self.label}.part.json')
        return self

    @property
    def active(self) -> bool:
        """Something is left to do, if only to finish."""
        return self.seeds is not None

    def is_done(self) -> np.ndarray:
        """bool [N]: which images are written."""
        return np.fromfile(self.done, np.uint8, len(self.seeds)) != 0

    def missing(self, block: int) -> list[tuple[int, int]]:
        """(start, stop) of the blocks of which an image is missing. They are the same in every run: a multiple of
        `block` images from the first one, so that the images of a stopped run are computed together as in any other."""
        done = self.is_done()
        return [(start, min(start + block, len(done))) for start in range(0, len(done), block)
                if not done[start:start + block].all()]

    def write(self, start: int, images: np.ndarray):
        """Images uint8 [n,H,W,3] from place `start` on; they count as made once they are in the file."""
        self._write(self.offset, start, images)

    def _write(self, offset, start, images):
        row = int(np.prod(images.shape[1:]))
        window = np.memmap(self.part, np.uint8, 'r+', offset + start * row, images.shape)
        window[:] = images
        window.flush()
        del window
        with open(self.done, 'r+b') as file:
            file.seek(start)
            file.write(b'\1' * len(images))

    def finish(self) -> bool:
        """Gives the file its final name if all images are in it (one process does it); True if it did."""
        if not self.active or not self.is_done().all():
            return False
        ArrayFile.open(self.part).remember_checksum()
        os.replace(self.part, self.npy)
        os.replace(self.part_json, self.json)
        os.remove(self.done)
        self.seeds = None
        return True
