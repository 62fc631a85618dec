"""What a training writes, in which order, what a stop or a kill leaves, and how much of it stays."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, environment, invoke, run, script_module, write_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from long_tail import evaluation
from torch_utils.stopping import Stopper
from training import runs
from training.checkpoint import LAYOUTS, Checkpoints
from training.snapshot import list_snapshots

EDM2 = ['train_edm2.py', '--preset=digits', '--channels=8', '--batch=250', '--duration=2000', '--status=500',
        '--snapshot=1000', '--checkpoint=1000']
EDM = ['train.py', '--duration-rule=fixed', '--duration=0.002', '--rampup=0.001', '--batch=250', '--num-channels=8',
       '--num-blocks=1', '--cres=1', '--attn-resolutions=4', '--tick=0.5', '--snap=2', '--dump=2', '--seed=1']
LONG_TAIL = ['long_tail/main.py', '--train', '--data_type=digitslt', '--imb_factor=0.05', '--img_size=8', '--ch=32',
             '--ch_mult=1', '--attn=', '--num_res_blocks=0', '--T=60', '--warmup=2', '--num_workers=1', '--log_step=1',
             '--conditional', '--cb', '--batch_size=8', '--save_step=2', '--sample_step=2', '--sample_size=9',
             '--total_steps=5']
CLASSIFIER = ['synthetic_data/train_classifier.py', '--model=wrn-10-1', '--duration=64', '--batch=32', '--status=32',
              '--snapshot=64', '--checkpoint=32', '--attack-steps=1']
# Name -> its command without a folder, its options for folder and data, what draws or measures.
TRAININGS = {
    'edm2': (EDM2, ['--outdir={0}', '--data={1}'], 'training.recipe.save_sample_grid'),
    'edm': (EDM, ['--outdir={0}', '--nosubdir', '--data={1}'], 'training.recipe.save_sample_grid'),
    'long_tail': (LONG_TAIL, ['--logdir={0}'], 'long_tail.evaluation.save_grid'),
    'classifier': (CLASSIFIER, ['--outdir={0}', '--data={1}', '--test={1}'], 'synthetic_data.classify.accuracy'),
}
KILL = 'os.kill(os.getpid(), 9)'
SLEEP = 'print("in the hook", flush=True), time.sleep(600)'


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits.zip')


def arguments(name, folder, data, *more):
    command, places, _ = TRAININGS[name]
    return [*command, *(place.format(folder, data) for place in places), *more]


def hooked(where, what, script, *args, processes=None):
    """The command line of a script in which the function `where` does `what` instead; its folder is that of the test."""
    module, _, function = where.rpartition('.')
    path = pathlib.Path('hooked.py')
    path.write_text(f'import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport pydoc, runpy\n'
                    f'setattr(pydoc.locate({module!r}), {function!r}, lambda *_, **__: ({what}))\n'
                    f'sys.argv[0] = {str(ROOT / script)!r}\nrunpy.run_path(sys.argv[0], run_name="__main__")\n')
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes else []
    return [sys.executable, *launcher, str(path.resolve()), *map(str, args)]


def start(command):
    return subprocess.Popen(command, env=environment(PYTHONUNBUFFERED='1'), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for_line(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(process.stderr.read())


def events(folder):
    """{tag: [(step, value), ...]} of what does not depend on the time."""
    accumulator = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()['scalars'] if tag.startswith(('Loss', 'Accuracy', 'Progress'))}


def content(folder):
    """What the files of a run say that does not depend on the time."""
    files = {}
    for path in sorted(folder.rglob('*')):
        name = str(path.relative_to(folder))
        if path.suffix in ('.pkl', '.png') and name != 'loss.png' or name == 'accuracy.json':
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file() and not name.startswith(('events', 'loss')):
            files[name] = None
    rows = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    losses = [(row['nimg'], row['Loss/loss']['mean']) for row in rows]
    return files, losses, events(folder)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, digits):
    """{name: folder} of trainings that nothing has disturbed."""
    folders = {}

    def train(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp('whole') / name
            invoke(*arguments(name, folders[name], digits))
        return folders[name]

    return train


# --- The order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, hook', [
    *(pytest.param(name, hook, marks=[] if name == 'edm2' else pytest.mark.slow)
      for name, (_, _, hook) in TRAININGS.items()), ('edm2', 'training.loop.save_snapshot'),
    ('edm2', 'dnnlib.pictures.save_loss_curve')])
def test_killed_behind_a_checkpoint_it_makes_what_was_due_there(name, hook, whole, digits, tmp_path, monkeypatch):
    """kill -9 within every picture and measurement, and between a checkpoint and its snapshots."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'run'
    command = arguments(name, folder, digits)
    checkpoints = LAYOUTS['steps' if name == 'long_tail' else 'state'](str(folder))
    kills = 0
    while subprocess.run(hooked(hook, KILL, *command), env=environment(), capture_output=True).returncode == -9:
        kills += 1
        assert checkpoints.numbers(), 'the checkpoint comes first'
        if kills == 2:                                                  # the second time it came as far
            run(*command)
    assert kills == 2 and content(folder) == content(whole(name))


def test_a_run_without_its_last_grid_is_not_finished(whole, digits, tmp_path):
    folder = tmp_path / '00000-digits-uncond-ddpmpp-edm-gpus1-batch250-fp32'
    shutil.copytree(whole('edm'), folder)
    command = [arg.replace('--nosubdir', '') for arg in arguments('edm', tmp_path, digits)]
    command = [arg for arg in command if arg]
    assert runs.is_finished(str(folder), 2, True, True)
    for name in ('samples-0000002.png', 'network-snapshot-0000002.pkl'):
        (folder / name).unlink()
        assert not runs.is_finished(str(folder), 2, True, True)
        invoke(*command)
        assert list(tmp_path.iterdir()) == [folder] and content(folder) == content(whole('edm'))


def test_a_complete_run_is_left_alone(whole, digits):
    for name in TRAININGS:
        folder = whole(name)
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob('*') if path.is_file()}
        out = invoke(*arguments(name, folder, digits, *(['--resume', folder] if name == 'edm' else [])))
        assert 'Already complete' in out and f'Folder: {folder}' in out and 'Resuming' not in out
        assert 'Next: python ' in out and 'Checkpoint: ' in out
        assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}


def test_the_end_says_where_the_results_are(whole):
    for name in TRAININGS:
        text = (whole(name) / 'log.txt').read_text()
        end = text[text.index('Complete after'):]
        command, = (line for line in end.splitlines() if ' Next: python ' in line)
        assert str(whole(name)) in command and '{' not in command


def test_grids_of_the_long_tail_are_at_multiples_and_cheap(whole, monkeypatch):
    folder = whole('long_tail').parent / 'six'
    invoke(*LONG_TAIL, '--total_steps=6', f'--logdir={folder}')        # the last step has number 5
    assert sorted(path.name for path in (folder / 'sample').iterdir()) == ['2.png', '4.png']
    settings = []
    monkeypatch.setattr(evaluation, 'generate_images', lambda *_, sampler, **__: settings.append(sampler) or [])
    monkeypatch.setattr(torch, 'cat', lambda parts: parts)
    monkeypatch.setattr(evaluation.pictures, 'save_image_grid', lambda *_: None)
    main = script_module('long_tail/main.py')
    for options, steps in ((['--T=1000'], 50), (['--T=20'], None), (['--ddim_steps=7'], 7)):
        flags = main.settings(['--train', '--data_type=digits', '--img_size=8', '--ch=32', *options])
        evaluation.save_grid('x.png', type('Net', (), {'label_dim': 0}), flags, [])
        assert (settings[-1]['name'], settings[-1]['num_steps']) == ('ddim' if steps else 'ddpm', steps)


# --- Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, number', [
    ('edm2', signal.SIGTERM), ('edm', signal.SIGINT), ('long_tail', signal.SIGTERM), ('classifier', signal.SIGINT)])
def test_a_request_to_stop_ends_a_picture(name, number, whole, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'run'
    command = arguments(name, folder, digits)
    process = start(hooked(TRAININGS[name][2], SLEEP, *command))
    wait_for_line(process, 'in the hook')
    process.send_signal(number)
    begin = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - begin < 50, errors
    assert f'{number.name}: stopping' in errors and 'Traceback' not in errors and 'Stopped at' in out
    run(*command)
    assert content(folder) == content(whole(name))


@pytest.mark.slow
def test_all_processes_leave_a_picture_that_one_draws(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = arguments('edm2', tmp_path / 'run', digits)
    process = start(hooked(TRAININGS['edm2'][2], SLEEP, *command, processes=2))
    wait_for_line(process, 'in the hook')
    workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    for worker in workers:
        os.kill(int(worker), signal.SIGTERM)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and errors.count('SIGTERM: stopping') == 1
    state = Checkpoints(str(tmp_path / 'run')).load_newest()
    assert state['nimg'] == 1000 and not list((tmp_path / 'run').glob('samples-*'))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_the_process(number, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start(hooked('training.diffusion.losses.EDM2Loss.__call__', SLEEP,
                           *arguments('edm2', tmp_path / 'run', digits)))
    wait_for_line(process, 'in the hook')
    process.send_signal(number)
    assert 'once more ends at once' in process.stderr.readline()
    time.sleep(0.5)
    assert process.poll() is None                                       # within its step
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number


WAITING = """
import sys, hashlib
sys.path.insert(0, {root!r})
from torch_utils.stopping import Stopper
with Stopper('stopping'):
    print('waiting', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)             # not in Python: no handler runs
"""


@pytest.mark.parametrize('numbers, ends', [
    ([signal.SIGTERM] * 2, True), ([signal.SIGINT, signal.SIGTERM], False), ([signal.SIGTERM], False)])
def test_requests_count_wherever_the_process_waits(numbers, ends, tmp_path):
    """Ctrl-C of all processes of a terminal, and what a launcher makes of it, are one."""
    process = start([sys.executable, '-c', WAITING.format(root=str(ROOT))])
    wait_for_line(process, 'waiting')
    try:
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.5)
        assert process.stderr.readline().endswith(': stopping\n')
        if ends:
            assert process.wait(timeout=10) == 143
        else:
            assert process.poll() is None
    finally:
        process.kill()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], signal.set_wakeup_fd(-1)
    with Stopper('') as stopper:
        assert stopper.call(lambda: 3) == 3
        assert stopper.call(lambda: (signal.raise_signal(signal.SIGINT), 4)) is None and stopper.requested
        assert stopper.call(lambda: 5) is None                          # not begun any more
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], signal.set_wakeup_fd(-1)
    assert before == after and Stopper.current is None


# --- What stays -----------------------------------------------------------------------------------------------------------

FOREIGN = ['training-state-best.pt', 'training-state-0000000.pt.bak', 'my-training-state-0000001.pt', 'ckpt_final.pt',
           'model_best.pt', 'model000001.pt', 'opt000001.pt', 'ema_mine_000002.pt', 'teacher-state-000002-a.cache']


def states(folder):
    return {path.name for pattern in ('*.pt', '*.cache') for path in folder.glob(pattern)} - set(FOREIGN)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_newest_checkpoints_are_kept(layout, tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_bytes(b'of someone else')
    network = {'model.w': torch.zeros(2)}
    checkpoints = LAYOUTS[layout](str(tmp_path), 1000, dict)

    def save(nimg, keep):
        checkpoints.save(dict(nimg=nimg, net=network, ema={'0.5': network} if layout != 'guided' else {
            '0.5': network, '0.9999': network}, optimizer={}, means={}, batches=[], train_seconds=0.0))
        checkpoints.prune(nimg, keep)

    for nimg in range(10_000, 14_000, 1000):
        save(nimg, 0)
    assert len(checkpoints.numbers()) == 4 + (layout == 'guided')       # and the foreign model000001.pt
    save(14_000, 2)
    number = checkpoints.number(14_000)
    files = {'guided': 4}.get(layout, 1)
    assert checkpoints.numbers()[-2:] == [number - 1, number] and len(states(tmp_path)) == 2 * files
    damaged = pathlib.Path(checkpoints.path(number + 5))                # passed over: those before it are the newest
    damaged.write_bytes(b'damaged')
    save(15_000, 1)
    assert checkpoints.load(checkpoints.path(number + 1))['nimg'] == 15_000
    assert len(states(tmp_path)) == files + 1
    assert all((tmp_path / name).exists() for name in FOREIGN)


def test_an_interrupted_removal_is_finished(tmp_path):
    checkpoints = LAYOUTS['guided'](str(tmp_path), 1, dict)
    network = {'model.w': torch.zeros(2)}
    for nimg in (1, 2, 3):
        checkpoints.save(dict(nimg=nimg, net=network, ema={'0.5': network}, optimizer={}, means={}, batches=[],
                              train_seconds=0.0))
    os.remove(checkpoints.path(1))                                      # the first that goes
    checkpoints.prune(3, 1)
    assert {path.name for path in tmp_path.iterdir()} == {'model000003.pt', 'ema_0.5_000003.pt', 'opt000003.pt'}


def test_every_training_keeps_as_many_as_it_is_told(digits, tmp_path, whole):
    for name, interval in (('edm2', '--checkpoint=500'), ('edm', '--dump=1'), ('classifier', '--checkpoint=32'),
                           ('long_tail', '--save_step=1')):
        folder = tmp_path / name
        invoke(*arguments(name, folder, digits, interval, '--keep-checkpoints=1'))
        assert len(states(folder)) == 1
        assert content(folder)[1] == content(whole(name))[1]


def test_the_number_that_is_kept_may_change(digits, tmp_path):
    """A run goes on in its folder, and the states that it wrote before go too."""
    command = [arg for arg in arguments('edm', tmp_path, digits, '--snap=0', '--duration=0.004') if arg != '--nosubdir']
    invoke(*command)
    folder, = tmp_path.iterdir()
    assert len(states(folder)) == 4
    (folder / 'training-state-0000004.pt').unlink()
    invoke(*command, '--keep-checkpoints=1')
    assert list(tmp_path.iterdir()) == [folder] and states(folder) == {'training-state-0000004.pt'}


@pytest.mark.parametrize('name, options', [
    ('edm2', ['--channels=32', '--duration=1500', '--checkpoint=500', '--keep-checkpoints=1', '--batch=500']),
    ('edm', ['--num-channels=32', '--optimizer=SGD', '--dump=1']),
    ('classifier', ['--model=wrn-16-2', '--checkpoint=32'])])
def test_the_dry_run_says_what_will_be_written(name, options, digits, tmp_path, monkeypatch):
    for hook in ('training.recipe.save_sample_grid', 'synthetic_data.classify.accuracy'):
        module, _, function = hook.rpartition('.')
        monkeypatch.setattr(sys.modules[module] if module in sys.modules else __import__(module, fromlist='x'), function,
                            lambda *_, **__: {'clean': 1.0, 'robust': 1.0})
    command = arguments(name, tmp_path / 'run', digits, *options)
    out = invoke(*command, '--dry-run')                                # perhaps with a note before it
    disk = json.loads(out[out.index('{'):])['disk']
    assert not (tmp_path / 'run').exists()
    invoke(*command)
    snapshots = [pathlib.Path(file.path) for file in list_snapshots(str(tmp_path / 'run'))]
    total = 0
    for kind, files in (('snapshots', snapshots), ('checkpoints', list((tmp_path / 'run').glob('*.pt')))):
        assert disk[kind]['files'] == len(files) > 0
        sizes = {path.stat().st_size for path in files}
        assert max(sizes) == pytest.approx(disk[kind]['bytes_each'], rel=0.03)
        total += sum(path.stat().st_size for path in files)
    assert disk['total_bytes'] == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize('command', [
    ['distillation/scripts/image_train.py', '--config=yaml/digits_8/teacher.yaml', '--outdir={0}', '--data_dir={1}',
     'batch_size=8', 'total_steps=4', 'save_interval=2', 'log_interval=1'],
    [*LONG_TAIL[:-1], '--total_steps=4', '--sample_step=0', '--logdir={0}']], ids=['image_train', 'long_tail'])
def test_so_do_those_of_the_other_studies(command, digits, tmp_path):
    command = [part.format(tmp_path / 'run', digits) for part in command]
    out = invoke(*command, '--dry_run')
    assert not (tmp_path / 'run').exists()
    invoke(*command)
    total = sum(path.stat().st_size for path in (tmp_path / 'run').iterdir() if path.suffix in ('.pt', '.pkl'))
    plan = json.loads(out[out.index('{'):])
    assert plan['disk']['total_bytes'] == pytest.approx(total, rel=0.03)
    assert plan['cost']['steps'] == 4 and plan['cost']['memory_gib']['activations'] > 0
    assert 'hours' in invoke(*command[:-1], command[-1].replace('/run', '/other'), '--dry_run', '--bench_steps=1')
    assert not (tmp_path / 'other').exists()


def test_a_run_without_an_end_has_a_dry_run(digits, tmp_path):
    out = invoke('distillation/scripts/image_train.py', '--config=yaml/digits_8/teacher.yaml', f'--data_dir={digits}',
                 f'--outdir={tmp_path}', '-n', 'total_steps=0', 'lr_anneal_steps=0')
    assert json.loads(out[out.index('{'):])['disk']['checkpoints']['files'] > 1000
