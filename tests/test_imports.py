"""Imports run one way: scripts and studies -> training, metrics -> torch_utils -> dnnlib."""

import ast

from helpers import ROOT, project_files

# What each room may import of the project besides itself; a script at the root is a room of its own.
ALLOWED = {'dnnlib': (), 'torch_utils': ('dnnlib',), 'metrics': ('torch_utils', 'dnnlib'),
           'training': ('torch_utils', 'dnnlib')}
LIBRARY = ('training', 'metrics', 'torch_utils', 'dnnlib')


def modules() -> dict:
    """Name of each module of the project: what it imports of the project, inside functions too."""
    names = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
             for path in project_files()}
    graph = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:  # else in an exported folder
                imported |= {f'{node.module}.{alias.name}' for alias in node.names}
        # `from package import name`: a module of that name, or something in the package.
        imported = {one if one in names else one.rpartition('.')[0] for one in imported}
        graph[name] = sorted((imported & set(names)) - {name})
    return graph


def room(module: str) -> str:
    return module.partition('.')[0]


def test_imports_run_one_way():
    wrong = []
    for module, imported in modules().items():
        for other in imported:
            here, there = room(module), room(other)
            allowed = ALLOWED.get(here, (*LIBRARY, 'studies'))
            if here != there and there not in allowed and not runs_script(module, other):
                wrong.append(f'{module} imports {other}')
    assert wrong == []


def runs_script(module: str, other: str) -> bool:
    """A miniature, and what the miniatures share, run the training scripts at the root."""
    miniature = module.partition('.')[2].startswith('digits_') or module == 'studies'
    return miniature and other in ('train_edm2', 'train')


def test_no_module_imports_itself_through_others():
    graph = modules()
    finished = set()

    def visit(module, path):
        assert module not in path, 'a circle: ' + ' -> '.join([*path, module])
        if module not in finished:
            for other in graph[module]:
                visit(other, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])
