"""Frechet distance of Gaussians (Dowson and Landau 1982), as FID and FD-DINOv2 use it."""

import numpy as np
import torch
from scipy.linalg import lapack, solve_triangular

from dnnlib import UserError

# Largest relative error of the distance that the fast way may leave, by a bound that is rarely
# reached.
TOLERANCE = 1e-6
EVALUATED = 10000  # images whose influence is computed


def frechet_distance(mu1, sigma1, mu2, sigma2, device=None) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), in float64.

    mu: [D], sigma: [D, D] symmetric and positive semidefinite, of full rank or not. Raises
    UserError if the shapes differ or a number is not finite.

    With sigma1 = A A^T the eigenvalues of sigma1 sigma2 are those of A^T sigma2 A, which is
    symmetric, so the last trace is the sum of their square roots. A is a Cholesky factor with
    pivoting, which stops at the rank of sigma1: no square root of a matrix, no complex numbers.
    On a `device` torch computes it, with A from the eigenvectors of sigma1.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if (not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1]
            or sigma1.shape != sigma2.shape):
        raise UserError(f'Frechet distance: statistics of {len(mu1)} and {len(mu2)} dimensions do '
                        'not fit; both must come from the same detector, on images of one '
                        'resolution and number of channels')
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError('Frechet distance: the statistics hold NaN or infinite numbers')
    sigma1 = (sigma1 + sigma1.T) / 2
    sigma2 = (sigma2 + sigma2.T) / 2
    rest = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2)
    trace = _trace(sigma1, sigma2, rest) if device is None else _trace_on(device, sigma1, sigma2)
    return max(float(rest - 2 * trace), 0.0)  # below zero only by rounding


def _trace(sigma1, sigma2, rest: float) -> float:
    """tr((sigma1 sigma2)^(1/2)), with an error that is small against rest - 2 trace.

    Eigenvalues come with errors of about eps times the largest: nothing to the root of a large
    one, much to that of a tiny one, and of a zero it makes sqrt(eps). Where that matters, the
    roots are the singular values of A^T B, right to eps times the largest, and slower.
    """
    lower, pivots, rank = _factor(sigma1)
    # A is `lower` with its rows in the order of the pivots. sygst: L^T sigma L.
    product, _ = lapack.dsygst(sigma2[np.ix_(pivots, pivots)], lower, itype=2, lower=1)
    eigenvalues = np.linalg.eigvalsh(product[:rank, :rank])
    roots = np.sqrt(eigenvalues.clip(0))
    eps = np.finfo(np.float64).eps
    noise = max(4 * eps * eigenvalues.max(initial=0), -eigenvalues.min(initial=0))
    error = np.minimum(np.sqrt(noise), noise / np.maximum(roots, 1e-300)).sum()
    if 2 * error > TOLERANCE * (rest - 2 * roots.sum()):
        lower2, pivots2, rank2 = _factor(sigma2)
        factor2 = lower2[np.argsort(pivots2), :rank2]
        roots = np.linalg.svd(lower[:, :rank].T @ factor2[pivots], compute_uv=False)
    return roots.sum()


def _trace_on(device, sigma1, sigma2) -> float:
    """The same by torch, right to the rounding errors of eigenvalues."""
    sigma1, sigma2 = (torch.as_tensor(sigma, device=device) for sigma in (sigma1, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp_min(0).sqrt().sum().item()


def _factor(sigma: np.ndarray):
    """(L, p, rank) with L L^T = sigma[p][:, p]: lower triangular, its columns from `rank` on zero.

    Raises UserError if there is none.
    """
    # Pivots below D eps max(diag) are noise: LAPACK's own choice, asked for with tol < 0.
    lower, pivots, rank, _ = lapack.dpstrf(sigma, lower=1, tol=-1)
    lower = np.tril(lower)
    lower[:, rank:] = 0
    if not np.isclose(np.square(lower).sum(), np.trace(sigma), rtol=1e-4, atol=0):
        raise UserError('Frechet distance: a covariance is not positive semidefinite; '
                        'are these statistics from another file format, or damaged?')
    return lower, pivots - 1, rank


# --- Standard errors -----------------------------------------------------------------------------


def influence(features, mu1, sigma1, mu2, sigma2) -> np.ndarray:
    """What each image of the first Gaussian adds to the distance, float64 [n], of mean zero.

    features [n, D], some of the images that mu1 [D] and sigma1 [D, D] are of. The derivatives of
    the distance are 2 (mu1 - mu2) and I - T, where T = sigma1^(-1/2) (sigma1^(1/2) sigma2
    sigma1^(1/2))^(1/2) sigma1^(-1/2) carries the one Gaussian to the other; so an image x, z = x -
    mu1, adds 2 z.(mu1 - mu2) + |z|^2 - z^T T z, but for the mean of that. With sigma1 = A A^T,
    T = A^-T (A^T sigma2 A)^(1/2) A^-1.
    """
    lower, pivots, rank = _factor(sigma1)
    factor = lower[:, :rank]
    product = factor.T @ sigma2[np.ix_(pivots, pivots)] @ factor
    values, vectors = np.linalg.eigh(product)
    roots = np.sqrt(values.clip(0))
    terms = []
    for part in np.array_split(features, len(features) // 4096 + 1):
        z = np.asarray(part, np.float64) - mu1
        white = solve_triangular(factor[:rank], z[:, pivots[:rank]].T, lower=True)
        carried = roots @ np.square(vectors.T @ white)
        terms.append(2 * z @ (mu1 - mu2) + np.square(z).sum(axis=1) - carried)
    terms = np.concatenate(terms)
    return terms - terms.mean()


def standard_error(features, num: int, mu1, sigma1, mu2, sigma2) -> tuple[float, np.ndarray]:
    """Standard error of the distance to a fixed reference of `num` images, of which some have the
    `features` [n, D]; and the `influence` of at most EVALUATED of those, in their order.

    By the delta method: where the distance is linear in the images, its variance is that of the
    influence, over num. Where it is small it is not: the derivatives, estimated from these images,
    are then mostly wrong, and their variance counts what is quadratic twice. The linear part is
    what the derivatives of two halves of the images have in common, so the variance is the mean
    of both.
    """
    rows = features[::-(-len(features) // EVALUATED)]
    terms = influence(rows, mu1, sigma1, mu2, sigma2)
    plain = np.square(terms).mean()
    common = 0.0
    if len(features) >= 4:
        halves = []
        for half in (features[::2], features[1::2]):
            half = np.asarray(half, np.float64)
            moments = half.mean(axis=0), np.cov(half.T).reshape(np.shape(sigma1))
            halves.append(influence(rows, *moments, mu2, sigma2))
        common = np.mean(halves[0] * halves[1])
    return float(np.sqrt(max((plain + common) / 2, plain / 4) / num)), terms
