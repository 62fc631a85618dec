"""Generate images from a trained network."""

import os

import click

from dnnlib import UserError, cli, lazy, options
from training.published import PRESETS

with lazy.imports(__name__ == '__main__'):
    from torch_utils import distributed as dist
    from training.generate import GridCollector, OutputFolder, open_generator
    from training.runs import claimed


EXAMPLES = """\b
Examples:
  # A picture of 64 samples of your own network
  python generate_images.py --net=training-runs/digits/network-snapshot-0000524-0.100.pkl \\
      --seeds=0-63 --grid=digits.png
\b
  # The same of three classes: a row of 8 for each
  python generate_images.py --net=NET.pkl --class=0,7-8 --seeds=0-23 --grid=rows.png
\b
  # 50,000 images of one class on 8 GPUs, with autoguidance
  torchrun --nproc_per_node=8 generate_images.py --net=NET.pkl --gnet=SMALLER.pkl --guidance=2.1 \\
      --outdir=out --subdirs --seeds=0-49999 --class=171
\b
  # A published model (downloaded on first use), with another sampler
  python generate_images.py --preset=edm2-img512-s-guid-fid --outdir=out --seeds=0-7 \\
      --sampler=dpmpp-2m --steps=20
\b
Published presets: """ + ', '.join(f'edm2-{name}' for name in PRESETS)


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.network
@options.text('DIR', '--outdir', 'Folder of the images, with labels in dataset.json',
              type=cli.FOLDER)
@click.option('--subdirs', is_flag=True, help='A folder for each 1000 seeds')
@options.text('FILE.png', '--grid', 'Write a picture of the first samples, a row for each class',
              type=cli.PICTURE)
@options.seeds('16-19')
@options.image_class
@options.batch(32)
@options.sampling
def main(network, sampler, precision, class_, outdir, subdirs, grid, seeds, batch):
    """Generate images: one for each seed, the same whatever the batch size and the number of
    processes.

    Each network is sampled as it was meant to be, unless options say otherwise. Runs on a CPU, a
    GPU, or under torchrun on many.
    """
    dist.init(precision)
    if outdir is None and grid is None:
        raise UserError('nowhere to write to: give --outdir or --grid')
    generator = open_generator(**network, class_=class_, sampler=sampler)
    snapshot = generator.snapshot
    if outdir:
        click.get_current_context().with_resource(claimed(outdir, 'generating'))
    cli.claim(grid)
    folder = OutputFolder(outdir, subdirs, generator.record, snapshot.dataset) if outdir else None
    name = os.path.splitext(os.path.basename(network['net'] or network['preset']))[0]
    rows = max(len(generator.classes or ()), 16)
    collector = GridCollector(grid, snapshot.dataset, rows=rows, title=name) if grid else None
    missing = seeds
    if folder and not grid:
        missing = folder.missing(seeds, generator)
        if existing := len(seeds) - len(missing):
            dist.print0(f'{existing} of {len(seeds)} images are there already')
    _, height, width = snapshot.encoder.pixel_shape(snapshot.net.image_shape)
    dist.print0(f'Generating {len(missing)} images of {width}x{height} on '
                f'{dist.get_world_size()} x {dist.get_device().type}')
    sinks = [sink for sink in (folder, collector) if sink]
    for made in generator.images(missing, batch=batch, progress=True):
        for sink in sinks:
            sink.add(made)
    for sink in sinks:
        sink.finish()
    dist.print0('Wrote ' + ' and '.join(path for path in (outdir, grid) if path))
    dist.shutdown()


if __name__ == '__main__':
    main()
