"""A recipe is everything that decides the weights of a run, as plain values; `fit` trains by it.

A study writes down a `Recipe`, builds its loss and its batches, and calls `fit`. What a checkpoint
must agree with to be resumed is every field of the recipe but those in `RUNNING`.
"""

import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Callable

import torch

from dnnlib import UserError
from dnnlib.util import (
    command_line,
    need_package,
    one_line,
    publishable,
    renamed_fields,
    to_json,
)
from torch_utils import distributed as dist
from training import loop, runs
from training.checkpoint import LAYOUTS, WRONG, CheckpointError, Checkpoints
from training.data.dataset import resolution_of
from training.data.images import open_dataset
from training.encoders import encoder_for, make_encoder
from training.flops import size_of, training_step
from training.generate import save_sample_grid
from training.health import Diverged
from training.networks import build_network
from training.networks.layers import sides
from training.transfer import transfer


def _settings(**values):
    return dataclasses.field(default_factory=lambda: values)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained. Counts are training images over all processes; those of what is
    done every so many are 0 or None for never.

    dataset        description of what is learned (`Dataset.description()`); snapshots keep it
    order          how the images follow each other, e.g. {'name': 'window', 'window_size': 0.5}
    network        arguments of `build_network`, with `class_name`
    loss           name and settings, see training.diffusion.losses.LOSSES
    optim          name and settings, see training.loop.OPTIMIZERS
    learning_rate  name and settings, see training.schedules.LR_SCHEDULES
    averages       name and settings of the averages of the weights, see training.ema.AVERAGES
    sampler        name and settings of the sampler for this network; snapshots keep it
    bad_gradients  what takes the place of NaN, +Inf and -Inf in gradients; None leaves them
    transfer       file or URL of the weights that a new run starts from, or None (see
                   training.transfer); transfer_sha256: SHA-256 that it must have
    first_nimg     what counting starts from: a fine-tuned network's earlier training
    layout         of checkpoints, see training.checkpoint.LAYOUTS
    batch_gpu      images of one forward pass; None: all of a process
    ls             factor of the loss against underflow of float16 gradients, divided out again
    loss_scale     settings of a `DynamicLossScale` in its place, or None
    nan_patience   bad steps in a row that end the run (see training.health); 0: none do
    keep_checkpoints  the newest so many stay; 0: all
    bench          cuDNN may choose the fastest convolutions
    shard          each process holds a part of the network (see training.shards)
    """

    batch: int
    total_nimg: int
    seed: int = 0
    dataset: dict = _settings()
    order: dict = _settings()
    network: dict = _settings()
    loss: dict = _settings()
    optim: dict = _settings(name='Adam')
    learning_rate: dict = _settings(name='constant', lr=1e-3)
    averages: dict = _settings(name='power', stds=(0.05, 0.10))
    encoder: dict = _settings(name='rgb')
    sampler: dict | None = None
    clip_grad_norm: float | None = None
    bad_gradients: tuple | None = (0, 0, 0)
    transfer: str | None = None
    transfer_sha256: str | None = None
    first_nimg: int = 0
    layout: str = 'state'
    snapshot_dtype: str = 'float16'
    batch_gpu: int | None = None
    status: int | None = None
    snapshot: int | None = None
    checkpoint: int | None = None
    keep_checkpoints: int = 0
    ls: float = 1.0
    loss_scale: dict | None = None
    nan_patience: int = 100
    bench: bool = True
    compile: bool = False
    shard: bool = False

    def __post_init__(self):
        for field, value in (('batch', self.batch), ('duration', self.total_nimg),
                             ('batch_gpu', self.batch_gpu)):
            if value is not None and value < 1:
                raise UserError('must be at least 1', field, value)
        if self.transfer_sha256 and not self.transfer:
            raise UserError('is of a file; give the snapshot too', 'transfer_sha256',
                            self.transfer_sha256)
        if self.shard and (self.compile or self.layout != 'state'):
            raise UserError('cannot be compiled, nor written in another layout than state; leave '
                            'one of them out', 'shard')

    @classmethod
    def of(cls, config: dict, **fields):
        """The recipe of `fields`, and for the others what `config` has under their names."""
        named = {name: config[name] for name in cls.__annotations__ if name in config}
        return cls(**named | fields)

    def settings(self, options: dict | None = None) -> dict:
        """The recipe as files keep it, with a script's `options` beside it."""
        return publishable(json.loads(json.dumps((options or {}) | dataclasses.asdict(self))))


# Fields that may change from one start of a run to the next.
RUNNING = ('total_nimg', 'batch_gpu', 'status', 'snapshot', 'checkpoint', 'keep_checkpoints', 'ls',
           'loss_scale', 'nan_patience', 'bench', 'compile', 'shard', 'transfer_sha256')


def _flatten(values: dict, path: str = '') -> dict:
    """All values that are no dictionaries, by paths like network.dropout."""
    flat = {}
    for key, value in values.items():
        name = f'{path}{key}'
        flat |= _flatten(value, name + '.') if isinstance(value, dict) else {name: value}
    return flat


def _by_option(values: dict) -> dict:
    """The same by the names that options have in a recipe; later ones win."""
    return {path.rpartition('.')[2].lstrip('-').replace('-', '_'): value
            for path, value in _flatten(values).items()}


def changes(state: dict, settings: dict) -> dict[str, str]:
    """What differs between the recipe in a checkpoint's state and `Recipe.settings()` of a run,
    {path like network.dropout: line that says it}.
    """
    if 'identity' not in state:
        recipe = {'transfer': None} | state['recipe'] if state['recipe'] else {}
        fields = [field for field in Recipe.__annotations__ if field in recipe]
        old, new = (_flatten(publishable({field: values[field] for field in fields}))
                    for values in (recipe, settings))
        # Of an earlier version: it says nothing of the content of files.
        paths = [path for path in old | new if path in old or not path.endswith('fingerprint')]
    else:  # of an earlier version: its identity has options by name
        dataset = settings['dataset']
        old = _by_option(json.loads(json.dumps(state['identity'])))
        new = _by_option(settings | {'sampler': None}) | _by_option(settings['network']) | {
            'data set': [dataset.get('name'), dataset.get('size')],
            'batch_size': settings['batch']}
        paths = [path for path in old if path in new]
    return {path: f'{path} {old.get(path)} -> {new.get(path)}'
            for path in paths if old.get(path) != new.get(path)}


def seed_of(state: dict) -> int | None:
    """The seed of the run that a checkpoint's state is of, if it says."""
    return state['recipe'].get('seed') if 'recipe' in state else state['identity']['--seed']


def check_changes(state: dict, settings: dict, allow: bool) -> list[str]:
    """The changes since a checkpoint, for the log.

    Raises UserError for those that make another run of it, unless `allow`, and where the
    checkpoint has seen more images than the run is to see.
    """
    try:
        found = changes(state, settings)
        is_later = state['nimg'] - settings['batch'] >= settings['total_nimg']  # a step ago
    except WRONG as error:
        raise CheckpointError(f'{state["path"]} does not say what run it is of '
                              f'({one_line(error)})') from None
    refused = [path for path in found if path.split('.')[0] not in RUNNING]
    # The size and the fingerprints follow from other fields, which are named first.
    refused.sort(key=lambda path: path.endswith(('dataset.size', 'fingerprint')))
    if refused and not allow:
        more = f' and {len(refused) - 1} more' if len(refused) > 1 else ''
        # What is called a name goes by the field that it is the name of.
        field = refused[0].removesuffix('.name').rpartition('.')[2]
        raise UserError(f'{state["path"]} is of a run with other settings: {found[refused[0]]}'
                        f'{more}; choose another folder, or allow changes', field)
    if is_later:
        raise UserError(f'{state["path"]} has seen {state["nimg"]} images, more than the '
                        f'{settings["total_nimg"]} asked for; choose another folder', 'duration')
    return list(found.values())


OVERHEAD = 400  # bytes of a tensor in a file besides its numbers

# --- Training -----------------------------------------------------------------------------------


def open_data(data: str, cond: bool, **options):
    """(data set, encoder, arguments of build_network that follow from them).

    `options` go to `open_dataset`. Raises UserError where the data set does not fit.
    """
    dataset = open_dataset(data, use_labels=cond, **options)
    if cond and not dataset.has_labels:
        raise UserError(f'needs labels, and {data} has none; train without: False', 'cond', cond)
    encoder = make_encoder(encoder_for(dataset))
    channels, *size = encoder.latent_shape(dataset.image_shape)
    return dataset, encoder, dict(img_resolution=resolution_of(*size), img_channels=channels,
                                  label_dim=dataset.label_dim)


def choose_precision(precision: str | None, fp16: bool | None = None) -> str:
    """`precision`, or what `fp16` says, or what suits the machine."""
    on_gpu = torch.cuda.is_available()
    if precision is None:
        precision = 'fp16' if (on_gpu if fp16 is None else fp16) else 'fp32'
    elif fp16 is not None and fp16 != (precision == 'fp16'):
        raise UserError(f'contradicts precision {precision}; give one of them', 'fp16', fp16)
    if precision == 'fp16' and not on_gpu:
        raise UserError('fp16 needs a GPU; on the CPU train with fp32 or bf16', 'precision')
    return precision


def device_of(running: dict | None, transfer: str | None = None) -> torch.device:
    """Where a run, with further arguments of `fit`, has its networks; those of a dry run need no
    weights, unless it takes steps, or `transfer` names others.
    """
    running = running or {}
    if running.get('dry_run') and not running.get('bench_steps') and not transfer:
        return torch.device('meta')
    return dist.get_device()


def new_network(recipe: Recipe, running: dict | None = None) -> torch.nn.Module:
    """The network with the random weights of the seed, on the device of this process; for a dry
    run, of which `running` (see `device_of`) tells, without weights.
    """
    device = device_of(running, recipe.transfer)
    torch.manual_seed(recipe.seed)
    at = torch.device('meta') if device.type == 'meta' else contextlib.nullcontext()
    with at, renamed_fields(img_resolution='data'):
        net = build_network(**recipe.network)
    if recipe.shard and dist.get_world_size() > 1 and device.type == 'cuda':
        return net.train()                                     # it goes there in shards
    return net.train().to(device)


def _files(recipe: Recipe, every: int | None, number: Callable[[int], int]) -> int:
    """Files of a run that are written every so many images; `number` is what is in their names."""
    if not every:
        return 0
    first, batch = recipe.first_nimg, recipe.batch
    every = max(every, batch)
    last = first + -(-(recipe.total_nimg - first) // batch) * batch
    multiples = range(first - first % every + every, last + 1, every)
    if len(multiples) > 1_000_000:                             # of a run that has no end
        return len(multiples)
    return len({number(first - (first - nimg) // batch * batch) for nimg in (*multiples, last)})


def _moments(recipe: Recipe) -> int:
    """Numbers of the optimizer for each parameter."""
    return 2 - (recipe.optim['name'] == 'SGD')


def disk_use(recipe: Recipe, net: torch.nn.Module) -> dict:
    """What a run writes, but for its logs and pictures, in files and bytes:
    {'snapshots': {'files', 'bytes_each'}, 'checkpoints': the same, 'total_bytes'}.
    """
    tensors = net.state_dict().values()
    parameters = list(net.parameters())
    weights = size_of(tensors)
    dtype = getattr(torch, recipe.snapshot_dtype)
    saved = sum(p.numel() * (p.itemsize - dtype.itemsize) for p in parameters)
    averages = len(loop.averages_of(recipe))
    moments = _moments(recipe)
    of_optimizer = moments * size_of(parameters)
    states = (1 + averages) * len(tensors) + (moments + 1) * len(parameters)
    each = {'snapshots': weights - saved + OVERHEAD * len(tensors),
            'checkpoints': (1 + averages) * weights + of_optimizer + OVERHEAD * states}
    layout = LAYOUTS[recipe.layout]('', recipe.batch)
    files = {'snapshots': averages * _files(recipe, recipe.snapshot, Checkpoints('').number),
             'checkpoints': _files(recipe, recipe.checkpoint, layout.number)}
    if recipe.keep_checkpoints:
        files['checkpoints'] = min(files['checkpoints'], recipe.keep_checkpoints)
    return {name: {'files': files[name], 'bytes_each': each[name]} for name in each} | {
        'total_bytes': sum(files[name] * each[name] for name in each)}


def cost(recipe: Recipe, net: torch.nn.Module, loss: Callable, batches,
         seconds: float | None = None) -> dict:
    """What a run takes, by calculation (`flops.training_step`), and how long, if a step takes so
    many seconds; `net`, and networks that make the batches, have no weights afterwards.

    Memory is that of each process, with activations of `images_at_a_time`: all of its share of a
    step, or `batch_gpu`. In shards they are those of `kept`, and `gathered` is what a pass has
    whole at a time: the layers outside of blocks, a block with its gradients, and another one that
    comes or goes.
    """
    def rounded(value):
        return float(f'{value:.4g}')

    size = recipe.dataset.get('size')
    images = recipe.total_nimg - recipe.first_nimg
    parameters = list(net.parameters())
    _, count = loop.shares(recipe)
    bytes_of = {
        'weights': size_of([*parameters, *net.buffers()]),
        'gradients': size_of(parameters), 'optimizer': _moments(recipe) * size_of(parameters)}
    bytes_of['averages'] = len(loop.averages_of(recipe)) * bytes_of['weights']
    if recipe.shard and dist.get_world_size() > 1:
        from training.shards import blocks  # slow to import
        sizes = [size_of(block.parameters()) for block in blocks(net)]
        gathered = size_of(parameters) - sum(sizes) + 4 * max(sizes, default=0)
        bytes_of = {name: value // dist.get_world_size() for name, value in bytes_of.items()}
        bytes_of['gathered'] = gathered
    if batches.frozen:
        bytes_of['teacher'] = sum(size_of([*frozen.parameters(), *frozen.buffers()])
                                  for frozen in batches.frozen)
    for frozen in batches.frozen:
        frozen.to('meta')
    step = training_step(net, loss, batches.example, count)
    bytes_of['activations'] = step['kept' if 'gathered' in bytes_of else 'activations']
    bytes_of['total'] = sum(bytes_of.values())
    steps = -(-images // recipe.batch)
    lines = {
        'parameters': sum(p.numel() for p in parameters),
        'gflop_of_an_image': {name: rounded(step[name] / 1e9) for name in ('forward', 'step')},
        'memory_gib': {name: rounded(value / 2**30) for name, value in bytes_of.items()},
        'images_at_a_time': count, 'steps': steps,
        'epochs': rounded(images / size) if size else None}
    if seconds is not None:
        lines |= {'seconds_of_a_step': seconds, 'images_per_sec': recipe.batch / seconds,
                  'hours': seconds * steps / 3600}
    return lines


def sample_grids(run_dir: str, encoder, recipe: Recipe) -> loop.Output:
    """Samples of the first average: samples-<kimg>.png."""
    def path(nimg):
        return os.path.join(run_dir, f'samples-{nimg // 1000:07d}.png')

    def draw(nimg, net):
        save_sample_grid(path(nimg), net, encoder, recipe.dataset, sampler=recipe.sampler,
                         title=f'Samples after {nimg:,} training images')
        return {'Samples': path(nimg)} if os.path.isfile(path(nimg)) else None

    return loop.Output(recipe.snapshot, draw, lambda nimg: os.path.isfile(path(nimg)))


def fit(recipe: Recipe, run_dir: str, net, loss: Callable, batches, *, options: dict | None = None,
        outputs=(), layout=None, files: dict[str, str] | None = None,
        resume_from: str | None = None, allow_changes: bool = False,
        wandb: str | None = None, watch=None, advice: str = '', dry_run: bool = False,
        bench_steps: int = 0) -> bool:
    """Trains `net` (in place) by the recipe, going on from the newest checkpoint in `run_dir`.

    net            from `new_network`: the same on every process
    loss           (net, batch) -> (loss [N], {name: values}); its mean over the batch is minimised
    batches        has `iterate(plan)`, a generator of batches for pairs (first image, count), and
                   `state_dict`s (see training.data.batches)
    options        a script's options, for training_options.json and the snapshots
    outputs        pictures and measurements, each a `loop.Output`
    files          {name: text} of further files for the folder of the run
    layout         class of the checkpoints, where it is not that of the recipe's name
    resume_from    checkpoint to start from if the folder has none
    allow_changes  resume though the recipe has changed
    wandb          project of Weights & Biases to log to
    watch          `training.watch.Watch`: what to measure of the averages
    advice         what to do with the results, e.g. a command line, in which {folder}, {snapshot},
                   {checkpoint} and {step} stand for those of this run
    dry_run        print the settings and what the run would write and cost, and train nothing:
                   `net` needs no weights then
    bench_steps    take so many steps in a dry run, for the time that the run would take. They
                   change the weights of `net`, and write nothing

    SIGTERM and SIGINT end it after the current step, with a checkpoint; the second one ends the
    process. Returns whether the run came to its end. Raises UserError, before anything is written,
    if a checkpoint is of another recipe or another process trains in the folder.
    """
    if wandb:
        need_package('wandb', 'wandb')
    if bench_steps and not dry_run:
        raise UserError('measures for a dry run alone', 'bench_steps', bench_steps)
    torch.backends.cudnn.benchmark = recipe.bench
    trainer = loop.Trainer(recipe, net, loss, batches, run_dir, options, layout, outputs,
                           advice)
    measurements = None if watch is None else watch.start(trainer)
    if measurements:
        trainer.outputs = (*trainer.outputs, measurements.output())
    if dry_run:
        if recipe.transfer and not trainer.checkpoints.numbers():
            for line in _transfer(trainer).lines():
                dist.print0(line)
        seconds = trainer.seconds_of_step(bench_steps) if bench_steps else None
        if trainer.shards:
            net = trainer.whole(net, 'meta', everywhere=True).requires_grad_()
        plan = trainer.settings | dict(outdir=run_dir, disk=disk_use(recipe, net))
        del trainer, measurements                              # and their memory
        plan['cost'] = cost(recipe, net, loss, batches, seconds)
        dist.print0(to_json(plan, indent=2))
        return False
    state, changed = _load_checkpoint(trainer, resume_from, allow_changes)
    if state is not None and trainer.is_complete() and not (changed and allow_changes):
        with runs.claimed(run_dir, 'training'):
            for line in (f'Already complete: {trainer.nimg} images', *trainer.results()):
                dist.print0(line)
        return True
    start = [f'Starting at {recipe.first_nimg} images']
    transferred = {}
    if state is not None:
        start = [f'Resuming from {trainer.nimg} images ({state["path"]})']
    elif recipe.transfer:
        table = _transfer(trainer)
        trainer.ema.restart(net)
        transferred['transfer'] = table.summary
        start += table.lines()
    lines = [*_heading(recipe, net, run_dir, options), *start]
    if measurements:
        measurements.prepare()
    try:
        trainer.run(lines, changed, files, wandb, transferred)
    except Diverged:
        dist.barrier()          # the first process has more to close, and launchers end the others
        raise
    return trainer.complete


def _transfer(trainer):
    """`transfer` to the network of a run."""
    net = trainer.whole(trainer.net, 'cpu', everywhere=True)
    table = transfer(net, trainer.recipe)
    if trainer.shards:
        trainer.net.load_state_dict(trainer.shards.split(net.state_dict(), 'net'))
    return table


def _load_checkpoint(trainer, resume_from: str | None, allow_changes: bool):
    """(state, changes of the recipe since) of the checkpoint that the run goes on from: the newest
    in its folder, else `resume_from`; (None, []) for a new run.
    """
    changed = []

    def use(state):
        changed[:] = check_changes(state, trainer.settings, allow_changes)
        trainer.load(state)

    state = trainer.checkpoints.load_newest(trainer.log, use)
    if state is None and resume_from:
        if not os.path.isfile(resume_from):
            raise UserError('is no file', 'resume_from', resume_from)
        state = trainer.checkpoints.load(resume_from)
        use(state)
    if state is not None:
        unknown = {} if 'identity' in state else {'tf32': False}
        if 'tf32' not in runs.read_options(trainer.run_dir).get('starts', [unknown])[0]:
            dist.set_tf32(dist.uses_tf32(), convolutions=True)  # as it began, in earlier versions
    return state, changed


def _heading(recipe: Recipe, net: torch.nn.Module, run_dir: str, options: dict | None):
    """The first lines of a log: what is trained on what, where, and by which command."""
    data = recipe.dataset
    images = ''
    if size := data.get('size'):
        shape = data.get('num_channels'), *sides(data.get('resolution', 0))
        images = f'{size} images of {"x".join(map(str, shape))}, '
    parameters = sum(p.numel() for p in net.parameters())
    yield f'Data: {data.get("name")}, {images}{data.get("label_dim")} classes'
    kind = type(net).__name__.removeprefix('FSDP')             # of networks in shards
    yield (f'Network: {kind}, {parameters / 1e6:.2f}M parameters, loss '
           f'{recipe.loss.get("name", "")}, on {dist.environment()["device"]}, '
           f'{dist.get_world_size()} process(es), batch {recipe.batch}, to {recipe.total_nimg} '
           'images')
    precision = recipe.loss.get('precision', getattr(net, 'precision', None))
    if precision == 'bf16' and not dist.has_fast_bf16():
        yield 'Note: this processor has no products of bfloat16, so bf16 is slower than fp32 here'
    yield f'Run: {run_dir}'
    yield f'Command: {shlex.join(command_line())}'
    for name, path in runs.private_paths(options).items():
        yield f'Path of {name}: {path}'
