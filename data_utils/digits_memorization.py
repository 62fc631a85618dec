"""When does a diffusion model copy its training set? In miniature, on handwritten digits.

Trains one small network for each size of the data, number of classes and kind of labels, and
measures how many of its samples are copies. The optimal denoiser of the same data is the other
extreme: all of its samples are.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from data_utils import common, selection
from dnnlib import UserError, cli, lazy, options, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from metrics.memorization import find_copies
    from training import recipe
    from training.generate import open_generator
    from training.snapshot import snapshot_name

import studies
import train
from metrics.shares import with_intervals
from studies import WHOLE, compared, setting
from training.data.dataset import ImageDataset

LABELS = {'none': 'no labels', 'true': 'true labels', 'random': 'random labels'}
# What all networks share. The length of a run is the same for all sizes: a CPU cannot afford the
# paper's rule, by which every image is seen equally often.
OPTIONS = ['--precond=edm', '--num-blocks=1', '--cres=1,2', '--augment=0', '--dropout=0',
           '--window-size=0', '--duration-rule=fixed', '--ema_mode=mode1', '--snap=1', '--dump=1',
           '--nosubdir']
SHOWN = 24                                                     # copies in a picture
LEAST = 174                                                    # digits of a class


@dataclasses.dataclass(frozen=True)
class Model:
    """One network: on `size` digits of the first `classes` classes, with their labels, random ones
    or none."""

    size: int
    classes: int = 10
    labels: str = 'none'

    @property
    def name(self) -> str:
        return f'{self.size}-{self.classes}classes-{self.labels}'

    @property
    def denoisers(self) -> list[str]:
        """What is measured: the network, and once for each set of images their optimal
        denoiser."""
        return ['network', 'optimal'] if self.labels == 'none' else ['network']


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    sizes: cli.INT_LIST = compared('20,50,100', 'Training images')
    classes: cli.INT_LIST = compared('1,3', 'Numbers of classes, besides 10')
    kimg: WHOLE = setting(30, 'Thousands of images that a model sees')
    batch: WHOLE = setting(32, 'Images of one step')
    lr: options.POSITIVE = setting(2e-3, 'Learning rate')
    channels: click.IntRange(min=2) = setting(16, 'Width of the network')
    samples: click.IntRange(min=SHOWN) = setting(256, 'Images that a model generates')
    steps: WHOLE = setting(12, 'Sampling steps')
    seed: click.IntRange(0, 2**31 - 1) = setting(0, 'Seed of weights, data order and noise')

    @property
    def last(self) -> str:
        """Name of the last snapshot: steps are whole batches."""
        return snapshot_name(-(-self.kimg * 1000 // self.batch) * self.batch)

    def check(self):
        with tempfile.TemporaryDirectory() as folder, util.renamed_fields(num_channels='channels'):
            trial = dataclasses.replace(self, outdir=folder)
            models = plan(trial)[:1]
            make_data(trial, models)
            recipe.new_network(train.prepare(settings(trial, *models))[2])

    def data(self, model: Model) -> str:
        kind = 'random' if model.labels == 'random' else 'true'
        return self.path('data', f'{model.size}-{model.classes}classes-{kind}.zip')

    def result(self, model: Model, denoiser: str, suffix: str = '.json') -> str:
        return os.path.join(self.run_dir(model), f'memorization-{denoiser}{suffix}')


def plan(study: Study) -> list[Model]:
    """All models: every size with each number of classes (as far as there are digits) and each
    kind of labels. Raises UserError for lists that make no comparison."""
    if len(study.sizes) < 2 or not set(study.sizes) <= set(range(10, 10 * LEAST + 1, 10)):
        raise UserError(f'give at least two multiples of 10, up to {10 * LEAST}: {LEAST} digits '
                        'of each of the 10 classes', 'sizes')
    if not set(study.classes) <= set(range(1, 11)):
        raise UserError('give numbers from 1 to 10', 'classes')
    return [Model(size, labels=labels) for size in study.sizes for labels in LABELS] + [
        Model(size, count) for size in study.sizes for count in study.classes
        if count != 10 and size <= LEAST * count]


def make_data(study: Study, models: list[Model]):
    """The archives, by the rules of dataset_size.py, dataset_diversity.py and
    dataset_random.py."""
    for model in models:
        indices = selection.diversity_subset(studies.digits().labels, model.size, model.classes)
        rule = ('diversity', None)
        if model.labels == 'random':
            rule = ('random labels', selection.random_labels(model.size, model.classes))
        studies.make_archive(study, study.data(model), common.choose(
            studies.digits(), indices, *rule, model.classes))


def settings(study: Study, model: Model) -> dict:
    """The settings of train.py for a model."""
    return train.settings(OPTIONS + studies.arguments({
        'outdir': study.run_dir(model), 'data': study.data(model), 'cond': model.labels != 'none',
        'batch': study.batch, 'duration': study.kimg / 1000, 'rampup': study.kimg / 20_000,
        'lr': study.lr, 'seed': study.seed, 'tick': study.kimg, 'num-channels': study.channels}))


def run_model(study: Study, model: Model):
    """Trains a model and measures it, as far as that is not done."""
    run_dir = study.run_dir(model)
    network = os.path.join(run_dir, study.last)
    studies.make(network, lambda: train.train(settings(study, model), run_dir, nosubdir=True))
    for denoiser in model.denoisers:
        net = network if denoiser == 'network' else f'optimal:{study.data(model)}'
        studies.make(study.result(model, denoiser), measure, study, model, denoiser, net)


def measure(study: Study, model: Model, denoiser: str, net: str):
    """Counts the copies among samples of a network; writes the result and a picture of copies."""
    training = ImageDataset(study.data(model))
    generator = open_generator(net, sampler=dict(name='edm', num_steps=study.steps))
    batches = generator.images(range(study.samples), batch=256)
    copies = find_copies(((batch.seeds, batch.images) for batch in batches), training, keep=SHOWN)
    copies.save_picture(study.result(model, denoiser, '.png'), training)
    util.write_json(study.result(model, denoiser),
                    dataclasses.asdict(model) | dict(denoiser=denoiser)
                    | with_intervals(copies.results()))


def collect(study: Study, models: list[Model]) -> pd.DataFrame:
    """A row for each model and denoiser: size, classes, labels, denoiser, memorization_ratio,
    mean_distance, num_images."""
    rows = [json.loads(Path(study.result(model, denoiser)).read_text())
            for model in models for denoiser in model.denoisers]
    return pd.DataFrame(rows).sort_values(['denoiser', 'classes', 'labels', 'size'],
                                          ignore_index=True)


def draw(results: pd.DataFrame):
    """Memorization ratio against size, a panel for each factor."""
    unlabelled = results['labels'] == 'none'
    ten = results['classes'] == 10
    network = results['denoiser'] == 'network'
    counts = {count: f'{count} class' + 'es' * (count > 1)
              for count in sorted(set(results['classes']))}
    table = results.assign(percent=100 * results['memorization_ratio'], seed=0)
    shared = dict(x='size', y='percent', ylim=(-4, 104), xlabel='Training images',
                  ylabel='Memorized samples (%)')
    return studies.draw_panels([
        dict(title=title, table=table[chosen], group=group, labels=labels, **shared)
        for title, chosen, group, labels in (
            ('Size of the data', unlabelled & ten, 'denoiser',
             {'network': 'network', 'optimal': 'optimal denoiser'}),
            ('Number of classes', unlabelled & network, 'classes', counts),
            ('Labels', network & ten, 'labels', LABELS))])


@studies.command(Study)
def main(study):
    """Measures memorization of handwritten digits against size, number of classes and labels.

    Writes results.csv, study.png and study.svg, report.html, and in models/ a run folder of
    train.py for each model with a picture of its most memorized samples.
    """
    study.claim()
    models = plan(study)
    make_data(study, models)
    print(f'{len(models)} models of {study.kimg},000 training images each, in {study.outdir}',
          flush=True)
    for _ in study.run(run_model, models, unit='model'):
        pass
    results = collect(study, models)
    table = results.assign(ratio=(100 * results['memorization_ratio']).round(1)).pivot_table(
        'ratio', ['denoiser', 'classes', 'labels'], 'size')
    print(f'\nMemorized samples (%):\n{table.to_string(na_rep="-")}')
    study.save(draw(results), results=results)


if __name__ == '__main__':
    main()
