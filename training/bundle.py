"""One Python file out of several: a template with what it needs of this project's own source.

Of every module only the definitions that are used are taken, as they stand, and imports of the
project go. So the file runs where the project is not installed, and can be read from top to
bottom. What the template itself defines takes the place of what has the same name in the project.
"""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ('training', 'torch_utils', 'dnnlib')


class _Module:
    """A module of this project by its dotted name: its definitions and imports."""

    def __init__(self, name: str):
        self.name = name
        path = ROOT.joinpath(*name.split('.'))
        self.path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
        self.lines = self.path.read_text().splitlines()
        self.tree = ast.parse('\n'.join(self.lines))
        self.statements = {}        # name -> the statement that defines it
        self.project = {}           # name -> (module, name there)
        self.imports = {}           # name -> 'import ...' or ('module', 'name [as other]')
        for statement in self.tree.body:
            for alias in getattr(statement, 'names', ()):
                local = alias.asname or alias.name
                source = getattr(statement, 'module', None) or alias.name
                if source.partition('.')[0] in ROOMS:
                    self.project[local] = source, alias.name
                elif isinstance(statement, ast.Import):
                    self.imports[local.partition('.')[0]] = f'import {_as(alias)}'
                else:
                    self.imports[local] = source, _as(alias)
            for name in _defined(statement):
                self.statements[name] = statement

    def text(self, statement) -> str:
        """The source of a statement, with the comment above it."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, 'decorator_list',
                                                                   ()))])
        while self.lines[first - 2].startswith('# ') and not self.lines[first - 2].endswith('--'):
            first -= 1
        return '\n'.join(self.lines[first - 1:statement.end_lineno])


def _as(alias) -> str:
    return f'{alias.name} as {alias.asname}' if alias.asname else alias.name


def _defined(statement) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return [node.id for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return []


_module = functools.cache(_Module)


class _Bundle:
    def __init__(self, template: _Module):
        self.template = template
        self.taken = {}             # module -> its statements that are used
        self.modules = []           # in the order in which they import each other
        self.seen = set()
        self.owners = {}            # name -> (module, name there)
        self.imports = {}           # name -> see _Module
        for statement in template.tree.body:
            self.need_all(template, statement)

    def need_all(self, module: _Module, statement):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                self.need(module, node.id)

    def need(self, module: _Module, name: str):
        """Takes what `name` means in a module."""
        if name in self.template.statements and module is not self.template:
            return
        if name in module.imports:
            self.claim(self.imports, name, module.imports[name])
        elif name in module.project:
            source, there = module.project[name]
            if there != name or (ROOT.joinpath(*source.split('.')) / f'{name}.py').is_file():
                raise ValueError(f'{module.path}: {name} is a module, or has another name there')
            self.need(_module(source), name)
        elif name in module.statements:
            self.claim(self.owners, name, module.name)
            statement = module.statements[name]
            taken = self.taken.setdefault(module, [])
            if statement not in taken:
                taken.append(statement)
                self.need_all(module, statement)

    @staticmethod
    def claim(table: dict, name: str, what):
        if table.setdefault(name, what) != what:
            raise ValueError(f'{name} has two meanings: {table[name]} and {what}')

    def order(self, module: _Module):
        """Modules after those that they import."""
        if module in self.seen:
            return
        self.seen.add(module)
        for source, _ in module.project.values():
            self.order(_module(source))
        self.modules.append(module)


def bundle(template: str, needed=()) -> str:
    """The source of one file: the module `template`, dotted, and all that it needs.

    `needed`: (module, name) of classes that it looks for in its table CLASSES. Raises ValueError
    if two definitions have the same name.
    """
    last = _module(template)
    result = _Bundle(last)
    for module, name in needed:
        result.need(_module(module), name)
        result.order(_module(module))
    result.order(last)
    plain = sorted({one for one in result.imports.values() if isinstance(one, str)})
    names = {}
    for one in result.imports.values():
        if not isinstance(one, str):
            names.setdefault(one[0], set()).add(one[1])
    imports = plain + [f'from {source} import {", ".join(sorted(names[source]))}'
                       for source in sorted(names)]
    parts = [f'"""{ast.get_docstring(last.tree, clean=False)}"""', '\n'.join(imports)]
    for module in result.modules:
        statements = sorted(result.taken.get(module, ()), key=lambda one: one.lineno)
        if statements and module is not last:
            parts.append(f'# --- {module.path.relative_to(ROOT)} '.ljust(99, '-'))
            parts += [module.text(statement) for statement in statements]
    parts.append('# --- What diffusers calls '.ljust(99, '-'))
    classes = ', '.join(name for _, name in needed)
    parts += [f'CLASSES = {{one.__name__: one for one in [{classes}]}}'
              if _defined(one) == ['CLASSES'] else last.text(one)
              for one in last.tree.body if _defined(one)]
    return '\n\n'.join(parts) + '\n'
