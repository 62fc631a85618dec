"""The order of the training images: endless streams of indices that depend on a seed alone.

Position g of a stream is the g-th image that training sees, counted over all processes. A process that trains on
part of a batch asks for its own positions, so the order never depends on the number of processes.
"""

import numpy as np
import torch

from torch_utils.random import tuple_seed


class EpochShuffle:
    """EDM2's order: every epoch is a fresh shuffle of 0..n-1, seeded by (seed, epoch).

    Position g is entry `g mod n` of epoch `g div n`. Nothing needs to be stored to go on from any position.
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True):
        if n < 1:
            raise ValueError('an order of no images')
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._epochs = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            order = np.arange(self.n, dtype=np.int64)
            if self.shuffle:
                np.random.RandomState(tuple_seed(self.seed, epoch)).shuffle(order)
            if len(self._epochs) > 1:  # a batch seldom touches more than two epochs
                self._epochs.clear()
            self._epochs[epoch] = order
        return self._epochs[epoch]

    def indices(self, positions) -> np.ndarray:
        """Image indices (int64, shape of `positions`) at the given positions (int64 >= 0, any order)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, entries = np.divmod(positions, self.n)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            out[mask] = self._order(int(epoch))[entries[mask]]
        return out


class WindowShuffle:
    """EDM's order: one shuffle of 0..n-1, in which each visited entry is then swapped with one of the last n*window.

    With `window=0` the first shuffle repeats for ever. The order after position g depends on all draws before it, so
    the stream is sequential and `state_dict()` holds where it is.
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True, window: float = 0.5):
        if n < 1:
            raise ValueError('an order of no images')
        if not 0 <= window <= 1:
            raise ValueError(f'window {window} is not between 0 and 1')
        self.n, self.position = n, 0
        self.order = np.arange(n, dtype=np.int64)
        self._random = np.random.RandomState(seed)
        self._window = 0
        if shuffle:
            self._random.shuffle(self.order)
            self._window = int(np.rint(n * window))

    def next(self, count: int) -> np.ndarray:
        """Indices (int64 [count]) at the next `count` positions; rank r of R uses entries r, r+R, ..."""
        places = (self.position + np.arange(count, dtype=np.int64)) % self.n
        self.position += count
        if self._window < 2:
            return self.order[places]
        partners = (places - self._random.randint(self._window, size=count)) % self.n
        order = self.order
        out = np.empty(count, dtype=np.int64)
        for k, (i, j) in enumerate(zip(places.tolist(), partners.tolist(), strict=True)):
            out[k] = order[i]
            order[i], order[j] = order[j], order[i]
        return out

    def state_dict(self) -> dict:
        """Where the stream is, as plain numbers and tensors."""
        _, key, place, _, _ = self._random.get_state()
        return {
            'position': self.position, 'order': torch.from_numpy(self.order.copy()),
            'random_key': torch.from_numpy(key.astype(np.int64)), 'random_place': int(place)}

    def load_state_dict(self, state: dict):
        if len(state['order']) != self.n:
            raise ValueError(f'the stored order has {len(state["order"])} images instead of {self.n}')
        self.position = int(state['position'])
        self.order = state['order'].cpu().numpy().copy()
        key = state['random_key'].cpu().numpy().astype(np.uint32)
        self._random.set_state(('MT19937', key, int(state['random_place'])))
