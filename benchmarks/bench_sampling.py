"""Sampling from an EDM2 network: images/s of a plain implementation and of ours, in one run."""

import copy
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from benchmarks.plain_edm2 import plain_network
    from training.diffusion import samplers
    from training.networks import build_network, compiled

from benchmarks.bench_training import NETWORKS
from benchmarks.timing import compare, print_rates


@click.command(cls=cli.Command)
@click.option('--network', metavar='NAME', type=click.Choice(list(NETWORKS)), default='small', help='|'.join(NETWORKS))
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=64, help='Images at a time')
@click.option('--steps', metavar='INT', type=click.IntRange(min=1), default=32, help='Sampling steps')
@click.option('--precision', metavar='TYPE', type=click.Choice(['fp32', 'fp16', 'bf16']),
              help='[default: fp16 on a GPU, else fp32]')
@click.option('--compile/--no-compile', default=True, help='Measure torch.compile too')
@click.option('--rounds', metavar='INT', type=click.IntRange(min=1), default=3, help='Measurements of each')
@click.option('--device', metavar='NAME', help='cpu or cuda  [default: cuda if there is one]')
def main(network, batch, steps, precision, compile, rounds, device):
    """Compare the sampler on the plain and on the optimised network."""
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    precision = precision or ('fp16' if device.type == 'cuda' else 'fp32')
    torch.manual_seed(0)
    ours = build_network('Precond', precision=precision, **NETWORKS[network]).eval().requires_grad_(False).to(device)
    noise = torch.randn(batch, ours.img_channels, ours.img_resolution, ours.img_resolution, device=device)
    labels = torch.eye(ours.label_dim, device=device)[torch.arange(batch, device=device) % ours.label_dim]
    networks = {'plain': plain_network(ours), 'optimised': ours}
    if compile:
        networks['optimised, compiled'] = compiled(copy.deepcopy(ours))

    def sampler(net):
        def sample():
            with torch.inference_mode():
                samplers.sample(net, noise, labels, name='edm2', num_steps=steps)
        return sample

    seconds = compare({name: sampler(net) for name, net in networks.items()}, rounds)
    print_rates(f'Sampling, {network}, {steps} steps, batch {batch}, {precision}, {device.type}', seconds, batch)


if __name__ == '__main__':
    main()
