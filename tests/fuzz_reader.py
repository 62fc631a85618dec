"""Fuzz the readers of files: good files with bytes changed, cut, doubled and shuffled must end in UserError or be read.

    python tests/fuzz_reader.py --seconds=60
"""

import pickle
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from dnnlib import UserError  # noqa: E402
from snapshot_tool import describe  # noqa: E402
from torch_utils.files import pickles  # noqa: E402
from torch_utils.files.identify import identify  # noqa: E402
from training import encoders  # noqa: E402
from training.networks import build_network  # noqa: E402
from training.snapshot import load_snapshot, save_snapshot  # noqa: E402

PICKLES = Path(__file__).parent / 'golden' / 'pickles'
MEMORY = 2 << 30


def seeds(folder: Path) -> list[bytes]:
    """Small good files of every layout."""
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=2, model_channels=8, channel_mult=[1],
                        num_blocks=1, attn_resolutions=[])
    path = folder / 'seed'
    made = [file.read_bytes() for file in sorted(PICKLES.glob('*.pkl'))]

    def keep():
        made.append(path.read_bytes())

    save_snapshot(str(path), net, encoder=encoders.RGBEncoder(), dataset={}, recipe={'a': 1}, nimg=1)
    keep()
    for new in (True, False):
        torch.save({'ema_model': net.state_dict(), 'step': 1}, path, _use_new_zipfile_serialization=new)
        keep()
    for save in (np.savez, np.savez_compressed):
        with open(path, 'wb') as file:
            save(file, mu=np.zeros(3), sigma=np.eye(3))
        keep()
    import safetensors.torch
    return [*made, pickle.dumps({'fid': dict(mu=np.zeros(3), sigma=np.eye(3))}, 4),
            pickle.dumps({'data': np.zeros([2, 3072], np.uint8), 'labels': [0, 1]}, 2),
            safetensors.torch.save({'a': torch.zeros(3, 4)})]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to ten changes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 10])):
        if not data:
            break
        # Headers and the ends of files, where directories are, decide more than the numbers in the middle.
        place = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 3000)),
                            len(data) - 1 - rng.randrange(min(len(data), 1500))])
        size = rng.choice([1, 1, 4, 8, 100, 5000])
        action = rng.randrange(6)
        if action == 0:
            data[place] = rng.randrange(256)
        elif action == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 2:
            del data[place:place + size]
        elif action == 3:
            data[place:place] = data[place:place + size]
        elif action == 4:
            data[place:place + size] = rng.choice([b'\xff', b'\x00', b'\x80', b'R', b'b', b'0', b'}']) * min(size, 8)
        else:
            del data[place:]
    return bytes(data)


@click.command()
@click.option('--seconds', type=float, default=60, show_default=True, help='How long')
@click.option('--seed', type=int, default=0, show_default=True, help='Which changes')
def main(seconds, seed):
    """Fuzz the readers of files; ends with exit code 1 and the file's place at the first unexpected error."""
    rng, refused, read, start = random.Random(seed), 0, 0, time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        good, path = seeds(Path(folder)), Path(folder) / 'fuzzed'
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        while time.monotonic() - start < seconds or not read + refused:
            path.write_bytes(mutate(rng.choice(good), rng))
            try:
                found = identify(str(path))
                describe(found)
                if found.kind in ('snapshot', 'edm'):
                    load_snapshot(str(path))
                read += 1
            except (UserError, pickles.ForeignPickleError) as error:
                if '\n' in str(error):
                    raise AssertionError(f'more than one line: {error}') from error
                refused += 1
            except Exception:
                kept = Path(tempfile.mkdtemp()) / 'crash'
                kept.write_bytes(path.read_bytes())
                print(f'Unexpected error after {read + refused} files, with {kept}:', file=sys.stderr)
                raise
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    print(f'{refused} files refused, {read} files read, memory grew by {grown >> 20} MiB')
    if grown > MEMORY:
        sys.exit('memory grew without bound')


if __name__ == '__main__':
    main()
