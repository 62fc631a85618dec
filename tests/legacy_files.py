"""Small files of every kind that the version of November 2026 (commit f976379) wrote: tests/legacy.tar.xz.

    python tests/legacy_files.py CHECKOUT     makes them again, with the scripts of that checkout

Tensors are rounded before they are written, so that the archive is small. tests/test_legacy.py checks
that the files are still read and that the runs still go on.
"""

import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

ARCHIVE = pathlib.Path(__file__).resolve().parent / 'legacy.tar.xz'
SONG = ['--num-channels=8', '--num-blocks=1', '--cres=1,1', '--attn-resolutions=4', '--batch=8',
        '--augment=0', '--duration-rule=fixed', '--rampup=0', '--tick=1', '--snap=1', '--dump=1',
        '--seed=3', '--nosubdir']
TINY = ['model.image_size=8', 'model.num_channels=32', 'model.num_res_blocks=1',
        'model.channel_mult=1', 'model.attention_resolutions=4', 'diffusion.diffusion_steps=10',
        'diffusion.timestep_respacing=10']
YAML = 'yaml/cifar10_32/exp'
TEACHER = ['--config', f'{YAML}/CIFAR10-14M-Baseline.yaml', '--data_dir', 'digits.zip', '--outdir',
           'teacher', *TINY, 'batch_size=8', 'lr=1e-3', 'ema_rate=0.9', 'save_interval=2']
STUDENT = ['--config', f'{YAML}/CIFAR10-14M-Dynamic-0.4.yaml',
           *(f'{section}.{item}' for section in ('teacher', 'student') for item in TINY),
           'teacher.model_path=teacher/ema_0.9_000002.pt', 'teacher.tempfile=teacher.cache',
           'teacher.batch_size=8', 'student.batch_size=4']

# What trains: name -> (script, options, the option that makes it longer). All go on from a checkpoint.
RUNS = {
    'edm2': ('train_edm2.py', ['--outdir=edm2', '--data=digits.zip', '--preset=digits', '--channels=8',
                               '--batch=8', '--status=16', '--snapshot=16', '--checkpoint=16'],
             '--duration={}', 16, 32),
    'edm': ('train.py', ['--outdir=edm', '--data=digits.zip', '--cond=1', '--precond=vp', *SONG],
            '--duration={}', 0.001, 0.002),
    'teacher': ('distillation/scripts/image_train.py', TEACHER, 'total_steps={}', 2, 4),
    'student': ('distillation/scripts/image_kd.py',
                [*STUDENT, '--outdir', 'student', 'student.save_interval=2', 'student.log_interval=1'],
                'student.total_steps={}', 2, 4),
    'long_tail': ('long_tail/main.py', [
        '--train', '--logdir=long_tail', '--data_type=digitslt', '--imb_factor=0.05', '--img_size=8',
        '--ch=32', '--ch_mult=1', '--attn=', '--num_res_blocks=0', '--T=8', '--warmup=2',
        '--num_workers=1', '--log_step=1', '--conditional', '--cb', '--batch_size=8', '--save_step=1',
        '--sample_step=0'], '--total_steps={}', 2, 4),
    'classifier': ('synthetic_data/train_classifier.py', [
        '--outdir=classifier', '--data=digits.zip', '--test=digits.zip', '--model=wrn-10-1',
        '--duration=32', '--batch=8', '--status=16', '--snapshot=32', '--checkpoint=16',
        '--attack-steps=1'], '--seed={}', 0, 0),
}
# What else writes files.
OTHERS = [
    ('distillation/scripts/dynamic_prepare.py', STUDENT),
    ('calculate_metrics.py', ['ref', '--data=digits.zip', '--dest=ref.pkl', '--metrics=fd_pixels']),
    ('calculate_metrics.py', ['ref', '--data=digits.zip', '--dest=ref.npz', '--metrics=fd_pixels']),
    ('long_tail/make_stats.py', ['--data_type=digits', '--detector=pixels', '--max_images=40',
                                 '--dest=stats.npz']),
    ('snapshot_tool.py', ['convert', 'edm2/network-snapshot-0000000-0.100.pkl',
                          '--dest=edm2.safetensors']),
    ('snapshot_tool.py', ['convert', 'edm/network-snapshot-0000001.pkl', '--dest=folder']),
    ('synthetic_data/generate.py', ['--network=edm/network-snapshot-0000001.pkl', '--outdir=classes',
                                    '--class_num=10', '--seeds=0-3', '--steps=2']),
    ('synthetic_data/combine_data.py', ['--data_dir=classes', '--output_dir=.', '--class_num=10',
                                        '--file_name=all']),
    ('generate_images.py', ['--net=edm2/network-snapshot-0000000-0.100.pkl', '--outdir=images',
                            '--seeds=0-3', '--steps=2']),
]


# Saved by `torch.save` as multiples of 1/16, in place: shared tensors stay shared.
ROUNDING = """
import torch
save = torch.save
def rounded(value):
    if torch.is_tensor(value) and value.is_floating_point():
        with torch.no_grad():
            value.mul_(16).round_().div_(16)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        rounded(part)
def save_rounded(state, *args, **kwargs):
    rounded(state)
    save(state, *args, **kwargs)
torch.save = save_rounded
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def make(checkout: pathlib.Path, folder: pathlib.Path):
    """Makes the files in a folder with the scripts of a checkout."""
    def run(script, arguments):
        subprocess.run([sys.executable, '-c', ROUNDING, checkout / script, *arguments], cwd=folder,
                       check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})

    sys.path[:0] = [str(checkout), str(checkout / 'tests')]
    from helpers import write_digits
    write_digits(folder / 'digits.zip', 40)
    (folder / 'yaml').symlink_to(checkout / 'distillation' / 'yaml')
    for name, (script, arguments, longer, first, _) in RUNS.items():
        if name == 'student':
            run(*OTHERS[0])
        run(script, [*arguments, longer.format(first)])
    for script, arguments in OTHERS[1:]:
        run(script, arguments)
    (folder / 'yaml').unlink()
    for pattern in ('*/events*', '*/loss.png', '*/samples-*', '*/network-snapshot*-0.050*'):
        for path in folder.glob(pattern):
            path.unlink()


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temp:
        make(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(temp))
        with tarfile.open(ARCHIVE, 'w:xz') as archive:
            archive.add(temp, '.')
