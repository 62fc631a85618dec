"""Pictures keep their channels and their shape: gray, transparent, and no squares; from conversion to export."""

import json
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
import test_long_tail
import test_train_edm
import torch
from helpers import fails, invoke
from tiny import save_tiny_vae

import studies
from dnnlib import UserError, image_io, pictures
from metrics.detectors import network
from metrics.detectors.pixels import Pixels
from training import runs
from training.data import dataset as data_module
from training.data.convert import everything
from training.data.dataset import ImageDataset
from training.data.images import open_images
from training.data.transforms import make_transform
from training.networks import build_network
from training.networks.infer import infer
from training.networks.layers import unet_layers
from training.snapshot import load_snapshot

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
EDM2 = ['--preset=digits', '--channels=8', '--batch=4', '--duration=4', '--status=4', '--snapshot=4', '--checkpoint=4']
EDM = [*test_train_edm.TINY, '--batch=250', '--tick=1', '--snap=1', '--augment=0.5', '--xflip=1', '--nosubdir', '--seed=0']


def save_pictures(folder, channels: int, count: int = 6, size=(24, 16)):
    """Pictures (width, height) in two class folders; returns the folder as text."""
    random = np.random.RandomState(channels)
    for i in range(count):
        path = folder / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.randint(256, size=(*size[::-1], channels), dtype=np.uint8)
        PIL.Image.fromarray(pixels.squeeze()).save(path)
    return str(folder)


def convert(dest, *args) -> str:
    return invoke('dataset_tool.py', 'convert', f'--dest={dest}', '--workers=1', *args)


# --- Data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kinds, options, channels, words', [
    ([1], [], 1, ', gray, 2 classes'), ([3], [], 3, '24x16, 2 classes'), ([1, 3], [], 3, '24x16, 2 classes'),
    ([4], [], 3, '6 of 6 pictures are transparent and were laid on white'), ([4, 1], ['--channels=4'], 4, ', with alpha'),
    ([1], ['--channels=3'], 3, ''), ([3], ['--channels=1'], 1, ''), ([4], ['--channels=1'], 1, 'laid on white')])
def test_channels_of_a_data_set(kinds, options, channels, words, tmp_path):
    """As many as the pictures have, or as the user says; the pixels are Pillow's."""
    sources = [save_pictures(tmp_path / str(kind), kind) for kind in kinds]
    out = convert(tmp_path / 'x.zip', f'--source={",".join(sources)}', *options)
    data = ImageDataset(tmp_path / 'x.zip')
    assert data.image_shape == (channels, 16, 24) and data.resolution == [16, 24] and words in out
    first = PIL.Image.open(tmp_path / str(kinds[0]) / 'a' / '0.png')
    if kinds[0] == 4 and channels != 4:
        first = PIL.Image.alpha_composite(PIL.Image.new('RGBA', first.size, 'white'), first)
    expected = np.asarray(first.convert(MODES[channels])).reshape(16, 24, channels)
    np.testing.assert_array_equal(data.images([0])[0].transpose(1, 2, 0), expected)
    stored = json.loads(zipfile.ZipFile(tmp_path / 'x.zip').read('dataset.json'))
    assert stored.get('channels', 3) == channels and stored['resolution'] == [16, 24]
    if channels != 3:
        assert ImageDataset(tmp_path / 'x.zip', channels=3).image_shape == (3, 16, 24)


def test_an_archive_that_does_not_say_its_channels(tmp_path, monkeypatch):
    """A sample is looked at; a picture in colour that it missed is named."""
    monkeypatch.setattr(data_module, 'LOOKED_AT', 2)
    save_pictures(tmp_path / 'x', 1)
    assert ImageDataset(tmp_path / 'x').image_shape == (1, 16, 24)
    save_pictures(tmp_path / 'y', 3)
    shutil.copy(tmp_path / 'y' / 'a' / '2.png', tmp_path / 'x' / 'a' / '2.png')
    with pytest.raises(UserError, match='2.png: in colour, while .* gray'):
        ImageDataset(tmp_path / 'x').images(range(6))
    shutil.copy(tmp_path / 'y' / 'a' / '0.png', tmp_path / 'x' / 'a' / '0.png')
    data = ImageDataset(tmp_path / 'x')
    assert data.image_shape == (3, 16, 24) and (data.images([3])[0].std(axis=0) == 0).all()
    assert ImageDataset(save_pictures(tmp_path / 'z', 4)).image_shape == (3, 16, 24)   # as ever, on white
    (tmp_path / 'z' / 'dataset.json').write_text('{"channels": 2}')
    with pytest.raises(UserError, match='names 2 channels'):
        ImageDataset(tmp_path / 'z')


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_png_files(channels):
    image = np.random.RandomState(0).randint(256, size=(5, 7, channels), dtype=np.uint8)
    data = image_io.encode_png(image)
    with PIL.Image.open(image_io.io.BytesIO(data)) as picture:
        assert picture.mode == MODES[channels]
        np.testing.assert_array_equal(np.asarray(picture).reshape(image.shape), image)
    np.testing.assert_array_equal(image_io.decode_image(data, channels), image)


def test_what_is_transparent_lies_on_white_in_arrays_too():
    """For all colours and opacities as Pillow has it, also in tensors."""
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = np.stack([colour, colour[::-1], colour.T, alpha], axis=-1)
    expected = np.asarray(image_io.with_channels(PIL.Image.fromarray(image), 3))
    np.testing.assert_array_equal(image_io.with_channels(image, 3), expected)
    batch = image.transpose(2, 0, 1)[None]
    for images in (batch, torch.from_numpy(batch)):
        np.testing.assert_array_equal(np.asarray(image_io.as_rgb(images))[0].transpose(1, 2, 0), expected)
    grid = pictures.image_grid(batch, 1, min_side=1)
    assert grid.mode == 'RGB' and np.array_equal(np.asarray(grid)[1:257, 1:257], expected)


def test_crops_of_the_shape_that_is_wanted():
    """The largest part in the middle; of a picture of that shape all of it."""
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 15:45] = 255
    assert (make_transform('crop', 24, 16)(picture) == 255).all()
    assert make_transform('crop', 16, 24)(picture[..., :1]).shape == (24, 16, 1)
    np.testing.assert_array_equal(make_transform('crop', 60, 20)(picture), picture)
    clear = np.concatenate([picture, picture[..., :1]], axis=2)       # black where it is transparent
    resized = make_transform(None, 30, 10)(clear)
    assert (resized[resized[..., 3] > 0][:, 0] > 250).all()             # and none of it in what can be seen


# --- Networks -----------------------------------------------------------------------------------------------------------

SMALL = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
NETWORKS = {
    'ddpmpp': ('VPPrecond', SMALL | dict(model_type='SongUNet')),
    'ncsnpp': ('VEPrecond', SMALL | dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual',
                                         channel_mult_noise=2, resample_filter=[1, 3, 3, 1], decoder_type='skip')),
    'adm': ('EDMPrecond', SMALL | dict(model_type='DhariwalUNet')),
    'edm2': ('Precond', SMALL | dict(label_dim=0, channels_per_head=16))}


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('channels, size', [(1, [8, 12]), (4, [12, 8])])
def test_networks_of_images_that_are_no_squares(name, channels, size):
    """The same weights by shape as for squares, and levels with attention by the shorter side."""
    class_name, arguments = NETWORKS[name]
    net, square = (build_network(class_name, img_resolution=resolution, img_channels=channels, **arguments)
                   for resolution in (size, 8))
    assert net.image_shape == (channels, *size) and net(torch.randn(2, *net.image_shape), 1.0).shape == (2, channels, *size)
    assert [p.shape for p in net.parameters()] == [p.shape for p in square.parameters()]
    text = ' '.join(net.state_dict())
    assert f'{size[0] // 2}x{size[1] // 2}_block0' in text and f'{size[0]}x{size[1]}_block0' in text
    if name == 'edm2':
        assert infer(net.state_dict(), {}).kwargs['img_resolution'] == size


@pytest.mark.parametrize('class_name', ['ADMUNet', 'DDPMUNet'])
def test_discrete_networks_of_images_that_are_no_squares(class_name):
    unet = dict(image_size=[8, 12], num_channels=32, num_res_blocks=1, channel_mult='1,1', attention_resolutions='4')
    if class_name == 'DDPMUNet':
        unet = dict(img_resolution=[8, 12], T=10, ch=32, ch_mult=[1, 2], attn=[1], num_res_blocks=1, dropout=0.0, cond=False,
                    augm=False, num_class=1)
    net = build_network('DiscreteDenoiser', network=dict(class_name=class_name, img_channels=4, **unet),
                        diffusion=dict(schedule='cosine', steps=10))
    assert net.image_shape == (4, 8, 12) and net(torch.randn(1, 4, 8, 12), 1.0).shape == (1, 4, 8, 12)


def test_sides_that_the_levels_do_not_divide():
    with pytest.raises(UserError, match=r'20x36 .* multiple of 8, e.g. 16x32 \(for latents 128x256\)'):
        unet_layers([36, 20], 8, [8] * 4, 1, [])


# --- From training to export --------------------------------------------------------------------------------------------


def train(script, outdir, data, *args):
    invoke(script, f'--outdir={outdir}', f'--data={data}', *(EDM2 if script == 'train_edm2.py' else EDM), *args)
    return str(max(outdir.glob('network-snapshot-*.pkl')))


@pytest.mark.parametrize('script, channels', [('train_edm2.py', 1), ('train.py', 4)])
def test_from_training_to_export(script, channels, tmp_path):
    data = tmp_path / 'data.zip'
    convert(data, f'--source={save_pictures(tmp_path / "in", channels)}', f'--channels={channels}')
    net = train(script, tmp_path / 'run', data, '--cond=1')
    record = runs.read_options(str(tmp_path / 'run'))['network']
    assert (record['img_channels'], record['img_resolution']) == (channels, [16, 24])
    assert list((tmp_path / 'run').glob('samples-*.png'))
    out = invoke('generate_images.py', f'--net={net}', f'--outdir={tmp_path}/out', '--seeds=0-3', '--steps=2',
                 f'--grid={tmp_path}/grid.png')
    made = ImageDataset(tmp_path / 'out')
    assert '24x16' in out and made.image_shape == (channels, 16, 24) and made.has_labels
    with PIL.Image.open(tmp_path / 'out' / '000000.png') as picture:
        assert (picture.mode, picture.size) == (MODES[channels], (24, 16))

    out = invoke('calculate_metrics.py', 'calc', f'--images={tmp_path}/out', f'--ref={data}', '--metrics=fd_pixels')
    ours, theirs = (images.images(range(len(images))).reshape(len(images), -1) for images in (made, ImageDataset(data)))
    mu = np.square(ours.mean(0) - theirs.mean(0)).sum()
    assert float(out.partition('fd_pixels')[2].split()[0]) > mu
    out = invoke('calculate_metrics.py', 'memorization', f'--net={net}', f'--data={data}', '--num=4', '--steps=2')
    assert 'memorization_ratio' in out
    assert '24x16' in invoke('snapshot_tool.py', 'inspect', net)
    assert f'24x16, {channels} channels' in invoke('snapshot_tool.py', 'flops', net)
    assert f'{channels}x16x24 pixels' in invoke('dataset_tool.py', 'inspect', f'--source={data}')

    invoke('snapshot_tool.py', 'convert', net, f'--dest={tmp_path}/folder')
    copy = load_snapshot(str(tmp_path / 'folder')).net
    assert copy.image_shape == (channels, 16, 24)
    assert all(map(torch.equal, copy.parameters(), load_snapshot(net).net.parameters()))
    images = open_images(str(data)).images(range(6)).transpose(0, 2, 3, 1)
    np.savez(tmp_path / 'x.npz', arr_0=images)
    np.testing.assert_array_equal(open_images(str(tmp_path / 'x.npz')).images(range(6)), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize('script', ['train_edm2.py', 'train.py'])
def test_runs_of_earlier_versions_go_on_with_three_channels(script, tmp_path, monkeypatch):
    """They saw gray pictures three times over."""
    data = save_pictures(tmp_path / 'in', 1, size=(8, 8))
    with monkeypatch.context() as patch:
        patch.setattr(runs, 'channels_of', lambda run_dir: 3)
        train(script, tmp_path / 'run', data, '--cond=0')
    longer = '--duration=8' if script == 'train_edm2.py' else '--duration=0.002'
    net = train(script, tmp_path / 'run', data, longer, '--cond=0')
    assert load_snapshot(net).net.image_shape == (3, 8, 8) and load_snapshot(net).nimg in (8, 2000)
    assert len(runs.read_options(str(tmp_path / 'run'))['starts']) == 2


def test_latents_of_images_that_are_no_squares(tmp_path):
    """Of gray pictures too: the autoencoder takes three channels."""
    vae = save_tiny_vae(tmp_path / 'vae')
    convert(tmp_path / 'x.zip', f'--source={save_pictures(tmp_path / "in", 1, size=(48, 32))}')
    invoke('dataset_tool.py', 'encode', f'--source={tmp_path}/x.zip', f'--dest={tmp_path}/sd.zip', f'--model-url={vae}')
    assert ImageDataset(tmp_path / 'sd.zip').image_shape == (8, 4, 6)
    net = train('train_edm2.py', tmp_path / 'run', tmp_path / 'sd.zip', '--cond=0')
    out = invoke('generate_images.py', f'--net={net}', f'--outdir={tmp_path}/out', '--seeds=0-1', '--steps=2', f'--model-url={vae}')
    assert '48x32' in out and ImageDataset(tmp_path / 'out').image_shape == (3, 32, 48)
    invoke('dataset_tool.py', 'decode', f'--source={tmp_path}/sd.zip', f'--dest={tmp_path}/y.zip', f'--model-url={vae}')
    assert ImageDataset(tmp_path / 'y.zip').image_shape == (3, 32, 48)
    line = fails('dataset_tool.py', 'encode', f'--source={save_pictures(tmp_path / "odd", 1, size=(20, 36))}',
                 f'--dest={tmp_path}/z.zip', f'--model-url={vae}')
    assert '20x36 pixels' in line and '16x32' in line
    line = fails('train_edm2.py', f'--outdir={tmp_path}/z', f'--data={tmp_path}/odd', *EDM2, '--preset=edm2-img64-xs', '--cond=0')
    assert line.startswith('Error: --data: ') and '20x36' in line and '16x32' in line


def test_detectors_get_three_channels(monkeypatch):
    """Gray is repeated, what is transparent lies on white; the pixels are what they are."""
    class Net(torch.nn.Linear):
        def forward(self, images):
            return images.flatten(1).float()

    monkeypatch.setattr(network.Network, '_features', lambda self, images, outputs: self.net(images), raising=False)
    detector = network.Network(Net(1, 1), 'x', 'cpu')
    images = torch.randint(256, (2, 4, 5, 7), dtype=torch.uint8)
    for some in (images, images[:, :1], images[:, :3]):
        assert torch.equal(detector(some), image_io.as_rgb(some).flatten(1).float())
        assert Pixels()(some)['features'].shape == (2, some[0].numel())


def test_the_long_tail_study_sees_gray_images(tmp_path):
    """And transparent ones, if it is told to; a run of three channels goes on with three."""
    from long_tail import datasets, main
    assert datasets.open_data('digits', '').image_shape == (1, 8, 8)
    data = save_pictures(tmp_path / 'in', 4, size=(8, 8))
    options = [*test_long_tail.DIGITS, '--train', '--data_type=digits', f'--logdir={tmp_path}/run']
    zipped = [*options, '--data_type=zip', f'--root={data}']
    for words, channels in ((options, 1), (zipped, 3), ([*zipped, '--img_channels=4'], 4)):
        flags = main.settings(words)
        assert main.open_data(flags).num_channels == flags.img_channels == channels
        net = build_network(**main.network_of(flags))
        assert net.img_channels == channels and ('img_channels' in net.init_kwargs['network']) == (channels != 3)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'training_options.json').write_text('{"network": {"network": {}}}')
    assert main.settings(options).img_channels == 3


@pytest.mark.parametrize('content, channels', [(None, 1), ({'samples': 3}, 3), ({'image_channels': 1}, 1)])
def test_a_study_of_an_earlier_version_keeps_three_channels(content, channels, tmp_path):
    study = studies.Study(str(tmp_path), 1)
    if content:
        (tmp_path / 'study.json').write_text(json.dumps(content))
    studies.make_archive(study, study.path('x.zip'), everything(studies.digits()).first(4))
    assert ImageDataset(study.path('x.zip')).image_shape == (channels, 8, 8) and study.image_channels == channels
