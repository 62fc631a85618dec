"""Checkpoints: everything that the training loop needs to go on as if it had never stopped."""

import os
import re

import torch

from dnnlib import UserError
from training.snapshot import read_state, write_state

_NAME = re.compile(r'training-state-(\d{7,})\.pt')


def checkpoint_path(folder: str, nimg: int) -> str:
    """`training-state-<kimg>.pt` in the folder of the run."""
    return os.path.join(folder, f'training-state-{nimg // 1000:07d}.pt')


def save_checkpoint(folder: str, state: dict):
    """Writes the checkpoint of `state['nimg']`; it appears only when complete."""
    write_state(checkpoint_path(folder, state['nimg']), state)


def read_checkpoint(path: str) -> dict:
    """The state in a checkpoint file; raises UserError if the file is something else."""
    state = read_state(path)
    if not isinstance(state, dict) or 'identity' not in state:
        raise UserError(f'{path} is no training state (training-state-*.pt)')
    return state


def newest_kimg(folder: str) -> int:
    """Thousands of images in the name of the newest checkpoint, -1 if there is none."""
    return max((int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match), default=-1)


def load_optimizer(optimizer, state: dict):
    """optimizer.load_state_dict, with every tensor in the memory order of its parameter.

    Fused optimizers on the CPU walk through memory, not through indices: a state that was saved when the weights had another
    order (channels first or last) would be taken for that of other elements.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_newest(folder: str, report=print) -> dict | None:
    """The newest whole checkpoint of a folder, or None. Damaged ones are reported and passed over.

    Raises UserError if there are checkpoints but none can be read: training must not start anew by accident.
    """
    names = sorted((name for name in os.listdir(folder) if _NAME.fullmatch(name)),
                   key=lambda name: int(_NAME.fullmatch(name)[1]), reverse=True)
    for name in names:
        try:
            return read_state(os.path.join(folder, name))
        except UserError as error:
            report(f'Passing over a damaged checkpoint: {error}')
    if names:
        raise UserError(f'{folder}: none of its {len(names)} checkpoints can be read; remove them to start anew')
    return None
