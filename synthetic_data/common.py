"""What the commands of this study share: options."""

import contextlib
import os
import zipfile

from dnnlib import cli, options


def _parse_fraction(text: str) -> float:
    import fractions  # here: combine_data.py does without
    with contextlib.suppress(ValueError, ZeroDivisionError):
        value = float(fractions.Fraction(text))
        if 0 < value <= 1:
            return value
    raise ValueError(f'{text!r} is not above 0 and at most 1; write e.g. 8/255 or 0.03')


def _parse_name(text: str) -> str:
    if os.path.basename(text) != text:
        raise ValueError(f'{text!r} is not a name without folders; give the folder as '
                         '--output_dir')
    return text.removesuffix('.npz')


def _has_classes(path: str) -> bool:
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as z:
        return {'image.npy', 'label.npy'} <= {*z.namelist()}
    return False


CLASSES = cli.Written('.npz of images and labels', ['.npz'], _has_classes)
FRACTION = cli.Parsed('fraction', _parse_fraction)   # 8/255 -> 0.0314
NPZ_NAME = cli.Parsed('name', _parse_name)           # 5m or 5m.npz -> 5m


def class_folder_options(file_name: str):
    """Decorator: --data_dir (which may be given several times), --output_dir, --class_num,
    --file_name."""
    return options.together(
        options.text('DIR', '--data_dir', 'Folder with <class>.npy of generate.py; several are '
                     'joined, one after the other', multiple=True, required=True),
        options.text('DIR', '--output_dir', 'Where results go', required=True,
                     type=cli.FOLDER),
        options.integer('--class_num', 10, 'Number of classes'),
        options.verify,
        options.pictures,
        options.text('NAME', '--file_name', 'The file is <output_dir>/NAME.npz', type=NPZ_NAME,
                     default=file_name),
        cli.overwrite)
