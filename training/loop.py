"""The one training loop. It knows nothing of any study: it has a recipe, a loss and batches."""

import contextlib
import dataclasses
import glob
import json
import os
import signal
import time
import warnings
from collections.abc import Callable

import psutil
import torch
from tqdm import tqdm

from dnnlib import UserError, pictures
from dnnlib.util import format_count, format_time, write_bytes
from torch_utils import distributed as dist
from torch_utils.files.weights import load_weights
from torch_utils.stats import RunningMeans
from training import runs
from training.checkpoint import Checkpoints, load_optimizer
from training.ema import AVERAGES, Averages
from training.encoders import make_encoder
from training.loss_scale import DynamicLossScale
from training.schedules import LR_SCHEDULES
from training.snapshot import describe, save_snapshot, snapshot_name

# The optimizers of a recipe, by name.
OPTIMIZERS = {'Adam': torch.optim.Adam, 'AdamW': torch.optim.AdamW, 'SGD': torch.optim.SGD}


# The new name of broadcast_buffers is not known to older versions of torch.
warnings.filterwarnings('ignore', message='`broadcast_buffers` is deprecated')


def _by_name(table: dict, settings: dict):
    """The entry of a table that `settings['name']` names, and the other settings."""
    settings = dict(settings)
    return table[settings.pop('name')], settings


@dataclasses.dataclass(eq=False)
class Trainer:
    """Trains `net` (in place) by a recipe; see `training.recipe.fit` for the arguments.

    settings  the recipe as checkpoints, snapshots and training_options.json keep it
    layout    class of the checkpoints
    """

    recipe: object
    net: torch.nn.Module
    loss: Callable
    batches: object
    run_dir: str
    settings: dict | None = None
    layout: Callable = Checkpoints
    callbacks: tuple = ()

    def __post_init__(self):
        recipe = self.recipe
        net = self.net
        self.settings = self.settings or recipe.settings()
        self.device = next(net.parameters()).device
        self.lr_schedule, self.lr_settings = _by_name(LR_SCHEDULES, recipe.learning_rate)
        optimizer, options = _by_name(OPTIMIZERS, recipe.optim)
        options = {'lr': self.lr_settings['lr'], 'fused': True} | options
        self.optimizer = optimizer((p for p in net.parameters() if p.requires_grad), **options)
        rule, options = _by_name(AVERAGES, recipe.averages)
        self.ema = Averages(net, rule(**options))
        scale = recipe.loss_scale
        self.loss_scale = None if scale is None else DynamicLossScale(**scale)
        self.snapshot = dict(encoder=make_encoder(recipe.encoder), dataset=recipe.dataset,
                             recipe=self.settings, sampler=recipe.sampler)
        self.checkpoints = self.layout(self.run_dir, recipe.batch,
                                       lambda: describe(net, **self.snapshot))
        self.means = RunningMeans(self.device)
        self.nimg = recipe.first_nimg
        self.stop_requested = False
        self.start = f'Starting at {self.nimg} images'
        self.train_seconds = 0.0                              # of earlier sessions
        processes = dist.get_world_size()
        if recipe.batch % processes:
            raise UserError(f'cannot be split over {processes} processes', 'batch', recipe.batch)
        self.per_process = recipe.batch // processes
        self.batch_gpu = min(recipe.batch_gpu or self.per_process, self.per_process)

    def lr(self, nimg: int) -> float:
        """The learning rate of the step after `nimg` images."""
        nimg -= self.recipe.first_nimg
        return self.lr_schedule(nimg, self.recipe.batch, **self.lr_settings)

    # --- The run --------------------------------------------------------------------------------

    def run(self, summary: str = '', changes=(), files=None, wandb: str | None = None) -> int:
        """Trains until `recipe.total_nimg`, or until SIGTERM or SIGINT; returns the images seen.

        summary  first lines of the log
        changes  of the recipe since the checkpoint, for the log and the record
        files    {name: text} of further files to write
        wandb    project of Weights & Biases
        """
        total = self.recipe.total_nimg
        with contextlib.ExitStack() as stack, self._signals():
            if dist.get_rank() == 0:
                os.makedirs(self.run_dir, exist_ok=True)
                stack.enter_context(runs.locked(self.run_dir))
            for line in (summary, self.start, *(f'Changed: {change}' for change in changes)):
                self._log(line)
            self._open_logs(stack, changes, files or {}, wandb)
            self.model = self._wrap()
            self.net.train()
            steps = self.batches.iterate(self._plan())
            start = self.nimg
            # disable=None: shown on a terminal only.
            bar = tqdm(total=total, initial=start, unit='img', unit_scale=True, leave=False,
                       disable=dist.get_rank() != 0 or None)
            with contextlib.closing(steps), bar:
                while self.nimg < total and not dist.any_rank(self.stop_requested):
                    self._step(steps)
                    bar.update(self.recipe.batch)
                    self._after_step()
            if self.nimg < total:
                if self.nimg > start:                          # else there is nothing to keep
                    self._save_checkpoint()
                self._log(f'Stopped at {self.nimg} images; the same command goes on from here.')
        return self.nimg

    def _plan(self):
        """(first image, count) of each micro-batch of this process, to the end of the run."""
        for start in range(self.nimg, self.recipe.total_nimg, self.recipe.batch):
            first = start + dist.get_rank() * self.per_process
            for offset in range(0, self.per_process, self.batch_gpu):
                yield first + offset, min(self.batch_gpu, self.per_process - offset)

    def _wrap(self):
        model = torch.compile(self.net) if self.recipe.compile else self.net
        if dist.get_world_size() == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == 'cuda' else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)

    def _step(self, steps):
        """One step of the optimizer over the whole batch, and of the averages after it.

        Nothing here waits for the GPU.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr(self.nimg)
        self.optimizer.zero_grad(set_to_none=True)
        scale = self._loss_scaling / self.per_process   # the gradient is the mean over processes
        micro_batches = -(-self.per_process // self.batch_gpu)
        for index in range(micro_batches):
            with self._sync_if(last=index == micro_batches - 1):
                loss, terms = self.loss(self.model, next(steps))
                (loss.sum() * scale).backward()
            self.means.add({f'Loss/{name}': values for name, values in terms.items()})
        if self._clean_gradients():
            self.optimizer.step()
            self.ema.update(self.net, self.nimg, self.recipe.batch)
        self.nimg += self.recipe.batch

    def _sync_if(self, last):
        """Processes exchange gradients in the last backward pass of a step only."""
        several = dist.get_world_size() > 1
        return self.model.no_sync() if several and not last else contextlib.nullcontext()

    @property
    def _loss_scaling(self):
        return self.loss_scale.value if self.loss_scale else self.recipe.ls

    def _clean_gradients(self) -> bool:
        """Brings the gradients to their own scale; False if they overflowed, to skip the step."""
        scaling = self._loss_scaling
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        if self.loss_scale and not self.loss_scale.update(grads):
            return False
        if scaling != 1:
            torch._foreach_div_(grads, scaling)
        if self.recipe.bad_gradients is not None:
            for grad in grads:
                grad.nan_to_num_(*self.recipe.bad_gradients)
        if self.recipe.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_grad_norm)
        return True

    @property
    def _position(self):
        """Images that are done with, as files and logs count them: where these count steps from 0,
        those before the step just taken.
        """
        return self.nimg - self.recipe.batch * self.checkpoints.counts_steps

    @property
    def _count(self):
        """What logs and files go by: images, or the number of the step just taken."""
        return self._position // (self.recipe.batch if self.checkpoints.counts_steps else 1)

    def _due(self, every: int | None) -> bool:
        """Whether the step just taken has passed a multiple of `every`, or was the last."""
        if every is None:
            return False
        before = max(self._position - self.recipe.batch, self.recipe.first_nimg)
        return self.nimg >= self.recipe.total_nimg or self._position // every != before // every

    def _after_step(self):
        if self._due(self.recipe.status):
            self._report()
        if self._due(self.recipe.snapshot):
            self._save_snapshots()
        for every, function in self.callbacks:
            if self._due(every):
                averages = [net for net, _, _ in self.ema.get(self.net)]
                self._log_scalars(function(self._count, averages) or {})
                dist.barrier()
        if self._due(self.recipe.checkpoint):
            self._save_checkpoint()

    @contextlib.contextmanager
    def _signals(self):
        def request_stop(*_):
            self.stop_requested = True
        previous = {name: signal.signal(name, request_stop)
                    for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)

    # --- Files ----------------------------------------------------------------------------------

    def _path(self, name):
        return os.path.join(self.run_dir, name)

    def find_checkpoint(self, resume_from: str | None = None) -> dict | None:
        """State of the newest whole checkpoint of the folder, else of the file `resume_from`."""
        state = self.checkpoints.load_newest(report=self._log)
        if state is None and resume_from:
            if not os.path.isfile(resume_from):
                raise UserError('is no file', field='resume_from', value=resume_from)
            state = self.checkpoints.load(resume_from)
        return state

    def load(self, state: dict):
        """Goes on from a checkpoint's state. Raises UserError if it does not fit."""
        path = state['path']
        load_weights(self.net, state['net'], path)
        optimizer = self.recipe.optim['name']
        try:
            self.ema.load_state_dict(state['ema'])
            # Another optimizer, if such a change is allowed, begins anew.
            if state.get('recipe', {}).get('optim', {'name': optimizer})['name'] == optimizer:
                load_optimizer(self.optimizer, state['optimizer'])
        except (UserError, ValueError, KeyError) as error:
            raise UserError(f'{path} is of another recipe ({error})') from None
        self.means.load_state_dict(state['means'])
        if len(state['batches']) == dist.get_world_size():
            batches = state['batches'][dist.get_rank()]
            self.batches.load_state_dict(self.checkpoints.load_share(path, batches))
        elif any(state['batches']):
            raise UserError(f'{path} was trained by {len(state["batches"])} processes and its '
                            f'batches have a state for each: resume with as many')
        if self.loss_scale and 'loss_scale' in state:         # a run on a CPU has none
            self.loss_scale.load_state_dict(state['loss_scale'])
        self.nimg = state['nimg']
        self.train_seconds = state['train_seconds']
        self.start = f'Resuming from {self.nimg} images ({path})'

    def _save_checkpoint(self):
        means = self.means.state_dict()
        batches = self.checkpoints.save_share(self.nimg, self.batches.state_dict())
        batches = dist.gather_objects(batches)
        if dist.get_rank() == 0:
            state = {
                'nimg': self.nimg, 'recipe': self.settings, 'net': self.net.state_dict(),
                'ema': self.ema.state_dict(), 'optimizer': self.optimizer.state_dict(),
                'means': means, 'batches': batches, 'train_seconds': self._seconds()}
            if self.loss_scale:
                state['loss_scale'] = self.loss_scale.state_dict()
            self.checkpoints.save(state)
        dist.barrier()

    def _save_snapshots(self):
        if dist.get_rank() == 0:
            dtype = getattr(torch, self.recipe.snapshot_dtype)
            for net, suffix, std in self.ema.get(self.net):
                save_snapshot(self._path(snapshot_name(self.nimg, suffix)), net, nimg=self.nimg,
                              ema_std=std, dtype=dtype, **self.snapshot)
            if os.path.exists(self._path('stats.jsonl')):
                pictures.save_loss_curve(self._path('stats.jsonl'), self._path('loss.png'))
        dist.barrier()

    # --- Logs -----------------------------------------------------------------------------------

    def _open_logs(self, stack, changes, files, wandb_project):
        self._tick_start = time.time()
        self._tick_nimg = self.nimg
        self._session_start = self._tick_start - self.train_seconds
        self._wandb = None
        if dist.get_rank() != 0:
            return
        runs.add_start(self.run_dir, self.settings, world_size=dist.get_world_size(),
                       nimg=self.nimg, changes=list(changes))
        for name, text in files.items():
            write_bytes(self._path(name), text.encode())
        for pattern in (*self.checkpoints.leftovers, '.network-snapshot-*', '.*.png.*'):
            for leftover in glob.glob(pattern, root_dir=self.run_dir):
                os.remove(self._path(leftover))               # halves left behind by a kill -9
        self._trim_stats()
        runs.wait_for_later_events(self.run_dir)
        first = self._count + self.checkpoints.counts_steps
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        self._tensorboard = stack.enter_context(SummaryWriter(self.run_dir, purge_step=first))
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError('needs the package wandb: pip install wandb', 'wandb') from None
            self._wandb = stack.enter_context(wandb.init(
                project=wandb_project, dir=self.run_dir, resume='allow',
                id=os.path.basename(os.path.abspath(self.run_dir))))

    def _trim_stats(self):
        """Drops what was logged after the checkpoint that we resume from, and half a line."""
        path = self._path('stats.jsonl')
        if not os.path.exists(path):
            return
        kept = []
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    if json.loads(line)['nimg'] <= self.nimg:
                        kept.append(line)
        write_bytes(path, ''.join(kept).encode())

    def _log(self, text):
        if dist.get_rank() == 0:
            tqdm.write(text)
            with open(self._path('log.txt'), 'a') as f:
                f.write(text + '\n')

    def _seconds(self):
        return time.time() - self._session_start

    def _report(self):
        """A line for the log and one for `stats.jsonl`, scalars for TensorBoard."""
        means = self.means.report()                           # waits for the device
        now = time.time()
        speed = (self.nimg - self._tick_nimg) / max(now - self._tick_start, 1e-9)
        self._tick_start = now
        self._tick_nimg = self.nimg
        memory = psutil.Process().memory_info().rss / 2**30
        values = {'Progress/lr': self.lr(self.nimg), 'Timing/images_per_sec': speed,
                  'Timing/total_sec': self._seconds(), 'Resources/cpu_mem_gb': memory}
        if self.loss_scale:
            values['Progress/lg_loss_scale'] = self.loss_scale.lg
        steps = self.checkpoints.counts_steps
        count = f'step {self._count:<9}' if steps else f'nimg {format_count(self.nimg):<9}'
        line = (f'{count} {100 * self.nimg / self.recipe.total_nimg:5.1f}%  '
                f'time {format_time(self._seconds()):<8} {speed:8.1f} img/s  '
                f'lr {values["Progress/lr"]:.4g}  cpumem {memory:.2f}G')
        if self.device.type == 'cuda':
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            values['Resources/peak_gpu_mem_gb'] = peak
            torch.cuda.reset_peak_memory_stats(self.device)
            line += f'  gpumem {peak:.2f}G'
        for name, row in means.items():
            line += f'  {name.removeprefix("Loss/")} {row["mean"]:.4f}'
        self._log(line)
        if dist.get_rank() != 0:
            return
        rows = means | {name: {'mean': value, 'std': 0.0} for name, value in values.items()}
        with open(self._path('stats.jsonl'), 'a') as f:
            f.write(json.dumps({'nimg': self.nimg} | rows | {'timestamp': now}) + '\n')
        self._log_scalars({name: row['mean'] for name, row in rows.items()})

    def _log_scalars(self, values):
        if dist.get_rank() == 0:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, global_step=self._count)
            if values and self._wandb is not None:
                self._wandb.log(values, step=self._count)
