"""A denoiser of this project as a model of diffusers."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from .architecture import build_network


class SnapshotNetwork(ModelMixin, ConfigMixin):
    """D(x; sigma, labels): images [N,C,H,W], noise levels [N] or one, one-hot labels [N,classes]
    or None -> [N,C,H,W].

    class_name, arguments    of the network, as a snapshot of this project names them
    """

    @register_to_config
    def __init__(self, class_name: str, arguments: dict):
        super().__init__()
        self.net = build_network(class_name, **arguments)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """As of diffusers; the network computes tables when it is made, so it is never made
        without memory."""
        return super().from_pretrained(path, **(kwargs | {'low_cpu_mem_usage': False}))

    def forward(self, x, sigma, class_labels=None):
        return self.net(x, sigma, class_labels)
