"""Stopping on request: SIGTERM, or SIGINT (Ctrl-C).

What a request comes to depends on the moment: work that must not be cut (a step, a file) looks at
`requested` when it is done; work that can be made again (a picture, a measurement) ends at once,
by `Stopped`. A second request ends the process, whatever it waits for.
"""

import contextlib
import os
import signal
import sys
import threading
import time

from tqdm import tqdm

from dnnlib.util import signal_handler
from torch_utils import distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass on what the terminal has sent to every process already, as it is or as SIGTERM:
# seconds within which the same signal, and the other one, are no second request.
_SAME, _OTHER = 0.3, 2


class Stopped(BaseException):
    """Ends work that can be made again."""


class Stopper(contextlib.ExitStack):
    """In the block, of the main thread, signals are requests to stop.

    notice  printed at the first one, if it is not empty
    """

    current = None

    def __init__(self, notice: str):
        super().__init__()
        self.requested = False
        self._notice = notice
        self._raises = False

    def __enter__(self):
        # The kernel's side of a signal also writes its number here, whatever the main thread does:
        # it may be waiting outside of Python, where no handler runs.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        watcher.start()
        self.callback(watcher.join)
        self.callback(os.close, writer)                        # which ends it
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.callback(signal.set_wakeup_fd, before)
        for number in SIGNALS:
            self.enter_context(signal_handler(number, self._request))
        self.callback(setattr, Stopper, 'current', Stopper.current)
        Stopper.current = self
        return self

    def _request(self, *_):
        first = not self.requested
        self.requested = True
        if first and self._raises:
            self._raises = False
            raise Stopped

    def _watch(self, reader):
        first = None
        while number := os.read(reader, 1):
            if number[0] not in SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = number, now
                if self._notice:
                    name = signal.Signals(number[0]).name
                    tqdm.write(f'{name}: {self._notice}', file=sys.stderr)
            elif now - first[1] > (_SAME if number == first[0] else _OTHER):
                os._exit(128 + number[0])                      # as shells say of a signal
        os.close(reader)

    def call(self, function, *args, together: bool = False):
        """function(*args), which a request ends; then None.

        together  all processes call it: it ends at `stop_point`s, not anywhere
        """
        with contextlib.suppress(Stopped):
            try:
                self._raises = not together or dist.get_world_size() == 1
                if not self._raises or not self.requested:
                    return function(*args)
            finally:
                self._raises = False


def stop_point():
    """Where all processes are in step: raises Stopped on all if one is to stop. For work within
    `Stopper.call`; nothing outside of a Stopper's block.
    """
    if Stopper.current is not None and dist.any_rank(Stopper.current.requested):
        raise Stopped


def turns(items):
    """What each process takes of a sequence, in rounds with a `stop_point` behind each: the items
    of a round go to the processes in order, and to those that are left over None.
    """
    world = dist.get_world_size()
    for place in range(dist.get_rank(), -(-len(items) // world) * world, world):
        yield items[place] if place < len(items) else None
        stop_point()
