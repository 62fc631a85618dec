"""Small things that every room needs: errors for users, whole-or-nothing files, counts with
suffixes, cores.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from dnnlib import budget, progress

MARK = 'diffusion-data-studies'  # what pictures say of the software that wrote them


class UserError(Exception):
    """An error that the user can mend: one line that names field or file and says what to do.

    The library knows no command lines: it names the `field` that is wrong, and its `value`. A
    script prints the line without a traceback, with its own option in place of the field
    (`dnnlib.cli`), and ends with `status`.
    """

    status = 1
    is_shared = False  # whether every process raises it alike: then the first one prints it

    def __init__(self, text: str, field: str | None = None, value=None):
        self.text = without_secrets(text)
        super().__init__(self.text)
        self.field = field
        self.value = str(hide(value)) if isinstance(value, str) else value

    def line(self, option: str | None) -> str:
        """The message with `option` for the field; None: the value alone, where there is one."""
        if self.value is None:
            return f'{option}: {self.text}' if option else self.text
        return f'{option}={self.value} {self.text}' if option else f'{self.value} {self.text}'

    def __str__(self):
        return self.line(self.field)


def one_line(error: Exception, length: int = 120) -> str:
    """What an error says in one line of at most `length`, or its type where it says nothing."""
    return ' '.join(str(error).split())[:length] or type(error).__name__


def printable(text, length: int = 2000) -> str:
    """A text for a terminal: one line of at most `length`, no control characters. What comes from
    a file may hold some that a terminal obeys. URLs are `without_secrets`.
    """
    text = without_secrets(str(text)[:length])
    return ''.join(c if c.isprintable() else '?' for c in text)


# Scheme, name and password, host and path, query and fragment.
_URL = re.compile(r'([a-z][a-z0-9+.-]*://)(?:[^\s/?#]*@)?([^\s?#]*)(?:[?#]\S*)?', re.I)
_HOST = re.compile(r'(\[[0-9a-f:.%]+\]|[\w.-]*)(:\d*)?[^\w:/]*(/|$)', re.I)


def _public(match: re.Match) -> str:
    scheme, place = match.groups()
    return scheme + (place if _HOST.match(place) else '...')


def without_secrets(text: str) -> str:
    """A text in which URLs have no user name, password, query and fragment: that may be shown and
    stored. Of a URL that is not well formed the scheme alone is left.
    """
    return _URL.sub(_public, text) if '://' in text else text


class Address(str):
    """A URL as it may be shown and stored; `full` is the one to fetch."""

    full: str


def hide(text: str) -> str:
    """The value of an option; what `without_secrets` takes from it only `dnnlib.url` sees."""
    if without_secrets(text) == text:
        return text
    address = Address(without_secrets(text.replace(' ', '%20')))    # they end where it ends
    address.full = text
    return address


_CODES = re.compile('[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f'
                    '\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def without_codes(text: str) -> str:
    """A text without control characters, but for ends of lines and tabs."""
    return _CODES.sub('?', text)


@contextlib.contextmanager
def renamed_fields(**names):
    """Errors of the block whose field is a key of `names` are about the field in its value."""
    try:
        yield
    except UserError as error:
        error.field = names.get(error.field, error.field)
        raise


@contextlib.contextmanager
def signal_handler(number: int, handler):
    """In the block a signal goes to `handler`, afterwards to what it went to before. For the main
    thread.
    """
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a disk that is full or broken.
DISK_ERRORS = (*_FULL, errno.EIO, errno.EROFS)


def of_disk(error: OSError, what: str = '{}') -> str:
    """What an error of the disk says, and what to do."""
    room = 'make room, or ' if error.errno in _FULL else ''
    return f'{what.format(error.strerror or error)}; {room}choose another place'


def cannot_write(path: str, error: OSError, field: str | None = None) -> UserError:
    return UserError(of_disk(error, 'cannot be written ({})'), field, path)


def causes(error: BaseException | None):
    """An error and those that it hides, to the first that is for the user."""
    while error is not None and not isinstance(error, UserError):
        yield error
        error = error.__cause__ or error.__context__


def disk_error(error: BaseException, codes=DISK_ERRORS) -> OSError | None:
    """The error of the disk that this one is, or hides (as those of torch.save do); or None."""
    return next((cause for cause in causes(error)
                 if isinstance(cause, OSError) and cause.errno in codes), None)


@contextlib.contextmanager
def writing(path: str):
    """A full or broken disk in the block becomes a UserError that names the file `path`, unless
    the error names another one.
    """
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None or '.tmp' not in (reason.filename or '.tmp'):
            raise
        raise cannot_write(path, reason) from None


def check_place(path: str, kind: str = 'file', field: str | None = None):
    """Raises UserError, about `field` if given, unless a 'file', or files in a 'folder', can be
    made at `path`, or whichever of the two is 'atomic' (see `atomic_path`). Leaves nothing behind.
    """
    def fault(text):
        return UserError(text, field, path)

    path = os.fspath(path)
    place = os.path.abspath(path)
    if not path:
        raise UserError('is empty; give a name', field, repr(path))
    if os.path.exists(place) and not os.path.isdir(place):
        if kind == 'folder':
            raise fault('is a file; give the name of a folder')
        if not os.path.isfile(place):
            raise fault('is no file that could be replaced; choose another place')
    elif kind == 'file' and os.path.isdir(place):
        raise fault('is a folder; give the name of a file')
    folder = place if kind == 'folder' else os.path.dirname(place)
    names = [os.path.basename(place)]
    while not os.path.lexists(folder):
        folder, name = os.path.split(folder)
        names.append(name)
    try:
        if not os.path.isdir(folder):
            raise NotADirectoryError(f'{folder} is no folder')
        for name in names:                                     # which may be too long
            with contextlib.suppress(FileNotFoundError):
                os.lstat(os.path.join(folder, name))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))                            # a full disk has room for a name
    except OSError as error:
        raise cannot_write(path, error, field=field) from None


@contextlib.contextmanager
def atomic_path(dest: str, sync: bool = True, is_folder: bool = False):
    """Yields a path beside `dest` of an empty file (or folder) for the block to fill; then renames
    it to `dest`.

    On any exception it is removed and `dest` stays as it was, so no reader ever sees half of a
    file. Raises UserError if the disk is full, or `dest` cannot be made. Parent folders are made.
    What killed processes left of the same name is removed.
    `sync=False` does not wait until the bytes are on the disk: for large files that can be made
    again if the power fails.
    """
    given = os.fspath(dest)
    dest = os.path.abspath(dest)
    temp, handle = _locked_temp(given, is_folder)
    try:
        with writing(given):
            yield temp
            if os.path.isfile(temp):
                if sync:
                    with open(temp, 'rb+') as f:
                        os.fsync(f.fileno())
            elif os.path.isdir(dest) and not os.path.islink(dest):
                shutil.rmtree(dest)
            os.replace(temp, dest)
    except BaseException:
        _remove(temp)
        raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def claimed_file(dest: str):
    """In the block no other process that claims `dest` makes it. Raises UserError if one does.

    Parent folders are made. File systems without locks are let pass.
    """
    temp, handle = _locked_temp(dest, is_claim=True)
    try:
        yield
    finally:
        _remove(temp)
        os.close(handle)


def _remove(path: str):
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def _locked_temp(dest: str, is_folder=False, is_claim=False) -> tuple[str, int]:
    """A new temporary file or folder for `dest`, and its handle, which has a lock until its
    process dies. Those of processes that are gone are removed. Raises UserError if it cannot be
    made, and for a claim if another process has one.
    """
    folder, name = os.path.split(os.path.abspath(dest))
    name = os.fsdecode(os.fsencode(name)[:100])
    try:
        os.makedirs(folder, exist_ok=True)
        if is_claim:
            _leftovers.pop(folder, None)                       # others are looked for now
        for leftover in _leftovers_of(folder).pop(name, ()):
            if not _remove_leftover(leftover) and is_claim:
                raise UserError(f'{dest}: another process is making it; wait for it, or choose '
                                'another name')
        return _new_temp(folder, name, is_folder)
    except OSError as error:
        raise cannot_write(os.fspath(dest), error) from None


def _new_temp(folder: str, name: str, is_folder: bool) -> tuple[str, int]:
    while True:
        temp = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}.tmp')
        if is_folder:
            os.mkdir(temp)
        flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
        handle = os.open(temp, flags, 0o666)
        with contextlib.suppress(OSError):                     # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(temp):                               # else it was taken for a leftover
            return temp, handle
        os.close(handle)


def _temporary(name: str) -> str:
    """The pattern of what `_new_temp` makes for a name of this pattern."""
    return rf'\.{name}\.[0-9a-f]{{8}}\.tmp'


def remove_leftovers(folder: str, name: str = '.+'):
    """Removes what killed processes left in a folder of files called `name` (a pattern), of any
    name by default.
    """
    for match in matching_names(folder, _temporary(name)):
        _remove_leftover(os.path.join(folder, match[0]))


def _remove_leftover(temp: str) -> bool:
    """Removes a temporary file or folder whose writer is gone, as far as locks can tell; False if
    it is alive.
    """
    with contextlib.suppress(OSError):
        mode = os.O_RDONLY if os.path.isdir(temp) else os.O_RDWR  # NFS locks what can be written
        handle = os.open(temp, mode | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(temp)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
    return True


_leftovers = {}  # {folder: (when it is to be listed again, {name: temporary files})}


def _leftovers_of(folder: str) -> dict[str, list[str]]:
    """Temporary files in a folder by the names they were for.

    Listing takes a hundredth of the time at most, also where a file is written to a folder of a
    million.
    """
    now = time.monotonic()
    if now >= _leftovers.get(folder, (0,))[0]:
        temps = collections.defaultdict(list)
        for match in matching_names(folder, _temporary('(.+)')):
            temps[match[1]].append(os.path.join(folder, match[0]))
        end = time.monotonic()
        _leftovers[folder] = end + 100 * (end - now), temps
    return _leftovers[folder][1]


def write_bytes(dest: str, data: bytes):
    """Writes a whole file at once (see `atomic_path`)."""
    with atomic_path(dest) as temp, open(temp, 'wb') as f:
        f.write(data)


def finite(value):
    """Plain values as records have them: None in place of numbers that are not finite, which JSON
    has not, and texts `without_secrets`.
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, str):
        return without_secrets(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value, indent: int | None = None) -> str:
    """JSON text of the `finite` values."""
    with contextlib.suppress(ValueError):
        text = json.dumps(value, indent=indent, allow_nan=False)
        if '://' not in text:
            return text
    return json.dumps(finite(value), indent=indent, allow_nan=False)


# What leads to the last name of a path: absolute, from a home folder, or up out of a folder.
_PRIVATE = re.compile(r"""(?<![\w.~/-])(?<!:(?=//))
    (?: file:/ | ~\w* | (?:[^\s'",:=/]+/)*\.\. )?
    / (?=\S) (?: [^\s'",:;=()[\]{}]*/ (?=\S) )?""", re.VERBOSE)


def publishable(value):
    """Plain values as files have them that are passed on: of every path in a text that tells of
    this machine and its user (absolute, from ~, or with ..), the last name alone, and URLs
    `without_secrets`. Paths below the working folder stay, and so do names on a hub.
    """
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if not isinstance(value, str) or '/' not in value:
        return value
    home = os.path.expanduser('~')
    text = without_secrets(value)
    text = re.sub(rf'{re.escape(home)}(?=/|$)', '~', text) if len(home) > 1 else text
    name, path = re.fullmatch(r'((?:[\w.-]+[=:])*)(.*)', text, re.DOTALL).groups()
    if path.startswith(('/', '~/')) and os.path.lexists(os.path.expanduser(path)):
        return name + os.path.basename(path.rstrip('/'))     # it may have spaces and commas
    return _PRIVATE.sub('', text)


def write_json(dest: str, value, indent: int | None = 2):
    """Writes the values, as `publishable`, to a JSON file that appears only when complete."""
    write_bytes(dest, (to_json(publishable(value), indent) + '\n').encode())


def without(values: dict, names) -> dict:
    """The dictionary without the keys `names`."""
    return {key: value for key, value in values.items() if key not in names}


def hash_file(path: str, algorithm: str = 'sha256') -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.new(algorithm)
    with open(path, 'rb') as file, progress.bar(
            total=os.path.getsize(path), unit='B', unit_scale=True, leave=False,
            desc=f'Checking {os.path.basename(path)}') as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def require_same(what: str, recorded: dict, wanted: dict, advice: str):
    """Raises UserError, with `advice`, if `what` was made with other values than `wanted`."""
    recorded, wanted = map(publishable, (recorded, wanted))        # as files have them
    for key, value in wanted.items():
        if recorded.get(key) != value:
            raise UserError(f'{what} was made with another {key} '
                            f'({recorded.get(key)} instead of {value}); {advice}')


_SUFFIXES = {'': 1, 'k': 10**3, 'm': 10**6, 'g': 10**9, 'ki': 2**10, 'mi': 2**20, 'gi': 2**30}


def parse_count(text) -> int:
    """'64Ki' -> 65536. Suffixes Ki, Mi, Gi are powers of two, k, M, G powers of ten.

    Fractions such as 1.5Mi are fine.

    Raises ValueError for anything else, negative numbers and counts that are not whole.
    """
    match = re.fullmatch(r'([0-9]*\.?[0-9]+(?:e[0-9]+)?)(|[kmg]i?)b?', str(text).strip().lower())
    if match is None:
        raise ValueError(f'{text!r} is not a count; write e.g. 4096, 64Ki, 1.5Mi or 2Gi')
    value = float(match[1]) * _SUFFIXES[match[2]]
    if value != int(value):
        raise ValueError(f'{text!r} is not a whole number')
    return int(value)


def format_count(count: int) -> str:
    """65536 -> '64Ki': the largest binary suffix that divides the count."""
    for suffix, factor in (('Gi', 2**30), ('Mi', 2**20), ('Ki', 2**10)):
        if count and count % factor == 0:
            return f'{count // factor}{suffix}'
    return str(count)


def parse_int_list(text) -> list[int]:
    """'1,2,5-8' -> [1, 2, 5, 6, 7, 8]. Raises ValueError with one line for anything else.

    Numbers are below 2^63, and at most 10^8, which fit into memory.
    """
    result = []
    for part in str(text).split(','):
        match = re.fullmatch(r'\s*(\d+)\s*(?:-\s*(\d+)\s*)?', part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f'{text!r} is not a list of numbers; write e.g. 0,3,10-19')
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
        if numbers.stop > 1 << 63:
            raise ValueError(f'{part.strip()[:40]} is too large; numbers are below 2^63')
        budget.spend(memory=40 * len(numbers))
        if len(result) + len(numbers) > 10**8:
            raise ValueError(f'{part.strip()} are too many numbers at once; give at most 10^8')
        result.extend(numbers)
    return result


def format_time(seconds: float) -> str:
    """Seconds as e.g. '12s', '3m 05s', '2h 07m' or '4d 11h'."""
    s = round(seconds)
    if s < 60:
        return f'{s}s'
    if s < 3600:
        return f'{s // 60}m {s % 60:02d}s'
    if s < 86400:
        return f'{s // 3600}h {s // 60 % 60:02d}m'
    return f'{s // 86400}d {s // 3600 % 24:02d}h'


def subset(n: int, max_size: int, seed: int):
    """Sorted random choice of `max_size` of 0..n-1 (int64 array): EDM's and EDM2's size limit."""
    import numpy as np  # scripts that need none start in half the time without
    order = np.arange(n, dtype=np.int64)
    if n > max_size:
        np.random.RandomState(seed % (1 << 31)).shuffle(order)
        order = np.sort(order[:max_size])
    return order


def matching_names(folder: str, pattern) -> list[re.Match]:
    """Matches of `pattern` with whole names in a folder; none if there is no such folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [match for name in names if (match := re.fullmatch(pattern, name))]


def first_stranger(folder: str, pattern: str) -> str | None:
    """The first name below a folder, e.g. 'a/b.png', that is no file (or a link), or does not
    match `pattern`; None if there is no such name. Temporary files of `atomic_path` are none.
    """
    pending = ['']
    strangers = []
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + '/')
                elif not entry.is_file(follow_symlinks=False) \
                        or not re.fullmatch(f'{pattern}|(?:.*/)?{_temporary("[^/]+")}', name):
                    strangers.append(name)
    return min(strangers, default=None)


STAY_INSIDE = 'STAY_INSIDE_OF_FOLDERS'  # the variable of commands that follow links if asked alone


def leads_out(path: str, root: str) -> bool:
    """Whether a link in the folder `root` points outside of it, and must not be followed there."""
    if STAY_INSIDE not in os.environ:
        return False
    inside = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(path), inside]) != inside


def refuse_links(root: str, names: list[str]):
    """Raises UserError about the links `names` in the folder `root`, unless there are none."""
    if names:
        count = f'{len(names)} links that lead' if len(names) > 1 else 'a link that leads'
        raise UserError(f'{root} has {count} out of the folder, e.g. {min(names)}; follow links '
                        'if the files there may be used, or copy them into the folder',
                        'follow_links')


def check_links(root: str, names):
    """`refuse_links` for those of the files `names` in a folder that are links out of it."""
    paths = {name: os.path.join(root, name) for name in names}
    refuse_links(root, [name for name, path in paths.items()
                        if os.path.islink(path) and leads_out(path, root)])


def map_ahead(pool, function, items, ahead: int):
    """Values of `function` of the items in order, computed in an executor.

    At most `ahead` are under way beyond the one that is asked for.
    """
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def command_line() -> list[str]:
    """The script that runs, without its folder, and its arguments without secrets of URLs."""
    return [os.path.basename(sys.argv[0]), *(str(hide(text)) for text in sys.argv[1:])]


def need_package(name: str, field: str):
    """Raises UserError where a package is not installed; a folder of its name is none."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f'needs the package {name}: pip install {name}', field)


def project_version() -> str | None:
    """The git commit of this project, '-dirty' if files differ from it; None outside git."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(folder, '.git')):
        return None
    command = ['git', '-C', folder, 'describe', '--always', '--dirty', '--abbrev=12',
               '--exclude=*']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# (rank, world size, local rank, what must also be set) as the launchers name them: torchrun, Open
# MPI, MPICH/Intel MPI, SLURM.
_LAUNCHERS = [
    ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
    ('PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID'),
    # A SLURM allocation sets SLURM_* for plain `python` too: only `srun` starts several tasks of
    # one step.
    ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_STEP_ID'),
]


def process_count() -> int:
    """Processes that a launcher has started together; it sets RANK, WORLD_SIZE and LOCAL_RANK as
    torchrun does.
    """
    for rank, size, local, *needed in _LAUNCHERS:
        if {rank, size, *needed} <= os.environ.keys():
            os.environ.update(RANK=os.environ[rank], WORLD_SIZE=os.environ[size],
                              LOCAL_RANK=os.environ.get(local, os.environ[rank]))
            break
    return int(os.environ.get('WORLD_SIZE', 1))


def core_count() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
