"""The data flow of distillation without data: traced golden runs, the invariants, resuming, files, shares."""

import json
import resource
import struct
import subprocess
import sys

import conftest
import golden_cases
import numpy as np
import pytest
import torch

from distillation import cache as cache_file
from distillation.cache import Cache, cache_size, load_cache, open_cache, write_cache
from distillation.dkdm import (
    SOURCES,
    DynamicSource,
    IterativeSource,
    Preparation,
    ProcessRandom,
    ShuffledSource,
    Teacher,
)
from dnnlib import UserError
from training.diffusion.gaussian import GaussianDiffusion
from training.diffusion.losses import DKDMLoss
from training.diffusion.samplers import sample
from training.networks import build_network
from training.recipe import Recipe, fit
from training.snapshot import load_snapshot

# --- Golden traces ----------------------------------------------------------------------------------------------------


class _GoldenNet(torch.nn.Module):
    """eps = tanh(x) (a + t/T) + b c[:3]; variance channels d tanh(x reversed) - t/T + b c[3:], as `words` say."""

    def __init__(self, words, schedule, num_steps, image_shape, clip):
        super().__init__()
        self.clip = clip
        self.img_channels, self.img_resolution, _ = self.image_shape = tuple(image_shape)
        self.label_dim = 0
        self.diffusion = GaussianDiffusion(schedule, num_steps)
        self.a = golden_cases.number_in(words, r'tanh\(x\)\*\(', r' \+ t/T')
        self.d = golden_cases.number_in(words, 'variance channels = ', r'\*tanh')
        c = golden_cases.number_in(words, r'\+ ', r'\*c\[') * golden_cases.array_in(words)
        self.c = torch.from_numpy(c.astype(np.float32)).reshape(1, -1, 1, 1)

    def forward(self, x, step, class_labels):
        share = (step.float() / self.diffusion.num_steps).reshape(-1, 1, 1, 1)
        shift, variance_shift = self.c.chunk(2, dim=1)
        return torch.cat([x.tanh() * (self.a + share) + shift,
                          self.d * x.flip(1).tanh() - share + variance_shift], dim=1)


def _golden(case):
    arguments = case.json['arguments']
    schedule = arguments['schedule'].partition(',')[0]
    net = _GoldenNet(case.json['teacher'], schedule, arguments['T'], arguments['image'], arguments['clip_denoised'])
    teacher = Teacher(net)
    assert cache_size(arguments['rho'], arguments['T'], arguments['batch']) == arguments['cache_size']
    return arguments, teacher


@pytest.mark.parametrize('case', golden_cases.cases('math', 'dkdm_dataflow*'), ids=str)
def test_preparation(case):
    arguments, teacher = _golden(case)
    draws = ProcessRandom(*golden_cases.seeds_in(case.json['seeds']['prepare']))
    run = Preparation(teacher, arguments['cache_size'], draws, arguments['teacher_batch'])
    np.testing.assert_array_equal(run.targets, case.arrays['prepare.t_end'])
    cache = run.run()
    assert run.remaining == 0
    np.testing.assert_array_equal(cache.levels, case.arrays['prepare.total_t'])
    np.testing.assert_allclose(cache.x, case.arrays['prepare.total_x'], rtol=1e-4, atol=1e-6)


def _golden_source(case, variant):
    arguments, teacher = _golden(case)
    draws = ProcessRandom(*golden_cases.seeds_in(case.json['seeds']['each variant']))
    cls = SOURCES[f'{variant}_distillation' if variant == 'iterative' else f'{variant}_iterative_distillation']
    if cls is IterativeSource:
        return cls(teacher, arguments['batch'], draws, arguments['prob'])
    cache = Cache(case.tensor('prepare.total_x').clone(), case.tensor('prepare.total_t').clone())
    return cls(teacher, cache, arguments['batch'], draws, arguments['prob'])


def _variants(case):
    return sorted({key.split('.')[0] for key in case.arrays} - {'prepare'})


@pytest.mark.parametrize('case, variant', golden_cases.variants('math', 'dkdm_dataflow*', _variants),
                         ids=golden_cases.ids)
def test_trace(case, variant):
    source = _golden_source(case, variant)
    trace, levels = [], None
    for _ in range(case.json['arguments']['traced_steps']):
        levels = source.cache.levels.clone() if hasattr(source, 'cache') else None
        trace.append(next(source))
    values = {
        't': [b['t'] for b in trace], 'indices': [b.get('positions') for b in trace],
        'x_t_first': [b['images'] for b in trace], 'x_tm1_first': [b['previous'] for b in trace],
        'x_t_sum': [b['images'].double().sum([1, 2, 3]) for b in trace], 'cache_t_after': levels}
    for key, ref in case.arrays.items():
        if key.startswith(variant + '.'):
            value = values[key.removeprefix(variant + '.').rstrip('0123456789')]
            value = torch.stack(value[:len(ref)]) if isinstance(value, list) else value
            if np.issubdtype(ref.dtype, np.integer):
                np.testing.assert_array_equal(value, ref)
            else:
                np.testing.assert_allclose(value, ref, rtol=1e-4, atol=1e-4)


# --- Rules ------------------------------------------------------------------------------------------------------------


def _teacher(T=10, dropout=0.0, clip=True, num_classes=0):
    torch.manual_seed(0)
    network = dict(class_name='ADMUNet', image_size=4, num_channels=32, num_res_blocks=1, channel_mult='1',
                   attention_resolutions='2', learn_sigma=True, dropout=dropout,
                   class_cond=num_classes > 0, num_classes=num_classes)
    net = build_network('DiscreteDenoiser', network=network, diffusion=dict(schedule='cosine', steps=T), clip=clip)
    for parameter in net.parameters():                                  # a new network's output is zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Teacher(net)


def _prepared(teacher, size=12, seed=0):
    return Preparation(teacher, size, ProcessRandom(seed), teacher_batch=5).run()


def test_sizes_of_the_paper():
    assert cache_size(0.4, 1000, 128) == 51200
    assert cache_size(0.22, 20, 3) == 12


@pytest.mark.parametrize('prob', [1.0, 0.4])
def test_dynamic_invariants(prob):
    teacher = _teacher()
    cache = _prepared(teacher)
    assert cache.levels.min() >= 1 and cache.levels.max() <= 9
    source = DynamicSource(teacher, cache, 4, ProcessRandom(1), prob)
    seen = cache.levels.clone()
    for _ in range(80):
        before = cache.x.clone()
        batch = next(source)
        positions, t = batch['positions'], batch['t']
        assert len(set(positions.tolist())) == 4
        assert t.min() >= 0 and t.max() <= 9
        if prob == 1:
            expected = torch.where(seen[positions] == 0, 10, seen[positions]) - 1
            assert torch.equal(t, expected)
            kept = seen[positions] > 0
            assert torch.equal(batch['images'][kept], before[positions[kept]])
        assert torch.equal(cache.x[positions], batch['previous'])
        seen[positions] = t
        assert torch.equal(cache.levels, seen)


def test_shuffled_advances_the_first_images_of_the_cache():
    teacher = _teacher()
    cache = _prepared(teacher)
    source = ShuffledSource(teacher, cache, 4, ProcessRandom(1))
    first = next(source)
    assert torch.equal(first['t'], cache.levels[:4] - 1)
    assert torch.equal(next(source)['images'][first['t'] > 0], first['previous'][first['t'] > 0])


def test_processes_work_equally_long():
    teacher = _teacher()
    runs = [Preparation(teacher, 12, ProcessRandom(seed), 5) for seed in range(3)]
    before = [run.targets.clone() for run in runs]
    least = min(run.remaining for run in runs)
    for run, targets in zip(runs, before, strict=True):
        run.equalize(least)
        assert run.remaining == least
        assert (run.targets >= targets).all() and run.targets.max() <= 9


@pytest.mark.parametrize('num_classes', [0, 5])
@pytest.mark.parametrize('kind', ['dynamic', 'shuffled', 'iterative'])
def test_resumes_exactly(kind, num_classes, tmp_path):
    teacher = _teacher(num_classes=num_classes)

    def source(seed):
        if kind == 'iterative':
            return IterativeSource(teacher, 4, ProcessRandom(seed), 0.7)
        cls = DynamicSource if kind == 'dynamic' else ShuffledSource
        return cls(teacher, _prepared(teacher, seed=seed), 4, ProcessRandom(seed), 0.7)

    a = source(1)
    for _ in range(7):
        next(a)
    torch.save(a.state_dict(), tmp_path / 'state.pt')
    b = source(2)
    b.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True, mmap=True))
    for _ in range(15):
        x, y = next(a), next(b)
        assert torch.equal(x['images'], y['images']) and torch.equal(x['t'], y['t'])
        assert x['labels'] is y['labels'] is None if num_classes == 0 else torch.equal(x['labels'], y['labels'])


def test_every_image_has_a_class_that_teacher_and_student_see():
    """All classes are drawn, a chain stays with its own, and outputs are those of these labels."""
    teacher = _teacher(clip=False, num_classes=5)
    assert len(set(_prepared(teacher, size=200).classes.tolist())) == 5
    cache = _prepared(teacher)
    classes, drawn = cache.classes.clone(), set()
    source = DynamicSource(teacher, cache, 4, ProcessRandom(1))
    objective = DKDMLoss(teacher.diffusion, teacher)
    seen = []

    def student(x, step, class_labels):
        seen.append(class_labels)
        return teacher.net(x, step=step, class_labels=class_labels)
    for _ in range(40):
        batch = next(source)
        found, new = batch['labels'].argmax(1), batch['t'] == 9
        assert (batch['labels'].sum(1) == 1).all() and torch.equal(found, cache.classes[batch['positions']])
        assert torch.equal(found[~new], classes[batch['positions']][~new])
        drawn |= set(found[new].tolist())
        classes = cache.classes.clone()
        with torch.no_grad():                                            # as the teacher is called: the same to the bit
            expected = teacher.net(batch['images'], step=teacher.diffusion.model_steps(batch['t']), class_labels=batch['labels'])
        assert torch.equal(batch['teacher'], expected)
    assert drawn == set(range(5))
    loss, _ = objective(student, batch | {'random': ProcessRandom(0)})
    assert loss.abs().max() < 1e-5 and torch.equal(seen[0], batch['labels'])
    iterative = IterativeSource(teacher, 4, ProcessRandom(0))
    chains = [[next(iterative)['labels'] for _ in range(10)] for _ in range(2)]
    assert all(torch.equal(labels, chain[0]) for chain in chains for labels in chain)
    assert not torch.equal(chains[0][0], chains[1][0])


def test_preparation_resumes_exactly(tmp_path):
    teacher = _teacher()
    whole = _prepared(teacher)
    run = Preparation(teacher, 12, ProcessRandom(0), 5)
    for _ in range(6):
        run.advance()
    torch.save(run.state_dict(), tmp_path / 'state.pt')
    other = Preparation(teacher, 12, ProcessRandom(9), 5)
    other.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    cache = other.run()
    assert torch.equal(cache.x, whole.x) and torch.equal(cache.levels, whole.levels)


def test_the_loop_gets_parts_of_batches():
    teacher = _teacher()
    wholes = DynamicSource(teacher, _prepared(teacher), 4, ProcessRandom(1))
    parts = DynamicSource(teacher, _prepared(teacher), 4, ProcessRandom(1)).iterate([(0, 3), (3, 1), (8, 3), (11, 1)])
    for _ in range(2):
        whole, first, second = next(wholes), next(parts), next(parts)
        assert torch.equal(whole['images'], torch.cat([first['images'], second['images']]))
        assert torch.equal(whole['t'], torch.cat([first['t'], second['t']]))
    assert second['random'].count == 1
    with pytest.raises(ValueError, match='parts of 3'):
        list(DynamicSource(teacher, _prepared(teacher), 4, ProcessRandom(1)).iterate([(0, 3), (3, 3)]))


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('classes', [None, True])
def test_a_cache_file_holds_the_shares_of_all_processes(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, 'READ_ROWS', 3)                        # many pieces
    path, part = str(tmp_path / 'x.cache'), str(tmp_path / 'part')
    shares = [Cache(torch.randn([7, 3, 4, 4]), torch.arange(7) + 10 * rank, classes and torch.arange(7) + rank)
              for rank in range(3)]
    write_cache(part, [shares[1]], {})
    write_cache(path, [shares[0], open_cache(part)[0], shares[2]], {'rho': 0.4, 'teacher': {'class_name': 'ADMUNet'}})
    for rank, share in enumerate(shares):
        cache = load_cache(path, rank, 7, {'rho': 0.4, 'teacher': {'class_name': 'ADMUNet'}})
        assert torch.equal(cache.x, share.x) and torch.equal(cache.levels, share.levels)
        assert cache.classes is None if classes is None else torch.equal(cache.classes, share.classes)
    with pytest.raises(UserError, match='another rho .0.4 instead of 0.3'):
        load_cache(path, 0, 7, {'rho': 0.3})
    with pytest.raises(UserError, match='holds 21 images, and process 2 needs those up to 24'):
        load_cache(path, 2, 8, {})
    shares[1].x[5, 0, 0, 0] = torch.nan
    write_cache(path, shares, {})
    assert len(load_cache(path, 0, 7, {})) == 7
    with pytest.raises(UserError, match='x.cache: image 12 has values that are not finite'):
        load_cache(path, 1, 7, {})


def test_caches_of_earlier_versions_noted_the_batch_of_a_process(tmp_path):
    path = str(tmp_path / 'x.cache')
    share = Cache(torch.zeros([7, 3, 4, 4]), torch.ones(7, dtype=torch.int64))
    write_cache(path, [share] * 4, {'batch_size': 64, 'processes': 4, 'images of a process': 7})
    assert open_cache(path)[1] == {'batch_size': 256, 'processes': 4}
    assert len(load_cache(path, 1, 14, {'batch_size': 256})) == 14  # by two processes


def test_a_cache_file_is_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    cache = Cache(torch.randn([5, 1, 8, 8]), torch.arange(5))
    write_cache(str(tmp_path / 'x.cache'), [cache], {'steps': 10})
    tensors = safetensors.load_file(tmp_path / 'x.cache')
    assert torch.equal(tensors['x'], cache.x) and torch.equal(tensors['levels'], cache.levels)
    with safetensors.safe_open(tmp_path / 'x.cache', 'pt') as f:
        assert json.loads(f.metadata()['steps']) == 10


def test_a_cache_that_finds_the_disk_full_says_so(tmp_path):
    """NumPy's own writing would say how many values it wrote."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        with pytest.raises(UserError, match='x.cache cannot be written .File too large'):
            write_cache(str(tmp_path / 'x.cache'), [Cache(torch.zeros([99, 3, 8, 8]), torch.arange(99))], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def _header(header, length=None):
    header = json.dumps(header).encode()
    return struct.pack('<Q', len(header) if length is None else length) + header


def _cache_header(shape, end, levels_end):
    return _header({'__metadata__': {}, 'x': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, end]},
                    'levels': {'dtype': 'I64', 'shape': shape[:1], 'data_offsets': [end, levels_end]}})


@pytest.mark.parametrize('content', [
    b'', b'\x80\x02}.', b'PK\x03\x04' + bytes(60), _header({}), _header([1]), _header({'x': 1}, 1 << 60),
    _cache_header([9, 3, 4, 4], 1728, 1800), _cache_header([-1, 3, -4, 4], 192, 184) + bytes(184),
    _cache_header([1, 1, 2, 1], 8, 8) + bytes(8), _cache_header([2, 2], 16, 32) + bytes(32),
    _header({'y': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}) + bytes(8)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / 'foreign'
    path.write_bytes(content)
    with pytest.raises(UserError, match='foreign is not a cache'):
        load_cache(str(path), 0, 1, {})


def test_a_cache_is_in_memory_once(tmp_path):
    """Load, train a step, checkpoint and restore a cache of 100 MB: the peak stays below one and a half of it."""
    script = f"""
import resource, sys, torch
sys.path.insert(0, {str(conftest.ROOT)!r})
from distillation.dkdm import *
from distillation.cache import *
from training.diffusion.gaussian import GaussianDiffusion
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
class Zero:
    diffusion = GaussianDiffusion('cosine', 10)
    num_classes = 0
    image_shape = [3, 32, 32]
    def advance(self, images, draws):
        images.levels = images.levels - 1
        return {{}}
size = 8533
path, state = {str(tmp_path / 'x.cache')!r}, {str(tmp_path / 'state.pt')!r}
base = peak()
cache = Cache(torch.zeros([size, 3, 32, 32]), torch.ones([size], dtype=torch.int64))
write_cache(path, [cache], {{}})
del cache
cache = load_cache(path, 0, size, {{}})
source = DynamicSource(Zero(), cache, 8, ProcessRandom(0))
next(source)
torch.save(source.state_dict(), state)
print(peak() - base)
"""
    out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 150


# --- Objective --------------------------------------------------------------------------------------------------------


def test_a_student_like_its_teacher_has_no_loss_and_another_one_learns():
    teacher = _teacher(clip=False)
    source = DynamicSource(teacher, _prepared(teacher), 4, ProcessRandom(1))
    batch = next(iter(source.iterate([(0, 4)])))
    student = _teacher(dropout=0.1).net.requires_grad_(True)
    objective = DKDMLoss(student.diffusion, teacher)
    loss, _ = objective(student.eval(), batch)
    assert loss.abs().max() < 1e-5
    torch.manual_seed(5)
    for p in student.parameters():
        p.data += 0.05 * torch.randn_like(p)
    optimizer = torch.optim.Adam(student.train().parameters(), lr=2e-3)
    losses = []
    for batch in source.iterate([(4 * i, 4) for i in range(40)]):
        loss, terms = objective(student, batch)
        assert set(terms) == {'loss', 'mse', 'vb', 'sigma'} and loss.shape == (4,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(terms['mse'].mean().item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_input_perturbation_reaches_the_student_only():
    teacher = _teacher()
    batch = next(iter(DynamicSource(teacher, _prepared(teacher), 4, ProcessRandom(1)).iterate([(0, 4)])))
    seen = []

    class Student(torch.nn.Module):
        def forward(self, x, step, class_labels):
            seen.append(x)
            return torch.zeros([4, 6, 4, 4])

    images = batch['images'].clone()
    for p in (0.0, 0.5):
        DKDMLoss(teacher.diffusion, teacher, input_perturb=p)(Student(), batch)
    assert torch.equal(seen[0], images) and not torch.equal(seen[1], images)
    assert torch.equal(batch['images'], images)


def test_what_cannot_be_distilled_is_refused():
    teacher = _teacher()
    with pytest.raises(UserError, match='noise schedule and time steps'):
        DKDMLoss(GaussianDiffusion('cosine', 20), teacher)
    with pytest.raises(UserError, match='one of them has classes and the other not'):
        Cache(torch.zeros([4, 3, 4, 4]), torch.zeros([4]).long()).load_state_dict(
            _prepared(_teacher(num_classes=5), size=4).state_dict())


def test_the_training_loop_distils_and_resumes_exactly(tmp_path):
    """A student trained for six steps, and one stopped after three: same weights, same cache, bit for bit."""
    teacher = _teacher()

    def trained(folder, *totals):
        for total in totals:                                            # each a new process, as far as it can tell
            student = _teacher(dropout=0.1).net.requires_grad_(True)
            source = DynamicSource(teacher, _prepared(teacher), 4, ProcessRandom(1))
            recipe = Recipe(batch=4, total_nimg=total, batch_gpu=2, checkpoint=12, snapshot=24,
                            optim={'name': 'AdamW', 'weight_decay': 0},
                            averages={'name': 'constant', 'rates': [0.9]})
            fit(recipe, str(tmp_path / folder), student, DKDMLoss(student.diffusion, teacher), source)
        return student.state_dict(), source.cache

    state, cache = trained('whole', 24)
    other, other_cache = trained('parts', 12, 24)
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert torch.equal(cache.x, other_cache.x) and torch.equal(cache.levels, other_cache.levels)
    net = load_snapshot(str(tmp_path / 'parts' / 'network-snapshot-0000000.pkl')).net
    assert sample(net, torch.randn([2, 3, 4, 4]), name='ddpm').isfinite().all()
