"""Fine-tuning: what a network takes over from another one, out of any file, and what not."""

import os
import pickle

import helpers
import hostile
import numpy as np
import pytest
import test_foreign
import tiny
import torch

from dnnlib import UserError
from dnnlib.image_io import encode_png
from training import encoders
from training.checkpoint import Checkpoints
from training.data.archive import ArchiveWriter
from training.data.images import open_dataset
from training.networks import build_network
from training.recipe import Recipe
from training.runs import read_options
from training.snapshot import load_snapshot, save_snapshot
from training.transfer import transfer

SONG = dict(class_name='EDMPrecond', model_type='SongUNet', model_channels=8, channel_mult=[1, 1], num_blocks=1,
            attn_resolutions=[], img_resolution=8, img_channels=3, label_dim=3, dropout=0)
NCSN = SONG | dict(embedding_type='fourier', encoder_type='residual', decoder_type='standard', channel_mult_noise=2,
                   resample_filter=[1, 3, 3, 1])
ADM = SONG | dict(model_type='DhariwalUNet')
EDM2 = dict(class_name='Precond', model_channels=16, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4],
            channels_per_head=16, img_resolution=8, img_channels=3, label_dim=3)
GUIDED = dict(class_name='DiscreteDenoiser', diffusion=dict(steps=10, schedule='cosine'), network=dict(
    class_name='ADMUNet', image_size=8, num_channels=32, num_res_blocks=1, channel_mult='1,1', learn_sigma=True,
    class_cond=True, num_classes=3, attention_resolutions='4', num_head_channels=32, use_scale_shift_norm=True,
    use_new_attention_order=True))
CBDM = dict(class_name='DiscreteDenoiser', diffusion=dict(steps=10, schedule='linear_float32', variance='fixed_large'),
            network=dict(class_name='DDPMUNet', T=10, ch=32, ch_mult=[1, 1], attn=[1], num_res_blocks=1, dropout=0.0,
                         cond=True, augm=False, num_class=3, img_resolution=8))
VAE = hostile.persistent('StabilityVAEEncoder', hostile.dictionary(
    _init_kwargs=pickle.dumps(dict(final_std=0.5), 2)[2:-1]))           # of a published pickle
FAMILIES = dict(song=SONG, ncsn=NCSN, adm=ADM, edm2=EDM2, guided=GUIDED, cbdm=CBDM)


def varied(network: dict, classes=None, channels=None, side=None, **more) -> dict:
    """The arguments of a network with other classes, channels, and images."""
    inner = network.get('network')
    table = {**(inner or network), **more}
    for names, value in ((('label_dim', 'num_classes', 'num_class'), classes), (('img_channels',), channels),
                         (('img_resolution', 'image_size'), side)):
        if value is not None:
            table |= {name: value for name in names if name in table or name == 'img_channels'}
    if inner and classes is not None:
        table['class_cond' if 'class_cond' in table else 'cond'] = classes > 0
        table |= {name: 1 for name in ('num_classes', 'num_class') if table.get(name) == 0}
    return network | {'network': table} if inner else table


def filled(network: dict) -> torch.nn.Module:
    """A network whose weights are random, also those that begin as zeros."""
    torch.manual_seed(1)
    net = build_network(**network)
    with torch.no_grad():
        for value in net.parameters():
            value += 0.1 * torch.randn_like(value)
    return net.eval()


def transferred(tmp_path, source: dict, target: dict, old=(), new=(), encoder='rgb', **recipe):
    """(network of the file, network that started from it, Transferred)."""
    net = filled(source)
    path = str(tmp_path / 'source.pkl')
    save_snapshot(path, net, encoder=encoders.make_encoder({'name': encoder}), dataset=dict(old), recipe={},
                  dtype=torch.float32)
    torch.manual_seed(2)
    started = build_network(**target).eval()
    table = transfer(started, Recipe(batch=1, total_nimg=1, transfer=path, dataset=dict(new), **recipe))
    return net, started, table


def denoised(net, classes=None, channels=None, labels=None):
    x = torch.randn([2, 1, net.img_resolution, net.img_resolution], generator=torch.Generator().manual_seed(0))
    x = x.repeat(1, channels or net.img_channels, 1, 1)
    labels = torch.eye(net.label_dim)[classes] if classes else labels
    with torch.no_grad():
        return net(x, torch.tensor([0.5, 2.0]), labels)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


NAMES = [dict(class_names=['cat', 'dog', 'owl']), dict(class_names=['owl', 'fox', 'Cat', 'elk'])]


@pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'edm2'])
def test_classes_of_one_name_are_the_same(family, tmp_path):
    old, new, table = transferred(tmp_path, FAMILIES[family], varied(FAMILIES[family], classes=4), *NAMES)
    close(denoised(new, [0, 2]), denoised(old, [2, 0]))
    mean = denoised(old, labels=torch.full([1, 3], 1 / 3))
    close(denoised(new, [1, 1]), mean)
    close(denoised(new, [3, 3]), mean)
    assert table.summary['classes'] == [2, None, 0, None] and table.summary['classes by'] == 'name'
    assert 'the file has 3 classes and the data 4; 2 by name, new as the mean: fox, elk' in '\n'.join(table.lines())


def test_rows_of_edm2_have_the_directions_of_the_file(tmp_path):
    """They are normalised over the classes of the network, which are others now."""
    old, new, _ = transferred(tmp_path, EDM2, varied(EDM2, classes=4), *NAMES)
    before, after = (net.unet.emb_label.weight for net in (old, new))
    assert torch.equal(after[:, [0, 2]], before[:, [2, 0]]) and torch.equal(after[:, 1], before.mean(1))


@pytest.mark.parametrize('old, new, rows', [
    ({}, {}, [0, 1, 2, None]), ({}, dict(classes=[2, 7, 0, 1]), [2, None, 0, 1]),
    (dict(classes=[10, 20, 30]), dict(classes=[30, 40, 10, 50]), [2, None, 0, None]),
    (dict(class_names=list('abc')), dict(class_names=list('defg')), [None] * 4),
    (dict(wnids=['n1', 'n2', 'n3'], class_names=list('abc')), dict(wnids=['n3', 'n4', 'n1', 'n5'], class_names=list('abcd')),
     [2, None, 0, None])])
def test_without_names_classes_go_by_their_original_index(old, new, rows, tmp_path):
    assert transferred(tmp_path, SONG, varied(SONG, classes=4), old, new)[2].summary['classes'] == rows


@pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'edm2'])
def test_from_classes_to_none_and_from_none_to_classes(family, tmp_path):
    network = FAMILIES[family]
    old, new, table = transferred(tmp_path, network, varied(network, classes=0))
    close(denoised(new), denoised(old, labels=torch.full([1, 3], 1 / 3)))
    assert table.summary['left out']
    old, new, table = transferred(tmp_path, varied(network, classes=0), network)
    close(denoised(new, [0, 2]), denoised(old))
    assert table.summary['new'] and not table.summary['changed']


@pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'edm2'])
def test_gray_images_are_seen_and_made_as_before(family, tmp_path):
    gray = varied(FAMILIES[family], channels=1)
    old, new, _ = transferred(tmp_path, FAMILIES[family], gray)
    close(denoised(new, [0, 1]), denoised(old, [0, 1]).mean(1, keepdim=True))
    old, new, _ = transferred(tmp_path, gray, FAMILIES[family])
    close(denoised(new, [0, 1]), denoised(old, [0, 1]).repeat(1, 3, 1, 1))


def test_opacity_is_a_channel_of_its_own(tmp_path):
    old, new, table = transferred(tmp_path, SONG, varied(SONG, channels=4))
    x = torch.randn([2, 4, 8, 8])
    sigma = torch.ones([2])
    with torch.no_grad():
        close(new(x, sigma)[:, :3], old(x[:, :3], sigma))
    assert 'channels' in table.rows and table.rows['channels'] == '3 -> 4'


def test_the_gray_output_of_edm2_is_the_mean_of_its_colours(tmp_path):
    old, new, _ = transferred(tmp_path, EDM2, varied(EDM2, channels=1))
    x = torch.randn([1, 16, 8, 8])
    with torch.no_grad():
        colours, gray = (net.unet.out_conv(x, gain=net.unet.out_gain) for net in (old, new))
    torch.testing.assert_close(gray, colours.mean(1, keepdim=True), rtol=1e-3, atol=1e-3)
    # And its input sees their sum.
    inputs = [next(iter(net.unet.enc.values())).weight for net in (old, new)]
    assert torch.equal(inputs[1][:, 0], inputs[0][:, :3].sum(1)) and torch.equal(inputs[1][:, 1], inputs[0][:, 3])


@pytest.mark.parametrize('family', FAMILIES)
def test_layers_keep_their_level_at_another_resolution(family, tmp_path):
    attention = {'edm2': dict(attn_resolutions=[8]), 'guided': dict(attention_resolutions='8')}.get(family, {})
    old, new, table = transferred(tmp_path, FAMILIES[family], varied(FAMILIES[family], side=16, **attention))
    for before, after in zip(old.state_dict().values(), new.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert table.rows['resolution'] == '8 -> 16'


def test_labels_of_augmentations_that_are_new_count_for_nothing(tmp_path):
    old, new, table = transferred(tmp_path, SONG, SONG | dict(augment_dim=9, dropout=0.5, class_name='VPPrecond'))
    assert not new.model.map_augment.weight.any() and 'model.map_augment.weight' in table.rows['new']
    old, new, table = transferred(tmp_path, EDM2, EDM2 | dict(augment_dim=9))
    assert table.rows['new'] == 'unet.augment_gain, unet.emb_augment.weight' and not new.unet.augment_gain
    assert new.unet.emb_augment.weight.any()                            # else it could never learn
    assert torch.equal(denoised(old), denoised(new))


def test_settings_that_differ_are_named(tmp_path):
    _, _, table = transferred(tmp_path, SONG, SONG | dict(augment_dim=9, dropout=0.5, class_name='VPPrecond'))
    assert table.rows['settings'] == 'class_name EDMPrecond -> VPPrecond, dropout 0 -> 0.5' or (
        'dropout 0 -> 0.5' in table.rows['settings'] and 'EDMPrecond -> VPPrecond' in table.rows['settings'])


@pytest.mark.parametrize('source, target, options, message', [
    (SONG, SONG | dict(model_channels=16, num_blocks=2), {}, 'model_channels is 8 and here 16; num_blocks is 1 and here 2'),
    (SONG, ADM, {}, 'holds a SongUNet, and what is trained here is a DhariwalUNet'),
    (SONG, EDM2, {}, 'holds a SongUNet'), (GUIDED, CBDM, {}, 'holds a ADMUNet'),
    (EDM2, EDM2 | dict(channels_per_head=8), {}, 'channels_per_head is 16 and here 8'),
    (EDM2, EDM2 | dict(attn_resolutions=[8]), {}, 'attn_resolutions is [4] and here [8]'),
    (EDM2, varied(EDM2, side=16, attn_resolutions=[4]), {}, 'attn_resolutions is [8] and here []'),
    (varied(EDM2, channels=4), EDM2, dict(encoder='sd-vae'), 'was trained on latents, and the data are pixels'),
    (dict(class_name='WideResNet', name='wrn-10-1', num_classes=2), SONG, {}, 'what is trained here is a SongUNet')])
def test_what_cannot_fit_says_what_differs(source, target, options, message, tmp_path):
    with pytest.raises(UserError, match=message.replace('[', r'\[')) as error:
        transferred(tmp_path, source, target, **options)
    assert error.value.field == 'transfer'


def test_a_classifier_starts_from_one_of_other_classes(tmp_path):
    network = dict(class_name='WideResNet', name='wrn-10-1', num_classes=3)
    old, new, table = transferred(tmp_path, network, network | dict(num_classes=2), NAMES[0], dict(class_names=['owl', 'fox']))
    assert torch.equal(new.fc.weight[0], old.fc.weight[2]) and torch.equal(new.fc.bias[1], old.fc.bias.mean())
    assert table.summary['changed'] == ['fc.weight', 'fc.bias']


# --- In trainings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    """Sixteen enlarged digits as latents 4x4x4 of a tiny autoencoder."""
    folder = tmp_path_factory.mktemp('latents')
    vae = tiny.save_tiny_vae(folder / 'vae')
    helpers.invoke('dataset_tool.py', 'convert', '--source=digits', '--max-images=16', '--resolution=32x32',
                   f'--dest={folder}/pixels.zip')
    helpers.invoke('dataset_tool.py', 'encode', f'--source={folder}/pixels.zip', f'--dest={folder}/latents.zip',
                   f'--model-url={vae}')
    return folder / 'latents.zip'


def test_a_published_network_of_edm2_is_fine_tuned_on_few_latents(latents, tmp_path):
    """In the layout of the published pickles, of 1000 classes; then the run goes on without that file, which has gone."""
    torch.manual_seed(0)
    source = build_network(**varied(EDM2, classes=1000, channels=4, side=4, model_channels=32, channel_mult=[1, 2],
                                    attn_resolutions=[4], channels_per_head=32, use_fp16=True)).requires_grad_(False)
    source.unet.out_gain += 1
    source.train()(torch.zeros([1, 4, 4, 4]), torch.ones([1]), return_logvar=True)  # as trained: rows have their length
    path = tmp_path / 'edm2-img512-tiny.pkl'
    test_foreign.as_pickle(path, source, encoder=VAE)
    command = ['train_edm2.py', '--preset=digits', f'--data={latents}', f'--outdir={tmp_path}/run', '--batch=8',
               f'--transfer={path}', '--checkpoint=8', '--status=8', '--snapshot=16']
    out = helpers.invoke(*command, '--duration=8', '--lr=1e-9')
    assert 'the file has 1000 classes and the data 10; 10 by index' in out and 'up to 1e-09' in out
    state = Checkpoints(str(tmp_path / 'run')).load_newest()
    averages = [*state['ema'].values()]
    assert len(averages) == 2
    for weights in (state['net'], *averages):                  # the averages begin with the weights too
        for name, value in source.state_dict().items():
            if 'emb_label' not in name:
                torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3)
    os.remove(path)
    out = helpers.invoke(*command, '--duration=16', '--lr=1e-9')
    assert 'Resuming from 8 images' in out and 'Transfer' not in out
    first, second = read_options(str(tmp_path / 'run'))['starts']
    assert first['transfer']['classes'] == list(range(10)) and first['transfer']['source'] == 'edm2-img512-tiny.pkl'
    assert 'transfer' not in second and first['transfer']['changed'] == ['unet.emb_label.weight']
    net = load_snapshot(f'{tmp_path}/run/network-snapshot-0000000-0.050.pkl').net
    torch.testing.assert_close(net.unet.out_conv.weight, source.unet.out_conv.weight, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Digits of three classes and of two, and a snapshot that saw the former."""
    folder = tmp_path_factory.mktemp('trained')
    data = [helpers.write_digits(folder / 'digits.zip', 40), write_named(folder / 'named.zip', ['7', 'nine', 'three'])]
    helpers.invoke('train_edm2.py', *EDM2_RUN, f'--data={data[0]}', f'--outdir={folder}/run')
    return folder / 'run' / 'network-snapshot-0000000-0.050.pkl', data


EDM2_RUN = ['--preset=digits', '--batch=8', '--duration=16', '--snapshot=16', '--checkpoint=8', '--status=8']


def write_named(path, names, side=8):
    """Twelve images of classes of these names, gray."""
    with ArchiveWriter(path) as out:
        rows = []
        for i in range(12):
            out.add(f'{i}.png', encode_png(np.full([side, side, 3], 20 * i, np.uint8)))
            rows.append([f'{i}.png', i % len(names)])
        out.add_description({'labels': rows, 'class_names': names, 'classes': list(range(len(names)))})
    return str(path)


def test_an_exported_folder_is_a_start_and_another_start_is_another_run(trained, tmp_path):
    net, (digits, named) = trained
    helpers.invoke('snapshot_tool.py', 'convert', net, f'--dest={tmp_path}/exported')
    command = ['train_edm2.py', *EDM2_RUN, f'--data={named}', f'--outdir={tmp_path}/run']
    out = helpers.invoke(*command, f'--transfer={tmp_path}/exported')
    assert 'the file has 10 classes and the data 3' in out and 'that of the file ended at' in out
    error = helpers.fails(*command, f'--transfer={net}')
    assert error.startswith('Error: --transfer: ') and 'with other settings: transfer exported ->' in error
    assert '--transfer: ' in helpers.fails(*command)
    fresh = helpers.fails('train_edm2.py', *EDM2_RUN, f'--data={digits}', f'--outdir={net.parent}', f'--transfer={net}')
    assert fresh.startswith('Error: --transfer: ')             # a run that began without does not begin anew


def test_a_dry_run_shows_what_is_taken(trained, tmp_path):
    net, (_, named) = trained
    out = helpers.invoke('train_edm2.py', *EDM2_RUN, f'--data={named}', f'--outdir={tmp_path}/run', f'--transfer={net}', '-n')
    assert 'the file has 10 classes and the data 3' in out and '"parameters"' in out and os.listdir(tmp_path) == []


def test_classes_of_held_out_images_go_by_name(tmp_path):
    images, other = (open_dataset(write_named(tmp_path / f'{i}.zip', names)) for i, names in enumerate((
        ['cat', 'dog', 'owl'], ['Owl', 'cat'])))
    other.relabel(images.description(), 3)
    assert other.labels(range(4)).argmax(1).tolist() == [2, 0, 2, 0] and other.class_names == ['cat', 'dog', 'owl']
    with pytest.raises(UserError, match='fox, which is none of the 3 classes of 0'):
        open_dataset(write_named(tmp_path / '2.zip', ['fox', 'cat'])).relabel(images.description(), 3)


def test_other_trainings_fine_tune(trained, tmp_path):
    """Class-balancing diffusion, a baseline of distillation and a classifier, from others of three classes."""
    _, (_, named) = trained
    torch.save(filled(CBDM).model.state_dict(), tmp_path / 'ckpt.pt')
    flags = ['--train', '--conditional', f'--root={named}', '--data_type=zip', '--img_size=8', '--ch=32', '--ch_mult=1,1',
             '--attn=1', '--num_res_blocks=1', '--T=10', '--batch_size=4', '--total_steps=1', '--save_step=1',
             '--sample_step=0', '--dropout=0', '--num_workers=1', '--log_step=1', f'--transfer={tmp_path}/ckpt.pt']
    tuned = ['--finetune', '--cb', f'--finetuned_logdir={tmp_path}/tuned']
    torch.save(filled(GUIDED).model.state_dict(), tmp_path / 'guided.pt')
    keys = [f'{part}.{key}={value}' for part, values in (
        ('model', dict(GUIDED['network'], class_name=None, learn_sigma=None)), ('diffusion', dict(diffusion_steps=10,
         timestep_respacing=10))) for key, value in values.items() if value is not None]
    wide = ['--model=wrn-10-1', '--batch=4', '--duration=4', '--checkpoint=4', '--snapshot=4', f'--data={named}']
    helpers.invoke('synthetic_data/train_classifier.py', *wide, f'--outdir={tmp_path}/first')
    classifier = tmp_path / 'first' / 'network-snapshot-0000000.pkl'
    for script, *options in (
            ('long_tail/main.py', *flags, f'--logdir={tmp_path}/cbdm'),
            ('long_tail/main.py', *flags, f'--logdir={tmp_path}/none', *tuned),
            ('distillation/scripts/image_train.py', f'--transfer={tmp_path}/guided.pt', f'--data_dir={named}',
             f'--outdir={tmp_path}/baseline', '--config=yaml/cifar10_32/exp/CIFAR10-14M-Baseline.yaml', *keys,
             'model.resblock_updown=false', 'batch_size=4', 'total_steps=1', 'save_interval=1'),
            ('synthetic_data/train_classifier.py', *wide, f'--outdir={tmp_path}/second', f'--transfer={classifier}')):
        out = helpers.invoke(script, *options)
        assert 'Transfer from' in out and ' 0 changed, 0 new' in out, out
    assert (tmp_path / 'tuned' / 'ckpt_0.pt').exists()
