"""What is claimed of a GPU: the numbers of the CPU, nothing in a step that waits for it, runs that go on.

    python -m pytest -m gpu tests

Without a GPU, what needs none is tried on the CPU; the rest is skipped.
"""

import contextlib
import copy
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from helpers import fails, run, write_digits
from tiny import save_tiny_vae

from metrics.frechet import frechet_distance
from metrics.inception import InceptionV3
from metrics.memorization import nearest_neighbors
from metrics.precision_recall import precision_recall
from torch_utils import distributed
from torch_utils.random import GlobalRandom
from training.data.batches import DatasetBatches
from training.data.dataset import ImageDataset
from training.diffusion.losses import DDPMLoss, EDM2Loss, EDMLoss, FlowLoss, VELoss
from training.encoders import make_encoder
from training.generate import generate_images
from training.loop import Trainer
from training.networks import build_network
from training.recipe import Recipe, fit
from training.snapshot import load_snapshot

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda' if GPU else 'cpu')
needs_gpu = pytest.mark.skipif(not GPU, reason='needs a GPU')
TRAIN = ['--preset=digits', '--rampup=0.0001', '--channels=16', '--batch=32', '--status=64', '--snapshot=0', '--checkpoint=192']

U_NET = dict(img_resolution=8, img_channels=3, label_dim=10)
EDM = U_NET | dict(model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
DISCRETE = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,2', attention_resolutions='4',
                learn_sigma=True)
NETWORKS = {
    'edm2': ('Precond', U_NET | dict(model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
                                     channels_per_head=32)),
    'ddpmpp': ('EDMPrecond', EDM | dict(model_type='SongUNet')),
    'ncsnpp': ('VEPrecond', EDM | dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual',
                                       decoder_type='standard', channel_mult_noise=2, resample_filter=[1, 3, 3, 1])),
    'dhariwal': ('EDMPrecond', EDM | dict(model_type='DhariwalUNet')),
    'flow': ('FlowPrecond', EDM | dict(model_type='SongUNet')),
    'adm': ('DiscreteDenoiser', dict(diffusion={}, network=DISCRETE | dict(class_name='ADMUNet'))),
}
# Relative error of gradients and samples against float32 on the CPU: rounding of each precision, through some layers.
PRECISIONS = {'fp32': 1e-4, 'tf32': 2e-2, 'fp16': 3e-2, 'bf16': 0.15}


def network(name, precision='fp32', device=DEVICE):
    """A network whose outputs are not all zero, with the same weights whatever the precision and the device."""
    class_name, kwargs = NETWORKS[name]
    precision = 'fp32' if precision == 'tf32' else precision
    inner = dict(network=kwargs['network'] | dict(precision=precision)) if 'network' in kwargs else dict(precision=precision)
    torch.manual_seed(0)
    net = build_network(class_name, **kwargs | inner)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() and not parameter.any():
                parameter.normal_(0, 0.1)
            if parameter.ndim == 0:
                parameter.fill_(0.7)                            # gains of EDM2
    return net.to(device)


class HostRandom(GlobalRandom):
    """The same numbers on every device."""

    def __init__(self, device):
        super().__init__(device)
        self.generator = torch.Generator().manual_seed(1)

    def _draw(self, function, size, dim, device, **options):
        return function(list(size), generator=self.generator, device='cpu', **options).to(device or self.device)


def loss_of(name, net):
    losses = {'edm2': EDM2Loss, 'flow': FlowLoss, 'ncsnpp': VELoss}
    return DDPMLoss(net.diffusion) if name == 'adm' else losses.get(name, EDMLoss)()


def relative(a, b):
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def matrix_products(precision):
    distributed.set_tf32(precision == 'tf32')
    yield
    distributed.set_tf32(False)


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_and_samples_are_those_of_the_cpu(name, precision, digits):
    if not GPU and precision in ('tf32', 'fp16'):
        pytest.skip('needs a GPU')
    results = []
    for device, kind in (('cpu', 'fp32'), (DEVICE, precision)):
        net = network(name, kind, device).eval()
        data = ImageDataset(digits)
        batches = DatasetBatches(data, make_encoder({'name': 'rgb'}), device)
        labels = net.label_dim > 0
        with matrix_products(kind):
            batch = next(batches.iterate([(0, 16)]))
            if not labels:
                batch['labels'] = None
            batch['random'] = HostRandom(device)
            loss, _ = loss_of(name, net)(net, batch)
            loss.mean().backward()
            gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            # Few steps, without a chaotic end: random weights double what is rounded in each.
            sampler = dict(name='ddim', num_steps=4) if name == 'adm' else dict(name='edm', num_steps=4)
            images = torch.cat([torch.as_tensor(part.images).float() for part in generate_images(
                net, make_encoder({'name': 'rgb'}), range(4), sampler=sampler,
                labels=list(range(4)) if labels else None)])
        results.append((loss, gradients, images))
    (loss, gradients, images), (loss_gpu, gradients_gpu, images_gpu) = results
    tolerance = PRECISIONS[precision]
    assert relative(loss_gpu, loss) < tolerance
    assert relative(gradients_gpu, gradients) < tolerance
    assert relative(images_gpu, images) < max(tolerance, 5e-3)  # they are whole numbers


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('gpu') / 'digits.zip')


def trainer(name, digits, folder, precision='fp32', steps=8, **fields):
    net = network(name, precision).train()
    batches = DatasetBatches(ImageDataset(digits), make_encoder({'name': 'rgb'}), DEVICE)
    recipe = Recipe(batch=16, total_nimg=16 * steps, **fields)
    return Trainer(recipe, net, loss_of(name, net), batches, str(folder))


@needs_gpu
@pytest.mark.parametrize('name', NETWORKS)
def test_nothing_in_a_step_waits_for_the_gpu(name, digits, tmp_path):
    made = trainer(name, digits, tmp_path, 'fp16', 8, clip_grad_norm=1.0)
    made.model = made._wrap()
    steps = made.batches.iterate(made._plan())
    for _ in range(3):
        made._step(steps)                                       # chooses algorithms, fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            made._step(steps)
    finally:
        torch.cuda.set_sync_debug_mode('default')
        steps.close()


@needs_gpu
def test_sampling_does_not_wait_for_the_gpu_either():
    net = network('edm2', 'fp16').eval().requires_grad_(False)
    encoder = make_encoder({'name': 'rgb'})
    encoder.decode = lambda latents: latents

    def waits(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            list(generate_images(net, encoder, range(4), sampler=dict(name='edm2', num_steps=steps)))
        return sum(event.count for event in seen.key_averages() if event.key == 'cudaStreamSynchronize')
    waits(2)
    assert waits(4) == waits(12)                                # none in a step


def losses(folder):
    return [row['Loss/loss']['mean'] for row in map(json.loads, (folder / 'stats.jsonl').read_text().splitlines())]


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'bf16'])
def test_a_run_goes_on(precision, digits, tmp_path):
    """A run that is killed after half of its images has the losses of one that is not."""
    if not GPU and precision == 'fp16':
        pytest.skip('needs a GPU')
    options = [f'--data={digits}', *TRAIN, f'--precision={precision}']
    environment = dict(CUDA_VISIBLE_DEVICES=os.environ.get('CUDA_VISIBLE_DEVICES', '0' if GPU else ''))
    for folder, durations in (('whole', [384]), ('halves', [192, 384])):
        for duration in durations:
            run('train_edm2.py', f'--outdir={tmp_path / folder}', *options, f'--duration={duration}', **environment)
    rows, halves = losses(tmp_path / 'whole'), losses(tmp_path / 'halves')
    assert len(rows) == len(halves) == 6
    np.testing.assert_allclose(halves, rows, rtol=1e-3 if precision == 'fp32' else 2e-2)
    record = json.loads((tmp_path / 'whole' / 'training_options.json').read_text())
    assert (record['starts'][0]['device'] == 'cpu') != GPU


def test_resuming_is_exact_with_deterministic_algorithms(digits, tmp_path, monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    try:
        weights = []
        for folder, durations in (('whole', [6]), ('halves', [3, 6])):
            for steps in durations:
                made = trainer('ddpmpp', digits, tmp_path)
                fit(Recipe(batch=16, total_nimg=16 * steps, checkpoint=16, bench=False), str(tmp_path / folder), made.net,
                    made.loss, made.batches)
            weights.append(torch.cat([p.detach().flatten() for p in made.net.parameters()]))
        assert torch.equal(*weights)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.slow
def test_two_processes_share_one_gpu(digits, tmp_path):
    environment = dict(CUDA_VISIBLE_DEVICES='0')
    options = [f'--data={digits}', *TRAIN, '--precision=fp32', '--duration=256']
    run('train_edm2.py', f'--outdir={tmp_path}/one', *options, **environment)
    run('train_edm2.py', f'--outdir={tmp_path}/two', *options, processes=2, **environment)
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-3)


@needs_gpu
def test_overflow_lowers_the_scale_and_training_goes_on(digits, tmp_path):
    made = trainer('adm', digits, tmp_path, 'fp16', 40, loss_scale={'lg': 40.0, 'growth': 0.001})
    made.model = made._wrap()
    steps = made.batches.iterate(made._plan())
    before = [p.detach().clone() for p in made.net.parameters()]
    for _ in range(40):
        made._step(steps)
    steps.close()
    assert 5 < made.loss_scale.lg < 39                          # it fell, and stopped falling
    after = list(made.net.parameters())
    assert all(p.isfinite().all() for p in after) and any((a != b).any() for a, b in zip(after, before, strict=True))


def test_out_of_memory_is_one_line_that_names_the_option(digits, tmp_path, monkeypatch):
    if not GPU:
        def full(*_):
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
        monkeypatch.setattr(Trainer, '_step', full)
        error = fails('train_edm2.py', f'--outdir={tmp_path}/run', f'--data={digits}', *TRAIN, '--duration=64')
    else:
        torch.cuda.set_per_process_memory_fraction(0.002)
        torch.cuda.empty_cache()
        try:
            error = fails('train_edm2.py', f'--outdir={tmp_path}/run', f'--data={digits}', '--preset=digits', '--channels=256',
                          '--batch=8Ki', '--duration=8Ki')
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    assert '--batch-gpu' in error and 'memory' in error


# --- Metrics, autoencoder, files --------------------------------------------------------------------------------------


@needs_gpu
def test_measures_are_those_of_the_cpu():
    torch.manual_seed(0)
    net = InceptionV3().eval().requires_grad_(False)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with distributed.exact_float32():
        expected = net(images)['pool3']
        actual = copy.deepcopy(net).to(DEVICE)(images.to(DEVICE))['pool3']
    assert relative(actual, expected) < 1e-4
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((200, 32)) for _ in range(2))
    moments = [(x.mean(0), np.cov(x.T)) for x in (a, b)]
    arguments = [part for pair in moments for part in pair]
    assert abs(frechet_distance(*arguments, DEVICE) / frechet_distance(*arguments) - 1) < 1e-9
    queries, points = (generator.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8) for n in (20, 300))
    found, wanted = (nearest_neighbors(queries, [points], device=device) for device in (DEVICE, 'cpu'))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-14)  # whole numbers, but for their roots
    assert np.array_equal(found[1], wanted[1])
    features = [torch.from_numpy(x).float() for x in (a, b)]
    assert precision_recall(*(x.to(DEVICE) for x in features)) == precision_recall(*features)


@needs_gpu
def test_the_autoencoder_is_that_of_the_cpu(tmp_path):
    encoder = {'name': 'sd-vae', 'vae_name': save_tiny_vae(tmp_path / 'vae')}
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    moments = [make_encoder(encoder).encode_pixels(pixels.to(device)) for device in ('cpu', DEVICE)]
    assert relative(moments[1], moments[0]) < 1e-2
    latents = torch.randn(2, 4, 4, 4)
    decoded = [make_encoder(encoder).decode(latents.to(device)).float() for device in ('cpu', DEVICE)]
    assert relative(decoded[1], decoded[0]) < 2e-2


@pytest.mark.slow
def test_what_a_gpu_trains_is_sampled_measured_and_exported(digits, tmp_path):
    environment = dict(CUDA_VISIBLE_DEVICES=os.environ.get('CUDA_VISIBLE_DEVICES', '0' if GPU else ''))
    run('train_edm2.py', f'--outdir={tmp_path}/run', f'--data={digits}', *TRAIN, '--duration=64', '--snapshot=64',
        **environment)
    net, = pathlib.Path(tmp_path / 'run').glob('*-0.100.pkl')
    images = {}
    for where, visible in (('gpu', environment), ('cpu', dict(CUDA_VISIBLE_DEVICES=''))):
        run('generate_images.py', f'--net={net}', f'--outdir={tmp_path}/{where}', '--seeds=0-3', '--steps=4', '--precision=fp32',
            **visible)
        images[where] = ImageDataset(f'{tmp_path}/{where}').images(range(4)).astype(int)
    assert abs(images['gpu'] - images['cpu']).max() <= 2
    run('snapshot_tool.py', 'convert', net, f'--dest={tmp_path}/export', **environment)
    exported = load_snapshot(f'{tmp_path}/export', DEVICE).net.state_dict()
    for name, value in load_snapshot(str(net), DEVICE).net.state_dict().items():
        assert torch.equal(exported[name], value) and value.device.type == DEVICE.type
    run('calculate_metrics.py', 'gen', f'--net={net}', '--seeds=0-9', '--steps=2', f'--ref={digits}', '--metrics=fd_pixels',
        **environment)
