"""Weights: whether they fit a network, and what tells them apart."""

import hashlib

import torch

from dnnlib import UserError
from torch_utils.distributed import local


def check_weights(net: torch.nn.Module, state: dict, source: str):
    """Raises a UserError that says what differs unless the weights `state` have the names and
    shapes of `net`.
    """
    expected, stored = ({name: _layout(value) for name, value in table.items()}
                        for table in (net.state_dict(), state))
    differences = {
        'lacks': [name for name in expected if name not in stored],
        'has unknown': [name for name in stored if name not in expected],
        'has another shape of': [f'{name} ({stored[name]} for {shape})' for name, shape
                                 in expected.items() if stored.get(name, shape) != shape],
    }
    refuse_differences(differences, source)


def refuse_differences(differences: dict, source: str):
    """Raises a UserError for {what is wrong: names of weights} if there is any name."""
    for what, names in differences.items():
        if names:
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            shown = ' '.join(', '.join(name[:100] for name in names[:3]).split())
            raise UserError(f'{source} does not fit the network: it {what} {shown}{more}')


def _layout(value: torch.Tensor) -> str:
    """Shape and kind of numbers: copying turns one kind into another, and loses its values."""
    kind = ('of complex numbers' if value.is_complex() else '' if value.is_floating_point()
            else 'of whole numbers')
    return ' '.join(filter(None, ('x'.join(map(str, value.shape)), kind)))


def load_weights(net: torch.nn.Module, state: dict, source: str,
                 allow_nonfinite: bool = False) -> torch.nn.Module:
    """`net` with the weights `state`. Raises UserError as `check_weights` and, unless it is
    allowed, `check_finite`.
    """
    check_weights(net, state, source)
    if not allow_nonfinite:
        check_finite(state, source)
    net.load_state_dict(state)
    return net


class NonFiniteError(UserError):
    """Weights with values that are NaN or infinite."""


def nonfinite(state: dict) -> list[str]:
    """Names of the tensors with values that are NaN or infinite.

    One pass over the values; waits for the device.
    """
    rows = {name: local(value.detach()) for name, value in state.items()}
    floats = {name: value for name, value in rows.items()
              if value.is_floating_point() and value.numel()}
    finite = [torch.stack(value.aminmax()).isfinite().all() for value in floats.values()]
    flags = torch.stack(finite).tolist() if finite else []
    return [name for name, flag in zip(floats, flags, strict=True) if not flag]


def check_finite(state: dict, source: str) -> dict:
    """`state`; raises NonFiniteError unless all weights are finite."""
    names = nonfinite(state)
    if names:
        more = f' and {len(names) - 1} more' if len(names) > 1 else ''
        raise NonFiniteError(f'{source}: its weights are not finite (NaN or infinite) in '
                             f'{names[0][:100]}{more} of {len(state)} tensors; its training '
                             'diverged: take an earlier one', 'allow_nonfinite')
    return state


def fingerprint(state, head: str = '') -> str:
    """16 hexadecimal digits that depend on `head` and on the (name, tensor) pairs `state` alone,
    not on their file.
    """
    digest = hashlib.sha256(head.encode())
    for name, value in state:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
