"""Checkpoints under guided diffusion's file names, and the cache of distillation beside them.

    modelNNNNNN.pt              weights of the U-Net after NNNNNN steps; the last file of a checkpoint to appear
    ema_RATE_NNNNNN.pt          averages of the weights
    optNNNNNN.pt                optimizer, and the rest of what the loop needs to go on
    teacher-state-NNNNNN.cache  the cache of distillation (see `distillation.cache.CacheFile`); processes
                                after the first have files of their own, teacher-state-NNNNNN-RANK.cache
"""

import os
import re

from distillation.cache import Cache, CacheFile, write_cache
from dnnlib import UserError
from torch_utils import distributed as dist
from training.snapshot import read_state, write_state

_MODEL = re.compile(r'model(\d{6,})\.pt')
_PREFIX = 'model.'                                 # of the U-Net's weights in a DiscreteDenoiser
_KEPT_CACHES = 2                                   # the newest; an older one is needed only if the newest is damaged


def _path(folder: str, name: str, step: int, suffix='.pt') -> str:
    return os.path.join(folder, f'{name}{step:06d}{suffix}')


def _cache_path(folder: str, step: int, rank: int) -> str:
    return _path(folder, 'teacher-state-', step, f'-{rank}.cache' if rank else '.cache')


def _plain(state: dict) -> dict:
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def _prefixed(state: dict) -> dict:
    return {_PREFIX + name: value for name, value in state.items()}


def steps_in(folder: str) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    return sorted(int(match[1]) for match in map(_MODEL.fullmatch, os.listdir(folder)) if match)


class GuidedCheckpoints:
    """Saves and finds the checkpoints of a run of `training.loop.Trainer` on a DiscreteDenoiser.

    batch_size       images of a step over all processes
    cache_interval   steps after which a checkpoint holds the cache; below 1: every one does
    """

    leftovers = ('.model*', '.ema_*', '.opt*', '.teacher-state-*')

    def __init__(self, batch_size: int, cache_interval: int = -1):
        self.batch_size, self.cache_interval = batch_size, cache_interval

    # Every process: its share of the cache.

    def save_share(self, folder: str, state: dict, batches: dict) -> dict:
        """Writes the cache of this process, if its batches have one; returns the rest of their state."""
        cache, rest = batches.get('cache'), {key: value for key, value in batches.items() if key != 'cache'}
        step = state['nimg'] // self.batch_size
        if cache is None or (self.cache_interval > 0 and step % self.cache_interval):
            return rest
        path = _cache_path(folder, step, dist.get_rank())
        write_cache(path, [Cache(**cache)], {'step': step, 'rank': dist.get_rank()})
        for old in self._caches(folder)[:-_KEPT_CACHES]:
            os.remove(old)
        return rest | {'cache': os.path.basename(path)}

    @staticmethod
    def _caches(folder: str) -> list[str]:
        """Cache files of this process, the oldest first."""
        rank = f'-{dist.get_rank()}' if dist.get_rank() else ''
        pattern = re.compile(rf'teacher-state-(\d{{6,}}){rank}\.cache')
        found = [(int(match[1]), name) for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
        return [os.path.join(folder, name) for _, name in sorted(found)]

    @staticmethod
    def load_share(state: dict, batches: dict) -> dict:
        """The state of this process's batches, with the cache mapped from its file."""
        if not isinstance(batches.get('cache'), str):
            return batches
        path = os.path.join(state['folder'], os.path.basename(batches['cache']))
        return batches | {'cache': CacheFile(path).mapped()}

    # The first process: all else.

    def save_checkpoint(self, folder: str, state: dict):
        """Writes the files of `state['nimg']`; each appears only when complete, and the model last."""
        step = state['nimg'] // self.batch_size
        ema = state['ema']
        for rate, values in zip(ema['rates'], ema['emas'], strict=True):
            write_state(_path(folder, f'ema_{rate}_', step), _plain(values))
        rest = {key: value for key, value in state.items() if key not in ('net', 'ema')}
        write_state(_path(folder, 'opt', step), rest | {'rates': ema['rates']})
        write_state(_path(folder, 'model', step), _plain(state['net']))

    def read_checkpoint(self, path: str) -> dict:
        """The state of which `path` is the modelNNNNNN.pt. Raises UserError if it is something else, or incomplete."""
        match = _MODEL.fullmatch(os.path.basename(path))
        if match is None:
            raise UserError(f'{path}: give a modelNNNNNN.pt of a run (weights alone are taken by model_path)')
        folder, step = os.path.dirname(os.path.abspath(path)), int(match[1])
        net, rest = read_state(path), read_state(_path(folder, 'opt', step))
        if not isinstance(rest, dict) or not {'identity', 'rates', 'nimg'} <= set(rest):
            raise UserError(f'{_path(folder, "opt", step)} is of another program: it can start a run (model_path={path}), '
                            'but not be resumed')
        emas = [_prefixed(read_state(_path(folder, f'ema_{rate}_', step))) for rate in rest['rates']]
        for batches in rest['batches']:
            if isinstance(batches.get('cache'), str):
                CacheFile(os.path.join(folder, os.path.basename(batches['cache'])))
        return rest | {'net': _prefixed(net), 'ema': {'rates': rest['rates'], 'emas': emas}, 'folder': folder}

    def load_newest(self, folder: str, report=print) -> dict | None:
        """The newest whole checkpoint of a folder, or None. Damaged ones are reported and passed over.

        Raises UserError if there are checkpoints but none can be read: training must not start anew by accident.
        """
        steps = steps_in(folder)
        for step in reversed(steps):
            try:
                return self.read_checkpoint(_path(folder, 'model', step))
            except UserError as error:
                report(f'Passing over a checkpoint: {error}')
        if steps:
            raise UserError(f'{folder}: none of its {len(steps)} checkpoints can be read; remove them to start anew')
        return None
