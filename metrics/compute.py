"""From images to numbers: which metric needs what, features in one pass over the images, and the results."""

import dataclasses
import datetime
import platform
from collections.abc import Iterable

import numpy as np
import torch
import tqdm

from dnnlib import UserError
from dnnlib.util import subset
from metrics import images as image_files
from metrics.detectors import DETECTORS
from metrics.frechet import frechet_distance
from metrics.inception_score import ScoreSums, chunks, equal_parts
from metrics.precision_recall import precision_recall
from metrics.recognition import Recognizer
from metrics.reference import Reference
from metrics.statistics import FeatureSums
from torch_utils import distributed

# space -> (detector, its output): the kinds of features, named like the Frechet distance that uses them.
SPACES = {
    'fid': ('inception', 'pool3'),
    'sfid': ('inception', 'spatial'),
    'fd_dinov2': ('dinov2', 'features'),
    'fd_pixels': ('pixels', 'features'),
}
# metric -> space of precision and recall.
MANIFOLDS = {
    'precision': 'fid', 'recall': 'fid',
    'precision_dinov2': 'fd_dinov2', 'recall_dinov2': 'fd_dinov2',
    'precision_pixels': 'fd_pixels', 'recall_pixels': 'fd_pixels',
}
# metric -> space of which it needs the features themselves, not only their Gaussian.
FEATURES = MANIFOLDS | {'recognition': 'fd_pixels'}
METRICS = [*SPACES, 'is', *FEATURES]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What differs between publications: classes of the Inception Score and its parts; balls of precision and recall."""

    probs: str
    parts: callable
    k: int
    strict: bool


PROTOCOLS = {
    'adm': Protocol('softmax_nobias', chunks, k=3, strict=False),   # guided diffusion's evaluation suite
    'cbdm': Protocol('softmax', equal_parts, k=5, strict=True),     # class-balancing diffusion
}


@dataclasses.dataclass
class Measured:
    """What one pass over images gives, the same on every process: statistics and features by space, scores of parts,
    and class ids of the images whose features are kept (None if some have none)."""

    num: int
    gaussians: dict = dataclasses.field(default_factory=dict)
    features: dict = dataclasses.field(default_factory=dict)
    scores: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class Detectors:
    """The detectors for some metrics, made when they are first needed. `weights`: paths or URLs by detector name."""

    def __init__(self, weights: dict | None = None, device=None):
        self.weights = {name: path for name, path in (weights or {}).items() if path}
        self.device = torch.device(device) if device is not None else distributed.get_device()
        self.made = {}

    def __getitem__(self, name: str):
        if name not in self.made:
            self.made[name] = DETECTORS[name](self.weights.get(name), self.device)
        return self.made[name]

    def description(self) -> dict:
        """{name: {'weights', 'fingerprint'}} of the detectors that were used."""
        return {name: {'weights': d.weights, 'fingerprint': d.fingerprint} for name, d in self.made.items() if d.weights}


def parse_metrics(text: str) -> list[str]:
    """'fid,is' -> ['fid', 'is']. Raises ValueError that lists what there is."""
    names = [name.strip() for name in str(text).split(',') if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f'no metric {unknown[0]!r}; there are {",".join(METRICS)}' if unknown else 'no metrics given')
    return list(dict.fromkeys(names))


def detector_of(metric: str) -> str:
    """Name of the detector that a metric needs."""
    return 'inception' if metric == 'is' else SPACES[FEATURES.get(metric, metric)][0]


@torch.inference_mode()
def measure(batches: Iterable, num: int, detectors: Detectors, *, spaces=(), features=(), protocol: Protocol | None = None,
            keep: np.ndarray | None = None) -> Measured:
    """One pass over `num` images: Gaussians of `spaces`, features of others, Inception Scores if a protocol is given.

    `batches` yields (positions, images uint8 [n, C, H, W], class ids or None); under several processes each has its
    share, and all get the whole result. `keep`: positions whose features are kept, in this order (default: all).
    Raises UserError for features that are not finite.
    """
    outputs = {}  # detector -> outputs
    for space in {*spaces, *features}:
        outputs.setdefault(SPACES[space][0], set()).add(SPACES[space][1])
    if protocol:
        outputs.setdefault('inception', set()).add(protocol.probs)
    sums = {space: FeatureSums() for space in spaces}
    keep = np.arange(num) if keep is None else keep
    rows = torch.full([num], -1)
    rows[torch.from_numpy(keep)] = torch.arange(len(keep))
    kept = {space: [] for space in features}
    labels = torch.zeros(len(keep), dtype=torch.int64)
    labelled, scores = True, None
    with tqdm.tqdm(total=num, unit='image', desc='Measuring', disable=distributed.get_rank() != 0, delay=2) as bar:
        for positions, images, ids in batches:
            found = {(name, output): value for name, wanted in outputs.items()
                     for output, value in detectors[name](images, tuple(wanted)).items()}
            for space in spaces:
                sums[space].add(found[SPACES[space]])
            row = rows[positions]
            for space in features:
                kept[space].append((row[row >= 0], found[SPACES[space]].cpu()[row >= 0]))
            labelled = labelled and ids is not None
            if labelled:
                labels[row[row >= 0]] = ids[row >= 0]
            if protocol:
                probs = found['inception', protocol.probs]
                if scores is None:
                    scores = ScoreSums(protocol.parts(num), probs.shape[1], probs.device)
                scores.add(probs, positions.to(probs.device))
            bar.update(min(len(images) * distributed.get_world_size(), num - bar.n))
    measured = _merge(num, detectors.device, sums, kept, len(keep), scores, protocol)
    if not distributed.any_rank(not labelled):
        measured.labels = distributed.all_reduce_sum(labels)
    return measured


def _merge(num, device, sums, kept, num_kept, scores, protocol) -> Measured:
    """What `measure` collected, added up over processes, of which some may have had no image."""
    measured = Measured(num)
    dims = {space: s.sum.shape[0] for space, s in sums.items() if s.sum is not None}
    dims |= {space: parts[0][1].shape[1] for space, parts in kept.items() if parts}
    everywhere = {key: value for part in distributed.gather_objects(dims) for key, value in part.items()}
    for space, s in sums.items():
        s.all_reduce(everywhere[space], device)
        measured.gaussians[space] = s.gaussian()
    for space, parts in kept.items():
        features = torch.zeros(num_kept, everywhere[space])
        for row, values in parts:
            features[row] = values
        measured.features[space] = distributed.all_reduce_sum(features)
    if protocol:
        if scores is None:
            scores = ScoreSums(protocol.parts(num), 1008, device)
        scores.all_reduce()
        measured.scores = scores.scores()
    return measured


def measure_images(images, detectors: Detectors, *, num=None, seed=0, class_name=None, batch=64, workers=2,
                   keep_num=None, **what) -> Measured:
    """`measure` for `images` (see `metrics.images`): those of a class, a random `num` of them, features of `keep_num`."""
    indices = image_files.select(images, num, seed, class_name)
    keep = subset(len(indices), keep_num, seed) if keep_num is not None else None
    batches = image_files.read_batches(images, indices, batch, workers)
    return measure(batches, len(indices), detectors, keep=keep, **what)


def needs(metrics: Iterable[str]) -> dict:
    """{'spaces', 'features'}: what `measure` has to find for these metrics, of generated images and of references."""
    return {'spaces': [m for m in metrics if m in SPACES],
            'features': list(dict.fromkeys(FEATURES[m] for m in metrics if m in FEATURES))}


def missing_in(reference: Reference, metrics) -> dict:
    """What of `needs(metrics)` a reference lacks. Raises UserError if it has no images to find it in."""
    wanted, labels = needs(metrics), 'recognition' in metrics and reference.labels is None
    missing = {'spaces': [space for space in wanted['spaces'] if space not in reference.gaussians],
               'features': [space for space in wanted['features'] if labels or space not in reference.features]}
    if reference.images is None and labels:
        raise UserError(f'--metrics=recognition needs labelled images as --ref, and {reference.path} holds statistics')
    if reference.images is None and any(missing.values()):
        names = missing['spaces'] + [m for m in metrics if FEATURES.get(m) in missing['features']]
        features = f' and features of {",".join(reference.features)}' if reference.features else ''
        raise UserError(
            f'--ref={reference.path} has nothing for {",".join(names)}, only {",".join(reference.gaussians)}{features}; '
            f'make it with calculate_metrics.py ref --metrics={",".join(metrics)}, or give the images as --ref')
    return missing


def complete_reference(reference: Reference, metrics, detectors: Detectors, open_images, **options) -> Reference:
    """The reference with all that the metrics need, measured from its images where its statistics lack it.

    `open_images(path)` opens them; `options` go to `measure_images`.

    Raises UserError if something is missing and there are no images.
    """
    missing = missing_in(reference, metrics)
    if not any(missing.values()):
        return reference
    measured = measure_images(open_images(reference.images), detectors, **missing, **options)
    return dataclasses.replace(reference, gaussians=reference.gaussians | measured.gaussians,
                               features=reference.features | measured.features, labels=measured.labels)


def evaluate(metrics, measured: Measured, reference: Reference, protocol: Protocol, device='cpu') -> dict[str, float]:
    """{metric: value} in the order of `metrics`; the Inception Score also gives `is_std`, the spread over its parts.

    Raises UserError if images and reference do not fit each other.
    """
    results, pairs = {}, {}
    for metric in metrics:
        if metric == 'is':
            results['is'] = measured.scores.mean().item()
            results['is_std'] = measured.scores.std(correction=0).item()
        elif metric in SPACES:
            ours, ref = measured.gaussians[metric], reference.gaussians[metric]
            if ours.dim != ref.dim:
                raise UserError(f'{metric}: the images have {ours.dim} dimensions, --ref={reference.path} has {ref.dim}; '
                                'both must have the same resolution and channels, and come from the same detector')
            results[metric] = frechet_distance(ours.mu, ours.sigma, ref.mu, ref.sigma)
        elif metric == 'recognition':
            results[metric] = _recognised(measured, reference)
        else:
            space = MANIFOLDS[metric]
            if space not in pairs:
                pairs[space] = precision_recall(reference.features[space].to(device), measured.features[space].to(device),
                                                protocol.k, protocol.strict)
            results[metric] = pairs[space][metric.startswith('recall')]
    return results


def _recognised(measured: Measured, reference: Reference) -> float:
    """Share of the images that a classifier trained on the reference takes for the class that they were made for."""
    if measured.labels is None or reference.labels is None:
        raise UserError(f'recognition: {"the images have" if measured.labels is None else f"{reference.path} has"} no labels')
    real, made = reference.features['fd_pixels'], measured.features['fd_pixels']
    return float(Recognizer(real, reference.labels).recognised(made, measured.labels).mean())


def notes(measured: Measured, reference: Reference, detectors: Detectors) -> list[str]:
    """What a reader of the results should know: singular covariances, and references made with other weights."""
    found = []
    for space, gaussian in measured.gaussians.items():
        if gaussian.num <= gaussian.dim:
            found.append(f'{space}: {gaussian.num} images for {gaussian.dim} dimensions; the distance is biased upwards '
                         'and comparable only with the same number of images')
    for name, own in detectors.description().items():
        theirs = reference.meta.get('detectors', {}).get(name)
        if theirs and theirs['fingerprint'] != own['fingerprint']:
            found.append(f'{name}: the reference was made with other weights ({theirs["weights"]}); distances mean nothing')
    return found


def environment() -> dict:
    """Versions and machine, for the record."""
    device = distributed.get_device()
    return {
        'time': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'processes': distributed.get_world_size(),
    }
