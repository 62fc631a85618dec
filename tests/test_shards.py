"""Networks in shards: the same training as with the whole network on every process, of which each holds a part."""

import json
import os
import pickle
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from helpers import script_module, write_digits

from dnnlib import UserError
from metrics.scoring import Scorer
from torch_utils import distributed as dist
from torch_utils.files.own import read_own
from training import shard_files
from training.checkpoint import Checkpoints
from training.loop import Trainer
from training.snapshot import write_state
from training.watch import Watch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='forks, which CUDA does not survive')

# Convolutions of an image or of one row have fewer rows than there are processes; 24 are no multiple of 16.
EDM2 = ['--preset=digits', '--channels=24', '--channel-mult=1', '--num-blocks=1', '--attn-resolutions=8', '--batch=8',
        '--duration=48', '--rampup=0', '--status=8', '--snapshot=24', '--checkpoint=24', '--lr=0.01']
EDM = ['--nosubdir', '--num-channels=8', '--cres=1', '--num-blocks=1', '--batch=200', '--batch-gpu=50',
       '--seed=1', '--duration=0.001', '--duration-rule=fixed', '--rampup=0', '--tick=0.2', '--snap=3', '--dump=3']


def held(trainer) -> int:
    """Bytes of the weights, averages and moments that this process has."""
    states = [net.state_dict() for net in (trainer.net, *trainer.ema.emas)] + list(trainer.optimizer.state.values())
    return sum(dist.local(tensor).nbytes for state in states for tensor in state.values())


def before_steps(function):
    """function(trainer) is called before each step, until this forked process ends."""
    step = Trainer._step

    def watched_step(self, steps):
        function(self)
        step(self, steps)

    Trainer._step = watched_step


def train(script, outdir, data, *args, heldout=None, **running):
    module = script_module(script)
    running |= {'nosubdir': True} if script == 'train.py' else {}
    options = [f'--outdir={outdir}', f'--data={data}', *args]
    watch = Watch(Scorer, heldout=heldout, keep_best=True) if heldout else None
    module.train(module.settings(options), str(outdir), watch=watch, **running)


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
    """Of one process, and the first half of one in shards, which is told to stop."""
    folder = tmp_path_factory.mktemp('runs')

    def stop(trainer):
        if trainer.nimg == 16 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def train_half():
        before_steps(stop)
        train('train_edm2.py', folder / 'half', data[0], *EDM2, '--shard', '--checkpoint=0')

    train('train_edm2.py', folder / 'whole', data[0], *EDM2, heldout=data[1])
    on(2, train_half)
    return folder


def test_two_processes_train_as_one(runs, data):
    on(2, lambda: train('train_edm2.py', runs / 'two', data[0], *EDM2, '--shard', heldout=data[1]))
    check_same(runs / 'whole', runs / 'two')
    measured = [json.loads((runs / name / 'metrics.jsonl').read_text().splitlines()[-1]) for name in ('whole', 'two')]
    assert measured[0]['heldout'] == pytest.approx(measured[1]['heldout'], rel=1e-3)
    assert (runs / 'two' / 'network-best.pkl').exists()


@pytest.mark.parametrize('processes', [1, 4])
def test_another_number_of_processes_goes_on(runs, data, tmp_path, processes):
    """The last of the four has no row of the last convolution."""
    shutil.copytree(runs / 'half', tmp_path / 'run')

    def write_bytes(trainer):
        (tmp_path / str(dist.get_rank())).write_text(str(held(trainer)))

    def go_on():
        before_steps(write_bytes)
        train('train_edm2.py', tmp_path / 'run', data[0], *EDM2, *['--shard'] * (processes > 1))

    on(processes, go_on)
    assert 'Resuming from 24 images' in (tmp_path / 'run' / 'log.txt').read_text()
    np.testing.assert_allclose(curve(tmp_path / 'run'), curve(runs / 'whole'), rtol=1e-5)
    names = {path.name for path in (tmp_path / 'run').glob('training-state-*')}
    state = Checkpoints(str(tmp_path / 'run')).load_newest()
    assert names == {'training-state-0000000.pt'} | {
        f'training-state-0000000.{i}-of-4.shard' for i in range(4) if processes == 4}
    state = state['net'] if processes == 1 else shard_files.read(state)['net']
    parts = [int((tmp_path / str(rank)).read_text()) for rank in range(processes)]
    # Weights, two averages, two moments.
    assert max(parts) == pytest.approx(5 * sum(value.nbytes for value in state.values()) / processes, rel=0.1)


def test_edm_trains_as_one(data, tmp_path):
    """In micro-batches, whose gradients are added up."""
    train('train.py', tmp_path / 'whole', data[0], *EDM)
    on(2, train, 'train.py', tmp_path / 'two', data[0], *EDM, '--shard')
    check_same(tmp_path / 'whole', tmp_path / 'two')


def test_transferred_weights_are_cut(runs, data, tmp_path):
    """Of a network with classes, which the new one has not. It is trained in half precision."""
    other = write_digits(tmp_path / 'two.zip', 2)
    args = ['train_edm2.py', tmp_path / 'x', other, *EDM2, '--duration=8', '--snapshot=0', '--checkpoint=0',
            f'--transfer={runs / "whole" / "network-snapshot-0000000-0.050.pkl"}', '--cond=False', '--precision=bf16']
    for processes, shard in ((1, []), (2, ['--shard'])):
        args[1] = tmp_path / str(processes)
        on(processes, train, *args, *shard)
    np.testing.assert_allclose(curve(tmp_path / '1'), curve(tmp_path / '2'), rtol=1e-3)


def test_a_dry_run_counts_what_each_holds(data, tmp_path, capfd):
    """And times steps in shards."""
    plans = []
    for processes, shard in ((1, []), (2, ['--shard'])):
        on(processes, lambda shard=shard: train('train_edm2.py', tmp_path / 'x', data[0], *EDM2, *shard, dry_run=True,
                                                bench_steps=len(shard)))
        text = capfd.readouterr().out
        plans.append(json.loads(text[text.index('{'):])['cost'])
    one, two = (plan['memory_gib'] for plan in plans)
    for part in 'weights', 'gradients', 'optimizer', 'averages':
        assert two[part] == pytest.approx(one[part] / 2, rel=1e-3)
    assert one['weights'] < two['gathered'] < 5 * one['weights'] and plans[1]['seconds_of_a_step'] > 0
    assert plans[1]['parameters'] == plans[0]['parameters'] and not (tmp_path / 'x').exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, (Hostile.path,)


def _edit(path, change):
    content = read_own(str(path))
    change(content)
    write_state(path, content)                                 # not into the file that is mapped


def _change_a_byte(path):
    with open(path, 'r+b') as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def _grow(index):
    for entry in index.values():
        entry[1][-1] *= 10**9


def _leave_out(index):
    for entry in index.values():
        del entry[2][0]


def _call_names(index):
    for entry in index.values():
        entry[0] = 'os'


PADDING = bytes(1_000_000)                                          # else files are too small for what they should hold
STATE, FIRST, SECOND = (f'training-state-0000000.{end}' for end in ('pt', '0-of-2.shard', '1-of-2.shard'))
FAULTS = {
    'gone': (lambda folder: (folder / SECOND).unlink(), 'needs', 'missing'),
    'cut': (lambda folder: os.truncate(folder / SECOND, 5000), 'incomplete'),
    'changed': (lambda folder: _change_a_byte(folder / SECOND), SECOND, 'wrong CRC'),
    'of the other': (lambda folder: shutil.copy(folder / FIRST, folder / SECOND), 'has not what'),
    'of another checkpoint': (lambda folder: _edit(folder / SECOND, lambda content: content.update(shards_of='0')),
                              'another checkpoint'),
    'a pickle': (lambda folder: (folder / SECOND).write_bytes(pickle.dumps(Hostile()) + PADDING), SECOND),
    'a pickle of torch': (lambda folder: torch.save([Hostile(), PADDING], folder / SECOND), SECOND),
    'huge': (lambda folder: _edit(folder / STATE, lambda content: _grow(content['shards']['index'])), 'incomplete'),
    'not whole': (lambda folder: _edit(folder / STATE, lambda content: _leave_out(content['shards']['index'])), 'incomplete'),
    'of no type': (lambda folder: _edit(folder / STATE, lambda content: _call_names(content['shards']['index'])), 'type os'),
    'of no process': (lambda folder: _edit(folder / STATE, lambda content: content['shards'].update(processes='x')), 'another'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_damaged_and_hostile_shards_are_refused(runs, data, tmp_path, fault):
    change, *words = FAULTS[fault]
    folder = tmp_path / 'run'
    shutil.copytree(runs / 'half', folder)
    Hostile.path = str(tmp_path / 'code was run')
    # What torch.distributed.checkpoint would read, and run.
    (folder / '.metadata').write_bytes(pickle.dumps(Hostile()))
    change(folder)
    with pytest.raises(UserError) as caught:
        train('train_edm2.py', folder, data[0], *EDM2)
    assert all(word in str(caught.value) for word in ['none of its 1', *words]), caught.value
    assert '\n' not in str(caught.value) and not os.path.exists(Hostile.path)


def test_all_processes_end_where_one_cannot_read(runs, data, tmp_path):
    shutil.copytree(runs / 'half', tmp_path / 'run')
    _change_a_byte(tmp_path / 'run' / SECOND)

    def go_on():
        with pytest.raises(UserError, match=SECOND) as caught:
            train('train_edm2.py', tmp_path / 'run', data[0], *EDM2, '--shard')
        assert 'none of its 1' in str(caught.value)
        (tmp_path / str(dist.get_rank())).touch()

    on(2, go_on)
    assert (tmp_path / '0').exists() and (tmp_path / '1').exists()


def test_what_a_killed_run_left_is_removed(data, tmp_path, capsys):
    """Shards whose checkpoint was to come. One process has a note that it cuts nothing."""
    folder = tmp_path / 'run'
    folder.mkdir()
    for name in FIRST, SECOND, 'training-state-0000000.0-of-2.shard.bak', 'mine.shard':
        (folder / name).touch()
    train('train_edm2.py', folder, data[0], *EDM2, '--duration=8', '--snapshot=0', '--checkpoint=0', '--shard')
    assert {path.name for path in folder.glob('*shard*')} == {'training-state-0000000.0-of-2.shard.bak', 'mine.shard'}
    assert 'Note: on one process there is nothing to cut' in capsys.readouterr().out
