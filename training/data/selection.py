"""Which images a study takes: subsets with one property controlled, and mixtures of sources.

Functions of label arrays, in file order; all return indices int64 in output order. Errors are UserErrors that
name the option.
"""

import functools
import json
import pathlib
import random as python_random

import numpy as np

import dnnlib


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` as `parts` whole numbers that differ by at most one, the larger ones first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def _first_of_classes(labels, counts: dict) -> np.ndarray:
    """The first `counts[c]` images of each class c, class after class."""
    labels = np.asarray(labels)
    return np.concatenate([np.flatnonzero(labels == c)[:count] for c, count in counts.items()]).astype(np.int64)


def balanced_subset(labels, max_images: int, num_classes: int = 10) -> np.ndarray:
    """max_images / num_classes images of each class, the first ones of the file; `max_images` must divide evenly."""
    if max_images % num_classes or max_images < 1:
        raise dnnlib.UserError(f'--max-images={max_images} is not a multiple of the {num_classes} classes')
    counts = dict.fromkeys(range(num_classes), max_images // num_classes)
    return _checked(_first_of_classes(labels, counts), max_images)


def diversity_subset(labels, max_images: int, num_classes: int) -> np.ndarray:
    """`max_images` images of the first `num_classes` classes: equal numbers, what is left over from the last of them.

    A class that is too small gives what it has.
    """
    present = int(np.max(labels)) + 1
    if not 1 <= num_classes <= present:
        raise dnnlib.UserError(f'--num-classes={num_classes} is not in 1..{present}, the classes of the source')
    share = max_images // num_classes
    counts = dict.fromkeys(range(num_classes - 1), share)
    counts[num_classes - 1] = max_images - share * (num_classes - 1)
    return _first_of_classes(labels, counts)


def one_class_subset(labels, label: int, max_images: int) -> np.ndarray:
    """The first `max_images` images of one class."""
    indices = np.flatnonzero(np.asarray(labels) == label)
    if len(indices) == 0:
        raise dnnlib.UserError(f'--class-num={label}: the source has no such class')
    return _checked(indices[:max_images].astype(np.int64), max_images)


def first_images(count: int, max_images: int) -> np.ndarray:
    """The first `max_images` of `count` images."""
    return _checked(np.arange(min(count, max_images), dtype=np.int64), max_images)


def _checked(indices, wanted):
    if len(indices) < wanted:
        raise dnnlib.UserError(f'--max-images={wanted}: the source holds only {len(indices)} such images')
    return indices


def random_labels(count: int, num_classes: int, seed: int = 1024) -> list[int]:
    """Labels that have nothing to do with the images, uniform over 0..num_classes - 1."""
    generator = python_random.Random(seed)
    return [generator.randint(0, num_classes - 1) for _ in range(count)]


def unique_labels(count: int) -> list[int]:
    """A class of its own for every image."""
    return list(range(count))


def interpolation_counts(max_images: int, rate: float) -> tuple[int, int]:
    """(images of the first source, of the second) in a mixture with the share `rate` of the second.

    int(max_images (1 - rate)) is computed in floating point, as published: 2000 images at 0.9 give 199, not 200.
    """
    if not 0 <= rate <= 1:
        raise dnnlib.UserError(f'--inter-rate={rate} is not in 0..1')
    first = int(max_images * (1 - rate))
    return first, max_images - first


def mixture(total: int, share: float, num_real: int, num_synthetic: int, seed: int = 0):
    """(real, synthetic) indices of a mixture with round(total share) real images, without replacement."""
    real = round(total * share)
    for name, wanted, there in (('real', real, num_real), ('synthetic', total - real, num_synthetic)):
        if not 0 <= wanted <= there:
            raise dnnlib.UserError(
                f'a mixture of {total} with a share of {share} takes {wanted} of {there} {name} images')
    generator = np.random.RandomState(seed)
    return (generator.choice(num_real, real, replace=False),
            generator.choice(num_synthetic, total - real, replace=False))


# --- Animals of ImageNet ----------------------------------------------------------------------------------------------


@functools.cache
def animal_classes() -> dict:
    """{'bird' | 'cat' | 'dog': {'label': its class in CIFAR-10, 'wnids': its ImageNet classes}}."""
    return json.loads(pathlib.Path(__file__).with_name('imagenet-animals.json').read_text())


def animal_counts(animal: str, total: int) -> dict[str, int]:
    """{wnid: images} of `total` images of an animal, spread evenly over its ImageNet classes."""
    if animal not in animal_classes():
        raise dnnlib.UserError(f'{animal!r} is not one of {", ".join(animal_classes())}')
    wnids = animal_classes()[animal]['wnids']
    return dict(zip(wnids, split_evenly(total, len(wnids)), strict=True))
