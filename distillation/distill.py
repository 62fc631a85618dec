"""The teacher of an experiment, and the batches that its chains make."""

import os

from distillation import common
from distillation.cache import cache_size, load_cache
from distillation.dkdm import SOURCES, IterativeSource, ProcessRandom, ShuffledSource, Teacher
from dnnlib import UserError
from torch_utils import distributed as dist
from torch_utils.random import tuple_seed

_PREPARING, _TRAINING = 0, 1  # what random numbers are for


def draws(seed: int, purpose: int, device) -> ProcessRandom:
    """The random numbers of this process."""
    return ProcessRandom(tuple_seed(seed, dist.get_rank(), purpose), device)


def open_teacher(experiment: dict, device) -> Teacher:
    """The teacher with its weights, on `device`. Raises UserError if the file is missing or of another network."""
    section = experiment['teacher']
    if section.iter_choice not in SOURCES:
        raise UserError(f'teacher.iter_choice: {section.iter_choice!r} is not one of {", ".join(SOURCES)}')
    if not 0 < section.BATCH <= 1:
        raise UserError(f'teacher.BATCH: rho = {section.BATCH} is not a share of the time steps, in 0..1')
    net = common.load_model(common.build(section), section.model_path, 'teacher.model_path')
    return Teacher(net.to(device), clip=section.diffusion.clip_denoised)


def image_shape(teacher: Teacher) -> list[int]:
    """[C,H,W]."""
    return [teacher.net.img_channels, teacher.net.img_resolution, teacher.net.img_resolution]


def share_size(experiment: dict, teacher: Teacher) -> int:
    """Images in the cache of one process."""
    return cache_size(experiment['teacher'].BATCH, teacher.diffusion.num_steps, experiment['student'].batch_size)


def cache_description(experiment: dict, teacher: Teacher) -> dict:
    """What a cache is made with, and must agree with where it is used."""
    section = experiment['teacher']
    return {'rho': section.BATCH, 'batch_size': experiment['student'].batch_size,
            'images of a process': share_size(experiment, teacher), 'image_shape': image_shape(teacher),
            'diffusion': common.diffusion_arguments(section.diffusion), 'clip_denoised': section.diffusion.clip_denoised,
            'teacher': common.fingerprint(section.model_path)}


def align(experiment: dict):
    """Gives the student its teacher's time steps, with a warning where it had others.

    Raises UserError for other images or classes.
    """
    teacher, student = experiment['teacher'], experiment['student']
    for name in ('diffusion_steps', 'timestep_respacing'):
        wanted, found = getattr(teacher.diffusion, name), getattr(student.diffusion, name)
        if wanted != found:
            dist.print0(f"Warning: student.diffusion.{name}={found} differs from the teacher's; {wanted} is used")
            setattr(student.diffusion, name, wanted)
    for name in ('image_size', 'img_channels', 'class_cond', *['num_classes'] * teacher.model.class_cond):
        wanted, found = getattr(teacher.model, name), getattr(student.model, name)
        if wanted != found:
            raise UserError(f"student.model.{name}: {found} differs from the teacher's {wanted}")
    if student.diffusion.use_kl:
        raise UserError('student.diffusion.use_kl: distillation has no pure KL loss; write false')


def open_source(experiment: dict, teacher: Teacher, seed: int):
    """This process's batches of teacher steps. Raises UserError if the cache is missing, or made with something else."""
    section, batch = experiment['teacher'], experiment['student'].batch_size
    numbers = draws(seed, _TRAINING, next(teacher.net.parameters()).device)
    source = SOURCES[section.iter_choice]
    if source is IterativeSource:
        return IterativeSource(teacher, image_shape(teacher), batch, numbers, section.prob)
    if not section.tempfile:
        raise UserError('teacher.tempfile is missing; it names the cache that dynamic_prepare.py makes')
    # The shuffled variant works on a batch only.
    cache = load_cache(section.tempfile, share_size(experiment, teacher), cache_description(experiment, teacher),
                       count=batch if source is ShuffledSource else None)
    return source(teacher, cache, batch, numbers, section.prob)


def part_path(tempfile: str) -> str:
    """Where this process keeps its unfinished share of a cache."""
    return f'{os.path.abspath(tempfile)}.part-{dist.get_rank()}-of-{dist.get_world_size()}'


def preparation_draws(seed: int, device) -> ProcessRandom:
    """Random numbers of this process for making the cache."""
    return draws(seed, _PREPARING, device)
