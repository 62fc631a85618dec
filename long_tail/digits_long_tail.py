"""Does class-balancing training help rare classes? The long-tail study in miniature, on handwritten digits.

Trains on a long tail of the digits, several seeds each: a plain conditional model, a class-balancing one, and a plain one
that is fine-tuned with class-balancing for the last third, all with the same number of steps; then measures how many samples
of each class a classifier recognises, and how much of the real digits they cover.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import torch
import tqdm

from dnnlib import UserError, cli, pictures, util
from long_tail import datasets, main, make_stats
from simulations import plotting
from torch_utils import distributed, parallel
from training.checkpoint import StepCheckpoints
from training.data.images import NpzImages
from training.encoders import RGBEncoder
from training.snapshot import load_snapshot

METHODS = {'plain': 'plain', 'cb': 'class-balancing', 'finetune': 'fine-tuned'}
COLORS = {'plain': '#0072B2', 'cb': '#D55E00', 'finetune': '#009E73'}
GROUPS = ('many', 'medium', 'few')
# A network that a CPU trains in minutes: two levels of 64 channels, one block at each on the way up. Levels of 32 channels
# would not see the labels, see training/networks/ddpm.py.
NETWORK = ['--ch=64', '--ch_mult=1', '--ch_mult=1', '--attn=', '--num_res_blocks=0']
DATA = ['--data_type=digitslt', '--imb_factor=0.05', '--img_size=8', '--conditional', '--num_workers=1']
# Less noise at the end than usual (abar_T = 0.0066, not 0.00004): it is enough for 8x8 pixels, and from x_T the first
# prediction of x_0, which this sampler does not clip, is then 12 times the error of the network, not 157 times.
RECIPE = ['--beta_T=0.01', '--lr=1e-3', '--warmup=100', '--ema_decay=0.995', '--sample_step=0']
GRID_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """One network to train."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f'{self.method}-seed{self.seed}'


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder, and what all its models have in common; only models with the same settings may be compared."""

    outdir: str
    steps: int
    batch: int
    tau: float
    samples: int
    ddim_steps: int

    def path(self, *parts) -> str:
        return os.path.join(self.outdir, *parts)

    @property
    def reference(self) -> str:
        return self.path('digits.npz')

    @property
    def pretrained(self) -> int:
        """The checkpoint of the plain model that fine-tuning starts from, after two thirds of the steps."""
        return self.steps * 2 // 3 - 1

    def last(self, model: Model) -> int:
        """Number of a model's last step. Steps are numbered from 0, and fine-tuning goes on from the number of its checkpoint;
        so with the same number of steps in all it ends one number earlier."""
        return self.steps - 1 - (model.method == 'finetune')

    def run_dir(self, model: Model) -> str:
        return self.path('models', model.name)

    def result(self, model: Model, omega: float, suffix: str = '.json') -> str:
        """What main.py writes: measures (.json) or samples (.npz)."""
        name = f'saved_{self.last(model)}_cfg_omega{omega:g}_ddim{self.ddim_steps}'
        return os.path.join(self.run_dir(model), name + suffix)

    def claim(self):
        """Writes the settings to the folder, or raises UserError if it holds a study with others."""
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key != 'outdir'}
        util.claim_folder(self.outdir, settings | {'recipe': [*NETWORK, *DATA, *RECIPE]})


# --- One model --------------------------------------------------------------------------------------------------------


def flags_of(study: Study, model: Model, *more) -> dict:
    """Options of main.py for a model."""
    args = [*NETWORK, *DATA, *RECIPE,
            f'--batch_size={study.batch}', f'--seed={model.seed}', f'--log_step={max(study.steps // 6, 1)}',
            f'--logdir={study.run_dir(model)}', f'--total_steps={study.steps}', f'--save_step={study.pretrained}']
    if model.method == 'plain':
        args += ['--cfg']
    else:
        args += ['--cb', f'--tau={study.tau}']
    if model.method == 'finetune':
        args += ['--finetune', f'--finetuned_logdir={study.run_dir(model)}', f'--ckpt_step={study.pretrained}',
                 f'--logdir={study.run_dir(Model("plain", model.seed))}', f'--total_steps={study.steps - study.pretrained - 1}']
    return main.settings([*args, *more])


def run_model(study: Study, model: Model, omegas: list[float]):
    """Trains a model and measures it, as far as that is not done. Raises KeyboardInterrupt if it is told to stop."""
    sink = io.StringIO()  # models that train side by side would talk over each other; log.txt has it all
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        last = StepCheckpoints(study.run_dir(model)).path(study.last(model))
        if not os.path.exists(last) and not main.train(flags_of(study, model, '--train')):  # told to stop
            raise KeyboardInterrupt
        for omega in omegas:
            if not os.path.exists(study.result(model, omega)):
                main.evaluate(flags_of(
                    study, model, '--eval', f'--ckpt_step={study.last(model)}', f'--omega={omega}', '--detector=pixels',
                    f'--fid_cache={study.reference}', f'--num_images={study.samples}', f'--ddim_steps={study.ddim_steps}',
                    '--recognition', '--noprd', '--batch_size=250'))


def run_seed(study: Study, models: list[Model], omegas: list[float]) -> list[Model]:
    """Runs models one after the other, in this order."""
    for model in models:
        run_model(study, model, omegas)
    return models


def _start_worker(threads: int):
    torch.set_num_threads(threads)


def run_models(study: Study, models: list[Model], omegas, jobs: int):
    """Runs all models, `jobs` at a time, and yields each one that is finished. Fine-tuning follows the plain model."""
    chains = [[model] for model in models if model.method == 'cb'] + [
        [Model(method, seed) for method in ('plain', 'finetune') if Model(method, seed) in models]
        for seed in sorted({model.seed for model in models})]
    chains = [chain for chain in chains if chain]
    if jobs == 1:
        for chain in chains:
            yield from run_seed(study, chain, omegas)
        return
    # These networks are too small for threads: side by side on one core each, they train faster.
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(chains)), multiprocessing.get_context('spawn'),
                                                  _start_worker, (1,))
    try:
        running = [pool.submit(run_seed, study, chain, omegas) for chain in chains]
        for future in concurrent.futures.as_completed(running):
            yield from future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- Results ----------------------------------------------------------------------------------------------------------


def collect(study: Study, models: list[Model], omegas) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each model, omega and class with fid (in pixels), precision, recall and recognition; and the same with their
    means over the classes of each group."""
    rows, tables = [], []
    for model in models:
        for omega in omegas:
            with open(study.result(model, omega)) as file:
                found = json.load(file)
            classes = pd.DataFrame(found['classes'])
            tables.append(classes.assign(method=model.method, seed=model.seed, omega=omega))
            groups = {'all': range(10)} | {name: values['classes'] for name, values in found['groups'].items()}
            for group, members in groups.items():
                means = classes.loc[list(members), ['fid', 'precision', 'recall', 'recognition']].mean()
                rows.append({'method': model.method, 'seed': model.seed, 'omega': omega, 'group': group} | means.to_dict())
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def best_omegas(results: pd.DataFrame) -> dict[str, float]:
    """For each method the guidance with the lowest distance, mean over all classes and seeds: as the paper chooses it."""
    means = results[results['group'] == 'all'].groupby(['method', 'omega'])['fid'].mean()
    return {method: float(means[method].idxmin()) for method in METHODS if method in means.index.levels[0]}


def verdict(results: pd.DataFrame, omegas: dict[str, float], group: str = 'few') -> list[str]:
    """For each measure on a group: does a method differ from plain by more than the spread over seeds of either?

    Where it does not, but all differences of equal seeds (which share weights at the start, data order and noise) have one
    sign, the line says so.
    """
    lines = []
    for method in METHODS:
        if method == 'plain' or method not in omegas or 'plain' not in omegas:
            continue
        for name in ('recognition', 'recall', 'precision', 'fid'):
            plain, ours = (results[(results['method'] == m) & (results['omega'] == omegas[m]) & (results['group'] == group)]
                           .set_index('seed')[name] for m in ('plain', method))
            gains = (ours - plain) * (-1 if name == 'fid' else 1)
            spread = max(values.max() - values.min() for values in (plain, ours))
            word = 'better' if gains.mean() > spread else 'worse' if gains.mean() < -spread else 'no clear difference'
            if word.startswith('no') and len(gains) > 1 and (all(gains > 0) or all(gains < 0)):
                word += f', though {"better" if gains.iloc[0] > 0 else "worse"} in every seed'
            lines.append(f'{METHODS[method]:16} {name:12} {plain.mean():11.3f} -> {ours.mean():11.3f}  '
                         f'spread {spread:9.3f}  {word}')
    return lines


def matched(results: pd.DataFrame, group: str = 'few') -> pd.DataFrame:
    """Difference of recall to plain at equal recognition, by method (rows) and seed (columns).

    Guidance trades one for the other. Along the omegas recall is interpolated linearly in recognition, and the difference is
    the mean over the recognition that both reach (NaN if there is none).
    """
    curves = {key: rows.sort_values('recognition')
              for key, rows in results[results['group'] == group].groupby(['method', 'seed'])}
    found = {}
    for (method, seed), ours in curves.items():
        plain = curves.get(('plain', seed))
        if method == 'plain' or plain is None:
            continue
        low = max(ours['recognition'].min(), plain['recognition'].min())
        high = min(ours['recognition'].max(), plain['recognition'].max())
        at = np.linspace(low, high, 50)
        difference = np.interp(at, ours['recognition'], ours['recall']) - np.interp(at, plain['recognition'], plain['recall'])
        found.setdefault(METHODS[method], {})[seed] = difference.mean() if high > low else np.nan
    return pd.DataFrame(found).T


def label_effect(study: Study, models: list[Model], images_each: int = 200) -> pd.DataFrame:
    """How much labels change the predicted noise: a row for each step t and method, in shares of the plain model.

    RMS over noised digits of eps(x_t, t, y) - eps(x_t, t, no label), mean over seeds. The minimum of the class-balancing
    loss over all functions, where other labels are as likely in x_t as they are drawn, has the share 1 / (1 + 5/4 tau t/T).
    """
    data = datasets.open_data('digits', '')
    chosen = np.random.RandomState(0).permutation(len(data))[:images_each]
    x_0 = RGBEncoder().encode_latents(torch.from_numpy(data.images(chosen)))
    labels, effects = torch.from_numpy(data.labels(chosen)), {}
    for model in models:
        net = load_snapshot(StepCheckpoints(study.run_dir(model)).path(study.last(model))).net
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            t = torch.full([len(x_0)], int(share * net.diffusion.num_steps))
            x_t = net.diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)))
            with torch.inference_mode():
                change = net(x_t, step=t, class_labels=labels) - net(x_t, step=t)
            effects[model, share] = change.square().mean().sqrt().item()
    rows = [{'t/T': share, 'method': METHODS[model.method], 'share': value / effects[Model('plain', model.seed), share],
             'theory': 1 / (1 + 1.25 * study.tau * share)}
            for (model, share), value in effects.items() if (Model('plain', model.seed), share) in effects]
    return pd.DataFrame(rows).pivot_table(index=['t/T', 'theory'], columns='method', values='share').reset_index()


def show(results: pd.DataFrame, omegas: dict[str, float]):
    """Prints the table at each method's best omega, and the comparison with plain there and at equal omega."""
    print('\nMean over seeds (largest less smallest), each method at the omega with its lowest distance over all classes:')
    columns = [(name, group) for name in ('recognition', 'recall') for group in ('many', 'few')]
    print(f'{"":16}{"omega":>6}' + ''.join(f'{f"{name}, {group}":>22}' for name, group in columns))
    for method, omega in omegas.items():
        found = results[(results['method'] == method) & (results['omega'] == omega)].set_index('group')
        cells = ''
        for name, group in columns:
            values = found.loc[[group], name]
            cells += f'{f"{values.mean():.3f} ({values.max() - values.min():.3f})":>22}'
        print(f'{METHODS[method]:16}{omega:6.1f}{cells}')
    print('\nAgainst plain on the classes with few images, each at its own omega:')
    print('\n'.join(verdict(results, omegas)))
    for group in ('many', 'few'):
        table = matched(results, group)
        print(f'\nRecall at equal recognition, less that of plain, by seed ({group} images):\n{table.round(3).to_string()}')
    for omega in sorted(set(results['omega'])):
        print(f'\nThe same with omega {omega:g} for all:')
        print('\n'.join(verdict(results, dict.fromkeys(omegas, omega))))


# --- Pictures ---------------------------------------------------------------------------------------------------------


def draw_classes(axis, classes: pd.DataFrame, omegas, name: str):
    """A measure against the class, mean and range over seeds."""
    for method, omega in omegas.items():
        rows = classes[(classes['method'] == method) & (classes['omega'] == omega)].groupby('class')[name]
        mean = rows.mean()
        axis.errorbar(mean.index, mean, yerr=[mean - rows.min(), rows.max() - mean], color=COLORS[method], capsize=2,
                      elinewidth=0.7, marker='o', label=f'{METHODS[method]}, $\\omega$ = {omega:g}')
    counts = classes.groupby('class')['training_images'].first()
    axis.set_xticks(counts.index, [f'{digit}\n{count}' for digit, count in counts.items()])
    axis.set(xlabel='digit, and its training images', ylabel=name, ylim=(0, 1.02))


def draw_trade(axis, results: pd.DataFrame, group: str = 'few'):
    """Recall against recognition on a group, a point for each omega."""
    for method in METHODS:
        rows = results[(results['method'] == method) & (results['group'] == group)].groupby('omega')[['recognition', 'recall']]
        if not len(rows):
            continue
        mean = rows.mean()
        axis.plot(mean['recognition'], mean['recall'], color=COLORS[method], marker='o')
        for omega in mean.index[[0, -1]]:
            axis.annotate(f'$\\omega$={omega:g}', mean.loc[omega], (3, 3), textcoords='offset points', fontsize=6)
    axis.set(xlabel=f'recognition, {group}', ylabel=f'recall, {group}')


def sample_grid(study: Study, seed: int, omegas) -> dict:
    """{title: picture}: training images, and samples of each method, a row for each digit."""
    data = datasets.open_data('digitslt', '', imb_factor=0.05)
    shown = {'training images': (data.images(np.arange(len(data))), data.label_ids)}
    for method, omega in omegas.items():
        made = NpzImages(study.result(Model(method, seed), omega, '.npz'))
        shown[METHODS[method]] = made.images(np.arange(len(made))), made.label_ids
    grids = {}
    for title, (pixels, labels) in shown.items():
        rows = np.concatenate([np.resize(np.flatnonzero(labels == digit), GRID_COLUMNS) for digit in range(10)])
        grids[title] = pictures.image_grid(pixels[rows], GRID_COLUMNS, min_side=24)
    return grids


def draw(study: Study, classes: pd.DataFrame, results: pd.DataFrame, omegas):
    """Measures by class and their trade-off, above samples of the first seed."""
    grids = sample_grid(study, int(results['seed'].min()), omegas)
    with plotting.plt.rc_context(plotting.STYLE):
        figure = plotting.plt.figure(figsize=(7.2, 4.9))
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.05])
        panels = above.subplots(1, 3)
        draw_classes(panels[0], classes, omegas, 'recognition')
        draw_classes(panels[1], classes, omegas, 'recall')
        draw_trade(panels[2], results)
        panels[0].legend(frameon=False)
        for panel in panels:
            panel.spines[['top', 'right']].set_visible(False)
        for axis, (title, picture) in zip(below.subplots(1, len(grids)), grids.items(), strict=True):
            axis.imshow(picture)
            axis.set_title(title)
            axis.axis('off')
    return figure


def save_table(table: pd.DataFrame, path: str):
    with util.atomic_path(path) as temp:
        table.to_csv(temp, index=False, float_format='%.6g', lineterminator='\n')


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The study of the page, under 15 minutes on 2 CPU cores
  python long_tail/digits_long_tail.py
\b
The same command goes on with a study that was stopped; finished models are not trained again.
""")
@click.option('--outdir', metavar='DIR', default=str(ROOT / 'training-runs' / 'study-long-tail'), help='Where results go')
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='0-2', help='Seeds of weights, data order and noise')
@click.option('--methods', metavar='LIST', default=','.join(METHODS), help='What to compare')
@click.option('--omegas', metavar='LIST', default='0,0.8,1.6,2.4', help='Strengths of guidance to sample with')
@click.option('--steps', metavar='INT', type=click.IntRange(min=3), default=1500, help='Training steps of every model')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=32, help='Images of one step')
@click.option('--tau', metavar='FLOAT', type=click.FloatRange(0), default=1.0, help='Weight of the class-balancing term')
@click.option('--samples', metavar='INT', type=click.IntRange(min=200), default=500, help='Images that a model generates')
@click.option('--ddim-steps', metavar='INT', type=click.IntRange(min=2), default=15, help='Sampling steps')
@click.option('--jobs', metavar='INT', type=click.IntRange(min=1),
              help='Models that train at a time  [default: one for each core, up to 8; one on a GPU]')
def command(outdir, seeds, methods, omegas, jobs, **shared):
    """Compares plain, class-balancing and fine-tuned diffusion models on long-tailed handwritten digits.

    Writes classes.csv, results.csv, label-effect.csv, study.png and study.svg, and in models/ a run folder of main.py for
    each model.
    """
    methods = methods.split(',')
    if not set(methods) <= METHODS.keys() or ('finetune' in methods and 'plain' not in methods):
        raise UserError(f'--methods: give some of {",".join(METHODS)}; finetune starts from plain')
    try:
        omegas = [float(omega) for omega in omegas.split(',')]
    except ValueError:
        raise UserError(f'--omegas={omegas}: give numbers with commas between them') from None
    distributed.init()
    if distributed.get_world_size() > 1:
        raise UserError('this study runs as one command, without torchrun; --jobs sets how many models train at a time')
    study = Study(os.path.abspath(outdir), **shared)
    study.claim()
    models = [Model(method, seed) for seed in seeds for method in METHODS if method in methods]
    if not os.path.exists(study.reference):
        make_stats.make('digits', study.reference, 'pixels')
    print(f'{len(models)} models of {study.steps} steps, in {study.outdir}', flush=True)
    jobs = jobs or parallel.default_jobs()
    try:
        for _ in tqdm.tqdm(run_models(study, models, omegas, jobs), total=len(models), unit='model'):
            pass
    except KeyboardInterrupt:
        raise UserError('stopped; the same command goes on from here') from None
    classes, results = collect(study, models, omegas)
    best = best_omegas(results)
    save_table(classes, study.path('classes.csv'))
    save_table(results, study.path('results.csv'))
    effect = label_effect(study, models)
    save_table(effect, study.path('label-effect.csv'))
    plotting.save(draw(study, classes, results, best), Path(study.path('study')))
    show(results, best)
    print(f'\nHow much labels change the prediction, in shares of plain:\n{effect.round(2).to_string(index=False)}')
    print(f'\nWrote classes.csv, results.csv, label-effect.csv and study.png to {study.outdir}')


if __name__ == '__main__':
    command()
