"""Large .npz files, written piece by piece from many threads at the speed of the disk."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from synthetic_data.stored_zip import PIECE_BYTES, Bytes, Computed, npy_header, write_zip


@dataclasses.dataclass
class Column:
    """An array of an .npz that exists in pieces only.

    shape, dtype  of the whole
    pieces        numbers of rows (start, stop), in order
    read          `read(start, stop, out)` puts these rows into the array `out`; called from several threads, once a piece
    """

    shape: tuple
    dtype: np.dtype
    pieces: Sequence[tuple[int, int]]
    read: Callable

    def stored(self) -> list:
        """Header and rows as pieces of a zip (see `stored_zip`)."""
        dtype = np.dtype(self.dtype)
        row_bytes = dtype.itemsize * math.prod(self.shape[1:])

        def rows(start, stop):
            return Computed((stop - start) * row_bytes, lambda view: self.read(
                start, stop, np.frombuffer(view, dtype).reshape(stop - start, *self.shape[1:])))

        return [Bytes(npy_header(self.shape, dtype.str)), *(rows(*piece) for piece in self.pieces)]


def pieces(count: int, row_bytes: int, limit: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of so many rows, of at most `limit` bytes (default: PIECE_BYTES)."""
    step = max((limit or PIECE_BYTES) // row_bytes, 1)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def columns(image_shape: tuple, counts: Sequence[int], read) -> dict[str, Column]:
    """`image` uint8 [N,H,W,3] and `label` int64 [N] of an .npz, class by class.

    `counts` images of each class; `read(label, start, out)` puts images of a class, from `start` on, into `out`.
    """
    bounds = np.cumsum([0, *counts]).tolist()

    def class_of(rows):
        return np.searchsorted(bounds, rows, side='right') - 1

    def labels(start, stop, out):
        out[:] = class_of(np.arange(start, stop))

    def images(start, stop, out):
        label = int(class_of(start))
        read(label, start - bounds[label], out)

    of_classes = [(first + start, first + stop) for first, count in zip(bounds, counts, strict=False)
                  for start, stop in pieces(count, math.prod(image_shape))]
    return {'image': Column((bounds[-1], *image_shape), np.uint8, of_classes, images),
            'label': Column((bounds[-1],), np.int64, pieces(bounds[-1], 8), labels)}


def write_npz(dest: str, columns: dict[str, Column], workers: int | None = None):
    """Writes an uncompressed .npz of arrays that need not fit into memory; `dest` appears only when complete.

    Raises OSError if the disk is full.
    """
    write_zip(dest, {f'{name}.npy': column.stored() for name, column in columns.items()}, workers)
