"""Images from a denoiser, seed by seed: each depends on its seed and label alone.

`open_generator` is the way from options to images, for every script and for the library.
"""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Iterator

import numpy as np
import torch

from dnnlib import UserError, budget, pictures
from dnnlib.image_io import encode_png
from dnnlib.progress import bar
from dnnlib.util import finite, to_json, without, write_bytes, write_json
from torch_utils import distributed as dist
from torch_utils.files.weights import fingerprint
from training.data.dataset import class_indices, class_titles
from training.diffusion.samplers import (
    Guided,
    choose_setting,
    plain_setting,
    sample_seeds,
    seed_inputs,
)
from training.encoders import make_encoder
from training.networks import compiled
from training.published import preset_options
from training.snapshot import Snapshot, load_denoiser

# --- Seeds to images -----------------------------------------------------------------------------


@dataclasses.dataclass
class GeneratedBatch:
    """Images of one batch: uint8 [N,3,H,W] on the device, their seeds, and their labels (or
    None)."""

    images: torch.Tensor
    seeds: list[int]
    labels: list[int] | None

    def __iter__(self):
        """(seed, label or None, image uint8 [3,H,W] as an array) one by one."""
        labels = self.labels or [None] * len(self.seeds)
        return zip(self.seeds, labels, self.images.cpu().numpy(), strict=True)


def split_seeds(seeds, batch: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The batches of one process: as equal in size as can be, the same number for every process
    (some may be empty)."""
    count = max(-(-len(seeds) // (batch * world_size)), 1) * world_size
    return np.array_split(np.asarray(seeds, dtype=np.int64), count)[rank::world_size]


def generate_images(net, encoder, seeds, *, labels=None, batch=32, guide=None, guidance=1,
                    guidance_interval=None, sampler=None, split=True, progress=False,
                    compile=False, **options) -> Iterator[GeneratedBatch]:
    """Samples one image for each seed; under several processes each yields its share
    (`split=False`: all of them).

    `labels`: None draws the class of each image from its seed; an int is the class of all; a
    sequence has one class for each seed. Draws of a seed, in order: initial noise, label (also
    where it is overridden), churn noise. `sampler` is a setting (default: of the network's
    family), which `options` change; see `training.diffusion.samplers`. `compile`: see
    `training.networks.compiled`.
    """
    device = next(net.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    seeds = np.asarray(seeds, dtype=np.int64)
    labels = np.broadcast_to(labels, seeds.shape)
    setting = choose_setting(net, sampler, options)
    if compile:
        net = compiled(net)
        guide = None if guide is None else compiled(guide)
    plan = split_seeds(range(len(seeds)), batch, rank, world_size)
    for positions in bar(plan, progress and rank == 0, unit='batch', leave=split):
        if len(positions) == 0:
            continue
        chosen = seeds[positions].tolist()
        with torch.inference_mode():
            images, ids = sample_seeds(net, encoder, chosen, labels[positions].tolist(), device,
                                       guide=guide, guidance=guidance,
                                       guidance_interval=guidance_interval, **setting)
        yield GeneratedBatch(images, chosen, None if ids is None else ids.tolist())


@dataclasses.dataclass
class Generator:
    """A network with all that decides its images but the seeds.

    options   of `generate_images`: guide, guidance, guidance_interval, sampler, compile
    settings  what decides them, as plain values, but for the weights
    classes   labels: seed S has that at S modulo their number; None draws it from the seed
    """

    snapshot: Snapshot
    options: dict
    settings: dict
    classes: list[int] | None = None

    @functools.cached_property
    def record(self) -> dict:
        """The settings, and as `weights` what tells those of the networks wherever they are."""
        nets = filter(None, (self.snapshot.net, self.options['guide']))
        return self.settings | {
            'weights': [fingerprint(net.state_dict().items()) for net in nets]}

    def images(self, seeds, **options) -> Iterator[GeneratedBatch]:
        """See `generate_images`, which takes `options`."""
        net, encoder = self.snapshot.net, self.snapshot.encoder
        options = {'labels': self._chosen(seeds)} | self.options | options
        return generate_images(net, encoder, seeds, **options)

    def _chosen(self, seeds) -> list:
        classes = self.classes or [None]
        return [classes[seed % len(classes)] for seed in seeds]

    def labels(self, seeds) -> dict:
        """{seed: label or None} of images, without making them."""
        net = self.snapshot.net
        labels = dict.fromkeys(seeds)
        for start in range(0, len(seeds) if net.label_dim else 0, 256):
            part = seeds[start:start + 256]
            _, ids, _ = seed_inputs(net, part, self._chosen(part), 'cpu')
            labels |= zip(part, ids.tolist(), strict=True)
        return labels


def open_generator(net=None, *, preset=None, gnet=None, guidance=None, guidance_interval=None,
                   class_=None, sampler=None, model_url=None, sha256=None,
                   gnet_sha256=None, allow_nonfinite=False, compile=False,
                   device=None) -> Generator:
    """Opens a network, and its guide, to make images by the options of a command line; None is
    what was not given.

    net, gnet   file or URL of a network (see `load_snapshot`), or a Snapshot
    sampler     a sampler's name and options (see `choose_setting`); by default the network's own
    class_      class of all images, by index, name or wnid, or several (see `class_indices`);
                by default it is drawn from the seed

    Raises UserError for options that do not fit the network or each other.
    """
    chosen = preset_options(preset) if preset else dict(net=None, gnet=None, guidance=1)
    net = net or chosen['net']
    gnet = gnet or chosen['gnet']
    guidance = float(chosen['guidance'] if guidance is None else guidance)
    if net is None:
        raise UserError('give a network, or a preset', field='net')
    if gnet_sha256 and not gnet:
        raise UserError('is of a file; give the guiding network', 'gnet_sha256', gnet_sha256)
    device = device or dist.get_device()
    snapshot = _open(net, device, sha256, allow_nonfinite)
    setting = choose_setting(snapshot.net, snapshot.sampler, sampler or {})
    guiding = dict(guidance=guidance, guidance_interval=guidance_interval)
    guide = open_guide(snapshot, gnet, setting['name'], **guiding, device=device,
                       sha256=gnet_sha256, allow_nonfinite=allow_nonfinite)
    net, gnet = (None if isinstance(one, Snapshot) else one for one in (net, gnet))
    if model_url:
        snapshot.encoder = make_encoder(snapshot.encoder.config(), model_url)
    snapshot.encoder.allow_nonfinite = allow_nonfinite
    snapshot.encoder.prepare(device)
    classes = None if class_ is None else class_indices(snapshot.dataset, class_)
    plain = plain_setting(setting)
    settings = dict(net=net, gnet=gnet, **guiding,
                    nimg=snapshot.nimg, class_name=class_, sampler=plain)
    options = dict(guide=guide, sampler=setting, compile=compile, **guiding)
    return Generator(snapshot, options, settings, classes)


def open_guide(snapshot: Snapshot, gnet: str | Snapshot | None, sampler: str, guidance: float,
               guidance_interval, device='cpu', sha256=None, allow_nonfinite=False):
    """The network that guides that of `snapshot` by the sampler of this name, or None. Raises
    UserError for one that does not fit it."""
    net = snapshot.net
    guide = _open(gnet, device, sha256, allow_nonfinite).net if gnet else None
    Guided(net, None, guide, guidance, guidance_interval)
    if guide is None:
        return None
    chain = getattr(net, 'diffusion', None) if sampler in ('ddim', 'ddpm') else None
    other = getattr(guide, 'diffusion', None)
    fault = None
    if guide.image_shape != net.image_shape:
        fault = 'makes images of another shape'
    elif guide.label_dim and net.label_dim not in (0, guide.label_dim):
        fault = 'has other classes'
    elif chain and not (other and np.array_equal(other.sigmas, chain.sigmas)):
        fault = 'has other time steps (choose another sampler, e.g. edm)'
    if fault:
        path = None if isinstance(gnet, Snapshot) else gnet
        raise UserError(f'{fault} than the network that it guides', field='gnet', value=path)
    return guide


def _open(path: str | Snapshot, device, sha256, allow_nonfinite) -> Snapshot:
    if isinstance(path, Snapshot):
        return path
    snapshot = load_denoiser(path, device, sha256=sha256, allow_nonfinite=allow_nonfinite)
    if assumed := snapshot.recipe.get('assumed'):
        dist.print0(
            f'Assumed of {path}: {", ".join(f"{key}={value}" for key, value in assumed.items())}; '
            'snapshot_tool.py convert can set them')
    return snapshot


# --- What becomes of them ------------------------------------------------------------------------


def image_name(seed: int, subdirs: bool) -> str:
    """'000123.png', or '000000/000123.png' with a folder for each thousand seeds."""
    return f'{seed - seed % 1000:06d}/{seed:06d}.png' if subdirs else f'{seed:06d}.png'


class OutputFolder:
    """Images by seed, and a dataset.json with their labels: the folder is a data set as it stands.

    It remembers the `record` of what made them: with the same one, images that exist are not made
    again. Raises UserError if it holds others.
    """

    def __init__(self, path: str, subdirs: bool, record: dict, dataset: dict):
        self.path = path
        self.subdirs = subdirs
        self.record = json.loads(to_json(record))              # files have it `publishable`
        self.dataset = dataset
        self.json_path = os.path.join(path, 'dataset.json')
        self.labels = {}  # {name of the file: label or None}, of those before and of this process
        fault = None
        if os.path.isfile(self.json_path):
            try:
                old = budget.read_json(self.json_path)
                made_by = finite(dict(old.get('generated_by') or {}))
                if 'sampler' in made_by:
                    made_by['sampler'] = plain_setting(made_by['sampler'])
                # Networks are told by their weights; in earlier versions by their paths.
                names = {'net', 'gnet'} if 'weights' in made_by else {'weights'}
                if without(made_by, names) != without(self.record, names):
                    fault = 'holds images made with other options'
                self.labels = dict(old.get('labels') or [])
            except (ValueError, AttributeError, TypeError):
                fault = 'has a damaged dataset.json'
        elif os.path.isdir(path) and any(
                not name.startswith('.dataset.json.') for name in os.listdir(path)):
            fault = 'is not empty'
        if fault:
            raise UserError(f'{fault}; remove it or choose another', field='outdir', value=path)
        dist.barrier()
        if dist.get_rank() == 0:
            self._write()
        dist.barrier()

    def file(self, seed):
        return os.path.join(self.path, image_name(seed, self.subdirs))

    def missing(self, seeds, generator: Generator) -> list[int]:
        """Those whose images are not there, the same on every process; the labels of those that
        are there are noted.
        """
        missing = dist.broadcast_object(
            [seed for seed in seeds if not os.path.isfile(self.file(seed))])
        existing = sorted(set(seeds) - set(missing))[dist.get_rank()::dist.get_world_size()]
        for seed, label in generator.labels(existing).items():
            self.labels[image_name(seed, self.subdirs)] = label
        return missing

    def add(self, batch: GeneratedBatch):
        for seed, label, image in batch:
            write_bytes(self.file(seed), encode_png(image.transpose(1, 2, 0)))
            self.labels[image_name(seed, self.subdirs)] = label

    def finish(self):
        """Writes the labels of all images, from every process."""
        parts = dist.gather_objects(self.labels)
        if dist.get_rank() == 0:
            self.labels = collections.ChainMap(*parts)
            self._write()

    def _write(self):
        labelled = self.labels and None not in self.labels.values()
        rows = sorted(self.labels.items()) if labelled else None
        described = {key: self.dataset[key] for key in ('classes', 'class_names')
                     if self.dataset.get(key)}
        if self.dataset.get('num_channels') in (1, 4):          # latents have more
            described['channels'] = self.dataset['num_channels']
        write_json(self.json_path, {'labels': rows, 'generated_by': self.record, **described})


class GridCollector:
    """Keeps the first images of each class for a picture: a row for each class, or a square
    without classes. Above them stands the `title`, and how many classes are left out."""

    def __init__(self, path: str, dataset: dict, columns: int = 8, rows: int = 16,
                 title: str = ''):
        self.path = path
        self.title = title
        self.dataset = dataset
        self.columns = columns
        self.rows = rows
        self.images = {}  # label or None -> {seed: image}, by seed

    def _keep(self, label, images: dict):
        """The first of a class, as many as the picture shows."""
        limit = self.columns if label is not None else self.columns * self.rows
        images = self.images.get(label, {}) | images
        self.images[label] = dict(sorted(images.items())[:limit])

    def add(self, batch: GeneratedBatch):
        for seed, label, image in batch:
            self._keep(label, {seed: image})

    def finish(self):
        """Collects the images of all processes; the first one writes the picture."""
        parts = dist.gather_objects(self.images)
        if dist.get_rank() != 0:
            return
        for part in parts:
            for label, images in part.items():
                self._keep(label, images)
        self.write()

    def write(self):
        """The picture of the images of this process."""
        labels = sorted(self.images, key=lambda label: -1 if label is None else label)[:self.rows]
        tiles = []
        for label in labels:
            row = list(self.images[label].values())
            tiles += row + [np.full_like(row[0], 255)] * (-len(row) % self.columns)
        names = dict(enumerate(class_titles(self.dataset)))
        titles = None
        if labels != [None]:
            titles = [names.get(label, label) for label in labels]
        title = self.title
        if titles:
            count = max(self.dataset.get('label_dim', 0), len(labels))
            title = pictures.with_classes(title, len(labels), count)
        pictures.save_image_grid(self.path, np.stack(tiles), self.columns, titles, title)


def save_sample_grid(path: str, net, encoder, dataset: dict, columns: int = 8,
                     sampler: dict | None = None, title: str = ''):
    """Samples of fixed seeds as a picture: a row for each of the first ten classes, or eight rows
    without classes.

    `dataset` is a description, `sampler` a setting. Where the encoder cannot decode (its
    autoencoder is not at hand), it says so and writes nothing.
    """
    try:
        encoder.prepare(next(net.parameters()).device)
    except UserError as error:
        dist.print0(f'No sample grid: {error}')
        return
    labels = np.arange(min(net.label_dim, 10)).repeat(columns) if net.label_dim else None
    count = 8 * columns if labels is None else len(labels)
    grid = GridCollector(path, dataset, columns, count // columns, title)
    for batch in generate_images(net, encoder, range(count), labels=labels, batch=columns * 4,
                                 split=False, sampler=sampler, progress=True):
        grid.add(batch)
    grid.write()
