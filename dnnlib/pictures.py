"""Pictures of a run: grids of samples with their labels, loss curves."""

import collections
import math
import textwrap

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin

from dnnlib import budget
from dnnlib.image_io import as_rgb
from dnnlib.util import MARK, atomic_path

SHARES = ('accuracy',)  # terms of a loss that are none
# What figures say of themselves, by format.
METADATA = {'png': {'Software': MARK}, 'svg': {'Date': None, 'Creator': MARK}}


def save_png(image: PIL.Image.Image, path: str):
    """Writes a PNG that appears only when complete, and says what wrote it."""
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text('Software', MARK)
    with atomic_path(path) as temp:
        image.save(temp, format='png', pnginfo=info)


def load_png(path: str) -> np.ndarray:
    """Pixels uint8 [H,W,3] of a picture of ours, of any size."""
    with PIL.Image.open(path, formats=['PNG']) as image:
        return np.asarray(image.convert('RGB'))


LONGEST_LABEL = 32  # letters of a class name
TITLE_SIZE, TITLE_HEIGHT = 13, 18  # pixels of letters, and of a line
CAPTION_SIZE, CAPTION_HEIGHT = 10, 14
MARK_COLOR = '#D55E00'


def with_classes(title: str, shown: int, count: int) -> str:
    """The title, and how many of the classes a picture shows and leaves out."""
    text = f'{shown:,} of {count:,} classes'
    if count > shown:
        text += f' ({count - shown:,} left out)'
    return f'{title}: {text}' if title else text


def image_grid(images, columns: int | None = None, row_labels=None, min_side: int = 48,
               title: str = '', captions=(), marked=()) -> PIL.Image.Image:
    """Images uint8 [N,C,H,W] as one picture (gray ones with three channels, what is transparent on
    white), row by row, with labels at their left and a title above them; with `captions` [N] below
    them, and frames around those at the places `marked`.

    Small images are enlarged by a whole factor so that their shorter side has `min_side` pixels.
    """
    images = as_rgb(np.asarray(images))
    count, _, height, width = images.shape
    zoom = max(1, math.ceil(min_side / min(height, width)))
    gap = max(1, zoom // 2, 4 * bool(len(marked)))
    height *= zoom
    width *= zoom
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    labels = [textwrap.shorten(str(label), LONGEST_LABEL, placeholder='...')
              for label in row_labels or []]
    font = PIL.ImageFont.load_default(size=max(10, min(16, height // 2)))
    left = math.ceil(max(map(font.getlength, labels))) + 8 if labels else 0
    across = left + columns * (width + gap) + gap
    title_font = PIL.ImageFont.load_default(size=TITLE_SIZE)
    longest = max(map(title_font.getlength, title.split()), default=0)
    across = max(across, math.ceil(longest) + 8)
    lines = _wrapped(title, title_font, across - 8)
    top = TITLE_HEIGHT * len(lines) + 4 * bool(lines)
    down = height + gap + CAPTION_HEIGHT * bool(captions)
    picture = PIL.Image.new('RGB', (across, top + rows * down + gap), 'white')
    draw = PIL.ImageDraw.Draw(picture)
    small = PIL.ImageFont.load_default(size=CAPTION_SIZE)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = PIL.Image.fromarray(image.transpose(1, 2, 0))
        tile = tile.resize((width, height), PIL.Image.Resampling.NEAREST)
        x, y = left + gap + column * (width + gap), top + gap + row * down
        if index in marked:
            frame = gap - 1
            draw.rectangle((x - frame, y - frame, x + width + frame - 1, y + height + frame - 1),
                           fill=MARK_COLOR)
        picture.paste(tile, (x, y))
        if captions:
            draw.text((x + width // 2, y + height + 2), captions[index], fill='black', font=small,
                      anchor='ma')
    for row, line in enumerate(lines):
        draw.text((4, 2 + TITLE_HEIGHT * row), line, fill='black', font=title_font)
    for row, label in enumerate(labels):
        middle = top + gap + row * down + height // 2
        draw.text((left - 6, middle), label, fill='black', font=font, anchor='rm')
    return picture


def _wrapped(text: str, font, width: float) -> list[str]:
    """Lines of words that are at most so wide, where a word is."""
    lines = []
    for word in text.split():
        longer = f'{lines[-1]} {word}' if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_image_grid(path: str, images, columns: int | None = None, row_labels=None,
                    title: str = '', **marks):
    """`image_grid` to a PNG file."""
    save_png(image_grid(images, columns, row_labels, title=title, **marks), path)


def figure(columns: int = 1):
    """A matplotlib figure that needs no display, and its axes from left to right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6 * columns, 4), layout='constrained')
    FigureCanvasAgg(fig)
    return fig, fig.subplots(1, columns, squeeze=False)[0]


def save_figure(fig, path: str, format: str = 'png', dpi=120):  # noqa: A002
    """Writes a figure as a PNG or SVG that appears only when complete, and says what wrote it."""
    with atomic_path(path) as temp:
        fig.savefig(temp, format=format, dpi=dpi, metadata=METADATA[format])


def draw_curves(axes, curves: dict, ylabel: str, **settings):
    """Draws {label or None: [(thousands of training images, value)]}; `settings` are those of
    the axes."""
    for label, points in sorted(curves.items(), key=lambda curve: curve[0] or ''):
        marker = '.' if len(points) < 20 else None
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel='thousands of training images', ylabel=ylabel, **settings)
    axes.grid(alpha=0.3)
    if any(curves):
        axes.legend()


def save_curves(path: str, curves: dict, ylabel: str, **settings):
    """A PNG of `draw_curves`."""
    fig, (axes,) = figure()
    draw_curves(axes, curves, ylabel, **settings)
    save_figure(fig, path)


def save_loss_curve(stats_path: str, path: str):
    """The loss terms of a `stats.jsonl` against thousands of images, as a PNG; what is no loss,
    such as the accuracy of a classifier, has an axis of its own."""
    curves = collections.defaultdict(list)
    for _, row in budget.json_lines(stats_path):
        for name in row:
            if name.startswith('Loss/') and 'nimg' in row:
                mean = row[name]['mean']
                point = (row['nimg'] / 1000, math.nan if mean is None else mean)
                curves[name.removeprefix('Loss/')].append(point)
    shares = {name: curves.pop(name) for name in SHARES if name in curves}
    fig, axes = figure(2 if shares else 1)
    draw_curves(axes[0], curves, 'training loss (mean since the last report)')
    for name, points in shares.items():
        draw_curves(axes[1], {None: points}, f'{name} on training images', ylim=(-0.03, 1.03))
    save_figure(fig, path)
