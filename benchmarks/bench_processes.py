"""Training on two processes against one: efficiency of two cores, bytes and messages of a step.

Each process has one thread. Both train the same global batch, so that two would take half the time if nothing were lost.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch
    import torch.distributed

    from torch_utils import distributed as dist
    from training.ema import Averages, power
    from training.networks import build_network

from benchmarks.bench_training import NETWORKS, make_step


def worker(batch: int, steps: int, network: str) -> dict:
    """Trains in this process (of as many as torchrun started): seconds of a step, bytes and messages of its exchange."""
    torch.set_num_threads(1)
    dist.init()
    torch.manual_seed(0)
    net = build_network('Precond', precision='fp32', **NETWORKS[network]).train()
    share = batch // dist.get_world_size()
    seen = {'bytes': 0, 'messages': 0}
    model = net
    if dist.get_world_size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

        def count(state, bucket):  # what DDP does by default, counted
            buffer = bucket.buffer()
            seen['bytes'] += buffer.numel() * buffer.element_size()
            seen['messages'] += 1
            future = torch.distributed.all_reduce(buffer.div_(dist.get_world_size()), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])
        model.register_comm_hook(None, count)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    step = make_step(net, model, optimizer, Averages(net, power([0.05, 0.10])), share, 'cpu')
    step()
    step()  # after the first, DDP lays out its messages anew
    seen.update(bytes=0, messages=0)
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    dist.barrier()
    seconds, used = (time.perf_counter() - start) / steps, sum(dist.gather_objects(time.process_time() - used)) / steps
    return {'seconds': seconds, 'cpu': used, 'bytes': seen['bytes'] // steps, 'messages': seen['messages'] // steps}


def _run(processes, batch, steps, network) -> dict:
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [*launcher, __file__, '--worker', f'--batch={batch}', f'--steps={steps}', f'--network={network}']
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{done.stderr[-2000:]}')
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{')))


def measure(batch: int = 64, steps: int = 6, network: str = 'small') -> dict:
    """Seconds of a step of one process ('one') and of two ('two'), processor seconds of all processes ('one_cpu', 'two_cpu':
    what two do in excess is lost on quiet cores too), and what each of the two sends: 'bytes', 'messages'."""
    one, two = (_run(processes, batch, steps, network) for processes in (1, 2))
    return {'one': one['seconds'], 'two': two['seconds'], 'one_cpu': one['cpu'], 'two_cpu': two['cpu'], 'bytes': two['bytes'],
            'messages': two['messages'], 'batch': batch}


@click.command(cls=cli.Command)
@click.option('--batch', metavar='INT', type=click.IntRange(min=2), default=64, help='Images of a step of all processes')
@click.option('--steps', metavar='INT', type=click.IntRange(min=1), default=6, help='Steps')
@click.option('--network', metavar='NAME', type=click.Choice(list(NETWORKS)), default='small', help='|'.join(NETWORKS))
@click.option('--worker', 'is_worker', is_flag=True, hidden=True)
def main(batch, steps, network, is_worker):
    """Compare one training process with two, over gloo."""
    if is_worker:
        result = worker(batch, steps, network)
        dist.print0(json.dumps(result))
        dist.shutdown()
        return
    result = measure(batch, steps, network)
    print(f'one process {result["one"]:.3f} s a step, two {result["two"]:.3f} s: efficiency '
          f'{result["one"] / result["two"] / 2:.0%} ({result["one_cpu"] / result["two_cpu"]:.0%} by processor time); '
          f'{result["bytes"] / 2**20:.2f} MiB in {result["messages"]} messages a step')


if __name__ == '__main__':
    main()
