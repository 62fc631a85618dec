"""calculate_metrics.py memorization and mem_ratio.py: known copies are found, files are written, processes agree."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import fails, invoke, run, write_digits

from dnnlib import pictures
from dnnlib.image_io import encode_png
from metrics.memorization import find_copies
from training.data.archive import ArchiveWriter, image_name
from training.data.dataset import ImageDataset
from training.encoders import RGBEncoder
from training.networks import build_network
from training.snapshot import load_snapshot, save_snapshot

COUNT = 60


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits.zip', count=COUNT)


def write_images(path, images):
    with ArchiveWriter(path) as out:
        for i, image in enumerate(images):
            out.add(image_name(i), encode_png(image.transpose(1, 2, 0)))
        out.add_description({'labels': None})
    return path


@pytest.fixture(scope='module')
def half_copied(tmp_path_factory, digits):
    """Eight images: near copies of the training images 7, 5, 3, 1, and four that are no copies."""
    training = ImageDataset(digits).images([7, 5, 3, 1, 0, 2, 4, 6])
    rng = np.random.RandomState(0)
    copies = np.clip(training[:4].astype(int) + rng.randint(-3, 4, training[:4].shape), 0, 255)
    images = np.concatenate([copies, 255 - training[4:].astype(int)]).astype(np.uint8)
    return write_images(tmp_path_factory.mktemp('made') / 'made.zip', images)


def test_copies_in_files_are_found(digits, half_copied, tmp_path):
    out = invoke('calculate_metrics.py', 'memorization', f'--images={half_copied}', f'--data={digits}',
                 f'--dest={tmp_path}/m.json', f'--grid={tmp_path}/m.png', '--batch=3')
    assert 'memorization_ratio  0.5000' in out
    record = json.loads((tmp_path / 'm.json').read_text())
    samples = record['samples']
    assert record['results']['memorization_ratio'] == 0.5 and record['num_training'] == COUNT
    assert samples['ids'] == list(range(8)) and samples['memorized'] == [True] * 4 + [False] * 4
    assert [nearest for nearest, _ in samples['indices']][:4] == [7, 5, 3, 1]
    assert all(d1 < d2 for d1, d2 in samples['distances'])
    assert np.mean([d1 for d1, _ in samples['distances']]) == pytest.approx(record['results']['mean_distance'], abs=1e-5)
    picture = PIL.Image.open(tmp_path / 'm.png')
    assert picture.width > 12 * 32 and picture.height > 2 * 32


def test_a_copy_stands_above_its_training_image(digits, half_copied):
    training = ImageDataset(digits, use_labels=False)
    made = ImageDataset(half_copied)
    parts = [(np.arange(5, 8), made.images(range(5, 8))), (np.arange(5), made.images(range(5)))]
    found = find_copies(parts, training, keep=3)
    assert found.ids.tolist() == list(range(8)) and set(found.ids[found.closest]) < set(range(4))
    np.testing.assert_array_equal(found.images, made.images(found.ids[found.closest]))
    assert [found.indices[i, 0] for i in found.closest] == [[7, 5, 3, 1][i] for i in found.closest]


def test_copies_in_other_spaces_and_moved_ones(digits, half_copied, tmp_path):
    """Moved copies are found by --shifts alone; features find what their detector sees; distances are a measure too."""
    source = ImageDataset(digits).images(range(20))
    moved = write_images(tmp_path / 'moved.zip', np.roll(source, (1, -1), (2, 3)))
    call = ('calculate_metrics.py', 'memorization', f'--data={digits}', f'--dest={tmp_path}/m.json')

    def measured(*args):
        out = invoke(*call, *args)
        return out, json.loads((tmp_path / 'm.json').read_text())

    plain, found = (measured(f'--images={moved}', f'--shifts={shifts}')[1] for shifts in (0, 1))
    assert plain['results']['num_memorized'] < 5 and found['results']['num_memorized'] == 20
    assert [row[0] for row in found['samples']['indices']] == list(range(20)) and found['closeness'] == {'space': 'pixels',
                                                                                                          'neighbors': 2, 'shifts': 1}
    assert all(len({*row}) == 2 for row in found['samples']['indices'])    # two places of one image are no two images
    # By loops: the middle of an image at all places of a training image.
    image, training = ImageDataset(moved).images([3])[0, :, 1:7, 1:7].astype(float), ImageDataset(digits).images(range(COUNT))
    best = sorted(min(np.square(image - other[:, y:y + 6, x:x + 6]).mean() ** 0.5 for y in range(3) for x in range(3))
                  for other in training.astype(float))[:2]
    assert found['samples']['distances'][3] == pytest.approx(best, abs=1e-5)
    # The mean of more neighbours, and a distance; no copy is no proof.
    out, found = measured(f'--images={half_copied}', '--neighbors=5', '--max-distance=4')
    assert found['results']['near_ratio'] == 0.5 and len(found['samples']['distances'][0]) == 5
    assert 'nearer than 4' in out and '4 of 8' in out
    rows = np.array(found['samples']['distances'])
    assert found['samples']['memorized'] == (rows[:, 0] < rows[:, 1:].mean(axis=1) / 3).tolist()
    assert '--shifts' in fails(*call, f'--images={moved}', '--shifts=4')
    assert '--own: needs the file' in fails(*call, f'--images={moved}', '--space=own')
    # Features: those of the detector itself.
    torch.manual_seed(0)
    save_snapshot(tmp_path / 'wrn.pkl', build_network('WideResNet', name='wrn-10-1', num_classes=10), encoder=RGBEncoder(),
                  dataset={}, recipe={}, nimg=0)
    _, found = measured(f'--images={half_copied}', '--space=own', f'--own={tmp_path}/wrn.pkl')
    net = load_snapshot(str(tmp_path / 'wrn.pkl')).net
    with torch.no_grad():
        ours, theirs = (net(torch.from_numpy(ImageDataset(path).images(range(n))) / 255, return_prelogit=True)[1].double()
                        for path, n in ((half_copied, 8), (digits, COUNT)))
    expected = torch.cdist(ours, theirs).topk(2, largest=False)
    np.testing.assert_allclose(found['samples']['distances'], expected.values, rtol=1e-4, atol=1e-5)
    assert '--shifts' in fails(*call, f'--images={moved}', '--space=own', '--shifts=1')


def test_the_picture_has_frames_and_distances(digits, half_copied, tmp_path):
    training, made = ImageDataset(digits, use_labels=False), ImageDataset(half_copied)
    copies = find_copies([(np.arange(8), made.images(range(8)))], training)
    copies.save_picture(tmp_path / 'x.png', training, columns=5)
    pixels = pictures.load_png(tmp_path / 'x.png')
    frames = (pixels == np.array([0xD5, 0x5E, 0])).all(axis=2)
    marked = frames.any(axis=0).sum()                          # 4 of 5 columns
    assert 4 * 48 < marked < 4.6 * 60 and not frames[frames.shape[0] // 2 + 20:].any()


def test_mirrored_training_images_count_if_asked_for(digits, tmp_path):
    mirrored = write_images(tmp_path / 'm.zip', ImageDataset(digits).images(range(10))[:, :, :, ::-1])
    plain, both = (invoke('calculate_metrics.py', 'memorization', f'--images={mirrored}', f'--data={digits}', f'--xflip={flip}')
                   for flip in (0, 1))
    assert 'memorization_ratio  1.0000' in both and 'memorization_ratio  1.0000' not in plain


def test_the_optimal_denoiser_memorizes_everything(digits, tmp_path):
    """Through the same doors as a network: generate_images.py, then the measure on its files, and directly."""
    net = f'--net=optimal:{digits}'
    invoke('generate_images.py', net, f'--outdir={tmp_path}/out', '--seeds=0-11', '--steps=10')
    files = invoke('calculate_metrics.py', 'memorization', f'--images={tmp_path}/out', f'--data={digits}', '--num=10')
    direct = invoke('calculate_metrics.py', 'memorization', net, f'--data={digits}', '--num=12', '--steps=10',
                    f'--dest={tmp_path}/m.json')
    assert '10 images' in files and 'memorization_ratio  1.0000' in files and 'memorization_ratio  1.0000' in direct
    record = json.loads((tmp_path / 'm.json').read_text())
    made, training = ImageDataset(tmp_path / 'out'), ImageDataset(digits)
    nearest = training.images([nearest for nearest, _ in record['samples']['indices']])
    np.testing.assert_array_equal(made.images(range(12)), nearest)
    assert (made.label_ids == training.label_ids[[nearest for nearest, _ in record['samples']['indices']]]).all()


# --- Every snapshot of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tmp_path, digits):
    """The folder of a run with snapshots at three times, one of them with another EMA width."""
    folder = tmp_path / 'run'
    for kimg, suffix in ((2, '-0.050'), (10, '-0.050'), (10, '-0.100')):
        net = build_network('EDMPrecond', img_resolution=8, img_channels=3, model_type='SongUNet', model_channels=8,
                            channel_mult=[1], num_blocks=1)
        save_snapshot(folder / f'network-snapshot-{kimg:07d}{suffix}.pkl', net, encoder=RGBEncoder(),
                      dataset={'name': 'digits', 'label_dim': 0}, recipe={}, nimg=kimg * 1000)
    (folder / 'training_options.json').write_text(json.dumps({'data': digits}))
    return folder


def test_every_snapshot_is_measured_once(experiment):
    arguments = [f'--expdir={experiment}', '--seeds=0-3', '--steps=2', '--subdirs', '--batch=3']
    assert ' of 4' in invoke('mem_ratio.py', *arguments)
    log = json.loads((experiment / 'mem_ratio.json').read_text())
    assert [(row['nimg'], row['ema']) for row in log['snapshots']] == [(2000, '0.050'), (10000, '0.050'), (10000, '0.100')]
    assert all(0 <= row['memorization_ratio'] <= 1 and row['num_images'] == 4 for row in log['snapshots'])
    assert (experiment / 'mem_ratio.png').is_file() and (experiment / 'mem_ratio-pairs.png').is_file()
    kept = experiment / 'samples' / 'network-snapshot-0000010-0.100'
    assert len(ImageDataset(kept)) == 4 and (kept / '000000' / '000003.png').is_file()
    # A second call measures what is new only: rows of old snapshots are taken as they are.
    log['snapshots'][0]['memorization_ratio'] = 0.25
    (experiment / 'mem_ratio.json').write_text(json.dumps(log))
    assert '25.00%' in invoke('mem_ratio.py', *arguments)
    arguments.remove('--seeds=0-3')                            # those of the log
    assert '25.00%' in invoke('mem_ratio.py', *arguments)
    assert '25.00%' not in invoke('mem_ratio.py', *arguments, '--seeds=0-4', f'--log={experiment}/other.json')
    assert (experiment / 'other.png').is_file()


def test_by_default_there_are_64_samples(experiment):
    assert '64 samples of each of 3 snapshots' in invoke('mem_ratio.py', f'--expdir={experiment}', '--steps=1')
    settings = json.loads((experiment / 'mem_ratio.json').read_text())['settings']
    assert settings['seeds'] == list(range(64))


def test_samples_of_one_class(experiment, digits):
    net = build_network('EDMPrecond', img_resolution=8, img_channels=3, label_dim=10, model_type='SongUNet',
                        model_channels=8, channel_mult=[1], num_blocks=1)
    for path in experiment.glob('*-0.*.pkl'):
        save_snapshot(path, net, encoder=RGBEncoder(), dataset={'name': 'digits', 'label_dim': 10}, recipe={}, nimg=2000)
    invoke('mem_ratio.py', f'--expdir={experiment}', '--seeds=0-3', '--steps=1', '--class=7', '--subdirs')
    kept = ImageDataset(experiment / 'samples' / 'network-snapshot-0000010-0.100')
    assert kept.label_ids.tolist() == [7] * 4
    assert json.loads((experiment / 'mem_ratio.json').read_text())['settings']['class'] == '7'


def test_the_reference_can_be_given(experiment, digits, tmp_path):
    (experiment / 'training_options.json').unlink()
    assert 'training_options.json' in fails('mem_ratio.py', f'--expdir={experiment}', '--seeds=0-3')
    out = invoke('mem_ratio.py', f'--expdir={experiment}', f'--knn-ref={digits}', '--seeds=0-1', '--steps=1',
                 f'--log={tmp_path}/log.json')
    assert f'against {COUNT} images' in out and (tmp_path / 'log-pairs.png').is_file()


@pytest.mark.slow
def test_two_processes_find_the_same(experiment, digits, tmp_path):
    net = experiment / 'network-snapshot-0000010-0.100.pkl'
    arguments = ['memorization', f'--net={net}', f'--data={digits}', '--seeds=0-6', '--steps=2', '--batch=2']
    invoke('calculate_metrics.py', *arguments, f'--dest={tmp_path}/one.json', f'--grid={tmp_path}/one.png')
    run('calculate_metrics.py', *arguments, f'--dest={tmp_path}/two.json', f'--grid={tmp_path}/two.png', processes=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ('one.json', 'two.json'))
    assert one['samples']['ids'] == two['samples']['ids'] == list(range(7)) and two['processes'] == 2
    assert one['samples']['indices'] == two['samples']['indices']
    np.testing.assert_allclose(one['samples']['distances'], two['samples']['distances'], atol=0.2)
    assert PIL.Image.open(tmp_path / 'two.png').size == PIL.Image.open(tmp_path / 'one.png').size


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_training_sets_that_do_not_fit(half_copied, tmp_path):
    large = write_images(tmp_path / 'large.zip', np.zeros([3, 3, 16, 16], dtype=np.uint8))
    assert '[3, 16, 16]' in fails('calculate_metrics.py', 'memorization', f'--images={half_copied}', f'--data={large}')


def test_bad_options_of_mem_ratio(experiment, tmp_path):
    assert '.json' in fails('mem_ratio.py', f'--expdir={experiment}', '--log=x.png')
    (experiment / 'mem_ratio.json').write_text('{}')
    assert 'mem_ratio.json' in fails('mem_ratio.py', f'--expdir={experiment}')
    (experiment / 'training_options.json').write_text('{}')
    assert '--knn-ref' in fails('mem_ratio.py', f'--expdir={experiment}')
