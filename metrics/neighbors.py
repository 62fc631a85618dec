"""Exact nearest neighbours by blocked matrix products, in bounded memory.

|u - v|^2 = |u|^2 + |v|^2 - 2 u.v is fast in single precision, but wrong by up to about
D eps (|u|^2 + |v|^2). So products only select; distances that count are computed as sum (u - v)^2
in double precision, and whatever the error bound leaves open is settled that way too. Products of
pixels (uint8) are whole numbers without rounding, several times as fast. Results depend on no
block size and on no device.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from dnnlib import UserError

ROWS = 2048        # points of one side of a block of distances: 16 MiB
NUMBERS = 2**20    # differences computed at a time: 8 MiB
SPARE = 2          # candidates beyond k, so that rounding rarely leaves the choice open
MAX_DIM = 1 << 15  # pixels of an image whose squared distances fit into int32: 255^2 2^15 < 2^31


def nearest(queries: torch.Tensor, points: torch.Tensor | None = None, k: int = 1):
    """The k nearest of `points` [M, D] for each of `queries` [N, D], on their device.

    Returns squared distances, float64 [N, k], ascending, and indices int64 [N, k]; among equal
    distances any order. `points=None`: the nearest within `queries`, each point among its own, at
    half the cost. Values can be of any type that float32 holds. Raises UserError if there are
    fewer than k points.
    """
    others = queries if points is None else points
    if k > len(others):
        raise UserError(f'the {k} nearest of {len(others)} points: too few images')
    exact = queries.dtype == others.dtype == torch.uint8 and queries.shape[1] <= MAX_DIM
    served = queries.is_cuda or torch.backends.mkldnn.is_available()
    dtype = torch.int8 if exact and served else torch.float32
    squares, index, floor = _settled(_Blocks(queries, points, dtype), k)
    unsure = (squares[:, -1] > floor).nonzero()[:, 0]
    if len(unsure):
        blocks = _Blocks(queries[unsure], others, torch.float64)
        squares[unsure], index[unsure], _ = _settled(blocks, k)
    return squares, index


def _settled(blocks: '_Blocks', k: int):
    """The k nearest among those that products select.

    Exact squared distances and indices [N, k]; and squared distances [N] below which, despite the
    rounding, there is no other point.
    """
    best, index = _candidates(blocks, k + SPARE)
    squares, order = _exact(blocks.queries, blocks.points, index).sort(dim=1)
    # A distance of exactly zero needs no certificate: nothing is nearer.
    floor = (best[:, -1] - blocks.margin).clamp_min(0)
    if index.shape[1] == len(blocks.points):
        floor[:] = torch.inf
    return squares[:, :k].contiguous(), index.gather(1, order[:, :k]), floor


def inside_balls(queries, points, query_squares, point_squares, strict: bool):
    """Which of `queries` [N, D] are in a ball around one of `points` [M, D], and the reverse.

    Returns bool [N] and bool [M]. `query_squares` [N] and `point_squares` [M], float64, are the
    squared radii of the balls around each. A ball has its boundary unless `strict`.
    """
    blocks = _Blocks(queries, points, torch.float32)
    inside = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    points_inside = torch.zeros(len(points), dtype=torch.bool, device=queries.device)
    for rows, columns, squares in blocks:
        u = queries[rows]
        v = points[columns]
        _mark(inside[rows], u, v, squares, point_squares[columns], blocks.margin, strict)
        _mark(points_inside[columns], v, u, squares.T, query_squares[rows], blocks.margin, strict)
    return inside, points_inside


def _mark(inside, queries, points, squares, radii, margin: float, strict: bool):
    """Sets inside[i] where a distance squares[i, j], right to within `margin`, is in radii[j]."""
    inside |= (squares < (radii - margin).float()).any(dim=1)
    limits = (radii + margin).float()
    open_rows = (~inside & (squares <= limits).any(dim=1)).nonzero()[:, 0]
    if len(open_rows):
        place, j = (squares[open_rows] <= limits).nonzero(as_tuple=True)
        i = open_rows[place]
        exact = _exact(queries[i], points, j[:, None])[:, 0]
        inside[i[exact < radii[j] if strict else exact <= radii[j]]] = True


class _Blocks:
    """Squared distances of `queries` [N, D] and `points` [M, D] (None: the queries), in blocks.

    `dtype` float32 or float64; or int8, for pixels, whose distances are int32 and exact.
    `margin` bounds the error of squared distances: (D + 32) u (|u|^2 + |v|^2), u = eps/2.
    """

    def __init__(self, queries, points, dtype):
        self.dtype = dtype
        self.same = points is None
        self.queries = queries
        self.points = queries if self.same else points
        if dtype != torch.int8:
            # Distances do not change if the origin moves to the middle of the points, and
            # rounding errors shrink.
            self.origin = self.points[:10000].to(torch.float64).mean(dim=0).to(dtype)
        self.query_norms = self._norms(self.queries)
        self.point_norms = self.query_norms if self.same else self._norms(self.points)
        norms = 2 * float(torch.cat([self.query_norms, self.point_norms]).max())
        if not np.isfinite(norms):
            raise UserError('the features hold NaN or infinite numbers; '
                            'are the weights of the detector damaged?')
        self.margin = 0.0
        if dtype != torch.int8:
            self.margin = (queries.shape[1] + 32) * torch.finfo(dtype).eps / 2 * norms

    def _values(self, x):
        """Rows as they are multiplied."""
        if self.dtype == torch.int8:
            return (x ^ 128).view(torch.int8)
        return x.to(self.dtype) - self.origin

    def _norms(self, x):
        """Sum of squares of each row: int32 and exact for int8, else rounded once."""
        dtype = torch.int32 if self.dtype == torch.int8 else self.dtype
        norms = torch.empty(len(x), dtype=dtype, device=x.device)
        for rows in _slices(len(x)):
            values = self._values(x[rows])
            if x.is_cuda:
                norms[rows] = values.double().square().sum(dim=1).to(dtype)
            else:  # NumPy widens a few values at a time, not the array.
                squares = np.einsum('nd,nd->n', values, values, dtype=np.float64)
                norms[rows] = torch.from_numpy(squares).to(dtype)
        return norms

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, squared distances [rows, columns]).

        Within one set only the blocks on and above the diagonal.
        """
        for rows in _slices(len(self.queries)):
            u = self._values(self.queries[rows])
            for columns in _slices(len(self.points)):
                if self.same and columns.start < rows.start:
                    continue
                products = _products(u, self._values(self.points[columns]))
                squares = torch.sub(self.point_norms[columns], products, alpha=2, out=products)
                yield rows, columns, squares.add_(self.query_norms[rows, None])


def _products(u, v):
    """u v^T; of int8 as int32, for which cuBLAS takes more than 16 rows, and multiples of 8."""
    if u.dtype != torch.int8:
        return u @ v.T
    depth = -u.shape[1] % 8
    return torch._int_mm(F.pad(u, [0, depth, 0, max(17 - len(u), 0)]),
                         F.pad(v, [0, depth, 0, -len(v) % 8]).T)[:len(u), :len(v)]


def _candidates(blocks: _Blocks, keep: int):
    """The nearest points by the distances of the blocks, all if there are no more than `keep`.

    These distances, float64, and indices [N, keep], ascending.
    """
    shape = (len(blocks.queries), min(keep, len(blocks.points)))
    best = torch.full(shape, torch.inf, dtype=torch.float64, device=blocks.queries.device)
    index = torch.zeros_like(best, dtype=torch.int64)

    def update(rows, columns, squares):
        values, place = squares.topk(min(keep, squares.shape[1]), largest=False)
        values = torch.cat([best[rows], values.double()], dim=1)
        place = torch.cat([index[rows], place + columns.start], dim=1)
        best[rows], order = values.topk(shape[1], largest=False)
        index[rows] = place.gather(1, order)

    for rows, columns, squares in blocks:
        update(rows, columns, squares)
        if blocks.same and rows != columns:
            update(columns, rows, squares.T)
    return best, index


def _exact(queries, points, index):
    """sum (u - v)^2 in float64, [N, n], of queries [N, D] and the points of `index` [N, n]."""
    step = max(NUMBERS // (index.shape[1] * queries.shape[1]), 1)
    parts = [(points[places].double() - part[:, None]).square_().sum(dim=2)
             for part, places in zip(queries.split(step), index.split(step), strict=True)]
    return torch.cat(parts)


def _slices(count: int) -> list[slice]:
    return [slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]
