"""Inception Score (Salimans et al. 2016): exp(mean over images of KL(p(c|x) || p(c)))."""

import torch


def equal_parts(num: int, parts: int = 10) -> list[int]:
    """Bounds floor(i num / parts): the original rule, and CBDM's. At least an image in each."""
    parts = min(parts, num)
    return [i * num // parts for i in range(parts + 1)]


def chunks(num: int, size: int = 5000) -> list[int]:
    """Bounds of chunks of `size`; the last may be shorter and counts as much: ADM's rule."""
    return [*range(0, num, size), num]


def inception_score(probs: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Scores float64 [parts] of class probabilities [N, C], over the images between two `bounds`.

    With the mean m of p in a part, the mean of KL(p || m) is mean(sum_c p ln p) - sum_c m ln m.
    The Inception Score is the mean over parts; its spread is usually `scores.std(correction=0)`.
    """
    scores = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        p = probs[start:stop].double()
        mean = p.mean(dim=0)
        negentropy = torch.xlogy(p, p).sum(dim=1).mean()
        scores.append((negentropy - torch.xlogy(mean, mean).sum()).exp())
    return torch.stack(scores).cpu()
