"""Hostile files: what each tries, and what the scripts make of it.

    python tests/hostile.py FOLDER     makes them all in FOLDER, gives each to the scripts, prints one JSON line for each

Each line has the name, the exit code, the lines of error, the growth of memory in MiB and the seconds. Every file is
opened in a child that has limits of memory and of time, so that one that asks for much more than it should ends there.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 3 << 30            # bytes of address space beyond what the imports need
SECONDS = 10                # of the processor
CASES = {}                  # name -> (what it tries, function(path of the file to write), command line)


def case(what, command=('snapshot_tool.py', 'inspect', '{file}')):
    """Decorator: the function writes the hostile file `path`."""
    def register(function):
        CASES[function.__name__] = what, function, command
        return function
    return register


NET = ('generate_images.py', '--net={file}', '--outdir={out}', '--seeds=0', '--steps=1')
REF = ('calculate_metrics.py', 'calc', '--images={images}', '--ref={file}', '--metrics=fd_pixels')
DATA = ('calculate_metrics.py', 'ref', '--data={file}', '--dest={out}.pkl', '--metrics=fd_pixels')
SOURCE = ('dataset_tool.py', 'convert', '--source={file}', '--dest={out}.zip')
IMAGES = ('calculate_metrics.py', 'calc', '--images={file}', '--ref={images}', '--metrics=fd_pixels')
CONVERT = ('snapshot_tool.py', 'convert', '{file}', '--dest={out}')
PWNED = 'touch pwned'


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


# --- An assembler for pickles ----------------------------------------------------------------------------------------


def text(value):
    raw = value.encode()
    return b'X' + struct.pack('<I', len(raw)) + raw


def raw(value):
    return b'B' + struct.pack('<I', len(value)) + value


def name(module, attribute):
    return text(module) + text(attribute) + b'\x93'


def program(*parts):
    return b'\x80\x04' + b''.join(parts) + b'.'


def number(value):
    data = value.to_bytes(8, 'little', signed=True)
    return b'\x8a\x08' + data


def dictionary(**items):
    return b'}(' + b''.join(text(key) + value for key, value in items.items()) + b'u'


def ints(*values):
    return b'(' + b''.join(map(number, values)) + b't'


def persistent(class_name, state):
    """A persistent object of EDM whose attributes are the pickled `state`."""
    meta = dictionary(type=text('class'), version=number(6), module_src=text('import os; os.system("touch pwned")'),
                      class_name=text(class_name), state=state)
    return name('torch_utils.persistence', '_reconstruct_persistent_obj') + meta + b'\x85R'


def module(parameters=b'}', children=b'}', **more):
    return dictionary(_parameters=parameters, _buffers=b'}', _modules=children, **more)


def storage(count, dtype='FloatStorage', data=None):
    """The bytes of a storage in torch's older format, which says that it has `count` numbers."""
    reference = b'(' + text('storage') + f'ctorch\n{dtype}\n'.encode() + text('0') + text('cpu') + number(count) + b'NtQ'
    head = [pickle.dumps(0x1950a86a20f9469cfc6c, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2),
            b'\x80\x02' + reference + b'.', pickle.dumps(['0'], 2)]
    return b''.join(head) + struct.pack('<Q', count) + (bytes(4 * count) if data is None else data)


def tensor(stored: bytes, size, stride, offset=0):
    load = name('torch.storage', '_load_from_bytes') + raw(stored) + b'\x85R'
    return name('torch._utils', '_rebuild_tensor_v2') + b'(' + load + number(offset) + ints(*size) + ints(*stride) + \
        b'\x89}tR'


def edm(state):
    return program(dictionary(ema=persistent('EDMPrecond', state)))


def write(path, data):
    Path(path).write_bytes(data)


# --- Pickles: names and instructions ---------------------------------------------------------------------------------


@case('calls os.system when it is opened', NET)
def os_system(path):
    write(path, pickle.dumps(Call(os.system, PWNED)))


@case('calls builtins.eval inside the place of the network')
def builtins_eval(path):
    write(path, pickle.dumps({'ema': Call(eval, f'__import__("os").system({PWNED!r})')}))


@case('calls builtins.exec in an .npz-like dictionary of statistics', REF)
def builtins_exec(path):
    write(path, pickle.dumps({'mu': Call(exec, f'import os; os.system({PWNED!r})'), 'sigma': 1}))


@case('a pickle within a pickle, opened by _pickle.loads')
def nested_pickle(path):
    write(path, pickle.dumps({'ema': Call(pickle.loads, pickle.dumps(Call(os.system, PWNED)))}))


@case('a pickle within the bytes of a tensor, which the allowed function opens')
def nested_in_storage(path):
    evil = pickle.dumps(Call(os.system, PWNED))
    write(path, edm(module(dictionary(w=name('torch.storage', '_load_from_bytes') + raw(evil) + b'\x85R'))))


@case('an allowed module, but a name with dots that leads to os.system')
def dotted_name(path):
    write(path, program(name('torch_utils.persistence', 'dnnlib.os.system'), text(PWNED), b'\x85R'))


@case('attributes of an allowed function by dots: __globals__')
def dotted_globals(path):
    write(path, program(name('torch._utils', '_rebuild_tensor_v2.__globals__'), b'0}'))


@case('the class of an allowed name: OrderedDict.__class__')
def dotted_class(path):
    write(path, program(name('collections', 'OrderedDict.__class__')))


@case('a class of a module that exists in this project')
def own_class(path):
    write(path, program(name('training.loop', 'Trainer'), b')R'))


@case('a function of this project that writes files')
def own_function(path):
    write(path, program(name('dnnlib.util', 'write_bytes'), b'(', text('pwned'), raw(b'x'), b'tR'))


@case('torch.load without weights_only, named by the older GLOBAL instruction')
def torch_load(path):
    write(path, b'\x80\x02ctorch\nload\n(X\x05\x00\x00\x00pwnedtR.')


@case('importlib.import_module of a module that does not exist, in the oldest protocol')
def protocol_zero(path):
    write(path, b"\x80\x00cimportlib\nimport_module\n(Vantigravity\ntR.")


@case('a name that is no text')
def name_is_number(path):
    write(path, program(number(1), number(2), b'\x93'))


@case('a name of 3 MB with line breaks and terminal codes, for the message')
def name_for_the_screen(path):
    write(path, program(name('x\nError: all is well\x1b[2J' * 100_000, 'y')))


@case('instruction EXT1 (the registry of copyreg)')
def ext1(path):
    write(path, program(b'\x82\x01'))


@case('instruction EXT4')
def ext4(path):
    write(path, program(b'\x84\x01\x00\x00\x00'))


@case('instruction INST')
def inst(path):
    write(path, b'\x80\x02(X\x0b\x00\x00\x00touch pwnedios\nsystem\n.')


@case('instruction OBJ')
def obj(path):
    write(path, b'\x80\x02(ccollections\nOrderedDict\no.')


@case('instruction BUILD: gives an allowed function new code')
def build_function(path):
    write(path, program(name('torch._utils', '_rebuild_tensor_v2'), dictionary(__code__=b'N'), b'b'))


@case('instruction BUILD on a list')
def build_list(path):
    write(path, program(b']', dictionary(__class__=b'N'), b'b'))


@case('instruction BUILD on a network: replaces its class')
def build_network(path):
    write(path, program(persistent('EDMPrecond', module()), dictionary(__class__=b'N'), b'b'))


@case('instruction REDUCE: calls a text')
def call_text(path):
    write(path, program(text('os.system'), text(PWNED), b'\x85R'))


@case('instruction NEWOBJ_EX')
def newobj_ex(path):
    write(path, program(name('collections', 'OrderedDict'), b')}\x92'))


@case('a persistent id as text')
def persid(path):
    write(path, b'\x80\x02Pos.system\n.')


@case('a persistent id in a pickle that has no storages')
def binpersid(path):
    write(path, program(text('os.system'), b'Q'))


@case('instruction NEXT_BUFFER (memory outside the pickle)')
def next_buffer(path):
    write(path, b'\x80\x05\x97.')


# --- Pickles: memory and time ----------------------------------------------------------------------------------------


@case('says that 2^62 bytes follow')
def huge_bytes(path):
    write(path, b'\x80\x04\x8e' + struct.pack('<Q', 1 << 62) + b'x.')


@case('says that 100 GB of text follow')
def huge_text(path):
    write(path, b'\x80\x04\x8d' + struct.pack('<Q', 100 << 30) + b'x.')


@case('a frame of 2^60 bytes, and a byte array of 50 GB')
def huge_frame(path):
    write(path, b'\x80\x05\x95' + struct.pack('<Q', 1 << 60) + b'\x96' + struct.pack('<Q', 50 << 30) + b'.')


@case('place 4294967295 of the memory of the machine (a table of 64 GB in the usual reader)')
def huge_memo(path):
    write(path, program(b'Nr\xff\xff\xff\xff'))


@case('a million nested tuples as a key of a dictionary (overflows the stack of the interpreter)')
def nested_key(path):
    write(path, program(b'}', b')' + b'\x85' * 1_000_000, b'Ns'))


def _lists(count):
    """`count` lists that each hold the next twice: 2^count parts when written out."""
    steps = (b'](h' + bytes([i]) + b'h' + bytes([i]) + b'eq' + bytes([i + 1]) + b'0' for i in range(count))
    return b']q\x000' + b''.join(steps) + b'h' + bytes([count])


@case('a class name of 2^60 lists')
def class_of_lists(path):
    write(path, program(dictionary(ema=persistent('X', b'}').replace(text('X'), _lists(60), 1))))


@case('a type of numbers of 2^60 lists', REF)
def dtype_of_lists(path):
    array = name('numpy.core.multiarray', '_reconstruct') + b')R(' + number(1) + ints(2) + name('numpy', 'dtype') + \
        _lists(60) + b'\x85R\x89' + raw(b'12345678') + b'tb'
    write(path, program(dictionary(mu=array, sigma=array)))


@case('a weight whose numbers are in a place called by 2^60 lists', NET)
def storage_of_lists(path):
    torch_zip(path, program(dictionary(w=zip_tensor(1, [1], [1]).replace(text('0'), _lists(60), 1))), {'data/0': bytes(4)})


@case('a module with a name of 1 MB whose 5,000 weights are one', NET)
def long_name(path):
    weights = b'}(' + text('w') + tensor(storage(1), [1], [1]) + b'q\x01' + b''.join(
        text(f'w{i}') + b'h\x01' for i in range(5000)) + b'u'
    write(path, edm(module(children=dictionary(**{'a' * 1_000_000: persistent('Linear', module(weights))}))))


@case('two million nested lists')
def nested_lists(path):
    write(path, program(b']' * 2_000_000 + b'a' * 1_999_999))


@case('20 million empty dictionaries in 20 MB')
def many_objects(path):
    write(path, program(b'(' + b'}' * 20_000_000 + b'l'))


@case('a text of 1 MB that is encoded 100,000 times')
def encoded_often(path):
    write(path, program(text('a' * 1_000_000), b'q\x00', b'(' + (name('_codecs', 'encode') + b'h\x00\x85R') * 100_000 + b'l'))


@case('a storage of 4 MB that is opened 100,000 times')
def storage_opened_often(path):
    opened = name('torch.storage', '_load_from_bytes')
    write(path, program(raw(storage(1 << 20)), b'q\x00', b'(' + (opened + b'h\x00\x85R') * 100_000 + b'l'))


@case('a number of a million digits')
def huge_number(path):
    write(path, program(b'\x8b' + struct.pack('<i', 1_000_000) + b'\x7f' * 1_000_000))


@case('modules that hold each other twice, 60 levels deep (2^60 in all)', NET)
def endless_modules(path):
    levels = persistent('Linear', module()) + b'q\x00'
    for level in range(60):
        last = b'h' + bytes([level])
        levels += persistent('Linear', module(children=dictionary(a=last, b=last))) + b'q' + bytes([level + 1])
    write(path, program(b'(' + levels + b'l0', dictionary(ema=b'h<')))


@case('a module that holds itself', NET)
def module_in_itself(path):
    children = b'}q\x00'
    made = persistent('EDMPrecond', module(children=children)) + b'q\x01'
    write(path, program(b'}', text('ema'), made, b's', b'h\x00', text('a'), b'h\x01s0'))


@case('constructor arguments that hold each other twice, 60 levels deep', NET)
def endless_arguments(path):
    lists = b']q\x00' + b''.join(b'](h' + bytes([i]) + b'h' + bytes([i]) + b'eq' + bytes([i + 1]) for i in range(60))
    kwargs = dictionary(x=b'h<')
    made = persistent('EDMPrecond', module(_init_kwargs=kwargs))
    write(path, program(b'(' + lists + b'l0', dictionary(ema=made)))


def _edm_network(**kwargs):
    values = {key: text(value) if isinstance(value, str) else number(value) for key, value in kwargs.items()}
    small = tensor(storage(4), [4], [1])
    return edm(module(dictionary(w=small), _init_kwargs=dictionary(**values)))


@case('a network of a hundred thousand channels without weights to match', NET)
def huge_network(path):
    write(path, _edm_network(img_resolution=32, img_channels=3, model_channels=100_000, model_type='SongUNet'))


@case('a network of 10^15 channels', NET)
def absurd_network(path):
    write(path, _edm_network(img_resolution=32, img_channels=3, model_channels=10**15, model_type='SongUNet'))


@case('a network with 100,000 blocks on each level', NET)
def deep_network(path):
    write(path, _edm_network(img_resolution=32, img_channels=3, model_channels=4, num_blocks=100_000, model_type='SongUNet'))


@case('images of a million by a million pixels', NET)
def huge_resolution(path):
    write(path, _edm_network(img_resolution=1 << 20, img_channels=3, model_type='SongUNet'))


@case('a network type that does not exist', NET)
def unknown_network(path):
    write(path, program(dictionary(ema=persistent('os.system', module(_init_kwargs=b'}')))))


# --- Tensors ---------------------------------------------------------------------------------------------------------


@case('a tensor larger than its storage', NET)
def tensor_too_large(path):
    write(path, edm(module(dictionary(w=tensor(storage(4), [1000, 1000], [1000, 1])))))


@case('a tensor that starts behind its storage', NET)
def tensor_outside(path):
    write(path, edm(module(dictionary(w=tensor(storage(4), [4], [1], offset=1 << 40)))))


@case('a tensor with negative strides', NET)
def tensor_backwards(path):
    write(path, edm(module(dictionary(w=tensor(storage(4), [4], [-1], offset=3)))))


@case('a storage that says 2^40 numbers and has four', NET)
def storage_too_small(path):
    write(path, edm(module(dictionary(w=tensor(storage(1 << 40, data=bytes(16)), [4], [1])))))


@case('10,000 tensors that all show the same 4 MB', NET)
def tensors_share(path):
    first = tensor(storage(1 << 20), [1 << 20], [1]) + b'q\x00'
    rest = b''.join(text(f'w{i}') + b'h\x00' for i in range(10_000))
    write(path, program(b'}', text('ema'), persistent('EDMPrecond', module(
        b'}(' + text('w') + first + rest + b'u', _init_kwargs=b'}')), b's'))


@case('an array of statistics with fewer numbers than its shape', REF)
def array_too_large(path):
    array = name('numpy.core.multiarray', '_reconstruct') + name('numpy', 'ndarray') + ints(0) + raw(b'b') + b'\x87R' + \
        b'(' + number(1) + ints(1 << 40) + name('numpy', 'dtype') + b'(' + text('f8') + b'\x89\x88tR\x89' + \
        raw(bytes(64)) + b'tb'
    write(path, program(dictionary(mu=array, sigma=array)))


@case('an array of Python objects', REF)
def array_of_objects(path):
    import numpy as np
    write(path, pickle.dumps({'mu': np.array([Call(os.system, PWNED)], dtype=object), 'sigma': np.eye(2)}))


# --- Zips ------------------------------------------------------------------------------------------------------------


def torch_zip(path, pickled, records=(), compression=zipfile.ZIP_STORED, root='archive'):
    with zipfile.ZipFile(path, 'w', compression) as z:
        z.writestr(f'{root}/data.pkl', pickled)
        z.writestr(f'{root}/version', '3\n')
        for key, data in dict(records).items():
            z.writestr(f'{root}/{key}', data)


def zip_tensor(count, size, stride, key='0'):
    reference = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text(key) + text('cpu') + number(count) + b'tQ'
    return name('torch._utils', '_rebuild_tensor_v2') + b'(' + reference + number(0) + ints(*size) + ints(*stride) + b'\x89}tR'


@case('a zip of torch.save that calls os.system', NET)
def torch_os_system(path):
    torch_zip(path, pickle.dumps(Call(os.system, PWNED), 2))


@case('the record of a storage is shorter than the pickle says', NET)
def record_too_short(path):
    torch_zip(path, program(dictionary(w=zip_tensor(1 << 20, [1 << 20], [1]))), {'data/0': bytes(16)})


@case('a shape of 10^12 numbers over a storage of four', NET)
def huge_shape(path):
    torch_zip(path, program(dictionary(w=zip_tensor(4, [10**6, 10**6], [10**6, 1]))), {'data/0': bytes(16)})


@case('the record of a storage is missing', NET)
def record_missing(path):
    torch_zip(path, program(dictionary(w=zip_tensor(4, [4], [1]))))


@case('a zip bomb: a pickle of 256 MB of zeros in 250 kB', NET)
def zip_bomb_pickle(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z, z.open('archive/data.pkl', 'w', force_zip64=True) as file:
        for _ in range(64):
            file.write(bytes(1 << 22))


@case('5,000 records of a zip that share the same 4 MB', NET)
def zip_overlap(path):
    import copy
    tensors = {f'w{i}': zip_tensor(1 << 20, [1 << 20], [1], str(i)) for i in range(5000)}
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('archive/data.pkl', program(dictionary(**tensors)))
        z.writestr('archive/data/0', bytes(4 << 20))
        for i in range(1, 5000):
            z.filelist.append(copy.copy(z.filelist[1]))
            z.filelist[-1].filename = f'archive/data/{i}'


@case('two pickles in one zip', NET)
def two_pickles(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('a/data.pkl', pickle.dumps({}, 2))
        z.writestr('b/data.pkl', pickle.dumps(Call(os.system, PWNED), 2))


@case('a zip whose names lead outside: ../../pwned', NET)
def zip_names(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('../../pwned', b'x')
        z.writestr('archive/data.pkl', pickle.dumps({}, 2))


@case('an older file of torch.save that calls os.system', NET)
def legacy_os_system(path):
    write(path, b''.join(pickle.dumps(part, 2) for part in (
        0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}, Call(os.system, PWNED), [])))


@case('an older file of torch.save with a storage of 2^60 numbers', NET)
def legacy_storage(path):
    write(path, storage(1 << 60, data=bytes(16)))


@case('a TorchScript archive whose program names os.system', ('calculate_metrics.py', 'calc', '--images={images}',
      '--ref={images}', '--metrics=fid', '--inception={file}'))
def torchscript(path):
    torch_zip(path, program(name('os', 'system'), text(PWNED), b'\x85R'), {'constants.pkl': b'\x80\x02).'})


@case('arrays of 2 GB in a zip of 9 MB', REF)
def npz_bomb(path):
    _npz(path, {'mu': (1 << 27,), 'sigma': (1 << 27,)}, real=1 << 27)


@case('an array that says 10^14 numbers and has none', REF)
def npz_shape(path):
    _npz(path, {'mu': (10**14,), 'sigma': (10**14,)}, real=0)


@case('arrays of Python objects in a zip', REF)
def npz_objects(path):
    import numpy as np
    target = Path(str(path) + '.npz')
    np.savez(target, mu=np.array([Call(os.system, PWNED)], dtype=object), sigma=np.eye(2))
    return target


@case('a zip of arrays whose names lead outside', REF)
def npz_names(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('../mu.npy', b'x')
        z.writestr('/sigma.npy', b'x')


def _npz(path, shapes, real):
    import numpy as np
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for key, shape in shapes.items():
            with z.open(f'{key}.npy', 'w', force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {'descr': '<f8', 'fortran_order': False, 'shape': shape})
                for start in range(0, real, 1 << 22):
                    file.write(bytes(8 * min(1 << 22, real - start) // 8))


# --- Snapshots, safetensors, data sets -------------------------------------------------------------------------------


def _snapshot(**changes):
    import torch
    return {'format': 'diffusion-snapshot-1', 'network': {'class_name': 'Precond', 'kwargs': {}},
            'state': {'w': torch.zeros(2)}, 'encoder': {'name': 'rgb'}, 'dataset': {}, 'recipe': {}, 'nimg': 0,
            'ema_std': None} | changes


@case('a snapshot with the network os.system', NET)
def snapshot_network(path):
    import torch
    torch.save(_snapshot(network={'class_name': 'os.system', 'kwargs': {}}), path)


def _own(path, value, records=()):
    """A zip that says that it is a snapshot of this project; `value` is the pickled state."""
    torch_zip(path, b'\x80\x02' + dictionary(format=text('diffusion-snapshot-1'), state=value) + b'.', records)


def old_name(module, attribute):
    return f'c{module}\n{attribute}\n'.encode()


def _own_tensor(count, size, stride):
    return zip_tensor(count, size, stride).replace(name('torch._utils', '_rebuild_tensor_v2'),
                                                   old_name('torch._utils', '_rebuild_tensor_v2'))


@case('a snapshot with a bytearray of 2^40 bytes', NET)
def snapshot_bytearray(path):
    _own(path, old_name('__builtin__', 'bytearray') + b'(' + number(1 << 40) + b'tR')


@case('a snapshot with a tensor of 10^10 numbers made by its class', NET)
def snapshot_tensor_class(path):
    _own(path, old_name('torch', 'FloatTensor') + b'(' + number(10**10) + b'tR')


@case('a snapshot whose pickle calls os.system', NET)
def snapshot_os_system(path):
    _own(path, old_name('os', 'system') + b'(' + text(PWNED) + b'tR')


@case('a snapshot with a shape of 10^12 numbers over a storage of four', NET)
def snapshot_shape(path):
    _own(path, dictionary(w=_own_tensor(4, [10**6, 10**6], [10**6, 1])), {'data/0': bytes(16)})


@case('a snapshot whose storage is longer than its record', NET)
def snapshot_storage(path):
    _own(path, dictionary(w=_own_tensor(1 << 28, [1 << 28], [1])), {'data/0': bytes(16)})


@case('a snapshot with a weight that expands 1000 times', NET)
def snapshot_bomb(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', b'\x80\x02' + dictionary(
            format=text('diffusion-snapshot-1'), state=dictionary(w=_own_tensor(1 << 28, [1 << 28], [1]))) + b'.')
        with z.open('archive/data/0', 'w', force_zip64=True) as file:
            for _ in range(256):
                file.write(bytes(1 << 22))


@case('a snapshot with 100,000 tuples in each other in a set', NET)
def snapshot_nested(path):
    _own(path, old_name('__builtin__', 'set') + b'](' + b')' + b'\x85' * 100_000 + b'e\x85R')


@case('a snapshot with a set of 100,000 numbers that is made 20,000 times', NET)
def snapshot_sets(path):
    items = b'](' + b'K\x01' * 100_000 + b'eq\x01'
    _own(path, b'(' + items + (old_name('__builtin__', 'set') + b'h\x01\x85R') * 20_000 + b'l')


@case('a snapshot with a recipe of 2^40 entries (lists that hold each other)', CONVERT)
def snapshot_recipe(path):
    import torch
    value = []
    for _ in range(40):
        value = [value, value]
    torch.save(_snapshot(recipe={'x': value}), path)


@case('a snapshot whose parts are of other types', NET)
def snapshot_types(path):
    import torch
    torch.save(_snapshot(dataset=[1], network={'class_name': 'Precond', 'kwargs': [1]}), path)


@case('a safetensors file whose header says 2^40 bytes', NET)
def safetensors_header(path):
    write(path, struct.pack('<Q', 1 << 40) + b'{}')


@case('a safetensors file whose tensor lies outside', NET)
def safetensors_outside(path):
    header = json.dumps({'w': {'dtype': 'F32', 'shape': [1 << 40], 'data_offsets': [0, 4 << 40]}}).encode()
    write(path, struct.pack('<Q', len(header)) + header)


def _safetensors(path):
    header = json.dumps({'w': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()
    write(path, struct.pack('<Q', len(header)) + header + bytes(4))


@case('a description of 10 million labels beside a safetensors file', NET)
def json_labels(path):
    _safetensors(path)
    write(str(path) + '.json', b'{"format": "diffusion-snapshot-1", "classes": [' + b'0,' * 10_000_000 + b'0]}')


@case('a description nested 100,000 deep beside a safetensors file', NET)
def json_nested(path):
    _safetensors(path)
    write(str(path) + '.json', b'[' * 100_000 + b']' * 100_000)


@case('a data set with a dataset.json of 10 million labels', DATA)
def dataset_labels(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        z.writestr('a.png', small_png())
        with z.open('dataset.json', 'w', force_zip64=True) as file:
            file.write(b'{"labels": [')
            for _ in range(1000):
                file.write(b'["a.png",1],' * 10_000)
            file.write(b'["a.png",1]]}')


def small_png():
    import numpy as np

    from dnnlib.image_io import encode_png
    return encode_png(np.zeros([8, 8, 3], np.uint8))


@case('a data set with names that lead outside', DATA)
def dataset_names(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('../../pwned.png', b'x')


@case('a data set with a symbolic link to /etc/passwd', DATA)
def dataset_link(path):
    with zipfile.ZipFile(path, 'w') as z:
        info = zipfile.ZipInfo('a.png')
        info.external_attr = 0o120777 << 16
        z.writestr(info, '/etc/passwd')


@case('a CIFAR archive with a batch that calls os.system', SOURCE)
def cifar_archive(path):
    import tarfile
    target = Path(str(path) + '.tar.gz')
    with tarfile.open(target, 'w:gz') as tar:
        for file, content in (('batches.meta', {'label_names': ['a']}), ('data_batch_1', Call(os.system, PWNED))):
            data = pickle.dumps(content, 2)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{file}')
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target


@case('a CIFAR archive with a file that leads outside: ../../pwned', ('snapshot_tool.py', 'inspect', '{file}'))
def cifar_names(path):
    import tarfile
    with tarfile.open(path, 'w:gz') as tar:
        info = tarfile.TarInfo('../../pwned')
        info.size = 1
        tar.addfile(info, io.BytesIO(b'x'))


# --- Things that are no files ----------------------------------------------------------------------------------------


@case('a symbolic link to /dev/zero', NET)
def link_to_device(path):
    os.symlink('/dev/zero', path)


@case('a symbolic link to itself', NET)
def link_to_itself(path):
    os.symlink(path, path)


@case('a pipe that nobody writes to', NET)
def pipe(path):
    os.mkfifo(path)


@case('an empty file', NET)
def empty(path):
    write(path, b'')


@case('a web page under the name of a network', NET)
def web_page(path):
    write(path, b'<!DOCTYPE html><html><body>Not found</body></html>')


@case('a picture under the name of a network', NET)
def picture(path):
    write(path, b'\x89PNG\r\n\x1a\n' + bytes(100))


@case('--dest is a symbolic link to a file elsewhere', ('snapshot_tool.py', 'convert', '{golden}', '--dest={file}'))
def dest_is_link(path):
    link = Path(str(path) + '.pkl')
    os.symlink(path.parent.parent / 'canary', link)
    return link


# --- Small files that ask for much -----------------------------------------------------------------------------------


def twice(depth=60, start=1000):
    """A list that holds a list twice that holds one twice, and so on: 2^depth parts when written out."""
    out = b']' + put(start) + b'0'
    for i in range(start, start + depth):
        out += b'](' + get(i) * 2 + b'e' + put(i + 1) + b'0'
    return out + get(start + depth)


def get(index):
    return b'j' + struct.pack('<I', index)


def put(index):
    return b'r' + struct.pack('<I', index)


def numpy_array(data, shape, code='u1', dtype=None):
    """A pickled array; `data` and `dtype` are pickled already."""
    dtype = dtype or name('numpy', 'dtype') + text(code) + b'\x89\x88\x87R' + b'(K\x03' + text('|') + b'NNNK\x00K\x00K\x00tb'
    made = name('numpy.core.multiarray', '_reconstruct') + name('numpy', 'ndarray') + ints(0) + raw(b'b') + b'\x87R'
    return made + b'(' + number(1) + ints(*shape) + dtype + b'\x89' + data + b'tb'


@case('the order of the bytes of an array is a list of 2^60 lists')
def order_is_a_list(path):
    dtype = name('numpy', 'dtype') + text('u1') + b'\x89\x88\x87R(K\x03' + twice() + b'NNNK\x00K\x00K\x00tb'
    array = numpy_array(raw(bytes(4)), [4], dtype=dtype)
    write(path, program(dictionary(mu=array, sigma=array)))


@case('the means of features are 2^28 lists')
def means_are_lists(path):
    write(path, program(dictionary(mu=twice(28), sigma=twice(28, 5000))))


@case('arguments of a network: one array of 50,000 numbers under 60,000 names', NET)
def arguments_share_an_array(path):
    items = text('k') + numpy_array(raw(bytes(100_000)), [50_000], 'f2') + put(7)
    items += b''.join(text(f'k{i}') + get(7) for i in range(60_000))
    weight = tensor(storage(4), [4], [1])
    write(path, edm(module(dictionary(w=weight), _init_kwargs=b'}(' + items + b'u')))


@case('a call with 500,000 arguments, 600,000 times')
def long_calls(path):
    head = name('torch._utils', '_rebuild_parameter') + put(0) + b'0(' + b'N' * 500_000 + b't' + put(1) + b'0'
    write(path, program(head + (get(0) + get(1) + b'R0') * 600_000 + b'}'))


@case('statistics of 5,000 spaces that share one covariance', REF)
def shared_covariance(path):
    mu, sigma = (numpy_array(raw(bytes(4 * 500**n)), [500] * n, 'f4') for n in (1, 2))
    first = b'}(' + text('mu') + mu + put(7) + text('sigma') + sigma + put(8) + b'u'
    rest = b'}(' + text('mu') + get(7) + text('sigma') + get(8) + b'u'
    write(path, program(b'}(' + text('fid') + first + b''.join(text(f's{i}') + rest for i in range(5000)) + b'u'))


def npz_of_zeros(path, method, shape):
    with zipfile.ZipFile(path, 'w', method) as z, z.open('arr_0.npy', 'w', force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=shape))
        for _ in range(math.prod(shape) >> 22):
            file.write(bytes(1 << 22))


@case('an .npz of 3 kB with 4 GB of images, packed by bzip2', IMAGES)
def packed_images(path):
    npz_of_zeros(path, zipfile.ZIP_BZIP2, (1 << 24, 8, 8, 4))


@case('an .npz of 1 MB with 800 MB of images, packed by deflate', IMAGES)
def deflated_images(path):
    npz_of_zeros(path, zipfile.ZIP_DEFLATED, (1 << 22, 8, 8, 3))


@case('labels of CIFAR are 2^28 lists', SOURCE)
def cifar_labels(path):
    batches = {'batches.meta': pickle.dumps({'label_names': ['a']}, 2), 'data_batch_1': program(
        dictionary(data=numpy_array(raw(bytes(3072)), [1, 3072]), labels=twice(28)))}
    path = path.with_suffix('.tar.gz')
    with tarfile.open(path, 'w:gz') as archive:
        for file, data in batches.items():
            info = tarfile.TarInfo(f'cifar-10-batches-py/{file}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@case('a tar with a name of 3 GB')
def tar_name(path):
    info = tarfile.TarInfo('././@LongLink')
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 3 << 30
    with gzip.open(path, 'wb', compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(64 << 20))


@case('a tar of 4 kB with sparse files of 512 MB', SOURCE)
def tar_sparse(path):
    info = tarfile.TarInfo('batches.meta')
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b'00000000000\0' * 2
    header[483:495] = b'%011o\0' % ((1 << 29) - 1)
    header[148:156] = b'        '
    header[148:156] = b'%06o\0 ' % sum(header)
    path = path.with_suffix('.tar')
    write(path, bytes(header) + bytes(1024))
    return path


@case('a zip whose directory says that an image has 1 TB', DATA)
def image_of_a_terabyte(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('a.png', bytes(100))
        z.filelist[0].compress_size = z.filelist[0].file_size = 1 << 40


@case('a zip of 4 MB with an image file of 1 GB', DATA)
def image_of_zeros(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z, z.open('a.png', 'w', force_zip64=True) as file:
        for _ in range(1 << 8):
            file.write(bytes(1 << 22))


@case('names of classes with terminal codes', DATA)
def class_names_for_the_screen(path):
    from dnnlib.image_io import encode_png
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('a.png', encode_png(np.zeros((8, 8, 3), np.uint8)))
        z.writestr('dataset.json', json.dumps({'labels': [['a.png', 0]], 'class_names': ['\x1b]0;owned\x07']}))


@case('MNIST of 16 GB in a gzip of some bytes', SOURCE)
def idx_of_zeros(path):
    path = path.with_name(path.name + '-images-idx3-ubyte.gz')
    with gzip.open(path, 'wb') as file:
        file.write(struct.pack('>4I', 0x803, 1 << 14, 1 << 10, 1 << 10))
    return path


# --- What compares, multiplies and walks -----------------------------------------------------------------------------

TRAIN = ('train.py', '--outdir={out}', '--data={images}', '--resume={file}', '--arch=ddpmpp', '--num-channels=4',
         '--num-blocks=1', '--cres=1', '--batch=4', '--duration=0.001')


@case('the shape of an array is two equal trees of 2^60 lists, which are compared', REF)
def shape_of_lists(path):
    array = numpy_array(raw(bytes(4)), [4]).replace(ints(4), b'(' + twice() + twice(start=2000) + b't', 1)
    write(path, program(dictionary(mu=array, sigma=array)))


@case('a tensor whose size is a text times 2^40', NET)
def size_of_text(path):
    made = zip_tensor(1, [1, 1 << 40], [1, 1]).replace(ints(1, 1 << 40), b'(' + text('a' * 1000) + number(1 << 40) + b't')
    torch_zip(path, program(dictionary(w=made)), {'data/0': bytes(4)})


@case('an older file of torch.save whose storages are called by two equal trees of 2^60 lists', NET)
def keys_of_lists(path):
    keys = program(b'(' + twice() + twice(start=2000) + b'l')
    write(path, storage(1).replace(pickle.dumps(['0'], 2), keys))


@case('a checkpoint whose options are 2^60 lists', TRAIN)
def identity_of_lists(path):
    torch_zip(path, b'\x80\x02' + dictionary(
        nimg=number(0), means=b'}', identity=dictionary(seed=twice())) + b'.')


@case('a list that holds itself, as what is said of statistics', REF)
def list_in_itself(path):
    array = numpy_array(raw(bytes(8)), [1], 'f8')
    square = numpy_array(raw(bytes(8)), [1, 1], 'f8')
    write(path, program(dictionary(mu=array, sigma=square, meta=dictionary(a=b']q\x00h\x00a'))))


@case('a dictionary that holds itself, in a snapshot')
def dictionary_in_itself(path):
    _own(path, b'}q\x00' + text('a') + b'h\x00s')


@case('a module of 20,000 empty weights that is 2^16 modules', NET)
def modules_of_weights(path):
    weights = b'}(' + text('w') + tensor(storage(0), [0], [1]) + put(9) + b''.join(
        text(f'w{i}') + get(9) for i in range(20_000)) + b'u'
    levels = persistent('Linear', module(weights)) + put(100) + b'0'
    for level in range(100, 116):
        levels += persistent('Linear', module(children=dictionary(a=get(level), b=get(level)))) + put(level + 1) + b'0'
    write(path, program(levels, dictionary(ema=get(116))))


@case('2^40 modules in a TorchScript archive', ('calculate_metrics.py', 'calc', '--images={images}', '--ref={images}',
      '--metrics=fid', '--inception={file}'))
def torchscript_modules(path):
    def record(state):
        return name('__torch__', 'M') + b')\x81' + state + b'b'
    levels = record(b'}') + put(100) + b'0'
    for level in range(100, 140):
        levels += record(dictionary(a=get(level), b=get(level))) + put(level + 1) + b'0'
    torch_zip(path, program(levels, get(140)), {'constants.pkl': b'\x80\x02).'})


# --- Zips whose parts say different things ---------------------------------------------------------------------------


@case('two records of one name in a zip of torch', NET)
def two_records(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('archive/data.pkl', program(dictionary(w=zip_tensor(1, [1], [1]))))
        z.writestr('archive/data/0', bytes(4))
        z.filelist.append(z.filelist[-1])


@case('one record of a zip of torch read as numbers of 12 types', NET)
def record_of_many_types(path):
    kinds = ['FloatStorage', 'IntStorage', 'ComplexFloatStorage', 'DoubleStorage', 'LongStorage']
    sizes = [4, 4, 8, 8, 8]
    tensors = {kind: zip_tensor((8 << 20) // size, [1], [1]).replace(b'FloatStorage', kind.encode(), 1)
               for kind, size in zip(kinds, sizes, strict=True)}
    torch_zip(path, program(dictionary(**tensors)), {'data/0': bytes(8 << 20)})


def zip_directory(path, change, method=zipfile.ZIP_STORED, data=b'', file='a.png'):
    """A zip of one file, whose entry of the directory `change` changes."""
    with zipfile.ZipFile(path, 'w', method) as z:
        z.writestr(file, data or small_png())
        change(z.filelist[0])


@case('a zip whose image begins at byte 2^64 - 2', DATA)
def image_far_away(path):
    zip_directory(path, lambda info: setattr(info, 'header_offset', (1 << 64) - 2))


@case('a zip whose image has 2^63 bytes', DATA)
def image_of_all_bytes(path):
    def change(info):
        info.file_size = info.compress_size = 1 << 63
    zip_directory(path, change)


@case('a zip whose packed image has 4 GB and says that it has none', DATA)
def image_of_no_bytes(path):
    packer = zlib.compressobj(9, wbits=-15)
    packed = b''.join(packer.compress(bytes(1 << 22)) for _ in range(1024)) + packer.flush()

    def change(info):
        info.file_size, info.compress_type, info.CRC = 0, zipfile.ZIP_DEFLATED, 0
    zip_directory(path, change, data=packed)


@case('a folder with an image of 100 GB that takes no room on the disk', DATA)
def image_of_holes(path):
    path.mkdir()
    with open(path / 'a.png', 'wb') as file:
        file.truncate(100 << 30)


@case('a list of images, one of 100 GB that takes no room on the disk', SOURCE)
def list_of_holes(path):
    with open(f'{path}.png', 'wb') as file:
        file.truncate(100 << 30)
    path = path.with_suffix('.txt')
    write(path, f'{path.stem}.png\n'.encode())
    return path


@case('a folder of CIFAR with a batch of 100 GB that takes no room on the disk', SOURCE)
def cifar_of_holes(path):
    path.mkdir()
    write(path / 'batches.meta', pickle.dumps({'label_names': ['a']}, 2))
    for i in range(1, 6):
        with open(path / f'data_batch_{i}', 'wb') as file:
            file.truncate(100 << 30)


@case('a list of images that names a device', SOURCE)
def list_of_devices(path):
    path = path.with_suffix('.txt')
    write(path, b'/dev/zero\n')
    return path


# --- Labels and JSON -------------------------------------------------------------------------------------------------


def _labelled(path, description: bytes, method=zipfile.ZIP_DEFLATED):
    """A data set of one image with this dataset.json."""
    with zipfile.ZipFile(path, 'w', method) as z:
        z.writestr('a.png', small_png())
        z.writestr('dataset.json', description)


def _label(key, what, label):
    """A case: a data set whose image has this label, as JSON."""
    def function(path):
        _labelled(path, b'{"labels": [["a.png", ' + label + b']]}')
    CASES[key] = what, function, DATA


_label('label_of_digits', 'a label of a million digits', b'1' * 1_000_000)
_label('label_infinite', 'a label of 10^400 in a vector', b'[1' + b'0' * 400 + b']')
_label('label_true', 'a label that is true', b'true')
_label('label_negative', 'a negative label', b'-1')
_label('label_nan', 'a label that is NaN', b'NaN')
_label('label_of_texts', 'a label vector of texts', b'["1", "2"]')
_label('label_nested', 'a label of lists, a thousand deep', b'[' * 900 + b']' * 900)
_label('label_empty', 'a label vector of no numbers', b'[]')


@case('a data set of 80 million empty lists in a dataset.json of 250 kB', DATA)
def json_of_lists(path):
    _labelled(path, b'{"labels": null, "x": [' + b'[],' * 80_000_000 + b'0]}')


@case('a data set of 80 million empty texts and one letter of four bytes', DATA)
def json_of_texts(path):
    _labelled(path, '{"labels": null, "y": "\U0001f600", "x": ['.encode() + b'"",' * 80_000_000 + b'0]}')


@case('a dataset.json nested 100,000 deep', DATA)
def json_deep(path):
    _labelled(path, b'{"labels": ' + b'[' * 100_000)


@case('classes of 10^400 in dataset.json', DATA)
def classes_huge(path):
    _labelled(path, b'{"labels": [["a.png", 0]], "classes": [1' + b'0' * 400 + b']}')


@case('names of classes that are lists', DATA)
def classes_of_lists(path):
    _labelled(path, b'{"labels": [["a.png", 0]], "class_names": [[["a"]]]}')


@case('a folder of made images whose dataset.json is nested 100,000 deep',
      ('generate_images.py', '--net={golden}', '--outdir={file}', '--seeds=0', '--steps=1'))
def made_by_deep(path):
    path.mkdir()
    write(path / 'dataset.json', b'{"generated_by": ' + b'[' * 100_000)


@case('the record of a run nested 100,000 deep', (*TRAIN[:1], '--outdir={file}', '--nosubdir', *TRAIN[2:3], *TRAIN[4:]))
def run_record_deep(path):
    path.mkdir()
    write(path / 'training_options.json', b'[' * 100_000)


@case('the record of a run is a pipe', ('mem_ratio.py', '--expdir={images}', '--knn-ref={images}', '--log={file}'))
def log_is_a_pipe(path):
    os.mkfifo(path)


COMBINE = ('synthetic_data/combine_data.py', '--data_dir={file}', '--data_dir={file}', '--output_dir={out}',
           '--class_num=1', '--file_name=x')


@case('a record of images of a class that has 90 million seeds', COMBINE)
def record_of_seeds(path):
    path.mkdir()
    np.save(path / '0.npy', np.zeros((2, 8, 8, 3), np.uint8))
    write(path / '0.json', b'{"images": 2, "seeds": "0-90000000", "made_by": {}}')


@case('images of a class whose record is nested 100,000 deep', COMBINE)
def record_deep(path):
    path.mkdir()
    np.save(path / '0.npy', np.zeros((2, 8, 8, 3), np.uint8))
    write(path / '0.json', b'[' * 100_000)


# --- Arrays ----------------------------------------------------------------------------------------------------------


def npy(header: str, data=b'', version=1):
    raw = header.encode()
    return b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H' if version == 1 else '<I', len(raw)) + raw + data


def npy_of(shape, descr="'|u1'", data=b'', version=1):
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}", data, version)


def _array(key, what, array: bytes):
    """A case: images in an .npz of one packed array."""
    def function(path):
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
            z.writestr('arr_0.npy', array)
    CASES[key] = what, function, IMAGES


_array('npy_negative', 'an array of -1 x 2^40 numbers, which would give back what it spends', npy_of(f'(-1, {1 << 40})'))
_array('npy_of_tables', 'an array of tables', npy_of('(1, 8, 8, 3)', "[('a', '|u1'), ('b', '|O')]", bytes(400)))
_array('npy_of_squares', 'an array whose numbers are squares of 10^6 x 10^6', npy_of('(1, 8, 8, 3)', "'(1000000,1000000)u1'"))
_array('npy_is_a_list', 'a header that is a list', npy('[1, 2, 3]'))
_array('npy_deep', 'a header of 9,000 brackets', npy('(' * 9000))
_array('npy_long', 'a header of 4 GB', b'\x93NUMPY\2\0' + b'\xff' * 4 + b' ' * 20_000)
_array('npy_cut', 'an array of 10^14 numbers and none behind it', npy_of(f'({10**12}, 8, 8, 3)'))
_array('npy_version', 'a format of the future', npy_of('(1, 8, 8, 3)', data=bytes(192), version=9)[:-1])
_array('npy_of_objects', 'an array of Python objects that call os.system', npy_of(
    '(1,)', "'|O'", pickle.dumps(Call(os.system, PWNED))))


@case('statistics of 10,000 spaces, for each of which the directory was read again', REF)
def npz_of_spaces(path):
    with zipfile.ZipFile(path, 'w') as z:
        for i in range(10_000):
            z.writestr(f's{i}/mu.npy', npy_of('(1,)', "'<f8'", bytes(8)))
            z.writestr(f's{i}/sigma.npy', npy_of('(1, 1)', "'<f8'", struct.pack('<d', -1)))


@case('an .npz with two arrays of one name', REF)
def npz_twice(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('mu.npy', npy_of('(1,)', "'<f8'", bytes(8)))
        z.writestr('sigma.npy', npy_of('(1, 1)', "'<f8'", bytes(8)))
        z.filelist.append(z.filelist[0])


@case('a name of an array with line breaks and terminal codes', REF)
def npz_name(path):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('mu\n\x1b[2J.npy', npy_of('(5,)', "'<f8'", bytes(8)))


def _statistics(key, what, mu, sigma, **more):
    def function(path):
        with open(path, 'wb') as file:
            np.savez(file, mu=mu, sigma=sigma, **more)
    CASES[key] = what, function, REF


_statistics('sigma_complex', 'a covariance of complex numbers', np.zeros(2), np.eye(2) * 1j)
_statistics('sigma_of_texts', 'a covariance of texts', np.zeros(2), np.array([['1', '0'], ['0', '1']]))
_statistics('sigma_lopsided', 'a covariance that is not symmetric', np.zeros(2), np.array([[1, 9], [0, 1.]]))
_statistics('sigma_negative', 'a negative variance', np.zeros(2), -np.eye(2))
_statistics('sigma_nan', 'a covariance of NaN', np.zeros(2), np.full([2, 2], np.nan))
_statistics('mu_empty', 'features of no dimensions of 2^40 images', np.zeros(0), np.zeros([0, 0]),
            features=np.zeros([1 << 40, 0], np.float32))


@case('a covariance of 10^6 x 10^6 numbers in a packed array of 8 TB, as its zip says', REF)
def sigma_of_terabytes(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('mu.npy', npy_of('(1000000,)', "'<f8'", bytes(8_000_000)))
        z.writestr('sigma.npy', npy_of('(1000000, 1000000)', "'<f8'"))
        z.filelist[1].file_size += 8 * 10**12


def _latents(key, what, data: bytes):
    def function(path):
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr('00000/img-mean-std-00000000.npy', data)
    CASES[key] = what, function, ('generate_images.py', '--net=optimal:{file}', '--outdir={out}', '--seeds=0')


def _empty_zip():
    file = io.BytesIO()
    zipfile.ZipFile(file, 'w').close()
    return file.getvalue()


_latents('latents_are_a_zip', 'latents that are a zip of arrays', _empty_zip())
_latents('latents_cut', 'latents of 8 x 10^6 x 10^6 and none behind them', npy_of('(8, 1000000, 1000000)', "'<f4'"))
_latents('latents_empty', 'latents of no channels', npy_of('(0, 8, 8)', "'<f4'"))
_latents('latents_deep', 'latents with a header of brackets', npy('[' * 9000))


# --- Pictures --------------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, depth=8, color=2, interlace=0, extra=b'', pixels=None):
    """A PNG; its pixels are zeros unless their bytes are given."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[color]
    packer = zlib.compressobj(1)
    row = bytes(1 + width * channels * depth // 8)
    packed = b''.join(packer.compress(row) for _ in range(height)) + packer.flush() if pixels is None else pixels
    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, interlace)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + extra + chunk(b'IDAT', packed) + chunk(b'IEND', b'')


def _picture(key, what, make, ending='png'):
    """A case: a data set of one picture; `make` returns its file."""
    def function(path):
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr(f'a.{ending}', make())
    CASES[key] = what, function, DATA


def zeros(count):
    """A stream of zlib with so many zeros."""
    packer = zlib.compressobj(9)
    return b''.join(packer.compress(bytes(1 << 22)) for _ in range(count >> 22)) + packer.flush()


_PALETTE = chunk(b'PLTE', bytes(6)) + chunk(b'tRNS', bytes(1))
_picture('png_of_colours', 'a PNG of 13,000 x 13,000 pixels of a palette, with transparency',
         lambda: png(13_000, 13_000, color=3, extra=_PALETTE))
_picture('png_interlaced', 'an interlaced PNG of 11,000 x 11,000 pixels of 16 bits', lambda: png(
    11_000, 11_000, 16, 6, 1, pixels=zeros(1 << 26)))
_picture('png_plain', 'a PNG of 300 MB of pixels in some kB', lambda: png(
    18_000, 17_000, color=0, pixels=zeros(1 << 28)))
_picture('png_wide', 'a PNG of 2^31 - 1 x 1 pixels', lambda: png((1 << 31) - 1, 1, color=0, pixels=zeros(1 << 22)))
_picture('png_square', 'a PNG of 2^31 - 1 squared', lambda: png((1 << 31) - 1, (1 << 31) - 1, pixels=b''))
_picture('png_chunk', 'a PNG whose data are 2^31 - 1 bytes', lambda: small_png()[:33] + struct.pack('>I', (1 << 31) - 1)
         + b'IDAT' + bytes(100))
_picture('png_text', 'a PNG with a text of 1 GB', lambda: png(
    8, 8, extra=chunk(b'zTXt', b'a\0\0' + zeros(1 << 30)), pixels=b''))
_picture('png_profile', 'a PNG with a profile of colours of 1 GB', lambda: png(
    8, 8, extra=chunk(b'iCCP', b'a\0\0' + zeros(1 << 30)), pixels=b''))
_picture('png_of_parts', 'a PNG with 500,000 empty parts', lambda: png(8, 8, extra=chunk(b'IDAT', b'') * 500_000, pixels=b''))
_picture('png_frames', 'a PNG that says it has 2^31 frames', lambda: png(8, 8, extra=chunk(
    b'acTL', struct.pack('>II', (1 << 31) - 1, 0)) + chunk(b'fcTL', bytes(26)) * 1000, pixels=b''))


def segment(kind, data):
    return bytes([0xff, kind]) + struct.pack('>H', 2 + len(data)) + data


def jpeg(width, height, scans, kind=0xc2):
    """A gray JPEG without tables of so many passes."""
    frame = segment(kind, struct.pack('>BHHB', 8, height, width, 1) + b'\1\x11\0')
    return b'\xff\xd8' + frame + (segment(0xda, b'\1\1\0\0\x3f\0') + b'\0') * scans + b'\xff\xd9'


_picture('jpeg_square', 'a JPEG of 65,535 x 65,535 pixels', lambda: jpeg(65_535, 65_535, 1, 0xc0), 'jpg')
_picture('jpeg_passes', 'a JPEG that goes 5,000 times through 64 million pixels', lambda: jpeg(8000, 8000, 5000), 'jpg')
_picture('bmp_lines', 'a BMP of 178 million pixels in one packed line', lambda: b'BM' + struct.pack(
    '<IIIIiiHHIIIIII', 70, 0, 62, 40, 178_000_000, 1, 1, 8, 1, 8, 0, 0, 2, 0) + bytes(8) + b'\0\0\0\1', 'bmp')
_picture('qoi_square', 'a QOI of 2^32 - 1 squared', lambda: b'qoif' + struct.pack('>IIBB', (1 << 32) - 1, (1 << 32) - 1, 4, 0)
         + b'\xfd' * 1000, 'qoi')
_picture('ppm_square', 'a PPM of 10^9 x 10^9 pixels', lambda: b'P6 1000000000 1000000000 255\n' + bytes(100), 'ppm')
_picture('ppm_digits', 'a PPM whose width has a million digits', lambda: b'P6 ' + b'9' * 1_000_000 + b' 8 255\n', 'ppm')
_picture('gif_square', 'a GIF of 65,535 x 65,535 pixels', lambda: b'GIF89a' + b'\xff\xff\xff\xff\x80\0\0' + bytes(6) + b',' + bytes(4)
         + b'\xff\xff\xff\xff\0\2\1\0\0;', 'gif')
_picture('webp_square', 'a WEBP of 16,384 x 16,384 pixels', lambda: b'RIFF' + struct.pack('<I', 30) + b'WEBPVP8X'
         + struct.pack('<I', 10) + b'\x12\0\0\0' + b'\xff\x3f\0' * 2 + bytes(4), 'webp')
_picture('tiff_square', 'a TIFF of 2^32 - 1 squared', lambda: b'II*\0\x08\0\0\0\2\0' + struct.pack(
    '<HHIIHHII', 256, 4, 1, (1 << 32) - 1, 257, 4, 1, (1 << 32) - 1) + bytes(4), 'tif')
_picture('tiff_tags', 'a TIFF with a tag of 2^32 - 1 numbers, and itself as the next image', lambda: b'II*\0\x08\0\0\0\1\0'
         + struct.pack('<HHII', 273, 4, (1 << 32) - 1, 8) + struct.pack('<I', 8), 'tif')


# --- Archives of tar, idx --------------------------------------------------------------------------------------------


def _archive(key, what, make, ending='.tar'):
    """A case: an archive in the place of CIFAR's."""
    def function(path):
        path = path.with_suffix(ending)
        write(path, make())
        return path
    CASES[key] = what, function, SOURCE


def member(file, size=0, kind=tarfile.REGTYPE, data=b'', **more):
    info = tarfile.TarInfo(file)
    info.size, info.type = size or len(data), kind
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def _sealed(header: bytes):
    """The header with its sum of bytes."""
    header = header[:148] + b' ' * 8 + header[156:]
    return header[:148] + b'%06o\0 ' % sum(header) + header[156:]


def _negative():
    header = bytearray(member('data_batch_1'))
    header[124:136] = b'\xff' * 10 + b'\xfe\0'
    return _sealed(bytes(header)) * 2 + bytes(1024)


def pax(**values):
    """An extended header."""
    def record(key, value):
        rest = f' {key}={value}\n'
        size = len(rest) + 1
        size = len(rest) + len(str(size + len(str(size)) - 1))
        return f'{size}{rest}'
    data = ''.join(record(key.replace('_', '.'), value) for key, value in values.items()).encode()
    return member('pax', data=data, kind=tarfile.XHDTYPE)


_archive('tar_negative', 'a tar with a member of -512 bytes, which comes again and again', _negative)
_archive('tar_pax_size', 'a tar with a member of 10^18 bytes', lambda: pax(size=10**18) + member('batches.meta') + bytes(1024))
_archive('tar_pax_digits', 'a tar whose member has a size of 16,000 digits', lambda: pax(size='9' * 16_000) + member('batches.meta')
         + bytes(1024))
_archive('tar_map', 'a packed tar with a map of holes of 1 GB', lambda: gzip.compress(pax(
    GNU_sparse_major=1, GNU_sparse_minor=0, GNU_sparse_name='batches.meta', GNU_sparse_realsize=10**12)
    + member('batches.meta', 1 << 30) + b'99999999999\n' + b'0\n' * (1 << 29), 1), '.tar.gz')
_archive('tar_holes', 'a tar with a member of 10^12 bytes in holes', lambda: pax(
    GNU_sparse_size=10**12, GNU_sparse_numblocks=1, GNU_sparse_map='0,0', GNU_sparse_name='batches.meta')
    + member('batches.meta', kind=tarfile.REGTYPE) + bytes(1024))
_archive('tar_end', 'a tar of bzip2 that ends in 3 GB of zeros', lambda: bz2.compress(bytes(1 << 20)) * 3000, '.tar.bz2')
_archive('tar_links', 'a tar with links in a circle in the place of the batches', lambda: b''.join(
    member(file, kind=kind, linkname=to) for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE)
    for file, to in (('batches.meta', 'data_batch_1'), ('data_batch_1', 'batches.meta'))) + bytes(1024))
_archive('tar_devices', 'a tar with devices and pipes in the place of the batches', lambda: b''.join(
    member('batches.meta', kind=kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)) + bytes(1024))
_archive('tar_damaged', 'a damaged tar of xz', lambda: lzma.compress(os.urandom(1 << 16) + bytes(1 << 20))[:40_000] + bytes(9000),
         '.tar.xz')
def _dictionary():
    """A tar of xz whose first block asks for a dictionary of 4 GB."""
    data = bytearray(lzma.compress(bytes(1 << 20)))
    size = 4 * (data[12] + 1)
    data[data.index(b'\x21\1', 12) + 2] = 40
    data[12 + size - 4:12 + size] = struct.pack('<I', zlib.crc32(data[12:12 + size - 4]))
    return bytes(data)


_archive('tar_dictionary', 'a tar of xz that asks for 4 GB to be unpacked', _dictionary, '.tar.xz')
_archive('tar_many', 'a tar of two million members in 2 MB', lambda: gzip.compress(member('a') * 2_000_000, 1), '.tar.gz')


@case('a file of torch before 1.0, which is a tar')
def legacy_tar(path):
    write(path, member('sys_info', data=pickle.dumps({}, 2)) + member('pickle', data=pickle.dumps(Call(os.system, PWNED)))
          + bytes(1024))


def _idx(key, what, shape, count):
    def function(path):
        images = path.with_name(path.name + '-images-idx3-ubyte')
        write(images, struct.pack('>4I', 0x803, *shape) + bytes(100 if all(shape) else 0))
        write(path.with_name(path.name + '-labels-idx1-ubyte'), struct.pack('>2I', 0x801, count) + bytes(count))
        return images
    CASES[key] = what, function, SOURCE


_idx('idx_empty', 'MNIST of images without pixels', (1000, 0, 0), 1000)
_idx('idx_cut', 'MNIST of 100 images and bytes of one', (100, 28, 28), 100)


# --- Configurations and flag files -----------------------------------------------------------------------------------

CONFIG = ('distillation/scripts/image_train.py', '--config={file}', '--data_dir={images}', '--outdir={out}')
FLAGS = ('long_tail/main.py', '--train', '--flagfile={file}')


def _text(key, what, command, data):
    def function(path):
        write(path, data.encode())
    CASES[key] = what, function, command


_text('yaml_merged', 'YAML whose tables are merged into each other twice, 40 levels deep', CONFIG, 'a0: &a0 {x: 1}\n' + ''.join(
    f'a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}], x{i}: 1}}\n' for i in range(40)))
_text('yaml_lists', 'YAML of 2^40 lists', CONFIG, 'a: &a0 [1, 1]\n' + ''.join(
    f'b{i}: &a{i + 1} [*a{i}, *a{i}]\n' for i in range(40)))
_text('yaml_deep', 'YAML nested 30,000 deep', CONFIG, '[' * 30_000)
_text('yaml_keys', 'YAML with keys of keys', CONFIG, '? ' * 20_000)
_text('yaml_sixty', 'YAML with a number of base 60 of 20,000 digits', CONFIG, 'lr: 1' + ':59' * 20_000)
_text('yaml_digits', 'YAML with a number of 60,000 digits', CONFIG, 'lr: 1' + '0' * 60_000)
_text('yaml_object', 'YAML that calls os.system', CONFIG, f'lr: !!python/object/apply:os.system ["{PWNED}"]')
_text('yaml_itself', 'YAML of a list that holds itself', CONFIG, 'a: &a [*a]')
_text('yaml_long', 'YAML of 1 MB', CONFIG, '- a\n' * 250_000)
_text('flags_long', 'a flag file of 2 MB', FLAGS, '--notrain\n' * 200_000)
_text('flags_name', 'a flag with a name of 1 MB', FLAGS, '--' + 'a' * 1_000_000)


@case('a flag file that names itself by way of another', FLAGS)
def flags_circle(path):
    write(path, f'--flagfile={path.name}.b\n'.encode())
    write(f'{path}.b', f'--flagfile={path.name}\n'.encode())


@case('a flag file that is a pipe', FLAGS)
def flags_pipe(path):
    os.mkfifo(path)


# --- safetensors -----------------------------------------------------------------------------------------------------


def _tensors(key, what, header: str, data=b''):
    def function(path):
        write(path, struct.pack('<Q', 2 + len(header)) + f'{{{header}}}'.encode() + data)
    CASES[key] = what, function, NET


_ONE = '"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
_tensors('safetensors_overlap', 'safetensors whose tensors share their bytes', _ONE + ',' + _ONE.replace('"w"', '"v"'), bytes(4))
_tensors('safetensors_twice', 'safetensors with two tensors of one name', _ONE + ',' + _ONE.replace('0, 4', '4, 8'), bytes(8))
_tensors('safetensors_empty', 'safetensors of 100,000 empty tensors of 2^60 rows', ','.join(
    _ONE.replace('w', f'w{i}').replace('[1]', '[1152921504606846976, 0]').replace('0, 4', '0, 0') for i in range(100_000)))
_tensors('safetensors_product', 'safetensors whose shape is 2^64 numbers', _ONE.replace('[1]', '[4294967296, 4294967296]'), bytes(4))
_tensors('safetensors_deep', 'safetensors with a header nested 100,000 deep', '"__metadata__":' + '[' * 100_000)
_tensors('safetensors_type', 'safetensors of numbers of an unknown type', _ONE.replace('F32', 'F5'), bytes(4))


def _weights(key, what, change):
    """A case: a snapshot of a small network, whose weights `change` changes."""
    def function(path):
        import torch

        from training.encoders import RGBEncoder
        from training.networks import build_network
        from training.snapshot import describe
        net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=0, model_channels=8, channel_mult=[1],
                            num_blocks=1, attn_resolutions=[])
        content = describe(net, encoder=RGBEncoder(), dataset={}, recipe={})
        torch.save(content | {'state': {key: change(value) for key, value in net.state_dict().items()}}, path)
    CASES[key] = what, function, NET


_weights('weights_complex', 'a snapshot of complex weights', lambda value: value + 0j)
_weights('weights_whole', 'a snapshot of whole numbers', lambda value: value.int())
_weights('weights_sparse', 'a snapshot of sparse weights', lambda value: value.to_sparse())


# --- Arrays of images, and tables of Hugging Face (where pyarrow is not installed, they end in a line that names it) ------


def _npy_images(key, what, data: bytes):
    @case(what, IMAGES)
    def make(path):
        target = path.with_suffix('.npy')
        write(target, data)
        return target
    make.__name__ = key
    CASES[key] = CASES.pop('make')


_npy_images('npy_of_terabytes', 'an .npy of 100 bytes that says it has 2^40 images', npy_of((1 << 40, 64, 64, 3)))
_npy_images('npy_of_objects', 'an .npy of objects as images', npy_of((2,), "'|O'", pickle.dumps(Call(os.system, PWNED))))


@case('a folder of classes, one of which is a pipe', IMAGES)
def class_that_is_a_pipe(path):
    path.mkdir()
    write(path / '0.npy', npy_of((1, 8, 8, 3), data=bytes(192)))
    os.mkfifo(path / '1.npy')


def _table(key, what, make, ending='parquet'):
    """A file that `make(pyarrow, path)` writes; of a few bytes, where there is no pyarrow."""
    @case(what, SOURCE)
    def write_table(path):
        target = path.with_suffix('.' + ending)
        try:
            import pyarrow
            import pyarrow.ipc
            import pyarrow.parquet
            make(pyarrow, str(target))
        except ImportError:
            write(target, b'PAR1')
        return target
    CASES[key] = CASES.pop('write_table')


def _parquet(columns, schema=None, metadata=None, **options):
    def make(pa, path):
        table = pa.table(columns(pa), schema=schema and schema(pa))
        pa.parquet.write_table(table.replace_schema_metadata(metadata), path, **options)
    return make


def _many(pa):
    picture = pa.array([bytes(1 << 20)], pa.binary())
    return {'image': pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), picture)}


def _damaged_offsets(pa, path):
    table = pa.table({'image': pa.array([b'abc', b'defg'], pa.binary())})
    with pa.OSFile(path, 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    data = Path(path).read_bytes()
    write(path, data.replace(struct.pack('<3i', 0, 3, 7), struct.pack('<3i', 0, 3, 1 << 30)))


def _packed_batch(pa, path):
    table = pa.table({'image': pa.array([bytes(1 << 28)], pa.binary())})
    options = pa.ipc.IpcWriteOptions(compression='zstd')
    with pa.OSFile(path, 'wb') as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table)


_table('parquet_of_one_picture', 'a parquet file of 50 GB that are one picture, 50,000 times', _parquet(_many, store_schema=False))
_table('parquet_of_zeros', 'a parquet file with a picture of 300 MB of zeros', _parquet(
    lambda pa: {'image': pa.array([bytes(300 << 20)], pa.binary())}, compression='zstd', use_dictionary=False))
_table('parquet_metadata_deep', 'a parquet file whose metadata are nested 100,000 deep', _parquet(
    lambda pa: {'image': [b'x']}, metadata={'huggingface': '[' * 100_000}))
_table('parquet_of_passwords', 'a parquet file whose picture is a file of the system', _parquet(
    lambda pa: {'image': [{'bytes': None, 'path': '/etc/passwd'}]},
    lambda pa: pa.schema({'image': pa.struct({'bytes': pa.binary(), 'path': pa.string()})})))
_table('arrow_offsets', 'an Arrow file whose picture ends a gigabyte behind it', _damaged_offsets, 'arrow')
_table('arrow_packed', 'an Arrow file of 10 kB with a batch of 256 MB', _packed_batch, 'arrow')


# --- Running them ----------------------------------------------------------------------------------------------------


def run_case(key, folder: Path) -> dict:
    """Makes the file of a case and gives it to its script, in a child that has so much memory and time."""
    import psutil
    what, function, (script, *arguments) = CASES[key]
    folder.mkdir()
    made = function(folder / key) or folder / key
    places = dict(file=made, out=folder / f'out-{key}', images=folder.parent / 'images.zip',
                  golden=ROOT / 'tests' / 'golden' / 'pickles' / 'edm_snapshot.pkl')
    before, start = set(folder.iterdir()), time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(30 * SECONDS)                              # which waits for something
        start_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open(writer, 'w') as file:
            json.dump(verdict(script, [part.format(**places) for part in arguments]) | dict(start_kib=start_kib), file)
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        found = json.loads(file.read() or '{}')
    _, status, usage = os.wait4(child, 0)
    left = sorted(path.name for path in set(folder.iterdir()) - before)
    shutil.rmtree(folder)
    return dict(name=key, what=what, left=left, status=os.waitstatus_to_exitcode(status),
                mib=(usage.ru_maxrss - found.pop('start_kib', 0)) >> 10, cpu=round(usage.ru_utime + usage.ru_stime, 2),
                seconds=round(time.monotonic() - start, 2)) | dict(code=None, lines=[], unexpected='died') | found


def verdict(script, arguments) -> dict:
    """What a script says: code, lines of error, and what it raised that it should not have."""
    import click.testing
    from helpers import script_module
    with contextlib.redirect_stderr(io.StringIO()):
        result = click.testing.CliRunner().invoke(script_module(script).main, arguments)
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith(('Usage:', 'Try '))]
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    return dict(code=result.exit_code, lines=lines, unexpected=repr(unexpected))


@click.command()
@click.argument('folder', type=click.Path(file_okay=False, resolve_path=True, path_type=Path))
@click.argument('names', nargs=-1)
def main(folder, names):
    """Makes hostile files in FOLDER (all, or NAMES), and prints what the scripts make of each."""
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    from helpers import script_module, write_digits
    for script in {command[0] for _, _, command in CASES.values()}:
        script_module(script)
    (folder / 'cwd').mkdir(parents=True)
    write_digits(folder / 'images.zip', 20)
    (folder / 'canary').write_text('alive')
    os.chdir(folder / 'cwd')
    for key in names or CASES:
        print(json.dumps(run_case(key, folder / 'hostile')), flush=True)


if __name__ == '__main__':
    main()
