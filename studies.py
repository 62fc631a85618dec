"""What the five studies in miniature share: options and their folder, models side by side,
stopping, data and networks of handwritten digits, tables, pictures.

A study is a dataclass of its options, each with its type of click, which `command` turns into a
command line:

    @dataclasses.dataclass(frozen=True)
    class Study(studies.Study):
        sizes: cli.INT_LIST = compared('20,50', 'Training images')
        batch: WHOLE = setting(32, 'Images of one step')

    @studies.command(Study)
    def main(study): ...
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np

from dnnlib import UserError, budget, cli, lazy, pictures, progress, util

with lazy.imports():
    import matplotlib.pyplot as plt
    import pandas as pd
    from scipy.special import stdtrit

os.environ['MPLBACKEND'] = 'Agg'                              # of pyplot: needs no display
ROOT = Path(__file__).resolve().parent
WHOLE = click.IntRange(min=1)
LEAST_HELD_OUT = 20                                            # real digits of a class
# Runs of some hundreds of steps get further with a higher learning rate than that of the preset,
# which soon falls.
BRIEF = dict(preset='digits', lr=0.06, decay=60, precision='fp32')
RAMPUP = 0.05                                                  # a share of the run
EMA_STD = 0.10
METAVARS = {'integer range': 'INT', 'float range': 'FLOAT', 'count': 'NIMG'}

# Colours of Okabe and Ito: told apart in all common kinds of colour blindness.
SERIES = [dict(color=color, marker=marker) for color, marker in (
    ('#0072B2', 'o'), ('#D55E00', 's'), ('#009E73', 'D'), ('#CC79A7', '^'))]

# --- Options and the folder ----------------------------------------------------------------------


def option_of(field: str) -> str:
    return '--' + field.replace('_', '-')


def setting(default, help: str, **field):
    """A field of a study that is an option too, and that all models of a folder have in common."""
    return dataclasses.field(default=default, metadata=dict(help=help), **field)


compared = functools.partial(setting, compare=False)
compared.__doc__ = """An option that says which models are compared: it may be another when the
study goes on."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder, and what all models in it have in common. Fields of subclasses are made by
    `setting` and `compared`; `names`: what an error calls a setting that is no option."""

    outdir: str
    jobs: WHOLE = compared(None, 'Models that train at a time  '
                           '[default: one for each core, up to {most}; one on a GPU]')
    names = {}
    most_jobs = 8                                              # by default
    grid = dict(columns=12)                                    # of pictures; see `save_rows`

    def path(self, *parts) -> str:
        return os.path.join(self.outdir, *parts)

    def run_dir(self, model) -> str:
        return self.path('models', model.name)

    @property
    def settings(self) -> dict:
        """What study.json keeps: plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.compare and field.name != 'outdir'}

    @property
    def image_channels(self) -> int:
        """1; 3 in the folder of a study that an earlier version began."""
        path = self.path('study.json')
        return budget.read_json(path).get('image_channels', 3) if os.path.exists(path) else 1

    def check(self):
        """Raises UserError for options that do not suit each other or the data."""

    def claim(self):
        """Writes the settings to study.json, if they pass the `check`: after a mistake the folder
        is still free. Raises UserError if it holds a study with others."""
        from training.runs import claimed

        self.check()
        click.get_current_context().with_resource(claimed(self.outdir, 'working'))
        for folder, _, _ in os.walk(self.outdir):              # also beside what is done already
            util.remove_leftovers(folder)
        ours = json.loads(json.dumps(self.settings))
        path = self.path('study.json')
        try:
            if not os.path.exists(path):
                if any(not name.startswith('.') for name in os.listdir(self.outdir)):
                    raise UserError('is not empty, and no folder of a study; choose another',
                                    'outdir', self.outdir)
                util.write_json(path, ours | {'image_channels': 1})
            kept = dict(budget.read_json(path))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f'cannot be used: {path} cannot be written and read ({error})',
                            'outdir', self.outdir) from None
        kept, ours = ({self.names.get(key, option_of(key)): settings.get(key) for key in ours}
                      for settings in (kept, ours))
        util.require_same(f'--outdir={self.outdir}: the study in this folder', kept, ours,
                          'choose another folder, or remove it')

    def run(self, function: Callable, items, size=lambda item: 1, **bar) -> Iterator:
        """Calls function(study, item) for all items, `jobs` at a time, and yields each that is
        done. The progress bar counts size(item); `bar`: keywords of tqdm."""
        from torch_utils import parallel

        with progress.bar(total=sum(map(size, items)), **bar) as shown:
            work = functools.partial(function, self)
            for item in parallel.run_side_by_side(work, items, self.jobs):
                yield item
                shown.update(size(item))

    def save(self, figure=None, grids: dict | None = None, **tables):
        """Writes a figure as study.png and study.svg, `grids` {file name: (title, rows of
        images)}, and pandas tables as <name>.csv; then says so."""
        names = save_tables(self.outdir, **tables)
        if figure is not None:
            names += map(os.path.basename, save_figure(figure, self.path('study')))
        for name, (title, rows) in (grids or {}).items():
            save_rows(rows, path=self.path(name), title=title, **self.grid)
            names.append(name)
        from training.report import write_report
        write_report(self.path('report.html'), [self.outdir])
        names.append('report.html')
        print(f'\nWrote {", ".join(names)} to {self.outdir}')


def command(study: type[Study], more: str = '') -> Callable:
    """Decorator: the command line of function(study) in digits_<name>.py, whose results go to
    training-runs/study-<name>.

    `more`: further examples. A study that is stopped says that it goes on, in one line.
    """
    def decorate(function):
        script = Path(inspect.getfile(function)).resolve().relative_to(ROOT)
        folder = script.stem.replace('digits', 'study').replace('_', '-')
        _, jobs, *fields = dataclasses.fields(study)
        options = [click.Option(['--outdir'], metavar='DIR', help='Where results go',
                                type=cli.FOLDER, default=str(ROOT / 'training-runs' / folder))]
        options += [click.Option(
            [option_of(field.name)], type=field.type, default=field.default,
            metavar=METAVARS.get(field.type.name, field.type.name.upper()),
            help=field.metadata['help'].format(most=study.most_jobs)) for field in [*fields, jobs]]

        def callback(outdir, jobs, **values):
            from torch_utils import distributed, parallel

            distributed.init()
            if distributed.get_world_size() > 1:
                raise UserError('this study runs as one command, without torchrun; --jobs sets '
                                'how much is done at a time')
            for field, value in values.items():
                if isinstance(value, list) and len(set(value)) < len(value):
                    raise UserError('give each once', field)
                if field == 'seeds' and max(value) >= 2**31:
                    raise UserError('give numbers below 2^31', field)
            jobs = jobs or min(parallel.default_jobs(), study.most_jobs)
            try:
                with parallel.sigterm_interrupts():
                    function(study(os.path.realpath(outdir), jobs, **values))
            except KeyboardInterrupt:
                raise UserError('stopped; the same command goes on from here') from None

        return cli.Command(None, callback=callback, params=options, help=function.__doc__,
                           epilog=f"""\b
Examples:
  # The study of the page, under 15 minutes on 2 CPU cores
  python {script}
{more}\b
The same command goes on with a study that was stopped; what is finished is not done again.
""")
    return decorate


# --- Models --------------------------------------------------------------------------------------


@contextlib.contextmanager
def silence():
    """No output: models that train side by side would talk over each other; log.txt has it all."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def make(path: str, function: Callable, *args, **kwargs):
    """Calls a function that makes a file, unless it is there. Raises KeyboardInterrupt if it still
    is not: training was told to stop."""
    if os.path.exists(path):
        return
    with silence():
        function(*args, **kwargs)
    if not os.path.exists(path):
        raise KeyboardInterrupt


@functools.cache
def digits():
    """The source of all miniatures: 1,797 handwritten digits of 8x8 pixels."""
    from training.data import sources

    return sources.open_source('digits')


def make_archive(study: Study, path: str, selection):
    """Converts a selection of the digits, unless that is done."""
    from training.data import convert

    make(path, convert.convert, digits(), selection, path, workers=1,
         channels=study.image_channels)


def split(count: int, seed: int, option: str, classes=None):
    """`count` digits of each class, drawn by seed, and all others: two selections.

    Raises UserError about the field `option` if the others are too few to measure against.
    """
    from training.data import convert

    with util.renamed_fields(nums=option):
        drawn = convert.by_class(digits(), classes, count, seed)
    rest = convert.by_class(digits(), classes)
    keep = ~np.isin(rest.indices, drawn.indices)
    rest = dataclasses.replace(rest, indices=rest.indices[keep], labels=rest.labels[keep])
    least = np.bincount(rest.labels).min()
    if least < LEAST_HELD_OUT:
        raise UserError(f'leaves {least} images of a class to measure against; give at most '
                        f'{count + least - LEAST_HELD_OUT}', option, count)
    return drawn, rest


def arguments(options: dict, prefix: str = '--') -> list[str]:
    """Options as words of a command line."""
    return [f'{prefix}{key}={value}' for key, value in options.items()]


def edm2_settings(data: str, duration: int, **options) -> dict:
    """Settings of train_edm2.py for a network of digits that trains for `duration` images."""
    import train_edm2

    given = dict(outdir='', data=data, duration=duration, snapshot=duration,
                 status=max(duration // 4, 1), rampup=RAMPUP * duration / 1e6,
                 **{'ema-stds': EMA_STD})
    return train_edm2.settings(arguments(BRIEF | given | options))


def edm2_network(run_dir: str, config: dict) -> str:
    """Path of the network that training by `edm2_settings` ends with; it is trained unless it is
    there."""
    import train_edm2
    from training.snapshot import snapshot_name

    path = os.path.join(run_dir, snapshot_name(config['duration'], f'-{EMA_STD:.3f}'))
    make(path, train_edm2.train, config, run_dir)
    return path


# --- Results -------------------------------------------------------------------------------------


def pixel_distance(path: str, reference: str, digit: int | None = None) -> float:
    """Frechet distance of the pixels of the images in two files, of all of them or of one
    digit."""
    from metrics import features
    from training.data.images import open_images

    ours, theirs = (
        features.measure_images(open_images(file), features.Detectors(device='cpu'),
                                class_name=digit, gaussians=['fd_pixels']).gaussians['fd_pixels']
        for file in (path, reference))
    return ours.distance(theirs)


def interval_column(column: str) -> str:
    """Name of the column with the half-width of the 95% interval of a column."""
    return f'95% interval of {column}'


def half_width(values):
    """Half-width of the 95% interval of the mean of a pandas column, or of each of its groups, by
    Student's t; NaN for fewer than two values."""
    return stdtrit(values.count() - 1, 0.975) * values.sem()


def average(rows: pd.DataFrame, keys: list[str], measured=()) -> pd.DataFrame:
    """Means over seeds, one row for each value of `keys`, in ascending order.

    What does not exist (NaN) is left out; where none exists the mean is NaN. For columns that are
    `measured` others are added: `seeds`, how many values of the first one went into the mean, and
    the half-width of each 95% interval.
    """
    groups = rows.groupby(keys)
    table = groups.mean()
    if measured:
        table['seeds'] = groups[measured[0]].count()
    for name in measured:
        table[interval_column(name)] = half_width(groups[name])
    return table.reset_index()


def save_tables(outdir: str, **tables) -> list[str]:
    """Writes pandas tables as <name>.csv, with - for _ and six digits, and returns those names."""
    names = [f'{name.replace("_", "-")}.csv' for name in tables]
    for name, table in zip(names, tables.values(), strict=True):
        with util.atomic_path(os.path.join(outdir, name)) as temp:
            table.to_csv(temp, index=False, float_format='%.6g', lineterminator='\n')
    return names


def plus_minus(table: pd.DataFrame, name: str, error: str, form: str, scale=1) -> pd.Series:
    """A column with its intervals (the column `error`, if there is one) as texts, '12.3 ± 0.4' for
    the form '.1f'. What is NaN is left out."""
    def text(mean, half):
        if mean != mean:
            return '-'
        return f'{mean:{form}}' + f' ± {half:{form.strip("+")}}' * (half == half)

    pairs = scale * table.reindex(columns=[name, error])
    return pd.Series(map(text, pairs[name], pairs[error]), table.index)


def texts(table: pd.DataFrame, keys: list[str], titles: dict, form: str) -> pd.DataFrame:
    """The columns `keys` of averages, and those in `titles` {title: column} with their intervals,
    to be printed."""
    return table[keys].assign(**{
        title: plus_minus(table, name, interval_column(name), form)
        for title, name in titles.items()})


def styled(function):
    """Decorator of functions that draw."""
    @functools.wraps(function)
    def draw(*args, **kwargs):
        with plt.style.context(ROOT / 'studies.mplstyle'):
            return function(*args, **kwargs)

    return draw


@styled
def save_figure(figure, stem: str) -> list[str]:
    """Writes a matplotlib figure as <stem>.png and <stem>.svg, and closes it. The same figure
    gives the same bytes."""
    paths = [f'{stem}.png', f'{stem}.svg']
    for path in paths:
        pictures.save_figure(figure, path, path[-3:], dpi=None)
    plt.close(figure)
    return paths


def draw_lines(axis, table, x: str, y: str, group: str, labels: dict, each: str | None = None,
               interval: Callable | None = None, ticks: dict | None = None, series=SERIES,
               **settings):
    """A line for each group in `labels` {group: label}: means of y by x over seeds.

    Bars go from the least to the largest seed, or are `interval(groups of seeds)` up and down.
    Thin lines are means for each value of the column `each`; returned as {value: means}.
    Values of x are evenly spaced, in the order of `ticks` {value: its text}; `series`: keywords of
    each line; `settings` are those of the axis.
    """
    ticks = ticks or {value: value for value in sorted(table[x].unique())}
    table = table.assign(**{x: table[x].map(list(ticks).index)})
    thin = {name: rows.groupby(x)[y].mean() for name, rows in (
        table.groupby(each) if each else ())}
    for means in thin.values():
        axis.plot(means, color='0.6', linewidth=0.6)
    for (name, label), style in zip(labels.items(), series, strict=False):
        seeds = table[table[group] == name].groupby([x, 'seed'])[y].mean().groupby(x)
        mean = seeds.mean()
        bars = interval(seeds) if interval else [mean - seeds.min(), seeds.max() - mean]
        axis.errorbar(mean.index, mean, yerr=bars, elinewidth=0.7, label=label,
                      **dict(zorder=3) | style)
    axis.set(xticks=range(len(ticks)), xticklabels=ticks.values(), **settings)
    axis.margins(x=0.15)
    return thin


def _name_ends(axis, lines: dict):
    """Names at the right of lines {name: values}, above each other where these end together."""
    low, high = axis.get_ylim()
    gap = 0.06 * (high - low)
    place = low
    ends = sorted(lines.items(), key=lambda line: line[1].iloc[-1])
    for below_top, (name, values) in zip(range(len(ends) - 1, -1, -1), ends, strict=True):
        # Above the last one, and with room for those that follow.
        place = min(max(place, values.iloc[-1]), high - gap * below_top)
        axis.annotate(name, (values.index[-1], place), (6, 0), textcoords='offset points',
                      fontsize=6, color='0.45', va='center', annotation_clip=False)
        place += gap


@styled
def draw_panels(panels: list[dict], rows: int = 1, **limits):
    """A figure of rows of panels, each with the arguments of `draw_lines`. Those of a row have the
    same y axis, whose `limits` (bottom, top) may be given. Thin lines have their names."""
    columns = len(panels) // rows
    figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.5 * rows), squeeze=False,
                                sharey='row')
    thin = [draw_lines(axis, **panel) for axis, panel in zip(axes.flat, panels, strict=True)]
    for axis, panel, lines in zip(axes.flat, panels, thin, strict=True):
        axis.set_ylim(**limits)
        _name_ends(axis, lines)
        if any(panel['labels'].values()):
            axis.legend()
        axis.label_outer()
    return figure


def pixels(images, digit: int | None = None) -> np.ndarray:
    """The images of a file or data set, all of them or those of one digit: uint8 [N,C,H,W]."""
    from metrics.images import select
    from training.data.images import open_images

    opened = open_images(images) if isinstance(images, str) else images
    return opened.images(select(opened, class_name=digit))


def save_rows(rows: dict, columns: int, path: str, **options):
    """A PNG with a row for each {title: images uint8 [N,C,H,W]}; short rows end in white."""
    tiles = []
    for images in rows.values():
        images = images[:columns]
        tiles += [images, np.full((columns - len(images), *images.shape[1:]), 255, np.uint8)]
    grid = pictures.image_grid(np.concatenate(tiles), columns, list(rows), **options)
    pictures.save_png(grid, path)
