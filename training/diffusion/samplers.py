"""Samplers by name: how images come out of noise.

A solver is a plain function `(denoiser, noise, levels, ...) -> samples [N,C,H,W]`. `denoiser(x,
sigma)` is D(x; sigma) (see `Guided`), `noise` [N,C,H,W] is standard normal, and `levels` are the
noise levels sigma_0 > ... > sigma_N = 0, a tensor [N + 1] on the CPU, so that no step waits for
the device; its type is that of the computation. `SAMPLERS` gives each solver its levels and its
options, and `sample` is the door to all of them.

A sampler's setting is a dictionary of plain values, `{'name': 'edm', 'num_steps': 18, ...}`;
snapshots keep one.
"""

import contextlib
import math
from functools import partial

import torch

from dnnlib import UserError
from dnnlib.util import finite, renamed_fields
from torch_utils.random import GlobalRandom, StackedRandomGenerator
from training.diffusion.noise import (
    VE,
    VP,
    Flow,
    Linear,
    edm_sigmas,
    geometric_levels,
    iddpm_levels,
    unit_steps,
)

# --- Denoisers -----------------------------------------------------------------------------------


class Guided:
    """A network with its labels and its guide as one denoiser:

    D = D_guide + guidance (D_net - D_guide).

    Classifier-free guidance or autoguidance, whatever the guide is. It acts at levels lo < sigma
    <= hi of `interval` (arXiv 2404.07724) and leaves the network alone elsewhere. `guidance=1`
    never calls the guide, 0 calls nothing else. Raises UserError for guidance without a guide and
    for an interval that nothing is guided in.
    """

    def __init__(self, net, labels=None, guide=None, guidance=1, interval=None):
        if guidance != 1 and guide is None:
            raise UserError('needs a guiding network', field='guidance', value=guidance)
        self.low, self.high = interval or (0, math.inf)
        if interval and (guidance == 1 or not 0 <= self.low < self.high):
            raise UserError('needs LO < HI and a guidance other than 1', field='guidance_interval',
                            value=f'{self.low:g},{self.high:g}')
        self.net = net
        self.labels = labels
        self.guide = guide
        self.guidance = guidance

    def _evaluate(self, call, sigma, channels: int):
        """`call` of the network, guided in its first channels; others, such as variances, are the
        network's."""
        if self.guidance == 1 or not self.low < sigma <= self.high:
            return call(self.net)
        if self.guidance == 0:
            return call(self.guide)
        main = call(self.net)
        guided = call(self.guide)[:, :channels].lerp(main[:, :channels], self.guidance)
        return torch.cat([guided, main[:, channels:]], dim=1)

    def __call__(self, x, sigma):
        """D(x; sigma) in the type of x [N,C,H,W], for one level `sigma` on the host."""
        level = x.new_full([], float(sigma))
        D = self._evaluate(lambda net: net(x, level, self.labels), sigma, x.shape[1])
        return D.to(x.dtype)

    def output(self, x_t, step, sigma: float):
        """What a network of discrete time says of x_t [N,C,H,W] at `step` [N], of level sigma: [N,
        C or 2C, H, W]."""
        return self._evaluate(lambda net: net(x_t, step=step, class_labels=self.labels), sigma,
                              x_t.shape[1])

    def cut(self, sigma_min: float, sigma_max: float):
        """A range of noise levels cut to what the network was trained on, where it says so."""
        return (max(sigma_min, getattr(self.net, 'sigma_min', 0.0)),
                min(sigma_max, getattr(self.net, 'sigma_max', math.inf)))

    def round_sigma(self, sigma):
        """The nearest noise level that the network was trained on, for one level on the host."""
        if not hasattr(self.net, 'round_sigma'):
            return sigma
        return self.net.round_sigma(sigma).to(sigma)

    def levels(self, sigmas):
        """`sigmas` [N], rounded, and the zero that ends them: [N + 1]."""
        return torch.stack([*map(self.round_sigma, sigmas), sigmas.new_zeros([])])


def without_labels(net):
    """A network that is told no class, as the guide of itself: classifier-free guidance of a
    network whose labels were dropped in training.
    """
    return lambda x, *sigma, class_labels=None, **step: net(x, *sigma[:1], **step)


# --- Solvers -------------------------------------------------------------------------------------

# Scalings s(sigma), and -s' / (s sigma').
SCALES = {
    'none': (lambda sigma: 1.0, None),
    'vp': (lambda sigma: 1 / (1 + sigma.square()).sqrt(),
           lambda sigma: sigma / (1 + sigma.square())),
    'flow': (lambda sigma: 1 / (1 + sigma), lambda sigma: 1 / (1 + sigma))
}


def heun(denoiser, noise, levels, random, path=Linear(), scaling='none', solver='heun', alpha=1,
         S_churn=0, S_min=0, S_max=math.inf, S_noise=1, always_draw=False):
    """EDM's stochastic sampler (arXiv 2206.00364, Algorithm 2), for every sigma(t) and s(t) of its
    Table 1.

    dx/dt = s'/s x + s sigma'/sigma (x / s - D(x / s; sigma)) is integrated from noise to image
    with `solver`: euler or heun (`alpha` 1: Heun, 1/2: midpoint, 2/3: Ralston), for the noise
    `path` sigma(t) (default: t) and the `scaling` s(t) (see SCALES). Levels between S_min and
    S_max get noise: as much of it as if they were higher by the factor 1 + min(S_churn / N,
    sqrt(2) - 1). `always_draw`: other levels draw and do not use it.
    """
    num_steps = len(levels) - 1
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    # The working precision decides, as in the reference.
    low, high = levels.new_tensor([S_min, S_max])
    scale, shrinkage = SCALES[scaling]

    def s(t):
        return scale(path.sigma(t))

    def slope(x, t):
        sigma = path.sigma(t)
        derivative = path.derivative(t)
        unscaled = x / s(t)
        d = (unscaled - denoiser(unscaled, sigma)) / sigma * (s(t) * derivative)
        return d - shrinkage(sigma) * derivative * x if scaling != 'none' else d

    times = path.inverse(levels[:-1])
    times = torch.cat([times, times.new_zeros([1])])
    x = noise.to(levels.dtype) * path.sigma(times[0]) * s(times[0])
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        sigma = path.sigma(t)
        churned = gamma > 0 and low <= sigma <= high
        t_hat = t
        if churned:
            t_hat = path.inverse(denoiser.round_sigma(sigma + gamma * sigma))
            added = (path.sigma(t_hat) ** 2 - sigma**2).clamp(min=0).sqrt() * s(t_hat) * S_noise
            x = s(t_hat) / s(t) * x + added * random.randn_like(x)
        elif always_draw and gamma > 0:
            random.skip_like(x)
        h = t_next - t_hat
        d = slope(x, t_hat)
        if solver == 'euler' or i == num_steps - 1:
            x = x + h * d
            continue
        t_mid = t_next if alpha == 1 else t_hat + alpha * h
        d_mid = slope(x + alpha * h * d, t_mid)
        x = x + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_mid)
    return x


def dpmpp_2m(denoiser, noise, levels, random=None):
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) for the scale alpha = 1, where lambda =
    -ln(sigma):

    x_i = sigma_i / sigma_(i-1) x_(i-1) - (exp(-h_i) - 1) D_i, h_i = lambda_i - lambda_(i-1),
    D_i = (1 + 1 / (2 r_i)) x_0(i-1) - 1 / (2 r_i) x_0(i-2), r_i = h_(i-1) / h_i,

    with x_0(i) = D(x_i; sigma_i). The first step, and the last one to sigma = 0 (h = inf), are of
    first order.
    """
    x = noise.to(levels.dtype) * levels[0]
    before = None  # the level and the denoised images of the last step
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        denoised = denoiser(x, sigma)
        D = denoised
        if before is not None and sigma_next > 0:
            r = (before[0] / sigma).log() / (sigma / sigma_next).log()
            D = denoised + (denoised - before[1]) / (2 * r)
        x = sigma_next / sigma * x - (sigma_next / sigma - 1) * D
        before = sigma, denoised
    return x


def ancestral(denoiser, noise, levels, random, eta=1.0, clip=False):
    """DDIM (arXiv 2010.02502, Eq. 12) for the scale 1; `eta=1` is DDPM's chain, `eta=0` draws no
    noise.

    x' = D + sqrt(sigma'^2 - sd^2) (x - D) / sigma + sd z,
    sd = eta sigma' / sigma sqrt(sigma^2 - sigma'^2). `clip` clamps D to [-1, 1].
    """
    x = noise.to(levels.dtype) * levels[0]
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        denoised = denoiser(x, sigma)
        denoised = denoised.clamp(-1, 1) if clip else denoised
        sd = eta * sigma_next / sigma * (sigma**2 - sigma_next**2).sqrt()
        x = denoised + (sigma_next**2 - sd**2).sqrt() / sigma * (x - denoised)
        if sd > 0:
            x = x + sd * random.randn_like(x)
    return x


def chain(denoiser, noise, diffusion, random, eta=None, clip=True):
    """x_T -> x_0 by the network's own chain through the steps of `diffusion`: ancestral (DDPM), or
    DDIM with `eta`.

    `clip` clamps every predicted x_0. Noise is drawn in every step but the last, and never for
    DDIM with `eta=0`.
    """
    x = noise
    for index in reversed(range(diffusion.num_steps)):
        t = torch.full([len(x)], index, device=x.device)
        output = denoiser.output(x, diffusion.model_steps(t), diffusion.sigmas[index])
        fresh = 0 if index == 0 or eta == 0 else random.randn_like(x)
        if eta is None:
            x = diffusion.ancestral_step(output, x, t, fresh, clip)
        else:
            x = diffusion.ddim_step(output, x, t, fresh, eta, clip)
    return x


# --- Solvers with their levels -------------------------------------------------------------------


def _edm_levels(solve, denoiser, noise, random, *, num_steps, sigma_min, sigma_max, rho, dtype,
                **options):
    """`solve` over EDM's levels, cut to the network's range and rounded."""
    sigmas = edm_sigmas(num_steps, *denoiser.cut(sigma_min, sigma_max), rho, getattr(torch, dtype))
    return solve(denoiser, noise, denoiser.levels(sigmas), random, **options)


# The range of noise levels of each discretization; None is set by beta_d, beta_min and epsilon_s.
RANGES = {'vp': None, 've': (0.02, 100), 'iddpm': (0.002, 81), 'edm': (0.002, 80)}
CHOICES = {
    'solver': ('euler', 'heun'),
    'discretization': tuple(RANGES),
    'schedule': ('vp', 've', 'linear'),
    'scaling': ('vp', 'none')
}


def _ablation(denoiser, noise, random, *, num_steps, sigma_min, sigma_max, rho, discretization,
              schedule, epsilon_s, beta_d, beta_min, C_1, C_2, M, **options):
    """The samplers that EDM generalises (arXiv 2206.00364, Table 1): every schedule over every
    discretization."""
    ends = (RANGES[discretization]
            or VP(beta_d, beta_min).sigma(torch.tensor([epsilon_s, 1.0]).double()).tolist())
    low, high = denoiser.cut(ends[0] if sigma_min is None else sigma_min,
                             ends[1] if sigma_max is None else sigma_max)
    vp = VP.of_range(low, high, epsilon_s)
    if discretization == 'vp':
        sigmas = vp.sigma(1 + unit_steps(num_steps) * (epsilon_s - 1))
    elif discretization == 've':
        sigmas = geometric_levels(unit_steps(num_steps), high, low)
    elif discretization == 'iddpm':
        table = iddpm_levels(M, C_1, C_2, torch.float64)
        table = table[(low <= table) & (table <= high)]
        stride = (len(table) - 1) / max(num_steps - 1, 1)
        sigmas = table[(stride * torch.arange(num_steps)).round().long()]
    else:
        sigmas = edm_sigmas(num_steps, low, high, rho, torch.float64)
    path = {'vp': vp, 've': VE(), 'linear': Linear()}[schedule]
    return heun(denoiser, noise, denoiser.levels(sigmas), random, path, always_draw=True,
                **options)


def _flow(denoiser, noise, random, *, num_steps, sigma_max, solver):
    """The straight path of flow matching, with even steps of t from that of sigma_max to 0."""
    path = Flow()
    start = path.inverse(denoiser.cut(0, sigma_max)[1])
    times = start * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
    levels = denoiser.levels(path.sigma(times))
    return heun(denoiser, noise, levels, random, path, scaling='flow', solver=solver)


def _discrete(denoiser, noise, random, *, num_steps, clip, eta=None, **levels):
    """The chain of a network with discrete time, over its own steps; over EDM's levels for any
    other network. `eta=None` is DDPM's."""
    net = denoiser.net
    clip = getattr(net, 'clip', False) if clip is None else clip
    if hasattr(net, 'diffusion'):
        diffusion = net.diffusion if num_steps is None else net.diffusion.respaced(num_steps)
        return chain(denoiser, noise, diffusion, random, eta, clip)
    levels = {key: value for key, value in levels.items() if value is not None}
    solve = partial(ancestral, eta=1.0 if eta is None else eta, clip=clip)
    num_steps = num_steps or (1000 if eta is None else 50)
    return _edm_levels(solve, denoiser, noise, random, num_steps=num_steps, dtype='float64',
                       **_RANGE | levels)


# --- By name -------------------------------------------------------------------------------------


_RANGE = dict(sigma_min=0.002, sigma_max=80, rho=7)
_CHURN = dict(S_churn=0, S_min=0, S_max=math.inf, S_noise=1)
_OWN = dict(num_steps=None, clip=None, sigma_min=None, sigma_max=None, rho=None)
# Name -> (`run(denoiser, noise, random, **options)`, all its options with their defaults). `dtype`
# is the type of the computation; None stands for what the network or the discretization says.
SAMPLERS = {
    'edm': (partial(_edm_levels, partial(heun, always_draw=True)),
            dict(num_steps=18, **_RANGE, **_CHURN, dtype='float64')),
    'edm2': (partial(_edm_levels, heun),
             dict(num_steps=32, **_RANGE, **_CHURN, dtype='float32')),
    'ablation': (
        _ablation,
        dict(num_steps=18, sigma_min=None, sigma_max=None, rho=7, solver='heun', alpha=1,
             discretization='edm', schedule='linear', scaling='none', epsilon_s=1e-3, beta_d=19.9,
             beta_min=0.1, C_1=0.001, C_2=0.008, M=1000, **_CHURN)),
    'dpmpp-2m': (partial(_edm_levels, dpmpp_2m), dict(num_steps=20, **_RANGE, dtype='float64')),
    'flow': (_flow, dict(num_steps=32, sigma_max=999, solver='heun')),
    'ddim': (_discrete, _OWN | dict(eta=0.0)),
    'ddpm': (_discrete, _OWN)
}
# Networks, by class, that are not sampled as EDM's are.
_FAMILIES = {'Precond': 'edm2', 'DiscreteDenoiser': 'ddpm', 'FlowPrecond': 'flow'}


def family_sampler(net) -> dict:
    """The sampler of a network whose snapshot names none: that of the study which published its
    class."""
    setting = {'name': _FAMILIES.get(type(net).__name__, 'edm')}
    # Guided diffusion clips the predicted images as the network says, class-balancing diffusion
    # never does.
    if setting['name'] == 'ddpm' and type(net.model).__name__ == 'DDPMUNet':
        setting['clip'] = False
    return setting


def complete_setting(net, setting: dict):
    """A sampler's setting for a network, with all of its options.

    Raises UserError for an unknown name, option or value, and for what means nothing for this
    network.
    """
    options = dict(setting)
    name = options.pop('name')
    if name not in SAMPLERS:
        raise UserError(f'is no sampler; one of: {", ".join(SAMPLERS)}', field='name', value=name)
    defaults = SAMPLERS[name][1]
    own_steps = name in ('ddim', 'ddpm') and hasattr(net, 'diffusion')
    for key, value in options.items():
        if key not in defaults:
            raise UserError(f'is no option of the sampler {name}, which has {", ".join(defaults)}',
                            field=key, value=value)
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f'{value!r} is not one of {", ".join(CHOICES[key])}', field=key)
        if isinstance(defaults[key], int | float) and not isinstance(value, int | float):
            raise UserError('is no number', field=key, value=repr(value))
        if own_steps and key in _RANGE and value is not None:
            raise UserError('has no meaning for a network with time steps of its own', field=key,
                            value=value)
    if own_steps and options.get('num_steps') is not None:
        with renamed_fields(timestep_respacing='num_steps'):
            net.diffusion.respaced(options['num_steps'])
    return {'name': name} | defaults | options


_WORDS = {'None': None, 'True': True, 'False': False}


def plain_setting(setting: dict) -> dict:
    """A sampler's setting as JSON keeps it, None for what is infinite; also of a record of an
    earlier version, which has numbers as text.
    """
    def plain(value):
        if not isinstance(value, str):
            return finite(value)
        with contextlib.suppress(ValueError):
            return int(value) if value.isdigit() else finite(float(value))
        return _WORDS.get(value, value)

    return {key: plain(value) for key, value in setting.items()}


def choose_setting(net, own: dict | None, given: dict) -> dict:
    """The complete setting of a network's `own` sampler (by default that of its family) or the one
    called given['name'], with the options `given`.

    None is not given. Without a name, any option that only EDM's ablations have chooses these.
    """
    own, given = ({key: value for key, value in setting.items() if value is not None}
                  for setting in (own or family_sampler(net), given))
    _, options = SAMPLERS.get(own['name'], (None, {}))
    ablation = CHOICES.keys() & given.keys() - options.keys()
    name = given.pop('name', 'ablation' if ablation else own['name'])
    return complete_setting(net, (own if name == own['name'] else {}) | {'name': name} | given)


def sample(net, noise, labels=None, *, name, guide=None, guidance=1, guidance_interval=None,
           random=None, **options):
    """Samples [N,C,H,W] of a network from standard normal `noise` [N,C,H,W], by the sampler `name`
    with its options.

    `labels` [N, label_dim] or None go to the network and its guide (see `Guided`); `random` (see
    torch_utils.random) draws what noise the sampler adds. Raises UserError for what the sampler
    does not know.
    """
    setting = complete_setting(net, {'name': name, **options})
    run, _ = SAMPLERS[setting.pop('name')]
    denoiser = Guided(net, labels, guide, guidance, guidance_interval)
    return run(denoiser, noise, random=random or GlobalRandom(noise.device), **setting)


def seed_inputs(net, seeds, labels, device):
    """(noise [N,C,H,W], label ids [N] or None, random numbers for the sampler) of seeds, in EDM2's
    order of draws.

    `labels` has one class for each seed, which takes the place of the drawn one; None keeps it.
    """
    random = StackedRandomGenerator(device, seeds)
    noise = random.randn([len(seeds), *net.image_shape])
    if net.label_dim == 0:
        return noise, None, random
    drawn = random.randint(net.label_dim, [len(seeds)]).tolist()
    ids = [one if label is None else label for one, label in zip(drawn, labels, strict=True)]
    return noise, torch.tensor(ids, device=device), random


def sample_seeds(net, encoder, seeds, labels, device, **setting):
    """(images uint8 [N,3,H,W], label ids [N] or None), one for each seed (see `seed_inputs` and
    `sample`)."""
    noise, ids, random = seed_inputs(net, seeds, labels, device)
    one_hot = None if ids is None else torch.nn.functional.one_hot(ids, net.label_dim).float()
    return encoder.decode(sample(net, noise, one_hot, random=random, **setting)), ids
