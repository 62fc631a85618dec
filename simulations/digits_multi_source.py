"""Does training on several similar sources beat training on each alone? In miniature, on real
data.

EDM2 models of one class of handwritten digits against conditional models of several, of n images
of each class: the loss on held-out digits of a class, at its best over training, and the advantage
of many classes against their number, against n and against how alike they are.
"""

import dataclasses
import functools
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import tqdm

from dnnlib import UserError, budget, cli, lazy, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    import train_edm2
    from training.diffusion.heldout import heldout_loss, loss_of_snapshot, open_fitting, plain_loss
    from training.generate import open_generator
    from training.loop import Output
    from training.snapshot import load_snapshot

import studies
from simulations import advantage
from studies import WHOLE, compared, setting
from training.data import convert
from training.data.images import save_npz_images

# Similar classes first: the three whose mean images are the closest, then always the one closest
# to those before it (mean Euclidean distance between mean images).
ORDER = (3, 8, 9, 5, 1, 2, 7, 4, 0, 6)
TARGETS = ORDER[:3]                                            # are measured of larger models
MOST = 100                                                     # of a class; others are held out
LOSSES, SAMPLES, VALIDATED = 'losses.json', 'samples.npz', 'validation.jsonl'
PARTS = 'validation', 'test'
VALIDATION = 3                                                 # each third of those held out
POSITIVE = click.FloatRange(0, min_open=True)


@dataclasses.dataclass(frozen=True)
class Model:
    """One network to train: on n images, chosen by seed, of each of the classes."""

    seed: int
    n: int
    classes: tuple[int, ...]

    @property
    def label(self) -> str:
        return '-'.join(map(str, self.classes))

    @property
    def name(self) -> str:
        return f'seed{self.seed}-n{self.n}-{self.label}'

    @property
    def measured(self) -> tuple[int, ...]:
        """The classes that are compared with models of one class."""
        return self.classes if len(self.classes) <= len(TARGETS) else TARGETS


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    n: WHOLE = compared(20, 'Training images of each class, where --nums does not vary them')
    sources: cli.INT_LIST = compared('3,10', 'Numbers of classes of the larger models, which are '
                                     f'the first of {",".join(map(str, ORDER))}')
    nums: cli.INT_LIST = compared('10,20,50', 'Training images of each class, for 3 classes')
    triples: click.IntRange(2, 120) = compared(
        3, 'Sets of 3 classes, at even ranks from the most to the least alike of all 120')
    seeds: cli.INT_LIST = compared('0-2', 'Seeds of data, weights, noise and samples')
    share: click.FloatRange(0, 1, min_open=True) = setting(
        0.4, 'Batch, as a share of the training images')
    lr: POSITIVE = setting(0.1, 'Reference learning rate')
    channels: WHOLE = setting(16, 'Width of the network')
    every: WHOLE = setting(25, 'Steps from one loss on validation digits to the next')
    patience: WHOLE = setting(4, 'Training ends after so many of them without a lower one')
    most_steps: WHOLE = setting(800, 'Training ends after so many steps at the latest')
    samples: click.IntRange(min=studies.Study.grid['columns']) = setting(
        128, 'Images that are generated and measured of a class')
    steps: WHOLE = setting(8, 'Sampling steps')

    def check(self):
        plan(self)

    def data(self, model: Model) -> str:
        return self.path('data', f'{model.name}.zip')

    def held_out(self, seed: int, digit: int, part: str) -> str:
        """Of a class; `part`: one of PARTS."""
        return self.path('data', f'seed{seed}-{part}-{digit}.zip')

    def file(self, model: Model, name: str) -> str:
        return os.path.join(self.run_dir(model), name)

    def best(self, model: Model, digit) -> str:
        return self.file(model, f'network-best-{digit}.pkl')


@functools.cache
def distances() -> np.ndarray:
    """Euclidean distance between the mean images of all pairs of classes [10,10], of all digits;
    pixels are 0 to 255."""
    selection = convert.by_class(studies.digits())
    pixels = np.stack([np.asarray(studies.digits().picture(int(i)), float)
                       for i in selection.indices])
    means = np.stack([pixels[selection.labels == digit].mean(0) for digit in range(10)])
    return np.linalg.norm((means[:, None] - means).reshape(10, 10, -1), axis=-1)


def distance(classes) -> float:
    """Mean distance between the mean images of the pairs of some classes."""
    return float(np.mean([distances()[pair] for pair in itertools.combinations(classes, 2)]))


def triples(count: int) -> list[tuple[int, ...]]:
    """Sets of three classes, at even ranks of all 120 by distance, the most alike first."""
    ranked = sorted(itertools.combinations(range(10), 3), key=distance)
    return [ranked[round(rank)] for rank in np.linspace(0, len(ranked) - 1, count)]


def cells(study: Study) -> dict[str, list[tuple]]:
    """The larger models of each panel of the figure: {panel: [(x, n, classes), ...]}."""
    return {'sources': [(count, study.n, ORDER[:count]) for count in sorted(study.sources)],
            'n': [(n, n, ORDER[:3]) for n in sorted(study.nums)],
            'distance': [(distance(classes), study.n, classes)
                         for classes in triples(study.triples)]}


def plan(study: Study) -> list[Model]:
    """All models, seed by seed. Raises UserError for lists that make no comparison."""
    if min(study.sources) < 2 or max(study.sources) > len(ORDER):
        raise UserError(f'give numbers of classes from 2 to {len(ORDER)}', 'sources')
    for option, values in (('nums', study.nums), ('n', [study.n])):
        if min(values) < 2 or max(values) > MOST:
            raise UserError(f'give 2 to {MOST} images of a class: the others are held out', option)
    models = []
    for seed in study.seeds:
        larger = [Model(seed, n, classes) for _, n, classes in sum(cells(study).values(), [])]
        single = [Model(seed, model.n, (digit,)) for model in larger for digit in model.measured]
        models += dict.fromkeys(single + larger)
    return models


def held_out(seed: int, digit: int) -> dict:
    """{part: selection} of the digits of a class that no model of a seed is trained on: a third to
    choose the moment of training by, and those that the loss is then measured on."""
    _, rest = studies.split(MOST, seed, 'nums', [digit])
    chosen = np.arange(len(rest.indices)) % VALIDATION == 0
    return {part: dataclasses.replace(rest, indices=rest.indices[keep], labels=rest.labels[keep])
            for part, keep in zip(PARTS, (chosen, ~chosen), strict=True)}


def make_data(study: Study, models: list[Model]):
    """Archives of training images and of held-out digits."""
    for model in models:
        studies.make_archive(study, study.data(model), convert.by_class(
            studies.digits(), model.classes, model.n, model.seed))
    for seed, digit in {(model.seed, digit) for model in models for digit in model.measured}:
        for part, selection in held_out(seed, digit).items():
            studies.make_archive(study, study.held_out(seed, digit, part), selection)


def settings(study: Study, model: Model) -> dict:
    """The settings of train_edm2.py, such that models of one n differ in their sources alone.

    The batch is a share of the training images, so that a step has as many images of a class
    whatever the number of classes, and an image is seen as often whatever n; a step has the same
    learning rate and average in all models.
    """
    batch = max(1, round(study.share * model.n)) * len(model.classes)
    return studies.edm2_settings(
        study.data(model), study.most_steps * batch, batch=batch, seed=model.seed, lr=study.lr,
        channels=study.channels, snapshot=0, checkpoint=0)


def run_model(study: Study, model: Model):
    """Trains a model, measures it at its best and saves its samples, as far as that is not
    done."""
    studies.make(study.file(model, LOSSES), measure_losses, study, model)
    studies.make(study.file(model, SAMPLES), save_samples, study, model)
    for path in Path(study.run_dir(model)).glob('training-state-*'):
        path.unlink()                                          # nothing goes on from it any more


@dataclasses.dataclass(eq=False)
class Moments:
    """What `recipe.fit` takes to watch a run: the loss on validation digits of each class, a row
    {'nimg', class: loss} of validation.jsonl each time, and the averaged network of the lowest.
    The run ends when no class has got better for `patience` rows.
    """

    study: Study
    model: Model

    def start(self, trainer) -> 'Moments':
        self.trainer = trainer
        self.path = self.study.file(self.model, VALIDATED)
        self.digits = {str(digit): open_fitting(
            self.study.held_out(self.model.seed, digit, 'validation'), trainer.net,
            trainer.snapshot['encoder'], trainer.recipe.dataset) for digit in self.model.measured}
        return self

    def prepare(self):
        """Nothing to do before the first step."""

    def output(self) -> Output:
        return Output(self.study.every * self.trainer.recipe.batch, self.measure, self.exists,
                      ends=self.ends)

    def rows(self) -> list[dict]:
        """Those up to now."""
        rows = read_rows(self.path) if os.path.exists(self.path) else []
        return [row for row in rows if row['nimg'] <= self.trainer.nimg]

    def measure(self, number: int, nets):
        trainer = self.trainer
        [(net, _, std)] = trainer.ema.get(trainer.net)
        rows = [row for row in self.rows() if row['nimg'] < number]
        new = {'nimg': number}
        for digit, dataset in self.digits.items():
            loss = heldout_loss(net, plain_loss(net, trainer.recipe.loss),
                                trainer.snapshot['encoder'], dataset, seed=self.model.seed)
            new[digit] = float(loss.of_images.mean())
            if all(new[digit] < row[digit] for row in rows):
                trainer.save_average(self.study.best(self.model, digit), net, std)
        util.write_bytes(self.path, b''.join(
            util.to_json(row).encode() + b'\n' for row in [*rows, new]))

    def exists(self, number: int) -> bool:
        return any(row['nimg'] == number for row in self.rows())

    def ends(self) -> str:
        rows = self.rows()
        lowest = [best_row(rows, digit) for digit in self.digits]
        late = rows and len(rows) - 1 - max(lowest) >= self.study.patience
        return 'the loss on validation digits gets no better' if late else ''


def read_rows(path: str) -> list[dict]:
    return [row for _, row in budget.json_lines(path)]


def best_row(rows: list[dict], digit) -> int:
    """Index of the first row with the lowest loss of a class."""
    return min(range(len(rows)), key=lambda i: rows[i][str(digit)], default=0)


def measure_losses(study: Study, model: Model):
    """Trains, and writes the loss on test digits of each class {class: loss} of the averaged
    network that was the best on validation digits of this class."""
    if not train_edm2.train(settings(study, model), study.run_dir(model),
                            watch=Moments(study, model)):
        return
    losses = {}
    for digit in model.measured:
        snapshot = load_snapshot(study.best(model, digit))
        loss, _ = loss_of_snapshot(snapshot, study.held_out(model.seed, digit, 'test'))
        losses[digit] = loss(seed=model.seed).results()['heldout']
    util.write_json(study.file(model, LOSSES), losses)


def save_samples(study: Study, model: Model):
    """An .npz of the samples and their digits, which calculate_metrics.py reads too."""
    seeds = range(model.seed * study.samples, (model.seed + 1) * study.samples)
    samples = []
    for digit in model.measured:
        generator = open_generator(study.best(model, digit), class_=digit,
                                   sampler=dict(num_steps=study.steps))
        samples += [batch.images.cpu() for batch in generator.images(seeds, batch=256)]
    save_npz_images(study.file(model, SAMPLES), np.concatenate(samples),
                    np.repeat(model.measured, study.samples))


def measure(study: Study, model: Model) -> list[dict]:
    """A row for each measured class of a finished model: its loss, how far its mean image is from
    those of the other classes of the model, its Frechet distance, and the steps to its best moment
    and to the end of training."""
    losses = budget.read_json(study.file(model, LOSSES))
    rows = read_rows(study.file(model, VALIDATED))
    steps = [row['nimg'] // settings(study, model)['batch'] for row in rows]
    return [{'seed': model.seed, 'n': model.n, 'classes': model.label,
             'sources': len(model.classes), 'class': digit, 'loss': losses[str(digit)],
             'distance': np.mean([distances()[digit, other] for other in model.classes
                                  if other != digit] or np.nan),
             'fd': studies.pixel_distance(study.file(model, SAMPLES),
                                          study.held_out(model.seed, digit, 'test'), digit),
             'best step': steps[best_row(rows, digit)], 'steps': steps[-1]}
            for digit in model.measured]


def sample_rows(study: Study) -> dict:
    """For each target a row of training images, and a row of samples for each number of sources
    (first seed)."""
    larger = [Model(study.seeds[0], n, classes) for _, n, classes in cells(study)['sources']]
    rows = {}
    for digit in TARGETS:
        shown = [Model(study.seeds[0], study.n, (digit,)),
                 *(model for model in larger if digit in model.measured)]
        if len(shown) > 1:
            files = [('data', study.data(shown[0]))]
            files += [(len(model.classes), study.file(model, SAMPLES)) for model in shown]
            rows |= {f'{digit}: {title}': studies.pixels(file, digit) for title, file in files}
    return rows


@studies.command(Study, """\b
  # The larger study of the page, in a folder of its own
  python simulations/digits_multi_source.py --seeds=0-5 --sources=3,5,10 --nums=10,20,50,100 \\
      --triples=5 --outdir=training-runs/study-multi-source-long
""")
def main(study):
    """Compares models of one class with models of many, on handwritten digits.

    Writes results.csv (each model and class), advantages.csv (each class of a larger model, paired
    with the model of that class alone), summary.csv and slopes.csv (means with 95% intervals over
    seeds), study.png and study.svg, samples.png, report.html, and in models/ a run folder of
    train_edm2.py for each model.
    """
    study.claim()
    models = plan(study)
    make_data(study, models)
    print(f'{len(models)} models, in {study.outdir}', flush=True)
    rows = []
    for model in study.run(run_model, models, unit='model'):
        measured = measure(study, model)
        rows += measured
        text = ', '.join(f'{row["class"]}: {row["loss"]:.4f} (step {row["best step"]})'
                         for row in measured)
        tqdm.tqdm.write(f'{model.name}: {text} of {measured[0]["steps"]}')
    results = pd.DataFrame(rows).sort_values(['seed', 'n', 'sources', 'classes', 'class'],
                                             ignore_index=True)
    paired = advantage.pair(results)
    panels = advantage.panels(paired, cells(study))
    summary = advantage.summarise(paired)
    slopes = advantage.slopes(panels)
    advantage.show(summary, slopes, results)
    grids = {'samples.png': (
        f'Digit and number of sources; {study.n} training images of each class, '
        f'seed {study.seeds[0]}', sample_rows(study))}
    study.save(advantage.draw(panels, study.n), grids, results=results, advantages=paired,
               summary=summary, slopes=slopes)


if __name__ == '__main__':
    main()
