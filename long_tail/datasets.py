"""The data of the long-tail study: CIFAR archives, digits or a zip, as they are or cut to a long
tail.
"""

import dataclasses
import os
import shutil

import numpy as np

from dnnlib import lazy
from dnnlib.image_io import BadImage, with_channels
from dnnlib.options import path
from dnnlib.url import download as download_url
from dnnlib.util import UserError, atomic_path, hash_file

with lazy.imports():
    from torch_utils import distributed

from long_tail import imbalance
from training.data import sources
from training.data.images import ArrayImages
from training.data.transforms import make_transform, resize_stack

URL = 'https://www.cs.toronto.edu/~kriz/'
CIFAR_IMAGES = 50000  # for training, of each


@dataclasses.dataclass(frozen=True)
class Cifar:
    """A CIFAR archive, its unpacked folder and the file in there that is not in the other one's.
    """

    archive: str
    folder: str
    meta: str
    md5: str
    num_classes: int


CIFAR = {
    'cifar10': Cifar('cifar-10-python.tar.gz', 'cifar-10-batches-py', 'batches.meta',
                     'c58f30108f718f92721af3d95e74349a', 10),
    'cifar100': Cifar('cifar-100-python.tar.gz', 'cifar-100-python', 'meta',
                      'eb9058c3a382ffc7106e4002c42a8d85', 100),
}
root_option = path('--root', './',
                   'Where the CIFAR archive or its folder is; for zip, the zip or folder')
BALANCED = [*CIFAR, 'digits', 'zip']
DATA_TYPES = [base + tail for base in BALANCED for tail in ('', 'lt')]


def nominal_counts(data_type: str, imb_type: str, imb_factor: float) -> np.ndarray | None:
    """Training images of each class of CIFAR, without reading it; None for other data."""
    base, kind = _parse(data_type, imb_type)
    if base not in CIFAR:
        return None
    return imbalance.class_counts(CIFAR_IMAGES, CIFAR[base].num_classes, kind, imb_factor)


def open_data(data_type: str, root: str, *, size: int | None = None, imb_type='exp',
              imb_factor=0.01, split='train', download=False,
              channels: int | None = None) -> ArrayImages:
    """The data that `data_type` names: cifar10, cifar100, digits or zip, with `lt`: a long tail
    of it.

    root     the CIFAR archive, its unpacked folder, or the folder of one of them; for zip, a zip
             or folder of labelled images
    size     width and height to which other images are resized (Lanczos)
    split    'train', or 'test' for CIFAR
    channels of the images; None: 1 if all pictures are gray, else 3

    Raises UserError that names the field or the file: unknown type, no archive, wrong checksum or
    layout, a class without images.
    """
    base, kind = _parse(data_type, imb_type)
    source = _open_source(base, root, split, download)
    names = source.class_names or [str(c) for c in source.classes]
    indices = np.arange(len(source))
    if kind != 'none':
        indices = imbalance.long_tailed(source.labels, len(names), kind, imb_factor)
    labels = source.labels[indices]
    for label in np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0):
        raise UserError(f'{source.name}: class {label} ({names[label]}) is left without images; '
                        'leave it out of the data, or give a larger imb_factor')
    images = _read(source, indices, size, channels or source.num_channels(indices))
    return ArrayImages(data_type, images, labels, {'class_names': names})


def _parse(data_type, imb_type):
    """(kind of data, kind of long tail or 'none')."""
    base = data_type.removesuffix('lt')
    return base, 'none' if base == data_type else imb_type


def _open_source(base, root, split, download) -> sources.Source:
    if base in CIFAR:
        path = find_cifar(base, root, download)
        source = sources.CifarSource(path, split=split)
        if len(source.class_names) != CIFAR[base].num_classes:
            raise UserError(f'{path} has {len(source.class_names)} classes; '
                            f'is it another data set than {base}?')
        return source
    source = sources.open_source('digits' if base == 'digits' else root)
    source.require_whole()
    if source.labels is None or source.labels.ndim != 1 or len(source.classes) < 2:
        raise UserError('has no class labels, and the study is about classes', 'root', root)
    return source


def find_cifar(base: str, root: str, download: bool = False) -> str:
    """Path of the archive or unpacked folder of 'cifar10' or 'cifar100'.

    With `download` a missing archive is fetched to the folder `root`; it must be the original one.
    """
    cifar = CIFAR[base]
    path = root if os.path.isfile(root) else os.path.join(root, cifar.archive)
    if not os.path.isfile(path):
        for folder in (os.path.join(root, cifar.folder), root):
            if os.path.isfile(os.path.join(folder, cifar.meta)):
                return folder
    if download:
        with distributed.rank0_first():
            if not os.path.isfile(path):
                with atomic_path(path) as temp:
                    shutil.copyfile(_checked(download_url(URL + cifar.archive), cifar.md5), temp)
        return _checked(path, cifar.md5)
    if not os.path.isfile(path):
        raise UserError(f'has neither {cifar.archive} nor the folder {cifar.folder}; '
                        'put it there, or give --download', 'root', root)
    return path


def _checked(path: str, md5: str) -> str:
    """The path. Raises UserError unless the file is the published one."""
    digest = hash_file(path, 'md5')
    if digest != md5:
        raise UserError(f'{path} has the checksum (MD5) {digest} instead of {md5}; '
                        'remove it and download it again')
    return path


def _read(source, indices, size, channels) -> np.ndarray:
    """Images uint8 [n,size,size,channels] of a source."""
    transform = make_transform(None, size, size)

    def picture(index):
        try:
            return transform(with_channels(source.picture(index), channels))
        except BadImage as error:
            raise UserError(f'{source.where(index)}: {error}', error.field) from None

    stack = source.stack(indices)
    images = map(picture, indices)
    if stack is not None:
        images = resize_stack(with_channels(stack, channels), size, size)
    squares = []
    for index, image in zip(indices, images, strict=True):
        squares.append(image)
        height, width, _ = image.shape
        if height != width or image.shape != squares[0].shape:
            raise UserError(f'{source.where(index)} is {width} x {height}; all images must be '
                            'squares of one size', field='img_size')
    return np.stack(squares)
