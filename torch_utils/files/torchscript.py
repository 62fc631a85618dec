"""Tensors out of a TorchScript archive, without loading, let alone running, the program that it
holds.
"""

import torch

from torch_utils.files import pickles, torchfile

_ALLOWED = torchfile.TENSORS | {
    ('torch.jit._pickle', f'build_{kind}list'): lambda values: values
    for kind in ('int', 'double', 'bool', 'tensor')
} | {('torch.jit._pickle', 'restore_type_tag'): lambda value, _: value}


class _Unpickler(torchfile.StorageUnpickler):
    def find_class(self, module, name):
        if module.partition('.')[0] == '__torch__':
            return pickles.StandIn
        return super().find_class(module, name)


def read_tensors(records: torchfile.ZipRecords) -> dict[str, torch.Tensor]:
    """State dictionary (parameters and buffers by dotted name) of the module in a TorchScript
    archive.

    Raises ForeignPickleError if the archive holds anything unexpected.
    """
    unpickler = _Unpickler(records.record('data.pkl'), records.storage, _ALLOWED)
    return torchfile.named_tensors(unpickler.load(), _attributes)


def _attributes(value):
    state = value.state if isinstance(value, pickles.StandIn) else None
    return state.items() if isinstance(state, dict) else ()
