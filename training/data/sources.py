"""What can be read: folders and zips of images, and the files in which the usual data sets come.

Every source is a list of images with `len()`, `picture(index)` (uint8 [H,W,3] or Pillow's),
`where(index)` (its name for messages), and

    labels      int64 [n], float32 [n,D], or None
    classes     original index of each label, or None: ImageNet's for wnid folders, else its place
                in the sorted list
    class_names, wnids   the same as text, or None
    implied     True if labels are folder names, which count only if there are several
    left_out    how many files of each kind are no images that can be read, a Counter
    damaged     what cannot even be listed, as texts: dead links
    notes       what the user should know of the labels, as texts
    in_memory   True if images are decoded already: workers are then threads, not processes

Sources travel to worker processes: they can be pickled and forked. A new kind is a class and a
line in SOURCES.
"""

import collections
import contextlib
import gzip
import itertools
import lzma
import math
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from dnnlib import budget
from dnnlib.image_io import BadImage, decode_picture, is_image_name, missing_plugin
from dnnlib.util import UserError, check_links
from torch_utils.files import pickles, tar
from training.data import imagenet
from training.data.archive import (
    CLASS_TABLES,
    JSON_NAME,
    ArchiveReader,
    check_size,
    common_folder,
    count_classes,
    labels_of,
)


def read_file(path) -> bytes:
    """The bytes of a file. Raises OSError, or UserError for one that is far larger than usual."""
    check_size(path, os.path.getsize(path))
    return Path(path).read_bytes()


class Source:
    """Base of all sources (see the module): images that `items` stand for."""

    labels = classes = class_names = wnids = None
    bits = 16                                   # of gray values in files of so many
    implied = coarse = in_memory = False
    left_out = collections.Counter()
    damaged = notes = ()

    def __init__(self, name: str, items=()):
        self.name = name
        self.items = items

    def __len__(self):
        return len(self.items)

    def read(self, index) -> bytes:
        """Bytes of an image's file. Raises OSError or UserError."""
        raise NotImplementedError

    def picture(self, index):
        """Pixels uint8 [H,W,3], or Pillow's image of mode RGB where Pillow has decoded it.

        Raises BadImage or UserError.
        """
        try:
            return decode_picture(self.read(index), self.bits)
        except OSError as error:
            raise BadImage(f'cannot be read ({error.strerror})') from None

    def where(self, index) -> str:
        """The image's name for a message."""
        return f'{self.name}: image {index}'

    def stack(self, indices) -> np.ndarray | None:
        """The images at `indices`, uint8 [n,H,W,3], if they are in memory; else None."""
        return None

    def require_whole(self):
        """Raises UserError if something is damaged."""
        if self.damaged:
            more = f' (and {len(self.damaged) - 1} more)' if len(self.damaged) > 1 else ''
            raise UserError(f'{self.damaged[0]}{more}; mend the file, or skip corrupt files')

    def name_classes(self, labels, names=None, wnids=None, classes=None):
        """Sets labels and what is known of their classes."""
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(range(len(names)) if classes is None else classes)
        self.class_names = names
        self.wnids = wnids


# --- Files of images ----------------------------------------------------------------------------


class FileSource(Source):
    """Images of a folder or zip; labels of dataset.json, else the top-level folders: those named
    by number in its order, then the others sorted as text. If all images are in one folder, it
    is the folders in that one.

    Raises UserError for folders that are parts of a data set: train and val are no classes.
    """

    def __init__(self, path: str):
        self.reader = ArchiveReader(path)
        files = [i for i, name in enumerate(self.reader.names) if is_image_name(name)]
        super().__init__(path, files)
        self.damaged = self.reader.damaged
        self.notes = []
        self.left_out = self.reader.left_out + collections.Counter(
            _kind(name) for name in self.reader.names
            if not is_image_name(name) and name != JSON_NAME)
        names = [self.reader.names[i] for i in files]
        if not names:
            self.require_whole()
            if self.left_out['.npy']:
                raise UserError(f'{path} holds latents, not images; see dataset_tool.py decode')
            those = f' that can be read, but {listed(self.left_out)}' * bool(self.left_out)
            raise UserError(f'{path} holds no images{those}; give {kinds()}')
        description = self.reader.description()
        if description:
            self._stored_labels(names, description)
        else:
            self._folder_labels(names)

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
        common = common_folder(names)
        tops = [name[len(common):].rpartition('/')[0].partition('/')[0] for name in names]
        is_one = bool(common) and '' in tops
        if is_one:
            tops = [common.split('/')[-2]] * len(names)
        folders = sorted(set(tops) - {''}, key=_by_number)
        outside = tops.count('')
        if not folders or (len(folders) == 1 and outside):
            return
        splits = {folder: match[1].lower() for folder in folders
                  if (match := _SPLIT.fullmatch(folder))}
        if len(set(splits.values())) > 1:
            places = [os.path.join(self.name, common, folder) for folder in [*splits][:2]]
            raise UserError(f'has the folders {", ".join(splits)}, which are parts of a data set, '
                            f'not classes; {"unpack it, and " * self.reader.is_zip}give one of '
                            f'them, e.g. {places[0]}, or several: {",".join(places)}',
                            'source', self.name)
        if outside:
            raise UserError(f'{self.name} has class folders, but {outside} of {len(names)} images '
                            f'lie outside them, e.g. {names[tops.index("")]}; move them, '
                            'or add a dataset.json')
        if common and not is_one:
            self.notes.append(f'one top-level folder, {common.split("/")[0]}: the classes are the '
                              f'folders of {os.path.join(self.name, common)[:-1]}')
        deeper = {tuple(name[len(common):].split('/')[:2]) for name in names
                  if not is_one and name.count('/', len(common)) > 1}
        if len(deeper) > len({top for top, _ in deeper}):
            self.notes.append(f'folders in class folders, e.g. {"/".join(min(deeper))}, are no '
                              'classes of their own')
        self.implied = True
        places = {folder: place for place, folder in enumerate(folders)}
        labels = [places[top] for top in tops]
        indices = [imagenet.index_of_wnid().get(folder) for folder in folders]
        if None in indices:
            self.name_classes(labels, folders)
        else:
            class_names = [imagenet.classes()[index][1] for index in indices]
            self.name_classes(labels, class_names, folders, indices)

    def read(self, index):
        return self.reader.read(self.items[index])

    def where(self, index):
        return self.reader.where(self.items[index])


# Folders of a data set's parts.
_SPLIT = re.compile('(train|val|test|eval|dev)(ing|id|idation|uation)?'
                    '([-_ ]?(set|data|images|[0-9]+))*', re.I)


def _kind(name: str) -> str:
    """What a file that is no image that can be read is called in a list."""
    base = os.path.basename(name)
    if base == JSON_NAME:
        return f'{JSON_NAME} of a folder'
    ending = os.path.splitext(base)[1] or 'without ending'
    package = missing_plugin(ending)
    return f'{ending} (read if {package} is installed)' if package else ending


def listed(left_out: collections.Counter) -> str:
    """'3 .txt, 1 hidden', of the most frequent kinds."""
    most = [f'{count} {kind}' for kind, count in left_out.most_common(8)]
    return ', '.join(most) + ', ...' * (len(left_out) > 8)


def _by_number(name: str) -> tuple:
    return (0, int(name), name) if re.fullmatch('[0-9]{1,18}', name) else (1, 0, name)


class ListSource(Source):
    """Images named in a text file: one path a line, relative to its folder or the working
    directory.

    A tab and a whole number after every path give labels. Empty lines and those that start with #
    are left out.
    """

    def __init__(self, path: str):
        super().__init__(path, [])
        labels = []
        try:
            lines = read_file(path).decode().replace('\r\n', '\n').split('\n')
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{path} cannot be read as a list of image paths ({error})') from None
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith('#'):
                continue
            name, _, label = line.partition('\t')
            beside = os.path.join(os.path.dirname(path), name)
            self.items.append(beside if os.path.isfile(beside) else name)
            if not os.path.isfile(self.items[-1]):
                raise UserError(f'{path} line {number}: {name} does not exist')
            if label and not re.fullmatch(r'\s*\d{1,18}\s*', label):
                raise UserError(f'{path} line {number}: label {label!r} is not a whole number')
            if label:
                labels.append(int(label))
        if not self.items:
            raise UserError(f'{path} lists no images; write one path a line')
        if labels:
            if len(labels) < len(self):
                missing = len(self) - len(labels)
                raise UserError(f'{path}: {missing} of {len(self)} images have no label')
            labels = np.array(labels)
            self.name_classes(labels, classes=range(count_classes(labels, {}, path)))

    def read(self, index):
        return read_file(self.items[index])

    def where(self, index):
        return self.items[index]


class LmdbSource(Source):
    """Images of an LSUN database, in the order of its keys; no labels."""

    def __init__(self, path: str):
        super().__init__(path)
        check_links(path, os.listdir(path))
        with self._transaction() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            self.items = [bytes(key) for key in keys]
        if not self.items:
            raise UserError(f'{path} is an empty database')

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

    def read(self, index):
        with self._transaction() as transaction:
            return transaction.get(self.items[index]) or b''

    def where(self, index):
        return f'{self.name}: {self.items[index].decode("latin1")}'


# --- Data sets in files of their own ------------------------------------------------------------


class ArraySource(Source):
    """Images that are already decoded: uint8 [n,3,H,W] or gray [n,H,W]."""

    in_memory = True

    def __init__(self, name, images, labels, names):
        super().__init__(name, images)
        self.name_classes(labels, names)

    def picture(self, index):
        return self.stack([index])[0]

    def stack(self, indices):
        images = self.items[indices]
        if images.ndim == 3:
            return np.repeat(images[..., None], 3, axis=3)
        return images.transpose(0, 2, 3, 1)


def digits_source(path: str = 'digits') -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, installed with it: 8x8, 0..16 scaled to 0..255."""
    import sklearn.datasets
    digits = sklearn.datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return ArraySource(path, images, digits.target, [str(digit) for digit in range(10)])


def mnist_source(path: str) -> ArraySource:
    """MNIST, or what has its format: `*-images-idx3-ubyte.gz` with the labels file beside it.

    28x28 images get a black border of two pixels, so that their size is a power of two.
    """
    folder, base = os.path.split(path)
    images = _read_idx(path, 3)
    base = base.replace('images', 'labels').replace('idx3', 'idx1')
    labels = _read_idx(os.path.join(folder, base), 1)
    if len(labels) != len(images) or not images.size:
        raise UserError(f'{path}: images {list(images.shape)} but {len(labels)} labels')
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return ArraySource(path, images, labels, [str(label) for label in range(labels.max() + 1)])


def _read_idx(path: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file (optionally gzipped) with so many dimensions."""
    try:
        check_size(path, os.path.getsize(path))
        with open(path, 'rb') as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b'\x1f\x8b' else raw
            magic, *shape = struct.unpack(f'>{1 + dimensions}I', file.read(4 + 4 * dimensions))
            if magic != 0x0800 + dimensions:
                raise ValueError(f'it starts with {magic:#x}')
            # One byte more than there are: at its end, a gzip's checksum is compared.
            with budget.reading(path):
                budget.spend(memory=math.prod(shape))
            data = file.read(math.prod(shape) + 1)
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f'{path} is damaged or no idx file ({error})') from None


# --- Several sources, and CIFAR, which has a file for every 10,000 images -----------------------


class JoinedSource(Source):
    """Several sources one after the other."""

    def __init__(self, sources: list[Source], name: str | None = None):
        super().__init__(name or ','.join(source.name for source in sources))
        self.sources = sources
        self.starts = np.cumsum([0] + [len(source) for source in sources])
        self.implied = all(source.implied for source in sources)
        self.in_memory = all(source.in_memory for source in sources)
        self.left_out = sum((source.left_out for source in sources), collections.Counter())
        self.damaged, self.notes = ([text for source in sources for text in getattr(source, name)]
                                    for name in ('damaged', 'notes'))
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
        """Number of the source, and the index in it."""
        part = np.searchsorted(self.starts, index, side='right') - 1
        return part, index - self.starts[part]

    def __len__(self):
        return int(self.starts[-1])

    def picture(self, index):
        part, inner = self._find(index)
        return self.sources[part].picture(int(inner))

    def stack(self, indices):
        if not self.in_memory:
            return None
        parts, inner = self._find(np.asarray(indices))
        order = np.argsort(parts, kind='stable')
        stacks = [self.sources[part].stack(inner[parts == part]) for part in np.unique(parts)]
        if len(stacks) == 1:
            return stacks[0]
        if len({images.shape[1:] for images in stacks}) > 1:
            return None
        return np.concatenate(stacks)[np.argsort(order)]

    def where(self, index):
        part, inner = self._find(index)
        return self.sources[part].where(int(inner))


def _class_table(source: Source, by_wnid: bool) -> list[tuple]:
    """(key, original index, name) of each class: what is equal in two sources is one class."""
    names = source.class_names or [str(index) for index in source.classes]
    return list(zip(source.wnids if by_wnid else names, source.classes, names, strict=True))


# By the file that names the classes: the others of each split.
_CIFAR = {
    'batches.meta': {'train': [f'data_batch_{i}' for i in range(1, 6)], 'test': ['test_batch']},
    'meta': {'train': ['train'], 'test': ['test']},
}


class CifarSource(JoinedSource):
    """CIFAR-10 or CIFAR-100 from its `-python.tar.gz` or the unpacked folder.

    `split` is 'train' or 'test'; `coarse` takes CIFAR-100's 20 coarse labels. Raises UserError
    that names the file for any other layout.
    """

    def __init__(self, path: str, coarse: bool = False, split: str = 'train'):
        wanted = {name for meta, splits in _CIFAR.items() for name in (meta, *splits[split])}
        if os.path.isdir(path):
            folder = Path(cifar_folder(path) or path)
            check_links(path, [folder.relative_to(path) / name for name in wanted])
            files = {name: read_file(folder / name) for name in wanted
                     if (folder / name).is_file()}
        else:
            files = _read_tar(path, wanted)
        meta = next((name for name in _CIFAR if name in files), None)
        if meta is None:
            raise UserError(f'{path} holds no CIFAR batches; for another archive, '
                            'unpack it and give the folder')
        self.coarse = coarse and meta == 'meta'
        kind = '' if meta != 'meta' else 'coarse_' if coarse else 'fine_'
        parts = []
        for name in (meta, *_CIFAR[meta][split]):
            if name not in files:
                raise UserError(f'{path}: {name} is missing; download the archive again')
            try:
                content = pickles.load(files.pop(name), pickles.NUMPY_ARRAYS)
                content = {pickles.as_text(key): value for key, value in content.items()}
                if name == meta:
                    names = [pickles.as_text(value) for value in content[f'{kind}label_names']]
                    continue
                images = content['data'].array()
                labels = content[f'{kind}labels']
                if not all(type(label) is int for label in labels):
                    raise ValueError('labels that are no numbers')
                labels = np.array(labels, dtype=np.int64)
                if images.dtype != np.uint8 or images.shape != (len(labels), 3072) \
                        or not set(labels.tolist()) <= set(range(len(names))):
                    raise ValueError(f'{images.dtype} data {list(images.shape)} with '
                                     f'{len(labels)} labels of {len(names)} classes')
            except (KeyError, AttributeError, TypeError, ValueError,
                    pickles.ForeignPickleError) as error:
                raise UserError(f'{path}: {name} is not the original CIFAR layout '
                                f'({error})') from None
            images = images.reshape(-1, 3, 32, 32)
            parts.append(ArraySource(f'{path}: {name}', images, labels, names))
        super().__init__(parts, path)


def cifar_folder(path: str) -> str | None:
    """The folder of CIFAR's files at `path` or below it."""
    for below in ('', 'cifar-10-batches-py', 'cifar-100-python'):
        folder = os.path.join(path, below)
        for meta, splits in _CIFAR.items():
            marks = (meta, splits['train'][0])
            if all(os.path.isfile(os.path.join(folder, name)) for name in marks):
                return folder
    return None


def _read_tar(path: str, names: set[str]) -> dict[str, bytes]:
    """{base name: content} of the files `names` of CIFAR's archive."""
    files = {}
    try:
        with tar.members(path) as (archive, members):
            for count, member in enumerate(members):
                name = os.path.basename(member.name)
                if member.isfile() and name in names:
                    files[name] = archive.extractfile(member).read()
                if count > 50 and not files:
                    return files  # some other archive, perhaps a large one
            while archive.fileobj.read(1 << 20):  # a gzip's checksum is at its end
                pass
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, LookupError, MemoryError,
            ValueError, zlib.error) as error:
        raise UserError(f'{path} is damaged or no tar archive ({error}); '
                        'download it again') from None
    return files


# --- Opening ------------------------------------------------------------------------------------

# (what the user can give, whether a path is of this kind, its source), in the order in which they
# are tried.
SOURCES = (
    ('the word digits', lambda path: path == 'digits', digits_source),
    ('cifar-10-python.tar.gz, cifar-100-python.tar.gz (or their unpacked folders)',
     lambda path: re.search(r'\.(tar|tgz|tar\.\w+)$', path.lower()) or cifar_folder(path),
     CifarSource),
    ('an LSUN *_lmdb folder',
     lambda path: os.path.isfile(os.path.join(path, 'data.mdb')), LmdbSource),
    ('a .txt list of image paths',
     lambda path: path.lower().endswith('.txt') and os.path.isfile(path), ListSource),
    ('MNIST *-images-idx3-ubyte.gz',
     lambda path: re.search(r'images[.-]idx3-ubyte(\.gz)?$', path), mnist_source),
    ('a folder or .zip of images',
     lambda path: os.path.isdir(path) or zipfile.is_zipfile(path), FileSource),
)


def kinds() -> str:
    """What the user can give, as text."""
    return ', '.join(kind for kind, _, _ in SOURCES)


def open_source(text: str, coarse: bool = False, bits: int = 16) -> Source:
    """The source that the user names: a path of one of `kinds()`, or several joined by commas.

    `coarse` asks for CIFAR-100's coarse labels; for `bits` see `decode_picture`. Raises UserError
    in one line for anything that cannot be read.
    """
    parts = [text] if os.path.exists(text) else [part for part in text.split(',') if part]
    if not parts:
        raise UserError(f'names nothing; give {kinds()}', field='source', value=repr(text))
    sources = [_open_one(part, coarse) for part in parts]
    opened = sources[0] if len(sources) == 1 else JoinedSource(sources)
    for source in (*sources, opened):
        source.bits = bits
    return opened


def _open_one(path: str, coarse: bool) -> Source:
    source = next((source for _, matches, source in SOURCES if matches(path)), None)
    if source is not digits_source and not os.path.exists(path):
        raise UserError(f'{path} does not exist; give {kinds()}')
    if source is None:
        raise UserError(f'{path} is of no known kind, or damaged; give {kinds()}')
    opened = CifarSource(path, coarse) if source is CifarSource else source(path)
    if coarse and not opened.coarse:
        raise UserError(f'{path} is not CIFAR-100, which alone has coarse labels', field='coarse')
    return opened
