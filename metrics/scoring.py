"""Measuring one network again and again: detectors and reference are made ready once."""

import math

import torch

from dnnlib import UserError
from metrics import compute
from metrics.features import Detectors, measure, usual_weights
from metrics.images import class_ids
from metrics.shares import with_intervals
from metrics.statistics import Statistics, load_statistics

PIXELS = 'fd_pixels'  # the space that images of one size have in common alone
PROTOCOL = 'edm'
REFERENCE_IMAGES = 50_000  # of a data set that is the reference


class Scorer:
    """Metrics by name, against statistics or images.

    reference    path or URL of either, a data set (see `metrics.images`), or None for metrics that
                 need none
    heldout      a data set of images that were not trained on, for metrics that need them
    open_images  path -> data set
    open_network  what opens the classifier of the detector `own`
    detectors    `Detectors`; by default their weights are where NAME_WEIGHTS of the environment
                 says, e.g. DINOV2_WEIGHTS, or the published ones

    Raises UserError for those that cannot be had, and for a reference that
    does not serve the metrics.
    """

    def __init__(self, metrics: list[str], reference, heldout, open_images, open_network,
                 detectors: Detectors | None = None):
        self.metrics = metrics
        self.detectors = detectors or Detectors(usual_weights(), protocol=PROTOCOL,
                                                open_network=open_network)
        if reference is None:
            if not compute.is_free(metrics):
                raise UserError('is needed: statistics or images to compare with', 'ref')
            self.reference = Statistics()
        elif isinstance(reference, str):
            self.reference = load_statistics(reference)
        else:
            self.reference = Statistics(reference.path, images=reference)
        compute.require_heldout(metrics, heldout)
        unseen = compute.of_heldout(metrics)
        self.heldout = Statistics(heldout.path, images=heldout) if unseen else None
        self.open_images = lambda one: open_images(one) if isinstance(one, str) else one
        compute.same_protocol(self.reference, PROTOCOL, metrics)
        compute.missing_in(self.reference, metrics)
        for metric in metrics:
            self.detectors[compute.METRICS[metric].detector]

    def prepare(self, image_shape: tuple | None = None):
        """Measures the reference, where it is images, and what is held out; all processes call
        it. Raises UserError for pixels that images [C,H,W], if that is known, cannot be compared
        with.
        """
        def complete(side, metrics):
            num = side.images and min(len(self.open_images(side.images)), REFERENCE_IMAGES)
            return compute.complete(side, metrics, self.detectors, self.open_images, num=num)

        self.reference = complete(self.reference, self.metrics)
        if self.heldout:
            self.heldout = complete(self.heldout, compute.of_heldout(self.metrics))
        if image_shape is None:
            return
        for field, side in ('eval_ref', self.reference), ('heldout', self.heldout):
            if side is None:
                continue
            dims = {len(features[0]) for features in [side.features.get(PIXELS)]
                    if features is not None}
            dims |= {side.gaussians[PIXELS].dim} if PIXELS in side.gaussians else set()
            if dims - {math.prod(image_shape)}:
                raise UserError(f'has {max(dims)} values of pixels in an image, and the network '
                                f'makes images {list(image_shape)}; make their sizes equal, or '
                                'measure by fid or fd_dinov2', field, side.path)

    def __call__(self, batches, num: int, classes: list | None) -> dict[str, float]:
        """`values`, as plain numbers, and METRIC_se, the standard error, of those that have one.
        """
        known = with_intervals(self.values(batches, num, classes))
        names = [f'{name}{end}' for name in self.metrics for end in ('', '_se')]
        return {name: float(known[name]) for name in names if name in known}

    def values(self, batches, num: int, classes: list | None) -> dict[str, float]:
        """{metric: value} of `num` images, as of `compute.evaluate`; on every process.

        batches  (seeds [n], images uint8 [n,C,H,W], labels [n] or None), on each process its share
        classes  original indices of the labels, if they have others
        """
        parts = ((torch.tensor(seeds), images,
                  None if labels is None else torch.from_numpy(class_ids(labels, classes)))
                 for seeds, images, labels in batches)
        generated = measure(parts, num, self.detectors,
                            **compute.needs(self.metrics, self.detectors.rules))
        return compute.evaluate(self.metrics, generated, self.reference, self.detectors.rules,
                                self.detectors.device, self.heldout)

    def better(self, metric: str) -> int:
        """1 where more of it is better, -1 where less is, 0 where neither."""
        return compute.METRICS[metric].better
