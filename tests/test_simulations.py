"""Claims of simulations/: the paper's numbers, the theory, the tables and the figures."""

import csv
import math
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import golden_cases
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import scipy.stats
import torch
from click.testing import CliRunner

import studies
from benchmarks import bench_gaussian
from simulations import gaussian, plane, plotting, run_gaussian, tables, toy_guidance
from training.diffusion.samplers import sample

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = dict(K='--K', n='--n', sim='--sim', D='--dim', test_points='--test-points')


def join(values) -> str:
    return ','.join(str(value) for value in values)


def run(outdir, *args, code=0):
    """Runs run_gaussian.py in this process and returns its stdout and stderr."""
    result = CliRunner().invoke(run_gaussian.main, [f'--outdir={outdir}', *args])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def plot(tag, outdir, *args, code=0):
    result = CliRunner().invoke(plotting.command(tag), [f'--outdir={outdir}', *args])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def text_rows(path) -> list[dict]:
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def seeds_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f'{path.stem}-seeds.csv')


def assert_one_line_error(result, *words):
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith('Error: '), result.stderr
    assert 'Traceback' not in result.output
    for word in words:
        assert word in lines[-1], lines[-1]


# The paper's tables


@pytest.mark.parametrize('case', golden_cases.cases('math', 'gaussian_*'), ids=golden_cases.ids)
def test_published_tables(case, tmp_path):
    """Every column of every published table, through the command line, to 1e-6 relative."""
    arguments = dict(case.json['arguments'])
    args = [f'--seeds={join(arguments.pop("seeds"))}']
    varied = [name for name, value in arguments.items() if isinstance(value, list)]
    assert len(varied) == 1
    args += [f'--tag={varied[0]}', f'--values={join(arguments.pop(varied[0]))}']
    args += [f'{OPTIONS[name]}={value}' for name, value in arguments.items()]
    run(tmp_path, *args)
    table = text_rows(tables.newest(tmp_path, varied[0]))
    assert case.json['files']
    for file in case.json['files']:
        published = text_rows(case.path.with_name(file))
        assert len(published) == len(table)
        for name in case.json['columns']:
            ours, theirs = ([float(r[name]) for r in rows] for rows in (table, published))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12, err_msg=name)


def test_what_a_killed_command_was_writing_is_removed(tmp_path):
    (tmp_path / 'K').mkdir()
    (tmp_path / 'K' / '.gaussian_K-20260101-000000-000000.csv.01234567.tmp').touch()
    run(tmp_path, '--tag=K', '--values=1', '--test-points=20')
    assert sorted(path.name[:12] for path in (tmp_path / 'K').iterdir()) == ['gaussian_K-2'] * 2


def test_published_digits(tmp_path):
    """The file of --tag=K has the paper's columns in the paper's order, and its numbers."""
    run(tmp_path, '--tag=K')
    ours = text_rows(tables.newest(tmp_path, 'K'))
    theirs = text_rows(pathlib.Path(__file__).parent / 'golden' / 'math' / 'gaussian_K.csv')
    assert [list(r) for r in ours] == [list(r) for r in theirs]
    np.testing.assert_allclose([[float(v) for v in r.values()] for r in ours],
                               [[float(v) for v in r.values()] for r in theirs], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize('tag', ['K', 'n', 'sim'])
def test_defaults_are_the_papers_settings(tag, tmp_path):
    run(tmp_path, f'--tag={tag}')
    path = tables.newest(tmp_path, tag)
    table, seeds = text_rows(path), text_rows(seeds_file(path))
    values = dict(K=['1', '3', '5', '10', '15'], n=['100', '300', '500', '1000', '5000'],
                  sim=['0.0', '0.3', '0.5', '0.7', '1.0'])[tag]
    assert [r[tag] for r in table] == values
    assert [(r[tag], r['seed']) for r in seeds] == [(v, s) for v in values for s in ('3', '33', '520', '2025', '25731')]
    assert list(table[0])[:2] == [tag, 'seed'] and list(table[0])[5:] == list(tables.MEASURES)
    fixed = {name: value for name, value in dict(K=5, D=10, sim=0.5, n=500).items() if name != tag}
    assert {name: float(table[0][name]) for name in fixed} == fixed
    for name in tables.MEASURED:
        means = np.array([float(r[name]) for r in seeds]).reshape(5, 5).mean(axis=1)
        np.testing.assert_allclose([float(r[name]) for r in table], means, rtol=1e-12)


@pytest.mark.parametrize('K,D,sim,n,seed', [
    (5, 10, 0.5, 500, 3), (1, 10, 0.5, 100, 33), (4, 3, 0.0, 60, 520), (4, 3, 1.0, 60, 2025), (6, 7, 0.29, 45, 1)])
def test_equals_one_distribution_per_point(K, D, sim, n, seed):
    """Also where blocks are so small that torch draws normal numbers one by one."""
    setting = gaussian.Setting(K=K, D=D, sim=sim, n=n)
    plain = bench_gaussian.plain_simulate(setting, seed, test_points=80)
    _, errors, _ = gaussian.simulate(setting, [9, seed, 8], test_points=80)
    np.testing.assert_allclose(errors, plain, rtol=2e-7)


# The theory


def test_bounds():
    """sqrt(K D / n) and sqrt(((K-1)(D - int(sim D)) + D) / n); 0.29 of 100 is 28.999... in floating point."""
    assert gaussian.Setting(K=3, D=10, sim=0.5, n=500).bounds() == (math.sqrt(30 / 500), math.sqrt(20 / 500))
    assert gaussian.Setting(K=5, D=100, sim=0.29, n=1000).bounds()[1] == math.sqrt((4 * 72 + 100) / 1000)
    for setting in (gaussian.Setting(K=1, D=10, sim=0.7, n=90), gaussian.Setting(K=7, D=10, sim=0.0, n=90)):
        assert setting.bounds()[0] == setting.bounds()[1]


def test_error_is_the_total_variation_distance():
    """TV(N(m, I), N(m + d, I)) = 2 Phi(|d|/2) - 1; the empirical value approaches it with many test points."""
    setting = gaussian.Setting(K=3, D=6, sim=0.5, n=1)
    means = setting.means()
    shift = torch.tensor([0.3, 1.0])[:, None, None] * torch.nn.functional.normalize(torch.ones(6), dim=0)
    test_set = gaussian.draw(means, 400_000, [torch.Generator().manual_seed(1)])
    errors = gaussian.total_variation((means + shift)[:, None], means, *test_set)
    np.testing.assert_allclose(errors[:, 0], 2 * scipy.stats.norm.cdf([0.15, 0.5]) - 1, rtol=0.01)


def test_error_is_finite_in_many_dimensions():
    """In 500 dimensions every density is 0 in float32, but the ratio of two is not."""
    [(single, multi)] = gaussian.simulate(gaussian.Setting(K=2, D=500, sim=0.5, n=10_000), [0], test_points=100)
    assert 0.05 < multi < single < 0.2


def test_error_falls_as_one_over_root_n(tmp_path):
    """Slope of log(error) against log(n) within 0.03 of -1/2 with 200 seeds, and errors of the size theory says.

    For large n the error of a source is E|d| / sqrt(2 pi), d ~ N(0, K/n I): E|d| = sqrt(2 K/n) G((D+1)/2) / G(D/2).
    """
    result = run(tmp_path, '--tag=slope')
    path = tables.newest(tmp_path, 'slope')
    rows = tables.load(seeds_file(path))
    assert len(rows) == 200 * 5
    for name in (tables.ERROR_SINGLE, tables.ERROR_MULTI):
        slope, interval = tables.slope(rows, name)
        assert abs(slope + 0.5) <= 0.03 and interval < 0.02
        assert f'{slope:.4f}' in result.stdout
    last = tables.load(path).iloc[-1]
    distance = math.sqrt(2 * 5 / 16000) * math.gamma(5.5) / math.gamma(5)
    expected = distance / math.sqrt(2 * math.pi)
    assert abs(last[tables.ERROR_SINGLE] - expected) < 2 * last[studies.interval_column(tables.ERROR_SINGLE)]


def test_wrong_slope_is_an_error(tmp_path):
    """With as many samples as unknowns the error does not follow the rate, and the check says so."""
    result = run(tmp_path, '--tag=slope', '--values=2,4,8', '--K=1', '--dim=200', '--seeds=0-9', code=1)
    assert_one_line_error(result, 'slope', '--values')


def test_slope_of_a_power_law():
    rows = [dict(seed=s, n=n, e=(1 + s) * n ** -0.25) for s in range(3) for n in (10, 100, 1000)]
    rows += [dict(seed=9, n=n, e=math.nan) for n in (10, 100, 1000)]
    slope, interval = tables.slope(pd.DataFrame(rows), 'e')
    assert slope == pytest.approx(-0.25) and interval == pytest.approx(0, abs=1e-12)


# Many seeds


def test_intervals_of_many_seeds(tmp_path):
    """More seeds than the paper's add Student-t intervals; its five give its columns only."""
    run(tmp_path, '--tag=K', '--values=3', '--seeds=0-19', '--test-points=50')
    path = tables.newest(tmp_path, 'K')
    line = tables.load(path).iloc[0]
    rows = tables.load(seeds_file(path))
    assert line['seeds'] == 20 and line['seed'] == 9.5
    for name in tables.MEASURED:
        values = rows[name]
        low, high = scipy.stats.t.interval(0.95, 19, values.mean(), values.sem())
        assert line[studies.interval_column(name)] == pytest.approx((high - low) / 2)
    run(tmp_path, '--tag=K', '--values=3', '--seeds=0-4', '--test-points=50')
    assert set(tables.load(tables.newest(tmp_path, 'K'))) == set(tables.columns([]))


def test_seeds_are_independent_of_order_batch_and_processes(monkeypatch):
    settings = [gaussian.Setting(K=3, D=10, sim=0.5, n=n) for n in (50, 90)]
    seeds = list(range(30))
    before = torch.random.get_rng_state()
    alone = [gaussian.simulate(setting, [seed], 20)[0] for setting in settings for seed in seeds]
    monkeypatch.setattr(gaussian, 'BATCH_NUMBERS', 7 * 90 * 10)
    shared = gaussian.simulate_many(settings, seeds[::-1], 20, workers=2)
    np.testing.assert_allclose(shared[29::-1] + shared[:29:-1], alone, rtol=2e-7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_source_without_samples(tmp_path):
    """Its mean cannot be estimated: an empty cell, a warning, and an average over the other seeds."""
    result = run(tmp_path, '--tag=n', '--values=2,12,200', '--seeds=0-39', '--test-points=50')
    path = tables.newest(tmp_path, 'n')
    rows = text_rows(seeds_file(path))
    cells = {n: [r[tables.ERROR_SINGLE] for r in rows if r['n'] == n] for n in ('2', '12', '200')}
    assert set(cells['2']) == {''} and '' not in cells['200']
    defined = [float(cell) for cell in cells['12'] if cell]
    assert 0 < len(defined) < 40
    table = text_rows(path)
    assert table[0][tables.ERROR_SINGLE] == '' and table[0]['seeds'] == '0'
    assert float(table[1][tables.ERROR_SINGLE]) == pytest.approx(np.mean(defined))
    assert int(table[1]['seeds']) == len(defined)
    assert f'{80 - len(defined)} of 120 simulations' in result.stderr
    plot('n', tmp_path)


# Options


def test_help_needs_neither_tables_nor_torch():
    code = ("import sys; from simulations import run_gaussian; "
            "sys.exit(bool({'matplotlib', 'pandas', 'torch'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    assert_one_line_error(run(tmp_path / 'file', '--tag=K', code=1), '--outdir')


# Figures


def assert_pictures(path: pathlib.Path):
    """Both pictures are there and show something."""
    picture = np.array(PIL.Image.open(path.with_suffix('.png')).convert('L'))
    assert min(picture.shape) > 500 and 0.01 < (picture < 250).mean() < 0.9
    svg = xml.etree.ElementTree.parse(path.with_suffix('.svg')).getroot()
    assert svg.tag.endswith('svg') and len(list(svg.iter())) > 50


@pytest.mark.parametrize('tag,args', [
    ('K', ['--seeds=7']), ('n', ['--values=50,100']), ('sim', ['--seeds=0-6']),
    ('slope', ['--values=100,1000', '--seeds=0-19']),
    ('grid', ['--x=sim', '--y=n', '--y-values=3,50']), ('grid', ['--x=n', '--y=K', '--x-values=90', '--seeds=0-6'])])
def test_figures(tag, args, tmp_path):
    run(tmp_path, f'--tag={tag}', *args, '--test-points=20')
    result = plot(tag, tmp_path)
    path = tables.newest(tmp_path, tag)
    assert result.stdout.split() == [str(path.with_suffix('.png')), str(path.with_suffix('.svg'))]
    assert_pictures(path)
    assert not [f for f in path.parent.iterdir() if f.name.startswith('.')]


@pytest.mark.parametrize('tag,varied', [('K', 'K'), ('n', 'n'), ('sim', 'sim')])
def test_figure_1_shows_errors_left_and_bounds_right(tag, varied, tmp_path):
    run(tmp_path, f'--tag={tag}', '--test-points=50')
    path = tables.newest(tmp_path, tag)
    rows = tables.load(path)
    figure = plotting.draw(tag, rows, tables.load(seeds_file(path)))
    left, right = figure.axes
    for axis, names in ((left, (tables.ERROR_SINGLE, tables.ERROR_MULTI)),
                        (right, (tables.BOUND_SINGLE, tables.BOUND_MULTI))):
        drawn = [line.get_xydata() for line in axis.lines]
        for name in names:
            curve = rows[[varied, name]].to_numpy()
            assert any(d.shape == curve.shape and np.allclose(d, curve) for d in drawn), name
    plotting.studies.plt.close(figure)


def test_grid_shows_the_advantage(tmp_path):
    run(tmp_path, '--tag=grid', '--x=K', '--y=sim', '--x-values=2,4', '--y-values=0,0.5,1', '--seeds=1,2')
    path = tables.newest(tmp_path, 'grid')
    rows = tables.load(path)
    assert rows[['K', 'sim']].to_numpy().tolist() == [[K, sim] for K in (2, 4) for sim in (0, 0.5, 1)]
    figure = plotting.draw('grid', rows, tables.load(seeds_file(path)))
    for axis, name in zip(figure.axes, (tables.ERROR_ADVANTAGE, tables.BOUND_ADVANTAGE), strict=False):
        shown = axis.images[0].get_array()
        np.testing.assert_allclose(shown, rows[name].to_numpy().reshape(2, 3).T)
    plotting.studies.plt.close(figure)


def test_newest_result_is_drawn_always_the_same(tmp_path):
    for values in ('1,2', '3,4'):
        run(tmp_path, '--tag=K', f'--values={values}', '--test-points=20')
    assert tables.load(tables.newest(tmp_path, 'K'))['K'].tolist() == [3, 4]
    paths = [pathlib.Path(path) for path in plot('K', tmp_path).stdout.split()]
    assert paths[0] == tables.newest(tmp_path, 'K').with_suffix('.png')
    before = [path.read_bytes() for path in paths]
    plot('K', tmp_path)
    assert [path.read_bytes() for path in paths] == before


def test_plots_name_what_is_wrong(tmp_path):
    assert_one_line_error(plot('sim', tmp_path, code=1), 'python simulations/run_gaussian.py --tag=sim')
    run(tmp_path, '--tag=K', '--values=1,2', '--test-points=20')
    table = tables.newest(tmp_path, 'K')
    assert_one_line_error(plot('n', tmp_path, f'--result={table}', code=1), '--result', '--tag=n')
    bad = tmp_path / 'bad.csv'
    for content in (b'', b'K,seed\n1,2\n', b'K\nfive\n', b'\xff\xfe\x00', b'K\n1,2,3\n'):
        bad.write_bytes(content)
        assert_one_line_error(plot('K', tmp_path, f'--result={bad}', code=1), 'bad.csv')
    assert_one_line_error(plot('K', tmp_path, f'--result={tmp_path}/none.csv', code=1), 'none.csv')
    run(tmp_path, '--tag=slope', '--values=500,2000', '--seeds=0-19')
    seeds_file(tables.newest(tmp_path, 'slope')).unlink()
    assert_one_line_error(plot('slope', tmp_path, code=1), '-seeds.csv')


def test_scripts_run_headless_from_any_folder(tmp_path):
    """The lines of the README, each in a process of its own, without a display."""
    env = {key: value for key, value in os.environ.items() if key not in ('DISPLAY', 'MPLBACKEND', 'PYTHONPATH')}
    for script, args in (('run_gaussian', ['--tag=K', '--values=2,3']), ('plot_gaussian_K', [])):
        done = subprocess.run([sys.executable, str(ROOT / 'simulations' / f'{script}.py'), *args,
                               '--results_dir=results'], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert_pictures(tables.newest(tmp_path / 'results', 'K'))
    for tag in ('K', 'n', 'sim', 'grid', 'slope'):
        assert f"plotting.command('{tag}')" in (ROOT / 'simulations' / f'plot_gaussian_{tag}.py').read_text()


# --- The toy of guidance ----------------------------------------------------------------------------------------------


class _Exact:
    """The exact denoiser of a density of the toy: x + sigma^2 times the gradient of ln p."""

    sigma_min, sigma_max, label_dim = 0.0, math.inf, 0

    def __init__(self, data):
        self.data = data

    def __call__(self, x, sigma, labels=None):
        with torch.enable_grad():
            points = x.flatten(1).double().requires_grad_()
            log_density = self.data.log_density(points, float(sigma)).sum()
            score = torch.autograd.grad(log_density, points)[0]
        return (points.detach() + float(sigma) ** 2 * score).reshape(x.shape)


def test_the_exact_denoiser_of_the_toy_gives_its_density():
    data = plane.branches()
    points, labels = data.draw(4000, torch.Generator().manual_seed(0))
    assert abs(float(points.std()) - plane.SIGMA_DATA) < 0.02 and set(labels.tolist()) == {0, 1}
    data = data.of(1)
    points, labels = data.draw(4000, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {1}
    floor = float(data.log_density(points).quantile(0.001))
    noise = torch.randn([1000, 2, 1, 1], generator=torch.Generator().manual_seed(1))
    samples = sample(_Exact(data), noise, name='edm2', sigma_max=5).flatten(1)
    row, expected = (toy_guidance.measure(data, x, floor) for x in (samples, points[:1000]))
    assert row['outliers'] < 0.02
    assert row['ln p'] == pytest.approx(expected['ln p'], abs=0.1)
    assert row['coverage'] == pytest.approx(expected['coverage'], abs=0.05)


def test_the_toy_draws_and_measures_every_way_of_guidance(tmp_path):
    result = CliRunner().invoke(toy_guidance.main, [
        '--steps=60', '--batch=256', '--width=16', '--samples=200', f'--dest={tmp_path}/toy.png'])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in (
        'data', 'no guidance', 'classifier-free', 'autoguidance', 'stretched'))
    with PIL.Image.open(tmp_path / 'toy.png') as picture:
        assert picture.width > 3 * picture.height
