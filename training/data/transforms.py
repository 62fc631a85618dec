"""The four rules by which pictures of any size become the images of a data set."""

import numpy as np
import PIL.Image

from dnnlib.util import UserError

NAMES = ('center-crop', 'center-crop-wide', 'center-crop-dhariwal')


def make_transform(name: str | None, width: int | None = None, height: int | None = None):
    """Function from pixels uint8 [h,w,3] to pixels uint8 [H,W,3], or to None for a picture that the rule rejects.

    name:   None          Lanczos to width x height, aspect ratio not kept; a side that is None keeps its length.
            'center-crop' the largest centred square, Lanczos to width x height.
            'center-crop-wide' a centred full-width band, Lanczos to width x height, in the middle of a black
                          width x width square; pictures that are too small are rejected.
            'center-crop-dhariwal' halving with a box filter while both sides are at least twice the target, bicubic to
                          the target, centred square: what ADM and later work do to ImageNet.

    Raises UserError for an unknown name or a size that the rule cannot make.
    """
    if name is None:
        return lambda pixels: _resize(pixels, width or pixels.shape[1], height or pixels.shape[0])
    if name not in NAMES:
        raise UserError(f'--transform={name} is unknown; there are {", ".join(NAMES)}')
    if not width or not height:
        raise UserError(f'--transform={name} needs --resolution=WIDTHxHEIGHT')
    if name == 'center-crop':
        return lambda pixels: _resize(_square(pixels), width, height)
    if name == 'center-crop-wide':
        if height > width:
            raise UserError(f'--transform={name} makes bands that are not higher than wide; '
                            f'--resolution={width}x{height} is')
        return lambda pixels: _wide(pixels, width, height)
    if width != height:
        raise UserError(f'--transform={name} makes squares; --resolution={width}x{height} is none')
    return lambda pixels: _dhariwal(pixels, width)


def _resample(pixels, width, height, method):
    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), method))


def _resize(pixels, width, height):
    if pixels.shape[:2] == (height, width):
        return pixels
    return _resample(pixels, width, height, PIL.Image.Resampling.LANCZOS)


def _square(pixels):
    height, width = pixels.shape[:2]
    side = min(height, width)
    return pixels[(height - side) // 2:(height + side) // 2, (width - side) // 2:(width + side) // 2]


def _wide(pixels, width, height):
    # The band's height is computed in output pixels but cut in input pixels, as the reference does: of large pictures
    # only a thin band survives.
    band = round(width * pixels.shape[0] / pixels.shape[1])
    if pixels.shape[1] < width or band < height:
        return None
    rows = pixels[(pixels.shape[0] - band) // 2:(pixels.shape[0] + band) // 2]
    canvas = np.zeros((width, width, 3), dtype=np.uint8)
    top = (width - height) // 2
    canvas[top:top + height] = _resize(rows, width, height)
    return canvas


def _dhariwal(pixels, side):
    image = PIL.Image.fromarray(pixels)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
