"""From images to features, in one pass over them and over all processes."""

import os
from collections.abc import Iterable

import numpy as np
import torch

from dnnlib import UserError, progress
from dnnlib.util import subset
from metrics import images as image_files
from metrics.detectors import DETECTORS, PROTOCOLS, Protocol
from metrics.neighbors import check_finite
from metrics.statistics import SPACES, FeatureSums, Statistics
from torch_utils import distributed

# Numbers of features that are kept for standard errors: 256 MiB, 32768 images of 2048 dimensions.
SAMPLED = 1 << 26


def usual_weights() -> dict[str, str]:
    """{detector: file, folder or name of its weights} by the variables NAME_WEIGHTS, e.g.
    DINOV2_WEIGHTS, as the options of `dnnlib.options.DETECTOR_FILES` have it."""
    values = {name: os.environ.get(f'{name.upper()}_WEIGHTS') for name in DETECTORS}
    return {name: value for name, value in values.items() if value}


class Detectors:
    """The detectors, loaded when they are first needed.

    weights           paths or URLs by name of the detector
    protocol          key of PROTOCOLS
    inception_sha256  what that file must have
    open_network      what opens the classifier of `own`: `training.snapshot.load_snapshot`
    """

    def __init__(self, weights: dict | None = None, device=None, protocol: str = 'edm',
                 inception_sha256: str | None = None, open_network=None):
        self.protocol = protocol
        self.weights = {name: path for name, path in (weights or {}).items() if path}
        self.options = {
            'inception': dict(prepare=self.rules.prepare, sha256=inception_sha256),
            'own': dict(open_network=open_network)}
        self.device = torch.device(device or distributed.get_device())
        self.loaded = {}

    @classmethod
    def of(cls, protocol: str = 'edm', inception_sha256=None, open_network=None, **weights):
        """Those of the options in `dnnlib.options.DETECTOR_FILES`."""
        return cls(weights, None, protocol, inception_sha256, open_network)

    @property
    def rules(self) -> Protocol:
        return PROTOCOLS[self.protocol]

    def __getitem__(self, name: str):
        if name not in self.loaded:
            self.loaded[name] = DETECTORS[name](self.weights.get(name), self.device,
                                                **self.options.get(name, {}))
        return self.loaded[name]

    def description(self) -> dict:
        """{name: {'weights', 'fingerprint'}} of the detectors that were used."""
        return {name: {'weights': detector.weights, 'fingerprint': detector.fingerprint}
                for name, detector in self.loaded.items() if detector.weights}


@torch.inference_mode()
def measure(batches: Iterable, num: int, detectors: Detectors, *, gaussians=(), features=(),
            samples=(), keep: np.ndarray | None = None) -> Statistics:
    """One pass over `num` images: Gaussians of some spaces, the features themselves of some.

    batches  yields (places int64 [n], images uint8 [n, C, H, W], class ids int64 [n] or None);
             under several processes each has its share, and all get the result of all, in the
             order of the places
    samples  spaces of which features of some images are kept, SAMPLED numbers at most
    keep     places of the images whose features and labels are kept (default: all)

    Raises UserError for fewer than two images, for features that are not finite, and for pictures
    of several sizes where the features are of their pixels.
    """
    outputs = {}
    for detector, output in {SPACES[space] for space in (*gaussians, *features, *samples)}:
        outputs.setdefault(detector, []).append(output)
    sums = {space: FeatureSums(detectors.device) for space in gaussians}
    parts = []
    some = []
    lengths = {}
    with progress.bar(show=distributed.get_rank() == 0, total=num, unit='image',
                      desc='Measuring') as bar:
        for places, images, ids in batches:
            values = {(name, output): value for name, wanted in outputs.items()
                      for output, value in detectors[name](images, wanted).items()}
            for output, value in values.items():
                if lengths.setdefault(output, value.shape[1]) != value.shape[1]:
                    raise UserError(f'pictures of several sizes, e.g. {list(images.shape[1:])}, '
                                    f'have no common features {"/".join(output)}; make them equal '
                                    '(dataset_tool.py convert), or measure by fid or fd_dinov2',
                                    'metrics')
            for space in gaussians:
                sums[space].add(values[SPACES[space]])
            rows = slice(None) if keep is None else torch.isin(places, torch.from_numpy(keep))
            parts.append((places[rows], None if ids is None else ids[rows],
                          *(values[SPACES[space]].cpu()[rows] for space in features)))
            some.append([_some(places, values[SPACES[space]], num) for space in samples])
            bar.update(min(len(images) * distributed.get_world_size(), num - bar.n))
    for feature_sums in sums.values():
        feature_sums.all_reduce()
    parts, some = ([part for process in distributed.gather_objects(mine) for part in process]
                   for mine in (parts, some))
    places, ids, *values = zip(*parts, strict=True)
    order = torch.cat(places).argsort()
    columns = {space: torch.cat(column)[order]
               for space, column in zip(features, values, strict=True)}
    for column in columns.values():
        check_finite(column)
    kept = {}
    for space, column in zip(samples, zip(*some, strict=True), strict=True):
        places, values = map(torch.cat, zip(*column, strict=True))
        kept[space] = values[places.argsort()]
    return Statistics(
        gaussians={space: feature_sums.gaussian() for space, feature_sums in sums.items()},
        features=columns,
        labels=None if None in ids else torch.cat(ids)[order],
        protocol=detectors.protocol,
        samples=kept)


def _some(places, features, num: int):
    """(places, features [n, D] on the CPU) of a share of the images that their places decide, so
    that of `num` images SAMPLED numbers are kept, more or less.
    """
    share = SAMPLED / (num * features.shape[1])
    if share < 1:
        hashed = places * 2654435761 % 2**32
        rows = hashed < share * 2**32
        places, features = places[rows], features[rows.to(features.device)]
    return places, features.cpu()


def measure_images(images, detectors: Detectors, *, num=None, seed=0, class_name=None, batch=64,
                   workers=2, keep_num=None, **what) -> Statistics:
    """`measure` for a data set (see `metrics.images`): a random `num` of the images of a class.

    `keep_num`: of how many of them the features are kept.
    """
    indices = image_files.select(images, num, seed, class_name)
    keep = None if keep_num is None else indices[subset(len(indices), keep_num, seed)]
    batches = image_files.read_batches(images, indices, batch, workers)
    return measure(batches, len(indices), detectors, keep=keep, **what)
