"""What several architectures share: preconditioning, precision, dropout, attention, normalisation,
resampling, the order of a U-Net.

Masks of dropout depend on the training image, not on how the batch is split over processes. The
loss opens `torch_utils.random.drawing_from(batch['random'])` around the forward pass; `dropout`
and `drop_labels` inside then draw from it, one row for each image. Outside of it they use torch's
global generator, like torch's own dropout.

Shapes: N images, C channels, H x W pixels, E numbers of an embedding.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dnnlib import UserError
from torch_utils.random import GlobalRandom, network_random

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16,
          'tf32': torch.float32}


def sides(resolution) -> tuple[int, int]:
    """(height, width) of images of a resolution: one number for squares, else these two."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return height, width


class Network(nn.Module):
    """What all networks of images share: resolution (see `sides`), channels, labels and precision.

    `precision` is 'fp32', 'fp16' (on GPUs; float32 on the CPU) or 'bf16'; `use_fp16` is the
    published name for the first two.
    """

    def __init__(self, img_resolution: int | list[int], img_channels: int, label_dim: int,
                 precision=None, use_fp16=False):
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.precision = precision or ('fp16' if use_fp16 else 'fp32')

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.img_channels, *sides(self.img_resolution)

    def activations(self, x, force_fp32=False):
        """x in the type and the memory order of the activations: float16 is for GPUs only, the
        CPU computes such networks in float32. On a CPU the channels are the last in memory, in
        which order convolutions are fastest, unless there is a backward pass, or bfloat16, whose
        norms lose as much as the convolutions gain.
        """
        on_cpu = x.device.type == 'cpu'
        exact = force_fp32 or self.precision == 'fp16' and on_cpu
        last = on_cpu and not torch.is_grad_enabled() and (exact or self.precision == 'fp32')
        layout = torch.channels_last if last else torch.contiguous_format
        return x.to(DTYPES['fp32' if exact else self.precision], memory_format=layout)


class Denoiser(Network):
    """What denoisers D(x; sigma, labels) share; these are continuous in the noise level, from 0 to
    any.
    """

    sigma_min, sigma_max = 0.0, math.inf

    def round_sigma(self, sigma):
        """The nearest noise level that the network knows."""
        return torch.as_tensor(sigma)

    def conditions(self, x_NCHW, sigma, labels):
        """x in float32, sigma [N or 1, 1, 1, 1], labels [N or 1, label_dim]: zeros ("no label") if
        None. The labels of an unconditional network are None.
        """
        x_NCHW = x_NCHW.float()
        if not isinstance(sigma, torch.Tensor):  # a copy of the number would wait for the GPU
            sigma = torch.full([1], sigma, device=x_NCHW.device)
        sigma = sigma.to(x_NCHW.device).float().reshape(-1, 1, 1, 1)
        if not self.label_dim:
            return x_NCHW, sigma, None
        if labels is None:
            labels = torch.zeros([1, self.label_dim], device=x_NCHW.device)
        return x_NCHW, sigma, labels.float().reshape(-1, self.label_dim)

    def precondition(self, network, x_NCHW, sigma, labels, force_fp32=False, **kwargs):
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) of the network F in float32 (arXiv
        2206.00364, Eq. 7); `force_fp32`: F is too. Of more channels than images have, the first
        count. `coefficients(sigma [N or 1, 1, 1, 1])` of subclasses are (c_skip, c_out, c_in,
        c_noise).
        """
        x_NCHW, sigma, labels = self.conditions(x_NCHW, sigma, labels)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        scaled = self.activations(c_in * x_NCHW, force_fp32)
        F_x = network(scaled, c_noise.flatten(), labels, **kwargs)
        F_x = F_x[:, :self.img_channels].float().contiguous()
        return torch.addcmul(c_skip * x_NCHW, c_out, F_x)


def noise_coefficients(sigma, c_noise):
    """The coefficients of networks that predict the noise in x / sqrt(1 + sigma^2)."""
    return 1, -sigma, 1 / (1 + sigma**2).sqrt(), c_noise


def edm_coefficients(sigma, sigma_data: float):
    """(c_skip, c_out, c_in, c_noise) with which network input and training target have unit
    variance at every noise level (arXiv 2206.00364, Table 1).
    """
    variance = sigma**2 + sigma_data**2
    total = variance.sqrt()
    return sigma_data**2 / variance, sigma * sigma_data / total, 1 / total, sigma.log() / 4


# --- Dropout -------------------------------------------------------------------------------------


def _keep(shape, p: float, device):
    """1 with probability 1 - p, else 0; float32."""
    random = network_random() or GlobalRandom(device)
    return random.rand(shape, device=device).ge_(p)


def dropout(x, p: float, training: bool):
    """Zeroes elements of x [N, ...] with probability p and divides the others by 1 - p, in
    training only.
    """
    if not training or p == 0:
        return x
    mask = _keep(x.shape, p, x.device).div_(1 - p)
    return x * torch.empty_like(x).copy_(mask)


def drop_labels(labels, p: float, training: bool):
    """Sets whole rows of labels [N, label_dim] to zero ("no label") with probability p, in
    training only. None stays None.
    """
    if labels is None or not training or p == 0:
        return labels
    return labels * _keep([len(labels), 1], p, labels.device)


# --- Layers: weights stay in float32 and are cast to the type of the activations -----------------


def parameters(layer, dtype, gain=1):
    """(weight, bias or None) of a layer times `gain` in `dtype`."""
    both = layer.weight, layer.bias
    if gain != 1:
        both = (None if tensor is None else tensor * gain for tensor in both)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in both)


# Numbers of an activation from which fewer passes over it are worth more operations.
LARGE = 1 << 17


def channels_last(x) -> bool:
    """Whether the channels of x are the last in memory, on a CPU."""
    return x.device.type == 'cpu' and x.is_contiguous(memory_format=torch.channels_last)


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, *parameters(self, x.dtype))


class Conv2d(nn.Conv2d):
    def forward(self, x, gain=1):
        return self._conv_forward(x, *parameters(self, x.dtype, gain))


class Conv1d(nn.Conv1d):
    """A convolution of single pixels whose weight has one axis less in the state."""

    def forward(self, x_NCHW):
        weight, bias = parameters(self, x_NCHW.dtype)
        return F.conv2d(x_NCHW, weight[..., None], bias)


# Which rows of a 3x3 kernel fall on the two pixels that an even, and an odd, row of an enlarged
# image sees, and the same of rows and columns: [9, 16].
HALVES = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
QUARTERS = torch.einsum('aip,bjq->pqabij', HALVES, HALVES).reshape(9, 16)


def enlarged_conv(x_NCHW, weight, bias=None):
    """conv2d of x [N,C,H,W] with each pixel repeated to 2x2 and a 3x3 kernel, padded to its size:
    [N,O,2H,2W].

    Repeated pixels see the sum of their weights. So each of the four positions within the 2x2 is a
    convolution of x itself with a 2x2 kernel, and all need 16 products instead of 36.
    """
    if x_NCHW.device.type != 'cpu' or x_NCHW.numel() < LARGE:
        return F.conv2d(F.interpolate(x_NCHW, scale_factor=2), weight, bias, padding=1)
    _, C, H, W = x_NCHW.shape
    weights = weight.reshape(-1, 9) @ QUARTERS.to(weight)
    weights = weights.view(-1, C, 4, 2, 2).unbind(2)
    padded = F.pad(x_NCHW, [1] * 4)
    channels, column = (3, 3) if channels_last(x_NCHW) else (1, 4)
    rows = []
    for a in range(2):
        parts = [F.conv2d(padded[:, :, a:a + H + 1, b:b + W + 1], weights[2 * a + b], bias)
                 for b in range(2)]
        rows.append(torch.stack([part.movedim(1, channels) for part in parts], column))
    y = torch.stack(rows, column - 1)                   # [N, H, 2, W, 2, O] or [N, O, H, 2, W, 2]
    return y.flatten(column, column + 1).flatten(column - 2, column - 1).movedim(channels, 1)


class StridedConv(nn.Module):
    """Twice the resolution (`up`: nearest neighbour, then a convolution), or half of it (a
    convolution with stride 2). `name` is that of the convolution in the state. Called like a
    residual block, with an embedding that it does not need.
    """

    def __init__(self, channels: int, name: str, up: bool):
        super().__init__()
        self.up = up
        self.add_module(name, Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1))

    def forward(self, x_NCHW, emb=None):
        (conv,) = self.children()
        return enlarged_conv(x_NCHW, *parameters(conv, x_NCHW.dtype)) if self.up else conv(x_NCHW)


class GroupNorm(nn.GroupNorm):
    """Normalisation of x [N, C, ...] over groups of channels. Raises UserError where they do not
    divide the channels.
    """

    def __init__(self, num_channels: int, num_groups: int = 32, eps: float = 1e-5):
        if num_groups < 1 or num_channels % num_groups:
            raise UserError(f'{num_channels} channels cannot be normalised in {num_groups} '
                            'groups; choose a multiple of 32', field='num_channels')
        super().__init__(num_groups, num_channels, eps)

    def forward(self, x_NCHW, silu=False, added=None, scale=None, shift=None):
        """`silu`: SiLU of the result; `added` [N or 1, C] to x, before; `scale` and `shift` [N or
        1, C]: of what is normalised, which becomes y (1 + scale) + shift.
        """
        dtype = x_NCHW.dtype
        if (channels_last(x_NCHW) and x_NCHW.numel() >= LARGE and dtype == torch.float32
                and not torch.is_grad_enabled()):
            weight, bias = self.weight, self.bias
            if scale is not None:
                weight, bias = weight * (scale + 1), torch.addcmul(shift, bias, scale + 1)
            y = _normalized(x_NCHW, added, weight, bias, self.num_groups, self.eps)
            return F.silu(y, inplace=True) if silu else y
        if added is not None:
            x_NCHW = x_NCHW + added[:, :, None, None].to(dtype)
        y = F.group_norm(x_NCHW, self.num_groups, *parameters(self, dtype), self.eps)
        if scale is not None:
            scale, shift = (v[:, :, None, None].to(dtype) for v in (scale, shift))
            y = torch.addcmul(shift, y, scale + 1)
        return F.silu(y) if silu else y


def _normalized(x_NCHW, added, weight, bias, groups: int, eps: float):
    """a x + b with a = r w and b = c + a (e - m): mean m and standard deviation 1 / r of x + e
    over the channels and pixels of a group, weight w and bias c [C] or [N or 1, C], `added` e [N
    or 1, C] or None. The channels are last in memory, so sums over pixels are fast.
    """
    N, C, H, W = x_NCHW.shape
    x_NPC = x_NCHW.permute(0, 2, 3, 1).reshape(N, H * W, C)
    e = 0 if added is None else added.reshape(len(added), groups, -1)
    w, c = (v.reshape(-1, groups, C // groups) for v in (weight, bias))
    mean, square = (y.sum(1).view(N, groups, -1) / (H * W) for y in (x_NPC, x_NPC.square()))
    m = (mean + e).mean(2, keepdim=True)
    variance = (square + e * (2 * mean + e)).mean(2, keepdim=True) - m.square()
    a = variance.clamp_(min=0).add_(eps).rsqrt_() * w
    b = torch.addcmul(c, e - m, a)
    y_NPC = torch.addcmul(b.view(N, 1, C), x_NPC, a.view(N, 1, C))
    return y_NPC.view(N, H, W, C).permute(0, 3, 1, 2)


def time_features(t_N, width: int, endpoint: bool = False) -> torch.Tensor:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / (E/2)), i = 0 .. E/2 - 1, in float32; [N] -> [N,
    E].

    `endpoint`: the last frequency is 1/10000 exactly.
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t_N.device)
    angles = t_N.float().outer((1 / 10000) ** (i / (half - endpoint)))
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), [0, width % 2])


def embed_labels(embedding: nn.Embedding, labels: torch.Tensor) -> torch.Tensor:
    """Embedding of class numbers [N], or of label vectors [N, classes] where zeros mean "no
    label"; [N, E].
    """
    return labels @ embedding.weight if labels.is_floating_point() else embedding(labels)


class _Unbind(torch.autograd.Function):
    """x.unbind(dim), whose gradients are written to where x has them in memory; torch stacks them
    in the order of `dim` and the shape, and they would be moved once more.
    """

    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim, ctx.shape, ctx.strides = dim, x.shape, x.stride()
        return x.unbind(dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grad = torch.empty_strided(ctx.shape, ctx.strides, dtype=grads[0].dtype,
                                   device=grads[0].device)
        for part, values in zip(grad.unbind(ctx.dim), grads, strict=True):
            part.copy_(values)
        return grad, None


def unbind(x, dim: int):
    """The parts of x along `dim`."""
    return x.unbind(dim) if torch.compiler.is_compiling() else _Unbind.apply(x, dim)


def attention(x_NCHW, layers: list, num_heads: int, order: str) -> torch.Tensor:
    """Self-attention over the pixels of x [N,C,H,W], whose queries, keys and values the
    convolutions `layers` make together.

    `order` is how their 3C channels are numbered, the slowest index first: q (query, key, value),
    h (head) and c (channel of a head).
    """
    N, C, H, W = x_NCHW.shape
    sizes = {'q': 3, 'h': num_heads, 'c': C // num_heads}
    weight, bias = (torch.cat(both) for both in zip(
        *(parameters(layer, x_NCHW.dtype) for layer in layers), strict=True))
    # Side by side, so that with the channels last in memory no activation has to be moved.
    weight, bias = (
        tensor.reshape(*(sizes[name] for name in order), -1).permute(
            *map(order.index, 'qhc'), 3).reshape(3 * C, -1) for tensor in (weight, bias))
    qkv = F.conv2d(x_NCHW, weight[..., None, None], bias.flatten())
    qkv = qkv.reshape(N, 3, num_heads, -1, H * W).transpose(3, 4)
    q, k, v = unbind(qkv if channels_last(x_NCHW) else qkv.contiguous(), 1)
    y = F.scaled_dot_product_attention(q, k, v)         # [N, heads, pixels, channels of a head]
    return y.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Resolution times 2 (`kind` 'up') or 1/2 ('down') with the separable low-pass filter of these
    taps, depthwise; `stored`: the filter belongs to the state. Raises ValueError unless the taps
    are an even number.
    """

    def __init__(self, kind: str, taps, stored: bool = True):
        super().__init__()
        taps = np.float32(taps)
        if taps.ndim != 1 or len(taps) % 2:
            raise ValueError(f'resample_filter must be a list of even length, not {taps.tolist()}')
        taps = taps / taps.sum()
        self.up, self.box = kind == 'up', taps.tolist() == [0.5, 0.5]
        kernel = np.outer(taps, taps)[None, None]
        if stored:
            self.register_buffer('resample_filter', torch.from_numpy(kernel))
        else:   # no buffer either: readers of published files compare those with the file
            self.resample_filter = torch.from_numpy(kernel)

    def forward(self, x_NCHW, pad=True):
        """`pad=False`: the images are padded already."""
        if self.box:                                    # what repetition and pooling do, faster
            return F.interpolate(x_NCHW, scale_factor=2) if self.up else F.avg_pool2d(x_NCHW, 2)
        C = x_NCHW.shape[1]
        kernel = self.resample_filter.to(x_NCHW).expand(C, 1, -1, -1)
        options = dict(groups=C, stride=2, padding=(kernel.shape[-1] - 1) // 2 if pad else 0)
        if self.up:
            return F.conv_transpose2d(x_NCHW, 4 * kernel, **options)
        return F.conv2d(x_NCHW, kernel, **options)


class ResampleConv(Resample):
    """A resampling by 2, then the convolution `layer`. `fused` (with 'down'): the convolution
    comes first, padded so that the filter then needs no padding.
    """

    def __init__(self, layer: Conv2d, kind: str, taps, stored=True, fused=False):
        super().__init__(kind, taps, stored)
        self.weight, self.bias, self.fused = layer.weight, layer.bias, fused

    def forward(self, x_NCHW, gain=1):
        weight, bias = parameters(self, x_NCHW.dtype, gain)
        padding = weight.shape[-1] // 2
        if not self.fused:
            if self.up and self.box and padding == 1:
                return enlarged_conv(x_NCHW, weight, bias)
            if self.up and self.box and padding == 0:       # of fewer pixels, with the same result
                return super().forward(F.conv2d(x_NCHW, weight, bias))
            return F.conv2d(super().forward(x_NCHW), weight, bias, padding=padding)
        padding += (self.resample_filter.shape[-1] - 1) // 2
        x_NCHW = F.conv2d(x_NCHW, weight, padding=padding)
        return super().forward(x_NCHW, pad=False) + bias[:, None, None]


def initialized(layer, gain: float | None):
    """`layer` with weights ~ U(-a, a), a = gain sqrt(6 / (inputs + outputs)), and biases of zero;
    `gain` None: as torch makes both, ~ U(-b, b), b = 1 / sqrt(inputs).
    """
    if gain is not None:
        outputs, inputs = layer.weight.shape[:2]
        with torch.no_grad():
            layer.weight *= gain * math.sqrt(6 * inputs / (inputs + outputs))
            if layer.bias is not None:
                layer.bias.zero_()
    return layer


def linear(inputs: int, outputs: int, gain=None, bias=True) -> Linear:
    return initialized(Linear(inputs, outputs, bias), gain)


def conv(inputs: int, outputs: int, kernel: int, gain=None, *resampling) -> nn.Module:
    """Convolution with zero padding that keeps the size; with `resampling`, the arguments of
    `ResampleConv`, one that halves or doubles it.
    """
    layer = initialized(Conv2d(inputs, outputs, kernel, padding=kernel // 2), gain)
    return ResampleConv(layer, *resampling) if resampling else layer


class ResidualBlock(nn.Module):
    """Residual block that the embedding of the conditions modulates, of DDPM and ADM.

    The embedding, which is activated already, is added to the normalised activations or, if
    `adaptive`, scales and shifts them. `resampling` are the arguments of `Resample`, or none.
    `gain` and `gain_last` are those of the initial values, and of the last layer; with
    `resample_proj` the skip path of a resampling block has a convolution even where the channels
    stay. `names` are those of the layers in the state.
    """

    gain, gain_last, skip_scale, resample_proj = None, 0, 1, False
    norm = GroupNorm

    def __init__(self, in_channels, out_channels, emb_channels, dropout, adaptive, *resampling):
        super().__init__()
        self.in_channels, self.p, self.adaptive = in_channels, dropout, adaptive
        norm0 = self.norm(in_channels)
        conv0 = conv(in_channels, out_channels, 3, self.gain, *resampling)
        affine = linear(emb_channels, out_channels * (1 + adaptive), self.gain)
        norm1 = self.norm(out_channels)
        conv1 = conv(out_channels, out_channels, 3, self.gain_last)
        skip = nn.Identity()
        if resampling and not self.resample_proj:
            skip = Resample(*resampling)
        elif resampling or in_channels != out_channels:
            skip = conv(in_channels, out_channels, 1, self.gain, *resampling)
        self.layers = norm0, conv0, affine, norm1, conv1, skip
        self.register(*self.layers)

    def register(self, *layers):
        for name, layer in zip(self.names, layers, strict=True):
            self.add_module(name, layer)

    def drop(self, h_NCHW):
        return dropout(h_NCHW, self.p, self.training)

    def forward(self, x_NCHW, emb_NE, drop=None):
        norm0, conv0, affine, norm1, conv1, skip = self.layers
        h = conv0(norm0(x_NCHW, silu=True))
        emb_NE = affine(emb_NE)
        if self.adaptive:
            scale, shift = emb_NE.chunk(2, dim=1)
            h = norm1(h, silu=True, scale=scale, shift=shift)
        else:
            h = norm1(h, silu=True, added=emb_NE)
        # The scale goes into the weights, which are fewer.
        h = conv1((drop or self.drop)(h), self.skip_scale)
        if isinstance(skip, Conv2d | ResampleConv):
            return h.add_(skip(x_NCHW, self.skip_scale))
        return h.add_(skip(x_NCHW), alpha=self.skip_scale)


# --- The order of a U-Net ------------------------------------------------------------------------


def unet_layers(img_resolution: int | list[int], channels: int, widths: list, num_blocks: int,
                attn_resolutions) -> tuple[list, list]:
    """The layers of encoder and decoder in order, each (name such as `16x16_block0`, kind,
    attention, channels in, channels out).

    Level 0 has the full resolution and `widths[0]` channels, each further one half of it; the
    first convolution has `channels`. Blocks have attention at `attn_resolutions`, where images are
    no squares at the levels whose shorter side is among these. Kinds are conv,
    block0, ..., down, block0, ... and in0, in1, block0, ..., up, block0, ...: each block of the
    decoder also takes the last of the encoder's outputs that is left. Raises UserError for images
    that cannot be halved so often.
    """
    factor = 1 << len(widths) - 1
    height, width = sides(img_resolution)
    if height % factor or width % factor:
        near = [max(round(side / factor), 1) * factor for side in (width, height)]
        pixels = [8 * side for side in near]
        raise UserError(f'images of {width}x{height} pixels do not suit a network of '
                        f'{len(widths)} resolutions; make the data set with one that is a '
                        f'multiple of {factor}, e.g. {near[0]}x{near[1]} '
                        f'(for latents {pixels[0]}x{pixels[1]})', 'img_resolution')
    encoder, decoder = [], []

    def add(layers, kind, level, c_out, skip=0):
        nonlocal channels
        rows, columns = height >> level, width >> level
        attention = kind == 'in0' or ('block' in kind and min(rows, columns) in attn_resolutions)
        layers.append((f'{rows}x{columns}_{kind}', kind, attention, channels + skip, c_out))
        channels = c_out

    for level, c_out in enumerate(widths):
        add(encoder, 'down' if level else 'conv', level, channels)
        for index in range(num_blocks):
            add(encoder, f'block{index}', level, c_out)
    skips = [c_out for *_, c_out in encoder]
    for kind in ('in0', 'in1'):
        add(decoder, kind, level, channels)
    for level, c_out in reversed([*enumerate(widths)]):
        if level + 1 < len(widths):
            add(decoder, 'up', level, channels)
        for index in range(num_blocks + 1):
            add(decoder, f'block{index}', level, c_out, skips.pop())
    return encoder, decoder
