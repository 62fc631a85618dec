"""Networks in files: what is inside, and conversion between the forms that others read."""

import json
import os

import click

from dnnlib import UserError, cli, lazy, url
from dnnlib.options import (
    choice,
    gnet,
    group,
    guidance,
    guidance_interval,
    model_url,
    text,
    together,
    verify,
)
from dnnlib.util import hide, printable
from torch_utils.files.pickles import errors_of
from training.presets import PRESETS, network_of

with lazy.imports(__name__ == '__main__'):
    import torch

    from metrics.compare import read_results
    from torch_utils.files.identify import Found, family, identify
    from torch_utils.files.weights import nonfinite
    from training import export
    from training.data.dataset import class_titles
    from training.encoders import make_encoder
    from training.flops import ASSUMED, count_products, image_shape
    from training.generate import open_guide
    from training.networks import build_network
    from training.networks.infer import READERS, infer
    from training.snapshot import load_denoiser, load_snapshot



def parse_setting(text: str) -> tuple[str, object]:
    """'num_heads=4' -> ('num_heads', 4): a value of JSON, e.g. a number or true, or text."""
    name, sep, value = text.partition('=')
    if not sep or not name:
        raise ValueError(f'{text!r} is not NAME=VALUE, e.g. num_heads=4')
    try:
        return name, json.loads(value.lower())
    except ValueError:
        return name, value


def source(required: bool = True):
    return together(
        click.argument('file', metavar='FILE|URL', required=required, type=hide),
        text('HEX', '--sha256', 'SHA-256 that the file must have'),
        text('KEY', '--weights',
             'Weights of a checkpoint, e.g. net_model  [default: the averaged ones]'),
        text('NAME=VALUE', '--set settings',
             'Argument of a network that its weights leave open, e.g. num_heads=4', multiple=True,
             type=cli.Parsed('setting', parse_setting)),
        verify)


source_options = source()


@click.group(cls=cli.Group)
def main():
    """Inspect and convert files of networks. Nothing that a file holds is run.

    \b
    python snapshot_tool.py inspect edm-cifar10-32x32-cond-vp.pkl
    python snapshot_tool.py convert edm-cifar10-32x32-cond-vp.pkl --dest=cifar10.pkl
    python snapshot_tool.py convert network-snapshot-0000524-0.100.pkl --dest=digits.safetensors
    python snapshot_tool.py flops --preset=edm2-img512-xs
    python snapshot_tool.py convert ADM_cifar10_baseline.pt --dest=adm --set num_head_channels=32
    """


@main.command()
@source_options
def inspect(file, sha256, weights, settings):
    """Print what is in a file of any kind: type, architecture, parameters, resolution, labels.

    Arguments marked "assumed" do not follow from the weights; convert can set them.
    """
    found = identify(url.download(file, sha256=sha256), weights)
    for key, value in describe(found, dict(settings)).items():
        print(f'{printable(key):24} {printable(value)}')


@main.command()
@source(required=False)
@text('NAME', '--preset', 'Instead of a file: network of a preset of train_edm2.py',
      type=click.Choice(list(PRESETS)))
@text('WxH', '--resolution', 'Of the image, for a network that takes any  [default: of its '
      'training data, else 32x32]', type=cli.SIZE)
def flops(file, sha256, weights, settings, preset, resolution):
    """Count parameters and products of one evaluation of a network, for one image.

    A multiplication and its addition count as one, as in the table of EDM2; with the additions it
    is twice as many. Those of convolutions, matrices and attention are counted.

    \b
    python snapshot_tool.py flops edm2-img512-xs-2147483-0.135.pkl
    python snapshot_tool.py flops --preset=edm2-img512-xs
    """
    if (file is None) == (preset is None):
        raise UserError('give a file or --preset')
    dataset = {}
    if preset:
        with torch.device('meta'):
            net = build_network(**network_of(preset))
    else:
        snapshot = load_snapshot(file, sha256=sha256, weights=weights, options=dict(settings),
                                 allow_nonfinite=True)
        net = snapshot.net
        dataset = snapshot.dataset
    known = image_shape(net.init_kwargs, dataset)
    shape = known or ASSUMED
    if resolution:
        if fixed := image_shape(net.init_kwargs, {}):
            raise UserError(f'is that of the network, {_size(fixed)}; leave it out', 'resolution')
        shape = (shape[0], *resolution[::-1])
    parameters = sum(value.numel() for value in net.parameters())
    note = '' if known or resolution else ' (assumed; --resolution sets it)'
    for key, value in {'image': f'{_size(shape)}, {shape[0]} channels{note}',
                       'parameters': f'{parameters:,}',
                       'GFLOP': f'{count_products(net, shape) / 1e9:.4g}'}.items():
        print(f'{key:24} {value}')


def _size(shape: tuple) -> str:
    """WIDTHxHEIGHT of images [C,H,W]."""
    return f'{shape[2]}x{shape[1]}'


@main.command()
@source_options
@text('FILE|DIR', '--dest', 'FILE.pkl: snapshot; FILE.safetensors: with FILE.json beside it; '
      'DIR: folder for diffusers', required=True, type=cli.ATOMIC)
@choice('--dtype', 'float32', 'Type of the weights', ['float32', 'float16'])
@click.option('--overwrite', is_flag=True, help='Replace what is at --dest')
@group('more', gnet, guidance, guidance_interval, model_url,
       text('NAME', '--license', 'Folder: licence of the weights, e.g. mit, for the model card'),
       text('JSON', '--results', 'Folder: what calculate_metrics.py wrote, for the model card',
            multiple=True))
def convert(file, dest, dtype, overwrite, sha256, weights, settings, more):
    """Convert a network, whatever made it, to another form; all of them make the same images.

    A folder is for diffusers: weights, model card, and the code of this project that network and
    sampler need, a file for each. To load it is to run that code. It may have a second network
    that guides the first, and the autoencoder that --model-url names.

    \b
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained('DIR', trust_remote_code=True)
    pipe(batch_size=4).images[0].save('0.png')

    \b
    python snapshot_tool.py convert ckpt_300000.pt --dest=cbdm.pkl --weights=net_model
    python snapshot_tool.py convert NET.pkl --dest=folder --gnet=SMALLER.pkl --guidance=2
    python snapshot_tool.py convert \\
        https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl \\
        --dest=cifar10.safetensors
    """
    dest = dest.rstrip('/')
    form = os.path.splitext(dest)[1].lower()
    if form not in export.EXPORTS:
        raise UserError(f'--dest={dest}: the name must end in .pkl or .safetensors, or be that '
                        'of a folder')
    for name, value in more.items():
        if form and value not in (None, ()):
            raise UserError('is for a folder, which --dest is not', name, value)
    export.check_destination(dest, form, overwrite)
    open_network = load_snapshot if form else load_denoiser
    snapshot = open_network(file, sha256=sha256, weights=weights, options=dict(settings))
    for name, value in snapshot.recipe.get('assumed', {}).items():
        print(f'Assumed: {name}={value}')
    card = {} if form else dict(card=folder_card(snapshot, **more))
    export.EXPORTS[form](dest, snapshot, export.DTYPES[dtype], **card)
    numbers = sum(p.numel() for p in snapshot.net.parameters())
    print(f'{dest}: {identify(dest).what}, {numbers:,} parameters')


def folder_card(snapshot, gnet, guidance, guidance_interval, model_url, license, results):
    """What goes into a folder besides the network. Raises UserError for what does not fit."""
    guidance = 1 if guidance is None else guidance
    guide = open_guide(snapshot, gnet, snapshot.sampler['name'], guidance, guidance_interval)
    if model_url:
        snapshot.encoder = make_encoder(snapshot.encoder.config(), model_url)
    contents = [read_results(path, 'results') for path in results]
    return export.Card(guide, guidance, guidance_interval, license or 'unknown',
                       contents, bool(model_url))


def describe(found: Found, options: dict | None = None) -> dict:
    """What there is to say about a file, {name: text}; `options` sets arguments that a state dict
    leaves open.
    """
    content = found.content
    lines = {'type': found.what} | found.facts
    lines.pop('what', None)
    training = {}
    if found.kind in ('snapshot', 'safetensors'):
        network = content['network']
        dataset = content['dataset']
        lines |= describe_network(network['class_name'], network['kwargs'], dataset=dataset)
        names = class_titles(dataset)
        more = f', ... ({len(names)})' if len(names) > 10 else ''
        training = {
            'encoder': content['encoder'].get('name'),
            'data set': f'{dataset.get("name")}, {dataset.get("size", "?")} images',
            'classes': ', '.join(map(str, names[:10])) + more or 'none',
            'trained on': f'{content["nimg"]} images',
            'EMA width': content['ema_std'],
        }
    elif found.kind == 'edm':
        lines |= describe_network(content['ema'].class_name, content['ema'].kwargs)
        training = {'encoder': getattr(content.get('encoder'), 'class_name', 'none')}
    elif found.kind == 'weights' and family(found.state) in READERS:
        with errors_of(found.path):
            inferred = infer(found.state, options)
        lines |= describe_network(inferred.class_name,
                                  inferred.kwargs | (inferred.diffusion or {}), inferred.assumed)
    if found.state is not None:
        numbers = sum(value.numel() for value in found.state.values())
        lines['parameters'] = (f'{numbers:,} numbers in {len(found.state)} tensors '
                               '(buffers included)')
        if names := nonfinite(found.state):
            lines['not finite'] = f'{len(names)} tensors, the first {names[0]}'
    return {key: ' '.join(str(value)[:300].split()) for key, value in (lines | training).items()}


def describe_network(class_name: str, kwargs: dict, assumed=(), dataset=None) -> dict:
    """Architecture, arguments, resolution and labels, {name: text}."""
    inner = kwargs.get('network', kwargs)
    fixed = image_shape(kwargs, {})
    seen = image_shape(kwargs, dataset or {})
    learned = f' (learned from {_size(seen)})' if seen else ''
    labels = inner.get('label_dim', inner.get('num_classes', inner.get('num_class')))
    conditional = inner.get('class_cond', inner.get('cond', bool(labels)))
    return {'architecture': class_name} | {
        f'  {key}': f'{value}{"   (assumed)" if key in assumed else ""}'
        for key, value in kwargs.items()
    } | {
        'resolution': _size(fixed) if fixed else f'any{learned}',
        'labels': f'{labels or "1000"} classes' if conditional else 'none (unconditional)',
    }


if __name__ == '__main__':
    main()
