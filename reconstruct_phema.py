"""Post-hoc EMA: networks for any averaging width, from the snapshots of a finished run."""

import os

import click

from dnnlib import UserError, cli, lazy, progress
from dnnlib.options import STDS, integer, text, verify

with lazy.imports(__name__ == '__main__'):
    from torch_utils.files.identify import identify
    from torch_utils.files.weights import check_finite
    from training import phema, snapshot


SNAPSHOT = cli.Written('snapshot', ['.pkl'], lambda path: identify(path).kind == 'snapshot')


def reconstruct(indir, outstd, inprefix=None, instd=None, outdir=None, outprefix=None,
                outkimg=None, skip=False, batch=None):
    """Writes one snapshot for each width, and yields its path."""
    profiles = phema.list_profiles(indir, inprefix, instd)
    times = {nimg // 1000: nimg for _, nimg, *_ in profiles}
    last = times.get(max(times) if outkimg is None else outkimg)
    if last is None:
        raise UserError(f'is the time of no snapshot; there are {sorted(times)}',
                        'outkimg', outkimg)
    files, in_nimg, in_std, states = zip(
        *(profile for profile in profiles if profile[1] <= last), strict=True)
    prefix = files[0].prefix
    outprefix = outprefix or ('phema' if prefix == snapshot.PREFIX else prefix)
    paths = {std: os.path.join(outdir or indir,
                               snapshot.snapshot_name(last, f'-{std:.3f}', outprefix))
             for std in outstd}
    outstd = [std for std, path in paths.items() if not (skip and os.path.isfile(path))]
    for std in outstd:
        SNAPSHOT.check_path(paths[std])
    result = snapshot.load_snapshot(files[-1].path)
    result.nimg = last
    parameters = {name for name, _ in result.net.named_parameters()}
    batch = batch or len(outstd) or 1
    for first in range(0, len(outstd), batch):
        stds = outstd[first:first + batch]
        coefficients = phema.solve_coefficients(in_nimg, in_std, last, stds)
        weights = (snapshot.read_weights(file.path) if state is None
                   else check_finite(state, file.path)
                   for file, state in zip(files, states, strict=True))
        bar = progress.bar(weights, unit='snapshot', total=len(files))
        for std, state in zip(stds, phema.combine(bar, coefficients, parameters), strict=True):
            result.net.load_state_dict(state)
            result.ema_std = std
            snapshot.save_snapshot(paths[std], **vars(result))
            yield paths[std]


EXAMPLES = """\b
Examples:
  python reconstruct_phema.py --indir=training-runs/digits --outstd=0.150
  python reconstruct_phema.py --indir=training-runs/big --outdir=phema \\
      --outstd=0.02,0.05,0.10,0.15,0.20 --batch=2"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@text('DIR', '--indir', 'Run with snapshots PREFIX-KIMG-STD.pkl, of this project or of EDM2',
      required=True)
@text('TEXT', '--inprefix', 'Which snapshots, if there are several kinds')
@text('LIST', '--instd', 'Which widths to use, e.g. 0.05,0.1  [default: all]', type=STDS)
@text('DIR', '--outdir', 'Where to write  [default: --indir]', type=cli.FOLDER)
@text('TEXT', '--outprefix',
      'Start of the new names  [default: phema, or the prefix of the inputs]')
@text('LIST', '--outstd', 'Relative widths, e.g. 0.05,0.1', required=True, type=STDS)
@text('KIMG', '--outkimg', 'Training time of the result  [default: the latest snapshot]', type=int)
@click.option('--skip', is_flag=True, help='Leave out what exists')
@integer('--batch', None, 'Widths at a time, to save memory  [default: all]')
@verify
@cli.overwrite
def main(**opts):
    """Reconstruct networks with any EMA width from the snapshots of a run.

    See arXiv 2312.02696, Section 3.
    """
    for path in reconstruct(**opts):
        print(path)


if __name__ == '__main__':
    main()
