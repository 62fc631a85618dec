"""Processes: the same script runs alone, under torchrun, or under any MPI or SLURM launcher.

Rank and world size come from the environment of the launcher; no MPI library is needed.
"""

import contextlib
import datetime
import os
import platform
import re
import signal
import socket

import numpy as np
import torch
import torch.distributed

from dnnlib import UserError
from dnnlib.util import process_count, project_version, signal_handler
from torch_utils.memory import keep_freed

_host_group = None  # gloo group for agreements between hosts that must not touch the GPU


def init(precision: str | None = None):
    """Joins the process group of the launcher, or sets up a world of one that keeps the memory
    that it has freed, and sets what float32 means there (see `set_tf32`): called again, it does
    only that.

    precision  'tf32' for fast products of float32; else they are exact
    """
    global _host_group
    set_tf32(precision == 'tf32')
    if torch.distributed.is_initialized():
        return
    keep_freed()
    if process_count() == 1:
        os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
    else:
        os.environ.setdefault('MASTER_ADDR', _master_addr())
        os.environ.setdefault('MASTER_PORT',
                              str(29500 + int(os.environ.get('SLURM_JOB_ID', 0)) % 10000))
        backend = 'gloo'
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % count)
            if int(os.environ.get('LOCAL_WORLD_SIZE', 1)) <= count:
                backend = 'cpu:gloo,cuda:nccl'                 # which no two share a GPU with
        timeout = datetime.timedelta(hours=2)
        store, rank, size = next(torch.distributed.rendezvous('env://', timeout=timeout))
        # torchrun on one node keeps its store when it starts the processes again; they would look
        # for each other where the earlier ones were.
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
            store = torch.distributed.PrefixStore(f'attempt-{attempt}', store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size,
                                             timeout=timeout)
        _host_group = torch.distributed.new_group(backend='gloo')


def set_tf32(allowed: bool, convolutions: bool | None = None):
    """Whether a GPU may round the factors of float32 products and convolutions to 10 bits (TF32).

    Sums of half-precision products are in float32 either way.
    """
    products = torch.backends.cuda.matmul
    products.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed if convolutions is None else convolutions
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_bf16_reduced_precision_reduction = False


def has_fast_bf16() -> bool:
    """Whether products of bfloat16 are fast: on GPUs, and on x86 processors with AVX512-BF16 or
    AMX. Of other processors nothing is known, and nothing is said against them.
    """
    if get_device().type != 'cpu' or platform.machine() != 'x86_64':
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uses_tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


@contextlib.contextmanager
def exact_float32():
    """Float32 is exact in the block, or in the function that this decorates."""
    before = uses_tf32(), torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(*before)


def launch(function, args: tuple, processes: int) -> int:
    """Runs function(*args) in so many new processes of this machine, which find each other in
    `init`.

    `function` and `args` can be pickled. SIGTERM and SIGINT are passed on. Returns 0, or the exit
    status of the process that failed first, after which the others are ended.
    """
    from torch import multiprocessing
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    children = multiprocessing.start_processes(_launched, (function, args, processes, port),
                                               processes, join=False,
                                               start_method='spawn')

    def pass_on(number, frame):
        for pid in children.pids():
            os.kill(pid, number)

    with signal_handler(signal.SIGTERM, pass_on), signal_handler(signal.SIGINT, pass_on):
        try:
            while not children.join():
                pass
        except multiprocessing.ProcessExitedException as error:
            return error.exit_code if error.exit_code > 0 else 1
    return 0


def _launched(rank, function, args, processes, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                      MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    function(*args)


def _master_addr() -> str:
    """The first node of a SLURM job: 'node[03-07,09]' -> the address of 'node03'."""
    first = re.match(r'([^,[]+)\[?([^],-]*)', os.environ.get('SLURM_JOB_NODELIST', ''))
    return socket.gethostbyname(first[1] + first[2]) if first else '127.0.0.1'


def get_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def get_world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def get_device() -> torch.device:
    """This process's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device('cuda', torch.cuda.current_device())
    return torch.device('cpu')


def environment() -> dict:
    """Versions and machine, for the record."""
    device = get_device()
    return {
        'time': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__,
        'project': project_version(),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'processes': get_world_size(), 'tf32': uses_tf32(),
    }


def print0(*args, **kwargs):
    """Prints on the first process only."""
    if get_rank() == 0:
        print(*args, **kwargs, flush=True)


def barrier():
    """Waits until every process has come here (on the host; the GPU is not involved)."""
    if get_world_size() > 1:
        torch.distributed.barrier(group=_host_group)


def any_rank(flag: bool) -> bool:
    """True on every process if `flag` is true on any. Hosts agree among themselves, the GPU is not
    synchronised.
    """
    if get_world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=_host_group)
    return bool(value)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the tensor over all processes (in place); the tensor itself in a world of one."""
    if get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value) -> list:
    """The value of every process, in rank order, on every process. Plain containers and tensors of
    our own making.
    """
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    torch.distributed.all_gather_object(values, value, group=_host_group)
    return values


def raise_shared(error: UserError | None):
    """Raises on every process what one of them has found, that of the first that has."""
    found = [error for error in gather_objects(error) if error is not None]
    if found:
        found[0].is_shared = True
        raise found[0]


def broadcast_object(value):
    """The value of rank 0 on every process."""
    return gather_objects(value)[0]


def host_group():
    """The processes, for who exchanges what is in the memory of hosts."""
    return _host_group


def is_sharded(value) -> bool:
    """Whether it is a tensor of which each process has some rows (training.shards)."""
    return hasattr(value, 'to_local')


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor in shards; another one as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@contextlib.contextmanager
def rank0_first():
    """Rank 0 runs the block before the others do: for downloads and caches that the others then
    find.
    """
    if get_rank() != 0:
        barrier()
    yield
    if get_rank() == 0:
        barrier()


def shutdown():
    """Leaves the process group."""
    global _host_group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        _host_group = None
