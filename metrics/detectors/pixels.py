"""The pixels themselves: for small images, whose differences they are."""

import torch

from dnnlib import UserError

MAX_PIXELS = 64 * 64 * 3  # numbers an image: the covariance has the square of it


class Pixels:
    """The pixels themselves, values 0..255, in one output `features` [N, C H W]."""

    weights = fingerprint = None

    def __init__(self, weights=None, device='cpu'):
        self.device = torch.device(device)

    def __call__(self, images: torch.Tensor, outputs=('features',)) -> dict[str, torch.Tensor]:
        dim = images[0].numel()
        if dim > MAX_PIXELS:
            raise UserError(f'images of {list(images.shape[1:])} have {dim} pixel values, too '
                            f'many for the pixel metrics (at most {MAX_PIXELS}, that is 64x64 '
                            'RGB); use fid or fd_dinov2')
        return {'features': images.to(self.device).flatten(1).to(torch.float32)}
