"""Checkpoints: everything that the training loop needs to go on as if it had never stopped.

A layout says what the files of a checkpoint are called, and how the loop's state is packed into
them. There are three that published programs have made known:

    state    training-state-<kimg>.pt                                    EDM, EDM2
    steps    ckpt_<step>.pt, a snapshot at the same time                 class-balancing diffusion
    guided   modelNNNNNN.pt, ema_RATE_NNNNNN.pt, optNNNNNN.pt            guided diffusion
"""

import contextlib
import os
import re
from collections.abc import Callable

import torch

from dnnlib import UserError
from dnnlib.util import matching_names, one_line
from torch_utils.distributed import local
from torch_utils.files.identify import identify
from torch_utils.files.own import read_own
from torch_utils.files.pickles import UnreadableError, errors_of, map_file
from torch_utils.files.torchfile import ZipRecords
from training.snapshot import read_weights, write_state


def read_published(path: str) -> dict | None:
    """The loop's state in a training state of EDM or EDM2; None for other files.

    Of EDM's, the average is in the snapshot beside it, and its name says how many thousand images
    were seen. What these files do not have is empty: their recipe is not compared. Raises
    UserError if that snapshot is missing.
    """
    try:
        found = identify(path)
    except UserError:
        return None
    content = found.content or {}
    state = dict(means={}, batches=[], recipe={}, train_seconds=0.0)
    if found.kind == 'edm' and 'optimizer_state' in content:
        number = re.search(r'(\d+)\.pt$', path)
        snapshot = os.path.join(os.path.dirname(path),
                                f'network-snapshot-{number[1] if number else "NNNNNN"}.pkl')
        if not number or not os.path.isfile(snapshot):
            raise UserError(f'{path} is a training state of EDM: it goes on with the average in '
                            f'{snapshot}, which is missing')
        return state | dict(net=found.state, optimizer=content['optimizer_state'],
                            ema={'': read_weights(snapshot)}, nimg=int(number[1]) * 1000)
    if found.kind == 'weights' and 'optimizer' in content:
        return state | dict(net=content['net'], optimizer=content['optimizer'],
                            ema=content['ema'], nimg=content['state']['cur_nimg'])
    return None


class CheckpointError(UserError):
    """A checkpoint that this run cannot go on from; an older one may do."""

    kind = 'checkpoint'


class DamagedCheckpointError(CheckpointError):
    kind = 'damaged checkpoint'


# What content of another shape raises.
WRONG = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _read(path: str):
    """`read_own`; raises DamagedCheckpointError, or UnreadableError."""
    try:
        return read_own(path)
    except UnreadableError:
        raise
    except UserError as error:
        raise DamagedCheckpointError(error.text) from None


class Checkpoints:
    """The checkpoints in a run's folder, in the layout `training-state-<kimg>.pt`; base of the
    others.

    batch     images of a step over all processes
    describe  returns what a snapshot says besides its weights (see `training.snapshot.describe`)
    """

    prefixes = ('training-state-',)  # of the names; the first is that of the file to appear last
    state_prefix = prefixes[0]       # of the file with the loop's state
    digits = 7                       # at least, of the number in the names
    counts_steps = False             # logs and files go by steps, from 0, not by images

    def __init__(self, folder: str, batch: int = 1, describe: Callable = dict):
        self.folder = folder
        self.batch = batch
        self.describe = describe

    def number(self, nimg: int) -> int:
        """What a checkpoint's name says of the images seen."""
        return nimg // 1000

    def path(self, number: int, prefix: str | None = None) -> str:
        name = f'{prefix or self.prefixes[0]}{number:0{self.digits}d}.pt'
        return os.path.join(self.folder, name)

    def numbers(self, prefix: str | None = None) -> list[int]:
        """Numbers of the checkpoints in the folder, ascending; none if there is no such folder."""
        pattern = rf'{prefix or self.prefixes[0]}(\d{{{self.digits},}})\.pt'
        return sorted(int(match[1]) for match in matching_names(self.folder, pattern))

    def pack(self, state: dict) -> dict[str, dict]:
        """{path: content} of a checkpoint's files; what `numbers` goes by is the last."""
        return {self.path(self.number(state['nimg'])): state}

    def read(self, path: str) -> dict:
        """The content of the checkpoint at `path`. Raises CheckpointError if it is
        damaged.
        """
        try:
            return _read(path)
        except DamagedCheckpointError:
            content = read_published(path)
            if content is None:
                raise
            return content

    def unpack(self, content: dict, path: str) -> dict:
        """The loop's state in what `read` returned. Raises UserError for other programs' files."""
        if not isinstance(content, dict) or not {'nimg', 'means'} <= set(content):
            raise UserError(f'{path} is no training state (training-state-*.pt)')
        return content

    def save(self, state: dict):
        """Writes the checkpoint of `state['nimg']`; every file appears only when complete."""
        for path, content in self.pack(state).items():
            write_state(path, content)
        self._remove_shards(self.number(state['nimg']), state.get('shards', {}).get('processes'))

    def load(self, path: str) -> dict:
        """The loop's state in a checkpoint. Raises CheckpointError if it is damaged or no
        checkpoint, UnreadableError if that cannot be known.
        """
        try:
            return self.unpack(self.read(path), path) | {'path': path}
        except (CheckpointError, UnreadableError):
            raise
        except UserError as error:
            raise CheckpointError(error.text) from None
        except WRONG as error:
            raise CheckpointError(f'{path} is of another program or version '
                                  f'({one_line(error)})') from None

    def load_newest(self, report=print, use: Callable = lambda state: None) -> dict | None:
        """The newest checkpoint that is whole and that `use` accepts, or None.

        use  takes over a state; raises CheckpointError for one that does not fit

        Others are reported and passed over. Raises UserError if one may be whole but cannot be
        read, and if there are checkpoints but none can be used: training must not start anew, or
        go back, by accident.
        """
        numbers = self.numbers()
        newest = None
        for number in reversed(numbers):
            try:
                state = self.load(self.path(number))
                use(state)
                return state
            except UnreadableError as error:
                raise UserError(f'{error.text}; mend that, or move the file away to go on from an '
                                'older checkpoint') from None
            except CheckpointError as error:
                newest = newest or error
                report(f'Passing over a {error.kind}: {error}')
        if numbers:
            raise UserError(f'{self.folder}: none of its {len(numbers)} checkpoints can be read; '
                            f'remove them to start anew ({newest})')
        return None

    def patterns(self, number: int) -> list[str]:
        """Of the names of a checkpoint's files, in the order in which they are removed: that of
        the loop's state comes last.
        """
        return [re.escape(os.path.basename(self.path(number))), self._shards(number)]

    def _shards(self, number: int) -> str:
        """Pattern of the names of training.shard_files."""
        return rf'{self.state_prefix}{number:0{self.digits}d}\.\d+-of-\d+\.shard'

    def _remove_shards(self, number: int, but: int | None = None):
        """Those of a checkpoint, but what so many processes have written."""
        for match in matching_names(self.folder, self._shards(number)):
            if not match[0].endswith(f'-of-{but}.shard'):
                os.remove(os.path.join(self.folder, match[0]))

    def remove_partial(self):
        """Removes shards that a killed process wrote, and did not come to the checkpoint of."""
        for match in matching_names(self.folder, rf'{self.state_prefix}(\d+)\..+\.shard'):
            if int(match[1]) not in self.numbers():
                self._remove_shards(int(match[1]))

    def prune(self, nimg: int, keep: int):
        """Removes all but the newest `keep` of the checkpoints up to that of `nimg`, which has
        just been written; 0 keeps all. Later ones were passed over as damaged and do not count.
        What other programs wrote stays.
        """
        numbers = [number for number in self.numbers(self.state_prefix)
                   if number <= self.number(nimg)]
        for number in filter(self._is_ours, numbers[:-keep] if keep else ()):
            for pattern in self.patterns(number):
                for match in matching_names(self.folder, pattern):
                    os.remove(os.path.join(self.folder, match[0]))

    def _is_ours(self, number: int) -> bool:
        """By what the file says of itself; the weights are not read."""
        path = self.path(number, self.state_prefix)
        with contextlib.suppress(UserError), errors_of(path):
            return b'train_seconds' in bytes(ZipRecords(path, map_file(path)).record('data.pkl'))
        return False

    def save_share(self, nimg: int, batches: dict) -> dict:
        """What the first process stores of the batches' state of this one (called on all of them).

        For states that are too large to be sent: write them here, and return where they are.
        """
        return batches

    def load_share(self, path: str, batches: dict) -> dict:
        """The batches' state of this process, from what `save_share` returned for it.

        path  of the checkpoint
        """
        return batches


_PREFIX = 'model.'  # of the U-Net's weights within a DiscreteDenoiser


def _without_prefix(weights: dict) -> dict:
    return {name.removeprefix(_PREFIX): value for name, value in weights.items()}


def _with_prefix(weights: dict) -> dict:
    return {_PREFIX + name: value for name, value in weights.items()}


class StepCheckpoints(Checkpoints):
    """`ckpt_<step>.pt` of a run on a DiscreteDenoiser: steps are counted from 0.

    Keys `net_model` and `ema_model` (weights of the U-Net and their average), `optim` and `step`
    are those of class-balancing diffusion's checkpoints. The rest is what the loop needs, and
    what makes a checkpoint a snapshot too.
    """

    prefixes = ('ckpt_',)
    state_prefix = 'ckpt_'
    digits = 1
    counts_steps = True

    def number(self, nimg):
        return nimg // self.batch - 1

    def pack(self, state):
        step = self.number(state['nimg'])
        rest = dict(state)
        average, = rest.pop('ema').values()
        weights = {'net_model': _without_prefix(rest.pop('net')),
                   'ema_model': _without_prefix(average)}
        # The average under its names in a snapshot takes no further room in the file.
        return {self.path(step): self.describe() | weights | {
            'optim': rest.pop('optimizer'), 'step': step, 'state': average} | rest}

    def unpack(self, content, path):
        if 'means' not in content:
            raise UserError(f'{path} can be evaluated and fine-tuned, but not resumed: '
                            'it lacks the state of this training loop; choose another folder')
        return content | {
            'net': _with_prefix(content['net_model']), 'optimizer': content['optim'],
            'ema': {'': _with_prefix(content['ema_model'])}}


class GuidedCheckpoints(Checkpoints):
    """Guided diffusion's files, of a run on a DiscreteDenoiser:

    modelNNNNNN.pt      weights of the U-Net after NNNNNN steps; the last file to appear
    ema_RATE_NNNNNN.pt  averages of the weights
    optNNNNNN.pt        optimizer, and the rest of what the loop needs to go on
    """

    prefixes = ('model', 'ema_', 'opt')
    state_prefix = 'opt'
    digits = 6

    def number(self, nimg):
        return nimg // self.batch

    def pack(self, state):
        step = self.number(state['nimg'])
        rest = dict(state)
        net = rest.pop('net')
        averages = rest.pop('ema')
        rest['rates'] = list(averages)
        return {self.path(step, f'ema_{rate}_'): _without_prefix(weights)
                for rate, weights in averages.items()} | {
            self.path(step, 'opt'): rest, self.path(step): _without_prefix(net)}

    def patterns(self, number):
        return [rf'{prefix}{number:06d}\.pt' for prefix in ('model', r'ema_[\d.e-]+_', 'opt')]

    def read(self, path):
        folder, name = os.path.split(path)
        if not re.fullmatch(r'model\d{6,}\.pt', name):
            raise UserError(f'{path} is no modelNNNNNN.pt of a run')

        def beside(prefix):
            return _read(os.path.join(folder, name.replace('model', prefix)))

        rest, net = beside('opt'), _read(path)
        if 'param_groups' in rest:  # guided diffusion's own: all but the weights and Adam is new
            rates = [match[1] for match in matching_names(folder, f'ema_(.+)_{name[5:]}')]
            rest = dict(nimg=int(name[5:-3]) * self.batch, rates=rates, means={}, batches=[],
                        recipe={}, train_seconds=0, optimizer=_by_parameter(rest, net))
        return rest | {'net': net, 'ema': {
            rate: beside(f'ema_{rate}_') for rate in map(str, rest.get('rates', ()))}}

    def unpack(self, content, path):
        if not {'rates', 'nimg', 'batches'} <= set(content):
            raise UserError(f'{path} is of another program: its weights can start a run, '
                            'but it cannot be resumed')
        return content | {
            'net': _with_prefix(content['net']),
            'ema': {rate: _with_prefix(weights) for rate, weights in content['ema'].items()}}


def _by_parameter(optimizer: dict, net: dict) -> dict:
    """Adam's state for each of the weights `net`, where guided diffusion in half precision has one
    of all its vectors and one of all its matrices.
    """
    groups = [[i for i, value in enumerate(net.values()) if (value.ndim > 1) == matrices]
              for matrices in (False, True)]
    if len(optimizer['state']) != 2 or len(net) == 2:
        return optimizer
    shapes = [value.shape for value in net.values()]
    state = {i: {} for i in range(len(net))}
    for group, values in zip(groups, optimizer['state'].values(), strict=True):
        sizes = [shapes[i].numel() for i in group]
        for name, value in values.items():
            value = torch.as_tensor(value)  # the step is one number for all
            whole = value.numel() == sum(sizes)
            parts = value.flatten().split(sizes) if whole else [value] * len(group)
            for i, part in zip(group, parts, strict=True):
                state[i][name] = part.reshape(shapes[i] if whole else ()).clone()
    return optimizer | {'state': state}


# The layouts of a recipe, by name.
LAYOUTS = {'state': Checkpoints, 'steps': StepCheckpoints, 'guided': GuidedCheckpoints}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """optimizer.load_state_dict, but for the settings, which stay those of `optimizer`. Raises
    ValueError for another shape.

    Every tensor gets the memory order of its parameter: fused optimizers on the CPU walk through
    memory, not through indices, so a state that was saved when the weights had another order
    (channels first or last) would be taken for that of other elements.
    """
    settings = optimizer.state_dict()['param_groups']
    rows = {number: {name: local(value) for name, value in values.items()}
            for number, values in state['state'].items()}
    optimizer.load_state_dict({'state': rows, 'param_groups': settings})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if not torch.is_tensor(value) or value.ndim == 0:
                continue
            if value.shape != parameter.shape:
                raise ValueError(f'the optimizer has {name} {list(value.shape)} of a weight '
                                 f'{list(parameter.shape)}')
            if value.stride() != parameter.stride():
                ordered = torch.empty_like(parameter, dtype=value.dtype)
                values[name] = ordered.copy_(value)
