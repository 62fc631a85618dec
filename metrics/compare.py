"""The results of two measurements side by side: differences, with intervals."""

import dataclasses
import math

from dnnlib import UserError, budget
from dnnlib.util import one_line
from metrics import compute
from metrics.shares import Estimate, Z

# What must agree for two numbers to be of the same thing, in words.
SAME = {'ref': 'references', 'ref_class': 'classes of the reference', 'protocol': 'protocols',
        'heldout': 'held-out images', 'data': 'training sets', 'num_images': 'numbers of images'}


@dataclasses.dataclass
class Difference:
    """Of one metric: the numbers of both, and second - first with its standard error (None: not
    known), from pairs of images of one seed if `paired`."""

    name: str
    first: float
    second: float
    error: float | None
    paired: bool

    @property
    def value(self) -> Estimate | float:
        value = self.second - self.first
        return value if self.error is None else Estimate(value, self.error)

    def sentence(self) -> str:
        """What the difference says."""
        better = getattr(compute.METRICS.get(self.name), 'better', 0)
        value = self.value
        if self.error is None:
            return f'{self.name}: of no known error, so {value:+.4g} may be chance'
        low, high = value.interval
        shown = f'{value:+.4g} (95%: {low:+.4g} to {high:+.4g})'
        if low <= 0 <= high:
            return f'{self.name}: no difference beyond chance, {shown}'
        verdict = {0: 'higher' if value > 0 else 'lower'}.get(
            better, 'better' if value * better > 0 else 'worse')
        return f'{self.name}: the second is {verdict} by more than chance, {shown}'


def read_results(path: str, field: str | None = None) -> dict:
    """A JSON file of results. Raises UserError that names it, the value of `field`, if it is
    something else."""
    try:
        content = budget.read_json(path)
        if isinstance(content, dict) and isinstance(content.get('results'), dict):
            return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'cannot be read ({one_line(error)})', field, path) from None
    raise UserError('holds no results of calculate_metrics.py', field, path)


def differences(first: dict, second: dict) -> list[Difference]:
    """Of all metrics that both have. Raises UserError if there are none."""
    results = first['results'], second['results']
    names = [name for name, value in results[0].items() if _is_metric(name, results[0])
             and _is_metric(name, results[1])]
    if not names:
        raise UserError('the two have no metric in common')
    same_seeds = first.get('seeds') is not None and first['seeds'] == second.get('seeds')
    rows = []
    for name in names:
        parts = [side.get('parts', {}).get(name, []) for side in (first, second)]
        paired = same_seeds and len(parts[0]) == len(parts[1]) > 1
        if paired:
            pairs = [b - a for a, b in zip(*parts, strict=True)]
            error = Estimate.of_images(0, pairs).error
        else:
            errors = [_error(name, side) for side in results]
            error = None if None in errors else math.hypot(*errors)
        rows.append(Difference(name, *(side[name] for side in results), error, paired))
    return rows


def _is_metric(name: str, results: dict) -> bool:
    is_number = isinstance(results.get(name), int | float)
    stem, _, end = name.rpartition('_')
    belongs = end in ('low', 'high', 'se', 'std') and stem in results
    return is_number and not belongs and name != 'num_images'


def _error(name: str, results: dict) -> float | None:
    """The standard error in a file; of shares without one, from their interval."""
    if isinstance(results.get(f'{name}_se'), int | float):
        return results[f'{name}_se']
    ends = [results.get(f'{name}_{end}') for end in ('low', 'high')]
    return None if None in ends else (ends[1] - ends[0]) / (2 * Z)


def notes(first: dict, second: dict) -> list[str]:
    """What makes the two hard to compare."""
    lines = [f'the {what} differ: {first.get(key)} and {second.get(key)}'
             for key, what in SAME.items() if first.get(key) != second.get(key)]
    theirs = second.get('detectors') or {}
    for name, detector in (first.get('detectors') or {}).items():
        if name in theirs and theirs[name].get('fingerprint') != detector.get('fingerprint'):
            lines.append(f'{name}: other weights, so its metrics cannot be compared')
    return lines
