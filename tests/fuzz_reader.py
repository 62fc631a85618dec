"""Fuzz the readers of files: good files with lengths, counts, offsets and bytes changed are read, or refused in one line.

    python tests/fuzz_reader.py --minutes=10
    python tests/fuzz_reader.py --seconds=60 --kind=png --kind=tar --seed=7

A change of the structure has its checksums repaired, so that it gets past them. Every worker reads in its own process,
thousands of files a minute, with limits of memory and of time; what hangs or crashes one is counted, and its file kept.
"""

import collections
import functools
import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import select
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import hostile  # noqa: E402
from helpers import script_module  # noqa: E402

from dnnlib import UserError, budget  # noqa: E402
from dnnlib.image_io import BadImage, decode_image, encode_png  # noqa: E402

PICKLES = Path(__file__).parent / 'golden' / 'pickles'
GROWTH, ADDRESSES = 1 << 30, 4 << 30    # bytes that a file may take, and address space for them
SECONDS = 10                            # of the processor for one file
OUTCOMES = ('read', 'refused', 'error', 'hang', 'crash', 'memory')

# --- Changes ---------------------------------------------------------------------------------------------------------

_NUMBERS = [0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 4095, 65535, 65536, 10**6, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1,
            2**40, 2**62, 2**63 - 1, 2**64 - 1, -1, -2, -512]


def number(rng, old: int) -> int:
    """A length, count or offset instead of `old`."""
    return rng.choice([*_NUMBERS, old + 1, old - 1, 2 * old, old // 2, 100 * old])


def pack(layout: str, values) -> bytes:
    """struct.pack of numbers of any size, which are cut to that of their fields."""
    codes = re.sub(r'(\d+)([BHIQ])', lambda match: match[2] * int(match[1]), layout)
    bits = {'B': 8, 'H': 16, 'I': 32, 'Q': 64}
    return struct.pack(layout, *(value & (1 << bits[code]) - 1 if code in bits else value for code, value in zip(
        re.sub('[^BHIQs]', '', codes), values, strict=True)))


def in_bytes(data: bytes, rng) -> bytes:
    """One to ten changes of bytes anywhere."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 10])):
        if not data:
            break
        # Headers and the ends of files, where directories are, decide more than the numbers in the middle.
        place = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 3000)),
                            len(data) - 1 - rng.randrange(min(len(data), 1500))])
        size = rng.choice([1, 1, 4, 8, 100, 5000])
        action = rng.randrange(6)
        if action == 0:
            data[place] = rng.randrange(256)
        elif action == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 2:
            del data[place:place + size]
        elif action == 3:
            data[place:place] = data[place:place + size] * rng.choice([1, 1, 50])
        elif action == 4:
            data[place:place + size] = rng.choice([b'\xff', b'\x00', b'\x80', b'R', b'b', b'0', b'}']) * min(size, 8)
        else:
            del data[place:]
    return bytes(data)


def in_list(parts: list, rng, change) -> list:
    """`parts` with one left out, repeated, moved, or changed by `change`."""
    parts = list(parts)
    place = rng.randrange(len(parts))
    action = rng.randrange(8)
    if action == 0:
        del parts[place]
    elif action == 1:
        parts[place:place] = parts[place:place + rng.choice([1, 3, 20])] * rng.choice([1, 2, 300])
    elif action == 2:
        parts.insert(rng.randrange(len(parts)), parts[place])
    else:
        parts[place] = change(parts[place])
    return parts


# Instructions that are put into pickles: containers, calls, the memory, doubling and dropping.
_INSTRUCTIONS = [b'2', b'0', b'}', b']', b')', b'(', b't', b'l', b'd', b'R', b'b', b'a', b'e', b's', b'u', b'N', b'Q', b'1',
                 b'\x81', b'\x85', b'\x86', b'\x90', b'\x93', b'\x94', b'h\0', b'h\1', b'q\0', b'q\1', b'K\1', b'j\0\0\0\0']
_LENGTHS = {'BINUNICODE': 'I', 'BINBYTES': 'I', 'BINSTRING': 'I', 'SHORT_BINUNICODE': 'B', 'SHORT_BINBYTES': 'B',
            'BINUNICODE8': 'Q', 'BINBYTES8': 'Q', 'LONG1': 'B', 'BINPUT': 'B', 'BINGET': 'B', 'LONG_BINPUT': 'I',
            'LONG_BINGET': 'I', 'FRAME': 'Q', 'PROTO': 'B'}


@functools.cache
def instructions(data: bytes) -> tuple[list, bytes]:
    """[(name, its bytes)] of the pickles at the beginning, and what is behind them."""
    found, file, start = [], io.BytesIO(data), 0
    try:
        while start < len(data):
            ops = [(op.name, place) for op, _, place in pickletools.genops(file)]
            ends = [place for _, place in ops[1:]] + [file.tell()]
            found += [(name, data[place:end]) for (name, place), end in zip(ops, ends, strict=True)]
            start = file.tell()
    except ValueError:
        pass                                    # the numbers of an older file of torch
    return found, data[start:]


def in_pickle(data: bytes, rng) -> bytes:
    ops, rest = instructions(data)

    def change(op):
        name, raw = op
        if name in ('BINBYTES', 'SHORT_BINBYTES') and len(raw) > 100 and rng.random() < 0.7:
            inner = in_pickle(raw[5 if name == 'BINBYTES' else 2:], rng)
            return 'BINBYTES', b'B' + struct.pack('<I', len(inner)) + inner
        if name in _LENGTHS and rng.random() < 0.7:
            layout = '<' + _LENGTHS[name]
            size = struct.calcsize(layout)
            old, = struct.unpack(layout, raw[1:1 + size])
            return name, raw[:1] + pack(layout, [number(rng, old)]) + raw[1 + size:]
        if name in ('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINUNICODE'):
            return 'LONG1', b'\x8a\x09' + number(rng, 5).to_bytes(9, 'little', signed=True)
        return 'NONE', rng.choice(_INSTRUCTIONS)

    for _ in range(rng.choice([1, 1, 2, 5])):
        if ops:
            ops = in_list(ops, rng, change)
    if rest and rng.random() < 0.2:
        rest = pack('<Q', [number(rng, 10)]) + rest[8:]
    return b''.join(raw for _, raw in ops) + rest


_LOCAL, _CENTRAL, _END = '<4s5H3I2H', '<4s6H3I5H2I', '<4s4H2IH'


def in_zip(data: bytes, rng) -> bytes:
    """A change of a file in the zip, or of what its local header, its directory or its end say."""
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        entries = [(info.filename, z.read(info), info.compress_type) for info in z.infolist()]
    if rng.random() < 0.6:
        def change(entry):
            name, content, method = entry
            if rng.random() < 0.1:
                return rng.choice(['', '../a', '/a', 'a\n\x1b[2J', name * 200, name + '/']), content, method
            inner = {'.pkl': in_pickle, '.npy': in_npy, '.png': in_png, '.json': in_json}.get(Path(name).suffix, in_bytes)
            return name, inner(content, rng) if content else b'x', rng.choice([method, 0, 8])
        entries = in_list(entries, rng, change)
    where = rng.choice(['', 'local', 'central', 'end', 'size', 'size'])
    target, field = rng.randrange(max(1, len(entries))), rng.randrange(1, 20)

    def fields(part, index, layout, values):
        """The bytes of a header, one of its fields changed if it is its turn."""
        if part == where and index == target:
            place = 1 + field % (len(values) - 1)
            values[place] = number(rng, values[place])
        return pack(layout, values)

    body, directory = bytearray(), bytearray()
    for index, (name, content, method) in enumerate(entries):
        name, packer = name.encode(), zlib.compressobj(6, wbits=-15)
        packed = packer.compress(content) + packer.flush() if method == 8 else content
        sizes = [zlib.crc32(content), len(packed), len(content)]
        extra = b''
        if where == 'size' and index == target:         # of both headers, in the fields for large files
            wide = [number(rng, len(content)), number(rng, len(packed)), number(rng, len(body))][:rng.choice([1, 2, 3])]
            extra = pack(f'<HH{"Q" * len(wide)}', [1, 8 * len(wide), *wide])
            sizes[1:] = [2**32 - 1 if len(wide) > 1 else len(packed), 2**32 - 1]
        offset = 2**32 - 1 if len(extra) > 20 else len(body)
        common = [20, 0x800, method, 0, 33, *sizes, len(name), len(extra)]
        directory += fields('central', index, _CENTRAL, [b'PK\1\2', 45, *common, 0, 0, 0, 0, offset]) + name + extra
        body += fields('local', index, _LOCAL, [b'PK\3\4', *common]) + name + extra + packed
    end = [b'PK\5\6', 0, 0, len(entries), len(entries), len(directory), len(body), 0]
    return bytes(body + directory + fields('end', target, _END, end))


def in_png(data: bytes, rng) -> bytes:
    """A change of a chunk, of the header or of the packed pixels, with new checksums."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        size, kind = struct.unpack_from('>I4s', data, place)
        chunks.append((kind, data[place + 8:place + 8 + size], None))
        place += 12 + size
    if not chunks:
        return in_bytes(data, rng)

    def change(part):
        kind, content, _ = part
        if rng.random() < 0.2:
            return kind, content, number(rng, len(content))
        if kind == b'IHDR' and len(content) == 13:
            values = list(struct.unpack('>IIBBBBB', content))
            values[rng.randrange(7)] = number(rng, 8)
            return kind, pack('>IIBBBBB', values), None
        if kind == b'IDAT' and rng.random() < 0.5:
            return kind, rng.choice([b'', hostile.zeros(1 << 24), zlib.compress(bytes(rng.randrange(500)))]), None
        return rng.choice([b'PLTE', b'tRNS', b'eXIf', b'zTXt', b'iCCP', b'acTL', b'fdAT', kind]), in_bytes(content, rng), None

    for _ in range(rng.choice([1, 1, 3])):
        chunks = in_list(chunks, rng, change) or chunks
    return data[:8] + b''.join(
        pack('>I', [len(content) if size is None else size]) + kind + content
        + struct.pack('>I', zlib.crc32(kind + content)) for kind, content, size in chunks)


def in_npy(data: bytes, rng) -> bytes:
    size = int.from_bytes(data[8:10], 'little')
    header, body = data[10:10 + size].decode('latin1'), data[10 + size:]
    header = in_text(header.encode(), rng).decode('latin1')
    if rng.random() < 0.3:
        header = header.replace("'<f", rng.choice(["'<c", "'|S", "'|O", "'<U9999", "'|V", "'(9,9)f", "'f4,f"]))
    length = number(rng, len(header)) if rng.random() < 0.1 else len(header)
    version = rng.choice([1, 1, 1, 1, 2, 3, 0, 255])
    return data[:6] + bytes([version, 0]) + pack('<H' if version == 1 else '<I', [length]) + header.encode('latin1') + body


_WORDS = [b'[', b'{', b'(', b',', b':', b'"', b"'", b'\n', b'*a', b'&a ', b'<<: *a', b'!!python/name:os.system ', b'null', b'NaN',
          b'-', b'1e999', b'"\\ud800"', b'\xef\xbb\xbf', b'\xff', b'\0', b'--flagfile=fuzzed\n', b'--', b'=', b'${a}', b'? ', b'1:59']


def in_text(data: bytes, rng) -> bytes:
    """Numbers and signs of a text changed, pieces of it repeated."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        digits = [index for index in range(len(data)) if data[index:index + 1].isdigit()]
        action = rng.randrange(4)
        if action == 0 and digits:
            place = rng.choice(digits)
            value = str(number(rng, 5)) * rng.choice([1, 1, 1, 2000])
            data = data[:place] + value.encode() + data[place + 1:]
        elif action == 1:
            data = data[:place] + rng.choice(_WORDS) * rng.choice([1, 1, 3, 20_000]) + data[place:]
        elif action == 2:
            data = data[:place] + data[place:place + 30] * rng.choice([0, 2, 500]) + data[place + 30:]
        else:
            data = in_bytes(data, rng)
    return data


def in_json(data: bytes, rng) -> bytes:
    """One value of the tree replaced, or the text changed."""
    if rng.random() < 0.4:
        return in_text(data, rng)
    try:
        places, pending = [], [json.loads(data)]
    except ValueError:
        return in_text(data, rng)
    whole = pending[0]
    while pending:
        part = pending.pop()
        keys = list(part) if isinstance(part, dict) else list(range(len(part))) if isinstance(part, list) else []
        places += [(part, key) for key in keys]
        pending += [part[key] for key in keys]
    for _ in range(rng.choice([1, 1, 3])):
        if places:
            part, key = rng.choice(places)
            part[key] = rng.choice([None, True, [], {}, '', 'a\x1b[2J\n', -1, 0.5, float('nan'), 1e308, number(rng, 1), 10**400,
                                    [[[1]]], ['a'] * 1000, {'a': [1]}, [0] * rng.choice([1, 100_000])])
    return json.dumps(whole).encode()


def in_safetensors(data: bytes, rng) -> bytes:
    size = int.from_bytes(data[:8], 'little')
    header = in_json(data[8:8 + size], rng)
    length = number(rng, len(header)) if rng.random() < 0.1 else len(header)
    return pack('<Q', [length]) + header + data[8 + size:]


# Place and length of the fields of a tar's header that are numbers.
_FIELDS = {'mode': (100, 8), 'size': (124, 12), 'time': (136, 12), 'type': (156, 1), 'major': (329, 8), 'holes': (386, 12),
           'more': (482, 1), 'real': (483, 12)}


def in_tar(data: bytes, rng) -> bytes:
    """A change of a header, with its sum; headers of other kinds before it."""
    blocks = [data[place:place + 512] for place in range(0, len(data), 512)]
    headers = [index for index, block in enumerate(blocks) if block[257:262] == b'ustar']
    index = rng.choice(headers)
    header = bytearray(blocks[index])
    action = rng.randrange(4)
    if action == 0:
        place, size = _FIELDS[rng.choice(list(_FIELDS))]
        value = number(rng, 100)
        if size == 1:
            header[place] = rng.choice(b'01234567gxKLSDM\0\xff')
        elif rng.random() < 0.5:
            header[place:place + size] = b'%0*o\0' % (size - 1, abs(value) % 8**(size - 1))
        else:
            head = 0xff if value < 0 else 0x80
            header[place:place + size] = bytes([head]) + (value % 256**(size - 1)).to_bytes(size - 1, 'big')
    elif action == 1:
        key = rng.choice(['size', 'path', 'GNU_sparse_major', 'GNU_sparse_realsize', 'GNU_sparse_map', 'GNU_sparse_size', 'mtime'])
        blocks[index] = hostile.pax(**{key: number(rng, 5), 'GNU_sparse_name': 'a'})[:1024] + blocks[index]
    elif action == 2:
        blocks = in_list(blocks, rng, lambda block: in_bytes(block, rng)[:512].ljust(512, b'\0'))
    if action == 0:
        blocks[index] = hostile._sealed(bytes(header))
    return b''.join(blocks)


# --- Good files and their readers ------------------------------------------------------------------------------------


def _saved(save, **more) -> bytes:
    file = io.BytesIO()
    save(file, **more)
    return file.getvalue()


def _zip(files: dict, method=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', method) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return file.getvalue()


def _tar(files: dict) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Small good files of each kind."""
    import safetensors.torch
    import torch

    from training import encoders
    from training.networks import build_network
    from training.snapshot import save_snapshot
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=2, model_channels=8, channel_mult=[1],
                        num_blocks=1, attn_resolutions=[])
    save_snapshot(str(folder / 'seed'), net, encoder=encoders.RGBEncoder(), dataset={}, recipe={'a': 1}, nimg=1)
    state = {'ema_model': {'a.weight': torch.randn(3, 4), 'a.bias': torch.arange(5)}, 'step': 1}
    moments = {'mu': np.zeros(3), 'sigma': np.eye(3)}
    small = hostile.edm(hostile.module(hostile.dictionary(w=hostile.tensor(hostile.storage(4), [2, 2], [2, 1])),
                                       _init_kwargs=hostile.dictionary(img_resolution=hostile.number(8))))
    picture = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    labels = {'labels': [['a.png', 0], ['b.png', 1]], 'class_names': ['x', 'y'], 'classes': [3, 4], 'sim_name': 'z'}
    batch = {'data': np.zeros([2, 3072], np.uint8), 'labels': [0, 1]}
    arrays = dict(arr_0=np.zeros([4, 8, 8, 3], np.uint8), arr_1=np.arange(4))
    archive = _zip({'a.png': picture, 'b.png': picture, 'dataset.json': json.dumps(labels).encode()}, zipfile.ZIP_DEFLATED)
    latents = _saved(lambda file: np.save(file, np.zeros([8, 4, 4], np.float32)))
    root = Path(__file__).resolve().parents[1]
    return {
        'pickle': [pickle.dumps({'fid': moments}, 4), small, pickle.dumps(moments, 2), pickle.dumps(batch, 2),
                   *(path.read_bytes() for path in sorted(PICKLES.glob('*.pkl')))],
        'torch': [(folder / 'seed').read_bytes(), _saved(lambda file: torch.save(state, file))],
        'legacy': [_saved(lambda file: torch.save(state, file, _use_new_zipfile_serialization=False)), hostile.storage(4)],
        'safetensors': [safetensors.torch.save({'a': torch.zeros(3, 4), 'b': torch.ones(2, dtype=torch.float16)})],
        'npz': [_saved(save, **table) for save in (np.savez, np.savez_compressed) for table in (moments, arrays)],
        'npy': [latents],
        'png': [picture, _saved(_pillow('P'), format='png'), _saved(_pillow('RGBA'), format='png')],
        'image': [_saved(_pillow(mode), format=kind) for mode, kind in (
            ('RGB', 'jpeg'), ('P', 'gif'), ('RGB', 'webp'), ('RGB', 'tiff'), ('RGB', 'bmp'), ('RGB', 'ppm'), ('RGB', 'tga'))],
        'zip': [archive, _zip({'00000/img-mean-std-00000000.npy': latents})],
        'json': [json.dumps(labels).encode(), b'{"labels": [["a.png", [0.5, 1]], ["b.png", [0, 1]]]}'],
        'tar': [_tar({f'cifar-10-batches-py/{name}': pickle.dumps(batch if 'data' in name else {'label_names': ['a', 'b']}, 2)
                      for name in ('batches.meta', *(f'data_batch_{i}' for i in range(1, 6)), 'test_batch')})],
        'yaml': [path.read_bytes() for path in sorted((root / 'distillation' / 'yaml' / 'cifar10_32' / 'exp').glob('*.yaml'))],
        'flags': [path.read_bytes() for path in sorted((root / 'long_tail' / 'config').glob('*.txt'))],
    }


def _pillow(mode):
    import PIL.Image
    return PIL.Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode).save


def open_network(path):
    from snapshot_tool import describe
    from torch_utils.files.identify import identify
    from training.snapshot import load_snapshot
    found = identify(path)
    describe(found)
    if found.kind in ('snapshot', 'edm'):
        load_snapshot(path)
    if found.kind == 'statistics':
        open_statistics(path)


def open_statistics(path):
    from metrics.statistics import load_statistics
    from training.data.images import open_images
    statistics = load_statistics(path)
    if statistics.images:
        images = open_images(statistics.images)
        images.images(np.arange(min(4, len(images))))


def open_data(path):
    from training.data.dataset import ImageDataset
    images = ImageDataset(path)
    images.labels([0])
    images.images(np.arange(min(2, len(images))))


def open_labels(path):
    picture = hostile.small_png()
    Path(path).write_bytes(_zip({'a.png': picture, 'b.png': picture, 'dataset.json': Path(path).read_bytes()}))
    open_data(path)
    budget.read_json(path + '.json') if os.path.exists(path + '.json') else None


def open_source(path):
    from training.data.sources import open_source
    os.replace(path, path + '.tar')
    source = open_source(path + '.tar')
    source.picture(0)


def open_array(path):
    from training.data.dataset import _decode_npy
    _decode_npy(Path(path).read_bytes())


def open_config(path):
    from distillation import configs
    is_experiment = b'teacher' in Path(path).read_bytes()
    (configs.read_experiment if is_experiment else configs.read_network)(path)


def open_flags(path):
    from long_tail.flags import read_flags
    main = script_module('long_tail/main.py').main
    read_flags([f'--flagfile={path}'], {name.lstrip('-'): param for param in main.params
                                        for name in (*param.opts, *param.secondary_opts)})


def open_picture(path):
    decode_image(Path(path).read_bytes())


# Kind -> (its own change, reader).
KINDS = {
    'pickle': (in_pickle, open_network), 'torch': (in_zip, open_network), 'legacy': (in_pickle, open_network),
    'safetensors': (in_safetensors, open_network), 'npz': (in_zip, open_statistics), 'npy': (in_npy, open_array),
    'png': (in_png, open_picture), 'image': (in_bytes, open_picture), 'zip': (in_zip, open_data),
    'json': (in_json, open_labels), 'tar': (in_tar, open_source), 'yaml': (in_text, open_config), 'flags': (in_text, open_flags),
}
REFUSED = (UserError, BadImage, click.ClickException)

# --- Workers ---------------------------------------------------------------------------------------------------------


def outcome_of(read, path: str) -> tuple[str, str]:
    """(outcome, what was said)."""
    try:
        read(path)
    except REFUSED as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return ('refused', '') if '\n' not in text.rstrip('\n') else ('error', f'two lines: {text}')
    except Exception as error:
        return 'error', repr(error)
    return 'read', ''


def work(files: dict, kinds: list, rng: random.Random, folder: Path, keep: Path, writer: int):
    """Reads changed files for ever, and writes a line for each: kind, outcome, what was said. Keeps those that are more
    than refused in `keep`.
    """
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ADDRESSES,) * 2)
    warnings.simplefilter('ignore')
    path = folder / 'fuzzed'
    base = psutil.Process().memory_info().rss
    with open(writer, 'w', buffering=1) as report:
        while True:
            kind = rng.choice(kinds)
            change, read = KINDS[kind]
            good = rng.choice(sorted(files[kind], key=len)[:rng.choice([2, 100])])   # large ones less often
            data = (in_bytes if rng.random() < 0.2 else change)(good, rng)
            path.write_bytes(data)
            (folder / 'last').write_bytes(data)
            print(f'{kind} begun ', file=report)
            outcome, text = outcome_of(read, str(path))
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base > GROWTH:
                outcome = 'memory'
            if outcome in OUTCOMES[2:]:
                kept = keep / f'{kind}-{outcome}-{time.time_ns()}'
                kept.write_bytes(data)
                text = f'{kept}: {text}'
            print(f'{kind} {outcome} {ascii(text)[:300]}', file=report)
            if outcome == 'memory':
                return                                          # the most that it ever had stays


class Worker:
    """A process that fuzzes, and what it was last seen to do."""

    def __init__(self, files, kinds, seed: int, place: Path, keep: Path):
        self.folder = place / f'worker-{seed}'
        self.folder.mkdir()
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.reader)
            os.chdir(self.folder)
            with open(os.devnull, 'w') as null:                 # of warnings by libraries in C
                os.dup2(null.fileno(), 2)
            try:
                work(files, kinds, random.Random(seed), self.folder, keep, writer)
            finally:
                os._exit(0)
        os.close(writer)
        self.kind, self.is_reading, self.text, self.since = kinds[0], False, b'', 0.0
        self.process = psutil.Process(self.pid)

    def cpu(self) -> float:
        try:
            return sum(self.process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            return 0.0

    def lines(self):
        """(kind, outcome, text) of what has come; None at its end."""
        data = os.read(self.reader, 1 << 16)
        *lines, self.text = (self.text + data).split(b'\n')
        for line in lines:
            self.kind, outcome, text = line.decode().split(' ', 2)
            self.is_reading, self.since = outcome == 'begun', self.cpu()
            if outcome != 'begun':
                yield self.kind, outcome, text
        if not data:
            yield None

    def end(self) -> int:
        self.process.kill() if self.process.is_running() else None
        os.close(self.reader)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@click.command()
@click.option('--seconds', type=float, default=60, show_default=True, help='How long')
@click.option('--minutes', type=float, help='The same in minutes')
@click.option('--kind', 'kinds', multiple=True, type=click.Choice(list(KINDS)), help='Kinds of files  [default: all]')
@click.option('--seed', type=int, default=0, show_default=True, help='Which changes')
@click.option('--workers', type=int, default=1, show_default=True, help='Processes')
@click.option('--keep', type=click.Path(path_type=Path), help='Folder for files that are more than refused  [default: a new one]')
def main(seconds, minutes, kinds, seed, workers, keep):
    """Fuzz the readers of files; ends with exit code 1 if any file hung, crashed, or took more than 1 GiB."""
    import torch
    torch.set_num_threads(1)
    seconds = seconds if minutes is None else 60 * minutes
    kinds = list(kinds or KINDS)
    counts = collections.Counter()
    keep = (keep or Path(tempfile.gettempdir()) / 'fuzz-found').resolve()
    keep.mkdir(parents=True, exist_ok=True)

    def count(kind, outcome, text):
        counts[kind, outcome] += 1
        if outcome in OUTCOMES[2:] and counts[kind, outcome] <= 20:
            print(f'{kind} {outcome}: {text}', file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as place:
        files = seeds(Path(place))
        for kind in kinds:                                      # imports, and a proof that it is good
            path = Path(place, 'good')
            path.write_bytes(files[kind][0])
            KINDS[kind][1](str(path))
        numbers = iter(range(1000 * seed, 1000 * seed + 1000))
        pool = [Worker(files, kinds, next(numbers), Path(place), keep) for _ in range(workers)]
        end = time.monotonic() + seconds
        while time.monotonic() < end or not counts:
            ready = select.select([worker.reader for worker in pool], [], [], 1)[0]
            for worker in list(pool):
                ended = False
                for line in worker.lines() if worker.reader in ready else ():
                    ended = line is None
                    if line:
                        count(*line)
                hangs = worker.is_reading and worker.cpu() - worker.since > SECONDS
                if ended or hangs:
                    status = worker.end()
                    if worker.is_reading:
                        outcome = 'hang' if hangs else 'crash'
                        kept = shutil.copyfile(worker.folder / 'last', keep / f'{worker.kind}-{outcome}-{time.time_ns()}')
                        count(worker.kind, outcome, f'{kept}: status {status}')
                    pool.remove(worker)
                    pool.append(Worker(files, kinds, next(numbers), Path(place), keep))
        for worker in pool:
            worker.end()
    print(f'{"kind":12}' + ''.join(f'{outcome:>10}' for outcome in OUTCOMES))
    for kind in kinds:
        print(f'{kind:12}' + ''.join(f'{counts[kind, outcome]:10}' for outcome in OUTCOMES))
    print(f'{counts.total()} files read or refused in {seconds:.0f} s')
    sys.exit(any(counts[kind, outcome] for kind in kinds for outcome in OUTCOMES[2:]))


if __name__ == '__main__':
    main()
