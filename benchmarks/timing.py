"""Timing of several ways to do the same thing, in turn, in one process."""

import ctypes
import os
import resource
import statistics
import sys
import threading
import time

import psutil


def synchronize():
    """Waits for the GPU, if torch is in use: programs that do without are measured without."""
    if 'torch' in sys.modules and (cuda := sys.modules['torch'].cuda).is_available():
        cuda.synchronize()


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended: what a loaded machine disturbs least."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


CLOCKS = {'wall': time.perf_counter, 'cpu': cpu_seconds}


def usual_memory():
    """glibc as it is after some steps without `torch_utils.memory.keep_freed`: blocks of more than 32 MiB, and more than
    64 MiB at the end of the memory, go back to the system when they are freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-3, 1 << 25)
        libc.mallopt(-1, 1 << 26)
        libc.malloc_trim(0)


def compare(candidates: dict, rounds: int = 5, warmup: int = 1, clock=time.perf_counter, prepare=None) -> dict:
    """Median seconds of each callable, `{name: seconds}`: all once a round, so that drift of the machine hits all alike.

    clock: one of CLOCKS. Where others use the machine, `cpu` with one thread tells more. `prepare(name)` and a call that
    does not count go before each one that does.
    """
    for function in candidates.values():
        for _ in range(warmup):
            function()
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            if prepare:
                prepare(name)
                function()
            os.sync()  # what another one has written is not to be written to the disk at this one's cost
            synchronize()
            start = clock()
            function()
            synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory:
    """GiB above the start, at the peak of a `with` block: of the GPU, or of this process and its children.

    Of a child counts what it does not share with others.
    """

    def __init__(self, device='cpu'):
        self.cuda = str(device).startswith('cuda') and sys.modules['torch'].cuda

    def _used(self):
        total = self.process.memory_info().rss
        for child in self.process.children(recursive=True):
            try:
                total += child.memory_full_info().uss
            except psutil.Error:
                pass  # it has ended
        return total

    def _watch(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self._used())

    def __enter__(self):
        if self.cuda:
            self.cuda.synchronize()
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated()
            return self
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.peak = self._used()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        if self.cuda:
            self.cuda.synchronize()
            self.peak = self.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.thread.join()
        self.gib = (self.peak - self.before) / 2**30


def print_rates(title: str, seconds: dict, images: int, memory: dict | None = None):
    """A table of images/s and of the ratio to the first row."""
    print(title)
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        used = f'  {memory[name]:6.2f} GiB peak' if memory else ''
        print(f'  {name:<24} {images / value:10.1f} images/s  {first / value:5.2f} x{used}')
