"""Network architectures, by the class names that the published snapshots use."""

import importlib
import os
import shutil

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from dnnlib import UserError
from dnnlib.util import one_line
from torch_utils.files.pickles import check_plain
from torch_utils.files.weights import check_weights
from training.networks import edm
from training.networks.layers import sides

# Class name -> module of this package. A snapshot stores the name and the keyword arguments.
NETWORKS = {
    'Precond': 'edm2',
    **dict.fromkeys(edm.PRECONDITIONINGS, 'edm'),
    'ADMUNet': 'adm', 'DDPMUNet': 'ddpm', 'DiscreteDenoiser': 'discrete',
    'WideResNet': 'classifier',
}

MAX_RESOLUTION = 2048   # of networks from files


def network_class(name: str):
    """The class called `name`; raises UserError for a name that is not in `NETWORKS`."""
    if name not in NETWORKS:
        raise UserError(f'unknown network type {name!r}; known: {", ".join(sorted(NETWORKS))}')
    return getattr(importlib.import_module(f'.{NETWORKS[name]}', __name__), name)


def build_network(class_name: str, **kwargs):
    """Builds a network from its class name and keyword arguments, and remembers both for
    snapshots.

    Raises UserError for an unknown name and for arguments that the class does not take.
    """
    cls = network_class(class_name)
    try:
        net = cls(**kwargs)
    except TypeError as error:
        raise UserError(f'network type {class_name}: {error}') from None
    net.class_name, net.init_kwargs = class_name, dict(kwargs)
    return net


def check_arguments(value):
    """Raises ForeignPickleError unless constructor arguments from a file, which are plain values,
    are of a modest size.
    """
    check_plain(value, 'an argument', 5000, 100_000)


def rebuild_network(class_name: str, kwargs: dict, state: dict, path: str):
    """The network that a file describes, with the weights `state` from the same file; in
    evaluation mode, without gradients.

    It is built without memory for its weights, and gets some when their shapes are those of
    `state`: a file cannot ask for more than it holds. Raises UserError that names `path` if they
    do not fit together.
    """
    left = 1000 + 4 * len(state)

    def count(module, name, parameter):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError('it has more layers than weights')

    hook = register_module_parameter_registration_hook(count)
    try:
        check_arguments(kwargs)
        with torch.device('meta'):
            net = build_network(class_name, **kwargs)
        resolution = getattr(net, 'img_resolution', 1)
        if not all(side in range(1, MAX_RESOLUTION + 1) for side in sides(resolution)):
            raise ValueError(f'img_resolution is {resolution}')
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except Exception as error:  # arguments that make no sense raise nearly anything
        raise UserError(f'{path}: it describes no possible network '
                        f'({class_name}: {one_line(error)})') from None
    finally:
        hook.remove()
    check_weights(net, state, path)
    net._apply(lambda tensor: torch.empty_like(tensor, device='cpu') if tensor.is_meta else tensor)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def compiled(net: torch.nn.Module) -> torch.nn.Module:
    """The network compiled for the shapes that it meets: its layers of one kind have many. Raises
    UserError on a CPU without the C++ compiler that this takes.
    """
    compiler = os.environ.get('CXX', 'g++')
    if next(net.parameters()).device.type == 'cpu' and not shutil.which(compiler):
        raise UserError(f'needs a C++ compiler on a CPU, and {compiler} is not there; install it, '
                        'or leave this option out', 'compile', True)
    import torch._dynamo  # slow to import
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(net, dynamic=False)
