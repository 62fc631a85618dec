"""Train a diffusion model on images: the baselines of distillation, and teachers."""

import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distillation import common, fitting
from dnnlib import UserError, cli
from torch_utils import distributed as dist
from training.data.batches import DatasetBatches
from training.data.images import open_dataset
from training.diffusion.losses import DDPMLoss
from training.encoders import make_encoder


def open_data(path: str, net):
    """The images, as they suit the network. Raises UserError where they do not."""
    dataset = open_dataset(path, use_labels=net.label_dim > 0)
    wanted = (net.img_channels, net.img_resolution, net.img_resolution)
    if dataset.dtype != np.uint8 or tuple(dataset.image_shape) != wanted:
        raise UserError(f'--data_dir: {path} holds {dataset.dtype} {list(dataset.image_shape)}, but the network takes images '
                        f'{list(wanted)}; see model.image_size and dataset_tool.py convert --resolution')
    if net.label_dim and dataset.label_dim != net.label_dim:
        raise UserError(f'--data_dir: {path} has {dataset.label_dim} classes, but the network {net.label_dim}; give '
                        'model.num_classes, or model.class_cond=false')
    return dataset


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # A baseline on the teacher's samples
  python scripts/image_train.py --data_dir experiments/samples/samples_50000x32x32x3.npz \\
      --config yaml/cifar10_32/exp/CIFAR10-14M-Baseline.yaml
\b
  # On real images, on four GPUs, to an end
  mpiexec -n 4 python scripts/image_train.py --data_dir datasets/cifar10.zip --outdir experiments/real \\
      --config yaml/cifar10_32/exp/CIFAR10-14M-Baseline.yaml total_steps=500000
\b
The same command goes on with a run that was stopped.
""")
@click.option('--data_dir', metavar='DIR|ZIP|NPZ', required=True, help='Images: a folder, a zip, or an .npz with arr_0')
@common.config_option
@click.option('--outdir', metavar='DIR', envvar=common.OUTDIR_VARIABLE, show_envvar=True,
              help='Where checkpoints go  [default: experiments/NAME of the configuration]')
@common.seed_option
@common.overrides_argument
def main(data_dir, config, outdir, seed, overrides):
    """Train a network on images with the loss of improved DDPM; of an experiment, its student.

    Every so many steps (save_interval) it writes modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt, and
    network-snapshot-*.pkl for generate_images.py. batch_size is that of one process.
    """
    dist.init()
    section = common.read_network(config, overrides)
    device = dist.get_device()
    net = fitting.new_network(section, seed, device)
    dataset = open_data(data_dir, net)
    common.describe('Network', net)
    dist.print0(f'Data: {dataset.name}, {len(dataset)} images')
    batches = DatasetBatches(dataset, make_encoder({'name': 'rgb'}), device, seed)
    steps = fitting.fit(
        net, DDPMLoss(net.diffusion), batches, section, outdir or common.default_outdir(config), seed=seed,
        rule={'name': 'ddpm'}, options=fitting.plain(section) | dict(config=config, data_dir=data_dir, seed=seed),
        dataset=fitting.description(net, dataset.name) | {'size': len(dataset)})
    dist.print0(f'{steps} steps done')
    dist.shutdown()


if __name__ == '__main__':
    main()
