"""dataset_tool.py as users run it: every kind of source, the selections, and what people have on their disks."""

import gzip
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import types
import zipfile
import zlib

import numpy as np
import PIL.Image
import psutil
import pytest
from helpers import ROOT, fails, invoke, run, write_digits

from dnnlib import UserError, image_io
from dnnlib.image_io import BadImage, decode_image, encode_png
from long_tail.datasets import open_data as long_tailed_images
from training import presets
from training.data import convert, imagenet, sources
from training.data.archive import ArchiveReader, ArchiveWriter, image_name, latent_name
from training.data.dataset import ImageDataset
from training.data.transforms import make_transform
from training.networks import build_network

SCRIPT = 'dataset_tool.py'


def tool(*args):
    return invoke(SCRIPT, *args)


def convert_to(dest, *args):
    """Converts, and opens the data set."""
    tool('convert', f'--dest={dest}', *args)
    return ImageDataset(dest)


def refusal(dest, *args):
    """The line with which `convert` refuses; nothing may be left at the destination."""
    line = fails(SCRIPT, 'convert', f'--dest={dest}', *args)
    assert not pathlib.Path(dest).exists() and not list(pathlib.Path(dest).parent.glob('.*tmp*'))
    return line


def description(path):
    return ArchiveReader(path).description()


def picture(seed=0, size=(8, 8)):
    return PIL.Image.fromarray(np.random.RandomState(seed).randint(256, size=(size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three class folders with 3, 4 and 5 pictures of 8x8."""
    for label, name in enumerate(['ant', 'bee', 'cow']):
        (tmp_path / 'set' / name).mkdir(parents=True)
        for i in range(3 + label):
            picture(10 * label + i).save(tmp_path / 'set' / name / f'{i}.png')
    return tmp_path / 'set'


# --- kinds of sources


def test_class_folders(folder, tmp_path):
    data = convert_to(tmp_path / 'a.zip', f'--source={folder}')
    assert data.label_ids.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert data.class_names == ['ant', 'bee', 'cow'] and data.classes == [0, 1, 2] and data.class_index('bee') == 1
    np.testing.assert_array_equal(data.images([4])[0].transpose(1, 2, 0), np.asarray(picture(11)))
    info = description(tmp_path / 'a.zip')
    assert info['labels'][:1] == [['00000/img00000000.png', 0]] and info['source'] == folder.name


def class_folders(path, names, count=1):
    """A folder for each name, below `path`, with `count` pictures."""
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(path / name / f'{i}.png')
    return path


def rows(output):
    """(label, images, original index, name) of a printed table of classes."""
    return [tuple(line.split()) for line in output.splitlines() if line[:8].strip().isdigit()]


def test_folders_named_by_number_are_in_its_order(tmp_path):
    source = class_folders(tmp_path / 'set', [*map(str, range(12)), '007', 'other'])
    names = sorted(map(str, range(12)), key=int)
    assert convert_to(tmp_path / 'a.zip', f'--source={source}').class_names == names[:7] + ['007'] + names[7:] + ['other']
    shutil.make_archive(str(tmp_path / 'set'), 'zip', source)
    out = tool('convert', f'--source={tmp_path}/set.zip', f'--dest={tmp_path}/b.zip', '--class_labels=10,2')
    assert rows(out) == [('0', '1', '11', '10'), ('1', '1', '2', '2')]
    assert ImageDataset(tmp_path / 'b.zip').class_names == ['10', '2']


def test_a_class_name_counts_before_an_index(tmp_path):
    source = class_folders(tmp_path / 'set', ['1', '3', '5', '1-3'])
    assert sources.open_source(str(source)).class_names == ['1', '3', '5', '1-3']

    def taken(text):
        out = tool('convert', f'--source={source}', f'--dest={tmp_path}/a.zip', '--overwrite', f'--class_labels={text}')
        assert [name for *_, name in rows(out)] == ImageDataset(tmp_path / 'a.zip').class_names
        return [row[2:] for row in rows(out)]

    assert taken('1') == [('0', '1')] and taken('3, 0') == [('1', '3'), ('0', '1')]
    assert taken('2') == [('2', '5')] and taken('1-3') == [('3', '1-3')] and taken('2-3') == [('2', '5'), ('1', '3')]
    line = refusal(tmp_path / 'b.zip', f'--source={source}', '--class_labels=9')
    assert line.startswith('Error: --class_labels: ') and '0 (1), 1 (3), 2 (5)' in line
    assert '--class_labels' in refusal(tmp_path / 'b.zip', f'--source={source}', '--class_labels=3-2')
    data = convert_to(tmp_path / 'c.zip', f'--source={source}')
    assert data.class_index('3') == 1 and data.class_index('2') == 2


def test_the_classes_are_shown_with_their_images(folder, tmp_path):
    out = tool('convert', f'--source={folder}', f'--dest={tmp_path}/a.zip', '--class_labels=cow,ant')
    assert '8 images, 8x8, 2 classes' in out and rows(out) == [('0', '5', '2', 'cow'), ('1', '3', '0', 'ant')]
    class_folders(tmp_path / 'many', map(str, range(20)))
    assert len(rows(tool('convert', f'--source={tmp_path}/many', f'--dest={tmp_path}/b.zip'))) == 20
    class_folders(tmp_path / 'many', ['more'], 4)
    out = tool('convert', f'--source={tmp_path}/many', f'--dest={tmp_path}/c.zip')
    assert '21 classes' in out and 'of each class 1 to 4 images' in out and not rows(out)
    assert rows(tool('inspect', f'--source={tmp_path}/c.zip'))[20] == ('20', '4', '20', 'more')


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize('above', ['photos', 'photos/train', 'train'])
def test_labels_in_the_one_folder_of_a_source(above, kind, tmp_path):
    """As of a zip that holds the data set's own folder."""
    class_folders(tmp_path / 'set' / above, ['cat', 'dog'], 2)
    source = tmp_path / 'set' if kind == 'folder' else shutil.make_archive(str(tmp_path / 'set'), 'zip', tmp_path / 'set')
    out = tool('convert', f'--source={source}', f'--dest={tmp_path}/a.zip')
    assert rows(out) == [('0', '2', '0', 'cat'), ('1', '2', '1', 'dog')]
    assert f'Note: one top-level folder, {above.split("/")[0]}: the classes are the folders of {source}/{above}\n' in out
    data = ImageDataset(tmp_path / 'a.zip')
    assert data.class_names == ['cat', 'dog'] and data.label_ids.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_a_data_set_in_a_folder_of_a_source_keeps_its_labels(kind, tmp_path):
    write_digits(tmp_path / 'outer' / 'digits', 30)
    labels = ImageDataset(tmp_path / 'outer' / 'digits').label_ids.tolist()
    for name in ('README.md', 'a.txt'):
        (tmp_path / 'outer' / name).touch()
    source = tmp_path / 'outer' if kind == 'folder' else shutil.make_archive(str(tmp_path / 'x'), 'zip', tmp_path / 'outer')
    assert convert_to(tmp_path / 'a.zip', f'--source={source}').label_ids.tolist() == labels
    data = ImageDataset(source)
    assert '2 beside the data set' in tool('convert', f'--source={source}', f'--dest={tmp_path}/b.zip')
    assert data.label_ids.tolist() == labels and data.where(0).endswith('digits/00000/img00000000.png')
    assert data.images([3]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize('folders', [('train', 'val'), ('Training', 'testing', 'validation'), ('train2017', 'val_2017', 'dog'),
                                     ('in/train/cat', 'in/train/dog', 'in/test/cat')])
def test_parts_of_a_data_set_are_no_classes(folders, tmp_path):
    source = class_folders(tmp_path / 'set', folders)
    line = refusal(tmp_path / 'a.zip', f'--source={source}')
    assert line.startswith(f'Error: --source={source} has the folders') and 'not classes' in line
    for place in line.rpartition(': ')[2].split(','):
        assert pathlib.Path(place).is_dir()
    shutil.make_archive(str(tmp_path / 'set'), 'zip', source)
    assert 'unpack it' in refusal(tmp_path / 'a.zip', f'--source={tmp_path}/set.zip')


def test_parts_that_are_joined_and_classes_that_are_named_like_parts(tmp_path):
    source = class_folders(tmp_path / 'set', ['train/cat', 'train/dog', 'val/cat'])
    assert convert_to(tmp_path / 'a.zip', f'--source={source}/train,{source}/val').class_counts.tolist() == [2, 1]
    for dest, names in (('b', ['car', 'train']), ('c', ['test1', 'test2'])):
        source = class_folders(tmp_path / 'of' / dest, names)
        assert convert_to(tmp_path / f'{dest}.zip', f'--source={source}').class_names == names


def test_folders_in_class_folders_are_named(tmp_path):
    source = class_folders(tmp_path / 'set', ['day/cat', 'day/dog', 'night/cat'])
    out = tool('convert', f'--source={source}', f'--dest={tmp_path}/a.zip')
    assert '2 classes' in out and 'folders in class folders, e.g. day/cat, are no classes' in out
    source = class_folders(tmp_path / 'one', ['a/images', 'b/images'])       # as in Tiny ImageNet
    assert 'Note' not in tool('convert', f'--source={source}', f'--dest={tmp_path}/b.zip')
    source = class_folders(tmp_path / 'alone', ['cow', 'cow/calf'])
    out = tool('convert', f'--source={source}', f'--dest={tmp_path}/c.zip')
    assert '4 images' not in out and 'no labels' in out and 'one folder alone (cow) gives no labels' in out


def test_links_to_nothing_are_damaged(folder, tmp_path):
    """Of pictures and of a whole class; nothing that reads a folder passes over them."""
    (folder / 'dog').mkdir()
    for k in range(2):
        (folder / 'dog' / f'{k}.png').symlink_to('nowhere.png')
    (folder / 'eel').symlink_to(folder / 'none')
    args = [f'--source={folder}', '--max-images=2']
    line = refusal(tmp_path / 'a.zip', *args)
    assert 'dog/0.png is a link to nothing (and 2 more)' in line and 'skip corrupt' in line
    out = tool('convert', f'--dest={tmp_path}/a.zip', '--skip-corrupt', *args)
    assert '3 damaged images were left out' in out and 'dog/1.png' in out and f'{folder}/eel is a link' in out
    assert len(description(tmp_path / 'a.zip')['skipped']) == 3
    with pytest.raises(UserError, match='dog/0.png is a link to nothing'):
        ImageDataset(folder)
    with pytest.raises(UserError, match='dog/0.png is a link to nothing'):
        long_tailed_images('zip', root=str(folder), size=8)
    for path in folder.iterdir():
        path.unlink() if path.is_symlink() else shutil.rmtree(path) if path.name != 'dog' else None
    assert 'link to nothing' in refusal(tmp_path / 'b.zip', '--skip-corrupt', *args)


def test_what_is_left_out_is_counted(folder, tmp_path):
    for name in ('ant/IMG_1.HEIC', 'ant/IMG_2.HEIC', 'bee/a.txt', 'bee/.hidden.png', '.DS_Store', 'README', 'cow/dataset.json'):
        (folder / name).write_bytes(b'x')
    os.mkfifo(folder / 'pipe.png')
    out = tool('convert', f'--source={folder}', f'--dest={tmp_path}/a.zip')
    line = next(line for line in out.splitlines() if line.startswith('Left out'))
    assert line.startswith(f'Left out of {folder}: 2 ') and set(line.partition(': ')[2].split(', ')) == {
        '2 .HEIC (read if pillow-heif is installed)', '2 hidden', '1 .txt', '1 without ending', '1 dataset.json of a folder',
        '1 no file'}
    (folder / 'pipe.png').unlink()
    shutil.make_archive(str(tmp_path / 'set'), 'zip', folder)
    out = tool('convert', f'--source={tmp_path}/set.zip,{folder}', f'--dest={tmp_path}/b.zip')
    assert '4 .HEIC' in out and '4 hidden' in out
    for path in folder.rglob('*.png'):
        path.unlink()
    line = refusal(tmp_path / 'c.zip', f'--source={folder}')
    assert 'holds no images that can be read, but 2 .HEIC (read if pillow-heif is installed)' in line
    (folder / 'ant' / 'x.jpg').write_bytes(b'\0\0\0\x20ftypheic' + bytes(30))
    assert 'install a plug-in for Pillow' in refusal(tmp_path / 'c.zip', f'--source={folder}')


def test_heic_is_read_if_a_plug_in_is_installed(folder, tmp_path):
    """A stand-in that reads another format under this name."""
    (tmp_path / 'pillow_heif').mkdir()
    (tmp_path / 'pillow_heif' / '__init__.py').touch()
    (tmp_path / 'pillow_heif' / 'HeifImagePlugin.py').write_text(
        'import PIL.Image\nPIL.Image.init()\nPIL.Image.register_open("HEIF", *PIL.Image.OPEN.pop("PCX"))')
    picture(5).save(folder / 'ant' / 'IMG_1.HEIC', format='pcx')
    out = run(SCRIPT, 'convert', f'--source={folder}', f'--dest={tmp_path}/a.zip', PYTHONPATH=str(tmp_path)).stdout
    assert 'Left out' not in out and 'installed' not in out
    np.testing.assert_array_equal(ImageDataset(tmp_path / 'a.zip').images([3])[0].transpose(1, 2, 0), np.asarray(picture(5)))


def test_avif_is_left_out_where_pillow_does_not_read_it(folder, tmp_path, monkeypatch):
    picture().save(folder / 'ant' / 'x.avif')
    assert len(convert_to(tmp_path / 'a.zip', f'--source={folder}')) == 13
    formats = tuple(name for name in image_io._pillow_formats() if name != 'AVIF')
    monkeypatch.setattr(image_io, '_pillow_formats', lambda: formats)
    assert '1 .avif (read if pillow-avif-plugin is installed)' in tool(
        'convert', f'--source={folder}', f'--dest={tmp_path}/b.zip', '--workers=1')


def test_the_result_is_a_stored_zip_or_a_folder(folder, tmp_path):
    data = convert_to(tmp_path / 'a.zip', f'--source={folder}')
    with zipfile.ZipFile(tmp_path / 'a.zip') as z:
        assert z.testzip() is None
        assert {info.compress_type for info in z.infolist()} == {zipfile.ZIP_STORED}
        assert len({info.file_size for info in z.infolist() if info.filename.endswith('.png')}) == 1
    other = convert_to(tmp_path / 'a', f'--source={folder}')
    assert (tmp_path / 'a' / '00000' / 'img00000011.png').is_file()
    np.testing.assert_array_equal(other.images(np.arange(12)), data.images(np.arange(12)))


def test_labels_of_dataset_json(folder, tmp_path):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob('*.png'))
    labels = {name: i % 4 for i, name in enumerate(names)}
    (folder / 'dataset.json').write_text(json.dumps({'labels': list(labels.items())}))
    data = convert_to(tmp_path / 'a.zip', f'--source={folder}')
    assert data.label_ids.tolist() == [i % 4 for i in range(12)]
    (folder / 'dataset.json').write_text(json.dumps({'labels': None}))
    assert not convert_to(tmp_path / 'b.zip', f'--source={folder}').has_labels
    vectors = [[name, [0.5, i / 2]] for i, name in enumerate(names)]
    (folder / 'dataset.json').write_text(json.dumps({'labels': vectors}))
    np.testing.assert_array_equal(convert_to(tmp_path / 'c.zip', f'--source={folder}').labels([3]), [[0.5, 1.5]])


def test_zip_and_own_archives(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / 'in.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for path in folder.rglob('*.png'):
            z.write(path, path.relative_to(folder))
    data = convert_to(tmp_path / 'a.zip', f'--source={tmp_path}/in.zip')
    assert data.label_ids.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    tool('convert', f'--source={tmp_path}/a.zip', f'--dest={tmp_path}/b.zip', '--class_labels=2,0', '--nums=2')
    again = convert_to(tmp_path / 'c.zip', f'--source={tmp_path}/b.zip')  # class numbers stay through further steps
    assert again.classes == [2, 0] and again.class_names == ['cow', 'ant'] and again.label_ids.tolist() == [0, 0, 1, 1]
    tool('convert', f'--source={tmp_path}/b.zip', f'--dest={tmp_path}/d.zip', '--class_labels=0')
    assert description(tmp_path / 'd.zip')['class_names'] == ['ant']


def test_one_folder_gives_no_labels(folder, tmp_path):
    shutil.rmtree(folder / 'ant')
    shutil.rmtree(folder / 'bee')
    assert not convert_to(tmp_path / 'a.zip', f'--source={folder}').has_labels
    assert not convert_to(tmp_path / 'b.zip', f'--source={folder}/cow').has_labels
    assert convert_to(tmp_path / 'c.zip', f'--source={folder}', '--class_labels=0').class_names == ['cow']


def test_digits(tmp_path):
    from sklearn.datasets import load_digits
    data = convert_to(tmp_path / 'a.zip', '--source=digits')
    assert data.image_shape == (1, 8, 8) and data.label_ids.tolist() == load_digits().target.tolist()
    expected = np.rint(load_digits().images * 255 / 16)
    np.testing.assert_array_equal(data.images(np.arange(1797)), expected[:, None])
    assert data.images(np.arange(1797)).max() == 255


def cifar_batch(n, kind, seed, classes):
    random = np.random.RandomState(seed)
    data = random.randint(256, size=(n, 3072), dtype=np.uint8)
    return {'data': data, 'batch_label': 'x', **{k: random.randint(classes[k], size=n).tolist() for k in kind}}


def cifar_files(hundred):
    classes = {'labels': 10, 'fine_labels': 100, 'coarse_labels': 20}
    if hundred:
        files = {name: cifar_batch(20, ['fine_labels', 'coarse_labels'], 1, classes) for name in ('train', 'test')}
        files['meta'] = {'fine_label_names': [f'f{i}' for i in range(100)], 'coarse_label_names': [f'c{i}' for i in range(20)]}
        return 'cifar-100-python', files
    files = {name: cifar_batch(6, ['labels'], i, classes) for i, name in enumerate(
        [f'data_batch_{k}' for k in range(1, 6)] + ['test_batch'])}
    files['batches.meta'] = {'label_names': [f'n{i}' for i in range(10)]}
    return 'cifar-10-batches-py', files


def write_cifar(path, hundred=False, **replaced):
    """A CIFAR archive with few images; `replaced` gives other contents to some files (None leaves one out)."""
    folder, files = cifar_files(hundred)
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in (files | {key.replace('__', '.'): value for key, value in replaced.items()}).items():
            if content is not None:
                data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
                info = tarfile.TarInfo(f'{folder}/{name}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path, files


def test_cifar10(tmp_path):
    path, files = write_cifar(tmp_path / 'cifar-10-python.tar.gz')
    data = convert_to(tmp_path / 'a.zip', f'--source={path}')
    pixels = np.concatenate([files[f'data_batch_{k}']['data'] for k in range(1, 6)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(data.images(np.arange(30)), pixels)
    assert data.label_ids.tolist() == sum((files[f'data_batch_{k}']['labels'] for k in range(1, 6)), [])
    assert data.class_names[3] == 'n3' and data.label_dim == 10
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / 'unpacked', filter='data')
    for folder in (tmp_path / 'unpacked', tmp_path / 'unpacked' / 'cifar-10-batches-py'):
        other = convert_to(tmp_path / f'{folder.name}.zip', f'--source={folder}', '--max-images=7')
        np.testing.assert_array_equal(other.images(np.arange(7)), pixels[:7])
    assert len(sources.CifarSource(str(path), split='test')) == 6


def test_cifar100(tmp_path):
    path, files = write_cifar(tmp_path / 'cifar-100-python.tar.gz', hundred=True)
    fine = convert_to(tmp_path / 'fine.zip', f'--source={path}')
    coarse = convert_to(tmp_path / 'coarse.zip', f'--source={path}', '--coarse')
    assert fine.label_dim == 100 and fine.label_ids.tolist() == files['train']['fine_labels'] and fine.class_names[7] == 'f7'
    assert coarse.label_dim == 20 and coarse.label_ids.tolist() == files['train']['coarse_labels']
    assert coarse.class_names[7] == 'c7'


@pytest.mark.parametrize('replaced,message', [
    ({'data_batch_3': None}, 'data_batch_3 is missing'),
    ({'data_batch_2': b'\x80\x02cposix\nsystem\nU\x04trueR.'}, 'posix.system'),
    ({'data_batch_2': {'labels': [1]}}, 'original CIFAR layout'),
    ({'data_batch_2': {'data': np.zeros([2, 3072], np.uint8), 'labels': [1, 10]}}, 'original CIFAR layout'),
    ({'data_batch_2': {'data': np.zeros([2, 3000], np.uint8), 'labels': [1, 2]}}, 'original CIFAR layout'),
    ({'batches__meta': {'num_vis': 3072}}, 'batches.meta is not the original CIFAR layout'),
], ids=str)
def test_other_layouts_than_cifars_are_refused(tmp_path, replaced, message):
    path, _ = write_cifar(tmp_path / 'cifar-10-python.tar.gz', **replaced)
    line = refusal(tmp_path / 'a.zip', f'--source={path}')
    assert message in line and 'cifar-10-python.tar.gz' in line


def test_other_tars_are_refused(folder, tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        tar.add(folder)
    assert 'no CIFAR batches' in refusal(tmp_path / 'a.zip', f'--source={tmp_path}/x.tar')
    whole, _ = write_cifar(tmp_path / 'whole.tar.gz')
    (tmp_path / 'half.tar.gz').write_bytes(whole.read_bytes()[:20000])
    assert 'half.tar.gz is damaged' in refusal(tmp_path / 'a.zip', f'--source={tmp_path}/half.tar.gz')
    assert '--coarse' in refusal(tmp_path / 'a.zip', f'--source={whole}', '--coarse')
    assert '--coarse' in refusal(tmp_path / 'a.zip', '--source=digits', '--coarse')


def test_mnist(tmp_path):
    random = np.random.RandomState(0)
    images, labels = random.randint(256, size=(9, 28, 28), dtype=np.uint8), random.randint(10, size=9, dtype=np.uint8)
    (tmp_path / 'train-images-idx3-ubyte.gz').write_bytes(
        gzip.compress(struct.pack('>4I', 0x803, 9, 28, 28) + images.tobytes()))
    label_file = tmp_path / 'train-labels-idx1-ubyte.gz'
    label_file.write_bytes(gzip.compress(struct.pack('>2I', 0x801, 9) + labels.tobytes()))
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    data = convert_to(tmp_path / 'a.zip', f'--source={path}')
    assert data.image_shape == (1, 32, 32) and data.label_ids.tolist() == labels.tolist()
    expected = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    np.testing.assert_array_equal(data.images(np.arange(9)), expected[:, None])
    label_file.write_bytes(gzip.compress(struct.pack('>2I', 0x801, 9) + labels.tobytes()[:5]))
    assert 'train-labels-idx1-ubyte.gz is damaged or no idx file' in refusal(tmp_path / 'b.zip', f'--source={path}')
    label_file.write_bytes(b'\x1f\x8bnonsense')
    assert 'damaged or no idx file' in refusal(tmp_path / 'b.zip', f'--source={path}')
    label_file.unlink()
    assert 'No such file' in refusal(tmp_path / 'b.zip', f'--source={path}')


def test_lists_of_paths(folder, tmp_path):
    paths = sorted(folder.rglob('*.png'))[:4]
    listing = tmp_path / 'list.txt'
    listing.write_text('# pictures\n' + ''.join(f'{path.relative_to(tmp_path)}\n\n' for path in paths[::-1]))
    data = convert_to(tmp_path / 'a.zip', f'--source={listing}')
    np.testing.assert_array_equal(data.images([0])[0].transpose(1, 2, 0), np.asarray(PIL.Image.open(paths[3])))
    assert not data.has_labels
    listing.write_text(''.join(f'{path}\t{5 - i}\n' for i, path in enumerate(paths)))
    assert convert_to(tmp_path / 'b.zip', f'--source={listing}').label_ids.tolist() == [5, 4, 3, 2]
    for text, message in (('nix.png\n', 'line 1: nix.png does not exist'),
                          (f'{paths[0]}\tx\n', "label 'x'"), ('\n', 'lists no images'),
                          (f'{paths[0]}\t1\n{paths[1]}\n', 'have no label')):
        listing.write_text(text)
        assert message in refusal(tmp_path / 'c.zip', f'--source={listing}')


def test_lsun_without_lmdb_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / 'cat_lmdb').mkdir()
    (tmp_path / 'cat_lmdb' / 'data.mdb').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'lmdb', None)
    assert 'pip install lmdb' in refusal(tmp_path / 'a.zip', f'--source={tmp_path}/cat_lmdb')


def test_lsun(tmp_path):
    lmdb = pytest.importorskip('lmdb', reason='needs the optional package lmdb')
    with lmdb.open(str(tmp_path / 'cat_lmdb'), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for i in range(40):
            file = io.BytesIO()
            picture(i, (20, 16)).save(file, format='webp', lossless=True)
            transaction.put(f'{i:04d}'.encode(), file.getvalue())
    data = convert_to(tmp_path / 'a.zip', f'--source={tmp_path}/cat_lmdb', '--resolution=16x16', '--transform=center-crop',
                      '--workers=2')
    assert len(data) == 40
    np.testing.assert_array_equal(data.images([7])[0].transpose(1, 2, 0), np.asarray(picture(7, (20, 16)))[:, 2:18])


def test_joined_sources_merge_classes_by_name(folder, tmp_path):
    other = tmp_path / 'other'
    for name in ('cow', 'dog'):
        (other / name).mkdir(parents=True)
        picture(99).save(other / name / 'x.png')
    data = convert_to(tmp_path / 'a.zip', f'--source={folder},{other}')
    assert data.class_names == ['ant', 'bee', 'cow', 'dog'] and data.label_ids[-2:].tolist() == [2, 3] and len(data) == 14
    (tmp_path / 'plain').mkdir()
    picture().save(tmp_path / 'plain' / 'x.png')
    assert 'plain has no labels' in refusal(tmp_path / 'b.zip', f'--source={folder},{tmp_path}/plain')
    assert len(convert_to(tmp_path / 'c.zip', f'--source={tmp_path}/plain,{tmp_path}/plain')) == 2


def test_joined_imagenet_folders_keep_imagenets_numbers(tmp_path):
    for part, wnids in (('a', ['n02093754', 'n02091032']), ('b', ['n01443537', 'n02093754'])):
        for wnid in wnids:
            (tmp_path / part / wnid).mkdir(parents=True)
            picture().save(tmp_path / part / wnid / f'{part}.png')
    joined = sources.open_source(f'{tmp_path}/a,{tmp_path}/b')
    assert joined.classes == [1, 171, 182] and joined.class_names == ['goldfish', 'Italian greyhound', 'Border terrier']
    assert joined.labels.tolist() == [1, 2, 0, 2] and joined.where(3).endswith('b/n02093754/b.png')


# --- selections


@pytest.fixture
def wnids(tmp_path):
    """Seven pictures for each of four ImageNet classes; the pixels of picture i of a class are all i."""
    root = tmp_path / 'imagenet'
    for index in (1, 171, 182, 258):
        folder = root / imagenet.classes()[index][0]
        folder.mkdir(parents=True)
        for i in range(7):
            PIL.Image.new('RGB', (8, 8), (i, i, i)).save(folder / f'{folder.name}_{i}.JPEG', quality=100)
    return root


def test_imagenet_classes_by_number(wnids, tmp_path):
    data = convert_to(tmp_path / 'a.zip', f'--source={wnids}', '--class_labels=258,1', '--nums=3', '--seed=5')
    assert data.label_ids.tolist() == [0, 0, 0, 1, 1, 1] and data.classes == [258, 1]
    assert data.class_index('258') == data.class_index('Samoyed') == data.class_index('n02111889') == 0
    chosen = data.images(np.arange(6))[:, 0, 0, 0].reshape(2, 3)
    assert all(len(set(row)) == 3 and (np.diff(row.astype(int)) > 0).all() for row in chosen)  # none twice, in order
    info = description(tmp_path / 'a.zip')
    assert info['nums'] == 3 and info['seed'] == 5 and info['wnids'] == ['n02111889', 'n01443537']
    whole = convert_to(tmp_path / 'b.zip', f'--source={wnids}')
    assert whole.classes == [1, 171, 182, 258] and whole.label_ids.tolist() == np.repeat(range(4), 7).tolist()


def test_draws_are_nested_and_independent_of_the_other_classes(wnids):
    source = sources.open_source(str(wnids))

    def drawn(classes, nums, seed=0):
        chosen = convert.by_class(source, classes, nums, seed)
        return {c: set(chosen.indices[chosen.labels == i].tolist()) for i, c in enumerate(classes)}

    assert drawn([171], 4)[171] == drawn([1, 171, 182], 4)[171]
    assert drawn([171], 2)[171] < drawn([171], 4)[171] < drawn([171], 7)[171]
    assert len({tuple(sorted(drawn([171], 3, seed)[171])) for seed in range(20)}) > 5
    frequencies = np.bincount([i for seed in range(300) for i in drawn([1], 3, seed)[1]], minlength=7)
    assert frequencies.min() > 80 and frequencies.max() < 180  # 129 expected: also the last image is drawn
    everything = convert.by_class(source, None, 0)
    assert everything.indices.tolist() == list(range(28)) and everything.classes == source.classes


def test_selections_that_cannot_be_made(wnids, folder, tmp_path):
    dest = tmp_path / 'a.zip'
    assert "class '2' is not in" in refusal(dest, f'--source={wnids}', '--class_labels=171,2')
    assert '171 is given twice' in refusal(dest, f'--source={wnids}', '--class_labels=171,171')
    assert '171 (Italian greyhound)' in refusal(dest, f'--source={wnids}', '--class_labels=171', '--nums=8')
    assert 'class 198 is not in' in refusal(dest, f'--source={wnids}', '--sim_name=sim3')
    assert '1 is not of --sim_name=sim3' in refusal(dest, f'--source={wnids}', '--sim_name=sim3', '--class_labels=171,1')
    assert 'no wnids' in refusal(dest, f'--source={folder}', '--sim_name=sim3')
    assert 'no classes' in refusal(dest, f'--source={folder}/ant', '--nums=2')
    assert '--class_labels' in refusal(dest, f'--source={wnids}', '--class_labels=cat')
    assert '--sim_name' in refusal(dest, f'--source={wnids}', '--sim_name=sim4')


def test_similarity_level_alone_takes_its_ten_classes(tmp_path):
    for index in imagenet.SIMILARITY_LEVELS['sim1'] + (7,):
        folder = tmp_path / 'imagenet' / imagenet.classes()[index][0]
        folder.mkdir(parents=True)
        picture(index).save(folder / 'x.png')
    data = convert_to(tmp_path / 'a.zip', f'--source={tmp_path}/imagenet', '--sim_name=Sim1', '--nums=1')
    assert data.classes == list(imagenet.SIMILARITY_LEVELS['sim1']) and data.label_ids.tolist() == list(range(10))
    assert data.description()['sim_name'] == 'sim1'


# --- sizes, modes, damage


def test_transforms_resolution_and_limit(tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(5):
        picture(i, (30, 20)).save(tmp_path / 'in' / f'{i}.png')
    for transform in ('stretch', 'center-crop', 'center-crop-dhariwal'):
        out = tool('convert', f'--source={tmp_path}/in', f'--dest={tmp_path}/{transform}.zip', '--resolution=16',
                   '--max-images=3', f'--transform={transform}')
        assert f'3 of 3 pictures are of another shape and were {"squashed" if transform == "stretch" else "cropped"}' in out
        data = ImageDataset(tmp_path / f'{transform}.zip')
        assert len(data) == 3 and data.resolution == 16
        expected = make_transform(transform, 16, 16)(np.asarray(picture(2, (30, 20))))
        np.testing.assert_array_equal(data.images([2])[0].transpose(1, 2, 0), expected)


@pytest.mark.parametrize('kind', ['png', 'webp'])
def test_without_a_transform_pictures_of_another_shape_are_refused(kind, tmp_path):
    """Alone, among others, and all of them alike; those of the same shape are resized."""
    (tmp_path / 'in').mkdir()
    for i, size in enumerate([(32, 32), (30, 20), (24, 24)]):
        picture(i, size).save(tmp_path / 'in' / f'{i}.{kind}', lossless=True)
    dest, args = tmp_path / 'a.zip', (f'--source={tmp_path}/in', '--resolution=16')
    for more in ([], ['--workers=2'], ['--skip-corrupt']):
        line = refusal(dest, *args, *more)
        assert line.startswith('Error: --transform: ') and '30x20' in line and f'1.{kind}' in line and 'stretch' in line
    out = tool('convert', f'--dest={dest}', *args, '--transform=stretch')
    assert f'1 of 3 pictures are of another shape and were squashed: {tmp_path}/in/1.{kind}' in out
    assert description(dest)['transform'] == 'stretch'
    (tmp_path / 'in' / f'1.{kind}').unlink()
    out = tool('convert', f'--dest={dest}', *args, '--overwrite')
    assert 'another shape' not in out and len(ImageDataset(dest)) == 2
    assert 'needs a resolution' in refusal(tmp_path / 'b.zip', *args[:1], '--transform=stretch')
    assert convert_to(tmp_path / 'c.zip', '--source=digits', '--resolution=16x12', '--transform=stretch').image_shape == (1, 12, 16)


@pytest.mark.parametrize('side,fit,others', [
    (96, 'edm2-img64, digits', 'edm2-img512 (multiples of 64), edm2-img256 (multiples of 64)'), (192, 'edm2-img512', ''),
    (30, 'digits', 'edm2-img64 (multiples of 8)'), (64, '', ''), (33, None, '')])
def test_sides_that_are_no_power_of_two(side, fit, others, tmp_path):
    """Networks take them if they can be halved so often; a note says which presets do."""
    args = ['--source=digits', f'--dest={tmp_path}/a.zip', f'--resolution={side}', '--max-images=4']
    if fit is None:
        assert f'--resolution={side}x{side} pixels are not even' in fails(SCRIPT, 'convert', *args)
        return
    out = tool('convert', *args)
    assert ('no power of two' in out) == bool(fit) and others in out
    assert fit in out.partition('presets')[2].partition('but not')[0] and ImageDataset(tmp_path / 'a.zip').resolution == side


def test_multiples_are_those_of_the_networks():
    for name, multiple in presets.multiples().items():
        preset = next(preset for preset in presets.PRESETS if preset.startswith(name))
        network = presets.network_of(preset) | dict(model_channels=32, num_blocks=1)
        scale = 8 if network['img_channels'] == 4 else 1
        network.pop('channels_per_head', None)
        build_network(**network | {'img_resolution': multiple // scale})
        with pytest.raises(UserError, match='do not suit'):
            build_network(**network | {'img_resolution': multiple // scale + 1})


def test_files_of_16_bits_with_values_of_fewer(tmp_path):
    (tmp_path / 'in').mkdir()
    values = np.random.RandomState(0).randint(4096, size=(3, 8, 8)).astype(np.uint16)
    for i, image in enumerate(values):
        PIL.Image.fromarray(image).save(tmp_path / 'in' / f'{i}.{"png" if i else "tif"}')
    args = [f'--source={tmp_path}/in', '--workers=2']
    out = tool('convert', f'--dest={tmp_path}/a.zip', *args)
    assert '3 of 3 pictures use less than a quarter of their range' in out and 'name the bits' in out
    np.testing.assert_array_equal(ImageDataset(tmp_path / 'a.zip').images(range(3))[:, 0], values >> 8)
    out = tool('convert', f'--dest={tmp_path}/b.zip', '--bits=12', *args)
    assert 'quarter' not in out and description(tmp_path / 'b.zip')['bits'] == 12
    np.testing.assert_array_equal(ImageDataset(tmp_path / 'b.zip').images(range(3))[:, 0], values >> 4)
    joined = convert_to(tmp_path / 'c.zip', f'--source={tmp_path}/in,{tmp_path}/in', '--bits=12')
    np.testing.assert_array_equal(joined.images(range(3, 6))[:, 0], values >> 4)
    line = refusal(tmp_path / 'd.zip', '--bits=10', *args)
    assert f'gray values up to {values[0].max()}, beyond 10 bits' in line and '0.tif' in line
    assert '--bits' in refusal(tmp_path / 'd.zip', '--bits=8', *args)


def test_bits_are_not_those_of_colours(tmp_path):
    """Pillow reads 8 of 16 bits of colours."""
    (tmp_path / 'in').mkdir()
    rows = b''.join(b'\0' + bytes(range(48)) for _ in range(8))
    header = struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0)
    chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    (tmp_path / 'in' / 'x.png').write_bytes(image_io._SIGNATURE + b''.join(image_io._chunk(*chunk) for chunk in chunks))
    assert convert_to(tmp_path / 'a.zip', f'--source={tmp_path}/in').images([0])[0, 1, 0].tolist() == [*range(2, 48, 6)]
    assert 'colours of 16 bits' in refusal(tmp_path / 'b.zip', f'--source={tmp_path}/in', '--bits=12')


def test_rejected_pictures_leave_gaps(tmp_path):
    (tmp_path / 'in').mkdir()
    for i, size in enumerate([(32, 30), (8, 8), (32, 32)]):
        picture(i, size).save(tmp_path / 'in' / f'{i}.png')
    args = [f'--source={tmp_path}/in', f'--dest={tmp_path}/a.zip', '--resolution=16x12', '--transform=center-crop-wide']
    assert '1 images are too small' in tool('convert', *args)
    assert ArchiveReader(tmp_path / 'a.zip').names[:2] == [image_name(0), image_name(2)]
    assert ImageDataset(tmp_path / 'a.zip').resolution == 16
    (tmp_path / 'in' / '0.png').unlink()
    (tmp_path / 'in' / '2.png').unlink()
    assert '1 rejected' in refusal(tmp_path / 'b.zip', *args[:1], *args[2:])


def test_sizes_that_networks_cannot_use_are_named(tmp_path):
    (tmp_path / 'in').mkdir()
    picture(0, (16, 16)).save(tmp_path / 'in' / 'a.png')
    picture(0, (16, 8)).save(tmp_path / 'in' / 'b.png')
    dest, source = tmp_path / 'x.zip', f'--source={tmp_path}/in'
    assert 'b.png gives 16x8 pixels' in refusal(dest, source)
    assert '--resolution=15x15' in refusal(dest, source, '--resolution=15x15')
    assert '--resolution=15x8 pixels are not even' in (line := refusal(dest, source, '--resolution=15x8')) and '16x8' in line
    assert '--resolution' in refusal(dest, source, '--resolution=16x')
    assert '--resolution' in refusal(dest, source, '--resolution=0')
    assert '--transform=center-crop needs a resolution' in refusal(dest, source, '--transform=center-crop')
    picture(0, (25, 25)).save(tmp_path / 'in' / 'a.png')
    assert 'a.png: 25x25 pixels are not even' in refusal(dest, source)


def test_every_mode_is_converted(tmp_path):
    (tmp_path / 'in').mkdir()
    image = picture()
    for i, mode in enumerate(['RGB', 'L', 'P', 'RGBA', 'LA', '1', 'I;16', 'CMYK']):
        converted = PIL.Image.fromarray(np.full((8, 8), 4000, np.uint16)) if mode == 'I;16' else image.convert(mode)
        converted.save(tmp_path / 'in' / f'{i}.{"tif" if mode == "CMYK" else "png"}')
    data = convert_to(tmp_path / 'a.zip', f'--source={tmp_path}/in')
    assert len(data) == 8 and data.num_channels == 3
    np.testing.assert_array_equal(data.images([0])[0].transpose(1, 2, 0), np.asarray(image))
    np.testing.assert_array_equal(data.images([3]), data.images([0]))
    np.testing.assert_array_equal(data.images([1])[0], np.asarray(image.convert('L'))[None].repeat(3, axis=0))
    assert (data.images([6]) == 4000 // 256).all()


def test_damaged_pictures_are_named_or_left_out(folder, tmp_path):
    whole = (folder / 'bee' / '1.png').read_bytes()
    (folder / 'bee' / '1.png').write_bytes(whole[:len(whole) // 2])
    (folder / 'cow' / '0.png').write_bytes(b'not a picture')
    args = [f'--source={folder}', '--workers=2']
    assert 'bee/1.png' in (line := refusal(tmp_path / 'a.zip', *args)) and 'skip corrupt' in line
    out = tool('convert', f'--dest={tmp_path}/a.zip', '--skip-corrupt', *args)
    assert '2 damaged images' in out and 'bee/1.png' in out and 'cow/0.png' in out
    data = ImageDataset(tmp_path / 'a.zip')
    assert len(data) == 10 and data.label_ids.tolist() == [0] * 3 + [1] * 3 + [2] * 4
    assert [line.split(': ')[0] for line in description(tmp_path / 'a.zip')['skipped']] == ['bee/1.png', 'cow/0.png']
    for path in folder.rglob('*.png'):
        path.write_bytes(b'')
    assert '12 damaged' in refusal(tmp_path / 'b.zip', '--skip-corrupt', *args)


def test_sources_that_do_not_work_are_named(folder, tmp_path):
    dest = tmp_path / 'x.zip'
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.pdf').write_bytes(b'%PDF')
    (tmp_path / 'broken.zip').write_bytes(b'PK\x03\x04 nothing')
    assert 'empty holds no images' in refusal(dest, f'--source={tmp_path}/empty')
    assert 'nix does not exist' in refusal(dest, f'--source={tmp_path}/nix')
    assert 'notes.pdf is of no known kind' in refusal(dest, f'--source={tmp_path}/notes.pdf')
    assert 'broken.zip is of no known kind, or damaged' in refusal(dest, f'--source={tmp_path}/broken.zip')
    picture().save(folder / 'outside.png')
    assert '1 of 13 images lie outside them, e.g. outside.png' in refusal(dest, f'--source={folder}')
    (folder / 'dataset.json').write_text(json.dumps({'labels': [['outside.png', 0]]}))
    assert 'no label for 12 of 13 images, e.g. ant/0.png' in refusal(dest, f'--source={folder}')
    with zipfile.ZipFile(tmp_path / 'up.zip', 'w') as z:
        z.writestr('../x.png', encode_png(np.zeros((8, 8, 3), np.uint8)))
    assert "'../x.png' points outside" in refusal(dest, f'--source={tmp_path}/up.zip')
    with ArchiveWriter(tmp_path / 'latents.zip') as out:
        out.add('x.npy', b'')
    assert 'latents, not images' in refusal(dest, f'--source={tmp_path}/latents.zip')


def test_destinations_that_exist(folder, tmp_path):
    dest = tmp_path / 'a.zip'
    tool('convert', f'--source={folder}', f'--dest={dest}')
    before = dest.read_bytes()
    assert 'overwrite' in fails(SCRIPT, 'convert', '--source=digits', f'--dest={dest}')
    assert dest.read_bytes() == before
    (folder / 'ant' / '0.png').write_bytes(b'')
    fails(SCRIPT, 'convert', f'--source={folder}', f'--dest={dest}', '--overwrite')
    assert dest.read_bytes() == before  # a failure keeps the old one
    assert len(convert_to(dest, '--source=digits', '--max-images=5', '--overwrite')) == 5


def test_a_large_picture_names_the_option_that_allows_it(folder, tmp_path):
    """In a folder and in a zip; it is not called damaged, nor left out as that."""
    shutil.make_archive(str(tmp_path / 'set'), 'zip', folder)
    for source in (folder, tmp_path / 'set.zip'):
        for more in ([], ['--skip-corrupt'], ['--workers=2']):
            line = refusal(tmp_path / 'a.zip', f'--source={source}', '--max-pixels=63', *more)
            assert line.startswith('Error: --max-pixels: ') and 'ant/0.png: 8 x 8 = 64 pixels' in line
            assert 'damaged' not in line and 'mend' not in line
    assert len(convert_to(tmp_path / 'a.zip', f'--source={folder}', '--max-pixels=64')) == 12


def test_links_out_of_a_folder_name_the_option_that_follows_them(folder, tmp_path):
    secret = tmp_path / 'secret.png'
    picture().save(secret)
    (folder / 'ant' / '9.png').symlink_to(secret)
    line = refusal(tmp_path / 'a.zip', f'--source={folder}')
    assert line.startswith('Error: --follow-links: ') and 'ant/9.png' in line
    assert len(convert_to(tmp_path / 'a.zip', f'--source={folder}', '--follow-links')) == 13
    assert len(ImageDataset(folder)) == 13                     # training follows them


def test_the_result_does_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, 'CHUNK_BYTES', 3 * 8 * 8 * 7)
    for workers in (1, 2, 3):
        tool('convert', '--source=digits', f'--dest={tmp_path}/{workers}.zip', f'--workers={workers}', '--max-images=300')
    assert (tmp_path / '1.zip').read_bytes() == (tmp_path / '2.zip').read_bytes() == (tmp_path / '3.zip').read_bytes()


class _Counting(sources.Source):
    """A source of many images that fails after some, and knows how far it was read ahead."""

    def __len__(self):
        return 1000

    def is_gray(self, index):
        return False

    def picture(self, index):
        if index == 500:
            raise BadImage('rotten')
        return np.zeros((8, 8, 3), np.uint8)

    def where(self, index):
        return f'image {index}'


def test_few_images_are_under_way_at_a_time(monkeypatch):
    """Memory stays flat: chunks are handed out only as results are taken."""
    submitted = []

    class Pool:
        def __init__(self, *args):
            pass

        def submit(self, function, part):
            submitted.append(part)
            return types.SimpleNamespace(result=lambda: [len(submitted)] * len(part))

        def shutdown(self, **kwargs):
            submitted.append('shutdown')

    monkeypatch.setattr(convert.concurrent.futures, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(convert, 'CHUNK_BYTES', 3 * 8 * 8 * 10)
    results = convert._convert_all(convert._Job(_Counting('x'), (None, None, None)), np.arange(1000), workers=2)
    ahead = [seen - position // 10 for position, seen in enumerate(results)]
    assert max(ahead) <= 6 and submitted[-1] == 'shutdown' and len(submitted) == 101


def test_errors_of_workers_reach_the_user(tmp_path):
    with pytest.raises(Exception, match='image 500: rotten'):
        source = _Counting('x')
        convert.convert(source, convert.everything(source), str(tmp_path / 'a.zip'), workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('side', [8, 64])
def test_all_workers_have_work_to_the_end(side):
    """Also where one chunk could hold nearly all pictures: about sixteen chunks for each worker."""
    parts = []

    class Job:
        source = types.SimpleNamespace(in_memory=True)

        def convert(self, indices):
            parts.append(len(indices))
            return [convert._Pngs(np.zeros((1, 1), np.uint8), [0], (side, side))] * len(indices)

    assert len(list(convert._convert_all(Job(), np.arange(200), workers=2))) == 200
    assert len(parts) - 1 == 29 and max(parts) == 7  # one tells the size
    assert list(convert._convert_all(Job(), np.arange(0), workers=2)) == []


@pytest.mark.parametrize('transform', [None, 'center-crop', 'center-crop-wide', 'center-crop-dhariwal'])
def test_pictures_as_pillow_decodes_them_are_transformed_as_arrays(transform, tmp_path):
    picture(3, (70, 50)).save(tmp_path / 'x.webp', lossless=True)
    source = sources.open_source(str(tmp_path))
    function = make_transform(transform, 16, 8 if transform == 'center-crop-wide' else 16)
    assert isinstance(source.picture(0), PIL.Image.Image) and np.asarray(source.picture(0)).shape == (50, 70, 3)
    np.testing.assert_array_equal(function(source.picture(0)), function(np.asarray(source.picture(0))))


def test_inspect(tmp_path):
    write_digits(tmp_path / 'a.zip', 100)
    out = tool('inspect', f'--source={tmp_path}/a.zip', f'--json={tmp_path}/a.json')
    assert '100 images, 3x8x8 pixels' in out and '10 classes' in out
    assert json.loads((tmp_path / 'a.json').read_text())['size'] == 100
    with PIL.Image.open(tmp_path / 'a-sheet.png') as sheet:
        assert sheet.size[0] > 300


def test_inspect_names_latents_that_are_not_finite(tmp_path):
    os.makedirs(tmp_path / 'a/00000')
    for index in range(12):
        latents = np.zeros([8, 4, 4], np.float32)
        latents[0, 0, 0] = np.inf if index in (3, 7) else 0
        np.save(tmp_path / 'a' / latent_name(index), latents)
    out = tool('inspect', f'--source={tmp_path}/a', f'--json={tmp_path}/a.json')
    assert '2 of the measured images have values that are not finite' in out
    assert latent_name(3) in out and latent_name(7) in out and latent_name(4) not in out
    assert json.loads((tmp_path / 'a.json').read_text())['nonfinite'] == 2


# --- real pictures, and the script itself


def test_real_imagenet_pictures(real_data, tmp_path):
    with tarfile.open(real_data / 'imagenet-mini.tar') as tar:
        names = [m for m in tar.getmembers() if any(w in m.name for w in ('n02096051', 'n02091032', 'n02085620', 'n01443537'))]
        tar.extractall(tmp_path, members=names, filter='data')
    data = convert_to(tmp_path / 'a.zip', f'--source={tmp_path}/train', '--resolution=64x64',
                      '--transform=center-crop-dhariwal')
    assert data.classes == [1, 151, 171, 191] and np.bincount(data.label_ids).tolist() == [1, 4, 1, 1]
    gray = data.images([6])[0]  # n02096051_0.JPEG is a grayscale file
    assert (gray[0] == gray[1]).all() and gray.std() > 10
    expected = make_transform('center-crop-dhariwal', 64, 64)(decode_image(
        (tmp_path / 'train' / 'n02091032' / 'n02091032_0.JPEG').read_bytes()))
    np.testing.assert_array_equal(data.images([5])[0].transpose(1, 2, 0), expected)


def test_real_cifar_archive(real_data, tmp_path):
    data = convert_to(tmp_path / 'a.zip', f'--source={real_data}/cifar10-small/cifar-10-python.tar.gz', '--resolution=16x16')
    assert len(data) == 2000 and data.resolution == 16 and np.bincount(data.label_ids).tolist() == [200] * 10
    assert data.class_names[:4] == ['airplane', 'automobile', 'bird', 'cat']
    assert 100 < data.images(np.arange(2000)).mean() < 140


def test_the_script_runs_from_any_folder_and_converts_without_torch(tmp_path):
    """Worker processes elsewhere than on Linux import the script, and torch takes seconds."""
    code = (f'import runpy, sys; sys.argv = ["x", "convert", "--source=digits", "--dest=x/digits.zip"]\n'
            f'try: runpy.run_path({str(ROOT / SCRIPT)!r}, run_name="__main__")\n'
            f'except SystemExit as end: sys.exit(end.code or "torch" in sys.modules)')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
    assert len(ImageDataset(tmp_path / 'x' / 'digits.zip')) == 1797


@pytest.mark.parametrize('command', [[], ['convert'], ['encode'], ['decode'], ['inspect']], ids=str)
def test_help_shows_examples(command):
    assert 'dataset_tool.py' in tool(*command, '--help').partition('Options:')[0].partition('\n')[2]


class Deadly:
    """A job of the converter, one of whose images kills the other workers, which wait for work."""

    source = types.SimpleNamespace(in_memory=False)

    def __init__(self):
        self.parent = os.getpid()

    def convert(self, indices):
        if os.getpid() != self.parent and 0 in indices:
            time.sleep(1)                                      # until one of them holds the lock of the queue
            for process in psutil.Process(self.parent).children():
                if process.pid != os.getpid():
                    process.kill()
        return [None] * len(indices)


def test_a_worker_that_is_killed_ends_the_others_too():
    with pytest.raises(UserError, match='a worker process died'):
        list(convert._convert_all(Deadly(), list(range(3000)), 3))
    assert not multiprocessing.active_children()
