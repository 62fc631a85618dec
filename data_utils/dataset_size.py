"""Data sets of growing size: each contains the smaller ones."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common


@common.command
@click.option('--max-images', metavar='INT', type=click.IntRange(min=1), required=True,
              help='Size: as many of each class, the first ones')
def main(source, max_images):
    """Make a class-balanced data set of a given size.

    It has the first images of each class, class after class, so that larger sets contain the
    smaller ones. A class that is too small gives what it has, and the script says so.

    \b
    for n in 1000 2000 5000 10000; do
        python data_utils/dataset_size.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
            --dest=datasets/cifar10/data_size/cifar10-$n.zip --max-images=$n
    done
    """
    indices = common.by_size(source, max_images)
    return source, common.choose(source, indices, 'size', max_images=max_images)


if __name__ == '__main__':
    main()
