"""Samples of the long-tail study: grids by class, arrays for evaluation, and their measures."""

import math
import os

import numpy as np
import torch

from dnnlib import UserError, pictures, util
from long_tail import classwise
from metrics.features import Detectors, measure_images
from metrics.recognition import Recognizer
from metrics.statistics import USUAL, Statistics, load_statistics
from torch_utils import distributed as dist
from training.data.images import NpzImages
from training.diffusion.samplers import without_labels
from training.encoders import RGBEncoder
from training.generate import generate_images

MOST_RECOGNISED = 5000  # reference images that the classifier is trained on in reasonable time
SETTINGS = ('sample_method', 'omega', 'ddim_steps', 'num_images', 'seed', 'detector', 'fid_cache',
            'group_sizes')


def generate(net, flags, seeds, **options):
    """Batches of CBDM's sampler with the options of the command line (see `generate_images`).

    The network guides itself: eps + omega (eps - eps_unconditional). Predicted images are not
    clipped before the last.
    """
    method = flags['sample_method'] if net.label_dim else 'cond'
    guidance = {'cfg': 1 + flags['omega'], 'cond': 1, 'uncond': 0}[method]
    steps = flags['ddim_steps'] or None
    sampler = dict(name='ddim' if steps else 'ddpm', num_steps=steps, clip=False)
    return generate_images(net, RGBEncoder(), seeds, batch=flags['batch_size'], sampler=sampler,
                           guide=without_labels(net), guidance=guidance, **options)


def has_labels(net, flags) -> bool:
    """Whether images are generated for classes."""
    return bool(net.label_dim) and flags['sample_method'] != 'uncond'


def save_grid(path: str, net, flags, class_names: list):
    """A picture of --sample_size images: a row for each class, or for some from first to last."""
    size = flags['sample_size']
    rows = math.isqrt(size)
    labels = names = None
    if has_labels(net, flags):
        rows = net.label_dim if 4 * net.label_dim <= size else min(rows, net.label_dim)
        shown = np.linspace(0, net.label_dim - 1, rows).round().astype(int)
        labels = shown.repeat(size // rows)
        names = [class_names[label] for label in shown]
    columns = size // rows
    batches = generate(net, flags, range(rows * columns), labels=labels, split=False)
    images = torch.cat([batch.images.cpu() for batch in batches])
    pictures.save_image_grid(path, images, columns, names)


def sample(net, flags) -> dict[str, np.ndarray]:
    """--num_images images, arr_0 uint8 [N,H,W,3], and labels, arr_1 int64 [N], if it has any.

    The same on every process. Image i depends on seed --seed * num_images + i alone; its label is
    drawn from it, uniformly.
    """
    first = flags['seed'] * flags['num_images']
    batches = generate(net, flags, range(first, first + flags['num_images']), progress=True)
    parts = [(batch.seeds, batch.images.cpu().numpy(), batch.labels) for batch in batches]
    parts = [part for process in dist.gather_objects(parts) for part in process]
    seeds, images, labels = zip(*parts, strict=True)
    order = np.argsort(np.concatenate(seeds))
    arrays = {'arr_0': np.concatenate(images)[order].transpose(0, 2, 3, 1)}
    if has_labels(net, flags):
        arrays['arr_1'] = np.concatenate(labels)[order]
    return arrays


class Evaluator:
    """Samples from networks of a run and measures them, by the options of the command line.

    `counts`: training images of each class. Raises UserError for a missing detector or unfit
    reference statistics, before anything is sampled.
    """

    def __init__(self, flags, folder: str, counts):
        self.flags = flags
        self.folder = folder
        self.counts = counts
        detector = flags['detector']
        self.space = USUAL[detector]
        self.detectors = Detectors({detector: flags['weights']})
        reference = self._reference(flags['fid_cache'], detector)
        self.evaluation = classwise.Evaluation(
            reference, self.space, self.detectors.device, prd=flags['prd'],
            manifold=flags['improved_prd'],
            frechet_device=self.detectors.device if flags['fid_use_torch'] else None)
        if flags['recognition']:
            self.evaluation.recognizer = self._recognizer(reference)
        if self.space not in reference.features and (flags['prd'] or flags['improved_prd']):
            dist.print0(f'Note: {reference.path} has no features: no PRD, precision, recall and '
                        'class groups (make_stats.py stores them)')

    def _reference(self, path: str, detector: str) -> Statistics:
        """--fid_cache, which must be of the detector's features for images of this size."""
        if not os.path.isfile(path):
            raise UserError('is no file; make it with make_stats.py', 'fid_cache', path)
        reference = load_statistics(path, space=self.space)
        pixels = 3 * self.flags['img_size']**2
        dim = {'inception': 2048, 'dinov2': 1024, 'pixels': pixels}[detector]
        stored = {space: gaussian.dim for space, gaussian in reference.gaussians.items()}
        if stored.get(self.space) != dim:
            stored = ', '.join(f'{num} dimensions of {space}' for space, num in stored.items())
            raise UserError(f'has {stored or "no statistics"}, the features of {detector} have '
                            f'{dim}; make it with make_stats.py --detector={detector} from images '
                            'of this size', 'fid_cache', path)
        weights = self.detectors[detector].fingerprint
        made_with = reference.meta.get('detectors', {}).get(detector, {})
        if made_with.get('fingerprint', weights) != weights:
            raise UserError(f'was made with other weights of {detector}; make it again',
                            'fid_cache', path)
        return reference

    def _recognizer(self, reference: Statistics) -> Recognizer:
        features = reference.features.get('fd_pixels')
        if self.space != 'fd_pixels' or features is None or reference.labels is None:
            raise UserError('needs --detector=pixels, and a --fid_cache with features',
                            'recognition')
        if len(features) > MOST_RECOGNISED:
            raise UserError(f'{len(features)} reference images are too many for its classifier; '
                            f'make the --fid_cache with --num={MOST_RECOGNISED}', 'recognition')
        return Recognizer(features.numpy(), reference.labels)

    def file(self, step: int, suffix: str) -> str:
        """Name of the samples of a checkpoint (.npz), or of their results (.json)."""
        flags = self.flags
        parts = [flags['sample_name'], str(step), flags['sample_method']]
        if flags['sample_method'] == 'cfg':
            parts.append(f'omega{flags["omega"]:g}')
        if flags['ddim_steps']:
            parts.append(f'ddim{flags["ddim_steps"]}')
        return os.path.join(self.folder, '_'.join(parts) + suffix)

    def __call__(self, net, step: int) -> dict:
        """Results as of `classwise.evaluate`, which are printed and saved too.

        Without values except on the first process.
        """
        flags = self.flags
        images = self._samples(net, step)
        features = [self.space]
        if flags['detector'] == 'inception':
            features.append(classwise.PROTOCOL.probs)
        generated = measure_images(images, self.detectors, batch=flags['batch_size'],
                                   gaussians=[self.space], features=features)
        if dist.get_rank() != 0:
            return {'all': {}}
        results = classwise.evaluate(generated, self.evaluation, self.counts, flags['group_sizes'])
        util.write_json(self.file(step, '.json'), results | {
            'step': step, 'settings': {key: flags[key] for key in SETTINGS},
            'environment': dist.environment()})
        print(f'{len(images)} images of step {step}, {flags["detector"]} features:\n'
              f'{classwise.table(results)}\nBy class in {self.file(step, ".json")}', flush=True)
        return results

    def _samples(self, net, step) -> NpzImages:
        path = self.file(step, '.npz')
        num = self.flags['num_images']
        if self.flags['sampled']:
            if not os.path.isfile(path):
                raise UserError(f'{path} does not exist; sample first, without --sampled',
                                'sampled')
            images = NpzImages(path)
            if len(images) != num:
                raise UserError(f'{path} has {len(images)} images instead of --num_images={num}',
                                'sampled')
            return images
        arrays = sample(net, self.flags)
        if dist.get_rank() == 0:
            with util.atomic_path(path) as temp, open(temp, 'wb') as file:
                np.savez(file, **arrays)
        dist.barrier()
        return NpzImages(path)
