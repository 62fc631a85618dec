"""Precision and recall of distributions against the golden numbers, and the cases that anyone can check."""

import re

import golden_cases
import numpy as np
import pytest

from long_tail.prd import prd_from_features, prd_from_histograms


@pytest.mark.parametrize('case', golden_cases.cases('math', 'prd_histogram*'), ids=str)
def test_histograms(case):
    a, results = case.arrays, case.json['results']
    for key in a:
        if key.startswith('precision'):
            angles = int(key.removeprefix('precision') or 1001)
            curve = prd_from_histograms(a['eval_hist'], a['ref_hist'], angles)
            np.testing.assert_allclose(curve.precision, a[key], rtol=1e-9)
            np.testing.assert_allclose(curve.recall, a[key.replace('precision', 'recall')], rtol=1e-9)
    for key, value in results.items():
        angles, same, inverse, beta = re.fullmatch(r'(?:angles(\d+)_|(same_hist)_)?F(1_)?(\d+)', key).groups()
        curve = prd_from_histograms(a['eval_hist'], a['eval_hist' if same else 'ref_hist'], int(angles or 1001))
        np.testing.assert_allclose(curve.max_f(int(beta))[bool(inverse)], value, rtol=1e-9, err_msg=key)


@pytest.mark.parametrize('case', golden_cases.cases('math', 'prd_clustering*'), ids=str)
def test_features(case):
    curve = prd_from_features(case.arrays['eval_feats'], case.arrays['ref_feats'], case.json['num_clusters'])
    for value, name in zip(curve.max_f(8), ('F8', 'F1_8'), strict=True):
        assert abs(value - case.json[f'{name}_mean']) <= max(5 * case.json[f'{name}_std'], 0.02)


def test_recall_and_precision_are_told_apart():
    """Half of the reference's bins: precise but incomplete; the other way round, complete but imprecise."""
    half, all_bins = np.array([0.5, 0.5, 0, 0]), np.full(4, 0.25)
    recall_like, precision_like = prd_from_histograms(half, all_bins).max_f()
    assert recall_like < 0.6 and precision_like > 0.9
    recall_like, precision_like = prd_from_histograms(all_bins, half).max_f()
    assert recall_like > 0.9 and precision_like < 0.6


def test_disjoint_distributions_score_nothing():
    rng = np.random.RandomState(0)
    curve = prd_from_features(rng.randn(50, 3), rng.randn(50, 3) + 100, num_clusters=4, num_runs=2)
    assert max(curve.max_f()) == 0


def test_what_is_no_distribution():
    with pytest.raises(ValueError, match='sum to 1'):
        prd_from_histograms([1.0, 1.0], [1.0, 1.0])
