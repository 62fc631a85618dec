"""What is in a data set: counts, numbers and a picture of it."""

import numpy as np
import tqdm

from training.data.dataset import ImageDataset


def summarize(dataset: ImageDataset, limit: int = 10000) -> dict:
    """Counts, classes, and mean and standard deviation of each channel (pixels in 0..255), as plain values.

    Numbers are taken over all images, or over `limit` evenly spaced ones of a larger data set. `nonfinite` counts
    measured images with values that are not finite.
    """
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), limit)).astype(np.int64)
    total, squares, bad, count = 0.0, 0.0, 0, 0
    for part in tqdm.tqdm(np.array_split(indices, -(-len(indices) // 256)), delay=2, disable=None):
        images = dataset.images(part).astype(np.float64)
        finite = np.isfinite(images).all(axis=(1, 2, 3))
        bad += int((~finite).sum())
        images = images[finite]
        total = total + images.sum(axis=(0, 2, 3))
        squares = squares + np.square(images).sum(axis=(0, 2, 3))
        count += len(images) * images.shape[2] * images.shape[3]
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    counts = np.bincount(dataset.label_ids, minlength=dataset.label_dim) if dataset.has_labels else []
    return dataset.description() | {
        'dtype': str(np.dtype(dataset.dtype)), 'counts': [int(n) for n in counts], 'measured': len(indices),
        'nonfinite': bad, 'mean': mean.tolist(), 'std': std.tolist()}


def contact_sheet(dataset: ImageDataset, columns: int = 10, rows: int = 10):
    """Images to look at, uint8 [n,3,H,W] row by row, the number of columns, and a name for each row (or None).

    With labels, a row shows the first images of one class (up to `rows` evenly spaced classes); else images are evenly
    spaced. Where a row is short of images, they are white. Latents show their first three mean channels.
    """
    ids = dataset.label_ids
    if dataset.has_labels:
        present = np.unique(ids)
        present = present[np.linspace(0, len(present) - 1, min(rows, len(present))).astype(int)]
        picks = [np.flatnonzero(ids == label)[:columns] for label in present]
        names = [class_name(dataset, int(label)) for label in present]
    else:
        shown = np.linspace(0, len(dataset) - 1, min(len(dataset), rows * columns)).astype(int)
        picks, names = [shown[i:i + columns] for i in range(0, len(shown), columns)], None
    side, columns = dataset.resolution, max(len(indices) for indices in picks)
    sheet = np.full((len(picks), columns, 3, side, side), 255, dtype=np.uint8)
    for row, indices in zip(sheet, picks, strict=True):
        images = dataset.images(indices)[:, :3]
        if images.dtype != np.uint8:
            images = np.nan_to_num(images, posinf=0, neginf=0)
            scale = np.maximum(images.std(axis=(0, 2, 3), keepdims=True), 1e-6)
            images = np.clip(128 + 64 * (images - images.mean(axis=(0, 2, 3), keepdims=True)) / scale, 0, 255)
        row[:len(indices)] = images
    return sheet.reshape(-1, 3, side, side), columns, names


def class_name(dataset: ImageDataset, label: int) -> str:
    """Original number and name of a class, e.g. '171 Italian greyhound'."""
    number = str(dataset.classes[label] if dataset.classes else label)
    name = dataset.class_names[label] if dataset.class_names else number
    return name if name == number else f'{number} {name}'
