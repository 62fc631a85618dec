"""The best value of one setting by a metric: a one-dimensional search with a record, a table and a
curve.

The values are given, or a range, in which golden-section search goes on from both ends and the two
points between them, each time towards the better of the two. Each value is measured once: it goes
into the record on disk, from which a sweep that was stopped, or is to go further, continues.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from typing import NamedTuple

from dnnlib import UserError, lazy
from dnnlib.util import publishable, to_json, write_json

with lazy.imports():
    import numpy as np

    from dnnlib import pictures
    from torch_utils import distributed as dist

from metrics import compare, compute
from metrics.shares import Z, interval_of, parts_of, with_intervals

GOLDEN = (5**0.5 - 1) / 2
HELDOUT = 'heldout'


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is swept.

    text      title of its axis
    is_log    whether the search is in its logarithm
    decimals  to which it is rounded; None: to three significant digits
    least, most  what it can reasonably be, None: anything
    """

    text: str
    is_log: bool = True
    decimals: int | None = None
    least: float | None = None
    most: float | None = None

    def rounded(self, value: float) -> float:
        return float(f'{value:.3g}') if self.decimals is None else round(value, self.decimals)

    def to_line(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def of_line(self, u: float) -> float:
        return self.rounded(math.exp(u) if self.is_log else u)


PARAMETERS = {
    'std': Parameter('relative width of the average', decimals=3, least=0.001, most=0.288),
    'guidance': Parameter('strength of guidance, 1 = none', is_log=False, decimals=2, least=1),
    'interval-low': Parameter('noise level above which is guided'),
    'interval-high': Parameter('noise level up to which is guided')}


class Span(NamedTuple):
    """A range of values."""

    low: float
    high: float


def parse_values(text: str) -> Span | list[float]:
    """'1..4' or '1:4' -> a Span; '1,2,4' -> these values. Raises ValueError."""
    ends = text.replace('..', ':').split(':')
    values = list(map(float, ends if len(ends) == 2 else text.split(',')))
    if not all(map(math.isfinite, values)):
        raise ValueError(f'{text!r} is not finite')
    if len(ends) == 2:
        if not values[0] < values[1]:
            raise ValueError(f'{text!r} is no range; write LO..HI with LO < HI')
        return Span(*values)
    return sorted(set(values))


def parse_sweep(text: str) -> tuple[str, Span | list[float]]:
    """'guidance=1:4' -> ('guidance', Span(1, 4)). Raises ValueError."""
    name, _, values = text.partition('=')
    name = name.strip().replace('_', '-')
    if name not in PARAMETERS or name == 'std' or not values:
        raise ValueError('write guidance=LO:HI, interval-low=LO:HI or interval-high=LO:HI, or '
                         'values, e.g. guidance=1,1.5,2')
    values = parse_values(values)
    if PARAMETERS[name].is_log and min(values) <= 0:
        raise ValueError('noise levels of a sweep are above 0')
    return name, values


def parse_metric(text: str) -> str:
    """A metric of `metrics.compute`, or 'heldout'. Raises ValueError."""
    if text == HELDOUT:
        return text
    try:
        metric, = compute.parse_metrics(text)
    except ValueError as error:
        raise ValueError(f'{error}, and {HELDOUT}' if 'there are' in str(error)
                         else 'give one metric') from None
    return metric


def direction(metric: str, field: str = 'metric') -> int:
    """1 where more is better, -1 where less is. Raises UserError about `field` where neither
    is.
    """
    better = -1 if metric == HELDOUT else compute.METRICS[metric].better
    if not better:
        raise UserError('is neither better high nor low: sweep by another', field, metric)
    return better


def picture_of(path: str) -> str:
    """The curve beside a record."""
    return os.path.splitext(path)[0] + '.png'


class Sweep:
    """The measurements of one parameter, on disk.

    path      JSON file of the record, of the layout of one measurement: that of the best, and
              `points`, all of them
    name      key of PARAMETERS
    metric    what decides; `measure` may find more
    settings  plain values: all else that decides the numbers, so that only what was measured with
              the same ones counts
    measure   function(value) -> {metric: number}, numbers as of `compute.evaluate`; all processes
              call it, and what the first one says counts
    about     more plain values for the record

    Raises UserError if the file is of another sweep.
    """

    def __init__(self, path: str, name: str, metric: str, settings: dict, measure: Callable,
                 about: dict):
        self.path = path
        self.name = name
        self.parameter = PARAMETERS[name]
        self.metric = metric
        self.better = direction(metric)
        self.settings = json.loads(to_json(publishable(settings | dict(
            parameter=name, metric=metric, tf32=dist.uses_tf32()))))
        self.measure = measure
        self.about = about
        self.points = dist.broadcast_object(self._read())      # {value: results and parts}

    def _read(self) -> dict:
        if not os.path.isfile(self.path) or not os.path.getsize(self.path):
            return {}
        old = compare.read_results(self.path, 'dest')
        if 'points' not in old:
            return {}
        different = [key for key, value in self.settings.items() if value != old.get(key)]
        if different:
            raise UserError(f'is the record of a sweep with another {", ".join(different)}: '
                            'remove it, or choose another', 'dest', self.path)
        return {point['value']: point for point in old['points']}

    # --- The search -----------------------------------------------------------------------------

    def run(self, values: Span | list[float], most: int):
        """Measures the values, or in a range at most so many (four at least)."""
        if isinstance(values, Span):
            self._golden_section(values, most)
        else:
            for value in values:
                self._cost(value)

    def _golden_section(self, span: Span, most: int):
        line = self.parameter
        a, b = line.to_line(span.low), line.to_line(span.high)
        tried = [a, b, b - GOLDEN * (b - a), a + GOLDEN * (b - a)]
        cost = {u: self._cost(line.of_line(u)) for u in tried}
        _, _, c, d = tried
        seen = set(map(line.of_line, tried))
        while len(seen) < most:
            if cost[c] <= cost[d]:
                b, d = d, c
                new = c = b - GOLDEN * (b - a)
            else:
                a, c = c, d
                new = d = a + GOLDEN * (b - a)
            if line.of_line(new) in seen:                      # as near as values are told apart
                break
            seen.add(line.of_line(new))
            cost[new] = self._cost(line.of_line(new))

    def _cost(self, value: float) -> float:
        """The less, the better; measured now, if it is not in the record."""
        value = self.parameter.rounded(value)
        if value not in self.points:
            results = dist.broadcast_object(self.measure(value))
            self.points[value] = {'value': value, 'results': with_intervals(results),
                                  'parts': parts_of(results)}
            self._write()
            dist.print0(f'{self.name} {value:g}: {self.metric} {results[self.metric]:.6g}')
        return self._cost_of(self.points[value])

    def _cost_of(self, point: dict) -> float:
        number = point['results'][self.metric]
        known = number is not None and math.isfinite(number)   # None: nan, in a file
        return -self.better * number if known else math.inf

    # --- What came out --------------------------------------------------------------------------

    @property
    def best(self) -> dict:
        return min(self.points.values(), key=lambda point: (self._cost_of(point), point['value']))

    def _write(self):
        if dist.get_rank() == 0:
            best = self.best
            write_json(self.path, self.about | self.settings | {
                'best': best['value'], 'results': best['results'], 'parts': best['parts'],
                'points': self._rows()})

    def _rows(self) -> list[dict]:
        return [self.points[value] for value in sorted(self.points)]

    def _less_best(self) -> dict:
        """{value: its difference to the best}, from pairs of images of one seed."""
        sides = {value: point | {'seeds': 0} for value, point in sorted(self.points.items())
                 if math.isfinite(self._cost_of(point))}
        best = sides.pop(self.best['value'], None)
        return {value: row for value, side in sides.items()
                for row in compare.differences(best, side) if row.name == self.metric}

    def _beyond(self, alike: list[float]) -> str | None:
        """What to try, if an end of what was measured is the best, or as good (`alike`)."""
        values = sorted(self.points)
        best = self.best['value']
        ends = [end for end in (best, *alike) if end in (values[0], values[-1])]
        if not ends or len(values) < 2:
            return None
        end = ends[0]
        line = self.parameter
        is_low = end == values[0]
        half = (line.to_line(values[-1]) - line.to_line(values[0])) / 2
        further = line.of_line(line.to_line(end) + (-half if is_low else half))
        limit = line.least if is_low else line.most
        if limit is not None:
            further = max(further, limit) if is_low else min(further, limit)
        said = (f'{"It is" if end == best else "As good is"} the {"lower" if is_low else "upper"} '
                'end of what was measured')
        if (further >= end) if is_low else (further <= end):
            return f'{said}, and of what makes sense ({line.text})'
        low, high = (further, values[1]) if is_low else (values[-2], further)
        return (f'{said}, and better ones may lie beyond: go on with the range '
                f'{low:g}..{high:g}, and the same record')

    def report(self) -> list[str]:
        """The table, the best, and what to think of it, as lines; the curve goes to
        `picture_of(path)`.
        """
        best = self.best['value']
        less = self._less_best()
        lines = [f'    {self.name:>12}  {self.metric} (95%), and less that of the best']
        for point in self._rows():
            value = point['value']
            line = (f'  {"*" if value == best else " "} {value:12g}  '
                    f'{_number(point["results"][self.metric]):<12.6g}')
            if interval := self._interval(point):
                line += '  ({:.4g} to {:.4g})'.format(*interval)
            if row := less.get(value):
                line += f'  {row.value:+.4g}{interval_of(row.value)}'
            lines.append(line.rstrip())
        lines.append(f'Best: {self.name} {best:g}, {self.metric} '
                     f'{_number(self.best["results"][self.metric]):.6g}')
        alike = []
        if known := {value: row.value.interval for value, row in less.items()
                     if row.error is not None}:
            alike = [value for value, (low, high) in known.items() if low <= 0 <= high]
            lines.append('Not told apart from it (by 95% of the paired differences): '
                         + (', '.join(map('{:g}'.format, alike)) or 'none'))
        if beyond := self._beyond(alike):
            lines.append(beyond)
        if dist.get_rank() == 0:
            self._draw()
        return lines

    def _interval(self, point: dict) -> tuple | None:
        ends = [point['results'].get(f'{self.metric}_{end}') for end in ('low', 'high')]
        return None if None in ends else tuple(ends)

    def _draw(self):
        fig, (axes,) = pictures.figure()
        rows = self._rows()
        x = [row['value'] for row in rows]
        y = [_number(row['results'][self.metric]) for row in rows]
        best = self.best
        less = self._less_best()
        if less and all(row.error is not None for row in less.values()):
            error = [Z * less[value].error if value in less else 0 for value in x]
            label = 'with 95% of its difference to the best'
        else:
            ends = [self._interval(row) for row in rows]
            error = all(ends) and np.abs(np.subtract(np.transpose(ends), y))
            label = 'with 95%'
        bars = dict(yerr=error, label=label) if np.any(error) else {}
        axes.errorbar(x, y, **bars, marker='.', elinewidth=0.8, capsize=2)
        axes.plot(best['value'], _number(best['results'][self.metric]), 'o', markersize=10,
                  markerfacecolor='none', color='C3', label=f'best: {best["value"]:g}')
        axes.set(xlabel=self.parameter.text, ylabel=self.metric)
        if min(y) > 0 and max(y) > 5 * min(y):
            axes.set_yscale('log')
        if self.parameter.is_log:
            axes.set_xscale('log')
            least = (x[-1] / x[0]) ** 0.06                     # between ticks, or texts collide
            ticks = []
            for value in [best['value'], x[0], x[-1], *x]:
                if all(max(value / tick, tick / value) >= least for tick in ticks):
                    ticks.append(value)
            axes.set_xticks(ticks, list(map('{:g}'.format, ticks)))
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        pictures.save_figure(fig, picture_of(self.path))


def _number(value) -> float:
    return math.nan if value is None else value
