"""long_tail/: the command lines run as written, runs resume exactly, samples are measured, errors are one line."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import tarfile
import time
import types

import click.testing
import golden_cases
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from helpers import ROOT, command, environment, fails, invoke, run, script_module, write_digits

from dnnlib import UserError, pictures
from long_tail import classwise, datasets, imbalance
from metrics.frechet import frechet_distance
from metrics.inception import InceptionV3
from metrics.statistics import Gaussian, Statistics, load_statistics
from torch_utils import distributed
from torch_utils.files.own import read_own
from training import runs
from training.checkpoint import StepCheckpoints
from training.data.batches import DatasetBatches
from training.data.images import ArrayImages, NpzImages
from training.encoders import RGBEncoder
from training.snapshot import load_snapshot

MAIN = 'long_tail/main.py'
# What makes a run small; appended to the command lines of the study.
SMALL = ['--ch=32', '--ch_mult=2', '--ch_mult=2', '--attn=', '--num_res_blocks=0', '--T=8', '--warmup=2', '--num_workers=1',
         '--log_step=1']
DIGITS = [*SMALL, '--data_type=digitslt', '--imb_factor=0.05', '--img_size=8', '--conditional', '--batch_size=8',
          '--save_step=2', '--sample_step=0', '--lr=1e-2', '--ema_decay=0.5']
FAST = ['--noprd', '--noimproved_prd']


def options(*args) -> dict:
    return script_module(MAIN).settings(['--train', *map(str, args)])


def write_cifar(folder, base='cifar100', per_class=4, packed=True):
    """A CIFAR archive (or its unpacked folder) of small random pictures, in the original layout."""
    known = datasets.CIFAR[base]
    archive, name, classes = known.archive, known.folder, known.num_classes
    rng = np.random.RandomState(0)
    ids = np.tile(np.arange(classes), per_class).tolist()
    data = rng.randint(0, 256, [len(ids), 3072]).astype(np.uint8)
    inner = folder / name
    inner.mkdir(parents=True)
    key, meta = ('labels', 'batches.meta') if base == 'cifar10' else ('fine_labels', 'meta')
    parts = {'train': slice(None)} if base == 'cifar100' else {f'data_batch_{i + 1}': slice(i, None, 5) for i in range(5)}
    test = 'test' if base == 'cifar100' else 'test_batch'
    for file, part in (parts | {test: slice(0, classes)}).items():
        (inner / file).write_bytes(pickle.dumps({'data': data[part], key: ids[part]}, protocol=2))
    names = {('label_names' if base == 'cifar10' else 'fine_label_names'): [f'class{i}' for i in range(classes)]}
    (inner / meta).write_bytes(pickle.dumps(names, protocol=2))
    if packed:
        with tarfile.open(folder / archive, 'w:gz') as tar:
            tar.add(inner, name)
    return str(folder)


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp('cifar'))


@pytest.fixture(scope='module')
def digits_stats(tmp_path_factory):
    path = tmp_path_factory.mktemp('stats') / 'digits.npz'
    invoke('long_tail/make_stats.py', '--data_type=digits', '--detector=pixels', f'--dest={path}')
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A plain run of six steps, with checkpoints 2, 4 and 5 (the last)."""
    folder = tmp_path_factory.mktemp('runs') / 'plain'
    invoke(MAIN, '--train', *DIGITS, f'--logdir={folder}', '--total_steps=6', '--cfg')
    return folder


def weights(path, key='ema_model'):
    return read_own(str(path))[key]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def events(folder):
    """{tag: [(step, value), ...]} of the TensorBoard files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()['scalars']}


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('math', 'configs_long_tail*'), ids=str)
def test_options_and_configuration_files(case):
    flags = options('--logdir=x')
    for name, option in case.json['options'].items():
        default = option['default'].strip("'")
        value = flags[name] if name not in ('train', 'logdir') else None
        if option['type'] == 'multi_integer':
            assert value == json.loads(default), name
        elif option['type'] in ('integer', 'float'):
            assert float(value) == float(default), name
        elif option['type'] in ('string', 'enum') and value is not None:
            assert value == default, name
        elif value is not None:
            assert value == (default == 'True'), name
    for name, lines in case.json['config'].items():
        path = ROOT / 'long_tail' / 'config' / f'{name}.txt'
        assert path.read_text().split() == lines
        assert options(f'--flagfile={path}')['ch_mult'] == [1, 2, 2, 2]


def test_flag_files(tmp_path):
    (tmp_path / 'base.txt').write_text('# the network\n--ch=64\n--ch_mult=1\n\n--ch_mult=3\n--noparallel\n--cfg\n--omega 0.5\n')
    (tmp_path / 'run.txt').write_text('--flagfile=base.txt\n--conditional=true\n--lr=1e-3\n')
    flags = options('--parallel', '--flagfile', tmp_path / 'run.txt', '--batch_size', '3', '--nocfg')
    assert (flags['ch'], flags['ch_mult'], flags['lr'], flags['batch_size']) == (64, [1, 3], 1e-3, 3)
    assert flags['conditional'] and not flags['cfg'] and not flags['parallel'] and flags['omega'] == 0.5
    assert options(f'--flagfile={tmp_path}/base.txt', '--conditional', '--ch_mult', '2', '--ch_mult=1')['ch_mult'] == [2, 1]
    assert options('--attn=', '--ch_mult=1,2')['attn'] == []
    main = script_module(MAIN)
    text = script_module('long_tail/flags.py').to_text(main.main.params, flags)
    (tmp_path / 'all.txt').write_text(text)
    assert options(f'--flagfile={tmp_path}/all.txt') == flags           # every value, and the same again
    assert len(text.splitlines()) >= sum(value is not None for value in flags.values())


def test_a_factor_counts_for_long_tails_alone():
    assert options('--imb_factor=5')['imb_factor'] == 5
    assert '--imb_factor=5.0 is not in (0, 1]' in fails(MAIN, '--train', '--data_type=cifar100lt', '--imb_factor=5')


@pytest.mark.parametrize('lines, message', [
    ('--ch=64\n--chanels=3\n', 'bad.txt, line 2: this is no option; write --name=value, see --help (similar: '),
    ('root:x:0:0\n', 'bad.txt, line 1: this is no option'), ('--flagfile=/dev/zero', '/dev/zero: no such file, or no regular one'),
    ('--flagfile=two.txt\n' * 2, 'more than 100 files'), ('#' * ((1 << 20) + 1), 'more than 100 files, or 1 MiB'),
    ('--flagfile=two.txt', 'more than 100 files'), ('ch=64', 'is no option'),
    ('--ch', 'bad.txt, line 1: --ch needs a value'), ('--train=maybe', "'--train': 'maybe' is not a valid boolean"),
    ('--flagfile=nowhere.txt', 'nowhere.txt'), ('--flagfile=bad.txt', 'names itself'), ('--batch_size=many', 'batch_size')])
def test_bad_flag_files(tmp_path, lines, message):
    (tmp_path / 'bad.txt').write_text(lines)
    for i in range(30):                                  # 2^30 lines
        name = 'two.txt' if i == 0 else f'{i}.txt'
        (tmp_path / name).write_text(f'--flagfile={i + 1}.txt\n' * 2)
    (tmp_path / '30.txt').write_text('--notrain\n')
    assert message in fails(MAIN, '--train', f'--flagfile={tmp_path}/bad.txt')


ABSL = """--nohelp --nohelpfull --nohelpshort --nohelpxml --noonly_check_args --nopdb --nopdb_post_mortem --norun_with_pdb
    --norun_with_profiling --use_cprofile_for_profiling --noalsologtostderr --log_dir= --logger_levels= --nologtostderr
    --showprefixforinfo --stderrthreshold=fatal --verbosity=-1 --flagfile= --undefok= --test_tmpdir=/tmp/absl_testing"""


@pytest.mark.parametrize('case', golden_cases.cases('math', 'configs_long_tail*'), ids=str)
def test_flag_files_of_the_original(case, tmp_path):
    """absl writes its own flags among those of the study."""
    lines = ABSL.split()
    for name, option in case.json['options'].items():
        value = option['default'].strip("'")
        if option['type'] == 'bool':
            lines.append(f'--{name}' if value == 'True' else f'--no{name}')
        else:
            values = json.loads(value) if option['type'] == 'multi_integer' else [value]
            lines += [f'--{name}={item}' for item in values]
    path = tmp_path / 'flagfile.txt'
    path.write_text('\n'.join(sorted(lines)) + '\n')
    assert options(f'--flagfile={path}', '--train', '--verbosity', '1') == options()


# --- Data -------------------------------------------------------------------------------------------------------------


def test_long_tails_of_archives_folders_and_zips(cifar, tmp_path):
    whole = datasets.open_data('cifar100', cifar)
    assert whole.image_shape == (3, 32, 32) and len(whole) == 400 and whole.class_counts.tolist() == [4] * 100
    tail = datasets.open_data('cifar100lt', cifar, imb_factor=0.5)
    chosen = imbalance.long_tailed(whole.label_ids, 100, 'exp', 0.5)
    assert np.array_equal(tail.images(range(len(tail))), whole.images(chosen))
    assert np.array_equal(tail.label_ids, whole.label_ids[chosen]) and tail.class_counts[[0, -1]].tolist() == [4, 2]
    step = datasets.open_data('cifar100lt', os.path.join(cifar, 'cifar-100-python'), imb_type='step', imb_factor=0.25)
    assert step.class_counts.tolist() == [4] * 50 + [1] * 50
    ten = datasets.open_data('cifar10', write_cifar(tmp_path / 'ten', 'cifar10', 5, packed=False), imb_factor=5)
    assert len(ten) == 50
    zipped = datasets.open_data('ziplt', write_digits(tmp_path / 'd.zip'), imb_factor=0.5, size=16)
    assert zipped.image_shape == (3, 16, 16) and zipped.class_counts[0] > zipped.class_counts[9]
    np.testing.assert_array_equal(datasets.nominal_counts('cifar100lt', 'exp', 0.01)[[0, 99]], [500, 5])


def test_real_pictures(real_data):
    data = datasets.open_data('cifar10lt', str(real_data / 'cifar10-small'), imb_factor=0.1)
    assert data.class_names[0] == 'airplane' and data.class_counts[[0, 9]].tolist() == [200, 20]


def test_bad_data(cifar, tmp_path):
    small = ['--train', *SMALL, '--data_type=cifar100lt', f'--logdir={tmp_path}/run', '--img_size=32', '--conditional']
    archive = os.path.join(cifar, 'cifar-100-python.tar.gz')
    content = bytearray(open(archive, 'rb').read())
    damaged = tmp_path / 'damaged' / 'cifar-100-python.tar.gz'
    damaged.parent.mkdir()
    damaged.write_bytes(content[:-8] + bytes(8))                        # the checksum at the end of the file
    layout = tmp_path / 'layout' / 'cifar-100-python'
    layout.mkdir(parents=True)
    (layout / 'train').write_bytes(pickle.dumps({'data': np.zeros([2, 3072], np.uint8)}, protocol=2))
    (layout / 'meta').write_bytes(pickle.dumps({'fine_label_names': ['a']}, protocol=2))
    for root, message in ((damaged.parent, 'CRC check failed'), (layout.parent, 'layout'), (tmp_path, '--download'),
                          (write_cifar(tmp_path / 'ten', 'cifar10', 5) + '/cifar-10-python.tar.gz', '10 classes')):
        assert message in fails(MAIN, *small, f'--root={root}')
    assert 'class 86 (class86) is left without images' in fails(MAIN, *small, f'--root={cifar}', '--imb_factor=0.2')
    assert 'MD5' in fails(MAIN, *small, f'--root={cifar}', '--download')  # there, but not the original
    (tmp_path / 'gap').mkdir()
    (tmp_path / 'gap' / 'dataset.json').write_text('{"labels": [["a.png", 0], ["b.png", 2]]}')
    for name in 'ab':
        PIL.Image.new('RGB', [8, 8]).save(tmp_path / 'gap' / f'{name}.png')
    with pytest.raises(UserError, match='class 1 .*is left without images'):
        datasets.open_data('zip', str(tmp_path / 'gap'))
    assert not os.path.exists(tmp_path / 'run')


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_run_as_written(cifar, tmp_path, monkeypatch):
    """From long_tail/, with what makes them small appended: plain, class-balancing, fine-tuning, evaluation."""
    small = [*SMALL, '--root', cifar, '--imb_factor', '0.5', '--batch_size', '4', '--save_step', '2', '--sample_step', '2',
             '--sample_size', '4']
    logs = tmp_path / 'logs'

    monkeypatch.chdir(ROOT / 'long_tail')

    def line(text, *more):
        return invoke(MAIN, *text.replace('./logs/', f'{logs}/').split(), *more)

    line('--train --flagfile ./config/cifar100.txt --parallel --logdir ./logs/cifar100lt_ddpm --total_steps 300001 '
         '--conditional --data_type cifar100lt --imb_factor 0.01 --img_size 32 --batch_size 64 --save_step 100000 '
         '--sample_step 50000 --cfg', *small, '--total_steps', '5')
    assert StepCheckpoints(str(logs / 'cifar100lt_ddpm')).numbers() == [2, 4]
    picture = PIL.Image.open(logs / 'cifar100lt_ddpm' / 'sample' / '4.png')
    assert picture.width > 2 * 32                                       # the names of two classes, and two samples of each
    line('--train --flagfile ./config/cifar100.txt --parallel --logdir ./logs/cifar100lt_cbdm_augm --total_steps '
         '500001 --conditional --data_type cifar100lt --imb_factor 0.01 --img_size 32 --batch_size 48 --save_step 100000 '
         '--sample_step 50000 --cb --tau 1.0 --augm', *small, '--total_steps', '3')
    assert 'augm_embedding.weight' in weights(logs / 'cifar100lt_cbdm_augm' / 'ckpt_2.pt')
    line('--train --flagfile ./config/cifar100.txt --parallel --logdir ./logs/cifar100lt_ddpm --total_steps 100001 '
         '--conditional --data_type cifar100lt --imb_factor 0.01 --img_size 32 --batch_size 48 --save_step 50000 --sample_step '
         '50000 --cb --tau 1.0 --finetune --finetuned_logdir cifar100lt_cbdm_finetune --ckpt_step 200000',
         *small, '--ckpt_step', '4', '--total_steps', '5')
    assert StepCheckpoints(str(logs / 'cifar100lt_cbdm_finetune')).numbers() == [6, 8]
    assert StepCheckpoints(str(logs / 'cifar100lt_ddpm')).numbers() == [2, 4]
    run('long_tail/make_stats.py', '--data_type=cifar100', f'--root={cifar}', '--detector=pixels', '--img_size=32',
        f'--dest={logs}/stats.npz')
    out = line(f'--flagfile ./logs/cifar100lt_cbdm_augm/flagfile.txt --logdir ./logs/cifar100lt_cbdm_augm --fid_cache '
               f'{logs}/stats.npz --ckpt_step 300000 --num_images 50000 --batch_size 64 --notrain --eval --sample_method cfg '
               '--omega 1.6', '--ckpt_step', '2', '--num_images', '8', '--detector', 'pixels', '--noprd')
    assert 'fd_pixels' in out and os.path.isfile(logs / 'cifar100lt_cbdm_augm' / 'saved_2_cfg_omega1.6.npz')


def test_what_a_run_leaves_behind(trained):
    assert StepCheckpoints(str(trained)).numbers() == [2, 4, 5]
    state = read_own(str(trained / 'ckpt_4.pt'))
    assert state['step'] == 4 and state['nimg'] == 5 * 8 and state['optim']['state'][0]['step'] == 5
    found = events(trained)
    assert [step for step, _ in found['Loss/ddpm']] == [1, 2, 3, 4, 5] and found['Progress/lr'][0][1] > 0
    lines = (trained / 'flagfile.txt').read_text().splitlines()
    assert {'--batch_size=8', '--ch_mult=2', '--nocb', '--cfg', '--seed=0', '--tau=1.0', '--attn='} <= set(lines)
    snapshot = load_snapshot(str(trained / 'ckpt_4.pt'))                # a checkpoint is a snapshot too
    assert_same({name.removeprefix('model.'): value for name, value in snapshot.net.state_dict().items()}, state['ema_model'])
    assert snapshot.dataset['class_counts'][0] == 178


def test_balancing_terms_are_logged_and_parameters_matter(trained, tmp_path):
    invoke(MAIN, '--train', *DIGITS, f'--logdir={tmp_path}/cb', '--total_steps=3', '--cb')
    found = events(tmp_path / 'cb')
    assert {'Loss/ddpm', 'Loss/reg', 'Loss/com', 'Loss/loss'} <= found.keys()
    assert max(value for _, value in found['Loss/reg']) > 0
    base = weights(trained / 'ckpt_2.pt', 'net_model')
    for change in ('--seed=1', '--lr=1e-3', '--grad_clip=1e-3', '--dropout=0.5', '--beta_T=0.5', '--warmup=0', '--augm',
                   '--imb_factor=0.5', '--imb_type=step', '--noxflip', '--batch_size=4'):
        folder = tmp_path / change
        invoke(MAIN, '--train', *DIGITS, f'--logdir={folder}', '--total_steps=3', '--cfg', change)
        other = weights(folder / 'ckpt_2.pt', 'net_model')
        assert other['head.weight'].shape == base['head.weight'].shape
        assert not torch.equal(other['head.weight'], base['head.weight']), change
    invoke(MAIN, '--train', *DIGITS, f'--logdir={tmp_path}/ema', '--total_steps=3', '--cfg', '--ema_decay=0')
    assert_same(weights(tmp_path / 'ema' / 'ckpt_2.pt'), weights(tmp_path / 'ema' / 'ckpt_2.pt', 'net_model'))
    assert_same(weights(tmp_path / 'ema' / 'ckpt_2.pt', 'net_model'), base)


def test_half_of_the_images_of_a_batch_are_mirrored_anew():
    data = ArrayImages('x', np.random.RandomState(0).randint(0, 256, [4, 6, 6, 3]).astype(np.uint8))

    def seen(plan):
        batches = DatasetBatches(data, RGBEncoder(), 'cpu', mirror=True)
        return torch.cat([batch['images'] for batch in batches.iterate(plan)])

    images = seen([(0, 400)])
    assert torch.equal(images, seen((start, 8) for start in range(0, 400, 8)))  # however the run is cut
    for original in torch.from_numpy(data.images(range(4))) / 127.5 - 1:
        plain, mirrored = ((images == other).flatten(1).all(1).sum() for other in (original, original.flip(2)))
        assert plain + mirrored == 100 and 30 < mirrored < 70


def test_images_are_mirrored_at_random_without_augm(trained, tmp_path):
    """By default, as in the original; the classes count the images that there are."""
    record = json.loads((trained / 'training_options.json').read_text())
    assert record['xflip'] and record['dataset']['class_counts'][0] == 178
    assert '--xflip' in (trained / 'flagfile.txt').read_text().splitlines()
    for name, more in (('same', ['--xflip']), ('not', ['--noxflip']), ('augm', ['--augm'])):
        invoke(MAIN, '--train', *DIGITS, f'--logdir={tmp_path}/{name}', '--total_steps=3', '--cfg', *more)
    assert_same(weights(tmp_path / 'same' / 'ckpt_2.pt'), weights(trained / 'ckpt_2.pt'))
    assert not json.loads((tmp_path / 'augm' / 'training_options.json').read_text())['xflip']
    # A run goes on as it began, and is not made another one.
    again = ['--train', *DIGITS, f'--logdir={tmp_path}/not', '--total_steps=5', '--cfg']
    assert '--xflip' in fails(MAIN, *again, '--xflip')
    invoke(MAIN, *again)
    assert not json.loads((tmp_path / 'not' / 'training_options.json').read_text())['xflip']


def test_fine_tuning_starts_from_the_average_and_counts_on(trained, tmp_path):
    args = ['--train', *DIGITS, f'--logdir={trained}', '--total_steps=5', '--cb', '--finetune', '--ckpt_step=4']
    invoke(MAIN, *args, '--finetuned_logdir=tuned')
    tuned = trained.parent / 'tuned'
    assert StepCheckpoints(str(tuned)).numbers() == [6, 8]
    assert read_own(str(tuned / 'ckpt_8.pt'))['optim']['state'][0]['step'] == 5      # further steps
    assert '--ckpt_step=4' in (tuned / 'flagfile.txt').read_text()
    # A step without a learning rate leaves the averaged weights of the pretrained run.
    invoke(MAIN, *args, f'--finetuned_logdir={tmp_path}/still', '--total_steps=1', '--warmup=1000')
    assert_same(weights(tmp_path / 'still' / 'ckpt_4.pt', 'net_model'), weights(trained / 'ckpt_4.pt'))
    assert '2, 4, 5' in fails(MAIN, *args, '--finetuned_logdir=x', '--ckpt_step=3')
    for more in ([], ['--eval']):
        assert 'pretrained' in fails(MAIN, *args, f'--finetuned_logdir={trained}', *more)


def test_a_killed_run_goes_on_exactly(tmp_path):
    args = ['--train', *DIGITS, '--cb', '--augm', '--total_steps=11', '--save_step=3']
    invoke(MAIN, *args, f'--logdir={tmp_path}/whole')
    killed = tmp_path / 'killed'
    process = subprocess.Popen(command(MAIN, *args, f'--logdir={killed}', '--total_steps=100000'), env=environment(),
                               stdout=subprocess.DEVNULL)
    while len(StepCheckpoints(str(killed)).numbers()) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for step in StepCheckpoints(str(killed)).numbers()[2:]:             # it may have got further than the other run goes
        os.remove(killed / f'ckpt_{step}.pt')
    os.truncate(killed / 'ckpt_6.pt', 1000)
    assert 'Passing over a damaged checkpoint' in invoke(MAIN, '--flagfile', killed / 'flagfile.txt', '--total_steps=11')
    for key in ('net_model', 'ema_model'):
        assert_same(weights(killed / 'ckpt_10.pt', key), weights(tmp_path / 'whole' / 'ckpt_10.pt', key))
    assert [step for step, _ in events(killed)['Loss/ddpm']] == list(range(1, 11))


def test_runs_that_cannot_go_on(trained, tmp_path):
    """A command that is refused writes nothing."""
    again = ['--train', *DIGITS, f'--logdir={trained}', '--total_steps=9', '--cfg']
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    assert '--lr' in fails(MAIN, *again, '--lr=1')
    assert 'network' in fails(MAIN, *again, '--dropout=0.5')
    with runs.locked(trained):
        assert 'another process' in fails(MAIN, *again)
    assert before == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    state = read_own(str(trained / 'ckpt_2.pt'))
    published = {key: state[key] for key in ('net_model', 'ema_model', 'optim', 'step')}
    (tmp_path / 'published').mkdir()
    torch.save(published, tmp_path / 'published' / 'ckpt_2.pt')
    assert 'not resumed' in fails(MAIN, '--train', *DIGITS, f'--logdir={tmp_path}/published', '--cfg')
    torch.save({'a': 1}, tmp_path / 'published' / 'ckpt_2.pt')
    assert 'ema_model' in fails(MAIN, '--train', *DIGITS, f'--logdir={tmp_path}/published', '--cb', '--finetune',
                                '--finetuned_logdir=x')


@pytest.mark.slow
def test_two_processes_train_the_same(trained, tmp_path):
    """Under torchrun, and as --parallel starts them."""
    args = ['--train', *DIGITS, '--total_steps=3', '--cfg']
    run(MAIN, *args, f'--logdir={tmp_path}/torchrun', processes=2)
    script = (f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
              'from long_tail import main\nfrom torch_utils import distributed\n'
              'if __name__ == "__main__": sys.exit(distributed.launch(main.worker, (sys.argv[1:],), 2))\n')
    (tmp_path / 'launch.py').write_text(script)
    result = subprocess.run([*command('x')[:1], str(tmp_path / 'launch.py'), *args, f'--logdir={tmp_path}/launched'],
                            env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    alone = weights(trained / 'ckpt_2.pt', 'net_model')
    for name in ('torchrun', 'launched'):
        # Adam makes a whole step of a gradient that is nothing but rounding, so a few weights may differ.
        differences = torch.cat([(value - alone[key]).abs().flatten()
                                 for key, value in weights(tmp_path / name / 'ckpt_2.pt', 'net_model').items()])
        assert (differences > 1e-4).float().mean() < 0.01
        losses = [[value for step, value in events(folder)['Loss/ddpm'] if step <= 2] for folder in (trained, tmp_path / name)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    result = subprocess.run([*command('x')[:1], str(tmp_path / 'launch.py'), *args, f'--logdir={tmp_path}/bad',
                             '--batch_size=7'], env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and '--batch_size=7' in result.stderr and 'Traceback' not in result.stderr


def test_parallel_counts_gpus_unless_launched(monkeypatch):
    main = script_module(MAIN)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert main.visible_gpus() == 4
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main.visible_gpus() == 0


# --- Evaluation -------------------------------------------------------------------------------------------------------


def evaluate(folder, stats, *more, num=40):
    return invoke(MAIN, f'--flagfile={folder}/flagfile.txt', f'--logdir={folder}', '--notrain', '--eval',
                  f'--fid_cache={stats}', f'--num_images={num}', '--detector=pixels', '--batch_size=16', *more)


def test_evaluation_end_to_end(trained, digits_stats):
    out = evaluate(trained, digits_stats, '--ckpt_step=4', '--omega=1.6', '--recognition', '--ddim_steps=4')
    name = 'saved_4_cfg_omega1.6_ddim4'
    results = json.loads((trained / f'{name}.json').read_text())
    assert {'fd_pixels', 'fd_pixels_se', 'prd_f8', 'prd_f1_8', 'precision', 'recall', 'recognition'} <= results['all'].keys()
    assert {group: values['classes'] for group, values in results['groups'].items()} == {
        'many': [0, 1], 'medium': [2, 3, 4, 5, 6], 'few': [7, 8, 9]}
    assert [row['training_images'] for row in results['classes']][::9] == [178, 8]
    assert 'recall' in results['groups']['few'] and 'fd_pixels' in results['classes'][0] and 'few' in out
    low, high = (results['all'][f'recognition_{end}'] for end in ('low', 'high'))    # of 40 images
    assert low <= results['all']['recognition'] <= high < low + 0.32
    assert f'({low:.2f}-{high:.2f})' in out and 'recall_low' in results['groups']['few']
    assert 'Note: fd_pixels: 40 images for 64 dimensions' in out and 'Note: fd_pixels of' in out and len(results['notes']) == 3
    assert 'fewer than 50 generated images of 10 classes (0, 1, 2, 3, 4 and 5 more)' in out and 'fid' not in out
    rows = pd.read_csv(trained / f'{name}-classes.csv')
    assert rows['fd_pixels'].tolist() == pytest.approx([row.get('fd_pixels', np.nan) for row in results['classes']], rel=1e-5, nan_ok=True)
    assert rows['name'].tolist() == list(range(10)) and pictures.load_png(trained / f'{name}-classes.png').shape[1] > 1000
    assert sum(group['num_images'] for group in results['groups'].values()) == 40
    images = NpzImages(str(trained / f'{name}.npz'))
    assert len(images) == 40 and images.label_ids.max() == 9
    # The numbers are those of the features themselves.
    stats = load_statistics(str(digits_stats)).gaussians['fd_pixels']
    made = torch.from_numpy(images.images(np.arange(40))).flatten(1).double()
    mu, sigma = made.mean(0), torch.cov(made.T)
    assert results['all']['fd_pixels'] == pytest.approx(frechet_distance(mu, sigma, stats.mu, stats.sigma), rel=1e-6)
    # --sampled measures the same samples again.
    os.utime(trained / f'{name}.npz', (1, 1))
    evaluate(trained, digits_stats, '--ckpt_step=4', '--omega=1.6', '--ddim_steps=4', '--sampled', '--fid_use_torch', *FAST,
             '--group_sizes=200,10')
    again = json.loads((trained / f'{name}.json').read_text())
    assert os.stat(trained / f'{name}.npz').st_mtime == 1 and 'recall' not in again['all']
    assert again['all']['fd_pixels'] == pytest.approx(results['all']['fd_pixels'], rel=1e-6)
    assert list(again['groups']) == ['medium', 'few']


def test_sampling_methods(trained, digits_stats):
    found = {}
    for args, name in (('--sample_method=cond', 'cond'), ('--sample_method=uncond', 'uncond'), ('', 'cfg_omega0'),
                       ('--omega=3', 'cfg_omega3'), ('--ddim_steps=3', 'cfg_omega0_ddim3'), ('--seed=1', 'cfg_omega0'),
                       ('--var_type=fixedsmall', 'cfg_omega0'), ('--weaken_labels=4', 'cfg_omega0_weakened4'),
                       ('--weaken_labels=4 --sample_method=cond', 'cond_weakened4'), ('--weaken_labels=0', 'cfg_omega0')):
        stem = f'name{len(found)}'
        evaluate(trained, digits_stats, '--ckpt_step=5', f'--sample_name={stem}', *FAST, *args.split(), num=12)
        found[args] = NpzImages(str(trained / f'{stem}_5_{name}.npz'))
    pixels = {key: value.images(np.arange(12)) for key, value in found.items()}
    assert np.array_equal(pixels['--sample_method=cond'], pixels[''])
    assert not found['--sample_method=uncond'].has_labels and found[''].has_labels
    assert np.array_equal(pixels['--weaken_labels=4'], pixels['--weaken_labels=4 --sample_method=cond'])
    assert np.array_equal(pixels['--weaken_labels=0'], pixels[''])
    for key in ('--sample_method=uncond', '--ddim_steps=3', '--seed=1', '--var_type=fixedsmall', '--weaken_labels=4'):
        assert not np.array_equal(pixels[key], pixels['']), key


def test_published_checkpoints_are_evaluated_and_fine_tuned(trained, digits_stats, tmp_path):
    """Their layout, with the prefix that DataParallel adds; steps and schedule as that code has them."""
    state = read_own(str(trained / 'ckpt_4.pt'))
    folder = tmp_path / 'published'
    folder.mkdir()
    torch.save({key: {f'module.{name}': value for name, value in state[key].items()} for key in ('net_model', 'ema_model')}
               | {'sched': {'last_epoch': 4, 'lr_lambdas': [None]}, 'optim': state['optim'], 'step': 4, 'x_T': torch.zeros(2)},
               folder / 'ckpt_200000.pt')
    args = [*DIGITS, f'--logdir={folder}', '--ckpt_step=200000']
    invoke(MAIN, '--eval', *args, '--detector=pixels', f'--fid_cache={digits_stats}', '--num_images=12', *FAST)
    evaluate(trained, digits_stats, '--ckpt_step=4', *FAST, num=12)
    same = [NpzImages(str(path)).images(np.arange(12)) for path in (folder / 'saved_200000_cfg_omega0.npz',
                                                                    trained / 'saved_4_cfg_omega0.npz')]
    assert np.array_equal(*same)
    invoke(MAIN, '--train', *args, '--cb', '--finetune', '--finetuned_logdir=tuned', '--total_steps=2', '--save_step=1')
    assert StepCheckpoints(str(tmp_path / 'tuned')).numbers() == [200001]
    assert 'does not fit the network' in fails(MAIN, '--eval', *args,
                                               '--ch=64', '--detector=pixels', f'--fid_cache={digits_stats}')


def test_samples_of_the_published_code(trained, digits_stats, tmp_path):
    """*_samples_ema_*.npy in every layout, with --sampled."""
    args = ['--ckpt_step=4', '--omega=1.6', '--sampled', '--noprd']
    evaluate(trained, digits_stats, *args[:2], '--noprd', num=40)
    ours = trained / 'saved_4_cfg_omega1.6.npz'
    report = ours.with_suffix('.json')
    expected = json.loads(report.read_text())
    images = NpzImages(str(ours))
    pixels, labels = images.images(np.arange(40)), images.label_ids
    ours.unlink()
    np.save(trained / 'cfg_1.6_labels_ema_saved.npy', labels)
    for array in (pixels, pixels.transpose(0, 2, 3, 1), pixels / np.float32(255), pixels / 127.5 - 1,
                  pixels.astype(np.float32)):
        np.save(trained / 'cfg_1.6_samples_ema_saved.npy', array)
        evaluate(trained, digits_stats, *args)
        assert json.loads(report.read_text())['all'] == pytest.approx(expected['all'])
        assert json.loads(report.read_text())['groups'].keys() == expected['groups'].keys()
    np.save(trained / 'cfg_1.6_samples_ema_other.npy', pixels)
    assert 'cfg_1.6_samples_ema_saved.npy' in evaluate(trained, digits_stats, *args)
    failing = [f'--flagfile={trained}/flagfile.txt', f'--logdir={trained}', '--notrain', '--eval', '--num_images=40',
               '--detector=pixels', f'--fid_cache={digits_stats}', *args]
    assert 'several' in fails(MAIN, *failing, '--sample_name=third')
    for array, words in ((pixels[:3], '3 images'), (pixels[:, 0], 'instead of images'), (pixels * 3.0, '0..765')):
        np.save(trained / 'cfg_1.6_samples_ema_saved.npy', array)
        (trained / 'cfg_1.6_labels_ema_saved.npy').unlink(missing_ok=True)
        assert words in fails(MAIN, *failing)
    alone = tmp_path / 'alone'                                  # no checkpoint of the run, samples only
    alone.mkdir()
    shutil.copy(trained / 'flagfile.txt', alone)
    np.save(alone / 'cfg_1.6_samples_ema_saved.npy', pixels)
    evaluate(alone, digits_stats, *args)
    [report] = alone.glob('*.json')
    assert json.loads(report.read_text())['all'] == pytest.approx(expected['all'])
    for path in trained.glob('*_ema_*.npy'):
        path.unlink()


@pytest.mark.slow
def test_published_features_beside_a_cache(trained, tmp_path):
    """The cache of mean and covariance alone, and DATA_feats.npy: the same as of our file with features."""
    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), tmp_path / 'weights.pth')
    network = ['--detector=inception', f'--weights={tmp_path}/weights.pth']
    invoke('long_tail/make_stats.py', '--data_type=digits', '--num=12', f'--dest={tmp_path}/ours.npz', *network)
    stats = load_statistics(str(tmp_path / 'ours.npz'))
    assert stats.protocol == 'cbdm'
    (tmp_path / 'theirs').mkdir()
    np.savez(tmp_path / 'theirs' / 'digits.train.npz', mu=stats.gaussians['fid'].mu, sigma=stats.gaussians['fid'].sigma)
    found = []
    for cache in ('ours.npz', 'theirs/digits.train.npz'):
        evaluate(trained, tmp_path / cache, '--ckpt_step=4', '--sample_name=feats', *network,
                 *(['--sampled'] if found else []), num=12)
        found.append(json.loads((trained / 'feats_4_cfg_omega0.json').read_text())['all'])
        np.save(tmp_path / 'theirs' / 'digits_feats.npy', stats.features['fid'].double().numpy())
    assert found[0] == pytest.approx(found[1], rel=1e-6) and {'prd_f8', 'precision', 'recall', 'is'} <= found[1].keys()
    np.save(tmp_path / 'theirs' / 'digits_feats.npy', np.zeros([5, 7]))
    assert 'digits_feats.npy: float64 [5, 7]' in fails(
        MAIN, f'--flagfile={trained}/flagfile.txt', f'--logdir={trained}', '--notrain', '--eval', *network,
        f'--fid_cache={tmp_path}/theirs/digits.train.npz')
    (tmp_path / 'edm2.pkl').write_bytes(pickle.dumps({'fid': dict(mu=np.zeros(2048), sigma=np.eye(2048))}))
    assert 'is of the protocol edm, which' in fails(
        MAIN, f'--flagfile={trained}/flagfile.txt', f'--logdir={trained}', '--notrain', '--eval', *network,
        f'--fid_cache={tmp_path}/edm2.pkl')


def test_evaluation_during_training(digits_stats, tmp_path):
    invoke(MAIN, '--train', *DIGITS, f'--logdir={tmp_path}/run', '--total_steps=5', '--eval_step=2', '--num_images=12',
           '--detector=pixels', f'--fid_cache={digits_stats}', '--noprd')
    found = events(tmp_path / 'run')
    assert [step for step, _ in found['Eval/fd_pixels']] == [2, 4] and 'Eval/recall' in found


def test_bad_evaluations(trained, digits_stats, tmp_path):
    args = [f'--flagfile={trained}/flagfile.txt', f'--logdir={trained}', '--notrain', '--eval', '--num_images=12',
            '--detector=pixels']
    assert '2, 4, 5' in fails(MAIN, *args, '--ckpt_step=300000', f'--fid_cache={digits_stats}')
    assert '--weaken_labels' in fails(MAIN, *args, '--weaken_labels=1', '--sample_method=uncond')
    assert 'nowhere.npz' in fails(MAIN, *args, '--fid_cache=nowhere.npz')
    np.savez(tmp_path / 'inception.npz', mu=np.zeros(5), sigma=np.eye(5))
    error = fails(MAIN, *args, f'--fid_cache={tmp_path}/inception.npz')
    assert "dimensions: {'fd_pixels': 5}" in error and '64' in error
    np.savez(tmp_path / 'odd.npz', mu=np.zeros(5), sigma=np.eye(4))
    np.savez(tmp_path / 'none.npz', a=np.zeros(5))
    (tmp_path / 'damaged.npz').write_bytes(b'PK\x03\x04' + bytes(30))
    for name in ('odd', 'none', 'damaged'):
        assert f'{name}.npz' in fails(MAIN, *args, f'--fid_cache={tmp_path}/{name}.npz')
    assert 'first' in fails(MAIN, *args, f'--fid_cache={digits_stats}', '--sampled', '--sample_name=never')
    np.savez(tmp_path / 'plain.npz', mu=np.zeros(64), sigma=np.eye(64))
    assert '--recognition' in fails(MAIN, *args, f'--fid_cache={tmp_path}/plain.npz', '--recognition')
    out = evaluate(trained, tmp_path / 'plain.npz', num=12)              # a published cache: the distance alone
    assert 'no features' in out and 'recall' not in out.split('pixels features:')[1]


def test_statistics(tmp_path, cifar, digits_stats):
    with np.load(digits_stats) as z:
        pixels = z['features'].astype(np.float64)
        np.testing.assert_allclose(z['mu'], pixels.mean(0), rtol=1e-6)
        np.testing.assert_allclose(z['sigma'], np.cov(pixels.T), rtol=1e-6, atol=1e-6)
        assert len(z['labels']) == 1797
    make = ['long_tail/make_stats.py', '--data_type=cifar100', f'--root={cifar}', '--detector=pixels', '--img_size=8']
    invoke(*make, f'--dest={tmp_path}/part.npz', '--num=150')
    found = load_statistics(str(tmp_path / 'part.npz'))
    assert set(np.bincount(found.labels)) == {1, 2} and found.gaussians['fd_pixels'].dim == 192
    invoke(*make, f'--dest={tmp_path}/small.npz', '--nofeatures', '--split=test')
    assert not load_statistics(str(tmp_path / 'small.npz')).features
    assert '.npz' in fails(*make, f'--dest={tmp_path}/x.pkl')
    assert "'cifar100lt' is not one of" in fails(*make, '--data_type=cifar100lt', f'--dest={tmp_path}/x.npz')
    assert '--dest' in fails(*make)


# --- Measures by class ------------------------------------------------------------------------------------------------


def test_groups_of_classes():
    assert classwise.class_groups([500, 101, 100, 20, 19, 0]) == {'many': [0, 1], 'medium': [2, 3], 'few': [4, 5]}
    assert classwise.class_groups([5, 5]) == {'few': [0, 1]}


def statistics_of(features, labels, **more) -> Statistics:
    gaussian = Gaussian(features.double().mean(0).numpy(), np.cov(features.T), len(features))
    return Statistics('x', {'fid': gaussian}, {'fid': features} | more, torch.as_tensor(labels))


def test_recall_of_a_class_is_its_own(tmp_path):
    """Two classes: of one all is covered, of the other half is missing."""
    rng = np.random.RandomState(0)
    real = torch.from_numpy(rng.randn(200, 4)).float()
    labels = np.repeat([0, 1], 100)
    real[labels == 1] += 100
    real[150:] += 100                                                   # the second class has two modes
    made = torch.cat([real[:100], real[100:150], real[100:150] + 0.01])
    evaluation = classwise.Evaluation(statistics_of(real, labels))
    found = evaluation(statistics_of(made, labels), [500, 5])
    recall = [row['recall'] for row in found['classes']]
    assert recall[0] > 0.95 and recall[1] == 0.5 and found['groups']['few']['recall'] == 0.5
    assert found['groups']['many']['fid'] == pytest.approx(0, abs=1e-6) and found['groups']['few']['prd_f8'] < 0.9
    assert found['all']['recall'] == pytest.approx(np.mean(recall), abs=0.02)
    # The golden rule: the same as the whole matrix of distances.
    with pytest.raises(UserError, match='class 2'):
        evaluation(statistics_of(made, labels + 1), [500, 5, 5])


def test_inception_scores_by_group(tmp_path):
    """With Inception's probabilities: a group of one predicted class scores 1, of two classes 2."""
    probs = torch.zeros(40, 1008)
    probs[:20, 3] = 1
    probs[20:, 5] = 1
    probs[30:, 5], probs[30:, 6] = 0, 1
    probs = probs[torch.tensor([*range(20), *[i for pair in zip(range(20, 30), range(30, 40), strict=True) for i in pair]])]
    features = torch.from_numpy(np.random.RandomState(0).randn(40, 3)).float()
    labels = np.repeat([0, 1], 20)
    reference = statistics_of(features, labels)
    reference.gaussians['fid'] = Gaussian(np.zeros(3), np.eye(3))
    evaluation = classwise.Evaluation(reference, prd=False)
    found = evaluation(statistics_of(features, labels, softmax=probs), [500, 5])
    assert found['groups']['many']['is'] == pytest.approx(1) and found['groups']['few']['is'] == pytest.approx(2)
    assert found['all']['fid'] > 0 and 'is' not in found['classes'][0]


def test_frechet_distance_by_torch():
    rng = np.random.RandomState(0)
    a, b = rng.randn(20, 30), rng.randn(100, 30) + 0.1                  # the first is of low rank
    statistics = [value for x in (a, b) for value in (x.mean(0), np.cov(x.T))]
    assert frechet_distance(*statistics, device='cpu') == pytest.approx(frechet_distance(*statistics), rel=1e-6)
    with pytest.raises(UserError, match='30 and 3'):
        frechet_distance(a.mean(0), np.cov(a.T), np.zeros(3), np.eye(3), device='cpu')


def test_help_shows_examples_and_defaults():
    result = click.testing.CliRunner().invoke(script_module(MAIN).main, ['--help'])
    assert result.exit_code == 0 and re.search(r'--tau FLOAT.{,200}default:\s+1\.0', result.output, re.S)
    assert '--noparallel' in result.output and '--finetuned_logdir cifar100lt_cbdm_finetune' in result.output
    assert distributed.get_world_size() == 1


def test_pictures_in_memory_must_be_squares_too():
    source = types.SimpleNamespace(stack=lambda indices: np.zeros([2, 4, 6, 3], np.uint8), where='images.idx[{}]'.format)
    with pytest.raises(UserError, match=r'images.idx\[0\] is 6 x 4; all images must be squares'):
        datasets._read(source, [0, 1], None, 3)
    assert datasets._read(source, [0, 1], 8, 3).shape == (2, 8, 8, 3)
