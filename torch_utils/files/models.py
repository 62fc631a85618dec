"""Networks of published libraries: a folder with `config.json` and safetensors, or its name on the
Hugging Face hub.

Sizes and names are compared before memory is taken for a network, and every weight comes from the
file: none is left with a value that was drawn, or with what the memory held before.
"""

import functools
import itertools
import json
import os
import re

import torch

from dnnlib import budget
from dnnlib.util import UserError, one_line, printable
from torch_utils.files.identify import identify
from torch_utils.files.weights import check_finite

MAX_JSON = 4 << 20  # bytes of a configuration, an index, or the header of safetensors
MAX_FILES = 100     # that the weights are spread over
# Commits of the hub, whose files do not change.
REVISIONS = {
    'stabilityai/sd-vae-ft-mse': '31f26fdeee1355a5c34592e401dd41e45d25a493',
    'stabilityai/sd-vae-ft-ema': 'f04b2c4b98319346dad8c65879f680b1997b204a',
    'facebook/dinov2-base': 'f9e44c814b77203eaa57a6bdbbd535f21ede1415',
    'openai/clip-vit-large-patch14-336': 'ce19dc912ca5cd21c8a653c79e251e808ccabcd1',
    'facebook/dinov2-large': '47b73eefe95e8d44ec3623f8890bd894b6ea2d6c',
}
_CONVERT = ('there is no {new}; in that folder, make it of {old}: python -c "import torch, '
            "safetensors.torch as s; s.save_file(torch.load('{old}', weights_only=True), '{new}')"
            '"')
_HUB = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?')  # OWNER/NAME[@REVISION]


def load_model(what: str, name: str, build, fields: dict, weights: str, *, field: str, rename=str,
               dtype=torch.float32, allow_nonfinite: bool = False, part: str | None = None,
               torch_weights: str | None = None) -> torch.nn.Module:
    """The network at `name`, a folder or OWNER/NAME[@REVISION] on the hub, for inference.

    what     the model in words
    build    (values of `fields` that config.json has, weights by name, `what` with `name`) ->
             network with exactly these weights
    fields   {name in config.json: rule}, see `_fits`; other names are ignored
    weights  name of the safetensors file; beside `weights`.index.json there are several
    field    whose value `name` is
    rename   name in the file -> name in the network; None leaves a tensor out
    part     part of config.json that has the fields, where there is one
    torch_weights  file of torch that is read where there is no `weights`

    Raises UserError that names the folder if there is none, if sizes make no sense, or if weights
    are missing, unknown, of other shapes or, unless it is allowed, not finite.
    """
    source = f'{what} {name}'
    try:
        find = _opener(name)
        path = find('config.json')
        if path is None:
            raise OSError('there is no config.json')
        config = _read_json(path)
        config = dict(config.get(part, config))
        values = {key: config[key] for key in fields if key in config}
        for key, value in values.items():
            if not _fits(value, fields[key]):
                raise ValueError(f'{key} in its config.json is {json.dumps(value)[:60]}, which is '
                                 'no sensible value')
        paths = _weight_files(name, find, weights, torch_weights)
        state = _read_tensors(paths, rename, dtype)
        if not allow_nonfinite:
            check_finite(state, source)
        net = build(values, state, source)
    except UserError:
        raise
    except Exception as error:  # the hub and the libraries raise many kinds
        reason = one_line(error, 300)
        kind = '' if isinstance(error, ValueError | OSError) else f'{type(error).__name__}: '
        raise UserError(f'{what} cannot be loaded from {name} ({kind}{reason}); check its name '
                        'and the network, or give a local folder', field) from None
    return net.eval().requires_grad_(False)


def _fits(value, rule) -> bool:
    """Whether a value of config.json is one of: (low, high) a number, whole where `low` is; bool;
    a set of words; [rule] up to 8 values by this rule.
    """
    if isinstance(rule, list):
        return isinstance(value, list) and 0 < len(value) <= 8 \
            and all(_fits(part, rule[0]) for part in value)
    if isinstance(rule, tuple):
        low, high = rule
        return type(value) in (int, type(low)) and low <= value <= high
    return type(value) is bool if rule is bool else isinstance(value, str) and value in rule


# --- Files ---------------------------------------------------------------------------------------


def _opener(name: str):
    """file name -> path of a file of the model, or None if there is none."""
    if os.path.isdir(name):
        paths = functools.partial(os.path.join, name)
        return lambda file: paths(file) if os.path.isfile(paths(file)) else None
    match = _HUB.fullmatch(name)
    if match is None:
        raise OSError('no such folder')
    import huggingface_hub  # here, since it takes seconds
    import requests
    huggingface_hub.logging.set_verbosity_error()  # its retries without a network fill a screen
    host = huggingface_hub.constants.ENDPOINT
    repo, revision = match.groups()
    fetch = functools.partial(huggingface_hub.hf_hub_download, repo,
                              revision=revision or REVISIONS.get(repo, 'main'))

    def download(file):
        try:
            return fetch(file, local_files_only=True)
        except OSError:
            pass
        try:  # without a connection the hub's own code tries for half a minute
            requests.head(host, timeout=10)
        except requests.RequestException:
            raise OSError(f'no connection to {host}') from None
        try:
            return fetch(file)
        except huggingface_hub.errors.RemoteEntryNotFoundError:
            return None

    return download


def _read_json(path: str) -> dict:
    name = os.path.basename(path)
    try:
        value = budget.read_json(path, MAX_JSON)
    except ValueError as error:
        raise ValueError(f'its {name} is no valid JSON ({one_line(error)})') from None
    if not isinstance(value, dict):
        raise ValueError(f'its {name} is no JSON object')
    return value


def _weight_files(name: str, find, weights: str, torch_weights: str | None) -> list[str]:
    """Paths of the safetensors files: `weights`, or those that its index names; else
    `torch_weights`."""
    path = find(weights)
    if path is not None:
        return [path]
    index = find(f'{weights}.index.json')
    if index is None:
        path = torch_weights and find(torch_weights)
        if path:
            return [path]
        for old in ('pytorch_model.bin', 'diffusion_pytorch_model.bin'):
            if os.path.isfile(os.path.join(name, old)):
                raise OSError(_CONVERT.format(old=old, new=weights))
        raise OSError(f'there is no {weights}')
    table = _read_json(index).get('weight_map')
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if not 0 < len(names) <= MAX_FILES \
            or not all(re.fullmatch(r'\w[\w.-]*\.safetensors', file) for file in names):
        raise ValueError(f'its {weights}.index.json names no files of the folder, or too many')
    paths = list(map(find, names))
    if None in paths:
        raise OSError(f'there is no {names[paths.index(None)]}')
    return paths


def _read_tensors(paths, rename, dtype) -> dict[str, torch.Tensor]:
    """The tensors of files by name."""
    state = {}
    for key, get in itertools.chain.from_iterable(map(_tensors_of, paths)):
        name = rename(key)
        if name in state:
            raise ValueError(f'it has {printable(name, 100)} twice')
        if name is not None:
            value = get(key)
            if not value.is_floating_point():
                raise ValueError(f'its {printable(name, 100)} is of {value.dtype}')
            state[name] = value.to(dtype)  # of this type: the mapped file
    if not state:
        raise ValueError('its files hold no weights')
    return state


def _tensors_of(path: str):
    """(name, function that gives the tensor of that name) of a file of safetensors or torch."""
    import safetensors  # which refuses tensors that overlap or reach beyond the file
    if not path.endswith('.safetensors'):
        state = identify(path).state or {}
        yield from ((key, state.__getitem__) for key in state)
        return
    with open(path, 'rb') as file:
        if int.from_bytes(file.read(8), 'little') > MAX_JSON:
            raise ValueError(f'the header of its {os.path.basename(path)} is too large')
    with safetensors.safe_open(path, 'pt') as file:
        yield from ((key, file.get_tensor) for key in file.keys())
