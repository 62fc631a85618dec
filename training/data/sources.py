"""What can be read: folders and zips of pictures, and the files in which the usual data sets come.

Every source is a list of pictures with `len()`, `read(index)` -> uint8 [H,W,3] (raises BadImage), `where(index)` (its
name for messages), and

    labels      int64 [n], float32 [n,D], or None
    classes     original index of each label, or None: ImageNet's for wnid folders, else its place in the sorted list
    class_names, wnids   the same as text, or None
    implied     True if labels are folder names, which count only if there are several
    in_memory   True if pictures are decoded already: workers are then threads, not processes

Sources travel to worker processes: they can be pickled and forked.
"""

import gzip
import os
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from dnnlib.image_io import BadImage, decode_picture, decode_pngs, is_image_name, is_small_png
from dnnlib.util import UserError
from torch_utils.files import pickles
from training.data import imagenet
from training.data.archive import ArchiveReader, labels_of

KINDS = ('a folder or .zip of images, cifar-10-python.tar.gz, cifar-100-python.tar.gz (or their unpacked folders), '
         'MNIST *-images-idx3-ubyte.gz, an LSUN *_lmdb folder, a .txt list of image paths, or the word digits')


class Source:
    """Base of all sources (see the module)."""

    labels = classes = class_names = wnids = None
    implied = coarse = in_memory = False

    def __init__(self, name: str):
        self.name = name

    def read(self, index) -> np.ndarray:
        return np.asarray(self.picture(index))

    def picture(self, index):
        """The same as `read`, or Pillow's picture of mode RGB where Pillow has decoded it."""
        return self.read(index)

    def read_alike(self, indices) -> np.ndarray | None:
        """Pictures uint8 [n,h,w,3] at `indices` if they are small, of one size, and quicker read together; else None."""
        return None

    def name_classes(self, labels, names=None, wnids=None, classes=None):
        """Sets labels and what is known of their classes."""
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(classes) if classes is not None else list(range(len(names)))
        self.class_names, self.wnids = names, wnids


class FileSource(Source):
    """Images of a folder or zip. Labels are those of dataset.json, else the sorted names of the top-level folders."""

    def __init__(self, path: str):
        super().__init__(path)
        self.reader = ArchiveReader(path)
        self.files = [i for i, name in enumerate(self.reader.names) if is_image_name(name)]
        names = [self.reader.names[i] for i in self.files]
        if not names:
            latents = any(name.endswith('.npy') for name in self.reader.names)
            raise UserError(f'--source={path} holds ' + (
                'latents, not images; see dataset_tool.py decode' if latents else f'no images; give {KINDS}'))
        description = self.reader.description()
        if description:
            self._stored_labels(names, description)
        else:
            self._folder_labels(names)

    def _stored_labels(self, names, description):
        self.labels = labels_of(self.reader, names, description)
        if self.labels is None or self.labels.ndim == 2:
            return
        count = int(self.labels.max()) + 1
        tables = [description.get(key) for key in ('classes', 'class_names', 'wnids')]
        for table, kind in zip(tables, (int, str, str), strict=True):
            if table is not None and not (isinstance(table, list) and len(table) >= count
                                          and all(isinstance(value, kind) for value in table)):
                raise UserError(f'--source={self.name}: dataset.json does not describe the {count} classes of its labels')
        classes, class_names, wnids = tables
        count = max([count] + [len(table) for table in tables if table is not None])
        self.name_classes(self.labels, class_names, wnids, classes or range(count))

    def _folder_labels(self, names):
        tops = [name.partition('/')[0] if '/' in name else None for name in names]
        folders = sorted(set(tops) - {None})
        if not folders or (len(folders) == 1 and None in tops):
            return
        if None in tops:
            outside = [name for name, top in zip(names, tops, strict=True) if top is None]
            raise UserError(f'--source={self.name} has class folders, but {len(outside)} of {len(names)} images lie '
                            f'outside them, e.g. {outside[0]}; move them, or add a dataset.json')
        place = {folder: i for i, folder in enumerate(folders)}
        known = imagenet.index_of_wnid()
        self.implied = True
        labels = [place[top] for top in tops]
        if all(folder in known for folder in folders):
            indices = [known[folder] for folder in folders]
            self.name_classes(labels, [imagenet.classes()[i][1] for i in indices], folders, indices)
        else:
            self.name_classes(labels, folders)

    def __len__(self):
        return len(self.files)

    def picture(self, index):
        return decode_picture(self.reader.read(self.files[index]))

    def read_alike(self, indices):
        first = self.reader.read(self.files[indices[0]])
        if not is_small_png(first):
            return None
        return decode_pngs([first, *(self.reader.read(self.files[index]) for index in indices[1:])])

    def where(self, index):
        return self.reader.where(self.files[index])


class ListSource(Source):
    """Images named in a text file: one path a line, relative to the file's folder or to the working directory.

    A tab and a whole number after every path give labels. Empty lines and lines that start with # are left out.
    """

    def __init__(self, path: str):
        super().__init__(path)
        try:
            with open(path, encoding='utf-8') as file:
                lines = [(n, line.strip()) for n, line in enumerate(file, 1)]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--source={path} cannot be read as a list of image paths ({error})') from None
        lines = [(n, line) for n, line in lines if line and not line.startswith('#')]
        if not lines:
            raise UserError(f'--source={path} lists no images; write one path a line')
        self.paths, labels, missing = [], [], []
        for number, line in lines:
            name, _, label = line.partition('\t')
            found = next((p for p in (os.path.join(os.path.dirname(path), name), name) if os.path.isfile(p)), None)
            if found is None:
                missing.append(f'line {number}: {name}')
            if label and not label.strip().isdigit():
                raise UserError(f'--source={path} line {number}: label {label!r} is not a whole number')
            self.paths.append(found)
            labels.append(int(label) if label else -1)
        if missing:
            raise UserError(f'--source={path}: {len(missing)} of {len(lines)} images do not exist, e.g. {missing[0]}')
        if max(labels) >= 0:
            if min(labels) < 0:
                raise UserError(f'--source={path}: {labels.count(-1)} of {len(lines)} images have no label')
            self.name_classes(labels, classes=range(max(labels) + 1))

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


class ArraySource(Source):
    """Images that are already decoded: uint8 [n,3,H,W] or gray [n,H,W]."""

    in_memory = True

    def __init__(self, name, images, labels, names):
        super().__init__(name)
        self.images = images
        self.name_classes(labels, names)

    def __len__(self):
        return len(self.images)

    def read(self, index):
        image = self.images[index]
        if image.ndim == 2:
            return np.repeat(image[:, :, None], 3, axis=2)
        return np.ascontiguousarray(image.transpose(1, 2, 0))

    def read_alike(self, indices):
        images = self.images[indices]
        return images[..., None].repeat(3, axis=3) if images.ndim == 3 else images.transpose(0, 2, 3, 1)

    def where(self, index):
        return f'{self.name}: image {index}'


class LmdbSource(Source):
    """Images of an LSUN database, in the order of its keys; no labels."""

    def __init__(self, path: str):
        super().__init__(path)
        self._environment = None
        with self._begin() as transaction:
            self.keys = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
        self._environment = None
        if not self.keys:
            raise UserError(f'--source={path} is an empty database')

    def _begin(self):
        try:
            import lmdb
        except ImportError:
            raise UserError(f'--source={self.name} is an LMDB database; install its reader: pip install lmdb') from None
        if self._environment is None or self._environment[0] != os.getpid():  # not to be used across a fork
            try:
                self._environment = os.getpid(), lmdb.open(self.name, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise UserError(f'--source={self.name} is no readable LMDB database ({error})') from None
        return self._environment[1].begin(buffers=False)

    def __getstate__(self):
        return self.__dict__ | {'_environment': None}

    def __len__(self):
        return len(self.keys)

    def picture(self, index):
        with self._begin() as transaction:
            return decode_picture(transaction.get(self.keys[index]) or b'')

    def where(self, index):
        return f'{self.name}: {self.keys[index].decode("latin1")}'


class JoinedSource(Source):
    """Several sources one after the other. Classes of the same name (or wnid) are one class.

    If all are ImageNet's, its indices stay and order the classes; else the classes of the first source keep theirs and
    new names follow.
    """

    def __init__(self, sources: list[Source]):
        super().__init__(','.join(source.name for source in sources))
        self.sources = sources
        self.starts = np.cumsum([0] + [len(source) for source in sources])
        self.implied = all(source.implied for source in sources)
        self.in_memory = all(source.in_memory for source in sources)
        unlabelled = [source.name for source in sources if source.labels is None]
        if unlabelled and len(unlabelled) < len(sources):
            raise UserError(f'--source: {unlabelled[0]} has no labels, but others have; join sources of one kind')
        if not unlabelled:
            self._join_labels()

    def _join_labels(self):
        if any(source.labels.ndim == 2 for source in self.sources):
            if len({source.labels.shape[1:] for source in self.sources}) > 1:
                raise UserError(f'--source={self.name}: label vectors of different lengths')
            self.labels = np.concatenate([source.labels for source in self.sources])
            return
        all_wnids = all(source.wnids for source in self.sources)
        merged = {}  # name -> (original index, name to show)
        for source in self.sources:
            names = source.class_names or [str(c) for c in source.classes]
            for key, index, name in zip(source.wnids if all_wnids else names, source.classes, names, strict=True):
                if key not in merged:
                    taken = {i for i, _ in merged.values()}
                    merged[key] = (max(taken) + 1 if index in taken else index, name)
        keys = sorted(merged, key=lambda key: merged[key][0]) if all_wnids else list(merged)
        place = {key: i for i, key in enumerate(keys)}
        labels = []
        for source in self.sources:
            names = source.wnids if all_wnids else source.class_names or [str(c) for c in source.classes]
            labels.append(np.array([place[name] for name in names])[source.labels])
        named = any(source.class_names for source in self.sources)
        self.name_classes(np.concatenate(labels), [merged[key][1] for key in keys] if named else None,
                          keys if all_wnids else None, [merged[key][0] for key in keys])

    def _find(self, index):
        part = int(np.searchsorted(self.starts, index, side='right')) - 1
        return self.sources[part], index - int(self.starts[part])

    def __len__(self):
        return int(self.starts[-1])

    def picture(self, index):
        source, inner = self._find(index)
        return source.picture(inner)

    def read_alike(self, indices):
        first, start = self._find(indices[0])
        last, _ = self._find(indices[-1])
        inside = np.asarray(indices) - (indices[0] - start)
        return first.read_alike(inside) if first is last and inside.min() >= 0 and inside.max() < len(first) else None

    def where(self, index):
        source, inner = self._find(index)
        return source.where(inner)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets in files of their own.

_CIFAR10_TRAIN = tuple(f'data_batch_{i}' for i in range(1, 6))


def _cifar_files(path: str, split: str) -> dict[str, bytes] | None:
    """{base name: content} of what a CIFAR archive or folder has of a split, None if it is something else."""
    wanted = {'batches.meta', 'meta', *({*_CIFAR10_TRAIN, 'train'} if split == 'train' else {'test_batch', 'test'})}
    if os.path.isdir(path):
        for folder in (path, os.path.join(path, 'cifar-10-batches-py'), os.path.join(path, 'cifar-100-python')):
            marks = {'data_batch_1', 'batches.meta'}, {'train', 'meta'}
            if any(all(os.path.isfile(os.path.join(folder, name)) for name in mark) for mark in marks):
                found = {}
                for name in wanted & set(os.listdir(folder)):
                    with open(os.path.join(folder, name), 'rb') as file:
                        found[name] = file.read()
                return found
        return None
    found = {}
    try:
        with tarfile.open(path, 'r|*', bufsize=1 << 17) as tar:
            for count, member in enumerate(tar):
                name = os.path.basename(member.name)
                if member.isfile() and name in wanted and member.size < 1 << 29:
                    found[name] = tar.extractfile(member).read()
                if count > 50 and not found:
                    break  # some other archive, perhaps a large one
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f'--source={path} is damaged or no tar archive ({error}); download it again') from None
    return found if 'meta' in found or 'batches.meta' in found else None


def open_cifar(path: str, coarse: bool = False, split: str = 'train', files: dict | None = None) -> ArraySource:
    """CIFAR-10 or CIFAR-100 from its `-python.tar.gz` or the unpacked folder; `split` 'train' or 'test'.

    `coarse` takes CIFAR-100's 20 coarse labels. Raises UserError that names the file for any other layout.
    """
    files = _cifar_files(path, split) if files is None else files
    if files is None:
        raise UserError(f'--source={path} holds no CIFAR batches; for another archive, unpack it and give the folder')
    is10 = 'batches.meta' in files
    if coarse and is10:
        raise UserError(f'--coarse: {path} is CIFAR-10; CIFAR-100 alone has coarse labels')
    batches = (_CIFAR10_TRAIN if split == 'train' else ('test_batch',)) if is10 else (split,)
    kind = 'labels' if is10 else 'coarse_labels' if coarse else 'fine_labels'
    meta = _cifar_batch(path, 'batches.meta' if is10 else 'meta', files)
    names = meta.get('label_names' if is10 else 'coarse_label_names' if coarse else 'fine_label_names')
    if not isinstance(names, list) or not names:
        raise UserError(f'--source={path}: the meta file has no class names; it is not the original CIFAR layout')
    names = [name.decode('latin1') if isinstance(name, bytes) else str(name) for name in names]
    images, labels = [], []
    for name in batches:
        batch = _cifar_batch(path, name, files)
        files.pop(name)
        try:
            data, ids = batch['data'].array(), np.array(batch[kind], dtype=np.int64)
        except (KeyError, AttributeError, TypeError, ValueError, pickles.ForeignPickleError) as error:
            raise UserError(f'--source={path}: {name} is not the original CIFAR layout ({error})') from None
        if data.dtype != np.uint8 or data.shape != (len(ids), 3072) or not len(ids) \
                or ids.min() < 0 or ids.max() >= len(names):
            raise UserError(f'--source={path}: {name} is not the original CIFAR layout: {data.dtype} data '
                            f'{list(data.shape)} with {len(ids)} labels')
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(ids)
    whole = np.empty((sum(map(len, images)), 3, 32, 32), dtype=np.uint8)
    rest = whole
    while images:  # memory for one batch is taken while that of another is given back
        part = images.pop(0)
        rest[:len(part)] = part
        rest = rest[len(part):]
    source = ArraySource(path, whole, np.concatenate(labels), names)
    source.coarse = coarse
    return source


def _cifar_batch(path, name, files) -> dict:
    if name not in files:
        raise UserError(f'--source={path}: {name} is missing; download the archive again')
    try:
        batch = pickles.load(files[name], pickles.NUMPY_ARRAYS)
    except pickles.ForeignPickleError as error:
        raise UserError(f'--source={path}: {name} is refused: {error}') from None
    if not isinstance(batch, dict):
        raise UserError(f'--source={path}: {name} is not the original CIFAR layout')
    return {key.decode('latin1') if isinstance(key, bytes) else key: value for key, value in batch.items()}


def _read_idx(path: str, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file (optionally gzipped) with so many dimensions."""
    try:
        with open(path, 'rb') as file:
            packed = file.read(2) == b'\x1f\x8b'
        with gzip.open(path, 'rb') if packed else open(path, 'rb') as file:
            magic, *shape = struct.unpack(f'>{1 + dimensions}I', file.read(4 + 4 * dimensions))
            if magic != 0x0800 + dimensions:
                raise ValueError(f'it starts with {magic:#x} instead of {0x0800 + dimensions:#x}')
            size = int(np.prod(shape, dtype=object))
            data = file.read(min(size, 1 << 34) + 1)
    except FileNotFoundError:
        raise UserError(f'--source: {path} does not exist; it belongs beside the other file of the data set') from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f'--source: {path} is no readable idx file ({error})') from None
    if len(data) != size:
        raise UserError(f'--source: {path} is damaged: {len(data)} bytes of data instead of {size}')
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def open_mnist(path: str) -> ArraySource:
    """MNIST, or what has its format, from `*-images-idx3-ubyte.gz` with the labels file beside it.

    28x28 images get a black border of two pixels, so that their size is a power of two.
    """
    folder, base = os.path.split(path)
    images = _read_idx(path, 3)
    labels = _read_idx(os.path.join(folder, base.replace('images', 'labels').replace('idx3', 'idx1')), 1)
    if len(labels) != len(images) or not len(images):
        raise UserError(f'--source={path}: {len(images)} images but {len(labels)} labels')
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return ArraySource(path, images, labels, [str(i) for i in range(int(labels.max()) + 1)])


def open_digits() -> ArraySource:
    """scikit-learn's 1,797 handwritten digits: 8x8, values 0..16 scaled to 0..255. Installed with it, no download."""
    import sklearn.datasets
    digits = sklearn.datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return ArraySource('digits', images, digits.target, [str(i) for i in range(10)])


def open_source(text: str, coarse: bool = False) -> Source:
    """The source that `--source` names: a path of one of `KINDS`, or several joined by commas.

    `coarse` asks for CIFAR-100's coarse labels. Raises UserError in one line for anything that cannot be read.
    """
    parts = [text] if os.path.exists(text) else [part for part in text.split(',') if part]
    if not parts:
        raise UserError(f'--source={text!r} names nothing; give {KINDS}')
    sources = [_open_one(part, coarse) for part in parts]
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def _open_one(path: str, coarse: bool) -> Source:
    if path == 'digits':
        source = open_digits()
    elif not os.path.exists(path):
        raise UserError(f'--source={path} does not exist; give {KINDS}')
    elif os.path.isdir(path):
        source = _open_folder(path, coarse)
    elif path.lower().endswith('.txt'):
        source = ListSource(path)
    elif zipfile.is_zipfile(path):
        source = FileSource(path)
    elif re.search(r'images[.-]idx3-ubyte(\.gz)?$', path):
        source = open_mnist(path)
    elif re.search(r'\.(tar|tgz|tar\.\w+)$', path.lower()):
        source = open_cifar(path, coarse)
    else:
        raise UserError(f'--source={path} is of no known kind, or damaged; give {KINDS}')
    if coarse and not source.coarse:
        raise UserError(f'--coarse: {path} is not CIFAR-100, which alone has coarse labels')
    return source


def _open_folder(path: str, coarse: bool) -> Source:
    files = _cifar_files(path, 'train')
    if files is not None:
        return open_cifar(path, coarse, files=files)
    if os.path.isfile(os.path.join(path, 'data.mdb')):
        return LmdbSource(path)
    return FileSource(path)
