"""Sampling: every image depends on its seed and label alone; folders, grids, presets; post-hoc averages."""

import json
import os

import golden_cases
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import fails, invoke, run, script_module, traced_only

from dnnlib import pictures
from training import phema, runs
from training.data.dataset import ImageDataset
from training.encoders import RGBEncoder
from training.generate import (
    GeneratedBatch,
    GridCollector,
    generate_images,
    preset_options,
    split_seeds,
)
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot, snapshot_name

DATASET = {'name': 'ten', 'label_dim': 3, 'classes': [171, 182, 198], 'class_names': ['greyhound', 'terrier', 'spaniel']}


def make_net(label_dim=3, seed=0):
    """A small network whose output gain is not zero, so that it does something."""
    torch.manual_seed(seed)
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=label_dim, model_channels=8, channel_mult=[1, 2],
                        num_blocks=1, attn_resolutions=[4], channels_per_head=8)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith('gain'):
                value.fill_(0.7)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nets')
    for name, label_dim in (('cond', 3), ('uncond', 0)):
        save_snapshot(folder / f'{name}.pkl', make_net(label_dim), encoder=RGBEncoder(),
                      dataset=DATASET if label_dim else {'name': 'none', 'label_dim': 0}, recipe={}, nimg=1024)
    return folder


def images(folder, seeds):
    return np.stack([np.asarray(PIL.Image.open(folder / f'{seed:06d}.png')).astype(int) for seed in seeds])


# --- The library ------------------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_the_batch():
    net, seeds = make_net(), [0, 7, 3, 2**32 + 5, 11]
    made = []
    for batch in (1, 2, 5):
        parts = list(generate_images(net, RGBEncoder(), seeds, batch=batch, num_steps=4))
        assert [seed for part in parts for seed in part.seeds] == seeds
        made.append((torch.cat([part.images for part in parts]).int(), [label for part in parts for label in part.labels]))
    for pixels, labels in made[1:]:
        assert labels == made[0][1]
        assert (pixels - made[0][0]).abs().max() <= 1   # rounding of convolutions


def test_a_given_label_changes_the_image_but_not_the_noise():
    net = make_net()
    (drawn,) = generate_images(net, RGBEncoder(), range(8), batch=8, num_steps=4)
    (same,) = generate_images(net, RGBEncoder(), range(8), labels=drawn.labels, batch=8, num_steps=4)
    assert torch.equal(drawn.images, same.images)
    (other,) = generate_images(net, RGBEncoder(), range(8), labels=[(i + 1) % 3 for i in drawn.labels], batch=8, num_steps=4)
    assert not torch.equal(drawn.images, other.images)


@pytest.mark.parametrize('count, batch, ranks', [(10, 3, 1), (10, 3, 2), (1, 8, 4), (64, 32, 2)])
def test_seeds_are_split_completely(count, batch, ranks):
    parts = [split_seeds(range(count), batch, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(seed for part in parts for piece in part for seed in piece) == list(range(count))
    assert all(len(piece) <= batch for part in parts for piece in part)


def test_images_without_classes_have_no_titles_though_their_data_set_names_classes(tmp_path):
    grid = GridCollector(str(tmp_path / 'grid.png'), DATASET, columns=2, rows=1)
    grid.add(GeneratedBatch(torch.zeros([2, 3, 8, 8], dtype=torch.uint8), [0, 1], None))
    grid.write()
    assert (tmp_path / 'grid.png').exists()


def test_a_grid_says_how_many_classes_it_leaves_out(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(pictures, 'save_image_grid', lambda *args: titles.append(args[-1]))
    for rows in (2, 3):
        grid = GridCollector('grid.png', DATASET, columns=2, rows=rows, title='net')
        grid.add(GeneratedBatch(torch.zeros([3, 3, 8, 8], dtype=torch.uint8), [0, 1, 2], [0, 1, 2]))
        grid.write()
    assert titles == ['net: 2 of 3 classes (1 left out)', 'net: 3 of 3 classes']


def test_images_of_a_grid_are_enlarged_by_a_whole_factor_below_its_title():
    images = np.random.RandomState(0).randint(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    plain = np.asarray(pictures.image_grid(images, 3))
    titled = np.asarray(pictures.image_grid(images, 3, title='a title of several words that needs two or more lines'))
    assert (plain[3:51:6, 3:51:6].transpose(2, 0, 1) == images[0]).all()       # each pixel is 6 x 6
    assert np.array_equal(titled[-len(plain):], plain) and (titled[:-len(plain)] == 0).any()


# --- generate_images.py -----------------------------------------------------------------------------------------------


def test_the_output_is_a_labelled_data_set(tmp_path, snapshots):
    run('generate_images.py', f'--net={snapshots}/cond.pkl', f'--outdir={tmp_path}/out', '--seeds=0-9,1000', '--subdirs',
        '--steps=3', f'--grid={tmp_path}/grid.png')
    dataset = ImageDataset(tmp_path / 'out')
    assert len(dataset) == 11 and dataset.label_dim == 3 and dataset.class_names == DATASET['class_names']
    assert dataset.where(10).endswith('out/001000/001000.png')
    (batch,) = generate_images(make_net(), RGBEncoder(), [*range(10), 1000], batch=16, num_steps=3)
    assert dataset.label_ids.tolist() == batch.labels
    assert np.abs(dataset.images(range(11)).astype(int) - batch.images.numpy()).max() <= 1
    grid = PIL.Image.open(tmp_path / 'grid.png')
    assert grid.width > 8 * 32 and grid.height > 3 * 32


@pytest.mark.slow
def test_two_processes_make_the_same_images(tmp_path, snapshots):
    args = [f'--net={snapshots}/cond.pkl', '--seeds=0-6', '--steps=3', '--S_churn=10', '--batch=2']
    run('generate_images.py', *args, f'--outdir={tmp_path}/one')
    run('generate_images.py', *args, f'--outdir={tmp_path}/two', processes=2)
    assert np.abs(images(tmp_path / 'one', range(7)) - images(tmp_path / 'two', range(7))).max() <= 1
    labels = [json.loads((tmp_path / name / 'dataset.json').read_text())['labels'] for name in ('one', 'two')]
    assert labels[0] == labels[1] and len(labels[0]) == 7


def test_compiled_networks_make_the_same_images(tmp_path, snapshots, monkeypatch):
    """The network and its guide; a folder that one command began is gone on with by the other."""
    compiled = traced_only(monkeypatch)
    command = ['generate_images.py', f'--net={snapshots}/cond.pkl', f'--gnet={snapshots}/uncond.pkl', '--guidance=2', '--steps=3']
    invoke(*command, f'--outdir={tmp_path}/plain', '--seeds=0-9')
    assert not compiled
    invoke(*command, f'--outdir={tmp_path}/both', '--seeds=0-3')
    invoke(*command, f'--outdir={tmp_path}/both', '--seeds=0-9', '--compile=True')
    assert len(compiled) == 2
    difference = images(tmp_path / 'plain', range(10)) - images(tmp_path / 'both', range(10))
    assert abs(difference).max() <= 1
    monkeypatch.setenv('CXX', 'no-compiler')
    assert '--compile=True needs a C++ compiler on a CPU, and no-compiler is not there' in fails(
        *command, f'--outdir={tmp_path}/other', '--compile=True')


def test_a_stopped_run_goes_on(tmp_path, snapshots):
    args = [f'--net={snapshots}/cond.pkl', f'--outdir={tmp_path}/out', '--steps=3']
    run('generate_images.py', *args, '--seeds=0-5')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'out').glob('*.png')}
    labels = dict(json.loads((tmp_path / 'out' / 'dataset.json').read_text())['labels'])
    (tmp_path / 'out' / '000002.png').unlink()
    stamp = (tmp_path / 'out' / '000003.png').stat().st_mtime_ns
    out = run('generate_images.py', *args, '--seeds=0-7').stdout
    assert '5 of 8 images are there already' in out
    assert (tmp_path / 'out' / '000003.png').stat().st_mtime_ns == stamp
    after = dict(json.loads((tmp_path / 'out' / 'dataset.json').read_text())['labels'])
    assert len(after) == 8 and after.items() >= labels.items()
    assert (images(tmp_path / 'out', [2]) - np.asarray(PIL.Image.open(_as_file(tmp_path, before['000002.png'])))).max() <= 1
    assert 'other options' in fails('generate_images.py', *args, '--seeds=0-7', '--rho=5')


def test_a_folder_is_filled_by_one_command_at_a_time(tmp_path, snapshots):
    args = ['generate_images.py', f'--net={snapshots}/cond.pkl', f'--outdir={tmp_path}/out', '--seeds=0', '--steps=1']
    with runs.claimed(tmp_path / 'out', 'generating'):
        assert 'another process is generating there' in fails(*args)
    assert os.listdir(tmp_path / 'out') == []
    (tmp_path / 'file').touch()
    assert 'is a file' in fails(*args, f'--outdir={tmp_path}/file')
    (tmp_path / 'out/.dataset.json.0123abcd.tmp').touch()      # of a process that was killed before its first image
    invoke(*args)
    assert sorted(os.listdir(tmp_path / 'out')) == ['000000.png', 'dataset.json']


def _as_file(folder, data):
    (folder / 'before.png').write_bytes(data)
    return folder / 'before.png'


@pytest.mark.parametrize('text, label', [('182', 1), ('greyhound', 0), ('198', 2)])
def test_classes_by_original_index_or_name(tmp_path, snapshots, text, label):
    module = script_module('generate_images.py')
    module.main.main([f'--net={snapshots}/cond.pkl', f'--outdir={tmp_path}/out', '--seeds=0-3', '--steps=2', f'--class={text}'],
                     standalone_mode=False)
    assert ImageDataset(tmp_path / 'out').label_ids.tolist() == [label] * 4


def test_several_classes_take_turns_and_have_a_row_each(tmp_path, snapshots, monkeypatch):
    module = script_module('generate_images.py')
    shown = []
    monkeypatch.setattr(pictures, 'save_image_grid', lambda path, images, *args: shown.append((images, *args)))
    base = [f'--net={snapshots}/cond.pkl', '--steps=2']
    module.main.main([*base, f'--outdir={tmp_path}/out', f'--grid={tmp_path}/g.png', '--seeds=0-7', '--class=198,greyhound'],
                     standalone_mode=False)
    assert ImageDataset(tmp_path / 'out').label_ids.tolist() == [2, 0] * 4
    ((images, columns, titles, title),) = shown
    assert columns == 8 and len(titles) == 2 and '2 of 3 classes' in title
    module.main.main([*base, f'--outdir={tmp_path}/one', '--seeds=2', '--class=198'], standalone_mode=False)
    assert np.array_equal(ImageDataset(tmp_path / 'one').images([0])[0], images[8 + 1])


@pytest.mark.parametrize(
    'option', ['--steps=5', '--sigma_min=0.1', '--sigma_max=20', '--rho=3', '--S_churn=30', '--guidance=2'])
def test_every_option_of_the_sampler_counts(tmp_path, snapshots, option):
    module = script_module('generate_images.py')
    base = [f'--net={snapshots}/cond.pkl', f'--gnet={snapshots}/uncond.pkl', '--seeds=0-3', '--steps=3']
    for name, extra in (('a', []), ('b', [option])):
        module.main.main([*base, f'--outdir={tmp_path}/{name}', *extra], standalone_mode=False)
    assert np.abs(images(tmp_path / 'a', range(4)) - images(tmp_path / 'b', range(4))).max() > 0
    if option == '--S_churn=30':
        for extra in ('--S_min=1', '--S_max=10', '--S_noise=1.1'):
            module.main.main([*base, option, extra, f'--outdir={tmp_path}/{extra}'], standalone_mode=False)
            assert np.abs(images(tmp_path / 'b', range(4)) - images(tmp_path / extra, range(4))).max() > 0


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'presets_edm2_sampling*', lambda c: c.json['presets']),
                         ids=golden_cases.ids)
def test_presets(case, name):
    expected, ours = case.json['presets'][name], preset_options(name)
    stem = lambda url: url and url.rsplit('/', 1)[1].removesuffix('.pkl')
    assert (stem(ours['net']), stem(ours['gnet'])) == (expected['net'], expected['gnet'])
    assert ours['guidance'] == expected['guidance']


# --- reconstruct_phema.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def trajectory(tmp_path):
    """Snapshots of a network that drifts, at two widths, and the exact average for a third."""
    from training.ema import Averages, power
    net = make_net()
    emas = Averages(net, power([0.05, 0.10, 0.08]))
    generator = torch.Generator().manual_seed(0)
    for step in range(64):
        with torch.no_grad():
            for value in net.parameters():
                value += 0.05 * torch.randn(value.shape, generator=generator)
        emas.update(net, step * 1024, 1024)
        if (step + 1) % 4 == 0:
            for ema, suffix, std in emas.get(net)[:2]:
                path = tmp_path / snapshot_name((step + 1) * 1024, suffix)
                save_snapshot(path, ema, encoder=RGBEncoder(), dataset=DATASET, recipe={}, nimg=(step + 1) * 1024,
                              ema_std=std)
    return tmp_path, emas.emas[2]


def test_post_hoc_average_equals_the_tracked_one(trajectory):
    folder, exact = trajectory
    run('reconstruct_phema.py', f'--indir={folder}', f'--outdir={folder}/out', '--outstd=0.08,0.05', '--batch=1')
    snapshot = load_snapshot(str(folder / 'out' / 'phema-0000065-0.080.pkl'))
    assert (snapshot.nimg, snapshot.ema_std, snapshot.dataset) == (65536, 0.08, DATASET)
    plain = load_snapshot(str(folder / 'network-snapshot-0000065-0.050.pkl')).net
    for name, value in exact.named_parameters():
        scale = value.abs().max()
        ours = dict(snapshot.net.named_parameters())[name]
        assert (ours - value).abs().max() < 0.01 * scale + 2e-3
    again = load_snapshot(str(folder / 'out' / 'phema-0000065-0.050.pkl')).net
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)


def test_post_hoc_average_of_an_earlier_time(trajectory):
    folder, _ = trajectory
    run('reconstruct_phema.py', f'--indir={folder}', '--outstd=0.05', '--outkimg=32', '--outprefix=early')
    assert load_snapshot(str(folder / 'early-0000032-0.050.pkl')).nimg == 32768
    assert len(phema.list_profiles(str(folder), 'network-snapshot')) == 32
    assert '--inprefix' in fails('reconstruct_phema.py', f'--indir={folder}', '--outstd=0.1')


def test_snapshots_of_the_first_thousand_images(tmp_path):
    for std in (0.05, 0.10):
        save_snapshot(tmp_path / snapshot_name(320, f'-{std:.3f}'), make_net(), encoder=RGBEncoder(), dataset=DATASET,
                      recipe={}, nimg=320, ema_std=std)
    path, = script_module('reconstruct_phema.py').reconstruct(str(tmp_path), [0.08])
    assert load_snapshot(path).nimg == 320 and path.endswith('phema-0000000-0.080.pkl')


def test_some_widths_can_be_used_and_existing_results_left(trajectory):
    folder, _ = trajectory
    invoke('reconstruct_phema.py', f'--indir={folder}', '--outstd=0.08', '--instd=0.05', '--outprefix=one')
    invoke('reconstruct_phema.py', f'--indir={folder}', '--outstd=0.08', '--inprefix=network-snapshot', '--outprefix=two')
    one, two = (load_snapshot(str(folder / f'{name}-0000065-0.080.pkl')).net.state_dict() for name in ('one', 'two'))
    assert not all(torch.equal(one[name], two[name]) for name in one)
    (folder / 'one-0000065-0.080.pkl').write_bytes(b'kept')
    out = invoke('reconstruct_phema.py', f'--indir={folder}', '--outstd=0.08,0.06', '--inprefix=two', '--outprefix=one',
                 '--skip')
    assert out.split() == [str(folder / 'one-0000065-0.060.pkl')]
    assert (folder / 'one-0000065-0.080.pkl').read_bytes() == b'kept'
    assert 'STD 0.070' in fails('reconstruct_phema.py', f'--indir={folder}', '--outstd=0.08', '--instd=0.07')


@pytest.mark.parametrize('case', golden_cases.cases('pickles', 'edm2*'), ids=str)
def test_snapshots_of_edm2(case, tmp_path):
    """They say nothing of time and width but in their names. Of equal ones every average is the same again."""
    data = case.path.with_suffix('.pkl').read_bytes()
    for kimg in (1024, 2048):
        for std in (0.05, 0.1):
            (tmp_path / f'edm2-tiny-{kimg * 1024 // 1000:07d}-{std:.3f}.pkl').write_bytes(data)
    invoke('reconstruct_phema.py', f'--indir={tmp_path}', '--outstd=0.07', f'--outdir={tmp_path / "out"}')
    made = load_snapshot(str(tmp_path / 'out' / 'edm2-tiny-0002097-0.070.pkl'))
    source = load_snapshot(str(case.path.with_suffix('.pkl'))).net
    assert (made.nimg, made.ema_std) == (2048 * 1024, 0.07)
    for name, value in source.state_dict().items():
        torch.testing.assert_close(made.net.state_dict()[name], value, rtol=2e-3, atol=1e-4)


def test_snapshots_of_edm2_within_the_first_thousand_images(tmp_path):
    (tmp_path / 'edm2-tiny-0000000-0.050.pkl').write_bytes(b'pickle')
    assert 'of the first thousand images' in fails('reconstruct_phema.py', f'--indir={tmp_path}', '--outstd=0.07')


def test_snapshots_of_no_such_time(trajectory):
    assert '--outkimg' in fails('reconstruct_phema.py', f'--indir={trajectory[0]}', '--outstd=0.1', '--outkimg=7')
