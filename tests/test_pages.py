"""The pages of docs for one's own data, run by their own text at tiny size."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable

import helpers
import numpy as np
import pytest
import test_foreign
import test_own_teacher
import test_transfer
import tiny
import torch
from PIL import Image

from training.networks import build_network

DOCS = helpers.ROOT / 'docs'


@dataclasses.dataclass
class Page:
    """How a page is run: `prepare(folder)` makes what its reader has; `sizes` are what its text is replaced by, each of
    which must be there; `options` what is added to a script (or a script and its command).
    """

    prepare: Callable
    sizes: dict
    options: dict


def commands(text: str) -> list[str]:
    """The lines of the blocks of a page, those joined that end in a backslash."""
    blocks = re.findall(r'^```\w*\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    return [line for line in lines if line.strip() and not line.startswith('#')]


def run_page(name: str, page: Page, folder) -> list[str]:
    """Runs all command lines of docs/NAME in `folder`, Python's in this process; returns what each prints."""
    text = (DOCS / name).read_text()
    for old in page.sizes:
        assert old in text, f'{old} is not in {name}'
    page.prepare(folder)
    outputs = []
    for line in commands(text):
        for old, new in page.sizes.items():
            line = line.replace(old, new)
        program, *words = shlex.split(line)
        if program == 'python':
            more = [option for scripts, options in page.options.items()
                    if scripts.split() == words[:len(scripts.split())] for option in options]
            outputs.append(helpers.invoke(*words, *more))
        else:
            outputs.append(subprocess.run(['bash', '-c', line], cwd=folder, env=helpers.environment(), text=True, check=True,
                                          capture_output=True).stdout)
    return outputs


# --- The pages --------------------------------------------------------------------------------------------------------


def photos(folder):
    """Pictures in class folders, an autoencoder, and a published network."""
    random = np.random.RandomState(0)
    for name in ('photos/cat', 'photos/dog', 'more/dog', 'more/fox', 'more/owl'):
        os.makedirs(folder / name)
        for i in range(6):
            Image.fromarray(random.randint(0, 256, [40, 48, 3], np.uint8)).save(folder / name / f'{i}.jpg')
    tiny.save_tiny_vae(folder / 'vae')
    net = build_network('Precond', img_resolution=4, img_channels=4, label_dim=1000, model_channels=16, channel_mult=[1, 2],
                        num_blocks=1, attn_resolutions=[4], use_fp16=True).requires_grad_(False)
    test_foreign.as_pickle(folder / 'published.pkl', net, encoder=test_transfer.VAE)


def teacher(folder):
    """A network, and statistics of pictures."""
    test_own_teacher.save(folder, test_transfer.SONG, 'NET.pkl')
    data = helpers.write_digits(folder / 'digits.zip', 40)
    helpers.invoke('calculate_metrics.py', 'ref', f'--data={data}', f'--dest={folder}/REF.pkl', '--metrics=fd_pixels')


def animals(folder):
    """Class folders of a long tail, and as many pictures of each class that are not in them."""
    random = np.random.RandomState(0)
    for root, counts in (('animals', (24, 9, 3)), ('animals-test', (6, 6, 6))):
        for name, count in zip(('cat', 'dog', 'lynx'), counts, strict=True):
            os.makedirs(folder / root / name)
            for i in range(count):
                Image.fromarray(random.randint(0, 256, [20, 24, 3], np.uint8)).save(folder / root / name / f'{i}.png')


def my_model(folder):
    """A run with its network, what it was trained on, and what it was not."""
    data = helpers.write_digits(folder / 'DATA.zip', 40)
    helpers.write_digits(folder / 'TEST.zip', 60, first=40)
    helpers.invoke('train_edm2.py', f'--outdir={folder}/RUN', f'--data={data}', '--preset=digits', *SMALL_NET, '--duration=12')
    shutil.copy(folder / 'RUN/network-snapshot-0000000-0.100.pkl', folder / 'NET.pkl')


SMALL_NET = ['--channels=16', '--channel-mult=1,2', '--num-blocks=1', '--batch=6', '--status=12', '--snapshot=12',
             '--checkpoint=12']
PAGES = {
    'my_photos.md': Page(photos, {
        'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img512-xs-2147483-0.135.pkl': 'published.pkl',
        '64x64': '8x8', '256x256': '32x32', '0016777': '0000000', '--duration=1Mi': '--duration=12', '0-9999': '0-9'}, {
        'train_edm2.py --outdir=training-runs/photos': ['--duration=12'], 'train_edm2.py': SMALL_NET,
        'dataset_tool.py encode': ['--model-url=vae'], 'generate_images.py': ['--steps=2'],
        'calculate_metrics.py ref': ['--metrics=fd_pixels'], 'calculate_metrics.py gen': ['--metrics=fd_pixels', '--steps=2'],
        'calculate_metrics.py memorization': ['--num=8', '--steps=2']}),
    'my_teacher.md': Page(teacher, {
        'REF.npz': 'REF.pkl', '0012800': '0000000', 'student.total_steps=100000': 'student.total_steps=2', '0-49999': '0-9'}, {
        'distillation/scripts/dynamic_prepare.py': [*test_own_teacher.SMALL, 'teacher.diffusion.diffusion_steps=10'],
        'distillation/scripts/image_kd.py': [*test_own_teacher.SMALL, 'teacher.diffusion.diffusion_steps=10'],
        'calculate_metrics.py gen': ['--metrics=fd_pixels']}),
    'my_long_tail.md': Page(animals, {
        '32x32': '8x8', '--img_size=32': '--img_size=8', '--total_steps=100001': '--total_steps=2', '=20001': '=1',
        '=10000': '=1', '--num_images=5000': '--num_images=12', '--ddim_steps=50': '--ddim_steps=2', 'dinov2': 'pixels'}, {
        'long_tail/main.py --train': [
            '--ch=32', '--ch_mult=1,2', '--attn=1', '--num_res_blocks=1', '--T=10', '--batch_size=8', '--sample_size=6']}),
    'my_memorization.md': Page(my_model, {
        '--num=10000': '--num=8', '0-9999': '0-7', '0-63': '0-3', '--space=dinov2': '--space=pixels'}, {
        'calculate_metrics.py memorization': ['--steps=2'], 'mem_ratio.py': ['--steps=2'],
        'generate_images.py': ['--steps=2']}),
}
# What a page shows at its end, of all that it makes.
RESULTS = {
    'my_photos.md': (['training-runs/more/network-snapshot-0000000-0.100.pkl', 'photos.png', 'photos.npz',
                      'training-runs/photos256/training_options.json'],
                     ['1 by name, new as the mean: fox, owl', 'the file has 1000 classes and the data 2', 'cat', 'memorization_ratio', 'fd_pixels']),
    'my_long_tail.md': (['logs/finetuned/ckpt_1.pt', 'animals.html'], ['lynx', 'few', 'fd_pixels']),
    'my_memorization.md': (['copies.png', 'mirrored.json', 'features.json', 'RUN/mem_ratio.png', 'optimal.png'],
                           ['memorization_ratio', 'heldout']),
    'my_teacher.md': (['student/samples-0000000.png', 'student.png', 'experiments/cache/NET.cache'], ['fd_pixels']),
}


@pytest.mark.parametrize('name', PAGES)
def test_a_page_runs_by_its_own_text(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    out = '\n'.join(run_page(name, PAGES[name], tmp_path))
    files, words = RESULTS[name]
    assert [path for path in files if not (tmp_path / path).exists()] == []
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize('name', PAGES)
def test_a_page_is_a_screen(name):
    lines = (DOCS / name).read_text().splitlines()
    assert len(lines) <= 60
