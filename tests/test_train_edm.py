"""train.py: the recipe that its options make, run folders, resume, independence of the process count, and errors."""

import itertools
import json
import os
import signal
import subprocess
import time

import click.testing
import golden_cases
import helpers
import numpy as np
import pytest
import torch
from helpers import command, environment, fails, run, write_digits

import train
from training import runs, schedules
from training.checkpoint import Checkpoints
from training.encoders import RGBEncoder
from training.generate import generate_images
from training.networks import build_network
from training.networks.edm import EDMPrecond, VEPrecond, VPPrecond
from training.snapshot import load_snapshot, save_snapshot

# A network of a few thousand parameters, ten steps.
TINY = ['--duration=0.001', '--duration-rule=fixed', '--rampup=0.0005', '--batch=100', '--num-channels=8', '--num-blocks=1',
        '--cres=1,2', '--tick=0.25', '--snap=2', '--dump=1', '--ema_mode=mode1', '--dropout=0']
NAME = 'digits-uncond-ddpmpp-edm-gpus1-batch100-fp32'


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits.zip', count=100)


def config_of(*args):
    """The settings that options make, with required ones filled in."""
    return train.settings(['--outdir=x', '--data=y', *args])


def train_here(outdir, data, *args):
    """Trains in this process, as the command does, and returns the run's folder."""
    result = click.testing.CliRunner().invoke(train.main, [f'--outdir={outdir}', f'--data={data}', *TINY, *args])
    assert result.exit_code == 0, result.output + repr(result.exception)
    line = next(line for line in result.output.splitlines() if line.startswith('Run: '))
    return line.removeprefix('Run: ')


@pytest.fixture(scope='module')
def finished(tmp_path_factory, digits):
    return train_here(tmp_path_factory.mktemp('runs'), digits, '--seed=3')


def rows(run_dir):
    with open(os.path.join(run_dir, 'stats.jsonl')) as f:
        return [json.loads(line) for line in f]


def losses(run_dir):
    return [(row['nimg'], row['Loss/loss']['mean']) for row in rows(run_dir)]


def weights(run_dir):
    state = Checkpoints(str(run_dir)).load_newest()
    return {**state['net'], **{'ema.' + key: value for key, value in state['ema'][''].items()}}


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'configs_memorization*'), ids=str)
def test_options_and_defaults_are_those_of_the_study(case):
    ours = {option: param for param in train.main.params for option in param.opts}
    unset = train.main.make_context('train.py', ['--outdir=x', '--data=y']).params
    defaults = config_of()
    for option in case.json['options']:
        name, default = option['option'], option['default']
        param = ours[name]
        if default is None:
            assert unset[param.name] in (None, False, 'x', 'y'), option
            continue
        given = config_of(f'{name}={default.strip(chr(39))}')  # as if it had been left out
        assert given | {param.name: None} == defaults | {param.name: None}, option
        assert unset[param.name] in (None, given[param.name]), option


VALUES = {'INT': '2', 'FLOAT': '0.5', 'MIMG': '1', 'KIMG': '3', 'TICKS': '4', 'BOOL': '0', 'LIST': '1,0', 'STR': 'a',
          'PKL|URL': 'a.pkl', 'PT': '.'}


@pytest.mark.parametrize('case', golden_cases.cases('math', 'configs_memorization*'), ids=str)
def test_every_option_of_the_study_is_accepted_whatever_the_others(case):
    """Also those that have no effect: the momentum of Adam, the embedding of ADM."""
    options = {option['option']: option['metavar'] for option in case.json['options']}
    words = [f'{name}={VALUES[metavar]}' for name, metavar in options.items() if metavar in VALUES]
    chosen = [[f'{name}={choice}' for choice in metavar.split('|')] for name, metavar in options.items()
              if metavar and '|' in metavar and metavar not in VALUES and name != '--data']
    for choices in itertools.product(*chosen):
        assert config_of('--nosubdir', *words, *choices)['momentum'] == 0.5


def test_a_final_factor_of_zero_keeps_no_average(digits):
    config = config_of('--ema_mode=mode4', '--final-ema=0.0', '--num-channels=8')
    averages = dict(train.prepare(config | dict(data=digits))[2].averages, name=None)
    del averages['name']
    assert schedules.memorization_beta(**averages)(10**7, 512) == 0


@pytest.mark.parametrize('options, note', [
    (['--momentum=0.5'], '--momentum=0.5 has no effect without --optimizer=SGD'),
    (['--final-ema=0'], '--final-ema=0.0 has no effect without --ema_mode=mode4'),
    (['--ema_mode=mode3', '--ema=1'], '--ema=1.0 has no effect'),
    (['--arch=adm', '--embed=fourier'], '--embed=fourier has no effect')])
def test_an_option_without_effect_is_noted(digits, capsys, options, note):
    train.prepare(config_of('--num-channels=16', '--augment=0', '--cres=1', *options) | dict(data=digits))
    assert note in capsys.readouterr().out
    train.prepare(config_of('--num-channels=16', '--augment=0', '--cres=1') | dict(data=digits))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('case, name', golden_cases.variants(
    'math', 'configs_memorization*', lambda c: c.json['architectures']), ids=golden_cases.ids)
def test_architectures(case, name):
    published = case.json['architectures'][name]
    embedding = [f'--embed={published["embedding"]}'] if 'embedding' in published else []
    network = config_of(f'--arch={name}', '--augment=0', *embedding)['network']
    renamed = dict(embedding='embedding_type', encoder='encoder_type', decoder='decoder_type')
    if embedding:                                              # the option wins, with its default too
        default, = (option['default'] for option in case.json['options'] if option['option'] == '--embed')
        assert config_of(f'--arch={name}')['network']['embedding_type'] == default.strip("'")
    for key, value in case.json['architectures'][name].items():
        assert network[renamed.get(key, key)] == value, key


def test_options_reach_the_network(digits):
    out = run('train.py', '--outdir=x', f'--data={digits}', '-n', '--cond=1', '--arch=ncsnpp', '--precond=ve', '--cbase=16',
              '--cres=1,2', '--num-blocks=2', '--attn-resolutions=4', '--embed=positional', '--dropout=0.25',
              '--augment=0.5', '--skip-connections=[1, 0, 1, 1, 0, 1]', '--desc=words', '--duration=10').stdout
    config = json.loads(out)
    assert config['network'] == dict(
        class_name='VEPrecond', model_type='SongUNet', model_channels=16, channel_mult=[1, 2], num_blocks=2,
        attn_resolutions=[4], embedding_type='positional', dropout=0.25, augment_dim=9, skip_connections=[1, 0, 1, 1, 0, 1],
        encoder_type='residual', decoder_type='standard', channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
        precision='fp32', img_resolution=8, img_channels=3, label_dim=10)
    assert config['schedule'] == dict(total_kimg=20, ema_halflife_kimg=1, lr_rampup_kimg=20, data_ratio=500)
    assert config['name'] == 'digits-cond-ncsnpp-ve-gpus1-batch512-fp32-words'


def test_duration_rules():
    scaled = train.schedule(config_of('--duration=2000'), 2000)
    assert scaled == dict(total_kimg=80_000, ema_halflife_kimg=20, lr_rampup_kimg=400, data_ratio=25)
    fixed = train.schedule(config_of('--duration=2000', '--duration-rule=fixed'), 2000)
    assert fixed == dict(total_kimg=2_000_000, ema_halflife_kimg=500, lr_rampup_kimg=10_000, data_ratio=1)


def test_lengths_are_as_many_thousands_of_images_as_they_say():
    """In floating point, 0.018 times a thousand is less than 18."""
    for kimg in range(1, 2000):
        million = repr(kimg / 1000)
        lengths = train.schedule(config_of('--duration-rule=fixed', f'--duration={million}', f'--rampup={million}'), 2000)
        assert lengths['total_kimg'] == lengths['lr_rampup_kimg'] == kimg


@pytest.mark.parametrize('text', ['[1, 0, 1]', '1,0,1', '101', '(1 0 1)'])
def test_forms_of_skip_patterns(text):
    assert train.parse_skips(text) == [1, 0, 1]


@pytest.mark.parametrize('precond, network', [('vp', VPPrecond), ('ve', VEPrecond), ('edm', EDMPrecond)])
@pytest.mark.parametrize('arch', ['ddpmpp', 'ncsnpp', 'adm'])
def test_every_architecture_trains_under_every_preconditioning(digits, tmp_path, arch, precond, network):
    run_dir = train_here(tmp_path, digits, f'--arch={arch}', f'--precond={precond}', '--duration=0.001', '--batch=500',
                         '--batch-gpu=50', '--tick=1', '--snap=0', '--dump=1', '--augment=0.5', '--cond=1',
                         '--num-channels=4', '--cres=1', '--rampup=0')
    state = Checkpoints(run_dir).load_newest()
    net = build_network(**json.load(open(os.path.join(run_dir, 'training_options.json')))['network'])
    net.load_state_dict(state['net'])
    assert isinstance(net, network) and all(value.isfinite().all() for value in state['net'].values())
    assert state['nimg'] == 1000 and np.isfinite(losses(run_dir)[-1][1])


def test_sgd_follows_its_equation(digits, tmp_path):
    """v = momentum v + g + decay w, w -= lr v. Where decay outweighs the gradient it gives the norm of the weights."""
    rate, decay, momentum = 1e-8, 1e6, 0.5
    run_dir = train_here(tmp_path, digits, '--optimizer=SGD', f'--momentum={momentum}', f'--weight-decay={decay}',
                         f'--lr={rate}', '--rampup=0', '--seed=0', '--snap=0', '--tick=1')
    torch.manual_seed(0)
    before = build_network(**runs.read_options(run_dir)['network']).state_dict()
    after = Checkpoints(run_dir).load_newest()['net']
    factor, velocity = 1.0, 0.0
    for step in range(10):
        velocity = momentum * velocity + decay * factor
        factor -= rate * velocity if step else 0                # before the first image the learning rate is zero
    name = 'model.map_layer1.weight'
    torch.testing.assert_close(after[name], before[name] * factor, rtol=1e-3, atol=1e-3)
    assert factor < 0.9


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_everything(finished):
    assert os.path.basename(finished) == f'00000-{NAME}'
    names = set(os.listdir(finished))
    assert {'training_options.json', 'log.txt', 'stats.jsonl', 'loss.png', 'samples-0000001.png',
            'network-snapshot-0000001.pkl', 'training-state-0000001.pt'} <= names
    assert [nimg for nimg, _ in losses(finished)] == [300, 500, 800, 1000]
    options = runs.read_options(finished)
    assert options['seed'] == 3 and options['schedule']['total_kimg'] == 1


def test_snapshots_keep_all_digits_and_sample(finished):
    snapshot = load_snapshot(os.path.join(finished, 'network-snapshot-0000001.pkl'))
    ema = Checkpoints(finished).load_newest()['ema']['']
    assert all(torch.equal(value, ema[name]) for name, value in snapshot.net.state_dict().items())
    images = next(generate_images(snapshot.net, snapshot.encoder, range(3), num_steps=3)).images
    assert images.shape == (3, 3, 8, 8) and snapshot.recipe['arch'] == 'ddpmpp'


def test_the_average_follows_its_mode(digits, tmp_path):
    """mode3 hardly moves in 1000 images, mode1 follows with 5% of the images seen."""
    ends = {}
    for mode in ('mode1', 'mode3'):
        state = Checkpoints(train_here(tmp_path / mode, digits, f'--ema_mode={mode}', '--seed=1', '--snap=0')).load_newest()
        torch.manual_seed(1)
        start = build_network(**runs.read_options(tmp_path / mode / f'00000-{NAME}')['network']).state_dict()
        name = 'model.map_layer1.weight'
        ends[mode] = (state['ema'][''][name] - start[name]).norm() / (state['net'][name] - start[name]).norm()
    assert ends['mode3'] < 0.01 and 0.5 < ends['mode1'] < 1.2


def test_training_reduces_the_loss(digits, tmp_path):
    run_dir = train_here(tmp_path, digits, '--duration=0.005', '--tick=0.5', '--snap=0', '--lr=1e-2', '--augment=0')
    curve = [loss for _, loss in losses(run_dir)]
    assert np.mean(curve[-2:]) < 0.6 * curve[0]


def test_mirror_images_double_the_data_and_all_that_goes_by_their_number(digits):
    config = config_of('--xflip=1', '--duration=25', '--rampup=5', '--num-channels=8')
    dataset, _, _, plan = train.prepare(config | dict(data=digits))
    assert len(dataset) == 200
    assert plan == dict(total_kimg=100, ema_halflife_kimg=2, lr_rampup_kimg=20, data_ratio=250)


def test_runs_are_found_by_what_the_options_make(tmp_path):
    """Runs of earlier versions, where NCSN++ had another embedding and mirror images did not count, are others."""
    lengths = train.schedule(config_of(), 1000)
    found = config_of() | {'schedule': lengths, 'embed': None}

    def chosen(*options, images=1000):
        config = config_of(*options)
        return train.choose_run(config, str(tmp_path), 'x', False, train.schedule(config, images))[0][-7:]

    (tmp_path / '00000-x').mkdir()
    (tmp_path / '00000-x' / 'training_options.json').write_text(json.dumps(found))
    assert chosen() == chosen('--embed=positional') == '00000-x'
    assert chosen('--embed=fourier') == chosen('--lr=1') == chosen(images=2000) == chosen('--transfer=a') == '00001-x'


# --- Order and processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(finished, digits, tmp_path):
    run('train.py', f'--outdir={tmp_path}', f'--data={digits}', *TINY, '--seed=3', processes=2)
    two = tmp_path / f'00000-{NAME}'.replace('gpus1', 'gpus2')
    np.testing.assert_allclose([loss for _, loss in losses(two)], [loss for _, loss in losses(finished)], rtol=1e-4)


def test_the_window_changes_the_order(finished, digits, tmp_path):
    fixed = train_here(tmp_path, digits, '--seed=3', '--window-size=0', '--snap=0')
    assert losses(fixed)[0] != losses(finished)[0]


# --- Stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_restarted_it_ends_with_the_same_weights(finished, digits, tmp_path):
    """The same command finds its run, and the order of the data with it; afterwards it starts a new one."""
    arguments = command('train.py', f'--outdir={tmp_path}', f'--data={digits}', *TINY, '--seed=3')
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / f'00000-{NAME}'
    while process.poll() is None and not (folder / 'training-state-0000000.pt').exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() != 0 and os.listdir(tmp_path) == [folder.name]
    assert train_here(tmp_path, digits, '--seed=3') == str(folder)
    assert 'Resuming from' in (folder / 'log.txt').read_text()
    expected, resumed = weights(finished), weights(folder)
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert losses(folder) == losses(finished)
    assert os.path.basename(train_here(tmp_path, digits, '--seed=3', '--snap=0')).startswith('00001-')


def test_resume_from_a_state_makes_a_new_run_and_from_a_folder_goes_on_in_it(finished, digits, tmp_path):
    state = os.path.join(finished, 'training-state-0000001.pt')
    longer = ['--duration=0.002', '--seed=3', '--snap=0']
    new = train_here(tmp_path, digits, *longer, f'--resume={state}')
    assert new == str(tmp_path / f'00000-{NAME}')
    assert [nimg for nimg, _ in losses(new)] == [1300, 1500, 1800, 2000]
    further = train_here(tmp_path, digits, '--duration=0.003', '--snap=0', f'--resume={new}')   # without --seed: the run's
    assert further == new and losses(new)[-1][0] == 3000
    whole = weights(train_here(tmp_path / 'whole', digits, '--duration=0.003', '--seed=3', '--snap=0'))
    assert all(torch.equal(value, whole[name]) for name, value in weights(new).items())


def test_without_a_seed_each_run_has_its_own(digits, tmp_path):
    first, second = (train_here(tmp_path, digits, '--snap=0', '--dump=0') for _ in range(2))
    assert first != second and runs.read_options(first)['seed'] != runs.read_options(second)['seed']


def test_nosubdir_and_desc(digits, tmp_path):
    assert train_here(tmp_path / 'a', digits, '--nosubdir', '--snap=0') == str(tmp_path / 'a')
    assert train_here(tmp_path, digits, '--desc=try', '--snap=0').endswith('fp32-try')


def test_transfer_starts_from_the_weights_of_a_snapshot(finished, digits, tmp_path):
    net = os.path.join(finished, 'network-snapshot-0000001.pkl')
    run_dir = train_here(tmp_path, digits, f'--transfer={net}', '--lr=1e-12', '--snap=0')
    source = load_snapshot(net).net.state_dict()
    state = Checkpoints(run_dir).load_newest()
    for name, value in state['net'].items():
        torch.testing.assert_close(value, source[name], rtol=0, atol=1e-8)
    averages = state['recipe']['averages']
    del averages['name']
    beta = schedules.memorization_beta(**averages)             # no ramp: that of 500 kimg from the first step on
    assert beta(0, 100) == beta(10**9, 100) == 0.5 ** (100 / 500_000)


def test_the_average_of_transferred_weights_has_no_ramp(digits):
    config = config_of('--transfer=x', '--num-channels=8', '--duration-rule=fixed')
    averages = dict(train.prepare(config | dict(data=digits))[2].averages)
    assert averages.pop('name') == 'memorization'
    assert round(schedules.memorization_beta(**averages)(0, 512), 5) == 0.99929


@pytest.mark.parametrize('classes', [0, 3, 10])
def test_weights_are_transferred_to_data_of_other_classes(classes, digits, tmp_path):
    """The number of classes is the largest label + 1; what labels go through starts anew."""
    shape = dict(model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[],
                 img_resolution=8, img_channels=3, class_name='EDMPrecond')
    path = str(tmp_path / 'net.pkl')
    source = build_network(**shape, label_dim=classes)
    save_snapshot(path, source, encoder=RGBEncoder(), dataset={}, recipe={}, dtype=torch.float32)
    out = helpers.invoke('train.py', f'--outdir={tmp_path}', '--nosubdir', f'--data={digits}', '--cond=1', f'--transfer={path}',
                         *TINY, '--cres=1', '--attn-resolutions=4', '--augment=0', '--lr=1e-12', '--snap=0', '--seed=0')
    assert (f'has {classes} classes and the data 10' in out) == (classes != 10)
    state = Checkpoints(str(tmp_path)).load_newest()['net']
    for name, value in source.state_dict().items():
        if name != 'model.map_label.weight' or classes == 10:
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-8)
    assert state['model.map_label.weight'].shape[1] == 10


def test_a_folder_is_used_by_one_run_at_a_time(finished, digits, tmp_path):
    with runs.locked(finished):
        assert 'another process' in fails('train.py', f'--outdir={tmp_path}', f'--data={digits}', *TINY, '--seed=3',
                                          f'--resume={finished}')


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, message', [
    (['--num-channels=16'], 'model_channels'), (['--arch=adm'], 'model_type'), (['--precond=vp'], 'VPPrecond'),
    (['--batch=50'], '--batch'), (['--seed=4'], '--seed'), (['--optimizer=SGD'], '--optimizer'),
    (['--window-size=0'], '--window-size')])
@pytest.mark.parametrize('kind', ['folder', 'state'])
def test_another_recipe_does_not_resume(finished, digits, tmp_path, kind, options, message):
    place = finished if kind == 'folder' else os.path.join(finished, 'training-state-0000001.pt')
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(finished)}
    error = fails('train.py', f'--outdir={tmp_path / "runs"}', f'--data={digits}', *TINY, '--seed=3', f'--resume={place}',
                  *options)
    assert message in error and finished in error
    assert before == {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(finished)}
    assert not (tmp_path / 'runs').exists()


def test_weights_of_another_architecture_are_not_transferred(finished, digits, tmp_path):
    net = os.path.join(finished, 'network-snapshot-0000001.pkl')
    error = fails('train.py', f'--outdir={tmp_path / "runs"}', f'--data={digits}', *TINY, '--num-channels=16',
                  f'--transfer={net}')
    assert '--transfer' in error and not (tmp_path / 'runs').exists()


def test_other_files_in_the_folder_of_runs_are_passed_over(tmp_path):
    (tmp_path / '00007-else').mkdir()
    (tmp_path / '00007-else' / 'mine.txt').write_text('')
    (tmp_path / 'notes.txt').write_text('')
    for name in ('x', 'else'):
        assert runs.choose_folder(str(tmp_path), name, {'seed': 1}, 1, True, True) == str(tmp_path / f'00008-{name}')


def test_a_run_that_was_killed_before_its_record_is_begun_again(tmp_path):
    folder = tmp_path / '00003-x'
    folder.mkdir()
    for name in ('log.txt', '.training_options.json.0123abcd.tmp'):
        assert runs.choose_folder(str(tmp_path), 'x', {'seed': 1}, 1, True, True) == str(folder)
        (folder / name).write_text('Data')
    assert runs.choose_folder(str(tmp_path), 'x', {'seed': 1}, 1, True, True) == str(folder)
