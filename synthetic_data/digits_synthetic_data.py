"""Do generated images train better classifiers? The study in miniature, on handwritten digits with few real examples.

For every seed: a few real digits of each class train a diffusion model, which makes many; a classifier of the real digits
selects the ones it is surest of; classifiers on the real digits alone, with the generated and with the selected ones are
compared, trained plainly and against attacks.
"""

import contextlib
import dataclasses
import io
import os
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import tqdm

import train_edm2
from dnnlib import UserError, cli, pictures, util
from simulations import plotting
from synthetic_data import evaluate_data, generate, select_1M
from synthetic_data.mixture import GeneratedImages
from torch_utils import distributed, parallel
from training.data import convert, sources
from training.data.dataset import ImageDataset

CLASSES = 10
LEAST_HELD_OUT = 20   # real digits of a class to test on
LEAST_SPAN = 10       # of an axis of accuracies, in percent
EMA_STD = 0.10
# Runs of some hundreds of steps get further with a higher learning rate than the preset's, which soon falls.
LR, DECAY_STEPS, RAMPUP = 0.06, 60, 0.05   # RAMPUP is a share of the run
# What all classifiers share; digits must not be mirrored.
CLASSIFIER = dict(model='wrn-10-1', normalize=False, share=0.7, batch=64, lr=0.2, rampup=0, momentum=0.9, weight_decay=5e-4,
                  ema=0.99, smoothing=0.1, pad=1, xflip=False, precision='fp32', status=1024, checkpoint=None,
                  attack_steps=10, batch_gpu=None, ls=1.0, bench=True)


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder, and what all of its seeds have in common."""

    outdir: str
    real: int                # real training images of a class
    generated: int           # generated images of a class
    top_scale: float
    generator_duration: int  # training images of the diffusion model
    channels: int
    steps: int
    duration: int            # training images of a classifier
    eps: float
    test_images: int | None  # of the digits that are not trained on; None: all

    def path(self, seed: int, *parts) -> str:
        return os.path.join(self.outdir, f'seed{seed}', *parts)

    def real_data(self, seed):
        return self.path(seed, 'real.zip')

    def test_data(self, seed):
        return self.path(seed, 'test.zip')

    def images(self, seed):
        return self.path(seed, 'generated')

    def selected(self, seed):
        return self.path(seed, 'selected', 'best.npz')

    def network(self, seed):
        return self.path(seed, 'generator', f'network-snapshot-{self.generator_duration // 1000:07d}-{EMA_STD:.3f}.pkl')

    def claim(self):
        """Writes the settings to the folder, or raises UserError if it holds a study with others."""
        util.claim_folder(self.outdir, {key: value for key, value in dataclasses.asdict(self).items() if key != 'outdir'})

    def runs(self, seed: int) -> list[evaluate_data.Run]:
        """The six classifiers of a seed."""
        data = {'real': None, 'generated': self.images(seed), 'selected': self.selected(seed)}
        options = CLASSIFIER | dict(duration=self.duration, eps=self.eps, step_size=self.eps / 4)
        return evaluate_data.plan(self.path(seed, 'classifiers'), self.real_data(seed), self.test_data(seed), data,
                                  evaluate_data.TRAINING, [seed], options)


# --- The steps --------------------------------------------------------------------------------------------------------


def make_data(study: Study, seed: int):
    """Archives of `study.real` digits of each class, drawn by seed, and of all others, to test on."""
    source = sources.open_source('digits')
    if not os.path.exists(study.real_data(seed)):
        convert.convert(source, convert.by_class(source, None, study.real, seed), study.real_data(seed), workers=1)
    if not os.path.exists(study.test_data(seed)):
        rest = convert.by_class(source)
        keep = ~np.isin(rest.indices, convert.by_class(source, None, study.real, seed).indices)
        least = np.bincount(rest.labels[keep]).min()
        if least < LEAST_HELD_OUT:
            raise UserError(f'--real={study.real} leaves {least} images of a class to test on; give at most '
                            f'{study.real + least - LEAST_HELD_OUT}')
        if study.test_images is not None:
            keep[np.random.RandomState(seed).permutation(np.flatnonzero(keep))[study.test_images:]] = False
        rest = dataclasses.replace(rest, indices=rest.indices[keep], labels=rest.labels[keep])
        convert.convert(source, rest, study.test_data(seed), workers=1)


def generator_settings(study: Study, seed: int) -> dict:
    """The settings of train_edm2.py: its preset for digits, in less time."""
    duration = study.generator_duration
    options = dict(preset='digits', outdir='', data=study.real_data(seed), seed=seed, duration=duration,
                   channels=study.channels, lr=LR, decay=DECAY_STEPS, precision='fp32', status=max(duration // 8, 1),
                   snapshot=duration, checkpoint=max(duration // 4, 1))
    context = train_edm2.main.make_context('train_edm2.py', [f'--{key}={value}' for key, value in options.items()])
    return train_edm2.build_config(context.params) | dict(rampup_Mimg=RAMPUP * duration / 1e6, ema_stds=[EMA_STD])


def make_images(task):
    """Trains the diffusion model of a (study, seed) and makes its images, as far as that is not done."""
    study, seed = task
    sink = io.StringIO()  # those that train side by side would talk over each other; log.txt has it all
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        if not os.path.exists(study.network(seed)):
            train_edm2.train(generator_settings(study, seed), study.path(seed, 'generator'))
        if not os.path.exists(study.network(seed)):  # SIGINT and SIGTERM end training with a checkpoint
            raise KeyboardInterrupt
        generate.main.callback(**generate.main.make_context('generate.py', [
            f'--outdir={study.images(seed)}', f'--seeds=0-{study.generated - 1}', f'--steps={study.steps}', '--batch=128',
            f'--class_num={CLASSES}', f'--network={study.network(seed)}']).params)


def select(study: Study, seed: int, classifier: evaluate_data.Run):
    """The best share of the images, by the classifier of the real digits."""
    if os.path.exists(study.selected(seed)):
        return
    folder, name = os.path.split(study.selected(seed))
    with contextlib.redirect_stdout(io.StringIO()):
        select_1M.run(None, os.path.join(classifier.folder, f'network-snapshot-{study.duration // 1000:07d}.pkl'),
                      [study.images(seed)], folder, CLASSES, study.top_scale, 256, name.removesuffix('.npz'))


# --- Results ----------------------------------------------------------------------------------------------------------


def draw(results: pd.DataFrame, eps: float):
    """Clean and robust accuracy (means in colour) of each kind of data, a panel for each kind of training; a line for each
    seed."""
    names = list(evaluate_data.DATA)
    with plotting.plt.rc_context(plotting.STYLE):
        figure, axes = plotting.plt.subplots(2, 2, figsize=(6.2, 4.4), layout='constrained', sharex=True)
        for column, training in enumerate(evaluate_data.TRAINING):
            for row, kind in enumerate(('clean', 'robust')):
                axis = axes[row, column]
                of_training = results[results['training'] == training]
                by_seed = 100 * of_training.pivot(index='seed', columns='data', values=kind).reindex(columns=names)
                for values in by_seed.to_numpy():
                    axis.plot(range(len(names)), values, color='0.75', linewidth=0.8, marker='.', markersize=5)
                means = by_seed.mean()
                axis.plot(range(len(names)), means, 'C0_', markersize=22, markeredgewidth=2.2)
                for place, (mean, highest) in enumerate(zip(means, by_seed.max(), strict=True)):
                    axis.annotate(f'{mean:.1f}', (place, highest), (0, 6), textcoords='offset points', ha='center', color='C0')
                # A difference of a percent is not to look like a large one.
                low, high = by_seed.min(axis=None), by_seed.max(axis=None)
                middle, half = (low + high) / 2, max(0.75 * (high - low), LEAST_SPAN / 2)
                axis.set(ylim=(middle - half, middle + half), xlim=(-0.5, len(names) - 0.5))
                axis.spines[['top', 'right']].set_visible(False)
                if row == 0:
                    axis.set_title(f'{training} training')
                if column == 0:
                    axis.set_ylabel('clean accuracy (%)' if kind == 'clean' else f'under PGD-10, eps {eps:.2g} (%)')
        for axis in axes[1]:
            axis.set_xticks(range(len(names)), [evaluate_data.DATA[name].replace(' + ', '\n+ ') for name in names])
    return figure


def save_samples(study: Study, seed: int, path: str):
    """For each digit a row of real, of generated and of selected images."""
    columns = 12
    data = {'real': ImageDataset(study.real_data(seed)), 'generated': GeneratedImages(study.images(seed), CLASSES),
            'selected': GeneratedImages(study.selected(seed), CLASSES)}
    tiles, titles = [], []
    for digit in range(CLASSES):
        for name, images in data.items():
            found = images.images(np.flatnonzero(images.label_ids == digit)[:columns])
            tiles += [found, np.full((columns - len(found), *found.shape[1:]), 255, np.uint8)]
            titles.append(f'{digit} {name}')
    pictures.save_png(pictures.image_grid(np.concatenate(tiles), columns, titles, min_side=24), path)


def run(study: Study, seeds: list[int], workers: int) -> pd.DataFrame:
    """All steps, as far as they are not done. Returns a row for each classifier."""
    for seed in seeds:
        make_data(study, seed)
    runs = {seed: study.runs(seed) for seed in seeds}
    print(f'1/3 A diffusion model of {study.real} digits of each class, and {study.generated} images of each class from it',
          flush=True)
    for _, seed in parallel.run_side_by_side(make_images, [(study, seed) for seed in seeds], workers):
        tqdm.tqdm.write(f'    seed {seed}: done')
    print('2/3 A classifier of the real digits selects', flush=True)
    first = [one for seed in seeds for one in runs[seed] if (one.data, one.training) == ('real', 'plain')]
    evaluate_data.train_all(first, workers)
    for one in first:
        select(study, one.seed, one)
    print('3/3 Classifiers', flush=True)
    everything = [one for seed in seeds for one in runs[seed]]
    evaluate_data.train_all(sorted(everything, key=lambda one: one.training), workers)
    return evaluate_data.table(everything)


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The study of the page, under 15 minutes on 2 CPU cores
  python synthetic_data/digits_synthetic_data.py
\b
  # More seeds, more real digits, in a folder of its own
  python synthetic_data/digits_synthetic_data.py --seeds=0-9 --real=50 --outdir=training-runs/study-50
\b
The same command goes on with a study that was stopped; what is finished is not made again.""")
@click.option('--outdir', metavar='DIR', default=str(ROOT / 'training-runs' / 'study-synthetic-data'), help='Where results go')
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='0-3', help='Seeds of data, weights, noise and attacks')
@click.option('--real', metavar='INT', type=click.IntRange(min=1), default=10, help='Real training images of each class')
@click.option('--generated', metavar='INT', type=click.IntRange(min=1), default=500, help='Generated images of each class')
@click.option('--top-scale', metavar='SHARE', type=click.FloatRange(0, 1, min_open=True), default=0.2,
              help='Share of the generated images that is selected')
@click.option('--generator-duration', metavar='NIMG', type=cli.COUNT, default='24Ki',
              help='Training images of the diffusion model')
@click.option('--channels', metavar='INT', type=click.IntRange(min=1), default=32, help='Width of the diffusion model')
@click.option('--steps', metavar='INT', type=click.IntRange(min=1), default=8, help='Sampling steps')
@click.option('--duration', metavar='NIMG', type=cli.COUNT, default='8Ki', help='Training images of a classifier')
@click.option('--eps', metavar='FLOAT', type=click.FloatRange(0, 1, min_open=True), default=0.1,
              help='Largest change of a pixel by an attack')
@click.option('--test-images', metavar='INT', type=click.IntRange(min=CLASSES),
              help='Digits to test on, of those that are not trained on  [default: all]')
@click.option('--jobs', 'workers', metavar='INT', type=click.IntRange(min=1),
              help='Models that train at a time  [default: one for each core, up to 8; one on a GPU]')
def main(outdir, seeds, workers, **shared):
    """Compares classifiers on few real digits with those on real and generated ones.

    Writes results.csv (each classifier), summary.csv (means over seeds), study.png, study.svg and samples.png.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError('--seeds: give each number once')
    if min(shared['duration'], shared['generator_duration']) < 1:
        raise UserError('--duration and --generator-duration must be at least 1')
    distributed.init()
    if distributed.get_world_size() > 1:
        raise UserError('this study runs as one command, without torchrun; --jobs sets how many models train at a time')
    # Whole steps, so that the last snapshot has the name that is expected.
    shared['duration'] = -(-shared['duration'] // CLASSIFIER['batch']) * CLASSIFIER['batch']
    shared['generator_duration'] = -(-shared['generator_duration'] // 64) * 64
    study = Study(os.path.realpath(outdir), **shared)
    study.claim()
    try:
        results = run(study, seeds, workers or parallel.default_jobs())
    except KeyboardInterrupt:
        raise UserError('stopped; the same command goes on from here') from None
    summary = evaluate_data.summarise(results)
    evaluate_data.save_table(results, os.path.join(study.outdir, 'results.csv'))
    evaluate_data.save_table(summary, os.path.join(study.outdir, 'summary.csv'))
    plotting.save(draw(results, study.eps), Path(study.outdir, 'study'))
    save_samples(study, seeds[0], os.path.join(study.outdir, 'samples.png'))
    evaluate_data.show(summary, study.eps)
    print(f'\nresults.csv, summary.csv, study.png, study.svg and samples.png are in {study.outdir}')


if __name__ == '__main__':
    main()
