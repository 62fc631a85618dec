"""The EDM room: losses, samplers and augmentation against the golden numbers, and what they promise beyond."""

import math
import re

import golden_cases
import numpy as np
import pytest
import torch

from dnnlib import UserError
from torch_utils.random import (
    BlockRandomGenerator,
    GlobalRandom,
    StackedRandomGenerator,
    drawing_from,
)
from training.diffusion.augment import (
    EDM_MULTIPLIERS,
    AugmentPipe,
    reach,
    resample,
    scaling,
    translation,
)
from training.diffusion.losses import LOSSES, EDMLoss, VELoss, VPLoss
from training.diffusion.samplers import SAMPLERS, sample
from training.networks import build_network
from training.networks.layers import drop_labels, dropout

# --- Losses -----------------------------------------------------------------------------------------------------------

GOLDEN_LOSSES = {cls.__name__: cls for cls in LOSSES.values()}


def _analytic_network(words, seen):
    """D(x; sigma) = (v x + sigma^2 mu) / (v + sigma^2), mu_c = m (c + 1) (1 + class), log-variance a ln(sigma) + b, with
    the numbers of `words`; notes what it is given."""
    variance, mean = golden_cases.number_in(words, r'=\(', ' x'), golden_cases.number_in(words, r'mu_c = ')
    a, b = golden_cases.number_in(words, '= ', r'\*ln'), golden_cases.number_in(words, r'ln\(sigma\)\+')

    def net(x, sigma, labels, return_logvar=False, augment_labels=None):
        seen.update(noisy=x, sigma=sigma, augment_labels=augment_labels)
        mu = mean * (torch.arange(x.shape[1]) + 1)[:, None, None] * (1 + labels.argmax(dim=1))[:, None, None, None]
        denoised = (variance * x + sigma**2 * mu) / (variance + sigma**2)
        return (denoised, a * sigma.log() + b) if return_logvar else denoised
    return net


def _loss(case, name, **options):
    """(unreduced loss, what the network saw) of a variant such as 'EDMLoss.0.seed3'."""
    name, _, seed = name.replace('.augmented', '').split('.')
    seen = {}
    torch.manual_seed(int(seed.removeprefix('seed')))
    net = _analytic_network(case.json['inputs']['network'], seen)
    loss = GOLDEN_LOSSES[name](**options).elementwise(
        net, case.tensor('images'), case.tensor('labels_onehot'), GlobalRandom())
    return loss, seen


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'losses*', lambda c: c.json['variants']),
                         ids=golden_cases.ids)
def test_loss(case, name):
    loss, seen = _loss(case, name, **case.json['variants'][name]['params'])
    np.testing.assert_allclose(seen['sigma'].flatten(), case.arrays[f'{name}.sigma'], rtol=1e-5)
    np.testing.assert_allclose(seen['noisy'], case.arrays[f'{name}.noisy'], rtol=1e-5, atol=1e-5)
    assert golden_cases.relative_error(loss, case.arrays[f'{name}.loss']) <= 1e-5
    np.testing.assert_allclose(loss.mean(), case.json['variants'][name]['mean'], rtol=1e-5)


def _augmented(case):
    return [key.removesuffix('.loss') for key in case.arrays if '.augmented.' in key and key.endswith('.loss')]


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'losses*', _augmented), ids=golden_cases.ids)
def test_loss_with_augmentation(case, name):
    prefix = '.'.join(name.split('.')[:2]) + '.'
    params = next(v['params'] for key, v in case.json['variants'].items() if key.startswith(prefix))
    expected = case.arrays[f'{name}.augment_labels']
    for p in np.arange(1, 101) / 100:  # the case does not say which; its labels do
        loss, seen = _loss(case, name, augment=AugmentPipe(p, **EDM_MULTIPLIERS), **params)
        if np.allclose(seen['augment_labels'], expected, rtol=1e-5, atol=1e-6):
            break
    np.testing.assert_allclose(seen['augment_labels'], expected, rtol=1e-5, atol=1e-6)
    assert golden_cases.relative_error(loss, case.arrays[f'{name}.loss']) <= 1e-4


TINY = dict(img_resolution=8, img_channels=3, label_dim=4, augment_dim=9, model_channels=16, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[4], dropout=0.3)


def _filled(**kwargs):
    """A tiny network with random weights everywhere: the initial ones give an output that hardly depends on them."""
    torch.manual_seed(0)
    net = build_network('EDMPrecond', **(TINY | kwargs))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    return net


@pytest.mark.parametrize('model', [dict(model_type='SongUNet', label_dropout=0.3), dict(model_type='DhariwalUNet')])
@pytest.mark.parametrize('parts', [[(0, 24)], [(0, 12), (12, 12)], [(0, 5), (5, 19)]])
def test_training_does_not_depend_on_how_the_batch_is_split(model, parts):
    """Noise levels, augmentation, noise, dropout and dropped labels of an image follow its position in the stream."""
    net = _filled(**model).train()
    objective = EDMLoss(augment=AugmentPipe(0.5, **EDM_MULTIPLIERS))
    images = torch.rand([24, 3, 8, 8], generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.eye(4)[torch.arange(24) % 4]

    def losses(start, count):
        random = BlockRandomGenerator('cpu', seed=3, start=100 + start, count=count)
        batch = dict(images=images[start:start + count], labels=labels[start:start + count], random=random)
        return objective(net, batch)[0]

    whole = losses(0, 24)
    torch.manual_seed(parts[-1][0])  # torch's own stream must not matter
    pieces = torch.cat([losses(*part) for part in parts])
    torch.testing.assert_close(pieces, whole, rtol=2e-5, atol=1e-5)


def test_dropout_keeps_the_mean_and_acts_in_training_only():
    x = torch.ones([64, 1000])
    with drawing_from(BlockRandomGenerator('cpu', 0, 0, 64)):
        dropped = dropout(x, 0.25, training=True)
        assert dropout(x, 0.25, training=False) is x
    assert set(dropped.unique().tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1) < 0.02
    labels = drop_labels(torch.eye(8).repeat(500, 1), 0.25, training=True)
    assert set(labels.sum(dim=1).tolist()) == {0.0, 1.0}
    assert abs(float(labels.sum(dim=1).mean()) - 0.75) < 0.03


# --- Samplers ---------------------------------------------------------------------------------------------------------


class _GaussianNet:
    """The exact denoiser of N(mu, s^2 I), with a range and a grid of noise levels like a network's."""

    def __init__(self, mu, s, sigma_min=0.0, sigma_max=math.inf, levels=None):
        self.mu, self.s, self.sigma_min, self.sigma_max, self.calls = mu, s, sigma_min, sigma_max, 0
        self.levels = levels

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        return sigma if self.levels is None else self.levels[(sigma - self.levels).abs().argmin()]

    def __call__(self, x, sigma, labels=None):
        self.calls += 1
        return (self.s**2 * x + sigma**2 * self.mu) / (self.s**2 + sigma**2)


# What the names of variants say that the JSON's options do not: 'ablation.alpha_two_thirds_vp', 'ablation.rho3', ...
VP = dict(discretization='vp', schedule='vp', scaling='vp')
NAMED = [
    (r'alpha([\d.]+)', lambda value: dict(alpha=float(value))), (r'rho([\d.]+)', lambda value: dict(rho=float(value))),
    (r'alpha_two_thirds', lambda: dict(alpha=2 / 3)), (r'iddpm_', lambda: dict(discretization='iddpm')),
    (r'explicit_range', lambda: dict(sigma_min=0.01, sigma_max=50)), (r'_vp$', lambda: VP),
]


def _stated_options(words):
    """Options and the network's range and rounding of 'net.sigma_min=0.01, S_churn=30 schedule=ve', 'with rounding', ..."""
    options = {}
    for key, value in re.findall(r'([\w.]+)=([\w.+-]+)', words):
        options[key] = value if key in ('solver', *VP) else float(value)
    steps = re.search(r'(\d+) steps', words)
    return options | ({'num_steps': int(steps[1])} if steps else {}) | ({'rounded': True} if 'round' in words else {})


def _sampler_options(case, name):
    """Sampler's name and options of a variant, from its name and what the case's JSON says of it."""
    sampler, _, variant = name.partition('.')
    if sampler in ('euler', 'heun'):
        grid, _, beta_d = name.partition('.beta_d_')
        options = dict(zip(['solver', *VP], grid.split('.'), strict=True))
        return dict(name='ablation') | options | (dict(beta_d=float(beta_d)) if beta_d else {})
    options = dict(name=sampler)
    for pattern, of_match in NAMED:
        if match := re.search(pattern, variant):
            options |= of_match(*match.groups())
    for names, words in case.json['options'].items():
        if {variant, name} & set(names.split(' / ')):
            options |= _stated_options(words)
    return options


@pytest.mark.parametrize(
    'case, name',
    golden_cases.variants('math', 'edm_samplers*', lambda c: [k for k in c.arrays if k not in ('mu', 'latents')]),
    ids=golden_cases.ids)
def test_sampler(case, name):
    options = dict(num_steps=case.json['num_steps']) | _sampler_options(case, name)
    of_net = {key: options.pop(f'net.{key}') for key in ('sigma_min', 'sigma_max') if f'net.{key}' in options}
    if options.pop('rounded', False):
        first, last, count = re.search(r'linspace\(([\d.]+),([\d.]+),(\d+)\)', case.json['options']['rounded']).groups()
        of_net['levels'] = torch.linspace(float(first), float(last), int(count), dtype=torch.float64) ** 2
    net = _GaussianNet(case.tensor('mu').double(), case.json['inputs']['s'], **of_net)
    random = StackedRandomGenerator('cpu', golden_cases.seeds_in(case.json['inputs']['latents']))
    noise = random.randn(case.arrays['latents'].shape)
    np.testing.assert_allclose(noise, case.arrays['latents'], rtol=1e-6)
    out = sample(net, noise, random=random, **options)
    np.testing.assert_allclose(out, case.arrays[name], rtol=1e-6)
    assert net.calls == case.json['net_calls'].get(name, net.calls)


def test_ablation_with_edm_choices_is_the_edm_sampler():
    net, noise = _GaussianNet(torch.full([1, 1, 4, 4], 0.3), 0.5), torch.randn([2, 1, 4, 4])
    a, b = (sample(net, noise, name=name, random=StackedRandomGenerator('cpu', [3, 4]), S_churn=40)
            for name in ('edm', 'ablation'))
    assert torch.equal(a, b)


def test_guidance_and_labels_reach_every_sampler():
    def net(x, sigma, labels=None):
        return torch.zeros_like(x) + labels.sum()

    def guide(x, sigma, labels=None):
        return torch.zeros_like(x) + 1

    for name in SAMPLERS:
        out = sample(net, torch.randn([2, 1, 2, 2]), torch.full([1], 3.0), name=name, guide=guide, guidance=2, num_steps=8)
        torch.testing.assert_close(out, torch.full_like(out, 5.0), rtol=1e-4, atol=1e-4)  # 1 + 2 (3 - 1)


@pytest.mark.parametrize('option', ['solver', 'discretization', 'schedule', 'scaling'])
def test_unknown_ablation_is_refused(option):
    with pytest.raises(UserError, match=f"{option}: 'xyz'"):
        sample(None, torch.randn([1, 1, 2, 2]), name='ablation', **{option: 'xyz'})


@pytest.mark.parametrize('precond', ['VPPrecond', 'VEPrecond', 'iDDPMPrecond', 'EDMPrecond'])
def test_every_sampler_takes_every_preconditioning(precond):
    net = build_network(precond, **(TINY | dict(augment_dim=0))).eval()
    noise = torch.randn([2, 3, 8, 8])
    ablation = dict(name='ablation', solver='euler', discretization='vp', schedule='vp', scaling='vp')
    for options in [ablation, *({'name': name} for name in SAMPLERS)]:
        with torch.no_grad():
            out = sample(net, noise, torch.eye(4)[:2], num_steps=4, **options)
        assert out.shape == noise.shape and out.isfinite().all()


# --- Augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shared_padding', [True, False])
@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'edm_augment*', lambda c: c.json['variants']),
                         ids=golden_cases.ids)
def test_augmentation(case, name, shared_padding):
    if not shared_padding and case.path.parent != golden_cases.FOLDER / 'math':
        pytest.skip('only the reference padding has reference numbers')
    pipe = AugmentPipe(shared_padding=shared_padding, **case.json['variants'][name])
    torch.manual_seed(int(name.rpartition('seed')[2]))
    images, labels = pipe(case.tensor('images'), GlobalRandom())
    assert labels.shape[1] == pipe.label_dim
    np.testing.assert_allclose(images, case.arrays[f'{name}.images'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(labels, case.arrays[f'{name}.labels'], rtol=1e-5, atol=1e-7)


ALL = dict.fromkeys(AugmentPipe.OPERATIONS, 1.0)


@pytest.mark.parametrize('parts', [[(0, 20), (20, 20)], [(0, 3), (3, 30), (33, 7)]])
def test_augmentation_does_not_depend_on_how_the_batch_is_split(parts):
    images = torch.rand([40, 3, 16, 16], generator=torch.Generator().manual_seed(1)) * 2 - 1
    pipe = AugmentPipe(0.7, **ALL)

    def augment(start, count):
        return pipe(images[start:start + count], BlockRandomGenerator('cpu', seed=2, start=start, count=count))

    whole = augment(0, 40)
    for a, b in zip(whole, map(torch.cat, zip(*[augment(*part) for part in parts], strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert (whole[0] - images).abs().amax(dim=(1, 2, 3)).gt(0.1).sum() > 30


def test_reference_padding_makes_images_depend_on_each_other():
    """Why it is not the default: a shrunk image ends where its own padding does, unless another image needs more."""
    image = torch.rand([1, 3, 16, 16], generator=torch.Generator().manual_seed(1)) * 2 - 1
    shrink, shift = scaling(torch.tensor([2.0]), torch.tensor([2.0])), translation(torch.tensor([9.0]), torch.zeros(1))
    batch, G = image.repeat(2, 1, 1, 1), torch.cat([shrink, shift])
    alone = resample(image, shrink, reach(shrink, 16, 16))
    together = resample(batch, G, reach(G, 16, 16))[:1]
    assert (alone - together).abs().max() > 2e-4
    torch.testing.assert_close(resample(image, shrink), resample(batch, G)[:1], rtol=0, atol=1e-6)


def test_untouched_images_come_back():
    images = torch.rand([4, 3, 32, 32])
    out, labels = AugmentPipe(0.0, **ALL)(images, GlobalRandom())
    torch.testing.assert_close(out, images, rtol=0, atol=1e-5)
    assert not labels.any() and labels.shape == (4, sum(AugmentPipe.OPERATIONS.values()))


def test_gray_images_keep_their_gray():
    gray = torch.rand([8, 1, 8, 8])
    multipliers = dict.fromkeys(AugmentPipe.COLOR, 1.0)
    torch.manual_seed(0)
    one = AugmentPipe(1.0, **multipliers)(gray, GlobalRandom())[0]
    torch.manual_seed(0)
    three = AugmentPipe(1.0, **multipliers)(gray.expand(-1, 3, -1, -1), GlobalRandom())[0]
    torch.testing.assert_close(one, three.mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_wrong_use_of_the_augmentation_is_refused():
    with pytest.raises(ValueError, match='wobble'):
        AugmentPipe(0.1, wobble=1)
    with pytest.raises(ValueError, match='square'):
        AugmentPipe(1, rotate_int=1)(torch.zeros([1, 3, 8, 4]), GlobalRandom())
    with pytest.raises(ValueError, match='channels'):
        AugmentPipe(1, hue=1)(torch.zeros([1, 4, 8, 8]), GlobalRandom())


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_all_skip_connections_on_is_the_plain_network():
    plain, pattern = _filled(), _filled(skip_connections=[1, 1, 1, 1])
    x, sigma = torch.randn([2, 3, 8, 8]), torch.tensor([0.1, 3.0])
    with torch.no_grad():
        assert torch.equal(plain.eval()(x, sigma), pattern.eval()(x, sigma))
        assert not torch.equal(plain(x, sigma), _filled(skip_connections=[1, 0, 1, 1]).eval()(x, sigma))


@pytest.mark.parametrize('model_type', ['SongUNet', 'DhariwalUNet'])
@pytest.mark.parametrize('pattern', [[1, 1, 1], [1] * 5, [1, 2, 0, 1]])
def test_wrong_skip_patterns_are_refused_in_one_line(model_type, pattern):
    with pytest.raises(UserError, match='skip_connections.* 4 entries') as error:
        build_network('EDMPrecond', **(TINY | dict(model_type=model_type, skip_connections=pattern)))
    assert '\n' not in str(error.value)


def _std(tensor):
    return float(tensor.detach().float().std(unbiased=False))


def test_initial_weights():
    """xavier_uniform and kaiming_uniform with the gains of the reference, seen in the standard deviations."""
    torch.manual_seed(0)
    kwargs = dict(img_resolution=16, img_channels=3, label_dim=10, augment_dim=9, model_channels=128,
                  channel_mult=[1, 1], num_blocks=1, attn_resolutions=[8])
    song = build_network('VPPrecond', **kwargs).model
    block, fan = song.enc['8x8_block0'], 128 * 9
    xavier = math.sqrt(2 / (fan + fan))
    assert _std(block.conv0.weight) == pytest.approx(xavier, rel=0.01)
    assert _std(block.conv1.weight) == pytest.approx(xavier * 1e-5, rel=0.01)
    assert _std(block.qkv.weight) == pytest.approx(math.sqrt(2 / (128 + 384) * 0.2), rel=0.02)
    assert _std(block.proj.weight) == pytest.approx(math.sqrt(2 / 256) * 1e-5, rel=0.02)
    assert _std(song.map_layer1.weight) == pytest.approx(math.sqrt(2 / 1024), rel=0.01)
    assert all(not p.any() for name, p in song.named_parameters() if name.endswith('bias'))
    assert not any(p.any() for p in [block.norm0.bias]) and (block.norm0.weight == 1).all()

    adm = build_network('EDMPrecond', model_type='DhariwalUNet', **kwargs).model
    block = adm.enc['8x8_block0']
    kaiming = math.sqrt(1 / fan / 3)
    assert _std(block.conv0.weight) == pytest.approx(kaiming, rel=0.01)
    assert _std(block.conv0.bias) == pytest.approx(kaiming, rel=0.15)
    assert _std(adm.map_label.weight) == pytest.approx(1, rel=0.05)
    zero = [block.conv1, block.proj, adm.out_conv, adm.map_augment]
    assert not any(p.any() for layer in zero for p in layer.parameters())


def test_positional_and_fourier_networks_train():
    """One optimizer step of each architecture lowers the loss on its batch."""
    batch = dict(images=torch.rand([8, 3, 8, 8]) * 2 - 1, labels=torch.eye(4)[torch.arange(8) % 4])
    ncsnpp = dict(embedding_type='fourier', encoder_type='residual', resample_filter=[1, 3, 3, 1], channel_mult_noise=2)
    for precond, objective, extra in [('VPPrecond', VPLoss(), {}),
                                      ('VEPrecond', VELoss(), ncsnpp),
                                      ('EDMPrecond', EDMLoss(), dict(model_type='DhariwalUNet'))]:
        torch.manual_seed(0)
        net = build_network(precond, **(TINY | dict(dropout=0.0) | extra)).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        losses = []
        for _ in range(12):
            loss = objective(net, batch | dict(random=BlockRandomGenerator('cpu', 0, 0, 8)))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0], (precond, losses)


@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-5), ('fp16', 1e-5), ('bf16', 0.05)])
def test_precision_on_the_cpu(precision, tolerance):
    """float16 is computed in float32 there; bfloat16 is what it says."""
    exact, x, sigma = _filled().eval(), torch.randn([2, 3, 8, 8]), torch.tensor([0.5, 3.0])
    net = _filled(precision=precision).eval()
    with torch.no_grad():
        reference, out = exact(x, sigma), net(x, sigma)
        assert golden_cases.relative_error(out, reference) <= tolerance
        assert (precision == 'bf16') != torch.equal(out, reference)
        assert torch.equal(net(x, sigma, force_fp32=True), reference)
