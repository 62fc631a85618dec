"""What a file is, decided from its content and never from its name, without running anything from it.

`identify` is the one door for files of this project and of others; whoever needs a network, statistics or images
looks at the `kind` of what it found.
"""

import dataclasses
import gzip
import json
import math
import os
import tarfile
import zipfile
import zlib

import numpy as np
import torch

from torch_utils.files import own, persistence, pickles, torchfile, torchscript
from torch_utils.files.own import SNAPSHOT_FORMAT, STATISTICS_FORMAT
from torch_utils.files.pickles import ForeignPickleError

DESCRIPTION = 'snapshot.json'               # of a network in a folder; a .safetensors file has its own name with .json
FOLDER_WEIGHTS = 'unet/diffusion_pytorch_model.safetensors'
MAX_JSON = 16 << 20                         # bytes of a description
MAX_RATIO, FREE_SIZE = 100, 64 << 20        # how far a record of a zip may expand, and up to what size that is not asked

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
# Where checkpoints of other projects keep the weights, the averaged ones first.
WEIGHT_KEYS = ('ema_model', 'model_state_dict', 'state_dict', 'model', 'net_model')


# Kind of network -> a layer that no other has.
LAYERS = {'adm': 'input_blocks.0.0.weight', 'ddpm': 'time_embedding.timembedding.0.weight',
          'wrn': 'block1.layer.0.bn1.weight', 'inception': 'Mixed_5b.branch1x1.conv.weight'}


@dataclasses.dataclass
class Found:
    """What is in a file: `kind` (a key of KINDS), `content` (what was read, by kind), `state` (weights by name, without a
    data-parallel prefix), `weights` (the key they were under), `facts` (more about it, for people)."""

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
    """What is at `path`, a file or a folder. Of a checkpoint with several sets of weights, `weights` names one.

    Nothing from it is run, and no part of it is written anywhere. Raises UserError with one line that names the file if it
    is damaged, hostile or of no known kind.
    """
    with pickles.errors_of(path):
        if not os.path.exists(path):
            raise ForeignPickleError('no such file')
        if os.path.isdir(path):
            return _folder(path)
        return _file(path, weights)


def _folder(path) -> Found:
    if os.path.isfile(os.path.join(path, DESCRIPTION)):
        return _safetensors(path, os.path.join(path, FOLDER_WEIGHTS), os.path.join(path, DESCRIPTION))
    return Found(path, 'folder')


def _file(path, weights) -> Found:
    data = pickles.map_file(path)
    head = bytes(data[:512])
    if head[:4] in (b'PK\3\4', b'PK\5\6'):
        return _zip(path, data, weights)
    if torchfile.is_legacy(data):
        return _torch(path, torchfile.read(path, data), weights)
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], 'little') <= len(data) - 8:  # may begin with any byte
        return _safetensors(path, path, os.path.splitext(path)[0] + '.json')
    if head[:1] == b'\x80':
        return _pickle(path, data)
    if head[:2] == b'\x1f\x8b' or head[257:262] == b'ustar':
        return _tar(path)
    for start, what in ((b'<', 'a web page; download it again'), (b'version https://git-lfs', 'a pointer of git-lfs; '
                        'fetch the file itself with git lfs pull'), (b'\x89PNG', 'a picture'), (b'\xff\xd8', 'a picture'),
                        (b'{', 'JSON text; of a network in two files, give the .safetensors')):
        if head.lstrip().lower().startswith(start.lower()):
            raise ForeignPickleError(f'it is {what}')
    raise ForeignPickleError('it is of no known kind, or damaged')


# --- Files of torch --------------------------------------------------------------------------------------------------


def _zip(path, data, weights) -> Found:
    if not zipfile.is_zipfile(path):
        raise ForeignPickleError('it is a zip that is cut off or damaged')
    with zipfile.ZipFile(path) as z:
        names = z.namelist()
    if any(name.startswith('/') or '..' in name.replace('\\', '/').split('/') for name in names):
        raise ForeignPickleError('it is a zip with names that point outside of it')
    if torchscript.is_torchscript(path):
        return Found(path, 'torchscript', state=torchscript.read_tensors(path))
    if any(name.endswith('/data.pkl') for name in names):
        return _torch(path, own.read_own(path) if own.is_own(path, data) else torchfile.read(path, data), weights)
    if names and all(name.endswith('.npy') for name in names):
        arrays = NpzArrays(path)
        facts = {name: ' '.join(map(str, description)) for name, description in arrays.descriptions.items()}
        names = set(arrays.descriptions)
        return Found(path, 'statistics' if {'mu', 'sigma'} <= names or any(n.endswith('/mu') for n in names) else 'samples',
                     arrays, facts=facts)
    pictures = sum(name.lower().endswith(('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.npy')) for name in names)
    if not pictures:
        raise ForeignPickleError('it is a zip without images, arrays or tensors')
    return Found(path, 'images', facts=dict(files=pictures))


def _torch(path, content, weights) -> Found:
    if not isinstance(content, dict):
        raise ForeignPickleError(f'it holds a {type(content).__name__} instead of a dictionary of weights')
    if content.get('format') == SNAPSHOT_FORMAT:
        return _snapshot(path, 'snapshot', content)
    if content.get('format') == STATISTICS_FORMAT or _has_statistics(content):
        return _statistics(path, content)
    if 'identity' in content and 'nimg' in content:
        return Found(path, 'training-state', content, facts=dict(nimg=content['nimg']))
    if _is_state(content):
        return _weights(path, content, None, {})
    keys = [key for key in WEIGHT_KEYS if _is_state(content.get(key))]
    if weights is not None and weights not in keys:
        raise ForeignPickleError(f'it has no weights called {weights!r}; there are {", ".join(keys) or "none"}')
    if not keys:
        raise ForeignPickleError('it does not hold the weights of a network')
    key = weights or keys[0]
    facts = {name: value for name, value in content.items() if isinstance(value, bool | int | float | str)
             and isinstance(name, str)}
    return _weights(path, content[key], key, dict(weights=f'{key} (of {", ".join(keys)})') | facts)


def _is_state(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value) \
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def family(names) -> str | None:
    """'adm', 'ddpm', 'wrn' or 'inception' for state-dict names without prefixes, else None."""
    names = {name.removeprefix('1.') for name in names} if '0.mean' in names else set(names)
    return next((kind for kind, layer in LAYERS.items() if layer in names), None)


def _weights(path, state, key, facts) -> Found:
    if all(name.startswith('module.') for name in state):
        facts, state = facts | dict(prefix='module. (data parallel)'), {
            name.removeprefix('module.'): value for name, value in state.items()}
    kind = family(state)
    names = {'adm': 'weights of a guided-diffusion U-Net', 'ddpm': 'weights of a DDPM U-Net (class-balancing diffusion)',
             'wrn': 'weights of a wide residual network (classifier)', 'inception': 'weights of the FID Inception network'}
    facts = dict(what=names.get(kind, 'weights of a network of unknown kind')) | facts
    return Found(path, 'weights', None, torchfile.state_of(state, os.path.getsize(path)), key, facts)


def _snapshot(path, kind, content) -> Found:
    """A snapshot of this project, its parts checked: weights by name, and plain values of modest size."""
    network, state = content.get('network'), content.get('state')
    if not isinstance(network, dict) or not isinstance(network.get('class_name'), str) \
            or not isinstance(network.get('kwargs'), dict) or not _is_state(state):
        raise ForeignPickleError('it is a network snapshot without a network')
    for key in ('encoder', 'dataset', 'recipe'):
        if not isinstance(content.get(key), dict):
            raise ForeignPickleError(f'it is a network snapshot without its part {key}')
        pickles.check_plain(content[key], f'its part {key}')
    pickles.check_plain(network, 'its part network')
    nimg, std = content.get('nimg', 0), content.get('ema_std')
    if type(nimg) is not int or not isinstance(std, int | float | None):
        raise ForeignPickleError('it is a network snapshot with a malformed nimg or ema_std')
    size = os.path.getsize(path if os.path.isfile(path) else os.path.join(path, FOLDER_WEIGHTS))
    return Found(path, kind, content | dict(nimg=nimg, ema_std=std), torchfile.state_of(state, size))


def _safetensors(path, weights, description) -> Found:
    """Weights in safetensors; with a description in JSON beside them they are a network of this project."""
    import safetensors.torch
    if int.from_bytes(pickles.map_file(weights)[:8], 'little') > MAX_JSON:
        raise ForeignPickleError('its header is too large')
    try:
        state = safetensors.torch.load_file(weights)
    except Exception as error:  # the library has errors of its own
        raise ForeignPickleError(f'its weights are damaged ({" ".join(str(error).split())[:100]})') from None
    if not os.path.isfile(description):
        return _weights(path, state, None, {})
    data = pickles.map_file(description)
    if len(data) > MAX_JSON:
        raise ForeignPickleError(f'its description {os.path.basename(description)} is too large')
    try:
        content = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ForeignPickleError(f'its description {os.path.basename(description)} is no valid JSON ({error})') from None
    if not isinstance(content, dict) or content.get('format') != SNAPSHOT_FORMAT:
        raise ForeignPickleError(f'its description {os.path.basename(description)} is not of a network snapshot')
    if os.path.isdir(path):  # there the network is part of a model of diffusers
        state = {name.removeprefix('net.'): value for name, value in state.items()}
    return _snapshot(path, 'safetensors', content | dict(state=state))


# --- Pickles and arrays ----------------------------------------------------------------------------------------------


def _pickle(path, data) -> Found:
    content = persistence.load(data, encoding='latin1')
    if isinstance(content, dict):  # Python 2 wrote text as bytes
        content = {key.decode('latin1') if isinstance(key, bytes) else key: value for key, value in content.items()}
    if persistence.is_network(content):
        ema = content['ema']
        return Found(path, 'edm', content, persistence.state_dict(ema, len(data)))
    if isinstance(content, dict) and isinstance(content.get('data'), pickles.NumpyArray) \
            and ({'labels', 'fine_labels'} & content.keys()):
        array = content['data'].array()
        return Found(path, 'cifar', content, facts=dict(images=len(array), array=f'{array.dtype} {list(array.shape)}'))
    if isinstance(content, dict) and 'ema' in content:
        raise ForeignPickleError('it holds no network of EDM or EDM2')
    if not _has_statistics(content):
        raise ForeignPickleError('it is a pickle that holds no network of EDM or EDM2, no statistics and no CIFAR images')
    return _statistics(path, {key: _arrays(value) for key, value in content.items()})


def _arrays(value):
    """Arrays of a pickle (or of the dictionary that it is) as NumPy arrays."""
    if isinstance(value, pickles.NumpyArray):
        return value.array()
    if isinstance(value, dict):
        return {key: item.array() if isinstance(item, pickles.NumpyArray) else item for key, item in value.items()}
    return value


def _has_statistics(content) -> bool:
    return isinstance(content, dict) and ({'mu', 'sigma'} <= content.keys() or any(
        isinstance(value, dict) and {'mu', 'sigma'} <= value.keys() for value in content.values()))


def _statistics(path, content) -> Found:
    shapes = {}
    for space, value in [('', content), *content.items()]:
        if isinstance(value, dict) and 'mu' in value:
            shapes[str(space)[:40] or 'features'] = f'{len(np.asarray(value["mu"]).reshape(-1))} dimensions'
    return Found(path, 'statistics', content, facts=shapes)


class NpzArrays:
    """The arrays of an .npz file, by name. Headers are read first, so that no array is larger than its file says, and a file
    that expands beyond measure is refused."""

    def __init__(self, path: str):
        self.path, self.descriptions = path, {}
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                name = info.filename.removesuffix('.npy')
                if info.file_size > FREE_SIZE and info.file_size > MAX_RATIO * info.compress_size:
                    raise ForeignPickleError(f'its array {name[:60]} expands {info.file_size // info.compress_size} times')
                with z.open(info) as file:
                    shape, _, dtype = _npy_header(file)
                    if dtype.hasobject:
                        raise ForeignPickleError(f'its array {name[:60]} holds objects of Python')
                    if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                        raise ForeignPickleError(f'its array {name[:60]} is not as large as its shape {list(shape)[:5]} says')
                self.descriptions[name] = str(dtype), list(shape)

    def __contains__(self, name):
        return name in self.descriptions

    def __getitem__(self, name) -> np.ndarray:
        with np.load(self.path, allow_pickle=False) as z:
            return z[name]


def _npy_header(file):
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ForeignPickleError('it holds an array in an unknown version of .npy')
    return read(file)


def _tar(path) -> Found:
    """A tar archive with CIFAR batches among its first files."""
    try:
        with tarfile.open(path, 'r|*') as tar:
            for count, member in enumerate(tar):
                name = os.path.basename(member.name)
                if member.isfile() and name in ('batches.meta', 'meta', 'data_batch_1', 'test_batch'):
                    return Found(path, 'cifar-archive', facts=dict(layout='CIFAR-10' if 'batch' in name else 'CIFAR-100'))
                if count > 50 or member.size > 1 << 29:
                    break
    except (tarfile.TarError, EOFError, OSError, zlib.error, gzip.BadGzipFile) as error:
        raise ForeignPickleError(f'it is no archive, or damaged ({error})') from None
    raise ForeignPickleError('it is an archive without CIFAR batches')
