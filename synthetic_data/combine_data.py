"""All images of all classes in one .npz."""

import errno
import itertools
import os
import sys
import zlib
from typing import BinaryIO

import click

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from dnnlib import UserError, cli
from synthetic_data import common
from synthetic_data.class_files import ClassFile, open_classes, write_npz

# What a file system says that cannot copy within the kernel (another one on the other side, a
# network, an old kernel).
REFUSALS = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
COPY_BYTES = 64 << 20  # that the kernel copies at a time


def append_images(dest: BinaryIO, source: ClassFile, crc: int) -> int:
    """Appends the images of a class file; returns the CRC-32 of `dest`, which was `crc` before.

    If the file's record has their checksum, the kernel copies them, and none passes through this
    process. Raises UserError if the file ends before its last image.
    """
    images_crc = source.recorded_crc32()
    if images_crc is not None and copy_in_kernel(dest, source):
        return combine_crc32(crc, images_crc, source.num_bytes)
    end = dest.tell() + source.num_bytes
    for chunk in source.chunks():
        dest.write(chunk)
        crc = zlib.crc32(chunk, crc)
    if dest.tell() != end:
        raise UserError(f'{source.path} is cut short; make it again')
    return crc


def copy_in_kernel(dest: BinaryIO, source: ClassFile) -> bool:
    """Appends the images without a detour through this process, as `cp` does; False, with nothing
    appended, where that is not possible."""
    dest.flush()
    start = dest.tell()
    copied = 0
    with open(source.path, 'rb') as file:
        try:
            while count := min(source.num_bytes - copied, COPY_BYTES):
                count = os.copy_file_range(file.fileno(), dest.fileno(), count,
                                           source.offset + copied, start + copied)
                if not count:
                    break
                copied += count
        except AttributeError:
            pass  # not on this system
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
    complete = copied == source.num_bytes
    dest.seek(start + copied * complete)
    return complete


def combine_crc32(first: int, second: int, length: int) -> int:
    """CRC-32 of two byte strings one after the other, from those of each and the second one's
    length.

    CRCs are remainders modulo a polynomial P over GF(2): crc(ab) = crc(a) x^(8 length) + crc(b)
    mod P.
    """
    square = 1 << 23  # x^8; the highest bit is the coefficient of x^0
    while length:
        if length & 1:
            first = _multiply(first, square)
        square = _multiply(square, square)
        length >>= 1
    return first ^ second


def _multiply(a: int, b: int) -> int:
    """a b mod P."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)  # times x
    return product


EXAMPLES = """\b
Examples:
  python combine_data.py --data_dir ./out_cifar10 --output_dir ./npz_cifar10 --class_num 10 \\
      --file_name 5m
\b
  # What two machines have made
  python combine_data.py --data_dir ./out_a --data_dir ./out_b --output_dir ./npz_cifar10 \\
      --class_num 10 --file_name 10m"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@common.class_folder_options()
def main(data_dir, output_dir, class_num, file_name):
    """Join the files of all classes into one .npz for numpy.load: `image` uint8 [N,H,W,3], `label`
    int64 [N].

    Class by class, in the order of the files. Images are never held in memory.
    """
    classes = open_classes(data_dir, class_num)
    counts = [sum(map(len, files)) for files in classes]

    def append(dest, crc):
        label = f'Joining {sum(counts)} images'
        with click.progressbar(itertools.chain(*classes), sum(map(len, classes)), label) as bar:
            for source in bar:
                crc = append_images(dest, source, crc)
        return crc

    dest = os.path.join(output_dir, f'{file_name}.npz')
    with common.full_disk(f'--output_dir={output_dir}', 'run it again'):
        write_npz(dest, classes[0][0].shape[1:], counts, append)
    print(f'Wrote {dest}: {sum(counts)} images of {class_num} classes')


if __name__ == '__main__':
    main()
