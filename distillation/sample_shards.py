"""Samples of many processes that appear as one `.npz` in guided diffusion's layout, and can be
resumed.
"""

import json
import os
import shutil
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.npz import npy_header
from dnnlib.util import atomic_path, require_same, write_json


class SampleShards:
    """`count` images, made in pieces of `size`: files in the folder `DEST.parts` until all are
    there.

    dest      the .npz: `arr_0` uint8 [count,H,W,C], with classes also `arr_1` int64 [count]
    settings  what the samples depend on (plain values); they lie beside the .npz as .json

    Files appear only when complete. Any process may write any piece.
    """

    def __init__(self, dest: str, count: int, size: int, settings: dict):
        self.dest = os.path.abspath(dest)
        self.count = count
        self.settings = settings | {'num_samples': count}
        self.parts = self.dest + '.parts'
        self.pieces = [(start, min(start + size, count)) for start in range(0, count, size)]

    def open(self) -> bool:
        """Describes the samples, on one process. False if they are complete.

        Raises UserError if other samples are in the way, finished or not.
        """
        advice = 'remove it, or choose another --dest'
        description = os.path.splitext(self.dest)[0] + '.json'
        places = [path for path in (self.dest, self.parts) if os.path.exists(path)]
        if not places:
            write_json(description, self.settings)
            os.makedirs(self.parts)
        else:
            try:
                with open(description) as file:
                    recorded = json.load(file)
            except (OSError, ValueError):
                raise UserError(f'{places[0]} exists, and nothing says how it was made; '
                                f'{advice}') from None
            require_same(places[0], recorded, json.loads(json.dumps(self.settings)), advice)
        return self.dest not in places

    def _path(self, start: int, end: int) -> str:
        return os.path.join(self.parts, f'{start:09d}-{end:09d}.npz')

    def missing(self) -> list[tuple[int, int]]:
        """(first, end) of the pieces that are to be made."""
        return [piece for piece in self.pieces if not os.path.exists(self._path(*piece))]

    def save(self, start: int, images: np.ndarray, labels=None):
        """A piece: images uint8 [n,H,W,C], and classes [n]."""
        arrays = {'arr_0': images}
        if labels is not None:
            arrays['arr_1'] = np.asarray(labels, np.int64)
        path = self._path(start, start + len(images))
        with atomic_path(path) as temp, open(temp, 'wb') as file:
            np.savez(file, **arrays)

    def finish(self):
        """Writes the .npz from all pieces, one at a time, and removes them. On one process."""
        paths = [self._path(*piece) for piece in self.pieces]
        with np.load(paths[0]) as first:
            shapes = {name: (array.shape[1:], array.dtype.str) for name, array in first.items()}
        with atomic_path(self.dest) as temp, zipfile.ZipFile(temp, 'w') as z:
            for name, (shape, dtype) in shapes.items():
                with z.open(f'{name}.npy', 'w', force_zip64=True) as file:
                    file.write(npy_header((self.count, *shape), dtype))
                    for path in paths:
                        with np.load(path) as piece:
                            file.write(piece[name].tobytes())
        shutil.rmtree(self.parts, ignore_errors=True)
