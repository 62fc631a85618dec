"""A data set as training, sampling and metrics see it: arrays of images and labels by index."""

import contextlib
import functools
import hashlib
import io
import math
import os
import re

import numpy as np

from dnnlib.image_io import (
    MODES,
    BadImage,
    as_array,
    decode_picture,
    has_colors,
    is_gray,
    is_image_name,
    with_channels,
)
from dnnlib.npz import read_npy_header
from dnnlib.util import UserError, parse_int_list, printable, subset
from training.data.archive import CLASS_TABLES, ArchiveReader, count_classes, labels_of
from training.data.autoencoders import locate

CACHE_BYTES = 2 << 30
LOOKED_AT = 1000        # images of an archive that does not say how many channels they have

# Keys of dataset.json that travel with the data into snapshots.
_DESCRIBING = ('sim_name', 'source', 'transform', 'encoder')


class Dataset:
    """Images of one shape with labels, by index: the base of all data sets.

    A subclass passes what it knows to the constructor, and defines `__len__` and `images`.

    Attributes:
        path, name:     'datasets/img256.zip' and 'img256'.
        image_shape:    (C, H, W) of what is stored; latents have 8 channels (mean, then std).
        dtype:          uint8 for pixels, float32 for latents.
        stored_labels:  class of each image, int64 [len]; or vectors, float32 [len,D]; or None.
        label_dim:      length of a label vector, 0 without labels.
        classes, class_names, wnids: see CLASS_TABLES; each a list, or None.
        info:           what dataset.json says besides the labels.
        fingerprint:    of the content, wherever it is: hexadecimal digits, or None if not known.

    Raises UserError if there are fewer names of classes than labels need.
    """

    fingerprint = None
    any_size = False        # pictures of several sizes; `image_shape` is that of the first
    is_random = False       # training looks at another part of a picture each time
    is_uniform = True       # all images are known to be of one size

    def __init__(self, path, image_shape, dtype=np.uint8, labels=None, label_dim=None, info=None):
        self.path = os.fspath(path).rstrip('/')
        name, colon, key = os.path.basename(os.path.abspath(self.path)).partition(':')
        if colon and os.path.exists(self.path):
            name, key = name + colon + key, ''
        stem, extension = os.path.splitext(name)
        stem = stem if extension.lower() in ('.zip', '.npz') else stem + extension
        self.name = f'{stem}-{key}' if key else stem
        self.image_shape = tuple(image_shape)
        self.dtype = np.dtype(dtype)
        self.info = info or {}
        self.stored_labels = labels
        for key in CLASS_TABLES:
            setattr(self, key, None if labels is None else self.info.get(key))
        if label_dim is None:
            label_dim = 0 if labels is None else count_classes(labels, self.info, self.path)
        self.label_dim = label_dim

    def __len__(self) -> int:
        raise NotImplementedError

    def images(self, indices) -> np.ndarray:
        """Images [n,C,H,W] of type `dtype` at `indices` (int [n])."""
        raise NotImplementedError

    def pictures(self, indices) -> list[np.ndarray]:
        """The images one by one, [C,H,W]: those of a data set of `any_size` differ in size."""
        return list(self.images(indices))

    def training_images(self, indices, start: int, seed: int) -> np.ndarray:
        """`images`, for the places from `start` on of a run with this seed."""
        return self.images(indices)

    def where(self, index) -> str:
        """The image's name for a message."""
        return f'{self.path}: image {index}'

    def labels(self, indices) -> np.ndarray:
        """Label vectors float32 [n,label_dim]: one-hot for class labels, else as stored."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if self.stored_labels is not None and self.stored_labels.ndim == 2:
            return self.stored_labels[indices]
        one_hot = np.zeros((len(indices), self.label_dim), dtype=np.float32)
        if self.has_labels:
            one_hot[np.arange(len(indices)), self.stored_labels[indices]] = 1
        return one_hot

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def resolution(self) -> int | list[int]:
        """Side of square images, else [height, width]: what networks have as `img_resolution`."""
        return resolution_of(*self.image_shape[1:])

    @property
    def label_ids(self) -> np.ndarray:
        """Class of every image, int64 [len]: the largest entry of vectors, 0 without labels."""
        labels = self.stored_labels
        if labels is None:
            return np.zeros(len(self), dtype=np.int64)
        return labels.argmax(axis=1) if labels.ndim == 2 else labels

    @property
    def class_counts(self) -> np.ndarray | None:
        """Images of each class, int64 [label_dim]; None without labels."""
        return np.bincount(self.label_ids, minlength=self.label_dim) if self.has_labels else None

    def relabel(self, description: dict, count: int):
        """Gives the classes the labels that they have in another data set of `count` classes, by
        its description. Raises UserError for one that it has not.
        """
        if self.stored_labels is None or self.stored_labels.ndim == 2:
            if self.label_dim != count:
                raise UserError(f'has {self.label_dim} classes instead of {count}')
            return
        rows, by, names = match_classes(description, self.description(), (count, self.label_dim))
        strange = [i for i in np.unique(self.stored_labels) if rows[i] is None]
        if strange:
            raise UserError(f'has a class of {by} {names[strange[0]]}, which is none of the '
                            f'{count} classes of {description.get("name")}')
        places = np.array([-1 if row is None else row for row in rows])
        self.stored_labels = places[self.stored_labels]
        self.label_dim = count
        for key in CLASS_TABLES:
            setattr(self, key, description.get(key))

    def class_index(self, text) -> int:
        """Label of a class given by name, wnid or original index (see `class_index` below)."""
        return class_index(self.description(), text)

    def class_indices(self, text) -> list[int]:
        """Labels of the classes of a list (see `class_indices` below)."""
        return class_indices(self.description(), text)

    def description(self) -> dict:
        """What a snapshot keeps: plain values, enough to name classes and to decode samples."""
        keys = ('name', 'resolution', 'num_channels', 'label_dim', *CLASS_TABLES)
        description = {key: getattr(self, key) for key in keys} | {'size': len(self)}
        if self.fingerprint is not None:
            description['fingerprint'] = self.fingerprint
            if self.has_labels:
                labels = np.ascontiguousarray(self.stored_labels)
                description['labels_fingerprint'] = hashlib.sha256(labels).hexdigest()[:32]
        return description | {key: self.info[key] for key in _DESCRIBING if key in self.info}


class RowDataset(Dataset):
    """Images of which some are chosen, each perhaps twice: as it is, and mirrored.

    A subclass calls `choose` at its end, and defines `_decode(row)` -> [C,H,W]; rows count the
    images before the choice.
    """

    def choose(self, count, max_size=None, seed=0, xflip=False, cache=False):
        """Of `count` images takes a random `max_size` by `seed` (see `subset`), and with `xflip`
        all of them mirrored after them; `cache` keeps decoded ones in memory (None: up to 2 GiB).
        """
        self._rows = subset(count, count if max_size is None else max_size, seed)
        self._copies = 2 if xflip else 1
        if self.stored_labels is not None:
            self.stored_labels = np.concatenate([self.stored_labels[self._rows]] * self._copies)
        # Room for the decoded images, filled as they are asked for. Threads may decode an image
        # twice, which does no harm.
        self._cache = None
        size = math.prod(self.image_shape) * self.dtype.itemsize * len(self._rows)
        if cache or (cache is None and size <= CACHE_BYTES):
            self._cached = np.zeros(len(self._rows), dtype=bool)
            self._cache = np.empty((len(self._rows), *self.image_shape), dtype=self.dtype)

    def __len__(self):
        return len(self._rows) * self._copies

    def _split(self, indices):
        """Whether each image is mirrored, and its place among those that were chosen."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if (indices >= len(self)).any():
            raise IndexError(f'image {indices.max()} of {len(self)}')
        return np.divmod(indices % len(self), len(self._rows))

    def _decode(self, row) -> np.ndarray:
        raise NotImplementedError

    def _stack(self, rows) -> np.ndarray:
        out = np.empty((len(rows), *self.image_shape), dtype=self.dtype)
        for image, row in zip(out, rows, strict=True):
            image[:] = self._decode(row)
        return out

    def images(self, indices) -> np.ndarray:
        """Images [n,C,H,W] at `indices` (int [n]). Raises UserError that names a damaged file."""
        mirrored, places = self._split(indices)
        if self._cache is not None:
            for place in places[~self._cached[places]]:
                self._cache[place] = self._decode(self._rows[place])
                self._cached[place] = True
            out = self._cache[places]
        else:
            out = self._stack(self._rows[places])
        mirrored = np.flatnonzero(mirrored)
        out[mirrored] = out[mirrored, :, :, ::-1]
        return out

    def pictures(self, indices):
        return [self._decode(self._rows[place])[:, :, ::-1 if is_mirrored else 1]
                for is_mirrored, place in zip(*self._split(indices), strict=True)]


class ImageDataset(RowDataset):
    """Images (uint8 gray, RGB or RGBA, or float32 latents) of an archive: a zip or a folder.

    Args:
        path:       .zip file or folder, see `training.data.archive`.
        use_labels: False hides the labels.
        channels:   1, 3 or 4 (see `dnnlib.image_io.with_channels`); None: what dataset.json says,
                    else 1 if all of up to LOOKED_AT pictures are gray, or 3.
        max_size:   Use a random subset of this many images, chosen by `seed` (see `subset`).
        xflip:      Double the data: all images, then all of them mirrored.
        cache:      Keep decoded images in memory; None decides by size (up to 2 GiB).
        finite:     False lets latents with NaN or infinite values through.
        any_size:   Pictures of several sizes are fine: for `pictures`.

    Raises UserError, naming the file, for a missing or damaged archive, images that are not equal
    in shape, a picture in colour where all that were looked at are gray, latents with NaN or
    infinite values (a sample is looked through at once, each when it is read), and labels that do
    not cover the images.
    """

    image_shape = None

    def __init__(self, path, use_labels=True, max_size=None, seed=0, xflip=False, cache=None,
                 finite=True, any_size=False, channels=None):
        path = os.fspath(path).rstrip('/')
        self._reader = ArchiveReader(path)
        if self._reader.damaged:
            raise UserError(f'{self._reader.damaged[0]}; mend or remove it')
        names = self._reader.names
        images = [i for i, name in enumerate(names) if is_image_name(name)]
        arrays = [i for i, name in enumerate(names) if name.endswith('.npy')]
        if bool(images) == bool(arrays):
            what = 'both images and .npy arrays; keep one kind' if images else 'no images'
            raise UserError(f'{path} holds {what}')
        if xflip and arrays:
            raise UserError(f'{path} holds latents, which cannot be mirrored; leave out xflip')
        self._files = np.array(images or arrays)
        self._is_latents = bool(arrays)
        self._finite = finite
        self.any_size = any_size and not arrays
        info = self._reader.description()
        self._channels = channels or info.get('channels')
        if self._channels not in (None, *MODES):
            raise UserError(f'{path}: its dataset.json names {printable(self._channels, 40)} '
                            'channels, and images have 1, 3 or 4')
        self._guessed = self._channels is None
        if self._guessed and images:
            some = self._files[::-(-len(images) // LOOKED_AT)]
            self._channels = 1 if all(is_gray(self._reader.read(i)) for i in some) else 3
        first = self._decode(0)
        if isinstance(info.get('encoder'), dict):
            info['encoder'] = locate(info['encoder'])
        labels = None
        if use_labels:
            labels = labels_of(self._reader, [names[i] for i in self._files], info)
        info.pop('labels', None)
        super().__init__(path, first.shape, first.dtype, labels, info=info)
        self._check_shapes()
        self.choose(len(self._files), max_size, seed, xflip, False if self.any_size else cache)

    @functools.cached_property
    def fingerprint(self):
        return self._reader.fingerprint(self._files[self._rows])

    def _check_shapes(self):
        # Uncompressed files of one shape have one size, and of another shape mostly another:
        # compare shapes where sizes differ. Compressed images are compared when they are read.
        rows = np.linspace(0, len(self._files) - 1, min(len(self._files), 10000)).astype(int)
        sizes = np.array([self._reader.size(self._files[row]) for row in rows])
        self.is_uniform = 'resolution' in self.info or (sizes == sizes[0]).all()
        for row in rows[sizes != sizes[0]][:16]:
            self._decode(row)
        if self._is_latents and self._finite:
            for row in rows[::-(-len(rows) // 100)]:
                self._decode(row)

    def where(self, index):
        return self._where(self._rows[index % len(self._rows)])

    def _where(self, row):
        return self._reader.where(self._files[row])

    def _decode(self, row) -> np.ndarray:
        """Image `row` of the archive as [C,H,W]."""
        data = self._reader.read(self._files[row])
        try:
            if self._is_latents:
                image = _decode_npy(data)
            else:
                picture = of_channels(decode_picture(data), self._channels, self._guessed)
                image = as_array(picture).transpose(2, 0, 1)
        except BadImage as error:
            raise UserError(f'{self._where(row)}: {error}', error.field) from None
        if self._is_latents and self._finite and not np.isfinite(image).all():
            raise UserError(f'{self._where(row)} has values that are not finite (NaN or '
                            'infinite); encode it again')
        if self.image_shape not in (None, image.shape) and not self.any_size:
            raise UserError(f'{self._where(row)} has shape {list(image.shape)}, but the first '
                            f'image has {list(self.image_shape)}; all must be equal in shape')
        return image


def of_channels(picture, channels: int, guessed: bool):
    """A picture `with_channels`; BadImage for one in colour where 1 is what others let guess."""
    if guessed and channels == 1 and has_colors(picture):
        raise BadImage('in colour, while the pictures that were looked at are gray; make a data '
                       'set of one kind (dataset_tool.py convert)')
    return with_channels(picture, channels)


def resolution_of(height: int, width: int) -> int | list[int]:
    """One number for a square, else [height, width]."""
    return height if height == width else [height, width]


def _decode_npy(data: bytes) -> np.ndarray:
    """Latents float32 [C,H,W] of an .npy file's bytes; raises BadImage for anything else."""
    file = io.BytesIO(data)
    try:
        shape, fortran, descr = read_npy_header(file)
        array = np.frombuffer(data, descr, math.prod(shape), file.tell())
        array = array.reshape(shape, order='F' if fortran else 'C')
    except (ValueError, TypeError) as error:
        raise BadImage(f'damaged array ({error})') from None
    if array.ndim != 3 or array.dtype.kind != 'f' or not array.size:
        raise BadImage(f'{array.dtype} array of shape {list(array.shape)} '
                       'instead of float32 [C,H,W]')
    with np.errstate(over='ignore'):  # beyond the range of float32: infinite
        return array.astype(np.float32)


def class_index(description: dict, text) -> int:
    """Label of the class that a user names, for a data set with this `Dataset.description()`.

    `text` is a class name, an ImageNet wnid or an original class index ('171': its place in
    `classes`; the label itself if the data set has no `classes`). A name that is a number counts
    before an index. Raises UserError that lists what exists.
    """
    count = description['label_dim']
    if count == 0:
        raise UserError(f'class {text!r}: the data set {description["name"]} has no classes')
    classes = [str(c) for c in description.get('classes') or range(count)]
    names = description.get('class_names')
    for table in (names, description.get('wnids'), classes):
        labels = [i for i, name in enumerate(table or []) if _plain(name) == _plain(text)]
        if len(labels) > 1:
            numbers = ', '.join(classes[i] for i in labels)
            raise UserError(f'class {text!r} is ambiguous: it names the classes [{numbers}]; '
                            'give the number')
        if labels:
            return labels[0]
    choices = [f'{c} ({name})' if name not in (c, None) else c
               for c, name in zip(classes, names or [None] * count, strict=False)]
    shown = ', '.join(choices[:20]) + (f', ... ({count} in all)' if count > 20 else '')
    raise UserError(f'class {text!r} is not in the data set {description["name"]}, '
                    f'which has: {shown}')


def class_titles(description: dict) -> list:
    """What the classes of a data set with this `Dataset.description()` are called: their names,
    else their original indices, else their labels.
    """
    names = description.get('class_names') or description.get('classes')
    return list(names or range(description.get('label_dim', 0)))


def class_indices(description: dict, text) -> list[int]:
    """Labels of one class, or of those in a list of names, wnids, original indices and ranges of
    these, such as 'cat,171,5-8'. A name with commas counts before a list. Raises UserError.
    """
    with contextlib.suppress(UserError):
        return [class_index(description, text)]
    labels = []
    for part in map(str.strip, str(text).split(',')):
        try:
            is_range = re.fullmatch(r'\d+-\d+', part) \
                and part not in (description.get('class_names') or ())
            numbers = parse_int_list(part) if is_range else [part]
        except ValueError as error:
            raise UserError(str(error)) from None
        labels += [class_index(description, number) for number in numbers]
    return labels


def match_classes(own: dict, other: dict, counts: tuple[int, int]) -> tuple[list, str, list]:
    """Which classes of a data set those of another are, by their descriptions and numbers of
    classes: those of one wnid, or name; where one of the two has no names, those of one original
    index.

    Returns (for each class of the other its label, or None; wnid, name or index; the classes of
    the other).
    """
    for by in ('wnids', 'class_names', 'classes'):
        tables = [list(table.get(by) or []) for table in (own, other)]
        if by == 'classes':
            tables = [[str(name) for name in names or range(count)]
                      for names, count in zip(tables, counts, strict=True)]
        if [len(names) for names in tables] == list(counts) and all(counts):
            break
    else:
        tables = [[*map(str, range(count))] for count in counts]
    places = {_plain(name): place for place, name in enumerate(tables[0])}
    rows = [places.get(_plain(name)) for name in tables[1]]
    return rows, {'classes': 'index', 'class_names': 'name', 'wnids': 'wnid'}[by], tables[1]


def _plain(name) -> str:
    return str(name).strip().lower().replace('_', ' ')
