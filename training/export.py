"""Networks in the forms that others read: safetensors with JSON, and a folder for diffusers."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.util import (
    atomic_path,
    first_stranger,
    publishable,
    to_json,
    write_bytes,
    write_json,
)
from torch_utils.files.identify import DESCRIPTION
from torch_utils.files.own import SNAPSHOT_FORMAT
from training.bundle import bundle
from training.data.dataset import class_titles
from training.networks import NETWORKS
from training.snapshot import Snapshot, describe, save_snapshot, stored_state

DTYPES = {'float32': torch.float32, 'float16': torch.float16}

# What a folder for diffusers consists of; of earlier versions too.
_FOLDER_FILES = (
    rf'model_index\.json|{DESCRIPTION}|README\.md|scheduler/scheduler_config\.json|'
    r'(?:(?:unet|guide|vae)/)?(?:(?:pipeline|network|inner|\w+_[0-9a-f]{8}\w*)\.py|'
    r'config\.json|diffusion_pytorch_model\.safetensors|__pycache__/[^/]+\.pyc)')

CARD = """\
# {name}

{what}, for [diffusers](https://github.com/huggingface/diffusers). Loading it runs the Python files
in this folder, which need torch, diffusers, numpy and pillow alone:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained('{name}', trust_remote_code=True)
images = pipe({classes}batch_size=4, generator=torch.Generator().manual_seed(0)).images
```

By default its own sampler makes the images: {sampler}. Others are names of samplers
(`sampler='dpmpp-2m', num_inference_steps=20`), or schedulers of diffusers
(`pipe.scheduler = pipe.make_scheduler(EDMDPMSolverMultistepScheduler)`).

{facts}
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


@dataclasses.dataclass
class Card:
    """What a folder for diffusers has besides the network.

    guide     the network that guides it, with the strength `guidance` in the `interval` of levels
    licence   of the weights, as the hub calls it
    results   [what calculate_metrics.py wrote], for the model card
    with_vae  whether its autoencoder goes into the folder
    """

    guide: torch.nn.Module | None = None
    guidance: float = 1
    interval: tuple[float, float] | None = None
    licence: str = 'unknown'
    results: Sequence[dict] = ()
    with_vae: bool = False


def save_folder(dest: str, snapshot: Snapshot, dtype=torch.float32, card=Card()):
    """Writes a folder that `diffusers.DiffusionPipeline.from_pretrained` opens: configuration,
    weights as safetensors, one file of code for each network and one for the pipeline, and a model
    card. It appears only when complete.
    """
    import diffusers
    description = describe(**vars(snapshot))
    version = dict(_diffusers_version=diffusers.__version__)
    networks = dict(unet=snapshot) | (
        {} if card.guide is None else dict(guide=Snapshot(card.guide, snapshot.encoder)))
    with atomic_path(dest, is_folder=True) as temp:
        folder = Path(temp)
        modules = {name: _save_network(folder / name, one, dtype, version)
                   for name, one in networks.items()}
        modules = dict.fromkeys(('guide', 'scheduler', 'vae'), [None, None]) | modules
        index = dict(_class_name=['pipeline', 'SnapshotPipeline'], **version, **modules,
                     description=description, guidance_scale=card.guidance,
                     guidance_interval=card.interval)
        if card.with_vae:
            snapshot.encoder.prepare('cpu').save_pretrained(folder / 'vae')
            index['vae'] = ['diffusers', 'AutoencoderKL']
        contents = {'model_index.json': index, DESCRIPTION: description}
        for name, content in contents.items():
            write_json(str(folder / name), content)
        code = bundle('training.diffusers_code.pipeline')
        write_bytes(str(folder / 'pipeline.py'), code.encode())
        name = os.path.basename(os.path.abspath(dest))
        write_bytes(str(folder / 'README.md'), model_card(name, description, card).encode())
        if os.path.isfile(dest) or os.path.islink(dest):
            os.remove(dest)


def _save_network(folder: Path, snapshot: Snapshot, dtype, version: dict) -> list[str]:
    """Writes configuration, weights and code of a network; returns (module, class) of the code.

    diffusers copies the code that it loads into one folder and keeps modules by name, so the name
    depends on what is in it.
    """
    class_name, arguments = snapshot.net.class_name, snapshot.net.init_kwargs
    classes = filter(None, (arguments.get('network', {}).get('class_name'), class_name))
    code = bundle('training.diffusers_code.network',
                  [(f'training.networks.{NETWORKS[name]}', name) for name in classes]).encode()
    module = f'{NETWORKS[class_name]}_{hashlib.sha256(code).hexdigest()[:8]}'
    write_json(str(folder / 'config.json'), dict(
        _class_name='SnapshotNetwork', class_name=class_name, arguments=arguments, **version))
    write_bytes(str(folder / f'{module}.py'), code)
    write_bytes(str(folder / 'diffusion_pytorch_model.safetensors'),
                _weights(snapshot, dtype, 'net.'))
    return [module, 'SnapshotNetwork']


def model_card(name: str, description: dict, card: Card) -> str:
    """README.md: front matter, which the hub reads, and how to sample."""
    data = description['dataset']
    classes = class_titles(data)
    recipe = {key: value for key, value in description['recipe'].items() if value is not None}
    results = [(key, value, result) for result in publishable([*card.results])
               for key, value in result['results'].items() if isinstance(value, int | float)]
    trained = dict(images=description['nimg'], ema_std=description['ema_std'],
                   sampler=description['sampler'])
    front = dict(
        license=card.licence, library_name='diffusers',
        pipeline_tag='unconditional-image-generation',
        tags=['diffusion', 'class-conditional' if classes else 'unconditional'],
        datasets=[data['name']] if data.get('name') else [],
        metrics=list(dict.fromkeys(key for key, *_ in results)),
        classes=classes, data={key: data[key] for key in (
            'name', 'size', 'resolution', 'num_channels', 'source', 'transform') if key in data},
        recipe=recipe, trained=trained)
    if results:
        front['model-index'] = [dict(name=name, results=[dict(
            task=dict(type='unconditional-image-generation'),
            dataset=dict(name=str(result.get('ref')), type=str(result.get('ref'))),
            metrics=[dict(type=key, value=value,
                          name=f'{key}, {result.get("num_images")} images')])
            for key, value, result in results])]
    facts = [f'- {len(classes)} classes: {", ".join(map(str, classes[:20]))}'
             + ', ...' * (len(classes) > 20)] if classes else []
    if data.get('name'):
        facts.append(f'- data: {data["name"]}, {data.get("size", "?")} images')
    if description['nimg']:
        facts.append(f'- trained on {description["nimg"]:,} images')
    if card.guide is not None:
        facts.append(f'- guided by a second network, with the strength {card.guidance:g}')
    facts += [f'- {key} {value:.6g} of {result.get("num_images")} images against '
              f'{result.get("ref")}' for key, value, result in results]
    sampler = description['sampler'] or {}
    lines = [f'{key}: {to_json(value)}' for key, value in publishable(front).items()]
    text = CARD.format(
        name=name, sampler=f'`{sampler.get("name")}`', facts='\n'.join(facts),
        classes=f'class_labels={str(classes[0])!r}, ' if classes else '',
        what=f'A diffusion model of class {description["network"]["class_name"]}')
    return '\n'.join(['---', *lines, '---', '', text])


EXPORTS = {'.pkl': save_pickle, '.safetensors': save_safetensors, '': save_folder}
