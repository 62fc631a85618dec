"""Fixtures: real pictures where there are any, small archives and networks where there are none."""

import os
import pathlib
import signal

import pytest
import torch

pytest_plugins = ['synthetic']  # fixtures of the synthetic-data study

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_configure(config):
    # Several pytest workers and torchrun children share the cores.
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    # What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def real_data():
    """Folder with the real CIFAR-10 and ImageNet pictures ($PICTURES, else ../shared/data beside the checkout)."""
    folder = pathlib.Path(os.environ.get('PICTURES', ROOT.parent / 'shared' / 'data'))
    if not (folder / 'imagenet-mini.tar').is_file():
        pytest.skip(f'needs the real pictures, which are not in {folder} (set PICTURES)')
    return folder
