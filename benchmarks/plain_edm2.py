"""The EDM2 recipe as one writes it first from the paper (arXiv 2312.02696), for comparison; tests check that it gives the
numbers of training/.

Eager, one tensor after the other: weights normalised with autograd through every operation, resampling by convolution,
einsum attention, no fused kernels, channels first. Names of the weights are those of training.networks.edm2.
"""

import copy
import math

import torch
import torch.nn.functional as F

from training import phema
from training.networks import edm2


def normalize(x, dims):
    """x over (1e-4 + its RMS over `dims`)."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def silu(x):
    return F.silu(x) / 0.596


def mix(a, b, t):
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def join(a, b, t):
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(na)), b * (scale * t / math.sqrt(nb))], dim=1)


class PlainConv(torch.nn.Module):
    """Convolution or linear layer with normalised weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x, gain=1):
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, dims))
        weight = normalize(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class PlainBlock(edm2.Block):
    """A block with the mathematics step by step; `Block` makes its layers."""

    def forward(self, x, emb):
        x = self._resampled(x)
        if self.flavor == 'enc':
            x = normalize(self.conv_skip(x) if self.conv_skip is not None else x, 1)
        y = self.conv_res0(silu(x))
        y = silu(y * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        y = self.conv_res1(y)
        if self.flavor == 'dec' and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mix(x, y, self.res_balance)
        if self.num_heads:
            x = mix(x, self.attn_proj(self._attention(x)), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def _resampled(self, x):
        if isinstance(self.resample, torch.nn.Identity):
            return x
        kernel = torch.as_tensor(self.resample.resample_filter).to(x).expand(x.shape[1], 1, -1, -1)
        options = dict(groups=x.shape[1], stride=2, padding=(kernel.shape[-1] - 1) // 2)
        return F.conv_transpose2d(x, kernel * 4, **options) if self.resample.up else F.conv2d(x, kernel, **options)

    def _attention(self, x):
        N, C, H, W = x.shape
        qkv = self.attn_qkv(x).reshape(N, self.num_heads, C // self.num_heads, 3, H * W)
        q, k, v = normalize(qkv, 2).unbind(3)
        weights = torch.einsum('nhcq,nhck->nhqk', q, k / math.sqrt(q.shape[2])).softmax(dim=3)
        return torch.einsum('nhqk,nhck->nhcq', weights, v).reshape(N, C, H, W)


class PlainUNet(edm2.UNet):
    def forward(self, x, noise_labels, class_labels=None):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            emb = mix(emb, self.emb_label(class_labels * math.sqrt(class_labels.shape[1])), self.label_balance)
        emb = silu(emb).to(x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith('conv') else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(join(x, skips.pop(), self.concat_balance) if 'block' in name else x, emb)
        return self.out_conv(x, self.out_gain)


def plain_network(net: torch.nn.Module) -> torch.nn.Module:
    """A copy of an EDM2 network (weights, mode) that computes plainly."""
    plain = copy.deepcopy(net)
    for module in list(plain.modules()):
        if isinstance(module, (edm2.Block, edm2.UNet)):
            module.__class__ = PlainBlock if isinstance(module, edm2.Block) else PlainUNet
        for name, child in module.named_children():
            if isinstance(child, edm2.MPConv):
                setattr(module, name, PlainConv(child.weight))
            if isinstance(module, torch.nn.ModuleDict) and isinstance(child, edm2.MPConv):
                module[name] = PlainConv(child.weight)
    for parameter, ours in zip(plain.parameters(), net.parameters(), strict=True):
        parameter.requires_grad_(ours.requires_grad)
    return plain.train(net.training)


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
