"""Losses of all studies: a network and a batch in, the loss of each sample out.

A batch is a dictionary with `images` [N,C,H,W] (what the network models, already encoded),
`labels` [N, label_dim] or None, and `random`, from which all random numbers are drawn (see
torch_utils.random), in the order of the reference implementations. Losses return `(loss [N],
terms)`: the loss that is summed and divided by the batch size, and named per-sample terms for the
log, with `sigma`, the noise level that each image was at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from dnnlib import UserError
from torch_utils.random import StackedRandomGenerator, drawing_from, tuple_seed
from training.diffusion.gaussian import GaussianDiffusion, mean_flat
from training.diffusion.noise import VP, Flow, geometric_levels


@dataclass
class _NoisyImageLoss:
    """Weighted squared error of denoised images: weight(sigma) (D(y + n; sigma, labels) - y)^2, n
    ~ N(0, sigma^2 I).

    Summed over all elements for training, averaged over them for the log. `augment` (see
    training.diffusion.augment) transforms y first; its labels go to the network. Subclasses define
    `noise_levels(random, n)`, which draws sigma [n,1,1,1], and `weight(sigma)`.
    """

    augment: Callable | None = field(default=None, kw_only=True)

    def elementwise(self, net, images, labels, random):
        """The unreduced loss [N,C,H,W]."""
        return self._at_levels(net, images, labels, random)[1]

    def _at_levels(self, net, images, labels, random):
        """The levels [N,1,1,1] that are drawn, and the unreduced loss."""
        sigma = self.noise_levels(random, len(images))
        conditions = {}
        if self.augment is not None:
            images, conditions['augment_labels'] = self.augment(images, random)
        noise = random.randn(images.shape) * sigma
        with drawing_from(random):
            loss = self.compare(net, images, images + noise, sigma, labels, **conditions)
        return sigma, loss

    def compare(self, net, images, noisy, sigma, labels, **conditions):
        """The loss of what the network says of noisy images."""
        denoised = net(noisy, sigma, labels, **conditions)
        return self.weight(sigma) * (denoised - images) ** 2

    def weight(self, sigma):
        return 1 / sigma**2

    def __call__(self, net, batch):
        sigma, loss = self._at_levels(net, *(batch[key] for key in ('images', 'labels', 'random')))
        loss = loss.flatten(1)
        return loss.sum(1), {'loss': loss.detach().mean(1), 'sigma': sigma.flatten()}


@dataclass
class EDMLoss(_NoisyImageLoss):
    """EDM's loss (arXiv 2206.00364, Table 1): ln(sigma) ~ N(P_mean, P_std^2),
    weight = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def noise_levels(self, random, n):
        return (random.randn([n, 1, 1, 1]) * self.P_std + self.P_mean).exp()

    def weight(self, sigma):
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass
class EDM2Loss(EDMLoss):
    """EDM2's loss: EDM's noise levels and weights, and a learned uncertainty u(sigma) (arXiv
    2312.02696, Eq. 14-15): weight / exp(u) * (D(y + n; sigma) - y)^2 + u.
    """

    P_mean: float = -0.4
    P_std: float = 1.0

    def compare(self, net, images, noisy, sigma, labels, **conditions):
        denoised, logvar = net(noisy, sigma, labels, return_logvar=True, **conditions)
        return self.weight(sigma) / logvar.exp() * (denoised - images) ** 2 + logvar


@dataclass
class VPLoss(_NoisyImageLoss):
    """The variance-preserving loss of Song et al. in the terms of EDM (Table 1): t ~ U(epsilon_t,
    1), sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), weight = 1 / sigma^2.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def noise_levels(self, random, n):
        t = 1 + random.rand([n, 1, 1, 1]) * (self.epsilon_t - 1)
        return VP(self.beta_d, self.beta_min).sigma(t)


@dataclass
class VELoss(_NoisyImageLoss):
    """The variance-exploding loss of Song et al. in the terms of EDM (Table 1): ln(sigma) uniform
    between ln(sigma_min) and ln(sigma_max), weight = 1 / sigma^2.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100

    def noise_levels(self, random, n):
        return geometric_levels(random.rand([n, 1, 1, 1]), self.sigma_min, self.sigma_max)


@dataclass
class FlowLoss(_NoisyImageLoss):
    """Flow matching on the straight path x_t = (1 - t) x_0 + t z (arXiv 2209.03003, Eq. 1;
    2210.02747, Eq. 23): |v(x_t, t) - (z - x_0)|^2 with t ~ U(epsilon_t, 1 - epsilon_t).

    In the terms of D = x_t - t v and sigma = t / (1 - t): weight = 1 / t^2.
    """

    epsilon_t: float = 1e-3

    def noise_levels(self, random, n):
        return Flow().sigma(self.epsilon_t + (1 - 2 * self.epsilon_t) * random.rand([n, 1, 1, 1]))

    def weight(self, sigma):
        return Flow().inverse(sigma) ** -2


def _noised(diffusion: GaussianDiffusion, images, random):
    """(t [N], noise, x_t) of images at uniform time steps; draws, in order: t, noise."""
    t = random.randint(diffusion.num_steps, [len(images)], device=images.device)
    noise = random.randn(images.shape, device=images.device)
    return t, noise, diffusion.q_sample(images, t, noise)


def _with_log(terms: dict, diffusion: GaussianDiffusion, t):
    """(terms['loss'], all terms without gradients) at the time steps t [N]."""
    log = {name: value.detach() for name, value in terms.items()}
    return terms['loss'], log | {'sigma': diffusion.noise_levels(t)}


@dataclass
class DDPMLoss:
    """DDPM's training loss for a DiscreteDenoiser, with uniform time steps (see
    `GaussianDiffusion.training_losses`)."""

    diffusion: GaussianDiffusion

    def __call__(self, net, batch):
        images, random = batch['images'], batch['random']
        t, noise, x_t = _noised(self.diffusion, images, random)
        with drawing_from(random):
            output = net(x_t, step=self.diffusion.model_steps(t), class_labels=batch['labels'])
        terms = self.diffusion.training_losses(output, images, x_t, t, noise)
        return _with_log(terms, self.diffusion, t)


@dataclass
class CBDMLoss:
    """DDPM's loss, with the class-balancing term (`cb`) and dropped labels (`cb` or `cfg`).

    loss = (h - z)^2 + w (h - sg[h'])^2 + (w/4) (sg[h] - h')^2 (the paper's Eq. 8; sg stops the
    gradient) with w = tau t/T, h = eps(x_t, t, y) and h' = eps(x_t, t, y'), averaged over the
    elements of an image. y' follows `class_counts`
    when training from scratch and is uniform when they are None, as for fine-tuning. The labels of
    a whole step are dropped with probability `label_drop`, and then there is no class-balancing
    term.

    Whether labels are dropped is one draw for all processes and micro-batches of a step: with
    `batch_size` it comes from `seed` and the step, otherwise (as in the reference) from the
    batch's random numbers. Draws, in order: the augmentation's, t, noise, label drop, y'.
    `augment` takes (images, random) to (images, vectors [N,9]).
    """

    diffusion: GaussianDiffusion
    num_classes: int
    cb: bool = False
    cfg: bool = False
    tau: float = 1.0
    class_counts: Sequence[int] | None = None
    label_drop: float = 0.1
    augment: Callable | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self):
        uniform = self.class_counts is None
        counts = np.ones(self.num_classes) if uniform else np.asarray(self.class_counts)
        if self.cb and (len(counts) != self.num_classes or min(counts) <= 0):
            raise UserError('class-balancing training needs images of each of the '
                            f'{self.num_classes} classes; their numbers are {counts.tolist()}')
        self.probabilities = np.float32(counts) / np.float32(counts.sum())

    def other_labels(self, n, random):
        """y' [n] int64, drawn from `probabilities`."""
        cumulative = torch.from_numpy(self.probabilities.astype(np.float64)).cumsum(0)
        u = random.rand([n], dtype=torch.float64)
        cumulative = (cumulative / cumulative[-1]).to(u.device)
        return torch.searchsorted(cumulative, u, right=True)

    def _labels_dropped(self, batch):
        if self.batch_size is None:
            random = batch['random']
        else:
            step = batch['start'] // self.batch_size
            random = StackedRandomGenerator('cpu', [tuple_seed(self.seed, step)])
        return random.rand([1], device='cpu').item() < self.label_drop

    def elementwise(self, net, batch) -> dict:
        """What was drawn and the unreduced losses: `t`, `noise`, `ddpm` [N,C,H,W]; with a
        class-balancing term also `other` (y'), `reg` and `com` [N,C,H,W].
        """
        images, y, random = batch['images'], batch['labels'], batch['random']
        extra = {}
        if self.augment is not None:
            images, extra['augm'] = self.augment(images, random)
        t, noise, x_t = _noised(self.diffusion, images, random)
        step = self.diffusion.model_steps(t)
        dropped = (self.cb or self.cfg) and self._labels_dropped(batch)
        with drawing_from(random):
            h = net(x_t, step=step, class_labels=torch.zeros_like(y) if dropped else y, **extra)
        values = {'t': t, 'noise': noise, 'ddpm': (h - noise) ** 2}
        if self.cb and not dropped:
            other = self.other_labels(len(images), random).to(images.device)
            one_hot = F.one_hot(other, self.num_classes).to(y)
            with drawing_from(random):
                h_other = net(x_t, step=step, class_labels=one_hot, **extra)
            weight = (self.tau * t / self.diffusion.num_steps).reshape(-1, 1, 1, 1)
            values |= {'other': other, 'reg': weight * (h - h_other.detach()) ** 2,
                       'com': 0.25 * weight * (h.detach() - h_other) ** 2}
        return values

    def __call__(self, net, batch):
        values = self.elementwise(net, batch)
        terms = {'ddpm': mean_flat(values['ddpm'])}
        if self.cb:
            nothing = torch.zeros_like(values['ddpm'])
            terms |= {name: mean_flat(values.get(name, nothing)) for name in ('reg', 'com')}
        return _with_log({'loss': sum(terms.values())} | terms, self.diffusion, values['t'])


@dataclass
class DKDMLoss:
    """A student learns the teacher's step at (x_t, t) (see
    `GaussianDiffusion.distillation_losses`).

    `diffusion` is the student's process, with the teacher's steps. `input_perturb` p shows the
    student x_t + sqrt(1 - abar_t) p z in place of x_t.
    """

    diffusion: GaussianDiffusion
    teacher: object
    input_perturb: float = 0.0

    def __post_init__(self):
        steps = self.teacher.diffusion
        if list(self.diffusion.kept) != list(steps.kept) or not np.allclose(
                self.diffusion.betas, steps.betas):
            raise UserError('the student needs the noise schedule and time steps of its teacher',
                            field='diffusion')

    def __call__(self, net, batch):
        x_t, t, diffusion = batch['images'], batch['t'], self.diffusion
        target = self.teacher.diffusion.prediction(batch['teacher'], x_t, t, self.teacher.clip)
        seen = x_t
        if self.input_perturb:
            noise = batch['random'].randn(x_t.shape, device=x_t.device)
            seen = x_t + diffusion.q_sample(torch.zeros_like(x_t), t, self.input_perturb * noise)
        with drawing_from(batch['random']):
            output = net(seen, step=diffusion.model_steps(t), class_labels=batch.get('labels'))
        return _with_log(diffusion.distillation_losses(output, target, x_t, t), diffusion, t)


# The losses by name.
LOSSES = {
    'edm2': EDM2Loss, 'edm': EDMLoss, 'vp': VPLoss, 've': VELoss, 'flow': FlowLoss,
    'ddpm': DDPMLoss, 'cbdm': CBDMLoss, 'dkdm': DKDMLoss
}
