"""A long training with a snapshot, a grid and a checkpoint every few steps: does anything grow?

Memory, open files, threads and processor time of each step are read from outside while it runs, and the last tenth of
the run is compared with the first (without its first two reports, when caches fill).
"""

import json
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
import psutil

from dnnlib import UserError, cli
from dnnlib.util import write_json

BATCH = 16


def read(process: psutil.Process) -> dict:
    with process.oneshot():
        cpu = process.cpu_times()
        return {'memory (MiB)': process.memory_info().rss / 2**20, 'open files': process.num_fds(),
                'threads': process.num_threads(), 'cpu': cpu.user + cpu.system, 'time': time.time()}


def soak(folder: str, steps: int, every: int) -> list[dict]:
    """A row of `read`, with the number of steps, for each report of the run."""
    def script(name, *args):
        return [sys.executable, str(ROOT / name), *args]

    data = os.path.join(folder, 'digits.zip')
    subprocess.run(script('dataset_tool.py', 'convert', '--source=digits', f'--dest={data}'), check=True,
                   stdout=subprocess.DEVNULL)
    images = every * BATCH
    run = os.path.join(folder, 'run')
    process = subprocess.Popen(script(
        'train_edm2.py', f'--outdir={run}', f'--data={data}', '--preset=digits', '--channels=8', f'--batch={BATCH}',
        f'--duration={steps * BATCH}', f'--status={images}', f'--snapshot={images}', f'--checkpoint={images}'),
        stdout=subprocess.DEVNULL, env=os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    watched = psutil.Process(process.pid)
    stats = os.path.join(run, 'stats.jsonl')
    rows = []
    while process.poll() is None:
        time.sleep(0.05)
        if os.path.exists(stats):
            with open(stats) as file:
                lines = file.read().splitlines()
            if len(lines) > len(rows):
                try:
                    rows.append({'steps': json.loads(lines[len(rows)])['nimg'] // BATCH} | read(watched))
                except (psutil.Error, ValueError):             # it has just ended, or half a line
                    pass
                if len(rows) % 10 == 1:
                    print(' '.join(f'{name} {value:.0f}' for name, value in rows[-1].items() if name != 'time'), flush=True)
    if process.returncode:
        raise UserError(f'the training ended with status {process.returncode}')
    return rows


def summary(rows: list[dict]) -> dict[str, list[float]]:
    """{what: [first tenth, last tenth]} of means; times are those of a step with all that it writes."""
    rows = rows[2:]
    tenth = max(len(rows) // 10, 2)
    result = {}
    for name in ('memory (MiB)', 'open files', 'threads'):
        values = [row[name] for row in rows]
        result[name] = [float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))]
    for name in ('cpu', 'time'):
        result[f'{name} (ms/step)'] = [
            1000 * (part[-1][name] - part[0][name]) / (part[-1]['steps'] - part[0]['steps'])
            for part in (rows[:tenth], rows[-tenth:])]
    return result


@click.command(cls=cli.Command, epilog='Example: python benchmarks/soak.py --steps=20000 --dest=soak.json')
@click.option('--steps', metavar='INT', type=click.IntRange(min=100), default=20000, help='Steps of training.')
@click.option('--every', metavar='INT', type=click.IntRange(min=1), default=200,
              help='Steps between two reports, snapshots, grids and checkpoints.')
@click.option('--dest', metavar='JSON', type=str, help='Writes the table here.')
def main(steps, every, dest):
    """Trains a tiny network for long, and compares the first tenth with the last."""
    if steps < 6 * every:
        raise UserError(f'must be at least six times {every}', 'steps', steps)
    with tempfile.TemporaryDirectory() as folder:
        table = summary(soak(folder, steps, every))
    print(f'{"":16} first tenth  last tenth')
    for name, (first, last) in table.items():
        print(f'{name:16} {first:11.2f} {last:11.2f}')
    if dest:
        write_json(dest, table)


if __name__ == '__main__':
    main()
