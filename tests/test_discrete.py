"""Discrete-time diffusion: schedules, respacing, steps and losses against the golden numbers; the adapter."""

import re

import golden_cases
import numpy as np
import pytest
import torch

from dnnlib import UserError
from torch_utils.random import GlobalRandom, StackedRandomGenerator, drawing_from
from training.diffusion.gaussian import GaussianDiffusion
from training.diffusion.losses import DDPMLoss
from training.diffusion.noise import make_betas, spaced_steps
from training.diffusion.samplers import Guided, sample, without_labels
from training.networks import build_network

# --- Tables -----------------------------------------------------------------------------------------------------------

# Names of the golden files for our tables.
TABLES = {'sqrt_recip_alphas_cumprod': lambda d: np.sqrt(1 / d.alphas_cumprod),
          'sqrt_recipm1_alphas_cumprod': lambda d: np.sqrt(1 / d.alphas_cumprod - 1)}


@pytest.mark.parametrize('case, key', golden_cases.variants('math', 'ddpm_schedules*', lambda c: c.arrays),
                         ids=golden_cases.ids)
def test_schedule(case, key):
    process, table = key.split('.')
    schedule, steps = re.fullmatch(r'(\D+)(\d+)', process).groups()
    if table == 'raw_betas':
        value = make_betas(schedule.rstrip('_'), int(steps))
    else:
        diffusion = GaussianDiffusion(schedule.rstrip('_'), int(steps))
        value = TABLES[table](diffusion) if table in TABLES else getattr(diffusion, table)
    np.testing.assert_allclose(value, case.arrays[key], rtol=1e-9)


def _spec(case, text):
    """'300:10,15,20' -> (300, '10,15,20'); unless given, as many steps as the longest of the kept ones reach."""
    total, _, spec = text.rpartition(':')
    reached = (kept[-1] + 1 for key, kept in case.arrays.items() if key.endswith('.kept') and ':' not in key)
    return int(total or max(reached)), spec


@pytest.mark.parametrize('case, key', golden_cases.variants('math', 'ddpm_respacing*', lambda c: c.arrays),
                         ids=golden_cases.ids)
def test_respacing(case, key):
    spec, *schedule, what = key.split('.')
    total, spec = _spec(case, spec)
    if what == 'kept':
        np.testing.assert_array_equal(spaced_steps(total, spec), case.arrays[key])
    else:
        np.testing.assert_allclose(GaussianDiffusion(schedule[0], total, spec).betas, case.arrays[key], rtol=1e-9)


@pytest.mark.parametrize('case, text', golden_cases.variants('math', 'ddpm_respacing*', lambda c: c.json['errors']),
                         ids=golden_cases.ids)
def test_respacing_that_cannot_be(case, text):
    with pytest.raises(UserError, match='timestep_respacing'):
        spaced_steps(*_spec(case, text))


@pytest.mark.parametrize('arguments', [{'schedule': 'quadratic'}, {'variance': 'learned'}, {'loss': 'l1'},
                                       {'predict': 'velocity'}, {'respacing': 'fast'}, {'respacing': '1'},
                                       {'steps': 20}])
def test_unknown_settings_are_refused(arguments):
    with pytest.raises(UserError):
        GaussianDiffusion(**arguments)


def test_progressive_cosine_runs_from_signal_to_noise():
    abar = GaussianDiffusion('progressive_cosine', 1000).alphas_cumprod
    log_snr = np.log(abar / (1 - abar))
    np.testing.assert_allclose(log_snr[[499, 999]], [0, -20], atol=1e-6)
    assert (np.diff(log_snr) < 0).all()


# --- Steps and losses -------------------------------------------------------------------------------------------------


def _diffusion(case, process, **settings):
    """The process 'linear_50'; without a T in the case, the last time step that the model is given is T - 1."""
    schedule, respacing = process.rsplit('_', 1)
    last = case.json['timesteps'][process]['timesteps_given_to_model'][-1]
    return GaussianDiffusion(schedule, case.json.get('arguments', {}).get('T', last + 1), respacing, **settings)


def _channels(output, x):
    """The first half of an output that holds variances too."""
    return output[:, :x.shape[1]]


def _close(key, value, ref):
    value = value.detach().numpy()
    value = value.reshape(ref.shape) if ref.ndim == 1 else value
    assert value.shape == ref.shape
    limit = 2e-3 * np.abs(ref) + 1e-3 if 'ddim' in key else 1e-4 * np.abs(ref) + 1e-5 * np.abs(ref).max()
    assert (np.abs(value - ref) <= limit).all(), np.abs(value - ref).max()


def _forward_process(diffusion, what, a, t):
    if what == 'q_sample':
        return diffusion.q_sample(a['x_start'], t, a['noise'])
    if what == 'q_mean':
        return diffusion.q_sample(a['x_start'], t, torch.zeros_like(a['noise']))
    mean, log_variance = diffusion.q_posterior(a['x_start'], a['x'], t)
    if what == 'q_post_var':
        return torch.from_numpy(diffusion.posterior_variance)[t].float()
    return {'q_post_mean': mean, 'q_post_logvar': log_variance}[what]


def _prediction(case, process, what, a, t):
    """'learned_range.clip1.mean', 'fixed_small.variance', 'start_x.mean', ..."""
    variance, *clip, quantity = what.split('.')
    settings = {'predict': 'start', 'variance': 'fixed_large'} if variance == 'start_x' else {'variance': variance}
    diffusion = _diffusion(case, process, **settings)
    output = a['model_output'] if diffusion.learned else _channels(a['model_output'], a['x'])
    p = diffusion.prediction(output, a['x'], t, clip=clip == ['clip1'] or variance.startswith('fixed'))
    if quantity == 'variance' and variance == 'fixed_small':            # at t = 0 it is 0, and its logarithm clipped
        return torch.from_numpy(diffusion.posterior_variance)[t].float()
    return {'mean': p.mean, 'log_variance': p.log_variance, 'variance': p.log_variance.exp(),
            'pred_xstart': p.start}[quantity]


def _step(case, process, what, a, t):
    """'p_sample.clip1', 'ddim_eta0.5.clip0', 'ddim_reverse.clip1'"""
    name, clip = what.rsplit('.', 1)
    diffusion, arguments = _diffusion(case, process), (a['model_output'], a['x'], t)
    if name == 'p_sample':
        return diffusion.ancestral_step(*arguments, a['noise2'], clip=clip == 'clip1')
    if name == 'ddim_reverse':
        return diffusion.ddim_reverse_step(*arguments, clip=clip == 'clip1')
    return diffusion.ddim_step(*arguments, a['noise2'], float(name.removeprefix('ddim_eta')), clip=clip == 'clip1')


def _training(case, process, what, a, t):
    """'training.rescaled_mse.vb', 'training.fixed_large.mse'"""
    _, loss, term = what.split('.')
    settings, output = {'loss': loss}, a['model_output']
    if loss.startswith('fixed'):
        settings, output = {'variance': loss}, _channels(output, a['x'])
    diffusion = _diffusion(case, process, **settings)
    x_t = diffusion.q_sample(a['x_start'], t, a['noise'])
    return diffusion.training_losses(output, a['x_start'], x_t, t, a['noise'])[term]


def _distillation(case, process, what, a, t):
    """'kd.teacher_clip1.rescaled_mse.vb', 'kd.teacher_clip0.x_tm1', 'kd.teacher_clip0.student_clip1.loss', ..."""
    _, clip, *loss, quantity = what.split('.')
    if clip == 'fixed_large':
        diffusion = _diffusion(case, process, variance='fixed_large')
        teacher = diffusion.prediction(_channels(a['teacher_output'], a['x']), a['x'], t)
        return diffusion.distillation_losses(_channels(a['model_output'], a['x']), teacher, a['x'], t)[quantity]
    diffusion = _diffusion(case, process, loss=loss[0] if loss and 'student' not in loss[0] else 'mse')
    teacher = diffusion.prediction(a['teacher_output'], a['x'], t, clip=clip == 'teacher_clip1')
    if quantity == 'x_tm1':
        return diffusion.ancestral_step(a['teacher_output'], a['x'], t, a['noise'], clip == 'teacher_clip1')
    if quantity.startswith('teacher_'):
        return getattr(teacher, quantity.removeprefix('teacher_'))
    output = a['model_output'].clone().requires_grad_()
    terms = diffusion.distillation_losses(output, teacher, a['x'], t, clip=loss == ['student_clip1'])
    if quantity == 'grad_student_output':
        return torch.autograd.grad(terms['loss'].mean(), output)[0]
    return terms[quantity]


def _process_keys(case):
    return [key for key in case.arrays if '.' in key and not key.endswith('.t')]


@pytest.mark.parametrize('case, key', golden_cases.variants('math', 'ddpm_steps*', _process_keys),
                         ids=golden_cases.ids)
def test_step_or_loss(case, key):
    process, what = key.split('.', 1)
    a = {name: case.tensor(name) for name in case.arrays}
    t, kind = a[f'{process}.t'], what.split('.')[0]
    if kind.startswith('q_'):
        value = _forward_process(_diffusion(case, process), kind, a, t)
    elif kind.startswith(('p_sample', 'ddim')):
        value = _step(case, process, what, a, t)
    else:
        value = {'training': _training, 'kd': _distillation}.get(kind, _prediction)(case, process, what, a, t)
    _close(key, value, case.arrays[key])


@pytest.mark.parametrize('case, process', golden_cases.variants('math', 'ddpm_steps*', lambda c: c.json['timesteps']),
                         ids=golden_cases.ids)
def test_time_steps_given_to_the_model(case, process):
    for key, expected in case.json['timesteps'][process].items():
        if key == 'timesteps_given_to_model':
            given = _diffusion(case, process).model_steps(case.tensor(f'{process}.t'))
            assert given.dtype == torch.int64
            assert given.tolist() == expected
        else:
            steps, kept = re.fullmatch(r'rescaled_(\d+)to(\d+)', key).groups()
            diffusion = GaussianDiffusion('cosine', int(steps), kept, rescale_timesteps=True)
            np.testing.assert_allclose(diffusion.model_steps(torch.tensor(expected['t'])), expected['given'], rtol=1e-6)


# --- Networks, samplers and the adapter -------------------------------------------------------------------------------


def _tiny(interpolate=False, clip=False, **diffusion):
    torch.manual_seed(0)
    network = dict(class_name='ADMUNet', image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,1',
                   attention_resolutions='4', learn_sigma=diffusion.get('variance', 'learned_range') == 'learned_range')
    net = build_network('DiscreteDenoiser', network=network, diffusion=diffusion, interpolate=interpolate, clip=clip)
    with torch.no_grad():
        for parameter in net.parameters():                              # nothing is zero, so everything matters
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def test_adapter_is_the_posterior_mean_of_the_network():
    net = _tiny(schedule='cosine', steps=1000, respacing='100')
    diffusion = net.diffusion
    t = torch.tensor([0, 40, 90])
    x_t = torch.randn([3, 3, 8, 8])
    with torch.no_grad():
        start = diffusion.prediction(net(x_t, step=diffusion.model_steps(t)), x_t, t).start
        scale = torch.from_numpy(diffusion.alphas_cumprod)[t].sqrt().float().reshape(-1, 1, 1, 1)
        D_x = net(x_t / scale, torch.from_numpy(diffusion.sigmas)[t])
    assert golden_cases.relative_error(D_x, start) < 1e-5


def test_round_sigma_and_interpolation():
    net, smooth = _tiny(schedule='cosine', steps=50), _tiny(schedule='cosine', steps=50, interpolate=True)
    levels = torch.from_numpy(net.diffusion.sigmas)
    assert (net.sigma_min, net.sigma_max) == (levels[0], levels[-1])
    assert torch.equal(net.round_sigma(levels * 1.001), levels)
    assert torch.equal(net.round_sigma(torch.tensor([0.0, 1e9])), levels[[0, -1]].float())
    assert torch.equal(smooth.round_sigma(torch.tensor([0.3])), torch.tensor([0.3]))
    assert net.step_of(levels).tolist() == list(range(50))
    torch.testing.assert_close(smooth.step_of(levels), torch.arange(50.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(smooth.step_of((levels[3] * levels[4]).sqrt().reshape(1)), torch.tensor([3.5]))


def test_ddim_is_euler_of_the_adapter():
    net = _tiny(schedule='linear', steps=1000, respacing='20', variance='fixed_small')
    noise = torch.randn([2, 3, 8, 8])
    with torch.no_grad():
        images = sample(net, noise, name='ddim', clip=False)
        abar = float(net.diffusion.alphas_cumprod[-1])
        x = noise.double() / abar**0.5
        sigmas = [*reversed(net.diffusion.sigmas), 0.0]
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            D_x = net(x, sigma)
            x = D_x + following / sigma * (x - D_x)
    assert golden_cases.relative_error(images, x) < 1e-4


@pytest.mark.parametrize('options', [
    {'name': 'ddpm'}, {'name': 'ddpm', 'num_steps': '5'}, {'name': 'ddim'}, {'name': 'ddim', 'eta': 1.0}])
def test_chains_depend_on_their_seeds_alone(options):
    net = _tiny(schedule='cosine', steps=10)
    seeds = [3, 4, 5]

    def samples(chosen):
        random = StackedRandomGenerator('cpu', chosen)
        with torch.no_grad():
            return sample(net, random.randn([len(chosen), 3, 8, 8]), random=random, clip=True, **options)

    whole = samples(seeds)
    assert len(whole.unique(dim=0)) == 3
    assert golden_cases.relative_error(torch.cat([samples([s]) for s in seeds]), whole) < 1e-3


def test_heun_runs_on_a_discrete_network():
    net = _tiny(schedule='cosine', steps=1000, clip=True)
    with torch.no_grad():
        x = sample(net, torch.randn([2, 3, 8, 8]), name='edm2', num_steps=6)
    assert x.isfinite().all() and x.abs().max() < 1.5


def test_guidance_moves_the_noise_and_leaves_the_variance():
    def net(x, step=None, class_labels=None):
        values = torch.full_like(x, 1.0 if class_labels is None else 3.0)
        return torch.cat([values, values], dim=1)

    x, labels = torch.zeros([1, 3, 2, 2]), torch.ones([1, 4])
    output = Guided(net, labels, without_labels(net), 2.5).output(x, None, 1)
    assert (output[:, :3] == 1 + 2.5 * 2).all() and (output[:, 3:] == 3).all()


class _GaussianData(torch.nn.Module):
    """The exact noise prediction for data N(0.3, 0.2^2)."""

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion = diffusion

    def forward(self, x_t, step=None, class_labels=None):
        abar = torch.from_numpy(np.cumprod(1 - make_betas('cosine', 1000)))[step].reshape(-1, 1, 1, 1)
        start = 0.3 + 0.2**2 * abar.sqrt() * (x_t - abar.sqrt() * 0.3) / (0.2**2 * abar + 1 - abar)
        return ((x_t - abar.sqrt() * start) / (1 - abar).sqrt()).float()


@pytest.mark.parametrize('variance, options', [
    ('fixed_small', {'name': 'ddpm'}), ('fixed_large', {'name': 'ddpm'}), ('fixed_small', {'name': 'ddim'}),
    ('fixed_small', {'name': 'ddim', 'eta': 1.0})])
def test_chains_find_the_distribution_of_the_data(variance, options):
    net = _GaussianData(GaussianDiffusion('cosine', 1000, '250', variance=variance))
    torch.manual_seed(0)
    images = sample(net, torch.randn([64, 3, 8, 8]), clip=True, **options)
    assert abs(images.mean() - 0.3) < 0.01
    assert abs(images.std() - 0.2) < 0.02


def test_ddim_backwards_and_forwards_returns():
    net = _GaussianData(GaussianDiffusion('cosine', 1000, variance='fixed_small'))
    x = image = 0.3 + 0.2 * torch.randn([2, 3, 4, 4], generator=torch.Generator().manual_seed(0))
    for index in range(990):
        t = torch.full([2], index)
        x = net.diffusion.ddim_reverse_step(net(x, t), x, t, clip=False)
    assert abs(x.std() - 1) < 0.2
    for index in reversed(range(991)):
        t = torch.full([2], index)
        x = net.diffusion.ddim_step(net(x, t), x, t, clip=False)
    assert (x - image).abs().max() < 0.01


def test_training_lowers_the_loss():
    net = _tiny(schedule='cosine', steps=1000).train()
    objective = DDPMLoss(net.diffusion)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        batch = {'images': torch.full([4, 3, 8, 8], 0.5), 'labels': None, 'random': GlobalRandom()}
        loss, terms = objective(net, batch)
        assert loss.shape == terms['mse'].shape == terms['vb'].shape == (4,)
        optimizer.zero_grad()
        loss.mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(terms['mse'].mean().item())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_checkpointed_block_gives_the_same_gradients():
    def gradients(use_checkpoint):
        torch.manual_seed(0)
        net = build_network('ADMUNet', image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,2',
                            attention_resolutions='4', use_checkpoint=use_checkpoint, dropout=0.5, resblock_updown=True)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        with drawing_from(StackedRandomGenerator('cpu', [7, 8])):
            loss = net(torch.ones([2, 3, 8, 8]), torch.tensor([1, 5])).square().sum()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False))
