"""Hostile files: what each tries, and what the scripts make of it.

    python tests/hostile.py FOLDER     makes them all in FOLDER, gives each to the scripts, prints one JSON line for each

Each line has the name, the exit code, the lines of error and the growth of memory in MiB. The process has a limit of
address space, so that a file that asks for much more than it should ends in an error of its own.
"""

import contextlib
import gzip
import io
import json
import math
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 3 << 30            # bytes of address space beyond what the imports need
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


# --- Running them ----------------------------------------------------------------------------------------------------


def run_case(key, folder: Path) -> dict:
    """Makes the file of a case and gives it to its script, in this process."""
    import click.testing
    from helpers import script_module
    what, function, (script, *arguments) = CASES[key]
    made = function(folder / key)
    places = dict(file=made or folder / key, out=folder / f'out-{key}', images=folder.parent / 'images.zip',
                  golden=ROOT / 'tests' / 'golden' / 'pickles' / 'edm_snapshot.pkl')
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        result = click.testing.CliRunner().invoke(script_module(script).main, [a.format(**places) for a in arguments])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    for path in (folder / key, places['file']):
        if os.path.lexists(path):
            os.remove(path)
    return dict(name=key, what=what, code=result.exit_code, lines=result.stderr.splitlines(), unexpected=repr(unexpected),
                mib=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
                seconds=round(time.monotonic() - start, 2))


def main(folder):
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    folder = Path(folder).resolve()
    from helpers import script_module, write_digits
    for script in {command[0] for _, _, command in CASES.values()}:
        script_module(script)
    write_digits(folder / 'images.zip', 20)
    (folder / 'canary').write_text('alive')
    (folder / 'hostile').mkdir()
    (folder / 'cwd').mkdir()
    os.chdir(folder / 'cwd')
    import psutil
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)
    for key in CASES:
        print(json.dumps(run_case(key, folder / 'hostile')), flush=True)


if __name__ == '__main__':
    main(sys.argv[1])
