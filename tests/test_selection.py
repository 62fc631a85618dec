"""Rules that choose images: long tails, the subsets of the memorization study, mixtures, against the golden lists."""

import re

import golden_cases
import numpy as np
import pytest
from helpers import script_module

from data_utils import selection
from dnnlib import UserError
from long_tail.imbalance import class_counts, long_tailed

mixture = script_module('distillation/scripts/mix_data.py').mixture

# --- Long tail --------------------------------------------------------------------------------------------------------


def _long_tail_name(name):
    """'cifar100.exp.0.01' -> (100, 'exp', 0.01)"""
    data, kind, factor = name.split('.', 2)
    return int(re.search(r'\d+', data)[0]), kind, float(factor)


@pytest.mark.parametrize('case', golden_cases.cases('math', 'long_tail*'), ids=str)
def test_long_tail_counts(case):
    for name, counts in case.json['img_num_per_cls'].items():
        assert class_counts(case.json['inputs']['count_table_dataset_size'], *_long_tail_name(name)).tolist() == counts


@pytest.mark.parametrize('case, name', golden_cases.variants('math', 'long_tail*', lambda c: c.json['selection']),
                         ids=golden_cases.ids)
def test_long_tail_selection(case, name):
    classes, kind, factor = _long_tail_name(name)
    labels = case.arrays[f'labels{classes}']
    chosen = long_tailed(labels, classes, kind, factor)
    counts = class_counts(len(labels), classes, kind, factor)
    np.testing.assert_array_equal(chosen, case.arrays[f'{name}.indices'])
    assert counts.tolist() == case.json['selection'][name]['nums']
    # The reference repeats each class `count` times even where a class has fewer images.
    np.testing.assert_array_equal(np.repeat(np.arange(classes), counts), case.arrays[f'{name}.targets'])
    assert (np.diff(labels[chosen]) >= 0).all()


def test_bad_long_tails():
    labels = np.arange(100) % 10
    assert len(long_tailed(labels, 10, 'exp', 0.1)) == class_counts(100, 10, 'exp', 0.1).sum()
    with pytest.raises(UserError, match='imb_type'):
        class_counts(100, 10, 'linear', 0.5)
    with pytest.raises(UserError, match='imb_factor'):
        class_counts(100, 10, 'exp', 100)


# --- Subsets of the memorization study --------------------------------------------------------------------------------


def _chosen(case, key):
    """(indices, labels) or a list for 'diversity.c2.max100.labels', 'balanced.max100.indices', 'random.c5', 'mix...'"""
    labels, rule = case.arrays['labels'], key.split('.')[0]
    numbers = {name: float(value) for name, value in re.findall(r'\.([a-z]+)(\d+(?:\.\d+)?)', key)}
    if rule == 'random':
        return selection.random_labels(len(case.arrays[key]), int(numbers['c']))
    if rule == 'mix':
        n = int(numbers['n'])
        return mixture(n, numbers['r'], n, n)[key.endswith('.synthetic')]
    if rule == 'diversity':
        indices = selection.diversity_subset(labels, int(numbers['max']), int(numbers['c']))
    else:
        indices = selection.balanced_subset(labels, int(numbers['max']))
    return indices if key.endswith('.indices') else labels[indices]


@pytest.mark.parametrize('case, key', golden_cases.variants(
    'math', 'subset_rules*', lambda c: [key for key in c.arrays if key != 'labels']), ids=golden_cases.ids)
def test_subset_rule(case, key):
    np.testing.assert_array_equal(_chosen(case, key), case.arrays[key])


@pytest.mark.parametrize('case', golden_cases.cases('math', 'subset_rules*'), ids=str)
def test_interpolation_counts(case):
    for key, counts in case.json['interpolation_counts'].items():
        if key != 'format':
            max_images, rate = key.split(':')
            assert selection.interpolation_counts(int(max_images), float(rate)) == tuple(counts), key


def test_one_class():
    labels = np.array([1, 0, 1, 1])
    assert selection.one_class_subset(labels, 1, 2).tolist() == [0, 2]


@pytest.mark.parametrize('call', [
    lambda labels: selection.balanced_subset(labels, 15),
    lambda labels: selection.diversity_subset(labels, 50, 11),
    lambda labels: selection.one_class_subset(labels, 12, 5),
    lambda labels: selection.one_class_subset(labels, 1, 11),
    lambda labels: selection.interpolation_counts(100, 1.5),
    lambda labels: mixture(100, 0.5, 40, 100),
    lambda labels: mixture(100, 1.5, 400, 100),
    lambda labels: selection.animal_counts('fish', 10)])
def test_impossible_selections_are_refused(call):
    with pytest.raises(UserError):
        call(np.arange(100) % 10)


@pytest.mark.parametrize('case', golden_cases.cases('math', 'imagenet_animal_classes*'), ids=str)
def test_animal_classes(case):
    table = selection.animal_classes()
    assert {animal: entry['wnids'] for animal, entry in table.items()} == case.json['classes']
    assert {animal: entry['label'] for animal, entry in table.items()} == case.json['cifar10_label']
    assert {animal: len(entry['wnids']) for animal, entry in table.items()} == case.json['counts']


@pytest.mark.parametrize('case', golden_cases.cases('math', 'imagenet_sample_counts*'), ids=str)
def test_animal_sample_counts(case):
    for key, entry in case.json['counts'].items():
        animal, total = key.split(':')
        counts = selection.animal_counts(animal, int(total))
        assert list(counts) == selection.animal_classes()[animal]['wnids']
        assert list(counts.values()) == entry['per_subclass'] and len(counts) == entry['subclasses']
