"""Which images the memorization study takes: subsets with one property controlled.

Functions of label arrays, in file order; all return indices int64 in output order. Errors are
UserErrors that carry the field that is wrong.
"""

import functools
import json
import pathlib
import random as python_random

import numpy as np

from dnnlib import UserError


def _first_of_classes(labels, counts: list[int]) -> np.ndarray:
    """The first `counts[c]` images of each class c, class after class."""
    labels = np.asarray(labels)
    return np.concatenate([np.flatnonzero(labels == c)[:count] for c, count in enumerate(counts)])


def balanced_subset(labels, max_images: int, num_classes: int = 10) -> np.ndarray:
    """The first max_images / num_classes images of each class; `max_images` must divide evenly.

    A class that is too small gives what it has.
    """
    if max_images % num_classes or max_images < 1:
        raise UserError(f'is not a multiple of the {num_classes} classes',
                        field='max_images', value=max_images)
    return _first_of_classes(labels, [max_images // num_classes] * num_classes)


def diversity_subset(labels, max_images: int, num_classes: int) -> np.ndarray:
    """`max_images` images of the first `num_classes` classes, in equal numbers.

    What is left over comes from the last of them. A class that is too small gives what it has.
    """
    present = int(np.max(labels)) + 1
    if not 1 <= num_classes <= present:
        raise UserError(f'is not in 1..{present}, the classes of the source',
                        field='num_classes', value=num_classes)
    counts = [max_images // num_classes] * num_classes
    counts[-1] += max_images % num_classes
    return _first_of_classes(labels, counts)


def one_class_subset(labels, label: int, max_images: int | None = None) -> np.ndarray:
    """The first `max_images` images of one class; all for None."""
    indices = np.flatnonzero(np.asarray(labels) == label)
    if len(indices) == 0:
        raise UserError('is not a class of the source', field='class_num', value=label)
    return first_images(indices, max_images)


def first_images(indices: np.ndarray, max_images: int | None) -> np.ndarray:
    """The first `max_images` of the indices; all for None."""
    if max_images is not None and len(indices) < max_images:
        raise UserError(f'is too much: the source holds only {len(indices)} such images',
                        field='max_images', value=max_images)
    return indices[:max_images]


def random_labels(count: int, num_classes: int, seed: int = 1024) -> list[int]:
    """Labels that have nothing to do with the images, uniform over 0..num_classes - 1."""
    generator = python_random.Random(seed)
    return [generator.randint(0, num_classes - 1) for _ in range(count)]


def interpolation_counts(max_images: int, rate: float) -> tuple[int, int]:
    """(images of the first source, of the second) in a mixture; `rate` is the second's share.

    int(max_images (1 - rate)) is computed in floating point, as published: 2000 images at 0.9 give
    199, not 200.
    """
    if not 0 <= rate <= 1:
        raise UserError('is not in 0..1', field='inter_rate', value=rate)
    first = int(max_images * (1 - rate))
    return first, max_images - first


# --- Animals of ImageNet ------------------------------------------------------------------------


@functools.cache
def animal_classes() -> dict:
    """{'bird' | 'cat' | 'dog': {'label': class in CIFAR-10, 'wnids': classes in ImageNet}}."""
    return json.loads(pathlib.Path(__file__).with_name('imagenet-animals.json').read_text())


def animal_counts(animal: str, total: int) -> dict[str, int]:
    """{wnid: images} of `total` images of an animal, spread evenly over its ImageNet classes.

    Counts differ by at most one, the larger ones first.
    """
    if animal not in animal_classes():
        raise UserError(f'is not one of {", ".join(animal_classes())}',
                        field='animal', value=animal)
    wnids = animal_classes()[animal]['wnids']
    share, rest = divmod(total, len(wnids))
    return {wnid: share + (place < rest) for place, wnid in enumerate(wnids)}
