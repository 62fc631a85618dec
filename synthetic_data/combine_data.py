"""All images of all classes in one .npz."""

import os
import sys

import click

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from dnnlib import UserError, cli
from synthetic_data import common
from synthetic_data.class_files import open_classes, stored
from synthetic_data.stored_zip import write_zip

EXAMPLES = """\b
Examples:
  python combine_data.py --data_dir ./out_cifar10 --output_dir ./npz_cifar10 --class_num 10 --file_name 5m
\b
  # What two machines have made
  python combine_data.py --data_dir ./out_a --data_dir ./out_b --output_dir ./npz_cifar10 --class_num 10 --file_name 10m"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@common.class_folder_options
@click.option('--file_name', metavar='NAME', required=True, help='The file is <output_dir>/NAME.npz')
def main(data_dir, output_dir, class_num, file_name):
    """Join the files of all classes into one .npz for numpy.load: `image` uint8 [N,H,W,3], `label` int64 [N].

    Class by class, in the order of the files. Images are never held in memory.
    """
    if os.path.basename(file_name) != file_name:
        raise UserError(f'--file_name={file_name} must be a name without folders; give the folder as --output_dir')
    classes = open_classes(data_dir, class_num)
    dest = os.path.join(output_dir, file_name.removesuffix('.npz') + '.npz')
    with common.full_disk(f'--output_dir={output_dir}', 'run it again'):
        write_zip(dest, stored(classes))
    print(f'Wrote {dest}: {sum(map(len, classes))} images of {class_num} classes')


if __name__ == '__main__':
    main()
