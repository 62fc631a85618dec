"""What several tests need: running the scripts as users do, small data sets, tiny networks."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import click.testing
import numpy as np
import torch
from sklearn.datasets import load_digits

from dnnlib.image_io import encode_png
from training.data.archive import ArchiveWriter

ROOT = pathlib.Path(__file__).resolve().parents[1]


def project_files(root=ROOT) -> list[pathlib.Path]:
    """The project's Python files without tests and benchmarks, and without what is installed beside them."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name[0] != '.' and name not in ('tests', 'benchmarks', 'build')
            and not os.path.exists(os.path.join(folder, name, 'pyvenv.cfg')))
        paths += [pathlib.Path(folder, name) for name in sorted(names) if name.endswith('.py')]
    return paths


def command(script, *args, processes=None):
    """The command line of a script of the repository, under torchrun if `processes` is given."""
    launcher = [sys.executable]
    if processes:
        launcher += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [*launcher, str(ROOT / script), *map(str, args)]


def environment(**extra):
    return os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'} | extra


def run(script, *args, processes=None, check=True, cwd=None, **extra):
    """Runs a script to its end; with `check` it must succeed. Returns the CompletedProcess with text output."""
    result = subprocess.run(command(script, *args, processes=processes), cwd=cwd, env=environment(**extra), text=True,
                            capture_output=True, timeout=600)
    if check:
        assert result.returncode == 0, f'{script} failed:\n{result.stdout}\n{result.stderr}'
    return result


@functools.cache
def script_module(script):
    """A script of the repository as a module (its command is `main`)."""
    spec = importlib.util.spec_from_file_location('script_' + script.replace('/', '_').removesuffix('.py'), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(script, *args) -> str:
    """Runs a script in this process; it must succeed. Returns what it prints."""
    result = click.testing.CliRunner().invoke(script_module(script).main, list(map(str, args)))
    assert result.exit_code == 0, f'{script} failed:\n{result.output}\n{result.exception!r}'
    return result.output


def fails(script, *args) -> str:
    """Runs a script (in this process) that must end in exactly one line of error and no traceback; returns that line."""
    result = click.testing.CliRunner().invoke(script_module(script).main, [str(arg) for arg in args])
    assert isinstance(result.exception, SystemExit), f'{script} raised {result.exception!r}'
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(('Usage:', 'Try '))]
    assert result.exit_code != 0, f'{script} should have failed:\n{result.stdout}'
    assert len(lines) == 1 and lines[0].startswith('Error: '), result.stderr
    return lines[0]


def traced_only(monkeypatch) -> list:
    """torch.compile without the C++ code, and the networks that it gets from now on: what is traced, and the conditions under
    which that is taken again, are the same.
    """
    networks, compile = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net, **how: networks.append(net) or compile(net, backend='eager', **how))
    return networks


def write_digits(path, count=200, labels=True, first=0):
    """A data set of `count` handwritten digits, 8x8 RGB, and its path."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    with ArchiveWriter(path) as out:
        rows = []
        for i in range(first, first + count):
            name = f'00000/img{i:08d}.png'
            out.add(name, encode_png(pixels[i, :, :, None].repeat(3, axis=2)))
            rows.append([name, int(digits.target[i])])
        out.add_description({'labels': rows if labels else None})
    return str(path)


# What training calls of the package wandb: it writes down what it gets.
_WANDB = '''
import contextlib, json, os
FOLDER = os.path.dirname(__file__)
class Image:
    def __init__(self, pixels):
        self.shape = pixels.shape
class Run(contextlib.nullcontext):
    def log(self, values, step):
        values = {name: {'picture': value.shape} if isinstance(value, Image) else value
                  for name, value in values.items()}
        print(json.dumps([step, values]), file=open(FOLDER + '/wandb.jsonl', 'a'))
def init(project, dir, config, resume, name, id):
    print(json.dumps([project, dir, name, config['batch'], resume, id]), file=open(FOLDER + '/wandb.json', 'a'))
    return Run(Run())
'''


def fake_wandb(folder, monkeypatch):
    """A package wandb, which writes wandb.json (a line for each start) and wandb.jsonl (for each call of log) there."""
    (folder / 'wandb.py').write_text(_WANDB)
    monkeypatch.setitem(sys.modules, 'wandb', None)            # what is imported now is gone after the test
    monkeypatch.delitem(sys.modules, 'wandb')
    monkeypatch.syspath_prepend(folder)
