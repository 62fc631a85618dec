"""The cache of distillation: noisy images, their levels and perhaps classes, in memory and as a safetensors file."""

import json
import math
import os
import struct

import numpy as np
import torch

import dnnlib
from dnnlib.util import atomic_path
from torch_utils import distributed as dist

# --- The cache --------------------------------------------------------------------------------------------------------


def cache_size(rho: float, num_steps: int, batch: int) -> int:
    """Images in the cache of one process: round(rho T) batch (rounding half to even), at least one batch."""
    return max(round(rho * num_steps), 1) * batch


class Cache:
    """Noisy images x [M,C,H,W] float32, their levels int64 [M], and, if there are classes, these int64 [M].

    There is never a second copy of x.
    """

    def __init__(self, x: torch.Tensor, levels: torch.Tensor, classes: torch.Tensor | None = None):
        self.x, self.levels, self.classes = x, levels, classes

    def __len__(self):
        return len(self.levels)

    @property
    def image_shape(self) -> list[int]:
        """[C,H,W]."""
        return [*self.x.shape[1:]]

    @property
    def names(self) -> list[str]:
        """Of the tensors that there are."""
        return [name for name in _TYPES if getattr(self, name) is not None]

    def piece(self, name: str, start: int, end: int) -> np.ndarray:
        """Rows `start .. end - 1` of a tensor."""
        return getattr(self, name)[start:end].cpu().numpy()

    def first(self, count: int) -> 'Cache':
        """A copy of the first `count` images alone."""
        return Cache(*(getattr(self, name)[:count].clone() for name in self.names))

    def state_dict(self) -> dict:
        """References, not copies."""
        return {name: getattr(self, name) for name in self.names}

    def load_state_dict(self, state: dict):
        """Copies in place, also from a memory-mapped checkpoint. Raises UserError for another size."""
        if state['x'].shape != self.x.shape or ('classes' in state) != (self.classes is not None):
            raise dnnlib.UserError(f'the checkpoint has a cache of {list(state["x"].shape)}, not {list(self.x.shape)}, or '
                                   'one of them has classes and the other not')
        for name in self.names:
            getattr(self, name).copy_(state[name])


# --- Files ------------------------------------------------------------------------------------------------------------
#
# The safetensors format, written and read in pieces: eight bytes of header length, a JSON header with the place of each
# tensor, the raw bytes. A cache holds `x`, `levels`, perhaps `classes` and, as metadata, what it was made with.

_PIECE = 1 << 24
_TYPES = {'x': ('F32', np.dtype('<f4')), 'levels': ('I64', np.dtype('<i8')), 'classes': ('I64', np.dtype('<i8'))}


class CacheFile:
    """A cache on disk, read in pieces. Raises UserError for a file that `write_cache` did not write."""

    def __init__(self, path: str):
        self.path = path
        if not os.path.isfile(path):
            raise dnnlib.UserError(f'{path}: there is no such cache; make it with dynamic_prepare.py')
        try:
            with open(path, 'rb') as f:
                length = struct.unpack('<Q', f.read(8))[0]
                if length > 1 << 20:
                    raise ValueError('its header is too long')
                header = json.loads(f.read(length))
            self.description = {name: json.loads(value) for name, value in header['__metadata__'].items()}
            self.shape = [int(n) for n in header['x']['shape']]
            self.names = [name for name in _TYPES if name in header or name != 'classes']
            self.offsets, end = {}, 0
            for name in self.names:
                shape = self.shape if name == 'x' else self.shape[:1]
                kind, dtype = _TYPES[name]
                start, end = end, end + math.prod(shape) * dtype.itemsize
                if header[name] != {'dtype': kind, 'shape': shape, 'data_offsets': [start, end]}:
                    raise ValueError(f'{name} is not what a cache holds')
                self.offsets[name] = 8 + length + start
            if len(self.shape) != 4 or min(self.shape) < 1 or os.path.getsize(path) != 8 + length + end:
                raise ValueError('its size is wrong')
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise dnnlib.UserError(f'{path} is not a cache made by dynamic_prepare.py, or damaged ({error})') from None

    def __len__(self):
        return self.shape[0]

    @property
    def image_shape(self) -> list[int]:
        """[C,H,W]."""
        return self.shape[1:]

    def piece(self, name: str, start: int, end: int) -> np.ndarray:
        """Rows `start .. end - 1` of a tensor."""
        row, dtype = (self.shape[1:] if name == 'x' else []), _TYPES[name][1]
        count = math.prod(row)
        with open(self.path, 'rb') as f:
            f.seek(self.offsets[name] + start * count * dtype.itemsize)
            return np.fromfile(f, dtype, (end - start) * count).reshape(-1, *row)


def _pieces(count: int, row_bytes: int):
    """(start, end) of pieces of a few megabytes."""
    rows = max(_PIECE // row_bytes, 1)
    return [(start, min(start + rows, count)) for start in range(0, count, rows)]


def write_cache(path: str, shares: list, description: dict):
    """Writes the shares of all processes (Cache or CacheFile) behind each other; the file appears only when complete.

    `description` (plain values) is kept with it. No share is copied as a whole.
    """
    count = sum(len(share) for share in shares)
    names, image_shape = shares[0].names, shares[0].image_shape
    header, end = {'__metadata__': {name: json.dumps(value) for name, value in description.items()}}, 0
    for name in names:
        shape = [count, *image_shape] if name == 'x' else [count]
        start, end = end, end + math.prod(shape) * _TYPES[name][1].itemsize
        header[name] = {'dtype': _TYPES[name][0], 'shape': shape, 'data_offsets': [start, end]}
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    with atomic_path(path) as temp, open(temp, 'wb') as f:
        f.write(struct.pack('<Q', len(header)) + header)
        for name in names:
            for share in shares:
                for start, end in _pieces(len(share), 4 * math.prod(image_shape)):
                    f.write(np.ascontiguousarray(share.piece(name, start, end), dtype=_TYPES[name][1]).data)


def load_cache(path: str, size: int, expected: dict, device='cpu', rank: int | None = None,
               count: int | None = None) -> Cache:
    """This process's share of a cache file: images `rank * size .. (rank + 1) * size - 1`, held once in memory;
    of these only the first `count`, if given.

    `expected` are entries that the file's description must agree with. Raises UserError saying what differs.
    """
    file = CacheFile(path)
    for name, value in expected.items():
        if file.description.get(name) != value:
            raise dnnlib.UserError(
                f'{path} was made for another {name}: {file.description.get(name)} instead of {value}')
    first = (dist.get_rank() if rank is None else rank) * size
    if len(file) < first + size:
        raise dnnlib.UserError(f'{path} holds {len(file)} images, and process {first // size} needs those up to '
                               f'{first + size}: prepare it for as many processes, this batch size and this rho')
    count = size if count is None else min(count, size)
    x = torch.empty([count, *file.image_shape], device=device)
    for start, end in _pieces(count, 4 * math.prod(file.image_shape)):
        x[start:end] = torch.from_numpy(file.piece('x', first + start, first + end))
    return Cache(x, *(torch.from_numpy(file.piece(name, first, first + count)) for name in file.names if name != 'x'))
