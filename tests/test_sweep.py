"""Searches for the best value of one setting: widths of averages after training, strengths and intervals of guidance."""

import json
import math
import re

import helpers
import numpy as np
import pytest
import torch
from helpers import fails, invoke, script_module
from test_generate import make_net

from dnnlib import UserError
from metrics import sweep
from metrics.shares import Estimate
from metrics.sweep import Span, Sweep
from training.ema import Averages, power
from training.encoders import RGBEncoder
from training.snapshot import load_snapshot, save_snapshot, snapshot_name


def searched(path, function, values, most=10, name='std', metric='fid', **settings):
    """A sweep of a function that was run, and the values that it was asked for."""
    asked = []

    def measure(value):
        asked.append(value)
        return {metric: function(value)}

    found = Sweep(str(path), name, metric, settings, measure, {})
    found.run(values, most)
    return found, asked


def bowl(value):
    return 3 + math.log(value / 0.093) ** 2


# --- A made function ------------------------------------------------------------------------------


def test_a_known_minimum_is_found_in_few_evaluations(tmp_path):
    found, asked = searched(tmp_path / 'a.json', bowl, Span(0.02, 0.25))
    assert len(asked) == len(set(asked)) <= 10 and abs(found.best['value'] - 0.093) <= 0.003
    assert asked[:4] == [0.02, 0.25, 0.052, 0.095]             # the ends, and the golden section of their logarithms
    lines = found.report()
    assert len([line for line in lines if line.startswith('  *')]) == 1 and 'Best: std' in lines[-1]
    assert (tmp_path / 'a.png').stat().st_size > 5000
    found, asked = searched(tmp_path / 'a.json', bowl, Span(0.02, 0.25), 30)
    assert found.best['value'] == 0.093 and len(found.points) < 20  # ends where three digits tell no more apart
    assert searched(tmp_path / 'b.json', bowl, Span(0.02, 0.25), 4)[1] == [0.02, 0.25, 0.052, 0.095]


def test_where_more_is_better_the_maximum_is_found(tmp_path):
    found, _ = searched(tmp_path / 'a.json', lambda x: 1 - (x - 2.2) ** 2, Span(1, 4), 12, 'guidance', 'recall')
    assert abs(found.best['value'] - 2.2) < 0.1


def test_a_minimum_at_an_end_is_said_and_the_record_goes_on_beyond_it(tmp_path):
    found, _ = searched(tmp_path / 'a.json', bowl, Span(0.12, 0.25), 6)
    said = found.report()[-1]
    assert found.best['value'] == 0.12 and 'lower end' in said
    low, high = map(float, re.search(r'range ([\d.]+)\.\.([\d.]+),', said).groups())
    assert low < 0.093 < high
    found, asked = searched(tmp_path / 'a.json', bowl, Span(low, high))
    assert abs(found.best['value'] - 0.093) < 0.004 and 0.12 not in asked and 'end of' not in found.report()[-1]
    found, _ = searched(tmp_path / 'b.json', lambda x: x, Span(1, 4), 5, 'guidance')
    assert 'lower end of what was measured, and of what makes sense' in found.report()[-1]
    found, _ = searched(tmp_path / 'c.json', lambda x: Estimate(x, 0.01, [x] * 9 + [2]), [2, 2.001, 9], name='guidance')
    assert 'Not told apart from it' in found.report()[-2] and '2.001' not in found.report()[-2]  # equal after rounding


def test_differences_are_paired(tmp_path):
    """Each number has a large error, which all have in common."""
    noise = np.random.default_rng(0).standard_normal(50)
    found, _ = searched(tmp_path / 'a.json', lambda x: Estimate.of_images(x, x + noise + 0.01 * x * np.cos(9 * noise)),
                        [1, 1.001, 1.1, 2], name='interval-low')
    lines = found.report()
    assert 'by 95% of the paired differences): none' in lines[-2] and 'It is the lower end' in lines[-1]
    assert 'paired' not in lines[0] and re.search(r' 2 +2 +\(1.7\d+ to 2.2\d+\)  \+1  \(95%: 0.9\d+ to 1', '\n'.join(lines))


def test_a_stopped_sweep_goes_on_and_measures_nothing_twice(tmp_path):
    whole, values = searched(tmp_path / 'whole.json', bowl, Span(0.02, 0.25))
    asked = []

    def breaks(value):
        if len(asked) in (1, 6) and asked[-1] != value and not (stopped and stopped[-1] == value):
            stopped.append(value)
            raise KeyboardInterrupt
        asked.append(value)
        return bowl(value)

    stopped = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / 'stopped.json', breaks, Span(0.02, 0.25))
    again, _ = searched(tmp_path / 'stopped.json', breaks, Span(0.02, 0.25))
    assert asked == values and again.report() == whole.report()
    records = [json.loads((tmp_path / name).read_text()) for name in ('whole.json', 'stopped.json')]
    assert records[0] == records[1] and records[0]['best'] == whole.best['value']


def test_a_value_without_a_number_is_not_the_best(tmp_path):
    def half(value):
        return math.nan if value < 0.06 else bowl(value)
    for _ in range(2):                                         # from memory, and from the file
        found, _ = searched(tmp_path / 'a.json', half, [0.02, 0.05, 0.2])
        assert found.best['value'] == 0.2 and 'nan' in ''.join(found.report())


def test_other_settings_have_another_record(tmp_path):
    searched(tmp_path / 'a.json', bowl, [0.1], seed=0)
    with pytest.raises(UserError, match='another seed'):
        searched(tmp_path / 'a.json', bowl, [0.1], seed=1)
    with pytest.raises(UserError, match='neither better'):
        searched(tmp_path / 'b.json', bowl, [0.1], metric='ct')


def test_ranges_and_values():
    assert sweep.parse_values('1..4') == sweep.parse_values('1:4') == Span(1, 4)
    assert sweep.parse_values('2,1,2') == [1, 2]
    assert sweep.parse_sweep('interval_low=0.1:2') == ('interval-low', Span(0.1, 2))
    for text in ('4:1', '1..inf', 'x', '1:2:3'):
        with pytest.raises(ValueError):
            sweep.parse_values(text)


# --- Networks -------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A run whose network drifts about one point, and digits."""
    folder = tmp_path_factory.mktemp('sweeps')
    net = make_net(0)
    emas = Averages(net, power([0.05, 0.10]))
    random = torch.Generator().manual_seed(0)
    for step in range(16):
        with torch.no_grad():
            for value in net.parameters():
                value.mul_(0.98).add_(0.03 * torch.randn(value.shape, generator=random))
        emas.update(net, step * 1024, 1024)
        if step % 4 == 3:
            for ema, suffix, std in emas.get(net):
                (folder / 'run').mkdir(exist_ok=True)
                save_snapshot(folder / 'run' / snapshot_name((step + 1) * 1024, suffix), ema, encoder=RGBEncoder(),
                              dataset={'name': 'none', 'label_dim': 0}, recipe={}, nimg=(step + 1) * 1024, ema_std=std)
    helpers.write_digits(folder / 'digits.zip', 40, labels=False)
    helpers.write_digits(folder / 'heldout.zip', 20, labels=False, first=200)
    return folder


def points(path) -> dict:
    return {point['value']: point['results'] for point in json.loads(path.read_text())['points']}


def test_the_best_width_is_written_and_is_what_was_measured(folder, tmp_path):
    base = ('sweep', f'--indir={folder}/run', '--stds=0.03..0.2', '--sweep-points=5', '--metric=fd_pixels',
            f'--ref={folder}/digits.zip', '--num=24', '--steps=2')
    out = invoke('reconstruct_phema.py', *base)
    record = folder / 'run' / 'sweep-fd_pixels.json'
    measured = points(record)
    best = json.loads(record.read_text())['best']
    assert len(measured) == 5 and best == min(measured, key=lambda std: measured[std]['fd_pixels'])
    path = folder / 'run' / f'phema-0000016-{best:.3f}.pkl'
    assert out.rstrip().endswith(str(path)) and load_snapshot(str(path)).ema_std == best
    assert 'fd_pixels_low' in measured[best] and (folder / 'run' / 'sweep-fd_pixels.png').exists()
    invoke('calculate_metrics.py', 'gen', f'--net={path}', f'--ref={folder}/digits.zip', '--num=24', '--steps=2',
           '--metrics=fd_pixels', f'--dest={tmp_path}/gen.json')
    assert json.loads((tmp_path / 'gen.json').read_text())['results']['fd_pixels'] == measured[best]['fd_pixels']
    again = invoke('reconstruct_phema.py', *base)              # the best beside the snapshots changes nothing
    assert 'std 0.03:' in out and 'std 0.03:' not in again and out.endswith(again)
    assert '--dest' in fails('reconstruct_phema.py', *base, '--seed=5')
    other = (*base, '--stds=0.05', f'--dest={tmp_path}/s.json')
    for option in ('--seed=5', '--num=12', '--steps=3', '--instd=0.05', '--outkimg=12'):
        assert '--dest' not in invoke('reconstruct_phema.py', *other, option, '--outprefix=other', f'--outdir={tmp_path}')
        (value,) = points(tmp_path / 's.json').values()
        assert value['fd_pixels'] != measured.get(0.05, {}).get('fd_pixels')
        (tmp_path / 's.json').unlink()
    assert sorted(path.name for path in tmp_path.glob('other-*')) == ['other-0000012-0.050.pkl', 'other-0000016-0.050.pkl']


def test_the_width_by_the_held_out_loss_on_one_and_two_processes(folder, tmp_path):
    base = ('sweep', f'--indir={folder}/run', '--stds=0.04,0.1', '--metric=heldout', f'--heldout={folder}/heldout.zip')
    invoke('reconstruct_phema.py', *base, f'--outdir={tmp_path}/one')
    helpers.run('reconstruct_phema.py', *base, f'--outdir={tmp_path}/two', processes=2)
    one, two = (points(tmp_path / name / 'sweep-heldout.json') for name in ('one', 'two'))
    assert list(one) == [0.04, 0.1] and one == two
    (path,) = (tmp_path / 'two').glob('phema-*.pkl')
    best = min(one, key=lambda std: one[std]['heldout'])
    assert path.name == f'phema-0000016-{best:.3f}.pkl'
    invoke('calculate_metrics.py', 'heldout', f'--net={path}', f'--data={folder}/heldout.zip', f'--dest={tmp_path}/h.json')
    results = json.loads((tmp_path / 'h.json').read_text())['results']
    assert results['heldout'] == pytest.approx(one[best]['heldout'], rel=1e-12)
    assert results['heldout_se'] == pytest.approx(one[best]['heldout_se'], rel=1e-6)
    assert '--steps' in fails('reconstruct_phema.py', *base, '--steps=3')


def test_the_guidance_of_a_sweep_is_that_of_single_calls(folder, tmp_path, monkeypatch):
    nets = sorted((folder / 'run').glob('network-snapshot-*-0.050.pkl'))
    base = ('gen', f'--net={nets[-1]}', f'--gnet={nets[0]}', f'--ref={folder}/digits.zip', '--num=16', '--steps=3',
            '--metrics=fd_pixels,vendi_pixels')
    dest = tmp_path / 'g.json'
    out = invoke('calculate_metrics.py', *base, '--sweep=guidance=1,2', f'--dest={dest}')
    assert 'covariance has rank' in out and (tmp_path / 'g.png').exists()
    module = script_module('calculate_metrics.py')
    count = []
    plain = module.measure
    monkeypatch.setattr(module, 'measure', lambda *args, **kwargs: count.append(1) or plain(*args, **kwargs))
    out = invoke('calculate_metrics.py', *base, '--sweep=guidance=1:4', '--sweep-points=5', f'--dest={dest}')
    assert len(count) == 5 - 1 and 'Best: guidance' in out     # 1 was measured
    measured = points(dest)
    assert len(measured) == 6 and all({'fd_pixels', 'vendi_pixels'} <= set(row) for row in measured.values())
    single = tmp_path / 'single.json'
    invoke('calculate_metrics.py', *base, '--guidance=2', f'--dest={single}')
    assert json.loads(single.read_text())['results'] == measured[2]
    assert 'paired' in invoke('calculate_metrics.py', 'compare', single, dest)
    dest = tmp_path / 'i.json'
    invoke('calculate_metrics.py', *base, '--guidance=2', '--guidance-interval=0.01,5', '--sweep=interval-high=0.5,5',
           f'--dest={dest}')
    invoke('calculate_metrics.py', *base, '--guidance=2', '--guidance-interval=0.01,0.5', f'--dest={single}')
    measured = points(dest)
    assert measured[5] != measured[0.5] == json.loads(single.read_text())['results']
    for name, more in (('low', ()), ('high', ('--guidance-interval=0.1,9',))):
        assert '--dest' in fails('calculate_metrics.py', *base, *more, '--guidance=2', f'--sweep=interval-{name}=1,2', f'--dest={dest}')
