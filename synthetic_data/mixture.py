"""Real and generated images in one training set, in a fixed proportion."""

import functools
import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np

from dnnlib import UserError
from synthetic_data.class_files import ClassFile, open_classes
from torch_utils.random import tuple_seed
from training.data.dataset import Dataset
from training.data.images import NpzImages
from training.data.sampler import EpochShuffle


class _Parts(Dataset):
    """The images of several readers, one after the other: functions (indices) -> uint8
    [n,C,H,W]."""

    def __init__(self, path, image_shape, labels, label_dim, counts: Sequence[int],
                 readers: list[Callable]):
        super().__init__(path, image_shape, labels=labels, label_dim=label_dim)
        self._bounds = np.cumsum([0, *counts])
        self._readers = readers

    def __len__(self):
        return len(self.stored_labels)

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W] at `indices` (int [n], any order)."""
        indices = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(indices), *self.image_shape), np.uint8)
        parts = np.searchsorted(self._bounds, indices, side='right') - 1
        for part in np.unique(parts):
            mask = parts == part
            out[mask] = self._readers[part](indices[mask] - self._bounds[part])
        return out


class GeneratedImages(_Parts):
    """Generated images with labels: folders of class files (`class_files`), or an .npz with
    `image` and `label`.

    They stay on the disk, but for a compressed .npz. Those of several folders are joined, class by
    class. Raises UserError that names the file for others, and for labels outside of 0 ..
    class_num - 1.
    """

    def __init__(self, path: str | Sequence[str], class_num: int):
        folders = [path] if isinstance(path, str) else list(path)
        path = folders[0]
        if len(folders) == 1 and not os.path.isdir(path):
            npz = NpzImages(path, 'image', 'label')
            if not npz.has_labels:
                raise UserError(f'{path}: no .npz file with the array label')
            labels = npz.label_ids
            if labels.min() < 0 or labels.max() >= class_num:
                raise UserError(f'{path} has labels from {labels.min()} to {labels.max()}, but '
                                f'the number of classes is {class_num}')
            super().__init__(path, npz.image_shape, labels, class_num, [len(npz)], [npz.images])
        else:
            classes = open_classes(folders, class_num)
            labels = np.repeat(np.arange(class_num), [sum(map(len, files)) for files in classes])
            files = list(itertools.chain(*classes))
            height, width, channels = files[0].shape[1:]
            super().__init__(path, (channels, height, width), labels, class_num,
                             list(map(len, files)),
                             [functools.partial(_read, file) for file in files])


def _read(file: ClassFile, indices):
    # Mapped for this moment only: mapped pages count as memory of the process.
    return file.map()[indices].transpose(0, 3, 1, 2)


class Mixture(_Parts):
    """A labelled data set, and generated images after it. Raises UserError if the shapes
    differ."""

    def __init__(self, real: Dataset, generated: GeneratedImages):
        if real.image_shape != generated.image_shape:
            raise UserError(f'{generated.path} has images of {list(generated.image_shape)}, but '
                            f'those of {real.path} are {list(real.image_shape)}')
        labels = np.concatenate([real.label_ids, generated.label_ids])
        super().__init__(real.path, real.image_shape, labels, real.label_dim,
                         [len(real), len(generated)], [real.images, generated.images])
        self.real = real

    def description(self) -> dict:
        return self.real.description() | {'size': len(self)}


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
        # Generated ones before each position.
        before = np.floor(positions * self.share + 1e-9).astype(np.int64)
        generated = np.floor((positions + 1) * self.share + 1e-9).astype(np.int64) > before
        out = np.empty_like(positions)
        out[generated] = self.num_real + self._generated.indices(before[generated])
        out[~generated] = self._real.indices((positions - before)[~generated])
        return out
