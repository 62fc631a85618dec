"""What an evaluation of a network costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

CLASSIFIED = 32  # side of the images of classifiers, which take any


def count_products(net: torch.nn.Module) -> tuple[int, tuple]:
    """(multiplications with additions, shape of the image) of one evaluation of one image.

    Counts convolutions, matrix products and attention, each multiplication and its addition as
    one, as tables of the field do. `net` goes to torch's device `meta`: nothing is computed, and
    it has no weights afterwards.
    """
    net = net.to('meta').eval()
    side = getattr(net, 'img_resolution', CLASSIFIED)
    shape = (getattr(net, 'img_channels', 3), side, side)
    arguments = {}
    if hasattr(net, 'diffusion'):          # else its step would be looked up, by its value
        arguments['step'] = torch.zeros(1, dtype=torch.int64, device='meta')
    elif hasattr(net, 'img_channels'):
        arguments['sigma'] = torch.ones(1, device='meta')
    if getattr(net, 'label_dim', 0):
        arguments['class_labels'] = torch.zeros(1, net.label_dim, device='meta')
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(torch.zeros(1, *shape, device='meta'), **arguments)
    return counter.get_total_flops() // 2, shape
