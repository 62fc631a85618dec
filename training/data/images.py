"""Images of any file that holds some: folders, zips, and the `.npz` arrays of guided diffusion."""

import contextlib
import functools
import hashlib
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.image_io import LargeImage, check_pixels
from dnnlib.npz import open_array
from dnnlib.util import atomic_path, one_line
from training.data.archive import READ_FILES
from training.data.dataset import Dataset, ImageDataset


class ArrayImages(Dataset):
    """uint8 images [N,H,W,C] of an array, with their classes, int [N], if any.

    The fingerprint is that of at most `READ_FILES` images.
    """

    def __init__(self, path: str, array: np.ndarray, labels=None, info: dict | None = None):
        self._array = array
        super().__init__(path, (array.shape[3], *array.shape[1:3]), labels=labels, info=info)

    def __len__(self):
        return len(self._array)

    @functools.cached_property
    def fingerprint(self):
        images = self._array[::-(-len(self) // READ_FILES)]
        return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()[:32]

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W]."""
        return np.ascontiguousarray(self._array[np.asarray(indices)].transpose(0, 3, 1, 2))


class NpzImages(ArrayImages):
    """uint8 images [N,H,W,C] (RGB or gray) of an .npz file, with their classes, int [N], if any.

    An uncompressed array stays on the disk; a compressed one is read whole. Raises UserError that
    names the file.
    """

    def __init__(self, path: str, image_key: str = 'arr_0', label_key: str = 'arr_1'):
        labels = None
        try:
            array = open_array(path, image_key, _check_shape)
            with contextlib.suppress(KeyError):
                labels = open_array(path, label_key)
        except LargeImage as error:
            raise UserError(f'{path}: {error}', error.field) from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{path}: no .npz file with the array {image_key} '
                            f'({one_line(error, 100)})') from None
        shape = array.shape
        is_images = len(shape) == 4 and shape[3] in (1, 3) and shape[0] > 0
        if array.dtype != np.uint8 or not is_images:
            raise UserError(f'{path}: {image_key} is {array.dtype} {list(shape)} '
                            'instead of uint8 images [N, H, W, 3]')
        if labels is not None:
            if labels.shape != shape[:1] or labels.dtype.kind not in 'iu':
                raise UserError(f'{path}: {label_key} is {labels.dtype} {list(labels.shape)} '
                                f'instead of whole numbers [{shape[0]}]')
            labels = np.asarray(labels, dtype=np.int64)
        super().__init__(path, array, labels)


def _check_shape(shape: tuple):
    if len(shape) == 4:
        check_pixels(shape[2], shape[1])


def save_npz_images(path: str, images: np.ndarray, labels=None):
    """Writes uint8 [N,C,H,W], and classes [N] if there are any, as `NpzImages` reads them."""
    arrays = {'arr_0': images.transpose(0, 2, 3, 1)}
    if labels is not None:
        arrays['arr_1'] = np.asarray(labels, np.int64)
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        np.savez(file, **arrays)


def open_dataset(path: str, **options) -> Dataset:
    """The data set of a folder, a zip or an .npz; `options` are those of ImageDataset."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            if 'arr_0.npy' in z.namelist():
                return NpzImages(path)
    return ImageDataset(path, **options)


def open_images(path: str) -> Dataset:
    """The same for images to be measured; like `pixels_of`."""
    return pixels_of(open_dataset(path, cache=False))


def pixels_of(images: Dataset) -> Dataset:
    """The data set, if it holds pixels. Raises UserError for latents."""
    if images.dtype != np.uint8:
        raise UserError(f'{images.path} holds latents; metrics need pixels: give the data set '
                        'that was encoded, or its decoding (dataset_tool.py decode)')
    return images
