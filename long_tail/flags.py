"""Flag files: a command whose options may also come from files, one `--name=value` a line, and files may name files."""

import difflib
import os
import sys

import click

from dnnlib import UserError, cli

TRUE, FALSE = ('true', 't', '1', 'yes'), ('false', 'f', '0', 'no')


class FlagCommand(cli.Command):
    """A command that knows `--flagfile FILE`, and of every switch `--name`, `--noname` and `--name=true`.

    The lines of a file stand in for the option that names it: what comes later on the command line wins. An option that may
    be repeated has the values of the last place (a file, or the command line) that gives any, so a run can override the list
    of its flag file.
    """

    def parse_args(self, ctx, args):
        try:
            args = expand(args, self.params)
        except UserError as error:
            if not ctx.resilient_parsing:
                print(f'Error: {error}', file=sys.stderr, flush=True)
                ctx.exit(1)
        return super().parse_args(ctx, args)


def expand(args, params) -> list[str]:
    """Arguments without flag files, in one spelling: --name=value, --name or --noname.

    Raises UserError that names the option, and the line of the file that it is from.
    """
    reader = _Reader({param.name: param for param in params})
    reader.read(args, 'the command line')
    last = {name: place for place, name, _ in reader.found}
    return [text for place, name, text in reader.found if not reader.repeated(name) or place == last[name]] + reader.rest


class _Reader:
    def __init__(self, params: dict):
        self.params, self.found, self.rest, self.open_files = params, [], [], []

    def repeated(self, name):
        return name in self.params and self.params[name].multiple

    def read(self, args, place, line=None):
        """Takes in arguments; `line` is where they are from, for messages."""
        args, where = list(args), f'{line}: ' if line else ''
        while args:
            arg = args.pop(0)
            if arg in ('-h', '--help'):
                self.rest.append(arg)
                continue
            name, equals, value = arg.lstrip('-').partition('=')
            if not arg.startswith('-') or not name:
                raise UserError(f'{where}{arg!r} is no option; write --name=value')
            if name == 'flagfile':
                self._read_file(self._value(name, equals, value, args, where))
            elif (switch := self._switch(name, equals, value, where)) is not None:
                self.found.append((place, switch.removeprefix('no') if switch not in self.params else switch, f'--{switch}'))
            elif name in self.params:
                self.found.append((place, name, f'--{name}={self._value(name, equals, value, args, where)}'))
            else:
                similar = difflib.get_close_matches(name, self.params, n=1)
                raise UserError(f'{where}unknown option --{name}' + (f'; is it --{similar[0]}?' if similar else
                                                                    '; see --help for all of them'))

    def _switch(self, name, equals, value, where):
        """'name' or 'noname' if the option is a switch, else None."""
        for base, sign in ((name, True), (name.removeprefix('no'), False)):
            if base in self.params and self.params[base].is_flag and (sign or name != base):
                if equals and (not sign or value.lower() not in TRUE + FALSE):
                    raise UserError(f'{where}--{name}={value}: write --{base} or --no{base}')
                return base if sign and (not equals or value.lower() in TRUE) else f'no{base}'
        return None

    def _value(self, name, equals, value, args, where):
        if equals:
            return value
        if not args:
            raise UserError(f'{where}--{name} needs a value')
        return args.pop(0)

    def _read_file(self, path):
        path = self._find(path)
        if os.path.realpath(path) in self.open_files:
            raise UserError(f'--flagfile={path} names itself')
        self.open_files.append(os.path.realpath(path))
        try:
            with open(path, encoding='utf-8') as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--flagfile={path} cannot be read ({error})') from None
        for number, text in enumerate(lines, 1):
            text = text.strip()
            if text and not text.startswith(('#', '//')):
                # Repeated options of one file belong together, whatever stands between them.
                self.read([text] if '=' in text.split()[0] else text.split(None, 1), path, f'{path} line {number}')
        self.open_files.pop()

    def _find(self, path):
        """As given, from the working directory; else beside the file that names it."""
        if not os.path.exists(path) and self.open_files:
            beside = os.path.join(os.path.dirname(self.open_files[-1]), path)
            return beside if os.path.exists(beside) else path
        return path


def to_text(params, values: dict) -> str:
    """A flag file with the value of every option, sorted by name. Reading it gives the same values."""
    lines = []
    for param in sorted((p for p in params if isinstance(p, click.Option) and p.name in values), key=lambda p: p.name):
        value = values[param.name]
        if param.is_flag:
            lines.append(f'--{"" if value else "no"}{param.name}')
        elif param.multiple:
            lines += [f'--{param.name}={item}' for item in value] or [f'--{param.name}=']
        else:
            lines.append(f'--{param.name}={",".join(map(str, value)) if isinstance(value, list) else value}')
    return '\n'.join(lines) + '\n'
