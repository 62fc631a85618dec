"""Tensors out of a TorchScript archive, without loading, let alone running, the program that it
holds.
"""

import torch

from torch_utils.files import pickles, torchfile

MAX_MODULES = 100_000


_ALLOWED = torchfile.TENSORS | {
    ('torch.jit._pickle', f'build_{kind}list'): lambda values: values
    for kind in ('int', 'double', 'bool', 'tensor')
} | {('torch.jit._pickle', 'restore_type_tag'): lambda value, _: value}


class _Unpickler(torchfile.StorageUnpickler):
    def find_class(self, module, name):
        return pickles.StandIn if module.partition('.')[0] == '__torch__' else super().find_class(module, name)


def read_tensors(records: torchfile.ZipRecords) -> dict[str, torch.Tensor]:
    """State dictionary (parameters and buffers by dotted name) of the module in a TorchScript
    archive.

    Raises ForeignPickleError if the archive holds anything unexpected.
    """
    return dict(_walk(_Unpickler(records.record('data.pkl'), records.storage, _ALLOWED).load(), '',
                      [0]))


def _walk(record, prefix, count):
    count[0] += 1
    if count[0] > MAX_MODULES:
        raise pickles.ForeignPickleError('its modules are nested without end')
    if isinstance(record, pickles.StandIn) and isinstance(record.state, dict):
        for name, value in record.state.items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            else:
                yield from _walk(value, f'{prefix}{name}.', count)
