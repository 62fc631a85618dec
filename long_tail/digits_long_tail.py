"""Does class-balancing training help rare classes? In miniature, on handwritten digits.

Trains on a long tail of the digits, several seeds each: a plain conditional model, a
class-balancing one, and a plain one that is fine-tuned with class-balancing for the last third,
all with the same number of steps; then measures how many samples of each class a classifier
recognises, and how much of the real digits they cover.
"""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import UserError, cli, lazy, options, pictures

with lazy.imports(__name__ == '__main__'):
    import pandas as pd
    import torch

    from long_tail import make_stats
    from training.checkpoint import StepCheckpoints
    from training.encoders import RGBEncoder
    from training.snapshot import load_snapshot

import studies
from long_tail import datasets
from long_tail import main as long_tail
from studies import WHOLE, compared, setting

METHODS = {'plain': 'plain', 'cb': 'class-balancing', 'finetune': 'fine-tuned'}
TAIL = dict(imb_factor=0.05)
RECIPE = [
    # A network that a CPU trains in minutes: two levels of 64 channels, one block at each on the
    # way up. Levels of 32 channels would not see the labels, see training/networks/ddpm.py.
    '--ch=64', '--ch_mult=1', '--ch_mult=1', '--attn=', '--num_res_blocks=0',
    '--data_type=digitslt', *studies.arguments(TAIL), '--img_size=8', '--conditional',
    '--num_workers=1',
    # Less noise at the end than usual (abar_T = 0.0066, not 0.00004): it is enough for 8x8 pixels,
    # and from x_T the first prediction of x_0, which this sampler does not clip, is then 12 times
    # the error of the network, not 157 times.
    '--beta_T=0.01', '--lr=1e-3', '--warmup=100', '--ema_decay=0.995', '--sample_step=0']
GRID_COLUMNS = 8
MEASURES = ['fd_pixels', 'precision', 'recall', 'recognition']


@dataclasses.dataclass(frozen=True)
class Model:
    """One network to train."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f'{self.method}-seed{self.seed}'


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0-2', 'Seeds of weights, data order and noise')
    methods: cli.Parsed('list', lambda text: text.split(',')) = compared(
        ','.join(METHODS), 'What to compare')
    omegas: cli.NUMBERS = compared('0,0.8,1.6,2.4', 'Strengths of guidance to sample with')
    steps: click.IntRange(min=3) = setting(1500, 'Training steps of every model')
    batch: WHOLE = setting(32, 'Images of one step')
    tau: options.NOT_NEGATIVE = setting(1.0, 'Weight of the class-balancing term')
    samples: click.IntRange(min=200) = setting(500, 'Images that a model generates')
    ddim_steps: click.IntRange(2, 1000) = setting(15, 'Sampling steps')

    def check(self):
        plan(self)
        if min(self.omegas) < 0:
            raise UserError('give strengths from 0 up', 'omegas')

    @property
    def settings(self) -> dict:
        return super().settings | {'recipe': RECIPE}

    @property
    def reference(self) -> str:
        return self.path('digits.npz')

    @property
    def pretrained(self) -> int:
        """The checkpoint of the plain model that fine-tuning starts from, after two thirds."""
        return self.steps * 2 // 3 - 1

    def last(self, model: Model) -> int:
        """Number of a model's last step. Steps are numbered from 0, and fine-tuning goes on from
        the number of its checkpoint; so after as many steps in all it ends one number earlier."""
        return self.steps - 1 - (model.method == 'finetune')

    def checkpoint(self, model: Model) -> str:
        return StepCheckpoints(self.run_dir(model)).path(self.last(model))

    def result(self, model: Model, omega: float, suffix: str = '.json') -> str:
        """What main.py writes: measures (.json) or samples (.npz)."""
        name = f'saved_{self.last(model)}_cfg_omega{omega:g}_ddim{self.ddim_steps}'
        return os.path.join(self.run_dir(model), name + suffix)


def plan(study: Study) -> list[list[Model]]:
    """Chains of models, side by side: fine-tuning follows the plain model of its seed."""
    methods = set(study.methods)
    if not methods <= METHODS.keys() or ('finetune' in methods and 'plain' not in methods):
        raise UserError(f'give some of {",".join(METHODS)}; finetune starts from plain', 'methods')
    chains = [methods.intersection(chain) for chain in (['cb'], ['plain', 'finetune'])]
    return [[Model(method, seed) for method in METHODS if method in chain]
            for chain in chains if chain for seed in study.seeds]


def flags_of(study: Study, model: Model, **more) -> dict:
    """Options of main.py for a model."""
    flags = dict(batch_size=study.batch, seed=model.seed, logdir=study.run_dir(model),
                 log_step=max(study.steps // 6, 1), total_steps=study.steps,
                 save_step=study.pretrained, img_channels=study.image_channels)
    switches = ['--cfg'] if model.method == 'plain' else ['--cb', f'--tau={study.tau}']
    if model.method == 'finetune':
        switches.append('--finetune')
        flags |= dict(finetuned_logdir=study.run_dir(model), ckpt_step=study.pretrained,
                      logdir=study.run_dir(Model('plain', model.seed)),
                      total_steps=study.steps - study.pretrained - 1)
    switches += ['--eval', '--recognition', '--noprd'] if more else ['--train']
    # Mirrored digits are no digits.
    return long_tail.settings([*RECIPE, '--noxflip', *switches, *studies.arguments(flags | more)])


def run_chain(study: Study, chain: list[Model]):
    """Trains models one after the other and measures them, as far as that is not done."""
    for model in chain:
        studies.make(study.checkpoint(model), long_tail.train, flags_of(study, model))
        for omega in study.omegas:
            flags = flags_of(study, model, ckpt_step=study.last(model), omega=omega,
                             batch_size=250, detector='pixels', fid_cache=study.reference,
                             num_images=study.samples, ddim_steps=study.ddim_steps)
            studies.make(study.result(model, omega), long_tail.evaluate, flags)


# --- Results -------------------------------------------------------------------------------------


def collect(study: Study, models: list[Model]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each model, omega and class with fd_pixels, precision, recall and
    recognition; and the same with their means over the classes of each group."""
    rows = []
    tables = []
    for model, omega in itertools.product(models, study.omegas):
        result = json.loads(Path(study.result(model, omega)).read_text())
        key = dataclasses.asdict(model) | {'omega': omega}
        classes = pd.DataFrame(result['classes']).assign(**key)
        classes = classes.rename(columns={'fid': 'fd_pixels'})   # of an earlier version
        tables.append(classes)
        groups = {'all': {'classes': classes.index}} | result['groups']
        rows += [key | {'group': name} | classes.loc[group['classes'], MEASURES].mean().to_dict()
                 for name, group in groups.items()]
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def best_omegas(results: pd.DataFrame) -> dict[str, float]:
    """For each method the guidance with the lowest distance, mean over all classes and seeds: as
    the paper chooses it."""
    rows = results[results['group'] == 'all'].groupby(['method', 'omega'])
    means = rows['fd_pixels'].mean().unstack()
    return means.idxmin(axis='columns').reindex(METHODS).dropna().to_dict()


def at(table: pd.DataFrame, omegas: dict[str, float]) -> pd.DataFrame:
    """The rows of each method at its omega."""
    return table[table['omega'] == table['method'].map(omegas)]


def verdict(results: pd.DataFrame, omegas: dict[str, float], group: str = 'few') -> str:
    """For each measure on a group: does a method differ from plain by more than the spread over
    seeds of either?

    Where it does not, but all differences of equal seeds (which share weights at the start, data
    order and noise) have one sign, the line says so.
    """
    values = at(results, omegas).query('group == @group').set_index(['method', 'seed'])
    lines = []
    for method, name in itertools.product(omegas, reversed(MEASURES)):
        if method == 'plain':
            continue
        ours, plain = (values[name][key] for key in (method, 'plain'))
        gains = (ours - plain) * (-1 if name == 'fd_pixels' else 1)
        spread = max(np.ptp(ours), np.ptp(plain))
        word = 'better' if gains.mean() > 0 else 'worse'
        if abs(gains.mean()) <= spread:
            same = len(gains) > 1 and set(np.sign(gains)) in ({1}, {-1})
            word = 'no clear difference' + f', though {word} in every seed' * same
        lines.append(f'{METHODS[method]:16} {name:12} {plain.mean():11.3f} -> '
                     f'{ours.mean():11.3f}  spread {spread:9.3f}  {word}')
    return '\n'.join(lines)


def matched(results: pd.DataFrame, group: str = 'few') -> pd.DataFrame:
    """Difference of recall to plain at equal recognition, by method (rows) and seed (columns).

    Guidance trades one for the other. Along the omegas recall is interpolated linearly in
    recognition, and the difference is the mean over the recognition that both reach (NaN if there
    is none).
    """
    curves = {key: rows[['recognition', 'recall']].to_numpy().T
              for key, rows in results.query('group == @group').sort_values(
                  'recognition').groupby(['method', 'seed'])}
    differences = {}
    for (method, seed), curve in curves.items():
        both = curve, curves['plain', seed]
        low = max(recognition[0] for recognition, _ in both)
        high = min(recognition[-1] for recognition, _ in both)
        ours, plain = (np.interp(np.linspace(low, high, 50), *one).mean() for one in both)
        differences[METHODS[method], seed] = ours - plain if high > low else np.nan
    return pd.Series(differences).unstack().drop('plain')


def label_effect(study: Study, models: list[Model]) -> pd.DataFrame:
    """How much labels change the predicted noise: a row for each step t and method, in shares of
    the plain model.

    RMS over noised digits of eps(x_t, t, y) - eps(x_t, t, no label), mean over seeds. The minimum
    of the class-balancing loss over all functions, where other labels are as likely in x_t as they
    are drawn, has the share 1 / (1 + 5/4 tau t/T).
    """
    data = datasets.open_data('digits', '', channels=study.image_channels)
    chosen = np.random.RandomState(0).permutation(len(data))[:200]
    x_0 = RGBEncoder().encode_latents(torch.from_numpy(data.images(chosen)))
    labels = torch.from_numpy(data.labels(chosen))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    effects = {}
    for model in models:
        net = load_snapshot(study.checkpoint(model)).net
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            t = torch.full([len(x_0)], int(share * net.diffusion.num_steps))
            x_t = net.diffusion.q_sample(x_0, t, noise)
            with torch.inference_mode():
                change = net(x_t, step=t, class_labels=labels) - net(x_t, step=t)
            effects[share, model.seed, model.method] = change.square().mean().sqrt().item()
    by_method = pd.Series(effects).unstack()
    if 'plain' not in by_method:
        return pd.DataFrame()
    shares = by_method.div(by_method['plain'], axis=0).groupby(level=0).mean()
    shares.insert(0, 'theory', 1 / (1 + 1.25 * study.tau * shares.index))
    return shares.rename(columns=METHODS).rename_axis('t/T').reset_index()


def show(results: pd.DataFrame, omegas: dict[str, float]):
    """Prints the table at each method's best omega, and the comparison with plain there and at
    equal omega."""
    table = at(results, omegas).pivot_table(
        ['recognition', 'recall'], ['method', 'omega'], 'group',
        lambda values: f'{values.mean():.3f} ({np.ptp(values):.3f})').rename(index=METHODS)
    table.columns = map(', '.join, table.columns)
    print('\nMean over seeds (largest less smallest), each method at the omega with its lowest '
          f'distance over all classes:\n{table.filter(regex="many|few").to_string()}')
    if 'plain' not in omegas:
        return
    print('\nAgainst plain on the classes with few images, each at its own omega:\n'
          + verdict(results, omegas))
    for group in ('many', 'few'):
        print(f'\nRecall at equal recognition, less that of plain, by seed ({group} images):\n'
              f'{matched(results, group).round(3).to_string()}')
    for omega in sorted(set(results['omega'])):
        print(f'\nThe same with omega {omega:g} for all:\n'
              + verdict(results, dict.fromkeys(omegas, omega)))


@studies.styled
def draw(study: Study, classes: pd.DataFrame, results: pd.DataFrame, omegas):
    """Measures by class and their trade-off (a point for each omega), above training images and
    samples of the first seed, a row for each digit."""
    figure = studies.plt.figure(figsize=(7.2, 4.9))
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    *panels, trade = above.subplots(1, 3)
    labels = {method: f'{METHODS[method]}, $\\omega$ = {omega:g}'
              for method, omega in omegas.items()}
    counts = classes.groupby('class')['training_images'].first()
    ticks = {digit: f'{digit}\n{count}' for digit, count in counts.items()}
    for axis, name in zip(panels, ('recognition', 'recall'), strict=True):
        studies.draw_lines(axis, at(classes, omegas), 'class', name, 'method', labels, ticks=ticks,
                           xlabel='digit, and its training images', ylabel=name, ylim=(0, 1.02))
        axis.tick_params('x', labelsize=5.5)                   # ten counts of three digits
        axis.margins(x=0.06)
    panels[0].legend()
    means = results.query('group == "few"').groupby(['method', 'omega'])[
        ['recognition', 'recall']].mean()
    for method, series in zip(omegas, studies.SERIES, strict=False):
        curve = means.loc[method]
        trade.plot(*curve.to_numpy().T, **series)
        trade.plot(*curve.iloc[0], zorder=3, markerfacecolor='white', **series)
    steps = ', '.join(f'{omega:g}' for omega in means.index.unique('omega'))
    trade.set_title(f'$\\omega$ = {steps} (from the hollow mark on)', fontsize=6)
    trade.set(xlabel='recognition, few images', ylabel='recall, few images')
    shown = {'training images': datasets.open_data('digitslt', '', **TAIL)} | {
        METHODS[method]: study.result(Model(method, min(study.seeds)), omega, '.npz')
        for method, omega in omegas.items()}
    for axis, (title, images) in zip(below.subplots(1, len(shown)), shown.items(), strict=True):
        rows = [np.resize(some, (GRID_COLUMNS, *some.shape[1:]))
                for some in (studies.pixels(images, digit) for digit in range(10))]
        axis.imshow(pictures.image_grid(np.concatenate(rows), GRID_COLUMNS, min_side=24))
        axis.set_title(title)
        axis.axis('off')
    return figure


@studies.command(Study)
def main(study):
    """Compares plain, class-balancing and fine-tuned diffusion models on long-tailed handwritten
    digits.

    Writes classes.csv, results.csv, label-effect.csv, study.png and study.svg, report.html, and in
    models/ a run folder of main.py for each model.
    """
    study.claim()
    chains = plan(study)
    studies.make(study.reference, make_stats.make, 'digits', study.reference, 'pixels',
                 img_channels=study.image_channels)
    models = [Model(method, seed) for seed in study.seeds for method in METHODS
              if method in study.methods]
    print(f'{len(models)} models of {study.steps} steps, in {study.outdir}', flush=True)
    for _ in study.run(run_chain, chains, len, unit='model'):
        pass
    classes, results = collect(study, models)
    omegas = best_omegas(results)
    effect = label_effect(study, models)
    show(results, omegas)
    print('\nHow much labels change the prediction, in shares of plain:\n'
          + effect.round(2).to_string(index=False))
    study.save(draw(study, classes, results, omegas), classes=classes, results=results,
               label_effect=effect)


if __name__ == '__main__':
    main()
