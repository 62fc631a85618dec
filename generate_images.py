"""Generate images from a trained network."""

import json
import os

import click
import numpy as np

import dnnlib
from dnnlib import UserError, cli, pictures
from dnnlib.image_io import encode_png
from torch_utils import distributed as dist
from training.data.dataset import class_index
from training.encoders import make_encoder
from training.generate import draw_inputs, generate_images
from training.snapshot import load_denoiser

# Published networks: name -> (network, guide, guidance), all at the address below.
POSTHOC = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions'
# fmt: off
PRESETS = {
    'img512-xs-fid': ('img512-xs-2147483-0.135', None, 1),
    'img512-xs-dino': ('img512-xs-2147483-0.200', None, 1),
    'img512-s-fid': ('img512-s-2147483-0.130', None, 1),
    'img512-s-dino': ('img512-s-2147483-0.190', None, 1),
    'img512-m-fid': ('img512-m-2147483-0.100', None, 1),
    'img512-m-dino': ('img512-m-2147483-0.155', None, 1),
    'img512-l-fid': ('img512-l-1879048-0.085', None, 1),
    'img512-l-dino': ('img512-l-1879048-0.155', None, 1),
    'img512-xl-fid': ('img512-xl-1342177-0.085', None, 1),
    'img512-xl-dino': ('img512-xl-1342177-0.155', None, 1),
    'img512-xxl-fid': ('img512-xxl-0939524-0.070', None, 1),
    'img512-xxl-dino': ('img512-xxl-0939524-0.150', None, 1),
    'img64-s-fid': ('img64-s-1073741-0.075', None, 1),
    'img64-m-fid': ('img64-m-2147483-0.060', None, 1),
    'img64-l-fid': ('img64-l-1073741-0.040', None, 1),
    'img64-xl-fid': ('img64-xl-0671088-0.040', None, 1),
    'img512-xs-guid-fid': ('img512-xs-2147483-0.045', 'img512-xs-uncond-2147483-0.045', 1.4),
    'img512-xs-guid-dino': ('img512-xs-2147483-0.150', 'img512-xs-uncond-2147483-0.150', 1.7),
    'img512-s-guid-fid': ('img512-s-2147483-0.025', 'img512-xs-uncond-2147483-0.025', 1.4),
    'img512-s-guid-dino': ('img512-s-2147483-0.085', 'img512-xs-uncond-2147483-0.085', 1.9),
    'img512-m-guid-fid': ('img512-m-2147483-0.030', 'img512-xs-uncond-2147483-0.030', 1.2),
    'img512-m-guid-dino': ('img512-m-2147483-0.015', 'img512-xs-uncond-2147483-0.015', 2),
    'img512-l-guid-fid': ('img512-l-1879048-0.015', 'img512-xs-uncond-2147483-0.015', 1.2),
    'img512-l-guid-dino': ('img512-l-1879048-0.035', 'img512-xs-uncond-2147483-0.035', 1.7),
    'img512-xl-guid-fid': ('img512-xl-1342177-0.020', 'img512-xs-uncond-2147483-0.020', 1.2),
    'img512-xl-guid-dino': ('img512-xl-1342177-0.030', 'img512-xs-uncond-2147483-0.030', 1.7),
    'img512-xxl-guid-fid': ('img512-xxl-0939524-0.015', 'img512-xs-uncond-2147483-0.015', 1.2),
    'img512-xxl-guid-dino': ('img512-xxl-0939524-0.015', 'img512-xs-uncond-2147483-0.015', 1.7),
    'img512-s-autog-fid': ('img512-s-2147483-0.070', 'img512-xs-0134217-0.125', 2.1),
    'img512-s-autog-dino': ('img512-s-2147483-0.120', 'img512-xs-0134217-0.165', 2.45),
    'img512-xxl-autog-fid': ('img512-xxl-0939524-0.075', 'img512-m-0268435-0.155', 2.05),
    'img512-xxl-autog-dino': ('img512-xxl-0939524-0.130', 'img512-m-0268435-0.205', 2.3),
    'img512-s-uncond-autog-fid': ('img512-s-uncond-2147483-0.070', 'img512-xs-uncond-0134217-0.110', 2.85),
    'img512-s-uncond-autog-dino': ('img512-s-uncond-2147483-0.090', 'img512-xs-uncond-0134217-0.125', 2.9),
    'img64-s-autog-fid': ('img64-s-1073741-0.045', 'img64-xs-0134217-0.110', 1.7),
    'img64-s-autog-dino': ('img64-s-1073741-0.105', 'img64-xs-0134217-0.175', 2.2),
}
# fmt: on


def preset_options(name: str) -> dict:
    """net, gnet and guidance of a published preset, with or without the leading edm2-."""
    key = name.removeprefix('edm2-')
    if key not in PRESETS:
        raise UserError(f'--preset={name} is unknown; one of: ' + ', '.join(f'edm2-{key}' for key in PRESETS))
    net, gnet, guidance = PRESETS[key]
    return dict(net=f'{POSTHOC}/edm2-{net}.pkl', gnet=gnet and f'{POSTHOC}/edm2-{gnet}.pkl', guidance=guidance)


def image_name(seed: int, subdirs: bool) -> str:
    """'000123.png', or '000000/000123.png' with a folder for each thousand seeds."""
    return f'{seed - seed % 1000:06d}/{seed:06d}.png' if subdirs else f'{seed:06d}.png'


class OutputFolder:
    """Images by seed, and a dataset.json with their labels: the folder is a data set as it stands.

    It remembers the options that made it: with the same ones, images that exist are not made again.
    """

    def __init__(self, path: str, subdirs: bool, options: dict, dataset: dict):
        self.path, self.subdirs, self.options, self.dataset = path, subdirs, options, dataset
        self.json_path = os.path.join(path, 'dataset.json')
        self.old_labels = {}
        if os.path.isfile(self.json_path):
            try:
                with open(self.json_path) as f:
                    old = json.load(f)
                same = old.get('generated_by') == json.loads(json.dumps(options))
                self.old_labels = dict(old.get('labels') or [])
            except (ValueError, AttributeError, TypeError):
                raise UserError(f'{self.json_path} is damaged; remove the folder') from None
            if not same:
                raise UserError(f'--outdir={path} holds images made with other options; remove it or choose another')
        elif os.path.isdir(path) and os.listdir(path):
            raise UserError(f'--outdir={path} is not empty; remove it or choose another')
        dist.barrier()
        if dist.get_rank() == 0:
            self._write(self.old_labels)
        dist.barrier()

    def file(self, seed):
        return os.path.join(self.path, image_name(seed, self.subdirs))

    def save(self, seed, image):
        """One image uint8 [C,H,W]."""
        pixels = image.transpose(1, 2, 0)
        dnnlib.util.write_bytes(self.file(seed), encode_png(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]))

    def finish(self, labels: dict):
        """Writes the labels of all images, {seed: label or None}, given in parts by every process."""
        parts = dist.gather_objects(labels)
        if dist.get_rank() == 0:
            named = {image_name(seed, self.subdirs): label for part in parts for seed, label in part.items()}
            self._write(self.old_labels | named)

    def _write(self, labels):
        rows = sorted(labels.items()) if all(label is not None for label in labels.values()) else None
        described = {key: self.dataset[key] for key in ('classes', 'class_names') if self.dataset.get(key)}
        dnnlib.util.write_json(self.json_path, {'labels': rows or None, 'generated_by': self.options, **described})


class GridCollector:
    """Keeps the first images of each class for a picture: a row for each class, or a square without classes."""

    def __init__(self, columns: int = 8, rows: int = 16):
        self.columns, self.rows, self.images = columns, rows, {}

    def add(self, seed, label, image):
        row = self.images.setdefault(label, {})
        row[seed] = image
        limit = self.columns if label is not None else self.columns * self.rows
        for extra in sorted(row)[limit:]:
            del row[extra]

    def save(self, path: str, dataset: dict):
        """Collects the images of all processes; the first one writes the picture."""
        parts = dist.gather_objects(self.images)
        if dist.get_rank() != 0:
            return
        merged = GridCollector(self.columns, self.rows)
        for part in parts:
            for label, row in part.items():
                for seed, image in row.items():
                    merged.add(seed, label, image)
        labels = sorted(merged.images, key=lambda label: -1 if label is None else label)[:self.rows]
        blank = np.full_like(next(iter(merged.images[labels[0]].values())), 255)
        tiles = []
        for label in labels:
            row = [image for _, image in sorted(merged.images[label].items())]
            tiles += row + [blank] * (-len(row) % self.columns)
        names = dataset.get('class_names') or dataset.get('classes')
        titles = None if labels == [None] else [names[label] if names else label for label in labels]
        pictures.save_image_grid(path, np.stack(tiles), self.columns, titles)


def run(net, gnet, guidance, outdir, subdirs, seeds, class_, batch, grid, model_url, sha256, gnet_sha256, **sampler):
    dist.init()
    if outdir is None and grid is None:
        raise UserError('nowhere to write to: give --outdir or --grid')
    device = dist.get_device()
    main_net = load_denoiser(net, device, sha256=sha256)
    guide = load_denoiser(gnet, device, sha256=gnet_sha256) if gnet else None
    for path, assumed in ((net, main_net.recipe.get('assumed')), (gnet, guide and guide.recipe.get('assumed'))):
        if assumed:
            dist.print0(f'Assumed of {path}: {", ".join(f"{key}={value}" for key, value in assumed.items())}; '
                        'snapshot_tool.py convert can set them')
    if guide and (guide.net.img_resolution, guide.net.img_channels) != (main_net.net.img_resolution, main_net.net.img_channels):
        raise UserError(f'--gnet={gnet} makes images of another shape than --net')
    if guidance != 1 and guide is None:
        raise UserError(f'--guidance={guidance} needs a guiding network: give --gnet')
    if model_url:
        main_net.encoder = make_encoder(main_net.encoder.config() | {'vae_name': model_url})
    main_net.encoder.prepare(device)
    label = class_index(main_net.dataset, class_) if class_ is not None else None
    options = dict(net=net, gnet=gnet, guidance=guidance, nimg=main_net.nimg, class_=class_, **sampler)
    folder = OutputFolder(outdir, subdirs, options, main_net.dataset) if outdir else None
    wanted = seeds
    if folder and not grid:
        wanted = dist.broadcast_object([seed for seed in seeds if not os.path.isfile(folder.file(seed))])
        if len(wanted) < len(seeds):
            dist.print0(f'{len(seeds) - len(wanted)} of {len(seeds)} images are there already')
    dist.print0(f'Generating {len(wanted)} images of {main_net.net.img_resolution}x{main_net.net.img_resolution} '
                f'on {dist.get_world_size()} x {device.type}')
    collector, labels = GridCollector(), {}
    skipped = sorted(set(seeds) - set(wanted))[dist.get_rank()::dist.get_world_size()]
    for start in range(0, len(skipped), 256):
        part = skipped[start:start + 256]
        _, ids, _ = draw_inputs(main_net.net, part, None if label is None else [label] * len(part), 'cpu')
        labels |= dict(zip(part, ids.tolist() if ids is not None else [None] * len(part), strict=True))
    batches = generate_images(main_net.net, main_net.encoder, wanted, labels=label, batch=batch, device=device,
                              guide=guide and guide.net, guidance=guidance, progress=True, **sampler)
    for made in batches:
        images = made.images.cpu().numpy()
        for seed, image, one in zip(made.seeds, images, made.labels or [None] * len(images), strict=True):
            labels[seed] = one
            if folder:
                folder.save(seed, image)
            if grid:
                collector.add(seed, one, image)
    if folder:
        folder.finish(labels)
    if grid:
        collector.save(grid, main_net.dataset)
    dist.print0('Wrote ' + ' and '.join(path for path in (outdir, grid) if path))
    dist.shutdown()


EXAMPLES = """\b
Examples:
  # A picture of 64 samples of your own network
  python generate_images.py --net=training-runs/digits/network-snapshot-0000524-0.100.pkl --seeds=0-63 --grid=digits.png
\b
  # 50,000 images of one class on 8 GPUs, with autoguidance
  torchrun --nproc_per_node=8 generate_images.py --net=NET.pkl --gnet=SMALLER.pkl --guidance=2.1 \\
      --outdir=out --subdirs --seeds=0-49999 --class=171
\b
  # A published model (downloaded on first use)
  python generate_images.py --preset=edm2-img512-s-guid-fid --outdir=out --seeds=0-7
\b
Published presets: """ + ', '.join(f'edm2-{name}' for name in PRESETS)


@click.command(cls=cli.Command, epilog=EXAMPLES)
@click.option('--preset', metavar='NAME', help='Published network, guide and guidance (listed below)')
@click.option('--net', metavar='FILE|URL',
              help='Network of this project, EDM, EDM2, guided or class-balancing diffusion; or optimal:DATASET for the '
                   'closed-form denoiser of a data set')
@click.option('--gnet', metavar='FILE|URL', help='Guiding network: unconditional, or a weaker one (autoguidance)')
@click.option('--sha256', metavar='HEX', help='SHA-256 that the file of --net must have')
@click.option('--gnet-sha256', metavar='HEX', help='SHA-256 that the file of --gnet must have')
@click.option('--guidance', metavar='FLOAT', type=float, help='Strength of guidance, 1 = none  [default: 1, or of the preset]')
@click.option('--outdir', metavar='DIR', help='Folder of the images, with labels in dataset.json')
@click.option('--subdirs', is_flag=True, help='A folder for each 1000 seeds')
@click.option('--grid', metavar='FILE.png', help='Write a picture of the first samples, a row for each class')
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='16-19', help='Seeds, e.g. 1,2,5-10: one image each')
@click.option('--class', 'class_', metavar='CLASS', help='Class: original index, name or wnid  [default: drawn from the seed]')
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=32, help='Images at a time on each process')
@click.option('--steps', 'num_steps', metavar='INT', type=click.IntRange(min=1), default=32, help='Sampling steps')
@click.option('--sigma_min', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=0.002, help='Lowest noise level')
@click.option('--sigma_max', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=80, help='Highest noise level')
@click.option('--rho', metavar='FLOAT', type=click.FloatRange(0, min_open=True), default=7, help='Exponent of the time steps')
@click.option('--S_churn', 'S_churn', metavar='FLOAT', type=click.FloatRange(min=0), default=0, help='Strength of added noise')
@click.option('--S_min', 'S_min', metavar='FLOAT', type=click.FloatRange(min=0), default=0, help='Lowest level that gets noise')
@click.option('--S_max', 'S_max', metavar='FLOAT', type=click.FloatRange(min=0), default='inf',
              help='Highest level that gets noise')
@click.option('--S_noise', 'S_noise', metavar='FLOAT', type=click.FloatRange(min=0), default=1, help='Inflation of added noise')
@click.option('--model-url', metavar='NAME|DIR', help='Autoencoder of latents: hub name or folder  [default: of the snapshot]')
def main(preset, **opts):
    """Generate images: one for each seed, the same whatever the batch size and the number of processes.

    Runs on a CPU, a GPU, or under torchrun on many.
    """
    chosen = preset_options(preset) if preset else {}
    for key in ('net', 'gnet', 'guidance'):
        opts[key] = opts[key] if opts[key] is not None else chosen.get(key)
    if opts['net'] is None:
        raise UserError('give --net or --preset')
    opts['guidance'] = 1.0 if opts['guidance'] is None else opts['guidance']
    run(**opts)


if __name__ == '__main__':
    main()
