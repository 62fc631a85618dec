"""What a configuration describes: networks, a teacher with its batches, and a run of training."""

import functools
import shlex

import torch

from distillation import configs
from distillation.cache import cache_size, load_cache
from distillation.checkpoints import CacheCheckpoints
from distillation.dkdm import SOURCES, IterativeSource, ProcessRandom, Teacher
from dnnlib import UserError
from dnnlib.options import WATCHED
from dnnlib.util import hash_file, renamed_fields
from metrics.scoring import Scorer
from torch_utils import distributed as dist
from torch_utils.files.identify import read_state_dict
from torch_utils.files.weights import fingerprint as weights_fingerprint
from torch_utils.files.weights import load_weights
from torch_utils.random import tuple_seed
from training import recipe
from training.diffusion.gaussian import GaussianDiffusion
from training.diffusion.samplers import without_labels
from training.encoders import RGBEncoder
from training.generate import open_guide
from training.networks import build_network
from training.snapshot import Snapshot, load_denoiser
from training.watch import Watch

PREPARING, TRAINING = 0, 1  # what random numbers are for
ENDLESS = 10**9             # steps

# --- Networks ------------------------------------------------------------------------------------


def build(section: configs.Network, path: str = '', **options) -> torch.nn.Module:
    """The DiscreteDenoiser of a section, on the CPU, with the weights of a file in guided
    diffusion's format, if any; `options` go to `load_weights`.

    Raises UserError for sizes that do not fit, saying what differs.
    """
    with renamed_fields(img_resolution='image_size'):
        net = build_network(**section.arguments())
    if path:
        load_weights(net.model, read_state_dict(path), path, **options)
    return net


def fingerprint(path: str) -> str:
    """First half of the SHA-256 of a file: what tells teachers apart."""
    return hash_file(path)[:32]


def describe(name: str, net):
    """Prints what a network is."""
    parameters = sum(p.numel() for p in net.model.parameters())
    _, height, width = net.image_shape
    dist.print0(f'{name}: {parameters / 1e6:.2f}M parameters, '
                f'{width}x{height}, {net.diffusion.num_steps} steps, '
                f'{net.model.precision}')


# --- The teacher and its batches -----------------------------------------------------------------


def process_random(seed: int, purpose: int) -> ProcessRandom:
    """The random numbers of this process."""
    return ProcessRandom(tuple_seed(seed, dist.get_rank(), purpose), dist.get_device())


def read_experiment(config: str | None, own: str | None, overrides):
    """(experiment, None) of a configuration, or (experiment, snapshot) of one's own teacher: a
    file or URL of any network that can be sampled.
    """
    if bool(config) == bool(own):
        raise UserError('give a configuration, or else a teacher', 'config')
    if config:
        return configs.read_experiment(config, overrides), None
    with dist.rank0_first():
        snapshot = load_denoiser(own, dist.get_device())
    net = snapshot.net
    return configs.own_experiment(own, (net.img_channels, net.img_resolution), net.label_dim,
                                  chain_of(net), overrides), snapshot


def chain_of(net) -> configs.Diffusion:
    """The chain of one's own teacher: that which it has, or a hundred levels of EDM's sampler
    within its range. So few steps take the lower bound of the variance.
    """
    if hasattr(net, 'diffusion'):
        return configs.Diffusion.of(net.init_kwargs['diffusion'], net.clip)
    levels = [max(net.sigma_min, 0.002), min(net.sigma_max, 80.0)]
    return configs.Diffusion.of(
        dict(schedule='edm', steps=100, variance='fixed_small', sigma_range=levels), clip=False)


def open_teacher(section: configs.Teacher, own: Snapshot | None = None) -> Teacher:
    """The teacher with its weights, on the device of this process; `own`: one's own."""
    if own is None:
        net = build(section, section.model_path).to(dist.get_device())
        describe('Teacher', net)
        return Teacher(net)
    diffusion = GaussianDiffusion(**section.diffusion.arguments())
    guiding = section.guidance, section.guidance_interval
    if section.gnet == 'self':
        guide = without_labels(own.net)
    else:
        chain = 'ddpm' if hasattr(own.net, 'diffusion') else 'edm'
        names = ('gnet', 'guidance', 'guidance_interval')
        with renamed_fields(**{name: f'teacher.{name}' for name in names}), dist.rank0_first():
            guide = open_guide(own, section.gnet, chain, *guiding, dist.get_device())
    dist.print0(f'Teacher: {type(own.net).__name__}, {diffusion.num_steps} steps of sigma '
                f'{diffusion.sigmas[-1]:.4g} to {diffusion.sigmas[0]:.4g}')
    return Teacher(own.net, diffusion, guide, *guiding)


def identity(section: configs.Teacher, teacher: Teacher) -> str:
    """What tells teachers apart: the hash of the file; of one's own that of the weights, and what
    guides them.
    """
    if section.model is not None:
        return fingerprint(section.model_path)
    nets = [teacher.net, *([] if section.gnet in ('', 'self') else [teacher.guide])]
    digits = [weights_fingerprint(net.state_dict().items()) for net in nets]
    guiding = [section.gnet[:4], f'{section.guidance:g}', str(section.guidance_interval)]
    return ' '.join(digits + guiding * (teacher.guide is not None))


def process_batch(section: configs.Training) -> int:
    """Images of a step on this process. Raises UserError unless all have as many."""
    size = section.batch_size
    processes = dist.get_world_size()
    if size % processes:
        raise UserError(f'cannot be split over {processes} processes', 'batch_size', size)
    return size // processes


def cache_share(experiment: configs.Experiment, teacher: Teacher) -> int:
    """Images of the cache of this process."""
    return cache_size(experiment.teacher.BATCH, teacher.diffusion.num_steps,
                      process_batch(experiment.student))


def cache_description(experiment: configs.Experiment, teacher: Teacher) -> dict:
    """What a cache is made with, and must agree with where it is used.

    Raises UserError if the configuration names none.
    """
    section = experiment.teacher
    if not section.tempfile:
        raise UserError('teacher.tempfile is missing; it names the cache of dynamic_prepare.py')
    return {'rho': section.BATCH, 'batch_size': experiment.student.batch_size,
            'image_shape': teacher.image_shape, 'diffusion': section.diffusion.arguments(),
            'clip_denoised': section.diffusion.clip_denoised,
            'teacher': identity(section, teacher)}


def align(experiment: configs.Experiment):
    """Gives the student its teacher's time steps, with a warning where it had others.

    Raises UserError for other images or classes.
    """
    teacher, student = experiment.teacher, experiment.student
    for name in ('diffusion_steps', 'timestep_respacing'):
        steps, own = (getattr(side.diffusion, name) for side in (teacher, student))
        if steps != own:
            dist.print0(f"Warning: student.diffusion.{name}={own} differs from the teacher's; "
                        f'{steps} is used')
            setattr(student.diffusion, name, steps)
    names = ['image_size', 'img_channels', 'class_cond'] if teacher.model else []
    for name in names + ['num_classes'] * bool(names and teacher.model.class_cond):
        value, own = (getattr(side.model, name) for side in (teacher, student))
        if value != own:
            raise UserError(f"student.model.{name}: {own} differs from the teacher's {value}")
    if student.random_flip:
        raise UserError('student.random_flip: a distillation has no images that could be mirrored')
    if student.diffusion.use_kl:
        raise UserError('student.diffusion.use_kl: distillation has no pure KL loss; write false')


def open_source(experiment: configs.Experiment, teacher: Teacher, seed: int):
    """This process's batches of teacher steps.

    Raises UserError if the cache is missing, or made with something else.
    """
    section, batch = experiment.teacher, process_batch(experiment.student)
    rng = process_random(seed, TRAINING)
    source = SOURCES[section.iter_choice]
    if source is IterativeSource:
        return source(teacher, batch, rng, section.prob)
    description = cache_description(experiment, teacher)
    cache = load_cache(section.tempfile, dist.get_rank(), cache_share(experiment, teacher),
                       description)
    shape = list(cache.x.shape[1:])
    low, high = map(int, cache.levels.aminmax())
    steps = teacher.diffusion.num_steps
    if shape != teacher.image_shape or low < 0 or high > steps:
        raise UserError(f'{section.tempfile} holds images {shape} at steps {low} to {high}; the '
                        f'teacher makes {teacher.image_shape} in {steps}')
    if (cache.classes is None) != (teacher.num_classes == 0):
        raise UserError(f'{section.tempfile} has {"no " if cache.classes is None else ""}classes, '
                        f'and the teacher {teacher.num_classes}; make one with dynamic_prepare.py')
    return source(teacher, cache, batch, rng, section.prob)


# --- Training ------------------------------------------------------------------------------------


def new_network(section: configs.Training, seed: int, running=None) -> torch.nn.Module:
    """The network of a section, with random weights by `seed` or those of its `model_path`; for a
    dry run see `recipe.device_of`.
    """
    torch.manual_seed(seed)
    device = recipe.device_of(running, (running or {}).get('transfer'))
    return build(section, section.model_path).train().to(device)


def description(net, name: str, size: int = 0) -> dict:
    """What snapshots keep of the data of a network."""
    return {'name': name, 'size': size, 'resolution': net.img_resolution,
            'num_channels': net.img_channels, 'label_dim': net.label_dim}


def train(section: configs.Training, net, loss, batches, outdir: str | None, *, rule: dict,
          dataset: dict, options: dict, running: dict, encoder=None):
    """Trains `net` as the section says, with checkpoints in `outdir`, from the newest one there.

    outdir   None: experiments/NAME of the configuration, or of one's own teacher
    rule     name and settings of the loss, for the recipe
    dataset  description of what is learned
    options  settings, for training_options.json, with `config` or `own_teacher`, and `seed`
    encoder  of the images; None: they are pixels
    running  `keep_checkpoints`, `nan_patience`, `transfer` and `transfer_sha256` of the recipe,
             and further arguments of
             `recipe.fit`; without `resume_from`, that is the section's

    Raises UserError for a checkpoint of another run.
    """
    encoder = encoder or RGBEncoder()
    batch = section.batch_size
    steps = section.total_steps or section.lr_anneal_steps or ENDLESS
    save = section.save_interval * batch
    rates = configs.ema_rates(section.ema_rate)
    loss_scale = None
    if net.model.precision == 'fp16':
        if dist.get_device().type == 'cuda':
            loss_scale = {'growth': section.fp16_scale_growth}
        else:
            dist.print0('Note: float16 is for GPUs; this CPU computes in float32')
    if steps == ENDLESS:
        dist.print0('Training until it is stopped: Ctrl-C or SIGTERM saves a checkpoint '
                    '(total_steps=N sets an end)')
    rules = recipe.Recipe(
        batch=batch, total_nimg=steps * batch, seed=options['seed'], dataset=dataset, loss=rule,
        network=section.arguments(),
        optim={'name': 'AdamW', 'weight_decay': section.weight_decay},
        learning_rate={'name': 'anneal', 'lr': section.lr,
                       'anneal_steps': section.lr_anneal_steps},
        averages={'name': 'constant', 'rates': rates},
        encoder=encoder.config(), sampler={'name': 'ddpm'}, bad_gradients=None, layout='guided',
        batch_gpu=None if section.microbatch == -1 else section.microbatch,
        status=section.log_interval * batch, snapshot=save, checkpoint=save,
        keep_checkpoints=running.pop('keep_checkpoints'),
        nan_patience=running.pop('nan_patience'), loss_scale=loss_scale,
        transfer=running.pop('transfer'), transfer_sha256=running.pop('transfer_sha256'))
    watched = {name: running.pop(name) for name in WATCHED if name in running}
    running['resume_from'] = running['resume_from'] or section.resume_checkpoint or None
    layout = functools.partial(CacheCheckpoints, cache_interval=section.cache_save_interval)
    config = options['config']
    outdir = outdir or configs.default_outdir(config, options.get('own_teacher'))
    advice = 'python generate_images.py --net={snapshot} --seeds=0-63 --grid=samples.png'
    if config:
        advice = (f'python scripts/image_sample.py --config {shlex.quote(config)} '
                  f'--model_path {{folder}}/ema_{rates[-1]}_{steps:06d}.pt')
    with renamed_fields(resume_from='resume_checkpoint', batch='batch_size'):
        complete = recipe.fit(
            rules, outdir, net, loss, batches, options=options, layout=layout, advice=advice,
            watch=Watch(Scorer, **watched),
            outputs=[recipe.sample_grids(outdir, encoder, rules)],
            allow_changes=section.allow_changes, **running)
    if complete:
        dist.print0(f'{steps} steps done')
