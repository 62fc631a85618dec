"""Networks whose answer for an image does not depend on the images beside it."""

import torch

CPU_PIXELS = 4096  # of the images that a CPU computes together, from 16 to 64 of them: more are hardly faster


class FixedBatch:
    """`net`, called with `size` images at a time, neither more nor less: batches are cut, and the last part is filled up.

    Kernels for another batch size may round differently, so an image would change in its last bits, and a pixel now and
    then, with the batch that it is in. `size=None`: the batch as it is. All other attributes are those of `net`.
    """

    def __init__(self, net, size: int | None):
        self.net, self.size = net, size

    def __getattr__(self, name):
        return getattr(self.net, name)

    def __call__(self, x, *args):
        """net(x, *args) for x [N, ...]; arguments with as many rows as x are cut alike."""
        if self.size is None:
            return self.net(x, *args)
        outputs = []
        for start in range(0, len(x), self.size):
            part = slice(start, start + self.size)
            cut = [self._fill(value[part]) if torch.is_tensor(value) and value.ndim and len(value) == len(x) else value
                   for value in (x, *args)]
            outputs.append(self.net(*cut)[:len(x) - start])
        return torch.cat(outputs)

    def _fill(self, part):
        missing = self.size - len(part)
        return part if missing == 0 else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])


def for_device(net, device, resolution: int) -> FixedBatch:
    """On a CPU parts of one size, where results are then the same bit for bit; on a GPU the batch as it is."""
    size = min(max(CPU_PIXELS // resolution**2, 16), 64)
    return FixedBatch(net, size if torch.device(device).type == 'cpu' else None)
