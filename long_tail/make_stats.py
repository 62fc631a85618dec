"""Reference statistics for main.py --eval, from a data set: mean, covariance, and the features."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dnnlib import UserError, cli, lazy, options

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from metrics.features import Detectors, measure
    from metrics.images import read_batches
    from metrics.statistics import USUAL, is_statistics, save_statistics
    from torch_utils import distributed as dist
    from training.snapshot import load_snapshot

from long_tail import datasets, evaluation


def balanced(labels, num: int) -> np.ndarray:
    """Indices of `num` images, as many of each class up to one: a random choice with seed 0."""
    order = np.random.RandomState(0).permutation(len(labels))
    labels = pd.Series(labels[order])
    place = labels.groupby(labels).cumcount()  # of each image among those of its class
    return np.sort(order[np.lexsort([labels, place])[:num]])


def make(data_type, dest, detector, weights=None, root='./', split='train', download=False,
         img_size=None, num=None, features=True, batch=64, img_channels=None):
    """Writes the statistics of a data set to `dest`; the arguments are those of the command."""
    if split == 'test' and data_type not in datasets.CIFAR:
        raise UserError(f'is no part of {data_type}', 'split', split)
    data = datasets.open_data(data_type, root, size=img_size, split=split, download=download,
                              channels=img_channels)
    indices = np.arange(len(data)) if num is None else balanced(data.label_ids, num)
    space = USUAL[detector]
    detectors = Detectors({detector: weights}, protocol=evaluation.PROTOCOL,
                          open_network=load_snapshot)
    statistics = measure(read_batches(data, indices, batch), len(indices), detectors,
                         gaussians=[space], features=[space] if features else [])
    if dist.get_rank() == 0:
        statistics.meta = dict(data_type=data_type, split=split, class_names=data.class_names,
                               detectors=detectors.description())
        save_statistics(dest, statistics)
        print(f'{dest}: {len(indices)} images, {statistics.gaussians[space].dim} dimensions of '
              f'{detector}' + (', with features' if features else ''))
    dist.barrier()


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The reference of the paper: 50,000 training images of CIFAR-100, Inception features (400 MB)
  python make_stats.py --data_type cifar100 --root ./ --dest ./stats/cifar100.train.npz
\b
  # With pixels as features, where no network is at hand
  python make_stats.py --data_type cifar100 --detector pixels --dest ./stats/cifar100.pixels.npz
\b
Under torchrun the processes share the work.
""")
@options.text('NAME', '--data_type --data-type', 'Data set, of a long-tailed one the original',
              required=True, type=click.Choice(datasets.BALANCED))
@datasets.root_option
@click.option('--download', is_flag=True,
              help='Fetch the CIFAR archive to --root if it is not there')
@options.choice('--split', 'train', 'Images of CIFAR', ['train', 'test'])
@options.pictures
@options.text('NPZ', '--dest', 'File to write', required=True,
              type=cli.Written('file of statistics', ['.npz'], is_statistics))
@evaluation.detector_options
@options.integer('--img_size --img-size', None, 'Resize the images  [default: as stored]')
@options.integer('--max_images --max-images --num num', None,
                 'Use so many images, the same number of each class  [default: all]', least=2)
@click.option('--features/--nofeatures', default=True,
              help='Store features and labels, which precision, recall, PRD and class groups need')
@options.image_channels('--img_channels', '')
@options.batch(64)
def main(**settings):
    """Make the --fid_cache of main.py from a data set."""
    dist.init()
    cli.claim(settings['dest'])
    make(**settings)
    dist.shutdown()


if __name__ == '__main__':
    main()
