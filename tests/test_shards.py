"""Networks in shards: the same training as with the whole network on every process, of which each holds a part."""

import json
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from helpers import script_module, write_digits

from metrics.scoring import Scorer
from torch_utils import distributed as dist
from torch_utils.files.own import read_own
from training.checkpoint import Checkpoints
from training.watch import Watch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='forks, which CUDA does not survive')

# Convolutions of an image or of one row have fewer rows than there are processes; 24 are no multiple of 16.
EDM2 = ['--preset=digits', '--channels=24', '--channel-mult=1', '--num-blocks=1', '--attn-resolutions=8', '--batch=8',
        '--duration=48', '--rampup=0', '--status=8', '--snapshot=24', '--checkpoint=24', '--lr=0.01']
EDM = ['--nosubdir', '--num-channels=16', '--cres=1,2', '--num-blocks=1', '--batch=200', '--batch-gpu=50', '--seed=1',
       '--duration=0.001', '--duration-rule=fixed', '--rampup=0', '--tick=0.2', '--snap=3', '--dump=3']


def train(script, outdir, data, *args, heldout=None):
    module = script_module(script)
    more = {'nosubdir': True} if script == 'train.py' else {}
    options = [f'--outdir={outdir}', f'--data={data}', *args]
    watch = Watch(Scorer, heldout=heldout, keep_best=True) if heldout else None
    module.train(module.settings(options), str(outdir), watch=watch, **more)


def _as_rank(rank, size, port, function, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    function(*args)
    dist.shutdown()


def on(size, function, *args):
    """function(*args) on so many processes: forked, as the imports of fresh ones take longer than everything else."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_as_rank, (size, port, function, args), size, start_method='fork')


def curve(folder):
    rows = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    return np.array([[row['nimg'], row['Loss/loss']['mean'], row['Progress/grad_norm']['mean']] for row in rows])


def is_last(value):
    """Whether channels are the last in memory."""
    return value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)


def check_same(folder, other):
    """Curves, and snapshots but for the rounding of sums in another order, which Adam makes steps of where gradients
    are nearly zero."""
    np.testing.assert_allclose(curve(folder), curve(other), rtol=1e-5)
    names = {path.name for path in folder.glob('*.p*g')} | {path.name for path in folder.glob('*.pkl')}
    assert names == {path.name for path in other.glob('*.p*g')} | {path.name for path in other.glob('*.pkl')}
    for name in filter(lambda name: name.endswith('.pkl'), names):
        snapshots = [read_own(str(where / name)) for where in (folder, other)]
        states = [snapshot.pop('state') for snapshot in snapshots]
        assert list(states[0]) == list(states[1])
        for key, value in states[0].items():
            assert is_last(value) == is_last(states[1][key])
            assert (value - states[1][key]).norm() <= 0.01 * value.norm() + 1e-4, key
        for snapshot in snapshots:
            for key in 'shard', 'batch_gpu', 'name':           # the last has the number of processes
                snapshot['recipe'].pop(key, None)
        assert snapshots[0] == snapshots[1]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    return write_digits(folder / 'digits.zip', 24), write_digits(folder / 'other.zip', 8, first=100)


@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    """Of one process, and two of a first half in shards, which others go on from."""
    folder = tmp_path_factory.mktemp('runs')
    train('train_edm2.py', folder / 'whole', data[0], *EDM2, heldout=data[1])
    on(2, train, 'train_edm2.py', folder / 'half', data[0], *EDM2, '--shard', '--duration=24')
    return folder


def test_two_processes_train_as_one(runs, data):
    on(2, lambda: train('train_edm2.py', runs / 'two', data[0], *EDM2, '--shard', heldout=data[1]))
    check_same(runs / 'whole', runs / 'two')
    measured = [json.loads((runs / name / 'metrics.jsonl').read_text().splitlines()[-1]) for name in ('whole', 'two')]
    assert measured[0]['heldout'] == pytest.approx(measured[1]['heldout'], rel=1e-3)
    assert (runs / 'two' / 'network-best.pkl').exists()


@pytest.mark.parametrize('processes', [1, 4])
def test_another_number_of_processes_goes_on(runs, data, tmp_path, processes):
    """The last of the four have no row of the first and the last convolution."""
    shutil.copytree(runs / 'half', tmp_path / 'run')
    on(processes, train, 'train_edm2.py', tmp_path / 'run', data[0], *EDM2, *['--shard'] * (processes > 1))
    np.testing.assert_allclose(curve(tmp_path / 'run'), curve(runs / 'whole'), rtol=1e-5)
    names = {path.name for path in (tmp_path / 'run').glob('training-state-*')}
    state = Checkpoints(str(tmp_path / 'run')).load_newest()
    assert names == {'training-state-0000000.pt'} | {
        f'training-state-0000000.{i}-of-4.shard' for i in range(4) if processes == 4}
    if processes == 4:
        assert not any('weight' in name for name in state['net'])


def test_edm_trains_as_one(data, tmp_path):
    """Each process in micro-batches, whose gradients are added up."""
    train('train.py', tmp_path / 'whole', data[0], *EDM)
    on(2, train, 'train.py', tmp_path / 'two', data[0], *EDM, '--shard', '--batch-gpu=25')
    check_same(tmp_path / 'whole', tmp_path / 'two')
