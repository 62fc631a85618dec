"""What every metric of one detector costs, and whether the stated standard errors are the spread that repetitions have.

python benchmarks/bench_metrics.py cost [--images=10000] [--dim=2048] [--to=50000] [--device=cuda] [--only=NAME,...]
python benchmarks/bench_metrics.py errors [--repetitions=20] [--images=1000] [--dim=16]

`cost` prints the time and the memory above the features, and what they come to with more images, by the powers in which the
work grows (measured parts of known powers where a sum of them). `errors` draws sets anew and prints for each metric the mean,
the spread over repetitions and the mean stated error.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from benchmarks import timing
from dnnlib import cli, lazy, options

with lazy.imports(__name__ == '__main__'):
    import numpy as np
    import torch

    from benchmarks.bench_precision_recall import features
    from metrics import compute
    from metrics.detectors import PROTOCOLS
    from metrics.statistics import FeatureSums, Statistics

# Metric -> the power of the number of images in which its time grows.
# FLD: up to 10,000 images, from where the number of its Gaussians grows no more.
POWERS = {'fid': 1, 'fid_inf': 1, 'kid': 1, 'vendi': 1, 'precision': 2, 'density': 2, 'authpct': 2, 'ct': 2, 'fld': 2}


def statistics_of(x) -> 'Statistics':
    sums = FeatureSums(x.device)
    for part in x.split(4096):
        sums.add(part)
    return Statistics('', {'fid': sums.gaussian()}, {'fid': x.cpu()})


@click.group(cls=cli.Group)
def main():
    """Cost of metrics, and their errors."""


@main.command()
@options.integer('--images', 10000, 'Generated, training and held-out images')
@options.integer('--dim', 2048, 'Dimensions of the features')
@options.integer('--to', 50000, 'Images to extrapolate to')
@options.text('NAMES', '--only', 'Some of the metrics', type=cli.Parsed('list', lambda text: text.split(',')))
@options.choice('--device', 'cpu', 'Where', ['cpu', 'cuda'])
def cost(images, dim, to, only, device):
    """Time and memory of each metric."""
    sides = [statistics_of(features(images, dim, seed)) for seed in (1, 2, 3)]
    rules = PROTOCOLS['edm']
    print(f'{images} x {dim} on {device}, {torch.get_num_threads()} thread(s)')
    for name in only or POWERS:
        timing.synchronize()
        with timing.PeakMemory(device) as memory:
            start = time.perf_counter(), timing.cpu_seconds()
            value = compute.evaluate([name], *sides[:2], rules, device, sides[2])[name]
            timing.synchronize()
            seconds, used = time.perf_counter() - start[0], timing.cpu_seconds() - start[1]
        factor = (to / images) ** POWERS[name]
        print(f'{name:10} {value:12.6g}  {seconds:7.1f} s ({used:7.1f} s of processors)  {memory.gib:5.2f} GiB   '
              f'{to} images: {factor * used:8.0f} s of processors', flush=True)


@main.command()
@options.integer('--repetitions', 20, 'Sets of generated images')
@options.integer('--images', 1000, 'Images of each')
@options.integer('--dim', 16, 'Dimensions of the features')
def errors(repetitions, images, dim):
    """Stated errors against the spread over repetitions, the reference and held-out images being the same."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) / dim**0.5

    def drawn(seed, count=images, scale=1.0, shift=0.0):
        x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) @ mix
        return statistics_of(scale * x + shift)

    reference, heldout = drawn(1, 3 * images), drawn(2)
    names = ['fid', 'fid_inf', 'kid', 'precision', 'recall', 'density', 'coverage', 'vendi', 'authpct']
    for title, changes in (('near the reference', dict(scale=1.1, shift=0.2)), ('the same distribution', {})):
        rows = [compute.evaluate(names, drawn(100 + i, **changes), reference, PROTOCOLS['edm'], 'cpu', heldout)
                for i in range(repetitions)]
        print(f'\n{title}: {repetitions} sets of {images} x {dim}')
        for name in names:
            values = [row[name] for row in rows]
            spread, stated = np.std(values, ddof=1), np.mean([value.error for value in values])
            print(f'{name:10} {np.mean(values):9.4f}  spread {spread:8.4f}  stated {stated:8.4f}  ratio {stated / spread:5.2f}',
                  flush=True)


if __name__ == '__main__':
    main()
