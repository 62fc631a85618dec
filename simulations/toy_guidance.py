"""The toy example of autoguidance (arXiv 2406.02507, Figures 1 and 2): a density in the plane,
learnt and guided in four ways."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import studies
from dnnlib import cli, options, pictures
from torch_utils.random import GlobalRandom
from training import ema
from training.diffusion.losses import EDMLoss
from training.diffusion.samplers import sample, without_labels
from training.networks.edm2 import MPConv, mp_silu
from training.networks.layers import Denoiser, edm_coefficients

SIGMA_DATA = 0.5
GUIDE_SHARE = 8  # the guide is trained an eighth as long, with half the width


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
    for step in tqdm.trange(steps, desc=f'network of {width} units', leave=False,
                            disable=None):
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


def measure(data: Mixture, points, floor: float) -> dict:
    """Outliers (share of points of less density than `floor`), coverage, mean ln p."""
    log_density = data.log_density(points)
    return {'outliers': float((log_density < floor).double().mean()),
            'coverage': data.coverage(points), 'ln p': float(log_density.mean())}


def draw_figure(data: Mixture, samples: dict, floor: float, dest: str):
    """A panel for each way: the data in grey, samples on it, outliers red."""
    figure, axes = studies.plt.subplots(1, len(samples), figsize=(3.2 * len(samples), 3.4),
                                        layout='constrained')
    low, high = samples['data'].aminmax(dim=0)
    for axis, (name, points) in zip(axes, samples.items(), strict=True):
        colors = np.where(data.log_density(points) < floor, 'tab:red', 'tab:orange')
        axis.scatter(*samples['data'].T, s=1, color='0.8', rasterized=True)
        axis.scatter(*points.T, s=1, color=colors, rasterized=True)
        axis.set(title=name, xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[],
                 yticks=[], aspect='equal')
    pictures.save_figure(figure, dest)
    studies.plt.close(figure)


@click.command(cls=cli.Command, epilog="""\b
Examples:
  python simulations/toy_guidance.py                         # half a minute on two cores
  python simulations/toy_guidance.py --guidance=2 --steps=16Ki --dest=toy.png
""")
@options.integer('--width', 64, 'Units of the hidden layers; the guide has half as many')
@options.count('--steps', 4096, 'Training steps; the guide takes an eighth of them')
@options.count('--batch', 2048, 'Points of a step')
@options.number('--lr', 0.01, 'Learning rate')
@options.number('--guidance', 3, 'Strength of guidance')
@options.count('--samples', 4096, 'Points that are drawn')
@options.choice('--label', '0', 'Class that is drawn', '01')
@options.seed('--seed', 0, 'Random seed')
@click.option('--dest', help='Picture to write', metavar='PNG', default='toy_guidance.png',
              type=cli.PICTURE)
def main(width, steps, batch, lr, guidance, samples, label, seed, dest):
    """Learns a density of two tree-like classes in the plane and draws one of them: the data,
    samples without guidance, with classifier-free guidance, with autoguidance (by a smaller
    network trained for less long), and with the score stretched.

    Prints, for each, outliers (points where the density is below that of one data point in a
    thousand), coverage (share of the class's mass whose part of a branch is drawn at all) and the
    mean logarithm of the density.
    """
    data = branches()
    net = train(data, width, steps, batch, lr, seed)
    guide = train(data, width // 2, max(steps // GUIDE_SHARE, 1), batch, lr, seed + 1)
    label = int(label)
    data = data.of(label)
    points, _ = data.draw(100_000, torch.Generator().manual_seed(seed))
    floor = float(data.log_density(points).quantile(0.001))
    drawn = {'data': points[:samples]} | draw_samples(net, guide, samples, label, guidance, seed)
    table = pd.DataFrame({name: measure(data, drawn[name], floor) for name in drawn}).T
    print(table.to_string(formatters=dict.fromkeys(table.columns[:2], '{:.2%}'.format),
                          float_format='%.2f'))
    draw_figure(data, drawn, floor, dest)
    print(f'Picture in {dest}')


if __name__ == '__main__':
    main()
