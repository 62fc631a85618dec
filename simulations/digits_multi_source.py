"""Does training on several similar sources beat training on each alone? The question on real data, in miniature.

For n handwritten digits of each class, one EDM2 model of a single class against conditional models of several classes:
Frechet distance, for each class, between samples and real digits that no model has seen.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
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
from metrics import compute, frechet, images, statistics
from simulations import plotting, tables
from torch_utils import distributed, parallel
from training import snapshot
from training.data import convert, sources
from training.data.images import open_images
from training.generate import generate_images

# Similar classes first: the three whose mean images are the closest, then always the one closest to those before it
# (mean Euclidean distance between mean images).
ORDER = (3, 8, 9, 5, 1, 2, 7, 4, 0, 6)
COMPARED = 3          # the first classes of the order are measured
LEAST_HELD_OUT = 20   # real digits of a class to measure against
# Runs of some hundreds of steps get further with a higher learning rate than the preset's, which soon falls.
LR, DECAY_STEPS, RAMPUP = 0.06, 60, 0.05   # RAMPUP is a share of the run
EMA_STD = 0.10
GRID_COLUMNS = 12
SPACE = 'fd_pixels'


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
class Study:
    """A folder, and what all its models have in common; only models with the same settings may be compared."""

    outdir: str
    most: int                # images of a class that some model may see: the others are held out
    images_per_class: int
    batch_per_class: int
    channels: int
    samples: int
    steps: int

    def path(self, *parts) -> str:
        return os.path.join(self.outdir, *parts)

    def data(self, model: Model) -> str:
        return self.path('data', f'{model.name}.zip')

    def held_out(self, seed: int) -> str:
        return self.path('data', f'seed{seed}-held-out.zip')

    def run_dir(self, model: Model) -> str:
        return self.path('models', model.name)

    def samples_file(self, model: Model) -> str:
        return self.path('models', model.name, 'samples.npz')

    def finished(self, model: Model) -> bool:
        return os.path.isfile(self.samples_file(model))

    def duration(self, model: Model) -> int:
        """Training images of a model. A multiple of the batch, so that every model takes the same number of steps."""
        return -(-self.images_per_class // self.batch_per_class) * self.batch_per_class * len(model.classes)

    def claim(self):
        """Writes the settings to the folder, or raises UserError if it holds a study with others."""
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key != 'outdir'}
        util.claim_folder(self.outdir, settings, {'most': 'largest of --nums'})


# Data


def make_data(study: Study, models: list[Model]):
    """Archives of training images, and for each seed of those images that are in no training set of that seed."""
    source = sources.open_source('digits')
    for seed in {model.seed for model in models}:
        if not os.path.exists(study.held_out(seed)):
            chosen = convert.by_class(source, list(ORDER), study.most, seed)
            rest = convert.by_class(source, list(ORDER))
            keep = ~np.isin(rest.indices, chosen.indices)
            rest = dataclasses.replace(rest, indices=rest.indices[keep], labels=rest.labels[keep])
            least = np.bincount(rest.labels).min()
            if least < LEAST_HELD_OUT:
                raise UserError(f'--nums={study.most} leaves {least} images of a class to measure against; give at most '
                                f'{study.most + least - LEAST_HELD_OUT}')
            convert.convert(source, rest, study.held_out(seed), workers=1)
    for model in models:
        if not os.path.exists(study.data(model)):
            selection = convert.by_class(source, list(model.classes), model.n, model.seed)
            convert.convert(source, selection, study.data(model), workers=1)


# One model


def settings(study: Study, model: Model) -> dict:
    """The settings of train_edm2.py, such that models differ in their sources alone.

    Batch and duration are proportional to the number of classes: every model takes the same number of steps, with the
    same number of images of a class in each on average, and so learning rates and averages are the same step by step.
    """
    duration = study.duration(model)
    options = dict(preset='digits', outdir=study.run_dir(model), data=study.data(model), seed=model.seed, duration=duration,
                   batch=study.batch_per_class * len(model.classes), channels=study.channels, lr=LR, decay=DECAY_STEPS,
                   precision='fp32', status=max(duration // 4, 1), snapshot=duration, checkpoint=0)
    context = train_edm2.main.make_context('train_edm2.py', [f'--{key}={value}' for key, value in options.items()])
    config = train_edm2.build_config(context.params)
    return config | dict(rampup_Mimg=RAMPUP * duration / 1e6, ema_stds=[EMA_STD])


def run_model(study: Study, model: Model):
    """Trains a model and saves its samples, as far as that is not done. Raises KeyboardInterrupt if it is told to stop.

    Samples: uint8 [N,H,W,3] `arr_0` with their digits `arr_1`, which calculate_metrics.py reads too.
    """
    net_path = os.path.join(study.run_dir(model),
                            f'network-snapshot-{study.duration(model) // 1000:07d}-{EMA_STD:.3f}.pkl')
    sink = io.StringIO()  # models that train side by side would talk over each other; log.txt has it all
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        if not os.path.exists(net_path):
            train_edm2.train(settings(study, model), study.run_dir(model))
        if not os.path.exists(net_path):  # SIGINT and SIGTERM end training with a checkpoint
            raise KeyboardInterrupt
    loaded = snapshot.load_snapshot(net_path, distributed.get_device())
    made, digits = [], []
    seeds = range(model.seed * study.samples, (model.seed + 1) * study.samples)
    for digit in model.measured:
        for batch in generate_images(loaded.net, loaded.encoder, seeds, labels=model.classes.index(digit), batch=256,
                                     num_steps=study.steps):
            made.append(batch.images.cpu().numpy().transpose(0, 2, 3, 1))
            digits += [digit] * len(batch.images)
    with util.atomic_path(study.samples_file(model)) as temp, open(temp, 'wb') as file:
        np.savez_compressed(file, arr_0=np.concatenate(made), arr_1=np.array(digits))


def run_models(study: Study, models: list[Model], jobs: int):
    """Runs the models that are not finished, `jobs` at a time, and yields each one that is. The longest go first."""
    models = sorted(models, key=lambda model: (study.finished(model), -len(model.classes), model.seed))
    waiting = [model for model in models if not study.finished(model)]
    yield from models[len(waiting):]
    yield from parallel.run_side_by_side(functools.partial(run_model, study), waiting, jobs)


# Numbers


def gaussian_of(opened, digit: int) -> statistics.Gaussian:
    """Mean and covariance of the pixels of one digit of opened images (see `metrics.images`)."""
    detectors = compute.Detectors(device='cpu')
    return compute.measure_images(opened, detectors, class_name=digit, spaces=[SPACE]).gaussians[SPACE]


def distance(path: str, digit: int, reference: statistics.Gaussian) -> float:
    """Frechet distance of the images of one digit in a file to a reference."""
    found = gaussian_of(open_images(path), digit)
    return frechet.frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)


def measure(study: Study, model: Model) -> list[dict]:
    """A row for each measured class of a finished model: the distances of its samples, and of its training images, to the
    held-out digits."""
    rows = []
    for digit in model.measured:
        reference = gaussian_of(open_images(study.held_out(model.seed)), digit)
        rows.append({
            'seed': model.seed, 'n': model.n, 'sources': len(model.classes), 'class': digit,
            'fd': distance(study.samples_file(model), digit, reference),
            'fd of training images': distance(study.data(model), digit, reference)})
    return rows


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Means over classes and seeds, with half-widths of 95% intervals over seeds (Student's t).

    `single - multi` is the difference to the models of one class at the same seed: positive if many sources help.
    """
    lines = []
    for n, group in results.groupby('n'):
        by_seed = group.groupby(['sources', 'seed'])[['fd', 'fd of training images']].mean()
        single = by_seed.loc[1, 'fd']
        for sources_, values in by_seed.groupby(level='sources'):
            values = values.droplevel('sources')
            line = {'n': n, 'sources': sources_, 'seeds': len(values)}
            for name, column in (('fd', values['fd']), ('single - multi', single - values['fd']),
                                 ('fd of training images', values['fd of training images'])):
                if name == 'single - multi' and sources_ == 1:
                    column = column * np.nan
                line |= {name: column.mean(), tables.interval_column(name): float(tables.half_width(column.to_numpy()))}
            line['single - multi, % of single'] = 100 * line['single - multi'] / single.mean()
            lines.append(line)
    return pd.DataFrame(lines)


def save_table(table: pd.DataFrame, path: str):
    with util.atomic_path(path) as temp:
        table.to_csv(temp, index=False, float_format='%.6g', lineterminator='\n')


def show(summary: pd.DataFrame):
    """Prints the averages."""
    print('\nFrechet distance of pixels to held-out digits, mean ± 95% interval over seeds:')
    print(f'{"n":>6}{"sources":>9}{"distance":>18}{"single - multi":>20}{"gain":>8}{"training images":>18}')
    for _, line in summary.iterrows():
        cells = [f'{line[name]:.0f} ± {line[tables.interval_column(name)]:.0f}'
                 for name in ('fd', 'single - multi', 'fd of training images')]
        alone = line['sources'] == 1
        gain = '-' if alone else f'{line["single - multi, % of single"]:+.0f}%'
        print(f'{line["n"]:6.0f}{line["sources"]:9.0f}{cells[0]:>18}{"-" if alone else cells[1]:>20}{gain:>8}{cells[2]:>18}')


# Pictures


def draw(results: pd.DataFrame, summary: pd.DataFrame):
    """Distance against the number of sources, a panel for each n; thin lines are the classes, named at their right."""
    sizes = sorted(results['n'].unique())
    top = 1.05 * (summary['fd'] + summary[tables.interval_column('fd')].fillna(0)).max() / 1000
    top = max(top, 1.05 * results.groupby(['n', 'sources', 'class'])['fd'].mean().max() / 1000)
    with plotting.plt.rc_context(plotting.STYLE):
        figure, axes = plotting.plt.subplots(1, len(sizes), figsize=(0.6 + 2.9 * len(sizes), 2.7), squeeze=False,
                                             sharey=True)
        for axis, n in zip(axes[0], sizes, strict=True):
            part, line = results[results['n'] == n], summary[summary['n'] == n]
            places = {count: place for place, count in enumerate(line['sources'])}
            ends = []
            for digit, values in part.groupby('class'):
                means = values.groupby('sources')['fd'].mean() / 1000
                axis.plot([places[s] for s in means.index], means, color='0.7', linewidth=0.7, zorder=1)
                ends.append((means.iloc[-1], digit))
            low = -np.inf
            for height, digit in sorted(ends):
                low = max(height, low + 0.05 * top)  # names one above the other, not on each other
                axis.annotate(str(digit), (len(places) - 1, low), (6, 0), textcoords='offset points', color='0.45',
                              fontsize=7, va='center')
            axis.axhline(line['fd of training images'].mean() / 1000, color='0.4', linestyle=':', zorder=1,
                         label='the training images')
            for rows, color, marker, label in (
                    (line[line['sources'] == 1], plotting.SINGLE, 'o', 'single-source'),
                    (line[line['sources'] > 1], plotting.MULTI, 's', 'multi-source')):
                interval = rows[tables.interval_column('fd')].fillna(0) / 1000
                axis.errorbar([places[s] for s in rows['sources']], rows['fd'] / 1000, yerr=interval, color=color,
                              marker=marker, capsize=2, elinewidth=0.8, label=label, zorder=3)
            axis.set(xlabel=plotting.LABELS['K'], title=f'{n} training images of each class', ylim=(0, top))
            axis.set_xticks(list(places.values()), list(places))
            axis.spines[['top', 'right']].set_visible(False)
        axes[0, 0].set_ylabel('Fréchet distance (thousands)')
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
    return figure


def save_sample_grid(study: Study, models: list[Model], n: int, path: str):
    """For each measured class a row of training images, and a row of samples for each number of sources (first seed)."""
    seed = min(model.seed for model in models)
    chosen = [model for model in models if (model.seed, model.n) == (seed, n)]
    tiles, titles = [], []
    for digit in sorted(set(itertools.chain.from_iterable(model.measured for model in chosen)), key=ORDER.index):
        mine = sorted((model for model in chosen if digit in model.classes), key=lambda model: len(model.classes))
        files = [('data', study.data(mine[0]))]
        files += [(len(model.classes), study.samples_file(model)) for model in mine]
        for title, file in files:
            opened = open_images(file)
            row = opened.images(images.select(opened, class_name=digit)[:GRID_COLUMNS])
            blank = np.full((GRID_COLUMNS - len(row), *row.shape[1:]), 255, np.uint8)
            tiles += [row, blank]
            titles.append(f'{digit}: {title}')
    pictures.save_image_grid(path, np.concatenate(tiles), GRID_COLUMNS, titles)


# The study


def plan(nums: list[int], counts: list[int], seeds: list[int]) -> list[Model]:
    """All models. Raises UserError for lists that make no comparison."""
    for option, values in (('--nums', nums), ('--sources', counts), ('--seeds', seeds)):
        if len(set(values)) < len(values):
            raise UserError(f'{option}: give each number once')
    if min(nums) < 2:
        raise UserError('--nums: give at least 2 images of a class')
    if 1 not in counts or len(counts) < 2 or min(counts) < 1 or max(counts) > len(ORDER):
        raise UserError(f'--sources: give 1 and at least one number of classes from 2 to {len(ORDER)}')
    # The classes that all of the larger models share are compared.
    compared = ORDER[:min(COMPARED, *(count for count in counts if count > 1))]
    sets = [(digit,) for digit in compared] + [ORDER[:count] for count in sorted(counts) if count > 1]
    return [Model(seed, n, classes) for seed in seeds for n in sorted(nums) for classes in sets]


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The study of the page, under 15 minutes on 2 CPU cores
  python simulations/digits_multi_source.py
\b
  # More seeds, longer training, in a folder of its own
  python simulations/digits_multi_source.py --seeds=0-9 --images-per-class=64Ki --outdir=training-runs/study-long
\b
The same command goes on with a study that was stopped; finished models are not trained again.
""")
@click.option('--outdir', metavar='DIR', default=str(ROOT / 'training-runs' / 'study-multi-source'), help='Where results go')
@click.option('--nums', metavar='LIST', type=cli.INT_LIST, default='20,100', help='Training images of each class')
@click.option('--sources', 'counts', metavar='LIST', type=cli.INT_LIST, default='1,3,5,10',
              help=f'Numbers of classes of a model, which are the first of {",".join(map(str, ORDER))}')
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='0-2', help='Seeds of data, weights, noise and samples')
@click.option('--images-per-class', metavar='NIMG', type=cli.COUNT, default='2.5Ki',
              help='Training images that a model sees of each of its classes')
@click.option('--batch-per-class', metavar='NIMG', type=click.IntRange(min=1), default=8,
              help='Images of one step, of each class on average')
@click.option('--channels', metavar='INT', type=click.IntRange(min=1), default=16, help='Width of the network')
@click.option('--samples', metavar='INT', type=click.IntRange(min=GRID_COLUMNS), default=256,
              help='Images that are generated and measured of a class')
@click.option('--steps', metavar='INT', type=click.IntRange(min=1), default=12, help='Sampling steps')
@click.option('--jobs', metavar='INT', type=click.IntRange(min=1),
              help='Models that train at a time  [default: one for each core, up to 8; one on a GPU]')
def main(outdir, nums, counts, seeds, jobs, images_per_class, **shared):
    """Compares models of one class with models of many, on handwritten digits.

    Writes results.csv (each model and class), summary.csv (means with 95% intervals over seeds), study.png and study.svg,
    samples-n<NUM>.png, and in models/ a run folder of train_edm2.py for each model.
    """
    models = plan(nums, counts, seeds)
    if images_per_class < 1:
        raise UserError('--images-per-class: give at least 1')
    distributed.init()
    if distributed.get_world_size() > 1:
        raise UserError('this study runs as one command, without torchrun; --jobs sets how many models train at a time')
    study = Study(os.path.abspath(outdir), max(nums), images_per_class, **shared)
    study.claim()
    make_data(study, models)
    total = sum(map(study.duration, models))
    print(f'{len(models)} models, {total} training images in all, in {study.outdir}', flush=True)
    rows = []
    compared = set(models[0].measured).union(*(model.measured for model in models if len(model.classes) == 1))
    try:
        with tqdm.tqdm(total=total, unit='img', unit_scale=True, desc='Training') as bar:
            for model in run_models(study, models, jobs or parallel.default_jobs()):
                found = [row for row in measure(study, model) if row['class'] in compared]
                rows += found
                text = ', '.join(f'{row["class"]}: {row["fd"]:.0f}' for row in found)
                tqdm.tqdm.write(f'n={model.n}, {len(model.classes)} source(s), seed {model.seed}: distance of {text}')
                bar.update(study.duration(model))
    except KeyboardInterrupt:
        raise UserError('stopped; the same command goes on from here') from None
    results = pd.DataFrame(rows).sort_values(['seed', 'n', 'sources', 'class'], ignore_index=True)
    summary = summarise(results)
    save_table(results, study.path('results.csv'))
    save_table(summary, study.path('summary.csv'))
    for n in nums:
        save_sample_grid(study, models, n, study.path(f'samples-n{n}.png'))
    plotting.save(draw(results, summary), Path(study.path('study')))
    show(summary)
    print(f'\nresults.csv, summary.csv, study.png, study.svg and {", ".join(f"samples-n{n}.png" for n in nums)} '
          f'are in {study.outdir}')


if __name__ == '__main__':
    main()
