"""Configurations of the distillation study: YAML files, what may be in them, and `key=value`
overrides.

A configuration is an experiment with the sections `teacher` and `student`, or a flat file with
the keys of one network (baselines; teacher.yaml for sampling). `model` and `diffusion` name
further files, found from the current folder or from distillation/. Overrides change any value:
`student.lr=2e-4`, `student.model=yaml/arch/24M-CNN.yaml`, `student.model.dropout=0.1`.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from pathlib import Path

import click
import omegaconf
import yaml
from omegaconf import OmegaConf

from dnnlib import UserError, cli
from dnnlib.options import (
    bench_steps,
    dry_run,
    fast_products,
    group,
    keep_checkpoints,
    nan_patience,
    seed,
    text,
    together,
    transfer,
    verify,
    wandb,
    watch_options,
)
from torch_utils.files import pickles

FOLDER = Path(__file__).resolve().parent

# --- What may be in a configuration --------------------------------------------------------------

section = dataclasses.dataclass(kw_only=True)


@section
class Architecture:
    """A file of yaml/arch: the options of guided diffusion's U-Net."""

    image_size: int
    num_channels: int
    num_res_blocks: int
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str
    channel_mult: str = ''
    dropout: float = 0.0
    class_cond: bool = False
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_fp16: bool = False
    use_new_attention_order: bool = False
    img_channels: int = 3
    num_classes: int = 1000


@section
class Diffusion:
    """A diffusion file: the process of T = `diffusion_steps` steps, and what networks predict of
    it.

    variance     of the steps, if it is not learned: fixed_large or fixed_small
    beta_range, sigma_range  see GaussianDiffusion
    """

    learn_sigma: bool
    diffusion_steps: int
    noise_schedule: str
    timestep_respacing: str = ''
    use_ddim: bool = False
    use_kl: bool = False
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    rescale_learned_sigmas: bool = False
    clip_denoised: bool = True
    clip_last: bool = False
    clip_first: bool = False
    variance: str = 'fixed_large'
    beta_range: list[float] | None = None
    sigma_range: list[float] | None = None

    @classmethod
    def of(cls, diffusion: dict, clip: bool):
        """The diffusion with these arguments of GaussianDiffusion."""
        named = {name: diffusion[name] for name in ('beta_range', 'sigma_range', 'variance')
                 if diffusion.get(name)}
        learned = named.get('variance', 'learned_range') == 'learned_range'
        if learned:
            named.pop('variance', None)
        return cls(
            learn_sigma=learned, diffusion_steps=diffusion.get('steps', 1000),
            noise_schedule=diffusion.get('schedule', 'linear'), clip_denoised=clip,
            timestep_respacing=diffusion.get('respacing', ''),
            predict_xstart=diffusion.get('predict') == 'start',
            rescale_timesteps=diffusion.get('rescale_timesteps', False), **named)

    def arguments(self) -> dict:
        """Arguments of GaussianDiffusion."""
        mse = 'rescaled_mse' if self.rescale_learned_sigmas else 'mse'
        return dict(
            schedule=self.noise_schedule, steps=self.diffusion_steps,
            respacing=self.timestep_respacing,
            variance='learned_range' if self.learn_sigma else self.variance,
            loss='rescaled_kl' if self.use_kl else mse,
            predict='start' if self.predict_xstart else 'epsilon',
            rescale_timesteps=self.rescale_timesteps,
            **{name: getattr(self, name) for name in ('beta_range', 'sigma_range')
               if getattr(self, name)})


@section
class Network:
    """What all sections have."""

    model: Architecture
    diffusion: Diffusion
    use_fp16: bool | None = None

    def arguments(self) -> dict:
        """Arguments of `build_network` for a DiscreteDenoiser with an ADMUNet.

        It is in half precision if the section and its architecture both say so.
        """
        unet = dataclasses.asdict(self.model)
        half = unet.pop('use_fp16') and self.use_fp16 is not False
        unet |= dict(class_name='ADMUNet', learn_sigma=self.diffusion.learn_sigma,
                     precision='fp16' if half else 'fp32')
        return dict(class_name='DiscreteDenoiser', network=unet,
                    diffusion=self.diffusion.arguments(), clip=self.diffusion.clip_denoised)


@section
class Teacher(Network):
    """What is distilled, and how its chains make the batches. `BATCH` is rho.

    model     None: the file, whatever made it, says what its network is
    gnet      then: file or URL of a network that guides it, or self: it, told no class
    guidance, guidance_interval  strength, and the levels lo < sigma <= hi that are guided
    """

    model: Architecture | None
    gnet: str = ''
    guidance: float = 1.0
    guidance_interval: list[float] | None = None
    model_path: str
    iter_choice: str
    BATCH: float
    tempfile: str = ''
    batch_size: int
    prob: float = 1.0
    input_perturb: float = 0.0


@section
class Training(Network):
    """A network and how it is trained. `batch_size` is that of all processes together.

    random_flip  mirror images at random; None: yes, but in a run that began without
    random_crop  take a random part of each picture, not its centre
    """

    model_path: str = ''
    batch_size: int = 128
    random_flip: bool | None = None
    random_crop: bool = False
    microbatch: int = -1
    lr: float = 1e-4
    weight_decay: float = 0.0
    lr_anneal_steps: int = 0
    total_steps: int = 0
    ema_rate: str = '0.9999'
    schedule_sampler: str = 'uniform'
    fp16_scale_growth: float = 0.001
    resume_checkpoint: str = ''
    log_interval: int = 10
    save_interval: int = 10000
    cache_save_interval: int = -1
    allow_changes: bool = False


@section
class Experiment:
    """A network and its teacher."""

    teacher: Teacher
    student: Training


def ema_rates(text: str) -> list[float]:
    """'0.99,0.9999' -> [0.99, 0.9999]; each once, and [nan] for what is no number."""
    try:
        return list(dict.fromkeys(map(float, text.split(','))))
    except ValueError:
        return [math.nan]


# What types alone do not tell: (keys, test of a value, what it must be).
# Of dkdm.SOURCES; the second is spelled as published and as it should be.
CHAINS = ('dynamic_iterative_distillation', 'shffled_iterative_distillation',
          'shuffled_iterative_distillation', 'iterative_distillation')
_RULES = [
    ('clip_last clip_first', lambda value: not value, 'must be false, as all experiments have it'),
    ('batch_size log_interval save_interval', lambda value: value >= 1, 'must be at least 1'),
    ('lr_anneal_steps total_steps', lambda value: value >= 0, 'must be at least 0 (no end)'),
    ('microbatch', lambda value: value == -1 or value > 0, 'must be -1 or a number of images'),
    ('BATCH', lambda value: 0 < value <= 1, 'must be a fraction rho of the time steps, above 0'),
    ('prob', lambda value: 0 < value <= 1, 'must be a probability above 0'),
    ('schedule_sampler', lambda value: value == 'uniform', 'is not supported; write uniform'),
    ('iter_choice', lambda value: value in CHAINS, f'is not one of {", ".join(CHAINS)}'),
    ('ema_rate', lambda value: all(0 <= rate < 1 for rate in ema_rates(value)),
     'must be rates below 1, e.g. 0.99,0.9999'),
]

# --- Reading -------------------------------------------------------------------------------------

_FILES = ('model', 'diffusion')  # what is given as the name of a file


@contextlib.contextmanager
def _one_line_errors(where: str):
    """Errors of YAML and OmegaConf as a UserError that names `where` and the key."""
    try:
        yield
    except omegaconf.errors.ConfigKeyError as error:
        keys = ', '.join(error.parent_node)
        raise UserError(f'{where}: there is no key {error.full_key}; there are {keys}') from None
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException) as error:
        key = getattr(error, 'full_key', None)
        reason = ' '.join(str(error).partition('full_key:')[0].split())[:150]
        raise UserError(': '.join(filter(None, (where, key, reason)))) from None


_MAX_BYTES = 64 << 10  # of a configuration


def _check_size(text: bytes):
    """Raises ForeignPickleError for a text of YAML that is large when all that its aliases stand
    for is written out; before anything is made of it, since `<<` writes it out.
    """
    pending, left = [yaml.compose(text, yaml.SafeLoader)], 10_000
    while pending:
        node = pending.pop()
        left -= 1
        if left < 0:
            raise pickles.ForeignPickleError('it is too large or too deeply nested')
        if isinstance(node, yaml.MappingNode):
            pending += itertools.chain(*node.value)
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _load(path: str, what: str) -> omegaconf.DictConfig:
    """A YAML file, found from the current folder or from distillation/.

    NAME-Baseline-0.1.yaml and the like, which are the baselines under names that say how many of
    the images are real, have the content of NAME-Baseline.yaml.
    """
    if not os.path.exists(path):
        path = re.sub(r'(-Baseline)-(0|1|[01]?\.\d+)\.yaml$', r'\1.yaml', path)
    places = [place for place in (Path(path), FOLDER / path) if os.path.isfile(place)]
    if not places:
        raise UserError(f'{what}: there is no file {path}')
    with _one_line_errors(f'{path} is not YAML'):
        text = places[0].read_bytes()[:_MAX_BYTES + 1]
        if len(text) > _MAX_BYTES:
            raise UserError(f'{path} is no configuration: it is larger than 64 KiB')
        with pickles.errors_of(f'{path} is not YAML'):
            _check_size(text)
            pickles.check_plain(yaml.safe_load(text), 'it', 10_000)
        content = OmegaConf.load(places[0])
    if not isinstance(content, omegaconf.DictConfig):
        raise UserError(f'{path} is not a configuration: it has no keys')
    return content


def _open_files(config, prefix: str = ''):
    """Puts the content of files in place of their names."""
    for key, value in config.items_ex(resolve=False):
        if isinstance(value, omegaconf.DictConfig):
            _open_files(value, f'{prefix}{key}.')
        elif key in _FILES and isinstance(value, str):
            config[key] = _load(value, prefix + key)


def _check_references(value, key: str = ''):
    """Texts may stand for the value of another key, ${student.lr}, and for nothing else: not for
    variables of the environment, nor for several keys, each of which stands for several.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            _check_references(part, f'{key}.{name}'.lstrip('.'))
    elif isinstance(value, str) and '${' in value and not re.fullmatch(r'\$\{[\w.]+\}', value):
        raise UserError(f'{key}: a reference is the whole value and names a key, '
                        'e.g. ${student.lr}')


def _check(config, prefix: str = ''):
    for key, value in config.items():
        if isinstance(value, omegaconf.DictConfig):
            _check(value, f'{prefix}{key}.')
        for keys, test, words in _RULES:
            if key in keys.split() and not test(value):
                raise UserError(f'{prefix}{key}={value} {words}')


def _read(schema, path: str, content, overrides):
    # Names of files come first, so that other overrides can change what is in them.
    files = []
    values = []
    for override in overrides:
        match = re.fullmatch(r'(?:\w+\.)*(\w+)=(.*)', override)
        if not match:
            raise UserError(f'{override!r}: overrides are written key=value, e.g. student.lr=2e-4')
        kind = files if match[1] in _FILES else values
        kind.append(override if match[2] else override + '""')
    with _one_line_errors(path):
        config = OmegaConf.merge(content, OmegaConf.from_dotlist(files))
        _open_files(config)
        config = OmegaConf.merge(OmegaConf.structured(schema), config,
                                 OmegaConf.from_dotlist(values))
        _check_references(OmegaConf.to_container(config, resolve=False))
        for key in sorted(OmegaConf.missing_keys(config)):
            raise UserError(f'{path}: {key} is missing')
        _check(config)
        return OmegaConf.to_object(config)


def read_experiment(path: str, overrides=()) -> Experiment:
    """An experiment file. Raises UserError for what is wrong in it."""
    return _read(Experiment, path, _load(path, '--config'), overrides)


def own_name(path: str) -> str:
    """What the runs of one's own teacher are called: the name of its file, or of its run."""
    stem = Path(path.rstrip('/')).stem
    folder = Path(path).absolute().parent.name
    return stem.replace('network-snapshot', folder) if stem.startswith('network-snap') else stem


def own_experiment(path: str, shape, classes: int, diffusion: Diffusion, overrides=()
                   ) -> Experiment:
    """The experiment of one's own teacher in a file, of images of `shape` (channels, side) and
    `classes`; a student of 14M-CNN's width, with as many levels as leave a side of 4 or more.
    Raises UserError for images that are not square.
    """
    channels, side = shape
    if not isinstance(side, int):
        raise UserError(f'makes images of {side[1]}x{side[0]} pixels; students learn square ones '
                        'alone', 'teacher', path)
    sides = [side >> level for level in range(4) if side % 2**level == 0 and side >> level >= 4]
    model = Architecture(
        image_size=side, img_channels=channels, class_cond=classes > 0,
        num_classes=classes or 1000, num_channels=64, num_res_blocks=3, num_head_channels=32,
        attention_resolutions=','.join(str(size) for size in sides if size <= 16),
        channel_mult=','.join('1222'[:len(sides)]), resblock_updown=True,
        use_new_attention_order=True)
    name = own_name(path)
    teacher = Teacher(
        model=None, diffusion=diffusion, model_path=path, iter_choice=CHAINS[0], BATCH=0.4,
        batch_size=256, tempfile=os.path.join('experiments', 'cache', f'{name}.cache'))
    student = Training(model=model, diffusion=diffusion, total_steps=100_000)
    content = OmegaConf.create(dataclasses.asdict(Experiment(teacher=teacher, student=student)))
    experiment = _read(Experiment, path, content, overrides)
    for name in ('image_size', 'img_channels', 'class_cond', 'num_classes'):
        value, changed = (getattr(each, name) for each in (model, experiment.student.model))
        if changed != value:
            raise UserError(f"student.model.{name}: {changed} differs from the teacher's {value}")
    experiment.student.diffusion = experiment.teacher.diffusion
    return experiment


def read_network(path: str, overrides=()) -> Training:
    """A flat file, or the student of an experiment (overrides then begin with `student.`)."""
    content = _load(path, '--config')
    if 'teacher' in content or 'student' in content:
        return _read(Experiment, path, content, overrides).student
    return _read(Training, path, content, overrides)


# --- Command lines -------------------------------------------------------------------------------

# What guided diffusion takes from the environment has the same name here.
OUTDIR_VARIABLE = 'OPENAI_LOGDIR'


class Command(cli.Command):
    """A command with a configuration, in which the fields of errors are keys."""

    names_fields = True


def _parse_metrics(text: str) -> list[str]:
    from metrics import compute  # of a configuration none are needed
    return compute.parse_metrics(text)


def _common(*network):
    return together(
        *network, seed('--seed', 0, 'Seed of everything random'), fast_products, verify,
        click.argument('overrides', metavar='[KEY=VALUE]...', nargs=-1))


common_options = _common(
    text('YAML', '--config', 'Experiment or network, see yaml/', required=True))
experiment_options = _common(
    text('YAML', '--config', 'Experiment, see yaml/'),
    text('FILE|URL', '--teacher', "In its place: one's own teacher, any network that can be "
         'sampled; student, chain and cache follow from it, and KEY=VALUE changes them'))
run_options = together(
    text('DIR', '--outdir --exp_dir',
         'Where checkpoints go  [default: experiments/NAME of the configuration]',
         type=cli.FOLDER, envvar=OUTDIR_VARIABLE, show_envvar=True),
    group(
        'running',
        text('PT', '--resume_checkpoint resume_from',
             'modelNNNNNN.pt to go on from, if --outdir has none'),
        *transfer, keep_checkpoints, nan_patience, wandb, *watch_options(_parse_metrics),
        dry_run, bench_steps))


def default_outdir(config: str | None, teacher: str | None = None) -> str:
    """experiments/NAME for the configuration .../NAME.yaml; experiments/NAME-student for one's own
    teacher.
    """
    name = Path(config).stem if config else f'{own_name(teacher)}-student'
    return os.path.join('experiments', name)
