"""When does a diffusion model copy its training set? In miniature, on handwritten digits.

Trains small networks on 20 to 150 digits, with one factor changed at a time, and measures how many
of their samples are copies. The optimal denoiser of the same data is the other extreme: all of its
samples are.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from data_utils import common, selection
from dnnlib import UserError, cli, lazy, options, util

with lazy.imports(__name__ == '__main__'):
    import matplotlib.pyplot as plt
    import pandas as pd
    from sklearn.isotonic import isotonic_regression

    from metrics.memorization import find_copies
    from training import phema, recipe
    from training.checkpoint import Checkpoints
    from training.diffusion.heldout import loss_of_snapshot
    from training.generate import open_generator
    from training.snapshot import load_snapshot, read_snapshot, snapshot_name

import studies
import train
from metrics.shares import with_intervals
from studies import WHOLE, compared, setting
from training.data.dataset import ImageDataset

# What all networks share. The learning rate is constant after the first steps, and the average of
# weights covers a share of the images seen: a run on its way is what a shorter run ends as.
OPTIONS = ['--num-blocks=1', '--cres=1,2', '--augment=0', '--dropout=0', '--window-size=0',
           '--duration-rule=fixed', '--ema_mode=mode1', '--snap=1', '--dump=1', '--nosubdir']
RAMPUP = 20                                                    # steps
SHOWN = 24                                                     # copies in a picture
LEAST = 174                                                    # digits of a class
HELD_OUT = 200                                                 # digits, at most
LEVELS = (0.9, 0.5)                                            # shares of copies at the capacity
TURN = 0.1                                                     # copies where they begin
COURSE = {size: (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1) for size in (20, 30, 50)}


@dataclasses.dataclass(frozen=True)
class Model:
    """One network: the draw of a seed of `size` digits of `classes` classes; `labels`: none, true,
    random, or unique; `width`: channels in parts of those of the base."""

    seed: int
    size: int
    classes: int = 10
    labels: str = 'none'
    width: float = 1
    precond: str = 'edm'

    @property
    def name(self) -> str:
        _, *changed = dataclasses.fields(self)
        parts = [f'{field.name}{getattr(self, field.name):}' for field in changed
                 if getattr(self, field.name) != field.default]
        return '-'.join([f'seed{self.seed}', *parts])


@dataclasses.dataclass(frozen=True)
class Variant:
    """The base with one factor changed, at some sizes.

    fields    of the models
    length    size -> steps of training, in parts of those of the base
    denoiser  what is measured. ema: the network with the usual average of its weights; last: with
              the last ones; long: with the mean of the averages at 1/2, 3/4 and 1 of the run;
              optimal: no network, but the optimal denoiser of its data
    """

    title: str
    sizes: tuple
    fields: dict = dataclasses.field(default_factory=dict)
    length: Callable = lambda size: 1
    denoiser: str = 'ema'

    def models(self, study, seed: int) -> list[Model]:
        return [Model(seed, size, **self.fields) for size in self.sizes if size in study.sizes]


SIZES = (20, 30, 50, 70, 100, 150)
LONG = (1 / 2, 3 / 4, 1)
FACTORS = {
    'base': [Variant('base', SIZES), Variant('optimal denoiser', SIZES, denoiser='optimal')],
    'labels': [Variant(f'{labels} labels', sizes, dict(labels=labels)) for labels, sizes in (
        ('true', SIZES[:4]), ('random', SIZES[:4]), ('unique', SIZES[:5]))],
    'classes': [Variant('3 classes', SIZES[:3], dict(classes=3)),
                Variant('1 class', SIZES[:3], dict(classes=1))],
    'length': [
        Variant('half the steps', SIZES[:3], length=lambda size: 1 / 2),
        Variant('twice the steps', SIZES[1:5], length=lambda size: 2),
        Variant('equal epochs', SIZES[:5], length=lambda size: size / 50)],
    'width': [Variant('half the channels', SIZES[:3], dict(width=0.5)),
              Variant('twice the channels', SIZES[1:4], dict(width=2))],
    'loss': [Variant('flow matching', SIZES[:3], dict(precond='flow'))],
    'average': [Variant('no average', SIZES[:3], denoiser='last'),
                Variant('longer average', SIZES[:3], denoiser='long')]}
VARIANTS = {variant.title: variant for variants in FACTORS.values() for variant in variants}


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0,1', 'Draws of the training images, with weights, order and '
                                   'noise')
    sizes: cli.INT_LIST = compared('20,30,50', f'Training images, of {cli.texts(SIZES)}')
    factors: cli.STR_LIST = compared('labels,classes', 'What is changed')
    steps: WHOLE = setting(500, 'Steps of training')
    batch: WHOLE = setting(64, 'Images of one step')
    lr: options.POSITIVE = setting(4e-3, 'Learning rate')
    channels: click.IntRange(min=4) = setting(16, 'Width of the network')
    samples: click.IntRange(min=SHOWN) = setting(256, 'Images that a model generates')
    sampling_steps: WHOLE = setting(10, 'Sampling steps')
