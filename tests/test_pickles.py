"""Network pickles of EDM and EDM2: the same numbers, and no code from the file."""

import io
import os
import pickle

import fill
import golden_cases
import pytest
import torch

from dnnlib import UserError
from training.snapshot import load_snapshot


@pytest.mark.parametrize('case', golden_cases.cases('pickles'), ids=str)
def test_published_layout(case):
    net = load_snapshot(str(case.path.with_suffix('.pkl'))).net
    assert type(net).__name__ == case.json['reference']['class']
    assert not net.training and all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert shapes == {name: shape['shape'] if isinstance(shape, dict) else shape for name, shape in case.json['state'].items()}
    for name, call in case.json['calls'].items():
        half = f'{name}_float32' in case.arrays                  # we compute in float32: compare with that row
        if half or name not in case.arrays:
            continue
        out = eval(call, {'net': net, 'net32': net, 'torch': torch}, golden_cases.make_inputs(case.json['inputs']))
        assert golden_cases.relative_error(out, case.arrays[name]) <= 1e-5


def test_source_text_in_the_file_is_not_run(tmp_path):
    """Real files carry Python source where the samples say it was removed."""
    (case, *_) = golden_cases.cases('pickles', 'edm_*') or pytest.skip('no golden pickles')
    data = case.path.with_suffix('.pkl').read_bytes()
    text = f'open({str(tmp_path / "evil")!r}, "w")'.encode()
    old = b'# source removed'
    assert data.count(old) >= 1
    marker = b'\x8c' + bytes([len(old)]) + old                   # SHORT_BINUNICODE
    data = data.replace(marker, b'X' + len(text).to_bytes(4, 'little') + text)
    data = _without_frames(data)
    (tmp_path / 'net.pkl').write_bytes(data)
    net = load_snapshot(str(tmp_path / 'net.pkl')).net
    assert not (tmp_path / 'evil').exists()
    weight = dict(net.named_parameters())['model.map_layer0.weight']
    assert torch.equal(weight, torch.from_numpy(fill.value('model.map_layer0.weight', weight.shape)))


def _without_frames(data):
    """The pickle without its framing, whose lengths no longer fit."""
    import pickletools
    out, position = io.BytesIO(), 0
    ops = list(pickletools.genops(data))
    for (op, _, start), following in zip(ops, [*(o[2] for o in ops[1:]), len(data)], strict=True):
        if op.name != 'FRAME':
            out.write(data[start:following])
        position = following
    assert position == len(data)
    return out.getvalue()


class _Call:
    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize('make', [
    lambda path: _Call(os.mkdir, path), lambda path: _Call(eval, f'__import__("os").mkdir({path!r})'),
    lambda path: {'ema': _Call(os.mkdir, path)}, lambda path: {'ema': {'weights': 1}}, lambda path: [1, 2]])
def test_hostile_and_foreign_pickles_end_in_one_line(tmp_path, make):
    (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(make(str(tmp_path / 'made'))))
    with pytest.raises(UserError, match='evil.pkl') as error:
        load_snapshot(str(tmp_path / 'evil.pkl'))
    assert '\n' not in str(error.value) and not (tmp_path / 'made').exists()


@pytest.mark.parametrize('case', golden_cases.cases('pickles'), ids=str)
def test_truncated_files_end_in_one_line(tmp_path, case):
    data = case.path.with_suffix('.pkl').read_bytes()
    for place in range(1, len(data), len(data) // 20):
        (tmp_path / 'cut.pkl').write_bytes(data[:place])
        with pytest.raises(UserError, match='cut.pkl') as error:
            load_snapshot(str(tmp_path / 'cut.pkl'))
        assert '\n' not in str(error.value)
