"""Numbers that say how sure they are: estimates with a standard error, and shares."""

import math

Z = 1.959964  # 95% of a standard normal distribution lie within
MOST_PARTS = 50


class Estimate(float):
    """A number with a standard error, and an interval of 95%: the number +- z errors.

    parts  numbers whose mean has this error: those of groups of images, or of resamples, scaled.
           Of two sets that were made from the same seeds, their differences tell that of the
           numbers (`metrics.compare`)
    """

    def __new__(cls, value, error: float, parts=()):
        estimate = super().__new__(cls, value)
        estimate.error = float(error)
        estimate.parts = [float(part) for part in parts]
        return estimate

    def __getnewargs__(self):
        return float(self), self.error, self.parts

    @classmethod
    def of_images(cls, value, terms, num: int | None = None, error: float | None = None):
        """Of the share `terms` [n] that each image, in the order of their seeds, has in the value.

        The error is sd(terms) / sqrt(num), if it is not given. `num`: all images, of which the
        `terms` are of some.
        """
        terms = [float(term) for term in terms]
        count = len(terms)
        num = num or count
        mean = sum(terms) / count
        if error is None:
            spread = sum((term - mean) ** 2 for term in terms) / max(count - 1, 1)
            error = math.sqrt(spread / num)
        groups = min(MOST_PARTS, count)
        bounds = [i * count // groups for i in range(groups + 1)]
        scale = math.sqrt(count / num)
        parts = [value + scale * (sum(terms[start:stop]) / (stop - start) - mean)
                 for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        return cls(value, error, parts)

    @property
    def interval(self) -> tuple[float, float]:
        half = Z * self.error
        return self - half, self + half


class Share(float):
    """A share s of `num` trials: a float with Wilson's interval of 95%, which is right for few
    trials and for shares of 0 and 1 too:

        (s + z^2 / 2n +- z sqrt(s (1 - s) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    error  standard error, where it is another than that of independent trials; the interval is
           then that of as many trials as have it, and no more than `num`
    parts  as of an Estimate
    scale  100 for percent: of the value, the error and the interval
    """

    def __new__(cls, value, num: int, error: float | None = None, parts=(), scale: int = 1):
        share = super().__new__(cls, value)
        share.num = num
        share.error = error
        share.parts = [float(part) for part in parts]
        share.scale = scale
        return share

    def __getnewargs__(self):
        return float(self), self.num, self.error, self.parts, self.scale

    @property
    def interval(self) -> tuple[float, float]:
        s = self / self.scale
        trials = self.num
        if self.error and 0 < s < 1:
            trials = min(trials, s * (1 - s) * (self.scale / self.error) ** 2)
        n = trials / Z**2
        middle = s + 0.5 / n
        half = math.sqrt(s * (1 - s) / n + 0.25 / n**2)
        return (self.scale * max((middle - half) / (1 + 1 / n), 0.0),
                self.scale * min((middle + half) / (1 + 1 / n), 1.0))


def share_of(hits, scale: int = 1) -> Share:
    """The share of images that are hit, of `hits` [N] (bool) in the order of their seeds."""
    value = Estimate.of_images(scale * float(sum(hits)) / len(hits),
                               [scale * float(hit) for hit in hits])
    return Share(value, len(hits), value.error, value.parts, scale)


def with_intervals(values):
    """The values, dictionaries within dictionaries and lists, and NAME_low and NAME_high of those
    that are shares or estimates; NAME_se, the standard error, where there is one.
    """
    if isinstance(values, list):
        return [with_intervals(value) for value in values]
    if not isinstance(values, dict):
        return values
    out = {}
    for name, value in values.items():
        out[name] = with_intervals(value)
        if isinstance(value, Share | Estimate):
            out[f'{name}_low'], out[f'{name}_high'] = value.interval
            if value.error is not None:
                out[f'{name}_se'] = value.error
    return out


def parts_of(values: dict) -> dict[str, list[float]]:
    """{name: parts} of those that have some."""
    return {name: value.parts for name, value in values.items() if getattr(value, 'parts', ())}


def interval_of(value) -> str:
    """' (95%: 0.0497 to 0.281)' of a share or an estimate, nothing of other numbers."""
    if not isinstance(value, Share | Estimate):
        return ''
    return '  (95%: {:.3g} to {:.3g})'.format(*value.interval)


def percent(values: dict, name: str) -> str:
    """'12.50% (4.97% to 28.07%)' for a share in what `with_intervals` returned; files of earlier
    versions have no interval.
    """
    low, high = (values.get(f'{name}_{end}') for end in ('low', 'high'))
    return f'{values[name]:.2%}' + ('' if low is None else f' ({low:.2%} to {high:.2%})')
