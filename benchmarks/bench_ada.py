"""The augmentation of the long-tail study: one image after another (scalar draws, NumPy) against the whole batch.

Both do the same: the results for the same parameters are compared first.
"""

import os
import sys
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'                                     # NumPy, too, uses one core
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from torch_utils.random import GlobalRandom
    from training.diffusion.augment_ada import ADAAugment


def _translation(x, y):
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])


def _scaling(x, y):
    return np.diag([x, y, 1])


def _rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


def _weights(u):
    return np.stack([-0.5 * u + u**2 - 0.5 * u**3, 1 - 2.5 * u**2 + 1.5 * u**3, 0.5 * u + 2 * u**2 - 1.5 * u**3,
                     0.5 * (u**3 - u**2)], axis=-1)


def _mirror(i, size):
    i = i % (2 * size - 2)
    return np.minimum(i, 2 * size - 2 - i)


def one_image(image_CHW, a):
    """The augmentation of one image as it is written down: a product of matrices, sixteen taps for each pixel."""
    C, H, W = image_CHW.shape
    k, (a0, a1, a2, a3, a4, a5, a6, a7) = 2**0.2, a
    matrix = (_translation(W / 2 - 0.5, H / 2 - 0.5) @ _scaling(1 - 2 * a0, 1) @ _scaling(1, 1 - 2 * a1)
              @ _scaling(k**a2, k**a2) @ _rotation(-a3) @ _rotation(a4) @ _scaling(k**a5, k**-a5) @ _rotation(-a4)
              @ _translation(a6 * W / 8, a7 * H / 8) @ _translation(0.5 - W / 2, 0.5 - H / 2))
    y, x = np.mgrid[:H, :W]
    source = np.linalg.inv(matrix)[:2] @ np.stack([x.ravel(), y.ravel(), np.ones(H * W)])
    cell = np.floor(source).astype(int)
    wx, wy = _weights(source - cell)
    out = np.zeros([C, H * W])
    for j in range(4):
        row = _mirror(cell[1] + j - 1, H)
        for i in range(4):
            out += wy[:, j] * wx[:, i] * image_CHW[:, row, _mirror(cell[0] + i - 1, W)]
    return out.reshape(C, H, W)


def _seconds(function, clock=time.process_time, at_least=2.0):
    """The shortest of several calls; in seconds of processor time unless another clock is given."""
    function()
    times = []
    while sum(times) < at_least or len(times) < 3:
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


@click.command(cls=cli.Command)
@click.option('--batch', help='Images of a batch', metavar='INT', type=click.IntRange(min=1), default=128)
@click.option('--size', help='Width and height of an image', metavar='INT', type=click.IntRange(min=2), default=32)
def main(batch, size):
    """Images per second of the per-image and of the batched augmentation, side by side, on one core.

    \b
    Examples:
      python benchmarks/bench_ada.py
      python benchmarks/bench_ada.py --batch=512 --size=64
    """
    torch.set_num_threads(1)
    images = torch.rand([batch, 3, size, size], generator=torch.Generator().manual_seed(0)) * 2 - 1
    augment = ADAAugment()
    parameters = augment.draw(batch, GlobalRandom())
    single = np.stack([one_image(image, a) for image, a in zip(images.numpy(), parameters.tolist(), strict=True)])
    print(f'largest difference of the two: {np.abs(single - augment.transform(images, parameters).numpy()).max():.1e}')

    def one_by_one():
        return [one_image(image, augment.draw(1, GlobalRandom())[0].tolist()) for image in images[:16].numpy()]

    rates = {'one by one': len(images[:16]) / _seconds(one_by_one)}
    rates['batch, CPU'] = batch / _seconds(lambda: augment(images, GlobalRandom()))
    if torch.cuda.is_available():
        on_gpu, random = images.cuda(), GlobalRandom('cuda')

        def batch_on_gpu():
            out = augment(on_gpu, random)
            torch.cuda.synchronize()
            return out

        rates['batch, GPU'] = batch / _seconds(batch_on_gpu, time.perf_counter)
    for name, rate in rates.items():
        print(f'{name:12s} {rate:10.0f} images/s   {rate / rates["one by one"]:6.1f} x')


if __name__ == '__main__':
    main()
