"""What can be read: folders and zips of images, and the files in which the usual data sets come.

Every source is a list of images with `len()`, `picture(index)` (uint8 [H,W,3] or Pillow's),
`where(index)` (its name for messages), and

    labels      int64 [n], float32 [n,D], or None
    classes     original index of each label, or None: ImageNet's for wnid folders, else its place
                in the sorted list
    class_names, wnids   the same as text, or None
    implied     True if labels are folder names, which count only if there are several
    in_memory   True if images are decoded already: workers are then threads, not processes

Sources travel to worker processes: they can be pickled and forked. A new kind is a class with
`kind` and `matches`, listed in SOURCES.
"""

import contextlib
import dataclasses
import gzip
import itertools
import math
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from dnnlib.image_io import BadImage, decode_picture, is_image_name
from dnnlib.util import UserError
from torch_utils.files import pickles
from training.data import imagenet
from training.data.archive import CLASS_TABLES, ArchiveReader, count_classes, labels_of


class Source:
    """Base of all sources (see the module)."""

    kind = ''  # what the user can give, for messages
    labels = classes = class_names = wnids = None
    implied = coarse = in_memory = False

    def __init__(self, name: str):
        self.name = name

    @staticmethod
    def matches(path: str) -> bool:
        """Whether `path` is of this kind."""
        return False

    def picture(self, index):
        """Pixels uint8 [H,W,3], or Pillow's image of mode RGB where Pillow has decoded it.

        Raises BadImage.
        """
        raise NotImplementedError

    def stack(self, indices) -> np.ndarray | None:
        """The images at `indices`, uint8 [n,H,W,3], if they are in memory; else None."""
        return None

    def name_classes(self, labels, names=None, wnids=None, classes=None):
        """Sets labels and what is known of their classes."""
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(range(len(names)) if classes is None else classes)
        self.class_names = names
        self.wnids = wnids


# --- Files of images ----------------------------------------------------------------------------


class FileSource(Source):
    """Images of a folder or zip; labels of dataset.json, else the sorted top-level folders."""

    kind = 'a folder or .zip of images'

    def __init__(self, path: str):
        super().__init__(path)
        self.reader = ArchiveReader(path)
        self.files = [i for i, name in enumerate(self.reader.names) if is_image_name(name)]
        names = [self.reader.names[i] for i in self.files]
        if not names:
            latents = any(name.endswith('.npy') for name in self.reader.names)
            raise UserError(f'{path} holds ' + ('latents, not images; see dataset_tool.py decode'
                                                if latents else f'no images; give {kinds()}'))
        description = self.reader.description()
        if description:
            self._stored_labels(names, description)
        else:
            self._folder_labels(names)

    @staticmethod
    def matches(path):
        return os.path.isdir(path) or zipfile.is_zipfile(path)

    def _stored_labels(self, names, description):
        self.labels = labels_of(self.reader, names, description)
        if self.labels is None or self.labels.ndim == 2:
            return
        count = count_classes(self.labels, description, self.name)
        classes, class_names, wnids = (description.get(key) for key in CLASS_TABLES)
        if not classes or not isinstance(classes[0], int):
            classes = range(count)
        self.name_classes(self.labels, class_names, wnids, classes)

    def _folder_labels(self, names):
        tops = [name.partition('/')[0] if '/' in name else None for name in names]
        folders = sorted(set(tops) - {None})
        if not folders or (len(folders) == 1 and None in tops):
            return
        if None in tops:
            raise UserError(f'{self.name} has class folders, but {tops.count(None)} of '
                            f'{len(names)} images lie outside them, e.g. '
                            f'{names[tops.index(None)]}; move them, or add a dataset.json')
        self.implied = True
        label_of = {folder: label for label, folder in enumerate(folders)}
        labels = [label_of[top] for top in tops]
        indices = [imagenet.index_of_wnid().get(folder) for folder in folders]
        if None in indices:
            self.name_classes(labels, folders)
        else:
            class_names = [imagenet.classes()[index][1] for index in indices]
            self.name_classes(labels, class_names, folders, indices)

    def __len__(self):
        return len(self.files)

    def picture(self, index):
        return decode_picture(self.reader.read(self.files[index]))

    def where(self, index):
        return self.reader.where(self.files[index])


class ListSource(Source):
    """Images named in a text file: one path a line, relative to its folder or the working
    directory.

    A tab and a whole number after every path give labels. Empty lines and those that start with #
    are left out.
    """

    kind = 'a .txt list of image paths'

    def __init__(self, path: str):
        super().__init__(path)
        try:
            with open(path, encoding='utf-8') as file:
                lines = enumerate(map(str.strip, file), 1)
                rows = [(number, *line.partition('\t')[::2]) for number, line in lines
                        if line and not line.startswith('#')]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{path} cannot be read as a list of image paths ({error})') from None
        if not rows:
            raise UserError(f'{path} lists no images; write one path a line')
        self.paths = []
        labels = []
        for number, name, label in rows:
            beside = os.path.join(os.path.dirname(path), name)
            self.paths.append(beside if os.path.isfile(beside) else name)
            if not os.path.isfile(self.paths[-1]):
                raise UserError(f'{path} line {number}: {name} does not exist')
            if label and not label.strip().isdigit():
                raise UserError(f'{path} line {number}: label {label!r} is not a whole number')
            if label:
                labels.append(int(label))
        if labels:
            if len(labels) < len(rows):
                missing = len(rows) - len(labels)
                raise UserError(f'{path}: {missing} of {len(rows)} images have no label')
            self.name_classes(labels, classes=range(max(labels) + 1))

    @staticmethod
    def matches(path):
        return path.lower().endswith('.txt') and os.path.isfile(path)

    def __len__(self):
        return len(self.paths)

    def picture(self, index):
        try:
            with open(self.paths[index], 'rb') as file:
                return decode_picture(file.read())
        except OSError as error:
            raise BadImage(f'cannot be read ({error.strerror})') from None

    def where(self, index):
        return self.paths[index]


class LmdbSource(Source):
    """Images of an LSUN database, in the order of its keys; no labels."""

    kind = 'an LSUN *_lmdb folder'

    def __init__(self, path: str):
        super().__init__(path)
        with self._transaction() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            self.keys = [bytes(key) for key in keys]
        if not self.keys:
            raise UserError(f'{path} is an empty database')

    @staticmethod
    def matches(path):
        return os.path.isfile(os.path.join(path, 'data.mdb'))

    @contextlib.contextmanager
    def _transaction(self):
        """The database, opened for this once: it must not be open in a process that forks."""
        try:
            import lmdb
        except ImportError:
            raise UserError(f'{self.name} is an LMDB database; install its reader: '
                            'pip install lmdb') from None
        try:
            with lmdb.open(self.name, readonly=True, lock=False, readahead=False) as environment:
                with environment.begin() as transaction:
                    yield transaction
        except lmdb.Error as error:
            raise UserError(f'{self.name} is no readable LMDB database ({error})') from None

    def __len__(self):
        return len(self.keys)

    def picture(self, index):
        with self._transaction() as transaction:
            return decode_picture(transaction.get(self.keys[index]) or b'')

    def where(self, index):
        return f'{self.name}: {self.keys[index].decode("latin1")}'


# --- Data sets in files of their own ------------------------------------------------------------


class ArraySource(Source):
    """Images that are already decoded: uint8 [n,3,H,W] or gray [n,H,W]."""

    in_memory = True

    def __init__(self, name, images, labels, names):
        super().__init__(name)
        self.images = images
        self.name_classes(labels, names)

    def __len__(self):
        return len(self.images)

    def picture(self, index):
        return self.stack([index])[0]

    def stack(self, indices):
        images = self.images[indices]
        if images.ndim == 3:
            return np.repeat(images[..., None], 3, axis=3)
        return images.transpose(0, 2, 3, 1)

    def where(self, index):
        return f'{self.name}: image {index}'


class DigitsSource(ArraySource):
    """scikit-learn's 1,797 handwritten digits, installed with it: 8x8, 0..16 scaled to 0..255."""

    kind = 'the word digits'

    def __init__(self, path: str = 'digits'):
        import sklearn.datasets
        digits = sklearn.datasets.load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        super().__init__('digits', images, digits.target, [str(digit) for digit in range(10)])

    @staticmethod
    def matches(path):
        return path == 'digits'


class MnistSource(ArraySource):
    """MNIST, or what has its format: `*-images-idx3-ubyte.gz` with the labels file beside it.

    28x28 images get a black border of two pixels, so that their size is a power of two.
    """

    kind = 'MNIST *-images-idx3-ubyte.gz'

    def __init__(self, path: str):
        folder, base = os.path.split(path)
        images = _read_idx(path, 3)
        base = base.replace('images', 'labels').replace('idx3', 'idx1')
        labels = _read_idx(os.path.join(folder, base), 1)
        if len(labels) != len(images) or not len(images):
            raise UserError(f'{path}: {len(images)} images but {len(labels)} labels')
        if images.shape[1:] == (28, 28):
            images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
        super().__init__(path, images, labels, [str(label) for label in range(labels.max() + 1)])

    @staticmethod
    def matches(path):
        return re.search(r'images[.-]idx3-ubyte(\.gz)?$', path) is not None


def _read_idx(path: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file (optionally gzipped) with so many dimensions."""
    expected = 0x0800 + dimensions
    try:
        with open(path, 'rb') as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b'\x1f\x8b' else raw
            magic, *shape = struct.unpack(f'>{1 + dimensions}I', file.read(4 + 4 * dimensions))
            if magic != expected:
                raise ValueError(f'it starts with {magic:#x} instead of {expected:#x}')
            size = math.prod(shape)
            data = file.read(min(size, 1 << 34) + 1)
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; it belongs beside the other file '
                        'of the data set') from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f'{path} is no readable idx file ({error})') from None
    if len(data) != size:
        raise UserError(f'{path} is damaged: {len(data)} bytes of data instead of {size}')
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


@dataclasses.dataclass(frozen=True)
class _CifarLayout:
    """Names of files, and keys of the dictionaries in them."""

    meta: str
    names_key: str
    labels_key: str
    train: tuple
    test: tuple


_CIFAR10 = _CifarLayout('batches.meta', 'label_names', 'labels',
                        tuple(f'data_batch_{i}' for i in range(1, 6)), ('test_batch',))
_CIFAR100 = _CifarLayout('meta', 'fine_label_names', 'fine_labels', ('train',), ('test',))
_COARSE = dataclasses.replace(_CIFAR100, names_key='coarse_label_names',
                              labels_key='coarse_labels')


class CifarSource(ArraySource):
    """CIFAR-10 or CIFAR-100 from its `-python.tar.gz` or the unpacked folder.

    `split` is 'train' or 'test'; `coarse` takes CIFAR-100's 20 coarse labels. Raises UserError
    that names the file for any other layout.
    """

    kind = 'cifar-10-python.tar.gz, cifar-100-python.tar.gz (or their unpacked folders)'

    def __init__(self, path: str, coarse: bool = False, split: str = 'train'):
        files = _read_folder(path, split) if os.path.isdir(path) else _read_tar(path, split)
        layout = _CIFAR10 if _CIFAR10.meta in files else _COARSE if coarse else _CIFAR100
        if layout.meta not in files:
            raise UserError(f'{path} holds no CIFAR batches; for another archive, '
                            'unpack it and give the folder')
        self.coarse = layout is _COARSE
        images = []
        labels = []
        for name in (layout.meta, *getattr(layout, split)):
            if name not in files:
                raise UserError(f'{path}: {name} is missing; download the archive again')
            try:
                content = pickles.load(files.pop(name), pickles.NUMPY_ARRAYS)
                content = {_text(key): value for key, value in content.items()}
                if name == layout.meta:
                    names = [_text(value) for value in content[layout.names_key]]
                    continue
                images.append(content['data'].array())
                labels.append(np.array(content[layout.labels_key], dtype=np.int64))
                self._check(images[-1], labels[-1], len(names))
            except (KeyError, AttributeError, TypeError, ValueError,
                    pickles.ForeignPickleError) as error:
                raise UserError(f'{path}: {name} is not the original CIFAR layout '
                                f'({error})') from None
        images = np.concatenate(images).reshape(-1, 3, 32, 32)
        super().__init__(path, images, np.concatenate(labels), names)

    @staticmethod
    def matches(path):
        return re.search(r'\.(tar|tgz|tar\.\w+)$', path.lower()) or _cifar_folder(path)

    @staticmethod
    def _check(images, labels, num_classes):
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072) or not len(labels):
            raise ValueError(f'{images.dtype} data {list(images.shape)} with {len(labels)} labels')
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f'labels from {labels.min()} to {labels.max()}')


def _text(value) -> str:
    return value.decode('latin1') if isinstance(value, bytes) else str(value)


def _cifar_folder(path: str) -> str | None:
    """The folder of CIFAR's files at `path` or below it."""
    for below in ('', 'cifar-10-batches-py', 'cifar-100-python'):
        folder = os.path.join(path, below)
        for layout in (_CIFAR10, _CIFAR100):
            marks = (layout.meta, layout.train[0])
            if all(os.path.isfile(os.path.join(folder, name)) for name in marks):
                return folder
    return None


def _cifar_names(split: str) -> set[str]:
    return {name for layout in (_CIFAR10, _CIFAR100)
            for name in (layout.meta, *getattr(layout, split))}


def _read_folder(path: str, split: str) -> dict[str, bytes]:
    """{base name: content} of what an unpacked CIFAR archive has of a split."""
    folder = Path(_cifar_folder(path) or path)
    return {name: (folder / name).read_bytes() for name in _cifar_names(split)
            if (folder / name).is_file()}


def _read_tar(path: str, split: str) -> dict[str, bytes]:
    """The same of the archive itself."""
    names = _cifar_names(split)
    files = {}
    try:
        with tarfile.open(path) as tar:
            for count, member in enumerate(tar):
                name = os.path.basename(member.name)
                if member.isfile() and name in names and member.size < 1 << 29:
                    files[name] = tar.extractfile(member).read()
                if count > 50 and not files:
                    return files  # some other archive, perhaps a large one
            while tar.fileobj.read(1 << 20):
                pass  # a gzip's checksum is at its end
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f'{path} is damaged or no tar archive ({error}); '
                        'download it again') from None
    return files


# --- Several sources, and opening ---------------------------------------------------------------


class JoinedSource(Source):
    """Several sources one after the other."""

    def __init__(self, sources: list[Source]):
        super().__init__(','.join(source.name for source in sources))
        self.sources = sources
        self.starts = np.cumsum([0] + [len(source) for source in sources])
        self.implied = all(source.implied for source in sources)
        self.in_memory = all(source.in_memory for source in sources)
        self.join_labels()

    def join_labels(self):
        """Classes of the same name (or wnid) are one class.

        If all are ImageNet's, its indices stay and order the classes; else the classes of the
        first source keep theirs and new names follow.
        """
        unlabelled = [source.name for source in self.sources if source.labels is None]
        if len(unlabelled) == len(self.sources):
            return
        if unlabelled:
            raise UserError(f'{unlabelled[0]} has no labels, but others have; '
                            'join sources of one kind')
        if any(source.labels.ndim == 2 for source in self.sources):
            if len({source.labels.shape[1:] for source in self.sources}) > 1:
                raise UserError(f'{self.name}: label vectors of different lengths')
            self.labels = np.concatenate([source.labels for source in self.sources])
            return
        by_wnid = all(source.wnids for source in self.sources)
        tables = [_class_table(source, by_wnid) for source in self.sources]
        merged = {}  # key -> (original index, name)
        for key, index, name in itertools.chain(*tables):
            if key not in merged:
                taken = [other for other, _ in merged.values()]
                merged[key] = (max(taken) + 1 if index in taken else index, name)
        keys = sorted(merged, key=merged.get) if by_wnid else list(merged)
        place = {key: label for label, key in enumerate(keys)}
        labels = [np.array([place[key] for key, _, _ in table])[source.labels]
                  for source, table in zip(self.sources, tables, strict=True)]
        classes, names = zip(*map(merged.get, keys), strict=True)
        named = any(source.class_names for source in self.sources)
        self.name_classes(np.concatenate(labels), list(names) if named else None,
                          keys if by_wnid else None, classes)

    def _find(self, index):
        part = int(np.searchsorted(self.starts, index, side='right')) - 1
        return self.sources[part], index - int(self.starts[part])

    def __len__(self):
        return int(self.starts[-1])

    def picture(self, index):
        source, inner = self._find(index)
        return source.picture(inner)

    def where(self, index):
        source, inner = self._find(index)
        return source.where(inner)


def _class_table(source: Source, by_wnid: bool) -> list[tuple]:
    """(key, original index, name) of each class: what is equal in two sources is one class."""
    names = source.class_names or [str(index) for index in source.classes]
    return list(zip(source.wnids if by_wnid else names, source.classes, names, strict=True))


# In the order in which they are tried.
SOURCES = (DigitsSource, CifarSource, LmdbSource, ListSource, MnistSource, FileSource)


def kinds() -> str:
    """What the user can give, as text."""
    return ', '.join(source.kind for source in SOURCES)


def open_source(text: str, coarse: bool = False) -> Source:
    """The source that the user names: a path of one of `kinds()`, or several joined by commas.

    `coarse` asks for CIFAR-100's coarse labels. Raises UserError in one line for anything that
    cannot be read.
    """
    parts = [text] if os.path.exists(text) else [part for part in text.split(',') if part]
    if not parts:
        raise UserError(f'names nothing; give {kinds()}', field='source', value=repr(text))
    sources = [_open_one(part, coarse) for part in parts]
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def _open_one(path: str, coarse: bool) -> Source:
    kind = next((kind for kind in SOURCES if kind.matches(path)), None)
    if kind is not DigitsSource and not os.path.exists(path):
        raise UserError(f'{path} does not exist; give {kinds()}')
    if kind is None:
        raise UserError(f'{path} is of no known kind, or damaged; give {kinds()}')
    source = CifarSource(path, coarse) if kind is CifarSource else kind(path)
    if coarse and not source.coarse:
        raise UserError(f'{path} is not CIFAR-100, which alone has coarse labels', field='coarse')
    return source
