"""From shares of copies to capacities, effects and a figure: the statistics of
digits_memorization.py. The seed is the unit of all intervals (95%, Student's t)."""

import numpy as np

from dnnlib import lazy

with lazy.imports():
    import matplotlib.pyplot as plt
    import pandas as pd
    from sklearn.isotonic import isotonic_regression

import studies

LEVELS = {'C90': 0.9, 'C50': 0.5}                              # shares of copies at a capacity
TURN = 0.1                                                     # copies where they begin
# What is as good as no effect: a factor of a capacity, points of a share, a factor of a length.
MARGINS = dict.fromkeys(LEVELS, np.log(1.15)) | {'difference': 0.05, 'begin / turn': np.log(1.5)}


def crossing(x, y, level: float) -> tuple[float, str]:
    """Where a function that falls passes a level, by its values y at x > 0: those that do not fall
    are replaced by means (isotonic regression), between them the function is linear in log x.

    (last x, '>') if it is above the level everywhere, (first x, '<') if it is nowhere; else ''.
    """
    x = np.asarray(x)
    y = isotonic_regression(np.asarray(y, float), increasing=False)
    above = np.flatnonzero(y >= level)
    if len(above) in (0, len(x)):
        return (x[-1], '>') if len(above) else (x[0], '<')
    i = above[-1]
    share = (y[i] - level) / (y[i] - y[i + 1])
    return float(x[i] * (x[i + 1] / x[i]) ** share), ''


def capacities(results: pd.DataFrame) -> pd.DataFrame:
    """A row for each variant, seed and level: the size at which so many samples are copies, and
    '<' or '>' where it is that of the smallest or largest set as a bound. One size has none."""
    rows = []
    for (variant, seed), group in results.groupby(['variant', 'seed'], sort=False):
        group = group.sort_values('size')
        if len(group) < 2:
            continue
        for measure, level in LEVELS.items():
            size, bound = crossing(group['size'], group['memorization_ratio'], level)
            rows.append(dict(variant=variant, seed=seed, measure=measure, capacity=size,
                             bound=bound))
    return pd.DataFrame(rows)


def turns(course: pd.DataFrame) -> pd.DataFrame:
    """For each seed and size: `turn`, the thousands of images at which the held-out loss is least
    (of a parabola through the least value and its neighbours, in log kimg), and `begin`, those at
    which the share of copies passes TURN; each with its bound (see `crossing`)."""
    rows = []
    for (seed, size), group in course.groupby(['seed', 'size']):
        group = group.sort_values('kimg')
        begin, bound = crossing(group['kimg'], -group['memorization_ratio'], -TURN)
        i = int(np.argmin(group['heldout']))
        turn = group['kimg'].iloc[i]
        turn_bound = '>' if i else '<'
        if 0 < i < len(group) - 1:
            near = group.iloc[i - 1:i + 2]
            a, b, _ = np.polyfit(np.log(near['kimg']), near['heldout'], 2)
            turn, turn_bound = np.exp(-b / (2 * a)), ''
        rows.append(dict(seed=seed, size=size, begin=begin, begin_bound=bound, turn=turn,
                         turn_bound=turn_bound))
    return pd.DataFrame(rows)


# --- Over seeds ----------------------------------------------------------------------------------


def interval(values: pd.Series, measure: str) -> dict:
    """Mean over seeds with its interval, as {'mean', 'low', 'high'}; `values` are logarithms, but
    for a difference, and the results are the numbers."""
    half = studies.half_width(values)
    ends = values.mean() + np.array([0, -half, half])
    return dict(zip(('mean', 'low', 'high'), ends if measure == 'difference' else np.exp(ends),
                    strict=True))


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """The capacity of each variant over seeds, as the mean of logarithms; `bounds`: of which of
    the seeds it is a bound, and counts as that."""
    rows = [dict(variant=variant, measure=measure, seeds=len(group),
                 bounds=''.join(sorted(group['bound'])))
            | interval(np.log(group['capacity']), measure)
            for (variant, measure), group in table.groupby(['variant', 'measure'], sort=False)]
    return pd.DataFrame(rows)


def verdict(effect: dict, expected: str) -> str:
    """What an interval says: 'yes', 'no' or 'undecided' of what is expected.

    more, less  yes: the interval is on that side of no effect; no: it is on the other, or within
                the margin
    same        yes: it is within the margin; no: it is all outside
    other       of two sides: 'more', 'less', or 'same' within the margin
    """
    low, high = effect['low'], effect['high']
    if effect['measure'] != 'difference':
        low, high = np.log([low, high])
    margin = MARGINS[effect['measure']]
    within = -margin <= low and high <= margin
    if expected == 'same':
        return 'yes' if within else 'no' if low > margin or high < -margin else 'undecided'
    side = 'more' if low > 0 else 'less' if high < 0 else ''
    if expected == 'other':
        return side or ('same' if within else 'undecided')
    return 'yes' if side == expected else 'no' if side or within else 'undecided'


def ratios(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """(logarithms of the ratios of capacities, whether each is a bound), of the seeds that have
    one.

    Where one capacity is a bound, so is the ratio, and it counts if it is nearer to 1 than the
    true one: if it is at least so much above 1, or below. Where both are, there is none.
    """
    ours, theirs = ours.align(theirs, join='inner', axis=0)
    logs = np.log(ours['capacity'] / theirs['capacity'])
    above = (ours['bound'] == '>') | (theirs['bound'] == '<')  # the true one is
    below = (ours['bound'] == '<') | (theirs['bound'] == '>')
    both = (ours['bound'] != '') & (theirs['bound'] != '')
    counts = ~both & ~(above & (logs < 0)) & ~(below & (logs > 0))
    return logs[counts], (above | below)[counts]


def effects(results: pd.DataFrame, table: pd.DataFrame, claims: dict) -> pd.DataFrame:
    """One variant against another, `claims` {(variant, other): what is expected, see `verdict`},
    paired by seed: the ratio of their capacities, and the difference of their shares of copies, a
    mean over the sizes that both have.

    C50 decides, unless more than one seed has no ratio, or more than half of the ratios are
    bounds: then the difference does.
    """
    rows = []
    shares = results.pivot_table('memorization_ratio', ['seed', 'size'], 'variant')
    for (name, other), expected in claims.items():
        if not {name, other} <= set(shares):
            continue
        pair = dict(variant=name, other=other)
        for measure in LEVELS:
            ours, theirs = (table[(table['variant'] == title) & (table['measure'] == measure)]
                            .set_index('seed') for title in (name, other))
            logs, bounded = ratios(ours, theirs)
            rows.append(pair | dict(measure=measure, seeds=len(logs), bounds=sum(bounded))
                        | interval(logs, measure))
        decides = rows[-1]
        gains = (shares[name] - shares[other]).dropna().groupby('seed').mean()
        rows.append(pair | dict(measure='difference', seeds=len(gains), bounds=0)
                    | interval(gains, 'difference'))
        if decides['seeds'] < len(gains) - 1 or decides['bounds'] > decides['seeds'] / 2:
            decides = rows[-1]
        decides |= dict(expected=expected, verdict=verdict(decides, expected))
    return pd.DataFrame(rows)


def falls(results: pd.DataFrame, claims: dict) -> pd.DataFrame:
    """Rows as of `effects`: the share of copies at a large size against that at a small one, for
    `claims` {variant: (small, large)}."""
    rows = []
    table = results.pivot_table('memorization_ratio', 'seed', ['variant', 'size'])
    for variant, (small, large) in claims.items():
        if {(variant, small), (variant, large)} <= set(table):
            gains = table[variant, large] - table[variant, small]
            row = dict(variant=f'{variant}, {large} images', other=f'{small} images',
                       measure='difference', seeds=len(gains), bounds=0)
            row |= interval(gains, 'difference')
            rows.append(row | dict(expected='less', verdict=verdict(row, 'less')))
    return pd.DataFrame(rows)


def copies_and_loss(turn: pd.DataFrame, size: int) -> pd.DataFrame:
    """A row as of `effects`, of `turns`: the length at which copies begin against that at which
    the held-out loss is least, for a size; none if that was not trained."""
    rows = turn[turn['size'] == size]
    if rows.empty:
        return rows[[]]
    measure = 'begin / turn'
    row = dict(variant=f'{TURN:.0%} copies', other='least held-out loss', measure=measure,
               seeds=len(rows), bounds=sum(rows['begin_bound'] + rows['turn_bound'] != ''))
    row |= interval(np.log(rows['begin'] / rows['turn']), measure)
    return pd.DataFrame([row | dict(expected='same', verdict=verdict(row, 'same'))])


# --- The figure ----------------------------------------------------------------------------------


def draw_capacity(axis, summary: pd.DataFrame, sizes):
    """The capacity of each variant with its interval; hollow where it is a bound in some seeds, a
    triangle where it is the same one in all."""
    names = list(dict.fromkeys(summary['variant']))
    for measure, series, shift in zip(LEVELS, studies.SERIES, (0.15, -0.15), strict=False):
        rows = summary[summary['measure'] == measure].set_index('variant').loc[names]
        places = np.arange(len(names)) + shift
        errors = rows['mean'] - rows['low'], rows['high'] - rows['mean']
        bars = dict(series, linestyle='none')
        axis.errorbar(rows['mean'], places, xerr=np.nan_to_num(errors), elinewidth=0.8,
                      label=f'{LEVELS[measure]:.0%} are copies', **bars)
        for place, row in zip(places, rows.itertuples(), strict=True):
            if row.bounds:
                same = row.bounds in ('<' * row.seeds, '>' * row.seeds)
                marker = row.bounds[0] if same else series['marker']
                axis.plot(row.mean, place, markerfacecolor='white', zorder=4,
                          color=series['color'], marker=marker)
        axis.axvline(rows['mean'].iloc[0], color=series['color'], linewidth=0.6, linestyle=':')
    axis.set(xscale='log', xlim=(0.9 * min(sizes), 1.1 * max(sizes)), xticks=sizes,
             xticklabels=sizes, xlabel='Training images', yticks=range(len(names)),
             yticklabels=names, title='Size at which so many are copies')
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.legend()


def draw_course(axis, course: pd.DataFrame, size: int):
    """Held-out loss and share of copies of the base against the length of training, of a size or,
    if that was not trained, of the largest one."""
    size = max(course['size'], key=lambda one: (one == size, one))
    rows = course[course['size'] == size].groupby('kimg')
    share = axis.twinx()
    for place, name, label, scale, series in (
            (axis, 'heldout', 'Held-out loss', 1, studies.SERIES[2]),
            (share, 'memorization_ratio', 'Copies (%)', 100, studies.SERIES[0])):
        mean = scale * rows[name].mean()
        half = scale * np.nan_to_num(studies.half_width(rows[name]))
        place.errorbar(mean.index, mean, yerr=half, elinewidth=0.8, **series)
        place.set_ylabel(label, color=series['color'])
    share.set_ylim(-4, 104)
    axis.set(xscale='log', xlabel='Thousands of images seen',
             title=f'Base of {size} images, on its way')
    axis.set_xticks(list(rows.groups), rows.groups)
    axis.minorticks_off()


@studies.styled
def draw(results: pd.DataFrame, summary: pd.DataFrame, course: pd.DataFrame, size: int):
    """Copies against size, the capacity of each variant, and the course of training for a size."""
    count = summary['variant'].nunique()
    figure, axes = plt.subplots(1, 3, figsize=(9.5, max(2.8, 0.22 * count + 0.8)),
                                width_ratios=[1, 1.15, 1])
    shown = {name: name for name in ('base', 'optimal denoiser', 'unique labels', '1 class')
             if name in set(results['variant'])}
    studies.draw_lines(
        axes[0], results.assign(percent=100 * results['memorization_ratio']), 'size', 'percent',
        'variant', shown, interval=lambda seeds: np.nan_to_num([studies.half_width(seeds)] * 2),
        ylim=(-4, 104), xlabel='Training images', ylabel='Copies (%)',
        title='Samples that are copies')
    axes[0].legend(loc='center right', bbox_to_anchor=(1, 0.78))
    draw_capacity(axes[1], summary[summary['variant'] != 'optimal denoiser'],
                  sorted(set(results['size'])))
    draw_course(axes[2], course, size)
    return figure
