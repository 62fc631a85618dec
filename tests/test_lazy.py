"""What a script works with is imported when it starts to work, and then all of it."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, environment, project_files

import calculate_metrics
import snapshot_tool
from distillation import configs, dkdm
from dnnlib import lazy, options
from long_tail import evaluation
from metrics import detectors, statistics
from training import export
from training.diffusion import samplers

HEAVY = ('torch', 'scipy', 'pandas', 'diffusers', 'transformers', 'sklearn', 'matplotlib', 'tensorboard', 'safetensors')
FILES = project_files() + sorted((ROOT / 'benchmarks').glob('*.py'))
SCRIPTS = [str(path.relative_to(ROOT)) for path in FILES if "\nif __name__ == '__main__':" in path.read_text()]
# Runs a script to its end as users do; then prints which heavy modules it has imported.
RUN = f"""
import atexit, json, os, runpy, sys
sys.path[0] = os.path.dirname(sys.argv[1])
atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if name in sys.modules])))
runpy.run_path(sys.argv.pop(0) and sys.argv[0], run_name='__main__')
"""


def child(code: str, *args):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], env=environment(), cwd=ROOT, text=True,
                          capture_output=True, timeout=600)


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_does_not_wait_for_torch(script):
    result = child(RUN, ROOT / script, '--help')
    *lines, heavy = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0].startswith('Usage:'), result.stderr
    assert json.loads(heavy) == []
    assert '  ?' not in lines                       # a mark of click that would have been printed


@pytest.mark.parametrize('line', [
    'calculate_metrics.py calc --images=x --metrics=nonsense', 'generate_images.py --outdir=x --solver=nonsense',
    'train.py --outdir=x --data=x --arch=nonsense', 'train_edm2.py --outdir=x --data=x --preset=nonsense --batch=0',
    'snapshot_tool.py convert x.pkl --dest=x --dtype=nonsense', 'long_tail/main.py --data_type=nonsense',
    'synthetic_data/train_classifier.py --nonsense', 'data_utils/digits_memorization.py --sizes=nonsense'])
def test_mistakes_in_options_do_not_wait_for_torch(line):
    script, *args = line.split()
    result = child(RUN, ROOT / script, *args)
    assert result.returncode != 0 and result.stderr.splitlines()[-1].startswith('Error: '), result.stderr
    assert 'ModuleNotFound' not in result.stderr and json.loads(result.stdout.splitlines()[-1]) == []


# Starts each script in a fork, lets it import all, and prints what then still waits in any module, or in its tables.
LOAD = """
import contextlib, io, os, runpy, sys, traceback
import diffusers, matplotlib.pyplot, pandas, scipy.linalg, scipy.special, sklearn.neighbors, torch, transformers
from dnnlib import lazy

for script in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            sys.argv = [script, '--help']
            sys.path[0] = os.path.dirname(script)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name='__main__')
            waited = len(lazy._waiting)
            main = [names for names in lazy._waiting if names['__name__'] == '__main__']
            lazy.load()
            for names in [*map(vars, list(sys.modules.values())), *main]:
                for name, value in list(names.items()):
                    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
                    if isinstance(value, lazy._Later) or any(isinstance(one, lazy._Later) for one in values):
                        print(script, names['__name__'], name, flush=True)
            print(script, 'waited' if waited else 'had all', flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""


def test_nothing_waits_any_more_when_a_script_works():
    result = child(LOAD, *(ROOT / script for script in SCRIPTS))
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(ROOT / script) for script in SCRIPTS], result.stdout + result.stderr
    assert sum(line.endswith(' waited') for line in lines) > 20
    assert lazy._waiting == []                                  # nothing ever waits in a process of tests


def choices(command, name: str) -> tuple:
    return tuple(next(param for param in command.params if param.name == name).type.choices)


def test_words_of_options_are_those_of_the_library():
    assert choices(calculate_metrics.calc, 'protocol') == tuple(detectors.PROTOCOLS)
    assert choices(snapshot_tool.convert, 'dtype') == tuple(export.DTYPES)
    assert calculate_metrics.STATISTICS.endings == statistics.ENDINGS
    assert configs.CHAINS == tuple(dkdm.SOURCES)

    @evaluation.detector_options
    @options.samplers
    def command():
        pass

    words = {param.name: getattr(param.type, 'choices', None) for param in command.__click_params__}
    assert set(words['detector']) == {*statistics.USUAL} == {*detectors.DETECTORS}
    assert {name: tuple(words[name]) for name in samplers.CHOICES} == samplers.CHOICES
