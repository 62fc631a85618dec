"""Frechet distance of two statistics: ours against scipy.linalg.sqrtm of the product, as FID is usually computed.

python benchmarks/bench_frechet.py [--dim=2048] [--images=5000,1000] [--rounds=1]

Fewer images than dimensions make singular covariances. Both get the same statistics in the same process, in turn.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import scipy.linalg

    from metrics.frechet import frechet_distance

from benchmarks.timing import compare


def plain_frechet(mu1, sigma1, mu2, sigma2):
    """The formula as it stands."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root).real)


def statistics(images, dim, seed):
    """Mean and covariance of positive, correlated features, as pooled features are."""
    random = np.random.RandomState(seed)
    features = np.maximum(random.standard_normal((images, dim)) @ random.standard_normal((dim, dim)) / dim**0.5, 0)
    return features.mean(axis=0), np.cov(features.T)


@click.command(cls=cli.Command)
@click.option('--dim', help='Dimensions of the features', metavar='INT', type=int, default=2048)
@click.option('--images', help='Numbers of images to try', metavar='LIST', type=cli.INT_LIST, default='5000,1000')
@click.option('--rounds', help='Repetitions', metavar='INT', type=int, default=1)
def main(dim, images, rounds):
    """Times the distance and compares the results."""
    frechet_distance(*statistics(100, 50, 0), *statistics(100, 50, 1))  # threads start here
    for count in images:
        arguments = [*statistics(count, dim, 0), *statistics(count, dim, 1)]
        results = {}

        def call(name, function, arguments=arguments, results=results):
            results[name] = function(*arguments)

        seconds = compare({'sqrtm': lambda call=call: call('sqrtm', plain_frechet),
                           'ours': lambda call=call: call('ours', frechet_distance)}, rounds=rounds, warmup=0)
        print(f'{count} images, {dim} dimensions: sqrtm {seconds["sqrtm"]:.2f} s, ours {seconds["ours"]:.2f} s, '
              f'ratio {seconds["sqrtm"] / seconds["ours"]:.1f}, '
              f'relative difference {abs(results["ours"] / results["sqrtm"] - 1):.1e}')


if __name__ == '__main__':
    main()
