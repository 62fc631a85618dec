"""Images as bytes: decoding what people have, and encoding PNG that needs no compression."""

import contextlib
import functools
import importlib
import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps

from dnnlib import budget

try:
    import pyspng
except ImportError:  # Pillow decodes the same files, several times slower
    pyspng = None

EXTENSIONS = frozenset('.png .jpg .jpeg .jpe .jfif .bmp .dib .gif .tif .tiff .webp '
                       '.ppm .pgm .pbm .pnm .tga .jp2 .j2k .qoi'.split())
# Read only if their format is among Pillow's, as it is with the package installed.
_PLUGINS = {'.heic': ('HEIF', 'pillow-heif'), '.heif': ('HEIF', 'pillow-heif'),
            '.hif': ('HEIF', 'pillow-heif'), '.avif': ('AVIF', 'pillow-avif-plugin')}

# Named, so that no file content reaches Pillow's other plugins (EPS, for one, starts Ghostscript).
_FORMATS = ('PNG JPEG MPO BMP DIB GIF TIFF WEBP PPM TGA JPEG2000 AVIF HEIF QOI').split()

# Bytes in memory that a picture may take: some for any file, and some for each byte of it.
_MEMORY, _FACTOR = 768 << 20, 20
# Bytes of a pixel while it is decoded, and with transparency; the packed lines of BMP are filled
# up in Python, byte by byte.
_PIXEL, _BLENDED, _FILLED = 7, 20, 70
_MAX_SCANS = 100                # of a JPEG, each of which goes through all pixels; usual are ten

# Pillow's name of 8-bit pixels of so many channels, and the type of colour of their PNG.
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
_PNG_COLORS = {1: 0, 3: 2, 4: 6}
_GRAY = ('1', 'L', 'LA', 'La', 'I', 'I;16', 'I;16L', 'I;16B', 'I;16N', 'F')
_LUMA = np.array([19595, 38470, 7471])  # of red, green and blue, in 2^-16, as Pillow has it

_NO_MEMORY = 'more pixels than there is memory for'
_SIGNATURE = b'\x89PNG\r\n\x1a\n'

PIL.Image.MAX_IMAGE_PIXELS = None       # `check_pixels` knows what is allowed


class BadImage(Exception):
    """A file that cannot be used as an image; the message says why, without the file's name."""

    field = None


class LargeImage(BadImage):
    """A picture of more pixels than are allowed, as far as its header tells."""

    field = 'max_pixels'


def is_image_name(name: str) -> bool:
    dot = name.rfind('.')
    ending = name[dot:].lower()
    return dot >= 0 and (ending in EXTENSIONS or ending in _PLUGINS and not missing_plugin(ending))


def missing_plugin(ending: str) -> str | None:
    """The package that must be installed before files '.heic' or '.AVIF' are read, if any."""
    image_format, package = _PLUGINS.get(ending.lower(), (None, None))
    return None if image_format in _pillow_formats() else package


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b''.join([struct.pack('>I', len(data)), kind, data, struct.pack('>I', checksum)])


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 pixels [H,W,3] (or [H,W,1] or [H,W] gray, or [H,W,4] with alpha),
    uncompressed: fast to write and to read.
    """
    return encode_pngs(pixels[None])[0].tobytes()


def encode_pngs(pixels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The same of images of one size, [n,H,W,C] or [n,H,W].

    Returns the files, uint8 [n,bytes], and their CRC-32.
    All that does not depend on the pixels is laid out once for all images.
    """
    count, height, width = pixels.shape[:3]
    rows = np.zeros((count, height, 1 + pixels[0, 0].size), dtype=np.uint8)  # of filter type 0
    channels = pixels[0, 0, 0].size
    for channel in range(channels):  # faster than all at once, if in memory they are planes
        rows[:, :, 1 + channel::channels] = pixels.reshape(count, height, width, -1)[..., channel]
    raw = rows.reshape(count, -1)

    blocks = []  # a stream of zlib in uncompressed blocks
    for start in range(0, raw.shape[1], 0xFFFF):
        block = raw[:, start:start + 0xFFFF]
        length = block.shape[1]
        is_last = start + length == raw.shape[1]
        blocks += [_repeated(struct.pack('<BHH', is_last, length, length ^ 0xFFFF), count), block]
    size = 6 + sum(block.shape[1] for block in blocks)

    header = struct.pack('>IIBBBBB', width, height, 8, _PNG_COLORS[channels], 0, 0, 0)
    head = _SIGNATURE + _chunk(b'IHDR', header) + struct.pack('>I', size)
    tail = bytes(4) + _chunk(b'IEND', b'')
    files = np.hstack([_repeated(head + b'IDAT\x78\x01', count), *blocks,
                       _checksums(zlib.adler32, raw), _repeated(tail, count)])
    body = files[:, len(head):-len(tail)]
    crcs = _checksums(zlib.crc32, body)
    files[:, -len(tail):][:, :4] = crcs
    # That of head + body differs from that of the body by the same bits in all files.
    difference = zlib.crc32(body[0], zlib.crc32(head)) ^ zlib.crc32(body[0])
    return files, [zlib.crc32(end, crc ^ difference) for end, crc in zip(
        files[:, -len(tail):], crcs.view('>u4')[:, 0].tolist(), strict=True)]


def _repeated(data: bytes, count: int) -> np.ndarray:
    return np.broadcast_to(np.frombuffer(data, np.uint8), (count, len(data)))


def _checksums(function, rows: np.ndarray) -> np.ndarray:
    """zlib's checksum of each row, big-endian: uint8 [n,4]."""
    return np.fromiter(map(function, rows), '>u4', len(rows)).view(np.uint8).reshape(-1, 4)


def _to_8_bits(image: PIL.Image.Image, bits: int = 16) -> PIL.Image.Image:
    """Any mode as L or RGB, or with transparency LA or RGBA; of gray values of more than 8 bits,
    which have `bits`, the upper 8.
    """
    is_gray = image.mode in _GRAY
    if image.mode in ('I', 'I;16', 'I;16L', 'I;16B', 'I;16N'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >> bits:
            raise BadImage(f'gray values up to {values.max()}, beyond {bits} bits')
        image = PIL.Image.fromarray((values.astype(np.uint32) >> bits - 8).astype(np.uint8))
    elif image.mode == 'F':
        raise BadImage('floating-point pixels, which have no agreed range')
    mode = ('L' if is_gray else 'RGB') + 'A' * image.has_transparency_data
    return image if image.mode == mode else image.convert(mode)  # convert would copy


def with_channels(picture, channels: int):
    """A picture (of Pillow's, or uint8 [...,C]) with 1 channel (gray: the luma of colours), 3
    (RGB, gray repeated) or 4 (with alpha, opaque if it had none). Without alpha, what is
    transparent lies on white.
    """
    if isinstance(picture, np.ndarray):
        if picture.shape[-1] == channels:
            return picture
        if picture.shape[-1] == 4:
            picture = _on_white(picture[..., :3].copy(), picture[..., 3:])
        if channels == 1:
            return (picture @ _LUMA + (1 << 15) >> 16).astype(np.uint8)[..., None]
        picture = np.broadcast_to(picture, (*picture.shape[:-1], 3))
        opaque = np.full((*picture.shape[:-1], channels - 3), 255, np.uint8)
        return np.concatenate([picture, opaque], axis=-1)
    if picture.mode.endswith('A') and channels != 4:
        picture = picture.convert('RGBA')
        page = PIL.Image.new('RGBA', picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(page, picture)
    return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])


def has_colors(picture) -> bool:
    """Whether a picture (see `with_channels`) has more than one channel, but for alpha."""
    if isinstance(picture, np.ndarray):
        return picture.shape[-1] > 1
    return picture.mode not in _GRAY


def is_transparent(picture) -> bool:
    """Whether some pixel of a picture (see `with_channels`) is not opaque."""
    if isinstance(picture, np.ndarray):
        return picture.shape[-1] == 4 and picture[..., 3].min() < 255
    return picture.mode.endswith('A') and picture.getextrema()[-1][0] < 255


def as_picture(pixels: np.ndarray) -> PIL.Image.Image:
    """Pixels uint8 [H,W,C] as one of Pillow's."""
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def as_array(picture) -> np.ndarray:
    """Pixels uint8 [H,W,C] of a picture."""
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def as_rgb(images):
    """Images uint8 [N,C,H,W], an array or tensor, with three channels: gray repeated, what is
    transparent on white.
    """
    channels = images.shape[1]
    if channels == 3:
        return images
    rgb = images[:, [0, 0, 0] if channels == 1 else [0, 1, 2]]
    return rgb if channels == 1 else _on_white(rgb, images[:, 3:])


def _on_white(rgb, alpha):
    rgb[:] = 255.5 - (255.0 - rgb) * (alpha / 255.0)
    return rgb


def decode_image(data: bytes, channels: int = 3) -> np.ndarray:
    """Pixels uint8 [H,W,C] of an image file's bytes, turned as its EXIF orientation says.

    Palette, CMYK, gray, 16-bit and transparent images get so many channels (`with_channels`).
    Raises BadImage for what is no complete image, LargeImage for one of more pixels than are
    allowed.
    """
    return as_array(with_channels(decode_picture(data), channels))


def is_gray(data: bytes) -> bool:
    """Whether the header of an image file says that it has no colours; also of what is no image:
    its decoding will tell.
    """
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with PIL.Image.open(io.BytesIO(data), formats=_pillow_formats()) as image:
            return image.mode in _GRAY
    return True


def decode_picture(data: bytes, bits: int = 16) -> np.ndarray | PIL.Image.Image:
    """The picture with the channels of its file: uint8 [H,W,C], or in Pillow's memory (L, LA,
    RGB or RGBA) if Pillow decoded it: resampling saves two copies.

    `bits` are those of the values of gray pictures in files of 16 bits, e.g. 12.
    """
    if pyspng is not None and _is_plain_png(data):
        check_pixels(*struct.unpack_from('>II', data, 16), len(data),
                     _BLENDED if data[25] == 6 else _PIXEL)
        try:
            return as_array(pyspng.load(data))
        except RuntimeError as error:
            raise BadImage(f'damaged PNG ({error})') from None
        except MemoryError:
            raise BadImage(_NO_MEMORY) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # large or oddly tagged: they decode, or they raise
            with PIL.Image.open(io.BytesIO(data), formats=_pillow_formats()) as image:
                _check_cost(image, data)
                is_deep = bool(image.tile) and ';16' in str(image.tile[0][3])
                if bits < 16 and is_deep and image.mode in ('RGB', 'RGBA', 'LA'):
                    raise BadImage('colours of 16 bits, of which the upper 8 alone are read; '
                                   'bits are those of gray pictures')
                image.load()
                PIL.ImageOps.exif_transpose(image, in_place=True)
                return _to_8_bits(image, bits)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage(_NO_MEMORY) from None
    except PIL.UnidentifiedImageError:
        if data[4:8] == b'ftyp':
            raise BadImage('a picture of HEIF, AVIF or the like; install a plug-in for Pillow: '
                           'pip install pillow-heif') from None
        raise BadImage('not an image, or of an unknown format') from None
    except Exception as error:  # of damaged files: anything from OSError to struct.error
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise BadImage(f'damaged image ({reason})') from None


def _check_cost(image: PIL.Image.Image, data: bytes):
    """Raises BadImage for a picture, not yet decoded, of many more pixels than its file can have,
    or that takes long to decode.
    """
    decoder = image.tile[0][0] if image.tile else None
    cost = _FILLED if decoder == 'bmp_rle' else _BLENDED if image.has_transparency_data else _PIXEL
    check_pixels(*image.size, len(data), cost)
    if decoder == 'jpeg' and data.count(b'\xff\xda') > _MAX_SCANS:
        raise BadImage(f'a JPEG in more than {_MAX_SCANS} passes; save it anew')


def check_pixels(width: int, height: int, size: int | None = None, cost: int = _PIXEL):
    """Raises LargeImage for more pixels than the user allows, else than are decoded of a picture,
    fewer of a file of few bytes (`size`).
    """
    most = budget.max_pixels()
    if most is None:
        of_size = budget.MAX_PIXELS if size is None else (_MEMORY + _FACTOR * size) // cost
        most = min(budget.MAX_PIXELS, of_size)
    if width * height > most:
        raise LargeImage(f'{width} x {height} = {width * height} pixels, and at most {most} are '
                         'read of such a file; allow as many if the picture is sound, or make it '
                         'smaller')


@functools.cache
def _pillow_formats() -> tuple:
    PIL.Image.init()
    for module in ('pillow_heif.HeifImagePlugin', 'pillow_avif'):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


def _is_plain_png(data: bytes) -> bool:
    """Whether this is a PNG for pyspng: 8-bit RGB, RGBA or gray, not interlaced, and only pixels.

    Chunks that may change pixels (tRNS, eXIf) are left to Pillow. pyspng does not look at
    checksums, so those of the chunks must be right; of a damaged file, Pillow says what is wrong.
    """
    if not data.startswith(_SIGNATURE) or data[12:16] != b'IHDR' or len(data) < 33:
        return False
    width, height, depth, color, *methods = struct.unpack_from('>IIBBBBB', data, 16)
    if depth != 8 or color not in _PNG_COLORS.values() or any(methods):
        return False
    view = memoryview(data)
    start = len(_SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, start)
        end = start + 8 + length
        if zlib.crc32(view[start + 4:end]).to_bytes(4, 'big') != data[end:end + 4]:
            return False
        if kind not in (b'IHDR', b'IDAT'):
            return kind == b'IEND'
        start = end + 4
    return False
