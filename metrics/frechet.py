"""Frechet distance between Gaussians (Dowson and Landau 1982), as FID and FD-DINOv2 use it."""

import numpy as np
import scipy.linalg
import torch
from scipy.linalg.blas import dtrmm

import dnnlib

TOLERANCE = 1e-6  # largest relative error of the distance that the fast way may leave, by a bound that is rarely reached

_NOT_COVARIANCE = ('Frechet distance: a covariance is not positive semidefinite; '
                   'are these statistics from another file format, or damaged?')


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), in float64.

    mu: [D], sigma: [D, D] symmetric and positive semidefinite, of full rank or not. Raises UserError if the shapes
    differ or a number is not finite.

    With sigma1 = A A^T the eigenvalues of sigma1 sigma2 are those of A^T sigma2 A, which is symmetric, so the last trace
    is the sum of their square roots. A is a Cholesky factor with pivoting, which stops at the rank of sigma1: no
    square root of a matrix, no complex numbers.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1] or sigma1.shape != sigma2.shape:
        raise dnnlib.UserError(
            f'Frechet distance: statistics of {len(mu1)} and {len(mu2)} dimensions do not fit; '
            'both must come from the same detector on images of the same kind')
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise dnnlib.UserError('Frechet distance: the statistics hold NaN or infinite numbers')
    sigma1, sigma2 = (sigma1 + sigma1.T) / 2, (sigma2 + sigma2.T) / 2
    whole = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2)
    lower, pivots, rank = _factor(sigma1)
    # A is `lower`, its rows put back in place; permuting sigma2 instead keeps it triangular, which halves the products.
    product = dtrmm(1.0, lower, sigma2[np.ix_(pivots, pivots)].T, side=1, lower=1)
    product = dtrmm(1.0, lower, product, lower=1, trans_a=1, overwrite_b=1)[:rank, :rank]
    trace, error = _trace_of_root(product)
    if 2 * error > TOLERANCE * (whole - 2 * trace):
        trace = _trace_by_singular_values(lower[:, :rank], pivots, sigma2)
    return max(float(whole - 2 * trace), 0.0)  # below zero only by rounding


def _factor(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(L, p, rank): lower triangular L [D, D], columns from `rank` on zero, with L L^T = sigma[p][:, p]."""
    # Pivots below D eps max(diag) are noise: LAPACK's own choice, asked for with tol < 0.
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1, tol=-1)
    lower = np.asfortranarray(np.tril(lower))
    lower[:, rank:] = 0
    if np.square(lower).sum() > np.trace(sigma) * (1 + 1e-4) or (rank == 0 and np.any(sigma)):
        raise dnnlib.UserError(_NOT_COVARIANCE)
    return lower, pivots - 1, rank


def _trace_of_root(matrix: np.ndarray) -> tuple[float, float]:
    """tr(matrix^(1/2)) of a symmetric semidefinite matrix, and a bound of its error.

    Eigenvalues come with errors of about eps times the largest: nothing to the root of a large one, much to that of a
    tiny one, and of a zero it makes sqrt(eps).
    """
    if len(matrix) == 0:
        return 0.0, 0.0
    eigenvalues = scipy.linalg.eigvalsh(matrix, check_finite=False)
    if eigenvalues[0] < -1e-4 * abs(eigenvalues).max():
        raise dnnlib.UserError(_NOT_COVARIANCE)
    eigenvalues = np.maximum(eigenvalues, 0)
    roots, noise = np.sqrt(eigenvalues), 4 * np.finfo(np.float64).eps * eigenvalues[-1]
    return roots.sum(), np.minimum(np.sqrt(noise), noise / np.maximum(roots, 1e-300)).sum()


def _trace_by_singular_values(lower, pivots, sigma2) -> float:
    """The same for A^T sigma2 A = (A^T B)(A^T B)^T by the singular values of A^T B: right to eps times the largest, slower."""
    factor, pivots2, rank = _factor(sigma2)
    right = np.empty_like(factor[:, :rank])
    right[pivots2] = factor[:, :rank]
    return scipy.linalg.svdvals(lower.T @ right[pivots], check_finite=False).sum() if rank else 0.0


def frechet_distance_torch(mu1, sigma1, mu2, sigma2, device) -> float:
    """`frechet_distance` by eigenvalues, in float64 on `device`: tr((S sigma2 S)^(1/2)) with S = sigma1^(1/2).

    Exact for covariances of any rank, unlike an iteration for the square root of the product. Raises UserError if the
    shapes differ.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise dnnlib.UserError(f'Frechet distance: statistics of {len(mu1)} and {len(mu2)} dimensions do not fit')
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()
    roots = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp_min(0).sqrt()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * roots.sum()
    return max(distance.item(), 0.0)
