"""Learning-rate and EMA schedules against the golden tables."""

import functools
import re

import golden_cases
import numpy as np
import pytest

from training import schedules

CASES = golden_cases.cases('math', 'schedules*')


def _close(function, nimg, expected, *args):
    np.testing.assert_allclose([function(int(n), *args) for n in nimg], expected, rtol=1e-9)


def _grids(case):
    return range(len(case.json['grids']))


@pytest.mark.parametrize('case, index', golden_cases.variants('math', 'schedules*', _grids), ids=golden_cases.ids)
def test_edm2_and_multisource_learning_rates(case, index):
    grid, nimg = case.json['grids'][index], case.arrays['cur_nimg']
    args = dict(batch=grid['batch_size'], lr=grid['ref_lr'], decay=grid['ref_batches'], rampup_Mimg=grid['rampup_Mimg'])
    for name, rule in [('edm2', schedules.edm2_lr), ('multisource', schedules.multisource_lr)]:
        _close(functools.partial(rule, **args), nimg, case.arrays[f'{name}.{index}'])


@pytest.mark.parametrize('case', CASES, ids=str)
def test_warmup_and_anneal(case):
    args, a = case.json['arguments'], case.arrays
    for batch in (1, 128):
        _close(schedules.warmup_lr, a['warmup.step'] * batch, a['warmup.factor'], batch, 1.0, args['warmup'])
        # The table holds the rate that is set after the step, which the next one uses.
        _close(schedules.anneal_lr, (a['anneal.step'] + 1) * batch, a['anneal.lr'],
               batch, args['anneal_base_lr'], args['anneal_steps'])
    assert schedules.anneal_lr(0, 128, 1e-4, 10) == schedules.anneal_lr(128, 128, 1e-4, 10) == 1e-4
    assert schedules.anneal_lr(10**9, 128, 1e-4, 0) == 1e-4


@pytest.mark.parametrize('case', CASES, ids=str)
def test_edm_learning_rate_and_ema(case):
    args, a = case.json['arguments']['edm'], case.arrays
    nimg = a['edm.cur_nimg']
    _close(schedules.edm_lr, nimg, a['edm.lr'], args['batch'], args['lr'], args['lr_rampup_kimg'])
    for ratio, key in [(args['ema_rampup_ratio'], 'edm.ema_beta'), (None, 'edm.ema_beta_no_rampup')]:
        beta = schedules.memorization_beta('mode1', args['ema_halflife_kimg'], rampup_ratio=ratio)
        _close(beta, nimg, a[key], args['batch'])


def _rows(case):
    return range(len(case.json['memorization_scaling']))


@pytest.mark.parametrize('case, index', golden_cases.variants('math', 'schedules*', _rows), ids=golden_cases.ids)
def test_memorization_study_scales_with_the_data(case, index):
    row = case.json['memorization_scaling'][index]
    scaled = schedules.memorization_scaling(row['images'], row['duration'], row['ema'])
    assert scaled == {key: row[key] for key in scaled}
    _close(schedules.edm_lr, row['cur_nimg'], row['lr_factor'], 512, 1.0, scaled['lr_rampup_kimg'])
    modes = [re.fullmatch(r'(mode\d)(?:_final([\d.]+))?_batch(\d+)', key) for key in row]
    modes = [match for match in modes if match]
    assert {match[1] for match in modes} == set(schedules.EMA_MODES)
    for match in modes:
        beta = schedules.memorization_beta(match[1], scaled['ema_halflife_kimg'], scaled['data_ratio'],
                                           float(match[2] or 0.99929))
        _close(beta, row['cur_nimg'], row[match[0]], int(match[3]))
