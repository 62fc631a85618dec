"""Samples of many processes that appear as one `.npz` in guided diffusion's layout, and can be resumed."""

import contextlib
import json
import os
import shutil
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.util import atomic_path, write_json


class SampleShards:
    """`count` images, made in pieces of `piece`; each is a file in the folder `DEST.parts` until all are there.

    dest      the .npz: `arr_0` uint8 [count,H,W,C], with classes also `arr_1` int64 [count]
    settings  what the samples depend on (plain values); they lie beside the .npz as .json

    Files appear only when complete. Any process may write any piece.
    """

    def __init__(self, dest: str, count: int, piece: int, settings: dict):
        self.dest, self.count, self.piece = os.path.abspath(dest), count, piece
        self.settings = json.loads(json.dumps(settings | {'num_samples': count}))
        self.parts = self.dest + '.parts'

    @property
    def _description(self) -> str:
        return os.path.splitext(self.dest)[0] + '.json'

    def open(self) -> bool:
        """Prepares the folder, on one process. False if the samples are complete.

        Raises UserError if other samples are in the way, finished or not.
        """
        if os.path.exists(self.dest):
            self._compare(self._description, self.dest)
            shutil.rmtree(self.parts, ignore_errors=True)
            return False
        mine = os.path.join(self.parts, 'settings.json')
        if os.path.isdir(self.parts):
            self._compare(mine, self.parts, {'piece': self.piece})
            for name in os.listdir(self.parts):
                if name.startswith('.'):                       # halves left behind by a kill -9
                    os.remove(os.path.join(self.parts, name))
        else:
            write_json(mine, self.settings | {'piece': self.piece})
        return True

    def _compare(self, path, what, more=None):
        try:
            with open(path) as file:
                found = json.load(file)
        except (OSError, ValueError):
            raise UserError(f'{what} exists, and nothing says how it was made; remove it, or choose another --dest') from None
        for key, value in (self.settings | (more or {})).items():
            if found.get(key) != value:
                raise UserError(f'{what} was made with another {key} ({found.get(key)} instead of {value}); remove it, or '
                                'choose another --dest')

    def _path(self, name: str, start: int) -> str:
        return os.path.join(self.parts, f'{name}-{start:09d}.npy')

    def _ranges(self):
        return [(start, min(start + self.piece, self.count)) for start in range(0, self.count, self.piece)]

    def missing(self) -> list[tuple[int, int]]:
        """(first, end) of the pieces that are to be made."""
        return [(start, end) for start, end in self._ranges() if not os.path.exists(self._path('arr_0', start))]

    def save(self, start: int, images: np.ndarray, labels=None):
        """A piece: images uint8 [n,H,W,C], and classes [n]."""
        pieces = {'arr_0': images} if labels is None else {'arr_1': np.asarray(labels, np.int64), 'arr_0': images}
        for name, array in pieces.items():                     # the images last: `missing` asks for them
            with atomic_path(self._path(name, start)) as temp, open(temp, 'wb') as file:
                np.save(file, array)

    def finish(self):
        """Writes the .npz from all pieces, one at a time, and removes them. On one process."""
        first = np.load(self._path('arr_0', 0), mmap_mode='r')
        arrays = {'arr_0': (first.dtype, first.shape[1:])}
        if os.path.exists(self._path('arr_1', 0)):
            arrays['arr_1'] = (np.dtype(np.int64), ())
        write_json(self._description, self.settings)
        with atomic_path(self.dest) as temp, zipfile.ZipFile(temp, 'w', zipfile.ZIP_STORED) as z:
            for name, (dtype, shape) in arrays.items():
                with z.open(f'{name}.npy', 'w', force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, {
                        'descr': np.lib.format.dtype_to_descr(dtype), 'fortran_order': False, 'shape': (self.count, *shape)})
                    for start, _ in self._ranges():
                        file.write(np.load(self._path(name, start)).tobytes())
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.parts)
