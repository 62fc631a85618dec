"""Attacks on classifiers within a ball of the l-infinity norm."""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient descent (arXiv 1706.06083): `steps` steps of `step_size` within `eps`,
    for pixels in [0, 1]."""

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10


def pgd(net, images, labels, attack: Attack, random):
    """Images [N,C,H,W] in [0, 1] that differ from the given ones by at most `attack.eps` and raise
    the loss of `net`.

    x <- clip(x + step_size sign(grad_x CE(net(x), labels)), images - eps, images + eps) in [0, 1],
    from a uniform point of the ball that `random.rand` draws. `labels` int64 [N]. Nothing reaches
    the gradients of the network's parameters, and no statistics of batch normalisation change.
    """
    low = (images - attack.eps).clamp(min=0)
    high = (images + attack.eps).clamp(max=1)
    start = images + attack.eps * (2 * random.rand(images.shape, device=images.device) - 1)
    x = torch.clamp(start, low, high)
    with _frozen_statistics(net), torch.enable_grad():
        for _ in range(attack.steps):
            x.requires_grad_()
            loss = F.cross_entropy(net(x).float(), labels, reduction='sum')
            (gradient,) = torch.autograd.grad(loss, x)
            x = torch.clamp(x.detach() + attack.step_size * gradient.sign(), low, high)
    return x.detach()


@contextlib.contextmanager
def _frozen_statistics(net):
    """Forward passes in training mode normalise by their batch, as they do in training, but leave
    the running means."""
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
