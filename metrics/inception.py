"""The Inception network of the Frechet Inception distance (TensorFlow's of 2015-12-05, Szegedy et al. 2015).

State names are those of the published file `pt_inception-2015-12-05`. It differs from the Inception v3 of
other libraries: average pooling leaves the padding out of its count, the last block pools by maximum, and there are
1008 classes.
"""

import torch
from torch import nn
from torch.nn import functional as F

OUTPUTS = ('block0_mean', 'block1_mean', 'block2_mean', 'spatial', 'pool3', 'logits', 'softmax', 'softmax_nobias')


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _avg_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _Mixed5(nn.Module):
    """Blocks at 35x35."""

    def __init__(self, in_channels, pool_channels):
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 64, 1)
        self.branch5x5_1 = _Conv(in_channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(in_channels, pool_channels, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_avg_pool(x))], dim=1)


class _Mixed6a(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3 = _Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2)], dim=1)


class _Mixed6(nn.Module):
    """Blocks at 17x17; `width` is that of the 7x7 branches."""

    def __init__(self, in_channels, width):
        super().__init__()
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = _Conv(in_channels, 192, 1)
        self.branch7x7_1 = _Conv(in_channels, width, 1)
        self.branch7x7_2 = _Conv(width, width, **row)
        self.branch7x7_3 = _Conv(width, 192, **column)
        self.branch7x7dbl_1 = _Conv(in_channels, width, 1)
        self.branch7x7dbl_2 = _Conv(width, width, **column)
        self.branch7x7dbl_3 = _Conv(width, width, **row)
        self.branch7x7dbl_4 = _Conv(width, width, **column)
        self.branch7x7dbl_5 = _Conv(width, 192, **row)
        self.branch_pool = _Conv(in_channels, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_avg_pool(x))], dim=1)


class _Mixed7a(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3_1 = _Conv(in_channels, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(in_channels, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            F.max_pool2d(x, 3, stride=2)], dim=1)


class _Mixed7(nn.Module):
    """Blocks at 8x8; `pool` is the pooling of the last branch."""

    def __init__(self, in_channels, pool):
        super().__init__()
        row, column = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = _Conv(in_channels, 320, 1)
        self.branch3x3_1 = _Conv(in_channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, **row)
        self.branch3x3_2b = _Conv(384, 384, **column)
        self.branch3x3dbl_1 = _Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, **row)
        self.branch3x3dbl_3b = _Conv(384, 384, **column)
        self.branch_pool = _Conv(in_channels, 192, 1)
        self.pool = pool

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """The network with its preprocessing; use it in eval mode."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _Mixed5(192, pool_channels=32)
        self.Mixed_5c = _Mixed5(256, pool_channels=64)
        self.Mixed_5d = _Mixed5(288, pool_channels=64)
        self.Mixed_6a = _Mixed6a(288)
        self.Mixed_6b = _Mixed6(768, width=128)
        self.Mixed_6c = _Mixed6(768, width=160)
        self.Mixed_6d = _Mixed6(768, width=160)
        self.Mixed_6e = _Mixed6(768, width=192)
        self.Mixed_7a = _Mixed7a(768)
        self.Mixed_7b = _Mixed7(1280, pool=_avg_pool)
        self.Mixed_7c = _Mixed7(2048, pool=_max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor, outputs=('pool3',)) -> dict[str, torch.Tensor]:
        """Features of images [N, 3, H, W] with values 0..255, as a dictionary of the `outputs` asked for.

        `pool3` [N, 2048] is what FID uses; `spatial` [N, 2023] sFID: the first 7 channels of block Mixed_6d, channels
        last; `softmax_nobias` [N, 1008] ADM's Inception Score: class probabilities without the bias of `fc`;
        `logits` and `softmax` [N, 1008] those with it; `block0_mean`, `block1_mean`, `block2_mean` the
        spatial means after the first and second pooling and after Mixed_6e.
        """
        x = images.to(torch.float32) / 255
        x = 2 * F.interpolate(x, size=(299, 299), mode='bilinear', align_corners=False) - 1
        out = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        out['block0_mean'] = x.mean(dim=(2, 3))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        out['block1_mean'] = x.mean(dim=(2, 3))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        out['spatial'] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        out['block2_mean'] = x.mean(dim=(2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        out['pool3'] = x.mean(dim=(2, 3))
        out['logits'] = self.fc(out['pool3'])
        out['softmax'] = out['logits'].softmax(dim=1)
        out['softmax_nobias'] = F.linear(out['pool3'], self.fc.weight).softmax(dim=1)
        return {name: out[name] for name in outputs}
