"""data_utils/: what the scripts select, what they write, on the real formats, and errors."""

import io
import json
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest
from helpers import fails, invoke, run

from data_utils import selection
from training.data.dataset import ImageDataset

PER_CLASS = 12


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """An archive in CIFAR-10's layout with few, but distinct images, in shuffled order, and its arrays."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, [10 * PER_CLASS, 3, 32, 32]).astype(np.uint8)
    labels = rng.permutation(np.repeat(np.arange(10), PER_CLASS))
    path = tmp_path_factory.mktemp('cifar') / 'cifar-10-python.tar.gz'
    names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    with tarfile.open(path, 'w:gz') as tar:
        def add(name, content):
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for i, part in enumerate(np.array_split(np.arange(len(images)), 5), 1):
            add(f'data_batch_{i}', {b'data': images[part].reshape(len(part), -1), b'labels': labels[part].tolist()})
        add('test_batch', {b'data': images[:10].reshape(10, -1), b'labels': labels[:10].tolist()})
        add('batches.meta', {b'label_names': [name.encode() for name in names]})
    return path, images, labels


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """A folder of ImageNet classes: four pictures of each of the dogs and cats, one bird."""
    folder = tmp_path_factory.mktemp('imagenet') / 'train'
    rng = np.random.RandomState(1)
    for animal, count in (('dog', 4), ('cat', 4), ('bird', 1)):
        wnids = selection.animal_classes()[animal]['wnids'][:None if animal != 'bird' else 1]
        for wnid in wnids:
            (folder / wnid).mkdir(parents=True)
            for k in range(count):
                pixels = rng.randint(0, 256, [20, 24, 3]).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / wnid / f'{wnid}_{k}.JPEG')
    return folder


def first_of_each(labels, count, classes=range(10)):
    return np.concatenate([np.flatnonzero(labels == c)[:count] for c in classes])


def written(path):
    """(data set, dataset.json) of what a script wrote."""
    dataset = ImageDataset(path)
    return dataset, dataset.info


def test_size_takes_the_first_of_each_class(cifar, tmp_path):
    path, images, labels = cifar
    expected = first_of_each(labels, 5)
    for script, *option in (('dataset_tool', '--balanced'), ('dataset_size',)):
        dest = tmp_path / f'{script}.zip'
        invoke(f'data_utils/{script}.py', f'--source={path}', f'--dest={dest}', '--max-images=50', *option)
        dataset, info = written(dest)
        np.testing.assert_array_equal(dataset.images(range(50)), images[expected])
        assert dataset.label_ids.tolist() == sorted(labels[expected]) and dataset.class_names[5] == 'dog'
        assert info['selection'] == {'rule': 'size', 'max_images': 50, 'images': expected.tolist()}


def test_classes_that_are_too_small_give_what_they_have(tmp_path):
    """All scripts that take as many of each class, and say how many there are."""
    for name, count in (('cat', 3), ('dog', 7)):
        (tmp_path / 'set' / name).mkdir(parents=True)
        for k in range(count):
            PIL.Image.new('RGB', (8, 8), (k, count, 0)).save(tmp_path / 'set' / name / f'{k}.png')
    for script, *option in (('dataset_size',), ('dataset_tool', '--balanced'), ('dataset_unique',), ('dataset_random',)):
        dest = tmp_path / f'{script}.zip'
        args = [f'--source={tmp_path}/set', f'--dest={dest}', *option]
        out = invoke(f'data_utils/{script}.py', *args, '--max-images=10')
        dataset, info = written(dest)
        assert 'only 8 such images, of each class [3, 5]' in out and info['selection']['images'] == [*range(8)]
        assert script in ('dataset_unique', 'dataset_random') or dataset.class_counts.tolist() == [3, 5]
    assert 'such images' not in invoke(f'data_utils/{script}.py', *args, '--max-images=6', '--overwrite')


@pytest.mark.parametrize('count', [50, 3, 1000])
def test_the_tool_takes_the_first_images_as_published(cifar, tmp_path, count):
    path, images, labels = cifar
    invoke('data_utils/dataset_tool.py', f'--source={path}', f'--dest={tmp_path}/first.zip', f'--max-images={count}')
    dataset, info = written(tmp_path / 'first.zip')
    np.testing.assert_array_equal(dataset.images(range(len(dataset))), images[:count])
    assert dataset.label_ids.tolist() == labels[:count].tolist() and dataset.class_names[5] == 'dog'
    assert info['selection']['rule'] == 'first images'


def test_without_a_size_the_tool_takes_everything_in_order(cifar, tmp_path):
    path, images, labels = cifar
    invoke('data_utils/dataset_tool.py', f'--source={path}', f'--dest={tmp_path}/c-16x16-20.zip', '--resolution=16x16')
    dataset, info = written(tmp_path / 'c-16x16-20.zip')
    assert len(dataset) == len(images) and dataset.resolution == 16 and info['selection']['rule'] == 'all'
    np.testing.assert_array_equal(dataset.label_ids, labels)


def test_diversity_takes_few_classes(cifar, tmp_path):
    path, images, labels = cifar
    out = invoke('data_utils/dataset_diversity.py', f'--source={path}', f'--dest={tmp_path}/3.zip', '--max-images=20',
                 '--num-classes=3')
    dataset, _ = written(tmp_path / '3.zip')
    assert np.bincount(dataset.label_ids).tolist() == [6, 6, 8] and dataset.label_dim == 3 and 'Note' not in out
    np.testing.assert_array_equal(dataset.images([0]), images[np.flatnonzero(labels == 0)[:1]])
    out = invoke('data_utils/dataset_diversity.py', f'--source={path}', f'--dest={tmp_path}/2.zip', '--max-images=100',
                 '--num-classes=2')
    assert 'only 24' in out and len(ImageDataset(tmp_path / '2.zip')) == 24


def test_random_and_unique_labels(cifar, tmp_path):
    path, images, labels = cifar
    invoke('data_utils/dataset_random.py', f'--source={path}', f'--dest={tmp_path}/r.zip', '--max-images=30', '--num-classes=4')
    invoke('data_utils/dataset_random.py', f'--source={path}', f'--dest={tmp_path}/s.zip', '--max-images=30', '--seed=7')
    invoke('data_utils/dataset_unique.py', f'--source={path}', f'--dest={tmp_path}/u.zip', '--max-images=30')
    expected = first_of_each(labels, 3)
    for name, wanted, classes in (('r', selection.random_labels(30, 4), 4), ('s', selection.random_labels(30, 10, 7), 10),
                                  ('u', list(range(30)), 30)):
        dataset, info = written(tmp_path / f'{name}.zip')
        assert dataset.label_ids.tolist() == wanted and dataset.label_dim == classes and dataset.class_names is None
        np.testing.assert_array_equal(dataset.images(range(30)), images[expected])
        assert info['selection']['images'] == expected.tolist()


def read_list(path):
    rows = [line.split('\t') for line in path.read_text().splitlines() if not line.startswith('#')]
    return [name for name, _ in rows], {int(label) for _, label in rows}


def test_animals_of_imagenet_are_spread_evenly(imagenet, tmp_path):
    out = invoke('data_utils/sample_imagenet.py', f'--source={imagenet}', f'--dest={tmp_path}/dog.txt', '--num=130')
    names, labels = read_list(tmp_path / 'dog.txt')
    assert labels == {5} and len(set(names)) == 130 and 'Note' not in out
    by_wnid = {}
    for name in names:
        assert (tmp_path / name).is_file()
        by_wnid.setdefault(name.split('/')[-2], set()).add(name.rpartition('_')[2])
    wnids = selection.animal_classes()['dog']['wnids']
    assert [by_wnid[wnid] for wnid in wnids] == [{'0.JPEG', '1.JPEG'}] * 7 + [{'0.JPEG'}] * 116
    assert names != sorted(names)
    invoke('data_utils/sample_imagenet.py', f'--source={imagenet}', f'--dest={tmp_path}/again.txt', '--num=130')
    assert read_list(tmp_path / 'again.txt')[0] == names
    invoke('data_utils/sample_imagenet.py', f'--source={imagenet}', f'--dest={tmp_path}/other.txt', '--num=130', '--seed=1')
    assert sorted(read_list(tmp_path / 'other.txt')[0]) == sorted(names) != read_list(tmp_path / 'other.txt')[0]


def test_too_few_pictures_are_said_aloud(imagenet, tmp_path):
    out = invoke('data_utils/sample_imagenet.py', f'--source={imagenet}', f'--dest={tmp_path}/b.txt', '--class=bird',
                 '--num=20')
    assert '17 of 17 classes' in out and len(read_list(tmp_path / 'b.txt')[0]) == 1


def test_intra_diversity_step_by_step(cifar, imagenet, tmp_path, monkeypatch):
    """The commands of the study in a folder of its own, on small data: paths are found as they are written there."""
    path, images, labels = cifar
    monkeypatch.chdir(tmp_path)
    invoke('data_utils/sample_imagenet.py', f'--source={imagenet}', '--num=10')
    invoke('data_utils/intra_diversity.py', '--source=datasets/imagenet/dog_10.txt',
           '--dest=datasets/imagenet/imagenet_dog_10-32x32.zip', '--resolution=32x32', '--transform=center-crop')
    invoke('data_utils/intra_diversity.py', f'--source={path}', '--dest=datasets/cifar10/cifar10_dog_10-32x32.zip',
           '--class-num=5', '--max-images=10')
    invoke('data_utils/intra_diversity.py', '--source=datasets/cifar10/cifar10_dog_10-32x32.zip',
           '--dest=datasets/cifar10/intra_diversity/mixture_0.9_10.zip', '--max-images=10', '--inter-rate=0.9')
    dogs, dogs_info = written('datasets/cifar10/cifar10_dog_10-32x32.zip')
    np.testing.assert_array_equal(dogs.images(range(10)), images[np.flatnonzero(labels == 5)[:10]])
    assert set(dogs.label_ids) == {5} and dogs_info['selection']['class_num'] == 5
    others, _ = written('datasets/imagenet/imagenet_dog_10-32x32.zip')
    mixed, info = written('datasets/cifar10/intra_diversity/mixture_0.9_10.zip')
    count = int(10 * (1 - 0.9))                              # 0: computed in floating point, as published
    assert list(info['selection']['counts'].values()) == [count, 10 - count] == [0, 10]
    np.testing.assert_array_equal(mixed.images(range(10)), others.images(range(10)))
    assert set(mixed.label_ids) == {5} and mixed.class_names[5] == 'dog'
    invoke('data_utils/intra_diversity.py', '--source=datasets/cifar10/cifar10_dog_10-32x32.zip', '--dest=half.zip',
           '--max-images=8', '--inter-rate=0.5', '--inter-source=datasets/imagenet/imagenet_dog_10-32x32.zip')
    half, _ = written('half.zip')
    np.testing.assert_array_equal(half.images(range(8)), np.concatenate([dogs.images(range(4)), others.images(range(4))]))


def test_the_real_pictures(real_data, tmp_path):
    """From another working directory, as users run it."""
    source = real_data / 'cifar10-small' / 'cifar-10-python.tar.gz'
    run('data_utils/dataset_tool.py', f'--source={source}', '--dest=x/cifar10-16x16-2000.zip', '--resolution=16x16',
        '--max-images=500', '--balanced', cwd=tmp_path)
    dataset = ImageDataset(tmp_path / 'x' / 'cifar10-16x16-2000.zip')
    assert np.bincount(dataset.label_ids).tolist() == [50] * 10 and dataset.class_names[5] == 'dog'


@pytest.mark.parametrize('place', ['downloads/imagenet/train', 'datasets/imagenet/ILSVRC/Data/CLS-LOC/train',
                                   'elsewhere/ILSVRC/Data/CLS-LOC/train'])
def test_imagenet_is_found_where_its_archive_puts_it(imagenet, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(imagenet)
    given = ['--source=elsewhere'] if place.startswith('elsewhere') else []
    assert '10 images of 10 classes' in invoke('data_utils/sample_imagenet.py', '--num=10', *given)
    names, _ = read_list(tmp_path / 'datasets' / 'imagenet' / 'dog_10.txt')
    assert all((tmp_path / 'datasets' / 'imagenet' / name).samefile(imagenet / name.split('/')[-2] / name.split('/')[-1])
               for name in names)


@pytest.mark.parametrize('name, label', [('dog_6.txt', 5), ('imagenet-cat.txt', 3), ('bird_2000.txt', 2),
                                         ('category.txt', None)])
def test_a_list_of_paths_alone_has_the_class_of_its_name(cifar, imagenet, tmp_path, name, label):
    paths = sorted(imagenet.glob('n02*/*.JPEG'))[:6]
    (tmp_path / name).write_text('\n'.join(map(str, paths)))
    convert = ['--resolution=32x32', '--transform=center-crop']
    invoke('data_utils/intra_diversity.py', f'--source={tmp_path}/{name}', f'--dest={tmp_path}/list.zip', *convert)
    dataset = ImageDataset(tmp_path / 'list.zip')
    assert dataset.has_labels == (label is not None) and set(dataset.label_ids) == {label or 0}
    invoke('data_utils/intra_diversity.py', f'--source={cifar[0]}', f'--dest={tmp_path}/mixed.zip', '--inter-rate=0.5',
           f'--inter-source={tmp_path}/{name}', '--max-images=8', *convert)
    mixed = ImageDataset(tmp_path / 'mixed.zip')
    expected = cifar[2][:4].tolist() + [label] * 4
    assert not mixed.has_labels if label is None else mixed.label_ids.tolist() == expected


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_lists_with_missing_images_are_refused(imagenet, tmp_path):
    invoke('data_utils/sample_imagenet.py', f'--source={imagenet}', f'--dest={tmp_path}/list.txt', '--num=5')
    text = (tmp_path / 'list.txt').read_text()
    (tmp_path / 'list.txt').write_text(text + 'nowhere/dog.JPEG\t5\n')
    error = fails('data_utils/intra_diversity.py', f'--source={tmp_path}/list.txt', f'--dest={tmp_path}/out/x.zip',
                  '--resolution=32x32', '--transform=center-crop')
    assert 'nowhere/dog.JPEG' in error and not (tmp_path / 'out').exists()


def test_an_unknown_class_and_a_list_that_is_there(tmp_path, imagenet):
    source, dest = f'--source={imagenet}', tmp_path / 'x.txt'
    assert 'horse' in fails('data_utils/sample_imagenet.py', source, '--class=horse', f'--dest={dest}') and not dest.exists()
    dest.touch()
    assert 'exists' in fails('data_utils/sample_imagenet.py', source, f'--dest={dest}')


def test_what_is_selected_is_on_record(cifar, tmp_path):
    invoke('data_utils/dataset_diversity.py', f'--source={cifar[0]}', f'--dest={tmp_path}/folder', '--max-images=4',
           '--num-classes=2')
    info = json.loads((tmp_path / 'folder' / 'dataset.json').read_text())
    assert info['selection']['images'] == first_of_each(cifar[2], 2, range(2)).tolist()
    assert info['labels'][-1] == ['00000/img00000003.png', 1] and info['source'] == cifar[0].name
