"""Pixels to latents and back: the golden numbers, an autoencoder of the real layout, and dataset_tool.py encode|decode."""

import os
import socket
import subprocess
import types

import golden_cases
import numpy as np
import pytest
import tiny
import torch
import torch.multiprocessing
from golden_cases import cases, ids
from helpers import ROOT, fails, invoke, write_digits

from dnnlib import UserError
from dnnlib.image_io import as_rgb, encode_png
from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator
from training.data import latents
from training.data.archive import ArchiveReader
from training.data.dataset import ImageDataset
from training.data.imagenet import SIMILARITY_LEVELS, classes
from training.encoders import (
    RGBEncoder,
    SimpleVAEEncoder,
    StabilityVAEEncoder,
    encoder_for,
    make_encoder,
)


@pytest.fixture(scope='session')
def vae_folder(tmp_path_factory):
    return tiny.save_tiny_vae(tmp_path_factory.mktemp('vae'))


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """A data set of 13 enlarged digits, 16x16."""
    folder = tmp_path_factory.mktemp('pictures')
    invoke('dataset_tool.py', 'convert', '--source=digits', '--max-images=13', '--resolution=16x16',
           f'--dest={folder}/digits16.zip')
    return f'{folder}/digits16.zip'


class _ToyDecoder:
    """The golden cases' decoder: the first three channels times a number, plus another."""

    def __init__(self, words):
        self.scale = golden_cases.number_in(words, r'first three channels \* ')
        self.shift = golden_cases.number_in(words, r'first three channels \* [\d.]+ \+ ')

    def to(self, device):
        return self

    def decode(self, x):
        self.seen = x
        return types.SimpleNamespace(sample=x[:, :3] * self.scale + self.shift)


def _golden_encoder(case):
    keys = ('raw_mean', 'raw_std', 'final_mean', 'final_std')
    return StabilityVAEEncoder(**{key: case.json['arguments'][key] for key in keys}, batch_size=2)


@pytest.mark.parametrize('case', cases('math', 'latent_encoders*'), ids=ids)
def test_golden_whitening(case):
    encoder = _golden_encoder(case)
    scale, bias = encoder.whitening(torch.zeros(1))
    torch.testing.assert_close(scale.flatten(), case.tensor('scale'), rtol=1e-5, atol=0)
    torch.testing.assert_close(bias.flatten(), case.tensor('bias'), rtol=1e-5, atol=1e-7)
    noise = types.SimpleNamespace(randn_like=lambda x: case.tensor('noise'))
    torch.testing.assert_close(encoder.encode_latents(case.tensor('mean_std'), noise), case.tensor('latents'), rtol=1e-5,
                               atol=1e-6)
    toy = _ToyDecoder(case.json['inputs'])
    encoder._vae = toy
    np.testing.assert_array_equal(encoder.decode(case.tensor('latents')), case.arrays['decoded_toy'])
    torch.testing.assert_close(toy.seen, case.tensor('unwhitened')[-len(toy.seen):], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', cases('math', 'latent_encoders*'), ids=ids)
def test_golden_noise_is_one_draw_of_the_global_generator(case):
    torch.manual_seed(*golden_cases.seeds_in(case.json['inputs']))
    out = _golden_encoder(case).encode_latents(case.tensor('mean_std'))
    torch.testing.assert_close(out, case.tensor('latents'), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', cases('math', 'latent_encoders*'), ids=ids)
def test_golden_rgb(case):
    encoder = RGBEncoder()
    torch.testing.assert_close(encoder.encode_latents(case.tensor('rgb_roundtrip')), case.tensor('rgb_encode'))
    np.testing.assert_array_equal(encoder.decode(case.tensor('rgb_encode')), case.arrays['rgb_roundtrip'])
    np.testing.assert_array_equal(encoder.decode(case.tensor('rgb_decode_in')), case.arrays['rgb_decode_out'])


def test_rgb_round_trip_is_exact():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    assert (RGBEncoder().decode(RGBEncoder().encode_latents(pixels)) == pixels).all()
    assert RGBEncoder().latent_shape((3, 16, 16)) == (3, 16, 16)
    with pytest.raises(UserError, match='8 channels'):
        RGBEncoder().latent_shape((8, 4, 4))


def test_autoencoder_sees_pixels_between_0_and_1(vae_folder):
    encoder = StabilityVAEEncoder(vae_folder)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    raw = encoder.encode_pixels(pixels)
    assert raw.shape == (3, 8, 4, 4) and raw.dtype == torch.float32
    posterior = encoder.prepare('cpu').encode(pixels.float() / 255).latent_dist
    torch.testing.assert_close(raw, torch.cat([posterior.mean, posterior.std], dim=1), rtol=1e-4, atol=1e-5)
    latents_of = encoder.encode_latents(pixels, StackedRandomGenerator('cpu', [1, 2, 3]))
    noise = StackedRandomGenerator('cpu', [1, 2, 3]).randn([3, 4, 4, 4])
    scale, bias = encoder.whitening(raw)
    expected = (raw[:, :4] + raw[:, 4:] * noise) * scale + bias
    torch.testing.assert_close(latents_of, expected)
    decoded = encoder.decode(latents_of)
    assert decoded.shape == (3, 3, 32, 32) and decoded.dtype == torch.uint8


def test_simple_encoder_of_the_multi_source_project(vae_folder):
    encoder = make_encoder({'name': 'sd-vae-0.1825', 'vae_name': vae_folder})
    raw = torch.randn(2, 8, 4, 4).abs()
    noise = StackedRandomGenerator('cpu', [1, 2]).randn([2, 4, 4, 4])
    z = encoder.encode_latents(raw, StackedRandomGenerator('cpu', [1, 2]))
    torch.testing.assert_close(z, (raw[:, :4] + raw[:, 4:] * noise) * 0.1825)
    pixels = (encoder.prepare('cpu').decode(z / 0.1825).sample / 2 + 0.5).clamp(0, 1) * 255
    assert (encoder.decode(z).int() - pixels.to(torch.uint8).int()).abs().max() <= 1
    assert type(make_encoder(encoder.config())) is SimpleVAEEncoder


def test_one_image_decodes_as_it_does_among_others(vae_folder):
    encoder = StabilityVAEEncoder(vae_folder, batch_size=4)
    z = torch.randn(7, 4, 4, 4)
    whole = encoder.decode(z)
    for part in (z[:1], z[2:5], z[6:]):
        index = [int((z == one).flatten(1).all(1).nonzero()) for one in part]
        assert (encoder.decode(part) == whole[index]).all()


def test_configurations(vae_folder):
    for config in ({'name': 'rgb'}, {'name': 'sd-vae', 'vae_name': 'x/y', 'raw_mean': [0, 1, 2, 3], 'raw_std': [1, 1, 1, 2],
                                     'final_mean': 0.5, 'final_std': 1}):
        assert make_encoder(config).config() == config
    encoder = make_encoder({'name': 'sd-vae'})  # loads nothing
    assert encoder.latent_shape((8, 32, 32)) == (4, 32, 32) and encoder.latent_shape((3, 256, 256)) == (4, 32, 32)
    for config, message in (({'name': 'vq'}, 'vq is unknown'), ({'name': 'rgb', 'x': 1}, "'x': 1"), ({}, 'None is unknown'),
                            ({'name': ['rgb']}, 'is unknown'), ({'name': 'sd-vae', 'raw_mean': [0]}, 'does not take'),
                            ({'name': 'sd-vae', 'precision': 'fp8'}, 'does not take'),
                            ({'name': 'sd-vae', 'raw_std': [1, 0, 1, 1]}, 'make no sense'),
                            ({'name': 'sd-vae', 'final_mean': float('nan')}, 'make no sense'),
                            ({'name': 'sd-vae', 'final_std': 0}, 'make no sense'),
                            ({'name': 'sd-vae-0.1825', 'factor': float('inf')}, 'make no sense'),
                            ({'name': 'sd-vae', 'batch_size': 10**9}, '1 to 4096')):
        with pytest.raises(UserError, match=message):
            make_encoder(config)
    with pytest.raises(UserError, match='5 channels'):
        encoder.latent_shape((5, 4, 4))


def test_autoencoders_that_do_not_load(tmp_path):
    for name, message in ((str(tmp_path / 'nix'), 'no such folder'), (str(tmp_path), 'config.json')):
        with pytest.raises(UserError, match=message):
            StabilityVAEEncoder(name).decode(torch.zeros(1, 4, 1, 1))
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(UserError, match='cannot be loaded') as error:
        StabilityVAEEncoder(str(tmp_path)).decode(torch.zeros(1, 4, 1, 1))
    assert '\n' not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_autoencoder_on_a_gpu(vae_folder):
    cpu, gpu = StabilityVAEEncoder(vae_folder, batch_size=4), StabilityVAEEncoder(vae_folder, batch_size=4)
    half = StabilityVAEEncoder(vae_folder, batch_size=4, precision='fp16')
    pixels, z = torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8), torch.randn(7, 4, 4, 4)
    for encoder, tolerance in ((gpu, 2e-3), (half, 5e-2)):
        raw = encoder.encode_pixels(pixels.cuda())
        assert raw.is_cuda and raw.dtype == torch.float32
        torch.testing.assert_close(raw.cpu(), cpu.encode_pixels(pixels), rtol=tolerance, atol=tolerance)
        decoded = encoder.decode(z.cuda())
        assert (decoded.cpu().int() - cpu.decode(z).int()).abs().max() <= (2 if encoder is gpu else 8)
        assert (encoder.decode(z[5:6].cuda()) == decoded[5:6]).all()


# --- dataset_tool.py encode and decode


def test_encode_and_decode(pictures, vae_folder, tmp_path):
    dest = tmp_path / 'sd.zip'
    assert '13 images encoded' in invoke('dataset_tool.py', 'encode', f'--source={pictures}', f'--dest={dest}',
                                         f'--model-url={vae_folder}')
    pixels, stored = ImageDataset(pictures), ImageDataset(dest)
    assert stored.image_shape == (8, 2, 2) and ArchiveReader(dest).names[12] == '00000/img-mean-std-00000012.npy'
    assert stored.label_ids.tolist() == pixels.label_ids.tolist() and stored.class_names == pixels.class_names
    config = encoder_for(stored)
    assert config['name'] == 'sd-vae' and config['vae_name'] == vae_folder and encoder_for(pixels) == {'name': 'rgb'}
    encoder = make_encoder(config)
    expected = encoder.encode_pixels(torch.from_numpy(as_rgb(pixels.images(np.arange(13)))))
    np.testing.assert_array_equal(stored.images(np.arange(13)), expected)

    invoke('dataset_tool.py', 'decode', f'--source={dest}', f'--dest={tmp_path}/decoded.zip')
    decoded = ImageDataset(tmp_path / 'decoded.zip')
    assert decoded.image_shape == (3, 16, 16) and decoded.label_ids.tolist() == pixels.label_ids.tolist()
    assert encoder_for(decoded) == {'name': 'rgb'}
    direct = encoder.prepare('cpu').decode(expected[:, :4]).sample.clamp(0, 1) * 255
    assert np.abs(decoded.images(np.arange(13)).astype(int) - direct.to(torch.uint8).numpy()).max() <= 1


def test_the_first_images_are_encoded_and_decoded(pictures, vae_folder, tmp_path):
    for count, name in ((13, 'all'), (5, 'first')):
        invoke('dataset_tool.py', 'encode', f'--source={pictures}', f'--dest={tmp_path}/{name}', '--batch=4',
               f'--max-images={count}', f'--model-url={vae_folder}')
    everything, first = ImageDataset(tmp_path / 'all'), ImageDataset(tmp_path / 'first')
    np.testing.assert_array_equal(first.images(np.arange(len(first))), everything.images(np.arange(5)))
    assert first.label_ids.tolist() == everything.label_ids[:5].tolist() and len(everything) == 13
    assert '3 images decoded' in invoke('dataset_tool.py', 'decode', f'--source={tmp_path}/first', f'--dest={tmp_path}/out',
                                        '--max-images=3')
    assert ImageDataset(tmp_path / 'out').label_ids.tolist() == everything.label_ids[:3].tolist()
    assert '--max-images=0' in fails('dataset_tool.py', 'decode', f'--source={tmp_path}/first', f'--dest={tmp_path}/none',
                                     '--max-images=0')
    assert not (tmp_path / 'none').exists()


def test_default_autoencoder_can_be_set_outside(pictures, vae_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('SD_VAE', vae_folder)
    invoke('dataset_tool.py', 'encode', f'--source={pictures}', f'--dest={tmp_path}/sd')
    assert encoder_for(ImageDataset(tmp_path / 'sd'))['vae_name'] == vae_folder


def test_encode_does_not_depend_on_batches_or_threads(pictures, vae_folder, tmp_path):
    threads = torch.get_num_threads()
    for name, count, batch in (('a', 1, 16), ('b', 3, 16), ('c', 1, 5)):
        torch.set_num_threads(count)
        try:
            latents.encode(pictures, str(tmp_path / f'{name}.zip'), StabilityVAEEncoder(vae_folder), batch=batch)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes() == (tmp_path / 'c.zip').read_bytes()


def _encode_as_rank(rank, size, port, source, dest, vae_folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init()
    latents.encode(source, dest, StabilityVAEEncoder(vae_folder), batch=5)
    assert os.path.exists(dest)  # for every process: the next line of a script may read it
    dist.shutdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason='forks, which CUDA does not survive')
@pytest.mark.parametrize('size', [2, 4])
def test_encode_does_not_depend_on_processes(pictures, vae_folder, tmp_path, size):
    """Three batches: of two processes the first has two, of four the last has none."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    # Forked, as the imports of a fresh process take longer than everything else.
    torch.multiprocessing.start_processes(
        _encode_as_rank, (size, port, pictures, str(tmp_path / 'many.zip'), vae_folder), size, start_method='fork')
    latents.encode(pictures, str(tmp_path / 'one.zip'), StabilityVAEEncoder(vae_folder), batch=5)
    assert (tmp_path / 'one.zip').read_bytes() == (tmp_path / 'many.zip').read_bytes()


def test_what_cannot_be_encoded_or_decoded(pictures, vae_folder, tmp_path):
    small = write_digits(tmp_path / 'small.zip', 2)
    dest = tmp_path / 'x.zip'
    vae = f'--model-url={vae_folder}'
    assert '--dest' in fails('dataset_tool.py', 'encode', f'--source={pictures}', f'--dest={pictures}', vae)
    invoke('dataset_tool.py', 'encode', f'--source={small}', f'--dest={tmp_path}/sd.zip', vae)
    assert 'latents already' in fails('dataset_tool.py', 'encode', f'--source={tmp_path}/sd.zip', f'--dest={dest}', vae)
    assert not dest.exists()


@pytest.mark.slow
def test_convert_script_of_the_study(vae_folder, tmp_path):
    for index in SIMILARITY_LEVELS['sim2']:
        folder = tmp_path / 'imagenet' / classes()[index][0]
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f'{i}.png').write_bytes(encode_png(np.full((20, 24, 3), i, np.uint8)))
    variables = {'SOURCE': 'imagenet', 'PIXELS': 'pixels', 'LATENTS': 'latents', 'RESOLUTION': '16', 'NUMS': '2',
                 'SD_VAE': vae_folder, 'PYTHON': os.sys.executable, 'OMP_NUM_THREADS': '1'}
    variables |= {key: str(tmp_path / variables[key]) for key in ('SOURCE', 'PIXELS', 'LATENTS')}
    command = ['bash', str(ROOT / 'bash_files' / 'convert' / 'convert_5c.sh'), 'sim2']
    for _ in range(2):  # the second time there is nothing left to do
        subprocess.run(command, env=os.environ | variables, cwd=tmp_path, check=True)
    data = ImageDataset(tmp_path / 'latents' / 'inet-16-5c-2.zip')
    assert len(data) == 10 and data.classes == [171, 269, 279, 283, 294] and data.image_shape == (8, 2, 2)
    bad = subprocess.run([*command[:2], 'sim9'], env=os.environ | variables, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.count('\n') == 1 and 'sim9' in bad.stderr
