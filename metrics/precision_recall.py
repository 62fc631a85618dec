"""How two sets of features lie in each other, by balls around them up to the k-th neighbour.

Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (arXiv 2002.09797).
"""

import dataclasses

import torch

from dnnlib import UserError
from metrics import neighbors
from metrics.shares import Estimate, Share, share_of
from torch_utils import distributed

RESAMPLES = 100


def knn_radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each of `features` [N, D] to its k-th nearest neighbour in the set.

    float64 [N]; a point is no neighbour of itself. Raises UserError for k images or fewer.
    """
    if len(features) <= k:
        raise UserError(f'precision and recall, density and coverage with k = {k} need more than '
                        f'{k} images, and there are {len(features)}')
    return neighbors.nearest(features, k=k + 1)[0][:, -1]


@distributed.exact_float32()
def precision_recall(ref: torch.Tensor, gen: torch.Tensor, k: int = 3,
                     strict: bool = False) -> tuple[Share, Share]:
    """Precision and recall of features `gen` [M, D] against `ref` [N, D], on their device.

    Precision is the share of generated points in a ball of at least one reference point, recall
    the converse; the radius of a ball is the distance to the k-th nearest neighbour in its own
    set. ADM: k=3, a ball has its boundary; CBDM: k=5, it does not (`strict`). Memory is bounded
    whatever the sizes. Raises UserError for features of different dimensions, too few images and
    numbers that are not finite.

    The errors are those of generating anew, against the same reference: of recall by a bootstrap
    of the generated images, each of which keeps its ball.
    """
    check_dimensions(ref, gen)
    inside = torch.zeros(len(gen), dtype=torch.bool, device=gen.device)
    covered = _Covered(ref, gen)
    for rows, columns, ours, theirs in neighbors.memberships(
            gen, ref, knn_radii(gen, k), knn_radii(ref, k), strict):
        inside[rows] |= ours.any(dim=1)
        covered.add(rows, columns, theirs)
    return share_of(inside.tolist()), covered.share()


@distributed.exact_float32()
def density_coverage(ref: torch.Tensor, gen: torch.Tensor, k: int = 5) -> tuple[Estimate, Share]:
    """Density and coverage of features `gen` [M, D] against `ref` [N, D], on their device.

    Of balls without boundary around the reference, up to the k-th nearest neighbour: density is
    the mean over generated points of the balls that each is in, over k; coverage is the share of
    balls that hold a generated point. Errors and what is raised: as of `precision_recall`.
    """
    check_dimensions(ref, gen)
    counts = torch.zeros(len(gen), dtype=torch.int64, device=gen.device)
    covered = _Covered(ref, gen)
    for rows, columns, ours, _ in neighbors.memberships(gen, ref, None, knn_radii(ref, k), True):
        counts[rows] += ours.sum(dim=1)
        covered.add(rows, columns, ours)
    density = counts.double() / k
    return Estimate.of_images(density.mean(), density.tolist()), covered.share()


@dataclasses.dataclass
class _Covered:
    """The share of reference points `ref` that at least one of the generated ones `gen` covers;
    and the same of resamples, of which each takes a generated point Poisson(1) times."""

    ref: torch.Tensor
    gen: torch.Tensor

    def __post_init__(self):
        device = self.ref.device
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.poisson(torch.ones(len(self.gen), RESAMPLES), generator).to(device)
        self.counts = torch.zeros(len(self.ref), RESAMPLES, device=device)
        self.any = torch.zeros(len(self.ref), dtype=torch.bool, device=device)

    def add(self, rows, columns, covers):
        """`covers` bool [r, c]: which generated points cover which reference points."""
        self.any[columns] |= covers.any(dim=0)
        self.counts[columns] += covers.T.float() @ self.weights[rows]

    def share(self) -> Share:
        shares = (self.counts > 0.5).double().mean(dim=0)
        value = self.any.double().mean().item()
        error = shares.std().item()
        parts = value + RESAMPLES**0.5 * (shares - shares.mean())
        return Share(value, len(self.ref), error, parts.tolist())


def check_dimensions(*features: torch.Tensor):
    """Raises UserError for features of different dimensions."""
    dims = [side.shape[1] for side in features]
    if len(set(dims)) > 1:
        raise UserError(f'features of {" and ".join(map(str, dims))} dimensions do not fit; both '
                        'must come from the same detector, on images of one size')
