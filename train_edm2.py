"""Train diffusion models with the EDM2 recipe, on pixels or on latents."""

import json

import click

from dnnlib import UserError, cli, options
from dnnlib.options import boolean, choice, integer, nimg, number
from dnnlib.util import renamed_fields
from torch_utils import distributed as dist
from training import recipe
from training.data.batches import DatasetBatches
from training.diffusion.losses import EDM2Loss

# fmt: off
_KEYS = ('duration', 'batch', 'channels', 'lr', 'decay', 'dropout', 'P_mean', 'P_std')
PRESETS = {name: dict(zip(_KEYS, values, strict=True)) for name, values in {
    # Published EDM2 (arXiv 2312.02696, Table 6): latents of 512x512, then pixels of 64x64.
    'edm2-img512-xxs': (2048 << 20, 2048,  64, 0.0170, 70000, 0.00, -0.4, 1.0),
    'edm2-img512-xs':  (2048 << 20, 2048, 128, 0.0120, 70000, 0.00, -0.4, 1.0),
    'edm2-img512-s':   (2048 << 20, 2048, 192, 0.0100, 70000, 0.00, -0.4, 1.0),
    'edm2-img512-m':   (2048 << 20, 2048, 256, 0.0090, 70000, 0.10, -0.4, 1.0),
    'edm2-img512-l':   (1792 << 20, 2048, 320, 0.0080, 70000, 0.10, -0.4, 1.0),
    'edm2-img512-xl':  (1280 << 20, 2048, 384, 0.0070, 70000, 0.10, -0.4, 1.0),
    'edm2-img512-xxl': ( 896 << 20, 2048, 448, 0.0065, 70000, 0.10, -0.4, 1.0),
    'edm2-img64-xs':   (1024 << 20, 2048, 128, 0.0120, 35000, 0.00, -0.8, 1.6),
    'edm2-img64-s':    (1024 << 20, 2048, 192, 0.0100, 35000, 0.00, -0.8, 1.6),
    'edm2-img64-m':    (2048 << 20, 2048, 256, 0.0090, 35000, 0.10, -0.8, 1.6),
    'edm2-img64-l':    (1024 << 20, 2048, 320, 0.0080, 35000, 0.10, -0.8, 1.6),
    'edm2-img64-xl':   ( 640 << 20, 2048, 384, 0.0070, 35000, 0.10, -0.8, 1.6),
    # Multi-source study (arXiv 2502.14583): latents of 256x256; classes, images of each class.
    'edm2-img256-xs-1c-100':       (  48 << 20, 2048, 128, 0.004, 4000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-1c-500':       ( 128 << 20, 2048, 128, 0.004, 2000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-1c-1000':      ( 176 << 20, 2048, 128, 0.005, 2500, 0.00, -0.4, 1.0),
    'edm2-img256-xs-3c-100':       (  64 << 20, 2048, 128, 0.002, 2000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-3c-500':       (  64 << 20, 2048, 128, 0.002, 2500, 0.00, -0.4, 1.0),
    'edm2-img256-xs-3c-1000':      (  64 << 20, 2048, 128, 0.002, 2500, 0.00, -0.4, 1.0),
    'edm2-img256-xs-5c-100':       (  64 << 20, 2048, 128, 0.004, 4000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-5c-500':       ( 128 << 20, 2048, 128, 0.006, 4000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-5c-1000':      (  96 << 20, 2048, 128, 0.006, 4000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-10c-100':      (  64 << 20, 2048, 128, 0.003, 3000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-10c-500':      (  96 << 20, 2048, 128, 0.003, 3000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-10c-1000':     ( 384 << 20, 2048, 128, 0.006, 3000, 0.00, -0.4, 1.0),
    'edm2-img256-xs-10c-1000-nlr': (1536 << 20, 2048, 128, 0.004, 6000, 0.00, -0.4, 1.0),
    # A network for 8x8 digits that a CPU trains in minutes (bash_files/quickstart.sh).
    'digits':                      (  72 << 10,   64,  32, 0.0150,  300, 0.00, -0.4, 1.2),
}.items()}
# fmt: on
for _name, _preset in PRESETS.items():
    _preset['lr_schedule'] = 'multisource' if 'img256' in _name else 'edm2'
PRESETS['digits'] |= dict(
    rampup_Mimg=0.02, ema_stds=[0.05, 0.10],
    intervals=dict(status=8 << 10, snapshot=72 << 10, checkpoint=24 << 10),
    network=dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=32))
INTERVALS = dict(status=128 << 10, snapshot=8 << 20, checkpoint=128 << 20)  # of all other presets


def build_config(opts: dict) -> dict:
    """All settings of a run, from the preset and the options that override it."""
    preset = PRESETS[opts['preset']]
    config = {key: opts[key] for key in
              ('preset', 'data', 'cond', 'seed', 'compile', *options.MACHINE)}
    for key in (*_KEYS, 'lr_schedule'):
        config[key] = preset[key] if opts[key] is None else opts[key]
    for key, default in (INTERVALS | preset.get('intervals', {})).items():
        config[key] = (default if opts[key] is None else opts[key]) or None     # 0 switches it off
    for key in ('batch', 'duration'):
        if config[key] < 1:
            raise UserError('must be at least 1', field=key, value=config[key])
    precision = recipe.choose_precision(opts['precision'], opts['fp16'])
    return config | dict(
        rampup_Mimg=preset.get('rampup_Mimg', 10), ema_stds=preset.get('ema_stds', [0.05, 0.10]),
        precision=precision,
        network=dict(class_name='Precond', model_channels=config['channels'],
                     dropout=config['dropout'], precision=precision, **preset.get('network', {})))


def prepare(config: dict):
    """(data set, encoder, recipe); raises UserError where the settings do not fit together."""
    dataset, encoder, shape = recipe.open_data(config['data'], config['cond'])
    return dataset, encoder, recipe.Recipe(
        batch=config['batch'], total_nimg=config['duration'], seed=config['seed'],
        dataset=dataset.description(), order={'name': 'epoch'}, network=config['network'] | shape,
        loss={'name': 'edm2', 'P_mean': config['P_mean'], 'P_std': config['P_std']},
        optim={'name': 'Adam', 'betas': (0.9, 0.99), 'eps': 1e-8},
        learning_rate={'name': config['lr_schedule'], 'lr': config['lr'], 'decay': config['decay'],
                       'rampup_Mimg': config['rampup_Mimg']},
        averages={'name': 'power', 'stds': config['ema_stds']}, encoder=encoder.config(),
        sampler={'name': 'edm2'},
        **{key: config[key] for key in
           ('status', 'snapshot', 'checkpoint', 'compile', *options.MACHINE)})


def train(config: dict, outdir: str, **running) -> int:
    """Trains by the settings; `running` goes to `recipe.fit`. Returns the images seen."""
    dist.init()
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
    click.option('--preset', metavar='NAME', type=click.Choice(list(PRESETS)),
                 default='edm2-img512-s',
                 help='Settings that the options below override; one of ' + ', '.join(PRESETS)),
    nimg('--duration', None, 'Training images in all' + OF_PRESET),
    nimg('--batch', None, 'Images of one step' + OF_PRESET),
    integer('--channels', None, 'Width of the network' + OF_PRESET),
    number('--dropout', None, 'Dropout probability' + OF_PRESET, options.BELOW_ONE),
    number('--P_mean P_mean', None, 'Mean of ln(sigma)' + OF_PRESET, float),
    number('--P_std P_std', None, 'Standard deviation of ln(sigma)' + OF_PRESET),
    number('--lr', None, 'Reference learning rate' + OF_PRESET),
    click.option('--decay', metavar='BATCHES', type=options.NOT_NEGATIVE,
                 help='Steps after which the rate decays, 0 = never' + OF_PRESET),
    choice('--lr-schedule', None, 'multisource halves the rate when decay starts  '
           '[default: multisource for img256, else edm2]', ['edm2', 'multisource']),
    choice('--precision', None, 'Type of the activations  [default: fp16 on a GPU, else fp32]',
           ['fp32', 'fp16', 'bf16']),
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
