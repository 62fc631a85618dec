"""EDM's augmentation of training images, with labels that tell the network what was done (arXiv
2206.00364, App. F.2).

The network sees the labels (9 numbers for the usual six operations) and zeros when sampling, so
the augmentation does not leak into the samples. Everything runs on the batch, on its device.
Geometric operations follow StyleGAN2-ADA: the image is enlarged twice with a wavelet low-pass
filter, sampled bilinearly, and reduced with the same filter.
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

from torch_utils.random import GlobalRandom

# Low-pass filter of the symlet-6 wavelet.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)
MARGIN = len(SYM6) // 4  # reach of the filter to each side, in pixels of the image

# What EDM trains with: probability 0.12 of each, but half of the images are always mirrored.
EDM_MULTIPLIERS = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


class AugmentPipe:
    """Random augmentation: each operation is applied with probability `p` times its multiplier, 0
    switches it off.

    `pipe(images [N,C,H,W], random)` returns (images [N,C,H,W], labels [N, label_dim]); labels are
    0 for what was not applied. `random` is an object of torch_utils.random; image i depends on its
    own random numbers alone.

    The image is mirrored at its border as far as its transformation reaches. By default this
    padding is the largest possible, size - 1, so what happens to an image does not depend on the
    others and nothing waits for the device. `shared_padding` chooses the padding that serves the
    corners of the whole batch, as the reference implementation does: strongly shrunk images then
    differ slightly at their border, where the filter reaches past the padding.

    Raises ValueError for unknown operations, for integer rotations of images that are not square,
    and for colour operations on images that have neither 1 nor 3 channels.
    """

    # Operation -> number of labels, in the order in which they are applied.
    PIXEL = dict(xflip=1, yflip=1, rotate_int=2, translate_int=2)
    GEOMETRIC = dict(scale=1, rotate_frac=2, aniso=2, translate_frac=2)
    COLOR = dict(brightness=1, contrast=1, lumaflip=1, hue=2, saturation=1)
    OPERATIONS = PIXEL | GEOMETRIC | COLOR

    def __init__(self, p: float = 1.0, shared_padding: bool = False, **multipliers):
        if unknown := multipliers.keys() - self.OPERATIONS.keys():
            raise ValueError(
                f'unknown operations {sorted(unknown)}; known: {", ".join(self.OPERATIONS)}')
        self.shared_padding = shared_padding
        self.probabilities = {name: p * value for name, value in multipliers.items()
                              if value > 0}

    def _active(self, operations) -> list[str]:
        return [name for name in operations if name in self.probabilities]

    @property
    def label_dim(self) -> int:
        return sum(self.OPERATIONS[name] for name in self._active(self.OPERATIONS))

    def __call__(self, images, random):
        draws = _Draws(random, len(images), images.device, self.probabilities)
        labels = []
        for name in self._active(self.PIXEL):
            images, new = getattr(self, '_' + name)(images, draws)
            labels += new
        for apply, operations in ((self._geometry, self.GEOMETRIC), (self._color, self.COLOR)):
            if names := self._active(operations):
                images, new = apply(images, draws, names)
                labels += new
        labels = [label.float() for label in labels]
        return images, torch.stack(labels, dim=1) if labels else images.new_zeros([len(images), 0])

    # --- Pixel operations: nothing is interpolated -----------------------------------------------

    def _xflip(self, images, draws):
        w = draws.integer('xflip', 2)
        return _flipped(images, w, 3), [w]

    def _yflip(self, images, draws):
        w = draws.integer('yflip', 2)
        return _flipped(images, w, 2), [w]

    def _rotate_int(self, images, draws):
        if images.shape[2] != images.shape[3]:
            raise ValueError(f'rotate_int needs square images, got {tuple(images.shape)}')
        w = draws.integer('rotate_int', 4)
        x_flipped = (w == 1) | (w == 2)
        y_flipped = (w == 2) | (w == 3)
        images = _flipped(_flipped(images, x_flipped, 3), y_flipped, 2)
        images = torch.where((w % 2 == 1)[:, None, None, None], images.transpose(2, 3), images)
        return images, [x_flipped, y_flipped]

    def _translate_int(self, images, draws):
        n, c, h, w = images.shape
        x, y = draws.gate('translate_int', draws.uniform(2))
        tx = (x * (w / 8)).round()
        ty = (y * (h / 8)).round()

        def source(size, shift):
            index = torch.arange(size, device=images.device) - shift.long()[:, None]
            return size - 1 - (size - 1 - index % (2 * size - 2)).abs()

        images = images.gather(3, source(w, tx)[:, None, None, :].expand(n, c, h, w))
        images = images.gather(2, source(h, -ty)[:, None, :, None].expand(n, c, h, w))
        return images, [tx / (w / 8), ty / (h / 8)]

    # --- Geometry --------------------------------------------------------------------------------

    def _geometry(self, images, draws, names):
        """Scaling, rotation, anisotropic scaling and translation, composed into one inverse map G
        of coordinates."""
        n, _, h, w = images.shape
        G = torch.eye(3, device=images.device).expand(n, 3, 3)
        labels = []
        for name in names:
            if name == 'scale':
                x = draws.gate(name, draws.normal())
                labels.append(x)
                matrix = scaling(torch.exp2(-0.2 * x), torch.exp2(-0.2 * x))
            elif name == 'rotate_frac':
                angle = draws.gate(name, draws.angle())
                labels += [angle.cos() - 1, angle.sin()]
                matrix = rotation(angle)
            elif name == 'aniso':
                x = draws.normal()
                angle = draws.angle()
                x = draws.gate(name, x)
                angle = draws.where(0.5, angle)
                labels += [x * angle.cos(), x * angle.sin()]
                matrix = (rotation(-angle) @ scaling(torch.exp2(-0.2 * x), torch.exp2(0.2 * x))
                          @ rotation(angle))
            else:
                x, y = draws.gate(name, draws.normal(2))
                labels += [x, y]
                matrix = translation(-x * w / 8, -y * h / 8)
            G = G @ matrix
        return resample(images, G, self._padding(G, w, h) if self.shared_padding else None), labels

    @staticmethod
    def _padding(G, w, h) -> list[int]:
        """Left, right, top and bottom padding that serves every image of the batch."""
        centre = G.new_tensor([w - 1, h - 1]) / 2
        corners = G.new_tensor([[-1, 1, 1, -1], [-1, -1, 1, 1], [1, 1, 1, 1]])
        corners[:2] *= centre[:, None]
        reached = (G @ corners)[:, :2]  # [N, (x, y), 4]
        reach = torch.stack([-reached.amin(dim=(0, 2)), reached.amax(dim=(0, 2))], dim=1)
        reach = (reach - centre[:, None] + 2 * MARGIN).ceil().clamp(min=0)
        return reach.minimum(2 * centre[:, None]).int().flatten().tolist()

    # --- Colour ----------------------------------------------------------------------------------

    def _color(self, images, draws, names):
        """Brightness, contrast, luma inversion, hue and saturation, composed into one affine map
        of RGB."""
        n, channels = images.shape[:2]
        device = images.device
        if channels not in (1, 3):
            raise ValueError(f'colour operations need 1 or 3 channels, not {channels}')
        eye = torch.eye(3, device=device)
        # v v^T, v = (1,1,1) / sqrt(3): the luma axis
        gray = torch.full([3, 3], 1 / 3, device=device)
        rest = eye - gray
        # The generator of rotations around v: (v x ..)
        cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
        maps = {
            'contrast': lambda w: eye * torch.exp2(0.5 * w),
            'lumaflip': lambda w: eye - 2 * gray * w,
            'hue': lambda w: gray + rest * w.cos() + cross * w.sin(),
            'saturation': lambda w: gray + rest * torch.exp2(w)
        }
        matrix = eye.expand(n, 3, 3)
        offset = torch.zeros([n, 3, 1], device=device)
        labels = []
        for name in names:
            if name == 'lumaflip':
                w = draws.integer(name, 2)
            else:
                w = draws.gate(name, draws.angle() if name == 'hue' else draws.normal())
            labels += [w.cos() - 1, w.sin()] if name == 'hue' else [w]
            w = w[:, None, None]
            if name == 'brightness':
                offset = offset + 0.2 * w
            else:
                step = maps[name](w)
                matrix = step @ matrix
                offset = step @ offset
        if channels == 1:  # (g, g, g) is mapped, and its mean taken
            matrix = matrix.sum(dim=(1, 2), keepdim=True) / 3
            offset = offset.mean(dim=1, keepdim=True)
        return (matrix @ images.flatten(2) + offset).reshape(images.shape), labels


def _flipped(images, flags, dim: int):
    """Images [N,C,H,W], of which those with a flag [N] are mirrored along `dim`."""
    return torch.where((flags > 0)[:, None, None, None], images.flip(dim), images)


@dataclasses.dataclass
class _Draws:
    """Random numbers of the images of a batch: [N], or [count, N]."""

    random: GlobalRandom
    n: int
    device: torch.device
    probabilities: dict

    def _size(self, count=None):
        return dict(size=[count, self.n] if count else [self.n], dim=1 if count else 0,
                    device=self.device)

    def normal(self, count=None):
        return self.random.randn(**self._size(count))

    def uniform(self, count=None):
        """In [-1, 1)."""
        return 2 * self.random.rand(**self._size(count)) - 1

    def angle(self):
        return self.uniform() * math.pi

    def integer(self, name: str, high: int):
        """0 .. high - 1, gated."""
        return self.gate(name, self.random.randint(high, **self._size()))

    def where(self, p: float, values):
        """`values` with probability p, 0 elsewhere; one draw for each image."""
        return values.where(self.random.rand(**self._size()) < p, 0)

    def gate(self, name: str, values):
        """`values` where the operation is applied, 0 elsewhere."""
        return self.where(self.probabilities[name], values)


def _matrix(*values) -> torch.Tensor:
    """[N,3,3] from nine [N] tensors or numbers, row by row."""
    like = next(filter(torch.is_tensor, values))
    columns = [value if torch.is_tensor(value) else torch.full_like(like, value)
               for value in values]
    return torch.stack(columns, dim=-1).unflatten(-1, (3, 3))


def scaling(x, y) -> torch.Tensor:
    """Matrices [N,3,3] that multiply the coordinates by x and y, [N] each or one a number."""
    return _matrix(x, 0, 0, 0, y, 0, 0, 0, 1)


def translation(x, y) -> torch.Tensor:
    """Matrices [N,3,3] that add x and y, [N] each or one a number, to the coordinates."""
    return _matrix(1, 0, x, 0, 1, y, 0, 0, 1)


def rotation(angle) -> torch.Tensor:
    """Matrices [N,3,3] of the rotations by `angle` [N]."""
    cos = angle.cos()
    sin = angle.sin()
    return _matrix(cos, -sin, 0, sin, cos, 0, 0, 0, 1)


# Doubling and halving along one axis are linear maps of short vectors: as matrices they run at the
# speed of matrix products, which on a CPU is several times that of depthwise convolutions.


@functools.lru_cache(maxsize=32)
def _upsampling(size: int, before: int, after: int, device) -> torch.Tensor:
    """[2 (before + size + after), size]: mirrors at the ends, puts zeros between the pixels, and
    filters."""
    units = F.pad(torch.eye(size)[:, None], [before, after], mode='reflect')
    # The filter's sum is sqrt(2): with the zeros the mean changes by sqrt(1/2) here, and back when
    # halving.
    rows = F.conv_transpose1d(units, torch.tensor([[SYM6]]), stride=2, padding=len(SYM6) // 2 - 1)
    return rows[:, 0].t().contiguous().to(device)


@functools.lru_cache(maxsize=32)
def _downsampling(size: int, device) -> torch.Tensor:
    """[size, 2 (size + 2 MARGIN)]: filters, keeps every second pixel, and cuts off the margin."""
    units = torch.eye(2 * (size + 2 * MARGIN))[:, None, 1:-1]
    rows = F.conv1d(units, torch.tensor([[SYM6]]), stride=2)
    return rows[:, 0].t().contiguous().to(device)


def resample(images, G, padding=None):
    """`images` [N,C,H,W] seen through G [N,3,3], which maps output to input positions (pixels from
    the centre, x to the right, y down). Outside, the image is mirrored as far as `padding` (left,
    right, top, bottom; default size - 1).
    """
    n, c, h, w = images.shape
    left, right, top, bottom = padding or [w - 1, w - 1, h - 1, h - 1]
    one = G.new_ones([1])
    G = translation(one * (left - right) / 2, (top - bottom) / 2) @ G

    # Twice as large.
    images = (_upsampling(h, top, bottom, G.device) @ images.float()
              @ _upsampling(w, left, right, G.device).t())
    G = scaling(2 * one, 2) @ G @ scaling(one / 2, 1 / 2)
    G = translation(-one / 2, -1 / 2) @ G @ translation(one / 2, 1 / 2)

    height = 2 * (h + 2 * MARGIN)
    width = 2 * (w + 2 * MARGIN)
    theta = (scaling(2 / images.shape[3] * one, 2 / images.shape[2]) @ G
             @ scaling(width / 2 * one, height / 2))
    grid = F.affine_grid(theta[:, :2], [n, c, height, width], align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    return _downsampling(h, G.device) @ images @ _downsampling(w, G.device).t()
