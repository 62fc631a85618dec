"""Network architectures, by the class names that the published snapshots use."""

import importlib
import math

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from dnnlib import UserError
from torch_utils.files.weights import load_weights

# Class name -> module of this package. A snapshot stores the name and the keyword arguments.
NETWORKS = {
    'Precond': 'edm2',
    'VPPrecond': 'edm', 'VEPrecond': 'edm', 'iDDPMPrecond': 'edm', 'EDMPrecond': 'edm',
    'ADMUNet': 'adm', 'DDPMUNet': 'ddpm', 'DiscreteDenoiser': 'discrete',
    'WideResNet': 'classifier',
}

MAX_ARGUMENT, MAX_RESOLUTION, MAX_ENTRIES = 100_000, 2048, 256  # of arguments that come from files


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
    net.class_name, net.init_kwargs = class_name, dict(kwargs)
    return net


def check_arguments(value):
    """Raises ValueError unless constructor arguments from a file are plain values of a modest size."""
    if isinstance(value, dict | list | tuple):
        if len(value) > MAX_ENTRIES:
            raise ValueError(f'an argument has {len(value)} entries')
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key in ('img_resolution', 'image_size') and not (type(item) is int and 0 < item <= MAX_RESOLUTION):
                raise ValueError(f'{key} is {str(item)[:20]}')
            check_arguments(item)
    elif isinstance(value, str):
        if len(value) > 1000:
            raise ValueError('an argument is a text without end')
    elif not isinstance(value, bool | int | float | None):
        raise ValueError(f'an argument is a {type(value).__name__}')
    elif isinstance(value, int) and abs(value) > MAX_ARGUMENT:
        raise ValueError(f'an argument is {str(value)[:20]}')


class _Budget(TorchFunctionMode):
    """Within it, functions that make tensors from sizes may ask for so many numbers in all, and no more."""

    MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.eye}
    OUTER = {torch.outer, torch.Tensor.outer}

    def __init__(self, numbers: int):
        super().__init__()
        self.left = numbers

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.MAKERS:
            values = [*args, *kwargs.values()]
            size = next((v for v in values if isinstance(v, list | tuple)), [v for v in values if type(v) is int])
            self.left -= math.prod(size)
        elif function in self.OUTER:
            self.left -= args[0].numel() * args[1].numel()
        if self.left < 0:
            raise ValueError('it is larger than its weights')
        return function(*args, **kwargs)


def rebuild_network(class_name: str, kwargs: dict, state: dict, path: str):
    """The network that a file describes, with the weights `state` from the same file; in evaluation mode, without
    gradients.

    A file cannot ask for a network that is much larger than its own weights. Raises UserError that names `path` if they do
    not fit together.
    """
    names = []

    def count(module, name, parameter):
        names.append(name)
        if len(names) > len(state):
            raise ValueError('it has more layers than weights')

    hook = register_module_parameter_registration_hook(count)
    try:
        check_arguments(kwargs)
        with _Budget((1 << 24) + 4 * sum(value.numel() for value in state.values())):
            net = build_network(class_name, **kwargs)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except Exception as error:  # constructors with arguments that make no sense raise nearly anything
        reason = ' '.join(str(error).split())[:100]
        raise UserError(f'{path}: it describes no possible network ({class_name}: {reason})') from None
    finally:
        hook.remove()
    return load_weights(net, state, path).eval().requires_grad_(False)
