"""Training a network of the distillation study: the same for students and for baselines."""

import dataclasses
import os

import torch

from distillation import common
from distillation.guided_checkpoints import GuidedCheckpoints
from dnnlib import UserError
from torch_utils import distributed as dist
from training import loop
from training.ema import ConstantEMA
from training.encoders import make_encoder
from training.loss_scale import DynamicLossScale
from training.schedules import anneal_lr

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


def fit(net, objective, batches, section: common.Training, outdir: str, *, identity: dict, options: dict, dataset: dict):
    """Trains `net` as `section` says, with checkpoints in `outdir`; goes on from the newest one there.

    identity  what a checkpoint must agree with, besides the network; options: what training_options.json says
    dataset   description of what was learned, for snapshots

    Returns the number of steps taken. Raises UserError for a checkpoint of another run.
    """
    batch, device = section.batch_size * dist.get_world_size(), next(net.parameters()).device
    fp16 = net.model.precision == 'fp16' and device.type == 'cuda'
    if net.model.precision == 'fp16' and not fp16:
        dist.print0('Note: float16 is for GPUs; this CPU computes in float32')
    steps = total_steps(section)
    if section.resume_checkpoint and not os.path.isfile(section.resume_checkpoint):
        raise UserError(f'resume_checkpoint: there is no file {section.resume_checkpoint}')
    if steps == ENDLESS:
        dist.print0('Training until it is stopped: Ctrl-C or SIGTERM saves a checkpoint (total_steps=N sets an end)')
    dist.print0(f'Run: {outdir}, {dist.get_world_size()} process(es) on {device.type}, batch {batch}')

    def lr(nimg, batch):
        return anneal_lr(nimg, batch, section.lr, section.lr_anneal_steps)

    network = {key: value for key, value in common.network_arguments(section).items() if key != 'precision'}
    trainer = loop.Trainer(
        net, objective, batches,
        torch.optim.AdamW(net.parameters(), lr=section.lr, weight_decay=section.weight_decay, fused=True),
        lr, ConstantEMA(net, common.ema_rates(section.ema_rate)),
        loop.LoopConfig(
            run_dir=outdir, total_nimg=steps * batch, batch_size=batch,
            batch_gpu=None if section.microbatch == -1 else section.microbatch,
            status_nimg=section.log_interval * batch, snapshot_nimg=section.save_interval * batch,
            checkpoint_nimg=section.save_interval * batch, bad_gradients=None,
            resume_from=section.resume_checkpoint or None),
        snapshot=dict(encoder=make_encoder({'name': 'rgb'}), dataset=dataset, recipe=options),
        identity=dict(network=network, diffusion=common.diffusion_arguments(section.diffusion), batch_size=batch,
                      ema_rate=section.ema_rate) | identity,
        options=options | dict(world_size=dist.get_world_size()),
        checkpoints=GuidedCheckpoints(batch, section.cache_save_interval),
        loss_scale=DynamicLossScale(growth=section.fp16_scale_growth) if fp16 else None)
    return trainer.run() // batch


def plain(section) -> dict:
    """A section as plain values."""
    return dataclasses.asdict(section)


def description(net, name: str) -> dict:
    """What snapshots keep of the data of a network."""
    return {'name': name, 'size': 0, 'resolution': net.img_resolution, 'num_channels': net.img_channels,
            'label_dim': net.label_dim, 'classes': None, 'class_names': None, 'wnids': None}
