"""Pictures of a run: grids of samples with their labels, loss curves."""

import collections
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin

from dnnlib import budget
from dnnlib.util import MARK, atomic_path

# What figures say of themselves, by format.
METADATA = {'png': {'Software': MARK}, 'svg': {'Date': None, 'Creator': MARK}}


def save_png(image: PIL.Image.Image, path: str):
    """Writes a PNG that appears only when complete, and says what wrote it."""
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text('Software', MARK)
    with atomic_path(path) as temp:
        image.save(temp, format='png', pnginfo=info)


def image_grid(images, columns: int | None = None, row_labels=None,
               min_side: int = 32) -> PIL.Image.Image:
    """Images uint8 [N,C,H,W] (C = 1 or 3) as one picture, row by row, with labels at their left.

    Small images are enlarged by a whole factor so that their shorter side has `min_side` pixels.
    """
    images = np.asarray(images)
    count, channels, height, width = images.shape
    if channels == 1:
        images = images.repeat(3, axis=1)
    zoom = max(1, math.ceil(min_side / min(height, width)))
    gap = max(1, zoom // 2)
    height *= zoom
    width *= zoom
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    labels = [str(label) for label in row_labels or []]
    font = PIL.ImageFont.load_default(size=max(10, min(16, height // 2)))
    left = math.ceil(max(map(font.getlength, labels))) + 8 if labels else 0
    size = (left + columns * (width + gap) + gap, rows * (height + gap) + gap)
    picture = PIL.Image.new('RGB', size, 'white')
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = PIL.Image.fromarray(image.transpose(1, 2, 0))
        tile = tile.resize((width, height), PIL.Image.Resampling.NEAREST)
        picture.paste(tile, (left + gap + column * (width + gap), gap + row * (height + gap)))
    draw = PIL.ImageDraw.Draw(picture)
    for row, label in enumerate(labels):
        middle = gap + row * (height + gap) + height // 2
        draw.text((left - 6, middle), label, fill='black', font=font, anchor='rm')
    return picture


def save_image_grid(path: str, images, columns: int | None = None, row_labels=None):
    """`image_grid` to a PNG file."""
    save_png(image_grid(images, columns, row_labels), path)


def figure():
    """A matplotlib figure that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6, 4), layout='constrained')
    FigureCanvasAgg(fig)
    return fig, fig.subplots()


def save_figure(fig, path: str, format: str = 'png', dpi=120):  # noqa: A002
    """Writes a figure as a PNG or SVG that appears only when complete, and says what wrote it."""
    with atomic_path(path) as temp:
        fig.savefig(temp, format=format, dpi=dpi, metadata=METADATA[format])


def save_curves(path: str, curves: dict, ylabel: str, **settings):
    """A PNG of {label or None: [(thousands of training images, value)]}; `settings` are those of
    the axes."""
    fig, axes = figure()
    for label, points in sorted(curves.items(), key=lambda curve: curve[0] or ''):
        marker = '.' if len(points) < 20 else None
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(xlabel='thousands of training images', ylabel=ylabel, **settings)
    axes.grid(alpha=0.3)
    if any(curves):
        axes.legend()
    save_figure(fig, path)


def save_loss_curve(stats_path: str, path: str):
    """The loss terms of a `stats.jsonl` against thousands of images, as a PNG."""
    curves = collections.defaultdict(list)
    for _, row in budget.json_lines(stats_path):
        for name in row:
            if name.startswith('Loss/') and 'nimg' in row:
                mean = row[name]['mean']
                point = (row['nimg'] / 1000, math.nan if mean is None else mean)
                curves[name.removeprefix('Loss/')].append(point)
    save_curves(path, curves, 'loss (mean over elements)')
