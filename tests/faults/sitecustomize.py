"""Faults of the disk and of processes, at a chosen one of all operations on files below a folder.

Python imports this at its start from PYTHONPATH; it does nothing unless the environment has FAULT:
JSON with `root` (the folder), `counter` (a file that gets a letter for each operation, from all
processes), and perhaps `kind` and `at`, the number of the operation. Kinds are kill (-9 in the
middle of a write), ENOSPC (from then on) and EIO (once); others only count.
"""

import builtins
import errno
import functools
import io
import json
import os
import signal

# Which functions of `os` are operations, with their letters. w, o and s can find the disk full.
CALLS = {'c': ['mkdir', 'symlink', 'link'], 'm': ['replace', 'rename', 'unlink', 'remove', 'rmdir'],
         's': ['fsync', 'fdatasync']}
SIZES = ['posix_fallocate', 'ftruncate', 'sendfile', 'copy_file_range', 'write', 'pwrite', 'writev']
FAIL = {'ENOSPC': 'woc', 'EIO': 'wocs'}


class Faults:
    def __init__(self, root, counter, kind=None, at=None):
        self.root = os.path.realpath(root) + os.sep
        self.kind = kind
        self.at = at
        self.fired = False
        # Appended to: the position after it tells each operation of all processes its number.
        self.counter = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.append = os.write

    def concerns(self, path) -> bool:
        if isinstance(path, int):
            try:
                path = os.readlink(f'/proc/self/fd/{path}')
            except OSError:
                return False
            if not path.startswith('/'):                       # a pipe
                return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.root)

    def operation(self, letter: str, name=None, half=None):
        """Counts one; at the chosen one the fault happens. `half` does half of a write."""
        self.append(self.counter, letter.encode())
        if self.at is None or os.lseek(self.counter, 0, os.SEEK_CUR) <= self.at:
            return
        if self.kind == 'kill':
            self.once('K', half)
            os.kill(os.getpid(), signal.SIGKILL)
        elif letter in FAIL.get(self.kind, '') and not (self.kind == 'EIO' and self.fired):
            self.once('F', half)
            number = getattr(errno, self.kind)
            names = [] if name is None or isinstance(name, int) else [os.fsdecode(name)]
            raise OSError(number, os.strerror(number), *names)

    def once(self, letter, half):
        if not self.fired:
            self.fired = True
            self.append(self.counter, letter.encode())
            if half:
                half()


class File(io.FileIO):
    """A file whose writes are operations; Python's buffers and text are put on top of it."""

    faults = None

    def write(self, data):
        data = memoryview(data).cast('B')
        self.faults.operation('w', half=lambda: super(File, self).write(data[:len(data) // 2]))
        return super().write(data)

    def truncate(self, size=None):
        self.faults.operation('w')
        return super().truncate(size)


def opening(faults, original):
    """`open` that makes `File`s of what is written below the folder."""
    def open(file, mode='r', buffering=-1, encoding=None, errors=None, newline=None, closefd=True,
             opener=None):
        if isinstance(file, int) or not set(mode) & set('wax+') or not faults.concerns(file):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        faults.operation('o', file)
        raw = File(file, mode.replace('b', '').replace('t', ''), closefd, opener)
        if buffering == 0:
            return raw
        wrap = io.BufferedRandom if '+' in mode else io.BufferedWriter
        buffered = wrap(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        if 'b' in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        text.mode = mode
        return text

    return open


def counted(faults, letter, original):
    place = original.__name__ == 'copy_file_range'             # from the first to the second

    @functools.wraps(original)
    def call(*args, **kwargs):
        if faults.concerns(args[place]):
            faults.operation(letter, args[place])
        return original(*args, **kwargs)

    return call


def opened(faults, original):
    @functools.wraps(original)
    def call(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and faults.concerns(path):
            faults.operation('o', path)
        return original(path, flags, *args, **kwargs)

    return call


def install(**settings):
    faults = File.faults = Faults(**settings)
    builtins.open = io.open = opening(faults, io.open)
    os.open = opened(faults, os.open)
    for letter, names in {**CALLS, 'w': SIZES}.items():
        for name in names:
            setattr(os, name, counted(faults, letter, getattr(os, name)))


if 'FAULT' in os.environ:
    install(**json.loads(os.environ['FAULT']))
