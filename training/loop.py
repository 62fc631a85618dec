"""The one training loop. It knows nothing of any study: it has a recipe, a loss and batches."""

import contextlib
import copy
import dataclasses
import functools
import os
import shlex
import threading
import time
import unittest.mock
import warnings
from collections.abc import Callable

import psutil
import torch
from tqdm import tqdm

from dnnlib import UserError, budget, pictures, progress
from dnnlib.util import (
    DISK_ERRORS,
    format_count,
    format_time,
    one_line,
    remove_leftovers,
    to_json,
    without_codes,
    write_bytes,
    writing,
)
from torch_utils import distributed as dist
from torch_utils.files.pickles import UnreadableError
from torch_utils.files.weights import NonFiniteError, check_finite, load_weights, nonfinite
from torch_utils.stats import RunningMeans
from torch_utils.stopping import Stopper
from training import runs
from training.checkpoint import LAYOUTS, WRONG, CheckpointError, load_optimizer
from training.data.batches import DatasetBatches
from training.ema import AVERAGES, Average, Averages
from training.encoders import make_encoder
from training.health import Diverged, Health
from training.loss_scale import DynamicLossScale
from training.networks import compiled
from training.schedules import LR_SCHEDULES
from training.snapshot import describe, list_snapshots, save_snapshot, snapshot_name

# The optimizers of a recipe, by name.
OPTIMIZERS = {'Adam': torch.optim.Adam, 'AdamW': torch.optim.AdamW, 'SGD': torch.optim.SGD}
LOOK_STEPS = 1000   # between looks at the health of a run that reports seldom
FLUSH_SECONDS = 10
NAMES_SHOWN = 4     # of the files of a batch
LONGEST_ETA = 1000 * 86400  # seconds; of a run that has no end it is not said
GRADIENT_NORM = 'Progress/grad_norm'


# The new name of broadcast_buffers is not known to older versions of torch.
warnings.filterwarnings('ignore', message='`broadcast_buffers` is deprecated')


def _named(table: dict, settings: dict) -> Callable:
    """The function of a table that `settings['name']` names, with the other settings."""
    settings = dict(settings)
    return functools.partial(table[settings.pop('name')], **settings)


@functools.cache
def _silence_tensorboard():
    """Its thread says nothing of a disk that is full or broken: it hands the error on to who
    writes next.
    """
    before = threading.excepthook

    def hook(args):
        other = not type(args.thread).__module__.startswith('tensorboard')
        if other or getattr(args.exc_value, 'errno', None) not in DISK_ERRORS:
            before(args)

    threading.excepthook = hook


def averages_of(recipe) -> list[Average]:
    """The averages of the weights, as a recipe says."""
    return _named(AVERAGES, recipe.averages)()


def shares(recipe) -> tuple[int, int]:
    """Images of a step of each process, and of a forward pass."""
    processes = dist.get_world_size()
    if recipe.batch % processes:
        raise UserError(f'cannot be split over {processes} processes', 'batch', recipe.batch)
    share = recipe.batch // processes
    return share, min(recipe.batch_gpu or share, share)


@dataclasses.dataclass(frozen=True)
class Output:
    """What a run makes after the step's checkpoint and snapshots: a picture, or a measurement.

    every     so many images; 0 or None: never
    make      (number of the step or nimg, first of the averaged networks) -> what to log,
              {name: number or path of a picture}, or None
    exists    number -> whether it was made: what a run was killed before is made when it goes on
    at_end    also after the last step, whatever its number
    together  all processes call `make`, which ends at `stopping.stop_point`s and gathers what is
              in shards (`Trainer.whole`); else the first one does, while the others wait
    ends      why the run is to end now, before its last step; '' to go on
    """

    every: int | None
    make: Callable
    exists: Callable
    at_end: bool = True
    together: bool = False
    ends: Callable = str


@dataclasses.dataclass(eq=False)
class Trainer:
    """Trains `net` (in place) by a recipe; see `training.recipe.fit` for the arguments."""

    recipe: object
    net: torch.nn.Module
    loss: Callable
    batches: object
    run_dir: str
    options: dict | None = None
    layout: Callable | None = None
    outputs: tuple = ()
    advice: str = ''

    def __post_init__(self):
        recipe = self.recipe
        net = self.net
        self.leads = dist.get_rank() == 0                     # writes the files
        self.per_process, self.batch_gpu = shares(recipe)
        # As checkpoints, snapshots and training_options.json keep it.
        self.settings = recipe.settings(self.options)
        self.device = next(net.parameters()).device
        self.shards = None
        if recipe.shard and self.device.type != 'meta':
            self._shard()
        self.weights = self.shards.weights if self.shards else list(net.parameters())
        self.lr_schedule = _named(LR_SCHEDULES, recipe.learning_rate)
        optimizer = {'lr': recipe.learning_rate['lr'], 'fused': True} | recipe.optim
        self.optimizer = _named(OPTIMIZERS, optimizer)(
            p for p in self.weights if p.requires_grad)
        self.ema = Averages(net, averages_of(recipe),
                            self.shards.copy_of if self.shards else copy.deepcopy)
        scale = recipe.loss_scale
        self.loss_scale = None if scale is None else DynamicLossScale(**scale)
        self.snapshot = dict(encoder=make_encoder(recipe.encoder), dataset=recipe.dataset,
                             recipe=self.settings, sampler=recipe.sampler)
        layout = self.layout or LAYOUTS[recipe.layout]
        self.checkpoints = layout(self.run_dir, recipe.batch,
                                  lambda: describe(net, **self.snapshot))
        self.means = RunningMeans(self.device)
        self.health = Health(self.device, self.per_process)
        self._warned = False
        self._finite = None, True                             # nimg, and whether the weights were
        self.nimg = recipe.first_nimg
        self.stopping = False                                 # all processes know that they are
        self.complete = False
        self._cut = False                                     # by a request to stop: the outputs
        self._ended = ''                                      # why, if before the last step
        self._saved = None                                    # nimg of the newest checkpoint
        self._session_start = time.time()                     # if there was but one session

    def _shard(self):
        """Cuts the network over the processes, where there are several."""
        if dist.get_world_size() == 1:
            dist.print0('Note: on one process there is nothing to cut into shards')
            return
        from training.shards import Shards  # slow to import
        self.device = dist.get_device()
        self.shards = Shards(self.net, self.device)

    def whole(self, net, device=None, everywhere: bool = False):
        """A network of the run, gathered on `device` if it is in shards: for the first process (on
        others it has no weights), or `everywhere`. All processes call it.
        """
        if not self.shards:
            return net
        return self.shards.gather(net, device or self.device, everywhere)

    def lr(self, nimg: int) -> float:
        """The learning rate of the step after `nimg` images."""
        return self.lr_schedule(nimg - self.recipe.first_nimg, self.recipe.batch)

    # --- The run --------------------------------------------------------------------------------

    def run(self, lines=(), changes=(), files: dict | None = None,
            wandb: str | None = None, start: dict | None = None) -> int:
        """Trains until `recipe.total_nimg`, or until SIGTERM or SIGINT; returns the images seen.
        Whether it came to its end is in `complete`.

        lines    first ones of the log
        changes  of the recipe since the checkpoint, for the log and the record
        files    {name: text} of further files to write
        wandb    project of Weights & Biases
        start    what else the record is to say of this start
        """
        total = self.recipe.total_nimg
        notice = 'stopping after this step, with a checkpoint; once more ends at once'
        with contextlib.ExitStack() as stack:
            stack.enter_context(writing(self.run_dir))
            self._stopper = stack.enter_context(Stopper(notice if self.leads else ''))
            if self.leads:
                stack.enter_context(runs.claimed(self.run_dir, 'training'))
                for line in (*lines, *(f'Changed: {change}' for change in changes)):
                    self.log(line)
                ids = {'wandb': runs.wandb_id(self.run_dir)} if wandb else {}
                runs.add_start(self.run_dir, self.settings, world_size=dist.get_world_size(),
                               nimg=self.nimg, changes=changes, **ids, **start or {})
                for name, text in (files or {}).items():
                    write_bytes(self._path(name), text.encode())
                self._remove_later()
                self._open_boards(stack, wandb and dict(project=wandb, id=ids['wandb']))
            self.model = self._wrap()
            self.net.train()
            self._make_outputs(self.missing())
            self._tick_nimg = self._first = self.nimg
            self._tick_start = self._start = time.time()
            steps = stack.enter_context(contextlib.closing(self.batches.iterate(self._plan())))
            # disable=None: shown on a terminal only.
            bar = stack.enter_context(
                progress.bar(show=self.leads, total=total, initial=self.nimg, unit='img',
                             unit_scale=True, leave=False))
            while self.nimg < total and not (self.stopping or self._ended):
                self._step(steps)
                bar.update(self.recipe.batch)
                self._after_step()
            complete = (self.nimg >= total or bool(self._ended)) and not self._cut
            if (self._ended or not complete) and self._saved != self.nimg > self.recipe.first_nimg:
                self._save_checkpoint()
            if complete:
                if self._ended:
                    self.log(f'Ended early: {self._ended}')
                for line in (f'Complete after {self.nimg} images', *self.results()):
                    self.log(line)
            else:
                self.log(f'Stopped at {self.nimg} images; the same command goes on from here.')
            self.complete = complete and not self._agree_to_stop()
        return self.nimg

    def _agree_to_stop(self) -> bool:
        """Whether any process was told to stop, the same on all."""
        self.stopping = self.stopping or dist.any_rank(self._stopper.requested)
        return self.stopping

    def seconds_of_step(self, count: int) -> float:
        """The mean of `count` steps after a first one; they change the weights."""
        self.model = self._wrap()
        self.net.train()
        plan = self._plan(self.nimg + (count + 1) * self.recipe.batch)
        with contextlib.closing(self.batches.iterate(plan)) as steps:
            times = []
            for last in (0, count):
                while self.health.steps <= last:
                    self._step(steps)
                self.health.look()                            # waits for the device
                times.append(time.perf_counter())
        return (times[1] - times[0]) / count

    def _plan(self, end: int | None = None):
        """(first image, count) of each micro-batch of this process, to the end of the run."""
        for start in range(self.nimg, end or self.recipe.total_nimg, self.recipe.batch):
            first = start + dist.get_rank() * self.per_process
            for offset in range(0, self.per_process, self.batch_gpu):
                yield first + offset, min(self.batch_gpu, self.per_process - offset)

    def _wrap(self):
        if self.shards:
            return self.shards
        model = compiled(self.net) if self.recipe.compile else self.net
        if dist.get_world_size() == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _step(self, steps):
        """One step of the optimizer over the whole batch, and of the averages after it.

        Nothing here waits for the GPU.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr(self.nimg)
        self.optimizer.zero_grad(set_to_none=True)
        scaling = self.loss_scale.value if self.loss_scale else self.recipe.ls
        factor = scaling / self.per_process             # the gradient is the mean over processes
        several = dist.get_world_size() > 1
        losses = []
        for offset in range(0, self.per_process, self.batch_gpu):
            last = offset + self.batch_gpu >= self.per_process
            # Processes exchange gradients in the last backward pass only.
            with contextlib.nullcontext() if last or not several else self.model.no_sync():
                loss, terms = self.loss(self.model, next(steps))
                (loss.sum() * factor).backward()
            losses.append(loss.detach())
            sigma = terms.pop('sigma', None)
            self.means.add({f'Loss/{name}': values for name, values in terms.items()})
            if sigma is not None:
                self.means.add_by_level('LossAtSigma', terms['loss'], sigma)
        if self._clean_gradients(scaling, losses):
            self.optimizer.step()
            self.ema.update(self.net, self.nimg, self.recipe.batch)
        self.nimg += self.recipe.batch

    def _clean_gradients(self, scaling: float, losses: list) -> bool:
        """Brings the gradients to their own scale; False if they overflowed, to skip the step."""
        norms_of = torch._foreach_norm
        if self.shards:
            self.shards.collect_gradients()
            norms_of = self.shards.norms
        grads = [p.grad for p in self.weights if p.grad is not None]
        if self.loss_scale and not self.loss_scale.update(grads, norms_of):
            self.health.add(self.nimg, losses, skipped=True)
            return False
        if scaling != 1:
            torch._foreach_div_(grads, scaling)
        norms = norms_of(grads)
        # Of the weights whose gradients are finite.
        self.means.add({GRADIENT_NORM: torch.stack(norms).nan_to_num(0, 0, 0).norm()})
        if self.recipe.bad_gradients is None:
            norms = None
        else:
            for grad in grads:
                grad.nan_to_num_(*self.recipe.bad_gradients)
        self.health.add(self.nimg, losses, norms)
        if self.recipe.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.recipe.clip_grad_norm,
                                                 torch.stack(norms_of(grads)).norm())
        return True

    # --- Divergence -----------------------------------------------------------------------------

    def _look(self):
        """Warns of the first loss that was not finite. Raises Diverged at the end of the run's
        patience, and at the end of the run if it learned nothing in most of its steps.
        """
        streak, unskipped, first = self.health.look()
        if first >= 0 and not self._warned:
            self._warned = True
            images = self.health.first_images(first)
            self.log(f'Warning: in the step after {first} images the loss of {len(images)} of '
                     f'{self.recipe.batch} is not finite{self._files(first, images)}')
        patience = self.recipe.nan_patience
        what = f'losses or gradients of the last {streak} steps'
        diverged = streak >= patience
        if self.nimg >= self.recipe.total_nimg and not diverged:
            diverged = 2 * unskipped > self.health.steps
            if not self._is_finite():
                what = 'weights'
                diverged = True
            elif unskipped and not (patience and diverged):
                self.log(f'Warning: {what} are not finite')
        if patience and diverged:
            numbers = self.checkpoints.numbers()
            kept = f'{self.checkpoints.path(numbers[-1])} is kept' if numbers else (
                'there is no checkpoint')
            text = (f'{self.run_dir} has diverged: {what} are not finite after {self.nimg} images;'
                    f' {kept}. Lower the learning rate, or look at what log.txt warns of')
            self.log(text, show=False)
            raise Diverged(text)

    def _files(self, first: int, images: list[int]) -> str:
        """': a.png, b.png and 3 more' for images of the step after `first`, if files have them."""
        if not self.leads or not isinstance(self.batches, DatasetBatches):
            return ''
        names = self.batches.files([first + i for i in images[:NAMES_SHOWN]])
        more = f' and {len(images) - len(names)} more' if len(images) > len(names) else ''
        return f': {", ".join(names)}{more}'

    def _is_finite(self) -> bool:
        """Whether the weights and their averages are, on every process."""
        if self._finite[0] != self.nimg:
            states = [net.state_dict() for net in (self.net, *self.ema.emas)]
            self._finite = self.nimg, not dist.any_rank(any(map(nonfinite, states)))
        return self._finite[1]

    @property
    def _count(self):
        """What logs and files go by: images, or the number of the step just taken."""
        steps = self.checkpoints.counts_steps
        return self.checkpoints.number(self.nimg) if steps else self.nimg

    def _due(self, every: int | None, at_end: bool = True) -> bool:
        """Whether the step just taken has passed a multiple of `every`, or was the last."""
        first = self.recipe.first_nimg
        if not every or self.nimg == first:
            return False
        batch = self.recipe.batch
        done = self.nimg - batch * self.checkpoints.counts_steps  # the first step is number 0
        before = max(done - batch, first)
        return at_end and self.nimg >= self.recipe.total_nimg or done // every != before // every

    def _after_step(self):
        """What can be lost last of all comes first: a run that is killed within its pictures goes
        on behind its newest step, and makes them then.
        """
        recipe = self.recipe
        seldom = LOOK_STEPS * recipe.batch
        if self._due(recipe.status):
            self._log_values(self._report())
        if self._due(min(recipe.status or seldom, seldom)):
            self._look()
        saves = self._agree_to_stop() or self._due(recipe.checkpoint)
        shows = self._due(recipe.snapshot)
        outputs = [output for output in self.outputs if self._due(output.every, output.at_end)]
        if not (saves or shows or outputs):
            return
        if self.device.type == 'cuda':
            torch.cuda.synchronize()                          # the time of steps is theirs
        start = time.time()
        if saves:
            self._save_checkpoint()
        if shows:
            self._save_snapshots()
            if self.leads:
                self._draw_losses()
        self._make_outputs(outputs)
        self._tick_start += time.time() - start

    def is_complete(self) -> bool:
        """Whether the folder has all that a run of this length writes, as the checkpoint says."""
        ended = self.nimg >= self.recipe.total_nimg or self._end_of_outputs()
        return bool(ended) and not self.missing()

    def _end_of_outputs(self) -> str:
        """Why an output ends the run, the same on all processes."""
        reasons = [output.ends() for output in self.outputs]
        return dist.broadcast_object(next(filter(None, reasons), ''))

    def missing(self) -> list[Output]:
        """What is due at the checkpoint that we go on from, and is not in the folder as that is;
        the same on all processes. Snapshots are an Output too.
        """
        snapshots = Output(self.recipe.snapshot, self._save_snapshots, self._has_snapshots,
                           together=True)
        losses = Output(self.recipe.snapshot, self._draw_losses,
                        lambda _: runs.has_loss_curve(self.run_dir))
        due = [output for output in (snapshots, losses, *self.outputs)
               if self._due(output.every, output.at_end)]
        ours = os.path.isfile(self._checkpoint_path())
        missing = [i for i, output in enumerate(due) if ours and not output.exists(self._count)]
        return [due[i] for i in dist.broadcast_object(missing)]

    def _make_outputs(self, outputs):
        """A request to stop ends them at once: there is a checkpoint, or one is saved then."""
        if outputs and not self._is_finite():
            return                                            # black pictures, numbers of nothing
        for output in outputs:
            if not self._agree_to_stop():
                average, _, _ = self.ema.get(self.net)[0]
                average = average if output.together else self.whole(average)
                if output.together or self.leads:
                    self._log_values(self._stopper.call(
                        output.make, self._count, average, together=output.together) or {})
                dist.barrier()
        self._cut = bool(outputs) and self._agree_to_stop()
        self._ended = self._end_of_outputs()

    # --- Files ----------------------------------------------------------------------------------

    def _path(self, name):
        return os.path.join(self.run_dir, name)

    def load(self, state: dict):
        """Goes on from a checkpoint's state. Raises CheckpointError if it does not fit, UserError
        if this is not the number of processes that it needs.
        """
        error = None
        try:
            self._load(state)
        except UserError as found:                            # one process may be alone with it
            error = found
        dist.raise_shared(error)

    def _as_here(self, state: dict) -> dict:
        """The state of a checkpoint as the tensors of this run are, whole or in shards."""
        if 'shards' in state:
            from training import shard_files  # slow to import
            return shard_files.read(state, self.shards and self.shards.empty)
        return self.shards.split(state) if self.shards else state

    def _load(self, state: dict):
        path = state['path']
        optimizer = self.recipe.optim['name']
        processes = dist.get_world_size()
        try:
            state = self._as_here(state)
            load_weights(self.net, state['net'], path)
            self.ema.load_state_dict(state['ema'])
            for ema in self.ema.emas:
                check_finite(ema.state_dict(), path)
            # Another optimizer, if such a change is allowed, begins anew.
            if state.get('recipe', {}).get('optim', {}).get('name', optimizer) == optimizer:
                load_optimizer(self.optimizer, state['optimizer'])
            self.means.load_state_dict(state['means'])
            if 'health' in state:                             # earlier versions have none
                self.health.resume(state['health'])
            if self.loss_scale and 'loss_scale' in state:     # a run on a CPU has none
                self.loss_scale.lg = float(state['loss_scale']['lg'])
            nimg = int(state['nimg'])
            seconds = float(state['train_seconds'])
            batches = list(state['batches'])
            if len(batches) == processes:
                share = self.checkpoints.load_share(path, batches[dist.get_rank()])
                self.batches.load_state_dict(share)
        except UnreadableError:
            raise
        except (UserError, *WRONG) as error:
            text = error.text if isinstance(error, UserError) else one_line(error, 200)
            if path not in text:
                text = f'{path} is of another recipe or version ({text})'
            raise CheckpointError(text) from None
        if len(batches) != processes and any(batches):
            raise UserError(f'{path} was trained by {len(batches)} processes and its batches have '
                            'a state for each: resume with as many')
        self.nimg = self._saved = nimg
        self._session_start -= seconds

    def _save_checkpoint(self):
        if not self._is_finite():
            self.log(f'Warning: no checkpoint of {self.nimg} images: its weights are not finite')
            return
        if self.leads:
            self._flush_boards()                              # what is logged up to here is kept
        self.ema.get(self.net)                                # has the buffers of now
        health = self.health.counts()
        streak, _, _ = self.health.look()
        means = self.means.state_dict()
        batches = self.checkpoints.save_share(self.nimg, self.batches.state_dict())
        batches = dist.gather_objects(batches)
        state = {
            'nimg': self.nimg, 'recipe': self.settings, 'net': self.net.state_dict(),
            'ema': self.ema.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'means': means, 'health': health, 'batches': batches,
            'train_seconds': time.time() - self._session_start}
        if self.loss_scale:
            state['loss_scale'] = {'lg': self.loss_scale.lg}
        if self.shards:
            state['optimizer'] = self.shards.optimizer_state(state['optimizer'])
            state = self.shards.write(self._checkpoint_path(), state)
        if self.leads:
            self.checkpoints.save(state)
            if not streak:                                    # else an older one may be the best
                self.checkpoints.prune(self.nimg, self.recipe.keep_checkpoints)
        self._saved = self.nimg
        dist.barrier()

    def _checkpoint_path(self) -> str:
        return self.checkpoints.path(self.checkpoints.number(self.nimg))

    def _snapshot_path(self, suffix: str) -> str:
        return self._path(snapshot_name(self.nimg, suffix))

    def _has_snapshots(self, _) -> bool:
        return all(os.path.isfile(self._snapshot_path(suffix))
                   for _, suffix, _ in self.ema.get(self.net))

    def _save_snapshots(self, *_):
        for net, suffix, std in self.ema.get(self.net):
            self.save_average(self._snapshot_path(suffix), net, std)
        dist.barrier()

    def save_average(self, path: str, net, std: float | None):
        """A snapshot of one average; all processes call it."""
        net = self.whole(net, 'cpu')
        if not self.leads:
            return
        try:
            save_snapshot(path, net, nimg=self.nimg, ema_std=std,
                          dtype=getattr(torch, self.recipe.snapshot_dtype), **self.snapshot)
        except NonFiniteError as error:
            self.log(f'Warning: no {path}: {error}')

    def _draw_losses(self, *_):
        if os.path.exists(self._path('stats.jsonl')):
            pictures.save_loss_curve(self._path('stats.jsonl'), self._path('loss.png'))

    def results(self) -> list[str]:
        """Lines that say where the newest snapshot and checkpoint are, and what to do next."""
        snapshots = list_snapshots(self.run_dir)
        places = {'folder': self.run_dir, 'snapshot': snapshots and snapshots[-1].path,
                  'checkpoint': self._checkpoint_path()}
        places = {name: path for name, path in places.items() if path and os.path.exists(path)}
        lines = [f'{name.capitalize()}: {path}' for name, path in places.items()]
        advice = self.advice.replace('{step}', str(self.checkpoints.number(self.nimg)))
        for name, path in places.items():
            advice = advice.replace(f'{{{name}}}', shlex.quote(path))
        return lines if not advice or '{' in advice else [*lines, f'Next: {advice}']

    # --- Logs -----------------------------------------------------------------------------------

    def _remove_later(self):
        """Removes what a stopped process left: halves of files, and what it logged after the
        checkpoint that we resume from.
        """
        remove_leftovers(self.run_dir)
        self.checkpoints.remove_partial()
        for path in map(self._path, ('stats.jsonl', runs.MEASURED)):
            if os.path.exists(path):
                write_bytes(path, b''.join(
                    line for line, row in budget.json_lines(path)
                    if isinstance(nimg := row.get('nimg', 0), int | float) and nimg <= self.nimg))

    def _open_boards(self, stack, run: dict | None):
        """`run`: project and id of Weights & Biases."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        runs.wait_for_later_events(self.run_dir)
        # What is logged of the checkpoint's own step is kept.
        first = self._count + 1
        _silence_tensorboard()
        # The file's name is events.out.tfevents.<second>.<host>...: runs are passed on.
        with unittest.mock.patch('socket.gethostname', lambda: 'run'):
            writer = SummaryWriter(self.run_dir, purge_step=first)
        self._tensorboard = stack.enter_context(writer)
        self._wandb = None
        if run:
            import wandb  # optional
            path = os.path.realpath(self.run_dir)
            try:
                self._wandb = stack.enter_context(wandb.init(
                    **run, dir=path, config=self.settings, resume='allow',
                    name=os.path.basename(path)))
            except Exception as error:                        # it has many: no account, no network
                raise UserError(f'cannot log there: {one_line(error)}', 'wandb') from None

    def _flush_boards(self):
        """As far as the disk lets us: TensorBoard waits for ever for a thread that has failed, and
        tells of that when it is written to.
        """
        def flush():
            with contextlib.suppress(OSError):
                self._tensorboard.flush()

        thread = threading.Thread(target=flush, daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)

    def log(self, text, show: bool = True):
        if self.leads:
            text = without_codes(text)
            if show:
                tqdm.write(text)
            path = self._path('log.txt')
            with writing(path), open(path, 'a') as f:
                f.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {text}\n')

    def _report(self):
        """A line for the log and one for `stats.jsonl`; returns what they say, {name: value}."""
        means = self.means.report()                           # waits for the device
        now = time.time()
        seconds = now - self._session_start
        speed = (self.nimg - self._tick_nimg) / max(now - self._tick_start, 1e-9)
        self._tick_start = now
        self._tick_nimg = self.nimg
        memory = psutil.Process().memory_info().rss / 2**30
        values = {'Progress/lr': self.lr(self.nimg), 'Timing/images_per_sec': speed,
                  'Timing/sec_per_kimg': 1000 / speed, 'Timing/total_sec': seconds,
                  'Resources/cpu_mem_gb': memory}
        if self.loss_scale:
            values['Progress/lg_loss_scale'] = self.loss_scale.lg
            values['Health/skipped_steps'] = 0
        faults = self.health.report()
        values |= {f'Health/{name}': number for name, number in faults.items()}
        count = f'nimg {format_count(self.nimg):<9}'
        if self.checkpoints.counts_steps:
            count = f'step {self._count:<9}'
        total = self.recipe.total_nimg
        # With all pauses of this start.
        remaining = (now - self._start) * (total - self.nimg) / (self.nimg - self._first)
        eta = f'  eta {format_time(remaining)}' if 0 < remaining < LONGEST_ETA else ''
        line = (f'{count} {100 * self.nimg / total:5.1f}%  time {format_time(seconds):<8}{eta} '
                f'{1000 / speed:8.2f} sec/kimg {speed:8.1f} img/s  '
                f'lr {values["Progress/lr"]:.4g}  cpumem {memory:.2f}G')
        if self.device.type == 'cuda':
            peak = torch.cuda.max_memory_allocated() / 2**30
            values['Resources/peak_gpu_mem_gb'] = peak
            torch.cuda.reset_peak_memory_stats()
            line += f'  gpumem {peak:.2f}G'
        for name, row in means.items():
            if name.startswith('Loss/'):
                line += f'  {name.removeprefix("Loss/")} {row["mean"]:.4f}'
        for name, number in faults.items():
            line += f'  {name} {number}'
        self.log(line)
        if self.leads:
            rows = means | {name: {'mean': value, 'std': 0.0} for name, value in values.items()}
            with open(self._path('stats.jsonl'), 'a') as f:
                f.write(to_json({'nimg': self.nimg} | rows | {'timestamp': now}) + '\n')
        return {name: row['mean'] for name, row in means.items()} | values

    def _log_values(self, values):
        """Numbers, and pictures by their paths, on the boards."""
        if not values or not self.leads:
            return
        values = dict(values)
        for name, value in values.items():
            if isinstance(value, str):
                image = pictures.load_png(value)
                self._tensorboard.add_image(name, image, self._count, dataformats='HWC')
                if self._wandb is not None:
                    import wandb
                    values[name] = wandb.Image(image)
            else:
                self._tensorboard.add_scalar(name, value, global_step=self._count)
        if self._wandb is not None:
            self._wandb.log(values, step=self._count)
