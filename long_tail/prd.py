"""Precision and recall of distributions (PRD, arXiv 1806.00035), from histograms or features."""

import dataclasses

import numpy as np

from dnnlib import UserError


@dataclasses.dataclass(frozen=True)
class PRDCurve:
    """Precision and recall at each angle, both [num_angles] in [0, 1]."""

    precision: np.ndarray
    recall: np.ndarray

    def max_f(self, beta: float = 8, epsilon: float = 1e-10) -> tuple[float, float]:
        """(max F_beta, max F_(1/beta)): the first leans to recall, the second to precision."""
        def best(b):
            p = self.precision
            r = self.recall
            return float(((1 + b**2) * p * r / (b**2 * p + r + epsilon)).max())
        return best(beta), best(1 / beta)


def prd_from_histograms(generated, reference, num_angles: int = 1001,
                        epsilon: float = 1e-10) -> PRDCurve:
    """The curve of two distributions over the same bins, each [bins] and of sum 1.

    At slope l = tan(angle): precision = sum_i min(l reference_i, generated_i), recall =
    precision / l.
    """
    slopes = np.tan(np.linspace(epsilon, np.pi / 2 - epsilon, num_angles))[:, None]
    precision = np.minimum(slopes * np.asarray(reference), generated).sum(axis=1)
    recall = precision / slopes[:, 0]
    if max(precision.max(), recall.max()) > 1.001:
        raise ValueError('histograms must sum to 1')
    return PRDCurve(precision.clip(0, 1), recall.clip(0, 1))


def prd_from_features(generated, reference, num_clusters: int = 20, num_runs: int = 10,
                      num_angles: int = 1001, seed: int = 0) -> PRDCurve:
    """The curve of two equal numbers of feature vectors [N, D]: the mean over clusterings.

    Each run clusters the union by mini-batch k-means (10 initialisations) and compares the
    histograms of the clusters. Raises UserError when the numbers differ, or are below the number
    of clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    num = len(generated)
    if num != len(reference):
        raise UserError(f'PRD compares equal numbers of images, not {num} and {len(reference)}')
    if 2 * num < num_clusters:
        raise UserError(f'PRD with {num_clusters} clusters needs more than {num} images')
    union = np.concatenate([generated, reference])
    curves = []
    for run in range(num_runs):
        k_means = MiniBatchKMeans(n_clusters=num_clusters, n_init=10, random_state=seed + run)
        sides = np.split(k_means.fit_predict(union), [num])
        histograms = [np.bincount(side, minlength=num_clusters) / num for side in sides]
        curve = prd_from_histograms(*histograms, num_angles)
        curves.append((curve.precision, curve.recall))
    return PRDCurve(*np.mean(curves, axis=0))
