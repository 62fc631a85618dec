"""Writes class files (see `class_files`), by any number of processes in any number of runs."""

import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dnnlib import UserError
from dnnlib.npz import npy_header
from dnnlib.util import require_same
from synthetic_data.class_files import ClassFile, Record
from synthetic_data.npz import reserve


def write_at(path: str, offset: int, parts: Iterable[bytes]):
    """Writes these bytes into an existing file; they are on the disk at the end."""
    with open(path, 'r+b') as file:
        file.seek(offset)
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


class ClassWriter:
    """The file of one class while it is made, by any number of processes and in any number of
    runs.

    Images stand in the order in which their seeds were first asked for: seeds that a later run
    asks for in addition come after those that are there, and seeds that are there are not made
    again. What a stopped run has not finished is made first. The whole space is reserved before
    the first image, so a full disk is noticed then.

    `<class>.npy.part` has the final size; a byte of `<class>.npy.done` is set after the image has
    been written; `<class>.part.json` is the record to be. The part takes the final name when it is
    complete; `<class>.npy` of an earlier run stays until then.

    Attributes after `open`: record, seeds (of each image); `record` is None if nothing is left to
    do.
    """

    def __init__(self, folder: str, label: int):
        stem = os.path.join(folder, str(label))
        self.npy = stem + '.npy'
        self.json = stem + '.json'
        self.part = stem + '.npy.part'
        self.done = stem + '.npy.done'
        self.part_json = stem + '.part.json'
        self.record = None

    def prepare(self, seeds: Iterable[int], made_by: dict, image_shape: tuple):
        """Makes the files of what is missing of these seeds (one process does it).

        Raises UserError if the class is of another network or other options, OSError if the disk
        is too small.
        """
        self._recover()
        finished = Record.load(self.json)
        begun = Record.load(self.part_json)
        record = begun or finished or Record([], made_by)
        wanted = dict.fromkeys(record.made_by) | made_by  # what is no longer given has changed
        require_same(self.npy, record.made_by, wanted, 'choose another folder, or remove it')
        if finished is None and os.path.exists(self.npy):
            raise UserError(f'{self.npy} is there without its record {self.json}; choose another '
                            'folder')
        target = list(dict.fromkeys([*record.seeds, *map(int, seeds)]))
        if begun is None and target == record.seeds:
            return
        try:
            # Also undoes an extension that was stopped before its record was written.
            self._reserve((len(target), *image_shape), 'r+b' if begun else 'wb')
            if record is finished:
                self._take_over(len(finished.seeds))
            Record(target, made_by).save(self.part_json)
        except BaseException:
            self._recover()
            raise

    def _take_over(self, count: int):
        """The first `count` images are those of the finished file."""
        finished = ClassFile.open(self.npy)
        part = ClassFile.open(self.part)
        if finished.shape != (count, *part.shape[1:]):
            raise UserError(f'{self.npy} has shape {list(finished.shape)}, but its record says '
                            f'{count} images')
        write_at(self.part, part.offset, finished.chunks())
        self._mark(0, count)

    def _reserve(self, shape, mode: str):
        """Room for so many images; the header has the same length whatever their number."""
        header = npy_header(shape, '|u1')
        for path, size in (self.done, shape[0]), (self.part, len(header) + math.prod(shape)):
            with open(path, mode) as file:
                reserve(file, size)
        write_at(self.part, 0, [header])

    def _recover(self):
        """Ends what a stop within `finish` has left, and removes files of a beginning that came to
        nothing."""
        begun = Record.load(self.part_json)
        if begun and not os.path.exists(self.part):
            if len(ClassFile.open(self.npy)) != len(begun.seeds):
                raise UserError(f'{self.part} is gone; remove {self.part_json} too')
            os.replace(self.part_json, self.json)
            begun = None
        if begun is None:
            for path in self.part, self.done:
                Path(path).unlink(missing_ok=True)

    def open(self) -> 'ClassWriter':
        """Reads the state after `prepare`, on every process."""
        self.record = Record.load(self.part_json)
        if self.active:
            self.seeds = self.record.seeds
            self._file = ClassFile.open(self.part)
            if not len(self.seeds) == len(self._file) == os.path.getsize(self.done):
                raise UserError(f'{self.part} is too short for its record; remove '
                                f'{self.part_json}')
        return self

    @property
    def active(self) -> bool:
        """Something is left to do, if only to finish."""
        return self.record is not None

    def is_done(self) -> np.ndarray:
        """bool [N]: which images are written."""
        return np.fromfile(self.done, bool)

    def missing(self, block: int) -> list[tuple[int, int]]:
        """(start, stop) of the blocks of which an image is missing. They are the same in every
        run: a multiple of `block` images from the first one, so that the images of a stopped run
        are computed together as in any other."""
        done = self.is_done()
        return [(start, min(start + block, len(done))) for start in range(0, len(done), block)
                if not done[start:start + block].all()]

    def write(self, start: int, images: np.ndarray):
        """Images uint8 [n,H,W,3] from place `start` on; they count as made once they are in the
        file."""
        offset = self._file.offset + start * math.prod(images.shape[1:])
        write_at(self.part, offset, [images.tobytes()])
        self._mark(start, len(images))

    def _mark(self, start, count):
        write_at(self.done, start, [b'\1' * count])

    def finish(self) -> bool:
        """Gives the file its final name if all images are in it (one process does it); True if it
        did."""
        if not self.active or not self.is_done().all():
            return False
        crc = 0
        for chunk in self._file.chunks():
            crc = zlib.crc32(chunk, crc)
        Record(self.seeds, self.record.made_by, crc).save(self.part_json)
        os.replace(self.part, self.npy)
        self._recover()
        self.record = None
        return True
