"""A density in the plane, a denoiser that learns it, and samples by each way of guidance."""

import dataclasses
import itertools
import math

import torch

from dnnlib import progress
from torch_utils.random import GlobalRandom
from training import ema
from training.diffusion.losses import EDMLoss
from training.diffusion.samplers import sample, without_labels
from training.networks.edm2 import MPConv, mp_silu
from training.networks.layers import Denoiser, edm_coefficients

SIGMA_DATA = 0.5


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Gaussians in the plane: means [K,2], stds [K], weights [K], and labels [K], the class of
    each."""

    means: torch.Tensor
    stds: torch.Tensor
    weights: torch.Tensor
    labels: torch.Tensor

    def of(self, label: int) -> 'Mixture':
        """The Gaussians of one class."""
        chosen = self.labels == label
        return Mixture(*(values[chosen] for values in vars(self).values()))

    def log_density(self, x, sigma: float = 0):
        """ln p [N] of points [N,2] in nats, with noise of `sigma`."""
        variance = self.stds**2 + sigma**2
        squared = (x.double()[:, None] - self.means).square().sum(2)
        terms = (self.weights / (2 * math.pi * variance)).log() - squared / (2 * variance)
        return terms.logsumexp(1) - self.weights.sum().log()

    def draw(self, count: int, generator=None):
        """Points [N,2] and their labels [N]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn([count, 2], generator=generator)
        return (self.means[chosen] + self.stds[chosen, None] * noise).float(), self.labels[chosen]

    def coverage(self, x) -> float:
        """Share of the mass whose Gaussian is the nearest one of some point of x [N,2]."""
        nearest = torch.cdist(x.double(), self.means).argmin(1).unique()
        return float(self.weights[nearest].sum() / self.weights.sum())


def branches(levels: int = 6, per_branch: int = 8) -> Mixture:
    """Two classes of tree-like shape: Gaussians along branches, which fork at their ends. The
    standard deviation of the whole is about SIGMA_DATA."""
    labels = torch.arange(2)
    angles = (0.25 - labels.double()) * math.pi
    starts = -0.1 * torch.exp(1j * angles)                     # the plane as complex numbers
    weights = torch.full_like(angles, 0.5)
    grown = []
    for level in range(levels):
        lines = 0.55 * 0.72**level * torch.exp(1j * angles)
        stds = torch.full_like(angles, 0.035 * 0.75**level)
        grown.append((starts, lines, stds, weights, labels))
        side = 1 - 2 * labels                                  # the trees turn opposite ways
        starts = (starts + lines).repeat(2)
        angles = torch.cat([angles + 0.55 * side, angles - 0.75 * side])
        weights = torch.cat([0.55 * weights, 0.45 * weights]) * 0.95
        labels = labels.repeat(2)
    starts, lines, stds, weights, labels = (
        torch.cat(values).repeat_interleave(per_branch) for values in zip(*grown, strict=True))
    along = (torch.arange(len(starts)) % per_branch + 0.5) / per_branch
    means = torch.view_as_real(starts + along * lines)
    weights /= weights.sum()
    means -= weights @ means
    scale = SIGMA_DATA / (weights @ (means.square().mean(1) + stds**2)).sqrt()
    return Mixture(means * scale, stds * scale, weights, labels)


class PlaneDenoiser(Denoiser):
    """D(x; sigma, labels) of points [N,2,1,1]: EDM2's preconditioning and layers around four
    hidden layers of `width` units."""

    def __init__(self, width: int):
        super().__init__(1, 2, 2)
        sizes = [2 + 1 + 1 + self.label_dim, *[width] * 4, 2]
        self.layers = torch.nn.ModuleList(MPConv(*pair, []) for pair in itertools.pairwise(sizes))
        self.gain = torch.nn.Parameter(torch.zeros([]))

    def coefficients(self, sigma):
        return edm_coefficients(sigma, SIGMA_DATA)

    def network(self, x, noise, labels):
        inputs = (x[:, :, 0, 0], noise[:, None], torch.ones(1, 1), labels)
        h = torch.cat([values.expand(len(x), -1) for values in inputs], 1)
        for layer in self.layers[:-1]:
            h = mp_silu(layer(h))
        return self.layers[-1](h, gain=self.gain)[:, :, None, None]

    def forward(self, x, sigma, class_labels=None):
        return self.precondition(self.network, x, sigma, class_labels, force_fp32=True)


def train(data: Mixture, width: int, steps: int, batch: int, lr: float, seed: int):
    """A denoiser after `steps` steps: the power-function average of width 0.10 of its weights.

    One label in ten is dropped, so that the network knows the unconditional density too.
    """
    torch.manual_seed(seed)
    net = PlaneDenoiser(width).train()
    objective = EDMLoss(P_mean=-2.3, P_std=1.5, sigma_data=SIGMA_DATA)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    averages = ema.Averages(net, ema.power([0.10]))
    for step in progress.bar(range(steps), desc=f'network of {width} units', leave=False):
        points, ids = data.draw(batch)
        labels = torch.eye(2)[ids] * (torch.rand([batch, 1]) >= 0.1)
        loss, _ = objective(net, dict(images=points[:, :, None, None], labels=labels,
                                      random=GlobalRandom()))
        for group in optimizer.param_groups:  # EDM2's decay of the learning rate
            group['lr'] = lr / math.sqrt(max(4 * step / steps, 1))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        averages.update(net, step * batch, batch)
    return averages.emas[0]


@torch.no_grad()
def draw_samples(net, guide, count: int, label: int, guidance: float, seed: int) -> dict:
    """Samples [N,2] of one class by each way of guidance, all from the same noise."""
    def stretched(x, sigma, labels):                           # 1.3 times the score of `net`
        return x + 1.3 * (net(x, sigma, labels) - x)

    noise = torch.randn([count, 2, 1, 1], generator=torch.Generator().manual_seed(seed))
    settings = {
        'no guidance': (net, {}),
        'classifier-free': (net, dict(guide=without_labels(net), guidance=guidance)),
        'autoguidance': (net, dict(guide=guide, guidance=guidance)),
        'stretched': (stretched, {})}
    return {name: sample(denoiser, noise, torch.eye(2)[[label]], name='edm2', sigma_max=5,
                         **guiding).flatten(1)
            for name, (denoiser, guiding) in settings.items()}
