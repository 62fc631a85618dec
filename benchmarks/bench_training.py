"""Training steps of the EDM2 recipe: images/s of a plain implementation and of ours, in one run."""

import copy
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from benchmarks.plain_edm2 import PlainEMA, plain_network
    from torch_utils.random import GlobalRandom
    from training.diffusion.losses import EDM2Loss
    from training.ema import Averages, power
    from training.networks import build_network, compiled

from benchmarks.timing import compare, print_rates

# What is measured: arguments of the network, and images of a step.
NETWORKS = {
    'small': dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=64, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[16, 8]),
    'digits': dict(img_resolution=8, img_channels=3, label_dim=10, model_channels=32, channel_mult=[1, 2], num_blocks=1,
                   attn_resolutions=[4], channels_per_head=32),
    'edm2-xs': dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=128),
    'edm2-s': dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=192),
}


def make_step(net, model, optimizer, ema, batch, device, objective=None):
    """A function that takes one training step on random images, with the loss of EDM2 or another `objective`."""
    objective, random = objective or EDM2Loss(), GlobalRandom(device)
    images = torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution, device=device)
    labels = None
    if net.label_dim:
        labels = torch.eye(net.label_dim, device=device)[torch.arange(batch, device=device) % net.label_dim]
    state = {'nimg': 0}

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss, _ = objective(model, {'images': images, 'labels': labels, 'random': random})
        (loss.sum() / batch).backward()
        for parameter in net.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=0, neginf=0, out=parameter.grad)
        optimizer.step()
        ema.update(net, state['nimg'], batch)
        state['nimg'] += batch

    return step


@click.command(cls=cli.Command)
@click.option('--network', metavar='NAME', type=click.Choice(list(NETWORKS)), default='small', help='|'.join(NETWORKS))
@click.option('--batch', metavar='INT', type=click.IntRange(min=1), default=64, help='Images of a step')
@click.option('--precision', metavar='TYPE', type=click.Choice(['fp32', 'fp16', 'bf16']),
              help='[default: fp16 on a GPU, else fp32]')
@click.option('--compile/--no-compile', default=True, help='Measure torch.compile too')
@click.option('--rounds', metavar='INT', type=click.IntRange(min=1), default=5, help='Measurements of each')
@click.option('--device', metavar='NAME', help='cpu or cuda  [default: cuda if there is one]')
def main(network, batch, precision, compile, rounds, device):
    """Compare one training step (loss, backward pass, Adam, two averages) of the plain and the optimised code."""
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    precision = precision or ('fp16' if device.type == 'cuda' else 'fp32')
    torch.manual_seed(0)
    ours = build_network('Precond', precision=precision, **NETWORKS[network]).train().to(device)
    plain = plain_network(ours)
    steps = {
        'plain': make_step(plain, plain, torch.optim.Adam(plain.parameters(), lr=1e-3, betas=(0.9, 0.99), foreach=False),
                           PlainEMA(plain, [0.05, 0.10]), batch, device)}
    for name in ['optimised'] + ['optimised, compiled'] * compile:
        net = copy.deepcopy(ours)
        model = compiled(net) if 'compiled' in name else net
        steps[name] = make_step(net, model, torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True),
                                Averages(net, power([0.05, 0.10])), batch, device)
    seconds = compare(steps, rounds, warmup=2)
    print_rates(f'Training step, {network}, batch {batch}, {precision}, {device.type}', seconds, batch)


if __name__ == '__main__':
    main()
