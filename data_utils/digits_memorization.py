"""When does a diffusion model copy its training set? In miniature, on handwritten digits.

Trains small networks on 20 to 150 digits, with one factor changed at a time, and measures how many
of their samples are copies. The optimal denoiser of the same data is the other extreme: all of its
samples are.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from data_utils import common, selection
from dnnlib import UserError, cli, lazy, options, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from metrics.memorization import find_copies
    from training import phema, recipe
    from training.checkpoint import Checkpoints
    from training.diffusion.heldout import loss_of_snapshot
    from training.generate import open_generator
    from training.snapshot import load_snapshot, read_snapshot, snapshot_name

import studies
import train
from data_utils import capacity  # has imports that wait too
from metrics.shares import with_intervals
from studies import WHOLE, compared, setting
from training.data.dataset import ImageDataset

# What all networks share. The learning rate is constant after the first steps, and the average of
# weights covers a share of the images seen: a run on its way is what a shorter run ends as.
OPTIONS = ['--num-blocks=1', '--cres=1,2', '--augment=0', '--dropout=0', '--window-size=0',
           '--duration-rule=fixed', '--ema_mode=mode1', '--snap=1', '--dump=1', '--nosubdir']
RAMPUP = 1                                                     # kimg, of the learning rate
SHOWN = 24                                                     # copies in a picture
HELD_OUT = 200                                                 # digits, at most
MORE = """\b
  # The study of the page in full
  python data_utils/digits_memorization.py --seeds=0-4 --sizes=10,20,30,50,70,100,150 \\
      --factors=labels,classes,length,width,loss,average
"""
WATCHED = 30                                                   # images of a base, on its way
COURSE = (0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1)                   # after these shares of it


@dataclasses.dataclass(frozen=True)
class Model:
    """One network: the draw of a seed of `size` digits of `classes` classes; `labels`: none, true,
    random, or unique; `width`: channels in parts of those of the base."""

    seed: int
    size: int
    classes: int = 10
    labels: str = 'none'
    width: float = 1
    precond: str = 'edm'

    @property
    def name(self) -> str:
        changed = [f'-{field.name}-{getattr(self, field.name)}'
                   for field in dataclasses.fields(self)[2:]
                   if getattr(self, field.name) != field.default]
        return f'seed{self.seed}-{self.size}{"".join(changed)}'


@dataclasses.dataclass(frozen=True)
class Variant:
    """The base with one factor changed, at some sizes.

    fields    of the models
    length    size -> length of training, in parts of that of the base
    denoiser  what is measured. ema: the network with the usual average of its weights; last: with
              the last ones; long: with the mean of the averages at 1/2, 3/4 and 1 of the run;
              optimal: no network, but the optimal denoiser of its data
    """

    title: str
    sizes: tuple
    fields: dict = dataclasses.field(default_factory=dict)
    length: Callable = lambda size: 1
    denoiser: str = 'ema'

    def models(self, study, seed: int) -> list[Model]:
        return [Model(seed, size, **self.fields) for size in self.sizes if size in study.sizes]


SIZES = (10, 20, 30, 50, 70, 100, 150)
SMALL = (10, 20, 30)
LONG = (1 / 2, 3 / 4, 1)
FACTORS = {
    'base': [Variant('base', SIZES), Variant('optimal denoiser', SIZES, denoiser='optimal')],
    'labels': [Variant(f'{labels} labels', sizes, dict(labels=labels)) for labels, sizes in (
        ('true', (20, 30)), ('random', (20, 30, 50)), ('unique', (50, 100)))],
    'classes': [Variant('3 classes', (10, 20), dict(classes=3)),
                Variant('1 class', (10, 20), dict(classes=1))],
    'length': [
        Variant('half the length', SMALL, length=lambda size: 1 / 2),
        Variant('twice the length', (30, 50), length=lambda size: 2),
        Variant('equal epochs', (10, 20, 30, 50), length=lambda size: size / 30)],
    'width': [Variant('half the channels', (10, 20), dict(width=0.5)),
              Variant('twice the channels', (30,), dict(width=2))],
    'loss': [Variant('flow matching', (20, 30), dict(precond='flow'))],
    'average': [Variant('no average', SMALL, denoiser='last'),
                Variant('longer average', SMALL, denoiser='long')]}
VARIANTS = {variant.title: variant for variants in FACTORS.values() for variant in variants}


# What is expected of one variant against another, see `capacity.verdict`.
CLAIMS = {
    ('true labels', 'base'): 'more', ('random labels', 'base'): 'more',
    ('unique labels', 'base'): 'more', ('random labels', 'true labels'): 'more',
    ('unique labels', 'random labels'): 'more', ('3 classes', 'base'): 'less',
    ('1 class', 'base'): 'less', ('1 class', '3 classes'): 'less',
    ('half the length', 'base'): 'less', ('twice the length', 'base'): 'more',
    ('equal epochs', 'base'): 'other', ('half the channels', 'base'): 'less',
    ('twice the channels', 'base'): 'more', ('flow matching', 'base'): 'other',
    ('no average', 'base'): 'same', ('longer average', 'base'): 'same'}
# Fewer copies at the second size than at the first.
FALLS = {'base': (20, 150), 'equal epochs': (10, 50)}


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0-2', 'Draws of the training images, with weights, order and '
                                   'noise')
    sizes: cli.INT_LIST = compared('10,20,30,50',
                                   f'Training images, of {",".join(map(str, SIZES))}')
    factors: cli.Parsed('list', lambda text: text.split(',')) = compared(
        'labels,classes', f'What is changed, of {",".join(list(FACTORS)[1:])}')
    kimg: WHOLE = setting(20, 'Thousands of images that a model of the base sees')
    batch: WHOLE = setting(64, 'Images of one step')
    lr: options.POSITIVE = setting(4e-3, 'Learning rate')
    channels: click.IntRange(min=4) = setting(16, 'Width of the network')
    samples: click.IntRange(min=SHOWN) = setting(256, 'Images that a model generates')
    sampling_steps: WHOLE = setting(12, 'Sampling steps; twice as many of flow matching')

    @property
    def variants(self) -> list[Variant]:
        return [variant for factor in ('base', *self.factors) for variant in FACTORS[factor]]

    def check(self):
        with tempfile.TemporaryDirectory() as folder, util.renamed_fields(num_channels='channels'):
            trial = dataclasses.replace(self, outdir=folder)
            for model in {model.width: model for model in plan(trial)}.values():
                make_data(trial, [model])
                recipe.new_network(train.prepare(settings(trial, model))[2])

    def kimg_of(self, share: float) -> int:
        """A share of the length of the base, in whole thousands of images."""
        return max(round(share * self.kimg), 1)

    def points(self, model: Model) -> dict[int, set]:
        """What is measured of a model, {kimg: denoisers}, in ascending order."""
        shares = {(share, 'ema') for share in COURSE if model == Model(model.seed, WATCHED)}
        for variant in self.variants:
            if model in variant.models(self, model.seed):
                shares.add((variant.length(model.size), variant.denoiser))
                shares |= {(share, '') for share in LONG if variant.denoiser == 'long'}
        lengths = sorted({self.kimg_of(share) for share, _ in shares})
        return {kimg: {denoiser for share, denoiser in shares if self.kimg_of(share) == kimg}
                - {''} for kimg in lengths}

    def data(self, model: Model) -> str:
        kind = model.labels if model.labels in ('random', 'unique') else 'true'
        name = f'seed{model.seed}-{model.size}-{model.classes}classes-{kind}.zip'
        return self.path('data', name)

    def held_out(self, model: Model) -> str:
        return self.path('data', f'seed{model.seed}-{model.classes}classes-held-out.zip')

    def network(self, model: Model, kimg: int) -> str:
        images = -(-kimg * 1000 // self.batch) * self.batch    # steps are whole batches
        return os.path.join(self.run_dir(model), snapshot_name(images))

    def result(self, model: Model, kimg: int, denoiser: str, suffix: str = '.json') -> str:
        return os.path.join(self.run_dir(model), f'memorization-{kimg}-{denoiser}{suffix}')


def plan(study: Study) -> list[Model]:
    """All models, seed by seed. Raises UserError for lists that make no comparison."""
    if len(study.sizes) < 2 or not set(study.sizes) <= set(SIZES):
        raise UserError(f'give at least two of {",".join(map(str, SIZES))}', 'sizes')
    if not set(study.factors) <= set(FACTORS) - {'base'}:
        raise UserError(f'give some of {",".join(list(FACTORS)[1:])}', 'factors')
    return list(dict.fromkeys(model for seed in study.seeds for variant in study.variants
                              for model in variant.models(study, seed)))


def drawn(seed: int, size: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the digits that a seed draws, others of those classes in the seed's order). A
    larger set contains a smaller one. The classes begin with that of the seed's last digit."""
    order = np.random.RandomState(seed).permutation(len(studies.digits().labels))
    labels = (studies.digits().labels[order] - seed) % 10
    ours = selection.diversity_subset(labels, size, classes)
    others = np.setdiff1d(np.flatnonzero(labels < classes), ours)
    return order[ours], order[others]


def make_data(study: Study, models: list[Model]):
    """The archives, by the rules of dataset_size.py, dataset_diversity.py, dataset_random.py and
    dataset_unique.py, and for each seed digits that no model of it sees."""
    for model in models:
        indices, _ = drawn(model.seed, model.size, model.classes)
        rule = ['diversity']
        if model.labels == 'random':
            rule = ['random labels', selection.random_labels(model.size, 10, model.seed), 10]
        elif model.labels == 'unique':
            rule = ['unique labels', range(model.size), model.size]
        studies.make_archive(study, study.data(model),
                             common.choose(studies.digits(), indices, *rule))
        largest = max(size for variant in VARIANTS.values() for size in variant.sizes
                      if variant.fields.get('classes', 10) == model.classes)
        _, others = drawn(model.seed, largest, model.classes)
        studies.make_archive(study, study.held_out(model), common.choose(
            studies.digits(), others[:HELD_OUT], 'held out'))


def settings(study: Study, model: Model, kimg: int | None = None) -> dict:
    """The settings of train.py for a model, up to so many thousand images."""
    return train.settings(OPTIONS + studies.arguments({
        'outdir': study.run_dir(model), 'data': study.data(model), 'cond': model.labels != 'none',
        'precond': model.precond, 'batch': study.batch, 'lr': study.lr, 'seed': model.seed,
        'duration': (kimg or study.kimg) / 1000, 'rampup': RAMPUP / 1000, 'tick': 10**6,
        'num-channels': round(study.channels * model.width)}))


def run_model(study: Study, model: Model):
    """Trains a model and measures it on its way, as far as that is not done."""
    for kimg, denoisers in study.points(model).items():
        studies.make(study.network(model, kimg), train.train,
                     settings(study, model, kimg), study.run_dir(model), nosubdir=True)
        for denoiser in sorted(denoisers):
            studies.make(study.result(model, kimg, denoiser), measure, study, model, kimg,
                         denoiser)


def open_denoiser(study: Study, model: Model, kimg: int, denoiser: str):
    """The snapshot of what is measured, see `Variant`."""
    if denoiser == 'optimal':
        return load_snapshot(f'optimal:{study.data(model)}')
    snapshot = load_snapshot(study.network(model, kimg))
    if denoiser == 'last':
        checkpoints = Checkpoints(study.run_dir(model))
        path = checkpoints.path(checkpoints.number(snapshot.nimg))
        snapshot.net.load_state_dict(checkpoints.load(path)['net'])
    if denoiser == 'long':
        states = [read_snapshot(study.network(model, study.kimg_of(share)))['state']
                  for share in LONG]
        names = dict(snapshot.net.named_parameters())
        mean, = phema.combine(states, np.full([len(LONG), 1], 1 / len(LONG)), names)
        snapshot.net.load_state_dict(mean)
    return snapshot


def measure(study: Study, model: Model, kimg: int, denoiser: str):
    """Counts the copies among samples of a network, and its loss on images that it has not seen;
    writes the result and a picture of copies."""
    training = ImageDataset(study.data(model))
    snapshot = open_denoiser(study, model, kimg, denoiser)
    count = study.sampling_steps * (2 if model.precond == 'flow' else 1)
    generator = open_generator(snapshot, sampler=dict(num_steps=count))
    batches = generator.images(range(study.samples), batch=256)
    copies = find_copies(((batch.seeds, batch.images) for batch in batches), training, keep=SHOWN)
    results = with_intervals(copies.results())
    if model.labels in ('none', 'true') and denoiser != 'optimal':
        loss, _ = loss_of_snapshot(snapshot, study.held_out(model))
        results |= loss().results()
    if kimg == study.kimg:
        copies.save_picture(study.result(model, kimg, denoiser, '.png'), training)
    util.write_json(study.result(model, kimg, denoiser), results)


# --- Results -------------------------------------------------------------------------------------


def read(study: Study, model: Model, kimg: int, denoiser: str) -> dict:
    """The columns of a measurement."""
    results = json.loads(Path(study.result(model, kimg, denoiser)).read_text())
    return {'seed': model.seed, 'size': model.size, 'kimg': kimg} | results


def collect(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row for each variant, size and seed, a row for each time at which a model of the base was
    measured)."""
    rows = [{'variant': variant.title} | read(
                study, model, study.kimg_of(variant.length(model.size)), variant.denoiser)
            for variant in study.variants for seed in study.seeds
            for model in variant.models(study, seed)]
    course = [read(study, model, kimg, 'ema') for seed in study.seeds
              for model in VARIANTS['base'].models(study, seed)
              for kimg, denoisers in study.points(model).items() if 'ema' in denoisers]
    return pd.DataFrame(rows), pd.DataFrame(course)


def shares(results: pd.DataFrame) -> pd.DataFrame:
    """Percent of copies with their intervals, to be printed: a row for each variant, a column for
    each size."""
    name = 'memorization_ratio'
    table = studies.average(results[['variant', 'size', name]], ['variant', 'size'], [name])
    text = studies.plus_minus(table, name, studies.interval_column(name), '.0f', 100)
    return table.assign(text=text).pivot(index='variant', columns='size', values='text').reindex(
        results['variant'].unique())


@studies.command(Study, MORE)
def main(study):
    """Measures how many handwritten digits a network memorizes, against one factor at a time.

    Writes results.csv (a row for each variant, size and seed), course.csv (the base on its way),
    capacities.csv, summary.csv, effects.csv and turns.csv, study.png and study.svg, report.html,
    and in models/ a run folder of train.py for each model with a picture of its most memorized
    samples.
    """
    study.claim()
    models = plan(study)
    make_data(study, models)
    print(f'{len(models)} models of {study.kimg},000 images each, in {study.outdir}', flush=True)
    for _ in study.run(run_model, models, unit='model'):
        pass
    results, course = collect(study)
    table = capacity.capacities(results)
    summary = capacity.summarise(table)
    turns = capacity.turns(course)
    effects = pd.concat([
        capacity.effects(results, table, CLAIMS), capacity.falls(results, FALLS),
        capacity.copies_and_loss(turns, WATCHED)], ignore_index=True)
    print(f'\nCopies (%):\n{shares(results).to_string(na_rep="")}')
    for title, rows in (('Training images of which so many samples are copies', summary),
                        ('What an interval says', effects)):
        print(f'\n{title}:\n{rows.to_string(index=False, na_rep="", float_format="%.3g")}')
    study.save(capacity.draw(results, summary, course, WATCHED), results=results, course=course,
               capacities=table, summary=summary, effects=effects, turns=turns)


if __name__ == '__main__':
    main()
