"""Checkpoints of the long-tail study, `ckpt_<step>.pt`: step numbers, and the layout of that paper's code.

Keys `net_model` and `ema_model` (weights of the U-Net and their average), `optim` and `step` are those of the published
checkpoints, which load here, and the other way round. The rest is what the loop needs to go on, and what makes a
checkpoint a snapshot too: generate_images.py and calculate_metrics.py take it as --net.
"""

import os
import re

import torch

from dnnlib import UserError
from torch_utils.files.identify import identify
from training.snapshot import FORMAT, read_state, write_state

_NAME = re.compile(r'ckpt_(\d+)\.pt')
_PREFIX = 'model.'   # of the U-Net within DiscreteDenoiser


def steps_in(folder: str) -> list[int]:
    """Numbers of the steps whose checkpoints are in a folder, ascending; none if there is no such folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def checkpoint_path(folder: str, step: int) -> str:
    return os.path.join(folder, f'ckpt_{step}.pt')


def choose_step(folder: str, step: int) -> int:
    """`step` if the folder has its checkpoint, the newest for 0. Raises UserError that lists those there are."""
    there = steps_in(folder)
    if not there:
        raise UserError(f'--ckpt_step={step}: {folder} holds no ckpt_<step>.pt; train there first, or give another --logdir')
    if step == 0 and 0 not in there:
        return there[-1]
    if step not in there:
        raise UserError(f'--ckpt_step={step}: {folder} has no ckpt_{step}.pt; there are the steps {", ".join(map(str, there))}')
    return step


def load_average(path: str, net: torch.nn.Module):
    """Loads the averaged weights of a checkpoint, ours or a published one, into a DiscreteDenoiser.

    Raises UserError that names the file and the first tensor that does not fit.
    """
    found = identify(path)
    if found.weights != 'ema_model':
        raise UserError(f'{path} has no averaged weights (ema_model); give a ckpt_<step>.pt of the long-tail study')
    weights = found.state
    own = net.model.state_dict()
    wrong = ([f'{name} is missing' for name in own if name not in weights]
             + [f'{name} is not part of the network' for name in weights if name not in own]
             + [f'{name} is {list(weights[name].shape)} instead of {list(value.shape)}'
                for name, value in own.items() if name in weights and weights[name].shape != value.shape])
    if wrong:
        raise UserError(f'{path} is of another network: {wrong[0]}; give the options that it was trained with '
                        '(--flagfile of its folder)')
    net.model.load_state_dict(weights)


class StepCheckpoints:
    """Saves and finds the checkpoints of a run of `training.loop.Trainer`.

    `snapshot`: `network` (class name and arguments), `encoder` (its configuration), `dataset` and `recipe`.
    """

    def __init__(self, batch_size: int, snapshot: dict):
        self.batch_size, self.snapshot = batch_size, snapshot

    def save_checkpoint(self, folder: str, state: dict):
        """Writes the checkpoint of the step just taken, numbered from 0; it appears only when complete."""
        step = state['nimg'] // self.batch_size - 1
        loop = {key: value for key, value in state.items() if key not in ('net', 'ema', 'optimizer')}
        averaged = state['ema']['ema']
        write_state(checkpoint_path(folder, step), {
            'net_model': _without_prefix(state['net']), 'ema_model': _without_prefix(averaged),
            'optim': state['optimizer'], 'step': step, **loop,
            # The same tensors under their names here take no further room in the file.
            'format': FORMAT, 'state': averaged, 'ema_std': None, **self.snapshot})

    def load_newest(self, folder: str, report=print) -> dict | None:
        """The newest whole checkpoint as the loop wants it, or None. Damaged ones are reported and passed over.

        Raises UserError if there are checkpoints but none can be read, or if the newest is not one of ours.
        """
        there = steps_in(folder)
        for step in reversed(there):
            path = checkpoint_path(folder, step)
            try:
                state = read_state(path)
            except UserError as error:
                report(f'Passing over a damaged checkpoint: {error}')
                continue
            if 'identity' not in state:
                raise UserError(f'{path} can be evaluated and fine-tuned, but not resumed: it lacks the state of this '
                                'training loop; choose another --logdir')
            return state | {
                'net': _with_prefix(state['net_model']), 'ema': {'ema': _with_prefix(state['ema_model'])},
                'optimizer': state['optim']}
        if there:
            raise UserError(f'{folder}: none of its {len(there)} checkpoints can be read; remove them to start anew')
        return None


def _without_prefix(state):
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def _with_prefix(state):
    return {_PREFIX + name: value for name, value in state.items()}
