"""Held-out loss: the training loss of a network on images that it was never trained on.

It needs no samples and no detector, and its noise is the same for every network (common random
numbers), so that networks differ by less than the loss itself varies.
"""

import dataclasses
import functools

import numpy as np
import torch

from dnnlib import UserError, progress
from dnnlib.util import subset
from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator, tuple_seed
from torch_utils.stats import BINS, LEVELS
from torch_utils.stopping import turns
from training.data.images import open_dataset
from training.diffusion.losses import LOSSES, DDPMLoss

STRATA = 8   # levels of each image
IMAGES = 16  # of a batch: the same on any number of processes
# Network, by class, whose snapshot does not say its loss; of others EDM's.
_FAMILIES = {'Precond': 'edm2', 'VPPrecond': 'vp', 'VEPrecond': 've', 'FlowPrecond': 'flow'}


class _AtLevels(StackedRandomGenerator):
    """A row of random numbers for each seed, but the first draw is the number whose probability to
    be exceeded is 1 - u, u [n] in (0, 1): what losses draw first is the noise level.
    """

    def __init__(self, device, seeds, u: torch.Tensor):
        super().__init__(device, seeds)
        self._u = u

    def _draw(self, function, size, dim, device, **options):
        if self._u is None:
            return super()._draw(function, size, dim, device, **options)
        u, self._u = self._u, None
        if isinstance(function, functools.partial):            # randint, with the number of steps
            values = (u * function.args[0]).long()
        else:
            values = (torch.special.ndtri(u) if function is torch.randn else u).float()
        return values.reshape(size).to(device or self.device)


def plain_loss(net, rule: dict | None = None):
    """The loss that a network is trained by, of a recipe's `rule` (name and settings), without
    augmentation, dropped labels, class-balancing term and teacher.

    Networks of discrete time have DDPM's. Raises UserError for a loss of another kind.
    """
    if hasattr(net, 'diffusion'):
        return DDPMLoss(net.diffusion)
    rule = rule or {}
    name = rule.get('name') or _FAMILIES.get(type(net).__name__, 'edm')
    if name not in LOSSES:
        raise UserError(f'{name!r} is no loss of a diffusion model')
    settings = {field.name: rule[field.name] for field in dataclasses.fields(LOSSES[name])
                if field.name in rule and field.name != 'augment'}
    if name in ('edm', 'edm2'):
        settings['sigma_data'] = getattr(net, 'sigma_data', 0.5)
    return LOSSES[name](**settings)


@dataclasses.dataclass
class HeldOut:
    """Losses and noise levels of images, float64 [N, STRATA], by quantile of the level."""

    losses: np.ndarray
    sigmas: np.ndarray

    @property
    def of_images(self) -> np.ndarray:
        """The loss of each image [N], the mean over its levels."""
        return self.losses.mean(1)

    def results(self) -> dict:
        """`heldout`: mean over images; `heldout_se`: its standard error, of images drawn from
        their distribution: s / sqrt(N) with the deviation s between the losses of images (the
        levels of one image are not independent, and count as one).
        """
        values = self.of_images
        return {'heldout': float(values.mean()), 'heldout_se': standard_error(values)}

    def by_level(self) -> dict[str, float]:
        """{bin of noise levels, as in torch_utils.stats: mean loss}."""
        at = np.searchsorted(LEVELS, self.sigmas.astype(np.float32))
        return {name: float(self.losses[at == i].mean())
                for i, name in enumerate(BINS) if (at == i).any()}

    def less_than(self, other: 'HeldOut') -> tuple[float, float]:
        """(mean difference to another network on the same images, its standard error): paired,
        s / sqrt(N) with the deviation s between the differences of single images.
        """
        difference = self.of_images - other.of_images
        return float(difference.mean()), standard_error(difference)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values [N]; nan for a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float('nan')


def open_fitting(path: str, net, encoder, description: dict):
    """A data set that fits a network, whose own is described: classes have the same labels.
    Raises UserError for another shape, or other classes.
    """
    colours = encoder.name == 'rgb' and net.img_channels > 1   # are not thrown away unasked
    dataset = open_dataset(path, channels=net.img_channels if colours else None)
    shape = tuple(encoder.latent_shape(dataset.image_shape))
    wanted = net.image_shape
    if shape != wanted:
        raise UserError(f'has images {list(shape)}, and the network takes {list(wanted)}',
                        'heldout', path)
    if net.label_dim:
        try:
            dataset.relabel(description, net.label_dim)
        except UserError as error:
            raise UserError(error.text, 'heldout', path) from None
    return dataset


def loss_of_snapshot(snapshot, path: str) -> tuple:
    """(function(num=None, seed=0) -> the `HeldOut` of a snapshot as it then is, the data set):
    the loss that it was trained by, on the images at `path`. Raises UserError for others than fit.
    """
    dataset = open_fitting(path, snapshot.net, snapshot.encoder, snapshot.dataset)
    loss = plain_loss(snapshot.net, snapshot.recipe.get('loss'))

    def measure(num: int | None = None, seed: int = 0) -> HeldOut:
        return heldout_loss(snapshot.net, loss, snapshot.encoder, dataset, num, seed)

    return measure, dataset


@torch.no_grad()
def heldout_loss(net, loss, encoder, dataset, num: int | None = None, seed: int = 0) -> HeldOut:
    """The loss of a network, in eval mode, on (a random `num` of) the images of a data set, which
    are encoded for it. The same on every process, and on any number of them.

    Each image is seen at STRATA noise levels, which are drawn one from each equal share of the
    levels of training: at the quantiles (k + v) / STRATA with v ~ U(0, 1) of the image. Levels,
    noise and posterior of latents depend on `seed` and the image alone.
    """
    device = next(net.parameters()).device
    indices = subset(len(dataset), len(dataset) if num is None else num, seed)
    rows = {}
    starts = range(0, len(indices), IMAGES)
    own = progress.bar(turns(starts), dist.get_rank() == 0, desc='Held-out loss', leave=False,
                       total=-(-len(starts) // dist.get_world_size()))
    for position in own:
        if position is not None:
            part = indices[position:position + IMAGES]
            rows[position] = _losses(net, loss, encoder, dataset, part, seed, device)
    rows = {key: value for part in dist.gather_objects(rows) for key, value in part.items()}
    losses, sigmas = zip(*(rows[key] for key in sorted(rows)), strict=True)
    return HeldOut(np.concatenate(losses), np.concatenate(sigmas))


def _losses(net, loss, encoder, dataset, indices, seed: int, device):
    """(losses, noise levels) of some images."""
    images = torch.from_numpy(dataset.images(indices)).to(device)
    latents = encoder.encode_latents(images, StackedRandomGenerator(
        device, [tuple_seed(seed, int(i)) for i in indices]))
    labels = torch.from_numpy(dataset.labels(indices)).to(device) if net.label_dim else None
    seeds = [tuple_seed(seed, int(i), k) for i in indices for k in range(STRATA)]
    offsets = StackedRandomGenerator('cpu', [tuple_seed(seed, int(i), STRATA) for i in indices])
    v = offsets.rand([len(indices), 1], dtype=torch.float64)
    u = (torch.arange(STRATA) + v) / STRATA
    random = _AtLevels(device, seeds, u.flatten().clamp(1e-6, 1 - 1e-6))
    _, terms = loss(net, {
        'images': latents.repeat_interleave(STRATA, 0), 'random': random,
        'labels': None if labels is None else labels.repeat_interleave(STRATA, 0)})
    return tuple(terms[name].double().reshape(-1, STRATA).cpu().numpy()
                 for name in ('loss', 'sigma'))
