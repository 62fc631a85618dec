"""Sampling from a denoiser of this project with diffusers.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained('FOLDER', trust_remote_code=True)
    pipe(class_labels=[0, 1], generator=torch.Generator().manual_seed(0)).images[0].save('0.png')
"""

import inspect
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from dnnlib import UserError
from training.data.dataset import class_index
from training.diffusion.samplers import Guided, choose_setting, sample, seed_inputs
from training.encoders import make_encoder


def load_vae(name: str, dtype, allow_nonfinite=False):
    """The autoencoder that the network names, from the hub."""
    try:
        return AutoencoderKL.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f'the autoencoder {name} is not to be had; set pipe.vae = '
                        f'AutoencoderKL.from_pretrained(...) ({type(error).__name__})') from None


class SnapshotPipeline(DiffusionPipeline):
    """Images of a network by its own sampler, or by a scheduler of diffusers.

    unet         the network
    guide        another network that guides it, or None
    scheduler    None: the sampler of the network, which makes the images of generate_images.py;
                 else a scheduler of diffusers, see `make_scheduler`
    vae          the autoencoder of latents; None: that which the network names, from the hub
    description  of the network: its encoder, sampler, classes, recipe
    guidance_scale, guidance_interval   what `__call__` takes if it is not told
    """

    model_cpu_offload_seq = 'unet->vae'
    _optional_components = ['guide', 'scheduler', 'vae']  # noqa: RUF012

    def __init__(self, unet, guide=None, scheduler=None, vae=None, description=None,
                 guidance_scale=1, guidance_interval=None):
        super().__init__()
        self.register_modules(unet=unet, guide=guide, scheduler=scheduler, vae=vae)
        self.register_to_config(description=description or {}, guidance_scale=guidance_scale,
                                guidance_interval=guidance_interval)

    def register_modules(self, **modules):
        """As of diffusers; components with a file of code are named by that file."""
        super().register_modules(**modules)
        self.register_to_config(**{
            name: (type(module).__module__.rpartition('.')[2], type(module).__name__)
            for name, module in modules.items()
            if type(module).__module__.startswith('diffusers_modules.')})

    def save_pretrained(self, *args, **kwargs):
        """As of diffusers; the folder has its code, and can be loaded like this one."""
        self.register_modules(**{name: getattr(self, name)
                                 for name in ('unet', *self._optional_components)})
        super().save_pretrained(*args, **kwargs)

    def save_config(self, save_directory, *args, **kwargs):
        """As of diffusers, and what else is in the folder of a network."""
        super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        code = Path(sys.modules[type(self).__module__].__file__)
        shutil.copyfile(code, folder / code.name)
        index = json.loads((folder / self.config_name).read_text())
        loaded = index.pop('_name_or_path', None)
        index['_class_name'] = [code.stem, type(self).__name__]
        contents = {self.config_name: index, 'snapshot.json': self.config.description}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + '\n')
        card = Path(loaded or folder, 'README.md')
        if card.is_file() and card.parent.resolve() != folder.resolve():
            shutil.copyfile(card, folder / card.name)

    def label_of(self, label) -> int:
        """The label of a class: an int is one already, a text the name of one."""
        count = self.unet.net.label_dim
        if isinstance(label, str):
            return class_index(dict(name='', label_dim=count) | self.config.description.get(
                'dataset', {}), label)
        if not 0 <= label < count:
            raise UserError(f'is no label of a network with {count} classes', 'class_labels',
                            label)
        return int(label)

    def make_scheduler(self, cls, **options):
        """A scheduler of diffusers, of the class `cls`, with the noise of this network:

            pipe.scheduler = pipe.make_scheduler(EDMDPMSolverMultistepScheduler)

        `options` are more of its own.
        """
        net = self.unet.net
        own = self._setting({})
        low, high = Guided(net).cut(own.get('sigma_min') or 0.002, own.get('sigma_max') or 80)
        settings = dict(sigma_min=low, sigma_max=high, rho=own.get('rho') or 7, sigma_data=0.5,
                        prediction_type='epsilon', clip_sample=False)
        if hasattr(net, 'diffusion') and not hasattr(cls, 'precondition_outputs'):
            process = net.diffusion.respaced('')
            settings = dict(
                num_train_timesteps=process.num_steps, trained_betas=process.betas.tolist(),
                prediction_type={'start': 'sample'}.get(process.predict, process.predict),
                clip_sample=net.clip if own.get('clip') is None else own['clip'],
                clip_sample_range=1.0, variance_type=process.variance)
        known = inspect.signature(cls.__init__).parameters
        return cls(**{key: value for key, value in settings.items() if key in known} | options)

    def _setting(self, options: dict) -> dict:
        return choose_setting(self.unet.net, self.config.description.get('sampler'), options)

    @torch.no_grad()
    def __call__(self, class_labels=None, batch_size: int | None = None,
                 num_inference_steps: int | None = None, generator=None,
                 guidance_scale: float | None = None, output_type: str = 'pil', *, seeds=None,
                 latents=None, guidance_interval=None, sampler: str | None = None,
                 images_per_batch: int = 32, return_dict: bool = True, **options):
        """Images: `batch_size` of them, or one for each of `class_labels`, `seeds`, `latents` or
        of a list of generators.

        class_labels   one for all images or one for each: labels from 0 on, or names of classes;
                       None draws the class of each image as its generator says
        num_inference_steps   by default those of the network's sampler
        generator      torch.Generator, from which all images draw in turn, or one for each
        seeds          instead: image i is that which generate_images.py makes of seeds[i], and of
                       a generator on the CPU with this seed
        latents        standard normal noise [N,C,H,W] to start from
        guidance_scale w of D = D_guide + w (D - D_guide), 1 = none; needs pipe.guide; at levels
                       LO < sigma <= HI of `guidance_interval`
        output_type    'pil'; 'np' float32 [N,H,W,C] and 'pt' float32 [N,C,H,W] in [0, 1];
                       'latent': float32 [N,C,H,W] as the network makes them
        sampler        name of another sampler, where there is no scheduler; `options` are its
                       options (S_churn, solver, ...), or those of the scheduler's steps (eta)
        """
        if output_type not in ('pil', 'np', 'pt', 'latent'):
            raise UserError('is none of pil, np, pt, latent', 'output_type', output_type)
        net = self.unet.net
        device = next(net.parameters()).device
        labels, generators = self._inputs(class_labels, batch_size, generator, seeds, latents)
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
            guidance_interval = guidance_interval or self.config.guidance_interval
        guiding = dict(guide=self.guide and self.guide.net, guidance=guidance_scale)
        encoder = self._encoder()
        if self.scheduler is None:
            setting = self._setting(options | dict(name=sampler, num_steps=num_inference_steps))
        elif sampler is not None:
            raise UserError('has no meaning with a scheduler; set pipe.scheduler = None',
                            'sampler', sampler)
        parts = []
        for start in self.progress_bar(range(0, len(labels), images_per_batch)):
            part = slice(start, start + images_per_batch)
            noise, ids, random = seed_inputs(net, generators[part], labels[part], device)
            if latents is not None:
                noise = latents[part].to(noise)
            one_hot = ids if ids is None else torch.nn.functional.one_hot(
                ids, net.label_dim).float()
            if self.scheduler is None:
                x = sample(net, noise, one_hot, random=random, **guiding,
                           guidance_interval=guidance_interval, **setting)
            else:
                denoiser = Guided(net, one_hot, **guiding, interval=guidance_interval)
                x = self._follow(denoiser, noise, num_inference_steps, random.generators, options)
            parts.append(x.float() if output_type == 'latent' else encoder.decode(x).cpu())
        images = torch.cat(parts)
        if output_type in ('pt', 'np'):
            images = images.float() / 255
        if output_type in ('pil', 'np'):
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == 'pil':
            images = [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
                      for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _inputs(self, class_labels, batch_size, generator, seeds, latents):
        """(label or None, generator) of each image."""
        several = dict(
            class_labels=class_labels if np.ndim(class_labels) else None,
            generator=generator if isinstance(generator, list | tuple) else None,
            seeds=seeds, latents=latents)
        counts = {name: len(value) for name, value in several.items() if value is not None}
        counts |= {} if batch_size is None else {'batch_size': batch_size}
        if len(set(counts.values())) > 1 or not all(n > 0 for n in counts.values()):
            raise UserError(f'how many images? {counts}')
        count = next(iter(counts.values()), 1)
        if several['class_labels'] is None:
            class_labels = [class_labels] * count
        if self.unet.net.label_dim == 0 and any(label is not None for label in class_labels):
            raise UserError('the network has no classes', 'class_labels')
        labels = [label if label is None else self.label_of(label) for label in class_labels]
        if seeds is not None and generator is not None:
            raise UserError('give seeds or generators')
        if seeds is not None:
            generator = [*seeds]
        elif generator is None:
            generator = torch.randint(1 << 32, [count]).tolist()
        elif not isinstance(generator, list | tuple):
            generator = [generator] * count
        return labels, list(generator)

    def _encoder(self):
        encoder = make_encoder(self.config.description.get('encoder', {'name': 'rgb'}),
                               named_by='snapshot')
        if self.vae is not None:
            encoder._vae = self.vae
        return encoder

    def _follow(self, denoiser, noise, num_steps, generators, options):
        """The images to which a scheduler of diffusers leads from standard normal noise."""
        scheduler = self.scheduler
        own_steps = hasattr(denoiser.net, 'diffusion') and hasattr(scheduler, 'alphas_cumprod')
        takes = inspect.signature(scheduler.step).parameters
        if unknown := options.keys() - takes.keys():
            raise UserError(f'has no meaning for {type(scheduler).__name__}', unknown.pop())
        if 'generator' in takes:
            options = options | dict(generator=generators)
        default = self._setting({}).get('num_steps') or len(getattr(scheduler, 'betas', ()))
        scheduler.set_timesteps(num_steps or default, device=noise.device)
        spread = float(getattr(scheduler, 'init_noise_sigma', 1)) > 1.5   # x_0 + sigma z
        x = noise * scheduler.sigmas[0] if spread else noise
        if own_steps:
            output = _noise_output(denoiser, scheduler)
        elif hasattr(scheduler, 'precondition_outputs') or hasattr(scheduler, 'alphas_cumprod'):
            output = _denoiser_output(denoiser, scheduler, spread)
        else:
            raise UserError(f'{type(scheduler).__name__} is no scheduler that this pipeline knows;'
                            ' there are those of EDM, DDPM, DDIM, DPM-Solver++, Euler')
        for index, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(output(x, scaled, t, index), t, x, **options).prev_sample
        return x


def _noise_output(denoiser, scheduler):
    """What a network of discrete time says, at the steps of its own process."""
    process = denoiser.net.diffusion.respaced('')
    theirs = scheduler.alphas_cumprod.cpu().numpy()
    predicts = {'start': 'sample'}.get(process.predict, process.predict)
    if theirs.shape != process.alphas_cumprod.shape or not np.allclose(
            theirs, process.alphas_cumprod, rtol=1e-3, atol=1e-6):
        raise UserError('the scheduler has other noise than the network; '
                        'take pipe.make_scheduler(...)')
    if scheduler.config.prediction_type != predicts:
        raise UserError(f'is {scheduler.config.prediction_type}, and the network predicts '
                        f'{predicts}', 'prediction_type')
    learned = str(scheduler.config.get('variance_type')).startswith('learned')

    def output(x, scaled, t, index):
        step = t.round().long().reshape(1).expand(len(x)).to(x.device)
        result = denoiser.output(scaled, process.model_steps(step), process.sigmas[int(step[0])])
        return result if learned else result[:, :x.shape[1]]

    return output


def _denoiser_output(denoiser, scheduler, spread: bool):
    """What a scheduler expects of a network, of D(x; sigma): x = x_0 + sigma z, or if it is not
    `spread`, that divided by sqrt(1 + sigma^2)."""
    kind = scheduler.config.prediction_type

    def output(x, scaled, t, index):
        if hasattr(scheduler, 'sigmas'):
            sigma = scheduler.sigmas[index].double()
        else:
            abar = scheduler.alphas_cumprod[int(t)].double()
            sigma = ((1 - abar) / abar).sqrt()
        shrunk = 1 / (1 + sigma**2).sqrt()
        unscaled = x if spread else x / shrunk.to(x)
        D = denoiser(unscaled, sigma)
        if hasattr(scheduler, 'precondition_outputs'):
            sigma = scheduler.sigmas[index].to(x)
            rest = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)
            return (D - rest) / scheduler.precondition_outputs(0, torch.ones_like(x), sigma)
        epsilon = (unscaled - D) / sigma.to(x)
        outputs = {'epsilon': epsilon, 'sample': D,
                   'v_prediction': shrunk.to(x) * (epsilon - sigma.to(x) * D)}
        if kind not in outputs:
            raise UserError('is none of epsilon, sample, v_prediction', 'prediction_type', kind)
        return outputs[kind]

    return output
