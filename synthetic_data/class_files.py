"""Labelled images on the disk: `<class>.npy`, uint8 [N,H,W,3] (see training.data.class_files), and
all classes as one .npz.

`<class>.json` beside it is its `Record`. While images are made there are also `<class>.npy.part`,
`<class>.npy.done` and `<class>.part.json`: see `ClassWriter`. Nothing here needs NumPy, so that
`combine_data.py` starts fast.
"""

import errno
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from dnnlib import UserError, progress
from dnnlib.npz import npy_header, verifies
from dnnlib.util import (
    atomic_path,
    check_links,
    matching_names,
    require_same,
    writing,
)
from training.data.class_files import ClassFile, Record, crc32, format_ranges

ALIGNMENT = 32 << 10    # where images begin: systems copy faster between equal places in pages
PADDING_FIELD = 0xD935  # of a zip's header, as others pad too
# What a file system says that cannot copy within the kernel (another one on the other side, a
# network, an old kernel).
REFUSALS = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
COPY_BYTES = 64 << 20  # that the kernel copies at a time


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
        check_links(folder, [f'{label}.npy' for label in range(class_num)])
    classes = [[ClassFile.open(os.path.join(folder, f'{label}.npy')) for folder in folders]
               for label in range(class_num)]
    first = classes[0][0]
    for files in classes:
        for file in files:
            if file.image_shape != first.image_shape:
                raise UserError(f'{file.path} has images of {list(file.shape[1:])}, but those of '
                                f'{first.path} are {list(first.shape[1:])}')
        for pair in itertools.combinations(files, 2):
            a, b = (Record.load(file.record_path) for file in pair)
            common = sorted({*a.seeds} & {*b.seeds}) if a and b and a.made_by == b.made_by else []
            if common:
                raise UserError(f'{pair[0].path} and {pair[1].path} both hold the seeds '
                                f'{format_ranges(common)[:60]}; make one with other --seeds')
    return classes


# --- A file while it is made ---------------------------------------------------------------------


def reserve(file: BinaryIO, size: int):
    """Takes the disk space of a file now: a full disk is noticed before anything is made, and
    copying is faster."""
    file.truncate(size)
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)


def write_at(path: str, offset: int, parts: Iterable[bytes]):
    """Writes these bytes into an existing file; they are on the disk at the end."""
    with writing(path), open(path, 'r+b') as file:
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

    Attributes after `open`: seeds (of each image), and `record`, which is None if nothing is left
    to do, not even to finish.
    """

    def __init__(self, folder: str, label: int):
        self.label = label
        stem = os.path.join(folder, str(label))
        self.npy = stem + '.npy'
        self.json = stem + '.json'
        self.part = stem + '.npy.part'
        self.done = stem + '.npy.done'
        self.part_json = stem + '.part.json'
        self.record = None

    def prepare(self, seeds: Iterable[int], made_by: dict, image_shape: tuple):
        """Makes the files of what is missing of these seeds (one process does it).

        Raises UserError if the class is of another network or other options, or the disk is too
        small.
        """
        self._recover()
        finished = Record.load(self.json)
        begun = Record.load(self.part_json)
        record = begun or finished or Record([], made_by)
        wanted = dict.fromkeys(record.made_by) | made_by  # what is no longer given has changed
        require_same(self.npy, record.made_by, wanted, 'give that one, or choose another folder')
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
            Record(target, made_by, label=self.label).save(self.part_json)
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
        finished.verify()
        write_at(self.part, part.offset, finished.chunks())
        self._mark(0, count)

    def _reserve(self, shape, mode: str):
        """Room for so many images; the header has the same length whatever their number."""
        header = npy_header(shape, '|u1')
        for path, size in (self.done, shape[0]), (self.part, len(header) + math.prod(shape)):
            with writing(path), open(path, mode) as file:
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
        if self.record:
            self.seeds = self.record.seeds
            self._file = ClassFile.open(self.part)
            if not len(self.seeds) == len(self._file) == os.path.getsize(self.done):
                raise UserError(f'{self.part} is too short for its record; remove '
                                f'{self.part_json}')
        return self

    def missing(self, block: int) -> list[tuple[int, int]]:
        """(start, stop) of the blocks of which an image is missing. They are the same in every
        run: a multiple of `block` images from the first one, so that the images of a stopped run
        are computed together as in any other."""
        done = Path(self.done).read_bytes()
        return [(start, min(start + block, len(done))) for start in range(0, len(done), block)
                if 0 in done[start:start + block]]

    def write(self, start: int, images):
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
        if not self.record or self.missing(len(self.seeds)):
            return False
        crc = crc32(self._file.chunks())
        Record(self.seeds, self.record.made_by, crc, self.label).save(self.part_json)
        os.replace(self.part, self.npy)
        self._recover()
        self.record = None
        return True


# --- All classes in one file ---------------------------------------------------------------------


def append_images(dest: BinaryIO, source: ClassFile, crc: int) -> int:
    """Appends the images of a class file; returns the CRC-32 of `dest`, which was `crc` before.

    Raises UserError if the images are not those of the file's record, or the file ends before its
    last image.
    """
    images_crc = copy_in_kernel(dest, source)
    if images_crc is None:
        end = dest.tell() + source.num_bytes
        images_crc = 0
        for chunk in source.chunks():
            dest.write(chunk)
            images_crc = zlib.crc32(chunk, images_crc)
        if dest.tell() != end:
            raise UserError(f'{source.path} is cut short; make it again')
    if verifies():
        source.compare(images_crc)
    return combine_crc32(crc, images_crc, source.num_bytes)


def copy_in_kernel(dest: BinaryIO, source: ClassFile) -> int | None:
    """Appends the images without a detour through this process, as `cp` does; None, with nothing
    appended, where that is not possible.

    Returns their CRC-32, which a thread finds meanwhile; without `verifies()` that of the record,
    if it has one.
    """
    dest.flush()
    start = dest.tell()
    copied = 0
    recorded = 0 if verifies() else source.recorded_crc32()
    crc = recorded
    with open(source.path, 'rb') as file, ThreadPoolExecutor(1) as pool:
        try:
            while copied < source.num_bytes:
                part = copied, min(copied + COPY_BYTES, source.num_bytes)
                reading = None if recorded else pool.submit(crc32, source.chunks(*part), crc)
                while count := os.copy_file_range(file.fileno(), dest.fileno(), part[1] - copied,
                                                  source.offset + copied, start + copied):
                    copied += count
                if copied < part[1]:
                    break
                crc = reading.result() if reading else crc
        except AttributeError:
            pass  # not on this system
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
    complete = copied == source.num_bytes
    dest.seek(start + copied * complete)
    return crc if complete else None


def combine_crc32(first: int, second: int, length: int) -> int:
    """CRC-32 of two byte strings one after the other, from those of each and the second one's
    length.

    CRCs are remainders modulo a polynomial P over GF(2): crc(ab) = crc(a) x^(8 length) + crc(b)
    mod P.
    """
    square = 1 << 23  # x^8; the highest bit is the coefficient of x^0
    while length:
        if length & 1:
            first = _multiply(first, square)
        square = _multiply(square, square)
        length >>= 1
    return first ^ second


def _multiply(a: int, b: int) -> int:
    """a b mod P."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)  # times x
    return product


def write_npz(dest: str, image_shape: Sequence[int], counts: Sequence[int],
              parts: Iterable[ClassFile | bytes]):
    """Writes an uncompressed .npz, whose images are never all in memory; `dest` appears only when
    complete.

    image_shape  (H, W, 3)
    counts       images of each class
    parts        all images, in order: files, or bytes

    Raises UserError if the disk is full.
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
        for part in progress.bar(parts, unit='part', desc=os.path.basename(dest)):
            if isinstance(part, ClassFile):
                image.CRC = append_images(file, part, image.CRC)
            else:
                file.write(part)
                image.CRC = zlib.crc32(part, image.CRC)
        z.start_dir = file.tell()
        file.seek(0)
        file.write(image.FileHeader(zip64=True))
        image.extra = b''
        z.filelist.append(image)
        with z.open('label.npy', 'w', force_zip64=True) as labels:
            labels.write(npy_header(shape[:1], '<i8'))
            for label, count in enumerate(counts):
                labels.write(struct.pack('<q', label) * count)
