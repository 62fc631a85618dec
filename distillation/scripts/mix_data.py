"""Mix real images with synthetic ones: the data-limited setting of distillation."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dnnlib import UserError, cli, options, progress
from dnnlib.image_io import encode_png
from training.data.archive import ArchiveWriter
from training.data.images import open_dataset, pixels_of


def mixture(total: int, share: float, num_real: int, num_synthetic: int, seed: int = 0):
    """(real, synthetic) indices of round(total share) real images and synthetic ones for the rest.

    All are chosen without replacement.
    """
    num = round(total * share)
    generator = np.random.RandomState(seed)
    chosen = []
    for name, count, available in (('real', num, num_real),
                                   ('synthetic', total - num, num_synthetic)):
        if not 0 <= count <= available:
            raise UserError(f'a mixture of {total} with a share of {share} takes {count} of '
                            f'{available} {name} images')
        chosen.append(generator.choice(available, count, replace=False))
    return chosen


@click.command(cls=cli.Command, epilog="""\b
Example:
  # As many images as the real set has, a tenth of them real
  python scripts/mix_data.py --real datasets/cifar10.zip --share 0.1 --dest datasets/mix-0.1 \\
      --synthetic experiments/samples/samples_50000x32x32x3.npz
""")
@options.text('DIR|ZIP|NPZ', '--real', 'Real images', required=True)
@options.text('DIR|ZIP|NPZ', '--synthetic', "The teacher's samples", required=True)
@options.text('FLOAT', '--share', 'Share of real images', type=options.FRACTION, required=True)
@options.integer('--count', None, 'Images in all  [default: as many as --real has]')
@options.pictures
@options.seed('--seed', 0, 'Seed of the choice', click.IntRange(0, 2**32 - 1))
@options.text('DIR|ZIP', '--dest', 'Folder or zip to write, for image_train.py', required=True,
              type=cli.ATOMIC)
def main(real, synthetic, share, count, seed, dest):
    """Write round(count share) real images and as many synthetic ones as are left.

    All are chosen without replacement. The files are 000000.png, 000001.png, ..., real images
    first; dataset.json says where each comes from.
    """
    folders = [pixels_of(open_dataset(path, cache=False)) for path in (real, synthetic)]
    shapes = [folder.image_shape for folder in folders]
    if shapes[0] != shapes[1]:
        raise UserError(f'--real has images of {shapes[0]}, --synthetic of {shapes[1]}')
    chosen = mixture(count or len(folders[0]), share, *map(len, folders), seed)
    pairs = [(folder, index) for folder, indices in zip(folders, chosen, strict=True)
             for index in indices]
    with ArchiveWriter(dest) as out:
        bar = progress.bar(pairs, unit='img', leave=False)
        for number, (folder, index) in enumerate(bar):
            image, = folder.images([index])
            out.add(f'{number:06d}.png', encode_png(image.transpose(1, 2, 0)))
        real_indices, synthetic_indices = (indices.tolist() for indices in chosen)
        out.add_description({'labels': None, 'selection': {
            'rule': 'mixture', 'real': real, 'synthetic': synthetic, 'share': share, 'seed': seed,
            'real images': real_indices, 'synthetic images': synthetic_indices}})
    print(f'{dest}: {len(chosen[0])} real and {len(chosen[1])} synthetic images')


if __name__ == '__main__':
    main()
