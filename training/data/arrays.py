"""Images in arrays: which array of an .npz holds them, and which their labels."""

import contextlib
import os
import re
import zipfile

import numpy as np

from dnnlib import UserError
from dnnlib.image_io import MODES, LargeImage, check_pixels
from dnnlib.npz import open_array, read_npy_header
from dnnlib.util import one_line, printable

# Names of images and of their labels: of guided diffusion, of the synthetic-data study, Keras,
# MedMNIST and others; the first that a file has.
NAMES = (('arr_0', 'arr_1'), ('image', 'label'), ('images', 'labels'), ('x_train', 'y_train'),
         ('train_images', 'train_labels'), ('x', 'y'), ('X', 'y'), ('data', 'labels'),
         ('data', 'label'), ('images', 'label'), ('samples', 'labels'))
# What turns the name of images into that of their labels, of any part of a data set.
_LABELS = (('images', 'labels'), ('images', 'label'), ('image', 'label'), ('x', 'y'), ('X', 'y'),
           ('data', 'labels'), ('data', 'label'), ('arr_0', 'arr_1'))


def split_key(text: str) -> tuple[str, str | None]:
    """'x.npz:test_images' -> ('x.npz', 'test_images'); a name that exists has no key."""
    match = re.fullmatch(r'(.+):([\w.+-]+)', text, re.DOTALL)
    if not match or os.path.exists(text) or not os.path.exists(match[1]):
        return text, None
    return match[1], match[2]


def with_key(path: str, key: str | None) -> str:
    """The reverse of `split_key`."""
    return f'{path}:{key}' if key else path


def array_names(path: str) -> list[str]:
    """The arrays of an .npz, which has nothing else; [] for any other file."""
    with contextlib.suppress(OSError, zipfile.BadZipFile, ValueError, NotImplementedError), \
            zipfile.ZipFile(path) as z:
        names = z.namelist()
        if names and all(name.endswith('.npy') for name in names):
            return [name.removesuffix('.npy') for name in names]
    return []


def is_image_npz(path: str) -> bool:
    """Whether a file is an .npz, but of no statistics or latents alone."""
    names = array_names(path)
    flat = not any('/' in name for name in names)
    named = path.lower().endswith('.npz')
    images = {name for name, _ in NAMES} if named else {'arr_0'}
    return bool(names) and flat and bool(images & set(names) or named and 'mu' not in names)


def choose_names(path: str, key: str | None = None) -> tuple[str, str | None]:
    """The names of the images and of their labels, if any, in an .npz. Raises UserError that
    lists the arrays. `key` is the name of the images, or IMAGES+LABELS.
    """
    names = array_names(path)
    shown = ', '.join(printable(name, 40) for name in names[:20]) or 'none'
    asked = key.split('+', 1) if key and key not in names else [key] if key else []
    for name in asked:
        if name not in names:
            raise UserError(f'{path} has no array {name}; there are {shown}', 'key')
    if len(asked) == 2:
        return tuple(asked)
    if key is None:
        pairs = [pair for pair in NAMES if pair[0] in names]
        if not pairs and len(names) != 1:
            raise UserError(f'{path} has the arrays {shown}; name the one with the images, e.g. '
                            f'{path}:{printable(names[0], 40) if names else "images"}', 'key')
        images = pairs[0][0] if pairs else names[0]
        return images, next((labels for name, labels in pairs if name == images
                             and labels in names), None)
    places = [key.replace(old, new, 1) for old, new in _LABELS if old in key]
    return key, next((name for name in places if name in names and name != key), None)


def open_npz(path: str, key: str | None = None):
    """(images uint8 [N,H,W,C] with C of 1, 3 or 4, labels int64 [N] or float32 [N,D] or None) of
    an .npz; `key` names the array, see `choose_names`.

    An uncompressed array stays on the disk; a compressed one is read whole. Raises UserError that
    names the file.
    """
    image_key, label_key = choose_names(path, key)
    try:
        array = open_array(path, image_key, _check_shape)
        labels = None if label_key is None else open_array(path, label_key)
    except LargeImage as error:
        raise UserError(f'{path}: {error}', error.field) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path}: no .npz file with the array {image_key} '
                        f'({one_line(error, 100)})') from None
    images = as_images(array, f'{path}: {image_key}')
    return images, as_labels(labels, len(images), f'{path}: {label_key}')


def open_npy(path: str) -> np.ndarray:
    """The images uint8 [N,H,W,C] of an .npy file, which stay on the disk."""
    try:
        with open(path, 'rb') as file:
            shape, fortran, descr = read_npy_header(file)
            start = file.tell()
        _check_shape(shape)
        array = np.memmap(path, descr, 'r', start, shape, order='F' if fortran else 'C')
    except LargeImage as error:
        raise UserError(f'{path}: {error}', error.field) from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f'{path} is damaged or no .npy file of images '
                        f'({one_line(error, 100)})') from None
    return as_images(array, path)


def as_images(array: np.ndarray, where: str) -> np.ndarray:
    """uint8 [N,H,W,C] of [N,H,W,C], [N,C,H,W] or gray [N,H,W]; UserError for others."""
    images = array[..., None] if array.ndim == 3 else array
    if images.ndim == 4 and images.shape[3] not in MODES and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in MODES \
            or min(images.shape) < 1:
        raise UserError(f'{where} is {array.dtype} {list(array.shape)} instead of uint8 images '
                        '[N, H, W, 3]')
    return images


def as_labels(labels: np.ndarray | None, count: int, where: str) -> np.ndarray | None:
    """int64 [N] of whole numbers [N] or [N,1], float32 [N,D] of other tables; UserError else."""
    if labels is None:
        return None
    shape = labels.shape
    if shape[:1] == (count,) and len(shape) == 2 and shape[1] > 1 and labels.dtype.kind in 'biuf':
        vectors = np.asarray(labels, np.float32)
        if np.isfinite(vectors).all():
            return vectors
    if shape not in ((count,), (count, 1)) or labels.dtype.kind not in 'iu':
        raise UserError(f'{where} is {labels.dtype} {list(shape)} instead of whole numbers '
                        f'[{count}]')
    labels = np.asarray(labels, dtype=np.int64).reshape(-1)
    if labels.min() < 0:
        raise UserError(f'{where} has the label {labels.min()}; labels count from 0')
    return labels


def _check_shape(shape: tuple):
    if len(shape) == 4:
        check_pixels(shape[2], shape[1])
