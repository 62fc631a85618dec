"""Distill a diffusion model into another one without data."""

import dataclasses
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distillation import configs
from dnnlib import lazy
from training.data.archive import CLASS_TABLES

with lazy.imports(__name__ == '__main__'):
    from distillation import runs
    from torch_utils import distributed as dist
    from training.diffusion.losses import DKDMLoss



@click.command(cls=configs.Command, epilog="""\b
Examples:
  # The 14M student of the CIFAR-10 teacher; dynamic_prepare.py has made the cache
  python scripts/image_kd.py --config yaml/cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml
\b
  # A student of one's own network, to experiments/NAME-student
  python distillation/scripts/image_kd.py --teacher=training-runs/digits/NET.pkl
\b
  # Four GPUs, to an end, in a folder of one's own
  mpiexec -n 4 python scripts/image_kd.py --outdir experiments/student \\
      --config yaml/cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml student.total_steps=500000
\b
The same command goes on with a run that was stopped.
""")
@configs.experiment_options
@configs.run_options
def main(config, teacher, outdir, running, seed, precision, overrides):
    """Train a student on the steps of a teacher's chains, with no data.

    Every so many steps (student.save_interval) it writes modelNNNNNN.pt, ema_RATE_NNNNNN.pt,
    optNNNNNN.pt and teacher-state-NNNNNN.cache, and network-snapshot-*.pkl for generate_images.py.
    Each process advances its own share of the cache. student.batch_size is that of all together.
    """
    dist.init(precision)
    place = teacher
    experiment, own = runs.read_experiment(config, teacher, overrides)
    runs.align(experiment)
    section = experiment.teacher
    teacher = runs.open_teacher(section, own)
    net = runs.new_network(experiment.student, seed, running)
    loss = DKDMLoss(net.diffusion, teacher, section.input_perturb)
    source = runs.open_source(experiment, teacher, seed)
    chains = {name: getattr(section, name) for name in ('iter_choice', 'BATCH', 'prob')}
    # Of a configuration, teachers have no names of classes.
    classes = {key: own.dataset.get(key) for key in CLASS_TABLES} if own else {}
    of_own = {'own_teacher': place} if own else {}
    runs.train(
        experiment.student, net, loss, source, outdir,
        rule={'name': 'dkdm', 'input_perturb': section.input_perturb},
        dataset=runs.description(net, 'distilled') | chains | classes | {
            'teacher': runs.identity(section, teacher)},
        options=dataclasses.asdict(experiment) | dict(config=config, seed=seed) | of_own,
        encoder=own and own.encoder, running=running)
    dist.shutdown()


if __name__ == '__main__':
    main()
