"""Samples of many processes that appear as one `.npz` in guided diffusion's layout, and can be
resumed.
"""

import contextlib
import json
import os
import zipfile

import numpy as np

from dnnlib import UserError, budget
from dnnlib.npz import npy_header, open_array
from dnnlib.util import atomic_path, remove_leftovers, require_same, write_json
from training.data.images import save_npz_images


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
        self.settings = json.loads(json.dumps(settings | {'num_samples': count}))
        self.parts = self.dest + '.parts'
        self.paths = {}
        for start in range(0, count, size):
            end = min(start + size, count)
            self.paths[start, end] = os.path.join(self.parts, f'{start:09d}-{end:09d}.npz')

    def open(self) -> bool:
        """Describes the samples, on one process. False if they are complete.

        Raises UserError if other samples are in the way, finished or not.
        """
        description = os.path.splitext(self.dest)[0] + '.json'
        places = [path for path in (self.dest, *self.paths.values()) if os.path.exists(path)]
        recorded = {}
        with contextlib.suppress(OSError, TypeError, ValueError):
            recorded = dict(budget.read_json(description))
        if os.path.exists(description) and 'num_samples' not in recorded:
            raise UserError(f'{description} describes no samples, and would be replaced; choose '
                            'another name', 'dest', self.dest)
        if places:
            place = self.dest if places[0] == self.dest else self.parts
            require_same(place, recorded, self.settings, 'remove it, or choose another --dest')
            return place != self.dest
        write_json(description, self.settings)
        return True

    def missing(self) -> list[tuple[int, int]]:
        """(first, end) of the pieces that are to be made."""
        return [piece for piece, path in self.paths.items() if not os.path.exists(path)]

    def save(self, piece: tuple, images: np.ndarray, labels=None):
        """Images uint8 [n,C,H,W] of a piece, and classes [n]."""
        save_npz_images(self.paths[piece], images, labels)

    def finish(self):
        """Writes the .npz from all pieces, one at a time, and removes them. On one process."""
        paths = list(self.paths.values())
        with np.load(paths[0]) as first:
            names = first.files
        with atomic_path(self.dest) as temp, zipfile.ZipFile(temp, 'w') as z:
            for name in names:
                arrays = [open_array(path, name) for path in paths]
                shape = (self.count, *arrays[0].shape[1:])
                with z.open(f'{name}.npy', 'w', force_zip64=True) as file:
                    file.write(npy_header(shape, arrays[0].dtype.str))
                    for array in arrays:
                        file.write(array.tobytes())
        for path in paths:
            os.remove(path)
        remove_leftovers(self.parts)
        with contextlib.suppress(OSError):                     # other files stay
            os.rmdir(self.parts)
