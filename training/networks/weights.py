"""Weights of other projects: what a checkpoint file holds, and whether it fits a network."""

import os

import torch

import dnnlib


def read_state_dict(path: str) -> dict:
    """The name -> tensor dictionary in a checkpoint file, without a data-parallel prefix `module.`.

    Takes a plain state dict, or one that a checkpoint holds under `model_state_dict`, `state_dict` or `model`.
    Nothing in the file is executed. Raises UserError naming the file.
    """
    if not os.path.isfile(path):
        raise dnnlib.UserError(f'{path}: no such file')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise dnnlib.UserError(f'{path} is not a checkpoint of plain tensors ({type(error).__name__})') from None
    for key in ('model_state_dict', 'state_dict', 'model'):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(value) for value in state.values()):
        raise dnnlib.UserError(f'{path} does not hold the weights of a network')
    return {name.removeprefix('module.'): value for name, value in state.items()}


def load_weights(net: torch.nn.Module, state: dict, source: str) -> torch.nn.Module:
    """`net` with the weights `state`, which must have its names and shapes; else a UserError says what differs."""
    wanted = net.state_dict()
    problems = {
        'lacks': [name for name in wanted if name not in state],
        'has unknown': [name for name in state if name not in wanted],
        'has another shape of': [
            f'{name} ({"x".join(map(str, state[name].shape))} for {"x".join(map(str, value.shape))})'
            for name, value in wanted.items() if name in state and state[name].shape != value.shape],
    }
    for what, names in problems.items():
        if names:
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            raise dnnlib.UserError(f'{source} does not fit the network: it {what} {", ".join(names[:3])}{more}')
    net.load_state_dict(state)
    return net
