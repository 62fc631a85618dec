"""The mathematics of the EDM2 recipe against the golden numbers: random streams, sampler, power-function EMA."""

import math
import re

import golden_cases
import numpy as np
import pytest
import torch

from torch_utils.random import BlockRandomGenerator, StackedRandomGenerator
from training import ema, phema, schedules
from training.diffusion.noise import edm_sigmas
from training.diffusion.samplers import sample

# --- Random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'stacked_random_generator*'), ids=str)
def test_stacked_random_generator(case):
    """Each stream of the case is a list of draws such as 'labels_1000 = randint(1000,[N])'."""
    for stream in case.json['order'].values():
        g = StackedRandomGenerator('cpu', case.json['arguments']['seeds'])
        for draw in stream:
            name, kind, limit, precision = re.fullmatch(
                r'(\w+) = (randn|randint)\((?:(\d+),)?.*\)(?: (float\d+))?', draw).groups()
            ref = case.arrays[name]
            if kind == 'randint':
                np.testing.assert_array_equal(g.randint(int(limit), ref.shape), ref)
            else:
                np.testing.assert_allclose(g.randn(ref.shape, dtype=getattr(torch, precision)), ref, rtol=1e-6)


def test_seeds_are_taken_modulo_2_to_the_32():
    assert torch.equal(StackedRandomGenerator('cpu', [4294967298]).randn([1, 8]),
                       StackedRandomGenerator('cpu', [2]).randn([1, 8]))


@pytest.mark.parametrize('parts', [[(0, 100)], [(0, 50), (50, 50)], [(0, 7), (7, 64), (71, 29)]])
def test_block_random_numbers_do_not_depend_on_the_split(parts):
    def draw(start, count):
        g = BlockRandomGenerator('cpu', seed=5, start=1000 + start, count=count)
        return [g.randn([count, 1, 1, 1]), g.rand([2, count], dim=1).T, g.randint(4, [count]), g.randn([count, 3, 4])]

    whole = draw(0, 100)
    pieces = [torch.cat(p) for p in zip(*[draw(*part) for part in parts], strict=True)]
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)
    assert len(whole[0].unique()) == 100


# --- Sampler ----------------------------------------------------------------------------------------------------------


def _gaussian_denoiser(mu, s, counter):
    def denoise(x, t, labels=None):
        counter.append(1)
        mean = mu.to(x.dtype) if labels is None else mu.to(x.dtype) * labels.to(x.dtype)[:, None, None, None]
        return (s**2 * x + t**2 * mean) / (s**2 + t**2)
    return denoise


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'edm2_sampler*', lambda c: c.json['variants']),
                         ids=golden_cases.ids)
def test_edm2_sampler(case, name):
    variant = case.json['variants'][name]
    args = dict(variant['args'])
    noise, described = case.tensor('noise'), case.json['inputs']
    random = StackedRandomGenerator('cpu', golden_cases.seeds_in(described['noise']))
    np.testing.assert_allclose(random.randn(noise.shape), noise, rtol=1e-6)
    random.randint(int(golden_cases.number_in(described['noise'], r'randint\(')), [len(noise)])
    calls, guide_calls = [], []
    net = _gaussian_denoiser(case.tensor('mu'), golden_cases.number_in(described['net'], r'\bs='), calls)
    guide = _gaussian_denoiser(case.tensor('gmu'), golden_cases.number_in(described['gnet'], r'\bs='), guide_calls)
    labels = case.tensor('label_scale') if name.startswith('labelled') else None
    dtype = getattr(torch, args['dtype'])
    out = sample(net, noise, labels, name='edm2', guide=guide, random=random, **args)
    assert (len(calls), len(guide_calls)) == (variant['net_calls'], variant['gnet_calls'])
    assert out.dtype == dtype
    if dtype == torch.float64:
        np.testing.assert_allclose(out, case.arrays[name], rtol=1e-9, atol=1e-12)
    else:
        np.testing.assert_allclose(out, case.arrays[name], rtol=0, atol=2e-5 * 0.5)


@pytest.mark.parametrize('case', golden_cases.cases('math', 'edm2_sampler*'), ids=str)
def test_time_grid(case):
    """The grid is given by its number of levels, its ends and rho (7 unless the case says otherwise)."""
    *levels, last = case.arrays['t_steps']
    rho = case.json.get('rho', 7)
    grid = edm_sigmas(len(levels), round(levels[-1], 9), round(levels[0], 9), rho, torch.float64)
    np.testing.assert_allclose(grid, levels, rtol=1e-12)
    assert last == 0


# --- Power-function EMA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'phema_functions*'), ids=str)
def test_power_function_formulas(case):
    a = case.arrays
    np.testing.assert_allclose(phema.std_to_exp(a['stds']), a['std_to_exp'], rtol=1e-8)
    np.testing.assert_allclose(phema.exp_to_std(a['exps']), a['exp_to_std'], rtol=1e-8)
    delta = case.json['arguments']['beta_t_delta']
    beta = phema.power_function_beta(a['stds'][:, None], a['beta_t_next'][None, :], delta)
    np.testing.assert_allclose(beta, a['beta'], rtol=1e-8, atol=1e-15)
    corr = phema.power_function_correlation(a['corr_a_ofs'], a['corr_a_std'], a['corr_b_ofs'], a['corr_b_std'])
    np.testing.assert_allclose(corr, a['corr'], rtol=1e-8)
    np.testing.assert_allclose(phema.power_function_response(a['response_ofs'], _response_std(case), len(a['response'])),
                               a['response'], rtol=1e-8)
    index = 1
    while f'coef{index}' in a:
        inputs = [a[f'coef{index}_{key}'] for key in ('in_ofs', 'in_std', 'out_ofs', 'out_std')]
        np.testing.assert_allclose(           # coefficients that are zero come out as rounding errors
            phema.solve_coefficients(*inputs), a[f'coef{index}'], rtol=1e-5, atol=1e-12)
        index += 1
    assert index > 1


def _response_std(case):
    """The widths of the stored profiles are not in the file: recover each exponent from two of its samples."""
    stds = []
    for ofs, r in zip(case.arrays['response_ofs'], case.arrays['response'].T, strict=True):
        last = int(ofs)
        assert r[last // 2] > 0
        stds.append(phema.exp_to_std(math.log(r[last] / r[last // 2]) / math.log(last / (last // 2))))
    return stds


class _Walk(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(w.clone())


@pytest.mark.parametrize('dtype', ['f32', 'f64'])
@pytest.mark.parametrize('case', golden_cases.cases('math', 'phema_reconstruction*'), ids=str)
def test_reconstruction_of_a_random_walk(case, dtype):
    a, torch_dtype = case.arrays, {'f32': torch.float32, 'f64': torch.float64}[dtype]
    tolerance = dict(rtol=1e-6) if dtype == 'f64' else dict(rtol=0, atol=1e-4)
    inputs = case.json['inputs']
    scale, array, batch, every = re.search(
        r'w \+= ([\d.]+)\*(array\(.*?\]\)).*nimg \+= (\d+).*every (\d+) updates', inputs['rule']).groups()
    batch, every = int(batch), int(every)
    steps = torch.from_numpy(np.float32(scale) * golden_cases.array_in(array)).to(torch_dtype)
    net = _Walk(torch.from_numpy(golden_cases.array_in(inputs['w0'])).to(torch_dtype))
    stds = [*inputs['tracked_stds'], *a['out_std']]
    number = len(inputs['tracked_stds'])
    tracked = ema.Averages(net, ema.power(stds))
    old = inputs['traditional_ema']
    # Its half-life grows with the images of the step too.
    beta = schedules.memorization_beta('mode1', old['halflife_Mimg'] * 1e3, rampup_ratio=old['rampup_ratio'])
    traditional = ema.Averages(net, [ema.Average('', lambda nimg, batch: beta(nimg + batch, batch))])
    snapshots = []
    for i, step in enumerate(steps):
        with torch.no_grad():
            net.w += step
        tracked.update(net, i * batch, batch)
        traditional.update(net, i * batch, batch)
        if (i + 1) % every == 0:
            snapshots += [{'w': average.w.clone()} for average in tracked.emas[:number]]
    np.testing.assert_allclose(net.w.detach(), a[f'final_w_{dtype}'], **tolerance)
    np.testing.assert_allclose(torch.stack([s['w'] for s in snapshots]), a[f'snapshots_{dtype}'], **tolerance)
    np.testing.assert_allclose(torch.stack([e.w for e in tracked.emas[number:]]), a[f'directly_tracked_{dtype}'], **tolerance)
    np.testing.assert_allclose(traditional.emas[0].w, a[f'traditional_ema_{dtype}'], **tolerance)

    coefficients = phema.solve_coefficients(a['snapshot_nimg'], a['snapshot_std'], case.json['output_nimg'], a['out_std'])
    np.testing.assert_allclose(coefficients, a['coefficients'], rtol=1e-5, atol=1e-9)
    combined = np.stack([c['w'] for c in phema.combine(snapshots, coefficients, {'w'})])
    np.testing.assert_allclose(combined, a[f'reconstructed_{dtype}'], rtol=0, atol=1e-4 if dtype == 'f32' else 2e-6)
    halves = [{'w': s['w'].half()} for s in snapshots]
    combined = np.stack([c['w'] for c in phema.combine(halves, coefficients, {'w'})])
    np.testing.assert_allclose(combined, a[f'reconstructed_from_fp16_snapshots_{dtype}'], rtol=0, atol=1e-4)
