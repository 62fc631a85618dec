"""Figures of the Gaussian study, for print: the command behind the plot_gaussian_*.py scripts."""

import pathlib

import click
import matplotlib.ticker
import numpy as np
import pandas as pd

import studies
from dnnlib import UserError, cli
from simulations import tables
from studies import plt

# (label, error, bound) of the two estimates, in the order of studies.SERIES.
ESTIMATES = (('single-source', tables.ERROR_SINGLE, tables.BOUND_SINGLE),
             ('multi-source', tables.ERROR_MULTI, tables.BOUND_MULTI))
LABELS = dict(K='Number of sources $K$', n='Number of training samples $n$',
              sim='Similarity of the sources')
SYMBOLS = dict(K='$K$', n='$n$', sim='sim', D='$D$')
TITLES = dict(
    K='Figure 1 (a): error against the number of sources',
    n='Figure 1 (b): error against the number of samples',
    sim='Figure 1 (c): error against the similarity of the sources',
    grid='the advantage of many sources as a heat map',
    slope='error against the number of samples, with the fitted slopes')


def caption(rows: pd.DataFrame, seed_rows: pd.DataFrame, varied: list[str], dashes=False) -> str:
    """What the figure holds fixed, over how many seeds it averages, and how it shows their
    spread."""
    parts = [f'{symbol} = {rows[name][0]:g}' for name, symbol in SYMBOLS.items()
             if name not in varied]
    seeds = seed_rows['seed'].nunique()
    if seeds:
        parts.append('1 seed' if seeds == 1 else f'mean of {seeds:,} seeds')
        if 'seeds' in rows:
            parts.append('95% intervals')
        elif dashes and seeds > 1:
            parts[-1] += ' (dashes)'
    return ', '.join(parts)


def draw_errors(axis, rows: pd.DataFrame, seed_rows: pd.DataFrame, x: str, y: str, **style):
    """One empirical curve, with 95% intervals if the table has them, else with a dash for each
    seed."""
    axis.errorbar(rows[x], rows[y], yerr=rows.get(tables.interval_column(y)), elinewidth=0.8,
                  **style)
    if 'seeds' not in rows:
        axis.plot(seed_rows[x], seed_rows[y], linestyle='', marker='_', markersize=6,
                  markeredgewidth=0.7, alpha=0.7, color=style['color'])


def set_ticks(axis, values):
    """A tick at each value of the horizontal axis, and no others."""
    axis.set_xticks(values, [f'{value:g}' for value in values])
    axis.xaxis.minorticks_off()


def draw_curves(rows: pd.DataFrame, seed_rows: pd.DataFrame, varied: str):
    """Figure 1: empirical error on the left axis, bounds on the right, both from 0."""
    figure, left = plt.subplots(figsize=(3.5, 2.9))
    right = left.twinx()
    right.spines['right'].set_visible(True)
    for (label, error, bound), series in zip(ESTIMATES, studies.SERIES, strict=False):
        draw_errors(left, rows, seed_rows, varied, error, label=f'{label}, empirical', **series)
        right.plot(rows[varied], rows[bound], markerfacecolor='white', linestyle='--',
                   label=f'{label}, bound', **series)
    left.set(xlabel=LABELS[varied], ylabel='Empirical TV error (solid)',
             title=caption(rows, seed_rows, [varied], dashes=True))
    right.set_ylabel('Bound on the TV error (dashed)')
    if varied == 'n':
        left.set_xscale('log')
    set_ticks(left, rows[varied])
    # The errors take the lower part of the height and the bounds all of it, or the two pairs would
    # lie on each other.
    top = np.nanmax([1.75 * rows[tables.ERROR_SINGLE].max(), 1.05 * left.dataLim.ymax])
    left.set_ylim(0, top if np.isfinite(top) else None)
    right.set_ylim(0, 1.05 * right.dataLim.ymax)
    figure.legend(loc='outside lower center', ncols=2, handlelength=3.2)
    return figure


def draw_slope(rows: pd.DataFrame, seed_rows: pd.DataFrame, varied: str):
    """Error against n on logarithmic axes, with the fitted lines and a guide of slope -1/2."""
    if seed_rows.empty:
        raise UserError('the slopes are fitted to the rows of each seed, in the file '
                        '...-seeds.csv beside the table, which is missing', 'result')
    figure, axis = plt.subplots(figsize=(3.5, 2.9))
    n = rows['n']
    for (label, error, _), series in zip(ESTIMATES, studies.SERIES, strict=False):
        slope, interval = tables.slope(seed_rows, error)
        draw_errors(axis, rows, seed_rows[:0], varied, error, linestyle='', **series)
        scale = np.exp(np.log(rows[error] / n ** slope).mean())
        axis.plot(n, scale * n ** slope, color=series['color'],
                  label=f'{label}: slope ${slope:.3f}$ ± {interval:.3f}')
    guide = rows[tables.ERROR_SINGLE][0] * 1.25 * np.sqrt(n[0] / n)
    axis.plot(n, guide, color='0.4', linestyle=':', label='slope $-1/2$')
    axis.set(xscale='log', yscale='log', xlabel=LABELS['n'], ylabel='Empirical TV error',
             title=caption(rows, seed_rows, ['n']))
    set_ticks(axis, n)
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 4, 6)))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.minorticks_off()
    figure.legend(loc='outside lower center', ncols=1)
    return figure


def draw_grid(rows: pd.DataFrame, seed_rows: pd.DataFrame, x: str, y: str):
    """Advantage of many sources (single - multi) over two parameters, empirical and the difference
    of the bounds: heat maps, lowest y at the bottom, with the number in each cell and its interval
    if it has one; cells without a number are left white."""
    cells = rows.set_index([y, x])
    size = (max(4.5, 1.2 + 0.8 * rows[x].nunique()), 1.2 + 0.35 * max(4, rows[y].nunique()))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    for axis, name, title in ((axes[0], tables.ERROR_ADVANTAGE, 'Empirical advantage'),
                              (axes[1], tables.BOUND_ADVANTAGE, 'Difference of the bounds')):
        values = cells[name].unstack()
        image = axis.imshow(values, origin='lower', aspect='auto', cmap='cividis')
        axis.spines[:].set_visible(True)
        texts = studies.plus_minus(cells, name, tables.interval_column(name), '.3f').unstack()
        for (row, col), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = image.cmap(image.norm(value))[:3] @ np.array((0.299, 0.587, 0.114)) < 0.5
                axis.text(col, row, texts.iat[row, col].replace(' ', '\n', 1), ha='center',
                          va='center', fontsize=6, color='white' if dark else 'black')
        figure.colorbar(image, ax=axis, pad=0.02, aspect=30).outline.set_linewidth(0.6)
        axis.set_xticks(range(len(values.columns)), [f'{u:g}' for u in values.columns])
        axis.set_yticks(range(len(values)), [f'{v:g}' for v in values.index])
        axis.set(xlabel=LABELS[x], title=title)
    axes[0].set_ylabel(LABELS[y])
    text = caption(rows, seed_rows, [x, y])
    figure.suptitle(f'TV error of single minus multi; {text}', fontsize=8)
    return figure


@studies.styled
def draw(tag: str, rows: pd.DataFrame, seed_rows: pd.DataFrame):
    """The figure of a tag. The varied parameters are the first columns of the table."""
    varied = list(rows)[:2 if tag == 'grid' else 1]
    expected = {'grid': varied[0], 'slope': 'n'}.get(tag, tag)
    if not LABELS.keys() >= set(varied) or varied[0] != expected:
        raise UserError(f'the table varies {" and ".join(varied)}; give one made with --tag={tag}',
                        'result')
    function = dict(grid=draw_grid, slope=draw_slope).get(tag, draw_curves)
    return function(rows, seed_rows, *varied)


def command(tag: str) -> click.Command:
    """The command line of plot_gaussian_<tag>.py."""
    @click.command(
        cls=cli.Command, help=f'Draws {TITLES[tag]}, as PNG and SVG beside the newest result.',
        epilog=f"""\b
Examples:
  python simulations/run_gaussian.py --tag={tag}{' --x=K --y=sim' if tag == 'grid' else ''}
  python simulations/plot_gaussian_{tag}.py
""")
    @click.option('--outdir', help='Where results are, in a folder for each tag', metavar='DIR',
                  default=str(tables.RESULTS))
    @click.option('--result', help='Table to draw  [default: the newest one]', metavar='CSV')
    def main(outdir, result):
        path = pathlib.Path(result).resolve() if result else tables.newest(outdir, tag)
        rows = tables.load(path)
        seeds = tables.seeds_path(path)
        figure = draw(tag, rows, tables.load(seeds) if seeds.exists() else rows[:0])
        for picture in studies.save_figure(figure, str(path.with_suffix(''))):
            print(picture)
    return main
