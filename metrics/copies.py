"""Memorization of many images against a training set, over all processes, and pictures of the copies."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from dnnlib import UserError, pictures
from metrics.memorization import Memorization, image_blocks, nearest_neighbors
from torch_utils import distributed


@dataclasses.dataclass
class Copies:
    """What `find_copies` found, the same on every process.

    ids      int64 [N], seeds or positions of the generated images, sorted
    found    their neighbours in the training set, in the same order
    closest  indices into `ids` of the images with the smallest d1 / d2, the most memorized first
    images   uint8 [len(closest), C, H, W], those images
    """

    ids: np.ndarray
    found: Memorization
    closest: np.ndarray
    images: np.ndarray

    def results(self) -> dict:
        """{'memorization_ratio', 'mean_distance', 'num_images'}."""
        return {'memorization_ratio': self.found.ratio, 'mean_distance': self.found.mean_distance,
                'num_images': len(self.ids)}

    def table(self) -> dict:
        """Lists of all images: id, distances and indices of the two nearest training images, memorized or not."""
        return {'ids': self.ids.tolist(), 'distances': np.round(self.found.distances, 6).tolist(),
                'indices': self.found.indices.tolist(), 'memorized': self.found.memorized.tolist()}

    def save_picture(self, path: str, training, columns: int = 12):
        """The most memorized images in rows, each above its nearest training image."""
        nearest = training.images(self.found.indices[self.closest, 0])
        rows, names = [], []
        for start in range(0, len(self.closest), columns):
            for kind, images in (('generated', self.images), ('training', nearest)):
                row = images[start:start + columns]
                rows.append(np.pad(row, [(0, columns - len(row)), (0, 0), (0, 0), (0, 0)], constant_values=255))
                names.append(kind)
        pictures.save_image_grid(path, np.concatenate(rows), columns, names)


def find_copies(batches: Iterable, training, device=None, keep: int = 48, progress: bool = False) -> Copies:
    """Compares all images of `batches` with all of `training`, a data set with `images(indices)`.

    batches   pairs (ids, images uint8 [n,C,H,W]); under several processes each has its share
    keep      how many of the most memorized images to keep

    Raises UserError for images of another shape than the training images and for fewer than two of those.
    """
    device = distributed.get_device() if device is None else device
    if len(training) < 2:
        raise UserError(f'--data={training.path} has one image; memorization needs the nearest two')
    shape = training.images(np.arange(1)).shape[1:]
    ids, images = [], []
    for part, values in batches:
        if tuple(values.shape[1:]) != shape:
            raise UserError(f'--data={training.path} has images of shape {list(shape)}, the generated ones have '
                            f'{list(values.shape[1:])}; give the training set')
        ids.append(np.asarray(part, dtype=np.int64))
        images.append(torch.as_tensor(values).cpu())
    ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
    images = torch.cat(images) if images else torch.zeros(0, *shape, dtype=torch.uint8)
    distances, indices = np.zeros([0, 2]), np.zeros([0, 2], dtype=np.int64)
    if len(ids):
        progress = progress and distributed.get_rank() == 0
        distances, indices = nearest_neighbors(images, image_blocks(training, progress=progress), k=2, device=device)
    mine = _closest(distances)[:keep]
    parts = distributed.gather_objects((ids, distances, indices, ids[mine], images[mine].numpy()))
    ids, distances, indices, kept, images = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.argsort(ids, kind='stable')
    found = Memorization(distances[order], indices[order])
    closest = _closest(found.distances)[:keep]
    place = {int(i): n for n, i in enumerate(kept)}
    return Copies(ids[order], found, closest, images[[place[int(i)] for i in ids[order][closest]]])


def _closest(distances) -> np.ndarray:
    """Positions in order of d1 / d2, those with d2 = 0 last."""
    d1, d2 = distances.T
    return np.argsort(np.divide(d1, d2, out=np.full_like(d1, np.inf), where=d2 > 0), kind='stable')
