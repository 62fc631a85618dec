"""Which generated images a classifier is surest of: confidences as a stream, the best share of each class, a report."""

import math

import numpy as np
import torch
from tqdm import tqdm

from synthetic_data import fixed_batch
from torch_utils import distributed as dist

BINS = 50  # of the histogram of confidences


def score(net, classes, batch: int, device) -> list[np.ndarray]:
    """Softmax confidence of its own class for every image: float32 [N] for each of `classes` (see `class_files`).

    Images are read `batch` at a time; the processes share them, and all get the result. On a CPU a confidence depends on
    neither.
    """
    fixed = fixed_batch.for_device(net, device, classes[0].image_shape[0])
    blocks = [(label, start, min(start + batch, len(images))) for label, images in enumerate(classes)
              for start in range(0, len(images), batch)]
    mine = {}
    with tqdm(total=sum(map(len, classes)), unit='img', delay=2, disable=None if dist.get_rank() == 0 else True) as bar:
        for number, (label, start, stop) in enumerate(blocks):
            bar.update(stop - start)
            if number % dist.get_world_size() == dist.get_rank():
                mine[label, start] = confidence(fixed, classes[label].read(start, stop), label, device)
    scores = [np.empty(len(images), np.float32) for images in classes]
    for part in dist.gather_objects(mine):
        for (label, start), values in part.items():
            scores[label][start:start + len(values)] = values
    return scores


@torch.inference_mode()
def confidence(net, images: np.ndarray, label: int, device) -> np.ndarray:
    """softmax(net(x))[label] float32 [n] of images uint8 [n,H,W,3]."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    return net(x).float().softmax(dim=1)[:, label].cpu().numpy()


def select_top(scores: np.ndarray, share: float) -> np.ndarray:
    """Ascending indices (int64) of the best share of scores [N], at least one; of equal scores the first ones are taken."""
    count = max(math.floor(len(scores) * share + 1e-6), 1)
    return np.sort(np.argsort(-scores, kind='stable')[:count])


def report(scores: np.ndarray, chosen: np.ndarray) -> dict:
    """What a class's selection was like: counts, the lowest confidence taken, means, a histogram over [0, 1] of all."""
    return {
        'images': len(scores), 'selected': len(chosen), 'lowest_selected': float(scores[chosen].min()),
        'mean': float(scores.mean(dtype=np.float64)), 'mean_selected': float(scores[chosen].mean(dtype=np.float64)),
        'ties_at_lowest': int((scores == scores[chosen].min()).sum()),
        'histogram': np.histogram(scores, BINS, (0, 1))[0].tolist()}


def extremes(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the best `count` images, best first, and then of the worst, worst first; ties go to the first index."""
    return np.concatenate([np.argsort(-scores, kind='stable')[:count], np.argsort(scores, kind='stable')[:count]])
