"""Flag files: options from files, one `--name=value` a line, as absl reads and writes them."""

import difflib
import os
from pathlib import Path

import click

from dnnlib import cli


class FlagCommand(cli.Command):
    """A command with `--flagfile FILE`, and of every switch `--name`, `--noname` and
    `--name=true`.

    The lines of a file stand in for the option that names it: what comes later on the command line
    wins. The numbers of a list may be given one by one. It has those of the last place (a file, or
    the command line) that gives any, so a run can override the list of its flag file.
    """

    def parse_args(self, ctx, args):
        if not {'-h', '--help'}.intersection(args):
            names = {option.lstrip('-'): param for param in self.params
                     for option in (*param.opts, *param.secondary_opts)}
            try:
                args = to_text(self.params, read_flags(args, names)).splitlines()
            except click.UsageError as error:
                raise click.ClickException(error.format_message()) from None
        return super().parse_args(ctx, args)


def read_flags(args, names: dict, files: tuple = ()) -> dict:
    """{option: its text, or whether a switch is on} of arguments.

    names  {name: option}, with the noname of switches
    files  that are being read, each named by the one before it

    Raises click.UsageError that names the option, and the file that it is from.
    """
    values = {}
    lists = set()  # that this place has begun
    args = iter(args)
    for arg in args:
        name, equals, value = arg.lstrip('-').partition('=')
        name = name.replace('-', '_')
        param = names.get(name)
        if param is None or not arg.startswith('-'):
            similar = ', '.join(difflib.get_close_matches(name, names)) or 'none'
            raise click.UsageError(f'{arg!r} is no option; write --name=value, see --help '
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
            values |= _read_file(value, names, files)
            lists.clear()
        elif name in lists:
            values[name] += f',{value}'
        else:
            values[name] = value
            if param.type.name == 'list':
                lists.add(name)
    return values


def _read_file(path: str, names: dict, files: tuple) -> dict:
    """`read_flags` of a file: at `path`, else beside the file that names it."""
    if files and not os.path.exists(path):
        path = os.path.join(os.path.dirname(files[-1]), path)
    real = os.path.realpath(path)
    args = []
    try:
        if real in files:
            raise click.UsageError('it names itself')
        for line in map(str.strip, Path(path).read_text(encoding='utf-8').splitlines()):
            if line and not line.startswith(('#', '//')):
                args += [line] if '=' in line.split()[0] else line.split(None, 1)
        return read_flags(args, names, (*files, real))
    except (OSError, UnicodeDecodeError, click.UsageError) as error:
        reason = error.format_message() if isinstance(error, click.UsageError) else error
        raise click.UsageError(f'--flagfile={path}: {reason}') from None


def to_text(params, values: dict) -> str:
    """A flag file with the value of every option, sorted by name. Reading it gives the same
    values.
    """
    lines = []
    for param in sorted(params, key=lambda param: param.name):
        name = param.name
        value = values.get(name)
        if isinstance(value, bool):
            lines.append(f'--{name}' if value else f'--no{name}')
        elif value is not None:
            items = value if isinstance(value, list) else [value]
            lines += [f'--{name}={item}' for item in items or ['']]
    return ''.join(f'{line}\n' for line in lines)
