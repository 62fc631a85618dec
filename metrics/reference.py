"""Reference statistics: one file for every kind of feature, in this project's layout and in the published ones.

Ours is {space: {'mu': [D], 'sigma': [D, D], 'num': images, 'features': [n, D] or missing}, 'meta': {...}} with the
spaces `fid`, `sfid`, `fd_dinov2`, `fd_pixels` (the metric they serve; `fid` is Inception's pool3):

- `.pkl`, `.pt`: written by torch.save as plain tensors and containers, read with weights_only=True;
- `.npz`: the same under the keys `fid/mu`, `fid/sigma`, `fid/num`, `fid/features`, ..., and `meta` as JSON.

Read as well: EDM2's `.pkl` ({'fid': {'mu', 'sigma'}, 'fd_dinov2': ...} of numpy arrays), EDM's and CBDM's `.npz` (`mu`,
`sigma`) and the reference batches of guided diffusion (`arr_0`, with or without `mu`, `sigma`, `mu_s`, `sigma_s`).
"""

import dataclasses
import json
import os

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.url import download
from dnnlib.util import atomic_path
from metrics.statistics import Gaussian
from torch_utils.files.identify import NpzArrays, identify
from torch_utils.files.own import STATISTICS_FORMAT

FORMAT = STATISTICS_FORMAT

# EDM's and guided diffusion's names of mean and covariance.
_FLAT = {'fid': ('mu', 'sigma'), 'sfid': ('mu_s', 'sigma_s')}


@dataclasses.dataclass
class Reference:
    """What images are compared with: statistics and features by space, and `images`, the path of the pictures themselves
    where the reference has them (then all that is missing can be measured); `labels`: class ids of measured images."""

    path: str
    gaussians: dict[str, Gaussian] = dataclasses.field(default_factory=dict)
    features: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    images: str | None = None
    meta: dict = dataclasses.field(default_factory=dict)
    labels: torch.Tensor | None = None


def check_destination(dest: str):
    """Raises UserError unless `save_reference` can write a file of this name."""
    if os.path.splitext(dest)[1].lower() not in ('.pkl', '.pt', '.npz'):
        raise UserError(f'--dest={dest}: the name must end in .pkl or .npz')
    if os.path.isdir(dest):
        raise UserError(f'--dest={dest} is a folder; give the name of a file')


def save_reference(dest: str, reference: Reference):
    """Writes statistics, features and meta to a .pkl or .npz file that appears only when complete."""
    check_destination(dest)
    spaces = {}
    for space, gaussian in reference.gaussians.items():
        spaces[space] = {'mu': gaussian.mu, 'sigma': gaussian.sigma, 'num': gaussian.num}
        if space in reference.features:
            spaces[space]['features'] = reference.features[space].numpy()
    with atomic_path(dest) as temp:
        if dest.lower().endswith('.npz'):
            flat = {f'{space}/{key}': value for space, values in spaces.items() for key, value in values.items()}
            with open(temp, 'wb') as file:
                np.savez(file, meta=np.array(json.dumps(reference.meta)), **flat)
        else:
            tensors = {space: {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                               for key, value in values.items()} for space, values in spaces.items()}
            torch.save({'format': FORMAT, **tensors, 'meta': reference.meta}, temp)


def load_reference(path: str, sha256: str | None = None) -> Reference:
    """Opens reference statistics (file or URL), or a folder, zip or .npz of pictures as a reference to be measured.

    What a file is, its content decides. No code from it is run. `sha256` is what a download must have. Raises UserError
    that names the file otherwise.
    """
    local = download(path, sha256=sha256)
    if not os.path.exists(local):
        raise UserError(f'--ref={path}: no such file; make it with calculate_metrics.py ref')
    try:
        found = identify(local)
        if found.kind in ('images', 'folder'):
            return Reference(path, images=local)
        if isinstance(found.content, NpzArrays):
            return _read_npz(path, found.content)
        if found.kind == 'statistics':
            return _from_nested(path, found.content)
    except UserError as error:
        raise UserError(f'--ref={path}: not reference statistics (.pkl, .npz) and not images (folder, .zip, .npz), or '
                        f'damaged: {str(error).removeprefix(local + ": ").removeprefix(f"--ref={path}: ")}') from None
    except Exception as error:  # NumPy and zip have errors of their own for damaged arrays
        raise UserError(f'--ref={path}: damaged ({" ".join(str(error).split())[:120]})') from None
    raise UserError(f'--ref={path}: it is a {found.what}, not reference statistics')


def _from_nested(path, content) -> Reference:
    reference = Reference(path)
    if isinstance(content, dict):
        for space, values in content.items():
            if isinstance(values, dict) and {'mu', 'sigma'} <= values.keys():
                _add(reference, space, values)
        if 'mu' in content and 'sigma' in content:
            _add(reference, 'fid', content)
        if isinstance(content.get('meta'), dict):
            reference.meta = content['meta']
    return _checked(reference)


def _read_npz(path, arrays) -> Reference:
    reference, names = Reference(path), arrays.descriptions.keys()
    for space in sorted({key.split('/')[0] for key in names if '/' in key}):
        _add(reference, space, {key: arrays[f'{space}/{key}'] for key in ('mu', 'sigma', 'num', 'features')
                                if f'{space}/{key}' in names})
    for space, (mu, sigma) in _FLAT.items():
        if {mu, sigma} <= names:
            _add(reference, space, {'mu': arrays[mu], 'sigma': arrays[sigma]})
    if 'meta' in names:
        reference.meta = json.loads(str(arrays['meta']))
    if 'arr_0' in names:
        reference.images = arrays.path
    return _checked(reference)


def _add(reference: Reference, space: str, values: dict):
    if not {'mu', 'sigma'} <= values.keys():
        raise UserError(f'--ref={reference.path}: {space} has no mu and sigma')
    try:
        mu, sigma = (np.asarray(values[key], dtype=np.float64) for key in ('mu', 'sigma'))
    except (TypeError, ValueError):
        raise UserError(f'--ref={reference.path}: mu and sigma of {space} are no arrays of numbers') from None
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise UserError(f'--ref={reference.path}: {space} has mu {list(mu.shape)} and sigma {list(sigma.shape)} '
                        'instead of [D] and [D, D]')
    num = values.get('num')
    reference.gaussians[space] = Gaussian(mu, sigma, None if num is None else int(num))
    if values.get('features') is not None:
        features = torch.as_tensor(values['features']).float()
        if features.ndim != 2 or features.shape[1] != len(mu):
            raise UserError(f'--ref={reference.path}: {space} has features {list(features.shape)} instead of [n, {len(mu)}]')
        reference.features[space] = features


def _checked(reference: Reference) -> Reference:
    if not reference.gaussians and not reference.images:
        raise UserError(f'--ref={reference.path}: no statistics (mu and sigma) in this file')
    return reference
