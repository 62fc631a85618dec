"""Claims of the synthetic-data study on digits: no test digit is trained on, the comparison is fair, the selection is by a
classifier of real digits alone, and it resumes."""

import json
import os
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from click.testing import CliRunner

from synthetic_data import digits_synthetic_data as study_module
from synthetic_data import evaluate_data
from synthetic_data.classify import open_classifier
from training.data.dataset import ImageDataset

SCRIPT = 'synthetic_data/digits_synthetic_data.py'
TINY = ['--real=3', '--generated=6', '--top-scale=0.5', '--generator-duration=64', '--channels=8', '--steps=2', '--duration=64',
        '--test-images=100', '--jobs=1']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a tiny study of two seeds, and what it printed."""
    outdir = tmp_path_factory.mktemp('study') / 'out'
    result = CliRunner().invoke(study_module.main, [f'--outdir={outdir}', '--seeds=0,1', *TINY])
    assert result.exit_code == 0, result.output
    return outdir, result.stdout


def test_every_kind_of_data_and_training_is_measured(finished):
    outdir, text = finished
    results = pd.read_csv(outdir / 'results.csv')
    assert len(results) == 12 and set(zip(results['training'], results['data'], results['seed'], strict=True)) == {
        (training, data, seed) for training in ('plain', 'adversarial') for data in ('real', 'generated', 'selected')
        for seed in (0, 1)}
    assert text.count('real + selected ') >= 2 and '±' in text
    for name in ('study.png', 'samples.png'):
        assert PIL.Image.open(outdir / name).width > 100
    assert (outdir / 'study.svg').is_file()


def test_no_test_digit_is_trained_on(finished):
    outdir, _ = finished
    seen = []
    for seed in (0, 1):
        real, test = (ImageDataset(outdir / f'seed{seed}' / name) for name in ('real.zip', 'test.zip'))
        assert len(real) == 30 and len(test) == 100 and np.bincount(real.label_ids).tolist() == [3] * 10
        trained = {image.tobytes() for image in real.images(range(len(real)))}
        assert not trained & {image.tobytes() for image in test.images(range(len(test)))}
        seen.append(trained)
    assert seen[0] != seen[1]


def test_classifiers_differ_in_data_and_training_alone(finished):
    outdir, _ = finished
    for seed in (0, 1):
        options = [json.loads(path.read_text()) for path in
                   (outdir / f'seed{seed}' / 'classifiers').glob('*/training_options.json')]
        assert len(options) == 6
        changed = {key for key in options[0] for one in options if one[key] != options[0][key]}
        assert changed == {'generated', 'share', 'adversarial'}
        assert {one['data'] for one in options} == {str(outdir / f'seed{seed}' / 'real.zip')}


def test_the_generator_sees_the_real_digits_of_its_seed(finished):
    outdir, _ = finished
    for seed in (0, 1):
        options = json.loads((outdir / f'seed{seed}' / 'generator' / 'training_options.json').read_text())
        assert options['data'] == str(outdir / f'seed{seed}' / 'real.zip') and options['seed'] == seed


def test_the_classifier_of_real_digits_selects(finished):
    outdir, _ = finished
    report = json.loads((outdir / 'seed0' / 'selected' / 'best-report.json').read_text())
    assert f'real-plain-seed0{os.sep}' in report['model_path']
    net = open_classifier(report['model_path'], 'wrn-10-1', 10)
    assert net.num_classes == 10
    with np.load(outdir / 'seed0' / 'selected' / 'best.npz') as z:
        assert z['image'].shape == (30, 8, 8, 3) and np.bincount(z['label']).tolist() == [3] * 10


def test_summary_has_means_and_paired_gains():
    rows = [{'training': 'plain', 'data': data, 'seed': seed, 'clean': clean + 0.1 * seed, 'robust': 0.1}
            for data, clean in (('real', 0.5), ('generated', 0.7)) for seed in (0, 1)]
    summary = evaluate_data.summarise(pd.DataFrame(rows)).set_index('data')
    assert summary.loc['generated', 'clean'] == pytest.approx(0.75)
    assert summary.loc['generated', 'clean error'] == pytest.approx(0.05)
    assert summary.loc['generated', 'clean gain'] == pytest.approx(0.2)
    assert summary.loc['generated', 'clean gain error'] == pytest.approx(0, abs=1e-12)
    assert summary.loc['real', 'clean gain'] == 0


def test_nothing_finished_is_made_again(finished):
    outdir, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in outdir.rglob('*')
              if path.suffix in ('.npy', '.npz', '.pkl', '.zip') or path.name == 'accuracy.json'}
    assert len(stamps) > 40
    result = CliRunner().invoke(study_module.main, [f'--outdir={outdir}', '--seeds=0,1', *TINY])
    assert result.exit_code == 0 and {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.slow
def test_stopped_it_goes_on(finished, tmp_path):
    arguments = [f'--outdir={tmp_path}/out', '--seeds=0', *TINY]
    process = subprocess.Popen(helpers.command(SCRIPT, *arguments), env=helpers.environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not (tmp_path / 'out' / 'seed0' / 'classifiers').exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    result = CliRunner().invoke(study_module.main, arguments)
    assert result.exit_code == 0, result.output
    ours, theirs = pd.read_csv(tmp_path / 'out' / 'results.csv'), pd.read_csv(finished[0] / 'results.csv')
    pd.testing.assert_frame_equal(ours, theirs[theirs['seed'] == 0].reset_index(drop=True))


@pytest.mark.slow
def test_the_script_runs_from_anywhere_with_paths_of_the_caller(finished, tmp_path):
    os.symlink(finished[0], tmp_path / 'here')
    result = subprocess.run(['bash', str(helpers.ROOT / 'bash_files' / 'study_synthetic_data.sh'), '--outdir=here',
                             '--seeds=0,1', *TINY], cwd=tmp_path, env=helpers.environment(PYTHON=sys.executable),
                            text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert 'real + selected' in result.stdout


@pytest.mark.parametrize('args, words', [
    (['--seeds=1,1'], ['--seeds', 'once']), (['--real=170'], ['--real=170', 'at most 154']), (['--real=500'], ['500']),
    (['--duration=0'], ['--duration']), (['--eps=2'], ['--eps']), (['--top-scale=0'], ['--top-scale'])])
def test_mistakes_end_in_one_line(args, words, tmp_path):
    line = helpers.fails(SCRIPT, f'--outdir={tmp_path}', *args)
    assert all(word in line for word in words), line


def test_a_folder_keeps_its_settings(finished):
    line = helpers.fails(SCRIPT, f'--outdir={finished[0]}', *TINY, '--steps=3')
    assert '--steps' in line and '2 instead of 3' in line
