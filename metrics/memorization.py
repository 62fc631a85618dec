"""Memorization: is a generated image much nearer to one training image than to any other?

Eq. 4 of arXiv 2310.02664. The distance of two images is the root mean square difference of their
pixel values 0..255.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from tqdm import tqdm

from dnnlib import UserError, pictures
from metrics import neighbors
from torch_utils import distributed


@dataclasses.dataclass
class Copies:
    """The two nearest training images of generated ones, the same on every process.

    ids        int64 [N], seeds or positions of the generated images, sorted
    distances  float64 [N, 2], the nearer first
    indices    int64 [N, 2], positions in the training set
    closest    places in `ids` of the images with the smallest d1 / d2, the most memorized first
    images     uint8 [len(closest), C, H, W], those images
    """

    ids: np.ndarray
    distances: np.ndarray
    indices: np.ndarray
    closest: np.ndarray
    images: np.ndarray

    @property
    def memorized(self) -> np.ndarray:
        """bool [N]: d1 / d2 < 1/3; False where both are 0, twice in the training set."""
        return _relative(self.distances) < 1 / 3

    def results(self) -> dict:
        """Fraction of memorized images, and their mean distance to the training set."""
        return {'memorization_ratio': float(self.memorized.mean()),
                'mean_distance': float(self.distances[:, 0].mean()), 'num_images': len(self.ids)}

    def table(self) -> dict:
        """Lists of all images: id, distances and indices, memorized or not."""
        return {'ids': self.ids.tolist(), 'distances': np.round(self.distances, 6).tolist(),
                'indices': self.indices.tolist(), 'memorized': self.memorized.tolist()}

    def save_picture(self, path: str, training, columns: int = 12):
        """The most memorized images in rows, each above its nearest training image."""
        nearest = training.images(self.indices[self.closest, 0])
        rows = []
        names = []
        for start in range(0, len(nearest), columns):
            for kind, images in (('generated', self.images), ('training', nearest)):
                row = images[start:start + columns]
                padding = [(0, columns - len(row)), (0, 0), (0, 0), (0, 0)]
                rows.append(np.pad(row, padding, constant_values=255))
                names.append(kind)
        pictures.save_image_grid(path, np.concatenate(rows), columns, names)


def _relative(distances) -> np.ndarray:
    """d1 / d2 [N], infinite where d2 = 0."""
    d1, d2 = distances.T
    return np.divide(d1, d2, out=np.full_like(d1, np.inf), where=d2 > 0)


def _closest(distances, keep: int) -> np.ndarray:
    """Positions of the smallest d1 / d2, in order."""
    return np.argsort(_relative(distances), kind='stable')[:keep]


def find_copies(batches: Iterable, training, device=None, keep: int = 48,
                progress: bool = False) -> Copies:
    """Compares all images of `batches` with all of `training`, a data set.

    batches   pairs (ids, images uint8 [n,C,H,W]); under several processes each has its share
    keep      how many of the most memorized images to keep

    Raises UserError for images of another shape than the training images, and for fewer than two
    of those.
    """
    device = distributed.get_device() if device is None else device
    if len(training) < 2:
        raise UserError(f'{training.path} has one image; memorization needs the nearest two')
    shape = training.images(np.arange(1)).shape[1:]
    ids = [np.zeros(0, dtype=np.int64)]
    images = [torch.zeros(0, *shape, dtype=torch.uint8)]
    for part, values in batches:
        if tuple(values.shape[1:]) != shape:
            raise UserError(f'{training.path} has images of shape {list(shape)}, the generated '
                            f'ones have {list(values.shape[1:])}; give the training set')
        ids.append(np.asarray(part, dtype=np.int64))
        images.append(torch.as_tensor(values).cpu())
    ids = np.concatenate(ids)
    images = torch.cat(images)
    distances = np.zeros([0, 2])
    indices = np.zeros([0, 2], dtype=np.int64)
    if len(ids):
        blocks = image_blocks(training, progress=progress and distributed.get_rank() == 0)
        distances, indices = nearest_neighbors(images, blocks, k=2, device=device)
    kept = {int(ids[i]): images[i].numpy() for i in _closest(distances, keep)}
    *columns, kept = zip(*distributed.gather_objects((ids, distances, indices, kept)), strict=True)
    ids, distances, indices = map(np.concatenate, columns)
    order = np.argsort(ids, kind='stable')
    closest = _closest(distances[order], keep)
    kept = {key: image for part in kept for key, image in part.items()}
    return Copies(ids[order], distances[order], indices[order], closest,
                  np.stack([kept[int(i)] for i in ids[order][closest]]))


def image_blocks(images, block: int = 8192, progress: bool = False) -> Iterator:
    """An array or data set of images, `block` at a time."""
    load = images.images if hasattr(images, 'images') else images.__getitem__
    for start in tqdm(range(0, len(images), block), desc='training images', unit='block',
                      disable=None if progress else True):
        yield load(np.arange(start, min(start + block, len(images))))


def nearest_neighbors(queries, blocks: Iterable, k: int = 2, device='cpu'):
    """The `k` nearest images in `blocks`, arrays of images in order, for each of `queries`.

    All are uint8 of one shape. Returns (distances float64 [N,k], indices int64 [N,k]), the nearest
    first. Both are exact: a copy has distance 0. Memory: the queries and one block.
    Raises ValueError for other types, for shapes that differ, and for fewer than k images.
    """
    queries = _vectors(queries, device)
    squares = torch.empty([len(queries), 0], dtype=torch.float64, device=device)
    indices = torch.empty([len(queries), 0], dtype=torch.int64, device=device)
    offset = 0
    for images in blocks:
        points = _vectors(images, device)
        if points.shape[1] != queries.shape[1]:
            raise ValueError(f'images of {points.shape[1]} values compared with images of '
                             f'{queries.shape[1]}')
        values, places = neighbors.nearest(queries, points, min(k, len(points)))
        squares = torch.cat([squares, values], dim=1)
        squares, order = squares.topk(min(k, squares.shape[1]), dim=1, largest=False)
        indices = torch.cat([indices, places + offset], dim=1).gather(1, order)
        offset += len(points)
    if offset < k:
        raise ValueError(f'{k} nearest neighbours asked for among {offset} images')
    return (squares / queries.shape[1]).sqrt().cpu().numpy(), indices.cpu().numpy()


def _vectors(images, device) -> torch.Tensor:
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise ValueError(f'images must be uint8, not {images.dtype}')
    return images.to(device).flatten(1)
