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
    parts = np.split(np.arange(len(data)), range(batch, len(data), batch))
    hidden = None if dist.get_rank() == 0 else True  # None: on a terminal only
    for indices in tqdm(parts[dist.get_rank()::dist.get_world_size()], unit='batch', delay=2,
                        disable=hidden):
        images = torch.from_numpy(data.images(indices))
        images = images.to(device, memory_format=torch.channels_last).float() / 255
        labels = torch.from_numpy(data.label_ids[indices, None]).to(device)
        confidences = net(images).float().softmax(dim=1).gather(1, labels)
        scores[indices] = confidences[:, 0].cpu().numpy()
    return sum(dist.gather_objects(scores))  # each process has zeros for the images of others


def surest(scores: np.ndarray) -> np.ndarray:
    """Indices of scores [N] from the highest to the lowest; of equal ones the first is first."""
    return np.argsort(-scores, kind='stable')


def select_top(scores: np.ndarray, share: float) -> np.ndarray:
    """Ascending indices (int64) of the best share of scores [N], at least one; of equal scores the
    first ones are taken."""
    count = max(math.floor(len(scores) * share + 1e-6), 1)
    return np.sort(surest(scores)[:count])


def report(scores: np.ndarray, selected: np.ndarray) -> dict:
    """What the selection of a class was like, from all scores and the selected ones: counts, the
    lowest confidence taken, means, a histogram over [0, 1] of all."""
    lowest = selected.min()
    return {
        'images': len(scores),
        'selected': len(selected),
        'lowest_selected': float(lowest),
        'mean': scores.mean(dtype=float),
        'mean_selected': selected.mean(dtype=float),
        'ties_at_lowest': int((scores == lowest).sum()),
        'histogram': np.histogram(scores, BINS, (0, 1))[0].tolist()}
