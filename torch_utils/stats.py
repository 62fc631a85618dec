"""Running statistics of training, kept on the device and read only when they are reported."""

import itertools

import torch

from torch_utils import distributed as dist

# Noise levels that losses are told apart by: half decades, as good as even in ln(sigma).
LEVELS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
BINS = ['0-0.01', *(f'{low:g}-{high:g}' for low, high in itertools.pairwise(LEVELS)), '100-inf']


class RunningMeans:
    """Mean and standard deviation of named per-sample values since the last report, over all
    processes.

    `add` never waits for the device; `report` does, once, and starts anew.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        # name -> [count, sum, sum of squares], float64; by level a row
        # of them for each of BINS
        self._sums = {}
        self._edges = torch.tensor(LEVELS, device=self.device)

    @torch.no_grad()
    def add(self, terms: dict):
        """Adds tensors of any shape by name."""
        for name, values in terms.items():
            values = values.detach().flatten().double()
            moments = torch.stack([torch.full_like(values, 1).sum(), values.sum(),
                                   values.square().sum()])
            self._sums[name] = self._sums.get(name, 0) + moments

    @torch.no_grad()
    def add_by_level(self, name: str, values: torch.Tensor, sigma: torch.Tensor):
        """Adds values [N] at noise levels sigma [N], reported as `NAME/LOW-HIGH` for the bins
        between LEVELS that have some."""
        at = torch.bucketize(sigma.to(self._edges), self._edges)
        inside = at[:, None] == torch.arange(len(LEVELS) + 1, device=self.device)
        values = torch.where(inside, values.double()[:, None], 0)
        moments = torch.stack([inside.double().sum(0), values.sum(0), values.square().sum(0)], 1)
        self._sums[name] = self._sums.get(name, 0) + moments

    def report(self) -> dict[str, dict]:
        """{name: {'mean', 'std'}}; every process must call it, with the same names."""
        sums = {name: self._sums[name].reshape(-1, 3) for name in sorted(self._sums)}
        if not sums:
            return {}
        names = [name if len(rows) == 1 else f'{name}/{bin}' for name, rows in sums.items()
                 for bin in BINS[:len(rows)]]
        sums = dist.all_reduce_sum(torch.cat([*sums.values()])).cpu()
        names = [name for name, row in zip(names, sums, strict=True) if row[0]]
        count, total, squares = sums[sums[:, 0] > 0].unbind(1)
        self._sums = {}
        mean = total / count
        std = (squares / count - mean**2).clamp(min=0).sqrt()
        return {name: {'mean': float(m), 'std': float(s)}
                for name, m, s in zip(names, mean, std, strict=True)}

    def state_dict(self) -> dict:
        """Sums over all processes; every process must call it."""
        return {name: dist.all_reduce_sum(sums.clone()).cpu()
                for name, sums in sorted(self._sums.items())}

    def load_state_dict(self, state: dict):
        """The first process takes over the sums, the others start from zero: together they are as
        they were.
        """
        first = float(dist.get_rank() == 0)
        shapes = {3 * len(BINS): (len(BINS), 3)}
        self._sums = {
            name: sums.to(self.device).reshape(shapes.get(sums.numel(), 3)) * first
            for name, sums in state.items()}
