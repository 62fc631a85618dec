"""Pictures as bytes: decoding what people have, and encoding PNG that needs no compression."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps

EXTENSIONS = frozenset(
    '.png .jpg .jpeg .jpe .jfif .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .tga .jp2 .j2k .avif .qoi'.split())

# Named, so that no file content reaches Pillow's other plugins (EPS, for one, starts Ghostscript).
_FORMATS = ('PNG', 'JPEG', 'MPO', 'BMP', 'DIB', 'GIF', 'TIFF', 'WEBP', 'PPM', 'TGA', 'JPEG2000', 'AVIF', 'QOI')
_formats = []

_SIGNATURE = b'\x89PNG\r\n\x1a\n'


class BadImage(Exception):
    """A file that cannot be used as a picture; the message says why, without the file's name."""


def is_image_name(name: str) -> bool:
    dot = name.rfind('.')
    return dot >= 0 and name[dot:].lower() in EXTENSIONS


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(data, zlib.crc32(kind)))


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of uint8 pixels [H,W,3] (or [H,W] gray), uncompressed: fast to write and to read, inside zips too."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # each row starts with filter type 0
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack('>IIBBBBB', width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return _SIGNATURE + _chunk(b'IHDR', header) + _chunk(b'IDAT', zlib.compress(rows, 0)) + _chunk(b'IEND', b'')


def _decode_plain_png(data: bytes) -> np.ndarray | None:
    """Pixels of a PNG of 8-bit RGB or gray without filters, as `encode_png` writes it; None for all others."""
    if data[:8] != _SIGNATURE or data[12:16] != b'IHDR':
        return None
    width, height, depth, color, compression, filters, interlace = struct.unpack_from('>IIBBBBB', data, 16)
    if depth != 8 or color not in (0, 2) or compression or filters or interlace:
        return None
    place, parts, kind = 33, [], b''
    while place + 12 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, place)
        if kind != b'IDAT':
            break
        parts.append(data[place + 8:place + 8 + length])
        place += 12 + length
    if kind != b'IEND' or not parts:
        return None
    channels = 3 if color == 2 else 1
    size = height * (1 + width * channels)
    try:
        raw = zlib.decompressobj().decompress(parts[0] if len(parts) == 1 else b''.join(parts), size)
    except zlib.error as error:
        raise BadImage(f'damaged PNG ({error})') from None
    if len(raw) != size:
        raise BadImage('truncated PNG')
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(height, -1)
    if rows[:, 0].any():
        return None
    pixels = rows[:, 1:].reshape(height, width, channels)
    return pixels if channels == 3 else pixels.repeat(3, axis=2)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode as 8-bit RGB: gray repeated, 16 bits to their upper 8, transparency over white."""
    if image.mode in ('I', 'I;16', 'I;16L', 'I;16B', 'I;16N'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage('gray values beyond 16 bits')
        image = PIL.Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == 'F':
        raise BadImage('floating-point pixels, which have no agreed range')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        page = PIL.Image.new('RGBA', image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(page, image)
    return image.convert('RGB')


def decode_image(data: bytes) -> np.ndarray:
    """Pixels uint8 [H,W,3] of an image file's bytes, turned as its EXIF orientation says.

    Palette, CMYK, gray, 16-bit and transparent pictures become RGB. Raises BadImage for what is no whole picture.
    """
    pixels = _decode_plain_png(data)
    if pixels is not None:
        return pixels
    if not _formats:
        PIL.Image.init()
        _formats.extend(name for name in _FORMATS if name in PIL.Image.OPEN)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # large or oddly tagged pictures: they decode, or they raise
            with PIL.Image.open(io.BytesIO(data), formats=_formats) as image:
                image.load()
                image = PIL.ImageOps.exif_transpose(image)
                return np.asarray(_to_rgb(image))
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage('not an image, or of an unknown format') from None
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        raise BadImage(f'damaged image ({" ".join(str(error).split()) or type(error).__name__})') from None
