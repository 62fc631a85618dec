"""Class-balancing diffusion on long-tailed data: training, fine-tuning and evaluation (arXiv 2305.00562)."""

import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dnnlib import UserError, cli
from dnnlib.util import renamed_fields
from long_tail import datasets, evaluation
from long_tail.flags import FlagCommand, to_text
from torch_utils import distributed as dist
from torch_utils.files.identify import identify
from torch_utils.files.weights import load_weights
from training import recipe
from training.checkpoint import StepCheckpoints
from training.data.batches import DatasetBatches
from training.diffusion.augment_ada import ADAAugment
from training.diffusion.losses import CBDMLoss
from training.encoders import RGBEncoder
from training.networks import build_network

VARIANCES = {'fixedlarge': 'fixed_large', 'fixedsmall': 'fixed_small'}
# Options of the published program that are no part of the study: its flag files have them, switched off.
UNUSED = {'improve': False, 'weight': False, 'cotrain': False, 'logit': False, 'private_num_images': 0}


def network_of(flags) -> dict:
    """Arguments of `build_network` for a DiscreteDenoiser. Raises UserError for options that do not fit."""
    groups = [f'--ch={flags["ch"]} times --ch_mult={mult}' for mult in flags['ch_mult'] if flags['ch'] * mult % 32]
    if groups:
        raise UserError(f'{groups[0]} must be a multiple of 32, the groups of the normalisation')
    if flags['img_size'] % 2 ** (len(flags['ch_mult']) - 1):
        raise UserError(f'--ch_mult: {flags["img_size"]} pixels cannot be halved {len(flags["ch_mult"]) - 1} times')
    if any(level >= len(flags['ch_mult']) for level in flags['attn']):
        raise UserError(f'--attn={max(flags["attn"])}: --ch_mult makes the levels 0 to {len(flags["ch_mult"]) - 1}')
    return dict(
        class_name='DiscreteDenoiser',
        network=dict(class_name='DDPMUNet', T=flags['T'], ch=flags['ch'], ch_mult=flags['ch_mult'], attn=flags['attn'],
                     num_res_blocks=flags['num_res_blocks'], dropout=flags['dropout'], cond=flags['conditional'],
                     augm=flags['augm'], num_class=num_classes(flags), img_resolution=flags['img_size']),
        diffusion=dict(schedule='linear_float32', steps=flags['T'], variance=VARIANCES[flags['var_type']],
                       beta_range=[flags['beta_1'], flags['beta_T']]))


def num_classes(flags) -> int:
    """Classes of the data; those of a zip must be read from it, or given with --num_class."""
    counts = class_counts(flags)
    if flags['num_class'] not in (0, len(counts)):
        raise UserError(f'--num_class={flags["num_class"]:g}, but --data_type={flags["data_type"]} has {len(counts)} classes')
    return len(counts)


def class_counts(flags):
    """Training images of each class, int64."""
    counts = datasets.nominal_counts(flags['data_type'], flags['imb_type'], flags['imb_factor'])
    return open_data(flags).class_counts if counts is None else counts


def open_data(flags):
    """The training data."""
    return datasets.open_data(flags['data_type'], flags['root'], size=flags['img_size'], imb_type=flags['imb_type'],
                            imb_factor=flags['imb_factor'], download=flags['download'], xflip=flags['xflip'])


def run_folder(flags) -> str:
    """Where this run's files are: --logdir, or for fine-tuning --finetuned_logdir, beside --logdir if it is a bare name."""
    if not flags['finetune']:
        return flags['logdir']
    name = flags['finetuned_logdir']
    if not name:
        raise UserError('--finetune needs --finetuned_logdir, the folder of the new run')
    folder = name if os.path.dirname(name) else os.path.join(os.path.dirname(os.path.abspath(flags['logdir'])), name)
    if not flags['eval'] and os.path.realpath(folder) == os.path.realpath(flags['logdir']):
        raise UserError(f'--finetuned_logdir={name} is the folder of the pretrained run; choose another name')
    return os.path.relpath(folder) if not os.path.isabs(flags['logdir']) and not os.path.isabs(name) else folder


def check(flags):
    """Raises UserError for options that contradict each other or the machine, before anything is written."""
    if not (flags['train'] or flags['eval']):
        raise UserError('nothing to do: give --train or --eval')
    for name, value in UNUSED.items():
        if flags[name] != value:
            raise UserError(f'--{name} belongs to experiments that are no part of this study; leave it off')
    for name in ('cb', 'cfg'):
        if flags[name] and not flags['conditional']:
            raise UserError(f'--{name} is about class labels; it needs --conditional')
    if flags['finetune'] and not flags['conditional']:
        raise UserError('--finetune balances classes; it needs --conditional')
    if flags['beta_1'] > flags['beta_T']:
        raise UserError(f'--beta_1={flags["beta_1"]} must not be above --beta_T={flags["beta_T"]}')
    if flags['ddim_steps'] > flags['T']:
        raise UserError(f'--ddim_steps={flags["ddim_steps"]} is more than --T={flags["T"]}')
    if flags['eval'] and flags['conditional'] is False and flags['sample_method'] != 'uncond' and flags['omega']:
        raise UserError('--omega guides by class labels, and this network has none; use --sample_method=uncond')
    network_of(flags)
    if flags['train']:
        start_of(flags)
    else:
        choose_step(run_folder(flags), flags['ckpt_step'])


def prepare(flags) -> dict:
    """The options as click gives them, with lists as lists, checked."""
    for name in ('ch_mult', 'attn'):
        flags[name] = [value for part in flags[name] for value in part]
    if len(flags['group_sizes']) != 2 or flags['group_sizes'][0] < flags['group_sizes'][1]:
        raise UserError('--group_sizes: give two numbers, the larger first')
    if not flags['ch_mult']:
        raise UserError('--ch_mult is empty; give a number for each level')
    check(flags)
    return flags


def settings(args: list[str]) -> dict:
    """The options that a command line makes."""
    return prepare(main.make_context('main.py', list(args)).params)


# --- Training ---------------------------------------------------------------------------------------------------------


def choose_step(folder: str, step: int) -> int:
    """`step` if the folder has its checkpoint, the newest for 0. Raises UserError that lists those there are."""
    steps = StepCheckpoints(folder).numbers()
    if not steps:
        raise UserError(f'--ckpt_step={step}: {folder} holds no ckpt_<step>.pt; '
                        'train there first, or give another --logdir')
    if step == 0 and 0 not in steps:
        return steps[-1]
    if step not in steps:
        raise UserError(f'--ckpt_step={step}: {folder} has no ckpt_{step}.pt; '
                        f'there are the steps {", ".join(map(str, steps))}')
    return step


def load_average(path: str, net: torch.nn.Module):
    """Loads the averaged weights of a checkpoint, ours or a published one, into a DiscreteDenoiser.

    Raises UserError that names the file and the first tensors that do not fit.
    """
    found = identify(path, 'ema_model')
    if found.kind == 'snapshot':
        load_weights(net, found.content['state'], path)
    else:
        load_weights(net.model, found.state, path)


def start_of(flags) -> tuple[str | None, int]:
    """(checkpoint to start from, number of the first step): those of the pretrained run for fine-tuning."""
    run_folder(flags)
    if not flags['finetune']:
        return None, 0
    step = choose_step(flags['logdir'], flags['ckpt_step'])
    return StepCheckpoints(flags['logdir']).path(step), step


def callbacks_of(flags, folder, dataset, evaluate):
    """(every so many images, function) of the sample grids and of --eval_step."""
    def grid(step, nets):
        if dist.get_rank() == 0:
            evaluation.save_grid(os.path.join(folder, 'sample', f'{step}.png'), nets[0], flags, dataset.class_names)

    def scores(step, nets):
        results = evaluate(nets[0], step)
        return {f'Eval/{name}': value for name, value in results['all'].items()}

    pairs = [(flags['sample_step'], grid), (flags['eval_step'], scores)]
    return [(every * flags['batch_size'], function) for every, function in pairs if every]


def recipe_of(flags, dataset, first: int) -> recipe.Recipe:
    """The recipe of the options; `first` is the number of the first step."""
    batch = flags['batch_size']
    loss = {key: flags[key] for key in ('cb', 'cfg', 'tau', 'finetune', 'augm')}
    return recipe.Recipe(
        batch=batch, total_nimg=(first + flags['total_steps']) * batch, first_nimg=first * batch,
        seed=flags['seed'], dataset=dataset.description() | {'xflip': flags['xflip']},
        order={'name': 'epoch'}, network=network_of(flags), loss={'name': 'cbdm', **loss},
        learning_rate={'name': 'warmup', 'lr': flags['lr'], 'warmup': flags['warmup']},
        averages={'name': 'constant', 'rates': [flags['ema_decay']]},
        sampler={'name': 'ddpm'}, clip_grad_norm=flags['grad_clip'] or None, bad_gradients=None,
        layout='steps', status=flags['log_step'] * batch, checkpoint=flags['save_step'] * batch or None)


def train(flags) -> bool:
    """Trains, from the newest checkpoint if there is one. Returns whether it came to its end."""
    flags = dict(flags)
    allow_changes = flags.pop('allow_changes')
    source, first = start_of(flags)
    if source:
        flags['ckpt_step'] = first
    folder = run_folder(flags)
    dataset = open_data(flags)
    evaluate = evaluation.Evaluator(flags, folder, dataset.class_counts) if flags['eval_step'] else None
    rules = recipe_of(flags, dataset, first)
    net = recipe.new_network(rules)
    if source:
        load_average(source, net)
    loss = CBDMLoss(
        net.diffusion, dataset.label_dim, cb=flags['cb'], cfg=flags['cfg'], tau=flags['tau'],
        class_counts=None if flags['finetune'] else dataset.class_counts,
        augment=ADAAugment() if flags['augm'] else None, batch_size=rules.batch, seed=flags['seed'])
    batches = DatasetBatches(dataset, RGBEncoder(), dist.get_device(), flags['seed'],
                             workers=max(flags['num_workers'], 1))
    if source:
        dist.print0(f'Fine-tuning {source}')
    with renamed_fields(batch='batch_size', duration='total_steps', rates='ema_decay', clip_grad_norm='grad_clip'):
        done = recipe.fit(
            rules, folder, net, loss, batches, options=flags | {'class_counts': dataset.class_counts.tolist()},
            callbacks=callbacks_of(flags, folder, dataset, evaluate), allow_changes=allow_changes,
            files={'flagfile.txt': to_text(main.params, flags)})
    return done >= rules.total_nimg


# --- Evaluation -------------------------------------------------------------------------------------------------------


def evaluate(flags):
    """Samples from a checkpoint, saves the samples, and measures them."""
    folder = run_folder(flags)
    step = choose_step(folder, 0 if flags['train'] else flags['ckpt_step'])
    run = evaluation.Evaluator(flags, folder, class_counts(flags))
    net = build_network(**network_of(flags))
    load_average(StepCheckpoints(folder).path(step), net)
    run(net.eval().requires_grad_(False).to(dist.get_device()), step)


def work(flags):
    """What one process does."""
    dist.init()
    finished = True
    if flags['train']:
        finished = train(flags)
    if flags['eval'] and finished:
        evaluate(flags)
    dist.shutdown()


def worker(flags):
    """`work` in a process of --parallel: errors are one line here too."""
    try:
        work(flags)
    except UserError as error:
        rank = f'[rank {dist.get_rank()}] ' if dist.get_rank() else ''
        line = error.line(error.field and f'--{error.field}')
        print(f'{rank}Error: {line}', file=sys.stderr, flush=True)
        os._exit(1)                                            # the others may wait for us


def visible_gpus() -> int:
    """Processes that --parallel starts: one for each GPU, none if a launcher has started us already."""
    return 0 if 'WORLD_SIZE' in os.environ else torch.cuda.device_count()


_INTS = cli.Parsed('ints', lambda text: [int(part) for part in text.split(',') if part])
_COUNT, _STEPS, _POSITIVE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(0, min_open=True)


def _switch(name, help):
    return click.option(f'--{name}/--no{name}', name, default=False, help=help)


def _value(name, default, type, help, **more):
    return click.option(f'--{name}', name, default=default, type=type, help=help,
                        metavar=more.pop('metavar', None) or getattr(type, 'name', 'TEXT').split()[0].upper(), **more)


OPTIONS = [
    click.option('--flagfile', metavar='FILE', expose_value=False,
                 help='Take options from a file, one --name=value a line; lines may name files. Later options win'),
    # What to do
    _switch('train', 'Train; from the newest checkpoint of the run, if there is one'),
    _switch('eval', 'Sample from a checkpoint and measure'),
    _value('logdir', './logs/', str, 'Folder of the run', metavar='DIR'),
    _switch('finetune', 'Train a new run from the averaged weights of --logdir; y\' is then uniform, and steps count on'),
    _value('finetuned_logdir', '', str, 'Folder of the fine-tuned run; a bare name lies beside --logdir', metavar='DIR'),
    _value('ckpt_step', 0, _STEPS, 'Checkpoint to fine-tune or to evaluate; 0 = the newest'),
    _switch('parallel', 'One process for each visible GPU'),
    _switch('allow_changes', 'Go on with a run though its settings have changed; what has is logged'),
    # Data
    _value('data_type', 'cifar100', click.Choice(datasets.DATA_TYPES), 'Data set; "lt" makes it long-tailed', metavar='NAME'),
    _value('root', './', str, 'Where the CIFAR archive or its folder is; for zip, the zip or folder', metavar='PATH'),
    _switch('download', 'Fetch the CIFAR archive to --root if it is not there, and insist on its published checksum'),
    _value('imb_type', 'exp', click.Choice(['exp', 'step']), 'Shape of the long tail', metavar='exp|step'),
    _value('imb_factor', 0.01, _POSITIVE, 'Images of the last class, as a share of the first'),
    _value('num_class', 0.0, float, 'Number of classes, checked against the data; 0 = that of the data'),
    _value('img_size', 32, _COUNT, 'Width and height of the images'),
    _switch('xflip', 'Add the mirror image of each'),
    _switch('augm', 'Augment, and tell the network how'),
    _value('num_workers', 4, _STEPS, 'Threads that read images'),
    # Network and diffusion
    _value('ch', 128, _COUNT, 'Width of the network'),
    _value('ch_mult', ['1,2,2,2'], _INTS, 'Width of each level, in multiples of --ch', multiple=True, metavar='INTS'),
    _value('attn', ['1'], _INTS, 'Levels with attention', multiple=True, metavar='INTS'),
    _value('num_res_blocks', 2, _STEPS, 'Blocks of a level'),
    _value('dropout', 0.1, click.FloatRange(0, 1, max_open=True), 'Dropout'),
    _switch('conditional', 'The network sees class labels'),
    _value('T', 1000, click.IntRange(min=2), 'Diffusion steps'),
    _value('beta_1', 1e-4, _POSITIVE, 'First noise variance'),
    _value('beta_T', 0.02, click.FloatRange(0, 1, min_open=True, max_open=True), 'Last noise variance'),
    _value('var_type', 'fixedlarge', click.Choice(list(VARIANCES)), 'Variance of sampling steps',
           metavar='|'.join(VARIANCES)),
    # Training
    _switch('cfg', 'Drop the labels of a tenth of the steps, for guidance'),
    _switch('cb', 'Class-balancing term (labels are dropped too)'),
    _value('tau', 1.0, click.FloatRange(0), 'Weight of the class-balancing term'),
    _value('lr', 2e-4, _POSITIVE, 'Learning rate'),
    _value('warmup', 5000, _STEPS, 'Steps over which the learning rate rises'),
    _value('grad_clip', 1.0, click.FloatRange(0), 'Largest norm of the gradient; 0 = any'),
    _value('ema_decay', 0.9999, click.FloatRange(0, 1, max_open=True), 'Decay of the averaged weights'),
    _value('batch_size', 128, _COUNT, 'Images of a step over all processes; of a batch of samples'),
    _value('total_steps', 800000, _COUNT, 'Steps to take; for fine-tuning, further steps'),
    _value('save_step', 100000, _STEPS, 'Steps between checkpoints; 0 = none'),
    _value('sample_step', 10000, _STEPS, 'Steps between sample grids; 0 = none'),
    _value('sample_size', 64, _COUNT, 'Images of a grid'),
    _value('eval_step', 0, _STEPS, 'Steps between evaluations during training; 0 = none'),
    _value('log_step', 100, _COUNT, 'Steps between reports'),
    _value('seed', 0, click.IntRange(0, 2**31 - 1), 'Seed of weights, data order and noise'),
    # Sampling and evaluation
    _value('num_images', 50000, _COUNT, 'Images to sample'),
    _value('sample_method', 'cfg', click.Choice(['cfg', 'cond', 'uncond']), 'Guided, with labels, or without',
           metavar='cfg|cond|uncond'),
    _value('omega', 0.0, click.FloatRange(0), 'Strength of guidance; 0 = none'),
    _value('ddim_steps', 0, _STEPS, 'Steps of DDIM; 0 = ancestral sampling, all steps'),
    _value('sample_name', 'saved', str, 'First part of the names of sample files', metavar='NAME'),
    _switch('sampled', 'Measure the samples of an earlier call with the same options'),
    _value('fid_cache', './stats/cifar10.train.npz', str, 'Reference statistics (make_stats.py)', metavar='NPZ'),
    _switch('fid_use_torch', 'Compute the Frechet distance by torch, on the GPU if there is one'),
    _value('detector', 'inception', click.Choice(list(evaluation.DETECTOR_NAMES)), 'Network of the features',
           metavar='|'.join(evaluation.DETECTOR_NAMES)),
    _value('weights', '', str, 'Weights of the detector: file, folder or URL  [default: the published ones]', metavar='PATH'),
    click.option('--prd/--noprd', 'prd', default=True, help='Precision and recall of distributions, F_8 and F_1/8'),
    click.option('--improved_prd/--noimproved_prd', 'improved_prd', default=True, help='Improved precision and recall'),
    _switch('recognition', 'Share of samples that a classifier of the pixels recognises (--detector=pixels)'),
    _value('group_sizes', '100,20', cli.INT_LIST, 'Classes with more training images than the first are "many", with '
           'fewer than the second "few"', metavar='INT,INT'),
    # Not part of the study
    _switch('improve', 'Not part of the study, as the next four'),
    _switch('weight', 'Not part of the study'),
    _switch('cotrain', 'Not part of the study'),
    _switch('logit', 'Not part of the study'),
    _value('private_num_images', 0, _STEPS, 'Not part of the study'),
]


def all_options(function):
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command(cls=FlagCommand, epilog="""\b
Examples:
  # A conditional DDPM of long-tailed CIFAR-100, and the same with class-balancing
  python main.py --train --flagfile ./config/cifar100.txt --parallel --logdir ./logs/cifar100lt_ddpm \\
    --total_steps 300001 --conditional --data_type cifar100lt --imb_factor 0.01 --batch_size 64 --cfg
  python main.py --train --flagfile ./config/cifar100.txt --parallel --logdir ./logs/cifar100lt_cbdm \\
    --total_steps 300001 --conditional --data_type cifar100lt --imb_factor 0.01 --batch_size 48 --cb --tau 1.0
\b
  # 100001 further steps of the former with class-balancing
  python main.py --train --flagfile ./logs/cifar100lt_ddpm/flagfile.txt --logdir ./logs/cifar100lt_ddpm --ckpt_step 200000 \\
    --total_steps 100001 --cb --finetune --finetuned_logdir cifar100lt_cbdm_finetune
\b
  # Evaluation
  python make_stats.py --data_type cifar100 --dest ./stats/cifar100.train.npz
  python main.py --flagfile ./logs/cifar100lt_cbdm/flagfile.txt --logdir ./logs/cifar100lt_cbdm --notrain --eval \\
    --ckpt_step 300000 --fid_cache ./stats/cifar100.train.npz --num_images 50000 --sample_method cfg --omega 1.6
""")
@all_options
def main(**flags):
    """Train and evaluate diffusion models of long-tailed classes: plain, class-balancing, or fine-tuned.

    A run's folder has ckpt_<step>.pt, flagfile.txt with every option, sample/<step>.png and TensorBoard events. The same
    command goes on with a run that was stopped.
    """
    prepare(flags)
    processes = visible_gpus() if flags['parallel'] else 0
    if processes > 1:
        sys.exit(dist.launch(worker, (flags,), processes))
    work(flags)


if __name__ == '__main__':
    main()
