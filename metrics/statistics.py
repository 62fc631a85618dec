"""Statistics of features, and the file that keeps them, in our layout and in published ones.

A file holds {space: {'mu': [D], 'sigma': [D, D], 'num': images, 'features': [n, D] or missing}},
`labels` [n] of the images whose features it has, `protocol`, and `meta` as JSON. The spaces are
those of `SPACES`.

- `.pkl`: a pickle of plain dictionaries and NumPy arrays, as EDM2 reads it;
- `.npz`: the same under `fd_dinov2/mu`, `fd_dinov2/sigma`, ... One space, `fid` if it is there,
  has the bare keys `mu`, `sigma`, `num`, `features`, and `space` names it; `sfid` has `mu_s` and
  `sigma_s`: what EDM, CBDM, guided diffusion and pytorch-fid read.

Read as well, and of the protocol that the layout tells: EDM2's `.pkl`, guided diffusion's `.npz`
(`arr_0`, with or without `mu`, `sigma`, `mu_s`, `sigma_s`), and what earlier versions wrote (which
always measured as `cbdm`). `mu` and `sigma` alone are written by EDM, CBDM and pytorch-fid alike:
such a file is of no protocol, and taken as of that of the images that it is compared with.
"""

import dataclasses
import json
import math
import os
import pickle
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from dnnlib import UserError, budget
from dnnlib.url import download
from dnnlib.util import atomic_path, publishable
from metrics.detectors import PROTOCOLS
from metrics.frechet import frechet_distance
from metrics.neighbors import check_finite
from torch_utils import distributed
from torch_utils.files.identify import NpzArrays, identify
from torch_utils.files.pickles import check_plain, errors_of

# Space -> (detector, its output): the kinds of features, named like the distance that uses them.
SPACES = {
    'fid': ('inception', 'pool3'),
    'sfid': ('inception', 'spatial'),
    'fd_dinov2': ('dinov2', 'features'),
    'fd_dinov2_base': ('dinov2_base', 'features'),
    'fd_clip': ('clip', 'features'),
    'fd_pixels': ('pixels', 'features'),
    'fd_own': ('own', 'features'),
    'softmax': ('inception', 'softmax'),
    'softmax_nobias': ('inception', 'softmax_nobias'),
}
# Detector -> the space of its usual features.
USUAL = {'inception': 'fid', 'dinov2': 'fd_dinov2', 'dinov2_base': 'fd_dinov2_base',
         'clip': 'fd_clip', 'pixels': 'fd_pixels', 'own': 'fd_own'}
_KEYS = ('mu', 'sigma', 'num', 'features', 'labels', 'meta', 'protocol', 'space')


@dataclasses.dataclass
class Gaussian:
    """Mean [D] and covariance [D, D], float64, of features of `num` images (None: not known)."""

    mu: np.ndarray
    sigma: np.ndarray
    num: int | None = None

    @property
    def dim(self) -> int:
        return len(self.mu)

    def distance(self, other: 'Gaussian', device=None) -> float:
        """See `frechet_distance`."""
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma, device)


class FeatureSums:
    """Streaming sum of z z^T, z = (x, 1), in float64 on `device`: of x x^T, of x, and of 1.

    `gaussian()` is mu = sum/N and Sigma = (sum x x^T - N mu mu^T)/(N - 1).
    """

    def __init__(self, device='cpu'):
        self.device = device
        self.sums = None

    def add(self, features: torch.Tensor):
        """Adds features [N, D]."""
        z = F.pad(features.to(self.device, torch.float64), [0, 1], value=1)
        if self.sums is None:
            self.sums = z.new_zeros(z.shape[1], z.shape[1])
        self.sums.addmm_(z.T, z)

    def all_reduce(self):
        """Adds up the sums of all processes, of which some may have seen no image."""
        dims = distributed.gather_objects(0 if self.sums is None else len(self.sums) - 1)
        self.add(torch.zeros(0, max(dims)))
        distributed.all_reduce_sum(self.sums)

    def gaussian(self) -> Gaussian:
        """Raises UserError for fewer than two images and for features that are not finite."""
        total = self.sums[-1, :-1]
        num = int(self.sums[-1, -1])
        if num < 2:
            raise UserError(f'a covariance needs at least 2 images, and there is only {num}')
        sigma = (self.sums[:-1, :-1] - torch.outer(total, total / num)) / (num - 1)
        check_finite(sigma)
        return Gaussian((total / num).cpu().numpy(), sigma.cpu().numpy(), num)


@dataclasses.dataclass
class Statistics:
    """What is known of a set of images, by space.

    path       where they come from, for messages
    gaussians  of all images
    features   float32 [n, D] on the CPU, of all images or of some
    labels     int64 [n], class ids of the images whose features are here, or None
    images     path of the images, from which what is missing can be measured; or None
    protocol   key of PROTOCOLS by which Inception saw the images; None: not known
    meta       plain values: data set, detectors and the fingerprints of their weights
    samples    float32 [m, D], features of some of the images, for standard errors; in no file
    """

    path: str = ''
    gaussians: dict[str, Gaussian] = dataclasses.field(default_factory=dict)
    features: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    labels: torch.Tensor | None = None
    images: str | None = None
    protocol: str | None = None
    meta: dict = dataclasses.field(default_factory=dict)
    samples: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def of_classes(self, classes, device='cpu') -> 'Statistics':
        """Those of the images of some classes, from their features."""
        rows = torch.isin(self.labels, torch.as_tensor(classes))
        features = {space: values[rows] for space, values in self.features.items()}
        gaussians = {}
        for space in self.gaussians.keys() & features.keys():
            sums = FeatureSums(device)
            for part in features[space].split(4096):
                sums.add(part)
            gaussians[space] = sums.gaussian()
        return dataclasses.replace(self, gaussians=gaussians, features=features,
                                   labels=self.labels[rows], images=None)


# --- Files --------------------------------------------------------------------------------------


ENDINGS = ('.pkl', '.pt', '.npz')


def is_statistics(path: str) -> bool:
    """Whether there are statistics in a file. Raises what `load_statistics` does."""
    return bool(load_statistics(path).gaussians)


def check_destination(dest: str, endings=ENDINGS):
    """Raises UserError unless `save_statistics` can write a file of this name."""
    if os.path.splitext(dest)[1].lower() not in endings:
        raise UserError(f'{dest}: the name must end in {" or ".join(endings)}')
    if os.path.isdir(dest):
        raise UserError(f'{dest} is a folder; give the name of a file')


def save_statistics(dest: str, statistics: Statistics):
    """Writes a .pkl or .npz file that appears only when complete (not the path of images).

    The same statistics make the same bytes.
    """
    check_destination(dest)
    content = {'protocol': statistics.protocol, 'meta': json.dumps(publishable(statistics.meta)),
               'labels': statistics.labels if statistics.features else None}
    tables = {space: vars(gaussian) | {'features': statistics.features.get(space)}
              for space, gaussian in statistics.gaussians.items()}
    if dest.lower().endswith('.npz'):
        content['space'] = min(tables, key=lambda space: space != 'fid')
        tables = {_bare_name(space, key, content['space']): value
                  for space, table in tables.items() for key, value in table.items()}
    content = _arrays(content | tables)
    with atomic_path(dest) as temp, open(temp, 'wb') as file:
        if 'space' in content:
            np.savez(file, **content)
        else:
            # Every version of NumPy finds its arrays by the former name of their module.
            data = pickle.dumps(content, 3)
            file.write(data.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n'))


def _bare_name(space: str, key: str, bare: str) -> str:
    """The name in an .npz: of sFID guided diffusion's, of the space `bare` the key alone."""
    if space == 'sfid':
        return f'{key}_s'
    return key if space == bare else f'{space}/{key}'


def _arrays(value):
    """Dictionaries without what is None, and tensors as arrays."""
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items() if item is not None}
    return value.numpy() if isinstance(value, torch.Tensor) else value


def load_statistics(path: str, sha256: str | None = None, space: str = 'fid',
                    holds_images: Callable = lambda path: False) -> Statistics:
    """Statistics of a file or URL; or a folder, zip or .npz of images, yet to be measured.

    What a file is, its content decides. No code from it is run. `sha256` is what the file must
    have, `space` that of `mu` and `sigma` in a file that does not say. `holds_images` knows paths
    of images in other layouts (see training.data.images). Raises UserError that names the file.
    """
    local = download(path, sha256=sha256)
    if holds_images(path):
        return Statistics(path, images=local)
    found = identify(local)
    if found.kind not in ('statistics', 'samples', 'images', 'folder'):
        raise UserError(f'{path}: it is a {found.what}, neither reference statistics (.pkl, .npz) '
                        'nor images (folder, .zip, .npz)')
    if found.content is None:
        return Statistics(path, images=local)
    with errors_of(path):
        return _parse(path, local, found.content, space)


def _parse(path: str, local: str, content, space: str) -> Statistics:
    """Statistics of any layout; `space` is that of its bare keys."""
    statistics = Statistics(path)
    if isinstance(content, NpzArrays):
        statistics.images = local if 'arr_0' in content else None
        content = _nested(content)
    # Without a name it is of the family that has this layout.
    family = ('cbdm' if 'meta' in content else 'adm' if statistics.images or 'sfid' in content
              else None if 'mu' in content else 'edm')
    statistics.protocol = str(_array(content['protocol'])) if 'protocol' in content else family
    meta = content.get('meta', {})
    meta = meta if isinstance(meta, dict) else budget.parse_json(str(_array(meta)).encode())
    statistics.meta = check_plain(meta, 'its part meta')
    if 'detector' in statistics.meta:  # make_stats.py, up to November 2026
        detector = statistics.meta['detector']
        space = USUAL[detector]
        statistics.meta['detectors'] = {
            detector: {key: statistics.meta.get(key) for key in ('weights', 'fingerprint')}}
    if 'mu' in content:
        content = content | {str(_array(content.get('space', space))): content}
    if content.get('labels') is not None:
        statistics.labels = torch.from_numpy(_numbers(content['labels'])).long()
    sound = statistics.protocol in (None, *PROTOCOLS)
    finite = True
    for space, table in content.items():
        if not isinstance(table, dict) or not {'mu', 'sigma'} & table.keys():
            continue
        mu, sigma = (_numbers(table.get(key)).astype(np.float64) for key in ('mu', 'sigma'))
        sound = sound and mu.ndim == 1 and mu.size and sigma.shape == mu.shape * 2
        finite = finite and np.isfinite(mu).all() and np.isfinite(sigma).all()
        if sound and finite and not _is_covariance(sigma):
            raise UserError(f'{path}: its sigma is no covariance (not symmetric, or with a '
                            'negative variance); make it again')
        if table.get('features') is not None:
            features = torch.from_numpy(_numbers(table['features'])).float()
            rows = features if statistics.labels is None else statistics.labels
            sound = sound and features.shape == (len(rows), len(mu))
            finite = finite and torch.isfinite(features).all()
            statistics.features[space] = features
        num = table.get('num')
        statistics.gaussians[space] = Gaussian(mu, sigma, None if num is None else int(num))
    if not sound:
        raise UserError(f'{path}: its arrays have other shapes than mu [D], sigma [D, D], '
                        'features [n, D] and labels [n], or its protocol is none of '
                        f'{",".join(PROTOCOLS)}')
    if not finite:
        raise UserError(f'{path}: its statistics hold NaN or infinite numbers; make it again')
    if not statistics.gaussians and statistics.images is None:
        raise UserError(f'{path}: no statistics (mu and sigma) in this file')
    return statistics


def _array(value) -> np.ndarray:
    """An array or a text as an array that can be written to. Lists may be endless: ValueError."""
    if not isinstance(value, str | np.ndarray | torch.Tensor):
        raise ValueError(f'a {type(value).__name__} instead of an array')
    if not isinstance(value, str):
        budget.spend(memory=8 * math.prod(value.shape))     # one may be in many spaces
    return np.require(value, requirements='W')


def _numbers(value) -> np.ndarray:
    array = _array(value)
    if array.dtype.kind not in 'biuf':
        raise ValueError(f'{array.dtype} instead of numbers')
    return array


def _is_covariance(sigma: np.ndarray) -> bool:
    """Whether sigma [D, D] is symmetric, with variances, up to what is lost in float32."""
    slack = 1e-4 * np.abs(sigma.diagonal()).max()
    return np.abs(sigma - sigma.T).max() <= slack and sigma.diagonal().min() >= -slack


def _nested(arrays: NpzArrays) -> dict:
    """The content of an .npz in the layout of a .pkl, but for its bare keys."""
    content = {}
    for name in arrays.facts:
        space, _, key = name.rpartition('/')
        if key.endswith('_s'):
            space, key = 'sfid', key.removesuffix('_s')
        if key in _KEYS:
            (content.setdefault(space, {}) if space else content)[key] = arrays[name]
    return content
