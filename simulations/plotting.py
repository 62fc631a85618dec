"""Figures of the Gaussian study, for print: one command and one style behind the plot_gaussian_*.py scripts."""

import pathlib

import click
import matplotlib.ticker
import numpy as np

import dnnlib
import studies
from dnnlib import cli
from simulations import tables
from studies import plt

SINGLE = studies.BLUE                                          # told apart by lightness in grey too
MULTI = studies.VERMILION
LABELS = dict(K='Number of sources $K$', n='Number of training samples $n$', sim='Similarity of the sources')
SYMBOLS = dict(K='$K$', n='$n$', sim='sim', D='$D$')
TITLES = dict(
    K='Figure 1 (a): error against the number of sources', n='Figure 1 (b): error against the number of samples',
    sim='Figure 1 (c): error against the similarity of the sources', grid='the advantage of many sources as a heat map',
    slope='error against the number of samples, with the fitted slopes')


def column(rows: list[dict], name: str) -> np.ndarray:
    """One column of a table, [rows] float64."""
    return np.array([r[name] for r in rows])


def caption(rows: list[dict], seed_rows: list[dict], varied: tuple[str, ...], dashes: bool = False) -> str:
    """What the figure holds fixed, over how many seeds it averages, and how it shows their spread."""
    parts = [f'{SYMBOLS[name]} = {rows[0][name]:g}' for name in SYMBOLS if name not in varied]
    seeds = len({r['seed'] for r in seed_rows})
    if seeds:
        parts.append('1 seed' if seeds == 1 else f'mean of {seeds:,} seeds')
        if 'seeds' in rows[0]:
            parts.append('95% intervals')
        elif dashes and seeds > 1:
            parts[-1] += ' (dashes)'
    return ', '.join(parts)


def plot_errors(axis, rows: list[dict], seed_rows: list[dict], varied: str, name: str, **style):
    """One empirical curve, with 95% intervals if the table has them, else with a dash for each seed."""
    x = column(rows, varied)
    interval = tables.interval_column(name)
    if interval in rows[0]:
        axis.errorbar(x, column(rows, name), yerr=column(rows, interval), capsize=2, elinewidth=0.8, **style)
    else:
        axis.plot(x, column(rows, name), **style)
        axis.plot(column(seed_rows, varied), column(seed_rows, name), linestyle='', marker='_', markersize=6,
                  markeredgewidth=0.7, alpha=0.7, color=style['color'])


def draw_curves(rows: list[dict], seed_rows: list[dict], varied: str):
    """Figure 1: empirical error on the left axis, bounds on the right, both from 0."""
    figure, left = plt.subplots(figsize=(3.5, 2.9))
    right = left.twinx()
    x = column(rows, varied)
    for name, bound, label, color, marker in (
            (tables.ERROR_SINGLE, tables.BOUND_SINGLE, 'single-source', SINGLE, 'o'),
            (tables.ERROR_MULTI, tables.BOUND_MULTI, 'multi-source', MULTI, 's')):
        plot_errors(left, rows, seed_rows, varied, name, color=color, marker=marker, label=f'{label}, empirical')
        right.plot(x, column(rows, bound), color=color, marker=marker, markerfacecolor='white', linestyle='--',
                   label=f'{label}, bound')
    left.set(xlabel=LABELS[varied], ylabel='Empirical TV error (solid)',
             title=caption(rows, seed_rows, (varied,), dashes=True))
    right.set_ylabel('Bound on the TV error (dashed)')
    if varied == 'n':
        left.set_xscale('log')
    left.set_xticks(x, [f'{value:g}' for value in x])
    left.minorticks_off()
    # The errors take the lower part of the height and the bounds all of it, or the two pairs would lie on each other.
    top = max(1.75 * np.nanmax(column(rows, tables.ERROR_SINGLE)), 1.05 * left.dataLim.ymax)
    left.set_ylim(0, top if np.isfinite(top) else None)
    right.set_ylim(0, 1.05 * right.dataLim.ymax)
    for axis in (left, right):
        axis.spines['top'].set_visible(False)
    figure.legend(loc='outside lower center', ncols=2, frameon=False, handlelength=3.2)
    return figure


def draw_slope(rows: list[dict], seed_rows: list[dict], varied: str):
    """Error against n on logarithmic axes, with the fitted lines and a guide of slope -1/2."""
    if not seed_rows:
        raise dnnlib.UserError('--result: the slopes are fitted to the rows of each seed, in the file ...-seeds.csv '
                               'beside the table, which is missing')
    figure, axis = plt.subplots(figsize=(3.5, 2.9))
    n = column(rows, 'n')
    for name, label, color, marker in ((tables.ERROR_SINGLE, 'single-source', SINGLE, 'o'),
                                       (tables.ERROR_MULTI, 'multi-source', MULTI, 's')):
        slope, interval = tables.slope(seed_rows, name)
        plot_errors(axis, rows, [], varied, name, color=color, marker=marker, linestyle='')
        log_errors = np.log(column(rows, name))
        offset = np.nanmean(log_errors - slope * np.log(n))
        axis.plot(n, np.exp(offset + slope * np.log(n)), color=color,
                  label=f'{label}: slope ${slope:.3f}$ ± {interval:.3f}')
    guide = column(rows, tables.ERROR_SINGLE)[0] * 1.25 * np.sqrt(n[0] / n)
    axis.plot(n, guide, color='0.4', linestyle=':', label='slope $-1/2$')
    axis.set(xscale='log', yscale='log', xlabel=LABELS['n'], ylabel='Empirical TV error',
             title=caption(rows, seed_rows, ('n',)))
    axis.set_xticks(n, [f'{value:g}' for value in n])
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 4, 6)))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.minorticks_off()
    axis.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside lower center', ncols=1, frameon=False)
    return figure


def draw_heat_map(axis, values: np.ndarray, intervals: np.ndarray | None, title: str):
    """Heat map of values [y, x], lowest y at the bottom, with the number in each cell; NaN cells are left white."""
    image = axis.imshow(values, origin='lower', aspect='auto', cmap='cividis')
    colors = image.cmap(image.norm(values))
    for (row, col), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f'{value:.3f}' + ('' if intervals is None else f'\n±{intervals[row, col]:.3f}')
            dark = colors[row, col, :3] @ (0.299, 0.587, 0.114) < 0.5
            axis.text(col, row, text, ha='center', va='center', fontsize=6, color='white' if dark else 'black')
    axis.set_title(title)
    return image


def draw_grid(rows: list[dict], seed_rows: list[dict], x: str, y: str):
    """Advantage of many sources (single - multi) over two parameters: empirical, and the difference of the bounds."""
    xs, ys = sorted({r[x] for r in rows}), sorted({r[y] for r in rows})
    cells = {(r[x], r[y]): r for r in rows}

    def values(name):
        return np.array([[cells[u, v].get(name, np.nan) if (u, v) in cells else np.nan for u in xs] for v in ys])

    size = max(4.5, 1.2 + 0.8 * len(xs)), 1.2 + 0.35 * max(4, len(ys))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    interval = tables.interval_column(tables.ERROR_ADVANTAGE)
    intervals = values(interval) if interval in rows[0] else None
    for axis, name, title, halves in (
            (axes[0], tables.ERROR_ADVANTAGE, 'Empirical advantage', intervals),
            (axes[1], tables.BOUND_ADVANTAGE, 'Difference of the bounds', None)):
        image = draw_heat_map(axis, values(name), halves, title)
        figure.colorbar(image, ax=axis, pad=0.02, aspect=30).outline.set_linewidth(0.6)
        axis.set_xticks(range(len(xs)), [f'{u:g}' for u in xs])
        axis.set_yticks(range(len(ys)), [f'{v:g}' for v in ys])
        axis.set_xlabel(LABELS[x])
    axes[0].set_ylabel(LABELS[y])
    figure.suptitle(f'TV error of single minus multi; {caption(rows, seed_rows, (x, y))}', fontsize=8)
    return figure


@studies.styled
def draw(tag: str, rows: list[dict], seed_rows: list[dict]):
    """The figure of a tag. The varied parameters are the first columns of the table."""
    varied = list(rows[0])[:2 if tag == 'grid' else 1]
    if not set(varied) <= set(LABELS) or (tag != 'grid' and varied != [dict(slope='n').get(tag, tag)]):
        raise dnnlib.UserError(f'--result: the table varies {" and ".join(varied)}; give one made with --tag={tag}')
    function = dict(grid=draw_grid, slope=draw_slope).get(tag, draw_curves)
    return function(rows, seed_rows, *varied)


def command(tag: str) -> click.Command:
    """The command line of plot_gaussian_<tag>.py."""
    @click.command(cls=cli.Command, help=f'Draws {TITLES[tag]}, as PNG and SVG beside the newest result.', epilog=f"""\b
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
        seeds_path = path.with_name(f'{path.stem}-seeds.csv')
        seed_rows = tables.load(seeds_path) if seeds_path.exists() else []
        for picture in studies.save_figure(draw(tag, rows, seed_rows), str(path.with_suffix(''))):
            print(picture)
    return main
