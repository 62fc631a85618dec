"""The memorization measure and the optimal denoiser that anchors it."""

import golden_cases
import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics.memorization import Copies, nearest_neighbors
from training.diffusion.samplers import sample
from training.networks.optimal import OptimalDenoiser, optimal_denoiser


def image_blocks(images, block):
    return np.split(images, range(block, len(images), block))


def compared(generated, training, block=8192) -> Copies:
    distances, indices = nearest_neighbors(generated, image_blocks(training, block))
    return Copies(np.arange(len(generated)), distances, indices)


@pytest.mark.parametrize('case', golden_cases.cases('math', 'knn_memorization*'), ids=str)
def test_golden_distances_and_ratio(case):
    a, results = case.arrays, case.json['results']
    for block in (7, 60, 8192):
        found = compared(a['generated'], a['train'], block)
        np.testing.assert_allclose(found.distances, a['knn_distance_f64'], rtol=1e-9)
        np.testing.assert_allclose(found.distances, a['knn_distance'], rtol=1e-3)
        np.testing.assert_array_equal(found.indices, a['knn_index'])
        np.testing.assert_array_equal(found.memorized, a['memorized'])
        assert found.results()['memorization_ratio'] == results['memorized_fraction']
        assert found.results()['mean_distance'] == pytest.approx(results['mean_nearest_distance'], rel=1e-3)


def _brute_force(queries, images, k):
    difference = queries.reshape(len(queries), 1, -1).astype(np.int64) - images.reshape(1, len(images), -1)
    distances = np.sqrt((difference**2).mean(axis=2))
    return np.sort(distances, axis=1)[:, :k]


@pytest.mark.parametrize('shape', [(1, 3, 3), (3, 8, 8), (3, 8, 16), (1, 181, 182), (3, 209, 210)])
@pytest.mark.parametrize('integer_products', [True, False])
def test_neighbors_are_exact(shape, integer_products, monkeypatch):
    """Every way to multiply, and vectors too long for 32 bits, at the extremes of the range of pixels."""
    if not integer_products:
        monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    rng = np.random.RandomState(0)
    images = (rng.randint(0, 2, size=[30, *shape]) * 255).astype(np.uint8)
    queries = np.concatenate([images[[3, 8]], 255 - images[:1], np.zeros([1, *shape]), np.full([1, *shape], 255)])
    queries = queries.astype(np.uint8)
    queries[1].reshape(-1)[0] ^= 1
    distances, indices = nearest_neighbors(queries, image_blocks(images, 13), k=3)
    np.testing.assert_allclose(distances, _brute_force(queries, images, 3), rtol=1e-12)
    assert distances[0, 0] == 0 and indices[0, 0] == 3
    assert distances[1, 0] == pytest.approx(np.sqrt(1 / np.prod(shape)), rel=1e-12) and indices[1, 0] == 8
    assert all(len(set(row)) == 3 for row in indices)


def test_near_copies_have_their_exact_distance():
    """Where float32 products lose all digits."""
    images = np.random.RandomState(0).randint(200, 256, size=[500, 3, 32, 32]).astype(np.uint8)
    queries = images[:64].copy()
    queries[np.arange(64), 0, 0, 0] ^= 1
    found = compared(queries, images)
    assert (found.distances[:, 0] == np.sqrt(1 / 3072)).all()
    assert (found.indices[:, 0] == np.arange(64)).all() and found.memorized.all()


def test_rule_of_a_third():
    distances = np.array([[0, 0], [0, 1], [1, 3], [0.999, 3], [2, 3]], dtype=np.float64)
    found = Copies(np.arange(5), distances, np.zeros([5, 2], dtype=np.int64))
    assert found.memorized.tolist() == [False, True, False, True, False]
    assert found.results() == {'memorization_ratio': 0.4, 'num_memorized': 2, 'mean_distance': pytest.approx(3.999 / 5),
                               'num_images': 5}


# --- Optimal denoiser -------------------------------------------------------------------------------------------------


def _training_set(n=40, classes=4):
    rng = np.random.RandomState(1)
    return rng.randint(0, 256, size=[n, 3, 8, 8]).astype(np.uint8), rng.randint(classes, size=n)


def _posterior_mean(images, x, sigma, allowed):
    """sum_i w_i y_i in double precision, written as it is in the paper."""
    y = images.reshape(len(images), -1) / 127.5 - 1
    logits = -((x.reshape(1, -1).double().numpy() - y) ** 2).sum(axis=1) / (2 * sigma**2)
    logits[~allowed] = -np.inf
    weights = np.exp(logits - logits.max())
    return (weights[:, None] * y).sum(axis=0) / weights.sum()


@pytest.mark.parametrize('block_elements', [1, 1000, 1 << 24])
def test_optimal_denoiser_is_the_posterior_mean(block_elements, monkeypatch):
    monkeypatch.setattr('training.networks.optimal.BLOCK_ELEMENTS', block_elements)
    images, ids = _training_set()
    net = OptimalDenoiser(images, ids, 4)
    sigma = torch.tensor([0.002, 0.3, 1.5, 4.0, 80.0])
    x = torch.from_numpy(images[:5] / 127.5 - 1) + sigma[:, None, None, None] * torch.randn(5, 3, 8, 8)
    one_of_each_and_none = torch.cat([torch.eye(4), torch.zeros(1, 4)])
    allowed_by_class = np.concatenate([ids == np.arange(4)[:, None], np.ones([1, 40], bool)])
    for labels, allowed in [(None, np.ones([5, 40], bool)), (one_of_each_and_none, allowed_by_class)]:
        out = net(x, sigma, labels)
        for i in range(5):
            expected = _posterior_mean(images, x[i], float(sigma[i]), allowed[i])
            np.testing.assert_allclose(out[i].flatten(), expected, rtol=0, atol=2e-5)
    assert torch.equal(net(x, 0.5), net(x, torch.full([5], 0.5)))


def test_near_copies_are_told_apart_at_low_noise():
    """Two images that differ by one grey level: at sigma 0.002 the nearer one has nearly all the weight."""
    images = np.full([2, 3, 32, 32], 230, dtype=np.uint8)
    images[1, 0, 0, 0] += 1
    x = torch.from_numpy(images / 127.5 - 1)
    out = OptimalDenoiser(images)(x, 0.002)
    np.testing.assert_allclose(out[:, 0, 0, 0] - x[:, 0, 0, 0],
                               [_posterior_mean(images, x[i], 0.002, np.ones(2, bool))[0] - x[i, 0, 0, 0] for i in (0, 1)],
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize('sampler', ['edm2', 'edm', 'ablation', 'dpmpp-2m'])
def test_samples_of_the_optimal_denoiser_are_the_training_images(sampler):
    images, ids = _training_set()
    net = OptimalDenoiser(images, ids, 4)
    labels = torch.eye(4)[torch.arange(24) % 4]
    samples = sample(net, torch.randn([24, 3, 8, 8], generator=torch.Generator().manual_seed(0)), labels, name=sampler)
    pixels = (samples * 127.5 + 128).clip(0, 255).to(torch.uint8).numpy()
    found = compared(pixels, images)
    assert found.memorized.all() and found.results()['mean_distance'] < 1
    assert (ids[found.indices[:, 0]] == np.arange(24) % 4).all()
    assert len(set(found.indices[:, 0])) > 5


class _Dataset:
    path, label_dim = 'some.zip', 3

    def __init__(self, images, labels):
        self._images, self.stored_labels = images, labels

    def __len__(self):
        return len(self._images)

    def images(self, indices):
        return self._images[indices]


def test_optimal_denoiser_of_a_data_set():
    images, _ = _training_set(6)
    net = optimal_denoiser(_Dataset(images, np.array([0, 0, 1, 1, 0, 1])))
    assert (net.img_channels, net.img_resolution, net.label_dim) == (3, 8, 3)
    assert next(net.parameters()).device.type == 'cpu'
    with pytest.raises(UserError, match='no images of class 2'):
        net(torch.zeros([1, 3, 8, 8]), 1.0, torch.eye(3)[2:])
    with pytest.raises(UserError, match='some.zip holds latents'):
        optimal_denoiser(_Dataset(images.astype(np.float32), None))
    with pytest.raises(UserError, match='some.zip has vectors'):
        optimal_denoiser(_Dataset(images, np.zeros([6, 3], dtype=np.float32)))
