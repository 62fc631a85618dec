"""Claims of the five studies in miniature: their comparisons are fair, their numbers are those of
the metrics, nothing that is finished is done again, and a study that is stopped or killed goes on."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pandas as pd
import PIL.Image
import psutil
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits

import studies
from data_utils import capacity
from data_utils import digits_memorization as memorization
from distillation import comparison
from distillation import digits_distillation as distillation
from distillation.cache import open_cache
from distillation.configs import read_experiment, read_network
from distillation.runs import build
from dnnlib import UserError
from long_tail import digits_long_tail as long_tail
from long_tail import tradeoff
from metrics.recognition import Recognizer
from simulations import advantage
from simulations import digits_multi_source as multi_source
from synthetic_data import digits_synthetic_data as synthetic_data
from synthetic_data import evaluate_data, gains
from synthetic_data.classify import open_classifier
from torch_utils.files.own import read_own
from train import prepare
from training.data.dataset import ImageDataset
from training.data.images import open_images
from training.diffusion.heldout import loss_of_snapshot
from training.schedules import LR_SCHEDULES
from training.snapshot import load_snapshot


@dataclasses.dataclass(frozen=True)
class Case:
    """A study, with options that let it end within seconds.

    settings  study.json with these options, as earlier versions wrote it
    tables    CSV files, and pictures with their least width
    first     one of the first results to be there, as a pattern
    lost      a result that is done again, alone, if it is gone
    long      more options, with which it runs for ever; `logs`: of what then runs side by side
    """

    script: str
    tiny: list
    settings: dict
    tables: list
    pictures: dict
    first: str
    lost: str
    long: list
    logs: list

    @property
    def module(self):
        return importlib.import_module(self.script.removesuffix('.py').replace('/', '.'))


CASES = {
    'multi_source': Case(
        'simulations/digits_multi_source.py',
        ['--seeds=1', '--n=6', '--sources=2', '--nums=6', '--triples=2', '--share=1', '--every=1',
         '--patience=1', '--most-steps=2', '--channels=16', '--samples=12', '--steps=1'],
        dict(share=1.0, lr=0.1, channels=16, every=1, patience=1, most_steps=2, samples=12, steps=1),
        ['results', 'advantages', 'summary', 'slopes'], {'study': 1500, 'samples': 100},
        'models/*/samples.npz', 'models/seed1-n6-3-8/samples.npz',
        ['--most-steps=1000000', '--every=1000000'],
        ['models/seed1-n6-3/log.txt', 'models/seed1-n6-8/log.txt']),
    'memorization': Case(
        'data_utils/digits_memorization.py',
        ['--seeds=3', '--sizes=10,20', '--factors=average', '--kimg=2', '--batch=500',
         '--channels=8', '--samples=24', '--sampling-steps=2'],
        dict(kimg=2, batch=500, lr=4e-3, channels=8, samples=24, sampling_steps=2),
        ['results', 'course', 'capacities', 'summary', 'effects', 'turns'],
        {'study': 1000, 'models/seed3-20/memorization-2-ema': 100},
        'models/*/memorization-*.json', 'models/seed3-20/memorization-2-optimal.json',
        ['--kimg=1000000'], ['models/seed3-10/log.txt', 'models/seed3-20/log.txt']),
    'distillation': Case(
        'distillation/digits_distillation.py',
        ['--seeds=1', '--teacher-steps=3', '--student-steps=4', '--data-steps=6', '--rho-steps=2',
         '--interval=2', '--teacher-samples=16', '--samples=16', '--batch=4', '--sampling-steps=2'],
        dict(teacher_steps=3, student_steps=4, data_steps=6, rho_steps=2, interval=2, batch=4,
             teacher_samples=16, samples=16, sampling_steps=2),
        ['results', 'summary', 'differences', 'ratios', 'claims', 'final'],
        {'study': 2500, 'samples': 500}, 'samples/seed1-on-data.npz',
        'samples/seed1-on-samples.npz', ['--student-steps=100000'],
        ['models/seed1-on-samples/log.txt', 'models/seed1-distilled-rho0.4/log.txt']),
    'long_tail': Case(
        'long_tail/digits_long_tail.py',
        ['--steps=6', '--seeds=3', '--methods=plain,cb,finetune,weakened', '--omegas=0,1.6',
         '--samples=200', '--ddim-steps=2', '--batch=8'],
        dict(steps=6, batch=8, tau=1.0, samples=200, ddim_steps=2, imb_factor=0.05, recipe=[
            '--ch=64', '--ch_mult=1', '--ch_mult=1', '--attn=', '--num_res_blocks=0',
            '--data_type=zip', '--img_size=8', '--conditional', '--num_workers=1',
            '--beta_T=0.01', '--lr=1e-3', '--warmup=100', '--ema_decay=0.995',
            '--sample_step=0']),
        ['results', 'classes', 'heldout', 'differences', 'summary'], {'study': 1500},
        'models/*/saved_*.json', 'models/cb-seed3/saved_5_cfg_omega0.625_ddim2.json',
        ['--steps=1000000'],
        ['models/cb-seed3/log.txt', 'models/plain-seed3/log.txt']),
    'synthetic_data': Case(
        'synthetic_data/digits_synthetic_data.py',
        ['--seeds=1', '--real=3', '--generated=6', '--top-scale=0.5', '--generator-duration=128',
         '--channels=8', '--steps=2', '--duration=128', '--test-images=100', '--shares=0.5'],
        dict(real=3, share=0.7, generated=6, top_scale=0.5, generator_duration=128, channels=8,
             steps=2, duration=128, eps=0.1, test_images=100),
        ['results', 'summary', 'claims'], {'study': 1000, 'samples': 100},
        'seed1/classifiers/*/accuracy.json', 'seed1/real3/generated-128-selected/best-3.npz',
        ['--generator-duration=1Gi', '--seeds=0,1'],
        [f'seed{seed}/real3/diffusion-{2**30}/log.txt' for seed in (0, 1)])}
of_all = pytest.mark.parametrize('name', CASES)


@pytest.fixture
def here(monkeypatch):
    """Stages of distillation run in this process, which spares a dozen starts of Python. The
    value: the stages that ran."""
    stages = []

    def run_stage(study, arguments, dest):
        script, *rest = map(str, arguments)
        module = helpers.script_module(os.path.relpath(script, helpers.ROOT))
        result = CliRunner().invoke(module.main, rest)
        assert result.exit_code == 0, result.output
        stages.append(os.path.relpath(dest, study.outdir))
    monkeypatch.setattr(distillation, 'run_stage', run_stage)
    return stages


def run(case: Case, outdir, *args) -> str:
    """The output of a study that runs in this process."""
    args = [f'--outdir={outdir}', *case.tiny, '--jobs=1', *args]
    result = CliRunner().invoke(case.module.main, args)
    assert result.exit_code == 0, result.output
    return result.stdout


def open_study(module, folder, *args):
    """A study with these options; nothing is written."""
    studied = []
    command = studies.command(module.Study)(lambda study: studied.append(study))
    result = CliRunner().invoke(command, [f'--outdir={folder}', *args])
    assert result.exit_code == 0, result.output
    return studied[0]


@pytest.fixture(scope='module')
def finished_studies():
    return {}


@pytest.fixture
def finished(name, here, finished_studies, tmp_path_factory):
    """(folder of the tiny study, what it printed), the same for all tests."""
    if name not in finished_studies:
        outdir = tmp_path_factory.mktemp(name) / 'out'
        finished_studies[name] = outdir, run(CASES[name], outdir)
    here.clear()
    return finished_studies[name]


def calculated(*args) -> dict:
    """The results of a command of calculate_metrics.py."""
    main = helpers.script_module('calculate_metrics.py').main
    dest = next(arg for arg in args if arg.startswith('--dest=')).removeprefix('--dest=')
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return json.loads(pathlib.Path(dest).read_text())['results']


def test_names_of_lines_that_end_together_stand_above_each_other():
    rows = [dict(x=x, seed=seed, y=10 + (seed == 0) * x, kind='a') for x in (1, 2) for seed in range(5)]
    panel = dict(table=pd.DataFrame(rows), x='x', y='y', group='kind', labels={'a': None}, each='seed')
    figure = studies.draw_panels([panel, panel], bottom=0)
    figure.canvas.draw()
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == list('12340') and axis.get_ylim()[0] == 0
        boxes = [text.get_window_extent() for text in axis.texts]
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    studies.plt.close(figure)


# What all studies do


@of_all
def test_tables_and_pictures(name, finished):
    outdir, text = finished
    for table in CASES[name].tables:
        assert len(pd.read_csv(outdir / f'{table}.csv')) and f'{table}.csv' in text
    for picture, width in CASES[name].pictures.items():
        with PIL.Image.open(outdir / f'{picture}.png') as image:
            assert image.width > width
    assert 'report.html' in text and f'<h1>{outdir.name}</h1>' in (outdir / 'report.html').read_text()
    if 'study' in CASES[name].pictures:
        assert (outdir / 'study.svg').stat().st_size > 10_000


@of_all
def test_a_folder_of_an_earlier_version_goes_on(name, finished):
    kept = json.loads((finished[0] / 'study.json').read_text())
    assert kept.pop('image_channels') == 1 and kept == CASES[name].settings    # without it: three, see test_shapes.py


@of_all
def test_nothing_finished_is_done_again(name, finished):
    """What is lost is done again, with the same result; all other files of models stay."""
    outdir, _ = finished
    case = CASES[name]
    tables = {table: (outdir / f'{table}.csv').read_bytes() for table in case.tables}
    lost = outdir / case.lost
    stamps = {path: path.stat().st_mtime_ns for path in outdir.rglob('*')
              if len(path.relative_to(outdir).parts) > 1 and path.is_file()
              and not path.name.startswith(lost.stem)}
    lost.unlink()
    leftover = lost.with_name('.x.npz.0123abcd.tmp')           # of a process that was killed
    leftover.touch()
    run(case, outdir)
    assert not leftover.exists()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and len(stamps) > 15
    assert tables == {table: (outdir / f'{table}.csv').read_bytes() for table in case.tables}
    assert lost.is_file()


def wait_for(logs, process, words):
    until = time.monotonic() + 600
    while not all(log.is_file() and words in log.read_text() for log in logs):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_work(process, seconds=4):
    """Until the processes of a study have worked for some time: some steps of training."""
    def worked():
        children = psutil.Process(process.pid).children(recursive=True)
        return sum(child.cpu_times().user for child in children)

    begin = worked()
    while worked() < begin + seconds:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@contextlib.contextmanager
def start(case: Case, folder, *args):
    """A process: the script of the study, with a path of the caller."""
    script = helpers.ROOT / 'bash_files' / f'study_{pathlib.Path(case.script).stem[7:]}.sh'
    process = subprocess.Popen(
        ['bash', str(script), '--outdir=here', *case.tiny, '--jobs=2', *args], cwd=folder,
        env=helpers.environment(PYTHON=sys.executable), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()                                         # the others follow
        process.wait()


@pytest.mark.slow
@of_all
def test_a_stopped_study_goes_on(name, finished, tmp_path):
    """SIGTERM to the study, then Ctrl-C to all of its processes: it ends with one line and a
    checkpoint of each model, and none of its processes is left."""
    case = CASES[name]
    if name == 'distillation':                                 # students, after the teacher
        with start(case, tmp_path, *case.long) as process:     # a folder of these settings
            while not (tmp_path / 'here' / 'study.json').is_file():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
        shutil.copytree(finished[0], tmp_path / 'here', dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns('study.json', '*-on-samples*', '*-dist*'))
    logs = [tmp_path / 'here' / log for log in case.logs]
    for send in (os.kill, os.killpg):
        with start(case, tmp_path, *case.long) as process:
            words = 'Starting at 0' if send is os.kill else 'Resuming from'
            wait_for(logs, process, words)
            wait_for_work(process)
            family = psutil.Process(process.pid).children(recursive=True)
            send(process.pid, signal.SIGINT if send is os.killpg else signal.SIGTERM)
            _, errors = process.communicate(timeout=600)
            last = errors.strip().splitlines()[-1]
            assert last == 'Error: stopped; the same command goes on from here', errors
            assert process.returncode == 1 and 'Traceback' not in errors
            assert len(family) >= 2 and not psutil.wait_procs(family, timeout=60)[1]
            for log in logs:
                assert list(log.parent.glob('*.pt'))


@pytest.mark.slow
@of_all
def test_a_killed_study_ends_with_the_same_numbers(name, finished, tmp_path):
    """kill -9 when the first result is there, two at a time; its processes end too."""
    outdir, _ = finished
    case = CASES[name]
    with start(case, tmp_path) as process:
        while not list((tmp_path / 'here').glob(case.first)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert not (tmp_path / 'here' / 'results.csv').exists()
    run(case, tmp_path / 'here')
    ours, theirs = (pd.read_csv(folder / 'results.csv') for folder in (tmp_path / 'here', outdir))
    pd.testing.assert_frame_equal(ours.drop(columns='seconds', errors='ignore'),
                                  theirs.drop(columns='seconds', errors='ignore'), rtol=1e-3)


@pytest.mark.parametrize('name, option, words', [
    ('multi_source', '--steps=2', '--steps (1 instead of 2)'),
    ('multi_source', '--lr=0.2', '--lr (0.1 instead of 0.2)'),
    ('memorization', '--sampling-steps=3', '--sampling-steps (2 instead of 3)'),
    ('distillation', '--student-steps=8', 'another --student-steps ('),
    ('distillation', '--interval=1', 'another --interval ('),
    ('long_tail', '--steps=7', '--steps (6 instead of 7)'),
    ('synthetic_data', '--steps=3', '--steps (2 instead of 3)')])
def test_a_folder_keeps_its_settings(name, option, words, tmp_path):
    (tmp_path / 'study.json').write_text(json.dumps(CASES[name].settings))
    line = helpers.fails(CASES[name].script, f'--outdir={tmp_path}', *CASES[name].tiny, option)
    assert words in line and f'--outdir={tmp_path}' in line


@pytest.mark.parametrize('name, option, words', [
    ('multi_source', '--nums=3,101', '--nums: give 2 to 100 images'),
    ('multi_source', '--n=1', '--n: give 2 to 100 images'),
    ('multi_source', '--sources=1,3', '--sources'),
    ('multi_source', '--seeds=4294967296', '--seeds: give numbers below 2^31'),
    ('memorization', '--sizes=20,1750', '--sizes'),
    ('memorization', '--channels=5', '--channels=5 must be even'),
    ('memorization', '--channels=6', '--channels: '),
    ('memorization', '--factors=depth', '--factors'),
    ('distillation', '--rhos=0.4,2', '--rhos'),
    ('distillation', '--rho-steps=6', '--rho-steps=6 is more than --student-steps=4'),
    ('distillation', '--interval=3', '--student-steps=4 is no multiple of --interval=3'),
    ('long_tail', '--omegas=-1,1', '--omegas'),
    ('long_tail', '--ddim-steps=1001', '--ddim-steps'),
    ('long_tail', '--methods=finetune', '--methods'),
    ('long_tail', '--methods=cb,weakened', '--methods'),
    ('long_tail', '--methods=plain', '--methods'),
    ('synthetic_data', '--real=170', '--real=170 leaves 4 images'),
    ('synthetic_data', '--reals=5,170', '--reals=170 leaves 4 images'),
    ('synthetic_data', '--shares=0,0.5', '--shares'),
    ('synthetic_data', '--numbers=7', '--numbers: give numbers from 1 to 6')])
def test_after_a_mistake_the_folder_is_still_free(name, option, words, tmp_path):
    assert words in helpers.fails(CASES[name].script, f'--outdir={tmp_path}/out', *CASES[name].tiny, option)
    assert not (tmp_path / 'out').exists()


def test_memorization_of_batches_that_outgrow_a_run(tmp_path):
    """Snapshots are named after the images of whole steps: 2 of 1,500, not 2,000."""
    model = memorization.Model(0, 20)
    study = open_study(memorization, tmp_path, '--batch=1500')
    assert study.network(model, 2).endswith('network-snapshot-0000003.pkl')
    study = open_study(memorization, tmp_path)
    assert study.network(model, 20).endswith('network-snapshot-0000020.pkl')


def test_a_folder_of_the_earlier_memorization_study_is_refused(tmp_path):
    """Its models are others, whatever its settings."""
    (tmp_path / 'study.json').write_text(json.dumps(
        dict(kimg=20, batch=64, lr=4e-3, channels=16, samples=256, steps=12, seed=0)))
    line = helpers.fails(CASES['memorization'].script, f'--outdir={tmp_path}')
    assert f'--outdir={tmp_path}' in line and 'another --sampling-steps' in line


def test_a_folder_with_other_files_is_no_folder_of_a_study(tmp_path):
    (tmp_path / 'study.png').write_text('mine')
    line = helpers.fails(CASES['memorization'].script, f'--outdir={tmp_path}')
    assert '--outdir' in line and 'is not empty' in line and [path.name for path in tmp_path.iterdir()] == ['study.png']


@pytest.mark.parametrize('text', ['[1]', '{', '7'])
def test_a_study_that_cannot_be_read(text, tmp_path):
    (tmp_path / 'study.json').write_text(text)
    line = helpers.fails(CASES['memorization'].script, f'--outdir={tmp_path}')
    assert '--outdir' in line and 'study.json' in line


@of_all
def test_a_study_is_one_command(name, monkeypatch, tmp_path):
    from torch_utils import distributed
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 2)
    line = helpers.fails(CASES[name].script, f'--outdir={tmp_path}')
    assert 'without torchrun' in line and not list(tmp_path.iterdir())


# Does training on several sources help?


def test_order_and_triples_go_by_the_mean_images():
    """The three classes with the closest mean images, then always the closest one on average."""
    digits = load_digits()
    means = np.array([digits.data[digits.target == k].mean(0) for k in range(10)]) * 255 / 16
    far = np.linalg.norm(means[:, None] - means, axis=-1)
    ranked = sorted(itertools.combinations(range(10), 3),
                    key=lambda c: sum(far[a, b] for a, b in itertools.combinations(c, 2)))
    order = list(ranked[0])
    while len(order) < 10:
        order.append(min(set(range(10)) - set(order), key=lambda k: far[k, order].mean()))
    assert tuple(order) == multi_source.ORDER
    assert multi_source.triples(3) == [ranked[0], ranked[60], ranked[119]]
    np.testing.assert_allclose(multi_source.distances(), far, atol=1)  # of pixels that are rounded


def test_plan_has_each_measured_class_alone_and_one_larger_model_for_each_place(tmp_path):
    study = open_study(multi_source, tmp_path, '--sources=3,10', '--nums=10,20', '--triples=2')
    models = multi_source.plan(study)
    order = multi_source.ORDER
    assert len(models) == len(set(models)) == 3 * (6 + 3 + 4)
    for seed in range(3):
        sets = [(model.n, model.classes) for model in models if model.seed == seed]
        assert sets == [
            *((20, (digit,)) for digit in (3, 8, 9)), *((10, (digit,)) for digit in (3, 8, 9)),
            *((20, (digit,)) for digit in (0, 6, 7)), (20, order[:3]), (20, order),
            (10, order[:3]), (20, (0, 6, 7))]
    assert [model.seed for model in models] == sorted(model.seed for model in models)
    assert {model.measured for model in models if len(model.classes) == 10} == {(3, 8, 9)}


def test_models_of_one_n_differ_in_their_sources_alone(tmp_path):
    """The same learning rate at each step, as many images of each class in it, for all."""
    study = open_study(multi_source, tmp_path, '--seeds=4', '--most-steps=30', '--triples=2')
    models = multi_source.plan(study)
    multi_source.make_data(study, models)
    schedules = []
    for model in models:
        config = multi_source.settings(study, model)
        assert config['batch'] == 0.4 * model.n * len(model.classes)
        assert config['duration'] == 30 * config['batch']
        assert config['seed'] == 4 and config['network']['model_channels'] == 16
        rate = LR_SCHEDULES[config['lr_schedule']]
        schedules.append([
            rate(step * config['batch'], config['batch'], config['lr'], config['decay'],
                 config['rampup_Mimg']) for step in range(3)])
    for schedule in schedules:
        assert schedule == pytest.approx(schedules[0])


def test_held_out_digits_are_in_no_training_set_of_their_seed(tmp_path):
    study = open_study(multi_source, tmp_path, '--nums=3,100', '--seeds=0,1', '--triples=2')
    models = multi_source.plan(study)
    multi_source.make_data(study, models)

    def images(path):
        data = ImageDataset(path)
        return {image.tobytes() for image in data.images(range(len(data)))}

    for model in models:
        trained = images(study.data(model))
        data = ImageDataset(study.data(model))
        assert len(data) == model.n * len(model.classes) and data.classes == list(model.classes)
        validation, tests = (
            set().union(*(images(study.held_out(model.seed, digit, part))
                          for digit in model.measured)) for part in ('validation', 'test'))
        assert not trained & (validation | tests) and not validation & tests
        held_out = sum((load_digits().target == digit).sum() - 100 for digit in model.measured)
        assert len(validation | tests) == held_out and 0.33 < len(validation) / held_out < 0.36
    alone, among = (ImageDataset(study.data(multi_source.Model(0, 3, classes)))
                    for classes in ((8,), (3, 8, 9)))
    rows = np.flatnonzero(among.label_ids == 1)
    assert np.array_equal(alone.images(range(3)), among.images(rows))


@pytest.mark.parametrize('name', ['multi_source'])
def test_losses_and_distances_are_those_of_the_metrics(name, finished, tmp_path):
    outdir, printed = finished
    results = pd.read_csv(outdir / 'results.csv')
    row = results.set_index(['seed', 'n', 'classes', 'class']).loc[(1, 6, '3-8', 8)]
    folder = outdir / 'models' / 'seed1-n6-3-8'
    test = f'{outdir}/data/seed1-test-8.zip'
    snapshot = load_snapshot(str(folder / 'network-best-8.pkl'))
    measured, _ = loss_of_snapshot(snapshot, test)
    assert row['loss'] == pytest.approx(measured(seed=1).results()['heldout'], rel=1e-5)
    distance = calculated(
        'calc', f'--images={folder}/samples.npz', '--metrics=fd_pixels', f'--ref={test}',
        '--class=8', '--ref-class=8', '--num=12', f'--dest={tmp_path}/metrics.json')
    assert row['fd'] == pytest.approx(distance['fd_pixels'], rel=1e-4)
    rows = [json.loads(line) for line in (folder / 'validation.jsonl').read_text().splitlines()]
    best = min(rows, key=lambda row: row['8'])
    assert row['best step'] == best['nimg'] / 12 and snapshot.nimg == best['nimg']
    validated, _ = loss_of_snapshot(snapshot, test.replace('-test-', '-validation-'))
    assert best['8'] == pytest.approx(validated(seed=1).results()['heldout'], rel=1e-3)  # float16
    assert row['steps'] == rows[-1]['nimg'] / 12
    summary = pd.read_csv(outdir / 'summary.csv')
    assert summary['classes'].tolist() == ['3-8', '0-6-7', '3-8-9']
    assert f'{summary["advantage"][0]:+.1f}' in printed


def rows_of(loss, seeds=range(3)):
    """Rows of results: `loss(seed, number of sources, class)`, of the first classes."""
    return pd.DataFrame([
        {'seed': seed, 'n': 20, 'classes': '-'.join('389'[:max(count, 1)]) if count > 1 else str(digit),
         'sources': count, 'class': digit, 'loss': loss(seed, count, digit), 'fd': 100.0 / count}
        for seed in seeds for count in (1, 2, 3) for digit in (3, 8)])


def test_advantages_pair_seeds_and_classes():
    """Seeds and classes that differ much, by the same share with one source and with many: no
    doubt."""
    paired = advantage.pair(rows_of(
        lambda seed, count, digit: (1 + seed + digit) * (1 - 0.1 * (count - 1))))
    summary = advantage.summarise(paired)
    assert summary['advantage'].tolist() == pytest.approx([10, 20])
    assert summary['95% interval of advantage'].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert summary['fd advantage'].tolist() == pytest.approx([50, 200 / 3])
    means = np.array([0.1 * (1 + seed + 5.5) for seed in range(3)])
    low, high = scipy.stats.t.interval(0.95, 2, means.mean(), scipy.stats.sem(means))
    assert summary['difference'][0] == pytest.approx(means.mean())
    assert summary['95% interval of difference'][0] == pytest.approx((high - low) / 2)
    assert summary['helps'].tolist() == ['yes', 'yes']


def test_slopes_are_those_of_each_seed():
    paired = advantage.pair(rows_of(lambda seed, count, digit: 1 / count + 0.01 * seed))
    x = paired['sources']
    slopes = [np.polyfit(rows['sources'], rows['advantage'], 1)[0]
              for _, rows in paired.groupby('seed')]
    mean, interval = advantage.slope(paired, x, 'advantage')
    assert mean == pytest.approx(np.mean(slopes))
    assert interval == pytest.approx(scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(slopes))
    offset = paired.assign(advantage=paired['advantage'] + 100 * paired['class'])
    within, _ = advantage.slope(offset, x + paired['class'], 'advantage', ['seed', 'class'])
    assert within == pytest.approx(mean)
    assert np.isnan(advantage.slope(paired, 0 * x, 'advantage')[0])


def test_each_claim_on_a_slope_has_its_own_sense():
    """Advantages that grow with sources, fall with n and grow with distance."""
    paired = pd.DataFrame([
        {'seed': seed, 'class': 3, 'n': n, 'classes': '-'.join(map(str, classes)),
         'distance': 50.0 * len(classes), 'difference': 0.1,
         'advantage': 10 * len(classes) - 3 * np.log(n) + seed}
        for seed in range(3) for n, classes in itertools.product((10, 20), ((3, 8), (3, 8, 9)))])
    table = advantage.slopes(advantage.panels(paired, {
        'sources': [(2, 10, (3, 8)), (3, 10, (3, 8, 9))], 'n': [(10, 10, (3, 8)), (20, 20, (3, 8))],
        'distance': [(100.0, 20, (3, 8)), (150.0, 20, (3, 8, 9))]}))
    assert table['advantage'].tolist() == pytest.approx([10 / np.log(1.5), -3, 20, 20])
    assert table['verdict by advantage'].tolist() == ['yes', 'yes', 'no', 'no']
    assert table['verdict by difference'].tolist() == ['undecided'] * 4


@pytest.mark.parametrize('mean, interval, text', [
    (2, 1, 'yes'), (-2, 1, 'no'), (2, 3, 'undecided'), (2, float('nan'), 'undecided')])
def test_a_verdict_needs_an_interval_without_zero(mean, interval, text):
    assert advantage.verdict(mean, interval) == text


# When does a model copy its training set?


def test_models_differ_in_one_factor_each(tmp_path):
    """Of one seed: larger sets contain smaller ones, labels are of the same images, fewer classes
    fill up with more of each, and no model sees what is held out."""
    study = open_study(memorization, tmp_path, '--seeds=7', '--sizes=20,30',
                       '--factors=labels,classes,length,width,loss,average')
    models = memorization.plan(study)
    assert len(models) == len(set(models)) == 2 + (2 + 2) + 2 + (1 + 1) + 2
    memorization.make_data(study, models)
    sets = {model: ImageDataset(study.data(model)) for model in models}
    base, large = (memorization.Model(7, size) for size in (20, 30))
    inside, outside = ({image.tobytes() for image in sets[model].images(range(model.size))}
                       for model in (base, large))
    assert inside < outside
    for model, data in sets.items():
        unseen = ImageDataset(study.held_out(model))
        images = data.images(range(len(data)))
        assert not {image.tobytes() for image in images} & {
            image.tobytes() for image in unseen.images(range(len(unseen)))}
        if model.classes == 10:
            same = dataclasses.replace(base, size=model.size)
            assert np.array_equal(images, sets[same].images(range(model.size)))
            assert model.size < len(unseen) == 200
        else:
            assert len(np.unique(data.label_ids)) == model.classes and 7 in data.label_ids
        config = memorization.settings(study, model)
        assert config['cond'] == (model.labels != 'none') and config['duration_rule'] == 'fixed'
        assert config['network']['model_channels'] == 16 * model.width
    for kimg in (9, 18, 24, 36):
        assert prepare(memorization.settings(study, base, kimg))[2].total_nimg == kimg * 1000
    labels = {model.labels: sets[model].label_ids for model in models if model.size == 30}
    assert np.array_equal(np.bincount(labels['true']), [3] * 10)
    assert not np.array_equal(labels['random'], labels['true'])
    unique, = (model for model in memorization.plan(open_study(
        memorization, tmp_path, '--seeds=7', '--sizes=10,50', '--factors=labels'))
        if model.labels == 'unique')
    memorization.make_data(study, [unique])
    assert ImageDataset(study.data(unique)).label_ids.tolist() == list(range(50))


def test_what_is_read_from_one_run_on_its_way(tmp_path):
    """Half and twice the length, equal epochs and averages need no run of their own."""
    study = open_study(memorization, tmp_path, '--sizes=20,30', '--factors=length,average')
    assert study.points(memorization.Model(0, 20)) == {
        10: {'ema'}, 13: {'ema'}, 15: set(), 20: {'ema', 'last', 'long', 'optimal'}}
    assert list(study.points(memorization.Model(0, 30))) == [3, 4, 6, 8, 10, 15, 20, 40]
    plain = open_study(memorization, tmp_path, '--sizes=20,30', '--factors=width')
    assert plain.points(memorization.Model(0, 30, width=2)) == {20: {'ema'}}


@pytest.mark.parametrize('shares, size, bound', [
    ([1, 0.9, 0.3, 0], 20, ''), ([1, 0.95, 0.85, 0], 20 * 1.5 ** 0.5, ''),
    ([0.8, 1, 0.3, 0], 20, ''), ([0.8, 0.9, 0.3, 0], 10, '<'), ([1, 1, 1, 0.9], 50, '>')])
def test_capacity(shares, size, bound):
    """Linear in the logarithm of the size; what does not fall is averaged."""
    found, side = capacity.crossing([10, 20, 30, 50], shares, 0.9)
    assert (found, side) == (pytest.approx(size), bound)


def capacities_of(**columns):
    return pd.DataFrame(columns).rename_axis('seed')


def test_ratios_of_capacities_are_paired_and_bounds_are_counted():
    """Seeds differ much, the factor does the same in all. Where one of a pair is a bound the ratio
    counts as one, if the true one is further from 1; where both are there is none."""
    theirs = capacities_of(capacity=[10, 20, 30, 40, 50], bound=['', '', '', '<', ''])
    ours = capacities_of(capacity=[5, 10, 15, 20, 60], bound=['', '', '<', '<', '<'])
    logs, bounded = capacity.ratios(ours, theirs)
    assert logs.tolist() == pytest.approx([np.log(0.5)] * 3) and bounded.tolist() == [False, False, True]
    back, _ = capacity.ratios(theirs, ours)
    assert back.tolist() == pytest.approx((-logs).tolist())
    assert capacity.ratios(ours, ours)[0].tolist() == [0, 0]


def test_what_decides_on_a_variant():
    """The ratio of C50; if too few seeds have one, the difference of the shares of copies."""
    ratios = {('base', 10): 1.0, ('base', 20): 0.7, ('base', 40): 0.2, ('1 class', 10): 0.9,
              ('1 class', 20): 0.3, ('unique labels', 40): 0.9, ('true labels', 20): 0.72}
    rows = pd.DataFrame([
        dict(variant=variant, seed=seed, size=size, memorization_ratio=ratio - 0.01 * seed)
        for seed in range(5) for (variant, size), ratio in ratios.items()])
    claims = {(name, 'base'): expected for name, expected in (
        ('1 class', 'less'), ('unique labels', 'more'), ('true labels', 'more'))}
    effects = capacity.effects(rows, capacity.capacities(rows), claims)
    decided = effects.dropna(subset='verdict').set_index('variant')
    assert decided['verdict'].to_dict() == {
        '1 class': 'yes', 'unique labels': 'yes', 'true labels': 'yes'}
    assert decided['measure'].tolist() == ['C50', 'difference', 'difference']
    assert decided['mean'].tolist()[1:] == pytest.approx([0.7, 0.02])
    small, large = 10 * 2 ** (0.4 / 0.6), 20 * 2 ** 0.4
    assert decided.loc['1 class', 'mean'] == pytest.approx(small / large, rel=0.02)
    fall, = capacity.falls(rows, {'base': (10, 40), '1 class': (10, 40)}).to_dict('records')
    assert (fall['mean'], fall['verdict']) == (pytest.approx(-0.8), 'yes')


@pytest.mark.parametrize('expected, low, high, verdict', [
    ('more', 1.05, 1.3, 'yes'), ('more', 0.9, 1.1, 'no'), ('more', 0.7, 0.9, 'no'),
    ('more', 0.9, 1.3, 'undecided'), ('less', 0.7, 0.9, 'yes'), ('same', 0.9, 1.1, 'yes'),
    ('same', 1.2, 1.4, 'no'), ('same', 1.1, 1.4, 'undecided'), ('other', 0.7, 0.9, 'less'),
    ('other', 0.9, 1.1, 'same'), ('other', 0.8, 1.1, 'undecided')])
def test_verdicts(expected, low, high, verdict):
    assert capacity.verdict(dict(measure='C50', low=low, high=high), expected) == verdict


def test_where_the_loss_turns_and_copying_begins():
    kimg = np.array([3, 4, 6, 9, 12])
    rows = pd.DataFrame(dict(seed=0, size=20, kimg=kimg, heldout=(np.log(kimg) - np.log(5)) ** 2,
                             memorization_ratio=[0, 0, 0, 0.2, 0.6]))
    turns = capacity.turns(rows)
    row, = turns.to_dict('records')
    assert row['turn'] == pytest.approx(5) and row['begin'] == pytest.approx(6 * 1.5 ** 0.5)
    again, = capacity.turns(rows[rows['kimg'] > 4]).to_dict('records')
    assert (again['turn'], again['turn_bound'], again['begin_bound']) == (6, '<', '')
    effect, = capacity.copies_and_loss(turns, 20).to_dict('records')
    assert effect['mean'] == pytest.approx(row['begin'] / row['turn']) and effect['bounds'] == 0
    assert capacity.copies_and_loss(turns, 30).empty


@pytest.mark.parametrize('name', ['memorization'])
def test_ratios_are_those_of_the_metric(name, finished, tmp_path):
    outdir, printed = finished
    results = pd.read_csv(outdir / 'results.csv').set_index(['variant', 'seed', 'size']).sort_index()
    assert len(results) == 4 * 2 and 'Copies (%)' in printed
    assert (results.loc['optimal denoiser', 'memorization_ratio'] == 1).all()
    folder = outdir / 'models' / 'seed3-20'
    measured = calculated(
        'memorization', f'--data={outdir}/data/seed3-20-10classes-true.zip', '--seeds=0-23',
        '--steps=2', f'--net={folder}/network-snapshot-0000002.pkl',
        f'--dest={tmp_path}/memorization.json')
    row = results.loc[('base', 3, 20)]
    assert measured['memorization_ratio'] == pytest.approx(row['memorization_ratio'], abs=1e-5)
    assert measured['mean_distance'] == pytest.approx(row['mean_distance'], rel=1e-3)
    # Of one run; the usual average of four steps hardly differs from the last weights.
    distances = [results.loc[(name, 3, 20), 'mean_distance']
                 for name in ('base', 'no average', 'longer average')]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3) != distances[2]
    study = open_study(memorization, outdir, *CASES[name].tiny)
    nets = [memorization.open_denoiser(study, memorization.Model(3, 20), *point).net.state_dict()
            for point in ((2, 'long'), (1, 'ema'), (2, 'ema'))]
    mean, half, full = (net['model.enc.8x8_conv.weight'] for net in nets)
    torch.testing.assert_close(mean, (half + 2 * full) / 3)    # 3/4 of 2,000 images is all of them


# Can a model be trained from a model?

@pytest.mark.parametrize('name', ['distillation'])
def test_students_differ_in_what_they_learn_from_alone(name, finished):
    """The same network, steps, batch, learning rate and seed for all, and one teacher."""
    outdir, _ = finished
    students = ['distilled-rho0.4', 'on-samples', 'on-data', 'distilled-rho0.02']
    options = {name: json.loads((outdir / 'models' / f'seed1-{name}' / 'training_options.json')
                                .read_text()) for name in students}
    sections = [one.get('student') or one for one in options.values()]
    for key in read_network(str(distillation.BASELINE)).__dict__.keys() - {'total_steps',
                                                                           'save_interval'}:
        assert all(section[key] == sections[0][key] for section in sections)
    assert [section['total_steps'] for section in sections] == [4, 4, 6, 2]
    assert {section['lr_anneal_steps'] for section in sections} == {0}
    assert {one['seed'] for one in options.values()} == {1}
    teachers = [options[f'distilled-rho{rho}']['teacher'] for rho in (0.4, 0.02)]
    assert [teacher['BATCH'] for teacher in teachers] == [0.4, 0.02]
    assert all(teacher['model_path'] == 'ema_0.995_000003.pt' for teacher in teachers)
    assert options['on-samples']['data_dir'] == 'seed1-teacher.npz'
    assert options['on-data']['data_dir'] == 'digits.zip'
    caches = [outdir / 'cache' / f'seed1-distilled-rho{rho}.cache' for rho in (0.4, 0.02)]
    assert [len(open_cache(str(cache))[0]) for cache in caches] == [80, 4]


def test_the_configurations_agree():
    """The experiment's student is the baseline's, and its teacher the one that is trained."""
    experiment = read_experiment(str(distillation.DISTILLED))
    teacher = read_network(str(distillation.TEACHER))
    assert experiment.student == read_network(str(distillation.BASELINE))
    assert experiment.teacher.model == teacher.model
    assert experiment.teacher.diffusion == teacher.diffusion
    assert teacher.diffusion.diffusion_steps == distillation.CHAIN
    sizes = [sum(p.numel() for p in build(part).parameters())
             for part in (teacher, experiment.student)]
    assert sizes[0] > 2 * sizes[1]


def test_no_distilled_student_waits_for_data_or_samples(tmp_path):
    study = open_study(distillation, tmp_path, '--rhos=0.02,0.1', '--seeds=7')
    chains = [*distillation.first_chains(study), *distillation.further_chains(study)]
    assert [pathlib.Path(chain[-1][1]).name for chain in chains] == [
        'seed7-teacher.npz', 'seed7-on-data.npz', 'seed7-distilled-rho0.4.npz',
        'seed7-on-samples.npz', 'ema_0.995_000200.pt', 'ema_0.995_000200.pt']
    for chain in (chains[2], *chains[4:]):
        words = ' '.join(str(word) for arguments, _ in chain for word in arguments)
        assert 'data_dir' not in words and '.npz' not in words.replace(chain[-1][1], '')


def test_compute_counts_all_passes_but_those_of_the_teachers_training(tmp_path):
    """In units of a student's pass; the teacher's has two."""
    study = open_study(distillation, tmp_path, '--batch=10', '--teacher-samples=20')
    costs = distillation.Costs(teacher=2, student=1)
    models = [distillation.Model(0, 'distilled', 0.4), distillation.Model(0, 'on-samples'),
              distillation.Model(0, 'on-data')]
    first, second = ([costs.of_training(study, model, steps) for model in models]
                     for steps in (0, 1))
    assert first == [20 * 10 * 25 * 2, 20 * 50 * 2, 0]
    assert np.subtract(second, first).tolist() == [50, 30, 30]
    real = distillation.Costs.of(distillation.TEACHER, distillation.BASELINE)
    assert real.student > 1e6 and 1.9 < real.teacher / real.student < 2.2


@pytest.mark.parametrize('name', ['distillation'])
def test_curves_are_what_training_measured(name, finished, tmp_path):
    outdir, printed = finished
    rows = pd.read_csv(outdir / 'results.csv')
    assert len(rows) == 1 + 1 + 2 + 2 + 3 + 1
    steps = rows[(rows['seed'] == 1) & (rows['rho'] == 0.4)].set_index('steps')
    assert steps.index.tolist() == [2, 4]
    kept = [json.loads(line) for line in (
        outdir / 'models' / 'seed1-distilled-rho0.4' / 'metrics.jsonl').read_text().splitlines()]
    assert steps['fd'].tolist() == pytest.approx([row['fd_pixels'] for row in kept], rel=1e-4)
    final = pd.read_csv(outdir / 'final.csv').set_index(['seed', 'learned from'])
    samples = f'{outdir}/samples/seed1-distilled-rho0.4.npz'
    measured = calculated('calc', f'--images={samples}', f'--ref={outdir}/digits.zip',
                          '--metrics=fd_pixels,recognition', f'--dest={tmp_path}/metrics.json')
    row = final.loc[(1, "teacher's steps")]
    assert row['fd'] == pytest.approx(measured['fd_pixels'], rel=1e-4)
    assert row['recognised'] == pytest.approx(measured['recognition'], rel=1e-4)
    assert printed.count('undecided') + printed.count(' yes') + printed.count(' no\n') >= 5


def curve(seed, origin, steps, distances, rho=None, before=0, each=1):
    return [{'seed': seed, 'learned from': origin, 'rho': rho, 'steps': n, 'fd': fd,
             'gmac': before + each * n, 'recognised': 0.5}
            for n, fd in zip(steps, distances, strict=True)]


def test_students_are_compared_by_seed_at_equal_steps_and_at_equal_compute():
    """Distances 1000 s / n of distilled students and 4000 s / n of the others, whose steps cost a
    quarter: four times as good in as many steps, and no better for as much compute."""
    steps = np.array([100, 200, 400])
    rows = []
    for seed, scale in enumerate([1, 1.1, 3]):
        rows += curve(seed, "teacher's steps", steps, 1000 * scale / steps, 0.4, each=4)
        rows += curve(seed, 'real digits', steps, 4000 * scale / steps, each=1)
        rows += curve(seed, "teacher's steps", [200], 2 * 1000 * scale / np.array([200]), 0.1)
    results = pd.DataFrame(rows)
    table = comparison.compare(results)
    equal = table.groupby('at equal')
    assert sorted(set(equal.get_group('steps')['x'])) == [100, 200, 400]
    assert set(equal.get_group('gmac')['x']) == {400}           # all that both have reached
    np.testing.assert_allclose(equal.get_group('steps')['log ratio'], -np.log(4))
    np.testing.assert_allclose(equal.get_group('gmac')['log ratio'], 0, atol=1e-9)
    ratios = comparison.over_training(table).set_index(['at equal', 'x'])
    assert ratios.loc[('steps', 200), 'estimate'] == pytest.approx(0.25)
    assert ratios.loc[('gmac', 400), 'verdict'] == 'undecided'
    found = comparison.claims(results, table, 200).set_index('claim')
    steps = found.loc["teacher's steps beat real digits at equal steps"]
    assert steps['estimate'] == pytest.approx(0.25) and steps['verdict'] == 'yes'
    slope = found.loc['a larger rho is better (slope)']
    assert slope['estimate'] == pytest.approx(-0.5) and slope['verdict'] == 'yes'


def test_a_claim_is_settled_by_its_interval():
    values = pd.Series([-0.1, -0.3, 0.1])
    low, high = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    row = comparison.claim('x', values)
    assert [row['low'], row['high']] == pytest.approx(np.exp([low, high]))
    assert [comparison.claim('x', one)['verdict'] for one in (
        values, values - 1, values + 1, pd.Series([-1.0]))] == [
            'undecided', 'yes', 'no', 'undecided']


@pytest.mark.parametrize('name', ['distillation'])
def test_the_grid_has_a_row_of_digits_and_one_for_each_model(name, finished):
    outdir, _ = finished
    grid = np.asarray(PIL.Image.open(outdir / 'samples.png'))
    grid = grid[-(5 * 51 + 3):]                                # tiles of 48 pixels, lines between
    assert (grid[:3] == 255).all()                             # below the title
    models = ['teacher', 'distilled-rho0.4', 'on-samples', 'on-data']
    for row, file in enumerate(['digits.zip', *(f'samples/seed1-{model}.npz' for model in models)]):
        first = open_images(str(outdir / file)).images([0])[0].transpose(1, 2, 0)
        tile = grid[3 + 51 * row:51 + 51 * row, grid.shape[1] - 51 * 16:][:, :48]
        assert (tile == first.repeat(6, axis=0).repeat(6, axis=1)).all()


def test_recognition_tells_digits_from_what_is_none():
    """Real digits that the machine has not seen pass as often as promised; noise hardly does, two
    digits at once rarely."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    half = np.arange(len(pixels)) % 2 == 0
    recognizer = Recognizer(pixels[half], digits.target[half])
    unseen = recognizer.recognised_clearly(pixels[~half]).mean()
    assert 0.92 < unseen < 0.99
    assert recognizer.recognised_clearly(pixels[~half], 0.8).mean() < unseen
    random = np.random.default_rng(0)
    first, second = random.integers(len(pixels), size=(2, 2000))
    differ = digits.target[first] != digits.target[second]
    means = (pixels[first[differ]].astype(int) + pixels[second[differ]]) // 2
    assert recognizer.recognised_clearly(random.integers(0, 256, (1000, 1, 8, 8))).mean() < 0.01
    assert recognizer.recognised_clearly(means).mean() < 0.3
    low = digits.target < 2                                    # two classes: one decision value
    assert Recognizer(pixels[low], digits.target[low]).recognised_clearly(pixels[low]).mean() > 0.9


def test_a_stage_that_fails_is_named(tmp_path):
    arguments = [distillation.SCRIPTS / 'image_sample.py', '--config=none.yaml', '--model_path=x']
    words = r'x.npz could not be made \(Error: --config.*there is no file'
    with pytest.raises(UserError, match=words):
        study = open_study(distillation, tmp_path)
        distillation.run_stage(study, arguments, str(tmp_path / 'x.npz'))


# Does class-balancing help?


@pytest.mark.parametrize('name', ['long_tail'])
def test_rows_are_means_over_classes(name, finished):
    outdir, text = finished
    assert '3 models of 6 steps' in text and 'label effect' in text
    results = pd.read_csv(outdir / 'results.csv')
    classes = pd.read_csv(outdir / 'classes.csv')
    assert len(results) == 4 * 2 * 4 and len(classes) == 4 * 2 * 10
    assert set(results['group']) == {'all', 'many', 'medium', 'few'}
    key = ['method', 'omega']
    few = classes[classes['class'] >= 7].groupby(key)['recall'].mean()
    ours = results[results['group'] == 'few'].set_index(key)['recall']
    np.testing.assert_allclose(ours.sort_index(), few.sort_index(), rtol=1e-4)
    omegas = results.groupby('method')['omega'].unique().map(list).to_dict()
    assert omegas.pop('plain') == [0, 1.6]                     # of others: times 1 + 5/8
    assert set(map(tuple, omegas.values())) == {(0.625, 3.225)}
    summary = pd.read_csv(outdir / 'summary.csv')
    effect = summary[summary['measure'] == 'label effect']
    assert set(effect['method']) == {'cb', 'finetune'} and len(effect) == 2 * 5
    np.testing.assert_allclose(effect['formula'], 1 / (1 + 1.25 * effect['at'].astype(float)), rtol=1e-4)


@pytest.mark.parametrize('name', ['long_tail'])
def test_the_long_tail_is_drawn_by_seed_and_the_loss_is_that_of_all_other_digits(name, finished):
    outdir, _ = finished
    data, others = (ImageDataset(str(outdir / 'data' / f'seed3{part}.zip')) for part in ('', '-heldout'))
    assert len(data) + len(others) == 1797 and np.bincount(others.label_ids)[0] == 0
    assert data.class_counts.tolist() == [178, 128, 92, 66, 47, 34, 24, 17, 12, 8]
    images = np.concatenate([part.images(range(len(part))) for part in (data, others)])
    assert np.array_equal(np.sort(images.reshape(1797, -1), axis=0),
                          np.sort(studies.digits().stack(range(1797)).reshape(1797, -1), axis=0))
    drawn = long_tail.long_tailed(studies.digits().labels, 10, 'exp', 0.05, 3)
    assert set(drawn) != set(long_tail.long_tailed(studies.digits().labels, 10, 'exp', 0.05, 4))
    model = outdir / 'models' / 'plain-seed3'
    measure, _ = loss_of_snapshot(load_snapshot(str(model / 'ckpt_5.pt')), str(outdir / 'data' / 'seed3-heldout.zip'))
    losses = json.loads((model / 'heldout-plain.json').read_text())
    assert losses['9'] == pytest.approx(measure().of_images[others.label_ids == 9].mean())
    heldout = pd.read_csv(outdir / 'heldout.csv').set_index(['method', 'group'])['loss']
    few = np.mean([losses[key] for key in '789'])
    assert heldout['plain', 'few'] == pytest.approx(few, rel=1e-5)
    assert json.loads((model / 'heldout-weakened.json').read_text()) != losses


@pytest.mark.parametrize('name', ['long_tail'])
def test_all_methods_take_the_same_number_of_steps(name, finished):
    def state(file):
        return read_own(str(finished[0] / 'models' / file))

    taken = {file: int(state(file)['optim']['state'][0]['step']) for file in (
        'plain-seed3/ckpt_3.pt', 'plain-seed3/ckpt_5.pt', 'cb-seed3/ckpt_5.pt',
        'finetune-seed3/ckpt_4.pt')}
    before, plain, cb, finetune = taken.values()
    assert plain == cb == before + finetune == 6
    heads = [state(f'{method}-seed3/ckpt_5.pt')['net_model']['head.weight']
             for method in ('plain', 'cb')]
    assert not torch.equal(*heads)


def test_curves_are_compared_where_both_are():
    """A method that is plain with less guidance has no gap; one that covers more has half of it in the mean of both."""
    rows = [dict(method=method, seed=seed, omega=omega, group='few', recognition=0.3 + 0.2 * (omega - shift),
                 recall=0.9 - 0.2 * (omega - shift) + gain)
            for method, shift, gain in (('plain', 0, 0), ('cb', 0.5, 0), ('weakened', 0.5, 0.1), ('finetune', 9, 0))
            for omega in (0, 1, 2) for seed in (0, 1)]
    losses = pd.DataFrame([dict(method=method, group='few', seed=0, loss=loss)
                           for method, loss in (('plain', 0.5), ('cb', 0.4))])
    table = tradeoff.differences(pd.DataFrame(rows), losses)
    values = table.groupby(['measure', 'method', 'than'])['value'].mean()
    assert values['gap', 'cb', 'plain'] == pytest.approx(0, abs=1e-9)
    assert values['gap', 'weakened', 'plain'] == pytest.approx(0.05)
    assert values['gap', 'cb', 'weakened'] == pytest.approx(-0.05)
    assert values['recall gap', 'weakened', 'plain'] == pytest.approx(0.1)
    assert np.isnan(values['gap', 'finetune', 'plain'])
    assert values['loss, %', 'cb', 'plain'] == pytest.approx(-20)


def test_what_counts_as_a_difference_and_as_none():
    def row(at, mean, spread):
        return [dict(measure='gap', method='cb', than='plain', at=at, seed=seed, value=mean + side * spread)
                for seed, side in enumerate((-1, 0, 1))]

    cases = {'none': (0.0, 0.003), 'clear': (0.03, 0.001), 'small': (0.004, 0.001), 'wide': (0.01, 0.02),
             'lower': (-0.03, 0.001)}
    table = tradeoff.summarize(pd.DataFrame([one for at, case in cases.items() for one in row(at, *case)]))
    found = table.set_index('at')[['zero', 'same']].apply(tuple, axis=1).to_dict()
    assert found == {'none': ('undecided', 'yes'), 'clear': ('above', 'no'), 'small': ('above', 'yes'),
                     'wide': ('undecided', 'undecided'), 'lower': ('below', 'no')}
    half = table.set_index('at').loc['none', studies.interval_column('value')]
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * 0.003 / 3**0.5)


# Do generated images train better classifiers?


SYNTHETIC = {'share': ['0.5', '0.7'], 'real': ['3'], 'number': ['6'],
             'selection': ['best', 'random', 'worst'], 'generator': ['128'],
             'training': ['adversarial', 'plain']}


@pytest.mark.parametrize('name', ['synthetic_data'])
def test_every_value_of_every_factor_is_measured(name, finished):
    outdir, text = finished
    results = pd.read_csv(outdir / 'results.csv')
    assert list(results[['factor', 'value', 'seed']].itertuples(index=False, name=None)) == [
        (factor, value, 1) for factor, values in SYNTHETIC.items() for value in values]
    summary = pd.read_csv(outdir / 'summary.csv').set_index(['factor', 'value'])
    row = results.set_index(['factor', 'value']).loc[('share', '0.5')]
    assert summary.loc[('share', '0.5'), 'robust gain'] == row['robust gain']
    for name, column in ('adversarial-n3-0.5-6all-of128', 'robust'), (
            'adversarial-n3', 'robust of real images'):
        path = outdir / 'seed1' / 'classifiers' / name / 'accuracy.json'
        accuracy = json.loads(path.read_text())[0]['robust']
        assert row[column] == pytest.approx(100 * accuracy, rel=1e-4)
    assert 'generated images help' in text
    assert pd.read_csv(outdir / 'claims.csv')['answer'].tolist() == 4 * ['undecided']  # one seed


def test_no_test_digit_is_trained_on(tmp_path):
    study = open_study(synthetic_data, tmp_path, '--real=3', '--test-images=100')
    seen = []
    for seed in (0, 1):
        synthetic_data.make_data(study, seed, 3)
        real, test = (ImageDataset(study.data(seed, 3, file)) for file in ('real.zip', 'test.zip'))
        assert len(real) == 30 and len(test) == 100
        assert np.bincount(real.label_ids).tolist() == [3] * 10
        trained = {image.tobytes() for image in real.images(range(len(real)))}
        assert not trained & {image.tobytes() for image in test.images(range(len(test)))}
        seen.append(trained)
    assert seen[0] != seen[1]


@pytest.mark.parametrize('name', ['synthetic_data'])
def test_classifiers_differ_in_data_and_training_alone(name, finished):
    folder = finished[0] / 'seed1'
    options = [json.loads(path.read_text())
               for path in (folder / 'classifiers').glob('*/training_options.json')]
    assert len(options) == 8
    changed = {key for key in options[0] for one in options if one[key] != options[0][key]}
    options_that_differ = {'generated', 'share', 'adversarial'}
    follow_from_them = {'dataset', 'order', 'loss', 'starts'}
    assert options_that_differ <= changed <= options_that_differ | follow_from_them
    assert {one['data'] for one in options} == {'real.zip'}
    trained = json.loads((folder / 'real3/diffusion-128/training_options.json').read_text())
    assert trained['data'] == 'real.zip' and trained['seed'] == 1


@pytest.mark.parametrize('name', ['synthetic_data'])
def test_the_classifier_of_real_digits_selects(name, finished):
    folder = finished[0] / 'seed1' / 'real3' / 'generated-128-selected'
    for order in ('best', 'random', 'worst'):
        report = json.loads((folder / f'{order}-3-report.json').read_text())
        model = finished[0] / 'seed1' / 'classifiers' / 'plain-n3' / report['model_path']
        assert open_classifier(str(model), 'wrn-10-1', 10).num_classes == 10
        assert report['order'] == order
        with np.load(folder / f'{order}-3.npz') as images:
            assert images['image'].shape == (30, 8, 8, 3)
            assert np.bincount(images['label']).tolist() == [3] * 10


def test_one_factor_is_changed_at_a_time(tmp_path):
    study = open_study(synthetic_data, tmp_path, '--reals=5,20', '--numbers=10,50',
                       '--generators=8Ki')
    factors = study.factors
    base = factors['number'][500]
    assert base == synthetic_data.Cell(10, 0.7, 500, 'all', 24576)
    assert all(cells[value] == base for value, cells in (
        (0.7, factors['share']), (10, factors['real']), (24576, factors['generator'])))
    allowed = {'share': {'share'}, 'real': {'real'}, 'number': {'number', 'order'},
               'selection': {'number', 'order'}, 'generator': {'generator'},
               'training': {'training'}}
    for factor, cells in factors.items():
        for cell in cells.values():
            assert {key for key, value in vars(cell).items() if value != getattr(base, key)} <= (
                allowed[factor])
    assert {cell.number for cell in factors['selection'].values()} == {100}
    cells = study.cells
    assert len(cells) == len(set(cells)) and cells[0] == synthetic_data.Cell(10, training='plain')
    assert {cell.alone for cell in cells} <= set(cells)


def test_claims_are_paired_differences_and_lines_through_gains():
    """Gains that grow by two points with each tenfold number, the same in seeds that differ."""
    rows = [dict(factor=factor, value=value, seed=seed, **{'robust gain': gain + seed})
            for factor, values in (
                ('real', {5: 3, 50: 1}), ('number', {10: 1, 100: 3, 1000: 5}),
                ('selection', {'best': 4, 'random': 4, 'worst': 1}), ('generator', {128: 5}))
            for value, gain in values.items() for seed in range(3)]
    claims = gains.claims(pd.DataFrame(rows)).set_index('claim')
    effects = claims['effect'].to_dict()
    assert effects == pytest.approx({
        'generated images help': 6, 'with more real images they help less': 2,
        'more of them help more': 4, 'the best are better than random ones': 0,
        'the best are better than worst ones': 3, 'the random are better than worst ones': 3})
    low, high = scipy.stats.t.interval(0.95, 2, 6, scipy.stats.sem([5, 6, 7]))
    half = claims.loc['generated images help', '95% interval of effect']
    assert half == pytest.approx((high - low) / 2)
    assert claims['answer'].tolist() == ['yes', 'yes', 'yes', 'no', 'yes', 'yes']


def test_summary_has_means_and_paired_gains():
    rows = [{'training': 'plain', 'data': data, 'seed': seed, 'clean': clean + 0.1 * seed,
             'robust': 0.1}
            for data, clean in (('real', 0.5), ('generated', 0.7)) for seed in (0, 1)]
    summary = evaluate_data.summarise(pd.DataFrame(rows)).set_index('data')
    assert summary.loc['generated', 'clean'] == pytest.approx(0.75)
    assert summary.loc['generated', 'clean error'] == pytest.approx(0.05)
    assert summary.loc['generated', 'clean gain'] == pytest.approx(0.2)
    assert summary.loc['generated', 'clean gain error'] == pytest.approx(0, abs=1e-12)
    assert summary.loc['real', 'clean gain'] == 0
