"""Does training on several similar sources beat training on each alone? In miniature, on real
data.

For n handwritten digits of each class, one EDM2 model of a single class against conditional models
of several classes: Frechet distance, for each class, between samples and real digits that no model
has seen.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import tqdm

from dnnlib import UserError, cli, lazy

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from training.generate import open_generator

import studies
from simulations import plotting
from studies import WHOLE, compared, setting
from training.data import convert
from training.data.images import save_npz_images

# Similar classes first: the three whose mean images are the closest, then always the one closest
# to those before it (mean Euclidean distance between mean images).
ORDER = (3, 8, 9, 5, 1, 2, 7, 4, 0, 6)
COMPARED = 3                                                   # the first ones are measured
TRAINING = 'fd of training images'
MEASURES = {'distance': 'fd', 'single - multi': 'single - multi', 'training images': TRAINING}


@dataclasses.dataclass(frozen=True)
class Model:
    """One network to train: on n images, chosen by seed, of each of the classes."""

    seed: int
    n: int
    classes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f'seed{self.seed}-n{self.n}-{"".join(map(str, self.classes))}'

    @property
    def measured(self) -> list[int]:
        """The classes of which it makes samples."""
        return [digit for digit in self.classes if digit in ORDER[:COMPARED]]


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    nums: cli.INT_LIST = compared('20,100', 'Training images of each class')
    sources: cli.INT_LIST = compared('1,3,5,10', 'Numbers of classes of a model, which are the '
                                     f'first of {",".join(map(str, ORDER))}')
    seeds: cli.INT_LIST = compared('0-2', 'Seeds of data, weights, noise and samples')
    images_per_class: cli.COUNT = setting(
        '2.5Ki', 'Training images that a model sees of each of its classes')
    batch_per_class: WHOLE = setting(8, 'Images of one step, of each class on average')
    channels: WHOLE = setting(16, 'Width of the network')
    samples: click.IntRange(min=studies.Study.grid['columns']) = setting(
        256, 'Images that are generated and measured of a class')
    steps: WHOLE = setting(12, 'Sampling steps')
    names = {'most': 'largest of --nums'}

    @property
    def settings(self) -> dict:
        return super().settings | {'most': max(self.nums)}     # the others of a seed are held out

    def check(self):
        plan(self)
        studies.split(max(self.nums), self.seeds[0], 'nums', ORDER)

    @property
    def larger(self) -> list[int]:
        """Numbers of classes of the models of several, the largest first."""
        return sorted(set(self.sources) - {1}, reverse=True)

    @property
    def singles(self) -> tuple[int, ...]:
        """The classes that are compared: all of the larger models have them."""
        return ORDER[:min(COMPARED, self.larger[-1])]

    def data(self, model: Model) -> str:
        return self.path('data', f'{model.name}.zip')

    def held_out(self, seed: int) -> str:
        return self.path('data', f'seed{seed}-held-out.zip')

    def samples_file(self, model: Model) -> str:
        return os.path.join(self.run_dir(model), 'samples.npz')

    def duration(self, model: Model) -> int:
        """Training images of a model: whole batches, so that all models take as many steps."""
        batches = -(-self.images_per_class // self.batch_per_class)
        return batches * self.batch_per_class * len(model.classes)


def plan(study: Study) -> list[Model]:
    """All models, the largest first. Raises UserError for lists that make no comparison."""
    counts = study.sources
    if min(study.nums) < 2:
        raise UserError('give at least 2 images of a class', 'nums')
    if 1 not in counts or not study.larger or min(counts) < 1 or max(counts) > len(ORDER):
        raise UserError(f'give 1 and at least one number of classes from 2 to {len(ORDER)}',
                        'sources')
    if study.images_per_class < 1:
        raise UserError('give at least 1', 'images_per_class')
    sets = [ORDER[:count] for count in study.larger] + [(digit,) for digit in study.singles]
    return [Model(seed, n, classes) for classes in sets for seed in study.seeds
            for n in sorted(study.nums)]


def make_data(study: Study, models: list[Model]):
    """Archives of training images, and of those images that are in no training set of a seed."""
    for seed in study.seeds:
        _, rest = studies.split(max(study.nums), seed, 'nums', ORDER)
        studies.make_archive(study, study.held_out(seed), rest)
    for model in models:
        studies.make_archive(study, study.data(model), convert.by_class(
            studies.digits(), model.classes, model.n, model.seed))


def settings(study: Study, model: Model) -> dict:
    """The settings of train_edm2.py, such that models differ in their sources alone.

    Batch and duration are proportional to the number of classes: every model takes the same number
    of steps, with the same number of images of a class in each on average, and so learning rates
    and averages are the same step by step.
    """
    return studies.edm2_settings(
        study.data(model), study.duration(model), seed=model.seed, channels=study.channels,
        checkpoint=0, batch=study.batch_per_class * len(model.classes))


def run_model(study: Study, model: Model):
    """Trains a model and saves its samples, as far as that is not done."""
    network = studies.edm2_network(study.run_dir(model), settings(study, model))
    studies.make(study.samples_file(model), save_samples, study, model, network)


def save_samples(study: Study, model: Model, network: str):
    """An .npz of the samples and their digits, which calculate_metrics.py reads too."""
    seeds = range(model.seed * study.samples, (model.seed + 1) * study.samples)
    samples = []
    for digit in model.measured:
        generator = open_generator(network, class_=digit, sampler=dict(num_steps=study.steps))
        samples += [batch.images.cpu() for batch in generator.images(seeds, batch=256)]
    save_npz_images(study.samples_file(model), np.concatenate(samples),
                    np.repeat(model.measured, study.samples))


def measure(study: Study, model: Model) -> list[dict]:
    """A row for each compared class: the distances of the samples of a finished model, and of its
    training images, to the held-out digits."""
    reference = study.held_out(model.seed)
    return [{'seed': model.seed, 'n': model.n, 'sources': len(model.classes), 'class': digit,
             'fd': studies.pixel_distance(study.samples_file(model), reference, digit),
             TRAINING: studies.pixel_distance(study.data(model), reference, digit)}
            for digit in study.singles if digit in model.classes]


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Means over classes and seeds, with half-widths of 95% intervals over seeds (Student's t).

    `single - multi` is the difference to the models of one class at the same seed: positive if
    many sources help.
    """
    values = results.groupby(['n', 'seed', 'sources'])[['fd', TRAINING]].mean()
    by_sources = values['fd'].unstack()
    values['single - multi'] = (-by_sources).add(by_sources[1], axis=0).drop(columns=1).stack()
    summary = studies.average(values, ['n', 'sources'], list(MEASURES.values()))
    summary = summary.set_index(['n', 'sources'])
    single = summary['fd'].xs(1, level='sources')
    summary['single - multi, % of single'] = 100 * summary['single - multi'].div(single, level='n')
    return summary.reset_index()


def show(summary: pd.DataFrame):
    """Prints the averages."""
    shown = studies.texts(summary, ['n', 'sources'], MEASURES, '.0f')
    shown['gain %'] = studies.plus_minus(summary, 'single - multi, % of single', '', '+.0f')
    print('\nFrechet distance of pixels to held-out digits, mean ± 95% interval over seeds:\n'
          + shown.to_string(index=False))


@studies.styled
def draw(results: pd.DataFrame):
    """Distance in thousands against the number of sources, a panel for each n; thin lines are the
    classes, the dotted one the training images."""
    table = results.assign(fd=results['fd'] / 1000, multi=results['sources'] > 1)
    shared = dict(x='sources', y='fd', group='multi', each='class', interval=studies.half_width,
                  labels={False: 'single-source', True: 'multi-source'},
                  xlabel=plotting.LABELS['K'], ylabel='Fréchet distance (thousands)')
    groups = dict(list(table.groupby('n')))
    figure = studies.draw_panels([
        dict(table=rows, title=f'{n} training images of each class', **shared)
        for n, rows in groups.items()], bottom=0)
    for axis, rows in zip(figure.axes, groups.values(), strict=True):
        axis.axhline(rows[TRAINING].mean() / 1000, color='0.4', linestyle=':',
                     label='the training images')
        axis.get_legend().remove()                             # one for all, where no line is
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center',
                  ncols=3)
    return figure


def sample_rows(study: Study, models: list[Model], n: int) -> dict:
    """For each measured class a row of training images, and a row of samples for each number of
    sources (first seed)."""
    rows = {}
    for digit in ORDER[:COMPARED]:
        shown = [model for model in models[::-1] if digit in model.classes
                 and (model.seed, model.n) == (min(study.seeds), n)]
        files = [('data', study.data(model)) for model in shown[:1]]
        files += [(len(model.classes), study.samples_file(model)) for model in shown]
        rows |= {f'{digit}: {title}': studies.pixels(file, digit) for title, file in files}
    return rows


@studies.command(Study, """\b
  # More seeds, longer training, in a folder of its own
  python simulations/digits_multi_source.py --seeds=0-9 --images-per-class=64Ki \\
      --outdir=training-runs/study-long
""")
def main(study):
    """Compares models of one class with models of many, on handwritten digits.

    Writes results.csv (each model and class), summary.csv (means with 95% intervals over seeds),
    study.png and study.svg, samples-n<NUM>.png, report.html, and in models/ a run folder of
    train_edm2.py for each model.
    """
    study.claim()
    models = plan(study)
    make_data(study, models)
    print(f'{len(models)} models, {sum(map(study.duration, models))} training images in all, in '
          f'{study.outdir}', flush=True)
    rows = []
    for model in study.run(run_model, models, study.duration, unit='img', unit_scale=True):
        measured = measure(study, model)
        rows += measured
        text = ', '.join(f'{row["class"]}: {row["fd"]:.0f}' for row in measured)
        tqdm.tqdm.write(f'n={model.n}, {len(model.classes)} source(s), seed {model.seed}: '
                        f'distance of {text}')
    results = pd.DataFrame(rows).sort_values(['seed', 'n', 'sources', 'class'], ignore_index=True)
    summary = summarise(results)
    show(summary)
    grids = {f'samples-n{n}.png': (
        f'Digit and number of sources; {n} training images of each class, seed {min(study.seeds)}',
        sample_rows(study, models, n)) for n in study.nums}
    study.save(draw(results), grids, results=results, summary=summary)


if __name__ == '__main__':
    main()
