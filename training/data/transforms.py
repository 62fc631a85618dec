"""The four rules by which pictures of any size become the images of a data set."""

import functools
import math

import numpy as np
import PIL.Image

from dnnlib.util import UserError

NAMES = ('center-crop', 'center-crop-wide', 'center-crop-dhariwal')


def make_transform(name: str | None, width: int | None = None, height: int | None = None):
    """Function from pixels uint8 [h,w,3] to pixels uint8 [H,W,3], or to None for a picture that the rule rejects.

    It takes many pictures of one size too, [n,h,w,3], which is faster for small ones; the pixels are the same. A picture
    may also be one of Pillow's, of mode RGB.

    name:   None          Lanczos to width x height, aspect ratio not kept; a side that is None keeps its length.
            'center-crop' the largest centred square, Lanczos to width x height.
            'center-crop-wide' a centred full-width band, Lanczos to width x height, in the middle of a black
                          width x width square; pictures that are too small are rejected.
            'center-crop-dhariwal' halving with a box filter while both sides are at least twice the target, bicubic to
                          the target, centred square: what ADM and later work do to ImageNet.

    Raises UserError for an unknown name or a size that the rule cannot make.
    """
    if name is None:
        return lambda pixels: _resize(np.asarray(pixels), width, height)
    if name not in NAMES:
        raise UserError(f'--transform={name} is unknown; there are {", ".join(NAMES)}')
    if not width or not height:
        raise UserError(f'--transform={name} needs --resolution=WIDTHxHEIGHT')
    if name == 'center-crop':
        return lambda pixels: _resize(_square(np.asarray(pixels)), width, height)
    if name == 'center-crop-wide':
        if height > width:
            raise UserError(f'--transform={name} makes bands that are not higher than wide; '
                            f'--resolution={width}x{height} is')
        return lambda pixels: _wide(np.asarray(pixels), width, height)
    if width != height:
        raise UserError(f'--transform={name} makes squares; --resolution={width}x{height} is none')
    return lambda pixels: _dhariwal(pixels, width)


# ---------------------------------------------------------------------------------------------------------------------
# Resampling. Pillow is the reference: an output pixel is a weighted sum of input pixels, along rows, then along columns,
# with weights in units of 2^-22, rounded after each of the two. For many small pictures the sums are matrix products.

_BOX, _BICUBIC, _LANCZOS = PIL.Image.Resampling.BOX, PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.LANCZOS
_SMALL = 64  # sides up to which the products, which also multiply the zeros among the weights, are the faster way


def _bicubic(x):
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _sinc(x):
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


_KERNELS = {  # (function, half of its width)
    _BOX: (lambda x: float(-0.5 < x <= 0.5), 0.5),
    _BICUBIC: (_bicubic, 2.0),
    _LANCZOS: (lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0, 3.0),
}


def _weights(length, target, method):
    """Weights [length, target] of a resampled row, whole multiples of 2^-22."""
    kernel, reach = _KERNELS[method]
    scale = length / target
    stretch = max(scale, 1.0)
    weights = np.zeros((length, target))
    for out in range(target):
        center = (out + 0.5) * scale
        first = max(int(center - reach * stretch + 0.5), 0)
        last = min(int(center + reach * stretch + 0.5), length)
        taps = np.array([kernel((i - center + 0.5) * (1 / stretch)) for i in range(first, last)])
        total = 0.0
        for tap in taps:  # in the order in which Pillow adds them
            total += tap
        taps = taps / total * (1 << 22)
        weights[first:last, out] = np.trunc(taps + np.where(taps < 0, -0.5, 0.5)) / (1 << 22)
    return weights


def _products(pixels, width, height, method):
    """`pixels` [n,h,w,3] resampled by matrix products. All sums are exact in double precision."""
    n, h, w, channels = pixels.shape
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float64, order='C')
    if w != width:
        planes = _rounded(planes.reshape(-1, w) @ _weights_of(w, width, method)).reshape(n, channels, h, width)
    if h != height:
        planes = _rounded(_weights_of(h, height, method).T @ planes)
    return planes.astype(np.uint8).transpose(0, 2, 3, 1)


def _rounded(sums):
    sums += 0.5
    np.floor(sums, out=sums)
    return sums.clip(0, 255, out=sums)


_weights_of = functools.lru_cache(maxsize=64)(_weights)


@functools.lru_cache(maxsize=64)
def _products_are_pillows(w, h, width, height, method):
    """Whether the products give Pillow's very pixels; a Pillow that rounds otherwise is used for all pictures."""
    noise = np.random.RandomState(0).randint(0, 256, (4, h, w, 3), dtype=np.uint8)
    noise[1] = noise[1] // 128 * 255
    return np.array_equal(_products(noise, width, height, method), [_pillow(x, width, height, method) for x in noise])


def _pillow(pixels, width, height, method):
    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), method))


def _resample(pixels, width, height, method):
    if pixels.ndim == 3:
        return _pillow(pixels, width, height, method)
    if max(pixels.shape[1:3]) <= _SMALL and _products_are_pillows(*pixels.shape[2:0:-1], width, height, method):
        planes = np.empty((len(pixels), pixels.shape[3], height, width), dtype=np.uint8)
        images = planes.transpose(0, 2, 3, 1)
        for i in range(0, len(pixels), 16):  # the sums of so many stay in the cache
            images[i:i + 16] = _products(pixels[i:i + 16], width, height, method)
        return images
    return np.stack([_pillow(image, width, height, method) for image in pixels])


# ---------------------------------------------------------------------------------------------------------------------
# The rules.

def _resize(pixels, width, height):
    width, height = width or pixels.shape[-2], height or pixels.shape[-3]
    if pixels.shape[-3:-1] == (height, width):
        return pixels
    return _resample(pixels, width, height, _LANCZOS)


def _square(pixels):
    height, width = pixels.shape[-3:-1]
    side = min(height, width)
    return pixels[..., (height - side) // 2:(height + side) // 2, (width - side) // 2:(width + side) // 2, :]


def _wide(pixels, width, height):
    # The band's height is computed in output pixels but cut in input pixels, as the reference does: of large pictures
    # only a thin band survives.
    h, w = pixels.shape[-3:-1]
    band = round(width * h / w)
    if w < width or band < height:
        return None
    rows = pixels[..., (h - band) // 2:(h + band) // 2, :, :]
    canvas = np.zeros((*pixels.shape[:-3], width, width, 3), dtype=np.uint8)
    top = (width - height) // 2
    canvas[..., top:top + height, :, :] = _resize(rows, width, height)
    return canvas


def _dhariwal(pixels, side):
    if isinstance(pixels, np.ndarray) and pixels.ndim == 4:
        return _dhariwal_many(pixels, side)
    image = PIL.Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def _dhariwal_many(pixels, side):
    while min(pixels.shape[1:3]) >= 2 * side:
        pixels = _resample(pixels, pixels.shape[2] // 2, pixels.shape[1] // 2, _BOX)
    h, w = pixels.shape[1:3]
    scale = side / min(h, w)
    width, height = round(w * scale), round(h * scale)
    if (h, w) != (height, width):
        pixels = _resample(pixels, width, height, _BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return pixels[:, top:top + side, left:left + side]
