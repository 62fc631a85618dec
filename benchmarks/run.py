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
    from benchmarks.plain_unets import FAMILIES, plain_unet
    from metrics.frechet import frechet_distance
    from metrics.memorization import nearest_neighbors
    from metrics.precision_recall import precision_recall
    from synthetic_data.classify import ClassificationLoss
    from torch_utils.memory import keep_freed
    from training.diffusion import samplers
    from training.diffusion.losses import DDPMLoss, EDM2Loss, EDMLoss
    from training.ema import Averages, power
    from training.networks import build_network, compiled
    from training.networks.layers import DTYPES

from benchmarks import (
    bench_data,
    bench_frechet,
    bench_gaussian,
    bench_knn,
    bench_precision_recall,
    gpu,
)
from benchmarks.bench_training import NETWORKS, make_step
from benchmarks.timing import CLOCKS, PeakMemory, compare, usual_memory

TITLES = {'edm2': 'EDM2', 'edm': 'DDPM++', 'adm': 'ADM', 'ddpm': 'DDPM', 'classifier': 'classifier'}


class Settings:
    """How to measure: `tiny` sizes show that everything runs; `clock` is one of CLOCKS."""

    def __init__(self, tiny=False, clock='wall', rounds=None, compile=True, threads=None):
        self.tiny, self.clock, self.rounds, self.compile = tiny, clock, rounds, compile
        self.threads = threads or core_count()

    def size(self, full, tiny):
        return tiny if self.tiny else full

    def compare(self, workload, candidates, rounds, warmup=0, images=None, note='', prepare=None) -> list[dict]:
        """Rows of every candidate after the first, which is the plain one; memory is that of the first call."""
        used = {}
        for name, function in candidates.items():
            with PeakMemory() as memory:
                function()
            used[name] = memory.gib
        seconds = compare(candidates, self.rounds or self.size(rounds, 1), warmup, CLOCKS[self.clock], prepare)
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


def _small_network(settings, family, precision='fp32'):
    """(the network of a family, the same written plainly)"""
    torch.manual_seed(0)
    if family == 'edm2':
        net = build_network('Precond', precision=precision, **NETWORKS[settings.size('small', 'digits')])
        return net, plain_network(net)
    class_name, kwargs = FAMILIES[family]
    if 'network' in kwargs:
        kwargs = kwargs | {'network': kwargs['network'] | {'precision': precision}}
    elif family != 'classifier':
        kwargs = kwargs | {'precision': precision}
    net = build_network(class_name, **kwargs)
    if family == 'classifier':
        net.img_channels, net.img_resolution, net.label_dim = 3, 16, 10
    return net, plain_unet(net)


def _objective(family, net, precision='fp32'):
    if family == 'classifier':
        return ClassificationLoss(pad=2, xflip=True, smoothing=0.1, dtype=DTYPES[precision])
    if family.startswith('edm'):
        return EDM2Loss() if family == 'edm2' else EDMLoss()
    return DDPMLoss(net.diffusion)


def _memory(name):
    (usual_memory if name == 'plain' else keep_freed)()


def training(settings, family='edm2'):
    """One step: loss, backward pass, optimizer and averages; as torch has them (plain), or all tensors in one call."""
    batch = settings.size(64, 4)
    ours, plain = _small_network(settings, family)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.99))
    if family == 'classifier':
        optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = {}
    for name in ['plain', 'optimised'] + ['compiled'] * settings.compile:
        net = (plain if name == 'plain' else copy.deepcopy(ours)).train()
        model = compiled(net) if name == 'compiled' else net
        how = {'foreach': False} if name == 'plain' else {'fused': True}
        ema = PlainEMA(net, [0.05, 0.10]) if name == 'plain' else Averages(net, power([0.05, 0.10]))
        weights = [p for p in net.parameters() if p.requires_grad]
        steps[name] = make_step(net, model, optimizer(weights, **how), ema, batch, 'cpu', _objective(family, net))
    return settings.compare(f'{TITLES[family]} training step', steps, rounds=5, images=batch, note=f'batch {batch}',
                            prepare=_memory)


def sampling(settings, family='edm2'):
    """Images by the sampler of the family; of classifiers, the scores of images."""
    batch, steps = settings.size(64, 4), settings.size(8, 2)
    networks = dict(zip(('optimised', 'plain'), _small_network(settings, family), strict=True))
    networks = {name: networks[name].eval().requires_grad_(False) for name in ('plain', 'optimised')}
    ours = networks['optimised']
    if settings.compile:
        networks['compiled'] = compiled(copy.deepcopy(ours))
    noise = torch.randn(batch, ours.img_channels, ours.img_resolution, ours.img_resolution)
    labels = torch.eye(10)[torch.arange(batch) % 10] if ours.label_dim else None

    def sample(net):
        with torch.inference_mode():
            if family == 'classifier':
                return [net(noise) for _ in range(steps)]
            name = family if family.startswith('edm') else 'ddim'
            return samplers.sample(net, noise, labels, name=name, num_steps=steps)

    return settings.compare(f'{TITLES[family]} sampler',
                            {name: functools.partial(sample, net) for name, net in networks.items()},
                            rounds=3, images=batch, note=f'{steps} steps, batch {batch}', prepare=_memory)


def halves(settings, family):
    """The same network in bfloat16 (here in the place of the optimised one) and in float32: a step, and an evaluation."""
    batch, rows = settings.size(64, 4), []
    steps, scores = {}, {}
    for name, precision in (('plain', 'fp32'), ('optimised', 'bf16')):
        net, _ = _small_network(settings, family, precision)
        weights = [p for p in net.parameters() if p.requires_grad]
        steps[name] = make_step(net, net, torch.optim.SGD(weights, lr=1e-4, fused=True), Averages(net, power([0.05])), batch,
                                'cpu', _objective(family, net, precision))
        scores[name] = functools.partial(_evaluate, copy.deepcopy(net).eval(), batch, precision)
    for title, calls in (('training step', steps), ('evaluation', scores)):
        rows += settings.compare(f'{TITLES[family]} {title}, bf16', calls, rounds=5, warmup=1, images=batch,
                                 note=f'batch {batch}, against fp32')
    return rows


def _evaluate(net, batch, precision):
    images = torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution)
    labels = torch.eye(10)[torch.arange(batch) % 10] if net.label_dim else None
    with torch.inference_mode(), torch.autocast('cpu', DTYPES[precision], enabled=net.class_name == 'WideResNet'
                                                and precision != 'fp32'):
        return net(images) if net.class_name == 'WideResNet' else net(images, torch.tensor(1.0), labels)


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
    'precision-recall': manifolds, 'processes': processes} | {
    f'{name}-{family}': functools.partial(function, family=family)
    for name, function in (('training', training), ('sampling', sampling), ('bf16', halves))
    for family in TITLES if name == 'bf16' or family != 'edm2'}


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
