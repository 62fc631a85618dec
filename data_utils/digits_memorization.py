"""When does a diffusion model copy its training set? In miniature, on handwritten digits.

Trains one small network for each size of the data, number of classes and kind of labels, and
measures how many of its samples are copies. The optimal denoiser of the same data is the other
extreme: all of its samples are.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import pandas as pd

import studies
import train
from data_utils import common, selection
from dnnlib import UserError, cli, util
from metrics.memorization import find_copies
from torch_utils import distributed
from training import snapshot
from training.data import sources
from training.data.dataset import ImageDataset
from training.generate import generate_images

LABELS = {'none': 'no labels', 'true': 'true labels', 'random': 'random labels'}
# What all networks share. The length of a run is the same for all sizes: a CPU cannot afford the
# paper's rule, by which every image is seen equally often.
OPTIONS = ['--precond=edm', '--num-blocks=1', '--cres=1,2', '--augment=0', '--dropout=0',
           '--window-size=0', '--duration-rule=fixed', '--ema_mode=mode1', '--snap=1', '--dump=1',
           '--nosubdir']
SHOWN = 24                                                     # copies in a picture


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
    sizes: list = studies.compared('20,50,100', cli.INT_LIST, 'Training images')
    classes: list = studies.compared('1,3', cli.INT_LIST, 'Numbers of classes, besides 10')
    kimg: int = studies.setting(30, studies.WHOLE, 'Thousands of images that a model sees')
    batch: int = studies.setting(32, studies.WHOLE, 'Images of one step')
    lr: float = studies.setting(2e-3, studies.POSITIVE, 'Learning rate')
    channels: int = studies.setting(16, click.IntRange(min=2), 'Width of the network')
    samples: int = studies.setting(
        256, click.IntRange(min=SHOWN), 'Images that a model generates')
    steps: int = studies.setting(12, studies.WHOLE, 'Sampling steps')
    seed: int = studies.setting(0, click.IntRange(min=0), 'Seed of weights, data order and noise')

    def data(self, model: Model) -> str:
        kind = 'random' if model.labels == 'random' else 'true'
        return self.path('data', f'{model.size}-{model.classes}classes-{kind}.zip')

    def result(self, model: Model, denoiser: str, suffix: str = '.json') -> str:
        return os.path.join(self.run_dir(model), f'memorization-{denoiser}{suffix}')


def plan(study: Study) -> list[Model]:
    """All models: every size with each number of classes (as far as there are digits) and each
    kind of labels. Raises UserError for lists that make no comparison."""
    if any(size % 10 or size < 10 for size in study.sizes) or len(study.sizes) < 2:
        raise UserError('give at least two multiples of 10', 'sizes')
    if any(not 1 <= count <= 10 for count in study.classes):
        raise UserError('give numbers from 1 to 10', 'classes')
    models = [Model(size, labels=labels) for size in study.sizes for labels in LABELS]
    models += [Model(size, count) for size in study.sizes for count in study.classes
               if count != 10 and size <= 170 * count]
    return models


def make_data(study: Study, models: list[Model]):
    """The archives, by the rules of dataset_size.py, dataset_diversity.py and
    dataset_random.py."""
    source = sources.open_source('digits')
    for model in models:
        indices = selection.diversity_subset(source.labels, model.size, model.classes)
        if len(indices) < model.size:
            raise UserError(f'there are only {len(indices)} digits of {model.classes} classes',
                            'sizes')
        rule = ('diversity', None)
        if model.labels == 'random':
            rule = ('random labels', selection.random_labels(model.size, model.classes))
        chosen = common.choose(source, indices, *rule, model.classes)
        studies.make_archive(study.data(model), source, chosen)


def settings(study: Study, model: Model) -> dict:
    """The settings of train.py for a model."""
    options = {
        'outdir': study.run_dir(model), 'data': study.data(model), 'cond': model.labels != 'none',
        'batch': study.batch, 'duration': study.kimg / 1000, 'rampup': study.kimg / 20_000,
        'lr': study.lr, 'seed': study.seed, 'tick': study.kimg, 'num-channels': study.channels}
    return train.settings([f'--{key}={value}' for key, value in options.items()] + OPTIONS)


def run_model(study: Study, model: Model):
    """Trains a model and measures it, as far as that is not done."""
    run_dir = study.run_dir(model)
    network = os.path.join(run_dir, snapshot.snapshot_name(study.kimg * 1000))
    studies.make(network, lambda: train.train(settings(study, model), run_dir, nosubdir=True))
    for denoiser in model.denoisers:
        net = network if denoiser == 'network' else f'optimal:{study.data(model)}'
        studies.make(study.result(model, denoiser), measure, study, model, denoiser, net)


def measure(study: Study, model: Model, denoiser: str, net: str):
    """Counts the copies among samples of a network; writes the result and a picture of copies."""
    loaded = snapshot.load_snapshot(net, distributed.get_device())
    training = ImageDataset(study.data(model))
    batches = generate_images(loaded.net, loaded.encoder, range(study.samples), batch=256,
                              sampler=dict(name='edm', num_steps=study.steps))
    copies = find_copies(((batch.seeds, batch.images) for batch in batches), training, keep=SHOWN)
    copies.save_picture(study.result(model, denoiser, '.png'), training)
    util.write_json(study.result(model, denoiser),
                    dataclasses.asdict(model) | dict(denoiser=denoiser) | copies.results())


def collect(study: Study, models: list[Model]) -> pd.DataFrame:
    """A row for each model and denoiser: size, classes, labels, denoiser, memorization_ratio,
    mean_distance, num_images."""
    rows = [json.loads(Path(study.result(model, denoiser)).read_text())
            for model in models for denoiser in model.denoisers]
    return pd.DataFrame(rows).sort_values(['denoiser', 'classes', 'labels', 'size'],
                                          ignore_index=True)


@studies.styled
def draw(results: pd.DataFrame):
    """Memorization ratio against size, a panel for each factor."""
    unlabelled = results['labels'] == 'none'
    ten = results['classes'] == 10
    network = results['denoiser'] == 'network'
    counts = {count: f'{count} class' + 'es' * (count > 1)
              for count in sorted(set(results['classes']))}
    panels = [
        ('Size of the data', unlabelled & ten, 'denoiser',
         {'network': 'network', 'optimal': 'optimal denoiser'}),
        ('Number of classes', unlabelled & network, 'classes', counts),
        ('Labels', network & ten, 'labels', LABELS)]
    sizes = sorted(set(results['size']))
    table = results.assign(percent=100 * results['memorization_ratio'])
    figure, axes = studies.plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.4),
                                        sharey=True)
    for axis, (title, chosen, column, labels) in zip(axes, panels, strict=True):
        studies.draw_lines(axis, table[chosen], 'size', 'percent', column, labels)
        axis.set(xscale='log', xlabel='Training images', title=title, ylim=(-4, 104))
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.legend()
    axes[0].set_ylabel('Memorized samples (%)')
    return figure


@studies.command(Study, 'study-memorization', 'data_utils/digits_memorization.py')
def main(study):
    """Measures memorization of handwritten digits against size, number of classes and labels.

    Writes results.csv, study.png and study.svg, and in models/ a run folder of train.py for each
    model with a picture of its most memorized samples.
    """
    models = plan(study)
    study.claim()
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
