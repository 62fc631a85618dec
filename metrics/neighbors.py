"""Exact nearest neighbours by blocked matrix products, in bounded memory.

|u - v|^2 = |u|^2 + |v|^2 - 2 u.v is fast in single precision, but wrong by up to about
D eps (|u|^2 + |v|^2), and with TF32 by far more, so that is off. So products only select;
distances that count are computed as sum (u - v)^2 in double precision, and whatever the error
bound leaves open is settled that way too. Products of pixels are whole numbers without rounding,
several times as fast. Results depend on no block size and on no device.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from dnnlib import UserError, progress
from torch_utils import distributed

ROWS = 2048        # points of one side of a block of distances: 16 MiB
NUMBERS = 2**20    # differences computed at a time: 8 MiB
SPARE = 2          # candidates beyond k, so that rounding rarely leaves the choice open
GROUP = 64         # columns of which only the smallest is looked at first
MAX_DIM = 1 << 15  # pixels of an image whose squared distances fit into int32: 255^2 2^15 < 2^31


def check_finite(features: torch.Tensor):
    """Raises UserError for features, or what is made of them, that are not finite."""
    if not torch.isfinite(features).all():
        raise UserError('the features hold NaN or infinite numbers; '
                        'are the weights of the detector damaged?')


@distributed.exact_float32()
def nearest(queries: torch.Tensor, points: torch.Tensor | None = None, k: int = 1):
    """The k nearest of `points` [M, D] for each of `queries` [N, D], on their device.

    Returns squared distances, float64 [N, k], ascending, and indices int64 [N, k]; among equal
    distances any order. `points=None`: the nearest within `queries`, each point among its own, at
    half the cost. Values can be of any type that float32 holds. Raises UserError if there are
    fewer than k points.
    """
    blocks = _Blocks(queries, points, torch.float32)
    if k > len(blocks.points):
        raise UserError(f'the {k} nearest of {len(blocks.points)} points: too few images')
    squares, index, floor = _settled(blocks, k)
    unsure = (squares[:, -1] > floor).nonzero()[:, 0]
    if len(unsure):
        blocks = _Blocks(queries[unsure], blocks.points, torch.float64)
        squares[unsure], index[unsure], _ = _settled(blocks, k)
    return squares, index


def nearest_pixels(queries: torch.Tensor, points: torch.Tensor, k: int):
    """`nearest` of pixels uint8 by products of int8, with as many points as fit into memory."""
    if queries.shape[1] > MAX_DIM or not (queries.is_cuda or torch.backends.mkldnn.is_available()):
        return nearest(queries, points, k)
    # Shifted by 128, which leaves distances as they are.
    queries, points = ((x ^ 128).view(torch.int8) for x in (queries, points))
    norms = _int_norms(points)
    parts = []
    for part in queries.split(ROWS // 2):
        products = _int_products(part, points)
        parts.append(_smallest(torch.sub(norms, products, alpha=2, out=products), k))
    squares, index = map(torch.cat, zip(*parts, strict=True))
    return (squares + _int_norms(queries)[:, None]).double(), index


def _int_norms(x):
    """Sum of squares of each row of int8 [N, D], int32."""
    if x.is_cuda:
        return torch.cat([part.int().square().sum(dim=1) for part in x.split(ROWS)]).int()
    # NumPy widens a few values at a time, not the array.
    return torch.from_numpy(np.einsum('nd,nd->n', x, x, dtype=np.int32))


def _int_products(u, v):
    """u v^T of int8 as int32."""
    if not u.is_cuda:
        return torch._int_mm(u, v.T)
    # cuBLAS takes more than 16 rows, and multiples of 8.
    depth = -u.shape[1] % 8
    return torch._int_mm(F.pad(u, [0, depth, 0, max(17 - len(u), 0)]),
                         F.pad(v, [0, depth, 0, -len(v) % 8]).T)[:len(u), :len(v)]


def _smallest(values, k: int):
    """The k smallest of each row [N, k], ascending, and their places.

    They are among the k groups of columns, those of equal remainder, that have the smallest
    minima; these are found several times as fast.
    """
    if values.shape[1] % GROUP or values.shape[1] < k * GROUP:
        return values.topk(k, largest=False)
    groups = values.unflatten(1, [GROUP, -1])
    group = groups.amin(dim=1).topk(k, largest=False).indices
    candidates = groups.gather(2, group[:, None].expand(-1, GROUP, -1)).flatten(1)
    values, place = candidates.topk(k, largest=False)
    return values, place // k * groups.shape[2] + group.gather(1, place % k)


def merge(best, index, values, places):
    """The smallest of `best` [N, k] and of `values` [N, n], as many as before, and where they are:
    `index` [N, k] and `places` [N, n] say that.
    """
    best, order = torch.cat([best, values], dim=1).topk(best.shape[1], largest=False)
    return best, torch.cat([index, places], dim=1).gather(1, order)


def _settled(blocks: '_Blocks', k: int):
    """The k nearest among those that products select.

    Exact squared distances and indices [N, k]; and squared distances [N] below which, despite the
    rounding, there is no other point.
    """
    keep = min(k + SPARE, len(blocks.points))
    best = blocks.queries.new_full([len(blocks.queries), keep], torch.inf, dtype=torch.float64)
    index = torch.zeros_like(best, dtype=torch.int64)
    for rows, columns, squares in blocks:
        values, place = _smallest(squares, min(keep, squares.shape[1]))
        best[rows], index[rows] = merge(best[rows], index[rows], values, place + columns.start)
    squares, order = _exact(blocks.queries, blocks.points, index).sort(dim=1)
    # A distance of exactly zero needs no certificate: nothing is nearer.
    floor = (best[:, -1] - blocks.margin).clamp_min(0)
    if keep == len(blocks.points):
        floor[:] = torch.inf
    return squares[:, :k].contiguous(), index.gather(1, order[:, :k]), floor


def _exact(queries, points, index):
    """sum (u - v)^2 in float64, [N, n], of queries [N, D] and the points of `index` [N, n]."""
    step = max(NUMBERS // (index.shape[1] * queries.shape[1]), 1)
    parts = [(points[places].double() - part[:, None]).square_().sum(dim=2)
             for part, places in zip(queries.split(step), index.split(step), strict=True)]
    return torch.cat(parts)


def memberships(queries, points, query_squares, point_squares, strict: bool):
    """Which of `queries` [N, D] are in which balls around `points` [M, D], and the reverse.

    Yields (rows, columns, bool [r, c], bool [r, c]) for blocks of queries and points: whether each
    query is in the ball of each point, and each point in that of each query. `query_squares` [N]
    and `point_squares` [M], float64, are the squared radii, None for no balls (and None for what
    is in them). A ball has its boundary unless `strict`.
    """
    blocks = _Blocks(queries, points, torch.float32)
    for rows, columns, squares in blocks:
        u = queries[rows]
        v = points[columns]
        ours = theirs = None
        if point_squares is not None:
            ours = _inside(u, v, squares, point_squares[columns], blocks.margin, strict)
        if query_squares is not None:
            theirs = _inside(v, u, squares.T, query_squares[rows], blocks.margin, strict).T
        yield rows, columns, ours, theirs


def _inside(queries, points, squares, radii, margin: float, strict: bool):
    """bool [N, M], whether a distance squares[i, j], right to within `margin`, is in radii[j]."""
    inside = squares < (radii - margin).float()
    i, j = ((squares <= (radii + margin).float()) & ~inside).nonzero(as_tuple=True)
    for rows, columns in zip(i.split(NUMBERS), j.split(NUMBERS), strict=True):
        exact = _pairs(queries, points, rows, columns)
        limits = radii[columns]
        inside[rows, columns] = exact < limits if strict else exact <= limits
    return inside


def _pairs(queries, points, i, j):
    """sum (u - v)^2 in float64 of the pairs of queries[i] and points[j], [n]."""
    step = max(NUMBERS // queries.shape[1], 1)
    parts = [(queries[rows].double() - points[columns].double()).square_().sum(dim=1)
             for rows, columns in zip(i.split(step), j.split(step), strict=True)]
    return torch.cat(parts)


class _Blocks:
    """Squared distances of `queries` [N, D] and `points` [M, D] (None: the queries), in blocks.

    Computed in `dtype`; `margin` bounds their error: (D + 32) u (|u|^2 + |v|^2), u = eps/2.
    Raises UserError for points that are not finite.
    """

    def __init__(self, queries, points, dtype):
        self.same = points is None
        self.queries = queries
        self.points = queries if self.same else points
        # Distances do not change if the origin moves to the middle of the points, and rounding
        # errors shrink.
        self.origin = self.points[:10000].double().mean(dim=0).to(dtype)
        self.query_norms = self._norms(self.queries)
        self.point_norms = self.query_norms if self.same else self._norms(self.points)
        norms = float(self.query_norms.max() + self.point_norms.max())
        check_finite(torch.tensor(norms))
        self.margin = (queries.shape[1] + 32) * torch.finfo(dtype).eps / 2 * norms

    def _centred(self, x):
        return x.to(self.origin) - self.origin

    def _norms(self, x):
        """Sum of squares of each row, rounded once."""
        return torch.cat([self._centred(part).double().square_().sum(dim=1)
                          for part in x.split(256)]).to(self.origin)

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, squared distances [rows, columns]).

        Within one set the blocks below the diagonal are those above it, transposed.
        """
        shown = distributed.get_rank() == 0
        for rows in progress.bar([*_slices(len(self.queries))], shown, desc='Distances',
                                 unit='block', leave=False):
            u = self._centred(self.queries[rows])
            for columns in _slices(len(self.points)):
                if self.same and columns.start < rows.start:
                    continue
                v = self._centred(self.points[columns])
                squares = torch.addmm(self.point_norms[columns], u, v.T, alpha=-2)
                squares += self.query_norms[rows, None]
                yield rows, columns, squares
                if self.same and rows != columns:
                    yield columns, rows, squares.T


def _slices(count: int) -> list[slice]:
    return [slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]
