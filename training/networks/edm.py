"""The networks and preconditionings that EDM compares: DDPM++ and NCSN++ (Song et al.), ADM
(Dhariwal and Nichol); VP, VE, iDDPM and EDM (Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models", 2206.00364).

Names and shapes of the state dict are those of the published weights. Shapes: N images, C
channels, H x W pixels.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib import UserError
from training.diffusion.noise import VP, iddpm_levels
from training.networks.layers import (
    Denoiser,
    GroupNorm,
    UNetLayers,
    attention,
    compute_dtype,
    drop_labels,
    dropout,
    edm_coefficients,
    low_pass,
    resample,
    time_features,
)

# -------------------------------------------------------------------------------------------------
# Layers


INITIAL = {
    'xavier_uniform': lambda shape, inputs, outputs: math.sqrt(6 / (inputs + outputs))
    * (2 * torch.rand(shape) - 1),
    'kaiming_uniform': lambda shape, inputs, outputs: math.sqrt(3 / inputs)
    * (2 * torch.rand(shape) - 1),
    'kaiming_normal': lambda shape, inputs, outputs: torch.randn(shape) / math.sqrt(inputs),
}


@dataclasses.dataclass(frozen=True)
class Init:
    """Initial values of a layer: a distribution of INITIAL, and the factors of weight and bias."""

    mode: str = 'kaiming_normal'
    weight: float = 1.0
    bias: float = 0.0

    def parameters(self, weight_shape, fan_in: int, fan_out: int, bias: bool):
        """(weight, bias or None) of a layer whose bias has `weight_shape[0]` entries and the same
        fans.
        """
        draw = INITIAL[self.mode]
        weight = nn.Parameter(draw(weight_shape, fan_in, fan_out) * self.weight)
        if not bias:
            return weight, None
        return weight, nn.Parameter(draw(weight_shape[:1], fan_in, fan_out) * self.bias)


class Linear(nn.Module):
    """x W^T + b with weights cast to the precision of x."""

    def __init__(self, in_features, out_features, bias=True, init=Init()):
        super().__init__()
        self.weight, self.bias = init.parameters([out_features, in_features], in_features,
                                                 out_features, bias)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None
                        else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with zero padding that keeps the size, after a resampling by 2 where `kind`
    (that of a layer of the U-Net) is 'up' or 'down'.

    `kernel=0` resamples only. `fused_resample` (with 'down'): the convolution comes first, padded
    so that the filter then needs no padding.
    """

    def __init__(self, in_channels, out_channels, kernel, kind='', resample_filter=(1, 1),
                 fused_resample=False, init=Init()):
        super().__init__()
        self.kernel = kernel
        self.up = kind == 'up'
        self.fused = fused_resample
        self.weight = self.bias = None
        if kernel:
            shape = [out_channels, in_channels, kernel, kernel]
            self.weight, self.bias = init.parameters(shape, in_channels * kernel**2,
                                                     out_channels * kernel**2, True)
        low, self.box = low_pass(resample_filter)
        self.register_buffer('resample_filter', torch.from_numpy(low) if kind in ('up', 'down')
                             else None)

    def forward(self, x_NCHW):
        if self.resample_filter is not None and not self.fused:
            x_NCHW = resample(x_NCHW, self.resample_filter, self.box, self.up)
        if self.weight is None:
            return x_NCHW
        weight, bias = self.weight.to(x_NCHW.dtype), self.bias.to(x_NCHW.dtype)
        if not self.fused:
            return F.conv2d(x_NCHW, weight, bias, padding=self.kernel // 2)
        pad = (self.resample_filter.shape[-1] - 1) // 2
        x_NCHW = F.conv2d(x_NCHW, weight, padding=self.kernel // 2 + pad)
        x_NCHW = resample(x_NCHW, self.resample_filter, self.box, self.up, pad=False)
        return x_NCHW + bias[:, None, None]


def norm(num_channels: int, eps: float = 1e-5) -> GroupNorm:
    """Normalisation in min(32, C / 4) groups."""
    return GroupNorm(num_channels, min(32, num_channels // 4), eps)


class FourierEmbedding(nn.Module):
    """[cos(2 pi x f), sin(2 pi x f)] with fixed normal frequencies of standard deviation 16."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        self.register_buffer('freqs', torch.randn(num_channels // 2) * scale)

    def forward(self, x):
        x = x.outer(2 * math.pi * self.freqs)
        return torch.cat([x.cos(), x.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention, for all U-Nets of this file.

    `num_heads=0` switches attention off. `adaptive_scale`: the embedding scales and shifts the
    normalised activations (ADM), else it is added to them (DDPM++, NCSN++). `resample_proj`: the
    skip path of a resampling block has a 1x1 convolution even where the channels stay.
    """

    def __init__(self, in_channels, out_channels, emb_channels, kind, num_heads=0, dropout=0.0,
                 skip_scale=1.0, eps=1e-5, resample_filter=(1, 1), resample_proj=False,
                 adaptive_scale=True, init=Init(), init_zero=Init(), init_attn=None):
        super().__init__()
        self.in_channels, self.out_channels, self.num_heads = in_channels, out_channels, num_heads
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        resampling = dict(kind=kind, resample_filter=resample_filter, init=init)

        self.norm0 = norm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resampling)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = norm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_zero)
        self.skip = None
        if in_channels != out_channels or kind in ('up', 'down'):
            kernel = int(resample_proj or in_channels != out_channels)
            self.skip = Conv2d(in_channels, out_channels, kernel, **resampling)
        if num_heads:
            self.norm2 = norm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_zero)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + params))
        h = self.conv1(dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            y = attention(self.qkv(self.norm2(x)), self.num_heads, 'hcq')
            x = (self.proj(y) + x) * self.skip_scale
        return x


# -------------------------------------------------------------------------------------------------
# U-Nets. All are called as model(x [N,C,H,W], noise_labels [N], class_labels [N or 1, label_dim]
# or None, augment_labels [N, augment_dim] or None) and return [N, out_channels, H, W].


def check_skip_connections(skip_connections, count: int) -> list[bool]:
    """The pattern as booleans, `count` of them; all True if it is None. Raises UserError for
    another length.
    """
    if skip_connections is None:
        return [True] * count
    if len(skip_connections) != count or any(value not in (0, 1) for value in skip_connections):
        raise UserError(f'needs {count} entries of 0 or 1 for this network '
                        '((num_blocks + 1) x number of resolutions), '
                        f'got {list(skip_connections)}', field='skip_connections')
    return [bool(value) for value in skip_connections]


class _UNet(nn.Module):
    """The way through a U-Net of this file; subclasses make `enc`, `dec` and the layers of
    `embed`.

    `skip_connections`: one 0 or 1 for each encoder layer (first convolution, blocks of level 0,
    down of level 1, blocks of level 1, ...); where 0 the decoder gets zeros instead of the
    activation.
    """

    def __init__(self, skip_connections, num_layers, label_dropout):
        super().__init__()
        self.keep_skip = check_skip_connections(skip_connections, num_layers)
        self.label_dropout = label_dropout

    def embed(self, noise_labels, class_labels, augment_labels):
        """Embedding [N or 1, emb_channels] of the conditions."""
        raise NotImplementedError

    def encode(self, x, emb) -> list[torch.Tensor]:
        """Activations for the decoder, in order, zeros where a skip connection is off; last the
        encoder's output.
        """
        skips, aux = [], x
        for name, block in self.enc.items():
            if 'aux_down' in name:
                aux = block(aux)
            elif 'aux' in name:
                # The sum takes the place of the activation just stored, unless that is off.
                x = x + block(aux)
                if 'aux_residual' in name:
                    x = aux = x / math.sqrt(2)
                if self.keep_skip[len(skips) - 1]:
                    skips[-1] = x
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x if self.keep_skip[len(skips)] else torch.zeros_like(x))
        return [*skips, x]

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.embed(noise_labels, class_labels, augment_labels)
        *skips, x = self.encode(x, emb)
        out = None
        for name, block in self.dec.items():
            if 'aux_up' in name:
                out = block(out)
            elif 'aux_norm' in name:
                h = F.silu(block(x))
            elif 'aux_conv' in name:
                out = block(h) if out is None else out + block(h)
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb)
        return x if out is None else out


class SongUNet(_UNet):
    """DDPM++ (positional embedding, standard encoder, box filter) and NCSN++ (Fourier embedding,
    residual encoder, [1,3,3,1] filter) of Song et al., "Score-Based Generative Modeling through
    Stochastic Differential Equations".
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.10, label_dropout=0.0,
                 embedding_type='positional', channel_mult_noise=1, encoder_type='standard',
                 decoder_type='standard', resample_filter=(1, 1), skip_connections=None):
        super().__init__(skip_connections, (num_blocks + 1) * len(channel_mult), label_dropout)
        for name, value, choices in [('embedding_type', embedding_type, ['positional', 'fourier']),
                                     ('encoder_type', encoder_type,
                                      ['standard', 'skip', 'residual']),
                                     ('decoder_type', decoder_type, ['standard', 'skip'])]:
            if value not in choices:
                raise ValueError(f'{name} {value!r} is unknown; choose {" or ".join(choices)}')
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        xavier = 'xavier_uniform'
        init, zero, attn = Init(xavier), Init(xavier, 1e-5), Init(xavier, math.sqrt(0.2))
        resampling = dict(resample_filter=resample_filter, init=init)

        # Embedding of noise level, class and augmentation.
        self.noise_channels = noise_channels
        self.map_noise = FourierEmbedding(noise_channels) if embedding_type == 'fourier' else None
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init)
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        def block(c_in, c_out, kind, attention):
            return UNetBlock(c_in, c_out, emb_channels, kind, int(attention), dropout,
                             math.sqrt(0.5), eps=1e-6, resample_proj=True, adaptive_scale=False,
                             init_zero=zero, init_attn=attn, **resampling)

        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        widths = [model_channels * mult for mult in channel_mult]
        layers = UNetLayers(img_resolution, model_channels, widths, num_blocks, attn_resolutions)
        aux = in_channels
        for name, kind, attend, c_in, c_out in layers.encoder():
            if kind == 'conv':
                self.enc[name] = Conv2d(in_channels, c_out, 3, init=init)
                continue
            self.enc[name] = block(c_in, c_out, kind, attend)
            size = name.removesuffix(kind)
            if kind == 'down' and encoder_type == 'skip':
                self.enc[size + 'aux_down'] = Conv2d(aux, aux, 0, kind, **resampling)
                self.enc[size + 'aux_skip'] = Conv2d(aux, c_out, 1, init=init)
            if kind == 'down' and encoder_type == 'residual':
                self.enc[size + 'aux_residual'] = Conv2d(aux, c_out, 3, kind, fused_resample=True,
                                                         **resampling)
                aux = c_out
        for name, kind, attend, c_in, c_out in layers.decoder():
            last = kind == f'block{num_blocks}'
            self.dec[name] = block(c_in, c_out, kind, attend and (last or kind == 'in0'))
            size = name.removesuffix(kind)
            if last and (decoder_type == 'skip' or not layers.skips):
                if decoder_type == 'skip' and f'{size}up' in self.dec:
                    self.dec[size + 'aux_up'] = Conv2d(out_channels, out_channels, 0, 'up',
                                                       **resampling)
                self.dec[size + 'aux_norm'] = norm(c_out, eps=1e-6)
                self.dec[size + 'aux_conv'] = Conv2d(c_out, out_channels, 3, init=zero)

    def embed(self, noise_labels, class_labels, augment_labels):
        if self.map_noise is None:
            emb = time_features(noise_labels, self.noise_channels, endpoint=True)
        else:
            emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)  # [sin, cos]
        if self.map_label is not None:
            class_labels = drop_labels(class_labels, self.label_dropout, self.training)
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(_UNet):
    """ADM of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", with 64
    channels per head.
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3,
                 attn_resolutions=(32, 16, 8), dropout=0.10, label_dropout=0.0,
                 skip_connections=None):
        super().__init__(skip_connections, (num_blocks + 1) * len(channel_mult), label_dropout)
        emb_channels = model_channels * channel_mult_emb
        init = Init('kaiming_uniform', math.sqrt(1 / 3), math.sqrt(1 / 3))
        zero = Init('kaiming_uniform', 0, 0)

        def layer(kind, attention, c_in, c_out):
            if kind == 'conv':
                return Conv2d(in_channels, c_out, 3, init=init)
            return UNetBlock(c_in, c_out, emb_channels, kind, c_out // 64 if attention else 0,
                             dropout, init=init, init_zero=zero)

        self.noise_channels = model_channels
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, model_channels, bias=False, init=zero)
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(label_dim, emb_channels, bias=False,
                                    init=Init('kaiming_normal', math.sqrt(label_dim)))

        widths = [model_channels * mult for mult in channel_mult]
        layers = UNetLayers(img_resolution, widths[0], widths, num_blocks, attn_resolutions)
        self.enc = nn.ModuleDict({name: layer(*rest) for name, *rest in layers.encoder()})
        self.dec = nn.ModuleDict({name: layer(*rest) for name, *rest in layers.decoder()})
        self.out_norm = norm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, 3, init=zero)

    def embed(self, noise_labels, class_labels, augment_labels):
        emb = time_features(noise_labels, self.noise_channels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            class_labels = drop_labels(class_labels, self.label_dropout, self.training)
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        x = super().forward(x, noise_labels, class_labels, augment_labels)
        return self.out_conv(F.silu(self.out_norm(x)))


MODELS = {'SongUNet': SongUNet, 'DhariwalUNet': DhariwalUNet}

# -------------------------------------------------------------------------------------------------
# Preconditionings: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), table 1 of the paper.


class Precond(Denoiser):
    """What the four preconditionings share; subclasses define `coefficients(sigma)` and the range
    of sigma.

    Called as net(x [N,C,H,W], sigma [N] or a single value, class_labels [N, label_dim] or None,
    augment_labels=...), it returns the denoised images [N,C,H,W] in float32. Labels None in a
    conditional network mean "no label". `model_type` None is the published one.
    """

    default_model = 'SongUNet'

    def __init__(self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0.0,
                 sigma_max=math.inf, model_type=None, out_channels=None, precision=None,
                 **model_kwargs):
        super().__init__(img_resolution, img_channels, label_dim, precision, use_fp16)
        model_type = model_type or self.default_model
        if model_type not in MODELS:
            raise ValueError(f'model_type {model_type!r} is unknown; choose {" or ".join(MODELS)}')
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.model = MODELS[model_type](img_resolution=img_resolution, in_channels=img_channels,
                                        out_channels=out_channels or img_channels,
                                        label_dim=label_dim, **model_kwargs)

    def coefficients(self, sigma):
        """(c_skip, c_out, c_in, c_noise) at `sigma` [N,1,1,1]."""
        raise NotImplementedError

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        x, sigma, class_labels = self.conditions(x, sigma, class_labels)
        dtype = torch.float32 if force_fp32 else compute_dtype(self.precision, x.device)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        F_x = self.model((c_in * x).to(dtype), c_noise.flatten(), class_labels=class_labels,
                         **model_kwargs)
        return c_skip * x + c_out * F_x[:, :self.img_channels].float()


class VPPrecond(Precond, VP):
    """Variance preserving: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    def __init__(self, *args, beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5, **kwargs):
        super().__init__(*args, **kwargs)
        VP.__init__(self, beta_d, beta_min)
        self.M = M
        # The range is computed on the CPU, wherever the network is being built.
        ends = self.sigma(torch.tensor([epsilon_t, 1], dtype=torch.float32, device='cpu'))
        self.sigma_min, self.sigma_max = ends.tolist()

    sigma_inv = VP.inverse                      # the published name

    def coefficients(self, sigma):
        return 1, -sigma, 1 / (sigma.square() + 1).sqrt(), (self.M - 1) * self.inverse(sigma)


class VEPrecond(Precond):
    """Variance exploding."""

    def __init__(self, *args, sigma_min=0.02, sigma_max=100, **kwargs):
        super().__init__(*args, sigma_min=sigma_min, sigma_max=sigma_max, **kwargs)

    def coefficients(self, sigma):
        return 1, sigma, 1, (sigma / 2).log()


class iDDPMPrecond(Precond):
    """Improved DDPM: a table of noise levels; the network also predicts a variance, which is not
    used here.
    """

    default_model = 'DhariwalUNet'

    def __init__(self, img_resolution, img_channels, C_1=0.001, C_2=0.008, M=1000, **kwargs):
        super().__init__(img_resolution, img_channels, out_channels=img_channels * 2, **kwargs)
        self.M = M
        with torch.device('cpu'):  # wherever the network is being built
            self.register_buffer('u', iddpm_levels(M, C_1, C_2))
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def round_sigma(self, sigma, return_index: bool = False):
        """The nearest level (the first of equals), or its index in `u` (int64)."""
        sigma = torch.as_tensor(sigma)
        flat = sigma.to(self.u.device, torch.float32).reshape(-1, 1)
        index = (flat - self.u).abs().argmin(dim=1).reshape(sigma.shape)
        return index if return_index else self.u[index].to(sigma.dtype)

    def coefficients(self, sigma):
        c_noise = self.M - 1 - self.round_sigma(sigma, return_index=True).to(torch.float32)
        return 1, -sigma, 1 / (sigma.square() + 1).sqrt(), c_noise


class EDMPrecond(Precond):
    """Karras et al.: unit variance of network input and training target at every noise level."""

    default_model = 'DhariwalUNet'

    def __init__(self, *args, sigma_data=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.sigma_data = sigma_data

    def coefficients(self, sigma):
        return edm_coefficients(sigma, self.sigma_data)


class FlowPrecond(Precond):
    """Flow matching: the model is the velocity v of x_t = (1 - t) x_0 + t z at
    t = sigma / (1 + sigma).

    D(x; sigma) = x_t - t v(x_t; t) with x_t = x / (1 + sigma). Levels are those of t from
    `epsilon_t` to 1 - `epsilon_t`.
    """

    def __init__(self, *args, epsilon_t=1e-3, **kwargs):
        levels = dict(sigma_min=epsilon_t / (1 - epsilon_t), sigma_max=(1 - epsilon_t) / epsilon_t)
        super().__init__(*args, **levels | kwargs)

    def coefficients(self, sigma):
        scale = 1 / (1 + sigma)
        return scale, -sigma * scale, scale, sigma.log() / 4


PRECONDITIONINGS = ('VPPrecond', 'VEPrecond', 'iDDPMPrecond', 'EDMPrecond', 'FlowPrecond')
