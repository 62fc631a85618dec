"""The long-tail study in miniature: it runs to its end from the shell, goes on where it stopped, and compares what it says."""

import os
import subprocess
import sys

import click.testing
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, environment, script_module

from training.snapshot import read_state

SCRIPT = 'long_tail/digits_long_tail.py'
TINY = ['--steps=6', '--seeds=0,1', '--omegas=0,1.6', '--samples=200', '--ddim-steps=2', '--batch=8']


def invoke(*args):
    return click.testing.CliRunner().invoke(script_module(SCRIPT).command, [str(arg) for arg in args])


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """The shell script with few steps."""
    outdir = tmp_path_factory.mktemp('study') / 'out'
    result = subprocess.run(['bash', ROOT / 'bash_files' / 'study_long_tail.sh', f'--outdir={outdir}', *TINY, '--jobs=2'],
                            env=environment(PYTHON=sys.executable), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return outdir, result.stdout


@pytest.mark.slow
def test_what_it_writes(study):
    outdir, out = study
    assert 'fine-tuned' in out and 'recall, few' in out and 'no clear difference' in out
    results, classes = (pd.read_csv(outdir / name) for name in ('results.csv', 'classes.csv'))
    assert len(results) == 3 * 2 * 2 * 4 and set(results['group']) == {'all', 'many', 'medium', 'few'}
    assert len(classes) == 3 * 2 * 2 * 10
    few = classes[classes['class'] >= 7].groupby(['method', 'seed', 'omega'])['recall'].mean()
    ours = results[results['group'] == 'few'].set_index(['method', 'seed', 'omega'])['recall']
    np.testing.assert_allclose(ours.sort_index(), few.sort_index(), rtol=1e-4)
    effect = pd.read_csv(outdir / 'label-effect.csv')
    assert effect['plain'].tolist() == [1] * 5 and {'class-balancing', 'fine-tuned'} <= set(effect.columns)
    np.testing.assert_allclose(effect['theory'], 1 / (1 + 1.25 * effect['t/T']), rtol=1e-4)
    assert (outdir / 'study.png').stat().st_size > 20_000 and (outdir / 'study.svg').is_file()


@pytest.mark.slow
def test_all_methods_take_the_same_number_of_steps(study):
    outdir, _ = study
    taken = {}
    for method, last in (('plain', 5), ('cb', 5), ('finetune', 4)):
        state = read_state(str(outdir / 'models' / f'{method}-seed0' / f'ckpt_{last}.pt'))
        taken[method] = int(state['optim']['state'][0]['step'])
    before = int(read_state(str(outdir / 'models' / 'plain-seed0' / 'ckpt_3.pt'))['optim']['state'][0]['step'])
    assert taken['plain'] == taken['cb'] == before + taken['finetune'] == 6
    plain, cb = (read_state(str(outdir / 'models' / f'{method}-seed0' / 'ckpt_5.pt')) for method in ('plain', 'cb'))
    assert not torch.equal(plain['net_model']['head.weight'], cb['net_model']['head.weight'])


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(study):
    outdir, _ = study
    kept = outdir / 'models' / 'plain-seed0' / 'ckpt_5.pt'
    lost = outdir / 'models' / 'cb-seed1' / 'saved_5_cfg_omega0_ddim2.json'
    before, numbers = os.stat(kept).st_mtime_ns, (outdir / 'results.csv').read_bytes()
    os.remove(lost)
    result = invoke(f'--outdir={outdir}', *TINY, '--jobs=1')
    assert result.exit_code == 0, result.output
    assert os.stat(kept).st_mtime_ns == before and lost.is_file() and (outdir / 'results.csv').read_bytes() == numbers
    result = invoke(f'--outdir={outdir}', *TINY, '--steps=7')
    assert result.exit_code == 1 and '--steps (6 instead of 7)' in result.stderr


def test_the_verdict_needs_more_than_the_spread():
    module = script_module(SCRIPT)
    rows = [dict(method=method, seed=seed, omega=0.0, group='few', recognition=0.5 + shift + 0.05 * seed,
                 recall=0.5 + 2 * shift + 0.05 * seed, precision=0.5 - 2 * shift, fid=100 - 100 * shift)
            for method, shift in (('plain', 0.0), ('cb', 0.08)) for seed in range(3)]
    lines = module.verdict(pd.DataFrame(rows), {'plain': 0.0, 'cb': 0.0})
    assert [line.rsplit('  ', 1)[1] for line in lines] == [
        'no clear difference, though better in every seed', 'better', 'worse', 'better']


def test_recall_is_compared_at_equal_recognition():
    """A method that is plain with less guidance is no better; one with more recall all along is."""
    rows = [dict(method=method, seed=0, omega=omega, group='few', recognition=0.3 + 0.2 * (omega - shift),
                 recall=0.9 - 0.3 * (omega - shift) + gain)
            for method, shift, gain in (('plain', 0, 0), ('cb', 0.5, 0), ('finetune', 0.5, 0.1)) for omega in (0, 1, 2)]
    found = script_module(SCRIPT).matched(pd.DataFrame(rows))
    np.testing.assert_allclose(found.loc[['class-balancing', 'fine-tuned'], 0], [0, 0.1], atol=1e-9)


def test_the_guidance_of_each_method_is_its_best():
    rows = [dict(method=method, omega=omega, seed=0, group='all', fid=abs(omega - best))
            for method, best in (('plain', 0.8), ('cb', 1.6)) for omega in (0.0, 0.8, 1.6)]
    assert script_module(SCRIPT).best_omegas(pd.DataFrame(rows)) == {'plain': 0.8, 'cb': 1.6}


@pytest.mark.parametrize('option, message', [
    ('--methods=finetune', 'finetune starts from plain'), ('--methods=all', '--methods'), ('--omegas=strong', '--omegas'),
    ('--samples=5', '--samples')])
def test_bad_options(tmp_path, option, message):
    result = invoke(f'--outdir={tmp_path}/x', option)
    assert result.exit_code != 0 and message in result.stderr and not (tmp_path / 'x').exists()
