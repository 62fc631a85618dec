"""Pixels <-> what the network is trained on: RGB as it is, or the latents of Stable Diffusion's
autoencoder.

Three forms: *pixels* (uint8 [N,3,H,W]), what the archive stores (*raw*: pixels, or mean and
standard deviation of the autoencoder's posterior, float32 [N,8,H/8,W/8]), and what the network
sees (*latents*, float32).
"""

import os
import re
import warnings

import torch

from dnnlib.util import UserError, printable
from torch_utils.files.models import load_model
from torch_utils.files.weights import check_weights
from torch_utils.random import GlobalRandom
from training.networks.layers import DTYPES

DEFAULT_VAE = 'stabilityai/sd-vae-ft-mse'
# What a file may name; another autoencoder could be anything, of anybody.
PUBLISHED = (DEFAULT_VAE, 'stabilityai/sd-vae-ft-ema')


class RGBEncoder:
    """Pixels scaled to [-1, 1]: x/127.5 - 1. A round trip is exact."""

    name = 'rgb'

    def config(self) -> dict:
        """Plain values from which `make_encoder` makes this encoder again."""
        return {'name': self.name}

    def latent_shape(self, raw_shape) -> tuple:
        """Shape [C,H,W] of the latents of stored images of shape [C,H,W]."""
        if raw_shape[0] not in (1, 3, 4):
            raise UserError(f'images with {raw_shape[0]} channels are no pixels; '
                            'use the sd-vae encoder for latents')
        return tuple(raw_shape)

    def pixel_shape(self, latent_shape) -> tuple:
        """Shape [C,H,W] of the pixels that `decode` makes."""
        return tuple(latent_shape)

    def prepare(self, device):
        """Decoding needs nothing more."""

    def encode_latents(self, raw: torch.Tensor, random=None) -> torch.Tensor:
        """Stored pixels uint8 [N,C,H,W] -> float32 in [-1, 1] on the same device. Draws nothing
        from `random`.
        """
        return raw.float() / 127.5 - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N,C,H,W] -> pixels uint8: x*127.5 + 128, clipped to 0..255 and truncated."""
        return (latents * 127.5 + 128).clip(0, 255).to(torch.uint8)


class GuidedRGBEncoder(RGBEncoder):
    """RGBEncoder that rounds as guided diffusion does, half a level lower."""

    def decode(self, latents):
        """Latents [N,C,H,W] -> pixels uint8: (x + 1)*127.5, clipped to 0..255 and truncated."""
        return ((latents + 1) * 127.5).clip(0, 255).to(torch.uint8)


class StabilityVAEEncoder:
    """Latents of Stable Diffusion's autoencoder, whitened channel by channel.

    Stored are mean and standard deviation of the posterior. A latent is z = (mean + std n) scale
    + bias with n normal, scale = final_std/raw_std and bias = final_mean - raw_mean scale. As in
    EDM2, the autoencoder sees pixels in [0, 1].

    Args:
        vae_name:   Name on the Hugging Face hub, or a local folder. It is loaded when first
                    needed: training on stored latents works without it as long as nothing is
                    decoded.
        raw_mean, raw_std:     Statistics of unwhitened latents, per channel.
        final_mean, final_std: Those that the network sees.
        batch_size: Images that go through the autoencoder together.
        precision:  'fp32', 'fp16' or 'bf16', of the autoencoder.
        fingerprint: Of a local folder, wherever it is (see training.data.autoencoders).

    `named_by` is the 'user', who may name any autoencoder; or 'data', which names one of PUBLISHED
    or a local folder; or a 'snapshot', which names one of PUBLISHED. The variable SD_VAE holds
    another one that the user allows.
    """

    name = 'sd-vae'
    named_by = 'user'
    allow_nonfinite = False
    black = 0  # what the autoencoder sees of a black pixel; a white one is 1

    def __init__(self, vae_name=DEFAULT_VAE, raw_mean=(5.81, 3.25, 0.12, -2.15),
                 raw_std=(4.17, 4.62, 3.71, 3.28), final_mean=0, final_std=0.5, batch_size=8,
                 precision='fp32', fingerprint=None):
        if not isinstance(vae_name, str):
            raise ValueError('the name of the autoencoder is no text')
        self.fingerprint = fingerprint
        self.vae_name = vae_name
        self._settings = dict(raw_mean=list(raw_mean), raw_std=list(raw_std),
                              final_mean=final_mean, final_std=final_std)
        means, stds = torch.tensor([raw_mean, raw_std], dtype=torch.float32)
        scale = final_std / stds
        self._whitening = _checked(torch.stack([scale, final_mean - means * scale]))
        if not 0 < batch_size <= 4096:
            raise UserError('the autoencoder takes 1 to 4096 images together', 'batch', batch_size)
        self.batch_size = batch_size
        self._dtype = DTYPES[precision]
        self._vae = None

    def config(self) -> dict:
        """Plain values from which `make_encoder` makes this encoder again."""
        known = {'fingerprint': self.fingerprint} if self.fingerprint else {}
        return {'name': self.name, 'vae_name': self.vae_name} | self._settings | known

    def latent_shape(self, raw_shape) -> tuple:
        """Shape [C,H,W] of the latents of stored images of shape [C,H,W] (mean and std, or
        pixels).
        """
        channels, height, width = raw_shape
        latents = self._whitening.shape[1]
        if channels == 3:
            return latents, height // 8, width // 8
        if channels != 2 * latents:
            raise UserError(f'images with {channels} channels are neither pixels nor stored '
                            f'latents with {2 * latents} channels; make them with '
                            'dataset_tool.py encode')
        return latents, height, width

    def pixel_shape(self, latent_shape) -> tuple:
        """Shape [C,H,W] of the pixels that `decode` makes."""
        _, height, width = latent_shape
        return 3, 8 * height, 8 * width

    def whitening(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, bias), float32 [1,C,1,1] on the device of `like`: a latent is raw * scale +
        bias.
        """
        # Kept on the device: a copy in every step would make the host wait.
        self._whitening = self._whitening.to(like.device)
        return self._whitening[:, None, :, None, None].unbind()

    def encode_latents(self, raw: torch.Tensor, random=None) -> torch.Tensor:
        """Stored mean and std [N,8,h,w] (or pixels uint8) -> latents float32 [N,4,h,w]; one
        normal draw of that shape.

        `random` has `randn_like`; torch's global generator by default.
        """
        if raw.dtype == torch.uint8:
            raw = self.encode_pixels(raw)
        mean, std = raw.float().chunk(2, dim=1)
        scale, bias = self.whitening(mean)
        return (mean + std * (random or GlobalRandom(raw.device)).randn_like(mean)) * scale + bias

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels uint8 [N,3,H,W] -> mean and standard deviation float32 [N,8,H/8,W/8] of the
        posterior.
        """
        def encode(x):
            x = x.float() / (255 / (1 - self.black)) + self.black
            posterior = self._vae.encode(x.to(self._dtype)).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1).float()

        return self._in_batches(encode, pixels)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N,4,h,w] -> pixels uint8 [N,3,8h,8w]: unwhitened, decoded, clamped, scaled to
        0..255.
        """
        scale, bias = self.whitening(latents)

        def decode(x):
            pixels = self._vae.decode(x.to(self._dtype)).sample.float()
            pixels = (pixels - self.black) / (1 - self.black)
            return (pixels.clamp(0, 1) * 255).to(torch.uint8)

        return self._in_batches(decode, (latents.float() - bias) / scale)

    def _in_batches(self, function, x):
        """Applies `function` to parts of one size, so that no image's result depends on how many
        there are.

        On the GPU the last part is filled up. On the CPU parts are single images, which are no
        slower there.
        """
        self.prepare(x.device)
        size = self.batch_size if x.device.type == 'cuda' else 1
        fill = x[-1:].expand(-len(x) % size, -1, -1, -1)
        parts = torch.cat([x, fill]).split(size)
        return torch.cat([function(part) for part in parts])[:len(x)]

    def prepare(self, device):
        """The autoencoder on a device, loaded if it is not yet; raises UserError if there is none.

        Call it before long work that ends in `decode`, and before threads share the encoder.
        """
        if self._vae is None:
            name = self._allowed_name()
            vae = load_vae(name, self._dtype, self.allow_nonfinite)
            channels = self._whitening.shape[1]
            if vae.config.latent_channels != channels or len(vae.config.block_out_channels) != 4:
                raise UserError(f'autoencoder {name} makes no latents of {channels} channels and '
                                'an eighth of the height and width', 'model_url')
            self._vae = vae
        return self._vae.to(device)

    def _allowed_name(self) -> str:
        name = self.vae_name
        if self.named_by == 'user' or name in PUBLISHED \
                or self.named_by == 'data' and os.path.isdir(name):
            return name
        own = os.environ.get('SD_VAE', '')
        if own and os.path.basename(own.rstrip('/')) == os.path.basename(name.rstrip('/')):
            return own
        raise UserError(f'autoencoder {printable(name, 100)} is named by the {self.named_by}, and '
                        'is none that this project knows; if you trust it, name it yourself, or '
                        'in the variable SD_VAE', 'model_url')


class SimpleVAEEncoder(StabilityVAEEncoder):
    """The multi-source project's simplified encoder: posterior samples times 0.1825, autoencoder
    in [-1, 1].

    0.1825, not Stable Diffusion's 0.18215, is what that project uses. The pixels of decoded
    images are (x/2 + 0.5).
    """

    name = 'sd-vae-0.1825'
    black = -1

    def __init__(self, vae_name=DEFAULT_VAE, factor=0.1825, channels=4, **options):
        super().__init__(vae_name, **options)
        self._whitening = _checked(torch.tensor([[factor], [0.0]])).expand(2, channels)
        self._settings = dict(factor=factor, channels=channels)


def _checked(whitening: torch.Tensor) -> torch.Tensor:
    """Scale and bias [2,C]; UserError unless they can be undone."""
    if not (whitening.isfinite().all() and whitening[0].all()):
        raise UserError('the statistics of its latents make no sense')
    return whitening


_BLOCKS = {'DownEncoderBlock2D', 'UpDecoderBlock2D', 'AttnDownEncoderBlock2D',
           'AttnUpDecoderBlock2D'}
# What `torch_utils.files.models.load_model` takes of config.json.
_VAE = dict(in_channels=(3, 3), out_channels=(3, 3), down_block_types=[_BLOCKS],
            up_block_types=[_BLOCKS], block_out_channels=[(1, 8192)], layers_per_block=(1, 32),
            latent_channels=(1, 1024), norm_num_groups=(1, 8192),
            act_fn={'silu', 'swish', 'mish', 'gelu', 'relu'}, use_quant_conv=bool,
            use_post_quant_conv=bool, mid_block_add_attention=bool)
# Layers of attention, as files of 2022 call them: those of Stability AI, for example.
_OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def _new_name(name: str) -> str:
    return re.sub(r'(attentions\.\d+\.)(query|key|value|proj_attn)\.',
                  lambda match: f'{match[1]}{_OLD_NAMES[match[2]]}.', name)


def load_vae(name: str, dtype=torch.float32, allow_nonfinite: bool = False):
    """The `diffusers.AutoencoderKL` of a folder or of OWNER/NAME[@REVISION] on the hub, for
    inference.

    Raises UserError in one line if there is none. Weights are read without running code from the
    file.
    """
    def build(values, state, source):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            import diffusers  # slow to import, and needed only here
        with torch.device('meta'):  # without memory, whatever the sizes
            vae = diffusers.AutoencoderKL(**values)
        check_weights(vae, state, source)
        vae.load_state_dict(state, assign=True)
        return vae

    pipeline = os.path.join(name, 'vae')
    return load_model('autoencoder', pipeline if os.path.isdir(pipeline) else name, build, _VAE,
                      'diffusion_pytorch_model.safetensors', field='model_url', rename=_new_name,
                      dtype=dtype, allow_nonfinite=allow_nonfinite)


_ENCODERS = {kind.name: kind for kind in (RGBEncoder, StabilityVAEEncoder, SimpleVAEEncoder)}


def make_encoder(config: dict, vae_name: str | None = None, named_by: str = 'data'):
    """Encoder of a configuration such as {'name': 'rgb'} or `encoder.config()`. Raises UserError
    for unknown ones.

    vae_name   autoencoder that the user names, in place of that of the configuration
    named_by   who names the latter, see StabilityVAEEncoder
    """
    settings = config | ({'vae_name': vae_name} if vae_name else {})
    name = str(settings.pop('name', None))
    if name not in _ENCODERS:
        raise UserError(f'encoder {name} is unknown; there are {", ".join(_ENCODERS)}')
    try:
        encoder = _ENCODERS[name](**settings)
    except Exception as error:  # settings that make no sense raise many kinds
        raise UserError(
            f'encoder {name} does not take the settings {settings} ({error})') from None
    encoder.named_by = 'user' if vae_name else named_by
    return encoder


def encoder_for(dataset) -> dict:
    """Configuration of the encoder for a data set: the one its archive names, else by what it
    stores.
    """
    stored = {'name': 'rgb' if dataset.dtype == 'uint8' else 'sd-vae'}
    return dataset.info.get('encoder') or stored
