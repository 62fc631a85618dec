"""Anybody's images: labels of file names, arrays, folders of classes, tables of Hugging Face; one way to open them all."""

import json
import os
import sys
import types
import zipfile

import numpy as np
import PIL.Image
import pytest
import tiny
from helpers import fails, invoke

from dnnlib import UserError
from dnnlib.image_io import encode_png
from training import phema
from training.data import sources, tables
from training.data.dataset import ImageDataset
from training.data.images import holds_images, open_dataset, open_images

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
PLANES = IMAGES.transpose(0, 3, 1, 2)


def convert(path, tmp_path, *more):
    """The data set made of a source, and what was printed."""
    text = invoke('dataset_tool.py', 'convert', f'--source={path}', f'--dest={tmp_path}/made.zip', '--overwrite',
                  '--workers=1', *more)
    return ImageDataset(tmp_path / 'made.zip'), text


def write(folder, names, make=lambda: encode_png(IMAGES[0])):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make())
    return folder


# --- Labels --------------------------------------------------------------------------------------


def test_file_names_give_labels_where_they_are_unmistakable(tmp_path):
    named = write(tmp_path / 'named', ['dog_2.png', 'dog_10.png', 'cat_1.png', 'cat_7.png'])
    data, text = convert(named, tmp_path)
    assert data.class_names == ['cat', 'dog'] and data.label_ids.tolist() == [0, 0, 1, 1]
    assert 'before the first underscore in the names of files (cat, dog); choose labels none' in text
    for choice in ('none', 'folders', 'json'):
        if choice == 'none':
            assert not convert(named, tmp_path, '--labels=none')[0].has_labels
        else:
            assert '--labels' in fails('dataset_tool.py', 'convert', f'--source={named}', f'--dest={tmp_path}/x.zip',
                                       f'--labels={choice}')
    wnids = write(tmp_path / 'wnids', [f'{wnid}_{k}.png' for wnid in ('n02085620', 'n01440764') for k in (1, 2)])
    assert convert(wnids, tmp_path)[0].classes == [0, 151]


@pytest.mark.parametrize('names', [
    ['IMG_1.png', 'IMG_2.png', 'DSC_1.png', 'DSC_2.png'], ['cat_1.png', 'cat_2.png', 'dog_1.png', 'dog_b.png']])
def test_file_names_that_may_be_no_classes_are_asked_about(names, tmp_path):
    data, text = convert(write(tmp_path / 'in', names), tmp_path)
    assert not data.has_labels and 'is not taken for classes; choose labels names' in text
    assert convert(tmp_path / 'in', tmp_path, '--labels=names')[0].label_ids.tolist() == [0, 0, 1, 1]
    write(tmp_path / 'in', ['x.png'])
    assert 'x.png has no class before an underscore' in fails(
        'dataset_tool.py', 'convert', f'--source={tmp_path}/in', f'--dest={tmp_path}/x.zip', '--labels=names')
    assert not convert(tmp_path / 'in', tmp_path)[0].has_labels


@pytest.mark.parametrize('inside, written', [
    ('{}.png', './{}.png'), ('{}.png', '/{}.png'), ('{}.png', '.\\{}.png'), ('a/{}.png', 'mine//a/{}.png')])
def test_foreign_names_in_dataset_json_are_found(inside, written, tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        for k in range(3):
            z.writestr(inside.format(k), encode_png(IMAGES[k]))
        pairs = [(written.format(k), 2 - k) for k in range(3)]
        z.writestr('dataset.json', json.dumps({'labels': dict(pairs) if inside == '{}.png' else pairs}))
    assert ImageDataset(tmp_path / 'x.zip').label_ids.tolist() == [2, 1, 0]


def test_folders_without_images_and_zips_in_zips_are_named(tmp_path):
    write(tmp_path / 'in', ['cat/0.png', 'cat/1.PNG', 'dog/0.png', 'emu/Thumbs.db', '.git/x.png', 'dog/.x.png'])
    (tmp_path / 'in' / 'fox').mkdir()
    data, text = convert(tmp_path / 'in', tmp_path)
    assert data.class_names == ['cat', 'dog'] and 'no images in emu, fox, which are no classes' in text
    with zipfile.ZipFile(tmp_path / 'zips.zip', 'w') as z:
        z.writestr('a.zip', b'PK')
    assert 'holds 1 zips and no images; unpack them' in fails(
        'dataset_tool.py', 'convert', f'--source={tmp_path}/zips.zip', f'--dest={tmp_path}/x.zip')


# --- Arrays --------------------------------------------------------------------------------------


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize('names, key', [
    (('arr_0', 'arr_1'), None), (('image', 'label'), None), (('images', 'labels'), None), (('x_train', 'y_train'), None),
    (('train_images', 'train_labels'), None), (('x_val', 'y_val'), 'x_val'), (('foo', 'bar'), 'foo+bar')])
def test_npz_of_any_names_is_converted_measured_and_trained_on(names, key, tmp_path):
    path = save(tmp_path / 'x.npz', **{names[0]: IMAGES, names[1]: LABELS[:, None].astype(np.uint8), 'other': LABELS})
    full = f'{path}:{key}' if key else path
    more = [f'--key={key}'] if key else []
    data, text = convert(path, tmp_path, *more)
    assert data.label_ids.tolist() == LABELS.tolist() and ('the file also has other' in text) == (key is None)
    for opened in (data, open_images(full), open_dataset(full), open_dataset(str(tmp_path / 'made.zip'))):
        assert np.array_equal(opened.images(np.arange(6)), PLANES) and opened.label_ids.tolist() == LABELS.tolist()
    flipped = open_dataset(full, use_labels=False, max_size=2, seed=3, xflip=True)
    expected = ImageDataset(tmp_path / 'made.zip', use_labels=False, max_size=2, seed=3, xflip=True)
    assert len(flipped) == 4 and np.array_equal(flipped.images(range(4)), expected.images(range(4)))
    assert open_dataset(full).name == ('x-' + key if key else 'x') and holds_images(full)


def test_npz_and_npy_that_are_unclear_or_damaged_are_one_line(tmp_path):
    two = save(tmp_path / 'two.npz', foo=IMAGES, bar=IMAGES)
    np.save(tmp_path / 'floats.npy', IMAGES / 255)
    (tmp_path / 'cut.npy').write_bytes((tmp_path / 'floats.npy').read_bytes()[:200])
    statistics = save(tmp_path / 'fid.npz', mu=np.zeros(3), sigma=np.eye(3))
    assert not holds_images(statistics) and not holds_images(save(tmp_path / 'v.npz', arr_0=IMAGES, mu=1, sigma=1))
    for path, key, message in (
            (two, None, 'has the arrays foo, bar; name the one with the images'), (two, 'nix', 'there are foo, bar'),
            (tmp_path / 'floats.npy', None, 'float64 [6, 8, 8, 3] instead of uint8'), (tmp_path / 'cut.npy', None, 'cut.npy'),
            (statistics, None, 'fid.npz'), (save(tmp_path / 'neg.npz', x=IMAGES, y=LABELS - 1), None, 'label -1')):
        more = [f'--key={key}'] if key else []
        line = fails('dataset_tool.py', 'convert', f'--source={path}', f'--dest={tmp_path}/x.zip', *more)
        assert message in line and (key is None or '--key' in line)
    assert 'has no array nix' in fails('calculate_metrics.py', 'ref', f'--data={two}', '--key=nix', f'--dest={tmp_path}/r.pkl')


def test_folders_of_classes_and_gray_arrays(tmp_path):
    for label in (10, 2, 0):
        np.save(tmp_path / f'{label}.npy', IMAGES[:label // 5 + 1])
    data, _ = convert(tmp_path, tmp_path)
    assert data.classes == [0, 2, 10] and data.class_names == ['0', '2', '10'] and len(data) == 5
    assert np.array_equal(data.images([2, 3, 4]), PLANES[:3])
    opened = open_dataset(str(tmp_path))
    assert opened.label_ids.tolist() == [0, 1, 2, 2, 2] and opened.class_index('10') == 2
    assert open_images(str(tmp_path / '2.npy')).image_shape == (3, 8, 8)
    gray = save(tmp_path / 'gray.npz', x_train=IMAGES[..., 0], y_train=LABELS)
    np.testing.assert_array_equal(open_images(gray).images([1])[0, 0], IMAGES[1, :, :, 0])
    digits = open_dataset('digits', max_size=5)
    assert len(digits) == 5 and digits.label_dim == 10 and len(digits.fingerprint) == 32
    assert len(open_dataset(f'{gray},{gray}')) == 12
    os.mkfifo(tmp_path / '1.npy')
    assert '1.npy: no such file' in fails('dataset_tool.py', 'convert', f'--source={tmp_path}', f'--dest={tmp_path}/x.zip')


@pytest.mark.parametrize('name', ['arrays.npz:image', 'classes'])
def test_every_script_takes_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save('arrays.npz', image=IMAGES, label=LABELS)
    os.mkdir('classes')
    for label in range(3):
        np.save(f'classes/{label}.npy', IMAGES[label::3])
    invoke('train_edm2.py', '--preset=digits', '--channels=16', '--batch=8', '--outdir=run', f'--data={name}', '--duration=8',
           '--status=8', '--snapshot=8', '--checkpoint=0')
    assert 'classes' in invoke('dataset_tool.py', 'inspect', f'--source={name}', '--dest=sheet.png')
    net = 'run/network-snapshot-0000000-0.100.pkl'
    for command in (['memorization', f'--images={name}', f'--data={name}'],
                    ['gen', f'--net={net}', f'--ref={name}', '--num=4', '--metrics=fd_pixels', '--steps=2']):
        invoke('calculate_metrics.py', *command)
    invoke('mem_ratio.py', '--expdir=run', '--seeds=0-1', '--steps=2')


# --- Pictures of several sizes -------------------------------------------------------------------


def test_pictures_of_several_sizes_are_measured_but_not_by_pixels(tmp_path):
    (tmp_path / 'in').mkdir()
    for k in range(5):
        PIL.Image.fromarray(RANDOM.randint(0, 256, (8 + k // 2, 9, 3), np.uint8)).save(tmp_path / 'in' / f'{k}.png')
    tiny.save_tiny_dinov2(tmp_path / 'dino')
    common = [f'--images={tmp_path}/in', f'--ref={tmp_path}/in', '--batch=4']
    text = invoke('calculate_metrics.py', 'calc', *common, '--metrics=fd_dinov2', f'--dinov2={tmp_path}/dino')
    assert '5 images against' in text and float(text.split('fd_dinov2')[1].split()[0]) < 1e-3
    line = fails('calculate_metrics.py', 'calc', *common, '--metrics=fd_pixels')
    assert 'pictures of several sizes' in line and 'fd_dinov2' in line
    assert 'equal in shape' in fails('train_edm2.py', '--preset=digits', f'--outdir={tmp_path}/run', f'--data={tmp_path}/in')


# --- Tables of Hugging Face ----------------------------------------------------------------------


def table(pa, count=6, names=('cat', 'dog', 'emu')):
    """A table as the package `datasets` writes it."""
    values = [{'bytes': encode_png(IMAGES[k]), 'path': f'{k}.png'} for k in range(count)]
    made = pa.table({'id': list(range(count)), 'image': values, 'label': LABELS[:count]})
    features = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': list(names)}}
    return made.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': features}})})


def save_arrow(pa, path, made, **options):
    with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_stream(
            file, made.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(made, max_chunksize=4)


@pytest.fixture
def hub(tmp_path):
    """Data sets on the disk, in all layouts: parquet and `save_to_disk`, with splits and without."""
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    folder = tmp_path / 'hub'
    for name in ('parquet/data', 'saved', 'both/train', 'both/test'):
        (folder / name).mkdir(parents=True)
    pq.write_table(table(pa), folder / 'one.parquet', row_group_size=4)
    for name, rows in (('train-00000-of-00002', 4), ('train-00001-of-00002', 2), ('test-00000-of-00001', 3)):
        pq.write_table(table(pa, rows), folder / 'parquet' / 'data' / f'{name}.parquet')
    for name in ('saved', 'both/train', 'both/test'):
        save_arrow(pa, folder / name / 'data-00000-of-00001.arrow', table(pa))
        (folder / name / 'state.json').write_text('{"_indices_data_files": null}')
    (folder / 'both' / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
    return folder


@pytest.mark.parametrize('name', ['one.parquet', 'parquet:train', 'saved', 'both:test'])
def test_data_sets_of_hugging_face_on_the_disk(hub, name, tmp_path):
    data, _ = convert(hub / name, tmp_path)
    assert data.class_names == ['cat', 'dog', 'emu'] and len(data) == 6
    expected = [0, 1, 2, 3, 0, 1] if name == 'parquet:train' else range(6)
    opened = open_dataset(str(hub / name))
    for made in (data, opened):
        assert np.array_equal(made.images(np.arange(6)), PLANES[expected])
        assert made.label_ids.tolist() == LABELS[expected].tolist()
    assert ': row ' in opened.where(5) and opened.fingerprint != open_dataset(str(hub / name), max_size=3).fingerprint
    assert '6 images against' in invoke('calculate_metrics.py', 'calc', f'--images={hub / name}', f'--ref={hub / name}',
                                        '--metrics=fd_pixels')


def test_tables_that_are_unclear_or_hold_no_pictures_are_one_line(hub, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({'text': ['a'], 'label': [0]}), hub / 'words.parquet')
    pq.write_table(pa.table({'image': [{'bytes': None, 'path': '/etc/passwd'}] * 2}, schema=pa.schema(
        {'image': pa.struct({'bytes': pa.binary(), 'path': pa.string()})})), hub / 'paths.parquet')
    pq.write_table(table(pa, names=('a', 'b')), hub / 'few.parquet')
    (hub / 'cut.parquet').write_bytes((hub / 'one.parquet').read_bytes()[:300])
    save_arrow(pa, hub / 'packed.arrow', table(pa), compression='zstd')
    (hub / 'saved' / 'state.json').write_text('{"_indices_data_files": [{"filename": "x"}]}')
    for name, message in (
            ('parquet', 'has the splits test, train; name one'), ('both:dev', 'has no split dev; there are'),
            ('one.parquet:train', 'has no splits'), ('words.parquet', 'no column of encoded pictures; there are text'),
            ('paths.parquet', 'row 0 names a picture, but does not hold it'), ('few.parquet', 'label is not a class'),
            ('cut.parquet', 'cut.parquet is damaged'), ('packed.arrow', 'compressed batches'),
            ('saved', 'flatten_indices')):
        assert message in fails('dataset_tool.py', 'convert', f'--source={hub / name}', f'--dest={tmp_path}/x.zip')


def test_offsets_out_of_an_arrow_file_are_found(hub, tmp_path):
    """Each byte of the places of pictures is changed: one line, or the same pictures."""
    data = (hub / 'saved' / 'data-00000-of-00001.arrow').read_bytes()
    start = data.index(np.int32([0, len(encode_png(IMAGES[0]))]).tobytes())
    for place in range(start, start + 12):
        (tmp_path / 'bad.arrow').write_bytes(data[:place] + bytes([data[place] ^ 0xA0]) + data[place + 1:])
        try:
            source = sources.open_source(str(tmp_path / 'bad.arrow'))
            assert sum(len(source.read(k)) for k in range(len(source))) < 10 * len(data)
        except UserError as error:
            assert 'bad.arrow' in str(error)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    (tmp_path / 'x.parquet').write_bytes(b'PAR1')
    for name, source, message in (('pyarrow', tmp_path / 'x.parquet', 'pip install pyarrow'),
                                  ('datasets', 'hf:owner/pets:train', 'the network: pip install datasets')):
        monkeypatch.setitem(sys.modules, name, None)
        assert message in fails('dataset_tool.py', 'convert', f'--source={source}', f'--dest={tmp_path}/x.zip')
    old = types.SimpleNamespace(__version__='14.0.0', ipc=None, parquet=None)
    for name in ('pyarrow', 'pyarrow.ipc', 'pyarrow.parquet'):
        monkeypatch.setitem(sys.modules, name, old)
    with pytest.raises(UserError, match='may run code of a file; install 14.0.1'):
        tables.pyarrow('x')


class Rows:
    """What this project uses of the package's data sets."""

    def __init__(self, made):
        self.made = made
        self.features = types.SimpleNamespace(arrow_schema=made.schema)

    def __len__(self):
        return len(self.made)

    def __getitem__(self, rows):
        return self.made[rows]

    def with_format(self, _):
        return self

    def select_columns(self, names):
        return Rows(self.made.select(names))


def test_the_hub_is_reached_by_its_package(tmp_path, monkeypatch):
    pa = pytest.importorskip('pyarrow')
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == 'owner/none':
            raise ConnectionError('no route\nto the hub')
        return Rows(table(pa)) if split else {'train': Rows(table(pa)), 'test': None}

    package = types.SimpleNamespace(__version__='3.1.0', load_dataset=load_dataset,
                                    config=types.SimpleNamespace(HF_CACHE_HOME=str(tmp_path)))
    monkeypatch.setitem(sys.modules, 'datasets', package)
    data, _ = convert('hf:owner/pets:train', tmp_path)
    assert np.array_equal(data.images(range(6)), PLANES) and data.class_names == ['cat', 'dog', 'emu']
    assert asked == [('owner/pets', 'train')] and open_dataset('hf:owner/pets:train').name == 'pets-train'
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path)
    for name, message in (('hf:owner/pets', 'has the splits train, test; name one'), ('hf:here', 'without hf:'),
                          ('hf:owner/none:train', 'cannot be loaded (no route to the hub); it needs the network')):
        assert message in fails('dataset_tool.py', 'convert', f'--source={name}', f'--dest={tmp_path}/x.zip')


def test_copies_of_a_snapshot_have_no_average():
    with pytest.raises(UserError, match='two of the snapshots are of one time'):
        phema.solve_coefficients([16, 16], [0.05, 0.05], 16, [0.1])
