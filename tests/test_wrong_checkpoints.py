"""A checkpoint that is whole but wrong is passed over in one line; one that may not be read is not; nothing starts anew by accident."""

import builtins
import errno
import glob
import os
import re
import shutil

import pytest
import torch

from dnnlib import UserError
from torch_utils.files import pickles
from training.checkpoint import LAYOUTS
from training.recipe import Recipe, fit

STEP = 1000  # images


class Line(torch.nn.Module):
    """A network as the denoisers of all layouts have it: weights within `model`."""

    class_name = 'Line'
    init_kwargs = {}

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(self.model.weight)


class Batches:
    def iterate(self, plan):
        for start, count in plan:
            yield torch.full([count], 1 + start / STEP)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def loss(net, factors):
    values = net.model.weight.sum() * factors
    return values, {'loss': values}


def train(folder, layout, steps) -> list[float]:
    """The weights after so many steps."""
    net = Line()
    rules = Recipe(batch=STEP, total_nimg=steps * STEP, checkpoint=STEP, status=STEP, layout=layout,
                   averages={'name': 'constant', 'rates': [0.5]}, optim={'name': 'Adam'},
                   learning_rate={'name': 'constant', 'lr': 0.125})
    fit(rules, str(folder), net, loss, Batches())
    return net.model.weight.flatten().tolist()


@pytest.fixture(scope='module', params=LAYOUTS)
def run(request, tmp_path_factory):
    """(layout, folder of a run of three steps, weights after four)"""
    folder = tmp_path_factory.mktemp(request.param)
    train(folder / 'run', request.param, 3)
    shutil.copytree(folder / 'run', folder / 'whole')
    return request.param, folder / 'run', train(folder / 'whole', request.param, 4)


def newest(folder, layout, prefix=None) -> str:
    """The file with the loop's state of the newest checkpoint."""
    checkpoints = LAYOUTS[layout](str(folder), STEP)
    return checkpoints.path(checkpoints.numbers()[-1], 'opt' if layout == 'guided' else None)


def goes_on(folder, layout) -> str:
    """Trains one step more than the run had; returns what is new in the log."""
    before = (folder / 'log.txt').read_text()
    weights = train(folder, layout, 4)
    return weights, (folder / 'log.txt').read_text().removeprefix(before)


def variants(content):
    """(what is wrong, content) of a checkpoint."""
    yield 'list', [content]
    yield 'nothing', {}
    yield 'number', 7
    for key, value in content.items():
        yield f'no {key}', {name: part for name, part in content.items() if name != key}
        for other in (None, 'x', {'a': torch.ones(2)}, [None, None, 3]):
            yield f'{key} {other}', content | {key: other}
        if isinstance(value, dict):
            for inner in value:
                yield f'{key} without {inner}', content | {key: {k: v for k, v in value.items() if k != inner}}


REQUIRED = {'state': ['nimg', 'net', 'ema', 'optimizer', 'means', 'batches', 'train_seconds', 'recipe'],
            'steps': ['nimg', 'net_model', 'ema_model', 'optim', 'means', 'batches', 'train_seconds', 'recipe'],
            'guided': ['nimg', 'rates', 'optimizer', 'means', 'batches', 'train_seconds', 'recipe']}


def test_what_is_wrong_is_passed_over(run, tmp_path):
    """Whatever is missing or of another kind: one line, and the run is as if it had been stopped a step earlier."""
    layout, folder, expected = run
    content = torch.load(newest(folder, layout), weights_only=True)
    assert set(REQUIRED[layout]) <= set(content)
    passed = set()
    for i, (what, wrong) in enumerate(variants(content)):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        torch.save(wrong, newest(copy, layout))
        try:
            weights, log = goes_on(copy, layout)
        except UserError as error:                              # of another recipe, or of more processes
            assert what.startswith(('recipe', 'batches', 'nimg')), (what, error)
            assert '\n' not in str(error)
            continue
        lines = re.findall('Passing over a (?:damaged )?checkpoint: .*', log)
        start = re.search(r'Resuming from (\d+) images', log)[1]
        assert (len(lines), start) in ((1, '2000'), (0, '3000')), (what, log)
        assert not lines or str(copy) in lines[0]
        if lines:
            assert weights == expected, what
            passed.add(what)
        shutil.rmtree(copy)
    assert {f'no {key}' for key in REQUIRED[layout]} | {'list', 'nothing', 'number'} <= passed


def test_weights_of_another_shape_or_not_finite(run, tmp_path):
    layout, folder, expected = run
    for i, value in enumerate([torch.ones(2, 3), torch.full([1, 3], torch.nan)]):
        for key in ('net', 'ema'):
            copy = tmp_path / f'{i}{key}'
            shutil.copytree(folder, copy)
            path = newest(copy, layout)
            if layout == 'guided':
                path = path.replace('opt', {'net': 'model', 'ema': 'ema_0.5_'}[key])
            content = torch.load(path, weights_only=True)
            weights = content
            if layout == 'state':
                weights = content['net'] if key == 'net' else content['ema']['0.5']
            elif layout == 'steps':
                weights = content[f'{key}_model']
            name, = weights
            weights[name] = value
            torch.save(content, path)
            weights, log = goes_on(copy, layout)
            line, = re.findall('Passing over a checkpoint: .*', log)
            assert ('not finite' if i else 'shape') in line and weights == expected


def test_an_optimizer_of_another_shape(run, tmp_path):
    layout, folder, expected = run
    path = newest(shutil.copytree(folder, tmp_path / 'run'), layout)
    content = torch.load(path, weights_only=True)
    content['optim' if layout == 'steps' else 'optimizer']['state'][0]['exp_avg'] = torch.ones(7)
    torch.save(content, path)
    weights, log = goes_on(tmp_path / 'run', layout)
    assert 'exp_avg [7] of a weight [1, 3]' in log and weights == expected


def test_nothing_starts_anew(run, tmp_path):
    """If all are wrong, the error has the reason of the newest."""
    layout, folder, _ = run
    shutil.copytree(folder, tmp_path / 'run')
    numbers = LAYOUTS[layout](str(folder), STEP).numbers()
    for number in numbers:
        path = newest(folder, layout).replace(f'{numbers[-1]}.pt', f'{number}.pt')
        content = torch.load(path, weights_only=True)
        del content['means']
        torch.save(content, tmp_path / 'run' / os.path.basename(path))
    before = sorted(os.listdir(tmp_path / 'run'))
    with pytest.raises(UserError, match=rf'none of its {len(numbers)} checkpoints can be read; remove them to start anew \(.*'
                       + str(numbers[-1])):
        train(tmp_path / 'run', layout, 4)
    assert sorted(os.listdir(tmp_path / 'run')) == before


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO])
def test_what_may_not_be_read_is_not_called_damaged(run, tmp_path, monkeypatch, number):
    """Nor is an older checkpoint taken in its place."""
    layout, folder, _ = run
    shutil.copytree(folder, tmp_path / 'run')
    forbidden = newest(tmp_path / 'run', layout)

    def refuse(path, *args):
        if path == forbidden:
            raise OSError(number, os.strerror(number), path)
        return builtins.open(path, *args)

    monkeypatch.setattr(pickles, 'open', refuse, raising=False)
    before = {path: os.path.getsize(path) for path in glob.glob(f'{tmp_path}/run/*')}
    with pytest.raises(UserError) as error:
        train(tmp_path / 'run', layout, 4)
    assert str(error.value).startswith(f'{forbidden} cannot be read ({os.strerror(number)}); mend that')
    assert 'damaged' not in str(error.value)
    assert {path: os.path.getsize(path) for path in glob.glob(f'{tmp_path}/run/*')} == before
    monkeypatch.undo()
    assert 'Resuming from 3000' in goes_on(tmp_path / 'run', layout)[1]
