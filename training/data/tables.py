"""Data sets of Hugging Face: parquet files, folders of `save_to_disk`, and `hf:NAME` of the hub.

pyarrow reads their tables, if it is installed. What they hold is not believed: rows, bytes and
texts are drawn from the budget of the file, few rows at a time; arrays are validated before they
are used; compressed batches of Arrow, which say themselves how large they become, are refused.
"""

import collections
import itertools
import os
import re
import struct

import numpy as np

from dnnlib import budget
from dnnlib.util import UserError, one_line, printable
from training.data.archive import ArchiveReader, check_size

ENDINGS = ('.parquet', '.arrow')
MARKS = ('dataset_dict.json', 'state.json')     # of save_to_disk
HUB = 'hf:'
CACHE_BYTES = 1 << 30    # of the encoded pictures of a few groups of rows
ROWS = 4                 # that are decoded at a time: one text may stand for many rows
MAX_TEXT = 16 << 20      # bytes of a text in the description of a parquet file
_SAFE = (14, 0, 1)       # the first pyarrow that opens no pickles of extension types
_PICTURES = ('image', 'img', 'picture', 'photo', 'png', 'jpg', 'jpeg', 'webp')
_LABELS = ('label', 'labels', 'fine_label', 'class', 'category', 'target', 'y')
_SPLIT = re.compile(r'(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?=[/_.-])')
_PART = re.compile(r'(.*?)[-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?\.(parquet|arrow)')


def pyarrow(path: str):
    """The package. Raises UserError if it is missing, or so old that it runs what files hold."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path} is a data set of Hugging Face; install the reader of its tables: '
                        'pip install pyarrow') from None
    version = tuple(map(int, re.findall(r'\d+', pyarrow.__version__)[:3]))
    if version < _SAFE:
        raise UserError(f'{path}: pyarrow {pyarrow.__version__} may run code of a file; install '
                        f'{".".join(map(str, _SAFE))} or later')
    return pyarrow


def is_table(path: str) -> bool:
    """Whether `path` is a file of such a table, or a folder with some; few folders are listed."""
    if os.path.isfile(path):
        return path.lower().endswith(ENDINGS)
    pending = [(path, 0)] if os.path.isdir(path) else []
    for _ in range(50):
        if not pending:
            return False
        folder, depth = pending.pop(0)
        try:
            with os.scandir(folder) as entries:
                for entry in itertools.islice(entries, 1000):
                    if entry.name.endswith(ENDINGS) or entry.name in MARKS:
                        return True
                    if depth < 2 and entry.is_dir():
                        pending.append((entry.path, depth + 1))
        except OSError:
            continue
    return False


def table_files(path: str, split: str | None) -> list[str]:
    """The files of a split. Raises UserError where there are several splits and none is named."""
    if os.path.isfile(path):
        if split:
            raise UserError(f'{path} is one file, which has no splits; leave out {split}', 'key')
        return [path]
    reader = ArchiveReader(path)
    if reader.damaged:
        raise UserError(f'{reader.damaged[0]}; mend or remove it')
    splits = collections.defaultdict(list)
    for name in reader.names:
        base = name.rpartition('/')[2]
        if base == 'state.json' and _read_state(os.path.join(path, name)).get(
                '_indices_data_files'):
            raise UserError(f'{path}: {name} names a choice of rows (_indices_data_files); save '
                            'the data set again after flatten_indices()')
        if base.endswith(ENDINGS) and not base.startswith(('cache-', 'indices', 'tmp')):
            splits[_split_of(name)].append(os.path.join(path, name))
    names = ', '.join(splits)
    if split and split not in splits:
        raise UserError(f'{path} has no split {split}; there are {names or "none"}', 'key')
    if not splits:
        raise UserError(f'{path} has no file of a table (.parquet, .arrow)')
    if not split and len(splits) > 1:
        raise UserError(f'{path} has the splits {names}; name one, e.g. '
                        f'{path}:{next(iter(splits))}', 'key')
    return splits[split or next(iter(splits))]


def _read_state(path: str) -> dict:
    try:
        return dict(budget.read_json(path, 1 << 20))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{path} is damaged ({one_line(error, 100)})') from None


def _split_of(name: str) -> str:
    """'data/train-00000-of-00002.parquet' -> 'train'."""
    if match := _SPLIT.search(name):
        return match[1]
    folder, _, base = name.rpartition('/')
    stem = match[1] if (match := _PART.fullmatch(base)) else base.rpartition('.')[0]
    parts = [part for part in (*folder.split('/'), stem) if part not in ('', 'data', 'part')]
    return parts[-1] if parts else 'data'


# --- What is in a table --------------------------------------------------------------------------


class Columns:
    """Which columns of a table hold the pictures and the labels, as its schema says.

    image         name of the column; `is_struct`: the bytes are in its field `bytes`
    label, names  name of the column of labels, or None; names of its classes, or None

    Raises UserError that lists the columns if none holds pictures.
    """

    def __init__(self, pa, schema, path: str, coarse: bool = False):
        features = _features(schema, path)
        types = pa.types

        def is_binary(kind):
            return types.is_binary(kind) or types.is_large_binary(kind)

        def has_bytes(kind):
            return (types.is_struct(kind) and kind.get_field_index('bytes') >= 0
                    and is_binary(kind.field('bytes').type))

        kinds = dict(zip(schema.names, schema.types, strict=True))
        pictures = [name for name, kind in kinds.items() if is_binary(kind) or has_bytes(kind)]
        if not pictures:
            listed = ', '.join(f'{printable(name, 40)} ({printable(str(kind), 40)})'
                               for name, kind in itertools.islice(kinds.items(), 12))
            raise UserError(f'{path} has no column of encoded pictures; there are {listed}')
        self.image = _first(_PICTURES, pictures)
        self.is_struct = has_bytes(kinds[self.image])
        whole = [name for name, kind in kinds.items()
                 if types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind)
                 or types.is_large_string(kind) or types.is_dictionary(kind)]
        named = [name for name in whole if features.get(name, {}).get('_type') == 'ClassLabel']
        usual = [name for name in whole if name.lower() in _LABELS]
        self.label = _first(_LABELS, named or usual) if named or usual else None
        self.coarse = coarse and 'coarse_label' in whole
        if self.coarse:
            self.label = 'coarse_label'
        names = features.get(self.label, {}).get('names')
        self.names = _check_names(names, path) if names else None


def _first(order, names):
    """The one of `names` that comes first in `order`, else the first."""
    lower = [name.lower() for name in names]
    return next((names[lower.index(name)] for name in order if name in lower), names[0])


def _features(schema, path: str) -> dict:
    """What Hugging Face's metadata say of the columns."""
    text = (schema.metadata or {}).get(b'huggingface')
    if not text:
        return {}
    try:
        features = budget.parse_json(text)['info']['features']
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: its metadata "huggingface" are damaged '
                        f'({one_line(error, 100)})') from None


def _check_names(names, path) -> list[str]:
    if not isinstance(names, list) or not all(
            isinstance(name, str) and printable(name, 1000) == name for name in names):
        raise UserError(f'{path}: names of classes that are no texts, or have control characters')
    return names


class Tables:
    """Rows of tables: groups of rows, of which a few are kept, and the labels of all.

    Raises UserError that names the file for what is damaged, or larger than its file can be.
    """

    def __init__(self, path: str, files: list[str], coarse: bool = False):
        self.path = path
        self.groups = []                # (file, number or place of the group, rows)
        labels = []
        self.columns = None
        for file in files:
            with _errors_of(file), budget.reading(file):
                check_file(file)
                opened = _open_table(pyarrow(file), file)
                columns = Columns(pyarrow(file), opened.schema, file, coarse)
                if self.columns is None:
                    self.columns = columns
                if vars(columns) != vars(self.columns):
                    raise UserError(f'{file} has other columns or classes than {files[0]}')
                for place, rows in opened.groups():
                    budget.spend(items=rows)
                    if rows:
                        self.groups.append((file, place, rows))
                if columns.label:
                    for values in opened.values([columns.label]):
                        budget.spend(items=len(values), memory=values.nbytes)
                        labels += values.to_pylist()
        self.starts = np.cumsum([0] + [rows for *_, rows in self.groups])
        self.labels, self.names = self._labels(labels)
        self._cache, self._damaged = {}, {}

    def _labels(self, labels):
        """int64 [n] or None, and names of the classes or None."""
        names = self.columns.names
        if not labels or all(label == -1 for label in labels):     # -1: not known, as of tests
            return None, None
        if all(isinstance(label, str) for label in labels):
            names = _check_names(sorted(set(labels)), self.path)
            places = {name: place for place, name in enumerate(names)}
            return np.array([places[label] for label in labels]), names
        whole = all(isinstance(label, int) and 0 <= label < 1 << 31 for label in labels)
        if not whole or len(labels) != len(self) or max(labels) >= len(names or ()) > 0:
            raise UserError(f'{self.path}: {self.columns.label} is not a class of each picture, '
                            f'counted from 0')
        return np.array(labels, dtype=np.int64), names

    def __len__(self):
        return int(self.starts[-1])

    def __getstate__(self):
        return self.__dict__ | {'_cache': {}}

    def find(self, index: int) -> tuple[int, int]:
        """The number of the group of a row, and its place in there."""
        group = int(np.searchsorted(self.starts, index, side='right')) - 1
        return group, index - int(self.starts[group])

    def read(self, index: int) -> bytes:
        """The encoded picture of a row."""
        group, row = self.find(index)
        pictures = self._cache.get(group)
        if group in self._damaged:
            raise UserError(self._damaged[group])
        if pictures is None:
            try:
                pictures = self._load(group)
            except UserError as error:
                self._damaged[group] = str(error)   # reading it again would cost as much
                raise
            # Threads may load a group twice, which does no harm.
            self._cache[group] = pictures
            while sum(map(_size, self._cache.copy().values())) > CACHE_BYTES \
                    and len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)), None)
        if pictures[row] is None:
            raise UserError(f'{self.where(index)} names a picture, but does not hold it; save the '
                            'data set with the bytes of its pictures')
        return pictures[row]

    def _load(self, group: int) -> list:
        file, place, rows = self.groups[group]
        with _errors_of(file), budget.reading(file):
            opened = _open_table(pyarrow(file), file)
            path = [self.columns.image] + ['bytes'] * self.columns.is_struct
            pictures = []
            for values in opened.values(path, place):
                budget.spend(items=len(values), memory=values.nbytes)
                pictures += values.to_pylist()
            if len(pictures) != rows:
                raise ValueError(f'{len(pictures)} of {rows} rows')
        return pictures

    def where(self, index: int) -> str:
        """The row's name for a message."""
        group, row = self.find(index)
        file = self.groups[group][0]
        before = sum(rows for name, _, rows in self.groups[:group] if name == file)
        return f'{file}: row {before + row}'


def _size(pictures: list) -> int:
    return sum(len(picture or b'') for picture in pictures)


def check_file(path: str):
    """Raises UserError for what is no regular file."""
    if not os.path.isfile(path):
        raise UserError(f'{path} is no regular file')


class _errors_of:  # noqa: N801
    """Context: what pyarrow raises becomes a UserError that names the file."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self):
        pass

    def __exit__(self, kind, error, _):
        of_arrow = kind is not None and kind.__module__.startswith('pyarrow')
        if isinstance(error, UserError) or not of_arrow and not isinstance(error, (
                OSError, ValueError, TypeError, LookupError, MemoryError, OverflowError,
                NotImplementedError, EOFError, struct.error)):
            return
        raise UserError(f'{self.path} is damaged or no table that can be read '
                        f'({one_line(error, 100)})') from None


def _open_table(pa, path: str):
    return (_Arrow if path.lower().endswith('.arrow') else _Parquet)(pa, path)


class _Parquet:
    """A parquet file: `schema`, (number, rows) of its groups, and the values of columns."""

    def __init__(self, pa, path: str):
        self.file = pa.parquet.ParquetFile(
            path, pre_buffer=False, thrift_string_size_limit=MAX_TEXT,
            thrift_container_size_limit=1 << 20)
        self.schema = self.file.schema_arrow

    def groups(self):
        metadata = self.file.metadata
        return [(group, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)]

    def values(self, path, group=None):
        """Arrays of the values of a column, or of the field of one: few rows each."""
        groups = range(self.file.metadata.num_row_groups) if group is None else [group]
        kind = self.schema.field(path[0]).type
        rows = 1 << 14 if kind.num_buffers == 2 and kind.num_fields == 0 else ROWS   # numbers
        for batch in self.file.iter_batches(rows, list(groups), ['.'.join(path)],
                                            use_threads=False):
            yield _field(batch, path)


class _Arrow:
    """An Arrow file or stream: the same; a group is a batch, by its place in the file."""

    def __init__(self, pa, path: str):
        self.pa = pa
        self.source = pa.memory_map(path)
        # A file is a stream after eight bytes.
        self.start = 8 if self.source.read(8)[:6] == b'ARROW1' else 0
        self.source.seek(self.start)
        self.schema = pa.ipc.read_schema(pa.ipc.read_message(self.source))
        self.start = self.source.tell()

    def _messages(self):
        self.source.seek(self.start)
        while True:
            place = self.source.tell()
            try:
                message = self.pa.ipc.read_message(self.source)
            except EOFError:
                return
            if message.type == 'record batch':
                yield place, message
            elif message.type != 'none':
                raise ValueError(f'a {message.type} in it')

    def groups(self):
        return [(place, self._batch(message).num_rows) for place, message in self._messages()]

    def _batch(self, message):
        if is_compressed(message.metadata):
            raise ValueError('compressed batches; save the data set without compression')
        return self.pa.ipc.read_record_batch(message, self.schema)

    def values(self, path, group=None):
        if group is None:
            messages = (message for _, message in self._messages())
        else:
            self.source.seek(group)
            messages = [self.pa.ipc.read_message(self.source)]
        for message in messages:
            batch = self._batch(message).select([path[0]])
            batch.validate(full=True)               # places of bytes outside of the file
            yield _field(batch, path)


def _field(batch, path):
    column = batch.column(0)
    for name in path[1:]:
        column = column.field(name)
    return column


def is_compressed(metadata) -> bool:
    """Whether a message of Arrow (its flatbuffer) is a batch of compressed buffers.

    Message: version, type, header, ...; RecordBatch: length, nodes, buffers, compression. Raises
    struct.error where it is cut off.
    """
    data = memoryview(metadata)

    def field(table, number):
        """Place of a field of the table at a place, or None."""
        fields = table - struct.unpack_from('<i', data, table)[0]
        size, = struct.unpack_from('<H', data, fields)
        if 4 + 2 * number >= size:
            return None
        offset, = struct.unpack_from('<H', data, fields + 4 + 2 * number)
        return table + offset if offset else None

    def target(place):
        return place + struct.unpack_from('<I', data, place)[0]

    header = field(target(0), 2)
    return header is not None and field(target(header), 3) is not None


# --- The hub -------------------------------------------------------------------------------------


class HubTables(Tables):
    """The rows of `hf:NAME` or `hf:NAME:split`, by the package `datasets`, over the network.

    Raises UserError that says so where it cannot be had.
    """

    def __init__(self, path: str, coarse: bool = False):
        self.path = path
        match = re.fullmatch(r'hf:([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?', path)
        if not match or os.path.exists(match[1]):
            raise UserError(f'{path}: write hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME:SPLIT of the '
                            'hub; a folder is given without hf:')
        try:
            import datasets
        except ImportError:
            raise UserError(f'{path} needs the package datasets, and the network: pip install '
                            'datasets; or give a folder of parquet files') from None
        if tuple(map(int, re.findall(r'\d+', datasets.__version__)[:2])) < (2, 20):
            raise UserError(f'{path}: datasets {datasets.__version__} may run code of the hub; '
                            'install 2.20 or later')
        try:
            rows = datasets.load_dataset(match[1], split=match[2])
        except Exception as error:
            # The package raises whatever it meets.
            raise UserError(f'{path} cannot be loaded ({one_line(error, 150)}); it needs the '
                            'network, and a split that exists; or give a folder of parquet '
                            'files') from None
        if isinstance(rows, dict):
            if len(rows) > 1:
                raise UserError(f'{path} has the splits {", ".join(rows)}; name one, e.g. '
                                f'{path}:{next(iter(rows))}', 'key')
            rows, = rows.values()
        self.cache_folder = os.path.realpath(datasets.config.HF_CACHE_HOME)
        self.rows = rows.with_format('arrow')
        schema = rows.features.arrow_schema
        self.columns = Columns(pyarrow(path), schema, path, coarse)
        self.starts = np.append(np.arange(0, len(rows), 100), len(rows))
        labels = self.columns.label and self.rows.select_columns([self.columns.label])
        self.labels, self.names = self._labels(
            labels[:].column(0).to_pylist() if labels else [])
        self._cache, self._damaged = {}, {}

    def _load(self, group: int) -> list:
        start, stop = map(int, self.starts[group:group + 2])
        table = self.rows.select_columns([self.columns.image])[start:stop]
        with _errors_of(self.path):
            table.validate(full=True)
            values = table.column(0).to_pylist()
        return [self._picture(value) for value in values]

    def _picture(self, value) -> bytes | None:
        """The bytes of a picture, also of a file that the package has in its cache."""
        if not self.columns.is_struct or value is None:
            return value
        if value['bytes'] is None and value.get('path'):
            file = os.path.realpath(value['path'])
            if os.path.isfile(file) and os.path.commonpath(
                    [file, self.cache_folder]) == self.cache_folder:
                check_size(file, os.path.getsize(file))
                with open(file, 'rb') as opened:
                    return opened.read()
        return value['bytes']

    def where(self, index):
        return f'{self.path}: row {index}'
