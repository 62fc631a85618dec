"""What the distillation scripts share: configurations, and the networks, processes and files that they describe.

A configuration is a YAML file of one of two shapes: an experiment with the sections `teacher` and `student`, or a flat
file with the keys of one network (baselines; teacher.yaml for sampling). `model` and `diffusion` name further files,
found from the current folder or from distillation/. `key=value` arguments override any value: `student.lr=2e-4`,
`student.model=yaml/arch/24M-CNN.yaml`, `student.model.dropout=0.1`.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import click
import omegaconf
import torch
import yaml
from omegaconf import MISSING, OmegaConf

from dnnlib import UserError
from dnnlib.util import hash_file
from torch_utils import distributed as dist
from torch_utils.files.weights import load_weights, read_state_dict
from training.networks import build_network

FOLDER = Path(__file__).resolve().parent

# --- What may be in a configuration -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Architecture:
    """A file of yaml/arch: the options of guided diffusion's U-Net."""

    image_size: int = MISSING
    num_channels: int = MISSING
    num_res_blocks: int = MISSING
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = MISSING
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


@dataclasses.dataclass
class Diffusion:
    """A diffusion file: the process of T = `diffusion_steps` steps, and what networks predict of it."""

    learn_sigma: bool = MISSING
    diffusion_steps: int = MISSING
    noise_schedule: str = MISSING
    timestep_respacing: str = ''
    use_ddim: bool = False
    use_kl: bool = False
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    rescale_learned_sigmas: bool = False
    clip_denoised: bool = True
    clip_last: bool = False
    clip_first: bool = False


@dataclasses.dataclass
class Teacher:
    """The section `teacher`: what is distilled, and how its chains make the batches. `BATCH` is rho."""

    model: Any = MISSING
    diffusion: Any = MISSING
    model_path: str = MISSING
    iter_choice: str = MISSING
    BATCH: float = MISSING
    tempfile: str = ''
    batch_size: int = MISSING
    prob: float = 1.0
    input_perturb: float = 0.0
    use_fp16: bool | None = None


@dataclasses.dataclass
class Training:
    """The section `student`, or a flat file: a network and how it is trained. `batch_size` is that of one process."""

    model: Any = MISSING
    diffusion: Any = MISSING
    batch_size: int = 128
    microbatch: int = -1
    lr: float = 1e-4
    weight_decay: float = 0.0
    lr_anneal_steps: int = 0
    total_steps: int = 0
    ema_rate: str = '0.9999'
    schedule_sampler: str = 'uniform'
    use_fp16: bool | None = None
    fp16_scale_growth: float = 0.001
    model_path: str = ''
    resume_checkpoint: str = ''
    log_interval: int = 10
    save_interval: int = 10000
    cache_save_interval: int = -1
    allow_changes: bool = False


SECTIONS = {'teacher': Teacher, 'student': Training}
_FILES = {'model': Architecture, 'diffusion': Diffusion}

# --- Reading ----------------------------------------------------------------------------------------------------------


def _load_yaml(path: str, what: str):
    """A YAML file, found from the current folder or from distillation/."""
    found = next((str(place) for place in (Path(path), FOLDER / path) if place.is_file()), None)
    if found is None:
        raise UserError(f'{what}: there is no file {path}')
    try:
        content = OmegaConf.load(found)
    except (yaml.YAMLError, UnicodeDecodeError, omegaconf.errors.OmegaConfBaseException) as error:
        raise UserError(f'{path} is not YAML ({" ".join(str(error).split())[:150]})') from None
    if not isinstance(content, omegaconf.DictConfig):
        raise UserError(f'{path} is not a configuration: it has no keys')
    return content


def _merge(schema, values, where: str, prefix: str = ''):
    """`values` as a `schema`. Raises UserError that names `where` and the key, for unknown keys and wrong types."""
    try:
        return OmegaConf.merge(schema if isinstance(schema, omegaconf.DictConfig) else OmegaConf.structured(schema), values)
    except omegaconf.errors.ConfigKeyError as error:
        known = ', '.join(field.name for field in dataclasses.fields(schema)) if isinstance(schema, type) else \
            ', '.join(map(str, schema))
        raise UserError(f'{where}: there is no key {prefix}{error.full_key or error.key}; known are {known}') from None
    except (omegaconf.errors.OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, 'full_key', None)
        name = f'{prefix}{key}: ' if key else ''
        raise UserError(f'{where}: {name}{str(error).splitlines()[0]}') from None


def _parse_overrides(overrides) -> list[tuple[list[str], Any]]:
    """[(path of keys, value)] of `a.b=c` arguments."""
    parsed = []
    for text in overrides:
        name, separator, given = text.partition('=')
        if not separator or not all(part.isidentifier() for part in name.split('.')):
            raise UserError(f'{text!r}: overrides are written key=value, e.g. student.lr=2e-4')
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([text]), name) if given else ''
        except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
            raise UserError(f'{text!r}: {str(error).splitlines()[0]}') from None
        parsed.append((name.split('.'), value))
    return parsed


def _nested(keys: list[str], value) -> dict:
    for key in reversed(keys):
        value = {key: value}
    return value


def _section(schema, values, overrides, where: str, prefix: str):
    """A section with its files read in and overrides applied, as a `schema` object with an Architecture and a Diffusion."""
    config = _merge(schema, values, where, prefix)
    for keys, value in overrides:
        if len(keys) == 1:
            config = _merge(config, _nested(keys, value), '.'.join([*prefix.split('.')[:-1], *keys]), prefix)
    for name, file_schema in _FILES.items():
        if OmegaConf.is_missing(config, name):
            raise UserError(f'{where}: {prefix}{name} is missing; it names a file, e.g. yaml/arch/57M-CNN.yaml')
        given = config[name]
        source = given if isinstance(given, str) else where
        content = _load_yaml(given, f'{prefix}{name}') if isinstance(given, str) else given
        content = _merge(file_schema, content, source, '')
        for keys, value in overrides:
            if len(keys) > 1 and keys[0] == name:
                content = _merge(content, _nested(keys[1:], value), prefix + '.'.join(keys), f'{prefix}{name}.')
        config[name] = content
    for keys, _ in overrides:
        if len(keys) > 1 and keys[0] not in _FILES:
            raise UserError(f'there is no key {prefix}{".".join(keys)}')
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f'{where}: {prefix}{missing[0]} is missing')
    result = OmegaConf.to_object(config)
    _check(result, prefix)
    return result


def _check(section, prefix: str):
    """What types alone do not tell."""
    for name in ('clip_last', 'clip_first'):
        if getattr(section.diffusion, name):
            raise UserError(f'{prefix}diffusion.{name}: only false is supported, as in all published experiments')
    if section.batch_size < 1:
        raise UserError(f'{prefix}batch_size: {section.batch_size} is less than 1')
    if isinstance(section, Teacher):
        return
    if section.schedule_sampler != 'uniform':
        raise UserError(f'{prefix}schedule_sampler: {section.schedule_sampler!r} is not supported; write uniform')
    if section.microbatch == 0 or section.microbatch < -1:
        raise UserError(f'{prefix}microbatch: give -1 (none) or a number of images')
    for name in ('log_interval', 'save_interval'):
        if getattr(section, name) < 1:
            raise UserError(f'{prefix}{name}: {getattr(section, name)} is less than 1')
    for name in ('lr_anneal_steps', 'total_steps'):
        if getattr(section, name) < 0:
            raise UserError(f'{prefix}{name}: {getattr(section, name)} is less than 0; 0 stands for no end')
    ema_rates(section.ema_rate)


def read_experiment(path: str, overrides=()) -> dict:
    """{'teacher': Teacher, 'student': Training} of an experiment file. Raises UserError for what is wrong in it."""
    content = _load_yaml(path, '--config')
    unknown = [key for key in content if key not in SECTIONS]
    if unknown or set(content) != set(SECTIONS):
        what = f'there is no key {unknown[0]}' if unknown else 'teacher or student is missing'
        raise UserError(f'{path}: {what}; an experiment has the sections teacher and student')
    parsed = _parse_overrides(overrides)
    for keys, _ in parsed:
        if keys[0] not in SECTIONS or len(keys) < 2:
            raise UserError(f'there is no key {".".join(keys)}; keys of an experiment begin with teacher. or student.')
    return {name: _section(schema, content[name], [(keys[1:], value) for keys, value in parsed if keys[0] == name],
                           path, f'{name}.')
            for name, schema in SECTIONS.items()}


def read_network(path: str, overrides=()) -> Training:
    """The network of a flat file, or the student of an experiment (overrides then begin with `student.`)."""
    content = _load_yaml(path, '--config')
    if set(content) & set(SECTIONS):
        return read_experiment(path, overrides)['student']
    return _section(Training, content, _parse_overrides(overrides), path, '')


# --- What a configuration describes -----------------------------------------------------------------------------------


def ema_rates(text: str) -> list[float]:
    """'0.99,0.9999' -> [0.99, 0.9999]."""
    try:
        rates = [float(part) for part in str(text).split(',')]
    except ValueError:
        rates = [1]
    if not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f'ema_rate: {text!r} is not a list of different rates below 1, e.g. 0.9999')
    return rates


def diffusion_arguments(config: Diffusion) -> dict:
    """Arguments of GaussianDiffusion."""
    loss = 'rescaled_kl' if config.use_kl else 'rescaled_mse' if config.rescale_learned_sigmas else 'mse'
    return dict(schedule=config.noise_schedule, steps=config.diffusion_steps, respacing=config.timestep_respacing,
                variance='learned_range' if config.learn_sigma else 'fixed_large', loss=loss,
                predict='start' if config.predict_xstart else 'epsilon', rescale_timesteps=config.rescale_timesteps)


def network_arguments(section) -> dict:
    """Arguments of ADMUNet. It is in half precision if the section and its architecture both say so."""
    arguments = dataclasses.asdict(section.model)
    fp16 = arguments.pop('use_fp16') and section.use_fp16 is not False
    return arguments | dict(class_name='ADMUNet', learn_sigma=section.diffusion.learn_sigma,
                            precision='fp16' if fp16 else 'fp32')


def build(section) -> torch.nn.Module:
    """The DiscreteDenoiser of a section, on the CPU. Raises UserError for sizes that do not fit."""
    return build_network('DiscreteDenoiser', network=network_arguments(section),
                         diffusion=diffusion_arguments(section.diffusion), clip=section.diffusion.clip_denoised)


def load_model(net, path: str, what: str):
    """Weights in guided diffusion's format into the U-Net of `net`. Raises UserError saying what is missing or foreign."""
    if not os.path.isfile(path):
        raise UserError(f'{what}: there is no file {path}')
    load_weights(net.model, read_state_dict(path), path)
    return net


def fingerprint(path: str) -> str:
    """First half of the SHA-256 of a file: what tells teachers apart."""
    return hash_file(path)[:32]


# --- Command lines ----------------------------------------------------------------------------------------------------

# What guided diffusion takes from the environment has the same name here.
OUTDIR_VARIABLE = 'OPENAI_LOGDIR'

config_option = click.option('--config', metavar='YAML', required=True, help='Experiment or network, see yaml/')
overrides_argument = click.argument('overrides', metavar='[KEY=VALUE]...', nargs=-1)
seed_option = click.option('--seed', metavar='INT', type=click.IntRange(0, 2**31 - 1), default=0,
                           help='Seed of everything random')


def default_outdir(config: str) -> str:
    """experiments/NAME for the configuration .../NAME.yaml."""
    return os.path.join('experiments', os.path.splitext(os.path.basename(config))[0])


def describe(name: str, net):
    """Prints what a network is."""
    parameters = sum(p.numel() for p in net.model.parameters())
    dist.print0(f'{name}: {parameters / 1e6:.2f}M parameters, {net.img_resolution}x{net.img_resolution}, '
                f'{net.diffusion.num_steps} steps, {net.model.precision}')
