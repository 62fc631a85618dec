"""EDM2 networks (arXiv 2312.02696): a U-Net in which activations, weights and updates keep their
magnitude.

Shapes: images [N, C, H, W], noise levels sigma [N] or scalar, class labels [N, label_dim]
(one-hot, or zeros for "no label"). Equation numbers are those of the paper. State names and shapes
are those of the published snapshots.
"""

import math

import torch
import torch.nn.functional as F

from dnnlib import UserError
from training.networks.layers import (
    Denoiser,
    Resample,
    dropout,
    edm_coefficients,
    enlarged_conv,
    unbind,
    unet_layers,
)

SILU_GAIN = 1 / 0.596  # 0.596 is the RMS of SiLU of a standard normal

# Every normalisation divides by (EPS + RMS): a row of zeros stays zero.
EPS = 1e-4


def _rms(x, dim):
    """Root mean square of x over the axes `dim`, which stay with length 1; in float32."""
    count = math.prod([x.shape[axis] for axis in ([dim] if isinstance(dim, int) else dim)])
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return length * math.sqrt(1 / count)


def _row_axes(weight) -> list[int]:
    """All axes but the first."""
    return list(range(1, weight.ndim))


def _dot(a, b, dim):
    """Sum of a b over the axes `dim`, which stay with length 1; in float32."""
    return (a * b).sum(dim=dim, keepdim=True, dtype=torch.float32)


# The backward passes below are written out because autograd, which sees division and norm apart,
# makes three times as many passes over the memory. torch.compile finds the short way by itself and
# is given the plain formulas.

class _Normalize(torch.autograd.Function):
    """y = x / (EPS + r), r = RMS of x. dx = g / (EPS + r) - y <g, y> / (n r), with means over the
    n elements of a group.
    """

    @staticmethod
    def forward(ctx, x, dim):
        r = _rms(x, dim)
        y = x / (r + EPS).to(x.dtype)
        ctx.dim, ctx.n = dim, x.numel() // r.numel()
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, r = ctx.saved_tensors
        share = _dot(grad, y, ctx.dim).div_(r.clamp_min(1e-30) * -ctx.n)   # y = 0 where r = 0
        return (grad / (r + EPS).to(grad.dtype)).addcmul_(y, share.to(y.dtype)), None


def normalize(x, dim=None):
    """x / (EPS + RMS of x over `dim`), by default over all but the first axis (Eq. 47). The RMS is
    in float32.
    """
    dim = _row_axes(x) if dim is None else dim
    if torch.compiler.is_compiling():
        return x / (_rms(x, dim) + EPS).to(x.dtype)
    return _Normalize.apply(x, dim)


class _EffectiveWeight(torch.autograd.Function):
    """w gain / (sqrt(n) (EPS + r)) in `dtype`, for rows w of n elements and RMS r (Eq. 66), gain
    [].

    With s = 1 / (sqrt(n) (EPS + r)): dgain = s <g, w>, dw = gain s (g - w <g, w> / (n r (EPS +
    r))).
    """

    @staticmethod
    def forward(ctx, weight, gain, r, dtype):
        ctx.n = weight[0].numel()
        s = 1 / (math.sqrt(ctx.n) * (r + EPS))
        ctx.save_for_backward(weight, r, s, gain)
        return torch.mul(weight, s * gain, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, r, s, gain = ctx.saved_tensors
        dot = _dot(grad, weight, _row_axes(weight))
        scale = s * gain
        share = dot * scale / (r.clamp_min(1e-30) * (r + EPS) * -ctx.n)
        dgain = (dot * s).sum() if ctx.needs_input_grad[1] else None
        return (grad * scale).addcmul_(weight, share), dgain, None, None


class _MPCat(torch.autograd.Function):
    """Channels of `a` times wa, then those of `b` times wb, each written once to where it
    belongs.
    """

    @staticmethod
    def forward(ctx, a, b, wa, wb):
        ctx.channels, ctx.weights = a.shape[1], (wa, wb)
        last = a.is_contiguous(memory_format=torch.channels_last)
        out = torch.empty([a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:]], dtype=a.dtype,
                          device=a.device,
                          memory_format=torch.channels_last if last else torch.contiguous_format)
        torch.mul(a, wa, out=out[:, :ctx.channels])
        torch.mul(b, wb, out=out[:, ctx.channels:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wa, wb = ctx.weights
        return grad[:, :ctx.channels] * wa, grad[:, ctx.channels:] * wb, None, None


def mp_silu(x):
    """SiLU scaled to keep unit magnitude (Eq. 81)."""
    return F.silu(x) * SILU_GAIN


def mp_sum_weights(t):
    """What `mp_sum` multiplies its two arguments by."""
    scale = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / scale, t / scale


def mp_sum(a, b, t=0.5):
    """Weighted sum of unit-magnitude tensors that keeps their magnitude (Eq. 88)."""
    wa, wb = mp_sum_weights(t)
    return a * wa + b * wb


def mp_cat(a, b, t=0.5):
    """Concatenation over channels in which `b` contributes the share `t` (Eq. 103)."""
    channels = a.shape[1] + b.shape[1]
    wa, wb = [weight * math.sqrt(channels / x.shape[1])
              for weight, x in zip(mp_sum_weights(t), (a, b), strict=True)]
    if torch.compiler.is_compiling():
        return torch.cat([a * wa, b * wb], dim=1)
    return _MPCat.apply(a, b, wa, wb)


@torch.no_grad()
def force_normalize(weight) -> torch.Tensor:
    """Rewrites a weight with rows of unit magnitude (Eq. 47); returns their RMS, [out, 1, ...],
    afterwards.
    """
    rms = _rms(weight.float(), _row_axes(weight))
    weight.div_(rms + EPS)
    return rms / (rms + EPS)


class MPFourier(torch.nn.Module):
    """Random Fourier features of unit magnitude, [N] -> [N, K] (Eq. 75). `freqs` include the
    factor 2 pi.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer('freqs', 2 * math.pi * torch.randn(num_channels))
        self.register_buffer('phases', 2 * math.pi * torch.rand(num_channels))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.float().outer(self.freqs.float()) + self.phases.float())


class MPConv(torch.nn.Module):
    """Convolution (`kernel=[k, k]`) or linear layer (`kernel=[]`) with normalised weights (Eq. 47,
    66).

    In training the stored weight is itself kept normalised: every forward pass rewrites it first.
    Out of training, the weights that the convolution uses are kept until the stored ones change.
    """

    _kept = None  # (what they were computed from, weights)
    normalizes = True  # False: who trains keeps the stored weights normalised (training.shards)

    def __init__(self, in_channels: int, out_channels: int, kernel):
        super().__init__()
        weight = torch.randn(out_channels, in_channels, *kernel)
        if kernel:  # the order in memory in which convolutions are fastest, on the CPU as on GPUs
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x, gain=1):
        weight = self.effective_weight(gain, x.dtype)
        borders = [(size - 1) // 2 for size in weight.shape[2:]]
        return F.conv2d(x, weight, padding=borders) if borders else F.linear(x, weight)

    def effective_weight(self, gain, dtype):
        """The weight times `gain` (number or tensor []), normalised to unit magnitude of the
        outputs, in `dtype`.
        """
        if self.training:
            rms = force_normalize(self.weight) if self.normalizes else None
            return self._scaled(gain, dtype, rms)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.weight.is_inference():
            return self._scaled(gain, dtype)
        # What was computed last, as long as all that it was computed from is the same.
        source = [(t.data_ptr(), t._version) if torch.is_tensor(t) else t
                  for t in (self.weight, gain, dtype)]
        if self._kept is None or self._kept[0] != source:
            self._kept = source, self._scaled(gain, dtype)
        return self._kept[1]

    def _scaled(self, gain, dtype, rms=None):
        """w gain / (sqrt(n) (EPS + RMS of w)) for rows w of n elements; `rms`: their RMS where it
        is known.
        """
        weight = self.weight.float()
        if torch.compiler.is_compiling():
            return (normalize(weight) * (gain / math.sqrt(weight[0].numel()))).to(dtype)
        rms = _rms(weight, _row_axes(weight)) if rms is None else rms
        return _EffectiveWeight.apply(weight, torch.as_tensor(gain), rms, dtype)

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != '_kept'}


class Block(torch.nn.Module):
    """One encoder or decoder block: resampling, residual branch modulated by the embedding,
    attention. `kind` is that of the layer (`layers.unet_layers`).
    """

    def __init__(self, in_channels, out_channels, emb_channels, flavor, kind, attention,
                 resample_filter=(1, 1), channels_per_head=64, dropout=0,
                 res_balance=0.3, attn_balance=0.3, clip_act=256):
        super().__init__()
        self.flavor, self.dropout = flavor, dropout
        self.joins = flavor == 'dec' and 'block' in kind    # takes an output of the encoder too
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.num_heads = out_channels // channels_per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise UserError(f'makes {out_channels} channels, which {self.num_heads} heads of '
                            'attention cannot share', 'model_channels')
        self.resample = torch.nn.Identity()
        if kind in ('up', 'down'):
            self.resample = Resample(kind, resample_filter, stored=False)
        self.enlarges = kind == 'up' and self.resample.box   # repeats pixels
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == 'enc' else in_channels, out_channels,
                                [3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, [])
        self.conv_res1 = MPConv(out_channels, out_channels, [3, 3])
        self.conv_skip = None
        if in_channels != out_channels:
            self.conv_skip = MPConv(in_channels, out_channels, [1, 1])
        if self.num_heads:
            self.attn_qkv = MPConv(out_channels, out_channels * 3, [1, 1])
            self.attn_proj = MPConv(out_channels, out_channels, [1, 1])

    def forward(self, x, emb):
        small, x, shortcut = x, self.resample(x), self.conv_skip
        if self.flavor == 'enc':
            # The channels of a pixel get unit magnitude before the paths part, and after their
            # number has changed; the decoder changes it on the shortcut alone (Fig. 21).
            x = normalize(shortcut(x) if shortcut else x, dim=1)
            shortcut = None

        # Constant factors of activations go into the weights of the next convolution, which are
        # fewer: 1 / 0.596 of the SiLU, and the weights of the two sums at the end.
        keep, add = mp_sum_weights(self.res_balance)
        residual = self._residual(small if self.enlarges else x, emb, add)
        if shortcut:
            x = residual.add_(shortcut(x, gain=keep))
        else:
            x = residual.add_(x, alpha=keep)
        if self.num_heads:
            keep, add = mp_sum_weights(self.attn_balance)
            x = self.attn_proj(self._attention(x), gain=add).add_(x, alpha=keep)
        if self.clip_act is not None:
            # clamp, with a cheaper backward pass
            x = F.hardtanh(x, -self.clip_act, self.clip_act, inplace=True)
        return x

    def _residual(self, x_NCHW, emb_NE, gain):
        """The residual branch times `gain`, of what the decoder has yet to enlarge; the embedding
        scales channels by 1 + emb_gain W emb, and nothing at first.
        """
        scale = self.emb_linear(emb_NE, gain=self.emb_gain) + 1
        if self.enlarges:
            weight = self.conv_res0.effective_weight(SILU_GAIN, x_NCHW.dtype)
            y = enlarged_conv(F.silu(x_NCHW), weight)
        else:
            y = self.conv_res0(F.silu(x_NCHW), gain=SILU_GAIN)
        y = F.silu(y * scale[:, :, None, None].to(y.dtype))
        return self.conv_res1(dropout(y, self.dropout, self.training), gain=SILU_GAIN * gain)

    def _attention(self, x_NCHW):
        """Cosine attention: q, k and v are normalised over the channels of a head (Eq. 82)."""
        N, C, H, W = x_NCHW.shape
        heads = self.num_heads
        weight = self.attn_qkv.effective_weight(1, x_NCHW.dtype)
        # Output channels are numbered (head, channel, q|k|v). With q, k and v in front, and
        # channels last in memory, no activation has to be moved.
        weight = weight.reshape(heads, C // heads, 3, C).permute(2, 0, 1, 3).reshape(3 * C, C)
        qkv = F.conv2d(x_NCHW, weight[:, :, None, None]).permute(0, 2, 3, 1)
        qkv = normalize(qkv.reshape(N, H * W, 3, heads, C // heads), dim=4)
        q, k, v = unbind(qkv.transpose(1, 3), 2)  # each [N, heads, HW, C / heads]
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2)


class UNet(torch.nn.Module):
    """The U-Net of EDM2: encoder, decoder with every encoder output as a skip, noise and class
    embedding.
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192,
                 channel_mult=(1, 2, 3, 4), channel_mult_noise=None, channel_mult_emb=None,
                 num_blocks=3, attn_resolutions=(16, 8), label_balance=0.5, concat_balance=0.5,
                 augment_dim=0, **block_kwargs):
        super().__init__()
        cblock = [model_channels * m for m in channel_mult]
        cnoise = model_channels * (channel_mult_noise or channel_mult[0])
        cemb = model_channels * (channel_mult_emb or max(channel_mult))
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb, [])
        self.emb_label = MPConv(label_dim, cemb, []) if label_dim else None
        self.emb_augment = None
        if augment_dim:
            self.emb_augment = MPConv(augment_dim, cemb, [])
            self.augment_gain = torch.nn.Parameter(torch.zeros([]))

        def layer(flavor, kind, attention, c_in, c_out):
            if kind == 'conv':
                return MPConv(img_channels + 1, c_out, [3, 3])
            return Block(c_in, c_out, cemb, flavor, kind, attention, **block_kwargs)

        encoder, decoder = unet_layers(img_resolution, cblock[0], cblock, num_blocks,
                                       attn_resolutions)
        self.enc = torch.nn.ModuleDict({name: layer('enc', *rest) for name, *rest in encoder})
        self.dec = torch.nn.ModuleDict({name: layer('dec', *rest) for name, *rest in decoder})
        self.out_conv = MPConv(cblock[0], img_channels, [3, 3])

    def _embed(self, noise_labels, labels, augment_labels):
        """Embedding [N, cemb] of noise level, class and augmentation. One-hot labels have
        magnitude 1 / sqrt(label_dim). The augmentation's part is nothing at first, and where
        nothing was done to the image.
        """
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            label = self.emb_label(labels.float() * math.sqrt(labels.shape[1]))
            emb = mp_sum(emb, label, self.label_balance)
        if self.emb_augment is not None and augment_labels is not None:
            emb = emb + self.emb_augment(augment_labels, gain=self.augment_gain)
        return mp_silu(emb)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        """x [N,C,H,W] (its type is the type of the computation), noise_labels [N] or [1] ->
        [N,C,H,W].
        """
        emb = self._embed(noise_labels, class_labels, augment_labels).to(x.dtype)
        # The constant channel takes the place of biases. All that follows keeps the channels last
        # in memory.
        x = F.pad(x, [0, 0, 0, 0, 0, 1], value=1).contiguous(memory_format=torch.channels_last)
        first, *blocks = self.enc.values()
        encoded = [first(x)]
        for block in blocks:
            encoded.append(block(encoded[-1], emb))
        x = encoded[-1]
        for block in self.dec.values():
            if block.joins:
                x = mp_cat(x, encoded.pop(), self.concat_balance)
            x = block(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Precond(Denoiser):
    """EDM preconditioning (arXiv 2206.00364, Table 1) around the EDM2 U-Net: the denoiser D(x;
    sigma, labels).

    `return_logvar=True` also gives the uncertainty u(sigma) [N,1,1,1] of the training loss (Eq.
    15).
    """

    def __init__(self, img_resolution, img_channels, label_dim, use_fp16=True, sigma_data=0.5,
                 logvar_channels=128, precision=None, **unet_kwargs):
        super().__init__(img_resolution, img_channels, label_dim, precision, use_fp16)
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, [])

    def coefficients(self, sigma):
        return edm_coefficients(sigma, self.sigma_data)

    def forward(self, x, sigma, class_labels=None, return_logvar=False, force_fp32=False,
                augment_labels=None):
        D_x = self.precondition(self.unet, x, sigma, class_labels, force_fp32,
                                augment_labels=augment_labels)
        if not return_logvar:
            return D_x
        *_, c_noise = self.coefficients(self.conditions(x, sigma, None)[1])
        return D_x, self.logvar_linear(self.logvar_fourier(c_noise.flatten())).reshape(-1, 1, 1, 1)
