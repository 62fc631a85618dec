"""Archives of tar, read within a budget."""

import bz2
import contextlib
import gzip
import lzma
import tarfile

from dnnlib import budget

_MAX_HEADER = 16 << 10  # bytes of what describes a member: long names, pax headers
_DESCRIPTIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE,
                 tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class _TarInfo(tarfile.TarInfo):
    """Refuses descriptions without end, which are read whole, and sparse files, which have no
    bytes.
    """

    @classmethod
    def frombuf(cls, *args):
        info = super().frombuf(*args)
        if info.type == tarfile.GNUTYPE_SPARSE \
                or (info.type in _DESCRIPTIONS and info.size > _MAX_HEADER):
            raise budget.TooMuch('it has a sparse file, or a name without end')
        return info

    def _refuse(self, *_):
        raise budget.TooMuch('it has a sparse file')

    # Of pax, whose holes are in a list without end.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


# How packed files begin, and what unpacks them.
_PACKED = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ': lzma.open}


class _Metered:
    """A file of which every byte that is read or passed over is drawn from the budget."""

    def __init__(self, file):
        self._file = file
        self.tell = file.tell

    def read(self, count):
        budget.spend(memory=count)
        return self._file.read(count)

    def seek(self, place, whence=0):
        budget.spend(memory=max(0, place - self.tell()))
        return self._file.seek(place, whence)


@contextlib.contextmanager
def members(path: str):
    """(archive, iterator of its members) in the block; what they hold is drawn from the budget of
    the file. Raises what tarfile and the decompressors raise, and budget.TooMuch.
    """
    def bounded(archive):
        for member in archive:
            budget.spend(memory=member.size)
            yield member

    with open(path, 'rb') as raw:
        head = raw.read(6)
    opener = next((opener for start, opener in _PACKED.items() if head.startswith(start)), open)
    with budget.reading(path), opener(path, 'rb') as file, \
            tarfile.open(fileobj=_Metered(file), mode='r:', tarinfo=_TarInfo) as archive:
        yield archive, bounded(archive)
