"""The DDPM U-Net (arXiv 2006.11239) with label and augmentation embeddings, as class-balancing
diffusion uses it (arXiv 2305.00562). State names and shapes are those of that paper's checkpoints.

Shapes: images x_NCHW, whole time steps [N], embedding temb_NE.
"""

import collections
import math

import torch
import torch.nn.functional as F
from torch import nn

from training.networks.adm import ResBlock
from training.networks.layers import (
    GroupNorm,
    Network,
    StridedConv,
    attention,
    conv,
    embed_labels,
    sides,
    unet_layers,
)


@torch.no_grad()
def draw_fan_average(layer, gain: float = 1):
    """Variance scaling by the average fan: weights ~ U(-a, a) of variance a^2 / 3 = gain^2 / n,
    n = (n_in + n_out) / 2, where n_in weights lead to an output and n_out from an input; biases 0.
    """
    weight = layer.weight
    fans = weight[0].numel() + weight[:, 0].numel()
    a = math.sqrt(3) * (gain * math.sqrt(2 / fans))
    weight.uniform_(-a, a)
    layer.bias.zero_()


class TimestepTable(nn.Module):
    """Fixed table [steps, width]: sine and cosine of t exp(-ln(10000) 2i / width), interleaved.

    A buffer, so that snapshots in half precision keep it as it is.
    """

    def __init__(self, steps: int, width: int):
        super().__init__()
        frequencies = torch.exp(torch.arange(0, width, 2) / width * -math.log(10000))
        angles = torch.arange(steps).float().outer(frequencies)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1)
        self.register_buffer('weight', table.reshape(steps, width))

    def forward(self, t):
        return F.embedding(t, self.weight)


class AttnBlock(nn.Module):
    """Self-attention over the pixels, one head, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = GroupNorm(channels)
        for name in ('proj_q', 'proj_k', 'proj_v', 'proj'):
            self.add_module(name, conv(channels, channels, 1))

    def forward(self, x_NCHW):
        layers = [self.proj_q, self.proj_k, self.proj_v]
        y = attention(self.group_norm(x_NCHW), layers, 1, 'qhc')
        return self.proj(y).add_(x_NCHW)


class DDPMBlock(ResBlock):
    """Residual block to which the embedding is added; `attn`: with attention behind it."""

    names = ('block1', 'temb_proj', 'block2', 'shortcut')

    def __init__(self, in_channels, out_channels, temb_channels, dropout, attn):
        super().__init__(in_channels, out_channels, temb_channels, dropout, False)
        self.attn = AttnBlock(out_channels) if attn else nn.Identity()

    def forward(self, x, temb):
        return self.attn(super().forward(x, temb))


class DDPMUNet(Network):
    """net(x [N,C,H,W], t int64 [N] in 0..T-1, y, augm) -> predicted noise [N,C,H,W].

    `y` (with `cond`): class numbers [N], or vectors [N, num_class] with zeros for "no label"; None
    leaves labels out. `augm` (with `augm=True`): augmentation vectors [N, 9], None leaves them
    out. `attn` lists LEVELS with attention, not resolutions. `ch` times every entry of `ch_mult`
    must be a multiple of 32; on a level of exactly 32 channels each channel is a group of its
    normalisation, which takes the embedding out again, so use 64 or more. `precision` as in
    ADMUNet.
    """

    block = DDPMBlock  # see adm.py

    def __init__(self, T, ch, ch_mult, attn, num_res_blocks, dropout, cond, augm, num_class,
                 img_resolution=32, img_channels=3, precision='fp32'):
        super().__init__(img_resolution, img_channels, num_class if cond else 0, precision)
        self.T, self.cond, self.augm = T, cond, augm
        tdim = ch * 4
        self.time_embedding = nn.Sequential(collections.OrderedDict(timembedding=nn.Sequential(
            TimestepTable(T, ch), nn.Linear(ch, tdim), nn.SiLU(), nn.Linear(tdim, tdim))))
        if cond:
            self.label_embedding = nn.Embedding(num_class, tdim)
        if augm:
            self.augm_embedding = nn.Linear(9, tdim, bias=False)

        def layer(kind, attention, c_in, c_out):
            if kind in ('down', 'up'):
                return StridedConv(c_in, 'main', kind == 'up')
            return DDPMBlock(c_in, c_out, tdim, dropout, attention)

        self.head = conv(img_channels, ch, 3)
        widths = [ch * mult for mult in ch_mult]
        side = min(sides(img_resolution))
        (_, *encoder), decoder = unet_layers(img_resolution, ch, widths, num_res_blocks,
                                             [side >> level for level in attn])
        self.downblocks, self.middleblocks, self.upblocks = (
            nn.ModuleList(layer(*rest) for _, *rest in layers)
            for layers in (encoder, decoder[:2], decoder[2:]))
        c_out = widths[0]
        self.tail = nn.Sequential(
            GroupNorm(c_out), nn.SiLU(), conv(c_out, img_channels, 3))
        self._initialize()

    def _initialize(self):
        """Draws all layers that have biases, in order. Those that end a residual branch or the
        network are scaled by 1e-5: at first each block passes on its input, and the network
        predicts zero.
        """
        gains = {self.tail[-1]: 1e-5}
        for layer in self.modules():
            if isinstance(layer, DDPMBlock):
                gains[layer.layers[4]] = 1e-5
            elif getattr(layer, 'bias', None) is not None and layer.weight.ndim > 1:
                draw_fan_average(layer, gains.get(layer, 1))

    def forward(self, x, t, y=None, augm=None):
        temb = self.time_embedding(t)
        if self.cond and y is not None:
            temb = temb + embed_labels(self.label_embedding, y)
        if self.augm and augm is not None:
            temb = temb + self.augm_embedding(augm)

        temb = F.silu(temb)
        encoded = [self.head(self.activations(x))]
        for layer in self.downblocks:
            encoded.append(layer(encoded[-1], temb))
        h = encoded[-1]
        for layer in (*self.middleblocks, *self.upblocks):
            if isinstance(layer, self.block) and layer.in_channels > h.shape[1]:
                h = torch.cat([h, encoded.pop()], dim=1)
            h = layer(h, temb)
        norm, _, last = self.tail
        return last(norm(h.float(), silu=True)).contiguous()
