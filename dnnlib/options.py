"""Options that several scripts have, each defined once.

`@group('name', *options)` gives a command the values of its options as one dictionary, so that a
script hands them on without knowing them. None is what was not given.
"""

import functools
import os

import click

from dnnlib import budget, cli, npz, util

ANY = cli.Number()
POSITIVE = cli.Number(0, min_open=True)
NOT_NEGATIVE = cli.Number(min=0)


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

        command = together(*options)(command)
        keys = [option.name for option in command.__click_params__[-len(options):]]
        return command

    return decorate


FRACTION = cli.Number(0, 1)
BELOW_ONE = cli.Number(0, 1, max_open=True)


def _maker(metavar: str, type):  # noqa: A002
    """(name, default, text) -> option; a name may be '--option parameter'."""
    def make(name: str, default, text: str, type=type):  # noqa: A002
        return click.option(*name.split(), metavar=metavar, type=type, default=default, help=text)

    return make


nimg = _maker('NIMG', cli.COUNT)  # training images, e.g. 64Ki
boolean = _maker('BOOL', bool)
mimg = _maker('MIMG', NOT_NEGATIVE)  # millions of them
number = _maker('FLOAT', POSITIVE)
integers = _maker('LIST', cli.INT_LIST)
path = _maker('PATH', util.hide)
seed = _maker('INT', click.IntRange(0, 2**31 - 1))
count = _maker('INT', cli.COUNT)  # of anything else


def text(metavar: str, name: str, text: str, **settings):
    """An option for a name, a path or a URL."""
    settings.setdefault('type', util.hide)
    return click.option(*name.split(), metavar=metavar, help=text, **settings)


def integer(name: str, default: int | None, text: str, least: int = 1):
    return _maker('INT', click.IntRange(least))(name, default, text)


def choice(name: str, default: str | None, text: str, values):
    """One of several words."""
    return _maker('|'.join(values), click.Choice(list(values)))(name, default, text)


def _stds(text: str) -> list[float]:
    stds = list(map(cli.parse_number, text.split(',')))
    widest = 12 ** -0.5                                        # of the profile t^0 (phema)
    if not all(0 < std < widest for std in stds):
        raise ValueError(f'widths must lie between 0 and {widest:.3f}')
    if len({f'{std:.3f}' for std in stds}) < len(stds):
        raise ValueError('files are named by three digits of a width, and two are the same')
    return stds


STDS = cli.Parsed('list', _stds)                               # of power-function averages


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(cli.parse_number, text.split(','))
    except ValueError:
        raise ValueError(f'{text!r} is not two noise levels; write LO,HI, e.g. 0.2,2') from None
    return low, high


def _of_sampler(name: str, text: str, type=POSITIVE, of='network'):  # noqa: A002
    """An option for a number that a sampler knows."""
    return number(name, None, f'{text}  [default: of the {of}]', type)


allow_nonfinite = click.option('--allow-nonfinite', '--allow_nonfinite', is_flag=True,
                               help='Take a network of NaN and infinite weights too')


def _environment(variable: str, value_of):
    """Callback of an option: while its command runs, a variable of the environment, which child
    processes have too, says value_of(value); None: nothing.
    """
    def set_variable(ctx, _, value):
        if (text := value_of(value)) is not None:
            os.environ[variable] = text
            ctx.call_on_close(lambda: os.environ.pop(variable, None))

    return set_variable


# Of scripts that open snapshots, checkpoints, statistics or files of classes.
verify = click.option(
    '--verify', metavar='BOOL', type=bool, default=True, expose_value=False,
    callback=_environment(npz.UNVERIFIED, lambda value: None if value else '1'),
    help='Read files to the end and compare their checksums before use')


# Of scripts that make something of people's pictures.
pictures = together(
    click.option('--max-pixels', metavar='INT', type=cli.COUNT, expose_value=False,
                 callback=_environment(budget.PIXELS_VARIABLE,
                                       lambda value: None if value is None else str(value)),
                 help=f'Read pictures of at most so many pixels  [default: {budget.MAX_PIXELS}, '
                      'fewer of a small file]'),
    click.option('--follow-links', is_flag=True, expose_value=False,
                 callback=_environment(util.STAY_INSIDE, lambda value: None if value else '1'),
                 help='Read what links in a folder of pictures point to outside of it'))

# Networks whose features images are compared by, for `group`.
DETECTORS = ('inception', 'dinov2', 'dinov2_base', 'clip', 'pixels', 'own')
DETECTOR_FILES = (
    text('FILE|URL', '--inception', 'Weights of the FID network: pt_inception-2015-12-05 '
         'as torch, safetensors or TorchScript file',
         envvar='INCEPTION_WEIGHTS', show_envvar=True),
    text('HEX', '--inception-sha256', 'SHA-256 that this file must have'),
    text('DIR|NAME', '--dinov2', 'DINOv2 ViT-L/14: folder of transformers, or hub '
         'name[@revision]', envvar='DINOV2_WEIGHTS', show_envvar=True),
    text('DIR|NAME', '--dinov2-base', 'DINOv2 ViT-B/14, likewise', envvar='DINOV2_BASE_WEIGHTS',
         show_envvar=True),
    text('DIR|NAME', '--clip', 'CLIP ViT-L/14-336, likewise', envvar='CLIP_WEIGHTS',
         show_envvar=True),
    text('FILE', '--own', 'Classifier of these images, made by train_classifier.py'))
sweep_points = integer('--sweep-points', 10, 'Measure at most so many values of a range', 4)
heldout = text('FILE|URL', '--heldout', 'Images of the same kind that were never trained on, for '
               'ct and fld: statistics with features, or folder, .zip, .npz')

# How near generated images are to training images.
closeness = group(
    'closeness',
    choice('--space', 'pixels', 'What distances are of: pixels, or features of a network',
           DETECTORS),
    integer('--neighbors', 2, 'Memorized is what is less than a third as far from the nearest '
            'training image as from the next ones, up to this', 2),
    integer('--shifts', 0, 'Find copies too that are moved by up to so many pixels', 0),
    number('--max-distance limit', None, 'Say also how many images are nearer than this'),
    *DETECTOR_FILES)

# What makes the images.
gnet = text('FILE|URL', '--gnet',
            'Guiding network: unconditional, or a weaker one (autoguidance)')
guidance = number('--guidance', None,
                  'Strength of guidance, 1 = none  [default: 1, or of the preset]', ANY)
guidance_interval = text(
    'LO,HI', '--guidance-interval',
    'Guide only where the noise level is above LO and at most HI  [default: everywhere]',
    type=cli.Parsed('interval', _interval))
model_url = text('NAME|DIR', '--model-url', 'Autoencoder of latents: hub name[@revision] or '
                 'folder  [default: of the snapshot]')
compiled = boolean('--compile', False, 'Compile the network (torch.compile): worth its minutes '
                   'for long work')
network = group(
    'network',
    text('NAME', '--preset', 'Published network, guide and guidance '
         '(see generate_images.py --help)'),
    text('FILE|URL', '--net', 'Network of this project, EDM, EDM2, guided or class-balancing '
         'diffusion; or optimal:DATASET for the closed-form denoiser of a data set'),
    gnet,
    text('HEX', '--sha256', 'SHA-256 that the file of --net must have'),
    text('HEX', '--gnet-sha256', 'SHA-256 that the file of --gnet must have'),
    guidance,
    guidance_interval,
    model_url,
    compiled,
    allow_nonfinite)

# How they are sampled. An option that the sampler does not know is refused.
samplers = group(
    'sampler',
    text('NAME', '--sampler name', 'edm, edm2, ablation, dpmpp-2m, ddim, ddpm or flow  [default: '
         'of the network; ablation with any of --solver --disc --schedule --scaling]'),
    integer('--steps num_steps', None,
            'Sampling steps  [default: of the network, e.g. 18 with edm, 32 with edm2]'),
    _of_sampler('--sigma_min', 'Lowest noise level, at least that of the network'),
    _of_sampler('--sigma_max', 'Highest noise level, at most that of the network'),
    _of_sampler('--rho', 'Exponent of the time steps'),
    _of_sampler('--S_churn S_churn', 'Strength of added noise', NOT_NEGATIVE),
    _of_sampler('--S_min S_min', 'Lowest level that gets noise', NOT_NEGATIVE),
    _of_sampler('--S_max S_max', 'Highest level that gets noise', NOT_NEGATIVE),
    _of_sampler('--S_noise S_noise', 'Inflation of added noise', NOT_NEGATIVE),
    choice('--solver', None, 'Ablation: solver', ['euler', 'heun']),
    choice('--disc discretization', None, 'Ablation: time steps', ['vp', 've', 'iddpm', 'edm']),
    choice('--schedule', None, 'Ablation: noise schedule', ['vp', 've', 'linear']),
    choice('--scaling', None, 'Ablation: signal scaling', ['vp', 'none']),
    _of_sampler('--beta-d', 'Ablation: slope of the vp schedule', of='ablation'),
    _of_sampler('--beta-min', 'Ablation: start of the vp schedule', of='ablation'),
    _of_sampler('--epsilon-s', 'Ablation: last time of the vp time steps', of='ablation'),
    _of_sampler('--eta', 'DDIM: share of fresh noise, 0 = none, 1 = as much as DDPM',
                NOT_NEGATIVE))


def precision(text: str, default: str | None = None, types=('fp32', 'fp16', 'bf16', 'tf32')):
    """Types of activations; tf32 is float32 with fast products (torch_utils.distributed.init)."""
    return choice('--precision', default, text, types)


fast_products = precision('float32 on a GPU. tf32: products of factors of 10 bits, faster', 'fp32',
                          ['fp32', 'tf32'])
sampling = together(samplers, fast_products, verify)

image_class = text('CLASS', '--class class_',
                   'Class: original index, name or wnid; of several, e.g. 0-4,cat, seed S has '
                   'that at S modulo their number  [default: drawn from the seed]')


def seeds(default: str):
    return integers('--seeds', default, 'Seeds, e.g. 1,2,5-10: one image each')


def batch(default: int):
    return integer('--batch', default, 'Images at a time on each process')


# --- Training -----------------------------------------------------------------------------------

batch_gpu = nimg('--batch-gpu', None, 'Images of one forward pass  [default: all of a process]')
keep_checkpoints = integer(
    '--keep-checkpoints --keep_checkpoints', 0,
    'Keep the newest INT states of the training alone, 0 = all', 0)
nan_patience = integer(
    '--nan-patience --nan_patience', 100, 'End with status 3 when so many steps in a row have no '
    'finite loss or gradients, 0 = never', 0)
dry_run = click.option('-n', '--dry-run', '--dry_run', 'dry_run', is_flag=True,
                       help='Print the settings and what would be written, and exit')
transfer = (
    text('FILE|URL', '--transfer', 'Fine-tune: start from the weights of a network in any file '
         'that can be sampled; classes, channels and resolution may be others'),
    text('HEX', '--transfer-sha256 --transfer_sha256',
         'SHA-256 that the file of --transfer must have'))


def _project(name: str) -> str:
    try:
        util.need_package('wandb', 'wandb')                    # before anything is read or written
    except util.UserError as error:
        raise ValueError(error.text) from None
    return util.hide(name)


wandb = text('PROJECT', '--wandb', 'Log to this project of Weights & Biases too; needs wandb',
             type=cli.Parsed('project', _project))
bench_steps = integer('--bench-steps --bench_steps', 0, 'With a dry run: take so many steps, on '
                      'weights that are thrown away, and print how long the run would take', 0)


def architecture(blocks: str, widths: str, attention: str,
                 widths_name: str = '--channel-mult --cres'):
    """Options for the shape of a U-Net; the texts say what they are by default."""
    return together(
        integer('--num-blocks', None, f'Blocks of a resolution  [default: {blocks}]'),
        integers(widths_name, None, 'Width of each resolution, in those of the network  '
                 f'[default: {widths}]'),
        integers('--attn-resolutions', None,
                 f'Resolutions with attention  [default: {attention}]'))


def variety(xflip: bool | None, augment: float | None, rampup: float | None, default: str = ''):
    """Options for the images that training makes of each, and for the start of its learning
    rate.
    """
    return together(
        mimg('--rampup', rampup,
             'The learning rate grows from zero over so many images' + default),
        number('--augment', augment, 'Augmentation probability, 0 = no augmentation' + default,
               FRACTION),
        boolean('--xflip', xflip, 'Add the mirror images to the data, which are then twice as many'
                + default))


def watch_options(parse_metrics, name: str = '--eval'):
    """What is measured while a diffusion model trains, see training.watch; `name` of the option
    for the metrics, of which `parse_metrics` makes a list.
    """
    return [
        text('LIST', f'{name} eval_metrics', 'Measure images of the averages by these metrics of '
             'calculate_metrics.py, e.g. fd_dinov2,fid', type=cli.Parsed('list', parse_metrics)),
        nimg('--eval-every --eval_every', None,
             'Measure every NIMG images  [default: with the snapshots, and at the end]'),
        count('--eval-num --eval_num', 1000, 'Images of each measurement'),
        integer('--eval-steps --eval_steps', 16, 'Sampling steps of these images, few: of '
                'dpmpp-2m (flow or ddim for such networks)'),
        text('FILE', '--eval-ref --eval_ref', 'Statistics or images that they are compared with  '
             '[default: the training data]'),
        text('ZIP|DIR', '--heldout', 'Images that are not trained on: measure the training loss '
             'on them, by noise level'),
        boolean('--keep-best --keep_best', False, 'Keep the best of all averages in '
                'network-best.pkl, by the first metric (without any, the held-out loss)'),
        integer('--patience', 0, 'End after so many measurements without a better one, 0 = never',
                0)]


WATCHED = ('eval_metrics', 'eval_every', 'eval_num', 'eval_steps', 'eval_ref', 'heldout',
           'keep_best', 'patience')


def watching(parse_metrics):
    """Decorator: they come as one dictionary."""
    return group('watching', *watch_options(parse_metrics))


def training(outdir_help: str, *options):
    """Decorator: options of a command that trains; those called as its fields go into the
    recipe."""
    return together(
        text('DIR', '--outdir', outdir_help, required=True, type=cli.FOLDER),
        text('PATH', '--data', 'Data set made by dataset_tool.py, or any other images of one '
             'size that it reads', required=True),
        *options,
        *transfer,
        batch_gpu,
        keep_checkpoints,
        nan_patience,
        number('--ls', 1, 'Loss scaling against underflow of float16 gradients'),
        click.option('--shard', is_flag=True, help='Cut weights, averages and optimizer over the '
                     'processes, for networks that one GPU cannot hold'),
        boolean('--bench', True, 'Let cuDNN choose the fastest convolutions'),
        verify,
        group(
            'running',
            wandb,
            click.option('--allow-changes', is_flag=True, help='Go on with a run though its '
                         'settings have changed; what has is logged'),
            dry_run,
            bench_steps))


# Options that are no part of what is trained; the former are arguments of training.recipe.fit.
RUNNING = ('wandb', 'allow_changes', 'dry_run', 'bench_steps')
PLACES = ('outdir', 'desc', 'nosubdir', *RUNNING, *WATCHED)


def training_values(command, args) -> dict:
    """Values of the options of a command that trains, but those in PLACES."""
    params = command.make_context('train', list(args)).params
    return {key: value for key, value in params.items() if key not in PLACES}


# Of scripts that read images; all others take PATH:NAME.
key = text('NAME', '--key', 'Part of the file or folder: the array of an .npz, e.g. x_test (or '
           'IMAGES+LABELS), or the split of a data set of Hugging Face; PATH:NAME is the same')

# --- Conversion of pictures ----------------------------------------------------------------------

destination = together(
    click.option('--dest', metavar='ZIP|DIR', required=True, type=cli.ATOMIC,
                 help='Data set to write; a .zip, else a folder'),
    click.option('--overwrite', is_flag=True, help='Replace the destination if it exists'))


def _channels(text: str) -> int:
    if text not in ('1', '3', '4'):
        raise ValueError(f'{text!r} is none of 1 (gray), 3 (RGB) and 4 (with alpha)')
    return int(text)


def image_channels(name: str, of: str):
    return _maker('1|3|4', cli.Parsed('channels', _channels))(
        name, None, 'Channels of the images: 1 gray, 3 RGB, 4 with alpha; without it, what is '
        f'transparent is laid on white  [default: {of}1 if all pictures are gray, else 3]')


def conversion(transforms):
    """What all converting commands have; `rules` are those of training.data.convert.convert."""
    return together(
        click.option('--source', metavar='PATH[,PATH...]', required=True, type=util.hide,
                     help='What to read, see dataset_tool.py convert --help'),
        destination,
        pictures,
        group(
            'reading',
            click.option('--coarse', is_flag=True,
                         help="CIFAR-100's 20 coarse labels instead of the 100 fine ones"),
            choice('--labels', None, 'Labels of images in files: of dataset.json, of class '
                   'folders, of the names of files before an underscore (cat_1.png), or none  '
                   '[default: the first that there are; of names only if they are like '
                   'cat_1.png]', ['json', 'folders', 'names', 'none']),
            key,
            click.option('--bits', metavar='INT', type=click.IntRange(9, 16), default=16,
                         help='Bits of the gray values in files of 16 bits, e.g. 12')),
        group(
            'rules',
            click.option('--resolution', metavar='WxH', type=cli.SIZE,
                         help='Size of the images, e.g. 64x64 or 64  [default: as they are]'),
            choice('--transform', None, 'How pictures of another shape than --resolution are '
                   'cropped, or that they are stretched  [default: refused]', transforms),
            image_channels('--channels', ''),
            click.option('--skip-corrupt', is_flag=True,
                         help='Leave damaged images out, and list them'),
            integer('--workers', None, 'Processes  [default: one for each core]')))
