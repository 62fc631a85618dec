"""Precision and recall of distributions (PRD, arXiv 1806.00035), from histograms or features."""

from typing import NamedTuple

import numpy as np

EPSILON = 1e-10


class PRDCurve(NamedTuple):
    """Precision and recall at each angle, both [num_angles] in [0, 1]."""

    precision: np.ndarray
    recall: np.ndarray

    def max_f(self, beta: float = 8) -> tuple[float, float]:
        """(max F_beta, max F_(1/beta)): the first leans to recall, the second to precision."""
        p, r = self
        f_beta, f_inverse = (float(((1 + b**2) * p * r / (b**2 * p + r + EPSILON)).max())
                             for b in (beta, 1 / beta))
        return f_beta, f_inverse


def prd_from_histograms(generated, reference, num_angles: int = 1001) -> PRDCurve:
    """The curve of two distributions over the same bins, each [bins] and of sum 1.

    At slope l = tan(angle): precision = sum_i min(l reference_i, generated_i), recall =
    precision / l.
    """
    slopes = np.tan(np.linspace(EPSILON, np.pi / 2 - EPSILON, num_angles))[:, None]
    precision = np.minimum(slopes * np.asarray(reference), generated).sum(axis=1)
    recall = precision / slopes[:, 0]
    if max(precision.max(), recall.max()) > 1.001:
        raise ValueError('histograms must sum to 1')
    return PRDCurve(precision.clip(0, 1), recall.clip(0, 1))


def prd_from_features(generated, reference, num_clusters: int = 20,
                      num_runs: int = 10) -> PRDCurve:
    """The curve of two equal numbers of feature vectors [N, D]: the mean over clusterings.

    Each run clusters the union by mini-batch k-means (10 initialisations) and compares the
    histograms of the clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    num = len(generated)
    union = np.concatenate([generated, reference])
    curves = []
    for run in range(num_runs):
        k_means = MiniBatchKMeans(n_clusters=num_clusters, n_init=10, random_state=run)
        sides = np.split(k_means.fit_predict(union), [num])
        histograms = [np.bincount(side, minlength=num_clusters) / num for side in sides]
        curves.append(prd_from_histograms(*histograms))
    return PRDCurve(*np.mean(curves, axis=0))
