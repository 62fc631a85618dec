"""Small models trained side by side, each on one core."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.pool
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm import tqdm

from dnnlib import UserError
from dnnlib.util import core_count, signal_handler


def default_jobs() -> int:
    """One for each core that this process may use, up to 8; one on a GPU."""
    if torch.cuda.is_available():
        return 1
    return min(core_count(), 8)


def sigterm_interrupts():
    """In the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    return signal_handler(signal.SIGTERM, signal.default_int_handler)


def run_side_by_side(function: Callable, items: Iterable, jobs: int) -> Iterator:
    """Calls function(item) for all items, `jobs` at a time, and yields each item when it is done.

    Networks that are too small for threads train faster like this: in processes of one thread.
    `function` and the items must be picklable. With one job, or one item, everything happens in
    this process.

    SIGTERM raises KeyboardInterrupt here and in `function`. When an item fails or this process is
    stopped, the others get SIGTERM, upon which training saves a checkpoint and stops; no item is
    begun any more, and this function returns when all processes have ended. They also end if this
    process is killed. Raises what `function` raised, and UserError if a process was killed.
    """
    items = list(items)
    with sigterm_interrupts():
        if jobs == 1 or len(items) <= 1:
            for item in items:
                function(item)
                yield item
        else:
            yield from _run_in_processes(function, items, jobs)


def _run_in_processes(function, items, jobs):
    # A pipe for each process: a queue has locks, and a process that is stopped may hold one.
    processes = {}                                             # connection: process
    running = {}                                               # connection: item
    waiting = collections.deque(items)

    def begin(connection):
        running[connection] = waiting.popleft()
        connection.send(running[connection])

    try:
        for _ in range(min(jobs, len(items))):
            begin(_start(function, processes))
        while running:
            connection = multiprocessing.connection.wait(list(running))[0]
            _check(connection, processes[connection])
            item = running.pop(connection)
            if waiting:
                begin(connection)
            yield item
    except BaseException:
        for process in processes.values():
            process.terminate()
        raise
    finally:
        for connection, process in processes.items():
            connection.close()                          # ends a process that waits for an item
            process.join()


def _start(function, processes):
    context = multiprocessing.get_context('spawn')
    connection, other = context.Pipe()
    processes[connection] = context.Process(target=_work, args=(function, other))
    # Ctrl-C reaches all processes of a terminal. This one alone takes it, and stops the others.
    with signal_handler(signal.SIGINT, signal.SIG_IGN):
        processes[connection].start()
    other.close()
    return connection


def _check(connection, process):
    """Raises what an item raised; UserError if its process has died."""
    try:
        error = connection.recv()
    except EOFError:
        process.join()
        raise UserError(f'a worker process was killed (exit code {process.exitcode}); is there '
                        'enough memory? The same command goes on from here') from None
    if error is not None:
        raise error


def _work(function, connection):
    """What a process does: item after item, until the other end of the connection is closed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                           # its own would outlive a kill -9
    threading.Thread(target=_follow_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):               # which may come at any moment
        try:
            with contextlib.suppress(EOFError, ConnectionError):
                _work_items(function, connection)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)      # ending, in silence


def _work_items(function, connection):
    """Calls function(item) for what comes, and answers None, or what it raised and that is all."""
    error = None
    while error is None:
        item = connection.recv()
        try:
            function(item)
        except BaseException as raised:
            error = multiprocessing.pool.ExceptionWithTraceback(raised, raised.__traceback__)
        connection.send(error)


def _follow_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
