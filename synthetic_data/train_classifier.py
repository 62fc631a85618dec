"""Train a wide residual network to classify images, on real and generated ones, plainly or against
attacks."""

import functools
import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import UserError, budget, cli, lazy, options, util
from dnnlib.options import boolean, integer, nimg, number, text

with lazy.imports(__name__ == '__main__'):
    import torch

    from synthetic_data import classify
    from synthetic_data.classify import Attack
    from synthetic_data.mixture import GeneratedImages, Mixture, MixtureOrder
    from torch_utils import distributed as dist
    from training import recipe
    from training.data.batches import DatasetBatches
    from training.data.sampler import EpochShuffle
    from training.encoders import RGBEncoder
    from training.loop import Output
    from training.networks.layers import DTYPES

from metrics.shares import percent, with_intervals
from synthetic_data import common
from training.data.dataset import Dataset
from training.data.images import open_dataset

ACCURACY = 'accuracy.json'


def build_config(opts: dict) -> dict:
    """All settings of a run, from the options."""
    suiting = 'bf16' if torch.cuda.is_available() else 'fp32'
    if opts['test_attack_steps'] is None:                      # as in records of earlier versions
        opts = {key: value for key, value in opts.items() if key != 'test_attack_steps'}
    return opts | {key: opts[key] or None  # 0 switches it off
                   for key in ('status', 'snapshot', 'checkpoint', 'test_every')} | {
        'precision': recipe.choose_precision(opts['precision'] or suiting),
        'share': opts['share'] if opts['generated'] else 0.0}


def open_labelled(field: str, path: str) -> Dataset:
    """A data set of images with classes, as RGB; UserError that names the field if it is
    something else."""
    dataset = open_dataset(path, channels=3)                   # as published classifiers have
    if not dataset.has_labels:
        raise UserError('has no labels, and a classifier needs them', field, path)
    if dataset.num_channels != 3 or any(side % 4 for side in dataset.image_shape[1:]):
        raise UserError(f'has images of {list(dataset.image_shape)}; the networks take RGB images '
                        'with sides that are multiples of 4', field, path)
    return dataset


def open_data(config: dict):
    """(training data, its order, test data or None). Raises UserError where they do not fit
    together."""
    data = open_labelled('data', config['data'])
    test = open_labelled('test', config['test']) if config['test'] else None
    if test and ((test.image_shape, test.classes) != (data.image_shape, data.classes)
                 or test.label_dim > data.label_dim):
        raise UserError(f'has {test.label_dim} classes of images {list(test.image_shape)}, which '
                        f'are not those of {data.path}: {data.label_dim} of '
                        f'{list(data.image_shape)}', 'test', test.path)
    if config['generated'] is None:
        return data, EpochShuffle(len(data), config['seed']), test
    generated = GeneratedImages(config['generated'], data.label_dim)
    order = MixtureOrder(len(data), len(generated), config['share'], config['seed'])
    return Mixture(data, generated), order, test


def attack_of(config: dict, wanted: str) -> Attack | None:
    """The attack of the settings; None if the setting `wanted` is False."""
    steps = wanted == 'robust' and config.get('test_attack_steps') or config['attack_steps']
    return Attack(config['eps'], config['step_size'], steps) if config[wanted] else None


def measure_accuracy(run_dir: str, test, attack: Attack | None, seed: int, nimg: int,
                     net) -> dict:
    """Tests the averaged network, and keeps all results in accuracy.json of the run."""
    accuracy = with_intervals(classify.accuracy(net, test, attack, seed=seed))
    # A run that was killed between a test and the next checkpoint comes here twice with the same
    # numbers.
    rows = [row for row in read_accuracy(run_dir) if row['nimg'] < nimg]
    util.write_json(os.path.join(run_dir, ACCURACY), [*rows, {'nimg': nimg} | accuracy])
    attacked = f', under attack {percent(accuracy, "robust")}' if attack else ''
    print(f'Test accuracy after {util.format_count(nimg)} images: clean '
          f'{percent(accuracy, "clean")}{attacked}', flush=True)
    return {f'Accuracy/{name}': accuracy[name] for name in ('clean', 'robust')
            if accuracy[name] is not None}


def read_accuracy(run_dir: str) -> list[dict]:
    """The rows {'nimg', 'clean', 'robust'} of the tests of a run."""
    path = os.path.join(run_dir, ACCURACY)
    if not os.path.isfile(path):
        return []
    try:
        return sorted(budget.read_json(path), key=lambda row: row['nimg'])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged; remove it') from None


def recipe_of(config: dict, data) -> recipe.Recipe:
    """The recipe of the settings."""
    def chosen(*names):
        return {name: config[name] for name in names}

    return recipe.Recipe.of(
        config, total_nimg=config['duration'], dataset=data.description(),
        order={'name': 'mixture'} | chosen('share'),
        network=dict(class_name='WideResNet', name=config['model'], num_classes=data.label_dim,
                     normalize_input=config['normalize']),
        loss={'name': 'classification'} | chosen('pad', 'xflip', 'smoothing', 'adversarial', 'eps',
                                                 'step_size', 'attack_steps', 'precision'),
        optim={'name': 'SGD', 'nesterov': True, 'fused': False} | chosen(
            'momentum', 'weight_decay'),
        learning_rate={'name': 'cosine'} | chosen('lr', 'duration', 'rampup'),
        averages={'name': 'warmup', 'decay': config['ema']}, snapshot_dtype='float32',
        loss_scale={} if config['precision'] == 'fp16' and config['ls'] == 1 else None)


def train(config: dict, outdir: str, **running) -> bool:
    """Trains by the settings; `running` goes to `recipe.fit`. Returns whether they came to the
    end."""
    dist.init(config['precision'])
    data, order, test = open_data(config)
    plan = recipe_of(config, data)
    net = recipe.new_network(plan, running)
    loss = classify.ClassificationLoss(
        pad=min(data.image_shape[1:]) // 8 if config['pad'] is None else config['pad'],
        dtype=DTYPES[config['precision']], attack=attack_of(config, 'adversarial'),
        xflip=config['xflip'], smoothing=config['smoothing'])
    outputs = []
    if test is not None:
        tester = functools.partial(measure_accuracy, outdir, test,
                                   attack_of(config, 'robust'), config['seed'])
        outputs.append(Output(
            config['test_every'] or config['duration'], tester,
            lambda nimg: any(row['nimg'] == nimg for row in read_accuracy(outdir))))
    batches = DatasetBatches(data, RGBEncoder(), dist.get_device(), config['seed'], order)
    with util.renamed_fields(decay='ema', network='model', normalize_input='normalize'):
        return recipe.fit(plan, outdir, net, loss, batches, options=config, outputs=outputs,
                          advice='python select_1M.py --model_path {snapshot}', **running)


EXAMPLES = """\b
Examples:
  # A classifier to select images with: on CIFAR-10, 4 GPUs
  torchrun --standalone --nproc_per_node=4 train_classifier.py --outdir=runs/wrn \\
      --data=cifar10-train.zip --test=cifar10-test.zip
\b
  # Adversarial training on real images and a million generated ones
  torchrun --standalone --nproc_per_node=4 train_classifier.py --outdir=runs/at \\
      --data=cifar10-train.zip --test=cifar10-test.zip --generated=npz_cifar10/1m.npz \\
      --share=0.7 --adversarial=True
\b
The same command resumes an interrupted run from its newest whole checkpoint. select_1M.py takes
the snapshots."""

NEVER = ', 0 = never'
fraction = functools.partial(text, 'FRACTION', type=common.FRACTION)
# How a classifier is trained and attacked, and what is reported.
training_options = options.together(
    text('wrn-D-W', '--model', 'Network, of depth D (6n + 4) and width W', default='wrn-28-10'),
    boolean('--normalize', False, "Normalise the input by CIFAR-10's statistics"),
    number('--share', 0.7, 'Part of every batch that is generated, with --generated',
           options.FRACTION),
    fraction('--eps', 'Largest change of a pixel by an attack', default='8/255'),
    fraction('--step-size', 'Change of a pixel in a step of an attack', default='2/255'),
    integer('--attack-steps', 10, 'Steps of an attack'),
    integer('--test-attack-steps', None, 'Steps of an attack in tests  [default: --attack-steps]'),
    nimg('--duration', '20M', 'Training images in all'),
    nimg('--batch', '512', 'Images of one step'),
    number('--lr', 0.2, 'Highest learning rate; it falls to zero along a cosine'),
    nimg('--rampup', '0', 'The learning rate grows from zero over so many images'),
    number('--momentum', 0.9, "Nesterov's momentum",
           cli.Number(0, 1, min_open=True, max_open=True)),
    number('--weight-decay', 5e-4, 'Weight decay', options.NOT_NEGATIVE),
    number('--ema', 0.995, 'Factor of a step in the average of weights, which is what is tested '
                           'and saved; 0 = no average', options.BELOW_ONE),
    number('--smoothing', 0.1, 'Label smoothing', options.FRACTION),
    integer('--pad', None, 'Images are moved by up to so many pixels  [default: an eighth of the '
                           'side]', least=0),
    boolean('--xflip', True, 'Mirror half of the images'),
    options.precision(
        'Type of convolutions: fp32 (tf32: faster), or mixed fp16 (with a loss scale of its own '
        'unless --ls) or bf16  [default: bf16 on a GPU, else fp32]'),
    nimg('--status', '128Ki', 'Report every NIMG images' + NEVER),
    nimg('--checkpoint', '1M', 'Save the state every NIMG images' + NEVER))


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.training(
    'Folder of the run: results, and where to resume from',
    text('PATH', '--test', 'Data set to measure the accuracy on'),
    text('DIR|NPZ', '--generated',
         'Generated images: a folder of generate.py, or an .npz of its successors'),
    boolean('--adversarial', False, 'Train on images that PGD has changed'),
    boolean('--robust', True, 'Test under attack too'),
    training_options,
    nimg('--test-every', '0', 'Test every NIMG images, 0 = at the end'),
    nimg('--snapshot', '5M', 'Save the network every NIMG images' + NEVER),
    integer('--seed', 0, 'Seed of weights, data order and attacks', least=0))
def main(outdir, running, **opts):
    """Train a wide residual network on labelled images: SGD, cosine, averaged weights, moved and
    mirrored images.

    With --adversarial=True each image is first changed by projected gradient descent within --eps
    (l-infinity). On one process, or under torchrun on any number of GPUs, where every process
    normalises by its own part of the batch. NIMG takes suffixes: 64Ki, 20M.
    """
    train(build_config(opts), outdir, **running)
    dist.shutdown()


if __name__ == '__main__':
    main()
