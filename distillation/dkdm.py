"""Distillation without data (DKDM, arXiv 2409.03550): a teacher's own denoising chains are the training set.

A cache holds M noisy images with a level t in 0..T: "denoised down to level t". T is pure noise and 0 is finished; the
next use of an image evaluates step t - 1 of the teacher. Batches advance some images by one step each, and the student
learns that step. Everything here belongs to one process and its own share of the cache.

With a class-conditional teacher every chain also has a class, drawn at random as its noise is. This goes beyond the paper,
whose networks have no classes.
"""

import random as python_random

import torch
from tqdm import tqdm

import dnnlib
from distillation.cache import Cache
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


# --- Preparation ---------------------------------------------------------------------------------------------------------


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
