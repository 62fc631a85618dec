"""Samplers: plain functions over a denoiser D(x; sigma, labels).

`denoiser(x, sigma, labels)` gives the denoised images [N,C,H,W]; `noise` is standard normal; churn noise comes from
`random.randn_like`.
"""

import math

import torch

from torch_utils.random import GlobalRandom


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
