"""Small stand-ins for large things: an autoencoder with the layout of Stable Diffusion's, and random weights."""

import warnings

import torch


def save_tiny_vae(folder, seed: int = 0):
    """Saves a diffusers.AutoencoderKL with 4 latent channels and a factor of 8 (0.1M parameters); returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import diffusers
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
    vae.save_pretrained(folder)
    return str(folder)
