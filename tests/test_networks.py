"""Every network case of the golden folder, driven by its JSON: state names, shapes and order, outputs, gradients.

Point GOLDEN to another folder of the same layout to run other cases.
"""

import importlib
import importlib.util

import fill
import golden_cases
import numpy as np
import pytest
import torch
from helpers import traced_only

from dnnlib import UserError
from training.networks import NETWORKS, build_network, compiled, layers

# How the networks are made: (file that the case names, class that it names) -> (module, name of the builder in it).
BUILDERS = {
    ('guided-diffusion/guided_diffusion/script_util.py', 'create_model'): ('training.networks.adm', 'ADMUNet'),
    ('model/model.py', 'UNet'): ('training.networks.ddpm', 'DDPMUNet'),
    ('edm/utils_semisup.py', 'get_model'): ('training.networks.classifier', 'WideResNet'),
    ('src/pytorch_fid/inception.py', 'fid_inception_v3'): ('metrics.inception', 'InceptionV3'),
}


def _build(case):
    """The network of a case with its constructor arguments as they are; skips if its module does not exist."""
    name = case.json['reference']['class'].split()[0]
    file = case.json['reference']['file']
    if file.startswith('training/networks'):
        if name in NETWORKS:
            return build_network(name, **case.json['kwargs'])
        inner = importlib.import_module('training.networks.edm2' if 'edm2' in file else 'training.networks.edm')
        return getattr(inner, name)(**case.json['kwargs'])  # a network without its preconditioning
    module, builder = BUILDERS[file, name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f'{module} is not part of this checkout')
    return getattr(importlib.import_module(module), builder)(**case.json['kwargs'])


def _filled(case):
    """The network with the weights that the case prescribes, in its mode."""
    net = _build(case)
    constant = {name: net.state_dict()[name].clone() for name in case.json.get('keep', [])}
    fill.fill_(net, case.json['fill_seed'], case.json['skip'])
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name in constant:
                tensor.copy_(constant[name])
            elif tensor.ndim == 4:
                tensor.mul_(case.json.get('weight_gain', 1))
    return net.train(case.json['mode'] == 'train')


def _state(net):
    return [(name, list(t.shape), str(t.dtype).removeprefix('torch.')) for name, t in net.state_dict().items()]


@pytest.mark.parametrize('case', golden_cases.cases('networks'), ids=str)
def test_state_dict(case):
    expected = []
    for name, entry in case.json['state'].items():
        entry = entry if isinstance(entry, dict) else {'shape': entry, 'dtype': 'float32'}
        expected.append((name, entry['shape'], entry['dtype']))
    assert _state(_build(case)) == expected


def _outputs(case, net) -> dict:
    """Every output of the `calls` of a case. The calls are Python expressions written in our own test data."""
    outputs = {}
    for names, call in case.json['calls'].items():
        inputs = golden_cases.make_inputs(case.json['inputs'])
        if names == '*':
            result = _inception_outputs(net, **inputs)
        else:
            result = eval(call, {'__builtins__': {'float': float}}, dict(inputs, net=net, torch=torch, np=np))
            result = dict(zip(names.split(', '), result if ', ' in names else [result], strict=True))
        outputs.update(result)
    return outputs


def _inception_outputs(net, images) -> dict:
    from metrics.inception import OUTPUTS
    return net(images, OUTPUTS)


def _compare(name, out, ref):
    """One output with the tolerance of the golden README."""
    out = np.asarray(out.detach() if torch.is_tensor(out) else out)
    assert out.shape == ref.shape
    if not np.issubdtype(ref.dtype, np.floating):
        np.testing.assert_array_equal(out, ref)
    elif name in ('sigma_min', 'sigma_max'):
        np.testing.assert_allclose(out, ref, rtol=1e-6)
    else:
        assert golden_cases.relative_error(out, ref) <= 1e-5, name


@pytest.mark.parametrize('case', [c for c in golden_cases.cases('networks') if c.json['mode'] == 'eval'], ids=str)
@pytest.mark.parametrize('large', [1, layers.LARGE])
def test_outputs(case, large, monkeypatch):
    """`large`: the same however large an activation counts as large."""
    monkeypatch.setattr(layers, 'LARGE', large)
    net = _filled(case)
    with torch.no_grad():
        outputs = _outputs(case, net)
    assert set(outputs) >= set(case.arrays)
    for name, ref in case.arrays.items():
        _compare(name, outputs[name], ref)


def _traced(net, monkeypatch):
    torch._dynamo.reset()
    traced_only(monkeypatch)
    return compiled(net)


@pytest.mark.parametrize('case', [c for c in golden_cases.cases('networks') if c.json['mode'] == 'eval'
                                  and c.json['reference']['file'].startswith('training/networks')], ids=str)
def test_compiled_networks_have_the_same_outputs(case, monkeypatch):
    monkeypatch.setattr(layers, 'LARGE', 1)
    net = _traced(_filled(case), monkeypatch)
    with torch.inference_mode():
        outputs = _outputs(case, net)
    for name, ref in case.arrays.items():
        _compare(name, outputs[name], ref)


@pytest.mark.parametrize('case', [c for c in golden_cases.cases('networks') if c.json['mode'] == 'train'], ids=str)
@pytest.mark.parametrize('large, traced', [(1, False), (layers.LARGE, False), (1, True)])
def test_training_step(case, large, traced, monkeypatch):
    """One forward in training mode, sum(D_x^2) / N, one backward: outputs, weights afterwards, gradient norms."""
    monkeypatch.setattr(layers, 'LARGE', large)
    net = _filled(case)
    outputs = _outputs(case, _traced(net, monkeypatch) if traced else net)
    loss = outputs['D_x'].square().sum() / len(outputs['D_x'])
    loss.backward()
    outputs['loss'] = loss
    state, gradients = net.state_dict(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    stored = {key.removeprefix('grad/') for key in case.arrays if key.startswith('grad/')}
    assert {name for name, grad in gradients.items() if grad.norm() > 0} <= stored <= set(gradients)
    assert {'weight/' + name for name in case.json.get('weights_after', [])} <= set(case.arrays)
    for name, ref in case.arrays.items():
        kind, _, parameter = name.partition('/')
        if kind == 'grad':
            np.testing.assert_allclose(gradients[parameter].norm(), ref, rtol=1e-4)
        elif kind == 'weight':
            assert golden_cases.relative_error(state[parameter], ref) <= 1e-6
        else:
            _compare(name, outputs[name], ref)


@pytest.mark.parametrize('name, kwargs', [
    ('EDMPrecond', dict(img_resolution=7, img_channels=3, model_type='SongUNet')),
    ('EDMPrecond', dict(img_resolution=4, img_channels=3, model_type='DhariwalUNet')),
    ('Precond', dict(img_resolution=1, img_channels=3, label_dim=0, model_channels=16)),
    ('ADMUNet', dict(image_size=6, num_channels=32, num_res_blocks=1, channel_mult='1,2,2'))])
def test_images_that_cannot_be_halved_so_often_are_refused(name, kwargs):
    with pytest.raises(UserError, match='do not suit a network of [34] resolutions'), \
            torch.device('meta'):
        build_network(name, **kwargs)
