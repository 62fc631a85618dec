"""Train diffusion models with the EDM2 recipe, on pixels or on latents."""

import click

from dnnlib import cli, lazy, options
from dnnlib.options import boolean, choice, integer, nimg, number, text
from dnnlib.util import renamed_fields, to_json
from training.presets import PRESETS

with lazy.imports(__name__ == '__main__'):
    from torch_utils import distributed as dist
    from training import recipe
    from training.data.batches import DatasetBatches
    from training.diffusion.losses import EDM2Loss



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


def train(config: dict, outdir: str, **running) -> bool:
    """Trains by the settings; `running` goes to `recipe.fit`. Returns whether they came to
    the end."""
    dist.init(config['precision'])
    dataset, encoder, plan = prepare(config)
    net = recipe.new_network(plan)
    loss = EDM2Loss(config['P_mean'], config['P_std'], net.sigma_data)
    batches = DatasetBatches(dataset, encoder, dist.get_device(), config['seed'])
    grids = recipe.sample_grids(outdir, encoder, dataset, plan)
    with renamed_fields(learning_rate='lr_schedule'):
        return recipe.fit(plan, outdir, net, loss, batches, options=config, outputs=[grids],
                          advice='python generate_images.py --net={snapshot} --seeds=0-63 '
                          '--grid=samples.png', **running)


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
        plan = prepare(config)[2]
        print(to_json(config | dict(outdir=outdir, network=plan.network,
                                    disk=recipe.disk_use(plan)), indent=2))
        return
    train(config, outdir, wandb=wandb, allow_changes=allow_changes)
    dist.shutdown()


if __name__ == '__main__':
    main()
