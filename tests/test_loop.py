"""The loop against its equations, written down plainly: one process, whole batches, float64.

SGD sees the scale of a gradient, which Adam does not. Each case is trained by one process and by two, and goes on from
the middle.
"""

import glob
import json
import os
import shutil

import numpy as np
import pytest
import torch

from torch_utils import distributed as dist
from training import shard_files
from training.checkpoint import Checkpoints
from training.recipe import Recipe, fit

BATCH, STEPS, RATE, WARMUP, MOMENTUM = 6, 12, 0.05, 4, 0.5
RECIPE = dict(batch=BATCH, total_nimg=STEPS * BATCH, status=3 * BATCH, checkpoint=BATCH,
              optim={'name': 'SGD', 'momentum': MOMENTUM}, averages={'name': 'warmup', 'decay': 0.8},
              learning_rate={'name': 'warmup', 'lr': RATE, 'warmup': WARMUP})
CASES = {
    'plain': {},
    'micro-batches': {'batch_gpu': 2},
    'loss times a constant': {'ls': 128.0, 'batch_gpu': 2},
    'clipped': {'clip_grad_norm': 0.5, 'ls': 128.0},
    'overflows': {'loss_scale': {'lg': 511.0, 'growth': 0.25}},
    'two averages': {'averages': {'name': 'constant', 'rates': [0.5, 0.9]}},
    'fine-tuned': {'first_nimg': 6 * BATCH, 'total_nimg': (6 + STEPS) * BATCH},
    'not a number': {'seed': 1},                                # image 20 has one
}


PROCESSES = ['1', '2', '2 in shards']


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 3, dtype=torch.float64)


def images(start, count, seed):
    """Inputs [N, 5] and targets [N, 3] of the images of the run."""
    random = [torch.Generator().manual_seed(number) for number in range(start, start + count)]
    x, y = (torch.stack([torch.randn(n, generator=g, dtype=torch.float64) for g in random]) for n in (5, 3))
    if seed and start <= 20 < start + count:
        y[20 - start, 1] = torch.nan
    return x, y


def loss(net, batch):
    x, y = batch
    error = (net(x) - y).square().sum(1)
    return error, {'loss': error}


class Batches:
    def __init__(self, seed):
        self.seed = seed

    def iterate(self, plan):
        for start, count in plan:
            yield images(start, count, self.seed)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def beta(averages, nimg):
    """Factors of a step after `nimg` images."""
    if averages['name'] == 'constant':
        return averages['rates']
    step = nimg / BATCH
    return [min(averages['decay'], (1 + step) / (10 + step))]


def expected(fields):
    """(weights, averages, mean losses) after all steps, by the equations."""
    recipe = RECIPE | {'first_nimg': 0, 'seed': 0, 'clip_grad_norm': None, 'loss_scale': None} | fields
    weights = [p.detach().clone() for p in network().parameters()]
    moments = [torch.zeros_like(w) for w in weights]
    count = len(beta(recipe['averages'], 0))
    emas = [[w.clone() for w in weights] for _ in range(count)]
    lg = recipe['loss_scale'] and recipe['loss_scale']['lg']
    means, rows = [], []
    for nimg in range(recipe['first_nimg'], recipe['total_nimg'], BATCH):
        net = network()
        for parameter, w in zip(net.parameters(), weights, strict=True):
            parameter.data = w.clone()
        errors, _ = loss(net, images(nimg, BATCH, recipe['seed']))
        grads = torch.autograd.grad(errors.mean(), list(net.parameters()))
        rows.append(errors.detach())
        steps = (nimg - recipe['first_nimg']) // BATCH
        if steps % 3 == 2:
            means.append(torch.cat(rows).mean().item())
            rows = []
        if lg:
            overflow = not all((grad * 2 ** lg).norm().isfinite() for grad in grads)
            lg += -1 if overflow else recipe['loss_scale']['growth']
            if overflow:
                continue
        grads = [grad.nan_to_num(0, 0, 0) for grad in grads]
        if recipe['clip_grad_norm']:
            norm = torch.cat([grad.flatten() for grad in grads]).norm() + 1e-6        # as torch has it
            grads = [grad * min(recipe['clip_grad_norm'] / norm, 1) for grad in grads]
        rate = RATE * min(steps / WARMUP, 1)
        moments = [MOMENTUM * m + grad for m, grad in zip(moments, grads, strict=True)]
        weights = [w - rate * m for w, m in zip(weights, moments, strict=True)]
        for ema, factor in zip(emas, beta(recipe['averages'], nimg), strict=True):
            ema[:] = [factor * e + (1 - factor) * w for e, w in zip(ema, weights, strict=True)]
    return weights, emas, means


class StepCheckpoints(Checkpoints):
    """One file for each step."""

    def number(self, nimg):
        return nimg // self.batch


def train(folder, shard=False):
    """All cases from their start, and again after a kill in the middle of an interval of the log."""
    for name, fields in CASES.items():
        first = os.path.join(folder, name)
        second = f'{first} again'
        recipe = Recipe(**RECIPE | fields, shard=shard)
        for where in first, second:
            fit(recipe, where, network(), loss, Batches(recipe.seed), layout=StepCheckpoints)
            if where == first and dist.get_rank() == 0:
                copy_after_step(5, first, second)
            dist.barrier()


def copy_after_step(step, source, dest):
    os.mkdir(dest)
    shutil.copy(os.path.join(source, 'stats.jsonl'), dest)
    checkpoints = StepCheckpoints(source)
    state = checkpoints.path(checkpoints.numbers()[step - 1])
    for path in glob.glob(state.removesuffix('pt') + '*'):
        shutil.copy(path, dest)


def train_as_one_of_several(folder):
    dist.init()
    for name in '2', '2 in shards':
        train(os.path.join(folder, name), shard=name != '2')
    dist.shutdown()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Runs by one process, and by two: each with the whole network, and in shards."""
    folder = tmp_path_factory.mktemp('loop')
    for processes in PROCESSES:
        os.mkdir(folder / processes)
    train(folder / '1')
    assert dist.launch(train_as_one_of_several, (str(folder),), 2) == 0
    return folder


@pytest.mark.parametrize('way', ['', ' again'], ids=['whole', 'resumed'])
@pytest.mark.parametrize('processes', PROCESSES)
@pytest.mark.parametrize('name', CASES)
def test_every_step_follows_the_equations(folder, name, processes, way):
    run = folder / processes / f'{name}{way}'
    weights, averages, losses = expected(CASES[name])
    state = StepCheckpoints(str(run)).load_newest()
    if 'shards' in processes:
        state = shard_files.read(state)
    rows = [json.loads(line) for line in (run / 'stats.jsonl').read_text().splitlines()]
    means = [row['Loss/loss']['mean'] for row in rows]
    np.testing.assert_allclose(np.array(means, dtype=float), losses, rtol=1e-9)  # null: not a number
    for values, named in zip([weights, *averages], [state['net'], *state['ema'].values()], strict=True):
        for value, (path, actual) in zip(values, named.items(), strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-12, msg=lambda text, path=path: f'{path}: {text}')
