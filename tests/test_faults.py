"""Killed, stopped or on a full disk, scripts lose nothing: a few of the faults of tests/faults/run.py."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, environment


def faults(dest, *args):
    """Runs the harness; its results, and what it printed."""
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'faults' / 'run.py', f'--dest={dest}', *args],
                          env=environment(), text=True, capture_output=True)
    return done, json.loads(dest.read_text())


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    scripts = ['convert', 'train_edm2', 'generate_images', 'combine_data']
    kinds = ['kill', 'ENOSPC', 'TERM']
    done, rows = faults(tmp_path / 'faults.json', *(f'--script={name}' for name in scripts),
                        *(f'--fault={kind}' for kind in kinds))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {(row['script'], row['fault']) for row in rows}
    assert ('train_edm2', 'TERM') in seen                       # shorter commands may end before a signal comes
    assert seen >= {(name, kind) for name in scripts for kind in kinds if kind != 'TERM'}


WRITER = """
import os, sys
os.mkdir('a')
with open('a/x.part', 'w') as file:
    file.write('12345678')
os.replace('a/x.part', 'a/x')
os.remove('a/x')
with open(sys.argv[1], 'w') as file:
    file.write('elsewhere')
"""


@pytest.mark.parametrize('kind, at, status, left', [
    (None, None, 0, {}), ('kill', 2, -9, {'x.part': '1234'}), ('ENOSPC', 2, 1, {'x.part': '1234'}),
    ('EIO', 1, 1, {}), ('kill', 4, -9, {'x': '12345678'}), ('ENOSPC', 3, 0, {})])
def test_a_fault_is_at_the_chosen_operation(tmp_path, kind, at, status, left):
    """Made: a folder, a file, a write, a new name, a removal. A full disk does not keep from removing."""
    (tmp_path / 'root').mkdir()
    fault = dict(root=str(tmp_path / 'root'), counter=str(tmp_path / 'counter'), kind=kind, at=at)
    done = subprocess.run([sys.executable, '-c', WRITER, tmp_path / 'other'], cwd=tmp_path / 'root', text=True,
                          env=environment(FAULT=json.dumps(fault), PYTHONPATH=str(ROOT / 'tests' / 'faults')), capture_output=True)
    assert done.returncode == status, done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / 'root' / 'a').glob('*')} == left
    assert (tmp_path / 'counter').read_text().upper().startswith('COWMM'[:at] if status else 'COWMM')
    if kind not in (None, 'kill') and status:
        assert ('No space left on device' if kind == 'ENOSPC' else 'Input/output error') in done.stderr
