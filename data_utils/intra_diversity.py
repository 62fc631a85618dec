"""Data sets of one class whose pictures are more or less alike."""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils import common, selection
from dnnlib import UserError, options
from training.data import convert, sources


@common.command
@options.integer('--max-images', None, 'Use at most this many, the first ones')
@options.integer('--class-num', None, 'The class to take, by its number', None)
@options.number('--inter-rate', None,
                'Make a mixture: so much of it from --inter-source, the rest from --source',
                options.ANY)
@options.path('--inter-source', None, 'The other source of a mixture  '
              '[default: --source with imagenet in place of cifar10]')
def main(source, max_images, class_num, inter_rate, inter_source):
    """Make a data set of one class: of CIFAR, of a list of ImageNet images, or a mixture of both.

    \b
    # 2000 dogs of CIFAR-10 (class 5)
    python data_utils/intra_diversity.py --source=datasets/cifar10/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10/cifar10_dog_2000-32x32.zip --class-num=5 --max-images=2000
    # 2000 dogs of ImageNet, from the list of sample_imagenet.py
    python data_utils/intra_diversity.py --source=datasets/imagenet/dog_2000.txt \\
        --dest=datasets/imagenet/imagenet_dog_2000-32x32.zip --resolution=32x32 \\
        --transform=center-crop
    # 2000 dogs, a fifth of them from ImageNet
    python data_utils/intra_diversity.py --source=datasets/cifar10/cifar10_dog_2000-32x32.zip \\
        --dest=datasets/cifar10/intra_diversity/mixture_0.2_2000.zip --max-images=2000 \\
        --inter-rate=0.2
    """
    if inter_rate is not None:
        if class_num is not None:
            raise UserError('--class-num and --inter-rate are two steps: give one of them')
        return mixture(source, inter_source or other_source(source.name), max_images, inter_rate)
    if inter_source is not None:
        raise UserError('--inter-source makes a mixture: give --inter-rate too')
    if class_num is not None:
        indices = selection.one_class_subset(convert.class_labels(source), class_num, max_images)
        return source, common.choose(source, indices, 'one class', class_num=class_num,
                                     max_images=max_images)
    if source.labels is not None and len(np.unique(source.labels)) > 1:
        raise UserError(f'{source.name} has several classes: choose one with --class-num')
    indices = selection.first_images(np.arange(len(source)), max_images)
    return source, common.choose(source, indices, 'first images', max_images=max_images)


def other_source(source: str) -> str:
    """'datasets/cifar10/cifar10_dog_2000.zip' -> 'datasets/imagenet/imagenet_dog_2000.zip'."""
    folder, name = os.path.split(source)
    parent, base = os.path.split(folder)
    folder = os.path.join(parent, 'imagenet') if base == 'cifar10' else folder
    if not name.startswith('cifar10'):
        raise UserError(f'--inter-rate mixes {source} with another data set: '
                        'name it with --inter-source')
    return os.path.join(folder, 'imagenet' + name.removeprefix('cifar10'))


class JoinedByNumber(sources.JoinedSource):
    """Classes of the same number are one class; no labels if one of the sources has none."""

    def join_labels(self):
        if any(source.labels is None or source.labels.ndim != 1 for source in self.sources):
            return
        labels = np.concatenate([source.labels for source in self.sources])
        first = self.sources[0]
        if labels.max() < len(first.classes):
            self.name_classes(labels, first.class_names, first.wnids, first.classes)
        else:
            self.name_classes(labels, classes=range(labels.max() + 1))


def mixture(first, path: str, max_images: int | None, rate: float):
    """(joined source, selection): the first images of both, (1 - rate) of them from `first`."""
    if not os.path.exists(path):
        raise UserError(f'--inter-source={path} does not exist; '
                        'make it from a list of sample_imagenet.py')
    second = common.open_source(path, bits=first.bits)
    counts = selection.interpolation_counts(max_images or len(first), rate)
    for source, count in zip((first, second), counts, strict=True):
        if count > len(source):
            raise UserError(f'--inter-rate={rate}: {count} images of {source.name} are wanted, '
                            f'but it has {len(source)}; choose a smaller --max-images')
    indices = [*range(counts[0]), *range(len(first), len(first) + counts[1])]
    joined = JoinedByNumber([first, second])
    return joined, common.choose(joined, indices, 'mixture', inter_rate=rate,
                                 max_images=max_images,
                                 counts={first.name: counts[0], second.name: counts[1]})


if __name__ == '__main__':
    main()
