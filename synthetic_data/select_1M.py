"""Select the generated images that a classifier is surest of; for comparison, random ones or those
that it is least sure of."""

import math
import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dnnlib import cli, lazy, options, pictures, util

with lazy.imports(__name__ == '__main__'):
    import torch

    from synthetic_data import fixed_batch
    from synthetic_data.classify import batches, open_classifier
    from synthetic_data.mixture import GeneratedImages
    from torch_utils import distributed as dist
    from torch_utils.random import tuple_seed

import studies
from synthetic_data import common
from synthetic_data.class_files import write_npz

ORDERS = ('best', 'random', 'worst')
BINS = 50            # of the histogram of confidences
EXTREMES = 10      # best and worst images of a class in the picture
ENDINGS = {'.npz': common.CLASSES, '-report.json': cli.json_with('top_scale', 'classes'),
           '-confidence.png': cli.PICTURE, '-best-worst.png': cli.PICTURE}
WRITE_IMAGES = 4096  # at a time


def score(net, data, batch: int, device) -> np.ndarray:
    """softmax(net(x))[label] of every image of a labelled data set, float32 [len].

    Images are read `batch` at a time; the processes share them, and all get the result. On a CPU a
    confidence depends on neither.
    """
    net = fixed_batch.for_device(net, device, data.image_shape[1:])
    scores = np.zeros(len(data), np.float32)
    share = dist.get_rank(), dist.get_world_size()
    with torch.inference_mode():
        for indices, images, labels in batches(data, batch, device, *share):
            logits = net(images.to(memory_format=torch.channels_last)).float()
            confidences = logits.softmax(dim=1).gather(1, labels[:, None])
            scores[indices] = confidences[:, 0].cpu().numpy()
    return sum(dist.gather_objects(scores))  # each process has zeros for the images of others


def surest(scores: np.ndarray) -> np.ndarray:
    """Indices of scores [N] from the highest to the lowest; of equal ones the first is first."""
    return np.argsort(-scores, kind='stable')


def select(scores: np.ndarray, share: float, order: str = 'best', random=None) -> np.ndarray:
    """Indices (int64) of a share of scores [N], at least one: the best from the highest down, the
    worst from the lowest up (of equal scores the first is first), or those that come first in
    `random.permutation`."""
    count = max(math.floor(len(scores) * share + 1e-6), 1)
    if order == 'random':
        return random.permutation(len(scores))[:count]
    return surest(scores if order == 'best' else -scores)[:count]


def report(scores: np.ndarray, selected: np.ndarray) -> dict:
    """What the selection of a class was like, from all scores and the selected ones: counts, the
    lowest and highest confidence taken, means, a histogram over [0, 1] of all."""
    lowest = selected.min()
    return {
        'images': len(scores),
        'selected': len(selected),
        'lowest_selected': float(lowest),
        'highest_selected': float(selected.max()),
        'mean': scores.mean(dtype=float),
        'mean_selected': selected.mean(dtype=float),
        'ties_at_lowest': int((scores == lowest).sum()),
        'histogram': np.histogram(scores, BINS, (0, 1))[0].tolist()}


# --- What is written -----------------------------------------------------------------------------


def save_picture(path: str, data, scores: np.ndarray):
    """Two rows for each class: the images with the highest confidence, and those with the
    lowest."""
    rows = {}
    for label in range(data.label_dim):
        indices = np.flatnonzero(data.label_ids == label)
        for name, keys in (('best', scores), ('worst', -scores)):
            row = indices[surest(keys[indices])[:EXTREMES]]
            rows[f'{label} {name} {scores[row[0]]:.3f}'] = data.images(row)
    studies.save_rows(rows, EXTREMES, path, title='Class, and confidence of the first in the row')


@studies.styled
def save_histograms(path: str, rows: list[dict]):
    """Confidence of the images of each class, and the lowest and highest one that were
    selected."""
    across = min(len(rows), 5)
    lines = -(-len(rows) // across)
    fig = studies.plt.figure(figsize=(2.2 * across, 1.6 * lines + 0.4))
    edges = np.linspace(0, 1, BINS + 1)
    for label, row in enumerate(rows):
        axis = fig.add_subplot(lines, across, label + 1)
        axis.stairs(row['histogram'], edges, fill=True, color='0.6')
        for end in ('lowest', 'highest'):
            axis.axvline(row[f'{end}_selected'])
        axis.set(yscale='symlog', title=f'class {label}: {row["selected"]} of {row["images"]}')
    fig.supxlabel('confidence of the intended class (lines: range of the selected)')
    fig.supylabel('images')
    pictures.save_figure(fig, path, dpi=None)
    studies.plt.close(fig)


def write_selected(dest: str, data, selected: list[np.ndarray]):
    """The .npz of these images, indices for each class."""
    indices = np.concatenate(selected)
    channels, height, width = data.image_shape
    write_npz(dest, (height, width, channels), list(map(len, selected)), (
        data.images(part).transpose(0, 2, 3, 1).tobytes()
        for part in np.split(indices, range(WRITE_IMAGES, len(indices), WRITE_IMAGES))))


def run(model, model_path, data_dir, output_dir, class_num, top_scale, batch_size, file_name,
        order='best', seed=0):
    """Scores, selects and writes; returns the report of each class."""
    dist.init()
    stem = os.path.join(output_dir, file_name)
    for ending, kind in ENDINGS.items():
        kind.check_path(stem + ending, 'file_name')
    device = dist.get_device()
    torch.backends.cudnn.benchmark = False  # its choice may change the last bits of a confidence
    data = GeneratedImages(data_dir, class_num)
    net = open_classifier(model_path, model, class_num, device)
    cli.claim(stem + '.npz')
    dist.print0(f'Scoring {len(data)} images of {class_num} classes on {dist.get_world_size()} x '
                f'{device.type}')
    scores = score(net, data, batch_size, device)
    selected = []
    rows = []
    for label in range(class_num):
        indices = np.flatnonzero(data.label_ids == label)
        random = np.random.RandomState(tuple_seed(seed, label))
        selected.append(indices[select(scores[indices], top_scale, order, random)])
        rows.append(report(scores[indices], scores[selected[-1]]))
    if dist.get_rank() == 0:
        util.write_json(stem + '-report.json', {
            'model_path': model_path, 'data_dir': list(data_dir), 'top_scale': top_scale,
            'order': order, 'classes': rows})
        save_histograms(stem + '-confidence.png', rows)
        save_picture(stem + '-best-worst.png', data, scores)
        write_selected(stem + '.npz', data, selected)          # last: where it is, the rest is too
        print('class    images  selected    mean  lowest selected')
        for label, row in enumerate(rows):
            print(f'{label:5}{row["images"]:10}{row["selected"]:10}{row["mean"]:8.4f}'
                  f'{row["lowest_selected"]:17.6f}')
        print(f'Wrote {stem}.npz ({sum(map(len, selected))} of {len(data)} images), and beside it '
              '-report.json, -confidence.png, -best-worst.png')
    dist.barrier()
    return rows


EXAMPLES = """\b
Examples:
  python select_1M.py --model_path ./selection_model/cifar10_pseudo.pt --data_dir ./out_cifar10 \\
      --output_dir ./npz_cifar10 --class_num 10
\b
  # On 4 GPUs, with a classifier of train_classifier.py, the best tenth
  torchrun --standalone --nproc_per_node=4 select_1M.py \\
      --model_path=runs/wrn/network-snapshot-0020000.pkl --data_dir=out --output_dir=npz \\
      --top_scale=0.1"""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.text('wrn-D-W', '--model',
              'What the classifier must be, e.g. wrn-28-10  [default: what the file holds]')
@options.text('FILE', '--model_path',
              'Its weights: a published .pt, or a snapshot of train_classifier.py', required=True)
@common.class_folder_options('1m')
@options.text('SHARE', '--top_scale', 'Share of each class that is taken', default=0.2,
              type=cli.Number(0, 1, min_open=True))
@options.choice('--order', 'best', 'Which: those that the classifier is surest of, random ones, '
                'or those that it is least sure of', ORDERS)
@options.integer('--seed', 0, 'Seed of --order=random', least=0)
@options.integer('--batch_size', 1024, 'Images at a time on each process')
def main(**opts):
    """Select the images of each class of whose class a classifier is surest, or with --order
    others: NAME.npz with `image` and `label`.

    The work is split over the processes of torchrun. In the file, each class begins
    with the image of highest confidence (with --order=worst of the lowest one, random ones are in
    no order); of equal ones the first is first. NAME-report.json, NAME-confidence.png and
    NAME-best-worst.png say what was selected.
    """
    run(**opts)
    dist.shutdown()


if __name__ == '__main__':
    main()
