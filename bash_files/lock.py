"""Makes requirements.lock and requirements-cuda.lock anew from requirements.txt."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
CPU_SERVER = 'https://download.pytorch.org/whl/cpu'
CUDA = re.compile('(cuda|nvidia)-|triton$')
HEAD = """\
# Made by bash_files/lock.py from requirements.txt, for Linux on x86-64 (glibc 2.31 or later) and
# Python {pythons}{torch}:
#     pip install --require-hashes -r {name}
"""


def resolve(pip, index, *requirements, env=None) -> list[tuple]:
    """[(name, version, sha256)] of what pip would install."""
    report = subprocess.run(
        [*pip, 'install', '--quiet', '--dry-run', '--ignore-installed', '--report=-',
         '--use-feature=fast-deps', f'--index-url={index}', *requirements],
        check=True, stdout=subprocess.PIPE, env=env).stdout
    return [(re.sub('[-_.]+', '-', item['metadata']['name']).lower(), item['metadata']['version'],
             item['download_info']['archive_info']['hashes']['sha256'])
            for item in json.loads(report)['install']]


def resolve_all(python: str, folder: str) -> tuple[str, list, list]:
    """(version of Python, all packages with PyPI's torch, torch's CPU build or nothing)."""
    subprocess.run([python, '-m', 'venv', folder], check=True)
    pip = [f'{folder}/bin/python', '-m', 'pip']
    subprocess.run([*pip, 'install', '--quiet', '--upgrade', 'pip'], check=True)
    # From PyPI alone, whatever the machine's own settings.
    own = ('PIP_FIND_LINKS', 'PIP_EXTRA_INDEX_URL', 'PIP_CONSTRAINT')
    plain = {key: value for key, value in os.environ.items() if key not in own}
    packages = resolve(pip, 'https://pypi.org/simple', f'--requirement={ROOT}/requirements.txt',
                       env=plain | {'PIP_CONFIG_FILE': os.devnull})
    version = subprocess.run([*pip[:1], '-c', 'import sys; print("%d.%d" % sys.version_info[:2])'],
                             check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    torch = next(release for name, release, _ in packages if name == 'torch')
    try:
        return version, packages, resolve(pip, CPU_SERVER, '--no-deps', f'torch=={torch}')
    except subprocess.CalledProcessError:
        print(f'No CPU build of torch {torch} found for Python {version}: it gets that with CUDA')
        return version, packages, []


@click.command()
@click.argument('pythons', nargs=-1, required=True)
def main(pythons):
    """Make requirements.lock and requirements-cuda.lock anew from requirements.txt.

    PYTHONS are interpreters, e.g. python3.11 python3.12. Each resolves the requirements from
    PyPI's metadata (no package is downloaded), and torch's CPU build from its own server; hashes
    are what the indexes say. For a Python whose CPU build is not found, requirements.lock has
    PyPI's torch, with all of CUDA.
    """
    files = {'requirements.lock': {}, 'requirements-cuda.lock': {}}
    versions = []
    without_cpu = []
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            try:
                version, packages, cpu = resolve_all(python, folder)
            except (OSError, subprocess.CalledProcessError) as error:
                raise click.ClickException(str(error)) from None
        versions.append(version)
        without_cpu += [] if cpu else [version]
        without_cuda = [pin for pin in packages if pin[0] != 'torch' and not CUDA.match(pin[0])]
        chosen = without_cuda + cpu if cpu else packages
        for pins, found in zip(files.values(), (chosen, packages), strict=True):
            for name, release, digest in found:
                pin = pins.setdefault((name, release.split('+')[0]), {})
                pin[version] = digest
    for file, pins in files.items():
        cuda = versions if 'cuda' in file else without_cpu
        torch = f"; torch with CUDA for {' and '.join(cuda)}" if cuda else ''
        text = HEAD.format(name=file, pythons=' and '.join(versions), torch=torch)
        for (name, release), pin in sorted(pins.items()):
            marker = '' if len(pin) == len(versions) else f' ; python_version == "{min(pin)}"'
            digests = dict.fromkeys(pin.values())
            text += ' \\\n    --hash=sha256:'.join([f'{name}=={release}{marker}', *digests])
            text += '\n'
        (ROOT / file).write_text(text)


if __name__ == '__main__':
    main()
