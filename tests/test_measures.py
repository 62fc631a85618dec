"""Each measure against numbers from its definition, by loops in float64, and on sets with known answers."""

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import tiny
import torch
from helpers import fails, invoke, script_module, write_digits

from dnnlib import UserError
from metrics import compute, detectors, frechet, generalization, kernels, precision_recall
from metrics.compare import differences
from metrics.features import Detectors
from metrics.shares import Estimate, Share, parts_of, share_of, with_intervals
from metrics.statistics import FeatureSums, Statistics, load_statistics
from metrics.vendi import vendi
from training.encoders import RGBEncoder
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def distances(u, v):
    """[N, M] float64, one pair at a time."""
    return np.array([[math.dist(a, b) for b in v.tolist()] for a in u.tolist()])


GEN, REF, TEST = normal(90, 6), normal(120, 6, seed=1, scale=1.1), normal(80, 6, seed=2, scale=1.1)


# --- Kernels ----------------------------------------------------------------------------------------------------------


def mmd2_by_loops(x, y, kernel) -> float:
    n, m = len(x), len(y)
    total = -2 * sum(kernel(a, b) for a in x for b in y) / (n * m)
    for side in (x, y):
        total += sum(kernel(side[i], side[j]) for i in range(len(side)) for j in range(len(side)) if i != j) \
            / (len(side) * (len(side) - 1))
    return total


def test_kernel_distances_are_their_definitions():
    x, y = GEN[:25].double().tolist(), REF[:30].double().tolist()
    dot = lambda a, b: sum(p * q for p, q in zip(a, b, strict=True))
    found = kernels.mmd2(GEN[:25].double(), REF[:30].double(), kernels.cubic)
    assert found.item() == pytest.approx(mmd2_by_loops(x, y, lambda a, b: (dot(a, b) / 6 + 1) ** 3), rel=1e-10)
    # CMMD: of directions alone, which its wide kernel hardly tells apart.
    unit = lambda rows: [[v / math.hypot(*row) for v in row] for row in rows]
    expected = 1000 * mmd2_by_loops(unit(x[:8]), unit(y[:8]), lambda a, b: math.exp(-math.dist(a, b) ** 2 / 200))
    wide = kernels.mmd2_by_blocks(*(torch.nn.functional.normalize(s[:8].double(), dim=1) for s in (GEN, REF)),
                                  kernels.gaussian, 1000)
    assert kernels.cmmd(3 * GEN[:8], REF[:8]) == pytest.approx(wide)
    assert kernels.mmd2(*(torch.tensor(unit(s[:8]), dtype=torch.float64) for s in (x, y)), kernels.gaussian).item() * 1000 == \
        pytest.approx(expected, rel=1e-8)


def test_kid_is_the_mean_of_disjoint_blocks_and_of_known_value():
    found = kernels.kid(GEN, REF)
    order = np.random.RandomState(0)
    parts = [np.array_split(order.permutation(len(side)), 20) for side in (GEN, REF)]
    values = [kernels.mmd2(GEN[a].double(), REF[b].double(), kernels.cubic).item() for a, b in zip(*parts, strict=True)]
    assert found == pytest.approx(np.mean(values)) and found.error == pytest.approx(np.std(values, ddof=1) / 20**0.5)
    # In one dimension, of x ~ N(m, 1) and y ~ N(0, 1): E (xy + 1)^3 = 3 E[x^2 y^2] + 3 E[x y] + 1 + E[x^3] E[y^3].
    m = 0.5
    square, cube = 1 + m * m, m**3 + 3 * m
    expected = (3 * square**2 + 3 * m * m + 1 + cube**2) + 4 - 2 * (3 * square + 1)
    many = kernels.kid(normal(10000, 1, shift=m), normal(10000, 1, seed=1))
    assert abs(many - expected) < 3 * many.error and many.error < 0.3 * expected
    same = kernels.kid(GEN, GEN[torch.randperm(90, generator=torch.Generator().manual_seed(1))])
    assert abs(same) < 3 * same.error
    with pytest.raises(UserError, match='at least 4'):
        kernels.kid(GEN[:3], REF)


# --- Balls ------------------------------------------------------------------------------------------------------------


def test_density_and_coverage_are_their_definitions():
    gen = torch.cat([GEN, REF[:5]])
    to_ref, own = distances(gen, REF), distances(REF, REF)
    radii = np.sort(own, axis=1)[:, 5]
    density, coverage = precision_recall.density_coverage(REF, gen)
    assert density == pytest.approx((to_ref < radii).sum() / (5 * len(gen)))
    assert coverage == pytest.approx((to_ref < radii).any(axis=0).mean())
    assert density.error == pytest.approx(((to_ref < radii).sum(axis=1) / 5).std(ddof=1) / len(gen) ** 0.5)
    far = precision_recall.density_coverage(REF, REF + 100)
    assert tuple(far) == (0, 0) and far[1].interval[1] > 0.02
    assert precision_recall.density_coverage(REF, REF.clone())[1] == 1


def test_density_and_coverage_are_those_of_prdc():
    prdc = pytest.importorskip('prdc')
    theirs = prdc.compute_prdc(real_features=REF.numpy(), fake_features=GEN.numpy(), nearest_k=5)
    ours = *precision_recall.precision_recall(REF, GEN, 5, strict=True), *precision_recall.density_coverage(REF, GEN)
    assert ours == pytest.approx(tuple(theirs[name] for name in ('precision', 'recall', 'density', 'coverage')))


def test_the_error_of_recall_is_a_bootstrap_of_generated_images():
    recall = precision_recall.precision_recall(REF, GEN)[1]
    covers = distances(GEN, REF) <= np.sort(distances(GEN, GEN), axis=1)[:, 3:4]
    weights = torch.poisson(torch.ones(90, 100), torch.Generator().manual_seed(0)).numpy()
    shares = [(covers[weights[:, i] > 0].any(axis=0)).mean() for i in range(100)]
    assert recall == covers.any(axis=0).mean() and recall.error == pytest.approx(np.std(shares, ddof=1))
    low, high = recall.interval
    assert 0 <= low < recall < high <= 1 and np.std(recall.parts, ddof=1) / 10 == pytest.approx(recall.error)


# --- Diversity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num', [4, 90])
def test_vendi_is_the_entropy_of_similarities(num):
    x = GEN[:num].double().numpy()
    unit = [row / np.linalg.norm(row) for row in x]
    values = np.linalg.eigvalsh([[a @ b / num for b in unit] for a in unit])
    expected = math.exp(-sum(v * math.log(v) for v in values if v > 1e-12))
    found = vendi(GEN[:num])
    assert found == pytest.approx(expected, rel=1e-6)
    # An image's part in it: what doubling its weight adds.
    for i in (0, num - 1):
        weights = np.full(num, 1 / num)
        weights[i] += 1e-6
        weights /= weights.sum()
        values = np.linalg.eigvalsh(sum(w * np.outer(u, u) for w, u in zip(weights, unit, strict=True)))
        changed = math.exp(-sum(v * math.log(v) for v in values if v > 1e-12))
        if num < 50:                                           # a part each
            assert found.parts[i] - found == pytest.approx((changed - expected) * 1e6, rel=1e-3, abs=1e-4)


def test_vendi_of_copies_and_of_orthogonal_images():
    assert vendi(torch.eye(7)) == pytest.approx(7) and vendi(torch.ones(9, 3)) == pytest.approx(1)
    assert vendi(torch.eye(3).repeat(10, 1) * torch.arange(1, 31)[:, None]) == pytest.approx(3)
    package = pytest.importorskip('vendi_score.vendi')
    assert vendi(GEN) == pytest.approx(package.score_dual(GEN.numpy(), normalize=True), rel=1e-4)


# --- Generalisation ---------------------------------------------------------------------------------------------------


def test_authpct_is_its_definition():
    to_train, own = distances(GEN, REF), distances(REF, REF)
    np.fill_diagonal(own, np.inf)
    authentic = [row.min() > own[row.argmin()].min() for row in to_train]
    found = generalization.authpct(GEN, REF)
    assert found == pytest.approx(100 * np.mean(authentic)) and found.interval[0] < found < found.interval[1] <= 100
    assert generalization.authpct(REF[:9] + 1e-4, REF) == 0 and generalization.authpct(GEN + 50, REF) == 100


def test_ct_is_its_definition():
    found = generalization.ct(GEN[:60], REF, TEST[:60])        # one cell
    ours, theirs = (distances(side[:60], REF).min(axis=1) for side in (GEN, TEST))
    u = scipy.stats.mannwhitneyu(ours, theirs).statistic
    assert found == pytest.approx((u - 1800) / math.sqrt(3600 * 121 / 12)) and found.error == 1
    # Two cells, far apart: the mean of their scores, weighted by held-out images.
    train, gen, test = (torch.cat([side[:70], side[:50] * 2 + 1000]) for side in (REF, GEN, TEST))
    scores = []
    for rows in (slice(0, 70), slice(70, 120)):
        ours, theirs = (distances(side[rows], train[rows]).min(axis=1) for side in (gen, test))
        u, n = scipy.stats.mannwhitneyu(ours, theirs).statistic, len(ours)
        scores.append((u - n * n / 2) / math.sqrt(n * n * (2 * n + 1) / 12))
    assert generalization.ct(gen, train, test) == pytest.approx((70 * scores[0] + 50 * scores[1]) / 120)
    assert generalization.ct(REF[:80] + 1e-3, REF, TEST) < -8 and generalization.ct(3 * GEN, REF, TEST) > 8


def fld_by_loops(gen, train, test):
    """FLD of held-out and of training images, the mixture fitted with loops in float64."""
    mean, spread = train.mean(axis=0), train.std(axis=0, ddof=1)
    gen, train, test = ((side - mean) / spread for side in (gen, train, test))
    dim = train.shape[1]

    def logs(x, centres, v):
        squares = np.square(distances(torch.tensor(x), torch.tensor(centres)))
        return squares, -squares / (2 * v) - dim / 2 * np.log(2 * math.pi * v) - math.log(len(centres))

    def fit(centres, data):
        squares = np.square(distances(torch.tensor(data), torch.tensor(centres)))
        v = np.full(len(centres), squares.min(axis=1).mean() / dim)
        for step in range(13):
            squares, values = logs(data, centres, v)
            shares = np.exp(values - scipy.special.logsumexp(values, axis=1, keepdims=True))
            v = (shares * squares).sum(axis=0) / shares.sum(axis=0) / dim if step >= 3 else \
                np.full(len(v), (shares * squares).sum() / len(data) / dim)
            v = np.maximum(v, 1e-3)
        return lambda x: scipy.special.logsumexp(logs(x, centres, v)[1], axis=1).mean()

    order = np.arange(len(train))
    np.random.RandomState(0).shuffle(order)
    half = np.sort(order[:min(len(gen), len(train) // 2)])
    perfect = fit(train[half], np.delete(train, half, axis=0))(test)
    model = fit(gen, train)
    return [100 / dim * (perfect - model(side)) for side in (test, train)]


def test_fld_is_its_definition_and_tells_copies():
    found, gap = generalization.fld(GEN, REF, TEST)
    expected = fld_by_loops(*(side.double().numpy() for side in (GEN, REF, TEST)))
    assert found == pytest.approx(expected[0], abs=0.02) and gap == pytest.approx(expected[1] - expected[0], abs=0.02)
    train, test, gen = (normal(400, 6, seed=seed) for seed in (3, 4, 5))
    (good, good_gap), (bad, bad_gap) = (generalization.fld(side, train, test) for side in (gen, train + 0.003 * gen))
    assert abs(good) < 6 and abs(good_gap) < 6 and bad > good + 10 and bad_gap < -100
    assert generalization.fld(gen + 2, train, test)[0] > 20


# --- Errors of the Frechet distance -----------------------------------------------------------------------------------


def gaussian_of(x):
    sums = FeatureSums()
    sums.add(x)
    return sums.gaussian()


@pytest.mark.parametrize('num', [200, 6])
def test_influence_is_what_leaving_an_image_out_changes(num):
    x, ref = GEN[:num].double() if num < 90 else normal(num, 6).double(), gaussian_of(2 * REF + 1)
    x = x[:, :4] if num < 90 else x
    ref = gaussian_of((2 * REF + 1)[:, :x.shape[1]])
    all_of = gaussian_of(x)
    found = frechet.influence(x.numpy(), all_of.mu, all_of.sigma, ref.mu, ref.sigma)
    without = np.array([gaussian_of(torch.cat([x[:i], x[i + 1:]])).distance(ref) for i in range(num)])
    jackknife = -(num - 1) * (without - without.mean())
    error = np.abs(found - jackknife).max() / np.abs(jackknife).max()
    assert error < (0.05 if num > 90 else 0.8)                 # of few images a whole one is no small change


@pytest.mark.parametrize('shift', [0.4, 0.0])
def test_the_error_of_a_frechet_distance_is_its_spread(shift):
    """Also where images and reference are the same, and the distance is nothing but noise."""
    ref = gaussian_of(normal(20000, 8, seed=99))
    values = []
    for seed in range(60):
        x = normal(400, 8, seed=seed, shift=shift)
        sides = (Statistics(gaussians={'fid': gaussian_of(x)}, features={'fid': x}), Statistics(gaussians={'fid': ref}))
        values.append(compute.distance(*sides, 'fid')['fid'])
    errors = [value.error for value in values]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)
    if shift:
        assert sum(low < 8 * shift**2 + np.mean(values) - 8 * shift**2 < high for low, high in
                   (value.interval for value in values)) > 50
    parts = np.array(values[0].parts)
    assert len(parts) == 50 and parts.mean() == pytest.approx(values[0], rel=1e-6)


def test_the_distance_of_infinitely_many_images():
    """Of the same distribution it is 0, and 400 images seem to be elsewhere."""
    ref = Statistics(gaussians={'fid': gaussian_of(normal(50000, 8, seed=99))})
    plain, unlimited = [], []
    for seed in range(8):
        x = normal(400, 8, seed=seed)
        sides = Statistics(gaussians={'fid': gaussian_of(x)}, features={'fid': x}), ref
        plain.append(compute.distance(*sides, 'fid')['fid'])
        unlimited.append(compute.unlimited(*sides, 'fid')['fid_inf'])
    assert np.mean(plain) > 0.06 and abs(np.mean(unlimited)) < 0.01
    with pytest.raises(UserError, match='at least 10 images'):
        compute.unlimited(Statistics(features={'fid': x[:9]}), ref, 'fid')


# --- Estimates and comparison -----------------------------------------------------------------------------------------


def test_estimates_have_errors_and_parts():
    terms = np.random.RandomState(0).randn(1000)
    value = Estimate.of_images(3, terms)
    assert value == 3 and value.error == pytest.approx(terms.std(ddof=1) / 1000**0.5)
    assert np.std(value.parts, ddof=1) / 50**0.5 == pytest.approx(value.error, rel=0.3)
    some = Estimate.of_images(3, terms[:250], 1000)            # a quarter of the images tells the error of all
    assert np.std(some.parts, ddof=1) / 50**0.5 == pytest.approx(value.error, rel=0.35)
    shown = with_intervals({'fid': value, 'a': share_of([True, False], scale=100)})
    assert shown['fid_low'] < 3 < shown['fid_high'] and shown['fid_se'] == value.error and shown['a'] == 50
    assert shown['a_high'] < 100 and [*parts_of({'fid': value, 'is': 3.0})] == ['fid']
    assert Share(0.5, 1000, 0.1).interval == pytest.approx(Share(0.5, 25).interval)


def results_of(seed, seeds, shared, own, shift=0.0):
    x = shared + own * np.random.RandomState(seed).randn(2000) + shift
    value = Estimate.of_images(10 + x.mean(), x)
    return dict(results=with_intervals({'fid': value, 'other': 1.0}), parts=parts_of({'fid': value}), seeds=seeds, num_images=2000)


def test_pairs_of_one_seed_tell_more():
    shared = np.random.RandomState(9).randn(2000)
    for seeds, certain in (([1], True), ([2], False)):
        first, second = results_of(1, [1], shared, 0.1), results_of(2, seeds, shared, 0.1, shift=0.02)
        fid, other = differences(first, second)
        assert fid.paired == certain and other.error is None and 'no known error' in other.sentence()
        assert ('worse by more than chance' in fid.sentence()) == certain and fid.value == pytest.approx(0.02, abs=0.01)
        assert fid.error == pytest.approx(0.1 * (2 / 2000) ** 0.5 if certain else (2 / 2000) ** 0.5, rel=0.35)


# --- Detectors --------------------------------------------------------------------------------------------------------


def test_clip_in_all_its_forms(tmp_path):
    import transformers
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    net = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision, projection_dim=8)).eval()
    net.save_pretrained(tmp_path / 'vision')
    # As published: both towers, sizes in a part of config.json, counters, and a file of torch.
    shutil.copytree(tmp_path / 'vision', tmp_path / 'both')
    (tmp_path / 'both/config.json').write_text(json.dumps({'vision_config': vision | {'projection_dim': 8}, 'projection_dim': 8}))
    state = safetensors.torch.load_file(tmp_path / 'both/model.safetensors')
    (tmp_path / 'both/model.safetensors').unlink()
    torch.save(state | {'text_model.x': torch.ones(2), 'vision_model.embeddings.position_ids': torch.arange(17)},
               tmp_path / 'both/pytorch_model.bin')
    images = (normal(2, 3, 40, 40) * 60 + 128).clamp(0, 255).to(torch.uint8)
    x = torch.nn.functional.interpolate(images.float(), size=(56, 56), mode='bicubic', antialias=True) / 255
    x = (x - detectors.CLIP.MEAN) / detectors.CLIP.STD
    with torch.no_grad():
        expected = net(pixel_values=x).image_embeds
    for name in ('vision', 'both'):
        found = Detectors.of(clip=str(tmp_path / name))['clip']
        torch.testing.assert_close(found(images)['features'], expected, rtol=1e-4, atol=1e-5)
    assert detectors.DINOv2Base.NAME == 'facebook/dinov2-base'
    base = tiny.save_tiny_dinov2(tmp_path / 'dino')
    assert Detectors.of(dinov2_base=str(tmp_path / 'dino'))['dinov2_base'](images)['features'].shape == (2, base.config.hidden_size)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A classifier of ten classes with random weights, as a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('own') / 'wrn.pkl'
    net = build_network('WideResNet', name='wrn-10-1', num_classes=10)
    save_snapshot(path, net, encoder=RGBEncoder(), dataset={}, recipe={}, nimg=0)
    return str(path)


def test_own_is_the_last_layer_of_a_classifier(classifier, tmp_path):
    images = (normal(3, 1, 8, 8) * 60 + 128).clamp(0, 255).to(torch.uint8)
    own = Detectors.of(own=classifier, open_network=load_snapshot)['own']
    net = load_snapshot(classifier).net
    with torch.no_grad():
        expected = net(images.expand(-1, 3, -1, -1).float() / 255, return_prelogit=True)[1]
    torch.testing.assert_close(own(images)['features'], expected)
    with pytest.raises(UserError, match='multiples of 4'):
        own(torch.zeros(1, 3, 6, 6, dtype=torch.uint8))
    with pytest.raises(UserError, match='needs the file'):
        Detectors.of(open_network=load_snapshot)['own']


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Training images, others that were held out, and generated ones, a third of them copies."""
    folder = tmp_path_factory.mktemp('measures')
    write_digits(folder / 'train.zip', 150)
    write_digits(folder / 'heldout.zip', 120, first=150)
    write_digits(folder / 'gen.zip', 150, first=100)
    return folder


def results(path):
    return json.loads(path.read_text())


def test_all_metrics_of_pixels_and_of_a_classifier(digits, classifier, tmp_path):
    names = [name for name in compute.METRICS if name.endswith(('_pixels', '_own', 'pixels_inf', 'own_inf'))]
    assert len(names) == 24
    call = ('calculate_metrics.py', 'calc', f'--images={digits}/gen.zip', f'--metrics={",".join(names)}', f'--own={classifier}')
    for ref, dest in ((f'{digits}/train.zip', 'images'), (f'{tmp_path}/train.pkl', 'statistics')):
        if dest == 'statistics':
            invoke('calculate_metrics.py', 'ref', f'--data={digits}/train.zip', f'--dest={ref}', f'--own={classifier}',
                   f'--metrics={",".join(names)}')
            assert load_statistics(ref).meta['compared'] == 10000
        out = invoke(*call, f'--ref={ref}', f'--heldout={digits}/heldout.zip', f'--dest={tmp_path}/{dest}.json')
    one, other = (results(tmp_path / f'{name}.json')['results'] for name in ('images', 'statistics'))
    assert one == pytest.approx(other) and {*names} < one.keys()
    assert one['authpct_pixels'] < 70 and one['ct_pixels'] < -2 and one['fld_gap_pixels'] < -10   # copies are seen
    assert all(f'{name}_se' in one for name in names) and '(95%' in out
    assert one['fd_pixels_inf'] < one['fd_pixels'] and 1 < one['vendi_pixels'] < 150


def test_copies_need_all_training_images_and_others(digits, tmp_path):
    invoke('calculate_metrics.py', 'ref', f'--data={digits}/train.zip', f'--dest={tmp_path}/few.pkl', '--features=20',
           '--metrics=authpct_pixels')
    call = ('calculate_metrics.py', 'calc', f'--images={digits}/gen.zip')
    assert '20 of 150 images' in fails(*call, f'--ref={tmp_path}/few.pkl', '--metrics=authpct_pixels')
    assert '--heldout: needs images' in fails(*call, f'--ref={digits}/train.zip', '--metrics=ct_pixels')
    assert '--heldout' in fails(*call, f'--ref={digits}/train.zip', '--metrics=fd_pixels', f'--heldout={digits}/heldout.zip')
    assert '--own: needs the file' in fails(*call, f'--ref={digits}/train.zip', '--metrics=kid_own')
    assert 'Vendi' not in invoke(*call, '--metrics=vendi_pixels')


def test_two_results_are_compared(digits, tmp_path):
    for name in ('gen', 'train'):
        invoke('calculate_metrics.py', 'calc', f'--images={digits}/{name}.zip', f'--ref={digits}/heldout.zip',
               '--metrics=fd_pixels,kid_pixels,recall_pixels', f'--dest={tmp_path}/{name}.json')
    out = invoke('calculate_metrics.py', 'compare', f'{tmp_path}/gen.json', f'{tmp_path}/train.json', f'--dest={tmp_path}/c.json')
    rows = results(tmp_path / 'c.json')['differences']
    one, other = (results(tmp_path / f'{name}.json')['results'] for name in ('gen', 'train'))
    assert rows['fd_pixels']['difference'] == pytest.approx(other['fd_pixels'] - one['fd_pixels'])
    assert rows['fd_pixels']['difference_se'] == pytest.approx(math.hypot(one['fd_pixels_se'], other['fd_pixels_se']))
    assert 'by more than chance' in out and not rows['kid_pixels']['paired']
    assert abs(one['kid_pixels']) < 1 and other['kid_pixels'] < 1            # of values 0..1
    (tmp_path / 'x.json').write_text('{}')
    assert 'holds no results' in fails('calculate_metrics.py', 'compare', f'{tmp_path}/x.json', f'{tmp_path}/gen.json')
    assert script_module('calculate_metrics.py').main.commands['compare'].help
