"""What the scripts of this folder share: options, and writing what was selected."""

import click
import numpy as np

import dataset_tool
from dnnlib import UserError, cli
from training.data import archive, convert, selection, sources

OPTIONS = ('source', 'dest', 'overwrite', 'resolution', 'transform', 'coarse', 'skip_corrupt', 'workers')


def command(function):
    """Decorator: a command that has the options `OPTIONS` of `dataset_tool.py convert`, word for word, and its own."""
    made = click.command(cls=cli.Command)(function)
    shared = [param for param in dataset_tool.convert.params if param.name in OPTIONS]
    made.params = shared + made.params
    return made


max_images_option = click.option('--max-images', metavar='INT', type=click.IntRange(min=1),
                                 help='Size: as many of each class, the first ones  [default: all images]')


def open_source(source: str, dest: str, coarse: bool = False, overwrite: bool = False) -> sources.Source:
    """The source, once it is sure that the destination can be written."""
    archive.check_destination(dest, overwrite)
    return sources.open_source(source, coarse)


def class_labels(source) -> np.ndarray:
    """Labels int64 [n] of a source. Raises UserError if it has none."""
    if source.labels is None or source.labels.ndim != 1:
        raise UserError(f'--source={source.name} has no classes to choose from')
    return source.labels


def choose(source, indices, rule: str, labels=None, num_classes: int | None = None, **details) -> convert.Selection:
    """The images `indices` with the source's labels, or with others; dataset.json gets the rule and its details.

    num_classes: how many of the source's classes are left, the first ones; with other labels how many there are.
    """
    indices = np.asarray(indices, dtype=np.int64)
    known = {'selection': {'rule': rule, **details, 'images': indices.tolist()}}
    if labels is not None:
        return convert.Selection(indices, np.asarray(labels, dtype=np.int64), list(range(num_classes)), rule=known)
    if source.labels is None:
        return convert.Selection(indices, rule=known)
    labels, tables = source.labels[indices], (source.classes, source.class_names, source.wnids)
    return convert.Selection(indices, labels, *(table and table[:num_classes] for table in tables), rule=known)


def by_size(source, max_images: int | None) -> np.ndarray:
    """Indices of `max_images` images, as many of each class; of all images for None."""
    if max_images is None:
        return np.arange(len(source))
    return selection.balanced_subset(class_labels(source), max_images, len(source.classes))


def write(source, chosen: convert.Selection, dest: str, transform=None, **options):
    """Converts the selection and says what came out; `options` are those of `training.data.convert.convert`."""
    done = convert.convert(source, chosen, dest, transform=transform, **options)
    dataset_tool.print_converted(dest, done, chosen, transform)
