"""Exported folders in diffusers, in a process that does not have this project: the same images, by our samplers and by theirs."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, fails, invoke
from test_snapshot_tool import SETTINGS, SMALL, small, write_source
from tiny import save_tiny_vae

from training.bundle import bundle
from training.encoders import RGBEncoder, StabilityVAEEncoder
from training.generate import open_generator
from training.networks import NETWORKS, build_network
from training.snapshot import load_snapshot, save_snapshot

PETS = dict(name='pets', label_dim=3, classes=[7, 8, 9], class_names=['cats', 'owls', 'newts'], size=60)


def convert(source, dest, *options):
    return invoke('snapshot_tool.py', 'convert', source, f'--dest={dest}', *options)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Folders of all families, of latents and of a guided network, and what diffusers made of them; {name: how we open it}."""
    path = tmp_path_factory.mktemp('diffusers')
    opened = {}
    for kind in SMALL:
        source = path / f'{kind}.bin'
        write_source(kind, source)
        if kind == 'edm2':
            save_snapshot(source, small(kind), encoder=RGBEncoder(), dataset=PETS, recipe=dict(lr=0.1, data=str(ROOT / 'pets.zip')),
                          nimg=7000, dtype=torch.float32)
        convert(source, path / kind, *[one.replace('100', '20') for one in SETTINGS.get(kind, [])])
        opened[kind] = dict(net=str(path / kind))
    vae = save_tiny_vae(path / 'tiny-vae')
    torch.manual_seed(0)
    net = build_network('Precond', **SMALL['edm2'][1] | dict(img_channels=4))
    save_snapshot(path / 'latents.bin', net.eval(), encoder=StabilityVAEEncoder(), dataset={'name': 'x', 'label_dim': 3}, recipe={},
                  dtype=torch.float32)
    convert(path / 'latents.bin', path / 'latents', f'--model-url={vae}')
    opened['latents'] = dict(net=str(path / 'latents'), model_url=vae)
    guiding = ['--guidance=2.5', '--guidance-interval=0.1,20']
    convert(path / 'edm2.bin', path / 'guided', f'--gnet={path / "edm.bin"}', *guiding)
    opened['guided'] = dict(net=str(path / 'edm2'), gnet=str(path / 'edm'), guidance=2.5, guidance_interval=(0.1, 20))
    shutil.copytree(path / 'edm2', path / 'pets')
    page = (ROOT / 'docs' / 'diffusers.md').read_text()
    (path / 'page.py').write_text('\n'.join(re.findall(r'^```python\n(.*?)^```', page, re.MULTILINE | re.DOTALL)))
    result = subprocess.run([sys.executable, ROOT / 'tests' / 'diffusers_checks.py', path, ','.join(opened)], cwd=path, text=True,
                            capture_output=True, env=environment(HF_HOME=str(path / 'hf'), PYTHONPATH='', PYTHONSAFEPATH='1'))
    assert result.returncode == 0, result.stderr[-3000:]
    return path, opened


@pytest.mark.slow
def test_their_images_are_ours(folder):
    path, opened = folder
    with np.load(path / 'images.npz') as images:
        for name, options in opened.items():
            (batch,) = open_generator(**options, sampler=dict(num_steps=3)).images(range(3))
            assert np.array_equal(images[name].reshape(batch.images.permute(0, 2, 3, 1).shape), batch.images.permute(0, 2, 3, 1)), name
        (batch,) = open_generator(str(path / 'saved-scheduler'), sampler=dict(num_steps=3)).images(range(3), labels=[1, 0, 2])
        assert np.array_equal(images['classes'], batch.images.permute(0, 2, 3, 1))


@pytest.mark.slow
def test_schedulers_of_diffusers_lead_to_our_images(folder):
    """Relative errors: rounding where it is the same mathematics, and small with many steps where only the limit is the same."""
    errors = json.loads((folder[0] / 'errors.json').read_text())
    print(json.dumps(errors, indent=1))
    assert len([name for name in errors if not name.startswith('near')]) == 15
    for name, error in errors.items():
        assert error < (0.1 if name.startswith('near') else 1e-4), (name, error)


def test_each_network_is_one_file_of_readable_code(folder):
    """No names that are not defined, no import that is not used, and none of this project."""
    files = [*folder[0].glob('*/*/*_????????.py'), folder[0] / 'edm' / 'pipeline.py']
    assert len(files) >= 6
    for file in files:
        text = file.read_text()
        assert not any(f'{word} {room}' in text for word in ('import', 'from') for room in ('training', 'dnnlib', 'torch_utils'))
    ruff = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select=F', '--line-length=100', *files]
    result = subprocess.run(ruff, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    for name, module in NETWORKS.items() - {('WideResNet', 'classifier')}:
        assert f'class {name}(' in bundle('training.diffusers_code.network', [(f'training.networks.{module}', name)])


def test_the_card_says_what_it_is(folder, tmp_path):
    path, _ = folder
    results = tmp_path / 'fid.json'
    results.write_text(json.dumps(dict(results=dict(fid=3.25, is_std=0.5), num_images=50000, ref=str(tmp_path / 'pets.npz'))))
    convert(path / 'edm2.bin', tmp_path / 'card', '--license=mit', f'--results={results}')
    _, front, text = (tmp_path / 'card' / 'README.md').read_text().split('---\n')
    omegaconf = pytest.importorskip('omegaconf')
    card = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(front))
    assert card['license'] == 'mit' and card['library_name'] == 'diffusers'
    assert card['pipeline_tag'] == 'unconditional-image-generation' and card['datasets'] == ['pets']
    assert card['classes'] == ['cats', 'owls', 'newts'] and card['data']['size'] == 60 and card['trained']['images'] == 7000
    assert card['recipe'] == {'lr': 0.1, 'data': 'pets.zip'} and card['metrics'] == ['fid', 'is_std']
    first = card['model-index'][0]['results'][0]
    assert first['metrics'][0]['value'] == 3.25 and first['dataset']['name'] == 'pets.npz'
    assert 'cats, owls, newts' in text and 'fid 3.25 of 50000 images against pets.npz' in text
    files = [file for file in (tmp_path / 'card').rglob('*') if file.is_file()]
    assert not any(str(tmp_path).encode() in file.read_bytes() or str(ROOT).encode() in file.read_bytes() for file in files)


@pytest.mark.parametrize('options, message', [
    (['--guidance=2'], 'guidance=2.0 needs a guiding network'),
    (['--gnet=GNET', '--guidance=2', '--guidance-interval=2,1'], '--guidance-interval=2,1 needs LO < HI'),
    (['--gnet=OTHER', '--guidance=2'], 'makes images of another shape than the network that it guides'),
    (['--results=edm2.bin'], '--results='),
])
def test_what_does_not_fit_is_refused(folder, options, message, tmp_path):
    path, _ = folder
    options = [option.replace('GNET', str(path / 'edm.bin')).replace('OTHER', str(path / 'latents.bin')).replace(
        'edm2.bin', str(path / 'edm2.bin')) for option in options]
    assert message in fails('snapshot_tool.py', 'convert', path / 'edm2.bin', f'--dest={tmp_path / "x"}', *options)
    assert '--gnet=' in fails('snapshot_tool.py', 'convert', path / 'edm2.bin', f'--dest={tmp_path / "x.pkl"}',
                              f'--gnet={path / "edm.bin"}')
    assert load_snapshot(str(path / 'saved-guided')).dataset['name'] == 'pets'
