"""Vendi score (arXiv 2210.02410): how many different images there are, in effect."""

import torch

from metrics.shares import Estimate


def vendi(features: torch.Tensor) -> Estimate:
    """exp of the entropy of the eigenvalues of K / N, K the cosine similarities of `features`.

    features [N, D], on their device; N if all are orthogonal, 1 if all are the same. The
    eigenvalues other than zero are those of G = sum x x^T / N [D, D], x of norm 1, so memory is
    that of the smaller of the two matrices. The error is that of the delta method: an image adds
    -x^T (log G) x to the entropy.
    """
    num = len(features)
    norms = torch.cat([part.double().norm(dim=1) for part in features.split(4096)])
    norms = norms.clamp_min(1e-300)

    def unit(rows):
        return features[rows].double() / norms[rows, None]

    rows = [slice(i, i + 4096) for i in range(0, num, 4096)]
    if num < features.shape[1]:
        x = unit(slice(None))
        values, vectors = torch.linalg.eigh(x @ x.T / num)
    else:
        values, vectors = torch.linalg.eigh(sum(unit(part).T @ unit(part) for part in rows) / num)
    kept = values > values.max() * 1e-12
    values = values[kept]
    vectors = vectors[:, kept]
    logs = values.log()
    entropy = -(values * logs).sum()
    if num < features.shape[1]:
        # Rows of sqrt(N) V diag(lambda)^(1/2) are the images in the basis of G's eigenvectors.
        terms = -num * vectors.square() @ (values * logs)
    else:
        terms = torch.cat([-(unit(part) @ vectors).square() @ logs for part in rows])
    score = entropy.exp().item()
    return Estimate.of_images(score, (score * (terms - entropy)).tolist())
