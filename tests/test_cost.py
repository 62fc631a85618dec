"""What a dry run says of a run's cost, against real numbers; the presets for photographs; the options of train_edm2.py."""

import ctypes
import gc
import json
import os
import re

import pytest
import torch
from helpers import ROOT, fails, invoke, write_digits

import train_edm2
from dnnlib import UserError
from torch_utils.random import GlobalRandom
from training import presets, recipe
from training.checkpoint import Checkpoints
from training.diffusion.augment import EDM_MULTIPLIERS, AugmentPipe
from training.diffusion.losses import EDM2Loss, EDMLoss
from training.flops import size_of, training_step
from training.networks import build_network
from training.snapshot import list_snapshots, load_snapshot

TINY = ['train_edm2.py', '--preset=digits', '--channels=8', '--batch=16', '--duration=320', '--snapshot=160', '--checkpoint=160']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits.zip')


@pytest.fixture
def train(tmp_path, digits, monkeypatch):
    """(options) -> what train_edm2.py prints, in a folder of the test."""
    monkeypatch.setattr(recipe, 'save_sample_grid', lambda *_, **__: None)
    return lambda *options: invoke(*TINY, f'--outdir={tmp_path}/run', f'--data={digits}', *options)


def settings(out: str) -> dict:
    return json.loads(out[out.index('{'):])


def zeros(resolution: int, channels: int = 3, label_dim: int = 0):
    """Batches of zeros, as `example` of those of training."""
    return lambda count, device: {
        'images': torch.zeros(count, channels, resolution, resolution, device=device),
        'labels': torch.zeros(count, label_dim, device=device), 'random': GlobalRandom(device)}


# --- Cost -------------------------------------------------------------------------------------------------------------


def test_products_and_bytes_of_a_step_by_hand():
    """Two layers of 16 and 32 weights: 48 products of an image, and in the backward pass 48 for the weights, 32 for what
    is between them."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 8, bias=False))
    step = training_step(net, lambda net, batch: (net(batch).sum(1), {}), lambda n, device: torch.zeros(n, 4, device=device), 10)
    assert (step['forward'], step['step']) == (48, 48 + 48 + 32)
    # At most, in float32: 40 numbers of the batch, 40 between the layers, 80 behind them, 10 losses; the gradients come later.
    assert step['activations'] + 4 * 48 == 4 * (40 + 40 + 80 + 10)
    assert next(net.parameters()).is_meta


def _of_process(name: str) -> int:
    with open('/proc/self/status') as file:
        return int(re.search(name + r':\s+(\d+)', file.read())[1]) << 10


@pytest.mark.parametrize('name, loss', [('Precond', EDM2Loss()), ('EDMPrecond', EDMLoss())])
def test_memory_is_that_of_a_real_step_within_a_factor_of_two(name, loss):
    net = build_network(name, img_resolution=16, img_channels=3, label_dim=0, model_channels=32, channel_mult=[1, 2],
                        num_blocks=1, attn_resolutions=[8], precision='fp32').train()

    def step(count):
        losses, _ = loss(net, zeros(16)(count, 'cpu') | {'labels': None})
        losses.sum().backward()

    step(2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open('/proc/self/clear_refs', 'w') as file:                     # the peak counts anew
        file.write('5')
    before = _of_process('VmRSS')
    step(64)
    measured = _of_process('VmHWM') - before
    assert 0.5 < measured / training_step(net, loss, zeros(16), 64)['activations'] < 2


def test_a_dry_run_agrees_with_the_run(train, tmp_path):
    cost = settings(train('-n', '--batch-gpu=8', '--augment=0.5'))['cost']
    assert not (tmp_path / 'run').exists()
    train('--augment=0.5')
    net = load_snapshot(list_snapshots(str(tmp_path / 'run'))[0].path).net
    assert cost['parameters'] == sum(p.numel() for p in net.parameters())
    assert (cost['steps'], cost['epochs'], cost['images_at_a_time']) == (20, 1.6, 8)
    state = Checkpoints(str(tmp_path / 'run')).load_newest()
    memory = {name: value * 2**30 for name, value in cost['memory_gib'].items()}
    assert memory['weights'] == pytest.approx(size_of(state['net'].values()), rel=1e-3)
    assert memory['averages'] == pytest.approx(sum(size_of(ema.values()) for ema in state['ema'].values()), rel=1e-3)
    assert memory['gradients'] == memory['optimizer'] / 2 < memory['activations'] < memory['total']
    assert 2.5 < cost['gflop_of_an_image']['step'] / cost['gflop_of_an_image']['forward'] < 3.1


def test_bench_steps_say_how_long_it_takes_and_write_nothing(train, tmp_path):
    cost = settings(train('-n', '--bench-steps=2'))['cost']
    assert cost['images_per_sec'] == pytest.approx(16 / cost['seconds_of_a_step'])
    assert cost['hours'] == pytest.approx(20 * cost['seconds_of_a_step'] / 3600)
    assert os.listdir(tmp_path) == [] and cost['memory_gib']['activations'] > 0


def test_a_large_network_is_never_made(digits, tmp_path, monkeypatch):
    """One of 1.4 billion parameters: not one number of it is drawn."""
    monkeypatch.setattr(torch.nn.Module, 'to', lambda net, device: net if str(device) == 'meta' else pytest.fail(str(device)))
    out = invoke('train_edm2.py', f'--outdir={tmp_path}/x', f'--data={digits}', '--preset=edm2-img512-xxl', '-n', '--batch=8')
    cost = settings(out)['cost']
    assert cost['parameters'] > 1.3e9 and cost['memory_gib']['total'] > 6 * 4 * 1.3e9 / 2**30


def test_the_teachers_steps_count():
    from distillation import runs
    from distillation.cache import Cache
    from distillation.configs import read_network
    from distillation.dkdm import DynamicSource, Teacher
    from training.diffusion.losses import DKDMLoss
    arguments = read_network('yaml/digits_8/teacher.yaml').arguments()
    with torch.device('meta'):
        student = build_network(**arguments)
    teacher = Teacher(build_network(**arguments))
    source = DynamicSource(teacher, Cache(torch.zeros(8, 3, 8, 8), torch.ones(8, dtype=torch.int64)), 4,
                           runs.process_random(0, runs.TRAINING))
    rules = recipe.Recipe(batch=4, total_nimg=8, averages={'name': 'constant', 'rates': [0.9]})
    cost = recipe.cost(rules, student, DKDMLoss(student.diffusion, teacher), source)
    assert cost['memory_gib']['teacher'] == cost['memory_gib']['weights']
    steps = cost['gflop_of_an_image']
    assert 3.5 < steps['step'] / (steps['forward'] / 2) < 4.1           # forward of both, backward of one
    assert cost['epochs'] is None
    teacher.net, teacher.guide = build_network(**arguments), build_network(**arguments)
    guided = recipe.cost(rules, student, DKDMLoss(student.diffusion, teacher), source)
    assert guided['memory_gib']['teacher'] == pytest.approx(2 * cost['memory_gib']['teacher'], rel=1e-3)


# --- Presets and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('preset', presets.COSTS)
def test_the_table_of_photographs_is_what_a_dry_run_calculates(preset):
    parameters, gflop, fixed, each = presets.COSTS[preset]
    arguments = presets.network_of(preset)
    with torch.device('meta'):
        net = build_network(**arguments | {'precision': 'fp16'})
    augment = None
    if arguments.get('augment_dim'):
        augment = AugmentPipe(p=presets.PRESETS[preset]['augment'], **EDM_MULTIPLIERS)
        assert augment.label_dim == presets.EDM_LABELS
    example = zeros(arguments['img_resolution'], arguments['img_channels'])
    count = presets.PRESETS[preset]['batch']
    step = training_step(net, EDM2Loss(augment=augment), example, count)
    assert parameters == round(sum(p.numel() for p in net.parameters()) / 1e6, 1)
    assert gflop == pytest.approx(step['step'] / 1e9, rel=0.01)
    assert fixed == pytest.approx(6 * size_of(net.parameters()) / 2**30, rel=0.01)
    assert each == pytest.approx(step['activations'] / count / 2**20, rel=0.01)


def test_the_table_is_in_the_page_and_in_the_help():
    table = '\n'.join(presets.photos_table())
    assert table in (ROOT / 'docs/training.md').read_text()
    out = invoke('train_edm2.py', '--preset=help')
    assert table in out and all(f'{preset} ' in out for preset in presets.PRESETS)


@pytest.mark.parametrize('preset', presets.PRESETS)
def test_the_ramp_up_of_a_whole_run_is_that_of_the_preset(preset):
    settings = presets.PRESETS[preset]
    whole = settings['rampup_Mimg']
    assert presets.rampup(preset, settings['duration']) == presets.rampup(preset, 3 * settings['duration']) == whole
    short = presets.rampup(preset, settings['duration'] // 1024)
    assert 0.05 <= short * 1e6 / (settings['duration'] // 1024) < max(0.051, 1.01e6 * whole / settings['duration'])


def test_a_run_keeps_the_ramp_up_that_it_began_with(train, tmp_path):
    """Also one of an earlier version, whose ramp-up was the preset's whatever the duration, when it becomes longer."""
    def recorded():
        options = json.loads((tmp_path / 'run/training_options.json').read_text())
        return options['learning_rate']['rampup_Mimg']

    assert '27% of this run' in train()
    short = recorded()
    assert short == presets.rampup('digits', 320) < 0.02
    train('--duration=480')
    assert recorded() == short
    path = f'--outdir={tmp_path}/old'
    out = train(path, '--rampup=0.02')
    assert 'ends at 2%' in out                                          # 320 of 20,000 images
    assert 'ends at 2%' in train(path, '--duration=480')
    assert '--rampup' in fails(*TINY, path, f'--data={tmp_path}/../x', '--rampup=-1')


def test_attention_that_there_is_none_of_is_noted(train):
    assert 'no block of the encoder has attention: --attn-resolutions=3' in train('-n', '--attn-resolutions=3', '--channels=32')
    assert 'no block' not in train('-n', '--attn-resolutions=8', '--channels=32')


def test_another_ramp_up_is_refused(train, tmp_path, digits):
    train()
    assert '--rampup' in fails(*TINY, f'--outdir={tmp_path}/run', f'--data={digits}', '--duration=480', '--rampup=1')


def test_shape_and_data_options_of_edm2(train, tmp_path):
    out = train('--num-blocks=2', '--channel-mult=1,3', '--attn-resolutions=8', '--ema-stds=0.06,0.2', '--xflip=1',
                '--augment=0.3', '--rampup=0.0001')
    assert 'rises' not in out
    record = json.loads((tmp_path / 'run/training_options.json').read_text())
    assert record['network'] | dict(num_blocks=2, channel_mult=[1, 3], attn_resolutions=[8], augment_dim=9) == record['network']
    assert (record['dataset']['size'], record['dataset']['xflip'], record['loss']['augment']) == (400, True, 0.3)
    assert record['learning_rate']['rampup_Mimg'] == 0.0001
    assert {file.average for file in list_snapshots(str(tmp_path / 'run'))} == {'0.060', '0.200'}


def test_augmentation_labels_change_nothing_at_first():
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=0, model_channels=32, channel_mult=[1, 2],
                        num_blocks=1, attn_resolutions=[], augment_dim=9).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith('_gain') and 'augment' not in name:
                value.fill_(1)
    x, labels = torch.randn(4, 3, 8, 8), torch.rand(4, 9)
    plain = net(x, torch.ones(4))
    told = net(x, torch.ones(4), augment_labels=labels)
    assert torch.equal(told, plain)
    told.square().sum().backward()
    assert net.unet.augment_gain.grad.abs() > 0
    with torch.no_grad():
        net.unet.augment_gain.fill_(1)
    assert not torch.allclose(net(x, torch.ones(4), augment_labels=labels), plain)
    assert torch.equal(net(x, torch.ones(4), augment_labels=torch.zeros(4, 9)), plain)


def test_latents_are_not_augmented(monkeypatch, digits):
    class Encoder:
        name = 'sd-vae'

    monkeypatch.setattr(train_edm2.recipe, 'open_data', lambda *_, **__: (None, Encoder(), {}))
    with pytest.raises(UserError, match='latents') as caught:
        train_edm2.prepare(train_edm2.settings(['--outdir=x', f'--data={digits}', '--augment=0.1']), 'x')
    assert caught.value.field == 'augment'
