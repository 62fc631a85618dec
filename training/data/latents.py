"""Archives of pixels to archives of latents and back, the same for any number of processes."""

import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib import progress
from dnnlib.image_io import encode_png
from dnnlib.util import UserError, map_ahead
from torch_utils import distributed as dist
from training.data.archive import ArchiveWriter, check_destination, image_name, latent_name
from training.data.autoencoders import remember
from training.data.images import open_dataset
from training.encoders import StabilityVAEEncoder, encoder_for, make_encoder


def encode(source: str, dest: str, encoder: StabilityVAEEncoder, *, batch=16, overwrite=False,
           max_images: int | None = None) -> int:
    """Stores mean and std of the autoencoder's posterior for every image of an archive of pixels,
    or for the first `max_images`.

    `dest` gets `latent_name(i)` (float32 [8,H/8,W/8]) for image i of `source`, its labels and its
    description. Returns the number of images; raises UserError for sources that hold no pixels or
    are too small.
    """
    check_destination(dest, overwrite)
    dataset = open_dataset(source, cache=False, channels=3)    # what autoencoders take
    if dataset.dtype != np.uint8:
        raise UserError(f'{source} holds latents already; encode takes pixels')
    _, height, width = dataset.image_shape
    if height % 8 or width % 8:
        raise UserError(f'{source} has {width}x{height} pixels; the autoencoder needs multiples '
                        f'of 8: convert it with the resolution {width - width % 8 or 8}x'
                        f'{height - height % 8 or 8}')
    if os.path.isdir(encoder.vae_name):
        encoder.vae_name = os.path.abspath(encoder.vae_name)   # files have its last name
        encoder.fingerprint = remember(encoder.vae_name)

    def to_bytes(raw):
        if not np.isfinite(raw).all():
            raise UserError('the autoencoder gives values that are not finite; use fp32 or bf16',
                            'precision')
        file = io.BytesIO()
        np.save(file, raw)
        return file.getvalue()

    encoder.prepare(dist.get_device())
    return _map(dataset, dest, encoder.encode_pixels, to_bytes, latent_name, batch, overwrite,
                max_images, encoder.config())


def decode(source: str, dest: str, *, model_url=None, precision='fp32', batch=16,
           overwrite=False, max_images: int | None = None) -> int:
    """Pictures of the means of an archive of latents, or of the first `max_images`: PNG files at
    `dest` with the same labels.

    The autoencoder is the one that the archive names, or `model_url`. Returns the number of
    images.
    """
    check_destination(dest, overwrite)
    dataset = open_dataset(source, cache=False)
    if dataset.dtype == np.uint8:
        raise UserError(f'{source} holds pixels; decode takes latents')
    config = encoder_for(dataset) | {'batch_size': batch, 'precision': precision}
    encoder = make_encoder(config, model_url)
    channels = encoder.latent_shape(dataset.image_shape)[0]

    def function(raw):
        scale, bias = encoder.whitening(raw)
        return encoder.decode(raw[:, :channels] * scale + bias)

    def to_bytes(pixels):
        return encode_png(pixels.transpose(1, 2, 0))

    encoder.prepare(dist.get_device())
    return _map(dataset, dest, function, to_bytes, image_name, batch, overwrite, max_images, None)


def _map(dataset, dest, function, to_bytes, name_of, batch, overwrite, max_images, encoder) -> int:
    """Writes `to_bytes(function(images))` of the first images, and returns their number.

    Batches are the same ones for any number of processes. Process r of R takes batches r, r+R,
    ...; the first process gathers and writes them in order.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    total = len(dataset) if max_images is None else min(max_images, len(dataset))
    if not total:
        raise UserError('leaves no image', 'max_images', max_images)
    batches = [np.arange(i, min(i + batch, total)) for i in range(0, total, batch)]
    names = [name_of(i) for i in range(total)]
    writer = contextlib.nullcontext() if rank else ArchiveWriter(dest, overwrite)
    with ThreadPoolExecutor(1) as pool, _parallel(function) as function, writer as out:
        ahead = map_ahead(pool, dataset.images, batches[rank::size], 1)
        starts = range(0, len(batches), size)
        for first in progress.bar(starts, not rank, unit='batch'):
            images = next(ahead, None)
            result = None if images is None else function(torch.from_numpy(images)).numpy()
            for number, values in enumerate(_gather(result), start=first):
                for index, value in zip(batches[number], values, strict=True):
                    out.add(names[index], to_bytes(value))
        if rank == 0:
            labels = dataset.stored_labels
            out.describe(names, None if labels is None else labels[:total],
                         dataset.info | {'encoder': encoder, 'channels': None})
    dist.barrier()  # no process ends before the archive is there
    return total


@contextlib.contextmanager
def _parallel(function):
    """`function` from images to values on the CPU, computed on the GPU if there is one.

    On the CPU, threads take an image each. The threads of a single operation, whose number changes
    the rounding, stay out of it: so the result is the same for any number of cores and processes.
    """
    device = dist.get_device()
    if device.type == 'cuda':
        yield lambda images: function(images.to(device)).cpu()
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda images: torch.cat(list(pool.map(function, images.split(1))))
    finally:
        torch.set_num_threads(threads)


def _gather(value) -> list:
    """On the first process the values of all that have one, in order; nothing on the others."""
    if dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    torch.distributed.gather_object(value, values, dst=0)
    return [value for value in values or [] if value is not None]
