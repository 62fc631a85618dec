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
import os
import time

ITEMS = 3_000_000           # parts; the largest published networks have a tenth of them
MEMORY, FACTOR = 256 << 20, 20
SECONDS, SPEED = 5, 20e6    # of the processor, and bytes of the file that take another one
_BETWEEN = 4096             # items from one look at the clock to the next


class TooMuch(ValueError):
    """A file that asks for more than its budget."""


class Budget:
    """What is left for a file of so many bytes."""

    def __init__(self, size: int):
        self.items = ITEMS + size // 16
        self.memory = MEMORY + FACTOR * size
        self.end = time.thread_time() + SECONDS + size / SPEED
        self._unseen = 0

    def spend(self, items: int = 1, memory: int = 0):
        """Draws parts and bytes. Raises TooMuch where there are none left, or no time."""
        self.items -= items
        self.memory -= memory
        if self.items < 0:
            raise TooMuch('it has too many parts')
        if self.memory < 0:
            raise TooMuch('it would take far more memory than it has bytes')
        self._unseen += items
        if self._unseen >= _BETWEEN:
            self._unseen = 0
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
