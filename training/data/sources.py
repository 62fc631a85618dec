"""What can be read: folders and zips of images, and the files in which the usual data sets come.

Every source is a list of images with `len()`, `picture(index)` (uint8 [H,W,C] or Pillow's),
`is_gray(index)`, `where(index)` (its name for messages), and

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
import hashlib
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
from dnnlib.image_io import BadImage, decode_picture, is_gray, is_image_name, missing_plugin
from dnnlib.npz import read_npy_header
from dnnlib.util import UserError, check_links, printable
from torch_utils.files import pickles, tar
from training.data import arrays, imagenet, tables
from training.data.archive import (
    CLASS_TABLES,
    JSON_NAME,
    READ_FILES,
    ArchiveReader,
    check_size,
    common_folder,
    count_classes,
    labels_of,
)
from training.data.class_files import ClassFile


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
        """Pixels uint8 [H,W,C], or Pillow's image where Pillow has decoded it (`decode_picture`).

        Raises BadImage or UserError.
        """
        try:
            return decode_picture(self.read(index), self.bits)
        except OSError as error:
            raise BadImage(f'cannot be read ({error.strerror})') from None

    def is_gray(self, index) -> bool:
        """Whether a picture has no colours, or cannot be read."""
        with contextlib.suppress(OSError, UserError):
            return is_gray(self.read(index))
        return True

    def num_channels(self, indices) -> int:
        """What images of these pictures have by default: 1 if all are gray, else 3."""
        return 1 if all(self.is_gray(int(index)) for index in indices) else 3

    def where(self, index) -> str:
        """The image's name for a message."""
        return f'{self.name}: image {index}'

    def stack(self, indices) -> np.ndarray | None:
        """The images at `indices`, uint8 [n,H,W,C], if they are in memory; else None."""
        return None

    def fingerprint(self, indices: np.ndarray) -> str:
        """What tells the images `indices`, of which no more than `READ_FILES` are read, by their
        content: 32 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for index in indices[::-(-len(indices) // READ_FILES)].tolist():
            digest.update(self.content(index))
        return digest.hexdigest()[:32]

    def content(self, index: int) -> bytes:
        """The file of an image, or its pixels where it is none."""
        return self.read(index)

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
    is the folders in that one; if there are none in there, the parts of the names of files before
    the first underscore, as in cat_1.png, where they are unmistakable (see `_are_class_names`).

    `labels` is one of LABELS, if one alone is to be used. Raises UserError if it is not there, and
    for folders that are parts of a data set: train and val are no classes.
    """

    def __init__(self, path: str, labels: str | None = None):
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
            if self.left_out['.zip']:
                raise UserError(f'{path} holds {self.left_out[".zip"]} zips and no images; unpack '
                                'them, or give them one by one, joined by commas')
            raise UserError(f'{path} holds no images{those}; give {kinds()}')
        description = self.reader.description()
        if labels == 'json' or (description and labels is None):
            self._stored_labels(names, description)
        elif labels in (None, 'folders'):
            self._folder_labels(names)
        if self.labels is None and (labels == 'names' or not (labels or description)):
            self._name_labels(names, labels == 'names')
        if self.labels is None and labels not in (None, 'none'):
            where = {'json': f'{JSON_NAME} with labels', 'folders': 'class folders'}[labels]
            raise UserError(f'{path} has no {where}', 'labels')

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
        parent = common[:common.rfind('/', 0, -1) + 1] if is_one else common
        others = (name for name in (*self.reader.names, *self.reader.folders)
                  if name.startswith(parent) and not is_image_name(name))
        without = {name[len(parent):].partition('/')[0] for name in others
                   if '/' in name[len(parent):]}.difference(folders)
        if without:
            self.notes.append(f'no images in {", ".join(sorted(without)[:20])}, which are no '
                              'classes' + ', ...' * (len(without) > 20))
        deeper = {tuple(name[len(common):].split('/')[:2]) for name in names
                  if not is_one and name.count('/', len(common)) > 1}
        if len(deeper) > len({top for top, _ in deeper}):
            self.notes.append(f'folders in class folders, e.g. {"/".join(min(deeper))}, are no '
                              'classes of their own')
        self.implied = True
        self._number(tops, folders)

    def _name_labels(self, names, is_asked):
        """Labels of the names of files, if the user asks for them or they are unmistakable."""
        stems = [os.path.splitext(name.rpartition('/')[2])[0] for name in names]
        without = next((name for name, stem in zip(names, stems, strict=True)
                        if not stem.partition('_')[1] or stem.startswith('_')), None)
        if without is not None:
            if is_asked:
                raise UserError(f'{self.where(names.index(without))} has no class before an '
                                'underscore in its name, as cat_1.png has', 'labels')
            return
        classes = [stem.partition('_')[0] for stem in stems]
        counts = collections.Counter(classes)
        shown = ', '.join(itertools.islice(counts, 5)) + ', ...' * (len(counts) > 5)
        what = f'before the first underscore in the names of files ({shown})'
        if is_asked or _are_class_names(names, stems, counts):
            self.notes.append(f'classes are what stands {what}; choose labels none if those '
                              'are no classes')
            self._number(classes, sorted(counts, key=_by_number))
        elif 1 < len(counts) <= len(names) // 2:
            self.notes.append(f'what stands {what} is not taken for classes; choose labels names '
                              'if they are')

    def _number(self, tops, folders):
        """Sets the labels `tops`, of the classes `folders`."""
        places = {folder: place for place, folder in enumerate(folders)}
        labels = [places[top] for top in tops]
        indices = [imagenet.index_of_wnid().get(folder) for folder in folders]
        if None in indices:
            self.name_classes(labels, [printable(folder, 1000) for folder in folders])
        else:
            class_names = [imagenet.classes()[index][1] for index in indices]
            self.name_classes(labels, class_names, folders, indices)

    def read(self, index):
        return self.reader.read(self.items[index])

    def fingerprint(self, indices):
        return self.reader.fingerprint(np.array(self.items)[indices])

    def where(self, index):
        return self.reader.where(self.items[index])


# Where the labels of files may come from.
LABELS = ('json', 'folders', 'names', 'none')
# What cameras and programs call pictures of anything.
_ANYTHING = frozenset('img image dsc dscf dscn dji gopr mvimg p pxl photo pic picture pano burst '
                      'frame sample scan screenshot page vid video wp'.split())


def _are_class_names(names, stems, counts) -> bool:
    """Whether the names of files in one folder are all CLASS_NUMBER, as cat_1.png, with several
    classes of several images each, none of which is a name that cameras give.
    """
    return (len(counts) > 1 and min(counts.values()) > 1
            and all(re.fullmatch(r'[^\W\d_][^_]*_\d+', stem) for stem in stems)
            and len({name.rpartition('/')[0] for name in names}) == 1
            and not _ANYTHING & {name.lower() for name in counts})


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


def _is_number(name: str) -> bool:
    return re.fullmatch('[0-9]{1,18}', name) is not None


def _by_number(name: str) -> tuple:
    return (0, int(name), name) if _is_number(name) else (1, 0, name)


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

    def __init__(self, name, images, labels=None, names=None):
        super().__init__(name, images)
        if labels is not None and labels.ndim == 2:
            self.labels = labels
        elif labels is not None:
            count = None if names else count_classes(labels, {}, name)
            self.name_classes(labels, names, classes=None if names else range(count))

    def picture(self, index):
        return self.stack([index])[0]

    def content(self, index):
        return self.picture(index).tobytes()

    def is_gray(self, index):
        return self.items.ndim == 3

    def stack(self, indices):
        images = self.items[indices]
        return images[..., None] if images.ndim == 3 else images.transpose(0, 2, 3, 1)


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


def npz_source(path: str, key: str | None = None) -> ArraySource:
    """Images and labels of an .npz (see `arrays.open_npz`)."""
    used = arrays.choose_names(path, key)
    images, labels = arrays.open_npz(path, key)
    source = ArraySource(path, _planes(images), labels)
    others = [name for name in arrays.array_names(path) if name not in used]
    if others and key is None:
        source.notes = [f'images are those of the array {used[0]}; the file also has '
                        + printable(', '.join(others[:10]))]
    return source


def npy_source(path: str) -> ArraySource:
    """Images of one .npy, without labels."""
    return ArraySource(path, _planes(arrays.open_npy(path)))


def _planes(images: np.ndarray) -> np.ndarray:
    """[N,H,W,C] as `ArraySource` has it."""
    return images[..., 0] if images.shape[3] == 1 else images.transpose(0, 3, 1, 2)


class ClassFileSource(ArraySource):
    """Images of one class, of a file `<class>.npy` of the synthetic-data study."""

    def __init__(self, path: str):
        file = ClassFile.open(path)
        file.verify()
        super().__init__(path, file)
        stem = os.path.basename(path).removesuffix('.npy')
        self.name_classes(np.zeros(len(file), np.int64), [stem],
                          classes=[int(stem) if _is_number(stem) else 0])

    def is_gray(self, index):
        return False

    def stack(self, indices):
        return self.items.images(indices).transpose(0, 2, 3, 1)


def class_folder_source(path: str) -> Source:
    """The files `<class>.npy` of a folder, one class each, in the order of their numbers."""
    names = sorted(_class_names(path, None), key=lambda name: _by_number(name[:-4]))
    check_links(path, names)
    return JoinedSource([ClassFileSource(os.path.join(path, name)) for name in names], path)


def _class_names(path: str, most: int | None) -> list[str]:
    """The names of arrays in a folder, going by its first `most` files."""
    with os.scandir(path) as entries:
        return [entry.name for entry in itertools.islice(entries, most)
                if entry.name.endswith('.npy') and not entry.name.startswith('.')]


def is_class_folder(path: str) -> bool:
    """Whether a folder has arrays uint8 [N,H,W,3], not latents."""
    with contextlib.suppress(OSError, ValueError):
        for name in os.path.isdir(path) and _class_names(path, 5000)[:1] or ():
            with open(os.path.join(path, name), 'rb') as file:
                shape, _, descr = read_npy_header(file)
            return descr == '|u1' and len(shape) == 4
    return False


class TableSource(Source):
    """Pictures of a data set of Hugging Face: of files, or `hf:NAME` of the hub."""

    def __init__(self, path: str, key: str | None = None, coarse: bool = False):
        if path.startswith(tables.HUB):
            self.tables = tables.HubTables(path, coarse)
        else:
            self.tables = tables.Tables(path, tables.table_files(path, key), coarse)
        super().__init__(path, range(len(self.tables)))
        if not len(self):
            raise UserError(f'{path} holds no pictures')
        if self.tables.labels is not None:
            names = self.tables.names
            count = count_classes(self.tables.labels, {'class_names': names}, path)
            self.name_classes(self.tables.labels, names, classes=range(count))
        self.coarse = self.tables.columns.coarse

    def read(self, index):
        return self.tables.read(index)

    def where(self, index):
        return self.tables.where(index)


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

    def content(self, index):
        part, inner = self._find(index)
        return self.sources[part].content(int(inner))

    def is_gray(self, index):
        part, inner = self._find(index)
        return self.sources[part].is_gray(int(inner))

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
    ('an .npz or .npy of images, or a folder of <class>.npy', arrays.is_image_npz, npz_source),
    (None, lambda path: path.lower().endswith('.npy') and os.path.isfile(path), npy_source),
    (None, is_class_folder, class_folder_source),
    ('a data set of Hugging Face (a .parquet, a folder of them or of save_to_disk, or hf:NAME '
     'over the network)',
     lambda path: is_hub(path) or tables.is_table(path), TableSource),
    ('a folder or .zip of images',
     lambda path: os.path.isdir(path) or zipfile.is_zipfile(path), FileSource),
)
_KEYED = (npz_source, TableSource)                  # of which a part may be named, PATH:KEY


def is_hub(path: str) -> bool:
    return path.startswith(tables.HUB) and not os.path.exists(path)


def kinds() -> str:
    """What the user can give, as text."""
    return ', '.join(kind for kind, _, _ in SOURCES if kind)


def kind_of(path: str):
    """What opens a path as a source, e.g. FileSource; JoinedSource for several; None for none."""
    if ',' in path and not os.path.exists(path):
        return JoinedSource
    path, _ = arrays.split_key(path)
    return next((source for _, matches, source in SOURCES if matches(path)), None)


def open_source(text: str, coarse: bool = False, bits: int = 16, labels: str | None = None,
                key: str | None = None) -> Source:
    """The source that the user names: a path of one of `kinds()`, or several joined by commas.

    `coarse` asks for CIFAR-100's coarse labels; for `bits` see `decode_picture`. `labels`: one of
    LABELS, for files of images. `key` names the array of an .npz or the split of a data set of
    Hugging Face, as does PATH:KEY. Raises UserError in one line for anything that cannot be read.
    """
    parts = [text] if os.path.exists(text) else [part for part in text.split(',') if part]
    if not parts:
        raise UserError(f'names nothing; give {kinds()}', field='source', value=repr(text))
    if key:
        parts = [arrays.with_key(part, key) for part in parts]
    sources = [_open_one(part, coarse, labels) for part in parts]
    opened = sources[0] if len(sources) == 1 else JoinedSource(sources)
    for source in (*sources, opened):
        source.bits = bits
    return opened


def _open_one(text: str, coarse: bool, labels: str | None) -> Source:
    source = kind_of(text)
    path, key = (text, None) if is_hub(text) else arrays.split_key(text)
    if source is not digits_source and not is_hub(text) and not os.path.exists(path):
        raise UserError(f'{path} does not exist; give {kinds()}')
    if source is None:
        raise UserError(f'{path} is of no known kind, or damaged; give {kinds()}')
    if key and source not in _KEYED:
        raise UserError(f'{path} has no parts that are named; leave out {key}', 'key')
    if labels not in (None, 'none') and source is not FileSource:
        raise UserError(f'{path} has labels of its own; that is for folders and zips of images',
                        'labels')
    options = {'key': key} if key else {}
    if source in (CifarSource, TableSource):
        options['coarse'] = coarse
    if source is FileSource:
        options['labels'] = labels
    opened = source(path, **options)
    if key:
        opened.name = text
    if labels == 'none':
        opened.labels = opened.classes = opened.class_names = opened.wnids = None
    if coarse and not opened.coarse:
        raise UserError(f'{path} is not CIFAR-100, which alone has coarse labels', field='coarse')
    return opened
