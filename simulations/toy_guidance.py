"""The toy example of autoguidance (arXiv 2406.02507, Figures 1 and 2): a density in the plane, learnt
and guided in four ways."""

import functools
import math
import sys
from pathlib import Path

import click
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
COLUMNS = ('data', 'no guidance', 'classifier-free', 'autoguidance', 'stretched')


class Branches:
    """Two classes of tree-like shape in the plane: mixtures of Gaussians along branches that fork.

    means [K,2], stds [K], log_weights [K], labels [K]: component k belongs to class labels[k]. The
    standard deviation of the whole is about SIGMA_DATA.
    """

    def __init__(self, depth: int = 6, per_branch: int = 8):
        components = []

        def grow(x, y, angle, length, width, weight, level, label):
            for i in range(per_branch):
                along = length * (i + 0.5) / per_branch
                components.append((x + along * math.cos(angle), y + along * math.sin(angle), width,
                                   weight / per_branch, label))
            if level < depth:
                end = x + length * math.cos(angle), y + length * math.sin(angle)
                for turn, share in ((0.55, 0.55), (-0.75, 0.45)):
                    grow(*end, angle + turn * (-1) ** label, 0.72 * length, 0.75 * width,
                         0.95 * weight * share, level + 1, label)

        for label, angle in enumerate((0.25 * math.pi, -0.75 * math.pi)):
            grow(-0.1 * math.cos(angle), -0.1 * math.sin(angle), angle, 0.55, 0.035, 0.5, 1, label)
        x, y, stds, weights, labels = torch.tensor(components, dtype=torch.float64).T
        weights /= weights.sum()
        means = torch.stack([x, y], 1)
        means -= weights @ means
        scale = SIGMA_DATA / (weights @ (means.square().mean(1) + stds**2)).sqrt()
        self.means, self.stds = means * scale, stds * scale
        self.log_weights, self.labels = weights.log(), labels.long()

    def log_density(self, x, label: int | None = None, sigma: float = 0):
        """ln p [N] of points [N,2] in nats, of all data or of one class, with noise of `sigma`."""
        of_class = torch.ones_like(self.labels, dtype=torch.bool) if label is None else (
            self.labels == label)
        variance = self.stds[of_class] ** 2 + sigma**2
        squared = (x.double()[:, None] - self.means[of_class]).square().sum(2)
        log_weights = self.log_weights[of_class]
        terms = log_weights - squared / (2 * variance) - (2 * math.pi * variance).log()
        return terms.logsumexp(1) - log_weights.logsumexp(0)

    def draw(self, count: int, label: int | None = None, generator=None):
        """(points [N,2], labels [N]) of all data or of one class."""
        weights = self.log_weights.exp() * (1 if label is None else self.labels == label)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn([count, 2], generator=generator, dtype=torch.float64)
        return (self.means[chosen] + self.stds[chosen, None] * noise).float(), self.labels[chosen]

    def coverage(self, x, label: int):
        """Share of the class's mass whose component is the nearest one of some point of x [N,2]."""
        of_class = self.labels == label
        weights = self.log_weights[of_class].exp()
        nearest = torch.cdist(x.double(), self.means[of_class]).argmin(1)
        return float(weights[nearest.unique()].sum() / weights.sum())


class PlaneDenoiser(Denoiser):
    """D(x; sigma, labels) of points [N,2,1,1]: EDM2's preconditioning and layers around four hidden
    layers of `width` units."""

    def __init__(self, width: int):
        super().__init__(1, 2, 2)
        sizes = [2 + 1 + 1 + self.label_dim, *[width] * 4, 2]
        self.layers = torch.nn.ModuleList(
            MPConv(*pair, []) for pair in zip(sizes[:-1], sizes[1:], strict=True))
        self.gain = torch.nn.Parameter(torch.zeros([]))

    def forward(self, x, sigma, class_labels=None):
        x, sigma, class_labels = self.conditions(x, sigma, class_labels)
        c_skip, c_out, c_in, c_noise = edm_coefficients(sigma, SIGMA_DATA)
        rows = [(c_in * x).flatten(1), c_noise.flatten(1), torch.ones_like(c_noise).flatten(1),
                class_labels]
        h = torch.cat([row.expand(len(x), -1) for row in rows], 1)
        for layer in self.layers[:-1]:
            h = mp_silu(layer(h))
        return c_skip * x + c_out * self.layers[-1](h, gain=self.gain)[:, :, None, None]


def train(data: Branches, width: int, steps: int, batch: int, lr: float, seed: int):
    """A denoiser after `steps` steps: the power-function average of width 0.10 of its weights.

    One label in ten is dropped, so that the network knows the unconditional density too.
    """
    torch.manual_seed(seed)
    net = PlaneDenoiser(width).train()
    objective = EDMLoss(P_mean=-2.3, P_std=1.5, sigma_data=SIGMA_DATA)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    averages = ema.Averages(net, ema.power([0.10]))
    for step in tqdm.trange(steps, desc=f'network of {width} units', unit='step', leave=False,
                            disable=None):
        points, ids = data.draw(batch)
        labels = torch.nn.functional.one_hot(ids, 2) * (torch.rand([batch, 1]) >= 0.1)
        loss, _ = objective(net, dict(images=points[:, :, None, None], labels=labels,
                                      random=GlobalRandom()))
        for group in optimizer.param_groups:  # EDM2's decay of the learning rate
            group['lr'] = lr / math.sqrt(max(4 * step / steps, 1))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        averages.update(net, step * batch, batch)
    return averages.emas[0]


def stretched(net, strength: float, x, sigma, labels):
    """The denoiser whose score is `strength` times that of `net`: fewer outliers, less variety."""
    return x + strength * (net(x, sigma, labels) - x)


@torch.no_grad()
def draw_samples(net, guide, count: int, label: int, guidance: float, seed: int) -> dict:
    """Samples [N,2] of one class by each way of guidance, all from the same noise."""
    noise = torch.randn([count, 2, 1, 1], generator=torch.Generator().manual_seed(seed))
    labels = torch.nn.functional.one_hot(torch.full([count], label), 2).float()
    settings = {
        'no guidance': (net, {}),
        'classifier-free': (net, dict(guide=without_labels(net), guidance=guidance)),
        'autoguidance': (net, dict(guide=guide, guidance=guidance)),
        'stretched': (functools.partial(stretched, net, 1.3), {}),
    }
    return {name: sample(denoiser, noise, labels, name='edm2', sigma_max=5, **guiding).flatten(1)
            for name, (denoiser, guiding) in settings.items()}


def measure(data: Branches, points, label: int, floor: float) -> dict:
    """Outliers (share of points of less density than `floor`), coverage, mean ln p."""
    log_density = data.log_density(points, label)
    return dict(outliers=float((log_density < floor).double().mean()),
                coverage=data.coverage(points, label), log_density=float(log_density.mean()))


def draw_figure(data: Branches, samples: dict, label: int, floor: float, dest: str):
    """One panel for each way: the class's density as contours, samples as points, outliers red."""
    figure, axes = studies.plt.subplots(1, len(samples), figsize=(3.2 * len(samples), 3.4),
                                        layout='constrained')
    middle = data.means[data.labels == label].mean(0)
    x, y = (torch.linspace(-0.9, 0.9, 200) + float(centre) for centre in middle)
    plane = torch.stack(torch.meshgrid(x, y, indexing='xy'), 2).reshape(-1, 2)
    density = data.log_density(plane, label, sigma=0.02).reshape(200, 200)
    for axis, (name, points) in zip(axes, samples.items(), strict=True):
        outlier = data.log_density(points, label) < floor
        axis.contour(x, y, density, levels=[-4, -1, 1], colors='0.7', linewidths=0.6)
        for chosen, color in ((~outlier, 'tab:orange'), (outlier, 'tab:red')):
            axis.scatter(*points[chosen].T, s=1, color=color, rasterized=True)
        axis.set(title=name, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xticks=[], yticks=[],
                 aspect='equal')
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
@click.option('--label', help='Class that is drawn', metavar='0|1', type=click.IntRange(0, 1),
              default=0)
@options.seed('--seed', 0, 'Random seed')
@click.option('--dest', help='Picture to write', metavar='PNG', default='toy_guidance.png')
def main(width, steps, batch, lr, guidance, samples, label, seed, dest):
    """Learns a density of two tree-like classes in the plane and draws one of them: the data,
    samples without guidance, with classifier-free guidance, with autoguidance (by a smaller network
    trained for less long), and with the score stretched.

    Prints, for each, outliers (points where the density is below that of one data point in a
    thousand), coverage (share of the class's mass whose part of a branch is drawn at all) and the
    mean logarithm of the density.
    """
    data = Branches()
    net = train(data, width, steps, batch, lr, seed)
    guide = train(data, width // 2, max(steps // GUIDE_SHARE, 1), batch, lr, seed + 1)
    points, _ = data.draw(100_000, label, torch.Generator().manual_seed(seed))
    floor = float(data.log_density(points, label).quantile(0.001))
    drawn = {'data': points[:samples]} | draw_samples(net, guide, samples, label, guidance, seed)
    print(f'{"":16}{"outliers":>10}{"coverage":>10}{"ln p":>8}')
    for name in COLUMNS:
        row = measure(data, drawn[name], label, floor)
        print(f'{name:16}{row["outliers"]:10.2%}{row["coverage"]:10.2%}{row["log_density"]:8.2f}')
    draw_figure(data, drawn, label, floor, dest)
    print(f'Picture in {dest}')


if __name__ == '__main__':
    main()
