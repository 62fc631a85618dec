"""Training objectives: a network and a batch in, the loss of each sample out.

A batch is a dictionary with `images` [N,C,H,W] (what the network models, already encoded), `labels` [N, label_dim] or
None, and `random`, from which all random numbers are drawn (see torch_utils.random), in the order of the reference
implementations. Objectives return `(loss [N], terms)`: the loss that is summed and divided by the batch size, and
named per-sample terms for the log.
"""

from training.networks.dropout import drawing_from


def _per_sample(loss_NCHW, log_name='loss'):
    """Summed over all elements for training, averaged over them for the log."""
    return loss_NCHW.flatten(1).sum(1), {log_name: loss_NCHW.detach().flatten(1).mean(1)}


class EDM2Objective:
    """EDM2's loss: EDM noise levels and weights, and a learned uncertainty u(sigma) (arXiv 2312.02696, Eq. 14-15).

    ln(sigma) ~ N(P_mean, P_std^2); loss = weight / exp(u) * (D(y + n; sigma) - y)^2 + u,
    weight = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """

    def __init__(self, P_mean=-0.4, P_std=1.0, sigma_data=0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def elementwise(self, net, images, labels, random):
        """The unreduced loss [N,C,H,W]."""
        sigma = (random.randn([len(images), 1, 1, 1]) * self.P_std + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        noise = random.randn(images.shape) * sigma
        with drawing_from(random):
            denoised, logvar = net(images + noise, sigma, labels, return_logvar=True)
        return weight / logvar.exp() * (denoised - images) ** 2 + logvar

    def __call__(self, net, batch):
        return _per_sample(self.elementwise(net, batch['images'], batch['labels'], batch['random']))


class _NoisyImageObjective:
    """Weighted squared error of denoised images: weight(sigma) (D(y + n; sigma, labels) - y)^2, n ~ N(0, sigma^2 I).

    `augment` (see training.diffusion.augment) transforms y first; its labels go to the network. Subclasses define
    `noise_levels(random, n)`, which draws sigma [n,1,1,1], and `weight(sigma)`.
    """

    def __init__(self, augment=None):
        self.augment = augment

    def elementwise(self, net, images, labels, random):
        """The unreduced loss [N,C,H,W]."""
        sigma = self.noise_levels(random, len(images))
        conditions = {}
        if self.augment is not None:
            images, conditions['augment_labels'] = self.augment(images, random)
        noise = random.randn(images.shape) * sigma
        with drawing_from(random):
            denoised = net(images + noise, sigma, labels, **conditions)
        return self.weight(sigma) * (denoised - images) ** 2

    def __call__(self, net, batch):
        return _per_sample(self.elementwise(net, batch['images'], batch['labels'], batch['random']))


class EDMObjective(_NoisyImageObjective):
    """EDM's loss (arXiv 2206.00364, Table 1): ln(sigma) ~ N(P_mean, P_std^2),
    weight = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5, augment=None):
        super().__init__(augment)
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def noise_levels(self, random, n):
        return (random.randn([n, 1, 1, 1]) * self.P_std + self.P_mean).exp()

    def weight(self, sigma):
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VPObjective(_NoisyImageObjective):
    """The variance-preserving loss of Song et al. in the terms of EDM (Table 1): t ~ U(epsilon_t, 1),
    sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), weight = 1 / sigma^2.
    """

    def __init__(self, beta_d=19.9, beta_min=0.1, epsilon_t=1e-5, augment=None):
        super().__init__(augment)
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def noise_levels(self, random, n):
        t = 1 + random.rand([n, 1, 1, 1]) * (self.epsilon_t - 1)
        return ((self.beta_d * t**2 / 2 + self.beta_min * t).exp() - 1).sqrt()

    def weight(self, sigma):
        return 1 / sigma**2


class VEObjective(_NoisyImageObjective):
    """The variance-exploding loss of Song et al. in the terms of EDM (Table 1): ln(sigma) uniform between
    ln(sigma_min) and ln(sigma_max), weight = 1 / sigma^2.
    """

    def __init__(self, sigma_min=0.02, sigma_max=100, augment=None):
        super().__init__(augment)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def noise_levels(self, random, n):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** random.rand([n, 1, 1, 1])

    def weight(self, sigma):
        return 1 / sigma**2
