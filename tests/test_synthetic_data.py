"""Synthetic data: images depend on seed and class alone, files appear whole, selection is that of scoring in one go,
classifiers resume exactly, attacks stay within their ball, and mistakes end in one line."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib

import click.testing
import numpy as np
import pytest
import torch
from helpers import ROOT, command, environment, fails, run, script_module, write_digits

from dnnlib import UserError
from dnnlib.npz import map_array
from synthetic_data import class_files, class_writer, classify, npz, scoring, stored_zip
from synthetic_data.adversarial import Attack, pgd
from synthetic_data.class_files import ArrayFile
from synthetic_data.fixed_batch import FixedBatch
from synthetic_data.mixture import GeneratedImages, Mixture, MixtureOrder
from torch_utils.random import BlockRandomGenerator, GlobalRandom
from training import checkpoint
from training.data.dataset import ImageDataset
from training.diffusion.samplers import ablation_sampler, edm_sampler
from training.encoders import RGBEncoder
from training.generate import generate_images
from training.networks import build_network
from training.networks.classifier import WideResNet
from training.snapshot import load_snapshot, save_snapshot

GENERATE, SELECT, COMBINE = (f'synthetic_data/{name}.py' for name in ('generate', 'select_1M', 'combine_data'))
TRAIN, EVALUATE = 'synthetic_data/train_classifier.py', 'synthetic_data/evaluate_data.py'
SIDE, CLASSES = 8, 3


def invoke(script, *args):
    result = click.testing.CliRunner().invoke(script_module(script).main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def save_network(path, label_dim=CLASSES, side=SIDE, channels=3, width=8):
    torch.manual_seed(0)
    net = build_network('EDMPrecond', img_resolution=side, img_channels=channels, label_dim=label_dim, model_type='SongUNet',
                        model_channels=width, channel_mult=[1], num_blocks=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_snapshot(path, net, encoder=RGBEncoder(), dataset={'name': 'x', 'label_dim': label_dim}, recipe={}, nimg=0)
    return str(path)


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp('nets') / 'net.pkl')


def options(network, outdir, *more):
    return [f'--network={network}', f'--outdir={outdir}', f'--class_num={CLASSES}', '--steps=2', *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def made(tmp_path_factory, network):
    """The folder of an undisturbed run: 20 images of each class."""
    folder = tmp_path_factory.mktemp('made') / 'out'
    invoke(GENERATE, *options(network, folder, '--seeds=0-19', '--batch=8'))
    return folder


# --- generate.py ------------------------------------------------------------------------------------------------------


def test_images_are_those_of_their_seed_and_class(made, network):
    net = load_snapshot(network).net
    for label in range(CLASSES):
        array = np.load(made / f'{label}.npy')
        assert array.shape == (20, SIDE, SIDE, 3) and array.dtype == np.uint8
        (batch,) = generate_images(net, RGBEncoder(), range(20), labels=label, batch=20, sampler=edm_sampler, num_steps=2)
        assert np.abs(array.astype(int) - batch.images.permute(0, 2, 3, 1).numpy()).max() <= 1
        assert json.loads((made / f'{label}.json').read_text())['seeds'] == '0-19'
    assert {path.suffix for path in made.iterdir()} == {'.npy', '.json'}
    assert not np.array_equal(np.load(made / '0.npy'), np.load(made / '1.npy'))


@pytest.mark.parametrize('batch', [1, 7, 100])
def test_the_batch_changes_no_bit(made, network, tmp_path, batch):
    invoke(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-19', f'--batch={batch}'))
    assert contents(tmp_path / 'out') == contents(made)


@pytest.mark.slow
def test_two_processes_as_written(made, network, tmp_path):
    """The line of the documentation, from synthetic_data/, with two processes."""
    line = f'torch.distributed.run --standalone --nproc_per_node=2 generate.py --outdir={tmp_path}/out --seeds=0-19 ' \
           f'--batch=2048 --steps=2 --class_num={CLASSES} --network={network}'
    subprocess.run([sys.executable, '-m', *line.split()], cwd=ROOT / 'synthetic_data', env=environment(), check=True,
                   capture_output=True)
    assert contents(tmp_path / 'out') == contents(made)


def test_ranges_of_different_runs_join(made, network, tmp_path):
    out = tmp_path / 'out'
    for seeds in ('0-4', '3-11', '5,15-19', '12-14'):
        invoke(GENERATE, *options(network, out, f'--seeds={seeds}', '--batch=4'))
    record = json.loads((out / '1.json').read_text())
    assert record['seeds'] == '0-11,15-19,12-14' and record['images'] == 20
    order = [*range(12), *range(15, 20), *range(12, 15)]
    for label in range(CLASSES):
        np.testing.assert_array_equal(np.load(out / f'{label}.npy'), np.load(made / f'{label}.npy')[order])


def test_a_finished_class_is_never_made_twice(made, network, tmp_path):
    out = tmp_path / 'out'
    invoke(GENERATE, *options(network, out, '--seeds=0-3', '--class=1'))
    assert sorted(path.name for path in out.iterdir()) == ['1.json', '1.npy']
    stamp = (out / '1.npy').stat()
    assert '2 of 3 classes' in invoke(GENERATE, *options(network, out, '--seeds=0-3'))
    again = (out / '1.npy').stat()
    assert (again.st_ino, again.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    assert '0 of 3 classes' in invoke(GENERATE, *options(network, out, '--seeds=1-2'))


@pytest.mark.parametrize('given, changed', [
    (['--sigma_min=0.1'], dict(sigma_min=0.1)), (['--sigma_max=5'], dict(sigma_max=5)), (['--rho=3'], dict(rho=3)),
    (['--S_churn=20'], dict(S_churn=20)), (['--S_churn=20', '--S_min=1'], dict(S_churn=20, S_min=1)),
    (['--S_churn=20', '--S_max=50'], dict(S_churn=20, S_max=50)),
    (['--S_churn=20', '--S_noise=2'], dict(S_churn=20, S_noise=2)),
    (['--solver=euler'], dict(solver='euler')), (['--disc=vp'], dict(discretization='vp')),
    (['--schedule=vp'], dict(schedule='vp')), (['--scaling=vp', '--schedule=vp'], dict(scaling='vp', schedule='vp'))])
def test_sampler_options(network, tmp_path, given, changed):
    invoke(GENERATE, *options(network, tmp_path, '--seeds=0-5', '--class=2', *given, '--steps=3'))
    sampler = ablation_sampler if {'solver', 'discretization', 'schedule'} & set(changed) else edm_sampler
    net = load_snapshot(network).net
    expected, plain = (next(generate_images(net, RGBEncoder(), range(6), labels=2, sampler=which, num_steps=3, **settings))
                       .images.permute(0, 2, 3, 1).int().numpy() for which, settings in ((sampler, changed), (edm_sampler, {})))
    found = np.load(tmp_path / '2.npy').astype(int)
    assert np.abs(found - expected).max() <= 1 and np.abs(found - plain).max() > 1


@pytest.mark.slow
def test_killed_at_random_moments_the_files_are_the_same(network, tmp_path):
    arguments = options(network, tmp_path / 'out', '--seeds=0-299', '--batch=4', '--steps=5')
    invoke(GENERATE, *options(network, tmp_path / 'whole', '--seeds=0-299', '--batch=4', '--steps=5'))
    rng, partial = np.random.default_rng(), 0

    def written():
        counts = []
        for done in (tmp_path / 'out').glob('*.done'):
            with contextlib.suppress(FileNotFoundError):               # finished meanwhile
                counts.append(int((np.fromfile(done, np.uint8) != 0).sum()))
        return counts

    for attempt in range(6):
        if attempt >= 2 and partial:
            break
        process = subprocess.Popen(command(GENERATE, *arguments), env=environment(), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        until, before = time.monotonic() + 60, written()
        while (not any(written()) or written() == before) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        partial += any(0 < count < 300 for count in written())
    invoke(GENERATE, *arguments)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    assert partial                                             # at least once it was stopped within a class


@pytest.mark.parametrize('moment', ['begun', 'half', 'extended', 'renamed', 'done left'])
def test_every_moment_of_a_stop_is_recovered_from(tmp_path, moment):
    images = np.random.RandomState(0).randint(0, 256, [10, 4, 4, 3], np.uint8)

    def prepared(seeds=10):
        writer = class_writer.ClassWriter(str(tmp_path), 0)
        writer.prepare(np.arange(seeds), {'network': 'a'}, (4, 4, 3))
        return writer.open()

    if moment == 'begun':
        prepared()
        (tmp_path / '0.part.json').unlink()                    # stopped before the record
    elif moment == 'half':
        prepared(6).write(2, images[2:5])
        assert prepared(6).missing(2) == [(0, 2), (4, 6)]
    elif moment == 'extended':
        prepared(6).write(0, images[:6])
        prepared(6)._reserve((10, 4, 4, 3), keep=True)         # stopped before the record
        assert prepared(6).finish() and np.array_equal(np.load(tmp_path / '0.npy'), images[:6])
    elif moment == 'renamed':
        prepared(8).write(0, images[:8])
        os.replace(tmp_path / '0.npy.part', tmp_path / '0.npy')
    elif moment == 'done left':
        prepared(8).write(0, images[:8])
        os.replace(tmp_path / '0.npy.part', tmp_path / '0.npy')
        os.replace(tmp_path / '0.part.json', tmp_path / '0.json')
    writer = prepared()
    assert not (tmp_path / '0.npy').exists() or len(np.load(tmp_path / '0.npy')) in (6, 8)
    for start, stop in writer.missing(3):
        writer.write(start, images[start:stop])
    assert writer.finish()
    np.testing.assert_array_equal(np.load(tmp_path / '0.npy'), images)
    assert sorted(os.listdir(tmp_path)) == ['0.json', '0.npy']


def limited(script, size, *args):
    """Runs a script that may not write files of more than `size` bytes: what a full disk looks like to it."""
    return subprocess.run(command(script, *args), env=environment(), text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def test_a_full_disk(made, network, tmp_path):
    for script, arguments, option in (
            (GENERATE, options(network, tmp_path / 'out', '--seeds=0-999'), '--outdir'),
            (COMBINE, [f'--data_dir={made}', f'--output_dir={tmp_path}/out', '--class_num=3', '--file_name=all'],
             '--output_dir')):
        result = limited(script, 5000, *arguments)
        assert result.returncode == 1 and result.stderr.startswith(f'Error: {option}={tmp_path}/out cannot be written')
        assert len(result.stderr.strip().splitlines()) == 1
        assert not [path for path in (tmp_path / 'out').rglob('*') if path.suffix in ('.npy', '.npz', '.part')]


def test_a_full_disk_leaves_what_was_there(made, network, tmp_path):
    out = tmp_path / 'out'
    invoke(GENERATE, *options(network, out, '--seeds=0-4'))
    before = contents(out)
    result = limited(GENERATE, 5000, *options(network, out, '--seeds=0-999'))
    assert result.returncode == 1 and 'cannot be written' in result.stderr and contents(out) == before


def test_gray_networks_make_rgb(tmp_path):
    network = save_network(tmp_path / 'gray.pkl', channels=1)
    invoke(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-1'))
    array = np.load(tmp_path / 'out' / '0.npy')
    assert array.shape == (2, SIDE, SIDE, 3) and (array == array[..., :1]).all()


def test_mistakes_in_generating(made, network, tmp_path):
    assert 'unconditional' in fails(GENERATE, *options(save_network(tmp_path / 'u.pkl', 0), tmp_path / 'x', '--seeds=0'))
    assert '3 classes' in fails(GENERATE, *options(network, tmp_path / 'x', '--seeds=0', '--class_num=10'))
    assert '--class=3' in fails(GENERATE, *options(network, tmp_path / 'x', '--seeds=0', '--class=0,3'))
    assert 'nowhere.pkl' in fails(GENERATE, *options('nowhere.pkl', tmp_path / 'x'))
    assert '--seeds' in fails(GENERATE, *options(network, tmp_path / 'x', '--seeds=5-2'))
    assert not (tmp_path / 'x').exists()
    other = save_network(tmp_path / 'other.pkl', width=16)
    assert 'another network' in fails(GENERATE, *options(other, made, '--seeds=0-19'))
    assert 'another rho' in fails(GENERATE, *options(network, made, '--seeds=0-30', '--rho=5'))
    invoke(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-3'))
    (tmp_path / 'out' / '1.json').unlink()
    assert '1.npy is there without its record' in fails(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-3'))
    (tmp_path / 'out' / '0.json').write_text('{}')
    assert '0.json is damaged' in fails(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-3'))


def test_networks_see_batches_of_one_size():
    seen = []

    class Net:
        img_resolution = 4

        def __call__(self, x, factor, labels):
            seen.append(len(x))
            return x * factor + labels.sum()                   # depends on the rest of the batch, so that it can be seen

    x, labels = torch.arange(7.).reshape(7, 1), torch.ones(7, 1)
    fixed = FixedBatch(Net(), 3)
    assert fixed(x, torch.tensor(2.0), labels).flatten().tolist() == [3 + 2 * i for i in range(7)]
    assert seen == [3, 3, 3] and fixed.img_resolution == 4
    assert FixedBatch(Net(), None)(x, 2, labels)[0] == 7 and seen[-1] == 7


# --- combine_data.py --------------------------------------------------------------------------------------------------


def write_classes(folder, counts, side=4, seed=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.RandomState(seed)
    arrays = [rng.randint(0, 256, [count, side, side, 3], np.uint8) for count in counts]
    for label, array in enumerate(arrays):
        np.save(folder / f'{label}.npy', array)
    return arrays


def test_combine_as_written(tmp_path):
    arrays = write_classes(tmp_path / 'out', [5, 3, 8])
    result = run(COMBINE, '--data_dir', './out', '--output_dir', './npz', '--class_num', '3', '--file_name', '5m',
                 cwd=tmp_path, PYTHONPROFILEIMPORTTIME='1')
    assert 'stored_zip' in result.stderr and 'numpy' not in result.stderr  # NumPy would take a third of the time
    with np.load(tmp_path / 'npz' / '5m.npz') as z:
        assert z.files == ['image', 'label'] and z['label'].dtype == np.int64
        np.testing.assert_array_equal(z['image'], np.concatenate(arrays))
        np.testing.assert_array_equal(z['label'], np.repeat([0, 1, 2], [5, 3, 8]))
    assert os.listdir(tmp_path / 'npz') == ['5m.npz']


def combined(folder, dest, count=CLASSES):
    """The arrays of a folder of classes, as np.load reads them from a correct zip."""
    invoke(COMBINE, f'--data_dir={folder}', f'--output_dir={dest}', f'--class_num={count}', '--file_name=all')
    with zipfile.ZipFile(dest / 'all.npz') as z:
        assert z.testzip() is None
    with np.load(dest / 'all.npz', allow_pickle=False) as z:
        return z['image'], z['label']


@pytest.mark.parametrize('change', ['nothing', 'images', 'time', 'copied', 'swapped', 'rubbish'])
def test_checksums_are_used_only_for_files_as_they_were_made(made, tmp_path, change, monkeypatch):
    out = tmp_path / 'out'
    subprocess.run(['cp', '-a', made, out], check=True)
    path, computed, real = out / '1.npy', [], stored_zip.checksum
    if ArrayFile.open(str(path)).known_checksum() is None:
        pytest.skip('no extended attributes in this folder')
    if change == 'images':                                     # in place: the size stays
        with open(path, 'r+b') as file:
            file.seek(500)
            file.write(b'changed')
    elif change == 'time':
        os.utime(path)
    elif change == 'copied':
        shutil.copyfile(path, tmp_path / 'x')
        os.replace(tmp_path / 'x', path)
    elif change == 'swapped':
        for a, b in (('1', 'x'), ('2', '1'), ('x', '2')):
            os.replace(out / f'{a}.npy', out / f'{b}.npy')
    elif change == 'rubbish':
        os.setxattr(path, class_files.CHECKSUM, b'1 x 3')
    monkeypatch.setattr(stored_zip, 'checksum', lambda *args: computed.append(args) or real(*args))
    images, labels = combined(out, tmp_path / 'npz')
    np.testing.assert_array_equal(images, np.concatenate([np.load(out / f'{label}.npy') for label in range(CLASSES)]))
    assert labels.tolist() == np.repeat(range(CLASSES), 20).tolist()
    assert len(computed) == (change not in ('nothing', 'swapped'))


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('refusal', [errno.EXDEV, errno.ENOSYS, None, 'missing'])
def test_file_systems_that_do_not_copy(tmp_path, refusal, known, monkeypatch):
    """An error in the middle, no byte copied, or no such function at all: what is left is read and written."""
    arrays, calls, real = write_classes(tmp_path / 'out', [50, 70], side=32), [], getattr(os, 'copy_file_range', None)
    monkeypatch.setattr(stored_zip, 'PIECE_BYTES', 5000)
    monkeypatch.setattr(stored_zip, 'PART_BYTES', 12345)       # so that threads share the files
    for label in range(2 if known else 0):
        ArrayFile.open(f'{tmp_path}/out/{label}.npy').remember_checksum()

    def copy(source, dest, count, start, offset):
        calls.append(count)
        if len(calls) > 1 and refusal:
            raise OSError(refusal, 'refused')
        return real(source, dest, 3333, start, offset) if len(calls) == 1 and real else 0

    if refusal == 'missing':
        monkeypatch.delattr(os, 'copy_file_range', raising=False)
    else:
        monkeypatch.setattr(os, 'copy_file_range', copy, raising=False)
    images, _ = combined(tmp_path / 'out', tmp_path / 'npz', 2)
    np.testing.assert_array_equal(images, np.concatenate(arrays))
    assert bool(calls) == (refusal != 'missing')


def test_a_file_that_shrinks_while_it_is_copied(tmp_path, monkeypatch):
    write_classes(tmp_path / 'out', [5, 3, 8])
    real = script_module(COMBINE).stored
    monkeypatch.setattr(script_module(COMBINE), 'stored',
                        lambda classes: os.truncate(tmp_path / 'out' / '1.npy', 200) or real(classes))
    assert '1.npy is cut short' in fails(COMBINE, f'--data_dir={tmp_path}/out', f'--output_dir={tmp_path}/npz',
                                         '--class_num=3', '--file_name=all')
    assert os.listdir(tmp_path / 'npz') == []


def test_headers_that_only_numpy_reads(tmp_path):
    arrays = write_classes(tmp_path, [4, 6])
    with open(tmp_path / '1.npy', 'wb') as file:
        np.lib.format.write_array(file, arrays[1], version=(2, 0))
    np.testing.assert_array_equal(combined(tmp_path, tmp_path / 'npz', 2)[0], np.concatenate(arrays))


def test_combine_joins_folders_of_other_seeds_only(network, made, tmp_path):
    more = tmp_path / 'more'
    invoke(GENERATE, *options(network, more, '--seeds=20-22'))
    arguments = [f'--data_dir={made}', f'--data_dir={more}', '--class_num=3', f'--output_dir={tmp_path}', '--file_name=all']
    invoke(COMBINE, *arguments)
    with np.load(tmp_path / 'all.npz') as z:
        assert len(z['image']) == 3 * 23
        np.testing.assert_array_equal(z['image'][20:23], np.load(more / '0.npy'))
        np.testing.assert_array_equal(z['image'][23:43], np.load(made / '1.npy'))
    invoke(GENERATE, *options(network, more, '--seeds=5-7'))
    assert 'seeds 5-7' in fails(COMBINE, *arguments)


def test_an_npz_of_many_pieces_is_a_correct_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, 'PIECE_BYTES', 100)
    images = np.random.RandomState(0).randint(0, 256, [50, 4, 4, 3], np.uint8)

    def read(label, start, out):
        out[:] = images[20 * label + start:][:len(out)]

    columns = npz.columns((4, 4, 3), [20, 30], read)
    assert len(columns['image'].pieces) == 25
    npz.write_npz(str(tmp_path / 'a.npz'), columns, workers=3)
    subprocess.run([sys.executable, '-m', 'zipfile', '-t', tmp_path / 'a.npz'], check=True, capture_output=True)
    with np.load(tmp_path / 'a.npz') as z:
        np.testing.assert_array_equal(z['image'], images)
    np.testing.assert_array_equal(map_array(str(tmp_path / 'a.npz'), 'image'), images)
    assert map_array(str(tmp_path / 'a.npz'), 'label').tolist() == [0] * 20 + [1] * 30


def test_checksums_of_parts_make_that_of_the_whole():
    data = np.random.RandomState(0).bytes(10000)
    for cut in (0, 1, 4321, 10000):
        assert stored_zip.crc32_combine(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), 10000 - cut) == zlib.crc32(data)


def test_a_failing_read_leaves_no_file(tmp_path):
    def read(label, start, out):
        raise OSError(28, 'No space left on device')

    with pytest.raises(OSError):
        npz.write_npz(str(tmp_path / 'a.npz'), npz.columns((4, 4, 3), [5], read))
    assert os.listdir(tmp_path) == []


# --- select_1M.py -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
    """Images of three classes, weights like the published ones, and the network."""
    folder = tmp_path_factory.mktemp('scored')
    arrays = write_classes(folder / 'out', [40, 23, 31], side=8)
    torch.manual_seed(1)
    net = WideResNet('wrn-10-1', 3, normalize_input=True).eval()
    torch.save({f'module.{name}': value for name, value in net.state_dict().items()}, folder / 'pseudo.pt')
    return folder, arrays, net.requires_grad_(False)


def select(folder, out, *more):
    return ['--model_path', f'{folder}/pseudo.pt', '--data_dir', f'{folder}/out', '--output_dir', str(out), '--class_num', '3',
            *more]


def in_one_go(arrays, net, share):
    """Images and labels that scoring each class in one batch selects."""
    images, labels = [], []
    for label, array in enumerate(arrays):
        x = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
        order = np.argsort(-net(x).softmax(1)[:, label].numpy(), kind='stable')[:int(len(array) * share + 1e-6)]
        images.append(array[np.sort(order)])
        labels += [label] * len(order)
    return np.concatenate(images), np.array(labels)


@pytest.mark.parametrize('more, share', [([], 0.2), (['--top_scale=0.5', '--batch_size=7'], 0.5), (['--model=wrn-10-1'], 0.2)])
def test_the_selection_is_that_of_one_go(scored, tmp_path, more, share):
    folder, arrays, net = scored
    invoke(SELECT, *select(folder, tmp_path, *more))
    images, labels = in_one_go(arrays, net, share)
    with np.load(tmp_path / '1m.npz') as z:
        np.testing.assert_array_equal(z['image'], images)
        np.testing.assert_array_equal(z['label'], labels)
    report = json.loads((tmp_path / '1m-report.json').read_text())
    for label, row in enumerate(report['classes']):
        assert row['images'] == len(arrays[label]) == sum(row['histogram']) and row['selected'] == (labels == label).sum()
    assert all((tmp_path / f'1m-{name}.png').is_file() for name in ('confidence', 'best-worst'))


@pytest.mark.slow
def test_two_processes_select_the_same(scored, tmp_path):
    folder = scored[0]
    invoke(SELECT, *select(folder, tmp_path / 'one'))
    run(SELECT, *select(folder, tmp_path / 'two', '--batch_size=5', '--file_name=1m'), processes=2)
    assert (tmp_path / 'one' / '1m.npz').read_bytes() == (tmp_path / 'two' / '1m.npz').read_bytes()


def test_ties_are_broken_by_index():
    scores = np.array([0.5, 0.9, 0.9, 1.0, 0.9], np.float32)
    assert scoring.select_top(scores, 0.4).tolist() == [1, 3]
    assert scoring.select_top(scores, 0.6).tolist() == [1, 2, 3]
    assert scoring.select_top(scores, 0.001).tolist() == [3]
    assert scoring.extremes(scores, 2).tolist() == [3, 1, 0, 1]
    row = scoring.report(scores, np.array([1, 3]))
    assert row['ties_at_lowest'] == 3 and row['histogram'][-1] == 1 and sum(row['histogram']) == 5


def test_mistakes_in_selecting_and_combining(scored, tmp_path):
    folder = scored[0]
    combine = ['--output_dir', str(tmp_path / 'x'), '--file_name', 'all', '--class_num', '3', '--data_dir']
    for arguments, script in ((select(folder, tmp_path / 'x')[:-2], SELECT), (combine[:4], COMBINE)):
        source = [] if script == SELECT else ['--data_dir', str(folder / 'out')]
        assert '2.npy is of class 2' in fails(script, *arguments, *source, '--class_num=2')
        assert '3.npy: no such file' in fails(script, *arguments, *source, '--class_num=4')
        assert '--top_scale' in fails(SELECT, *select(folder, tmp_path / 'x', '--top_scale=1.5'))
    write_classes(tmp_path / 'bad', [3, 3, 3])
    for value, words in ((np.zeros([3, 8, 8, 3], np.uint8), '[8, 8, 3]'), (np.zeros([3, 4, 4, 3]), 'float64'),
                         (np.zeros([3, 4, 4], np.uint8), '[3, 4, 4]'), (np.zeros([0, 4, 4, 3], np.uint8), '[0, 4, 4, 3]')):
        np.save(tmp_path / 'bad' / '1.npy', value)
        assert words in (line := fails(COMBINE, *combine, tmp_path / 'bad')) and '1.npy' in line
    (tmp_path / 'bad' / '1.npy').write_bytes(b'nothing')
    assert '1.npy is no .npy' in fails(COMBINE, *combine, tmp_path / 'bad')
    data = (folder / 'out' / '1.npy').read_bytes()
    (tmp_path / 'bad' / '1.npy').write_bytes(data[:-5])
    assert 'cut short' in fails(COMBINE, *combine, tmp_path / 'bad')
    assert 'no such folder' in fails(COMBINE, *combine, 'nowhere')
    assert '--file_name' in fails(COMBINE, *combine, folder / 'out', '--file_name=a/b')
    torch.save(WideResNet('wrn-10-1', 4).state_dict(), tmp_path / 'four.pt')
    assert 'of 4 classes, not of 3' in fails(SELECT, *select(folder, tmp_path / 'x', f'--model_path={tmp_path}/four.pt'))
    assert 'does not fit' in fails(SELECT, *select(folder, tmp_path / 'x', '--model=wrn-16-1'))
    assert 'nowhere.pt' in fails(SELECT, *select(folder, tmp_path / 'x', '--model_path=nowhere.pt'))
    assert not (tmp_path / 'x').exists()


# --- Classifiers ------------------------------------------------------------------------------------------------------


def test_augmentation_moves_and_mirrors():
    images = torch.arange(1., 1 + 4 * 16).reshape(4, 1, 4, 4)
    assert torch.equal(classify.augment(images, GlobalRandom(), 0, False), images)
    mirrored = classify.augment(images.repeat(16, 1, 1, 1), GlobalRandom(), 0, True).reshape(16, 4, 1, 4, 4)
    same = (mirrored == images).flatten(2).all(2)
    assert ((mirrored == images.flip(3)).flatten(2).all(2) ^ same).all() and 10 < same.sum() < 54
    moved = classify.augment(images.repeat(64, 1, 1, 1), GlobalRandom(), 1, False).reshape(64, 4, 1, 4, 4)
    padded = torch.nn.functional.pad(images, [1] * 4)
    places = {(dy, dx): (moved == padded[:, :, dy:dy + 4, dx:dx + 4]).flatten(2).all(2) for dy in range(3) for dx in range(3)}
    assert torch.stack(list(places.values())).sum(0).eq(1).all() and all(found.any() for found in places.values())


def test_attacks_stay_in_their_ball_and_raise_the_loss():
    torch.manual_seed(0)
    net = WideResNet('wrn-10-1', 5)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = pgd(net, x, y, Attack(0.1, 0.03, 10), BlockRandomGenerator('cpu', 0, 0, 8))
    assert (found - x).abs().max() <= 0.1 + 1e-6 and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in WideResNet('wrn-10-1', 5).parameters()]
    loss = torch.nn.functional.cross_entropy
    assert loss(net(found), y) > loss(net(x), y) + 0.1
    # On a linear network the best change is eps times the sign of the gradient, and ten steps reach it.
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    x, y = torch.full((3, 3, 2, 2), 0.5), torch.tensor([0, 1, 0])
    found = pgd(linear, x, y, Attack(0.1, 0.03, 10), GlobalRandom())
    sign = (linear[1].weight[1 - y] - linear[1].weight[y]).sign().reshape(3, 3, 2, 2)
    torch.testing.assert_close(found, x + 0.1 * sign)


def test_the_objective_is_the_loss_of_what_it_says():
    torch.manual_seed(0)
    net, images, ids = WideResNet('wrn-10-1', 5).eval(), torch.randn(6, 3, 8, 8).clamp(-1, 1), torch.arange(6) % 5
    batch = {'images': images, 'labels': torch.eye(5)[ids], 'random': BlockRandomGenerator('cpu', 0, 0, 6)}
    loss, terms = classify.ClassificationObjective(pad=0, xflip=False, smoothing=0.2)(net, batch)
    logits = net((images + 1) / 2)
    log = logits.log_softmax(1)
    torch.testing.assert_close(loss, -0.8 * log[range(6), ids] - 0.2 * log.mean(1))
    assert torch.equal(terms['accuracy'], (logits.argmax(1) == ids).float())
    batch['random'] = BlockRandomGenerator('cpu', 0, 0, 6)
    worse, _ = classify.ClassificationObjective(pad=0, xflip=False, attack=Attack(0.1, 0.03, 5))(net, batch)
    assert (worse > -log[range(6), ids]).all()
    rough, _ = classify.ClassificationObjective(pad=0, xflip=False, smoothing=0.2, dtype=torch.bfloat16)(net, batch)
    assert 0 < (rough - loss).abs().max() < 0.1 and rough.dtype == torch.float32


def test_schedules():
    rates = [classify.cosine_lr(nimg, 1000, 0.2, 100) for nimg in (0, 50, 100, 500, 1000)]
    cosine = (1 + np.cos(np.pi * np.array([0, 0.05, 0.1, 0.5, 1]))) / 2
    assert rates == pytest.approx(0.2 * cosine * [0, 0.5, 1, 1, 1], abs=1e-12)
    assert classify.cosine_lr(0, 1000, 0.2) == 0.2
    beta = classify.ema_beta(0.9)
    assert beta(0, 64) == 0.1 and beta(64, 64) == 2 / 11 and beta(64000, 64) == 0.9


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    return write_digits(folder / 'train.zip', count=96), write_digits(folder / 'test.zip', count=100, first=200)


TINY = ['--model=wrn-10-1', '--batch=16', '--duration=192', '--xflip=0', '--checkpoint=64', '--snapshot=192', '--status=64',
        '--lr=0.1', '--ema=0.8', '--attack-steps=2']


def train(outdir, digits, *more):
    return invoke(TRAIN, f'--outdir={outdir}', f'--data={digits[0]}', f'--test={digits[1]}', *TINY, *more)


def weights(outdir):
    state = checkpoint.load_newest(str(outdir))
    return {f'{part}.{name}': value for part in ('net', 'ema')
            for name, value in (state[part] if part == 'net' else state[part]['ema']).items()}


@pytest.fixture(scope='module')
def trained(tmp_path_factory, digits):
    outdir = tmp_path_factory.mktemp('trained') / 'run'
    train(outdir, digits, '--test-every=64', '--adversarial=1')
    return outdir


def test_a_classifier_learns_and_says_how_well(digits, tmp_path):
    out = train(tmp_path, digits, '--duration=1536', '--snapshot=1536', '--eps=0.1', '--step-size=0.05')
    (row,) = json.loads((tmp_path / 'accuracy.json').read_text())
    assert row['nimg'] == 1536 and row['clean'] > 0.5 and row['robust'] < row['clean'] and f'{100 * row["clean"]:.2f}%' in out
    net = classify.open_classifier(str(tmp_path / 'network-snapshot-0000001.pkl'))
    test = ImageDataset(digits[1])
    assert classify.accuracy(net, test)['clean'] == row['clean'] and classify.accuracy(net, test)['robust'] is None
    one, two = (classify.accuracy(net, test, Attack(0.1, 0.05, 2), batch=batch)['robust'] for batch in (100, 33))
    assert abs(one - two) <= 0.01 and abs(one - row['robust']) <= 0.01


def test_a_stopped_training_ends_with_the_same_weights(trained, digits, tmp_path):
    assert [row['nimg'] for row in json.loads((trained / 'accuracy.json').read_text())] == [64, 128, 192]
    assert 'accuracy' in (trained / 'log.txt').read_text()
    outdir = tmp_path / 'run'
    log = outdir / 'stats.jsonl'
    arguments = [f'--outdir={outdir}', f'--data={digits[0]}', f'--test={digits[1]}', *TINY, '--test-every=64',
                 '--adversarial=1']
    process = subprocess.Popen(command(TRAIN, *arguments), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(outdir.glob('training-state-*.pt')) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train(outdir, digits, '--test-every=64', '--adversarial=1')
    ours, theirs = weights(outdir), weights(trained)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((outdir / 'accuracy.json').read_text()) == json.loads((trained / 'accuracy.json').read_text())
    losses = [[json.loads(line)['Loss/loss'] for line in path.read_text().splitlines()]
              for path in (log, trained / 'stats.jsonl')]
    assert losses[0] == losses[1]


def test_what_is_saved_is_the_average(trained):
    saved = load_snapshot(str(trained / 'network-snapshot-0000000.pkl')).net.state_dict()
    state = weights(trained)
    assert all(torch.equal(value, state[f'ema.{name}']) for name, value in saved.items() if 'running' not in name)
    assert any(not torch.equal(value, state[f'net.{name}']) for name, value in saved.items())
    assert all(torch.equal(value, state[f'net.{name}']) for name, value in saved.items() if 'running' in name)


@pytest.mark.parametrize('changed', [
    '--model=wrn-10-2', '--normalize=1', '--lr=0.2', '--rampup=96', '--momentum=0.5', '--weight-decay=0.1', '--ema=0',
    '--smoothing=0.5', '--pad=0', '--xflip=1', '--seed=1', '--precision=bf16', '--adversarial=1', '--batch=32', '--ls=1e30'])
def test_every_option_of_training_counts(digits, tmp_path, changed):
    plain = _plain(digits, tmp_path)
    train(tmp_path / 'run', digits, '--duration=32', '--status=32', '--robust=0', changed)
    ours = weights(tmp_path / 'run')
    assert ours.keys() != plain.keys() or any(
        value.shape != plain[name].shape or not torch.equal(value, plain[name]) for name, value in ours.items())
    assert json.loads((tmp_path / 'run' / 'accuracy.json').read_text())[0]['robust'] is None


_cache = {}


def _plain(digits, tmp_path):
    if digits not in _cache:
        train(tmp_path / 'plain', digits, '--duration=32', '--status=32', '--robust=0')
        _cache[digits] = weights(tmp_path / 'plain')
    return _cache[digits]


def test_options_of_the_attack_count(digits, tmp_path):
    found = []
    for i, more in enumerate(([], ['--eps=0.2'], ['--step-size=0.001'], ['--attack-steps=1'])):
        train(tmp_path / str(i), digits, '--duration=32', '--adversarial=1', '--robust=0', *more)
        found.append(weights(tmp_path / str(i)))
    for i in range(1, 4):
        assert any(not torch.equal(value, found[0][name]) for name, value in found[i].items())


def test_micro_batches_are_normalised_by_themselves(digits, tmp_path):
    plain = _plain(digits, tmp_path)
    train(tmp_path / 'run', digits, '--duration=32', '--status=32', '--batch-gpu=8', '--robust=0')
    ours = weights(tmp_path / 'run')
    assert ours['net.block1.layer.0.bn1.num_batches_tracked'] == 2 * plain['net.block1.layer.0.bn1.num_batches_tracked'] == 4
    assert not torch.equal(ours['net.conv1.weight'], plain['net.conv1.weight'])


@pytest.mark.slow
def test_two_processes_train(digits, tmp_path):
    run(TRAIN, f'--outdir={tmp_path}', f'--data={digits[0]}', f'--test={digits[1]}', *TINY, '--adversarial=1', processes=2)
    assert json.loads((tmp_path / 'accuracy.json').read_text())[0]['nimg'] == 192
    losses = [json.loads(line)['Loss/loss']['mean'] for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[-1] < losses[0]


def test_mistakes_in_training(digits, trained, tmp_path):
    base = [f'--outdir={tmp_path}/x', f'--data={digits[0]}', *TINY]
    unlabelled = write_digits(tmp_path / 'plain.zip', count=4, labels=False)
    for more, words in (([f'--data={unlabelled}'], 'no labels'), ([f'--test={unlabelled}'], 'no labels'),
                        (['--model=wrn-11-1'], 'wrn-11-1'), (['--generated=nowhere.npz'], 'nowhere.npz'),
                        (['--eps=2'], '--eps'), (['--eps=x/y'], '--eps'), (['--precision=fp16'], 'fp16 needs a GPU'),
                        (['--batch=0'], '--batch=0')):
        assert words in fails(TRAIN, *base, *more)
    assert '--lr' in fails(TRAIN, *base, f'--outdir={trained}', '--lr=0.3', '--adversarial=1')
    assert not (tmp_path / 'x').exists()


# --- Mixtures and evaluate_data.py ------------------------------------------------------------------------------------


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


def test_generated_images_change_the_training(digits, generated, tmp_path):
    plain, found = _plain(digits, tmp_path), []
    for i, more in enumerate(([], ['--share=0.3'])):
        train(tmp_path / str(i), digits, '--duration=32', '--robust=0', f'--generated={generated}/all.npz', *more)
        found.append(weights(tmp_path / str(i)))
    for a, b in ((plain, found[0]), (found[0], found[1])):
        assert any(not torch.equal(value, b[name]) for name, value in a.items())


def test_generated_images_that_do_not_fit(digits, generated, tmp_path):
    real = ImageDataset(digits[0])
    arrays = dict(image=np.zeros([3, 16, 16, 3], np.uint8), label=np.arange(3))
    for change, words in (({}, '[3, 16, 16]'), ({'label': np.array([0, 1, 10])}, '0 to 10'), ({'label': np.arange(2)}, '[2]'),
                          ({'image': np.zeros([3, 16, 16, 3])}, 'float64'), ({'label': None}, 'neither')):
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
        assert {key for key in found[0] if options_[key] != found[0][key]} <= {'generated', 'share', 'adversarial'}
    table = {line[:31].strip() for line in out.splitlines() if line.startswith(('plain  ', 'adversarial  '))}
    assert len(table) == 6
    assert '--lr' in fails(EVALUATE, *arguments, '--lr=0.05')


def test_mistakes_in_evaluating(digits, generated, tmp_path):
    base = [f'--outdir={tmp_path}/x', f'--data={digits[0]}', f'--test={digits[1]}', *EVALUATE_TINY]
    for more, words in (([], '--generated'), ([f'--generated={generated}/out', '--training=fast'], '--training=fast'),
                        (['--generated=nowhere'], 'nowhere'), ([f'--generated={generated}/out', '--seeds=1,1'], '--seeds')):
        assert words in fails(EVALUATE, *base, *more)
    assert not (tmp_path / 'x').exists()


def test_published_weights_and_snapshots_open(scored, trained, tmp_path):
    folder, _, net = scored
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(classify.open_classifier(f'{folder}/pseudo.pt', 'wrn-10-1', 3)(x), net(x))
    path = str(trained / 'network-snapshot-0000000.pkl')
    assert classify.open_classifier(path, 'wrn-10-1', 10).num_classes == 10
    for arguments, words in (((path, 'wrn-16-1'), 'holds a wrn-10-1'), ((path, None, 3), 'of 10 classes, not of 3'),
                             ((save_network(tmp_path / 'n.pkl'),), 'no classifier')):
        with pytest.raises(UserError) as error:
            classify.open_classifier(*arguments)
        assert words in str(error.value)
