"""Steps of the real training loop under observation: does the host wait for the device, or the loop for its data?"""

import tempfile
import time
import warnings

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from dnnlib.image_io import encode_png
from training.data.archive import ArchiveWriter, image_name
from training.data.batches import DatasetBatches
from training.data.dataset import ImageDataset
from training.diffusion.losses import EDM2Loss
from training.encoders import make_encoder
from training.loop import Trainer
from training.recipe import Recipe

# What a host that waits for its device, or copies a number from it, shows in a profile.
WAITS = ('cudaDeviceSynchronize', 'cudaStreamSynchronize', 'cudaEventSynchronize', 'aten::_local_scalar_dense', 'aten::item')


class _Timed:
    """An iterator that adds up the time for which its user waits."""

    def __init__(self, steps):
        self.steps, self.seconds = steps, 0.0

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.steps)
        finally:
            self.seconds += time.perf_counter() - start


class _Images:
    """The images and labels of an archive with as many channels and classes as the network wants."""

    is_random = False

    def __init__(self, dataset, channels, label_dim):
        self.dataset, self.channels, self.label_dim = dataset, channels, label_dim
        self.image_shape = (channels, dataset.resolution, dataset.resolution)

    def __len__(self):
        return len(self.dataset)

    def images(self, indices):
        return self.dataset.images(indices)[:, np.arange(self.channels) % 3]

    def training_images(self, indices, start, seed):
        return self.images(indices)

    def labels(self, indices):
        return np.eye(self.label_dim, dtype=np.float32)[np.asarray(indices) % self.label_dim]


def profile_loop(net, batch: int, steps: int) -> dict:
    """Runs `steps` steps of the Trainer after two others; counts of waits by name (under the profiler), of synchronisations
    that torch itself notices (CUDA alone), and the share of the time for which the loop waited for its data."""
    device = next(net.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        count, side = max(4 * batch, 64), net.img_resolution
        with ArchiveWriter(f'{folder}/images.zip') as out:
            images = np.random.RandomState(0).randint(0, 256, (count, side, side, 3), dtype=np.uint8)
            for i, image in enumerate(images):
                out.add(image_name(i), encode_png(image))
            out.add_description({'labels': None})
        data = _Images(ImageDataset(f'{folder}/images.zip'), net.img_channels, net.label_dim)
        batches = DatasetBatches(data, make_encoder({'name': 'rgb'}), device)
        recipe = Recipe(batch=batch, total_nimg=batch * (2 * steps + 4), optim={'name': 'Adam', 'betas': (0.9, 0.99)},
                        learning_rate={'name': 'constant', 'lr': 1e-4})
        trainer = Trainer(recipe, net, EDM2Loss(), batches, folder)
        trainer.model = trainer._wrap()
        feed = _Timed(batches.iterate(trainer._plan()))
        for _ in range(2):
            trainer._step(feed)
        cuda = device.type == 'cuda'
        if cuda:
            torch.cuda.synchronize()
        feed.seconds, start = 0.0, time.perf_counter()
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter('always')
            if cuda:
                torch.cuda.set_sync_debug_mode('warn')
            for _ in range(steps):
                trainer._step(feed)
            if cuda:
                torch.cuda.set_sync_debug_mode('default')
                torch.cuda.synchronize()
        seconds, waited = time.perf_counter() - start, feed.seconds
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profile(activities=activities) as seen:
            for _ in range(steps):
                trainer._step(feed)
        counts = {event.key: event.count for event in seen.key_averages()}
        feed.steps.close()
    return {'steps': steps, 'seconds_of_a_step': seconds / steps,
            'waits': {name: counts.get(name, 0) for name in WAITS} if cuda else None,
            'synchronisations': len([w for w in noticed if 'synchroniz' in str(w.message)]) if cuda else None,
            'share_waited_for_data': waited / seconds}
