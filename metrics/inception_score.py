"""Inception Score (Salimans et al. 2016): exp(mean over images of KL(p(c|x) || p(c))), over parts of the images."""

import torch

from torch_utils import distributed


def equal_parts(num: int, parts: int = 10) -> list[int]:
    """Boundaries floor(i num / parts): the original rule, and CBDM's. Fewer images than parts make one part each."""
    parts = min(parts, num)
    return [i * num // parts for i in range(parts + 1)]


def chunks(num: int, size: int = 5000) -> list[int]:
    """Boundaries of consecutive chunks of `size`, the last of which may be shorter and counts as much: ADM's rule."""
    return [*range(0, num, size), num]


class ScoreSums:
    """Streaming sums for the scores of parts `bounds[i] <= position < bounds[i + 1]` of the images.

    Per part sum_x sum_c p ln p and sum_x p suffice, since the mean of KL(p || m) over images with mean m is
    mean(sum_c p ln p) - sum_c m ln m.
    """

    def __init__(self, bounds: list[int], num_classes: int, device='cpu'):
        self.bounds = torch.tensor(bounds, device=device)
        self.negentropy = torch.zeros(len(bounds) - 1, dtype=torch.float64, device=device)
        self.probs = torch.zeros(len(bounds) - 1, num_classes, dtype=torch.float64, device=device)

    def add(self, probs: torch.Tensor, positions: torch.Tensor):
        """Adds class probabilities [N, C] of the images at `positions` [N] in the whole."""
        probs = probs.to(torch.float64)
        part = torch.searchsorted(self.bounds, positions.to(self.bounds.device), right=True) - 1
        self.negentropy.index_add_(0, part, torch.xlogy(probs, probs).sum(dim=1))
        self.probs.index_add_(0, part, probs)

    def all_reduce(self):
        """Adds up the sums of all processes."""
        distributed.all_reduce_sum(self.negentropy)
        distributed.all_reduce_sum(self.probs)

    def scores(self) -> torch.Tensor:
        """Inception Score of each part [parts], float64."""
        counts = self.bounds.diff()
        mean = self.probs / counts[:, None]
        return torch.exp(self.negentropy / counts - torch.xlogy(mean, mean).sum(dim=1)).cpu()


def inception_score(probs: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Scores [parts] of class probabilities [N, C] over parts with these boundaries (`equal_parts` or `chunks`).

    The Inception Score is their mean; its spread is usually given as `scores.std(correction=0)`.
    """
    sums = ScoreSums(bounds, probs.shape[1], probs.device)
    sums.add(probs, torch.arange(len(probs)))
    return sums.scores()
