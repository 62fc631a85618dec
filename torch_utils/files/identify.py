"""What a file is, decided from its content and never from its name, without running anything from
it.

`identify` is the one door for files of this project and of others; whoever needs a network,
statistics or images looks at the `kind` of what it found.
"""

import dataclasses
import itertools
import math
import os
import zipfile

import numpy as np
import torch

from dnnlib import UserError, budget
from dnnlib.npz import open_entry, read_npy_header
from dnnlib.util import printable
from torch_utils.files import own, persistence, pickles, tar, torchfile, torchscript
from torch_utils.files.own import SNAPSHOT_FORMAT, STATISTICS_FORMAT
from torch_utils.files.pickles import ForeignPickleError

# of a network in a folder; a .safetensors file has its own name with .json
DESCRIPTION = 'snapshot.json'
FOLDER_WEIGHTS = 'unet/diffusion_pytorch_model.safetensors'
MAX_JSON = 16 << 20                         # bytes of the header of safetensors

# Kind -> what it is in words.
KINDS = {
    'snapshot': 'network snapshot of this project',
    'safetensors': 'network snapshot of this project as safetensors and JSON',
    'training-state': 'training state of this project',
    'edm': 'network pickle of EDM or EDM2',
    'weights': 'weights of a network (state dict)',
    'torchscript': 'TorchScript archive',
    'statistics': 'reference statistics',
    'samples': 'arrays of images or numbers (.npz)',
    'images': 'data set of images (zip)',
    'folder': 'folder',
    'cifar': 'batch of CIFAR images',
    'cifar-archive': 'archive of CIFAR batches',
}
# What is refused, by how it begins.
NOT_READ = {
    b'<': 'a web page; download it again',
    b'version https://git-lfs': 'a pointer of git-lfs; fetch the file itself with git lfs pull',
    b'\x89png': 'a picture',
    b'\xff\xd8': 'a picture',
    b'{': 'JSON text; of a network in two files, give the .safetensors',
}
# Where checkpoints of other projects keep the weights, the averaged ones first.
WEIGHT_KEYS = ('ema_model', 'model_state_dict', 'state_dict', 'model', 'net_model')
# Family of networks -> (a layer that no other has, what their weights are in words).
FAMILIES = {
    'adm': ('input_blocks.0.0.weight', 'weights of a guided-diffusion U-Net'),
    'ddpm': ('time_embedding.timembedding.0.weight',
             'weights of a DDPM U-Net (class-balancing diffusion)'),
    'edm2': ('unet.emb_fourier.freqs', 'weights of an EDM2 U-Net'),
    'wrn': ('block1.layer.0.bn1.weight', 'weights of a wide residual network (classifier)'),
    'inception': ('Mixed_5b.branch1x1.conv.weight', 'weights of the FID Inception network'),
}
# What a snapshot of this project must hold besides its weights.
SNAPSHOT_PARTS = dict.fromkeys(('network', 'encoder', 'dataset', 'recipe'), dict) | dict(
    sampler=dict | None, nimg=int, ema_std=int | float | None)
PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.npy')


@dataclasses.dataclass
class Found:
    """What is in a file: `kind` (a key of KINDS), `content` (what was read, by kind), `state`
    (weights by name, without a data-parallel prefix), `weights` (the key they were under), `facts`
    (more about it, for people).
    """

    path: str
    kind: str
    content: object = None
    state: dict | None = None
    weights: str | None = None
    facts: dict = dataclasses.field(default_factory=dict)

    @property
    def what(self) -> str:
        return self.facts.get('what', KINDS[self.kind])


def identify(path: str, weights: str | None = None) -> Found:
    """What is at `path`, a file or a folder. Of a checkpoint with several sets of weights,
    `weights` names one.

    Nothing from it is run, and no part of it is written anywhere. Raises UserError with one line
    that names the file if it is damaged, hostile or of no known kind.
    """
    with pickles.errors_of(path):
        if not os.path.exists(path):
            raise ForeignPickleError('no such file')
        if not os.path.isdir(path):
            return _file(path, weights)
        if os.path.isfile(os.path.join(path, DESCRIPTION)):
            return _safetensors(path, os.path.join(path, FOLDER_WEIGHTS),
                                os.path.join(path, DESCRIPTION))
        return Found(path, 'folder')


def read_state_dict(path: str) -> dict:
    """The name -> tensor dictionary in a checkpoint file, without a data-parallel prefix
    `module.`; half precision becomes float32.

    Takes a plain state dict, or one that a checkpoint holds under one of WEIGHT_KEYS
    (averaged weights first); in files of torch or safetensors. Nothing in the file is executed.
    Raises UserError naming the file.
    """
    found = identify(path)
    if found.kind != 'weights':
        raise UserError(f'{path} does not hold the weights of a network alone; '
                        f'it is a {found.what}')
    return found.state


def _file(path, weights) -> Found:
    data = pickles.map_file(path)
    head = bytes(data[:512])
    if head[:4] in (b'PK\3\4', b'PK\5\6'):
        return _zip(path, data, weights)
    if torchfile.is_legacy(data):
        return _torch(path, torchfile.read_legacy(data), weights)
    # may begin with any byte
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], 'little') <= len(data) - 8:
        return _safetensors(path, path, os.path.splitext(path)[0] + '.json')
    if head[:1] == b'\x80':
        return _pickle(path, data)
    if head[:2] == b'\x1f\x8b' or head[257:262] == b'ustar':
        return _tar(path)
    for start, what in NOT_READ.items():
        if head.lstrip().lower().startswith(start):
            raise ForeignPickleError(f'it is {what}')
    raise ForeignPickleError('it is of no known kind, or damaged')


# --- Files of torch ------------------------------------------------------------------------------


def _zip(path, data, weights) -> Found:
    with zipfile.ZipFile(path) as z:
        names = z.namelist()
    if any(name.startswith('/') or '..' in name.replace('\\', '/').split('/') for name in names):
        raise ForeignPickleError('it is a zip with names that point outside of it')
    if any(name.endswith('/data.pkl') for name in names):
        records = torchfile.ZipRecords(path, data)
        if records.root + 'constants.pkl' in names:
            return Found(path, 'torchscript', state=torchscript.read_tensors(records))
        content = own.read_own(path) if own.is_own(records) \
            else records.load(persistence.ALLOWED)
        return _torch(path, content, weights)
    if names and all(name.endswith('.npy') for name in names):
        arrays = NpzArrays(path)
        statistics = any(name.split('/')[-1] == 'mu' for name in arrays.facts)
        return Found(path, 'statistics' if statistics else 'samples', arrays, facts=arrays.facts)
    pictures = sum(name.lower().endswith(PICTURES) for name in names)
    if not pictures:
        raise ForeignPickleError('it is a zip without images, arrays or tensors')
    return Found(path, 'images', facts=dict(files=pictures))


def _torch(path, content, weights) -> Found:
    if not isinstance(content, dict):
        raise ForeignPickleError(f'it holds a {type(content).__name__} instead of a dictionary of '
                                 'weights')
    if content.get('format') == SNAPSHOT_FORMAT:
        return _snapshot(path, 'snapshot', content, os.path.getsize(path))
    if content.get('format') == STATISTICS_FORMAT or _moments(content):
        return _statistics(path, content)
    if 'nimg' in content and {'means', 'identity'} & set(content):
        return Found(path, 'training-state', content, facts=dict(nimg=content['nimg']))
    if _is_state(content):
        return _weights(path, content, None, {})
    if persistence.is_network(content, 'net'):
        facts = dict(what='training state of EDM (weights without average)')
        return Found(path, 'edm', content | {'ema': content['net']}, persistence.state_dict(
            content['net'], os.path.getsize(path)), 'net', facts)
    if isinstance(content.get('state'), dict) and 'cur_nimg' in content['state']:
        return _edm2_state(path, content, weights)
    return _chosen(path, content, weights, {name: value for name, value in content.items()
                                            if isinstance(name, str)
                                            and isinstance(value, bool | int | float | str)})


def _edm2_state(path, content, weights) -> Found:
    """A training state of EDM2: its averages, by their widths, and `net`."""
    averages = content.get('ema')
    with pickles.errors_of(path, 'it is a training state of EDM2, but malformed: '):
        sets = {f'{float(std):.3f}': state for std, state in zip(
            averages['stds'], averages['emas'], strict=True)} | {'net': content['net']}
        facts = dict(what='training state of EDM2', nimg=int(content['state']['cur_nimg']))
        if not all(map(_is_state, sets.values())):
            raise ForeignPickleError('it has something else in the place of weights')
    return dataclasses.replace(_chosen(path, sets, weights, facts, sets), content=content)


def _chosen(path, content, weights, facts, names=WEIGHT_KEYS) -> Found:
    """One of the sets of weights in `content`: that called `weights`, or the first of `names`."""
    keys = [key for key in names if _is_state(content.get(key))]
    if weights is not None and weights not in keys:
        raise ForeignPickleError(f'it has no weights called {weights!r}; '
                                 f'there are {", ".join(keys) or "none"}')
    if not keys:
        raise ForeignPickleError('it does not hold the weights of a network')
    key = weights or keys[0]
    return _weights(path, content[key], key, dict(weights=f'{key} (of {", ".join(keys)})') | facts)


def _is_state(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in value.items())


def family(names) -> str | None:
    """The key of FAMILIES for state-dict names without a data-parallel prefix, else None."""
    names = {name.removeprefix('1.') for name in names} if '0.mean' in names else names
    return next((kind for kind, (layer, _) in FAMILIES.items() if layer in names), None)


def _weights(path, state, key, facts) -> Found:
    if all(name.startswith('module.') for name in state):
        state = {name.removeprefix('module.'): value for name, value in state.items()}
        facts = facts | dict(prefix='module. (data parallel)')
    _, what = FAMILIES.get(family(state), (None, 'weights of a network of unknown kind'))
    state = torchfile.state_of(state, os.path.getsize(path))
    return Found(path, 'weights', None, state, key, dict(what=what) | facts)


def _snapshot(path, kind, content, size) -> Found:
    """A snapshot of this project, its parts checked: weights by name, and plain values of modest
    size.
    """
    content = dict(nimg=0, ema_std=None, sampler=None) | content
    for key, types in SNAPSHOT_PARTS.items():
        if not isinstance(content.get(key), types):
            raise ForeignPickleError(f'its {key} is malformed, or missing')
        pickles.check_plain(content[key], f'its part {key}')
    network, state = content['network'], content.get('state')
    if not isinstance(network.get('class_name'), str) \
            or not isinstance(network.get('kwargs'), dict) or not _is_state(state):
        raise ForeignPickleError('it is a network snapshot without a network')
    return Found(path, kind, content, torchfile.state_of(state, size))


def _safetensors(path, weights, description) -> Found:
    """Weights in safetensors; with a description in JSON beside them they are a network of this
    project.
    """
    import safetensors.torch
    data = pickles.map_file(weights)
    if int.from_bytes(data[:8], 'little') > MAX_JSON:
        raise ForeignPickleError('its header is too large')
    state = safetensors.torch.load_file(weights)
    if not os.path.isfile(description):
        return _weights(path, state, None, {})
    with pickles.errors_of(path, f'its description {os.path.basename(description)}: '):
        content = budget.read_json(description)
        if not isinstance(content, dict) or content.get('format') != SNAPSHOT_FORMAT:
            raise ForeignPickleError('it is not of a network snapshot')
    if os.path.isdir(path):  # there the network is part of a model of diffusers
        state = {name.removeprefix('net.'): value for name, value in state.items()}
    return _snapshot(path, 'safetensors', content | dict(state=state), len(data))


# --- Pickles and arrays --------------------------------------------------------------------------


def _pickle(path, data) -> Found:
    content = persistence.load(data)
    # Python 3 writes the bytes of Python 2 as such.
    content = {key.decode('latin1') if isinstance(key, bytes) else key: value
               for key, value in content.items()} if isinstance(content, dict) else {}
    if persistence.is_network(content):
        return Found(path, 'edm', content, persistence.state_dict(content['ema'], len(data)))
    images = content.get('data')
    if isinstance(images, pickles.NumpyArray) and {'labels', 'fine_labels'} & content.keys():
        array = images.array()
        facts = dict(images=len(array), array=f'{array.dtype} {list(array.shape)}')
        return Found(path, 'cifar', content, facts=facts)
    if not _moments(content):
        raise ForeignPickleError('it is a pickle that holds no network of EDM or EDM2, '
                                 'no statistics and no CIFAR images')
    return _statistics(path, _arrays(content))


def _arrays(value, depth: int = 2):
    """An array of a pickle as one of NumPy; in a dictionary, and in those that it holds, all of
    them.
    """
    if isinstance(value, dict) and depth:
        return {key: _arrays(item, depth - 1) for key, item in value.items()}
    return value.array() if isinstance(value, pickles.NumpyArray) else value


def _moments(content) -> dict:
    """{feature space: its table of `mu` and `sigma`}."""
    return {str(space)[:40]: table for space, table in [('features', content), *content.items()]
            if isinstance(table, dict) and {'mu', 'sigma'} <= table.keys()}


def _statistics(path, content) -> Found:
    moments = _moments(content)
    for table in moments.values():
        if not all(isinstance(table[key], np.ndarray | torch.Tensor) and table[key].ndim
                   for key in ('mu', 'sigma')):
            raise ForeignPickleError('its mu or sigma is no array')
    return Found(path, 'statistics', content, facts={
        space: f'{len(table["mu"])} dimensions' for space, table in moments.items()})


class NpzArrays:
    """The arrays of an .npz file, by name; `facts` has type and shape of each as text. Headers are
    read first, so that no array is larger than its file says, and a file that expands beyond
    measure is refused.
    """

    def __init__(self, path: str):
        self.facts = {}
        self._infos = {}
        self._zip = zipfile.ZipFile(path)
        for info in self._zip.infolist():
            budget.spend()
            name = info.filename.removesuffix('.npy')
            what = f'its array {printable(name, 60)}'
            with open_entry(self._zip, info) as file:
                shape, _, descr = read_npy_header(file)
                dtype = np.dtype(descr)
                if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                    raise ForeignPickleError(f'{what} is not as large as its shape '
                                             f'{list(shape)[:5]} says')
            if name in self._infos:
                raise ForeignPickleError(f'{what} is there twice')
            self.facts[name] = f'{dtype} {list(shape)}'
            self._infos[name] = info

    def __contains__(self, name):
        return name in self.facts

    def __getitem__(self, name) -> np.ndarray:
        info = self._infos[name]
        budget.spend(memory=info.file_size)
        with open_entry(self._zip, info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _tar(path) -> Found:
    """A tar archive with CIFAR batches among its first files."""
    with tar.members(path) as (_, members):
        for member in itertools.islice(members, 50):
            name = os.path.basename(member.name)
            if member.isfile() and name in ('batches.meta', 'meta', 'data_batch_1', 'test_batch'):
                layout = 'CIFAR-10' if 'batch' in name else 'CIFAR-100'
                return Found(path, 'cifar-archive', facts=dict(layout=layout))
    raise ForeignPickleError('it is an archive without CIFAR batches')
