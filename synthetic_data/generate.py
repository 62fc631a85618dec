"""Generate labelled images by the million: one array file for each class."""

import contextlib
import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from dnnlib import UserError, cli
from synthetic_data import common, fixed_batch
from synthetic_data.class_writer import ClassWriter
from torch_utils import distributed as dist
from torch_utils.files.weights import fingerprint
from training import runs
from training.diffusion.samplers import ablation_sampler, edm_sampler
from training.generate import generate_images
from training.snapshot import load_denoiser

# Options that belong to the ablation sampler alone; any of them chooses it. Command line -> argument.
ABLATION = {'solver': 'solver', 'disc': 'discretization', 'schedule': 'schedule', 'scaling': 'scaling'}


def choose_sampler(options: dict):
    """(sampler, its arguments) from the options; those that were not given stay at the sampler's own defaults."""
    given = {key: value for key, value in options.items() if value is not None}
    ablation = {ABLATION[key]: given.pop(key) for key in ABLATION if key in given}
    return (ablation_sampler, given | ablation) if ablation else (edm_sampler, given)


def check_network(snapshot, path: str, class_num: int) -> tuple:
    """(H, W, 3) of the images. Raises UserError for a network that cannot make these classes."""
    if snapshot.net.label_dim == 0:
        raise UserError(f'--network={path} is unconditional, and makes no images of a given class; train one with labels')
    if snapshot.net.label_dim != class_num:
        raise UserError(f'--network={path} has {snapshot.net.label_dim} classes, but --class_num={class_num}')
    side = snapshot.net.img_resolution * (1 if snapshot.encoder.config()['name'] == 'rgb' else 8)
    return side, side, 3


def prepare(outdir: str, classes, seeds, made_by: dict, shape: tuple) -> dict[int, ClassWriter]:
    """The files of all classes, with their disk space, and what each of them still lacks."""
    writers = {label: ClassWriter(outdir, label) for label in classes}
    if dist.get_rank() == 0:
        for writer in writers.values():
            writer.prepare(np.array(list(dict.fromkeys(seeds)), dtype=np.int64), made_by, shape)
    dist.barrier()
    return {label: writer for label, writer in writers.items() if writer.open().active}


def generate(snapshot, writers: dict, batch: int, device, sampler, options: dict):
    """Makes what is missing: blocks of `batch` images, dealt to the processes. A class is finished with its last block."""
    net = fixed_batch.for_device(snapshot.net, device, snapshot.net.img_resolution)
    blocks = dist.broadcast_object([(label, *block) for label, writer in writers.items() for block in writer.missing(batch)])
    total = sum(stop - start for _, start, stop in blocks)
    with tqdm(total=total, unit='img', disable=None if dist.get_rank() == 0 else True) as bar:
        for number, (label, start, stop) in enumerate(blocks):
            bar.update(stop - start)
            if number % dist.get_world_size() != dist.get_rank():
                continue
            writer = writers[label]
            made = generate_images(net, snapshot.encoder, writer.seeds[start:stop], labels=label, batch=stop - start,
                                   device=device, split=False, sampler=sampler, **options)
            for part in made:
                writer.write(start, part.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())
            if dist.get_rank() == 0:
                finish(writers)
    dist.barrier()
    if dist.get_rank() == 0:
        finish(writers)


def finish(writers):
    for writer in writers.values():
        if writer.finish():
            tqdm.write(f'{writer.npy}: finished')


def run(outdir, seeds, batch, class_num, classes, network, **options):
    dist.init()
    device = dist.get_device()
    with dist.rank0_first():
        snapshot = load_denoiser(network, device)
    shape = check_network(snapshot, network, class_num)
    snapshot.encoder.prepare(device)
    classes = range(class_num) if classes is None else classes
    if max(classes) >= class_num:
        raise UserError(f'--class={max(classes)}: there are the classes 0 to {class_num - 1}')
    sampler, options = choose_sampler(options)
    network = fingerprint(snapshot.net.state_dict().items(), type(snapshot.net).__name__)
    made_by = dict(network=network, sampler=sampler.__name__, **options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(common.full_disk(f'--outdir={outdir}', 'the same command goes on'))
        if dist.get_rank() == 0:
            os.makedirs(outdir, exist_ok=True)
            stack.enter_context(runs.locked(outdir, 'generating'))
        writers = prepare(outdir, classes, seeds, made_by, shape)
        dist.print0(f'{len(writers)} of {len(classes)} classes have images to be made, {shape[0]}x{shape[1]} pixels, on '
                    f'{dist.get_world_size()} x {device.type}')
        generate(snapshot, writers, batch, device, sampler, options)
    dist.print0(f'All classes are in {outdir}')
    dist.shutdown()


EXAMPLES = """\b
Examples:
  # 5 million images like CIFAR-10, on 4 GPUs
  torchrun --standalone --nproc_per_node=4 generate.py --outdir=out_cifar10 --seeds=0-499999 --batch=2048 --steps=20 \\
      --class_num=10 --network=https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl
\b
  # More of them later: only what is new is made, and comes after what is there
  python generate.py --outdir=out_cifar10 --seeds=500000-599999 --batch=2048 --steps=20 --class_num=10 --network=...
\b
Without further options this is the sampler of EDM; any of --solver --disc --schedule --scaling chooses that of EDM's
ablations, with the rest at its defaults. The same command goes on with a run that was stopped."""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@click.option('--outdir', metavar='DIR', required=True, help='Where <class>.npy go, uint8 [N,H,W,3]')
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='0-499999', help='Seeds: one image of each class for each')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=2048, help='Images at a time on each process')
@click.option('--steps', 'num_steps', metavar='INT', type=click.IntRange(min=1), default=20, help='Sampling steps')
@click.option('--class_num', metavar='INT', type=click.IntRange(min=1), default=10, help='Classes of the network')
@click.option('--class', 'classes', metavar='LIST', type=cli.INT_LIST, help='Only these classes, e.g. 0-4  [default: all]')
@click.option('--network', metavar='FILE|URL', required=True, help='Class-conditional network: snapshot of this project or EDM')
@click.option('--sigma_min', metavar='FLOAT', type=click.FloatRange(0, min_open=True),
              help='Lowest noise level  [default: of the sampler, e.g. 0.002]')
@click.option('--sigma_max', metavar='FLOAT', type=click.FloatRange(0, min_open=True),
              help='Highest noise level  [default: of the sampler, e.g. 80]')
@click.option('--rho', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=7, help='Exponent of the time steps')
@click.option('--S_churn', 'S_churn', metavar='FLOAT', type=click.FloatRange(min=0), default=0, help='Strength of added noise')
@click.option('--S_min', 'S_min', metavar='FLOAT', type=click.FloatRange(min=0), default=0, help='Lowest level that gets noise')
@click.option('--S_max', 'S_max', metavar='FLOAT', type=click.FloatRange(min=0), default='inf',
              help='Highest level that gets noise')
@click.option('--S_noise', 'S_noise', metavar='FLOAT', type=click.FloatRange(min=0), default=1, help='Inflation of added noise')
@click.option('--solver', metavar='euler|heun', type=click.Choice(['euler', 'heun']), help='Ablation: solver')
@click.option('--disc', metavar='vp|ve|iddpm|edm', type=click.Choice(['vp', 've', 'iddpm', 'edm']), help='Ablation: time steps')
@click.option('--schedule', metavar='vp|ve|linear', type=click.Choice(['vp', 've', 'linear']), help='Ablation: noise schedule')
@click.option('--scaling', metavar='vp|none', type=click.Choice(['vp', 'none']), help='Ablation: signal scaling')
def main(**opts):
    """Generate labelled images by the million, one file for each class.

    Every image depends on its seed and class alone. The work is split over the processes of torchrun; images are written as
    they are made, so memory does not grow with their number.
    """
    run(**opts)


if __name__ == '__main__':
    main()
