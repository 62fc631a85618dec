"""Samples of the long-tail study: grids by class, arrays for evaluation, and what is measured of them."""

import math
import os

import numpy as np
import torch

from dnnlib import UserError, pictures, util
from long_tail import classwise
from metrics import compute
from metrics.recognition import Recognizer
from torch_utils import distributed as dist
from training.data.images import NpzImages
from training.diffusion.class_balancing import cbdm_sampler
from training.encoders import RGBEncoder
from training.generate import generate_images

DETECTOR_NAMES = ('inception', 'dinov2', 'pixels')
MOST_RECOGNISED = 5000  # reference images that the classifier is trained on in reasonable time


def dimensions(detector: str, size: int) -> int:
    """Numbers that a detector gives for an RGB image of size x size."""
    return {'inception': 2048, 'dinov2': 1024, 'pixels': 3 * size**2}[detector]


def sampler_of(flags):
    """CBDM's sampler with the options of the command line, for `generate_images`."""
    def sampler(net, noise, labels, guide, random):
        method = flags['sample_method'] if net.label_dim else 'uncond'
        return cbdm_sampler(net, noise, labels, method, flags['omega'], random, flags['ddim_steps'] or None)
    return sampler


def save_grid(path: str, net, flags, class_names: list):
    """A picture of --sample_size images: a row for each class, or for some classes from the first to the last."""
    size, rows = flags['sample_size'], [None] * math.isqrt(flags['sample_size'])
    if net.label_dim and flags['sample_method'] != 'uncond':
        count = net.label_dim if 4 * net.label_dim <= size else min(math.isqrt(size), net.label_dim)
        rows = np.linspace(0, net.label_dim - 1, count).round().astype(int).tolist()
    columns = size // len(rows)
    labels = None if rows[0] is None else [row for row in rows for _ in range(columns)]
    batches = generate_images(net, RGBEncoder(), range(len(rows) * columns), labels=labels, batch=flags['batch_size'],
                              sampler=sampler_of(flags), split=False)
    images = torch.cat([batch.images.cpu() for batch in batches])
    pictures.save_image_grid(path, images, columns, None if labels is None else [class_names[row] for row in rows])


def sample(net, flags) -> tuple[np.ndarray, np.ndarray | None]:
    """--num_images images uint8 [N,H,W,3] and their labels int64 [N], or None without labels; on every process.

    Image i depends on seed --seed * num_images + i alone, and its label is drawn from it, uniformly.
    """
    first = flags['seed'] * flags['num_images']
    seeds = range(first, first + flags['num_images'])
    found = [(batch.seeds, batch.images.cpu().numpy(), batch.labels) for batch in generate_images(
        net, RGBEncoder(), seeds, batch=flags['batch_size'], sampler=sampler_of(flags), progress=True)]
    parts = [part for process in dist.gather_objects(found) for part in process]
    order = np.argsort(np.concatenate([np.asarray(part[0]) for part in parts]))
    images = np.concatenate([part[1] for part in parts])[order].transpose(0, 2, 3, 1)
    if not net.label_dim or flags['sample_method'] == 'uncond':
        return images, None
    return images, np.concatenate([part[2] for part in parts])[order]


class Evaluator:
    """Samples from networks of a run and measures them, by the options of the command line.

    `counts`: training images of each class. Raises UserError for a missing detector or unfit reference statistics, before
    anything is sampled.
    """

    def __init__(self, flags, folder: str, counts):
        self.flags, self.folder, self.counts = flags, folder, counts
        self.detectors = compute.Detectors({flags['detector']: flags['weights']})
        reference = classwise.load_statistics(flags['fid_cache'])
        self.evaluation = classwise.Evaluation(reference, self.detectors.device, flags['prd'], flags['improved_prd'],
                                               on_device=flags['fid_use_torch'])
        self.evaluation.check(dimensions(flags['detector'], flags['img_size']), flags['detector'])
        detector = self.detectors[flags['detector']]
        theirs = reference.meta.get('fingerprint', detector.fingerprint)
        if theirs != detector.fingerprint:
            raise UserError(f'--fid_cache={reference.path} was made with other weights of {flags["detector"]}; make it again')
        if flags['recognition']:
            self.evaluation.recognizer = self._recognizer(reference)
        if reference.features is None and (flags['prd'] or flags['improved_prd']):
            dist.print0(f'Note: {reference.path} has no features: no PRD, precision, recall and class groups '
                        '(make_stats.py stores them)')

    def _recognizer(self, reference):
        if self.flags['detector'] != 'pixels' or reference.features is None:
            raise UserError('--recognition needs --detector=pixels, and a --fid_cache with features')
        if len(reference.features) > MOST_RECOGNISED:
            raise UserError(f'--recognition: {len(reference.features)} reference images are too many for its classifier '
                            f'(at most {MOST_RECOGNISED}); make the --fid_cache with --num={MOST_RECOGNISED}')
        return Recognizer(reference.features.features.numpy(), reference.features.labels)

    def file(self, step: int, suffix: str) -> str:
        """Name of the samples of a checkpoint (.npz), or of their results (.json)."""
        flags = self.flags
        parts = [flags['sample_name'], str(step), flags['sample_method']]
        parts += [f'omega{flags["omega"]:g}'] * (flags['sample_method'] == 'cfg')
        parts += [f'ddim{flags["ddim_steps"]}'] * bool(flags['ddim_steps'])
        return os.path.join(self.folder, '_'.join(parts) + suffix)

    def __call__(self, net, step: int) -> dict:
        """Results as of `classwise.evaluate` (empty but on the first process), which are printed and saved too."""
        images = self._samples(net, step)
        made = classwise.extract(images, self.detectors, self.flags['detector'], self.flags['batch_size'],
                                 probs=self.flags['detector'] == 'inception')
        if dist.get_rank() != 0:
            return {'all': {}}
        results = classwise.evaluate(made, self.evaluation, self.counts, self.flags['group_sizes'])
        util.write_json(self.file(step, '.json'), results | {
            'step': step, 'settings': {key: self.flags[key] for key in (
                'sample_method', 'omega', 'ddim_steps', 'num_images', 'seed', 'detector', 'fid_cache', 'group_sizes')},
            'environment': compute.environment()})
        print(f'{len(made)} images of step {step}, {self.flags["detector"]} features:\n{classwise.table(results)}\n'
              f'By class in {self.file(step, ".json")}', flush=True)
        return results

    def _samples(self, net, step) -> NpzImages:
        path, num = self.file(step, '.npz'), self.flags['num_images']
        if self.flags['sampled']:
            if not os.path.isfile(path):
                raise UserError(f'--sampled: {path} does not exist; sample first, without --sampled')
            images = NpzImages(path)
            if len(images) != num:
                raise UserError(f'--sampled: {path} has {len(images)} images instead of --num_images={num}')
            return images
        arrays, labels = sample(net, self.flags)
        if dist.get_rank() == 0:
            with util.atomic_path(path) as temp, open(temp, 'wb') as file:
                np.savez(file, arr_0=arrays, **({} if labels is None else {'arr_1': labels}))
        dist.barrier()
        return NpzImages(path)
