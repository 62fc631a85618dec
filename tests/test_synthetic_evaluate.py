"""Mixtures keep their proportion, and evaluate_data.py compares runs that differ in data alone."""

import json
import os
import re
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from helpers import command, environment, fails, run
from synthetic import COMBINE, EVALUATE, invoke, same, train, weights, write_classes

from dnnlib import UserError
from synthetic_data.mixture import GeneratedImages, Mixture, MixtureOrder
from training.data.dataset import ImageDataset


@pytest.fixture(scope='module')
def generated(tmp_path_factory):
    """Ten classes of generated 8x8 images: a folder, the same as .npz, and compressed."""
    folder = tmp_path_factory.mktemp('generated')
    write_classes(folder / 'out', [4] * 10, side=8, seed=3)
    invoke(COMBINE, f'--data_dir={folder}/out', f'--output_dir={folder}', '--class_num=10', '--file_name=all')
    with np.load(folder / 'all.npz') as z:
        np.savez_compressed(folder / 'small.npz', **z)
    return folder


def test_generated_images_are_the_same_from_all_files(generated):
    opened = [GeneratedImages(str(generated / name), 10) for name in ('out', 'all.npz', 'small.npz')]
    indices = [39, 0, 5, 6, 5]
    for found in opened:
        assert len(found) == 40 and found.label_ids.tolist() == np.repeat(range(10), 4).tolist()
        np.testing.assert_array_equal(found.images(indices), opened[0].images(indices))
    np.testing.assert_array_equal(opened[0].images([6])[0].transpose(1, 2, 0), np.load(generated / 'out' / '1.npy')[2])


def test_a_mixture_keeps_its_share_in_every_batch(digits, generated):
    real, made = ImageDataset(digits[0]), GeneratedImages(str(generated / 'out'), 10)
    mixture = Mixture(real, made)
    expected = [real.images([3])[0], made.images([7])[0], real.images([0])[0]]
    np.testing.assert_array_equal(mixture.images([3, 96 + 7, 0]), expected)
    assert mixture.labels([96 + 7]).argmax() == 1 and len(mixture) == 136
    for share in (0, 0.3, 0.7, 1):
        order = MixtureOrder(len(real), len(made), share, seed=1)
        found = order.indices(np.arange(4000))
        counts = (found.reshape(-1, 20) >= len(real)).sum(1)
        assert abs(counts - 20 * share).max() < 1 and set(found[found >= len(real)]) in ({*range(96, 136)}, set())
        np.testing.assert_array_equal(order.indices(np.arange(100, 130)), found[100:130])
        if share < 1:                                          # every real image is seen as often as any other, up to one
            seen = np.bincount(found[found < len(real)], minlength=len(real))
            assert seen.max() - seen.min() <= 1


def test_generated_images_change_the_training(digits, generated, plain, tmp_path):
    found = [plain]
    for i, more in enumerate(([], ['--share=0.3'])):
        train(tmp_path / str(i), digits, '--duration=32', '--robust=0', f'--generated={generated}/all.npz', *more)
        found.append(weights(tmp_path / str(i)))
    assert not same(found[0], found[1]) and not same(found[1], found[2])


def test_generated_images_that_do_not_fit(digits, generated, tmp_path):
    real = ImageDataset(digits[0])
    arrays = dict(image=np.zeros([3, 16, 16, 3], np.uint8), label=np.arange(3))
    for change, words in (
            ({}, '[3, 16, 16]'), ({'label': np.array([0, 1, 10])}, '0 to 10'), ({'label': np.arange(2)}, '[2]'),
            ({'image': np.zeros([3, 16, 16, 3])}, 'float64'), ({'label': None}, 'array label'),
            ({'image': None}, 'label is int64')):
        np.savez(tmp_path / 'x.npz', **{key: value for key, value in (arrays | change).items() if value is not None})
        with pytest.raises(UserError) as error:
            Mixture(real, GeneratedImages(str(tmp_path / 'x.npz'), 10))
        assert words in str(error.value) and 'x.npz' in str(error.value)


EVALUATE_TINY = ['--model=wrn-10-1', '--batch=16', '--duration=64', '--xflip=0', '--attack-steps=1', '--jobs=1']


def test_the_table(digits, generated, tmp_path):
    arguments = [f'--outdir={tmp_path}', f'--data={digits[0]}', f'--test={digits[1]}', f'--generated={generated}/out',
                 f'--selected={generated}/small.npz', *EVALUATE_TINY]
    out = invoke(EVALUATE, *arguments, '--training=plain', '--seeds=0,1')
    rows = (tmp_path / 'results.csv').read_text().splitlines()
    assert len(rows) == 1 + 6 and 'real + selected' in out and '±' in out
    out = invoke(EVALUATE, *arguments, '--seeds=0')
    assert '3 of 6 classifiers are trained already' in out and len((tmp_path / 'results.csv').read_text().splitlines()) == 7
    # Equal steps: the runs differ in data and training alone.
    found = [json.loads((tmp_path / f'{data}-{training}-seed0' / 'training_options.json').read_text())
             for data in ('real', 'generated', 'selected') for training in ('plain', 'adversarial')]
    for options_ in found:
        assert {key for key in found[0] if options_[key] != found[0][key]} <= {
            'generated', 'share', 'adversarial', 'dataset', 'order', 'loss', 'starts'}
    table = {re.split(' [0-9]', line)[0].strip() for line in out.splitlines() if re.match(' *(plain|adversarial) ', line)}
    assert len(table) == 6
    line = fails(EVALUATE, *arguments, '--lr=0.05')
    assert 'another lr' in line, line
    (tmp_path / 'other').mkdir()
    write_classes(tmp_path / 'other' / 'out', [4] * 10, side=8, seed=4)             # of the same name
    line = fails(EVALUATE, *arguments, f'--generated={tmp_path}/other/out')
    assert 'another set of images' in line, line


@pytest.mark.slow
def test_a_stop_ends_all_workers_and_the_same_command_goes_on(digits, generated, tmp_path):
    """Ctrl-C, which reaches all processes of a terminal, and then SIGTERM, which reaches one."""
    arguments = [f'--outdir={tmp_path}', f'--data={digits[0]}', f'--test={digits[1]}',
                 f'--generated={generated}/out', *EVALUATE_TINY, '--jobs=2', '--training=plain',
                 '--seeds=0,1', '--duration=8Ki', '--status=16']
    first = [tmp_path / f'{data}-plain-seed0' for data in ('real', 'generated')]
    for stop, number in ((os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)):
        process = subprocess.Popen(command(EVALUATE, *arguments), env=environment(), text=True, start_new_session=True,
                                   stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        lines = [len(text) for text in map(log, first)]
        until = time.monotonic() + 120
        while not all(len(log(folder)) > before for folder, before in zip(first, lines, strict=True)):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        stop(process.pid, number)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 1 and errors == 'Error: stopped; the same command goes on from here\n'
        assert not psutil.wait_procs(workers, timeout=60)[1]
        assert not (tmp_path / 'real-plain-seed1').exists()    # nothing else was begun
    run(EVALUATE, *arguments)
    assert len((tmp_path / 'results.csv').read_text().splitlines()) == 1 + 4
    for folder in first:
        nimg = [json.loads(line)['nimg'] for line in log(folder)]
        assert nimg == list(range(16, 8192 + 1, 16))           # no step is missing, none came twice


def log(folder) -> list[str]:
    path = folder / 'stats.jsonl'
    return path.read_text().splitlines() if path.exists() else []
