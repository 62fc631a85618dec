"""Reading the golden cases: every case and variant in the folder $GOLDEN (default tests/golden) is run."""

import dataclasses
import functools
import json
import os
import pathlib
import re

import fill
import numpy as np
import torch

FOLDER = pathlib.Path(os.environ.get('GOLDEN') or pathlib.Path(__file__).parent / 'golden').resolve()


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One golden case: its JSON, and its arrays as a plain dictionary."""

    name: str
    path: pathlib.Path
    json: dict

    @functools.cached_property
    def arrays(self) -> dict:
        npz = self.path.with_suffix('.npz')
        if not npz.exists():
            return {}
        with np.load(npz, allow_pickle=False) as z:
            return {key: z[key] for key in z.files}

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def __repr__(self):
        return self.name


def cases(room: str, pattern: str = '*') -> list[Case]:
    """Cases of a folder ('math', 'networks', 'pickles') whose file name matches `pattern`, e.g. 'edm2_sampler*'."""
    return [Case(path.stem, path, json.loads(path.read_text())) for path in sorted((FOLDER / room).glob(pattern + '.json'))]


def ids(case) -> str:
    """Test id of a case, or of a (case, variant) pair."""
    return '-'.join(str(part) for part in case) if isinstance(case, tuple) else str(case)


def variants(room: str, pattern: str, keys) -> list[tuple[Case, str]]:
    """(case, variant) pairs; `keys(case)` lists the variants of a case."""
    return [(case, key) for case in cases(room, pattern) for key in keys(case)]


def number_in(text: str, before: str, after: str = '') -> float:
    """The number that stands between two regular expressions in the words of a case: number_in('..., b=0.25, ...', 'b=')."""
    return float(re.search(before + r'(-?\d+(?:\.\d+)?(?:e-?\d+)?)' + after, text)[1])


def seeds_in(text: str) -> list[int]:
    """The seeds of 'seeds [0, 1, 5]', of 'torch.manual_seed(5)' or of 'random.seed(5)'."""
    listed = re.search(r'seeds \[([\d, ]+)\]|seed\((\d+)\)', text)
    return [int(seed) for seed in (listed[1] or listed[2]).split(',')]


def array_in(text: str) -> np.ndarray:
    """The array of the first "0.3*array('m7.emb',[11,3])" in the words of a case; without a factor it is 1."""
    factor, name, shape, seed = re.search(
        r"(?:([\d.]+)\s*\*\s*)?array\('([^']*)',\s*\[([\d, ]+)\](?:,\s*(\d+))?\)", text).groups()
    values = fill.array(name, [int(size) for size in shape.split(',')], int(seed or 0))
    return np.float32(factor or 1) * values


def make_input(rule: dict, made: dict) -> torch.Tensor:
    """One input of a network case, from its rule in the JSON (see the golden README)."""
    kind = rule['rule']
    if kind == 'values':
        x = torch.tensor(rule['values'], dtype=getattr(torch, rule.get('dtype', 'float32')))
    elif kind == 'array':
        x = torch.from_numpy(fill.array(rule['name'], rule['shape'], rule.get('seed', 0)))
    elif kind == 'uint8':
        x = fill.labels(rule['name'], int(np.prod(rule['shape'])), 256, rule.get('seed', 0))
        x = torch.from_numpy(x.reshape(rule['shape']).astype(np.uint8))
    elif kind in ('labels', 'onehot'):
        x = torch.from_numpy(fill.labels(rule['name'], rule['count'], rule['num_classes'], rule.get('seed', 0)))
        if kind == 'onehot':
            x = torch.nn.functional.one_hot(x, rule['num_classes']).to(torch.float32)
    else:
        raise ValueError(f'unknown input rule {kind!r}')
    if 'times_sigma_plus' in rule:
        x = x * (made['sigma'][:, None, None, None] + np.float32(rule['times_sigma_plus']))
    if rule.get('then') == 'torch.sigmoid':
        x = torch.sigmoid(x)
    return x


def make_inputs(rules: dict) -> dict:
    """All inputs of a network case by name; sigma first, since others are scaled by it."""
    made = {}
    for name in sorted(rules, key=lambda name: name != 'sigma'):
        made[name] = make_input(rules[name], made)
    return made


def relative_error(out, ref) -> float:
    """||out - ref|| / ||ref||: per image, the largest, for [N,C,H,W] with H > 1; over the whole array for all others."""
    out, ref = np.asarray(out, dtype=np.float64), np.asarray(ref, dtype=np.float64)
    assert out.shape == ref.shape, f'shape {out.shape} instead of {ref.shape}'
    if ref.ndim == 4 and ref.shape[2] > 1:
        out, ref = out.reshape(len(out), -1), ref.reshape(len(ref), -1)
    else:
        out, ref = out.reshape(1, -1), ref.reshape(1, -1)
    return float((np.linalg.norm(out - ref, axis=1) / np.maximum(np.linalg.norm(ref, axis=1), 1e-30)).max())
