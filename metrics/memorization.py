"""Memorization: is a generated image much nearer to one training image than to any other? (arXiv 2310.02664, Eq. 4)

The distance of two images is the root mean square difference of their pixel values 0..255. Neighbours are exact:
pixels are whole numbers, and sums of their products are computed without rounding.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dnnlib import UserError, pictures
from torch_utils import distributed

GROUP = 64               # columns of which only the smallest is looked at first
MAX_DIM_INT32 = 1 << 15  # longest vectors whose scores fit into int32: 128^2 * 2^15 * 3 < 2^31
MAX_DIM_FLOAT = 1 << 10  # longest vectors whose products are exact in float32: 128^2 * 2^10 = 2^24


@dataclasses.dataclass
class Memorization:
    """Nearest and second nearest training image of each generated one.

    distances  float64 [N, 2], root mean square difference of pixel values 0..255
    indices    int64 [N, 2], positions in the training set
    memorized  bool [N]: d1 / d2 < 1/3; False where both are 0 (the training set holds the image twice)
    """

    distances: np.ndarray
    indices: np.ndarray

    @property
    def memorized(self) -> np.ndarray:
        d1, d2 = self.distances.T
        return np.divide(d1, d2, out=np.ones_like(d1), where=d2 > 0) < 1 / 3

    @property
    def ratio(self) -> float:
        """Fraction of memorized images."""
        return float(self.memorized.mean())

    @property
    def mean_distance(self) -> float:
        """Mean distance to the nearest training image."""
        return float(self.distances[:, 0].mean())


def memorization(generated, training, device='cpu', block: int = 8192, progress: bool = False) -> Memorization:
    """Compares `generated` (uint8 [N,C,H,W]) with `training`: uint8 [M,C,H,W], or a data set with `images(indices)`.

    Raises ValueError if the shapes do not fit or there are fewer than two training images.
    """
    blocks = image_blocks(training, block, progress)
    distances, indices = nearest_neighbors(generated, blocks, k=2, device=device)
    return Memorization(distances, indices)


def image_blocks(images, block: int = 8192, progress: bool = False) -> Iterator:
    """An array or data set of images, `block` at a time."""
    load = images.images if hasattr(images, 'images') else lambda indices: images[indices[0]:indices[-1] + 1]
    for start in tqdm(range(0, len(images), block), desc='training images', unit='block',
                      disable=None if progress else True):
        yield load(np.arange(start, min(start + block, len(images))))


def nearest_neighbors(queries, blocks: Iterable, k: int = 2, device='cpu', query_block: int = 1024):
    """The `k` nearest images in `blocks`, arrays of images in order, for each of `queries`; all uint8 of one shape.

    Returns (distances float64 [N,k], indices int64 [N,k]), the nearest first. Both are exact: a copy has distance 0.
    Memory: the queries and one block as int8, and `query_block` times the block's length as int32.
    Raises ValueError for other types, for shapes that differ, and for fewer than k images.
    """
    queries = _vectors(queries, device)
    norms = _squared_norms(queries)
    best = torch.empty([len(queries), 0], dtype=torch.int64, device=device)
    found, offset = best, 0
    for images in blocks:
        vectors = _vectors(images, device)
        if vectors.shape[1] != queries.shape[1]:
            raise ValueError(f'images of {vectors.shape[1]} values compared with images of {queries.shape[1]}')
        vectors, limits = _padded(vectors, k)
        parts = [_block_neighbors(part, vectors, limits, k) for part in queries.split(query_block)]
        scores, indices = (torch.cat(values) for values in zip(*parts, strict=True))
        scores, indices = torch.cat([best, scores], dim=1), torch.cat([found, indices + offset], dim=1)
        best, order = scores.topk(min(k, scores.shape[1]), dim=1, largest=False)
        found = indices.gather(1, order)
        offset += len(images)
    if offset < k:
        raise ValueError(f'{k} nearest neighbours asked for among {offset} images')
    squared = (best + norms[:, None]).to(torch.float64)
    return (squared / queries.shape[1]).sqrt().cpu().numpy(), found.cpu().numpy()


def _vectors(images, device) -> torch.Tensor:
    """uint8 [N, ...] as int8 [N, D], shifted by 128, which leaves distances as they are."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise ValueError(f'images must be uint8, not {images.dtype}')
    return (images.to(device).flatten(1) ^ 128).view(torch.int8)


def _squared_norms(x) -> torch.Tensor:
    """Sum of squares of each row of int8 [N, D], int64."""
    if x.device.type == 'cpu':  # einsum widens a few values at a time, not the whole array
        x = x.numpy()
        narrow = x.shape[1] <= MAX_DIM_INT32
        return torch.from_numpy(np.einsum('nd,nd->n', x, x, dtype=np.int32 if narrow else np.int64)).to(torch.int64)
    return torch.cat([part.to(torch.int32).square().sum(dim=1) for part in x.split(1024)])


def _padded(vectors, k):
    """Rows of zeros up to a multiple of the group size (at least k groups), and squared norms that rule them out."""
    missing = max(-(-len(vectors) // GROUP), k) * GROUP - len(vectors)
    norms = F.pad(_squared_norms(vectors), [0, missing], value=torch.iinfo(torch.int32).max)
    return F.pad(vectors, [0, 0, 0, missing]) if missing else vectors, norms


def _block_neighbors(queries, vectors, norms, k):
    """Scores |b|^2 - 2ab (int64) and positions of the k nearest of `vectors`, a multiple of GROUP, for each query."""
    n, groups = len(queries), len(vectors) // GROUP
    scores = _scores(queries, vectors, norms).reshape(n, GROUP, groups)
    # The k smallest of all are among the k groups (columns with equal remainder) with the smallest minima.
    group = scores.amin(dim=1).topk(k, dim=1, largest=False).indices
    candidates = scores.gather(2, group[:, None].expand(n, GROUP, k)).flatten(1)
    values, position = candidates.topk(k, dim=1, largest=False)
    return values.to(torch.int64), position // k * groups + group.gather(1, position % k)


def _scores(a, b, norms):
    """|b|^2 - 2ab without rounding: int32 [N, M] for vectors short enough, else int64."""
    if a.shape[1] <= MAX_DIM_INT32:
        products = _products(a, b)
        return torch.sub(norms.to(torch.int32), products, alpha=2, out=products)
    scores = norms.to(torch.int64).expand(len(a), -1)
    for x, y in zip(a.split(MAX_DIM_INT32, dim=1), b.split(MAX_DIM_INT32, dim=1), strict=True):
        scores = scores.sub(_products(x, y), alpha=2)
    return scores


def _products(a, b):
    """a b^T of int8 matrices as int32."""
    if a.device.type == 'cuda' or (a.device.type == 'cpu' and torch.backends.mkldnn.is_available()):
        n, rows, columns = len(a), max(17 - len(a), 0), -a.shape[1] % 8
        if rows or columns:  # cuBLAS takes more than 16 rows and multiples of 8
            a, b = F.pad(a, [0, columns, 0, rows]), F.pad(b, [0, columns])
        return torch._int_mm(a, b.t())[:n]
    return sum((x.float() @ y.float().t()).to(torch.int32)
               for x, y in zip(a.split(MAX_DIM_FLOAT, dim=1), b.split(MAX_DIM_FLOAT, dim=1), strict=True))


# --- Over all processes, and pictures of the copies ----------------------------------------------


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
