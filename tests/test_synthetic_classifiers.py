"""Classifiers: losses are what they say, attacks stay within their ball, training resumes exactly."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import command, environment, fails, run
from synthetic import TINY, TRAIN, same, train, weights

from synthetic_data import classify
from synthetic_data.classify import Attack, pgd
from torch_utils.random import BlockRandomGenerator, GlobalRandom
from training import schedules
from training.data.dataset import ImageDataset
from training.networks.classifier import WideResNet
from training.snapshot import load_snapshot


def test_augmentation_moves_and_mirrors():
    images = torch.arange(1., 1 + 4 * 16).reshape(4, 1, 4, 4)
    assert torch.equal(classify.augment(images, GlobalRandom(), 0, False), images)
    mirrored = classify.augment(images.repeat(16, 1, 1, 1), GlobalRandom(), 0, True).reshape(16, 4, 1, 4, 4)
    same = (mirrored == images).flatten(2).all(2)
    assert ((mirrored == images.flip(3)).flatten(2).all(2) ^ same).all() and 10 < same.sum() < 54
    moved = classify.augment(images.repeat(64, 1, 1, 1), GlobalRandom(), 1, False).reshape(64, 4, 1, 4, 4)
    padded = torch.nn.functional.pad(images, [1] * 4)
    places = {(dy, dx): (moved == padded[:, :, dy:dy + 4, dx:dx + 4]).flatten(2).all(2) for dy in range(3) for dx in range(3)}
    assert torch.stack(list(places.values())).sum(0).eq(1).all() and all(found.any() for found in places.values())


def test_attacks_stay_in_their_ball_and_raise_the_loss():
    torch.manual_seed(0)
    net = WideResNet('wrn-10-1', 5)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = pgd(net, x, y, Attack(0.1, 0.03, 10), BlockRandomGenerator('cpu', 0, 0, 8))
    assert (found - x).abs().max() <= 0.1 + 1e-6 and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in WideResNet('wrn-10-1', 5).parameters()]
    loss = torch.nn.functional.cross_entropy
    assert loss(net(found), y) > loss(net(x), y) + 0.1
    # On a linear network the best change is eps times the sign of the gradient, and ten steps reach it.
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    x, y = torch.full((3, 3, 2, 2), 0.5), torch.tensor([0, 1, 0])
    found = pgd(linear, x, y, Attack(0.1, 0.03, 10), GlobalRandom())
    sign = (linear[1].weight[1 - y] - linear[1].weight[y]).sign().reshape(3, 3, 2, 2)
    torch.testing.assert_close(found, x + 0.1 * sign)


def test_the_objective_is_the_loss_of_what_it_says():
    torch.manual_seed(0)
    net, images, ids = WideResNet('wrn-10-1', 5).eval(), torch.randn(6, 3, 8, 8).clamp(-1, 1), torch.arange(6) % 5
    batch = {'images': images, 'labels': torch.eye(5)[ids], 'random': BlockRandomGenerator('cpu', 0, 0, 6)}
    loss, terms = classify.ClassificationLoss(pad=0, xflip=False, smoothing=0.2)(net, batch)
    logits = net((images + 1) / 2)
    log = logits.log_softmax(1)
    torch.testing.assert_close(loss, -0.8 * log[range(6), ids] - 0.2 * log.mean(1))
    assert torch.equal(terms['accuracy'], (logits.argmax(1) == ids).float())
    batch['random'] = BlockRandomGenerator('cpu', 0, 0, 6)
    worse, _ = classify.ClassificationLoss(pad=0, xflip=False, attack=Attack(0.1, 0.03, 5))(net, batch)
    assert (worse > -log[range(6), ids]).all()
    rough, _ = classify.ClassificationLoss(pad=0, xflip=False, smoothing=0.2, dtype=torch.bfloat16)(net, batch)
    assert 0 < (rough - loss).abs().max() < 0.1 and rough.dtype == torch.float32


def test_schedules():
    rates = [schedules.cosine_lr(nimg, 64, 0.2, 1000, 100) for nimg in (0, 50, 100, 500, 1000)]
    cosine = (1 + np.cos(np.pi * np.array([0, 0.05, 0.1, 0.5, 1]))) / 2
    assert rates == pytest.approx(0.2 * cosine * [0, 0.5, 1, 1, 1], abs=1e-12)
    assert schedules.cosine_lr(0, 64, 0.2, 1000) == 0.2
    beta = schedules.warmup_beta(0.9)
    assert beta(0, 64) == 0.1 and beta(64, 64) == 2 / 11 and beta(64000, 64) == 0.9


def test_a_classifier_learns_and_says_how_well(digits, tmp_path):
    out = train(tmp_path, digits, '--duration=1536', '--snapshot=1536', '--eps=0.1', '--step-size=0.05')
    (row,) = json.loads((tmp_path / 'accuracy.json').read_text())
    assert row['nimg'] == 1536 and row['clean'] > 0.5 and row['robust'] < row['clean'] and f'{100 * row["clean"]:.2f}%' in out
    net = classify.open_classifier(str(tmp_path / 'network-snapshot-0000001.pkl'))
    test = ImageDataset(digits[1])
    assert classify.accuracy(net, test)['clean'] == row['clean'] and classify.accuracy(net, test)['robust'] is None
    one, two = (classify.accuracy(net, test, Attack(0.1, 0.05, 2), batch=batch)['robust'] for batch in (100, 33))
    assert abs(one - two) <= 0.01 and abs(one - row['robust']) <= 0.01


def test_a_stopped_training_ends_with_the_same_weights(trained, digits, tmp_path):
    assert [row['nimg'] for row in json.loads((trained / 'accuracy.json').read_text())] == [64, 128, 192]
    assert 'accuracy' in (trained / 'log.txt').read_text()
    outdir = tmp_path / 'run'
    log = outdir / 'stats.jsonl'
    arguments = [f'--outdir={outdir}', f'--data={digits[0]}', f'--test={digits[1]}', *TINY, '--test-every=64',
                 '--adversarial=1']
    process = subprocess.Popen(command(TRAIN, *arguments), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(outdir.glob('training-state-*.pt')) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train(outdir, digits, '--test-every=64', '--adversarial=1')
    assert same(weights(outdir), weights(trained))
    assert json.loads((outdir / 'accuracy.json').read_text()) == json.loads((trained / 'accuracy.json').read_text())
    losses = [[json.loads(line)['Loss/loss'] for line in path.read_text().splitlines()]
              for path in (log, trained / 'stats.jsonl')]
    assert losses[0] == losses[1]


def test_what_is_saved_is_the_average(trained):
    saved = load_snapshot(str(trained / 'network-snapshot-0000000.pkl')).net.state_dict()
    state = weights(trained)
    assert all(torch.equal(value, state[f'ema.{name}']) for name, value in saved.items() if 'running' not in name)
    assert any(not torch.equal(value, state[f'net.{name}']) for name, value in saved.items())
    assert all(torch.equal(value, state[f'net.{name}']) for name, value in saved.items() if 'running' in name)


@pytest.mark.parametrize('changed', [
    '--model=wrn-10-2', '--normalize=1', '--lr=0.2', '--rampup=96', '--momentum=0.5', '--weight-decay=0.1', '--ema=0',
    '--smoothing=0.5', '--pad=0', '--xflip=1', '--seed=1', '--precision=bf16', '--adversarial=1', '--batch=32', '--ls=1e30'])
def test_every_option_of_training_counts(digits, plain, tmp_path, changed):
    train(tmp_path / 'run', digits, '--duration=32', '--status=32', '--robust=0', changed)
    assert not same(weights(tmp_path / 'run'), plain)
    assert json.loads((tmp_path / 'run' / 'accuracy.json').read_text())[0]['robust'] is None


def test_options_of_the_attack_count(digits, tmp_path):
    found = []
    for i, more in enumerate(([], ['--eps=0.2'], ['--step-size=0.001'], ['--attack-steps=1'])):
        train(tmp_path / str(i), digits, '--duration=32', '--adversarial=1', '--robust=0', *more)
        found.append(weights(tmp_path / str(i)))
    assert not any(same(found[0], other) for other in found[1:])


def test_attacks_of_tests_may_take_other_steps(digits, tmp_path):
    """They change the accuracy under attack alone; without the option the record is that of earlier versions."""
    results = []
    for i, more in enumerate(([], ['--test-attack-steps=8'], ['--attack-steps=8'])):
        train(tmp_path / str(i), digits, '--duration=32', '--adversarial=1', '--step-size=0.05', '--eps=0.3', *more)
        results.append((weights(tmp_path / str(i)), json.loads((tmp_path / str(i) / 'accuracy.json').read_text())[0]))
    assert same(results[0][0], results[1][0]) and not same(results[0][0], results[2][0])
    assert results[0][1]['clean'] == results[1][1]['clean'] and results[0][1]['robust'] > results[1][1]['robust']
    assert 'test_attack_steps' not in json.loads((tmp_path / '0' / 'training_options.json').read_text())


def test_micro_batches_are_normalised_by_themselves(digits, plain, tmp_path):
    train(tmp_path / 'run', digits, '--duration=32', '--status=32', '--batch-gpu=8', '--robust=0')
    ours = weights(tmp_path / 'run')
    assert ours['net.block1.layer.0.bn1.num_batches_tracked'] == 2 * plain['net.block1.layer.0.bn1.num_batches_tracked'] == 4
    assert not torch.equal(ours['net.conv1.weight'], plain['net.conv1.weight'])


@pytest.mark.slow
def test_two_processes_train(digits, tmp_path):
    run(TRAIN, f'--outdir={tmp_path}', f'--data={digits[0]}', f'--test={digits[1]}', *TINY, '--adversarial=1', processes=2)
    assert json.loads((tmp_path / 'accuracy.json').read_text())[0]['nimg'] == 192
    losses = [json.loads(line)['Loss/loss']['mean'] for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[-1] < losses[0]


def test_another_recipe_does_not_resume(digits, trained):
    assert '--lr' in fails(TRAIN, f'--outdir={trained}', f'--data={digits[0]}', *TINY, '--lr=0.3', '--adversarial=1')
