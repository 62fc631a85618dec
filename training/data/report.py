"""What is in a data set: counts, numbers and a picture of it."""

import numpy as np

from dnnlib import progress
from dnnlib.util import printable
from training.data.dataset import Dataset


def summarize(dataset: Dataset, limit: int = 10000) -> dict:
    """Counts, classes, and mean and std of each channel (pixels in 0..255), as plain values.

    Numbers are taken over all images, or over `limit` evenly spaced ones of a larger data set.
    `nonfinite` counts measured images with values that are not finite, which the numbers leave
    out; `nonfinite_files` are the first of them.
    """
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), limit)).astype(np.int64)
    moments = np.zeros((3, dataset.num_channels))  # number, sum and sum of squares of the values
    nonfinite = []
    for part in progress.bar(np.array_split(indices, -(-len(indices) // 256))):
        images = dataset.images(part).astype(np.float64)
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        nonfinite += part[~finite].tolist()
        images = images[finite]
        moments += [(images**power).sum(axis=(0, 2, 3)) for power in range(3)]
    mean, square = moments[1:] / np.maximum(moments[0], 1)
    counts = dataset.class_counts.tolist() if dataset.has_labels else []
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return dataset.description() | {
        'dtype': str(dataset.dtype), 'counts': counts, 'measured': len(indices),
        'nonfinite': len(nonfinite), 'nonfinite_files': list(map(dataset.where, nonfinite[:10])),
        'mean': mean.tolist(), 'std': std.tolist()}


def contact_sheet(dataset: Dataset, columns: int = 10, rows: int = 10):
    """Images uint8 [n,C,H,W] row by row, the number of columns, and a name for each row (or None).

    With labels, a row shows the first images of one class (up to `rows` evenly spaced classes);
    else images are evenly spaced. Where a row is short of images, they are white. Latents show
    their first three mean channels.
    """
    if dataset.has_labels:
        ids = dataset.label_ids
        classes = _evenly(np.unique(ids), rows)
        picks = [np.flatnonzero(ids == label)[:columns] for label in classes]
        names = [class_name(dataset, label) for label in classes.tolist()]
    else:
        shown = _evenly(np.arange(len(dataset)), rows * columns)
        picks = [shown[i:i + columns] for i in range(0, len(shown), columns)]
        names = None
    columns = max(map(len, picks))
    channels, *size = dataset.image_shape
    shown = channels if dataset.dtype == np.uint8 else 3
    sheet = np.full((len(picks), columns, shown, *size), 255, dtype=np.uint8)
    for row, indices in zip(sheet, picks, strict=True):
        images = dataset.images(indices)[:, :shown]
        if images.dtype != np.uint8:
            images = np.nan_to_num(images, posinf=0, neginf=0)
            mean = images.mean(axis=(0, 2, 3), keepdims=True)
            std = np.maximum(images.std(axis=(0, 2, 3), keepdims=True), 1e-6)
            images = np.clip(128 + 64 * (images - mean) / std, 0, 255)
        row[:len(indices)] = images
    return sheet.reshape(-1, shown, *size), columns, names


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]


def class_table(counts, classes=None, names=None) -> list[str]:
    """Lines of a table: each label with its images, the original index and the name."""
    lines = ['   label    images   class  name']
    for label, count in enumerate(counts):
        number = classes[label] if classes else label
        name = printable(names[label]) if names else ''
        lines.append(f'{label:8d}  {count:8d}  {number:>6}  {name}'.rstrip())
    return lines


def class_name(dataset: Dataset, label: int) -> str:
    """Original number and name of a class, e.g. '171 Italian greyhound'."""
    number = str(dataset.classes[label] if dataset.classes else label)
    name = dataset.class_names[label] if dataset.class_names else number
    return name if name == number else f'{number} {name}'
