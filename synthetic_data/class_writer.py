"""Writes class files (see `class_files`), by any number of processes in any number of runs."""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import zlib
from collections.abc import Iterable

import numpy as np

from dnnlib import UserError
from dnnlib.npz import npy_header
from dnnlib.util import require_same
from synthetic_data.class_files import ClassFile, Record


class ClassWriter:
    """The file of one class while it is made, by any number of processes and in any number of
    runs.

    Images stand in the order in which their seeds were first asked for: seeds that a later run
    asks for in addition come after those that are there, and seeds that are there are not made
    again. What a stopped run has not finished is made first. The whole space is reserved before
    the first image, so a full disk is noticed then, and never in a mapped page.

    `<class>.npy.part` has the final size and is mapped into memory a block at a time; a byte of
    `<class>.npy.done` is set after the image has been written; `<class>.part.json` is the record
    to be. The part takes the final name when it is complete; `<class>.npy` of an earlier run stays
    until then.

    Attributes after `open`: record, seeds (int64 [N]); `record` is None if nothing is left to do.
    """

    def __init__(self, folder: str, label: int):
        stem = os.path.join(folder, str(label))
        self.folder = folder
        self.label = label
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
        require_same(f'class {self.label} in {self.folder}', record.made_by, wanted,
                     'choose another folder, or remove it')
        if finished is None and os.path.exists(self.npy):
            raise UserError(f'{self.npy} is there without its record {self.label}.json; choose '
                            'another folder')
        target = list(dict.fromkeys([*record.seeds, *map(int, seeds)]))
        shape = (len(target), *image_shape)
        if begun is not None:
            # Also undoes an extension that was stopped before its record was written.
            self._reserve(shape, 'r+b')
        elif len(target) > len(record.seeds):
            self._begin(shape, len(record.seeds))
        else:
            return
        Record(target, made_by).save(self.part_json)

    def _begin(self, shape, count: int):
        """New files in which the first `count` images are those of the finished file."""
        try:
            self._reserve(shape, 'wb')
            if count:
                finished = ClassFile.open(self.npy)
                if finished.shape != (count, *shape[1:]):
                    raise UserError(f'{self.npy} has shape {list(finished.shape)}, but its record '
                                    f'says {count} images')
                with open(self.npy, 'rb') as source, open(self.part, 'r+b') as file:
                    source.seek(finished.offset)
                    file.seek(len(npy_header(shape, '|u1')))
                    shutil.copyfileobj(source, file)
                    os.fsync(file.fileno())
                self._mark(0, count)
        except BaseException:
            self._remove(self.part, self.done)
            raise

    def _reserve(self, shape, mode: str):
        """Room for so many images; the header has the same length whatever their number."""
        header = npy_header(shape, '|u1')
        files = (self.done, shape[0], b''), (self.part, len(header) + math.prod(shape), header)
        for path, size, start in files:
            with open(path, mode) as file:
                file.truncate(size)
                if hasattr(os, 'posix_fallocate'):
                    os.posix_fallocate(file.fileno(), 0, size)
                file.write(start)

    def _recover(self):
        """Ends what a stop within `finish` has left, and removes files of a beginning that came to
        nothing."""
        begun = Record.load(self.part_json)
        if begun is not None and not os.path.exists(self.part):
            if len(ClassFile.open(self.npy)) != len(begun.seeds):
                raise UserError(f'{self.part} is gone; remove {self.label}.part.json too')
            os.replace(self.part_json, self.json)
            begun = None
        if begun is None:
            self._remove(self.part, self.done)

    @staticmethod
    def _remove(*paths):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def open(self) -> 'ClassWriter':
        """Reads the state after `prepare`, on every process."""
        self.record = Record.load(self.part_json)
        if self.active:
            self.seeds = np.array(self.record.seeds, dtype=np.int64)
            self._file = ClassFile.open(self.part)
            if not len(self.seeds) == len(self._file) == os.path.getsize(self.done):
                raise UserError(f'{self.part} is too short for its record; remove '
                                f'{self.label}.part.json')
        return self

    @property
    def active(self) -> bool:
        """Something is left to do, if only to finish."""
        return self.record is not None

    def is_done(self) -> np.ndarray:
        """bool [N]: which images are written."""
        return np.fromfile(self.done, np.uint8, len(self.seeds)) != 0

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
        window = np.memmap(self.part, np.uint8, 'r+', offset, images.shape)
        window[:] = images
        window.flush()
        self._mark(start, len(images))

    def _mark(self, start, count):
        with open(self.done, 'r+b') as file:
            file.seek(start)
            file.write(b'\1' * count)

    def finish(self) -> bool:
        """Gives the file its final name if all images are in it (one process does it); True if it
        did."""
        if not self.active or not self.is_done().all():
            return False
        crc = functools.reduce(lambda crc, chunk: zlib.crc32(chunk, crc), self._file.chunks(), 0)
        dataclasses.replace(self.record, crc32=crc).save(self.part_json)
        os.replace(self.part, self.npy)
        os.replace(self.part_json, self.json)
        os.remove(self.done)
        self.record = None
        return True
