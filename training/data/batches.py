"""Batches for training from a data set: they depend on the seed and the image count alone."""

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib import progress
from dnnlib.util import map_ahead
from torch_utils import distributed as dist
from torch_utils.random import BlockRandomGenerator, GlobalRandom, tuple_seed
from training.data.sampler import EpochShuffle

RESIDENT_BYTES = 2 << 30  # a data set up to this size is kept on the GPU


class DatasetBatches:
    """Endless shuffled batches of a data set, encoded for the network.

    Image number g of the run (counted from 0) is always the same image with the same random
    numbers, whichever process asks for it and however the run is cut into batches.

    order: has `indices(positions)` (see training.data.sampler; default: EDM2's). workers: threads
    that read ahead. resident: keep a data set that is small enough on the GPU. mirror: half of the
    images are mirrored, drawn anew each time that one is seen.
    """

    def __init__(self, dataset, encoder, device, seed=0, order=None, workers=2, prefetch=4,
                 resident=True, mirror=False):
        self.dataset = dataset
        self.encoder = encoder
        self.device = torch.device(device)
        self.seed = seed
        self.order = order or EpochShuffle(len(dataset), seed)
        self.workers = workers
        self.prefetch = prefetch
        self.mirror = mirror
        self._resident = None
        small = len(dataset) * int(np.prod(dataset.image_shape)) <= RESIDENT_BYTES
        if resident and small and not dataset.is_random and self.device.type == 'cuda':
            images = np.empty([len(dataset), *dataset.image_shape], dataset.dtype)
            parts = np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024))
            for part in progress.bar(parts, dist.get_rank() == 0, desc='Reading the images',
                                     leave=False):
                images[part] = dataset.images(part)
            self._resident = torch.from_numpy(images).to(self.device)

    def iterate(self, plan: Iterable[tuple[int, int]]) -> Iterator[dict]:
        """For each `(start, count)` of the plan, images `start .. start + count - 1` of the run.

        Keys: `images` [N,C,H,W] float32, encoded; `labels` float32 [N, label_dim]; `random`;
        `start`. Files are read ahead in threads; transfers to the GPU do not wait.
        """
        items = ((start, self.order.indices(np.arange(start, start + count)))
                 for start, count in plan)
        with ThreadPoolExecutor(self.workers, thread_name_prefix='dataset') as pool:
            for start, *loaded in map_ahead(pool, self._load, items, self.prefetch):
                images, labels = (x.to(self.device, non_blocking=True) for x in loaded)
                if self._resident is not None:
                    images = self._resident[images]
                seed = tuple_seed(self.seed, 0)
                random = BlockRandomGenerator(self.device, seed, start, len(images))
                if self.mirror:
                    chosen = random.rand([len(images), 1, 1, 1]) < 0.5
                    images = torch.where(chosen, images.flip(3), images)
                images = self.encoder.encode_latents(images, random)
                yield {'images': images, 'labels': labels, 'random': random, 'start': start}

    frozen = ()  # networks that make the batches

    def example(self, count: int, device) -> dict:
        """A batch of zeros, for what depends on shapes alone."""
        shape = self.encoder.latent_shape(self.dataset.image_shape)
        return {'images': torch.zeros(count, *shape, device=device),
                'labels': torch.zeros(count, self.dataset.label_dim, device=device),
                'random': GlobalRandom(device), 'start': 0}

    def files(self, positions) -> list[str]:
        """Names of the images at positions of the run."""
        order = copy.deepcopy(self.order)                     # one that goes forward is not moved
        return [self.dataset.where(index) for index in order.indices(positions)]

    def _load(self, item):
        """(start, images or where they are on the GPU, labels)"""
        start, indices = item
        images = indices
        if self._resident is None:
            images = self.dataset.training_images(indices, start, self.seed)
        tensors = map(torch.from_numpy, (images, self.dataset.labels(indices)))
        if self.device.type == 'cuda':
            tensors = (x.pin_memory() for x in tensors)
        return start, *tensors

    def state_dict(self) -> dict:
        """Nothing: the position in the data is the image count of the loop."""
        return {}

    def load_state_dict(self, state: dict):
        pass
