"""The one training loop. It knows nothing of any study: batches, objective, optimizer and averages are given to it."""

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
from dnnlib.util import format_count, format_time, write_bytes, write_json
from torch_utils import distributed as dist
from torch_utils.stats import RunningMeans
from training import checkpoint, runs
from training.snapshot import save_snapshot


@dataclasses.dataclass
class LoopConfig:
    """How long to train and when to report; all counts are training images (over all processes)."""

    run_dir: str
    total_nimg: int
    batch_size: int                       # images of one step over all processes
    batch_gpu: int | None = None          # images of one forward pass; None: the process's whole share
    status_nimg: int | None = None        # None: never, likewise below
    snapshot_nimg: int | None = None
    checkpoint_nimg: int | None = None
    loss_scaling: float = 1.0             # multiplies the loss for float16 gradients, and is divided out again
    clip_grad_norm: float | None = None
    bad_gradients: tuple | None = (0, 0, 0)   # what takes the place of NaN, +Inf and -Inf; None leaves them
    compile: bool = False
    seed: int = 0
    wandb: str | None = None              # project name
    resume_from: str | None = None        # checkpoint to start from if the run's folder has none
    first_nimg: int = 0                   # what counting starts from: a fine-tuned network's earlier training
    count_steps: bool = False             # reports, logs and files go by the number of the step just taken, from 0


class Trainer:
    """Trains `net` (in place).

    net        network from `build_network`, on the device of this process, the same on every process
    objective  `(net, batch) -> (loss [N], {name: values})`; the sum of `loss` over the batch divided by its size is minimised
    batches    has `iterate(plan)`, a generator of batches for pairs (first image, count), and `state_dict`s
    optimizer  of net's parameters
    lr         `(nimg, batch_size) -> learning rate`
    ema        has `update(net, nimg, batch_size)`, `get(net)` and `state_dict`s (see training.ema)
    snapshot   further keywords of `save_snapshot`: encoder, dataset, recipe
    identity   what a checkpoint must agree with to be resumed, by option name
    options    what `training_options.json` of the run says
    on_snapshot  called on the first process with (nimg, [averaged network, ...]) at each snapshot
    callbacks    (every so many images, function) pairs: the function is called on every process with (number of the
                 step or nimg, [averaged network, ...]), and the scalars that it may return {name: value} are logged
    checkpoints  has `save_checkpoint(folder, state)` and `load_newest(folder, report)`, like training.checkpoint, and may
                 have `read_checkpoint(path)`, `leftovers` (patterns of half-written files) and, where the batches of a
                 process are too large to be sent to the first one, `save_share(folder, state, batches) -> what is sent`
                 and `load_share(state, sent) -> batches`, called on every process with the state of its batches
    loss_scale   a `training.loss_scale.DynamicLossScale` for float16 gradients, or None
    """

    def __init__(self, net, objective, batches, optimizer, lr: Callable, ema, config: LoopConfig, *,
                 snapshot: dict, identity: dict | None = None, options: dict | None = None,
                 on_snapshot: Callable | None = None, callbacks=(), checkpoints=checkpoint, loss_scale=None):
        self.net, self.objective, self.batches, self.optimizer = net, objective, batches, optimizer
        self.lr, self.ema, self.config = lr, ema, config
        self.snapshot_keywords, self.identity, self.on_snapshot = snapshot, identity or {}, on_snapshot
        self.options, self.callbacks, self.checkpoints = options or {}, callbacks, checkpoints
        self.loss_scale = loss_scale
        self.device = next(net.parameters()).device
        self.means = RunningMeans(self.device)
        self.nimg = config.first_nimg
        self.stop_requested = False
        self.per_process = config.batch_size // dist.get_world_size()
        if self.per_process * dist.get_world_size() != config.batch_size:
            raise UserError(f'--batch={config.batch_size} cannot be split over {dist.get_world_size()} processes')
        if config.batch_gpu is not None and config.batch_gpu < 1:
            raise UserError(f'--batch-gpu={config.batch_gpu} must be at least 1')
        self.batch_gpu = min(config.batch_gpu or self.per_process, self.per_process)
        self.train_seconds = 0.0                              # of earlier sessions, from the checkpoint

    # --- The run ------------------------------------------------------------------------------------------------------

    def run(self):
        """Trains until `total_nimg`, resuming from the newest whole checkpoint of the run's folder.

        SIGTERM ends it after the current step, with a checkpoint. Returns the number of images seen. Raises UserError,
        before anything is written, if a checkpoint is of another recipe or another process trains in the folder.
        """
        self.resume()
        with self._folder(), self._signals():
            self._open_logs()
            self.model = self._wrap()
            self.net.train()
            steps = self.batches.iterate(self._plan())
            with contextlib.closing(steps), self._progress_bar() as bar:
                while self.nimg < self.config.total_nimg and not dist.any_rank(self.stop_requested):
                    self._step(steps)
                    bar.update(self.config.batch_size)
                    self._after_step()
            if self.nimg < self.config.total_nimg:
                self._save_checkpoint()
                self._log(f'Stopped at {self.nimg} images; the same command goes on from here.')
            self._close_logs()
        return self.nimg

    def _plan(self):
        """(first image, count) of each micro-batch of this process, to the end of the run."""
        for start in range(self.nimg, self.config.total_nimg, self.config.batch_size):
            first = start + dist.get_rank() * self.per_process
            for offset in range(0, self.per_process, self.batch_gpu):
                yield first + offset, min(self.batch_gpu, self.per_process - offset)

    def _wrap(self):
        model = torch.compile(self.net) if self.config.compile else self.net
        if dist.get_world_size() > 1:
            devices = [self.device] if self.device.type == 'cuda' else None
            with warnings.catch_warnings():
                # The new name of broadcast_buffers is not known to older versions of torch.
                warnings.filterwarnings('ignore', message='`broadcast_buffers` is deprecated')
                model = torch.nn.parallel.DistributedDataParallel(
                    model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        return model

    def _step(self, steps):
        """One optimizer step over the whole batch, and the averages after it. Nothing here waits for the GPU."""
        config = self.config
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr(self.nimg, config.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        scale = self._loss_scaling / self.per_process         # the gradient is the mean over processes
        micro_batches = -(-self.per_process // self.batch_gpu)
        for index in range(micro_batches):
            with self._sync_if(last=index == micro_batches - 1):
                loss, terms = self.objective(self.model, next(steps))
                (loss.sum() * scale).backward()
            self.means.add({f'Loss/{name}': values for name, values in terms.items()})
        if self._clean_gradients():
            self.optimizer.step()
            self.ema.update(self.net, self.nimg, config.batch_size)
        self.nimg += config.batch_size

    def _sync_if(self, last):
        """Processes exchange gradients in the last backward pass of a step only."""
        return self.model.no_sync() if not last and hasattr(self.model, 'no_sync') else contextlib.nullcontext()

    @property
    def _loss_scaling(self):
        return self.config.loss_scaling if self.loss_scale is None else self.loss_scale.value

    def _clean_gradients(self) -> bool:
        """Brings the gradients to their own scale; False if they overflowed, and the step is to be skipped."""
        config, scaling = self.config, self._loss_scaling
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        if self.loss_scale is not None and not self.loss_scale.update(grads):
            return False
        if scaling != 1:
            torch._foreach_div_(grads, scaling)
        if config.bad_gradients is not None:
            nan, posinf, neginf = config.bad_gradients
            for grad in grads:
                torch.nan_to_num(grad, nan=nan, posinf=posinf, neginf=neginf, out=grad)
        if config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip_grad_norm)
        return True

    def _due(self, every):
        """True if the step just taken has passed a multiple of `every`, or was the last.

        Where steps are counted, those with a number that is a multiple, but for the first of the run.
        """
        if every is None:
            return False
        now = self.nimg - self.config.batch_size * self.config.count_steps
        before = max(now - self.config.batch_size, self.config.first_nimg)
        return self.nimg >= self.config.total_nimg or now // every != before // every

    @property
    def _count(self):
        """What logs and files go by: images, or the number of the step just taken."""
        return self.nimg // self.config.batch_size - 1 if self.config.count_steps else self.nimg

    def _after_step(self):
        if self._due(self.config.status_nimg):
            self._report()
        if self._due(self.config.snapshot_nimg):
            self._save_snapshots()
        for every, function in self.callbacks:
            if self._due(every):
                self._log_scalars(function(self._count, [net for net, _, _ in self.ema.get(self.net)]) or {})
                dist.barrier()
        if self._due(self.config.checkpoint_nimg):
            self._save_checkpoint()

    @contextlib.contextmanager
    def _signals(self):
        def request_stop(*_):
            self.stop_requested = True
        previous = {name: signal.signal(name, request_stop) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)

    # --- Files --------------------------------------------------------------------------------------------------------

    def _path(self, name):
        return os.path.join(self.config.run_dir, name)

    @contextlib.contextmanager
    def _folder(self):
        """The run's folder with its options, kept by this run alone."""
        with contextlib.ExitStack() as stack:
            if dist.get_rank() == 0:
                os.makedirs(self.config.run_dir, exist_ok=True)
                stack.enter_context(runs.locked(self.config.run_dir))
                if self.options:
                    write_json(self._path('training_options.json'), self.options)
            self._log(self._start)
            yield

    def resume(self):
        """Takes up the newest whole checkpoint if there is one; raises UserError if it is of another recipe."""
        run_dir, state = self.config.run_dir, None
        self._start = f'Starting at {self.nimg} images'
        if os.path.isdir(run_dir):
            state = self.checkpoints.load_newest(run_dir, report=self._log)
            path = run_dir
        if state is None and self.config.resume_from:
            path = self.config.resume_from
            state = getattr(self.checkpoints, 'read_checkpoint', checkpoint.read_checkpoint)(path)
        if state is None:
            return
        for key, value in self.identity.items():
            if state['identity'].get(key) != value:
                raise UserError(f'{path} holds a run with another {key} ({_difference(state["identity"].get(key), value)}'
                                '); choose another folder, or remove it to start anew')
        self.net.load_state_dict(state['net'])
        self.ema.load_state_dict(state['ema'])
        checkpoint.load_optimizer(self.optimizer, state['optimizer'])
        self.means.load_state_dict(state['means'])
        if len(state['batches']) == dist.get_world_size():
            batches = state['batches'][dist.get_rank()]
            if hasattr(self.checkpoints, 'load_share'):
                batches = self.checkpoints.load_share(state, batches)
            self.batches.load_state_dict(batches)
        elif any(state['batches']):
            raise UserError(f'{path} was trained by {len(state["batches"])} processes and its batches '
                            f'have a state for each: resume with as many')
        if self.loss_scale is not None and 'loss_scale' in state:  # a run on a CPU has none
            self.loss_scale.load_state_dict(state['loss_scale'])
        self.nimg, self.train_seconds = state['nimg'], state['train_seconds']
        self._start = f'Resuming from {self.nimg} images ({path})'

    def _save_checkpoint(self):
        means = self.means.state_dict()
        state = {'nimg': self.nimg, 'means': means, 'identity': self.identity, 'train_seconds': self._seconds()}
        batches = self.batches.state_dict()
        if hasattr(self.checkpoints, 'save_share'):
            batches = self.checkpoints.save_share(self.config.run_dir, state, batches)
        batches = dist.gather_objects(batches)
        if dist.get_rank() == 0:
            if self.loss_scale is not None:
                state['loss_scale'] = self.loss_scale.state_dict()
            self.checkpoints.save_checkpoint(self.config.run_dir, state | {
                'net': self.net.state_dict(), 'ema': self.ema.state_dict(), 'optimizer': self.optimizer.state_dict(),
                'batches': batches})
        dist.barrier()

    def _save_snapshots(self):
        if dist.get_rank() == 0:
            averages = self.ema.get(self.net)
            for net, suffix, info in averages:
                path = self._path(f'network-snapshot-{self.nimg // 1000:07d}{suffix}.pkl')
                save_snapshot(path, net, nimg=self.nimg, **info, **self.snapshot_keywords)
            if self.on_snapshot is not None:
                self.on_snapshot(self.nimg, [net for net, _, _ in averages])
            if os.path.exists(self._path('stats.jsonl')):
                pictures.save_loss_curve(self._path('stats.jsonl'), self._path('loss.png'))
        dist.barrier()

    # --- Logs ---------------------------------------------------------------------------------------------------------

    def _open_logs(self):
        self._session_start = self._tick_start = time.time()
        self._tick_nimg = self.nimg
        self._writers = []
        if dist.get_rank() != 0:
            return
        patterns = ('.training-state-*', '.ckpt_*', '.network-snapshot-*', '.*.png.*')
        for pattern in (*patterns, *getattr(self.checkpoints, 'leftovers', ())):        # halves left behind by a kill -9
            for leftover in glob.glob(glob.escape(self.config.run_dir) + '/' + pattern):
                os.remove(leftover)
        self._trim_stats()
        from torch.utils.tensorboard import SummaryWriter
        self._tensorboard = SummaryWriter(self.config.run_dir, purge_step=self._count + self.config.count_steps)
        self._wandb = None
        if self.config.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError('--wandb needs the package wandb: pip install wandb') from None
            self._wandb = wandb.init(project=self.config.wandb, dir=self.config.run_dir, resume='allow',
                                     id=os.path.basename(os.path.abspath(self.config.run_dir)))

    def _trim_stats(self):
        """Drops what was logged after the checkpoint that we resume from, and a line cut in half."""
        path, kept = self._path('stats.jsonl'), []
        if not os.path.exists(path):
            return
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    if json.loads(line)['nimg'] <= self.nimg:
                        kept.append(line)
        write_bytes(path, ''.join(kept).encode())

    def _close_logs(self):
        if dist.get_rank() == 0:
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _progress_bar(self):
        return tqdm(total=self.config.total_nimg, initial=self.nimg, unit='img', unit_scale=True, leave=False,
                    disable=True if dist.get_rank() != 0 else None)  # None: only on a terminal

    def _log(self, text):
        if dist.get_rank() == 0:
            tqdm.write(text)
            with open(self._path('log.txt'), 'a') as f:
                f.write(text + '\n')

    def _seconds(self):
        return self.train_seconds + time.time() - self._session_start

    def _report(self):
        """One line for the log, one for `stats.jsonl`, scalars for TensorBoard: since the last report."""
        means = self.means.report()                            # waits for the device
        now = time.time()
        images_per_second = (self.nimg - self._tick_nimg) / max(now - self._tick_start, 1e-9)
        self._tick_start, self._tick_nimg = now, self.nimg
        lr = self.lr(self.nimg, self.config.batch_size)
        memory = psutil.Process().memory_info().rss / 2**30
        values = {'Progress/lr': lr, 'Timing/images_per_sec': images_per_second, 'Timing/total_sec': self._seconds(),
                  'Resources/cpu_mem_gb': memory}
        if self.loss_scale is not None:
            values['Progress/lg_loss_scale'] = self.loss_scale.lg
        count = f'step {self._count:<9}' if self.config.count_steps else f'nimg {format_count(self.nimg):<9}'
        line = (f'{count} {100 * self.nimg / self.config.total_nimg:5.1f}%  '
                f'time {format_time(self._seconds()):<8} {images_per_second:8.1f} img/s  lr {lr:.4g}  cpumem {memory:.2f}G')
        if self.device.type == 'cuda':
            values['Resources/peak_gpu_mem_gb'] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
            line += f'  gpumem {values["Resources/peak_gpu_mem_gb"]:.2f}G'
        line += ''.join(f'  {name.removeprefix("Loss/")} {mean:.4f}' for name, (mean, _) in means.items())
        self._log(line)
        if dist.get_rank() != 0:
            return
        row = {'nimg': self.nimg} | {name: {'mean': mean, 'std': std} for name, (mean, std) in means.items()}
        row |= {name: {'mean': value, 'std': 0.0} for name, value in values.items()} | {'timestamp': now}
        with open(self._path('stats.jsonl'), 'a') as f:
            f.write(json.dumps(row) + '\n')
        self._log_scalars(values | {name: mean for name, (mean, _) in means.items()})

    def _log_scalars(self, values):
        if dist.get_rank() == 0:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, global_step=self._count)
            if values and self._wandb is not None:
                self._wandb.log(values, step=self._count)


def _difference(old, new) -> str:
    """'x instead of y', for dictionaries only where they differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f'{old} instead of {new}'
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return ', '.join(f'{key} {old.get(key)} instead of {new.get(key)}' for key in keys)
