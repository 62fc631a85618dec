"""From features to numbers: the metrics by name, what each needs, and their values.

To add one: a function, and a line in METRICS. Whoever measures takes all of them by name:

    statistics = measure(batches, num, detectors, **needs(metrics, protocol))
    reference = complete(reference, metrics, detectors, open_images)
    values = evaluate(metrics, statistics, reference, protocol, device, heldout)
"""

import dataclasses
from collections.abc import Callable, Iterable

from dnnlib import UserError, lazy
from dnnlib.util import subset

with lazy.imports():
    import torch

    from metrics import generalization, kernels, precision_recall
    from metrics.detectors import PROTOCOLS, Protocol
    from metrics.features import Detectors, measure_images
    from metrics.frechet import EVALUATED, influence, standard_error
    from metrics.inception_score import inception_score
    from metrics.statistics import SPACES, FeatureSums, Statistics
    from metrics.vendi import vendi

from metrics.recognition import Recognizer
from metrics.shares import Estimate, share_of

# --- The metrics: (generated, real, space, protocol, device, held out) -> {name: value} ----------


def distance(generated: Statistics, real: Statistics, space, *_) -> dict:
    """Frechet distance of the Gaussians of a space; with an error, where there are features."""
    value = generated.gaussians[space].distance(real.gaussians[space])
    return {space: with_error(value, generated, real, space)}


def with_error(value: float, generated: Statistics, real: Statistics, space) -> float:
    """The Frechet distance with its standard error, if there are features of generated images."""
    features = generated.features.get(space, generated.samples.get(space))
    if features is None or len(features) < 2:
        return value
    gaussian, reference = (side.gaussians[space] for side in (generated, real))
    error, terms = standard_error(features, gaussian.num, gaussian.mu, gaussian.sigma,
                                  reference.mu, reference.sigma)
    return Estimate.of_images(value, terms, gaussian.num, error)


def unlimited(generated: Statistics, real: Statistics, space, *_) -> dict:
    """Frechet distance of infinitely many images (arXiv 1911.07023): what the distances of N, N/2,
    ... N/MOST_SPLITS images tend to, a line in 1 / N. That of N/i is the mean over i disjoint
    parts of all images, where what is linear in the images is the same for all i.
    """
    features = generated.features[space]
    num = len(features)
    reference = real.gaussians[space]
    if num < 2 * MOST_SPLITS:
        raise UserError(f'{space}_inf needs at least {2 * MOST_SPLITS} images, there are {num}')
    order = subset_order(num)
    means = []
    for count in range(1, MOST_SPLITS + 1):
        parts = []
        for rows in order.tensor_split(count):
            sums = FeatureSums()
            for chunk in rows.split(4096):
                sums.add(features[chunk])
            parts.append(sums.gaussian().distance(reference))
        means.append(sum(parts) / count)
    counts = torch.arange(1.0, MOST_SPLITS + 1, dtype=torch.float64)
    slopes = counts - counts.mean()
    values = torch.tensor(means, dtype=torch.float64)
    slope = (slopes @ values / slopes.square().sum()).item()
    value = values.mean().item() - slope * counts.mean().item()
    plain = generated.gaussians[space]
    # What is taken off is as noisy as what is quadratic in the images: the plain error has both.
    terms = influence(features[::-(-num // EVALUATED)], plain.mu, plain.sigma, reference.mu,
                      reference.sigma)
    return {f'{space}_inf': Estimate.of_images(value, terms, num)}


def subset_order(num: int):
    """Numbers 0..num-1 in a random order, int64 tensor, always the same."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(0))


def score(generated: Statistics, real, space, protocol: Protocol, *_) -> dict:
    """Inception Score, and its spread over the parts."""
    probs = generated.features[protocol.probs]
    if len(probs) < 2:
        raise UserError('the Inception Score of one image means nothing: it is 1')
    scores = inception_score(probs, protocol.parts(len(probs)))
    spread = scores.std(correction=int(protocol.unbiased))
    return {'is': scores.mean().item(), 'is_std': spread.item()}


def compared(real: Statistics, values: torch.Tensor) -> torch.Tensor:
    """Those of the `values` [n, ...] of a reference (features, labels) that measures see which
    depend on their number: of no more images than the protocol compares with, if they are kept of
    more for other measures.
    """
    limit = real.meta.get('compared')
    if limit is None:
        return values
    return values[subset(len(values), limit, real.meta.get('seed', 0))]


def _features(space, device, *sides: Statistics):
    """Features [N, D] of all images of each side."""
    return (side.features[space].to(device) for side in sides)


def _sides(generated, real, space, device):
    """Features of a reference, see `compared`, and of generated images."""
    return compared(real, real.features[space]).to(device), generated.features[space].to(device)


def manifold(generated: Statistics, real: Statistics, space, protocol: Protocol, device, *_):
    """Improved precision and recall in a space."""
    precision, recall = precision_recall.precision_recall(
        *_sides(generated, real, space, device), protocol.k, protocol.strict)
    return {f'precision{SUFFIXES[space]}': precision, f'recall{SUFFIXES[space]}': recall}


def coverage(generated: Statistics, real: Statistics, space, protocol, device, *_) -> dict:
    """Density and coverage in a space."""
    density, covered = precision_recall.density_coverage(*_sides(generated, real, space, device))
    return {f'density{SUFFIXES[space]}': density, f'coverage{SUFFIXES[space]}': covered}


def kid(generated: Statistics, real: Statistics, space, protocol, device, *_) -> dict:
    """Kernel distance of the features of a space; pixels count from 0 to 1, since the kernel adds
    a one to their products.
    """
    largest = 255 if space == 'fd_pixels' else 1
    ref, gen = (side / largest for side in _sides(generated, real, space, device))
    return {f'kid{SUFFIXES[space]}': kernels.kid(gen, ref)}


def cmmd(generated: Statistics, real: Statistics, space, protocol, device, *_) -> dict:
    """CMMD, of CLIP's features."""
    ref, gen = _sides(generated, real, space, device)
    return {'cmmd': kernels.cmmd(gen, ref)}


def diversity(generated: Statistics, real, space, protocol, device, *_) -> dict:
    """Vendi score in a space."""
    return {f'vendi{SUFFIXES[space]}': vendi(generated.features[space].to(device))}


def authenticity(generated: Statistics, real: Statistics, space, protocol, device, *_) -> dict:
    """AuthPct in a space; `real` are the training images."""
    score = generalization.authpct(*_features(space, device, generated, real))
    return {f'authpct{SUFFIXES[space]}': score}


def copying(generated: Statistics, real: Statistics, space, protocol, device, heldout) -> dict:
    """CT in a space."""
    score = generalization.ct(*_features(space, device, generated, real, heldout))
    return {f'ct{SUFFIXES[space]}': score}


def likelihood(generated: Statistics, real: Statistics, space, protocol, device, heldout) -> dict:
    """FLD and its generalisation gap in a space."""
    value, gap = generalization.fld(*_features(space, device, generated, real, heldout))
    return {f'fld{SUFFIXES[space]}': value, f'fld_gap{SUFFIXES[space]}': gap}


def recognition(generated: Statistics, real: Statistics, space, *_) -> dict:
    """Accuracy on the generated images of a classifier that is trained on the real ones."""
    for name, side in (('the images have', generated), (f'{real.path} has', real)):
        if side.labels is None:
            raise UserError(f'recognition: {name} no labels')
    recognizer = Recognizer(compared(real, real.features[space]), compared(real, real.labels))
    recognised = recognizer.recognised(generated.features[space], generated.labels)
    return {'recognition': share_of(recognised)}


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is computed, and of what.

    space      kind of features; None: the class probabilities of the generated images, whichever
               the protocol takes
    generated  what it needs of the generated images: `gaussians`, `features` of all, or `samples`:
               features of some
    real       what it needs of the reference: `gaussians` or `features`, which are of as many
               images as the protocol compares with, unless `training`
    training   whether the reference is the training set, and features of all its images are needed
    heldout    whether it needs images that were never trained on, too
    better     1: more is better, -1: less is, 0: neither
    """

    function: Callable
    space: str | None
    generated: tuple = ('features',)
    real: tuple = ('features',)
    training: bool = False
    heldout: bool = False
    better: int = 0

    @property
    def detector(self) -> str:
        return SPACES[self.space or 'softmax'][0]


# Space -> what the names of its metrics end in.
SUFFIXES = {'fid': '', 'fd_dinov2': '_dinov2', 'fd_dinov2_base': '_dinov2_base',
            'fd_clip': '_clip', 'fd_pixels': '_pixels', 'fd_own': '_own'}
FEWEST_SCORED = 1000
MOST_SPLITS = 5
FRECHET = ('fid', 'sfid', *[space for space in SUFFIXES if space != 'fid'])
# What there is of the features of every space in SUFFIXES.
IN_EACH = {
    **dict.fromkeys(('precision', 'recall'), dict(function=manifold, better=1)),
    **dict.fromkeys(('density', 'coverage'), dict(function=coverage, better=1)),
    'kid': dict(function=kid, better=-1),
    'vendi': dict(function=diversity, real=(), better=1),
    'authpct': dict(function=authenticity, training=True, better=1),
    'ct': dict(function=copying, training=True, heldout=True),
    'fld': dict(function=likelihood, training=True, heldout=True, better=-1),
    'fld_gap': dict(function=likelihood, training=True, heldout=True),
}
METRICS = {
    **{space: Metric(distance, space, ('gaussians', 'samples'), ('gaussians',), better=-1)
       for space in FRECHET},
    **{f'{space}_inf': Metric(unlimited, space, ('gaussians', 'features'), ('gaussians',),
                              better=-1)
       for space in FRECHET},
    'is': Metric(score, None, real=(), better=1),
    **{f'{name}{suffix}': Metric(space=space, **values)
       for space, suffix in SUFFIXES.items() for name, values in IN_EACH.items()},
    'cmmd': Metric(cmmd, 'fd_clip', better=-1),
    'recognition': Metric(recognition, 'fd_pixels', better=1),
}


def listing() -> str:
    """All names in a line."""
    suffixes = ', '.join(filter(None, SUFFIXES.values()))
    alone = [name for name in METRICS if METRICS[name].function in (score, cmmd, recognition)]
    return (f'{",".join(FRECHET)}, each with _inf too, {",".join(alone)}, and '
            f'{",".join(IN_EACH)}, each with one of {suffixes} too')


def is_free(metrics: Iterable[str]) -> bool:
    """Whether none of them needs a reference."""
    return not any(METRICS[name].real for name in metrics)


def parse_metrics(text: str) -> list[str]:
    """'fid,is' -> ['fid', 'is']. Raises ValueError that lists what there is."""
    names = [name.strip() for name in str(text).split(',') if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f'no metric {unknown[0]!r}; there are {listing()}')
    if not names:
        raise ValueError('no metrics given')
    return list(dict.fromkeys(names))


def needs(metrics: Iterable[str], protocol: Protocol | None = None,
          stored: Statistics | None = None) -> dict[str, list[str]]:
    """{'gaussians', 'features', 'samples'}: the spaces that `measure` has to find, but for what is
    `stored`.

    With a protocol of the generated images, without of the reference, where some need nothing.
    """
    spaces = {'gaussians': {}, 'features': {}, 'samples': {}}
    for metric in map(METRICS.get, metrics):
        for kind in metric.generated if protocol else metric.real:
            space = metric.space or protocol.probs
            if space not in getattr(stored, kind, {}):
                spaces[kind][space] = True
    spaces['samples'] = {space: True for space in spaces['samples']
                         if space not in spaces['features']}
    return {kind: [*names] for kind, names in spaces.items()}


def missing_in(reference: Statistics, metrics) -> dict[str, list[str]]:
    """What of `needs(metrics)` a reference lacks. UserError if it has no images to find it in."""
    missing = needs(metrics, stored=reference)
    for metric in map(METRICS.get, metrics):
        kept = len(reference.features.get(metric.space, ()))
        gaussian = reference.gaussians.get(metric.space)
        if metric.training and kept and gaussian and gaussian.num and kept < gaussian.num:
            if reference.images is None:
                raise UserError(
                    f'{reference.path} has the features of {kept} of {gaussian.num} images, and '
                    'metrics of copies need those of all training images: make it again for these '
                    'metrics, or give the images')
            missing['features'].append(metric.space)
    missing['features'] = [*dict.fromkeys(missing['features'])]
    if reference.images is None and any(missing.values()):
        stored = [*reference.gaussians, *(f'features of {space}' for space in reference.features)]
        raise UserError(f'{reference.path} has nothing for {",".join(metrics)}, only '
                        f'{", ".join(stored)}; make statistics for it, or give the images')
    return missing


def kept_features(metrics, rules: Protocol, seed: int = 0) -> tuple[int | None, dict]:
    """Of how many images of a reference the features are kept (None: all), and what its `meta` has
    to say of that, see `compared`.
    """
    if any(METRICS[name].training for name in metrics):
        return None, {'compared': rules.manifold, 'seed': seed}
    return rules.manifold, {}


def of_heldout(metrics) -> list[str]:
    """Those of the metrics that need images that were never trained on."""
    return [name for name in metrics if METRICS[name].heldout]


def require_heldout(metrics, heldout):
    """Raises UserError if some need images that were never trained on, and there are none."""
    if heldout is None and (names := of_heldout(metrics)):
        raise UserError(f'needs images that were never trained on, for {",".join(names)}',
                        'heldout')


def same_protocol(reference: Statistics, protocol: str, metrics):
    """Raises UserError if Inception saw the images of the reference in another way."""
    theirs = reference.protocol or protocol
    if PROTOCOLS[theirs].prepare is not PROTOCOLS[protocol].prepare \
            and any('inception' in SPACES.get(METRICS[name].space, ()) for name in metrics):
        raise UserError(f'{reference.path} is of the protocol {theirs}, which resizes and scales '
                        f'images in another way than {protocol}: choose {theirs}, or make the '
                        f'statistics again by {protocol}', 'protocol')


def complete(reference: Statistics, metrics, detectors: Detectors, open_images,
             **options) -> Statistics:
    """The reference with all that the metrics need, measured where its statistics lack it.

    `open_images(path)` opens its images; `options` go to `measure_images`. Raises UserError if
    something is missing and there are no images.
    """
    missing = missing_in(reference, metrics)
    if not any(missing.values()):
        return reference
    keep_num, meta = kept_features(metrics, detectors.rules, options.get('seed', 0))
    options.setdefault('keep_num', keep_num)
    measured = measure_images(open_images(reference.images), detectors, **missing, **options)
    return dataclasses.replace(reference, gaussians=reference.gaussians | measured.gaussians,
                               features=reference.features | measured.features,
                               protocol=reference.protocol or measured.protocol,
                               meta=reference.meta | meta,
                               labels=measured.labels if missing['features'] else reference.labels)


def evaluate(metrics, generated: Statistics, reference: Statistics, protocol: Protocol,
             device='cpu', heldout: Statistics | None = None) -> dict[str, float]:
    """{metric: value}, precision and recall together; 'is' also gives 'is_std', its spread.

    Values are floats, or `Estimate`s and `Share`s, which say how sure they are. Raises UserError
    if images and reference do not fit each other.
    """
    require_heldout(metrics, heldout)
    values = {}
    chosen = {(METRICS[name].function, METRICS[name].space): METRICS[name] for name in metrics}
    for metric in chosen.values():
        values |= metric.function(generated, reference, metric.space, protocol, device, heldout)
    return {name: value for name, value in values.items() if name in {*metrics, 'is_std'}}


def rank_note(what: str, gaussian) -> list[str]:
    """A line, if so few images make no covariance of full rank."""
    if gaussian.num is None or gaussian.num > gaussian.dim:
        return []
    return [f'{what}{gaussian.num} images for {gaussian.dim} dimensions: the covariance has rank '
            f'{gaussian.num - 1} at most, so the distance is biased upwards and comparable only '
            'with the same number of images']


def score_note(generated: Statistics, protocol: Protocol) -> list[str]:
    """A line, if a part of the images is too small for an Inception Score."""
    if protocol.probs not in generated.features:
        return []
    num = len(generated.features[protocol.probs])
    bounds = protocol.parts(num)
    least = min(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    if least >= FEWEST_SCORED:
        return []
    return [f'is: a part of {num} images has {least}, and its score is at most that; of fewer '
            f'than {FEWEST_SCORED}, one for each class of Inception, it says little']


def notes(generated: Statistics, reference: Statistics, detectors: Detectors) -> list[str]:
    """What a reader should know: singular covariances, references made with other weights or
    rules.
    """
    lines = []
    theirs = reference.protocol or f'no protocol, and taken as of {detectors.protocol}'
    if 'inception' in detectors.loaded and theirs != detectors.protocol and reference.gaussians:
        lines.append(f'images of the protocol {detectors.protocol}, {reference.path} of {theirs}')
    for space, gaussian in generated.gaussians.items():
        lines += rank_note(f'{space}: ', gaussian)
        if space in reference.gaussians:
            lines += rank_note(f'{space}, {reference.path}: ', reference.gaussians[space])
    lines += score_note(generated, detectors.rules)
    stored = reference.meta.get('detectors', {})
    for name, detector in detectors.description().items():
        if name in stored and stored[name]['fingerprint'] != detector['fingerprint']:
            lines.append(f'{name}: the reference was made with other weights '
                         f'({stored[name]["weights"]}); distances mean nothing')
    return lines
