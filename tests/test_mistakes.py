"""Mistakes of users: every command line here ends in one line that names what is wrong, and makes nothing."""

import pickle
import shlex
import shutil

import numpy as np
import PIL.Image
import pytest
import test_generate
import test_long_tail
import torch
from helpers import fails, invoke, script_module, write_digits
from synthetic import save_network, write_classes
from test_train_edm import TINY as EDM
from test_training import TINY as EDM2

from dnnlib import util
from training import runs
from training.encoders import RGBEncoder
from training.networks.classifier import WideResNet
from training.snapshot import save_snapshot


def snapshot(path, label_dim):
    save_snapshot(path, test_generate.make_net(label_dim), encoder=RGBEncoder(), recipe={}, nimg=1024,
                  dataset=test_generate.DATASET if label_dim else {'name': 'none', 'label_dim': 0})


def images(path, *shape):
    np.savez(path, np.zeros(shape, np.uint8))


def statistics(path, data):
    script_module('calculate_metrics.py').main(
        ['ref', f'--data={data}', f'--dest={path}', '--metrics=fd_pixels,precision_pixels,recall_pixels'],
        standalone_mode=False)


def classifier(path, classes):
    torch.save(WideResNet('wrn-10-1', classes).state_dict(), path)


class Places(dict):
    """What command lines name in braces: paths of files that are made when one is first needed."""

    makers = {
        'digits.zip': lambda self, path: write_digits(path, 300),
        'others.zip': lambda self, path: write_digits(path, 250, first=300),
        'plain.zip': lambda self, path: write_digits(path, 20, labels=False),
        'single.zip': lambda self, path: write_digits(path, 1, labels=False),
        'others.pkl': lambda self, path: statistics(path, self['others.zip']),
        'unlabelled.npz': lambda self, path: images(path, 30, 8, 8, 3),
        'unlabelled.pkl': lambda self, path: statistics(path, self['unlabelled.npz']),
        'small.npz': lambda self, path: images(path, 30, 4, 4, 3),
        'large.npz': lambda self, path: images(path, 3, 128, 128, 3),
        'one.npz': lambda self, path: images(path, 1, 8, 8, 3),
        'evil.pkl': lambda self, path: path.write_bytes(b"cos\nsystem\n(S'true'\ntR."),
        'run': lambda self, path: path.mkdir() or shutil.copy(self['net.pkl'], path / 'network-snapshot-0000001.pkl'),
        'net.pkl': lambda self, path: snapshot(path, 3),
        'uncond.pkl': lambda self, path: snapshot(path, 0),
        'wrn': lambda self, path: classifier(path, 3),
        'four': lambda self, path: classifier(path, 4),
        'text': lambda self, path: path.write_text('nothing'),
        'empty': lambda self, path: path.mkdir(),
        'cifar': lambda self, path: test_long_tail.write_cifar(path, 'cifar10', 12),
        'classes': lambda self, path: write_classes(path, [3, 3, 3], side=8),
        'ten': lambda self, path: write_classes(path, [2] * 10, side=8),
        'edm.pkl': lambda self, path: save_network(path),
        'edm-uncond.pkl': lambda self, path: save_network(path, 0)}

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        self[name] = str(self.folder / name)
        self.makers[name](self, self.folder / name)
        return self[name]


@pytest.fixture(scope='session')
def places(tmp_path_factory):
    return Places(tmp_path_factory.mktemp('mistakes'))


# {beginning of the command line: {the rest: words of the line, or several}}
MISTAKES = {
    f'train.py --outdir=out --data=<digits.zip> {shlex.join(EDM)}': {
        '--skip-connections=[1,0,1]': '--skip-connections', '--skip-connections=1,2': '--skip-connections',
        '--cbase=16': '--cbase', '--momentum=1': '--momentum', '--final-ema=1': '--final-ema', '--fp16=1': 'fp16',
        '--arch=unet': '--arch', '--nosubdir --outdir=<text>': ('--outdir', 'is a file'), '--precond=iddpm': '--precond', '--duration=0': '--duration', '--batch=0': '--batch',
        '--num-channels=36 --cres=1,8': '--num-channels', '--num-channels=7': 'even', '--cres=1,2,2,2,2': '--cres',
        '--data=nowhere.zip': 'nowhere.zip', '--resume=nowhere': '--resume', '--transfer=nowhere.pkl': 'nowhere.pkl',
        '--window-size=2': '--window-size', '--desc=a/b': '--desc', '--ema_mode=mode5': '--ema_mode',
        '--optimizer=AdamW': '--optimizer', '--data=<plain.zip> --cond=1': '--cond',
        '--lr=nan': '--lr', '--final-ema=nan': '--final-ema', '--tick=nan': '--tick',
        '--resume=<empty>': 'training-state', '--resume=<net.pkl>': 'no training state'},
    f'train_edm2.py --outdir=out --data=<digits.zip> {shlex.join(EDM2)}': {
        '--data=nowhere.zip': 'nowhere.zip', '--precision=fp16': 'fp16', '--fp16=True --precision=bf16': '--fp16',
        '--batch=x': '--batch', '--preset=edm2-img512-huge': '--preset', '--batch-gpu=0': '--batch-gpu',
        '--lr=nan': '--lr', '--P_mean=nan': '--P_mean', '--data=<plain.zip>': '--cond=True needs labels',
        '--bench-steps=2': '--bench-steps=2 measures for a dry run', '--ema-stds=0.3': ('--ema-stds', '0.289'),
        '--ema-stds=0.1,0.1001': 'named by three digits', '--channel-mult=1,2,2,2,2': '5 resolutions', '--num-blocks=0': '--num-blocks',
        '--channels=200 --channel-mult=1,3': '600 channels, which 18 heads', '--augment=2': '--augment', '--rampup=-1': '--rampup',
        '--xflip=maybe': '--xflip', '--shard --compile=True': '--shard',
        '--eval=fdi': 'no metric', '--patience=2': '--patience=2 needs something to measure', '--keep-best=True': '--keep-best',
        '--heldout=<digits.zip>': '--heldout', '--heldout=nowhere.zip': 'nowhere.zip', '--heldout=<large.npz>': '--heldout',
        '--eval=fd_pixels --eval-ref=nowhere.pkl': 'nowhere.pkl',
        '--eval=fd_pixels --eval-ref=<small.npz>': ('--eval-ref', '48 values'), '-n --eval=fd_pixels --eval-ref=nowhere.pkl': 'nowhere.pkl',
        '-n --patience=2': '--patience=2 needs something to measure', '-n --heldout=<large.npz>': '--heldout',
        '-n --transfer=nowhere.pkl': 'nowhere.pkl', '-n --transfer=<net.pkl>': '--transfer', '--heldout=<plain.zip>': '--heldout', '--wandb=P': ('--wandb', 'pip install wandb')},
    'calculate_metrics.py heldout --data=<digits.zip>': {
        '': '--net', '--net=<net.pkl>': '--data', '--net=nowhere.pkl': 'nowhere.pkl'},
    'generate_images.py --outdir=out': {
        '--net=nowhere.pkl': 'nowhere.pkl', '': '--net', '--preset=edm2-img512-huge-fid': '--preset',
        '--net=<net.pkl> --guidance=2': '--guidance=2.0 needs a guiding network',
        '--net=<net.pkl> --class=5': '171 (greyhound)', '--net=<uncond.pkl> --class=171': 'no classes',
        '--net=<net.pkl> --sigma_max=nan': '--sigma_max', '--net=<net.pkl> --guidance=nan': '--guidance',
        '--net=<net.pkl> --guidance-interval=nan,1': '--guidance-interval',
        '--net=<net.pkl> --seeds=5-x': '--seeds', '--net=<net.pkl> --outdir=<cifar>': 'not empty'},
    'report.py': {'': 'RUN', 'nowhere': 'nowhere is no folder of a run', '<run> --dest=x.txt': '.html',
                  '<cifar> --dest=x.html': 'has neither training_options.json'},
    'reconstruct_phema.py': {
        '--indir=nowhere --outstd=0.1': 'nowhere', '--indir=. --outstd=0.1': 'no snapshots',
        '--indir=. --outstd=0.5': '--outstd', '--indir=<run> --outstd=0.1': 'no snapshots', '--indir=. --outstd=x': '--outstd'},
    'reconstruct_phema.py sweep --indir=. --stds=0.05..0.2 --metric=fid': {
        '': 'no snapshots', '--stds=0.2..0.1': ('--stds', 'LO < HI'), '--stds=0.1..0.3': ('--stds', '0.289'),
        '--metric=fdi': ('--metric', 'no metric'), '--metric=ct': '--metric=ct is neither better', '--metric=fid,is': 'one metric',
        '--dest=x.txt': '--dest', '--sweep-points=3': '--sweep-points'},
    'snapshot_tool.py': {
        'inspect missing.pkl': 'no such file', 'convert missing.pkl --dest=x.pkl': 'no such file',
        'convert <net.pkl> --dest=x.onnx': '--dest', 'convert <net.pkl> --dest=x.pkl --set heads=4': 'leave out heads',
        'convert <net.pkl> --dest=x.pkl --set heads': 'NAME=VALUE',
        'convert <net.pkl> --dest=/proc/x.pkl': 'cannot be written',
        'convert <net.pkl> --dest=x.pkl --sha256 12': '64 hexadecimal digits',
        f'convert <net.pkl> --dest=x.pkl --sha256 {"0" * 64}': 'instead of 000',
        'convert <wrn> --dest=x': 'classifier', 'convert <text> --dest=x': 'no known kind'},
    'calculate_metrics.py calc --images=<digits.zip> --ref=<others.pkl> --metrics=fd_pixels': {
        '--ref=none.pkl': 'no such file', '--ref=<evil.pkl>': 'evil.pkl',
        '--metrics=sfid --inception=none': 'has nothing for sfid', '--images=none.zip': 'does not exist',
        '--num=301': 'has only 300 images', '--num=0': 'too few to measure', '--class=12': "class '12' is not in",
        '--ref=<unlabelled.pkl> --metrics=recognition': 'unlabelled.pkl has no labels',
        '--images=<unlabelled.npz> --ref=<others.zip> --metrics=recognition': 'the images have no labels',
        '--ref-class=1': 'needs images as --ref', '--images=<small.npz>': 'of 48 and 192 dimensions',
        '--images=<one.npz>': 'at least 2 images', '--num=3 --metrics=precision_pixels': 'more than 3 images',
        '--images=<large.npz>': 'too many for the pixel metrics', '--metrics=fidd': "no metric 'fidd'"},
    'calculate_metrics.py calc --images=<digits.zip> --metrics=fd_pixels': {'': '--ref is missing'},
    'calculate_metrics.py ref --data=<digits.zip> --dest=x.pkl': {
        '--metrics=fid --inception=none.pth': 'none.pth: no such file',
        '--dest=x.txt --metrics=fd_pixels': 'must end in .pkl', '--metrics=is': 'needs no reference',
        '--metrics=,': 'no metrics given'},
    'calculate_metrics.py gen --ref=<others.pkl> --metrics=fd_pixels': {
        '': '--net: give a network, or a preset', '--net=none.pkl': 'none.pkl',
        '--net=<net.pkl> --num=0': 'nothing to generate',
        '--net=<net.pkl> --seeds=0-3 --seed=5': ('--seed=5', 'without --seeds'),
        '--net=<net.pkl> --sweep=guidance=1:4': '--dest: is needed', '--net=<net.pkl> --sweep=steps=1:4': ('--sweep', 'guidance='),
        '--net=<net.pkl> --sweep=guidance=1:4 --dest=x.json': 'needs a guiding network',
        '--net=<net.pkl> --sweep=interval-low=0:4': 'above 0', '--net=<net.pkl> --sweep=guidance=4:1': 'LO < HI',
        '--net=<net.pkl> --sweep=guidance=1:4 --dest=x.json --guidance=2': '--guidance has no meaning',
        '--net=<net.pkl> --sweep=guidance=1:4 --dest=x.json --metrics=ct_pixels': '--metrics=ct_pixels is neither',
        '--net=<net.pkl> --sweep-points=9': '--sweep-points has no meaning'},
    'calculate_metrics.py memorization --data=<digits.zip> --dest=m.json': {
        '': '--images', '--images=a --net=b': '--images', '--images=nowhere': 'nowhere',
        '--images=<plain.zip> --steps=3': '--steps', '--images=<plain.zip> --seeds=1': '--seeds',
        '--net=optimal:<digits.zip> --workers=3': '--workers', '--net=nowhere.pkl': 'nowhere.pkl',
        '--images=<plain.zip> --grid=/proc/x.png': '--grid=/proc/x.png cannot be written',
        '--net=optimal:nowhere.zip': 'nowhere.zip', '--net=optimal:<digits.zip> --num=0': '--num',
        '--net=optimal:<digits.zip> --class=eleven': 'eleven',
        '--images=<plain.zip> --data=<single.zip>': 'one image', '--images=<plain.zip> --data=nowhere.zip': 'nowhere.zip'},
    'mem_ratio.py': {'--expdir=<run> --log=/proc/x.json': '--log=/proc/x.json cannot be written',
        '--expdir=<run> --knn-ref=<digits.zip> --log=' + 248 * 'x': ('--log', 'name too long'), '--expdir=<empty>': 'network-snapshot', '--expdir=nowhere': 'nowhere'},
    'benchmarks/run.py': {'--only=nix': '--only=nix is unknown'},
    'data_utils/dataset_size.py --source=<cifar>/cifar-10-python.tar.gz --dest=out/x.zip': {
        '--max-images=125': ('--max-images=125', '10 classes'), '': '--max-images', '--max-images=10 --source=<plain.zip>': 'no classes'},
    'data_utils/dataset_tool.py --source=<cifar>/cifar-10-python.tar.gz --dest=out/x.zip': {
        '--max-images=55 --balanced': '--max-images=55', '--balanced': '--max-images'},
    'data_utils/dataset_diversity.py --source=<cifar>/cifar-10-python.tar.gz --dest=out/x.zip --max-images=10': {
        '--num-classes=11': '1..10', '--num-classes=0': '1..10'},
    'data_utils/dataset_unique.py --source=<cifar>/cifar-10-python.tar.gz --dest=out/x.zip': {
        '--max-images=0': '--max-images'},
    'data_utils/intra_diversity.py --source=<cifar>/cifar-10-python.tar.gz --dest=out/x.zip': {
        '--class-num=12': '--class-num=12', '--class-num=-1': '--class-num=-1',
        '--class-num=5 --max-images=13': '--max-images=13', '': '--class-num',
        '--class-num=5 --inter-rate=0.5': '--class-num', '--class-num=5 --inter-source=x': '--inter-rate',
        '--inter-rate=0.5 --inter-source=nowhere.zip': 'nowhere.zip',
        '--inter-rate=nan --inter-source=<cifar>/cifar-10-python.tar.gz': '--inter-rate',
        '--inter-rate=1.5 --inter-source=<cifar>/cifar-10-python.tar.gz': '1.5',
        '--inter-rate=0.5 --inter-source=<cifar>/cifar-10-python.tar.gz --max-images=250': '--inter-rate=0.5: 125'},
    'data_utils/sample_imagenet.py --dest=x.txt': {'--source=nowhere': '--source=', '--source=<empty>': 'no images'},
    'dataset_tool.py': {
        'inspect --source=<digits.zip> --json=/proc/x.json': '--json=/proc/x.json cannot be written',
        'inspect --source=nix': 'nix does not exist', 'decode --source=<digits.zip> --dest=x.zip': 'decode takes latents',
        'encode --source=<digits.zip> --dest=x.zip --model-url=./nix': 'no such folder'},
    'simulations/run_gaussian.py --outdir=out': {
        '--tag=K --values=0,3': ('--values', "'0,3'", 'whole numbers'), '--tag=K --values=3,3': '--values',
        '--tag=n --values=many': ('--values', "'many'"), '--tag=sim --values=0,1.5': ('--values', '0 to 1'),
        '--tag=K --sim=nan': '--sim', '--tag=sim --values=nan': ('--values', '0 to 1'),
        '--tag=K --K=3': ('--K', '--values'), '--tag=slope --n=3': ('--n', '--values'),
        '--tag=K --x=n': ('--x', '--tag=K'), '--tag=grid': ('--x', '--y'), '--tag=grid --x=K --y=K': ('--x', '--y'),
        '--tag=grid --x=K --y=n --values=3': ('--values', 'grid'), '--tag=grid --x=K --y=n --y-values=x': '--y-values',
        '--tag=grid --x=K --y=n --n=5': ('--n', '--y-values'), '--tag=K --seeds=3,3': '--seeds',
        '--tag=K --seeds=18446744073709551616': ('--seeds', '2^63'),
        '--tag=slope --values=100': ('--values', 'two or more'), '--tag=n --K=0': '--K', '--tag=K --n=0': '--n',
        '--tag=K --n=x': '--n', '--tag=K --sim=1.01': '--sim', '--tag=K --sim=high': '--sim', '--tag=K --dim=0': '--dim',
        '--tag=K --test-points=0': '--test-points', '--tag=K --seeds=a': '--seeds'},
    'simulations/digits_multi_source.py --outdir=out': {
        '--sources=1': '--sources', '--sources=3,11': ('--sources', 'to 10'), '--nums=20,20': ('--nums', 'once'),
        '--nums=1': ('--nums', '2 to 100'), '--nums=101': ('--nums', '2 to 100'), '--n=101': ('--n', '2 to 100'),
        '--triples=1': '--triples', '--share=0': '--share', '--lr=0': '--lr', '--most-steps=0': '--most-steps'},
    'data_utils/digits_memorization.py --outdir=out': {
        '--sizes=20': ('--sizes', 'at least two'), '--sizes=20,25': ('--sizes', '10,20,30'),
        '--factors=labels,depth': ('--factors', 'labels,classes'), '--kimg=0': '--kimg'},
    'distillation/digits_distillation.py --outdir=out': {
        '--rhos=0.1,0.1': ('--rhos', 'once'), '--rhos=0': ('--rhos', 'give shares'), '--rhos=x': '--rhos',
        '--samples=3': '--samples', '--teacher-steps=0': '--teacher-steps'},
    'long_tail/digits_long_tail.py --outdir=out': {
        '--methods=finetune': ('--methods', 'give plain and some of'), '--methods=all': '--methods',
        '--omegas=strong': '--omegas', '--omegas=0,nan': '--omegas', '--tau=nan': '--tau', '--samples=5': '--samples'},
    'synthetic_data/digits_synthetic_data.py --outdir=out': {
        '--seeds=1,1': ('--seeds', 'once'), '--real=170': ('--real', 'at most 154'), '--real=500': ('--real', 'only 178'),
        '--duration=0': '--duration', '--generator-duration=0': '--generator-duration', '--eps=2': '--eps',
        '--top-scale=0': '--top-scale', '--top-scale=nan': '--top-scale', '--reals=170': ('--reals', 'at most 154'),
        '--shares=0': '--shares', '--shares=nan': '--shares', '--numbers=501': '--numbers', '--generators=0': '--generators'},
    'long_tail/main.py': {
        '': '--train', '--eval --logdir=nowhere': 'nowhere'},
    'long_tail/main.py --train': {
        '--data_type=digitslt --img_size=8 --logdir=<text>': ('--logdir', 'is a file'),
        '--data_type=digitslt --img_size=8 --logdir=/proc/x': '--logdir=/proc/x cannot be written',
        '--data_type=digitslt --img_size=8 --conditional --finetune --finetuned_logdir=/proc/x': '--finetuned_logdir=/proc/x',
        '--learning_rate=1': '--learning_rate', '--flagfile=nowhere.txt': 'nowhere.txt', '--cb': '--conditional',
        '--cotrain': '--cotrain', '--ch=20': '--ch=20', '--attn=7': '--attn=7',
        '--img_size=12 --ch_mult=1,1,1,1': '--ch_mult', '--data_type=mnist': '--data_type', '--num_class=7': '--num_class',
        '--imb_factor=2 --data_type=cifar10lt': 'imb_factor', '--ddim_steps=2000': '--ddim_steps', '--beta_1=0.5': '--beta_1',
        '--beta_T=nan': '--beta_T', '--imb_factor=nan': '--imb_factor', '--num_class=nan': '--num_class',
        '--group_sizes=1,2': '--group_sizes', '--conditional --finetune': '--finetuned_logdir'},
    'long_tail/make_stats.py --data_type=digits': {'--split=test --dest=x.npz': '--split'},
    'synthetic_data/generate.py --outdir=out --class_num=3 --steps=2 --network=<edm.pkl> --seeds=0': {
        '--network=<edm-uncond.pkl>': 'unconditional', '--class_num=10': '3 classes', '--class=0,3': '--class=3',
        '--network=nowhere.pkl': 'nowhere.pkl', '--seeds=5-2': '--seeds'},
    'synthetic_data/combine_data.py --data_dir=<classes> --output_dir=out --file_name=all --class_num=3': {
        '--class_num=2': '2.npy is of class 2', '--class_num=4': '3.npy: no such file',
        '--data_dir=nowhere': 'no such folder', '--file_name=a/b': '--file_name'},
    'synthetic_data/select_1M.py --data_dir=<classes> --output_dir=out --model_path=<wrn> --class_num=3': {
        '--class_num=2': '2.npy is of class 2', '--class_num=4': '3.npy: no such file', '--top_scale=1.5': '--top_scale',
        '--top_scale=nan': '--top_scale', '--order=last': '--order', '--seed=-1': '--seed',
        '--file_name=a/b': '--file_name', '--model_path=<four>': 'of 4 classes, not of 3',
        '--model=wrn-16-1': 'not a wrn-16-1', '--model_path=nowhere.pt': 'nowhere.pt',
        '--model_path=<net.pkl>': 'no classifier'},
    'synthetic_data/train_classifier.py --outdir=out --data=<digits.zip> --model=wrn-10-1 --duration=192': {
        '--data=<plain.zip>': '--data', '--test=<plain.zip>': 'no labels', '--model=wrn-11-1': 'wrn-11-1',
        '--generated=nowhere.npz': 'nowhere.npz', '--test-attack-steps=0': '--test-attack-steps', '--eps=2': '--eps', '--eps=x/y': '--eps', '--batch=0': '--batch=0',
        '--momentum=nan': '--momentum', '--eps=nan': '--eps', '--precision=fp16': 'fp16 needs a GPU'},
    'synthetic_data/evaluate_data.py --outdir=out --data=<digits.zip> --test=<others.zip> --model=wrn-10-1 --duration=64': {
        '': '--generated', '--generated=<ten> --training=fast': '--training=fast', '--generated=nowhere': 'nowhere',
        '--generated=<ten> --seeds=1,1': '--seeds', '--selected=<classes>': '3.npy'},
}
# What another process is making already: {command line: what that one has claimed}.
CLAIMED = {
    'generate_images.py --net=<net.pkl> --outdir=out --seeds=0': 'out',
    'generate_images.py --net=<net.pkl> --grid=x.png --seeds=0': 'x.png',
    'mem_ratio.py --expdir=. --knn-ref=<digits.zip> --seeds=0 --subdirs': 'samples',
    'mem_ratio.py --expdir=. --knn-ref=<digits.zip> --seeds=0': 'mem_ratio.json',
    'calculate_metrics.py ref --data=<digits.zip> --dest=x.pkl --metrics=fd_pixels': 'x.pkl',
    'calculate_metrics.py calc --images=<digits.zip> --ref=<others.pkl> --metrics=fd_pixels --dest=x.json': 'x.json',
    'calculate_metrics.py gen --net=<net.pkl> --seeds=0 --ref=<others.pkl> --metrics=fd_pixels --dest=x.json': 'x.json',
    'calculate_metrics.py memorization --images=<plain.zip> --data=<digits.zip> --grid=x.png': 'x.png',
    'long_tail/make_stats.py --data_type=digits --detector=pixels --dest=x.npz': 'x.npz',
    'synthetic_data/generate.py --outdir=out --steps=2 --network=<edm.pkl> --seeds=0': 'out',
    'synthetic_data/combine_data.py --data_dir=<classes> --output_dir=. --file_name=all --class_num=3': 'all.npz',
    'synthetic_data/select_1M.py --data_dir=<classes> --output_dir=. --model_path=<wrn> --class_num=3': '1m.npz',
    'synthetic_data/train_classifier.py --outdir=out --data=<digits.zip> --model=wrn-10-1 --duration=192': 'out',
    'synthetic_data/evaluate_data.py --outdir=out --data=<digits.zip> --test=<others.zip> --model=wrn-10-1 --duration=64'
    ' --generated=<ten>': 'out',
    **{f'{script} --outdir=out': 'out' for script in (
        'simulations/digits_multi_source.py', 'data_utils/digits_memorization.py', 'long_tail/digits_long_tail.py',
        'distillation/digits_distillation.py', 'synthetic_data/digits_synthetic_data.py')},
}
# Files that commands write by name: {command line: them}.
WRITTEN = {
    'generate_images.py --net=<net.pkl> --seeds=0 --steps=1 --grid=x.png': ['x.png'],
    'dataset_tool.py inspect --source=<digits.zip> --dest=x.png --json=x.json': ['x.png', 'x.json'],
    'dataset_tool.py inspect --source=data': ['data-sheet.png'],
    'calculate_metrics.py ref --data=<digits.zip> --dest=x.pkl --metrics=fd_pixels': ['x.pkl'],
    'calculate_metrics.py ref --data=<digits.zip> --dest=x.npz --metrics=fd_pixels': ['x.npz'],
    'calculate_metrics.py calc --images=<digits.zip> --ref=<others.pkl> --metrics=fd_pixels --dest=x.json': ['x.json'],
    'calculate_metrics.py gen --net=<net.pkl> --num=9 --steps=1 --ref=<others.pkl> --metrics=fd_pixels --dest=x.json': ['x.json'],
    'calculate_metrics.py gen --net=<net.pkl> --gnet=<net.pkl> --num=9 --steps=1 --ref=<others.pkl> --metrics=fd_pixels'
    ' --sweep=guidance=1,2 --dest=x.json': ['x.json', 'x.png'],
    'calculate_metrics.py memorization --images=<plain.zip> --data=<digits.zip> --grid=x.png --dest=x.json': ['x.png', 'x.json'],
    'mem_ratio.py --expdir=<run> --knn-ref=<digits.zip> --seeds=0 --steps=1 --log=x.log': ['x.log', 'x.png', 'x-pairs.png'],
    'long_tail/make_stats.py --data_type=digits --detector=pixels --dest=x.npz': ['x.npz'],
    'simulations/toy_guidance.py --steps=1 --samples=8 --dest=x.png': ['x.png'],
    'synthetic_data/combine_data.py --data_dir=<classes> --output_dir=. --file_name=x --class_num=3': ['x.npz'],
    'synthetic_data/select_1M.py --data_dir=<classes> --output_dir=. --file_name=x --model_path=<wrn> --class_num=3':
        ['x.npz', 'x-report.json', 'x-confidence.png', 'x-best-worst.png'],
}
# What is noticed only when some of the work is done.
LATE = '--tag=slope --values=100'


def words_of(command, places):
    for name in Places.makers:
        if f'<{name}>' in command:
            command = command.replace(f'<{name}>', places[name])
    return shlex.split(command)


@pytest.mark.parametrize('command', CLAIMED, ids=[f'{" ".join(command.split()[:2])} {place}'
                                                  for command, place in CLAIMED.items()])
def test_one_command_at_a_time_writes_to_a_place(command, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if 'mem_ratio' in command:
        shutil.copy(places['net.pkl'], 'network-snapshot-0000001.pkl')
    place = CLAIMED[command]
    before = set(tmp_path.iterdir())
    with util.claimed_file(place) if '.' in place else runs.claimed(place, 'writing'):
        line = fails(*words_of(command, places))
        assert f'{place}: another process is ' in line, line
    assert set(tmp_path.iterdir()) - {tmp_path / place} == before


def write_mine(path):
    """A file of somebody else, of the kind that its name says."""
    match path.suffix:
        case '.png':
            PIL.Image.new('RGB', (8, 8)).save(path)
        case '.npz':
            np.savez(path, mine=np.arange(3))
        case '.pkl':
            path.write_bytes(pickle.dumps({'mine': 1}))
        case _:
            path.write_text('{"mine": 1}')
    return path.read_bytes()


@pytest.mark.parametrize('command', WRITTEN, ids=[' '.join([*command.split()[:2], *names]) for command, names in WRITTEN.items()])
def test_files_of_others_are_replaced_only_if_asked(command, places, tmp_path, monkeypatch):
    """Those that the same command wrote are, and empty ones."""
    monkeypatch.chdir(tmp_path)
    script, *args = words_of(command, places)
    if '--source=data' in args:
        write_digits('data', 20)
    for name in WRITTEN[command]:
        path = tmp_path / name
        mine = write_mine(path)
        line = fails(script, *args)
        assert name in line and 'is no ' in line, line
        assert path.read_bytes() == mine
        path.unlink()
    assert {path.name for path in tmp_path.iterdir()} <= {'data'}
    path.touch()
    invoke(script, *args)
    invoke(script, *args)
    for name in WRITTEN[command]:
        (tmp_path / name).unlink()
    mine = write_mine(path)
    invoke(script, *args, '--overwrite')
    assert path.read_bytes() != mine


@pytest.mark.parametrize('command', [command for command in WRITTEN if '=x.' in command and 'log' not in command])
def test_names_say_what_is_in_a_file(command, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(*words_of(command.replace('=x.', '=thesis.txt'), places))
    assert 'its name must end in .' in line and 'thesis.txt' in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize('command, words', [
    (f'{base} {rest}', words) for base, rows in MISTAKES.items() for rest, words in rows.items()],
    ids=[f'{base.split()[0]} {rest}' for base, rows in MISTAKES.items() for rest in rows])
def test_mistakes_end_in_one_line_and_make_nothing(command, words, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *args = words_of(command, places)
    line = fails(script, *args)
    assert all(word in line for word in ([words] if isinstance(words, str) else words)), line
    if not command.endswith(LATE):
        assert {path.name for path in tmp_path.rglob('*') if path.is_file()} <= {'study.json'}
