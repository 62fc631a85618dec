"""`diffusion_data`: the library, as it is imported, installed and described."""

import json
import os
import re
import shutil
import subprocess
import sys
import typing
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, invoke, write_digits
from PIL import Image
from test_foreign import as_pickle
from test_snapshot_tool import SMALL, small

import diffusion_data
from diffusion_data import UserError, frechet, load, memorized, sample
from training.encoders import RGBEncoder
from training.networks import build_network
from training.snapshot import save_snapshot

CLASSES = dict(name='pets', label_dim=3, classes=[7, 8, 9], class_names=['cats', 'owls', 'newts'])
PAGE = (ROOT / 'docs' / 'library.md').read_text()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """net.pkl with three classes, small.pkl without their names, photos.zip."""
    path = tmp_path_factory.mktemp('library')
    for name, dataset in {'net.pkl': CLASSES, 'small.pkl': dict(name='', label_dim=3)}.items():
        save_snapshot(path / name, small('edm2'), encoder=RGBEncoder(), dataset=dataset, recipe={}, nimg=1000)
    write_digits(path / 'photos.zip', count=60)
    return path


def written(folder, out, *options) -> np.ndarray:
    """What generate_images.py writes, uint8 [N,C,H,W]."""
    invoke('generate_images.py', f'--net={folder / "net.pkl"}', f'--outdir={out}', '--seeds=5-8', *options)
    return np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted(out.glob('*.png'))])


@pytest.mark.parametrize('options, same', [
    ((), dict(num_steps=None)),
    (('--class=owls', '--steps=3'), dict(cls='owls', num_steps=3)),
    (('--class=9', '--sampler=ddim', '--steps=3', '--eta=0.5'), dict(cls=[9, 'newts', '9', 'Newts'], sampler='ddim', num_steps=3,
                                                                     eta=0.5)),
    (('--gnet=SMALL', '--guidance=2', '--steps=2', '--solver=euler'), dict(guidance=2, num_steps=2, solver='euler')),
])
def test_images_are_those_of_the_command_line(folder, tmp_path, options, same):
    net = load(folder / 'net.pkl', guide=folder / 'small.pkl' if 'guidance' in same else None)
    images = net.sample(4, seed=5, batch=3, **same)
    assert type(images) is diffusion_data.Images and images.dtype == torch.uint8
    options = [option.replace('SMALL', str(folder / 'small.pkl')) for option in options]
    np.testing.assert_array_equal(images.numpy(), written(folder, tmp_path / 'out', *options))


def test_a_model_keeps_its_guidance(folder):
    guided = load(folder / 'net.pkl', guide=folder / 'small.pkl', guidance=3, guidance_interval=(0.1, 20))
    options = dict(seed=1, num_steps=2)
    assert guided.guidance == 3 and guided.classes == ['cats', 'owls', 'newts']
    again = guided.sample(2, guidance=3, guidance_interval=(0.1, 20), **options)
    assert torch.equal(guided.sample(2, **options), again)
    assert torch.equal(guided.sample(2, guidance=1, **options), sample(folder / 'net.pkl', 2, **options))


def test_metrics_are_those_of_the_command_line(folder, tmp_path):
    dest = tmp_path / 'results.json'
    out = tmp_path / 'out'
    images = written(folder, out, '--steps=2')
    invoke('calculate_metrics.py', 'calc', f'--images={out}', f'--ref={folder / "photos.zip"}', '--metrics=fd_pixels', f'--dest={dest}')
    wanted = json.loads(dest.read_text())['results']['fd_pixels']
    with pytest.warns(UserWarning, match='[46]0? images for 192 dimensions'):
        assert frechet(out, folder / 'photos.zip', 'pixels') == wanted
        assert frechet(torch.from_numpy(images), folder / 'photos.zip', detector='pixels') == wanted
    dest = tmp_path / 'copies.json'
    invoke('calculate_metrics.py', 'memorization', f'--net={folder / "net.pkl"}', f'--data={folder / "photos.zip"}', '--num=4', '--seed=5',
           '--steps=2', f'--dest={dest}')
    wanted = json.loads(dest.read_text())
    for copies in (memorized(folder / 'net.pkl', folder / 'photos.zip', 4, seed=5, num_steps=2),
                   memorized(torch.from_numpy(images), folder / 'photos.zip')):
        assert copies.results()['mean_distance'] == wanted['results']['mean_distance']
        assert copies.indices.tolist() == wanted['samples']['indices'] and not copies.memorized.any()


# Call of (module, folder of files, network) -> what its one exception says.
MISTAKES = [
    (lambda d, path, net: net.sample(4, cls='dogs'), "class 'dogs' is not in the data set pets, which has: 7 (cats), 8 (owls)"),
    (lambda d, path, net: net.sample(4, cls=['cats']), 'cls: has 1 classes for 4 images'),
    (lambda d, path, net: net.sample(0), 'count=0 is no whole number from 1 on'),
    (lambda d, path, net: net.sample(2.5), 'count=2.5 is no whole number'),
    (lambda d, path, net: net.sample(4, seed=-1), 'seed=-1 is no whole number from 0 on'),
    (lambda d, path, net: net.sample(seeds=[]), 'seeds: are none'),
    (lambda d, path, net: net.sample(4, guidance=2), 'guidance=2.0 needs a guiding network'),
    (lambda d, path, net: net.sample(4, sampler='heun'), 'sampler=heun is no sampler; one of: edm'),
    (lambda d, path, net: net.sample(4, num_step=3), 'num_step=3 is no option of the sampler edm2'),
    (lambda d, path, net: net.sample(4, seed=0)[0].grid(), 'a picture is made of uint8 [N,C,H,W]'),
    (lambda d, path, net: d.load('nowhere.pkl'), 'nowhere.pkl: no such file'),
    (lambda d, path, net: d.load(path / 'photos.zip'), 'photos.zip holds no network; it is: '),
    (lambda d, path, net: d.load(path / 'net.pkl', guide=path / 'other.pkl', guidance=2), 'other.pkl has other classes than the network that it guides'),
    (lambda d, path, net: d.load(), 'net: give a network, or a preset'),
    (lambda d, path, net: d.frechet('nowhere', path / 'photos.zip', 'pixels'), 'nowhere: no such file'),
    (lambda d, path, net: d.frechet(path, path, 'vgg'), 'detector=vgg is none of inception, dinov2,'),
    (lambda d, path, net: d.frechet(path, path, 'pixels', protocol='x'), 'protocol=x is none of edm, adm, cbdm'),
    (lambda d, path, net: d.frechet(torch.zeros(2, 3), path), 'images: are torch.float32 [2, 3] instead of'),
    (lambda d, path, net: d.memorized(net, path / 'none.zip'), 'none.zip'),
    (lambda d, path, net: d.memorized(torch.zeros(2, 3, 4, 4).byte(), path / 'photos.zip'), 'give the training set'),
]


@pytest.mark.parametrize('call, message', MISTAKES, ids=lambda value: value if isinstance(value, str) else '')
def test_mistakes_are_one_exception(folder, call, message):
    if 'guide' in message:
        as_pickle(folder / 'other.pkl', build_network('Precond', **SMALL['edm2'][1] | dict(label_dim=5)))
    with pytest.raises(UserError) as error, warnings.catch_warnings():
        warnings.simplefilter('error')
        call(diffusion_data, folder, load(folder / 'net.pkl'))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_everything_public_has_types():
    assert (ROOT / 'diffusion_data' / 'py.typed').is_file()
    methods = [getattr(diffusion_data.Model, name) for name in ('sample', 'grid')] + [diffusion_data.Images.grid]
    for function in [*methods, *(getattr(diffusion_data, name) for name in ('load', 'sample', 'frechet', 'memorized'))]:
        hints = typing.get_type_hints(function)
        names = function.__wrapped__.__code__ if hasattr(function, '__wrapped__') else function.__code__
        count = names.co_argcount + names.co_kwonlyargcount + bool(names.co_flags & 8)
        assert set(names.co_varnames[:count]) - {'self'} | {'return'} == set(hints), function


def test_the_page_runs_from_its_text(folder, tmp_path, monkeypatch):
    for name in ('net.pkl', 'small.pkl', 'photos.zip'):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    cells = re.findall(r'^```python\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for cell in cells:
            exec(compile(cell, 'docs/library.md', 'exec'), names)
    assert len(cells) >= 5 and Image.open(tmp_path / 'cats.png').size[0] > 200
    assert set(diffusion_data.__all__) >= {'load', 'sample', 'frechet', 'memorized'} <= names.keys()


# --- Installed --------------------------------------------------------------------------------------------------------


def test_without_torch_it_says_so():
    script = 'import sys; sys.modules["torch"] = None; import diffusion_data'
    result = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert 'diffusion_data needs torch 2.11 or later and leaves its build to you: pip install torch' in result.stderr


def test_every_package_is_installed():
    listed = re.findall(r'"diffusion_data\.([\w.]+)",', (ROOT / 'pyproject.toml').read_text().partition('package-dir')[0])
    rooms = ('dnnlib', 'torch_utils', 'metrics', 'training')
    there = ['.'.join(path.parent.relative_to(ROOT).parts) for room in rooms for path in (ROOT / room).rglob('__init__.py')]
    assert sorted(listed) == sorted(there)


BESIDE_EDM = """
import site, sys
site.addsitedir(sys.argv[1])
import training, dnnlib.util                                       # EDM's
from diffusion_data import UserError, load
images = load(sys.argv[2]).sample(2, cls='cats', num_steps=2)
assert images.shape == (2, 3, 8, 8)
try:
    load('nowhere.pkl')
except UserError as error:
    assert 'no such file' in str(error)
files = {str(getattr(module, '__file__', '')) for name, module in sys.modules.items() if name.startswith('diffusion_data.training')}
assert training.edm and dnnlib.util.edm and all(sys.argv[3] in name for name in files), files
assert not {'metrics', 'torch_utils'} & sys.modules.keys()
"""


@pytest.mark.slow
@pytest.mark.parametrize('editable', [False, True], ids=['wheel', 'editable'])
def test_an_installation_meets_no_other_project(folder, tmp_path, editable):
    """Installed from a copy of the files, it runs in a checkout of EDM, whose packages have the same names."""
    pytest.importorskip('setuptools')
    pytest.importorskip('pip')
    source, site, edm = (tmp_path / name for name in ('source', 'site', 'edm'))
    source.mkdir()
    for name in ('diffusion_data', 'dnnlib', 'torch_utils', 'training', 'metrics'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
        (edm / name).mkdir(parents=True)
    (edm / 'diffusion_data').rmdir()
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for name in ('training/__init__.py', 'dnnlib/__init__.py', 'dnnlib/util.py'):
        (edm / name).write_text('edm = True\n')
    where = ['--prefix', site, '-e', source] if editable else ['--target', site, source]
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--no-index',
                    '--disable-pip-version-check', *where], check=True)
    if editable:
        place, home = next(site.glob('lib/*/site-packages')), 'source'
    else:
        place, home = site, 'site'
        shutil.rmtree(source)
        names = {name.partition('-')[0] for name in os.listdir(site)}
        assert names == {'diffusion_data'}
    (tmp_path / 'run.py').write_text(BESIDE_EDM)
    script = ['-c', f'import sys; sys.path.insert(0, {str(edm)!r}); exec(open("../run.py").read())']
    subprocess.run([sys.executable, *script, place, folder / 'net.pkl', f'/{home}/'], check=True, cwd=edm,
                   env=environment(PYTHONPATH=''))
