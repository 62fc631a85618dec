"""Samples of the long-tail study: grids by class, arrays for evaluation, and their measures."""

import dataclasses
import glob
import itertools
import math
import os

import numpy as np

from dnnlib import UserError, lazy, pictures, util
from dnnlib.options import DETECTORS, choice, path, together, verify

with lazy.imports():
    import torch

    from long_tail import classwise
    from long_tail.weakened import WeakenedLabels
    from metrics.features import Detectors, measure_images
    from metrics.neighbors import check_finite
    from metrics.statistics import USUAL, Statistics, load_statistics
    from torch_utils import distributed as dist
    from torch_utils.stopping import stop_point
    from training.diffusion.samplers import without_labels
    from training.encoders import RGBEncoder
    from training.generate import generate_images
    from training.snapshot import load_snapshot

from metrics import compute
from metrics.recognition import Recognizer
from metrics.shares import with_intervals
from torch_utils.files.pickles import errors_of
from training.data.images import ArrayImages, NpzImages, save_npz_images

PROTOCOL = 'cbdm'
GRID_STEPS = 50         # of DDIM, where a chain has more: grids show a run, they do not measure it
MOST_RECOGNISED = 5000  # reference images that the classifier is trained on in reasonable time
detector_options = together(
    choice('--detector', 'inception', 'Network of the features',
           DETECTORS),
    path('--weights', '',
         'Weights of the detector: file, folder or URL  [default: the published ones]'), verify)
SETTINGS = ('sample_method', 'omega', 'weaken_labels', 'ddim_steps', 'num_images', 'seed',
            'detector', 'fid_cache', 'group_sizes')


def generate(net, flags, seeds, steps: int | None = None, **options):
    """Batches of CBDM's sampler with the options of the command line (see `generate_images`).

    `steps` of DDIM, by default those of the command line. The network guides itself: eps + omega
    (eps - eps_unconditional). Predicted images are not clipped before the last.
    """
    if flags.weaken_labels:
        net = WeakenedLabels(net, flags.weaken_labels)
    method = flags.sample_method if net.label_dim else 'cond'
    guidance = {'cfg': 1 + flags.omega, 'cond': 1, 'uncond': 0}[method]
    steps = steps or flags.ddim_steps or None
    sampler = dict(name='ddim' if steps else 'ddpm', num_steps=steps, clip=False)
    return generate_images(net, RGBEncoder(), seeds, batch=flags.batch_size, sampler=sampler,
                           guide=without_labels(net), guidance=guidance, **options)


def has_labels(net, flags) -> bool:
    """Whether images are generated for classes."""
    return bool(net.label_dim) and flags.sample_method != 'uncond'


def save_grid(path: str, net, flags, class_names: list):
    """A picture of --sample_size images: a row for each class, or for some from first to last."""
    size = flags.sample_size
    rows = math.isqrt(size)
    labels = names = None
    title = ''
    if has_labels(net, flags):
        rows = net.label_dim if 4 * net.label_dim <= size else min(rows, net.label_dim)
        shown = np.linspace(0, net.label_dim - 1, rows).round().astype(int)
        labels = shown.repeat(size // rows)
        names = [class_names[label] for label in shown]
        title = pictures.with_classes('', rows, net.label_dim)
    columns = size // rows
    steps = None if flags.ddim_steps or flags.T <= GRID_STEPS else GRID_STEPS
    batches = generate(net, flags, range(rows * columns), steps, labels=labels, split=False,
                       progress=True)
    images = torch.cat([batch.images.cpu() for batch in batches])
    pictures.save_image_grid(path, images, columns, names, title)


def sample(net, flags) -> tuple:
    """--num_images images, uint8 [N,C,H,W], and their labels, int [N], or None without.

    The same on every process. Image i depends on seed --seed * num_images + i alone; its label is
    drawn from it, uniformly.
    """
    first = flags.seed * flags.num_images
    batches = generate(net, flags, range(first, first + flags.num_images), progress=True)
    rows = []
    for batch in batches:
        rows += batch
        stop_point()
    rows = dist.gather_objects(rows)
    _, labels, images = zip(*sorted(itertools.chain(*rows), key=lambda row: row[0]), strict=True)
    return np.stack(images), labels if has_labels(net, flags) else None


def read_npy(path: str) -> np.ndarray:
    """An .npy file of numbers, mapped. Raises UserError that names it."""
    with errors_of(path):
        return np.lib.format.open_memmap(path, mode='r')


def published_samples(path: str) -> ArrayImages:
    """Samples that the published code wrote, *_samples_ema_*.npy, and *_labels_ema_*.npy if it is
    beside them.

    Images [N,C,H,W] or [N,H,W,C], uint8 or numbers in 0..1, -1..1 or 0..255, which are rounded.
    Raises UserError that names the file.
    """
    array = read_npy(path)
    if array.ndim == 4 and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    is_images = array.ndim == 4 and array.shape[3] in (1, 3, 4) and len(array) > 0
    if not is_images or array.dtype.kind not in 'uif':
        raise UserError(f'{path}: {array.dtype} {list(array.shape)} instead of images '
                        '[N, 3, H, W] or [N, H, W, 3]')
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not -1.001 <= low <= high <= 255.5:
            raise UserError(f'{path}: numbers in {low:g}..{high:g} instead of 0..1, -1..1 or '
                            '0..255')
        scale, shift = (127.5, 1) if low < -0.001 else (255, 0) if high <= 1.001 else (1, 0)
        array = np.concatenate([
            np.rint((part.astype(np.float32) + shift) * scale).clip(0, 255).astype(np.uint8)
            for part in np.array_split(array, len(array) // 1000 + 1)])
    labels = '_labels_ema_'.join(path.rsplit('_samples_ema_', 1))
    labels = read_npy(labels).ravel().astype(np.int64) if os.path.isfile(labels) else None
    if labels is not None and len(labels) != len(array):
        raise UserError(f'{path}: {len(array)} images, and {len(labels)} labels beside them')
    return ArrayImages(path, array, labels)


class Evaluator:
    """Samples from networks of a run and measures them, by the options of the command line.

    `counts`: training images of each class. Raises UserError for a missing detector or unfit
    reference statistics, before anything is sampled.
    """

    def __init__(self, flags, folder: str, counts):
        self.flags = flags
        self.folder = folder
        self.counts = counts
        self.space = USUAL[flags.detector]
        self.detectors = Detectors({flags.detector: flags.weights}, protocol=PROTOCOL,
                                   open_network=load_snapshot)
        reference = self._reference(flags.fid_cache)
        device = self.detectors.device
        self.evaluation = classwise.Evaluation(
            reference, self.space, device, prd=flags.prd, manifold=flags.improved_prd,
            recognizer=self._recognizer(reference) if flags.recognition else None,
            frechet_device=device if flags.fid_use_torch else None,
            protocol=dataclasses.replace(self.detectors.rules, unbiased=flags.fid_use_torch),
            class_names=list(reference.meta.get('class_names') or []))
        if self.space not in reference.features and (flags.prd or flags.improved_prd):
            dist.print0(f'Note: {reference.path} has no features: no PRD, precision, recall and '
                        'class groups (make_stats.py stores them)')

    def _reference(self, path: str) -> Statistics:
        """--fid_cache, which must be of the detector's features for images of this size."""
        detector = self.flags.detector
        advice = f'make it with make_stats.py --detector={detector} from images of this size'
        if not os.path.isfile(path):
            raise UserError(f'is no file; {advice}', 'fid_cache', path)
        reference = load_statistics(path, space=self.space)
        stored = {space: gaussian.dim for space, gaussian in reference.gaussians.items()}
        dims = {'inception': 2048, 'dinov2': 1024, 'dinov2_base': 768, 'clip': 768,
                'pixels': self.flags.img_channels * self.flags.img_size**2}
        dim = dims.get(detector, stored.get(self.space, 'others'))
        if stored.get(self.space) != dim:
            raise UserError(f'has statistics of so many dimensions: {stored}, and the features of '
                            f'{detector} have {dim}; {advice}', 'fid_cache', path)
        with util.renamed_fields(protocol='fid_cache'):
            compute.same_protocol(reference, PROTOCOL, [self.space])
        weights = self.detectors[detector].fingerprint
        made_with = reference.meta.get('detectors', {}).get(detector, {})
        if made_with.get('fingerprint', weights) != weights:
            raise UserError(f'was made with other weights of {detector}; make it again',
                            'fid_cache', path)
        features = os.path.join(os.path.dirname(path),
                                f'{self.flags.data_type.removesuffix("lt")}_feats.npy')
        if detector == 'inception' and not reference.features and os.path.isfile(features):
            values = read_npy(features)
            if values.shape[1:] != (dim,) or values.dtype.kind != 'f':
                raise UserError(f'{features}: {values.dtype} {list(values.shape)} instead of '
                                f'features [N, {dim}]')
            dist.print0(f'Features of the reference: {features}')
            reference.features[self.space] = torch.from_numpy(values.astype(np.float32))
            check_finite(reference.features[self.space])
        return reference

    def _recognizer(self, reference: Statistics) -> Recognizer:
        features = reference.features.get('fd_pixels', ())
        few = 0 < len(features) <= MOST_RECOGNISED
        if self.space != 'fd_pixels' or reference.labels is None or not few:
            raise UserError('needs --detector=pixels, and a --fid_cache with features of at most '
                            f'{MOST_RECOGNISED} images (make_stats.py --num)', 'recognition')
        return Recognizer(features, reference.labels)

    def file(self, step: int, suffix: str) -> str:
        """Name of the samples of a checkpoint (.npz), or of their results (.json)."""
        flags = self.flags
        name = f'{flags.sample_name}_{step}_{flags.sample_method}'
        if flags.sample_method == 'cfg':
            name += f'_omega{flags.omega:g}'
        if flags.weaken_labels:
            name += f'_weakened{flags.weaken_labels:g}'
        if flags.ddim_steps:
            name += f'_ddim{flags.ddim_steps}'
        return os.path.join(self.folder, name + suffix)

    def __call__(self, net, step: int) -> dict:
        """Results as of `classwise.Evaluation`, which are printed and saved too.

        Without values except on the first process.
        """
        flags = self.flags
        images = self._samples(net, step)
        features = [self.space]
        if flags.detector == 'inception':
            features.append(self.detectors.rules.probs)
        generated = measure_images(images, self.detectors, batch=flags.batch_size,
                                   gaussians=[self.space], features=features)
        if dist.get_rank() != 0:
            return {'all': {}}
        results = self.evaluation(generated, self.counts, flags.group_sizes)
        report = self.file(step, '.json')
        notes = self.evaluation.notes(generated, results)
        files = [report]                                       # which appears last: then all is
        if 'classes' in results:
            files += classwise.save_classes(report.removesuffix('.json') + '-classes', results)
        util.write_json(report, with_intervals(results) | {
            'notes': notes, 'step': step, 'settings': {key: flags[key] for key in SETTINGS},
            'environment': dist.environment()})
        print(f'{len(images)} images of step {step}, {flags.detector} features:\n'
              f'{classwise.table(results)}', flush=True)
        print(f'Wrote {", ".join(files)}', flush=True)
        for note in notes:
            print(f'Note: {note}', flush=True)
        return results

    def _samples(self, net, step) -> NpzImages:
        path = self.file(step, '.npz')
        num = self.flags.num_images
        if not self.flags.sampled:
            samples = sample(net, self.flags)
            if dist.get_rank() == 0:
                save_npz_images(path, *samples)
            dist.barrier()
        elif not os.path.isfile(path):
            path = self._published(os.path.basename(path))
        images = NpzImages(path) if path.endswith('.npz') else published_samples(path)
        if len(images) != num:
            raise UserError(f'{path} has {len(images)} images instead of --num_images={num}',
                            'sampled')
        return images

    def _published(self, ours: str) -> str:
        """The published code's samples in the folder: of these options, else of this name, else
        the only ones. Raises UserError if there are none, or several.
        """
        flags = self.flags
        name = glob.escape(flags.sample_name)
        for pattern in (f'{flags.sample_method}_{flags.omega}_samples_ema_{name}.npy',
                        f'*_samples_ema_{name}.npy', '*_samples_ema_*.npy'):
            names = sorted(glob.glob(pattern, root_dir=self.folder))
            if len(names) > 1:
                raise UserError(f'{self.folder} has several: {", ".join(names)}; choose by '
                                'method, omega or name', 'sampled')
            if names:
                dist.print0(f'Samples: {names[0]}')
                return os.path.join(self.folder, names[0])
        raise UserError(f'{self.folder} has neither {ours} nor *_samples_ema_*.npy; sample '
                        'first, without this', 'sampled')
