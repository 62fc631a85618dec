"""The EDM2 recipe as one writes it first: einsum attention, one tensor at a time, no fused kernels.

The same mathematics as training/, for comparison: a test checks that the numbers agree.
"""

import copy
import math

import torch

from training import phema
from training.networks import edm2


class PlainBlock(edm2.Block):
    """A block whose attention is written out with einsum and softmax."""

    def _attention(self, x):
        N, C, H, W = x.shape
        qkv = self.attn_qkv(x).reshape(N, self.num_heads, C // self.num_heads, 3, H * W)
        q, k, v = edm2.normalize(qkv, dim=2).unbind(3)
        weights = torch.einsum('nhcq,nhck->nhqk', q, k / math.sqrt(q.shape[2])).softmax(dim=3)
        return torch.einsum('nhqk,nhck->nhcq', weights, v).reshape(N, C, H, W)


def plain_network(net: torch.nn.Module) -> torch.nn.Module:
    """A copy of an EDM2 network that computes plainly."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if type(module) is edm2.Block:
            module.__class__ = PlainBlock
        if isinstance(module, edm2.Resample):
            module.box = False
    return net


class PlainEMA:
    """Power-function EMA, tensor by tensor."""

    def __init__(self, net, stds):
        self.stds, self.emas = stds, [copy.deepcopy(net) for _ in stds]

    @torch.no_grad()
    def update(self, net, nimg, batch):
        for std, ema in zip(self.stds, self.emas, strict=True):
            beta = phema.power_function_beta(std, nimg + batch, batch)
            for target, source in zip(ema.parameters(), net.parameters(), strict=True):
                target.lerp_(source, float(1 - beta))
