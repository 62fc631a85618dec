"""Files that appear only when complete (`dnnlib.util.atomic_path`), and what killed processes leave of them."""

import os
import resource
import subprocess
import sys

import helpers
import pytest
import torch

from dnnlib.util import UserError, atomic_path, remove_leftovers
from training.snapshot import write_state

WRITER = """
import sys
from dnnlib.util import atomic_path
with atomic_path(sys.argv[1], is_folder=len(sys.argv) > 2) as temp:
    print(temp, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writing():
    """Starts a process that is writing a file or folder; (process, temporary path)."""
    processes = []

    def start(*args):
        process = subprocess.Popen([sys.executable, '-c', WRITER, *map(str, args)], cwd=helpers.ROOT, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('kind', [(), ('folder',)])
def test_what_a_killed_process_was_writing_is_removed_by_the_next(tmp_path, writing, kind):
    """Of the same name, and only if its writer is gone."""
    dest = tmp_path / 'x.npz'
    killed, left = writing(dest, *kind)
    other, left_of_other = writing(tmp_path / 'y.npz')
    alive, kept = writing(dest, *kind)
    assert os.path.exists(left)                                # while its writer lives
    for process in (killed, other):
        process.kill()
        process.wait()
    with atomic_path(dest, is_folder=bool(kind)):
        pass
    assert not os.path.exists(left) and os.path.exists(left_of_other) and os.path.exists(kept)
    remove_leftovers(tmp_path)
    assert {str(path) for path in tmp_path.iterdir()} == {str(dest), kept}
    alive.communicate('')                                      # ends its block
    assert alive.returncode == 0 and os.listdir(tmp_path) == ['x.npz']


def test_after_an_error_nothing_is_left(tmp_path):
    for is_folder in (False, True):
        with pytest.raises(ValueError), atomic_path(tmp_path / 'x', is_folder=is_folder):
            raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_network_that_finds_the_disk_full_says_so(tmp_path):
    """torch.save says that a position is unexpected; a process hands on to another the error alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        with pytest.raises(UserError, match='x.pt cannot be written .File too large.; make room'):
            write_state(tmp_path / 'x.pt', {'x': torch.zeros(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
