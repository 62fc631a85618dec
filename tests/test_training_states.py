"""Training states of EDM and EDM2: what is in them starts runs, is gone on with, sampled and inspected."""

import collections
import os
import sys
import types

import helpers
import pytest
import torch
from test_foreign import as_pickle

import dnnlib.util
from training.checkpoint import Checkpoints
from training.networks import build_network
from training.snapshot import load_snapshot

EDM = ['--duration-rule=fixed', '--rampup=0.0005', '--batch=100', '--num-channels=8', '--num-blocks=1', '--cres=1,2',
       '--tick=0.5', '--snap=0', '--dump=1', '--ema_mode=mode1', '--dropout=0', '--seed=3', '--nosubdir']
EDM2 = ['--preset=digits', '--rampup=0.0001', '--channels=16', '--batch=16', '--status=16', '--snapshot=0', '--checkpoint=32']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return helpers.write_digits(tmp_path_factory.mktemp('data') / 'digits.zip', count=100)


class EasyDict(dict):
    """Has the name of that of the originals."""

    __module__ = 'dnnlib.util'


def _reconstruct_persistent_obj(meta):
    raise AssertionError('run')


class Stored:
    """Pickled as a persistent object of the originals, with the source of its module."""

    def __init__(self, module, class_name, kwargs):
        self.module, self.class_name, self.kwargs = module, class_name, kwargs

    def __reduce__(self):
        module = self.module
        state = dict(
            training=True, _parameters=collections.OrderedDict(module._parameters),
            _buffers=collections.OrderedDict(module._buffers), _non_persistent_buffers_set=set(),
            _forward_hooks=collections.OrderedDict(), _is_full_backward_hook=None,
            _modules=collections.OrderedDict((name, stored(child)) for name, child in module._modules.items()),
            _init_args=(), _init_kwargs=EasyDict(self.kwargs))
        meta = EasyDict(type='class', version=6, module_src='raise SystemExit', class_name=self.class_name, state=state)
        return _reconstruct_persistent_obj, (meta,)


def stored(module):
    if isinstance(module, torch.nn.ModuleDict):
        table = torch.nn.ModuleDict()
        table._modules = collections.OrderedDict((name, stored(child)) for name, child in module.items())
        return table
    kwargs = getattr(module, 'init_kwargs', {})
    return module and Stored(module, getattr(module, 'class_name', type(module).__name__), kwargs)


@pytest.fixture(autouse=True)
def names_of_the_originals(monkeypatch):
    """torch.save looks classes and functions up by their names."""
    module = types.ModuleType('torch_utils.persistence')
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_reconstruct_persistent_obj, '__module__', module.__name__)
    monkeypatch.setattr(dnnlib.util, 'EasyDict', EasyDict, raising=False)


def network(state, weights):
    net = build_network(**state['recipe']['network'])
    net.load_state_dict(weights)
    return net


@pytest.fixture(scope='module')
def edm(tmp_path_factory, digits):
    """A run of ours of 1000 images, and its state."""
    folder = tmp_path_factory.mktemp('edm') / 'run'
    helpers.invoke('train.py', f'--outdir={folder}', f'--data={digits}', *EDM, '--duration=0.001')
    return folder, Checkpoints(str(folder)).load_newest()


def write_edm(folder, state):
    """The same as a training state and a snapshot of EDM; returns the path of the former."""
    path = folder / 'training-state-000001.pt'
    torch.save(dict(net=stored(network(state, state['net'])), optimizer_state=state['optimizer']), path)
    as_pickle(folder / 'network-snapshot-000001.pkl', network(state, state['ema']['']))
    return path


def test_a_run_of_edm_goes_on(edm, digits, tmp_path):
    ours, state = edm
    theirs = write_edm(tmp_path, state)
    ends = []
    for number, path in enumerate((ours / 'training-state-0000001.pt', theirs)):
        folder = tmp_path / str(number)
        out = helpers.invoke('train.py', f'--outdir={folder}', f'--data={digits}', *EDM, '--duration=0.002', f'--resume={path}')
        assert 'Resuming from 1000 images' in out
        ends.append(Checkpoints(str(folder)).load_newest())
    assert ends[0]['nimg'] == ends[1]['nimg'] == 2000
    for part in ('net', 'ema'):
        first, second = (end[part].get('', end[part]) for end in ends)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    os.remove(tmp_path / 'network-snapshot-000001.pkl')
    error = helpers.fails('train.py', f'--outdir={tmp_path / "x"}', f'--data={digits}', *EDM, f'--resume={theirs}')
    assert 'network-snapshot-000001.pkl, which is missing' in error


def test_a_training_state_of_edm_is_a_network(edm, digits, tmp_path):
    _, state = edm
    path = write_edm(tmp_path, state)
    out = helpers.invoke('snapshot_tool.py', 'inspect', path)
    assert 'training state of EDM (weights without average)' in out and 'EDMPrecond' in out and '8x8' in out
    weights = load_snapshot(str(path)).net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in state['net'].items())
    out = helpers.invoke('train.py', f'--outdir={tmp_path / "x"}', f'--data={digits}', *EDM, '--duration=0.001', '--lr=1e-12',
                         f'--transfer={path}')
    assert f'{len(weights)} of {len(weights)} tensors' in out
    started = Checkpoints(str(tmp_path / 'x')).load_newest()
    for name, value in state['net'].items():
        torch.testing.assert_close(started['net'][name], value, rtol=0, atol=1e-8)


@pytest.fixture(scope='module')
def edm2(tmp_path_factory, digits):
    """A run of ours of 32 images, and its state."""
    folder = tmp_path_factory.mktemp('edm2') / 'run'
    helpers.invoke('train_edm2.py', f'--outdir={folder}', f'--data={digits}', *EDM2, '--duration=32')
    return folder, Checkpoints(str(folder)).load_newest()


def write_edm2(folder, state):
    path = folder / 'training-state-0000000.pt'
    folder.mkdir(exist_ok=True)
    torch.save({
        'state': EasyDict(cur_nimg=state['nimg'], total_elapsed_time=12.5),
        'net': collections.OrderedDict(state['net']),
        'loss_fn': {'_init_args': (), '_init_kwargs': EasyDict(P_mean=-0.4), 'P_mean': -0.4},
        'optimizer': state['optimizer'],
        'ema': dict(stds=[float(name) for name in state['ema']], emas=list(state['ema'].values()))}, path)
    return path


def test_a_run_of_edm2_goes_on_in_its_folder(edm2, digits, tmp_path):
    ours, state = edm2
    theirs = tmp_path / 'run'
    write_edm2(theirs, state)
    (theirs / 'training_options.json').write_text('{"run_dir": "x"}')
    (theirs / 'stats.jsonl').write_text('{"Loss/loss": {"num": 1, "mean": 1, "std": 0}, "timestamp": 1}\n')
    ends = []
    for folder in (ours, theirs):
        out = helpers.invoke('train_edm2.py', f'--outdir={folder}', f'--data={digits}', *EDM2, '--duration=64')
        assert 'Resuming from 32 images' in out
        ends.append(Checkpoints(str(folder)).load_newest())
    assert ends[0]['nimg'] == ends[1]['nimg'] == 64
    tables = [{'net': end['net']} | end['ema'] for end in ends]
    for part, table in tables[0].items():
        assert all(torch.equal(value, tables[1][part][name]) for name, value in table.items())
    assert len((theirs / 'stats.jsonl').read_text().splitlines()) == 3


def test_a_training_state_of_edm2_is_a_network(edm2, tmp_path):
    """Its architecture follows from the weights, but for the heads."""
    _, state = edm2
    path = write_edm2(tmp_path, state)
    out = helpers.invoke('snapshot_tool.py', 'inspect', path)
    for words in ('training state of EDM2', 'Precond', '8x8', '10 classes', '0.050 (of 0.050, 0.100, net)', '(assumed)'):
        assert words in out
    for weights, expected in ((None, state['ema']['0.050']), ('0.100', state['ema']['0.100']), ('net', state['net'])):
        loaded = load_snapshot(str(path), weights=weights, options={'channels_per_head': 32}).net
        expected = network(state, expected)
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.state_dict().items())
        x, labels = torch.randn(2, 3, 8, 8), torch.eye(10)[:2]
        torch.testing.assert_close(loaded(x, torch.ones(2), labels), expected.eval()(x, torch.ones(2), labels))
    assert "there are 0.050, 0.100, net" in helpers.fails('snapshot_tool.py', 'inspect', path, '--weights=ema')


@pytest.mark.parametrize('broken, words', [
    ({'ema': None}, 'malformed'), ({'ema': {'stds': [1], 'emas': []}}, 'malformed'), ({'net': None}, 'malformed'),
    ({'ema': {'stds': 'a', 'emas': [{}]}}, 'malformed'), ({'state': {'cur_nimg': 'x'}}, 'malformed'),
    ({'optimizer': None}, 'of another recipe'), ({'net': {'w': torch.ones(1)}}, 'does not fit')])
def test_malformed_states_end_in_one_line(edm2, digits, tmp_path, broken, words):
    path = write_edm2(tmp_path, edm2[1])
    torch.save(torch.load(path, weights_only=False) | broken, path)
    if words == 'malformed':
        assert words in helpers.fails('snapshot_tool.py', 'inspect', path)
        words = 'none of its 1 checkpoints can be read'
    assert words in helpers.fails('train_edm2.py', f'--outdir={tmp_path}', f'--data={digits}', *EDM2, '--duration=64')
