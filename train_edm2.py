"""Train diffusion models with the EDM2 recipe, on pixels or on latents."""

import json

import click

from dnnlib import cli, options
from dnnlib.options import boolean, choice, integer, nimg, number, text
from dnnlib.util import renamed_fields
from torch_utils import distributed as dist
from training import recipe
from training.data.batches import DatasetBatches
from training.diffusion.losses import EDM2Loss

# Width of the network and dropout for each size.
SIZES = {'xxs': (64, 0.0), 'xs': (128, 0.0), 's': (192, 0.0), 'm': (256, 0.1), 'l': (320, 0.1),
         'xl': (384, 0.1), 'xxl': (448, 0.1)}


def _preset(size: str, duration: int, lr: float, decay: int, **others) -> dict:
    """Settings for `duration` images; `others` are those that differ from most presets'."""
    channels, dropout = SIZES[size]
    return dict(
        duration=duration, batch=2048, channels=channels, dropout=dropout, lr=lr, decay=decay,
        lr_schedule='edm2', rampup_Mimg=10, ema_stds=[0.05, 0.10], P_mean=-0.4, P_std=1.0,
        status=128 << 10, snapshot=8 << 20, checkpoint=128 << 20, network={}) | others


# Published EDM2 (arXiv 2312.02696, Table 6): latents of 512x512, then pixels of 64x64.
PRESETS = {f'edm2-img512-{size}': _preset(size, mimg << 20, lr, 70000) for size, mimg, lr in [
    ('xxs', 2048, 0.0170),
    ('xs', 2048, 0.0120),
    ('s', 2048, 0.0100),
    ('m', 2048, 0.0090),
    ('l', 1792, 0.0080),
    ('xl', 1280, 0.0070),
    ('xxl', 896, 0.0065),
]} | {f'edm2-img64-{size}': _preset(size, mimg << 20, lr, 35000, P_mean=-0.8, P_std=1.6)
      for size, mimg, lr in [
    ('xs', 1024, 0.0120),
    ('s', 1024, 0.0100),
    ('m', 2048, 0.0090),
    ('l', 1024, 0.0080),
    ('xl', 640, 0.0070),
]}
# Multi-source study (arXiv 2502.14583): latents of 256x256; classes, images of each class.
PRESETS |= {f'edm2-img256-xs-{data}': _preset('xs', mimg << 20, lr, decay,
                                              lr_schedule='multisource')
            for data, mimg, lr, decay in [
    ('1c-100', 48, 0.004, 4000),
    ('1c-500', 128, 0.004, 2000),
    ('1c-1000', 176, 0.005, 2500),
    ('3c-100', 64, 0.002, 2000),
    ('3c-500', 64, 0.002, 2500),
    ('3c-1000', 64, 0.002, 2500),
    ('5c-100', 64, 0.004, 4000),
    ('5c-500', 128, 0.006, 4000),
    ('5c-1000', 96, 0.006, 4000),
    ('10c-100', 64, 0.003, 3000),
    ('10c-500', 96, 0.003, 3000),
    ('10c-1000', 384, 0.006, 3000),
    ('10c-1000-nlr', 1536, 0.004, 6000),
]}
# A network for 8x8 digits that a CPU trains in minutes (bash_files/quickstart.sh).
PRESETS['digits'] = _preset(
    'xxs', 72 << 10, 0.0150, 300, batch=64, channels=32, P_std=1.2, rampup_Mimg=0.02,
    status=8 << 10, snapshot=72 << 10, checkpoint=24 << 10,
    network=dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=32))


def build_config(opts: dict) -> dict:
    """All settings of a run, from the preset and the options that override it."""
    given = {key: value for key, value in opts.items() if value is not None}
    config = opts | PRESETS[opts['preset']] | given
    config['precision'] = recipe.choose_precision(opts['precision'], opts['fp16'])
    config['network'] = dict(
        class_name='Precond', model_channels=config['channels'], dropout=config['dropout'],
        precision=config['precision'], **config['network'])
    return config


def settings(args: list[str]) -> dict:
    """The settings that the options of a command line make; for scripts that call `train`."""
    return build_config(options.training_values(main, args))


def prepare(config: dict):
    """(data set, encoder, recipe); raises UserError where the settings do not fit together."""
    dataset, encoder, shape = recipe.open_data(config['data'], config['cond'])
    return dataset, encoder, recipe.Recipe.of(
        config, total_nimg=config['duration'], dataset=dataset.description(),
        order={'name': 'epoch'}, network=config['network'] | shape,
        loss={'name': 'edm2', 'P_mean': config['P_mean'], 'P_std': config['P_std']},
        optim={'name': 'Adam', 'betas': (0.9, 0.99), 'eps': 1e-8},
        learning_rate={'name': config['lr_schedule']} | {
            key: config[key] for key in ('lr', 'decay', 'rampup_Mimg')},
        averages={'name': 'power', 'stds': config['ema_stds']}, encoder=encoder.config(),
        sampler={'name': 'edm2'})


def train(config: dict, outdir: str, **running) -> int:
    """Trains by the settings; `running` goes to `recipe.fit`. Returns the images seen."""
    dist.init(config['precision'])
    dataset, encoder, plan = prepare(config)
    net = recipe.new_network(plan)
    loss = EDM2Loss(config['P_mean'], config['P_std'], net.sigma_data)
    batches = DatasetBatches(dataset, encoder, dist.get_device(), config['seed'])
    grids = recipe.sample_grids(outdir, encoder, dataset, plan)
    with renamed_fields(learning_rate='lr_schedule'):
        return recipe.fit(plan, outdir, net, loss, batches, options=config, callbacks=[grids],
                          **running)


OF_PRESET = '  [default: of the preset]'
EXAMPLES = """\b
Examples:
  # A small class-conditional model of handwritten digits, on any CPU
  python dataset_tool.py convert --source=digits --dest=datasets/digits.zip
  python train_edm2.py --outdir=training-runs/digits --data=datasets/digits.zip --preset=digits
\b
  # Ten classes of ImageNet latents, 1000 images each, on 8 GPUs
  torchrun --nproc_per_node=8 train_edm2.py --outdir=training-runs/sim3-10c-1000 --batch=8192 \\
      --data=datasets/latent_datasets/sim3/inet-256-10c-1000.zip --preset=edm2-img256-xs-10c-1000
\b
The same command resumes an interrupted run from its newest whole checkpoint."""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.training(
    'Folder of the run: results, and where to resume from',
    boolean('--cond', True, 'Train on class labels'),
    text('NAME', '--preset', 'Settings that the options below override; one of '
         + ', '.join(PRESETS), type=click.Choice(list(PRESETS)), default='edm2-img512-s'),
    nimg('--duration', None, 'Training images in all' + OF_PRESET),
    nimg('--batch', None, 'Images of one step' + OF_PRESET),
    integer('--channels', None, 'Width of the network' + OF_PRESET),
    number('--dropout', None, 'Dropout probability' + OF_PRESET, options.BELOW_ONE),
    number('--P_mean P_mean', None, 'Mean of ln(sigma)' + OF_PRESET, options.ANY),
    number('--P_std P_std', None, 'Standard deviation of ln(sigma)' + OF_PRESET),
    number('--lr', None, 'Reference learning rate' + OF_PRESET),
    text('BATCHES', '--decay', 'Steps after which the rate decays, 0 = never' + OF_PRESET,
         type=options.NOT_NEGATIVE),
    choice('--lr-schedule', None, 'multisource halves the rate when decay starts  '
           '[default: multisource for img256, else edm2]', ['edm2', 'multisource']),
    options.precision('Type of the activations  [default: fp16 on a GPU, else fp32]'),
    boolean('--fp16', None, '--precision=fp16 or fp32'),
    options.compiled,
    nimg('--status', None, 'Report every NIMG images, 0 = never  [default: 128Ki]'),
    nimg('--snapshot', None, 'Save networks every NIMG images, 0 = never  [default: 8Mi]'),
    nimg('--checkpoint', None, 'Save the state every NIMG images, 0 = never  [default: 128Mi]'),
    integer('--seed', 0, 'Seed of weights, data order and noise', 0))
def main(outdir, dry_run, wandb, allow_changes, **opts):
    """Train a diffusion model with the EDM2 recipe.

    On one process, or under torchrun on any number of GPUs; the result does not depend on the
    number of processes. NIMG takes suffixes: 64Ki, 16Mi, 1.5Gi.
    """
    config = build_config(opts)
    if dry_run:
        network = prepare(config)[2].network
        print(json.dumps(config | dict(outdir=outdir, network=network), indent=2))
        return
    train(config, outdir, wandb=wandb, allow_changes=allow_changes)
    dist.shutdown()


if __name__ == '__main__':
    main()
