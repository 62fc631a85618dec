"""Data sets in which every image is a class of its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common


@common.command
@common.max_images_option
def main(source, max_images):
    """Make a data set with unique labels: 0, 1, 2, ... The images are those of dataset_size.py.

    \b
    python data_utils/dataset_unique.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/unique_labels/cifar10-unique-2000.zip --max-images=2000
    """
    indices = common.by_size(source, max_images)
    count = len(indices)
    return source, common.choose(source, indices, 'unique labels', range(count), count,
                                 max_images=max_images)


if __name__ == '__main__':
    main()
