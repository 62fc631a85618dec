"""Long-tailed subsets of balanced data sets: fewer and fewer images from the first class to the
last.
"""

import dataclasses

import numpy as np

from dnnlib import UserError

KINDS = ('exp', 'step', 'none')


@dataclasses.dataclass(frozen=True)
class LongTail:
    """`indices` int64 into the data, class by class; `counts` int64 [classes], how many images
    each class was due.
    """

    indices: np.ndarray
    counts: np.ndarray


def class_counts(total: int, num_classes: int, kind: str, factor: float) -> np.ndarray:
    """Images of each class, int64. With m = total / num_classes:

    'exp': m factor^(c / (num_classes - 1)); 'step': m for the first half of the classes and m
    factor for the rest; 'none': m. `factor` in (0, 1] is the share of the last class. Raises
    UserError for other values.
    """
    if kind not in KINDS:
        raise UserError(f'is not one of {", ".join(KINDS)}', 'imb_type', kind)
    if not 0 < factor <= 1:
        raise UserError('is not in (0, 1]', 'imb_factor', factor)
    most = total / num_classes
    if kind == 'exp':
        counts = [int(most * factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
    elif kind == 'step':
        counts = [int(most if c < num_classes // 2 else most * factor) for c in range(num_classes)]
    else:
        counts = [int(most)] * num_classes
    return np.array(counts, dtype=np.int64)


def long_tailed(labels, num_classes: int, kind: str, factor: float, seed: int = 0,
                allow_empty: bool = False) -> LongTail:
    """The long-tailed subset of data with `labels` [n] (0..num_classes - 1): a random choice
    within each class.

    A class with fewer images than its count keeps all it has. Raises UserError when a class would
    be empty, unless `allow_empty`.
    """
    labels = np.asarray(labels)
    counts = class_counts(len(labels), num_classes, kind, factor)
    random = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(counts):
        indices = np.flatnonzero(labels == label)
        random.shuffle(indices)
        chosen.append(indices[:count])
        if len(chosen[-1]) == 0 and not allow_empty:
            reason = 'imb_factor is too small for so little data'
            if len(indices) == 0:
                reason = 'the data has none'
            raise UserError(f'class {label} is left without images: {reason}')
    return LongTail(np.concatenate(chosen).astype(np.int64), counts)
