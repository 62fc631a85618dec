"""A training that has diverged says so and ends with status 3; weights that are not finite are neither written nor used."""

import functools
import json
import re

import click.testing
import helpers
import numpy as np
import pytest
import torch
from helpers import invoke, run, script_module

from dnnlib import UserError
from synthetic_data.mixture import GeneratedImages, Mixture
from torch_utils.files.own import read_own
from training.data.batches import DatasetBatches
from training.data.dataset import ImageDataset
from training.encoders import RGBEncoder
from training.health import Diverged
from training.loop import Output
from training.recipe import Recipe, fit

EDM2 = ['train_edm2.py', '--preset=digits', '--channels=8', '--batch=64', '--status=1024', '--snapshot=4096',
        '--checkpoint=1024', '--duration=4096', '--decay=0']
DISTILLED = 'distillation/yaml/cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml'
TINY = ['model.image_size=8', 'model.num_channels=32', 'model.num_res_blocks=1', 'model.channel_mult=1',
        'model.attention_resolutions=4', 'diffusion.diffusion_steps=10', 'diffusion.timestep_respacing=10']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return helpers.write_digits(tmp_path_factory.mktemp('data') / 'digits.zip', 100)


@pytest.fixture(scope='module')
def teacher(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    invoke('distillation/scripts/image_train.py', f'--data_dir={digits}', f'--config={helpers.ROOT / DISTILLED}',
           f'--outdir={folder}', 'student.total_steps=1', 'student.batch_size=8', *(f'student.{item}' for item in TINY))
    return folder / 'model000001.pt'


def command(trainer, data, teacher) -> list:
    """A short training by one of the five trainers, which diverges."""
    if trainer == 'edm2':
        return [*EDM2, f'--data={data}', '--lr=1e38']
    if trainer == 'edm':
        return ['train.py', f'--data={data}', '--nosubdir', '--duration=0.001', '--duration-rule=fixed', '--rampup=0',
                '--batch=16', '--num-channels=8', '--num-blocks=1', '--cres=1,2', '--augment=0', '--tick=0.5', '--snap=1',
                '--dump=1', '--seed=3', '--lr=1e3']
    if trainer == 'classifier':
        return ['synthetic_data/train_classifier.py', f'--data={data}', '--model=wrn-10-1', '--duration=640', '--batch=32',
                '--status=128', '--checkpoint=128', '--snapshot=128', '--xflip=False', '--lr=1e10']
    if trainer == 'long_tail':
        return ['long_tail/main.py', '--train', '--data_type=digitslt', '--imb_factor=0.05', '--img_size=8', '--conditional',
                '--ch=32', '--ch_mult=2', '--ch_mult=2', '--attn=', '--num_res_blocks=0', '--T=8', '--warmup=0', '--lr=1e30',
                '--num_workers=1', '--log_step=4', '--batch_size=8', '--save_step=2', '--sample_step=2', '--total_steps=12']
    values = ['lr=1e3', 'lr_anneal_steps=0', 'batch_size=8', 'total_steps=12', 'save_interval=4', 'log_interval=4']
    config = f'--config={helpers.ROOT / DISTILLED}'
    if trainer == 'image_train':
        return ['distillation/scripts/image_train.py', f'--data_dir={data}', config,
                *(f'student.{item}' for item in [*TINY, *values])]
    return ['distillation/scripts/image_kd.py', config, f'teacher.model_path={teacher}',
            'teacher.iter_choice=iterative_distillation', *(f'teacher.{item}' for item in TINY),
            *(f'student.{item}' for item in [*TINY, *values])]


TRAINERS = ['edm2', 'edm', 'classifier', 'long_tail', 'image_train', 'image_kd']


def diverges(script, *args) -> str:
    """Runs a script that must end with status 3 and one line of error; returns that and what it prints."""
    result = click.testing.CliRunner().invoke(script_module(script).main, list(map(str, args)))
    assert isinstance(result.exception, SystemExit), f'{script} raised {result.exception!r}'
    assert result.exit_code == 3, result.output
    line, = result.stderr.splitlines()
    assert line.startswith('Error: ') and 'diverged' in line
    return line + result.stdout


def non_finite(path) -> int:
    """Values that are not finite in the weights and averages of a file."""
    def values(part):
        if torch.is_tensor(part):
            yield part
        elif isinstance(part, dict):
            for inner in part.values():
                yield from values(inner)
    content = read_own(str(path))
    weights = [content.get(key, {}) for key in ('net', 'ema', 'state', 'net_model', 'ema_model')] or [content]
    return sum(int((~value.isfinite()).sum()) for part in weights for value in values(part))


@pytest.mark.parametrize('trainer', TRAINERS)
def test_every_trainer_notices(trainer, digits, teacher, tmp_path):
    """At the end of its run, though it is shorter than the patience; and nothing that is not finite is written."""
    place = '--logdir' if trainer == 'long_tail' else '--outdir'
    output = diverges(*command(trainer, digits, teacher), f'{place}={tmp_path}')
    assert 'loss nan' in output
    warning = re.search(r'Warning: in the step after \d+ images the loss of \d+ of \d+ is not finite(: .*)?', output)
    assert bool(warning[1]) == (trainer != 'image_kd')          # which has no files
    assert '.png' in output or trainer in ('image_kd', 'long_tail')
    assert 'diverged' in (tmp_path / 'log.txt').read_text()
    row = json.loads((tmp_path / 'stats.jsonl').read_text().splitlines()[-1])
    assert row['Health/nonfinite_losses']['mean'] > 0
    for path in [*tmp_path.glob('*.pkl'), *tmp_path.glob('*.pt')]:
        assert non_finite(path) == 0, path


@pytest.mark.parametrize('trainer', TRAINERS)
def test_every_trainer_has_its_patience(trainer, digits, teacher, tmp_path):
    place, patience = ('--logdir', '--nan_patience') if trainer == 'long_tail' else ('--outdir', '--nan-patience')
    output = diverges(*command(trainer, digits, teacher), f'{place}={tmp_path}', f'{patience}=2')
    percent = float(re.findall(r'([\d.]+)%', output)[-1])
    assert percent < 100
    invoke(*command(trainer, digits, teacher), f'{place}={tmp_path / "never"}', f'{patience}=0')
    assert 'not finite' in (tmp_path / 'never' / 'log.txt').read_text()


# --- The loop -----------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """One weight of each tensor."""

    class_name = 'Line'
    init_kwargs = {}

    def __init__(self, tensors: int = 1):
        super().__init__()
        self.w = torch.nn.ParameterList(torch.ones(1) for _ in range(tensors))


class Faults:
    """Batches of numbers that the loss is multiplied by: of image i, faults.get(i, 1). They end at an empty list."""

    def __init__(self, **faults):
        self.faults = {int(key.removeprefix('at')): value for key, value in faults.items()}

    def iterate(self, plan):
        for start, count in plan:
            factors = [self.faults.get(i, 1.0) for i in range(start, start + count)]
            if [] in factors:
                raise IndexError
            yield torch.tensor(factors)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def train(folder, batches, total=32, tensors=1, loss=None, **fields):
    """Trains by four images a step; returns what its statistics say of its health, by nimg."""
    def product(net, factors):
        values = sum(w for w in net.w) * factors
        return values, {'loss': values}

    rules = Recipe(**dict(batch=4, total_nimg=total, status=8, learning_rate={'name': 'constant', 'lr': 1e-3}) | fields)
    fit(rules, str(folder), Line(tensors), loss or product, batches)
    rows = map(json.loads, (folder / 'stats.jsonl').read_text().splitlines())
    return {row['nimg']: {name.removeprefix('Health/'): row[name]['mean'] for name in row if name.startswith('Health/')}
            for row in rows}


def test_a_sound_run_says_nothing(tmp_path):
    assert not any(train(tmp_path, Faults()).values())
    assert not re.search('nonfinite|Warning|streak', (tmp_path / 'log.txt').read_text())


@pytest.mark.parametrize('batch_gpu', [None, 2, 3])
def test_what_is_not_finite_is_counted(tmp_path, batch_gpu):
    """In the interval of its step, also where a step is several passes."""
    found = train(tmp_path, Faults(at13=torch.nan, at14=torch.inf, at17=torch.nan), batch_gpu=batch_gpu, tensors=3)
    assert found == {8: {}, 16: dict(nonfinite_losses=2, nonfinite_gradients=3, bad_streak=1),
                     24: dict(nonfinite_losses=1, nonfinite_gradients=3), 32: {}}
    log = (tmp_path / 'log.txt').read_text()
    assert log.count('Warning') == 1 and 'in the step after 12 images the loss of 2 of 4 is not finite\n' in log
    assert 'nonfinite_losses 2  nonfinite_gradients 3  bad_streak 1\n' in log


def test_a_resumed_run_reports_as_if_never_stopped(tmp_path):
    """What was counted before the checkpoint is in the next report."""
    with pytest.raises(IndexError):
        train(tmp_path, Faults(at5=torch.nan, at16=[]), status=32, checkpoint=4)
    found = train(tmp_path, Faults(), status=32, checkpoint=4)
    assert found[32] == dict(nonfinite_losses=1, nonfinite_gradients=1)


def test_some_bad_gradients_are_no_divergence(tmp_path):
    """A mask that makes NaN of 0 * infinity, in every step: they are repaired and counted, as ever."""
    def loss(net, factors):
        values = net.w[0] * factors + net.w[1] + (net.w[2] - 1).abs().sqrt() * 0
        return values, {'loss': values}

    found = train(tmp_path, Faults(), tensors=3, loss=loss, nan_patience=2)
    assert all(row == dict(nonfinite_gradients=2) for row in found.values()) and len(found) == 4


def test_a_run_without_gradients_ends(tmp_path):
    """Though its loss is finite."""
    def loss(net, factors):
        values = factors + (net.w[0] - 1).abs().sqrt()
        return values, {'loss': values}

    with pytest.raises(Diverged, match='last 4 steps are not finite after 16 images; there is no checkpoint'):
        train(tmp_path, Faults(), loss=loss, nan_patience=3)


def test_skipped_steps_are_counted_and_an_endless_row_ends_the_run(tmp_path):
    """A loss scale that starts too high is sound; gradients that overflow at any scale are not."""
    found = train(tmp_path, Faults(), loss_scale=dict(lg=130.0), nan_patience=4)
    assert found[8] == dict(skipped_steps=2, bad_streak=2) and found[16] == dict(skipped_steps=1)
    assert found[24] == dict(skipped_steps=0)                  # its curve has no gaps
    train(tmp_path / 'short', Faults(), 4, loss_scale=dict(lg=130.0))
    with pytest.raises(Diverged):
        train(tmp_path / 'endless', Faults(), 400, loss_scale=dict(lg=200.0), nan_patience=10)


@pytest.mark.parametrize('status', [None, 100_000])
def test_a_run_that_never_reports_is_looked_at(tmp_path, status, monkeypatch):
    monkeypatch.setattr('training.loop.LOOK_STEPS', 4)
    faults = Faults(**{f'at{i}': torch.nan for i in range(8, 400)})
    with pytest.raises(Diverged, match='after 32 images'):
        train(tmp_path, faults, 400, status=status, nan_patience=6)


def test_the_last_good_checkpoint_stays(tmp_path):
    """No checkpoint, snapshot or average that is not finite; a run that goes on begins with the good one."""
    faults = {f'at{i}': torch.nan for i in range(13, 400)}
    with pytest.raises(Diverged, match='training-state-0000000.pt is kept'):
        train(tmp_path, Faults(**faults), 400, checkpoint=4, snapshot=None, bad_gradients=None, nan_patience=5)
    log = (tmp_path / 'log.txt').read_text()
    assert 'Warning: no checkpoint of 16 images' in log
    assert read_own(str(tmp_path / 'training-state-0000000.pt'))['nimg'] == 12
    assert train(tmp_path, Faults(), 40, checkpoint=4, bad_gradients=None)[40] == {}


def test_a_bad_streak_removes_no_good_state(tmp_path):
    faults = Faults(**{f'at{step}500': torch.nan for step in range(3, 20)})
    with pytest.raises(Diverged):
        train(tmp_path, faults, 20_000, batch=1000, status=1000, checkpoint=1000, keep_checkpoints=1, nan_patience=3)
    assert [path.name for path in sorted(tmp_path.glob('*.pt'))][0] == 'training-state-0000003.pt'


def test_nothing_is_drawn_of_weights_that_are_not_finite(tmp_path, monkeypatch):
    drawn = []
    output = Output(4, lambda nimg, nets: drawn.append(nimg), lambda nimg: False)
    fitted = functools.partial(fit, outputs=[output])
    monkeypatch.setitem(globals(), 'fit', fitted)
    with pytest.raises(Diverged):
        train(tmp_path, Faults(at13=torch.nan), 400, bad_gradients=None, nan_patience=5)
    assert drawn == [4, 8, 12]


def test_the_warning_names_the_files(digits, tmp_path):
    """Those of the images with a bad loss, wherever the run is; the order goes on undisturbed."""
    dataset = ImageDataset(digits)
    batches = DatasetBatches(dataset, RGBEncoder(), 'cpu')
    expected = [dataset.where(i) for i in batches.order.indices([13, 14])]

    def loss(net, batch):
        first = batch['start']
        values = net.w[0] * torch.tensor([torch.nan if i in (13, 14, 30) else 1 for i in range(first, first + 4)])
        return values, {'loss': values}

    train(tmp_path, batches, loss=loss)
    assert f'the loss of 2 of 4 is not finite: {", ".join(expected)}\n' in (tmp_path / 'log.txt').read_text()


# --- Processes ----------------------------------------------------------------------------------


def test_two_processes_count_as_one(digits, tmp_path):
    """And end together, with one line."""
    train = [*EDM2, f'--data={digits}', '--lr=1e38', '--nan-patience=40']
    rows = []
    for processes in (None, 2):
        outdir = tmp_path / str(processes)
        result = run(*train, f'--outdir={outdir}', processes=processes, check=False)
        errors = [line for line in result.stderr.splitlines() if 'Error: ' in line and 'diverged' in line
                  and 'traceback : ' not in line]              # torchrun's summary ends with it
        assert len(errors) == 1 and errors[0].startswith('Error: '), result.stderr
        assert result.returncode == (1 if processes else 3)     # torchrun has a status of its own
        rows.append([{name: value for name, value in json.loads(line).items() if name.startswith('Health')}
                     for line in open(outdir / 'stats.jsonl')])
    assert rows[0] == rows[1] and rows[0][-1]['Health/nonfinite_losses']['mean'] == 1024
    assert len(re.findall(r'exitcode  : 3 ', result.stderr)) == 2, result.stderr


# --- Files with weights that are not finite -----------------------------------------------------


def poison(path, dest, key=None):
    """The file `path` with a NaN in its last weight of some size, at `dest`."""
    content = torch.load(path, weights_only=True)
    weights = content[key] if key else content
    name = [name for name, value in weights.items() if value.ndim > 1][-1]
    weights[name].view(-1)[-1] = torch.nan
    torch.save(content, dest)
    return name


@pytest.fixture(scope='module')
def bad(digits, teacher, tmp_path_factory):
    """A folder with good.pkl, guided.pt, classifier.pkl, and in a run and beside it what is poisoned of each."""
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'run').mkdir()
    invoke(*EDM2[:4], f'--data={digits}', f'--outdir={folder / "good"}', '--duration=128', '--snapshot=64')
    invoke('synthetic_data/train_classifier.py', f'--data={digits}', f'--outdir={folder / "c"}', '--model=wrn-10-1',
           '--duration=32', '--batch=32')
    good = sorted((folder / 'good').glob('*-0.100.pkl'))[-1]
    poison(good, folder / 'run' / 'network-snapshot-0000001-0.100.pkl', 'state')
    poison(good, folder / 'bad.pkl', 'state')
    poison(teacher, folder / 'bad.pt')
    poison(*(folder / 'c').glob('*.pkl'), folder / 'classifier.pkl', 'state')
    (folder / 'classes').mkdir()
    for label in range(10):
        np.save(folder / 'classes' / f'{label}.npy', np.zeros([4, 8, 8, 3], np.uint8))
    good.rename(folder / 'good.pkl')
    return folder


def opening(script, bad, digits, out) -> list:
    """A command that opens a network of NaN."""
    distilled = [f'--config={helpers.ROOT / DISTILLED}', *(f'student.{item}' for item in TINY)]
    return {
        'generate_images.py': ['--net', bad / 'bad.pkl', '--outdir', out / 'o', '--steps=2', '--seeds=0'],
        'calculate_metrics.py': ['memorization', '--net', bad / 'bad.pkl', '--data', digits, '--num=2', '--steps=2',
                                 '--dest', out / 'o.json'],
        'mem_ratio.py': ['--expdir', bad / 'run', '--knn-ref', digits, '--seeds=0-1', '--steps=2', '--log', out / 'o.json'],
        'synthetic_data/generate.py': ['--network', bad / 'bad.pkl', '--outdir', out / 'o', '--seeds=0', '--steps=2'],
        'distillation/scripts/image_sample.py': [*distilled, '--model_path', bad / 'bad.pt', '--num_samples=2',
                                                 '--timestep_respacing=2', '--dest', out / 'o.npz'],
    }[script]


SAMPLING = ['generate_images.py', 'calculate_metrics.py', 'mem_ratio.py', 'synthetic_data/generate.py',
            'distillation/scripts/image_sample.py']


@pytest.mark.parametrize('script', SAMPLING)
def test_a_network_of_nan_is_not_sampled_unasked(script, bad, digits, tmp_path):
    args = opening(script, bad, digits, tmp_path)
    error = helpers.fails(script, *args)
    assert 'its weights are not finite' in error and 'bad.p' in error or 'network-snapshot-0000001-0.100.pkl' in error
    assert 'take an earlier one' in error and not list(tmp_path.iterdir())
    invoke(script, *args, '--allow-nonfinite')
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize('script, args', [
    ('generate_images.py', ['--net={bad}/good.pkl', '--gnet={bad}/bad.pkl', '--guidance=2', '--outdir={out}/o']),
    ('calculate_metrics.py', ['gen', '--net={bad}/bad.pkl', '--ref={digits}', '--metrics=fd_pixels', '--num=2']),
    ('train.py', ['--data={digits}', '--outdir={out}/o', '--transfer={bad}/bad.pkl', '--num-channels=8', '--cres=1',
                  '--num-blocks=1', '--augment=0']),
    ('reconstruct_phema.py', ['--indir={bad}/run', '--outstd=0.12', '--outdir={out}/o']),
    ('snapshot_tool.py', ['convert', '{bad}/bad.pkl', '--dest={out}/o.safetensors']),
    ('synthetic_data/select_1M.py', ['--model_path={bad}/classifier.pkl', '--data_dir={bad}/classes', '--output_dir={out}/o']),
    ('distillation/scripts/image_kd.py', ['--config=' + str(helpers.ROOT / DISTILLED), 'teacher.model_path={bad}/bad.pt',
                                          *(f'teacher.{item}' for item in TINY), *(f'student.{item}' for item in TINY)]),
    ('distillation/scripts/image_train.py', ['--config=' + str(helpers.ROOT / DISTILLED), '--data_dir={digits}',
                                             'student.model_path={bad}/bad.pt', *(f'student.{item}' for item in TINY)])])
def test_nor_used_otherwise(script, args, bad, digits, tmp_path):
    error = helpers.fails(script, *(arg.format(bad=bad, digits=digits, out=tmp_path) for arg in args))
    assert re.search(r'(bad\.pkl|bad\.pt|classifier\.pkl|0\.100\.pkl): its weights are not finite', error), error
    assert not list(tmp_path.iterdir())


def test_long_tail_evaluates_it_only_when_allowed(tmp_path):
    script = helpers.script_module('long_tail/main.py')
    net = torch.nn.Module()
    net.model = torch.nn.Linear(2, 2)
    torch.save({'ema_model': {'weight': torch.full([2, 2], torch.inf), 'bias': torch.ones(2)}}, tmp_path / 'ckpt_1.pt')
    with pytest.raises(UserError, match='ckpt_1.pt: its weights are not finite .* in weight of 2 tensors'):
        script.load_average(str(tmp_path / 'ckpt_1.pt'), net)
    script.load_average(str(tmp_path / 'ckpt_1.pt'), net, True)
    assert net.model.weight.isinf().all()
    assert script.settings(['--train', '--data_type=digits', '--img_size=8', '--allow_nonfinite']).allow_nonfinite


def test_inspect_names_it(bad):
    assert re.search('not finite +1 tensors, the first ', invoke('snapshot_tool.py', 'inspect', bad / 'bad.pkl'))
    assert 'not finite' not in invoke('snapshot_tool.py', 'inspect', bad / 'good.pkl')


def test_what_half_precision_makes_infinite_is_not_written(bad, tmp_path):
    """Neither by an export nor by a training, which says so once and goes on."""
    content = torch.load(bad / 'good.pkl', weights_only=True)
    name = next(name for name, value in content['state'].items() if value.ndim > 1)
    content['state'][name] = torch.full_like(content['state'][name], 65519.0, dtype=torch.float32)
    torch.save(content, tmp_path / 'large.pkl')
    invoke('snapshot_tool.py', 'convert', tmp_path / 'large.pkl', '--dest', tmp_path / 'half.pkl', '--dtype=float16')
    content['state'][name] += 1
    torch.save(content, tmp_path / 'large.pkl')
    error = helpers.fails('snapshot_tool.py', 'convert', tmp_path / 'large.pkl', '--dest', tmp_path / 'a.pkl',
                          '--dtype=float16')
    assert 'not as torch.float16' in error and name in error and not (tmp_path / 'a.pkl').exists()
    invoke('snapshot_tool.py', 'convert', tmp_path / 'large.pkl', '--dest', tmp_path / 'b.pkl')
    train(tmp_path / 'run', Faults(), 16, learning_rate={'name': 'constant', 'lr': 1e5}, snapshot=8, checkpoint=8)
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert log.count('Warning: no ') == 4 and 'network-snapshot-0000000-0.050.pkl: weights that are not finite' in log
    assert not list((tmp_path / 'run').glob('*.pkl')) and (tmp_path / 'run' / 'training-state-0000000.pt').exists()


# --- Runs of earlier versions -------------------------------------------------------------------


@pytest.mark.parametrize('earlier', [None, 7])
def test_a_run_without_patience_is_found_again(digits, tmp_path, earlier):
    """The patience may change from one start to the next, and earlier versions have none."""
    script = script_module('train.py')
    config = script.settings([f'--outdir={tmp_path}', f'--data={digits}', '--seed=1'])
    lengths = script.schedule(config, 100)
    record = {key: value for key, value in (config | {'schedule': lengths}).items() if key != 'nan_patience'}
    (tmp_path / '00000-name').mkdir()
    (tmp_path / '00000-name' / 'training_options.json').write_text(
        json.dumps(record | ({'nan_patience': earlier} if earlier else {})))
    assert script.choose_run(config, str(tmp_path), 'name', False, lengths)[0] == str(tmp_path / '00000-name')
    config['lr'] = 1.0
    assert script.choose_run(config, str(tmp_path), 'name', False, lengths)[0] == str(tmp_path / '00001-name')


def test_the_patience_may_change(tmp_path):
    """A record without it is that of a run that goes on."""
    rules = dict(checkpoint=4, batch=1000, status=1000, nan_patience=3)
    train(tmp_path, Faults(), 3000, **rules)
    path, = tmp_path.glob('training-state-0000003.pt')
    content = read_own(str(path))
    del content['recipe']['nan_patience'], content['health']
    torch.save(content, path)
    train(tmp_path, Faults(), 5000, **rules | dict(nan_patience=9))
    assert 'Resuming from 3000' in (tmp_path / 'log.txt').read_text()


def test_images_of_a_mixture_have_names(bad, digits):
    mixture = Mixture(ImageDataset(digits), GeneratedImages(str(bad / 'classes'), 10))
    assert mixture.where(3) == mixture.real.where(3)
    assert mixture.where(100 + 5) == f'{bad}/classes/1.npy: image 1'
