"""Kills, stops and starves every script that writes, and checks that nothing is lost.

A child is forked from this process, which has imported what the scripts need, so a fault takes
about as long as the command itself. After each fault:

- the command, and all that it started, has ended soon; of an error it said one line;
- the same command again ends with the content of an undisturbed run;
- nothing else is left in the folder.
"""

import atexit
import collections
import contextlib
import fnmatch
import gc
import glob
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
os.environ |= dict(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='',
                   HF_HUB_OFFLINE='1', MPLBACKEND='Agg', PYTHONPATH=f'{HERE}')
os.environ.pop('FAULT', None)
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import click

sys.modules.pop('sitecustomize', None)                         # the system may have one
import sitecustomize
import tiny
import torch
from cases import CASES, INPUTS, Case

from dnnlib.util import write_json

KINDS = ('kill', 'ENOSPC', 'EIO', 'limit', 'TERM', 'INT', 'rank')
LIMIT_S = 240                                                  # of a child
SOON_S = 10                                                    # from a signal to the end of all
LETTERS = sitecustomize.FAIL | {'kill': 'woscm'}
# Of the values in JSON and checkpoints: of the time and the machine.
VARYING = ('starts', 'timestamp', 'train_seconds', 'Timing/', 'Resources/', 'seconds', 'time')
# Times and machines in names.
TIMES = r'(?<=events\.out\.tfevents\.).*|(?<=-)\d{8}-\d{6}-\d{6}'
LOGS = ('log.txt', '.tfevents.')
STOPPED = 'the same command goes on'
OF_DISK = ('ENOSPC', 'EIO', 'limit')
NAMED = r'Error: ((c|out) |.*(--\w|[\w/-]+\.\w+|\bout/|\bw/))'       # an option, a file or a folder


def preload():
    """Imports what scripts import, so that children need not."""
    for name in ('matplotlib.pyplot', 'pandas', 'scipy.linalg', 'sklearn.datasets', 'diffusers',
                 'sklearn.cluster', 'torch.utils.tensorboard', 'torch.distributed.run', 'absl.flags',
                 'safetensors.torch'):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for folder in ('dnnlib', 'torch_utils', 'torch_utils/files', 'metrics', 'training',
                   'training/data', 'training/networks', 'training/diffusion'):
        for path in sorted(ROOT.glob(f'{folder}/[!_]*.py')):
            importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))
    gc.freeze()
    assert len(os.listdir('/proc/self/task')) == 1, 'threads would be lost in a child'


# --- A child --------------------------------------------------------------------------------------


def become(case, folder: Path, inputs: Path, fault: dict):
    """Turns this forked process into that of the command, in a session of its own."""
    os.setsid()
    os.chdir(folder)
    for number, name in (1, 'stdout'), (2, 'stderr'):
        os.dup2(os.open(f'{folder}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ['FAULT'] = json.dumps(fault)
    script, *rest = case.arguments(inputs)
    if fault.get('kind') == 'limit':
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault['at'],) * 2)
        fault = fault | {'at': None}
        os.environ['FAULT'] = json.dumps(fault)
    sitecustomize.install(**fault)
    code = 1
    try:
        if case.processes > 1:
            sys.argv = ['torchrun', '--standalone', f'--nproc_per_node={case.processes}',
                        '--max-restarts=1', str(ROOT / script), *rest]
            runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)
        else:
            sys.argv = [str(ROOT / script), *rest]
            sys.path[0] = str((ROOT / script).parent)
            runpy.run_path(sys.argv[0], run_name='__main__')
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def session(sid: int, counter: str) -> list[int]:
    """The living processes of a session, and of torchrun's, which have sessions of their own."""
    alive = []
    for path in glob.glob('/proc/[0-9]*'):
        with contextlib.suppress(OSError, ValueError):
            state, _, _, number = Path(path, 'stat').read_text().rpartition(')')[2].split()[:4]
            ours = int(number) == sid or f'"{counter}"'.encode() in Path(path, 'environ').read_bytes()
            if ours and state != 'Z':
                alive.append(int(path.split('/')[2]))
    return alive


def run(case, folder: Path, inputs: Path, fault: dict | None = None, send=None) -> dict:
    """Runs a command in a folder to its end. `send` is (signal, seconds after the start).

    Returns status, seconds, seconds from the signal to the end of all processes, the processes
    that were left, letters of the operations, and what the command said.
    """
    counter = f'{folder}.operations'
    Path(counter).unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        become(case, folder, inputs, dict(root=str(folder), counter=counter) | (fault or {}))
    start = time.monotonic()
    status = sent = None
    while status is None:
        done, code = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif now > start + LIMIT_S:
            os.kill(pid, signal.SIGKILL)
        elif send and sent is None and now > start + send[1] and pid in session(pid, counter):
            sent = now
            deliver(send[0], pid, session(pid, counter))
        else:
            time.sleep(0.01)
    ended = time.monotonic()
    while (left := session(pid, counter)) and time.monotonic() < ended + SOON_S:
        time.sleep(0.05)
    took = time.monotonic() - (ended if case.processes > 1 else sent or ended)
    for other in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    out, err = (Path(f'{folder}.{name}').read_text(errors='replace') for name in ('stdout', 'stderr'))
    operations = Path(counter).read_text() if os.path.exists(counter) else ''
    return dict(status=status, seconds=ended - start, soon=took, left=left, sent=sent is not None,
                operations=operations, out=out, err=err)


def deliver(name: str, pid: int, family: list[int]):
    """Ctrl-C goes to all processes of a terminal, SIGTERM to one; `rank` kills one of torchrun's."""
    with contextlib.suppress(ProcessLookupError):
        if name == 'INT':
            os.killpg(pid, signal.SIGINT)
        elif name == 'TERM':
            os.kill(pid, signal.SIGTERM)
        elif ranks := [other for other in family if other != pid]:
            os.kill(random.choice(ranks), signal.SIGKILL)


# --- What is in a folder --------------------------------------------------------------------------


def plain(value):
    """A value without what varies from run to run: tensors by their bytes, numbers to 9 digits."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()
                if not str(key).startswith(VARYING)}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return float(f'{value:.9g}') if isinstance(value, float) else value


def digest(path: Path):
    if path.suffix == '.pt':
        return plain(torch.load(path, weights_only=True))
    if path.suffix in ('.json', '.jsonl'):
        lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
        return [plain(json.loads(line)) for line in lines]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(folder: Path) -> dict:
    """{name: what is in the file}; of logs only that they are there."""
    paths = [path for path in sorted(folder.rglob('*')) if not path.is_dir()]
    found = {}
    for path in paths:
        name = re.sub(TIMES, '', str(path.relative_to(folder)))
        found[name] = None if name.endswith(LOGS) else digest(path)
    return found


def differences(case, expected: dict, found: dict) -> tuple[list, list]:
    """Names of what is lost or other than in an undisturbed run, and of what is left over."""
    # A run that was stopped may have an earlier checkpoint of other images of the same thousand.
    newest = {name.partition('training-state-')[0]: name for name in sorted(expected)
              if 'training-state-' in name}
    lost = [name for name, value in expected.items() if name not in found or (
        found[name] != value and name == newest.get(name.partition('training-state-')[0], name))]
    if any('teacher-state-' in name for name in found):        # the newest of them stays
        lost = [name for name in lost if 'teacher-state-' not in name]
    more = [name for name in found if name not in expected
            and not any(fnmatch.fnmatch(name, pattern) for pattern in case.more)]
    return lost, more


# --- Faults ---------------------------------------------------------------------------------------


class Harness:
    def __init__(self, work: Path, seed: int):
        self.work = work
        self.inputs = work / 'in'
        self.inputs.mkdir()
        self.random = random.Random(seed)
        self.undisturbed = {}
        self.results = []

    def folder(self, case) -> Path:
        folder = self.work / 'run' / 'w'                       # one place, since files name it
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in case.copied:
            shutil.copytree(self.inputs / name, folder / name)
        return folder

    def need(self, command: str, copied=()):
        """Makes the inputs that a command names."""
        for name in (*copied, *re.findall(r'{in}/([^/ ]+)', command)):
            if (self.inputs / name).exists():
                continue
            if name == 'vae':
                tiny.save_tiny_vae(self.inputs / name)
                continue
            self.need(INPUTS[name])
            result = run(Case(INPUTS[name]), self.inputs, self.inputs)
            if result['status']:
                raise SystemExit(f'{INPUTS[name]}\n{result["out"]}{result["err"]}')

    def expect(self, name: str) -> dict:
        """The undisturbed run of a case."""
        if name not in self.undisturbed:
            case = CASES[name]
            self.need(case.command, case.copied)
            folder = self.folder(case)
            result = run(case, folder, self.inputs)
            if result['status']:
                raise SystemExit(f'{name}: {case.arguments(self.inputs)}\n{result["out"]}{result["err"]}')
            sizes = [path.stat().st_size for path in folder.rglob('*') if path.is_file()]
            self.undisturbed[name] = result | dict(content=content(folder), sizes=sizes)
        return self.undisturbed[name]

    def draw(self, expected: dict, kind: str) -> dict:
        """Arguments of `run` for a fault."""
        if kind in ('TERM', 'INT', 'rank'):
            return dict(send=(kind, self.random.uniform(0.02, expected['seconds'])))
        if kind == 'limit':
            return dict(fault=dict(kind=kind, at=self.random.randrange(max(expected['sizes']))))
        places = [i for i, letter in enumerate(expected['operations']) if letter in LETTERS[kind]]
        return dict(fault=dict(kind=kind, at=self.random.choice(places)))

    def one(self, name: str, kind: str) -> dict | None:
        """One fault; None if it came too late to be one."""
        case = CASES[name]
        expected = self.expect(name)
        folder = self.folder(case)
        arguments = self.draw(expected, kind)
        first = run(case, folder, self.inputs, **arguments)
        stopped = first['status'] or STOPPED in first['out']
        fired = first['sent'] and (stopped or kind == 'rank') or set(first['operations']) & set('KF') or (
            kind == 'limit' and first['status'])
        if not fired:
            return None
        problems = self.judge(case, kind, first)
        lost, more = differences(case, expected['content'], content(folder)) \
            if kind not in ('kill', 'TERM', 'INT') or not first['status'] else (['?'], [])
        if not stopped and lost:
            problems['lying'] = lost[:9]                       # all well, it said
        # What has come to its end, since torchrun started it again, needs no second run.
        again = run(case, folder, self.inputs) if stopped or kind != 'rank' else first
        lost, more = differences(case, expected['content'], content(folder))
        if lost:
            problems['lost'] = lost[:9]
        if more:
            problems['leftover'] = more[:9]
        if again['status'] and lost or 'Traceback' in again['err']:
            problems['again'] = again['err'][-1500:]
        if problems:
            folder = folder.parent.rename(self.work / f'problem-{len(self.results)}') / 'w'
        at = arguments['fault']['at'] if 'fault' in arguments else arguments['send'][1]
        return dict(script=name, fault=kind, at=at, status=first['status'], problems=problems,
                    said=first['err'][-9000:] if problems else '', folder=str(folder))

    def judge(self, case, kind: str, result: dict) -> dict:
        """What is wrong with how a command ended."""
        problems = {}
        if result['left'] or result['soon'] > SOON_S or result['seconds'] > LIMIT_S:
            problems['slow'] = [result['soon'], result['seconds'], result['left']]
        lines = [line for line in result['err'].splitlines()   # but for bars of progress
                 if line.strip() and '%|' not in line]
        if case.processes > 1:                                 # what torchrun says is not ours
            lines = [line for line in lines if 'Error: ' in line and 'torch' not in line] or lines[:1]
        allowed = {'kill': (0, 1), 'rank': (0, 1, 2)}.get(kind, (1,) if result['status'] > 0 else (0,))
        if kind in ('TERM', 'INT') and result['status'] <= 0:
            allowed = (0, 1)                                   # what stops later says so
        if kind == 'kill' and result['status'] == -9:
            return problems
        if 'Traceback' in result['err'] or len(lines) not in allowed:
            problems['lines'] = len(lines)
        if kind in OF_DISK and result['status'] > 0 and not re.search(NAMED, ''.join(lines)):
            problems['unnamed'] = lines
        return problems


def table(results: list) -> str:
    """Faults of each script and kind: how many, and after a slash those with a problem."""
    cells = collections.defaultdict(lambda: [0, 0])
    for row in results:
        for place in ((row['script'], row['fault']), (row['script'], 'all'), ('all', row['fault']),
                      ('all', 'all')):
            cells[place][0] += 1
            cells[place][1] += bool(row['problems'])
    kinds = [kind for kind in KINDS if cells['all', kind][0]] + ['all']
    lines = [f'{"":24}' + ''.join(f'{kind:>9}' for kind in kinds)]
    for script in [*dict.fromkeys(row['script'] for row in results), 'all']:
        shown = []
        for kind in kinds:
            runs, bad = cells[script, kind]
            shown.append(f'{runs or "":>6}' + (f'/{bad:<2}' if bad else '   '))
        lines.append(f'{script:24}' + ''.join(shown))
    problems = collections.Counter(key for row in results for key in row['problems'])
    lines.append(', '.join(f'{key}: {count}' for key, count in problems.items()) or 'no problems')
    return '\n'.join(lines)


@click.command(context_settings=dict(show_default=True, max_content_width=100))
@click.option('--rounds', type=click.IntRange(1), default=1, help='Faults of each script and kind')
@click.option('--script', 'scripts', multiple=True, type=click.Choice(list(CASES)),
              help='Only this one  [default: all]', metavar='NAME')
@click.option('--fault', 'kinds', multiple=True, type=click.Choice(KINDS),
              help='Only this one  [default: all]')
@click.option('--seed', default=0, help='Of the places of the faults')
@click.option('--dest', default='faults.json', metavar='JSON', help='Where the results go')
def main(rounds, scripts, kinds, seed, dest):
    """Kill, stop and starve the scripts, and check that the same command makes up for it.

    Folders with a problem are kept. Exit status 1 if there is any.
    """
    dest = os.path.abspath(dest)
    work = Path(tempfile.mkdtemp(prefix='faults-'))
    preload()
    harness = Harness(work, seed)
    print(f'Working in {work}', flush=True)
    usual = {1: KINDS[:-1]}
    plan = [(name, kind) for _ in range(rounds) for name in scripts or CASES
            for kind in usual.get(CASES[name].processes, KINDS[-1:]) if not kinds or kind in kinds]
    for number, (name, kind) in enumerate(plan, 1):
        for _ in range(5):
            if (row := harness.one(name, kind)) is not None:
                break
        else:
            continue
        harness.results.append(row)
        write_json(dest, harness.results)
        said = ', '.join(f'{key} {value}' for key, value in row['problems'].items() if key != 'again')
        print(f'{number}/{len(plan)} {name}: {kind} at {row["at"]}, status {row["status"]} '
              f'{said and "PROBLEM " + said + " in " + row["folder"]}', flush=True)
    print(table(harness.results))
    bad = any(row['problems'] for row in harness.results)
    if not bad:
        shutil.rmtree(work)
    sys.exit(bad)


if __name__ == '__main__':
    main()
