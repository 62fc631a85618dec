"""Averages of the weights during training. Parameters are averaged, buffers are copied."""

import copy
import dataclasses
from collections.abc import Callable

import torch

from dnnlib import UserError
from torch_utils.distributed import local
from training import phema, schedules


@dataclasses.dataclass
class Average:
    """One exponential average: its name in files, and its factor of a step.

    beta  (images before the step, batch) -> factor
    std   relative width of a power-function profile, or None
    """

    name: str
    beta: Callable
    std: float | None = None


def power(stds) -> list[Average]:
    """Power-function averages of relative widths `stds` (arXiv 2312.02696, Eq. 127).

    They depend on the batch size and the number of images alone, and need no warm-up: the first
    step has beta = 0.
    """
    return [
        Average(f'{std:.3f}', lambda nimg, batch, std=std: float(
            phema.power_function_beta(std, nimg + batch, batch)), std)
        for std in stds]


def constant(rates) -> list[Average]:
    """One factor of every step for each average, whatever the batch."""
    return [Average(str(rate), lambda nimg, batch, rate=rate: rate) for rate in rates]


# The averages of a recipe, by name: settings -> [Average, ...].
AVERAGES = {
    'power': power,
    'constant': constant,
    'memorization': lambda **rule: [Average('', schedules.memorization_beta(**rule))],
    'warmup': lambda decay: [Average('', schedules.warmup_beta(decay))],
}


def _tensors(net) -> list[torch.Tensor]:
    """The parameters; in shards, this process's rows of them."""
    return [local(p.detach()) for p in net.parameters()]


class Averages:
    """Averages of the weights of `net`, all updated at once: ema = w + beta (ema - w)."""

    def __init__(self, net: torch.nn.Module, averages: list[Average], copy_of=copy.deepcopy):
        self.averages = averages
        self.names = [average.name for average in averages]
        self.emas = [copy_of(net).eval().requires_grad_(False) for _ in averages]
        self._targets = [_tensors(ema) for ema in self.emas]

    def restart(self, net: torch.nn.Module):
        """Makes all of them the weights of `net`."""
        for ema in self.emas:
            ema.load_state_dict(net.state_dict())

    @torch.no_grad()
    def update(self, net: torch.nn.Module, nimg: int, batch: int):
        """One step; `nimg` counts the images before it, `batch` those of the step."""
        sources = _tensors(net)
        for average, target in zip(self.averages, self._targets, strict=True):
            torch._foreach_lerp_(target, sources, 1 - average.beta(nimg, batch))

    def get(self, net: torch.nn.Module) -> list[tuple[torch.nn.Module, str, float | None]]:
        """(network, suffix of the snapshot's name, std) of each average; `net` has the buffers."""
        for ema in self.emas:
            for target, source in zip(ema.buffers(), net.buffers(), strict=True):
                target.copy_(source)
        plain = len(self.averages) == 1 and self.averages[0].std is None
        return [(ema, '' if plain else f'-{average.name}', average.std)
                for average, ema in zip(self.averages, self.emas, strict=True)]

    def state_dict(self) -> dict:
        """Weights of each average, by name."""
        return {name: ema.state_dict() for name, ema in zip(self.names, self.emas, strict=True)}

    def load_state_dict(self, state: dict):
        """Raises UserError if the state is of other averages; the name of a single one may be
        another.
        """
        if 'emas' in state:  # power-function averages of earlier versions
            names = [average.name for average in power(state['stds'])]
            state = dict(zip(names, state['emas'], strict=True))
        if len(state) != len(self.names) or len(state) > 1 and list(state) != self.names:
            raise UserError(
                f'the averages are {", ".join(state)} instead of {", ".join(self.names)}')
        for ema, weights in zip(self.emas, state.values(), strict=True):
            ema.load_state_dict(weights)
