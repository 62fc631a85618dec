"""Data sets whose labels say nothing about the images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common, selection
from dnnlib import options
from training.data import convert


@common.command
@common.max_images_option
@options.integer('--num-classes', None, 'Labels to draw from  [default: as the source]')
@options.integer('--seed', 1024, 'Of the labels', 0)
def main(source, max_images, num_classes, seed):
    """Make a data set with random labels.

    The images are those of dataset_size.py; labels are drawn uniformly from 0..num_classes-1 with
    a fixed seed.

    \b
    python data_utils/dataset_random.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/random_labels/cifar10-random10-2000.zip --max-images=2000 \\
        --num-classes=10
    """
    if num_classes is None:
        convert.class_labels(source)
        num_classes = len(source.classes)
    indices = common.by_size(source, max_images)
    labels = selection.random_labels(len(indices), num_classes, seed)
    return source, common.choose(source, indices, 'random labels', labels, num_classes,
                                 max_images=max_images, seed=seed)


if __name__ == '__main__':
    main()
