"""Files of torch that this project wrote: checkpoints, snapshots, statistics."""

import collections
import re

from torch_utils.files import pickles, torchfile

SNAPSHOT_FORMAT = 'diffusion-snapshot-1'
STATISTICS_FORMAT = 'feature-statistics-1'


def _set(items=()):
    if len(items) > 100 or not all(isinstance(item, str | int | float | None) for item in items):
        raise pickles.ForeignPickleError('it has a set of strange values, or a large one')
    return set(items)


# What a pickle of ours may name besides tensors.
_NAMES = torchfile.TENSORS | {
    ('collections', 'OrderedDict'): lambda: collections.OrderedDict(),
    ('_codecs', 'encode'): pickles.encode,
    ('__builtin__', 'set'): _set,
    ('__builtin__', 'complex'): complex,
}


def is_own(records: torchfile.ZipRecords) -> bool:
    """True for a zip of torch that says that it has a format of this project."""
    formats = f'{SNAPSHOT_FORMAT}|{STATISTICS_FORMAT}'.encode()
    return re.search(formats, records.record('data.pkl')) is not None


def read_own(path: str):
    """What `torch.save` wrote to `path`: plain values, lists, dictionaries, and tensors of every
    type on the CPU.

    Every byte is verified first, by the CRCs that the zip holds. The bounded reader of pickles
    cannot ask for more memory than the file has, since tensors are views of the mapped file. Their
    values can be changed; that stays in memory. Raises UserError that names the file.
    """
    with pickles.errors_of(path, 'not a file that this project wrote, or damaged: '):
        records = torchfile.ZipRecords(path, pickles.map_file(path))
        records.verify()
        return records.load(_NAMES)
