"""Do generated images make classifiers more robust? In miniature, on digits with few real
examples.

For every seed: a few real digits of each class train a diffusion model, which makes many;
classifiers are trained against attacks on the real digits alone and on mixtures of both, of which
one thing is changed at a time: the share of generated images, the number of real ones, the number
of generated ones, which of them are selected, and how long the diffusion model was trained.
"""

import dataclasses
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import tqdm

from dnnlib import UserError, budget, cli, lazy, options, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from metrics.recognition import Recognizer
    from synthetic_data import generate, select_1M
    from synthetic_data.mixture import GeneratedImages
    from training.diffusion import heldout
    from training.snapshot import load_snapshot, snapshot_name

import studies
from studies import WHOLE, compared, interval_column, setting
from synthetic_data import evaluate_data, train_classifier
from training.data.dataset import ImageDataset

CLASSES = 10
BATCH = 64             # of classifiers, half of:
GENERATOR_BATCH = 128
QUALITY_IMAGES = 400  # of the test set, for the held-out loss
# What all classifiers share; digits must not be mirrored. An attack of training has three steps
# of a third of eps, one of the tests ten.
CLASSIFIER = {'model': 'wrn-10-1', 'batch': BATCH, 'ema': 0.99, 'pad': 1, 'xflip': False,
              'precision': 'fp32', 'status': 1024, 'checkpoint': 0, 'attack-steps': 3,
              'test-attack-steps': 10}
MARGIN = 1.0          # percentage points: an effect that is surely smaller does not count
SHARE = cli.Number(0, 1, min_open=True)
MEASURES = {'robust': 'under attack', 'clean': 'clean'}
# Robust accuracy in the colour of the text's main result; clean accuracy paler, behind it.
SERIES = [studies.SERIES[0], dict(color='0.7', marker='s', zorder=2)]
FACTORS = {'share': 'share of generated images', 'real': 'real images of a class',
           'number': 'generated images of a class', 'selection': 'which of them',
           'generator': "diffusion model's\ntraining images"}


def whole_batches(text: str) -> int:
    """A number of training images, rounded up: the last snapshot is then of that name."""
    count = util.parse_count(text)
    if count < 1:
        raise ValueError('must be at least 1')
    return -(-count // GENERATOR_BATCH) * GENERATOR_BATCH


NIMG = cli.Parsed('count', whole_batches)
NIMG_LIST = cli.Parsed('list', lambda text: list(map(whole_batches, text.split(','))))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a classifier is trained on, and how. Without generated images all that is said of them
    is zero.

    real       real images of a class
    share      of every batch that is generated
    number     of generated images of a class
    order      which of those that there are: all, or the best, random or worst ones by
               select_1M.py
    generator  training images of the diffusion model
    training   adversarial or plain
    """

    real: int
    share: float = 0
    number: int = 0
    order: str = 'all'
    generator: int = 0
    training: str = 'adversarial'

    @property
    def alone(self) -> 'Cell':
        """The cell without generated images."""
        return Cell(self.real, training=self.training)

    @property
    def name(self) -> str:
        images = f'-{self.share:g}-{self.number}{self.order}-of{self.generator}' * (self.share > 0)
        return f'{self.training}-n{self.real}{images}'


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0-3', 'Seeds of data, weights, noise and attacks')
    shares: cli.NUMBERS = compared('0.3,0.5,0.7,0.9', 'Shares of generated images to compare')
    reals: cli.INT_LIST = compared('10', 'Numbers of real images of a class to compare')
    numbers: cli.INT_LIST = compared('500', 'Numbers of generated images of a class to compare')
    generators: NIMG_LIST = compared('24Ki', 'Training images of diffusion models to compare')
    real: WHOLE = setting(10, 'Real training images of a class, where that is not compared')
    share: SHARE = setting(0.7, 'Share of generated images, where that is not compared')
    generated: WHOLE = setting(500, 'Generated images of a class that there are')
    top_scale: SHARE = setting(0.2, 'Share of them that is selected')
    generator_duration: NIMG = setting(
        '24Ki', 'Training images of a diffusion model, where that is not compared')
    channels: WHOLE = setting(16, 'Width of the diffusion model')
    steps: WHOLE = setting(8, 'Sampling steps')
    duration: NIMG = setting('16Ki', 'Training images of a classifier')
    eps: SHARE = setting(0.1, 'Largest change of a pixel by an attack')
    test_images: click.IntRange(min=CLASSES) = setting(
        None, 'Digits to test on, of those that are not trained on  [default: all]')
    grid = dict(columns=12, min_side=24)

    def check(self):
        if not all(0 < share <= 1 for share in self.shares):
            raise UserError('give shares above 0, e.g. 0.3,0.7', 'shares')
        if not all(0 < number <= self.generated for number in self.numbers):
            raise UserError(f'give numbers from 1 to {self.generated}, which --generated makes',
                            'numbers')
        for real in self.reals:
            studies.split(real, self.seeds[0], 'reals')
        studies.split(self.real, self.seeds[0], 'real')

    def of(self, seed: int, *parts) -> str:
        return self.path(f'seed{seed}', *parts)

    @property
    def factors(self) -> dict:
        """{factor: {its value: cell}}: one thing is changed at a time."""
        base = Cell(self.real, self.share, self.generated, 'all', self.generator_duration)
        few = max(round(self.top_scale * self.generated), 1)

        def values(compared, of_base):
            return sorted({*compared, of_base})

        changes = {
            'share': {share: dict(share=share) for share in values(self.shares, self.share)},
            'real': {real: dict(real=real) for real in values(self.reals, self.real)},
            'number': {number: dict(number=number, order='random') if number < self.generated
                       else {} for number in values(self.numbers, self.generated)},
            'selection': {order: dict(number=few, order=order) for order in select_1M.ORDERS},
            'generator': {nimg: dict(generator=nimg)
                          for nimg in values(self.generators, self.generator_duration)},
            'training': {'plain': dict(training='plain')}}
        return {factor: {value: dataclasses.replace(base, **change)
                         for value, change in values.items()}
                for factor, values in changes.items()}

    @property
    def cells(self) -> list[Cell]:
        """Each once, those without generated images first: one of them selects."""
        cells = [cell for values in self.factors.values() for cell in values.values()]
        return list(dict.fromkeys([Cell(self.real, training='plain'),
                                   *(cell.alone for cell in cells), *cells]))

    def data(self, seed: int, real: int, *parts) -> str:
        """Path of what belongs to so many real digits of a class."""
        return self.of(seed, f'real{real}', *parts)

    def pool(self, seed: int, cell: Cell) -> str:
        """The folder of all images of the diffusion model of a cell."""
        return self.data(seed, cell.real, f'generated-{cell.generator}')

    def quality(self, seed: int, cell: Cell) -> str:
        """The file of `measure`."""
        return f'{self.pool(seed, cell)}.json'

    def generated_images(self, seed: int, cell: Cell) -> str | None:
        """The generated images of a cell: the folder of all, or an .npz of some of them."""
        if not cell.share:
            return None
        pool = self.pool(seed, cell)
        return pool if cell.order == 'all' else os.path.join(
            f'{pool}-selected', f'{cell.order}-{cell.number}.npz')

    def classifier(self, seed: int, cell: Cell) -> evaluate_data.Run:
        """The training of one cell."""
        settings = options.training_values(train_classifier.main, studies.arguments(CLASSIFIER | {
            'outdir': '', 'data': self.data(seed, cell.real, 'real.zip'),
            'test': self.data(seed, cell.real, 'test.zip'), 'share': cell.share, 'seed': seed,
            'adversarial': cell.training == 'adversarial', 'duration': self.duration,
            'snapshot': self.duration, 'eps': self.eps, 'step-size': self.eps / 3}))
        config = train_classifier.build_config(
            settings | {'generated': self.generated_images(seed, cell)})
        return evaluate_data.Run(self.of(seed, 'classifiers', cell.name), cell.name,
                                 cell.training, seed, config)


# --- The steps of a seed -------------------------------------------------------------------------


def make_data(study: Study, seed: int, real: int):
    """Archives of `real` digits of each class, drawn by seed, and of others, to test on."""
    drawn, rest = studies.split(real, seed, 'reals')
    chosen = np.sort(np.random.RandomState(seed).permutation(len(rest))[:study.test_images])
    test = dataclasses.replace(rest, indices=rest.indices[chosen], labels=rest.labels[chosen])
    for name, digits in (('real', drawn), ('test', test)):
        studies.make_archive(study, study.data(seed, real, f'{name}.zip'), digits)


def network_of(study: Study, seed: int, cell: Cell) -> str:
    """The diffusion model of a cell; it is trained unless it is there."""
    settings = studies.edm2_settings(
        study.data(seed, cell.real, 'real.zip'), cell.generator, seed=seed,
        channels=study.channels, batch=GENERATOR_BATCH, checkpoint=max(cell.generator // 4, 1))
    return studies.edm2_network(
        study.data(seed, cell.real, f'diffusion-{cell.generator}'), settings)


def make_images(study: Study, seed: int, cell: Cell):
    """Trains the diffusion model of a cell and makes its images, as far as that is not done."""
    args = studies.arguments(dict(
        outdir=study.pool(seed, cell), batch=256,
        seeds=f'0-{study.generated - 1}', steps=study.steps, class_num=CLASSES,
        network=network_of(study, seed, cell)))
    with studies.silence():
        generate.main.callback(**generate.main.make_context('generate.py', args).params)


def measure(dest: str, network: str, images: str, test: str):
    """Writes what a diffusion model is like: its loss on test digits, and the share of its images
    in which a classifier of these digits sees their class."""
    digits = ImageDataset(test)
    loss, _ = heldout.loss_of_snapshot(load_snapshot(network), test)
    recognizer = Recognizer(digits.images(range(len(digits))), digits.label_ids)
    made = GeneratedImages(images, CLASSES)
    grey = made.images(range(len(made)))[:, :1]                # three equal channels
    util.write_json(dest, {
        'held-out loss': loss(min(QUALITY_IMAGES, len(digits))).losses.mean(),
        'recognised': 100 * recognizer.recognised(grey, made.label_ids).mean()})


def select(study: Study, seed: int, cell: Cell):
    """Some of the generated images, by a plainly trained classifier of the real digits."""
    judge = study.classifier(seed, Cell(cell.real, training='plain')).folder
    dest = study.generated_images(seed, cell)
    folder, name = os.path.split(dest.removesuffix('.npz'))
    studies.make(dest, select_1M.run, None, os.path.join(judge, snapshot_name(study.duration)),
                 [study.pool(seed, cell)], folder, CLASSES, cell.number / study.generated, 256,
                 name, cell.order, seed)


def run_seed(study: Study, seed: int):
    """All of a seed, as far as it is not done."""
    for cell in study.cells:
        make_data(study, seed, cell.real)
        if cell.share:
            make_images(study, seed, cell)
            studies.make(study.quality(seed, cell), measure, study.quality(seed, cell),
                         network_of(study, seed, cell), study.pool(seed, cell),
                         study.data(seed, cell.real, 'test.zip'))
        if cell.order != 'all':
            select(study, seed, cell)
        classifier = study.classifier(seed, cell)
        if classifier.accuracy is None:
            classifier.train()


# --- Results -------------------------------------------------------------------------------------


def table(study: Study) -> pd.DataFrame:
    """Accuracies in percent, a row for each factor, value and seed, gains over the same training
    without generated images, and what the diffusion model is like."""
    def percent(seed, cell):
        accuracy = study.classifier(seed, cell).accuracy
        return {name: 100 * accuracy[name] for name in MEASURES}

    rows = []
    for factor, cells in study.factors.items():
        for (value, cell), seed in itertools.product(cells.items(), study.seeds):
            ours = percent(seed, cell)
            alone = percent(seed, cell.alone)
            rows.append({'factor': factor, 'value': value, 'seed': seed} | ours | {
                f'{name} of real images': alone[name] for name in MEASURES} | {
                f'{name} gain': ours[name] - alone[name] for name in MEASURES}
                | budget.read_json(study.quality(seed, cell)))
    return pd.DataFrame(rows)


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95% intervals, a row for each factor and value."""
    measured = list(results.columns.drop(['factor', 'value', 'seed']))
    return pd.concat([
        studies.average(rows.drop(columns=['factor', 'seed']), ['value'], measured).assign(
            factor=factor) for factor, rows in results.groupby('factor', sort=False)])


def change(gains: pd.DataFrame) -> pd.Series:
    """What a line through the gains [seeds, values] against the logarithm of the value changes
    from the least value to the largest, for each seed."""
    x = np.log(gains.columns.to_numpy(float))
    x = x - x.mean()
    return gains @ x / (x @ x) * np.ptp(x)


def claims(results: pd.DataFrame) -> pd.DataFrame:
    """The effects in points of robust accuracy, with 95% intervals over seeds, and whether they
    are there: yes if the interval lies above zero, no if it ends below MARGIN."""
    real, number, selection, generator = (
        results[results['factor'] == factor].pivot(index='seed', columns='value',
                                                   values='robust gain')
        for factor in ('real', 'number', 'selection', 'generator'))
    effects = {'generated images help': number.iloc[:, -1]}
    for claim, gains, sign in (('with more real images they help less', real, -1),
                               ('more of them help more', number, 1),
                               ('a longer trained diffusion model helps more', generator, 1)):
        if gains.shape[1] > 1:
            effects[claim] = sign * change(gains)
    for better, worse in itertools.combinations(select_1M.ORDERS, 2):
        effects[f'the {better} are better than {worse} ones'] = (
            selection[better] - selection[worse])
    rows = []
    for claim, effect in effects.items():
        mean, half = effect.mean(), studies.half_width(effect)
        answer = 'yes' if mean - half > 0 else 'no' if mean + half < MARGIN else 'undecided'
        rows.append({'claim': claim, 'effect': mean, interval_column('effect'): half,
                     'seeds': len(effect), 'answer': answer})
    return pd.DataFrame(rows)


def draw(results: pd.DataFrame):
    """Gains with intervals over seeds, a panel for each factor."""
    gains = pd.concat([results.assign(measure=name, gain=results[f'{name} gain'])
                       for name in MEASURES])
    panels = [dict(table=gains[gains['factor'] == factor], x='value', y='gain', group='measure',
                   labels=MEASURES if not number else dict.fromkeys(MEASURES), title=title,
                   interval=studies.half_width, series=SERIES, ylabel='gain of accuracy (points)',
                   ticks={value: f'{value}' if factor != 'generator' else util.format_count(value)
                          for value in results['value'][results['factor'] == factor].unique()})
              for number, (factor, title) in enumerate(FACTORS.items())]
    figure = studies.draw_panels(panels)
    for axis in figure.axes:
        axis.axhline(0, color='0.5', linewidth=0.8, zorder=0)
    return figure


def show(results: pd.DataFrame, eps: float):
    """Prints means and claims."""
    summary = summarise(results)
    shown = studies.texts(summary, ['factor', 'value'], {
        'clean': 'clean', 'gain': 'clean gain', 'attacked': 'robust',
        'its gain': 'robust gain', 'recognised': 'recognised'}, '.1f')
    print(f'\nTest accuracy in %, clean and under PGD with eps {eps:.3g}, mean ± 95% interval '
          f'over seeds; gain: over real digits alone\n{shown.to_string(index=False)}')


def sample_rows(study: Study, seed: int) -> dict:
    """For each digit a row of real images, and of the best, random and worst generated ones."""
    data = {'real': ImageDataset(study.data(seed, study.real, 'real.zip'), channels=3)} | {
        order: GeneratedImages(study.generated_images(seed, cell), CLASSES)
        for order, cell in study.factors['selection'].items()}
    return {f'{digit} {name}': studies.pixels(images, digit)
            for digit in range(CLASSES) for name, images in data.items()}


@studies.command(Study, """\b
  # All of the page
  python synthetic_data/digits_synthetic_data.py --seeds=0-6 --reals=5,20,50 \\
      --numbers=10,30,100 --generators=6Ki,12Ki --outdir=training-runs/study-large
""")
def main(study):
    """Compares classifiers on few real digits with those on real and generated ones.

    Writes results.csv (each classifier), summary.csv (means over seeds), claims.csv, study.png,
    study.svg, samples.png and report.html.
    """
    study.claim()
    print(f'{len(study.cells)} classifiers of each seed, and the generated images that they are '
          'trained on', flush=True)
    for seed in study.run(run_seed, study.seeds, unit='seed'):
        tqdm.tqdm.write(f'seed {seed}: done')
    results = table(study)
    settled = claims(results)
    show(results, study.eps)
    shown = settled.assign(effect=studies.texts(settled, [], {'': 'effect'}, '+.1f'))
    print(f'\nEffects in points of accuracy under attack\n'
          f'{shown[["claim", "effect", "answer"]].to_string(index=False)}')
    study.save(draw(results), {'samples.png': (
        f'Seed {study.seeds[0]}', sample_rows(study, study.seeds[0]))},
               results=results, summary=summarise(results), claims=settled)


if __name__ == '__main__':
    main()
