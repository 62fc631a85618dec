"""What the tests of the synthetic-data study share: its scripts, small networks, class files, digits."""

import resource
import subprocess

import numpy as np
import pytest
import torch
from helpers import command, environment, invoke, write_digits

from training.checkpoint import Checkpoints
from training.encoders import RGBEncoder
from training.networks import build_network
from training.snapshot import save_snapshot

GENERATE, SELECT, COMBINE, TRAIN, EVALUATE = (
    f'synthetic_data/{name}.py' for name in ('generate', 'select_1M', 'combine_data', 'train_classifier', 'evaluate_data'))
SIDE, CLASSES = 8, 3
TINY = ['--model=wrn-10-1', '--batch=16', '--duration=192', '--xflip=0', '--checkpoint=64', '--snapshot=192', '--status=64',
        '--lr=0.1', '--ema=0.8', '--attack-steps=2']


def save_network(path, label_dim=CLASSES, side=SIDE, channels=3, width=8):
    torch.manual_seed(0)
    net = build_network('EDMPrecond', img_resolution=side, img_channels=channels, label_dim=label_dim, model_type='SongUNet',
                        model_channels=width, channel_mult=[1], num_blocks=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_snapshot(path, net, encoder=RGBEncoder(), dataset={'name': 'x', 'label_dim': label_dim}, recipe={}, nimg=0)
    return str(path)


def options(network, outdir, *more):
    return [f'--network={network}', f'--outdir={outdir}', f'--class_num={CLASSES}', '--steps=2', *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def limited(script, size, *args):
    """Runs a script that may not write files of more than `size` bytes: what a full disk looks like to it."""
    return subprocess.run(command(script, *args), env=environment(), text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def write_classes(folder, counts, side=4, seed=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.RandomState(seed)
    arrays = [rng.randint(0, 256, [count, side, side, 3], np.uint8) for count in counts]
    for label, array in enumerate(arrays):
        np.save(folder / f'{label}.npy', array)
    return arrays


def train(outdir, digits, *more):
    return invoke(TRAIN, f'--outdir={outdir}', f'--data={digits[0]}', f'--test={digits[1]}', *TINY, *more)


def weights(outdir):
    state = Checkpoints(str(outdir)).load_newest()
    return {f'{part}.{name}': value for part in ('net', 'ema')
            for name, value in (state[part] if part == 'net' else state[part]['']).items()}


def same(a, b):
    """Equal names, shapes and values."""
    return a.keys() == b.keys() and all(
        value.shape == b[name].shape and torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope='session')
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp('nets') / 'net.pkl')


@pytest.fixture(scope='session')
def made(tmp_path_factory, network):
    """The folder of an undisturbed run: 20 images of each class."""
    folder = tmp_path_factory.mktemp('made') / 'out'
    invoke(GENERATE, *options(network, folder, '--seeds=0-19', '--batch=8'))
    return folder


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    return write_digits(folder / 'train.zip', count=96), write_digits(folder / 'test.zip', count=100, first=200)


@pytest.fixture(scope='session')
def plain(tmp_path_factory, digits):
    """The weights after two steps without further options."""
    folder = tmp_path_factory.mktemp('plain')
    train(folder, digits, '--duration=32', '--status=32', '--robust=0')
    return weights(folder)


@pytest.fixture(scope='session')
def trained(tmp_path_factory, digits):
    outdir = tmp_path_factory.mktemp('trained') / 'run'
    train(outdir, digits, '--test-every=64', '--adversarial=1')
    return outdir
