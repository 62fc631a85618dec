"""Conditional Gaussian estimation from K sources (arXiv 2502.14583): estimators, errors and
bounds.

Source k of 1..K is a Gaussian in D dimensions with unit covariance. Its mean is k in the first
D - D_sim dimensions and 0 in the last D_sim = int(sim * D), which all sources share. Sources are
equally likely. From n labelled samples every mean is estimated twice: from the samples of its
source alone ("single"), and with the shared dimensions pooled over all samples ("multi").
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing

import torch

from dnnlib import progress
from dnnlib.util import core_count

SIMULATIONS_PER_WORKER = 10_000  # they are worth the two seconds in which a process imports torch
BATCH_NUMBERS = 200_000          # random numbers of a batch of seeds: they stay in a core's cache


@dataclasses.dataclass(frozen=True)
class Setting:
    """One experiment: K sources in D dimensions, the share `sim` of them common to all, n
    samples."""

    K: int
    D: int
    sim: float
    n: int

    @property
    def shared(self) -> int:
        """D_sim, the number of common dimensions (truncated: 0.29 of 100 dimensions is 28)."""
        return int(self.sim * self.D)

    def bounds(self) -> tuple[float, float]:
        """Bounds on the total variation error, single and multi: sqrt(K D / n) and
        sqrt((K D - (K-1) D_sim) / n)."""
        numbers = self.K * self.D
        pooled = numbers - (self.K - 1) * self.shared
        return math.sqrt(numbers / self.n), math.sqrt(pooled / self.n)

    def means(self) -> torch.Tensor:
        """True means of the sources, [K, D] float32."""
        means = torch.zeros(self.K, self.D)
        means[:, :self.D - self.shared] = torch.arange(1, self.K + 1)[:, None]
        return means


def draw(means: torch.Tensor, count: int, streams: list[torch.Generator]):
    """Draws `count` samples of the mixture from each of S streams: points [S, count, D] float32,
    labels [S, count].

    Labels are in 0..K-1. The order of the draws in each stream is the paper's: all labels, then a
    block of normal numbers for each source that has any samples.
    """
    K, D = means.shape
    weights = torch.full((K,), 1 / K)
    labels = torch.stack([torch.multinomial(weights, count, replacement=True, generator=stream)
                          for stream in streams])
    sources, order = labels.sort(stable=True)
    points = torch.empty(*labels.shape, D)
    for rows, sizes, stream in zip(points, sizes_of(labels, K), streams, strict=True):
        for block in rows.split(sizes):
            block.normal_(generator=stream)
    points += means[sources]
    return torch.empty_like(points).scatter_(1, order[..., None].expand_as(points), points), labels


def sizes_of(labels: torch.Tensor, K: int) -> list[list[int]]:
    """Number of samples of each of the K sources, for each row of labels [S, N]."""
    cells = labels + K * torch.arange(len(labels))[:, None]
    return cells.flatten().bincount(minlength=K * len(labels)).view(-1, K).tolist()


def estimate(points: torch.Tensor, labels: torch.Tensor, K: int, shared: int) -> torch.Tensor:
    """Maximum likelihood estimates of the means, [2, S, K, D]: single, multi. `shared` is D_sim.

    The mean of a source that has no sample does not exist: its row is NaN.
    """
    order = labels.argsort(stable=True)
    blocks = points.gather(1, order[..., None].expand_as(points))
    single = torch.stack([block.mean(0)
                          for rows, sizes in zip(blocks, sizes_of(labels, K), strict=True)
                          for block in rows.split(sizes)])
    single = single.view(len(points), K, -1)
    common = slice(points.shape[-1] - shared, None)
    multi = single.clone()
    multi[..., common] = points.mean(1, keepdim=True)[..., common]
    return torch.stack([single, multi])


def total_variation(estimates: torch.Tensor, means: torch.Tensor, points: torch.Tensor,
                    labels: torch.Tensor):
    """Empirical total variation error, 0.5 * mean |p_hat/p - 1| over the test points x of p, for
    each estimate: [2, S].

    `estimates` is [2, S, K, D], `means` [K, D], `points` [S, N, D] with `labels` [S, N]. The
    densities are the closed form exp(-|x - m|^2 / 2 - (D/2) ln(2 pi)) in float32.
    """
    D = points.shape[-1]

    def log_density(m):  # m: the mean for each point, [..., N, D]
        return -(points - m).square().sum(-1) / 2 - D / 2 * math.log(2 * math.pi)

    index = labels[..., None].expand(len(estimates), *points.shape)
    log_hat = log_density(estimates.gather(2, index))
    log_true = log_density(means[labels])
    hat = log_hat.exp()
    true = log_true.exp()
    # From about 60 dimensions on densities underflow in float32, where the ratio still exists as a
    # difference of logs.
    normal = torch.minimum(hat, true) > torch.finfo(true.dtype).tiny
    change = torch.where(normal, hat / true - 1, torch.expm1(log_hat - log_true))
    return change.abs().mean(-1) / 2


def simulate(setting: Setting, seeds: list[int], test_points=500) -> list[tuple[float, float]]:
    """Total variation error of the single- and of the multi-source estimate, for each seed.

    NaN if one of the sources has no sample in the training set. The random numbers of a seed are
    torch's CPU stream of that seed, whatever the other seeds are.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    means = setting.means()
    estimates = estimate(*draw(means, setting.n, streams), setting.K, setting.shared)
    errors = total_variation(estimates, means, *draw(means, test_points, streams))
    errors[:, estimates.isnan().any((0, 2, 3))] = math.nan
    return [tuple(pair) for pair in errors.T.tolist()]


def simulate_many(settings: list[Setting], seeds: list[int], test_points: int = 500,
                  workers: int | None = None):
    """`simulate` for every setting, settings first, as one list of errors; with a progress bar if
    it takes long.

    By default large jobs are spread over the cores. The numbers do not depend on `workers`.
    """
    tasks = []
    for setting in settings:
        size = max(1, BATCH_NUMBERS // (max(setting.n, test_points) * setting.D))
        tasks += [(setting, seeds[i:i + size], test_points) for i in range(0, len(seeds), size)]
    total = len(settings) * len(seeds)
    if workers is None:
        workers = min(core_count(), 1 + total // SIMULATIONS_PER_WORKER)
    errors = []
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            # spawn: forking a process that has started torch's threads may hang
            run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context('spawn'), torch.set_num_threads, (1,))).map
        else:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # the tensors are too small to share
        with progress.bar(total=total, unit='sim') as shown:
            for batch in run(simulate, *zip(*tasks, strict=True)):
                errors += batch
                shown.update(len(batch))
    return errors
