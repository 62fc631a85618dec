"""Do generated images train better classifiers? In miniature, on digits with few real examples.

For every seed: a few real digits of each class train a diffusion model, which makes many; a
classifier of the real digits selects the ones it is surest of; classifiers on the real digits
alone, with the generated and with the selected ones are compared, trained plainly and against
attacks.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import tqdm

from dnnlib import cli, lazy, options, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from synthetic_data import evaluate_data, generate, select_1M
    from synthetic_data.mixture import GeneratedImages
    from training.snapshot import snapshot_name

import studies
from studies import WHOLE, compared, setting
from synthetic_data import train_classifier
from training.data.dataset import ImageDataset

CLASSES = 10
LEAST_SPAN = 10       # of an axis of accuracies, in percent
BATCH = 64            # of the diffusion model and of classifiers
# What all classifiers share; digits must not be mirrored.
CLASSIFIER = {'model': 'wrn-10-1', 'batch': BATCH, 'ema': 0.99, 'pad': 1, 'xflip': False,
              'precision': 'fp32', 'status': 1024, 'checkpoint': 0}
SHARE = cli.Number(0, 1, min_open=True)


def whole_batches(text: str) -> int:
    """A number of training images, rounded up: the last snapshot is then of that name."""
    count = util.parse_count(text)
    if count < 1:
        raise ValueError('must be at least 1')
    return -(-count // BATCH) * BATCH


NIMG = cli.Parsed('count', whole_batches)


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0-3', 'Seeds of data, weights, noise and attacks')
    real: WHOLE = setting(10, 'Real training images of each class')
    generated: WHOLE = setting(500, 'Generated images of each class')
    top_scale: SHARE = setting(0.2, 'Share of the generated images that is selected')
    generator_duration: NIMG = setting('24Ki', 'Training images of the diffusion model')
    channels: WHOLE = setting(32, 'Width of the diffusion model')
    steps: WHOLE = setting(8, 'Sampling steps')
    duration: NIMG = setting('8Ki', 'Training images of a classifier')
    eps: SHARE = setting(0.1, 'Largest change of a pixel by an attack')
    test_images: click.IntRange(min=CLASSES) = setting(
        None, 'Digits to test on, of those that are not trained on  [default: all]')
    grid = dict(columns=12, min_side=24)

    def check(self):
        studies.split(self.real, self.seeds[0], 'real')

    def of(self, seed: int, *parts) -> str:
        return self.path(f'seed{seed}', *parts)

    def data(self, seed: int) -> dict:
        """What classifiers of a seed train on, besides the real digits."""
        return {'real': None, 'generated': self.of(seed, 'generated'),
                'selected': self.of(seed, 'selected', 'best.npz')}

    def runs(self, seed: int) -> list[evaluate_data.Run]:
        """The six classifiers of a seed."""
        real = self.of(seed, 'real.zip')
        shared = options.training_values(train_classifier.main, studies.arguments(CLASSIFIER | {
            'outdir': '', 'data': real, 'duration': self.duration, 'eps': self.eps,
            'step-size': self.eps / 4}))
        return evaluate_data.plan(self.of(seed, 'classifiers'), real, self.of(seed, 'test.zip'),
                                  self.data(seed), evaluate_data.TRAINING, [seed], shared)


# --- The steps -----------------------------------------------------------------------------------


def make_data(study: Study, seed: int):
    """Archives of `study.real` digits of each class, drawn by seed, and of others, to test on."""
    real, rest = studies.split(study.real, seed, 'real')
    chosen = np.sort(np.random.RandomState(seed).permutation(len(rest))[:study.test_images])
    test = dataclasses.replace(rest, indices=rest.indices[chosen], labels=rest.labels[chosen])
    studies.make_archive(study, study.of(seed, 'real.zip'), real)
    studies.make_archive(study, study.of(seed, 'test.zip'), test)


def make_images(study: Study, seed: int):
    """Trains a diffusion model and makes its images, as far as that is not done."""
    duration = study.generator_duration
    network = studies.edm2_network(study.of(seed, 'generator'), studies.edm2_settings(
        study.of(seed, 'real.zip'), duration, seed=seed, channels=study.channels, batch=BATCH,
        checkpoint=max(duration // 4, 1)))
    args = studies.arguments(dict(
        outdir=study.of(seed, 'generated'), seeds=f'0-{study.generated - 1}', batch=128,
        steps=study.steps, class_num=CLASSES, network=network))
    with studies.silence():
        generate.main.callback(**generate.main.make_context('generate.py', args).params)


def select(study: Study, classifier: evaluate_data.Run):
    """The best share of the images, by a classifier of the real digits."""
    network = os.path.join(classifier.folder, snapshot_name(study.duration))
    data = study.data(classifier.seed)
    studies.make(data['selected'], select_1M.run, None, network, [data['generated']],
                 os.path.dirname(data['selected']), CLASSES, study.top_scale, 256, 'best')


# --- Results -------------------------------------------------------------------------------------


def draw(results: pd.DataFrame, eps: float):
    """Clean and robust accuracy of each kind of data, a panel for each kind of training: a line
    for each seed, means in colour."""
    panels = []
    ticks = {name: label.replace(' + ', '\n+ ') for name, label in evaluate_data.DATA.items()}
    for kind, label in (('clean', 'clean accuracy (%)'),
                        ('robust', f'under PGD-10, eps {eps:.2g} (%)')):
        percent = 100 * results[kind]
        # A difference of a percent is not to look like a large one.
        middle = (percent.min() + percent.max()) / 2
        half = max(0.6 * np.ptp(percent), LEAST_SPAN / 2)
        panels += [dict(
            table=rows.assign(percent=percent), x='data', y='percent', group='training',
            labels={training: None}, each='seed', ticks=ticks, ylabel=label,
            title=f'{training} training' if kind == 'clean' else '',
            ylim=(middle - half, middle + half))
            for training in evaluate_data.TRAINING
            if len(rows := results[results['training'] == training])]
    return studies.draw_panels(panels, rows=2)


def sample_rows(study: Study, seed: int) -> dict:
    """For each digit a row of real, of generated and of selected images."""
    data = {name: GeneratedImages(path, CLASSES) if path
            else ImageDataset(study.of(seed, 'real.zip'), channels=3)   # as generated ones have
            for name, path in study.data(seed).items()}
    return {f'{digit} {name}': studies.pixels(images, digit)
            for digit in range(CLASSES) for name, images in data.items()}


@studies.command(Study, """\b
  # More seeds, more real digits, in a folder of its own
  python synthetic_data/digits_synthetic_data.py --seeds=0-9 --real=50 \\
      --outdir=training-runs/study-50
""")
def main(study):
    """Compares classifiers on few real digits with those on real and generated ones.

    Writes results.csv (each classifier), summary.csv (means over seeds), study.png, study.svg and
    samples.png and report.html.
    """
    study.claim()
    for seed in study.seeds:
        make_data(study, seed)
    print(f'1/3 A diffusion model of {study.real} digits of each class, and {study.generated} '
          'images of each class from it', flush=True)
    for seed in study.run(make_images, study.seeds, disable=True):
        tqdm.tqdm.write(f'    seed {seed}: done')
    print('2/3 A classifier of the real digits selects', flush=True)
    runs = [run for seed in study.seeds for run in study.runs(seed)]
    first = [run for run in runs if (run.data, run.training) == ('real', 'plain')]
    evaluate_data.train_all(first, study.jobs)
    for run in first:
        select(study, run)
    print('3/3 Classifiers', flush=True)
    evaluate_data.train_all(sorted(runs, key=lambda run: run.training), study.jobs)
    results = evaluate_data.table(runs)
    summary = evaluate_data.summarise(results)
    evaluate_data.show(summary, study.eps)
    study.save(draw(results, study.eps), {'samples.png': (
        f'The first of each kind, seed {study.seeds[0]}', sample_rows(study, study.seeds[0]))},
               results=results, summary=summary)


if __name__ == '__main__':
    main()
