"""What generated images gain: the analysis of the study in miniature.

A table of results has a row for each `factor`, `value` of it and `seed`, with accuracies in
percent (`robust`, `clean`) and their gains over the same training without generated images
(`robust gain`, `clean gain`).
"""

import itertools

import numpy as np

import studies
from dnnlib import lazy, util
from studies import interval_column

with lazy.imports():
    import pandas as pd

MARGIN = 1.0           # percentage points: an effect that is surely smaller does not count
MEASURES = {'robust': 'under attack', 'clean': 'clean'}
SERIES = [studies.SERIES[0], dict(color='0.7', marker='s', zorder=2)]   # clean: paler, behind
LOWEST = -10           # of the figure
FACTORS = {'share': 'share of generated images', 'real': 'real images of a class',
           'number': 'generated images of a class', 'selection': 'which fifth of them',
           'generator': 'diffusion model trained for', 'training': 'training of the classifier'}


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95% intervals, a row for each factor and value."""
    measured = list(results.columns.drop(['factor', 'value', 'seed']))
    return pd.concat([
        studies.average(rows.drop(columns=['factor', 'seed']), ['value'], measured).assign(
            factor=factor) for factor, rows in results.groupby('factor', sort=False)])


def change(gains: pd.DataFrame) -> pd.Series:
    """What a line through the gains [seeds, values] against the logarithm of the value changes
    from the least value to the largest, for each seed."""
    x = np.log(gains.columns.to_numpy(float))
    x = x - x.mean()
    return gains @ x / (x @ x) * np.ptp(x)


def claims(results: pd.DataFrame) -> pd.DataFrame:
    """The effects in points of robust accuracy, with 95% intervals over seeds, and whether they
    are there: yes if the interval lies above zero, no if it ends below MARGIN."""
    real, number, selection, generator = (
        results[results['factor'] == factor].pivot(index='seed', columns='value',
                                                   values='robust gain')
        for factor in ('real', 'number', 'selection', 'generator'))
    effects = {'generated images help': number.iloc[:, -1]}
    for claim, gains, sign in (('with more real images they help less', real, -1),
                               ('more of them help more', number, 1),
                               ('a longer trained diffusion model helps more', generator, 1)):
        if gains.shape[1] > 1:
            effects[claim] = sign * change(gains)
    for better, worse in itertools.combinations(('best', 'random', 'worst'), 2):
        effects[f'the {better} are better than {worse} ones'] = (
            selection[better] - selection[worse])
    rows = []
    for claim, effect in effects.items():
        mean, half = effect.mean(), studies.half_width(effect)
        answer = 'yes' if mean - half > 0 else 'no' if mean + half < MARGIN else 'undecided'
        rows.append({'claim': claim, 'effect': mean, interval_column('effect'): half,
                     'seeds': len(effect), 'answer': answer})
    return pd.DataFrame(rows)


def draw(results: pd.DataFrame):
    """Gains with intervals over seeds, a panel for each factor. A mean below LOWEST is written."""
    table = pd.concat([results.assign(measure=name, gain=results[f'{name} gain'])
                       for name in MEASURES])
    panels = [dict(table=table[table['factor'] == factor], x='value', y='gain', group='measure',
                   labels=MEASURES if factor == 'training' else dict.fromkeys(MEASURES),
                   title=title,
                   interval=studies.half_width, series=SERIES, ylabel='gain (points)',
                   ticks={value: f'{value}' if factor != 'generator' else util.format_count(value)
                          for value in results['value'][results['factor'] == factor].unique()})
              for factor, title in FACTORS.items()]
    figure = studies.draw_panels(panels, rows=2)
    for axis, panel in zip(figure.axes, panels, strict=True):
        axis.axhline(0, color='0.5', linewidth=0.8, zorder=0)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], LOWEST))
        axis.tick_params(labelbottom=True)                     # each has values of its own
        means = panel['table'].groupby(['measure', 'value'])['gain'].mean().unstack()
        for place, value in enumerate(panel['ticks']):
            low = '\n'.join(f'↓ {means.loc[name, value]:.0f} {title}' for name, title
                            in MEASURES.items() if means.loc[name, value] < LOWEST)
            if low:
                axis.annotate(low, (place, LOWEST), (-16, 4), textcoords='offset points',
                              fontsize=7, bbox=dict(facecolor='white', edgecolor='none', pad=1))
    return figure
