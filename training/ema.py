"""Averages of the weights during training. Parameters are averaged, buffers are copied."""

import copy

import torch

from training import phema


class PowerFunctionEMA:
    """Power-function averages of relative widths `stds` (arXiv 2312.02696, Eq. 127), all updated at once.

    The result depends on the batch size and the number of images alone, so it needs no warm-up:
    the first step has beta = 0.
    """

    def __init__(self, net: torch.nn.Module, stds=(0.05, 0.10)):
        self.stds = list(stds)
        self.emas = [copy.deepcopy(net).eval().requires_grad_(False) for _ in self.stds]
        self._targets = [list(ema.parameters()) for ema in self.emas]

    @torch.no_grad()
    def update(self, net: torch.nn.Module, nimg: int, batch: int):
        """ema += (1 - beta) (w - ema); `nimg` counts the images before this step, `batch` those of the step."""
        sources = list(net.parameters())
        for std, target in zip(self.stds, self._targets, strict=True):
            beta = phema.power_function_beta(std, nimg + batch, batch)
            torch._foreach_lerp_(target, sources, 1 - float(beta))

    def get(self, net: torch.nn.Module) -> list[tuple[torch.nn.Module, str, dict]]:
        """(network, suffix of the snapshot's name, what the snapshot says of the average) for each width."""
        for ema in self.emas:
            for target, source in zip(ema.buffers(), net.buffers(), strict=True):
                target.copy_(source)
        return [(ema, f'-{std:.3f}', {'ema_std': std}) for std, ema in zip(self.stds, self.emas, strict=True)]

    def state_dict(self) -> dict:
        return {'stds': self.stds, 'emas': [ema.state_dict() for ema in self.emas]}

    def load_state_dict(self, state: dict):
        if state['stds'] != self.stds:
            raise ValueError(f'EMA widths {state["stds"]} instead of {self.stds}')
        for ema, values in zip(self.emas, state['emas'], strict=True):
            ema.load_state_dict(values)


class TraditionalEMA:
    """One exponential average with beta = beta(nimg before the step, batch), a function of the recipe.

    `half_life_beta` gives the rule that EDM2 compares with.
    """

    def __init__(self, net: torch.nn.Module, beta):
        self.beta = beta
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self._target = list(self.ema.parameters())

    @torch.no_grad()
    def update(self, net: torch.nn.Module, nimg: int, batch: int):
        """ema = w + beta (ema - w)."""
        torch._foreach_lerp_(self._target, list(net.parameters()), 1 - self.beta(nimg, batch))

    def get(self, net: torch.nn.Module) -> list[tuple[torch.nn.Module, str, dict]]:
        """As `PowerFunctionEMA.get`: one network, without a suffix."""
        for target, source in zip(self.ema.buffers(), net.buffers(), strict=True):
            target.copy_(source)
        return [(self.ema, '', {})]

    def state_dict(self) -> dict:
        return {'ema': self.ema.state_dict()}

    def load_state_dict(self, state: dict):
        self.ema.load_state_dict(state['ema'])


class ConstantEMA:
    """Exponential averages with constant factors `rates`, one for each step whatever its batch: ema = w + rate (ema - w)."""

    def __init__(self, net: torch.nn.Module, rates):
        self.rates = list(rates)
        self.emas = [copy.deepcopy(net).eval().requires_grad_(False) for _ in self.rates]
        self._targets = [list(ema.parameters()) for ema in self.emas]

    @torch.no_grad()
    def update(self, net: torch.nn.Module, nimg: int, batch: int):
        """One step; neither the images before it nor its batch counts."""
        for rate, target in zip(self.rates, self._targets, strict=True):
            torch._foreach_lerp_(target, list(net.parameters()), 1 - rate)

    def get(self, net: torch.nn.Module) -> list[tuple[torch.nn.Module, str, dict]]:
        """As `PowerFunctionEMA.get`; the names have no suffix if there is only one rate."""
        for ema in self.emas:
            for target, source in zip(ema.buffers(), net.buffers(), strict=True):
                target.copy_(source)
        return [(ema, f'-{rate}' if len(self.rates) > 1 else '', {})
                for rate, ema in zip(self.rates, self.emas, strict=True)]

    def state_dict(self) -> dict:
        return {'rates': self.rates, 'emas': [ema.state_dict() for ema in self.emas]}

    def load_state_dict(self, state: dict):
        if state['rates'] != self.rates:
            raise ValueError(f'EMA rates {state["rates"]} instead of {self.rates}')
        for ema, values in zip(self.emas, state['emas'], strict=True):
            ema.load_state_dict(values)


def half_life_beta(halflife_Mimg=float('inf'), rampup_ratio=0.09):
    """beta = 0.5^(batch / h), h = min(halflife, rampup_ratio * images after the step)."""
    def beta(nimg, batch):
        h = min(halflife_Mimg * 1e6, (nimg + batch) * rampup_ratio) if rampup_ratio is not None else halflife_Mimg * 1e6
        return 0.5 ** (batch / max(h, 1e-8))
    return beta
