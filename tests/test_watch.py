"""What a run shows while it trains: boards, pictures, measurements of the averages, and the best of them."""

import itertools
import json
import os
import signal

import helpers
import numpy as np
import pytest
import test_divergence
import torch
from helpers import script_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dnnlib import pictures
from dnnlib.util import subset
from torch_utils.random import GlobalRandom
from torch_utils.stats import BINS, LEVELS, RunningMeans
from training import loop, recipe, watch
from training.data.images import open_dataset
from training.diffusion.heldout import STRATA, heldout_loss
from training.diffusion.losses import EDMLoss
from training.encoders import RGBEncoder
from training.networks.optimal import optimal_denoiser
from training.snapshot import load_snapshot

TINY = ('--preset=digits', '--batch=8', '--duration=32', '--channels=4', '--status=16', '--snapshot=32', '--checkpoint=32',
        '--cond=False')


teacher = test_divergence.teacher


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return helpers.write_digits(tmp_path_factory.mktemp('data') / 'digits.zip', 40)


def rows_of(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Boards ---------------------------------------------------------------------------------------


def test_boards_get_numbers_and_pictures_under_one_id(tmp_path, monkeypatch, digits):
    """TensorBoard and W&B: losses by noise level, gradients, grids; the same id after a restart and a move."""
    helpers.fake_wandb(tmp_path, monkeypatch)
    monkeypatch.setattr(recipe, 'save_sample_grid', lambda path, *_, **__: pictures.save_image_grid(
        path, np.zeros([4, 3, 8, 8], np.uint8)))

    def train(run, *more):
        out = helpers.invoke('train_edm2.py', f'--outdir={tmp_path / run}', f'--data={digits}', '--wandb=P', *TINY, *more)
        return out, rows_of(tmp_path / 'wandb.json')[-1]

    _, (project, _, name, batch, resume, run_id) = train('a')
    assert (project, name, batch, resume) == ('P', 'a', 8, 'allow') and len(run_id) == 16
    (tmp_path / 'a').rename(tmp_path / 'moved')
    assert train('moved', '--duration=48')[1][-1] == run_id
    assert train('b', '--snapshot=0')[1][-1] != run_id
    events = EventAccumulator(str(tmp_path / 'moved')).Reload()
    scalars = set(events.Tags()['scalars'])
    assert {'Loss/loss', 'Progress/grad_norm', 'Timing/sec_per_kimg'} <= scalars
    assert [event.step for event in events.Images('Samples')] == [32, 48]
    by_level = {name for name in scalars if name.startswith('LossAtSigma/')}
    assert by_level and by_level <= {f'LossAtSigma/{bin}' for bin in BINS}
    logged = rows_of(tmp_path / 'wandb.jsonl')
    shapes = [values['Samples']['picture'] for step, values in logged if 'Samples' in values]
    assert len(shapes) == 2 and shapes[0][2] == 3
    stats = {step: values for step, values in logged if 'Loss/loss' in values}
    assert {16, 32, 48} == set(stats) and set(stats[48]) & by_level


def test_a_folder_called_wandb_is_no_package(tmp_path, monkeypatch, digits):
    """Which W&B itself makes beside a script."""
    (tmp_path / 'wandb').mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    error = helpers.fails('train_edm2.py', f'--outdir={tmp_path / "run"}', f'--data={digits}', '--wandb=P', *TINY)
    assert 'needs the package wandb' in error and not os.path.exists(tmp_path / 'run')


def test_means_by_noise_level():
    means = RunningMeans('cpu')
    sigma = torch.tensor([0.001, 0.02, 0.025, 50.0, 1e4])
    for part in (slice(0, 3), slice(3, 5)):
        means.add_by_level('L', torch.arange(5.0)[part], sigma[part])
    state = means.state_dict()
    other = RunningMeans('cpu')
    other.load_state_dict(state)
    wanted = {'L/0-0.01': 0.0, 'L/0.01-0.03': 1.5, 'L/30-100': 3.0, 'L/100-inf': 4.0}
    assert {name: row['mean'] for name, row in other.report().items()} == wanted
    assert other.report() == {} and len(BINS) == len(LEVELS) + 1


# --- Measurements ---------------------------------------------------------------------------------

WATCHED = ('--eval=fd_pixels,recall_pixels', '--eval-num=24', '--eval-steps=2', '--eval-every=16')


@pytest.fixture(scope='module')
def heldout(tmp_path_factory):
    return helpers.write_digits(tmp_path_factory.mktemp('data') / 'heldout.zip', 20, first=200)


def arguments(out, digits, heldout, *more):
    return (f'--outdir={out}', f'--data={digits}', f'--heldout={heldout}', *TINY, '--duration=64', '--snapshot=0',
            '--checkpoint=16', *WATCHED, *more)


@pytest.fixture(scope='module')
def measured(tmp_path_factory, digits, heldout):
    """A run that was measured four times, and what it printed."""
    run = tmp_path_factory.mktemp('measured') / 'run'
    return run, helpers.invoke('train_edm2.py', *arguments(run, digits, heldout, '--keep-best=True', '--lr=0.02'))


def test_averages_are_measured_and_the_best_is_kept(measured, digits, heldout, tmp_path):
    run, printed = measured
    rows = rows_of(run / 'metrics.jsonl')
    assert [(row['nimg'], row['average']) for row in rows] == [
        (nimg, average) for nimg in (16, 32, 48, 64) for average in ('0.050', '0.100')]
    for row in rows:
        assert row['fd_pixels'] > 0 and 0 <= row['recall_pixels'] <= 1 and row['heldout_se'] > 0
        assert set(row['heldout_by_sigma']) <= set(BINS)
    best = min(rows, key=lambda row: row['fd_pixels'])
    snapshot = load_snapshot(str(run / 'network-best.pkl'))
    assert snapshot.nimg == best['nimg'] and f'{snapshot.ema_std:.3f}' == best['average']
    assert f'Best so far: fd_pixels {best["fd_pixels"]:.6g}' in printed
    scalars = EventAccumulator(str(run)).Reload().Tags()['scalars']
    assert {'Eval/fd_pixels-0.050', 'Eval/heldout-0.100'} <= set(scalars)
    # The same loss by the command, of the snapshot (whose weights are float16).
    dest = tmp_path / 'heldout.json'
    helpers.invoke('calculate_metrics.py', 'heldout', f'--net={run / "network-best.pkl"}', f'--data={heldout}',
                   f'--baseline={run / "network-best.pkl"}', f'--dest={dest}')
    results = json.loads(dest.read_text())['results']
    assert results['heldout'] == pytest.approx(best['heldout'], rel=1e-3) and results['difference'] == 0


class Killed(BaseException):
    """As sudden as kill -9, for a run in this process."""


def fail_at(call: int, function, error):
    """The function, which calls `error` at its call of that number."""
    calls = itertools.count(1)

    def failing(*args):
        if next(calls) == call:
            error()
        return function(*args)

    return failing


def kill():
    raise Killed


@pytest.mark.parametrize('where, call', [('measurement', 3), ('measurement', 7), ('step', 7)])
def test_a_killed_run_measures_the_same(measured, digits, heldout, tmp_path, monkeypatch, where, call):
    """Within a measurement behind its checkpoint or with an older one, or after one that is not in the checkpoint."""
    run, _ = measured
    line = arguments(tmp_path, digits, heldout, '--keep-best=True', '--lr=0.02', '--checkpoint=32')
    with monkeypatch.context() as patch:
        if where == 'step':
            patch.setattr(loop.Trainer, '_step', fail_at(call, loop.Trainer._step, kill))
        else:
            patch.setattr(watch, 'heldout_loss', fail_at(call, watch.heldout_loss, kill))
        with pytest.raises(Killed):
            script_module('train_edm2.py').main(line, standalone_mode=False)
    count = len(rows_of(tmp_path / 'metrics.jsonl'))
    assert count == {('measurement', 3): 2, ('measurement', 7): 6, ('step', 7): 6}[where, call]
    assert 'Resuming' in helpers.invoke('train_edm2.py', *line) or call == 3
    assert (tmp_path / 'metrics.jsonl').read_bytes() == (run / 'metrics.jsonl').read_bytes()
    assert load_snapshot(str(tmp_path / 'network-best.pkl')).nimg == load_snapshot(str(run / 'network-best.pkl')).nimg


def test_a_stop_within_a_measurement_ends_it_and_it_is_made_then(measured, digits, heldout, tmp_path, monkeypatch):
    line = arguments(tmp_path, digits, heldout, '--lr=0.02')
    with monkeypatch.context() as patch:
        patch.setattr(watch, 'heldout_loss', fail_at(4, watch.heldout_loss, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert 'Stopped at 32 images' in helpers.invoke('train_edm2.py', *line)
    assert len(rows_of(tmp_path / 'metrics.jsonl')) == 2
    helpers.invoke('train_edm2.py', *line)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == (measured[0] / 'metrics.jsonl').read_bytes()


def test_a_run_that_gets_no_better_ends(digits, heldout, tmp_path):
    run = tmp_path / 'run'
    line = arguments(run, digits, heldout, '--patience=1', '--keep-best=True', '--lr=1e-9', '--eval-num=8')
    printed = helpers.invoke('train_edm2.py', *line)
    rows = rows_of(run / 'metrics.jsonl')
    assert 'Ended early: fd_pixels was best after' in printed and rows[-1]['nimg'] < 64
    assert 'Already complete' in helpers.invoke('train_edm2.py', *line)
    assert rows_of(run / 'metrics.jsonl') == rows


def test_two_processes_measure_the_same(measured, digits, heldout, tmp_path):
    run, _ = measured
    helpers.run('train_edm2.py', *arguments(tmp_path / 'run', digits, heldout, '--lr=0.02'), processes=2)
    for one, two in zip(rows_of(run / 'metrics.jsonl'), rows_of(tmp_path / 'run' / 'metrics.jsonl'), strict=True):
        levels = one.pop('heldout_by_sigma'), two.pop('heldout_by_sigma')
        assert two.pop('average') == one.pop('average')
        assert two == pytest.approx(one, rel=1e-3) and levels[1] == pytest.approx(levels[0], rel=1e-3)


@pytest.mark.parametrize('trainer', ['edm', 'long_tail', 'image_train', 'image_kd'])
def test_every_training_is_measured(digits, heldout, tmp_path, trainer, request):
    """All options of the group, by their names in each script."""
    weights = request.getfixturevalue('teacher') if trainer == 'image_kd' else None
    script, *given = test_divergence.command(trainer, digits, weights)
    given = [arg.replace('1e30', '1e-4').replace('1e3', '1e-4') for arg in given]
    dest = '--logdir' if trainer == 'long_tail' else '--outdir'
    name = '--eval_metrics' if trainer == 'long_tail' else '--eval'
    no_grids = {'edm': ['--snap=0'], 'long_tail': ['--sample_step=0', '--img_channels=3']}.get(trainer, [])
    out = helpers.invoke(script, *given, *no_grids, f'{dest}={tmp_path}', f'{name}=fd_pixels', '--eval_num=16', '--eval_steps=2',
                         '--eval_every=100000', f'--heldout={heldout}', f'--eval_ref={digits}', '--keep_best=true')
    rows = rows_of(tmp_path / 'metrics.jsonl')
    assert rows and {'fd_pixels', 'heldout', 'heldout_se'} <= set(rows[-1]) and (tmp_path / 'network-best.pkl').is_file()
    assert 'Measured after' in out and rows[-1]['heldout'] > 0


# --- The held-out loss ----------------------------------------------------------------------------


def test_the_heldout_loss_is_the_training_loss(digits, tmp_path):
    """Its mean is that of the loss over the levels of training; pairing shrinks the error of a difference."""
    data = open_dataset(digits)
    net = optimal_denoiser(data, 'cpu')

    class Shifted(torch.nn.Module):
        """Another denoiser."""
        label_dim = 0

        def __init__(self, by):
            super().__init__()
            self.by = torch.nn.Parameter(torch.tensor(by))

        def forward(self, x, sigma, labels=None):
            return net(x, sigma, labels) + self.by

    rule = EDMLoss()
    found = [heldout_loss(Shifted(by), rule, RGBEncoder(), data) for by in (0.1, 0.11)]
    torch.manual_seed(0)
    plain = [rule(Shifted(0.1), {'images': RGBEncoder().encode_latents(torch.from_numpy(data.images(range(40)))),
                                 'labels': None, 'random': GlobalRandom()})[1]['loss'] for _ in range(100)]
    mean = torch.stack(plain).mean(1)
    results = found[0].results()
    assert abs(results['heldout'] - mean.mean()) < 4 * (mean.std() / 10).item()
    difference, error = found[1].less_than(found[0])
    assert difference > 0 and error < 0.5 * results['heldout_se']
    again = heldout_loss(Shifted(0.1), rule, RGBEncoder(), data, num=10)
    rows = subset(40, 10, 0)
    torch.testing.assert_close(again.losses, found[0].losses[rows], rtol=1e-4, atol=1e-6)
    # One level of each share of the levels' distribution, in every row.
    u = torch.special.ndtr((torch.from_numpy(found[0].sigmas).log() - rule.P_mean) / rule.P_std)
    assert torch.equal((u * STRATA).floor(), torch.arange(STRATA).double().expand(40, -1))
