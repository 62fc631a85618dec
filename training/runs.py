"""Folders of runs: numbered like 00000-name, found again by options, used by one run at a time."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import time

from dnnlib import UserError, budget
from dnnlib.util import (
    cannot_write,
    command_line,
    finite,
    matching_names,
    publishable,
    without,
    write_json,
)
from torch_utils.distributed import environment, get_rank
from training.checkpoint import Checkpoints
from training.snapshot import list_snapshots

RECORD = 'training_options.json'
MEASURED = 'metrics.jsonl'


@contextlib.contextmanager
def locked(run_dir: str, doing: str = 'training'):
    """Keeps other processes from training in an existing folder, until this one dies.

    Raises UserError if another process has it. File systems without locks are let pass.
    """
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{run_dir}: another process is {doing} there; '
                            'wait for it, or choose another folder') from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def claimed(folder: str, doing: str):
    """`locked` by the first of the processes, which makes the folder."""
    if get_rank() != 0:
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    with locked(folder, doing):
        yield


# --- What a run says of itself ------------------------------------------------------------------


def read_options(run_dir: str) -> dict:
    """`training_options.json` of a run, {} if none has begun there. Raises UserError if it is
    damaged.
    """
    path = os.path.join(run_dir, RECORD)
    if not os.path.isfile(path):
        return {}
    try:
        return finite(dict(budget.read_json(path)))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); '
                        f'is {run_dir} the folder of a run?') from None


def option_of(layout: type[Checkpoints], run_dir: str, name: str, new, old):
    """The value of an option that was not given: that of the run in a folder with checkpoints of
    this layout, `old` if its record is of a version that had no such option; `new` for a new run,
    and for one of another program.
    """
    record = read_options(run_dir) if layout(run_dir).numbers() else {}
    return record.get(name, old) if record else new


def channels_of(run_dir: str) -> int | None:
    """3 for a run that began with as many, also on gray pictures: earlier versions always did.
    None for others, and for a new run: as many as its data have.
    """
    network = read_options(run_dir).get('network')
    if not isinstance(network, dict):
        return None
    return 3 if network.get('network', network).get('img_channels', 3) == 3 else None


def private_paths(options: dict | None) -> dict[str, str]:
    """The options that are paths of this machine: all files but log.txt have their last names."""
    return {name: os.path.abspath(value) for name, value in (options or {}).items()
            if isinstance(value, str) and publishable(value) != value and os.path.exists(value)}


def path_of(run_dir: str, name: str) -> str | None:
    """The path that is an option of a run: that of its record, or of its log.txt where the record
    has but a name; None if there is none."""
    path = read_options(run_dir).get(name)
    if path and not os.path.exists(path):
        with contextlib.suppress(OSError), open(os.path.join(run_dir, 'log.txt')) as file:
            lines = [line.partition(f'Path of {name}: ') for line in file]
            path = next((rest.strip() for _, found, rest in lines[::-1] if found), path)
    return path


def add_start(run_dir: str, settings: dict, **start):
    """Writes `training_options.json`: the settings, and a list of all starts of the run.

    start  what else is to be remembered of this one: first nimg, changes, ...
    """
    starts = read_options(run_dir).get('starts', [])
    starts.append(environment() | {'command': command_line(), **start})
    write_json(os.path.join(run_dir, RECORD), settings | {'starts': starts})


def wandb_id(run_dir: str) -> str:
    """Id of a run at Weights & Biases: that of its earlier starts, else a new one."""
    starts = read_options(run_dir).get('starts', [])
    ids = [start['wandb'] for start in starts if 'wandb' in start]
    if not ids and any('--wandb' in str(start.get('command')) for start in starts):
        # Of an earlier version.
        ids = [hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:16]]
    return ids[-1] if ids else secrets.token_hex(8)


def wait_for_later_events(run_dir: str):
    """Waits until a new file of TensorBoard events has a name that sorts behind those in the
    folder.

    TensorBoard reads the files in the order of their names, which begin with the second in which
    they were opened; within a second the number of the process decides.
    """
    matches = matching_names(run_dir, r'events\.out\.tfevents\.(\d+)\..*')
    newest = max((int(match[1]) for match in matches), default=0)
    # Not for ever, if the clock of another machine was ahead.
    time.sleep(min(max(newest + 1 - time.time(), 0), 10))


# --- Finding runs -------------------------------------------------------------------------------


def has_loss_curve(run_dir: str) -> bool:
    """Whether loss.png shows all that stats.jsonl says."""
    stats, curve = (os.path.join(run_dir, name) for name in ('stats.jsonl', 'loss.png'))
    return not os.path.exists(stats) or os.path.isfile(curve) and (
        os.stat(curve).st_mtime_ns >= os.stat(stats).st_mtime_ns)


def _kimg_of_rows(run_dir: str, name: str) -> list[int]:
    """That of the last row of a file, [] if it has none."""
    with contextlib.suppress(OSError, TypeError, LookupError):
        rows = [row['nimg'] for _, row in budget.json_lines(os.path.join(run_dir, name))]
        return [rows[-1] // 1000]
    return []


def is_finished(run_dir: str, total_kimg: int, snapshots: bool, checkpoints: bool,
                measured: bool = False) -> bool:
    """Whether the folder has all that the last step of a run of `total_kimg` kimg writes."""
    found = []                                                 # kimg of each kind of file
    if checkpoints:
        found.append(Checkpoints(run_dir).numbers())
    if snapshots:
        found.append([file.kimg for file in list_snapshots(run_dir)])
    # Without a checkpoint a grid could not be made any more, and not all latents can be decoded.
    if checkpoints and snapshots and read_options(run_dir).get('encoder') == {'name': 'rgb'}:
        found.append([int(match[1])
                      for match in matching_names(run_dir, r'samples-(\d{7,})\.png')])
    if measured:
        found.append(_kimg_of_rows(run_dir, MEASURED))
    if not found:
        found = [_kimg_of_rows(run_dir, 'stats.jsonl')]
    if snapshots and not has_loss_curve(run_dir):
        return False
    return bool(found) and all(max(kimgs, default=-1) >= total_kimg for kimgs in found)


def _agrees(earlier, value) -> bool:
    """Whether an option is as it was; one with parts, in each that it has."""
    if isinstance(earlier, dict) and isinstance(value, dict):
        return all(_agrees(earlier.get(key), part) for key, part in value.items())
    return earlier == value


def choose_folder(outdir: str, name: str, options: dict, *goal) -> str:
    """The newest run in `outdir` called `name` (after its number) that nobody trains at present,
    that has these `options` (of what has parts, those that are given) or has not begun, and is
    not finished (`goal`: arguments of `is_finished`); else the folder of a new one, with one
    number after the last. `data` may have moved, if its fingerprint is among the options, as part
    of `dataset`.
    """
    found = sorted((int(match[1]), match[2], match[0])
                   for match in matching_names(outdir, r'(\d{5,})-(.*)'))
    for _, other, folder in reversed(found):
        path = os.path.join(outdir, folder)
        if other == name and not is_finished(path, *goal):
            earlier = read_options(path)
            begun = earlier or any(name != 'log.txt' and not name.startswith('.')
                                   for name in os.listdir(path))
            if 'fingerprint' in earlier.get('dataset', {}):
                wanted = publishable(without(options, ['data']))
            else:                                              # of an earlier version: with paths
                wanted = without(options, ['dataset'])
            if not begun or _agrees(earlier, finite(wanted)):
                with contextlib.suppress(UserError), locked(path):
                    return path
    number = found[-1][0] + 1 if found else 0
    return os.path.join(outdir, f'{number:05d}-{name}')
