"""Measure images: FID, FD-DINOv2, sFID, Inception Score, precision and recall, against a reference; memorization."""

import math
import sys

import click
import numpy as np
import torch
from click.core import ParameterSource

import dnnlib
from dnnlib import UserError, cli
from generate_images import main as generate_images_command
from generate_images import preset_options
from metrics import compute, reference
from metrics import images as image_files
from metrics.memorization import find_copies
from torch_utils import distributed as dist
from training.data.archive import check_parent
from training.data.dataset import ImageDataset, class_index
from training.data.images import open_images
from training.encoders import make_encoder
from training.generate import generate_images
from training.snapshot import load_denoiser

METRIC_LIST = cli.Parsed('list', compute.parse_metrics)
DEFAULT = 'fid,fd_dinov2'


@click.group(cls=cli.Group)
def main():
    """Measure how close images are to a reference.

    \b
    python calculate_metrics.py ref --data=datasets/img256.zip --dest=dataset-refs/img256.pkl
    python calculate_metrics.py calc --images=out --ref=dataset-refs/img256.pkl
    python calculate_metrics.py gen --net=NET.pkl --ref=dataset-refs/img256.pkl --seeds=0-49999
    python calculate_metrics.py memorization --net=NET.pkl --data=datasets/cifar10/cifar10-16x16-2000.zip

    \b
    Metrics (--metrics=LIST):
      fid fd_dinov2 fd_pixels   Frechet distance of features: Inception, DINOv2, the pixels of small images
      sfid                      the same for Inception's spatial features
      is                        Inception Score (needs no reference)
      precision recall          of k-nearest-neighbour manifolds in Inception features;
                                with _dinov2 or _pixels appended, in those features
      recognition               share of small images recognised as their class by a classifier trained on the
                                reference images

    Inception and DINOv2 are downloaded on first use, or read from --inception and --dinov2; pixel metrics need neither.
    All commands run under torchrun as well, with the same results. Some versions of torchrun take --num for an option of
    their own: write --num-images there.
    """


def common_options(function):
    """Options of all commands: which metrics, which detectors, how the work is done."""
    for option in reversed([
        click.option('--metrics', metavar='LIST', type=METRIC_LIST, help=f'What to calculate, see above  [default: {DEFAULT}]'),
        click.option('--inception', metavar='FILE|URL', envvar='INCEPTION_WEIGHTS', show_envvar=True,
                     help='Weights of the FID network: pt_inception-2015-12-05 as torch, safetensors or TorchScript file'),
        click.option('--dinov2', metavar='DIR|NAME', envvar='DINOV2_WEIGHTS', show_envvar=True,
                     help='DINOv2 ViT-L/14: folder of transformers, or hub name'),
    ]):
        function = option(function)
    return function


def reading_options(function):
    """Options of commands that read images from files."""
    for option in reversed([
        click.option('--class', 'class_', metavar='CLASS', help='Only images of this class: original index, name or wnid'),
        click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, help='Which images --num takes'),
        click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=64, help='Images at a time on each process'),
        click.option('--workers', metavar='INT', type=click.IntRange(min=1), default=2, help='Threads that read ahead'),
    ]):
        function = option(function)
    return function


def result_options(function):
    """Options of commands that compare with a reference."""
    for option in reversed([
        click.option('--ref', metavar='FILE|URL', help='Statistics (.pkl, .npz), or reference images (folder, .zip, .npz)'),
        click.option('--ref-sha256', metavar='HEX', help='SHA-256 that the file of --ref must have'),
        click.option('--ref-class', metavar='CLASS', help='Only this class of the reference, if it is images'),
        click.option('--protocol', type=click.Choice(list(compute.PROTOCOLS)), default='adm',
                     help='Rules of is, precision and recall: chunks of 5000, k=3; or 10 parts, k=5 (long-tail study)'),
        click.option('--dest', metavar='JSON', help='Write results and all that is needed to repeat them'),
    ]):
        function = option(function)
    return function


def make_detectors(metrics, inception, dinov2, known=None):
    """The metrics to calculate, and their detectors; `known` is the reference that has to serve them, if any.

    Of the default metrics, what cannot be had is left out, aloud; what the user asked for must be there.
    """
    detectors = compute.Detectors({'inception': inception, 'dinov2': dinov2})
    chosen, problems = [], []
    for metric in metrics or compute.parse_metrics(DEFAULT):
        try:
            if known is not None:
                compute.missing_in(known, [metric])
            detectors[compute.detector_of(metric)]
            chosen.append(metric)
        except UserError as error:
            if metrics:
                raise
            problems.append(f'{metric} is left out: {error}')
    if not chosen:
        raise UserError('; '.join(problems) + f'; or choose other --metrics ({",".join(compute.METRICS)})')
    for problem in problems:
        dist.print0(f'Warning: {problem}')
    return chosen, detectors


@main.command()
@click.option('--data', metavar='ZIP|DIR|NPZ', required=True, help='Reference images')
@click.option('--dest', metavar='FILE', required=True, help='Statistics to write: .pkl or .npz')
@common_options
@click.option('--num', '--num-images', metavar='INT', type=cli.COUNT, help='Use a random subset of this size  [default: all]')
@click.option('--features', metavar='INT', type=cli.COUNT, default=10000,
              help='Keep the features of at most this many images, if the metrics have precision or recall')
@reading_options
def ref(data, dest, metrics, inception, dinov2, num, features, class_, seed, batch, workers):
    """Make reference statistics of a data set, for the metrics that are to use them.

    \b
    python calculate_metrics.py ref --data=datasets/img256.zip --dest=dataset-refs/img256.pkl
    python calculate_metrics.py ref --data=datasets/digits.zip --dest=digits.pkl --metrics=fd_pixels,precision_pixels
    """
    dist.init()
    reference.check_destination(dest)
    if metrics and not any(compute.needs(metrics).values()):
        raise UserError(f'--metrics={",".join(metrics)} needs no reference; give some of {",".join(compute.SPACES)}')
    images = open_images(data)
    metrics, detectors = make_detectors(metrics, inception, dinov2)
    # Precision and recall of a space come with its Gaussian: the same pass finds it, and it says what the features are.
    wanted = compute.needs(metrics)
    wanted['spaces'] = list(dict.fromkeys([*wanted['spaces'], *wanted['features']]))
    measured = compute.measure_images(images, detectors, num=num, seed=seed, class_name=class_, batch=batch, workers=workers,
                                      keep_num=features, **wanted)
    meta = dict(data=data, class_name=class_, seed=seed, num=measured.num, detectors=detectors.description())
    if dist.get_rank() == 0:
        reference.save_reference(dest, reference.Reference(dest, measured.gaussians, measured.features, meta=meta))
    kept = ''.join(f', {len(x)} features of {space}' for space, x in measured.features.items())
    dist.print0(f'{dest}: {",".join(measured.gaussians)} of {measured.num} images{kept}')
    dist.shutdown()


@main.command()
@click.option('--images', metavar='ZIP|DIR|NPZ', required=True, help='Images to measure')
@common_options
@result_options
@click.option('--num', '--num-images', metavar='INT', type=cli.COUNT, help='Images to use, a random subset  [default: 50000]')
@reading_options
def calc(images, num, class_, seed, **opts):
    """Measure images in files.

    \b
    python calculate_metrics.py calc --images=out --ref=dataset-refs/img256.pkl
    python calculate_metrics.py calc --images=samples.npz --ref=VIRTUAL_imagenet256_labeled.npz \\
        --metrics=fid,sfid,is,precision,recall --dest=results.json
    python calculate_metrics.py calc --images=out --class=171 --ref=heldout.zip --ref-class=171 --metrics=fd_pixels
    """
    dist.init()
    opened = open_images(images)
    indices = image_files.select(opened, 50000 if num is None else num, seed, class_)
    if num and len(indices) < num:
        raise UserError(f'--num={num}: {images} has only {len(indices)} images{f" of class {class_}" if class_ else ""}')
    batches = image_files.read_batches(opened, indices, opts['batch'], opts['workers'])
    measure_and_report(batches, len(indices), dict(images=images, class_name=class_), num=num, seed=seed, **opts)


@main.command()
@common_options
@result_options
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='0-49999', help='One image for each seed')
@click.option('--num', '--num-images', metavar='INT', type=cli.COUNT, help='Only the first ones of --seeds')
@click.option('--workers', metavar='INT', type=click.IntRange(min=1), default=2, help='Threads that read reference images')
def gen(preset, net, gnet, sha256, gnet_sha256, guidance, model_url, class_, seeds, num, batch, workers, metrics, inception,
        dinov2, ref, ref_sha256, ref_class, protocol, dest, **sampler):
    """Generate images and measure them, without writing them to files.

    The images are those of generate_images.py with the same options.

    \b
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen --net=NET.pkl --ref=dataset-refs/img256.pkl
    python calculate_metrics.py gen --net=NET.pkl --seeds=0-999 --ref=datasets/digits.zip --metrics=fd_pixels
    """
    dist.init()
    made, snapshot, seeds, what = generator(preset, net, gnet, (sha256, gnet_sha256), guidance, model_url, class_, seeds, num,
                                            batch, sampler)
    batches = by_position(made, seeds, snapshot.dataset.get('classes'))
    measure_and_report(batches, len(seeds), what, metrics=metrics, inception=inception, dinov2=dinov2, ref=ref,
                       ref_sha256=ref_sha256, ref_class=ref_class, protocol=protocol, dest=dest, num=num, seed=0, batch=batch,
                       workers=workers)


@main.command()
@click.option('--images', metavar='ZIP|DIR|NPZ', help='Images to measure, instead of those of --net')
@click.option('--data', metavar='ZIP|DIR', required=True, help='Training set')
@click.option('--xflip', metavar='BOOL', type=bool, default=False, help='Compare with mirrored training images too')
@click.option('--seeds', metavar='LIST', type=cli.INT_LIST, default='0-9999', help='One image of --net for each seed')
@click.option('--num', '--num-images', metavar='INT', type=cli.COUNT,
              help='Only the first ones of --seeds; of --images a random subset')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, help='Which of --images --num takes')
@click.option('--dest', metavar='JSON', help='Write ratio, distances and indices of the nearest training images')
@click.option('--grid', metavar='PNG', help='Write a picture of the most memorized images above their training images')
@click.option('--workers', metavar='INT', type=click.IntRange(min=1), default=2, help='Threads that read --images')
def memorization(preset, net, gnet, sha256, gnet_sha256, guidance, model_url, class_, images, data, xflip, seeds, num, seed,
                 dest, grid, batch, workers, **sampler):
    """Measure how many images are copies of training images.

    Memorized is what is less than a third as far from its nearest training image as from the second nearest
    (L2 distance of pixels 0..255; arXiv 2310.02664).

    \b
    python calculate_metrics.py memorization --net=NET.pkl --data=datasets/cifar10/cifar10-16x16-2000.zip \\
        --dest=memorization.json --grid=memorization.png
    python calculate_metrics.py memorization --images=out --data=datasets/digits.zip
    python calculate_metrics.py memorization --net=optimal:datasets/digits.zip --data=datasets/digits.zip --num=500
    """
    dist.init()
    if (images is None) == (net is None and preset is None):
        raise UserError('give either --net (or --preset) or --images')
    of_net = {*sampler, 'gnet', 'sha256', 'gnet_sha256', 'guidance', 'model_url', 'seeds'}
    refuse_unused({'seed', 'workers'} if images is None else of_net, '--net' if images is None else '--images')
    for path in filter(None, (dest, grid)):
        check_parent(path)
    training = open_training_set(data, xflip)
    if images is None:
        made, _, seeds, what = generator(preset, net, gnet, (sha256, gnet_sha256), guidance, model_url, class_, seeds, num,
                                         batch, sampler, progress=True)
        batches = ((part.seeds, part.images) for part in made)
    else:
        opened = open_images(images)
        indices = image_files.select(opened, num, seed, class_)
        what = dict(images=images, class_name=class_, seed=seed)
        batches = ((indices[part[0].numpy()], part[1]) for part in image_files.read_batches(opened, indices, batch, workers))
    copies = find_copies(batches, training, progress=True)
    if dist.get_rank() == 0:
        results = copies.results()
        print(f'\n{len(copies.ids)} images against {len(training)} of {data}')
        print(f'  memorization_ratio  {results["memorization_ratio"]:.4f}')
        print(f'  mean_distance       {results["mean_distance"]:.4f}')
        if dest:
            dnnlib.util.write_json(dest, dict(
                results=results, **what, data=data, xflip=xflip, num_training=len(training), num=num, batch=batch,
                command=sys.argv, **compute.environment(), samples=copies.table()), indent=None)
        if grid:
            copies.save_picture(grid, training)
    dist.shutdown()


def refuse_unused(names, where: str):
    """Raises UserError if the user gave one of the options `names`, which have no meaning with `where`."""
    context = click.get_current_context()
    for param in context.command.params:
        if param.name in names and context.get_parameter_source(param.name) == ParameterSource.COMMANDLINE:
            raise UserError(f'{param.opts[0]} has no meaning with {where}; leave it out')


def open_training_set(path: str, xflip: bool = False) -> ImageDataset:
    """A data set of pixels to compare with."""
    training = ImageDataset(path, use_labels=False, xflip=xflip)
    if training.dtype != np.uint8:
        raise UserError(f'--data={path} holds latents; memorization is measured in pixels: give the data set that was encoded')
    return training


# Sampling options are those of generate_images.py, word for word.
for _command in (gen, memorization):
    _OWN = {param.name for param in _command.params} | {'outdir', 'subdirs', 'grid'}
    _command.params += [param for param in generate_images_command.params if param.name not in _OWN]


def generator(preset, net, gnet, hashes, guidance, model_url, class_, seeds, num, batch, sampler, progress=False):
    """(batches of `generate_images`, snapshot, seeds, what the record says) for the sampling options of a command.

    `hashes`: SHA-256 of `net` and `gnet`, or None.
    """
    chosen = preset_options(preset) if preset else {}
    net, gnet = net or chosen.get('net'), gnet or chosen.get('gnet')
    guidance = next(value for value in (guidance, chosen.get('guidance'), 1.0) if value is not None)
    if net is None:
        raise UserError('give --net or --preset')
    if guidance != 1 and gnet is None:
        raise UserError(f'--guidance={guidance} needs a guiding network: give --gnet')
    device = dist.get_device()
    snapshot = load_denoiser(net, device, sha256=hashes[0])
    guide = load_denoiser(gnet, device, sha256=hashes[1]).net if gnet else None
    if model_url:
        snapshot.encoder = make_encoder(snapshot.encoder.config() | {'vae_name': model_url})
    snapshot.encoder.prepare(device)
    label = class_index(snapshot.dataset, class_) if class_ is not None else None
    seeds = list(dict.fromkeys(seeds))[:num]
    if not seeds:
        raise UserError('--num=0: there is nothing to generate')
    made = generate_images(snapshot.net, snapshot.encoder, seeds, labels=label, batch=batch, device=device, guide=guide,
                           guidance=guidance, progress=progress, **sampler)
    what = dict(net=net, gnet=gnet, guidance=guidance, class_name=class_, seeds=seeds,
                sampler={key: value if math.isfinite(value) else str(value) for key, value in sampler.items()})
    return made, snapshot, seeds, what


def by_position(made, seeds, classes):
    """Generated batches as `compute.measure` takes them: an image's position is that of its seed."""
    place = {seed: i for i, seed in enumerate(seeds)}
    for batch in made:
        ids = None if batch.labels is None else torch.from_numpy(image_files.class_ids(batch.labels, classes))
        yield torch.tensor([place[seed] for seed in batch.seeds]), batch.images, ids


def measure_and_report(batches, count, what, *, metrics, inception, dinov2, ref, ref_class, protocol, dest, num, seed, batch,
                       workers, ref_sha256=None):
    """Measures images, compares them with the reference, prints a table and writes JSON."""
    if ref is None and metrics != ['is']:
        raise UserError('--ref is missing: statistics or images to compare with (only --metrics=is needs none)')
    known = reference.load_reference(ref, ref_sha256) if ref else reference.Reference('')
    if ref_class is not None:
        if known.images is None:
            raise UserError(f'--ref-class={ref_class} needs images as --ref, and {ref} holds statistics')
        known = reference.Reference(ref, images=known.images)  # its statistics are those of all classes
    metrics, detectors = make_detectors(metrics, inception, dinov2, known)
    rules = compute.PROTOCOLS[protocol]
    known = compute.complete_reference(known, metrics, detectors, open_images, class_name=ref_class, batch=batch,
                                       workers=workers, keep_num=50000, seed=seed)
    measured = compute.measure(batches, count, detectors, **compute.needs(metrics),
                               protocol=rules if 'is' in metrics else None)
    if dist.get_rank() == 0:
        results = compute.evaluate(metrics, measured, known, rules, detectors.device)
        notes = compute.notes(measured, known, detectors)
        width = max(map(len, results))
        print(f'\n{count} images' + (f' against {ref}' if ref else ''))
        for name, value in results.items():
            print(f'  {name:{width}}  {value:.6g}')
        for note in notes:
            print(f'Note: {note}')
        if dest:
            ref_images = {space: gaussian.num for space, gaussian in known.gaussians.items()}
            dnnlib.util.write_json(dest, dict(
                results=results, num_images=count, **what, num=num, seed=seed, ref=ref, ref_class=ref_class,
                ref_images=ref_images, ref_meta=known.meta, protocol=protocol, batch=batch,
                detectors=detectors.description(), notes=notes, command=sys.argv, **compute.environment()))
    dist.shutdown()


if __name__ == '__main__':
    main()
