"""EDM's augmentation of training images, with labels that tell the network what was done (arXiv 2206.00364, App. F.2).

The network sees the labels (9 numbers for the usual six operations) and zeros when sampling, so the augmentation does
not leak into the samples. Everything runs on the batch, on its device. Geometric operations follow StyleGAN2-ADA: the
image is enlarged twice with a wavelet low-pass filter, sampled bilinearly, and reduced with the same filter.
"""

import functools
import math

import torch
import torch.nn.functional as F

# Low-pass filter of the symlet-6 wavelet.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)
MARGIN = len(SYM6) // 4  # reach of the filter to each side, in pixels of the image

# What EDM trains with: probability 0.12 of each, but half of the images are always mirrored.
EDM_MULTIPLIERS = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


class AugmentPipe:
    """Random augmentation: each operation is applied with probability `p` times its multiplier, 0 switches it off.

    `pipe(images [N,C,H,W], random)` returns (images [N,C,H,W], labels [N, label_dim]); labels are 0 for what was
    not applied. `random` is an object of torch_utils.random; image i depends on its own random numbers alone.

    The image is mirrored at its border as far as its transformation reaches. By default this padding is the largest
    possible, size - 1, so what happens to an image does not depend on the others and nothing waits for the device.
    `shared_padding` chooses the padding that serves the corners of the whole batch, as the reference implementation
    does: strongly shrunk images then differ slightly at their border, where the filter reaches past the padding.

    Raises ValueError for unknown operations, for integer rotations of images that are not square, and for colour
    operations on images that have neither 1 nor 3 channels.
    """

    # Operation -> number of labels, in the order in which they are applied.
    OPERATIONS = dict(xflip=1, yflip=1, rotate_int=2, translate_int=2, scale=1, rotate_frac=2, aniso=2,
                      translate_frac=2, brightness=1, contrast=1, lumaflip=1, hue=2, saturation=1)
    GEOMETRIC = ('scale', 'rotate_frac', 'aniso', 'translate_frac')
    COLOR = ('brightness', 'contrast', 'lumaflip', 'hue', 'saturation')

    def __init__(self, p: float = 1.0, shared_padding: bool = False, **multipliers):
        unknown = set(multipliers) - set(self.OPERATIONS)
        if unknown:
            raise ValueError(f'unknown operations {sorted(unknown)}; known: {", ".join(self.OPERATIONS)}')
        self.p, self.shared_padding = p, shared_padding
        self.multipliers = {name: float(multipliers.get(name, 0)) for name in self.OPERATIONS}

    @property
    def label_dim(self) -> int:
        return sum(count for name, count in self.OPERATIONS.items() if self.multipliers[name] > 0)

    def __call__(self, images, random):
        labels = [images.new_zeros([len(images), 0])]
        for name in ('xflip', 'yflip', 'rotate_int', 'translate_int'):
            if self.multipliers[name] > 0:
                images, new = getattr(self, '_' + name)(images, random)
                labels += new
        images, new = self._geometry(images, random)
        labels += new
        images, new = self._color(images, random)
        labels += new
        return images, torch.cat([label.reshape(len(images), -1).to(torch.float32) for label in labels], dim=1)

    def _gate(self, name, values, random, dim=0):
        """`values` where the operation is applied, 0 elsewhere; one draw for each image, along `dim`."""
        shape = [1] * values.ndim
        shape[dim] = values.shape[dim]
        u = random.rand(shape, dim=dim, device=values.device)
        return torch.where(u < self.multipliers[name] * self.p, values, torch.zeros_like(values))

    # --- Pixel operations: nothing is interpolated -------------------------------------------------------------------

    def _flip(self, name, images, random, dim):
        w = self._gate(name, random.randint(2, [len(images), 1, 1, 1], device=images.device), random)
        return torch.where(w == 1, images.flip(dim), images), [w]

    def _xflip(self, images, random):
        return self._flip('xflip', images, random, dim=3)

    def _yflip(self, images, random):
        return self._flip('yflip', images, random, dim=2)

    def _rotate_int(self, images, random):
        if images.shape[2] != images.shape[3]:
            raise ValueError(f'rotate_int needs square images, got {tuple(images.shape)}')
        w = self._gate('rotate_int', random.randint(4, [len(images), 1, 1, 1], device=images.device), random)
        x_flipped, y_flipped, transposed = (w == 1) | (w == 2), (w == 2) | (w == 3), (w == 1) | (w == 3)
        images = torch.where(x_flipped, images.flip(3), images)
        images = torch.where(y_flipped, images.flip(2), images)
        return torch.where(transposed, images.transpose(2, 3), images), [x_flipped, y_flipped]

    def _translate_int(self, images, random):
        n, c, h, w = images.shape
        shift = 2 * random.rand([2, n, 1, 1, 1], dim=1, device=images.device) - 1
        shift = self._gate('translate_int', shift, random, dim=1)
        tx, ty = (shift[0] * (w / 8)).round().long(), (shift[1] * (h / 8)).round().long()

        def source(size, shift, dim):
            index = torch.arange(size, device=images.device).reshape([-1 if i == dim else 1 for i in range(4)])
            return size - 1 - (size - 1 - (index - shift) % (2 * size - 2)).abs()

        images = images.gather(3, source(w, tx, 3).expand(n, c, h, w))
        images = images.gather(2, source(h, -ty, 2).expand(n, c, h, w))
        return images, [tx / (w / 8), ty / (h / 8)]

    # --- Geometry ----------------------------------------------------------------------------------------------------

    def _geometry(self, images, random):
        """Scaling, rotation, anisotropic scaling and translation, composed into one inverse map G of coordinates."""
        n, _, h, w = images.shape
        device, on, labels = images.device, self.multipliers, []
        if not any(on[name] > 0 for name in self.GEOMETRIC):
            return images, labels
        G = torch.eye(3, device=device).expand(n, 3, 3)
        if on['scale'] > 0:
            x = self._gate('scale', random.randn([n], device=device), random)
            G = G @ scaling(torch.exp2(-0.2 * x), torch.exp2(-0.2 * x))
            labels.append(x)
        if on['rotate_frac'] > 0:
            angle = self._gate('rotate_frac', (2 * random.rand([n], device=device) - 1) * math.pi, random)
            G = G @ rotation(angle)
            labels += [angle.cos() - 1, angle.sin()]
        if on['aniso'] > 0:
            x = random.randn([n], device=device)
            angle = (2 * random.rand([n], device=device) - 1) * math.pi
            x = self._gate('aniso', x, random)
            angle = torch.where(random.rand([n], device=device) < 0.5, angle, torch.zeros_like(angle))
            G = G @ rotation(-angle) @ scaling(torch.exp2(-0.2 * x), torch.exp2(0.2 * x)) @ rotation(angle)
            labels += [x * angle.cos(), x * angle.sin()]
        if on['translate_frac'] > 0:
            x = self._gate('translate_frac', random.randn([2, n], dim=1, device=device), random, dim=1)
            G = G @ translation(-x[0] * w / 8, -x[1] * h / 8)
            labels += [x[0], x[1]]
        labels = [torch.stack(labels, dim=1)]
        return resample(images, G, self._padding(G, w, h) if self.shared_padding else None), labels

    @staticmethod
    def _padding(G, w, h) -> list[int]:
        """Left, right, top and bottom padding that serves every image of the batch."""
        cx, cy = (w - 1) / 2, (h - 1) / 2
        corners = G.new_tensor([[-cx, cx, cx, -cx], [-cy, -cy, cy, cy], [1, 1, 1, 1]])
        x, y = (G @ corners)[:, :2].permute(1, 0, 2).flatten(1)
        reach = torch.stack([-x.min() - cx, x.max() - cx, -y.min() - cy, y.max() - cy]) + 2 * MARGIN
        limits = [w - 1, w - 1, h - 1, h - 1]
        return [min(max(math.ceil(v), 0), limit) for v, limit in zip(reach.tolist(), limits, strict=True)]

    # --- Colour ------------------------------------------------------------------------------------------------------

    def _color(self, images, random):
        """Brightness, contrast, luma inversion, hue and saturation, composed into one affine map of RGB."""
        n, channels = images.shape[:2]
        device, on, labels = images.device, self.multipliers, []
        if not any(on[name] > 0 for name in self.COLOR):
            return images, labels
        if channels not in (1, 3):
            raise ValueError(f'colour operations need 1 or 3 channels, not {channels}')
        eye = torch.eye(3, device=device)
        gray = torch.full([3, 3], 1 / 3, device=device)  # v v^T, v = (1,1,1) / sqrt(3): the luma axis
        # The generator of rotations around v: (v x ..)
        cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
        matrix, offset = eye.expand(n, 3, 3), torch.zeros([n, 1, 1], device=device)  # offset: the same in R, G and B
        if on['brightness'] > 0:
            w = self._gate('brightness', random.randn([n, 1, 1], device=device), random)
            offset = offset + 0.2 * w
            labels.append(w)
        if on['contrast'] > 0:
            w = self._gate('contrast', random.randn([n, 1, 1], device=device), random)
            factor = torch.exp2(0.5 * w)
            matrix, offset = factor * matrix, factor * offset
            labels.append(w)
        if on['lumaflip'] > 0:
            w = self._gate('lumaflip', random.randint(2, [n, 1, 1], device=device), random)
            matrix, offset = (eye - 2 * gray * w) @ matrix, offset * (1 - 2 * w)
            labels.append(w)
        if on['hue'] > 0:
            w = self._gate('hue', (2 * random.rand([n, 1, 1], device=device) - 1) * math.pi, random)
            matrix = (gray + (eye - gray) * w.cos() + cross * w.sin()) @ matrix  # leaves the luma axis as it is
            labels += [w.cos() - 1, w.sin()]
        if on['saturation'] > 0:
            w = self._gate('saturation', random.randn([n, 1, 1], device=device), random)
            matrix = (gray + (eye - gray) * torch.exp2(w)) @ matrix
            labels.append(w)
        if channels == 1:  # (g, g, g) is mapped, and its mean taken
            matrix = matrix.sum(dim=(1, 2), keepdim=True) / 3
        images = (matrix @ images.flatten(2) + offset).reshape(images.shape)
        return images, [torch.cat([label.reshape(n, 1).to(torch.float32) for label in labels], dim=1)]


def _matrix(rows) -> torch.Tensor:
    """[N,3,3] from rows of [N] tensors and numbers."""
    like = next(value for row in rows for value in row if torch.is_tensor(value))
    return torch.stack([torch.stack([torch.as_tensor(value, dtype=like.dtype, device=like.device).expand_as(like)
                                     for value in row], dim=-1) for row in rows], dim=-2)


def scaling(x, y) -> torch.Tensor:
    """Matrices [N,3,3] that multiply the coordinates by x and y, [N] each."""
    return _matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def translation(x, y) -> torch.Tensor:
    """Matrices [N,3,3] that add x and y, [N] each, to the coordinates."""
    return _matrix([[1, 0, x], [0, 1, y], [0, 0, 1]])


def rotation(angle) -> torch.Tensor:
    """Matrices [N,3,3] of the rotations by `angle` [N]."""
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


# Doubling and halving along one axis are linear maps of short vectors: as matrices they run at the speed of matrix
# products, which on a CPU is several times that of depthwise convolutions.


@functools.lru_cache(maxsize=32)
def _upsampling(size: int, before: int, after: int, device) -> torch.Tensor:
    """[2 (before + size + after), size]: mirrors at the ends, puts zeros between the pixels, and filters."""
    units = F.pad(torch.eye(size)[:, None], [before, after], mode='reflect')
    # The filter's sum is sqrt(2): with the zeros the mean changes by sqrt(1/2) here, and back when halving.
    rows = F.conv_transpose1d(units, torch.tensor(SYM6)[None, None], stride=2, padding=len(SYM6) // 2 - 1)
    return rows[:, 0].t().contiguous().to(device)


@functools.lru_cache(maxsize=32)
def _downsampling(size: int, device) -> torch.Tensor:
    """[size, 2 (size + 2 MARGIN)]: filters, keeps every second pixel, and cuts off the margin."""
    units = torch.eye(2 * (size + 2 * MARGIN))[:, None, 1:-1]
    return F.conv1d(units, torch.tensor(SYM6)[None, None], stride=2)[:, 0].t().contiguous().to(device)


def resample(images, G, padding=None):
    """`images` [N,C,H,W] seen through G [N,3,3], which maps output to input positions (pixels from the centre, x to
    the right, y down). Outside, the image is mirrored as far as `padding` (left, right, top, bottom; default size - 1).
    """
    n, c, h, w = images.shape
    left, right, top, bottom = padding or [w - 1, w - 1, h - 1, h - 1]
    ones = G.new_ones([1])
    G = translation(ones * (left - right) / 2, ones * (top - bottom) / 2) @ G

    # Twice as large.
    images = _upsampling(h, top, bottom, G.device) @ images.to(torch.float32) @ _upsampling(w, left, right, G.device).t()
    G = scaling(2 * ones, 2 * ones) @ G @ scaling(ones / 2, ones / 2)
    G = translation(-ones / 2, -ones / 2) @ G @ translation(ones / 2, ones / 2)

    size = [n, c, 2 * (h + 2 * MARGIN), 2 * (w + 2 * MARGIN)]
    theta = scaling(2 / images.shape[3] * ones, 2 / images.shape[2] * ones) @ G @ scaling(
        size[3] / 2 * ones, size[2] / 2 * ones)
    grid = F.affine_grid(theta[:, :2], size, align_corners=False)
    images = F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)

    return _downsampling(h, G.device) @ images @ _downsampling(w, G.device).t()
