"""Timing of two ways to do the same thing, in turn, in one process."""

import statistics
import time

import torch


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(candidates: dict, rounds: int = 5, warmup: int = 1) -> dict:
    """Median seconds of each callable, `{name: seconds}`: all once a round, so that drift of the machine hits all alike."""
    for function in candidates.values():
        for _ in range(warmup):
            function()
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_rates(title: str, seconds: dict, images: int, memory: dict | None = None):
    """A table of images/s and of the ratio to the first row."""
    print(title)
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        used = f'  {memory[name]:6.2f} GiB peak' if memory else ''
        print(f'  {name:<24} {images / value:10.1f} images/s  {first / value:5.2f} x{used}')
