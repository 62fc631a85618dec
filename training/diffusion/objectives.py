"""Training objectives: a network and a batch in, the loss of each sample out.

A batch is a dictionary with `images` [N,C,H,W] (what the network models, already encoded), `labels` [N, label_dim] or
None, and `random`, from which all random numbers are drawn (see torch_utils.random), in the order of the reference
implementations. Objectives return `(loss [N], terms)`: the loss that is summed and divided by the batch size, and
named per-sample terms for the log.
"""

import torch


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
        denoised, logvar = net(images + noise, sigma, labels, return_logvar=True)
        return weight / logvar.exp() * (denoised - images) ** 2 + logvar

    def __call__(self, net, batch):
        return _per_sample(self.elementwise(net, batch['images'], batch['labels'], batch['random']))
