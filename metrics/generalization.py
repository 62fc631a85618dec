"""Is what is generated new? Measures that compare with the training images, and with images that
were held out.

AuthPct (arXiv 2102.08921), CT (arXiv 2004.05675), FLD and its generalisation gap (arXiv
2302.04440). All take features [N, D] on one device, of all training images: one that is left out
cannot be found to be copied.
"""

import math

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import subset
from metrics import neighbors
from metrics.precision_recall import check_dimensions
from metrics.shares import Estimate, Share, share_of
from torch_utils import distributed

CELL = 50             # generated, and held-out, images of a cell of CT on average
MOST_CELLS = 10
FEWEST_OF_CELL = 10   # below which CT leaves a cell out
MOST_CENTRES = 10000  # of FLD's mixture, and images that CT's cells are fitted to
SHARED_STEPS, STEPS = 3, 10
LEAST_VARIANCE = 1e-3
ROWS = 1024


def authpct(gen: torch.Tensor, train: torch.Tensor) -> Share:
    """Percentage of generated images that are authentic: farther from their nearest training image
    than that is from its own nearest other training image.
    """
    check_dimensions(gen, train)
    if len(train) < 2:
        raise UserError('authpct needs at least two training images')
    squares, places = neighbors.nearest(gen, train)
    own = neighbors.nearest(train, k=2)[0][:, 1]
    return share_of((squares[:, 0] > own[places[:, 0]]).tolist(), scale=100)


def ct(gen: torch.Tensor, train: torch.Tensor, test: torch.Tensor) -> Estimate:
    """C_T, a sum of z scores: far below 0 where generated images are nearer to the training images
    than held-out ones are (copying), far above where they are farther (underfitting).

    In each cell of a k-means partition of the training images, U is the number of pairs of a
    generated and a held-out image of which the generated one is farther from its nearest training
    image (ties count half), z = (U - n m / 2) / sqrt(n m (n + m + 1) / 12), and C_T is the mean of
    z weighted by the held-out images of the cells. Cells with less than FEWEST_OF_CELL images of
    either are left out. The error is that of equal distributions, of which z has a deviation of 1.
    """
    check_dimensions(gen, train, test)
    if not len(gen) or not len(test):
        raise UserError('ct needs generated and held-out images')
    count = min(max(min(len(gen), len(test)) // CELL, 1), MOST_CELLS, len(train))
    centres = _centres(train, count)
    distances, cells = [], []
    for side in (gen, test):
        distances.append(neighbors.nearest(side, train)[0][:, 0].cpu().numpy())
        cells.append(neighbors.nearest(side, centres)[1][:, 0].cpu().numpy())
    weights, scores = [], []
    for cell in range(count):
        ours, theirs = (values[labels == cell]
                        for values, labels in zip(distances, cells, strict=True))
        fewest = 1 if count == 1 else FEWEST_OF_CELL
        if min(len(ours), len(theirs)) >= fewest:
            weights.append(len(theirs))
            scores.append(_rank_score(ours, theirs))
    if not weights:
        raise UserError(f'ct: no part of the training images has {FEWEST_OF_CELL} generated and '
                        'held-out images; give more of both')
    weights = np.array(weights) / np.sum(weights)
    return Estimate(weights @ scores, np.sqrt(np.square(weights).sum()))


def _centres(train, count: int):
    """Centres [count, D] of k-means of the training images, or of MOST_CENTRES of them."""
    if count == 1:
        return train[:1]
    from sklearn.cluster import KMeans
    some = train[subset(len(train), MOST_CENTRES, seed=0)].cpu().numpy()
    centres = KMeans(count, n_init=1, random_state=0).fit(some).cluster_centers_
    return torch.as_tensor(centres, device=train.device, dtype=train.dtype)


def _rank_score(ours, theirs) -> float:
    """The z score of the Mann-Whitney U of `ours` [n] over `theirs` [m]."""
    n, m = len(ours), len(theirs)
    theirs = np.sort(theirs)
    below = np.searchsorted(theirs, ours, 'left')
    not_above = np.searchsorted(theirs, ours, 'right')
    return ((below + not_above).sum() / 2 - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


# --- FLD -----------------------------------------------------------------------------------------


def fld(gen: torch.Tensor, train: torch.Tensor,
        test: torch.Tensor) -> tuple[Estimate, Estimate]:
    """FLD, and its generalisation gap: FLD of the training images minus that of held-out ones.

        FLD(X) = -100 / D (mean_X log p(x) - the same of a perfect model)

    in features with mean 0 and deviation 1 over the training images. p is an equal mixture of a
    Gaussian around each generated image (of at most MOST_CENTRES, drawn by seed), whose variances
    are fitted to the training images: a copy becomes a peak that explains no held-out image. As
    perfect model serves half of the training images, fitted to the other half. 0 is perfect, more
    is worse; a gap below 0 says that the model knows its training images better than others. The
    errors are those of the held-out and training images.
    """
    check_dimensions(gen, train, test)
    if len(train) < 4 or len(test) < 2:
        raise UserError('fld needs at least four training images and two held-out ones')
    mean = train.double().mean(dim=0)
    spread = train.double().std(dim=0)
    spread = torch.where(spread > 1e-6 * spread.max(), spread, spread.max()).clamp_min(1e-12)
    gen, train, test = (((side - mean) / spread).float() for side in (gen, train, test))
    gen = gen[subset(len(gen), MOST_CENTRES, seed=0)]
    half = subset(len(train), min(len(gen), len(train) // 2), seed=0)
    rest = np.setdiff1d(np.arange(len(train)), half)
    perfect = Mixture(train[half], train[rest]).log_density(test).mean()
    mixture = Mixture(gen, train)
    scale = 100 / train.shape[1]
    ours, theirs = (scale * (perfect - mixture.log_density(side)) for side in (test, train))
    variances = [values.var().item() / len(values) for values in (ours, theirs)]
    return (Estimate(ours.mean(), math.sqrt(variances[0])),
            Estimate(theirs.mean() - ours.mean(), math.sqrt(sum(variances))))


class Mixture:
    """(1 / m) sum_j N(x; c_j, v_j I): Gaussians around `centres` [m, D], whose variances `v`
    float64 [m] maximise the likelihood of `data` [n, D] by expectation-maximisation, first one for
    all, then of each. None falls below LEAST_VARIANCE. Memory: ROWS m numbers.
    """

    @distributed.exact_float32()
    def __init__(self, centres: torch.Tensor, data: torch.Tensor):
        self.centres = centres
        self.norms = centres.square().sum(dim=1)
        squares = neighbors.nearest(data, centres)[0].mean()
        self.v = (squares / data.shape[1]).clamp_min(LEAST_VARIANCE).repeat(len(centres))
        for step in range(SHARED_STEPS + STEPS):
            weights = torch.zeros_like(self.v)
            sums = torch.zeros_like(self.v)
            for squares, logs in self._parts(data):
                shares = logs.softmax(dim=1)
                weights += shares.sum(dim=0)
                sums += (shares * squares).sum(dim=0)
            if step < SHARED_STEPS:
                self.v = (sums.sum() / weights.sum() / data.shape[1]).repeat(len(centres))
            else:
                fitted = sums / weights.clamp_min(1e-30) / data.shape[1]
                self.v = torch.where(weights > 1e-12, fitted, self.v)
            self.v = self.v.clamp_min(LEAST_VARIANCE)

    def _parts(self, data):
        """(|x - c|^2, log N(x; c, v I)) [rows, m], for parts of `data`."""
        dim = data.shape[1]
        constants = (-dim / 2 * (2 * math.pi * self.v).log()).float()
        for x in data.split(ROWS):
            squares = torch.addmm(self.norms, x, self.centres.T, alpha=-2)
            squares = (squares + x.square().sum(dim=1, keepdim=True)).clamp_min_(0)
            yield squares, constants - squares / (2 * self.v).float()

    @distributed.exact_float32()
    def log_density(self, data: torch.Tensor) -> torch.Tensor:
        """log p of each of `data`, float64 [n]."""
        parts = [logs.logsumexp(dim=1).double() for _, logs in self._parts(data)]
        return torch.cat(parts) - math.log(len(self.centres))
