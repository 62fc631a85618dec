"""The networks of EDM, ADM, DDPM and the classifiers as one writes them first from their papers, for comparison; tests
check that they give the numbers of training/.

Eager, channels first, one operation after the other: normalisation, activation, modulation and dropout apart, attention
by two products, resampling with a filter as a convolution. Names of the weights are those of training.networks.
"""

import copy
import math

import torch
import torch.nn.functional as F

from training.networks import adm, classifier, ddpm, edm, layers


def attention(qkv, num_heads, order):
    """The arguments and the result of `layers.attention`: a product of queries and keys, and one of that with values."""
    N, C, H, W = qkv.shape
    sizes = {'q': 3, 'h': num_heads, 'c': C // 3 // num_heads}
    qkv = torch.einsum(f'n{order}t->qnhct', qkv.reshape(N, *(sizes[name] for name in order), H * W))
    q, k, v = qkv.reshape(3, N * num_heads, -1, H * W)
    weights = torch.einsum('nct,ncs->nts', q, k / math.sqrt(q.shape[1])).softmax(dim=2)
    return torch.einsum('nts,ncs->nct', weights, v).reshape(N, -1, H, W)


class PlainNorm(layers.GroupNorm):
    def forward(self, x, silu=False):
        y = torch.nn.GroupNorm.forward(self, x)
        return F.silu(y) if silu else y


class PlainResample(layers.Resample):
    def forward(self, x, pad=True):
        kernel = torch.as_tensor(self.resample_filter).to(x).expand(x.shape[1], 1, -1, -1)
        options = dict(groups=x.shape[1], stride=2, padding=(kernel.shape[-1] - 1) // 2 if pad else 0)
        return F.conv_transpose2d(x, kernel * 4, **options) if self.up else F.conv2d(x, kernel, **options)


class PlainBoxConv(layers.ResampleConv):
    """As guided diffusion has it: repeated or averaged pixels."""

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class PlainResampleConv(layers.ResampleConv):
    def forward(self, x):
        padding = self.weight.shape[-1] // 2
        if not self.fused:
            return F.conv2d(PlainResample.forward(self, x), self.weight, self.bias, padding=padding)
        x = F.conv2d(x, self.weight, padding=padding + (self.resample_filter.shape[-1] - 1) // 2)
        return PlainResample.forward(self, x, pad=False) + self.bias[:, None, None]


class PlainStridedConv(layers.StridedConv):
    def forward(self, x, emb=None):
        (conv,) = self.children()
        return conv(F.interpolate(x, scale_factor=2) if self.up else x)


class PlainBlock(layers.ResidualBlock):
    def forward(self, x, emb, drop=None):
        norm0, conv0, affine, norm1, conv1, skip = self.layers
        h = conv0(F.silu(norm0(x)))
        shift = affine(emb)[:, :, None, None]
        if self.adaptive:
            scale, shift = shift.chunk(2, dim=1)
            h = norm1(h) * (1 + scale) + shift
        else:
            h = norm1(h + shift)
        h = conv1(F.dropout(F.silu(h), self.p, self.training))
        return (h + skip(x)) * self.skip_scale if self.skip_scale != 1 else h + skip(x)


class PlainEDMBlock(edm.UNetBlock):
    def forward(self, x, emb):
        x = PlainBlock.forward(self, x, emb)
        if self.num_heads:
            y = attention(self.qkv(self.norm2(x)), self.num_heads, 'hcq')
            x = (self.proj(y) + x) * self.skip_scale
        return x


class PlainDhariwalBlock(edm.ADMBlock):
    forward = PlainEDMBlock.forward


class PlainADMBlock(adm.ResBlock):
    forward = PlainBlock.forward


class PlainADMAttention(adm.AttentionBlock):
    def forward(self, x):
        y = attention(self.qkv(self.norm(x)), self.num_heads, 'qhc' if self.new_order else 'hqc')
        return x + self.proj_out(y)


class PlainDDPMBlock(ddpm.DDPMBlock):
    def forward(self, x, emb):
        return self.attn(PlainBlock.forward(self, x, emb))


class PlainDDPMAttention(ddpm.AttnBlock):
    def forward(self, x):
        h = self.group_norm(x)
        qkv = torch.cat([self.proj_q(h), self.proj_k(h), self.proj_v(h)], dim=1)
        return x + self.proj(attention(qkv, 1, 'qhc'))


class PlainWideBlock(classifier.BasicBlock):
    def forward(self, x):
        active = F.relu(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return h + (x if self.convShortcut is None else self.convShortcut(active))


class PlainWideResNet(classifier._WideResNet):
    def forward(self, x):
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(h)).mean([2, 3]))


# What is measured: name -> (class, arguments), sized like the EDM2 network of bench_training.
_SHAPE = dict(img_resolution=16, img_channels=3)
FAMILIES = {
    'edm': ('EDMPrecond', _SHAPE | dict(
        label_dim=10, model_type='SongUNet', model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8],
        dropout=0.13)),
    'adm': ('DiscreteDenoiser', dict(diffusion={}, network=dict(
        class_name='ADMUNet', image_size=16, num_channels=64, num_res_blocks=1, channel_mult='1,2', num_head_channels=32,
        attention_resolutions='8', dropout=0.3, use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=True, learn_sigma=True))),
    'ddpm': ('DiscreteDenoiser', dict(diffusion=dict(variance='fixed_large'), network=_SHAPE | dict(
        class_name='DDPMUNet', T=1000, ch=64, ch_mult=[1, 2], attn=[1], num_res_blocks=1, dropout=0.1, cond=True,
        augm=False, num_class=10))),
    'classifier': ('WideResNet', dict(name='wrn-16-4')),
}
PLAIN = {layers.GroupNorm: PlainNorm,
         edm.UNetBlock: PlainEDMBlock, edm.ADMBlock: PlainDhariwalBlock, adm.ResBlock: PlainADMBlock,
         layers.StridedConv: PlainStridedConv, adm.AttentionBlock: PlainADMAttention, ddpm.DDPMBlock: PlainDDPMBlock,
         ddpm.AttnBlock: PlainDDPMAttention,
         classifier.BasicBlock: PlainWideBlock, classifier._WideResNet: PlainWideResNet}


def plain_unet(net: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network (weights, mode) that computes plainly, in float32."""
    plain = copy.deepcopy(net)
    resampling = {layers.ResampleConv: PlainBoxConv}
    if isinstance(net, edm.Precond):
        resampling = {layers.Resample: PlainResample, layers.ResampleConv: PlainResampleConv}
    for module in plain.modules():
        cls = (PLAIN | resampling).get(type(module))
        if cls is not None:
            module.__class__ = cls
        if isinstance(module, layers.Network):
            module.activations = lambda x, *_: x
    return plain
