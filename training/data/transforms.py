"""The rules by which pictures of any size become the images of a data set."""

import functools
import math

import numpy as np
import PIL.Image

from dnnlib.image_io import as_array, as_picture
from dnnlib.util import UserError

_BOX = PIL.Image.Resampling.BOX
_BICUBIC = PIL.Image.Resampling.BICUBIC
_LANCZOS = PIL.Image.Resampling.LANCZOS
_SMALL = 64  # sides up to which matrix products are the faster way to resample


def make_transform(name: str | None, width: int | None = None, height: int | None = None):
    """Function from a picture to pixels uint8 [H,W,C], or to None if the rule rejects the picture.

    A picture is an array uint8 [h,w,C] or one of Pillow's, of mode L, RGB or RGBA.

    name:   None          Lanczos to width x height, aspect ratio not kept; a side that is None
                          keeps its length.
            'stretch'     the same, but both sides are needed: for those who want that.
            'crop'        the largest centred part of that shape, Lanczos to width x height.
            'center-crop' the largest centred square, Lanczos to width x height.
            'center-crop-wide' a centred full-width band, Lanczos to width x height, in the middle
                          of a black width x width square; too small pictures are rejected.
            'center-crop-dhariwal' halving with a box filter while both sides are at least twice
                          the target, bicubic to the target, centred square: what ADM and later
                          work do to ImageNet.

    Raises UserError for an unknown name or a size that the rule cannot make.
    """
    if name is not None:
        _check(name, width, height)
    elif not width and not height:
        return as_array

    def transform(picture):
        if isinstance(picture, np.ndarray):
            picture = as_picture(picture)
        picture = _RULES[name](picture, width, height)
        return None if picture is None else as_array(picture)
    return transform


def _check(name, width, height):
    if name not in NAMES:
        text = f'is unknown; there are {", ".join(NAMES)}'
    elif not width or not height:
        text = 'needs a resolution, WIDTHxHEIGHT'
    elif name == 'center-crop-wide' and height > width:
        text = f'makes bands that are not higher than wide; {width}x{height} is'
    elif name == 'center-crop-dhariwal' and width != height:
        text = f'makes squares; {width}x{height} is none'
    else:
        return
    raise UserError(text, field='transform', value=name)


def _resize(picture, width, height):
    size = (width or picture.width, height or picture.height)
    return picture if picture.size == size else picture.resize(size, _LANCZOS)


def resize_stack(pixels: np.ndarray, width: int | None, height: int | None) -> np.ndarray:
    """The rule None for images of one size, uint8 [n,h,w,C], at once: much faster for small ones.

    Pillow's pixels are weighted sums along rows, then along columns, rounded after each. These are
    matrix products here, exact in double precision.
    """
    _, h, w, channels = pixels.shape
    size = (width or w, height or h)
    if size == (w, h):
        return pixels
    if max(h, w) > _SMALL or channels == 4:     # Pillow weights colours by their alpha
        return np.stack([as_array(_resize(as_picture(image), *size)) for image in pixels])
    # The sums of 16 images stay in the cache.
    return np.concatenate([_products(pixels[i:i + 16], *size) for i in range(0, len(pixels), 16)])


def _products(pixels, width, height):
    n, h, w, channels = pixels.shape
    rows = pixels.transpose(0, 3, 1, 2).reshape(-1, w).astype(np.float64)
    rows = _rounded(rows @ _weights(w, width))
    columns = _rounded(_weights(h, height).T @ rows.reshape(n, channels, h, width))
    return columns.astype(np.uint8).transpose(0, 2, 3, 1)


@functools.cache
def _weights(length, target):
    """Weights [length, target] of a resampled row: Pillow has whole multiples of 2^-22."""
    unit = PIL.Image.fromarray(np.eye(length, dtype=np.int32) << 22)
    return np.asarray(unit.resize((target, length), _LANCZOS)) / (1 << 22)


def _rounded(sums):
    sums += 0.5
    np.floor(sums, out=sums)
    return sums.clip(0, 255, out=sums)


def _crop(picture, width, height):
    left = (picture.width - width) // 2
    top = (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _crop_to_shape(picture, width, height):
    scale = min(picture.width / width, picture.height / height)
    part = _crop(picture, round(scale * width), round(scale * height))
    return _resize(part, width, height)


def _center_crop(picture, width, height):
    side = min(picture.size)
    return _resize(_crop(picture, side, side), width, height)


def _center_crop_wide(picture, width, height):
    # The band's height is computed in output pixels but cut in input pixels, as the reference
    # does: of large pictures only a thin band survives.
    band = round(width * picture.height / picture.width)
    if picture.width < width or band < height:
        return None
    rows = (picture.height - band) // 2, (picture.height + band) // 2
    canvas = PIL.Image.new(picture.mode, (width, width), 'black')
    strip = picture.crop((0, rows[0], picture.width, rows[1]))
    canvas.paste(_resize(strip, width, height), (0, (width - height) // 2))
    return canvas


def _center_crop_dhariwal(picture, side, _):
    return _crop(_shrunk(picture, side), side, side)


def _shrunk(picture, side):
    """The picture with a shorter side of `side` pixels."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), _BOX)
    scale = side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, _BICUBIC)


def random_crop(picture, side: int, random: np.random.RandomState) -> np.ndarray:
    """A random square uint8 [side,side,C] of the picture, whose shorter side becomes `side` to
    side / 0.8 pixels, at random: as guided diffusion may do in training.
    """
    if isinstance(picture, np.ndarray):
        picture = as_picture(picture)
    picture = _shrunk(picture, random.randint(side, math.ceil(side / 0.8) + 1))
    left, top = (random.randint(length - side + 1) for length in picture.size)
    return as_array(picture.crop((left, top, left + side, top + side)))


_RULES = {
    None: _resize,
    'stretch': _resize,
    'crop': _crop_to_shape,
    'center-crop': _center_crop,
    'center-crop-wide': _center_crop_wide,
    'center-crop-dhariwal': _center_crop_dhariwal,
}
NAMES = tuple(name for name in _RULES if name)
