"""Autoencoders and DINOv2: all weights come from the files, sizes are checked first, the hub is asked for known commits."""

import json
import math
import os
import re
import resource
import shutil
import struct

import huggingface_hub
import pytest
import safetensors.torch
import tiny
import torch

import training.encoders
from dnnlib import UserError
from metrics.detectors import DINOv2
from torch_utils.files import models
from torch_utils.files.identify import identify
from training.encoders import StabilityVAEEncoder, load_vae, make_encoder
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot

VAE_FILE, DINO_FILE = 'diffusion_pytorch_model.safetensors', 'model.safetensors'
KINDS = {'vae': (load_vae, VAE_FILE), 'dino': (lambda path: DINOv2(path).net, DINO_FILE)}


@pytest.fixture(scope='module')
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    tiny.save_tiny_vae(folder / 'vae')
    tiny.save_tiny_dinov2(folder / 'dino')
    return folder


@pytest.fixture(params=KINDS)
def model(request, honest, tmp_path):
    """(load, folder, name of the weights) of a copy that can be spoilt."""
    folder = shutil.copytree(honest / request.param, tmp_path / f'my-{request.param}')
    return (*KINDS[request.param], folder)


def one_line(error) -> str:
    assert '\n' not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


def refused(load, folder) -> str:
    """The line, the same of two loads, that names the folder."""
    lines = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            load(str(folder))
        lines.append(one_line(error))
    assert lines[0][:100] == lines[1][:100] and str(folder) in lines[0]
    return lines[0]


def change(path, function):
    """Passes the weights of a file through a function."""
    state = function(safetensors.torch.load_file(path))
    safetensors.torch.save_file(state, path)


def configure(folder, **values):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _first(state):
    return sorted(state)[0]


WRONG_WEIGHTS = {
    'of none': (lambda state: {}, 'no weights'),
    'without a layer': (lambda state: {k: v for k, v in state.items() if '.layer.1.' not in k and '.up_blocks.1.' not in k},
                        'lacks (encoder|decoder)'),
    'without one': (lambda state: {k: v for k, v in state.items() if k != _first(state)}, 'lacks'),
    'with another one': (lambda state: state | {'other.weight': torch.zeros(2)}, 'has unknown other.weight'),
    'of another shape': (lambda state: state | {_first(state): torch.zeros(3, 2)}, 'another shape'),
    'that are NaN': (lambda state: state | {_first(state): state[_first(state)] * math.nan}, 'not finite'),
    'that are infinite': (lambda state: state | {_first(state): state[_first(state)] + math.inf}, 'not finite'),
    'of whole numbers': (lambda state: state | {_first(state): state[_first(state)].int()}, 'int32'),
}


@pytest.mark.parametrize('case', WRONG_WEIGHTS)
def test_weights_that_are_not_those_of_the_network(model, case):
    load, file, folder = model
    function, message = WRONG_WEIGHTS[case]
    change(folder / file, function)
    line = refused(load, folder)
    assert re.search(message, line), line


def safetensors_of(header, size=64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + bytes(size)


def one(**values):
    return {'x': dict(dtype='F32', shape=[4, 4], data_offsets=[0, 64]) | values}


WRONG_FILES = {
    'empty': b'', 'cut': b'\1\2\3', 'long header': struct.pack('<Q', 1 << 60) + b'{}',
    'longer than the file': struct.pack('<Q', 1 << 20) + b'{}', 'large header': safetensors_of(b' ' * (5 << 20)),
    'nested header': safetensors_of(b'[' * 100000), 'of no type': safetensors_of(one(dtype='F33')),
    'negative': safetensors_of(one(data_offsets=[-64, 0])), 'beyond': safetensors_of(one(data_offsets=[0, 1 << 50])),
    'backward': safetensors_of(one(data_offsets=[64, 0])), 'huge shape': safetensors_of(one(shape=[1 << 40, 1 << 40])),
    'overlapping': safetensors_of(one() | {'y': one()['x']}), 'web page': b'<html>',
    'many empty ones': safetensors_of({f'{i}': one(shape=[0, 1 << 60], data_offsets=[0, 0])['x'] for i in range(30000)}, 0),
}


@pytest.mark.parametrize('case', WRONG_FILES)
def test_files_of_weights_that_are_damaged_or_hostile(model, case):
    load, file, folder = model
    (folder / file).write_bytes(WRONG_FILES[case])
    refused(load, folder)


WRONG_CONFIGS = [
    ('vae', dict(block_out_channels=[10**6] * 4), 'block_out_channels'), ('vae', dict(block_out_channels='8'), 'block_out'),
    ('vae', dict(block_out_channels=[[8]] * 4), 'block_out_channels'), ('vae', dict(block_out_channels=[8] * 10**5), 'block'),
    ('vae', dict(block_out_channels=[8, 8, 16, -16]), 'block_out_channels'), ('vae', dict(layers_per_block=10**9), 'layers_per'),
    ('vae', dict(norm_num_groups=0), 'norm_num_groups'), ('vae', dict(norm_num_groups=3), 'num_groups'),
    ('vae', dict(down_block_types=['../x'] * 4), 'down_block_types'), ('vae', dict(act_fn='__import__'), 'act_fn'),
    ('vae', dict(in_channels=10**9), 'in_channels'), ('vae', dict(use_quant_conv='no'), 'use_quant_conv'),
    ('vae', dict(latent_channels=math.nan), 'latent_channels'), ('vae', dict(latent_channels=True), 'latent_channels'),
    ('vae', dict(block_out_channels=[8192] * 4, layers_per_block=32), 'norm_num_groups|lacks'),
    ('dino', dict(hidden_size=20000), 'hidden_size'), ('dino', dict(hidden_size=-16), 'hidden_size'),
    ('dino', dict(hidden_size=1e9), 'hidden_size'), ('dino', dict(hidden_size='16'), 'hidden_size'),
    ('dino', dict(hidden_size=16384, num_hidden_layers=200), 'lack'), ('dino', dict(num_attention_heads=3), 'num_attention_heads'),
    ('dino', dict(num_hidden_layers=10**9), 'num_hidden_layers'), ('dino', dict(num_hidden_layers=0), 'num_hidden_layers'),
    ('dino', dict(num_attention_heads=0), 'num_attention_heads'), ('dino', dict(mlp_ratio=10**12), 'mlp_ratio'),
    ('dino', dict(image_size=[224, 224]), 'image_size'), ('dino', dict(image_size=10**8), 'image_size'),
    ('dino', dict(image_size=4088), 'another shape|lack'), ('dino', dict(patch_size=0), 'patch_size'),
    ('dino', dict(layer_norm_eps=math.nan), 'layer_norm_eps'), ('dino', dict(num_channels=4), 'num_channels'),
    ('dino', dict(hidden_act='evil'), 'hidden_act'), ('dino', dict(qkv_bias=None), 'qkv_bias'),
    ('dino', dict(use_swiglu_ffn=True), 'lacks'), ('dino', dict(num_hidden_layers=3), 'lacks encoder.layer.2'),
]


@pytest.mark.parametrize('kind, values, message', WRONG_CONFIGS)
def test_sizes_that_make_no_sense(honest, tmp_path, kind, values, message):
    load = KINDS[kind][0]
    folder = shutil.copytree(honest / kind, tmp_path / kind)
    load(str(folder))
    configure(folder, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refused(load, folder)
    assert re.search(message, line), line
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize('text', ['', '[]', '{', '[' * 100000, '{"hidden_size": ' + '9' * 5000 + '}', ' ' * (5 << 20)])
def test_configurations_that_are_none(model, text):
    load, _, folder = model
    (folder / 'config.json').write_text(text)
    assert 'config.json' in refused(load, folder)


def test_files_that_are_missing_or_pipes(model):
    load, file, folder = model
    for name in (file, 'config.json'):
        os.remove(folder / name)
        assert f'no {name}' in refused(load, folder)
        os.mkfifo(folder / name)
        assert f'no {name}' in refused(load, folder)


def test_weights_of_torch_say_how_they_are_converted(model, monkeypatch):
    """The command of the line, run in the folder, makes what is loaded then."""
    load, file, folder = model
    expected = load(str(folder)).state_dict()
    old = file.replace('.safetensors', '.bin') if file == VAE_FILE else 'pytorch_model.bin'
    torch.save(safetensors.torch.load_file(folder / file), folder / old)
    os.remove(folder / file)
    line = refused(load, folder)
    code = line.partition('python -c "')[2].partition('"')[0]
    monkeypatch.chdir(folder)
    exec(code)
    assert all(torch.equal(value, expected[name]) for name, value in load(str(folder)).state_dict().items())


# --- What is published ---------------------------------------------------------------------------


def test_weights_in_several_files(model):
    load, file, folder = model
    expected = load(str(folder)).state_dict()
    state = safetensors.torch.load_file(folder / file)
    names = sorted(state)
    parts = {'part-1.safetensors': names[:5], 'part-2.safetensors': names[5:]}
    for part, keys in parts.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, folder / part)
    os.remove(folder / file)
    index = folder / f'{file}.index.json'
    index.write_text(json.dumps({'weight_map': {key: part for part, keys in parts.items() for key in keys}}))
    assert all(torch.equal(value, expected[name]) for name, value in load(str(folder)).state_dict().items())
    for table in ({'a': '../my-other/x.safetensors'}, {'a': '/etc/passwd'}, {'a': 'x.bin'}, {'a': ['part-1.safetensors']}, [], {},
                  {str(i): f'{i}.safetensors' for i in range(50000)}, {'a': 'part-3.safetensors'}):
        index.write_text(json.dumps({'weight_map': table}))
        assert 'index.json' in (line := refused(load, folder)) or 'no part-3' in line
    safetensors.torch.save_file(state, folder / 'part-1.safetensors')
    index.write_text(json.dumps({'weight_map': {'a': 'part-1.safetensors', 'b': 'part-2.safetensors'}}))
    assert 'twice' in refused(load, folder)


def test_autoencoders_of_2022_call_attention_otherwise(honest, tmp_path):
    folder = shutil.copytree(honest / 'vae', tmp_path / 'vae')
    old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}

    def rename(name):
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    change(folder / VAE_FILE, lambda state: {rename(name): value for name, value in state.items()})
    assert 'decoder.mid_block.attentions.0.proj_attn.bias' in safetensors.torch.load_file(folder / VAE_FILE)
    found, expected = (load_vae(str(path)).state_dict() for path in (folder, honest / 'vae'))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_dinov2_without_mask_token_and_with_a_classifier(honest, tmp_path):
    expected = DINOv2(str(honest / 'dino'))
    for name, function in (
            ('bare', lambda state: {k: v for k, v in state.items() if k != 'embeddings.mask_token'}),
            ('classifier', lambda state: {f'dinov2.{k}': v for k, v in state.items()} | {'classifier.weight': torch.ones(2)}),
            ('half', lambda state: {k: v.double() for k, v in state.items()})):
        folder = shutil.copytree(honest / 'dino', tmp_path / name)
        change(folder / DINO_FILE, function)
        found = DINOv2(str(folder))
        images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        assert torch.equal(found(images)['features'], expected(images)['features'])
        assert (found.fingerprint == expected.fingerprint) == (name != 'bare')


def test_a_configuration_cannot_choose_code(honest, tmp_path):
    folder = shutil.copytree(honest / 'dino', tmp_path / 'dino')
    configure(folder, _attn_implementation='evil/kernel', attn_implementation='evil/kernel', use_kernels=True,
              auto_map={'AutoModel': 'evil.Model'}, quantization_config={'quant_method': 'evil'})
    (folder / 'adapter_config.json').write_text('{"base_model_name_or_path": "evil/model"}')
    assert DINOv2(str(folder)).net.config._attn_implementation == 'sdpa'


@pytest.fixture
def hub(honest, monkeypatch):
    """A hub that holds the two models under every name; its requests."""
    asked = []

    def download(repo, file, *, revision, **_):
        asked.append((repo, file, revision))
        path = honest / ('dino' if 'dino' in repo else 'vae') / file
        if not path.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError('none')
        return str(path)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    return asked


@pytest.mark.parametrize('name, revision', [
    *models.REVISIONS.items(), ('facebook/dinov2-large@abc', 'abc'), ('some/dino', 'main'), ('some/vae@v1.0', 'v1.0')])
def test_the_hub_is_asked_for_safetensors_of_a_known_commit(hub, name, revision):
    load, file = KINDS['dino' if 'dino' in name else 'vae']
    load(name)
    assert hub == [(name.partition('@')[0], asked, revision) for asked in ('config.json', file)]


@pytest.mark.parametrize('name', ['../x', 'x', 'x/y/z', './x/y', '~/x', 'a/b@', 'a/b@../c', 'a\0/b', 'https://a/b'])
def test_names_that_are_none_of_the_hub(hub, name):
    for load, _ in KINDS.values():
        with pytest.raises(UserError, match='no such folder') as error:
            load(name)
        one_line(error)
    assert not hub


# --- Who names the autoencoder -------------------------------------------------------------------


def snapshot_naming(path, vae_name):
    net = build_network('EDMPrecond', img_resolution=8, img_channels=4, label_dim=0, model_channels=8,
                        channel_mult=[1], num_blocks=1, attn_resolutions=[])
    save_snapshot(str(path), net, encoder=StabilityVAEEncoder(vae_name), dataset={}, recipe={})
    return load_snapshot(str(path)).encoder


def test_a_snapshot_names_no_autoencoder_of_its_choice(hub, honest, tmp_path, monkeypatch):
    local = str(honest / 'vae')
    for name in ('evil/vae', local, f'{training.encoders.DEFAULT_VAE}@refs/pr/1', '/', 'x', '..'):
        encoder = snapshot_naming(tmp_path / 'net.pkl', name)
        with pytest.raises(UserError, match='named by the snapshot') as error:
            encoder.prepare('cpu')
        one_line(error)
    assert not hub
    make_encoder(snapshot_naming(tmp_path / 'net.pkl', 'evil/vae').config(), local).prepare('cpu')
    for name in training.encoders.PUBLISHED:
        snapshot_naming(tmp_path / 'net.pkl', name).prepare('cpu')
    assert {revision for _, _, revision in hub} <= set(models.REVISIONS.values())
    monkeypatch.setenv('SD_VAE', local + '/')
    for name in ('evil/vae', '/home/somebody/vae'):     # the user's folder of that name
        snapshot_naming(tmp_path / 'net.pkl', name).prepare('cpu')
    with pytest.raises(UserError, match='named by'):
        snapshot_naming(tmp_path / 'net.pkl', 'evil/other').prepare('cpu')


def test_a_data_set_names_published_autoencoders_and_folders(hub, honest):
    make_encoder({'name': 'sd-vae', 'vae_name': str(honest / 'vae')}).prepare('cpu')
    with pytest.raises(UserError, match='named by the data'):
        make_encoder({'name': 'sd-vae', 'vae_name': 'evil/vae'}).prepare('cpu')
    for name in (5, ['x'], None):
        with pytest.raises(UserError, match='does not take'):
            make_encoder({'name': 'sd-vae', 'vae_name': name})


def test_autoencoders_of_other_latents(honest, tmp_path):
    for name, values in (('three', dict(block_out_channels=[8, 8, 16], down_block_types=['DownEncoderBlock2D'] * 3,
                                        up_block_types=['UpDecoderBlock2D'] * 3)), ('16', dict(latent_channels=16))):
        folder = tiny.save_tiny_vae(tmp_path / name, **values)
        with pytest.raises(UserError, match='no latents of 4 channels') as error:
            StabilityVAEEncoder(folder).prepare('cpu')
        one_line(error)


def test_weights_that_are_not_finite_can_be_allowed(honest, tmp_path):
    folder = shutil.copytree(honest / 'vae', tmp_path / 'vae')
    change(folder / VAE_FILE, WRONG_WEIGHTS['that are NaN'][0])
    encoder = StabilityVAEEncoder(str(folder))
    with pytest.raises(UserError, match='allow_nonfinite'):
        encoder.prepare('cpu')
    encoder.allow_nonfinite = True
    encoder.prepare('cpu')
    assert identify(str(folder / VAE_FILE)).state
