"""Shares of images or points, and what they say of the share of all that there could be."""

import math

Z = 1.959964  # 95% of a standard normal distribution lie within


class Share(float):
    """A share s of `num` trials: a float with Wilson's interval of 95%, which is right for few
    trials and for shares of 0 and 1 too:

        (s + z^2 / 2n +- z sqrt(s (1 - s) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """

    def __new__(cls, value, num: int):
        share = super().__new__(cls, value)
        share.num = num
        return share

    def __getnewargs__(self):
        return float(self), self.num

    @property
    def interval(self) -> tuple[float, float]:
        n = self.num / Z**2
        middle = self + 0.5 / n
        half = math.sqrt(self * (1 - self) / n + 0.25 / n**2)
        return max((middle - half) / (1 + 1 / n), 0.0), min((middle + half) / (1 + 1 / n), 1.0)


def with_intervals(values):
    """The values, dictionaries within dictionaries and lists, and NAME_low and NAME_high of those
    that are shares.
    """
    if isinstance(values, list):
        return [with_intervals(value) for value in values]
    if not isinstance(values, dict):
        return values
    out = {}
    for name, value in values.items():
        out[name] = with_intervals(value)
        if isinstance(value, Share):
            out[f'{name}_low'], out[f'{name}_high'] = value.interval
    return out


def interval_of(value) -> str:
    """' (95%: 0.0497 to 0.281)' of a share, nothing of other numbers."""
    if not isinstance(value, Share):
        return ''
    return '  (95%: {:.3g} to {:.3g})'.format(*value.interval)


def percent(values: dict, name: str) -> str:
    """'12.50% (4.97% to 28.07%)' for a share in what `with_intervals` returned; files of earlier
    versions have no interval.
    """
    low, high = (values.get(f'{name}_{end}') for end in ('low', 'high'))
    return f'{values[name]:.2%}' + ('' if low is None else f' ({low:.2%} to {high:.2%})')
