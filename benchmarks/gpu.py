"""Everything that is measured on a GPU, in one call of less than nine minutes.

    python benchmarks/gpu.py --dest=gpu.json
    python benchmarks/gpu.py --tiny --device=cpu --dest=tiny.json      # whether it all runs

Training steps of four networks (plain, optimised, compiled; float16 and bfloat16), generation, features for FID, and a profile
of the training loop. Each part runs in a process of its own that is ended when its share of the time is spent, what
it has measured until then is kept, and what a part leaves over goes to those after it.
"""

import copy
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import UserError, cli, lazy
from dnnlib.util import write_json

with lazy.imports(__name__ == '__main__'):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.plain_edm2 import PlainEMA, plain_network
    from training.diffusion.losses import DDPMLoss, EDM2Loss, EDMLoss
    from training.ema import Averages, power
    from training.encoders import make_encoder
    from training.generate import generate_images
    from training.networks import build_network, compiled

from benchmarks.bench_training import NETWORKS as EDM2_NETWORKS
from benchmarks.bench_training import make_step
from benchmarks.timing import PeakMemory, compare, synchronize

# Dense bf16 (and fp16) matrix rates of the makers' data sheets, FLOP/s.
DATA_SHEET = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'A100': 312e12}
DDPMPP = dict(img_resolution=32, img_channels=3, label_dim=0, model_type='SongUNet', embedding_type='positional',
              channel_mult_noise=1, resample_filter=[1, 1], model_channels=128, channel_mult=[2, 2, 2], num_blocks=4,
              attn_resolutions=[16], dropout=0.13)
ADM_57M = dict(class_name='ADMUNet', image_size=32, num_channels=128, num_res_blocks=3, num_heads=4, num_head_channels=32,
               attention_resolutions='16,8', dropout=0.3, use_scale_shift_norm=True, resblock_updown=True,
               use_new_attention_order=True, learn_sigma=True)
TINY = {'Precond': dict(img_resolution=8, img_channels=4, label_dim=10, model_channels=16, channel_mult=[1, 2], num_blocks=1,
                        attn_resolutions=[4], channels_per_head=16),
        'EDMPrecond': DDPMPP | dict(img_resolution=8, model_channels=32, channel_mult=[1, 2], num_blocks=1,
                                    attn_resolutions=[4]),
        'DiscreteDenoiser': dict(diffusion={}, network=ADM_57M | dict(
            image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,2', attention_resolutions='4'))}
# name: (class, arguments, images of a step, seconds of its share)
TRAINING = {
    'edm2-xs': ('Precond', EDM2_NETWORKS['edm2-xs'], 256, 115),
    'edm2-s': ('Precond', EDM2_NETWORKS['edm2-s'], 128, 105),
    'ddpmpp': ('EDMPrecond', DDPMPP, 512, 85),
    'adm-57m': ('DiscreteDenoiser', dict(diffusion={}, network=ADM_57M), 128, 75),
}
OTHERS = {'loop': 30, 'generate': 70, 'fid': 30}


# --- Parts ------------------------------------------------------------------------------------------------------------

class Part:
    """What a part of the measurement needs: options, and a file to which each row goes as soon as it is there."""

    def __init__(self, device, tiny, compile, rows_path):
        self.device, self.tiny, self.compile, self.path = torch.device(device), tiny, compile, rows_path
        self.precisions = ['fp16', 'bf16'] if self.device.type == 'cuda' else ['fp32', 'bf16']

    def add(self, **row):
        with open(self.path, 'a') as file:
            file.write(json.dumps(row) + '\n')
        print(json.dumps(row), flush=True)

    def network(self, name, precision):
        class_name, kwargs, batch, _ = TRAINING[name]
        kwargs = TINY[class_name] if self.tiny else kwargs
        torch.manual_seed(0)
        if class_name == 'DiscreteDenoiser':
            kwargs = kwargs | dict(network=kwargs['network'] | dict(precision=precision))
        else:
            kwargs = kwargs | dict(precision=precision)
        return build_network(class_name, **kwargs).to(self.device), 4 if self.tiny else batch


def objective_of(name, net):
    if name.startswith('edm2'):
        return EDM2Loss()
    return EDMLoss() if name == 'ddpmpp' else DDPMLoss(net.diffusion)


def plain_of(net):
    """The same mathematics, written plainly; of networks other than EDM2's it is the step around them that is plain."""
    return plain_network(net) if net.class_name == 'Precond' else copy.deepcopy(net)


def step_of(name, net, model, fast, batch, device):
    """A training step of `net` through `model`: with fused optimizer and averages, or one tensor after the other."""
    options = dict(lr=1e-4, betas=(0.9, 0.99))
    optimizer = torch.optim.Adam(net.parameters(), **options, **(dict(fused=True) if fast else dict(foreach=False)))
    stds = [0.05, 0.10]
    ema = Averages(net, power(stds)) if fast else PlainEMA(net, stds)
    step = make_step(net, model, optimizer, ema, batch, device, objective_of(name, net))
    if fast:
        return step

    def plain_step():
        with sdpa_kernel(SDPBackend.MATH):
            step()
    return plain_step


def flops_of(step) -> float:
    """Floating-point operations of a step: matrix products and convolutions, two for each multiplication with addition."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@functools.cache
def matrix_rate(device, size=8192) -> float:
    """FLOP/s of a large bf16 matrix product on this device: what can be reached."""
    size = size if device.type == 'cuda' else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = compare({'mm': lambda: [a @ b for _ in range(10)]}, rounds=5, warmup=2)['mm']
    return 10 * 2 * size**3 / seconds


def data_sheet_rate(device) -> float | None:
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in DATA_SHEET.items() if all(word in name for word in key.split())), None)


def train_part(part, name):
    """Training steps: plain and optimised of both precisions first, then, while there is time, compiled."""
    flops = {}
    for compiling in [False] + [True] * part.compile:
        for precision in part.precisions:
            for kind in ('compiled',) if compiling else ('plain', 'optimised'):
                net, batch = part.network(name, precision)
                net = plain_of(net.train()) if kind == 'plain' else net.train()
                model = compiled(net) if kind == 'compiled' else net
                start = time.perf_counter()
                step = step_of(name, net, model, kind != 'plain', batch, part.device)
                if name not in flops:
                    flops[name] = flops_of(step)
                try:
                    step()
                    synchronize()
                    first = time.perf_counter() - start
                    with PeakMemory(part.device) as memory:
                        step()
                    seconds = compare({'step': step}, rounds=2 if part.tiny else 10, warmup=1)['step']
                except torch.cuda.OutOfMemoryError:
                    part.add(workload=f'train {name}', kind=kind, precision=precision, batch=batch, error='out of memory')
                    torch.cuda.empty_cache()
                    continue
                rate = flops[name] / seconds
                sheet = data_sheet_rate(part.device)
                weights = torch.cuda.max_memory_allocated() / 2**30 if part.device.type == 'cuda' else None
                part.add(workload=f'train {name}', kind=kind, precision=precision, batch=batch, seconds=seconds,
                         images_per_second=batch / seconds, memory=memory.gib, memory_in_all=weights, tflops=rate / 1e12,
                         first_step=first,
                         share_of_matrix_rate=rate / matrix_rate(part.device), share_of_data_sheet=sheet and rate / sheet)
                del net, model, step
                if part.device.type == 'cuda':
                    torch.cuda.empty_cache()


def loop_part(part):
    """The training loop itself: waits of host for device, and of the loop for the data loader."""
    from benchmarks.loop_profile import profile_loop
    net, batch = part.network('edm2-xs', part.precisions[0])
    part.add(workload='loop edm2-xs', **profile_loop(net.train(), 8 if part.tiny else batch, 3 if part.tiny else 8))


def generate_part(part):
    """Images with 32 steps of EDM2-XS latents (not decoded), one batch of each kind, and what 50,000 of them take."""
    encoder = make_encoder({'name': 'rgb'})
    for compiling in [False] + [True] * part.compile:
        for precision in part.precisions[:1] if compiling else part.precisions:
            for kind in ('compiled',) if compiling else ('plain', 'optimised'):
                net, batch = part.network('edm2-xs', precision)
                net = net.eval().requires_grad_(False)
                net = plain_of(net) if kind == 'plain' else net
                model = compiled(net) if kind == 'compiled' else net
                steps = 2 if part.tiny else 32

                def generate(model=model, batch=batch, steps=steps):
                    encoder.decode = lambda latents: latents  # the network's share alone
                    list(generate_images(model, encoder, range(batch), batch=batch,
                                         sampler=dict(name='edm2', num_steps=steps)))
                with torch.inference_mode():
                    model(torch.zeros(batch, net.img_channels, net.img_resolution, net.img_resolution, device=part.device),
                          torch.ones([], device=part.device), torch.zeros(batch, net.label_dim, device=part.device))
                with PeakMemory(part.device) as memory:
                    seconds = compare({'batch': generate}, rounds=1, warmup=0)['batch']
                part.add(workload='generate edm2-xs', kind=kind, precision=precision, batch=batch, steps=steps,
                         seconds=seconds, images_per_second=batch / seconds, memory=memory.gib,
                         hours_of_50000=50000 * seconds / batch / 3600)


def fid_part(part):
    """Features for FID of 256x256 images in batches of 64 (float32 without TF32: published numbers need it)."""
    from metrics.inception import InceptionV3
    torch.manual_seed(0)
    plain = InceptionV3().eval().requires_grad_(False).to(part.device)
    batch, side = (2, 32) if part.tiny else (64, 256)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=part.device)
    networks = {'plain': plain, 'optimised': copy.deepcopy(plain).to(memory_format=torch.channels_last)}
    for kind, net in networks.items():
        def features(net=net):
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return net(images)['pool3']
        with PeakMemory(part.device) as memory:
            features()
        seconds = compare({'batch': features}, rounds=2 if part.tiny else 10, warmup=1)['batch']
        part.add(workload='FID features', kind=kind, precision='fp32', batch=batch, seconds=seconds,
                 images_per_second=batch / seconds, memory=memory.gib)


PARTS = {name: functools.partial(train_part, name=name) for name in TRAINING}
PARTS |= {'loop': loop_part, 'generate': generate_part, 'fid': fid_part}
SHARES = {name: row[3] for name, row in TRAINING.items()} | OTHERS


# --- All of them ------------------------------------------------------------------------------------------------------

def measure(device='cuda', tiny=False, compile=True, seconds=520, only=(), dest=None) -> list[dict]:
    """Runs the parts one after the other in processes of their own; rows of results, also of parts that were cut short."""
    if torch.device(device).type == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device=cuda: torch sees no GPU here; --tiny --device=cpu tries the script')
    end, rows, left = time.monotonic() + seconds, [], [name for name in PARTS if not only or name in only]
    with tempfile.TemporaryDirectory() as folder:
        while left:
            name, *left = left
            limit = end - time.monotonic() - sum(SHARES[other] for other in left) * seconds / sum(SHARES.values())
            path = os.path.join(folder, f'{name}.jsonl')
            command = [sys.executable, __file__, f'--device={device}', f'--part={name}', f'--rows={path}',
                       f'--compile={compile}', *['--tiny'] * tiny]
            problem = None
            try:
                done = subprocess.run(command, timeout=max(limit, 1), stdout=sys.stderr)
                problem = f'ended with status {done.returncode}' if done.returncode else None
            except subprocess.TimeoutExpired:
                problem = f'ended after {limit:.0f} s, its share of the time'
            if os.path.exists(path):
                with open(path) as file:
                    lines = [line for line in file if line.endswith('\n')]
                rows += [json.loads(line) for line in lines]
            if problem:
                rows.append({'workload': name, 'error': problem})
            if dest:
                write_json(dest, report(device, rows))
    return rows


def report(device, rows) -> dict:
    cuda = torch.device(device).type == 'cuda'
    return {'device': torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            'torch': torch.__version__, 'python': platform.python_version(), 'rows': rows}


def table(rows) -> str:
    lines = [f'{"workload":18} {"kind":10} {"type":5} {"images/s":>10} {"ratio":>6} {"GiB":>6} {"TFLOP/s":>8} '
             f'{"of bf16 rate":>12}']
    plain = {}
    for row in rows:
        if 'images_per_second' not in row:
            lines.append(f'{row["workload"]:18} ' + ', '.join(f'{k} {v}' for k, v in row.items() if k != 'workload'))
            continue
        key, rate = (row['workload'], row['precision']), row['images_per_second']
        if row['kind'] == 'plain':
            plain[key] = rate
        ratio = f'{rate / plain[key]:.2f}' if key in plain else ''
        flops = f'{row["tflops"]:8.1f} {row["share_of_matrix_rate"]:12.1%}' if 'tflops' in row else ''
        lines.append(f'{row["workload"]:18} {row["kind"]:10} {row["precision"]:5} {rate:10.1f} {ratio:>6} '
                     f'{row["memory"]:6.2f} {flops}')
    return '\n'.join(lines)


@click.command(cls=cli.Command)
@click.option('--device', metavar='NAME', default='cuda', help='cuda, or cpu to try the script')
@click.option('--tiny', is_flag=True, help='Networks and batches that take seconds anywhere; the numbers mean nothing')
@click.option('--compile', metavar='BOOL', type=bool, default=True, help='Measure torch.compile too')
@click.option('--seconds', metavar='INT', type=click.IntRange(min=1), default=520, help='Time for everything')
@click.option('--only', metavar='NAME', type=click.Choice(list(PARTS)), multiple=True, help='|'.join(PARTS))
@click.option('--dest', metavar='FILE.json', help='Where the rows go, rewritten after each part')
@click.option('--part', hidden=True, type=click.Choice(list(PARTS)))
@click.option('--rows', hidden=True)
def main(device, tiny, compile, seconds, only, dest, part, rows):
    """Measure training, sampling and features on a GPU."""
    if part:
        torch.backends.cudnn.benchmark = True
        PARTS[part](Part(device, tiny, compile, rows))
        return
    print(table(measure(device, tiny, compile, seconds, only, dest)))


if __name__ == '__main__':
    np.random.seed(0)
    main()
