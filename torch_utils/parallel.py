"""Small models trained side by side, each on one core."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch

from dnnlib.util import core_count


def default_jobs() -> int:
    """One for each core that this process may use, up to 8; one on a GPU."""
    if torch.cuda.is_available():
        return 1
    return min(core_count(), 8)


def run_side_by_side(function: Callable, items: Iterable, jobs: int) -> Iterator:
    """Calls function(item) for all items, `jobs` at a time, and yields each item when it is done.

    Networks that are too small for threads train faster like this: in processes of one thread. `function` and the items must
    be picklable. With one job, or one item, everything happens in this process.

    SIGTERM raises KeyboardInterrupt here. However this process ends, the others get SIGTERM, upon which training saves a
    checkpoint and stops.
    """
    items = list(items)
    if jobs == 1 or len(items) <= 1:
        for item in items:
            function(item)
            yield item
        return
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(items)), multiprocessing.get_context('spawn'), _start)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        running = {pool.submit(function, item): item for item in items}
        for future in concurrent.futures.as_completed(running):
            future.result()
            yield running[future]
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(wait=True, cancel_futures=True)


def _start():
    torch.set_num_threads(1)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
