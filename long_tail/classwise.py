"""The report of the long-tail study: metrics over all classes, over groups of them, and by class.

The groups are those of classes with many, medium and few training images.
"""

import dataclasses

import pandas as pd
import torch

from dnnlib import UserError
from dnnlib.util import subset
from long_tail import prd
from metrics import compute
from metrics.precision_recall import precision_recall
from metrics.recognition import Recognizer
from metrics.statistics import Statistics

GROUPS = ('many', 'medium', 'few')
PROTOCOL = compute.PROTOCOLS['cbdm']
CLUSTERS_PER_CLASS = 20


def class_groups(counts, sizes=(100, 20)) -> dict[str, list[int]]:
    """{'many', 'medium', 'few': classes}, by training images.

    Many is more than sizes[0], few is fewer than sizes[1]; these are the usual bounds of
    long-tailed recognition. Groups without a class are left out.
    """
    many, few = sizes
    groups = {name: [] for name in GROUPS}
    for label, count in enumerate(counts):
        groups['many' if count > many else 'medium' if count >= few else 'few'].append(label)
    return {name: classes for name, classes in groups.items() if classes}


@dataclasses.dataclass
class Evaluation:
    """Measures generated images against a reference, in the features of one space.

    score, prd, manifold  whether to compute the Inception Score (where there are probabilities),
                          PRD, and improved precision and recall
    recognizer            classifier of the features that was trained on the reference
    frechet_device        where torch computes the Frechet distance; None: without torch
    """

    reference: Statistics
    space: str = 'fid'
    device: torch.device | str = 'cpu'
    score: bool = True
    prd: bool = True
    manifold: bool = True
    recognizer: Recognizer | None = None
    frechet_device: torch.device | None = None

    def metrics(self, generated: Statistics, real: Statistics, num_classes: int) -> dict:
        """All metrics of images of so many classes."""
        a, b = (side.gaussians[self.space] for side in (generated, real))
        values = {'fid': a.distance(b, self.frechet_device)}
        if self.score and PROTOCOL.probs in generated.features:
            values |= compute.score(generated, real, self.space, PROTOCOL)
        if self.space not in real.features:
            return values
        gen, ref = (side.features[self.space] for side in (generated, real))
        if self.prd:
            values |= _prd(gen, ref, CLUSTERS_PER_CLASS * num_classes)
        if self.manifold and min(len(gen), len(ref)) > PROTOCOL.k:
            values['precision'], values['recall'] = precision_recall(
                ref.to(self.device), gen.to(self.device), PROTOCOL.k, PROTOCOL.strict)
        if self.recognizer is not None and generated.labels is not None:
            recognised = self.recognizer.recognised(gen.numpy(), generated.labels)
            values['recognition'] = float(recognised.mean())
        return values

    def of_classes(self, generated: Statistics, classes) -> dict[str, float]:
        """All metrics of some classes, with the real images of the same classes as reference."""
        real = self.reference
        wanted = torch.tensor(classes)
        if any(torch.isin(side.labels, wanted).sum() < 2 for side in (generated, real)):
            return {}
        sides = (side.of_classes(classes, self.device) for side in (generated, real))
        return self.metrics(*sides, len(classes))


def _prd(gen, ref, clusters: int) -> dict[str, float]:
    """F_8 (recall) and F_1/8 (precision) of equal numbers of images, and no more clusters."""
    num = min(len(gen), len(ref))
    gen, ref = (x[subset(len(x), num, seed=0)].numpy() for x in (gen, ref))
    f8, f1_8 = prd.prd_from_features(gen, ref, min(clusters, num)).max_f(8)
    return {'prd_f8': f8, 'prd_f1_8': f1_8}


def evaluate(generated: Statistics, evaluation: Evaluation, counts=None, sizes=(100, 20)) -> dict:
    """{'all': metrics, 'groups': {group: {'classes', metrics}}, 'classes': [{'class', ...}]}.

    counts  training images of each class; groups and classes are measured only with them, and
            with features and labels on both sides
    sizes   see `class_groups`

    Raises UserError if a class of the generated images has no reference image.
    """
    real = evaluation.reference
    labels = generated.labels
    num_classes = len(counts) if counts is not None else 1
    if labels is not None:
        num_classes = len(labels.unique())
    results = {'all': evaluation.metrics(generated, real, num_classes)}
    if counts is None or labels is None or real.labels is None:
        return results
    missing = sorted({*labels.tolist()} - {*real.labels.tolist()})
    if missing:
        raise UserError(f'{real.path} has no image of class {missing[0]}; '
                        'make it from all classes')
    results['groups'] = {name: {'classes': classes} | evaluation.of_classes(generated, classes)
                         for name, classes in class_groups(counts, sizes).items()}
    by_class = dataclasses.replace(evaluation, prd=False, score=False)
    results['classes'] = [
        {'class': label, 'training_images': int(count)} | by_class.of_classes(generated, [label])
        for label, count in enumerate(counts)]
    return results


def table(results: dict) -> str:
    """The metrics of all images and of each group as lines of text."""
    rows = {'all': results['all']}
    for group, values in results.get('groups', {}).items():
        rows[group] = values | {'classes': str(len(values['classes']))}
    frame = pd.DataFrame(rows).T.drop(columns='is_std', errors='ignore')
    return frame.to_string(float_format='{:.4f}'.format, na_rep='-')
