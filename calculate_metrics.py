"""Measure images: distances, quality and diversity, generalisation; memorization."""

import dataclasses
import math

import click

from dnnlib import UserError, cli, lazy, options
from dnnlib.util import command_line, hide, write_json

with lazy.imports(__name__ == '__main__'):
    import torch

    from metrics.detectors import PROTOCOLS
    from metrics.features import Detectors, measure, measure_images
    from metrics.images import class_ids, read_batches, select
    from metrics.memorization import find_copies, open_search
    from metrics.statistics import Statistics, is_statistics, load_statistics, save_statistics
    from torch_utils import distributed as dist
    from training.diffusion.heldout import loss_of_snapshot
    from training.diffusion.samplers import Guided
    from training.generate import open_generator
    from training.snapshot import load_denoiser, load_snapshot

from metrics import compare as comparing
from metrics import compute
from metrics.shares import interval_of, parts_of, with_intervals
from metrics.sweep import Sweep, direction, parse_sweep, picture_of
from training.data.arrays import with_key
from training.data.images import holds_images, open_dataset, open_images, pixels_of

DEFAULT = 'fid,fd_dinov2'
# Options that are names of files, and decide no number by themselves.
FILES = ('inception', 'inception_sha256', 'dinov2', 'dinov2_base', 'clip', 'own')
STATISTICS = cli.Written('file of statistics', ['.pkl', '.pt', '.npz'], is_statistics)


@click.group(cls=cli.Group)
def main():
    """Measure how close images are to a reference.

    \b
    python calculate_metrics.py ref --data=datasets/img256.zip --dest=dataset-refs/img256.pkl
    python calculate_metrics.py calc --images=out --ref=dataset-refs/img256.pkl
    python calculate_metrics.py gen --net=NET.pkl --ref=dataset-refs/img256.pkl --seeds=0-49999
    python calculate_metrics.py memorization --net=NET.pkl --data=datasets/cifar10-2000.zip
    python calculate_metrics.py compare a.json b.json
    python calculate_metrics.py heldout --net=NET.pkl --data=heldout.zip

    \b
    Metrics (--metrics=LIST):
      fid fd_dinov2 fd_dinov2_base fd_clip fd_pixels fd_own   Frechet distance of features:
                         Inception, DINOv2 (L, B), CLIP, the pixels of small images, or a
                         classifier of your own (--own)
      sfid               the same for Inception's spatial features
      fid_inf ...        the same of infinitely many images, _inf after any of these
      is                 Inception Score (needs no reference)
      cmmd               distance of kernels of CLIP
      recognition        share of small images recognised as their class by a classifier
                         trained on the reference images
    
    Of Inception's features; with _dinov2, _dinov2_base, _clip, _pixels or _own appended, of those:
      kid                distance of kernels
      precision recall   of k-nearest-neighbour manifolds
      density coverage   the same without their faults
      vendi              how many different images there are, in effect (needs no reference)
      authpct            percentage that is no copy; --ref is the training set
      ct fld fld_gap     copying and generalisation; --ref is the training set, and --heldout
                         images that were never trained on

    \b
    Protocols: Inception sees images as in the TensorFlow graph with edm and adm, as in its ports
    to PyTorch with cbdm; distances of the one are not those of the other
      edm     EDM and EDM2
      adm     guided diffusion's suite: is in chunks of 5000, k=3, 10000 images as reference
              of precision and recall
      cbdm    class-balancing diffusion (long_tail): is in 10 parts, k=5, 50000 images

    Networks are downloaded on first use, or read from --inception, --dinov2, --dinov2-base and
    --clip; pixel metrics need none. docs/metrics.md says what each measures, and of how many
    images. All commands run under torchrun as well, with the same results. Some
    versions of torchrun take --num for an option of their own: write --num-images there.
    """


# Options of all commands but memorization: which metrics, which detectors.
detection = options.group(
    'detection',
    options.text('LIST', '--metrics', f'What to calculate, see above  [default: {DEFAULT}]',
                 type=cli.Parsed('list', compute.parse_metrics)),
    options.choice('--protocol', 'edm', 'Rules of the measurement, see above',
                   ['edm', 'adm', 'cbdm']),
    *options.DETECTOR_FILES)
workers = options.integer('--workers', 2, 'Threads that read images ahead; 0 = none', least=0)
# Options of commands that read images from files.
reading = options.group(
    'reading',
    options.text('CLASS', '--class class_name',
                 'Only images of these classes: original indices, names, wnids, ranges'),
    options.count('--num --num-images', None,
                  'Use a random subset of this size  [default: all; calc: at most 50000]'),
    options.integer('--seed', 0, 'Which images --num takes', least=0),
    options.batch(64),
    workers,
)
# Options of commands that compare with a reference.
comparison = options.group(
    'comparison',
    options.text('FILE|URL', '--ref',
                 'Statistics (.pkl, .npz), or reference images, as --data of ref'),
    options.text('HEX', '--ref-sha256', 'SHA-256 that the file of --ref must have'),
    options.text('CLASS', '--ref-class', 'Only these classes of the reference, if it is images'),
    options.heldout,
    click.option('--mix-protocols', is_flag=True,
                 help='Compare with statistics of another protocol'),
    options.text('JSON', '--dest', 'Write results and all that is needed to repeat them',
                 type=cli.json_with('results', 'num_images')),
)


def generation(num: int):
    """Decorator: options of a command that measures `num` images of a network."""
    return options.together(
        options.network, options.image_class, options.batch(32), options.sampling,
        options.integers('--seeds', None, 'Seeds, e.g. 1,2,5-10: one image each  '
                         f'[default: {num} of them from --seed on]'),
        options.count('--num --num-images', None, 'Images, of the first of the seeds'),
        options.integer('--seed', 0, 'Seed of the first image', least=0),
        workers)


def make_detectors(metrics, reference=None, heldout=None, **detection):
    """The metrics to calculate, and their detectors; `reference` and `heldout` have to serve them,
    if any.

    Of the default metrics, what cannot be had is left out, with a warning; what the user asked for
    must be there.
    """
    detectors = Detectors.of(open_network=load_snapshot, **detection)
    chosen = []
    problems = []
    for metric in metrics or compute.parse_metrics(DEFAULT):
        try:
            if reference is not None:
                compute.missing_in(reference, [metric])
            if heldout is not None:
                compute.missing_in(heldout, compute.of_heldout([metric]))
            detectors[compute.METRICS[metric].detector]
            chosen.append(metric)
        except UserError as error:
            if metrics:
                raise
            problems.append(f'{metric} is left out: {error.text}')
    if not chosen:
        raise UserError('; '.join(problems) + '; or choose other --metrics '
                        f'({compute.listing()})')
    for problem in problems:
        dist.print0(f'Warning: {problem}')
    return chosen, detectors


@main.command()
@options.text('PATH', '--data', 'Reference images: a folder, a .zip, an .npz, or whatever else '
              'dataset_tool.py reads', required=True)
@options.key
@options.text('FILE', '--dest', 'Statistics to write: .pkl or .npz', required=True,
              type=STATISTICS)
@detection
@options.count('--features', None, 'Keep the features of at most this many images, if the '
               'metrics need them  [default: as many as the protocol compares with]')
@reading
@options.pictures
@options.verify
def ref(data, key, dest, detection, features, reading):
    """Make reference statistics of a data set, for the metrics that are to use them.

    \b
    python calculate_metrics.py ref --data=datasets/img256.zip --dest=dataset-refs/img256.pkl
    python calculate_metrics.py ref --data=datasets/digits.zip --dest=digits.pkl \\
        --metrics=fd_pixels,precision_pixels
    """
    dist.init()
    if detection['metrics'] and compute.is_free(detection['metrics']):
        raise UserError(f'needs no reference; give some of {",".join(compute.FRECHET)}',
                        'metrics', ','.join(detection['metrics']))
    data = with_key(data, key)
    images = open_images(data)
    metrics, detectors = make_detectors(**detection)
    cli.claim(dest)
    # The features of a space come with its Gaussian: the same pass finds it, and it says what the
    # features are.
    wanted = compute.needs(metrics)
    wanted['gaussians'] = list(dict.fromkeys(wanted['gaussians'] + wanted['features']))
    keep_num, kept_meta = compute.kept_features(metrics, detectors.rules, reading['seed'])
    if features is not None:
        keep_num, kept_meta = features, {}
    statistics = measure_images(images, detectors, **reading, **wanted, keep_num=keep_num)
    num = statistics.gaussians[wanted['gaussians'][0]].num
    statistics.meta = dict(data=data, fingerprint=images.fingerprint, num=num,
                           class_name=reading['class_name'], seed=reading['seed'],
                           detectors=detectors.description()) | kept_meta
    if dist.get_rank() == 0:
        save_statistics(dest, statistics)
    kept = [f', {len(values)} features of {space}'
            for space, values in statistics.features.items()]
    dist.print0(f'{dest}: {",".join(statistics.gaussians)} of {num} images' + ''.join(kept))
    dist.shutdown()


@main.command()
@options.text('PATH', '--images', 'Images to measure, as --data of ref', required=True)
@options.key
@detection
@comparison
@reading
@options.pictures
@options.verify
def calc(images, key, detection, comparison, reading):
    """Measure images in files.

    \b
    python calculate_metrics.py calc --images=out --ref=dataset-refs/img256.pkl
    python calculate_metrics.py calc --images=samples.npz --ref=VIRTUAL_imagenet256_labeled.npz \\
        --metrics=fid,sfid,is,precision,recall --dest=results.json
    python calculate_metrics.py calc --images=out --class=171 --ref=heldout.zip --ref-class=171 \\
        --metrics=fd_pixels
    """
    dist.init()
    num = reading['num']
    if num is None:
        reading['num'] = PROTOCOLS[detection['protocol']].num
    images = with_key(images, key)
    batches, count, what = of_files(images, **reading)
    if num and count < num:
        raise UserError(f'is too many: {images} has only {count} images', 'num', num)
    measure_and_report(batches, count, what, detection, reading, **comparison)


@main.command()
@generation(50000)
@detection
@comparison
@options.text('NAME=LO:HI', '--sweep', 'Find the best guidance, or the best end of its interval '
              '(interval-low, interval-high), by the first of --metrics, with the same seeds for '
              'each value: golden-section search, or these values, NAME=A,B,C. --dest is its '
              'record, its curve the .png beside it', type=cli.Parsed('sweep', parse_sweep))
@options.sweep_points
@options.pictures
def gen(precision, detection, comparison, sweep, sweep_points, **source):
    """Generate images and measure them, without writing them to files.

    The images are those of generate_images.py with the same options. A sweep that was stopped goes
    on with the same command, and with another range keeps what it has measured.

    \b
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen --net=NET.pkl \\
        --ref=dataset-refs/img256.pkl
    python calculate_metrics.py gen --net=NET.pkl --seeds=0-999 --ref=datasets/digits.zip \\
        --metrics=fd_pixels
    python calculate_metrics.py gen --net=NET.pkl --gnet=SMALLER.pkl --sweep=guidance=1:4 \\
        --num=10000 --ref=dataset-refs/img256.pkl --metrics=fd_dinov2 --dest=guidance.json
    """
    dist.init(precision)
    if sweep:
        sweep_guidance(*sweep, sweep_points, detection, source, comparison)
        return
    cli.refuse_unused({'sweep_points'}, 'a single measurement')
    batches, count, what = of_network(50000, **source)
    measure_and_report(batches, count, what, detection, source, **comparison)


@main.command()
@options.text('PATH', '--images', 'Images to measure, instead of those of --net')
@options.text('PATH', '--data', 'Training set', required=True)
@options.boolean('--xflip', False, 'Compare with mirrored training images too')
@options.closeness
@options.pictures
@generation(10000)
@options.text('JSON', '--dest',
              'Write ratio, distances and indices of the nearest training images',
              type=cli.json_with('results', 'num_training'))
@options.text('PNG', '--grid',
              'Write a picture of the most memorized images above their training images',
              type=cli.PICTURE)
def memorization(images, data, xflip, closeness, dest, grid, precision, **source):
    """Measure how many images are copies of training images.

    Memorized is what is less than a third as far from its nearest training image as from the
    second nearest (L2 distance of pixels 0..255; arXiv 2310.02664). --space measures the distance
    in features, which see copies of other colours or cropping. Of --images --num takes a random
    subset, and --seed says which.

    \b
    python calculate_metrics.py memorization --net=NET.pkl --data=datasets/cifar10-2000.zip \\
        --dest=memorization.json --grid=memorization.png
    python calculate_metrics.py memorization --images=out --data=datasets/digits.zip
    python calculate_metrics.py memorization --net=optimal:datasets/digits.zip \\
        --data=datasets/digits.zip --num=500
    """
    dist.init(precision)
    network = source['network']
    if (images is None) == (network['net'] is None and network['preset'] is None):
        raise UserError('give either --net (or --preset) or --images')
    if images is None:
        cli.refuse_unused({'workers'}, '--net')
    else:
        cli.refuse_unused({*source['sampler'], *network, 'seeds', 'precision'}, '--images')
    training = pixels_of(open_dataset(data, use_labels=False, xflip=xflip))
    if images is None:
        batches, count, what = of_network(10000, progress=True, **source)
    else:
        batches, count, what = of_files(images, source['class_'], *(
            source[key] for key in ('num', 'seed', 'batch', 'workers')))
    cli.claim(dest, grid)
    settings = {key: value for key, value in closeness.items() if key not in FILES and value}
    limit = closeness.pop('limit')
    search = open_search(training, open_network=load_snapshot, **closeness)
    copies = find_copies(batches, training, search=search, limit=limit)
    if dist.get_rank() == 0:
        results = copies.results()
        print(f'\n{count} images against {len(training)} of {data}')
        ratio = results['memorization_ratio']
        print(f'  memorization_ratio  {ratio:.4f}{interval_of(ratio)}'
              f'  {results["num_memorized"]} of {results["num_images"]}')
        print(f'  mean_distance       {results["mean_distance"]:.4f}')
        if limit is not None:
            near = results['near_ratio']
            print(f'  near_ratio          {near:.4f}{interval_of(near)}  nearer than {limit:g}')
        if dest:
            write_json(dest, dict(
                what, results=with_intervals(results), data=data, closeness=settings,
                data_fingerprint=training.fingerprint, xflip=xflip,
                num_training=len(training), command=command_line(), **dist.environment(),
                samples=copies.table()), indent=None)
        if grid:
            copies.save_picture(grid, training)
    dist.shutdown()


@main.command()
@click.argument('first', metavar='A.json', type=hide)
@click.argument('second', metavar='B.json', type=hide)
@options.text('JSON', '--dest', 'Write the differences',
              type=cli.json_with('differences', 'notes'))
def compare(first, second, dest):
    """Compare the results of two measurements: B - A, with intervals.

    Paired, image by image, where both generated the same seeds: then the noise that they share
    does not count. The reference counts as given.

    \b
    python calculate_metrics.py gen --net=A.pkl --ref=ref.pkl --dest=a.json
    python calculate_metrics.py gen --net=B.pkl --ref=ref.pkl --dest=b.json
    python calculate_metrics.py compare a.json b.json
    """
    cli.claim(dest)
    sides = [comparing.read_results(path) for path in (first, second)]
    rows = comparing.differences(*sides)
    notes = comparing.notes(*sides)
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f'  {row.name:{width}}  {row.first:10.6g}  {row.second:10.6g}  {row.value:+10.4g}'
              f'{interval_of(row.value)}' + '  paired' * row.paired)
    for row in rows:
        print(row.sentence())
    for note in notes:
        print(f'Note: {note}')
    if dest:
        values = {row.name: dict(with_intervals({'difference': row.value}), first=row.first,
                                 second=row.second, paired=row.paired, sentence=row.sentence())
                  for row in rows}
        write_json(dest, dict(differences=values, notes=notes, first=first, second=second,
                              command=command_line()))


@main.command()
@options.text('FILE|URL', '--net', 'Network of a diffusion model', required=True)
@options.text('ZIP|DIR', '--data heldout', 'Images that it was not trained on', required=True)
@options.text('FILE|URL', '--baseline', 'Another network: the difference, paired over images')
@options.count('--num --num-images', None, 'Use a random subset of this size  [default: all]')
@options.integer('--seed', 0, 'Seed of the subset, of the noise and its levels', least=0)
@options.text('JSON', '--dest', 'Write results, and the loss of each image',
              type=cli.json_with('results', 'num_images'))
@options.fast_products
@options.allow_nonfinite
@options.verify
def heldout(net, heldout, baseline, num, seed, dest, precision, allow_nonfinite):
    """Measure the training loss of a network on images that it was not trained on.

    Each image is seen at 8 noise levels, one from each eighth of those of its training, with the
    same levels and the same noise for every network. The standard error is that of the mean over
    images (s / sqrt(N) of their losses, each the mean of its levels); with --baseline also the
    mean difference and its own, which is that of the differences of single images.

    \b
    python calculate_metrics.py heldout --net=NET.pkl --data=heldout.zip
    python calculate_metrics.py heldout --net=NET.pkl --baseline=OTHER.pkl --data=heldout.zip
    """
    dist.init(precision)
    cli.claim(dest)
    found = {}
    for path in filter(None, (net, baseline)):
        snapshot = load_denoiser(path, dist.get_device(), allow_nonfinite=allow_nonfinite)
        measure, data = loss_of_snapshot(snapshot, heldout)
        if data.fingerprint and data.fingerprint == snapshot.dataset.get('fingerprint'):
            dist.print0(f'Note: {path} was trained on {heldout}: this is no held-out loss')
        found[path] = measure(num, seed)
    if dist.get_rank() == 0:
        ours = found[net]
        results = ours.results()
        count = len(ours.losses)
        print(f'\n{count} images of {heldout}\n  heldout  {results["heldout"]:.6g} +- '
              f'{results["heldout_se"]:.2g} (standard error)')
        for name, value in ours.by_level().items():
            print(f'  sigma {name:8}  {value:.6g}')
        if baseline:
            difference, error = ours.less_than(found[baseline])
            results |= {'difference': difference, 'difference_se': error}
            print(f'  less {baseline}: {difference:.6g} +- {error:.2g} (paired over images)')
        if dest:
            write_json(dest, dict(
                results=results, by_sigma=ours.by_level(), num_images=count, net=net,
                baseline=baseline, data=heldout, seed=seed, samples=ours.of_images.tolist(),
                command=command_line(), **dist.environment()))
    dist.shutdown()


def of_files(path, class_name, num, seed, batch, workers):
    """Batches for `measure` of images in files, how many images they are, and what they are."""
    images = open_images(path)
    indices = select(images, num, seed, class_name)
    batches = read_batches(images, indices, batch, workers)
    return batches, len(indices), dict(images=path, fingerprint=images.fingerprint,
                                       class_name=class_name, num=num, seed=seed, batch=batch)


def of_network(default, network, class_, sampler, **source):
    """The same of images of a network."""
    return of_generator(open_generator(**network, class_=class_, sampler=sampler), default,
                        **source)


def of_generator(generator, default, seeds, seed, num, batch, workers, **options):
    """The same of a generator, for the first `num` (else `default`) seeds, each once."""
    if seeds is None:
        seeds = range(seed, seed + (default if num is None else num))
    elif seed:
        raise UserError('is for calls without --seeds', 'seed', seed)
    seeds = sorted(list(dict.fromkeys(seeds))[:num])
    if not seeds:
        raise UserError('there is nothing to generate', field='num', value=0)
    classes = generator.snapshot.dataset.get('classes')
    batches = ((torch.tensor(part.seeds), part.images,
                part.labels and torch.from_numpy(class_ids(part.labels, classes)))
               for part in generator.images(seeds, batch=batch, **options))
    return batches, len(seeds), dict(generator.record, seeds=seeds, num=num, batch=batch)


def open_reference(path, sha256, class_name, metrics) -> Statistics:
    """What --ref names; empty without it."""
    if path is None and not (metrics and compute.is_free(metrics)):
        raise UserError('--ref is missing: statistics or images to compare with '
                        '(only --metrics=is and vendi need none)')
    if sha256 and not path:
        raise UserError('is of a file; give a reference', 'ref_sha256', sha256)
    reference = Statistics()
    if path:
        reference = load_statistics(path, sha256, holds_images=holds_images)
    if class_name is None:
        return reference
    if reference.images is None:
        raise UserError(f'needs images as --ref, and {path} holds statistics', 'ref_class',
                        class_name)
    return Statistics(path, images=reference.images)  # its statistics are those of all classes


def open_heldout(path, metrics) -> Statistics | None:
    """What --heldout names, if one of the metrics needs it."""
    wanted = compute.of_heldout(metrics or [])
    if path and not wanted:
        raise UserError('is for ct, fld and fld_gap; choose one of them with --metrics, or leave '
                        'it out', 'heldout', path)
    compute.require_heldout(wanted, path)
    return load_statistics(path, holds_images=holds_images) if path else None


def open_comparison(detection, reading, ref, ref_sha256, ref_class, heldout, mix_protocols, dest):
    """(metrics, detectors, reference, images that were never trained on or None), all ready.

    `reading` has `batch` and `workers`, for reference images.
    """
    reference = open_reference(ref, ref_sha256, ref_class, detection['metrics'])
    unseen = open_heldout(heldout, detection['metrics'])
    metrics, detectors = make_detectors(**detection, reference=reference, heldout=unseen)
    protocol = detectors.protocol
    if not mix_protocols:
        for side in (reference, unseen):
            if side is not None:
                compute.same_protocol(side, protocol, metrics)
    cli.claim(dest)
    sources = dict(batch=reading['batch'], workers=reading['workers'])
    reference = compute.complete(reference, metrics, detectors, open_images, class_name=ref_class,
                                 **sources)
    if unseen is not None:
        unseen = compute.complete(unseen, compute.of_heldout(metrics), detectors, open_images,
                                  class_name=ref_class, **sources)
    return metrics, detectors, reference, unseen


def measure_and_report(batches, count: int, what: dict, detection, reading, **comparison):
    """Measures images, compares them with the reference, prints a table and writes JSON."""
    metrics, detectors, reference, unseen = open_comparison(detection, reading, **comparison)
    ref, dest = (comparison[name] for name in ('ref', 'dest'))
    rules = detectors.rules
    generated = measure(batches, count, detectors, **compute.needs(metrics, rules))
    if dist.get_rank() == 0:
        results = compute.evaluate(metrics, generated, reference, rules, detectors.device, unseen)
        notes = compute.notes(generated, reference, detectors)
        width = max(map(len, results))
        print(f'\n{count} images' + (f' against {ref}' if ref else ''))
        for name, value in results.items():
            print(f'  {name:{width}}  {value:.6g}{interval_of(value)}')
        for note in notes:
            print(f'Note: {note}')
        if dest:
            write_json(dest, dict(
                results=with_intervals(results), num_images=count, **what,
                **compared_with(comparison, reference, detectors), notes=notes,
                parts=parts_of(results), command=command_line(), **dist.environment()))
    dist.shutdown()


def compared_with(comparison, reference, detectors) -> dict:
    """What numbers depend on besides the images, for records."""
    return dict({name: comparison[name] for name in ('ref', 'ref_class', 'heldout')},
                ref_images={space: part.num for space, part in reference.gaussians.items()},
                ref_meta=reference.meta, ref_protocol=reference.protocol,
                protocol=detectors.protocol, detectors=detectors.description())


def sweep_guidance(name: str, values, points: int, detection, source, comparison):
    """Measures images of one network, by the same seeds, with several values of its guidance.

    Each value has the images and the numbers of a call of `gen` with it.
    """
    dest = comparison['dest']
    if dest is None:
        raise UserError('is needed: it is the record of the sweep', 'dest')
    for metric in (detection['metrics'] or [])[:1]:
        direction(metric, 'metrics')
    cli.PICTURE.check_path(picture_of(dest), 'dest')
    network, class_, sampler = (source.pop(key) for key in ('network', 'class_', 'sampler'))
    if name == 'guidance':
        cli.refuse_unused({'guidance'}, '--sweep=guidance')
    low, high = network['guidance_interval'] or (0, math.inf)

    def guiding(value: float | None) -> dict:
        if name == 'guidance':
            interval = None if value == 1 else network['guidance_interval']
            return dict(guidance=value, guidance_interval=interval)
        ends = {'interval-low': low, 'interval-high': high} | {name: value}
        return dict(guidance_interval=tuple(ends.values()))

    opened = open_generator(**network | guiding(values[-1]), class_=class_, sampler=sampler)

    def at(value: float):
        return dataclasses.replace(opened, options=opened.options | guiding(value))

    for end in values:
        options = at(end).options
        Guided(None, None, options['guide'], options['guidance'], options['guidance_interval'])
    metrics, detectors, reference, unseen = open_comparison(detection, source, **comparison)
    notes = {}

    def score(value: float) -> dict | None:
        batches, count, _ = of_generator(at(value), 50000, **source)
        generated = measure(batches, count, detectors, **compute.needs(metrics, detectors.rules))
        if dist.get_rank():
            return None
        notes.update(dict.fromkeys(compute.notes(generated, reference, detectors)))
        return compute.evaluate(metrics, generated, reference, detectors.rules, detectors.device,
                                unseen)

    _, count, what = of_generator(opened, 50000, **source)
    about = dict(num_images=count, **{key: what.pop(key) for key in ('net', 'gnet', 'batch')},
                 command=command_line(), **dist.environment())
    settings = what | compared_with(comparison, reference, detectors) | guiding(None)
    search = Sweep(dest, name, metrics[0], settings | {'metrics': metrics}, score, about)
    search.run(values, points)
    for line in [*search.report(), *(f'Note: {note}' for note in notes)]:
        dist.print0(line)
    dist.shutdown()


if __name__ == '__main__':
    main()
