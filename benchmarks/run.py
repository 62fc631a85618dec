"""All workloads, plain and optimised, in one table and one JSON file."""

import copy
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import UserError, cli, lazy
from dnnlib.util import core_count, write_json

with lazy.imports(__name__ == '__main__'):
    import torch

    from benchmarks.plain_edm2 import PlainEMA, plain_network
    from metrics.frechet import frechet_distance
    from metrics.memorization import nearest_neighbors
    from metrics.precision_recall import precision_recall
    from training.diffusion import samplers
    from training.ema import Averages, power
    from training.networks import build_network

from benchmarks import (
    bench_data,
    bench_frechet,
    bench_gaussian,
    bench_knn,
    bench_precision_recall,
    gpu,
)
from benchmarks.bench_training import NETWORKS, make_step
from benchmarks.timing import CLOCKS, PeakMemory, compare


class Settings:
    """How to measure: `tiny` sizes show that everything runs; `clock` is one of CLOCKS."""

    def __init__(self, tiny=False, clock='wall', rounds=None, compile=True, threads=None):
        self.tiny, self.clock, self.rounds, self.compile = tiny, clock, rounds, compile
        self.threads = threads or core_count()

    def size(self, full, tiny):
        return tiny if self.tiny else full

    def compare(self, workload, candidates, rounds, warmup=0, images=None, note='') -> list[dict]:
        """Rows of every candidate after the first, which is the plain one; memory is that of the first call."""
        used = {}
        for name, function in candidates.items():
            with PeakMemory() as memory:
                function()
            used[name] = memory.gib
        seconds = compare(candidates, self.rounds or self.size(rounds, 1), warmup, CLOCKS[self.clock])
        (_, plain), *others = seconds.items()
        return [row(workload if name == 'optimised' else f'{workload}, {name}', plain, value, used[name], images, note)
                for name, value in others]


def row(workload, plain, optimised, memory, images=None, note='') -> dict:
    """Seconds of both, their ratio, GiB of the optimised way above the start, images/s if it is about images."""
    rates = {'plain_per_second': images / plain, 'optimised_per_second': images / optimised} if images else {}
    return {'workload': workload, 'plain': plain, 'optimised': optimised, 'ratio': plain / optimised, 'memory': memory,
            'note': note} | rates


# --- Workloads --------------------------------------------------------------------------------------------------------

def data(settings, name):
    with tempfile.TemporaryDirectory() as folder:
        dest = os.path.join(folder, 'rows.json')
        images = ['--images=20'] if settings.tiny else []
        subprocess.run([sys.executable, bench_data.__file__, f'--only={name}', f'--workers={settings.threads}',
                        f'--rounds={settings.rounds or 5}', f'--clock={settings.clock}', f'--dest={dest}', *images],
                       check=True, stdout=subprocess.DEVNULL)
        with open(dest) as file:
            result = json.load(file)[name]
    if not result['same']:
        raise AssertionError(f'{name}: other pixels than the plain way')
    return [row(f'convert {name}', result['plain'], result['optimised'], result['memory'], result['images'],
                f'{result["images"]} images, same pixels')]


def gaussian(settings):
    with PeakMemory() as memory:
        result = bench_gaussian.compare(*(([3], [1]) if settings.tiny else ()), clock=CLOCKS[settings.clock])
    return [row('gaussian --tag=K', result['plain'], result['first'], memory.gib,
                note=f'repeated calls {result["ratio"]:.0f} times, errors differ by {result["difference"]:.0e}')]


def frechet(settings):
    dim = settings.size(2048, 32)
    arguments = [*bench_frechet.statistics(settings.size(5000, 100), dim, 0),
                 *bench_frechet.statistics(settings.size(5000, 100), dim, 1)]
    results = [function(*arguments) for function in (bench_frechet.plain_frechet, frechet_distance)]
    return settings.compare(f'Frechet distance, {dim}', {
        'plain': lambda: bench_frechet.plain_frechet(*arguments), 'optimised': lambda: frechet_distance(*arguments)},
        rounds=1, note=f'relative difference {abs(results[1] / results[0] - 1):.0e}')


def _small_network(settings):
    torch.manual_seed(0)
    return build_network('Precond', precision='fp32', **NETWORKS[settings.size('small', 'digits')])


def training(settings):
    batch = settings.size(64, 4)
    ours = _small_network(settings).train()
    plain = plain_network(ours)
    adam = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.99))
    steps = {'plain': make_step(plain, plain, adam(plain.parameters(), foreach=False), PlainEMA(plain, [0.05, 0.10]), batch,
                                'cpu')}
    for name in ['optimised'] + ['compiled'] * settings.compile:
        net = copy.deepcopy(ours)
        model = torch.compile(net) if name == 'compiled' else net
        ema = Averages(net, power([0.05, 0.10]))
        steps[name] = make_step(net, model, adam(net.parameters(), fused=True), ema, batch, 'cpu')
    return settings.compare('EDM2 training step', steps, rounds=5, warmup=1, images=batch, note=f'batch {batch}')


def sampling(settings):
    batch, steps = settings.size(64, 4), settings.size(32, 2)
    ours = _small_network(settings).eval().requires_grad_(False)
    networks = {'plain': plain_network(ours), 'optimised': ours}
    if settings.compile:
        networks['compiled'] = torch.compile(copy.deepcopy(ours))
    noise = torch.randn(batch, ours.img_channels, ours.img_resolution, ours.img_resolution)
    labels = torch.eye(10)[torch.arange(batch) % 10]

    def sample(net):
        with torch.inference_mode():
            return samplers.sample(net, noise, labels, name='edm2', num_steps=steps)

    return settings.compare('EDM2 sampler', {name: functools.partial(sample, net) for name, net in networks.items()},
                            rounds=3, images=batch, note=f'{steps} steps, batch {batch}')


def knn(settings):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, size=[settings.size(50000, 500), 3, 32, 32], dtype=np.uint8)
    queries = images[random.randint(len(images), size=settings.size(1000, 20))] // 2 * 2

    def search(function):
        return function(queries, np.split(images, range(8192, len(images), 8192)), k=2, device='cpu')

    calls = {name: functools.partial(search, function)
             for name, function in (('plain', bench_knn.cdist_neighbors), ('optimised', nearest_neighbors))}
    return settings.compare('nearest 2 of CIFAR', calls, rounds=3, images=len(queries), note=f'among {len(images)}')


def manifolds(settings):
    count, dim = settings.size(10000, 100), settings.size(2048, 16)
    real, fake = (bench_precision_recall.features(count, dim, seed) for seed in (1, 2))
    return settings.compare('precision and recall', {
        'plain': lambda: bench_precision_recall.plain_precision_recall(real, fake, 5),
        'optimised': lambda: precision_recall(real, fake, 5, strict=True)}, rounds=1, note=f'{count} x {dim}, k=5')


def processes(settings):
    """Two gloo processes on two cores against one, each with one thread: training images/s."""
    from benchmarks.bench_processes import measure
    result = measure(settings.size(64, 8), settings.size(6, 2), settings.size('small', 'digits'))
    return [row('2 processes (DDP)', result['one'], result['two'], 0.0, result['batch'],
                f'real time; efficiency {result["one"] / result["two"] / 2:.0%}, by processor time '
                f'{result["one_cpu"] / result["two_cpu"]:.0%}; {result["bytes"] / 2**20:.1f} MiB and '
                f'{result["messages"]} messages a step')]


WORKLOADS = {name: functools.partial(data, name=name) for name in bench_data.WORKLOADS} | {
    'gaussian': gaussian, 'frechet': frechet, 'training': training, 'sampling': sampling, 'knn': knn,
    'precision-recall': manifolds, 'processes': processes}


# --- The table --------------------------------------------------------------------------------------------------------

def table(rows) -> str:
    lines = [f'{"workload":30} {"plain":>10} {"optimised":>10} {"ratio":>7} {"GiB":>6}  ']
    for r in rows:
        lines.append(f'{r["workload"]:30} {r["plain"]:9.4g}s {r["optimised"]:9.4g}s {r["ratio"]:7.2f} {r["memory"]:6.2f}  '
                     f'{r["note"]}')
    return '\n'.join(lines)


EXAMPLES = """\b
Examples:
  python benchmarks/run.py --dest=benchmarks.json
  python benchmarks/run.py --only=training --only=sampling --clock=cpu --threads=1
  python benchmarks/run.py --device=cuda --dest=gpu.json
"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@click.option('--only', metavar='NAME', multiple=True, help='May be given several times: ' + '|'.join(WORKLOADS)
              + '; with --device=cuda: ' + '|'.join(gpu.PARTS))
@click.option('--device', metavar='cpu|cuda', type=click.Choice(['cpu', 'cuda']), default='cpu',
              help='cuda: the workloads of benchmarks/gpu.py')
@click.option('--dest', metavar='FILE.json', default='benchmarks.json', help='Where the table goes as JSON')
@click.option('--clock', metavar='wall|cpu', type=click.Choice(list(CLOCKS)), default='wall',
              help='Real time, or processor time of all processes, for a machine that others use')
@click.option('--threads', metavar='INT', type=click.IntRange(min=1),
              help='Threads, and processes of conversions  [default: all cores]')
@click.option('--rounds', metavar='INT', type=click.IntRange(min=1), help='Measurements of each  [default: by workload]')
@click.option('--compile', metavar='BOOL', type=bool, default=True, help='Measure torch.compile too')
@click.option('--tiny', is_flag=True, help='Sizes that take seconds: whether everything runs')
def main(only, device, dest, clock, threads, rounds, compile, tiny):
    """Compare plain implementations with those of this repository, in turn, in one process."""
    known = gpu.PARTS if device == 'cuda' else WORKLOADS
    for name in only:
        if name not in known:
            raise UserError(f'--only={name} is unknown; there are {", ".join(known)}')
    if device == 'cuda':
        rows = gpu.measure('cuda', tiny, compile, only=only, dest=dest)
        print(gpu.table(rows))
        return
    settings, rows = Settings(tiny, clock, rounds, compile, threads), []
    start = time.time()
    for name in only or WORKLOADS:
        torch.set_num_threads(settings.threads)  # some workloads set it for themselves
        new = WORKLOADS[name](settings)
        rows += new
        print('\n'.join(table(new).splitlines()[1:]), flush=True)
        write_json(dest, {'device': platform.processor() or platform.machine(), 'cores': os.cpu_count(), 'clock': clock,
                          'threads': settings.threads, 'load': os.getloadavg(), 'torch': torch.__version__, 'tiny': tiny,
                          'seconds': time.time() - start, 'rows': rows})
    print(table(rows))


if __name__ == '__main__':
    main()
