"""Images from a denoiser, seed by seed: each depends on its seed and label alone."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from dnnlib import UserError, pictures
from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator
from training.diffusion.samplers import edm2_sampler


@dataclasses.dataclass
class GeneratedBatch:
    """Images of one batch: uint8 [N,3,H,W] on the device, their seeds, and their labels (or None)."""

    images: torch.Tensor
    seeds: list[int]
    labels: list[int] | None


def split_seeds(seeds, batch: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The batches of one process: as equal in size as can be, the same number for every process (some may be empty)."""
    count = max(-(-len(seeds) // (batch * world_size)), 1) * world_size
    return np.array_split(np.asarray(seeds, dtype=np.int64), count)[rank::world_size]


def draw_inputs(net, seeds, labels, device):
    """(noise [N,C,H,W], label ids [N] or None, random numbers for the sampler) of seeds, in EDM2's order of draws.

    `labels` is None or has one class for each seed, which takes the place of the drawn one.
    """
    random = StackedRandomGenerator(device, seeds)
    noise = random.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution])
    if net.label_dim == 0:
        return noise, None, random
    ids = random.randint(net.label_dim, [len(seeds)])
    return noise, ids if labels is None else torch.as_tensor(labels, device=device), random


def generate_images(net, encoder, seeds, *, labels=None, batch=32, device=None, guide=None, sampler=edm2_sampler,
                    split=True, progress=False, **sampler_options) -> Iterator[GeneratedBatch]:
    """Samples one image for each seed; under several processes each yields its share (`split=False`: all of them).

    `labels`: None draws the class of each image from its seed; an int is the class of all; a sequence has one class for each
    seed. Draws of a seed, in order: initial noise, label (also where it is overridden), churn noise.
    """
    device = torch.device(device) if device is not None else next(net.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    seeds = np.asarray(seeds, dtype=np.int64)
    if labels is not None:
        labels = np.broadcast_to(np.asarray(labels, dtype=np.int64), seeds.shape)
    plan = split_seeds(range(len(seeds)), batch, rank, world_size)
    for positions in tqdm(plan, unit='batch', disable=None if progress and rank == 0 else True):
        if len(positions) == 0:
            continue
        chosen = seeds[positions].tolist()
        with torch.inference_mode():
            noise, ids, random = draw_inputs(net, chosen, None if labels is None else labels[positions], device)
            one_hot = None if ids is None else torch.nn.functional.one_hot(ids, net.label_dim).float()
            latents = sampler(net, noise, labels=one_hot, guide=guide, random=random, **sampler_options)
            images = encoder.decode(latents)
        yield GeneratedBatch(images, chosen, None if ids is None else ids.tolist())


def save_sample_grid(path: str, net, encoder, dataset, columns: int = 8, sampler=edm2_sampler):
    """Samples of fixed seeds as a picture: a row for each of the first ten classes, or eight rows without classes.

    Where the encoder cannot decode (its autoencoder is not at hand), it says so and writes nothing.
    """
    rows = list(range(min(net.label_dim, 10))) if net.label_dim else None
    count = len(rows or range(8)) * columns
    labels = [row for row in rows for _ in range(columns)] if rows else None
    try:
        encoder.prepare(next(net.parameters()).device)
    except UserError as error:
        dist.print0(f'No sample grid: {error}')
        return
    batches = generate_images(net, encoder, range(count), labels=labels, batch=columns * 4, split=False, sampler=sampler)
    images = torch.cat([batch.images.cpu() for batch in batches])
    names = dataset.class_names or dataset.classes or rows
    pictures.save_image_grid(path, images, columns, [names[row] for row in rows] if rows else None)
