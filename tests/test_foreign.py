"""Files of others: every published layout loads the same, and hostile ones end in one line and touch nothing."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile

import fill
import golden_cases
import hostile
import numpy as np
import pytest
import test_networks
import torch
from helpers import (
    ROOT,
    environment,
    fails,
    invoke,
    project_files,
    run,
    script_module,
    write_digits,
)

from dnnlib import UserError, options
from dnnlib.npz import LOCAL_HEADER, entry_start
from metrics.statistics import load_statistics
from snapshot_tool import describe
from torch_utils.files import pickles, torchfile
from torch_utils.files.identify import KINDS, identify
from torch_utils.files.own import read_own
from training import encoders
from training.data.images import NpzImages
from training.networks import build_network
from training.networks.infer import infer
from training.snapshot import load_denoiser, load_snapshot, save_snapshot

# --- Hostile files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def verdicts(tmp_path_factory):
    """What every hostile file got, by name; the folder where they were opened."""
    folder = tmp_path_factory.mktemp('hostile')
    result = subprocess.run([sys.executable, str(ROOT / 'tests' / 'hostile.py'), str(folder)], text=True,
                            capture_output=True, env=environment(), timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return {row['name']: row for row in map(json.loads, result.stdout.splitlines())}, folder


@pytest.mark.slow
@pytest.mark.parametrize('name', hostile.CASES)
def test_a_hostile_file_ends_in_one_line(verdicts, name):
    row = verdicts[0][name]
    assert row['unexpected'] == 'None' and row['code'] in (1, 2) and row['status'] == 0, row
    assert len(row['lines']) == 1 and row['lines'][0].startswith('Error: '), row
    assert name in row['lines'][0] and row['lines'][0].isprintable() and len(row['lines'][0]) < 700
    assert row['mib'] < 1000 and not row['left'], row


@pytest.mark.slow
def test_hostile_files_touch_nothing(verdicts):
    _, folder = verdicts
    there = {str(path.relative_to(folder)) for path in folder.rglob('*')}
    assert there == {'images.zip', 'canary', 'cwd'}
    assert (folder / 'canary').read_text() == 'alive' and not os.path.exists('pwned')


@pytest.fixture(scope='module')
def whole_files(tmp_path_factory):
    """One good file of each layout, by name."""
    folder = tmp_path_factory.mktemp('whole')
    made = {case.name: case.path.with_suffix('.pkl') for case in golden_cases.cases('pickles')}
    state = {'a.weight': torch.randn(30, 7), 'b': torch.arange(5)}
    torch.save(state, folder / 'zip.pt')
    torch.save(state, folder / 'legacy.pt', _use_new_zipfile_serialization=False)
    np.savez(folder / 'fid.npz', mu=np.zeros(5), sigma=np.eye(5))
    (folder / 'fid.pkl').write_bytes(pickle.dumps({'fid': dict(mu=np.zeros(5), sigma=np.eye(5))}))
    import safetensors.torch
    safetensors.torch.save_file(state, folder / 'x.safetensors')
    return made | {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize('name', [
    'edm_snapshot', 'edm2_snapshot', 'zip.pt', 'legacy.pt', 'fid.npz', 'fid.pkl', 'x.safetensors'])
def test_a_file_cut_anywhere_ends_in_one_line(whole_files, tmp_path, name):
    if name not in whole_files:
        pytest.skip('no golden pickles')
    data = whole_files[name].read_bytes()
    assert identify(str(whole_files[name])).kind in KINDS
    places = random.Random(1).sample(range(len(data)), 20)
    for place in places:
        (tmp_path / 'cut').write_bytes(data[:place])
        with pytest.raises(UserError, match='cut: ') as error:
            identify(str(tmp_path / 'cut'))
        assert '\n' not in str(error.value)


def test_the_fuzzer_finds_nothing():
    result = run('tests/fuzz_reader.py', '--seconds=5', '--seed=1')
    assert 'files read or refused' in result.stdout


def test_nothing_in_the_project_opens_pickles_by_the_usual_ways():
    for path in project_files():
        lines = [line for line in path.read_text().splitlines()
                 if re.search(r'torch\.load\(\w|pickle\.loads?\(', line)]
        assert all('weights_only=True' in line for line in lines), path


def test_the_files_of_the_project_are_no_installed_packages(tmp_path):
    for name in ('.venv/lib/a.py', 'env/lib/b.py', 'env/pyvenv.cfg', 'tests/c.py', 'training/d.py', 'e.py'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.name for path in project_files(tmp_path)] == ['e.py', 'd.py']
    assert len(project_files()) > 50


# --- Pickles of EDM and EDM2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden_cases.cases('pickles'), ids=str)
def test_source_text_is_never_run(tmp_path, case):
    """Real files carry source where the samples say that it was removed."""
    data = case.path.with_suffix('.pkl').read_bytes()
    source = f'import os\nos.mkdir({str(tmp_path / "ran")!r})\nraise SystemExit\n' + '# more\n' * 5000
    old = b'\x8c' + bytes([len('# source removed')]) + b'# source removed'
    assert data.count(old) >= 1
    (tmp_path / 'net.pkl').write_bytes(data.replace(old, hostile.text(source)))
    ours, sample = (load_snapshot(str(path)) for path in (tmp_path / 'net.pkl', case.path.with_suffix('.pkl')))
    assert not (tmp_path / 'ran').exists()
    assert all(torch.equal(a, b) for a, b in zip(ours.net.state_dict().values(), sample.net.state_dict().values(), strict=True))


def as_pickle(path, net, dtype=torch.float32, encoder=b'N'):
    """Writes a network in the layout of EDM and EDM2, as their training code does."""
    def stored(value):
        value = value.to(dtype) if value.is_floating_point() else value
        kind = {v: k for k, v in torchfile.STORAGES.items()}[value.dtype]
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b''
        return hostile.tensor(hostile.storage(value.numel(), kind, raw), value.shape, value.contiguous().stride())

    def object_of(module, name, **more):
        parts = {kind: hostile.dictionary(**{key: b'N' if value is None else stored(value) for key, value in table.items()})
                 for kind, table in (('_parameters', module._parameters), ('_buffers', module._buffers))}
        children = hostile.dictionary(**{key: b'N' if child is None else object_of(child, type(child).__name__)
                                         for key, child in module._modules.items()})
        state = hostile.dictionary(**parts, _modules=children, **more)
        if isinstance(module, torch.nn.ModuleDict):
            return hostile.name('torch.nn.modules.container', 'ModuleDict') + b')\x81' + state + b'b'
        return hostile.persistent(name, state)

    kwargs = pickle.dumps(net.init_kwargs, 2)[2:-1]
    hostile.write(path, hostile.program(hostile.dictionary(
        encoder=encoder, ema=object_of(net, net.class_name, _init_kwargs=kwargs))))


NETWORKS = [case for case in golden_cases.cases('networks') if case.json['reference']['class'].endswith('Precond')]


@pytest.mark.parametrize('case', NETWORKS, ids=str)
def test_every_network_of_both_projects_loads_from_their_layout(tmp_path, case):
    net = build_network(case.json['reference']['class'], **case.json['kwargs'])
    fill.fill_(net, skip=('resample_filter', 'u'))
    for dtype in (torch.float32, torch.float16):
        as_pickle(tmp_path / 'net.pkl', net, dtype)
        loaded = load_snapshot(str(tmp_path / 'net.pkl'))
        assert loaded.net.class_name == net.class_name and loaded.encoder.config() == {'name': 'rgb'}
        for (name, ours), theirs in zip(loaded.net.state_dict().items(), net.state_dict().values(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(dtype).to(ours.dtype)), name


def test_the_encoder_of_latents_is_rebuilt(tmp_path):
    net = build_network('Precond', img_resolution=8, img_channels=4, label_dim=0, model_channels=8, channel_mult=[1],
                        num_blocks=1, attn_resolutions=[])
    kwargs = pickle.dumps(dict(vae_name='some/vae', raw_mean=[1.0, 2.0, 3.0, 4.0], final_std=0.25, batch_size=4), 2)[2:-1]
    encoder = hostile.persistent('StabilityVAEEncoder', hostile.dictionary(_init_kwargs=kwargs))
    as_pickle(tmp_path / 'net.pkl', net, encoder=encoder)
    config = load_snapshot(str(tmp_path / 'net.pkl')).encoder.config()
    assert config['name'] == 'sd-vae' and config['vae_name'] == 'some/vae' and config['raw_mean'] == [1, 2, 3, 4]
    assert config['final_std'] == 0.25


# --- State dicts -----------------------------------------------------------------------------------------------------


CLASSES = {'create_model': 'ADMUNet', 'UNet': 'DDPMUNet', 'get_model': 'WideResNet'}


def published(net, kind):
    """The layouts in which networks of this kind are published: {name: content}."""
    state = net.state_dict()
    parallel = {f'module.{name}': value for name, value in state.items()}
    if kind == 'DDPMUNet':
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        return {'ckpt': {'net_model': other, 'ema_model': state, 'sched': {'last_epoch': 3, 'base_lrs': [2e-4]},
                         'optim': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'params': [0]}]},
                         'step': 7, 'x_T': torch.zeros(2, 3, 8, 8)},
                'parallel': {'net_model': parallel, 'ema_model': parallel, 'step': 7}, 'plain': state}
    if kind == 'WideResNet':
        return {'pseudo': {'state_dict': parallel, 'num_classes': 10, 'normalize_input': '0.mean' in state}, 'plain': state}
    return {'plain': state}


def left_open(case):
    """Arguments of a case that its weights cannot tell."""
    names = ('image_size', 'num_heads', 'num_heads_upsample', 'num_head_channels', 'use_new_attention_order')
    return {name: case.json['kwargs'][name] for name in names if name in case.json['kwargs']}


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('case', golden_cases.cases('networks', 'adm_unet*') + golden_cases.cases('networks', 'cbdm*')
                         + golden_cases.cases('networks', 'wrn*'), ids=str)
def test_a_published_state_dict_says_its_architecture(tmp_path, case, legacy):
    net, kind = test_networks._filled(case), CLASSES[case.json['reference']['class'].split()[0]]
    for name, content in published(net, kind).items():
        path = str(tmp_path / f'{name}.bin')                    # the name says nothing
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        loaded = load_snapshot(path, options=left_open(case)).net
        inner = loaded if kind == 'WideResNet' else loaded.model
        for key, out in test_networks._outputs(case, inner).items():
            test_networks._compare(key, out, case.arrays[key])
    if kind == 'WideResNet':
        assert all(torch.equal(value, content[name]) for name, value in loaded.state_dict().items())
        with pytest.raises(UserError, match='classifier, which makes no images'):
            load_denoiser(path)


@pytest.mark.parametrize('case, name', golden_cases.variants(
    'math', 'configs_distillation*', lambda c: c.json['architectures']), ids=golden_cases.ids)
def test_all_published_architectures_are_recognised(case, name):
    wanted = dict(case.json['architectures'][name], learn_sigma=True)
    with torch.device('meta'):
        state = build_network('ADMUNet', **wanted).state_dict()
    found = infer(state)
    untold = ('dropout', 'use_checkpoint', 'use_fp16', 'channel_mult')
    rebuilt = {key: found.kwargs.get(key) for key in wanted if key not in untold}
    assert rebuilt == {key: wanted[key] for key in rebuilt}
    assert found.diffusion == dict(schedule='cosine', steps=1000, variance='learned_range', predict='epsilon',
                                   rescale_timesteps=False)


def test_weights_of_a_checkpoint_can_be_chosen_and_arguments_set(tmp_path):
    net = build_network('DDPMUNet', T=10, ch=32, ch_mult=[1], attn=[], num_res_blocks=1, dropout=0, cond=False, augm=False,
                        num_class=1)
    state = net.state_dict()
    other = {name: value + 1 for name, value in state.items()}
    path = str(tmp_path / 'ckpt_1.pt')
    torch.save({'net_model': other, 'ema_model': state, 'step': 1}, path)
    for key, wanted in ((None, state), ('ema_model', state), ('net_model', other)):
        loaded = load_snapshot(path, weights=key, options=dict(img_resolution=16)).net
        assert loaded.img_resolution == 16 and torch.equal(loaded.model.head.weight, wanted['head.weight'])
    for settings, message in ((dict(weights='optim'), 'no weights called'),
                             (dict(options=dict(heads=3)), 'heads is no argument')):
        with pytest.raises(UserError, match=message):
            load_snapshot(path, **settings)
    save_snapshot(str(tmp_path / 'x.pkl'), net, encoder=encoders.RGBEncoder(), dataset={}, recipe={}, nimg=0)
    with pytest.raises(UserError, match='describes its own network'):
        load_snapshot(str(tmp_path / 'x.pkl'), options=dict(T=3))


def test_incomplete_weights_are_refused(tmp_path):
    net = build_network('WideResNet', name='wrn-10-1')
    for drop, message in (('fc.weight', 'incomplete'), ('block2.layer.0.conv1.weight', 'it lacks block2.layer.0.conv1.weight')):
        state = net.state_dict()
        del state[drop]
        torch.save(state, tmp_path / 'x.pt')
        with pytest.raises(UserError, match=message):
            load_snapshot(str(tmp_path / 'x.pt'))
    torch.save({'a': torch.zeros(3)}, tmp_path / 'x.pt')
    with pytest.raises(UserError, match='no network that is known'):
        load_snapshot(str(tmp_path / 'x.pt'))


# --- torch.save without torch.load -----------------------------------------------------------------------------------


@pytest.mark.parametrize('legacy', [False, True])
def test_files_of_torch_are_read_as_torch_reads_them(tmp_path, legacy):
    def read(path):
        data = pickles.map_file(path)
        return torchfile.read_legacy(data) if legacy else torchfile.ZipRecords(path, data).load()

    base = torch.arange(24.0)
    value = {'a': base.reshape(4, 6).t(), 'shared': base[3:9], 'empty': torch.zeros(0, 3), 'scalar': torch.tensor(2.5),
             'half': torch.randn(5).half(), 'bf16': torch.randn(5).bfloat16(), 'int': torch.arange(3),
             'bool': torch.tensor([True]),
             'bytes': torch.get_rng_state(), 'nested': [1, -2**40, 2.5, None, True, 'text', (1, (2,))], 3: {'x': b'raw'},
             'parameter': torch.nn.Parameter(torch.ones(2)), 'size': torch.Size([1, 2])}
    torch.save(value, tmp_path / 'x', _use_new_zipfile_serialization=not legacy)
    theirs, ours = torch.load(tmp_path / 'x', weights_only=True), read(str(tmp_path / 'x'))
    assert list(ours) == list(theirs)
    for key in theirs:
        if isinstance(theirs[key], torch.Tensor):
            assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key])
        else:
            assert ours[key] == theirs[key]
    ours['a'].zero_()                                            # changes stay in memory
    assert torch.equal(read(str(tmp_path / 'x'))['a'], value['a'])


def flip_a_bit(path, name):
    """In the middle of the largest part of a zip whose name has `name` in it."""
    with zipfile.ZipFile(path) as z:
        infos = [info for info in z.infolist() if name in info.filename]
        info = max(infos, key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    start = entry_start(data[info.header_offset:][:LOCAL_HEADER], info.header_offset)
    data[start + info.file_size // 2] ^= 0x40
    path.write_bytes(data)


def test_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / 'file'
    net = torch.nn.Linear(64, 64)
    torch.save({'model': net.state_dict()}, path)
    flip_a_bit(path, '/data/')
    with pytest.raises(UserError, match=r'file: .*changed since it was written \(wrong CRC\)'):
        identify(str(path))

    torch.jit.script(net).save(str(path))
    assert identify(str(path)).kind == 'torchscript'
    flip_a_bit(path, '/data/')
    with pytest.raises(UserError, match='wrong CRC'):
        identify(str(path))

    path = tmp_path / 'file.npz'
    np.savez(path, arr_0=np.zeros([300, 64, 64, 3], np.uint8), mu=np.zeros(8))
    assert len(NpzImages(str(path))) == 300
    flip_a_bit(path, 'arr_0')
    with pytest.raises(UserError, match='file.npz: .*CRC'):
        NpzImages(str(path))
    flip_a_bit(path, 'mu')
    with pytest.raises(UserError, match='file.npz: .*CRC'):
        identify(str(path))
    arrays = np.random.RandomState(0).randint(0, 256, [300, 64, 64, 3], np.uint8)
    np.savez_compressed(path, arr_0=arrays)                      # which does not make these smaller
    np.testing.assert_array_equal(NpzImages(str(path)).images([1]), arrays[[1]].transpose(0, 3, 1, 2))
    flip_a_bit(path, 'arr_0')
    with pytest.raises(UserError, match='file.npz: .*CRC'):
        NpzImages(str(path))


def test_verify_false_leaves_checksums_out(tmp_path):
    net = build_network('WideResNet', name='wrn-10-1')
    save_snapshot(str(tmp_path / 'own.pkl'), net, encoder=encoders.RGBEncoder(), dataset={}, recipe={}, nimg=0)
    torch.save({'model': net.state_dict()}, tmp_path / 'foreign.pt')
    for name in ('own.pkl', 'foreign.pt'):
        flip_a_bit(tmp_path / name, '/data/')
        assert 'changed since it was written' in fails('snapshot_tool.py', 'inspect', tmp_path / name)
        assert 'wrn-10-1' in invoke('snapshot_tool.py', 'inspect', tmp_path / name, '--verify=False')
    np.savez(tmp_path / 'images.npz', arr_0=np.zeros([300, 8, 8, 3], np.uint8))
    flip_a_bit(tmp_path / 'images.npz', 'arr_0')
    arguments = ['ref', f'--data={tmp_path}/images.npz', f'--dest={tmp_path}/a.pkl', '--metrics=fd_pixels']
    assert 'CRC' in fails('calculate_metrics.py', *arguments)
    invoke('calculate_metrics.py', *arguments, '--verify=False')
    assert 'SKIP_CHECKSUMS' not in os.environ                   # for other commands in this process


@pytest.mark.parametrize('script', [
    'train_edm2.py', 'train.py', 'generate_images.py', 'mem_ratio.py', 'reconstruct_phema.py reconstruct',
    'reconstruct_phema.py sweep',
    *(f'calculate_metrics.py {name}' for name in ('ref', 'calc', 'gen', 'memorization')),
    *(f'snapshot_tool.py {name}' for name in ('inspect', 'flops', 'convert')), 'long_tail/main.py', 'long_tail/make_stats.py',
    *(f'distillation/scripts/{name}.py' for name in ('dynamic_prepare', 'image_kd', 'image_sample', 'image_train')),
    *(f'synthetic_data/{name}.py' for name in (
        'generate', 'select_1M', 'combine_data', 'train_classifier', 'evaluate_data'))])
def test_what_opens_files_of_weights_and_numbers_takes_verify(script):
    script, *command = script.split()
    main = script_module(script).main
    main = main.commands[command[0]] if command else main
    assert options.verify(lambda: None).__click_params__[0].to_info_dict() in [param.to_info_dict() for param in main.params]


def test_own_files_are_read_as_torch_reads_them(tmp_path):
    state = {'complex': torch.randn(3, dtype=torch.complex64), 'labels': torch.arange(4).to(torch.uint16),
             'float8': torch.ones(4).to(torch.float8_e4m3fn), 'empty': torch.zeros(0, 2), 'half': torch.ones(2, 3).half().t(),
             'rng': torch.get_rng_state(), 'set': {1, 2}, 'number': 1 + 2j, 'nested': [1, -2**40, None, (1, (2,))],
             'bytes': b'raw', 'expanded': torch.ones(1).expand(5), 'size': torch.Size([2, 3]),
             'names': torch.nn.Linear(2, 2).state_dict()}
    path = str(tmp_path / 'training-state-0000001.pt')
    torch.save(state, path)
    theirs, ours = torch.load(path, weights_only=True), read_own(path)
    assert repr(ours) == repr(theirs) and list(ours) == list(state)
    assert [getattr(value, 'dtype', None) for value in ours.values()] == [
        getattr(value, 'dtype', None) for value in state.values()]
    ours['complex'].zero_()                                      # changes stay in memory
    assert torch.equal(read_own(path)['complex'], state['complex'])
    for name in ('set', 'number', 'expanded'):                   # the reader of foreign files knows fewer containers
        del state[name]
    torch.save({'identity': {}, 'nimg': 1} | state, path)
    assert identify(path).content['labels'].dtype == torch.uint16


@pytest.mark.parametrize('write, read', [
    (lambda path, net: save_snapshot(path, net, encoder=encoders.RGBEncoder(), dataset={}, recipe={}, nimg=0), load_snapshot),
    (lambda path, net: torch.save({'net': net.state_dict()}, path), read_own)], ids=['snapshot', 'checkpoint'])
def test_one_flipped_bit_of_a_weight_is_refused(tmp_path, write, read):
    net = build_network('WideResNet', name='wrn-10-1')
    path, weight = tmp_path / 'own.pkl', net.state_dict()['block1.layer.0.conv1.weight']
    write(str(path), net)
    data = bytearray(path.read_bytes())
    for dtype in (torch.float16, torch.float32):
        raw = weight.to(dtype).numpy().tobytes()
        if raw in data:
            data[data.index(raw) + 100] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r'own.pkl: .*data/\d+ has changed since it was written') as error:
        read(str(path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('value, message', [
    (bytearray(3), 'asks for __builtin__.bytearray'), ({(1, 2): 3}, 'strange keys'), ({((1,),)}, 'strange values'),
    (hostile.Call(os.system, hostile.PWNED), 'asks for posix.system'), (torch.zeros(2).to_sparse(), 'not allowed')])
def test_what_own_files_never_hold_is_refused(tmp_path, value, message):
    torch.save({'format': 'diffusion-snapshot-1', 'x': value}, tmp_path / 'own')
    for read in (read_own, identify):
        with pytest.raises(UserError, match=f'own: .*{message}') as error:
            read(str(tmp_path / 'own'))
        assert '\n' not in str(error.value)
    torch.save(torch.zeros(2), tmp_path / 'own', _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match='own: not a file that this project wrote'):
        read_own(str(tmp_path / 'own'))


def test_plain_values():
    assert pickles.check_plain({'a': [1, 'x', None, (2.5,)]}, 'it') == {'a': [1, 'x', None, (2.5,)]}
    for value in ({'a': torch.zeros(1)}, {(1, 2): 3}, [10**30], 'x' * 10**8, [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]):
        with pytest.raises(pickles.ForeignPickleError, match='it '):
            pickles.check_plain(value, 'it')


# --- What a file is, by its content ----------------------------------------------------------------------------------


def test_every_kind_is_recognised_by_content(tmp_path):
    made = {}

    def put(kind, data=None):
        made[kind] = tmp_path / f'file-of-kind-{len(made)}'
        if data is not None:
            made[kind].write_bytes(data)
        return made[kind]

    stats = dict(mu=np.zeros(3), sigma=np.eye(3))
    put('statistics', pickle.dumps({'fid': stats, 'fd_dinov2': stats}))
    put('cifar', pickle.dumps({b'data': np.zeros([2, 3072], np.uint8), b'labels': [0, 1]}, 2))
    with open(put('samples'), 'wb') as file:
        np.savez(file, arr_0=np.zeros([2, 4, 4, 3], np.uint8))
    os.rename(write_digits(str(tmp_path / 'd.zip'), 3), put('images'))
    torch.save({'identity': {}, 'nimg': 3}, put('training-state'))
    (tmp_path / 'folder').mkdir()
    made['folder'] = tmp_path / 'folder'
    net = build_network('Precond', img_resolution=8, img_channels=3, label_dim=0, model_channels=8, channel_mult=[1],
                        num_blocks=1, attn_resolutions=[])
    save_snapshot(str(put('snapshot')), net, encoder=encoders.RGBEncoder(), dataset={}, recipe={}, nimg=0)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), put('torchscript'))
    as_pickle(put('edm'), net)
    torch.save(net.state_dict(), put('weights'))
    for kind, path in made.items():
        assert identify(str(path)).kind == kind
        assert describe(identify(str(path)))['type'] == identify(str(path)).what
    for kind in set(made) - {'snapshot', 'edm', 'weights'}:                 # the door of every --net, --gnet and --transfer
        assert str(made[kind]) in fails('generate_images.py', f'--net={made[kind]}', '--outdir', tmp_path / 'out')
    for kind in ('cifar', 'training-state', 'edm', 'snapshot', 'weights'):
        assert str(made[kind]) in fails('calculate_metrics.py', 'calc', f'--images={made["images"]}',
                                              f'--ref={made[kind]}', '--metrics=fd_pixels')
    assert 'no network; it is' in fails('train.py', f'--transfer={made["statistics"]}', f'--data={made["images"]}',
                                        f'--outdir={tmp_path / "runs"}', '--num-channels=4', '--num-blocks=1', '--cres=1')


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_statistics_of_every_protocol(tmp_path, protocol):
    mu, sigma = np.arange(3.0), np.eye(3) * 2
    (tmp_path / 'x').write_bytes(pickle.dumps({'fid': dict(mu=mu, sigma=sigma)}, protocol))
    gaussian = load_statistics(str(tmp_path / 'x')).gaussians['fid']
    assert np.array_equal(gaussian.mu, mu) and np.array_equal(gaussian.sigma, sigma)
