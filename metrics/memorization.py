"""Memorization: is a generated image much nearer to one training image than to any other?

Eq. 4 of arXiv 2310.02664, in pixels or in features of a detector. The distance of two images is
the root mean square difference of their pixel values 0..255, or the distance of their features.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from dnnlib import UserError, pictures, progress
from metrics import neighbors
from metrics.features import Detectors, measure_images
from metrics.shares import interval_of, share_of
from metrics.statistics import SPACES, USUAL
from torch_utils import distributed


@dataclasses.dataclass
class Copies:
    """The nearest training images of generated ones, the same on every process.

    ids        int64 [N], seeds or positions of the generated images, sorted
    distances  float64 [N, k], the nearest first
    indices    int64 [N, k], positions in the training set
    closest    places in `ids` of the images with the smallest d1 / d2, the most memorized first
    images     uint8 [len(closest), C, H, W], those images
    limit      a distance below which an image counts as near, or None
    """

    ids: np.ndarray
    distances: np.ndarray
    indices: np.ndarray
    closest: np.ndarray | None = None
    images: np.ndarray | None = None
    limit: float | None = None

    @property
    def relative(self) -> np.ndarray:
        """d1 / mean(d2..dk) [N], infinite where that is 0: then the image is twice in the training
        set.
        """
        d1 = self.distances[:, 0]
        others = self.distances[:, 1:].mean(axis=1)
        return np.divide(d1, others, out=np.full_like(d1, np.inf), where=others > 0)

    @property
    def memorized(self) -> np.ndarray:
        """bool [N]: d1 / d2 < 1/3, or as much less than the mean of more of them."""
        return self.relative < 1 / 3

    def results(self) -> dict:
        """Fraction of memorized images, and their mean distance to the training set."""
        results = {'memorization_ratio': share_of(self.memorized),
                   'num_memorized': int(self.memorized.sum()),
                   'mean_distance': float(self.distances[:, 0].mean()),
                   'num_images': len(self.ids)}
        if self.limit is not None:
            results['near_ratio'] = share_of(self.distances[:, 0] < self.limit)
        return results

    def table(self) -> dict:
        """Lists of all images: id, distances and indices, memorized or not."""
        return {'ids': self.ids.tolist(), 'distances': np.round(self.distances, 6).tolist(),
                'indices': self.indices.tolist(), 'memorized': self.memorized.tolist()}

    def save_picture(self, path: str, training, columns: int = 12):
        """The most memorized images in rows, each above its nearest training image. Memorized ones
        are framed; below each is its d1 / d2, and below the training image its distance.
        """
        shown = self.closest
        pairs = np.stack([self.images, training.images(self.indices[shown, 0])])
        texts = np.array([[f'{value:.2f}' for value in self.relative[shown]],
                          [f'{value:.3g}' for value in self.distances[shown, 0]]])
        marks = np.stack([self.memorized[shown]] * 2)
        pairs, texts, marks = (_in_rows(*values, columns) for values in (
            (pairs, 255), (texts, ''), (marks, False)))
        share = self.results()['memorization_ratio']
        pictures.save_image_grid(
            path, pairs, columns, ['generated', 'training'] * (len(pairs) // columns // 2),
            title=f'{self.memorized.sum()} of {len(self.ids)} memorized{interval_of(share)}; '
                  'd1/d2 below generated images (memorized: framed), distances below training '
                  'images',
            captions=texts.tolist(), marked=np.flatnonzero(marks).tolist())


def _in_rows(pairs, blank, columns: int):
    """[2, N, ...] -> [2 M, ...]: rows of the first beside those of the second, short ones filled.
    """
    more = [(0, 0)] * pairs.ndim
    more[1] = (0, -pairs.shape[1] % columns)
    rows = np.pad(pairs, more, constant_values=blank).reshape(2, -1, columns, *pairs.shape[2:])
    return rows.swapaxes(0, 1).reshape(-1, *pairs.shape[2:])


class PixelSearch:
    """Finds the `k` nearest training images by their pixels.

    With `shift`, copies that are moved by up to so many pixels are found: the middle of an image
    is compared with all places of that size in the training images, of which each counts once.
    Raises UserError for fewer than k training images, and a shift that leaves nothing.
    """

    def __init__(self, training, k: int = 2, shift: int = 0):
        check_count(training, k)
        if min(training.image_shape[1:]) <= 2 * shift:
            raise UserError(f'leaves nothing of images of {list(training.image_shape)}', 'shifts',
                            shift)
        self.training = training
        self.k = k
        self.shift = shift

    def __call__(self, images):
        """Distances float64 [N, k] and indices int64 [N, k] of images uint8 [N, C, H, W]."""
        return nearest_neighbors(images, read_blocks(self.training), self.k,
                                 distributed.get_device(), self.shift)


class FeatureSearch:
    """Finds the `k` nearest training images in a space of features, which are computed once."""

    def __init__(self, training, detectors, space: str, k: int = 2):
        check_count(training, k)
        self.training = training
        self.detectors = detectors
        self.space = space
        self.k = k

    @functools.cached_property
    def features(self):
        """Of the training images [M, D]."""
        statistics = measure_images(self.training, self.detectors, features=[self.space])
        return statistics.features[self.space].to(self.detectors.device)

    def __call__(self, images):
        """As of `PixelSearch`."""
        name, output = SPACES[self.space]
        training = self.features                               # by all processes together
        if not len(images):
            return np.zeros([0, self.k]), np.zeros([0, self.k], np.int64)
        features = [self.detectors[name](part, (output,))[output] for part in images.split(64)]
        squares, indices = neighbors.nearest(torch.cat(features), training, self.k)
        return squares.sqrt().cpu().numpy(), indices.cpu().numpy()


def open_search(training, space: str = 'pixels', neighbors: int = 2, shifts: int = 0,
                open_network=None, **files):
    """The search of the options in `dnnlib.options.closeness`."""
    if space == 'pixels':
        return PixelSearch(training, neighbors, shifts)
    if shifts:
        raise UserError('is for pixels: other spaces hardly see it', 'shifts', shifts)
    detectors = Detectors.of(open_network=open_network, **files)
    return FeatureSearch(training, detectors, USUAL[space], neighbors)


def check_count(training, k: int):
    """Raises UserError for fewer than k training images."""
    if len(training) < k:
        count = f'{len(training)} images' if len(training) > 1 else 'one image'
        raise UserError(f'{training.path} has {count}; memorization needs the nearest {k}')


def find_copies(batches: Iterable, training, keep: int = 48, search=None,
                limit: float | None = None) -> Copies:
    """Compares all images of `batches` with all of `training`, a data set of pixels.

    batches   (ids, images uint8 [n,C,H,W], ...); under several processes each has its share
    keep      how many of the most memorized images to keep
    search    a `PixelSearch` (the default) or `FeatureSearch` of the training images
    limit     see `Copies`

    Raises UserError for images of another shape than the training images, and for fewer than two
    of those.
    """
    search = search or PixelSearch(training)
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
    found = search(images)
    columns = zip(*distributed.gather_objects((np.array(ids, np.int64), *found)), strict=True)
    all_ids, distances, indices = map(np.concatenate, columns)
    order = np.argsort(all_ids, kind='stable')
    copies = Copies(all_ids[order], distances[order], indices[order], limit=limit)
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


def nearest_neighbors(queries, blocks: Iterable, k: int = 2, device='cpu', shift: int = 0):
    """The `k` nearest images in `blocks`, arrays of images in order, for each of `queries`.

    All are uint8 of one shape, and k or more. Returns (distances float64 [N,k], indices int64
    [N,k]), the nearest first. Both are exact: a copy has distance 0. Memory: the queries and one
    block. `shift`: see `PixelSearch`.
    """
    queries = torch.as_tensor(queries).to(device)
    height, width = (side - 2 * shift for side in queries.shape[2:])
    queries = queries[..., shift:shift + height, shift:shift + width].flatten(1)
    squares = torch.full([len(queries), k], torch.inf, dtype=torch.float64, device=device)
    indices = torch.full_like(squares, -1, dtype=torch.int64)
    offset = 0
    for images in blocks:
        images = torch.as_tensor(images).to(device)
        for y, x in itertools.product(range(2 * shift + 1), repeat=2):
            points = images[..., y:y + height, x:x + width].flatten(1)
            values, places = neighbors.nearest_pixels(queries, points, min(k, len(points)))
            if shift:
                values, places = _without_known(values, places, squares, indices, offset)
            squares, indices = neighbors.merge(squares, indices, values, places + offset)
        offset += len(images)
    return (squares / queries.shape[1]).sqrt().cpu().numpy(), indices.cpu().numpy()


def _without_known(values, places, squares, indices, offset: int):
    """`values` and `places` [N, n] but for those images among `indices` [N, k] that are as near
    there; those that are nearer here are taken from there, by setting `squares` infinite.
    """
    same = (places + offset)[:, :, None] == indices[:, None, :]
    nearer = values[:, :, None] < squares[:, None, :]
    squares.masked_fill_((same & nearer).any(dim=1), torch.inf)
    return values.masked_fill((same & ~nearer).any(dim=2), torch.inf), places
