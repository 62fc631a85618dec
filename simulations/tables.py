"""Results of the Gaussian study as tables: the paper's columns, averages with intervals, files."""

import csv
import datetime
import math
import pathlib

import numpy as np
from scipy.special import stdtrit

from dnnlib import UserError, util

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'gaussian'
PAPER_SEEDS = (3, 33, 520, 2025, 25731)

BOUND_SINGLE = 'theoretical TV bound of single'
BOUND_MULTI = 'theoretical TV bound of multi'
BOUND_ADVANTAGE = 'theoretical advantage (abs)'
ERROR_SINGLE = 'empirical TV of single'
ERROR_MULTI = 'empirical TV of multi'
ERROR_ADVANTAGE = 'advantage (abs)'
MEASURED = (ERROR_SINGLE, ERROR_MULTI, ERROR_ADVANTAGE)
MEASURES = (BOUND_SINGLE, BOUND_MULTI, BOUND_ADVANTAGE, *MEASURED)


def interval_column(column: str) -> str:
    """Name of the column with the half-width of the 95% interval of a column."""
    return f'95% interval of {column}'


def columns(varied: tuple[str, ...]) -> list[str]:
    """The paper's columns: what is varied, the seed, the other parameters, bounds and errors."""
    others = [name for name in ('seed', 'K', 'D', 'sim', 'n') if name not in varied]
    return [*varied, *others, *MEASURES]


def row(setting, seed: int, single: float, multi: float) -> dict:
    """One row of results: the setting (see `gaussian.Setting`), its bounds, and the two errors of
    one seed."""
    bounds = setting.bounds()
    measures = (*bounds, bounds[0] - bounds[1], single, multi, single - multi)
    return dict(seed=seed, K=setting.K, D=setting.D, sim=setting.sim, n=setting.n) | dict(
        zip(MEASURES, measures, strict=True))


def half_width(values: np.ndarray) -> np.ndarray:
    """Half-width of the 95% interval of the mean over the last axis, by Student's t; NaN for fewer
    than two values."""
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    return stdtrit(count - 1, 0.975) * values.std(axis=-1, ddof=1) / math.sqrt(count)


def average(rows: list[dict], varied: tuple[str, ...], intervals: bool) -> list[dict]:
    """Means over seeds, one row for each value of what is varied, in ascending order.

    Errors that do not exist (NaN) are left out; where none exists the mean is NaN. With
    `intervals`, columns are added: `seeds`, the number of errors that went into the mean, and the
    half-width of each 95% interval.
    """
    groups = {}
    for one in rows:
        groups.setdefault(tuple(one[name] for name in varied), []).append(one)
    table = []
    for key, group in sorted(groups.items()):
        group = {name: [one[name] for one in group] for name in columns(varied)}
        line = {name: math.fsum(values) / len(values) for name, values in group.items()}
        line |= dict(zip(varied, key, strict=True))
        errors = np.array([group[name] for name in MEASURED])
        errors = errors[:, ~np.isnan(errors[0])]
        count = errors.shape[1]
        for name, values in zip(MEASURED, errors, strict=True):
            line[name] = math.fsum(values) / count if count else math.nan
        if intervals:
            line['seeds'] = count
            for name, half in zip(MEASURED, half_width(errors).tolist(), strict=True):
                line[interval_column(name)] = half
        table.append(line)
    return table


def slope(rows: list[dict], column: str) -> tuple[float, float]:
    """Slope of log(error) against log(n) and the half-width of its 95% interval.

    A line is fitted for each seed by least squares; the mean over seeds is the slope of the mean
    log error. Raises UserError if fewer than two values of n have errors.
    """
    sizes = sorted({one['n'] for one in rows})
    errors = {}
    for one in rows:
        errors.setdefault(one['seed'], {})[one['n']] = one[column]
    logs = np.log([[by_size[n] for n in sizes] for by_size in errors.values()]).T  # [sizes, seeds]
    logs = logs[:, np.isfinite(logs).all(axis=0)]
    if len(sizes) < 2 or logs.shape[1] == 0:
        raise UserError('a slope needs two or more sample sizes at which every source has samples',
                        'values')
    slopes = np.polyfit(np.log(sizes), logs, 1)[0]
    return float(slopes.mean()), float(half_width(slopes))


def _write(path: pathlib.Path, rows: list[dict]):
    with util.atomic_path(str(path)) as temp, open(temp, 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(rows[0])
        for one in rows:
            writer.writerow(['' if value != value else value for value in one.values()])  # NaN


def folder(outdir: str, tag: str) -> pathlib.Path:
    """Makes the folder of a tag. Raises UserError if that cannot be done."""
    path = pathlib.Path(outdir).resolve() / tag
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot be used: {path} ({error.strerror})', 'outdir', outdir) from None
    return path


def save(outdir: str, tag: str, table: list[dict], rows: list[dict]) -> pathlib.Path:
    """Writes `<outdir>/<tag>/gaussian_<tag>-<UTC time>.csv` and, before it, the rows of each seed
    as `...-seeds.csv`.

    Returns the path of the table. Names sort by time, and a result is never overwritten.
    """
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime('%Y%m%d-%H%M%S-%f')
    path = folder(outdir, tag) / f'gaussian_{tag}-{stamp}.csv'
    try:
        _write(seeds_path(path), rows)
        _write(path, table)
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror})', 'outdir') from None
    return path


def seeds_path(path: pathlib.Path) -> pathlib.Path:
    """The file with the rows of each seed, beside a table."""
    return path.with_name(f'{path.stem}-seeds.csv')


def newest(outdir: str, tag: str) -> pathlib.Path:
    """Path of the newest table of a tag. Raises UserError saying what to run first."""
    place = pathlib.Path(outdir).resolve() / tag
    paths = [path for path in place.glob(f'gaussian_{tag}-*.csv')
             if not path.stem.endswith('-seeds')]
    if not paths:
        raise UserError(f'no result in {place}; first run: '
                        f'python simulations/run_gaussian.py --tag={tag}')
    return max(paths)


def load(path: pathlib.Path) -> list[dict]:
    """Rows of a table, or of its file of seeds, as numbers (empty cells are NaN). Raises UserError
    for other files."""
    try:
        with open(path, newline='') as file:
            rows = [{name: float(text or 'nan') for name, text in one.items()}
                    for one in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{path}: cannot be read as a table of numbers ({error})') from None
    missing = [name for name in columns(()) if not rows or name not in rows[0]]
    if missing:
        raise UserError(f'{path}: has no column {missing[0]!r}; '
                        'give a table that run_gaussian.py wrote')
    return rows
