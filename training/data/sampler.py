"""The order of the training images: endless streams of indices that depend on a seed alone.

Position g of a stream is the g-th image that training sees, counted over all processes. A process
that trains on part of a batch asks for its own positions, so the order never depends on the
number of processes.
"""

import functools

import numpy as np

from torch_utils.random import tuple_seed


class _Order:
    """An endless stream of the indices 0..n-1."""

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True):
        if n < 1:
            raise ValueError('an order of no images')
        self.n = n
        self.seed = seed
        self.shuffle = shuffle


class EpochShuffle(_Order):
    """EDM2's order: every epoch is a fresh shuffle of 0..n-1, seeded by (seed, epoch).

    Position g is entry `g mod n` of epoch `g div n`. Nothing needs to be stored to go on from any
    position.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A batch seldom touches more than two epochs.
        self._order = functools.lru_cache(2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        order = np.arange(self.n, dtype=np.int64)
        if self.shuffle:
            np.random.RandomState(tuple_seed(self.seed, epoch)).shuffle(order)
        return order

    def indices(self, positions) -> np.ndarray:
        """Image indices (int64, shape of `positions`) at the positions (int64 >= 0, any order)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, entries = np.divmod(positions, self.n)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            out[mask] = self._order(int(epoch))[entries[mask]]
        return out


class WindowShuffle(_Order):
    """EDM's order: one shuffle of 0..n-1, in which each visited entry is then swapped with one of
    the last n*window.

    With `window=0` the first shuffle repeats for ever. Otherwise the order after a position
    depends on all draws before it: going forward, from one call to the next or from the start in
    a resumed run, takes some tenths of a microsecond for each image.
    """

    CHUNK = 1 << 16  # positions that are passed over at a time

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True, window: float = 0.5):
        super().__init__(n, seed, shuffle)
        if not 0 <= window <= 1:
            raise ValueError(f'window {window} is not between 0 and 1')
        self._window = int(np.rint(n * window)) if shuffle else 0
        self._restart()

    def _restart(self):
        order = np.arange(self.n, dtype=np.int64)
        self._random = np.random.RandomState(self.seed)
        if self.shuffle:
            self._random.shuffle(order)
        # Swapping single entries is several times faster in a list than in an array.
        self._order = order if self._window < 2 else order.tolist()
        self._position = 0

    def indices(self, positions) -> np.ndarray:
        """Image indices (int64, shape of `positions`) at the positions (int64 >= 0, any order)."""
        positions = np.asarray(positions, dtype=np.int64)
        if self._window < 2:
            return self._order[positions % self.n]
        start, end = int(positions.min()), int(positions.max()) + 1
        if start < self._position:
            self._restart()
        while self._position < start:
            self._next(min(start - self._position, self.CHUNK))
        return self._next(end - start)[positions - start]

    def _next(self, count: int) -> np.ndarray:
        """Indices at the next `count` positions, with the swaps that they make."""
        places = (self._position + np.arange(count)) % self.n
        partners = (places - self._random.randint(self._window, size=count)) % self.n
        order, out = self._order, []
        for i, j in zip(places.tolist(), partners.tolist(), strict=True):
            out.append(order[i])
            order[i], order[j] = order[j], order[i]
        self._position += count
        return np.array(out, dtype=np.int64)
