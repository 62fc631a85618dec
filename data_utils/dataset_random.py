"""Data sets whose labels say nothing about the images."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common
from training.data import selection


@common.command
@common.max_images_option
@click.option('--num-classes', metavar='INT', type=click.IntRange(min=1), help='Labels to draw from  [default: as the source]')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=1024, help='Of the labels')
def main(source, dest, coarse, overwrite, max_images, num_classes, seed, **options):
    """Make a data set with random labels.

    The images are those of dataset_size.py; labels are drawn uniformly from 0..num_classes-1 with a fixed seed.

    \b
    python data_utils/dataset_random.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/random_labels/cifar10-random10-2000.zip --max-images=2000 --num-classes=10
    """
    opened = common.open_source(source, dest, coarse, overwrite)
    if num_classes is None:
        common.class_labels(opened)
        num_classes = len(opened.classes)
    indices = common.by_size(opened, max_images)
    labels = selection.random_labels(len(indices), num_classes, seed)
    chosen = common.choose(opened, indices, 'random labels', labels, num_classes, max_images=max_images, seed=seed)
    common.write(opened, chosen, dest, overwrite=overwrite, **options)


if __name__ == '__main__':
    main()
