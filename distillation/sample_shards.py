"""Samples of many processes that appear as one `.npz` in guided diffusion's layout, and can be
resumed.
"""

import contextlib
import json
import os
import shutil
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.npz import npy_header
from dnnlib.util import atomic_path, require_same, write_json


class SampleShards:
    """`count` images, made in pieces of `piece`: files in the folder `DEST.parts` until all are
    there.

    dest      the .npz: `arr_0` uint8 [count,H,W,C], with classes also `arr_1` int64 [count]
    settings  what the samples depend on (plain values); they lie beside the .npz as .json

    Files appear only when complete. Any process may write any piece.
    """

    def __init__(self, dest: str, count: int, piece: int, settings: dict):
        self.dest = os.path.abspath(dest)
        self.count = count
        self.piece = piece
        self.settings = json.loads(json.dumps(settings | {'num_samples': count}))
        self.parts = self.dest + '.parts'
        self.description = os.path.splitext(self.dest)[0] + '.json'

    def open(self) -> bool:
        """Prepares the folder, on one process. False if the samples are complete.

        Raises UserError if other samples are in the way, finished or not.
        """
        if os.path.exists(self.dest):
            self._require_same(self.dest, self.description, self.settings)
            shutil.rmtree(self.parts, ignore_errors=True)
            return False
        path = os.path.join(self.parts, 'settings.json')
        settings = self.settings | {'piece': self.piece}
        if not os.path.isdir(self.parts):
            write_json(path, settings)
        self._require_same(self.parts, path, settings)
        for name in os.listdir(self.parts):
            if name.startswith('.'):                           # halves left behind by a kill -9
                os.remove(os.path.join(self.parts, name))
        return True

    @staticmethod
    def _require_same(what: str, path: str, settings: dict):
        advice = 'remove it, or choose another --dest'
        try:
            with open(path) as file:
                recorded = json.load(file)
        except (OSError, ValueError):
            raise UserError(f'{what} exists, and nothing says how it was made; {advice}') from None
        require_same(what, recorded, settings, advice)

    def _path(self, name: str, start: int) -> str:
        return os.path.join(self.parts, f'{name}-{start:09d}.npy')

    def missing(self) -> list[tuple[int, int]]:
        """(first, end) of the pieces that are to be made."""
        starts = range(0, self.count, self.piece)
        return [(start, min(start + self.piece, self.count)) for start in starts
                if not os.path.exists(self._path('arr_0', start))]

    def save(self, start: int, images: np.ndarray, labels=None):
        """A piece: images uint8 [n,H,W,C], and classes [n]."""
        arrays = {'arr_0': images}
        if labels is not None:
            # The images last: `missing` asks for them.
            arrays = {'arr_1': np.asarray(labels, np.int64), 'arr_0': images}
        for name, array in arrays.items():
            with atomic_path(self._path(name, start)) as temp, open(temp, 'wb') as file:
                np.save(file, array)

    def finish(self):
        """Writes the .npz from all pieces, one at a time, and removes them. On one process."""
        write_json(self.description, self.settings)
        with atomic_path(self.dest) as temp, zipfile.ZipFile(temp, 'w') as z:
            for name in ('arr_0', 'arr_1'):
                if os.path.exists(self._path(name, 0)):
                    with z.open(f'{name}.npy', 'w', force_zip64=True) as file:
                        self._join(name, file)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.parts)

    def _join(self, name: str, file):
        for start in range(0, self.count, self.piece):
            array = np.load(self._path(name, start))
            if start == 0:
                file.write(npy_header((self.count, *array.shape[1:]), array.dtype.str))
            file.write(array.tobytes())
