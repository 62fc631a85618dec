"""select_1M.py: the selection is that of scoring in one go, whatever the batches and processes."""

import json

import numpy as np
import pytest
import torch
from helpers import run
from synthetic import SELECT, invoke, save_network, write_classes

from dnnlib import UserError
from synthetic_data import classify, select_1M
from training.networks.classifier import WideResNet


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
    """Images of three classes, weights like the published ones, and the network."""
    folder = tmp_path_factory.mktemp('scored')
    arrays = write_classes(folder / 'out', [40, 23, 31], side=8)
    torch.manual_seed(1)
    net = WideResNet('wrn-10-1', 3, normalize_input=True).eval()
    torch.save({f'module.{name}': value for name, value in net.state_dict().items()}, folder / 'pseudo.pt')
    return folder, arrays, net.requires_grad_(False)


def select(folder, out, *more):
    return ['--model_path', f'{folder}/pseudo.pt', '--data_dir', f'{folder}/out', '--output_dir', str(out), '--class_num', '3',
            *more]


def in_one_go(arrays, net, share):
    """Images and labels that scoring each class in one batch selects."""
    images, labels = [], []
    for label, array in enumerate(arrays):
        x = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
        order = np.argsort(-net(x).softmax(1)[:, label].numpy(), kind='stable')[:int(len(array) * share + 1e-6)]
        images.append(array[order])
        labels += [label] * len(order)
    return np.concatenate(images), np.array(labels)


@pytest.mark.parametrize('more, share', [([], 0.2), (['--top_scale=0.5', '--batch_size=7'], 0.5), (['--model=wrn-10-1'], 0.2)])
def test_the_selection_is_that_of_one_go(scored, tmp_path, more, share):
    folder, arrays, net = scored
    invoke(SELECT, *select(folder, tmp_path, *more))
    images, labels = in_one_go(arrays, net, share)
    with np.load(tmp_path / '1m.npz') as z:
        np.testing.assert_array_equal(z['image'], images)
        np.testing.assert_array_equal(z['label'], labels)
    report = json.loads((tmp_path / '1m-report.json').read_text())
    for label, row in enumerate(report['classes']):
        assert row['images'] == len(arrays[label]) == sum(row['histogram']) and row['selected'] == (labels == label).sum()
    assert all((tmp_path / f'1m-{name}.png').is_file() for name in ('confidence', 'best-worst'))


def test_as_many_others_are_selected(scored, tmp_path):
    """The worst come from the end of all, the least sure one first; random ones depend on the seed alone, fewer are among more."""
    folder, arrays, net = scored
    for name, *more in (('worst', '--order=worst'), ('random', '--order=random'), ('again', '--order=random', '--batch_size=7'),
                        ('fewer', '--order=random', '--top_scale=0.1'), ('other', '--order=random', '--seed=1')):
        invoke(SELECT, *select(folder, tmp_path / name, '--top_scale=0.2', *more))
    images = {path.parent.name: np.load(path)['image'] for path in tmp_path.glob('*/1m.npz')}
    ordered, labels = in_one_go(arrays, net, 1)
    worst = [ordered[labels == label][:-1 - int(len(array) * 0.2):-1] for label, array in enumerate(arrays)]
    np.testing.assert_array_equal(images['worst'], np.concatenate(worst))
    np.testing.assert_array_equal(images['random'], images['again'])
    assert len(images['other']) == len(images['random']) and not np.array_equal(images['other'], images['random'])
    drawn = {image.tobytes() for image in images['random']}
    assert {image.tobytes() for image in images['fewer']} < drawn <= {image.tobytes() for array in arrays for image in array}
    report = json.loads((tmp_path / 'worst' / '1m-report.json').read_text())
    assert report['order'] == 'worst' and all(row['lowest_selected'] <= row['highest_selected'] for row in report['classes'])


def test_the_selection_comes_last(scored, tmp_path, monkeypatch):
    """A study that finds it takes it for all that there is."""
    def stopped(*_):
        raise KeyboardInterrupt

    folder = scored[0]
    monkeypatch.setattr(select_1M, 'save_picture', stopped)
    with pytest.raises(KeyboardInterrupt):
        select_1M.run(None, f'{folder}/pseudo.pt', [f'{folder}/out'], str(tmp_path), 3, 0.2, 64, '1m')
    assert not (tmp_path / '1m.npz').exists() and (tmp_path / '1m-confidence.png').exists()


@pytest.mark.slow
def test_two_processes_select_the_same(scored, tmp_path):
    folder = scored[0]
    invoke(SELECT, *select(folder, tmp_path / 'one'))
    run(SELECT, *select(folder, tmp_path / 'two', '--batch_size=5', '--file_name=1m'), processes=2)
    assert (tmp_path / 'one' / '1m.npz').read_bytes() == (tmp_path / 'two' / '1m.npz').read_bytes()


def test_ties_are_broken_by_index():
    scores = np.array([0.5, 0.9, 0.9, 1.0, 0.9], np.float32)
    assert select_1M.select(scores, 0.4).tolist() == [3, 1]
    assert select_1M.select(scores, 0.6).tolist() == [3, 1, 2]
    assert select_1M.select(scores, 0.001).tolist() == [3]
    assert select_1M.select(scores, 0.6, 'worst').tolist() == [0, 1, 2]
    assert [select_1M.surest(keys)[:2].tolist() for keys in (scores, -scores)] == [[3, 1], [0, 1]]
    row = select_1M.report(scores, scores[[1, 3]])
    assert row['ties_at_lowest'] == 3 and row['histogram'][-1] == 1 and sum(row['histogram']) == 5


def test_published_weights_and_snapshots_open(scored, trained, tmp_path):
    folder, _, net = scored
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(classify.open_classifier(f'{folder}/pseudo.pt', 'wrn-10-1', 3)(x), net(x))
    path = str(trained / 'network-snapshot-0000000.pkl')
    assert classify.open_classifier(path, 'wrn-10-1', 10).num_classes == 10
    for arguments, words in (((path, 'wrn-16-1'), 'holds a wrn-10-1'), ((path, None, 3), 'of 10 classes, not of 3'),
                             ((save_network(tmp_path / 'n.pkl'),), 'no classifier')):
        with pytest.raises(UserError) as error:
            classify.open_classifier(*arguments)
        assert words in str(error.value)
