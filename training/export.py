"""Networks in the forms that others read: safetensors with JSON, and a folder for diffusers."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.util import atomic_path, first_stranger, write_bytes, write_json
from torch_utils.files.identify import DESCRIPTION, FOLDER_WEIGHTS
from torch_utils.files.own import SNAPSHOT_FORMAT
from training.networks import NETWORKS
from training.snapshot import Snapshot, describe, save_snapshot, stored_state

DTYPES = {'float32': torch.float32, 'float16': torch.float16}
_ROOT = Path(__file__).resolve().parents[1]
_CODE = _ROOT / 'training' / 'diffusers_code'

# What a folder for diffusers consists of.
_FOLDER_FILES = (rf'model_index\.json|{DESCRIPTION}|README\.md|unet/config\.json|'
                 rf'{FOLDER_WEIGHTS}|(?:unet/)?(?:pipeline|network|inner|code_\w+)\.py|'
                 r'(?:unet/)?__pycache__/[^/]+\.pyc')

README = """\
# A network for diffusers

Loading it runs the Python files in this folder:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained('FOLDER', custom_pipeline='FOLDER',
                                         trust_remote_code=True)
images = pipe(seeds=range(4)).images
```
"""


def check_destination(dest: str, form: str, overwrite: bool):
    """Raises UserError if something is at `dest` already, or with `overwrite` something that is no
    network."""
    places = [dest]
    if form == '.safetensors':
        description = os.path.splitext(dest)[0] + '.json'
        if os.path.lexists(dest) or not _is_description(description):  # else of a stopped command
            places.append(description)
    for place in filter(os.path.lexists, places):
        if not overwrite:
            raise UserError('exists; remove it, choose another name or overwrite it', 'dest',
                            place)
        if os.path.isdir(place) and (form or not os.path.isfile(os.path.join(place, DESCRIPTION))):
            raise UserError('is a folder that is no network, and is not removed', 'dest', place)
        if os.path.islink(place) and os.path.isdir(place):
            raise UserError('is a link to a folder; give the folder itself', 'dest', place)
        if os.path.isdir(place) and (name := first_stranger(place, _FOLDER_FILES)):
            raise UserError(f'holds {name}, which is no part of a network, and is not removed; '
                            'move it, or choose another name', 'dest', place)


def _is_description(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return f'"format": "{SNAPSHOT_FORMAT}"' in file.read(1000)
    return False


def _weights(snapshot: Snapshot, dtype, prefix='') -> bytes:
    """The weights as safetensors; parameters as `dtype`, buffers as they are."""
    state = stored_state(snapshot.net, dtype).items()
    return safetensors.torch.save({prefix + name: value.contiguous() for name, value in state},
                                  metadata={'format': 'pt'})


def save_pickle(dest: str, snapshot: Snapshot, dtype=torch.float32):
    """Writes a snapshot of this project."""
    save_snapshot(dest, **vars(snapshot), dtype=dtype)


def save_safetensors(dest: str, snapshot: Snapshot, dtype=torch.float32):
    """Writes X.safetensors, and X.json with all that a snapshot says besides. The weights come
    last."""
    with atomic_path(dest) as weights, atomic_path(os.path.splitext(dest)[0] + '.json') as text:
        Path(weights).write_bytes(_weights(snapshot, dtype))
        Path(text).write_text(json.dumps(describe(**vars(snapshot)), indent=2) + '\n')
        if os.path.exists(dest):
            os.remove(dest)  # old weights must not meet the new description


def save_folder(dest: str, snapshot: Snapshot, dtype=torch.float32):
    """Writes a folder that `diffusers.DiffusionPipeline.from_pretrained` opens: configuration,
    weights as safetensors, and copies of the modules of this project that network and sampler
    need. It appears only when complete."""
    import diffusers
    description = describe(**vars(snapshot))
    class_name = description['network']['class_name']
    arguments = description['network']['kwargs']
    inner = arguments.get('network', {}).get('class_name')
    version = dict(_diffusers_version=diffusers.__version__)
    with atomic_path(dest, is_folder=True) as temp:
        unet = os.path.join(temp, 'unet')
        index = dict(_class_name=['pipeline', 'SnapshotPipeline'],
                     unet=['network', 'SnapshotNetwork'], encoder=description['encoder'],
                     sampler=description['sampler'], **version)
        config = dict(_class_name='SnapshotNetwork', class_name=class_name, arguments=arguments,
                      **version)
        write_json(os.path.join(temp, 'model_index.json'), index)
        write_json(os.path.join(temp, DESCRIPTION), description)
        write_json(os.path.join(unet, 'config.json'), config)
        readme = README.replace('FOLDER', os.path.basename(dest))
        write_bytes(os.path.join(temp, 'README.md'), readme.encode())
        write_bytes(os.path.join(temp, FOLDER_WEIGHTS), _weights(snapshot, dtype, 'net.'))
        _write_code(temp, 'pipeline', {})
        _write_code(unet, 'network', dict(architecture=class_name, inner=inner))
        if os.path.isfile(dest) or os.path.islink(dest):
            os.remove(dest)


_IMPORT = re.compile(r'^( *)from (dnnlib|torch_utils|training)((?:\.\w+)*) import ([^\n]*)$',
                     re.MULTILINE)
_BESIDE = re.compile(r'^from \.(\w+) import', re.MULTILINE)
_PLACES = {'encoders': 'training', 'samplers': 'training/diffusion'}  # what the templates import


def _write_code(folder: str, name: str, networks: dict):
    """Writes the template `name` with copies of all modules of this project that it needs.

    `networks`: {module: class name of the network that its `build_network` makes}. diffusers
    copies all code that it loads into one folder and keeps modules by name: so the copies are
    named by their content, and the template imports each of them, since diffusers copies no
    others.
    """
    sources = {}
    for module, class_name in networks.items():
        if class_name is None:
            continue
        place = NETWORKS[class_name]
        sources[module] = f'''"""The architecture of this network."""

from .{place} import {class_name}


def build_network(class_name, **kwargs):
    return {class_name}(**kwargs)
'''
        _gather(_ROOT / 'training' / 'networks' / f'{place}.py', sources)
    template = (_CODE / f'{name}.py').read_text()
    imported = set(_BESIDE.findall(template))
    for module in imported & _PLACES.keys():
        _gather(_ROOT / _PLACES[module] / f'{module}.py', sources)
    prefix = 'code_' + hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:8]

    def write(module, text):
        text = re.sub(r'^( *)from \.(\w+) import', rf'\1from .{prefix}_\2 import', text,
                      flags=re.MULTILINE)
        text = re.sub(r'^( *)from \. import (\w+)$', rf'\1from . import {prefix}_\2 as \2', text,
                      flags=re.MULTILINE)
        write_bytes(os.path.join(folder, f'{module}.py'), text.encode())

    for module, text in sources.items():
        write(f'{prefix}_{module}', text)
    others = ''.join(f'from .{module} import __doc__ as _{module}  # noqa: F401 for diffusers\n'
                     for module in sorted(sources.keys() - imported))
    first = _BESIDE.search(template).start()
    write(name, template[:first] + others + template[first:])


def _gather(path: Path, sources: dict):
    """Adds a module and all of this project that it imports, with imports from beside, to {name:
    source}."""
    if path.stem in sources:
        return
    needed = []

    def beside(match):
        indent, package, inner, names = match.groups()
        if (package, inner) == ('dnnlib', ''):                 # modules, and what util has
            names = names.split(', ')
            modules = [name for name in names if (_ROOT / package / f'{name}.py').is_file()]
            needed.extend(_ROOT / package / f'{name}.py' for name in modules)
            lines = [f'{indent}from . import {name}' for name in modules]
            names = ', '.join(name for name in names if name not in modules)
            if not names:
                return '\n'.join(lines)
            indent = '\n'.join([*lines, indent])
            inner = '.util'
        if (package, inner) == ('training', '.networks'):
            return f'{indent}from .inner import {names}'
        needed.append(_ROOT.joinpath(package, *inner.strip('.').split('.')).with_suffix('.py'))
        return f'{indent}from .{inner.rpartition(".")[2]} import {names}'

    sources[path.stem] = _IMPORT.sub(beside, path.read_text())
    for module in needed:
        _gather(module, sources)


EXPORTS = {'.pkl': save_pickle, '.safetensors': save_safetensors, '': save_folder}
