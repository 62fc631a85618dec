"""From a source to an archive: pictures chosen, read, made equal in size, and stored as uncompressed PNG."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import signal
import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import threadpoolctl
import tqdm

from dnnlib.image_io import BadImage, encode_pngs
from dnnlib.util import UserError, core_count
from training.data.archive import ArchiveWriter, image_name
from training.data.sources import Source
from training.data.transforms import make_transform

CHUNK_BYTES = 1 << 21  # pixels of the images that a worker converts before it hands them over


@dataclasses.dataclass
class Selection:
    """Positions in a source in output order, with their new labels.

    indices: int64 [n]. labels: int64 [n] in 0..C-1, float32 [n,D] vectors, or None. classes, class_names, wnids:
    original index, name and ImageNet folder of each new label, or None. rule: how it was chosen, for dataset.json.
    """

    indices: np.ndarray
    labels: np.ndarray | None = None
    classes: list | None = None
    class_names: list | None = None
    wnids: list | None = None
    rule: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return len(self.indices)

    def first(self, count: int | None) -> 'Selection':
        """The first `count` images, all for None."""
        if count is None or count >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:count]
        return dataclasses.replace(self, indices=self.indices[:count], labels=labels,
                                   rule=self.rule | {'max_images': count})


def everything(source) -> Selection:
    """All images with the labels that the source gives them. One class folder alone gives no labels."""
    indices = np.arange(len(source), dtype=np.int64)
    if source.labels is None or (source.implied and len(source.classes) == 1):
        return Selection(indices)
    return Selection(indices, source.labels, source.classes, source.class_names, source.wnids)


def by_class(source, classes: list[int] | None = None, nums: int | None = None, seed: int = 0) -> Selection:
    """`nums` images of each of the classes, drawn without replacement; labels 0..C-1 in the order given.

    classes: original indices (`source.classes`); None for all. nums: None or 0 takes all images of a class. What is
    drawn of a class depends on `seed` and its original index alone: sets of more classes or more images contain those
    of fewer. Within a class, images stay in the source's order.

    Raises UserError for classes that do not exist or are given twice, and for classes with too few images.
    """
    if source.labels is None or source.labels.ndim != 1:
        raise UserError(f'--class_labels, --nums: {source.name} has no classes to choose from')
    place = {original: label for label, original in enumerate(source.classes)}
    classes = list(source.classes) if classes is None else list(classes)
    for original in classes:
        if original not in place:
            known = ','.join(map(str, source.classes[:20])) + (',...' if len(source.classes) > 20 else '')
            raise UserError(f'--class_labels: class {original} is not in {source.name}, which has {known}')
        if classes.count(original) > 1:
            raise UserError(f'--class_labels: class {original} is given twice')
    order = np.argsort(source.labels, kind='stable')
    bounds = np.searchsorted(source.labels[order], np.arange(len(source.classes) + 1))
    parts = []
    for original in classes:
        label = place[original]
        members = order[bounds[label]:bounds[label + 1]]
        if len(members) < max(nums or 0, 1):
            name = f' ({source.class_names[label]})' if source.class_names else ''
            raise UserError(f'--nums={nums or "all"}: class {original}{name} of {source.name} has {len(members)} images')
        if nums:
            members = np.sort(np.random.RandomState([seed % (1 << 32), original]).permutation(members)[:nums])
        parts.append(members)
    places = [place[original] for original in classes]
    return Selection(
        np.concatenate(parts), np.repeat(np.arange(len(classes)), [len(part) for part in parts]), classes,
        source.class_names and [source.class_names[i] for i in places], source.wnids and [source.wnids[i] for i in places],
        {'nums': nums, 'seed': seed} if nums else {})


# ---------------------------------------------------------------------------------------------------------------------
# Conversion.

@dataclasses.dataclass
class Converted:
    """What was written: number of images, their side, names of damaged files left out, number of rejected ones."""

    count: int
    resolution: int
    rejected: int
    skipped: list[str]


def convert(source: Source, selection: Selection, dest: str, *, resolution=None, transform=None, workers=None,
            skip_corrupt=False, overwrite=False, notes: dict | None = None) -> Converted:
    """Writes the selected images of a source as an archive at `dest`.

    Image i of the selection becomes `image_name(i)`; pictures that the transform rejects and, with `skip_corrupt`,
    damaged ones leave gaps. The result does not depend on `workers` (processes, or threads where the source is in memory;
    default: one for each core).

    resolution: (width, height) or None. transform: see `make_transform`. notes: further keys for dataset.json.
    Raises UserError that names the file: damaged pictures, results that are not square, equal and a power of two.
    """
    width, height = resolution or (None, None)
    make_transform(transform, width, height)  # refuses what cannot be made
    if resolution:
        _check_shape(f'--resolution={width}x{height}', width, width if transform == 'center-crop-wide' else height)
    kept, skipped, shape, rejected = [], [], None, 0
    results = _convert_all(_Job(source, (transform, width, height)), selection.indices, _worker_count(workers))
    with contextlib.ExitStack() as stack:
        stack.enter_context(threadpoolctl.threadpool_limits(1))  # else each worker has threads of its own for small products
        out = stack.enter_context(ArchiveWriter(dest, overwrite, sync=False))  # the source is still there if the power fails
        stack.enter_context(contextlib.closing(results))
        progress = stack.enter_context(tqdm.tqdm(total=len(selection), unit='image', delay=2, disable=None))
        position = 0
        for result in results:
            where = source.where(int(selection.indices[position]))
            positions = range(position, position + (result.count if isinstance(result, (_Rejected, _Alike)) else 1))
            position = positions.stop
            progress.update(len(positions))
            if isinstance(result, _Rejected):
                rejected += result.count
                continue
            if isinstance(result, _Damaged):
                message = result.message if where in result.message else f'{where}: {result.message}'
                if not skip_corrupt:
                    raise UserError(f'{message}; mend it, or leave such files out with --skip-corrupt')
                skipped.append(message)
                continue
            if shape is None:
                shape = result.shape
                _check_shape(where, shape[1], shape[0])
            if result.shape != shape:
                raise UserError(f'{where} gives {result.shape[1]}x{result.shape[0]} pixels, but images before it '
                                f'{shape[1]}x{shape[0]}; give --resolution=WxH (and a --transform)')
            out.add_alike([image_name(i) for i in positions], result.files)
            kept.extend(positions)
        if shape is None:
            raise UserError(f'--source={source.name}: none of {len(selection)} images is left '
                            f'({rejected} rejected by --transform={transform}, {len(skipped)} damaged)')
        out.add_description(_description(source, selection, kept, shape, transform, skipped, notes))
    return Converted(len(selection) - rejected - len(skipped), shape[0], rejected, skipped)


def _description(source, selection, kept, shape, transform, skipped, notes) -> dict:
    labels = selection.labels
    if labels is not None:
        labels = [[image_name(position), label] for position, label in zip(kept, labels[kept].tolist(), strict=True)]
    known = {
        'labels': labels, 'classes': selection.classes,
        'class_names': selection.class_names, 'wnids': selection.wnids, 'source': source.name,
        'resolution': shape[0], 'transform': transform, **selection.rule, 'skipped': skipped or None, **(notes or {})}
    return {key: value for key, value in known.items() if value is not None or key == 'labels'}


def _check_shape(where: str, width: int, height: int):
    if width != height or width & (width - 1):
        what = 'not square' if width != height else 'no power of two'
        raise UserError(f'{where}: {width}x{height} pixels are {what}, which networks need; '
                        'give e.g. --resolution=64x64 --transform=center-crop')


# ---------------------------------------------------------------------------------------------------------------------
# Workers.

@dataclasses.dataclass
class _Damaged:
    """A picture that cannot be used."""

    message: str


@dataclasses.dataclass
class _Rejected:
    """Pictures that the transform does not want."""

    count: int = 1


@dataclasses.dataclass
class _Alike:
    """Converted pictures: PNG files of one size, uint8 [n,bytes], and their (height, width)."""

    files: np.ndarray
    shape: tuple

    @classmethod
    def of(cls, pixels):
        return cls(encode_pngs(pixels), pixels.shape[1:3])

    @property
    def count(self):
        return len(self.files)


class _Job:
    """What a worker process needs; it is handed over once."""

    def __init__(self, source, transform):
        self.source, self.transform = source, transform  # the arguments of make_transform: functions cannot be pickled

    def convert(self, indices):
        """What became of the pictures, in order: one result for each, or one for all where they are alike."""
        function = make_transform(*self.transform)
        try:
            pictures = self.source.read_alike(indices)
        except UserError:  # one of them cannot be read: which, the loop below tells
            pictures = None
        if pictures is not None:
            pixels = function(pictures)
            return [_Rejected(len(indices)) if pixels is None else _Alike.of(pixels)]
        out = []
        for index in indices:
            try:
                pixels = function(self.source.picture(int(index)))
                out.append(_Rejected() if pixels is None else _Alike.of(pixels[None]))
            except (BadImage, UserError) as error:
                out.append(_Damaged(str(error)))
        return out


_job = None


def _start_worker(job):
    global _job
    _job = job
    if sys.platform != 'linux':  # there it has the limit of the parent
        threadpoolctl.threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C for all


def _work(indices):
    return _job.convert(indices)


def _worker_count(workers: int | None) -> int:
    if workers is not None:
        return workers
    return core_count()


def _convert_all(job, indices, workers):
    """Results of all images in order, computed by `workers` processes or threads with a bounded number of chunks under way."""
    chunk = _chunk_size(job, indices, max(workers, 1))
    chunks = [indices[i:i + chunk] for i in range(0, len(indices), chunk)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        for part in chunks:
            yield from job.convert(part)
        return
    if job.source.in_memory:  # NumPy and zlib do all the work, most of it beside other threads
        pool, work = concurrent.futures.ThreadPoolExecutor(workers), job.convert
    else:
        # Forked workers share the parent's data; elsewhere than on Linux system libraries do not survive a fork.
        context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
        pool, work = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,)), _work
    try:
        pending = collections.deque()
        for part in chunks:
            pending.append(pool.submit(work, part))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError('a worker process died, perhaps for lack of memory; give fewer --workers') from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunk_size(job, indices, workers) -> int:
    """Images of a chunk: as many as the first readable one fits into CHUNK_BYTES, from 1 to 256, and so few that all workers
    are busy to the end. The smallest are done fastest in large chunks; of the others, one can take longer than another."""
    for index in indices[:8]:
        result = job.convert([index])[0]
        if isinstance(result, _Alike):
            height, width = result.shape
            most = int(np.clip(CHUNK_BYTES // (3 * height * width), 1, 256))
            return min(most, -(-len(indices) // ((4 if most == 256 else 16) * workers)))
    return 16
