"""What all command lines share: option types, shown defaults, one-line errors.

Use `@click.command(cls=cli.Command)` (or `cli.Group`) and raise `dnnlib.UserError`
from anywhere below: it ends in one line on stderr and its exit status (1). So does SIGTERM (143).
"""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading

import click

from dnnlib import util


def _option_of(ctx, field: str | None) -> str | None:
    """The option of the command for a field of the library, e.g. '--batch-gpu' for batch_gpu."""
    for param in ctx.command.params:
        if param.name == field and isinstance(param, click.Option):
            return max(param.opts, key=lambda name: name.startswith('--'))  # the first long one
    return None


class _Terminated(BaseException):
    pass


def _terminate(number, frame):
    raise _Terminated


@contextlib.contextmanager
def _sigterm_raises():
    """In the block SIGTERM unwinds this process, so that no half of a file stays.

    Not one of several processes: it may be waiting, outside of Python, for one that has ended.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 \
            or threading.current_thread() is not threading.main_thread():
        yield
        return
    with util.signal_handler(signal.SIGTERM, _terminate):
        yield


def _end_in_silence():
    """Ctrl-C while Python ends says nothing: the work is done."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# Of the disk, and of places that cannot be written.
_WRITE_ERRORS = (*util.DISK_ERRORS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
                 errno.EEXIST, errno.ENAMETOOLONG)


def _user_error(error: BaseException | None) -> util.UserError | None:
    """A UserError; for an error of the disk, or one that came of it (of torch.save), what says so
    in one line; None for others.
    """
    if isinstance(error, util.UserError):
        return error
    if isinstance(error, (click.ClickException, click.Abort, click.exceptions.Exit)):
        return None
    while error is not None:
        if type(error).__name__ == 'OutOfMemoryError':  # of torch, which may not be imported
            return util.UserError('the memory of the GPU is full; give fewer images of one '
                                  'forward pass', 'batch_gpu')
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            name = error.filename2 or error.filename
            place = f'{name}: ' if isinstance(name, str) else ''
            return util.UserError(f'{place}{error.strerror}; make room, or choose another place')
        error = error.__cause__ or error.__context__
    return None


class _OneLineErrors:
    # Whether fields that are no options go by their own names: those of a configuration.
    names_fields = False

    def __init__(self, *args, **kwargs):
        settings = dict(show_default=True, max_content_width=110,
                        help_option_names=['-h', '--help'])
        kwargs['context_settings'] = settings | (kwargs.get('context_settings') or {})
        super().__init__(*args, **kwargs)

    def invoke(self, ctx):
        try:
            with _sigterm_raises():
                return super().invoke(ctx)
        except _Terminated:
            print('Stopped by SIGTERM', file=sys.stderr, flush=True)
            ctx.exit(143)                               # 128 + 15, as shells say of the signal
        except Exception as error:
            error = _user_error(error)
            if error is None:
                raise
            rank = int(os.environ.get('RANK', 0))
            where = f'[rank {rank}] ' if rank else ''
            option = _option_of(ctx, error.field) or (error.field if self.names_fields else None)
            if error.is_shared and int(os.environ.get('WORLD_SIZE', 1)) > 1:
                # Else launchers would end those that are slower, which then have another status.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if not (rank and error.is_shared):
                line = util.printable(error.line(option))
                print(f'{where}Error: {line}', file=sys.stderr, flush=True)
            # Not sys.exit: the other ranks may be waiting in a collective that would never end.
            ctx.exit(error.status)
        finally:
            atexit.unregister(_end_in_silence)
            atexit.register(_end_in_silence)            # what comes last is called first


class Command(_OneLineErrors, click.Command):
    """click.Command that shows defaults and turns UserError into one line."""


class Group(_OneLineErrors, click.Group):
    """click.Group of such commands."""

    command_class = Command


class Parsed(click.ParamType):
    """An option type made of a function that raises ValueError with a one-line message."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            return self.function(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(click.FloatRange):
    """click.FloatRange that refuses nan, which lies within any range there."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f'{value!r} is not a number', param, ctx)
        return number


def parse_number(text: str) -> float:
    """A number; raises ValueError for nan too."""
    number = float(text)
    if number != number:
        raise ValueError(f'{text!r} is not a number')
    return number


def _parse_size(text: str) -> tuple[int, int]:
    width, sep, height = text.lower().partition('x')
    if not (sep and width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0):
        raise ValueError(f'{text!r} is not a size; write WIDTHxHEIGHT, e.g. 256x256')
    return int(width), int(height)


COUNT = Parsed('count', util.parse_count)           # 4096, 64Ki, 1.5Mi
INT_LIST = Parsed('list', util.parse_int_list)      # 0,3,10-19
NUMBERS = Parsed('list', lambda text: list(map(parse_number, text.split(','))))  # 0,0.5
SIZE = Parsed('WxH', _parse_size)                   # 256x256 -> (256, 256)
