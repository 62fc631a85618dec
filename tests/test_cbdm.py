"""Class-balancing diffusion: the objective and the sampler against the golden numbers, and its augmentation."""

import functools
import math
import re

import golden_cases
import numpy as np
import pytest
import torch

from dnnlib import UserError
from long_tail.weakened import WeakenedLabels
from torch_utils.random import BlockRandomGenerator, GlobalRandom, StackedRandomGenerator
from training.diffusion.augment_ada import ADAAugment, warp
from training.diffusion.gaussian import GaussianDiffusion
from training.diffusion.losses import CBDMLoss
from training.diffusion.samplers import Guided, sample, without_labels
from training.networks import build_network

# --- Objective --------------------------------------------------------------------------------------------------------


class _Toy(torch.nn.Module):
    """eps(x, t, y) = tanh(x) (0.5 + E[y] per channel) + b t / T; the last row of E is used when there is no label."""

    def __init__(self, embedding, b, diffusion):
        super().__init__()
        self.E, self.b = torch.nn.Parameter(embedding), torch.nn.Parameter(torch.tensor(b))
        self.diffusion, self.calls = diffusion, []

    def forward(self, x, step=None, class_labels=None, augm=None):
        if class_labels is None:
            class_labels = x.new_zeros([len(x), len(self.E) - 1])
        absent = 1 - class_labels.sum(1, keepdim=True)
        self.calls.append((class_labels.argmax(1).tolist() if absent.sum() == 0 else None, augm))
        e = (torch.cat([class_labels, absent], 1) @ self.E)[:, :, None, None]
        return x.tanh() * (0.5 + e) + self.b * step.reshape(-1, 1, 1, 1) / self.diffusion.num_steps


def _diffusion(case, steps, variance='fixed_large'):
    arguments = case.json['arguments']
    return GaussianDiffusion('linear_float32', steps, variance=variance,
                             beta_range=[arguments['beta_1'], arguments['beta_T']])


def _toy(case, diffusion):
    """The network that the case describes; a case that refers to another one has its b."""
    text = case.json['inputs']['network']
    words = [text, *(other.json['inputs']['network'] for other in golden_cases.cases('math', 'cbdm_trainer*'))]
    b = next(golden_cases.number_in(text, r'\bb=') for text in words if re.search(r'\bb=', text))
    return _Toy(torch.from_numpy(golden_cases.array_in(text)), b, diffusion)


def _one_hot(net, classes):
    return torch.nn.functional.one_hot(classes, len(net.E) - 1).float()


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'cbdm_trainer*', lambda c: c.json['variants']),
                         ids=golden_cases.ids)
def test_objective(case, name):
    variant, arguments = case.json['variants'][name], case.json['arguments']
    classes = arguments['num_class']
    diffusion = _diffusion(case, arguments['T'])
    objective = CBDMLoss(
        diffusion, classes, cb=variant['cb'], cfg=variant['cfg'], tau=variant['tau'],
        class_counts=None if variant['finetune'] else case.arrays['class_counts'])
    p = None if variant['finetune'] else objective.probabilities
    objective.other_labels = lambda n, random: torch.from_numpy(np.random.choice(classes, n, p=p))
    net = _toy(case, diffusion)
    batch = {'images': case.tensor('x0'), 'labels': _one_hot(net, case.tensor('y0')),
             'random': GlobalRandom()}

    torch.manual_seed(variant['seed'])
    np.random.seed(variant['seed'])
    values = objective.elementwise(net, batch)
    assert [call for call, _ in net.calls] == variant['model_calls']
    reg = values['reg'] + values['com'] if 'reg' in values else torch.zeros(1)
    values |= {'loss_ddpm': values['ddpm'], 'loss_reg': reg, 'y_bal': values.get('other')}
    total = values['ddpm'].mean() + reg.mean()
    for loss, suffix in ((total, ''), (values.get('reg'), '_reg'), (values.get('com'), '_com')):
        if loss is not None:
            values['grad_emb' + suffix], values['grad_b'] = torch.autograd.grad(
                loss.mean(), [net.E, net.b], retain_graph=True)
        if suffix == '':
            grad_b = values['grad_b']
    values['grad_b'] = grad_b
    for key, ref in case.arrays.items():
        if key.startswith(name + '.'):
            value = values[key.removeprefix(name + '.')].detach()
            np.testing.assert_allclose(value, ref, rtol=1e-4, atol=1e-7, err_msg=key)
    for key, value in (('loss_ddpm_mean', values['ddpm'].mean()), ('loss_reg_mean', reg.mean()), ('total', total)):
        np.testing.assert_allclose(value.item(), variant[key], rtol=1e-4)

    torch.manual_seed(variant['seed'])
    np.random.seed(variant['seed'])
    loss, terms = objective(net, batch)                                 # the same, as the training loop sees it
    np.testing.assert_allclose(loss.mean().item(), variant['total'], rtol=1e-4)
    assert set(terms) == {'loss', 'ddpm', 'sigma'} | ({'reg', 'com'} if variant['cb'] else set())


def test_other_labels_follow_the_target_distribution():
    counts = [70, 20, 9, 1]
    objective = CBDMLoss(GaussianDiffusion(), 4, cb=True, class_counts=counts)
    torch.manual_seed(0)
    drawn = np.bincount(objective.other_labels(20000, GlobalRandom()), minlength=4) / 20000
    np.testing.assert_allclose(drawn, np.array(counts) / 100, atol=0.01)
    uniform = CBDMLoss(GaussianDiffusion(), 4, cb=True)
    drawn = np.bincount(uniform.other_labels(20000, GlobalRandom()), minlength=4) / 20000
    np.testing.assert_allclose(drawn, 0.25, atol=0.01)


def test_a_class_without_images_is_refused():
    with pytest.raises(UserError, match='each of the 3 classes'):
        CBDMLoss(GaussianDiffusion(), 3, cb=True, class_counts=[5, 0, 2])


def test_the_step_does_not_depend_on_how_it_is_split():
    """Labels are dropped for a whole step, and every number drawn belongs to its image."""
    diffusion = GaussianDiffusion('linear_float32', 1000, variance='fixed_large')
    objective = CBDMLoss(diffusion, 10, cb=True, cfg=True, batch_size=8, seed=3)
    net = _Toy(0.3 * torch.randn([11, 3], generator=torch.Generator().manual_seed(0)), 0.25, diffusion)
    images = torch.randn([8, 3, 4, 4])
    labels = torch.eye(10)[:8]

    def losses(step, parts):
        out = []
        for first, count in parts:
            start = 8 * step + first
            batch = {'images': images[first:first + count], 'labels': labels[first:first + count], 'start': start,
                     'random': BlockRandomGenerator('cpu', 1, start, count)}
            out.append(objective(net, batch)[0])
        return torch.cat(out)

    dropped = 0
    for step in range(40):
        whole, split = losses(step, [(0, 8)]), losses(step, [(0, 3), (3, 5)])
        torch.testing.assert_close(whole, split)
        dropped += objective._labels_dropped({'start': 8 * step})
    assert 1 <= dropped <= 10


# --- Sampler ----------------------------------------------------------------------------------------------------------

_TABLES = {'betas': 'betas', 'alphas_bar': 'alphas_cumprod', 'posterior_var': 'posterior_variance',
           'posterior_log_var_clipped': 'posterior_log_variance_clipped',
           'posterior_mean_coef1': 'posterior_mean_coef1',
           'posterior_mean_coef2': 'posterior_mean_coef2', 'log_var': 'log_variance'}


def _sampler_value(case, key):
    """'T50.fixedlarge.omega1.5.cfg.mean', 'T50.betas', 'T50.fixedsmall.loop.uncond.x', ..."""
    steps, _, what = key.partition('.')
    variance, _, rest = what.partition('.')
    variance = {'fixedlarge': 'fixed_large', 'fixedsmall': 'fixed_small'}.get(variance)
    diffusion = _diffusion(case, int(steps.removeprefix('T')), variance or 'fixed_large')
    what = rest if variance else what
    if what in _TABLES:
        return getattr(diffusion, _TABLES[what])
    if what.startswith('sqrt_recip'):
        return np.sqrt(1 / diffusion.alphas_cumprod - (what == 'sqrt_recipm1_alphas_bar'))
    net, x = _toy(case, diffusion), case.tensor('xt')
    if what.startswith('loop'):
        return _loop(case, net, x, *what.split('.')[1:])
    t = case.tensor(f'{steps}.t')
    if what == 'log_var_at_t':
        return diffusion.prediction(x, x, t).log_variance.flatten()
    omega, method = re.fullmatch(r'omega(.*)\.(\w+)\.mean', what).groups()
    labels = _one_hot(net, case.tensor('y'))
    labelled = functools.partial(net, augm=torch.zeros([len(x), 9]))
    guided = Guided(labelled, labels, without_labels(net), 1 + float(omega) if method == 'cfg' else 1)
    with torch.no_grad():
        mean = diffusion.prediction(guided.output(x, t, 1), x, t).mean
    calls = [['none' if y is None else 'labels', 'no augm' if augm is None else f'augm {list(augm.shape)}']
             for y, augm in net.calls]
    assert calls == case.json['calls'][f'omega{omega}.{method}']['model_calls']
    return mean


def _sample(net, noise, labels, method, omega, random, ddim_steps=None):
    """The study's samples: `method` cond uses the labels, uncond ignores them, cfg moves away from these by omega."""
    guidance = {'cfg': 1 + omega, 'cond': 1, 'uncond': 0}[method]
    return sample(net, noise, labels, name='ddim' if ddim_steps else 'ddpm', num_steps=ddim_steps, clip=False,
                  guide=without_labels(net), guidance=guidance, random=random)


def _loop_omega(case):
    """Guidance of the loops: what their words say, else the first omega of the steps that is not 0."""
    stated = re.search(r'omega\s*=?\s*([\d.]+)', case.json['inputs']['loop'])
    omegas = (float(key.removeprefix('omega').rpartition('.')[0]) for key in case.json['calls'])
    return float(stated[1]) if stated else next(omega for omega in omegas if omega > 0)


def _loop(case, net, x, method, what):
    torch.manual_seed(*golden_cases.seeds_in(case.json['inputs']['loop']))
    y = torch.randint(0, len(net.E) - 1, [len(x)]) if method != 'uncond' else None
    if what == 'y':
        return y
    labels = None if y is None else _one_hot(net, y)
    with torch.no_grad():
        return _sample(net, x, labels, method, _loop_omega(case), GlobalRandom()).clamp(-1, 1)


@pytest.mark.parametrize('case, key', golden_cases.variants(
    'math', 'cbdm_sampler*', lambda c: [key for key in c.arrays if '.' in key and not key.endswith('.t')]),
    ids=golden_cases.ids)
def test_sampler(case, key):
    value, ref = _sampler_value(case, key), case.arrays[key]
    tolerance = dict(rtol=1e-8) if ref.dtype == np.float64 else dict(rtol=1e-4, atol=1e-6)
    if '.loop.' in key:
        tolerance = dict(atol=1e-3, rtol=0)
    np.testing.assert_allclose(value, ref, **tolerance)


def _unet(**settings):
    network = dict(class_name='DDPMUNet', T=1000, ch=32, ch_mult=[1, 2], attn=[1], num_res_blocks=1, dropout=0.1,
                   cond=True, augm=True, num_class=4, img_resolution=8) | settings
    torch.manual_seed(0)
    net = build_network('DiscreteDenoiser', network=network,
                        diffusion=dict(schedule='linear_float32', steps=1000, variance='fixed_large'))
    for parameter in net.parameters():
        if parameter.ndim == 4 and parameter.std() < 1e-4:
            torch.nn.init.normal_(parameter, std=0.05)                  # the layers that start near zero
    return net


@pytest.mark.parametrize('ddim_steps', [None, 5])
def test_samples_of_the_unet_depend_on_their_seed_and_guidance_on_the_labels(ddim_steps):
    net = _unet().eval()
    if ddim_steps is None:
        net.diffusion = net.diffusion.respaced(8)
    labels = torch.eye(4)[[0, 1, 2]]

    @torch.no_grad()
    def samples(rows, method, omega=0.0):
        random = StackedRandomGenerator('cpu', rows)
        noise = random.randn([len(rows), 3, 8, 8])
        return _sample(net, noise, labels[rows], method, omega, random, ddim_steps)

    whole = samples([0, 1, 2], 'cfg', 1.5)
    torch.testing.assert_close(torch.cat([samples([i], 'cfg', 1.5) for i in range(3)]), whole, atol=5e-3, rtol=5e-3)
    assert torch.equal(samples([0, 1], 'cfg'), samples([0, 1], 'cond'))
    x, t = torch.randn([3, 3, 8, 8]), torch.tensor([0, 300, 900])
    with torch.no_grad():
        cond, uncond, cfg = (Guided(net, labels, without_labels(net), guidance).output(x, t, 1)
                             for guidance in (1, 0, 2.5))
    assert (cond - uncond).abs().max() > 1e-2
    torch.testing.assert_close(cfg, cond + 1.5 * (cond - uncond))


def test_weak_labels_are_those_of_the_formula():
    """Guided by omega, the network is one guided with (1 + omega) / (1 + 5/4 tau t/T) - 1; with tau = 0 it is itself."""
    net = _unet(augm=False).eval()
    x, t, labels = torch.randn([3, 3, 8, 8]), torch.tensor([0, 300, 900]), torch.eye(4)[[0, 1, 2]]
    with torch.no_grad():
        cond, uncond = net(x, step=t, class_labels=labels), net(x, step=t)
        weak = WeakenedLabels(net, 2.0)
        for guidance in (1, 2.5):
            guided = Guided(weak, labels, without_labels(net), guidance).output(x, t, 1)
            share = guidance / (1 + 5 / 4 * 2.0 * t / 1000).reshape(-1, 1, 1, 1)
            torch.testing.assert_close(guided, uncond + share * (cond - uncond))
        torch.testing.assert_close(WeakenedLabels(net, 0.0)(x, step=t, class_labels=labels), cond)
        assert torch.equal(weak(x, step=t), uncond)


def test_training_the_unet_reaches_every_weight():
    """Also when the labels of a step are dropped: data-parallel training waits for every gradient."""
    net = _unet().train()
    for label_drop in (0.0, 1.0):
        objective = CBDMLoss(net.diffusion, 4, cb=True, cfg=True, label_drop=label_drop,
                                            augment=ADAAugment(), class_counts=[4, 3, 2, 1])
        batch = {'images': torch.rand([4, 3, 8, 8]) * 2 - 1, 'labels': torch.eye(4), 'random': GlobalRandom()}
        loss, terms = objective(net, batch)
        assert loss.shape == (4,) and (terms['reg'].sum() > 0) == (label_drop == 0)
        net.zero_grad()
        loss.mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# --- Augmentation -----------------------------------------------------------------------------------------------------


def _draw_one(augment) -> torch.Tensor:
    """Parameters [8] of one image by scalar draws from torch's global generator, in the reference's order."""
    def gate():
        return (torch.rand([]) < augment.p).float()

    def angle():
        return 2 * math.pi * torch.rand([]) - math.pi

    a = [torch.randint(2, []).float(), gate() * torch.randint(2, []), gate() * torch.randn([]), gate() * angle()]
    g = gate()
    a += [g * angle(), g * torch.randn([])]
    g = gate()
    a += [g * torch.randn([]), g * torch.randn([])]
    return torch.stack(a)


def _golden_augmentations(case):
    """(augmentation, parameters [S,8], reference row) for each probability; parameters drawn one image at a time."""
    arguments = case.json['arguments']
    for row, p in enumerate(arguments['a_prob']):
        augment = ADAAugment(p, arguments['a_scale'], arguments['a_aniso'], arguments['a_trans'])
        drawn = []
        for seed in arguments['seeds']:
            torch.manual_seed(seed)
            drawn.append(_draw_one(augment))
        yield augment, torch.stack(drawn), {name: case.tensor(name)[row] for name in ('cond', 'matrix', 'out')}


@pytest.mark.parametrize('case', golden_cases.cases('math', 'ada_kdiffusion*'), ids=str)
def test_augmentation_of_the_reference(case):
    image = case.tensor('image').permute(2, 0, 1).float() / 127.5 - 1
    for augment, a, ref in _golden_augmentations(case):
        matrices = augment.matrices(a, *image.shape[1:])
        np.testing.assert_allclose(augment.conditions(a), ref['cond'], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(matrices, ref['matrix'], rtol=1e-5, atol=1e-5)
        images = image.expand(len(a), -1, -1, -1)
        np.testing.assert_allclose(augment.transform(images, a), ref['out'], atol=1e-3)
        np.testing.assert_allclose(warp(images, matrices), ref['out'], atol=1e-3)
        for i in range(0, len(a), 5):                                   # one at a time is the same as the batch
            torch.testing.assert_close(augment.transform(image[None], a[i:i + 1])[0], augment.transform(images, a)[i])


def _sixteen_taps(image, matrix):
    """Catmull-Rom interpolation written out, [C,H,W] float64."""
    C, H, W = image.shape
    y, x = np.mgrid[:H, :W]
    source = np.linalg.inv(matrix)[:2] @ np.stack([x.ravel(), y.ravel(), np.ones(H * W)])
    cell = np.floor(source).astype(int)

    def weights(u):
        return [-0.5 * u + u**2 - 0.5 * u**3, 1 - 2.5 * u**2 + 1.5 * u**3, 0.5 * u + 2 * u**2 - 1.5 * u**3,
                0.5 * (u**3 - u**2)]

    def mirrored(i, size):
        i = np.abs(i) % (2 * size - 2)
        return np.where(i < size, i, 2 * size - 2 - i)

    (wx, wy), out = (weights(u) for u in source - cell), 0
    for j in range(4):
        for i in range(4):
            out = out + wy[j] * wx[i] * image[:, mirrored(cell[1] + j - 1, H), mirrored(cell[0] + i - 1, W)]
    return out.reshape(C, H, W)


@pytest.mark.parametrize('shape', [(3, 16, 16), (1, 7, 12), (4, 9, 2)])
def test_warp_is_cubic_interpolation_with_mirrors(shape):
    rng = np.random.RandomState(0)
    images = rng.randn(6, *shape)
    matrices = np.tile(np.eye(3), [6, 1, 1])
    matrices[:, :2, :2] += 0.5 * rng.randn(6, 2, 2)
    matrices[:, :2, 2] = 15 * rng.randn(6, 2)                           # far over the border, many times
    out = warp(torch.from_numpy(images), torch.from_numpy(matrices))
    for image, matrix, value in zip(images, matrices, out.numpy(), strict=True):
        np.testing.assert_allclose(value, _sixteen_taps(image, matrix), atol=1e-9)


def test_known_transforms():
    augment = ADAAugment()
    image = torch.rand([1, 3, 8, 8])

    def transformed(**values):
        names = ['flip_x', 'flip_y', 'scale', 'angle', 'direction', 'stretch', 'move_x', 'move_y']
        a = torch.tensor([[float(values.get(name, 0)) for name in names]])
        out = augment.transform(image, a)
        torch.testing.assert_close(out, warp(image, augment.matrices(a, 8, 8)), atol=1e-5, rtol=0)
        return out

    def check(out, expected):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)

    check(transformed(), image)
    check(transformed(flip_x=1), image.flip(3))
    check(transformed(flip_y=1), image.flip(2))
    check(transformed(angle=np.pi / 2), torch.rot90(image, 1, [2, 3]))
    check(transformed(move_x=1)[..., 1:], image[..., :-1])              # by an eighth of the width: one pixel
    check(transformed(move_y=2)[..., 2:, :], image[..., :-2, :])
    check(augment.conditions(torch.zeros([2, 8])), torch.zeros([2, 9]))


def test_scaling_stretches_a_ramp_about_the_middle():
    """The spline reproduces straight lines: twice as large, a ramp rises half as fast."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    a = torch.tensor([[0, 0, 5.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 5.0, 0, 0]])
    doubled, stretched = ADAAugment().transform(ramp.expand(2, -1, -1, -1), a)
    expected = 3.5 + (torch.arange(8.0) - 3.5) / 2
    torch.testing.assert_close(doubled, expected.expand(1, 8, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(stretched, expected.expand(1, 8, 8), atol=1e-5, rtol=0)


def test_batched_draws_have_the_distribution_of_single_ones():
    torch.manual_seed(0)
    augment = ADAAugment(0.3)
    single = torch.stack([_draw_one(augment) for _ in range(3000)])
    batch = augment.draw(30000, GlobalRandom())
    torch.testing.assert_close(batch.mean(0), single.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(batch.std(0), single.std(0), atol=0.08, rtol=0)
    torch.testing.assert_close((batch != 0).float().mean(0), (single != 0).float().mean(0), atol=0.03, rtol=0)
    assert torch.equal(batch[:, 4] != 0, batch[:, 5] != 0) and torch.equal(batch[:, 6] != 0, batch[:, 7] != 0)


def test_augmentation_belongs_to_the_image():
    images = torch.rand([6, 3, 8, 8])
    augment = ADAAugment(0.5)
    whole, conditions = augment(images, StackedRandomGenerator('cpu', range(6)))
    part, part_conditions = augment(images[2:4], StackedRandomGenerator('cpu', [2, 3]))
    torch.testing.assert_close(part, whole[2:4])
    assert torch.equal(part_conditions, conditions[2:4])
