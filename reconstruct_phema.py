"""Post-hoc EMA: networks for any averaging width, from the snapshots of a finished run."""

import os

import click

from dnnlib import UserError, cli, lazy, options, progress
from dnnlib.options import STDS, integer, text, together, verify
from dnnlib.util import command_line

with lazy.imports(__name__ == '__main__'):
    import torch

    from metrics.features import Detectors
    from metrics.scoring import Scorer
    from torch_utils import distributed as dist
    from torch_utils.files.identify import identify
    from torch_utils.files.weights import check_finite, fingerprint
    from training import phema, snapshot
    from training.data.images import open_images, reference_at
    from training.diffusion.heldout import loss_of_snapshot
    from training.generate import open_generator

from metrics import compute
from metrics.shares import Estimate
from metrics.sweep import (
    HELDOUT,
    Sweep,
    direction,
    parse_metric,
    parse_values,
    picture_of,
)

SNAPSHOT = cli.Written('snapshot', ['.pkl'], lambda path: identify(path).kind == 'snapshot')


class Trajectory:
    """The snapshots of a run up to a time, and the averages that can be made of them."""

    def __init__(self, indir, inprefix=None, instd=None, outkimg=None):
        profiles = phema.list_profiles(indir, inprefix, instd)
        times = {nimg // 1000: nimg for _, nimg, *_ in profiles}
        self.nimg = times.get(max(times) if outkimg is None else outkimg)
        if self.nimg is None:
            raise UserError(f'is the time of no snapshot; there are {sorted(times)}',
                            'outkimg', outkimg)
        self.indir = indir
        self.files, self.in_nimg, self.in_std, self.states = zip(
            *(profile for profile in profiles if profile[1] <= self.nimg), strict=True)
        self.last = snapshot.load_snapshot(self.files[-1].path)
        self.last.nimg = self.nimg

    def path(self, std: float, outdir=None, outprefix=None) -> str:
        """The file of a width."""
        prefix = self.files[0].prefix
        outprefix = outprefix or (phema.MADE if prefix == snapshot.PREFIX else prefix)
        return os.path.join(outdir or self.indir,
                            snapshot.snapshot_name(self.nimg, f'-{std:.3f}', outprefix))

    def averages(self, stds):
        """The Snapshot of each width, by one pass over the files: one network, which changes."""
        result = self.last
        parameters = {name for name, _ in result.net.named_parameters()}
        coefficients = phema.solve_coefficients(self.in_nimg, self.in_std, self.nimg, stds)
        weights = (snapshot.read_weights(file.path) if state is None
                   else check_finite(state, file.path)
                   for file, state in zip(self.files, self.states, strict=True))
        bar = progress.bar(weights, not dist.get_rank(), unit='snapshot', total=len(self.files))
        for std, state in zip(stds, phema.combine(bar, coefficients, parameters), strict=True):
            result.net.load_state_dict(state)
            result.ema_std = std
            yield result


def reconstruct(indir, outstd, inprefix=None, instd=None, outdir=None, outprefix=None,
                outkimg=None, skip=False, batch=None):
    """Writes one snapshot for each width, and yields its path."""
    run = Trajectory(indir, inprefix, instd, outkimg)
    paths = {std: run.path(std, outdir, outprefix) for std in outstd}
    outstd = [std for std, path in paths.items() if not (skip and os.path.isfile(path))]
    for std in outstd:
        SNAPSHOT.check_path(paths[std])
    batch = batch or len(outstd) or 1
    for first in range(0, len(outstd), batch):
        for result in run.averages(outstd[first:first + batch]):
            path = paths[result.ema_std]
            snapshot.save_snapshot(path, **vars(result))
            yield path


EXAMPLES = """\b
Examples:
  python reconstruct_phema.py --indir=training-runs/digits --outstd=0.150
  python reconstruct_phema.py --indir=training-runs/big --outdir=phema \\
      --outstd=0.02,0.05,0.10,0.15,0.20 --batch=2
  python reconstruct_phema.py sweep --indir=training-runs/big --stds=0.02..0.25 \\
      --metric=fd_dinov2 --ref=dataset-refs/img256.pkl
  python reconstruct_phema.py sweep --help"""

# Which averages, and where they go.
trajectory = together(
    text('DIR', '--indir', 'Run with snapshots PREFIX-KIMG-STD.pkl, of this project or of EDM2',
         required=True),
    text('TEXT', '--inprefix', 'Which snapshots, if there are several kinds'),
    text('LIST', '--instd', 'Which widths to use, e.g. 0.05,0.1  [default: all]', type=STDS),
    text('DIR', '--outdir', 'Where to write  [default: --indir]', type=cli.FOLDER),
    text('KIMG', '--outkimg', 'Training time of the result  [default: the latest snapshot]',
         type=int))


@click.group(cls=cli.Group, default='reconstruct', epilog=EXAMPLES)
def main():
    """Reconstruct networks with any EMA width from the snapshots of a run, or find the best.

    See arXiv 2312.02696, Section 3.
    """


@main.command('reconstruct')
@trajectory
@text('TEXT', '--outprefix',
      'Start of the new names  [default: phema, or the prefix of the inputs]')
@text('LIST', '--outstd', 'Relative widths, e.g. 0.05,0.1', required=True, type=STDS)
@click.option('--skip', is_flag=True, help='Leave out what exists')
@integer('--batch', None, 'Widths at a time, to save memory  [default: all]')
@verify
@cli.overwrite
def reconstruct_command(**opts):
    """Write networks of given widths (the default)."""
    for path in reconstruct(**opts):
        print(path)


def _range(values: str):
    found = parse_values(values)
    STDS.function(','.join(map(str, found)))
    return found


RECORD = cli.json_with('results', 'num_images')


@main.command('sweep')
@trajectory
@text('LO..HI', '--stds', 'Widths: golden-section search in the logarithm, or these, e.g. '
      '0.05,0.1', required=True, type=cli.Parsed('range', _range))
@text('NAME', '--metric', 'What decides: a metric of calculate_metrics.py, or heldout, the loss '
      'on the images of --heldout, which needs no samples', required=True,
      type=cli.Parsed('metric', parse_metric))
@text('FILE|URL', '--ref', 'Statistics or images that samples are compared with')
@text('ZIP|DIR', '--heldout', 'Images that were never trained on, for heldout and fld')
@options.count('--num --num-images', 10000, 'Images of each width; heldout: a random subset of '
               'this size')
@options.integer('--seed', 0, 'Seed of the first image; heldout: of subset and noise', least=0)
@options.sweep_points
@text('TEXT', '--outprefix', 'Start of the name of the best  [default: phema]')
@text('JSON', '--dest', 'Record of the sweep; its curve is the .png beside it  [default: '
      'sweep-METRIC.json in --outdir]', type=RECORD)
@options.group('images', options.image_class, options.gnet, options.guidance,
               options.guidance_interval, options.batch(32))
@options.sampling
@options.group('detection', *options.DETECTOR_FILES)
@options.pictures
def sweep(indir, outdir, outprefix, stds, metric, ref, heldout, num, seed, sweep_points, dest,
          precision, images, sampler, detection, **which):
    """Find the width that is best by a metric, and write its network.

    Each width is measured once, as its snapshot would be, by the same seeds. A sweep that was
    stopped goes on with the same command, and with another range keeps what it has measured.

    \b
    python reconstruct_phema.py sweep --indir=training-runs/big --stds=0.02..0.25 \\
        --metric=fd_dinov2 --ref=dataset-refs/img256.pkl
    python reconstruct_phema.py sweep --indir=training-runs/big --stds=0.02..0.25 \\
        --metric=heldout --heldout=heldout.zip
    """
    dist.init(precision)
    direction(metric)
    dest = dest or os.path.join(outdir or indir, f'sweep-{metric}.json')
    RECORD.check_path(dest, 'dest')
    cli.PICTURE.check_path(picture_of(dest), 'dest')
    cli.claim(dest)
    run = Trajectory(indir, **which)
    settings = dict(
        nimg=run.nimg, num=num, seed=seed, heldout=heldout, metric=metric,
        snapshots=[[os.path.basename(file.path), std]
                   for file, std in zip(run.files, run.in_std, strict=True)],
        weights=[fingerprint(run.last.net.state_dict().items())])
    run.last.net.to(dist.get_device())
    if metric == HELDOUT:
        cli.refuse_unused({*images, *sampler, *detection, 'ref'}, '--metric=heldout')
        values, what = loss_of(run.last, heldout, num, seed)
    else:
        values, what = score_of(run.last, metric, ref, heldout, num, seed, detection,
                                sampler=sampler, **images)

    def measure(std: float) -> dict:
        for result in run.averages([std]):                     # as it is in a file
            result.net.load_state_dict(snapshot.stored_state(result.net, torch.float16))
        return values()

    about = dict(num_images=num, indir=indir, command=command_line(), **dist.environment())
    search = Sweep(dest, 'std', metric, settings | what, measure, about)
    search.run(stds, sweep_points)
    for line in search.report():
        dist.print0(line)
    if dist.get_rank() == 0:
        best = search.best['value']
        path = run.path(best, outdir, outprefix or phema.MADE)
        SNAPSHOT.check_path(path)
        for result in run.averages([best]):
            snapshot.save_snapshot(path, **vars(result))
        print(path)
    dist.shutdown()


def loss_of(result, heldout, num: int, seed: int):
    """(function() -> the held-out loss of a Snapshot as it is then, what it depends on)."""
    if heldout is None:
        raise UserError('is needed: images that were never trained on', HELDOUT)
    measure, data = loss_of_snapshot(result, heldout)

    def values() -> dict:
        found = measure(num, seed)
        return {HELDOUT: Estimate.of_images(found.results()[HELDOUT], found.of_images)}

    return values, dict(data_fingerprint=data.fingerprint)


def score_of(result, metric: str, ref, heldout, num: int, seed: int, detection, class_, gnet,
             guidance, guidance_interval, sampler, batch):
    """The same of a metric of images that it makes."""
    if heldout and not compute.of_heldout([metric]):
        raise UserError('is for heldout and fld; leave it out', HELDOUT, heldout)
    generator = open_generator(result, gnet=gnet, guidance=guidance, class_=class_,
                               guidance_interval=guidance_interval, sampler=sampler)
    scorer = Scorer([metric], ref and reference_at(ref), heldout and open_images(heldout),
                    open_images, snapshot.load_snapshot,
                    Detectors.of(open_network=snapshot.load_snapshot, **detection))
    scorer.prepare()
    seeds = range(seed, seed + num)

    def values() -> dict:
        batches = ((part.seeds, part.images, part.labels)
                   for part in generator.images(seeds, batch=batch))
        return scorer.values(batches, num, result.dataset.get('classes'))

    guide = generator.options['guide']
    return values, generator.settings | dict(
        seeds=[*seeds], ref=ref, ref_meta=scorer.reference.meta, gnet=gnet,
        guide=guide and fingerprint(guide.state_dict().items()),
        detectors=scorer.detectors.description(), protocol=scorer.detectors.protocol)


if __name__ == '__main__':
    main()
