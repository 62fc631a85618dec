"""generate.py: images depend on seed and class alone, files appear complete, stopped runs go on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, command, environment, fails, traced_only
from synthetic import CLASSES, GENERATE, SIDE, contents, invoke, limited, options, save_network

from synthetic_data import class_files, fixed_batch
from training.encoders import RGBEncoder
from training.generate import generate_images
from training.snapshot import load_snapshot


def test_images_are_those_of_their_seed_and_class(made, network):
    net = load_snapshot(network).net
    for label in range(CLASSES):
        array = np.load(made / f'{label}.npy')
        assert array.shape == (20, SIDE, SIDE, 3) and array.dtype == np.uint8
        (batch,) = generate_images(net, RGBEncoder(), range(20), labels=label, batch=20, num_steps=2)
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
    (['--solver=euler'], dict(solver='euler')), (['--disc=vp'], dict(discretization='vp', beta_d=19.1)),
    (['--disc=vp', '--beta-d=19.9'], dict(discretization='vp', beta_d=19.9)),
    (['--schedule=vp'], dict(schedule='vp')), (['--scaling=vp', '--schedule=vp'], dict(scaling='vp', schedule='vp'))])
def test_sampler_options(network, tmp_path, given, changed):
    invoke(GENERATE, *options(network, tmp_path, '--seeds=0-5', '--class=2', *given, '--steps=3'))
    net = load_snapshot(network).net
    expected, plain = (next(generate_images(net, RGBEncoder(), range(6), labels=2, num_steps=3, **settings))
                       .images.permute(0, 2, 3, 1).int().numpy() for settings in (changed, {}))
    found = np.load(tmp_path / '2.npy').astype(int)
    assert np.abs(found - expected).max() <= 1 and np.abs(found - plain).max() > 1


def test_a_compiled_network_makes_the_same_images(made, network, tmp_path, monkeypatch):
    compiled = traced_only(monkeypatch)
    invoke(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-19', '--compile=True'))
    assert compiled
    for label in range(CLASSES):
        difference = np.load(tmp_path / 'out' / f'{label}.npy').astype(int) - np.load(made / f'{label}.npy')
        assert abs(difference).max() <= 1


def test_without_options_it_is_the_published_command(network, tmp_path):
    assert '--subdirs changes nothing' in invoke(
        GENERATE, f'--network={network}', f'--outdir={tmp_path}/out', '--class=1', '--subdirs')
    assert sorted(contents(tmp_path / 'out')) == ['1.json', '1.npy']
    record = json.loads((tmp_path / 'out' / '1.json').read_text())
    assert record['seeds'] == '0-63' and record['made_by']['num_steps'] == 18 and 'beta_d' not in record['made_by']
    (batch,) = generate_images(load_snapshot(network).net, RGBEncoder(), range(64), labels=1, batch=64)
    assert np.abs(np.load(tmp_path / 'out' / '1.npy').astype(int) - batch.images.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_runs_of_an_earlier_version_keep_their_range(network, tmp_path):
    """Without --beta-d these had EDM's range of noise levels, and their records do not say so."""
    vp = options(network, tmp_path, '--class=0', '--disc=vp', '--steps=3')
    invoke(GENERATE, *vp, '--seeds=0-1', '--beta-d=19.9')
    record = json.loads((tmp_path / '0.json').read_text())
    assert record['made_by'].pop('beta_d') == 19.9
    (tmp_path / '0.json').write_text(json.dumps(record))
    assert 'another beta_d (19.9 instead of 19.1)' in fails(GENERATE, *vp, '--seeds=0-2')
    assert '1 of 1 classes' in invoke(GENERATE, *vp, '--seeds=0-2', '--beta-d=19.9')


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
        writer = class_files.ClassWriter(str(tmp_path), 0)
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
        prepared(6)._reserve((10, 4, 4, 3), 'r+b')         # stopped before the record
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


def test_a_full_disk(network, tmp_path):
    out = tmp_path / 'out'
    for before in ({}, {'0', '1', '2'}):                       # nothing is left of it, and what was there stays
        if before:
            invoke(GENERATE, *options(network, out, '--seeds=0-4'))
        kept = contents(out) if before else {}
        result = limited(GENERATE, 5000, *options(network, out, '--seeds=0-999'))
        assert result.returncode == 1 and result.stderr.startswith(f'Error: {out}/0.npy.part cannot be written')
        assert len(result.stderr.strip().splitlines()) == 1 and contents(out) == kept


def test_gray_networks_make_rgb(tmp_path):
    network = save_network(tmp_path / 'gray.pkl', channels=1)
    invoke(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-1'))
    array = np.load(tmp_path / 'out' / '0.npy')
    assert array.shape == (2, SIDE, SIDE, 3) and (array == array[..., :1]).all()


def test_classes_of_other_images_are_left_alone(made, network, tmp_path):
    other = save_network(tmp_path / 'other.pkl', width=16)
    assert 'another network' in fails(GENERATE, *options(other, made, '--seeds=0-19'))
    assert 'another rho' in fails(GENERATE, *options(network, made, '--seeds=0-30', '--rho=5'))
    invoke(GENERATE, *options(network, tmp_path / 'min', '--seeds=0-3', '--sigma_min=0.1'))
    assert 'another sigma_min (0.1 instead of None)' in fails(GENERATE, *options(network, tmp_path / 'min', '--seeds=0-3'))
    invoke(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-3'))
    (tmp_path / 'out' / '1.json').unlink()
    assert '1.npy is there without its record' in fails(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-3'))
    (tmp_path / 'out' / '0.json').write_text('{}')
    assert '0.json is damaged' in fails(GENERATE, *options(network, tmp_path / 'out', '--seeds=0-3'))


def test_networks_see_batches_of_one_size():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, factor, labels):
            seen.append(len(x))
            return x * factor + labels.sum()                   # depends on the rest of the batch, so that it can be seen

    x, labels = torch.arange(7.).reshape(7, 1), torch.ones(7, 1)
    assert fixed_batch.fix_batch(Net(), 3)(x, torch.tensor(2.0), labels).flatten().tolist() == [3 + 2 * i for i in range(7)]
    assert seen == [3, 3, 3]
    assert fixed_batch.for_device(Net(), 'cuda', 4)(x, 2, labels)[0] == 7 and seen[-1] == 7
