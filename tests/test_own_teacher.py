"""Distillation from one's own teacher: networks of any noise level as teachers of a chain, guided or not."""

import math
import types

import helpers
import pytest
import test_transfer as families
import torch

from distillation import configs
from distillation.dkdm import ProcessRandom, Teacher
from distillation.runs import chain_of
from training import encoders
from training.diffusion.gaussian import GaussianDiffusion
from training.diffusion.samplers import Guided
from training.runs import read_options
from training.snapshot import load_snapshot, save_snapshot

PREPARE, KD = 'distillation/scripts/dynamic_prepare.py', 'distillation/scripts/image_kd.py'
SD, MEANS = 0.5, torch.tensor([-0.6, 0.8])


class GaussianNet(torch.nn.Module):
    """The denoiser of N(mean of the class, SD^2) pixels: D(x; sigma) = (SD^2 x + sigma^2 m) / (SD^2 + sigma^2)."""

    img_channels = img_resolution = 1
    image_shape = (1, 1, 1)
    label_dim = 2
    sigma_min, sigma_max = 0.0, math.inf

    def forward(self, x, sigma, class_labels=None):
        labels = torch.full([1, 2], 0.5) if class_labels is None else class_labels
        mean = (labels @ MEANS).reshape(-1, 1, 1, 1)
        return (SD**2 * x + sigma**2 * mean) / (SD**2 + sigma**2)


def teacher_of(schedule='edm', steps=100, **more):
    return Teacher(GaussianNet(), GaussianDiffusion(schedule=schedule, steps=steps, variance='fixed_small'), **more)


@pytest.mark.parametrize('schedule, steps', [('edm', 10), ('edm', 100), ('linear', 200), ('cosine', 30)])
def test_the_mean_of_a_step_is_that_of_bayes(schedule, steps):
    """E[x_(t-1) | x_t] of Gaussian data is linear in x_t; the noise is (x_t - sqrt(abar) E[x_0 | x_t]) / sqrt(1 - abar)."""
    teacher = teacher_of(schedule, steps)
    chain = teacher.diffusion
    t = torch.arange(steps)
    x_t = torch.randn([steps, 1, 1, 1], generator=torch.Generator().manual_seed(0))
    labels = torch.eye(2)[t % 2]
    output = teacher.output(x_t, t, labels)
    abar, before = (torch.from_numpy(table).reshape(-1, 1, 1, 1) for table in (
        chain.alphas_cumprod, chain.alphas_cumprod_prev))
    m = MEANS[t % 2].double().reshape(-1, 1, 1, 1)

    def moments(abar):
        return abar.sqrt() * m, abar * SD**2 + 1 - abar

    (mean, variance), (mean_before, variance_before) = moments(abar), moments(before)
    gain = (abar / before).sqrt() * variance_before / variance
    expected = mean_before + gain * (x_t - mean)
    start = m + abar.sqrt() * SD**2 / variance * (x_t - mean)
    prediction = chain.prediction(output, x_t, t)
    torch.testing.assert_close(prediction.mean.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.double(), (x_t - abar.sqrt() * start) / (1 - abar).sqrt(), rtol=1e-3, atol=1e-3)


def test_chains_end_as_the_data():
    """With the hundred steps that one's own teacher gets, for each class."""
    diffusion = chain_of(GaussianNet()).arguments()
    assert diffusion['steps'] == 100 and diffusion['sigma_range'] == [0.002, 80]
    teacher = Teacher(GaussianNet(), GaussianDiffusion(**diffusion))
    rng = ProcessRandom(0)
    images = teacher.noise(8000, rng)
    for _ in range(100):
        teacher.advance(images, rng)
    for label, mean in enumerate(MEANS):
        values = images.x[images.classes == label]
        assert abs(values.mean() - mean) < 0.03 and 0.92 < values.std() / SD < 1.03


def test_levels_of_a_chain_are_those_of_edm_within_the_range_of_the_network():
    chain = GaussianDiffusion(**chain_of(types.SimpleNamespace(sigma_min=0.02, sigma_max=50.0)).arguments())
    assert chain.num_steps == 100 and abs(chain.sigmas[0] - 0.02) < 1e-9 and abs(chain.sigmas[-1] - 50) < 1e-6
    ramp = chain.sigmas ** (1 / 7)
    torch.testing.assert_close(torch.from_numpy(ramp[1:] - ramp[:-1]), torch.full([99], (ramp[-1] - ramp[0]) / 99).double())


def test_a_guided_teacher_teaches_what_guided_sampling_does():
    guide = GaussianNet()
    guide.forward = types.MethodType(lambda self, x, sigma, class_labels=None: 0.5 * x / (0.25 + sigma**2), guide)
    teacher = teacher_of(guide=guide, guidance=2.5, interval=(0.5, 10))
    chain = teacher.diffusion
    x_t = torch.randn([100, 1, 1, 1])
    t = torch.arange(100)
    labels = torch.eye(2)[t % 2]
    start = chain.prediction(teacher.output(x_t, t, labels), x_t, t).start
    for i in range(0, 100, 7):
        sampled = Guided(teacher.net, labels[i:i + 1], guide, 2.5, (0.5, 10))
        x = x_t[i:i + 1] / math.sqrt(chain.alphas_cumprod[i])
        torch.testing.assert_close(start[i:i + 1], sampled(x, chain.sigmas[i]), rtol=1e-3, atol=2e-3)


FLOW = families.SONG | dict(class_name='FlowPrecond', label_dim=0)
LATENT = families.varied(families.EDM2, channels=4)
SMALL = ['teacher.batch_size=16', 'student.batch_size=4', 'student.total_steps=2', 'student.save_interval=2',
         'student.log_interval=1', 'student.model.num_channels=32', 'student.model.num_res_blocks=1']


def save(folder, network, name='net.pkl', encoder='rgb'):
    net = families.filled(network)
    save_snapshot(str(folder / name), net, encoder=encoders.make_encoder({'name': encoder}), recipe={}, dtype=torch.float32,
                  dataset=dict(name='x', label_dim=net.label_dim, class_names=list('abc') if net.label_dim else None))
    return str(folder / name)


@pytest.mark.parametrize('network, options, classes', [
    (families.SONG, [], 3), (FLOW, [], 0), (LATENT, [], 3), (families.GUIDED, [], 3),
    (families.CBDM, ['teacher.gnet=self', 'teacher.guidance=2'], 3)], ids=['edm', 'flow', 'edm2-latents', 'adm', 'cbdm-guided'])
def test_any_network_teaches(network, options, classes, tmp_path, monkeypatch):
    """A cache, a student, its grid; the student is sampled as its snapshot says, with the names of the classes."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, network, encoder='sd-vae' if network is LATENT else 'rgb')
    if network['class_name'] != 'DiscreteDenoiser':
        options = [*options, 'teacher.diffusion.diffusion_steps=10']
    helpers.invoke(PREPARE, f'--teacher={path}', *SMALL, *options)
    assert (tmp_path / 'experiments' / 'cache' / 'net.cache').is_file()
    out = helpers.invoke(KD, f'--teacher={path}', *SMALL, *options)
    student = load_snapshot('experiments/net-student/network-snapshot-0000000.pkl')
    assert student.net.label_dim == classes and student.sampler['name'] == 'ddpm'
    assert student.net.diffusion.num_steps == 10 and student.dataset['class_names'] == (list('abc') if classes else None)
    assert student.encoder.name == ('sd-vae' if network is LATENT else 'rgb')
    if network is LATENT:                                      # whose autoencoder is not at hand
        assert 'No sample grid' in out
    else:
        assert (tmp_path / 'experiments' / 'net-student' / 'samples-0000000.png').is_file()
        helpers.invoke('generate_images.py', '--net=experiments/net-student/network-snapshot-0000000.pkl', '--seeds=0-1',
                       '--outdir=out')
    assert read_options('experiments/net-student')['own_teacher'] == 'net.pkl'
    if options and 'gnet' in options[0]:
        other = helpers.fails(KD, f'--teacher={path}', *SMALL)
        assert 'net.cache was made with' in other or 'teacher' in other


def test_what_does_not_go_with_ones_own_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, families.SONG)
    guide = save(tmp_path, families.varied(families.SONG, side=16), 'guide.pkl')
    for options, message in (
            ([], '--config: give a configuration, or else a teacher'),
            ([f'--teacher={path}', '--config=yaml/digits_8/exp/Digits-Dynamic-0.4.yaml'], '--config: give'),
            ([f'--teacher={path}', 'teacher.guidance=2'], 'teacher.guidance=2.0 needs a guiding network'),
            ([f'--teacher={path}', f'teacher.gnet={guide}', 'teacher.guidance=2'], 'teacher.gnet='),
            ([f'--teacher={path}', 'student.model.image_size=16'], "student.model.image_size: 16 differs from the teacher's 8"),
            ([f'--teacher={path}', 'teacher.BATCHES=2'], 'there is no key teacher.BATCHES'),
            (['--teacher=nowhere.pkl'], 'nowhere.pkl')):
        assert message in helpers.fails(PREPARE, *options)


def test_names_of_what_is_made_of_a_teacher():
    assert configs.own_name('runs/photos/network-snapshot-0001000-0.050.pkl') == 'photos-0001000-0.050'
    assert configs.own_name('https://x.org/a/edm-cifar10.pkl') == 'edm-cifar10'
    assert configs.default_outdir(None, 'runs/digits/best.pkl') == 'experiments/best-student'


def test_a_teacher_of_images_that_are_no_squares_is_refused(tmp_path):
    net = save(tmp_path, families.EDM2 | dict(img_resolution=[8, 16]), 'wide.pkl')
    assert 'makes images of 16x8 pixels; students learn square ones' in helpers.fails(PREPARE, f'--teacher={net}')
