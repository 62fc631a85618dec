"""Whether a training is sound: what was not finite is counted on the device, and looked at
seldom."""

import itertools

import torch

from dnnlib import UserError
from torch_utils import distributed as dist

# What is counted: images whose loss, and weights whose gradient was not finite; steps that the
# loss scale skipped.
COUNTS = ('nonfinite_losses', 'nonfinite_gradients', 'skipped_steps')


class Diverged(UserError):
    """The end of a training that learns nothing any more: raised on every process alike."""

    status = 3
    is_shared = True


class Health:
    """Counts of what was not finite in the steps of a training, without waiting for the device.

    A step is bad if a loss was not finite, or most gradients, or if it was skipped: a few values
    are bad in every step of some sound trainings.

    images  of a step on this process
    """

    def __init__(self, device, images: int):
        self.steps = 0
        self._counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        # Bad steps in a row, and those that were not only skipped.
        self._streaks = torch.zeros(2, dtype=torch.int64, device=device)
        self._first = torch.full([], -1, dtype=torch.int64, device=device)
        self._mask = torch.zeros(images, dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(self, nimg: int, losses: list, norms=None, skipped: bool = False):
        """Counts a step after `nimg` images.

        losses  [n] of each micro-batch
        norms   of the gradients, each a float32 scalar (it overflows where Adam's squares do);
                None: gradients are not counted
        """
        self.steps += 1
        mask = ~torch.cat(losses).isfinite()
        count = mask.sum()
        gradients = torch.zeros_like(count)
        if norms:
            gradients = (~torch.stack(norms).isfinite()).sum()
        bad = (count > 0) | (2 * gradients > len(norms or ()))
        is_first = (count > 0) & (self._first < 0)
        self._first = torch.where(is_first, nimg, self._first)
        self._mask = torch.where(is_first, mask, self._mask)
        self._counts[:2] += torch.stack([count, gradients])
        self._counts[2] += skipped
        self._streaks = (self._streaks + 1) * torch.stack([bad | skipped, bad])

    # Every process must call these together. They wait for the device.

    def look(self) -> tuple[int, int, int]:
        """(bad steps in a row up to now, those without the ones that were only skipped, images
        before the first step with a loss that was not finite or -1).
        """
        found = dist.gather_objects([*self._streaks.tolist(), int(self._first)])
        *streaks, firsts = zip(*found, strict=True)
        return *map(max, streaks), min((first for first in firsts if first >= 0), default=-1)

    def first_images(self, first: int) -> list[int]:
        """Which images of the step after `first` images had a loss that was not finite, from 0."""
        mask = self._mask.tolist() if int(self._first) == first else [False] * len(self._mask)
        masks = dist.gather_objects(mask)
        return [i for i, bad in enumerate(itertools.chain(*masks)) if bad]

    def counts(self) -> list[int]:
        """What COUNTS names, since the last `report`."""
        found = dist.gather_objects(self._counts.tolist())
        # Gradients and skipped steps are those of all processes, losses of each.
        return [sum(counts[0] for counts in found), *found[0][1:]]

    def report(self) -> dict[str, int]:
        """{name: number} of what is not zero: counts since the last report, and the bad steps in a
        row.
        """
        numbers = dict(zip(COUNTS, self.counts(), strict=True)) | {'bad_streak': self.look()[0]}
        self._counts.zero_()
        return {name: number for name, number in numbers.items() if number}

    def resume(self, counts: list[int]):
        """Goes on from the `counts` of a checkpoint."""
        first = dist.get_rank() == 0
        self._counts.copy_(torch.tensor([counts[0] * first, *counts[1:]]))
