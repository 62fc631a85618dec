"""What the folders of runs and studies say of themselves, whoever wrote them: read with bounds;
links in them are not followed."""

import csv
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator

from dnnlib import UserError, budget
from dnnlib.util import finite, publishable, without_codes

RECORD = 'training_options.json'
STATS = 'stats.jsonl'
DEPTH = 3                   # of runs below the folder of a study, and of files in that of a run
MOST_FILES = 2000
MOST_LINES = 1_000_000      # of stats.jsonl
MOST_CURVES = 200
MOST_ROWS = 400             # of a table
MOST_TEXT = 4000            # letters of a value
MOST_BYTES = 64 << 20       # of a file that is shown
LARGEST = 1e150             # of numbers that are drawn

# Lines of log.txt that tell of the run as a whole.
_TOLD = re.compile(r'\b(Data|Network|Warning|Note|Changed|Starting|Resum\w+|Going on|Stopped|'
                   r'Complete|Ended|diverged|Error|Best|Patience)\b')
_GRID = re.compile(r'(?:samples-(\d{7,})|sample/(\d+))\.png')
_COPIES = re.compile(r'(?:.*memoriz.*|.*-pairs)\.png', re.I)
_BY_LEVEL = re.compile(r'(.+)/([\d.]+(?:e[+-]?\d+)?)-([\d.]+(?:e[+-]?\d+)?|inf)')
_BOUND = re.compile(r'(.+)_(low|high|se|std|error)')
# What tells rows of one measure apart, and what is none.
_WIDTHS = ('ema', 'ema_std', 'std', 'width', 'average')
_NO_MEASURES = {'nimg', 'kimg', 'step', 'timestamp', 'time', 'modified', 'seconds', 'num', 'seed',
                'batch', 'size', *_WIDTHS}


@dataclasses.dataclass(frozen=True)
class Point:
    """A value at a place (images, or a noise level), with its interval if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass
class File:
    name: str               # below the folder
    path: str
    size: int
    is_link: bool


@dataclasses.dataclass
class Run:
    """The folder of a run, whatever of it there is.

    options   its record without the `starts`; {} if it has none
    curves    {'Loss/loss': [Point, ...]} over images
    levels    {name: [Point, ...]} over the noise level, of the last quarter of the run
    early     the same of the first quarter
    measures  {metric: {average's width: [Point, ...]}} over images
    results   {file: [(metric, Point), ...]}, measured once
    grids     [(images, File)], in order
    copies    pictures of memorized samples
    """

    path: str
    name: str
    files: list[File]
    options: dict
    starts: list[dict]
    told: list[str]
    curves: dict
    levels: dict
    early: dict
    measures: dict
    results: dict
    grids: list
    copies: list[File]
    nimg: float
    last: float | None      # time of the last report

    @property
    def total(self) -> float | None:
        return number(self.options.get('total_nimg'))

    @property
    def is_complete(self) -> bool:
        return bool(self.told) and any('Complete after' in line for line in self.told[-3:])


@dataclasses.dataclass
class Study:
    """The folder of a study: its settings, tables {file: rows of texts} and pictures."""

    path: str
    name: str
    settings: dict
    tables: dict
    pictures: list[File]
    files: list[File]


# --- Files ---------------------------------------------------------------------------------------


def number(value) -> float | None:
    """A number that can be drawn as it is, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if abs(float(value)) < LARGEST else None
    except OverflowError:
        return None


def text_of(value) -> str:
    """A value of a file as a short text that may be published."""
    if isinstance(value, float):
        return f'{value:.6g}'
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        value = ', '.join(map(text_of, value[:200])) + ', ...' * (len(value) > 200)
    text = without_codes(str(publishable(str(value)[:MOST_TEXT])))
    return '-' if value is None else text


def list_files(folder: str, depth: int = DEPTH) -> list[File]:
    """The files below a folder, but temporary ones and those of runs in it; links are named."""
    files = []
    pending = [('', 1)]
    while pending and len(files) < MOST_FILES:
        prefix, level = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in itertools.islice(sorted(entries, key=lambda entry: entry.name),
                                          MOST_FILES - len(files)):
                name = prefix + entry.name
                if entry.name.startswith('.'):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    is_run = os.path.exists(os.path.join(entry.path, RECORD))
                    if level < depth and not is_run and os.access(entry.path, os.R_OK | os.X_OK):
                        pending.append((name + '/', level + 1))
                elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                    size = entry.stat(follow_symlinks=False).st_size
                    files.append(File(name, entry.path, size, entry.is_symlink()))
    return sorted(files, key=lambda file: file.name)


def find_runs(folder: str, depth: int = DEPTH) -> list[str]:
    """The folder if it is that of a run, else those of the runs below it."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in (RECORD, STATS)):
        return [folder]
    found = []
    if depth:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith('.') \
                        and os.access(entry.path, os.R_OK | os.X_OK):
                    found += find_runs(entry.path, depth - 1)
    return found


def _json(files: dict, name: str):
    """What a JSON file holds, or None if it is none that can be read."""
    file = files.get(name)
    if file is None or file.is_link:
        return None
    try:
        return publishable(finite(budget.read_json(file.path, MOST_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None


def _rows(files: dict, name: str) -> Iterator[dict]:
    file = files.get(name)
    if file is not None and not file.is_link:
        for _, row in itertools.islice(budget.json_lines(file.path), MOST_LINES):
            yield row


def _lines(files: dict, name: str) -> list[str]:
    file = files.get(name)
    if file is None or file.is_link:
        return []
    with open(file.path, errors='replace') as opened:
        lines = opened.read(MOST_BYTES).splitlines()
    return [text_of(line[:1000].rstrip()) for line in lines if _TOLD.search(line[:1000])]


# --- A run ---------------------------------------------------------------------------------------


def _curves(files: dict) -> tuple[dict, float | None]:
    """{name: [Point, ...]} of stats.jsonl, and the time of its last line."""
    curves = {}
    last = None
    for row in _rows(files, STATS):
        nimg = number(row.get('nimg'))
        if nimg is None:
            continue
        last = number(row.get('timestamp')) or last
        for name, value in row.items():
            if isinstance(value, dict) and 'mean' in value \
                    and (name in curves or len(curves) < MOST_CURVES):
                mean = number(value['mean'])
                point = Point(nimg, math.nan if mean is None else mean)
                curves.setdefault(name, []).append(point)
    for points in curves.values():
        points.sort(key=lambda point: point.x)
    return curves, last


def _split_levels(curves: dict) -> tuple[dict, dict, dict]:
    """The curves that are over images, and of those by noise level the means of the last and of
    the first quarter of the run, each {name: [Point over the level]}.
    """
    plain = {}
    last, first = {}, {}
    for name, points in curves.items():
        match = _BY_LEVEL.fullmatch(name)
        if match is None:
            plain[name] = points
            continue
        low, high = float(match[2]), float(match[3])
        if not high > low >= 0:
            continue
        level = math.sqrt(low * high) if low and math.isfinite(high) else (
            low * math.sqrt(10) if low else high / math.sqrt(10))
        start, end = points[0].x, points[-1].x
        for part, chosen in ((last, [p.y for p in points if p.x >= end - (end - start) / 4]),
                             (first, [p.y for p in points if p.x <= start + (end - start) / 4])):
            values = [value for value in chosen if value == value]
            if values and level > 0:
                point = Point(level, math.fsum(values) / len(values))
                part.setdefault(match[1], []).append(point)
    for part in (last, first):
        for points in part.values():
            points.sort(key=lambda point: point.x)
    return plain, last, first


def _measured(row: dict) -> Iterator[tuple[str, float, float | None, float | None]]:
    """(name, value, low, high) of the numbers of a dictionary; a standard error makes an interval
    of 95%.
    """
    for name, value in row.items():
        value = number(value)
        bound = _BOUND.fullmatch(name)
        no_measure = name in _NO_MEASURES or name.startswith('num_')
        if value is None or no_measure or bound and bound[1] in row:
            continue
        low, high = number(row.get(f'{name}_low')), number(row.get(f'{name}_high'))
        error = number(row.get(f'{name}_se', row.get(f'{name}_error')))
        if low is None and error is not None:
            low, high = value - 1.96 * error, value + 1.96 * error
        yield name, value, low, high


def _add_measures(measures: dict, rows, batch: float):
    """Rows with `nimg` (or a step), an average's width and metrics."""
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict):
            continue
        nimg = number(row.get('nimg'))
        if nimg is None and number(row.get('step')) is not None:
            nimg = row['step'] * batch
        if nimg is None:
            continue
        width = next((text_of(row[key]) for key in _WIDTHS if row.get(key) is not None), '')
        metrics = dict(row)
        for name, part in row.items():                         # heldout_by_sigma: {'0.1-0.3': ...}
            if isinstance(part, dict):
                metrics |= {f'{name}/{key}': value for key, value in part.items()}
        for name, value, low, high in _measured(metrics):
            if name in measures or len(measures) < MOST_CURVES:
                points = measures.setdefault(name, {}).setdefault(width, [])
                points.append(Point(nimg, value, low, high))


def _results(content: dict) -> list[tuple]:
    """(metric, Point) of a file of results: of its `results`, of `all` and its groups, or of
    itself.
    """
    parts = {'': content.get('results', content.get('all', content))}
    if isinstance(content.get('groups'), dict):
        parts |= {f'{name}: ': part for name, part in content['groups'].items()}
    return [(prefix + name, Point(0, value, low, high))
            for prefix, part in parts.items() if isinstance(part, dict)
            for name, value, low, high in _measured(part)][:MOST_ROWS]


def read_run(folder: str) -> Run:
    """What there is of a run. Raises UserError if the folder cannot be read."""
    try:
        listed = list_files(folder)
        files = {file.name: file for file in listed}
        options = _json(files, RECORD)
        options = options if isinstance(options, dict) else {}
        starts = options.pop('starts', [])
        starts = [start for start in starts if isinstance(start, dict)] \
            if isinstance(starts, list) else []
        batch = number(options.get('batch')) or 1
        curves, last = _curves(files)
        curves, levels, early = _split_levels(curves)
        measures, results = {}, {}
        _add_measures(measures, list(_rows(files, 'metrics.jsonl')), batch)
        for file in listed:
            if not file.name.endswith('.json') or file.name == RECORD or file.is_link \
                    or os.path.basename(file.name) == 'dataset.json':
                continue
            content = _json(files, file.name)
            if isinstance(content, dict) and isinstance(content.get('snapshots'), list):
                content = content['snapshots']
            if isinstance(content, list):
                _add_measures(measures, content, batch)
            elif isinstance(content, dict) and (rows := _results(content)):
                results[file.name] = rows
        measures, by_level = _levels_of_measures(measures)
        levels |= by_level
        grids = []
        for file in listed:
            if (match := _GRID.fullmatch(file.name)) and not file.is_link:
                grids.append((int(match[1]) * 1000 if match[1] else int(match[2]) * batch, file))
        told = _lines(files, 'log.txt')
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror or error})', value=folder) from None
    places = [points[-1].x for points in curves.values() if points]
    places += [at for at, _ in grids]
    return Run(folder, os.path.basename(os.path.abspath(folder)), listed, options, starts, told,
               curves, levels, early, measures, results, sorted(grids, key=lambda grid: grid[0]),
               [file for file in listed if _COPIES.fullmatch(file.name) and not file.is_link],
               max(places, default=0), last)


def _levels_of_measures(measures: dict) -> tuple[dict, dict]:
    """The measures over images, and the newest of those by noise level (NAME/LOW-HIGH)."""
    newest = {}
    plain = {}
    for name, widths in measures.items():
        if _BY_LEVEL.fullmatch(name):
            for width, points in widths.items():
                title = _BY_LEVEL.fullmatch(name)[1].removesuffix('_by_sigma')
                title += f', average {width}' if width else ''
                newest[f'{title}/{name.rpartition("/")[2]}'] = points[-1:]
        else:
            plain[name] = widths
    return plain, _split_levels(newest)[1]


# --- A study -------------------------------------------------------------------------------------


def read_study(folder: str) -> Study | None:
    """The study in a folder, or None if it is none."""
    listed = list_files(folder, depth=1)
    files = {file.name: file for file in listed}
    settings = _json(files, 'study.json')
    if not isinstance(settings, dict):
        return None
    tables = {}
    for file in listed:
        if file.name.endswith('.csv') and not file.is_link and file.size <= MOST_BYTES:
            with open(file.path, newline='', errors='replace') as opened:
                rows = itertools.islice(csv.reader(opened), MOST_ROWS + 1)
                try:
                    tables[file.name] = [[text_of(cell) for cell in row[:40]] for row in rows]
                except csv.Error:
                    continue
    pictures = [file for file in listed if file.name.endswith('.png') and not file.is_link]
    return Study(folder, os.path.basename(os.path.abspath(folder)), settings, tables,
                 sorted(pictures, key=lambda file: file.name != 'study.png'), listed)
