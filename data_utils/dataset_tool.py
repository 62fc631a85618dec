"""Data sets of a given resolution and size."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common


@common.command
@common.max_images_option
def main(source, max_images):
    """Make a data set of pictures, of a given resolution and, class-balanced, of a given size.

    --source is all that dataset_tool.py convert reads. Without --max-images it takes every image;
    with it, the first ones of each class, class after class.

    \b
    python data_utils/dataset_tool.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/data_dimension/cifar10-16x16-2000.zip --resolution=16x16 \\
        --max-images=2000
    """
    indices = common.by_size(source, max_images)
    rule = 'size' if max_images else 'all'
    return source, common.choose(source, indices, rule, max_images=max_images)


if __name__ == '__main__':
    main()
