"""Curves as inline SVG, which needs no script; the page's script reads `data-points` for its
tooltips."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable

from training.report.folder import Point
from training.report.markup import Markup, join, tag

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 468, 14, 242
MOST_POINTS = 240           # of a line; more are drawn as means, in the band of their range
COLORS = 6                  # of the style sheet
LOG_RATIO = 30              # largest to smallest value of a logarithmic axis, at least
FEW = 30                    # points that get a dot each
MANY = 8                    # lines that are named in a legend


@dataclasses.dataclass(frozen=True)
class Series:
    """A line: its label, its points by x, and which of the colours it has; `is_faint`: dashed."""

    label: str
    points: list[Point]
    color: int = 0
    is_faint: bool = False


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: means of neighbours, with the range of what they stand for. What is
    not a number stays so only if a whole group is.
    """
    if len(points) <= most:
        return points
    out = []
    for group in (points[i * len(points) // most:(i + 1) * len(points) // most]
                  for i in range(most)):
        values = [point.y for point in group if point.y == point.y]
        x = math.fsum(point.x for point in group) / len(group)
        if values:
            out.append(Point(x, math.fsum(values) / len(values), min(values), max(values)))
        else:
            out.append(Point(x, math.nan))
    return out


class Axis:
    """A scale from values to pixels, with round ticks."""

    def __init__(self, values: Iterable[float], start: float, end: float, is_log: bool | None,
                 margin: float = 0, unit: float = 1, floor: float | None = None):
        values = [value / unit for value in values]
        low, high = min(values), max(values)
        if is_log is None:
            is_log = low > 0 and high / low >= LOG_RATIO
        self.is_log = is_log and low > 0
        if self.is_log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            pad = 0.5 if self.is_log else max(abs(high) / 10, 0.5 if high == 0 else 0)
            low, high = low - pad, high + pad
        pad = margin * (high - low)
        self.low = low - pad if floor is None or self.is_log else max(low - pad, floor)
        self.high = high + pad
        self.start, self.end, self.unit = start, end, unit

    def __call__(self, value: float) -> float:
        value /= self.unit
        if self.is_log:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0), 1) * (self.end - self.start)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(pixel, text) of at most about so many."""
        if self.is_log:
            first, last = math.floor(self.low), math.ceil(self.high)
            step = max(1, -(-(last - first) // most))
            tens = [10.0**e for e in range(first, last + 1, step)]
            for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                values = [part * ten for ten in tens for part in parts]
                inside = [v for v in values if self.low <= math.log10(v) <= self.high]
                if len(inside) >= 3 or step > 1:
                    break
            values = inside[::max(1, -(-len(inside) // (most + 1)))]
            return [(self(v * self.unit), compact(v)) for v in values]
        rough = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * part for part in (1, 2, 2.5, 5, 10) if size * part >= 0.8 * rough)
        values = (step * i for i in itertools.count(math.ceil(self.low / step - 1e-9)))
        inside = itertools.takewhile(lambda v: v <= self.high + 1e-9 * step, values)
        return [(self(v * self.unit), compact(round(v / step) * step)) for v in
                itertools.islice(inside, 20)]


def compact(value: float) -> str:
    """A number of at most five digits: 0.02, 1,500, 2e-05."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f'{value:.3g}'
    return f'{value:,.5g}' if abs(value) < 1e5 else f'{value:,.0f}'


def of_images(values: Iterable[float]) -> tuple[float, str]:
    """(unit, title) of an axis of training images."""
    most = max(values, default=0)
    for unit, title in ((1e6, 'millions of training images'),
                        (1e3, 'thousands of training images')):
        if most >= 5 * unit:
            return unit, title
    return 1, 'training images'


def _path(places: list, close: bool = False) -> str:
    return 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in places) + 'Z' * close


def _stretches(points: list[Point]) -> list[list[Point]]:
    """The points without those that are no numbers, which part them."""
    return [list(group) for is_number, group in
            itertools.groupby(points, lambda point: point.y == point.y) if is_number]


def _draw(series: Series, x: Axis, y: Axis, is_range: bool) -> Markup:
    color = f's{series.color % COLORS}'
    name = tag('title', series.label)                          # a tooltip without a script
    parts = []
    count = len(series.points)
    for points in _stretches(series.points):
        places = [(x(point.x), y(point.y)) for point in points]
        bounds = [(x(point.x), y(point.low), y(point.high)) for point in points
                  if point.low is not None and point.high is not None]
        if is_range and len(bounds) > 1:
            edge = [(px, high) for px, _, high in bounds]
            edge += [(px, low) for px, low, _ in bounds[::-1]]
            parts.append(tag('path', class_=f'band {color}', d=_path(edge, close=True)))
        elif not is_range:
            parts += [tag('line', class_=f'bar {color}', x1=f'{px:.1f}', x2=f'{px:.1f}',
                          y1=f'{low:.1f}', y2=f'{high:.1f}') for px, low, high in bounds]
        if len(places) > 1:
            parts.append(tag('path', name, d=_path(places),
                             class_=f'curve {color}' + ' faint' * series.is_faint))
        if count <= FEW or len(places) == 1:
            parts += [tag('circle', class_=f'dot {color}', cx=f'{px:.1f}', cy=f'{py:.1f}', r=2.6)
                      for px, py in places]
    return join(parts)


def chart(title: str, series: list[Series], xlabel: str, ylabel: str, *, unit: float = 1,
          x_log: bool = False, y_log: bool | None = None, marks: Iterable[float] = (),
          floor: float | None = None, scale: float = 1) -> Markup | None:
    """A figure of lines, or None where there is no number.

    unit    of x in the axis' title; values are divided by it
    y_log   None: where values are far apart
    marks   places of thin upright lines
    floor   the least value of a linear y axis
    scale   of y: 100 for percent
    """
    most = MOST_POINTS if len(series) <= MANY else MOST_POINTS // 4
    is_range = any(len(line.points) > most for line in series)
    drawn = []
    for line in series:
        points = [Point(p.x, p.y * scale, p.low if p.low is None else p.low * scale,
                        p.high if p.high is None else p.high * scale)
                  for p in thinned(line.points, most)]
        drawn.append(dataclasses.replace(line, points=points))
    points = [p for line in drawn for p in line.points if p.y == p.y]
    if not points:
        return None
    # Training begins at 0.
    x = Axis([p.x for p in points] + [0] * (not x_log), LEFT, RIGHT, x_log, unit=unit)
    y = Axis([value for p in points for value in (p.y, p.low, p.high) if value is not None],
             BOTTOM, TOP, y_log, margin=0.06, floor=floor)
    grid = []
    for at, text in y.ticks(5):
        grid.append(tag('line', class_='grid', x1=LEFT, x2=RIGHT, y1=f'{at:.1f}', y2=f'{at:.1f}'))
        grid.append(tag('text', text, class_='tick', x=LEFT - 8, y=f'{at + 4:.1f}',
                        text_anchor='end'))
    for at, text in x.ticks(5):
        grid.append(tag('line', class_='tick', x1=f'{at:.1f}', x2=f'{at:.1f}', y1=BOTTOM,
                        y2=BOTTOM + 4))
        grid.append(tag('text', text, class_='tick', x=f'{at:.1f}', y=BOTTOM + 18,
                        text_anchor='middle'))
    grid.append(tag('line', class_='axis', x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    starts = [tag('line', class_='mark', x1=f'{x(at):.1f}', x2=f'{x(at):.1f}', y1=TOP, y2=BOTTOM)
              for at in marks if x.low < at / unit < x.high]
    legend = None
    notes = []
    if len(drawn) > MANY:
        drawn = [dataclasses.replace(line, color=0) for line in drawn]
        notes.append(f'{len(drawn)} lines; pointing at one names it.')
    elif len(drawn) > 1:
        legend = tag('ul', [tag('li', tag('span', class_=f'key s{line.color % COLORS}' + ' faint' *
                                          line.is_faint), line.label) for line in drawn],
                     class_='legend')
    if is_range:
        notes.append('Means of neighbouring reports, within their range.')
    elif any(p.low is not None for p in points):
        notes.append('Bars: intervals of 95%.')
    if starts:
        notes.append('Dotted: where the run was resumed.')
    data = [{'name': line.label, 'color': line.color % COLORS, 'points': [
        [round(x(p.x), 1), round(y(p.y), 1), _short(p.x / unit), _short(p.y),
         *([_short(p.low), _short(p.high)] if p.low is not None and p.high is not None else [])]
        for p in line.points if p.y == p.y]} for line in drawn]
    text = ylabel + ', logarithmic' * y.is_log
    svg = tag('svg', grid, starts, [_draw(line, x, y, is_range) for line in drawn],
              tag('text', xlabel + ', logarithmic' * x.is_log, x=(LEFT + RIGHT) // 2,
                  y=HEIGHT - 8, text_anchor='middle'),
              viewBox=f'0 0 {WIDTH} {HEIGHT}', role='img', aria_label=f'{title}: {text}')
    kind = 'chart' + ' many' * (len(drawn) > MANY)
    return tag('figure', tag('figcaption', tag('b', title), tag('span', text, class_='unit')),
               legend, svg, tag('p', ' '.join(notes), class_='note') if notes else None,
               class_=kind, data_x=xlabel, data_points=json.dumps(data, separators=(',', ':')))


def _short(value: float) -> float:
    return float(f'{value:.5g}')
