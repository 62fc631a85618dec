"""Claims of torch_utils/parallel.py: what fails side by side is said, and a stop takes no further item."""

import os
import signal
import subprocess
import sys
import time

import helpers
import psutil
import pytest

from dnnlib import UserError
from dnnlib.util import signal_handler
from torch_utils import parallel


def work(item):
    if item == 'wrong':
        raise UserError('is wrong', field='x')
    if item == 'dies':
        os._exit(3)


@pytest.mark.parametrize('item, words', [('wrong', 'x: is wrong'), ('dies', 'exit code 3')])
def test_what_fails_side_by_side_is_said(item, words):
    with pytest.raises(UserError) as error:
        list(parallel.run_side_by_side(work, [item, 'fine'], 2))
    assert words in str(error.value)


@pytest.mark.parametrize('jobs', [1, 2, 9])
def test_all_items_are_done(jobs):
    assert sorted(parallel.run_side_by_side(work, ['a', 'b', 'c'], jobs)) == ['a', 'b', 'c']


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from torch_utils import parallel


def train(item):  # as training does: a signal ends it after some time, and the handlers are put back
    stops = []
    before = {{name: signal.signal(name, lambda *_: stops.append(1))
              for name in (signal.SIGTERM, signal.SIGINT)}}
    open(str(item), 'w').close()
    while not stops and item:  # item 0 is done at once: its process takes another, or waits
        time.sleep(0.01)
    time.sleep(0.3)
    for name, handler in before.items():
        signal.signal(name, handler)
    open(f'{{item}}.stopped', 'w').close()
    if item:
        raise KeyboardInterrupt


if __name__ == '__main__':
    try:
        list(parallel.run_side_by_side(train, range(int(sys.argv[1])), 3))
    except KeyboardInterrupt:
        sys.exit(5)
"""


@pytest.mark.parametrize('send, items', [
    ('TERM', 6), ('TERM', 3), ('INT', 6), ('INT', 3), ('KILL', 6)])
def test_a_stop_reaches_all_and_takes_no_further_item(send, items, tmp_path):
    """SIGTERM, Ctrl-C in a terminal, kill -9: with items that wait, and with a process that does."""
    (tmp_path / 'script.py').write_text(SCRIPT.format(root=str(helpers.ROOT)))
    process = subprocess.Popen([sys.executable, 'script.py', str(items)], cwd=tmp_path, text=True,
                               env=helpers.environment(), stderr=subprocess.PIPE,
                               start_new_session=True)
    running = [tmp_path / name for name in ('0.stopped', '1', '2', '3')[:4 if items > 3 else 3]]
    until = time.monotonic() + 60
    while not all(path.exists() for path in running):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    if send == 'INT':
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, f'SIG{send}'))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (-9 if send == 'KILL' else 5) and not errors
    assert len(family) >= 3 and not psutil.wait_procs(family, timeout=60)[1]
    done = {path.name for path in tmp_path.iterdir()} - {'script.py'}
    started = range(4 if items > 3 else 3)
    assert done == {str(i) for i in started} | {f'{i}.stopped' for i in started}


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tqdm import tqdm
from dnnlib import UserError
from torch_utils import parallel

def train(item):
    for _ in tqdm(range(2), file=sys.stdout):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == '__main__':
    try:
        list(parallel.run_side_by_side(train, range(2), 2))
    except UserError as error:
        print(error, file=sys.stderr)
"""


def test_of_a_killed_worker_one_line_is_said(tmp_path):
    """Nothing of locks of progress bars."""
    (tmp_path / 'script.py').write_text(KILLED.format(root=str(helpers.ROOT)))
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, text=True, env=helpers.environment(),
                          capture_output=True)
    assert done.stderr.startswith('a worker process was killed (exit code -9)') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('error', [EOFError, BrokenPipeError, ConnectionResetError])
def test_a_worker_whose_parent_is_gone_is_silent(monkeypatch, error):
    class Connection:
        def recv(self):
            raise error

    monkeypatch.setattr(parallel, '_follow_parent', lambda: None)
    with signal_handler(signal.SIGTERM, signal.SIG_DFL):
        parallel._work(print, Connection())


def test_a_stop_while_a_worker_ends_is_silent(monkeypatch):
    """SIGTERM of the parent after the last answer, as when Ctrl-C has stopped the item already."""
    class Connection:
        answers = []

        def recv(self):
            return 'item'

        def send(self, answer):
            self.answers.append(answer)
            sys.setprofile(on_leaving)

    def on_leaving(frame, event, _):
        if event == 'call' and frame.f_code.co_name == '__exit__':
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(item):
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, '_follow_parent', lambda: None)
    with signal_handler(signal.SIGTERM, signal.SIG_DFL):
        parallel._work(stopped, Connection())
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert len(Connection.answers) == 1 and Connection.answers[0] is not None
