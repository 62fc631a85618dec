"""Images of whatever holds some, as data sets: `open_dataset` is the way to all of them."""

import contextlib
import functools
import hashlib
import os

import numpy as np

from dnnlib import UserError
from dnnlib.image_io import BadImage, as_array, with_channels
from dnnlib.util import atomic_path
from training.data import arrays, sources, transforms
from training.data.archive import CLASS_TABLES, READ_FILES
from training.data.dataset import LOOKED_AT, Dataset, ImageDataset, RowDataset, of_channels


class ArrayImages(RowDataset):
    """uint8 images [N,H,W,C] of an array, with their classes, int [N], if any.

    `channels`: 1, 3 or 4 (see `dnnlib.image_io.with_channels`); None: as many as the array has.
    `choice` goes to `choose`. The fingerprint is that of at most `READ_FILES` images.
    """

    def __init__(self, path: str, array: np.ndarray, labels=None, info: dict | None = None,
                 channels: int | None = None, **choice):
        self._array = array
        shape = (channels or array.shape[3], *array.shape[1:3])
        super().__init__(path, shape, labels=labels, info=info)
        self.choose(len(array), **choice)

    @functools.cached_property
    def fingerprint(self):
        images = self._array[self._rows[::-(-len(self._rows) // READ_FILES)]]
        return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()[:32]

    def _stack(self, rows) -> np.ndarray:
        images = with_channels(self._array[rows], self.num_channels)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


class NpzImages(ArrayImages):
    """uint8 images [N,H,W,C] (gray, RGB or RGBA) of an .npz file, with their classes, int [N], if
    any.

    `path` may end in :KEY, the name of an array (see `arrays.open_npz`). Raises UserError that
    names the file.
    """

    def __init__(self, path: str, use_labels=True, **choice):
        images, labels = arrays.open_npz(*arrays.split_key(path))
        super().__init__(path, images, labels if use_labels else None, **choice)


def save_npz_images(path: str, images: np.ndarray, labels=None):
    """Writes uint8 [N,C,H,W], and classes [N] if there are any, as `NpzImages` reads them."""
    arrays = {'arr_0': images.transpose(0, 2, 3, 1)}
    if labels is not None:
        arrays['arr_1'] = np.asarray(labels, np.int64)
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        np.savez(file, **arrays)


class SourceImages(RowDataset):
    """The pictures of a source (see `training.data.sources`) as a data set.

    channels     1, 3 or 4 (see `dnnlib.image_io.with_channels`); None: 1 if all of up to LOOKED_AT
                 pictures are gray, else 3
    side         None: as they are, and all equal. Else they become squares of so many pixels as
                 guided diffusion makes them: shrunk, and the centre of it
    random_crop  instead of the centre a part of a little more, another one each time in training

    `choice` goes to `choose`. Raises UserError that names the picture.
    """

    image_shape = None

    def __init__(self, source: sources.Source, use_labels=True, cache=None, any_size=False,
                 side: int | None = None, random_crop=False, channels: int | None = None,
                 **choice):
        source.require_whole()
        self.source = source
        self._guessed = channels is None
        self._channels = channels or source.num_channels(
            range(0, len(source), -(-len(source) // LOOKED_AT)))
        self.any_size = any_size
        self.is_random = random_crop
        self._side = side
        self._transform = side and transforms.make_transform('center-crop-dhariwal', side, side)
        first = self._decode(0)
        has_labels = use_labels and source.labels is not None and not (
            source.implied and len(source.classes) == 1)
        info = {key: getattr(source, key) for key in CLASS_TABLES if getattr(source, key)}
        super().__init__(source.name, first.shape, labels=source.labels if has_labels else None,
                         info=info if has_labels else None)
        self.choose(len(source), cache=False if any_size or random_crop else cache, **choice)

    @functools.cached_property
    def fingerprint(self):
        return self.source.fingerprint(self._rows)

    def where(self, index):
        return self.source.where(int(self._rows[index % len(self._rows)]))

    def _decode(self, row) -> np.ndarray:
        return self._crop(row, self._transform or as_array)

    def _crop(self, row, transform) -> np.ndarray:
        try:
            picture = self.source.picture(int(row))
            image = transform(of_channels(picture, self._channels, self._guessed))
        except (BadImage, UserError) as error:
            where = self.source.where(int(row))
            text = str(error) if where in str(error) else f'{where}: {error}'
            raise UserError(text, error.field) from None
        image = image.transpose(2, 0, 1)
        if self.image_shape not in (None, image.shape) and not self.any_size:
            raise UserError(f'{self.source.where(int(row))} has shape {list(image.shape)}, but '
                            f'the first image has {list(self.image_shape)}; all must be equal in '
                            'shape (dataset_tool.py convert makes them so)')
        return image

    def training_images(self, indices, start, seed):
        if not self.is_random:
            return self.images(indices)
        out = np.empty((len(indices), *self.image_shape), dtype=self.dtype)
        for position, (image, is_mirrored, place) in enumerate(
                zip(out, *self._split(indices), strict=True), start):
            random = np.random.RandomState([seed % (1 << 32), position % (1 << 32),
                                            position >> 32])
            crop = functools.partial(transforms.random_crop, side=self._side, random=random)
            image[:] = self._crop(self._rows[place], crop)[:, :, ::-1 if is_mirrored else 1]
        return out


def open_dataset(path: str, **options) -> Dataset:
    """The data set at `path`: a folder or zip of images or latents, an .npz or .npy of images, a
    folder of `<class>.npy`, or any other source (see `training.data.sources`).

    `options` are those of ImageDataset.
    """
    path = os.fspath(path)
    kind = sources.kind_of(path)
    if kind in (None, sources.FileSource):
        return ImageDataset(path, **options)
    options.pop('finite', None)
    if kind is sources.npz_source:
        options.pop('any_size', None)
        return NpzImages(path, **{'cache': False} | options)
    return SourceImages(sources.open_source(path), **options)


def holds_images(path: str) -> bool:
    """Whether a path is of images in a layout of their own: not of a folder or zip of pictures,
    nor of statistics, which may have images beside them.
    """
    kind = sources.kind_of(path)
    return kind not in (None, sources.FileSource) and not (
        kind is sources.npz_source and 'mu' in arrays.array_names(path))


def open_images(path: str, channels: int | None = None) -> Dataset:
    """The same for images to be measured, which may be of several sizes; like `pixels_of`."""
    return pixels_of(open_dataset(path, cache=False, any_size=True, channels=channels))


def reference_at(path: str, channels: int | None = None) -> Dataset | str:
    """What images are compared with by `metrics.scoring.Scorer`: the data set of a path that
    `holds_images`, else the path, of statistics or pictures.
    """
    return open_images(path, channels) if holds_images(path) else path


def open_squares(path: str, shape: tuple, use_labels: bool, random_crop=False) -> Dataset:
    """The same for training on images of this shape [C,H,W]. If that is a square, pictures of
    other sizes become such, see `SourceImages`. Latents stay as they are.

    Labels that are asked for come from the names of files, as in guided diffusion, where there
    are no others.
    """
    channels, side, width = shape
    channels = None if channels == 1 else channels        # colours are not thrown away unasked
    if side != width:
        return open_dataset(path, use_labels=use_labels, channels=channels)
    if not random_crop:
        with contextlib.suppress(UserError):              # what is wrong, the source says
            dataset = open_dataset(path, use_labels=use_labels, channels=channels)
            is_right = dataset.is_uniform and dataset.image_shape == tuple(shape)
            has_all = dataset.has_labels or not use_labels
            if dataset.dtype != np.uint8 or (is_right and has_all):
                return dataset
    source = sources.open_source(path)
    if use_labels and source.labels is None:
        with contextlib.suppress(UserError):
            source = sources.open_source(path, labels='names')
    return SourceImages(source, use_labels, side=side, random_crop=random_crop, channels=channels)


def pixels_of(images: Dataset) -> Dataset:
    """The data set, if it holds pixels. Raises UserError for latents."""
    if images.dtype != np.uint8:
        raise UserError(f'{images.path} holds latents; metrics need pixels: give the data set '
                        'that was encoded, or its decoding (dataset_tool.py decode)')
    return images
