"""Noise: its level sigma at a time t, the levels that samplers visit, and the schedules of
discrete time.

A noisy image is x = s (x_0 + sigma z), z ~ N(0, I); the scale s is 1 unless a sampler says
otherwise. Times and levels are tensors of any shape, in the type of the computation.
"""

import itertools
import math

import numpy as np
import torch

from dnnlib import UserError

# --- sigma(t) ------------------------------------------------------------------------------------


class VP:
    """Variance preserving (arXiv 2206.00364, Table 1): sigma(t) = sqrt(exp(beta_d t^2 / 2 +
    beta_min t) - 1)."""

    def __init__(self, beta_d=19.9, beta_min=0.1):
        self.beta_d = beta_d
        self.beta_min = beta_min

    @classmethod
    def of_range(cls, sigma_min: float, sigma_max: float, epsilon_s: float):
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
        low = math.log(sigma_min**2 + 1)
        high = math.log(sigma_max**2 + 1)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t):
        return ((self.beta_d * t.square() / 2 + self.beta_min * t).exp() - 1).sqrt()

    def derivative(self, t):
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) / 2 * (sigma + 1 / sigma)

    def inverse(self, sigma):
        # As the input of a network it is multiplied by 999: the order of the operations counts.
        log = (1 + sigma.square()).log()
        return ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() - self.beta_min) / self.beta_d


class VE:
    """Variance exploding: sigma(t) = sqrt(t)."""

    sigma = staticmethod(torch.sqrt)
    inverse = staticmethod(torch.square)

    def derivative(self, t):
        return 1 / (2 * t.sqrt())


class Linear:
    """sigma(t) = t: a time is a level."""

    def sigma(self, t):
        return t

    inverse = sigma

    def derivative(self, t):
        return 1.0


class Flow:
    """The straight path of flow matching (arXiv 2209.03003, 2210.02747): (1 - t) x_0 + t z.

    sigma(t) = t / (1 - t), and the scale is s = 1 - t = 1 / (1 + sigma).
    """

    def sigma(self, t):
        return t / (1 - t)

    def derivative(self, t):
        return (1 - t) ** -2

    def inverse(self, sigma):
        return sigma / (1 + sigma)


# --- Levels --------------------------------------------------------------------------------------


def geometric_levels(u, first: float, last: float):
    """Levels with even steps in ln(sigma): `first` at u = 0, `last` at u = 1."""
    return first * (last / first) ** u


def edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float,
               dtype=torch.float32):
    """t_0 = sigma_max ... t_(N-1) = sigma_min without the final zero (arXiv 2206.00364, Eq. 5)."""
    ramp = unit_steps(num_steps, dtype)
    ends = sigma_max**(1 / rho), sigma_min**(1 / rho)
    return (ends[0] + ramp * (ends[1] - ends[0])) ** rho


def unit_steps(num_steps: int, dtype=torch.float64):
    """`num_steps` numbers from 0 to 1; a single one is 0. Raises UserError for none."""
    if num_steps < 1:
        raise UserError('must be at least 1', field='num_steps', value=num_steps)
    return torch.arange(num_steps, dtype=dtype) / max(num_steps - 1, 1)


def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008,
                 dtype=torch.float32) -> torch.Tensor:
    """Noise levels u_0 > ... > u_M = 0 of improved DDPM in the terms of EDM (Table 1), [M + 1]:
    u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1), abar_j = sin(pi/2 j / (M (C_2
    + 1)))^2.

    abar and its ratios are float32 as in the reference, which decides the last levels (up to 5e-4
    of their size); `dtype` is that of the recursion.
    """
    abar = (0.5 * math.pi * torch.arange(M + 1) / M / (C_2 + 1)).sin().square()
    ratio = (abar[:-1] / abar[1:]).clip(min=C_1)
    u = torch.zeros(M + 1, dtype=dtype)
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j].square() + 1) / ratio[j - 1] - 1).sqrt()
    return u


# --- Discrete time -------------------------------------------------------------------------------


def betas_from_alphas_cumprod(abar):
    """beta_i = 1 - abar_i / abar_(i-1) with abar_(-1) = 1."""
    return 1 - abar / np.append(1.0, abar[:-1])


def _linear(steps):
    return np.linspace(0.1 / steps, 20 / steps, steps)


def _cosine(steps):
    abar = np.cos(math.pi / 2 * (np.arange(steps + 1) / steps + 0.008) / 1.008) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def _linear_float32(steps, first=1e-4, last=0.02):
    """What CBDM uses: from `first` to `last` whatever the number of steps, spaced in float32."""
    # On the CPU wherever networks are being built.
    return torch.linspace(first, last, steps, device='cpu').double().numpy()


def _progressive_cosine(steps):
    """log-SNR l(u) = -2 ln tan(a u + b), from 20 at u = 0 to -20 at u = 1; abar = 1 / (1 +
    exp(-l))."""
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    log_snr = -2 * np.log(np.tan(a * np.arange(1, steps + 1) / steps + b))
    return betas_from_alphas_cumprod(1 / (1 + np.exp(-log_snr)))


def _edm(steps, sigma_min=0.002, sigma_max=80.0, rho=7):
    """The levels of EDM's sampler (arXiv 2206.00364, Eq. 5), from `sigma_min` up: abar = 1 / (1 +
    sigma^2)."""
    with torch.device('cpu'):
        sigmas = edm_sigmas(steps, sigma_min, sigma_max, rho, torch.float64).flip(0).numpy()
    return betas_from_alphas_cumprod(1 / (1 + sigmas**2))


SCHEDULES = {
    'edm': _edm,
    'linear': _linear,
    'cosine': _cosine,
    'linear_float32': _linear_float32,
    'progressive_cosine': _progressive_cosine
}


def make_betas(schedule: str, steps: int, ends=None) -> np.ndarray:
    """The noise schedule beta_0 .. beta_(T-1), float64; `ends` are those of 'linear_float32'
    (betas) or 'edm' (levels).

    Raises UserError for an unknown name.
    """
    if schedule not in SCHEDULES:
        raise UserError(f'noise_schedule: {schedule!r} is not one of {", ".join(SCHEDULES)}')
    return SCHEDULES[schedule](steps, *(ends or ()))


def _unfit(text: str) -> UserError:
    return UserError(f'time steps: {text}', field='timestep_respacing')


def spaced_steps(total: int, spec) -> list[int]:
    """The steps of 0..total-1 that a respaced process keeps, ascending.

    '' keeps all; 'ddimN' keeps N at the smallest integer stride that gives exactly N; 'a,b,...'
    cuts the range into equal sections and keeps a evenly spaced steps of the first, b of the
    second. Raises UserError if it cannot.
    """
    spec = str(spec).strip() or str(total)
    if spec.startswith('ddim') and spec[4:].isdigit():
        for stride in range(1, total):
            steps = range(0, total, stride)
            if len(steps) == int(spec[4:]):
                return list(steps)
        raise _unfit(f'no whole stride leaves {spec[4:]} of {total} steps')
    if not all(part.strip().isdigit() for part in spec.split(',')):
        raise _unfit(f'{spec!r} is not a list such as 250 or 10,15,20, nor e.g. ddim50')
    counts = [int(part) for part in spec.split(',')]
    kept = []
    start = 0
    for index, count in enumerate(counts):
        size = total // len(counts) + (index < total % len(counts))
        if count > size:
            raise _unfit(f'{count} steps do not fit into a section of {size}')
        stride = (size - 1) / (count - 1) if count > 1 else 1
        positions = itertools.count(0.0, stride)  # by repeated addition, as published
        kept += [start + round(position) for position in itertools.islice(positions, count)]
        start += size
    return kept
