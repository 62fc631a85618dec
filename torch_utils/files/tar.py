"""Archives of tar, read within a budget."""

import contextlib
import tarfile

from dnnlib import budget

_MAX_HEADER = 64 << 10  # bytes of what describes a member: long names, pax headers
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


@contextlib.contextmanager
def members(path: str, mode: str = 'r'):
    """(archive, iterator of its members) in the block; what they hold is drawn from the budget of
    the file. Raises what tarfile and the decompressors raise, and budget.TooMuch.
    """
    def bounded(archive):
        for member in archive:
            budget.spend(memory=member.size)
            yield member

    with budget.reading(path), tarfile.open(path, mode, tarinfo=_TarInfo) as archive:
        yield archive, bounded(archive)
