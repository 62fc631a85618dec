"""Claims of the distillation study on digits: its students are comparable, its numbers are the metrics', it resumes."""

import csv
import json
import os
import signal
import subprocess
import time

import helpers
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits

from distillation import digits_distillation as study_module
from distillation.cache import CacheFile
from distillation.common import read_experiment, read_network
from metrics.recognition import Recognizer
from training.data.images import open_images

SCRIPT = 'distillation/digits_distillation.py'
TINY = ['--teacher-steps=3', '--student-steps=2', '--teacher-samples=16', '--samples=16', '--batch=4', '--jobs=1']
MODELS = ['teacher', 'distilled-rho0.4', 'distilled-rho0.02', 'on-samples', 'on-data']


def a_study(folder, **changes) -> study_module.Study:
    settings = dict(teacher_steps=3, student_steps=2, rhos=(0.4, 0.02), teacher_samples=16, samples=16, seed=0, batch=4, jobs=1)
    return study_module.Study(str(folder), **(settings | changes))


def run_here(monkeypatch, outdir, *more):
    """The study with its stages in this process, which spares a dozen starts of Python. Returns (output, stages run)."""
    stages = []

    def run(self, arguments, dest):
        if not os.path.exists(dest):
            script, *rest = map(str, arguments)
            stages.append(os.path.relpath(dest, self.study.outdir))
            result = CliRunner().invoke(helpers.script_module(os.path.relpath(script, helpers.ROOT)).main, rest)
            assert result.exit_code == 0, result.output

    def run_all(self, todo):                                   # signals are for the main thread
        for chain in todo:
            self.run_chain(chain)
    monkeypatch.setattr(study_module.Runner, 'run', run)
    monkeypatch.setattr(study_module.Runner, 'run_all', run_all)
    result = CliRunner().invoke(study_module.main, [f'--outdir={outdir}', *TINY, *more])
    assert result.exit_code == 0, result.output
    return result.output, stages


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a tiny study, what it printed, and its stages in order."""
    outdir = tmp_path_factory.mktemp('study') / 'out'
    with pytest.MonkeyPatch.context() as monkeypatch:
        return outdir, *run_here(monkeypatch, outdir)


# The comparison


def test_students_differ_in_what_they_learn_from_alone(finished):
    """The same network, steps, batch, learning rate and seed for all, and one teacher."""
    outdir, _, _ = finished
    options = {name: json.loads((outdir / name / 'training_options.json').read_text()) for name in MODELS[1:]}
    students = [options[name].get('student') or options[name] for name in MODELS[1:]]
    keys = read_network(str(study_module.BASELINE)).__dict__
    assert all(student[key] == students[0][key] for student in students for key in keys)
    assert {o['seed'] for o in options.values()} == {0}
    teachers = [options[f'distilled-rho{rho}']['teacher'] for rho in (0.4, 0.02)]
    assert [teacher['BATCH'] for teacher in teachers] == [0.4, 0.02]
    assert all(teacher['model_path'] == str(outdir / 'teacher' / 'ema_0.995_000003.pt') for teacher in teachers)
    assert options['on-samples']['data_dir'] == str(outdir / 'samples' / 'teacher.npz')
    assert options['on-data']['data_dir'] == str(outdir / 'digits.zip')
    assert [len(CacheFile(str(outdir / 'cache' / f'distilled-rho{rho}.cache'))) for rho in (0.4, 0.02)] == [80, 4]


def test_the_configurations_agree():
    """The experiment's student is the baseline's, and its teacher the one that is trained; the student is smaller."""
    experiment = read_experiment(str(study_module.DISTILLED))
    teacher = read_network(str(study_module.TEACHER))
    assert experiment['student'] == read_network(str(study_module.BASELINE))
    assert (experiment['teacher'].model, experiment['teacher'].diffusion) == (teacher.model, teacher.diffusion)
    sizes = [sum(p.numel() for p in study_module.common.build(part).parameters()) for part in (teacher, experiment['student'])]
    assert sizes[0] > 2 * sizes[1]


def test_no_distilled_student_waits_for_data_or_samples():
    chains = study_module.chains(a_study('/x', rhos=(0.02, 0.4, 0.1)))
    assert [chain[-1][1].split('/')[-1] for chain in chains] == [
        'on-samples.npz', 'distilled-rho0.4.npz', 'distilled-rho0.1.npz', 'distilled-rho0.02.npz', 'on-data.npz']
    for chain in chains[1:4]:
        assert not any('data_dir' in str(word) or '.zip' in str(word) for arguments, _ in chain[:2] for word in arguments)


def test_the_teacher_trains_on_all_cores():
    arguments, _ = study_module.train_teacher(a_study('/x', jobs=3, batch=32))
    assert '--nproc_per_node=2' in arguments and arguments[-1] == 'batch_size=16'
    arguments, _ = study_module.train_teacher(a_study('/x'))
    assert 'torch.distributed.run' not in arguments and arguments[-1] == 'batch_size=4'


# Numbers


def test_the_table_is_that_of_the_metrics(finished):
    outdir, printed, _ = finished
    with open(outdir / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['model'] for row in rows] == [*MODELS, 'two digits at once', 'noise']
    assert [row['rho'] for row in rows[:5]] == ['', '0.4', '0.02', '', '']
    row = rows[1]
    dest = outdir / 'metrics.json'
    result = CliRunner().invoke(helpers.script_module('calculate_metrics.py').main, [
        'calc', f'--images={outdir}/samples/distilled-rho0.4.npz', f'--ref={outdir}/digits.zip', '--metrics=fd_pixels',
        f'--dest={dest}'])
    assert result.exit_code == 0, result.output
    assert float(row['fd']) == pytest.approx(json.loads(dest.read_text())['results']['fd_pixels'], rel=1e-4)
    weights = torch.load(outdir / 'distilled-rho0.4' / 'model000002.pt', weights_only=True)
    assert int(row['parameters']) == sum(value.numel() for value in weights.values())
    digits = load_digits()
    machine = Recognizer(np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None].repeat(3, 1), digits.target)
    made = open_images(str(outdir / 'samples' / 'distilled-rho0.4.npz'))
    right = machine.predict(made.images(np.arange(16))) == made.label_ids   # as the quickstart counts
    assert float(row['recognised %']) == pytest.approx(100 * right.mean(), rel=1e-4)
    for row in rows:
        assert f'{float(row["clear %"]):.1f}%' in printed and row['model'] in printed


def test_recognition_tells_digits_from_what_is_none():
    """Real digits that the machine has not seen pass as often as promised; noise hardly does, two digits at once rarely."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    half = np.arange(len(pixels)) % 2 == 0
    recognizer = Recognizer(pixels[half], digits.target[half])
    unseen = recognizer.recognised_clearly(pixels[~half]).mean()
    assert 0.92 < unseen < 0.99 and recognizer.recognised_clearly(pixels[~half], 0.8).mean() < unseen
    controls = study_module.controls(pixels, digits.target, 0)
    assert recognizer.recognised_clearly(controls['noise']).mean() < 0.01
    assert recognizer.recognised_clearly(controls['two digits at once']).mean() < 0.3
    two = Recognizer(pixels[digits.target < 2], digits.target[digits.target < 2])   # two classes have one decision value
    assert two.recognised_clearly(pixels[digits.target < 2]).mean() > 0.9


# Files


def test_the_grid_has_a_row_of_digits_and_one_for_each_model(finished):
    outdir, _, _ = finished
    grid = np.asarray(PIL.Image.open(outdir / 'samples.png'))
    assert grid.shape[0] == 6 * 34 + 2                          # tiles of 32 pixels, with lines between
    for row, file in enumerate(['digits.zip', *(f'samples/{name}.npz' for name in MODELS)]):
        first = open_images(str(outdir / file)).images([0])[0].transpose(1, 2, 0)
        tile = grid[2 + 34 * row:34 + 34 * row, grid.shape[1] - 34 * 16:][:, :32]
        assert np.array_equal(tile, first.repeat(4, axis=0).repeat(4, axis=1))


def test_finished_stages_are_not_run_again(finished, monkeypatch):
    outdir, _, stages = finished
    assert len(stages) == len(set(stages)) == 1 + 2 + 2 * 3 + 2 + 1
    table = (outdir / 'results.csv').read_bytes()
    samples = outdir / 'samples' / 'on-data.npz'
    before = samples.read_bytes()
    samples.unlink()
    assert run_here(monkeypatch, outdir)[1] == ['samples/on-data.npz']
    assert samples.read_bytes() == before and (outdir / 'results.csv').read_bytes() == table


def test_a_stopped_study_ends_with_a_checkpoint(tmp_path):
    """SIGTERM while the teacher trains, from the shell script with a path of the caller: one line, and a checkpoint."""
    process = subprocess.Popen(
        ['bash', str(helpers.ROOT / 'bash_files' / 'study_distillation.sh'), '--outdir=here', *TINY, '--teacher-steps=100000'],
        cwd=tmp_path, env=helpers.environment(PYTHON=os.sys.executable), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    log = tmp_path / 'here' / 'teacher' / 'log.txt'
    until = time.monotonic() + 200
    while not log.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)  # some steps
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and 'Traceback' not in errors
    assert errors.strip().splitlines()[-1] == 'Error: stopped; the same command goes on from here'
    assert len(list((tmp_path / 'here' / 'teacher').glob('model*.pt'))) == 1


def test_a_stage_that_fails_is_named(tmp_path):
    study = a_study(tmp_path)
    with pytest.raises(study_module.UserError, match=r'x.npz could not be made \(Error: --config: there is no file'):
        study_module.Runner(study).run([study_module.SCRIPTS / 'image_sample.py', '--config', 'none.yaml', '--model_path=x'],
                                       str(tmp_path / 'x.npz'))


# Mistakes


@pytest.mark.parametrize('args, words', [
    (['--rhos=0.4,0.4'], 'list of different shares'), (['--rhos=0'], 'list of different shares'), (['--rhos=x'], '--rhos'),
    (['--samples=3'], '--samples'), (['--teacher-steps=0'], '--teacher-steps'),
])
def test_mistakes_end_in_one_line(args, words, tmp_path):
    assert words in helpers.fails(SCRIPT, f'--outdir={tmp_path}', *args)


def test_a_folder_keeps_its_settings(finished):
    outdir, _, _ = finished
    for change in ('--student-steps=9', '--rhos=0.4', '--seed=5'):
        assert f'another {change.split("=")[0]} (' in helpers.fails(SCRIPT, f'--outdir={outdir}', *TINY, change)
