"""What turns images into features: networks, or nothing (the pixels). Each is a file of its own.

A detector is made of (weights or None, device), takes images uint8 [N, C, H, W] and names of
outputs, and gives {name: float32 [N, D]}. It has `device`, `weights` (a path, URL or name) and
`fingerprint` (both None without weights).
"""

import dataclasses
from collections.abc import Callable

from metrics.detectors.clip import CLIP
from metrics.detectors.dinov2 import DINOv2, DINOv2Base
from metrics.detectors.inception import Inception
from metrics.detectors.own import Own
from metrics.detectors.pixels import Pixels
from metrics.inception import half_pixel, tensorflow
from metrics.inception_score import chunks, equal_parts


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a family of publications measures.

    prepare    resizing and scaling: what Inception sees of images
    probs      space of the class probabilities of the Inception Score
    parts      number of images -> bounds of the parts whose scores are averaged
    k, strict  balls of precision and recall: neighbours, and whether they are without boundary
    manifold   reference images of precision and recall
    num        generated images
    unbiased   whether the spread of the Inception Score is divided by one part less
    """

    prepare: Callable
    probs: str
    parts: Callable
    k: int
    strict: bool
    manifold: int
    num: int = 50000
    unbiased: bool = False


# EDM and EDM2, whose own measure is FID; guided diffusion's suite; class-balancing diffusion.
PROTOCOLS = {
    'edm': Protocol(tensorflow, 'softmax_nobias', chunks, 3, strict=False, manifold=10000),
    'adm': Protocol(tensorflow, 'softmax_nobias', chunks, 3, strict=False, manifold=10000),
    'cbdm': Protocol(half_pixel, 'softmax', equal_parts, 5, strict=True, manifold=50000),
}


DETECTORS = {'inception': Inception, 'dinov2': DINOv2, 'dinov2_base': DINOv2Base, 'clip': CLIP,
             'pixels': Pixels, 'own': Own}
