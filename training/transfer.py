"""Fine-tuning: a network that starts from the weights of another one, out of any file.

The two have the same layers. What may differ is what goes by the data:

classes     Those of one name, else of one original index, keep their weights, and others get the
            mean of all classes of the file. A network without classes starts as that mean, where
            it has biases to say so (EDM2's has none); one that has classes first starts with all
            of them alike (EDM2's, whose weights have no length, with those that it has).
channels    1 <-> 3: the input of a gray channel has the sum of the weights of three colours, and
            its output their mean; the other way each colour has a third, and the whole. So gray
            images are seen and made as before (nearly, by EDM2's normalised input). A fourth
            channel is opacity: its input starts at zero.
resolution  Layers belong to a level, whatever the side of its images is.

Labels of augmentations that the file does not know start at zero.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import re

import torch

from dnnlib import UserError
from dnnlib.util import printable, without
from torch_utils import distributed as dist
from torch_utils.files.weights import load_weights
from training.data.dataset import match_classes
from training.networks.edm2 import normalize
from training.schedules import LR_SCHEDULES
from training.snapshot import load_snapshot

# Names of what goes by classes: {pattern: axis}; and by channels, of inputs (axis 1) and outputs.
LABELS = {r'(.*\.)?(map_label|emb_label)\.weight': 1,
          r'(.*\.)?(label_emb|label_embedding)\.weight': 0, r'(1\.)?fc\.(weight|bias)': 0}
INPUTS = r'.*\b(enc\.\w+_(conv|aux_residual|aux_skip)|input_blocks\.0\.0|head)\.weight'
OUTPUTS = r'.*\b(out_conv|out\.2|tail\.2|dec\.\w+_aux_conv)\.(weight|bias)'
# What a network may have or not.
OPTIONAL = (r'.*\b((map_label|emb_label|label_emb|label_embedding|map_augment|augm_embedding|'
            r'emb_augment)\..*|augment_gain)')
NORMALIZED = r'\bemb_(label|augment)\.|\baugment_gain'  # layers of EDM2 are never zero
# Biases behind which the embedding of a class is added.
BIASES = ('map_layer1.bias', 'time_embed.2.bias', 'time_embedding.timembedding.3.bias')

# Arguments of networks that follow from the data or the machine.
OF_DATA = {
    'img_resolution', 'image_size', 'img_channels', 'in_channels', 'out_channels', 'label_dim',
    'num_classes', 'num_class', 'class_cond', 'cond', 'augment_dim', 'augm', 'learn_sigma',
    'precision', 'use_fp16', 'use_checkpoint'}
# Those that no weights depend on: what differs is reported.
FREE = {
    'class_name', 'dropout', 'label_dropout', 'sigma_min', 'sigma_max', 'sigma_data', 'epsilon_t',
    'beta_d', 'beta_min', 'M', 'T', 'C_1', 'C_2', 'clip', 'interpolate', 'skip_connections',
    'schedule', 'steps', 'respacing', 'variance', 'loss', 'predict', 'rescale_timesteps',
    'beta_range', 'sigma_range'}


@dataclasses.dataclass
class Transferred:
    """What a network took over: `rows` {what: how} of a table, and `summary`, plain values."""

    path: str
    rows: dict
    summary: dict

    def lines(self) -> list[str]:
        """The table, for a log."""
        width = max(map(len, self.rows))
        return [f'Transfer from {self.path}:', *(
            f'  {name:<{width}}  {printable(text)}' for name, text in self.rows.items())]


def transfer(net: torch.nn.Module, recipe) -> Transferred:
    """Gives `net`, new by the recipe, the weights of the file or URL `recipe.transfer`.

    Raises UserError that says what differs where they do not fit.
    """
    path = recipe.transfer
    with dist.rank0_first():
        source = load_snapshot(path, sha256=recipe.transfer_sha256)
    old = source.net
    _check_kind(source, net, recipe)
    settings = _compare_arguments(source, net, path)
    scales = [without(encoder, ['vae_name', 'fingerprint'])
              for encoder in (source.encoder.config(), recipe.encoder)]
    settings += ['latents of another scale'] * (scales[0] != scales[1])
    given = _by_level(old.state_dict())
    own = _by_level({name: value.cpu() for name, value in net.state_dict().items()})
    classes = _classes(source, recipe.dataset, net)
    start = {key: value for key, (_, value) in given.items()}
    start |= _without_classes(start, own, _label_scale(old)) | _gray_output(start, old, net)
    buffers = dict(net.named_buffers())
    # Strange ones too: load_weights names them.
    weights = {name: value for key, (name, value) in given.items()
               if key not in own and not re.fullmatch(OPTIONAL, name)}
    kinds = {'taken': [], 'changed': [], 'new': [], 'left out': []}
    for key, (name, value) in own.items():
        optional = re.fullmatch(OPTIONAL, name)
        if key in given:
            weight = _fitted(name, start[key], value, old, net, classes.rows)
            kind = 'taken' if weight is given[key][1] else 'changed'
        if key not in given or weight.shape != value.shape and (optional or name in buffers):
            if not optional and name not in buffers:
                continue
            kind = 'new'
            counts = not optional or re.search(NORMALIZED, name)
            weight = value if counts else torch.zeros_like(value)
        weights[name] = weight
        kinds[kind].append(name)
    kinds['left out'] = [name for key, (name, _) in given.items() if key not in own]
    try:
        load_weights(net, weights, path)
    except UserError as error:
        raise UserError(error.text.removeprefix(path).strip(), 'transfer', path) from None
    summary = {'tensors': len(own), 'taken': len(kinds.pop('taken')), **kinds}
    rows = {'file': _what(source), 'tensors': f'{summary["taken"]} of {len(own)} tensors as they '
            f'are, {len(kinds["changed"])} changed, {len(kinds["new"])} new'}
    rows |= classes.row(old, net) | _shape_rows(old, net)
    rows |= {kind: ', '.join(names) for kind, names in kinds.items() if names}
    rows |= {'settings': ', '.join(settings)} if settings else {}
    rows['averages'] = 'begin with these weights'
    rows |= _rates(source, recipe)
    return Transferred(path, rows, {'source': path, 'settings': settings} | classes.summary() | {
        'file': rows['file']} | summary)


# --- Whether they fit ----------------------------------------------------------------------------


def _layers(net) -> torch.nn.Module:
    """The network in a denoiser, which has the layers."""
    return getattr(net, 'model', getattr(net, 'unet', net))


def _side(net) -> int:
    """The side by which levels are told that have attention."""
    return min(net.image_shape[1:])


def _what(source) -> str:
    net = source.net
    parts = [net.class_name if _layers(net) is net or net.class_name == type(_layers(net)).__name__
             else f'{net.class_name} of {type(_layers(net)).__name__}']
    if hasattr(net, 'img_channels'):
        parts.append('x'.join(map(str, net.image_shape)))
    if source.nimg:
        parts.append(f'after {source.nimg} images')
    return ', '.join(parts)


def _check_kind(source, net, recipe):
    """Raises UserError for a network of other layers, or of other images."""
    old = source.net
    fault = None
    if not hasattr(old, 'class_name'):
        fault = 'has no weights'
    elif type(_layers(old)) is not type(_layers(net)):
        fault = (f'holds a {type(_layers(old)).__name__}, and what is trained here is a '
                 f'{type(_layers(net)).__name__}')
    elif hasattr(net, 'img_channels'):
        kinds = [{'rgb': 'pixels'}.get(encoder['name'], 'latents')
                 for encoder in (source.encoder.config(), recipe.encoder)]
        channels = [old.img_channels, net.img_channels]
        if kinds[0] != kinds[1]:
            fault = f'was trained on {kinds[0]}, and the data are {kinds[1]}'
        elif channels[0] != channels[1] and not {1, 3, 4}.issuperset(channels):
            fault = f'makes images of {channels[0]} channels, and the data have {channels[1]}'
    if fault:
        raise UserError(fault, 'transfer', recipe.transfer)


def _arguments(net) -> dict:
    """Arguments of a network and of its layers, as plain values: those that it was given, else
    their defaults; {name: value}.
    """
    values = {}

    def add(arguments):
        for key, value in arguments.items():
            if isinstance(value, dict):
                add(value)
            else:
                values[key] = value

    blocks = getattr(_layers(net), 'dec', {}).values()
    for part in (*itertools.islice(blocks, 1), _layers(net), net):
        for cls in reversed(type(part).__mro__[:-1]):
            add({param.name: param.default
                 for param in inspect.signature(cls.__init__).parameters.values()
                 if isinstance(param.default, str | int | float | tuple | list)})
    add(net.init_kwargs)
    for name in ('attn_resolutions', 'attention_resolutions'):  # by their share of the side
        if name in values:
            listed, widths = (value.split(',') if isinstance(value, str) else value
                              for value in (values[name], values['channel_mult'] or ',' * 6))
            sides = [_side(net) >> level for level in range(len(widths))]
            values[name] = sorted(_side(net) // side for side in sides
                                  if side in map(int, listed))
    values['model_type'] = type(_layers(net)).__name__
    return json.loads(json.dumps(values | {'class_name': net.class_name}))


def _compare_arguments(source, net, path) -> list[str]:
    """What differs in arguments that no weights depend on. Raises UserError for others."""
    old = _arguments(source.net)
    new = _arguments(net)
    assumed = source.recipe.get('assumed') or {}
    differ = [name for name in new if name not in OF_DATA and name not in assumed
              and new[name] not in (None, '') and old.get(name) not in (None, '', new[name])]
    faults = []
    for name in differ:
        values = [old[name], new[name]]
        if name.startswith('att'):
            values = [[_side(net) // share for share in value] for value in values]
        if name not in FREE:
            faults.append(f'{name} is {values[0]} and here {values[1]}')
    if faults:
        more = f', and {len(faults) - 3} more' if len(faults) > 3 else ''
        raise UserError(f'has other layers: {"; ".join(faults[:3])}{more}', 'transfer', path)
    return [f'{name} {old[name]} -> {new[name]}' for name in differ if name in FREE]


def _by_level(state: dict) -> dict:
    """{name with levels in place of the sides of images, where it has some: (name, tensor)}."""
    pattern = r'\b(enc|dec)\.(\d+)x(\d+)_'
    sides = {(int(width) * int(height), f'{width}x{height}') for name in state
             for _, width, height in re.findall(pattern, name)}
    levels = {side: level for level, (_, side) in enumerate(sorted(sides, reverse=True))}
    return {re.sub(pattern, lambda match: f'{match[1]}.level{levels[f"{match[2]}x{match[3]}"]}_',
                   name): (name, value) for name, value in state.items()}


# --- Classes -------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Classes:
    """For each class its place among those of the file, or None; `by` what they are told."""

    rows: list
    by: str
    names: list

    def summary(self) -> dict:
        return {'classes': self.rows, 'classes by': self.by}

    def row(self, old, net) -> dict:
        """The line of the table, {} where the two have the same classes."""
        before = _num_classes(old)
        count = len(self.rows)
        if self.rows == list(range(before)):
            return {}
        new = [str(name) for name, row in zip(self.names, self.rows, strict=True) if row is None]
        text = f'the file has {before} classes and the data {count}'
        if before and count:
            text += f'; {count - len(new)} by {self.by}'
            text += f', new as the mean: {", ".join(new[:10])}' if new else ''
            text += f' and {len(new) - 10} more' if len(new) > 10 else ''
        return {'classes': text}


def _num_classes(net) -> int:
    return getattr(net, 'label_dim', getattr(net, 'num_classes', 0))


def _label_scale(net) -> float:
    """What labels are multiplied by before their weights."""
    return getattr(_layers(net), 'label_scale', 1) or 1


def _classes(source, dataset: dict, net) -> _Classes:
    """Which classes of the file those of the data are."""
    return _Classes(*match_classes(source.dataset, dataset,
                                   (_num_classes(source.net), _num_classes(net))))


def _without_classes(start: dict, own: dict, scale: float) -> dict:
    """The bias that stands for the mean of the classes, by its key, for a network that has none.

    The embedding of class k is w_k `scale`, perhaps with a bias; in SongUNet W_0 then follows.
    """
    for pattern, axis in LABELS.items():
        for key in start:
            if not re.fullmatch(pattern, key) or key in own or '.' not in key:
                continue
            prefix = key[:-len('.weight')].rpartition('.')[0] + '.'
            mean = start[key].mean(axis) * scale
            if f'{prefix}map_label.bias' in start:
                mean = start[prefix + 'map_layer0.weight'] @ (
                    mean + start[prefix + 'map_label.bias'])
                return {prefix + 'map_layer0.bias': start[prefix + 'map_layer0.bias'] + mean}
            return {prefix + bias: start[prefix + bias] + mean for bias in BIASES
                    if prefix + bias in start}
    return {}


# --- Shapes --------------------------------------------------------------------------------------


def _fitted(name: str, weight, value, old, net, rows: list):
    """A weight of the file as that of the network, whose own is `value`; as it is where nothing is
    to be done, or can be.
    """
    for pattern, axis in LABELS.items():
        if re.fullmatch(pattern, name) and rows != list(range(weight.shape[axis])):
            mean = weight.mean(axis)
            columns = [mean if row is None else weight.select(axis, row) for row in rows]
            return torch.stack(columns, axis) * (_label_scale(old) / _label_scale(net))
    if weight.shape != value.shape and re.fullmatch(INPUTS, name):
        return _recoloured_input(weight, old.img_channels, net.img_channels)
    if weight.shape != value.shape and re.fullmatch(OUTPUTS, name):
        return _recoloured_output(weight, value, old.img_channels, net.img_channels)
    return weight


def _recoloured_input(weight, old: int, new: int):
    """Weights [out, old (+ 1), ...] for images of `new` channels; EDM2's last one is a constant's.
    """
    colours, opacity, rest = weight[:, :min(old, 3)], weight[:, 3:old], weight[:, old:]
    if new == 1 and old > 1:
        colours = colours.sum(1, keepdim=True)
    elif old == 1 and new > 1:
        colours = colours.repeat_interleave(3, 1) / 3
    if new == 4 != old:
        opacity = torch.zeros_like(colours[:, :1])
    return torch.cat([colours, opacity if new == 4 else colours[:, :0], rest], 1)


def _recoloured_output(weight, value, old: int, new: int):
    """Weights [old k, ...] for images of `new` channels and as many kinds k of values as `value`
    [new k, ...], which has what the file has not.
    """
    before = weight.unflatten(0, (-1, old))
    after = value.to(weight).unflatten(0, (-1, new)).clone()
    kinds = min(len(before), len(after))
    colours = before[:kinds, :min(old, 3)]
    if new == 1 or old == 1:
        colours = colours.mean(1, keepdim=True)
    after[:kinds, :min(new, 3)] = colours
    after[:kinds, 3:] = before[:kinds, 3:] if new == old else after[:kinds, 3:]
    return after.flatten(0, 1)


def _gray_output(start: dict, old, net) -> dict:
    """EDM2's output layer and its gain for one channel instead of colours: its rows have one
    length whatever is stored, and their mean is shorter.
    """
    weight, gain = start.get('unet.out_conv.weight'), start.get('unet.out_gain')
    if gain is None or not net.img_channels == 1 < old.img_channels:
        return {}
    rows = normalize(weight)
    size = rows[:3].mean(0).square().mean().sqrt()
    return {'unet.out_conv.weight': rows, 'unet.out_gain': gain * size}


def _shape_rows(old, net) -> dict:
    """Lines of the table on channels and resolution, where they differ."""
    if not hasattr(net, 'img_channels'):
        return {}
    pairs = {'channels': (old.img_channels, net.img_channels),
             'resolution': (old.img_resolution, net.img_resolution)}
    return {name: f'{before} -> {after}' for name, (before, after) in pairs.items()
            if before != after}


# --- Learning rate -------------------------------------------------------------------------------


def _rates(source, recipe) -> dict:
    """The line of the table on the learning rate: the highest of this run, and the last one of
    that which wrote the file, if it says so.
    """
    text = f'up to {recipe.learning_rate["lr"]:g}'
    with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        rule = dict(source.recipe['learning_rate'])
        nimg = source.nimg - source.recipe.get('first_nimg', 0)
        last = LR_SCHEDULES[rule.pop('name')](nimg, source.recipe['batch'], **rule)
        text += f'; that of the file ended at {last:g}'
    return {'learning rate': text}
