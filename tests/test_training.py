"""Training: the recipe of the presets, independence of the process count, exact resume, files, and errors."""

import glob
import json
import os
import signal
import socket
import subprocess
import time
import types

import golden_cases
import numpy as np
import pytest
import torch
from helpers import command, environment, fails, run, write_digits

import train_edm2
from dnnlib import UserError
from torch_utils import distributed
from training import recipe
from training.checkpoint import Checkpoints
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot

# A network of a few thousand parameters; 20 steps of 16 images.
TINY = ['--preset=digits', '--channels=8', '--batch=16', '--duration=320', '--status=64', '--snapshot=160', '--checkpoint=64']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits.zip')


def train(outdir, data, *args, **kwargs):
    return run('train_edm2.py', f'--outdir={outdir}', f'--data={data}', *TINY, *args, **kwargs)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, digits):
    """A run that was never stopped."""
    outdir = tmp_path_factory.mktemp('runs') / 'plain'
    train(outdir, digits)
    return outdir


def weights(outdir):
    """Network and averages at the end of a run, by name."""
    state = Checkpoints(str(outdir)).load_newest()
    parts = [('net', state['net'])] + [(f'ema{i}', ema) for i, ema in state['ema'].items()]
    return {f'{part}.{name}': value for part, values in parts for name, value in values.items()}


def losses(outdir):
    with open(outdir / 'stats.jsonl') as f:
        return [(row['nimg'], row['Loss/loss']['mean']) for row in map(json.loads, f)]


# --- Recipe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case, name', [
    pair for pattern in ('presets_edm2', 'presets_multisource')
    for pair in golden_cases.variants('math', pattern, lambda c: c.json['presets'])], ids=golden_cases.ids)
def test_presets(case, name):
    expected, ours = case.json['presets'][name], train_edm2.PRESETS[name]
    for key, value in expected.items():
        if key == 'batches':
            assert ours['duration'] / ours['batch'] == value
        else:
            assert ours[key] == value
    common = case.json['common']
    config = train_edm2.settings(['--outdir=x', '--data=y', f'--preset={name}'])
    assert (config['rampup_Mimg'], config['ema_stds']) == (common['rampup_Mimg'], common['ema_stds'])
    assert config['lr_schedule'] == ('multisource' if 'img256' in name else 'edm2')
    for key in ('snapshot', 'checkpoint', 'status'):
        assert config[key] == common[f'{key}_nimg']


def test_options_override_the_preset(digits):
    out = run('train_edm2.py', '--outdir=x', f'--data={digits}', '--preset=digits', '--dry-run', '--duration=1.5Ki', '--lr=0.5',
              '--decay=7', '--P_mean=-2', '--P_std=3', '--dropout=0.25', '--channels=64', '--batch=32', '--batch-gpu=8',
              '--lr-schedule=multisource', '--ls=100', '--seed=5', '--status=0', '--precision=bf16', '--cond=False').stdout
    assert 'rises over 0.0004167 million images, 27% of this run' in out
    config = json.loads(out[out.index('{'):])
    expected = dict(duration=1536, lr=0.5, decay=7, P_mean=-2, P_std=3, dropout=0.25, channels=64, batch=32, batch_gpu=8,
                    lr_schedule='multisource', ls=100, seed=5, status=0, precision='bf16', cond=False)
    assert {key: config[key] for key in expected} == expected
    assert config['network'] == dict(class_name='Precond', model_channels=64, dropout=0.25, precision='bf16', label_dim=0,
                                     img_resolution=8, img_channels=3, channel_mult=[1, 2], num_blocks=1,
                                     attn_resolutions=[4], channels_per_head=32)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_everything(finished):
    names = set(os.listdir(finished))
    assert {'training_options.json', 'log.txt', 'stats.jsonl', 'loss.png', 'samples-0000000.png'} <= names
    assert {f'network-snapshot-0000000-{std}.pkl' for std in ('0.050', '0.100')} <= names
    assert 'training-state-0000000.pt' in names and any('tfevents' in name for name in names)
    assert not [name for name in names if name.startswith('.')]
    assert [nimg for nimg, _ in losses(finished)] == [64, 128, 192, 256, 320]
    options = json.loads((finished / 'training_options.json').read_text())
    assert options['preset'] == 'digits' and options['dataset']['label_dim'] == 10


def test_training_reduces_the_loss(tmp_path, digits):
    train(tmp_path / 'run', digits, '--duration=4Ki', '--status=512', '--lr=0.02', '--snapshot=0')
    curve = [loss for _, loss in losses(tmp_path / 'run')]
    assert np.mean(curve[-2:]) < 0.6 * curve[0]


def test_a_snapshot_is_enough_to_sample(finished):
    snapshot = load_snapshot(str(finished / 'network-snapshot-0000000-0.100.pkl'))
    assert snapshot.nimg == 320 and snapshot.ema_std == 0.1 and snapshot.dataset['label_dim'] == 10
    ema = Checkpoints(str(finished)).load_newest()['ema']['0.100']
    for name, value in snapshot.net.state_dict().items():
        torch.testing.assert_close(value, ema[name], rtol=1e-3, atol=1e-6)   # stored in half precision


def test_snapshots_run_no_code(tmp_path, finished):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)

    torch.save({'format': 'diffusion-snapshot-1', 'state': Evil()}, tmp_path / 'evil.pkl')
    with pytest.raises(UserError, match='evil.pkl'):
        load_snapshot(str(tmp_path / 'evil.pkl'))
    assert not (tmp_path / 'evil').exists()
    whole = (finished / 'network-snapshot-0000000-0.100.pkl').read_bytes()
    (tmp_path / 'half.pkl').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match='half.pkl'):
        load_snapshot(str(tmp_path / 'half.pkl'))


def test_buffers_of_a_snapshot_keep_their_precision(tmp_path):
    from training.encoders import RGBEncoder
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=0, model_channels=8, channel_mult=[1],
                        num_blocks=1)
    save_snapshot(tmp_path / 'net.pkl', net, encoder=RGBEncoder(), dataset={}, recipe={}, nimg=0)
    loaded = load_snapshot(str(tmp_path / 'net.pkl')).net
    assert torch.equal(loaded.unet.emb_fourier.freqs, net.unet.emb_fourier.freqs)


# --- The same numbers however the work is split -----------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, digits, finished):
    train(tmp_path / 'two', digits, processes=2)
    one, two = losses(finished), losses(tmp_path / 'two')
    assert [nimg for nimg, _ in one] == [nimg for nimg, _ in two]
    np.testing.assert_allclose([loss for _, loss in two], [loss for _, loss in one], rtol=1e-4)


def test_micro_batches_train_as_whole_batches(tmp_path, digits, finished):
    train(tmp_path / 'micro', digits, '--batch-gpu=5', '--dropout=0')
    micro, whole = losses(tmp_path / 'micro'), losses(finished)
    np.testing.assert_allclose([loss for _, loss in micro], [loss for _, loss in whole], rtol=1e-4)


def test_bf16_on_the_cpu_is_close_to_fp32(tmp_path, digits, finished):
    train(tmp_path / 'bf16', digits, '--precision=bf16')
    half, full = losses(tmp_path / 'bf16'), losses(finished)
    np.testing.assert_allclose([loss for _, loss in half], [loss for _, loss in full], rtol=0.05)
    assert half != full


@pytest.mark.parametrize('fast, precision, said', [(False, 'bf16', True), (True, 'bf16', False), (False, 'fp32', False)])
def test_bf16_is_said_to_be_slow_where_it_is(fast, precision, said, monkeypatch):
    monkeypatch.setattr(distributed, 'has_fast_bf16', lambda: fast)
    net = build_network('EDMPrecond', img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1], num_blocks=1,
                        precision=precision)
    plan = types.SimpleNamespace(dataset={}, loss={'name': 'edm'}, batch=1, total_nimg=1)
    assert any('bf16 is slower' in line for line in recipe._heading(plan, net, 'run', None)) == said


# --- Stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path, digits, finished):
    outdir = tmp_path / 'killed'
    arguments = command('train_edm2.py', f'--outdir={outdir}', f'--data={digits}', *TINY, '--checkpoint=32')
    rng = np.random.default_rng()
    kills = 0
    while kills < 4:
        process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known = set(glob.glob(f'{outdir}/*.pt')), _mtime(outdir)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:        # wait for the first new file, then some moment more
            if (set(glob.glob(f'{outdir}/*.pt')), _mtime(outdir)) != known:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    run('train_edm2.py', *arguments[2:])
    assert kills >= 1
    expected, resumed = weights(finished), weights(outdir)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert losses(outdir) == losses(finished)


def _mtime(outdir):
    states = glob.glob(f'{outdir}/training-state-*.pt')
    return max((os.stat(path).st_mtime_ns for path in states), default=0)


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(tmp_path, digits, finished):
    """--max-restarts: the processes find each other again, and go on from the checkpoint."""
    outdir = tmp_path / 'restarted'
    arguments = command('train_edm2.py', f'--outdir={outdir}', f'--data={digits}', *TINY, processes=2)
    arguments.insert(3, '--max-restarts=1')
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not os.path.exists(outdir / 'training-state-0000000.pt'):
        time.sleep(0.02)
    worker = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    one, two = losses(finished), losses(outdir)
    assert [nimg for nimg, _ in one] == [nimg for nimg, _ in two]
    np.testing.assert_allclose([loss for _, loss in two], [loss for _, loss in one], rtol=1e-4)
    assert len(json.loads((outdir / 'training_options.json').read_text())['starts']) == 2


@pytest.mark.slow
def test_a_run_on_two_nodes_goes_on_without_one_and_with_it_again(tmp_path, digits):
    """Elastic membership: two agents of torchrun, of which one is killed, is missed, and is started again."""
    outdir = tmp_path / 'elastic'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def agent(is_host):
        arguments = command('train_edm2.py', f'--outdir={outdir}', f'--data={digits}', *TINY, '--duration=6Ki', processes=1)
        conf = f'is_host={is_host},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3'
        arguments[3:4] = ['--nnodes=1:2', '--max-restarts=3', '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}',
                          f'--rdzv-conf={conf}']
        return subprocess.Popen(arguments, env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_for(happened):
        while not happened():
            assert agents[0].poll() is None
            time.sleep(0.05)

    def starts():
        return [start['processes'] for start in json.loads((outdir / 'training_options.json').read_text())['starts']]

    agents = [agent(1), agent(0)]
    wait_for(lambda: glob.glob(f'{outdir}/training-state-*.pt'))
    worker = subprocess.run(['pgrep', '-P', str(agents[1].pid)], capture_output=True, text=True).stdout.split()[-1]
    agents[1].kill()
    os.kill(int(worker), signal.SIGKILL)
    agents[1].wait()
    wait_for(lambda: starts() == [2, 1])
    agents[1] = agent(0)
    assert [process.wait(timeout=600) for process in agents] == [0, 0]
    assert starts() == [2, 1, 2]
    train(tmp_path / 'plain', digits, '--duration=6Ki', '--snapshot=0', '--checkpoint=0')
    expected, elastic = losses(tmp_path / 'plain'), losses(outdir)
    assert [nimg for nimg, _ in expected] == [nimg for nimg, _ in elastic]
    np.testing.assert_allclose([loss for _, loss in elastic], [loss for _, loss in expected], rtol=1e-3)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tmp_path, digits):
    outdir = tmp_path / 'stopped'
    arguments = command('train_edm2.py', f'--outdir={outdir}', f'--data={digits}', *TINY, '--duration=1Mi', '--checkpoint=0',
                        processes=2)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not os.path.exists(outdir / 'stats.jsonl'):
        time.sleep(0.05)
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    for worker in workers:
        os.kill(int(worker), signal.SIGTERM)
    assert process.wait(timeout=600) == 0
    state = Checkpoints(str(outdir)).load_newest()
    assert 0 < state['nimg'] < 1 << 20
    assert 'Stopped at' in (outdir / 'log.txt').read_text()


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, message', [
    (['--channels=16'], 'network'), (['--seed=1'], '--seed'), (['--batch=32'], '--batch'),
    (['--xflip=True', '--batch=32'], '--batch'), (['--xflip=True'], '--xflip')])
def test_another_recipe_does_not_resume(digits, finished, options, message):
    error = fails('train_edm2.py', f'--outdir={finished}', f'--data={digits}', *TINY, *options)
    assert message in error and str(finished) in error
