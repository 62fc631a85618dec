"""The Inception network of the Frechet Inception distance (TensorFlow's of 2015-12-05).

Szegedy et al. 2015. State names are those of the published file `pt_inception-2015-12-05`. It
differs from the Inception v3 of other libraries: average pooling leaves the padding out of its
count, the last block pools by maximum, and there are 1008 classes.
"""

import torch
from torch import nn
from torch.nn import functional as F

SIZE = 299  # pixels, in height and width
OUTPUTS = ('block0_mean', 'block1_mean', 'block2_mean', 'spatial', 'pool3', 'logits', 'softmax',
           'softmax_nobias')


def half_pixel(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W], 0..255, as ports to PyTorch show them to the network, -1..1.

    Sample i of the output is taken at (i + 1/2) in / out - 1/2 of the input.
    """
    x = images.float() / 255
    return 2 * F.interpolate(x, (SIZE, SIZE), mode='bilinear', align_corners=False) - 1


def tensorflow(images: torch.Tensor) -> torch.Tensor:
    """The same as the TensorFlow graph does it: (x - 128) / 128, -1..1.

    Sample i of the output is taken at i in / out of the input; beyond the last pixel is the last.
    """
    x = images.float()
    for size in x.shape[:1:-1]:  # columns, then rows
        place = torch.arange(SIZE, device=x.device) * (size / SIZE)
        low = place.long()
        x = x[..., low].lerp(x[..., (low + 1).clamp_max(size - 1)], place - low).mT
    return (x - 128) / 128


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. At stride 1 padding keeps the size."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=None):
        super().__init__()
        if padding is None:
            padding = 0 if stride > 1 else 'same'
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


_avg_pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
_max_pool = nn.MaxPool2d(3, 1, 1)
_halve = nn.MaxPool2d(3, 2)
# Spatial means after some layers: layer -> output.
MEANS = {'pool_2': 'block0_mean', 'pool_4': 'block1_mean', 'Mixed_6e': 'block2_mean',
         'Mixed_7c': 'pool3'}


class _Mixed(nn.Module):
    """Branches side by side, their outputs one after the other in the channels.

    A branch is a chain of convolutions (channels, kernel[, stride]), of which the last may be
    several, side by side as well; `branch_pool` begins with `pool`. The i-th convolution of a
    branch is called BRANCH_i, the only one BRANCH, those side by side BRANCH_ia and BRANCH_ib.
    """

    def __init__(self, in_channels, pool, **branches):
        super().__init__()
        self.pool = pool
        self.branches = {}
        for branch, chain in branches.items():
            width = in_channels
            self.branches[branch] = []
            for i, step in enumerate(chain, 1):
                name = f'{branch}_{i}' if len(chain) > 1 else branch
                convs = {name: step}
                if isinstance(step, list):
                    convs = {name + letter: conv for letter, conv in zip('ab', step, strict=True)}
                for name, (channels, *shape) in convs.items():
                    self.add_module(name, _Conv(width, channels, *shape))
                width = channels
                self.branches[branch].append(convs)

    def forward(self, x):
        outputs = []
        for branch, chain in self.branches.items():
            y = self.pool(x) if branch == 'branch_pool' else x
            for convs in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in convs], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _mixed5(in_channels, pooled):
    """Blocks at 35x35."""
    return _Mixed(in_channels, _avg_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                  branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])


def _mixed6(width):
    """Blocks at 17x17; `width` is that of the 7x7 branches."""
    row = (1, 7)
    column = (7, 1)
    return _Mixed(768, _avg_pool, branch1x1=[(192, 1)],
                  branch7x7=[(width, 1), (width, row), (192, column)],
                  branch7x7dbl=[(width, 1), (width, column), (width, row), (width, column),
                                (192, row)],
                  branch_pool=[(192, 1)])


def _mixed7(in_channels, pool):
    """Blocks at 8x8; `pool` is the pooling of the last branch."""
    both = [(384, (1, 3)), (384, (3, 1))]
    return _Mixed(in_channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), both],
                  branch3x3dbl=[(448, 1), (384, 3), both], branch_pool=[(192, 1)])


class InceptionV3(nn.ModuleDict):
    """The network; use it in eval mode. `prepare` is `half_pixel` or `tensorflow`."""

    def __init__(self, prepare=half_pixel):
        super().__init__(dict(
            Conv2d_1a_3x3=_Conv(3, 32, 3, stride=2),
            Conv2d_2a_3x3=_Conv(32, 32, 3, padding=0),
            Conv2d_2b_3x3=_Conv(32, 64, 3),
            pool_2=_halve,
            Conv2d_3b_1x1=_Conv(64, 80, 1),
            Conv2d_4a_3x3=_Conv(80, 192, 3, padding=0),
            pool_4=_halve,
            Mixed_5b=_mixed5(192, pooled=32),
            Mixed_5c=_mixed5(256, pooled=64),
            Mixed_5d=_mixed5(288, pooled=64),
            Mixed_6a=_Mixed(288, _halve, branch3x3=[(384, 3, 2)],
                            branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[]),
            Mixed_6b=_mixed6(128),
            Mixed_6c=_mixed6(160),
            Mixed_6d=_mixed6(160),
            Mixed_6e=_mixed6(192),
            Mixed_7a=_Mixed(768, _halve, branch3x3=[(192, 1), (320, 3, 2)],
                            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
                            branch_pool=[]),
            Mixed_7b=_mixed7(1280, _avg_pool),
            Mixed_7c=_mixed7(2048, _max_pool)))
        self.fc = nn.Linear(2048, 1008)
        self.prepare = prepare

    def forward(self, images: torch.Tensor, outputs=('pool3',)) -> dict[str, torch.Tensor]:
        """Features of images [N, 3, H, W] with values 0..255: the `outputs` by name.

        `pool3` [N, 2048] is what FID uses; `spatial` [N, 2023] sFID: the first 7 channels of block
        Mixed_6d, channels last; `softmax_nobias` [N, 1008] ADM's Inception Score: class
        probabilities without the bias of `fc`; `logits` and `softmax` [N, 1008] those with it;
        `block0_mean`, `block1_mean`, `block2_mean` the spatial means after the first and second
        pooling and after Mixed_6e.
        """
        x = self.prepare(images)
        out = {}
        for name, layer in self.items():
            if name == 'fc':
                break
            x = layer(x)
            if name in MEANS:
                out[MEANS[name]] = x.mean(dim=(2, 3))
            if name == 'Mixed_6d':
                out['spatial'] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        out['logits'] = self.fc(out['pool3'])
        out['softmax'] = out['logits'].softmax(dim=1)
        out['softmax_nobias'] = F.linear(out['pool3'], self.fc.weight).softmax(dim=1)
        return {name: out[name] for name in outputs}
