"""Training a network of the distillation study: the same for students and for baselines."""

import dataclasses
import functools
import os

import torch

from distillation import common
from distillation.guided_checkpoints import CacheCheckpoints
from dnnlib import UserError
from torch_utils import distributed as dist
from training import recipe

ENDLESS = 10**9  # steps


def new_network(section: common.Training, seed: int, device) -> torch.nn.Module:
    """The network of a section, with random weights by `seed` or those of its `model_path`."""
    torch.manual_seed(seed)
    net = common.build(section)
    if section.model_path:
        common.load_model(net, section.model_path, 'model_path')
    return net.train().to(device)


def total_steps(section: common.Training) -> int:
    """`total_steps`, else the steps in which the learning rate falls to zero, else without end."""
    return section.total_steps or section.lr_anneal_steps or ENDLESS


def recipe_of(section: common.Training, loss: dict, seed: int, dataset: dict, fp16: bool) -> recipe.Recipe:
    """The recipe of a section; fp16: with a loss scale of its own."""
    batch = section.batch_size * dist.get_world_size()
    return recipe.Recipe(
        batch=batch, total_nimg=total_steps(section) * batch, seed=seed, dataset=dataset, loss=loss,
        network=dict(class_name='DiscreteDenoiser', network=common.network_arguments(section),
                     diffusion=common.diffusion_arguments(section.diffusion),
                     clip=section.diffusion.clip_denoised),
        optim={'name': 'AdamW', 'weight_decay': section.weight_decay},
        learning_rate={'name': 'anneal', 'lr': section.lr, 'anneal_steps': section.lr_anneal_steps},
        averages={'name': 'constant', 'rates': common.ema_rates(section.ema_rate)},
        sampler={'name': 'ddpm'}, bad_gradients=None, layout='guided',
        batch_gpu=None if section.microbatch == -1 else section.microbatch,
        status=section.log_interval * batch, snapshot=section.save_interval * batch,
        checkpoint=section.save_interval * batch,
        loss_scale={'growth': section.fp16_scale_growth} if fp16 else None)


def fit(net, loss, batches, section: common.Training, outdir: str, *, rule: dict, seed: int, dataset: dict,
        options: dict) -> int:
    """Trains `net` as `section` says, with checkpoints in `outdir`; goes on from the newest one there.

    rule     name and settings of the loss, for the recipe
    dataset  description of what is learned
    options  settings, for training_options.json

    Returns the number of steps taken. Raises UserError for a checkpoint of another run.
    """
    half = net.model.precision == 'fp16'
    fp16 = half and next(net.parameters()).device.type == 'cuda'
    if half and not fp16:
        dist.print0('Note: float16 is for GPUs; this CPU computes in float32')
    if section.resume_checkpoint and not os.path.isfile(section.resume_checkpoint):
        raise UserError(f'resume_checkpoint: there is no file {section.resume_checkpoint}')
    if total_steps(section) == ENDLESS:
        dist.print0('Training until it is stopped: Ctrl-C or SIGTERM saves a checkpoint '
                    '(total_steps=N sets an end)')
    rules = recipe_of(section, rule, seed, dataset, fp16)
    layout = functools.partial(CacheCheckpoints, cache_interval=section.cache_save_interval)
    seen = recipe.fit(rules, outdir, net, loss, batches, options=options, layout=layout,
                      resume_from=section.resume_checkpoint or None, allow_changes=section.allow_changes)
    return seen // rules.batch


def plain(section) -> dict:
    """A section as plain values."""
    return dataclasses.asdict(section)


def description(net, name: str) -> dict:
    """What snapshots keep of the data of a network."""
    return {'name': name, 'size': 0, 'resolution': net.img_resolution, 'num_channels': net.img_channels,
            'label_dim': net.label_dim, 'classes': None, 'class_names': None, 'wnids': None}
