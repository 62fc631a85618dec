"""What cannot be written is refused in one line, before the work, and nothing is made: every option that names a
destination, of every script, for every kind of fault."""

import contextlib
import errno
import os
import subprocess

import click
import pytest
from click.testing import CliRunner
from helpers import ROOT, project_files, run, script_module

from dnnlib import UserError, cli, util

# Options that name what is written; those of UNCHECKED are only read at times, and the script checks what it writes.
NAMES = {'outdir', 'dest', 'grid', 'json_path', 'log', 'output_dir', 'log_dir', 'logdir', 'finetuned_logdir'}
UNCHECKED = [('long_tail/main.py', 'logdir'), ('long_tail/main.py', 'finetuned_logdir'),
             *((f'simulations/plot_gaussian_{tag}.py', 'outdir') for tag in ('K', 'grid', 'n', 'sim', 'slope'))]


def commands(script):
    """(words, command) of a script, and of each of its subcommands."""
    with pytest.MonkeyPatch.context() as patch:                # plot_gaussian_*.py import what lies beside them
        patch.syspath_prepend(str(ROOT / 'simulations'))
        main = script_module(script).main if 'plot_gaussian' not in script else plot(script)
    if isinstance(main, click.Group):
        return [([script, name], command) for name, command in main.commands.items()]
    return [([script], main)]


def plot(script):
    import plotting
    return plotting.command(script.removesuffix('.py').rpartition('_')[2])


SCRIPTS = [str(path.relative_to(ROOT)) for path in project_files()
           if path.parts[len(ROOT.parts)] not in ('docs', 'tools') and "if __name__ == '__main__'" in path.read_text()]
OPTIONS = [(words, command, param) for script in SCRIPTS for words, command in commands(script)
           for param in command.params if isinstance(param, click.Option) and (
               isinstance(param.type, cli.Destination) or param.name in NAMES)]
CHECKED = [option for option in OPTIONS if (option[0][0], option[2].name) not in UNCHECKED]


def test_every_destination_is_checked():
    assert len(CHECKED) > 30
    assert [(words[0], param.name) for words, _, param in OPTIONS if not isinstance(param.type, cli.Destination)] \
        == [option for option in sorted(UNCHECKED, key=lambda option: SCRIPTS.index(option[0]))]


@pytest.fixture(scope='session')
def places(tmp_path_factory):
    """{fault: (path, words of the line)}; of what needs root, where there is root."""
    folder = tmp_path_factory.mktemp('destinations')
    (folder / 'file').write_text('x')
    (folder / 'folder').mkdir()
    made = {'file': (folder / 'file', 'is a file'), 'folder': (folder / 'folder', 'is a folder'),
            'below a file': (folder / 'file' / 'x' / 'y', 'is no folder'), 'proc': ('/proc/x/y.png', 'No such file'),
            'device': ('/dev/null', ('no file that could', 'is a file')), 'empty': ('', 'is empty'),
            'long': (folder / ('x' * 256), 'name too long'), 'long folder': (folder / ('x' * 256) / 'y', 'name too long')}
    with contextlib.ExitStack() as stack:
        for name, options, words in (('read-only', ['-o', 'ro'], 'Read-only'), ('full', ['-o', 'size=4k'], 'No space')):
            path = folder / name
            path.mkdir()
            if not subprocess.run(['mount', '-t', 'tmpfs', *options, 'tmpfs', path], capture_output=True).returncode:
                stack.callback(subprocess.run, ['umount', '-l', path], check=True)
                made[name] = path / 'new' / 'x', words
        if 'full' in made:
            (folder / 'full' / 'filler').write_bytes(bytes(4096))
        before = snapshot(folder)
        yield made
        assert snapshot(folder) == before


def snapshot(folder):
    return sorted(path for path, *_ in os.walk(folder)), sorted(
        os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)


FAULTS = ['file', 'folder', 'below a file', 'proc', 'device', 'empty', 'long', 'long folder', 'read-only', 'full']
KINDS = {'file': {'file'}, 'folder': {'folder'}, 'atomic': {'file', 'folder'}}  # what is no fault


VALUES = {'outstd': '0.1', 'stds': '0.1', 'metric': 'fid'}


def needed(command, without):
    """Words for what a command must be given: the check comes before anything looks at them."""
    for param in command.params:
        if param.required and param is not without:
            value = param.type.choices[0] if isinstance(param.type, click.Choice) else VALUES.get(param.name, '1')
            yield value if isinstance(param, click.Argument) else f'{param.opts[0]}={value}'


CASES = [(*option, fault) for option in CHECKED for fault in FAULTS if fault not in KINDS[option[2].type.name]]


@pytest.mark.parametrize('words, command, param, fault', CASES, ids=[
    f'{" ".join(words)} --{param.name} {fault}' for words, _, param, fault in CASES])
def test_what_cannot_be_written_is_refused_before_the_work(words, command, param, fault, places, monkeypatch, tmp_path):
    if fault not in places:
        pytest.skip('needs root')
    path, texts = places[fault]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, 'callback', lambda **_: pytest.fail('the work has begun'))
    result = CliRunner().invoke(command, [*needed(command, param), f'{param.opts[-1]}={path}'])
    line, = [line for line in result.stderr.splitlines() if not line.startswith(('Usage:', 'Try '))]
    assert result.exit_code == 1 and line.startswith(f'Error: --{param.opts[0].strip("-")}=')
    assert any(text in line for text in ([texts] if isinstance(texts, str) else texts)), line
    assert not os.listdir(tmp_path)


def test_a_place_that_can_be_written_stays_as_it_is(tmp_path):
    (tmp_path / 'old').write_text('x')
    (tmp_path / 'link').symlink_to('nowhere')
    for path, kind in (('new/folder/x', 'file'), ('new/folder', 'folder'), ('old', 'file'), ('.', 'folder'),
                       ('.', 'atomic'), ('link', 'file'), ('é' * 127, 'file')):
        util.check_place(tmp_path / path, kind)
    with util.atomic_path(tmp_path / ('é' * 127)) as temp:
        assert os.path.exists(temp)
    assert {path.name for path in tmp_path.iterdir()} == {'old', 'link', 'é' * 127}


@pytest.mark.parametrize('hidden', [False, True])
def test_a_full_disk_names_the_file(tmp_path, hidden):
    """Also where torch.save hides it; errors that name another file are left as they are."""
    with pytest.raises(UserError, match='x.pt cannot be written .No space left on device.; make room'), \
            util.atomic_path(tmp_path / 'x.pt'):
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError:
            if not hidden:
                raise
            raise RuntimeError('unexpected pos 648448 vs 648336')  # noqa: B904 (as of torch.save)
    with pytest.raises(OSError, match='source.zip'), util.atomic_path(tmp_path / 'x.pt'):
        raise OSError(errno.EIO, 'Input/output error', 'source.zip')
    assert not os.listdir(tmp_path)


# --- Several processes ----------------------------------------------------------------------------


def failing(who, tmp_path):
    """A command that fails on the ranks `who`, while the others wait for all."""
    script = tmp_path / 'script.py'
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import click
from dnnlib import UserError, cli
from torch_utils import distributed as dist

@click.command(cls=cli.Command)
@click.option('--number', type=int)
def main(number):
    dist.init()
    if dist.get_rank() in {who}:
        raise UserError('x.png cannot be written')
    dist.barrier()

main()
""")
    return script


@pytest.mark.slow
@pytest.mark.parametrize('who, line', [((0, 1), 'Error: x.png cannot be written'), ((0,), 'Error: x.png cannot be written'),
                                       ((1,), '[rank 1] Error: x.png cannot be written')])
def test_one_of_several_processes_says_what_is_wrong(who, line, tmp_path):
    result = run(failing(who, tmp_path), processes=2, check=False)
    before, summary = result.stderr.split('torch.distributed.elastic.multiprocessing.errors.ChildFailedError')
    ours = [text for text in before.splitlines() if 'x.png' in text]
    assert result.returncode == 1 and ours == [line]
    assert 'gloo' not in result.stderr and result.stderr.count('Traceback') == 1  # torchrun's own
    assert summary.strip().splitlines()[-2].endswith(f': {line}')               # the last but its ruler


@pytest.mark.slow
def test_a_wrong_option_is_said_once(tmp_path):
    result = run(failing((), tmp_path), '--number=x', processes=2, check=False)
    assert result.stderr.count("\nError: Invalid value for '--number'") == 1
