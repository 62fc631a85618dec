"""What the training scripts share: options, data, pictures of a run, and what a checkpoint must agree with."""

import os

import click
import torch

from dnnlib import UserError, cli
from torch_utils import distributed as dist
from training import loop
from training.data.dataset import ImageDataset
from training.encoders import encoder_for, make_encoder
from training.generate import save_sample_grid


def place_options(outdir_help: str):
    """Decorator: --outdir and --data."""
    def decorate(function):
        for option in reversed([
            click.option('--outdir', metavar='DIR', required=True, help=outdir_help),
            click.option('--data', metavar='ZIP|DIR', required=True, help='Data set made by dataset_tool.py'),
        ]):
            function = option(function)
        return function
    return decorate


def machine_options(function):
    """Decorator: how the work is done, and how it is reported."""
    for option in reversed([
        click.option('--batch-gpu', metavar='NIMG', type=cli.COUNT,
                     help='Images of one forward pass  [default: all of a process]'),
        click.option('--ls', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=1,
                     help='Loss scaling against underflow of float16 gradients'),
        click.option('--bench', metavar='BOOL', type=bool, default=True, help='Let cuDNN choose the fastest convolutions'),
        click.option('--wandb', metavar='PROJECT', help='Log to Weights & Biases too, if installed'),
        click.option('-n', '--dry-run', is_flag=True, help='Print the settings and exit'),
    ]):
        function = option(function)
    return function


def choose_precision(precision, fp16) -> str:
    """--precision, or what --fp16 says, or what suits the machine."""
    if precision is None:
        precision = 'fp16' if (torch.cuda.is_available() if fp16 is None else fp16) else 'fp32'
    elif fp16 is not None and fp16 != (precision == 'fp16'):
        raise UserError(f'--fp16={fp16} contradicts --precision={precision}; give one of them')
    if precision == 'fp16' and not torch.cuda.is_available():
        raise UserError('fp16 needs a GPU; on the CPU train with --precision=fp32 or bf16')
    return precision


def prepare_device(config: dict) -> torch.device:
    """The device of this process, set up by --bench."""
    torch.backends.cudnn.benchmark = config['bench']
    return dist.get_device()


def open_data(data: str, cond: bool, **options):
    """(data set, encoder, arguments of build_network that follow from them); `options` go to ImageDataset.

    Raises UserError where they do not fit together.
    """
    dataset = ImageDataset(data, use_labels=cond, **options)
    if cond and not dataset.has_labels:
        raise UserError(f'--data={data} has no labels; train without them: --cond=False')
    encoder = make_encoder(encoder_for(dataset))
    channels, resolution, _ = encoder.latent_shape(dataset.image_shape)
    return dataset, encoder, dict(img_resolution=resolution, img_channels=channels, label_dim=dataset.label_dim)


def run(net, objective, batches, optimizer, lr, ema, config: dict, network: dict, loop_config: loop.LoopConfig, *,
        identity: dict | None = None, sampler: dict | None = None, snapshot: dict | None = None):
    """Trains (see `training.loop.Trainer`), with the files and checks that all recipes share.

    config    settings for training_options.json and the snapshots; `network`: arguments of build_network
    identity  more that a checkpoint must agree with, by option
    sampler   setting of the sampler, kept in snapshots (default: of the network's family)
    snapshot  more keywords of `save_snapshot`
    """
    dataset, encoder, run_dir = batches.dataset, batches.encoder, loop_config.run_dir

    def sample_grid(nimg, nets):
        save_sample_grid(os.path.join(run_dir, f'samples-{nimg // 1000:07d}.png'), nets[0], encoder, dataset,
                         sampler=sampler)

    parameters = sum(p.numel() for p in net.parameters())
    dist.print0(f'Data: {dataset.name}, {len(dataset)} images {dataset.image_shape}, {network["label_dim"]} classes\n'
                f'Network: {parameters / 1e6:.2f}M parameters, {config["precision"]}, on {batches.device.type}, '
                f'{dist.get_world_size()} process(es), batch {config["batch"]}\nRun: {run_dir}')
    architecture = {key: value for key, value in network.items() if key != 'precision'}
    trainer = loop.Trainer(
        net, objective, batches, optimizer, lr, ema, loop_config,
        snapshot=dict(encoder=encoder, dataset=dataset.description(), recipe=config, sampler=sampler) | (snapshot or {}),
        identity={'network': architecture, 'data set': [dataset.name, len(dataset)], '--batch': config['batch'],
                  '--seed': config['seed']} | (identity or {}),
        options=config | dict(world_size=dist.get_world_size(), dataset=dataset.description(), parameters=parameters,
                              network=network),
        on_snapshot=sample_grid)
    return trainer.run()
