"""Pictures of a run: grids of samples with their labels, loss curves."""

import json
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dnnlib.util import atomic_path


def save_png(image: PIL.Image.Image, path: str):
    """Writes a PNG that appears only when complete."""
    with atomic_path(path) as temp:
        image.save(temp, format='png')


def image_grid(images, columns: int | None = None, row_labels=None, min_side: int = 32) -> PIL.Image.Image:
    """Images uint8 [N,C,H,W] (C = 1 or 3) as one picture, row by row, each row with a label at its left if given.

    Small images are enlarged by a whole factor so that their shorter side has at least `min_side` pixels.
    """
    images = np.asarray(images)
    N, C, H, W = images.shape
    if C == 1:
        images = images.repeat(3, axis=1)
    columns = columns or math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    zoom = max(1, math.ceil(min_side / min(H, W)))
    gap, H, W = max(1, zoom // 2), H * zoom, W * zoom
    font = PIL.ImageFont.load_default(size=max(10, min(16, H // 2)))
    left = 0
    if row_labels is not None:
        left = math.ceil(max(font.getlength(str(label)) for label in row_labels)) + 8
    picture = PIL.Image.new('RGB', (left + columns * (W + gap) + gap, rows * (H + gap) + gap), 'white')
    draw = PIL.ImageDraw.Draw(picture)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = PIL.Image.fromarray(image.transpose(1, 2, 0)).resize((W, H), PIL.Image.Resampling.NEAREST)
        picture.paste(tile, (left + gap + column * (W + gap), gap + row * (H + gap)))
    for row, label in enumerate(row_labels or []):
        draw.text((left - 6, gap + row * (H + gap) + H // 2), str(label), fill='black', font=font, anchor='rm')
    return picture


def save_image_grid(path: str, images, columns: int | None = None, row_labels=None):
    """`image_grid` to a PNG file."""
    save_png(image_grid(images, columns, row_labels), path)


def figure(size=(6, 4), shape=(1, 1)):
    """A matplotlib figure that needs no display, and its axes (an array of them for a `shape` of rows and columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=size, layout='constrained')
    FigureCanvasAgg(fig)
    return fig, fig.subplots(*shape)


def save_loss_curve(stats_path: str, path: str):
    """The loss terms of a `stats.jsonl` against thousands of images, as a PNG."""
    with open(stats_path) as f:
        rows = [json.loads(line) for line in f]
    names = sorted({name for row in rows for name in row if name.startswith('Loss/')})
    fig, axes = figure()
    for name in names:
        points = [(row['nimg'] / 1000, row[name]['mean']) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name.removeprefix('Loss/'), marker='.' if len(points) < 20 else None)
    axes.set(xlabel='thousands of training images', ylabel='loss (mean over elements)')
    axes.grid(alpha=0.3)
    if names:
        axes.legend()
    with atomic_path(path) as temp:
        fig.savefig(temp, format='png', dpi=120)
