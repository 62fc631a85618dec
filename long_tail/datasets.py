"""A data set in memory, and the data of the long-tail study as such: CIFAR archives, digits or a zip, cut to a long tail."""

import gzip
import hashlib
import os
import shutil
import zlib

import numpy as np

from dnnlib.image_io import BadImage
from dnnlib.url import download as download_url
from dnnlib.util import UserError, atomic_path
from long_tail import imbalance
from torch_utils import distributed
from training.data import sources
from training.data.transforms import make_transform

# data_type -> name of the archive, of its unpacked folder, MD5, number of classes and of training images.
CIFAR = {
    'cifar10': ('cifar-10-python.tar.gz', 'cifar-10-batches-py', 'c58f30108f718f92721af3d95e74349a', 10, 50000),
    'cifar100': ('cifar-100-python.tar.gz', 'cifar-100-python', 'eb9058c3a382ffc7106e4002c42a8d85', 100, 50000),
}
URL = 'https://www.cs.toronto.edu/~kriz/'
DATA_TYPES = [base + tail for base in (*CIFAR, 'digits', 'zip') for tail in ('', 'lt')]


class ArrayDataset:
    """Images uint8 [n,C,H,W] with classes int64 [n] (None: no labels); the face of `ImageDataset`.

    `class_counts` int64 [classes]: how many images each class has.
    """

    classes = wnids = None

    def __init__(self, name: str, images: np.ndarray, labels, class_names: list):
        self.name = self.path = name
        self._images, self.class_names = images, class_names
        self.has_labels = labels is not None
        self.label_dim = len(class_names) if self.has_labels else 0
        self.label_ids = np.asarray(labels if self.has_labels else np.zeros(len(images)), dtype=np.int64)
        self.class_counts = np.bincount(self.label_ids, minlength=self.label_dim) if self.has_labels else None
        self.image_shape, self.dtype = images.shape[1:], images.dtype

    def __len__(self):
        return len(self._images)

    def images(self, indices) -> np.ndarray:
        """uint8 [n,C,H,W] at `indices` (int [n])."""
        return self._images[np.asarray(indices)]

    def labels(self, indices) -> np.ndarray:
        """One-hot float32 [n,label_dim], zero-width without labels."""
        return np.eye(self.label_dim, dtype=np.float32)[self.label_ids[np.asarray(indices)]] if self.has_labels \
            else np.zeros((len(indices), 0), dtype=np.float32)

    def description(self) -> dict:
        """What snapshots keep of the data."""
        return {
            'name': self.name, 'size': len(self), 'resolution': self.image_shape[1], 'num_channels': self.image_shape[0],
            'label_dim': self.label_dim, 'classes': None, 'class_names': self.class_names if self.has_labels else None,
            'class_counts': self.class_counts.tolist() if self.has_labels else None}


def nominal_counts(data_type: str, imb_type: str, imb_factor: float) -> np.ndarray | None:
    """Training images of each class of CIFAR or digits, which need not be read for it; None for other data."""
    base, kind = _parse(data_type, imb_type)
    if base in CIFAR:
        return imbalance.class_counts(CIFAR[base][4], CIFAR[base][3], kind, imb_factor if kind != 'none' else 1.0)
    return open_data(data_type, '', imb_type=imb_type, imb_factor=imb_factor).class_counts if base == 'digits' else None


def open_data(data_type: str, root: str, *, size: int | None = None, imb_type='exp', imb_factor=0.01, use_labels=True,
              split='train', download=False, xflip=False) -> ArrayDataset:
    """The data that `data_type` names: cifar10, cifar100, digits or zip; with an `lt` at its end, a long tail of it.

    root     folder with the CIFAR archive, or that is its unpacked folder, or the archive itself; for zip, a zip or folder
             of labelled images
    size     width and height to which other images are resized (Lanczos)
    split    'train', or 'test' for CIFAR
    xflip    add the mirror image of each

    Raises UserError that names the option or the file: unknown type, no archive, wrong checksum or layout, a class
    without images.
    """
    base, kind = _parse(data_type, imb_type)
    source = _open_source(base, root, split, download)
    names = source.class_names or [str(c) for c in source.classes or range(int(source.labels.max()) + 1)]
    indices = np.arange(len(source), dtype=np.int64)
    if kind != 'none':
        indices = imbalance.long_tailed(source.labels, len(names), kind, imb_factor).indices
    labels = source.labels[indices]
    missing = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if use_labels and len(missing):
        raise UserError(f'--root={source.name}: class {missing[0]} ({names[missing[0]]}) has no images; '
                        'leave it out of the data')
    images = _read(source, indices, size)
    if xflip:
        images, labels = np.concatenate([images, images[..., ::-1]]), np.concatenate([labels, labels])
    return ArrayDataset(data_type, images, labels if use_labels else None, names)


def _parse(data_type, imb_type):
    """(kind of data, kind of long tail or 'none')."""
    if data_type not in DATA_TYPES:
        raise UserError(f'--data_type={data_type} is unknown; there are {", ".join(DATA_TYPES)}')
    base = data_type.removesuffix('lt')
    return base, 'none' if base == data_type else imb_type


def _open_source(base, root, split, download):
    if base == 'digits':
        return sources.DigitsSource()
    if base in CIFAR:
        path = find_cifar(base, root, download)
        source = sources.CifarSource(path, split=split)
        if len(source.class_names) != CIFAR[base][3]:
            raise UserError(f'{path} has {len(source.class_names)} classes; is it another data set than {base}?')
        return source
    source = sources.open_source(root)
    if source.labels is None or source.labels.ndim != 1 or len(source.classes) < 2:
        raise UserError(f'--root={root} has no class labels, and the study is about classes')
    return source


def find_cifar(base: str, root: str, download: bool = False) -> str:
    """Path of the archive or unpacked folder of 'cifar10' or 'cifar100' at `root`, its checksum verified.

    With `download` a missing archive is fetched to the folder `root`, and must be the original one.
    """
    archive, folder, md5 = CIFAR[base][:3]
    path = os.path.join(root, archive)
    if os.path.isfile(root):
        path = root
    elif os.path.isdir(os.path.join(root, folder)) and not os.path.isfile(path):
        return os.path.join(root, folder)
    elif not os.path.isfile(path) and os.path.isfile(os.path.join(root, 'batches.meta' if base == 'cifar10' else 'meta')):
        return root
    if download:
        with distributed.rank0_first():
            if not os.path.isfile(path):
                fetched = download_url(URL + archive)
                verify_gzip(fetched, md5)
                with atomic_path(path) as temp:
                    shutil.copyfile(fetched, temp)
    if not os.path.isfile(path):
        raise UserError(f'--root={root} has neither {archive} nor the folder {folder}; put it there, or give --download')
    verify_gzip(path, md5 if download else None)
    return path


def verify_gzip(path: str, md5: str | None = None):
    """Raises UserError unless the file is a whole gzip file by its own checksums, and has this MD5 if one is given."""
    try:
        if md5 is not None:
            with open(path, 'rb') as file:
                found = hashlib.file_digest(file, 'md5').hexdigest() if hasattr(hashlib, 'file_digest') \
                    else hashlib.md5(file.read()).hexdigest()
            if found != md5:
                raise UserError(f'{path} has the checksum (MD5) {found} instead of {md5}; remove it and download it again')
        with open(path, 'rb') as file:
            if file.read(2) != b'\x1f\x8b':
                return                                         # a plain tar or another format: reading it will tell
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path} is damaged: its checksum is wrong, or it ends early ({error}); download it again') from None


def _read(source, indices, size) -> np.ndarray:
    """Images uint8 [n,3,size,size] of a source."""
    stored = getattr(source, 'images', None)
    if stored is not None and stored.ndim == 4 and size in (None, stored.shape[-1]):
        return stored[indices]
    transform, out = make_transform(None, size, size), []
    for index in indices:
        try:
            out.append(transform(source.read(index)).transpose(2, 0, 1))
        except BadImage as error:
            raise UserError(f'{source.where(index)}: {error}') from None
        if out[-1].shape != out[0].shape or out[-1].shape[1] != out[-1].shape[2]:
            raise UserError(f'{source.where(index)} is {out[-1].shape[2]} x {out[-1].shape[1]}; all images must be squares '
                            'of one size: give --img_size')
    return np.stack(out)
