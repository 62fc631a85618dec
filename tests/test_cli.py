"""Command lines: what the library says of a field, a script says of its option."""

import errno
import re
import signal
import subprocess
import sys

import click
import helpers
import pytest
import torch
import tqdm
from click.testing import CliRunner

from dnnlib import UserError, cli, progress
from dnnlib.util import parse_int_list, renamed_fields
from torch_utils import distributed


@pytest.mark.parametrize('field, value, printed', [
    ('batch_gpu', 0, '--batch-gpu=0 must be at least 1'),
    ('batch_gpu', None, '--batch-gpu: must be at least 1'),
    ('dest', 'x.png', '--grid=x.png must be at least 1'),       # renamed on the way
    ('source', 'x.zip', 'x.zip must be at least 1'),            # the command has no such option
    ('source', None, 'must be at least 1'),
    (None, None, 'must be at least 1'),
])
def test_errors_name_the_option_of_the_command(field, value, printed):
    @click.command(cls=cli.Command)
    @click.option('--batch-gpu')
    @click.option('--grid', '-g')
    def main(batch_gpu, grid):
        with renamed_fields(dest='grid'):
            raise UserError('must be at least 1', field=field, value=value)

    result = CliRunner().invoke(main, [])
    assert (result.exit_code, result.output) == (1, f'Error: {printed}\n')


@pytest.mark.parametrize('text', ['\x1b]0;owned\x07', '\x1b[2J', 'a\x9b31m', '\u202egnp.exe', '\u2066x', 'a\x08b', '\udcff'])
def test_no_text_of_a_file_reaches_the_terminal_as_a_code(text):
    """Whatever prints it; ends of lines stay, and how tqdm moves between its bars."""
    @click.command(cls=cli.Command)
    @click.option('--number', type=int)
    def main(number):
        print(text + '\nä\tb\rc')
        print(text, file=sys.stderr)
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stdout.write('\n\x1b[A\x1b[A')
        raise UserError(f'{text}\nError')

    result = CliRunner().invoke(main, [])
    shown = ''.join(c if c.isprintable() else '?' for c in text)
    assert result.stdout == f'{shown}\nä\tb\rc\n\n\x1b[A\x1b[A'
    assert result.stderr.splitlines()[:2] == [shown] * 2 and result.stderr.endswith(f'Error: {shown}?Error\n')
    assert text not in CliRunner().invoke(main, [f'--number={text}']).output


def test_sigterm_unwinds_and_ends_in_one_line(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    unwound = []

    @click.group(cls=cli.Group)
    def group():
        pass

    @group.command()
    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(signal.getsignal(signal.SIGTERM))

    result = CliRunner().invoke(group, ['work'])
    assert (result.exit_code, result.output) == (143, 'Stopped by SIGTERM\n')
    assert signal.getsignal(signal.SIGTERM) == before != unwound[0]

    # One of several processes may be waiting, outside of Python, for one that has ended.
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(signal, 'raise_signal', lambda number: None)
    CliRunner().invoke(group, ['work'])
    assert unwound[1] == before


@pytest.mark.parametrize('number, status, said', [
    (signal.SIGTERM, 143, 'Stopped by SIGTERM\n'), (signal.SIGINT, 1, 'Aborted!\n')])
def test_a_signal_within_a_finaliser_is_not_lost(number, status, said, tmp_path):
    script = tmp_path / 'x.py'
    script.write_text("""
import click, signal, sys, time
from dnnlib import cli

class Finalised:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))

@click.command(cls=cli.Command)
@click.argument('number')
def main(number):
    Finalised()
    time.sleep(60)

main()
""")
    process = helpers.run(script, str(int(number)), check=False, PYTHONPATH=str(helpers.ROOT))
    assert (process.returncode, process.stderr.lstrip()) == (status, said)


@pytest.mark.parametrize('text, fault', [
    ('9223372036854775808', 'is too large; numbers are below 2^63'),
    ('0,5-99999999999', '5-99999999999 are too many numbers at once')])
def test_lists_of_numbers_that_do_not_fit_are_refused(text, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        parse_int_list(text)
    assert parse_int_list('1,9223372036854775807') == [1, 2**63 - 1]


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_full_disk_is_one_line(wrapped):
    @click.command(cls=cli.Command)
    def main():
        try:
            raise OSError(errno.ENOSPC, 'No space left on device', 'x.pt')
        except OSError:
            if not wrapped:
                raise
            raise RuntimeError('unexpected pos 648448 vs 648336')  # noqa: B904 (as of torch.save)

    result = CliRunner().invoke(main, [])
    assert result.exit_code == 1
    assert result.stderr == 'Error: x.pt: No space left on device; make room, or choose another place\n'


ENDING = """
import atexit, time
import click
from dnnlib import cli
@click.command(cls=cli.Command)
def main():
    atexit.register(lambda: (print('ending', flush=True), time.sleep(30)))
main()
"""


def test_a_lost_process_is_one_line():
    @click.command(cls=cli.Command)
    def main():
        raise RuntimeError('[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1.')

    assert CliRunner().invoke(main, []).output == 'Error: another of the processes has ended, or cannot be reached\n'


def test_ctrl_c_while_python_ends_is_silent():
    process = subprocess.Popen([sys.executable, '-c', ENDING], cwd=helpers.ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == 'ending\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == '' and process.returncode == -signal.SIGINT


def test_without_a_command_line_the_field_is_named():
    assert str(UserError('must be at least 1', field='batch', value=0)) == 'batch=0 must be at least 1'
    assert str(UserError('x.zip: no such file')) == 'x.zip: no such file'


# --- What float32 means ---------------------------------------------------------------------------

# Every script that trains or samples -> arguments with which it comes to its work.
FLOAT32 = {
    'train.py': ['--outdir=x', '--data=x'],
    'train_edm2.py': ['--outdir=x', '--data=x'],
    'generate_images.py': ['--outdir=x', '--net=x'],
    'calculate_metrics.py gen': ['--net=x'],
    'calculate_metrics.py memorization': ['--net=x', '--data=x'],
    'mem_ratio.py': ['--expdir=x'],
    'reconstruct_phema.py sweep': ['--indir=x', '--stds=0.1', '--metric=fid'],
    'distillation/scripts/dynamic_prepare.py': ['--config=x'],
    'distillation/scripts/image_kd.py': ['--config=x'],
    'distillation/scripts/image_sample.py': ['--config=x', '--model_path=x'],
    'distillation/scripts/image_train.py': ['--config=x', '--data_dir=x'],
    'long_tail/main.py': ['--train'],
    'synthetic_data/generate.py': ['--outdir=x', '--network=x'],
    'synthetic_data/train_classifier.py': ['--outdir=x', '--data=x'],
}
SHARED = ('options.sampling', '@options.training(', '@configs.common_options',
          '@configs.experiment_options', '@options_of_study')


class Reached(Exception):
    """A script has come to its work."""


@pytest.mark.parametrize('script', FLOAT32)
def test_float32_is_float32_unless_asked_otherwise(monkeypatch, script):
    products = torch.backends.cuda.matmul
    set_tf32 = distributed.set_tf32

    def reached(*args):
        set_tf32(*args)
        raise Reached

    monkeypatch.setattr(distributed, 'set_tf32', reached)
    name, *command = script.split()
    for option in ([], ['--precision=fp32'], ['--precision=tf32']):
        set_tf32(True)
        result = CliRunner().invoke(
            helpers.script_module(name).main, [*command, *FLOAT32[script], *option])
        assert isinstance(result.exception, Reached), result.output
        fast = option == ['--precision=tf32']
        assert (products.allow_tf32, torch.backends.cudnn.allow_tf32) == (fast, fast)
        assert not products.allow_fp16_reduced_precision_reduction
        assert not products.allow_bf16_reduced_precision_reduction
    set_tf32(False)


def test_no_script_is_left_out():
    scripts = {str(path.relative_to(helpers.ROOT)) for path in helpers.project_files()
               if any(shared in path.read_text() for shared in SHARED)}
    assert scripts == {script.split()[0] for script in FLOAT32}


# --- Progress -------------------------------------------------------------------------------------


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys):
    """And nothing at all of what is done within a minute."""
    now = [0.0]

    def work(seconds, **options):
        with progress.bar(total=300, unit='image', desc='Measuring', **options) as bar:
            bar._time = lambda: now[0]
            bar.start_t = bar.last_print_t = now[0]
            for _ in range(300):
                now[0] += seconds / 300
                bar.update(1)
                tqdm.tqdm.write('said meanwhile', file=sys.stdout)
        return capsys.readouterr().err

    assert work(50) == '' and work(3000, show=False) == ''
    lines = work(310).splitlines()
    assert len(lines) == 6 and all(line.startswith('Measuring: ') and line.isprintable() for line in lines)
    assert '100%' in lines[-1] and '300/300' in lines[-1]
    for item in progress.bar(range(3)):
        assert item in range(3)
    assert capsys.readouterr().err == ''


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, 'isatty', lambda: True, raising=False)
    with progress.bar(total=10, delay=0, mininterval=0) as bar:
        bar.update(10)
    assert '\r' in capsys.readouterr().err
