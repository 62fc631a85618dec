"""Classifiers: what training minimises, how images are augmented, attacks within a ball of the
l-infinity norm, and how accurate they are."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from dnnlib import UserError, progress
from metrics.shares import Share
from torch_utils.random import BlockRandomGenerator
from training.snapshot import load_snapshot


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient descent (arXiv 1706.06083): `steps` steps of `step_size` within `eps`,
    for pixels in [0, 1]."""

    eps: float
    step_size: float
    steps: int


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
    x = start.clamp(low, high)
    # Forward passes in training mode normalise by their batch, as they do in training, but leave
    # the running means.
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    with torch.enable_grad():
        for _ in range(attack.steps):
            x.requires_grad_()
            loss = F.cross_entropy(net(x).float(), labels, reduction='sum')
            (gradient,) = torch.autograd.grad(loss, x)
            x = (x.detach() + attack.step_size * gradient.sign()).clamp(low, high)
    for layer in layers:
        layer.track_running_stats = True
    return x.detach()


def augment(images, random, pad: int, xflip: bool):
    """Each image [N,C,H,W] moved by up to `pad` pixels in both directions (black comes in), and
    mirrored half of the time.

    Draws of `random`: vertical move, horizontal move, mirror.
    """
    N = len(images)
    device = images.device
    rows, columns = (torch.arange(side, device=device) + random.randint(2 * pad + 1, [N])[:, None]
                     for side in images.shape[2:])
    if xflip:
        mirrored = random.randint(2, [N])[:, None] == 1
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, [pad] * 4)
    # Advanced indices with a slice between them put the channels last.
    numbers = torch.arange(N, device=device)[:, None, None]
    return padded[numbers, :, rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous()


@dataclasses.dataclass
class ClassificationLoss:
    """Cross-entropy of a classifier on augmented images, or on the worst ones near them.

    pad, xflip  see `augment`
    smoothing   part of the label that is spread over all classes
    attack      adversarial training (arXiv 1706.06083): the loss at `pgd` of this attack;
                None: plain training
    dtype       of convolutions and products (mixed precision): float32, float16 or bfloat16
    """

    pad: int
    xflip: bool
    smoothing: float = 0.0
    attack: Attack | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, net, batch):
        """(loss [N], {'loss', 'accuracy' on what was trained on}) for `images` [N,3,H,W] in
        [-1, 1] and one-hot `labels`."""
        random = batch['random']
        images = augment((batch['images'] + 1) / 2, random, self.pad, self.xflip)
        labels = batch['labels'].argmax(dim=1)
        is_mixed = self.dtype != torch.float32 and not images.is_meta  # which knows no autocast
        with torch.autocast('cpu' if images.is_meta else images.device.type, self.dtype,
                            enabled=is_mixed):
            if self.attack is not None:
                # The bare network: gradients of an attack are no business of other processes.
                images = pgd(getattr(net, 'module', net), images, labels, self.attack, random)
            logits = net(images).float()
        loss = F.cross_entropy(logits, labels, reduction='none', label_smoothing=self.smoothing)
        return loss, {'loss': loss, 'accuracy': (logits.argmax(dim=1) == labels).float()}


def open_classifier(path: str, model: str | None = None, num_classes: int | None = None,
                    device='cpu'):
    """The classifier in a file: a snapshot of train_classifier.py, or published weights.

    `model` like wrn-28-10 is what it must be; None: whatever it is. It takes x [N,3,H,W] in
    [0, 1], and is in evaluation mode, without gradients. Raises UserError that names the file if
    it is something else, or has other classes.
    """
    net = load_snapshot(path, device).net
    if net.class_name != 'WideResNet':
        raise UserError(f'{path} holds a network {net.class_name}, which is no classifier')
    if model not in (None, net.name):
        raise UserError(f'{path} holds a {net.name}, not a {model}')
    if num_classes not in (None, net.num_classes):
        raise UserError(f'{path} is a classifier of {net.num_classes} classes, not of '
                        f'{num_classes}')
    return net


def batches(data, batch: int, device, rank: int = 0, processes: int = 1):
    """(indices, images [n,3,H,W] in [0, 1], labels [n]) of a labelled data set, `batch` at a time:
    the share of a process."""
    parts = np.split(np.arange(len(data)), range(batch, len(data), batch))[rank::processes]
    for indices in progress.bar(parts, rank == 0, unit='batch'):
        images = torch.from_numpy(data.images(indices)).to(device).float() / 255
        yield indices, images, torch.from_numpy(data.label_ids[indices]).to(device)


@torch.no_grad()
def accuracy(net, dataset, attack: Attack | None = None, batch: int = 256,
             seed: int = 0) -> dict:
    """{'clean', 'robust'}: the part of a labelled data set's images that `net` classifies
    correctly, and that is still correct under `attack`, None without one.

    The random start of image i depends on `seed` and i alone.
    """
    device = next(net.parameters()).device
    clean = 0
    robust = 0
    for indices, images, labels in batches(dataset, batch, device):
        correct = net(images).argmax(dim=1) == labels
        clean += correct.sum().item()
        if attack is not None:
            random = BlockRandomGenerator(device, seed, indices[0], len(indices))
            attacked = pgd(net, images, labels, attack, random)
            robust += (correct & (net(attacked).argmax(dim=1) == labels)).sum().item()
    clean, robust = (Share(correct / len(dataset), len(dataset)) for correct in (clean, robust))
    return {'clean': clean, 'robust': robust if attack else None}
