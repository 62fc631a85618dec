"""Snapshots: a network with everything that is needed to sample from it, as plain tensors and containers.

A snapshot is a dictionary of plain values written by `torch.save` and read with `weights_only=True`, so opening one
never runs code from the file. Keys: `format`, `network` (class name and keyword arguments), `state` (parameters in half
precision by default, buffers as they are), `encoder`, `dataset` (description of the training set), `recipe`, `nimg` and
`ema_std`.
"""

import dataclasses
import os
import zipfile

import torch

from dnnlib import UserError
from dnnlib.util import atomic_path
from torch_utils import foreign, persistence
from training import encoders
from training.networks import build_network

FORMAT = 'diffusion-snapshot-1'
_VAE_SETTINGS = ('vae_name', 'raw_mean', 'raw_std', 'final_mean', 'final_std')


@dataclasses.dataclass
class Snapshot:
    """A network ready to sample: `net` in eval mode, float32, gradients off; what it was trained on and how."""

    net: torch.nn.Module
    encoder: object
    dataset: dict = dataclasses.field(default_factory=dict)
    recipe: dict = dataclasses.field(default_factory=dict)
    nimg: int = 0
    ema_std: float | None = None


def save_snapshot(path, net, *, encoder, dataset, recipe, nimg, ema_std=None, dtype=torch.float16):
    """Writes a snapshot; `path` appears only when complete. `net` must come from `build_network`.

    Parameters are stored as `dtype`, buffers (frequencies, filters, statistics) as they are.
    """
    parameters = {name for name, _ in net.named_parameters()}
    state = {name: (value.to(dtype) if name in parameters and value.is_floating_point() else value).detach().cpu()
             for name, value in net.state_dict().items()}
    write_state(path, {
        'format': FORMAT,
        'network': {'class_name': type(net).__name__, 'kwargs': net.init_kwargs},
        'state': state, 'encoder': encoder.config(), 'dataset': dataset, 'recipe': recipe,
        'nimg': int(nimg), 'ema_std': ema_std,
    })


def write_state(path, state: dict):
    """torch.save to a file that appears only when complete."""
    with atomic_path(path) as temp:
        torch.save(state, temp)


def read_state(path: str) -> dict:
    """A dictionary of plain tensors and containers from a file of `torch.save`; raises UserError for anything else."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file')
    try:
        # mmap: the weights are read when they are used; only torch's zip format allows it.
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip and torch all have errors of their own for broken and foreign files
        reason = str(error).strip().split('\n')[0][:200]
        raise UserError(f'{path}: not a file of plain tensors written by this project, or damaged ({reason})') from None


def read_snapshot(path: str) -> dict:
    """The dictionary of a snapshot file, as `save_snapshot` wrote it."""
    state = read_state(path)
    if not isinstance(state, dict) or state.get('format') != FORMAT:
        raise UserError(f'{path}: not a network snapshot (format {FORMAT})')
    return state


def restore(state: dict, path: str, device='cpu') -> Snapshot:
    """Builds the network and the encoder that a snapshot's dictionary describes."""
    net = build_network(state['network']['class_name'], **state['network']['kwargs'])
    try:
        net.load_state_dict(state['state'])
    except RuntimeError as error:
        raise UserError(f'{path}: weights do not fit the network ({str(error).splitlines()[-1].strip()})') from None
    net = net.eval().requires_grad_(False).to(device)
    return Snapshot(net, encoders.make_encoder(state['encoder']), state['dataset'], state['recipe'],
                    state['nimg'], state['ema_std'])


def restore_foreign(path: str, device='cpu') -> Snapshot:
    """A network of EDM or EDM2 from its pickle, built with this project's classes; the file's source is never run."""
    try:
        content = persistence.read(path)
        ema, encoder = content['ema'], content.get('encoder')
        net = build_network(ema.class_name, **ema.kwargs)
        net.load_state_dict(persistence.state_dict(ema))
    except (foreign.ForeignPickleError, RuntimeError) as error:
        raise UserError(f'{path}: {str(error).splitlines()[-1].strip()}') from None
    config = {'name': 'rgb'}
    if encoder is not None and encoder.class_name == 'StabilityVAEEncoder':
        config = {'name': 'sd-vae'} | {key: encoder.kwargs[key] for key in _VAE_SETTINGS if key in encoder.kwargs}
    elif encoder is not None and encoder.class_name != 'StandardRGBEncoder':
        raise UserError(f'{path}: unknown encoder {encoder.class_name}')
    trained_on = content.get('dataset_kwargs') or {}
    dataset = {'name': os.path.basename(str(trained_on.get('path', ''))).removesuffix('.zip'), 'label_dim': net.label_dim}
    return Snapshot(net.eval().requires_grad_(False).to(device), encoders.make_encoder(config), dataset)


def load_snapshot(path: str, device='cpu') -> Snapshot:
    """Opens `path`: a snapshot of this project, or of EDM or EDM2, from a file or URL; or `optimal:DATASET`, the
    closed-form denoiser of a data set."""
    if path.startswith('optimal:'):
        from training.data.dataset import ImageDataset
        from training.networks.optimal import optimal_denoiser
        dataset = ImageDataset(path.removeprefix('optimal:'))
        return Snapshot(optimal_denoiser(dataset, device), encoders.make_encoder({'name': 'rgb'}), dataset.description())
    if '://' in path:
        from dnnlib.url import download
        path = download(path)
    if os.path.isfile(path) and not zipfile.is_zipfile(path):  # snapshots of this project are zips of torch.save
        return restore_foreign(path, device)
    return restore(read_snapshot(path), path, device)


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
