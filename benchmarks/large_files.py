"""Honest files of the largest kinds: seconds and memory that opening each of them takes, in a process of its own.

    python benchmarks/large_files.py FOLDER                   makes them in FOLDER (5 GB), and opens them
    python benchmarks/large_files.py FOLDER --tree=OTHER      opens them with another checkout of this project
"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NAMES, CLASSES = 1_300_000, 21_841
CASES = {}  # file -> (what it is, how it is opened)


def case(file, what, opened):
    """Decorator: the function makes `file` at a path."""
    def register(make):
        CASES[file] = what, opened, make
        return make
    return register


def _weights():
    import torch
    return {f'layer{i}.weight': torch.full([1024, 1024], float(i)) for i in range(256)}


@case('checkpoint.pt', 'checkpoint of 1 GB', 'from training.checkpoint import Checkpoints\nCheckpoints("").load(path)')
def checkpoint(path):
    from training.snapshot import write_state
    write_state(str(path), dict(net=_weights(), nimg=0, means={}, ema={}, optimizer={}, batches=[], recipe={},
                                train_seconds=0.0))


@case('foreign.pt', 'foreign weights of 1 GB', 'from torch_utils.files.identify import identify\nidentify(path)')
def foreign(path):
    import torch
    torch.save({'ema_model': _weights(), 'step': 1}, path)


@case('legacy.pt', 'the same in the older format', 'from torch_utils.files.identify import identify\nidentify(path)')
def legacy(path):
    import torch
    torch.save({'ema_model': _weights()}, path, _use_new_zipfile_serialization=False)


OPEN_DATA = 'from training.data.dataset import ImageDataset\nImageDataset(path, cache=False).images(range(100))'


@case('names.zip', f'data set of {NAMES:,} images with labels', OPEN_DATA)
def names(path):
    _data_set(path, NAMES, 1000, None)


@case('classes.zip', f'data set of {CLASSES:,} classes with names', OPEN_DATA)
def classes(path):
    _data_set(path, 2 * CLASSES, CLASSES, [f'class number {i}' for i in range(CLASSES)])


def _data_set(path, count, num_classes, class_names):
    from dnnlib.image_io import encode_png
    from training.data.archive import ArchiveWriter, image_name
    files = [image_name(i) for i in range(count)]
    png = np.frombuffer(encode_png(np.zeros([8, 8, 3], np.uint8)), np.uint8)
    with ArchiveWriter(str(path), overwrite=True, sync=False) as out:
        for start in range(0, count, 10_000):
            part = files[start:start + 10_000]
            out.add_alike(part, np.tile(png, (len(part), 1)), [zlib.crc32(png)] * len(part))
        out.describe(files, np.arange(count) % num_classes, {'class_names': class_names})


@case('images.npz', '.npz of 50,000 images', 'from training.data.images import open_images\nopen_images(path).images(range(100))')
def images(path):
    np.savez(path, arr_0=np.zeros([50_000, 32, 32, 3], np.uint8), arr_1=np.arange(50_000) % 10)


@case('statistics.npz', 'statistics of 2048 dimensions', 'from metrics.statistics import load_statistics\nload_statistics(path)')
def statistics(path):
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))


@case('picture.png', 'PNG of 80 million pixels', 'from dnnlib.image_io import decode_image\ndecode_image(open(path, "rb").read())')
def picture(path):
    import PIL.Image
    noise = np.random.default_rng(0).integers(0, 256, [8000, 10_000, 3], np.uint8)
    PIL.Image.fromarray(noise).save(path, compress_level=1)


def measure(tree: Path, path: Path, rounds: int) -> tuple[float, int]:
    """(least seconds of the processor, most MiB) of opening a file once, beyond what the imports take."""
    imports, _, call = CASES[path.name][1].partition('\n')
    # The usual measure of the most memory has that of the parent as well.
    code = f'{imports}\nimport json, re, time\npath = {str(path)!r}\n' \
        'most = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])\n' \
        f'before, start = most(), time.process_time()\n{call}\n' \
        'print(json.dumps([time.process_time() - start, (most() - before) // 1024]))'
    found = []
    for _ in range(rounds):
        result = subprocess.run([sys.executable, '-c', code], cwd=tree, text=True, capture_output=True, check=True,
                                env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(tree)})
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return min(seconds for seconds, _ in found), max(mib for _, mib in found)


@click.command()
@click.argument('folder', type=click.Path(file_okay=False, resolve_path=True, path_type=Path))
@click.option('--tree', 'trees', multiple=True, default=[ROOT], type=click.Path(exists=True, resolve_path=True, path_type=Path),
              help='Checkouts, side by side  [default: this one]')
@click.option('--rounds', type=int, default=3, show_default=True, help='Times that each is opened')
@click.argument('files', nargs=-1)
def main(folder, trees, rounds, files):
    """Opens large files in FOLDER (all, or FILES), which are made where they are missing."""
    sys.path.insert(0, str(ROOT))
    folder.mkdir(parents=True, exist_ok=True)
    print(f'{"file":44}' + ''.join(f'{tree.name:>24}' for tree in trees))
    for file in files or CASES:
        what, _, make = CASES[file]
        if not (folder / file).exists():
            make(folder / file)
        found = [measure(tree, folder / file, rounds) for tree in trees]
        print(f'{what:44}' + ''.join(f'{seconds:12.2f} s {mib:6} MiB' for seconds, mib in found), flush=True)


if __name__ == '__main__':
    main()
