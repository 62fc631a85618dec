"""Recipes: what a checkpoint must agree with, what may change, and what a run remembers of its starts."""

import errno
import json
import os
import re
import sys
import tarfile
import threading
import time
import types

import helpers
import legacy_files
import pytest
import torch
from tensorboard.summary.writer import event_file_writer

from dnnlib import UserError
from torch_utils import distributed
from training import checkpoint, loop, recipe
from training.checkpoint import Checkpoints
from training.recipe import Recipe, fit

# --- Identity -------------------------------------------------------------------------------------


def changes(old: Recipe, new: Recipe) -> list[str]:
    return list(recipe.changes({'recipe': old.settings()}, new.settings()).values())


def test_every_difference_is_named():
    old = Recipe(batch=4, total_nimg=8, network={'class_name': 'A', 'size': 1, 'mult': (1, 2)})
    new = Recipe(batch=8, total_nimg=8, network={'class_name': 'A', 'size': 2, 'mult': [1, 2]},
                 optim={'name': 'SGD', 'momentum': 0.9})
    assert changes(old, old) == []
    assert changes(old, new) == ['batch 4 -> 8', 'network.size 1 -> 2', 'optim.name Adam -> SGD',
                                 'optim.momentum None -> 0.9']


def test_a_field_that_an_older_recipe_lacks_is_no_change():
    old = Recipe(batch=4, total_nimg=8).settings()
    del old['bench']
    assert recipe.changes({'recipe': old}, Recipe(batch=4, total_nimg=8, bench=False).settings()) == {}


@pytest.mark.parametrize('field, value, option', [
    ('seed', 1, 'seed'), ('clip_grad_norm', 1.0, 'clip_grad_norm'), ('layout', 'steps', 'layout'),
    ('optim', {'name': 'SGD'}, 'optim'), ('learning_rate', {'name': 'constant', 'lr': 1}, 'lr'),
    ('averages', {'name': 'power', 'stds': [0.1]}, 'stds')])
def test_what_decides_the_weights_may_not_change(field, value, option):
    old = Recipe(batch=4, total_nimg=8)
    state = {'recipe': old.settings(), 'nimg': 4, 'path': 'run/x.pt'}
    new = Recipe(**{'batch': 4, 'total_nimg': 8, field: value})
    with pytest.raises(UserError, match='run/x.pt is of a run with other settings') as caught:
        recipe.check_changes(state, new.settings(), allow=False)
    assert caught.value.field == option
    assert recipe.check_changes(state, new.settings(), allow=True) == changes(old, new)


@pytest.mark.parametrize('field, value', [
    ('total_nimg', 16), ('batch_gpu', 2), ('status', 4), ('snapshot', 4), ('checkpoint', 4), ('ls', 8.0),
    ('loss_scale', {'lg': 3}), ('bench', False), ('compile', True)])
def test_what_does_not_decide_them_may(field, value):
    state = {'recipe': Recipe(batch=4, total_nimg=8).settings(), 'nimg': 4, 'path': 'run/x.pt'}
    new = Recipe(**{'batch': 4, 'total_nimg': 8, field: value})
    logged = recipe.check_changes(state, new.settings(), allow=False)
    assert len(logged) == 1 and logged[0].startswith(field)


# --- Every training command -----------------------------------------------------------------------

# Run of legacy_files -> an option that changes, how the error names it, the change, what allows it.
CHANGES = {
    'edm2': ('--lr=0.02', '--lr', 'lr 0.015 -> 0.02', '--allow-changes'),
    'edm': ('--window-size=0.25', '--window-size', 'window_size 0.5 -> 0.25', '--allow-changes'),
    'teacher': ('lr=1e-2', 'lr', 'lr 0.001 -> 0.01', 'allow_changes=true'),
    'student': ('student.weight_decay=0.1', 'weight_decay', 'weight_decay 0.0 -> 0.1',
                'student.allow_changes=true'),
    'long_tail': ('--tau=3', '--tau', 'tau 1.0 -> 3.0', '--allow-changes'),
    'classifier': ('--lr=0.1', '--lr', 'lr 0.2 -> 0.1', '--allow-changes'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_changed_settings_are_refused_or_logged(tmp_path, monkeypatch, name):
    """A run of an earlier version goes on, and what it then has written is held to its settings.

    Weights & Biases gets what TensorBoard gets, or one line says that the package is missing."""
    with tarfile.open(legacy_files.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter='data')
    (tmp_path / 'yaml').symlink_to(helpers.ROOT / 'distillation' / 'yaml')
    monkeypatch.chdir(tmp_path)
    script, arguments, longer, _, then = legacy_files.RUNS[name]
    arguments = [*arguments, longer.format(then)]
    option, named, change, allow = CHANGES[name]
    before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert 'needs the package wandb: pip install wandb' in helpers.fails(script, *arguments, '--wandb=diffusion')
    assert before == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    helpers.fake_wandb(tmp_path, monkeypatch)
    complete = name == 'classifier'                            # it has nothing left to do
    (tmp_path / name / 'loss.png').touch()                     # the set of files has no pictures
    words = 'Already complete' if complete else 'Resuming from'
    assert words in helpers.invoke(script, *arguments, '--wandb=diffusion')
    if not complete:
        project = json.loads((tmp_path / 'wandb.json').read_text())
        assert project[:3] == ['diffusion', str(tmp_path / name), name] and project[3] > 0
        rows = [json.loads(line) for line in (tmp_path / 'wandb.jsonl').read_text().splitlines()]
        keys = {key for step, values in rows for key in values if step > 0}
        assert {'Loss/loss', 'Progress/lr', 'Progress/grad_norm'} <= keys
        assert any(key.startswith('LossAtSigma/') for key in keys)
    before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    error = helpers.fails(script, *arguments, option)
    assert named in error and change in error and 'allow changes' in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert change in helpers.invoke(script, *arguments, option, allow)
    assert change in (tmp_path / name / 'log.txt').read_text()
    starts = json.loads((tmp_path / name / 'training_options.json').read_text())['starts']
    assert [any(change in line for line in start['changes']) for start in starts] == [False, True][complete:]
    assert starts[0]['nimg'] < starts[-1]['nimg'] or complete


def test_a_run_cannot_become_shorter_than_it_is(tmp_path):
    train(tmp_path, 8)
    with pytest.raises(UserError, match='has seen 8 images, more than the 4 asked for') as caught:
        train(tmp_path, 4)
    assert caught.value.field == 'duration'
    train(tmp_path, 8)
    train(tmp_path, 7)                                        # whose last step ends there too


# --- The record -----------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """One weight."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))


class Batches:
    """Batches without images."""

    def iterate(self, plan):
        for _, count in plan:
            yield {'count': count}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def loss(net, batch):
    values = net.w.expand(batch['count'])
    return values, {'loss': values}


def train(folder, total_nimg, allow_changes=False, **fields):
    """Trains `Line` and returns it."""
    net = Line()
    rules = Recipe(batch=2, total_nimg=total_nimg, checkpoint=2, status=2, **fields)
    fit(rules, str(folder), net, loss, Batches(), allow_changes=allow_changes)
    return net


def test_the_log_has_dates_and_speeds_without_pauses(tmp_path, monkeypatch):
    """A step takes a second and the output behind each step a thousand: speeds are those of steps, the time to go is of all."""
    clock = [0.0]
    monkeypatch.setattr(loop, 'time', types.SimpleNamespace(time=lambda: clock[0], strftime=time.strftime))

    def slow_loss(net, batch):
        clock[0] += 1
        return loss(net, batch)

    def pause(*_):
        clock[0] += 1000

    fit(Recipe(batch=2, total_nimg=8, status=2, loss={'name': 'plain'}, dataset={'name': 'none', 'label_dim': 0}),
        str(tmp_path), Line(), slow_loss, Batches(), outputs=[loop.Output(2, pause, lambda _: True)])
    rows = [json.loads(line) for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert [row['Timing/images_per_sec']['mean'] for row in rows] == [2.0] * 4
    assert [row['Timing/sec_per_kimg']['mean'] for row in rows] == [500.0] * 4
    log = (tmp_path / 'log.txt').read_text()
    assert all(re.match(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ', line) for line in log.splitlines())
    assert 'Data: none' in log and 'Network: Line' in log and 'loss plain' in log
    assert re.findall(r'eta (\S+ ?\S*?)  ', log) == ['3s', '16m 42s', '16m 42s'] or 'eta 3s' in log and 'eta 16m' in log


def test_every_start_is_remembered(tmp_path):
    for total in (4, 8, 8):
        train(tmp_path, total)
    record = json.loads((tmp_path / 'training_options.json').read_text())
    assert record['total_nimg'] == 8
    # The third had nothing to do.
    assert [start['nimg'] for start in record['starts']] == [0, 4]
    assert [start['changes'] for start in record['starts']] == [[], ['total_nimg 4 -> 8']]
    for start in record['starts']:
        assert {'time', 'command', 'python', 'torch', 'project', 'device', 'world_size'} <= set(start)


@pytest.mark.parametrize('earlier', [False, True])
def test_a_run_of_an_earlier_version_keeps_its_convolutions(tmp_path, earlier):
    """Which were in TF32 on a GPU, before float32 was exact."""
    distributed.set_tf32(False)
    train(tmp_path, 4)
    if earlier:
        path = tmp_path / 'training_options.json'
        record = json.loads(path.read_text())
        del record['starts'][0]['tf32']
        path.write_text(json.dumps(record))
    train(tmp_path, 8)
    assert torch.backends.cudnn.allow_tf32 == earlier and not distributed.uses_tf32()
    distributed.set_tf32(False)


def test_events_of_a_later_start_sort_behind(tmp_path, monkeypatch):
    """TensorBoard reads files by name: second of the start, host, number of the process."""
    for process, total in ((999, 4), (111, 8)):
        patched = types.SimpleNamespace(**vars(os) | {'getpid': lambda process=process: process})
        monkeypatch.setattr(event_file_writer, 'os', patched)
        train(tmp_path, total)
        if total == 4:
            first, = tmp_path.glob('events.*')
    names = sorted(path.name for path in tmp_path.glob('events.*'))
    assert len(names) == 2 and names[0] == first.name


def test_a_full_disk_under_tensorboard_is_one_error(tmp_path, monkeypatch):
    """It writes in a thread of its own, which would say it too, in a traceback."""
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    said = []
    monkeypatch.setattr(threading, 'excepthook', said.append)
    loop._silence_tensorboard.cache_clear()
    monkeypatch.setattr(event_file_writer.RecordWriter, 'write', full)
    with pytest.raises(UserError, match='No space left'):
        train(tmp_path, 8)
    for thread in threading.enumerate():
        if isinstance(thread, event_file_writer._AsyncWriterThread):
            thread.join()
    assert not said
    other = threading.Thread(target=full)
    other.start()
    other.join()
    assert len(said) == 1                                      # that of others is said
    loop._silence_tensorboard.cache_clear()


@pytest.mark.parametrize('old, new', [('SGD', 'Adam'), ('Adam', 'SGD')])
def test_another_optimizer_begins_anew(tmp_path, old, new):
    train(tmp_path, 8, optim={'name': old}, learning_rate={'name': 'constant', 'lr': 0.125})
    with pytest.raises(UserError, match=f'optim.name {old} -> {new}'):
        train(tmp_path, 16, optim={'name': new})
    net = train(tmp_path, 16, True, optim={'name': new, 'weight_decay': 0.0})
    assert 0 < net.w.item() < 0.6


def test_settings_of_the_optimizer_change_too(tmp_path):
    """What the checkpoint remembers of them does not come back."""
    train(tmp_path, 4, optim={'name': 'SGD'}, learning_rate={'name': 'constant', 'lr': 0.5})
    net = train(tmp_path, 8, True, optim={'name': 'SGD', 'weight_decay': 1.0},
                learning_rate={'name': 'constant', 'lr': 0.5})
    assert net.w.item() == -0.75                     # 1, 0.5, 0, then w -= 0.5 (1 + w): -0.5, -0.75


# --- Checkpoints ----------------------------------------------------------------------------------


def flip_bit(data: bytes) -> bytes:
    position = data.index(torch.full([100], 2000.0).numpy().tobytes())
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1:]


@pytest.mark.parametrize('damage', [flip_bit, lambda data: data[:100], lambda data: b''])
def test_damage_is_noticed_and_the_older_checkpoint_taken(tmp_path, damage):
    checkpoints = Checkpoints(str(tmp_path))
    for nimg in (1000, 2000):
        weights = {'w': torch.full([100], float(nimg))}
        checkpoints.save({'nimg': nimg, 'means': {}, 'net': weights})
    newest = tmp_path / 'training-state-0000002.pt'
    newest.write_bytes(damage(newest.read_bytes()))
    reports = []
    state = checkpoints.load_newest(report=reports.append)
    assert state['nimg'] == 1000 and torch.equal(state['net']['w'], torch.full([100], 1000.0))
    assert len(reports) == 1 and 'training-state-0000002.pt' in reports[0]


def test_states_of_every_type_are_resumed(tmp_path):
    values = {dtype: torch.ones(3).to(dtype) for dtype in (
        torch.complex64, torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.bool)}
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save({'nimg': 1, 'means': {}, 'batches': [{str(d): v for d, v in values.items()}]})
    batches = checkpoints.load_newest()['batches'][0]
    for dtype, value in values.items():
        assert batches[str(dtype)].dtype == dtype
        assert torch.equal(batches[str(dtype)].to(torch.complex64), value.to(torch.complex64))


@pytest.mark.parametrize('layout', checkpoint.LAYOUTS)
def test_every_layout_brings_back_what_it_was_given(tmp_path, layout):
    weights = {'model.w': torch.arange(3.0)}
    state = {'nimg': 4000, 'recipe': {}, 'net': weights, 'ema': {'0.9': {'model.w': torch.zeros(3)}},
             'optimizer': {'state': {}}, 'means': {}, 'batches': [{}], 'train_seconds': 1.0}
    checkpoints = checkpoint.LAYOUTS[layout](str(tmp_path), 100)
    checkpoints.save(state)
    loaded = checkpoints.load_newest()
    assert torch.equal(loaded['net']['model.w'], weights['model.w'])
    average, = loaded['ema'].values()
    assert torch.equal(average['model.w'], torch.zeros(3))
    for key in ('nimg', 'optimizer', 'means', 'batches', 'train_seconds'):
        assert loaded[key] == state[key]
    path = checkpoints.path(checkpoints.numbers()[-1])
    assert checkpoints.load(path)['path'] == path
    os.truncate(path, 100)
    with pytest.raises(UserError, match='none of its 1 checkpoints can be read'):
        checkpoints.load_newest(report=lambda text: None)
