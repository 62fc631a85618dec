"""Can a model be trained from another model instead of data? In miniature, on handwritten digits.

A teacher learns the digits. Students of half its size learn the teacher's denoising steps without
data, the teacher's samples, or the real digits, and are measured again and again, as training
goes on: at equal steps and at equal compute. Further students learn the teacher's steps from
caches of other sizes, rho. Every stage is a command line of this folder, which is printed, and is
skipped if its result is there.
"""

import dataclasses
import os
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
from dnnlib import UserError, budget, cli, lazy, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from distillation import runs
    from distillation.cache import cache_size
    from metrics.frechet import frechet_distance
    from training.flops import count_products
    from training.runs import MEASURED

import studies
from distillation import comparison  # has imports that wait too
from distillation.comparison import FLOOR, ORIGINS, RHO
from metrics.recognition import Recognizer
from studies import WHOLE, compared, setting
from training.data.images import open_images

SCRIPTS = studies.ROOT / 'distillation' / 'scripts'
YAML = studies.ROOT / 'distillation' / 'yaml' / 'digits_8'
DISTILLED = YAML / 'exp' / 'Digits-Dynamic-0.4.yaml'
BASELINE = YAML / 'exp' / 'Digits-Baseline.yaml'
TEACHER = YAML / 'teacher.yaml'
GREY = 'model.img_channels=1'
CHAIN = 50                                                     # time steps, of diffusion.yaml
IMAGES = click.IntRange(min=16)                                # a row of the picture
SHARE = 0.95         # of real digits, unseen by the classifier, that count as clear
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', configs.OUTDIR_VARIABLE: ''}


@dataclasses.dataclass(frozen=True)
class Model:
    """rho: of a distilled student."""

    seed: int
    kind: str                                                  # 'teacher', or one of ORIGINS
    rho: float | None = None

    @property
    def name(self) -> str:
        return f'seed{self.seed}-{self.kind}' + (f'-rho{self.rho:g}' if self.rho else '')

    @property
    def config(self) -> Path:
        return TEACHER if self.kind == 'teacher' else BASELINE


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0,1,2', 'Seeds, each with a teacher and students of its own')
    rhos: cli.NUMBERS = compared('0.02', 'Sizes of the cache, as shares of the 50 time steps, '
                                 'that are compared with 0.4')
    teacher_steps: WHOLE = setting(500, 'Steps of the teacher')
    student_steps: WHOLE = setting(400, 'Steps of the students of the teacher')
    data_steps: WHOLE = setting(600, 'Steps of the student of real digits, which cost less')
    rho_steps: WHOLE = setting(200, 'Steps after which values of rho are compared')
    interval: WHOLE = setting(100, 'Steps from one measurement to the next')
    batch: WHOLE = setting(32, 'Images of a step')
    teacher_samples: IMAGES = setting(
        1024, 'Images of the teacher that a student learns from; there are 1,797 real ones')
    samples: IMAGES = setting(500, 'Images of each measurement')
    sampling_steps: click.IntRange(2, CHAIN) = setting(16, 'DDIM steps of these images')
    grid = dict(columns=IMAGES.min)

    def check(self):
        if not all(0 < rho <= 1 and rho != RHO for rho in self.rhos):
            raise UserError(f'give shares above 0 other than {RHO:g}, which is always there, '
                            'e.g. 0.02,1', 'rhos')
        if self.rho_steps > self.student_steps:
            raise UserError(f'is more than --student-steps={self.student_steps}', 'rho_steps',
                            self.rho_steps)
        for field in ('student_steps', 'data_steps', 'rho_steps'):
            if (steps := getattr(self, field)) % self.interval:
                raise UserError(f'is no multiple of --interval={self.interval}', field, steps)

    @property
    def data(self) -> str:
        return self.path('digits.zip')

    def steps(self, model: Model) -> int:
        if model.kind == 'teacher':
            return self.teacher_steps
        if model.kind == 'on-data':
            return self.data_steps
        return self.rho_steps if model.rho not in (None, RHO) else self.student_steps

    def weights(self, model: Model) -> str:
        return os.path.join(self.run_dir(model), f'ema_0.995_{self.steps(model):06d}.pt')

    def samples_of(self, model: Model) -> str:
        return self.path('samples', f'{model.name}.npz')

    def students(self, seed: int) -> list[Model]:
        """Those that train to the end, in the order of the tables."""
        return [Model(seed, kind, RHO if kind == 'distilled' else None) for kind in ORIGINS]


# Stages: command lines, and the file that each is to make.


def training_options(study: Study, model: Model, prefix: str = '') -> list:
    """Where and how long; the average is measured at each interval, always by the same noise."""
    steps = study.steps(model)
    measured = steps if model.kind == 'teacher' else study.interval
    return ['--outdir', study.run_dir(model), '--seed', model.seed,
            '--eval=fd_pixels,recognition', f'--eval-every={measured * study.batch}',
            f'--eval-num={study.samples}', f'--eval-steps={study.sampling_steps}',
            '--eval-ref', study.data,
            *studies.arguments(dict(
                total_steps=steps, lr_anneal_steps=steps if model.kind == 'teacher' else 0,
                save_interval=steps, log_interval=max(steps // 10, 1), batch_size=study.batch),
                prefix)]


def train(study: Study, model: Model, data: str) -> tuple[list, str]:
    return [SCRIPTS / 'image_train.py', '--data_dir', data, '--config', model.config,
            *training_options(study, model), GREY], study.weights(model)


def sample(study: Study, model: Model, count: int) -> tuple[list, str]:
    """By all steps of the chain."""
    dest = study.samples_of(model)
    return [SCRIPTS / 'image_sample.py', '--config', model.config, '--model_path',
            study.weights(model), '--num_samples', count, '--batch_size', 128, '--dest', dest,
            '--seed', model.seed, GREY], dest


def distil(study: Study, model: Model) -> list[tuple[list, str]]:
    """The cache, and a student from it."""
    cache = study.path('cache', f'{model.name}.cache')
    shared = ['--config', DISTILLED, f'teacher.tempfile={cache}',
              f'teacher.model_path={study.weights(Model(model.seed, "teacher"))}',
              f'teacher.BATCH={model.rho:g}', f'teacher.{GREY}', f'student.{GREY}']
    return [([SCRIPTS / 'dynamic_prepare.py', *shared, '--seed', model.seed,
              f'student.batch_size={study.batch}'], cache),
            ([SCRIPTS / 'image_kd.py', *shared, *training_options(study, model, 'student.')],
             study.weights(model))]


def first_chains(study: Study) -> list[list[tuple[list, str]]]:
    """Chains of stages that may go on side by side, the longest first: what learns from data."""
    teachers = [Model(seed, 'teacher') for seed in study.seeds]
    students = [Model(seed, 'on-data') for seed in study.seeds]
    return [[train(study, teacher, study.data), sample(study, teacher, study.teacher_samples)]
            for teacher in teachers] + [
        [train(study, student, study.data), sample(study, student, study.samples)]
        for student in students]


def further_chains(study: Study) -> list[list[tuple[list, str]]]:
    """What learns from the teachers alone."""
    chains = []
    for seed in study.seeds:
        distilled, on_samples, _ = study.students(seed)
        samples = study.samples_of(Model(seed, 'teacher'))
        chains += [[*distil(study, distilled), sample(study, distilled, study.samples)],
                   [train(study, on_samples, samples), sample(study, on_samples, study.samples)]]
    return chains + [distil(study, Model(seed, 'distilled', rho))
                     for seed in study.seeds for rho in study.rhos]


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
    print(f'  {name}: {util.format_time(time.monotonic() - start)}', flush=True)


# What training costs


@dataclasses.dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image's pass through teacher and student."""

    teacher: int
    student: int

    @classmethod
    def of(cls, *configurations) -> 'Costs':
        return cls(*(count_products(runs.build(configs.read_network(str(config), [GREY])))
                     for config in configurations))

    def of_training(self, study: Study, model: Model, steps):
        """What `steps` of a model have cost: a backward pass as two forward ones, the teacher's
        passes in each step and in the cache or the samples that were made before; but not the
        training of the teacher, which is there already."""
        if model.kind == 'teacher':
            return 3 * self.teacher * study.batch * steps
        each = 3 * self.student
        before = 0
        if model.kind == 'distilled':
            each += self.teacher
            # Images of the cache are denoised down to a level drawn from 1 .. CHAIN - 1.
            before = cache_size(model.rho, CHAIN, study.batch) * CHAIN / 2 * self.teacher
        elif model.kind == 'on-samples':
            before = study.teacher_samples * CHAIN * self.teacher
        return before + each * study.batch * steps


# Numbers


def measure(study: Study) -> pd.DataFrame:
    """A row for each measurement of each model: steps, billions of multiply-adds, distance of the
    pixels to all real digits, share that is recognised; and for as many real digits, the floor."""
    costs = Costs.of(TEACHER, BASELINE)
    real = studies.pixels(study.data).reshape(-1, 64).astype(float)
    rows = []
    for seed in study.seeds:
        drawn = np.random.default_rng(seed).choice(real, min(study.samples, len(real)),
                                                  replace=False)
        rows.append({'seed': seed, 'learned from': FLOOR, 'fd': frechet_distance(
            *(value for x in (drawn, real) for value in (x.mean(0), np.cov(x.T))))})
        further = [Model(seed, 'distilled', rho) for rho in study.rhos]
        for model in [Model(seed, 'teacher'), *study.students(seed), *further]:
            path = os.path.join(study.run_dir(model), MEASURED)
            for _, row in budget.json_lines(path):
                steps = row['nimg'] // study.batch
                rows.append({
                    'seed': seed, 'learned from': ORIGINS.get(model.kind, 'teacher'),
                    'rho': model.rho, 'steps': steps,
                    'gmac': costs.of_training(study, model, steps) / 1e9,
                    'fd': row['fd_pixels'], 'recognised': row['recognition']})
    return pd.DataFrame(rows).astype({'steps': 'Int64'})


def final(study: Study) -> pd.DataFrame:
    """A row for each model at its end, of images by all steps of the chain."""
    real = studies.pixels(study.data)
    recognizer = Recognizer(real, open_images(study.data).label_ids)
    rows = []
    for model in [model for seed in study.seeds
                  for model in (Model(seed, 'teacher'), *study.students(seed))]:
        path = study.samples_of(model)
        images = studies.pixels(path)
        right = recognizer.recognised(images, open_images(path).label_ids)
        rows.append({
            'seed': model.seed, 'learned from': ORIGINS.get(model.kind, 'teacher'),
            'images': len(images), 'fd': studies.pixel_distance(path, study.data),
            'recognised': right.mean(),
            'clear': recognizer.recognised_clearly(images, SHARE).mean()})
    return pd.DataFrame(rows)


def show(summary, ends, ratios, claims):
    """Prints the tables."""
    forms = {'rho': '{:g}', 'gmac': '{:,.0f}', 'x': '{:,.0f}'} | dict.fromkeys(
        ('fd', 'fd low', 'fd high'), '{:,.0f}') | dict.fromkeys(
        ('recognised', 'recognised low', 'recognised high', 'clear'), '{:.1%}') | dict.fromkeys(
        ('estimate', 'low', 'high'), '{:.3g}')
    means = ends.groupby('learned from', sort=False).mean(numeric_only=True).reset_index()
    for title, table in {
            'Means over seeds with 95% intervals (fd: Frechet distance of pixels to all digits, '
            'geometric; gmac: billions of multiply-adds)': summary,
            'At the end, by all steps of the chain (clear: of one class, by the margin that '
            f'{SHARE:.0%} of real digits reach unseen)': means.drop(columns=['seed', 'images']),
            "Distance of the student of teacher's steps, over that of another (x: steps, or "
            'billions of multiply-adds)': ratios,
            'Claims: ratio of distances, or slope, with 95% intervals': claims}.items():
        shown = table.astype(object)
        for name in table.columns.intersection(list(forms)):
            shown[name] = shown[name].map(forms[name].format, na_action='ignore')
        print(f'\n{title}:\n{shown.to_string(index=False, na_rep="-")}')


@studies.command(Study, """\b
  # The larger run of the page, half an hour of processor time, in a folder of its own
  python distillation/digits_distillation.py --teacher-steps=1600 --student-steps=1200 \\
      --data-steps=2400 --rhos=0.02,0.1,1 --rho-steps=600 --interval=200 \\
      --outdir=training-runs/dkdm-long
""")
def main(study):
    """Compares a student distilled without data with students of the teacher's samples and of real
    digits, at equal steps and at equal compute, and values of rho.

    Writes results.csv, summary.csv, differences.csv, ratios.csv, claims.csv, final.csv,
    study.png, samples.png (the data, teacher, students), report.html, and a folder with the
    checkpoints of each model.
    """
    study.claim()
    convert = [studies.ROOT / 'dataset_tool.py', 'convert', '--source=digits',
               f'--dest={study.data}', '--channels=1']
    run_chain(study, [(convert, study.data)])
    for chains in (first_chains, further_chains):
        for _ in study.run(run_chain, chains(study), disable=True):
            pass
    results = measure(study)
    summary = comparison.summarise(results)
    differences = comparison.compare(results)
    claims = comparison.claims(results, differences, study.rho_steps)
    ends = final(study)
    ratios = comparison.over_training(differences)
    show(summary, ends, ratios, claims)
    seed = study.seeds[0]
    models = [Model(seed, 'teacher'), *study.students(seed)]
    rows = {'the data': studies.pixels(study.data)} | {
        ORIGINS.get(model.kind, 'teacher'): studies.pixels(study.samples_of(model))
        for model in models}
    study.save(comparison.draw(summary, study.rho_steps),
               {'samples.png': ('The data, and the same noise by each model', rows)},
               results=results, summary=summary, differences=differences, ratios=ratios,
               claims=claims, final=ends)


if __name__ == '__main__':
    main()
