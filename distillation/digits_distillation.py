"""Can a model be trained from another model instead of data? In miniature, on handwritten digits.

A teacher learns the digits. Students of a third of its size learn the teacher's denoising steps
without data, for two values of rho; others learn the teacher's samples, or the real digits, in as
many steps. Every stage is a command line of this folder, which is printed, and is skipped if its
result is there.
"""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from distillation import configs
from dnnlib import UserError, cli, lazy, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from distillation import runs

import studies
from metrics.recognition import Recognizer
from studies import WHOLE, setting
from training.data.images import open_images

SCRIPTS = studies.ROOT / 'distillation' / 'scripts'
YAML = studies.ROOT / 'distillation' / 'yaml' / 'digits_8'
DISTILLED = YAML / 'exp' / 'Digits-Dynamic-0.4.yaml'
BASELINE = YAML / 'exp' / 'Digits-Baseline.yaml'
TEACHER = YAML / 'teacher.yaml'
IMAGES = click.IntRange(min=16)                                # a row of the picture
SHARE = 0.95         # of real digits, unseen by the classifier, that count as clear
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', configs.OUTDIR_VARIABLE: ''}


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    teacher_steps: WHOLE = setting(2400, 'Steps of the teacher')
    student_steps: WHOLE = setting(1200, 'Steps of each student')
    rhos: cli.NUMBERS = setting('0.4,0.02', 'Sizes of the cache, as shares of the 50 time steps')
    batch: WHOLE = setting(32, 'Images of a step')
    teacher_samples: IMAGES = setting(
        1024, 'Images of the teacher that a student learns from; there are 1,797 real ones')
    samples: IMAGES = setting(500, 'Images that are measured of a student')
    seed: click.IntRange(0, 2**31 - 1) = setting(0, 'Seed of everything random')
    most_jobs = 4
    grid = dict(columns=IMAGES.min)

    def check(self):
        if not all(0 < rho <= 1 for rho in self.rhos):
            raise UserError('give shares above 0, e.g. 0.4,0.02', 'rhos')

    @property
    def data(self) -> str:
        return self.path('digits.zip')

    def steps(self, name: str) -> int:
        return self.teacher_steps if name == 'teacher' else self.student_steps

    def weights(self, name: str) -> str:
        return self.path(name, f'ema_0.995_{self.steps(name):06d}.pt')

    def samples_of(self, name: str) -> str:
        return self.path('samples', f'{name}.npz')

    @property
    def origins(self) -> dict[str, tuple]:
        """{model: (what it learned from, rho, its configuration)} in the order of the table."""
        distilled = {student(rho): ("teacher's steps", rho, BASELINE) for rho in self.rhos}
        return {'teacher': ('real digits', None, TEACHER)} | distilled | {
            'on-samples': ("teacher's samples", None, BASELINE),
            'on-data': ('real digits', None, BASELINE)}


def student(rho: float) -> str:
    return f'distilled-rho{rho:g}'


# Stages: command lines, and the file that each is to make.


def training_options(study: Study, name: str, prefix: str = '') -> list[str]:
    steps = study.steps(name)
    return studies.arguments(dict(
        lr_anneal_steps=steps, save_interval=max(steps // 4, 1), log_interval=max(steps // 10, 1),
        batch_size=study.batch), prefix)


def channels_of(study: Study, prefix: str = '') -> str:
    return f'{prefix}model.img_channels={study.image_channels}'


def train(study: Study, name: str, data: str, processes: int = 1) -> tuple[list, str]:
    launcher = []
    if processes > 1:
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [*launcher, SCRIPTS / 'image_train.py', '--data_dir', data,
            '--config', study.origins[name][2], '--outdir', study.path(name), '--seed', study.seed,
            *training_options(study, name), channels_of(study)], study.weights(name)


def train_teacher(study: Study) -> tuple[list, str]:
    """On as many processes as there are jobs: nothing else can be done before."""
    counts = range(1, min(study.jobs, study.batch) + 1)
    return train(study, 'teacher', study.data, max(n for n in counts if study.batch % n == 0))


def sample(study: Study, name: str, count: int) -> tuple[list, str]:
    dest = study.samples_of(name)
    return [SCRIPTS / 'image_sample.py', '--config', study.origins[name][2], '--model_path',
            study.weights(name), '--num_samples', count, '--batch_size', 128, '--dest', dest,
            '--seed', study.seed, channels_of(study)], dest


def distil(study: Study, rho: float) -> list[tuple[list, str]]:
    """The cache, and a student from it."""
    name = student(rho)
    cache = study.path('cache', f'{name}.cache')
    shared = ['--config', DISTILLED, '--seed', study.seed, f'teacher.tempfile={cache}',
              f'teacher.model_path={study.weights("teacher")}', f'teacher.BATCH={rho:g}',
              *training_options(study, name, 'student.'), channels_of(study, 'teacher.'),
              channels_of(study, 'student.')]
    return [([SCRIPTS / 'dynamic_prepare.py', *shared], cache),
            ([SCRIPTS / 'image_kd.py', *shared, '--outdir', study.path(name)],
             study.weights(name))]


def chains(study: Study) -> list[list[tuple[list, str]]]:
    """What is to be done after the teacher: chains of stages that may go on side by side, the
    longest first. Distilled students use no data and no samples."""
    stages = {'on-samples': [sample(study, 'teacher', study.teacher_samples),
                             train(study, 'on-samples', study.samples_of('teacher'))]}
    stages |= {student(rho): distil(study, rho) for rho in sorted(study.rhos, reverse=True)}
    stages['on-data'] = [train(study, 'on-data', study.data)]
    return [[*chain, sample(study, name, study.samples)] for name, chain in stages.items()]


def run_chain(study: Study, chain: list):
    """Runs stages, each with one thread, as far as their results are not there."""
    for arguments, dest in chain:
        if not os.path.exists(dest):
            run_stage(study, arguments, dest)


def run_stage(study: Study, arguments: list, dest: str):
    """Its output goes to a file in logs/. Raises UserError if it fails; when this process is told
    to stop, so is the stage, which saves its checkpoint."""
    name = os.path.relpath(dest, study.outdir)
    command = [sys.executable, *map(str, arguments)]
    print(f'$ python {shlex.join(command[1:])}', flush=True)
    log = Path(study.path('logs', name.replace(os.sep, '-') + '.log'))
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, 'a') as file, subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT,
            start_new_session=True) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if code != 0 or not os.path.exists(dest):
        last = log.read_text().strip().rpartition('\n')[2]
        raise UserError(f'{name} could not be made ({last[:200]}); see {log}')
    seconds = time.monotonic() - start
    with open(study.path('seconds.jsonl'), 'a') as file:
        print(json.dumps({name: seconds}), file=file)
    print(f'  {name}: {util.format_time(seconds)}', flush=True)


def read_seconds(study: Study) -> dict:
    """Seconds of each result in its last session. (seconds.json: of earlier versions.)"""
    files = sorted(Path(study.outdir).glob('seconds.json*'))
    pairs = re.findall(r'"(.+?)": ([-+.e\d]+)', ''.join(file.read_text() for file in files))
    return {name: float(seconds) for name, seconds in pairs}


# Numbers and pictures


def controls(pixels, labels, seed: int) -> dict:
    """What should not be recognised: means of two digits of different classes, and noise. uint8
    like `pixels`."""
    random = np.random.default_rng(seed)
    pairs = random.integers(len(pixels), size=(2, 2000))
    pairs = pairs[:, labels[pairs[0]] != labels[pairs[1]]]
    return {'two digits at once': (pixels[pairs].sum(0) // 2).astype(np.uint8),
            'noise': random.integers(0, 256, (1000, *pixels.shape[1:])).astype(np.uint8)}


def measure(study: Study) -> pd.DataFrame:
    """A row for each model, in the order of the table, and for each of `controls`."""
    real = studies.pixels(study.data)
    digits = open_images(study.data).label_ids
    recognizer = Recognizer(real, digits)
    seconds = read_seconds(study)

    def clear(images) -> float:
        return 100 * recognizer.recognised_clearly(images, SHARE).mean()

    rows = []
    for name, (origin, rho, config) in study.origins.items():
        samples = studies.pixels(study.samples_of(name))
        classes = open_images(study.samples_of(name)).label_ids
        network = runs.build(configs.read_network(str(config), [channels_of(study)]))
        weights = os.path.relpath(study.weights(name), study.outdir)
        rows.append({
            'model': name, 'learned from': origin, 'rho': rho,
            'parameters': sum(p.numel() for p in network.model.parameters()),
            'steps': study.steps(name), 'seconds': round(seconds.get(weights, 0)),
            'recognised %': 100 * recognizer.recognised(samples, classes).mean(),
            'clear %': clear(samples),
            'fd': studies.pixel_distance(study.samples_of(name), study.data)})
    rows += [{'model': name, 'clear %': clear(other)}
             for name, other in controls(real, digits, study.seed).items()]
    return pd.DataFrame(rows).astype(dict.fromkeys(('parameters', 'steps', 'seconds'), 'Int64'))


def show(table: pd.DataFrame):
    """Prints the table."""
    forms = {'rho': '{:g}', 'parameters': '{:,}', 'recognised %': '{:.1f}%', 'clear %': '{:.1f}%',
             'fd': '{:.0f}'}
    shown = table.astype(object)
    for name, form in forms.items():
        shown[name] = shown[name].map(form.format, na_action='ignore')
    print(f'\n{shown.fillna("-").to_string(index=False)}\n'
          'recognised: as the digit that it was made for. clear: of one class, by the margin that '
          f'{SHARE:.0%} of real digits reach unseen.\n'
          'fd: Frechet distance of pixels to the real digits.')


@studies.command(Study, """\b
  # Longer, with more values of rho, in a folder of its own
  python distillation/digits_distillation.py --student-steps=6000 --rhos=0.4,0.1,0.02 \\
      --outdir=training-runs/dkdm-long
""")
def main(study):
    """Compares a student distilled without data with students of the teacher's samples and of real
    digits.

    Writes results.csv, samples.png (real digits, teacher, students), report.html, and a folder
    with the checkpoints of each model.
    """
    study.claim()
    convert = [studies.ROOT / 'dataset_tool.py', 'convert', '--source=digits',
               f'--dest={study.data}', f'--channels={study.image_channels}']
    run_chain(study, [(convert, study.data), train_teacher(study)])
    for _ in study.run(run_chain, chains(study), disable=True):
        pass
    table = measure(study)
    show(table)
    files = {'real digits': study.data} | {name: study.samples_of(name) for name in study.origins}
    study.save(grids={'samples.png': ('Real digits, and the same noise by each model', {
        name: studies.pixels(file) for name, file in files.items()})},
               results=table)


if __name__ == '__main__':
    main()
