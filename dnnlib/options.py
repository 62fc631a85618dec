"""Options that several scripts have, each defined once.

`@group('name', *options)` gives a command the values of its options as one dictionary, so that a script hands them on
without knowing them. None is what was not given.
"""

import functools

import click

from dnnlib import cli

POSITIVE = click.FloatRange(0, min_open=True)
NOT_NEGATIVE = click.FloatRange(min=0)


def together(*options):
    """Decorator: the options of a command in the order in which --help shows them."""
    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function
    return decorate


def group(name: str, *options):
    """Decorator: click options whose values the command gets together, as the keyword `name`."""
    def decorate(function):
        @functools.wraps(function)
        def command(**values):
            return function(**{name: {key: values.pop(key) for key in keys}}, **values)

        keys = []
        for option in reversed(options):
            command = option(command)
            keys.append(command.__click_params__[-1].name)
        return command

    return decorate


def nimg(name: str, default: str | None, text: str):
    """An option for a number of training images, e.g. 64Ki."""
    return click.option(name, metavar='NIMG', type=cli.COUNT, default=default, help=text)


def boolean(name: str, default: bool, text: str):
    return click.option(name, metavar='BOOL', type=bool, default=default, help=text)


def number(name: str, default: float, text: str, type=POSITIVE):  # noqa: A002
    return click.option(name, metavar='FLOAT', type=type, default=default, help=text)


def integer(name: str, default: int | None, text: str, least: int = 1):
    return click.option(name, metavar='INT', type=click.IntRange(least), default=default, help=text)


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(','))
    except ValueError:
        raise ValueError(f'{text!r} is not two noise levels; write LO,HI, e.g. 0.2,2') from None
    return low, high


def _number(name, *, type=POSITIVE, of='network', **settings):  # noqa: A002
    """An option for a number that a sampler knows."""
    settings['help'] += f'  [default: of the {of}]'
    return click.option(*name.split(), metavar='FLOAT', type=type, **settings)


def _choice(name: str, values: str, text: str):
    return click.option(*name.split(), metavar=values, type=click.Choice(values.split('|')), help=text)


# What makes the images.
network = group(
    'network',
    click.option('--preset', metavar='NAME', help='Published network, guide and guidance (see generate_images.py --help)'),
    click.option('--net', metavar='FILE|URL',
                 help='Network of this project, EDM, EDM2, guided or class-balancing diffusion; or optimal:DATASET for '
                      'the closed-form denoiser of a data set'),
    click.option('--gnet', metavar='FILE|URL', help='Guiding network: unconditional, or a weaker one (autoguidance)'),
    click.option('--sha256', metavar='HEX', help='SHA-256 that the file of --net must have'),
    click.option('--gnet-sha256', metavar='HEX', help='SHA-256 that the file of --gnet must have'),
    click.option('--guidance', metavar='FLOAT', type=float,
                 help='Strength of guidance, 1 = none  [default: 1, or of the preset]'),
    click.option('--guidance-interval', metavar='LO,HI', type=cli.Parsed('interval', _interval),
                 help='Guide only where the noise level is above LO and at most HI  [default: everywhere]'),
    click.option('--model-url', metavar='NAME|DIR',
                 help='Autoencoder of latents: hub name or folder  [default: of the snapshot]'),
)

# How they are sampled. An option that the sampler does not know is refused.
sampling = group(
    'sampler',
    click.option('--sampler', 'name', metavar='NAME',
                 help='edm, edm2, ablation, dpmpp-2m, ddim or ddpm  [default: of the network; ablation with any of '
                      '--solver --disc --schedule --scaling]'),
    click.option('--steps', 'num_steps', metavar='INT', type=click.IntRange(min=1),
                 help='Sampling steps  [default: of the network, e.g. 18 with edm, 32 with edm2]'),
    _number('--sigma_min', help='Lowest noise level, at least that of the network'),
    _number('--sigma_max', help='Highest noise level, at most that of the network'),
    _number('--rho', help='Exponent of the time steps'),
    _number('--S_churn S_churn', type=NOT_NEGATIVE, help='Strength of added noise'),
    _number('--S_min S_min', type=NOT_NEGATIVE, help='Lowest level that gets noise'),
    _number('--S_max S_max', type=NOT_NEGATIVE, help='Highest level that gets noise'),
    _number('--S_noise S_noise', type=NOT_NEGATIVE, help='Inflation of added noise'),
    _choice('--solver', 'euler|heun', 'Ablation: solver'),
    _choice('--disc discretization', 'vp|ve|iddpm|edm', 'Ablation: time steps'),
    _choice('--schedule', 'vp|ve|linear', 'Ablation: noise schedule'),
    _choice('--scaling', 'vp|none', 'Ablation: signal scaling'),
    _number('--beta-d', of='ablation', help='Ablation: slope of the vp schedule'),
    _number('--beta-min', of='ablation', help='Ablation: start of the vp schedule'),
    _number('--epsilon-s', of='ablation', help='Ablation: last time of the vp time steps'),
    _number('--eta', type=NOT_NEGATIVE, help='DDIM: share of fresh noise, 0 = none, 1 = as much as DDPM'),
)


def seeds(default: str):
    return click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default=default,
                        help='Seeds, e.g. 1,2,5-10: one image each')


def batch(default: int):
    return click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=default,
                        help='Images at a time on each process')


image_class = click.option('--class', 'class_', metavar='CLASS',
                           help='Class: original index, name or wnid  [default: drawn from the seed]')


# --- Training -------------------------------------------------------------------------------------


def run_folder(outdir_help: str):
    """Decorator: --outdir and --data."""
    return together(
        click.option('--outdir', metavar='DIR', required=True, help=outdir_help),
        click.option('--data', metavar='ZIP|DIR', required=True,
                     help='Data set made by dataset_tool.py'))


MACHINE = ('batch_gpu', 'ls', 'bench')  # fields of a recipe that `machine` sets

batch_gpu = nimg('--batch-gpu', None, 'Images of one forward pass  [default: all of a process]')

# Decorator: how the work is done, and how it is reported.
machine = together(
    batch_gpu,
    click.option('--ls', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=1,
                 help='Loss scaling against underflow of float16 gradients'),
    click.option('--bench', metavar='BOOL', type=bool, default=True,
                 help='Let cuDNN choose the fastest convolutions'),
    click.option('--wandb', metavar='PROJECT', help='Log to Weights & Biases too, if installed'),
    click.option('--allow-changes', is_flag=True,
                 help='Go on with a run though its settings have changed; what has is logged'),
    click.option('-n', '--dry-run', is_flag=True, help='Print the settings and exit'))
