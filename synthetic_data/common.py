"""What the commands of this study share: options, and what a full disk says."""

import contextlib

import click

from dnnlib import UserError, cli


def _parse_fraction(text: str) -> float:
    import fractions  # here: combine_data.py does without
    try:
        value = float(fractions.Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'{text!r} is not a number; write e.g. 8/255 or 0.03') from None
    if not 0 < value <= 1:
        raise ValueError(f'{text!r} is not between 0 and 1')
    return value


FRACTION = cli.Parsed('fraction', _parse_fraction)   # 8/255 -> 0.0314


@contextlib.contextmanager
def full_disk(option: str, then: str):
    """Turns an OSError of writing into one line that names the option and says what to do: make room, and `then`."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{option} cannot be written ({error.strerror or error}); make room or choose another folder, and '
                        f'{then}') from None


def class_folder_options(function):
    """Decorator: --data_dir (which may be given several times), --output_dir, --class_num."""
    for option in reversed([
        click.option('--data_dir', metavar='DIR', multiple=True, required=True,
                     help='Folder with <class>.npy of generate.py; several are joined, one after the other'),
        click.option('--output_dir', metavar='DIR', required=True, help='Where results go'),
        click.option('--class_num', metavar='INT', type=click.IntRange(min=1), default=10, help='Number of classes'),
    ]):
        function = option(function)
    return function
