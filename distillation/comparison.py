"""What the study in miniature says: students at equal steps and at equal compute, intervals over
seeds, and the figure.

Tables have a row for each measurement: `seed`, `learned from`, `rho` (of distilled students),
`steps`, `gmac` (what the training has cost), `fd` (distance) and `recognised` (a share).
"""

import numpy as np

import studies
from dnnlib import lazy

with lazy.imports():
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.ticker import LogLocator, NullLocator

RHO = 0.4                                                      # of the long runs
ORIGINS = {'distilled': "teacher's steps", 'on-samples': "teacher's samples",
           'on-data': 'real digits'}
DISTILLED = ORIGINS['distilled']
FLOOR = 'as many real digits'


def curves(results: pd.DataFrame, x: str) -> dict:
    """{(origin, seed): columns x, fd, recognised} of the students that train to the end."""
    long = results[results['learned from'].isin(ORIGINS.values())
                   & (results['rho'].isna() | (results['rho'] == RHO))]
    return {key: rows.sort_values(x) for key, rows in long.groupby(['learned from', 'seed'])}


def at(curve: pd.DataFrame, x: str, where, y: str):
    """A curve at other places, linear in log x: log distance, or the share recognised."""
    values = np.log(curve['fd']) if y == 'fd' else curve[y]
    return np.interp(np.log(where), np.log(curve[x].astype(float)), values, np.nan, np.nan)


def compare(results: pd.DataFrame) -> pd.DataFrame:
    """Distilled students against the others, seed by seed: log of the ratio of their distances,
    and difference of the shares recognised, at equal steps and at equal compute.

    Places are the measurements of the curve that ends first, as far as the other one reaches.
    """
    rows = []
    for x in ('steps', 'gmac'):
        lines = curves(results, x)
        for (other, seed), theirs in lines.items():
            if other == DISTILLED or (DISTILLED, seed) not in lines:
                continue
            ours = lines[DISTILLED, seed]
            places = min(ours[x], theirs[x], key=max).astype(float)
            rows += [{'seed': seed, 'against': other, 'at equal': x, 'x': place,
                      'log ratio': ratio, 'recognised': more} for place, ratio, more in zip(
                places, *(at(ours, x, places, y) - at(theirs, x, places, y)
                          for y in ('fd', 'recognised')), strict=True)]
    return pd.DataFrame(rows).dropna()


def slopes(results: pd.DataFrame, steps: int) -> pd.Series:
    """Of each seed: slope of log distance against log rho, at equal steps."""
    rows = results[results['rho'].notna() & (results['steps'] == steps)]
    return pd.Series({seed: np.polyfit(np.log(one['rho']), np.log(one['fd']), 1)[0]
                      for seed, one in rows.groupby('seed')})


def claim(text: str, values: pd.Series, log: bool = True) -> dict:
    """A row: mean over seeds with its 95% interval, and whether all of it is below zero: 'yes',
    above: 'no'. `log`: the values are logarithms, and the row says the ratio."""
    mean, half = values.mean(), studies.half_width(values)
    verdict = 'yes' if mean + half < 0 else 'no' if mean - half > 0 else 'undecided'
    numbers = np.array([mean, mean - half, mean + half])
    return {'claim': text, 'seeds': len(values), **dict(zip(
        ('estimate', 'low', 'high'), np.exp(numbers) if log else numbers, strict=True)),
        'verdict': verdict}


def over_training(differences: pd.DataFrame) -> pd.DataFrame:
    """The ratio of distances at every place, with its interval and verdict."""
    places = differences.groupby(['against', 'at equal', 'x'])['log ratio']
    return pd.DataFrame([{'against': other, 'at equal': x, 'x': place} | claim('', values)
                         for (other, x, place), values in places]).drop(columns='claim')


def claims(results: pd.DataFrame, differences: pd.DataFrame, rho_steps: int) -> pd.DataFrame:
    """At the end of what can be compared."""
    rows = []
    for (other, x), one in differences.groupby(['against', 'at equal']):
        table = one.pivot(index='x', columns='seed', values='log ratio')
        name = 'steps' if x == 'steps' else 'compute'
        rows.append(claim(f"teacher's steps beat {other} at equal {name}", table.iloc[-1]))
        if x == 'steps' and len(table) > 1:
            half = table.loc[:max(table.index[-1] / 2, table.index[0])].iloc[-1]
            rows.append(claim(f'{other} fall further behind in the second half',
                              table.iloc[-1] - half))
    if results['rho'].nunique() > 1:
        rows.append(claim('a larger rho is better (slope)', slopes(results, rho_steps), log=False))
    return pd.DataFrame(rows)


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95% intervals (low, high); of distances the geometric ones."""
    groups = results.assign(fd=np.log(results['fd'])).groupby(
        ['learned from', 'rho', 'steps', 'gmac'], dropna=False, sort=False)
    table = groups['seed'].count().to_frame('seeds')
    for name in ('fd', 'recognised'):
        mean, half = groups[name].mean(), studies.half_width(groups[name])
        for column, values in {'': mean, ' low': mean - half, ' high': mean + half}.items():
            table[name + column] = np.exp(values) if name == 'fd' else values
    return table.reset_index()


@studies.styled
def draw(summary: pd.DataFrame, rho_steps: int):
    """Distance against steps, compute and rho, and recognition against steps."""
    figure, axes = plt.subplots(1, 4, figsize=(10.4, 2.7))
    distilled = summary['rho'].notna()
    at_rho = {DISTILLED: summary[distilled & (summary['steps'] == rho_steps)]}
    origins = summary[~distilled | (summary['rho'] == RHO)].groupby('learned from')
    students = {origin: origins.get_group(origin) for origin in ORIGINS.values()}
    for axis, lines, x, y, title, label in (
            (axes[0], students, 'steps', 'fd', 'At equal steps', 'Training steps'),
            (axes[1], students, 'gmac', 'fd', 'At equal compute', 'Billions of multiply-adds'),
            (axes[2], at_rho, 'rho', 'fd', 'Size of the cache', f'rho, {rho_steps:,} steps'),
            (axes[3], students, 'steps', 'recognised', 'Recognised', 'Training steps')):
        for (origin, rows), series in zip(lines.items(), studies.SERIES, strict=False):
            rows = rows.sort_values(x)
            bars = rows[y] - rows[f'{y} low'], rows[f'{y} high'] - rows[y]
            axis.errorbar(rows[x].astype(float), rows[y], yerr=np.nan_to_num(bars),
                          elinewidth=0.7, label=f'student of {origin}', **series)
        for origin, style in (('teacher', '--'), (FLOOR, ':')):
            level = origins.get_group(origin)[y].iloc[-1]
            if level == level:
                axis.axhline(level, color='0.5', linewidth=0.8, linestyle=style, label=origin)
        axis.set(title=title, xlabel=label, xscale='log')
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_locator(NullLocator())
    for axis in axes[:3]:
        axis.set_yscale('log')
        axis.sharey(axes[0])
    for axis in axes[1:3]:
        axis.tick_params(labelleft=False)
    axes[0].set_ylabel('Fréchet distance of pixels')
    axes[3].yaxis.set_major_formatter('{x:.0%}')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=5)
    return figure
