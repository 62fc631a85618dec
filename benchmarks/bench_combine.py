"""combine_data.py and select_1M.py on 200,000 images of 32x32: speed against cp, and peak memory of both.

Class files are written by `ClassWriter`, as generate.py does, so that their records have the checksums; "other files" are
the same without. All processes are timed whole, in turn, with files in the cache of the system.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click
import numpy as np

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from training.networks.classifier import WideResNet


from synthetic_data.class_files import ClassWriter

CLASSES = 10


def write_classes(folder: str, images: int, side: int):
    """Random images of ten classes, by what generate.py writes with."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        writer = ClassWriter(folder, label)
        writer.prepare(np.arange(images // CLASSES), {'network': 'random'}, (side, side, 3))
        for start, stop in writer.open().missing(2048):
            writer.write(start, rng.integers(0, 256, [stop - start, side, side, 3], np.uint8))
        writer.finish()


def timed(*command) -> float:
    """Seconds that a process takes."""
    before = time.perf_counter()
    subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - before


def compare(scripts: dict, whole: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each command that writes `whole`, and of cp of it; all write a file that is not there, in turn."""
    kept, found = whole + '.kept', {name: [] for name in ('cp', *scripts)}
    for script in scripts.values():                            # everything is in the cache, and compiled
        timed(*script)
    os.replace(whole, kept)
    os.sync()                                                  # what was written for the comparison disturbs it no longer
    for _ in range(rounds):
        for name, command in {'cp': ('cp', kept, whole), **scripts}.items():
            found[name].append(timed(*command))
            if os.path.exists(whole):
                os.remove(whole)
    os.replace(kept, whole)
    return found


def peak_memory(*command) -> float:
    """Peak memory (MiB) of a process. It is started from a small one: a child begins with the memory of its parent."""
    code = 'import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); ' \
           'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'
    result = subprocess.run([sys.executable, '-c', code, *map(str, command)], capture_output=True, text=True, check=True)
    return int(result.stdout) / 1024


@click.command(cls=cli.Command)
@click.option('--images', metavar='INT', type=int, default=200_000, help='Images in all, of ten classes')
@click.option('--side', metavar='INT', type=int, default=32, help='Width and height')
@click.option('--rounds', metavar='INT', type=int, default=5, help='Repetitions; the median counts')
@click.option('--model', metavar='wrn-D-W', default='wrn-10-1', help='Classifier of random weights for select_1M.py')
@click.option('--select/--no-select', default=True, help='Run select_1M.py too (minutes on a CPU)')
@click.option('--folder', metavar='DIR', help='Where to work, on the disk in question  [default: a temporary folder]')
def main(images, side, rounds, model, select, folder):
    """Times combine_data.py against cp of the same bytes (warm cache, in turn), and measures peak memory.

    \b
    Examples:
      python benchmarks/bench_combine.py
      python benchmarks/bench_combine.py --images=5000000 --no-select --folder=/data
    """
    with tempfile.TemporaryDirectory(dir=folder) as work:
        os.environ.pop('PYTHONDONTWRITEBYTECODE', None)        # as for all users, scripts are compiled once
        os.environ['PYTHONPYCACHEPREFIX'] = os.path.join(work, 'compiled')
        data, others = os.path.join(work, 'out'), os.path.join(work, 'others')
        write_classes(data, images, side)
        os.makedirs(others)
        for label in range(CLASSES):
            shutil.copyfile(os.path.join(data, f'{label}.npy'), os.path.join(others, f'{label}.npy'))
        combine = [sys.executable, ROOT / 'synthetic_data' / 'combine_data.py', '--output_dir', work, '--class_num', CLASSES,
                   '--file_name', 'all', '--data_dir']
        scripts = {'generated files': [*combine, data], 'other files': [*combine, others], 'start': [*combine[:2], '--help']}
        whole = os.path.join(work, 'all.npz')
        found = compare(scripts, whole, rounds)
        size = os.path.getsize(whole)
        median = {name: float(np.median(values)) for name, values in found.items()}
        print(f'{images} images, {size / 2**20:.0f} MiB, {os.cpu_count()} cores; medians of {rounds}')
        print(f'cp                              {median["cp"]:7.3f} s   {size / median["cp"] / 1e9:.2f} GB/s')
        for name in ('generated files', 'other files'):
            ratio = np.median(np.divide(found[name], found['cp']))
            ratio_of_work = np.median(np.subtract(found[name], found['start']) / found['cp'])
            print(f'combine_data.py {name:16}{median[name]:7.3f} s   {ratio:.2f} times cp, without the start of Python '
                  f'{ratio_of_work:.2f}   peak {peak_memory(*scripts[name]):.0f} MiB')
        print(f'  start of Python               {median["start"]:7.3f} s')
        if select:
            weights = os.path.join(work, 'classifier.pt')
            torch.save(WideResNet(model, CLASSES).state_dict(), weights)
            before = time.perf_counter()
            memory = peak_memory(sys.executable, ROOT / 'synthetic_data' / 'select_1M.py', '--model_path', weights,
                                 '--data_dir', data, '--output_dir', work, '--class_num', CLASSES)
            seconds = time.perf_counter() - before
            print(f'select_1M.py                    {seconds:7.1f} s   {images / seconds:.0f} images/s with {model}   peak '
                  f'{memory:.0f} MiB')


if __name__ == '__main__':
    main()
