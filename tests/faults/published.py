"""Runs commands of cases.py, with whole paths, on a host of another name: WORK HOST NAME...

What they write is in WORK/runs/NAME, and inputs in WORK/in. Exit status 1 if one fails.
"""

import re
import shutil
import socket
import sys
from pathlib import Path

import run as harness
from cases import CASES, INPUTS, Case

LATENTS = ('train_edm2.py --outdir=%s --data={in}/e.zip --preset=digits --channels=8 --batch=32 '
           '--status=32 --snapshot=64 --checkpoint=64 --duration=64')
INPUTS |= {'w.zip': 'dataset_tool.py convert --source=digits --dest=w.zip --max-images=8 '
                    '--resolution=64x64 --workers=1',
           'e.zip': 'dataset_tool.py encode --source={in}/w.zip --dest=e.zip '
                    '--model-url={in}/vae --batch=16',
           'latents': LATENTS % 'latents'}
CASES |= {
    'metrics-calc': Case('calculate_metrics.py calc --images={in}/d.zip --ref={in}/stats.npz '
                         '--metrics=fd_pixels --dest=calc.json'),
    'train-latents': Case(LATENTS % 'out'),
    'export-latents': Case('snapshot_tool.py convert {in}/latents/network-snapshot-0000000-0.100.pkl '
                           '--dest=out')}
# Names of what is written, which get their folder.
WRITTEN = re.compile(r'((?:--(?:outdir|dest|logdir|output_dir|expdir|grid)|tempfile)[= ])(?=\w)')


def main(work, host, *names):
    harness.preload()
    socket.gethostname = lambda: host
    work = Path(work)
    commands = harness.Harness(work, 0)
    for name in names:
        case = CASES[name]
        commands.need(case.command, case.copied)
        folder = work / 'runs' / name
        folder.mkdir(parents=True)
        for copied in case.copied:
            shutil.copytree(commands.inputs / copied, folder / copied)
        whole = WRITTEN.sub(rf'\g<1>{folder}/', case.command)
        done = harness.run(Case(whole), folder, commands.inputs)
        if done['status']:
            raise SystemExit(f'{name}: {whole}\n{done["out"]}{done["err"]}')


if __name__ == '__main__':
    main(*sys.argv[1:])
