"""Distill a diffusion model into another one without data."""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distillation import common, distill, fitting
from dnnlib import cli
from torch_utils import distributed as dist
from training.diffusion.losses import DKDMLoss


@click.command(cls=cli.Command, epilog="""\b
Examples:
  # The 14M student of the CIFAR-10 teacher; dynamic_prepare.py has made the cache
  python scripts/image_kd.py --config yaml/cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml
\b
  # Four GPUs, to an end, in a folder of one's own
  mpiexec -n 4 python scripts/image_kd.py --config yaml/cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml \\
      --outdir experiments/student student.total_steps=500000
\b
The same command goes on with a run that was stopped.
""")
@common.config_option
@click.option('--outdir', metavar='DIR', envvar=common.OUTDIR_VARIABLE, show_envvar=True,
              help='Where checkpoints go  [default: experiments/NAME of the configuration]')
@common.seed_option
@common.overrides_argument
def main(config, outdir, seed, overrides):
    """Train a student on the steps of a teacher's chains, with no data.

    Every so many steps (student.save_interval) it writes modelNNNNNN.pt, ema_RATE_NNNNNN.pt, optNNNNNN.pt and
    teacher-state-NNNNNN.cache, and network-snapshot-*.pkl for generate_images.py. Each process advances its own share of
    the cache, with student.batch_size images in a step.
    """
    dist.init()
    experiment = common.read_experiment(config, overrides)
    distill.align(experiment)
    device = dist.get_device()
    teacher = distill.open_teacher(experiment, device)
    section = experiment['student']
    student = fitting.new_network(section, seed, device)
    loss = DKDMLoss(student.diffusion, teacher, experiment['teacher'].input_perturb)
    source = distill.open_source(experiment, teacher, seed)
    common.describe('Teacher', teacher.net)
    common.describe('Student', student)
    settings = {name: fitting.plain(part) for name, part in experiment.items()}
    chains = {name: getattr(experiment['teacher'], name) for name in ('iter_choice', 'BATCH', 'prob')}
    perturb = experiment['teacher'].input_perturb
    steps = fitting.fit(
        student, loss, source, section, outdir or common.default_outdir(config), seed=seed,
        rule={'name': 'dkdm', 'input_perturb': perturb}, options=settings | dict(config=config, seed=seed),
        dataset=fitting.description(student, 'distilled') | chains | {
            'teacher': common.fingerprint(experiment['teacher'].model_path)})
    dist.print0(f'{steps} steps done')
    dist.shutdown()


if __name__ == '__main__':
    main()
