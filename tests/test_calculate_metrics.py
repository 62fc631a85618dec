"""calculate_metrics.py as users run it: reference, files, generated images, several processes, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import fails, run, script_module, write_digits

from dnnlib.util import subset
from metrics.frechet import frechet_distance
from metrics.inception import InceptionV3
from metrics.statistics import load_statistics
from training.data.dataset import ImageDataset
from training.encoders import RGBEncoder
from training.generate import generate_images
from training.networks import build_network
from training.snapshot import save_snapshot

SCRIPT = 'calculate_metrics.py'
PIXELS = 'fd_pixels,precision_pixels,recall_pixels'


def calculate(capsys, *args):
    """Runs the script in this process; returns what it printed."""
    script_module(SCRIPT).main([str(arg) for arg in args], standalone_mode=False)
    return capsys.readouterr().out


def results(path):
    with open(path) as f:
        return json.load(f, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))


def pixel_statistics(pixels):
    x = pixels.reshape(len(pixels), -1).astype(np.float64)
    return x.mean(0), np.cov(x.T)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two data sets of digits, and reference statistics of the second."""
    folder = tmp_path_factory.mktemp('metrics')
    write_digits(folder / 'a.zip', 300)
    write_digits(folder / 'b.zip', 250, first=300)
    script_module(SCRIPT).main(['ref', f'--data={folder}/b.zip', f'--dest={folder}/b.pkl', f'--metrics={PIXELS}'],
                               standalone_mode=False)
    return folder


@pytest.fixture(scope='module')
def snapshot(data):
    """A small network with random weights that was, as it says, made for the digits."""
    torch.manual_seed(0)
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=10, model_channels=8, channel_mult=[1],
                        num_blocks=1, channels_per_head=8)
    for name, value in net.named_parameters():
        if name.endswith('gain'):
            torch.nn.init.constant_(value, 0.5)
    path = data / 'net.pkl'
    save_snapshot(path, net, encoder=RGBEncoder(), dataset=ImageDataset(data / 'a.zip').description(), recipe={}, nimg=0)
    return path


def test_calc_says_what_the_formula_says(data, capsys, tmp_path):
    printed = calculate(capsys, 'calc', f'--images={data}/a.zip', f'--ref={data}/b.pkl', f'--metrics={PIXELS}', '--batch=17',
                        f'--dest={tmp_path}/out.json')
    a, b = (ImageDataset(data / name).images(np.arange(n)) for name, n in (('a.zip', 300), ('b.zip', 250)))
    expected = frechet_distance(*pixel_statistics(a), *pixel_statistics(b))
    found = results(tmp_path / 'out.json')
    assert found['results']['fd_pixels'] == pytest.approx(expected, rel=1e-6)
    assert 0.5 < found['results']['precision_pixels'] <= 1 and 0.5 < found['results']['recall_pixels'] <= 1
    assert f'{expected:.6g}' in printed and '300 images' in printed
    # Enough to do it again.
    assert {'images', 'ref', 'seed', 'num_images', 'detectors', 'protocol', 'command', 'torch', 'ref_meta'} <= found.keys()
    assert found['ref_images'] == {'fd_pixels': 250} and found['ref_meta']['data'] == 'b.zip'


def test_images_as_reference_and_all_forms_of_images(data, capsys, tmp_path):
    """A zip, a folder, an .npz of the same pictures; statistics or pictures as reference: the same distances."""
    shutil.unpack_archive(data / 'a.zip', tmp_path / 'folder')
    pixels = ImageDataset(data / 'a.zip').images(np.arange(300))
    np.savez(tmp_path / 'a.npz', pixels.transpose(0, 2, 3, 1))
    found = []
    for i, (images, ref) in enumerate([(data / 'a.zip', data / 'b.pkl'), (tmp_path / 'folder', data / 'b.zip'),
                                       (tmp_path / 'a.npz', data / 'b.zip')]):
        calculate(capsys, 'calc', f'--images={images}', f'--ref={ref}', f'--metrics={PIXELS}', f'--dest={tmp_path}/{i}.json')
        found.append(results(tmp_path / f'{i}.json')['results'])
    assert found[1] == pytest.approx(found[0], rel=1e-9) and found[2] == pytest.approx(found[0], rel=1e-9)


def test_num_takes_the_subset_of_the_seed(data, capsys, tmp_path):
    calculate(capsys, 'ref', f'--data={data}/a.zip', f'--dest={tmp_path}/r.npz', '--metrics=fd_pixels', '--num=220', '--seed=3')
    found = load_statistics(str(tmp_path / 'r.npz'))
    mu, sigma = pixel_statistics(ImageDataset(data / 'a.zip').images(subset(300, 220, 3)))
    np.testing.assert_allclose(found.gaussians['fd_pixels'].mu, mu)
    np.testing.assert_allclose(found.gaussians['fd_pixels'].sigma, sigma, atol=1e-8)
    assert found.meta['num'] == 220 and found.meta['seed'] == 3


def test_one_class_of_images_and_of_the_reference(data, capsys, tmp_path):
    printed = calculate(capsys, 'calc', f'--images={data}/a.zip', '--class=3', f'--ref={data}/b.zip', '--ref-class=4',
                        '--metrics=fd_pixels', f'--dest={tmp_path}/out.json')
    a, b = ImageDataset(data / 'a.zip'), ImageDataset(data / 'b.zip')
    ours, theirs = np.flatnonzero(a.label_ids == 3), np.flatnonzero(b.label_ids == 4)
    expected = frechet_distance(*pixel_statistics(a.images(ours)), *pixel_statistics(b.images(theirs)))
    found = results(tmp_path / 'out.json')
    assert found['results']['fd_pixels'] == pytest.approx(expected, rel=1e-6) and found['num_images'] == len(ours)
    assert 'Note: fd_pixels' in printed        # far fewer images than dimensions


@pytest.mark.slow
def test_two_processes_find_the_same(data, snapshot, capsys, tmp_path):
    """As torchrun starts them, for files and for generated images; 5 images in batches of 4 leave the second little."""
    for name, args in {'few': ['calc', f'--images={data}/a.zip', '--batch=4', '--num-images=5', f'--ref={data}/b.zip'],
                       'made': ['gen', f'--net={snapshot}', '--seeds=0-30', '--batch=4', '--steps=3',
                                f'--ref={data}/b.pkl']}.items():
        one, two = tmp_path / f'{name}1.json', tmp_path / f'{name}2.json'
        calculate(capsys, *args, f'--metrics={PIXELS}', f'--dest={one}')
        run(SCRIPT, *args, f'--metrics={PIXELS}', f'--dest={two}', processes=2)
        assert results(two)['processes'] == 2
        assert results(two)['results'] == pytest.approx(results(one)['results'], rel=1e-6), name


def test_gen_measures_what_generate_images_makes(data, snapshot, capsys, tmp_path):
    calculate(capsys, 'gen', f'--net={snapshot}', '--seeds=5-40', '--num=30', '--steps=3', '--batch=7', '--class=4',
              f'--ref={data}/b.zip', '--ref-class=4', '--metrics=fd_pixels', f'--dest={tmp_path}/gen.json')
    from training.snapshot import load_snapshot
    loaded = load_snapshot(str(snapshot))
    made = generate_images(loaded.net, loaded.encoder, range(5, 35), labels=4, num_steps=3)
    made = torch.cat([batch.images for batch in made]).numpy()
    b = ImageDataset(data / 'b.zip')
    expected = frechet_distance(*pixel_statistics(made), *pixel_statistics(b.images(np.flatnonzero(b.label_ids == 4))))
    found = results(tmp_path / 'gen.json')
    assert found['results']['fd_pixels'] == pytest.approx(expected, rel=1e-3)   # a rounded pixel may differ
    assert found['seeds'] == list(range(5, 35)) and found['sampler']['num_steps'] == 3


def test_seed_of_gen_is_that_of_the_first_image(data, snapshot, capsys, tmp_path):
    """--seed=S --num=N are the seeds S to S + N - 1; files are read without threads too."""
    for name, seeds in {'seed': ['--seed=7', '--num=5'], 'seeds': ['--seeds=7-11']}.items():
        calculate(capsys, 'gen', f'--net={snapshot}', *seeds, '--steps=2', f'--ref={data}/b.pkl', '--metrics=fd_pixels',
                  f'--dest={tmp_path}/{name}.json')
    one, two = results(tmp_path / 'seed.json'), results(tmp_path / 'seeds.json')
    assert one['seeds'] == two['seeds'] == [7, 8, 9, 10, 11] and one['results'] == two['results']
    for workers in (0, 2):
        calculate(capsys, 'calc', f'--images={data}/a.zip', f'--workers={workers}', f'--ref={data}/b.pkl', '--num=40',
                  '--metrics=fd_pixels', f'--dest={tmp_path}/{workers}.json')
    assert results(tmp_path / '0.json')['results'] == results(tmp_path / '2.json')['results']


def test_same_command_same_bytes(data, capsys, tmp_path):
    for name in ('x.pkl', 'x.npz'):
        for folder in 'ab':
            calculate(capsys, 'ref', f'--data={data}/a.zip', f'--dest={tmp_path}/{folder}/{name}', '--metrics=' + PIXELS)
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()


@pytest.mark.slow
def test_protocols_are_not_mixed_unless_asked_for(tmp_path, capsys, monkeypatch):
    """Three references of the same pictures; each is compared with its own kind, and EDM's with ADM's."""
    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), tmp_path / 'inception.pth')
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(tmp_path / 'inception.pth'))
    write_digits(tmp_path / 'few.zip', 3)
    for protocol in ('edm', 'adm', 'cbdm'):
        calculate(capsys, 'ref', f'--data={tmp_path}/few.zip', f'--dest={tmp_path}/{protocol}.npz', '--metrics=fid',
                  f'--protocol={protocol}')
    with np.load(tmp_path / 'edm.npz') as z, np.load(tmp_path / 'cbdm.npz') as y:
        assert z['protocol'] == 'edm' and y['protocol'] == 'cbdm'
        np.savez(tmp_path / 'bare.npz', mu=z['mu'], sigma=z['sigma'])
    calc = ['calc', f'--images={tmp_path}/few.zip', '--metrics=fid', f'--dest={tmp_path}/out.json']
    for ref, protocol in (('edm', 'edm'), ('adm', 'edm'), ('edm', 'adm'), ('cbdm', 'cbdm'), ('bare', 'edm')):
        printed = calculate(capsys, *calc, f'--ref={tmp_path}/{ref}.npz', f'--protocol={protocol}')
        found = results(tmp_path / 'out.json')
        assert found['results']['fid'] == pytest.approx(0, abs=1e-4) and found['protocol'] == protocol
        assert ('of no protocol, and taken as of edm' in printed) == (ref == 'bare')
    args = [*calc, f'--ref={tmp_path}/cbdm.npz']
    assert 'choose cbdm, or make' in fails(SCRIPT, *args)
    assert 'cbdm.npz of cbdm' in calculate(capsys, *args, '--mix-protocols')
    assert results(tmp_path / 'out.json')['ref_protocol'] == 'cbdm'


@pytest.mark.slow
def test_the_default_metrics_with_local_weights(capsys, tmp_path, monkeypatch):
    """The plain command line: both detectors, whose weights the environment names."""
    import transformers
    torch.save(InceptionV3().state_dict(), tmp_path / 'inception.pth')
    transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                       image_size=224, patch_size=14)).save_pretrained(tmp_path / 'dino')
    write_digits(tmp_path / 'few.zip', 6)
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(tmp_path / 'inception.pth'))
    monkeypatch.setenv('DINOV2_WEIGHTS', str(tmp_path / 'none'))
    refused = 'fd_dinov2 is left out: DINOv2 cannot be loaded from'
    assert refused in calculate(capsys, 'ref', f'--data={tmp_path}/few.zip', f'--dest={tmp_path}/refs/few.pkl')
    assert load_statistics(f'{tmp_path}/refs/few.pkl').gaussians.keys() == {'fid'}
    monkeypatch.setenv('DINOV2_WEIGHTS', str(tmp_path / 'dino'))
    assert 'left out' not in calculate(capsys, 'ref', f'--data={tmp_path}/few.zip', f'--dest={tmp_path}/refs/few.pkl')
    found = load_statistics(f'{tmp_path}/refs/few.pkl')
    assert {space: g.dim for space, g in found.gaussians.items()} == {'fid': 2048, 'fd_dinov2': 16}
    calculate(capsys, 'calc', f'--images={tmp_path}/few.zip', f'--ref={tmp_path}/refs/few.pkl', f'--dest={tmp_path}/out.json')
    found = results(tmp_path / 'out.json')
    assert [found['results'][name] for name in ('fid', 'fd_dinov2')] == pytest.approx([0, 0], abs=1e-5)
    assert found['detectors'] == found['ref_meta']['detectors'] and len(found['detectors']['dinov2']['fingerprint']) == 16


def test_recognition_is_that_of_the_classifier(data, capsys, tmp_path):
    """Real digits are recognised, whatever numbers their classes have; wrongly labelled ones are not."""
    from sklearn.svm import SVC
    a, b = ImageDataset(data / 'a.zip'), ImageDataset(data / 'b.zip')
    x, y = a.images(np.arange(300)).reshape(300, -1) / 255, b.images(np.arange(250)).reshape(250, -1) / 255
    expected = (SVC(C=10, gamma='scale').fit(y, b.label_ids).predict(x) == a.label_ids).mean()
    assert expected > 0.9
    # The same pictures with the classes numbered the other way round, as `classes` says, and wrongly so.
    pixels = a.images(np.arange(300)).transpose(0, 2, 3, 1)
    np.savez(tmp_path / 'wrong.npz', pixels, 9 - a.label_ids)
    shutil.unpack_archive(data / 'a.zip', tmp_path / 'turned')
    info = json.loads((tmp_path / 'turned' / 'dataset.json').read_text())
    info |= {'labels': [[name, 9 - label] for name, label in info['labels']], 'classes': list(range(9, -1, -1))}
    (tmp_path / 'turned' / 'dataset.json').write_text(json.dumps(info))
    for images, share in ((data / 'a.zip', expected), (tmp_path / 'turned', expected), (tmp_path / 'wrong.npz', 0)):
        calculate(capsys, 'calc', f'--images={images}', f'--ref={data}/b.zip', '--metrics=recognition',
                  f'--dest={tmp_path}/out.json')
        assert results(tmp_path / 'out.json')['results']['recognition'] == pytest.approx(share, abs=0.05)
    # Statistics with features of labelled images serve as well.
    calculate(capsys, 'ref', f'--data={data}/b.zip', f'--dest={tmp_path}/b.npz', '--metrics=recognition')
    calculate(capsys, 'calc', f'--images={data}/a.zip', f'--ref={tmp_path}/b.npz', '--metrics=recognition',
              f'--dest={tmp_path}/out.json')
    assert results(tmp_path / 'out.json')['results']['recognition'] == pytest.approx(expected, abs=0.05)
