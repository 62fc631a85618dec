"""snapshot_tool.py: inspection, and conversions that make the same images."""

import errno
import json
import os
from pathlib import Path

import click.testing
import golden_cases
import numpy as np
import pytest
import torch
from helpers import fails, invoke, script_module
from PIL import Image
from test_foreign import as_pickle

from training import encoders
from training.flops import count_products
from training.generate import generate_images
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot

SMALL = {
    'edm2': ('Precond', dict(img_resolution=8, img_channels=3, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1,
                             attn_resolutions=[4], channels_per_head=8)),
    'edm': ('VPPrecond', dict(img_resolution=8, img_channels=3, label_dim=0, model_type='SongUNet', model_channels=8,
                              channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])),
    'adm': ('ADMUNet', dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,2', attention_resolutions='4',
                            num_heads=4, learn_sigma=True, class_cond=False)),
    'ddpm': ('DDPMUNet', dict(T=50, ch=64, ch_mult=[1], attn=[0], num_res_blocks=1, dropout=0.0, cond=True, augm=False,
                              num_class=3, img_resolution=8)),
}
SETTINGS = {'adm': ['--set', 'image_size=8', '--set', 'steps=100', '--set', 'num_head_channels=-1'],
            'ddpm': ['--set', 'img_resolution=8']}


def small(kind):
    torch.manual_seed(0)
    net = build_network(SMALL[kind][0], **SMALL[kind][1])
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.eval()


def write_source(kind, path):
    net = small(kind)
    if kind in ('edm2', 'edm'):
        as_pickle(path, net)
    else:
        state = net.state_dict()
        torch.save(state if kind == 'adm' else {'net_model': {}, 'ema_model': state, 'step': 1}, path)


@pytest.fixture(params=list(SMALL))
def source(request, tmp_path):
    """(kind, path) of a network in the layout in which networks of this kind are published."""
    path = tmp_path / 'published.bin'
    write_source(request.param, path)
    return request.param, str(path)


def sampled(snapshot):
    batches = generate_images(snapshot.net, snapshot.encoder, range(3), batch=3, num_steps=3)
    return torch.cat([batch.images for batch in batches])


@pytest.mark.slow
def test_all_forms_make_the_same_images(source, tmp_path):
    kind, path = source
    settings = SETTINGS.get(kind, [])
    tool = script_module('snapshot_tool.py').main
    wanted = sampled(load_snapshot(path, options=dict(map(script_module('snapshot_tool.py').parse_setting, settings[1::2]))))
    assert wanted.float().std() > 5
    for form in ('a.pkl', 'b.safetensors', 'folder'):
        dest = str(tmp_path / form)
        tool.main(['convert', path, f'--dest={dest}', *settings], standalone_mode=False)
        assert torch.equal(sampled(load_snapshot(dest)), wanted), form
        again = str(tmp_path / f'again-{form}.pkl')                  # and every form can be converted on
        tool.main(['convert', dest, f'--dest={again}'], standalone_mode=False)
        assert torch.equal(sampled(load_snapshot(again)), wanted), form
    again = [f'again-{form}.pkl' for form in ('a.pkl', 'b.safetensors', 'folder')]
    assert sorted(os.listdir(tmp_path)) == sorted(['published.bin', 'a.pkl', 'b.safetensors', 'b.json', 'folder', *again])


def test_the_command_line_samples_from_all_forms(tmp_path):
    as_pickle(tmp_path / 'net', small('edm2'))
    pictures = []
    for form in ('net', 'a.pkl', 'b.safetensors', 'folder'):
        net = tmp_path / form
        if form != 'net':
            script_module('snapshot_tool.py').main.main(
                ['convert', str(tmp_path / 'net'), f'--dest={net}'], standalone_mode=False)
        script_module('generate_images.py').main.main(
            [f'--net={net}', f'--outdir={tmp_path / ("out-" + form)}', '--seeds=5', '--steps=2'], standalone_mode=False)
        pictures.append(np.asarray(Image.open(tmp_path / f'out-{form}' / '000005.png')))
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_a_conversion_that_was_stopped_or_found_the_disk_full_is_made_again(tmp_path, monkeypatch):
    """Between its two files it goes on; what an earlier one wrote is not lost; a description of others is not touched."""
    as_pickle(tmp_path / 'net', small('edm2'))
    dest, text = tmp_path / 'x.safetensors', tmp_path / 'x.json'
    arguments = 'snapshot_tool.py', 'convert', tmp_path / 'net', f'--dest={dest}'
    invoke(*arguments)
    wanted = dest.read_bytes(), text.read_text()
    dest.unlink()
    invoke(*arguments)
    assert (dest.read_bytes(), text.read_text()) == wanted
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_text', lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
        assert 'No space left' in fails(*arguments, '--overwrite')
    assert (dest.read_bytes(), text.read_text()) == wanted
    dest.unlink()
    text.write_text('{"mine": 1}')
    assert 'x.json exists' in fails(*arguments) and text.read_text() == '{"mine": 1}'


def test_half_precision_and_overwriting(tmp_path):
    path, dest = str(tmp_path / 'x.pkl'), str(tmp_path / 'y.safetensors')
    net = small('edm')
    save_snapshot(path, net, encoder=encoders.RGBEncoder(), dataset={'name': 'd', 'label_dim': 0}, recipe={'lr': 0.1}, nimg=7,
                  ema_std=0.1, dtype=torch.float32)
    tool = script_module('snapshot_tool.py').main
    tool.main(['convert', path, f'--dest={dest}'], standalone_mode=False)
    large = os.path.getsize(dest)
    assert '--dest' in fails('snapshot_tool.py', 'convert', path, f'--dest={dest}') and os.path.getsize(dest) == large
    tool.main(['convert', path, f'--dest={dest}', '--overwrite', '--dtype=float16'], standalone_mode=False)
    assert os.path.getsize(dest) < 0.7 * large
    loaded = load_snapshot(dest)
    assert (loaded.nimg, loaded.ema_std, loaded.recipe, loaded.dataset['name']) == (7, 0.1, {'lr': 0.1}, 'd')
    for name, value in loaded.net.named_parameters():
        assert value.dtype == torch.float32 and torch.equal(value, net.state_dict()[name].half().float())
    with open(tmp_path / 'y.json') as file:
        assert json.load(file)['network']['class_name'] == 'VPPrecond'
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter').write_text('dear')
    assert 'no network' in fails('snapshot_tool.py', 'convert', path, f'--dest={tmp_path / "mine"}', '--overwrite')
    assert (tmp_path / 'mine' / 'letter').read_text() == 'dear'
    folder = ['snapshot_tool.py', 'convert', path, f'--dest={tmp_path / "folder"}', '--overwrite']
    invoke(*folder)
    (tmp_path / 'folder' / 'unet' / 'letter').write_text('dear')
    assert 'holds unet/letter, which is no part of a network' in fails(*folder)
    os.remove(tmp_path / 'folder' / 'unet' / 'letter')
    invoke(*folder)


def test_inspection(source, tmp_path):
    kind, path = source
    command = ['inspect', path, *SETTINGS.get(kind, [])]
    text = click.testing.CliRunner().invoke(script_module('snapshot_tool.py').main, command).stdout
    assert {'edm2': 'Precond', 'edm': 'VPPrecond', 'adm': 'ADMUNet', 'ddpm': 'DDPMUNet'}[kind] in text and '8x8' in text
    assert ('3 classes' if kind in ('edm2', 'ddpm') else 'unconditional') in text
    assert ('(assumed)' in text) == (kind in ('adm', 'ddpm'))


def test_what_guided_diffusion_predicts_can_be_said(tmp_path):
    """Weights do not tell whether they were trained with predict_xstart: noise is assumed, and that is said."""
    path, dest = str(tmp_path / 'model.pt'), str(tmp_path / 'x.pkl')
    torch.save(small('adm').state_dict(), path)
    convert = ['convert', path, f'--dest={dest}', *SETTINGS['adm']]
    tool = script_module('snapshot_tool.py').main
    shown = click.testing.CliRunner().invoke(tool, ['inspect', path]).stdout
    assert '  predict                epsilon (assumed)' in shown.splitlines()
    images = []
    for more in ([], ['--set', 'predict=start']):
        text = click.testing.CliRunner().invoke(tool, [*convert, *more, '--overwrite']).stdout
        assert ('Assumed: predict=epsilon' in text) == (not more)
        images.append(sampled(load_snapshot(dest)))
    assert load_snapshot(dest).net.diffusion.predict == 'start' and not torch.equal(*images)
    for command in ([*convert, '--overwrite'], ['inspect', path]):
        assert 'predicts is no argument' in fails('snapshot_tool.py', *command, '--set', 'predicts=start')
    error = fails('snapshot_tool.py', *convert, '--set', 'predict=velocity', '--overwrite')
    assert 'velocity' in error and 'epsilon, start' in error


# --- Cost -------------------------------------------------------------------------------------------------------------


def test_products_are_counted_as_by_hand():
    """64 pixels: in 4 -> 8; encoder 8 -> 8 twice; decoder 8 -> 8 four times, 16 -> 8 and 8 -> 8 with a skip 16 -> 8, twice;
    out 8 -> 3; all 3x3 but the skips. Once for the image: 8 -> 8 of the noise, 3 -> 8 of the label, 8 -> 8 for each block.
    """
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=3, model_channels=8, channel_mult=[1],
                        num_blocks=1, attn_resolutions=[])
    images = 9 * (4 * 8 + 2 * 64 + 4 * 64 + 2 * (16 * 8 + 64) + 8 * 3) + 2 * 16 * 8
    assert count_products(net) == 64 * images + 64 + 3 * 8 + 5 * 64


@pytest.mark.parametrize('case', [case for case in golden_cases.cases('networks') if 'kwargs' in case.json and (
    case.json['reference']['class'].endswith('Precond'))], ids=str)
def test_products_of_every_architecture(case):
    """One for each weight at least."""
    net = build_network(case.json['reference']['class'], **case.json['kwargs'])
    weights = sum(value.numel() for value in net.parameters() if value.ndim == 4)
    assert count_products(net) > weights


def test_flops(source):
    kind, path = source
    out = invoke('snapshot_tool.py', 'flops', path, *SETTINGS.get(kind, []))
    assert '8x8, 3 channels' in out and float(out.split()[-1]) > 0
    out = invoke('snapshot_tool.py', 'flops', '--preset=edm2-img512-xs').split()
    assert out[1:3] == ['64x64,', '4'] and out[5] == '124,713,253' and out[-1] == '44.95'    # published: 125M and 46
    assert '--preset' in fails('snapshot_tool.py', 'flops')
    assert 'is that of the network, 8x8' in fails('snapshot_tool.py', 'flops', path, '--resolution=16', *SETTINGS.get(kind, []))


def test_the_images_of_a_network_that_takes_any(tmp_path):
    """Those of its data, or those asked for; else they are assumed, and it says so."""
    net = build_network('WideResNet', name='wrn-10-1', num_classes=3)
    learned, bare = str(tmp_path / 'learned.pkl'), str(tmp_path / 'bare.pt')
    save_snapshot(learned, net, encoder=encoders.RGBEncoder(), dataset={'name': 'x', 'resolution': 16, 'num_channels': 3}, recipe={})
    torch.save(net.state_dict(), bare)

    def products(*args):
        out = invoke('snapshot_tool.py', 'flops', *args)
        return out.splitlines()[0].split(None, 1)[1], float(out.split()[-1])

    (of_data, few), (asked, many), (assumed, same) = map(lambda args: products(*args), [
        [learned], [learned, '--resolution=32x32'], [bare]])
    assert (of_data, asked) == ('16x16, 3 channels', '32x32, 3 channels')
    assert assumed == '32x32, 3 channels (assumed; --resolution sets it)' and many == same > 3.9 * few
    assert 'any (learned from 16x16)' in invoke('snapshot_tool.py', 'inspect', learned)
