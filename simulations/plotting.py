"""Figures of the Gaussian study, for print: the command behind the plot_gaussian_*.py scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import UserError, cli, lazy, options

with lazy.imports('plot_gaussian' in sys.argv[0]):
    import pandas as pd

import studies
from simulations import RESULTS, tables

# (label, error, bound) of the two estimates, in the order of studies.SERIES.
ESTIMATES = (('single-source', tables.ERROR_SINGLE, tables.BOUND_SINGLE),
             ('multi-source', tables.ERROR_MULTI, tables.BOUND_MULTI))
LABELS = dict(K='Number of sources $K$', n='Number of training samples $n$',
              sim='Similarity of the sources')
SYMBOLS = dict(K='$K$', n='$n$', sim='sim', D='$D$')


def caption(rows: pd.DataFrame, seed_rows: pd.DataFrame, varied: list[str]) -> str:
    """What the figure holds fixed, over how many seeds it averages, and if it has intervals."""
    parts = [f'{symbol} = {rows[name][0]:g}' for name, symbol in SYMBOLS.items()
             if name not in varied]
    seeds = seed_rows['seed'].nunique()
    if seeds:
        parts.append('1 seed' if seeds == 1 else f'mean of {seeds:,} seeds')
    if 'seeds' in rows:
        parts.append('95% intervals')
    return ', '.join(parts)


def draw_errors(axis, rows: pd.DataFrame, x: str, y: str, **style):
    """One empirical curve, with 95% intervals if the table has them."""
    axis.errorbar(rows[x], rows[y], yerr=rows.get(studies.interval_column(y)), elinewidth=0.8,
                  **style)


def new_figure(rows: pd.DataFrame, x: str, **texts):
    """A figure and its axis of errors, with a tick at each value of x, and no others."""
    figure, axis = studies.plt.subplots(figsize=(3.5, 2.9))
    axis.set(xscale='log' if x == 'n' else 'linear', xlabel=LABELS[x], xticks=rows[x],
             xticklabels=map('{:g}'.format, rows[x]), **texts)
    axis.xaxis.minorticks_off()
    return figure, axis


def draw_curves(rows: pd.DataFrame, seed_rows: pd.DataFrame, varied: str):
    """Figure 1: empirical error on the left axis, bounds on the right, both from 0."""
    title = caption(rows, seed_rows, [varied])
    if title.endswith('seeds'):
        title += ' (dashes)'
    figure, left = new_figure(rows, varied, ylabel='Empirical TV error (solid)', title=title)
    right = left.twinx()
    right.spines['right'].set_visible(True)
    right.set_ylabel('Bound on the TV error (dashed)')
    for (label, error, bound), series in zip(ESTIMATES, studies.SERIES, strict=False):
        draw_errors(left, rows, varied, error, label=f'{label}, empirical', **series)
        if 'seeds' not in rows:                                # else intervals show the spread
            left.plot(seed_rows[varied], seed_rows[error], linestyle='', marker='_', markersize=6,
                      markeredgewidth=0.7, alpha=0.7, color=series['color'])
        right.plot(rows[varied], rows[bound], markerfacecolor='white', linestyle='--',
                   label=f'{label}, bound', **series)
    # The errors take the lower part of the height and the bounds all of it, or the two pairs would
    # lie on each other.
    for axis, margin in ((left, 0.75), (right, 0.05)):
        axis.axhline(0, linewidth=0)
        axis.margins(y=margin)
        axis.set_ylim(bottom=0)
    figure.legend(loc='outside lower center', ncols=2, handlelength=3.2)
    return figure


def draw_slope(rows: pd.DataFrame, seed_rows: pd.DataFrame, varied: str):
    """Error against n on logarithmic axes, with the fitted lines and a guide of slope -1/2."""
    if seed_rows.empty:
        raise UserError('the slopes are fitted to the rows of each seed, in the file '
                        '...-seeds.csv beside the table, which is missing', 'result')
    figure, axis = new_figure(rows, 'n', yscale='log', ylabel='Empirical TV error',
                              title=caption(rows, seed_rows, ['n']))
    n = rows['n']
    for (label, error, _), series in zip(ESTIMATES, studies.SERIES, strict=False):
        slope, interval = tables.slope(seed_rows, error)
        draw_errors(axis, rows, varied, error, linestyle='', **series)
        scale = np.exp(np.log(rows[error] / n ** slope).mean())
        axis.plot(n, scale * n ** slope, color=series['color'],
                  label=f'{label}: slope ${slope:.3f}$ ± {interval:.3f}')
    guide = rows[tables.ERROR_SINGLE][0] * 1.25 * np.sqrt(n[0] / n)
    axis.plot(n, guide, color='0.4', linestyle=':', label='slope $-1/2$')
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.set_minor_formatter('{x:g}')
    figure.legend(loc='outside lower center', ncols=1)
    return figure


def draw_grid(rows: pd.DataFrame, seed_rows: pd.DataFrame, x: str, y: str):
    """Advantage of many sources (single - multi) over two parameters, empirical and the difference
    of the bounds: heat maps, lowest y at the bottom, with the number in each cell and its interval
    if it has one; cells without a number are left white."""
    cells = rows.set_index([y, x])
    figure, axes = studies.plt.subplots(1, 2, sharey=True, figsize=(
        4 + 0.6 * rows[x].nunique(), 2 + 0.3 * rows[y].nunique()))
    titles = {tables.ERROR_ADVANTAGE: 'Empirical advantage',
              tables.BOUND_ADVANTAGE: 'Difference of the bounds'}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = cells[name].unstack()
        axis.imshow(values, origin='lower', aspect='auto', cmap='Wistia')  # light throughout
        texts = studies.plus_minus(cells, name, studies.interval_column(name), '.3f').unstack()
        for (row, column), text in np.ndenumerate(texts):
            axis.text(column, row, text.replace(' ', '\n', 1), ha='center', va='center',
                      fontsize=6)
        axis.set_xticks(range(len(values.columns)), map('{:g}'.format, values.columns))
        axis.set_yticks(range(len(values)), map('{:g}'.format, values.index))
        axis.set(xlabel=LABELS[x], ylabel=LABELS[y], title=title)
        axis.label_outer()
    text = caption(rows, seed_rows, [x, y])
    figure.suptitle(f'TV error of single minus multi; {text}', fontsize=8)
    return figure


FIGURES = dict(
    K=('Figure 1 (a): error against the number of sources', draw_curves),
    n=('Figure 1 (b): error against the number of samples', draw_curves),
    sim=('Figure 1 (c): error against the similarity of the sources', draw_curves),
    grid=('the advantage of many sources as a heat map', draw_grid),
    slope=('error against the number of samples, with the fitted slopes', draw_slope))


@studies.styled
def draw(tag: str, rows: pd.DataFrame, seed_rows: pd.DataFrame):
    """The figure of a tag. The varied parameters are the first columns of the table."""
    varied = list(rows)[:2 if tag == 'grid' else 1]
    expected = {'grid': varied[0], 'slope': 'n'}.get(tag, tag)
    if not LABELS.keys() >= set(varied) or varied[0] != expected:
        raise UserError(f'the table varies {" and ".join(varied)}; give one made with --tag={tag}',
                        'result')
    return FIGURES[tag][1](rows, seed_rows, *varied)


def command(tag: str) -> click.Command:
    """The command line of plot_gaussian_<tag>.py."""
    @click.command(
        cls=cli.Command, help=f'Draws {FIGURES[tag][0]}, as PNG and SVG beside the newest result.',
        epilog=f"""\b
Examples:
  python simulations/run_gaussian.py --tag={tag}{' --x=K --y=sim' if tag == 'grid' else ''}
  python simulations/plot_gaussian_{tag}.py
""")
    @options.text('DIR', '--outdir --results_dir outdir',
                  'Where results are, in a folder for each tag', default=RESULTS)
    @options.text('CSV', '--result', 'Table to draw  [default: the newest one]')
    @cli.overwrite
    def main(outdir, result):
        path = Path(result).resolve() if result else tables.newest(outdir, tag)
        rows = tables.load(path)
        for kind in (cli.PICTURE, cli.DRAWING):
            kind.check_path(path.with_suffix(*kind.endings))
        seeds = tables.seeds_path(path)
        figure = draw(tag, rows, tables.load(seeds) if seeds.exists() else rows[:0])
        for picture in studies.save_figure(figure, str(path.with_suffix(''))):
            print(picture)
    return main
