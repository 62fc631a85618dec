"""Sampling from a denoiser of this project with diffusers.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(
        'FOLDER', custom_pipeline='FOLDER', trust_remote_code=True)
    pipe(seeds=range(4)).images[0].save('0.png')
"""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from .encoders import make_encoder
from .samplers import choose_setting, sample_seeds


class SnapshotPipeline(DiffusionPipeline):
    """One image for each seed, the same as generate_images.py makes of the snapshot."""

    def __init__(self, unet, encoder: dict | None = None, sampler: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(encoder=encoder, sampler=sampler)
        self._encoder = make_encoder(encoder or {'name': 'rgb'})

    @torch.no_grad()
    def __call__(self, seeds=range(4), labels=None, batch_size: int = 32,
                 sampler: str | None = None, output_type: str = 'pil', guide=None,
                 guidance: float = 1, guidance_interval=None, **options):
        """Samples. `labels`: None draws the class of each image from its seed; an int is the class
        of all; a list has one for each seed. `sampler` is the name of a sampler (default: that of
        the snapshot), and `options` are its options (num_steps, sigma_max, S_churn, ...). `guide`
        is another pipeline, which guides with the strength `guidance` at noise levels LO < sigma
        <= HI of `guidance_interval`. `output_type` is 'pil', or 'pt' for uint8 [N,C,H,W].
        """
        net = self.unet.net
        seeds = list(seeds)
        labels = np.broadcast_to(labels, len(seeds)).tolist()
        setting = choose_setting(net, self.config.sampler, options | {'name': sampler})
        parts = []
        for start in self.progress_bar(range(0, len(seeds), batch_size)):
            part = slice(start, start + batch_size)
            images, _ = sample_seeds(net, self._encoder, seeds[part], labels[part],
                                     next(net.parameters()).device, guide=guide and guide.unet.net,
                                     guidance=guidance, guidance_interval=guidance_interval,
                                     **setting)
            parts.append(images.cpu())
        images = torch.cat(parts)
        if output_type == 'pil':
            pixels = images.permute(0, 2, 3, 1).squeeze(3).numpy()
            images = [Image.fromarray(image) for image in pixels]
        return ImagePipelineOutput(images=images)
