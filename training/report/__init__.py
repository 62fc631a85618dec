"""One self-contained HTML page of runs, side by side, or of a study: no network, no script of
others. All texts are escaped (`markup`), and the page's policy lets only its own script run."""

import base64
import datetime
import hashlib
import io
import json
import math
import os
import re
import shlex
from pathlib import Path

import PIL.Image

from dnnlib import UserError, progress
from dnnlib.image_io import BadImage, decode_image
from dnnlib.util import MARK, format_time, hash_file, write_bytes
from training.report.charts import Series, chart, compact, of_images
from training.report.folder import (
    MOST_BYTES,
    MOST_ROWS,
    File,
    Run,
    Study,
    find_runs,
    number,
    read_run,
    read_study,
    text_of,
)
from training.report.markup import Markup, join, tag

MOST_RUNS = 64
LONG = 30                   # rows of a table that is folded
MANY = 8                    # runs whose tables are folded
GRID_BYTES = 2 << 20        # of all grids together, encoded
PICTURE_BYTES = 1 << 20     # of all other pictures
LEAST_BYTES = 12_000        # of a picture
QUALITIES = (90, 75, 55)
LONGEST_SIDE = 1600         # pixels of a picture
FINE_ZOOM = 300             # narrower pictures are shown enlarged, pixel by pixel

# What the page says of a run, of the fields of its record.
FACTS = {'Network': 'network', 'Loss': 'loss', 'Optimizer': 'optim',
         'Learning rate': 'learning_rate', 'Averages': 'averages', 'Sampler': 'sampler',
         'Order of images': 'order', 'Encoder': 'encoder'}
SHARES = re.compile(r'.*(ratio|accuracy|precision|recall|recognition|clean|robust|coverage).*')


def write_report(dest: str, folders: list[str], hashes: bool = True):
    """Writes the page of the runs, or studies, in the folders.

    hashes  with the SHA-256 of all files, which reads them whole.

    Raises UserError for a folder without any.
    """
    studies, runs = [], []
    for folder in folders:
        study = read_study(folder)
        found = find_runs(folder)
        if not found and study is None:
            raise UserError('has neither training_options.json nor stats.jsonl, nor runs below '
                            'it; give the folder of a run', value=folder)
        if study is not None:
            studies.append(study)
        for path in found[:MOST_RUNS]:
            run = read_run(path)
            if path != folder:                                 # told apart by where they are
                run.name = text_of(os.path.relpath(path, folder))
            runs.append(run)
    _tell_apart(runs)
    left_out = os.path.basename(dest)
    for part in (*studies, *runs):                             # the page is not about itself
        part.files = [file for file in part.files if file.name != left_out]
    write_bytes(dest, page(runs, studies, hashes).encode('utf-8', 'replace'))


def _tell_apart(runs: list[Run]):
    """Gives runs of one name their place in the list too."""
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f'{run.name} ({i + 1})'


def page(runs: list[Run], studies: list[Study], hashes: bool = True) -> str:
    """The HTML of runs and studies."""
    template = (Path(__file__).parent / 'page.html').read_text()
    style, script = (re.search(rf'<{name}>(.*)</{name}>', template, re.DOTALL)[1]
                     for name in ('style', 'script'))
    allowed = ' '.join(f"{kind}-src '{_integrity(text)}';"
                       for kind, text in (('style', style), ('script', script)))
    policy = f"default-src 'none'; img-src data:; {allowed} base-uri 'none'; form-action 'none'"
    names = [part.name for part in studies] or [run.name for run in runs]
    title = names[0] if len(names) == 1 else f'{len(names)} runs'
    now = datetime.datetime.now(datetime.timezone.utc)
    head = tag('head', tag('meta', charset='utf-8'),
               tag('meta', http_equiv='Content-Security-Policy', content=policy),
               tag('meta', name='generator', content=MARK),
               tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
               tag('meta', name='referrer', content='no-referrer'),
               tag('title', f'{title} · report'),
               tag('style', Markup(style)), tag('script', Markup(script)))
    body = tag('main', tag('header', tag('p', f'Report of {now:%d %B %Y}', class_='over'),
                           tag('h1', title), _lead(runs, studies)),
               [_study(study) for study in studies], _runs(runs), _curves(runs), _levels(runs),
               _grids(runs), _measures(runs), _copies(runs), _starts(runs),
               _files(studies, runs, hashes))
    return '<!doctype html>\n' + tag('html', head, tag('body', body), lang='en')


def _integrity(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f'sha256-{base64.b64encode(digest).decode()}'


def _section(title: str, *content) -> Markup | None:
    """A section, unless it is empty."""
    inner = join(*content)
    return tag('section', tag('h2', title), inner) if inner else None


def _table(head: list, rows: list[list], numbers=(), **attributes) -> Markup:
    """A table that scrolls where it is too wide; `numbers` are columns that stand at the right."""
    def cells(name, values):
        return [tag(name, value, class_='num' if i in numbers else None)
                for i, value in enumerate(values)]

    return tag('div', tag('table', tag('thead', tag('tr', cells('th', head))),
                          tag('tbody', [tag('tr', cells('td', row)) for row in rows[:MOST_ROWS]]),
                          **attributes), class_='scroll')


def _folded(title: str, head: list, rows: list[list], numbers=()) -> list[Markup]:
    """A table below its title, folded if it is long."""
    table = _table(head, rows, numbers)
    if len(rows) > LONG:
        return [tag('details', tag('summary', f'{title} ({len(rows)} rows)'), table)]
    return [tag('h3', title), table]


# --- What was trained ----------------------------------------------------------------------------


def _count(value, what: str) -> str:
    return f'{value:,.0f} {what}' if value is not None else f'unknown number of {what}'


def _data(run: Run) -> str:
    """'digits: 1,797 images of 8x8, 10 classes'."""
    data = run.options.get('dataset')
    data = data if isinstance(data, dict) else {}
    parts = []
    if size := number(data.get('size')):                       # 0: of a teacher, without images
        parts.append(f'{size:,.0f} images')
    resolution = data.get('resolution')
    sides = [*map(number, resolution if isinstance(resolution, list) else [resolution] * 2)]
    if len(sides) == 2 and None not in sides:
        kind = 'pixels' if number(data.get('num_channels')) in (None, 1, 3, 4) else 'latents'
        parts.append(f'{sides[1]:.0f} × {sides[0]:.0f} {kind}')
    if classes := number(data.get('label_dim')):
        parts.append(f'{classes:,.0f} class' + 'es' * (classes != 1))
    name = data.get('name') or run.options.get('data') or run.options.get('data_type')
    return f'{text_of(name)}: {", ".join(parts)}' if name and parts else text_of(name)


def _network(run: Run) -> str:
    network = run.options.get('network')
    network = network if isinstance(network, dict) else {}
    name = network.get('class_name') or network.get('name')
    kind = network.get('model_type') or run.options.get('preset')
    return text_of(name) + (f' ({text_of(kind)})' if kind else '') if name else '-'


def _progress(run: Run) -> str:
    """'complete: 524,288 images' or how far it is."""
    seen = _count(run.nimg, 'images')
    if run.is_complete or run.total and run.nimg >= run.total:
        return f'complete, {seen}'
    share = f' ({100 * run.nimg / run.total:.0f}%)' if run.total else ''
    of = f' of {run.total:,.0f}' if run.total else ''
    last = ''
    if run.last:
        try:
            when = datetime.datetime.fromtimestamp(run.last, datetime.timezone.utc)
            last = f'; last report {when:%Y-%m-%d %H:%M} UTC'
        except (OverflowError, ValueError, OSError):
            pass
    return f'not complete: {run.nimg:,.0f}{of} images{share}{last}'


def _lead(runs: list[Run], studies: list[Study]) -> Markup | None:
    if studies:
        return tag('p', f'A study of {len(runs)} models.', class_='lead')
    if len(runs) == 1:
        run, = runs
        return tag('p', f'{_network(run)} on {_data(run)}; {_progress(run)}.',
                   class_='lead')
    return tag('p', ', '.join(run.name for run in runs[:8]) + ', ...' * (len(runs) > 8),
               class_='lead')


def _plain(value) -> str:
    """A setting with parts as 'edm, sigma_data=0.5'."""
    if isinstance(value, list):
        return f'[{text_of(value)}]'
    if isinstance(value, dict):
        first = [text_of(value[key]) for key in ('name', 'class_name') if value.get(key)][:1]
        return ', '.join(first + [f'{text_of(key)}={_part(item)}' for key, item in
                                  list(value.items())[:100]
                                  if key not in ('name', 'class_name') and item is not None])
    return text_of(value)


def _part(value) -> str:
    return f'({_plain(value)})' if isinstance(value, dict) else _plain(value)


def _flat(values: dict, path: str = '') -> dict[str, str]:
    """All settings that have no parts, by paths like network.dropout."""
    flat = {}
    for key, value in list(values.items())[:1000]:
        name = path + text_of(key)
        flat |= _flat(value, name + '.') if isinstance(value, dict) else {name: text_of(value)}
    return flat


def _command(run: Run) -> Markup | None:
    """The command of the newest start."""
    for start in run.starts[::-1]:
        command = start.get('command')
        if isinstance(command, list):
            return tag('pre', 'python ' + shlex.join(map(text_of, command[:400])))
    return None


def _facts(run: Run) -> Markup:
    """The settings that say most of a run."""
    options = run.options
    start = run.starts[-1] if run.starts else {}
    rows = {'Data': _data(run)}
    rows |= {title: _plain(options[key]) for title, key in FACTS.items() if options.get(key)}
    rows |= {'Batch': text_of(options['batch'])} if 'batch' in options else {}
    rows['Length'] = _progress(run)
    rows |= {'Seed': text_of(options['seed'])} if 'seed' in options else {}
    machine = [f'{start["processes"]} × {start["device"]}'
               if 'device' in start and 'processes' in start else None,
               *(f'{name} {start[name]}' for name in ('torch', 'python') if start.get(name)),
               f'project {start["project"]}' if start.get('project') else None]
    if any(machine):
        rows['Machine'] = text_of(', '.join(filter(None, machine)))
    told = [line for line in run.told if re.search(r'Network: ', line)]
    if told:
        rows['Size'] = told[-1].partition('Network: ')[2]
    return tag('dl', [(tag('dt', key), tag('dd', value)) for key, value in rows.items()])


def _runs(runs: list[Run]) -> Markup | None:
    if not runs:
        return None
    if len(runs) == 1:
        run, = runs
        settings = _flat(run.options)
        return _section('What was trained', _facts(run), _command(run), settings and tag(
            'details', tag('summary', f'All {len(settings)} settings'),
            _table(['setting', 'value'], [list(row) for row in settings.items()])))
    rows = [[run.name, _data(run), _network(run), _progress(run), _final(run)] for run in runs]
    commands = [(tag('h3', run.name), command) for run in runs if (command := _command(run))]
    table = _table(['run', 'data', 'network', 'progress', 'last loss'], rows, {4})
    differences = [tag('h3', 'Settings that differ'), _differences(runs)]
    if len(runs) > MANY:
        table = tag('details', tag('summary', f'{len(runs)} runs'), table)
        differences = tag('details', tag('summary', 'Settings that differ'), _differences(runs))
    return _section(
        'What was trained', table, differences,
        tag('details', tag('summary', 'Command lines'), commands) if commands else None)


def _final(run: Run) -> str:
    points = [p for p in run.curves.get('Loss/loss', ()) if p.y == p.y]
    return compact(points[-1].y) if points else '-'


def _differences(runs: list[Run]) -> Markup:
    """A table of the settings that are not the same in all runs."""
    settings = [_flat(run.options) for run in runs]
    names = [name for name in dict.fromkeys(name for one in settings for name in one)
             if len({one.get(name, '-') for one in settings}) > 1]
    if not names:
        return tag('p', 'There are none.')
    columns = [[one.get(name, '-') for name in names] for one in settings]
    if len(runs) > 4:
        return _table(['run', *names], [[run.name, *values] for run, values in
                                        zip(runs, columns, strict=True)])
    return _table(['setting', *(run.name for run in runs)],
                  [list(row) for row in zip(names, *columns, strict=True)])


# --- Curves --------------------------------------------------------------------------------------


def _lines(runs: list[Run], name: str, kind: str | None = None) -> list[Series]:
    """The curves of that name, of all runs or of those with a loss of one kind."""
    return [Series(run.name, run.curves[name], i) for i, run in enumerate(runs)
            if name in run.curves and kind in (None, _loss(run))]


def _loss(run: Run) -> str:
    loss = run.options.get('loss')
    return text_of(loss.get('name')) if isinstance(loss, dict) else '-'


def _resumed(runs: list[Run]) -> list[float]:
    """Where the run went on, if it is one."""
    if len(runs) != 1:
        return []
    return [at for start in runs[0].starts if (at := number(start.get('nimg')))]


def _curves(runs: list[Run]) -> Markup | None:
    names = dict.fromkeys(name for run in runs for name in run.curves)
    losses = [name for name in names if name.startswith('Loss/') and name != 'Loss/accuracy']
    titles = {name: ('Loss' if name == 'Loss/loss' else f'Loss: {name.removeprefix("Loss/")}',
                     'mean since the last report') for name in sorted(
                         losses, key=lambda name: name != 'Loss/loss')}
    titles |= {'Loss/accuracy': ('Accuracy on training images', '%'),
               'Progress/lr': ('Learning rate', 'of the optimizer'),
               'Progress/grad_norm': ('Gradient norm', 'mean since the last report'),
               'Timing/images_per_sec': ('Speed', 'images per second')}
    unit, xlabel = of_images([run.nimg for run in runs])
    kinds = list(dict.fromkeys(map(_loss, runs)))              # whose losses are no one scale
    charts = [(name, title if kind is None else f'{title} ({kind})', ylabel, kind)
              for name, (title, ylabel) in titles.items() if name in names
              for kind in (kinds if len(kinds) > 1 and name in losses else [None])]
    return _section('Curves', tag('div', [
        chart(title, _lines(runs, name, kind), xlabel, ylabel, unit=unit, marks=_resumed(runs),
              floor=0 if name.startswith(('Timing/', 'Progress/lr', 'Loss/accuracy')) else None,
              y_log=False if name.startswith(('Timing/', 'Loss/accuracy')) else None,
              scale=100 if name == 'Loss/accuracy' else 1)
        for name, title, ylabel, kind in charts], class_='charts') if charts else None)


def _levels(runs: list[Run]) -> Markup | None:
    names = dict.fromkeys(name for run in runs for name in run.levels)
    figures = []
    for name in names:
        several = len(runs) > 1
        lines = []
        for i, run in enumerate(runs):
            last, early = run.levels.get(name), run.early.get(name)
            if last:
                lines.append(Series(run.name if several else 'last quarter' if early else name,
                                    last, i))
            if early and not several and early != last:
                lines.append(Series('first quarter', early, 1, is_faint=True))
        title = 'Training loss' if name == 'LossAtSigma' else name[:1].upper() + name[1:]
        of = ', last quarter of the run' if several and name == 'LossAtSigma' else ''
        figures.append(chart(title, lines, 'noise level σ', f'mean of a bin of σ{of}', x_log=True))
    return _section('Loss by noise level', tag('div', figures, class_='charts')) \
        if any(figures) else None


# --- Pictures ------------------------------------------------------------------------------------


def _picture(file: File, most: int, alt: str) -> Markup | None:
    """An image element of at most about so many bytes, or None if it is none that can be read."""
    if file.size > MOST_BYTES:
        return None
    try:
        with open(file.path, 'rb') as opened:
            image = PIL.Image.fromarray(decode_image(opened.read(MOST_BYTES)))
    except (OSError, BadImage):
        return None
    width, height = image.size
    if max(image.size) > LONGEST_SIDE:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    while True:
        for options in (dict(lossless=True), *(dict(quality=quality) for quality in QUALITIES)):
            data = io.BytesIO()
            image.save(data, 'webp', method=4, **options)
            if len(data.getvalue()) <= most:
                break
        if len(data.getvalue()) <= most or max(image.size) < 256:
            break
        image = image.resize([max(side * 2 // 3, 1) for side in image.size],
                             PIL.Image.Resampling.LANCZOS)
    uri = f'data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}'
    return tag('img', src=uri, alt=alt, width=width, height=height,
               class_='fine' if width < FINE_ZOOM else None)


def _evenly(items: list, count: int) -> list:
    """So many of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _grids(runs: list[Run]) -> Markup | None:
    total = sum(len(run.grids) for run in runs)
    if not total:
        return None
    share = min(1, GRID_BYTES / LEAST_BYTES / total)
    chosen = [_evenly(run.grids, max(round(share * len(run.grids)), 2)) for run in runs]
    most = GRID_BYTES // sum(map(len, chosen))
    columns = []
    places = set()
    for run, grids in zip(runs, chosen, strict=True):
        shots = []
        for at, file in grids:
            if image := _picture(file, most, f'Samples of {run.name} after {at:,.0f} images'):
                places.add(at)
                shots.append(tag('figure', image, tag('figcaption', f'{at:,.0f} images'),
                                 data_at=at))
        if shots:
            name = tag('h3', run.name) if len(runs) > 1 else None
            columns.append(tag('div', name, tag('div', shots, class_='shots')))
    if not columns:
        return None
    note = ('The same place in a grid is the same seed, and so the same noise, at all times'
            + ' and in all runs whose grids have one layout' * (len(columns) > 1) + '.')
    if (shown := sum(map(len, chosen))) < total:
        note += f' {shown} of {total} grids, evenly spaced.'
    places = sorted(places)
    slider = None
    if len(places) > 1:
        slider = tag('label', tag('input', type='range', min=0, max=len(places) - 1, step=1,
                                  value=len(places) - 1, aria_label='training images'),
                     tag('output', ''), class_='slider', data_places=json.dumps(places))
    return _section('Samples', tag('p', note), slider,
                    tag('div', columns, class_='runs' + ' one' * (len(columns) == 1) +
                                          ' sliding' * (slider is not None)))


def _copies(runs: list[Run]) -> Markup | None:
    files = [(run, file) for run in runs for file in run.copies]
    return _section('Memorized samples', _pictures([
        (f'{run.name}: {file.name}' if len(runs) > 1 else file.name, file)
        for run, file in files]), tag('p', 'Generated images above their nearest training images, '
                                      'the surest copies first.', class_='note')) \
        if files else None


def _pictures(files: list) -> Markup | None:
    """Pictures with their names, within the budget of the page."""
    files = _evenly(files, PICTURE_BYTES // LEAST_BYTES)
    shown = [(tag('h3', name), image) for name, file in files
             if (image := _picture(file, PICTURE_BYTES // len(files), name))]
    return tag('div', [tag('figure', *one) for one in shown], class_='pictures') \
        if shown else None


# --- Measures ------------------------------------------------------------------------------------


def _value(value: float, low: float | None, high: float | None) -> str:
    texts = [compact(float(f'{number:.4g}')) for number in (value, low, high)
             if number is not None]
    return '{} ({} to {})'.format(*texts) if len(texts) == 3 else texts[0]


def _measures(runs: list[Run]) -> Markup | None:
    """A curve of each metric that was measured while training, and a table of all last values."""
    names = dict.fromkeys(name for run in runs for name in run.measures)
    unit, xlabel = of_images([run.nimg for run in runs])
    figures = []
    rows = []
    for name in names:
        lines = []
        for i, run in enumerate(runs):
            for j, (width, points) in enumerate(sorted(run.measures.get(name, {}).items())):
                points = sorted(points, key=lambda point: point.x)
                label = [run.name] * (len(runs) > 1) + [f'average {width}'] * bool(width)
                color, is_faint = (i, j > 0) if len(runs) > 1 else (j, False)
                lines.append(Series(', '.join(label), points, color, is_faint))
                last = points[-1]
                rows.append([*[run.name] * (len(runs) > 1), name, width or '-',
                             _value(last.y, last.low, last.high), f'{last.x:,.0f}'])
        is_share = bool(SHARES.fullmatch(name)) and all(
            0 <= p.y <= 1 for line in lines for p in line.points)
        if any(len(line.points) > 1 for line in lines):
            figures.append(chart(name.replace('_', ' '), lines, xlabel,
                                 '%' if is_share else 'value', unit=unit,
                                 scale=100 if is_share else 1, floor=0))
    head = ['run'] * (len(runs) > 1)
    parts = [tag('div', figures, class_='charts') if any(figures) else None]
    if rows:
        parts += _folded('Last values, with intervals of 95% where they are known',
                         [*head, 'measure', 'average', 'value', 'at image'], rows,
                         {len(head) + 2, len(head) + 3})
    once = [[*[run.name] * (len(runs) > 1), name, metric, _value(p.y, p.low, p.high)]
            for run in runs for name, results in run.results.items() for metric, p in results]
    if once:
        parts += _folded('Measured once', [*head, 'file', 'measure', 'value'], once,
                         {len(head) + 2})
    return _section('Measures', *parts)


# --- The record ----------------------------------------------------------------------------------


def _starts(runs: list[Run]) -> Markup | None:
    """A row for each start, and what the log says of the run as a whole."""
    parts = []
    for run in runs:
        rows = []
        for start in run.starts[-MOST_ROWS:]:
            changes = start.get('changes')
            changes = '; '.join(map(text_of, changes[:20])) if isinstance(changes, list) else ''
            at = number(start.get('nimg'))
            rows.append([text_of(start.get('time')).replace('T', ' ').removesuffix('+00:00'),
                         '-' if at is None else f'{at:,.0f}',
                         f'{text_of(start.get("processes", 1))} × {text_of(start.get("device"))}',
                         text_of(start.get('torch')), changes or '-'])
        seconds = run.curves.get('Timing/total_sec')
        spent = f'{format_time(seconds[-1].y)} in training.' if seconds and (
            math.isfinite(seconds[-1].y)) else None
        told = run.told[-200:]
        content = [_table(['start (UTC)', 'at image', 'on', 'torch', 'changed'], rows, {1})
                   if rows else None, tag('p', spent) if spent else None,
                   tag('details', tag('summary', f'What the log says of it ({len(told)} lines)'),
                       tag('pre', '\n'.join(told))) if told else None]
        if any(content):
            parts += [tag('h3', run.name) if len(runs) > 1 else None, *content]
    if len(runs) > MANY and parts:
        parts = [tag('details', tag('summary', f'Of {len(runs)} runs'), parts)]
    return _section('Starts and stops', *parts)


def _files(studies: list[Study], runs: list[Run], hashes: bool) -> Markup | None:
    """Names, sizes and hashes."""
    parts = []
    owners = [*studies, *runs]
    total = sum(file.size for owner in owners for file in owner.files)
    with progress.bar(show=hashes, total=total, desc='hashes', unit='B', unit_scale=True,
                      leave=False) as bar:
        for owner in owners:
            rows = []
            for file in owner.files:
                digest = 'a link, not followed' if file.is_link else ''
                if hashes and not file.is_link:
                    try:
                        digest = hash_file(file.path)
                    except OSError:                            # of a run that goes on: it is gone
                        digest = 'cannot be read'
                bar.update(file.size)
                rows.append([text_of(file.name), f'{file.size:,} bytes',
                             tag('span', digest, class_='hash')])
            if rows:
                table = _table(['file', 'size', 'SHA-256'], rows, {1}, class_='files')
                parts.append(tag('details', tag('summary', f'{owner.name}: {len(rows)} files'),
                                 table))
    return _section('Files', *parts)


def _study(study: Study) -> Markup:
    """Its figure, tables, pictures and settings."""
    figures = [(file.name, file) for file in study.pictures]
    tables = [_folded(name, rows[0], rows[1:]) for name, rows in study.tables.items() if rows]
    settings = tag('dl', [(tag('dt', key), tag('dd', value))
                          for key, value in _flat(study.settings).items()])
    return join(_section('Result', _pictures(figures)), _section('Tables', tables),
                _section('Settings of the study', settings))
