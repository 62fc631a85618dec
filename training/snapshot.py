"""Snapshots: a network with everything that is needed to sample from it, as plain tensors and
containers.

A snapshot is a dictionary of plain values written by `torch.save` and read with
`weights_only=True`, so opening one never runs code from the file. Keys: `format`, `network`
(class name and keyword arguments), `state` (parameters in half precision by default, buffers as
they are), `encoder`, `dataset` (description of the training set), `recipe`, `nimg`, `ema_std` and
`sampler` (how it is sampled: name and options of a sampler, see training.diffusion.samplers).
"""

import contextlib
import dataclasses
import functools
import os
from typing import NamedTuple

import torch

from dnnlib import UserError, url
from dnnlib.util import atomic_path, matching_names, publishable
from torch_utils.files.identify import Found, identify
from torch_utils.files.own import SNAPSHOT_FORMAT
from torch_utils.files.pickles import ForeignPickleError, errors_of
from torch_utils.files.weights import NonFiniteError, check_finite, nonfinite
from training import encoders
from training.diffusion.samplers import family_sampler
from training.networks import check_arguments, rebuild_network
from training.networks.infer import infer

_VAE_SETTINGS = ('vae_name', 'raw_mean', 'raw_std', 'final_mean', 'final_std')


@dataclasses.dataclass
class Snapshot:
    """A network ready to sample, what it was trained on and how.

    net      in eval mode, float32, gradients off
    sampler  a name with options; where none was stored, that of the network's family. None for
             classifiers.
    """

    net: torch.nn.Module
    encoder: object
    dataset: dict = dataclasses.field(default_factory=dict)
    recipe: dict = dataclasses.field(default_factory=dict)
    nimg: int = 0
    ema_std: float | None = None
    sampler: dict | None = None

    def __post_init__(self):
        if self.sampler is None and hasattr(self.net, 'img_channels'):
            self.sampler = family_sampler(self.net)


# --- Writing ------------------------------------------------------------------------------------


def write_state(path, state: dict):
    """torch.save to a file that appears only when complete. Equal states give equal bytes."""
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        try:
            torch.save(state, file)  # given a path, it would write the temporary name into it
        except RuntimeError as error:                          # unexpected pos 648448 vs 648336
            if isinstance(error.__context__, OSError):         # also where no one sees the context
                raise error.__context__ from None
            raise


def describe(net, *, encoder, dataset, recipe, sampler=None, nimg=0, ema_std=None) -> dict:
    """What a snapshot says besides its weights. `net` must come from `build_network`.

    sampler  of the recipe, `{'name': 'edm', 'num_steps': 18, ...}`; None: that of the network's
             family
    """
    return {
        'format': SNAPSHOT_FORMAT,
        'network': {'class_name': net.class_name, 'kwargs': net.init_kwargs},
        'encoder': publishable(encoder.config()), 'dataset': publishable(dataset),
        'recipe': publishable(recipe), 'sampler': sampler, 'nimg': int(nimg), 'ema_std': ema_std}


def stored_state(net, dtype) -> dict:
    """The weights of a network on the CPU: parameters as `dtype`, buffers (frequencies, filters,
    statistics) as they are. Raises NonFiniteError if a value is not finite, or not as `dtype`.
    """
    parameters = {name: value.detach().to(dtype) for name, value in net.named_parameters()}
    state = net.state_dict() | parameters
    if names := nonfinite(state):
        raise NonFiniteError(f'weights that are not finite, or not as {dtype}, are not written: '
                             f'{names[0]}, in all {len(names)} of {len(state)} tensors')
    return {name: value.cpu() for name, value in state.items()}


def save_snapshot(path, net, *, dtype=torch.float16, **description):
    """Writes a snapshot; `path` appears only when complete. See `describe` and `stored_state`."""
    write_state(path, describe(net, **description) | {'state': stored_state(net, dtype)})


# --- Names of files -----------------------------------------------------------------------------

_NAME = r'(?P<prefix>.+?)-(?P<kimg>\d{7,})(?:-(?P<average>[\d.]+))?\.pkl'
PREFIX = 'network-snapshot'


def snapshot_name(nimg: int, suffix: str = '', prefix: str = PREFIX) -> str:
    """`network-snapshot-<kimg>[-<average>].pkl`."""
    return f'{prefix}-{nimg // 1000:07d}{suffix}.pkl'


class SnapshotFile(NamedTuple):
    """What the name of a snapshot says: thousands of images, and which average ('' if there is
    one).
    """

    kimg: int
    average: str
    prefix: str
    path: str


def list_snapshots(folder: str, prefix: str | None = PREFIX) -> list[SnapshotFile]:
    """Snapshots of a run, by time and average; `prefix=None`: whatever they are called."""
    return sorted(
        SnapshotFile(int(match['kimg']), match['average'] or '', match['prefix'],
                     os.path.join(folder, match[0]))
        for match in matching_names(folder, _NAME) if prefix in (None, match['prefix']))


# --- Reading ------------------------------------------------------------------------------------


def read_weights(path: str) -> dict:
    """The weights by name, in float32 and finite, in the file of a network (see
    `load_snapshot`).
    """
    found = identify(path)
    if found.state is None:
        raise UserError(f'{path} holds no network; it is: {found.what}')
    return check_finite(found.state, path)


def read_snapshot(path: str) -> dict:
    """The dictionary of a snapshot file, as `save_snapshot` wrote it."""
    found = identify(path)
    if found.kind not in ('snapshot', 'safetensors'):
        raise UserError(f'{path}: not a network snapshot (format {SNAPSHOT_FORMAT}) '
                        f'but {found.what}')
    return found.content


_encoder = functools.partial(encoders.make_encoder, named_by='snapshot')


def _restore(found: Found) -> Snapshot:
    """The network and the encoder that a snapshot of this project describes."""
    content = found.content
    network = content['network']
    net = rebuild_network(network['class_name'], network['kwargs'], found.state, found.path)
    sampler = content['sampler']
    with errors_of(found.path, 'its encoder is malformed: '):
        check_arguments(content['encoder'])
    with errors_of(found.path, 'its sampler is malformed: '):
        check_arguments(sampler)
        if sampler is not None and not isinstance(sampler['name'], str):
            raise ForeignPickleError('its name is no text')
    return Snapshot(net, _encoder(content['encoder']), content['dataset'],
                    content['recipe'], content['nimg'], content['ema_std'], sampler)


def _restore_foreign(found: Found) -> Snapshot:
    """The network of a pickle of EDM or EDM2, built with this project's classes.

    The source in the file is never run.
    """
    ema = found.content['ema']
    encoder = found.content.get('encoder')
    config = {'name': 'rgb'}
    with errors_of(found.path):
        net = rebuild_network(ema.class_name, ema.kwargs, found.state, found.path)
        kind = getattr(encoder, 'class_name', None)
        if kind == 'StabilityVAEEncoder':
            config = {'name': 'sd-vae'} | {
                key: encoder.kwargs[key] for key in _VAE_SETTINGS if key in encoder.kwargs}
            check_arguments(config)
        elif encoder is not None and kind != 'StandardRGBEncoder':
            raise ForeignPickleError(f'unknown encoder {kind}')
    dataset = {'name': '', 'label_dim': net.label_dim}
    with contextlib.suppress(KeyError, TypeError):
        path = found.content['dataset_kwargs']['path']
        dataset['name'] = os.path.basename(path[:1000]).removesuffix('.zip')
    return Snapshot(net, _encoder(config), dataset)


def _restore_weights(found: Found, options: dict | None) -> Snapshot:
    """The network of a state dict of guided diffusion, class-balancing diffusion or a wide
    residual network.

    Its arguments follow from names and shapes (see training.networks.infer); `options` sets those
    that do not. The first two become denoisers (training.networks.discrete). What was assumed is
    in `recipe['assumed']`.
    """
    with errors_of(found.path):
        inferred = infer(found.state, options)
    name = inferred.class_name
    kwargs = inferred.kwargs
    state = found.state
    if inferred.diffusion is not None:
        kwargs = dict(network=dict(class_name=name, **kwargs), diffusion=inferred.diffusion,
                      clip=True, interpolate=name == 'ADMUNet')
        name = 'DiscreteDenoiser'
        state = {f'model.{key}': value for key, value in state.items()}
    net = rebuild_network(name, kwargs, state, found.path)
    encoder = 'sd-vae' if getattr(net, 'img_channels', 3) == 4 else 'rgb'
    return Snapshot(net, _encoder({'name': encoder}),
                    {'name': '', 'label_dim': getattr(net, 'label_dim', 0)},
                    {'source': os.path.basename(found.path), 'weights': found.weights,
                     'assumed': inferred.assumed})


def load_snapshot(path: str, device='cpu', sha256: str | None = None, options: dict | None = None,
                  weights: str | None = None, allow_nonfinite: bool = False) -> Snapshot:
    """Opens a network from a file, folder or URL, whatever made it: its content decides what it
    is.

    Snapshots of this project (.pkl, safetensors with JSON, diffusers folder), pickles of EDM and
    EDM2, state dicts of guided diffusion, checkpoints of class-balancing diffusion, wide residual
    networks; or `optimal:DATASET`, the closed-form denoiser of a data set.

    sha256            what the file must have
    options, weights  for state dicts, see `infer` and `identify`
    allow_nonfinite   take weights that are NaN or infinite too

    Raises UserError with one line that names the file.
    """
    if path.startswith('optimal:') and sha256 is None:
        from training.data.images import open_dataset
        from training.networks.optimal import optimal_denoiser
        dataset = open_dataset(path.removeprefix('optimal:'))
        return Snapshot(optimal_denoiser(dataset, device), encoders.RGBEncoder(),
                        dataset.description())
    found = identify(url.download(path, sha256=sha256), weights)
    if options and found.kind != 'weights':
        raise UserError(f'{path} describes its own network; leave out {", ".join(options)}')
    restore = {'snapshot': _restore, 'safetensors': _restore, 'edm': _restore_foreign,
               'weights': functools.partial(_restore_weights, options=options)}
    if found.kind not in restore:
        raise UserError(f'{path} holds no network; it is: {found.what}')
    snapshot = restore[found.kind](found)
    snapshot.net.to(device)
    if not allow_nonfinite:
        check_finite(snapshot.net.state_dict(), path)
    return snapshot


def load_denoiser(path: str, device='cpu', **options) -> Snapshot:
    """`load_snapshot` of a network that makes images; raises UserError for a classifier."""
    snapshot = load_snapshot(path, device, **options)
    if not hasattr(snapshot.net, 'img_channels'):
        raise UserError(f'{path} holds a classifier, which makes no images; '
                        'give the snapshot of a diffusion model')
    return snapshot
