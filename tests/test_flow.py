"""Flow matching: its loss, its network and its samplers against their equations, and a run end to end."""

import json

import numpy as np
import pytest
import torch
from helpers import run, write_digits

from torch_utils.random import GlobalRandom
from training.diffusion.losses import FlowLoss
from training.diffusion.samplers import sample
from training.networks import build_network
from training.snapshot import load_snapshot

SMALL = ['--precond=flow', '--num-channels=16', '--num-blocks=1', '--cres=1', '--attn-resolutions=4']


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = build_network('FlowPrecond', img_resolution=8, img_channels=3, label_dim=2, model_channels=16,
                        channel_mult=[1], num_blocks=1, attn_resolutions=[4]).eval()
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return net.requires_grad_(False)


def velocity(net, x_t, t, labels=None):
    """v(x_t, t) of the model inside, t [N,1,1,1]."""
    labels = torch.zeros(len(x_t), 2) if labels is None else labels
    return net.model(x_t.float(), (t / (1 - t)).log().flatten().float() / 4, class_labels=labels)


def test_the_denoiser_is_the_velocity_in_other_terms(net):
    x_0, z = torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([0.01, 0.3, 0.7, 0.99]).reshape(-1, 1, 1, 1)
    labels = torch.eye(2)[[0, 1, 0, 1]]
    x_t = (1 - t) * x_0 + t * z
    denoised = net(x_0 + t / (1 - t) * z, (t / (1 - t)).flatten(), labels)
    torch.testing.assert_close(denoised, x_t - t * velocity(net, x_t, t, labels), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_squared_error_of_the_velocity(net):
    class Draws:
        """The time 0.25 for all, then the noise z."""

        def __init__(self, z):
            self.z = z

        def rand(self, shape):
            return torch.full(shape, (0.25 - 1e-3) / (1 - 2e-3))

        def randn(self, shape):
            return self.z

    x_0, z = torch.randn(2, 5, 3, 8, 8)
    t = torch.full([5, 1, 1, 1], 0.25)
    batch = {'images': x_0, 'labels': None, 'random': Draws(z)}
    loss, terms = FlowLoss()(net, batch)
    wanted = (velocity(net, (1 - t) * x_0 + t * z, t) - (z - x_0)).square()
    torch.testing.assert_close(loss, wanted.flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms['loss'], wanted.flatten(1).mean(1), rtol=1e-4, atol=1e-4)


def test_time_is_uniform():
    sigma = FlowLoss().noise_levels(GlobalRandom('cpu'), 20_000).flatten()
    t = (sigma / (1 + sigma)).sort().values
    torch.testing.assert_close(t, torch.linspace(1e-3, 1 - 1e-3, len(t)), rtol=0, atol=0.02)


@pytest.mark.parametrize('solver, calls', [('euler', 6), ('heun', 11)])
def test_samplers_follow_the_straight_path(net, solver, calls):
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    seen = []

    def v(x, t):
        seen.append(float(t))
        return velocity(net, x, torch.full([len(x), 1, 1, 1], t, dtype=torch.float64)).double()

    N, start = 6, 1 - 1e-3
    times = [start * (1 - i / N) for i in range(N + 1)]
    x = z * start                                   # of x_t only its noise is known
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        h = t_next - t
        slope = v(x, t)
        if solver == 'heun' and t_next > 0:
            slope = (slope + v(x + h * slope, t_next)) / 2
        x = x + h * slope
    assert len(seen) == calls
    torch.testing.assert_close(sample(net, z, name='flow', num_steps=N, solver=solver), x,
                               rtol=1e-4, atol=1e-4)


def test_the_exact_velocity_of_a_gaussian_gives_its_spread():
    class Gaussian:
        """D(x; sigma) for data N(0.2, 0.5^2)."""

        img_channels, sigma_max = 3, 999

        def __call__(self, x, sigma, labels=None):
            return 0.2 + 0.25 / (0.25 + sigma**2) * (x - 0.2)

    torch.manual_seed(0)
    images = sample(Gaussian(), torch.randn(4000, 1, 2, 2), name='flow', num_steps=64)
    assert images.mean() == pytest.approx(0.2, abs=0.02)
    assert images.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_train_sample_measure_and_export(tmp_path):
    data = write_digits(tmp_path / 'digits.zip', 24)
    run('train.py', f'--outdir={tmp_path}/run', f'--data={data}', '--nosubdir', *SMALL, '--batch=16',
        '--duration=0.004', '--duration-rule=fixed', '--rampup=0', '--augment=0', '--tick=1', '--snap=2',
        '--dump=2', '--seed=0', '--lr=2e-3')
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'stats.jsonl').read_text().splitlines()]
    losses = [row['Loss/loss']['mean'] for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    net = tmp_path / 'run' / 'network-snapshot-0000004.pkl'
    assert load_snapshot(str(net)).sampler['name'] == 'flow'
    run('generate_images.py', f'--net={net}', f'--outdir={tmp_path}/heun', '--seeds=0-7', '--steps=8')
    run('generate_images.py', f'--net={net}', f'--outdir={tmp_path}/euler', '--seeds=0-7', '--steps=8',
        '--solver=euler')
    run('snapshot_tool.py', 'convert', net, f'--dest={tmp_path}/net.safetensors')
    run('generate_images.py', f'--net={tmp_path}/net.safetensors', f'--outdir={tmp_path}/again',
        '--seeds=0-7', '--steps=8')
    images = {name: [path.read_bytes() for path in sorted((tmp_path / name).glob('*.png'))]
              for name in ('heun', 'euler', 'again')}
    assert images['heun'] == images['again'] != images['euler']
    assert len(images['euler']) == 8
    run('calculate_metrics.py', 'gen', f'--net={net}', f'--ref={data}', '--metrics=fd_pixels',
        '--seeds=0-15', '--steps=4', f'--dest={tmp_path}/fd.json')
    assert np.isfinite(json.loads((tmp_path / 'fd.json').read_text())['results']['fd_pixels'])
    output = run('mem_ratio.py', '--help').stdout
    assert '--solver' in output
    run('calculate_metrics.py', 'memorization', f'--net={net}', f'--data={data}', '--seeds=0-15',
        '--steps=4', f'--dest={tmp_path}/memorization.json')
    assert 'ratio' in (tmp_path / 'memorization.json').read_text()
