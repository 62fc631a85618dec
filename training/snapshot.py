"""Snapshots: a network with everything that is needed to sample from it, as plain tensors and containers.

A snapshot is a dictionary of plain values written by `torch.save` and read with `weights_only=True`, so opening one
never runs code from the file. Keys: `format`, `network` (class name and keyword arguments), `state` (parameters in half
precision by default, buffers as they are), `encoder`, `dataset` (description of the training set), `recipe`, `nimg`,
`ema_std` and `sampler` (how it is sampled: name and options of a sampler, see training.diffusion.samplers).
"""

import dataclasses
import os
import re
import sys
from typing import NamedTuple

import torch

from dnnlib import UserError, url
from dnnlib.util import atomic_path
from torch_utils.files import persistence, torchfile
from torch_utils.files.identify import Found, identify
from torch_utils.files.own import SNAPSHOT_FORMAT, read_own
from torch_utils.files.pickles import ForeignPickleError, errors_of
from training import encoders
from training.diffusion.samplers import family_sampler
from training.networks import check_arguments, rebuild_network
from training.networks.infer import infer

FORMAT = SNAPSHOT_FORMAT
read_state = read_own
_VAE_SETTINGS = ('vae_name', 'raw_mean', 'raw_std', 'final_mean', 'final_std')


@dataclasses.dataclass
class Snapshot:
    """A network ready to sample: `net` in eval mode, float32, gradients off; what it was trained on and how.

    `sampler` is a name with options; where none was stored, that of the network's family. None for classifiers.
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


def describe(net, *, encoder, dataset, recipe, sampler=None) -> dict:
    """What a snapshot says besides its weights. `net` must come from `build_network`.

    sampler  of the recipe, `{'name': 'edm', 'num_steps': 18, ...}`; None: that of the network's family
    """
    return {
        'format': FORMAT, 'network': {'class_name': net.class_name, 'kwargs': net.init_kwargs},
        'encoder': encoder.config(), 'dataset': dataset, 'recipe': recipe, 'sampler': sampler,
        'ema_std': None}


def save_snapshot(path, net, *, nimg, ema_std=None, dtype=torch.float16, **description):
    """Writes a snapshot; `path` appears only when complete.

    Parameters are stored as `dtype`, buffers (frequencies, filters, statistics) as they are. For
    `description` see `describe`.
    """
    parameters = {name for name, _ in net.named_parameters()}
    state = {}
    for name, value in net.state_dict().items():
        stored = dtype if name in parameters and value.is_floating_point() else value.dtype
        state[name] = value.to(stored).detach().cpu()
    write_state(path, describe(net, **description) | {
        'state': state, 'nimg': int(nimg), 'ema_std': ema_std})


# --- Names of files -------------------------------------------------------------------------------

_NAME = re.compile(r'(?P<prefix>.+?)-(?P<kimg>\d{7,})(?:-(?P<average>[\d.]+))?\.pkl')
PREFIX = 'network-snapshot'


def snapshot_name(nimg: int, suffix: str = '', prefix: str = PREFIX) -> str:
    """`network-snapshot-<kimg>[-<average>].pkl`."""
    return f'{prefix}-{nimg // 1000:07d}{suffix}.pkl'


class SnapshotFile(NamedTuple):
    """What the name of a snapshot says: thousands of images, and which average ('' if there is one)."""

    path: str
    prefix: str
    kimg: int
    average: str


def list_snapshots(folder: str, prefix: str | None = PREFIX) -> list[SnapshotFile]:
    """Snapshots of a run, by time and average; `prefix=None`: whatever they are called."""
    matches = [match for match in map(_NAME.fullmatch, os.listdir(folder))
               if match and prefix in (None, match['prefix'])]
    files = [SnapshotFile(os.path.join(folder, match[0]), match['prefix'], int(match['kimg']),
                          match['average'] or '') for match in matches]
    return sorted(files, key=lambda file: (file.kimg, file.average))


# --- Reading and writing --------------------------------------------------------------------------


def write_state(path, state: dict):
    """torch.save to a file that appears only when complete. Equal states give equal bytes."""
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        torch.save(state, file)  # given a path, it would write the temporary name into the file


def read_snapshot(path: str) -> dict:
    """The dictionary of a snapshot file, as `save_snapshot` wrote it."""
    found = identify(path)
    if found.kind not in ('snapshot', 'safetensors'):
        raise UserError(f'{path}: not a network snapshot (format {FORMAT}) but {found.what}')
    return found.content


def restore(state: dict, path: str, device='cpu') -> Snapshot:
    """Builds the network and the encoder that a snapshot's dictionary describes."""
    weights = torchfile.state_of(state['state'], sys.maxsize)
    net = rebuild_network(state['network']['class_name'], state['network']['kwargs'], weights, path).to(device)
    sampler = state.get('sampler')
    for part, value in (('encoder', state['encoder']), ('sampler', sampler)):
        try:
            check_arguments(value)
        except ValueError as error:
            raise UserError(f'{path}: its {part} is malformed ({error})') from None
    if not isinstance(sampler, dict | None) or sampler is not None and not isinstance(sampler.get('name'), str):
        raise UserError(f'{path}: its sampler is malformed')
    return Snapshot(net, encoders.make_encoder(state['encoder']), state['dataset'], state['recipe'],
                    state['nimg'], state['ema_std'], sampler)


def restore_foreign(found: Found, device='cpu') -> Snapshot:
    """The network of a pickle of EDM or EDM2, built with this project's classes; the file's source is never run."""
    path, ema, encoder = found.path, found.content['ema'], found.content.get('encoder')
    with errors_of(path):
        net = rebuild_network(ema.class_name, ema.kwargs, found.state, path)
        config = {'name': 'rgb'}
        kind = encoder.class_name if isinstance(encoder, persistence.Persistent) else None
        if kind == 'StabilityVAEEncoder':
            config = {'name': 'sd-vae'} | {key: encoder.kwargs[key] for key in _VAE_SETTINGS if key in encoder.kwargs}
            check_arguments(config)
        elif encoder is not None and kind != 'StandardRGBEncoder':
            raise ForeignPickleError(f'unknown encoder {kind}')
    trained_on = found.content.get('dataset_kwargs')
    name = trained_on.get('path') if isinstance(trained_on, dict) else None
    name = os.path.basename(name[:1000]).removesuffix('.zip') if isinstance(name, str) else ''
    return Snapshot(net.to(device), encoders.make_encoder(config), {'name': name, 'label_dim': net.label_dim})


def restore_weights(found: Found, options: dict | None = None, device='cpu') -> Snapshot:
    """The network of a state dict of guided diffusion, class-balancing diffusion or a wide residual network.

    Its arguments follow from names and shapes (see training.networks.infer); `options` sets those that do not. The
    first two become denoisers (training.networks.discrete). What was assumed is in `recipe['assumed']`.
    """
    path = found.path
    with errors_of(path):
        made = infer(found.state, options)
    name, kwargs, state = made.class_name, made.kwargs, found.state
    if made.diffusion is not None:
        kwargs = dict(network=dict(class_name=name, **kwargs), diffusion=made.diffusion, clip=True,
                      interpolate=name == 'ADMUNet')
        name, state = 'DiscreteDenoiser', {f'model.{key}': value for key, value in state.items()}
    net = rebuild_network(name, kwargs, state, path).to(device)
    dataset = {'name': '', 'label_dim': getattr(net, 'label_dim', 0)}
    return Snapshot(net, encoders.make_encoder({'name': 'rgb'}), dataset, dict(source=os.path.basename(path), **{
        key: value for key, value in dict(weights=found.weights, assumed=made.assumed).items() if value}))


def load_snapshot(path: str, device='cpu', sha256: str | None = None, options: dict | None = None,
                  weights: str | None = None) -> Snapshot:
    """Opens a network from a file, folder or URL, whatever made it: its content decides what it is.

    Snapshots of this project (.pkl, safetensors with JSON, diffusers folder), pickles of EDM and EDM2, state dicts of
    guided diffusion, checkpoints of class-balancing diffusion, wide residual networks; or `optimal:DATASET`, the
    closed-form denoiser of a data set. `sha256` is what a download must have; `options` and `weights` are for state
    dicts (see `restore_weights` and `identify`). Raises UserError with one line that names the file.
    """
    if path.startswith('optimal:'):
        from training.data.dataset import ImageDataset
        from training.networks.optimal import optimal_denoiser
        dataset = ImageDataset(path.removeprefix('optimal:'))
        return Snapshot(optimal_denoiser(dataset, device), encoders.make_encoder({'name': 'rgb'}), dataset.description())
    found = identify(url.download(path, sha256=sha256), weights)
    if options and found.kind != 'weights':
        raise UserError(f'{path} describes its own network; leave out {", ".join(options)}')
    if found.kind in ('snapshot', 'safetensors'):
        return restore(found.content, path, device)
    if found.kind == 'edm':
        return restore_foreign(found, device)
    if found.kind == 'weights':
        return restore_weights(found, options, device)
    raise UserError(f'{path} holds no network; it is {_an(found.what)}')


def load_denoiser(path: str, device='cpu', **options) -> Snapshot:
    """`load_snapshot` of a network that makes images; raises UserError for a classifier."""
    snapshot = load_snapshot(path, device, **options)
    if not hasattr(snapshot.net, 'img_channels'):
        raise UserError(f'{path} holds a classifier, which makes no images; give the snapshot of a diffusion model')
    return snapshot


def _an(text: str) -> str:
    return f'{"an" if text[0] in "aeiou" else "a"} {text}'


def copy_weights(source: torch.nn.Module, net: torch.nn.Module, path: str) -> tuple[int, int]:
    """Takes over from `source`, the network of the snapshot `path`, what has the same name in `net`.

    Returns (tensors taken, tensors of `net`). Raises UserError if none is, or one differs in shape.
    """
    theirs, ours = source.state_dict(), net.state_dict()
    common = [name for name in ours if name in theirs]
    for name in common:
        if theirs[name].shape != ours[name].shape:
            raise UserError(f'{path}: {name} is {list(theirs[name].shape)} instead of {list(ours[name].shape)}; '
                            'train with the architecture, image size and classes of the snapshot')
    if not common:
        raise UserError(f'{path} has nothing in common with this network; train with the architecture of the snapshot')
    with torch.no_grad():
        for name in common:
            ours[name].copy_(theirs[name])
    return len(common), len(ours)
