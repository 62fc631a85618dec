"""Select the generated images that a classifier is surest of."""

import os
import sys
import zlib
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import studies
from dnnlib import cli, options, pictures, util
from synthetic_data import common, scoring
from synthetic_data.classify import open_classifier
from synthetic_data.mixture import GeneratedImages
from synthetic_data.npz import write_npz
from torch_utils import distributed as dist

EXTREMES = 10      # best and worst images of a class in the picture
WRITE_IMAGES = 4096  # at a time


def save_picture(path: str, data, scores: np.ndarray):
    """Two rows for each class: the images with the highest confidence, and those with the
    lowest."""
    rows = {}
    for label in range(data.label_dim):
        indices = np.flatnonzero(data.label_ids == label)
        for name, keys in (('best', scores), ('worst', -scores)):
            row = indices[scoring.surest(keys[indices])[:EXTREMES]]
            rows[f'{label} {name} {scores[row[0]]:.3f}'] = data.images(row)
    studies.save_rows(rows, EXTREMES, path)


def save_histograms(path: str, rows: list[dict]):
    """Confidence of the images of each class, and the lowest one that was selected."""
    across = min(len(rows), 5)
    lines = -(-len(rows) // across)
    fig, axes = pictures.figure((2.2 * across, 1.6 * lines + 0.4), (lines, across))
    axes = np.ravel(axes)
    edges = np.linspace(0, 1, scoring.BINS + 1)
    for axis in axes[len(rows):]:
        axis.set_visible(False)
    for label, (axis, row) in enumerate(zip(axes, rows, strict=False)):
        axis.stairs(row['histogram'], edges, fill=True, color='0.6')
        axis.axvline(row['lowest_selected'], color='C0', linewidth=1)
        axis.set_yscale('symlog')
        axis.set_title(f'class {label}: {row["selected"]} of {row["images"]}', fontsize=8)
        axis.tick_params(labelsize=7)
    fig.supxlabel('confidence of the intended class (line: lowest selected)', fontsize=8)
    fig.supylabel('images', fontsize=8)
    with util.atomic_path(path) as temp:
        fig.savefig(temp, format='png', dpi=120)


def write_selected(dest: str, data, selected: list[np.ndarray]):
    """The .npz of these images, indices for each class."""
    def append(file, crc):
        for indices in selected:
            for start in range(0, len(indices), WRITE_IMAGES):
                images = data.images(indices[start:start + WRITE_IMAGES])
                content = images.transpose(0, 2, 3, 1).tobytes()
                file.write(content)
                crc = zlib.crc32(content, crc)
        return crc

    channels, height, width = data.image_shape
    write_npz(dest, (height, width, channels), list(map(len, selected)), append)


def run(model, model_path, data_dir, output_dir, class_num, top_scale, batch_size, file_name):
    """Scores, selects and writes; returns the report of each class."""
    dist.init()
    device = dist.get_device()
    torch.backends.cudnn.benchmark = False  # its choice may change the last bits of a confidence
    data = GeneratedImages(data_dir, class_num)
    net = open_classifier(model_path, model, class_num, device)
    dist.print0(f'Scoring {len(data)} images of {class_num} classes on {dist.get_world_size()} x '
                f'{device.type}')
    scores = scoring.score(net, data, batch_size, device)
    selected = []
    rows = []
    for label in range(class_num):
        indices = np.flatnonzero(data.label_ids == label)
        selected.append(indices[scoring.select_top(scores[indices], top_scale)])
        rows.append(scoring.report(scores[indices], scores[selected[-1]]))
    if dist.get_rank() == 0:
        stem = os.path.join(output_dir, file_name)
        with common.full_disk(f'--output_dir={output_dir}', 'run it again'):
            write_selected(stem + '.npz', data, selected)
            util.write_json(stem + '-report.json', {
                'model_path': model_path, 'data_dir': list(data_dir), 'top_scale': top_scale,
                'classes': rows})
            save_histograms(stem + '-confidence.png', rows)
            save_picture(stem + '-best-worst.png', data, scores)
        print(f'{"class":>5}{"images":>10}{"selected":>10}{"mean":>8}{"lowest selected":>17}')
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
@click.option('--model', metavar='wrn-D-W',
              help='What the classifier must be, e.g. wrn-28-10  [default: what the file holds]')
@click.option('--model_path', metavar='FILE', required=True,
              help='Its weights: a published .pt, or a snapshot of train_classifier.py')
@common.class_folder_options('1m')
@click.option('--top_scale', metavar='SHARE', type=click.FloatRange(0, 1, min_open=True),
              default=0.2, help='Share of each class that is taken')
@options.integer('--batch_size', 1024, 'Images at a time on each process')
def main(**opts):
    """Select the images of each class of whose class a classifier is surest: NAME.npz with `image`
    and `label`.

    The work is split over the processes of torchrun. Of images of equal confidence the first are
    taken; the selected ones stand in the order of their files. NAME-report.json,
    NAME-confidence.png and NAME-best-worst.png say what was selected.
    """
    run(**opts)
    dist.shutdown()


if __name__ == '__main__':
    main()
