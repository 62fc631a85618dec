"""Conversion of pictures to archives: ours against Pillow and zipfile, picture by picture. In a process without torch, as
dataset_tool.py is: worker processes are forked from it, and a large one takes longer.

Real pictures are taken from $PICTURES (or ../shared/data beside the checkout) where they are; else made-up ones.
"""

import io
import os
import pickle
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import PIL.Image

from benchmarks.timing import CLOCKS, PeakMemory, compare
from dnnlib import cli
from dnnlib.image_io import decode_image
from dnnlib.util import write_json
from torch_utils.files import pickles
from training.data.archive import ArchiveReader
from training.data.convert import convert, everything
from training.data.sources import open_source

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = {  # name: (kind of source, pictures, --resolution, --transform)
    'cifar-png': ('png', 2000, None, None),
    'cifar-tar': ('cifar', 50000, None, None),
    'cifar-tar-16': ('cifar', 50000, (16, 16), None),
    'jpeg-64': ('jpeg', 198, (64, 64), 'center-crop-dhariwal'),
    'jpeg-256': ('jpeg', 198, (256, 256), 'center-crop-dhariwal'),
}


# --- The plain way ----------------------------------------------------------------------------------------------------

def _plain_pictures(path):
    """Pixels [h,w,3] of a folder of pictures or of CIFAR's archive."""
    if os.path.isdir(path):
        for folder, _, names in sorted(os.walk(path)):
            for name in sorted(names):
                yield np.array(PIL.Image.open(os.path.join(folder, name)).convert('RGB'))
        return
    with tarfile.open(path, 'r:gz') as tar:
        for name in [f'cifar-10-batches-py/data_batch_{i}' for i in range(1, 6)]:
            batch = pickles.load(tar.extractfile(name).read(), pickles.NUMPY_ARRAYS)  # pickles are read safely both ways
            for image in batch['data'].array().reshape(-1, 3, 32, 32):
                yield image.transpose(1, 2, 0)


def _plain_transform(pixels, resolution, transform):
    if resolution is None:
        return pixels
    side = resolution[0]
    if transform is None:
        return np.array(PIL.Image.fromarray(pixels).resize(resolution, PIL.Image.Resampling.LANCZOS))
    image = PIL.Image.fromarray(pixels)
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=PIL.Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top:top + side, left:left + side]


def plain_convert(path, dest, resolution, transform):
    """An archive of PNG files without compression, in one process."""
    with zipfile.ZipFile(dest, 'w', compression=zipfile.ZIP_STORED) as out:
        for i, pixels in enumerate(_plain_pictures(path)):
            pixels = np.ascontiguousarray(_plain_transform(pixels, resolution, transform))
            png = io.BytesIO()
            PIL.Image.fromarray(pixels).save(png, format='png', compress_level=0, optimize=False)
            out.writestr(f'{i // 1000:05d}/img{i:08d}.png', png.getvalue())


# --- Sources ----------------------------------------------------------------------------------------------------------

def pictures_folder() -> Path:
    return Path(os.environ.get('PICTURES', ROOT.parent / 'shared' / 'data'))


def _smooth(random, count, height, width):
    """Pictures with the smoothness of photographs, uint8 [count,h,w,3]."""
    coarse = random.randint(0, 256, (count, height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    images = [np.asarray(PIL.Image.fromarray(x).resize((width, height), PIL.Image.Resampling.BICUBIC)) for x in coarse]
    return np.stack(images)


def make_source(kind: str, count: int, folder: Path) -> Path:
    """A folder of `count` PNG or JPEG pictures, or CIFAR's archive of as many, in `folder`."""
    random, real = np.random.RandomState(0), pictures_folder()
    small = real / 'cifar10-small' / 'cifar-10-python.tar.gz'
    path = folder / kind
    if kind == 'jpeg':
        path.mkdir()
        if (real / 'imagenet-mini.tar').is_file():
            with tarfile.open(real / 'imagenet-mini.tar') as tar:
                tar.extractall(path, members=[m for m in tar.getmembers() if m.isfile()][:count], filter='data')
        else:
            for i in range(count):
                PIL.Image.fromarray(_smooth(random, 1, 375, 500)[0]).save(path / f'{i:05d}.jpg', quality=90)
        return path
    if small.is_file():
        opened = open_source(str(small))
        images = opened.stack(np.arange(count) % len(opened))
    else:
        images = _smooth(random, count, 32, 32)
    if kind == 'png':
        path.mkdir()
        for i, image in enumerate(images):
            PIL.Image.fromarray(image).save(path / f'{i:05d}.png')
        return path
    path = folder / 'cifar-10-python.tar.gz'
    names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    parts = {f'data_batch_{i + 1}': part for i, part in enumerate(np.array_split(images, 5))}
    parts['test_batch'] = parts['data_batch_1']  # as large, in the original
    batches = {'batches.meta': {'label_names': names}}
    batches |= {name: {'data': part, 'labels': [k % 10 for k in range(len(part))]} for name, part in parts.items()}
    with tarfile.open(path, 'w:gz', compresslevel=1) as tar:
        for name, batch in batches.items():
            if 'data' in batch:
                batch['data'] = np.ascontiguousarray(batch['data'].transpose(0, 3, 1, 2)).reshape(len(batch['data']), 3072)
            data = pickle.dumps(batch, protocol=3)  # pixels as they are, as in the original; protocol 2 would make text of them
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# --- The comparison ---------------------------------------------------------------------------------------------------

def _same_pixels(one, other) -> bool:
    readers = [ArchiveReader(str(path)) for path in (one, other)]
    names = [[name for name in reader.names if name.endswith('.png')] for reader in readers]
    return len(names[0]) == len(names[1]) and all(
        np.array_equal(decode_image(readers[0].read(readers[0].find(a))), decode_image(readers[1].read(readers[1].find(b))))
        for a, b in zip(*names, strict=True))


def run(name: str, count: int | None = None, workers: int | None = None, rounds: int = 3,
        clock: str = 'wall') -> dict:
    """Times a workload both ways: {'images', 'plain': s, 'optimised': s, 'memory': GiB, 'same': equal pixels}."""
    kind, number, resolution, transform = WORKLOADS[name]
    count = count or number
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = make_source(kind, count, folder)
        written = {'plain': [], 'ours': []}

        def new(way):  # replacing a file would wait for the disk
            written[way].append(folder / f'{way}-{len(written[way])}.zip')
            return str(written[way][-1])

        def optimised():
            opened = open_source(str(source))
            convert(opened, everything(opened), new('ours'), resolution=resolution, transform=transform, workers=workers)

        with PeakMemory() as memory:
            optimised()
        seconds = compare({'plain': lambda: plain_convert(source, new('plain'), resolution, transform),
                           'optimised': optimised}, rounds, warmup=0, clock=CLOCKS[clock])
        same = _same_pixels(written['plain'][-1], written['ours'][-1])
        return {'images': count, **seconds, 'memory': memory.gib, 'same': same}


@click.command(cls=cli.Command)
@click.option('--only', metavar='NAME', type=click.Choice(list(WORKLOADS)), multiple=True, help='|'.join(WORKLOADS))
@click.option('--images', metavar='INT', type=click.IntRange(min=5), help='Pictures of each  [default: of the workload]')
@click.option('--workers', metavar='INT', type=click.IntRange(min=1), help='Processes  [default: one for each core]')
@click.option('--rounds', metavar='INT', type=click.IntRange(min=1), default=3, help='Measurements of each')
@click.option('--dest', metavar='FILE.json', help='Write the figures as JSON too')
@click.option('--clock', type=click.Choice(list(CLOCKS)), default='wall', help='Real time, or processor time of all processes')
def main(only, images, workers, rounds, dest, clock):
    """Times conversions to archives and compares the pixels."""
    rows = {}
    for name in only or WORKLOADS:
        row = rows[name] = run(name, images, workers, rounds, clock)
        print(f'{name:14} plain {row["images"] / row["plain"]:8.0f} images/s, ours {row["images"] / row["optimised"]:8.0f}, '
              f'ratio {row["plain"] / row["optimised"]:5.1f}, {row["memory"]:.2f} GiB, same pixels: {row["same"]}')
    if dest:
        write_json(dest, rows)


if __name__ == '__main__':
    main()
