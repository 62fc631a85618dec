"""From a source to an archive: images chosen, read, made equal in size, stored as plain PNG."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import signal
import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import threadpoolctl

from dnnlib import progress
from dnnlib.image_io import BadImage, encode_pngs, is_transparent, with_channels
from dnnlib.util import UserError, core_count, map_ahead, printable
from training.data.archive import CLASS_TABLES, ArchiveWriter, image_name
from training.data.dataset import class_indices, resolution_of
from training.data.report import class_table
from training.data.sources import Source, listed
from training.data.transforms import NAMES, make_transform, resize_stack
from training.presets import multiples

MOST_LINES = 20  # of a table of classes
CHUNK_BYTES = 1 << 21  # pixels of the images that a worker converts before it hands them over


@dataclasses.dataclass
class Selection:
    """Positions in a source in output order, with their new labels.

    indices: int64 [n]. labels: int64 [n] in 0..C-1, float32 [n,D] vectors, or None. classes,
    class_names, wnids: original index, name and ImageNet folder of each new label, or None.
    rule: how it was chosen, for dataset.json.
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
        rule = self.rule | {'max_images': count}
        return dataclasses.replace(self, indices=self.indices[:count], labels=labels, rule=rule)


def class_tables(source, labels=None) -> dict:
    """What a source or selection knows of the classes `labels` (None: of all), by CLASS_TABLES."""
    tables = {key: getattr(source, key) for key in CLASS_TABLES}
    if labels is None:
        return tables
    return {key: table and [table[label] for label in labels] for key, table in tables.items()}


def class_labels(source) -> np.ndarray:
    """Labels int64 [n] of a source. Raises UserError if it has none."""
    if source.labels is None or source.labels.ndim != 1:
        raise UserError(f'{source.name} has no classes to choose from')
    return source.labels


def class_numbers(source, text: str) -> list[int]:
    """Original indices of the classes in a list, e.g. 'cat,171,5-8'. See `class_indices`."""
    class_labels(source)
    description = class_tables(source) | {'name': source.name, 'label_dim': len(source.classes)}
    try:
        labels = class_indices(description, text)
    except UserError as error:
        raise UserError(str(error), 'class_labels') from None
    return [source.classes[label] for label in labels]


def everything(source) -> Selection:
    """All images with the source's labels. One class folder alone gives no labels."""
    indices = np.arange(len(source), dtype=np.int64)
    if source.labels is None or (source.implied and len(source.classes) == 1):
        return Selection(indices)
    return Selection(indices, source.labels, **class_tables(source))


def by_class(source, classes: list[int] | None = None, nums: int | None = None,
             seed: int = 0) -> Selection:
    """`nums` images of each class, drawn without replacement; labels 0..C-1 in the order given.

    classes: original indices (`source.classes`); None for all. nums: None or 0 takes all images
    of a class. What is drawn of a class depends on `seed` and its original index alone: sets of
    more classes or more images contain those of fewer. Within a class, images stay in the
    source's order.

    Raises UserError for classes that do not exist or are given twice, or have too few images.
    """
    all_labels = class_labels(source)
    originals = list(source.classes)
    classes = originals if classes is None else list(classes)
    parts = []
    for original in classes:
        if original not in originals:
            choices = ','.join(map(str, originals[:20])) + ',...' * (len(originals) > 20)
            raise UserError(f'class {original} is not in {source.name}, which has {choices}',
                            field='class_labels')
        if classes.count(original) > 1:
            raise UserError(f'class {original} is given twice', field='class_labels')
        label = originals.index(original)
        members = np.flatnonzero(all_labels == label)
        if len(members) < max(nums or 0, 1):
            name = f' ({source.class_names[label]})' if source.class_names else ''
            raise UserError(f'class {original}{name} of {source.name} has only {len(members)} '
                            'images', field='nums')
        if nums:
            random = np.random.RandomState([seed % (1 << 32), original])
            members = np.sort(random.permutation(members)[:nums])
        parts.append(members)
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in parts])
    tables = class_tables(source, [originals.index(original) for original in classes])
    rule = {'nums': nums, 'seed': seed} if nums else {}
    return Selection(np.concatenate(parts), labels, **tables, rule=rule)


# --- Conversion ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Converted:
    """Number of images written, their shape [H,W,C], damaged files left out, number of rejected
    images; what was selected of which source, the images of each label (None without classes),
    notes.
    """

    count: int
    shape: tuple[int, int, int]
    rejected: int
    skipped: list[str]
    source: Source
    selection: Selection
    counts: np.ndarray | None
    notes: list[str]

    def summary(self, dest: str) -> str:
        """What was written to `dest`, of which classes, and what was left out."""
        counts = self.counts
        height, width, channels = self.shape
        kind = {1: ', gray', 3: '', 4: ', with alpha'}[channels]
        lines = [f'{dest}: {self.count} images, {width}x{height}{kind}'
                 + (', no labels' if self.selection.labels is None else
                    ', label vectors' if counts is None else f', {len(counts)} classes')]
        if counts is not None and len(counts) > MOST_LINES:
            lines.append(f'of each class {counts.min()} to {counts.max()} images')
        elif counts is not None:
            lines += class_table(counts, self.selection.classes, self.selection.class_names)
        if self.rejected:
            lines.append(f'{self.rejected} images are too small for the transform and left out')
        if self.skipped:
            lines.append(f'{len(self.skipped)} damaged images were left out:')
        lines += [f'    {printable(name)}' for name in self.skipped]
        if self.source.left_out:
            lines.append(printable(f'Left out of {self.source.name}: '
                                   f'{listed(self.source.left_out)}'))
        notes = [*self.source.notes, *self.notes]
        return '\n'.join(lines + [printable(f'Note: {note}') for note in notes])


def convert(source: Source, selection: Selection, dest: str, *, resolution=None, transform=None,
            channels=None, workers=None, skip_corrupt=False, overwrite=False,
            notes: dict | None = None) -> Converted:
    """Writes the selected images of a source as an archive at `dest`.

    Image i of the selection becomes `image_name(i)`; images that the transform rejects and, with
    `skip_corrupt`, damaged ones leave gaps. The result does not depend on `workers` (processes, or
    threads where the source is in memory; default: one for each core).

    resolution: (width, height) or None. transform: see `make_transform`. channels: 1, 3 or 4 (see
    `with_channels`), or None: 1 if all pictures are gray, else 3. notes: further keys for
    dataset.json. Raises UserError that names the file: damaged images, pictures of another shape
    than the resolution if there is no transform, results that are not even and equal.
    """
    width, height = resolution or (None, None)
    if channels is None:
        channels = source.num_channels(selection.indices)
    job = _Job(source, (transform, width, height), channels)
    if resolution:
        _check_size(width, width if transform == 'center-crop-wide' else height)
    if not skip_corrupt:
        source.require_whole()
    found = _Found(selection, source, skip_corrupt)
    names = []
    with contextlib.ExitStack() as stack:
        # Products of small matrices are no work for more threads than workers.
        stack.enter_context(threadpoolctl.threadpool_limits(1))
        # No waiting for the disk: the source is still there if the power fails.
        out = stack.enter_context(ArchiveWriter(dest, overwrite, sync=False))
        workers = core_count() if workers is None else workers
        results = _convert_all(job, selection.indices, workers)
        stack.enter_context(contextlib.closing(results))
        bar = progress.bar(total=len(selection), unit='image')
        stack.enter_context(bar)
        position = 0
        for result in results:
            where = source.where(int(selection.indices[position]))
            count = len(result.files) if isinstance(result, _Pngs) else 1
            positions = range(position, position + count)
            position += count
            bar.update(count)
            if isinstance(result, _Pngs):
                found.keep(result, positions, where)
                names += map(image_name, positions)
                out.add_alike(names[-count:], result.files, result.crcs)
            else:
                found.leave_out(result, where)
        if found.shape is None:
            raise UserError(f'{source.name}: none of {len(selection)} images is left '
                            f'({found.rejected} rejected by {transform}, {len(found.skipped)} '
                            'damaged)')
        labels = None if selection.labels is None else selection.labels[found.kept]
        out.describe(names, labels, {
            **class_tables(selection), 'source': source.name,
            'resolution': resolution_of(*found.shape),
            'channels': None if channels == 3 else channels,
            'transform': transform, 'bits': None if source.bits == 16 else source.bits,
            **selection.rule, **(notes or {}), 'skipped': found.skipped_inside() or None})
    counts = None
    if selection.classes is not None:
        counts = np.bincount(labels, minlength=len(selection.classes))
    return Converted(len(found.kept), (*found.shape, channels), found.rejected, found.skipped,
                     source, selection, counts, found.notes(transform))


class _Found:
    """What came of the images of a selection: positions in it that were kept, their one shape
    [H,W] (None: no image yet), damaged files that were left out, the number of those that the
    transform rejected, and positions of images of which a note tells.
    """

    def __init__(self, selection: Selection, source: Source, skip_corrupt: bool):
        self.selection = selection
        self.source = source
        self.skip_corrupt = skip_corrupt
        self.kept = []
        self.shape = None
        self.skipped = list(source.damaged)
        self.rejected = 0
        self.reshaped = []
        self.flattened = []
        self.dark = []

    def keep(self, pngs: '_Pngs', positions: range, where: str):
        """Raises UserError for images of another shape than those before."""
        height, width = pngs.shape
        if self.shape is None:
            self.shape = pngs.shape
            _check_size(width, height, where)
        if pngs.shape != self.shape:
            raise UserError(f'{where} gives {width}x{height} pixels, but images before it '
                            f'{self.shape[1]}x{self.shape[0]}; give a resolution (and a '
                            'transform)')
        self.kept += positions
        self.reshaped += itertools.compress(positions, pngs.reshaped)
        self.flattened += itertools.compress(positions, pngs.flattened)
        if not self.source.in_memory:
            self.dark += itertools.compress(positions, pngs.dark)

    def leave_out(self, error: Exception | None, where: str):
        """An image that the transform rejects (None), or a damaged one. Raises UserError for what
        may not be left out.
        """
        if error is None:
            self.rejected += 1
            return
        message = str(error) if where in str(error) else f'{where}: {error}'
        if error.field:                                        # it is sound, but not allowed
            raise UserError(message, error.field)
        if not self.skip_corrupt:
            raise UserError(f'{message}; mend the file, or skip corrupt files')
        self.skipped.append(message)

    def skipped_inside(self) -> list[str]:
        """The damaged files without the folder or zip that they are in."""
        places = [f'{part.name}{sign}' for part in getattr(self.source, 'sources', [self.source])
                  for sign in ('/', ': ')]
        return [message[max((len(place) for place in places if message.startswith(place)),
                            default=0):] for message in self.skipped]

    def notes(self, transform: str | None) -> list[str]:
        """What a user may want to know of the images that were kept."""
        source = self.source
        notes = []
        if self.selection.labels is None and source.labels is not None and source.implied:
            notes.append(f'one folder alone ({source.class_names[0]}) gives no labels')
        for positions, what in (
                (self.reshaped, f'are of another shape and were '
                                f'{"squashed" if transform == "stretch" else "cropped"}'),
                (self.flattened,
                 'are transparent and were laid on white; with 4 channels they stay so'),
                (self.dark, 'use less than a quarter of their range; where files of 16 bits hold '
                            'values of fewer, name the bits')):
            if positions:
                where = source.where(int(self.selection.indices[positions[0]]))
                notes.append(f'{len(positions)} of {len(self.kept)} pictures {what}: {where}'
                             + ', ...' * (len(positions) > 1))
        return notes + _of_presets(*self.shape)


def _of_presets(height: int, width: int) -> list[str]:
    """A note on which presets take images that are no squares or no power of two."""
    side = math.gcd(height, width)
    what = f'{side} is no power of two'
    if height != width:
        what = f'{width} and {height} have the common divisor {side}'
    elif not side & (side - 1):
        return []
    need = multiples()
    fit = [preset for preset, multiple in need.items() if side % multiple == 0]
    others = [f'{preset} (multiples of {multiple})' for preset, multiple in need.items()
              if side % multiple]
    return [f'{what}, and networks of n resolutions take multiples of 2^(n-1): '
            f'of the presets {", ".join(fit) or "none"}' + ', but not ' * bool(others)
            + ', '.join(others)]


def _check_size(width: int, height: int, where: str | None = None):
    """Raises UserError unless the sides are even.

    They are those of the image `where`, or the resolution that is asked for.
    """
    if width % 2 == height % 2 == 0:
        return
    size = f'{width}x{height}'
    text = ('pixels are not even, which networks need; choose a resolution, e.g. '
            f'{width + width % 2}x{height + height % 2}, and a transform')
    if where is None:
        raise UserError(text, field='resolution', value=size)
    raise UserError(f'{where}: {size} {text}')


# --- Workers ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Pngs:
    """Converted images of one size: their PNG files, uint8 [n,bytes], CRC-32, (height, width);
    whether each was of another shape, all of its values are below a quarter of 256, and it was
    transparent and is no longer.
    """

    files: np.ndarray
    crcs: list[int]
    shape: tuple
    reshaped: list[bool] = ()
    dark: list[bool] = ()
    flattened: list[bool] = ()


class OtherShape(BadImage):
    """A picture of another shape than the images are to have, and no rule how it becomes one."""

    field = 'transform'


class _Job:
    """What a worker process needs; it is handed over once."""

    def __init__(self, source, rule, channels=3):
        self.source = source
        self.channels = channels
        self.rule = rule  # the arguments of make_transform: functions cannot be pickled
        make_transform(*rule)  # raises for what cannot be made

    def convert(self, indices) -> list:
        """What became of the images: `_Pngs` of all, or a list of what became of each.

        That is `_Pngs` of one, the error of one that cannot be read, or None for a rejected one.
        """
        name, width, height = self.rule
        images = self.source.stack(indices)
        if images is None:
            images = [self._picture(index) for index in indices]
        flattened = [self._is_flattened(image) for image in images]
        images = with_channels(images, self.channels) if isinstance(images, np.ndarray) else (
            _stacked([image if isinstance(image, Exception)
                      else with_channels(image, self.channels) for image in images]))
        reshaped = [self._is_reshaped(image) for image in images]
        if name is None and any(reshaped):
            images = [self._refusal(image) if is_other else image
                      for image, is_other in zip(images, reshaped, strict=True)]
        if name in (None, 'stretch') and isinstance(images, np.ndarray):
            images = resize_stack(images, width, height)
        else:
            transform = make_transform(*self.rule)
            images = _stacked([image if isinstance(image, Exception) else transform(image)
                               for image in images])
        if isinstance(images, np.ndarray):
            return [_pngs(images, reshaped, flattened)]
        return [_pngs(image[None], [is_other], [is_flat])
                if isinstance(image, np.ndarray) else image
                for image, is_other, is_flat in zip(images, reshaped, flattened, strict=True)]

    def _is_flattened(self, image) -> bool:
        return self.channels != 4 and not isinstance(image, Exception) and is_transparent(image)

    def _is_reshaped(self, picture) -> bool:
        _, width, height = self.rule
        if not width or not height or isinstance(picture, Exception):
            return False
        w, h = _size(picture)
        return w * height != h * width

    def _refusal(self, picture) -> OtherShape:
        _, width, height = self.rule
        w, h = _size(picture)
        return OtherShape(f'{w}x{h} pixels are of another shape than {width}x{height}; choose how '
                          f'they become such: {", ".join(NAMES)}')

    def _picture(self, index):
        try:
            return self.source.picture(int(index))
        except (BadImage, UserError) as error:
            return error


def _stacked(images: list):
    """The images as one array, if they are arrays of one shape."""
    shapes = {getattr(image, 'shape', None) for image in images}
    return images if None in shapes or len(shapes) > 1 else np.stack(images)


def _size(picture) -> tuple[int, int]:
    """(width, height) of an array [H,W,C] or a picture of Pillow's."""
    return picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size


def _pngs(pixels: np.ndarray, reshaped: list[bool], flattened: list[bool]) -> _Pngs:
    """Of images uint8 [n,H,W,C]."""
    dark = (pixels[..., :3].max(axis=(1, 2, 3)) < 64).tolist()
    return _Pngs(*encode_pngs(pixels), pixels.shape[1:3], reshaped, dark, flattened)


_job = None


def _start_worker(job):
    global _job
    _job = job
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)          # the parent answers for all


def _work(indices):
    return _job.convert(indices)


def _convert_all(job, indices, workers):
    """Results of all images in order; `workers` processes or threads have few chunks under way."""
    chunk = _chunk_size(job, indices, max(workers, 1))
    chunks = [indices[i:i + chunk] for i in range(0, len(indices), chunk)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        for part in chunks:
            yield from job.convert(part)
        return
    if job.source.in_memory:  # NumPy and zlib do all the work, most of it beside other threads
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        work = job.convert
    else:
        # Forked workers share the parent's data; on other systems libraries do not survive a fork.
        context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,))
        work = _work
    try:
        for results in map_ahead(pool, work, chunks, 2 * workers):
            yield from results
    except BrokenProcessPool:
        # The others may wait for ever for a lock of the dead one, and ignore the signal by which
        # the pool ends them.
        for process in multiprocessing.active_children():
            process.kill()
        raise UserError('a worker process died, perhaps for lack of memory; '
                        'use fewer workers') from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunk_size(job, indices, workers) -> int:
    """Images of a chunk: what fits into CHUNK_BYTES, 1 to 256, going by the first readable image.

    And so few that all workers are busy to the end: one image can take longer than another.
    """
    for result in (job.convert([index])[0] for index in indices[:8]):
        if isinstance(result, _Pngs):
            height, width = result.shape
            most = int(np.clip(CHUNK_BYTES // (3 * height * width), 1, 256))
            return min(most, -(-len(indices) // (16 * workers)))
    return 16
