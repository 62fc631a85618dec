"""Images to be measured: folders, zips, and the `.npz` arrays of guided diffusion, read ahead in threads."""

import collections
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.npz import map_array
from torch_utils import distributed
from training.data.dataset import ImageDataset, class_index, subset


class NpzImages:
    """uint8 images [N, H, W, 3] under the key `arr_0` of an .npz file, and labels int [N] under `arr_1` if it is there.

    The same face as `ImageDataset`. An uncompressed array stays on the disk; a compressed one is read whole.
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


def select(images, num: int | None = None, seed: int = 0, class_name=None) -> np.ndarray:
    """Indices (int64, sorted) of the images of a class (None: of all), a random `num` of them if there are more.

    The choice is that of `ImageDataset(max_size=num, seed=seed)`.
    """
    indices = np.arange(len(images))
    if class_name is not None:
        indices = np.flatnonzero(images.label_ids == images.class_index(class_name))
        if not len(indices):
            raise UserError(f'class {class_name!r}: {images.path} has no image of it')
    if num is not None and num < 1:
        raise UserError(f'{num} images are too few to measure')
    return indices if num is None else indices[subset(len(indices), num, seed)]


def class_ids(labels, classes: list | None) -> np.ndarray:
    """The original class index (int64) of each label: what labels of differently numbered data sets have in common."""
    labels = np.asarray(labels, dtype=np.int64)
    if classes and all(isinstance(number, int) for number in classes):
        return np.array(classes, dtype=np.int64)[labels]
    return labels


def read_batches(images, indices, batch: int = 64, workers: int = 2) -> Iterator[tuple]:
    """(positions int64 [n], images uint8 [n, C, H, W], class ids int64 [n] or None) as tensors: this process's share of
    the batches of images[indices].

    A position is the place within `indices`. `workers` threads read ahead.
    """
    positions = np.arange(len(indices))
    ids = class_ids(images.label_ids[indices], images.classes) if images.has_labels else None
    starts = range(0, len(indices), batch)[distributed.get_rank()::distributed.get_world_size()]
    with ThreadPoolExecutor(workers, thread_name_prefix='images') as pool:
        ahead = collections.deque()
        for start in starts:
            mine = positions[start:start + batch]
            ahead.append((mine, pool.submit(images.images, indices[mine])))
            if len(ahead) > workers:
                yield _finish(*ahead.popleft(), ids)
        while ahead:
            yield _finish(*ahead.popleft(), ids)


def _finish(positions, future, ids):
    return (torch.from_numpy(positions), torch.from_numpy(future.result()),
            None if ids is None else torch.from_numpy(ids[positions]))
