"""The cache of distillation: noisy images, their levels and perhaps classes, in memory and as a
safetensors file.

The file holds `x`, `levels`, perhaps `classes` and, as metadata, what it was made with. It is
written and read in pieces, so that a process never holds a second copy of its images.
"""

import json
import math
import os
import struct

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dnnlib import UserError
from dnnlib.util import atomic_path, require_same
from torch_utils import distributed as dist

# Type of each tensor: its name in the file, and that of NumPy.
TYPES = {'x': ('F32', '<f4'), 'levels': ('I64', '<i8'), 'classes': ('I64', '<i8')}
PIECE_BYTES = 1 << 24


def cache_size(rho: float, num_steps: int, batch: int) -> int:
    """Images in the cache of one process: round(rho T) batch (rounding half to even), at least
    one batch.
    """
    return max(round(rho * num_steps), 1) * batch


class Cache:
    """Noisy images x [M,C,H,W] float32, their levels int64 [M], and perhaps their classes int64
    [M].

    x may be on any device; levels and classes are on the CPU.
    """

    def __init__(self, x: torch.Tensor, levels: torch.Tensor, classes: torch.Tensor | None = None):
        self.x = x
        self.levels = levels
        self.classes = classes

    def __len__(self):
        return len(self.levels)

    @property
    def names(self) -> list[str]:
        """Of the tensors that it has."""
        return [name for name in TYPES if getattr(self, name) is not None]

    @property
    def image_shape(self) -> list[int]:
        """[C,H,W]."""
        return [*self.x.shape[1:]]

    def take(self, positions, device):
        """Copies of the images on `device`, their levels and classes (None: no classes), at
        `positions` int64 [n].
        """
        classes = None if self.classes is None else self.classes[positions]
        return self.x[positions].to(device), self.levels[positions], classes

    def put(self, positions, x, levels, classes=None):
        """Writes back what `take` gave; classes stay as they are for None."""
        self.x[positions] = x.to(self.x.device)
        self.levels[positions] = levels
        if classes is not None:
            self.classes[positions] = classes

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
        """Copies in place, also from memory-mapped tensors. Raises UserError for another size."""
        has_classes = state.get('classes') is not None
        if state['x'].shape != self.x.shape or has_classes != (self.classes is not None):
            raise UserError(f'the checkpoint has a cache of {list(state["x"].shape)}, not '
                            f'{list(self.x.shape)}, or one of them has classes and the other not')
        for name in self.names:
            getattr(self, name).copy_(state[name])


class CacheFile:
    """A cache on disk. Raises UserError for a file that `write_cache` did not write.

    `description` is what it was made with, `shape` [M,C,H,W].
    """

    def __init__(self, path: str):
        self.path = path
        if not os.path.isfile(path):
            raise UserError(f'{path}: there is no such cache; make it with dynamic_prepare.py')
        try:
            with safe_open(path, 'np') as file:
                self.names = [name for name in TYPES if name in file.keys()]
                self.shape = file.get_slice('x').get_shape()
                for name in {'levels', *self.names}:
                    tensor = file.get_slice(name)
                    shape = self.shape if name == 'x' else self.shape[:1]
                    if (tensor.get_dtype(), tensor.get_shape()) != (TYPES[name][0], shape):
                        raise ValueError(f'{name} is not what a cache holds')
                if len(self.shape) != 4 or 0 in self.shape:
                    raise ValueError(f'its images have the shape {self.shape}')
                metadata = file.metadata() or {}
                self.description = {name: json.loads(value) for name, value in metadata.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f'{path} is not a cache made by dynamic_prepare.py, or damaged '
                            f'({error})') from None

    def __len__(self):
        return self.shape[0]

    @property
    def image_shape(self) -> list[int]:
        """[C,H,W]."""
        return self.shape[1:]

    def piece(self, name: str, start: int, end: int) -> np.ndarray:
        """Rows `start .. end - 1` of a tensor, read from the disk."""
        # Opened anew each time, so that the pages leave the memory.
        with safe_open(self.path, 'np') as file:
            return file.get_slice(name)[start:end]

    def mapped(self) -> dict:
        """{name: tensor}, memory-mapped."""
        with safe_open(self.path, 'pt') as file:
            return {name: file.get_tensor(name) for name in self.names}


def _pieces(count: int, image_shape) -> list[tuple[int, int]]:
    """(start, end) of pieces of `count` images, each of a few megabytes."""
    rows = max(PIECE_BYTES // (4 * math.prod(image_shape)), 1)
    return [(start, min(start + rows, count)) for start in range(0, count, rows)]


def write_cache(path: str, shares: list, description: dict):
    """Writes the shares of all processes (Cache or CacheFile) one behind the other.

    `description` (plain values) is kept with it. The file appears only when complete.
    """
    names, image_shape = shares[0].names, shares[0].image_shape
    count = sum(len(share) for share in shares)
    header = {'__metadata__': {name: json.dumps(value) for name, value in description.items()}}
    end = 0
    for name in names:
        kind, dtype = TYPES[name]
        shape = [count, *image_shape] if name == 'x' else [count]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {'dtype': kind, 'shape': shape, 'data_offsets': [start, end]}
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        file.write(struct.pack('<Q', len(header)) + header)
        for name in names:
            for share in shares:
                for start, end in _pieces(len(share), image_shape):
                    rows = share.piece(name, start, end)
                    file.write(np.ascontiguousarray(rows, dtype=TYPES[name][1]).data)


def load_cache(path: str, size: int, expected: dict, rank: int | None = None) -> Cache:
    """This process's share of a cache file: images `rank * size .. (rank + 1) * size - 1`.

    `expected` are entries that the file's description must agree with. Raises UserError saying what
    differs, or if the file is too small.
    """
    file = CacheFile(path)
    require_same(path, file.description, expected, 'make another one with dynamic_prepare.py')
    first = (dist.get_rank() if rank is None else rank) * size
    if len(file) < first + size:
        raise UserError(f'{path} holds {len(file)} images, and process {first // size} needs '
                        f'those up to {first + size}: prepare it for as many processes, this '
                        'batch size and this rho')
    x = torch.empty([size, *file.image_shape])
    for start, end in _pieces(size, file.image_shape):
        x[start:end] = torch.from_numpy(file.piece('x', first + start, first + end))
    others = [file.piece(name, first, first + size) for name in file.names if name != 'x']
    return Cache(x, *map(torch.from_numpy, others))
