"""Claims of the multi-source study on digits: its comparison is fair, its numbers are those of the metrics, it resumes."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import scipy.stats
from click.testing import CliRunner
from sklearn.datasets import load_digits

from simulations import digits_multi_source as study_module
from training.data.dataset import ImageDataset
from training.schedules import LR_SCHEDULES

SCRIPT = 'simulations/digits_multi_source.py'
TINY = ['--nums=3,12', '--sources=1,2', '--images-per-class=16', '--batch-per-class=8', '--channels=16', '--samples=12',
        '--steps=1', '--jobs=1']


def rows_of(path) -> list[dict]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def a_study(tmp_path, **changes) -> study_module.Study:
    settings = dict(most=12, images_per_class=20, batch_per_class=8, channels=16, samples=12, steps=1)
    return study_module.Study(str(tmp_path), **(settings | changes))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a tiny study of two seeds, and what it printed."""
    outdir = tmp_path_factory.mktemp('study') / 'out'
    result = CliRunner().invoke(study_module.main, [f'--outdir={outdir}', '--seeds=0,1', *TINY])
    assert result.exit_code == 0, result.output
    return outdir, result.stdout


# The comparison


def test_order_puts_similar_classes_first():
    """The three classes with the closest mean images, then always the closest one on average."""
    digits = load_digits()
    means = np.array([digits.data[digits.target == k].mean(0) for k in range(10)])
    far = np.linalg.norm(means[:, None] - means, axis=-1)
    triple = min(itertools.combinations(range(10), 3), key=lambda c: sum(far[a, b] for a, b in itertools.combinations(c, 2)))
    order = list(triple)
    while len(order) < 10:
        order.append(min(set(range(10)) - set(order), key=lambda k: far[k, order].mean()))
    assert tuple(order) == study_module.ORDER


def test_plan_has_each_compared_class_alone_and_in_every_larger_model():
    models = study_module.plan([20, 100], [1, 3, 5, 10], [0, 1, 2])
    assert len(models) == len(set(models)) == 3 * 2 * 6
    for seed, n in itertools.product(range(3), (20, 100)):
        sets = [model.classes for model in models if (model.seed, model.n) == (seed, n)]
        assert sets == [(3,), (8,), (9,), *(study_module.ORDER[:count] for count in (3, 5, 10))]


def test_models_differ_in_their_sources_alone(tmp_path):
    """As many steps, the same learning rate at each step, and as many images of each class for all models."""
    study = a_study(tmp_path)
    models = study_module.plan([12], [1, 2, 5], [4])
    study_module.make_data(study, models)
    schedules = []
    for model in models:
        config = study_module.settings(study, model)
        assert config['batch'] == 8 * len(model.classes)
        assert config['duration'] == 24 * len(model.classes)  # 20, rounded up to whole batches
        assert config['seed'] == 4 and config['network']['model_channels'] == 16
        schedules.append([LR_SCHEDULES[config['lr_schedule']](
            step * config['batch'], config['batch'], config['lr'], config['decay'], config['rampup_Mimg'])
            for step in range(config['duration'] // config['batch'])])
    assert len(schedules) == 4
    for schedule in schedules:
        assert schedule == pytest.approx(schedules[0])


def test_held_out_digits_are_in_no_training_set_of_their_seed(tmp_path):
    study = a_study(tmp_path)
    models = study_module.plan([3, 12], [1, 3], [0, 1])
    study_module.make_data(study, models)
    for seed in (0, 1):
        held_out = ImageDataset(study.held_out(seed))
        unseen = {image.tobytes() for image in held_out.images(range(len(held_out)))}
        assert len(held_out) == 1797 - 10 * 12
        assert held_out.classes == list(study_module.ORDER)
        for model in models:
            if model.seed == seed:
                data = ImageDataset(study.data(model))
                assert [len(data), data.classes] == [model.n * len(model.classes), list(model.classes)]
                assert not unseen & {image.tobytes() for image in data.images(range(len(data)))}
    alone, among = (ImageDataset(study.data(study_module.Model(0, 3, classes))) for classes in ((8,), (3, 8, 9)))
    assert np.array_equal(alone.images(range(3)), among.images(np.flatnonzero(among.label_ids == 1)))


# Numbers


def test_results_are_the_distances_that_calculate_metrics_finds(finished):
    outdir, printed = finished
    results = rows_of(outdir / 'results.csv')
    assert [(r['seed'], r['n'], r['sources'], r['class']) for r in results] == [
        (seed, n, sources, digit) for seed in '01' for n in ('3', '12') for sources in '12' for digit in '38']
    row = next(r for r in results if (r['seed'], r['n'], r['sources'], r['class']) == ('1', '12', '2', '8'))
    samples = outdir / 'models' / 'seed1-n12-38' / 'samples.npz'
    dest = outdir / 'metrics.json'
    result = CliRunner().invoke(helpers.script_module('calculate_metrics.py').main, [
        'calc', f'--images={samples}', f'--ref={outdir / "data" / "seed1-held-out.zip"}', '--metrics=fd_pixels',
        '--class=8', '--ref-class=8', '--num=12', f'--dest={dest}'])
    assert result.exit_code == 0, result.output
    found = json.loads(dest.read_text())
    found = found.get('results', found)['fd_pixels']
    assert float(row['fd']) == pytest.approx(found, rel=1e-4)
    summary = rows_of(outdir / 'summary.csv')
    assert [(r['n'], r['sources'], r['seeds']) for r in summary] == [(n, s, '2') for n in ('3', '12') for s in '12']
    shown = float(re.search(r'(\d+) ± ', printed)[1])
    assert float(summary[0]['fd']) == pytest.approx(shown, rel=1e-5)   # the file has six digits


def test_summary_pairs_the_seeds():
    """Seeds that differ much, by the same amount with one source and with three: a certain difference."""
    rows = [{'seed': seed, 'n': 20, 'sources': count, 'class': digit, 'fd of training images': 7.0,
             'fd': 1000 * seed + (50 if count == 1 else 40) + digit}
            for seed in range(3) for count in (1, 3) for digit in (3, 8)]
    single, multi = study_module.summarise(pd.DataFrame(rows)).to_dict('records')
    assert (single['n'], single['sources'], single['seeds']) == (20, 1, 3)
    means = np.array([55.5, 1055.5, 2055.5])
    low, high = scipy.stats.t.interval(0.95, 2, means.mean(), scipy.stats.sem(means))
    assert single['fd'] == pytest.approx(means.mean())
    assert single['95% interval of fd'] == pytest.approx((high - low) / 2)
    assert np.isnan(single['single - multi'])
    assert multi['single - multi'] == pytest.approx(10)
    assert multi['95% interval of single - multi'] == pytest.approx(0, abs=1e-9)
    assert multi['single - multi, % of single'] == pytest.approx(1000 / 1055.5)
    assert multi['fd of training images'] == 7


# Files


def test_pictures(finished):
    outdir, _ = finished
    grid = np.asarray(PIL.Image.open(outdir / 'samples-n3.png'))
    rows = 2 * 3  # of two classes: training images, one source, two sources
    assert grid.shape[0] == rows * 34 + 2
    white = (grid[2:34, -34 * 9 + 2:] == 255).all()  # only three training images: nine places are left
    assert white and not (grid[36:68, -34 * 9 + 2:] == 255).all()
    for name in ('study.png', 'study.svg'):
        assert (outdir / name).stat().st_size > 10_000
    with PIL.Image.open(outdir / 'study.png') as figure:
        assert figure.width > 1500


def test_finished_models_are_not_trained_again(finished):
    outdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in outdir.glob('models/*/*')}
    table = (outdir / 'results.csv').read_bytes()
    result = CliRunner().invoke(study_module.main, [f'--outdir={outdir}', '--seeds=0,1', *TINY])
    assert result.exit_code == 0, result.output
    assert before == {path: path.stat().st_mtime_ns for path in outdir.glob('models/*/*')} and before
    assert (outdir / 'results.csv').read_bytes() == table


def test_a_stopped_study_goes_on(tmp_path):
    """SIGTERM in the middle of a model ends with one line and a checkpoint, from which training goes on."""
    args = [f'--outdir={tmp_path / "out"}', '--seeds=0', '--nums=20', '--sources=1,2', '--images-per-class=100Ki',
            '--batch-per-class=8', '--channels=16', '--samples=12', '--steps=1', '--jobs=1']
    process = subprocess.Popen(helpers.command(SCRIPT, *args), env=helpers.environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / 'out' / 'models' / 'seed0-n20-38' / 'training_options.json'
    until = time.monotonic() + 120
    while not log.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)  # some steps
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == 'Error: stopped; the same command goes on from here'
    assert 'Traceback' not in errors
    study = study_module.Study(str(tmp_path / 'out'), 20, 100 << 10, 8, 16, 12, 1)
    model = study_module.Model(0, 20, (3, 8))
    states = list(log.parent.glob('training-state-*.pt'))
    assert len(states) == 1 and not study.finished(model)
    config = study_module.settings(study, model)
    config['duration'] = 0  # resuming from beyond the end: takes the state up, and trains no more
    study_module.train_edm2.train(config, study.run_dir(model))
    assert 'Resuming from ' in (log.parent / 'log.txt').read_text()


@pytest.mark.slow
def test_side_by_side_gives_the_same(finished, tmp_path):
    outdir, _ = finished
    helpers.run(SCRIPT, f'--outdir={tmp_path}', '--seeds=0', *TINY[:-1], '--jobs=2')
    ours, theirs = (pd.read_csv(folder / 'results.csv') for folder in (outdir, tmp_path))
    assert len(theirs) == 8
    pd.testing.assert_frame_equal(ours[ours['seed'] == 0], theirs, rtol=1e-3)


def test_script_runs_from_anywhere_with_paths_of_the_caller(finished, tmp_path):
    outdir, _ = finished
    os.symlink(outdir, tmp_path / 'here')
    result = subprocess.run(['bash', str(helpers.ROOT / 'bash_files' / 'study_multi_source.sh'), '--outdir=here',
                             '--seeds=0,1', *TINY], cwd=tmp_path, env=helpers.environment(PYTHON=sys.executable),
                            text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert 'single - multi' in result.stdout


# Mistakes


@pytest.mark.parametrize('args, words', [
    (['--sources=3,5'], ['--sources', 'give 1 and']),
    (['--sources=1'], ['--sources']),
    (['--sources=1,11'], ['--sources', 'to 10']),
    (['--nums=20,20'], ['--nums', 'once']),
    (['--nums=1'], ['--nums', 'at least 2']),
    (['--nums=170'], ['--nums=170', 'at most 154']),
    (['--nums=500'], ['--nums=500', 'class 3']),
    (['--images-per-class=0'], ['--images-per-class']),
])
def test_mistakes_end_in_one_line(args, words, tmp_path):
    line = helpers.fails(SCRIPT, f'--outdir={tmp_path}', *args)
    assert all(word in line for word in words), line


def test_a_folder_keeps_its_settings(finished):
    outdir, _ = finished
    line = helpers.fails(SCRIPT, f'--outdir={outdir}', *TINY, '--steps=2')
    assert '--steps' in line and '1 instead of 2' in line
    line = helpers.fails(SCRIPT, f'--outdir={outdir}', *TINY, '--nums=3,13')
    assert 'largest of --nums' in line
