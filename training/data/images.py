"""Images of any file that holds some: folders, zips, and the `.npz` arrays of guided diffusion."""

import os
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.npz import map_array
from training.data.dataset import Dataset, ImageDataset


class NpzImages(Dataset):
    """uint8 images [N,H,W,C] under the key `arr_0` of an .npz file, with classes [N] under `arr_1`, if any.

    An uncompressed array stays on the disk; a compressed one is read whole.
    """

    def __init__(self, path: str):
        try:
            array = map_array(path, 'arr_0')
            with np.load(path, allow_pickle=False) as z:
                self._array = z['arr_0'] if array is None else array
                labels = z['arr_1'].astype(np.int64) if 'arr_1' in z.files else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{path}: damaged .npz file ({error})') from None
        shape = self._array.shape
        if self._array.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0]:
            raise UserError(f'{path}: arr_0 is {self._array.dtype} {list(shape)} '
                            'instead of uint8 images [N, H, W, 3]')
        if labels is not None and labels.shape != shape[:1]:
            raise UserError(f'{path}: arr_1 has shape {list(labels.shape)}, '
                            f'but there are {shape[0]} images')
        super().__init__(path, (shape[3], *shape[1:3]), labels=labels)

    def __len__(self):
        return len(self._array)

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W]."""
        return np.ascontiguousarray(self._array[np.asarray(indices)].transpose(0, 3, 1, 2))


def open_dataset(path: str, **options) -> Dataset:
    """The data set of a folder, a zip or an .npz; `options` are those of ImageDataset."""
    if os.path.isfile(path) and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            if 'arr_0.npy' in z.namelist():
                return NpzImages(path)
    return ImageDataset(path, **options)


def open_images(path: str) -> Dataset:
    """The same for images to be measured. Raises UserError for what is no data set, and for latents."""
    images = open_dataset(path, cache=False)
    if images.dtype != np.uint8:
        raise UserError(f'{path} holds latents; metrics need pixels: give the data set that was encoded, '
                        'or its decoding (dataset_tool.py decode)')
    return images
