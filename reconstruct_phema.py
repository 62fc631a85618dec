"""Post-hoc EMA: networks for any averaging width, from the snapshots of a finished run."""

import os

import click
from tqdm import tqdm

from dnnlib import UserError, cli, options
from training import phema, snapshot


def parse_stds(text: str) -> list[float]:
    try:
        stds = [float(part) for part in text.split(',')]
    except ValueError:
        raise ValueError(f'{text!r} is not a list of widths; write e.g. 0.05,0.1') from None
    if not all(0 < std < phema.exp_to_std(0) for std in stds):
        raise ValueError(f'widths must lie between 0 and {phema.exp_to_std(0):.3f}')
    return stds


def reconstruct(indir, inprefix, outdir, outprefix, outstd, outkimg, batch):
    """Writes one snapshot for each width; returns their paths."""
    entries = []
    for file, nimg, std in phema.list_profiles(indir, inprefix):
        state = snapshot.read_snapshot(file.path)
        entries.append((file, state['nimg'] or nimg, state['ema_std'] or std))
    times = {nimg // 1000: nimg for _, nimg, _ in entries}
    if outkimg is None:
        outkimg = max(times)
    elif outkimg not in times:
        raise UserError(f'--outkimg={outkimg}: no snapshot of that time; '
                        f'there are {sorted(times)}')
    last = times[outkimg]
    files, in_nimg, in_std = zip(*(entry for entry in entries if entry[1] <= last), strict=True)
    prefix = files[0].prefix
    outprefix = outprefix or ('phema' if prefix == snapshot.PREFIX else prefix)
    result = snapshot.load_snapshot(files[-1].path)
    result.nimg = last
    parameters = {name for name, _ in result.net.named_parameters()}
    batch = batch or len(outstd)
    paths = []
    for first in range(0, len(outstd), batch):
        stds = outstd[first:first + batch]
        coefficients = phema.solve_coefficients(in_nimg, in_std, last, stds)
        states = (snapshot.read_snapshot(file.path)['state']
                  for file in tqdm(files, unit='snapshot', disable=None))
        for std, state in zip(stds, phema.combine(states, coefficients, parameters), strict=True):
            result.net.load_state_dict(state)
            result.ema_std = std
            name = snapshot.snapshot_name(last, f'-{std:.3f}', outprefix)
            paths.append(os.path.join(outdir or indir, name))
            snapshot.save_snapshot(paths[-1], **vars(result))
    return paths


EXAMPLES = """\b
Examples:
  python reconstruct_phema.py --indir=training-runs/digits --outstd=0.150
  python reconstruct_phema.py --indir=training-runs/big --outdir=phema \\
      --outstd=0.02,0.05,0.10,0.15,0.20 --batch=2"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@click.option('--indir', metavar='DIR', required=True,
              help='Run with snapshots PREFIX-KIMG-STD.pkl')
@click.option('--inprefix', metavar='TEXT', help='Which snapshots, if there are several kinds')
@click.option('--outdir', metavar='DIR', help='Where to write  [default: --indir]')
@click.option('--outprefix', metavar='TEXT',
              help='Start of the new names  [default: phema, or the prefix of the inputs]')
@click.option('--outstd', metavar='LIST', type=cli.Parsed('list', parse_stds), required=True,
              help='Relative widths, e.g. 0.05,0.1')
@click.option('--outkimg', metavar='KIMG', type=int,
              help='Training time of the result  [default: the latest snapshot]')
@options.integer('--batch', None, 'Widths at a time, to save memory  [default: all]')
def main(**opts):
    """Reconstruct networks with any EMA width from the snapshots of a run.

    See arXiv 2312.02696, Section 3.
    """
    for path in reconstruct(**opts):
        print(path)


if __name__ == '__main__':
    main()
