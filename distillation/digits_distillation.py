"""Can a model be trained from another model instead of data? The question in miniature, on handwritten digits.

A teacher learns the digits. Students of a third of its size learn the teacher's denoising steps without data, for two
values of rho; others learn the teacher's samples, or the real digits, in as many steps. Every stage is a command line of
this folder, which is printed, and is skipped if its result is there.
"""

import concurrent.futures
import csv
import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from distillation import common
from dnnlib import UserError, cli, pictures, util
from metrics import compute, frechet
from metrics.recognition import Recognizer
from torch_utils import distributed, parallel
from training.data.images import open_images

SCRIPTS = ROOT / 'distillation' / 'scripts'
YAML = ROOT / 'distillation' / 'yaml' / 'digits_8'
DISTILLED, BASELINE = YAML / 'exp' / 'Digits-Dynamic-0.4.yaml', YAML / 'exp' / 'Digits-Baseline.yaml'
TEACHER = YAML / 'teacher.yaml'
GRID_COLUMNS = 16
SPACE = 'fd_pixels'
MOST_JOBS = 4        # by default
SHARE = 0.95         # of real digits, unseen by the classifier, that count as clear
COLUMNS = ['model', 'learned from', 'rho', 'parameters', 'steps', 'seconds', 'recognised %', 'clear %', 'fd']


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder and its settings; only models of the same settings may be compared."""

    outdir: str
    teacher_steps: int
    student_steps: int
    rhos: tuple[float, ...]
    teacher_samples: int
    samples: int
    seed: int
    batch: int
    jobs: int

    def path(self, *parts) -> str:
        return os.path.join(self.outdir, *parts)

    @property
    def teacher(self) -> str:
        return self.path('teacher', f'ema_0.995_{self.teacher_steps:06d}.pt')

    def student(self, name: str) -> str:
        return self.path(name, f'ema_0.995_{self.student_steps:06d}.pt')

    def samples_of(self, name: str) -> str:
        return self.path('samples', f'{name}.npz')

    def distilled(self, rho: float) -> str:
        return f'distilled-rho{rho:g}'

    @property
    def students(self) -> list[str]:
        return [*map(self.distilled, self.rhos), 'on-samples', 'on-data']

    def claim(self):
        """Writes the settings to the folder, or raises UserError if it holds a study with others."""
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key not in ('outdir', 'jobs')}
        util.claim_folder(self.outdir, settings)


# Stages: command lines, and the file that each is to make.


def training_options(study: Study, steps: int, prefix: str = '', processes: int = 1) -> list[str]:
    options = dict(lr_anneal_steps=steps, save_interval=max(steps // 4, 1), log_interval=max(steps // 10, 1),
                   batch_size=study.batch // processes)
    return [f'{prefix}{name}={value}' for name, value in options.items()]


def train_teacher(study: Study) -> tuple[list, str]:
    """On as many processes as there are jobs: nothing else can be done before."""
    processes = max(count for count in range(1, min(study.jobs, study.batch) + 1) if study.batch % count == 0)
    launcher = [] if processes == 1 else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [*launcher, SCRIPTS / 'image_train.py', '--data_dir', study.path('digits.zip'), '--config', TEACHER,
            '--outdir', study.path('teacher'), '--seed', study.seed,
            *training_options(study, study.teacher_steps, processes=processes)], study.teacher


def make_samples(study: Study, name: str, count: int) -> tuple[list, str]:
    """Of the teacher, or of a student."""
    dest = study.samples_of(name)
    config, model = (TEACHER, study.teacher) if name == 'teacher' else (BASELINE, study.student(name))
    return [SCRIPTS / 'image_sample.py', '--config', config, '--model_path', model, '--num_samples', count,
            '--batch_size', 128, '--dest', dest, '--seed', study.seed], dest


def distil(study: Study, rho: float) -> list[tuple[list, str]]:
    """The cache, and a student from it."""
    name = study.distilled(rho)
    cache = study.path('cache', f'{name}.cache')
    shared = ['--config', DISTILLED, '--seed', study.seed, f'teacher.model_path={study.teacher}', f'teacher.tempfile={cache}',
              f'teacher.BATCH={rho:g}', *training_options(study, study.student_steps, 'student.')]
    return [([SCRIPTS / 'dynamic_prepare.py', *shared], cache),
            ([SCRIPTS / 'image_kd.py', *shared, '--outdir', study.path(name)], study.student(name))]


def train_student(study: Study, name: str, data: str) -> tuple[list, str]:
    return [SCRIPTS / 'image_train.py', '--data_dir', data, '--config', BASELINE, '--outdir', study.path(name),
            '--seed', study.seed, *training_options(study, study.student_steps)], study.student(name)


def chains(study: Study) -> list[list[tuple[list, str]]]:
    """What is to be done after the teacher: chains of stages that may go on side by side, the longest first."""
    made = [[make_samples(study, 'teacher', study.teacher_samples),
             train_student(study, 'on-samples', study.samples_of('teacher'))]]
    made += [distil(study, rho) for rho in sorted(study.rhos, reverse=True)]
    made += [[train_student(study, 'on-data', study.path('digits.zip'))]]
    for chain, name in zip(made, ['on-samples', *map(study.distilled, sorted(study.rhos, reverse=True)), 'on-data'],
                           strict=True):
        chain.append(make_samples(study, name, study.samples))
    return made


class Runner:
    """Runs stages as processes with one thread each, and stops them all when it is told to."""

    def __init__(self, study: Study):
        self.study, self.running, self.lock, self.stopped = study, set(), threading.Lock(), False

    def run(self, arguments: list, dest: str):
        """One stage, if its result is not there. Its output goes to a file in logs/. Raises UserError if it fails."""
        name = os.path.relpath(dest, self.study.outdir)
        if os.path.exists(dest):
            return
        command = [sys.executable, *map(str, arguments)]
        print(f'$ python {shlex.join(command[1:])}', flush=True)
        log = self.study.path('logs', name.replace(os.sep, '-') + '.log')
        os.makedirs(os.path.dirname(log), exist_ok=True)
        start = time.monotonic()
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
        environment.pop(common.OUTDIR_VARIABLE, None)
        with open(log, 'a') as file:
            with self.lock:
                if self.stopped:
                    raise KeyboardInterrupt
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                           start_new_session=True)
                self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if self.stopped:
            raise KeyboardInterrupt
        if code != 0 or not os.path.exists(dest):
            with open(log) as file:
                last = [line.strip() for line in file if line.strip()][-1:]
            raise UserError(f'{name} could not be made ({"".join(last)[:200]}); see {log}')
        self._note_time(name, time.monotonic() - start)

    def _note_time(self, name, seconds):
        with self.lock:
            times = read_times(self.study)
            util.write_json(self.study.path('seconds.json'), times | {name: times.get(name, 0) + seconds})
        print(f'  {name}: {util.format_time(seconds)}', flush=True)

    def run_chain(self, chain):
        for arguments, dest in chain:
            self.run(arguments, dest)

    def stop(self):
        """Lets every process save its checkpoint and end."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                os.killpg(process.pid, signal.SIGTERM)

    def run_all(self, todo):
        """Chains side by side, as many as the study's jobs; the first error ends them all."""
        with concurrent.futures.ThreadPoolExecutor(self.study.jobs) as pool:
            futures = [pool.submit(self.run_chain, chain) for chain in todo]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self.stop()
                for future in futures:
                    future.cancel()
                raise


def read_times(study: Study) -> dict:
    """Seconds of each result in its last session."""
    try:
        with open(study.path('seconds.json')) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


# Numbers and pictures


def gaussian(opened):
    """Mean and covariance of the pixels."""
    return compute.measure_images(opened, compute.Detectors(device='cpu'), spaces=[SPACE]).gaussians[SPACE]


def controls(pixels, labels, seed: int) -> dict:
    """What should not be recognised: means of two digits of different classes, and noise. uint8 like `pixels`."""
    random = np.random.default_rng(seed)
    pairs = random.integers(len(pixels), size=(2, 2000))
    pairs = pairs[:, labels[pairs[0]] != labels[pairs[1]]]
    return {'two digits at once': (pixels[pairs].astype(np.uint16).sum(0) // 2).astype(np.uint8),
            'noise': random.integers(0, 256, (1000, *pixels.shape[1:])).astype(np.uint8)}


def measure(study: Study) -> list[dict]:
    """A row for each model, in the order of the table."""
    real = open_images(study.path('digits.zip'))
    pixels, reference = real.images(np.arange(len(real))), gaussian(real)
    recognizer, times = Recognizer(pixels, real.label_ids), read_times(study)
    rows = []
    origins = ['real digits', *["teacher's steps"] * len(study.rhos), "teacher's samples", 'real digits']
    rhos = ['', *study.rhos, '', '']
    for name, origin, rho in zip(['teacher', *study.students], origins, rhos, strict=True):
        made = open_images(study.samples_of(name))
        found, shown = gaussian(made), made.images(np.arange(len(made)))
        network = common.build(common.read_network(str(TEACHER if name == 'teacher' else BASELINE)))
        weights = study.teacher if name == 'teacher' else study.student(name)
        rows.append({
            'model': name, 'learned from': origin, 'rho': rho,
            'parameters': sum(p.numel() for p in network.model.parameters()),
            'steps': study.teacher_steps if name == 'teacher' else study.student_steps,
            'seconds': round(times.get(os.path.relpath(weights, study.outdir), 0)),
            'recognised %': 100 * recognizer.recognised(shown, made.label_ids).mean(),
            'clear %': 100 * recognizer.recognised_clearly(shown, SHARE).mean(),
            'fd': frechet.frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)})
    for name, other in controls(pixels, real.label_ids, study.seed).items():
        rows.append({'model': name, 'clear %': 100 * recognizer.recognised_clearly(other, SHARE).mean()})
    return rows


def save_table(rows: list[dict], path: str):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
    util.write_bytes(path, text.getvalue().encode())


def show(rows: list[dict]):
    """Prints the table."""
    print(f'\n{"model":<20}{"learned from":<20}{"rho":>6}{"parameters":>12}{"steps":>7}{"seconds":>9}{"recognised":>12}'
          f'{"clear":>8}{"FD":>9}')
    for row in rows:
        if 'fd' not in row:
            print(f'{row["model"]:<20}{row["clear %"]:73.1f}%')
            continue
        print(f'{row["model"]:<20}{row["learned from"]:<20}{row["rho"] or "-":>6}{row["parameters"]:12,}{row["steps"]:7}'
              f'{row["seconds"]:9}{row["recognised %"]:11.1f}%{row["clear %"]:7.1f}%{row["fd"]:9.0f}')
    print(f'recognised: as the digit that it was made for. clear: of one class, by the margin that {SHARE:.0%} of real digits '
          'reach unseen.\nFD: Frechet distance of pixels to the real digits.')


def save_grid(study: Study, path: str):
    """A row of real digits, and one of each model's first samples."""
    files = {'real digits': study.path('digits.zip')}
    files |= {name: study.samples_of(name) for name in ['teacher', *study.students]}
    tiles = [open_images(file).images(np.arange(GRID_COLUMNS)) for file in files.values()]
    pictures.save_image_grid(path, np.concatenate(tiles), GRID_COLUMNS, list(files))


# The study


def make_data(study: Study):
    """The digits as a zip."""
    path = study.path('digits.zip')
    if not os.path.exists(path):
        subprocess.run([sys.executable, str(ROOT / 'dataset_tool.py'), 'convert', '--source=digits', f'--dest={path}'],
                       check=True, stdout=subprocess.DEVNULL)


def parse_rhos(text: str) -> tuple[float, ...]:
    """'0.4,0.02' -> (0.4, 0.02)."""
    try:
        rhos = tuple(float(part) for part in text.split(','))
    except ValueError:
        rhos = (0.0,)
    if not all(0 < rho <= 1 for rho in rhos) or len(set(rhos)) < len(rhos):
        raise ValueError(f'{text!r} is not a list of different shares above 0, e.g. 0.4,0.02')
    return rhos


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The study of the page, under 15 minutes on 2 CPU cores
  python distillation/digits_distillation.py
\b
  # Longer, with more values of rho, in a folder of its own
  python distillation/digits_distillation.py --student-steps=6000 --rhos=0.4,0.1,0.02 --outdir=training-runs/dkdm-long
\b
The same command goes on with a study that was stopped; what is finished is not made again.
""")
@click.option('--outdir', metavar='DIR', default=str(ROOT / 'training-runs' / 'study-distillation'), help='Where results go')
@click.option('--teacher-steps', metavar='INT', type=click.IntRange(min=1), default=2400, help='Steps of the teacher')
@click.option('--student-steps', metavar='INT', type=click.IntRange(min=1), default=1200, help='Steps of each student')
@click.option('--rhos', metavar='LIST', type=cli.Parsed('list', parse_rhos), default='0.4,0.02',
              help='Sizes of the cache, as shares of the 50 time steps')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=32, help='Images of a step')
@click.option('--teacher-samples', metavar='INT', type=click.IntRange(min=GRID_COLUMNS), default=1024,
              help='Images of the teacher that a student learns from; there are 1,797 real ones')
@click.option('--samples', metavar='INT', type=click.IntRange(min=GRID_COLUMNS), default=500,
              help='Images that are measured of a student')
@click.option('--seed', metavar='INT', type=click.IntRange(0, 2**31 - 1), default=0, help='Seed of everything random')
@click.option('--jobs', metavar='INT', type=click.IntRange(min=1),
              help='Processes at a time  [default: one for each core, up to 4; one on a GPU]')
def main(outdir, jobs, **settings):
    """Compares a student distilled without data with students of the teacher's samples and of real digits.

    Writes results.csv, samples.png (real digits, teacher, students), and a folder with the checkpoints of each model.
    """
    distributed.init()
    if distributed.get_world_size() > 1:
        raise UserError('this study runs as one command, without torchrun; --jobs sets how many processes work at a time')
    study = Study(os.path.abspath(outdir), jobs=jobs or min(parallel.default_jobs(), MOST_JOBS), **settings)
    study.claim()
    runner = Runner(study)

    def interrupt(*_):
        raise KeyboardInterrupt
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        make_data(study)
        runner.run_all([[train_teacher(study)]])
        runner.run_all(chains(study))
    except KeyboardInterrupt:
        raise UserError('stopped; the same command goes on from here') from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    rows = measure(study)
    save_table(rows, study.path('results.csv'))
    save_grid(study, study.path('samples.png'))
    show(rows)
    print(f'\nresults.csv and samples.png are in {study.outdir}')


if __name__ == '__main__':
    main()
