"""All images of all classes in one .npz."""

import itertools
import os
import sys

import click

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from dnnlib import cli
from synthetic_data import common
from synthetic_data.class_files import open_classes, write_npz

EXAMPLES = """\b
Examples:
  python combine_data.py --data_dir ./out_cifar10 --output_dir ./npz_cifar10 --class_num 10 \\
      --file_name 5m
\b
  # What two machines have made
  python combine_data.py --data_dir ./out_a --data_dir ./out_b --output_dir ./npz_cifar10 \\
      --class_num 10 --file_name 10m"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@common.class_folder_options('5m')
def main(data_dir, output_dir, class_num, file_name):
    """Join the files of all classes into one .npz for numpy.load: `image` uint8 [N,H,W,3], `label`
    int64 [N].

    Class by class, in the order of the files. Images are never held in memory.
    """
    classes = open_classes(data_dir, class_num)
    counts = [sum(map(len, files)) for files in classes]
    files = list(itertools.chain(*classes))
    dest = os.path.join(output_dir, f'{file_name}.npz')
    common.CLASSES.check_path(dest, 'file_name')
    cli.claim(dest)
    with click.progressbar(files, label=f'Joining {sum(counts)} images') as bar:
        write_npz(dest, files[0].shape[1:], counts, bar)
    print(f'Wrote {dest}: {sum(counts)} images of {class_num} classes')


if __name__ == '__main__':
    main()
