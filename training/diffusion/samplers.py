"""Samplers: plain functions over a denoiser D(x; sigma, labels).

`denoiser(x, sigma, labels)` gives the denoised images [N,C,H,W]; `noise` is standard normal; churn noise comes from
`random.randn_like`.
"""

import math

import torch

from torch_utils.random import GlobalRandom
from training.networks.edm import iddpm_levels

# Class of network -> the sampler that it was published with; every other network is sampled as EDM's are.
FAMILIES = {'Precond': 'edm2', 'DiscreteDenoiser': 'ddpm'}


def family_sampler(net) -> dict:
    """The sampler of a network whose snapshot names none."""
    return {'name': FAMILIES.get(type(net).__name__, 'edm')}


def edm_sigmas(num_steps, sigma_min, sigma_max, rho, dtype=torch.float32, device='cpu'):
    """Noise levels t_0 = sigma_max ... t_(N-1) = sigma_min without the final zero (arXiv 2206.00364, Eq. 5)."""
    i = torch.arange(num_steps, dtype=dtype, device=device)
    ramp = i / max(num_steps - 1, 1)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def guided(denoiser, guide, guidance):
    """D = D_guide + guidance (D_main - D_guide): classifier-free guidance or autoguidance, whatever the guide is.

    `guide=None` takes the main denoiser itself, for which the formula changes nothing; so does `guidance=1`.
    """
    if guidance == 1:
        return denoiser

    def denoise(x, sigma, labels=None):
        main = denoiser(x, sigma, labels)
        other = (guide or denoiser)(x, sigma, labels)
        return other.lerp(main, guidance)

    return denoise


def edm2_sampler(denoiser, noise, labels=None, guide=None, guidance=1, num_steps=32, sigma_min=0.002, sigma_max=80,
                 rho=7, S_churn=0, S_min=0, S_max=float('inf'), S_noise=1, dtype=torch.float32, random=None):
    """EDM2's stochastic Heun sampler (arXiv 2206.00364, Algorithm 2), noise [N,C,H,W] -> samples [N,C,H,W].

    2 num_steps - 1 evaluations. Random numbers are drawn only in steps that add noise
    (S_churn > 0 and S_min <= sigma <= S_max).
    """
    random = random or GlobalRandom(noise.device)
    denoise = guided(denoiser, guide, guidance)
    sigmas = edm_sigmas(num_steps, sigma_min, sigma_max, rho, dtype, noise.device)
    levels = sigmas.tolist() + [0.0]                            # on the host, so that no step waits for the device
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])

    x_next = noise.to(dtype) * sigmas[0]
    for i in range(num_steps):
        t, t_next, x = sigmas[i], sigmas[i + 1], x_next
        if S_churn > 0 and S_min <= levels[i] <= S_max:
            gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
            t_hat = t + gamma * t
            x = x + (t_hat**2 - t**2).sqrt() * S_noise * random.randn_like(x)
            t = t_hat
        slope = (x - denoise(x, t, labels).to(dtype)) / t
        x_next = x + (t_next - t) * slope
        if i < num_steps - 1:                                   # second-order correction
            slope_next = (x_next - denoise(x_next, t_next, labels).to(dtype)) / t_next
            x_next = x + (t_next - t) * (slope / 2 + slope_next / 2)
    return x_next


def _network_range(denoiser, sigma_min, sigma_max):
    """The range of noise levels cut to what the network knows (any denoiser may have sigma_min and sigma_max)."""
    return max(sigma_min, getattr(denoiser, 'sigma_min', 0.0)), min(sigma_max, getattr(denoiser, 'sigma_max', math.inf))


def _rounding(denoiser):
    """round_sigma of the network on Python numbers, in double precision; identity where there is none."""
    if not hasattr(denoiser, 'round_sigma'):
        return float
    return lambda sigma: float(denoiser.round_sigma(torch.tensor(sigma, dtype=torch.float64)))


def edm_sampler(denoiser, noise, labels=None, guide=None, guidance=1, num_steps=18, sigma_min=0.002, sigma_max=80,
                rho=7, S_churn=0, S_min=0, S_max=float('inf'), S_noise=1, dtype=torch.float64, random=None):
    """EDM's stochastic Heun sampler (arXiv 2206.00364, Algorithm 2), noise [N,C,H,W] -> samples [N,C,H,W] in `dtype`.

    Unlike `edm2_sampler` it keeps to the noise levels that the network knows (`sigma_min`, `sigma_max`, `round_sigma`),
    computes in double precision, and draws noise in every step, whether it is used or not.
    """
    random = random or GlobalRandom(noise.device)
    denoise = guided(denoiser, guide, guidance)
    round_sigma = _rounding(denoiser)
    sigma_min, sigma_max = _network_range(denoiser, sigma_min, sigma_max)
    levels = [round_sigma(t) for t in edm_sigmas(num_steps, sigma_min, sigma_max, rho, torch.float64).tolist()] + [0.0]

    def slope(x, t):
        return (x - denoise(x, x.new_full([], t), labels).to(dtype)) / t

    x = noise.to(dtype) * levels[0]
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= t <= S_max else 0
        t_hat = round_sigma(t + gamma * t)
        x = x + math.sqrt(max(t_hat**2 - t**2, 0)) * S_noise * random.randn_like(x)
        d = slope(x, t_hat)
        x_next = x + (t_next - t_hat) * d
        if i < num_steps - 1:                                   # second-order correction
            x_next = x + (t_next - t_hat) * (d / 2 + slope(x_next, t_next) / 2)
        x = x_next
    return x


# --- The design space of EDM: every published combination of schedule, scaling, time steps and solver -----------------


class _VPSchedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    def __init__(self, beta_d=19.9, beta_min=0.1):
        self.beta_d, self.beta_min = beta_d, beta_min

    @classmethod
    def of_range(cls, sigma_min, sigma_max, epsilon_s):
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
        low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t):
        return math.sqrt(math.exp(self.beta_d * t**2 / 2 + self.beta_min * t) - 1)

    def derivative(self, t):
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) / 2 * (sigma + 1 / sigma)

    def inverse(self, sigma):
        log = math.log(sigma**2 + 1)
        return (math.sqrt(self.beta_min**2 + 2 * self.beta_d * log) - self.beta_min) / self.beta_d


class _VESchedule:
    """sigma(t) = sqrt(t)."""

    sigma = staticmethod(math.sqrt)

    def derivative(self, t):
        return 1 / (2 * math.sqrt(t))

    def inverse(self, sigma):
        return sigma**2


class _LinearSchedule:
    """sigma(t) = t."""

    sigma = inverse = staticmethod(float)

    def derivative(self, t):
        return 1.0


def _ablation_levels(discretization, num_steps, sigma_min, sigma_max, rho, epsilon_s, vp, iddpm):
    """Noise levels of the N steps, from high to low, as Python numbers (arXiv 2206.00364, Table 1, "Time steps")."""
    u = [i / max(num_steps - 1, 1) for i in range(num_steps)]
    if discretization == 'vp':
        return [vp.sigma(1 + v * (epsilon_s - 1)) for v in u]
    if discretization == 've':
        return [math.sqrt(sigma_max**2 * (sigma_min**2 / sigma_max**2) ** v) for v in u]
    if discretization == 'iddpm':
        table = [v for v in iddpm_levels(**iddpm, dtype=torch.float64).tolist() if sigma_min <= v <= sigma_max]
        return [table[round((len(table) - 1) / max(num_steps - 1, 1) * i)] for i in range(num_steps)]
    return edm_sigmas(num_steps, sigma_min, sigma_max, rho, torch.float64).tolist()


def ablation_sampler(denoiser, noise, labels=None, guide=None, guidance=1, num_steps=18, sigma_min=None,
                     sigma_max=None, rho=7, solver='heun', discretization='edm', schedule='linear', scaling='none',
                     epsilon_s=1e-3, beta_d=19.9, beta_min=0.1, C_1=0.001, C_2=0.008, M=1000, alpha=1, S_churn=0,
                     S_min=0, S_max=float('inf'), S_noise=1, dtype=torch.float64, random=None):
    """The samplers that EDM generalises (arXiv 2206.00364, Table 1), noise [N,C,H,W] -> samples [N,C,H,W] in `dtype`.

    dx/dt = (sigma'/sigma + s'/s) x - sigma' s / sigma D(x / s; sigma) is integrated from noise to image with
    `solver`: euler | heun (`alpha` 1: Heun, 1/2: midpoint, 2/3: Ralston) over `discretization`: vp | ve | iddpm | edm,
    for the noise `schedule` sigma(t): vp | ve | linear and `scaling` s(t): vp (1 / sqrt(1 + sigma^2)) | none.
    The range of noise levels is by default that of the discretization; `beta_d` and `beta_min` set the one of vp.
    Raises ValueError for other names.
    """
    for name, value, known in [('solver', solver, ('euler', 'heun')), ('scaling', scaling, ('vp', 'none')),
                               ('discretization', discretization, ('vp', 've', 'iddpm', 'edm')),
                               ('schedule', schedule, ('vp', 've', 'linear'))]:
        if value not in known:
            raise ValueError(f'{name} {value!r} is unknown; choose {", ".join(known)}')
    random = random or GlobalRandom(noise.device)
    denoise = guided(denoiser, guide, guidance)
    round_sigma = _rounding(denoiser)

    default_vp = _VPSchedule(beta_d, beta_min)
    default = {'vp': (default_vp.sigma(epsilon_s), default_vp.sigma(1)), 've': (0.02, 100), 'iddpm': (0.002, 81),
               'edm': (0.002, 80)}[discretization]
    sigma_min, sigma_max = _network_range(denoiser, default[0] if sigma_min is None else sigma_min,
                                          default[1] if sigma_max is None else sigma_max)
    vp = _VPSchedule.of_range(sigma_min, sigma_max, epsilon_s)
    noise_of = {'vp': vp, 've': _VESchedule(), 'linear': _LinearSchedule()}[schedule]

    def s(t):
        return 1 / math.sqrt(1 + noise_of.sigma(t) ** 2) if scaling == 'vp' else 1.0

    def slope(x, t):
        sigma, derivative = noise_of.sigma(t), noise_of.derivative(t)
        denoised = denoise(x / s(t), x.new_full([], sigma), labels).to(dtype)
        shrink = -sigma * derivative * s(t) ** 2 if scaling == 'vp' else 0.0      # s' / s
        return (derivative / sigma + shrink) * x - derivative * s(t) / sigma * denoised

    levels = _ablation_levels(discretization, num_steps, sigma_min, sigma_max, rho, epsilon_s, vp,
                              dict(M=M, C_1=C_1, C_2=C_2))
    times = [noise_of.inverse(round_sigma(sigma)) for sigma in levels] + [0.0]
    x = noise.to(dtype) * noise_of.sigma(times[0]) * s(times[0])
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        sigma = noise_of.sigma(t)
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0
        t_hat = noise_of.inverse(round_sigma(sigma + gamma * sigma))
        added = math.sqrt(max(noise_of.sigma(t_hat) ** 2 - sigma**2, 0)) * s(t_hat) * S_noise
        x = s(t_hat) / s(t) * x + added * random.randn_like(x)
        h = t_next - t_hat
        d = slope(x, t_hat)
        if solver == 'euler' or i == num_steps - 1:
            x = x + h * d
        else:
            d_prime = slope(x + alpha * h * d, t_hat + alpha * h)
            x = x + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
    return x
