"""Data sets of a given resolution and size."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from data_utils import common
from dnnlib import UserError, options


@common.command
@options.integer('--max-images', None, 'Use at most this many, the first ones')
@click.option('--balanced', is_flag=True,
              help='With --max-images: as many of each class, class after class')
def main(source, max_images, balanced):
    """Make a data set of pictures, of a given resolution and size.

    --source is all that dataset_tool.py convert reads. With --max-images it takes the first images
    of the source, whatever their classes; with --balanced, those that dataset_size.py takes.

    \b
    python data_utils/dataset_tool.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/data_dimension/cifar10-16x16-2000.zip --resolution=16x16 \\
        --max-images=2000
    """
    if balanced and not max_images:
        raise UserError('says which images --max-images takes: give that too', 'balanced')
    rule = 'size' if balanced else 'first images' if max_images else 'all'
    indices = common.by_size(source, max_images if balanced else None)[:max_images]
    return source, common.choose(source, indices, rule, max_images=max_images)


if __name__ == '__main__':
    main()
