"""When does a diffusion model copy its training set? The study of memorization in miniature, on handwritten digits.

Trains one small network for each size of the data, number of classes and kind of labels, and measures how many of its
samples are copies. The optimal denoiser of the same data is the other extreme: all of its samples are.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import tqdm

import train
from data_utils import common, selection
from dnnlib import UserError, cli, util
from metrics.memorization import find_copies
from simulations import plotting
from torch_utils import distributed, parallel
from training import snapshot
from training.data import convert, sources
from training.data.dataset import ImageDataset
from training.generate import generate_images

LABELS = ('none', 'true', 'random')
# What all networks share. The length of a run is the same for all sizes: a CPU cannot afford the paper's rule, by which
# every image is seen equally often.
OPTIONS = ['--precond=edm', '--num-blocks=1', '--cres=1,2', '--augment=0', '--dropout=0', '--window-size=0',
           '--duration-rule=fixed', '--ema_mode=mode1', '--snap=1', '--dump=1', '--nosubdir']
BATCH = 256  # of sampling


@dataclasses.dataclass(frozen=True)
class Model:
    """One network: on `size` digits of the first `classes` classes, with their labels, random ones or none."""

    size: int
    classes: int = 10
    labels: str = 'none'

    @property
    def name(self) -> str:
        return f'{self.size}-{self.classes}classes-{self.labels}'


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder, and what all its models have in common; only models with the same settings may be compared."""

    outdir: str
    kimg: int
    batch: int
    lr: float
    channels: int
    samples: int
    steps: int
    seed: int

    def path(self, *parts) -> str:
        return os.path.join(self.outdir, *parts)

    def data(self, model: Model) -> str:
        kind = 'random' if model.labels == 'random' else 'true'
        return self.path('data', f'{model.size}-{model.classes}classes-{kind}.zip')

    def run_dir(self, model: Model) -> str:
        return self.path('models', model.name)

    def result(self, model: Model, denoiser: str = 'network') -> str:
        return self.path('models', model.name, f'memorization-{denoiser}.json')

    def claim(self):
        """Writes the settings to the folder, or raises UserError if it holds a study with others."""
        util.claim_folder(self.outdir, {key: value for key, value in dataclasses.asdict(self).items() if key != 'outdir'})


def make_data(study: Study, models: list[Model]):
    """The archives of the models, by the rules of dataset_size.py, dataset_diversity.py and dataset_random.py."""
    source = sources.open_source('digits')
    for model in models:
        dest = study.data(model)
        if os.path.exists(dest):
            continue
        indices = selection.diversity_subset(source.labels, model.size, model.classes)
        if len(indices) < model.size:
            raise UserError(f'--sizes: there are only {len(indices)} digits of {model.classes} classes')
        if model.labels == 'random':
            chosen = common.choose(source, indices, 'random labels', selection.random_labels(model.size, model.classes),
                                   model.classes)
        else:
            chosen = common.choose(source, indices, 'diversity', num_classes=model.classes)
        convert.convert(source, chosen, dest, workers=1)


def settings(study: Study, model: Model) -> dict:
    """The settings of train.py for a model."""
    options = dict(outdir=study.run_dir(model), data=study.data(model), cond=model.labels != 'none', batch=study.batch,
                   duration=study.kimg / 1000, rampup=study.kimg / 20_000, lr=study.lr, seed=study.seed, tick=study.kimg,
                   **{'num-channels': study.channels})
    return train.settings([f'--{key}={value}' for key, value in options.items()] + OPTIONS)


def run_model(study: Study, model: Model):
    """Trains a model and measures it, as far as that is not done. Raises KeyboardInterrupt if it is told to stop."""
    run_dir = study.run_dir(model)
    net_path = os.path.join(run_dir, f'network-snapshot-{study.kimg:07d}.pkl')
    sink = io.StringIO()  # models that train side by side would talk over each other; log.txt has it all
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        if not os.path.exists(net_path):
            train.train(settings(study, model), run_dir, nosubdir=True)
    if not os.path.exists(net_path):  # SIGINT and SIGTERM end training with a checkpoint
        raise KeyboardInterrupt
    measure(study, model, 'network', net_path)
    if model.labels == 'none':
        measure(study, model, 'optimal', f'optimal:{study.data(model)}')


def measure(study: Study, model: Model, denoiser: str, net: str):
    """Counts the copies among the samples of a network, and writes the result and a picture of copies."""
    if os.path.exists(study.result(model, denoiser)):
        return
    loaded = snapshot.load_snapshot(net, distributed.get_device())
    training = ImageDataset(study.data(model))
    made = generate_images(loaded.net, loaded.encoder, range(study.samples), batch=BATCH,
                           sampler=dict(name='edm', num_steps=study.steps))
    copies = find_copies(((batch.seeds, batch.images) for batch in made), training, keep=24)
    copies.save_picture(os.path.splitext(study.result(model, denoiser))[0] + '.png', training)
    util.write_json(study.result(model, denoiser), dataclasses.asdict(model) | dict(denoiser=denoiser) | copies.results())


def collect(study: Study, models: list[Model]) -> pd.DataFrame:
    """A row for each model and denoiser: size, classes, labels, denoiser, memorization_ratio, mean_distance, num_images."""
    rows = []
    for model in models:
        for denoiser in ('network', 'optimal')[:2 if model.labels == 'none' else 1]:
            with open(study.result(model, denoiser)) as file:
                rows.append(json.load(file))
    return pd.DataFrame(rows).sort_values(['denoiser', 'classes', 'labels', 'size'], ignore_index=True)


def curves(results: pd.DataFrame) -> dict:
    """{panel: {label of a curve: rows}}."""
    network, optimal = (results[results['denoiser'] == name] for name in ('network', 'optimal'))
    ten, unlabelled = network[network['classes'] == 10], network[network['labels'] == 'none']
    names = {'none': 'no labels', 'true': 'true labels', 'random': 'random labels'}
    return {
        'Size of the data': {
            'network': ten[ten['labels'] == 'none'], 'optimal denoiser': optimal[optimal['classes'] == 10]},
        'Number of classes': {
            f'{count} class' + 'es' * (count > 1): rows for count, rows in unlabelled.groupby('classes')},
        'Labels': {names[kind]: ten[ten['labels'] == kind] for kind in LABELS if (ten['labels'] == kind).any()},
    }


def draw(results: pd.DataFrame):
    """Memorization ratio against size, a panel for each factor."""
    panels = curves(results)
    with plotting.plt.rc_context(plotting.STYLE):
        figure, axes = plotting.plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.4), sharey=True)
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for (label, rows), color, marker in zip(lines.items(), ('#0072B2', '#D55E00', '#009E73', '#CC79A7'), 'osD^',
                                                    strict=False):
                axis.plot(rows['size'], 100 * rows['memorization_ratio'], color=color, marker=marker, label=label)
            sizes = sorted(results['size'].unique())
            axis.set(xscale='log', xlabel='Training images', title=title, ylim=(-4, 104))
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.spines[['top', 'right']].set_visible(False)
            axis.legend(frameon=False)
        axes[0].set_ylabel('Memorized samples (%)')
    return figure


def plan(sizes: list[int], counts: list[int]) -> list[Model]:
    """All models: every size with each number of classes (as far as there are digits) and each kind of labels."""
    if any(size % 10 or size < 10 for size in sizes) or len(sizes) < 2:
        raise UserError('--sizes: give at least two multiples of 10')
    if any(not 1 <= count <= 10 for count in counts):
        raise UserError('--classes: give numbers from 1 to 10')
    models = [Model(size, labels=labels) for size in sizes for labels in LABELS]
    models += [Model(size, count) for size in sizes for count in counts if count != 10 and size <= 170 * count]
    return models


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The study of the page, under 15 minutes on 2 CPU cores
  python data_utils/digits_memorization.py
\b
The same command goes on with a study that was stopped; finished models are not trained again.
""")
@click.option('--outdir', metavar='DIR', default=str(ROOT / 'training-runs' / 'study-memorization'), help='Where results go')
@click.option('--sizes', metavar='LIST', type=cli.INT_LIST, default='20,50,100', help='Training images')
@click.option('--classes', metavar='LIST', type=cli.INT_LIST, default='1,3', help='Numbers of classes, besides 10')
@click.option('--kimg', metavar='KIMG', type=click.IntRange(min=1), default=30, help='Thousands of images that a model sees')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=32, help='Images of one step')
@click.option('--lr', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=2e-3, help='Learning rate')
@click.option('--channels', metavar='INT', type=click.IntRange(min=2), default=16, help='Width of the network')
@click.option('--samples', metavar='INT', type=click.IntRange(min=24), default=256, help='Images that a model generates')
@click.option('--steps', metavar='INT', type=click.IntRange(min=1), default=12, help='Sampling steps')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, help='Seed of weights, data order and noise')
@click.option('--jobs', metavar='INT', type=click.IntRange(min=1),
              help='Models that train at a time  [default: one for each core, up to 8; one on a GPU]')
def main(outdir, sizes, classes, jobs, **shared):
    """Measures memorization of handwritten digits against size, number of classes and labels.

    Writes results.csv, study.png and study.svg, and in models/ a run folder of train.py for each model with a picture of
    its most memorized samples.
    """
    models = plan(sizes, classes)
    distributed.init()
    if distributed.get_world_size() > 1:
        raise UserError('this study runs as one command, without torchrun; --jobs sets how many models train at a time')
    study = Study(os.path.abspath(outdir), **shared)
    study.claim()
    make_data(study, models)
    print(f'{len(models)} models of {study.kimg},000 training images each, in {study.outdir}', flush=True)
    try:
        for _ in tqdm.tqdm(parallel.run_side_by_side(functools.partial(run_model, study), models, jobs or
                                                     parallel.default_jobs()), total=len(models), unit='model'):
            pass
    except KeyboardInterrupt:
        raise UserError('stopped; the same command goes on from here') from None
    results = collect(study, models)
    with util.atomic_path(study.path('results.csv')) as temp:
        results.to_csv(temp, index=False, float_format='%.6g', lineterminator='\n')
    plotting.save(draw(results), Path(study.path('study')))
    table = results.assign(ratio=np.round(100 * results['memorization_ratio'], 1))
    print('\nMemorized samples (%):')
    print(table.pivot_table(index=['denoiser', 'classes', 'labels'], columns='size', values='ratio').to_string(na_rep='-'))
    print(f'\nWrote results.csv and study.png to {study.outdir}')


if __name__ == '__main__':
    main()
