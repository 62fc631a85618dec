"""Memorization during training: the ratio of every snapshot of a run, as a table and as a
curve."""

import json
import os
import textwrap

import click

from dnnlib import UserError, budget, cli, lazy, options, pictures, util
from metrics.shares import percent, with_intervals
from training.data.images import open_dataset, pixels_of
from training.data.sources import kind_of

with lazy.imports(__name__ == '__main__'):
    from metrics.memorization import find_copies, open_search
    from torch_utils import distributed as dist
    from training import runs
    from training.diffusion.samplers import choose_setting, plain_setting
    from training.generate import OutputFolder, open_generator
    from training.snapshot import list_snapshots, load_snapshot


AS_PUBLISHED = dict(space='pixels', neighbors=2, shifts=0, limit=None)
LOG = cli.json_with('settings', 'snapshots', what='log of mem_ratio.py', endings=())


def load_log(path: str) -> tuple[dict, dict]:
    """The settings of an earlier call, and the rows that it has written to the log, by
    snapshot."""
    if not os.path.isfile(path):
        return {}, {}
    try:
        log = budget.read_json(path)
        rows = {(row['snapshot'], row['modified']): row for row in log['snapshots']}
        settings = util.finite(dict(log['settings']))
        return settings | {'sampler': plain_setting(settings.get('sampler', {}))}, rows
    except (OSError, ValueError, KeyError, TypeError):
        if cli.overwrites():
            return {}, {}
        raise UserError('is no log of mem_ratio.py; remove it or choose another name',
                        'log', path) from None


def measure(expdir, name, seeds, training, batch, subdirs, search, limit, **options):
    """(nimg, copies) of the samples of one snapshot, which are kept as files with `subdirs`."""
    generator = open_generator(os.path.join(expdir, name), **options)
    if subdirs:
        path = os.path.join(expdir, 'samples', name.removesuffix('.pkl'))
        folder = OutputFolder(path, True, generator.record | dict(net=name),
                              generator.snapshot.dataset)
    batches = list(generator.images(seeds, batch=batch, progress=True))
    if subdirs:
        for part in batches:
            folder.add(part)
        folder.finish()
    copies = find_copies(((part.seeds, part.images) for part in batches), training,
                         search=search, limit=limit)
    return generator.snapshot.nimg, copies


def open_training(expdir: str, knn_ref: str | None):
    """(path, images) of `knn_ref`, else of what the run learned. Raises UserError if that is not
    here, or has changed.
    """
    run_options = runs.read_options(expdir)
    data = knn_ref or runs.path_of(expdir, 'data')
    if data is None:
        raise UserError(f'{expdir}/training_options.json names no training set; give --knn-ref')
    if kind_of(data) is None:
        raise UserError(f'the training set {data} of {expdir} is not here; give --knn-ref')
    xflip = bool(run_options.get('xflip'))
    training = pixels_of(open_dataset(data, use_labels=False, xflip=xflip))
    recorded = run_options.get('dataset', {}).get('fingerprint', training.fingerprint)
    if not knn_ref and recorded != training.fingerprint:
        raise UserError(f'{data} has changed since the run {expdir} learned it; give --knn-ref')
    return data, training


def is_same(earlier: dict, settings: dict, paths: dict) -> bool:
    """Whether the rows of a log, of the settings `earlier`, are of these settings, wherever run
    and training set are. Logs of earlier versions know them by their paths alone.
    """
    if 'fingerprint' in earlier:
        ours = settings
        earlier = util.without(earlier, paths)
    else:
        ours = util.without(settings, ['fingerprint']) | paths
    return earlier == json.loads(json.dumps(ours))


def save_trajectory(path: str, rows: list[dict], title: str):
    """Memorization ratio against thousands of training images, a curve for each EMA width."""
    curves = {}
    for row in rows:
        label = f'EMA {row["ema"]}' if row['ema'] else None
        point = (row['nimg'] / 1000, 100 * row['memorization_ratio'])
        curves.setdefault(label, []).append(point)
    pictures.save_curves(path, curves, 'memorized samples (%)', ylim=(-3, 103),
                         title=textwrap.fill(title, 60))


@click.command(cls=cli.Command)
@options.text('DIR', '--expdir', 'Folder of a run', required=True)
@options.text('PATH', '--knn-ref', 'Training set  [default: that of the run]')
@options.text('JSON', '--log', 'Table to write; pictures get its name  '
              '[default: EXPDIR/mem_ratio.json]', type=LOG)
@options.integers('--seeds', None, 'Seeds, e.g. 0-9999: one image each  '
                  '[default: those of the log, else 0-63]')
@click.option('--subdirs', is_flag=True,
              help='Keep the samples: EXPDIR/samples/SNAPSHOT, a folder for each 1000 seeds')
@options.closeness
@options.image_class
@options.pictures
@options.batch(64)
@options.sampling
@options.allow_nonfinite
def main(expdir, knn_ref, log, seeds, subdirs, closeness, class_, batch, sampler, precision,
         allow_nonfinite):
    """Measure the memorization ratio of every snapshot of a run.

    As calculate_metrics.py memorization does. Writes a table, the curve of the ratio over training
    (.png), and the most memorized samples of the last snapshot above their training images
    (-pairs.png). Called again, it measures only what is new. All networks are sampled by EDM's
    sampler in 18 steps, as published, unless options say otherwise.

    \b
    python mem_ratio.py --expdir=runs/00000-cifar10-2000-uncond-ddpmpp-vp-gpus8-batch512-fp32 \\
        --seeds=0-9999
    torchrun --standalone --nproc_per_node=8 mem_ratio.py --expdir=RUN \\
        --knn-ref=datasets/cifar10/cifar10-2000.zip --log=RUN/ratio.json --seeds=0-9999 \\
        --subdirs --batch=512
    """
    dist.init(precision)
    sampler = choose_setting(None, {'name': 'edm'}, sampler)
    snapshots = list_snapshots(expdir)
    if not snapshots:
        raise UserError('holds no network-snapshot-*.pkl; give the folder of a run',
                        'expdir', expdir)
    data, training = open_training(expdir, knn_ref)
    stem, ending = os.path.splitext(log or os.path.join(expdir, 'mem_ratio.json'))
    if ending == '.png':
        raise UserError(f'is the name of a picture; give e.g. {stem}.json', 'log', log)
    log = stem + ending
    earlier, known = load_log(log)
    for ending in ('.png', '-pairs.png'):
        util.check_place(stem + ending, field='log')
        if not earlier:                                        # else they are those of the log
            cli.PICTURE.check_path(stem + ending, 'log')
    seeds = seeds or earlier.get('seeds', [*range(64)])
    paths = dict(expdir=os.path.abspath(expdir), knn_ref=os.path.abspath(data))
    settings = dict(num_training=len(training), seeds=seeds, sampler=plain_setting(sampler))
    if class_ is not None:
        settings['class'] = class_
    limit = closeness.pop('limit')
    search = open_search(training, open_network=load_snapshot, **closeness)
    how = dict(space=closeness['space'], neighbors=search.k, shifts=closeness['shifts'],
               limit=limit)
    settings |= {key: value for key, value in how.items() if value != AS_PUBLISHED[key]}
    settings['fingerprint'] = training.fingerprint
    known = known if is_same(earlier, settings, paths) else {}
    settings |= paths
    if subdirs:
        samples = os.path.join(expdir, 'samples')
        click.get_current_context().with_resource(runs.claimed(samples, 'generating'))
    cli.claim(log)
    rows = []
    dist.print0(f'{len(seeds)} samples of each of {len(snapshots)} snapshots '
                f'against {len(training)} images of {data}\n'
                f'{"kimg":>8}  {"EMA":5}  {"ratio (95% interval)":>27}  {"distance":>8}  '
                'memorized')
    for file in snapshots:
        name = os.path.basename(file.path)
        modified = os.path.getmtime(file.path)
        row = dist.broadcast_object(known.get((name, modified)))
        last = file == snapshots[-1]
        if row is None or (last and not os.path.isfile(stem + '-pairs.png')):
            nimg, copies = measure(expdir, name, seeds, training, batch, subdirs, search, limit,
                                   class_=class_, sampler=sampler,
                                   allow_nonfinite=allow_nonfinite)
            row = dict(snapshot=name, modified=modified, nimg=nimg, ema=file.average,
                       **with_intervals(copies.results()))
            if last and dist.get_rank() == 0:
                copies.save_picture(stem + '-pairs.png', training)
        rows.append(row)
        dist.print0(f'{file.kimg:8d}  {file.average or "-":5}  '
                    f'{percent(row, "memorization_ratio"):>27}  {row["mean_distance"]:8.3f}  '
                    f'{round(row["memorization_ratio"] * row["num_images"])} of '
                    f'{row["num_images"]}')
        if dist.get_rank() == 0:
            util.write_json(log, dict(settings=settings, snapshots=rows))
    if dist.get_rank() == 0:
        save_trajectory(stem + '.png', rows, os.path.basename(os.path.abspath(expdir)))
        print(f'Wrote {log}, {stem}.png and {stem}-pairs.png')
    dist.shutdown()


if __name__ == '__main__':
    main()
