"""What a run shows while it trains: boards, pictures, measurements of the averages, and the best of them."""

import json
import os

import helpers
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_utils.stats import BINS, LEVELS, RunningMeans

TINY = ('--preset=digits', '--batch=8', '--duration=32', '--channels=4', '--status=16', '--snapshot=32', '--checkpoint=32',
        '--cond=False')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return helpers.write_digits(tmp_path_factory.mktemp('data') / 'digits.zip', 40)


def rows_of(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Boards ---------------------------------------------------------------------------------------


def test_boards_get_numbers_and_pictures_under_one_id(tmp_path, monkeypatch, digits):
    """TensorBoard and W&B: losses by noise level, gradients, grids; the same id after a restart and a move."""
    helpers.fake_wandb(tmp_path, monkeypatch)

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
    pictures = [values['Samples']['picture'] for step, values in logged if 'Samples' in values]
    assert len(pictures) == 2 and pictures[0][2] == 3
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
