"""What all command lines share: option types, shown defaults, one-line errors.

Use `@click.command(cls=cli.Command)` (or `cli.Group`) and raise `dnnlib.UserError`
from anywhere below: it ends in one line on stderr and its exit status (1). So does SIGTERM (143).
"""

import atexit
import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import time

import click
from click.core import ParameterSource

from dnnlib import budget, lazy, util


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


def _send_again(lost):
    """A `sys.unraisablehook`: a signal that came within what cannot raise (a finaliser, a hook of
    a fork), where Python drops it, comes again soon.
    """
    numbers = {_Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
    if lost.exc_type not in numbers:
        return sys.__unraisablehook__(lost)
    threading.Timer(0.1, os.kill, (os.getpid(), numbers[lost.exc_type])).start()


@contextlib.contextmanager
def _sigterm_raises():
    """In the block SIGTERM unwinds this process, so that no half of a file stays.

    Not one of several processes: it may be waiting, outside of Python, for one that has ended.
    """
    if util.process_count() > 1 \
            or threading.current_thread() is not threading.main_thread():
        yield
        return
    with util.signal_handler(signal.SIGTERM, _terminate):
        yield


@contextlib.contextmanager
def _no_signal_is_lost():
    before, sys.unraisablehook = sys.unraisablehook, _send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _end_in_silence():
    """Ctrl-C while Python ends says nothing: the work is done."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


_OF_CLICK = (click.ClickException, click.Abort, click.exceptions.Exit)
# Of the disk, and of places that cannot be written.
_WRITE_ERRORS = (*util.DISK_ERRORS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
                 errno.EEXIST, errno.ENAMETOOLONG)


def _user_error(error: BaseException | None) -> util.UserError | None:
    """A UserError; for a full disk (also one that another error came of, of torch.save), a full
    GPU or a lost process, what says so in one line; None for others.
    """
    if isinstance(error, util.UserError):
        return error
    if isinstance(error, _OF_CLICK):
        return None
    # Of torch and of pools, which may not be imported.
    kinds = {type(cause).__name__ for cause in util.causes(error)}
    if 'BrokenProcessPool' in kinds:
        return util.UserError('a worker process was killed; is there enough memory?')
    if 'OutOfMemoryError' in kinds:
        return util.UserError('the memory of the GPU is full; give fewer images of one '
                              'forward pass', 'batch_gpu')
    if isinstance(error, RuntimeError) and re.search('gloo.*(onnect|losed)', str(error)):
        return util.UserError('another of the processes has ended, or cannot be reached')
    reason = util.disk_error(error, _WRITE_ERRORS)
    if reason is None:
        return None
    name = reason.filename2 or reason.filename
    return util.UserError(util.of_disk(reason, f'{name}: {{}}' if isinstance(name, str) else '{}'))


def _take_turn(is_known: bool):
    """Of several processes that fail together only one says so: the others wait until their
    launcher ends them. What is not known may be that another process has ended.
    """
    if util.process_count() > 1:
        rank = int(os.environ['LOCAL_RANK'])
        time.sleep((3 + rank / 2 if rank else 0) + (0 if is_known else 10))


def _tell_launcher(line: str):
    """The summary that torchrun prints at its end has this line at its end."""
    if path := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        extra = {'timestamp': str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, 'w') as file:
            json.dump({'message': {'message': line, 'extraInfo': extra}}, file)


class _Printable:
    """A stream of texts `util.without_codes`."""

    _moves = re.compile('(?:\n|\x1b\\[A)*')             # of tqdm, for bars below each other

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._moves.fullmatch(text):
            text = util.without_codes(text)
        return self._stream.write(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)


@contextlib.contextmanager
def _printable_streams():
    with contextlib.redirect_stdout(_Printable(sys.stdout)), \
            contextlib.redirect_stderr(_Printable(sys.stderr)):
        yield


class _OneLineErrors:
    # Whether fields that are no options go by their own names: those of a configuration.
    names_fields = False

    def __init__(self, *args, **kwargs):
        settings = dict(show_default=True, max_content_width=110,
                        help_option_names=['-h', '--help'])
        kwargs['context_settings'] = settings | (kwargs.get('context_settings') or {})
        for text in ('help', 'epilog'):  # a mark of click within a paragraph begins another one
            if kwargs.get(text):
                kwargs[text] = re.sub(r'\n( *\x08\n)', r'\n\n\1', kwargs[text])
        super().__init__(*args, **kwargs)
        if any(isinstance(param.type, Written) for param in self.params) \
                and all(param.name != 'overwrite' for param in self.params):
            overwrite(self)

    def main(self, *args, **kwargs):
        with _printable_streams():
            return super().main(*args, **kwargs)

    def make_context(self, *args, **kwargs):
        try:
            return super().make_context(*args, **kwargs)
        except click.ClickException as error:
            error.message = util.without_secrets(error.message)
            _take_turn(is_known=True)
            _tell_launcher(f'Error: {error.format_message()}')
            raise

    def invoke(self, ctx):
        try:
            for param in ctx.command.params:
                if isinstance(param.type, Destination):
                    param.type.check(param, ctx.params)
            with _no_signal_is_lost(), _sigterm_raises():
                if not isinstance(self, click.Group):          # whose commands have options too
                    lazy.load()
                return super().invoke(ctx)
        except _Terminated:
            print('Stopped by SIGTERM', file=sys.stderr, flush=True)
            ctx.exit(143)                               # 128 + 15, as shells say of the signal
        except Exception as error:
            known = _user_error(error)
            if isinstance(error, click.ClickException):
                error.message = util.without_secrets(error.message)
            if known is None:
                if not ctx.parent and not isinstance(error, _OF_CLICK):
                    _take_turn(is_known=False)
                raise
            if not known.is_shared:
                _take_turn(is_known=True)
            rank = int(os.environ.get('RANK', 0))
            where = f'[rank {rank}] ' if rank else ''
            option = _option_of(ctx, known.field) or (known.field if self.names_fields else None)
            line = f'{where}Error: {util.printable(known.line(option))}'
            if known.is_shared and util.process_count() > 1:
                # Else launchers would end those that are slower, which then have another status.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if not (rank and known.is_shared):
                print(line, file=sys.stderr, flush=True)
                _tell_launcher(line)
            # Not sys.exit: the other ranks may be waiting in a collective that would never end.
            ctx.exit(known.status)
        finally:
            atexit.unregister(_end_in_silence)
            atexit.register(_end_in_silence)            # what comes last is called first


class Command(_OneLineErrors, click.Command):
    """click.Command that shows defaults and turns UserError into one line."""


class Group(_OneLineErrors, click.Group):
    """click.Group of such commands.

    default  the one that is meant where none is named; --help shows its options too
    """

    command_class = Command

    def __init__(self, *args, default: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx, args):
        helps = self.context_settings['help_option_names']
        if self.default and not (args and args[0] in (*self.commands, *helps)):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx, formatter):
        if self.default:
            self.commands[self.default].format_options(ctx, formatter)
            self.format_commands(ctx, formatter)
        else:
            super().format_options(ctx, formatter)


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


class Destination(click.ParamType):
    """An option's type for what a command writes: what cannot be written is refused before the
    work, and nothing is made.

    name  'file'; 'folder' of files; or 'atomic': either of the two, which appears when complete
    """

    def __init__(self, name: str):
        self.name = name

    def check(self, param, values: dict):
        path = values.get(param.name)
        if path is not None:
            util.check_place(path, self.name, param.name)


# The value of --overwrite in the context of a command that writes files.
_OVERWRITE = 'dnnlib.overwrite'


def overwrites() -> bool:
    """Whether the command may replace files that this project has not written."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_OVERWRITE))


overwrite = click.option(
    '--overwrite', is_flag=True, expose_value=False,
    callback=lambda context, _, value: context.meta.update({_OVERWRITE: value}),
    help='Replace files too that this project has not written')


class Written(Destination):
    """A file of a kind that is replaced only if this project has written it, or it is empty; else
    --overwrite, which commands with such options have, is needed.

    what     'picture'
    endings  of its name, e.g. ['.png']; any for []
    is_ours  function(path) -> whether the file there is of this kind, and of this project; it may
             raise OSError, ValueError and UserError
    """

    def __init__(self, what: str, endings, is_ours):
        super().__init__('file')
        self.what = what
        self.endings = tuple(endings)
        self.is_ours = is_ours

    def check(self, param, values: dict):
        if (path := values.get(param.name)) is not None:
            self.check_path(path, param.name)

    def check_path(self, path: str, field: str | None = None):
        """Raises UserError, about `field` if given, unless the file may be made or replaced."""
        path = os.fspath(path)
        util.check_place(path, field=field)
        if not path.lower().endswith(self.endings or ''):
            raise util.UserError(f'is a {self.what}: its name must end in '
                                 f'{" or ".join(self.endings)}', field, path)
        if not os.path.isfile(path) or not os.path.getsize(path) or overwrites():
            return
        ours = False
        with contextlib.suppress(OSError, ValueError, RecursionError, util.UserError):
            ours = self.is_ours(path)
        if not ours:
            raise util.UserError(f'is no {self.what} that this project has written; choose '
                                 f'another name, or give --overwrite', field, path)


def has_mark(path: str) -> bool:
    with open(path, 'rb') as file:
        return util.MARK.encode() in file.read(4096)


def json_with(*keys: str, what='JSON file of results', endings=('.json',)) -> Written:
    """The kind of JSON objects that have these keys."""
    def is_ours(path):
        content = budget.read_json(path)
        return isinstance(content, dict) and content.keys() >= {*keys}

    return Written(what, endings, is_ours)


def refuse_unused(names, where: str):
    """Raises UserError if the user gave one of the options, which have no meaning with `where`."""
    context = click.get_current_context()
    for param in context.command.params:
        source = context.get_parameter_source(param.name)
        if param.name in names and source == ParameterSource.COMMANDLINE:
            raise util.UserError(f'{param.opts[0]} has no meaning with {where}; leave it out')


def claim(*paths: str | None):
    """Until the command ends, no other command makes these files: raises UserError if one does."""
    context = click.get_current_context(silent=True)           # None in a worker of a study
    if context and int(os.environ.get('RANK', 0)) == 0:
        for path in filter(None, paths):
            context.with_resource(util.claimed_file(path))


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
    match = re.fullmatch(r'0*([1-9]\d{0,8})(?:x0*([1-9]\d{0,8}))?', text.lower(), re.ASCII)
    if not match:
        raise ValueError(f'{text!r} is not a size; write WIDTHxHEIGHT or the side of a square, '
                         'e.g. 256x256 or 256')
    return int(match[1]), int(match[2] or match[1])


PICTURE = Written('picture', ['.png'], has_mark)
DRAWING = Written('drawing', ['.svg'], has_mark)
FILE, FOLDER, ATOMIC = map(Destination, ('file', 'folder', 'atomic'))
COUNT = Parsed('count', util.parse_count)           # 4096, 64Ki, 1.5Mi
INT_LIST = Parsed('list', util.parse_int_list)      # 0,3,10-19
NUMBERS = Parsed('list', lambda text: list(map(parse_number, text.split(','))))  # 0,0.5
SIZE = Parsed('WxH', _parse_size)                   # 256x256, 256 -> (256, 256)
