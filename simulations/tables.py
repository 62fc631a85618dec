"""Results of the Gaussian study as tables: the paper's columns, averages with intervals, files."""

import dataclasses
import datetime
import itertools
import sys
from pathlib import Path

import numpy as np

from dnnlib import UserError, lazy, util

with lazy.imports():
    import pandas as pd

import studies

PAPER_SEEDS = (3, 33, 520, 2025, 25731)

BOUND_SINGLE = 'theoretical TV bound of single'
BOUND_MULTI = 'theoretical TV bound of multi'
BOUND_ADVANTAGE = 'theoretical advantage (abs)'
ERROR_SINGLE = 'empirical TV of single'
ERROR_MULTI = 'empirical TV of multi'
ERROR_ADVANTAGE = 'advantage (abs)'
MEASURED = (ERROR_SINGLE, ERROR_MULTI, ERROR_ADVANTAGE)
TITLES = {'bound single': BOUND_SINGLE, 'bound multi': BOUND_MULTI,
          'bound advantage': BOUND_ADVANTAGE, 'error single': ERROR_SINGLE,
          'error multi': ERROR_MULTI, 'error advantage': ERROR_ADVANTAGE}
MEASURES = tuple(TITLES.values())
SLOPE_TOLERANCE = 0.03


def columns(varied: list[str]) -> list[str]:
    """The paper's columns: what is varied, the seed, the other parameters, bounds and errors."""
    return list(dict.fromkeys([*varied, 'seed', 'K', 'D', 'sim', 'n', *MEASURES]))


def results(settings: list, seeds: list[int], errors: list[tuple], varied: list[str]):
    """A row for each setting (see `gaussian.Setting`) and seed, with its bounds and its two
    errors (single, multi)."""
    rows = [dataclasses.astuple(setting) + (seed, *setting.bounds(), *pair)
            for (setting, seed), pair in zip(itertools.product(settings, seeds), errors,
                                             strict=True)]
    table = pd.DataFrame(rows, columns=['K', 'D', 'sim', 'n', 'seed', BOUND_SINGLE, BOUND_MULTI,
                                        ERROR_SINGLE, ERROR_MULTI])
    table[BOUND_ADVANTAGE] = table[BOUND_SINGLE] - table[BOUND_MULTI]
    table[ERROR_ADVANTAGE] = table[ERROR_SINGLE] - table[ERROR_MULTI]
    return table[columns(varied)]


def slope(rows: pd.DataFrame, column: str) -> tuple[float, float]:
    """Slope of log(error) against log(n) and the half-width of its 95% interval.

    A line is fitted for each seed by least squares; the mean over seeds is the slope of the mean
    log error. Raises UserError if fewer than two values of n have errors.
    """
    logs = np.log(rows.pivot(index='seed', columns='n', values=column)).dropna()
    if logs.shape[1] < 2 or logs.empty:
        raise UserError('a slope needs two or more sample sizes at which every source has samples',
                        'values')
    slopes = pd.Series(np.polyfit(np.log(logs.columns.to_numpy(float)), logs.T, 1)[0])
    return slopes.mean(), studies.half_width(slopes)


def report_undefined(rows: pd.DataFrame):
    """Says how many simulations have no error because a source had no training sample."""
    undefined = rows[rows[ERROR_SINGLE].isna()].to_dict('records')
    if undefined:
        print(f'Warning: {len(undefined)} of {len(rows)} simulations have no error and are left '
              'out of the averages: a source had no training sample (e.g. '
              'seed {seed}, K={K}, n={n})'.format(**undefined[0]), file=sys.stderr)


def check_slope(rows: pd.DataFrame):
    """Prints the slopes of log(error) against log(n). Raises UserError if one is not within 0.03
    of -1/2."""
    wrong = []
    for name in (ERROR_SINGLE, ERROR_MULTI):
        value, interval = slope(rows, name)
        print(f'slope of log({name}) against log(n): {value:.4f} ± {interval:.4f}, theory -0.5')
        if not abs(value + 0.5) <= SLOPE_TOLERANCE:
            wrong.append(name)
    if wrong:
        raise UserError(f'the slope of {wrong[0]} is not within {SLOPE_TOLERANCE} of -1/2; give '
                        '--values far above K times --dim, where the rate holds, and enough '
                        '--seeds')


# --- Files ---------------------------------------------------------------------------------------


def folder(outdir: str, tag: str) -> Path:
    """The folder of a tag. Raises UserError if no files can be made in it."""
    path = Path(outdir).resolve() / tag
    util.check_place(path, 'folder')
    return path


def save(place: Path, table: pd.DataFrame, rows: pd.DataFrame) -> Path:
    """Writes `gaussian_<tag>-<UTC time>.csv` to the folder of a tag and, before it, the rows of
    each seed as `...-seeds.csv`.

    Returns the path of the table. Names sort by time, and a result is never overwritten.
    """
    util.remove_leftovers(place)                               # the names are new every time
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime('%Y%m%d-%H%M%S-%f')
    path = place / f'gaussian_{place.name}-{stamp}.csv'
    for dest, frame in ((seeds_path(path), rows), (path, table)):
        with util.atomic_path(dest) as temp:
            frame.to_csv(temp, index=False, lineterminator='\n')
    return path


def seeds_path(path: Path) -> Path:
    """The file with the rows of each seed, beside a table."""
    return path.with_name(f'{path.stem}-seeds.csv')


def newest(outdir: str, tag: str) -> Path:
    """Path of the newest table of a tag. Raises UserError saying what to run first."""
    place = Path(outdir).resolve() / tag
    path = max(place.glob(f'gaussian_{tag}-*[0-9].csv'), default=None)
    if path is None:
        raise UserError(f'no result in {place}; first run: '
                        f'python simulations/run_gaussian.py --tag={tag}')
    return path


def load(path: Path) -> pd.DataFrame:
    """A table, or its file of seeds, as numbers (empty cells are NaN). Raises UserError for other
    files."""
    try:
        table = pd.read_csv(path, dtype=float, float_precision='round_trip')
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read as a table of numbers ({error})') from None
    # Cells beyond those of the header would make an index.
    if table.empty or {*columns([])} - {*table} or not isinstance(table.index, pd.RangeIndex):
        raise UserError(f'{path}: rows or columns are missing; give a table that run_gaussian.py '
                        'wrote')
    return table
