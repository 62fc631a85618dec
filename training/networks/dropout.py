"""Dropout whose masks depend on the training image, not on how the batch is split over processes.

The objective opens `drawing_from(batch['random'])` around the forward pass; `dropout` and `drop_labels` inside then
draw from it, one row for each image. Outside of it they use torch's global generator, like torch's own dropout.
"""

import contextlib
import contextvars

import torch.nn.functional as F

from torch_utils.random import GlobalRandom

_random = contextvars.ContextVar('dropout_random', default=None)


@contextlib.contextmanager
def drawing_from(random):
    """Within the block, masks come from `random` (see torch_utils.random), whose batch is that of the network."""
    token = _random.set(random)
    try:
        yield
    finally:
        _random.reset(token)


def dropout(x, p: float, training: bool):
    """Zeroes elements of x [N, ...] with probability p and divides the others by 1 - p, in training only."""
    if not training or p == 0:
        return x
    random = _random.get()
    if random is None:
        return F.dropout(x, p)
    keep = random.rand(x.shape, device=x.device) >= p
    return x * (keep / (1 - p)).to(x.dtype)


def drop_labels(labels, p: float, training: bool):
    """Sets whole rows of labels [N, label_dim] to zero ("no label") with probability p, in training only."""
    if not training or p == 0:
        return labels
    random = _random.get() or GlobalRandom(labels.device)
    return labels * (random.rand([len(labels), 1], device=labels.device) >= p)
