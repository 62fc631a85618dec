"""The cache of distillation: noisy images, their levels and perhaps classes, in memory and as a
safetensors file.

The file holds `x`, `levels`, perhaps `classes` and, as metadata, what it was made with. Those of
the paper's authors are read too. A process never holds a second copy of its images.
"""

import dataclasses
import json
import math
import os
import struct

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dnnlib import UserError
from dnnlib.util import atomic_path, require_same
from torch_utils.files.pickles import (
    NUMPY_ARRAYS,
    ForeignPickleError,
    NumpyArray,
    RestrictedUnpickler,
    errors_of,
    map_file,
)

TYPES = {'x': 'F32', 'levels': 'I64', 'classes': 'I64'}  # of the tensors in a file
READ_ROWS = 4096


def cache_size(rho: float, num_steps: int, batch: int) -> int:
    """Images in the cache of one process: round(rho T) batch (rounding half to even), at least
    one batch.
    """
    return max(round(rho * num_steps), 1) * batch


@dataclasses.dataclass
class Cache:
    """Noisy images x [M,C,H,W] float32, their levels int64 [M], and perhaps their classes int64
    [M].

    x may be on any device; levels and classes are on the CPU.
    """

    x: torch.Tensor
    levels: torch.Tensor
    classes: torch.Tensor | None = None

    def __len__(self):
        return len(self.levels)

    def __getitem__(self, rows) -> 'Cache':
        """Images of some rows: copies where `rows` is int64 [n], views for a slice."""
        return Cache(**{name: value[rows] for name, value in self.state_dict().items()})

    def __setitem__(self, rows, images: 'Cache'):
        """Writes back; classes stay as they are if `images` has none."""
        for name, value in images.state_dict().items():
            stored = getattr(self, name)
            stored[rows] = value.to(stored.device)

    def state_dict(self) -> dict:
        """References, not copies."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def load_state_dict(self, state: dict):
        """Copies in place, also from memory-mapped tensors. Raises UserError for another size."""
        stored = self.state_dict()
        if state['x'].shape != self.x.shape or ('classes' in state) != ('classes' in stored):
            raise UserError(f'the checkpoint has a cache of {list(state["x"].shape)}, not '
                            f'{list(self.x.shape)}, or one of them has classes and the other not')
        self[:] = Cache(**{name: state[name] for name in stored})


def _read_published(path: str) -> Cache:
    """The authors' pickle of the arrays total_t (levels) and total_x_t_1 (images), by name or in
    this order.
    """
    reader = RestrictedUnpickler(map_file(path), NUMPY_ARRAYS)
    content = reader.load()
    if isinstance(content, NumpyArray):
        content = [content, reader.load()]
    if isinstance(content, dict):
        content = [content[name] for name in ('total_t', 'total_x_t_1')]
    levels, x = (part.array() for part in content)
    if levels.dtype.kind not in 'iu':
        raise ValueError('its steps are no whole numbers')
    x = np.require(x, np.float32, 'W')  # a view of the mapped file, if it is not small
    return Cache(torch.from_numpy(x), torch.from_numpy(levels.astype(np.int64).reshape(-1)))


def open_cache(path: str) -> tuple[Cache, dict | None]:
    """A cache on disk, memory-mapped, and what it was made with; None for one of the authors, who
    do not say.

    Raises UserError for any other file.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such cache; make it with dynamic_prepare.py')
    with errors_of(path), open(path, 'rb') as file:
        head = file.read(9)
    try:
        if head[:1] == b'\x80' and head[8:] != b'{':  # where the text of safetensors begins
            cache = _read_published(path)
            metadata = None
        else:
            with safe_open(path, 'pt') as file:
                cache = Cache(**{name: file.get_tensor(name) for name in file.keys()})
                metadata = {name: json.loads(value)
                            for name, value in (file.metadata() or {}).items()}
        x, *integers = cache.state_dict().values()
        if x.ndim != 4 or not x.numel() or x.dtype != torch.float32 or any(
                value.shape != x.shape[:1] or value.dtype != torch.int64 for value in integers):
            raise ValueError('its tensors are not those of a cache')
        if metadata and metadata.pop('images of a process', None):
            # Earlier versions noted the batch of a process.
            metadata['batch_size'] *= metadata['processes']
        return cache, metadata
    except (ForeignPickleError, SafetensorError, OSError, AttributeError, LookupError, TypeError,
            ValueError) as error:
        raise UserError(f'{path} is not a cache made by dynamic_prepare.py, or damaged '
                        f'({error})') from None


def write_cache(path: str, shares: list[Cache], description: dict):
    """Writes the shares of all processes one behind the other.

    `description` (plain values) is kept with it. The file appears only when complete.
    """
    states = [share.state_dict() for share in shares]
    header = {'__metadata__': {name: json.dumps(value) for name, value in description.items()}}
    end = 0
    for name, value in states[0].items():
        shape = [sum(map(len, shares)), *value.shape[1:]]
        start, end = end, end + math.prod(shape) * value.itemsize
        header[name] = {'dtype': TYPES[name], 'shape': shape, 'data_offsets': [start, end]}
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        file.write(struct.pack('<Q', len(header)) + header)
        for name in states[0]:
            for state in states:
                # Of `tofile`, an error would not say that the disk is full.
                file.write(state[name].contiguous().cpu().numpy())


def load_cache(path: str, rank: int, size: int, expected: dict) -> Cache:
    """The share of a process in a cache file: images `rank * size .. (rank + 1) * size - 1`.

    `expected` are entries that the file's description, if any, must agree with. Raises UserError
    saying what differs, or if the file is too small or not finite.
    """
    cache, description = open_cache(path)
    if description is not None:
        require_same(path, description, expected, 'make another one with dynamic_prepare.py')
    first = rank * size
    end = first + size
    if len(cache) < end:
        raise UserError(f'{path} holds {len(cache)} images, and process {rank} needs '
                        f'those up to {end}: prepare it for this batch size and this rho')
    share = Cache(**{name: torch.empty_like(value)
                     for name, value in cache[first:end].state_dict().items()})
    for start in range(0, size, READ_ROWS):
        rows = slice(start, start + READ_ROWS)
        # Opened anew each time, so that the pages leave the memory.
        share[rows] = open_cache(path)[0][first:end][rows]
        bad = torch.nonzero(~share.x[rows].isfinite().flatten(1).all(1))
        if len(bad):
            raise UserError(f'{path}: image {first + start + int(bad[0])} has values that are not '
                            'finite (NaN or infinite); make it again with dynamic_prepare.py')
    return share
