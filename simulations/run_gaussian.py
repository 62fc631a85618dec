"""Conditional Gaussian estimation from several sources (arXiv 2502.14583): error against theory."""

import itertools
import math
import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import UserError, cli, util
from simulations import tables

DEFAULTS = dict(K=5, n=500, sim=0.5)
VALUES = dict(K=(1, 3, 5, 10, 15), n=(100, 300, 500, 1000, 5000), sim=(0.0, 0.3, 0.5, 0.7, 1.0))
SLOPE_VALUES = (1000, 2000, 4000, 8000, 16000)  # K D / n from 0.05 to 0.003: the asymptotic regime
SLOPE_SEEDS = range(200)
SLOPE_TOLERANCE = 0.03
PARAMETER = click.Choice(list(DEFAULTS))
WHOLE = click.IntRange(min=1)


def parse_values(option: str, name: str, text: str) -> list:
    """'1,3,5' as sorted values of a parameter: integers from 1 for K and n, numbers in 0..1 for
    sim."""
    share = name == 'sim'
    form = 'whole numbers from 1 up, e.g. 1,3,5-8'
    if share:
        form = 'numbers from 0 to 1, e.g. 0,0.3,1'
    try:
        values = [float(part) for part in text.split(',')] if share else util.parse_int_list(text)
    except ValueError:
        values = []
    if not values or len(set(values)) < len(values) or not all(
            0 <= value <= 1 if share else value >= 1 for value in values):
        raise UserError(f'{option}: {text!r} is not a list of values of {name}; '
                        f'give different {form}')
    return sorted(values)


def plan(tag: str, values: dict, given: dict) -> tuple[dict, dict]:
    """What is varied, {name: values}, and what is fixed, {name: value}. Raises UserError for options
    that clash.

    `values`: {option: text} of --values, --x, --y, --x-values, --y-values; `given`: {name: value}
    of --K, --n, --sim; None where an option was not given.
    """
    for option, text in values.items():
        if text is not None and (option == '--values') == (tag == 'grid'):
            raise UserError(f'{option} does not go with --tag={tag}')
    options = {'n' if tag == 'slope' else tag: '--values'}
    if tag == 'grid':
        options = {values['--x']: '--x-values', values['--y']: '--y-values'}
        if None in options or len(options) < 2:
            raise UserError('--x and --y: --tag=grid needs two different parameters, '
                            'e.g. --x=K --y=sim')
    if given['sim'] is not None and math.isnan(given['sim']):
        raise UserError('give a number from 0 to 1', 'sim')
    varied = {}
    for name, option in options.items():
        if given[name] is not None:
            raise UserError(f'is what this run varies; give its values with {option}', name,
                            given[name])
        varied[name] = list(SLOPE_VALUES if tag == 'slope' else VALUES[name])
        if values[option] is not None:
            varied[name] = parse_values(option, name, values[option])
    fixed = DEFAULTS | {name: value for name, value in given.items() if value is not None}
    return varied, {name: value for name, value in fixed.items() if name not in varied}


def simulate_all(varied: dict, fixed: dict, seeds, test_points: int) -> list[dict]:
    """Rows of all combinations of the varied values, for each seed."""
    from simulations import gaussian  # torch takes seconds to import: once the options are good

    settings = [gaussian.Setting(**fixed, **dict(zip(varied, point, strict=True)))
                for point in itertools.product(*varied.values())]
    errors = gaussian.simulate_many(settings, seeds, test_points)
    return [tables.row(setting, seed, *pair) for (setting, seed), pair in zip(
        itertools.product(settings, seeds), errors, strict=True)]


def show(table: list[dict], varied: dict):
    """Prints the averages."""
    measures = [f'{kind} {name}' for kind in ('bound', 'error')
                for name in ('single', 'multi', 'advantage')]
    print(''.join([f'{name:>7}' for name in varied] + [f'{name:>17}' for name in measures]))
    for line in table:
        text = ''.join(f'{line[name]:7g}' for name in varied)
        for column in tables.MEASURES:
            interval = line.get(tables.interval_column(column))
            cell = f'{line[column]:.5f}' + ('' if interval is None else f'±{interval:.5f}')
            text += f'{cell:>17}'
        print(text)


def report_undefined(rows: list[dict]):
    """Says how many simulations have no error because a source had no training sample."""
    undefined = [row for row in rows if math.isnan(row[tables.ERROR_SINGLE])]
    if undefined:
        print(f'Warning: {len(undefined)} of {len(rows)} simulations have no error and are left '
              'out of the averages: a source had no training sample (e.g. '
              'seed {seed}, K={K}, n={n})'.format(**undefined[0]), file=sys.stderr)


def check_slope(rows: list[dict]):
    """Prints the slopes of log(error) against log(n). Raises UserError if one is not within 0.03 of
    -1/2."""
    wrong = []
    for name in (tables.ERROR_SINGLE, tables.ERROR_MULTI):
        value, interval = tables.slope(rows, name)
        print(f'slope of log({name}) against log(n): {value:.4f} ± {interval:.4f}, theory -0.5')
        if not abs(value + 0.5) <= SLOPE_TOLERANCE:
            wrong.append(name)
    if wrong:
        raise UserError(f'the slope of {wrong[0]} is not within {SLOPE_TOLERANCE} of -1/2; give '
                        '--values far above K times --dim, where the rate holds, and enough '
                        '--seeds')


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # Figure 1 (a), (b), (c) of the paper
  python simulations/run_gaussian.py --tag=K
  python simulations/run_gaussian.py --tag=n
  python simulations/run_gaussian.py --tag=sim
\b
  # 10,000 seeds at one setting, with 95% intervals
  python simulations/run_gaussian.py --tag=K --values=5 --seeds=0-9999
\b
  # Where do many sources help? Advantage over two parameters
  python simulations/run_gaussian.py --tag=grid --x=K --y=sim --y-values=0,0.2,0.4,0.6,0.8,1 --seeds=0-199
\b
  # Does the error fall as n^(-1/2)?
  python simulations/run_gaussian.py --tag=slope
""")
@click.option('--tag', help='What to vary: one parameter, two (grid), or n far out, to check the '
              'rate (slope)', type=click.Choice(['K', 'n', 'sim', 'grid', 'slope']), required=True)
@click.option('--values', help="Values of what is varied  [default: the paper's]", metavar='LIST')
@click.option('--x', help='First parameter of a grid', type=PARAMETER)
@click.option('--y', help='Second parameter of a grid', type=PARAMETER)
@click.option('--x-values', help="Values of the first parameter  [default: the paper's]",
              metavar='LIST')
@click.option('--y-values', help="Values of the second parameter  [default: the paper's]",
              metavar='LIST')
@click.option('--K', 'K', help='Number of sources, where not varied  [default: 5]', metavar='INT',
              type=WHOLE)
@click.option('--n', help='Training samples of all sources together, where not varied  '
              '[default: 500]', metavar='INT', type=WHOLE)
@click.option('--sim', help='Share of the dimensions that is common to all sources, where not '
              'varied  [default: 0.5]', metavar='FLOAT', type=click.FloatRange(0, 1))
@click.option('--dim', help='Number of dimensions', metavar='INT', type=WHOLE, default=10)
@click.option('--test-points', help='Samples on which the error is measured', metavar='INT',
              type=WHOLE, default=500)
@click.option('--seeds', help="Random seeds, e.g. 3,33,520 or 0-9999; more than the paper's five "
              "add 95% intervals  [default: the paper's; 0-199 for slope]", metavar='LIST',
              type=cli.INT_LIST)
@click.option('--outdir', help='Where results go, in a folder for each tag', metavar='DIR',
              default=str(tables.RESULTS))
def main(tag, seeds, dim, test_points, outdir, values, x, y, x_values, y_values, **given):
    """Estimates Gaussian means from several sources, alone and together, and compares the error
    with theory.

    Writes the averages over seeds (columns as in the paper) and the rows of each seed as CSV
    files.
    """
    varied, fixed = plan(tag, {'--values': values, '--x': x, '--y': y, '--x-values': x_values,
                               '--y-values': y_values}, given)
    seeds = seeds or (SLOPE_SEEDS if tag == 'slope' else tables.PAPER_SEEDS)
    if len(set(seeds)) < len(seeds) or max(seeds) >= 2**64:
        raise UserError('give each seed once, below 2^64', 'seeds')
    tables.folder(outdir, tag)  # a place that cannot be written shows now, not after the work
    start = time.monotonic()
    rows = simulate_all(varied, fixed | dict(D=dim), seeds, test_points)
    table = tables.average(rows, tuple(varied), len(seeds) > len(tables.PAPER_SEEDS))
    columns = tables.columns(tuple(varied))
    path = tables.save(outdir, tag, table, [{name: row[name] for name in columns} for row in rows])
    show(table, varied)
    report_undefined(rows)
    took = util.format_time(time.monotonic() - start)
    print(f'{len(rows)} simulations in {took}, averages over {len(seeds)} seeds in {path}')
    if tag == 'slope':
        check_slope(rows)


if __name__ == '__main__':
    main()
