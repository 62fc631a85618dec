"""What is installed: every package by its hash where a lock applies, and torch alone from its own server."""

import re
import shutil
import subprocess

import pytest
from helpers import ROOT
from packaging.requirements import Requirement


def pins(name, python) -> dict:
    """Package -> (version, hashes) of the lines that count for a Python."""
    found = {}
    for line in (ROOT / name).read_text().replace('\\\n', '').splitlines():
        words, *hashes = line.partition('#')[0].split('--hash=sha256:')
        if not words.strip():
            continue
        one = Requirement(words)
        assert [spec.operator for spec in one.specifier] == ['=='], line
        if one.marker is None or one.marker.evaluate({'python_version': python}):
            assert one.name not in found, f'{name}: {one.name} twice'
            found[one.name] = next(iter(one.specifier)).version, [part.strip() for part in hashes]
    return found


@pytest.mark.parametrize('python', ['3.11', '3.12'])
@pytest.mark.parametrize('lock', ['requirements.lock', 'requirements-cuda.lock'])
def test_the_lock_has_every_requirement_with_its_version_and_hashes(lock, python):
    locked = pins(lock, python)
    for name, (version, _) in pins('requirements.txt', python).items():
        assert locked[name][0] == version, name
    for name, (_, hashes) in locked.items():
        assert hashes and all(len(digest) == 64 for digest in hashes), name
    # PyPI's torch needs CUDA's packages; a lock without them has another torch.
    assert {'triton', 'cuda-toolkit'} <= set(locked) or lock == 'requirements.lock'


def test_the_library_takes_what_is_tested_and_no_torch():
    project = (ROOT / 'pyproject.toml').read_text()
    needed = list(map(Requirement, re.findall(r'"([\w-]+>=[\d.]+)"', project.partition('dependencies = [')[2].partition(']')[0])))
    assert len(needed) > 9 and 'torch' not in {one.name for one in needed} and 'torch = ["torch>=2.11"]' in project
    for python in ('3.10', '3.11'):
        tested = pins('requirements.txt', python)
        assert all(one.specifier.contains(tested[one.name][0]) for one in needed)


def test_on_a_python_with_a_known_cpu_build_the_lock_has_no_cuda():
    assert not any(name.startswith('nvidia') for name in pins('requirements.lock', '3.11'))


# A stand-in for Python: is there a lock for it, does torch's page answer, do the wheels of the lock fit?
PYTHON = '''#!/bin/bash
case "$*" in
    *libc_ver*) exit {lock} ;;
    *urlopen*) exit {server} ;;
    *version_info*) echo {python} ;;
    *) echo ${{@:5}} >>log; [ "${{@: -1}}" != requirements.lock ] || exit {installs} ;;
esac
'''
LOCK, CUDA, TXT = '-r requirements.lock', '-r requirements-cuda.lock', '-r requirements.txt'
TORCH = '--find-links https://download.pytorch.org/whl/cpu/torch/ '  # that page lists nothing else


@pytest.mark.parametrize('python, gpu, lock, server, installs, expected', [
    ('3.11', False, True, True, True, [TORCH + LOCK]),
    ('3.12', False, True, True, True, [TORCH + TXT]),           # whose CPU build the lock does not know
    ('3.11', False, True, False, True, [LOCK]),                 # from a folder of wheels
    ('3.11', False, True, False, False, [LOCK, CUDA]),
    ('3.12', False, True, False, True, [LOCK]),
    ('3.13', False, False, True, True, [TORCH + TXT]),
    ('3.13', False, False, False, True, [TXT]),
    ('3.11', True, True, True, True, [CUDA]),
    ('3.13', True, False, True, True, [TXT])])
def test_setup(python, gpu, lock, server, installs, expected, tmp_path):
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/activate').touch()
    (tmp_path / 'bash_files').mkdir()
    for file in (ROOT / 'bash_files/setup.sh', *ROOT.glob('requirements*')):
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    tools = tmp_path / 'tools'
    tools.mkdir()
    for tool in ('bash', 'cat', 'cmp', 'dirname', 'grep'):
        (tools / tool).symlink_to(shutil.which(tool))
    codes = {key: int(not value) for key, value in
             dict(lock=lock, server=server, installs=installs).items()}
    for name in ['python'] + ['nvidia-smi'] * gpu:
        (tools / name).write_text(PYTHON.format(python=python, **codes))
        (tools / name).chmod(0o755)
    for _ in range(2):                                          # the second time all is there
        done = subprocess.run(['bash', '-euo', 'pipefail', 'bash_files/setup.sh'], cwd=tmp_path, capture_output=True,
                              text=True, env={'PATH': str(tools)})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / 'log').read_text().splitlines() == expected
