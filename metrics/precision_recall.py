"""Improved precision and recall (Kynkaanniemi et al. 2019), by manifolds of k-NN balls."""

import torch

from dnnlib import UserError
from metrics import neighbors
from metrics.shares import Share


def knn_radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each of `features` [N, D] to its k-th nearest neighbour in the set.

    float64 [N]; a point is no neighbour of itself. Raises UserError for k images or fewer.
    """
    if len(features) <= k:
        raise UserError(f'precision and recall with k = {k} need more than {k} images, '
                        f'and there are {len(features)}')
    return neighbors.nearest(features, k=k + 1)[0][:, -1]


def precision_recall(ref: torch.Tensor, gen: torch.Tensor, k: int = 3,
                     strict: bool = False) -> tuple[Share, Share]:
    """Precision and recall of features `gen` [M, D] against `ref` [N, D], on their device.

    Precision is the share of generated points in a ball of at least one reference point, recall
    the converse; the radius of a ball is the distance to the k-th nearest neighbour in its own
    set. ADM: k=3, a ball has its boundary; CBDM: k=5, it does not (`strict`). Memory is bounded
    whatever the sizes. Raises UserError for features of different dimensions, too few images and
    numbers that are not finite.
    """
    if ref.shape[1] != gen.shape[1]:
        raise UserError(f'precision and recall: features of {ref.shape[1]} and {gen.shape[1]} '
                        'dimensions do not fit; both must come from the same detector')
    inside = neighbors.inside_balls(gen, ref, knn_radii(gen, k), knn_radii(ref, k), strict)
    precision, recall = (Share(side.double().mean().item(), len(side)) for side in inside)
    return precision, recall
