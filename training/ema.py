"""Averages of the weights during training. Parameters are averaged, buffers are copied."""

import copy
import dataclasses
from collections.abc import Callable

import torch

from dnnlib import UserError
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
    def average(std):
        return Average(f'{std:.3f}', lambda nimg, batch: float(
            phema.power_function_beta(std, nimg + batch, batch)), std)
    return [average(std) for std in stds]


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


class Averages:
    """Averages of the weights of `net`, all updated at once: ema = w + beta (ema - w)."""

    def __init__(self, net: torch.nn.Module, averages: list[Average]):
        self.averages = averages
        self.emas = [copy.deepcopy(net).eval().requires_grad_(False) for _ in averages]
        self._targets = [list(ema.parameters()) for ema in self.emas]

    @torch.no_grad()
    def update(self, net: torch.nn.Module, nimg: int, batch: int):
        """One step; `nimg` counts the images before it, `batch` those of the step."""
        sources = list(net.parameters())
        for average, target in zip(self.averages, self._targets, strict=True):
            torch._foreach_lerp_(target, sources, 1 - average.beta(nimg, batch))

    def get(self, net: torch.nn.Module) -> list[tuple[torch.nn.Module, str, float | None]]:
        """(network, suffix of the snapshot's name, std) of each average; `net` has the buffers."""
        result = []
        for ema, average in zip(self.emas, self.averages, strict=True):
            for target, source in zip(ema.buffers(), net.buffers(), strict=True):
                target.copy_(source)
            named = len(self.averages) > 1 or average.std is not None
            result.append((ema, f'-{average.name}' if named else '', average.std))
        return result

    def state_dict(self) -> dict:
        """Weights of each average, by name."""
        return {average.name: ema.state_dict()
                for average, ema in zip(self.averages, self.emas, strict=True)}

    def load_state_dict(self, state: dict):
        """Raises UserError if the state is of other averages."""
        state = _by_name(state)
        names = [average.name for average in self.averages]
        if len(state) != len(names) or len(names) > 1 and list(state) != names:
            raise UserError(f'the averages are {", ".join(state)} instead of {", ".join(names)}')
        for ema, weights in zip(self.emas, state.values(), strict=True):
            ema.load_state_dict(weights)


def _by_name(state: dict) -> dict:
    """The state of `Averages`, also from the three layouts of earlier versions."""
    if 'ema' in state:
        return {'': state['ema']}
    if 'emas' in state:
        rule = power(state['stds']) if 'stds' in state else constant(state['rates'])
        state = dict(zip((average.name for average in rule), state['emas'], strict=True))
    return state
