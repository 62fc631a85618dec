"""combine_data.py and select_1M.py on 200,000 images of 32x32: speed against cp, and peak memory of both."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click
import numpy as np
import torch

from dnnlib import cli
from training.networks.classifier import WideResNet

CLASSES = 10


def timed(*command) -> float:
    """Seconds that a process takes."""
    before = time.perf_counter()
    subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - before


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
        data = os.path.join(work, 'out')
        os.makedirs(data)
        rng = np.random.default_rng(0)
        for label in range(CLASSES):
            np.save(os.path.join(data, f'{label}.npy'), rng.integers(0, 256, [images // CLASSES, side, side, 3], np.uint8))
        script = [sys.executable, ROOT / 'synthetic_data' / 'combine_data.py', '--data_dir', data, '--output_dir', work,
                  '--class_num', CLASSES, '--file_name', 'all']
        start = [*script[:2], '--help']
        timed(*script)
        whole, copy = os.path.join(work, 'all.npz'), os.path.join(work, 'copy.npz')
        found = {'cp': [], 'combine': [], 'start': []}
        for _ in range(rounds):
            found['cp'].append(timed('cp', whole, copy))
            os.remove(copy)
            os.replace(whole, copy)                            # both write a file that is not there
            found['combine'].append(timed(*script))
            os.remove(copy)
            found['start'].append(timed(*start))
        size = os.path.getsize(whole)
        medians = {name: float(np.median(values)) for name, values in found.items()}
        print(f'{images} images, {size / 2**20:.0f} MiB, {os.cpu_count()} cores; medians of {rounds}')
        print(f'cp                {medians["cp"]:7.3f} s   {size / medians["cp"] / 1e9:.2f} GB/s')
        print(f'combine_data.py   {medians["combine"]:7.3f} s   {medians["combine"] / medians["cp"]:.2f} times cp   peak '
              f'{peak_memory(*script):.0f} MiB')
        work_time = medians['combine'] - medians['start']
        print(f'  of which Python starts for {medians["start"]:.3f} s; without it {work_time / medians["cp"]:.2f} times cp')
        if select:
            weights = os.path.join(work, 'classifier.pt')
            torch.save(WideResNet(model, CLASSES).state_dict(), weights)
            before = time.perf_counter()
            memory = peak_memory(sys.executable, ROOT / 'synthetic_data' / 'select_1M.py', '--model_path', weights,
                                 '--data_dir', data, '--output_dir', work, '--class_num', CLASSES)
            seconds = time.perf_counter() - before
            print(f'select_1M.py      {seconds:7.1f} s   {images / seconds:.0f} images/s with {model}   peak {memory:.0f} MiB')


if __name__ == '__main__':
    main()
