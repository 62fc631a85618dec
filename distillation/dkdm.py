"""Distillation without data (DKDM, arXiv 2409.03550): a teacher's own denoising chains are the
training set.

A cache holds M noisy images with a level t in 0..T: "denoised down to level t". T is pure noise
and 0 is finished; the next use of an image evaluates step t - 1 of the teacher. Batches advance
some images by one step each, and the student learns that step. Everything here belongs to one
process and its own share of the cache.

With a class-conditional teacher every chain also has a class, drawn at random as its noise is.
This goes beyond the paper, whose networks have no classes.
"""

import dataclasses
import math
import random
import time

import torch
from torch.nn.functional import one_hot

from distillation.cache import Cache
from dnnlib import progress
from torch_utils import distributed as dist
from torch_utils.random import BlockRandomGenerator, GlobalRandom, tuple_seed

# --- Random numbers and teacher ------------------------------------------------------------------


class ProcessRandom:
    """The random numbers of one process: normal by torch on `device`, choices by Python's
    generator.
    """

    def __init__(self, seed: int, device='cpu'):
        self.seed = seed
        self.device = torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.python = random.Random(seed)

    def randn(self, shape) -> torch.Tensor:
        return torch.randn(list(shape), generator=self.generator, device=self.device)

    def state_dict(self) -> dict:
        return {'torch': self.generator.get_state(), 'python': self.python.getstate()}

    def load_state_dict(self, state: dict):
        self.generator.set_state(state['torch'].cpu())
        version, numbers, gauss = state['python']  # lists in files of earlier versions
        self.python.setstate((version, tuple(numbers), gauss))


class Teacher:
    """A denoiser that advances images by one step of a chain, in evaluation mode and without
    gradients.

    diffusion  the chain; None: that of the network, a DiscreteDenoiser
    guide      a network that guides it: output = guide + guidance (network - guide), of the noise
               (and so of D), where the level of an image is in `interval`, lo < sigma <= hi

    A denoiser D(x; sigma) of any level sees x_t / sqrt(abar_t) = x_0 + sigma_t z with sigma_t^2 =
    (1 - abar_t) / abar_t: its noise is (x_t / sqrt(abar_t) - D) / sigma_t.
    """

    def __init__(self, net, diffusion=None, guide=None, guidance: float = 1, interval=None):
        self.net = net.eval().requires_grad_(False)
        self.diffusion = diffusion or net.diffusion
        self.guide = guide
        self.guidance = guidance
        self.interval = interval or (0, math.inf)
        self.clip = getattr(net, 'clip', False)
        self.num_classes = net.label_dim
        self.image_shape = [*net.image_shape]

    def _call(self, net, x, t, labels):
        """What a network says of x_t: the noise, and variances if it has some."""
        diffusion = self.diffusion
        if hasattr(self.net, 'diffusion'):
            return net(x, step=diffusion.model_steps(t), class_labels=labels).float()
        sigma = diffusion.table('sigmas', t)
        x = x / diffusion.table('sqrt_abar', t)
        return (x - net(x, sigma, class_labels=labels).float()) / sigma

    def output(self, x, t, labels=None) -> torch.Tensor:
        """The output for x_t [N,C,H,W] at t [N], guided: that of a network of the chain."""
        output = self._call(self.net, x, t, labels)
        if self.guide is None:
            return output
        C = x.shape[1]
        sigma = self.diffusion.table('sigmas', t)
        low, high = self.interval
        guided = self._call(self.guide, x, t, labels)[:, :C].lerp(output[:, :C], self.guidance)
        noise = torch.where((low < sigma) & (sigma <= high), guided, output[:, :C])
        return torch.cat([noise, output[:, C:]], dim=1)

    def noise(self, count: int, rng: ProcessRandom) -> Cache:
        """Images at level T, on the device of `rng`, of random classes if there are any."""
        x = rng.randn([count, *self.image_shape])
        classes = None
        if self.num_classes:
            classes = torch.tensor(rng.python.choices(range(self.num_classes), k=count))
        return Cache(x, torch.full([count], self.diffusion.num_steps), classes)

    @torch.no_grad()
    def advance(self, images: Cache, rng: ProcessRandom) -> dict:
        """Takes images one level down, by an ancestral sample x_(t-1).

        Returns {'images': x_t, 't', 'teacher': the network's output, 'previous': x_(t-1),
        'labels': one-hot float32 [N, num_classes] or None}, on the device of `rng`.
        """
        x = images.x.to(rng.device)
        images.levels = images.levels - 1
        t = images.levels.to(rng.device)
        labels = None
        if images.classes is not None:
            labels = one_hot(images.classes, self.num_classes).float().to(rng.device)
        output = self.output(x, t, labels)
        noise = rng.randn(x.shape)
        images.x = self.diffusion.ancestral_step(output, x, t, noise, self.clip)
        return {'images': x, 't': t, 'teacher': output, 'previous': images.x, 'labels': labels}


# --- Preparation ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Chains:
    """What advances the images of a cache: a teacher, `batch` images at a time."""

    teacher: Teacher
    cache: Cache
    batch: int
    rng: ProcessRandom

    def state_dict(self) -> dict:
        return {'cache': self.cache.state_dict(), 'draws': self.rng.state_dict()}

    def load_state_dict(self, state: dict):
        """A state may come without a cache: the cache then stays as it is."""
        cache = state.get('cache', state)
        if 'x' in cache:
            self.cache.load_state_dict(cache)
        self.rng.load_state_dict(state['draws'])


class Preparation(Chains):
    """Makes a cache of mixed levels: each image is noise, denoised down to a level drawn from
    1..T-1.

    Images of different levels share a batch of the teacher. `run` may be stopped at any call of
    the teacher and taken up again from `state_dict`, with the same result.
    """

    def __init__(self, teacher: Teacher, size: int, rng: ProcessRandom, teacher_batch: int):
        super().__init__(teacher, teacher.noise(size, rng), teacher_batch, rng)
        self.cache.x = self.cache.x.cpu()
        self.num_steps = teacher.diffusion.num_steps
        self.targets = torch.tensor(rng.python.choices(range(1, self.num_steps), k=size))

    @property
    def remaining(self) -> int:
        """Steps of single images that are left."""
        return int((self.cache.levels - self.targets).sum())

    def equalize(self, least_steps: int):
        """Raises targets until `least_steps` remain, so that no process works longer than another.

        One level at a time for all images that can take it, and for a random choice of them in
        the last round.
        """
        while (excess := self.remaining - least_steps) > 0:
            able = (self.targets < self.num_steps - 1).nonzero().flatten()
            if excess < len(able):
                able = able[self.rng.python.sample(range(len(able)), excess)]
            self.targets[able] += 1

    def advance(self) -> int:
        """One call of the teacher, on the first images above their target. Returns how many there
        were.
        """
        positions = (self.cache.levels > self.targets).nonzero().flatten()[:self.batch]
        if len(positions):
            images = self.cache[positions]
            self.teacher.advance(images, self.rng)
            self.cache[positions] = images
        return len(positions)

    def run(self, save=None, seconds: float = 0) -> Cache:
        """Advances until no image is above its target; `save(state)` is called every so many
        seconds.
        """
        saved = time.monotonic()
        with progress.bar(show=dist.get_rank() == 0, total=self.remaining, unit='step',
                          unit_scale=True, desc='Preparing the cache', leave=False) as bar:
            while count := self.advance():
                bar.update(count)
                if save and time.monotonic() - saved >= seconds:
                    save(self.state_dict())
                    saved = time.monotonic()
        return self.cache

    def state_dict(self) -> dict:
        return super().state_dict() | {'targets': self.targets}

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        self.targets.copy_(state['targets'])


# --- Batches -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Source(Chains):
    """Endless batches of teacher steps at positions of a cache, which are written back one level
    lower.

    A batch is that of `Teacher.advance`, with 'positions'. It is used with probability `prob`,
    else its images are denoised on until one is.
    """

    prob: float = 1.0

    def _positions(self) -> torch.Tensor:
        return torch.arange(self.batch)

    def __next__(self) -> dict:
        positions = self._positions()
        images = self.cache[positions]
        used = False
        while not used:
            finished = (images.levels == 0).nonzero().flatten()
            if len(finished):  # noise again, and other classes
                images[finished] = self.teacher.noise(len(finished), self.rng)
            batch = self.teacher.advance(images, self.rng)
            used = self.rng.python.random() < self.prob
        self.cache[positions] = images
        return batch | {'positions': positions}

    @property
    def frozen(self):
        nets = self.teacher.net, self.teacher.guide
        return [net for net in nets if isinstance(net, torch.nn.Module)]

    def example(self, count: int, device) -> dict:
        """A batch of zeros, on which the teacher takes a step."""
        images = Cache(torch.zeros(count, *self.teacher.image_shape),
                       torch.ones(count, dtype=torch.int64), None if self.cache.classes is None
                       else torch.zeros(count, dtype=torch.int64))
        random = GlobalRandom(device)
        return self.teacher.advance(images, random) | {'random': random, 'start': 0}

    def iterate(self, plan):
        """Batches for the training loop: pairs (first image, count) ask for a batch or for
        consecutive parts of it.

        Further keys: `random` for the student's dropout, `start`.
        """
        dropout_seed = tuple_seed(self.rng.seed, 1)
        used = self.batch
        for start, count in plan:
            if used == self.batch:
                batch, used = next(self), 0
            end = used + count
            if end > self.batch:
                raise ValueError(f'batches of {self.batch} do not split into parts of {count}')
            part = {name: value if value is None else value[used:end]
                    for name, value in batch.items()}
            dropout = BlockRandomGenerator(self.rng.device, dropout_seed, start, count)
            yield part | {'random': dropout, 'start': start}
            used = end


class DynamicSource(Source):
    """Dynamic iterative distillation: every batch takes `batch` distinct images of the whole
    cache at random.
    """

    def _positions(self):
        return torch.tensor(self.rng.python.sample(range(len(self.cache)), self.batch))


@dataclasses.dataclass
class ShuffledSource(Source):
    """Shuffled iterative distillation: every batch takes the first `batch` images of the cache,
    of mixed levels.
    """

    def __post_init__(self):
        self.cache = self.cache[torch.arange(self.batch)]


class IterativeSource(Source):
    """Iterative distillation: one batch goes from noise to images with a common level, then the
    next one starts.
    """

    def __init__(self, teacher, batch, rng, prob=1.0):
        super().__init__(teacher, teacher.noise(batch, rng), batch, rng, prob)

    # Its few images are kept in every checkpoint itself, and not in a file beside it.

    def state_dict(self) -> dict:
        return {**self.cache.state_dict(), 'draws': self.rng.state_dict()}


# `iter_choice` of the configurations; the second is spelled as published and as it should be.
SOURCES = {
    'dynamic_iterative_distillation': DynamicSource,
    'shffled_iterative_distillation': ShuffledSource,
    'shuffled_iterative_distillation': ShuffledSource,
    'iterative_distillation': IterativeSource,
}
