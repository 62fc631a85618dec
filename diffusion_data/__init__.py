"""Diffusion models and what their data did to them, as a library.

    from diffusion_data import frechet, load, memorized, sample

    net = load('network-snapshot-0000524-0.100.pkl')           # or a URL, see docs/files.md
    images = net.sample(16, cls='cats', seed=0)                # uint8 [16,C,H,W]
    images.grid().save('cats.png')

What a caller can mend raises `UserError` in one line, as the command lines print it. Images are
those of generate_images.py, bit for bit. Nothing here is imported by the names `training`,
`metrics`, `torch_utils` or `dnnlib`, which may be those of another project.
"""

import os
import warnings
from collections.abc import Iterable, Sequence

try:
    import torch
except ImportError as error:
    raise ImportError('diffusion_data needs torch 2.11 or later and leaves its build to you: '
                      'pip install torch, or as https://pytorch.org says') from error

import numpy as np
import PIL.Image

from . import _rooms  # noqa: F401, which makes the next ones
from .dnnlib import UserError, pictures
from .dnnlib.util import hide, renamed_fields
from .metrics import compute
from .metrics.detectors import PROTOCOLS
from .metrics.features import Detectors, usual_weights
from .metrics.memorization import Copies, find_copies
from .metrics.statistics import USUAL, Statistics, load_statistics
from .torch_utils.distributed import exact_float32
from .training.data.dataset import class_index, class_titles
from .training.data.images import ArrayImages, holds_images, open_dataset, open_images, pixels_of
from .training.generate import open_generator
from .training.snapshot import Snapshot, load_snapshot

__all__ = ['Copies', 'Images', 'Model', 'UserError', 'frechet', 'load', 'memorized', 'sample']

Path = str | os.PathLike[str]
Class = str | int
_fields = renamed_fields(gnet='guide', class_='cls', name='sampler')


def _choice(**options):
    """Raises UserError for a value that is not in its table: name=(value, table)."""
    for name, (value, table) in options.items():
        if value not in table:
            raise UserError(f'is none of {", ".join(table)}', name, value)


def _place(path: Path | None) -> str | None:
    return None if path is None else hide(os.fspath(path))


def _seeds(count: int, seed: int, seeds: Iterable[int] | None) -> list[int]:
    for name, value in dict(count=count, seed=seed).items():
        if not isinstance(value, int | np.integer) or value < (name == 'count'):
            raise UserError(f'is no whole number from {int(name == "count")} on', name, value)
    chosen = [*range(seed, seed + count)] if seeds is None else [*map(int, seeds)]
    if not chosen:
        raise UserError('are none', 'seeds')
    return chosen


class Images(torch.Tensor):
    """Images uint8 [N,C,H,W], values 0..255, on the CPU: a tensor that can be looked at."""

    def grid(self, columns: int | None = None,
             labels: Sequence[str] | None = None) -> PIL.Image.Image:
        """The images as one picture, row by row, with the labels of the rows at its left.

        By default it is a square.
        """
        if self.ndim != 4 or self.dtype != torch.uint8:
            raise UserError(f'a picture is made of uint8 [N,C,H,W], and this is {self.dtype} '
                            f'{list(self.shape)}')
        return pictures.image_grid(self.numpy(), columns, labels)


class Model:
    """A network ready to sample: see `load`.

    snapshot             network, encoder, data set and recipe, as the file describes them
    guide                the guiding network, or None
    guidance, guidance_interval   how strongly it guides, and above which and up to which noise
                         level, unless `sample` says otherwise
    """

    def __init__(self, snapshot: Snapshot, guide: Snapshot | None = None, guidance: float = 1,
                 guidance_interval: tuple[float, float] | None = None):
        self.snapshot = snapshot
        self.guide = guide
        self.guidance = guidance
        self.guidance_interval = guidance_interval

    @property
    def device(self) -> torch.device:
        return next(self.snapshot.net.parameters()).device

    @property
    def classes(self) -> list[str]:
        """Names of the classes, or their numbers; none of an unconditional network."""
        count = self.snapshot.net.label_dim
        names = class_titles(self.snapshot.dataset | {'label_dim': count})
        return [str(name) for name in names[:count]]

    @_fields
    def sample(self, count: int = 16, *, cls: Class | Sequence[Class] | None = None,
               seed: int = 0, seeds: Iterable[int] | None = None, batch: int = 32,
               guidance: float | None = None,
               guidance_interval: tuple[float, float] | None = None,
               sampler: str | None = None, **options: object) -> Images:
        """Images uint8 [count,C,H,W], those of `generate_images.py --seeds=SEED-...`.

        cls       name, wnid or original index of the class of all images, or a list with one for
                  each; by default each is drawn from its seed
        seed      of the first image; the others have the next ones. Or `seeds`, one for each
        batch     images at a time, which changes nothing but time and memory
        guidance, guidance_interval   by default those of the model
        sampler   by default that of the network; `options` are its options (num_steps, S_churn,
                  solver, eta, ...)

        Raises UserError for a class that is not there, and for options that do not fit.
        """
        seeds = _seeds(count, seed, seeds)
        labels = {}
        if cls is not None and not isinstance(cls, str | int | np.integer):
            if len(cls) != len(seeds):
                raise UserError(f'has {len(cls)} classes for {len(seeds)} images', 'cls')
            labels = dict(labels=[class_index(self.snapshot.dataset, one) for one in cls])
            cls = None
        if guidance is None:
            guidance = self.guidance
            guidance_interval = guidance_interval or self.guidance_interval
        with exact_float32():
            generator = open_generator(
                self.snapshot, gnet=self.guide, guidance=guidance, class_=cls, device=self.device,
                guidance_interval=guidance_interval, sampler=options | {'name': sampler})
            parts = [part.images.cpu() for part in generator.images(
                seeds, batch=batch, split=False, **labels)]
        return torch.cat(parts).as_subclass(Images)

    def grid(self, count: int = 16, **options: object) -> PIL.Image.Image:
        """A picture of `count` samples; `options` are those of `sample`."""
        return self.sample(count, **options).grid()


@_fields
def load(net: Path | None = None, *, guide: Path | None = None, guidance: float | None = None,
         guidance_interval: tuple[float, float] | None = None, preset: str | None = None,
         model_url: Path | None = None, sha256: str | None = None,
         device: str | torch.device | None = None) -> Model:
    """A network of a file, folder or URL, whatever made it (see docs/files.md). No code from it is
    run.

    guide      file or URL of a network that guides it, with the strength `guidance`
    preset     instead of `net` and `guide`: a published network (see generate_images.py --help)
    model_url  autoencoder of latents, a folder or a name on the hub
    sha256     what the file must have
    device     by default the GPU, if there is one

    Raises UserError that names the file, or what does not fit.
    """
    generator = open_generator(
        _place(net), preset=preset, gnet=_place(guide), guidance=guidance,
        guidance_interval=guidance_interval, model_url=_place(model_url), sha256=sha256,
        device=device)
    options = generator.options
    guides = [Snapshot(one, generator.snapshot.encoder) for one in [options['guide']]
              if one is not None]
    return Model(generator.snapshot, *guides or [None], options['guidance'],
                 options['guidance_interval'])


def _model(net: Model | Path) -> Model:
    return net if isinstance(net, Model) else load(net)


def sample(net: Model | Path, count: int = 16, **options: object) -> Images:
    """`count` images of a network, or of its file or URL; `options` are those of
    `Model.sample`."""
    return _model(net).sample(count, **options)


def frechet(images: Path | torch.Tensor, ref: Path | torch.Tensor, detector: str = 'inception', *,
            protocol: str = 'edm', weights: Path | None = None, batch: int = 64,
            device: str | torch.device | None = None) -> float:
    """Frechet distance of two sets of images, as of `calculate_metrics.py calc`: FID with
    'inception', FD-DINOv2 with 'dinov2', of small images also of their 'pixels'; or of the
    features of 'dinov2_base', 'clip', or a classifier of one's 'own'.

    images, ref  images in whatever dataset_tool.py reads, uint8 [N,C,H,W], or reference statistics
    protocol     edm, adm or cbdm: how Inception sees images
    weights      of the detector, file, folder or name; by default of the variable
                 INCEPTION_WEIGHTS, DINOV2_WEIGHTS, ..., else they are downloaded

    Warns where so few images make a biased distance. Raises UserError for images or weights that
    are not there.
    """
    _choice(detector=(detector, USUAL), protocol=(protocol, PROTOCOLS))
    space = USUAL[detector]
    weights = usual_weights() | ({} if weights is None else {detector: _place(weights)})
    detectors = Detectors(weights, device, protocol, open_network=load_snapshot)
    sides = []
    for name, side in dict(images=images, ref=ref).items():
        if isinstance(side, torch.Tensor):
            side = Statistics(name, images=_data_set(side, name))
        else:
            side = load_statistics(_place(side), holds_images=holds_images)
        compute.same_protocol(side, protocol, [space])
        sides.append(compute.complete(side, [space], detectors, _open, batch=batch))
    for note in compute.notes(*sides, detectors):
        warnings.warn(note, stacklevel=2)
    return compute.evaluate([space], *sides, detectors.rules, detectors.device)[space]


def _data_set(images: torch.Tensor, name: str) -> ArrayImages:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f'are {images.dtype} {list(images.shape)} instead of uint8 [N,C,H,W]',
                        name)
    return ArrayImages(name, images.cpu().numpy().transpose(0, 2, 3, 1))


def _open(images):
    return images if isinstance(images, ArrayImages) else open_images(images)


def memorized(net: Model | Path | torch.Tensor, data: Path, count: int = 10000, *,
              xflip: bool = False, **options: object) -> Copies:
    """The nearest two training images of each of `count` samples, and which samples are copies:
    less than a third as far from the nearest as from the second (arXiv 2310.02664).

    net    a network, its file or URL, or images uint8 [N,C,H,W] that were made already
    data   its training set
    xflip  compare with mirrored training images too

    `options` are those of `Model.sample`. What comes back has `memorized`, bool [N];
    `distances` float64 [N,2]; `indices` int64 [N,2]; and `results()`, the share of copies and the
    mean distance. Raises UserError for another training set.
    """
    training = pixels_of(open_dataset(_place(data), use_labels=False, xflip=xflip))
    if not isinstance(net, torch.Tensor):
        seeds = _seeds(count, options.pop('seed', 0), options.pop('seeds', None))
        return find_copies([(seeds, _model(net).sample(seeds=seeds, **options))], training)
    _data_set(net, 'net')
    return find_copies([(range(len(net)), net.as_subclass(torch.Tensor))], training)
