"""Trainings side by side on the cores of one machine."""

import concurrent.futures
import multiprocessing
import os

import torch


def default_jobs() -> int:
    """One for each core that the process may use, up to 8; one on a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return 1 if torch.cuda.is_available() else min(cores, 8)


def run_jobs(function, tasks: list, jobs: int):
    """Yields each task when function(task) has returned, `jobs` at a time, each in a process with one thread.

    Small networks train faster side by side than with several threads.
    """
    if jobs == 1 or len(tasks) <= 1:
        for task in tasks:
            function(task)
            yield task
        return
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context('spawn'),
                                                  torch.set_num_threads, (1,))
    try:
        running = {pool.submit(function, task): task for task in tasks}
        for future in concurrent.futures.as_completed(running):
            future.result()
            yield running[future]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
