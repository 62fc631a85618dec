"""combine_data.py: one correct .npz of all class files, whatever the file system and the records say."""

import errno
import json
import os
import shutil
import zipfile
import zlib

import numpy as np
import pytest
from helpers import fails, run, script_module
from synthetic import CLASSES, COMBINE, GENERATE, invoke, limited, options, write_classes

from dnnlib import UserError
from dnnlib.npz import open_array
from synthetic_data import class_files
from synthetic_data.class_files import ClassFile, write_npz
from synthetic_data.mixture import GeneratedImages


def test_combine_as_written(tmp_path):
    arrays = write_classes(tmp_path / 'out', [5, 3, 8])
    result = run(COMBINE, '--data_dir', './out', '--output_dir', './npz', '--class_num', '3', cwd=tmp_path,
                 PYTHONPROFILEIMPORTTIME='1')
    assert 'class_files' in result.stderr and 'numpy' not in result.stderr  # NumPy would take a third of the time
    with np.load(tmp_path / 'npz' / '5m.npz') as z:
        assert z.files == ['image', 'label'] and z['label'].dtype == np.int64
        np.testing.assert_array_equal(z['image'], np.concatenate(arrays))
        np.testing.assert_array_equal(z['label'], np.repeat([0, 1, 2], [5, 3, 8]))
    assert os.listdir(tmp_path / 'npz') == ['5m.npz']


def combined(folder, dest, count=CLASSES):
    """The images of a folder of classes, as np.load reads them from a correct zip."""
    invoke(COMBINE, f'--data_dir={folder}', f'--output_dir={dest}', f'--class_num={count}', '--file_name=all.npz')
    with zipfile.ZipFile(dest / 'all.npz') as z:
        assert z.testzip() is None
    with np.load(dest / 'all.npz', allow_pickle=False) as z:
        counts = [len(np.load(folder / f'{label}.npy')) for label in range(count)]
        assert z['label'].tolist() == np.repeat(range(count), counts).tolist()
        for name in z.files:
            np.testing.assert_array_equal(open_array(str(dest / 'all.npz'), name), z[name])
        return z['image']


def in_files(folder, count=CLASSES):
    return np.concatenate([np.load(folder / f'{label}.npy') for label in range(count)])


def recorded(folder):
    return [ClassFile.open(f'{folder}/{label}.npy').recorded_crc32() != 0 for label in range(CLASSES)]


@pytest.mark.parametrize('change', ['nothing', 'older version', 'no record', 'later'])
def test_class_files_need_no_record(made, tmp_path, change):
    out = tmp_path / 'out'
    shutil.copytree(made, out)
    record = json.loads((out / '1.json').read_text())
    if change == 'older version':
        del record['crc32'], record['class']
        (out / '1.json').write_text(json.dumps(record))
    elif change == 'no record':
        (out / '1.json').unlink()
    elif change == 'later':                                    # as of a copy without times
        os.utime(out / '1.npy')
    assert recorded(out) == [True, change in ('nothing', 'later'), True]
    np.testing.assert_array_equal(combined(out, tmp_path / 'npz'), in_files(out))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[500] ^= 4
    path.write_bytes(data)


def exchange(out, ending):
    for old, new in ((0, 'x'), (1, 0), ('x', 1)):
        os.rename(out / f'{old}{ending}', out / f'{new}{ending}')


CHANGES = {
    'a flipped bit': (lambda out: flip_a_bit(out / '1.npy'), 'wrong CRC'),
    'another number': (lambda out: np.save(out / '1.npy', np.ones([21, 8, 8, 3], np.uint8)), 'another number of images'),
    'exchanged': (lambda out: exchange(out, '.npy'), 'wrong CRC'),
    'exchanged with their records': (lambda out: [exchange(out, ending) for ending in ('.npy', '.json')], 'another class'),
    'a record that is none': (lambda out: (out / '1.json').write_text('[]'), '1.json is damaged')}


@pytest.mark.parametrize('change', CHANGES)
def test_images_that_are_not_what_their_record_says_are_refused(made, tmp_path, change, monkeypatch):
    out = tmp_path / 'out'
    shutil.copytree(made, out)
    function, message = CHANGES[change]
    function(out)
    arguments = [f'--data_dir={out}', f'--output_dir={tmp_path}/npz', f'--class_num={CLASSES}', '--file_name=all']
    assert message in fails(COMBINE, *arguments)
    with pytest.raises(UserError, match=message):              # select_1M.py and training
        GeneratedImages(str(out), CLASSES)
    monkeypatch.delattr(os, 'copy_file_range', raising=False)  # where the kernel does not copy
    assert message in fails(COMBINE, *arguments)
    assert not os.path.exists(tmp_path / 'npz/all.npz')
    if message == 'wrong CRC':
        monkeypatch.undo()
        invoke(COMBINE, *arguments, '--verify=False')
        monkeypatch.setenv('SKIP_CHECKSUMS', '1')
        assert len(GeneratedImages(str(out), CLASSES)) == 60


def test_images_that_changed_are_not_taken_over_when_more_are_made(network, made, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(made, out)
    flip_a_bit(out / '2.npy')
    assert '2.npy is not what its record' in fails(GENERATE, *options(network, out, '--seeds=0-21'))
    assert 'wrong CRC' in fails(COMBINE, f'--data_dir={out}', f'--output_dir={out}', f'--class_num={CLASSES}')


@pytest.mark.parametrize('refusal', [errno.EXDEV, errno.ENOSYS, None, 'missing'])
def test_file_systems_that_do_not_copy(made, tmp_path, refusal, monkeypatch):
    """An error in the middle, no byte copied, or no such function at all: the files are read and written."""
    calls, real = [], getattr(os, 'copy_file_range', None)

    def copy(source, dest, count, start, offset):
        calls.append(count)
        if len(calls) > 1 and refusal:
            raise OSError(refusal, 'refused')
        return real(source, dest, 333, start, offset) if len(calls) == 1 and real else 0

    if refusal == 'missing':
        monkeypatch.delattr(os, 'copy_file_range', raising=False)
    else:
        monkeypatch.setattr(os, 'copy_file_range', copy, raising=False)
    np.testing.assert_array_equal(combined(made, tmp_path / 'npz'), in_files(made))
    assert bool(calls) == (refusal != 'missing')


def test_other_errors_of_copying_are_told(made, tmp_path, monkeypatch):
    def copy(*_):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(os, 'copy_file_range', copy, raising=False)
    assert 'all.npz cannot be written' in fails(COMBINE, f'--data_dir={made}', f'--output_dir={tmp_path}/npz',
                                                '--class_num=3', '--file_name=all')
    assert os.listdir(tmp_path / 'npz') == []


def test_a_file_that_shrinks_while_it_is_copied(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / 'out')
    script = script_module(COMBINE)
    real = script.write_npz
    monkeypatch.setattr(script, 'write_npz', lambda *args: os.truncate(tmp_path / 'out' / '1.npy', 200) or real(*args))
    assert '1.npy is cut short' in fails(COMBINE, f'--data_dir={tmp_path}/out', f'--output_dir={tmp_path}/npz',
                                         '--class_num=3', '--file_name=all')
    assert os.listdir(tmp_path / 'npz') == []


def test_headers_of_another_version(tmp_path):
    arrays = write_classes(tmp_path, [4, 6])
    with open(tmp_path / '1.npy', 'wb') as file:
        np.lib.format.write_array(file, arrays[1], version=(2, 0))
    np.testing.assert_array_equal(combined(tmp_path, tmp_path / 'npz', 2), np.concatenate(arrays))


def test_combine_joins_folders_of_other_seeds_only(network, made, tmp_path):
    more = tmp_path / 'more'
    invoke(GENERATE, *options(network, more, '--seeds=20-22'))
    arguments = [f'--data_dir={made}', f'--data_dir={more}', '--class_num=3', f'--output_dir={tmp_path}', '--file_name=all']
    invoke(COMBINE, *arguments)
    with np.load(tmp_path / 'all.npz') as z:
        assert len(z['image']) == 3 * 23
        np.testing.assert_array_equal(z['image'][20:23], np.load(more / '0.npy'))
        np.testing.assert_array_equal(z['image'][23:43], np.load(made / '1.npy'))
    invoke(GENERATE, *options(network, more, '--seeds=5-7'))
    assert 'seeds 5-7' in fails(COMBINE, *arguments)


def test_checksums_of_parts_make_that_of_the_whole():
    data = np.random.RandomState(0).bytes(10000)
    for cut in (0, 1, 4321, 10000):
        parts = zlib.crc32(data[:cut]), zlib.crc32(data[cut:])
        assert class_files.combine_crc32(*parts, 10000 - cut) == zlib.crc32(data)


def test_a_full_disk(made, tmp_path):
    result = limited(COMBINE, 5000, f'--data_dir={made}', f'--output_dir={tmp_path}/out', '--class_num=3', '--file_name=all')
    assert result.returncode == 1 and result.stderr.startswith(f'Error: {tmp_path}/out/all.npz cannot be written')
    assert len(result.stderr.strip().splitlines()) == 1 and os.listdir(tmp_path / 'out') == []


def test_a_failing_read_leaves_no_file(tmp_path):
    def parts():
        yield bytes(4 * 4 * 3)
        raise OSError(28, 'No space left on device')

    with pytest.raises(UserError, match='a.npz cannot be written'):
        write_npz(str(tmp_path / 'a.npz'), (4, 4, 3), [5], parts())
    assert os.listdir(tmp_path) == []


def test_bad_class_files(tmp_path):
    write_classes(tmp_path / 'out', [3, 3, 3])
    path = tmp_path / 'out' / '1.npy'
    good = path.read_bytes()
    base = [f'--data_dir={tmp_path}/out', f'--output_dir={tmp_path}/x', '--file_name=all', '--class_num=3']
    for value, words in ((np.zeros([3, 8, 8, 3], np.uint8), '[8, 8, 3]'), (np.zeros([3, 4, 4, 3]), '<f8'),
                         (np.zeros([3, 4, 4], np.uint8), '[3, 4, 4]'), (np.zeros([0, 4, 4, 3], np.uint8), '[0, 4, 4, 3]'),
                         (np.zeros([3], 'u1,u1'), 'it holds objects'), (b'nothing', '1.npy is no .npy'),
                         (good[:20], 'header is damaged'), (good[:-5], 'cut short')):
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            np.save(path, value)
        line = fails(COMBINE, *base)
        assert words in line and '1.npy' in line
    assert not (tmp_path / 'x').exists()
