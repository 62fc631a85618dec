"""Conditional Gaussian estimation from several sources (arXiv 2502.14583): error and theory."""

import itertools
import math
import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import UserError, cli, options, util
from simulations import RESULTS

DEFAULTS = dict(K=5, n=500, sim=0.5)
VALUES = dict(K=(1, 3, 5, 10, 15), n=(100, 300, 500, 1000, 5000), sim=(0.0, 0.3, 0.5, 0.7, 1.0),
              slope=(1000, 2000, 4000, 8000, 16000))  # K D / n from 0.05 on: the asymptotic regime
SLOPE_SEEDS = range(200)
# How values of K and n, and of sim, are given: parser, range, example.
FORMS = ((util.parse_int_list, 1, math.inf, 'whole numbers from 1 up, e.g. 1,3,5-8'),
         (cli.NUMBERS.function, 0, 1, 'numbers from 0 to 1, e.g. 0,0.3,1'))


def parse_values(option: str, name: str, text: str) -> list:
    """'1,3,5' as sorted values of a parameter: integers from 1 for K and n, numbers in 0..1 for
    sim."""
    parse, low, high, form = FORMS[name == 'sim']
    try:
        values = sorted(parse(text))
    except ValueError:
        values = [math.nan]
    if len(set(values)) < len(values) or not all(low <= value <= high for value in values):
        raise UserError(f'{text!r} is not a list of values of {name}; give different {form}',
                        option)
    return values


def plan(tag: str, compared: dict, given: dict) -> tuple[dict, dict]:
    """What is varied, {name: values}, and what is fixed, {name: value}. Raises UserError for
    options that clash.

    `compared`: values, x, y, x_values, y_values; `given`: K, n, sim; None where not given.
    """
    for option, text in compared.items():
        if text is not None and (option == 'values') == (tag == 'grid'):
            raise UserError(f'does not go with --tag={tag}', option, text)
    names = {'n' if tag == 'slope' else tag: 'values'}
    if tag == 'grid':
        names = {compared['x']: 'x_values', compared['y']: 'y_values'}
        if None in names or len(names) < 2:
            raise UserError('--x and --y: --tag=grid needs two different parameters, '
                            'e.g. --x=K --y=sim')
    fixed = {name: value for name, value in given.items() if value is not None}
    varied = {}
    for name, option in names.items():
        if name in fixed:
            raise UserError('is what this run varies; give its values with --'
                            + option.replace('_', '-'), name, fixed[name])
        text = compared[option]
        varied[name] = (VALUES.get(tag, VALUES[name]) if text is None
                        else parse_values(option, name, text))
    return varied, {name: value for name, value in (DEFAULTS | fixed).items()
                    if name not in varied}


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
  python simulations/run_gaussian.py --tag=grid --x=K --y=sim --y-values=0,0.5,1 --seeds=0-199
\b
  # Does the error fall as n^(-1/2)?
  python simulations/run_gaussian.py --tag=slope
""")
@click.option('--tag', help='What to vary: one parameter, two (grid), or n far out, to check the '
              'rate (slope)', type=click.Choice(['K', 'n', 'sim', 'grid', 'slope']), required=True)
@options.group(
    'compared',
    options.text('LIST', '--values', "Values of what is varied  [default: the paper's]"),
    options.choice('--x', None, 'First parameter of a grid', DEFAULTS),
    options.choice('--y', None, 'Second parameter of a grid', DEFAULTS),
    options.text('LIST', '--x-values', "Values of the first parameter  [default: the paper's]"),
    options.text('LIST', '--y-values', "Values of the second parameter  [default: the paper's]"))
@options.group(
    'given',
    options.integer('--K K', None, 'Number of sources, where not varied  [default: 5]'),
    options.integer('--n', None, 'Training samples of all sources together, where not varied  '
                    '[default: 500]'),
    options.number('--sim', None, 'Share of the dimensions that is common to all sources, where '
                   'not varied  [default: 0.5]', options.FRACTION))
@options.integer('--dim', 10, 'Number of dimensions')
@options.integer('--test-points', 500, 'Samples on which the error is measured')
@options.integers('--seeds', None, "Random seeds, e.g. 3,33,520 or 0-9999; more than the paper's "
                  "five add 95% intervals  [default: the paper's; 0-199 for slope]")
@options.text('DIR', '--outdir --results_dir outdir', 'Where results go, in a folder for each tag',
              default=RESULTS, type=cli.FOLDER)
def main(tag, seeds, dim, test_points, outdir, compared, given):
    """Estimates Gaussian means from several sources, alone and together, and compares the error
    with theory.

    Writes the averages over seeds (columns as in the paper) and the rows of each seed as CSV
    files.
    """
    varied, fixed = plan(tag, compared, given)
    import studies  # the options are good: what takes time to import
    from simulations import tables

    seeds = seeds or (SLOPE_SEEDS if tag == 'slope' else tables.PAPER_SEEDS)
    if len(set(seeds)) < len(seeds):
        raise UserError('give each seed once', 'seeds')
    folder = tables.folder(outdir, tag)  # a place that cannot be written shows before the work
    start = time.monotonic()
    from simulations import gaussian

    settings = [gaussian.Setting(**fixed, D=dim, **dict(zip(varied, point, strict=True)))
                for point in itertools.product(*varied.values())]
    errors = gaussian.simulate_many(settings, seeds, test_points)
    names = list(varied)
    rows = tables.results(settings, seeds, errors, names)
    table = studies.average(rows, names,
                            tables.MEASURED if len(seeds) > len(tables.PAPER_SEEDS) else ())
    path = tables.save(folder, table, rows)
    print(studies.texts(table, names, tables.TITLES, '.5f').to_string(index=False))
    tables.report_undefined(rows)
    took = util.format_time(time.monotonic() - start)
    print(f'{len(rows)} simulations in {took}, averages over {len(seeds)} seeds in {path}')
    if tag == 'slope':
        tables.check_slope(rows)


if __name__ == '__main__':
    main()
