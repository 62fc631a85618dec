"""Images to be measured, read ahead in threads.

They come as a data set with `images(indices)`, or `pictures` of any size, `label_ids`,
`has_labels`, `classes`, `class_indices(text)` and a length, as `open_images` of
training.data.images opens them.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import map_ahead, subset
from torch_utils import distributed


def select(images, num: int | None = None, seed: int = 0, class_name=None) -> np.ndarray:
    """Indices (int64, sorted) of the images of a class or of several, as `class_indices` has them
    (None: of all), a random `num` of them.

    The choice is that of `ImageDataset(max_size=num, seed=seed)`.
    """
    indices = np.arange(len(images))
    if class_name is not None:
        indices = np.flatnonzero(np.isin(images.label_ids, images.class_indices(class_name)))
        if not len(indices):
            raise UserError(f'class {class_name!r}: {images.path} has no image of it')
    if num is not None and num < 1:
        raise UserError(f'{num} images are too few to measure')
    return indices if num is None else indices[subset(len(indices), num, seed)]


def class_ids(labels, classes: list | None) -> np.ndarray:
    """The original class index (int64) of each label.

    That is what labels of differently numbered data sets have in common.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if classes and all(isinstance(number, int) for number in classes):
        return np.array(classes, dtype=np.int64)[labels]
    return labels


def read_batches(images, indices, batch: int = 64, workers: int = 2) -> Iterator[tuple]:
    """This process's share of the batches of images[indices], as tensors.

    Yields (indices int64 [n], images uint8 [n, C, H, W], class ids int64 [n] or None), of pictures
    of several sizes those of each size. `workers` threads read ahead; 0 reads when asked.
    """
    def read(start):
        part = indices[start:start + batch]
        ids = None
        if images.has_labels:
            ids = torch.from_numpy(class_ids(images.label_ids[part], images.classes))
        return [(torch.from_numpy(part[rows]), torch.from_numpy(stack),
                 ids if ids is None else ids[rows]) for rows, stack in _by_size(images, part)]

    starts = range(0, len(indices), batch)[distributed.get_rank()::distributed.get_world_size()]
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix='images') as pool:
        for batches in map_ahead(pool, read, starts, workers):
            yield from batches


def _by_size(images, part):
    """(places in `part`, images [n,C,H,W]) of each size."""
    if not images.any_size:
        return [(slice(None), images.images(part))]
    sizes = {}
    for row, picture in enumerate(images.pictures(part)):
        sizes.setdefault(picture.shape, []).append((row, picture))
    return [(list(rows), np.stack(stack))
            for rows, stack in (zip(*found, strict=True) for found in sizes.values())]
