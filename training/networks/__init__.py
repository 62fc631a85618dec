"""Network architectures, by the class names that the published snapshots use."""

import importlib

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from dnnlib import UserError
from dnnlib.util import one_line
from torch_utils.files.weights import check_weights
from training.networks import edm

# Class name -> module of this package. A snapshot stores the name and the keyword arguments.
NETWORKS = {
    'Precond': 'edm2',
    **dict.fromkeys(edm.PRECONDITIONINGS, 'edm'),
    'ADMUNet': 'adm', 'DDPMUNet': 'ddpm', 'DiscreteDenoiser': 'discrete',
    'WideResNet': 'classifier',
}

# Of arguments from files.
MAX_ARGUMENT, MAX_RESOLUTION, MAX_ENTRIES, MAX_TEXT = 100_000, 2048, 256, 1000


def network_class(name: str):
    """The class called `name`; raises UserError for a name that is not in `NETWORKS`."""
    if name not in NETWORKS:
        raise UserError(f'unknown network type {name!r}; known: {", ".join(sorted(NETWORKS))}')
    return getattr(importlib.import_module(f'training.networks.{NETWORKS[name]}'), name)


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
    """Raises ValueError unless constructor arguments from a file, which are plain values, are of a
    modest size.
    """
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError('an argument is a text without end')
    if isinstance(value, dict | list | tuple) and len(value) > MAX_ENTRIES:
        raise ValueError(f'an argument has {len(value)} entries')
    if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
        raise ValueError(f'an argument is {str(value)[:20]}')
    if isinstance(value, dict):
        for key in value.keys() & {'img_resolution', 'image_size'}:
            if type(value[key]) is not int or not 0 < value[key] <= MAX_RESOLUTION:
                raise ValueError(f'{key} is {str(value[key])[:20]}')
        value = value.values()
    for item in () if isinstance(value, str | int | float | None) else value:
        check_arguments(item)


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
