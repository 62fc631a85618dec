"""The scripts of the multi-source study on ImageNet, the memorization sweep and a SLURM job start the commands that they
should."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, environment, write_digits

from training.checkpoint import Checkpoints
from training.data.imagenet import SIMILARITY_LEVELS

CLASSES = SIMILARITY_LEVELS['sim2']
RUN = 'runs/sim2-edm2-img256-xs'


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv('PYTHON', raising=False)


def commands(tmp_path, script, *args, **variables) -> list[str]:
    """What a script starts, with a stand-in for Python and torchrun that does nothing."""
    for name in ('torchrun', 'python'):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    for number in ('10c', '5c', *(f'1c-{index}' for index in CLASSES)):
        folder = tmp_path / f'{RUN}-{number}-1000'
        folder.mkdir(parents=True, exist_ok=True)
        for kimg in (1, 2):
            (folder / f'network-snapshot-{kimg:07d}-0.050.pkl').touch()
    places = {key: f'{tmp_path}/{value}' for key, value in (
        ('RUNS', 'runs'), ('PIXELS', 'pixels'), ('LATENTS', 'latents'), ('OUT', 'out'), ('REFS', 'refs'))}
    for key in ('PIXELS', 'LATENTS', 'REFS', 'OUT'):
        (tmp_path / places[key]).mkdir(exist_ok=True)
    done = subprocess.run(
        ['bash', ROOT / 'bash_files' / script, *args], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | places | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'} | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(f'{tmp_path}/', '').splitlines()


@pytest.mark.parametrize('count, sets', [
    (10, ['10c']), (5, ['5c']), (1, [f'1c-{index}' for index in CLASSES])])
def test_convert(count, sets, tmp_path):
    lines = commands(tmp_path, f'convert/convert_{count}c.sh', 'sim2', GPUS='2')
    names = [f'inet-256-{name}-{num}' for num in (100, 500, 1000) for name in sets]
    references = [line for line in lines if 'calculate_metrics.py' in line]
    assert references == [f'python calculate_metrics.py ref --data=pixels/{name}.zip --dest=refs/{name}.pkl --metrics=fid'
                          for name in names if count == 1]
    lines = [line for line in lines if line not in references]
    assert len(lines) == 2 * len(names)
    for name, convert, encode in zip(names, lines[::2], lines[1::2], strict=True):
        assert f'--dest=pixels/{name}.zip' in convert and '--sim_name=sim2 --seed=0' in convert
        assert f'--source=pixels/{name}.zip --dest=latents/{name}.zip' in encode
        assert '--nproc_per_node=2' in encode
    listed = lines[0].split('--class_labels=')[1].split()[0]
    assert listed == ('171' if count == 1 else ','.join(map(str, CLASSES[:count])))
    assert (tmp_path / 'latents' / 'inet-256-1c-500.zip').is_symlink() == (count == 1)


@pytest.mark.parametrize('count, sets', [(10, ['10c']), (1, [f'1c-{index}' for index in CLASSES])])
def test_train(count, sets, tmp_path):
    assert commands(tmp_path, f'train/train_{count}c_1000.sh', 'sim2', EXTRA='--cond=0') == [
        f'torchrun --nproc_per_node=8 --master_port=25641 train_edm2.py --outdir={RUN}-{name}-1000 '
        f'--data=latents/inet-256-{name}-1000.zip --preset=edm2-img256-xs-{count}c-1000 '
        '--batch=8192 --status=64Ki --snapshot=16Mi --checkpoint=64Mi --cond=0' for name in sets]


@pytest.mark.parametrize('count', [10, 5, 1])
def test_generate(count, tmp_path):
    classes = CLASSES if count == 1 else CLASSES[:count]
    (tmp_path / 'refs').mkdir()
    (tmp_path / f'out/sim2-{count}c-1000').mkdir(parents=True)
    for index in classes:
        (tmp_path / f'refs/inet-256-1c-{index}-1000.pkl').touch()
    start = 'torchrun --nproc_per_node=8 --master_port=25641'
    generated, measured, listed = [], [], []
    for index in classes:
        net = f'{RUN}-{f"1c-{index}" if count == 1 else f"{count}c"}-1000/network-snapshot-0000002-0.050.pkl'
        generated.append(f'{start} generate_images.py --net={net} --class={index} '
                         f'--outdir=out/sim2-{count}c-1000/{index} --subdirs --seeds=0-9 --batch=64')
        measured.append(f'{start} calculate_metrics.py calc --images=out/sim2-{count}c-1000/{index} '
                        f'--ref=refs/inet-256-1c-{index}-1000.pkl --metrics=fid')
        listed.append(f'{index} {net} {measured[-1]}')
    lines = commands(tmp_path, f'generate/generate_{count}c.sh', 'sim2', SEEDS='0-9')
    assert lines == [line for pair in zip(generated, measured, strict=True) for line in pair]
    table = tmp_path / f'out/sim2-{count}c-1000/fids.txt'
    assert [line.strip().replace(f'{tmp_path}/', '') for line in table.read_text().splitlines()] == listed
    assert commands(tmp_path, f'generate/generate_{count}c.sh', 'sim2', SEEDS='0-9') == generated  # measured already
    table.unlink()
    assert commands(tmp_path, f'generate/generate_{count}c.sh', 'sim2', SEEDS='0-9', METRICS='') == generated
    assert not table.exists()


def test_a_class_whose_number_ends_another_is_measured_too(tmp_path):
    (tmp_path / 'refs').mkdir()
    (tmp_path / 'out/sim1-5c-1000').mkdir(parents=True)
    for index in (171, 1):
        (tmp_path / f'refs/inet-256-1c-{index}-1000.pkl').touch()
    net = tmp_path / 'runs/sim1-edm2-img256-xs-5c-1000/network-snapshot-0000002-0.050.pkl'
    net.parent.mkdir(parents=True)
    net.touch()
    commands(tmp_path, 'generate/generate_5c.sh', 'sim1', CLASSES='171 1')
    lines = (tmp_path / 'out/sim1-5c-1000/fids.txt').read_text().splitlines()
    assert [line.split()[0] for line in lines] == ['171', '1']


def test_an_unknown_level_and_a_missing_network_are_named(tmp_path):
    for args, words, metrics in ((['sim9'], 'sim9', 'fid'), (['sim1'], 'no statistics', 'fid'),
                                 (['sim1'], 'no snapshot of width 0.050', '')):
        done = subprocess.run(['bash', ROOT / 'bash_files' / 'generate' / 'generate_5c.sh', *args],
                              env=os.environ | {'RUNS': str(tmp_path), 'METRICS': metrics},
                              capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count('\n') == 1


# --- The memorization sweep, and SLURM --------------------------------------------------------------------------------


def sweep(tmp_path, *args, python, **variables):
    """The sweep with `python`, a shell script in place of Python, and a torchrun that only prints."""
    for name, text in (('python', python), ('torchrun', 'echo torchrun "$@"')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
        (tmp_path / name).chmod(0o755)
    places = {key: f'{tmp_path}/{key.lower()}' for key in ('RUNS', 'SETS')}
    (tmp_path / 'sets').mkdir(exist_ok=True)
    return subprocess.run(
        ['bash', ROOT / 'bash_files' / 'train' / 'sweep_memorization.sh', *args], cwd=tmp_path, capture_output=True,
        text=True, env=os.environ | places | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SIZES': '50 20'} | variables)


MAKES = ('case "$1" in -c) echo 0.25 ;; *) echo "$@"; for a in "$@"; do case "$a" in --dest=*) touch "${a#--dest=}" ;; esac;'
         ' done ;; esac')


def test_a_sweep_makes_its_data_trains_measures_and_skips_what_is_done(tmp_path):
    done = sweep(tmp_path, 'classes', 'width', python=MAKES, SEEDS='7', EXTRA='--bench=0')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(f'{tmp_path}/', '').splitlines()
    made = [line for line in lines if line.startswith('data_utils')]
    trained = [line for line in lines if ' train.py ' in line]
    assert len(trained) == 12 and sum(' mem_ratio.py ' in line for line in lines) == 12
    assert len(made) == 8 and not any('--dest=sets/cifar10-32x32-50.zip' in line for line in made)
    assert made[0].startswith('data_utils/dataset_diversity.py --dest=sets/cifar10-classes1-50.')
    assert '--max-images=50' in made[0] and '--num-classes=1' in made[0]
    assert ('--outdir=runs/width-256-20-seed7 --nosubdir --data=sets/cifar10-32x32-20.zip' in trained[-2]
            and trained[-2].endswith('--attn-resolutions=16 --num-channels=256 --bench=0'))
    table = (tmp_path / 'runs/ratios.tsv').read_text().splitlines()
    assert table[0] == 'classes-1-50-seed7\t0.25' and len(table) == 12
    assert sweep(tmp_path, 'classes', 'width', python=MAKES, SEEDS='7').stdout == ''
    assert 'dimension-8x8-20-seed7' in sweep(tmp_path, 'dimension', python=MAKES, SEEDS='7').stdout


def test_shares_of_a_sweep_are_all_of_it_once(tmp_path):
    whole = sweep(tmp_path, '--list', python=MAKES).stdout.splitlines()
    shares = [sweep(tmp_path, '--list', python=MAKES, SHARE=f'{i}/3').stdout.splitlines() for i in range(3)]
    assert sorted(sum(shares, [])) == sorted(whole) and len(set(whole)) == len(whole) > 60
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_sweep_goes_on_after_a_run_that_fails_and_says_so(tmp_path):
    done = sweep(tmp_path, 'classes', python='case "$*" in *classes=1*) exit 1 ;; esac\n' + MAKES, SIZES='20')
    assert done.returncode == 1 and done.stderr.strip() == 'Error: classes-1-20-seed1024 failed'
    assert len((tmp_path / 'runs/ratios.tsv').read_text().splitlines()) == 2
    wrong = sweep(tmp_path, 'color', python=MAKES)
    assert wrong.returncode == 1 and 'not color' in wrong.stderr and wrong.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_slurm_job_saves_and_is_queued_again_before_its_limit(tmp_path):
    """A training with stand-ins for srun and scontrol: SIGTERM comes to the shell of the job, as --signal=B:TERM does."""
    for name, text in (('srun', 'shift\nexec "$@"'), ('scontrol', f'echo "$@" >>{tmp_path}/queued.txt')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
        (tmp_path / name).chmod(0o755)
    data = write_digits(tmp_path / 'digits.zip')
    run = tmp_path / 'run-3'
    job = ['bash', str(ROOT / 'bash_files/slurm/job.sh'), str(ROOT / 'train_edm2.py'), f'--outdir={tmp_path}/run-{{task}}',
           f'--data={data}', '--preset=digits', '--channels=8', '--batch=16', '--status=64', '--snapshot=0', '--checkpoint=0',
           '--seed={task}']
    env = environment(PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHON=sys.executable, SLURM_JOB_ID='17',
                      SLURM_ARRAY_TASK_ID='3', SLURM_SUBMIT_DIR=str(tmp_path))
    process = subprocess.Popen([*job, '--duration=1Mi'], env=env, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (run / 'stats.jsonl').exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    assert (tmp_path / 'queued.txt').read_text() == 'requeue 17\n'
    nimg = Checkpoints(str(run)).load_newest()['nimg']
    subprocess.run([*job, f'--duration={nimg + 64}', '--allow-changes'], env=env, check=True, stdout=subprocess.DEVNULL)
    record = json.loads((run / 'training_options.json').read_text())
    assert record['seed'] == 3 and len(record['starts']) == 2
    assert (tmp_path / 'queued.txt').read_text() == 'requeue 17\n'
