"""Make the cache of a distillation: noisy images at mixed time steps, from the teacher's own
chains.
"""

import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distillation import configs
from dnnlib import UserError, cli, lazy, options
from dnnlib.util import check_place, require_same

with lazy.imports(__name__ == '__main__'):
    from distillation import runs
    from distillation.cache import open_cache, write_cache
    from distillation.dkdm import SOURCES, IterativeSource, Preparation
    from torch_utils import distributed as dist
    from torch_utils.files.own import read_own
    from training.snapshot import write_state



def merge(path: str, part: str, cache, description: dict):
    """Writes the cache of all processes, the shares behind each other, and removes what was
    unfinished.
    """
    shares = [cache]
    if dist.get_world_size() > 1:
        write_cache(part + '.share', [cache], {})
        shares = [open_cache(name)[0] for name in dist.gather_objects(part + '.share')]
    if dist.get_rank() == 0:
        write_cache(path, shares, description)
    dist.barrier()
    for leftover in (part, part + '.share'):
        Path(leftover).unlink(missing_ok=True)


@click.command(cls=configs.Command, epilog="""\b
Examples:
  # The cache of the CIFAR-10 experiments: 51,200 images
  python scripts/dynamic_prepare.py --config yaml/cifar10_32/exp/CIFAR10-57M-Dynamic-0.4.yaml
\b
  # The same on four GPUs, each of which makes a quarter of it
  mpiexec -n 4 python scripts/dynamic_prepare.py \\
      --config yaml/cifar10_32/exp/CIFAR10-57M-Dynamic-0.4.yaml
\b
  # Of one's own network: the cache is experiments/cache/NAME.cache
  python distillation/scripts/dynamic_prepare.py --teacher=training-runs/digits/NET.pkl
\b
  # Another rho, elsewhere
  python scripts/dynamic_prepare.py --config yaml/cifar10_32/exp/CIFAR10-57M-Dynamic-0.4.yaml \\
      teacher.BATCH=0.1 teacher.tempfile=experiments/cache/CIFAR10-mine.cache
\b
The same command goes on with a preparation that was stopped. Several processes need a common file
system; image_kd.py may have another number of them.
""")
@configs.experiment_options
@options.number('--save_every', 600, 'Seconds after which unfinished work is saved',
                options.NOT_NEGATIVE)
def main(config, teacher, seed, precision, save_every, overrides):
    """Make the cache of a distillation (teacher.tempfile): images denoised down to random time
    steps.

    Needs teacher.model_path, or --teacher; of the student, only batch_size counts.
    teacher.batch_size images go through the teacher at once. The file is in the safetensors
    format: x [M,C,H,W], levels [M], classes [M] if the teacher has any, and how it was made.
    """
    dist.init(precision)
    experiment, own = runs.read_experiment(config, teacher, overrides)
    section = experiment.teacher
    dest = section.tempfile
    if SOURCES[section.iter_choice] is IterativeSource:
        raise UserError(f'teacher.iter_choice: {section.iter_choice} needs no cache; '
                        'start image_kd.py')
    check_place(dest, field='teacher.tempfile')
    teacher = runs.open_teacher(section, own)
    description = runs.cache_description(experiment, teacher) | {'seed': seed}
    size = runs.cache_share(experiment, teacher)
    cli.claim(dest)
    if os.path.exists(dest):
        _, made_with = open_cache(dest)
        if made_with is not None:
            require_same(dest, made_with, description,
                         'remove it, or choose another teacher.tempfile')
        dist.print0(f'{dest} is there already')
        return
    description['processes'] = dist.get_world_size()
    dist.print0(f'Cache: {size} images for each of {dist.get_world_size()} process(es), '
                f'rho {section.BATCH}')
    rng = runs.process_random(seed, runs.PREPARING)
    preparation = Preparation(teacher, size, rng, section.batch_size)
    preparation.equalize(min(dist.gather_objects(preparation.remaining)))
    part = f'{os.path.abspath(dest)}.part-{dist.get_rank()}-of-{dist.get_world_size()}'
    if os.path.exists(part):
        state = read_own(part)
        require_same(part, state['description'], description, 'remove it to start anew')
        preparation.load_state_dict(state['preparation'])
        print(f'Going on with {part}', flush=True)

    def save(state: dict):
        write_state(part, {'description': description, 'preparation': state})

    merge(dest, part, preparation.run(save, save_every), description)
    dist.print0(f'Done: {dest}')
    dist.shutdown()


if __name__ == '__main__':
    main()
