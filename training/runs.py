"""Folders of runs: numbered like 00000-name, found again by the options of the run, and used by one run at a time."""

import contextlib
import fcntl
import glob
import json
import os
import re

from dnnlib import UserError
from training import checkpoint


@contextlib.contextmanager
def locked(run_dir: str, doing: str = 'training'):
    """Keeps other processes from training in an existing folder; the system drops the lock when a process dies.

    Raises UserError if another process has it. File systems without locks are let pass.
    """
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{run_dir}: another process is {doing} there; wait for it, or choose another folder') from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _in_use(run_dir: str) -> bool:
    try:
        with locked(run_dir):
            return False
    except UserError:
        return True


def read_options(run_dir: str) -> dict:
    """`training_options.json` of a run. Raises UserError if there is none or it is damaged."""
    path = os.path.join(run_dir, 'training_options.json')
    try:
        with open(path) as f:
            options = json.load(f)
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); is {run_dir} the folder of a run?') from None
    if not isinstance(options, dict):
        raise UserError(f'{path} holds no options')
    return options


def is_finished(run_dir: str, total_kimg: int, snapshots: bool, checkpoints: bool) -> bool:
    """True if the folder has everything that the last step of a run of `total_kimg` thousand images writes."""
    if checkpoints and checkpoint.newest_kimg(run_dir) < total_kimg:
        return False
    found = [int(match[1]) for path in glob.glob(glob.escape(run_dir) + '/network-snapshot-*.pkl')
             if (match := re.search(r'network-snapshot-(\d+)', os.path.basename(path)))]
    if snapshots and max(found, default=-1) < total_kimg:
        return False
    try:
        with open(os.path.join(run_dir, 'stats.jsonl')) as f:
            return json.loads(f.readlines()[-1])['nimg'] >= total_kimg * 1000
    except (OSError, ValueError, LookupError):
        return False


def numbered_runs(outdir: str) -> list[tuple[int, str]]:
    """(number, folder name) of the runs in `outdir`, the newest last."""
    names = os.listdir(outdir) if os.path.isdir(outdir) else []
    return sorted((int(match[1]), name) for name in names if (match := re.match(r'(\d{5,})-', name)))


def find_unfinished(outdir: str, name: str, same, finished) -> str | None:
    """The newest run in `outdir` called `name` (after its number) that nobody trains at present, with
    `same(options)` of its training_options.json and not `finished(folder)`; None if there is none.
    """
    for number, folder in reversed(numbered_runs(outdir)):
        path = os.path.join(outdir, folder)
        if folder != f'{number:05d}-{name}' or not os.path.isfile(os.path.join(path, 'training_options.json')):
            continue
        if same(read_options(path)) and not finished(path) and not _in_use(path):
            return path
    return None


def next_folder(outdir: str, name: str) -> str:
    """The folder of a new run: one number after the last."""
    number = max((number for number, _ in numbered_runs(outdir)), default=-1) + 1
    return os.path.join(outdir, f'{number:05d}-{name}')
