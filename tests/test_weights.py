"""Networks of the distillation, long-tail and synthetic-data studies: sizes, published checkpoints, snapshots."""

import math
import re

import golden_cases
import pytest
import torch

from dnnlib import UserError
from synthetic_data.classify import open_classifier
from torch_utils.files.identify import read_state_dict
from torch_utils.files.weights import load_weights
from training import encoders
from training.networks import build_network
from training.networks.classifier import WideResNet
from training.snapshot import load_snapshot, save_snapshot


@pytest.mark.parametrize('case, name', golden_cases.variants(
    'math', 'configs_distillation*', lambda c: c.json['architectures']), ids=golden_cases.ids)
def test_architectures_have_the_size_in_their_name(case, name):
    with torch.device('meta'):
        net = build_network('ADMUNet', learn_sigma=True, **case.json['architectures'][name])
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert math.floor(millions) == int(re.match(r'(\d+)M', name)[1])


def _adm(**settings):
    return build_network('ADMUNet', **(dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,2',
                                            attention_resolutions='4', learn_sigma=True) | settings))


@pytest.mark.parametrize('settings, message', [
    ({'channel_mult': '', 'image_size': 12}, 'channel_mult'), ({'channel_mult': '1,x'}, 'channel_mult'),
    ({'attention_resolutions': ''}, 'attention_resolutions'), ({'num_channels': 48}, 'multiple of 32'),
    ({'num_head_channels': 96}, 'heads'), ({'num_heads': 5}, 'heads'), ({'depth': 3}, 'depth')])
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        _adm(**settings)


@pytest.mark.parametrize('name', ['resnet18', 'wrn-28', 'wrn-9-2', 'wrn-12-2', 'wrn-28-0'])
def test_unknown_classifiers_are_refused(name):
    with pytest.raises(UserError, match='wrn-<depth>-<widen>'):
        WideResNet(name)


def test_labels_are_numbers_or_vectors():
    torch.manual_seed(0)
    net = _adm(class_cond=True, num_classes=5, learn_sigma=False)
    torch.nn.init.normal_(net.out[2].weight)
    x, t, y = torch.randn([3, 3, 8, 8]), torch.tensor([1, 5, 9]), torch.tensor([4, 0, 2])
    torch.testing.assert_close(net(x, t, y), net(x, t, torch.eye(5)[y]))
    with pytest.raises(ValueError, match='class-conditional'):
        net(x, t)


@pytest.mark.parametrize('class_name', ['ADMUNet', 'DDPMUNet'])
def test_bfloat16_agrees_with_float32(class_name):
    torch.manual_seed(0)
    net = _adm() if class_name == 'ADMUNet' else build_network(
        class_name, T=100, ch=32, ch_mult=[1, 2], attn=[1], num_res_blocks=1, dropout=0.1, cond=False, augm=False,
        num_class=1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, t = torch.randn([2, 3, 8, 8]), torch.tensor([3, 60])
    full = net.eval()(x, t)
    net.precision = 'bf16'
    half = net(x, t)
    assert half.dtype == torch.float32
    assert 0 < golden_cases.relative_error(half.detach(), full.detach()) < 0.03


# --- Published checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('key', [None, 'model_state_dict', 'state_dict'])
@pytest.mark.parametrize('normalize_input', [False, True])
def test_a_selection_model_loads(tmp_path, prefix, key, normalize_input):
    torch.manual_seed(0)
    net = WideResNet('wrn-10-1', 7, normalize_input).eval()
    state = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save({key: state, 'epoch': 3} if key else state, tmp_path / 'x.pt')
    loaded = open_classifier(str(tmp_path / 'x.pt'), 'wrn-10-1', 7)
    x = torch.rand([2, 3, 32, 32])
    assert torch.equal(loaded(x), net(x)) and loaded.num_classes == 7 and not loaded.training
    with pytest.raises(UserError, match=r'x.pt is a classifier of 7 classes, not of 10'):
        open_classifier(str(tmp_path / 'x.pt'), 'wrn-10-1', 10)
    with pytest.raises(UserError, match='x.pt holds a wrn-10-1, not a wrn-16-1'):
        open_classifier(str(tmp_path / 'x.pt'), 'wrn-16-1')


def test_guided_diffusion_weights_load_by_name_or_say_what_is_wrong(tmp_path):
    path = str(tmp_path / 'ADM_cifar10_baseline.pt')
    net = _adm()
    torch.save(net.state_dict(), path)
    load_weights(_adm(), read_state_dict(path), path)
    with pytest.raises(UserError, match=r'another shape of time_embed.0.weight \(128x32 for 256x64\).* and \d+ more'):
        load_weights(_adm(num_channels=64), read_state_dict(path), path)
    with pytest.raises(UserError, match='has unknown'):
        load_weights(_adm(num_res_blocks=1, channel_mult='1'), read_state_dict(path), path)
    state = net.state_dict()
    del state['out.2.bias']
    with pytest.raises(UserError, match='it lacks out.2.bias'):
        load_weights(_adm(), state, path)


class _Evil:
    def __reduce__(self):
        return print, ('this must not run',)


@pytest.mark.parametrize('content', [_Evil(), {}, {'epoch': 3}, [1, 2], {'a': torch.zeros(1), 'b': 'text'}])
def test_files_without_weights_are_refused(tmp_path, capsys, content):
    path = str(tmp_path / 'x.pt')
    torch.save(content, path)
    with pytest.raises(UserError, match='x.pt'):
        read_state_dict(path)
    assert capsys.readouterr().out == ''
    with pytest.raises(UserError, match='no such file'):
        read_state_dict(path + '.missing')


# --- Snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('class_name', ['ADMUNet', 'DDPMUNet'])
def test_a_snapshot_is_enough_to_sample(tmp_path, class_name):
    network = {'ADMUNet': dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1',
                               attention_resolutions='4', learn_sigma=True),
               'DDPMUNet': dict(T=20, ch=64, ch_mult=[1], attn=[0], num_res_blocks=1, dropout=0.1, cond=True,
                                augm=False, num_class=3, img_resolution=8)}[class_name]
    variance = 'learned_range' if class_name == 'ADMUNet' else 'fixed_large'
    torch.manual_seed(0)
    net = build_network('DiscreteDenoiser', network=dict(class_name=class_name, **network),
                        diffusion=dict(schedule='cosine', steps=20, variance=variance), clip=True)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    path = str(tmp_path / 'x.pkl')
    save_snapshot(path, net, encoder=encoders.RGBEncoder(), dataset={}, recipe={}, nimg=1, dtype=torch.float32)
    loaded = load_snapshot(path).net
    x = torch.randn([2, 3, 8, 8])
    labels = torch.eye(3)[:2] if net.label_dim else None
    assert torch.equal(loaded(5 * x, 5.0, labels), net.eval()(5 * x, 5.0, labels))
    save_snapshot(path, net, encoder=encoders.RGBEncoder(), dataset={}, recipe={}, nimg=1)
    tables = {name: buffer for name, buffer in net.named_buffers() if name in net.state_dict()}
    for name, buffer in tables.items():                                 # half precision is for learned weights
        assert torch.equal(load_snapshot(path).net.state_dict()[name], buffer)
    assert bool(tables) == (class_name == 'DDPMUNet')
