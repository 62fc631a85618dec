"""The U-Net of guided diffusion (ADM, arXiv 2105.05233) with the learned variance of improved DDPM
(2102.09672).

State names and shapes are those of the published weights (`ADM_cifar10_baseline.pt`,
`DDPM_IP_celeba64.pt`, ...), so these load by name. Shapes: images x_NCHW, time steps [N]
(fractions allowed), embedding emb_NE.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnnlib import UserError
from training.networks.layers import (
    Conv1d,
    GroupNorm,
    Network,
    ResidualBlock,
    StridedConv,
    attention,
    conv,
    embed_labels,
    initialized,
    sides,
    time_features,
    unet_layers,
)

# Widths of the levels relative to the base width, where the configuration leaves them open.
CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4),
                64: (1, 2, 3, 4),
                 32: (1, 2, 2, 2)}


class ResBlock(ResidualBlock):
    """ADM's residual block. `names`: of the parts in the state."""

    names = ('in_layers', 'emb_layers', 'out_layers', 'skip_connection')

    def __init__(self, *args, use_checkpoint=False):
        super().__init__(*args)
        self.use_checkpoint = use_checkpoint

    def register(self, norm0, conv0, affine, norm1, conv1, skip):
        other = nn.Identity()
        super().register(nn.Sequential(norm0, other, conv0), nn.Sequential(other, affine),
                         nn.Sequential(norm1, other, other, conv1), skip)

    def forward(self, x_NCHW, emb_NE):
        if not self.use_checkpoint or not torch.is_grad_enabled():
            return super().forward(x_NCHW, emb_NE)
        masks = []

        def drop(h):
            # The block runs again in the backward pass and must not draw another mask.
            if not masks:
                masks.append(self.drop(torch.ones_like(h)))
            return h * masks[0]

        return checkpoint(super().forward, x_NCHW, emb_NE, drop, use_reentrant=False)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with a residual connection.

    The channels of `qkv` are [all q | all k | all v] in the new order, [q | k | v] head by head in
    the old one.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool, use_checkpoint=False):
        super().__init__()
        self.num_heads, self.new_order, self.use_checkpoint = num_heads, new_order, use_checkpoint
        self.norm = GroupNorm(channels)
        self.qkv = Conv1d(channels, channels * 3, 1)
        self.proj_out = initialized(Conv1d(channels, channels, 1), 0)

    def forward(self, x_NCHW):
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x_NCHW, use_reentrant=False)
        return self._forward(x_NCHW)

    def _forward(self, x_NCHW):
        order = 'qhc' if self.new_order else 'hqc'
        y = attention(self.norm(x_NCHW), [self.qkv], self.num_heads, order)
        return self.proj_out(y).add_(x_NCHW)


class _Layers(nn.Sequential):
    """A sequence in which the residual blocks are given the embedding."""

    block = ResBlock  # whatever this name means when diffusers has read an exported file again

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, self.block) else layer(x)
        return x


class ADMUNet(Network):
    """ADM's U-Net, built from the options of its configuration files.

    net(x [N,C,H,W], t [N], labels) -> [N, C or 2C, H, W]: the predicted noise, then, with
    `learn_sigma`, the interpolation values of the variance. `labels` ([N] class numbers, or
    vectors [N, num_classes] with zeros for "no label") belong to networks with `class_cond`.
    `attention_resolutions` and `channel_mult` are lists with commas; an empty `channel_mult`
    stands for the published widths at `image_size`, of images that are no squares at the shorter
    side. `num_head_channels=-1` means `num_heads` heads
    (`num_heads_upsample` in the decoder, -1 = the same), otherwise heads of that width.
    `precision` is 'fp32', 'fp16' (on GPUs) or 'bf16'; `use_fp16` is the published name for the
    first two. Weights stay float32; in half precision everything but embeddings and the output
    layers is computed in it. Raises UserError for sizes that do not fit.
    """

    def __init__(self, image_size, num_channels, num_res_blocks, channel_mult='',
                 learn_sigma=False, class_cond=False, use_checkpoint=False,
                 attention_resolutions='16', num_heads=1, num_head_channels=-1,
                 num_heads_upsample=-1, use_scale_shift_norm=False, dropout=0.0,
                 resblock_updown=False, use_fp16=False, use_new_attention_order=False,
                 img_channels=3, num_classes=1000, precision=None):
        super().__init__(image_size, img_channels, num_classes if class_cond else 0, precision,
                         use_fp16)
        side = min(sides(image_size))
        if not channel_mult and side not in CHANNEL_MULT:
            raise UserError(f'channel_mult: none is known for images of {side} pixels; '
                            'write e.g. 1,2,2')
        mult = _numbers(channel_mult, 'channel_mult') if channel_mult else CHANNEL_MULT[side]
        widths = [int(factor * num_channels) for factor in mult]
        attention_at = _numbers(attention_resolutions, 'attention_resolutions')
        self.num_channels, self.learn_sigma = num_channels, learn_sigma
        emb_channels = num_channels * 4

        def block(c_in, c_out, *resampling):
            return ResBlock(c_in, c_out, emb_channels, dropout, use_scale_shift_norm, *resampling,
                            use_checkpoint=use_checkpoint)

        def attention_block(channels, heads):
            heads = heads if num_head_channels == -1 else channels // num_head_channels
            if heads < 1 or channels % heads:
                raise UserError(f'num_heads/num_head_channels: {channels} channels do not split '
                                f'into {heads} heads')
            return AttentionBlock(channels, heads, use_new_attention_order, use_checkpoint)

        def make(kind, attention, c_in, c_out, heads):
            if kind == 'conv':
                return [conv(img_channels, c_out, 3)]
            if kind in ('up', 'down'):
                if resblock_updown:
                    return [block(c_in, c_out, kind, (1, 1), False)]
                return [StridedConv(c_in, 'op' if kind == 'down' else 'conv', kind == 'up')]
            blocks = [block(c_in, c_out)]
            return blocks + [attention_block(c_out, heads)] if attention else blocks

        self.time_embed = nn.Sequential(
            nn.Linear(num_channels, emb_channels), nn.SiLU(),
            nn.Linear(emb_channels, emb_channels))
        if class_cond:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        encoder, (in0, in1, *decoder) = unet_layers(image_size, widths[0], widths, num_res_blocks,
                                                    attention_at)
        self.input_blocks = nn.ModuleList(
            _Layers(*make(*rest, num_heads)) for _, *rest in encoder)
        self.middle_block = _Layers(*make(*in0[1:], num_heads), *make(*in1[1:], num_heads))
        self.output_blocks = nn.ModuleList()
        for _, kind, *rest in decoder:
            block_layers = make(kind, *rest, heads_up)
            if kind == 'up':
                self.output_blocks[-1].extend(block_layers)
            else:
                self.output_blocks.append(_Layers(*block_layers))
        self.out = nn.Sequential(
            GroupNorm(widths[0]), nn.SiLU(),
            conv(widths[0], img_channels * (2 if learn_sigma else 1), 3, 0))

    def forward(self, x, t, labels=None):
        if (labels is not None) != bool(self.label_dim):
            raise ValueError('labels are given if and only if the network is class-conditional')
        emb = self.time_embed(time_features(t, self.num_channels))
        if labels is not None:
            emb = emb + embed_labels(self.label_emb, labels)
        emb = F.silu(emb)
        h = self.activations(x)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        norm, _, last = self.out
        return last(norm(h.float(), silu=True)).contiguous()


def _numbers(text, name):
    try:
        numbers = [int(part) for part in str(text).split(',')]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f'{name}: {text!r} is not a list of numbers with commas, e.g. 16,8')
    return numbers
