"""Flag files: options from files, one `--name=value` a line, as absl reads and writes them."""

import difflib
import os
from collections.abc import Iterator

import click

from dnnlib import UserError, cli


class FlagCommand(cli.Command):
    """A command with `--flagfile FILE`, and of every switch `--name`, `--noname` and
    `--name=true`.

    The lines of a file stand in for the option that names it: what comes later on the command line
    wins. An option that may be repeated has the values of the last place (a file, or the command
    line) that gives any, so a run can override the list of its flag file.
    """

    def parse_args(self, ctx, args):
        if not {'-h', '--help'}.intersection(args):
            try:
                args = expand(args, self.params)
            except UserError as error:
                raise click.ClickException(str(error)) from None
        return super().parse_args(ctx, args)


def expand(args, params) -> list[str]:
    """Arguments without flag files, in one spelling: --name=value, --name or --noname.

    Raises UserError that names the option, and the line of the file that it is from.
    """
    names = {option.lstrip('-'): param for param in params
             for option in (*param.opts, *param.secondary_opts)}
    flags = list(_flags(args, names, ()))
    last = {param: files for param, files, _ in flags}
    return [text for param, files, text in flags if not param.multiple or files == last[param]]


def _flags(args, names: dict, files: tuple, where='') -> Iterator[tuple]:
    """(option, files, text) of each in `args`.

    names  {name: option}, with the noname of switches
    files  that are being read, each named by the one before it
    where  the line that the arguments are from, for messages
    """
    args = iter(args)
    for arg in args:
        name, equals, value = arg.lstrip('-').partition('=')
        name = name.replace('-', '_')
        if not arg.startswith('-') or not name:
            raise UserError(f'{where}{arg!r} is no option; write --name=value')
        if name not in names:
            similar = ', '.join(difflib.get_close_matches(name, names)) or 'none'
            raise UserError(f'{where}unknown option --{name}; see --help (similar: {similar})')
        param = names[name]
        if param.is_flag:
            if equals:
                name = _switch(param, name, value, where)
            yield param, files, f'--{name}'
            continue
        if not equals:
            value = next(args, None)
        if value is None:
            raise UserError(f'{where}--{name} needs a value')
        if name == 'flagfile':
            yield from _file_flags(value, names, files)
        else:
            yield param, files, f'--{name}={value}'


def _switch(param, name: str, value: str, where: str) -> str:
    """'name' or 'noname' for --name=true and the like."""
    try:
        on = click.BOOL(value)
    except click.BadParameter:
        on = None
    if on is None or name != param.name:
        raise UserError(f'{where}--{name}={value}: write --{param.name} or --no{param.name}')
    return name if on else f'no{name}'


def _file_flags(path: str, names: dict, files: tuple) -> Iterator[tuple]:
    """`_flags` of a file: at `path`, else beside the file that names it."""
    if files and not os.path.exists(path):
        path = os.path.join(os.path.dirname(files[-1]), path)
    real = os.path.realpath(path)
    if real in files:
        raise UserError(f'--flagfile={path} names itself')
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--flagfile={path} cannot be read ({error})') from None
    for number, text in enumerate(lines, 1):
        text = text.strip()
        if text and not text.startswith(('#', '//')):
            args = [text] if '=' in text.split()[0] else text.split(None, 1)
            yield from _flags(args, names, (*files, real), f'{path} line {number}: ')


def to_text(params, values: dict) -> str:
    """A flag file with the value of every option, sorted by name. Reading it gives the same
    values.
    """
    lines = []
    for param in sorted(params, key=lambda param: param.name):
        if param.name not in values:
            continue
        value = values[param.name]
        if param.is_flag:
            lines.append(f'--{"" if value else "no"}{param.name}')
        elif param.multiple:
            lines += [f'--{param.name}={item}' for item in value or ['']]
        else:
            text = ','.join(map(str, value)) if isinstance(value, list) else value
            lines.append(f'--{param.name}={text}')
    return '\n'.join(lines) + '\n'
