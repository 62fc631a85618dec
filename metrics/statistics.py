"""Statistics of features, and the file that keeps them, in our layout and in published ones.

A file holds {space: {'mu': [D], 'sigma': [D, D], 'num': images, 'features': [n, D] or missing}},
`labels` [n] of the images whose features it has, and `meta`. The spaces are those of `SPACES`.

- `.pkl`, `.pt`: written by torch.save as plain tensors and containers;
- `.npz`: the same under `fid/mu`, `fid/sigma`, ..., and `meta` as JSON. Where there is one space
  only, its name is under `space` and the keys are `mu`, `sigma`, `num`, `features`, so that other
  programs find what they know.

Read as well: EDM2's `.pkl` ({'fid': {'mu', 'sigma'}, 'fd_dinov2': ...} of NumPy arrays), EDM's and
CBDM's `.npz` (`mu`, `sigma`), guided diffusion's (`arr_0`, with or without `mu`, `sigma`, `mu_s`,
`sigma_s`), and what earlier versions wrote (`fid/mu` for one space too; `meta` with the detector).
"""

import dataclasses
import json
import os

import numpy as np
import torch
from torch.nn import functional as F

from dnnlib import UserError
from dnnlib.url import download
from dnnlib.util import atomic_path
from metrics.frechet import frechet_distance
from torch_utils import distributed
from torch_utils.files.identify import NpzArrays, identify
from torch_utils.files.own import STATISTICS_FORMAT

# Space -> (detector, its output): the kinds of features, named like the distance that uses them.
SPACES = {
    'fid': ('inception', 'pool3'),
    'sfid': ('inception', 'spatial'),
    'fd_dinov2': ('dinov2', 'features'),
    'fd_pixels': ('pixels', 'features'),
    'softmax': ('inception', 'softmax'),
    'softmax_nobias': ('inception', 'softmax_nobias'),
}
# Detector -> the space of its usual features.
USUAL = {'inception': 'fid', 'dinov2': 'fd_dinov2', 'pixels': 'fd_pixels'}
# Guided diffusion's names.
_SPATIAL = {'mu_s': 'sfid/mu', 'sigma_s': 'sfid/sigma'}
_KEYS = ('mu', 'sigma', 'num', 'features')


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
        if not torch.isfinite(sigma).all():
            raise UserError('the features hold NaN or infinite numbers; '
                            'are the weights of the detector damaged?')
        return Gaussian((total / num).cpu().numpy(), sigma.cpu().numpy(), num)


@dataclasses.dataclass
class Statistics:
    """What is known of a set of images, by space.

    path       where they come from, for messages
    gaussians  of all images
    features   float32 [n, D] on the CPU, of all images or of some
    labels     int64 [n], class ids of the images whose features are here, or None
    images     path of the images, from which what is missing can be measured; or None
    meta       plain values: data set, detectors and the fingerprints of their weights
    """

    path: str = ''
    gaussians: dict[str, Gaussian] = dataclasses.field(default_factory=dict)
    features: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    labels: torch.Tensor | None = None
    images: str | None = None
    meta: dict = dataclasses.field(default_factory=dict)

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


def check_destination(dest: str, endings=('.pkl', '.pt', '.npz')):
    """Raises UserError unless `save_statistics` can write a file of this name."""
    if os.path.splitext(dest)[1].lower() not in endings:
        raise UserError(f'{dest}: the name must end in {" or ".join(endings)}')
    if os.path.isdir(dest):
        raise UserError(f'{dest} is a folder; give the name of a file')


def save_statistics(dest: str, statistics: Statistics):
    """Writes a .pkl or .npz file that appears only when complete (not the path of images)."""
    check_destination(dest)
    content = {}
    for space, gaussian in statistics.gaussians.items():
        content[space] = {'mu': torch.from_numpy(gaussian.mu),
                          'sigma': torch.from_numpy(gaussian.sigma), 'num': gaussian.num}
        if space in statistics.features:
            content[space]['features'] = statistics.features[space]
    labels = {}
    if statistics.features and statistics.labels is not None:
        labels['labels'] = statistics.labels
    with atomic_path(dest) as temp, open(temp, 'wb') as file:
        if not dest.lower().endswith('.npz'):
            content |= {'format': STATISTICS_FORMAT, 'meta': statistics.meta}
            torch.save(content | labels, file)
            return
        arrays = {f'{space}/{key}': value for space, values in content.items()
                  for key, value in values.items()}
        if len(content) == 1:
            arrays = content[space] | {'space': space}
        np.savez(file, meta=json.dumps(statistics.meta), **labels, **arrays)


def load_statistics(path: str, sha256: str | None = None, space: str = 'fid') -> Statistics:
    """Statistics of a file or URL; or a folder, zip or .npz of images, yet to be measured.

    What a file is, its content decides. No code from it is run. `sha256` is what a download must
    have, `space` that of `mu` and `sigma` in a file that does not say. Raises UserError that names
    the file.
    """
    local = download(path, sha256=sha256)
    found = identify(local)
    content = found.content
    if found.kind in ('images', 'folder'):
        return Statistics(path, images=local)
    if found.kind not in ('statistics', 'samples'):
        raise UserError(f'{path}: it is a {found.what}, neither reference statistics (.pkl, .npz) '
                        'nor images (folder, .zip, .npz)')
    statistics = Statistics(path)
    try:
        if isinstance(content, NpzArrays):
            statistics.images = local if 'arr_0' in content else None
            content = _nested(content, space)
        return _parse(statistics, content, space)
    except UserError:
        raise
    except Exception as error:  # NumPy and zip have errors of their own for damaged arrays
        reason = ' '.join(str(error).split())[:120]
        raise UserError(f'{path}: damaged ({reason})') from None


def _nested(arrays: NpzArrays, sole: str) -> dict:
    """The content of an .npz in the layout of a .pkl."""
    meta = json.loads(str(arrays['meta'])) if 'meta' in arrays else {}
    if 'space' in arrays:
        sole = str(arrays['space'])
    elif 'detector' in meta:  # make_stats.py, up to November 2026
        sole = USUAL[meta['detector']]
        meta['detectors'] = {meta['detector']: {key: meta.get(key)
                                                for key in ('weights', 'fingerprint')}}
    content = {'meta': meta}
    for name in arrays.facts:
        space, _, key = _SPATIAL.get(name, name).rpartition('/')
        if key in _KEYS:
            content.setdefault(space or sole, {})[key] = arrays[name]
    if 'labels' in arrays:
        content['labels'] = arrays['labels']
    return content


def _parse(statistics: Statistics, content: dict, sole: str) -> Statistics:
    if 'mu' in content:
        content = {sole: content}
    if content.get('labels') is not None:
        statistics.labels = torch.as_tensor(content['labels']).long()
    if isinstance(content.get('meta'), dict):
        statistics.meta = content['meta']
    for space, values in content.items():
        if not isinstance(values, dict) or not {'mu', 'sigma'} & values.keys():
            continue
        mu, sigma = (np.asarray(values.get(key), dtype=np.float64) for key in ('mu', 'sigma'))
        wrong = mu.ndim != 1 or sigma.shape != mu.shape * 2
        if values.get('features') is not None:
            features = torch.as_tensor(values['features']).float()
            rows = features if statistics.labels is None else statistics.labels
            wrong = wrong or features.shape != (len(rows), len(mu))
            statistics.features[space] = features
        if wrong:
            raise UserError(f'{statistics.path}: {space} has arrays of other shapes than mu [D], '
                            'sigma [D, D], features [n, D] and labels [n]')
        num = values.get('num')
        statistics.gaussians[space] = Gaussian(mu, sigma, None if num is None else int(num))
    if not statistics.gaussians and statistics.images is None:
        raise UserError(f'{statistics.path}: no statistics (mu and sigma) in this file')
    return statistics
