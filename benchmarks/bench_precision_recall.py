"""Improved precision and recall: ours against whole distance matrices in double precision.

python benchmarks/bench_precision_recall.py [--images=10000] [--dim=2048] [--k=5] [--device=cuda] [--skip-plain]

Prints the time, the memory above the features, and both results, which must be equal.
"""

import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import psutil

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from metrics.precision_recall import precision_recall


def plain_precision_recall(ref, gen, k):
    """Three distance matrices, and comparisons."""
    def distances(u, v):
        u, v = u.double(), v.double()
        squares = u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.T
        return squares.clamp_min(0).sqrt()
    radii = [distances(x, x).kthvalue(k + 1, dim=1).values for x in (ref, gen)]
    between = distances(ref, gen)
    return ((between < radii[0][:, None]).any(dim=0).double().mean().item(),
            (between < radii[1]).any(dim=1).double().mean().item())


def features(count, dim, seed):
    """Positive features with 64 strong directions and noise in all."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, dim, generator=torch.Generator().manual_seed(0)) / 8
    return (torch.randn(count, 64, generator=generator) @ mix + 0.3 * torch.randn(count, dim, generator=generator)).relu() / 2


def measured(function, device):
    """(result, seconds, GiB above the start)."""
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        return result, time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**30
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = function()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return result, seconds, (peak - before) / 2**30


@click.command(cls=cli.Command)
@click.option('--images', help='Images of each set', metavar='INT', type=int, default=10000)
@click.option('--dim', help='Dimensions of the features', metavar='INT', type=int, default=2048)
@click.option('--k', help='Neighbours', metavar='INT', type=int, default=5)
@click.option('--device', type=click.Choice(['cpu', 'cuda']), default='cpu')
@click.option('--skip-plain', is_flag=True, help='Only ours, for sizes at which matrices do not fit')
def main(images, dim, k, device, skip_plain):
    """Times precision and recall and compares the results."""
    ref, gen = features(images, dim, 1).to(device), 0.97 * features(images, dim, 2).to(device)
    precision_recall(ref[:100], gen[:100])  # threads start here
    ours, seconds, memory = measured(lambda: precision_recall(ref, gen, k, strict=True), device)
    print(f'ours   {seconds:7.2f} s  {memory:5.2f} GiB  precision {ours[0]:.4f} recall {ours[1]:.4f}')
    if not skip_plain:
        plain, plain_seconds, memory = measured(lambda: plain_precision_recall(ref, gen, k), device)
        print(f'plain  {plain_seconds:7.2f} s  {memory:5.2f} GiB  precision {plain[0]:.4f} recall {plain[1]:.4f}')
        print(f'ratio  {plain_seconds / seconds:7.1f}   same results: {ours == plain}')


if __name__ == '__main__':
    main()
