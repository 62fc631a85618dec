"""A denoiser as a model of diffusers, with all of its code."""

import shutil
import sys
from pathlib import Path

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

CLASSES = {}


def build_network(class_name: str, **arguments):
    """The network, or the one inside of it."""
    return CLASSES[class_name](**arguments)


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
        without memory. Raises ValueError for weights that are missing, which diffusers draws, or
        unknown."""
        net, info = super().from_pretrained(path, **(kwargs | dict(
            low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True)))
        wrong = [*info['missing_keys'], *info['unexpected_keys']]
        if wrong:
            raise ValueError(f'{path} holds weights that do not fit: {", ".join(wrong[:3])}')
        return (net, info) if kwargs.get('output_loading_info') else net

    def save_config(self, save_directory, *args, **kwargs):
        """As of diffusers, and this file beside it."""
        super().save_config(save_directory, *args, **kwargs)
        code = Path(sys.modules[type(self).__module__].__file__)
        shutil.copyfile(code, Path(save_directory, code.name))

    def forward(self, x, sigma, class_labels=None):
        return self.net(x, sigma, class_labels)
