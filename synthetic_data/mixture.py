"""Real and generated images in one training set, in a fixed proportion."""

import functools
import hashlib
import itertools
import os
from collections.abc import Sequence

import numpy as np

from dnnlib import UserError
from synthetic_data.class_files import open_classes
from torch_utils.distributed import get_rank, get_world_size
from torch_utils.random import tuple_seed
from training.data.dataset import Dataset
from training.data.images import NpzImages
from training.data.sampler import EpochShuffle


class _Joined(Dataset):
    """Data sets one after the other: whatever has a length and `images(indices)` -> uint8
    [n,C,H,W]."""

    def __init__(self, path: str, parts: list, labels, label_dim: int):
        super().__init__(path, parts[0].image_shape, labels=labels, label_dim=label_dim)
        self._parts = parts
        self._bounds = np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return len(self.stored_labels)

    @functools.cached_property
    def fingerprint(self):
        parts = [part.fingerprint for part in self._parts]
        return None if None in parts else hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]

    def where(self, index):
        part = np.searchsorted(self._bounds, index, side='right') - 1
        source = self._parts[part]
        index = index - self._bounds[part]
        return source.where(index) if isinstance(source, Dataset) else (
            f'{source.path}: image {index}')

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W] at `indices` (int [n], any order)."""
        indices = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(indices), *self.image_shape), np.uint8)
        parts = np.searchsorted(self._bounds, indices, side='right') - 1
        for part in np.unique(parts):
            mask = parts == part
            out[mask] = self._parts[part].images(indices[mask] - self._bounds[part])
        return out


class GeneratedImages(_Joined):
    """Generated images with labels: folders of class files (`class_files`), or an .npz with
    `image` and `label`.

    They stay on the disk, but for a compressed .npz. Those of several folders are joined, class by
    class. Raises UserError that names the file for others, for images that changed since they were
    made, and for labels outside of 0 ..
    class_num - 1.
    """

    def __init__(self, path: str | Sequence[str], class_num: int):
        folders = [path] if isinstance(path, str) else list(path)
        path = folders[0]
        if len(folders) == 1 and not os.path.isdir(path):
            npz = NpzImages(path)
            if not npz.has_labels or npz.stored_labels.ndim > 1:
                raise UserError(f'{path}: no .npz file with the array label')
            labels = npz.label_ids
            if labels.min() < 0 or labels.max() >= class_num:
                raise UserError(f'{path} has labels from {labels.min()} to {labels.max()}, but '
                                f'the number of classes is {class_num}')
            parts = [npz]
        else:
            classes = open_classes(folders, class_num)
            labels = np.repeat(np.arange(class_num), [sum(map(len, files)) for files in classes])
            parts = list(itertools.chain(*classes))
            for file in parts[get_rank()::get_world_size()]:
                file.verify()
        super().__init__(path, parts, labels, class_num)


class Mixture(_Joined):
    """A labelled data set, and generated images after it. Raises UserError if the shapes
    differ."""

    def __init__(self, real: Dataset, generated: GeneratedImages):
        if real.image_shape != generated.image_shape:
            raise UserError(f'{generated.path} has images of {list(generated.image_shape)}, but '
                            f'those of {real.path} are {list(real.image_shape)}')
        labels = np.concatenate([real.label_ids, generated.label_ids])
        super().__init__(real.path, [real, generated], labels, real.label_dim)
        self.real = real

    def description(self) -> dict:
        return self.real.description() | {'size': len(self), 'fingerprint': self.fingerprint}


class MixtureOrder:
    """The order of training on a mixture: position g is generated if floor((g + 1) f) > floor(g
    f), for the share f.

    So every batch has its share (up to one image), and of both kinds each has an order of its own
    (EDM2's).
    """

    def __init__(self, num_real: int, num_generated: int, share: float, seed: int = 0):
        self.num_real = num_real
        self.share = share
        self._real = EpochShuffle(num_real, seed)
        self._generated = EpochShuffle(num_generated, tuple_seed(seed, 1))

    def indices(self, positions) -> np.ndarray:
        """Indices into the mixture (int64) at the positions (int64 >= 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        # Generated ones before each position, and before the next one.
        before, after = (np.floor((positions + step) * self.share + 1e-9).astype(np.int64)
                         for step in (0, 1))
        return np.where(after > before,
                        self.num_real + self._generated.indices(before),
                        self._real.indices(positions - before))
