"""The data room: orders, transforms, reading pictures, archives and data sets."""

import errno
import io
import json
import os
import pickle
import re
import struct
import subprocess
import threading
import zipfile

import numpy as np
import PIL.Image
import pytest
from golden_cases import FOLDER, cases, ids, variants
from helpers import ROOT, write_digits

from dnnlib import UserError, budget, image_io, util
from dnnlib.image_io import BadImage, LargeImage, decode_image, encode_png
from dnnlib.util import subset
from torch_utils.files import pickles
from torch_utils.random import tuple_seed
from training.data import archive, imagenet, report
from training.data.archive import ArchiveReader, ArchiveWriter, image_name, latent_name
from training.data.batches import DatasetBatches
from training.data.dataset import ImageDataset, class_index, class_indices
from training.data.sampler import EpochShuffle, WindowShuffle
from training.data.sources import open_source
from training.data.transforms import make_transform, resize_stack
from training.encoders import make_encoder


def arrays(case):
    return list(case.json['arrays'])


# --- orders


def stream(arguments, key):
    """The indices that a key of the golden file names, e.g. 'edm.rank1.window0.5', by the project's samplers."""
    n, seed, count = arguments['dataset_length'], arguments['seed'], arguments['count']
    part = dict(re.fullmatch(r'([a-z_]+)(.*)', item).groups() for item in key.split('.', 2)[1].split('.'))
    rank, step = (int(part['rank']), arguments['num_replicas']) if 'rank' in part else (0, 1)
    shuffle = not key.endswith('noshuffle')
    if key.startswith('edm2.'):
        start = int(re.search(r'start(\d+)', key)[1]) if 'start' in key else 0
        return EpochShuffle(n, seed, shuffle).indices(start + rank + step * np.arange(count))
    window = float(re.search(r'window([\d.]+)', key)[1]) if 'window' in key else 0.5
    order = WindowShuffle(n, seed, shuffle, window)
    positions = rank + step * np.arange(count)
    # In unequal parts, with a return to the start, and from the middle: what a training run and its resumption ask for.
    parts = np.split(positions, [n + 3, n + 10])
    first = [order.indices(part) for part in parts if len(part)]
    again = np.concatenate([order.indices(part) for part in parts if len(part)])
    np.testing.assert_array_equal(np.concatenate(first), again)
    np.testing.assert_array_equal(WindowShuffle(n, seed, shuffle, window).indices(positions[count // 2:]),
                                  again[count // 2:])
    return again


@pytest.mark.parametrize('case,key', variants('math', 'infinite_sampler*', arrays), ids=ids)
def test_endless_orders_are_those_of_edm_and_edm2(case, key):
    arguments = case.json['arguments']
    if key == 'edm2.epoch_seed':
        out = [tuple_seed(arguments['seed'], epoch) for epoch in range(len(case.arrays[key]))]
    elif key == 'edm2.epoch':
        out = np.arange(len(case.arrays[key]))
    else:
        out = stream(arguments, key)
    np.testing.assert_array_equal(out, case.arrays[key])


@pytest.mark.parametrize('case', cases('math', 'infinite_sampler*'), ids=ids)
def test_seeds_of_tuples(case):
    for key, expected in case.json['tuple_hash_mod_2_31'].items():
        assert tuple_seed(*json.loads(key.replace('(', '[').replace(')', ']'))) == expected


def test_epochs_visit_every_image_once():
    order = EpochShuffle(10, seed=3)
    epochs = order.indices(np.arange(50)).reshape(5, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert (order.indices([[49, 0], [7, 31]]) == epochs.reshape(-1)[[[49, 0], [7, 31]]]).all()


@pytest.mark.parametrize('case,key', variants('math', 'dataset_max_size*', arrays), ids=ids)
def test_size_limit(case, key):
    n, size, seed = map(int, re.fullmatch(r'n(\d+)\.max(\d+)\.seed(\d+)', key).groups())
    np.testing.assert_array_equal(subset(n, size, seed), case.arrays[key])


# --- transforms and pictures


def transform_keys(case):
    return [key for key in arrays(case) if not key.endswith('.decoded')]


@pytest.mark.parametrize('case,key', variants('math', 'image_transforms*', transform_keys), ids=ids)
def test_transforms_are_pixel_exact(case, key):
    picture, rule, size = key.split('.')
    width, height = [None if part == 'None' else int(part) for part in (size.split('x') * 2)[:2]]
    out = make_transform(None if rule == 'resize' else rule, width, height)(case.arrays[f'{picture}.decoded'])
    np.testing.assert_array_equal(out, case.arrays[key])


@pytest.mark.parametrize('case', cases('math', 'image_transforms*'), ids=ids)
def test_pictures_that_are_too_small_are_rejected(case):
    for picture, facts in case.json['images'].items():
        for key, value in facts.items():
            if key.startswith('wide'):
                width = int(key.removeprefix('wide'))
                assert value == 'rejected'
                assert make_transform('center-crop-wide', width, width * 3 // 4)(case.arrays[f'{picture}.decoded']) is None


@pytest.mark.parametrize('case', cases('math', 'image_transforms*'), ids=ids)
def test_decoding_of_jpeg_files(case):
    for picture in case.json['images']:
        file = FOLDER / 'math' / 'images' / f'{picture}.jpg'
        if not file.exists():
            pytest.skip(f'{file} is not there')
        difference = decode_image(file.read_bytes()).astype(int) - case.arrays[f'{picture}.decoded']
        assert abs(difference).max() <= 2  # JPEG decoders round differently


@pytest.mark.parametrize('before', [8, 28, 32, 33, 64])
@pytest.mark.parametrize('side', [8, 16, 32, 64, 128])
def test_images_resized_together_are_those_resized_alone(before, side):
    stack = np.random.RandomState(0).randint(256, size=(9, before, before, 3), dtype=np.uint8)
    stack[0] = stack[0] // 128 * 255
    alone = [make_transform(None, side, side)(image) for image in stack]
    np.testing.assert_array_equal(resize_stack(stack, side, side), alone)


@pytest.mark.parametrize('name,width,height', [('nonsense', 8, 8), ('center-crop', 8, None), ('center-crop-dhariwal', 8, 16),
                                               ('center-crop-wide', 8, 16)])
def test_impossible_transforms(name, width, height):
    with pytest.raises(UserError, match=f'transform={name}'):
        make_transform(name, width, height)


def pixels(height=6, width=9, seed=0):
    return np.random.RandomState(seed).randint(256, size=(height, width, 3), dtype=np.uint8)


def saved(image, **kwargs):
    file = io.BytesIO()
    image.save(file, **{'format': 'png'} | kwargs)
    return file.getvalue()


@pytest.mark.parametrize('shape', [(1, 1), (8, 8), (6, 9), (200, 300)])
def test_own_png_is_png(shape):
    image = pixels(*shape)
    data = encode_png(image)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        opened.verify()
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), image)
    np.testing.assert_array_equal(decode_image(data), image)
    gray = encode_png(image[:, :, 0])
    np.testing.assert_array_equal(decode_image(gray), image[:, :, :1].repeat(3, axis=2))
    for level in (0, 9):  # other writers filter rows, which the short path leaves to Pillow
        np.testing.assert_array_equal(decode_image(saved(PIL.Image.fromarray(image), compress_level=level)), image)


@pytest.mark.parametrize('options', [{'compress_level': 0}, {}, {'optimize': True}], ids=str)
@pytest.mark.parametrize('side', [1, 32, 147])
def test_pngs_of_other_writers_are_read_as_pillow_reads_them(side, options):
    smooth = PIL.Image.fromarray(pixels(6, 6)).resize((side, side + 3))  # rows are filtered in all ways
    for image in (smooth, smooth.convert('L')):
        data = saved(image, **options)
        assert image_io._is_plain_png(data)
        np.testing.assert_array_equal(decode_image(data), np.asarray(image.convert('RGB')))


def test_without_pyspng_pillow_reads_the_same(monkeypatch):
    data = saved(PIL.Image.fromarray(pixels()))
    monkeypatch.setattr(image_io, 'pyspng', None)
    np.testing.assert_array_equal(decode_image(data), pixels())


def test_what_is_left_to_pillow():
    """All that may change pixels, and every file with a wrong checksum, which pyspng does not look at."""
    image = PIL.Image.fromarray(pixels(32, 32))
    good = saved(image)
    wrong = good[:200] + bytes([good[200] ^ 1]) + good[201:]
    chunk = image_io._chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))
    huge = image_io._SIGNATURE + chunk + good[33:]
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    others = [saved(image.quantize(16)), saved(image, transparency=(0, 0, 0)), saved(image, exif=exif),
              saved(image, format='gif'), wrong, good[:-20], b'']
    assert image_io._is_plain_png(good) and not any(map(image_io._is_plain_png, others))
    with pytest.raises(BadImage, match='damaged image'):
        decode_image(wrong)
    with pytest.raises(LargeImage, match='60000 x 60000'):
        decode_image(huge)


def test_a_large_picture_is_refused_with_its_size_and_read_if_allowed(monkeypatch):
    image = PIL.Image.fromarray(pixels(12, 9))
    files = [saved(image, format=name) for name in ('png', 'jpeg', 'webp', 'tiff', 'gif', 'bmp')] + [
        saved(image.quantize(16)), encode_png(pixels(12, 9))]
    for data in files:
        monkeypatch.setenv(budget.PIXELS_VARIABLE, '107')
        with pytest.raises(LargeImage, match='9 x 12 = 108 pixels, and at most 107') as error:
            decode_image(data)
        assert 'damaged' not in str(error.value) and error.value.field == 'max_pixels'
        monkeypatch.setenv(budget.PIXELS_VARIABLE, '108')
        assert decode_image(data).shape == (12, 9, 3)


def test_every_mode_becomes_rgb():
    image = PIL.Image.fromarray(pixels())
    rgb, gray = np.asarray(image), np.asarray(image.convert('L'))
    gray3 = gray[:, :, None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode_image(saved(image.convert('L'))), gray3)
    palette = image.quantize(16)
    np.testing.assert_array_equal(decode_image(saved(palette)), np.asarray(palette.convert('RGB')))
    cmyk = image.convert('CMYK')
    np.testing.assert_array_equal(decode_image(saved(cmyk, format='tiff')), np.asarray(cmyk.convert('RGB')))
    deep = PIL.Image.fromarray(gray.astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(decode_image(saved(deep)), gray3)
    bits = PIL.Image.fromarray(gray > 128)
    np.testing.assert_array_equal(decode_image(saved(bits)), (gray3 > 128) * np.uint8(255))
    clear = image.copy()
    clear.putalpha(PIL.Image.fromarray(np.where(np.arange(9) < 4, 0, 255).astype(np.uint8)[None].repeat(6, axis=0)))
    out = decode_image(saved(clear))
    assert (out[:, :4] == 255).all() and (out[:, 4:] == rgb[:, 4:]).all()  # transparent parts are white


def test_exif_orientation_is_applied():
    image = PIL.Image.fromarray(pixels())
    for orientation, turned in ((3, np.rot90(pixels(), 2)), (6, np.rot90(pixels(), -1)), (8, np.rot90(pixels(), 1))):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode_image(saved(image, exif=exif)), turned)


def test_what_is_no_picture_is_refused():
    image = PIL.Image.fromarray(pixels(64, 64))
    jpeg, png = saved(image, format='jpeg'), saved(image)
    floats = PIL.Image.fromarray(np.ones((4, 4), np.float32))
    postscript = saved(image, format='eps')
    own = encode_png(pixels(64, 64))
    broken = own[:200] + bytes([own[200] ^ 1]) + own[201:]
    for data in (b'', b'text', jpeg[:len(jpeg) // 2], png[:len(png) // 2], own[:3000], broken, saved(floats, format='tiff'),
                 postscript):
        with pytest.raises(BadImage) as error:
            decode_image(data)
        assert '\n' not in str(error.value)


# --- archives


def test_archives_appear_only_when_complete(tmp_path):
    for dest in (tmp_path / 'a.zip', tmp_path / 'a'):
        with pytest.raises(RuntimeError), ArchiveWriter(dest) as out:
            out.add('x', b'1')
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []
        with ArchiveWriter(dest) as out:
            out.add(image_name(1), b'1')
            out.add(image_name(0), b'22')
            out.add_description({'labels': None})
        reader = ArchiveReader(dest)
        assert reader.names == [image_name(0), image_name(1), 'dataset.json']
        assert [reader.read(i) for i in range(2)] == [b'22', b'1'] and reader.size(0) == 2
        with pytest.raises(UserError, match='overwrite'):
            ArchiveWriter(dest)
        with ArchiveWriter(dest, overwrite=True) as out:
            out.add('c', b'3')
        assert ArchiveReader(dest).names == ['c']
        os.remove(dest) if dest.is_file() else os.rename(dest, tmp_path.parent / 'moved')


@pytest.mark.parametrize('limit,count', [(0xFFFFFFFF, 3), (100, 3), (0xFFFFFFFF, 70000)])
def test_zips_of_any_size_are_zips(tmp_path, monkeypatch, limit, count):
    """With a low limit for 32-bit offsets, and with more files than 16 bits count."""
    monkeypatch.setattr(archive._StoredZip, 'limit', limit)
    with ArchiveWriter(tmp_path / 'a.zip') as out:
        for i in range(count):
            out.add(f'ä/{i:05d}', b'%d' % i * 20)
    with zipfile.ZipFile(tmp_path / 'a.zip') as z:
        assert len(z.namelist()) == count and (count > 10 or z.testzip() is None)
        assert z.read(f'ä/{count - 1:05d}') == b'%d' % (count - 1) * 20
        info = z.infolist()[-1]
        assert info.external_attr >> 16 == 0o100644 and info.compress_type == zipfile.ZIP_STORED
        assert (info.extract_version == 45) == (limit == 100)
    reader = ArchiveReader(tmp_path / 'a.zip')
    assert reader.read(count - 1) == b'%d' % (count - 1) * 20 and reader.names[1] == 'ä/00001'


@pytest.mark.parametrize('limit', [0xFFFFFFFF, 3000])
@pytest.mark.parametrize('side,first', [(8, 5), (8, 99_999_998), (150, 0)])
def test_files_added_together_are_those_added_alone(tmp_path, monkeypatch, limit, side, first):
    """Also beyond the limit of 32-bit offsets, with names of two lengths, in several blocks."""
    monkeypatch.setattr(archive._StoredZip, 'limit', limit)
    images = np.random.RandomState(0).randint(256, size=(6, side, side, 3), dtype=np.uint8)
    names = [image_name(first + i) for i in range(6)]
    files, crcs = image_io.encode_pngs(images)
    with ArchiveWriter(tmp_path / 'together.zip') as out:
        out.add_alike(names, files, crcs)
    with ArchiveWriter(tmp_path / 'alone.zip') as out:
        for name, image in zip(names, images, strict=True):
            out.add(name, encode_png(image))
    assert (tmp_path / 'together.zip').read_bytes() == (tmp_path / 'alone.zip').read_bytes()
    with zipfile.ZipFile(tmp_path / 'together.zip') as z:
        assert z.testzip() is None and z.namelist() == names


@pytest.mark.parametrize('method', ['add', 'close'])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, method):
    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(archive._StoredZip, method, full)
    with pytest.raises(UserError, match='a.zip cannot be written.*No space'), ArchiveWriter(tmp_path / 'a.zip') as out:
        out.add('x', b'1')
    assert not list(tmp_path.iterdir())


def test_overwrite_spares_folders_that_are_no_data_set(tmp_path):
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'text').write_text('x')
    with pytest.raises(UserError, match='no data set'):
        ArchiveWriter(tmp_path / 'thesis', overwrite=True)
    (tmp_path / 'empty').mkdir()
    with ArchiveWriter(tmp_path / 'empty') as out:
        out.add('a', b'1')
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='dest'):
        ArchiveWriter(tmp_path / 'file' / 'x.zip')


def test_compressed_and_hidden_files_in_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('k/x', b'1' * 1000)
        z.writestr('__MACOSX/k/._x', b'2')
        z.writestr('k/.DS_Store', b'3')
    reader = ArchiveReader(tmp_path / 'a.zip')
    assert reader.names == ['k/x'] and reader.read(0) == b'1' * 1000
    assert pickle.loads(pickle.dumps(reader)).read(0) == b'1' * 1000


def link_in_zip(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize('name', ['../x.png', 'a/../../x.png', '/etc/x.png', link_in_zip('x.png')], ids=str)
def test_names_that_leave_the_zip_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr(name, b'/etc/passwd')
    with pytest.raises(UserError, match='outside the zip'):
        ArchiveReader(tmp_path / 'a.zip')


def test_damaged_zips_are_named(tmp_path):
    path = write_digits(tmp_path / 'a.zip', 5)
    data = bytearray((tmp_path / 'a.zip').read_bytes())
    data[200] ^= 255  # within the pixels of the first image
    (tmp_path / 'a.zip').write_bytes(data)
    with pytest.raises(UserError, match='a.zip: 00000/img00000000.png is damaged'):
        ImageDataset(path)
    (tmp_path / 'a.zip').write_bytes(data[:-100])
    with pytest.raises(UserError, match='not a readable zip'):
        ImageDataset(path)
    with pytest.raises(UserError, match='does not exist'):
        ImageDataset(tmp_path / 'b.zip')


@pytest.mark.parametrize('name', ['thesis', '00000/notes.txt', '00000/img00000000.jpg', 'a/img00000007.png', '.secret',
                                  '00000/img00000009.png'])
def test_overwrite_of_a_folder_removes_only_a_data_set(tmp_path, name):
    """Nothing else that is in it, and no link (the last name); also what came while it was written."""
    dest, mine = tmp_path / 'data', tmp_path / 'data' / name

    def add_mine():
        mine.parent.mkdir(exist_ok=True)
        if name.endswith('9.png'):
            (tmp_path / 'mine').write_text('x')
            mine.symlink_to(tmp_path / 'mine')
        else:
            mine.write_text('x')

    write_digits(dest, 3)
    with pytest.raises(UserError, match=f'holds {re.escape(name)}, which is no part'), \
            ArchiveWriter(dest, overwrite=True) as out:
        out.add(image_name(0), b'1')
        add_mine()
    with pytest.raises(UserError, match=f'holds {re.escape(name)}, which is no part'):
        ArchiveWriter(dest, overwrite=True)
    assert mine.read_text() == 'x' and len(list(dest.rglob('*.png'))) >= 3
    mine.unlink()
    with ArchiveWriter(dest, overwrite=True) as out:
        out.add(image_name(0), b'1')
    assert ArchiveReader(dest).names == [image_name(0)]


def test_overwrite_does_not_follow_a_link(tmp_path):
    write_digits(tmp_path / 'data', 3)
    (tmp_path / 'link').symlink_to(tmp_path / 'data')
    with pytest.raises(UserError, match='is a link to a folder'):
        ArchiveWriter(tmp_path / 'link', overwrite=True)


def test_links_that_lead_out_of_a_folder_are_not_followed_unless_asked(tmp_path, monkeypatch):
    """Links within it are, the folder itself may be one, and hard links are files."""
    data, other = tmp_path / 'data', tmp_path / 'other'
    for folder in (data / 'a', other):
        folder.mkdir(parents=True)
        (folder / 'x.png').write_bytes(encode_png(pixels()))
    (data / 'a' / 'y.png').symlink_to('x.png')
    (data / 'a' / 'loop').symlink_to(data)
    os.link(other / 'x.png', data / 'a' / 'z.png')
    (tmp_path / 'link').symlink_to(data)
    monkeypatch.setenv(util.STAY_INSIDE, '1')
    for path in (data, tmp_path / 'link'):
        assert ArchiveReader(path).names == ['a/x.png', 'a/y.png', 'a/z.png']
    for name, target in (('a/file.png', other / 'x.png'), ('folder', other), ('a/gone', '../../nowhere')):
        (data / name).symlink_to(target)
        with pytest.raises(UserError, match=f'a link that leads out of the folder, e.g. {name}') as error:
            ArchiveReader(data)
        assert error.value.field == 'follow_links'
        monkeypatch.delenv(util.STAY_INSIDE)
        ArchiveReader(data)
        monkeypatch.setenv(util.STAY_INSIDE, '1')
        (data / name).unlink()


def test_links_in_folders_are_followed_once(tmp_path):
    (tmp_path / 'set' / 'a').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'x.png').write_bytes(encode_png(pixels()))
    (tmp_path / 'set' / 'b').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'set' / 'a' / 'loop').symlink_to(tmp_path / 'set')
    assert ArchiveReader(tmp_path / 'set').names == ['b/x.png']


# --- data sets


@pytest.mark.parametrize('cache', [True, False])
def test_images_and_labels(tmp_path, cache):
    data = ImageDataset(write_digits(tmp_path / 'digits.zip', 50), cache=cache)
    assert (data.name, len(data), data.resolution, data.num_channels, data.label_dim) == ('digits', 50, 8, 3, 10)
    assert data.image_shape == (3, 8, 8) and data.has_labels
    images = data.images([3, 3, 49, 0])
    assert images.shape == (4, 3, 8, 8) and images.dtype == np.uint8 and images.flags.writeable
    reader = ArchiveReader(tmp_path / 'digits.zip')
    for image, name in zip(images, ('3', '3', '49', '0'), strict=True):
        pixels = decode_image(reader.read(reader.find(image_name(int(name)))))
        np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))
    images[:] = 0  # a copy: the next reader sees the data
    assert data.images([3]).any()
    assert (data.labels([3, 4]).argmax(axis=1) == data.label_ids[[3, 4]]).all() and (data.labels([3]).sum(axis=1) == 1).all()
    assert data.where(7).endswith('00000/img00000007.png')
    with pytest.raises(IndexError):
        data.images([50])


def test_labels_can_be_hidden_or_absent(tmp_path):
    for data in (ImageDataset(write_digits(tmp_path / 'a.zip', 5), use_labels=False),
                 ImageDataset(write_digits(tmp_path / 'b.zip', 5, labels=False))):
        assert data.label_dim == 0 and not data.has_labels and data.labels([1, 2]).shape == (2, 0)
        assert data.label_ids.tolist() == [0] * 5 and data.stored_labels is None
        with pytest.raises(UserError, match='no classes'):
            data.class_index('3')


def test_size_limit_and_mirror(tmp_path):
    path = write_digits(tmp_path / 'a.zip', 50)
    whole, part = ImageDataset(path), ImageDataset(path, max_size=20, seed=7, xflip=True)
    assert len(part) == 40
    chosen = subset(50, 20, 7)
    np.testing.assert_array_equal(part.images(np.arange(20)), whole.images(chosen))
    np.testing.assert_array_equal(part.images(20 + np.arange(20)), whole.images(chosen)[:, :, :, ::-1])
    np.testing.assert_array_equal(part.label_ids, np.tile(whole.label_ids[chosen], 2))


def test_data_sets_travel_to_other_processes_and_threads(tmp_path):
    data = ImageDataset(write_digits(tmp_path / 'a.zip', 50))
    expected = data.images(np.arange(50))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).images(np.arange(50)), expected)
    fresh, errors = ImageDataset(data.path), []

    def read():
        for _ in range(20):
            order = np.random.permutation(50)
            if not (fresh.images(order) == expected[order]).all():
                errors.append('other pixels')

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    child = os.fork()  # shares the descriptor, and must not share the position
    if child == 0:
        os._exit(0 if (data.images(np.arange(50)) == expected).all() else 1)
    for _ in range(20):
        assert (ImageDataset(data.path, cache=False).images(np.arange(50)) == expected).all()
    assert os.waitpid(child, 0)[1] == 0


def write_latents(path, arrays, **description):
    with ArchiveWriter(path) as out:
        for i, array in enumerate(arrays):
            file = io.BytesIO()
            np.save(file, array)
            out.add(latent_name(i), file.getvalue())
        out.add_description({'labels': None} | description)
    return str(path)


def test_latents(tmp_path):
    stored = np.random.RandomState(0).randn(5, 8, 4, 4).astype(np.float32)
    data = ImageDataset(write_latents(tmp_path / 'a.zip', stored, encoder={'name': 'sd-vae'}))
    assert (data.num_channels, data.resolution, data.dtype) == (8, 4, np.float32)
    np.testing.assert_array_equal(data.images([4, 0, 2]), stored[[4, 0, 2]])
    assert data.description()['encoder'] == {'name': 'sd-vae'}
    with pytest.raises(UserError, match='mirrored'):
        ImageDataset(data.path, xflip=True)
    half = ImageDataset(write_latents(tmp_path / 'b', stored.astype(np.float16)))
    assert half.images([1]).dtype == np.float32
    np.testing.assert_allclose(half.images([1]), stored[[1]], rtol=1e-3, atol=1e-3)
    for bad in (np.array(['x']), np.zeros([4, 4], np.float32), np.zeros([8, 4, 4], np.int32)):
        path = write_latents(tmp_path / f'{bad.dtype.kind}{bad.ndim}.zip', [bad])
        with pytest.raises(UserError, match='img-mean-std-00000000.npy'):
            ImageDataset(path)


def write_images(path, images, **description):
    with ArchiveWriter(path) as out:
        for i, image in enumerate(images):
            out.add(image_name(i), encode_png(image))
        out.add_description({'labels': None} | description)
    return str(path)


def test_malformed_data_sets_are_named(tmp_path):
    square = [pixels(8, 8, seed) for seed in range(3)]
    name = [image_name(i) for i in range(3)]
    bad = {
        'equal in shape': dict(images=[*square, pixels(16, 16)]),
        'no label for 1 of 3': dict(images=square, labels=[[name[0], 0], [name[1], 1]]),
        'whole numbers': dict(images=square, labels=[[n, -1] for n in name]),
        'list of': dict(images=square, labels=[1, 2, 3]),
        'names 1 classes': dict(images=square, labels=[[n, 1] for n in name], classes=[7]),
        'no images': dict(images=[]),
    }
    for i, (message, content) in enumerate(bad.items()):
        with pytest.raises(UserError, match=message) as error:
            ImageDataset(write_images(tmp_path / f'{i}.zip', **content))
        assert f'{i}.zip' in str(error.value) and '\n' not in str(error.value)
    with ArchiveWriter(tmp_path / 'json.zip') as out:
        out.add('a.png', encode_png(square[0]))
        out.add('dataset.json', b'{')
    with pytest.raises(UserError, match='dataset.json is no valid JSON'):
        ImageDataset(tmp_path / 'json.zip')


def test_vector_labels(tmp_path):
    vectors = [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    images = [pixels(8, 8, seed) for seed in range(2)]
    data = ImageDataset(write_images(tmp_path / 'a.zip', images, labels=[[image_name(i), v] for i, v in enumerate(vectors)]))
    assert data.label_dim == 3 and data.label_ids.tolist() == [1, 0]
    np.testing.assert_array_equal(data.labels([1, 0]), np.float32([vectors[1], vectors[0]]))


def test_classes_are_found_by_number_name_and_wnid():
    sim3 = imagenet.SIMILARITY_LEVELS['sim3']
    description = {'name': 'x', 'label_dim': 10, 'classes': list(sim3), 'class_names': [imagenet.classes()[i][1] for i in sim3],
                   'wnids': [imagenet.classes()[i][0] for i in sim3]}
    assert class_index(description, '171') == class_index(description, 171) == 0
    assert class_index(description, 'n02093754') == class_index(description, 'border TERRIER') == 1
    assert class_index(description, 'standard_schnauzer') == 2
    with pytest.raises(UserError, match=r"class '0' .* 171 \(Italian greyhound\), 182"):
        class_index(description, '0')
    numbered = {'name': 'x', 'label_dim': 3, 'classes': [0, 1, 2], 'class_names': ['2', '4', '1']}
    assert [class_index(numbered, text) for text in ('2', '4', '1', '0')] == [0, 1, 2, 0]
    plain = {'name': 'x', 'label_dim': 10, 'classes': None, 'class_names': None, 'wnids': None}
    assert class_index(plain, '7') == 7
    assert class_indices(plain, '7,0-2') == [7, 0, 1, 2]
    assert class_indices({'name': 'x', 'label_dim': 3, 'class_names': ['tench, a fish', '1-2', 'ant']},
                         'tench, a fish') == [0]
    assert class_indices({'name': 'x', 'label_dim': 3, 'class_names': ['a', '1-2', 'ant']}, '1-2,0') == [1, 0]
    for text in ('3-1', '7,ant'):
        with pytest.raises(UserError):
            class_indices(plain, text)
    for text in ('10', '-1', 'cat'):
        with pytest.raises(UserError, match='which has: 0, 1, 2'):
            class_index(plain, text)
    cranes = {'name': 'x', 'label_dim': 2, 'classes': [134, 517], 'class_names': ['crane', 'crane']}
    with pytest.raises(UserError, match=r'ambiguous.*\[134, 517\]'):
        class_index(cranes, 'crane')
    assert class_index(cranes, '517') == 1


def test_summary_and_contact_sheet(tmp_path):
    data = ImageDataset(write_digits(tmp_path / 'a.zip', 300))
    summary = report.summarize(data)
    images = data.images(np.arange(300)).astype(np.float64)
    np.testing.assert_allclose(summary['mean'], images.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(summary['std'], images.std(axis=(0, 2, 3)), rtol=1e-9)
    assert sum(summary['counts']) == summary['measured'] == 300 and json.dumps(summary)
    sheet, columns, names = report.contact_sheet(data, columns=4)
    assert sheet.shape == (40, 3, 8, 8) and columns == 4 and names == [str(i) for i in range(10)]
    np.testing.assert_array_equal(sheet[4], data.images([np.flatnonzero(data.label_ids == 1)[0]])[0])
    latents = np.random.RandomState(0).randn(3, 8, 4, 4).astype(np.float32)
    latents[1, 0, 0, 0] = np.nan
    data = ImageDataset(write_latents(tmp_path / 'b.zip', latents), finite=False)
    summary = report.summarize(data)
    assert summary['nonfinite'] == 1 and summary['nonfinite_files'] == [f'{tmp_path}/b.zip: {latent_name(1)}']
    np.testing.assert_allclose(summary['mean'], latents[[0, 2]].mean(axis=(0, 2, 3)), rtol=1e-5)
    sheet, columns, names = report.contact_sheet(data)
    assert sheet.shape == (3, 3, 4, 4) and columns == 3 and names is None


def test_latents_that_are_not_finite_are_refused_by_the_name_of_their_file(tmp_path):
    os.makedirs(tmp_path / '00000')
    for index in range(300):
        latents = np.zeros([8, 4, 4], np.float32)
        latents[0, 0, 0] = np.inf if index == 299 else np.nan if index == 150 else 0
        np.save(tmp_path / latent_name(index), latents)
    with pytest.raises(UserError, match='00000150.npy has values that are not finite'):
        ImageDataset(tmp_path)                          # in the sample
    np.save(tmp_path / latent_name(150), np.zeros([8, 4, 4], np.float32))
    data = ImageDataset(tmp_path)
    with pytest.raises(UserError, match='00000299.npy has values that are not finite'):
        data.images([0, 299])
    batches = DatasetBatches(data, make_encoder({'name': 'rgb'}), 'cpu')
    with pytest.raises(UserError, match='00000299.npy has values that are not finite'):
        list(batches.iterate([(start, 50) for start in range(0, 300, 50)]))


def test_a_label_far_beyond_the_images_is_refused_unless_the_classes_have_names(tmp_path):
    path = write_images(tmp_path / 'a', np.zeros([2, 4, 4, 3], np.uint8), labels=[[image_name(0), 0], [image_name(1), 10**6]])
    listed = tmp_path / 'list.txt'
    listed.write_text(''.join(f'{path}/{image_name(i)}\t{i * 10**6}\n' for i in range(2)))
    for open_it in (lambda: ImageDataset(path), lambda: open_source(path), lambda: open_source(str(listed))):
        with pytest.raises(UserError, match='has a label 1000000, but 2 images'):
            open_it()
    description = json.loads((tmp_path / 'a/dataset.json').read_text())
    (tmp_path / 'a/dataset.json').write_text(json.dumps(description | {'classes': list(range(10**6 + 1))}))
    assert ImageDataset(path).label_dim == 10**6 + 1
    with pytest.raises(UserError, match='line 1: label .* is not a whole number'):
        listed.write_text(f'{path}/{image_name(0)}\t{10**30}\n')
        open_source(str(listed))


@pytest.mark.parametrize('label', ['NaN', '-Infinity', '1e999', '1e39'])
def test_labels_that_are_not_finite_are_refused(tmp_path, label):
    write_images(tmp_path / 'a', np.zeros([3, 4, 4, 3], np.uint8))
    (tmp_path / 'a/dataset.json').write_text(
        f'{{"labels": [["{image_name(0)}", [0, 1]], ["{image_name(1)}", [1, {label}]], ["{image_name(2)}", [1, 0]]]}}')
    for open_it in (ImageDataset, lambda path: open_source(str(path))):
        with pytest.raises(UserError, match='dataset.json: 1 of 3 labels are not finite .*00000001.png'):
            open_it(tmp_path / 'a')


# --- classes of the multi-source study


@pytest.mark.parametrize('case', cases('math', 'multisource_classes*'), ids=ids)
def test_similarity_levels(case):
    for name, level in case.json['similarity_names'].items():
        ours = imagenet.SIMILARITY_LEVELS[name.lower()]
        assert case.json['levels'][level] == {str(index): label for label, index in enumerate(ours)}
        wnids = {imagenet.classes()[index][0] for index in ours}
        for theirs in case.json['wnids_in_source'].get(level, {}).values():
            assert set(theirs) == wnids
    for name, classes in case.json['script_lists'].items():
        level, setup = name.split('_')
        ours = imagenet.SIMILARITY_LEVELS[level]
        script = f'source {ROOT}/bash_files/functions.sh {level}; echo $LEVEL'
        bash = subprocess.run(['bash', '-c', script], capture_output=True, text=True, check=True).stdout
        assert tuple(map(int, bash.split())) == ours
        # One-class sets of the class that all levels share are made once.
        assert set(classes) <= set(ours) if setup == '1c' else tuple(classes) == ours[:int(setup[:-1])]


def test_imagenet_table():
    assert len(imagenet.classes()) == 1000 and imagenet.classes()[171] == ('n02091032', 'Italian greyhound')
    wnids = [wnid for wnid, _ in imagenet.classes()]
    assert wnids == sorted(set(wnids)) and imagenet.index_of_wnid()['n02091032'] == 171


# --- pickles of others


class _Evil:
    def __reduce__(self):
        return os.system, ('touch /tmp/evil_pickle_ran',)


@pytest.mark.parametrize('value', [_Evil(), np.array([_Evil()], dtype=object), [{'data': _Evil()}]],
                         ids=['bare', 'array', 'nested'])
def test_foreign_pickles_run_nothing(value):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(pickles.ForeignPickleError, match='not allowed'):
            pickles.load(pickle.dumps(value, protocol), pickles.NUMPY_ARRAYS)
    assert not os.path.exists('/tmp/evil_pickle_ran')


def test_foreign_pickles_cannot_change_the_reader():
    state = b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x01xU\x01ysb.'  # sets an attribute of an allowed function
    with pytest.raises(pickles.ForeignPickleError, match='tries to change'):
        pickles.load(state, pickles.NUMPY_ARRAYS)
    for damaged in (b'', b'\x80\x02', b'nonsense', pickle.dumps({'a': 1})[:-3]):
        with pytest.raises(pickles.ForeignPickleError):
            pickles.load(damaged, pickles.NUMPY_ARRAYS)


@pytest.mark.parametrize('array', [np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(6, dtype='>f4').reshape(2, 3).T,
                                   np.zeros(3, bool), np.array(5.0)], ids=str)
def test_foreign_arrays(array):
    for protocol in range(2, 5):
        out = pickles.load(pickle.dumps({'x': array}, protocol), pickles.NUMPY_ARRAYS)['x'].array()
        assert out.dtype == array.dtype
        np.testing.assert_array_equal(out, array)
