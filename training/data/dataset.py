"""A data set as training, sampling and metrics see it: arrays of images and labels by index."""

import io
import os

import numpy as np

from dnnlib.image_io import BadImage, decode_image, is_image_name
from dnnlib.util import UserError
from training.data.archive import ArchiveReader, labels_of

CACHE_BYTES = 2 << 30

# Keys of dataset.json that travel with the data into snapshots.
_DESCRIBING = ('classes', 'class_names', 'wnids', 'sim_name', 'source', 'transform', 'encoder')


class ImageDataset:
    """Images [C,H,W] (uint8 RGB, or float32 latents) with labels, from an archive: a zip or a folder.

    Args:
        path:       .zip file or folder, see `training.data.archive`.
        use_labels: False hides the labels (`label_dim` 0).
        max_size:   Use a random subset of this many images, chosen by `seed`.
        xflip:      Double the data: all images, then all of them mirrored.
        cache:      Keep decoded images in memory; None decides by size (up to 2 GiB).

    Attributes:
        name, path:              'img256' and 'datasets/img256.zip'.
        resolution, num_channels, dtype: Of what is stored; latents have 8 channels (mean, then standard deviation).
        label_dim, label_shape:  Length of a label vector, 0 without labels; (label_dim,).
        classes, class_names, wnids: Original index, name and ImageNet folder of each label, or None.

    Raises UserError, naming the file, for a missing or damaged archive, images that are not square or not equal in
    shape, and labels that do not cover the images.
    """

    def __init__(self, path, use_labels=True, max_size=None, seed=0, xflip=False, cache=None):
        self.path = os.fspath(path).rstrip('/')
        base = os.path.basename(os.path.abspath(self.path))
        self.name = base[:-4] if base.lower().endswith('.zip') else base
        self._reader = ArchiveReader(self.path)
        self._files, self._kind = self._find_files()
        self._npy_header = None
        self._shape = None
        first = self._decode(0)
        self._shape, self.dtype = first.shape, first.dtype
        self.num_channels, self.resolution = first.shape[0], first.shape[1]
        self._check_shapes()

        self.info = self._reader.description()
        self._load_labels(use_labels)
        self.info.pop('labels', None)
        self._rows = np.arange(len(self._files))
        if max_size is not None and len(self._rows) > max_size:
            self._rows = subset(len(self._rows), max_size, seed)
        if xflip and self._kind == 'npy':
            raise UserError(f'{self.path} holds latents, which cannot be mirrored; leave out xflip')
        self._num_plain = len(self._rows)
        if xflip:
            self._rows = np.concatenate([self._rows, self._rows])
        if cache is None:
            cache = first.nbytes * self._num_plain <= CACHE_BYTES
        self._use_cache = bool(cache)
        self._make_cache()

    def _find_files(self):
        names = self._reader.names
        images = [i for i, name in enumerate(names) if is_image_name(name)]
        arrays = [i for i, name in enumerate(names) if name.endswith('.npy')]
        if bool(images) == bool(arrays):
            what = 'both images and .npy arrays; keep one kind' if images else 'no images'
            raise UserError(f'{self.path} holds {what}')
        return np.array(images or arrays), 'image' if images else 'npy'

    def _check_shapes(self):
        channels, height, width = self._shape
        if height != width:
            raise UserError(f'{self._where(0)} is {width} x {height}; images of a data set must be square '
                            '(see dataset_tool.py convert --resolution)')
        # Uncompressed files of one shape have one size, and of another shape mostly another: compare shapes where
        # sizes differ. Compressed images are compared when they are read.
        rows = np.linspace(0, len(self._files) - 1, min(len(self._files), 10000)).astype(int)
        sizes = np.array([self._reader.size(self._files[row]) for row in rows])
        for row in rows[sizes != sizes[0]][:16]:
            self._decode(row)

    def _load_labels(self, use_labels: bool):
        names = [self._reader.names[i] for i in self._files]
        self._labels = labels_of(self._reader, names, self.info) if use_labels else None
        for key in ('classes', 'class_names', 'wnids'):
            value = self.info.get(key)
            if value is not None and (not isinstance(value, list) or len(set(map(type, value))) > 1):
                raise UserError(f'{self.path}: {key!r} in dataset.json must be a list of one kind')
            setattr(self, key, value if self._labels is not None else None)
        tables = [t for t in (self.classes, self.class_names, self.wnids) if t is not None]
        self.label_dim = 0
        if self._labels is not None:
            vectors = self._labels.ndim == 2
            self.label_dim = self._labels.shape[1] if vectors else int(self._labels.max()) + 1
            if tables:
                if len(set(map(len, tables))) > 1 or len(tables[0]) < self.label_dim:
                    raise UserError(f'{self.path}: dataset.json names {len(tables[0])} classes, '
                                    f'but its labels need {self.label_dim}')
                self.label_dim = len(tables[0])
        self.label_shape = (self.label_dim,)

    def _make_cache(self):
        """Room for the decoded images, filled as they are asked for (threads may decode an image twice, no harm)."""
        self._cache, self._slots, self._loaded = None, None, None
        if self._use_cache:
            kept = self._rows[:self._num_plain]
            self._slots = np.full(len(self._files), -1, dtype=np.int64)
            self._slots[kept] = np.arange(len(kept))
            self._loaded = np.zeros(len(kept), dtype=bool)
            self._cache = np.empty((len(kept), *self._shape), dtype=self.dtype)

    def __getstate__(self):
        return self.__dict__ | {'_cache': None, '_slots': None, '_loaded': None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_cache()

    def __len__(self):
        return len(self._rows)

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def image_shape(self) -> tuple:
        """(C, H, W) of what is stored."""
        return tuple(self._shape)

    def _where(self, row) -> str:
        return self._reader.where(self._files[row])

    def file_name(self, index: int) -> str:
        """Name in the archive of image `index`."""
        return self._reader.names[self._files[self._rows[index]]]

    def _decode(self, row) -> np.ndarray:
        """Image `row` of the archive as [C,H,W]."""
        data = self._reader.read(self._files[row])
        try:
            image = self._decode_npy(data) if self._kind == 'npy' else decode_image(data).transpose(2, 0, 1)
        except BadImage as error:
            raise UserError(f'{self._where(row)}: {error}') from None
        if self._shape is not None and image.shape != self._shape:
            raise UserError(f'{self._where(row)} has shape {list(image.shape)}, but the first image has '
                            f'{list(self._shape)}; all images of a data set must be equal in shape')
        return image

    def _decode_npy(self, data: bytes) -> np.ndarray:
        # Parsing the text header takes longer than reading the numbers, and all headers are alike.
        if self._npy_header is not None and data.startswith(self._npy_header) and len(data) == self._npy_length:
            return np.frombuffer(data, np.float32, offset=len(self._npy_header)).reshape(self._shape)
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BadImage(f'damaged array ({error})') from None
        if array.ndim != 3 or array.dtype.kind != 'f':
            raise BadImage(f'{array.dtype} array of shape {list(array.shape)} instead of float32 [C,H,W]')
        if array.dtype == np.float32 and array.flags.c_contiguous and self._shape is None:
            self._npy_header, self._npy_length = data[:len(data) - array.nbytes], len(data)
        return array.astype(np.float32)

    def images(self, indices) -> np.ndarray:
        """Images [n,C,H,W] (uint8 or float32) at `indices` (int [n]). Raises UserError that names a damaged file."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        rows = self._rows[indices]
        if self._use_cache:
            out = self._cached(rows)
        else:
            out = np.empty((len(rows), *self._shape), dtype=self.dtype)
            for image, row in zip(out, rows, strict=True):
                image[:] = self._decode(row)
        flipped = np.flatnonzero(indices % len(self) >= self._num_plain)
        if len(flipped):
            out[flipped] = out[flipped, :, :, ::-1]
        return out

    def _cached(self, rows: np.ndarray) -> np.ndarray:
        """Images of the archive's `rows`, each decoded once."""
        slots = self._slots[rows]
        for slot, row in zip(slots, rows, strict=True):
            if not self._loaded[slot]:
                self._cache[slot] = self._decode(row)
                self._loaded[slot] = True
        return self._cache[slots]

    def labels(self, indices) -> np.ndarray:
        """Label vectors float32 [n,label_dim]: one-hot for class labels, else as stored."""
        rows = self._rows[np.asarray(indices, dtype=np.int64).reshape(-1)]
        if not self.has_labels:
            return np.zeros((len(rows), 0), dtype=np.float32)
        if self._labels.ndim == 2:
            return self._labels[rows]
        return np.eye(self.label_dim, dtype=np.float32)[self._labels[rows]]

    @property
    def label_ids(self) -> np.ndarray:
        """Class of every image, int64 [len]: the largest entry of label vectors, 0 throughout without labels."""
        if not self.has_labels:
            return np.zeros(len(self), dtype=np.int64)
        return (self._labels.argmax(axis=1) if self._labels.ndim == 2 else self._labels)[self._rows]

    @property
    def stored_labels(self) -> np.ndarray | None:
        """Labels as dataset.json has them: int64 [len], float32 [len,D], or None."""
        return None if self._labels is None else self._labels[self._rows]

    def class_index(self, text) -> int:
        """Label of a class given by original index, name or wnid (see `class_index` below)."""
        return class_index(self.description(), text)

    def description(self) -> dict:
        """What a snapshot keeps of the data set: plain values, enough to name classes and decode samples."""
        return {
            'name': self.name, 'size': len(self), 'resolution': self.resolution, 'num_channels': self.num_channels,
            'label_dim': self.label_dim, 'classes': self.classes, 'class_names': self.class_names, 'wnids': self.wnids,
        } | {key: self.info[key] for key in _DESCRIBING[3:] if key in self.info}


def subset(n: int, max_size: int, seed: int) -> np.ndarray:
    """Sorted random choice of `max_size` of 0..n-1 (int64): the rule that EDM and EDM2 use for size limits."""
    order = np.arange(n, dtype=np.int64)
    if n > max_size:
        np.random.RandomState(seed % (1 << 31)).shuffle(order)
        order = np.sort(order[:max_size])
    return order


def class_index(description: dict, text) -> int:
    """Label of the class that a user names, for a data set with the given `ImageDataset.description()`.

    `text` is an original class index ('171': its place in `classes`; the label itself if the data set has no
    `classes`), a class name or an ImageNet wnid. Raises UserError that lists what exists.
    """
    count = description['label_dim']
    if count == 0:
        raise UserError(f'class {text!r}: the data set {description["name"]} has no classes')
    classes = description.get('classes') or list(range(count))
    names, wnids = description.get('class_names'), description.get('wnids')
    wanted = _plain(text)
    for table in ([str(c) for c in classes], wnids, names):
        found = [i for i, name in enumerate(table or []) if _plain(name) == wanted]
        if len(found) > 1:
            numbers = [classes[i] for i in found]
            raise UserError(f'class {text!r} is ambiguous: it names the classes {numbers}; give the number')
        if found:
            return found[0]
    known = [f'{c} ({names[i]})' if names and names[i] != str(c) else str(c) for i, c in enumerate(classes)]
    known = ', '.join(known[:20]) + (f', ... ({count} in all)' if count > 20 else '')
    raise UserError(f'class {text!r} is not in the data set {description["name"]}, which has: {known}')


def _plain(name) -> str:
    return str(name).strip().lower().replace('_', ' ')
