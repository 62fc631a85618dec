"""Images of any file that holds some: folders, zips, and the `.npz` arrays of guided diffusion."""

import os
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.npz import map_array
from training.data.dataset import ImageDataset, class_index


class NpzImages:
    """uint8 images [N, H, W, 3] under the key `arr_0` of an .npz file, and labels int [N] under `arr_1` if it is there.

    Same interface as `ImageDataset`. An uncompressed array stays on the disk; a compressed one is read whole.
    """

    classes = None

    def __init__(self, path: str):
        self.path = self.name = path
        try:
            self._array = map_array(path, 'arr_0')
            if self._array is None:
                with np.load(path, allow_pickle=False) as z:
                    self._array = z['arr_0']
            with np.load(path, allow_pickle=False) as z:
                self.label_ids = z['arr_1'].astype(np.int64) if 'arr_1' in z.files else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{path}: damaged .npz file ({error})') from None
        shape = self._array.shape
        if self._array.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not len(self._array):
            raise UserError(f'{path}: arr_0 is {self._array.dtype} {list(shape)} instead of uint8 images [N, H, W, 3]')
        if self.label_ids is not None and self.label_ids.shape != shape[:1]:
            raise UserError(f'{path}: arr_1 has shape {list(self.label_ids.shape)}, but there are {shape[0]} images')
        self.has_labels = self.label_ids is not None

    def __len__(self):
        return len(self._array)

    def images(self, indices) -> np.ndarray:
        """uint8 [n, C, H, W]."""
        return np.ascontiguousarray(self._array[np.asarray(indices)].transpose(0, 3, 1, 2))

    def class_index(self, text) -> int:
        """Label that `text` names: here the label itself."""
        count = 0 if self.label_ids is None else int(self.label_ids.max()) + 1
        return class_index({'name': self.name, 'label_dim': count}, text)


def is_npz_of_images(path: str) -> bool:
    """True for a zip file with an array `arr_0`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as z:
        return 'arr_0.npy' in z.namelist()


def open_images(path: str) -> ImageDataset | NpzImages:
    """Images of a folder, a zip or an .npz. Raises UserError for what is none of these, and for latents."""
    if os.path.isfile(path) and is_npz_of_images(path):
        return NpzImages(path)
    images = ImageDataset(path, cache=False)
    if images.dtype != np.uint8:
        raise UserError(f'{path} holds latents; metrics need pictures: give the data set that was encoded, or its decoding '
                        '(dataset_tool.py decode)')
    return images
