"""What the long-tail study measures: every metric over all classes, over groups of them (many, medium and few training
images), and class by class; and the file of reference features that this needs."""

import dataclasses
import json
import os
import zipfile

import numpy as np
import torch
import tqdm

from dnnlib import UserError
from dnnlib.util import atomic_path, subset
from long_tail import prd
from metrics import images as image_files
from metrics.compute import PROTOCOLS, SPACES, Detectors
from metrics.frechet import frechet_distance, frechet_distance_torch
from metrics.inception_score import inception_score
from metrics.precision_recall import precision_recall
from metrics.recognition import Recognizer
from metrics.statistics import FeatureSums
from torch_utils import distributed

# detector -> the output that is its features.
OUTPUTS = {detector: output for detector, output in SPACES.values() if output != 'spatial'}
GROUPS = ('many', 'medium', 'few')
PROTOCOL = PROTOCOLS['cbdm']
CLUSTERS_PER_CLASS = 20


@dataclasses.dataclass
class Features:
    """Features float32 [N,D] of images, their classes int64 [N] or None; Inception's class probabilities [N,1008] or None."""

    features: torch.Tensor
    labels: np.ndarray | None = None
    probs: torch.Tensor | None = None

    def __len__(self):
        return len(self.features)

    def only(self, classes) -> 'Features':
        """Those of some classes."""
        return self.at(np.flatnonzero(np.isin(self.labels, classes)))

    def at(self, rows) -> 'Features':
        return Features(self.features[rows], None if self.labels is None else self.labels[rows],
                        None if self.probs is None else self.probs[rows])

    def gaussian(self, device='cpu'):
        """Mean and covariance, accumulated in float64."""
        sums = FeatureSums()
        for part in self.features.split(4096):
            sums.add(part.to(device))
        return sums.gaussian()


@dataclasses.dataclass
class Statistics:
    """Reference: mean [D] and covariance [D,D] in float64, the features themselves if the file has them, and `meta`
    (detector, fingerprint of its weights, data set)."""

    path: str
    mu: np.ndarray
    sigma: np.ndarray
    features: Features | None = None
    meta: dict = dataclasses.field(default_factory=dict)


def save_statistics(path: str, found: Features, meta: dict, keep_features: bool = True):
    """Writes an .npz with `mu`, `sigma` (the layout of the published caches) and `meta`; with `features` and `labels`."""
    gaussian = found.gaussian()
    arrays = {'mu': gaussian.mu, 'sigma': gaussian.sigma, 'meta': np.array(json.dumps(meta | {'num': len(found)}))}
    if keep_features:
        arrays |= {'features': found.features.numpy(), 'labels': found.labels}
    with atomic_path(path) as temp, open(temp, 'wb') as file:
        np.savez(file, **arrays)


def load_statistics(path: str) -> Statistics:
    """Opens what `save_statistics` wrote, or any .npz with `mu` and `sigma`. Raises UserError that names the file."""
    if not os.path.isfile(path):
        raise UserError(f'--fid_cache={path}: no such file; make it with make_stats.py')
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {key: z[key] for key in ('mu', 'sigma', 'meta', 'features', 'labels') if key in z.files}
        meta = json.loads(str(arrays['meta'])) if 'meta' in arrays else {}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f'--fid_cache={path} is damaged or no .npz of statistics ({error})') from None
    if not {'mu', 'sigma'} <= arrays.keys():
        raise UserError(f'--fid_cache={path} has no mu and sigma; make it with make_stats.py')
    mu, sigma = (arrays[key].astype(np.float64) for key in ('mu', 'sigma'))
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise UserError(f'--fid_cache={path} has mu {list(mu.shape)} and sigma {list(sigma.shape)} instead of [D] and [D, D]')
    features = None
    if {'features', 'labels'} <= arrays.keys():
        values, labels = arrays['features'], arrays['labels']
        if values.shape != (len(labels), len(mu)):
            raise UserError(f'--fid_cache={path} has features {list(values.shape)} for {len(labels)} labels and '
                            f'{len(mu)} dimensions')
        features = Features(torch.from_numpy(values).float(), labels.astype(np.int64))
    return Statistics(path, mu, sigma, features, meta)


@torch.inference_mode()
def extract(images, detectors: Detectors, detector: str, batch: int = 64, probs: bool = False) -> Features:
    """Features of all `images` (see `metrics.images`; or an ArrayDataset). Every process computes its share and gets all."""
    num, outputs = len(images), (OUTPUTS[detector], PROTOCOL.probs)[:1 + probs]
    found = None
    with tqdm.tqdm(total=num, unit='image', desc='Measuring', disable=distributed.get_rank() != 0, delay=2) as bar:
        for positions, pixels, _ in image_files.read_batches(images, np.arange(num), batch):
            values = detectors[detector](pixels, outputs)
            if found is None:
                found = {name: torch.zeros(num, values[name].shape[1]) for name in outputs}
            for name in outputs:
                found[name][positions] = values[name].float().cpu()
            bar.update(min(len(positions) * distributed.get_world_size(), num - bar.n))
    widths = [None if found is None else {name: value.shape[1] for name, value in found.items()}]
    widths = next(width for part in distributed.gather_objects(widths) for width in part if width)
    found = found or {name: torch.zeros(num, width) for name, width in widths.items()}
    for value in found.values():
        moved = value.to(detectors.device) if distributed.get_world_size() > 1 else value
        value.copy_(distributed.all_reduce_sum(moved))
    return Features(found[outputs[0]], images.label_ids if images.has_labels else None, found.get(PROTOCOL.probs))


def class_groups(counts, sizes=(100, 20)) -> dict[str, list[int]]:
    """{'many', 'medium', 'few': classes}, by training images: more than sizes[0], sizes[1]..sizes[0], fewer than sizes[1].

    The usual bounds of long-tailed recognition. Groups without a class are left out.
    """
    many, few = sizes
    group = [0 if n > many else 1 if n >= few else 2 for n in counts]
    return {name: found for i, name in enumerate(GROUPS) if (found := [c for c, g in enumerate(group) if g == i])}


@dataclasses.dataclass
class Evaluation:
    """Measures generated features against a reference.

    `prd`, `manifold`: whether to compute PRD, and improved precision and recall; `recognizer`: a classifier of the features
    trained on the reference (for the pixels); `on_device`: the Frechet distance by torch, there.
    """

    reference: Statistics
    device: torch.device | str = 'cpu'
    prd: bool = True
    manifold: bool = True
    recognizer: Recognizer | None = None
    on_device: bool = False

    def check(self, dim: int, detector: str):
        """Raises UserError unless the reference is of the detector's features."""
        if len(self.reference.mu) != dim:
            raise UserError(f'--fid_cache={self.reference.path} has {len(self.reference.mu)} dimensions, the features of '
                            f'{detector} have {dim}; make it with make_stats.py --detector={detector} from images of this size')

    def frechet(self, made: Features, mu, sigma) -> float:
        ours = made.gaussian(self.device)
        if self.on_device:
            return frechet_distance_torch(ours.mu, ours.sigma, mu, sigma, self.device)
        return frechet_distance(ours.mu, ours.sigma, mu, sigma)

    def whole(self, made: Features, num_classes: int) -> dict[str, float]:
        """All metrics of all images."""
        reference = self.reference
        return {'fid': self.frechet(made, reference.mu, reference.sigma)} | self._others(made, reference.features, num_classes)

    def part(self, made: Features, real: Features, num_classes: int) -> dict[str, float]:
        """All metrics of a group of classes, real images of the same classes being the reference."""
        if len(made) < 2 or len(real) < 2:
            return {}
        gaussian = real.gaussian(self.device)
        return {'fid': self.frechet(made, gaussian.mu, gaussian.sigma)} | self._others(made, real, num_classes)

    def _others(self, made, real, num_classes):
        values = {}
        if made.probs is not None:
            scores = inception_score(made.probs, PROTOCOL.parts(len(made)))
            values |= {'is': scores.mean().item(), 'is_std': scores.std(correction=0).item()}
        if real is None:
            return values
        if self.prd:
            values |= self._prd(made, real, CLUSTERS_PER_CLASS * num_classes)
        if self.manifold and min(len(made), len(real)) > PROTOCOL.k:
            values['precision'], values['recall'] = precision_recall(
                real.features.to(self.device), made.features.to(self.device), PROTOCOL.k, PROTOCOL.strict)
        if self.recognizer is not None and made.labels is not None:
            values['recognition'] = float(self.recognizer.recognised(made.features.numpy(), made.labels).mean())
        return values

    @staticmethod
    def _prd(made, real, clusters):
        """F_8 (recall) and F_1/8 (precision) of equal numbers of images; clusters are not more than these."""
        num = min(len(made), len(real))
        made, real = (x.features[subset(len(x), num, seed=0)].numpy() for x in (made, real))
        f8, f1_8 = prd.prd_from_features(made, real, min(clusters, num)).max_f(8)
        return {'prd_f8': f8, 'prd_f1_8': f1_8}


def evaluate(made: Features, evaluation: Evaluation, counts=None, sizes=(100, 20)) -> dict:
    """{'all': metrics, 'groups': {group: {'classes', metrics}}, 'classes': [{'class', 'training_images', metrics}]}.

    counts  training images of each class; groups and classes are measured only with them, and with labels and features
            on both sides
    sizes   see `class_groups`

    Raises UserError if a class of the generated images has no reference image.
    """
    real, labelled = evaluation.reference.features, counts is not None and made.labels is not None
    num_classes = len(np.unique(made.labels)) if made.labels is not None else len(counts if counts is not None else [0])
    results = {'all': evaluation.whole(made, num_classes)}
    if real is None or not labelled:
        return results
    missing = sorted(set(np.unique(made.labels)) - set(np.unique(real.labels)))
    if missing:
        raise UserError(f'--fid_cache={evaluation.reference.path} has no image of class {missing[0]}; make it from all classes')
    groups = class_groups(counts, sizes)
    results['groups'] = {name: {'classes': classes} | evaluation.part(made.only(classes), real.only(classes), len(classes))
                         for name, classes in groups.items()}
    by_class = dataclasses.replace(evaluation, prd=False)
    results['classes'] = [
        {'class': c, 'training_images': int(n)} | by_class.part(_without_probs(made.only([c])), real.only([c]), 1)
        for c, n in enumerate(counts)]
    return results


def _without_probs(features):
    """The Inception Score is about several classes."""
    return dataclasses.replace(features, probs=None)


def table(results: dict) -> str:
    """The metrics of all images and of each group as lines of text."""
    rows = {'all': results['all']} | results.get('groups', {})
    names = [name for name in results['all'] if name != 'is_std']
    lines = [f'{"":8}{"classes":>8}' + ''.join(f'{name:>13}' for name in names)]
    for row, values in rows.items():
        cells = ''.join(f'{values[name]:13.4f}' if name in values else f'{"-":>13}' for name in names)
        lines.append(f'{row:8}{len(values["classes"]) if "classes" in values else "":>8}{cells}')
    return '\n'.join(lines)
