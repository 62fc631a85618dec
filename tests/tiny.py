"""Small stand-ins for large things: an autoencoder with the layout of Stable Diffusion's, and random weights."""

import warnings

import torch


def save_tiny_vae(folder, seed: int = 0, **values):
    """Saves a diffusers.AutoencoderKL with 4 latent channels and a factor of 8 (0.1M parameters); returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import diffusers
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(**dict(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4) | values)
    vae.save_pretrained(folder)
    return str(folder)


def save_tiny_dinov2(folder, image_size: int = 224):
    """Saves a transformers.Dinov2Model of 16 channels and two layers; returns it."""
    import transformers
    torch.manual_seed(0)
    net = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=image_size, patch_size=14)).eval()
    torch.nn.init.normal_(net.embeddings.position_embeddings)
    net.save_pretrained(folder)
    return net
