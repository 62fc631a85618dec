"""The two nearest training images of 1,000 generated ones among 50,000 of CIFAR's size: ours against torch.cdist.

Both get the same bytes in the same blocks, and keep the best two of each block.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from metrics.memorization import nearest_neighbors

from benchmarks.timing import compare


def cdist_neighbors(queries, blocks, k, device):
    """The same search with torch.cdist over whole blocks, in float32."""
    queries = torch.from_numpy(queries).to(device).flatten(1).float()
    best, found, offset = torch.empty([len(queries), 0], device=device), None, 0
    for images in blocks:
        distances = torch.cdist(queries, torch.from_numpy(images).to(device).flatten(1).float())
        values, indices = distances.topk(k, dim=1, largest=False)
        found = indices if found is None else torch.cat([found, indices + offset], dim=1)
        best, order = torch.cat([best, values], dim=1).topk(k, dim=1, largest=False)
        found = found.gather(1, order)
        offset += len(images)
    return best.cpu().numpy() / np.sqrt(queries.shape[1]), found.cpu().numpy()


@click.command(cls=cli.Command)
@click.option('--queries', help='Generated images', metavar='INT', type=int, default=1000)
@click.option('--images', help='Training images', metavar='INT', type=int, default=50000)
@click.option('--block', help='Training images at a time', metavar='INT', type=int, default=8192)
@click.option('--rounds', help='Repetitions', metavar='INT', type=int, default=3)
@click.option('--threads', help='Processor cores', metavar='INT', type=int, default=1)
@click.option('--device', help='cpu or cuda', metavar='NAME', default='cpu')
def main(queries, images, block, rounds, threads, device):
    """Times the search for two nearest neighbours and compares the answers.

    \b
    Examples:
      python benchmarks/bench_knn.py
      python benchmarks/bench_knn.py --queries=10000 --device=cuda
    """
    torch.set_num_threads(threads)
    rng = np.random.RandomState(0)
    training = rng.randint(0, 256, size=[images, 3, 32, 32], dtype=np.uint8)
    noise = rng.randint(-40, 41, size=[queries, 3, 32, 32]) * rng.randint(0, 2, size=[queries, 1, 1, 1])
    generated = (training[rng.randint(images, size=queries)] + noise).clip(0, 255).astype(np.uint8)

    answers = {}

    def search(name, function):
        answers[name] = function(generated, np.split(training, range(block, images, block)), k=2, device=device)

    methods = {'torch.cdist': cdist_neighbors, 'int8 products': nearest_neighbors}
    seconds = compare({name: functools.partial(search, name, function) for name, function in methods.items()}, rounds)
    for name, value in seconds.items():
        print(f'{name:16}{value:8.3f} s   copies found to have distance 0: {(answers[name][0][:, 0] == 0).sum()}')
    (_, theirs), (_, ours) = answers.values()
    print(f'same nearest image for {(ours[:, 0] == theirs[:, 0]).mean():.2%} of {queries}')
    print(f'ratio: {seconds["torch.cdist"] / seconds["int8 products"]:.1f}')


if __name__ == '__main__':
    main()
