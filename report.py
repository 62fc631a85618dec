"""A page of what was trained: one HTML file to read, to send and to keep."""

import os

import click

from dnnlib import UserError, cli, lazy, options

with lazy.imports(__name__ == '__main__'):
    from training.report import write_report

PAGE = cli.Written('page', ['.html'], cli.has_mark)


@click.command(cls=cli.Command)
@click.argument('run', nargs=-1, required=True, metavar='RUN...')
@options.text('HTML', '--dest', 'Page to write  [default: report.html in the first folder]',
              type=PAGE)
@options.boolean('--hashes', True, 'With the SHA-256 of all files, which reads them whole')
def main(run, dest, hashes):
    """Write a page of runs, side by side, or of a study: what was trained on what, with which
    command; curves, samples, measures, copies, starts and stops, files.

    RUN is the folder of a run of any of the trainers, also of one that goes on or was cut, that of
    a study in miniature, or one with runs below it. The page needs no network and no other
    file, and holds no path of this machine.

    \b
    python report.py training-runs/digits
    python report.py runs/00000-cifar10-1000 runs/00001-cifar10-2000 --dest=sizes.html
    python report.py training-runs/study-memorization
    """
    for folder in run:
        if not os.path.isdir(folder):
            raise UserError('is no folder of a run', value=folder)
    dest = dest or os.path.join(run[0], 'report.html')
    PAGE.check_path(dest, 'dest')
    cli.claim(dest)
    write_report(dest, list(run), hashes)
    print(f'Wrote {dest} ({os.path.getsize(dest):,} bytes)')


if __name__ == '__main__':
    main()
