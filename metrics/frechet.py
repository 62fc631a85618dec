"""Frechet distance of Gaussians (Dowson and Landau 1982), as FID and FD-DINOv2 use it."""

import numpy as np
import scipy.linalg
import torch
from scipy.linalg.blas import dtrmm

from dnnlib import UserError

# Largest relative error of the distance that the fast way may leave, by a bound that is rarely
# reached.
TOLERANCE = 1e-6

_NOT_COVARIANCE = ('Frechet distance: a covariance is not positive semidefinite; '
                   'are these statistics from another file format, or damaged?')


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
    """tr((sigma1 sigma2)^(1/2)), with an error that is small against rest - 2 trace."""
    lower, pivots, rank = _factor(sigma1)
    # A is `lower`, its rows put back in place; permuting sigma2 instead keeps it triangular, which
    # halves the products.
    product = dtrmm(1.0, lower, sigma2[np.ix_(pivots, pivots)].T, side=1, lower=1)
    product = dtrmm(1.0, lower, product, lower=1, trans_a=1, overwrite_b=1)[:rank, :rank]
    trace, error = _trace_of_root(product)
    if 2 * error > TOLERANCE * (rest - 2 * trace):
        trace = _trace_by_singular_values(lower[:, :rank], pivots, sigma2)
    return trace


def _trace_on(device, sigma1, sigma2) -> float:
    """The same by torch, right to the rounding errors of eigenvalues."""
    sigma1, sigma2 = (torch.as_tensor(sigma, device=device) for sigma in (sigma1, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp_min(0).sqrt().sum().item()


def _factor(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(L, p, rank): lower triangular L, columns from `rank` on zero, L L^T = sigma[p][:, p]."""
    # Pivots below D eps max(diag) are noise: LAPACK's own choice, asked for with tol < 0.
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1, tol=-1)
    lower = np.asfortranarray(np.tril(lower))
    lower[:, rank:] = 0
    if np.square(lower).sum() > np.trace(sigma) * (1 + 1e-4) or (rank == 0 and np.any(sigma)):
        raise UserError(_NOT_COVARIANCE)
    return lower, pivots - 1, rank


def _trace_of_root(matrix: np.ndarray) -> tuple[float, float]:
    """tr(matrix^(1/2)) of a symmetric semidefinite matrix, and a bound of its error.

    Eigenvalues come with errors of about eps times the largest: nothing to the root of a large
    one, much to that of a tiny one, and of a zero it makes sqrt(eps).
    """
    if len(matrix) == 0:
        return 0.0, 0.0
    eigenvalues = scipy.linalg.eigvalsh(matrix, check_finite=False)
    if eigenvalues[0] < -1e-4 * abs(eigenvalues).max():
        raise UserError(_NOT_COVARIANCE)
    roots = np.sqrt(np.maximum(eigenvalues, 0))
    noise = 4 * np.finfo(np.float64).eps * max(eigenvalues[-1], 0)
    error = np.minimum(np.sqrt(noise), noise / np.maximum(roots, 1e-300)).sum()
    return roots.sum(), error


def _trace_by_singular_values(lower, pivots, sigma2) -> float:
    """The same of A^T sigma2 A = (A^T B)(A^T B)^T by the singular values of A^T B.

    Right to eps times the largest, and slower.
    """
    factor, pivots2, rank = _factor(sigma2)
    right = np.empty_like(factor[:, :rank])
    right[pivots2] = factor[:, :rank]
    if not rank:
        return 0.0
    return scipy.linalg.svdvals(lower.T @ right[pivots], check_finite=False).sum()
