"""What people pass on says nothing of the machine, the user or the folders that it was made in."""

import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment, fails, invoke, write_digits
from test_train_edm import TINY
from tiny import save_tiny_vae

from dnnlib.util import publishable
from training.data.dataset import ImageDataset

USER = 'zaphodbeeblebrox'
HOST = 'heartofgold'
SECRETS = [USER, HOST, 'homes-of-betelgeuse', str(ROOT), socket.gethostname()]


# --- The search -----------------------------------------------------------------------------------


def contents(name: str, data: bytes):
    """(name, bytes) of a file and, unpacked, of all that is in it."""
    yield name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(f'{name}:{member}', archive.read(member))
    elif data.startswith(b'\x89PNG'):
        at = 8
        while at < len(data):
            length, kind = struct.unpack_from('>I4s', data, at)
            if kind in (b'zTXt', b'iTXt'):
                text = data[at + 8:at + 8 + length].partition(b'\0')[2].lstrip(b'\0\1')
                yield f'{name}:{kind}', zlib.decompressobj().decompress(text) if kind == b'zTXt' else text
            at += 12 + length


def telling(folder: Path) -> dict:
    """{file: what it tells} of all files below a folder but log.txt."""
    paths = [path for path in folder.rglob('*') if path.is_file() and path.name != 'log.txt']
    assert paths
    found = {}
    for path in paths:
        for name, data in contents(str(path.relative_to(folder)), path.read_bytes()):
            texts = [data.replace(b'\0', b''), name.encode()]  # NumPy has letters of 4 bytes
            if words := [word for word in SECRETS if len(word) > 4 and any(word.encode() in text for text in texts)]:
                found[name] = words
    return found


def test_the_search_finds_what_is_hidden(tmp_path):
    import numpy as np
    from PIL import Image, PngImagePlugin
    np.savez_compressed(tmp_path / 'a.npz', x=np.array([USER]))
    note = PngImagePlugin.PngInfo()
    note.add_text('where', HOST * 99, zip=True)
    Image.new('RGB', (4, 4)).save(tmp_path / 'b.png', pnginfo=note)
    with zipfile.ZipFile(tmp_path / 'c.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / 'a.npz', 'inner.npz')
    assert set(telling(tmp_path)) == {'a.npz:x.npy', "b.png:b'zTXt'", 'c.zip:inner.npz:x.npy'}


# --- The commands ---------------------------------------------------------------------------------

STUDIES = ['digits_synthetic', 'digits_memorization', 'evaluate_data']  # more of the same files, in half a minute
NAMES = ['train_edm2', 'train', 'image_train', 'image_kd', 'long_tail', 'train_classifier', 'generate_images', 'metrics-ref',
         'metrics-calc', 'metrics-gen', 'memorization', 'mem_ratio', 'convert', 'encode', 'train-latents', 'phema', 'export',
         'export-latents', 'export-safetensors', 'run_gaussian', 'dynamic_prepare', 'image_sample', 'long_tail-eval', 'generate',
         'select_1M', 'combine_data', 'data_utils-size', 'data_utils-diversity']


@pytest.fixture
def home(tmp_path):
    """A home folder."""
    folder = tmp_path / 'homes-of-betelgeuse' / USER
    folder.mkdir(parents=True)
    return folder


def written(home, *names):
    """Runs commands of tests/faults/cases.py there, with whole paths; returns the folders of what they wrote."""
    for folder in ('tmp', 'work'):
        (home / folder).mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'faults' / 'published.py', home / 'work', HOST, *names], text=True, capture_output=True,
        env=environment(HOME=str(home), USER=USER, LOGNAME=USER, TMPDIR=str(home / 'tmp')))
    assert done.returncode == 0, done.stdout + done.stderr
    return [home / 'work' / 'in', *(home / 'work' / 'runs' / name for name in names)]


@pytest.mark.slow
def test_no_file_tells_of_its_author(home):
    folders = written(home, *NAMES)
    assert {folder.name: words for folder in folders if (words := telling(folder))} == {}
    logs = [path.read_text() for folder in folders for path in folder.glob('**/log.txt')]
    assert sum(USER in log for log in logs) > 4                # where to look, for the author


@pytest.mark.slow
@pytest.mark.parametrize('name', STUDIES)
def test_no_file_of_a_study_tells_of_its_author(home, name):
    assert telling(written(home, name)[-1]) == {}


# --- Names in place of paths ----------------------------------------------------------------------


@pytest.mark.parametrize('text, name', [
    ('/mnt/disk/d.zip', 'd.zip'), ('~/d.zip', 'd.zip'), ('~zaphod/data/d.zip', 'd.zip'), ('../zaphod/d.zip', 'd.zip'),
    ('a/../../zaphod/d.zip', 'd.zip'), ('//server/zaphod/d.zip', 'd.zip'), ('file:///mnt/zaphod/d.zip', 'd.zip'),
    ('HOME/a b, c/d.zip', 'd.zip'), ('--data=HOME/a b, c/d.zip', '--data=d.zip'), ('HOME', '~'), ('HOME/a b, c', 'a b, c'),
    ('/mnt/a.zip,datasets/b.zip,/mnt/c.zip', 'a.zip,datasets/b.zip,c.zip'), ('optimal:/mnt/d.zip', 'optimal:d.zip'),
    ('inception=/mnt/i.pkl', 'inception=i.pkl'), ('/mnt/a/1.png is damaged (see "/mnt/b")', '1.png is damaged (see "b")'),
    *((text, text) for text in (
        'datasets/d.zip', './datasets/d.zip', 'stabilityai/sd-vae-ft-mse', 'https://host.org/a/d.zip', '--net=https://host.org/a/d',
        's3://bucket/d.zip', 'img/s', 'mean / std', '3/4', 'and/or', 'Loss/loss', '[1,0]', '00000/img00000000.png', ''))])
def test_of_a_path_the_last_name_is_published(tmp_path, monkeypatch, text, name):
    folder = tmp_path / 'home of' / USER
    (folder / 'a b, c').mkdir(parents=True)
    (folder / 'a b, c' / 'd.zip').touch()
    monkeypatch.setenv('HOME', str(folder))
    value = text.replace('HOME', str(folder))
    assert publishable(value) == name
    assert publishable({'x': [value, 1.5, None], 'y': {'z': (value,)}}) == {'x': [name, 1.5, None], 'y': {'z': [name]}}


# --- Data that have moved -------------------------------------------------------------------------


def short(folder, data, *args):
    return invoke('train_edm2.py', f'--outdir={folder}', f'--data={data}', '--preset=digits', '--channels=8', '--batch=32',
                  '--status=0', '--snapshot=0', '--checkpoint=32', *args)


def test_a_run_goes_on_with_data_that_have_moved_and_with_no_others(tmp_path):
    data = write_digits(tmp_path / 'here' / 'd.zip')
    short(tmp_path / 'out', data, '--duration=64')
    moved = tmp_path / 'there' / 'd.zip'
    moved.parent.mkdir()
    shutil.move(data, moved)
    assert 'Resuming from 64 images' in short(tmp_path / 'out', moved, '--duration=96')
    other = write_digits(tmp_path / 'other' / 'd.zip', first=1)  # as many images of the same size
    line = fails('train_edm2.py', f'--outdir={tmp_path / "out"}', f'--data={other}', '--preset=digits', '--channels=8',
                 '--batch=32', '--status=0', '--snapshot=0', '--checkpoint=32', '--duration=128')
    assert 'is of a run with other settings: dataset.fingerprint' in line


def old_record(run_dir, **options):
    """Makes the record and the checkpoints those of a version that kept paths and no fingerprints."""
    def old(values):
        return {key: old(value) if isinstance(value, dict) else value for key, value in values.items()
                if not key.endswith('fingerprint')} | {key: value for key, value in options.items() if key in values}

    path = run_dir / 'training_options.json'
    path.write_text(json.dumps(old(json.loads(path.read_text()))))
    for checkpoint in run_dir.glob('training-state-*.pt'):
        state = torch.load(checkpoint, weights_only=True)
        torch.save(state | {'recipe': old(state['recipe'])}, checkpoint)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    data = write_digits(tmp_path / 'd.zip')
    out = tmp_path / 'out'
    short(out, data, '--duration=64')
    old_record(out, data=data, outdir=str(out))
    assert USER not in str(tmp_path) and str(tmp_path) in (out / 'training_options.json').read_text()
    assert 'Resuming from 64 images' in short(out, data, '--duration=96')
    assert str(tmp_path) not in (out / 'training_options.json').read_text()


def test_numbered_runs_are_found_by_the_content_of_their_data(tmp_path):
    """With the same base name in another folder: the same data go on with the run, others begin one."""
    def run_of(data, *args):
        text = invoke('train.py', f'--outdir={tmp_path / "runs"}', f'--data={data}', *TINY, '--snap=0', '--seed=3', *args)
        return next(line for line in text.splitlines() if line.startswith('Run: '))[-80:]

    data = write_digits(tmp_path / 'a' / 'd.zip')
    first = run_of(data, '--dump=4')
    run_dir = next((tmp_path / 'runs').iterdir())
    (run_dir / 'stats.jsonl').unlink()                         # as of a run that was stopped
    for path in run_dir.glob('training-state-*.pt'):
        path.unlink()
    moved = write_digits(tmp_path / 'b' / 'd.zip')
    assert run_of(moved, '--dump=4') == first
    assert '00001-' in run_of(write_digits(tmp_path / 'c' / 'd.zip', first=1), '--dump=4')


@pytest.mark.parametrize('change', ['pixels', 'labels', None])
def test_a_fingerprint_is_of_the_content(tmp_path, change):
    data = write_digits(tmp_path / 'd.zip', count=20)
    unpacked = tmp_path / 'unpacked'
    with zipfile.ZipFile(data) as archive:
        archive.extractall(unpacked)
    if change == 'pixels':
        shutil.copy(unpacked / '00000' / 'img00000003.png', unpacked / '00000' / 'img00000004.png')
    if change == 'labels':
        path = unpacked / 'dataset.json'
        path.write_text(path.read_text().replace('"00000/img00000004.png", 4', '"00000/img00000004.png", 5'))
    ours, theirs = (ImageDataset(path).description() for path in (data, unpacked))
    differences = {key for key in ours if ours[key] != theirs[key]} - {'name'}
    assert differences == {None: set(), 'pixels': {'fingerprint'}, 'labels': {'labels_fingerprint'}}[change]


def test_a_local_autoencoder_is_found_by_its_content(tmp_path, monkeypatch):
    """The archive has the last name of its folder and its fingerprint; other content is not taken for it."""
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    vae = tmp_path / 'models' / 'vae'
    save_tiny_vae(vae)
    invoke('dataset_tool.py', 'convert', '--source=digits', f'--dest={tmp_path / "d.zip"}', '--max-images=4', '--resolution=16x16')
    invoke('dataset_tool.py', 'encode', f'--source={tmp_path / "d.zip"}', f'--dest={tmp_path / "e.zip"}', f'--model-url={vae}')
    with zipfile.ZipFile(tmp_path / 'e.zip') as archive:
        assert json.loads(archive.read('dataset.json'))['encoder']['vae_name'] == 'vae'
    invoke('dataset_tool.py', 'decode', f'--source={tmp_path / "e.zip"}', f'--dest={tmp_path / "p.zip"}')
    save_tiny_vae(vae, seed=1)
    assert 'autoencoder vae' in fails('dataset_tool.py', 'decode', f'--source={tmp_path / "e.zip"}', f'--dest={tmp_path / "q.zip"}')
