"""Lists of ImageNet pictures of one animal, spread evenly over its classes."""

import os
import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import selection
from dnnlib import UserError, cli, options, util
from dnnlib.image_io import is_image_name
from training.data.archive import check_new

# Where the folders of classes are, and below it: the last one is the layout of ILSVRC's archive.
SOURCES = ('downloads/imagenet', 'datasets/imagenet')
BELOW = ('', 'train', 'ILSVRC/Data/CLS-LOC/train')


@click.command(cls=cli.Command)
@click.option('--source', metavar='DIR',
              help='Folder of the ImageNet classes n01440764, n01443537, ..., or one that has '
                   f'them in {" or ".join(BELOW[1:])}  [default: {" or ".join(SOURCES)}]')
@click.option('--class', 'animal', metavar='dog|cat|bird', default='dog',
              help='Animal, of which all ImageNet classes are used')
@options.integer('--num', 2000, 'Images in all')
@options.integer('--seed', 0, 'Of the order in the list', 0)
@click.option('--dest', metavar='TXT', type=cli.FILE,
              help='List to write  [default: datasets/imagenet/CLASS_NUM.txt]')
@click.option('--overwrite', is_flag=True, help='Replace the list if it exists')
def main(source, animal, num, seed, dest, overwrite):
    """Choose images of dogs, cats or birds from ImageNet: a list of files for intra_diversity.py.

    Every class (wnid) of the animal gives as many, or one more, the first ones by name; then their
    order is shuffled. Lines are a path, relative to the list, a tab, and the animal's class in
    CIFAR-10. A class that is too small gives what it has, and the script says so.

    \b
    python data_utils/sample_imagenet.py
    python data_utils/sample_imagenet.py --source=/data/imagenet/train --class=cat --num=500 \\
        --dest=cat_500.txt
    """
    counts = selection.animal_counts(animal, num)
    dest = dest or f'datasets/imagenet/{animal}_{num}.txt'
    check_new(dest, overwrite)
    folders = [os.path.join(place, below)
               for place in ([source] if source else SOURCES) for below in BELOW]
    source = next((folder for folder in folders
                   if any(os.path.isdir(os.path.join(folder, wnid)) for wnid in counts)),
                  source or SOURCES[0])
    paths = []
    short = []
    for wnid, count in counts.items():
        folder = os.path.join(source, wnid)
        names = sorted(filter(is_image_name, os.listdir(folder))) if os.path.isdir(folder) else []
        paths += [os.path.join(folder, name) for name in names[:count]]
        if len(names) < count:
            short.append(wnid)
    if not paths:
        raise UserError(f'--source={source} has no images of the {len(counts)} classes of '
                        f'--class={animal}; give the folder that holds n01440764, ...')
    if short:
        click.echo(f'Note: {len(short)} of {len(counts)} classes have too few images in {source}; '
                   f'the list has {len(paths)} instead of {num}', err=True)
    np.random.RandomState(seed).shuffle(paths)
    label = selection.animal_classes()[animal]['label']
    lines = [f'# {len(paths)} images of {animal}, {num} wanted, seed {seed}, '
             'by data_utils/sample_imagenet.py']
    lines += [f'{os.path.relpath(path, os.path.dirname(dest) or ".")}\t{label}' for path in paths]
    util.write_bytes(dest, ('\n'.join(lines) + '\n').encode())
    classes = {os.path.dirname(path) for path in paths}
    print(f'{dest}: {len(paths)} images of {len(classes)} classes, label {label}')


if __name__ == '__main__':
    main()
