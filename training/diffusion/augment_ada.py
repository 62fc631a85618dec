"""The augmentation of class-balancing diffusion (k-diffusion's): flips, scaling, rotation,
stretching and translation as one matrix for each image, cubic interpolation, and a vector of nine
numbers that tells the network what was done.

On whole batches and on their device. Matrices act on pixel coordinates (x right, y down, pixel
centres at integers).
"""

import dataclasses
import math

import torch
import torch.nn.functional as F

from training.diffusion.augment import positions, stretch, translation


@dataclasses.dataclass
class ADAAugment:
    """images [N,C,H,W] in [-1, 1] -> (augmented images, condition vectors [N,9]).

    Each operation happens with probability `p`, but for the horizontal flip, which takes half of
    the images. `scale` and `aniso` are the factors of one standard deviation, `trans` that of the
    translation as a share of the image.
    """

    p: float = 0.12
    scale: float = 2**0.2
    aniso: float = 2**0.2
    trans: float = 1 / 8

    def __call__(self, images, random):
        a = self.draw(len(images), random).to(images.device)
        return self.transform(images, a), self.conditions(a)

    def transform(self, images, a) -> torch.Tensor:
        """Images [N,C,H,W] augmented by parameters a [N,8] (see `draw`)."""
        matrices = self.matrices(a, *images.shape[2:])
        if images.device.type != 'cpu':
            return warp(images, matrices)
        # On the CPU it pays to warp only what a flip cannot do; on a GPU, to find out would be to
        # wait for it.
        flip_x, flip_y = (a[:, :2, None, None, None] > 0).unbind(1)
        out = torch.where(flip_x, images.flip(3), images)
        out = torch.where(flip_y, out.flip(2), out)
        moved = a[:, 2:].any(1).nonzero().flatten()
        if len(moved):
            out[moved] = warp(images[moved], matrices[moved])
        return out

    def draw(self, n: int, random) -> torch.Tensor:
        """Parameters of n images [n,8], from `random` (see torch_utils.random): two flips, scale,
        angle, direction and amount of the stretching, translation in x and y."""
        flips = random.randint(2, [n, 2]).float()
        gates = (random.rand([n, 5]) < self.p).float()
        angles = 2 * math.pi * random.rand([n, 2]) - math.pi
        normal = random.randn([n, 4])
        return torch.cat([
            flips[:, :1], flips[:, 1:] * gates[:, :1], normal[:, :1] * gates[:, 1:2],
            angles * gates[:, 2:4], normal[:, 1:] * gates[:, [3, 4, 4]]
        ], dim=1)

    def matrices(self, a, height: int, width: int) -> torch.Tensor:
        """Where pixels go: [N,3,3] for parameters a [N,8]."""
        flip_x, flip_y, scale, angle, direction, amount, move_x, move_y = a.unbind(1)
        cx, cy = width / 2 - 0.5, height / 2 - 0.5
        zoom = self.scale**scale
        shape = stretch((1 - 2 * flip_x) * zoom, (1 - 2 * flip_y) * zoom, -angle, -direction,
                        self.aniso**amount)
        return (translation(torch.full_like(zoom, cx), cy) @ shape
                @ translation(move_x * width * self.trans - cx, move_y * height * self.trans - cy))

    @staticmethod
    def conditions(a) -> torch.Tensor:
        """What the network is told, [N,9]; zeros for an untouched image."""
        flip_x, flip_y, scale, angle, direction, amount, move_x, move_y = a.unbind(1)
        return torch.stack([
            flip_x, flip_y, scale, angle.cos() - 1, angle.sin(), amount * direction.cos(),
            amount * direction.sin(), move_x, move_y
        ], dim=1)


def _axis(q, size: int):
    """A coordinate for `warp`: (grid position with smoothed fraction, plain grid position, weight
    of the slope).

    The position is folded into 0..size-1, with the border pixels as mirrors.
    """
    period = 2 * size - 2
    q = q % period
    q = torch.minimum(q, period - q)
    cell = q.floor()
    u = q - cell
    to_grid = 2 / (size - 1)
    smooth = cell + u * u * (3 - 2 * u)
    return smooth * to_grid - 1, q * to_grid - 1, (1 - 2 * (cell % 2)) * u * (1 - u)


def _slope(images, dim: int):
    """Half the difference of the two neighbours along `dim`, with the sign (-1)^i; 0 at the ends,
    which are mirrors."""
    sign = 0.5 - torch.arange(images.shape[dim], device=images.device) % 2
    sign[0] = sign[-1] = 0
    sign = sign if dim == 3 else sign[:, None]
    return sign.to(images.dtype) * (images.roll(-1, dim) - images.roll(1, dim))


def warp(images, matrices) -> torch.Tensor:
    """Images [N,C,H,W] whose pixels have moved by matrices [N,3,3]: output p takes the input at
    matrix^-1 p.

    Cubic (Catmull-Rom) interpolation, reflecting border; H, W >= 2. In Hermite form along one
    axis, with slopes d_i = (f_(i+1) - f_(i-1)) / 2 and the fraction u of a position between pixels
    0 and 1,

        f(u) = (1 - s) f_0 + s f_1 + u (1 - u) ((1 - u) d_0 - u d_1),   s = u^2 (3 - 2u).

    Both brackets are linear interpolations, the second one of (-1)^i d_i up to a sign. So in two
    dimensions four bilinear look-ups (of the image, its slopes in x and y, and their product) do
    the work of sixteen taps.
    """
    H, W = images.shape[2:]
    inverse = torch.linalg.inv_ex(matrices.double())[0].to(images.dtype)
    x, y = positions(inverse, torch.arange(W, device=images.device),
                     torch.arange(H, device=images.device)).unbind(1)
    x_smooth, x_plain, x_slope = _axis(x, W)
    y_smooth, y_plain, y_slope = _axis(y, H)
    x_slope, y_slope = x_slope[:, None], y_slope[:, None]

    dx = _slope(images, 3)

    def look_up(values, x, y):
        return F.grid_sample(values, torch.stack([x, y], dim=-1), padding_mode='border',
                             align_corners=True)

    out = look_up(images, x_smooth, y_smooth)
    out += x_slope * look_up(dx, x_plain, y_smooth)
    out += y_slope * look_up(_slope(images, 2), x_smooth, y_plain)
    return out.addcmul_(x_slope * y_slope, look_up(_slope(dx, 2), x_plain, y_plain))
