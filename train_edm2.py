"""Train diffusion models with the EDM2 recipe, on pixels or on latents."""

import click

from dnnlib import UserError, cli, lazy, options
from dnnlib.options import boolean, choice, integer, nimg, number, text
from dnnlib.util import renamed_fields
from training.presets import PRESETS, augmented, listing, rampup

with lazy.imports(__name__ == '__main__'):
    from metrics.scoring import Scorer
    from torch_utils import distributed as dist
    from training import recipe, runs
    from training.checkpoint import Checkpoints
    from training.data.batches import DatasetBatches
    from training.diffusion.augment import edm_augmentation
    from training.diffusion.losses import EDM2Loss
    from training.watch import Watch

from metrics import compute

# Options that are arguments of the network too.
SHAPE = ('channel_mult', 'num_blocks', 'attn_resolutions')


def build_config(opts: dict) -> dict:
    """All settings of a run, from the preset and the options that override it."""
    given = {key: value for key, value in opts.items() if value is not None}
    config = opts | PRESETS[opts['preset']] | given
    config['precision'] = recipe.choose_precision(opts['precision'], opts['fp16'])
    config['network'] = augmented(config, dict(
        class_name='Precond', model_channels=config['channels'], dropout=config['dropout'],
        precision=config['precision'], **config['network'] | {
            key: given[key] for key in SHAPE if key in given}))
    config['rampup_Mimg'] = given.get('rampup', rampup(opts['preset'], config['duration']))
    return config


def follow_run(config: dict, outdir: str):
    """A run that goes on keeps the ramp-up that it began with, unless the option sets it; says
    what it is where it is not the preset's.
    """
    preset = PRESETS[config['preset']]['rampup_Mimg']
    share = 1e6 / config['duration']
    if config['rampup'] is None:
        config['rampup_Mimg'] = runs.option_of(Checkpoints, outdir, 'rampup_Mimg',
                                               config['rampup_Mimg'], preset)
    length = config['rampup_Mimg']
    if config['rampup'] is None and length != preset:
        dist.print0(f'The learning rate rises over {length:.4g} million images, '
                    f'{length * share:.0%} of this run, instead of the {preset} of the preset '
                    '(--rampup=MIMG sets them)')
    if length * share > 1:
        dist.print0(f'Note: the learning rate rises over {length:.4g} million images, more than '
                    f'there are: it ends at {1 / length / share:.0%} of --lr={config["lr"]}')


def settings(args: list[str]) -> dict:
    """The settings that the options of a command line make; for scripts that call `train`."""
    return build_config(options.training_values(main, args))


def prepare(config: dict, outdir: str):
    """(data set, encoder, recipe); raises UserError where the settings do not fit together."""
    dataset, encoder, shape = recipe.open_data(config['data'], config['cond'],
                                               xflip=config['xflip'],
                                               channels=runs.channels_of(outdir))
    if config['augment'] and encoder.name != 'rgb':
        raise UserError('changes pixels; latents cannot be turned and shifted: train with 0',
                        'augment', config['augment'])
    # Of earlier versions, which had neither, the recipes have no such fields.
    mirrored = {'xflip': True} if config['xflip'] else {}
    augment = {'augment': config['augment']} if config['augment'] else {}
    return dataset, encoder, recipe.Recipe.of(
        config, total_nimg=config['duration'], dataset=dataset.description() | mirrored,
        order={'name': 'epoch'}, network=config['network'] | shape,
        loss={'name': 'edm2', 'P_mean': config['P_mean'], 'P_std': config['P_std']} | augment,
        optim={'name': 'Adam', 'betas': (0.9, 0.99), 'eps': 1e-8},
        learning_rate={'name': config['lr_schedule']} | {
            key: config[key] for key in ('lr', 'decay', 'rampup_Mimg')},
        averages={'name': 'power', 'stds': config['ema_stds']}, encoder=encoder.config(),
        sampler={'name': 'edm2'})


def train(config: dict, outdir: str, **running) -> bool:
    """Trains by the settings; `running` goes to `recipe.fit`. Returns whether they came to
    the end."""
    dist.init(config['precision'])
    follow_run(config, outdir)
    with renamed_fields(learning_rate='lr_schedule', rampup_Mimg='rampup', stds='ema_stds',
                        model_channels='channels'):
        dataset, encoder, plan = prepare(config, outdir)
        net = recipe.new_network(plan, running)
        _, *blocks = net.unet.enc.values()
        if config['attn_resolutions'] and not any(block.num_heads for block in blocks):
            dist.print0('Note: no block of the encoder has attention: --attn-resolutions='
                        f'{",".join(map(str, config["attn_resolutions"]))} names none of its '
                        'resolutions, or they have too few channels')
        loss = EDM2Loss(config['P_mean'], config['P_std'], net.sigma_data,
                        augment=edm_augmentation(config['augment']))
        batches = DatasetBatches(dataset, encoder, dist.get_device(), config['seed'])
        grids = recipe.sample_grids(outdir, encoder, plan)
        return recipe.fit(plan, outdir, net, loss, batches, options=config, outputs=[grids],
                          advice='python generate_images.py --net={snapshot} --seeds=0-63 '
                          '--grid=samples.png', **running)


def show_presets(ctx, _, value):
    """Callback of --preset."""
    if value == 'help':
        click.echo('\n'.join(listing()))
        ctx.exit()
    return value


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
    text('NAME', '--preset', 'Settings that the options below override; help lists them: '
         + ', '.join(PRESETS), type=click.Choice([*PRESETS, 'help']), default='edm2-img512-s',
         is_eager=True, callback=show_presets),
    nimg('--duration', None, 'Training images in all' + OF_PRESET),
    nimg('--batch', None, 'Images of one step' + OF_PRESET),
    integer('--channels', None, 'Width of the network' + OF_PRESET),
    options.architecture(*['of the preset'] * 3),
    number('--dropout', None, 'Dropout probability' + OF_PRESET, options.BELOW_ONE),
    options.variety(None, None, None, OF_PRESET),
    text('LIST', '--ema-stds', 'Relative widths of the averages of weights' + OF_PRESET,
         type=options.STDS),
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
    options.watching(compute.parse_metrics),
    nimg('--status', None, 'Report every NIMG images, 0 = never  [default: 128Ki]'),
    nimg('--snapshot', None, 'Save networks every NIMG images, 0 = never  [default: 8Mi]'),
    nimg('--checkpoint', None, 'Save the state every NIMG images, 0 = never  [default: 128Mi]'),
    integer('--seed', 0, 'Seed of weights, data order and noise', 0))
def main(outdir, running, watching, **opts):
    """Train a diffusion model with the EDM2 recipe.

    On one process, or under torchrun on any number of GPUs; the result does not depend on the
    number of processes. NIMG takes suffixes: 64Ki, 16Mi, 1.5Gi.
    """
    train(build_config(opts), outdir, watch=Watch(Scorer, **watching), **running)
    dist.shutdown()


if __name__ == '__main__':
    main()
