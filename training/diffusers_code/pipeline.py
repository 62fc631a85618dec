"""Sampling from a denoiser of this project with diffusers.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained('FOLDER', custom_pipeline='FOLDER', trust_remote_code=True)
    pipe(seeds=range(4)).images[0].save('0.png')
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from .encoders import make_encoder
from .random import StackedRandomGenerator
from .samplers import ablation_sampler, edm2_sampler, edm_sampler

SAMPLERS = {'edm2': edm2_sampler, 'edm': edm_sampler, 'ablation': ablation_sampler}


class SnapshotPipeline(DiffusionPipeline):
    """One image for each seed, the same as generate_images.py makes of the snapshot."""

    def __init__(self, unet, encoder: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(encoder=encoder)
        self._encoder = make_encoder(encoder or {'name': 'rgb'})

    @torch.no_grad()
    def __call__(self, seeds=range(4), labels=None, batch_size: int = 32, sampler: str = 'edm2', output_type: str = 'pil',
                 **options):
        """Samples. `labels`: None draws the class of each image from its seed; an int is the class of all; a list has one
        for each seed. `sampler` is one of SAMPLERS, and `options` are its options (num_steps, sigma_max, S_churn, ...).
        `output_type` is 'pil', or 'pt' for uint8 [N,C,H,W].
        """
        net, seeds = self.unet.net, list(seeds)
        device = next(net.parameters()).device
        labels = [labels] * len(seeds) if labels is None or isinstance(labels, int) else list(labels)
        parts = []
        for start in self.progress_bar(range(0, len(seeds), batch_size)):
            chosen = seeds[start:start + batch_size]
            random = StackedRandomGenerator(device, chosen)
            noise = random.randn([len(chosen), net.img_channels, net.img_resolution, net.img_resolution])
            one_hot = None
            if net.label_dim:
                drawn = random.randint(net.label_dim, [len(chosen)]).tolist()
                given = labels[start:start + batch_size]
                ids = [d if g is None else g for d, g in zip(drawn, given, strict=True)]
                one_hot = torch.nn.functional.one_hot(torch.tensor(ids, device=device), net.label_dim).float()
            latents = SAMPLERS[sampler](net, noise, labels=one_hot, random=random, **options)
            parts.append(self._encoder.decode(latents).cpu())
        images = torch.cat(parts)
        if output_type == 'pil':
            images = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images]
        return ImagePipelineOutput(images=images)
