"""The scripts that write, each as a command at its smallest size.

A command runs in an empty folder, where its results go; in what it says, {in} is the folder of
inputs, which `INPUTS` fills once, in this order.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, after its name. `copied`: inputs that it writes to, which it gets a copy of.
    `more`: patterns of files that a stopped run may have besides those of an undisturbed one.
    """

    command: str
    copied: tuple = ()
    more: tuple = ()
    processes: int = 1

    def arguments(self, inputs) -> list[str]:
        return self.command.replace('{in}', str(inputs)).split()


STATES = ('*training-state-*.pt',)
GUIDED = ('*/model*.pt', '*/ema_*.pt', '*/opt*.pt', '*/network-snapshot-*.pkl',
          '*/teacher-state-*.cache')

EDM2 = ('train_edm2.py --outdir=out --data={in}/d.zip --preset=digits --channels=8 --batch=128 '
        '--status=512 --snapshot=1024 --checkpoint=512 --duration=3072')
EDM = ('train.py --outdir=out --data={in}/d.zip --duration-rule=fixed --duration=0.003 --rampup=0 '
       '--batch=100 --num-channels=8 --num-blocks=1 --cres=1,2 --augment=0 --tick=0.5 --snap=2 '
       '--dump=2 --seed=3')
CLASSIFIER = ('synthetic_data/train_classifier.py --outdir=out --data={in}/d.zip '
              '--test={in}/t.zip --model=wrn-10-1 --batch=16 --duration=192 --xflip=0 --lr=0.1 '
              '--checkpoint=64 --snapshot=96 --status=64 --robust=0')
YAML = 'yaml/digits_8'
SHORT = 'batch_size=8 total_steps=6 save_interval=2 log_interval=1 lr_anneal_steps=0'
SCRIPTS = 'distillation/scripts'
TEACHER = (f'{SCRIPTS}/image_train.py --data_dir {{in}}/d.zip --config {YAML}/teacher.yaml '
           f'--outdir out {SHORT}')
SHARED = (f'--config {YAML}/exp/Digits-Dynamic-0.4.yaml teacher.tempfile=%s teacher.BATCH=0.1 '
          'teacher.model_path={in}/teacher/ema_0.995_000006.pt teacher.batch_size=8 '
          + ' '.join(f'student.{word}' for word in SHORT.split()))
LONG_TAIL = ('long_tail/main.py --train --ch=32 --ch_mult=2 --ch_mult=2 --attn= --num_res_blocks=0 '
             '--T=8 --warmup=2 --num_workers=1 --log_step=1 --data_type=digitslt '
             '--imb_factor=0.05 --img_size=8 --conditional --batch_size=8 --save_step=2 '
             '--sample_step=4 --total_steps=6 --cfg --logdir=out')
SHORT_SAMPLING = '--seeds=0-9 --steps=2 --batch=4'
RUN = '{in}/edm2'
SNAPSHOT = f'{RUN}/network-snapshot-0000003-0.100.pkl'
GENERATE = (f'synthetic_data/generate.py --network={SNAPSHOT} --outdir=out --seeds=0-7 --steps=2 '
            '--batch=16')

INPUTS = {
    'd.zip': 'dataset_tool.py convert --source=digits --dest=d.zip --max-images=120 --workers=1',
    't.zip': 'dataset_tool.py convert --source=digits --dest=t.zip --max-images=40 --workers=1',
    'edm2': EDM2.replace('=out', '=edm2'),
    'edm': EDM.replace('=out', '=edm --nosubdir'),
    'classes': GENERATE.replace('=out', '=classes'),
    'made': 'synthetic_data/combine_data.py --data_dir={in}/classes --output_dir=made',
    'classifier': CLASSIFIER.replace('=out', '=classifier'),
    'teacher': TEACHER.replace(' out ', ' teacher '),
    'x.cache': f'{SCRIPTS}/dynamic_prepare.py ' + SHARED % 'x.cache',
    'long': LONG_TAIL.replace('=out', '=long'),
    'stats.npz': 'long_tail/make_stats.py --data_type=digits --detector=pixels --dest=stats.npz',
}

CASES = {
    'train_edm2': Case(EDM2, more=STATES),
    'train': Case(EDM, more=STATES),
    'image_train': Case(TEACHER, more=GUIDED),
    'image_kd': Case(f'{SCRIPTS}/image_kd.py --outdir out ' + SHARED % '{in}/x.cache', more=GUIDED),
    'long_tail': Case(LONG_TAIL, more=('*/ckpt_*.pt',)),
    'train_classifier': Case(CLASSIFIER, more=STATES),
    'generate_images': Case(f'generate_images.py --net={SNAPSHOT} --outdir=out --grid=grid.png '
                            f'{SHORT_SAMPLING}'),
    'metrics-ref': Case('calculate_metrics.py ref --data={in}/d.zip --dest=ref.pkl '
                        '--metrics=fd_pixels --batch=32'),
    'metrics-gen': Case('calculate_metrics.py gen --ref={in}/stats.npz --metrics=fd_pixels '
                        f'--net={SNAPSHOT} --dest=gen.json {SHORT_SAMPLING}'),
    'memorization': Case(f'calculate_metrics.py memorization --net={SNAPSHOT} --data={{in}}/d.zip '
                         f'--dest=m.json --grid=m.png {SHORT_SAMPLING}'),
    'mem_ratio': Case('mem_ratio.py --expdir=edm --subdirs --seeds=0-5 --steps=2 --batch=4',
                      copied=('edm',)),
    'convert': Case('dataset_tool.py convert --source={in}/d.zip --dest=c.zip --resolution=16x16 '
                    '--workers=2'),
    'convert-folder': Case('dataset_tool.py convert --source=digits --dest=c --max-images=30 '
                           '--workers=1'),
    'encode': Case('dataset_tool.py encode --source={in}/d.zip --dest=e.zip --model-url={in}/vae '
                   '--batch=16'),
    'phema': Case(f'reconstruct_phema.py --indir={RUN} --outdir=out --outstd=0.08,0.05,0.15 '
                  '--batch=1'),
    'export': Case(f'snapshot_tool.py convert {SNAPSHOT} --dest=out'),
    'export-safetensors': Case(f'snapshot_tool.py convert {SNAPSHOT} --dest=out.safetensors'),
    'run_gaussian': Case('simulations/run_gaussian.py --tag=K --values=2,3,4 --seeds=0-9 '
                         '--test-points=50 --outdir=out'),
    'dynamic_prepare': Case(f'{SCRIPTS}/dynamic_prepare.py --save_every 10 ' + SHARED % 'y.cache'),
    'image_sample': Case(f'{SCRIPTS}/image_sample.py --config {YAML}/teacher.yaml --model_path '
                         '{in}/teacher/ema_0.995_000006.pt --batch_size 4 --num_samples 16 '
                         '--timestep_respacing 3 --dest s.npz'),
    'long_tail-eval': Case('long_tail/main.py --flagfile=long/flagfile.txt --logdir=long '
                           '--notrain --eval --fid_cache={in}/stats.npz --num_images=40 '
                           '--detector=pixels --batch_size=16 --ckpt_step=4 --omega=1.6 '
                           '--ddim_steps=2', copied=('long',)),
    'generate': Case(GENERATE),
    'select_1M': Case('synthetic_data/select_1M.py --model_path={in}/classifier/'
                      'network-snapshot-0000000.pkl --data_dir={in}/classes --output_dir=out '
                      '--top_scale=0.5'),
    'combine_data': Case('synthetic_data/combine_data.py --data_dir={in}/classes --output_dir=out'),
    'evaluate_data': Case('synthetic_data/evaluate_data.py --outdir=out --data={in}/d.zip '
                          '--test={in}/t.zip --generated={in}/made/5m.npz '
                          '--selected={in}/made/5m.npz --model=wrn-10-1 --duration=64 --batch=32 '
                          '--status=32 --checkpoint=32 --attack-steps=2 --pad=1 --xflip=False '
                          '--training=plain --jobs=2', more=STATES),
    'digits_synthetic': Case('synthetic_data/digits_synthetic_data.py --outdir=out --seeds=0 '
                             '--real=3 --generated=6 --top-scale=0.5 --generator-duration=64 '
                             '--channels=8 --steps=2 --duration=64 --test-images=100 --jobs=2',
                             more=STATES),
    'digits_memorization': Case('data_utils/digits_memorization.py --outdir=out --sizes=10,20 '
                                '--seeds=0 --factors=average --kimg=2 --batch=16 --channels=8 '
                                '--samples=24 --sampling-steps=2 --jobs=1', more=STATES),
    **{f'data_utils-{name}': Case(f'data_utils/dataset_{name}.py --source={{in}}/d.zip '
                                  f'--dest=s.zip --max-images=40 {more}')
       for name, more in (('tool', ''), ('size', ''), ('random', '--seed=3'), ('unique', ''),
                          ('diversity', '--num-classes=4'))},
    'train_edm2-x2': Case(EDM2, more=STATES, processes=2),
    'train-x2': Case(EDM, more=STATES, processes=2),
    'generate_images-x2': Case(f'generate_images.py --net={SNAPSHOT} --outdir=out '
                               f'{SHORT_SAMPLING}', processes=2),
    'generate-x2': Case(GENERATE, processes=2),
}
CASES['image_sample-x2'] = dataclasses.replace(CASES['image_sample'], processes=2)
