"""The EDM2 recipe as one writes it first from the paper (arXiv 2312.02696), for comparison; tests check that it gives the
numbers of training/.

Eager, one tensor after the other: weights normalised with autograd through every operation, resampling by convolution,
attention by two products, no fused kernels, channels first. Names of the weights are those of training.networks.edm2.
"""

import copy
import math

import torch
import torch.nn.functional as F

from training import phema
from training.networks import edm2


def normalize(x, dims):
    """x over (1e-4 + its RMS over `dims`) (Eq. 47)."""
    count = math.prod(x.shape[dim] for dim in dims)
    rms = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32) / math.sqrt(count)
    return x / (rms + 1e-4).to(x.dtype)


def silu(x):
    return F.silu(x) / 0.596


def mix(a, b, t):
    """Eq. 88."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def join(a, b, t):
    """Eq. 103."""
    parts = (a, (1 - t) / math.hypot(1 - t, t)), (b, t / math.hypot(1 - t, t))
    channels = a.shape[1] + b.shape[1]
    return torch.cat([x * (share * math.sqrt(channels / x.shape[1])) for x, share in parts], dim=1)


class PlainConv(torch.nn.Module):
    """Convolution or linear layer with normalised weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x, gain=1):
        inputs = tuple(range(1, self.weight.ndim))
        if self.training:                               # forced: the stored weight itself
            self.weight.data.copy_(normalize(self.weight.data, inputs))
        gain = gain / math.sqrt(self.weight[0].numel())
        effective = (normalize(self.weight, inputs) * gain).to(x.dtype)
        return F.linear(x, effective) if len(inputs) == 1 else F.conv2d(x, effective, padding='same')


class PlainBlock(edm2.Block):
    """A block with the mathematics step by step; `Block` makes its layers."""

    def forward(self, x, emb):
        project = self.conv_skip or torch.nn.Identity()
        x = self._resampled(x)
        if self.flavor == 'enc':
            x = normalize(project(x), [1])
            x = mix(x, self._branch(x, emb), self.res_balance)
        else:
            x = mix(project(x), self._branch(x, emb), self.res_balance)
        if self.num_heads:
            x = mix(x, self.attn_proj(self._attention(x)), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def _branch(self, x, emb):
        scale = 1 + self.emb_linear(emb, self.emb_gain)
        h = self.conv_res0(silu(x))
        h = silu(h * scale.to(h.dtype)[..., None, None])
        return self.conv_res1(F.dropout(h, self.dropout, self.training))

    def _resampled(self, x):
        if isinstance(self.resample, torch.nn.Identity):
            return x
        kernel = torch.as_tensor(self.resample.resample_filter).to(x).expand(x.shape[1], 1, -1, -1)
        options = dict(groups=x.shape[1], stride=2, padding=(kernel.shape[-1] - 1) // 2)
        return F.conv_transpose2d(x, kernel * 4, **options) if self.resample.up else F.conv2d(x, kernel, **options)

    def _attention(self, x):
        N, C, H, W = x.shape
        qkv = self.attn_qkv(x).reshape(N, self.num_heads, C // self.num_heads, 3, H * W)
        query, key, value = normalize(qkv, [2]).unbind(3)
        scores = key.transpose(2, 3) @ query / math.sqrt(query.shape[2])    # [N, heads, keys, queries]
        return (value @ scores.softmax(dim=2)).reshape(N, C, H, W)


class PlainUNet(edm2.UNet):
    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            label = self.emb_label(class_labels * math.sqrt(class_labels.shape[1]))
            emb = mix(emb, label, self.label_balance)
        emb = silu(emb).to(x.dtype)
        first, *blocks = self.enc.values()
        encoded = [first(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))]
        for block in blocks:
            encoded.append(block(encoded[-1], emb))
        x = encoded[-1]
        for block in self.dec.values():
            x = block(join(x, encoded.pop(), self.concat_balance) if block.joins else x, emb)
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
