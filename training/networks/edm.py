"""The networks and preconditionings that EDM compares: DDPM++ and NCSN++ (Song et al.), ADM
(Dhariwal and Nichol); VP, VE, iDDPM and EDM (Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models", 2206.00364).

Names and shapes of the state dict are those of the published weights. Shapes: N images, C
channels, H x W pixels.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib import UserError
from training.diffusion.noise import VP, iddpm_levels
from training.networks.layers import (
    Denoiser,
    GroupNorm,
    Linear,
    Resample,
    ResidualBlock,
    attention,
    conv,
    drop_labels,
    edm_coefficients,
    linear,
    noise_coefficients,
    time_features,
    unet_layers,
)

# -------------------------------------------------------------------------------------------------
# Layers


def norm(num_channels: int, eps: float = 1e-5) -> GroupNorm:
    """Normalisation in min(32, C / 4) groups."""
    return GroupNorm(num_channels, min(32, num_channels // 4), eps)


class FourierEmbedding(nn.Module):
    """[cos(2 pi x f), sin(2 pi x f)] with fixed normal frequencies of standard deviation 16."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        self.register_buffer('freqs', torch.randn(num_channels // 2) * scale)

    def forward(self, x):
        angles = x[:, None] * (math.tau * self.freqs)
        return torch.stack([angles.cos(), angles.sin()], dim=1).flatten(1)


class UNetBlock(ResidualBlock):
    """Residual block of DDPM++ and NCSN++ with optional resampling and self-attention of one
    head.
    """

    gain, gain_last, gain_attention = 1, 1e-5, math.sqrt(0.2)
    eps, skip_scale, resample_proj = 1e-6, math.sqrt(0.5), True
    adaptive = False
    names = ('norm0', 'conv0', 'affine', 'norm1', 'conv1', 'skip')

    def __init__(self, in_channels, out_channels, emb_channels, kind, attention, dropout,
                 taps=(1, 1)):
        super().__init__(in_channels, out_channels, emb_channels, dropout, self.adaptive,
                         *((kind, taps) if kind in ('up', 'down') else ()))
        self.num_heads = attention * (out_channels // 64 if self.adaptive else 1)
        if self.num_heads:
            self.norm2 = self.norm(out_channels)
            self.qkv = conv(out_channels, out_channels * 3, 1, self.gain_attention)
            self.proj = conv(out_channels, out_channels, 1, self.gain_last)

    def norm(self, channels):
        return norm(channels, self.eps)

    def forward(self, x, emb):
        x = super().forward(x, emb)
        if self.num_heads:
            y = attention(self.norm2(x), [self.qkv], self.num_heads, 'hcq')
            x = self.proj(y, self.skip_scale).add_(x, alpha=self.skip_scale)
        return x


class ADMBlock(UNetBlock):
    """Residual block of ADM: heads of 64 channels, none where there are fewer."""

    gain, gain_last, gain_attention = None, 0, None
    eps, skip_scale, resample_proj = 1e-5, 1, False
    adaptive = True


# -------------------------------------------------------------------------------------------------
# U-Nets. All are called as model(x [N,C,H,W], noise_labels [N], class_labels [N or 1, label_dim]
# or None, augment_labels [N, augment_dim] or None) and return [N, out_channels, H, W].


def _check(**choices):
    """Raises ValueError unless each value, {name: (value, possible ones)}, is possible."""
    for name, (value, possible) in choices.items():
        if value not in possible:
            raise ValueError(f'{name} {value!r} is unknown; choose {" or ".join(possible)}')


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


def added(emb, layer, labels, scale=1):
    """The embedding, and that of the labels where there are some."""
    return emb if layer is None or labels is None else emb + layer(labels * scale)


class _UNet(nn.Module):
    """The way through a U-Net of this file; subclasses make `enc` and `dec`, and the embedding
    [N or 1, emb_channels] of the conditions, `embed(noise_labels, labels, augment_labels)`.

    `skip_connections`: one 0 or 1 for each encoder layer (first convolution, blocks of level 0,
    down of level 1, blocks of level 1, ...); where 0 the decoder gets zeros instead of the
    activation.
    """

    def __init__(self, skip_connections, num_blocks, num_levels, label_dropout):
        super().__init__()
        self.keep_skip = check_skip_connections(skip_connections, (num_blocks + 1) * num_levels)
        self.last_block = f'block{num_blocks}'          # of each resolution of the decoder
        self.label_dropout = label_dropout
        self.map_label = self.map_augment = None

    def encode(self, x, emb) -> list[torch.Tensor]:
        """Activations for the decoder, in order, zeros where a skip connection is off; last the
        encoder's output.
        """
        image = x
        activations = []
        for name, layer in self.enc.items():
            size, _, kind = name.partition('_')
            if kind.startswith('aux'):
                continue
            x = layer(x) if kind == 'conv' else layer(x, emb)
            if kind == 'down':
                x, image = self.see_image(f'{size}_aux_', x, image)
            activations.append(x)
        return [h if keep else torch.zeros_like(h)
                for h, keep in zip(activations, self.keep_skip, strict=True)] + [x]

    def see_image(self, prefix, x, image):
        """Activations of a resolution that have seen its image, and what the next one gets as
        image: itself in the encoder of NCSN++'s input skips, these activations in the residual
        encoder. `prefix` is that of the names of the layers; without them nothing happens.
        """
        if prefix + 'residual' in self.enc:
            x = (x + self.enc[prefix + 'residual'](image)) / math.sqrt(2)
            return x, x
        if prefix + 'skip' in self.enc:
            image = self.enc[prefix + 'down'](image)
            x = x + self.enc[prefix + 'skip'](image)
        return x, image

    def draw_image(self, prefix, x, image):
        """The image as this resolution sees it: its own part, and that of the coarser ones
        enlarged, where there are some.
        """
        part = self.dec[prefix + 'conv'](self.dec[prefix + 'norm'](x, silu=True))
        return part if image is None else self.dec[prefix + 'up'](image) + part

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        labels = drop_labels(class_labels, self.label_dropout, self.training)
        emb = self.embed(noise_labels, labels, augment_labels)
        *skips, x = self.encode(x, emb)
        image = None
        for name, block in self.dec.items():
            size, _, kind = name.partition('_')
            if kind.startswith('aux'):
                continue
            if block.in_channels > x.shape[1]:          # a block that joins what was encoded
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
            if kind == self.last_block and f'{size}_aux_conv' in self.dec:
                image = self.draw_image(f'{size}_aux_', x, image)
        return x if image is None else image


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
        super().__init__(skip_connections, num_blocks, len(channel_mult), label_dropout)
        _check(embedding_type=(embedding_type, ['positional', 'fourier']),
               encoder_type=(encoder_type, ['standard', 'skip', 'residual']),
               decoder_type=(decoder_type, ['standard', 'skip']))
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise

        # Embedding of noise level, class and augmentation.
        self.map_noise = functools.partial(time_features, width=noise_channels, endpoint=True)
        if embedding_type == 'fourier':
            self.map_noise = FourierEmbedding(noise_channels)
        self.label_scale = math.sqrt(label_dim)
        if label_dim:
            self.map_label = linear(label_dim, noise_channels, 1)
        if augment_dim:
            self.map_augment = linear(augment_dim, noise_channels, 1, bias=False)
        self.map_layer0 = linear(noise_channels, emb_channels, 1)
        self.map_layer1 = linear(emb_channels, emb_channels, 1)

        def layer(kind, attention, c_in, c_out):
            if kind == 'conv':
                return conv(in_channels, c_out, 3, 1)
            return UNetBlock(c_in, c_out, emb_channels, kind, attention, dropout, resample_filter)

        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        widths = [model_channels * mult for mult in channel_mult]
        encoder, decoder = unet_layers(img_resolution, model_channels, widths, num_blocks,
                                       attn_resolutions)
        aux = in_channels
        for name, kind, attend, c_in, c_out in encoder:
            self.enc[name] = layer(kind, attend, c_in, c_out)
            size = name.removesuffix(kind)
            if kind == 'down' and encoder_type == 'skip':
                self.enc[size + 'aux_down'] = Resample(kind, resample_filter)
                self.enc[size + 'aux_skip'] = conv(aux, c_out, 1, 1)
            if kind == 'down' and encoder_type == 'residual':
                self.enc[size + 'aux_residual'] = conv(aux, c_out, 3, 1, kind, resample_filter,
                                                       True, True)
                aux = c_out
        for name, kind, attend, c_in, c_out in decoder:
            last = kind == f'block{num_blocks}'
            self.dec[name] = layer(kind, attend and (last or kind == 'in0'), c_in, c_out)
            size = name.removesuffix(kind)
            if last and (decoder_type == 'skip' or name == decoder[-1][0]):
                if decoder_type == 'skip' and f'{size}up' in self.dec:
                    self.dec[size + 'aux_up'] = Resample('up', resample_filter)
                self.dec[size + 'aux_norm'] = norm(c_out, eps=1e-6)
                self.dec[size + 'aux_conv'] = conv(c_out, out_channels, 3, 1e-5)

    def embed(self, noise_labels, labels, augment_labels):
        emb = self.map_noise(noise_labels)
        emb = emb.roll(emb.shape[1] // 2, dims=1)       # [sin, cos]
        emb = added(emb, self.map_label, labels, self.label_scale)
        emb = added(emb, self.map_augment, augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(_UNet):
    """ADM of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", with 64
    channels per head.
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3,
                 attn_resolutions=(32, 16, 8), dropout=0.10, label_dropout=0.0,
                 skip_connections=None):
        super().__init__(skip_connections, num_blocks, len(channel_mult), label_dropout)
        emb_channels = model_channels * channel_mult_emb

        def layer(kind, attention, c_in, c_out):
            if kind == 'conv':
                return conv(in_channels, c_out, 3)
            return ADMBlock(c_in, c_out, emb_channels, kind, attention, dropout)

        self.map_noise = functools.partial(time_features, width=model_channels)
        if augment_dim:
            self.map_augment = linear(augment_dim, model_channels, 0, bias=False)
        self.map_layer0 = linear(model_channels, emb_channels)
        self.map_layer1 = linear(emb_channels, emb_channels)
        if label_dim:                                   # on `meta` it draws no random numbers
            self.map_label = Linear(label_dim, emb_channels, bias=False, device='meta')
            self.map_label.weight = nn.Parameter(torch.randn(emb_channels, label_dim))

        widths = [model_channels * mult for mult in channel_mult]
        self.enc, self.dec = (
            nn.ModuleDict({name: layer(*rest) for name, *rest in layers}) for layers in
            unet_layers(img_resolution, widths[0], widths, num_blocks, attn_resolutions))
        self.out_norm = norm(widths[0])
        self.out_conv = conv(widths[0], out_channels, 3, 0)

    def embed(self, noise_labels, labels, augment_labels):
        emb = added(self.map_noise(noise_labels), self.map_augment, augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(added(emb, self.map_label, labels))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        x = super().forward(x, noise_labels, class_labels, augment_labels)
        return self.out_conv(self.out_norm(x, silu=True))


MODELS = {'SongUNet': SongUNet, 'DhariwalUNet': DhariwalUNet}

# -------------------------------------------------------------------------------------------------
# Preconditionings: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), table 1 of the paper.


class Precond(Denoiser):
    """What the four preconditionings share; subclasses define `coefficients` and the range of
    sigma.

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
        _check(model_type=(model_type, MODELS))
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.model = MODELS[model_type](img_resolution=img_resolution, in_channels=img_channels,
                                        out_channels=out_channels or img_channels,
                                        label_dim=label_dim, **model_kwargs)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        return self.precondition(self.model, x, sigma, class_labels, force_fp32, **model_kwargs)


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
        return noise_coefficients(sigma, (self.M - 1) * self.inverse(sigma))


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
        return noise_coefficients(sigma, c_noise)


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
