"""Discrete-time Gaussian diffusion: T noising steps x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z
and their reversal.

DDPM (arXiv 2006.11239), improved DDPM (2102.09672), DDIM (2010.02502). Notation: images x
[N,C,H,W] in [-1, 1]; t int64 [N] in 0..T-1 counts from 0, the least noisy step; abar is
`alphas_cumprod`. Tables are float64, and float32 once gathered. A network's `output` is [N,C,H,W],
or [N,2C,H,W] with the variance channels last.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from training.diffusion.noise import betas_from_alphas_cumprod, make_betas, spaced_steps

# --- The process ---------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a network's output says of x_(t-1): predicted x_0 and noise, mean and log variance of
    the Gaussian."""

    start: torch.Tensor
    epsilon: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


def mean_flat(x):
    """Mean over all but the first axis."""
    return x.flatten(1).mean(1)


def _inner(t):
    """[N,1,1,1]: 1 where another step follows t [N], which alone gets noise, 0 at t = 0."""
    return (t != 0).reshape(-1, 1, 1, 1)


def _kl(mean, log_variance, p: Prediction):
    """KL of a Gaussian and a predicted one, in nats, averaged over the elements: [N]."""
    return mean_flat(0.5 * (-1 + p.log_variance - log_variance
                            + (log_variance - p.log_variance).exp()
                            + (mean - p.mean) ** 2 * (-p.log_variance).exp()))


def discretized_nll(x, mean, log_variance):
    """-ln P(x +- 1/255) under a Gaussian, in nats, for x in [-1, 1] of 8 bits; tails belong to the
    end values.

    The normal distribution function is approximated by (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3))) /
    2.
    """
    def cdf(y):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    inverse_sd = (-0.5 * log_variance).exp()
    above, below = cdf(inverse_sd * (x - mean + 1 / 255)), cdf(inverse_sd * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -probability.clamp(min=1e-12).log()


CHOICES = {
    'variance': ('learned_range', 'fixed_small', 'fixed_large'),
    'loss': ('mse', 'rescaled_mse', 'kl', 'rescaled_kl'),
    'predict': ('epsilon', 'start')
}


@dataclasses.dataclass(eq=False)
class GaussianDiffusion:
    """A noising process and what is computed with it.

    schedule    name in `SCHEDULES`; `steps` before respacing
    respacing   steps that are kept (see `spaced_steps`); the betas follow from what remains
    variance    'learned_range' (interpolated between the two bounds by the network), 'fixed_small'
                (posterior variance) or 'fixed_large' (beta)
    loss        'mse', 'rescaled_mse' (variational term times T/1000), 'kl' or 'rescaled_kl'
                (times T)
    predict     what the network predicts: 'epsilon' or 'start'
    rescale_timesteps  give the network times in 0..1000 whatever `steps` is
    beta_range  the first and the last beta of the 'linear_float32' schedule (default: 1e-4 and
                0.02)
    sigma_range  the lowest and the highest level of the 'edm' schedule (default: 0.002 and 80)
    """

    schedule: str = 'linear'
    steps: int = 1000
    respacing: str = ''
    variance: str = 'learned_range'
    loss: str = 'mse'
    predict: str = 'epsilon'
    rescale_timesteps: bool = False
    beta_range: Sequence[float] | None = None
    sigma_range: Sequence[float] | None = None

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f'{name}: {value!r} is not one of {", ".join(choices)}')
        self.learned = self.variance == 'learned_range'
        betas = make_betas(self.schedule, self.steps, self.beta_range or self.sigma_range)
        kept = self.kept = np.array(spaced_steps(self.steps, self.respacing))
        if len(kept) < 2:
            raise UserError(f'time steps: {self.respacing!r} leaves fewer than two',
                            field='timestep_respacing')
        if betas.max() >= 1:
            raise UserError(f'diffusion_steps: the {self.schedule} schedule needs more than '
                            f'{self.steps}')
        self.num_steps = len(kept)
        self.betas = betas_from_alphas_cumprod(np.cumprod(1 - betas)[kept])

        # Tables [num_steps], which `table` looks up.
        abar = self.alphas_cumprod = np.cumprod(1 - self.betas)
        abar_prev = self.alphas_cumprod_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)
        self.sqrt_abar = np.sqrt(abar)
        self.sqrt_1m_abar = np.sqrt(1 - abar)
        self.sqrt_recip = np.sqrt(1 / abar)
        self.sqrt_recipm1 = np.sqrt(1 / abar - 1)
        self.sigmas = np.sqrt((1 - abar) / abar)  # noise level of x_t / sqrt(abar_t)
        self.posterior_mean_coef1 = self.betas * np.sqrt(abar_prev) / (1 - abar)
        self.posterior_mean_coef2 = (1 - abar_prev) * np.sqrt(1 - self.betas) / (1 - abar)
        self.posterior_variance = self.betas * (1 - abar_prev) / (1 - abar)
        # At t = 0 the posterior has no variance: its logarithm is that of t = 1.
        small, large = (np.log(np.append(self.posterior_variance[1], values[1:]))
                        for values in (self.posterior_variance, self.betas))
        self.posterior_log_variance_clipped = small
        self.log_beta = np.log(self.betas)
        self.log_variance = large if self.variance == 'fixed_large' else small
        self.model_step = kept * (1000 / self.steps if self.rescale_timesteps else 1)
        self._on_device = {}

    def respaced(self, spec) -> 'GaussianDiffusion':
        """The same process with other steps kept."""
        return dataclasses.replace(self, respacing=str(spec))

    def table(self, name, t):
        """Table `name` at t, [N,1,1,1] float32."""
        key = name, t.device
        if key not in self._on_device:
            with torch.inference_mode(False):  # sampling may come before training
                self._on_device[key] = torch.from_numpy(getattr(self, name)).float().to(t.device)
        return self._on_device[key][t].reshape(-1, 1, 1, 1)

    def noise_levels(self, t):
        """sigma [N] of x_t / sqrt(abar_t)."""
        return self.table('sigmas', t).flatten()

    def model_steps(self, t):
        """What the network is told for t [N]: the step's number before respacing (int64), or its
        time in 0..1000."""
        steps = self.table('model_step', t).flatten()
        return steps if self.rescale_timesteps else steps.long()

    # The forward process.

    def q_sample(self, x_0, t, noise):
        """x_t: sqrt(abar) x_0 + sqrt(1 - abar) noise."""
        return self.table('sqrt_abar', t) * x_0 + self.table('sqrt_1m_abar', t) * noise

    def q_posterior(self, x_0, x_t, t):
        """Mean [N,C,H,W] and log variance [N,1,1,1] of q(x_(t-1) | x_t, x_0)."""
        at_start = self.table('posterior_mean_coef1', t) * x_0
        mean = at_start + self.table('posterior_mean_coef2', t) * x_t
        return mean, self.table('posterior_log_variance_clipped', t)

    # The reverse process.

    def prediction(self, output, x_t, t, clip=False) -> Prediction:
        """What `output` says of x_(t-1); `clip` clamps the predicted x_0 to [-1, 1]."""
        C = x_t.shape[1]
        if output.shape[1] != (2 * C if self.learned else C):
            raise ValueError(f'network output has {output.shape[1]} channels for images of {C} '
                             f'and variance {self.variance}')
        values = output[:, :C]
        start = values
        if self.predict == 'epsilon':
            start = self.table('sqrt_recip', t) * x_t - self.table('sqrt_recipm1', t) * values
        if clip:
            start = start.clamp(-1, 1)
        epsilon = values if self.predict == 'epsilon' else self._epsilon(start, x_t, t)
        mean, _ = self.q_posterior(start, x_t, t)
        log_variance = self.table('log_variance', t)
        if self.learned:
            share = (output[:, C:] + 1) / 2
            log_variance = share * self.table('log_beta', t) + (1 - share) * log_variance
        return Prediction(start, epsilon, mean, log_variance)

    def _epsilon(self, start, x_t, t):
        """The noise that x_0 and x_t imply."""
        return (self.table('sqrt_recip', t) * x_t - start) / self.table('sqrt_recipm1', t)

    def ancestral_step(self, output, x_t, t, noise, clip=True):
        """x_(t-1) drawn from the predicted Gaussian; no noise at t = 0."""
        p = self.prediction(output, x_t, t, clip)
        return p.mean + _inner(t) * (0.5 * p.log_variance).exp() * noise

    def ddim_step(self, output, x_t, t, noise=None, eta=0.0, clip=True):
        """x_(t-1) of DDIM (arXiv 2010.02502, Eq. 12); `eta=0` is deterministic and needs no
        noise."""
        abar, abar_prev = self.table('alphas_cumprod', t), self.table('alphas_cumprod_prev', t)
        sd = eta * ((1 - abar_prev) / (1 - abar)).sqrt() * (1 - abar / abar_prev).sqrt()
        x = self._along_path(output, x_t, t, clip, abar_prev, sd)
        return x if eta == 0 else x + _inner(t) * sd * noise

    def ddim_reverse_step(self, output, x_t, t, clip=True):
        """x_(t+1): the deterministic DDIM path run backwards; pure noise follows the last step."""
        return self._along_path(output, x_t, t, clip, self.table('alphas_cumprod_next', t))

    def _along_path(self, output, x_t, t, clip, abar, sd=0):
        """The mean of the predicted x at the level `abar`, to which noise of `sd` is added."""
        start = self.prediction(output, x_t, t, clip).start
        epsilon = self._epsilon(start, x_t, t)  # again, as clipping changes it
        return start * abar.sqrt() + (1 - abar - sd**2).sqrt() * epsilon

    # Losses, [N].

    def vb_term(self, output, x_0, x_t, t):
        """A term of the variational bound in bits per dimension: the KL of x_(t-1), at t = 0 the
        likelihood of x_0."""
        p = self.prediction(output, x_t, t)
        kl = _kl(*self.q_posterior(x_0, x_t, t), p)
        nll = mean_flat(discretized_nll(x_0, p.mean, p.log_variance))
        return torch.where(t == 0, nll, kl) / math.log(2)

    def training_losses(self, output, x_0, x_t, t, noise) -> dict:
        """Loss of a network's output at x_t = q_sample(x_0, t, noise): {'loss', and its terms
        'mse' and 'vb'}."""
        if self.loss.endswith('kl'):
            loss = self.vb_term(output, x_0, x_t, t)
            return {'loss': loss * self.num_steps if self.loss == 'rescaled_kl' else loss}
        target = noise if self.predict == 'epsilon' else x_0
        return self._terms(target - output[:, :x_t.shape[1]], output,
                           lambda frozen: self.vb_term(frozen, x_0, x_t, t))

    def distillation_losses(self, output, teacher: Prediction, x_t, t, clip=False) -> dict:
        """Loss of a student against the teacher's prediction at the same x_t (arXiv 2409.03550).

        mse between the two noises, and with a learned variance the KL of the two Gaussians over
        x_(t-1) in bits, also at t = 0, with the student's noise frozen.
        """
        if self.loss.endswith('kl'):
            raise UserError('use_kl: distillation has no pure KL loss; use mse or rescaled_mse')

        def divergence(frozen):
            student = self.prediction(frozen, x_t, t, clip)
            return _kl(teacher.mean, teacher.log_variance, student) / math.log(2)

        error = teacher.epsilon - self.prediction(output, x_t, t).epsilon
        return self._terms(error, output, divergence)

    def _terms(self, error, output, bound) -> dict:
        """The loss of an error [N,C,H,W] and, with a learned variance, of `bound` [N].

        `bound` gets the output with no gradient into the image channels: the variational term
        trains the variance alone.
        """
        terms = {'mse': mean_flat(error**2)}
        if self.learned:
            values, variance = output.chunk(2, dim=1)
            vb = bound(torch.cat([values.detach(), variance], dim=1))
            terms['vb'] = vb * (self.num_steps / 1000) if self.loss == 'rescaled_mse' else vb
        return {'loss': sum(terms.values()), **terms}
