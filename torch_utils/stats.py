"""Running statistics of training, kept on the device and read only when they are reported."""

import torch

from torch_utils import distributed as dist


class RunningMeans:
    """Mean and standard deviation of named per-sample values since the last report, over all
    processes.

    `add` never waits for the device; `report` does, once, and starts anew.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        # name -> [count, sum, sum of squares], float64
        self._sums = {}

    @torch.no_grad()
    def add(self, terms: dict):
        """Adds tensors of any shape by name."""
        for name, values in terms.items():
            values = values.detach().flatten().double()
            moments = torch.stack([torch.full_like(values, 1).sum(), values.sum(),
                                   values.square().sum()])
            self._sums[name] = self._sums.get(name, 0) + moments

    def report(self) -> dict[str, dict]:
        """{name: {'mean', 'std'}}; every process must call it, with the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        count, total, squares = dist.all_reduce_sum(sums).cpu().unbind(1)
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
        self._sums = {name: sums.to(self.device).reshape(3) * first
                      for name, sums in state.items()}
