"""What the five studies in miniature share: options and their folder, models side by side,
stopping, data and networks of handwritten digits, tables, pictures.

A study is a dataclass of its options, which `command` turns into a command line:

    @dataclasses.dataclass(frozen=True)
    class Study(studies.Study):
        sizes: list = studies.compared('20,50', cli.INT_LIST, 'Training images')
        batch: int = studies.setting(32, studies.WHOLE, 'Images of one step')

    @studies.command(Study, 'study-memorization', 'data_utils/digits_memorization.py')
    def main(study): ...
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import matplotlib

matplotlib.use('Agg')                                          # before pyplot: needs no display

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tqdm

from dnnlib import UserError, cli, pictures, util

ROOT = Path(__file__).resolve().parent
WHOLE = click.IntRange(min=1)
POSITIVE = click.FloatRange(0, min_open=True)
NUMBERS = cli.Parsed('list', lambda text: [float(part) for part in text.split(',')])
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
styled = plt.style.context(ROOT / 'studies.mplstyle')          # decorator of functions that draw

# --- Options and the folder ----------------------------------------------------------------------


def option_of(field: str) -> str:
    return '--' + field.replace('_', '-')


def setting(default, type, help: str, **field):
    """A field of a study that is an option too, and that all models of a folder have in common."""
    return dataclasses.field(default=default, metadata=dict(type=type, help=help), **field)


def compared(default, type, help: str):
    """An option that says which models are compared: it may be another when the study goes on."""
    return setting(default, type, help, compare=False)


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder, and what all models in it have in common. Fields of subclasses are made by
    `setting` and `compared`; `names`: what an error calls a setting that is no option."""

    outdir: str
    jobs: int = compared(None, WHOLE, 'Models that train at a time  '
                         '[default: one for each core, up to {most}; one on a GPU]')
    names = {}
    most_jobs = 8                                              # by default

    def path(self, *parts) -> str:
        return os.path.join(self.outdir, *parts)

    def run_dir(self, model) -> str:
        return self.path('models', model.name)

    @property
    def settings(self) -> dict:
        """What study.json keeps: plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.compare and field.name != 'outdir'}

    def claim(self):
        """Writes the settings to study.json. Raises UserError if it holds a study with others."""
        ours = json.loads(json.dumps(self.settings))
        path = self.path('study.json')
        try:
            if not os.path.exists(path):
                util.write_json(path, ours)
            with open(path) as file:
                kept = dict(json.load(file))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f'cannot be used: {path} cannot be written and read ({error})',
                            'outdir', self.outdir) from None
        for key, value in ours.items():
            if kept.get(key) != value:
                option = self.names.get(key, option_of(key))
                raise UserError(f'holds a study with another {option} ({kept.get(key)} instead of '
                                f'{value}); choose another folder, or remove it',
                                'outdir', self.outdir)

    def run(self, function: Callable, items, size=lambda item: 1, **bar) -> Iterator:
        """Calls function(study, item) for all items, `jobs` at a time, and yields each that is
        done. The progress bar counts size(item); `bar`: keywords of tqdm."""
        from torch_utils import parallel

        with tqdm.tqdm(total=sum(map(size, items)), **bar) as progress:
            work = functools.partial(function, self)
            for item in parallel.run_side_by_side(work, items, self.jobs):
                yield item
                progress.update(size(item))

    def save(self, figure=None, *pictures: str, **tables):
        """Writes a figure as study.png and study.svg, and pandas tables as <name>.csv; then says
        so, and that there are `pictures` too."""
        names = [f'{name}.csv' for name in save_tables(self.outdir, **tables)]
        if figure is not None:
            names += map(os.path.basename, save_figure(figure, self.path('study')))
        print(f'\nWrote {", ".join([*names, *pictures])} to {self.outdir}')


def command(study: type[Study], folder: str, script: str, more: str = '') -> Callable:
    """Decorator: the command line of function(study), whose results go to training-runs/<folder>.

    `more`: further examples. A study that is stopped says that it goes on, in one line.
    """
    def options():
        yield click.Option(['--outdir'], metavar='DIR', help='Where results go',
                           default=str(ROOT / 'training-runs' / folder))
        for field in sorted(dataclasses.fields(study)[1:], key=lambda field: field.name == 'jobs'):
            kind = field.metadata['type']
            yield click.Option(
                [option_of(field.name)], type=kind, default=field.default,
                metavar=METAVARS.get(kind.name, kind.name.upper()),
                help=field.metadata['help'].format(most=study.most_jobs))

    def decorate(function):
        @functools.wraps(function)
        def callback(outdir, jobs, **values):
            from torch_utils import distributed, parallel

            distributed.init()
            if distributed.get_world_size() > 1:
                raise UserError('this study runs as one command, without torchrun; --jobs sets '
                                'how much is done at a time')
            for field, value in values.items():
                if isinstance(value, list) and len(set(value)) < len(value):
                    raise UserError('give each once', field)
            jobs = jobs or min(parallel.default_jobs(), study.most_jobs)
            try:
                with parallel.sigterm_interrupts():
                    function(study(os.path.realpath(outdir), jobs, **values))
            except KeyboardInterrupt:
                raise UserError('stopped; the same command goes on from here') from None

        return cli.Command(None, callback=callback, params=list(options()), help=function.__doc__,
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


def make_archive(path: str, source, selection):
    """Converts a selection of a source, unless that is done."""
    from training.data import convert

    make(path, convert.convert, source, selection, path, workers=1)


def held_out(source, classes, count: int, seed: int, option: str):
    """The images that `convert.by_class` leaves where it draws `count` of each class by seed.

    Raises UserError about the field `option` if they are too few to measure against.
    """
    from training.data import convert

    with util.renamed_fields(nums=option):
        drawn = convert.by_class(source, classes, count, seed)
    rest = convert.by_class(source, classes)
    keep = ~np.isin(rest.indices, drawn.indices)
    least = np.bincount(rest.labels[keep]).min()
    if least < LEAST_HELD_OUT:
        raise UserError(f'leaves {least} images of a class to measure against; give at most '
                        f'{count + least - LEAST_HELD_OUT}', option, count)
    return dataclasses.replace(rest, indices=rest.indices[keep], labels=rest.labels[keep])


def edm2_settings(data: str, duration: int, **options) -> dict:
    """Settings of train_edm2.py for a network of digits that trains for `duration` images."""
    import train_edm2

    options = BRIEF | dict(outdir='', data=data, duration=duration, snapshot=duration) | options
    config = train_edm2.settings([f'--{key}={value}' for key, value in options.items()])
    return config | dict(rampup_Mimg=RAMPUP * duration / 1e6, ema_stds=[EMA_STD])


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

    detectors = features.Detectors(device='cpu')
    ours, theirs = (
        features.measure_images(open_images(file), detectors, class_name=digit,
                               gaussians=['fd_pixels']).gaussians['fd_pixels']
        for file in (path, reference))
    return ours.distance(theirs)


@contextlib.contextmanager
def writing(path: str) -> Iterator[str]:
    """`util.atomic_path` that raises UserError if the place cannot be written."""
    try:
        with util.atomic_path(path) as temp:
            yield temp
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}); make its folder writable, or '
                        'copy the results to one of your own') from None


def save_tables(outdir: str, **tables) -> list[str]:
    """Writes pandas tables as <name>.csv, with - for _ and six digits, and returns those names."""
    names = [name.replace('_', '-') for name in tables]
    for name, table in zip(names, tables.values(), strict=True):
        with writing(os.path.join(outdir, f'{name}.csv')) as temp:
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


@styled
def save_figure(figure, stem: str) -> list[str]:
    """Writes a matplotlib figure as <stem>.png and <stem>.svg, and closes it. The same figure
    gives the same bytes."""
    paths = [f'{stem}.png', f'{stem}.svg']
    for path, metadata in zip(paths, (None, {'Date': None}), strict=True):
        with writing(path) as temp:
            figure.savefig(temp, format=path[-3:], metadata=metadata)
    plt.close(figure)
    return paths


def draw_lines(axis, table, x: str, y: str, group: str, labels: dict):
    """A line for each group in `labels` {group: label}: means of y by x, with bars from the least
    to the largest."""
    for (name, label), series in zip(labels.items(), SERIES, strict=False):
        values = table[table[group] == name].groupby(x)[y].agg(['mean', 'min', 'max'])
        mean = values['mean']
        axis.errorbar(mean.index, mean, yerr=[mean - values['min'], values['max'] - mean],
                      elinewidth=0.7, label=label, **series)


def pixels(path: str, digit: int | None = None) -> np.ndarray:
    """The images in a file, of all of them or of one digit: uint8 [N,C,H,W]."""
    from metrics.images import select
    from training.data.images import open_images

    opened = open_images(path)
    return opened.images(select(opened, class_name=digit))


def save_rows(rows: dict, columns: int, path: str, **options):
    """A PNG with a row for each {title: images uint8 [N,C,H,W]}; short rows end in white."""
    tiles = []
    for images in rows.values():
        images = images[:columns]
        tiles += [images, np.full((columns - len(images), *images.shape[1:]), 255, np.uint8)]
    grid = pictures.image_grid(np.concatenate(tiles), columns, list(rows), **options)
    pictures.save_png(grid, path)
