"""The toy example of autoguidance (arXiv 2406.02507, Figures 1 and 2): a density in the plane,
learnt and guided in four ways."""

import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli, lazy, options, pictures

with lazy.imports(__name__ == '__main__'):
    import pandas as pd
    import torch

    from simulations.plane import Mixture, branches, draw_samples, train

import studies

GUIDE_SHARE = 8  # the guide is trained an eighth as long, with half the width


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
