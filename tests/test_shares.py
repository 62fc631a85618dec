"""What is said of few images: intervals of shares, notes beside distances and scores; JSON that others read."""

import json
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import fails, invoke, write_digits

from dnnlib import pictures, util
from metrics import compute
from metrics.detectors import PROTOCOLS
from metrics.shares import Share, interval_of, percent, with_intervals
from metrics.statistics import Gaussian, Statistics
from synthetic_data.class_files import Record
from training import runs
from training.diffusion.samplers import choose_setting, plain_setting
from training.generate import OutputFolder


@pytest.mark.parametrize('hits, num', [(0, 32), (32, 32), (1, 2), (3, 10000), (5000, 10000)])
def test_the_interval_is_wilsons(hits, num):
    share = Share(hits / num, num)
    theirs = scipy.stats.binomtest(hits, num).proportion_ci(method='wilson')
    assert share.interval == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert share == hits / num and pickle.loads(pickle.dumps(share)).interval == share.interval


def test_intervals_stand_beside_the_values():
    values = {'all': {'recall': Share(0.0, 32), 'fid': 3.0}, 'classes': [{'recall': Share(1.0, 4)}]}
    shown = json.loads(util.to_json(with_intervals(values)))
    assert shown['all'] == {'recall': 0, 'recall_low': 0, 'recall_high': pytest.approx(0.1072, abs=1e-4), 'fid': 3}
    assert shown['classes'][0]['recall_low'] == pytest.approx(0.5101, abs=1e-4)
    assert interval_of(values['all']['recall']) == '  (95%: 0 to 0.107)' and interval_of(3.0) == ''
    assert percent(shown['all'], 'recall') == '0.00% (0.00% to 10.72%)' and percent({'clean': 0.5}, 'clean') == '50.00%'


def test_measures_of_few_images_say_so(tmp_path):
    few, many = (Statistics('x.pkl', {'fid': Gaussian(np.zeros(8), np.eye(8), num)}) for num in (8, 9))
    detectors = type('D', (), dict(loaded=[], rules=PROTOCOLS['edm'], protocol='edm', description=lambda self: {}))()
    assert compute.notes(many, many, detectors) == []
    line, = compute.notes(few, many, detectors)
    assert 'fid: 8 images for 8 dimensions: the covariance has rank 7 at most' in line
    assert 'x.pkl: 8 images' in compute.notes(many, few, detectors)[0]
    for num, protocol, least in ((5, 'cbdm', 1), (5001, 'edm', 1), (9999, 'cbdm', 999)):
        rules = PROTOCOLS[protocol]
        line, = compute.score_note(Statistics(features={rules.probs: torch.zeros(num, 2)}), rules)
        assert f'a part of {num} images has {least}' in line
    for num, protocol in ((50000, 'cbdm'), (50000, 'edm')):
        rules = PROTOCOLS[protocol]
        assert compute.score_note(Statistics(features={rules.probs: torch.zeros(num, 2)}), rules) == []
    with pytest.raises(util.UserError, match='one image means nothing'):
        compute.score(Statistics(features={rules.probs: torch.ones(1, 2)}), None, None, rules)


def test_memorization_and_recognition_are_reported_with_intervals(tmp_path):
    data = write_digits(tmp_path / 'd.zip', 100)
    out = invoke('calculate_metrics.py', 'memorization', f'--images={data}', f'--data={data}', '--num=32', f'--dest={tmp_path}/m.json')
    assert 'memorization_ratio  1.0000  (95%: 0.893 to 1)' in out
    assert json.loads((tmp_path / 'm.json').read_text())['results']['memorization_ratio_low'] == pytest.approx(0.8928, abs=1e-3)
    out = invoke('calculate_metrics.py', 'calc', f'--images={data}', f'--ref={data}', '--num=40', f'--dest={tmp_path}/c.json',
                 '--metrics=fd_pixels,precision_pixels,recall_pixels,recognition')
    found = json.loads((tmp_path / 'c.json').read_text())
    assert found['results']['recall_pixels_high'] - found['results']['recall_pixels_low'] > \
        found['results']['precision_pixels_high'] - found['results']['precision_pixels_low']  # both are of 40 images
    assert 'recognition_low' in found['results'] and 'fd_pixels_low' in found['results']
    assert 'rank 39 at most' in out and 'rank 99 at most' in out and len(found['notes']) == 2


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_has_neither_nan_nor_infinity(tmp_path):
    value = {'a': [1, math.inf, (math.nan, 0.5)], 'b': {'c': -math.inf, 'd': 'inf', 'e': True}, 'f': np.float64('nan')}
    util.write_json(tmp_path / 'x.json', value)
    text = (tmp_path / 'x.json').read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        'a': [1, None, [None, 0.5]], 'b': {'c': None, 'd': 'inf', 'e': True}, 'f': None}


def test_a_loss_that_is_no_number_is_drawn_as_a_gap(tmp_path):
    rows = [{'nimg': 1000 * i, 'Loss/loss': {'mean': loss, 'std': 0.0}} for i, loss in enumerate((1.0, math.nan, 2.0))]
    for name, dump in (('new', util.to_json), ('earlier', json.dumps)):
        (tmp_path / 'stats.jsonl').write_text(''.join(dump(row) + '\n' for row in rows))
        pictures.save_loss_curve(tmp_path / 'stats.jsonl', tmp_path / f'{name}.png')
    assert (tmp_path / 'new.png').read_bytes() == (tmp_path / 'earlier.png').read_bytes()


def test_the_axis_of_a_classifiers_accuracy_is_not_that_of_its_loss(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, 'save_figure', lambda figure, *_: figures.append(figure))
    row = {'nimg': 1000, 'Loss/loss': {'mean': 2.0}}
    for more in ({}, {'Loss/accuracy': {'mean': 0.9}}):
        (tmp_path / 'stats.jsonl').write_text(json.dumps(row | more))
        pictures.save_loss_curve(tmp_path / 'stats.jsonl', 'loss.png')
    labels = [[(axes.get_ylabel(), [line.get_ydata()[0] for line in axes.lines]) for axes in figure.axes]
              for figure in figures]
    loss = ('training loss (mean since the last report)', [2.0])
    assert labels == [[loss], [loss, ('accuracy on training images', [0.9])]]


def test_settings_of_samplers_are_numbers_and_earlier_records_are_read(tmp_path):
    setting = {'name': 'edm', 'num_steps': 18, 'rho': 7.5, 'S_max': math.inf, 'clip': None, 'own': True}
    plain = {'name': 'edm', 'num_steps': 18, 'rho': 7.5, 'S_max': None, 'clip': None, 'own': True}
    assert plain_setting(setting) == plain_setting({key: str(value) for key, value in setting.items()}) == plain
    complete = choose_setting(None, {'name': 'edm', 'S_max': None}, {})
    assert complete['S_max'] == math.inf                       # of the JSON beside safetensors
    for name, s_max in (('text', 'inf'), ('infinite', math.inf), ('null', None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'dataset.json').write_text(json.dumps({'labels': None, 'generated_by': {'sampler': setting | {'S_max': s_max}}}))
        OutputFolder(str(folder), False, {'sampler': plain_setting(setting)}, {})
        assert json.loads((folder / 'dataset.json').read_text())['generated_by'] == {'sampler': plain}
    with pytest.raises(util.UserError, match='made with other options'):
        OutputFolder(str(folder), False, {'sampler': plain | {'rho': 7}}, {})
    (tmp_path / '0.json').write_text('{"seeds": "0", "made_by": {"S_max": Infinity}}')
    assert Record.load(str(tmp_path / '0.json')).made_by == {'S_max': None}


def test_a_run_with_an_infinite_setting_is_found_again(tmp_path):
    for name, dump in (('00000-a', json.dumps), ('00001-b', util.to_json)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'training_options.json').write_text(dump({'clip': math.inf}))
        assert runs.choose_folder(str(tmp_path), name[6:], {'clip': math.inf}, 10, False, False) == str(tmp_path / name)


def test_one_image_has_no_distance(tmp_path):
    data = write_digits(tmp_path / 'd.zip', 10)
    assert 'at least 2 images' in fails('calculate_metrics.py', 'calc', f'--images={data}', f'--ref={data}', '--num=1',
                                        '--metrics=fd_pixels')
