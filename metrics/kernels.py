"""Maximum mean discrepancy of features: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603)."""

import numpy as np
import torch
from torch.nn import functional as F

from dnnlib import UserError
from metrics.precision_recall import check_dimensions
from metrics.shares import Estimate

BLOCK = 1000       # images of a set in one estimate, where there are enough
FEWEST_BLOCKS = 20
SIGMA = 10         # of CMMD's kernel
SCALE = 1000       # of CMMD


def cubic(x, y):
    """KID's kernel (x.y / D + 1)^3 of each x [n, D] and y [m, D]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x, y):
    """CMMD's kernel exp(-|x - y|^2 / 2 sigma^2)."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return (-squares.clamp_min(0) / (2 * SIGMA**2)).exp()


def mmd2(x, y, kernel) -> torch.Tensor:
    """The unbiased estimate of the squared discrepancy of x [n, D] and y [m, D]:

        sum_(i != j) k(x_i, x_j) / n (n - 1) + the same of y - 2 sum_ij k(x_i, y_j) / n m
    """
    inner = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
                for k in (kernel(x, x), kernel(y, y)))
    return inner - 2 * kernel(x, y).mean()


def mmd2_by_blocks(gen, ref, kernel, scale: float = 1) -> Estimate:
    """The mean of `mmd2` over disjoint random parts of `gen` [n, D] and `ref` [m, D], in float64.

    Each part has about BLOCK images of the smaller set, or fewer where there would be less than
    FEWEST_BLOCKS parts. They are independent, so the error, that of both sets drawn anew, is their
    deviation over the root of their number. Raises UserError for fewer than four images.
    """
    check_dimensions(ref, gen)
    fewest = min(len(gen), len(ref))
    if fewest < 4:
        raise UserError(f'the distance of kernels needs at least 4 images, and there are {fewest}')
    blocks = max(fewest // BLOCK, min(FEWEST_BLOCKS, fewest // 2))
    order = np.random.RandomState(0)
    sides = [np.array_split(order.permutation(len(side)), blocks) for side in (gen, ref)]
    values = np.array([
        scale * mmd2(gen[a].double(), ref[b].double(), kernel).item()
        for a, b in zip(*sides, strict=True)])
    return Estimate(values.mean(), values.std(ddof=1) / blocks**0.5, values)


def kid(gen, ref) -> Estimate:
    """Kernel Inception Distance of features, or of those of another detector."""
    return mmd2_by_blocks(gen, ref, cubic)


def cmmd(gen, ref) -> Estimate:
    """CMMD of features of CLIP, which are normalised here; times 1000, as published."""
    return mmd2_by_blocks(*(F.normalize(side.double(), dim=1) for side in (gen, ref)), gaussian,
                          SCALE)
