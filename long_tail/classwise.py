"""The report of the long-tail study: metrics over all classes, over groups of them, and by class.

The groups are those of classes with many, medium and few training images.
"""

import dataclasses

import numpy as np
import pandas as pd
import torch

from dnnlib import UserError, pictures
from dnnlib.util import atomic_path, subset
from long_tail import prd
from metrics import compute
from metrics.detectors import PROTOCOLS, Protocol
from metrics.precision_recall import precision_recall
from metrics.recognition import Recognizer
from metrics.shares import Estimate, Share, with_intervals
from metrics.statistics import Statistics

GROUPS = ('many', 'medium', 'few')
CLUSTERS_PER_CLASS = 20
FEW_IMAGES = 50         # of a class, of which measures are uncertain
CHEAP_DIM = 1024        # of features, up to which distances of single classes get errors too
MOST_LISTED = 20        # classes in a table
MOST_NAMED = 40         # classes whose names fit below a chart
# Values of a class that are no measures.
FACTS = ('class', 'name', 'training_images', 'num_images')


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
    class_names     of all classes, or none
    """

    reference: Statistics
    space: str = 'fid'
    device: torch.device | str = 'cpu'
    prd: bool = True
    manifold: bool = True
    recognizer: Recognizer | None = None
    frechet_device: torch.device | None = None
    protocol: Protocol = PROTOCOLS['cbdm']
    class_names: list = ()

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
            'classes': [{'class': label, 'name': self.name(label), 'training_images': int(count)}
                        | self.of_classes(generated, [label])
                        for label, count in enumerate(counts)]}

    def name(self, label: int) -> str:
        """Of a class, its number if it has none."""
        return str(self.class_names[label] if label < len(self.class_names) else label)

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
        lines = compute.rank_note(f'{self.space}: ', gaussian)
        rows = results.get('classes', [])
        few = [row['num_images'] for row in rows
               if row.get('num_images', gaussian.dim + 1) <= gaussian.dim]
        if few:
            lines.append(f'{self.space} of {len(few)} classes is of {min(few)} to {max(few)} '
                         f'images for {gaussian.dim} dimensions: their covariances are singular, '
                         'and the distances say little')
        few = [row['name'] for row in rows if row.get('num_images', 0) < FEW_IMAGES]
        if few:
            shown = ', '.join(few[:5]) + (f' and {len(few) - 5} more' if len(few) > 5 else '')
            lines.append(f'fewer than {FEW_IMAGES} generated images of {len(few)} classes '
                         f'({shown}): their measures are uncertain; more --num_images help')
        return lines + compute.score_note(generated, self.protocol)

    def metrics(self, generated: Statistics, real: Statistics, num_classes: int) -> dict:
        """All metrics of images of so many classes; for 0 without those that need many images,
        PRD and the Inception Score (which also needs probabilities).
        """
        a, b = (side.gaussians[self.space] for side in (generated, real))
        value = a.distance(b, self.frechet_device)
        if num_classes or a.dim <= CHEAP_DIM:
            value = compute.with_error(value, generated, real, self.space)
        values = {self.space: value}
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


def _shown(value) -> str:
    """A number of a table, with what it is sure of."""
    if isinstance(value, Share):
        return f'{value:.3f} ({value.interval[0]:.2f}-{value.interval[1]:.2f})'
    if isinstance(value, Estimate):
        return f'{value:.4g} ± {value.error:.2g}'
    if isinstance(value, float):
        return '-' if value != value else f'{value:.4g}'
    return str(value)


def _lines(rows: list[dict], first: str) -> str:
    """A table of dictionaries: a line for each, the column `first` to the left."""
    frame = pd.DataFrame([{key: _shown(value) for key, value in row.items()} for row in rows])
    frame = frame.drop(columns=['is_std'], errors='ignore').fillna('-')
    frame[first] = frame[first].str.ljust(max(map(len, frame[first])))
    return frame.rename(columns={'num_images': 'images'}).to_string(index=False)


def table(results: dict) -> str:
    """The metrics of all images and of each group, and of the classes, at most MOST_LISTED of
    them, as lines of text."""
    rows = [{'group': 'all'} | results['all']]
    for group, values in results.get('groups', {}).items():
        rows.append({'group': group} | values | {'classes': len(values['classes'])})
    text = _lines(rows, 'group')
    classes = [{key: value for key, value in row.items() if key != 'class'}
               for row in results.get('classes', ())]
    if classes:
        more = len(classes) - MOST_LISTED
        text += '\n\n' + _lines(classes[:MOST_LISTED], 'name')
        text += f'\n... and {more} more classes' * (more > 0)
    return text


def save_classes(stem: str, results: dict) -> list[str]:
    """Writes <stem>.csv, a row for each class, and <stem>.png, a chart of them by training images;
    returns the paths."""
    with atomic_path(f'{stem}.csv') as temp:
        pd.DataFrame(with_intervals(results['classes'])).to_csv(temp, index=False,
                                                                float_format='%.6g')
    rows = sorted(results['classes'], key=lambda row: -row['training_images'])
    measures = [name for name in dict.fromkeys(name for row in rows for name in row)
                if name not in FACTS]
    if not measures:
        return [f'{stem}.csv']
    fig, panels = pictures.figure(len(measures))
    places = np.arange(len(rows))
    for axes, name in zip(panels, measures, strict=True):
        values = np.array([row.get(name, np.nan) for row in rows], float)
        ends = np.array([getattr(row.get(name), 'interval', (np.nan, np.nan)) for row in rows])
        axes.bar(places, values, color='#0072B2')
        known = np.isfinite(ends).all(axis=1)
        axes.errorbar(places[known], values[known], color='0.2', fmt='none', elinewidth=0.8,
                      yerr=np.abs(ends[known].T - values[known]))
        axes.set(title=name, xlabel='class (its training images), most first',
                 xlim=(-0.6, len(rows) - 0.4))
        if len(rows) <= MOST_NAMED:
            names = [f'{row["name"]} ({row["training_images"]})' for row in rows]
            axes.set_xticks(places, names, rotation=90, fontsize=7)
    pictures.save_figure(fig, f'{stem}.png')
    return [f'{stem}.csv', f'{stem}.png']
