"""Data sets of one size with few or many classes."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common, selection
from training.data import convert


@common.command
@click.option('--max-images', metavar='INT', type=click.IntRange(min=1), required=True,
              help='Images in all')
@click.option('--num-classes', metavar='INT', type=int, required=True,
              help='The first so many classes, in equal shares')
def main(source, max_images, num_classes):
    """Make a data set of a given size with a given number of classes.

    It has the first images of each class, class after class; what does not divide evenly comes
    from the last class. A class that is too small gives what it has, and the script says so.

    \b
    python data_utils/dataset_diversity.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/data_diversity/cifar10-2-2000.zip --max-images=2000 --num-classes=2
    """
    indices = selection.diversity_subset(convert.class_labels(source), max_images, num_classes)
    common.noted(source, indices, max_images, num_classes)
    return source, common.choose(source, indices, 'diversity', num_classes=num_classes,
                                 max_images=max_images)


if __name__ == '__main__':
    main()
