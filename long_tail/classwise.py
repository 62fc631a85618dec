"""The report of the long-tail study: metrics over all classes, over groups of them, and by class.

The groups are those of classes with many, medium and few training images.
"""

import dataclasses

import numpy as np
import pandas as pd
import torch

from dnnlib import UserError
from dnnlib.util import subset
from long_tail import prd
from metrics import compute
from metrics.detectors import PROTOCOLS, Protocol
from metrics.precision_recall import precision_recall
from metrics.recognition import Recognizer
from metrics.shares import Share
from metrics.statistics import Statistics

GROUPS = ('many', 'medium', 'few')
CLUSTERS_PER_CLASS = 20


def class_groups(counts, sizes=(100, 20)) -> dict[str, list[int]]:
    """{'many', 'medium', 'few': classes}, by training images.

    Many is more than sizes[0], few is fewer than sizes[1]; these are the usual bounds of
    long-tailed recognition. Groups without a class are left out.
    """
    many, few = sizes
    places = np.digitize(counts, [few, many + 1])  # 0 few, 1 medium, 2 many
    groups = {name: np.flatnonzero(places == 2 - i).tolist() for i, name in enumerate(GROUPS)}
    return {name: classes for name, classes in groups.items() if classes}


@dataclasses.dataclass
class Evaluation:
    """Measures generated images against a reference, in the features of one space.

    prd, manifold   whether to compute PRD, and improved precision and recall
    recognizer      classifier of the features that was trained on the reference
    frechet_device  where torch computes the Frechet distance; None: without torch
    protocol        rules of the Inception Score, precision and recall
    """

    reference: Statistics
    space: str = 'fid'
    device: torch.device | str = 'cpu'
    prd: bool = True
    manifold: bool = True
    recognizer: Recognizer | None = None
    frechet_device: torch.device | None = None
    protocol: Protocol = PROTOCOLS['cbdm']

    def __call__(self, generated: Statistics, counts, sizes=(100, 20)) -> dict:
        """{'all': metrics, 'groups': {group: {'classes', metrics}}, 'classes': [{'class', ...}]}.

        counts  training images of each class
        sizes   see `class_groups`

        Groups and classes are measured only with labels on both sides. Raises UserError if a
        class of the generated images has no reference image.
        """
        real = self.reference
        if generated.labels is None or real.labels is None:
            return {'all': self.metrics(generated, real, len(counts))}
        present = set(generated.labels.tolist())
        missing = sorted(present - {*real.labels.tolist()})
        if missing:
            raise UserError(f'{real.path} has no image of class {missing[0]}; '
                            'make it from all classes')
        return {
            'all': self.metrics(generated, real, len(present)),
            'groups': {name: {'classes': classes}
                       | self.of_classes(generated, classes, len(classes))
                       for name, classes in class_groups(counts, sizes).items()},
            'classes': [{'class': label, 'training_images': int(count)}
                        | self.of_classes(generated, [label])
                        for label, count in enumerate(counts)]}

    def of_classes(self, generated: Statistics, classes, num_classes=0) -> dict[str, float]:
        """`metrics` of some classes, with the real images of the same classes as reference."""
        sides = generated, self.reference
        wanted = torch.tensor(classes)
        counts = [int(torch.isin(side.labels, wanted).sum()) for side in sides]
        if min(counts) < 2:
            return {}
        sides = (side.of_classes(wanted, self.device) for side in sides)
        return {'num_images': counts[0]} | self.metrics(*sides, num_classes)

    def notes(self, generated: Statistics, results: dict) -> list[str]:
        """What a reader should know: see `compute.rank_note` and `compute.score_note`."""
        gaussian = generated.gaussians[self.space]
        lines = compute.rank_note('fid: ', gaussian)
        few = [row['num_images'] for row in results.get('classes', ())
               if row.get('num_images', gaussian.dim + 1) <= gaussian.dim]
        if few:
            lines.append(f'fid of {len(few)} classes is of {min(few)} to {max(few)} images for '
                         f'{gaussian.dim} dimensions: their covariances are singular, and the '
                         'distances say little')
        return lines + compute.score_note(generated, self.protocol)

    def metrics(self, generated: Statistics, real: Statistics, num_classes: int) -> dict:
        """All metrics of images of so many classes; for 0 without those that need many images,
        PRD and the Inception Score (which also needs probabilities).
        """
        a, b = (side.gaussians[self.space] for side in (generated, real))
        values = {'fid': a.distance(b, self.frechet_device)}
        if num_classes and self.protocol.probs in generated.features:
            values |= compute.score(generated, real, self.space, self.protocol)
        if self.space not in real.features:
            return values
        gen, ref = (side.features[self.space] for side in (generated, real))
        if num_classes and self.prd:
            values |= _prd(gen, ref, CLUSTERS_PER_CLASS * num_classes)
        if self.manifold and min(len(gen), len(ref)) > self.protocol.k:
            values['precision'], values['recall'] = precision_recall(
                ref.to(self.device), gen.to(self.device), self.protocol.k, self.protocol.strict)
        if self.recognizer is not None and generated.labels is not None:
            recognised = self.recognizer.recognised(gen, generated.labels)
            values['recognition'] = Share(recognised.mean(), len(recognised))
        return values


def _prd(gen, ref, clusters: int) -> dict[str, float]:
    """F_8 (recall) and F_1/8 (precision) of equal numbers of images, and no more clusters."""
    num = min(len(gen), len(ref))
    sides = (side[subset(len(side), num, seed=0)].numpy() for side in (gen, ref))
    return dict(zip(('prd_f8', 'prd_f1_8'),
                    prd.prd_from_features(*sides, min(clusters, num)).max_f(8), strict=True))


def table(results: dict) -> str:
    """The metrics of all images and of each group as lines of text."""
    rows = {'all': results['all']}
    for group, values in results.get('groups', {}).items():
        rows[group] = values | {'classes': str(len(values['classes']))}
    rows = {group: {name: f'{value:.4f} ({value.interval[0]:.2f}-{value.interval[1]:.2f})'
                    if isinstance(value, Share) else value for name, value in row.items()}
            for group, row in rows.items()}
    frame = pd.DataFrame(rows).T.drop(columns=['is_std', 'num_images'], errors='ignore')
    return frame.to_string(float_format='{:.4f}'.format, na_rep='-')
