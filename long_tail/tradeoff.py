"""Curves of recognition and recall in the miniature, which guidance moves along: gaps between the
curves of two methods, their means over seeds, and the figure."""

import itertools

import numpy as np

from dnnlib import lazy

with lazy.imports():
    import pandas as pd

import studies

# `weakened` is the plain model, sampled with weak labels; its colour is that of all panels.
METHODS = {'plain': 'plain', 'cb': 'class-balancing', 'finetune': 'fine-tuned',
           'weakened': 'plain, weak labels'}
GROUPS = ('few', 'medium', 'many')
# Curves are compared with that of plain, and with that of plain with weak labels.
PAIRS = [('cb', 'plain'), ('finetune', 'plain'), ('weakened', 'plain'), ('cb', 'weakened'),
         ('finetune', 'weakened')]
SAME = 0.01                                                    # a gap that counts as none


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far a curve [k, 2] of (x, y), by x, lies above another: the mean difference of y,
    interpolated linearly, over the x that both reach; NaN if there is none."""
    curves = [curve[np.argsort(curve[:, 0])].T for curve in (ours, theirs)]
    low = max(x[0] for x, _ in curves)
    high = min(x[-1] for x, _ in curves)
    first, second = (np.interp(np.linspace(low, high, 100), *curve).mean() for curve in curves)
    return first - second if high > low else np.nan


def differences(results: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """Of methods to others of the same seed: a row for each `measure`, method, other one (`than`),
    group (`at`) and seed, with its `value`.

    Guidance adds to recognition what it takes from recall. `gap`, between two of PAIRS, compares
    the mean of both where their difference is the same: the area between the curves along omega,
    over its length. `recall gap` compares recall where recognition is the same (of curves that
    rise to full recognition little is left). `loss, %`: the held-out loss less that of plain, in %
    of it.
    """
    table = results.assign(lead=results['recognition'] - results['recall'],
                           mean=results[['recognition', 'recall']].mean(axis='columns'))
    curves = dict(list(table.groupby(['method', 'group', 'seed'])))
    axes = {'gap': ['lead', 'mean'], 'recall gap': ['recognition', 'recall']}
    rows = []
    for (method, than), measure, (_, at, seed) in itertools.product(
            PAIRS, axes, [key for key in curves if key[0] == 'plain']):
        pair = [curves.get((name, at, seed)) for name in (method, than)]
        if all(curve is not None for curve in pair):
            value = gap(*(curve[axes[measure]].to_numpy() for curve in pair))
            rows.append((measure, method, than, at, seed, value))
    of = losses.set_index(['method', 'group', 'seed'])['loss']
    rows += [('loss, %', method, 'plain', at, seed, 100 * value / of['plain', at, seed] - 100)
             for (method, at, seed), value in of.items()
             if method != 'plain' and ('plain', at, seed) in of]
    return pd.DataFrame(rows, columns=['measure', 'method', 'than', 'at', 'seed', 'value'])


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with intervals, in order. `zero`: is the value above or below zero (its
    interval excludes zero)? `same`, of gaps: is it as good as none (its interval is within SAME:
    yes; beyond: no)?"""
    table = studies.average(rows.drop(columns='seed'), ['measure', 'method', 'than', 'at'],
                            ['value'])
    places = {name: place for place, name in enumerate([*METHODS, *GROUPS])}
    table = table.sort_values(['measure', 'method', 'than', 'at'], ignore_index=True,
                              key=lambda column: column.map(lambda name: places.get(name, name))
                              if column.name in ('method', 'than') else column)
    mean = table['value']
    half = table[studies.interval_column('value')]
    table['zero'] = np.select([mean > half, mean < -half], ['above', 'below'], 'undecided')
    same = np.select([mean.abs() + half <= SAME, mean.abs() - half > SAME], ['yes', 'no'],
                     'undecided')
    return table.assign(same=np.where(table['measure'] == 'gap', same, ''))


@studies.styled
def draw(results: pd.DataFrame, summary: pd.DataFrame):
    """Curves of recognition and recall of each group; below, the gaps between them, the held-out
    loss, and the effect of labels."""
    figure, (curves, (area, loss, labels)) = studies.plt.subplots(2, 3, figsize=(7.2, 4.9))
    look = dict(zip(METHODS, studies.SERIES, strict=True))
    means = results.groupby(['group', 'method', 'omega'])[['recognition', 'recall']].mean()
    for axis, group in zip(curves, GROUPS, strict=True):
        for method, title in METHODS.items():
            if method in means.index.unique('method'):
                axis.plot(*means.loc[group, method].to_numpy().T, label=title, **look[method])
        axis.set(title=f'classes of {group} images', xlabel='recognition', ylabel='recall')
    curves[0].legend()

    def dots(axis, measure, than='plain', shift=0.0, **more):
        for place, method in enumerate(METHODS):
            rows = summary.query('measure == @measure and method == @method and than == @than')
            rows = rows.set_index('at').reindex(GROUPS)
            axis.errorbar(np.arange(len(GROUPS)) + 0.16 * (place - 2) + shift, rows['value'],
                          rows[studies.interval_column('value')],
                          **look[method] | {'linestyle': ''} | more)
        axis.axhline(0, color='0.4', linewidth=0.6)
        axis.set_xticks(range(len(GROUPS)), GROUPS)

    dots(area, 'gap')
    dots(area, 'gap', 'weakened', 0.08, markerfacecolor='white', elinewidth=0.6)
    area.axhspan(-SAME, SAME, color='0.9', zorder=0)
    area.set(title='gap to plain (hollow: to weak labels)', ylabel='above 0: better')
    dots(loss, 'loss, %')
    loss.set(title='held-out loss', ylabel='above that of plain, %')
    for method, rows in summary[summary['measure'] == 'label effect'].groupby('method'):
        labels.errorbar(rows['at'], rows['value'], rows[studies.interval_column('value')],
                        **look[method])
        labels.plot(rows['at'], rows['formula'], color='0.2', linestyle='--', linewidth=0.8,
                    marker='')
    labels.set(title='effect of labels (dashed: formula)', xlabel='noise, t/T',
               ylabel='in shares of plain', ylim=(0, 1.05))
    return figure
