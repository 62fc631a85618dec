"""Real and generated images in one training set, in a fixed proportion."""

import os
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.npz import map_array
from synthetic_data.class_files import open_classes
from torch_utils.random import tuple_seed
from training.data.sampler import EpochShuffle


class GeneratedImages:
    """Generated images with labels: a folder of class files (`class_files`), or an .npz with `image` and `label`.

    They stay on the disk, but for a compressed .npz. Attributes: path, label_ids (int64 [len]), image_shape (C, H, W).
    Raises UserError that names the file for others, and for labels outside of 0 .. class_num - 1.
    """

    def __init__(self, path: str, class_num: int):
        self.path = path
        if os.path.isdir(path):
            classes = open_classes(path, class_num)
            self._arrays = [file.map() for images in classes for file in images.files]
            self.label_ids = np.repeat(np.arange(class_num), list(map(len, classes)))
        else:
            images, labels = self._open_npz(path)
            self._arrays, self.label_ids = [images], np.asarray(labels, dtype=np.int64)
        if self.label_ids.min() < 0 or self.label_ids.max() >= class_num:
            raise UserError(f'{path} has labels from {self.label_ids.min()} to {self.label_ids.max()}, but the real data has '
                            f'{class_num} classes')
        self._bounds = np.cumsum([0, *map(len, self._arrays)])
        height, width, channels = self._arrays[0].shape[1:]
        self.image_shape = (channels, height, width)

    @staticmethod
    def _open_npz(path):
        try:
            found = [map_array(path, name) for name in ('image', 'label')]
            if any(array is None for array in found):
                with np.load(path, allow_pickle=False) as z:
                    found = [z['image'], z['label']]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{path} is neither a folder of <class>.npy nor an .npz with image and label '
                            f'({" ".join(str(error).split())[:100]})') from None
        images, labels = found
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1] \
                or labels.dtype.kind not in 'iu' or not len(images):
            raise UserError(f'{path} holds image {images.dtype} {list(images.shape)} and label {labels.dtype} '
                            f'{list(labels.shape)} instead of uint8 [N, H, W, 3] and whole numbers [N]')
        return images, labels

    def __len__(self):
        return len(self.label_ids)

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W] at `indices` (int [n], any order)."""
        indices = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(indices), *self.image_shape), np.uint8)
        places = np.searchsorted(self._bounds, indices, side='right') - 1
        for place in np.unique(places):
            mine = places == place
            out[mine] = self._arrays[place][indices[mine] - self._bounds[place]].transpose(0, 3, 1, 2)
        return out


class Mixture:
    """A labelled data set and generated images after it, with the face of the data set.

    Raises UserError if the shapes differ.
    """

    def __init__(self, real, generated: GeneratedImages):
        if tuple(real.image_shape) != tuple(generated.image_shape):
            raise UserError(f'{generated.path} has images of {list(generated.image_shape)}, but those of {real.path} are '
                            f'{list(real.image_shape)}')
        self.real, self.generated = real, generated
        self.image_shape, self.label_dim, self.name = real.image_shape, real.label_dim, real.name
        self.label_ids = np.concatenate([real.label_ids, generated.label_ids])

    def __len__(self):
        return len(self.label_ids)

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W]; the real images come first."""
        indices = np.asarray(indices, dtype=np.int64)
        out, is_real = np.empty((len(indices), *self.image_shape), np.uint8), indices < len(self.real)
        out[is_real] = self.real.images(indices[is_real])
        out[~is_real] = self.generated.images(indices[~is_real] - len(self.real))
        return out

    def labels(self, indices) -> np.ndarray:
        """One-hot float32 [n, label_dim]."""
        return np.eye(self.label_dim, dtype=np.float32)[self.label_ids[np.asarray(indices, dtype=np.int64)]]


class MixtureOrder:
    """The order of training on a mixture: position g is generated if floor((g + 1) f) > floor(g f), for the share f.

    So every batch has its share (up to one image), and of both kinds each has an order of its own (EDM2's).
    """

    def __init__(self, num_real: int, num_generated: int, share: float, seed: int = 0):
        self.num_real, self.share = num_real, share
        self._real = EpochShuffle(num_real, seed)
        self._generated = EpochShuffle(num_generated, tuple_seed(seed, 1))

    def indices(self, positions) -> np.ndarray:
        """Indices into the mixture (int64) at the positions (int64 >= 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        before = np.floor(positions * self.share + 1e-9).astype(np.int64)       # generated ones before the position
        generated = np.floor((positions + 1) * self.share + 1e-9).astype(np.int64) > before
        out = np.empty_like(positions)
        out[generated] = self.num_real + self._generated.indices(before[generated])
        out[~generated] = self._real.indices((positions - before)[~generated])
        return out
