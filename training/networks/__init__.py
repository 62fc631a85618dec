"""Network architectures, by the class names that the published snapshots use."""

import importlib

from dnnlib import UserError

# Class name -> module of this package. A snapshot stores the name and the keyword arguments.
NETWORKS = {
    'Precond': 'edm2',
    'VPPrecond': 'edm', 'VEPrecond': 'edm', 'iDDPMPrecond': 'edm', 'EDMPrecond': 'edm',
    'ADMUNet': 'adm', 'DDPMUNet': 'ddpm', 'DiscreteDenoiser': 'discrete',
    'WideResNet': 'classifier',
}


def network_class(name: str):
    """The class called `name`; raises UserError for a name that is not in `NETWORKS`."""
    if name not in NETWORKS:
        raise UserError(f'unknown network type {name!r}; known: {", ".join(sorted(NETWORKS))}')
    return getattr(importlib.import_module(f'training.networks.{NETWORKS[name]}'), name)


def build_network(class_name: str, **kwargs):
    """Builds a network from its class name and keyword arguments, and remembers both for snapshots.

    Raises UserError for an unknown name and for arguments that the class does not take.
    """
    cls = network_class(class_name)
    try:
        net = cls(**kwargs)
    except TypeError as error:
        raise UserError(f'network type {class_name}: {error}') from None
    net.init_kwargs = dict(kwargs)
    return net
