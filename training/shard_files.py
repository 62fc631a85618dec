"""Files of checkpoints in shards: besides that of the checkpoint, one of each process, with its
rows of the tensors.

`torch.distributed.checkpoint` plans who writes and reads which rows, for any numbers of processes
then and now. Its own formats have a pickle (`.metadata`); here the files are those of all
checkpoints (`write_state`, `read_own`), and what the plan needs is in that of the checkpoint.
"""

import json
import math
import os
import secrets
import warnings
from collections.abc import Callable

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from dnnlib import UserError
from dnnlib.util import one_line, printable
from torch_utils import distributed as dist
from torch_utils.files.own import read_own
from training.snapshot import write_state


def shard_path(path: str, process: int, processes: int) -> str:
    """training-state-0000001.pt -> training-state-0000001.0-of-4.shard."""
    return f'{os.path.splitext(path)[0]}.{process}-of-{processes}.shard'


class _Storage:
    """What writer and reader have in common: the plans are carried out as they come.

    What fails for one process is kept in `error`: the others are not left waiting.
    """

    def __init__(self, path: str, key: str, processes: int):
        self.path, self.key, self.processes = path, key, processes
        self.error = None

    def reset(self, checkpoint_id=None):
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return True


def _done(value=None) -> torch.futures.Future:
    future = torch.futures.Future()
    future.set_result(value)
    return future


class _Writer(_Storage, dcp.StorageWriter):
    """`index` afterwards, on the first process: {name: [type, shape, [[first row, rows, process],
    ...]]}.
    """

    index = None

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        pass

    def write_data(self, plan, planner):
        rank = dist.get_rank()
        tensors = {item.index.fqn: planner.resolve_data(item).detach().cpu()
                   for item in plan.items}
        try:
            write_state(shard_path(self.path, rank, self.processes),
                        {'shards_of': self.key, 'tensors': tensors})
        except UserError as error:
            self.error = error
        return _done([WriteResult(item.index, tensors[item.index.fqn].nbytes, rank)
                      for item in plan.items])

    def finish(self, metadata, results):
        process = {(result.index.fqn, result.index.offset): result.storage_data
                   for part in results for result in part}
        self.index = {name: [str(tensor.properties.dtype).removeprefix('torch.'),
                             list(tensor.size),
                             sorted([chunk.offsets[0], chunk.sizes[0],
                                     process[name, chunk.offsets]]
                                    for chunk in tensor.chunks if chunk.sizes[0])]
                      for name, tensor in metadata.state_dict_metadata.items()}


class _Reader(_Storage, dcp.StorageReader):
    """`index`: as `_Writer` made it."""

    def __init__(self, path, key, processes, index: dict):
        super().__init__(path, key, processes)
        self._files = {}
        self.metadata = Metadata({}, storage_data={})
        for name, (dtype, shape, chunks) in index.items():
            sizes = [ChunkStorageMetadata(torch.Size([first, *[0] * len(shape[1:])]),
                                          torch.Size([rows, *shape[1:]]))
                     for first, rows, _ in chunks]
            self.metadata.state_dict_metadata[name] = TensorStorageMetadata(
                TensorProperties(getattr(torch, dtype)), torch.Size(shape), sizes)
            for size, (_, _, process) in zip(sizes, chunks, strict=True):
                self.metadata.storage_data[MetadataIndex(name, size.offsets)] = size, process

    def read_metadata(self, *args, **kwargs):
        return self.metadata

    def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs):
        pass

    def read_data(self, plan, planner):
        try:
            for item in plan.items:
                self._read(item, planner)
        except UserError as error:
            self.error = type(error)(f'{self.path}: {error.text}')
        except Exception as error:  # content of another shape raises nearly anything
            self.error = UserError(f'{self.path}: its shards are damaged ({one_line(error)})')
        return _done()

    def _read(self, item, planner):
        name = item.storage_index.fqn
        chunk, process = self.metadata.storage_data[item.storage_index]
        rows = self._tensors(process).get(name)
        target = planner.resolve_tensor(item).detach()
        if not torch.is_tensor(rows) or (rows.shape, rows.dtype) != (chunk.sizes, target.dtype):
            raise UserError(f'{self._path(process)} has not what {self.path} says')
        target.copy_(rows[tuple(slice(first, first + count) for first, count in zip(
            item.storage_offsets, item.lengths, strict=True))])

    def _path(self, process):
        return shard_path(self.path, process, self.processes)

    def _tensors(self, process: int) -> dict:
        if process not in self._files:
            path = self._path(process)
            content = read_own(path)
            if not isinstance(content, dict) or content.get('shards_of') != self.key:
                raise UserError(f'{path} is of another checkpoint than {self.path}')
            self._files[process] = dict(content['tensors'])
        return self._files[process]


# --- What checkpoints do with them ---------------------------------------------------------------


def write(path: str, state: dict) -> dict:
    """Writes the tensors in shards of nested dictionaries, for the checkpoint `path`; returns
    what that one has. All processes call it.
    """
    tensors = _take_out(state)
    processes = dist.get_world_size()
    key = dist.broadcast_object(secrets.token_hex(8))
    writer = _Writer(path, key, processes)
    dcp.save(tensors, storage_writer=writer, process_group=dist.host_group())
    dist.raise_shared(writer.error)
    return state | {'shards': {'key': key, 'processes': processes, 'index': writer.index}}


def _take_out(tree: dict, place=()) -> dict:
    """Takes the tensors in shards out of nested dictionaries: {place as JSON: tensor}."""
    tensors = {}
    for name, value in list(tree.items()):
        if isinstance(value, dict):
            tensors |= _take_out(value, (*place, name))
        elif dist.is_sharded(value):
            tensors[json.dumps([*place, name])] = tree.pop(name)
    return tensors


def read(state: dict, empty: Callable | None = None) -> dict:
    """The whole state in a checkpoint, of which `state` is what `write` returned, and its `path`.

    empty  (shape, dtype) -> tensor in shards to be read, by all processes together; None: every
           process reads whole tensors, for itself

    Raises UserError if a file is missing, damaged or of another checkpoint.
    """
    shards = state['shards']
    index = dict(shards['index'])
    _check(state['path'], shards['processes'], index)
    tensors = {name: (empty or _empty)(shape, getattr(torch, dtype))
               for name, (dtype, shape, _) in index.items()}
    reader = _Reader(state['path'], shards['key'], shards['processes'], index)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                        # of one process
        dcp.load(tensors, storage_reader=reader, no_dist=empty is None,
                 process_group=empty and dist.host_group())
    if reader.error:
        raise reader.error
    for place, tensor in tensors.items():
        *parents, name = json.loads(place)
        tree = state
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[name] = tensor
    return state


def _empty(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def _check(path: str, processes: int, index: dict):
    """Raises UserError unless the tensors are whole, and together no larger than the files."""
    files = [shard_path(path, process, processes) for process in range(min(processes, 1 << 20))]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f'{path} needs {missing[0]}, which is missing')
    size = sum(map(os.path.getsize, files))
    for dtype, shape, chunks in index.values():
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f'{path} has tensors of type {printable(dtype, 20)}')
        end = 0
        for first, rows, process in chunks:
            if first != end or rows < 1 or process not in range(processes):
                raise UserError(f'{path} is malformed: its shards are incomplete')
            end += rows
        size -= math.prod(shape) * getattr(torch, dtype).itemsize
        if end != shape[0] or min(shape) < 0 or size < 0:
            raise UserError(f'{path} is malformed: its shards are incomplete')
