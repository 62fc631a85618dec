"""Class-balancing diffusion models (CBDM, arXiv 2305.00562): training on long-tailed classes, and guided sampling.

Shapes: images x [N,C,H,W] in [-1, 1], steps t [N], labels y [N, classes] (one-hot, zeros for "no label").
"""

import numpy as np
import torch
import torch.nn.functional as F

import dnnlib
from torch_utils.random import GlobalRandom, StackedRandomGenerator, tuple_seed
from training.diffusion.gaussian import GaussianDiffusion, guided_output, mean_flat, run_chain
from training.networks.dropout import drawing_from

SAMPLE_METHODS = ('cfg', 'cond', 'uncond')


def balancing_terms(h, h_other, weight):
    """(regularisation, commitment) [N,C,H,W] of the noises predicted for the true label and for another one.

    w (h - sg[h'])^2 and (w/4) (sg[h] - h')^2, where sg stops the gradient (the paper's Eq. 8).
    """
    return weight * (h - h_other.detach()) ** 2, 0.25 * weight * (h.detach() - h_other) ** 2


class ClassBalancingObjective:
    """DDPM's loss, with the class-balancing term (`cb`) and dropped labels (`cb` or `cfg`).

    loss = (h - z)^2 + w (h - sg[h'])^2 + (w/4) (sg[h] - h')^2 with w = tau t/T, h = eps(x_t, t, y) and
    h' = eps(x_t, t, y'), averaged over the elements of an image. y' follows `class_counts` when training from scratch
    and is uniform when they are None, as for fine-tuning. The labels of a whole step are dropped with probability
    `label_drop`, and then there is no class-balancing term.

    Whether labels are dropped is one draw for all processes and micro-batches of a step: with `batch_size` it comes
    from `seed` and the step, otherwise (as in the reference) from the batch's random numbers. Draws, in order: the
    augmentation's, t, noise, label drop, y'. `augment` takes (images, random) to (images, vectors [N,9]).
    """

    def __init__(self, diffusion: GaussianDiffusion, num_classes: int, cb=False, cfg=False, tau=1.0, class_counts=None,
                 label_drop=0.1, augment=None, batch_size=None, seed=0):
        if cb and class_counts is not None and not (len(class_counts) == num_classes and min(class_counts) > 0):
            raise dnnlib.UserError(f'class-balancing training needs images of each of the {num_classes} classes; their '
                                   f'numbers are {[int(n) for n in class_counts]}')
        self.diffusion, self.num_classes, self.cb, self.cfg, self.tau = diffusion, num_classes, cb, cfg, tau
        self.label_drop, self.augment, self.batch_size, self.seed = label_drop, augment, batch_size, seed
        counts = np.ones(num_classes) if class_counts is None else np.asarray(class_counts)
        self.probabilities = np.float32(counts) / np.float32(counts.sum())

    def other_labels(self, n, random):
        """y' [n] int64, drawn from `probabilities`."""
        cumulative = torch.from_numpy(self.probabilities.astype(np.float64)).cumsum(0)
        u = random.rand([n], dtype=torch.float64)
        cumulative = (cumulative / cumulative[-1]).to(u.device)
        return torch.searchsorted(cumulative, u, right=True)

    def _labels_dropped(self, batch):
        if self.batch_size is None:
            return batch['random'].rand([1], device='cpu').item() < self.label_drop
        shared = StackedRandomGenerator('cpu', [tuple_seed(self.seed, batch['start'] // self.batch_size)])
        return shared.rand([1]).item() < self.label_drop

    def elementwise(self, net, batch) -> dict:
        """What was drawn and the unreduced losses: `t`, `noise`, `ddpm` [N,C,H,W]; with a class-balancing term also
        `other` (y'), `reg` and `com` [N,C,H,W].
        """
        images, y, random = batch['images'], batch['labels'], batch['random']
        extra = {}
        if self.augment is not None:
            images, extra['augm'] = self.augment(images, random)
        t = random.randint(self.diffusion.num_steps, [len(images)], device=images.device)
        noise = random.randn(images.shape, device=images.device)
        x_t, step = self.diffusion.q_sample(images, t, noise), self.diffusion.model_steps(t)
        dropped = (self.cb or self.cfg) and self._labels_dropped(batch)
        with drawing_from(random):
            h = net(x_t, step=step, class_labels=torch.zeros_like(y) if dropped else y, **extra)
        values = {'t': t, 'noise': noise, 'ddpm': (h - noise) ** 2}
        if self.cb and not dropped:
            other = self.other_labels(len(images), random).to(images.device)
            with drawing_from(random):
                h_other = net(x_t, step=step, class_labels=F.one_hot(other, self.num_classes).to(y), **extra)
            weight = (self.tau * t / self.diffusion.num_steps).reshape(-1, 1, 1, 1)
            reg, com = balancing_terms(h, h_other, weight)
            values |= {'other': other, 'reg': reg, 'com': com}
        return values

    def __call__(self, net, batch):
        values = self.elementwise(net, batch)
        terms = {'ddpm': mean_flat(values['ddpm'])}
        if self.cb:
            for name in ('reg', 'com'):
                terms[name] = mean_flat(values[name]) if name in values else torch.zeros_like(terms['ddpm'])
        loss = sum(terms.values())
        return loss, {name: value.detach() for name, value in ({'loss': loss} | terms).items()}


def cbdm_sampler(net, noise, labels=None, method='cfg', omega=0.0, random=None, ddim_steps=None, eta=0.0):
    """CBDM's sampler for a DiscreteDenoiser: noise [N,C,H,W] -> images in [-1, 1].

    `method` 'cond' uses the labels [N, classes], 'uncond' ignores them, 'cfg' moves the noise from
    the unconditional one by 1 + omega: eps + omega (eps - eps_unconditional). Ancestral over all steps, or DDIM over
    `ddim_steps`. Predicted images are not clipped before the last. Noise is drawn in every step but the last.
    """
    if method not in SAMPLE_METHODS:
        raise dnnlib.UserError(f'sample_method: {method!r} is not one of {", ".join(SAMPLE_METHODS)}')
    random = random or GlobalRandom(noise.device)
    diffusion = net.diffusion if ddim_steps is None else net.diffusion.respaced(ddim_steps)
    output_of = guided_output(net, None if method == 'uncond' else labels, guidance=1 + omega if method == 'cfg' else 1,
                              augm=noise.new_zeros([len(noise), 9]))
    x = run_chain(diffusion, output_of, noise, random, ddim=ddim_steps is not None, eta=eta, clip=False)
    return x.clamp(-1, 1)
