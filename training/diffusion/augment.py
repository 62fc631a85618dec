"""EDM's augmentation of training images, with labels that tell the network what was done (arXiv
2206.00364, App. F.2).

The network sees the labels (9 numbers for the usual six operations) and zeros when sampling, so
the augmentation does not leak into the samples. Everything runs on the batch, on its device.
Geometric operations follow StyleGAN2-ADA: the image is enlarged twice with a wavelet low-pass
filter, sampled bilinearly, and reduced with the same filter.
"""

import functools
import math

import torch
import torch.nn.functional as F

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
        self.probabilities = {name: p * multipliers[name] for name in self.OPERATIONS
                              if multipliers.get(name, 0) > 0}

    @property
    def label_dim(self) -> int:
        return sum(self.OPERATIONS[name] for name in self.probabilities)

    def __call__(self, images, random):
        n, channels, h, w = images.shape
        active = self.probabilities.keys()
        if 'rotate_int' in active and h != w:
            raise ValueError(f'rotate_int needs square images, got {tuple(images.shape)}')
        if active & self.COLOR and channels not in (1, 3):
            raise ValueError(f'colour operations need 1 or 3 channels, not {channels}')

        def uniform(size, **axis):
            return 2 * random.rand(size, **axis) - 1

        def stretching(size, dim, **axis):
            return torch.stack([random.randn([n], **axis), uniform([n], **axis)])

        def where(p, values):
            """`values` of the images that a draw of probability p chooses, 0 of the others."""
            return values.where(random.rand([n], device=images.device) < p, 0)

        def draw(name, function, *axes):
            """Amounts of an operation [*axes, N], 0 where it is not applied."""
            if name not in active:
                return images.new_zeros([*axes, n])
            values = function([*axes, n], dim=len(axes), device=images.device)
            return where(self.probabilities[name], values)

        # The pixels, without interpolation.
        coin = functools.partial(random.randint, 2)
        xflip = draw('xflip', coin)
        yflip = draw('yflip', coin)
        quarters = draw('rotate_int', functools.partial(random.randint, 4))
        xturned = (quarters + 1) // 2 % 2
        yturned = quarters // 2
        x, y = draw('translate_int', uniform, 2)
        xshift = (x * (w / 8)).round()
        yshift = (y * (h / 8)).round()
        images = _chosen(xflip != xturned, images.flip(3), images)
        images = _chosen(yflip != yturned, images.flip(2), images)
        if 'rotate_int' in active:
            images = _chosen(quarters % 2 == 1, images.transpose(2, 3), images)
        if 'translate_int' in active:
            images = _shifted(_shifted(images, xshift, 3), -yshift, 2)

        # The inverse map of coordinates: scaling, rotation, anisotropic scaling, translation.
        scale = draw('scale', random.randn)
        angle = math.pi * draw('rotate_frac', uniform)
        aniso, direction = draw('aniso', stretching, 2)
        direction = math.pi * (where(0.5, direction) if 'aniso' in active else direction)
        xmove, ymove = draw('translate_frac', random.randn, 2)
        if active & self.GEOMETRIC:
            zoom = torch.exp2(-0.2 * scale)
            G = (stretch(zoom, zoom, angle, direction, torch.exp2(-0.2 * aniso))
                 @ translation(-xmove * w / 8, -ymove * h / 8))
            images = resample(images, G, reach(G, w, h) if self.shared_padding else None)

        # The colours: the luma and what differs from it, which a hue turns around the luma's axis.
        kinds = dict(brightness=random.randn, contrast=random.randn, lumaflip=coin, hue=uniform,
                     saturation=random.randn)
        colors = {name: draw(name, kind) for name, kind in kinds.items()}
        if active & self.COLOR:
            images = recolor(images, **colors)

        hue = math.pi * colors['hue']
        labels = {name: [amount] for name, amount in colors.items()} | dict(
            xflip=[xflip], yflip=[yflip], rotate_int=[xturned, yturned],
            translate_int=[xshift / (w / 8), yshift / (h / 8)], scale=[scale],
            rotate_frac=[angle.cos() - 1, angle.sin()],
            aniso=[aniso * direction.cos(), aniso * direction.sin()],
            translate_frac=[xmove, ymove], hue=[hue.cos() - 1, hue.sin()])
        rows = [label.float() for name in active for label in labels[name]]
        return images, torch.stack(rows, dim=1) if rows else images.new_zeros([n, 0])


def _chosen(flags, changed, images):
    """Images [N,C,H,W], those with a flag [N] as `changed`."""
    return torch.where(flags[:, None, None, None], changed, images)


def _shifted(images, pixels, dim: int):
    """Images [N,C,H,W] moved along `dim` by whole pixels [N], with mirrors at the border."""
    last = images.shape[dim] - 1
    index = torch.arange(last + 1, device=images.device) - pixels.long()[:, None]
    index = last - (last - index % (2 * last)).abs()
    return torch.take_along_dim(images, index[:, None, None].transpose(3, dim), dim)


def recolor(images, **amounts):
    """Images [N,C,H,W] of 1 or 3 channels with changed colours, by amounts [N] of the operations
    in COLOR; a hue of 1 is half a turn.

    On the axes of the luma v = (1,1,1) / sqrt(3) and around it, all five act one by one, so their
    order counts for the brightness alone, which comes first.
    """
    brightness, contrast, lumaflip, hue, saturation = (
        amounts[name][:, None, None, None] for name in AugmentPipe.COLOR)
    hue = math.pi * hue
    luma = images.mean(dim=1, keepdim=True)
    turned = (images.roll(1, 1) - images.roll(-1, 1)) / math.sqrt(3)  # v x image
    chroma = (images - luma) * hue.cos() + turned * hue.sin()
    luma = (luma + 0.2 * brightness) * (1 - 2 * lumaflip)
    return torch.exp2(0.5 * contrast) * (luma + torch.exp2(saturation) * chroma)


# --- Geometry: matrices [N,3,3] for coordinates (x to the right, y down) -------------------------


def _matrix(*values) -> torch.Tensor:
    """[N,3,3] from nine [N] tensors or numbers, row by row."""
    like = next(filter(torch.is_tensor, values))
    columns = [value if torch.is_tensor(value) else torch.full_like(like, value)
               for value in values]
    return torch.stack(columns, dim=-1).unflatten(-1, (3, 3))


def scaling(x, y) -> torch.Tensor:
    """Coordinates are multiplied by x and y, [N] each or one a number."""
    return _matrix(x, 0, 0, 0, y, 0, 0, 0, 1)


def translation(x, y) -> torch.Tensor:
    """x and y, [N] each or one a number, are added to the coordinates."""
    return _matrix(1, 0, x, 0, 1, y, 0, 0, 1)


def rotation(angle) -> torch.Tensor:
    """Rotation by `angle` [N]."""
    cos = angle.cos()
    sin = angle.sin()
    return _matrix(cos, -sin, 0, sin, cos, 0, 0, 0, 1)


def stretch(x, y, angle, direction, factor) -> torch.Tensor:
    """Stretching by `factor` along `direction`, then rotation by `angle`, then scaling by x and y;
    [N] each."""
    return (scaling(x, y) @ rotation(angle - direction) @ scaling(factor, 1 / factor)
            @ rotation(direction))


def positions(matrices, x, y) -> torch.Tensor:
    """Where matrices [N,3,3] take the points of a grid with coordinates x [W] and y [H]:
    [N,2,H,W]."""
    along_x, along_y, shift = matrices[:, :2, :, None, None].unbind(2)
    return along_x * x + along_y * y[:, None] + shift


def reach(G, w: int, h: int) -> list[int]:
    """Left, right, top and bottom padding that serves the corners of a whole batch."""
    centre = G.new_tensor([w - 1, h - 1]) / 2
    extent = (G[:, :2, :2].abs() * centre).sum(2)
    shift = G[:, :2, 2]
    sides = torch.stack([(extent - shift).amax(0), (extent + shift).amax(0)], dim=1)
    sides = (sides - centre[:, None] + 2 * MARGIN).ceil().clamp(min=0)
    return sides.minimum(2 * centre[:, None]).int().flatten().tolist()


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
    h, w = images.shape[2:]
    device = G.device
    left, right, top, bottom = padding or [w - 1, w - 1, h - 1, h - 1]
    images = (_upsampling(h, top, bottom, device) @ images.float()
              @ _upsampling(w, left, right, device).t())

    def centred(size):
        """Positions of the doubled pixels of an axis with its margins."""
        half = size + 2 * MARGIN
        return (torch.arange(2 * half, device=device) - half + 1) / 2

    x, y = positions(G, centred(w), centred(h)).unbind(1)
    grid = torch.stack([(4 * x + 2 * (left - right) - 1) / images.shape[3],
                        (4 * y + 2 * (top - bottom) - 1) / images.shape[2]], dim=-1)
    images = F.grid_sample(images, grid, align_corners=False)
    return _downsampling(h, device) @ images @ _downsampling(w, device).t()


def edm_augmentation(p: float) -> AugmentPipe | None:
    """What EDM trains with; None for p = 0."""
    return AugmentPipe(p=p, **EDM_MULTIPLIERS) if p else None
