"""The advantage of many sources in the miniature: how much lower the loss of a class is in a model
of several classes than in a model of that class alone, and how that changes."""

import numpy as np

from dnnlib import lazy

with lazy.imports():
    import pandas as pd

import studies

# Columns of summary.csv, their titles and formats.
MEASURED = {'loss single': ('single', '.4f'), 'loss': ('multi', '.4f'),
            'difference': ('single - multi', '+.4f'), 'advantage': ('advantage %', '+.1f'),
            'fd single': ('fd single', '.0f'), 'fd': ('fd', '.0f'),
            'fd advantage': ('fd gain %', '+.0f')}
LABELS = {'sources': 'Number of sources', 'n': 'Training images of each class',
          'distance': 'Classes, and distance of their means'}


def pair(results: pd.DataFrame) -> pd.DataFrame:
    """A row for each class of each model of several classes, with the model of that class alone at
    the same seed and n: the `difference` of losses, single - multi, and what percent of the
    single-source loss that is, the `advantage`; `fd advantage`: the same of distances."""
    keys = ['seed', 'n', 'class']
    single = results[results['sources'] == 1][[*keys, 'loss', 'fd']]
    rows = results[results['sources'] > 1].merge(single, on=keys, suffixes=('', ' single'))
    rows['difference'] = rows['loss single'] - rows['loss']
    rows['advantage'] = 100 * rows['difference'] / rows['loss single']
    rows['fd advantage'] = 100 * (1 - rows['fd'] / rows['fd single'])
    return rows


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the classes of each model and over seeds, with half-widths of 95% intervals over
    seeds (Student's t)."""
    keys = ['n', 'sources', 'classes']
    means = rows.groupby([*keys, 'seed'])[list(MEASURED)].mean()
    summary = studies.average(means, keys, list(MEASURED))
    intervals = summary[studies.interval_column('advantage')]
    summary['helps'] = list(map(verdict, summary['advantage'], intervals))
    return summary


def panels(rows: pd.DataFrame, cells: dict) -> dict:
    """{panel: rows of its models, with their place `x` on its axis and the text `tick` there}, of
    `cells` {panel: [(x, n, classes), ...]}."""
    tables = {}
    for panel, models in cells.items():
        parts = []
        for x, n, classes in models:
            label = '-'.join(map(str, classes))
            tick = f'{label}\n{x:.0f}' if panel == 'distance' else str(x)
            of_model = rows[(rows['n'] == n) & (rows['classes'] == label)]
            parts.append(of_model.assign(x=x, tick=tick))
        tables[panel] = pd.concat(parts)
    return tables


def slope(rows: pd.DataFrame, x: pd.Series, value: str, groups=('seed',)) -> tuple:
    """Slope of `value` against x, and half-width of its 95% interval: a slope for each seed, by
    least squares of what x and the value are more than their means over `groups`. NaN where x does
    not vary.
    """
    table = rows[['seed', 'class']].assign(x=x, y=rows[value])
    table[['x', 'y']] -= table.groupby(list(groups))[['x', 'y']].transform('mean')
    sums = table.assign(xy=table['x'] * table['y'], xx=table['x'] ** 2).groupby('seed').sum()
    slopes = sums['xy'] / sums['xx'].where(sums['xx'] > 1e-9)
    return slopes.mean(), studies.half_width(slopes)


def verdict(mean: float, interval: float) -> str:
    """Whether something is positive: undecided if its interval holds zero, or does not exist."""
    if not abs(mean) > interval:
        return 'undecided'
    return 'yes' if mean > 0 else 'no'


def slopes(panels: dict) -> pd.DataFrame:
    """A row for each claim on how advantage and difference change, with its verdicts."""
    sources, n, alike = (panels[name] for name in ('sources', 'n', 'distance'))
    table = []
    for claim, sign, rows, x, groups in (
            ('grows with ln(sources)', 1, sources, np.log(sources['x']), ['seed']),
            ('falls with ln(n)', -1, n, np.log(n['x']), ['seed']),
            ('falls with distance / 100', -1, alike, alike['x'] / 100, ['seed']),
            ('falls with distance / 100, within a class', -1, alike, alike['distance'] / 100,
             ['seed', 'class'])):
        row = {'claim': claim}
        for value in ('advantage', 'difference'):
            mean, interval = slope(rows, x, value, groups)
            row |= {value: mean, studies.interval_column(value): interval,
                    f'verdict by {value}': verdict(sign * mean, interval)}
        table.append(row)
    return pd.DataFrame(table)


def show(summary: pd.DataFrame, slopes: pd.DataFrame, results: pd.DataFrame):
    """Prints the averages, the slopes, and whether the best moments were inside of training."""
    def text(table, name, form):
        return studies.plus_minus(table, name, studies.interval_column(name), form)

    shown = summary[['n', 'classes']].assign(**{
        title: text(summary, name, form) for name, (title, form) in MEASURED.items()},
        helps=summary['helps'])
    print('\nHeld-out loss, mean ± 95% interval over seeds (gains: percent of single):\n'
          + shown.to_string(index=False))
    shown = slopes[['claim']].assign(**{
        f'by {name}': text(slopes, name, form) + ', ' + slopes[f'verdict by {name}']
        for name, form in (('advantage', '+.2f'), ('difference', '+.4f'))})
    print('\nThe advantage ...: slope, mean ± 95% interval over seeds\n'
          + shown.to_string(index=False))
    late = (results['best step'] == results['steps']).sum()
    print(f'\n{late} of {len(results)} losses were the lowest at the end of training; the longest '
          f'training took {results["steps"].max()} steps')


@studies.styled
def draw(panels: dict, n: int):
    """The advantage in percent, a panel for each comparison, with intervals over seeds."""
    titles = {'sources': f'More sources (n = {n})', 'n': 'More data (3 sources)',
              'distance': f'Less alike (3 sources, n = {n})'}
    figure = studies.draw_panels([
        dict(table=rows.assign(all=True), x='x', y='advantage', group='all', labels={True: None},
             interval=studies.half_width, xlabel=LABELS[panel], ylabel='Advantage of many (%)',
             title=titles[panel],
             ticks=dict(rows.sort_values('x')[['x', 'tick']].drop_duplicates().to_numpy()))
        for panel, rows in panels.items()])
    for axis in figure.axes:
        axis.axhline(0, color='0.4', linestyle=':', linewidth=0.8)
        axis.set_ylim(bottom=min(axis.get_ylim()[0], 0))
    return figure
