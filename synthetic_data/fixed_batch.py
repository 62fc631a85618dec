"""Networks whose answer for an image does not depend on the images beside it."""

import math

import torch

CPU_PIXELS = 4096  # of the images that a CPU computes together, 16 to 64: more are hardly faster


def fix_batch(net: torch.nn.Module, size: int) -> torch.nn.Module:
    """Makes `net` compute `size` images at a time, neither more nor less: batches are cut, the
    last part is filled up.

    Kernels for another batch size may round differently, so an image would change in its last
    bits, and a pixel now and then, with the batch that it is in. Returns `net`:
    net(x, *args, **options) for x [N, ...]; tensors with as many rows as x are cut alike.
    """
    forward = net.forward

    def in_parts(x, *args, **options):
        def cut(value, start):
            if not (torch.is_tensor(value) and value.ndim and len(value) == len(x)):
                return value
            part = value[start:start + size]
            return torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])

        outputs = [forward(*[cut(value, start) for value in (x, *args)],
                           **{name: cut(value, start) for name, value in options.items()})
                   for start in range(0, len(x), size)]
        return torch.cat(outputs)[:len(x)]

    net.forward = in_parts
    return net


def for_device(net: torch.nn.Module, device, size) -> torch.nn.Module:
    """On a CPU parts of one number of images [C,H,W] of `size` (H, W), where results are then the
    same bit for bit; on a GPU the batch as it is."""
    if torch.device(device).type != 'cpu':
        return net
    return fix_batch(net, min(max(CPU_PIXELS // math.prod(size), 16), 64))
