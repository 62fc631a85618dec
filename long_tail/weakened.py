"""Labels that count less: what the class-balancing loss does to a network, done while sampling.

The minimum of that loss over all functions, where other labels are as likely in x_t as they are
drawn, is

    h = mean + (E[z | x_t, y] - mean) / (1 + 5/4 tau t/T)

with mean = E[z | x_t]: labels count less, and the less the more noise there is.
"""

from training.networks.layers import Network


def share_of_labels(tau: float, t):
    """What is left of the labels' effect at the share t (0..1) of the steps:
    1 / (1 + 5/4 tau t)."""
    return 1 / (1 + 1.25 * tau * t)


class WeakenedLabels(Network):
    """A network of discrete time `net` with its labels weakened, for samplers and losses:

    eps(x, t) + (eps(x, t, y) - eps(x, t)) / (1 + 5/4 tau t/T).

    Guided by eps(x, t) with the strength omega it is `net` guided with (1 + omega) / (1 + 5/4 tau
    t/T) - 1. It needs a network whose labels were dropped in training.
    """

    def __init__(self, net, tau: float):
        super().__init__(net.img_resolution, net.img_channels, net.label_dim, net.precision)
        self.net = net
        self.tau = tau
        self.diffusion = net.diffusion

    def forward(self, x, *, step, class_labels=None):
        """The predicted noise [N,C,H,W] at the steps [N], for labels [N, label_dim] or none."""
        without = self.net(x, step=step)
        if class_labels is None:
            return without
        share = share_of_labels(self.tau, step / self.diffusion.steps).reshape(-1, 1, 1, 1)
        return without.lerp(self.net(x, step=step, class_labels=class_labels), share)
