"""Generate labelled images by the million: one array file for each class."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dnnlib import UserError, cli, lazy, options, progress
from dnnlib.image_io import as_rgb

with lazy.imports(__name__ == '__main__'):
    from synthetic_data import fixed_batch
    from torch_utils import distributed as dist
    from torch_utils.files.weights import fingerprint
    from training.diffusion.samplers import choose_setting
    from training.generate import open_generator
    from training.runs import claimed
    from training.snapshot import load_denoiser

from synthetic_data.class_files import ClassWriter

# Slope of the vp schedule that sets the range of noise levels in this study's code; EDM's is 19.9.
BETA_D = 19.1
# Options that the record of a class always has; others are there if they were given.
RECORDED = ('num_steps', 'rho', 'S_churn', 'S_min', 'S_max', 'S_noise')


def check_network(snapshot, path: str, class_num: int | None) -> tuple:
    """(number of classes, (H, W, 3) of the images); UserError for another number than
    `class_num`."""
    count = max(snapshot.net.label_dim, 1)
    if class_num not in (None, count):
        kind = f'has {count} classes' if snapshot.net.label_dim else 'is unconditional (one class)'
        raise UserError(f'--network={path} {kind}, but --class_num={class_num}')
    _, height, width = snapshot.encoder.pixel_shape(snapshot.net.image_shape)
    return count, (height, width, 3)


def prepare(outdir: str, classes, seeds, made_by: dict, shape: tuple) -> dict[int, ClassWriter]:
    """The files of all classes, with their disk space, and what each of them still lacks."""
    writers = {label: ClassWriter(outdir, label) for label in classes}
    if dist.get_rank() == 0:
        for writer in writers.values():
            writer.prepare(seeds, made_by, shape)
    dist.barrier()
    return {label: writer for label, writer in writers.items() if writer.open().record}


def generate(generator, writers: dict, batch: int):
    """Makes what is missing: blocks of `batch` images, dealt to the processes.

    A class is finished with its last block.
    """
    net = generator.snapshot.net
    generator.snapshot.net = fixed_batch.for_device(net, dist.get_device(),
                                                   net.image_shape[1:])
    blocks = dist.broadcast_object(
        [(label, *block) for label, writer in writers.items() for block in writer.missing(batch)])
    total = sum(stop - start for _, start, stop in blocks)
    with progress.bar(show=dist.get_rank() == 0, total=total, unit='img') as bar:
        for number, (label, start, stop) in enumerate(blocks):
            bar.update(stop - start)
            if number % dist.get_world_size() != dist.get_rank():
                continue
            writer = writers[label]
            for made in generator.images(writer.seeds[start:stop], labels=label,
                                         batch=stop - start, split=False):
                writer.write(start, as_rgb(made.images).permute(0, 2, 3, 1).cpu().numpy())
            finish(writers)
    dist.barrier()
    finish(writers)


def finish(writers):
    """The first process closes the classes that are complete."""
    for writer in writers.values():
        if dist.get_rank() == 0 and writer.finish():
            tqdm.write(f'{writer.npy}: finished')


EXAMPLES = """\b
Examples:
  # 5 million images like CIFAR-10, on 4 GPUs
  torchrun --standalone --nproc_per_node=4 generate.py --outdir=out_cifar10 --seeds=0-499999 \\
      --batch=2048 --steps=20 --class_num=10 \\
      --network=https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl
\b
  # More of them later: only what is new is made, and comes after what is there
  python generate.py --outdir=out_cifar10 --seeds=500000-599999 --batch=2048 --steps=20 \\
      --class_num=10 --network=...
\b
The sampler is that of the network, EDM's with 18 steps; any of --solver --disc --schedule
--scaling chooses that of EDM's ablations, with the rest at its defaults, but for --beta-d=19.1
with --disc=vp, as published. The same command goes on with a run that was stopped."""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.text('DIR', '--outdir', 'Where <class>.npy go, uint8 [N,H,W,3]', required=True,
              type=cli.FOLDER)
@options.seeds('0-63')
@options.batch(64)
@options.integer('--class_num', None,
                 'Classes that the network must have, 1 without labels  [default: any]')
@options.integers('--class classes', None, 'Only these classes, e.g. 0-4  [default: all]')
@options.text('FILE|URL', '--network',
              'Snapshot of this project or EDM; without labels there is one class', required=True)
@click.option('--subdirs', is_flag=True,
              help='Changes nothing: a class is one file, which has no folders')
@options.sampling
@options.compiled
@options.allow_nonfinite
def main(outdir, seeds, batch, class_num, classes, network, subdirs, sampler, precision, compile,
         allow_nonfinite):
    """Generate labelled images by the million, one file for each class.

    Every image depends on its seed and class alone. The work is split over the processes of
    torchrun; images are written as they are made, so memory does not grow with their number.
    """
    dist.init(precision)
    with dist.rank0_first():
        snapshot = load_denoiser(network, dist.get_device(),
                                 allow_nonfinite=allow_nonfinite)
    count, shape = check_network(snapshot, network, class_num)
    classes = range(count) if classes is None else classes
    if max(classes) >= count:
        raise UserError(f'--class={max(classes)}: there are the classes 0 to {count - 1}')
    if subdirs:
        dist.print0('--subdirs changes nothing: a class is one file')
    setting = choose_setting(snapshot.net, snapshot.sampler, sampler)
    name = setting['name']
    own = (snapshot.sampler or {}).get('name')
    if setting.get('discretization') == 'vp' and sampler['beta_d'] is None and own != name:
        sampler['beta_d'] = BETA_D
    generator = open_generator(snapshot, sampler=sampler, compile=compile)
    made_by = dict(
        network=fingerprint(snapshot.net.state_dict().items(),
                            type(snapshot.net).__name__), sampler=f'{name}_sampler')
    made_by |= {
        key: value
        for key, value in generator.settings['sampler'].items()
        if key in RECORDED or (key != 'name' and sampler.get(key) is not None)
    }
    with claimed(outdir, 'generating'):
        writers = prepare(outdir, classes, seeds, made_by, shape)
        dist.print0(f'{len(writers)} of {len(classes)} classes have images to be made, '
                    f'{shape[1]}x{shape[0]} pixels, on '
                    f'{dist.get_world_size()} x {dist.get_device().type}')
        generate(generator, writers, batch)
    dist.print0(f'All classes are in {outdir}')
    dist.shutdown()


if __name__ == '__main__':
    main()
