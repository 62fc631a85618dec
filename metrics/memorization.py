"""Memorization: is a generated image much nearer to one training image than to any other?

Eq. 4 of arXiv 2310.02664. The distance of two images is the root mean square difference of their
pixel values 0..255.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from dnnlib import UserError, pictures, progress
from metrics import neighbors
from metrics.shares import Share
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
    closest: np.ndarray | None = None
    images: np.ndarray | None = None

    @property
    def relative(self) -> np.ndarray:
        """d1 / d2 [N], infinite where d2 = 0: then the image is twice in the training set."""
        d1, d2 = self.distances.T
        return np.divide(d1, d2, out=np.full_like(d1, np.inf), where=d2 > 0)

    @property
    def memorized(self) -> np.ndarray:
        """bool [N]: d1 / d2 < 1/3."""
        return self.relative < 1 / 3

    def results(self) -> dict:
        """Fraction of memorized images, and their mean distance to the training set."""
        return {'memorization_ratio': Share(self.memorized.mean(), len(self.ids)),
                'mean_distance': float(self.distances[:, 0].mean()), 'num_images': len(self.ids)}

    def table(self) -> dict:
        """Lists of all images: id, distances and indices, memorized or not."""
        return {'ids': self.ids.tolist(), 'distances': np.round(self.distances, 6).tolist(),
                'indices': self.indices.tolist(), 'memorized': self.memorized.tolist()}

    def save_picture(self, path: str, training, columns: int = 12):
        """The most memorized images in rows, each above its nearest training image."""
        pairs = np.stack([self.images, training.images(self.indices[self.closest, 0])])
        padding = [(0, 0), (0, -len(self.closest) % columns), (0, 0), (0, 0), (0, 0)]
        pairs = np.pad(pairs, padding, constant_values=255)
        shape = pairs.shape[2:]
        rows = pairs.reshape(2, -1, columns, *shape).swapaxes(0, 1)
        pictures.save_image_grid(path, rows.reshape(-1, *shape), columns,
                                 ['generated', 'training'] * len(rows))


def find_copies(batches: Iterable, training, keep: int = 48) -> Copies:
    """Compares all images of `batches` with all of `training`, a data set of pixels.

    batches   (ids, images uint8 [n,C,H,W], ...); under several processes each has its share
    keep      how many of the most memorized images to keep

    Raises UserError for images of another shape than the training images, and for fewer than two
    of those.
    """
    if len(training) < 2:
        raise UserError(f'{training.path} has one image; memorization needs the nearest two')
    shape = training.image_shape
    ids = []
    images = [torch.zeros(0, *shape, dtype=torch.uint8)]
    for part, values, *_ in batches:
        if tuple(values.shape[1:]) != shape:
            raise UserError(f'{training.path} has images of shape {list(shape)}, the generated '
                            f'ones have {list(values.shape[1:])}; give the training set')
        ids.extend(map(int, part))
        images.append(torch.as_tensor(values).cpu())
    images = torch.cat(images)
    found = nearest_neighbors(images, read_blocks(training), device=distributed.get_device())
    columns = zip(*distributed.gather_objects((np.array(ids, np.int64), *found)), strict=True)
    all_ids, distances, indices = map(np.concatenate, columns)
    order = np.argsort(all_ids, kind='stable')
    copies = Copies(all_ids[order], distances[order], indices[order])
    copies.closest = np.argsort(copies.relative, kind='stable')[:keep]
    closest = copies.ids[copies.closest].tolist()
    kept = {key: image.numpy() for key, image in zip(ids, images, strict=True) if key in closest}
    kept = collections.ChainMap(*distributed.gather_objects(kept))
    copies.images = np.stack([kept[key] for key in closest])
    return copies


def read_blocks(images, block: int = 8192) -> Iterator[np.ndarray]:
    """The images of a data set, `block` at a time."""
    for start in progress.bar(range(0, len(images), block), distributed.get_rank() == 0,
                              desc='training images', unit='block'):
        yield images.images(np.arange(start, min(start + block, len(images))))


def nearest_neighbors(queries, blocks: Iterable, k: int = 2, device='cpu'):
    """The `k` nearest images in `blocks`, arrays of images in order, for each of `queries`.

    All are uint8 of one shape, and k or more. Returns (distances float64 [N,k], indices int64
    [N,k]), the nearest first. Both are exact: a copy has distance 0. Memory: the queries and one
    block.
    """
    queries = torch.as_tensor(queries).to(device).flatten(1)
    squares = torch.full([len(queries), k], torch.inf, dtype=torch.float64, device=device)
    indices = torch.zeros_like(squares, dtype=torch.int64)
    offset = 0
    for images in blocks:
        points = torch.as_tensor(images).to(device).flatten(1)
        values, places = neighbors.nearest_pixels(queries, points, min(k, len(points)))
        squares, indices = neighbors.merge(squares, indices, values, places + offset)
        offset += len(points)
    return (squares / queries.shape[1]).sqrt().cpu().numpy(), indices.cpu().numpy()
