"""Samplers by name: second witnesses, whose levels they visit, what a snapshot remembers, and that every script has all."""

import functools
import json

import click.testing
import diffusers
import numpy as np
import pytest
import torch
from helpers import fails, script_module, write_digits

from dnnlib import UserError
from torch_utils.random import GlobalRandom, StackedRandomGenerator
from training.diffusion import samplers
from training.diffusion.gaussian import GaussianDiffusion
from training.diffusion.noise import edm_sigmas
from training.diffusion.samplers import SAMPLERS, sample
from training.encoders import RGBEncoder
from training.generate import generate_images, open_generator
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot

UNET = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
ADM = dict(class_name='ADMUNet', image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,2',
           attention_resolutions='4', learn_sigma=True)
DDPM = dict(class_name='DDPMUNet', T=20, ch=64, ch_mult=[1], attn=[0], num_res_blocks=1, dropout=0.0, cond=True, augm=False,
            num_class=3, img_resolution=8)
NETWORKS = {
    'edm': ('EDMPrecond', dict(img_resolution=8, img_channels=3, label_dim=3, model_type='SongUNet', **UNET)),
    've': ('VEPrecond', dict(img_resolution=8, img_channels=3, label_dim=0, **UNET)),
    'edm2': ('Precond', dict(img_resolution=8, img_channels=3, label_dim=3, channels_per_head=8, **UNET)),
    'adm': ('DiscreteDenoiser', dict(network=ADM, diffusion=dict(schedule='cosine', steps=20), interpolate=True, clip=True)),
    'ddpm': ('DiscreteDenoiser', dict(network=DDPM, diffusion=dict(schedule='linear_float32', steps=20,
                                                                   variance='fixed_large'))),
}


def network(kind, seed=0):
    torch.manual_seed(seed)
    name, arguments = NETWORKS[kind]
    net = build_network(name, **arguments).eval().requires_grad_(False)
    for value in net.parameters():
        value.add_(0.1 * torch.randn_like(value))
    return net


def save(path, kind, **options):
    net = network(kind)
    save_snapshot(path, net, encoder=RGBEncoder(), dataset={'name': 'x', 'label_dim': net.label_dim}, recipe={}, nimg=0,
                  **options)
    return str(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Snapshots KIND/network-snapshot-0000000.pkl, and the data set digits.zip."""
    path = tmp_path_factory.mktemp('nets')
    for kind in NETWORKS:
        (path / kind).mkdir()
        save(path / kind / 'network-snapshot-0000000.pkl', kind)
    write_digits(path / 'digits.zip', count=30)
    return path


def pixels(net, **options):
    (batch,) = generate_images(net, RGBEncoder(), range(3), **options)
    return batch.images


# --- Second witnesses -------------------------------------------------------------------------------------------------


def gaussian_denoiser(x, sigma, labels=None):
    """The exact denoiser of N(0.3, 0.5^2)."""
    return (0.25 * x + sigma**2 * 0.3) / (0.25 + sigma**2)


@pytest.mark.parametrize('num_steps', [2, 8, 20])
def test_dpmpp_2m_is_that_of_diffusers(num_steps):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, rho=7)
    scheduler.set_timesteps(num_steps)
    noise = torch.randn([2, 3, 4, 4])
    x = noise * scheduler.sigmas[0]
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        c_skip = 0.25 / (sigma**2 + 0.25)
        c_out = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
        x = scheduler.step((gaussian_denoiser(x, sigma) - c_skip * x) / c_out, t, x).prev_sample
    ours = sample(gaussian_denoiser, noise, name='dpmpp-2m', num_steps=num_steps)
    torch.testing.assert_close(ours.float(), x, rtol=1e-4, atol=1e-4)


class Noise(torch.nn.Module):
    """A network of discrete time with the exact noise of N(0.3, 0.5^2)."""

    def __init__(self, **diffusion):
        super().__init__()
        self.diffusion = GaussianDiffusion('linear_float32', **diffusion)

    def forward(self, x_t, step=None, class_labels=None):
        full = self.diffusion.respaced('')
        abar = torch.from_numpy(full.alphas_cumprod).float()[step].reshape(-1, 1, 1, 1)
        start = gaussian_denoiser(x_t / abar.sqrt(), ((1 - abar) / abar).sqrt())
        return (x_t - abar.sqrt() * start) / (1 - abar).sqrt()


@pytest.mark.parametrize('ours, theirs', [
    (dict(name='ddim', num_steps='ddim50'),
     (diffusers.DDIMScheduler, dict(set_alpha_to_one=True), 50, dict(use_clipped_model_output=True))),
    (dict(name='ddim', num_steps='ddim50', eta=1.0),
     (diffusers.DDIMScheduler, dict(set_alpha_to_one=True), 50, dict(eta=1.0, use_clipped_model_output=True))),
    (dict(name='ddpm', variance='fixed_small'), (diffusers.DDPMScheduler, dict(variance_type='fixed_small'), 1000, {})),
    (dict(name='ddpm', variance='fixed_large'), (diffusers.DDPMScheduler, dict(variance_type='fixed_large'), 1000, {}))])
@pytest.mark.parametrize('clip', [False, True])
def test_chains_are_those_of_diffusers(ours, theirs, clip):
    cls, settings, steps, step_options = theirs
    scheduler = cls(beta_start=1e-4, beta_end=0.02, clip_sample=clip, **settings)
    scheduler.set_timesteps(steps)
    net = Noise(variance=ours.get('variance', 'fixed_small'))
    noise = torch.randn([2, 3, 4, 4])
    torch.manual_seed(1)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, step=t.reshape(1)), t, x, **step_options).prev_sample
    torch.manual_seed(1)
    options = {key: value for key, value in ours.items() if key != 'variance'}
    torch.testing.assert_close(sample(net, noise, clip=clip, random=GlobalRandom(), **options), x, rtol=1e-3, atol=1e-3)


def test_ddim_of_levels_is_the_chain_of_discrete_time():
    """The same steps, once of sigma and once of t: the two forms of the sampler agree."""
    net = Noise(steps=50, variance='fixed_small')
    diffusion = net.diffusion
    noise = torch.randn([2, 3, 4, 4])
    levels = torch.tensor([*reversed(diffusion.sigmas), 0.0])
    scale = diffusion.alphas_cumprod[-1] ** 0.5             # the chain starts from noise, not from noise times sigma
    start = (noise / scale / levels[0]).double()
    for eta in (0.0, 1.0):
        torch.manual_seed(1)
        chain = samplers.chain(samplers.Guided(net), noise, diffusion, GlobalRandom(), eta=eta, clip=True)
        torch.manual_seed(1)
        random = _InFloat32()
        ours = samplers.ancestral(samplers.Guided(gaussian_denoiser), start, levels, random, eta, clip=True)
        torch.testing.assert_close(ours.float(), chain, rtol=1e-3, atol=1e-3)


class _InFloat32:
    def randn_like(self, x):
        return torch.randn(x.shape).to(x)


# --- Levels -----------------------------------------------------------------------------------------------------------


def watched(net):
    """The network, and the list of (level, type of x) that it is called with."""
    calls = []
    forward = net.forward

    def record(x, sigma, *args, **kwargs):
        calls.append((float(sigma), x.dtype))
        return forward(x, sigma, *args, **kwargs)

    net.forward = record
    return net, calls


def test_a_ve_network_is_evaluated_in_the_order_of_edm():
    """18 steps from min(80, 100) to max(0.002, 0.02) in double precision, the level after each step evaluated twice."""
    net, calls = watched(network('ve'))
    list(generate_images(net, RGBEncoder(), range(2)))
    levels = [(80 ** (1 / 7) + i / 17 * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    order = levels[:1] + [level for level in levels[1:] for _ in range(2)]
    assert len(calls) == 2 * 18 - 1
    np.testing.assert_allclose([sigma for sigma, _ in calls], order, rtol=1e-12)
    assert {dtype for _, dtype in calls} == {torch.float64}


def test_an_iddpm_network_is_asked_for_its_own_levels():
    torch.manual_seed(0)
    net = build_network('iDDPMPrecond', img_resolution=8, img_channels=3, model_channels=8, channel_mult=[1], num_blocks=1,
                        attn_resolutions=[]).eval()
    _, calls = watched(net)
    for name in ('edm', 'edm2', 'dpmpp-2m', 'ddim', 'ddpm'):
        list(generate_images(net, RGBEncoder(), range(1), sampler={'name': name, 'num_steps': 5}))
    list(generate_images(net, RGBEncoder(), range(1), S_churn=20, num_steps=5))
    assert {sigma for sigma, _ in calls} <= set(net.u.double().tolist())


def test_the_working_precision_decides_where_noise_is_added():
    """S_min and S_max are compared with a level as torch compares a tensor of the level's type with a number."""
    levels = edm_sigmas(8, 0.002, 80, 7)
    for level in levels[1:7]:
        for limits in ({'S_min': float(level) * (1 + 1e-9)}, {'S_max': float(level) * (1 - 1e-9)}):
            inside = bool(limits.get('S_min', 0) <= level <= limits.get('S_max', np.inf))
            assert inside                                       # in double precision it would be outside
            calls = []

            def net(x, sigma, labels=None):
                calls.append(float(sigma))                      # noqa: B023
                return gaussian_denoiser(x, sigma)

            sample(net, torch.randn([1, 1, 2, 2]), name='edm2', num_steps=8, S_churn=8, **limits)
            assert float(level) * 2**0.5 == pytest.approx(min(calls, key=lambda s: abs(s - float(level) * 2**0.5)), rel=1e-6)


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, own', [
    ('edm', {'name': 'edm', 'num_steps': 18, 'dtype': 'float64'}), ('ve', {'name': 'edm', 'num_steps': 18}),
    ('edm2', {'name': 'edm2', 'num_steps': 32, 'dtype': 'float32'}), ('adm', {'name': 'ddpm', 'clip': None}),
    ('ddpm', {'name': 'ddpm', 'clip': False})])
def test_a_network_is_sampled_as_its_family_is(folder, kind, own):
    path = str(folder / kind / 'network-snapshot-0000000.pkl')
    generator = open_generator(path)
    assert generator.options['sampler'].items() >= own.items()
    (made,) = generator.images(range(3))
    assert torch.equal(made.images, pixels(load_snapshot(path).net, sampler=own))


def test_a_snapshot_remembers_its_sampler(folder, tmp_path):
    sampler = {'name': 'dpmpp-2m', 'num_steps': 4, 'rho': 5}
    path = save(tmp_path / 'a.pkl', 've', sampler=sampler)
    assert load_snapshot(path).sampler == sampler
    own = open_generator(path)
    assert own.options['sampler'].items() >= sampler.items()
    (made,) = own.images(range(3))
    assert torch.equal(made.images, pixels(load_snapshot(path).net, sampler=sampler))
    for form in ('b.pkl', 'c.safetensors', 'folder'):
        script_module('snapshot_tool.py').main.main(['convert', path, f'--dest={tmp_path / form}'], standalone_mode=False)
        assert load_snapshot(str(tmp_path / form)).sampler == sampler
    changed = open_generator(path, sampler={'num_steps': 6}).options['sampler']
    assert (changed['name'], changed['num_steps'], changed['rho']) == ('dpmpp-2m', 6, 5)
    other = open_generator(path, sampler={'name': 'edm'}).options['sampler']
    assert (other['num_steps'], other['rho']) == (18, 7)        # options of another sampler are not its


@pytest.mark.parametrize('sampler', [7, 'edm', {'num_steps': 3}, {'name': 3}, {'name': 'x', 'a': [1] * 10_000}])
def test_a_damaged_sampler_is_named(tmp_path, sampler):
    with pytest.raises(UserError, match='a.pkl: its sampler is malformed'):
        load_snapshot(save(tmp_path / 'a.pkl', 've', sampler=sampler))


def test_a_sampler_of_a_later_version_is_named_and_can_be_overridden(tmp_path):
    path = save(tmp_path / 'a.pkl', 've', sampler={'name': 'later'})
    with pytest.raises(UserError, match='later is no sampler'):
        open_generator(path)
    assert open_generator(path, sampler={'name': 'edm'}).options['sampler']['name'] == 'edm'
    assert open_generator(path, sampler={'solver': 'euler'}).options['sampler']['name'] == 'ablation'


@pytest.mark.parametrize('setting, text', [
    ({'name': 'euler'}, 'euler is no sampler; one of: edm, edm2'),
    ({'name': 'edm', 'eta': 1}, 'eta=1 is no option of the sampler edm'),
    ({'name': 'edm', 'num_steps': 'many'}, 'is no number'), ({'name': 'edm', 'num_steps': 0}, 'at least 1'),
    ({'name': 'ablation', 'solver': 'rk4'}, "'rk4' is not one of euler, heun")])
def test_what_a_sampler_does_not_know_is_refused(setting, text):
    with pytest.raises(UserError, match=text):
        sample(gaussian_denoiser, torch.zeros([1, 1, 2, 2]), **setting)


# --- Guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, options', [
    ('edm', {}), ('edm', {'name': 'edm2'}), ('edm', {'name': 'ablation'}), ('edm', {'name': 'dpmpp-2m'}),
    ('edm', {'name': 'ddim'}), ('edm', {'name': 'ddpm', 'num_steps': 20}), ('ddpm', {}), ('ddpm', {'name': 'ddim'}),
    ('ddpm', {'name': 'edm'})])
def test_guidance_acts_inside_of_its_interval_only(kind, options):
    net, guide = network(kind), network(kind, seed=1)
    guided = functools.partial(pixels, net, guide=guide, guidance=2, sampler=options or None)
    plain, whole = pixels(net, sampler=options or None), guided()
    part = guided(guidance_interval=(0.2, 2))
    assert not torch.equal(part, whole) and not torch.equal(part, plain)
    assert torch.equal(guided(guidance_interval=(1e4, 1e5)), plain)
    assert torch.equal(guided(guidance_interval=(0, 1e5)), whole)


def test_the_upper_end_of_the_interval_belongs_to_it():
    called = []

    def guide(x, sigma, labels=None):
        called.append(float(sigma))
        return gaussian_denoiser(x, sigma)

    levels = edm_sigmas(6, 0.002, 80, 7, torch.float64).tolist()
    sample(gaussian_denoiser, torch.randn([1, 1, 2, 2]), name='edm', num_steps=6, guide=guide, guidance=2,
           guidance_interval=(levels[3], levels[1]))
    assert called == [levels[1], levels[1], levels[2], levels[2]]


@pytest.mark.parametrize('options, text', [
    (dict(guidance=3), 'guidance=3 needs a guiding network'), (dict(guidance_interval=(0, 1)), 'a guidance other than 1'),
    (dict(guidance=3, guide=gaussian_denoiser, guidance_interval=(2, 1)), 'needs LO < HI')])
def test_guidance_that_would_do_nothing_is_refused(options, text):
    net = network('ve')
    with pytest.raises(UserError, match=text):
        list(generate_images(net, RGBEncoder(), range(2), **options))


# --- Scripts ----------------------------------------------------------------------------------------------------------


def invoke(script, *args):
    result = click.testing.CliRunner().invoke(script_module(script).main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def scripts(folder, kind, out) -> dict:
    """Every script that makes images of a network, with few of them."""
    net = folder / kind / 'network-snapshot-0000000.pkl'
    digits = folder / 'digits.zip'
    return {
        'images': ('generate_images.py', f'--net={net}', '--seeds=0-2', f'--outdir={out}/images'),
        'gen': ('calculate_metrics.py', 'gen', f'--net={net}', '--seeds=0-4', f'--ref={digits}', '--metrics=fd_pixels',
                f'--dest={out}/gen.json'),
        'memorization': ('calculate_metrics.py', 'memorization', f'--net={net}', '--num=3', f'--data={digits}',
                         f'--dest={out}/m.json'),
        'ratio': ('mem_ratio.py', f'--expdir={folder / kind}', f'--knn-ref={digits}', '--seeds=0-2', f'--log={out}/log.json'),
        'classes': ('synthetic_data/generate.py', f'--network={net}', '--seeds=0-2', f'--outdir={out}/classes'),
    }


@pytest.mark.parametrize('kind', NETWORKS)
@pytest.mark.parametrize('name', SAMPLERS)
def test_every_script_has_every_sampler(folder, tmp_path, kind, name):
    for script, *args in scripts(folder, kind, tmp_path).values():
        invoke(script, *args, f'--sampler={name}', '--steps=4')
    records = [json.loads((tmp_path / path).read_text()) for path in ('images/dataset.json', 'gen.json', 'm.json')]
    settings = [record.get('generated_by', record)['sampler'] for record in records]
    assert settings[0] == settings[1] == settings[2] and (settings[0]['name'], settings[0]['num_steps']) == (name, 4)
    made = np.load(tmp_path / 'classes' / '0.npy')
    net = load_snapshot(str(folder / kind / 'network-snapshot-0000000.pkl')).net
    (batch,) = generate_images(net, RGBEncoder(), range(3), labels=0, sampler={'name': name, 'num_steps': 4})
    assert np.abs(batch.images.permute(0, 2, 3, 1).int().numpy() - made).max() <= 1


def test_an_option_that_the_sampler_does_not_know_is_refused_by_every_script(folder, tmp_path):
    for kind, option in (('edm', '--eta=1'), ('edm2', '--eta=1'), ('ddpm', '--rho=3')):
        for key, (script, *args) in scripts(folder, kind, tmp_path).items():
            if key == 'ratio' and kind == 'ddpm':
                continue                                        # samples every network by EDM's sampler
            line = fails(script, *args, option)
            assert line.startswith(f'Error: {option}') and ('no option' in line or 'no meaning' in line), (key, line)


def test_the_guide_of_another_shape_is_refused_by_every_script(folder, tmp_path):
    wide = build_network('VEPrecond', img_resolution=16, img_channels=3, label_dim=0, **UNET)
    save_snapshot(tmp_path / 'wide.pkl', wide, encoder=RGBEncoder(), dataset={'name': 'x', 'label_dim': 0}, recipe={}, nimg=0)
    commands = scripts(folder, 've', tmp_path)
    for key in ('images', 'gen', 'memorization'):
        script, *args = commands[key]
        assert 'another shape' in fails(script, *args, f'--gnet={tmp_path}/wide.pkl', '--guidance=2')
        assert '--guidance=2.0 needs a guiding network' in fails(script, *args, '--guidance=2')
        guide = folder / 've' / 'network-snapshot-0000000.pkl'
        assert '--guidance-interval' in fails(script, *args, f'--gnet={guide}', '--guidance-interval=1,2')


def test_the_memorization_ratio_is_that_of_edm_in_18_steps(folder, tmp_path):
    script, *args = scripts(folder, 'edm2', tmp_path)['ratio']
    invoke(script, *args)
    sampler = json.loads((tmp_path / 'log.json').read_text())['settings']['sampler']
    assert sampler.items() >= {'name': 'edm', 'num_steps': 18, 'dtype': 'float64'}.items()


def test_random_numbers_of_a_seed_do_not_depend_on_unused_churn():
    """A level outside of S_min..S_max draws the noise that it does not use, as EDM's sampler does; EDM2's does not."""
    noise = torch.zeros([1, 1, 2, 2])
    draws = {}
    for name in ('edm', 'edm2'):
        random = StackedRandomGenerator('cpu', [3])
        sample(gaussian_denoiser, noise, name=name, num_steps=4, S_churn=4, S_max=1, random=random)
        draws[name] = random.randn([1])
    fresh = StackedRandomGenerator('cpu', [3])
    expected = [fresh.randn([1, 1, 2, 2], dtype=torch.float64) for _ in range(4)] and fresh.randn([1])
    assert torch.equal(draws['edm'], expected) and not torch.equal(draws['edm2'], expected)


class _InEveryStep:
    """One torch.randn for each image, at once, also where it is not used: what published images were made with."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.calls = 0

    def randn(self, size, dtype=torch.float32):
        return torch.cat([torch.randn([1, *size[1:]], generator=one, dtype=dtype) for one in self.generators])

    def randn_like(self, x):
        self.calls += 1
        return self.randn(x.shape, x.dtype)

    skip_like = randn_like


@pytest.mark.parametrize('churn', [{}, dict(S_churn=3), dict(S_churn=3, S_min=0.1, S_max=2), dict(S_churn=3, S_min=1e9)],
                         ids=['none', 'everywhere', 'within', 'nowhere'])
@pytest.mark.parametrize('options', [dict(name='edm'), dict(name='edm2'), dict(name='ablation', solver='euler'),
                                     dict(name='edm', dtype='float32')], ids=lambda options: '-'.join(options.values()))
def test_skipped_noise_leaves_the_images_of_a_seed_as_they_were(options, churn):
    net = network('edm')
    for seeds in ([0], [2, 1, 700]):
        every, ours = _InEveryStep(seeds), StackedRandomGenerator('cpu', seeds)
        images = [sample(net, random.randn([len(seeds), 3, 8, 8]), random=random, num_steps=6, **options, **churn)
                  for random in (every, ours)]
        assert torch.equal(*images)
        assert every.calls == 0 if not churn else options['name'] == 'edm2' or every.calls == 6


@pytest.mark.parametrize('options', [dict(name='edm'), dict(name='ablation', discretization='vp', schedule='vp', scaling='vp'),
                                     dict(name='edm2'), dict(name='dpmpp-2m'), dict(name='ddim'), dict(name='flow')],
                         ids=lambda options: options['name'])
def test_no_random_numbers_where_no_noise_is_added(options):
    sample(network('edm'), torch.zeros([2, 3, 8, 8]), num_steps=3, random='nothing to draw from', **options)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_skipping_random_numbers_is_drawing_them(dtype):
    for size in (1, 15, 16, 20, 31, 48, 3072):
        x = torch.empty([2, size], dtype=dtype)
        drawn, skipped = (StackedRandomGenerator('cpu', [5, 2**40 + 1]) for _ in range(2))
        for _ in range(3):
            drawn.randn_like(x)
            skipped.skip_like(x)
        for _ in range(2):
            assert torch.equal(drawn.randn_like(x), skipped.randn_like(x))
