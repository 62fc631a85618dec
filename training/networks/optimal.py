"""The denoiser with the smallest loss on a training set, in closed form: it memorizes all of it.

D(x; sigma) = sum_i w_i y_i, w_i proportional to exp(-|x - y_i|^2 / (2 sigma^2)), is the mean of
the training images y_i given their noisy version (arXiv 2310.02664, Eq. 3). Samplers take it like
any network; what they make of it is the training set itself.
"""

import numpy as np
import torch

from dnnlib import UserError
from training.data.dataset import resolution_of
from training.networks.layers import Denoiser

BLOCK_ELEMENTS = 1 << 24    # values of training images that are turned into float32 at once
EXACT_CANDIDATES = 16       # nearest images whose distances are computed from differences


class OptimalDenoiser(Denoiser):
    """Called like the networks: net(x [N,C,H,W], sigma [N] or one value, labels [N, label_dim] or
    None) -> [N,C,H,W].

    images      uint8 [M,C,H,W], kept as they are; the network's scale is [-1, 1]
    label_ids   int [M] classes, or None; a one-hot label restricts the mean to the images of its
                class, a label of zeros ("no label") does not
    label_dim   number of classes

    Raises UserError when asked for a class that has no images.
    """

    def __init__(self, images, label_ids=None, label_dim: int = 0):
        super().__init__(resolution_of(*images.shape[2:]), images.shape[1], label_dim)
        # A parameter, so that it moves with the module and tells its device; nothing trains it.
        self.images = torch.nn.Parameter(torch.as_tensor(images).flatten(1), requires_grad=False)
        ids = torch.as_tensor(label_ids, dtype=torch.int64) if label_dim else None
        self.register_buffer('label_ids', ids)
        norms = torch.cat([y.square().sum(dim=1) for y in self._blocks()])
        self.register_buffer('squared_norms', norms)

    def _blocks(self):
        """The training images as float32 [., D] in [-1, 1], some at a time."""
        for block in self.images.split(max(BLOCK_ELEMENTS // self.images.shape[1], 1)):
            yield block.to(torch.float32) / 127.5 - 1

    @torch.no_grad()
    def forward(self, x, sigma, class_labels=None):
        x, sigma, class_labels = self.conditions(x, sigma, class_labels)
        flat = x.flatten(1)
        logits = self._squared_distances(flat).div_(-2 * sigma.square().reshape(-1, 1))
        if class_labels is not None:
            logits.masked_fill_(~self._allowed(class_labels), -torch.inf)
        weights = logits.softmax(dim=1)
        mean, start = torch.zeros_like(flat), 0
        for y in self._blocks():
            mean.addmm_(weights[:, start:start + len(y)], y)
            start += len(y)
        return mean.reshape(x.shape)

    def _squared_distances(self, x):
        """|x - y|^2 [N,M]: from matrix products, and for the nearest few from differences, which
        at small noise levels decide the weights and of which products keep too few digits.
        """
        products = torch.cat([x @ y.t() for y in self._blocks()], dim=1)
        distances = products.mul_(-2).add_(x.square().sum(dim=1, keepdim=True))
        distances.add_(self.squared_norms)
        candidates = min(EXACT_CANDIDATES, distances.shape[1])
        nearest = distances.topk(candidates, dim=1, largest=False).indices
        for candidate in nearest.unbind(dim=1):
            y = self.images[candidate].to(torch.float32) / 127.5 - 1
            distances.scatter_(1, candidate[:, None], (x - y).square().sum(dim=1, keepdim=True))
        return distances

    def _allowed(self, class_labels):
        """Which training images each label leaves: bool [N,M]."""
        labelled, ids = class_labels.sum(dim=1) > 0, class_labels.argmax(dim=1)
        same = ids[:, None] == self.label_ids
        empty = ids[labelled & ~same.any(dim=1)]
        if len(empty):
            raise UserError('optimal denoiser: the data set has no images of class '
                            f'{int(empty[0])}; choose another')
        return same | ~labelled[:, None]


def optimal_denoiser(dataset, device='cpu') -> OptimalDenoiser:
    """The optimal denoiser of a data set (see training.data.dataset), class-conditional if it has
    labels.

    All its images are kept on `device` as bytes. Raises UserError for latents and for labels that
    are not classes.
    """
    images = dataset.images(np.arange(len(dataset)))
    if images.dtype != np.uint8:
        raise UserError(f'optimal:{dataset.path} holds latents; the optimal denoiser works on '
                        'pixels')
    label_ids = dataset.stored_labels
    if label_ids is not None and label_ids.ndim == 2:
        raise UserError(f'optimal:{dataset.path} has vectors for labels instead of classes; '
                        'remove them from its dataset.json')
    return OptimalDenoiser(images, label_ids, dataset.label_dim).to(device).eval()
