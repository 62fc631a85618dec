"""The page of runs: true curves, all that there is of a run, nothing that a hostile folder says run or leaked."""

import base64
import hashlib
import html.parser
import json
import math
import os
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
from helpers import fails, invoke

from dnnlib import pictures
from training.report import charts, folder, markup

CHROMIUM = shutil.which('chromium-headless-shell') or shutil.which('chromium') or shutil.which('google-chrome')
EVIL = '"><script>document.title="owned"</script><img src=x onerror=alert(1)>\' \u202e\x1b'


def write_run(path, lines=20, batch=32, grids=(1, 2), name='digits', total=None, **options):
    """The folder of a run, without training it: `lines` reports and grids after thousands of images."""
    path.mkdir(parents=True)
    rows = []
    for i in range(1, lines + 1):
        means = {'Loss/loss': 1 / i, 'Progress/lr': 0.01, 'LossAtSigma/0.1-0.3': 0.5 + 1 / i, 'LossAtSigma/1-3': 0.25,
                 'LossAtSigma/100-inf': 0.125, 'Timing/total_sec': float(i)}
        rows.append({'nimg': i * batch} | {key: {'mean': value, 'std': 0.0} for key, value in means.items()})
    (path / 'stats.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    record = {'batch': batch, 'total_nimg': total or lines * batch, 'seed': 7, 'dataset': {'name': name, 'size': 1797},
              'network': {'class_name': 'Precond'}, 'loss': {'name': 'edm2', 'P_mean': -0.4}, **options, 'starts': [
                  {'time': '2026-11-26T15:14:06+00:00', 'command': ['train.py', '--data=a b.zip'], 'nimg': at, 'processes': 2,
                   'device': 'cpu', 'torch': '2.13', 'changes': []} for at in (0, batch * lines // 2)]}
    (path / 'training_options.json').write_text(json.dumps(record))
    for number in grids:
        images = np.full((4, 3, 8, 8), 40 * number, np.uint8)
        pictures.save_image_grid(path / f'samples-{number:07d}.png', images, 2)
    return path


def page_of(tmp_path, *runs, **options):
    dest = tmp_path / 'page.html'
    invoke('report.py', *runs, f'--dest={dest}', *(f'--{key}={value}' for key, value in options.items()))
    return dest.read_text()


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and the texts of scripts and of all else."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.texts, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        (self.scripts if self.inside[-1:] == ['script'] else self.texts).append(data)

    def all(self, tag, **attributes):
        return [attrs for name, attrs in self.elements if name == tag and attributes.items() <= attrs.items()]


# What the page says


def test_a_run_is_told_with_all_that_its_folder_has(tmp_path):
    run = write_run(tmp_path / 'run', name='handwritten')
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(
        {'nimg': at, 'average': '0.050', 'fd_pixels': 30 - at / 64, 'fd_pixels_se': 1.0, 'heldout_by_sigma': {'0-0.01': 0.9, '0.1-0.3': 0.4}}) + '\n'
        for at in (320, 640)))
    (run / 'mem_ratio.json').write_text(json.dumps({'settings': {}, 'snapshots': [
        {'nimg': 640, 'ema': '0.050', 'memorization_ratio': 0.25, 'memorization_ratio_low': 0.125,
         'memorization_ratio_high': 0.375, 'num_images': 32}]}))
    (run / 'calc.json').write_text(json.dumps({'results': {'precision': 0.75}, 'num_images': 50}))
    (run / 'accuracy.json').write_text(json.dumps([{'nimg': 640, 'clean': 0.5}]))
    pictures.save_image_grid(run / 'mem_ratio-pairs.png', np.zeros((4, 3, 8, 8), np.uint8), 2)
    (run / 'log.txt').write_text('Data: handwritten, 1797 images\nnoise\n2026-11-26 15:14:06  Stopped at 320 images; the same\n')
    text = page_of(tmp_path, run)
    said = ' '.join(Reader(text).texts)
    for words in ('handwritten: 1,797 images', "python train.py '--data=a b.zip'", 'edm2, P_mean=-0.4', 'complete, 2,000 images',
                  '20 (18.04 to 21.96)', '0.25 (0.125 to 0.375)', '0.75', '0.5', 'Memorized samples', 'Stopped at 320 images',
                  'Loss by noise level', 'Heldout, average 0.050', '2026-11-26 15:14:06', '20s in training', 'first quarter'):
        assert words in said, words
    assert 'noise\n' not in said                               # progress lines are no events
    digest = hashlib.sha256((run / 'stats.jsonl').read_bytes()).hexdigest()
    assert digest in said and digest not in page_of(tmp_path, run, hashes=False)
    assert len(Reader(text).all('img')) == 3 and len(Reader(text).all('input', type='range')) == 1


def test_runs_side_by_side_say_what_differs(tmp_path):
    one = write_run(tmp_path / 'one', learning_rate={'name': 'edm2', 'lr': 0.01})
    two = write_run(tmp_path / 'two', learning_rate={'name': 'edm2', 'lr': 0.02}, total=6400, grids=(1,))
    text = page_of(tmp_path, one, two)
    said = re.sub('<[^>]*>', ' ', text)
    assert re.search(r'learning_rate\.lr\s+0\.01\s+0\.02', said) and 'not complete: 1,000 of 6,400 images (16%)' in said
    assert 'dataset.name' not in said                          # is the same
    loss, = (json.loads(chart['data-points']) for chart in Reader(text).all('figure', **{'class': 'chart'})[:1])
    assert [line['name'] for line in loss] == ['one', 'two'] and loss[1]['points'][0][2:] == [32, 1]
    assert json.loads(Reader(text).all('label')[0]['data-places']) == [1000, 2000]


@pytest.mark.parametrize('files', [{}, {'stats.jsonl': '{"nimg": 5, "Loss/lo'}, {'training_options.json': '[1, 2'},
                                   {'training_options.json': '{"dataset": 3, "starts": {"a": 1}, "loss": [], "batch": "x"}'},
                                   {'training_options.json': '{"network": ' + '{"a":' * 900 + '1' + '}' * 901},
                                   {'samples-0000001.png': 'no picture', 'log.txt': '\0\xff', 'a.json': 'NaN'}])
def test_what_is_damaged_or_not_there_yet_is_left_out(tmp_path, files):
    run = tmp_path / 'run'
    run.mkdir()
    for name, text in ({'training_options.json': '{}'} | files).items():
        (run / name).write_text(text)
    os.mkfifo(run / 'stats-2.jsonl')
    os.mkfifo(run / 'samples-0000009.png')
    (run / 'samples-0000002.png').symlink_to('/etc/passwd')
    text = page_of(tmp_path, run)
    assert '<h1>run</h1>' in text and '<img' not in text and 'a link, not followed' in text


def test_the_page_of_a_long_run_is_small(tmp_path):
    """Thousands of reports, and many noisy grids."""
    run = write_run(tmp_path / 'run', lines=4000, grids=())
    random = np.random.RandomState(0)
    for number in range(40):
        pixels = random.randint(0, 256, (200, 200, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(run / f'samples-{number:07d}.png')
    text = page_of(tmp_path, run, hashes=False)
    assert len(text) < 4 << 20 and len(Reader(text).all('img')) == 40


def test_folders_of_runs_and_earlier_reports(tmp_path):
    for name in ('00000-a', '00001-b'):
        write_run(tmp_path / 'runs' / name, grids=())
    invoke('report.py', tmp_path / 'runs')
    text = (tmp_path / 'runs' / 'report.html').read_text()
    assert '<h1>2 runs</h1>' in text and '00001-b' in text
    invoke('report.py', tmp_path / 'runs' / '00000-a')
    before = (tmp_path / 'runs' / '00000-a' / 'report.html').read_text()
    invoke('report.py', tmp_path / 'runs' / '00000-a')
    assert (tmp_path / 'runs' / '00000-a' / 'report.html').read_text() == before   # it is not about itself
    (tmp_path / 'mine.html').write_text('<p>')
    assert '--overwrite' in fails('report.py', tmp_path / 'runs', f'--dest={tmp_path}/mine.html')
    (tmp_path / 'none').mkdir()
    assert 'none has neither' in fails('report.py', tmp_path / 'none', f'--dest={tmp_path}/x.html')
    assert 'is no folder of a run' in fails('report.py', tmp_path / 'nowhere') and not (tmp_path / 'nowhere').exists()


# What it does not


def hostile(tmp_path):
    """A run whose every text is an attempt."""
    run = write_run(tmp_path / 'run<img src=x onerror=alert(1)>', name=EVIL, data=f'/home/me/secret/{EVIL}', preset=EVIL)
    record = json.loads((run / 'training_options.json').read_text())
    record['starts'].append({'time': EVIL, 'command': ['train.py', EVIL, '--data=/home/me/secret/x.zip'], 'nimg': 5,
                             'device': EVIL, 'changes': [EVIL], 'torch': EVIL, 'project': EVIL})
    record[EVIL] = {EVIL: EVIL}
    (run / 'training_options.json').write_text(json.dumps(record))
    with open(run / 'stats.jsonl', 'a') as file:
        file.write(json.dumps({'nimg': 700, f'Loss/{EVIL}': {'mean': 1}, f'{EVIL}/1-3': {'mean': 1}}) + '\n')
    (run / 'metrics.jsonl').write_text(json.dumps({'nimg': 1, EVIL: 0.5, 'ema_std': EVIL}) + '\n')
    (run / 'log.txt').write_text(f'Warning: {EVIL} in /home/me/secret/d.zip')
    (run / 'a"><svg onload=alert(1)>-pairs.png').write_bytes((run / 'samples-0000001.png').read_bytes())
    (run / '<b>.json').write_text(json.dumps({'results': {EVIL: 1}}))
    (run / 'study.json').write_text(json.dumps({EVIL: EVIL}))
    (run / 'table.csv').write_text(f'{EVIL}\n"{EVIL}"\n')
    return run


def test_nothing_that_a_folder_says_becomes_part_of_the_page(tmp_path):
    run = hostile(tmp_path)
    text = page_of(tmp_path, run, write_run(tmp_path / 'other'))
    reader = Reader(text)
    assert len(reader.all('script')) == 1 and len(reader.scripts) == 1
    assert {name for name, _ in reader.elements} <= set(
        'html head meta title style script body main header section p h1 h2 h3 dl dt dd pre div table thead tbody tr th td '
        'details summary figure figcaption b span ul li svg path line circle text img label input output'.split())
    for name, attributes in reader.elements:
        assert not any(key.startswith('on') or key in ('style', 'href') for key in attributes), name
        assert attributes.get('src', 'data:image/webp').startswith('data:image/webp')
    policy = reader.all('meta', **{'http-equiv': 'Content-Security-Policy'})[0]['content']
    digest = base64.b64encode(hashlib.sha256(reader.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy and 'unsafe' not in policy
    assert text.index('Content-Security-Policy') < text.index('<title>')
    assert '\u202e' not in text and '\x1b' not in text and 'secret' not in text and str(tmp_path) not in text


def test_markup_escapes_all_but_itself():
    assert markup.tag('p', '<b>', markup.tag('b', '&'), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;<b>&amp;</b></p>'


# Curves are true


def test_thinned_curves_keep_the_mean_and_the_range():
    points = [folder.Point(i, math.nan if i == 5 else (-1.0) ** i) for i in range(1000)]
    thin = charts.thinned(points, 100)
    assert len(thin) == 100 and all((point.low, point.high) == (-1, 1) for point in thin)
    assert thin[1].y == 0 and thin[0].y == pytest.approx(1 / 9)
    gap = charts.thinned([folder.Point(i, math.nan) for i in range(500)], 100)
    assert all(point.y != point.y for point in gap)


@pytest.mark.parametrize('values, is_log', [([0, 1], False), ([0.2, 0.3], False), ([1e-4, 1], True), ([5, 5], False), ([0], False),
                                            ([-3, 7e6], False), ([0.011, 0.5], True), ([1e-300, 1e300], True), ([1e9, 1e9 + 1], False)])
def test_ticks_stand_where_their_numbers_are(values, is_log):
    axis = charts.Axis(values, 0, 100, None)
    assert axis.is_log == is_log
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 8 and all(-0.01 <= at <= 100.01 for at, _ in ticks)
    if max(map(abs, values)) < 1e6:                            # else they are rounded
        for at, text in ticks:
            assert axis(float(text.replace(',', ''))) == pytest.approx(at, abs=0.5)


def test_numbers_that_cannot_be_drawn_are_gaps():
    for value in (math.inf, 1e308, 10**400, True, None, '1', [1]):
        assert folder.number(value) is None
    assert folder.number(-1e100) == -1e100
    points = [folder.Point(x, y) for x, y in enumerate((-1e149, 0, 1e149))]
    assert 'nan' not in charts.chart('t', [charts.Series('a', points)], 'x', 'y')


def test_what_is_called_an_interval_is_one():
    """The range of reports that were joined is a band, whatever the number of lines."""
    points = [folder.Point(x, x, x - 1, x + 1) for x in range(100)]
    for count, words in ((1, 'intervals of 95%'), (9, 'within their range')):
        figure = charts.chart('t', [charts.Series('a', points)] * count, 'x', 'y')
        assert words in figure and ('class="bar' in figure) == (count == 1)


def test_gaps_part_a_curve():
    points = [folder.Point(x, math.nan if x == 3 else x) for x in range(1, 7)]
    figure = charts.chart('t', [charts.Series('a', points)], 'x', 'y')
    assert len(re.findall(r'class="curve s0"', figure)) == 2
    assert charts.chart('t', [charts.Series('a', points[2:3])], 'x', 'y') is None


# In a browser


def in_browser(tmp_path, text, script, width=1300):
    """What the page's title is after a script of the test."""
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', '', text)
    (tmp_path / 'test.html').write_text(text + f'<script>addEventListener("load", () => {{ document.title = {script}; }})</script>')
    result = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},900', '--dump-dom',
                             f'file://{tmp_path}/test.html'], capture_output=True, text=True, timeout=120)
    return re.search('<title>(.*?)</title>', result.stdout, re.DOTALL)[1]


@pytest.mark.skipif(CHROMIUM is None, reason='there is no headless Chromium')
def test_the_page_in_a_browser(tmp_path):
    text = page_of(tmp_path, write_run(tmp_path / 'one'), write_run(tmp_path / 'two', grids=(2, 3)))
    wide = '(document.documentElement.scrollWidth <= innerWidth)'
    shown = '[...document.querySelectorAll(".shots figure")].filter(one => one.offsetHeight).map(one => one.dataset.at).join()'
    slide = f'(document.querySelector("input").value = 0, document.querySelector("input").dispatchEvent(new Event("input")), {shown})'
    tip = ('(document.querySelector(".chart svg").dispatchEvent(new PointerEvent("pointermove", {clientX: 600, clientY: 700})), '
           'document.querySelector(".chart .tip").textContent)')
    said = in_browser(tmp_path, text, f'[{wide}, {shown}, {slide}, {tip}].join(";")').split(';')
    assert said[:3] == ['true', '2000,3000', '1000,2000'] and re.search(r'training images.*one: .*two: ', said[3])
    assert in_browser(tmp_path, text, wide, 390) == 'true'
    picture = tmp_path / 'page.png'
    for scheme in (0, 1):                                      # dark, light
        subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=390,900', f'--screenshot={picture}',
                        f'--blink-settings=preferredColorScheme={scheme}', f'file://{tmp_path}/page.html'],
                       check=True, capture_output=True, timeout=120)
        with PIL.Image.open(picture) as image:
            pixels = np.asarray(image.convert('L'))
        assert (pixels[0, 0] > 128) == bool(scheme) and np.ptp(pixels) > 200


@pytest.mark.skipif(CHROMIUM is None, reason='there is no headless Chromium')
def test_a_hostile_folder_runs_no_script(tmp_path):
    page_of(tmp_path, hostile(tmp_path))
    result = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom', f'file://{tmp_path}/page.html'],
                            capture_output=True, text=True, timeout=120)
    assert 'class="js"' in result.stdout and '<title>owned' not in result.stdout
