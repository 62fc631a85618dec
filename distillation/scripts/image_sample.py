"""Sample images from a diffusion model's weights, into one .npz."""

import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from distillation import configs
from distillation.sample_shards import SampleShards
from dnnlib import cli, lazy, options, progress
from dnnlib.util import check_place

with lazy.imports(__name__ == '__main__'):
    from distillation import runs
    from metrics.statistics import check_destination
    from torch_utils import distributed as dist
    from training.diffusion.samplers import choose_setting
    from training.encoders import GuidedRGBEncoder
    from training.generate import generate_images
    from training.runs import claimed



def sample(net, shards: SampleShards, seed: int, sampler: dict):
    """Makes this process's share of what is missing. Image i depends on `seed` and i alone."""
    missing = shards.missing()[dist.get_rank()::dist.get_world_size()]
    first = seed * shards.count
    for start, end in progress.bar(missing, dist.get_rank() == 0, unit='batch', desc='Sampling',
                                   leave=False):
        batch, = generate_images(net, GuidedRGBEncoder(), range(first + start, first + end),
                                 batch=end - start, split=False, sampler=sampler)
        shards.save((start, end), batch.images.cpu().numpy(), batch.labels)


@click.command(cls=configs.Command, epilog="""\b
Examples:
  # The synthetic data set of the CIFAR-10 teacher, on four GPUs
  mpiexec -n 4 python scripts/image_sample.py --config yaml/cifar10_32/teacher.yaml \\
      --model_path model/32x32_diffusion_cifar10.pt --timestep_respacing 1000 --batch_size 2500 \\
      --num_samples 50000 --use_ddim False
\b
  # A student, in 50 steps
  python scripts/image_sample.py --config yaml/cifar10_32/exp/CIFAR10-14M-Dynamic-0.4.yaml \\
      --model_path experiments/CIFAR10-14M-Dynamic-0.4/ema_0.9999_500000.pt \\
      --timestep_respacing 50 --num_samples 50000 --dest samples.npz
\b
The same command goes on where it was stopped, also with another number of processes.
""")
@configs.common_options
@options.text('PT', '--model_path', 'Weights: a teacher, modelNNNNNN.pt or ema_RATE_NNNNNN.pt',
              required=True)
@options.integer('--batch_size', 256, 'Images at a time in each process')
@options.integer('--num_samples', 50000, 'Images in all')
@options.text('STR', '--timestep_respacing',
              'Steps to take: 50, 10,15,20 or ddim50  [default: 50, or a KEY=VALUE of this name]')
@options.boolean('--use_ddim', None,
                 'DDIM instead of ancestral sampling  [default: configuration]')
@options.text('NPZ', '--dest', 'Where the samples go  '
              '[default: LOG_DIR/NAME/samples_NxHxWxC.npz]', type=cli.FILE)
@options.text('DIR', '--log_dir', 'Folder of samples  [default: experiments/NAME of --config]',
              type=cli.FOLDER, envvar=configs.OUTDIR_VARIABLE, show_envvar=True)
@options.text('NAME', '--name folder', 'Folder of these samples in it  [default: MODEL-CHAIN]')
@options.samplers
@options.allow_nonfinite
def main(config, model_path, batch_size, num_samples, timestep_respacing, use_ddim, sampler, dest,
         log_dir, folder, seed, precision, overrides, allow_nonfinite):
    """Sample images: `arr_0` uint8 [N,H,W,C] in an .npz, with classes as `arr_1` if the network
    has any.

    --config is a teacher.yaml, a baseline or an experiment, of which the student is taken. Many
    processes share the work; the images are those of one. A .json beside the .npz says how they
    were made.
    """
    dist.init(precision)
    section = configs.read_network(config, overrides)
    net = runs.build(section, model_path, allow_nonfinite=allow_nonfinite)
    net.eval().requires_grad_(False)
    diffusion = section.diffusion
    respacing = timestep_respacing
    if respacing is None:
        overridden = any('timestep_respacing=' in override for override in overrides)
        respacing = diffusion.timestep_respacing if overridden else str(
            min(50, diffusion.diffusion_steps))
    ddim = diffusion.use_ddim if use_ddim is None else use_ddim
    clip = diffusion.clip_denoised
    steps = net.diffusion.respaced(respacing).num_steps        # fails early for what does not fit
    own = dict(name='ddim' if ddim else 'ddpm', num_steps=respacing, clip=clip)
    setting = choose_setting(net, own, sampler)
    chosen = {key: value for key, value in sampler.items() if value is not None}
    chain = '-'.join(map(str, chosen.values())) or f'{"ddim" if ddim else "ancestral"}{steps}'
    channels, height, width = net.image_shape
    dest = dest or os.path.join(
        log_dir or configs.default_outdir(config), folder or f'{Path(model_path).stem}-{chain}',
        f'samples_{num_samples}x{height}x{width}x{channels}.npz')
    check_destination(dest, ['.npz'])
    check_place(dest, field='dest')
    arguments = section.arguments()
    arguments['network'].pop('dropout')
    settings = dict(
        model=runs.fingerprint(model_path), seed=seed, timestep_respacing=respacing, use_ddim=ddim,
        network=arguments['network'], diffusion=arguments['diffusion'], clip_denoised=clip,
        sampler=chosen or None, rounding='(x + 1) * 127.5')
    shards = SampleShards(dest, num_samples, batch_size, settings)
    if not os.path.exists(dest):                               # else there is nothing to make
        click.get_current_context().with_resource(claimed(shards.parts, 'sampling'))
    if dist.broadcast_object(shards.open() if dist.get_rank() == 0 else None):
        runs.describe('Network', net)
        sample(net.to(dist.get_device()), shards, seed, setting)
        dist.barrier()
        if dist.get_rank() == 0:
            shards.finish()
        dist.barrier()
    dist.print0(f'{num_samples} samples: {dest}')
    dist.shutdown()


if __name__ == '__main__':
    main()
