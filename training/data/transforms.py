"""The four rules by which pictures of any size become the images of a data set."""

import numpy as np
import PIL.Image

from dnnlib.util import UserError

_BOX = PIL.Image.Resampling.BOX
_BICUBIC = PIL.Image.Resampling.BICUBIC
_LANCZOS = PIL.Image.Resampling.LANCZOS


def make_transform(name: str | None, width: int | None = None, height: int | None = None):
    """Function from a picture to pixels uint8 [H,W,3], or to None if the rule rejects the picture.

    A picture is an array uint8 [h,w,3] or one of Pillow's, of mode RGB.

    name:   None          Lanczos to width x height, aspect ratio not kept; a side that is None
                          keeps its length.
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
        return np.asarray

    def transform(picture):
        if isinstance(picture, np.ndarray):
            picture = PIL.Image.fromarray(picture)
        picture = _RULES[name](picture, width, height)
        return None if picture is None else np.asarray(picture)
    return transform


def _check(name, width, height):
    if name not in NAMES:
        raise UserError(f'is unknown; there are {", ".join(NAMES)}', field='transform', value=name)
    if not width or not height:
        raise UserError('needs a resolution, WIDTHxHEIGHT', field='transform', value=name)
    if name == 'center-crop-wide' and height > width:
        raise UserError(f'makes bands that are not higher than wide; {width}x{height} is',
                        field='transform', value=name)
    if name == 'center-crop-dhariwal' and width != height:
        raise UserError(f'makes squares; {width}x{height} is none', field='transform', value=name)


def _resize(picture, width, height):
    size = (width or picture.width, height or picture.height)
    return picture if picture.size == size else picture.resize(size, _LANCZOS)


def resize_stack(pixels: np.ndarray, side: int) -> np.ndarray:
    """The rule None for square images uint8 [n,h,h,3] at once, much faster for small ones.

    The pixels are the same: Pillow resamples the rows of a square image, then its columns, and each
    by itself, so that the images can lie below each other, then side by side.
    """
    n, h, _, _ = pixels.shape
    column = PIL.Image.fromarray(pixels.reshape(n * h, h, 3)).resize((side, n * h), _LANCZOS)
    pixels = np.asarray(column).reshape(n, h, side, 3).transpose(1, 0, 2, 3)
    row = PIL.Image.fromarray(pixels.reshape(h, n * side, 3)).resize((n * side, side), _LANCZOS)
    return np.asarray(row).reshape(side, n, side, 3).transpose(1, 0, 2, 3)


def _crop_square(picture, side):
    left = (picture.width - side) // 2
    top = (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _center_crop(picture, width, height):
    return _resize(_crop_square(picture, min(picture.size)), width, height)


def _center_crop_wide(picture, width, height):
    # The band's height is computed in output pixels but cut in input pixels, as the reference
    # does: of large pictures only a thin band survives.
    band = round(width * picture.height / picture.width)
    if picture.width < width or band < height:
        return None
    rows = (picture.height - band) // 2, (picture.height + band) // 2
    canvas = PIL.Image.new('RGB', (width, width))
    strip = picture.crop((0, rows[0], picture.width, rows[1]))
    canvas.paste(_resize(strip, width, height), (0, (width - height) // 2))
    return canvas


def _center_crop_dhariwal(picture, side, _):
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), _BOX)
    scale = side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, _BICUBIC)
    return _crop_square(picture, side)


_RULES = {
    None: _resize,
    'center-crop': _center_crop,
    'center-crop-wide': _center_crop_wide,
    'center-crop-dhariwal': _center_crop_dhariwal,
}
NAMES = tuple(name for name in _RULES if name)
