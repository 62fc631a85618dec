"""Train a diffusion model on images: the baselines of distillation, and teachers."""

import dataclasses
import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distillation import configs
from dnnlib import UserError, lazy

with lazy.imports(__name__ == '__main__'):
    from distillation import runs
    from torch_utils import distributed as dist
    from training.checkpoint import GuidedCheckpoints
    from training.data.batches import DatasetBatches
    from training.diffusion.losses import DDPMLoss
    from training.encoders import RGBEncoder
    from training.runs import option_of

from training.data.images import SourceImages, open_squares


def open_data(path: str, net, random_crop=False):
    """The images, as they suit the network, which may have more classes. Raises UserError where
    they do not.
    """
    dataset = open_squares(path, net.image_shape, net.label_dim > 0, random_crop)
    if isinstance(dataset, SourceImages) and isinstance(net.img_resolution, int):
        for note in dataset.source.notes:
            dist.print0(f'Note: {note}')
        how = 'a random part' if random_crop else 'the centre'
        dist.print0(f'Note: of pictures of other sizes than {net.img_resolution}x'
                    f'{net.img_resolution}, resized, {how} is taken')
    fits = dataset.dtype == np.uint8 and dataset.image_shape == net.image_shape
    if 0 < dataset.label_dim < net.label_dim:
        dist.print0(f'Note: {path} has {dataset.label_dim} of the {net.label_dim} classes of the '
                    'network (model.num_classes)')
        dataset.label_dim = net.label_dim
    if not fits or net.label_dim not in (0, dataset.label_dim):
        raise UserError(
            f'{path} holds {dataset.dtype} {list(dataset.image_shape)} and has '
            f'{dataset.label_dim} classes, but the network has {net.label_dim} and takes images '
            f'{list(net.image_shape)}; see model.image_size, model.num_classes, '
            'model.class_cond, and dataset_tool.py convert --resolution', field='data_dir')
    return dataset


@click.command(cls=configs.Command, epilog="""\b
Examples:
  # A baseline on the teacher's samples
  python scripts/image_train.py --data_dir experiments/samples/samples_50000x32x32x3.npz \\
      --config yaml/cifar10_32/exp/CIFAR10-14M-Baseline.yaml
\b
  # On real images, on four GPUs, to an end
  mpiexec -n 4 python scripts/image_train.py --data_dir datasets/cifar10.zip \\
      --outdir experiments/real --config yaml/cifar10_32/exp/CIFAR10-14M-Baseline.yaml \\
      total_steps=500000
\b
The same command goes on with a run that was stopped.
""")
@configs.common_options
@click.option('--data_dir', metavar='DIR|ZIP|NPZ', required=True,
              help='Images: a folder, a zip, an .npz, or whatever else dataset_tool.py reads')
@configs.run_options
def main(data_dir, config, outdir, running, seed, precision, overrides):
    """Train a network on images with the loss of improved DDPM; of an experiment, its student.

    Every so many steps (save_interval) it writes modelNNNNNN.pt, ema_RATE_NNNNNN.pt and
    optNNNNNN.pt, and network-snapshot-*.pkl for generate_images.py. batch_size is that of all
    processes together. Images are mirrored at random, unless random_flip=false. Pictures of other
    sizes are shrunk, and their centre is taken, or with random_crop=true a random part. Classes
    are those of dataset.json, of class folders, or before the underscore of names like cat_1.png.
    """
    dist.init(precision)
    section = configs.read_network(config, overrides)
    net = runs.new_network(section, seed, running)
    dataset = open_data(data_dir, net, section.random_crop)
    outdir = outdir or configs.default_outdir(config)
    recorded = option_of(GuidedCheckpoints, outdir, 'random_flip', None, False)
    if section.random_flip is None:
        section.random_flip = True if recorded is None else recorded
    elif recorded not in (None, section.random_flip) and not section.allow_changes:
        raise UserError(f'is {recorded} in the run in {outdir}; choose another folder, or allow '
                        'changes', 'random_flip', section.random_flip)
    chances = {name: True for name in ('random_flip', 'random_crop') if getattr(section, name)}
    batches = DatasetBatches(dataset, RGBEncoder(), dist.get_device(), seed,
                             mirror=section.random_flip)
    runs.train(
        section, net, DDPMLoss(net.diffusion), batches, outdir, rule={'name': 'ddpm'},
        dataset=runs.description(net, dataset.name, len(dataset)) | chances | {
            'fingerprint': dataset.fingerprint},
        options=dataclasses.asdict(section) | dict(config=config, data_dir=data_dir, seed=seed),
        running=running)
    dist.shutdown()


if __name__ == '__main__':
    main()
