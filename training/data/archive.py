"""Data sets on disk: an uncompressed zip, or a folder, of images and `dataset.json`.

Images are `00000/img00000000.png`, latents `00000/img-mean-std-00000000.npy`, numbered by input;
the folder is the first five digits. `dataset.json` is {"labels": [[name, label], ...] or null,
...}; further keys describe the data.
"""

import bisect
import collections
import contextlib
import functools
import hashlib
import os
import posixpath
import stat
import struct
import zipfile
import zlib

import numpy as np

from dnnlib import budget, util
from dnnlib.image_io import is_image_name
from dnnlib.npz import LOCAL_HEADER, entry_start
from dnnlib.util import (
    UserError,
    atomic_path,
    check_place,
    first_stranger,
    printable,
    publishable,
    to_json,
)

JSON_NAME = 'dataset.json'
# What a data set consists of.
FILES = r'dataset\.json|(?:\d{5,}/)?(?:img|img-mean-std-)?\d{6,}\.(?:png|npy)'
# What it may say of classes: original index, name and ImageNet folder of each label.
CLASS_TABLES = ('classes', 'class_names', 'wnids')
MAX_FILE = 1 << 30     # bytes of an image or dataset.json; a file with holes has none on the disk
READ_FILES = 10_000    # of a folder, for its fingerprint
MAX_UNNAMED = 100_000  # classes beyond the number of images, if nothing names them


def image_name(index: int, kind: str = 'img', ending: str = '.png') -> str:
    """12 -> '00000/img00000012.png'."""
    digits = str(index).zfill(8)
    return f'{digits[:5]}/{kind}{digits}{ending}'


def latent_name(index: int) -> str:
    """12 -> '00000/img-mean-std-00000012.npy'."""
    return image_name(index, 'img-mean-std-', '.npy')


def check_size(where: str, size: int):
    """Raises UserError for a file that is far larger than an image: holes need no disk."""
    if size > MAX_FILE:
        raise UserError(f'{where} has {size} bytes, more than the {MAX_FILE >> 30} GiB that are '
                        'read of a file; make it smaller, or leave it out')


class ArchiveReader:
    """Files of a folder or a zip by name, sorted; of the data set's own folder, if that alone is
    in it.

    left_out: how many are hidden, or no files, a Counter. folders: the names of folders. damaged:
    what links to nothing, and folders that cannot be listed, as texts.

    Safe to use from several threads and after fork or pickling. Raises UserError for a path that
    does not exist, a damaged or encrypted zip, and names in a zip that point outside it.
    """

    def __init__(self, path: str):
        self.path = os.fspath(path)
        self.is_zip = os.path.isfile(self.path)
        self._file = None
        self.left_out = collections.Counter()
        self.folders = []
        self.damaged = []
        if self.is_zip:
            self._list_zip()
        elif os.path.isdir(self.path):
            self.names = sorted(self._walk())
        else:
            raise UserError(f'{self.path} does not exist; give a folder or a .zip file')
        self._inner = ''
        if self.find(JSON_NAME) < 0:
            self._enter_folder()

    def _walk(self):
        """Names of all files below the folder, following links but never twice into the same
        folder.

        Raises UserError for links that lead out of it, where `util.leads_out` tells of them.
        """
        seen, pending = set(), ['']
        outside = []
        while pending:
            prefix = pending.pop()
            folder = os.path.join(self.path, prefix)
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            try:
                with os.scandir(folder) as entries:
                    entries = list(entries)
            except OSError as error:
                self.damaged.append(f'{folder} cannot be listed ({error.strerror})')
                continue
            for entry in entries:
                if entry.name.startswith('.') or entry.name == '__MACOSX':
                    self.left_out['hidden'] += 1
                elif entry.is_symlink() and util.leads_out(entry.path, self.path):
                    outside.append(prefix + entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self.damaged.append(f'{entry.path} is a link to nothing')
                elif entry.is_dir():
                    pending.append(f'{prefix}{entry.name}/')
                    self.folders.append(pending[-1])
                elif entry.is_file():
                    yield prefix + entry.name
                else:
                    self.left_out['no file'] += 1
        self.damaged.sort()
        util.refuse_links(self.path, outside)

    def _enter_folder(self):
        """Leaves the files of the folder that has a dataset.json and all images, if there is one.
        """
        inner = common_folder([name for name in self.names
                               if is_image_name(name) or name.endswith('.npy')])
        while inner and self.find(inner + JSON_NAME) < 0:
            inner = inner[:inner.rfind('/', 0, -1) + 1]
        rows = [row for row, name in enumerate(self.names) if name.startswith(inner)]
        self.left_out['beside the data set'] += len(self.names) - len(rows)
        self._inner = inner
        self.names = [self.names[row].removeprefix(inner) for row in rows]
        if self.is_zip:
            self._entries = self._entries[rows]

    def _list_zip(self):
        try:
            with zipfile.ZipFile(self.path) as z:
                infos = sorted(z.infolist(), key=lambda info: info.filename)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise UserError(f'{self.path} is not a readable zip file ({error})') from None
        self.names = []
        # Numbers instead of ZipInfo objects: a tenth of the memory; millions of files are usual.
        columns = []
        for info in infos:
            name = info.filename
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            if name.startswith('/') or '..' in name.split('/') or is_link:
                raise UserError(f'{self.path}: {name!r} points outside the zip; '
                                'make the zip without such names and links')
            is_hidden = name.startswith(('.', '__MACOSX/')) or '/.' in name
            if name[-1:] in ('', '/'):
                self.folders += [name] * (not is_hidden)
                continue
            if is_hidden:
                self.left_out['hidden'] += 1
                continue
            if self.names[-1:] == [name]:
                raise UserError(f'{self.path}: {name!r} is in the zip twice')
            plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if info.flag_bits & 1 or not plain:
                raise UserError(f'{self.path}: {name!r} is encrypted or compressed in an unusual '
                                'way; use a plain zip')
            self.names.append(name)
            columns.append((info.header_offset, info.compress_size, info.file_size, info.CRC,
                            info.compress_type))
        try:
            self._entries = np.array(columns, dtype=np.int64).reshape(-1, 5)
        except OverflowError:
            raise UserError(f'{self.path} is damaged: a file lies outside of it') from None

    def __getstate__(self):
        return self.__dict__ | {'_file': None}

    def __len__(self):
        return len(self.names)

    def size(self, index: int) -> int:
        """Bytes of file `names[index]`."""
        if self.is_zip:
            return int(self._entries[index, 2])
        return os.stat(self._place(index)).st_size

    def find(self, name: str) -> int:
        """Position of `name` in `names`, or -1."""
        place = bisect.bisect_left(self.names, name)
        return place if place < len(self.names) and self.names[place] == name else -1

    def where(self, index: int) -> str:
        """The file's name for a message."""
        if self.is_zip:
            return f'{self.path}: {self._inner}{self.names[index]}'
        return self._place(index)

    def _place(self, index: int) -> str:
        return f'{self.path}/{self._inner}{self.names[index]}'

    def read(self, index: int) -> bytes:
        """Bytes of file `names[index]`; UserError if it cannot be read or is damaged."""
        try:
            if self.is_zip:
                return self._read_entry(index)
            # Without a file object, which takes as long as the reading of a small file.
            handle = os.open(self._place(index), os.O_RDONLY)
            try:
                check_size(self.where(index), os.fstat(handle).st_size)
                return b''.join(iter(functools.partial(os.read, handle, 1 << 16), b''))
            finally:
                os.close(handle)
        except (OSError, ValueError, zlib.error) as error:
            raise UserError(f'{self.where(index)} cannot be read ({error})') from None

    def _read_entry(self, index: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, 'rb')
        offset, packed, size, crc, method = self._entries[index].tolist()
        # pread leaves the position alone, so threads and forked processes share one descriptor.
        descriptor = self._file.fileno()
        start = entry_start(os.pread(descriptor, LOCAL_HEADER, offset), offset)
        if max(packed, size) > budget.MEMORY:                 # what every budget has
            check_size(self.where(index), max(packed, size))
            if start + packed > os.fstat(descriptor).st_size:
                raise UserError(f'{self.where(index)} is cut off; copy or make the file again')
            budget.Budget(packed).spend(memory=size)
        data = os.pread(descriptor, packed, start)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, size + 1)  # 0: all
        if len(data) != size or zlib.crc32(data) != crc:
            raise UserError(f'{self.where(index)} is damaged; copy or make the file again')
        return data

    def fingerprint(self, indices: np.ndarray) -> str:
        """What tells the files `indices` by their names, sizes and CRC-32: 32 hexadecimal digits,
        the same for a zip and a folder, of which no more than `READ_FILES` are read.
        """
        if self.is_zip:
            sums = self._entries[indices, 2:4]
        else:
            step = -(-len(indices) // READ_FILES)
            sums = np.array([(self.size(index), 0 if row % step else zlib.crc32(self.read(index)))
                             for row, index in enumerate(indices)])
        digest = hashlib.sha256('\n'.join(self.names[index] for index in indices).encode())
        digest.update(sums.astype('<i8').tobytes())
        return digest.hexdigest()[:32]

    def description(self) -> dict:
        """The contents of dataset.json, {} if there is none; UserError if it is no JSON object."""
        index = self.find(JSON_NAME)
        if index < 0:
            return {}
        data = self.read(index)
        try:
            with budget.reading(self.path if self.is_zip else self._place(index)):
                value = budget.parse_json(data)
        except ValueError as error:
            raise UserError(f'{self.where(index)} is no valid JSON ({error})') from None
        if not isinstance(value, dict):
            raise UserError(f'{self.where(index)} must hold an object with "labels"')
        for key, part in value.items():
            texts = part if key in CLASS_TABLES and isinstance(part, list) else [part]
            if any(isinstance(text, str) and printable(text, 1000) != text for text in texts):
                raise UserError(f'{self.where(index)}: {printable(key, 40)} has control '
                                'characters or more than 1000 letters; write it anew')
        return value


def common_folder(names: list[str]) -> str:
    """The folder that all of the sorted names share, '' or e.g. 'photos/train/'."""
    common = os.path.commonprefix([*names[:1], *names[-1:]])
    return common[:common.rfind('/') + 1]


def labels_of(reader: ArchiveReader, names: list[str], description: dict) -> np.ndarray | None:
    """Labels of the files `names`: int64 [n], or float32 [n,D] for vectors, or None.

    `description` is what dataset.json holds. Raises UserError if its labels are malformed,
    negative, not finite or of mixed kinds, or some file has none.
    """
    labels = description.get('labels')
    if labels is None:
        return None
    where = reader.where(reader.find(JSON_NAME))
    try:
        labels = labels.items() if isinstance(labels, dict) else labels
        labels = {str(name).replace('\\', '/'): label for name, label in labels}
        if names[0] not in labels:                     # as others write them: ./0.png, /0.png
            labels = {posixpath.normpath(name).lstrip('/'): label
                      for name, label in labels.items()}
            above = next((name.removesuffix(names[0]) for name in labels
                          if name.endswith('/' + names[0])), '')
            labels = {name.removeprefix(above): label for name, label in labels.items()}
    except (TypeError, ValueError):
        raise UserError(f'{where}: "labels" must be a list of [file name, label]') from None
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(f'{where} has no label for {len(missing)} of {len(names)} images, '
                        f'e.g. {missing[0]}; give every image a label, or set "labels" to null')
    values = [labels[name] for name in names]
    if all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        return np.array(values, dtype=np.int64)
    try:
        vectors = np.array(values)
    except (TypeError, ValueError, OverflowError):
        vectors = np.zeros([0])
    if vectors.ndim != 2 or vectors.dtype.kind not in 'iuf' or not vectors.size:
        raise UserError(f'{where}: labels must all be whole numbers from 0, '
                        'or all vectors of one length')
    with np.errstate(over='ignore'):
        vectors = vectors.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(f'{where}: {len(bad)} of {len(names)} labels are not finite (NaN or '
                        f'infinite), e.g. that of {names[bad[0]]}; make it again')
    return vectors


def count_classes(labels: np.ndarray, info: dict, where: str) -> int:
    """Classes of labels int64 [n] or float32 [n,D]: as many as `info` names, if any.

    Raises UserError unless the tables are equally long lists of numbers or names for all labels,
    and for a label that is far beyond the number of images where there is no table.
    """
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    tables = [info[key] for key in CLASS_TABLES if info.get(key) is not None]
    if not tables and count > max(len(labels), MAX_UNNAMED):
        raise UserError(f'{where} has a label {count - 1}, but {len(labels)} images: '
                        'number the classes from 0 on without gaps')
    for table in tables:
        if not isinstance(table, list) or set(map(type, table)) not in ({int}, {str}) \
                or (isinstance(table[0], int) and max(map(abs, table)) >= 1 << 62):
            raise UserError(f'{where}: classes in dataset.json must be lists of numbers '
                            'or of names')
    named = set(map(len, tables)) or {count}
    if len(named) > 1 or max(named) < count:
        raise UserError(f'{where}: dataset.json names {min(named)} classes, '
                        f'but its labels need {count}')
    return max(named)


class _StoredZip:
    """Writes a zip of uncompressed files, without time stamps: the same files give the same bytes.

    Python's zipfile keeps an object for every file, hundreds of megabytes for millions of images,
    and takes several times as long for each.
    """

    limit = 0xFFFFFFFF  # offsets from here on need the zip64 fields

    def __init__(self, path: str):
        self.file = open(path, 'wb', buffering=1 << 20)
        self.offset = 0
        self.count = 0
        self.directory = bytearray()

    def add(self, names: list[str], files: np.ndarray, crcs: list[int]):
        """Adds the rows of uint8 [n,bytes], fast if their names are equally long."""
        count, size = files.shape
        names = [name.encode() for name in names]
        length = len(names[0])
        end = self.offset + count * (LOCAL_HEADER + length + size)
        if count > 1 and (end >= self.limit or len(set(map(len, names))) > 1):
            for name, row, crc in zip(names, files, crcs, strict=True):
                self.add([name.decode()], row[None], [crc])
            return
        is_far = self.offset >= self.limit
        extra = struct.pack('<2HQ', 1, 8, self.offset) if is_far else b''
        # Flag: names are UTF-8. Date: 1 January 1980, the first day that a zip can name.
        common = struct.pack('<4H3IH', 0x800, 0, 0, 0x21, 0, size, size, length)
        name = ('name', np.uint8, length)
        local = np.empty(count, [('head', 'V14'), ('crc', '<u4'), ('sizes', 'V12'), name,
                                 ('data', np.uint8, size)])
        entry = np.empty(count, [('head', 'V16'), ('crc', '<u4'), ('sizes', 'V22'),
                                 ('offset', '<u4'), name])
        heads = (struct.pack('<4sH', b'PK\3\4', 20),
                 struct.pack('<4s2H', b'PK\1\2', 3 << 8 | 45, 45 if is_far else 20))
        tails = (struct.pack('<H', 0),
                 struct.pack('<4HI', len(extra), 0, 0, 0, 0o100644 << 16))
        for rows, head, tail in zip((local, entry), heads, tails, strict=True):
            rows['head'] = np.void(head + common[:8])
            rows['crc'] = crcs
            rows['sizes'] = np.void(common[12:] + tail)
            rows['name'] = np.frombuffer(b''.join(names), np.uint8).reshape(count, length)
        local['data'] = files
        entry['offset'] = 0xFFFFFFFF if is_far else self.offset + local.itemsize * np.arange(count)
        self.file.write(local)
        self.directory += entry.tobytes() + extra
        self.offset = end
        self.count += count

    def close(self):
        size = len(self.directory)
        start = self.offset
        self.file.write(self.directory)
        if self.count >= 0xFFFF or max(start, size) >= self.limit:
            numbers = (44, 45, 45, 0, 0, self.count, self.count, size, start)
            self.file.write(struct.pack('<4sQ2H2I4Q', b'PK\6\6', *numbers))
            self.file.write(struct.pack('<4sIQI', b'PK\6\7', 0, start + size, 1))
        count = min(self.count, 0xFFFF)
        start = 0xFFFFFFFF if start >= self.limit else start
        numbers = (0, 0, count, count, min(size, 0xFFFFFFFF), start, 0)
        self.file.write(struct.pack('<4s4H2IH', b'PK\5\6', *numbers))
        self.file.close()


class ArchiveWriter:
    """Writes what appears only when complete: a zip if `dest` ends in .zip, else a folder.

        with ArchiveWriter('x.zip') as out:
            out.add(image_name(0), png)
            out.add_description({'labels': None})

    Raises UserError at once if `dest` exists (an empty folder is fine). With `overwrite=True` it
    is replaced when the new archive is complete; a folder only if it is an archive, i.e. holds
    dataset.json, and nothing that archives do not. `sync=False` does not wait until a zip is on
    the disk: for what can be made again.
    """

    def __init__(self, dest: str, overwrite: bool = False, sync: bool = True):
        self.dest = os.fspath(dest).rstrip('/')
        self.sync = sync
        self.is_zip = self.dest.lower().endswith('.zip')
        self._check = functools.partial(check_destination, self.dest, overwrite)
        self._check()

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._temp = self._stack.enter_context(
            atomic_path(self.dest, sync=self.sync, is_folder=not self.is_zip))
        if self.is_zip:
            self._zip = _StoredZip(self._temp)
            self._stack.callback(self._zip.close)  # before it is renamed
        return self

    def add(self, name: str, data: bytes):
        """Adds a file; names are relative with forward slashes."""
        self.add_alike([name], np.frombuffer(data, np.uint8)[None], [zlib.crc32(data)])

    def add_alike(self, names: list[str], files: np.ndarray, crcs: list[int]):
        """Adds the rows of `files`, uint8 [n,bytes]; `crcs` are their CRC-32."""
        if self.is_zip:
            self._zip.add(names, files, crcs)
            return
        for name, data in zip(names, files, strict=True):
            path = os.path.join(self._temp, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'wb') as file:
                file.write(data)

    def add_description(self, description: dict):
        """Adds dataset.json; `description['labels']` is a list of [name, label] or None."""
        self.add(JSON_NAME, to_json(publishable(description)).encode())

    def describe(self, names, labels: np.ndarray | None, info: dict):
        """Adds dataset.json with the labels of files (int64 [n] or float32 [n,D]), and `info`."""
        if labels is not None:
            labels = [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
        info = {key: value for key, value in info.items() if value is not None}
        self.add_description({'labels': labels} | info)

    def __exit__(self, kind, *error):
        if kind is None:
            self._stack.callback(self._check)  # of what has come while the archive was written
        return self._stack.__exit__(kind, *error)


def _dest_error(dest, text) -> UserError:
    return UserError(text, field='dest', value=dest)


def check_destination(dest: str, overwrite: bool = False):
    """Raises UserError if an archive cannot be written to `dest` (see ArchiveWriter)."""
    if os.path.isdir(dest):
        if dest.lower().endswith('.zip'):
            raise _dest_error(dest, 'is a folder; remove it or choose another name')
        if not os.listdir(dest):
            return
        if overwrite and os.path.islink(dest):
            raise _dest_error(dest, 'is a link to a folder; give the folder itself')
        if overwrite and not os.path.isfile(os.path.join(dest, JSON_NAME)):
            raise _dest_error(dest, 'is a folder that is no data set, which is never overwritten')
        if overwrite and (name := first_stranger(dest, FILES)):
            raise _dest_error(dest, f'holds {name}, which is no part of a data set, and is not '
                                    'removed; move it, or choose another name')
    check_new(dest, overwrite)


def check_new(dest: str, overwrite: bool = False):
    """Raises UserError if `dest` exists and is not to be overwritten, or cannot be made."""
    if not os.path.lexists(dest):
        check_place(dest, 'atomic', 'dest')
    elif not overwrite:
        raise _dest_error(dest, 'exists; remove it, choose another name or overwrite it')
