"""Metrics: golden numbers, equality with plain formulas, files that are read, and files that are refused."""

import dataclasses
import http.server
import os
import pickle
import pickletools
import re
import threading
import zipfile

import golden_cases
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import tiny
import torch
from torch.nn import functional as F

from dnnlib import UserError, url, util
from dnnlib.util import subset
from metrics import compute, detectors, inception, inception_score, neighbors, precision_recall
from metrics import images as image_files
from metrics.detectors import inception as inception_detector
from metrics.features import Detectors, measure_images
from metrics.frechet import frechet_distance
from metrics.inception import InceptionV3
from metrics.statistics import FeatureSums, Gaussian, Statistics, load_statistics, save_statistics
from torch_utils import distributed
from training.data.images import open_images


def one_line(error) -> str:
    text = str(error.value)
    assert '\n' not in text and 10 < len(text) < 500
    return text


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Statistics and the Frechet distance ------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'feature_stats*'), ids=str)
@pytest.mark.parametrize('pieces', [1, 7])
def test_golden_feature_statistics(case, pieces):
    for key in (key for key in case.arrays if key.endswith('features')):
        sums = FeatureSums()
        for part in case.tensor(key).chunk(pieces):
            sums.add(part)
        found, prefix = sums.gaussian(), key.removesuffix('features')
        np.testing.assert_allclose(found.mu, case.arrays[f'{prefix}mu'], rtol=1e-9)
        np.testing.assert_allclose(found.sigma, case.arrays[f'{prefix}sigma'], rtol=1e-9)


def test_statistics_of_one_image_and_of_nan_are_refused():
    for features, message in ((torch.zeros(1, 3), 'at least 2 images'), (torch.full((5, 3), torch.nan), 'NaN')):
        sums = FeatureSums()
        sums.add(features)
        with pytest.raises(UserError, match=message):
            sums.gaussian()


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'frechet_distance*', lambda c: c.json['results']),
                         ids=golden_cases.ids)
def test_golden_frechet_distance(case, name):
    arguments = [case.arrays[f'{name}.{key}'] for key in ('mu1', 'sigma1', 'mu2', 'sigma2')]
    np.testing.assert_allclose(frechet_distance(*arguments), case.json['results'][name]['exact'], rtol=1e-6)


def covariance(num, dim, seed):
    x = random(num, dim, seed=seed).double() @ random(dim, dim, seed=seed + 100).double() / dim**0.5
    return np.cov(x.numpy().T)


@pytest.mark.filterwarnings('ignore:Matrix is singular')
@pytest.mark.parametrize('num1, num2', [(400, 300), (30, 300), (30, 20), (300, 2)])
def test_frechet_distance_against_the_square_root_of_a_matrix(num1, num2):
    sigma1, sigma2, mu = covariance(num1, 60, 0), covariance(num2, 60, 1), np.linspace(0, 1, 60)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2 if num1 > num2 else sigma2 @ sigma1)
    expected = np.square(mu).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    np.testing.assert_allclose(frechet_distance(mu, sigma1, 0 * mu, sigma2), expected, rtol=1e-6)


@pytest.mark.parametrize('decades', [4, 10, 16])
@pytest.mark.parametrize('close', [False, True])
def test_frechet_distance_with_known_eigenvalues(decades, close):
    """Covariances with common eigenvectors: the sum of (sqrt(a) - sqrt(b))^2, exact also where little is left of it."""
    dim, generator = 120, np.random.RandomState(0)
    basis = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
    a = 10 ** (-decades * np.arange(dim) / dim)
    b = 1.01 * a if close else generator.permutation(a)
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(np.zeros(dim), basis * a @ basis.T, np.zeros(dim), basis * b @ basis.T)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_frechet_distance_of_equal_and_of_constant_features():
    sigma, mu = covariance(20, 50, 0), np.zeros(50)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-9 * np.trace(sigma)
    np.testing.assert_allclose(frechet_distance(mu, 0 * sigma, mu + 1, sigma), 50 + np.trace(sigma))
    assert frechet_distance(mu, 0 * sigma, mu, 0 * sigma) == 0


@pytest.mark.parametrize('sigma, message', [
    (np.eye(3), 'of 2 and 3 dimensions'), (np.full((2, 2), np.nan), 'NaN'), ([[1, 2], [2, 1]], 'semidefinite'),
    (-np.eye(2), 'semidefinite')])
def test_frechet_distance_refuses(sigma, message):
    sigma = np.asarray(sigma, dtype=float)
    with pytest.raises(UserError, match=message) as error:
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(len(sigma)), sigma)
    one_line(error)


# --- Inception Score --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'inception_score*'), ids=str)
def test_golden_inception_score(case):
    probs = case.tensor('probs')
    parts, expected = inception_score.inception_score(probs, inception_score.equal_parts(len(probs))), case.json['ten_splits']
    np.testing.assert_allclose(parts, expected['per_split'], rtol=1e-9)
    np.testing.assert_allclose(parts.mean(), expected['mean'], rtol=1e-9)
    np.testing.assert_allclose(parts.std(correction=0), expected['std_population'], rtol=1e-9)
    np.testing.assert_allclose(parts.std(), expected['std_unbiased_torch'], rtol=1e-9)
    for size, expected in case.json['chunked'].items():
        parts = inception_score.inception_score(probs, inception_score.chunks(len(probs), int(size)))
        np.testing.assert_allclose(parts, expected['per_split'], rtol=1e-9)
        np.testing.assert_allclose(parts.mean(), expected['score'], rtol=1e-9)


def test_protocols_split_and_spread_as_published():
    """ADM: chunks of 5000 of probabilities without bias; CBDM: ten parts, with torch the unbiased deviation."""
    probs = {name: random(7000, 5, seed=i).softmax(dim=1) for i, name in enumerate(('softmax', 'softmax_nobias'))}
    made = Statistics('', features=probs)
    for name, bounds in {'adm': [0, 5000, 7000], 'edm': [0, 5000, 7000], 'cbdm': [*range(0, 7001, 700)]}.items():
        rules = compute.PROTOCOLS[name]
        scores = inception_score.inception_score(probs['softmax' if name == 'cbdm' else 'softmax_nobias'], bounds)
        for unbiased in (False, True):
            found = compute.score(made, None, None, dataclasses.replace(rules, unbiased=unbiased))
            spread = scores.std(correction=int(unbiased)).item()
            assert found == pytest.approx({'is': scores.mean().item(), 'is_std': spread})
        assert (rules.k, rules.strict, rules.manifold, rules.num) == (
            (5, True, 50000, 50000) if name == 'cbdm' else (3, False, 10000, 50000))


def test_inception_score_of_certain_and_of_empty_classes():
    probs = torch.eye(8)[torch.arange(80) % 4]      # four of eight classes, each certain
    np.testing.assert_allclose(inception_score.inception_score(probs, [0, 80]), [4])
    assert inception_score.equal_parts(3) == [0, 1, 2, 3] and inception_score.chunks(10, 4) == [0, 4, 8, 10]


# --- Nearest neighbours, precision and recall -------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'improved_precision_recall*'), ids=str)
def test_golden_precision_recall(case):
    ref, gen = case.tensor('ref'), case.tensor('gen')
    for name, expected in case.json['results'].items():
        convention, k, *precision = re.fullmatch(r'(adm|cbdm)_k(\d+)(?:_(f\d+))?', name).groups()
        found = precision_recall.precision_recall(ref, gen, int(k), strict=convention == 'cbdm')
        tolerance = [0.02, 0.02] if precision == ['f16'] else [1.5 / len(gen), 1.5 / len(ref)]
        assert abs(found[0] - expected['precision']) < tolerance[0], name
        assert abs(found[1] - expected['recall']) < tolerance[1], name
    for name in (name for name in case.arrays if '_radii_' in name):
        convention, k, which = re.fullmatch(r'(adm|cbdm)_k(\d+)_radii_(?:sq_)?(ref|gen)', name).groups()
        radii = precision_recall.knn_radii(case.tensor(which), int(k))
        radii = radii if convention == 'adm' else radii.sqrt()
        np.testing.assert_allclose(radii, case.arrays[name], rtol=1e-5 if convention == 'adm' else 1e-12)


def all_squares(u, v):
    return torch.cdist(u.double(), v.double(), compute_mode='donot_use_mm_for_euclid_dist').square()


DATA = {
    'normal': lambda n, seed: random(n, 24, seed=seed),
    # Far from the origin, in two places: matrix products in single precision see only noise.
    'distant': lambda n, seed: 1000.0 * (torch.arange(n) % 2)[:, None] + 100 + 1e-2 * random(n, 24, seed=seed),
    'pixels with copies': lambda n, seed: (random(n // 4, 24, seed=seed) * 40 + 128).to(torch.uint8).repeat(4, 1),
}


@pytest.mark.parametrize('name', DATA)
@pytest.mark.parametrize('rows', [33, 64, 1000])
def test_nearest_is_exact_for_any_block_size(name, rows, monkeypatch):
    monkeypatch.setattr(neighbors, 'ROWS', rows)
    points, queries = DATA[name](200, 0), DATA[name](120, 1)
    for found, index, u in ((*neighbors.nearest(queries, points, k=4), queries), (*neighbors.nearest(points, k=4), points)):
        squares = all_squares(u, points)
        torch.testing.assert_close(found, squares.topk(4, largest=False).values, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, squares.gather(1, index), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', DATA)
@pytest.mark.parametrize('strict', [False, True])
def test_precision_recall_is_exact_for_any_block_size(name, strict, monkeypatch):
    ref, gen = DATA[name](200, 0), DATA[name](120, 1)
    gen[:20] = ref[:20]
    radii = [all_squares(x, x).kthvalue(4, dim=1).values for x in (ref, gen)]
    squares = all_squares(ref, gen)
    inside = torch.lt if strict else torch.le
    expected = (inside(squares, radii[0][:, None]).any(0).double().mean().item(),
                inside(squares, radii[1]).any(1).double().mean().item())
    for rows in (37, 1000):
        monkeypatch.setattr(neighbors, 'ROWS', rows)
        assert precision_recall.precision_recall(ref, gen, k=3, strict=strict) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_refuses():
    for ref, gen, message in ((random(9, 3), random(9, 4), 'dimensions do not fit'),
                              (random(3, 3), random(9, 3), 'more than 3'), (random(9, 3), random(9, 3) * torch.nan, 'NaN')):
        with pytest.raises(UserError, match=message) as error:
            precision_recall.precision_recall(ref, gen, k=3)
        one_line(error)


# --- Detectors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Random weights of the Inception network in the three forms that are read."""
    torch.manual_seed(0)
    folder, net = tmp_path_factory.mktemp('inception'), InceptionV3().eval()
    state = net.state_dict()
    torch.save(state, folder / 'state.pth')
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, folder / 'state.safetensors')
    net.forward = lambda x: x       # the program of the archive does not matter, and this one is compiled at once
    torch.jit.trace(net, torch.zeros(1)).save(folder / 'script.pt')
    return folder


def test_inception_weights_are_read_from_every_form(weights):
    made = [detectors.Inception(str(path)) for path in sorted(weights.iterdir())]
    assert len(made) == 3 and len({d.fingerprint for d in made}) == 1
    gray = (random(2, 1, 20, 20) * 50 + 128).to(torch.uint8)
    found = made[0](gray, ('pool3', 'spatial', 'softmax_nobias'))
    assert {name: list(value.shape) for name, value in found.items()} == {
        'pool3': [2, 2048], 'spatial': [2, 2023], 'softmax_nobias': [2, 1008]}
    torch.testing.assert_close(found['pool3'], made[1](gray.repeat(1, 3, 1, 1), ('pool3',))['pool3'])


def test_tensorflow_resizing_by_hand(monkeypatch):
    """A ramp 64 r + 16 c of 4 x 4 pixels at 6 x 6: pixel (i, j) is the ramp at 2/3 (i, j), and at 3 beyond the last."""
    monkeypatch.setattr(inception, 'SIZE', 6)
    ramp = (64 * torch.arange(4)[:, None] + 16 * torch.arange(4)).to(torch.uint8)
    rows = [0, 128 / 3, 256 / 3, 128, 512 / 3, 192]
    columns = [0, 32 / 3, 64 / 3, 32, 128 / 3, 48]
    expected = (torch.tensor(rows)[:, None] + torch.tensor(columns) - 128) / 128
    torch.testing.assert_close(inception.tensorflow(ramp[None, None])[0, 0], expected)
    half = inception.half_pixel(ramp[None, None])[0, 0]         # at 2/3 (i + 1/2) - 1/2, within the picture
    places = torch.tensor([0, 1 / 2, 7 / 6, 11 / 6, 5 / 2, 3])
    torch.testing.assert_close(half, (64 * places[:, None] + 16 * places) / 127.5 - 1)


@pytest.mark.parametrize('shape', [(2, 3, 7, 5), (1, 1, 1, 1), (1, 1, 299, 299), (1, 3, 301, 640)])
def test_tensorflow_resizing_pixel_by_pixel(shape):
    """Odd sizes, gray, larger ones: the weighted four pixels around i in / out."""
    images = (random(*shape) * 60 + 128).clamp(0, 255).to(torch.uint8)
    found = inception.tensorflow(images)
    assert found.shape == (*shape[:2], 299, 299)
    x = images.double()
    for i, j in np.random.RandomState(0).randint(299, size=(40, 2)).tolist() + [[298, 298], [0, 0]]:
        (r, u), (c, v) = (divmod(k * size / 299, 1) for k, size in zip((i, j), shape[2:], strict=True))
        r, c = int(r), int(c)
        below, right = min(r + 1, shape[2] - 1), min(c + 1, shape[3] - 1)
        pixel = (1 - u) * ((1 - v) * x[..., r, c] + v * x[..., r, right]) \
            + u * ((1 - v) * x[..., below, c] + v * x[..., below, right])
        torch.testing.assert_close(found[..., i, j].double(), (pixel - 128) / 128, rtol=0, atol=1e-3)


def test_measures_are_exact_whatever_the_network_is_run_with(weights, monkeypatch):
    """With --precision=tf32 features would be others, and distances no certificate of anything."""
    seen = []

    def noted(function):
        return lambda *args: seen.append(distributed.uses_tf32()) or function(*args)

    monkeypatch.setattr(neighbors, '_slices', noted(neighbors._slices))
    monkeypatch.setattr(InceptionV3, 'forward', noted(InceptionV3.forward))
    distributed.set_tf32(True)
    try:
        precision_recall.precision_recall(random(9, 3), random(9, 3, seed=1), k=3)
        detectors.Inception(str(weights / 'state.pth'))(torch.zeros(1, 3, 8, 8), ('pool3',))
        assert distributed.uses_tf32() and len(seen) > 4 and not any(seen)
    finally:
        distributed.set_tf32(False)


def test_protocols_show_images_in_their_way(weights):
    images = (random(2, 3, 32, 32) * 60 + 128).clamp(0, 255).to(torch.uint8)
    seen = {name: Detectors({'inception': str(weights / 'state.pth')}, 'cpu', name)['inception'].net.prepare(images)
            for name in detectors.PROTOCOLS}
    assert torch.equal(seen['edm'], seen['adm'])
    assert torch.equal(seen['edm'], inception.tensorflow(images))
    assert torch.equal(seen['cbdm'], inception.half_pixel(images))


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_foreign_weights_are_refused_in_one_line(tmp_path):
    torch.save({'fc.weight': torch.zeros(1008, 2048), 'other': torch.zeros(1)}, tmp_path / 'other.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    (tmp_path / 'text.pth').write_text('weights')
    with open(tmp_path / 'evil.pth', 'wb') as f:
        pickle.dump({'a': os.system}, f)
    for name, message in (('other.pth', 'lacks'), ('list.pth', 'dictionary of weights'), ('text.pth', 'no known kind'),
                          ('evil.pth', 'system'), ('none.pth', 'no such file')):
        with pytest.raises(UserError, match=message) as error:
            detectors.Inception(str(tmp_path / name))
        assert name in one_line(error)


def test_inception_has_the_hash_that_its_name_says_or_the_user(weights, tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    right = util.hash_file(weights / 'state.pth')
    for path in (url.cache_path(inception_detector.INCEPTION_URL), tmp_path / 'weights-inception-2015-12-05-6726825d.pth'):
        os.link(weights / 'state.pth', path)    # in the cache already, or a copy of the user's
        with pytest.raises(UserError, match='6726825d') as error:
            detectors.Inception(None if 'pt_' in str(path) else str(path))
        assert str(path) in one_line(error)
    Detectors({'inception': str(weights / 'state.pth')}, 'cpu', inception_sha256=right)['inception']
    for sha256, message in (('0' * 64, right), ('x', 'hexadecimal')):
        with pytest.raises(UserError, match=message) as error:
            Detectors({'inception': str(weights / 'state.pth')}, 'cpu', inception_sha256=sha256)['inception']
        one_line(error)
    monkeypatch.setattr(inception_detector, 'hash_file', lambda path: '6726825d' + '0' * 56)
    assert detectors.Inception().weights == inception_detector.INCEPTION_URL


def test_inception_that_is_not_finite_names_its_own_option(tmp_path):
    state = InceptionV3().state_dict()
    state['fc.bias'][3] = np.nan
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='not finite') as error:
        detectors.Inception(str(tmp_path / 'x.pth'))
    assert error.value.field == 'inception'


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4))
        self.register_buffer('table', torch.arange(6).reshape(2, 3).t())
        self.small = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))

    def forward(self, x):
        return self.inner(x)


def rewritten(source, dest, change):
    """A copy of a zip, its files passed through change(name, data)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, 'w') as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return str(dest)


def test_torchscript_tensors_and_hostile_torchscript(tmp_path):
    net = Small()
    torch.jit.script(net).save(tmp_path / 'good.pt')
    found = inception_detector.read_tensors(str(tmp_path / 'good.pt'))
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    evil = rewritten(tmp_path / 'good.pt', tmp_path / 'evil.pt',
                     lambda name, data: pickle.dumps(Evil(), 2) if name.endswith('data.pkl') else data)
    short = rewritten(tmp_path / 'good.pt', tmp_path / 'short.pt',
                      lambda name, data: data[:-4] if name.endswith('data/0') else data)
    cut = rewritten(tmp_path / 'good.pt', tmp_path / 'cut.pt',
                    lambda name, data: data[:300] if name.endswith('data.pkl') else data)
    # A tensor that claims more numbers than its storage has: BININT1 3 (channels) becomes 200.
    large = rewritten(tmp_path / 'good.pt', tmp_path / 'large.pt',
                      lambda name, data: data.replace(b'K\x04K\x03K\x03K\x03', b'K\xffK\xffK\xffK\x03', 1)
                      if name.endswith('data.pkl') else data)
    for path, message in ((evil, 'mkdir'), (short, 'numbers'), (cut, 'cut off'), (large, 'larger than its storage')):
        with pytest.raises(UserError, match=message) as error:
            inception_detector.read_tensors(path)
        assert path in one_line(error)
    assert not (tmp_path / 'ran').exists()


def test_dinov2_features(tmp_path):
    images = (random(2, 3, 40, 40) * 60 + 128).clamp(0, 255).to(torch.uint8)
    x = F.interpolate(images.float(), size=(224, 224), mode='bicubic', antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for size, tolerance in ((224, 1e-5), (518, 0.02)):
        # With 37 x 37 positions the original code samples them a little elsewhere than transformers.
        net = tiny.save_tiny_dinov2(tmp_path / str(size), size)
        found = detectors.DINOv2(str(tmp_path / str(size)))(images)['features']
        with torch.no_grad():
            expected = net(pixel_values=x).last_hidden_state[:, 0]
        error = golden_cases.relative_error(found, expected)
        assert error < tolerance and (size == 224 or error > 1e-5)


def test_dinov2_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    for name in (str(tmp_path), 'nobody/nothing', str(tmp_path / 'none')):
        with pytest.raises(UserError, match='give a local folder') as error:
            detectors.DINOv2(name)
        one_line(error)


def test_pixels_are_the_pixels_of_small_images():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    assert torch.equal(detectors.Pixels()(images)['features'], images.reshape(2, 48).float())
    with pytest.raises(UserError, match='at most') as error:
        detectors.Pixels()(torch.zeros(1, 3, 256, 256))
    one_line(error)


# --- Images and reference files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz_images(save, tmp_path):
    pixels = np.random.RandomState(0).randint(256, size=(9, 5, 5, 3), dtype=np.uint8)
    path = str(tmp_path / 'samples.npz')
    save(path, pixels, np.array([0, 1, 2] * 3))
    images = open_images(path)
    np.testing.assert_array_equal(images.images([7, 2]), pixels[[7, 2]].transpose(0, 3, 1, 2))
    assert image_files.select(images, class_name='1').tolist() == [1, 4, 7]
    parts = list(image_files.read_batches(images, np.array([1, 4, 7, 8, 0]), batch=2))
    assert [p.tolist() for p, _, _ in parts] == [[1, 4], [7, 8], [0]]
    assert torch.cat([ids for _, _, ids in parts]).tolist() == [1, 1, 1, 2, 0]
    np.testing.assert_array_equal(torch.cat([x for _, x, _ in parts]).permute(0, 2, 3, 1), pixels[[1, 4, 7, 8, 0]])


@pytest.mark.parametrize('arrays, message', [
    ({'arr_0': np.zeros((2, 4, 4, 3), np.float32)}, 'float32'), ({'arr_0': np.zeros((2, 4, 4, 5), np.uint8)}, 'instead of uint8'),
    ({'arr_0': np.zeros((2, 4, 4, 3), np.uint8), 'arr_1': np.zeros(3, int)}, 'arr_1')])
def test_npz_that_holds_no_images_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / 'x.npz', **arrays)
    with pytest.raises(UserError, match=message) as error:
        open_images(str(tmp_path / 'x.npz'))
    one_line(error)


def gaussian(dim, seed, num=None):
    return Gaussian(random(dim, seed=seed).double().numpy(), covariance(50, dim, seed), num)


def assert_same(a: Gaussian, b: Gaussian):
    np.testing.assert_array_equal(a.mu, b.mu)
    np.testing.assert_array_equal(a.sigma, b.sigma)
    assert a.num == b.num


@pytest.mark.parametrize('name', ['ref.pkl', 'ref.npz', 'ref.pt'])
def test_our_reference_files(name, tmp_path):
    made = Statistics('', {'fid': gaussian(6, 0, 50), 'fd_dinov2': gaussian(4, 1, 50)}, {'fid': random(5, 6)},
                      torch.arange(5), meta={'data': 'x.zip', 'detectors': {}})
    path = str(tmp_path / 'sub' / name)
    save_statistics(path, made)
    found = load_statistics(path)
    assert found.gaussians.keys() == made.gaussians.keys() and found.meta == made.meta and found.images is None
    for space in made.gaussians:
        assert_same(found.gaussians[space], made.gaussians[space])
    assert torch.equal(found.features['fid'], made.features['fid']) and found.features.keys() == {'fid'}
    assert torch.equal(found.labels, made.labels)


def test_one_space_in_an_npz_is_what_other_programs_read(tmp_path):
    """Bare mu and sigma; and files of earlier versions, with the name of the space before each."""
    a = gaussian(6, 0, 50)
    save_statistics(str(tmp_path / 'new.npz'), Statistics('', {'fd_pixels': a}))
    with np.load(tmp_path / 'new.npz') as z:
        np.testing.assert_array_equal(z['mu'], a.mu)
        np.testing.assert_array_equal(z['sigma'], a.sigma)
    np.savez(tmp_path / 'old.npz', meta=np.array('{}'), **{f'fd_pixels/{key}': value for key, value in vars(a).items()})
    meta = np.array('{"detector": "pixels", "fingerprint": null}')
    np.savez(tmp_path / 'long_tail.npz', mu=a.mu, sigma=a.sigma, meta=meta, num=50)
    for name in ('new', 'old', 'long_tail'):
        assert_same(load_statistics(str(tmp_path / f'{name}.npz')).gaussians['fd_pixels'], a)


def test_npz_has_the_names_of_the_originals(tmp_path):
    """`mu`, `sigma` of FID, `mu_s`, `sigma_s` of sFID, whatever else is beside them; of sFID alone, too."""
    made = Statistics('', {space: gaussian(dim, dim, 50) for space, dim in
                           (('fd_pixels', 3), ('sfid', 4), ('fid', 6))}, {'sfid': random(5, 4)}, protocol='adm')
    save_statistics(str(tmp_path / 'x.npz'), made)
    with np.load(tmp_path / 'x.npz', allow_pickle=False) as z:
        for name, array in (('mu', made.gaussians['fid'].mu), ('sigma', made.gaussians['fid'].sigma),
                            ('mu_s', made.gaussians['sfid'].mu), ('sigma_s', made.gaussians['sfid'].sigma)):
            np.testing.assert_array_equal(z[name], array)
    save_statistics(str(tmp_path / 'sfid.npz'), Statistics('', {'sfid': made.gaussians['sfid']}, protocol='adm'))
    with np.load(tmp_path / 'sfid.npz', allow_pickle=False) as z:
        assert 'mu_s' in z and 'mu' not in z
    for name, spaces in (('x.npz', made.gaussians.keys()), ('sfid.npz', {'sfid'})):
        found = load_statistics(str(tmp_path / name))
        assert found.gaussians.keys() == spaces and found.protocol == 'adm'
        assert_same(found.gaussians['sfid'], made.gaussians['sfid'])


def test_pkl_is_a_plain_pickle_of_the_same_bytes(tmp_path):
    """EDM2 loads it with the pickle of Python; so does any version of NumPy, by names that all of them know."""
    made = Statistics('', {'fid': gaussian(6, 0, 50), 'fd_dinov2': gaussian(4, 1, 50)}, {'fid': random(5, 6)},
                      torch.arange(5), protocol='edm', meta={'data': 'x.zip'})
    for name in ('a.pkl', 'b.pkl', 'a.npz', 'b.npz'):
        save_statistics(str(tmp_path / name), made)
    assert (tmp_path / 'a.pkl').read_bytes() == (tmp_path / 'b.pkl').read_bytes()
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    content = pickle.loads((tmp_path / 'a.pkl').read_bytes())
    for space, values in made.gaussians.items():
        assert type(content[space]['mu']) is np.ndarray
        np.testing.assert_array_equal(content[space]['mu'], values.mu)
        np.testing.assert_array_equal(content[space]['sigma'], values.sigma)
    names = {arg for op, arg, _ in pickletools.genops((tmp_path / 'a.pkl').read_bytes()) if op.name == 'GLOBAL'}
    assert names == {'numpy.core.multiarray _reconstruct', 'numpy ndarray', 'numpy dtype'}


def test_statistics_are_of_the_protocol_that_they_name_or_of_their_family(tmp_path):
    a, pixels = gaussian(6, 0), np.zeros((3, 4, 4, 3), np.uint8)
    for name in detectors.PROTOCOLS:
        for ending in ('npz', 'pkl'):
            save_statistics(str(tmp_path / f'{name}.{ending}'), Statistics('', {'fid': a}, protocol=name))
            assert load_statistics(str(tmp_path / f'{name}.{ending}')).protocol == name
    bare = dict(mu=a.mu, sigma=a.sigma)
    (tmp_path / 'edm2.pkl').write_bytes(pickle.dumps({'fid': bare}))
    np.savez(tmp_path / 'bare.npz', **bare)
    np.savez(tmp_path / 'adm1.npz', arr_0=pixels, **bare)
    np.savez(tmp_path / 'adm2.npz', mu_s=a.mu, sigma_s=a.sigma, **bare)
    np.savez(tmp_path / 'earlier.npz', meta='{}', num=50, **bare)
    torch.save({'format': 'feature-statistics-1', 'fid': {key: torch.from_numpy(x) for key, x in bare.items()},
                'meta': {}}, tmp_path / 'earlier.pkl')
    for name, family in {'edm2.pkl': 'edm', 'bare.npz': None, 'adm1.npz': 'adm', 'adm2.npz': 'adm',
                         'earlier.npz': 'cbdm', 'earlier.pkl': 'cbdm'}.items():
        reference = load_statistics(str(tmp_path / name))
        assert reference.protocol == family, name
        for protocol in detectors.PROTOCOLS:
            if family is None or (family == 'cbdm') == (protocol == 'cbdm'):
                compute.same_protocol(reference, protocol, ['fid'])
            else:
                with pytest.raises(UserError, match=f'protocol {family}') as error:
                    compute.same_protocol(reference, protocol, ['fid', 'fd_pixels'])
                assert name in one_line(error)
            compute.same_protocol(reference, protocol, ['fd_pixels'])    # has no part in it
    np.savez(tmp_path / 'other.npz', protocol='tiger', **bare)
    with pytest.raises(UserError, match='protocol is none of edm') as error:
        load_statistics(str(tmp_path / 'other.npz'))
    one_line(error)


@pytest.mark.parametrize('part', ['mu', 'sigma', 'features'])
def test_statistics_that_are_not_finite_are_refused_when_they_are_read(part, tmp_path):
    made = Statistics('', {'fid': gaussian(6, 0, 50)}, {'fid': random(5, 6)})
    array = made.features['fid'] if part == 'features' else getattr(made.gaussians['fid'], part)
    array[-1] = np.nan
    for name in ('a.pkl', 'a.npz'):
        save_statistics(str(tmp_path / name), made)
        with pytest.raises(UserError, match=f'{name}: its statistics hold NaN'):
            load_statistics(str(tmp_path / name))


@pytest.mark.parametrize('protocol', range(2, 6))
def test_published_pickles(protocol, tmp_path):
    a, b = gaussian(6, 0), gaussian(4, 1)
    path = tmp_path / 'img512.pkl'
    path.write_bytes(pickle.dumps({'num_images': 50, 'fid': dict(mu=a.mu, sigma=a.sigma),
                                   'fd_dinov2': dict(mu=b.mu, sigma=np.asfortranarray(b.sigma))}, protocol))
    found = load_statistics(str(path))
    assert_same(found.gaussians['fid'], a)
    assert_same(found.gaussians['fd_dinov2'], b)


def test_published_npz(tmp_path):
    a, b = gaussian(6, 0), gaussian(4, 1)
    np.savez(tmp_path / 'edm.npz', mu=a.mu, sigma=a.sigma)
    found = load_statistics(str(tmp_path / 'edm.npz'))
    assert found.gaussians.keys() == {'fid'} and found.images is None
    assert_same(found.gaussians['fid'], a)
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / 'adm.npz', arr_0=pixels, mu=a.mu, sigma=a.sigma, mu_s=b.mu, sigma_s=b.sigma)
    found = load_statistics(str(tmp_path / 'adm.npz'))
    assert found.gaussians.keys() == {'fid', 'sfid'} and found.images
    assert_same(found.gaussians['sfid'], b)
    np.savez(tmp_path / 'batch.npz', arr_0=pixels)
    found = load_statistics(str(tmp_path / 'batch.npz'))
    assert not found.gaussians and found.images


def test_bad_references_end_in_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    a = gaussian(6, 0)
    whole = pickle.dumps({'fid': dict(mu=a.mu, sigma=a.sigma)}, 4)
    np.savez(tmp_path / 'shapes.npz', mu=a.mu, sigma=a.sigma[:3])
    np.savez(tmp_path / 'other.npz', weights=a.mu)
    np.savez(tmp_path / 'objects.npz', mu=np.array([Evil()], dtype=object), sigma=a.sigma)
    torch.save({'fid': {'mu': torch.zeros(3), 'sigma': torch.zeros(2, 2)}}, tmp_path / 'shapes.pkl')
    contents = {'evil.pkl': pickle.dumps({'fid': Evil()}), 'cut.pkl': whole[:len(whole) // 2], 'text.pkl': b'mu',
                'empty.pkl': b'', 'plain.pkl': pickle.dumps([1, 2]), 'cut.npz': (tmp_path / 'shapes.npz').read_bytes()[:200]}
    endless = [1.0]                                  # a list of lists of lists, each twice: 2^40 numbers
    for _ in range(40):
        endless = [endless, endless]
    table = dict(mu=a.mu, sigma=a.sigma)
    contents |= {f'endless {i}.pkl': pickle.dumps(x) for i, x in enumerate((
        {'fid': dict(mu=endless, sigma=endless)}, {'fid': table, 'protocol': endless},
        {'fid': table, 'meta': {'data': endless}}, {'fid': table, 'labels': endless}))}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for name in [*contents, 'shapes.npz', 'other.npz', 'objects.npz', 'shapes.pkl', 'missing.pkl']:
        with pytest.raises(UserError) as error:
            load_statistics(str(tmp_path / name))
        assert name in one_line(error)
    assert not (tmp_path / 'ran').exists()


# --- Metrics from features --------------------------------------------------------------------------------------------


def test_every_metric_is_computed_from_what_it_names(tmp_path, weights):
    """All metrics of one detector in one pass equal the functions applied to its outputs."""
    pixels = (random(16, 3, 8, 8) * 50 + 128).clamp(0, 255).to(torch.uint8)
    np.savez(tmp_path / 'gen.npz', pixels[:7].permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / 'ref.npz', pixels[7:].permute(0, 2, 3, 1).numpy())
    found = Detectors({'inception': str(weights / 'state.pth')}, 'cpu')
    metrics = ['fid', 'sfid', 'is', 'precision', 'recall', 'fd_pixels', 'recall_pixels']
    net = found['inception']
    features = [net(x, ('pool3', 'spatial', 'softmax')) for x in (pixels[7:], pixels[:7])]

    rules = compute.PROTOCOLS['cbdm']
    ref = compute.complete(load_statistics(str(tmp_path / 'ref.npz')), metrics, found, open_images, batch=7)
    images = open_images(str(tmp_path / 'gen.npz'))
    measured = measure_images(images, found, batch=5, **compute.needs(metrics, rules))
    results = compute.evaluate(metrics, measured, ref, rules)

    def distance(output):
        ref, gen = (f[output].double().numpy() for f in features)
        return frechet_distance(gen.mean(0), np.cov(gen.T), ref.mean(0), np.cov(ref.T))

    expected = dict(zip(['precision', 'recall'], precision_recall.precision_recall(
        features[0]['pool3'], features[1]['pool3'], k=5, strict=True), strict=True))
    scores = inception_score.inception_score(features[1]['softmax'], inception_score.equal_parts(7))
    expected |= {'fid': distance('pool3'), 'sfid': distance('spatial'), 'is': scores.mean().item()}
    flat = [x.flatten(1).float() for x in (pixels[7:], pixels[:7])]
    expected['recall_pixels'] = precision_recall.precision_recall(*flat, k=5, strict=True)[1]
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
    assert list(results) == ['fid', 'sfid', 'is', 'is_std', 'precision', 'recall', 'fd_pixels', 'recall_pixels']
    assert any('7 images for 2048 dimensions' in note for note in compute.notes(measured, ref, found))


def test_features_are_kept_in_order_and_no_more_than_asked(tmp_path):
    pixels = np.random.RandomState(0).randint(256, size=(20, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / 'x.npz', pixels)
    images = open_images(str(tmp_path / 'x.npz'))
    measured = measure_images(images, Detectors(device='cpu'), batch=3, keep_num=6, gaussians=['fd_pixels'],
                                      features=['fd_pixels'])
    kept = subset(20, 6, 0)
    np.testing.assert_array_equal(measured.features['fd_pixels'], pixels[kept].transpose(0, 3, 1, 2).reshape(6, 12))
    np.testing.assert_allclose(measured.gaussians['fd_pixels'].mu, pixels.transpose(0, 3, 1, 2).reshape(20, 12).mean(0))


# --- Downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of this machine: /file answers, /short breaks off, all else is 404. Counts its requests."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.count += 1
            self.send_response(200 if self.path in ('/a/file.pkl', '/short') else 404)
            self.send_header('Content-Length', '100000')
            self.end_headers()
            if self.path == '/a/file.pkl':
                self.wfile.write(b'x' * 100000)
            elif self.path == '/short':
                self.wfile.write(b'x' * 1000)

        def log_message(self, *args):
            pass

    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as running:
        running.count, running.url = 0, f'http://127.0.0.1:{running.server_port}'
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_downloads_are_complete_and_kept(server, tmp_path):
    path = url.download(f'{server.url}/a/file.pkl')
    assert os.path.basename(path).endswith('-file.pkl') and os.path.getsize(path) == 100000
    assert url.download(f'{server.url}/a/file.pkl') == path and server.count == 1
    assert url.download('some/file.pkl') == 'some/file.pkl'


@pytest.mark.parametrize('name, message', [('short', 'cannot be downloaded'), ('none', '404')])
def test_failed_downloads_leave_nothing(server, tmp_path, name, message):
    with pytest.raises(UserError, match=message) as error:
        url.download(f'{server.url}/{name}', hint='give --net=PATH')
    assert one_line(error).endswith('give --net=PATH')
    assert os.listdir(tmp_path / 'cache') == [] if (tmp_path / 'cache').exists() else True


def test_no_connection_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match='no connection to 127.0.0.1:9') as error:
        url.download('http://127.0.0.1:9/file.pkl')
    one_line(error)
