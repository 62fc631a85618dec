"""Files of torch that this project wrote: checkpoints, snapshots, statistics."""

import re

import torch

from torch_utils.files import pickles, torchfile

SNAPSHOT_FORMAT = 'diffusion-snapshot-1'
STATISTICS_FORMAT = 'feature-statistics-1'


def _set(items=()):
    if len(items) > 100 or not all(isinstance(item, str | int | float | None) for item in items):
        raise pickles.ForeignPickleError('it has a set of strange values, or a large one')


# What a pickle of ours may name. torch allows more, such as bytearray(10**12); nothing here makes
# anything from a number.
_NAMES = dict.fromkeys([('__builtin__', 'complex'), *torchfile.TENSORS], lambda *_: None) | {
    ('collections', 'OrderedDict'): lambda: {},
    ('_codecs', 'encode'): pickles.encode,
    ('__builtin__', 'set'): _set,
}


def is_own(records: torchfile.ZipRecords) -> bool:
    """True for a zip of torch that says that it has a format of this project."""
    formats = f'{SNAPSHOT_FORMAT}|{STATISTICS_FORMAT}'.encode()
    return re.search(formats, records.record('data.pkl')) is not None


def read_own(path: str):
    """What `torch.save` wrote to `path`: plain values, lists, dictionaries, and tensors of every
    type on the CPU.

    Every byte is verified first, by the CRCs that the zip holds (see `ZipRecords`). Then the
    pickle is followed by the bounded reader, which refuses what torch.load would spend memory or
    time on (nested keys, records that share bytes, constructors of other types); what is left
    cannot ask for more memory than the file has, since tensors are views of the mapped file. Their
    values can be changed; that stays in memory. Raises UserError that names the file.
    """
    with pickles.errors_of(path, 'not a file that this project wrote, or damaged: '):
        records = torchfile.ZipRecords(path, pickles.map_file(path))
        records.verify()
        torchfile.StorageUnpickler(records.record('data.pkl'), records.storage, _NAMES).load()
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
