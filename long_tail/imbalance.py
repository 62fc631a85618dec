"""Long-tailed subsets of balanced data sets: fewer and fewer images from the first class to the
last.
"""

import numpy as np

from dnnlib import UserError

# Exponent of the factor for class c of n, by kind.
EXPONENTS = {
    'exp': lambda c, n: c / max(n - 1, 1),
    'step': lambda c, n: c >= n // 2,
    'none': lambda c, n: 0,
}


def class_counts(total: int, num_classes: int, kind: str, factor: float) -> np.ndarray:
    """Images of each class, int64. With m = total / num_classes:

    'exp': m factor^(c / (num_classes - 1)); 'step': m for the first half of the classes and m
    factor for the rest; 'none': m. `factor` in (0, 1] is the share of the last class; 'none' takes
    any. Raises UserError for other values.
    """
    if kind not in EXPONENTS:
        raise UserError(f'is not one of {", ".join(EXPONENTS)}', 'imb_type', kind)
    if kind != 'none' and not 0 < factor <= 1:
        raise UserError('is not in (0, 1]', 'imb_factor', factor)
    most, exponent = total / num_classes, EXPONENTS[kind]
    counts = [int(most * factor ** exponent(c, num_classes)) for c in range(num_classes)]
    return np.array(counts, dtype=np.int64)


def long_tailed(labels, num_classes: int, kind: str, factor: float, seed: int = 0) -> np.ndarray:
    """Indices int64 of a long-tailed subset, class by class, of data with `labels` [n]
    (0..num_classes - 1): a random choice of `class_counts` within each class.

    A class with fewer images than its count keeps all it has.
    """
    labels = np.asarray(labels)
    random = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(class_counts(len(labels), num_classes, kind, factor)):
        indices = np.flatnonzero(labels == label)
        random.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen)
