"""Train diffusion models with the EDM recipe, for as long as the size of the data set says."""

import dataclasses
import os
import re
import secrets
import shlex

import click

from dnnlib import UserError, cli, lazy, options
from dnnlib.options import boolean, choice, integer, integers, mimg, nimg, number, text
from dnnlib.url import is_url
from dnnlib.util import renamed_fields
from training.schedules import EMA_MODES, memorization_scaling

with lazy.imports(__name__ == '__main__'):
    from metrics.scoring import Scorer
    from torch_utils import distributed as dist
    from training import recipe, runs
    from training.checkpoint import Checkpoints
    from training.data.batches import DatasetBatches
    from training.data.sampler import WindowShuffle
    from training.diffusion.augment import edm_augmentation
    from training.diffusion.losses import LOSSES
    from training.networks.layers import sides
    from training.watch import Watch

from metrics import compute

# The published architectures (arXiv 2206.00364, Table 1 and Appendix F); options override widths,
# blocks, attention and embedding.
_SONG = dict(model_type='SongUNet', decoder_type='standard', model_channels=128,
             channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16])
ARCHITECTURES = {
    'ddpmpp': _SONG | dict(embedding_type='positional', encoder_type='standard',
                           channel_mult_noise=1, resample_filter=[1, 1]),
    'ncsnpp': _SONG | dict(embedding_type='fourier', encoder_type='residual',
                           channel_mult_noise=2, resample_filter=[1, 3, 3, 1]),
    'adm': dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4],
                num_blocks=3, attn_resolutions=[32, 16, 8]),
}
# Name of the loss -> class of the network, sampler.
PRECONDITIONINGS = {
    'vp': ('VPPrecond', 'edm'),
    've': ('VEPrecond', 'edm'),
    'edm': ('EDMPrecond', 'edm'),
    'flow': ('FlowPrecond', 'flow'),
}
# What fields of the recipe are called among the options.
OPTION_NAMES = dict(optim='optimizer', mode='ema_mode', halflife_kimg='ema', rampup_kimg='rampup',
                    class_name='precond', model_type='arch', model_channels='num_channels',
                    embedding_type='embed')
# Argument of the network -> option that sets it.
OVERRIDES = dict(dropout='dropout', precision='precision', channel_mult='cres',
                 num_blocks='num_blocks', attn_resolutions='attn_resolutions',
                 embedding_type='embed', skip_connections='skip_connections')
# Options that count only together with another: (option, other option, its values).
DEPENDENT = [
    ('momentum', 'optimizer', ['SGD']),
    ('final_ema', 'ema_mode', ['mode4']),
    ('ema', 'ema_mode', ['mode1', 'mode2', 'mode4']),
    ('embed', 'arch', ['ddpmpp', 'ncsnpp']),
]


def build_config(opts: dict) -> dict:
    """All settings of a run, from the options (by their names in `main`)."""
    precision = opts['precision']
    config = dict(opts, precision=recipe.choose_precision(
        precision, opts['fp16'] or (False if precision is None else None)))
    width = config['num_channels'] or config['cbase']
    if config['cbase'] not in (None, width):
        raise UserError(f'contradicts --num-channels={width}; give one of them', 'cbase',
                        config['cbase'])
    augment = edm_augmentation(config['augment'])
    network = {key: config[option] for key, option in OVERRIDES.items()} | dict(
        class_name=PRECONDITIONINGS[config['precond']][0], model_channels=width,
        augment_dim=augment and augment.label_dim)
    published = ARCHITECTURES[config['arch']]
    network = {key: value for key, value in network.items() if value is not None}
    if 'embedding_type' not in published:
        del network['embedding_type']
    return config | {'network': published | network}


def schedule(config: dict, num_images: int) -> dict:
    """Length of the run, EMA half-life and learning-rate ramp in kimg, and 50,000 / size."""
    size = num_images if config['duration_rule'] == 'scaled' else 50_000
    # Rounded down to thousands of images, but 0.018 million are 18, whatever their product is.
    lengths = memorization_scaling(size, *(
        config[name] * (1 + 1e-12) for name in ('duration', 'ema', 'rampup')))
    # The average of transferred weights starts from them, not from nothing.
    return lengths | ({'ema_rampup_ratio': 0} if config['transfer'] else {})


def prepare(config: dict, channels: int | None = None):
    """(data set, encoder, recipe, schedule); raises UserError where they do not fit together.
    `channels` is what `runs.channels_of` the run's folder says.
    """
    dataset, encoder, shape = recipe.open_data(
        config['data'], config['cond'], xflip=config['xflip'], cache=config['cache'],
        channels=channels)
    network = config['network'] | shape
    _, height, width = dataset.image_shape
    side = min(sides(shape['img_resolution']))
    levels = [side >> level for level in range(len(network['channel_mult']))]
    if levels[-1] < 1:
        raise UserError(f'{len(levels)} resolutions are too many for images of '
                        f'{width}x{height} pixels', 'cres')
    if config['attn_resolutions'] and not set(levels) & set(config['attn_resolutions']):
        dist.print0('Note: --attn-resolutions names none of the resolutions of this network: '
                    f'{levels}')
    if network['model_channels'] % 2:
        raise UserError('must be even', 'num_channels', network['model_channels'])
    unset = {param.name: param.default for param in main.params}
    for name, other, values in DEPENDENT:
        if config[name] != unset[name] and config[other] not in values:
            dist.print0(f'Note: --{name.replace("_", "-")}={config[name]} has no effect without '
                        f'--{other}={" or ".join(values)}')
    lengths = schedule(config, len(dataset))
    tick = round(config['tick'] * 1000)
    momentum = {'momentum': config['momentum']} if config['optimizer'] == 'SGD' else {}
    rampup = {'rampup_ratio': 0} if config['transfer'] else {}
    rules = recipe.Recipe.of(
        config, total_nimg=lengths['total_kimg'] * 1000, seed=config['seed'] or 0,
        dataset=dataset.description() | {'xflip': config['xflip']},
        order={'name': 'window', 'window_size': config['window_size']}, network=network,
        loss={'name': config['precond'], 'augment': config['augment']},
        optim={'name': config['optimizer'], 'weight_decay': config['weight_decay'], **momentum},
        learning_rate={'name': 'edm', 'lr': config['lr'],
                       'rampup_kimg': lengths['lr_rampup_kimg']},
        averages={'name': 'memorization', 'mode': config['ema_mode'],
                  'final_ema': config['final_ema'],
                  'halflife_kimg': lengths['ema_halflife_kimg'],
                  'data_ratio': lengths['data_ratio'], **rampup},
        encoder=encoder.config(), sampler={'name': PRECONDITIONINGS[config['precond']][1]},
        bad_gradients=(0, 1e5, -1e5), snapshot_dtype='float32', status=tick,
        snapshot=config['snap'] * tick, checkpoint=config['dump'] * tick)
    return dataset, encoder, rules, lengths


def run_name(config: dict, dataset, desc: str | None) -> str:
    """Name of the run's folder after its number."""
    parts = [dataset.name, 'cond' if dataset.has_labels else 'uncond', config['arch'],
             config['precond'], f'gpus{dist.get_world_size()}', f'batch{config["batch"]}',
             config['precision'], desc]
    return '-'.join(filter(None, parts))


def choose_run(config: dict, outdir: str, name: str, nosubdir: bool, lengths: dict,
               measured: bool = False):
    """(folder, checkpoint to start from or None, seed) of the run. Nothing is written.

    Without --resume that is the newest run of this name and these options that is not finished,
    else a new one.
    """
    resume = config['resume']
    seed = config['seed']
    folder = outdir if nosubdir else None
    if resume and os.path.isdir(resume):
        if not Checkpoints(resume).numbers():
            raise UserError('holds no training-state-NNNNNNN.pt of this project; of a run of EDM, '
                            'give the file', 'resume', resume)
        folder = resume
        resume = None
    if folder is None:
        # The embedding is compared as part of the network: earlier versions had other defaults.
        wanted = {key: value for key, value in (config | {'schedule': lengths}).items()
                  if key not in ('embed', 'keep_checkpoints', 'nan_patience', 'shard')
                  and (key, value) != ('seed', None)}
        folder = runs.choose_folder(outdir, name, wanted, lengths['total_kimg'],
                                    config['snap'] > 0, config['dump'] > 0, measured)
    if seed is None:
        seed = runs.read_options(folder).get('seed')
    if seed is None and resume:
        seed = recipe.seed_of(Checkpoints('').load(resume))
    if seed is None:
        seed = secrets.randbits(31)
    return folder, resume, seed


def train(config: dict, outdir: str, desc=None, nosubdir: bool = False, **running) -> str:
    """Trains by the settings; `running` goes to `recipe.fit`. Returns the run's folder."""
    dist.init(config['precision'])
    dataset, encoder, rules, lengths = prepare(config)
    name = run_name(config, dataset, desc)
    run_dir, resume_from, seed = dist.broadcast_object(
        choose_run(config | {'dataset': {'fingerprint': dataset.fingerprint}}, outdir, name,
                   nosubdir, lengths, bool(running.get('watch')))
        if dist.get_rank() == 0 else None)
    channels = dist.broadcast_object(
        runs.channels_of(os.path.dirname(resume_from) if resume_from else run_dir))
    if channels not in (None, rules.network['img_channels']):
        dataset, encoder, rules, lengths = prepare(config, channels)
    rules = dataclasses.replace(rules, seed=seed)
    net = recipe.new_network(rules, running)
    batches = DatasetBatches(
        dataset, encoder, dist.get_device(), seed, workers=config['workers'],
        resident=config['cache'],
        order=WindowShuffle(len(dataset), seed, window=config['window_size']))
    loss = LOSSES[config['precond']](augment=edm_augmentation(config['augment']))
    with renamed_fields(**OPTION_NAMES):
        recipe.fit(rules, run_dir, net, loss, batches, resume_from=resume_from,
                   options=config | dict(seed=seed, schedule=lengths, name=name),
                   outputs=[recipe.sample_grids(run_dir, encoder, rules)],
                   advice='python calculate_metrics.py memorization --net={snapshot} --data='
                   + shlex.quote(config['data']), **running)
    return run_dir


def parse_skips(text: str) -> list[int]:
    """'[1, 0, 1]', '1,0,1' or '101' -> [1, 0, 1]."""
    if re.search(r'[^01 ,[\]()]', text):
        raise ValueError(f'{text!r} is no list of 0 and 1; write e.g. [1,0,1,1]')
    return [int(digit) for digit in re.findall('[01]', text)]


def settings(args: list[str]) -> dict:
    """The settings that the options of a command line make; for scripts that call `train`."""
    return build_config(options.training_values(main, args))


EXAMPLES = """\b
Examples:
  # 2000 pictures of CIFAR-10 at 16x16, on 8 GPUs
  torchrun --standalone --nproc_per_node=8 train.py --outdir=runs \\
      --data=datasets/cifar10/data_dimension/cifar10-16x16-2000.zip --cond=0 --arch=ddpmpp \\
      --precond=vp --augment=0.0 --window-size=0.0 --seed=1024 --duration=2000 --num-blocks=2 \\
      --num-channels=128 --lr=2e-4 --attn-resolutions=8
\b
  # On a CPU: handwritten digits, a small network, 300,000 images
  python train.py --outdir=runs --data=datasets/digits.zip --duration=0.3 --duration-rule=fixed \\
      --rampup=0.02 --batch=128 --num-channels=32 --num-blocks=1 --cres=1,2 --augment=0 \\
      --ema_mode=mode1 --tick=20 --snap=5 --dump=5
\b
A run is OUTDIR/00000-DATA-uncond-ddpmpp-vp-gpus8-batch512-fp32, each with the next number. The
same command goes on with the newest run of that name and these options that is not finished."""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.training(
    'Folder of runs; each gets a numbered folder in it',
    boolean('--cond', False, 'Train on class labels'),
    choice('--arch', 'ddpmpp', 'Network', ARCHITECTURES),
    choice('--precond', 'edm', 'Preconditioning and loss', PRECONDITIONINGS),
    mimg('--duration', 200, 'Millions of training images if there are 50,000 different ones',
         options.POSITIVE),
    choice('--duration-rule', 'scaled', 'scaled: --duration, --ema and --rampup shrink with the '
           'data set, so that each image is seen as often; fixed: they count as they are',
           ['scaled', 'fixed']),
    nimg('--batch', 512, 'Images of one step'),
    integer('--cbase', None, 'Another name of --num-channels'),
    options.architecture('4; adm 3', '2,2,2; adm 1,2,3,4', '16; adm 32,16,8',
                         '--cres --channel-mult cres'),
    number('--lr', 10e-4, 'Learning rate'),
    mimg('--ema', 0.5, 'Half-life of the average of weights'),
    options.variety(xflip=False, augment=0.12, rampup=10),
    number('--dropout', 0.13, 'Dropout probability', options.BELOW_ONE),
    number('--window-size', 0.5, 'Share of the data within which its order changes, '
           '0 = one order for ever', options.FRACTION),
    integer('--num-channels', None, 'Width of the network  [default: 128; adm 192]'),
    choice('--embed', 'positional', 'Embedding of noise levels in ddpmpp and ncsnpp (published '
           'NCSN++: fourier)', ['positional', 'fourier']),
    choice('--ema_mode', 'mode2', "Average of weights. mode1: EDM's, --ema for each image; mode2: "
           'for 512 images, relative to the size of the data; mode3: half-life 0.5 Mimg whatever '
           'the data; mode4: as mode2, towards --final-ema', EMA_MODES),
    number('--final-ema', 0.99929, 'Factor of each step that mode4 ends with (at batch 512)',
           options.BELOW_ONE),
    integers('--skip-connections', None, '0 or 1 for each layer of the encoder, from the input '
             'down: (num_blocks + 1) x resolutions of them, e.g. [1,0,1,1,0,1]  [default: all 1]',
             cli.Parsed('list', parse_skips)),
    number('--weight-decay', 0.0, 'Weight decay of the optimizer', options.NOT_NEGATIVE),
    choice('--optimizer', 'Adam', 'Optimizer', ['Adam', 'SGD']),
    number('--momentum', 0.9, 'Of SGD', options.BELOW_ONE),
    boolean('--fp16', False, 'Half-precision activations'),
    options.precision('Type of the activations  [default: as --fp16 says]'),
    boolean('--cache', True, 'Keep the decoded images in memory'),
    integer('--workers', 1, 'Threads that read images'),
    text('STR', '--desc', "Words at the end of the folder's name"),
    click.option('--nosubdir', is_flag=True, help='Write to --outdir itself'),
    text('KIMG', '--tick', 'Report every KIMG thousand images', type=cli.Number(0.001),
         default=50),
    integer('--snap', 50, 'Save the network every so many ticks, 0 = never', 0),
    integer('--dump', 500, 'Save the training state every so many ticks, 0 = never', 0),
    options.compiled,
    options.watching(compute.parse_metrics),
    options.seed('--seed', None, 'Seed of weights, data order and noise  [default: random]'),
    text('PT|DIR', '--resume', 'DIR: go on with that run, in its folder; PT: a new run that goes '
         'on from this training state, also one of EDM. Without: the newest unfinished run of '
         'these options, if there is one', type=click.Path(exists=True)))
def main(outdir, desc, nosubdir, running, watching, **opts):
    """Train a diffusion model with the EDM recipe, for the study of memorization.

    On one process, or under torchrun on any number of GPUs; the result does not depend on the
    number of processes.
    """
    for key in ('data', 'transfer', 'resume'):
        if opts[key] and not is_url(opts[key]):
            opts[key] = opts[key].rstrip('/')
    if desc and '/' in desc:
        raise UserError('becomes part of a folder name; leave out the slash', 'desc', desc)
    train(build_config(opts), outdir, desc, nosubdir, watch=Watch(Scorer, **watching), **running)
    dist.shutdown()


if __name__ == '__main__':
    main()
