"""What was made fast gives the results of the plain way, and the benchmarks run."""

import copy
import io
import json
import pathlib
import pickle
import resource
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import fails, invoke, run, write_digits

from benchmarks import gpu
from benchmarks.bench_training import NETWORKS
from benchmarks.loop_profile import profile_loop
from benchmarks.plain_edm2 import PlainConv, plain_network
from benchmarks.plain_unets import FAMILIES, PLAIN, plain_unet
from torch_utils.memory import keep_freed
from training import checkpoint
from training.data import convert, sources
from training.networks import build_network, edm2, layers

# --- Networks -----------------------------------------------------------------------------------------------------

OTHERS = {
    'dhariwal': ('EDMPrecond', dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=32, num_blocks=1,
                                    channel_mult=[1, 2], attn_resolutions=[8], augment_dim=0)),
    'old-adm': ('DiscreteDenoiser', dict(diffusion={}, network=dict(
        class_name='ADMUNet', image_size=16, num_channels=32, num_res_blocks=1, channel_mult='1,2', num_heads=2,
        attention_resolutions='8', learn_sigma=True)))}


def _network(**options):
    torch.manual_seed(0)
    net = build_network('Precond', **(NETWORKS['digits'] | dict(precision='fp32', attn_resolutions=[8, 4]) | options))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith('gain'):
                parameter.fill_(0.6)
    return net


def _call(net):
    torch.manual_seed(1)
    x, sigma, labels = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 7.0]), torch.eye(10)[:3]
    return net(x, sigma, labels, return_logvar=True)


@pytest.mark.parametrize('options', [
    {}, {'resample_filter': [1, 3, 3, 1], 'clip_act': 1.5}, {'num_blocks': 2, 'label_balance': 0.3}], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_plain_edm2_has_the_same_outputs_gradients_and_weights(options, training):
    ours = _network(**options).train(training)
    plain = plain_network(ours)
    assert sum(isinstance(module, PlainConv) for module in plain.modules()) > 20
    assert not any(type(module) is edm2.MPConv for module in plain.modules())
    assert list(plain.state_dict()) == list(ours.state_dict())
    results = []
    for net in (ours, plain):
        D, u = _call(net)
        (D.square().sum() + u.sum()).backward()
        results.append((D.detach(), {name: p.grad for name, p in net.named_parameters()}, net.state_dict()))
    (D, gradients, weights), (D_plain, gradients_plain, weights_plain) = results
    torch.testing.assert_close(D, D_plain, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        expected = gradients_plain[name]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-5, name
        torch.testing.assert_close(weights[name], weights_plain[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', [*FAMILIES, 'dhariwal', 'old-adm'])
def test_plain_networks_have_the_same_outputs_gradients_and_samples(name, monkeypatch):
    """With passes that are for large activations, too."""
    monkeypatch.setattr(layers, 'LARGE', 1)
    class_name, kwargs = OTHERS.get(name) or FAMILIES[name]
    torch.manual_seed(0)
    net = build_network(class_name, **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad and parameter.std() < 1e-3:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain = plain_unet(net)
    assert list(plain.state_dict()) == list(net.state_dict())
    assert sum(type(module) in PLAIN.values() for module in plain.modules()) > (6 if name == 'classifier' else 20)
    images, labels = torch.randn(3, 3, 16, 16), torch.eye(10)[:3]
    conditions = () if name == 'classifier' else (torch.tensor([0.1, 1.0, 7.0]), labels if net.label_dim else None)
    gradients, results = [], []
    for one in (net, plain):
        one.train()
        for module in one.modules():
            for p in {'p', 'dropout'} & {*vars(module)}:                 # masks are drawn otherwise
                setattr(module, p, 0)
        out = one(images, *conditions)
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        gradients.append({key: p.grad for key, p in one.named_parameters() if p.grad is not None})
        with torch.no_grad():
            results.append((out, one.eval()(images, *conditions)))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert list(gradients[0]) == list(gradients[1])
    largest = max(gradient.norm() for gradient in gradients[1].values())
    for key, gradient in gradients[0].items():
        expected = gradients[1][key]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * largest, key


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_an_enlarged_image(layout, monkeypatch):
    monkeypatch.setattr(layers, 'LARGE', 1)
    shapes = [2, 5, 6, 4], [7, 5, 3, 3], [7]
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    inputs = x.detach().contiguous(memory_format=layout).requires_grad_(), weight, bias
    expected = torch.nn.functional.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
    result = layers.enlarged_conv(*inputs)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=layout)
    torch.autograd.gradcheck(layers.enlarged_conv, inputs)


def test_rows_of_zeros_have_finite_gradients():
    conv = edm2.MPConv(4, 3, [3, 3])
    with torch.no_grad():
        conv.weight[1] = 0
    x = torch.zeros(2, 4, 5, 5, requires_grad=True)
    (conv(edm2.normalize(x, dim=1)) + 1).square().sum().backward()
    assert conv.weight.grad.isfinite().all() and x.grad.isfinite().all()


def test_weights_that_are_kept_for_sampling_follow_the_stored_ones():
    net, other = _network().eval(), _network(dropout=0.5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
        kept = [module for module in net.modules() if isinstance(module, edm2.MPConv)]
        before = _call(net)[0]
        assert all(torch.equal(a, b) for a, b in zip(before, _call(net)[0], strict=True))
        assert sum(module._kept is not None for module in kept) > 20
        assert all(module._kept is None for module in copy.deepcopy(net).modules() if isinstance(module, edm2.MPConv))
        assert len(pickle.dumps(net)) < 1.1 * len(pickle.dumps(_network()))
        net.unet.dec['8x8_block0'].emb_gain.add_(1)                      # a gain
        assert not torch.allclose(before, _call(net)[0])
        net.load_state_dict(other.state_dict())                         # all weights
        torch.testing.assert_close(_call(net)[0], _call(plain_network(other.eval()))[0], rtol=1e-4, atol=1e-5)
        torch._foreach_lerp_(list(net.parameters()), list(_network().parameters()), 1.0)    # as the averages do
        torch.testing.assert_close(_call(net)[0], before, rtol=1e-4, atol=1e-5)
    net.train()
    assert all(module._kept is None for module in kept)


def test_optimizer_state_takes_the_memory_order_of_the_weights():
    """Fused Adam on the CPU goes by memory: states of runs whose weights lay otherwise must be turned."""
    def adam(weight):
        return torch.optim.Adam([weight], lr=0.1, fused=True)

    torch.manual_seed(0)
    gradients = [torch.randn(6, 4, 3, 3) for _ in range(2)]
    flat = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    turned = torch.nn.Parameter(flat.detach().clone(memory_format=torch.channels_last))
    optimizers = [adam(flat), adam(turned)]
    flat.grad = gradients[0]
    optimizers[0].step()
    with torch.no_grad():
        turned.copy_(flat)
    checkpoint.load_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
    flat.grad, turned.grad = gradients[1], gradients[1].contiguous(memory_format=torch.channels_last)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(turned, flat, rtol=0, atol=1e-7)


@pytest.mark.skipif(sys.platform != 'linux', reason='is about glibc')
def test_freed_memory_is_not_given_back_to_the_system():
    keep_freed()

    def pages_of(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in range(count):
            torch.ones(1 << 24, dtype=torch.uint8).add_(size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages_of(1)
    assert pages_of(20) < 0.1 * 20 * (1 << 24) / resource.getpagesize()


# --- Data -------------------------------------------------------------------------------------------------------------

def _noise(*shape):
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def _png(pixels, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, 'PNG', **options)
    return file.getvalue()


def _photograph(side=32):
    """Pixels for which PNG writers choose filters of all kinds."""
    return np.asarray(PIL.Image.fromarray(_noise(6, 6, 3)).resize((side, side), PIL.Image.Resampling.BICUBIC))


def _folder_of_pngs(path, count=300):
    path.mkdir()
    for i in range(count):
        (path / f'{i:04d}.png').write_bytes(_png(np.roll(_photograph(), i, axis=1)))
    return sources.open_source(str(path))


def test_damaged_pictures_among_many_are_named_and_left_out(tmp_path):
    source = _folder_of_pngs(tmp_path / 'png', 40)
    (tmp_path / 'png' / '0017.png').write_bytes((tmp_path / 'png' / '0017.png').read_bytes()[:300])
    with pytest.raises(Exception, match='0017.png'):
        convert.convert(source, convert.everything(source), str(tmp_path / 'a.zip'), workers=1)
    done = convert.convert(source, convert.everything(source), str(tmp_path / 'a.zip'), workers=1, skip_corrupt=True)
    assert done.count == 39 and '0017.png' in done.skipped[0]


# --- Scripts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('script, options', [
    ('train_edm2.py', ['--preset=digits', '--channels=8', '--batch=16', '--duration=32', '--snapshot=0', '--checkpoint=0']),
    ('train.py', ['--duration=0.0002', '--duration-rule=fixed', '--batch=100', '--num-channels=8', '--num-blocks=1',
                  '--cres=1,2', '--tick=0.1', '--snap=0', '--dump=0', '--ema_mode=mode1', '--rampup=0.0005'])])
@pytest.mark.parametrize('compile', [True, False])
def test_compile_is_an_option_of_both_trainers(tmp_path, monkeypatch, script, options, compile):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda net, **_: compiled.append(type(net).__name__) or net)
    data = write_digits(tmp_path / 'digits.zip', 100)
    invoke(script, f'--outdir={tmp_path}/runs', f'--data={data}', *options, f'--compile={compile}')
    assert len(compiled) == compile


def test_the_table_on_a_cpu(tmp_path):
    names = ['cifar-png', 'cifar-tar-16', 'jpeg-64', 'gaussian', 'frechet', 'training', 'sampling', 'knn', 'precision-recall',
             'training-edm', 'training-classifier', 'sampling-ddpm', 'sampling-adm', 'bf16-classifier']
    out = run('benchmarks/run.py', '--tiny', '--compile=False', '--threads=1', '--clock=cpu', f'--dest={tmp_path}/table.json',
              *[f'--only={name}' for name in names]).stdout
    result = json.loads((tmp_path / 'table.json').read_text())
    assert len(result['rows']) == len(names) + 1 and result['clock'] == 'cpu' and result['tiny']
    for row in result['rows']:
        assert row['plain'] >= 0 and row['optimised'] >= 0 and row['workload'] in out and row['memory'] >= 0
    assert all('same pixels' in row['note'] for row in result['rows'][:3])


def test_everything_for_a_gpu_runs_on_a_cpu_at_tiny_size(tmp_path):
    dest = tmp_path / 'gpu.json'
    rows = gpu.measure('cpu', tiny=True, compile=False, seconds=100, only=['adm-57m'], dest=dest)
    kinds = [(row['workload'], row['kind'], row['precision']) for row in rows]
    assert kinds == [('train adm-57m', kind, precision) for precision in ('fp32', 'bf16') for kind in ('plain', 'optimised')]
    assert all(min(row['images_per_second'], row['share_of_matrix_rate'], row['tflops']) > 0 for row in rows)
    assert json.loads(dest.read_text())['rows'] == rows
    assert len(gpu.table(rows).splitlines()) == 1 + len(rows)


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    rows = gpu.measure('cpu', tiny=True, compile=False, seconds=1, only=['fid'], dest=tmp_path / 'gpu.json')
    assert rows == [{'workload': 'fid', 'error': rows[0]['error']}] and 'share of the time' in rows[0]['error']
    assert 'share of the time' in gpu.table(rows)


@pytest.mark.parametrize('name', ['edm2-xs', 'ddpmpp'])
def test_plain_and_optimised_steps_of_the_gpu_list_train(name, tmp_path):
    part = gpu.Part('cpu', True, False, tmp_path / 'rows.jsonl')
    net, batch = part.network(name, 'fp32')
    for model in (net.train(), gpu.plain_of(net)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        gpu.step_of(name, model, model, model is net, batch, 'cpu')()
        assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_loop_is_profiled():
    result = profile_loop(_network(img_channels=4).train(), batch=4, steps=2)
    assert result['steps'] == 2 and result['seconds_of_a_step'] > 0 and 0 <= result['share_waited_for_data'] < 1
    assert result['waits'] is None and result['synchronisations'] is None  # a CPU has no other device to wait for


def test_bad_input_is_refused():
    if not torch.cuda.is_available():
        assert '--device=cuda' in fails('benchmarks/run.py', '--device=cuda', '--only=fid')
        assert '--tiny' in fails('benchmarks/gpu.py')


def test_the_page_names_what_can_be_run():
    page = (pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'performance.md').read_text()
    for command in ('benchmarks/run.py', 'benchmarks/gpu.py', 'benchmarks/bench_processes.py'):
        assert command in page


def test_a_soak_compares_the_first_tenth_with_the_last(tmp_path):
    invoke('benchmarks/soak.py', '--steps=120', '--every=12', f'--dest={tmp_path}/soak.json')
    table = json.loads((tmp_path / 'soak.json').read_text())
    assert list(table) == ['memory (MiB)', 'open files', 'threads', 'cpu (ms/step)', 'time (ms/step)']
    assert all(first > 0 and last > 0 for first, last in table.values())
    assert 'at least six times' in fails('benchmarks/soak.py', '--steps=100', '--every=50')
