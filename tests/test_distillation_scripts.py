"""The distillation scripts: published configurations, the effect of every option, exact resuming, errors of one line."""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import golden_cases
import helpers
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from helpers import invoke as call

from distillation import configs, runs
from distillation.cache import open_cache
from distillation.checkpoints import CacheCheckpoints
from distillation.dkdm import SOURCES, Preparation
from distillation.sample_shards import SampleShards
from dnnlib import UserError
from training import encoders, loop
from training.data import transforms
from training.data.images import NpzImages, open_images, open_squares
from training.loss_scale import DynamicLossScale
from training.networks import build_network
from training.recipe import Recipe
from training.runs import claimed
from training.snapshot import load_snapshot

YAML = helpers.ROOT / 'distillation' / 'yaml'
EXPERIMENT = YAML / 'cifar10_32' / 'exp' / 'CIFAR10-14M-Dynamic-0.4.yaml'
BASELINE = YAML / 'cifar10_32' / 'exp' / 'CIFAR10-14M-Baseline.yaml'
TEACHER = YAML / 'cifar10_32' / 'teacher.yaml'
PREPARE, KD, SAMPLE, TRAIN, MIX = (f'distillation/scripts/{name}.py' for name in (
    'dynamic_prepare', 'image_kd', 'image_sample', 'image_train', 'mix_data'))
TINY = ['model.image_size=8', 'model.num_channels=32', 'model.num_res_blocks=1', 'model.channel_mult=1',
        'model.attention_resolutions=4', 'diffusion.diffusion_steps=10', 'diffusion.timestep_respacing=10']
SMALL = [f'{section}.{item}' for section in ('teacher', 'student') for item in TINY]


def weights(folder, name) -> dict:
    return torch.load(os.path.join(folder, name), weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Digits, a teacher that has seen some, its weights, and the arguments of a tiny experiment on it."""
    folder = tmp_path_factory.mktemp('world')
    data = helpers.write_digits(folder / 'digits.zip', 60)
    call(TRAIN, '--data_dir', data, '--config', BASELINE, '--outdir', folder / 'teacher', *TINY, 'batch_size=16',
         'total_steps=6', 'lr=1e-3', 'ema_rate=0.9', 'save_interval=6')
    teacher = folder / 'teacher' / 'ema_0.9_000006.pt'
    experiment = ['--config', EXPERIMENT, *SMALL, f'teacher.model_path={teacher}', f'teacher.tempfile={folder}/x.cache',
                  'student.batch_size=8', 'teacher.batch_size=16']
    call(PREPARE, *experiment)
    return types.SimpleNamespace(folder=folder, data=data, teacher=teacher, experiment=experiment, cache=folder / 'x.cache')


def distil(world, outdir, *more) -> str:
    return call(KD, *world.experiment, '--outdir', outdir, 'student.total_steps=4', 'student.save_interval=2',
                'student.log_interval=1', *more)


# --- Configurations ---------------------------------------------------------------------------------------------------

CONFIGS = golden_cases.cases('math', 'configs_distillation*')
ENTRIES = [(case, kind, name) for case in CONFIGS for kind in ('architectures', 'diffusion', 'teachers', 'experiments')
           for name in case.json[kind]]


@pytest.mark.parametrize('case, kind, name', ENTRIES, ids=golden_cases.ids)
def test_golden_configurations(case, kind, name):
    """Every published value, in the file of the published name."""
    file = {'architectures': f'yaml/arch/{name}.yaml', 'teachers': f'yaml/{name}/teacher.yaml',
            'experiments': f'yaml/{name}.yaml'}.get(kind) or case.json['teachers'][name]['diffusion']
    found = yaml.safe_load((helpers.ROOT / 'distillation' / file).read_text())
    assert found == case.json[kind][name]
    if kind == 'experiments':
        section = configs.read_network(str(helpers.ROOT / 'distillation' / file))
        published = dict(case.json[kind][name].get('student', case.json[kind][name]))
        for key in ('model', 'diffusion'):
            values = yaml.safe_load((helpers.ROOT / 'distillation' / published.pop(key)).read_text())
            assert dataclasses.asdict(getattr(section, key)).items() >= values.items()
        assert dataclasses.asdict(section).items() >= published.items()


@pytest.mark.parametrize('case', CONFIGS, ids=str)
def test_what_a_configuration_leaves_out_is_as_published(case):
    """Where all experiments have one value, it is the default; half precision is that of the architecture."""
    for section, group in ((configs.Training, 'student'), (configs.Teacher, 'teacher')):
        published = [one[group] for one in case.json['experiments'].values() if group in one]
        for field in dataclasses.fields(section):
            values = {str(one[field.name]) for one in published if field.name in one}
            if len(values) == 1 and field.default is not dataclasses.MISSING and field.name not in ('use_fp16', 'tempfile'):
                assert str(field.default) in values, field.name


def test_the_ablations_differ_in_what_their_names_say():
    base = configs.read_experiment(str(YAML / 'cifar10_32/exp/CIFAR10-57M-Dynamic-0.4.yaml'))
    folder = YAML / 'cifar10_32' / 'exp' / 'ablation'
    for rho in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4):
        found = configs.read_experiment(str(folder / 'dynamic-iterative-distillation' / f'CIFAR10-57M-Dynamic-{rho}.yaml'))
        assert found.student == base.student
        assert dataclasses.replace(base.teacher, BATCH=rho, tempfile=f'experiments/cache/CIFAR10-Dynamic-{rho}.cache') \
            == found.teacher
    for kind, name in (('iterative', 'CIFAR10-57M-Iterative'), ('shuffled-iterative', 'CIFAR10-57M-Shuffled')):
        found = configs.read_experiment(str(folder / f'{kind}-distillation' / f'{name}.yaml'))
        assert found.student == base.student
        assert found.teacher.iter_choice == f'{kind.replace("shuffled-", "shffled_")}_distillation'
    for share in ('0', '0.05', '0.15', '1', '1.0'):             # the baselines of the data-limited setting
        assert configs.read_network(str(BASELINE).replace('.yaml', f'-{share}.yaml')) == configs.read_network(str(BASELINE))
    for name in ('celeba_64/exp/CelebA64-57M', 'imagenet_32/exp/ImageNet32-14M', *(
            f'cifar10_32/exp/CIFAR10-{size}M' for size in (57, 44, 32, 24, 14))):
        assert configs.read_network(str(YAML / f'{name}-Baseline.yaml')) == configs.read_network(
            str(YAML / f'{name}-Dynamic-0.4.yaml'))


@pytest.mark.parametrize('path', sorted((YAML / 'arch').glob('*.yaml')), ids=lambda path: path.stem)
def test_parameter_counts_are_those_of_the_names(path):
    section = configs.read_network(str(BASELINE), [f'model={path}'])
    with torch.device('meta'):
        net = build_network(**section.arguments()['network'])
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert int(millions) == int(path.stem.split('M')[0])


def test_every_value_can_be_overridden_and_reaches_network_and_diffusion():
    section = configs.read_network(str(EXPERIMENT), [
        'student.model=yaml/arch/24M-CNN.yaml', 'student.model.channel_mult=1,2', 'student.diffusion.learn_sigma=false',
        'student.diffusion.predict_xstart=true', 'student.diffusion.rescale_timesteps=true', 'student.lr=2e-3',
        'student.diffusion.noise_schedule=linear', 'student.diffusion.timestep_respacing=25', 'student.ema_rate=0.5'])
    network, diffusion = section.arguments()['network'], section.diffusion.arguments()
    assert (network['num_channels'], network['channel_mult'], network['learn_sigma'], section.lr) == (96, '1,2', False, 2e-3)
    assert diffusion == dict(schedule='linear', steps=1000, respacing='25', variance='fixed_large', loss='mse',
                             predict='start', rescale_timesteps=True)
    assert configs.ema_rates(section.ema_rate) == [0.5]
    for text, rates in (('1e-1', [0.1]), ('9.999e-1,.5', [0.9999, 0.5]), ('0.9999,0.999', [0.9999, 0.999]), ('0', [0])):
        assert configs.ema_rates(configs.read_network(str(BASELINE), [f'ema_rate={text}']).ema_rate) == rates
    celeba = configs.read_network(str(YAML / 'celeba_64' / 'teacher.yaml'), ['use_fp16=false'])
    assert celeba.diffusion.arguments()['loss'] == 'rescaled_mse'
    assert celeba.arguments()['network']['precision'] == 'fp32'
    for overrides, precision in (([], 'fp16'), (['model.use_fp16=false'], 'fp32')):
        network = configs.read_network(str(TEACHER), overrides).arguments()['network']
        assert network['precision'] == precision
    kl = configs.read_network(str(TEACHER), ['diffusion.use_kl=true'])
    assert kl.diffusion.arguments()['loss'] == 'rescaled_kl'


BAD_CONFIGS = {
    'no key student.learning_rate': ['student.learning_rate=1'],
    'no key student.model.width': ['student.model.width=3'],
    'no key lr; there are teacher, student': ['lr=1'],
    'no key teacher.foo': ['teacher.foo.bar=1'],
    "student.lr: Value 'fast'": ['student.lr=fast'],
    'student.lr: Interpolation key': ['student.lr=${speed}'],
    'student.model: there is no file none.yaml': ['student.model=none.yaml'],
    "overrides are written key=value": ['student.lr'],
    'schedule_sampler': ['student.schedule_sampler=loss-second-moment'],
    'student.diffusion.clip_last=True must be false': ['student.diffusion.clip_last=true'],
    'student.ema_rate=1.5': ['student.ema_rate=1.5'],
    'student.ema_rate=0.9,fast must be rates': ['student.ema_rate="0.9,fast"'],
    'student.batch_size=0 must be at least 1': ['student.batch_size=0'],
    'student.microbatch=0': ['student.microbatch=0'],
    'student.save_interval=0': ['student.save_interval=0'],
    'student.total_steps=-1': ['student.total_steps=-1'],
    'teacher.iter_choice=random': ['teacher.iter_choice=random'],
    'teacher.BATCH=0.0': ['teacher.BATCH=0'],
    'noise_schedule': ['teacher.diffusion.noise_schedule=wavy'],
    'teacher.prob=0.0': ['teacher.prob=0'],
    "student.model.image_size: 16 differs from the teacher's 8": ['student.model.image_size=16'],
    "student.model.class_cond: True differs from the teacher's False": ['student.model.class_cond=true'],
    'no pure KL loss': ['student.diffusion.use_kl=true'],
    'none.pt: no such file': ['teacher.model_path=none.pt'],
    'other.pt: no such file': ['student.model_path=other.pt'],
    'resume_checkpoint=model000002.pt is no file': ['student.resume_checkpoint=model000002.pt'],
    'there is no such cache; make it with dynamic_prepare.py': ['teacher.tempfile=none.cache'],
    'tempfile is missing': ['teacher.tempfile='],
    'another rho (0.4 instead of 0.2)': ['teacher.BATCH=0.2'],
    'another batch_size (8 instead of 4)': ['student.batch_size=4'],
    'the student needs the noise schedule': ['student.diffusion.noise_schedule=progressive_cosine'],
}


@pytest.mark.parametrize('message', BAD_CONFIGS)
def test_bad_input_is_one_line_and_nothing_is_written(world, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    before = world.cache.read_bytes()
    assert message in helpers.fails(KD, *world.experiment, '--outdir', tmp_path / 'run', 'student.total_steps=1',
                                    *BAD_CONFIGS[message])
    assert world.cache.read_bytes() == before and not os.listdir(tmp_path)


@pytest.mark.parametrize('script, text, message', [
    (KD, 'teacher: {}\nstudent: {}\npupil: {}\n', 'a.yaml: there is no key pupil'),
    (TRAIN, TEACHER.read_text() + 'epochs: 3\n', 'a.yaml: there is no key epochs'),
    (PREPARE, 'teacher: [', 'a.yaml is not YAML'),
    (PREPARE, 'a: [1]\n' + '# \n' * 400_000, 'larger than 64 KiB'),
    (PREPARE, 'a: &a0 [1, 1]\n' + ''.join(f'b{i}: &a{i + 1} [*a{i}, *a{i}]\n' for i in range(40)), 'too large or too deeply nested'),
    (TRAIN, TEACHER.read_text() + 'ema_rate: ${oc.env:HOME}\n', 'ema_rate: a reference is the whole value'),
    (TRAIN, TEACHER.read_text() + 'ema_rate: ${lr}${lr}\n', 'ema_rate: a reference is the whole value'),
    (PREPARE, None, '--config: there is no file'),
    (PREPARE, TEACHER.read_text(), 'there are teacher, student')])
def test_bad_files_are_named(tmp_path, script, text, message):
    if text is not None:
        (tmp_path / 'a.yaml').write_text(text)
    more = ['--data_dir=x'] if script == TRAIN else []
    assert message in helpers.fails(script, '--config', tmp_path / 'a.yaml', *more)


def test_a_foreign_teacher_is_told_by_its_keys(world, tmp_path):
    state = torch.load(world.teacher, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != 'out.2.bias'}, tmp_path / 'lacks.pt')
    torch.save({'module.' + key: value for key, value in state.items()}, tmp_path / 'parallel.pt')
    torch.save(state | {'extra': torch.zeros(1)}, tmp_path / 'extra.pt')
    (tmp_path / 'text.pt').write_text('no weights')
    for name, message in (('lacks', 'lacks out.2.bias'), ('extra', 'unknown extra'), ('text', 'text.pt')):
        assert message in helpers.fails(PREPARE, *world.experiment, f'teacher.model_path={tmp_path}/{name}.pt',
                                        f'teacher.tempfile={tmp_path}/y.cache')
    assert not (tmp_path / 'y.cache').exists()
    call(PREPARE, *world.experiment, f'teacher.model_path={tmp_path}/parallel.pt', f'teacher.tempfile={tmp_path}/y.cache')
    torch.save({key: value * 1.5 for key, value in state.items()}, tmp_path / 'other.pt')
    assert 'made with another teacher' in helpers.fails(KD, *world.experiment, f'teacher.model_path={tmp_path}/other.pt',
                                                       '--outdir', tmp_path / 'run')


# --- dynamic_prepare --------------------------------------------------------------------------------------------------


def test_the_cache_has_mixed_levels_and_says_how_it_was_made(world):
    cache, description = open_cache(str(world.cache))
    assert len(cache) == round(0.4 * 10) * 8 and cache.x.shape[1:] == (3, 8, 8)
    assert cache.levels.min() >= 1 and cache.levels.max() <= 9 and len(cache.levels.unique()) > 3
    assert description.items() >= {'rho': 0.4, 'batch_size': 8, 'processes': 1, 'seed': 0}.items()
    assert description['teacher'] == runs.fingerprint(world.teacher)


def test_a_finished_cache_is_never_overwritten(world):
    before = world.cache.read_bytes()
    assert 'is there already' in call(PREPARE, *world.experiment)
    for change, message in (('teacher.BATCH=0.2', 'another rho (0.4 instead of 0.2)'),
                            ('student.batch_size=4', 'another batch_size (8 instead of 4)'),
                            ('--seed=1', 'another seed')):
        assert message in helpers.fails(PREPARE, *world.experiment, change)
    assert 'needs no cache' in helpers.fails(PREPARE, *world.experiment, 'teacher.iter_choice=iterative_distillation')
    assert world.cache.read_bytes() == before


def test_a_preparation_goes_on_where_it_was_stopped(world, tmp_path, monkeypatch):
    dest = f'teacher.tempfile={tmp_path}/y.cache'
    advance, calls = Preparation.advance, []

    def dying(self):
        if len(calls) == 5:
            raise UserError('pulled the plug')
        calls.append(0)
        return advance(self)

    monkeypatch.setattr(Preparation, 'advance', dying)
    helpers.fails(PREPARE, *world.experiment, dest, '--save_every=0')
    assert os.listdir(tmp_path) == ['y.cache.part-0-of-1']
    assert 'another seed' in helpers.fails(PREPARE, *world.experiment, dest, '--seed=3')
    monkeypatch.setattr(Preparation, 'advance', advance)
    assert 'Going on with' in call(PREPARE, *world.experiment, dest)
    assert os.listdir(tmp_path) == ['y.cache']
    assert (tmp_path / 'y.cache').read_bytes() == world.cache.read_bytes()
    call(PREPARE, *world.experiment, f'teacher.tempfile={tmp_path}/z.cache', '--seed=3')
    assert (tmp_path / 'z.cache').read_bytes() != world.cache.read_bytes()


# --- image_kd ---------------------------------------------------------------------------------------------------------


def test_a_distillation_writes_the_known_files(world, tmp_path):
    before = world.cache.read_bytes()
    distil(world, tmp_path, 'student.ema_rate=0.5,0.9', 'student.cache_save_interval=4')
    files = set(os.listdir(tmp_path))
    for step in ('000002', '000004'):
        assert files >= {f'model{step}.pt', f'ema_0.5_{step}.pt', f'ema_0.9_{step}.pt', f'opt{step}.pt'}
    assert 'teacher-state-000004.cache' in files and 'teacher-state-000002.cache' not in files
    assert len((tmp_path / 'stats.jsonl').read_text().splitlines()) == 4
    assert world.cache.read_bytes() == before
    advanced, prepared = (open_cache(str(path))[0] for path in (tmp_path / 'teacher-state-000004.cache', world.cache))
    steps = prepared.levels - advanced.levels
    assert (steps % 11).sum() >= 4 and len(steps) == 32        # four batches of eight were advanced, each by one level
    options = json.loads((tmp_path / 'training_options.json').read_text())
    assert options['student']['model']['num_channels'] == 32 and options['teacher']['BATCH'] == 0.4
    # The averages are the constant-factor ones of the models: e4 = r e3 + (1 - r) w4, and they differ by rate.
    fast, slow, final = (weights(tmp_path, name) for name in ('ema_0.5_000004.pt', 'ema_0.9_000004.pt', 'model000004.pt'))
    distance = [sum(float((ema[key] - final[key]).abs().sum()) for key in final) for ema in (fast, slow)]
    assert 0 < distance[0] < distance[1]
    snapshot = load_snapshot(str(tmp_path / 'network-snapshot-0000000-0.5.pkl'))
    assert snapshot.net.model.num_channels == 32 and snapshot.net.diffusion.num_steps == 10


@pytest.mark.parametrize('choice', SOURCES)
def test_every_variant_runs_and_resumes_exactly(world, tmp_path, choice):
    arguments = [f'teacher.iter_choice={choice}', 'teacher.prob=0.7', 'teacher.input_perturb=0.1']
    distil(world, tmp_path / 'whole', *arguments)
    distil(world, tmp_path / 'parts', *arguments, 'student.total_steps=2')
    text = distil(world, tmp_path / 'parts', *arguments)
    assert 'Resuming from 16 images' in text
    for name in ('model000004.pt', 'ema_0.9999_000004.pt'):
        assert same(weights(tmp_path / 'whole', name), weights(tmp_path / 'parts', name))


def test_options_of_training_have_their_effect(world, tmp_path):
    distil(world, tmp_path / 'base')
    base = weights(tmp_path / 'base', 'model000004.pt')
    changes = ['student.lr=1e-3', 'student.weight_decay=0.5', 'student.lr_anneal_steps=8', '--seed=7', 'teacher.prob=0.4',
               'teacher.input_perturb=0.5', f'student.model_path={world.teacher}', 'student.model.dropout=0',
               'teacher.iter_choice=iterative_distillation']
    for number, change in enumerate(changes):
        distil(world, tmp_path / str(number), change)
        assert not same(base, weights(tmp_path / str(number), 'model000004.pt')), change
    distil(world, tmp_path / 'micro', 'student.microbatch=4', 'student.model.dropout=0')
    whole, micro = (weights(tmp_path / name, 'model000004.pt') for name in ('7', 'micro'))
    for key in whole:
        torch.testing.assert_close(whole[key], micro[key], atol=2e-4, rtol=0)
    text = distil(world, tmp_path / 'x', 'student.total_steps=0', 'student.lr_anneal_steps=2')
    assert '2 steps done' in text


def test_a_run_of_other_settings_is_not_resumed(world, tmp_path):
    distil(world, tmp_path / 'run', 'student.total_steps=2')
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in os.listdir(tmp_path / 'run')}
    for change, message in (('teacher.iter_choice=iterative_distillation', 'iter_choice'),
                            ('student.model.num_res_blocks=2', 'num_res_blocks'), ('--seed=1', 'seed 0 -> 1'),
                            ('student.ema_rate=0.5', 'averages.rates')):
        assert message in helpers.fails(KD, *world.experiment, '--outdir', tmp_path / 'run', 'student.total_steps=4', change)
    assert before == {name: (tmp_path / 'run' / name).read_bytes() for name in os.listdir(tmp_path / 'run')}
    # Elsewhere the run goes on from it, if it is told to.
    text = distil(world, tmp_path / 'on', f'student.resume_checkpoint={tmp_path}/run/model000002.pt')
    assert 'Resuming from 16 images' in text
    assert '4 steps done' in call(KD, *world.experiment, '--exp_dir', tmp_path / 'again', 'student.total_steps=4',
                                  '--resume_checkpoint', tmp_path / 'run' / 'model000002.pt')
    assert 'resume_checkpoint=none.pt is no file' in helpers.fails(
        KD, *world.experiment, '--exp_dir', tmp_path / 'x', '--resume_checkpoint=none.pt')
    distil(world, tmp_path / 'whole')
    assert same(weights(tmp_path / 'on', 'model000004.pt'), weights(tmp_path / 'whole', 'model000004.pt'))


@pytest.mark.parametrize('half', [False, True])
def test_runs_of_guided_diffusion_go_on(world, tmp_path, half):
    """modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt with Adam's state alone, of either precision."""
    distil(world, tmp_path / 'run', 'student.total_steps=2')
    theirs = tmp_path / 'theirs'
    theirs.mkdir()
    for name in ('model000002.pt', 'ema_0.9999_000002.pt'):
        shutil.copy(tmp_path / 'run' / name, theirs)
    net, adam = weights(theirs, 'model000002.pt'), weights(tmp_path / 'run', 'opt000002.pt')['optimizer']
    state = adam['state']
    if half:
        groups = [[i for i, value in enumerate(net.values()) if (value.ndim > 1) == large] for large in (False, True)]
        state = {number: {'step': state[0]['step']} | {
            key: torch.cat([state[i][key].flatten() for i in group]).reshape([1] * number + [-1])
            for key in ('exp_avg', 'exp_avg_sq')} for number, group in enumerate(groups)}
    torch.save({'state': state, 'param_groups': adam['param_groups']}, theirs / 'opt000002.pt')
    read = CacheCheckpoints(str(theirs), 8).load(str(theirs / 'model000002.pt'))
    assert all(same(read['optimizer']['state'][i], values) for i, values in adam['state'].items())
    text = distil(world, tmp_path / 'on', '--resume_checkpoint', theirs / 'model000002.pt')
    assert 'Resuming from 16 images' in text
    steps = weights(tmp_path / 'on', 'opt000004.pt')['optimizer']['state']
    assert {float(values['step']) for values in steps.values()} == {4}


def test_damaged_checkpoints_are_passed_over(world, tmp_path):
    distil(world, tmp_path / 'run')
    expected = weights(tmp_path / 'run', 'model000004.pt')
    (tmp_path / 'run' / 'opt000004.pt').write_bytes(b'half')
    assert 'Resuming from 16 images' in distil(world, tmp_path / 'run')
    assert same(expected, weights(tmp_path / 'run', 'model000004.pt'))
    for step in ('000002', '000004'):
        (tmp_path / 'run' / f'teacher-state-{step}.cache').write_bytes(b'half')
    assert 'none of its 2 checkpoints' in helpers.fails(KD, *world.experiment, '--outdir', tmp_path / 'run')


def test_a_student_with_other_time_steps_is_warned_and_gets_the_teachers(world, tmp_path):
    text = distil(world, tmp_path, 'student.diffusion.timestep_respacing=5', 'student.total_steps=2')
    assert "Warning: student.diffusion.timestep_respacing=5 differs from the teacher's; 10 is used" in text
    recipe = json.loads((tmp_path / 'training_options.json').read_text())
    assert recipe['student']['diffusion']['timestep_respacing'] == '10'


def test_a_killed_distillation_ends_with_the_same_weights(world, tmp_path):
    """kill -9 in the middle, and on again: bit for bit the undisturbed run."""
    arguments = [*world.experiment, 'student.total_steps=16', 'student.save_interval=2']
    process = subprocess.Popen(helpers.command(KD, *arguments, '--outdir', tmp_path / 'killed'),
                               env=helpers.environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'killed' / 'model000004.pt').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / 'killed' / 'model000004.pt').exists() and not (tmp_path / 'killed' / 'model000016.pt').exists()
    assert 'Resuming from' in call(KD, *arguments, '--outdir', tmp_path / 'killed')
    call(KD, *arguments, '--outdir', tmp_path / 'whole')
    for name in ('model000016.pt', 'ema_0.9999_000016.pt'):
        assert same(weights(tmp_path / 'killed', name), weights(tmp_path / 'whole', name))
    killed, whole = (open_cache(str(tmp_path / name / 'teacher-state-000016.cache'))[0] for name in ('killed', 'whole'))
    assert torch.equal(killed.x, whole.x)
    assert len([name for name in os.listdir(tmp_path / 'whole') if name.endswith('.cache')]) <= 3


def test_two_processes_advance_their_own_shares(world, tmp_path):
    """torchrun: a cache with a share for each, a checkpoint with both, and exact resuming."""
    arguments = [*world.experiment, f'teacher.tempfile={tmp_path}/two.cache']
    helpers.run(PREPARE, *arguments, processes=2)
    assert sorted(os.listdir(tmp_path)) == ['two.cache']
    cache, description = open_cache(str(tmp_path / 'two.cache'))
    assert len(cache) == 2 * 16 and description['processes'] == 2
    remaining = (10 - cache.levels).reshape(2, 16).sum(1)
    assert remaining[0] == remaining[1]                        # no process waits for the other
    run = [*arguments, 'student.save_interval=2', 'student.total_steps=4', '--outdir']
    helpers.run(KD, *run, tmp_path / 'whole', processes=2)
    (tmp_path / 'run').mkdir()
    for path in (tmp_path / 'whole').glob('*000002*'):          # what was there when the run was half done
        shutil.copy(path, tmp_path / 'run')
    assert 'Resuming from 16 images' in helpers.run(KD, *run, tmp_path / 'run', processes=2).stdout
    assert same(weights(tmp_path / 'run', 'model000004.pt'), weights(tmp_path / 'whole', 'model000004.pt'))
    shares = [open_cache(str(tmp_path / 'run' / f'teacher-state-000004{rank}.cache'))[0] for rank in ('', '-1')]
    for rank, share in enumerate(shares):
        assert len(share) == 16 and not torch.equal(share.levels, cache.levels[16 * rank:][:16])
    assert 'batch 8 -> 4' in helpers.fails(KD, *run, tmp_path / 'run', 'teacher.iter_choice=iterative_distillation',
                                           'student.batch_size=4')
    # The batch is that of both together: one process takes the same cache.
    call(KD, *run, tmp_path / 'alone', 'student.total_steps=1', 'student.save_interval=1')
    assert len(open_cache(str(tmp_path / 'alone' / 'teacher-state-000001.cache'))[0]) == 32
    odd = helpers.run(KD, *run, tmp_path / 'odd', 'student.batch_size=7', processes=2, check=False)
    assert 'batch_size=7 cannot be split over 2 processes' in odd.stderr and not (tmp_path / 'odd').exists()


def test_sizes_of_the_celeba_command_on_four_processes(monkeypatch):
    """A batch of 256 and a cache of 102,400 images in all, however many processes there are."""
    experiment = configs.read_experiment(str(YAML / 'celeba_64' / 'exp' / 'CelebA64-57M-Dynamic-0.4.yaml'))
    teacher = types.SimpleNamespace(diffusion=types.SimpleNamespace(num_steps=1000))
    for processes in (1, 4):
        monkeypatch.setattr(runs.dist, 'get_world_size', functools.partial(int, processes))
        assert runs.process_batch(experiment.student) * processes == 256
        assert runs.cache_share(experiment, teacher) * processes == 102400


def test_caches_of_the_authors_are_used_as_they_are(world, tmp_path):
    """A pickle of the arrays total_t and total_x_t_1, of any number of processes."""
    cache, _ = open_cache(str(world.cache))
    arrays = {'total_t': cache.levels.numpy(), 'total_x_t_1': cache.x.numpy()}
    contents = [pickle.dumps(arrays), pickle.dumps(arrays, protocol=2), pickle.dumps(list(arrays.values())),
                b''.join(map(pickle.dumps, arrays.values()))]
    path = tmp_path / 'authors.cache'
    distil(world, tmp_path / 'own')
    for content in contents:
        path.write_bytes(content)
        found, description = open_cache(str(path))
        assert torch.equal(found.x, cache.x) and torch.equal(found.levels, cache.levels) and description is None
    distil(world, tmp_path / 'run', f'teacher.tempfile={path}')
    assert same(weights(tmp_path / 'run', 'model000004.pt'), weights(tmp_path / 'own', 'model000004.pt'))
    leftover = tmp_path / '.authors.cache.0123abcd.tmp'        # of one that was killed at its very end
    leftover.touch()
    assert 'is there already' in call(PREPARE, *world.experiment, f'teacher.tempfile={path}')
    assert path.read_bytes() == content and not leftover.exists()
    for change, message in (({'total_t': arrays['total_t'] + 3}, 'at steps'), ({'total_t': arrays['total_t'] / 2}, 'whole'),
                            ({'total_x_t_1': arrays['total_x_t_1'][:, :, :4]}, 'holds images [3, 4, 8]'),
                            ({'total_x_t_1': cache.x}, 'not a cache'), ({'total_t': print}, 'not a cache'),
                            ({name: array[:20] for name, array in arrays.items()}, 'holds 20 images')):
        path.write_bytes(pickle.dumps(arrays | change))
        assert message in helpers.fails(KD, *world.experiment, '--outdir', tmp_path / 'x', f'teacher.tempfile={path}')


# --- image_sample -----------------------------------------------------------------------------------------------------


def sampling(world, config=TEACHER, tiny=TINY) -> list:
    return ['--config', config, '--model_path', world.teacher, '--batch_size=5', '--num_samples=12',
            '--timestep_respacing=5', *tiny]


def sample(world, dest, *more, **options) -> np.ndarray:
    call(SAMPLE, *sampling(world, **options), '--dest', dest, *more)
    with np.load(dest) as file:
        assert set(file.files) == {'arr_0'}
        return file['arr_0']


def test_samples_are_one_array_that_depends_on_seed_and_chain_alone(world, tmp_path):
    base = sample(world, tmp_path / 'a.npz')
    assert base.shape == (12, 8, 8, 3) and base.dtype == np.uint8 and base.std() > 0
    assert sorted(os.listdir(tmp_path)) == ['a.json', 'a.npz']
    assert len(NpzImages(str(tmp_path / 'a.npz'))) == 12
    experiment = sample(world, tmp_path / 'b.npz', '--batch_size=7', config=EXPERIMENT,
                        tiny=[item for item in SMALL if item.startswith('student')])
    assert np.abs(experiment.astype(int) - base).max() <= 1    # batches of other sizes may round differently
    for number, change in enumerate((['--use_ddim=True'], ['--timestep_respacing=10'], ['--seed=1'],
                                     ['diffusion.clip_denoised=false'], ['--sampler=edm', '--steps=3'],
                                     ['--sampler=dpmpp-2m'], ['--sampler=ddim', '--eta=0.5'])):
        assert not np.array_equal(base, sample(world, tmp_path / f'{number}.npz', *change)), change
    ddim = sample(world, tmp_path / 'd.npz', '--use_ddim=True')
    assert np.array_equal(ddim, sample(world, tmp_path / 'e.npz', 'diffusion.use_ddim=true'))


def test_sampling_goes_on_where_it_was_stopped(world, tmp_path, monkeypatch):
    save, saved = SampleShards.save, []

    def dying(self, start, *rest):
        if saved:
            raise UserError('pulled the plug')
        saved.append(start)
        save(self, start, *rest)

    expected = sample(world, tmp_path / 'a.npz')
    monkeypatch.setattr(SampleShards, 'save', dying)
    arguments = [*sampling(world), '--dest', tmp_path / 'b.npz']
    helpers.fails(SAMPLE, *arguments)
    assert not (tmp_path / 'b.npz').exists() and os.listdir(tmp_path / 'b.npz.parts') == ['000000000-000000005.npz']
    assert 'another seed (0 instead of 4)' in helpers.fails(SAMPLE, *arguments, '--seed=4')
    monkeypatch.setattr(SampleShards, 'save', save)
    assert np.array_equal(sample(world, tmp_path / 'b.npz'), expected) and not (tmp_path / 'b.npz.parts').exists()
    assert np.array_equal(sample(world, tmp_path / 'b.npz'), expected)     # complete: nothing is done
    assert 'another timestep_respacing' in helpers.fails(SAMPLE, *arguments, '--timestep_respacing=10')
    np.savez(tmp_path / 'c.npz', arr_0=expected)
    assert 'another model (None instead of' in helpers.fails(SAMPLE, *arguments, '--dest', tmp_path / 'c.npz')


def test_sampling_goes_on_after_a_kill_before_its_first_piece(world, tmp_path):
    (tmp_path / 'a.npz.parts').mkdir()
    (tmp_path / 'a.npz.parts/.settings.json.0123abcd.tmp').touch()
    sample(world, tmp_path / 'a.npz')
    assert sorted(os.listdir(tmp_path)) == ['a.json', 'a.npz']


def test_samples_are_made_by_one_command_at_a_time(world, tmp_path):
    with claimed(tmp_path / 'a.npz.parts', 'sampling'):
        line = helpers.fails(SAMPLE, *sampling(world), '--dest', tmp_path / 'a.npz')
    assert 'another process is sampling there' in line and os.listdir(tmp_path) == ['a.npz.parts']


def test_processes_of_mpiexec_share_the_samples(world, tmp_path):
    """Rank and world size from Open MPI's environment; default folder; as written, from distillation/."""
    expected = sample(world, tmp_path / 'a.npz')
    arguments = [*sampling(world, 'yaml/cifar10_32/teacher.yaml'), '--use_ddim=False']
    shell = {key: value for key, value in helpers.environment().items() if key not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    processes = [subprocess.Popen(
        [sys.executable, 'script/image_sample.py', *map(str, arguments)], cwd=helpers.ROOT / 'distillation',
        env=shell | dict(OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_SIZE='2', OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
                         MASTER_PORT=str(20000 + os.getpid() % 20000), OPENAI_LOGDIR=str(tmp_path / 'logs')))
        for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    with np.load(tmp_path / 'logs' / 'ema_0.9_000006-ancestral5' / 'samples_12x8x8x3.npz') as file:
        assert np.array_equal(file['arr_0'], expected)


def test_what_is_sampled_without_options(world, tmp_path):
    """50,000 images in batches of 256 by 50 steps, in the folder and under the name that are asked for."""
    defaults = {option.name: option.default for option in helpers.script_module(SAMPLE).main.params}
    assert (defaults['num_samples'], defaults['batch_size']) == (50000, 256)
    call(SAMPLE, '--config', TEACHER, '--model_path', world.teacher, '--num_samples=2', '--log_dir', tmp_path, *TINY[:-2])
    folder = tmp_path / 'ema_0.9_000006-ancestral50'
    assert json.loads((folder / 'samples_2x8x8x3.json').read_text())['timestep_respacing'] == '50'
    call(SAMPLE, *sampling(world), '--log_dir', tmp_path, '--name=mine')
    assert (tmp_path / 'mine' / 'samples_12x8x8x3.npz').is_file()
    configured = [*sampling(world)[:-len(TINY) - 1], *TINY, 'diffusion.timestep_respacing=4', '--log_dir', tmp_path]
    call(SAMPLE, *configured)
    assert (tmp_path / 'ema_0.9_000006-ancestral4').is_dir()


def test_samples_are_rounded_as_guided_diffusion_does():
    x = torch.tensor([-2, -1, -0.9999, 0, 0.001, 0.9999, 1, 2]).reshape(1, 1, 2, 4)
    assert encoders.GuidedRGBEncoder().decode(x).flatten().tolist() == [0, 0, 0, 127, 127, 254, 255, 255]
    assert encoders.RGBEncoder().decode(x).flatten().tolist() == [0, 0, 0, 128, 128, 255, 255, 255]


BAD_SAMPLINGS = {
    'none.pt: no such file': ['--model_path=none.pt'],
    'timestep_respacing': ['--timestep_respacing=11'],
    'must end in .npz': ['--dest=x.zip'],
    'does not fit the network': ['model.num_res_blocks=2'],
    '--rho=3.0 has no meaning': ['--rho=3'],
    '--eta=1.0 is no option of the sampler edm': ['--sampler=edm', '--eta=1'],
    '--sampler=heun is no sampler': ['--sampler=heun'],
}


@pytest.mark.parametrize('message', BAD_SAMPLINGS)
def test_bad_samplings_end_in_one_line(world, tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    assert message in helpers.fails(SAMPLE, *sampling(world), '--dest=x.npz', *BAD_SAMPLINGS[message])
    assert not os.listdir(tmp_path)


# --- image_train and mix_data -----------------------------------------------------------------------------------------


def train(data, outdir, *more) -> str:
    return call(TRAIN, '--data_dir', data, '--config', BASELINE, '--outdir', outdir, *TINY, 'batch_size=8', 'total_steps=2',
                'save_interval=1', *more)


def test_a_folder_a_zip_and_an_npz_of_the_same_images_train_the_same_network(world, tmp_path):
    mixed = call(MIX, '--real', world.data, '--synthetic', world.data, '--share=1', '--dest', tmp_path / 'folder')
    assert '60 real and 0 synthetic' in mixed
    call(MIX, '--real', world.data, '--synthetic', world.data, '--share=1', '--dest', tmp_path / 'zipped.zip')
    images = open_images(str(tmp_path / 'zipped.zip'))
    np.savez(tmp_path / 'array.npz', images.images(np.arange(60)).transpose(0, 2, 3, 1))
    for name in ('folder', 'zipped.zip', 'array.npz'):
        train(tmp_path / name, tmp_path / 'runs' / name)
    first, second, third = (weights(tmp_path / 'runs' / name, 'model000002.pt')
                            for name in ('folder', 'zipped.zip', 'array.npz'))
    assert same(first, second) and same(first, third)
    train(tmp_path / 'folder', tmp_path / 'parts', 'total_steps=1')
    assert 'Resuming from 8 images' in train(tmp_path / 'folder', tmp_path / 'parts')
    assert same(first, weights(tmp_path / 'parts', 'model000002.pt'))


def test_images_are_mirrored_at_random_unless_switched_off(world, tmp_path):
    for name, more in (('default', []), ('on', ['random_flip=true']), ('off', ['random_flip=false'])):
        train(world.data, tmp_path / name, 'total_steps=1', *more)
    default, on, off = (weights(tmp_path / name, 'model000001.pt') for name in ('default', 'on', 'off'))
    assert same(default, on) and not same(default, off)
    # A run that began without, as all of earlier versions, goes on without.
    record = tmp_path / 'off' / 'training_options.json'
    for text in (record.read_text(), record.read_text().replace('"random_flip": false,', '')):
        record.write_text(text)
        assert 'random_flip=True is False in the run' in helpers.fails(
            TRAIN, '--data_dir', world.data, '--config', BASELINE, '--outdir', tmp_path / 'off', *TINY, 'batch_size=8',
            'random_flip=true')
    assert 'Resuming from 8 images' in train(world.data, tmp_path / 'off')
    assert json.loads(record.read_text())['random_flip'] is False
    assert 'no images that could be mirrored' in helpers.fails(KD, *world.experiment, 'student.random_flip=true')


def test_pictures_of_any_size_are_cropped_and_file_names_are_classes(world, tmp_path):
    """As guided diffusion does: the centre of what is shrunk, or another random part each time, the same in any session."""
    (folder := tmp_path / 'data').mkdir()
    for k in range(8):
        pixels = np.random.RandomState(k).randint(0, 256, (20 + k, 30, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f'{"cat" if k % 2 else "dog"}_{k}x.png')
    data = open_squares(str(folder), (3, 8, 8), use_labels=True)
    assert data.class_names == ['cat', 'dog'] and data.label_ids.tolist() == [0] * 4 + [1] * 4
    crop = transforms.make_transform('center-crop-dhariwal', 8, 8)
    assert np.array_equal(data.images([1])[0], crop(PIL.Image.open(folder / 'cat_3x.png')).transpose(2, 0, 1))
    data = open_squares(str(folder), (3, 8, 8), use_labels=False, random_crop=True)
    at = {start: data.training_images([1, 1], start, seed=3) for start in (5, 6)}
    assert np.array_equal(at[5][1], at[6][0]) and not np.array_equal(at[5][0], at[5][1])
    classes = ['model.class_cond=true', 'model.num_classes=2']
    for name, more in (('centre', []), ('random', ['random_crop=true'])):
        out = train(folder, tmp_path / 'runs' / name, *classes, *more)
        assert 'a random part' in out if more else 'the centre is taken' in out
    train(folder, tmp_path / 'runs' / 'parts', *classes, 'random_crop=true', 'total_steps=1')
    train(folder, tmp_path / 'runs' / 'parts', *classes, 'random_crop=true')
    found = {name: weights(tmp_path / 'runs' / name, 'model000002.pt') for name in ('centre', 'random', 'parts')}
    assert same(found['random'], found['parts']) and not same(found['random'], found['centre'])


def test_classes_go_through_training_and_sampling(world, tmp_path):
    classes = ['model.class_cond=true', 'model.num_classes=10']
    train(world.data, tmp_path / 'run', *classes)
    call(SAMPLE, '--config', BASELINE, '--model_path', tmp_path / 'run' / 'model000002.pt', '--num_samples=6', '--batch_size=4',
         '--dest', tmp_path / 'x.npz', '--timestep_respacing=3', *TINY, *classes)
    made = NpzImages(str(tmp_path / 'x.npz'))
    assert made.label_ids.shape == (6,) and made.label_ids.min() >= 0 and made.label_ids.max() < 10
    assert 'has 10 classes, but the network has 7' in helpers.fails(
        TRAIN, '--data_dir', world.data, '--config', BASELINE, '--outdir', tmp_path / 'y', *TINY, *classes,
        'model.num_classes=7')
    # Guided diffusion's networks have the 1000 classes of ImageNet, whatever the data have.
    assert 'has 10 of the 1000 classes' in train(world.data, tmp_path / 'y', 'model.class_cond=true', 'total_steps=1')
    assert weights(tmp_path / 'y', 'model000001.pt')['label_emb.weight'].shape[0] == 1000


def test_a_class_conditional_teacher_is_distilled(world, tmp_path):
    """The classes are in the cache and its checkpoints; a run in two sessions is that in one; the student needs them too."""
    classes = ['model.class_cond=true', 'model.num_classes=10']
    train(world.data, tmp_path / 'teacher', *classes)
    experiment = [*world.experiment, *(f'{section}.{item}' for section in ('teacher', 'student') for item in classes),
                  f'teacher.model_path={tmp_path}/teacher/model000002.pt', f'teacher.tempfile={tmp_path}/x.cache']
    call(PREPARE, *experiment)
    cache = open_cache(str(tmp_path / 'x.cache'))[0]
    assert cache.classes.unique().tolist() == list(range(10))
    (tmp_path / 'authors.cache').write_bytes(pickle.dumps({'total_t': cache.levels.numpy(), 'total_x_t_1': cache.x.numpy()}))
    assert 'has no classes, and the teacher 10' in helpers.fails(
        KD, *experiment, '--outdir', tmp_path / 'z', f'teacher.tempfile={tmp_path}/authors.cache')
    for name, totals in (('whole', [4]), ('parts', [2, 4])):
        for total in totals:
            call(KD, *experiment, '--outdir', tmp_path / name, f'student.total_steps={total}', 'student.save_interval=2')
    for file in ('model000004.pt', 'ema_0.9999_000004.pt', 'teacher-state-000004.cache'):
        assert (tmp_path / 'whole' / file).read_bytes() == (tmp_path / 'parts' / file).read_bytes()
    assert "student.model.num_classes: 7 differs from the teacher's 10" in helpers.fails(
        KD, *experiment, 'student.model.num_classes=7', '--outdir', tmp_path / 'y')


def test_data_that_does_not_fit_is_refused(world, tmp_path):
    (tmp_path / 'x.npz').write_bytes(b'PK broken')
    for data, more, message in (('none', [], 'does not exist'), (tmp_path / 'x.npz', [], 'x.npz'),
                                (world.data, ['model.img_channels=1'], 'see model.image_size')):
        assert message in helpers.fails(TRAIN, '--config', BASELINE, '--outdir', tmp_path / 'run', '--data_dir', data, *TINY,
                                        *more)
    assert os.listdir(tmp_path) == ['x.npz']


def test_mixtures_take_the_published_choice(world, tmp_path):
    np.savez(tmp_path / 's.npz', np.full((50, 8, 8, 3), 7, np.uint8))
    text = call(MIX, '--real', world.data, '--synthetic', tmp_path / 's.npz', '--share=0.25', '--count=40', '--seed=5',
                '--dest', tmp_path / 'mix')
    assert '10 real and 30 synthetic' in text
    mixed, real = (open_images(str(path)) for path in (tmp_path / 'mix', world.data))
    expected = helpers.script_module(MIX).mixture(40, 0.25, 60, 50, 5)[0]
    assert np.array_equal(mixed.images(np.arange(10)), real.images(expected))
    assert (mixed.images(np.arange(10, 40)) == 7).all()
    assert sorted(os.listdir(tmp_path / 'mix'))[:2] == ['000000.png', '000001.png']
    assert '40 real' not in helpers.fails(MIX, '--real', world.data, '--synthetic', tmp_path / 's.npz', '--share=0',
                                          '--dest', tmp_path / 'n')          # 60 wanted, 50 there
    np.savez(tmp_path / 't.npz', np.zeros((9, 4, 4, 3), np.uint8))
    assert '--synthetic of (3, 4, 4)' in helpers.fails(MIX, '--real', world.data, '--synthetic', tmp_path / 't.npz',
                                                       '--share=0.5', '--dest', tmp_path / 'n')
    assert 'exists' in helpers.fails(MIX, '--real', world.data, '--synthetic', tmp_path / 's.npz', '--share=1',
                                     '--dest', tmp_path / 'mix')


# --- Evaluation and mixed precision -----------------------------------------------------------------------------------


def test_samples_are_evaluated_against_a_reference_batch_of_the_field(tmp_path, monkeypatch):
    """calculate_metrics.py calc with all five metrics, against arr_0 with and without mu, sigma, mu_s, sigma_s."""
    from metrics.inception import InceptionV3
    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), tmp_path / 'inception.pth')
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(tmp_path / 'inception.pth'))
    random = np.random.default_rng(0)
    samples, real = random.integers(0, 256, (2, 6, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / 'samples.npz', samples)
    np.savez(tmp_path / 'VIRTUAL_plain.npz', real)
    dims = {'': 2048, '_s': 2023}
    np.savez(tmp_path / 'VIRTUAL_full.npz', arr_0=real, **{f'mu{s}': np.zeros(n) for s, n in dims.items()},
             **{f'sigma{s}': np.eye(n) for s, n in dims.items()})
    found = {}
    for name, metrics in (('plain', 'fid,sfid,is,precision,recall'), ('full', 'sfid,is')):
        call('calculate_metrics.py', 'calc', f'--images={tmp_path}/samples.npz', f'--ref={tmp_path}/VIRTUAL_{name}.npz',
             f'--metrics={metrics}', f'--dest={tmp_path}/{name}.json')
        found[name] = json.loads((tmp_path / f'{name}.json').read_text())['results']
        names = {key for key in found[name] if not key.endswith(('_low', '_high', '_se'))}
        assert names == {*metrics.split(','), 'is_std'}
    assert all(np.isfinite(list(found['plain'].values())))
    assert found['plain']['sfid'] != found['full']['sfid']     # the second was told other statistics


def test_loss_scale_falls_on_overflow_and_grows_with_good_steps():
    scale = DynamicLossScale(20, 0.001)
    assert scale.value == 2**20
    assert scale.update([torch.ones(3), torch.full([2], 3e38)]) and scale.lg == pytest.approx(20.001)
    for bad in (float('inf'), float('nan')):
        assert not scale.update([torch.ones(3), torch.tensor([bad])])
    assert scale.lg == pytest.approx(18.001)


class _Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))


class _Batches:
    def iterate(self, plan):
        for start, count in plan:
            yield {'start': start, 'count': count}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_loop_skips_steps_that_overflow(tmp_path):
    """Weights and averages stay, the image count goes on; gradients are those of the unscaled loss."""
    seen = []

    def objective(net, batch):
        seen.append(trainer.loss_scale.lg)
        loss = net.w.expand(batch['count']) * (float('inf') if batch['start'] == 2 else 1)
        return loss, {'loss': loss}

    net = _Line()
    recipe = Recipe(batch=2, total_nimg=8, checkpoint=8, bad_gradients=None, optim={'name': 'SGD'},
                    learning_rate={'name': 'constant', 'lr': 0.1}, loss_scale={'lg': 10, 'growth': 0.5},
                    averages={'name': 'constant', 'rates': [0.5]})
    trainer = loop.Trainer(recipe, net, objective, _Batches(), str(tmp_path))
    assert trainer.run() == 8
    assert seen == [10, 10.5, 9.5, 10]
    assert net.w.item() == pytest.approx(0.7)                  # three steps of 0.1
    assert trainer.ema.emas[0].w.item() == pytest.approx(((1 + .9) / 2 + .8) / 4 + .35)
    resumed = loop.Trainer(recipe, net, objective, _Batches(), str(tmp_path))
    resumed.load(resumed.checkpoints.load_newest())
    assert resumed.nimg == 8 and resumed.loss_scale.lg == trainer.loss_scale.lg == 10.5


def test_students_start_from_their_seed():
    section = configs.read_network(str(BASELINE), TINY)
    a, b, c = (runs.new_network(section, seed).state_dict() for seed in (1, 1, 2))
    assert same(a, b) and not same(a, c)
    assert runs.process_random(1, 0).seed != runs.process_random(1, 1).seed
