"""What several architectures share: precision, dropout.

Masks of dropout depend on the training image, not on how the batch is split over processes. The loss opens
`torch_utils.random.drawing_from(batch['random'])` around the forward pass; `dropout` and `drop_labels` inside then draw
from it, one row for each image. Outside of it they use torch's global generator, like torch's own dropout.
"""

import torch
import torch.nn.functional as F

from torch_utils.random import GlobalRandom, network_random

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the activations on `device`: float16 is for GPUs only, the CPU computes such networks in float32."""
    if precision == 'fp16' and device.type != 'cuda':
        return torch.float32
    return DTYPES[precision]


def dropout(x, p: float, training: bool):
    """Zeroes elements of x [N, ...] with probability p and divides the others by 1 - p, in training only."""
    if not training or p == 0:
        return x
    random = network_random()
    if random is None:
        return F.dropout(x, p)
    keep = random.rand(x.shape, device=x.device) >= p
    return x * (keep / (1 - p)).to(x.dtype)


def drop_labels(labels, p: float, training: bool):
    """Sets whole rows of labels [N, label_dim] to zero ("no label") with probability p, in training only."""
    if not training or p == 0:
        return labels
    random = network_random() or GlobalRandom(labels.device)
    return labels * (random.rand([len(labels), 1], device=labels.device) >= p)
