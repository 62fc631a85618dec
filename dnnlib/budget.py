"""What reading a file of somebody else may cost: one budget, from which every reader draws.

A kilobyte can ask for the memory and the hours of a year: lists that hold each other twice, zeros
that are compressed a thousandfold, one array under a hundred thousand names. So what is *built* is
counted, not what is read, and where the budget ends, so does the reading:

    with budget.reading(path):
        budget.spend(items=len(names), memory=array.nbytes)

What follows from the size of the file is enough for honest ones: 20 times its bytes and 256 MiB.
"""

import contextlib
import contextvars
import errno
import json
import os
import time

ITEMS = 3_000_000           # parts; the largest published networks have a tenth of them
MEMORY, FACTOR = 256 << 20, 20
SECONDS, SPEED = 5, 20e6    # of the processor, and bytes of the file that take another one
MAX_PIXELS = 178_956_970    # of a picture, as Pillow decodes
PIXELS_VARIABLE = 'PIXELS_OF_A_PICTURE'     # of --max-pixels, also for child processes


class TooMuch(ValueError):
    """A file that asks for more than its budget."""


def max_pixels() -> int | None:
    """How many pixels a picture may have, if the user says so."""
    return int(os.environ[PIXELS_VARIABLE]) if PIXELS_VARIABLE in os.environ else None


class Budget:
    """What is left for a file of so many bytes."""

    def __init__(self, size: int):
        self.items = ITEMS + size // 16
        self.memory = MEMORY + FACTOR * size + 8 * (max_pixels() or 0)  # RGBA, twice
        self.end = time.thread_time() + SECONDS + size / SPEED

    def spend(self, items: int = 1, memory: int = 0):
        """Draws parts and bytes. Raises TooMuch where there are none left, or no time."""
        if min(items, memory) < 0:
            raise TooMuch('it has a negative length')
        self.items -= items
        self.memory -= memory
        if self.items < 0:
            raise TooMuch('it has too many parts')
        if self.memory < 0:
            raise TooMuch('it would take far more memory than it has bytes')
        if time.thread_time() > self.end:
            raise TooMuch('it takes too long to read')


_current = contextvars.ContextVar('budget', default=None)


@contextlib.contextmanager
def reading(path: str):
    """In the block, `spend` draws from a budget for the file at `path`."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    token = _current.set(Budget(size))
    try:
        yield
    finally:
        _current.reset(token)


def current(size: int) -> Budget:
    """The budget of the file that is being read, else one for `size` bytes."""
    return _current.get() or Budget(size)


def spend(items: int = 1, memory: int = 0):
    """Draws from the budget of the file that is being read, if there is one."""
    budget = _current.get()
    if budget is not None:
        budget.spend(items, memory)


# --- JSON ----------------------------------------------------------------------------------------

# Bytes in memory for each of these in the text, at most: a value, a list, a table.
_JSON = {b',': 40, b'[': 100, b'{': 250}


def parse_json(data: bytes):
    """The value of a text. Raises ValueError where it is no JSON, too deep or too large for its
    file.
    """
    parts = {sign: data.count(sign) for sign in _JSON} if len(data) > 1 << 16 else {}
    text = len(data) * (2 if data.isascii() else 8)         # all of it, and again in parts
    current(len(data)).spend(
        memory=text + sum(_JSON[sign] * count for sign, count in parts.items()))
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None


def read_json(path: str, most: int = 256 << 20):
    """The value in a regular file of at most so many bytes. Raises OSError, else ValueError as
    `parse_json`.
    """
    with _regular(path) as file, reading(path):
        data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f'it has more than {most} bytes')
        return parse_json(data)


def json_lines(path: str):
    """(line, its dictionary) of a regular file with one on each line; what is none is left out,
    such as half a line.
    """
    with _regular(path) as file:
        for line in iter(lambda: file.readline(1 << 20), b''):
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict):
                    yield line, row


def _regular(path: str):
    if os.path.exists(path) and not os.path.isfile(path):   # a device or a pipe may have no end
        raise OSError(errno.EINVAL, 'it is no regular file', path)
    return open(path, 'rb')
