"""Which generated images a classifier is surest of: confidences, the best share of each class, a
report."""

import math

import numpy as np
import torch
from tqdm import tqdm

from synthetic_data import fixed_batch
from torch_utils import distributed as dist

BINS = 50  # of the histogram of confidences


@torch.inference_mode()
def score(net, data, batch: int, device) -> np.ndarray:
    """softmax(net(x))[label] of every image of a labelled data set, float32 [len].

    Images are read `batch` at a time; the processes share them, and all get the result. On a CPU a
    confidence depends on neither.
    """
    net = fixed_batch.for_device(net, device, data.resolution)
    scores = np.zeros(len(data), np.float32)
    starts = range(dist.get_rank() * batch, len(data), dist.get_world_size() * batch)
    hidden = None if dist.get_rank() == 0 else True  # None: on a terminal only
    for start in tqdm(starts, unit='batch', delay=2, disable=hidden):
        indices = np.arange(start, min(start + batch, len(data)))
        images = torch.from_numpy(data.images(indices))
        images = images.to(device, memory_format=torch.channels_last).float() / 255
        labels = torch.from_numpy(data.label_ids[indices, None]).to(device)
        confidences = net(images).float().softmax(dim=1).gather(1, labels)
        scores[indices] = confidences[:, 0].cpu().numpy()
    return sum(dist.gather_objects(scores))  # each process has zeros for the images of others


def select_top(scores: np.ndarray, share: float) -> np.ndarray:
    """Ascending indices (int64) of the best share of scores [N], at least one; of equal scores the
    first ones are taken."""
    count = max(math.floor(len(scores) * share + 1e-6), 1)
    return np.sort(np.argsort(-scores, kind='stable')[:count])


def report(scores: np.ndarray, selected: np.ndarray) -> dict:
    """What the selection of a class was like, from all scores and the selected ones: counts, the
    lowest confidence taken, means, a histogram over [0, 1] of all."""
    return {
        'images': len(scores),
        'selected': len(selected),
        'lowest_selected': float(selected.min()),
        'mean': float(scores.mean(dtype=np.float64)),
        'mean_selected': float(selected.mean(dtype=np.float64)),
        'ties_at_lowest': int((scores == selected.min()).sum()),
        'histogram': np.histogram(scores, BINS, (0, 1))[0].tolist()}


def extremes(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the best `count` images, best first, and then of the worst, worst first; ties go
    to the first index."""
    orders = np.argsort(-scores, kind='stable'), np.argsort(scores, kind='stable')
    return np.concatenate([order[:count] for order in orders])
