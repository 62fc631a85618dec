"""Discrete-time networks (ADM, DDPM) as denoisers of continuous noise level."""

import numpy as np
import torch

from training.diffusion.gaussian import GaussianDiffusion
from training.networks import build_network
from training.networks.layers import Denoiser, noise_coefficients


class DiscreteDenoiser(Denoiser):
    """A discrete-time network as a denoiser D(x; sigma, labels), for every sampler and for
    snapshots.

    x = x_t / sqrt(abar_t) has noise level sigma_t = sqrt((1 - abar_t) / abar_t), so D = x - sigma
    eps(x / sqrt(1 + sigma^2), t(sigma)). t(sigma) is the step of the nearest level, or with
    `interpolate` a fraction between two, linear in ln(sigma) (for networks that take fractions).
    `network` holds `class_name` and the arguments of the network, `diffusion` those of
    GaussianDiffusion. `clip` clamps D to [-1, 1].

    `net(x_t, step=..., class_labels=...)` calls the network itself: this is how objectives train
    it.
    """

    def __init__(self, network: dict, diffusion: dict, interpolate=False, clip=False):
        arguments = dict(network)
        model = build_network(arguments.pop('class_name'), **arguments)
        super().__init__(model.img_resolution, model.img_channels, model.label_dim,
                         model.precision)
        self.model = model
        self.diffusion = GaussianDiffusion(**diffusion)
        self.interpolate = interpolate
        self.clip = clip
        self.register_buffer('levels', torch.from_numpy(self.diffusion.sigmas), persistent=False)
        self.sigma_min, *_, self.sigma_max = self.diffusion.sigmas.tolist()

    def coefficients(self, sigma):
        if self.diffusion.predict == 'start':
            return 0, torch.ones_like(sigma), *noise_coefficients(sigma, self.step_of(sigma))[2:]
        return noise_coefficients(sigma, self.step_of(sigma))

    def forward(self, x, sigma=None, class_labels=None, step=None, **extra):
        if step is not None:
            _, _, labels = self.conditions(x, 0, class_labels)
            return self.model(x, step, labels, **extra)
        # In float32 here: the network has a precision of its own.
        D_x = self.precondition(self.model, x, sigma, class_labels, force_fp32=True, **extra)
        return D_x.clamp(-1, 1) if self.clip else D_x

    def _nearest(self, sigma):
        return torch.bucketize(sigma.double(), (self.levels[1:] + self.levels[:-1]) / 2)

    def step_of(self, sigma):
        """What the network is told for noise levels sigma [N]."""
        if not self.interpolate:
            return self.diffusion.model_steps(self._nearest(sigma))
        steps = self.diffusion.model_steps(torch.arange(len(self.levels)))
        t = np.interp(sigma.double().log().cpu(), self.levels.log().cpu(), steps)
        return torch.from_numpy(t).to(sigma.device, torch.float32)

    def round_sigma(self, sigma):
        """The nearest noise level that the network was trained on (any level, if it
        interpolates).
        """
        sigma = torch.as_tensor(sigma, device=self.levels.device)
        return sigma if self.interpolate else self.levels[self._nearest(sigma)].to(sigma.dtype)
