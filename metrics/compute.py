"""From features to numbers: the metrics by name, what each needs, and their values."""

import dataclasses
from collections.abc import Callable, Iterable

from dnnlib import UserError, lazy

with lazy.imports():
    from metrics.detectors import PROTOCOLS, Protocol
    from metrics.features import Detectors, measure_images
    from metrics.inception_score import inception_score
    from metrics.precision_recall import precision_recall
    from metrics.statistics import SPACES, Statistics

from metrics.recognition import Recognizer
from metrics.shares import Share

# --- The metrics: (generated, real, space, protocol, device) -> {name: value} -------------------


def distance(generated: Statistics, real: Statistics, space, *_) -> dict:
    """Frechet distance of the Gaussians of a space."""
    return {space: generated.gaussians[space].distance(real.gaussians[space])}


def score(generated: Statistics, real, space, protocol: Protocol, *_) -> dict:
    """Inception Score, and its spread over the parts."""
    probs = generated.features[protocol.probs]
    if len(probs) < 2:
        raise UserError('the Inception Score of one image means nothing: it is 1')
    scores = inception_score(probs, protocol.parts(len(probs)))
    spread = scores.std(correction=int(protocol.unbiased))
    return {'is': scores.mean().item(), 'is_std': spread.item()}


def manifold(generated: Statistics, real: Statistics, space, protocol: Protocol, device) -> dict:
    """Improved precision and recall in a space."""
    ref, gen = (side.features[space].to(device) for side in (real, generated))
    precision, recall = precision_recall(ref, gen, protocol.k, protocol.strict)
    return {f'precision{MANIFOLDS[space]}': precision, f'recall{MANIFOLDS[space]}': recall}


def recognition(generated: Statistics, real: Statistics, space, *_) -> dict:
    """Accuracy on the generated images of a classifier that is trained on the real ones."""
    for name, side in (('the images have', generated), (f'{real.path} has', real)):
        if side.labels is None:
            raise UserError(f'recognition: {name} no labels')
    recognizer = Recognizer(real.features[space], real.labels)
    recognised = recognizer.recognised(generated.features[space], generated.labels)
    return {'recognition': Share(recognised.mean(), len(recognised))}


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is computed, and of what: `gaussians` or `features` of a space.

    `space` None: the class probabilities of the generated images, whichever the protocol takes.
    """

    function: Callable
    space: str | None
    kind: str = 'features'

    @property
    def detector(self) -> str:
        return SPACES[self.space or 'softmax'][0]


# Space -> what the names of its precision and recall end in.
MANIFOLDS = {'fid': '', 'fd_dinov2': '_dinov2', 'fd_pixels': '_pixels'}
FEWEST_SCORED = 1000
FRECHET = ('fid', 'sfid', 'fd_dinov2', 'fd_pixels')
METRICS = {
    **{space: Metric(distance, space, 'gaussians') for space in FRECHET},
    'is': Metric(score, None),
    **{f'{name}{suffix}': Metric(manifold, space)
       for space, suffix in MANIFOLDS.items() for name in ('precision', 'recall')},
    'recognition': Metric(recognition, 'fd_pixels'),
}


def parse_metrics(text: str) -> list[str]:
    """'fid,is' -> ['fid', 'is']. Raises ValueError that lists what there is."""
    names = [name.strip() for name in str(text).split(',') if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f'no metric {unknown[0]!r}; there are {",".join(METRICS)}')
    if not names:
        raise ValueError('no metrics given')
    return list(dict.fromkeys(names))


def needs(metrics: Iterable[str], protocol: Protocol | None = None,
          stored: Statistics | None = None) -> dict[str, list[str]]:
    """{'gaussians', 'features'}: the spaces that `measure` has to find, but for what is `stored`.

    With a protocol of the generated images, without of the reference, where 'is' needs nothing.
    """
    spaces = {'gaussians': {}, 'features': {}}
    for metric in map(METRICS.get, metrics):
        space = metric.space or (protocol and protocol.probs)
        if space and space not in getattr(stored, metric.kind, {}):
            spaces[metric.kind][space] = True
    return {kind: [*names] for kind, names in spaces.items()}


def missing_in(reference: Statistics, metrics) -> dict[str, list[str]]:
    """What of `needs(metrics)` a reference lacks. UserError if it has no images to find it in."""
    missing = needs(metrics, stored=reference)
    if reference.images is None and any(missing.values()):
        stored = [*reference.gaussians, *(f'features of {space}' for space in reference.features)]
        raise UserError(f'{reference.path} has nothing for {",".join(metrics)}, only '
                        f'{", ".join(stored)}; make statistics for it, or give the images')
    return missing


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
    measured = measure_images(open_images(reference.images), detectors, **missing, **options)
    return dataclasses.replace(reference, gaussians=reference.gaussians | measured.gaussians,
                               features=reference.features | measured.features,
                               protocol=reference.protocol or measured.protocol,
                               labels=measured.labels if missing['features'] else reference.labels)


def evaluate(metrics, generated: Statistics, reference: Statistics, protocol: Protocol,
             device='cpu') -> dict[str, float]:
    """{metric: value}, precision and recall together; 'is' also gives 'is_std', its spread.

    Raises UserError if images and reference do not fit each other.
    """
    values = {}
    for metric in dict.fromkeys(map(METRICS.get, metrics)):
        values |= metric.function(generated, reference, metric.space, protocol, device)
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
