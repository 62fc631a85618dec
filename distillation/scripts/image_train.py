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

from training.data.images import open_dataset


def open_data(path: str, net):
    """The images, as they suit the network, which may have more classes. Raises UserError where
    they do not.
    """
    dataset = open_dataset(path, use_labels=net.label_dim > 0)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    fits = dataset.dtype == np.uint8 and dataset.image_shape == shape
    if 0 < dataset.label_dim < net.label_dim:
        dist.print0(f'Note: {path} has {dataset.label_dim} of the {net.label_dim} classes of the '
                    'network (model.num_classes)')
        dataset.label_dim = net.label_dim
    if not fits or net.label_dim not in (0, dataset.label_dim):
        raise UserError(
            f'{path} holds {dataset.dtype} {list(dataset.image_shape)} and has '
            f'{dataset.label_dim} classes, but the network has {net.label_dim} and takes images '
            f'{list(shape)}; see model.image_size, model.num_classes, model.class_cond, and '
            'dataset_tool.py convert --resolution', field='data_dir')
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
              help='Images: a folder, a zip, or an .npz with arr_0')
@configs.run_options
def main(data_dir, config, outdir, running, seed, precision, overrides):
    """Train a network on images with the loss of improved DDPM; of an experiment, its student.

    Every so many steps (save_interval) it writes modelNNNNNN.pt, ema_RATE_NNNNNN.pt and
    optNNNNNN.pt, and network-snapshot-*.pkl for generate_images.py. batch_size is that of all
    processes together. Images are mirrored at random, unless random_flip=false.
    """
    dist.init(precision)
    section = configs.read_network(config, overrides)
    net = runs.new_network(section, seed, running)
    dataset = open_data(data_dir, net)
    outdir = outdir or configs.default_outdir(config)
    recorded = option_of(GuidedCheckpoints, outdir, 'random_flip', None, False)
    if section.random_flip is None:
        section.random_flip = True if recorded is None else recorded
    elif recorded not in (None, section.random_flip) and not section.allow_changes:
        raise UserError(f'is {recorded} in the run in {outdir}; choose another folder, or allow '
                        'changes', 'random_flip', section.random_flip)
    mirroring = {'random_flip': True} if section.random_flip else {}
    batches = DatasetBatches(dataset, RGBEncoder(), dist.get_device(), seed,
                             mirror=section.random_flip)
    runs.train(
        section, net, DDPMLoss(net.diffusion), batches, outdir, rule={'name': 'ddpm'},
        dataset=runs.description(net, dataset.name, len(dataset)) | mirroring | {
            'fingerprint': dataset.fingerprint},
        options=dataclasses.asdict(section) | dict(config=config, data_dir=data_dir, seed=seed),
        running=running)
    dist.shutdown()


if __name__ == '__main__':
    main()
