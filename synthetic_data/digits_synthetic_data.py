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
from studies import WHOLE, compared, setting
from synthetic_data import evaluate_data, gains, train_classifier
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
SHARE = cli.Number(0, 1, min_open=True)


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
    shares: cli.NUMBERS = compared('0.3,0.5,0.9', 'Shares to compare with --share')
    reals: cli.INT_LIST = compared(None, 'Numbers to compare with --real  [default: none]')
    numbers: cli.INT_LIST = compared(None, 'Numbers to compare with --generated  [default: none]')
    generators: NIMG_LIST = compared(
        None, 'Durations to compare with --generator-duration  [default: none]')
    real: WHOLE = setting(10, 'Real training images of each class')
    share: SHARE = setting(0.7, 'Share of generated images in every batch')
    generated: WHOLE = setting(500, 'Generated images of each class')
    top_scale: SHARE = setting(0.2, 'Share of the generated images that is selected')
    generator_duration: NIMG = setting('24Ki', 'Training images of the diffusion model')
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
        if not all(0 < number <= self.generated for number in self.numbers or ()):
            raise UserError(f'give numbers from 1 to {self.generated}, which --generated makes',
                            'numbers')
        for real in self.reals or ():
            studies.split(real, self.seeds[0], 'reals')
        studies.split(self.real, self.seeds[0], 'real')

    @property
    def factors(self) -> dict:
        """{factor: {its value: cell}}: one thing is changed at a time."""
        base = Cell(self.real, self.share, self.generated, 'all', self.generator_duration)
        few = max(round(self.top_scale * self.generated), 1)

        def change(field, values, **others):
            return {value: dataclasses.replace(base, **{field: value}, **others)
                    for value in values}

        def compare(field, values, **others):
            cells = change(field, values or (), **others) | {getattr(base, field): base}
            return dict(sorted(cells.items()))

        return {'share': compare('share', self.shares),
                'real': compare('real', self.reals),
                'number': compare('number', self.numbers, order='random'),
                'selection': change('order', select_1M.ORDERS, number=few),
                'generator': compare('generator', self.generators),
                'training': compare('training', ['plain'])}

    @property
    def cells(self) -> list[Cell]:
        """Each once, those without generated images first: one of them selects."""
        cells = [cell for values in self.factors.values() for cell in values.values()]
        return list(dict.fromkeys([Cell(self.real, training='plain'),
                                   *(cell.alone for cell in cells), *cells]))

    def data(self, seed: int, real: int, name: str) -> str:
        """Path of what belongs to so many real digits of a class."""
        return self.path(f'seed{seed}', f'real{real}', name)

    def pool(self, seed: int, cell: Cell) -> str:
        """The folder of all images of the diffusion model of a cell; with .json, what they are
        like."""
        return self.data(seed, cell.real, f'generated-{cell.generator}')

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
        return evaluate_data.Run(self.path(f'seed{seed}', 'classifiers', cell.name),
                                 cell.name, cell.training, seed, config)


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
        outdir=study.pool(seed, cell), batch=256, seeds=f'0-{study.generated - 1}',
        steps=study.steps, class_num=CLASSES, network=network_of(study, seed, cell)))
    with studies.silence():
        generate.main.callback(**generate.main.make_context('generate.py', args).params)


def measure(study: Study, seed: int, cell: Cell):
    """Writes what a diffusion model is like: its loss on test digits, and the share of its images
    in which a classifier of these digits sees their class."""
    test = ImageDataset(study.data(seed, cell.real, 'test.zip'))
    snapshot = load_snapshot(network_of(study, seed, cell))
    loss, _ = heldout.loss_of_snapshot(snapshot, test.path)
    recognizer = Recognizer(test.images(range(len(test))), test.label_ids)
    made = GeneratedImages(study.pool(seed, cell), CLASSES)
    grey = made.images(range(len(made)))[:, :1]                # three equal channels
    util.write_json(f'{study.pool(seed, cell)}.json', {
        'held-out loss': loss(min(QUALITY_IMAGES, len(test))).losses.mean(),
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
            studies.make(f'{study.pool(seed, cell)}.json', measure, study, seed, cell)
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
        return {name: 100 * accuracy[name] for name in gains.MEASURES}

    rows = []
    for factor, cells in study.factors.items():
        for (value, cell), seed in itertools.product(cells.items(), study.seeds):
            ours = percent(seed, cell)
            alone = percent(seed, cell.alone)
            rows.append({'factor': factor, 'value': value, 'seed': seed} | ours | {
                f'{name} of real images': alone[name] for name in gains.MEASURES} | {
                f'{name} gain': ours[name] - alone[name] for name in gains.MEASURES}
                | budget.read_json(f'{study.pool(seed, cell)}.json'))
    return pd.DataFrame(rows)


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
    summary = gains.summarise(results)
    settled = gains.claims(results)
    shown = studies.texts(summary, ['factor', 'value'], {
        'clean': 'clean', 'gain': 'clean gain', 'attacked': 'robust', 'its gain': 'robust gain',
        'recognised': 'recognised'}, '.1f')
    print(f'\nTest accuracy in %, clean and under PGD with eps {study.eps:.3g}, mean ± 95% '
          'interval over seeds; gain: over real digits alone\n' + shown.to_string(index=False))
    shown = studies.texts(settled, ['claim', 'answer'], {'effect': 'effect'}, '+.1f')
    print('\nEffects in points of accuracy under attack\n' + shown.to_string(index=False))
    first = study.seeds[0]
    study.save(gains.draw(results), {'samples.png': (f'Seed {first}', sample_rows(study, first))},
               results=results, summary=summary, claims=settled)


if __name__ == '__main__':
    main()
