"""Flag files: options from files, one `--name=value` a line, as absl reads and writes them."""

import difflib
import os

import click

from dnnlib import cli

# absl's own flags: its flag files have them all, and they mean nothing here.
_HELP = {'help', 'helpfull', 'helpshort', 'helpxml'}
_ABSL_SWITCHES = _HELP | {
    'alsologtostderr', 'logtostderr', 'only_check_args', 'only_check_flags', 'pdb',
    'pdb_post_mortem', 'run_with_pdb', 'run_with_profiling', 'showprefixforinfo',
    'use_cprofile_for_profiling'}
_ABSL_VALUES = {
    'log_dir', 'logger_levels', 'profile_file', 'stderrthreshold', 'test_random_seed',
    'test_randomize_ordering_seed', 'test_srcdir', 'test_tmpdir', 'undefok', 'v', 'verbosity',
    'xml_output_file'}

FOLDERS = {'logdir', 'finetuned_logdir'}
# Of a command with all the files that they name, each as often as it is named.
MAX_FILES = 100
MAX_BYTES = 1 << 20


class FlagCommand(cli.Command):
    """A command with `--flagfile FILE`, and of every switch `--name`, `--noname` and
    `--name=true`.

    The lines of a file stand in for the option that names it: what comes later on the command line
    wins. The numbers of a list may be given one by one. It has those of the last place (a file, or
    the command line) that gives any, so a run can override the list of its flag file.
    """

    def parse_args(self, ctx, args):
        if {'-h', *(f'--{name}' for name in _HELP)}.intersection(args):
            args = ['--help']
        else:
            names = {option.lstrip('-'): param for param in self.params
                     for option in (*param.opts, *param.secondary_opts)}
            try:
                args = to_text(self.params, read_flags(args, names)).splitlines()
            except click.UsageError as error:
                raise click.ClickException(error.format_message()) from None
        return super().parse_args(ctx, args)


def read_flags(args, names: dict, files: tuple = (), read: list | None = None) -> dict:
    """{option: its text, or whether a switch is on} of arguments.

    names  {name: option}, with the noname of switches
    files  that are being read, each named by the one before it
    read   sizes of all files read so far

    Raises click.UsageError that names the option, and the file that it is from; what else is in a
    file is no part of the message, since a flag file may name any file.
    """
    values = {}
    lists = set()  # that this place has begun
    read = [] if read is None else read
    args = iter(args)
    for arg in args:
        name, equals, value = arg.lstrip('-').partition('=')
        name = name.replace('-', '_')
        param = names.get(name)
        if param is None and name.removeprefix('no') in _ABSL_SWITCHES:
            continue
        if name in _ABSL_VALUES:
            if not equals:
                next(args, None)
            continue
        if param is None or not arg.startswith('-'):
            similar = ', '.join(difflib.get_close_matches(name, names)) or 'none'
            shown = 'this' if files else repr(arg)
            raise click.UsageError(f'{shown} is no option; write --name=value, see --help '
                                   f'(similar: {similar})')
        if param.is_flag:
            on = not equals or click.BOOL(value, param)
            values[param.name] = on == (name == param.name)
            continue
        if not equals:
            value = next(args, None)
        if value is None:
            raise click.UsageError(f'--{name} needs a value')
        if name == 'flagfile':
            values |= _read_file(value, names, files, read) if value else {}
            lists.clear()
        elif name in lists:
            values[name] += f',{value}'
        else:
            values[name] = value
            if param.type.name == 'list':
                lists.add(name)
    return values


def _read_file(path: str, names: dict, files: tuple, read: list) -> dict:
    """`read_flags` of a file: at `path`, else beside the file that names it."""
    if files and not os.path.exists(path):
        path = os.path.join(os.path.dirname(files[-1]), path)
    real = os.path.realpath(path)
    where = f'--flagfile={path}'

    def arguments(text):
        nonlocal where
        for number, line in enumerate(map(str.strip, text.splitlines()), 1):
            where = f'--flagfile={path}, line {number}'
            if line and not line.startswith(('#', '//')):
                yield from [line] if '=' in line.split()[0] else line.split(None, 1)

    try:
        if real in files:
            raise click.UsageError('it names itself')
        if not os.path.isfile(real):                     # a device or a pipe may have no end
            raise click.UsageError('no such file, or no regular one')
        with open(real, encoding='utf-8') as file:
            text = file.read(MAX_BYTES + 1 - sum(read))
        read.append(len(text))
        if len(read) > MAX_FILES or sum(read) > MAX_BYTES:
            raise click.UsageError(f'more than {MAX_FILES} files, or {MAX_BYTES >> 20} MiB, '
                                   'with all that it names')
        values = read_flags(arguments(text), names, (*files, real), read)
        for name in FOLDERS & values.keys():
            values[name] = _beside(real, values[name])
        return values
    except (OSError, UnicodeDecodeError, click.UsageError) as error:
        reason = error.format_message() if isinstance(error, click.UsageError) else error
        if not str(reason).startswith('--flagfile='):    # which the innermost file says of itself
            reason = f'{where}: {reason}'
        raise click.UsageError(reason) from None


def _beside(path: str, folder: str) -> str:
    """A folder of runs that the flag file of a run names. Its own, and one beside that, may have
    moved or be but names there.
    """
    place = os.path.join(os.path.dirname(os.path.dirname(path)), folder)
    here = os.path.dirname(folder) or os.path.isdir(folder)
    return place if folder and not here and os.path.isdir(place) else folder


def to_text(params, values: dict) -> str:
    """A flag file with the value of every option, sorted by name. Reading it gives the same
    values.
    """
    lines = []
    for param in sorted(params, key=lambda param: param.name):
        name = param.name
        value = values.get(name)
        if isinstance(value, bool) and param.is_flag:
            lines.append(f'--{name}' if value else f'--no{name}')
        elif value is not None:
            items = value if isinstance(value, list) else [value]
            lines += [f'--{name}={item}' for item in items or ['']]
    return ''.join(f'{line}\n' for line in lines)
