"""Class-balancing diffusion on long-tailed data: training, fine-tuning, evaluation (arXiv
2305.00562).
"""

import os
import shlex
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from dnnlib import UserError, cli, lazy
from dnnlib.options import (
    ANY,
    BELOW_ONE,
    NOT_NEGATIVE,
    RUNNING,
    WATCHED,
    bench_steps,
    choice,
    count,
    fast_products,
    image_channels,
    integer,
    integers,
    keep_checkpoints,
    nan_patience,
    number,
    path,
    seed,
    text,
    together,
    transfer,
    wandb,
    watch_options,
)
from dnnlib.util import check_place, publishable, renamed_fields

with lazy.imports(__name__ == '__main__'):
    import torch

    from metrics.scoring import Scorer
    from torch_utils import distributed as dist
    from torch_utils.files.identify import identify
    from torch_utils.files.weights import load_weights
    from training import recipe, runs
    from training.checkpoint import StepCheckpoints
    from training.data.batches import DatasetBatches
    from training.diffusion.augment_ada import ADAAugment
    from training.diffusion.losses import CBDMLoss
    from training.encoders import RGBEncoder
    from training.loop import Output
    from training.networks import build_network
    from training.watch import Watch

from long_tail import datasets, evaluation
from long_tail.flags import FlagCommand, to_text
from metrics import compute
from training.data.images import ArrayImages

# --- Options -------------------------------------------------------------------------------------

INTS = cli.Parsed('list', lambda text: [int(part) for part in text.split(',') if part])
VARIANCES = {'fixedlarge': 'fixed_large', 'fixedsmall': 'fixed_small'}
# Switches of the published program that are no part of the study: its flag files have them, off.
UNUSED = ('improve', 'weight', 'cotrain', 'logit')


def switch(name: str, text: str, default: bool | None = False):
    return click.option(f'--{name}/--no{name}', name, default=default, help=text)


options_of_study = together(
    # What to do
    switch('train', 'Train; from the newest checkpoint of the run, if there is one'),
    switch('eval', 'Sample from a checkpoint and measure'),
    path('--logdir', './logs/', 'Folder of the run'),
    switch('finetune', "Train a new run from the averages of --logdir, or from --transfer; y' is "
           'uniform'),
    path('--finetuned_logdir', '', 'Folder of the fine-tuned run; a bare name is beside --logdir'),
    *transfer,
    count('--ckpt_step', 0, 'Checkpoint to fine-tune or to evaluate; 0 = the newest'),
    switch('parallel', 'One process for each visible GPU'),
    switch('allow_changes', 'Go on with a run though its settings have changed; that is logged'),
    switch('dry_run', 'Print the settings and what training would write and cost, and exit'),
    bench_steps,
    wandb,
    # Data
    choice('--data_type', 'cifar100', 'Data set; "lt" makes it long-tailed', datasets.DATA_TYPES),
    datasets.root_option,
    switch('download', 'Fetch the CIFAR archive to --root; it must have the published checksum'),
    choice('--imb_type', 'exp', 'Shape of the long tail', ['exp', 'step']),
    number('--imb_factor', 0.01, 'Images of the last class, as a share of the first', ANY),
    number('--num_class', 0.0, 'Number of classes, for a check; 0 = that of the data', ANY),
    integer('--img_size', 32, 'Width and height of the images'),
    image_channels('--img_channels', 'of a run that goes on its own; '),
    switch('xflip', 'Mirror at random, anew each time that an image is seen  [default: without '
           '--augm; a run goes on as it began]', None),
    switch('augm', 'Augment, and tell the network how'),
    count('--num_workers', 4, 'Threads that read images'),
    # Network and diffusion
    integer('--ch', 128, 'Width of the network'),
    integers('--ch_mult', '1,2,2,2', 'Width of each level, in multiples of --ch', INTS),
    integers('--attn', '1', 'Levels with attention', INTS),
    count('--num_res_blocks', 2, 'Blocks of a level'),
    number('--dropout', 0.1, 'Dropout', BELOW_ONE),
    switch('conditional', 'The network sees class labels'),
    integer('--T T', 1000, 'Diffusion steps', 2),
    number('--beta_1', 1e-4, 'First noise variance'),
    number('--beta_T beta_T', 0.02, 'Last noise variance',
           cli.Number(0, 1, min_open=True, max_open=True)),
    choice('--var_type', 'fixedlarge', 'Variance of sampling steps', VARIANCES),
    # Training
    switch('cfg', 'Drop the labels of a tenth of the steps, for guidance'),
    switch('cb', 'Class-balancing term (labels are dropped too)'),
    number('--tau', 1.0, 'Weight of the class-balancing term', NOT_NEGATIVE),
    number('--lr', 2e-4, 'Learning rate'),
    count('--warmup', 5000, 'Steps over which the learning rate rises'),
    number('--grad_clip', 1.0, 'Largest norm of the gradient; 0 = any', NOT_NEGATIVE),
    number('--ema_decay', 0.9999, 'Decay of the averaged weights', BELOW_ONE),
    integer('--batch_size', 128, 'Images of a step over all processes; of a batch of samples'),
    integer('--total_steps', 800000, 'Steps to take; for fine-tuning, further steps'),
    count('--save_step', 100000, 'Steps between checkpoints; 0 = none'),
    keep_checkpoints,
    count('--sample_step', 10000, 'Steps between sample grids; 0 = none'),
    integer('--sample_size', 64, 'Images of a grid'),
    count('--eval_step', 0, 'Steps between evaluations during training; 0 = none'),
    nan_patience,
    integer('--log_step', 100, 'Steps between reports'),
    *watch_options(compute.parse_metrics, '--eval_metrics'),
    seed('--seed', 0, 'Seed of weights, data order and noise'),
    fast_products,
    # Sampling and evaluation
    integer('--num_images', 50000, 'Images to sample'),
    choice('--sample_method', 'cfg', 'Guided, with labels, or without', ['cfg', 'cond', 'uncond']),
    number('--omega', 0.0, 'Strength of guidance; 0 = none', NOT_NEGATIVE),
    number('--weaken_labels', 0.0, 'Sample with labels as weak as training with this --tau '
           'makes them; 0 = as they are', NOT_NEGATIVE),
    count('--ddim_steps', 0, 'Steps of DDIM; 0 = ancestral sampling, all steps'),
    text('NAME', '--sample_name', 'First part of the names of sample files', default='saved'),
    switch('sampled', 'Measure the samples of an earlier call with the same options'),
    path('--fid_cache', './stats/cifar10.train.npz', 'Reference statistics (make_stats.py)'),
    switch('fid_use_torch', 'Compute the Frechet distance by torch, on the GPU if there is one'),
    evaluation.detector_options,
    switch('allow_nonfinite', 'Evaluate a network of NaN and infinite weights too'),
    switch('prd', 'Precision and recall of distributions, F_8 and F_1/8', True),
    switch('improved_prd', 'Improved precision and recall', True),
    switch('recognition', 'Share of samples that a classifier recognises (--detector=pixels)'),
    integers('--group_sizes', '100,20', '"many": classes of more training images than the first '
             'number; "few": of fewer than the second'),
    *(switch(name, 'Not part of the study') for name in UNUSED),
    count('--private_num_images', 0, 'Not part of the study'),
    text('FILE', '--flagfile', 'Take options from a file, one --name=value a line; lines may name '
         'files. Later options win', expose_value=False))


class Flags(dict):
    """The options by name, also as attributes."""

    __getattr__ = dict.__getitem__


def settings(args: list[str]) -> Flags:
    """The options of a command line, checked. Raises UserError as `prepare` does."""
    return prepare(main.make_context('main.py', list(args)).params)


def prepare(options: dict) -> Flags:
    """The options as click gives them.

    Raises UserError for options that contradict each other, the data or the machine, before
    anything is written.
    """
    flags = Flags(options)
    mults = flags.ch_mult
    faults = {
        'nothing to do: give --train or --eval': not (flags.train or flags.eval),
        '--group_sizes: give two numbers, the larger first':
            len(flags.group_sizes) != 2 or flags.group_sizes[0] < flags.group_sizes[1],
        **{f'--{name} belongs to experiments that are no part of this study; leave it off':
           flags[name] for name in (*UNUSED, 'private_num_images')},
        **{f'--{name} is about class labels; it needs --conditional':
           flags[name] and not flags.conditional for name in ('cb', 'cfg', 'finetune')},
        f'--beta_1={flags.beta_1} must not be above --beta_T={flags.beta_T}':
            flags.beta_1 > flags.beta_T,
        f'--ddim_steps={flags.ddim_steps} is more than --T={flags.T}': flags.ddim_steps > flags.T,
        '--omega guides by class labels, and this network has none; use --sample_method=uncond':
            flags.eval and flags.omega and flags.sample_method != 'uncond'
            and not flags.conditional,
        '--weaken_labels needs --conditional, and another --sample_method than uncond':
            flags.weaken_labels and (not flags.conditional or flags.sample_method == 'uncond'),
        f'--ch={flags.ch} times each of --ch_mult={mults} must be a multiple of 32, the groups '
        'of the normalisation': any(flags.ch * mult % 32 for mult in mults),
        f'--ch_mult: give one number or more; {flags.img_size} pixels are halved after each but '
        'the last': not mults or flags.img_size % 2 ** (len(mults) - 1),
        f'--attn={max(flags.attn, default=0)}: --ch_mult makes the levels 0 to {len(mults) - 1}':
            max(flags.attn, default=0) >= len(mults),
        '--finetune needs --finetuned_logdir, the folder of the new run':
            flags.finetune and not flags.finetuned_logdir,
        f'--finetuned_logdir={flags.finetuned_logdir} is the folder of the pretrained run; '
        'choose another name': flags.train and flags.finetune and os.path.realpath(
            run_folder(flags)) == os.path.realpath(flags.logdir)}
    for fault, found in faults.items():
        if found:
            raise UserError(fault)
    if flags.img_channels is None:
        began = run_folder(flags) if flags.train and not flags.finetune else flags.logdir
        flags['img_channels'] = runs.channels_of(began) or (
            3 if is_cifar(flags) else open_data(flags).num_channels)
    num_class = len(class_counts(flags))
    if flags.num_class not in (0, num_class):
        raise UserError(f'is not {num_class}, as of {flags.data_type}', 'num_class',
                        f'{flags.num_class:g}')
    place = 'finetuned_logdir' if flags.finetune else 'logdir'
    check_place(run_folder(flags), 'folder', place)
    if flags.train:
        start_of(flags)
    else:
        evaluated(flags)
    return flags


# --- What the options describe -------------------------------------------------------------------


def network_of(flags) -> dict:
    """Arguments of `build_network` for a DiscreteDenoiser."""
    unet = dict(
        class_name='DDPMUNet', cond=flags.conditional, num_class=len(class_counts(flags)),
        img_resolution=flags.img_size, **{name: flags[name] for name in (
            'T', 'ch', 'ch_mult', 'attn', 'num_res_blocks', 'dropout', 'augm')})
    if flags.img_channels != 3:                                # recipes of earlier versions stay
        unet['img_channels'] = flags.img_channels
    return dict(class_name='DiscreteDenoiser', network=unet, diffusion=dict(
        schedule='linear_float32', steps=flags.T, variance=VARIANCES[flags.var_type],
        beta_range=[flags.beta_1, flags.beta_T]))


def class_counts(flags):
    """Training images of each class, int64; of a zip, they must be read from it."""
    counts = datasets.nominal_counts(flags.data_type, flags.imb_type, flags.imb_factor)
    return open_data(flags).class_counts if counts is None else counts


def is_cifar(flags) -> bool:
    return flags.data_type.removesuffix('lt') in datasets.CIFAR


def open_data(flags) -> ArrayImages:
    """The training data."""
    return datasets.open_data(
        flags.data_type, flags.root, size=flags.img_size, imb_type=flags.imb_type,
        imb_factor=flags.imb_factor, download=flags.download, channels=flags.img_channels)


def run_folder(flags) -> str:
    """Where this run's files are: --logdir, or for fine-tuning --finetuned_logdir.

    The latter is beside --logdir if it is a bare name.
    """
    folder = flags.finetuned_logdir if flags.finetune else flags.logdir
    if flags.finetune and not os.path.dirname(folder):
        return os.path.normpath(os.path.join(flags.logdir, os.pardir, folder))
    return folder


def find_checkpoint(folder: str, step: int) -> tuple[str, int]:
    """(path, step) of the checkpoint of a step, for 0 of the newest.

    Raises UserError that lists those there are.
    """
    checkpoints = StepCheckpoints(folder)
    numbers = checkpoints.numbers()
    if numbers and step == 0 and 0 not in numbers:
        step = numbers[-1]
    if step not in numbers:
        raise UserError(f'--ckpt_step={step}: {folder} has no ckpt_{step}.pt; there are the steps '
                        f'{", ".join(map(str, numbers)) or "none: train first"}')
    return checkpoints.path(step), step


def evaluated(flags) -> tuple[str | None, int]:
    """(checkpoint, step) that --eval measures. There need be none for the samples of --sampled."""
    folder = run_folder(flags)
    if flags.sampled and not StepCheckpoints(folder).numbers():
        return None, flags.ckpt_step
    return find_checkpoint(folder, 0 if flags.train else flags.ckpt_step)


def load_average(path: str, net: torch.nn.Module, allow_nonfinite: bool = False):
    """Loads the averaged weights of a checkpoint, of this project or a published one.

    Raises UserError that names the file and the first tensors that do not fit, or are not finite.
    """
    found = identify(path, 'ema_model')
    load_weights(net if found.kind == 'snapshot' else net.model, found.state, path,
                 allow_nonfinite)


def start_of(flags) -> tuple[str | None, int]:
    """(checkpoint to start from, number of the first step): those of the pretrained run; of the
    weights of another file counting starts anew.
    """
    if flags.finetune and not flags.transfer:
        return find_checkpoint(flags.logdir, flags.ckpt_step)
    return None, 0


# --- Training ------------------------------------------------------------------------------------


def outputs_of(flags, folder, dataset) -> list[Output]:
    """The sample grids and evaluations of a run, at multiples of their steps."""
    def path(step):
        return os.path.join(folder, 'sample', f'{step}.png')

    def grid(step, net):
        evaluation.save_grid(path(step), net, flags, dataset.class_names)
        return {'Samples': path(step)}

    def scores(step, net):
        return {f'Eval/{name}': value for name, value in evaluate(net, step)['all'].items()}

    outputs = [Output(flags.sample_step * flags.batch_size, grid,
                      lambda step: os.path.isfile(path(step)), at_end=False)]
    if flags.eval_step:
        evaluate = evaluation.Evaluator(flags, folder, dataset.class_counts)
        outputs.append(Output(
            flags.eval_step * flags.batch_size, scores,
            lambda step: os.path.isfile(evaluate.file(step, '.json')), at_end=False,
            together=True))
    return outputs


def recipe_of(flags, dataset, first: int) -> recipe.Recipe:
    """The recipe of the options; `first` is the number of the first step."""
    batch = flags.batch_size
    counts = dataset.class_counts.tolist()
    loss = {key: flags[key] for key in ('cb', 'cfg', 'tau', 'finetune', 'augm')}
    return recipe.Recipe(
        transfer=flags.transfer, transfer_sha256=flags.transfer_sha256,
        batch=batch, total_nimg=(first + flags.total_steps) * batch, first_nimg=first * batch,
        seed=flags.seed, order={'name': 'epoch'}, network=network_of(flags),
        dataset=dataset.description() | {'class_counts': counts, 'xflip': flags.xflip},
        loss={'name': 'cbdm', **loss},
        learning_rate={'name': 'warmup', 'lr': flags.lr, 'warmup': flags.warmup},
        averages={'name': 'constant', 'rates': [flags.ema_decay]}, sampler={'name': 'ddpm'},
        clip_grad_norm=flags.grad_clip or None, bad_gradients=None, layout='steps',
        status=flags.log_step * batch, checkpoint=flags.save_step * batch or None,
        keep_checkpoints=flags.keep_checkpoints, nan_patience=flags.nan_patience)


def train(flags) -> bool:
    """Trains, from the newest checkpoint if there is one. Returns whether it came to its end."""
    flags = Flags(flags)
    running = {name: flags.pop(name) for name in RUNNING}
    running['watch'] = Watch(Scorer, **{name: flags.pop(name) for name in WATCHED})
    source, first = start_of(flags)
    if source:
        flags['ckpt_step'] = first
        dist.print0(f'Fine-tuning {source}')
    folder = run_folder(flags)
    if flags.xflip is None:
        flags['xflip'] = runs.option_of(StepCheckpoints, folder, 'xflip', not flags.augm, False)
    dataset = open_data(flags)
    outputs = outputs_of(flags, folder, dataset)
    rules = recipe_of(flags, dataset, first)
    net = recipe.new_network(rules, running)
    if source:
        load_average(source, net)
    loss = CBDMLoss(
        net.diffusion, dataset.label_dim, cb=flags.cb, cfg=flags.cfg, tau=flags.tau,
        class_counts=None if flags.finetune else dataset.class_counts,
        augment=ADAAugment() if flags.augm else None, batch_size=rules.batch,
        seed=flags.seed)
    needed = {name: path for name, path in runs.private_paths(flags).items()
              if name in ('root', 'fid_cache')}
    batches = DatasetBatches(dataset, RGBEncoder(), dist.get_device(), flags.seed,
                             workers=max(flags.num_workers, 1), mirror=flags.xflip)
    with renamed_fields(batch='batch_size', duration='total_steps', rates='ema_decay',
                        clip_grad_norm='grad_clip'):
        return recipe.fit(
            rules, folder, net, loss, batches, options=flags, outputs=outputs, **running,
            files={'flagfile.txt': to_text(main.params, publishable(flags))},
            advice='python main.py --flagfile {folder}/flagfile.txt --logdir {folder} --notrain '
            + ''.join(f'--{name} {shlex.quote(path)} ' for name, path in needed.items())
            + '--eval --ckpt_step {step}')


# --- Evaluation ----------------------------------------------------------------------------------


def evaluate(flags):
    """Samples from a checkpoint, saves the samples, and measures them; or measures saved ones,
    which may be all that there is of their run.
    """
    path, step = evaluated(flags)
    run = evaluation.Evaluator(flags, run_folder(flags), class_counts(flags))
    net = None
    if not flags.sampled:
        net = build_network(**network_of(flags))
        load_average(path, net, flags.allow_nonfinite)
        net.eval().requires_grad_(False).to(dist.get_device())
    run(net, step)


# --- The command ---------------------------------------------------------------------------------


def worker(args: list[str]):
    """The command in a process of --parallel."""
    main(args)


def visible_gpus() -> int:
    """Processes that --parallel starts: one for each GPU, none if a launcher has started this
    one.
    """
    return 0 if 'WORLD_SIZE' in os.environ else torch.cuda.device_count()


@click.command(cls=FlagCommand, epilog="""\b
Examples:
  # A conditional DDPM of long-tailed CIFAR-100, and the same with class-balancing
  python main.py --train --flagfile ./config/cifar100.txt --logdir ./logs/cifar100lt_ddpm \\
    --parallel --total_steps 300001 --conditional --data_type cifar100lt --batch_size 64 --cfg
  python main.py --train --flagfile ./config/cifar100.txt --logdir ./logs/cifar100lt_cbdm \\
    --parallel --total_steps 300001 --conditional --data_type cifar100lt --batch_size 48 --cb
\b
  # 100001 further steps of the former with class-balancing
  python main.py --train --flagfile ./logs/cifar100lt_ddpm/flagfile.txt --cb --finetune \\
    --logdir ./logs/cifar100lt_ddpm --ckpt_step 200000 --total_steps 100001 \\
    --finetuned_logdir cifar100lt_cbdm_finetune
\b
  # Evaluation
  python make_stats.py --data_type cifar100 --dest ./stats/cifar100.train.npz
  python main.py --flagfile ./logs/cifar100lt_cbdm/flagfile.txt --notrain --eval \\
    --logdir ./logs/cifar100lt_cbdm --fid_cache ./stats/cifar100.train.npz --ckpt_step 300000 \\
    --num_images 50000 --sample_method cfg --omega 1.6
""")
@options_of_study
def main(**options):
    """Train and evaluate diffusion models of long-tailed classes: plain, class-balancing,
    fine-tuned.

    A run's folder has ckpt_<step>.pt, flagfile.txt with every option, sample/<step>.png and
    TensorBoard events. The same command goes on with a run that was stopped.
    """
    flags = prepare(options)
    processes = visible_gpus() if flags.parallel else 0
    if processes > 1:
        sys.exit(dist.launch(worker, (to_text(main.params, flags).splitlines(),), processes))
    dist.init(flags.precision)
    finished = not flags.train or train(flags)
    if flags.eval and finished:
        evaluate(flags)
    dist.shutdown()


if __name__ == '__main__':
    main()
