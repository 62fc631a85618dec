"""What networks and their training cost, by passes on torch's device `meta`: nothing is computed.

Products are counted as tables of the field do: those of convolutions, matrices and attention, each
multiplication and its addition as one.
"""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from training.networks.layers import sides

ASSUMED = (3, 32, 32)  # images of a network that takes any, where nothing says what it has seen


class _FusedAttention(TorchFunctionMode):
    """Attention as devices compute it: without the matrix of all pairs, which `meta` keeps."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **kwargs or {})[0]
        return func(*args, **kwargs or {})


class _Meter(TorchDispatchMode):
    """What is done in the block: `products`, and `peak`, the bytes of tensors made there that
    exist at a time; those of `net` are not made there.
    """

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.products = self.peak = self._bytes = 0
        known = (*net.parameters(), *net.buffers())
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.products += count(*args, **kwargs, out_val=result) // 2
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self._storages.discard(key)
        self._bytes -= size


def image_shape(arguments: dict, dataset: dict) -> tuple | None:
    """(C, H, W) of the images of a network: what its constructor arguments say; of one that takes
    any, the description of the data that it has learned. None if neither says anything.
    """
    inner = arguments.get('network', arguments)
    resolution = inner.get('img_resolution', inner.get('image_size'))
    channels = inner.get('img_channels', 3)
    if resolution is None:
        resolution = dataset.get('resolution')
        channels = dataset.get('num_channels', 3)
    if resolution is None:
        return None
    return channels, *sides(resolution)


def count_products(net: torch.nn.Module, shape: tuple | None = None) -> int:
    """Products of one evaluation of an image [C,H,W] of `shape`; None: `image_shape`, or ASSUMED.

    `net` is from `build_network`, and goes to torch's device `meta`: it has no weights afterwards.
    """
    net = net.to('meta').eval()
    shape = shape or image_shape(net.init_kwargs, {}) or ASSUMED
    arguments = {}
    if hasattr(net, 'diffusion'):          # else its step would be looked up, by its value
        arguments['step'] = torch.zeros(1, dtype=torch.int64, device='meta')
    elif hasattr(net, 'img_channels'):
        arguments['sigma'] = torch.ones(1, device='meta')
    if getattr(net, 'label_dim', 0):
        arguments['class_labels'] = torch.zeros(1, net.label_dim, device='meta')
    meter = _Meter(net)
    with torch.no_grad(), meter:
        net(torch.zeros(1, *shape, device='meta'), **arguments)
    return meter.products


# --- A step of training --------------------------------------------------------------------------


def size_of(tensors) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def training_step(net: torch.nn.Module, loss: Callable, example: Callable, count: int) -> dict:
    """What forward and backward pass of `count` images take: {'forward', 'step': products of an
    image; 'activations', 'kept': bytes}.

    net      goes to the device `meta`, as `count_products` says
    loss     as `training.recipe.fit` has it
    example  (count, device) -> batch, without `iterate`'s reading (see training.data.batches)

    Activations are the most that the two passes hold at a time, kept for the backward pass or soon
    gone, beyond the room of the weights and their gradients; `kept` is the most before there are
    any gradients, with the weights as layers use them (normalised, in half precision). Workspaces
    of convolutions, and what allocators lose, are not among them.
    """
    net = net.to('meta').train()
    meter = _Meter(net)
    with meter, _FusedAttention():
        losses, terms = loss(net, example(count, 'meta'))
        forward, kept = meter.products, meter.peak
        losses.sum().backward()
    del losses, terms
    gradients = size_of(p.grad for p in net.parameters() if p.grad is not None)
    net.zero_grad()
    return {'forward': forward // count, 'step': meter.products // count,
            'activations': max(meter.peak - gradients, 0), 'kept': kept}
