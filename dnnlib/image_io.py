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
_STORED = 0xFFFF  # bytes of an uncompressed block of zlib at most


class BadImage(Exception):
    """A file that cannot be used as a picture; the message says why, without the file's name."""


def is_image_name(name: str) -> bool:
    dot = name.rfind('.')
    return dot >= 0 and name[dot:].lower() in EXTENSIONS


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(data, zlib.crc32(kind)))


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of uint8 pixels [H,W,3] (or [H,W] gray), uncompressed: fast to write and to read, inside zips too."""
    return encode_pngs(pixels[None]).tobytes()


def encode_pngs(pixels: np.ndarray) -> np.ndarray:
    """PNG files of uint8 images [n,H,W,3] (or [n,H,W] gray), uncompressed, one in each row of the result, uint8 [n,bytes].

    All that does not depend on the pixels is laid out once for all images; checksums are what is left for each.
    """
    count, height, width = pixels.shape[:3]
    row = 1 + pixels.shape[2] * (3 if pixels.ndim == 4 else 1)  # each row starts with filter type 0
    size = height * row
    starts = range(0, size, _STORED)
    header = struct.pack('>IIBBBBB', width, height, 8, 2 if pixels.ndim == 4 else 0, 0, 0, 0)
    head = _SIGNATURE + _chunk(b'IHDR', header) + struct.pack('>I', 2 + 5 * len(starts) + size + 4)
    begin = len(head)  # of what the chunk's checksum covers: its name and the zlib stream of stored blocks
    end = begin + 4 + 2 + 5 * len(starts) + size + 4
    tail = _chunk(b'IEND', b'')
    files = np.empty((count, end + 4 + len(tail)), dtype=np.uint8)
    files[:, :begin] = np.frombuffer(head, np.uint8)
    files[:, begin:begin + 6] = np.frombuffer(b'IDAT\x78\x01', np.uint8)
    files[:, end + 4:] = np.frombuffer(tail, np.uint8)
    place = begin + 6
    raw = files[:, place + 5:place + 5 + size] if len(starts) == 1 else np.empty((count, size), dtype=np.uint8)
    rows = raw.reshape(count, height, row)  # a view: of one block, pixels are written in place
    rows[:, :, 0] = 0
    if pixels.flags.c_contiguous or pixels.ndim == 3:
        rows[:, :, 1:] = pixels.reshape(count, height, -1)
    else:  # most often planes of colours, which numpy turns over faster one by one
        for channel in range(3):
            rows[:, :, 1 + channel::3] = pixels[..., channel]
    for start in starts:
        length = min(_STORED, size - start)
        block = struct.pack('<BHH', start + length == size, length, length ^ 0xFFFF)
        files[:, place:place + 5] = np.frombuffer(block, np.uint8)
        if len(starts) > 1:
            files[:, place + 5:place + 5 + length] = raw[:, start:start + length]
        place += 5 + length
    sums = np.fromiter(map(zlib.adler32, raw), dtype='>u4', count=count)
    files[:, end - 4:end] = sums.view(np.uint8).reshape(count, 4)
    sums = np.fromiter(map(zlib.crc32, files[:, begin:end]), dtype='>u4', count=count)
    files[:, end:end + 4] = sums.view(np.uint8).reshape(count, 4)
    return files


def _header(data: bytes) -> tuple | None:
    """(width, height, channels) of a PNG of 8-bit RGB or gray that is not interlaced; None for all others."""
    if data[:8] != _SIGNATURE or data[12:16] != b'IHDR' or len(data) < 33:
        return None
    width, height, depth, color, compression, filters, interlace = struct.unpack_from('>IIBBBBB', data, 16)
    if depth != 8 or color not in (0, 2) or compression or filters or interlace:
        return None
    return width, height, 3 if color == 2 else 1


def _compressed(data: bytes) -> bytes | None:
    """The zlib stream of a PNG that has nothing but IHDR, IDAT and IEND; None for all others."""
    place, parts, kind = 33, [], b''
    while place + 12 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, place)
        if kind != b'IDAT':
            break
        parts.append(data[place + 8:place + 8 + length])
        place += 12 + length
    if kind != b'IEND' or not parts:
        return None
    return parts[0] if len(parts) == 1 else b''.join(parts)


def is_small_png(data: bytes, side: int = 64) -> bool:
    """True if `decode_pngs` is the way to read this file and others like it."""
    header = _header(data)
    return header is not None and 0 < header[0] <= side and 0 < header[1] <= side


def decode_pngs(files: list[bytes]) -> np.ndarray | None:
    """Pixels uint8 [n,H,W,3] of PNG files that are alike: of one size, 8-bit RGB or gray, whole, and without anything that
    changes pixels. None if they are not; then `decode_image` says what each of them is.

    For pictures as small as CIFAR's, opening a file in an image library takes longer than decoding it.
    """
    header = _header(files[0])
    if header is None:
        return None
    width, height, channels = header
    row = 1 + width * channels
    rows = np.empty((len(files), height, row), dtype=np.uint8)
    for image, data in zip(rows, files, strict=True):
        stream = _compressed(data) if data[:33] == files[0][:33] else None
        if stream is None:
            return None
        try:
            raw = zlib.decompressobj().decompress(stream, height * row + 1)
        except zlib.error:
            return None
        if len(raw) != height * row:
            return None
        image[:] = np.frombuffer(raw, np.uint8).reshape(height, row)
    if rows[:, :, 0].any():
        if rows[:, :, 0].max() > _PAETH:
            return None
        pixels = _unfilter(rows, channels)
    else:
        pixels = rows[:, :, 1:].reshape(len(files), height, width, channels)
    return pixels if channels == 3 else pixels.repeat(3, axis=3)


_SUB, _UP, _AVERAGE, _PAETH = 1, 2, 3, 4  # filters of PNG: what a byte has less than its neighbours promise


def _unfilter(rows: np.ndarray, channels: int) -> np.ndarray:
    """Pixels uint8 [n,H,W,C] of the filtered rows of n PNG pictures, uint8 [n,H,1+W*C].

    A byte depends on a (left of it), b (above) and c (above left), so that all bytes on a diagonal of all pictures can be
    undone together. Everything is modulo 256 in uint8.
    """
    count, height, row = rows.shape
    width = (row - 1) // channels
    filters, *values = np.ascontiguousarray(rows.transpose(2, 1, 0))  # [H,n] each
    # Diagonal by diagonal, with zeros around the pictures: the byte at (y, x) is at [x + y + 2, y + 1].
    lattice = np.zeros((width + height + 1, height + 1, channels, count), dtype=np.uint8)
    of_column = np.array(values).reshape(width, channels, height, count)
    for y in range(height):
        lattice[y + 2:y + 2 + width, y + 1] = of_column[:, :, y]
    # a, b, c count where the filter knows them; Paeth of a alone is a, and of b alone b.
    filters = filters[:, None].repeat(channels, axis=1)
    average, knows_c = filters == _AVERAGE, filters == _PAETH
    knows_a, knows_b = (np.where(knows_c | average | (filters == kind), 255, 0).astype(np.uint8) for kind in (_SUB, _UP))
    knows_c, averages = np.where(knows_c, 255, 0).astype(np.uint8), average.any()
    space = np.empty((5, height, channels, count), dtype=np.uint8)
    for diagonal in range(height + width - 1):
        first, last = max(0, diagonal - width + 1), min(height, diagonal + 1)
        a, b, c, low, high = space[:, :last - first]
        np.bitwise_and(lattice[diagonal + 1, first + 1:last + 1], knows_a[first:last], out=a)
        np.bitwise_and(lattice[diagonal + 1, first:last], knows_b[first:last], out=b)
        np.bitwise_and(lattice[diagonal, first:last], knows_c[first:last], out=c)
        here = lattice[diagonal + 2, first + 1:last + 1]
        if averages:
            chosen = average[first:last]
            here += ((a >> 1) + (b >> 1) + (a & b & 1)) * chosen
            a *= ~chosen
            b *= ~chosen
        here += _paeth(a, b, c, low, high)
    pixels = np.empty((height, width, channels, count), dtype=np.uint8)
    for y in range(height):
        pixels[y] = lattice[y + 2:y + 2 + width, y + 1]
    return np.ascontiguousarray(pixels.reshape(-1, count).T).reshape(count, height, width, channels)


def _paeth(a, b, c, low, high):
    """The one of a, b, c that is nearest to a + b - c (ties: a, b, c), in place of c; `low` and `high` are scratch.

    If c is not between a and b, that is the farther of these from c. So c may be moved between them first; then a + b - c is as
    far above the lower one as c is below the higher one.
    """
    np.minimum(a, b, out=low)
    np.maximum(a, b, out=high)
    np.maximum(c, low, out=c)
    np.minimum(c, high, out=c)
    to_high, to_low = np.subtract(high, c, out=high), np.subtract(c, low, out=low)
    is_low = np.greater_equal(np.right_shift(to_low, 1, out=a), to_high, out=a.view(bool))
    is_high = np.greater_equal(np.right_shift(to_high, 1, out=b), to_low, out=b.view(bool))
    c -= np.multiply(to_low, is_low.view(np.uint8), out=to_low)
    c += np.multiply(to_high, is_high.view(np.uint8), out=to_high)
    return c


def _decode_plain_png(data: bytes) -> np.ndarray | None:
    """Pixels of a PNG of 8-bit RGB or gray without filters, as `encode_png` writes it; None for all others."""
    header, stream = _header(data), None
    if header is not None:
        stream = _compressed(data)
    if stream is None:
        return None
    width, height, channels = header
    size = height * (1 + width * channels)
    try:
        raw = zlib.decompressobj().decompress(stream, size)
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
    return image if image.mode == 'RGB' else image.convert('RGB')  # convert would copy


def decode_image(data: bytes) -> np.ndarray:
    """Pixels uint8 [H,W,3] of an image file's bytes, turned as its EXIF orientation says.

    Palette, CMYK, gray, 16-bit and transparent pictures become RGB. Raises BadImage for what is no whole picture.
    """
    return np.asarray(decode_picture(data))


def decode_picture(data: bytes) -> np.ndarray | PIL.Image.Image:
    """The same, but left in Pillow's memory if Pillow has decoded it: what resamples it saves two copies."""
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
                PIL.ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage('not an image, or of an unknown format') from None
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        raise BadImage(f'damaged image ({" ".join(str(error).split()) or type(error).__name__})') from None
