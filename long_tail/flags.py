"""Flag files: options from files, one `--name=value` a line, as absl reads and writes them."""

import difflib
import os
from collections.abc import Iterator

import click

from dnnlib import UserError, cli

SWITCH_VALUES = {'true': True, 't': True, '1': True, 'yes': True,
                 'false': False, 'f': False, '0': False, 'no': False}


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
    params = {param.name: param for param in params}
    flags = list(_flags(args, params, ()))
    last = {name: place for name, place, _ in flags}
    return [text for name, place, text in flags
            if not params[name].multiple or place == last[name]]


def _flags(args, params: dict, files: tuple, where='') -> Iterator[tuple]:
    """(name, place, text) of the options in `args`.

    files  that are being read, each named by the one before it
    where  the line that the arguments are from, for messages
    """
    args = iter(args)
    for arg in args:
        name, equals, value = arg.lstrip('-').partition('=')
        name = name.replace('-', '_')
        if not arg.startswith('-') or not name:
            raise UserError(f'{where}{arg!r} is no option; write --name=value')
        negative = name not in params and name.startswith('no')
        param = params.get(name[2:] if negative else name)
        if param is not None and param.is_flag:
            if equals and (negative or value.lower() not in SWITCH_VALUES):
                raise UserError(f'{where}--{name}={value}: '
                                f'write --{param.name} or --no{param.name}')
            on = SWITCH_VALUES[value.lower()] if equals else not negative
            yield param.name, files, f'--{"" if on else "no"}{param.name}'
            continue
        if name not in params:
            similar = difflib.get_close_matches(name, params, n=1)
            advice = f'is it --{similar[0]}?' if similar else 'see --help for all of them'
            raise UserError(f'{where}unknown option --{name}; {advice}')
        if not equals:
            value = next(args, None)
        if value is None:
            raise UserError(f'{where}--{name} needs a value')
        if name == 'flagfile':
            yield from _file_flags(value, params, files)
        else:
            yield name, files, f'--{name}={value}'


def _file_flags(path: str, params: dict, files: tuple) -> Iterator[tuple]:
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
            yield from _flags(args, params, (*files, real), f'{path} line {number}: ')


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
