"""Files of an earlier version (see legacy_files.py): every one is read, and every run goes on."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile

import helpers
import legacy_files
import numpy as np
import pytest
import torch

from training.snapshot import load_snapshot


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('legacy')
    with tarfile.open(legacy_files.ARCHIVE) as archive:
        archive.extractall(folder, filter='data')
    (folder / 'yaml').symlink_to(helpers.ROOT / 'distillation' / 'yaml')
    return folder


@pytest.mark.parametrize('name', legacy_files.RUNS)
def test_runs_go_on_from_their_checkpoint(folder, tmp_path, name):
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy, symlinks=True)
    script, arguments, longer, first, then = legacy_files.RUNS[name]
    result = helpers.run(script, *arguments, longer.format(then), cwd=copy)
    assert 'Starting at' not in result.stdout
    assert 'Resuming from' in result.stdout or 'complete' in result.stdout
    if first != then:
        rows = [json.loads(line) for line in (copy / name / 'stats.jsonl').read_text().splitlines()]
        assert len(rows) > len((folder / name / 'stats.jsonl').read_text().splitlines())


@pytest.mark.parametrize('name, refused', [
    ('edm2', ['--batch=16']), ('edm', ['--batch=4']), ('student', ['student.ema_rate=0.5']),
    ('long_tail', ['--tau=3']), ('classifier', ['--lr=1'])])
def test_runs_with_other_settings_are_refused(folder, tmp_path, name, refused):
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy, symlinks=True)
    script, arguments, longer, _, then = legacy_files.RUNS[name]
    before = {path.name: path.read_bytes() for path in (copy / name).iterdir()}
    result = helpers.run(script, *arguments, longer.format(then), *refused, cwd=copy, check=False)
    assert result.returncode == 1
    assert result.stderr.count('Error: ') == 1 and 'Traceback' not in result.stderr
    assert refused[0].partition('=')[0].rpartition('.')[2].lstrip('-') in result.stderr
    after = {path.name: path.read_bytes() for path in (copy / name).iterdir()}
    assert before == after


NETWORKS = ['edm2/network-snapshot-0000000-0.100.pkl', 'edm2.safetensors', 'folder',
            'edm/network-snapshot-0000001.pkl', 'teacher/network-snapshot-0000000.pkl',
            'student/ema_0.9999_000002.pt', 'long_tail/ckpt_1.pt']


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_are_sampled(folder, tmp_path, name):
    snapshot = load_snapshot(str(folder / name))
    assert all(torch.isfinite(value).all() for value in snapshot.net.state_dict().values())
    helpers.run('generate_images.py', f'--net={folder / name}', f'--outdir={tmp_path / "out"}',
                '--seeds=0-2', '--steps=2')
    assert len(list((tmp_path / 'out').glob('*.png'))) == 3


def test_images_of_edm2_are_the_same_to_the_bit(folder, tmp_path):
    helpers.run('generate_images.py', f'--net={folder / NETWORKS[0]}', f'--outdir={tmp_path / "out"}',
                '--seeds=0-3', '--steps=2')
    for path in (folder / 'images').glob('*.png'):
        assert path.read_bytes() == (tmp_path / 'out' / path.name).read_bytes()


@pytest.mark.parametrize('name', ['ref.pkl', 'ref.npz'])
def test_statistics_are_compared_with(folder, tmp_path, name):
    dest = tmp_path / 'metrics.json'
    helpers.run('calculate_metrics.py', 'calc', f'--images={folder / "digits.zip"}',
                f'--ref={folder / name}', '--metrics=fd_pixels', f'--dest={dest}')
    distance = json.loads(dest.read_text())['results']['fd_pixels']
    assert abs(distance) < 1e-3                    # the same images


def test_statistics_of_the_long_tail_study_are_compared_with(folder, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(folder, copy, symlinks=True)
    helpers.run('long_tail/main.py', '--flagfile=long_tail/flagfile.txt', '--notrain', '--eval',
                '--detector=pixels', '--fid_cache=stats.npz', '--num_images=40', cwd=copy)


def test_classifiers_score(folder, tmp_path):
    shutil.copytree(folder / 'classes', tmp_path / 'classes')
    helpers.run('synthetic_data/select_1M.py',
                f'--model_path={folder / "classifier/network-snapshot-0000000.pkl"}',
                f'--data_dir={tmp_path / "classes"}', f'--output_dir={tmp_path}', '--class_num=10',
                '--top_scale=0.5')
    assert (tmp_path / '1m.npz').is_file()


def test_class_files_are_combined_as_before(folder, tmp_path):
    shutil.copytree(folder / 'classes', tmp_path / 'classes')
    helpers.run('synthetic_data/combine_data.py', f'--data_dir={tmp_path / "classes"}',
                f'--output_dir={tmp_path}', '--class_num=10', '--file_name=all')
    with np.load(folder / 'all.npz') as old, np.load(tmp_path / 'all.npz') as new:
        assert sorted(old) == sorted(new)
        assert all(np.array_equal(old[key], new[key]) for key in old)


def test_archives_are_data_sets(folder):
    output = helpers.run('dataset_tool.py', 'inspect', f'--source={folder / "digits.zip"}').stdout
    assert '40' in output and '8x8' in output
    with zipfile.ZipFile(folder / 'digits.zip') as archive:
        assert archive.testzip() is None


DIFFUSERS = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
print(len(pipe(seeds=range(3), num_steps=2).images))
"""


def test_the_diffusers_folder_brings_its_own_code(folder, tmp_path):
    path = str(folder / 'folder')
    result = subprocess.run(
        [sys.executable, '-c', DIFFUSERS, path], cwd=tmp_path, text=True, capture_output=True,
        env=helpers.environment(HF_HOME=str(tmp_path / 'hf'), PYTHONPATH=''))
    assert result.stdout == '3\n', result.stderr
