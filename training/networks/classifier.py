"""Wide residual networks (arXiv 1605.07146): the classifiers that score, select and evaluate
generated images.

State names and shapes are those of the published selection models (`cifar10_pseudo.pt`, ...).
"""

import collections
import re

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib import UserError


class BasicBlock(nn.Module):
    """Pre-activation block. Where the width changes, the shortcut too starts from the activated
    input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x):
        active = F.relu(self.bn1(x), inplace=True)
        h = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return h.add_(x if self.convShortcut is None else self.convShortcut(active))


def _blocks(count: int, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Blocks of one width; the first one changes width and resolution."""
    return nn.Sequential(collections.OrderedDict(layer=nn.Sequential(
        BasicBlock(in_channels, out_channels, stride),
        *(BasicBlock(out_channels, out_channels, 1) for _ in range(count - 1)))))


class _WideResNet(nn.Module):
    """The network on images as it is given them; see `WideResNet`."""

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        count = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = _blocks(count, widths[0], widths[1], 1)
        # never used; published weights hold it
        self.sub_block1 = _blocks(count, widths[0], widths[1], 1)
        self.block2 = _blocks(count, widths[1], widths[2], 2)
        self.block3 = _blocks(count, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')  # variance 2 / (k k out)
        nn.init.zeros_(self.fc.bias)
        # or data-parallel training waits for it
        self.sub_block1.requires_grad_(False)

    def forward(self, x, return_prelogit=False):
        if x.device.type == 'cpu':      # whose convolutions and norms are fastest so
            x = x.contiguous(memory_format=torch.channels_last)
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        features = F.relu(self.bn1(h)).mean([2, 3])
        logits = self.fc(features)
        return (logits, features) if return_prelogit else logits


class Normalize(nn.Module):
    """(x - mean) / std with the statistics of CIFAR-10."""

    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1))
        self.register_buffer('std', torch.tensor([0.2023, 0.1994, 0.2010]).reshape(1, 3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class _Normalized(nn.Sequential):
    def forward(self, x, return_prelogit=False):
        return self[1](self[0](x), return_prelogit=return_prelogit)


def WideResNet(name: str = 'wrn-28-10', num_classes: int = 10,
               normalize_input: bool = False) -> nn.Module:
    """The classifier `wrn-<depth>-<widen>`: net(x [N,3,H,W] in [0,1]) -> logits [N, num_classes].

    `net(x, return_prelogit=True)` also gives the input of the last layer, [N, 64 widen].
    `normalize_input` puts a layer in front, and the state names become `0.mean`, `0.std` and
    `1.<name>`. Raises UserError for other names.
    """
    match = re.fullmatch(r'wrn-(\d{2,4})-([1-9]\d*)', name)
    if match is None or int(match[1]) not in range(10, 10_000, 6):
        raise UserError(f'model {name!r} is not wrn-<depth>-<widen> with depth 10, 16, 22, 28, '
                        '... (6n + 4)')
    net = _WideResNet(int(match[1]), int(match[2]), num_classes)
    if normalize_input:
        net = _Normalized(Normalize(), net)
    net.name = name
    net.num_classes = num_classes
    return net
