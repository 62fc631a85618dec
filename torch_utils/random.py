"""Random numbers that depend on what they are for, never on how the work is split.

All classes draw `[N, ...]` arrays and know `randn`, `rand`, `randint`, `randn_like` and
`skip_like`, so samplers and losses take any; a row of the stacked ones depends on its seed alone.
"""

import contextlib
import contextvars
import functools

import torch


def tuple_seed(*values: int) -> int:
    """Seed in [0, 2^31) for a tuple of integers: CPython's tuple hash (the same since 3.8), as
    EDM2 uses it.
    """
    return hash(tuple(values)) % (1 << 31)


class GlobalRandom:
    """Random numbers of torch's global generator: what the reference implementations use."""

    def __init__(self, device='cpu'):
        self.device = torch.device(device)

    def _draw(self, function, size, dim, device, **options):
        """function(size, generator=..., device=...), whose axis `dim` is the batch."""
        return function(list(size), device=device or self.device, **options)

    def randn(self, size, dim=0, device=None, dtype=torch.float32):
        """Standard normal numbers of shape `size`; `size[dim]` is the batch."""
        return self._draw(torch.randn, size, dim, device, dtype=dtype)

    def rand(self, size, dim=0, device=None, dtype=torch.float32):
        """Uniform numbers in [0, 1)."""
        return self._draw(torch.rand, size, dim, device, dtype=dtype)

    def randint(self, high, size, dim=0, device=None):
        """Whole numbers in 0..high-1 (int64)."""
        return self._draw(functools.partial(torch.randint, high), size, dim, device)

    def randn_like(self, x):
        return self.randn(x.shape, device=x.device, dtype=x.dtype)

    def skip_like(self, x):
        """What is drawn next is what would come after `randn_like(x)`."""
        self.randn_like(x)


class _Stack(GlobalRandom):
    """Rows of several generators, drawn in whole blocks of `block` rows and cut to [first, first +
    count).
    """

    def __init__(self, device, seeds, block: int, first: int, count: int, generator_device='cpu'):
        super().__init__(device)
        self.generators = [seed if isinstance(seed, torch.Generator)
                           else torch.Generator(generator_device).manual_seed(seed)
                           for seed in seeds]
        self.block = block
        self.first = first
        self.count = count

    def _draw(self, function, size, dim, device, **options):
        size = list(size)
        if size[dim] != self.count:
            raise ValueError(f'drawing {size} along axis {dim} for a batch of {self.count}')
        size[dim] = self.block
        rows = [function(size, generator=generator, device=generator.device, **options)
                for generator in self.generators]
        out = torch.cat(rows, dim) if len(rows) > 1 else rows[0]
        return out.narrow(dim, self.first, self.count).to(device or self.device)


class StackedRandomGenerator(_Stack):
    """One CPU generator for each sample, seeded with `seed mod 2^32`: image i depends on seeds[i]
    alone.

    Numbers are drawn on the CPU, where torch's stream is the same on every machine, and moved to
    `device`. In place of a seed there may be a torch.Generator.
    """

    def __init__(self, device, seeds):
        seeds = [seed if isinstance(seed, torch.Generator) else int(seed) % (1 << 32)
                 for seed in seeds]
        super().__init__(device, seeds, block=1, first=0, count=len(seeds))
        self.skipped = []  # (numbers of an image, their type), until something is drawn

    def skip_like(self, x):
        self.skipped.append((x[0].numel(), x.dtype))

    def _draw(self, *args, **options):
        for size, dtype in self.skipped:
            # From 16 on torch makes each normal number of one uniform number, and the last 16
            # once more if they are no whole 16: these numbers alone take a fifth of the time.
            uniform = size >= 16 and dtype in (torch.float32, torch.float64)
            numbers = torch.empty(size + 16 * (uniform and size % 16 > 0), dtype=dtype)
            fill = numbers.uniform_ if uniform else numbers.normal_
            for generator in self.generators:
                fill(generator=generator)
        self.skipped.clear()
        return super()._draw(*args, **options)


class BlockRandomGenerator(_Stack):
    """Random numbers of training images `start .. start + count - 1` of an endless stream, drawn
    on `device`.

    The stream is cut into blocks of `block` images with one generator each, seeded by (seed, block
    index); a process draws the blocks that its images touch. So the numbers of an image depend on
    `seed` and on its position in the stream alone: not on the number of processes, the batch, or
    the micro-batch.
    """

    def __init__(self, device, seed: int, start: int, count: int, block: int = 32):
        blocks = range(start // block, (start + count - 1) // block + 1)
        seeds = [tuple_seed(seed, index) for index in blocks]
        super().__init__(device, seeds, block, start - blocks[0] * block, count,
                         generator_device=device)


_network_random = contextvars.ContextVar('network_random', default=None)


@contextlib.contextmanager
def drawing_from(random):
    """Within the block, networks draw their masks from `random`, whose batch is theirs.

    So dropout depends on the training image and not on how the batch is split over processes.
    """
    token = _network_random.set(random)
    try:
        yield
    finally:
        _network_random.reset(token)


def network_random():
    """The random numbers of the surrounding `drawing_from`; None outside of it."""
    return _network_random.get()
