"""Data sets in which every image is a class of its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common
from training.data import selection


@common.command
@common.max_images_option
def main(source, dest, coarse, overwrite, max_images, **options):
    """Make a data set with unique labels: 0, 1, 2, ... The images are those of dataset_size.py.

    \b
    python data_utils/dataset_unique.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/unique_labels/cifar10-unique-2000.zip --max-images=2000
    """
    opened = common.open_source(source, dest, coarse, overwrite)
    indices = common.by_size(opened, max_images)
    labels = selection.unique_labels(len(indices))
    chosen = common.choose(opened, indices, 'unique labels', labels, len(indices), max_images=max_images)
    common.write(opened, chosen, dest, overwrite=overwrite, **options)


if __name__ == '__main__':
    main()
