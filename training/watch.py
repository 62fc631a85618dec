"""Measuring a run while it trains: metrics of images that its averages make, their loss on images
that are held out, the best of them, and the end of a run that gets no better.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import numpy as np

from dnnlib import UserError, budget
from dnnlib.util import to_json, write_bytes
from torch_utils import distributed as dist
from torch_utils.stopping import turns
from training.data.batches import DatasetBatches
from training.data.images import open_images, reference_at
from training.diffusion.heldout import heldout_loss, open_fitting, plain_loss
from training.diffusion.samplers import choose_setting
from training.generate import generate_images
from training.loop import Output
from training.runs import MEASURED
from training.snapshot import load_snapshot

BEST = 'network-best.pkl'
HELDOUT = 'heldout'
BATCH = 64  # images at a time, the same on any number of processes


@dataclasses.dataclass
class Watch:
    """What to measure, by the names of the options (`dnnlib.options.watching`).

    scorer  `metrics.scoring.Scorer`: what measures
    """

    scorer: Callable
    eval_metrics: list[str] = ()
    eval_every: int | None = None
    eval_num: int = 1000
    eval_steps: int = 16
    eval_ref: str | None = None
    heldout: str | None = None
    keep_best: bool = False
    patience: int = 0

    def __bool__(self):
        return bool(self.eval_metrics or self.heldout)

    def start(self, trainer) -> 'Measurements | None':
        """The measurements of a run, if anything is to be measured. Raises UserError for what does
        not fit.
        """
        if self:
            return Measurements(self, trainer)
        for name in ('eval_every', 'eval_ref', 'keep_best', 'patience'):
            if value := getattr(self, name):
                raise UserError('needs something to measure: metrics, or held-out images', name,
                                value)
        return None


class Measurements:
    """Rows {'nimg', 'average', metric: value, ...} of metrics.jsonl, one for each average.

    The first of the metrics, or the held-out loss without any, says which is the best.
    """

    def __init__(self, options: Watch, trainer):
        batches = trainer.batches
        self.options = options
        self.trainer = trainer
        self.encoder = trainer.snapshot['encoder']
        self.path = os.path.join(trainer.run_dir, MEASURED)
        self.score = self.heldout = None
        dataset = batches.dataset if isinstance(batches, DatasetBatches) else None
        if options.heldout:
            self.heldout = open_fitting(options.heldout, trainer.net, self.encoder,
                                        trainer.recipe.dataset)
            if dataset is not None and dataset.fingerprint == self.heldout.fingerprint:
                raise UserError('has the images that are trained on', 'heldout', options.heldout)
        if options.eval_metrics:
            channels, *_ = self.encoder.pixel_shape(trainer.net.image_shape)
            open_alike = functools.partial(open_images, channels=channels)
            reference = dataset
            if options.eval_ref:
                reference = reference_at(options.eval_ref, channels)
            if reference is None or options.eval_ref is None and dataset.dtype != np.uint8:
                raise UserError('is needed: this training has no pixels to compare with',
                                'eval_ref')
            self.score = options.scorer(list(options.eval_metrics), reference, self.heldout,
                                        open_alike, load_snapshot)
        self.judged = options.eval_metrics[0] if options.eval_metrics else HELDOUT
        self.better = self.score.better(self.judged) if self.score else -1
        if not self.better and (options.keep_best or options.patience):
            raise UserError('is neither better high nor low: put another metric first',
                            'eval_metrics', self.judged)

    def output(self) -> Output:
        recipe = self.trainer.recipe
        every = self.options.eval_every or recipe.snapshot or recipe.total_nimg
        return Output(every, self._measure, self._exists, together=True, ends=self._ends)

    def prepare(self):
        """Before the first step; all processes call it."""
        if self.score:
            self.encoder.prepare(dist.get_device())
            self.score.prepare(self.encoder.pixel_shape(self.trainer.net.image_shape))

    # --- One measurement ------------------------------------------------------------------------

    def _measure(self, number, nets) -> dict:
        trainer = self.trainer
        rows = []
        values = {}
        averages = trainer.ema.get(trainer.net)
        for net, suffix, _ in averages:
            net = trainer.whole(net, everywhere=True)
            row = {}
            if self.score:
                row |= self.score(self._images(net), self.options.eval_num,
                                  trainer.recipe.dataset.get('classes'))
            by_level = {}
            if self.heldout is not None:
                loss = heldout_loss(net, plain_loss(net, trainer.recipe.loss), self.encoder,
                                    self.heldout, self.options.eval_num)
                row |= loss.results()
                by_level = {name: _rounded(mean) for name, mean in loss.by_level().items()}
            row = {name: _rounded(value) for name, value in row.items()}
            values |= {f'Eval/{name}{suffix}': value for name, value in row.items()}
            values |= {f'HeldoutAtSigma{suffix}/{name}': mean for name, mean in by_level.items()}
            trainer.log(f'Measured after {trainer.nimg} images{suffix and f", {suffix[1:]}"}: '
                        + '  '.join(f'{name} {value:.6g}' for name, value in row.items()))
            levels = {'heldout_by_sigma': by_level} if by_level else {}
            rows.append({'nimg': trainer.nimg, 'average': suffix[1:]} | row | levels)
        # What the rows say is kept before they say it.
        best = dist.broadcast_object(self._best(rows) if trainer.leads else None)
        if best is not None:
            net, _, std = averages[best]
            trainer.save_average(os.path.join(trainer.run_dir, BEST), net, std)
            trainer.log(f'Best so far: {self.judged} {rows[best][self.judged]:.6g} ({BEST})')
        if trainer.leads:
            write_bytes(self.path, b''.join(
                to_json(row).encode() + b'\n' for row in [*self.rows(trainer.nimg), *rows]))
        dist.barrier()
        return values

    def _images(self, net):
        """This process's batches of images for `Scorer`; the same batches on any number of
        processes."""
        trainer = self.trainer
        own = trainer.recipe.sampler
        chain = getattr(net, 'diffusion', None)
        steps = min(self.options.eval_steps, chain.num_steps if chain else math.inf)
        name = 'ddim' if chain else 'flow' if (own or {}).get('name') == 'flow' else 'dpmpp-2m'
        sampler = choose_setting(net, own, {'name': name, 'num_steps': steps})
        num = self.options.eval_num
        for start in turns(range(0, num, BATCH)):
            if start is not None:
                yield from ((part.seeds, part.images, part.labels) for part in generate_images(
                    net, self.encoder, range(start, min(start + BATCH, num)), batch=BATCH,
                    sampler=sampler, split=False))

    # --- All of them ----------------------------------------------------------------------------

    def rows(self, before: float = math.inf) -> list[dict]:
        """Those of the run up to now, or of fewer images than `before`."""
        if not os.path.isfile(self.path):
            return []
        found = [row for _, row in budget.json_lines(self.path)]
        return [row for row in found if isinstance(nimg := row.get('nimg'), int)
                and nimg <= self.trainer.nimg and nimg < before]

    def _value(self, row: dict) -> float:
        """How good it is; the more, the better."""
        value = row.get(self.judged)
        good = isinstance(value, int | float) and math.isfinite(value)
        return self.better * value if good else -math.inf

    def _best(self, rows: list) -> int | None:
        """Which of the rows is the best of all, to be kept; None if an earlier one is."""
        best = max(rows, key=self._value)
        earlier = max(map(self._value, self.rows(self.trainer.nimg)), default=-math.inf)
        keeps = self.options.keep_best and self._value(best) > earlier
        return rows.index(best) if keeps else None

    def _exists(self, _) -> bool:
        return any(row['nimg'] == self.trainer.nimg for row in self.rows())

    def _ends(self) -> str:
        rows = self.rows() if self.options.patience else []
        if not rows:
            return ''
        best = max(rows, key=self._value)                      # the first of equals
        later = {row['nimg'] for row in rows if row['nimg'] > best['nimg']}
        if len(later) < self.options.patience:
            return ''
        return (f'{self.judged} was best after {best["nimg"]} images ({best.get(self.judged)}), '
                f'and the {len(later)} measurements since are no better')


def _rounded(value) -> float:
    return float(f'{value:.6g}')
