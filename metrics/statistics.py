"""Mean and covariance of features, accumulated in one pass."""

import dataclasses

import numpy as np
import torch

import dnnlib
from torch_utils import distributed


@dataclasses.dataclass
class Gaussian:
    """Mean [D] and covariance [D, D] of the features of `num` images (None if the file does not say), float64."""

    mu: np.ndarray
    sigma: np.ndarray
    num: int | None = None

    @property
    def dim(self) -> int:
        return len(self.mu)


class FeatureSums:
    """Streaming sums of x and x x^T in float64 on the device of the features.

    `gaussian()` is mu = sum/N and Sigma = (sum x x^T - N mu mu^T)/(N - 1).
    """

    def __init__(self):
        self.num = 0
        self.sum = self.outer = None

    def add(self, features: torch.Tensor):
        """Adds features [N, D]."""
        x = features.to(torch.float64)
        if self.sum is None:
            self.sum, self.outer = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        self.num += len(x)
        self.sum += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def all_reduce(self, dim: int, device: torch.device):
        """Adds up the sums of all processes; `dim` and `device` are for one that has seen no image."""
        if self.sum is None:
            self.add(torch.zeros(0, dim, device=device))
        num = distributed.all_reduce_sum(torch.tensor(self.num, device=device))
        self.num = int(num)
        distributed.all_reduce_sum(self.sum)
        distributed.all_reduce_sum(self.outer)

    def gaussian(self) -> Gaussian:
        """Mean and covariance. Raises UserError for fewer than two images and for features that are not finite."""
        if self.num < 2:
            raise dnnlib.UserError(f'a covariance needs at least 2 images, and there is only {self.num}')
        mu = self.sum / self.num
        sigma = (self.outer - torch.outer(self.sum, mu)) / (self.num - 1)
        if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
            raise dnnlib.UserError('the features hold NaN or infinite numbers; are the weights of the detector whole?')
        return Gaussian(mu.cpu().numpy(), sigma.cpu().numpy(), self.num)
