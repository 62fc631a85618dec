"""What the scripts of this folder share: options, and writing what was selected."""

import functools
import os
import re

import click
import numpy as np

from data_utils import selection
from dnnlib import cli, options
from training.data import archive, convert, sources, transforms

max_images_option = options.integer(
    '--max-images', None, 'Size: as many of each class, the first ones  [default: all images]')


def command(choose):
    """Decorator: a command that writes the data set which `choose` chooses.

    `choose(source, **options) -> (source, Selection)` gets the opened source and the options of
    its own; the others are those of `dataset_tool.py convert`.
    """
    @click.command(cls=cli.Command)
    @options.conversion(transforms.NAMES)
    @functools.wraps(choose)
    def main(source, dest, overwrite, reading, rules, **values):
        archive.check_destination(dest, overwrite)
        source, chosen = choose(open_source(source, **reading), **values)
        converted = convert.convert(source, chosen, dest, overwrite=overwrite, **rules)
        print(converted.summary(dest))

    return main


def open_source(path: str, **reading):
    """`sources.open_source`, but a list of paths alone takes the class from its file name: of
    dog_2000.txt all are dogs, CIFAR-10's class 5."""
    source = sources.open_source(path, **reading)
    if isinstance(source, sources.ListSource) and source.labels is None:
        words = re.split('[^a-z]+', os.path.basename(path).lower())
        for label in {animal['label'] for name, animal in selection.animal_classes().items()
                      if name in words}:
            source.name_classes([label] * len(source), classes=range(label + 1))
    return source


def choose(source, indices, rule: str, labels=None, num_classes: int | None = None,
           **details) -> convert.Selection:
    """The images `indices` with the source's labels, or with others; dataset.json gets the rule.

    num_classes: how many of the source's classes are left, the first ones; with other labels how
    many there are.
    """
    indices = np.asarray(indices, dtype=np.int64)
    record = {'selection': {'rule': rule, **details, 'images': indices.tolist()}}
    if labels is not None:
        classes = list(range(num_classes))
        return convert.Selection(indices, np.asarray(labels), classes, rule=record)
    tables = convert.class_tables(source, num_classes and range(num_classes))
    labels = None if source.labels is None else source.labels[indices]
    return convert.Selection(indices, labels, **tables, rule=record)


def by_size(source, max_images: int | None) -> np.ndarray:
    """Indices of `max_images` images, as many of each class; of all images for None."""
    if max_images is None:
        return np.arange(len(source))
    count = len(source.classes or ())
    indices = selection.balanced_subset(convert.class_labels(source), max_images, count)
    return noted(source, indices, max_images, count)


def noted(source, indices, max_images: int, num_classes: int):
    """The indices; says so if the first `num_classes` classes have fewer than `max_images`."""
    if len(indices) < max_images:
        counts = np.bincount(source.labels[indices], minlength=num_classes).tolist()
        click.echo(f'Note: {source.name} has only {len(indices)} such images, '
                   f'of each class {counts}', err=True)
    return indices
