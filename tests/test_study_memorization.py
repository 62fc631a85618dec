"""Claims of the memorization study on digits: one factor changes at a time, its numbers are those of the metric, it resumes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from data_utils import digits_memorization as study_module
from training.data.dataset import ImageDataset

SCRIPT = 'data_utils/digits_memorization.py'
TINY = ['--sizes=10,20', '--classes=1', '--kimg=1', '--batch=16', '--channels=8', '--samples=24', '--steps=2', '--jobs=1']


def rows_of(outdir) -> list[dict]:
    with open(outdir / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a tiny study, and what it printed."""
    outdir = tmp_path_factory.mktemp('study') / 'out'
    result = CliRunner().invoke(study_module.main, [f'--outdir={outdir}', *TINY])
    assert result.exit_code == 0, result.output
    return outdir, result.stdout


def test_models_differ_in_one_factor_each(tmp_path):
    """Of one size: the same images with no labels, true ones and random ones; fewer classes fill up with more of each."""
    study = study_module.Study(str(tmp_path), kimg=1, batch=16, lr=2e-3, channels=8, samples=24, steps=2, seed=0)
    models = study_module.plan([20, 170], [1, 3])
    assert len(models) == len(set(models)) == 2 * (3 + 2)
    study_module.make_data(study, models)
    sets = {model: ImageDataset(study.data(model)) for model in models}
    for size in (20, 170):
        plain, true, random = (sets[model] for model in models if (model.size, model.classes) == (size, 10))
        fewer = [sets[model] for model in models if model.size == size and model.classes != 10]
        images = plain.images(range(size))
        assert np.array_equal(true.images(range(size)), images) and np.array_equal(random.images(range(size)), images)
        assert np.array_equal(np.bincount(true.label_ids), [size // 10] * 10)
        assert not np.array_equal(true.label_ids, random.label_ids)
        assert [len(np.unique(data.label_ids)) for data in fewer] == [1, 3]
        assert [len(data) for data in fewer] == [size, size]
    configs = [study_module.settings(study, model) for model in models]
    for config, model in zip(configs, models, strict=True):
        assert config['cond'] == (model.labels != 'none')
        others = {key: value for key, value in config.items() if key not in ('outdir', 'data', 'cond')}
        assert others == {key: value for key, value in configs[0].items() if key in others}
    assert configs[0]['duration_rule'] == 'fixed'


def test_results_are_those_of_the_metric(finished, tmp_path):
    outdir, printed = finished
    rows = rows_of(outdir)
    assert len(rows) == 2 * (3 + 1) + 2 * 2   # networks, and the optimal denoiser of each unlabelled one
    optimal = [row for row in rows if row['denoiser'] == 'optimal']
    assert [float(row['memorization_ratio']) for row in optimal] == [1.0] * 4
    assert 'Memorized samples (%)' in printed and '100.0' in printed
    folder = outdir / 'models' / '20-10classes-none'
    dest = tmp_path / 'memorization.json'
    result = CliRunner().invoke(helpers.script_module('calculate_metrics.py').main, [
        'memorization', f'--net={folder}/network-snapshot-0000001.pkl', f'--data={outdir}/data/20-10classes-true.zip',
        '--seeds=0-23', '--steps=2', f'--dest={dest}'])
    assert result.exit_code == 0, result.output
    found, = (row for row in rows if (row['size'], row['classes'], row['labels'], row['denoiser']) == (
        '20', '10', 'none', 'network'))
    measured = json.loads(dest.read_text())['results']
    assert measured['memorization_ratio'] == pytest.approx(float(found['memorization_ratio']), abs=1e-5)
    assert measured['mean_distance'] == pytest.approx(float(found['mean_distance']), rel=1e-3)


def test_pictures(finished):
    outdir, _ = finished
    for name, width in (('study.png', 1000), ('models/20-10classes-none/memorization-network.png', 100)):
        with PIL.Image.open(outdir / name) as picture:
            assert picture.width > width
    assert (outdir / 'study.svg').stat().st_size > 10_000


def test_finished_models_are_not_trained_again(finished):
    outdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in outdir.glob('models/*/*')}
    table = (outdir / 'results.csv').read_bytes()
    result = subprocess.run(['bash', str(helpers.ROOT / 'bash_files' / 'study_memorization.sh'), '--outdir=out', *TINY],
                            cwd=outdir.parent, env=helpers.environment(PYTHON=sys.executable), text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in outdir.glob('models/*/*')} and before
    assert (outdir / 'results.csv').read_bytes() == table


def test_a_killed_study_ends_with_the_same_numbers(finished, tmp_path):
    outdir, _ = finished
    args = [f'--outdir={tmp_path}', *TINY]
    process = subprocess.Popen(helpers.command(SCRIPT, *args), env=helpers.environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob('models/*/memorization-network.json'))) < 2 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'results.csv').exists()
    helpers.run(SCRIPT, *args[:-1], '--jobs=2')
    for ours, theirs in zip(rows_of(outdir), rows_of(tmp_path), strict=True):
        assert float(ours.pop('mean_distance')) == pytest.approx(float(theirs.pop('mean_distance')), rel=1e-3)
        assert ours == theirs


@pytest.mark.parametrize('args, words', [
    (['--sizes=20'], ['--sizes', 'at least two']),
    (['--sizes=20,25'], ['--sizes', 'multiples of 10']),
    (['--sizes=20,5000'], ['--sizes', '10 classes']),
    (['--classes=0,1'], ['--classes', '1 to 10']),
    (['--kimg=0'], ['--kimg']),
])
def test_mistakes_end_in_one_line(args, words, tmp_path):
    line = helpers.fails(SCRIPT, f'--outdir={tmp_path}', *args)
    assert all(word in line for word in words), line


def test_a_folder_keeps_its_settings(finished):
    outdir, _ = finished
    line = helpers.fails(SCRIPT, f'--outdir={outdir}', *TINY, '--steps=3')
    assert '--steps' in line and '2 instead of 3' in line
