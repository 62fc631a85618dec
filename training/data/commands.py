"""What the commands that convert pictures share: options, and what they print."""

import click

from dnnlib import cli, options
from training.data import transforms

destination = options.together(
    click.option('--dest', metavar='ZIP|DIR', required=True,
                 help='Data set to write; a .zip, else a folder'),
    click.option('--overwrite', is_flag=True, help='Replace the destination if it exists'))

# Of `training.data.convert.convert`, as the keyword `rules`.
conversion = options.together(
    click.option('--source', metavar='PATH[,PATH...]', required=True,
                 help='What to read, see dataset_tool.py convert --help'),
    destination,
    click.option('--coarse', is_flag=True,
                 help="CIFAR-100's 20 coarse labels instead of the 100 fine ones"),
    options.group(
        'rules',
        click.option('--resolution', metavar='WxH', type=cli.SIZE,
                     help='Size of the images  [default: as they are]'),
        options.choice('--transform', None,
                       'How pictures are cropped  [default: resized without cropping]',
                       transforms.NAMES),
        click.option('--skip-corrupt', is_flag=True,
                     help='Leave damaged images out, and list them'),
        options.integer('--workers', None, 'Processes  [default: one for each core]')))


def print_converted(dest, converted, selection, transform):
    """What a conversion wrote and left out."""
    side = converted.resolution
    classes = '' if selection.classes is None else f', {len(selection.classes)} classes'
    print(f'{dest}: {converted.count} images, {side}x{side}{classes}')
    if converted.rejected:
        print(f'{converted.rejected} images are too small for --transform={transform} '
              'and were left out')
    if skipped := converted.skipped:
        print(f'{len(skipped)} damaged images were left out:', *skipped, sep='\n    ')
