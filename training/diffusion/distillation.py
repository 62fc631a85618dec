"""Distillation without data (DKDM, arXiv 2409.03550): a teacher's own denoising chains are the training set.

A cache holds M noisy images with a level t in 0..T: "denoised down to level t". T is pure noise and 0 is finished; the
next use of an image evaluates step t - 1 of the teacher. Batches advance some images by one step each, and the student
learns that step. Everything here belongs to one process and its own share of the cache.

With a class-conditional teacher every chain also has a class, drawn at random as its noise is. This goes beyond the paper,
whose networks have no classes.
"""

import json
import math
import os
import random as python_random
import struct

import numpy as np
import torch
from tqdm import tqdm

import dnnlib
from dnnlib.util import atomic_path
from torch_utils import distributed as dist
from torch_utils.random import BlockRandomGenerator, tuple_seed

# --- Random numbers and teacher ---------------------------------------------------------------------------------------


class Draws:
    """The random numbers of one process: normal numbers by torch on `device`, choices by Python's generator."""

    def __init__(self, seed: int, device='cpu'):
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.python = python_random.Random(seed)

    def randn(self, shape):
        return torch.randn(list(shape), generator=self.generator, device=self.generator.device)

    def classes(self, count: int, num_classes: int) -> torch.Tensor | None:
        """Classes int64 [count], evenly distributed; None, without a draw, if there are no classes."""
        return torch.tensor(self.python.choices(range(num_classes), k=count)) if num_classes else None

    def state_dict(self) -> dict:
        version, state, gauss = self.python.getstate()
        return {'torch': self.generator.get_state(), 'python': [version, list(state), gauss]}

    def load_state_dict(self, state: dict):
        self.generator.set_state(state['torch'].cpu())
        version, numbers, gauss = state['python']
        self.python.setstate((version, tuple(numbers), gauss))


class Teacher:
    """A DiscreteDenoiser that advances images by one step of its chain, in evaluation mode and without gradients."""

    def __init__(self, net, clip=True):
        self.net, self.clip, self.diffusion = net.eval().requires_grad_(False), clip, net.diffusion
        self.num_classes = net.label_dim

    @torch.no_grad()
    def output(self, x, t, labels=None):
        """The network's output for x [N,C,H,W] at steps t [N]."""
        return self.net(x, step=self.diffusion.model_steps(t), class_labels=labels).float()

    @torch.no_grad()
    def step(self, x, t, draws: Draws, labels=None):
        """(output, x_(t-1)): the network's output, and an ancestral sample from it."""
        output = self.output(x, t, labels)
        return output, self.diffusion.ancestral_step(output, x, t, draws.randn(x.shape), self.clip)


def _one_hot(classes, teacher: Teacher, device):
    """Labels float32 [N, num_classes] of classes int64 [N]; None for None."""
    return None if classes is None else torch.nn.functional.one_hot(classes, teacher.num_classes).float().to(device)


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


class Preparation:
    """Makes a cache of mixed levels: every image starts as noise and is denoised down to a level drawn from 1..T-1.

    Images of different levels share a batch of the teacher. `run` may be stopped at any call of the teacher and taken
    up again from `state_dict`, with the same result.
    """

    def __init__(self, teacher: Teacher, size: int, image_shape, draws: Draws, teacher_batch: int, device='cpu'):
        self.teacher, self.draws, self.batch = teacher, draws, teacher_batch
        self.num_steps = teacher.diffusion.num_steps
        self.cache = Cache(draws.randn([size, *image_shape]).to(device),
                           torch.full([size], self.num_steps, dtype=torch.int64),
                           draws.classes(size, teacher.num_classes))
        self.targets = torch.tensor(draws.python.choices(range(1, self.num_steps), k=size))

    @property
    def remaining(self) -> int:
        """Steps of single images that are left."""
        return int((self.cache.levels - self.targets).sum())

    def equalize(self, least_steps: int):
        """Raises targets until `least_steps` remain, so that no process works longer than another.

        One level at a time for all images that can take it, and for a random choice of them in the last round.
        """
        while (excess := self.remaining - least_steps) > 0:
            able = (self.targets < self.num_steps - 1).nonzero().flatten()
            if len(able) == 0:
                return
            if excess < len(able):
                able = able[self.draws.python.sample(range(len(able)), excess)]
            self.targets[able] += 1

    def advance(self) -> int:
        """One call of the teacher, on the first images that are above their target. Returns how many there were."""
        cache = self.cache
        chosen = (cache.levels > self.targets).nonzero().flatten()[:self.batch]
        if len(chosen) == 0:
            return 0
        device = self.draws.generator.device
        cache.levels[chosen] -= 1
        x = cache.x[chosen.to(cache.x.device)].to(device)
        labels = _one_hot(None if cache.classes is None else cache.classes[chosen], self.teacher, device)
        _, x = self.teacher.step(x, cache.levels[chosen].to(device), self.draws, labels)
        cache.x[chosen.to(cache.x.device)] = x.to(cache.x.device)
        return len(chosen)

    def run(self, on_step=None) -> Cache:
        """Advances until no image is above its target; `on_step(self)` is called after each call of the teacher."""
        with tqdm(total=self.remaining, unit='step', unit_scale=True, desc='Preparing the cache', leave=False,
                  disable=True if dist.get_rank() != 0 else None) as bar:
            while count := self.advance():
                bar.update(count)
                if on_step is not None:
                    on_step(self)
        return self.cache

    def state_dict(self) -> dict:
        return {'cache': self.cache.state_dict(), 'targets': self.targets, 'draws': self.draws.state_dict()}

    def load_state_dict(self, state: dict):
        self.cache.load_state_dict(state['cache'])
        self.targets.copy_(state['targets'])
        self.draws.load_state_dict(state['draws'])


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


# --- Batches ----------------------------------------------------------------------------------------------------------


class _Source:
    """Endless batches of teacher steps: {'images': x_t, 't', 'teacher': its output, 'previous': x_(t-1), 'labels'}.

    Labels are one-hot, or None. A batch is used with probability `prob`, else its images are denoised on until one is.
    """

    def __init__(self, teacher: Teacher, batch: int, draws: Draws, prob=1.0):
        if not 0 < prob <= 1:
            raise dnnlib.UserError(f'prob: {prob} is not a probability above 0')
        self.teacher, self.batch, self.draws, self.prob = teacher, batch, draws, prob
        self.num_steps = teacher.diffusion.num_steps
        self.device = draws.generator.device

    def __iter__(self):
        return self

    def iterate(self, plan):
        """Batches for the training loop: pairs (first image, count) ask for a batch or for consecutive parts of it.

        Further keys: `random` for the student's dropout, `start`.
        """
        used = self.batch
        for start, count in plan:
            if used == self.batch:
                whole, used = next(self), 0
            part = {name: None if values is None else values[used:used + count] for name, values in whole.items()}
            if len(part['t']) != count:
                raise ValueError(f'batches of {self.batch} do not split into parts of {count}')
            random = BlockRandomGenerator(self.device, tuple_seed(self.draws.seed, 1), start, count)
            yield part | {'random': random, 'start': start}
            used += count

    def _advance(self, x, levels, classes):
        """(batch, its images' new levels, whether to use it); `x`, `levels`, `classes` change where images start anew."""
        finished = (levels == 0).nonzero().flatten()
        if len(finished):
            x[finished.to(x.device)] = self.draws.randn([len(finished), *x.shape[1:]])
            levels[finished] = self.num_steps
            if classes is not None:
                classes[finished] = self.draws.classes(len(finished), self.teacher.num_classes)
        t, labels = (levels - 1).to(self.device), _one_hot(classes, self.teacher, self.device)
        output, previous = self.teacher.step(x, t, self.draws, labels)
        keep = self.draws.python.random() < self.prob
        return {'images': x, 't': t, 'teacher': output, 'previous': previous, 'labels': labels}, levels - 1, keep


class _CachedSource(_Source):
    """Batches at positions of a cache, which are written back one level lower."""

    def __init__(self, teacher, cache: Cache, batch, draws, prob=1.0):
        super().__init__(teacher, batch, draws, prob)
        if len(cache) < batch:
            raise dnnlib.UserError(f'a cache of {len(cache)} images cannot give batches of {batch}')
        self.cache = cache

    def _positions(self):
        raise NotImplementedError

    def __next__(self) -> dict:
        cache, positions = self.cache, self._positions()
        places = positions.to(cache.x.device)
        x, levels = cache.x[places].to(self.device), cache.levels[positions]
        classes = None if cache.classes is None else cache.classes[positions]
        while True:
            batch, levels, keep = self._advance(x, levels, classes)
            if keep:
                break
            x = batch['previous']
        cache.x[places] = batch['previous'].to(cache.x.device)
        cache.levels[positions] = levels
        if classes is not None:
            cache.classes[positions] = classes
        return batch | {'positions': positions}

    def state_dict(self) -> dict:
        return {'cache': self.cache.state_dict(), 'draws': self.draws.state_dict()}

    def load_state_dict(self, state: dict):
        """A state may come without a cache: the cache then stays as it is."""
        if 'cache' in state:
            self.cache.load_state_dict(state['cache'])
        self.draws.load_state_dict(state['draws'])


class DynamicSource(_CachedSource):
    """Dynamic iterative distillation: every batch takes `batch` distinct images of the whole cache at random."""

    def _positions(self):
        return torch.tensor(self.draws.python.sample(range(len(self.cache)), self.batch))


class ShuffledSource(_CachedSource):
    """Shuffled iterative distillation: every batch takes the first `batch` images of the cache, of mixed levels."""

    def __init__(self, teacher, cache, batch, draws, prob=1.0):
        super().__init__(teacher, cache.first(batch), batch, draws, prob)

    def _positions(self):
        return torch.arange(self.batch)


class IterativeSource(_Source):
    """Iterative distillation: one batch goes from noise to images with a common level, then the next one starts."""

    def __init__(self, teacher, image_shape, batch, draws, prob=1.0):
        super().__init__(teacher, batch, draws, prob)
        self.x = torch.empty([batch, *image_shape], device=self.device)
        self.levels = torch.zeros([batch], dtype=torch.int64)
        self.classes = torch.zeros_like(self.levels) if teacher.num_classes else None

    def __next__(self) -> dict:
        while True:
            batch, self.levels, keep = self._advance(self.x.clone(), self.levels, self.classes)
            self.x = batch['previous']
            if keep:
                return batch

    def state_dict(self) -> dict:
        return {'x': self.x, 'levels': self.levels, 'classes': self.classes, 'draws': self.draws.state_dict()}

    def load_state_dict(self, state: dict):
        self.x.copy_(state['x'])
        self.levels.copy_(state['levels'])
        if self.classes is not None:
            self.classes.copy_(state['classes'])
        self.draws.load_state_dict(state['draws'])


# `iter_choice` of the configurations; the second is spelled as published and as it should be.
SOURCES = {
    'dynamic_iterative_distillation': DynamicSource,
    'shffled_iterative_distillation': ShuffledSource,
    'shuffled_iterative_distillation': ShuffledSource,
    'iterative_distillation': IterativeSource,
}
