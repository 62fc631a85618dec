"""Exact nearest neighbours by blocked matrix products, in bounded memory.

|u - v|^2 = |u|^2 + |v|^2 - 2 u.v is fast in single precision, but wrong by up to about D eps (|u|^2 + |v|^2). So
products only select; distances that count are computed as sum (u - v)^2 in double precision, and whatever the error
bound leaves open is settled that way too. Results depend on no block size and on no device.
"""

from collections.abc import Iterator

import torch

from dnnlib import UserError

ROWS = 2048        # points of one side of a block of distances: 16 MiB
NUMBERS = 2**20    # differences computed at a time: 8 MiB
SPARE = 2          # candidates beyond the k asked for, so that rounding rarely leaves the choice open


def nearest(queries: torch.Tensor, points: torch.Tensor | None = None, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of `points` [M, D] for each of `queries` [N, D], on their device.

    Returns squared distances, float64 [N, k], ascending, and indices int64 [N, k]; among equal distances any order.
    `points=None`: the nearest within `queries`, each point among its own, at half the cost. Values can be of any
    type that float32 holds. Raises UserError if there are fewer than k points.
    """
    others = queries if points is None else points
    if k > len(others):
        raise UserError(f'the {k} nearest of {len(others)} points: too few images')
    index, floor = _candidates(_Blocks(queries, points, torch.float32), k)
    squares, index = _exact_nearest(queries, others, index, k)
    unsure = (squares[:, -1] > floor).nonzero()[:, 0]
    if len(unsure):
        index2, _ = _candidates(_Blocks(queries[unsure], others, torch.float64), k)
        squares[unsure], index[unsure] = _exact_nearest(queries[unsure], others, index2, k)
    return squares, index


def inside_balls(queries, points, query_squares, point_squares, strict: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `queries` [N, D] are in a ball around one of `points` [M, D], and the reverse: bool [N] and bool [M].

    `query_squares` [N] and `point_squares` [M], float64, are the squared radii of the balls around each. A ball has
    its boundary unless `strict`.
    """
    blocks = _Blocks(queries, points, torch.float32)
    found = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    found_points = torch.zeros(len(points), dtype=torch.bool, device=queries.device)
    for rows, columns, squares in blocks.each():
        margin = blocks.margin(rows, columns)
        u, v = queries[rows], points[columns]
        _mark(found[rows], u, v, squares, point_squares[columns], margin, strict)
        _mark(found_points[columns], v, u, squares.T, query_squares[rows], margin, strict)
    return found, found_points


def _mark(found, queries, points, squares, radii, margin: float, strict: bool):
    """Sets found[i] where a squared distance squares[i, j], right to within `margin`, is inside radii[j]."""
    found |= (squares < (radii - margin).float()).any(dim=1)
    limits = (radii + margin).float()
    open_rows = (~found & (squares <= limits).any(dim=1)).nonzero()[:, 0]
    if len(open_rows):
        place, j = (squares[open_rows] <= limits).nonzero(as_tuple=True)
        i = open_rows[place]
        exact = _exact(queries[i], points, j[:, None])[:, 0]
        found[i[exact < radii[j] if strict else exact <= radii[j]]] = True


class _Blocks:
    """Squared distances between `queries` [N, D] and `points` [M, D] (None: the queries), block by block."""

    def __init__(self, queries, points, dtype):
        self.dtype = dtype
        self.same = points is None
        self.queries, self.points = queries, queries if self.same else points
        # Distances do not change if the origin moves to the middle of the points, and rounding errors shrink.
        self.origin = self.points[:10000].to(torch.float64).mean(dim=0).to(dtype)
        self.query_norms = self._norms(self.queries)
        self.point_norms = self.query_norms if self.same else self._norms(self.points)
        if not torch.isfinite(self.query_norms.sum() + self.point_norms.sum()):
            raise UserError('the features hold NaN or infinite numbers; are the weights of the detector whole?')

    def _centered(self, x, rows):
        return x[rows].to(self.dtype) - self.origin

    def _norms(self, x):
        return torch.cat([self._centered(x, rows).double().square().sum(dim=1).to(self.dtype) for rows in _slices(len(x))])

    def margin(self, rows, columns) -> float:
        """Bound of the error of all squared distances of a block: (D + 32) u (|u|^2 + |v|^2), u = eps/2."""
        unit = torch.finfo(self.dtype).eps / 2
        return float(self.query_norms[rows].max() + self.point_norms[columns].max()) * (self.queries.shape[1] + 32) * unit

    def each(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, squared distances [rows, columns]); within one set only the blocks on and above the diagonal."""
        for rows in _slices(len(self.queries)):
            u = self._centered(self.queries, rows)
            for columns in _slices(len(self.points)):
                if self.same and columns.start < rows.start:
                    continue
                v = u if self.same and columns == rows else self._centered(self.points, columns)
                squares = torch.addmm(self.point_norms[columns], u, v.T, alpha=-2)
                yield rows, columns, squares.add_(self.query_norms[rows, None])


def _candidates(blocks: _Blocks, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [N, k + SPARE] of the nearest points by rounded distances, and a squared distance [N] below which,
    despite the rounding, there is no other point."""
    keep = min(k + SPARE, len(blocks.points))
    n, device = len(blocks.queries), blocks.queries.device
    best = torch.full((n, keep), float('inf'), dtype=blocks.dtype, device=device)
    index = torch.zeros(n, keep, dtype=torch.int64, device=device)
    margin = torch.zeros(n, dtype=torch.float64, device=device)
    for rows, columns, squares in blocks.each():
        sides = [(rows, columns, squares)]
        if blocks.same and rows != columns:
            sides.append((columns, rows, squares.T))
        for mine, others, values in sides:
            margin[mine] = margin[mine].clamp_min(blocks.margin(rows, columns))
            values, where = values.topk(min(keep, values.shape[1]), dim=1, largest=False)
            values = torch.cat([best[mine], values], dim=1)
            where = torch.cat([index[mine], where + others.start], dim=1)
            best[mine], order = values.topk(keep, dim=1, largest=False)
            index[mine] = where.gather(1, order)
    if keep == len(blocks.points):
        return index, torch.full_like(margin, float('inf'))
    # A distance of exactly zero needs no certificate: nothing is nearer.
    return index, (best[:, -1].double() - margin).clamp_min(0)


def _exact_nearest(queries, points, index, k):
    """The k nearest among the candidates `index` [N, n]: squared distances and indices, ascending."""
    squares, order = _exact(queries, points, index).sort(dim=1)
    return squares[:, :k].contiguous(), index.gather(1, order[:, :k])


def _exact(queries, points, index):
    """sum (u - v)^2 in float64, [N, n], of queries [N, D] and the points that index [N, n] names."""
    out = torch.empty(index.shape, dtype=torch.float64, device=index.device)
    step = max(NUMBERS // (index.shape[1] * queries.shape[1]), 1)
    for i in range(0, len(queries), step):
        difference = points[index[i:i + step]].to(torch.float64)
        difference -= queries[i:i + step, None]
        torch.sum(difference.square_(), dim=2, out=out[i:i + step])
    return out


def _slices(count: int) -> list[slice]:
    return [slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]
