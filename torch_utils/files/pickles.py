"""Reading pickles that other programs wrote, without running anything from them.

A pickle is a program for a small stack machine, and it names functions to call. This is a machine
of our own that has no way to import anything: names are looked up in an allow-list whose entries
are inert stand-ins written for the purpose, and any other name, and any other instruction, ends
the reading. What a file can make it do is bounded: steps are counted, lengths are compared with
the file before anything is read, and large strings of bytes are not copied.
"""

import contextlib
import errno
import itertools
import mmap
import os
import pickletools
from functools import partialmethod

import numpy as np

from dnnlib import UserError, budget
from dnnlib.util import one_line, printable

_LARGE = 4096               # strings of bytes from this length on stay where they are
# Other keys of dictionaries never occur, and hashing deeply nested ones overflows the stack of the
# interpreter.
_KEYS = (str, int, bytes, float, bool, type(None))


class ForeignPickleError(Exception):
    """A file that is damaged or asks for something that is not on the allow-list."""


# What may be wrong with a file, each in words that say it.
REFUSALS = (ForeignPickleError, budget.TooMuch)
# Errors of an OSError that say something of the file itself; others, of the machine or of rights.
_OF_CONTENT = (None, errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)


class UnreadableError(UserError):
    """A file that may be whole, but cannot be read: no permission, or a fault of the disk."""


@contextlib.contextmanager
def errors_of(path: str, prefix: str = ''):
    """Whatever goes wrong within while the file `path` is read ends in a UserError of one line
    that names it. What it builds is drawn from a budget.
    """
    try:
        with budget.reading(path):
            yield
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f'{path}: {prefix}{error}') from None
    except OSError as error:
        if error.errno not in _OF_CONTENT:
            raise UnreadableError(f'{path} cannot be read ({error.strerror})') from None
        raise UserError(f'{path}: {prefix}it cannot be read '
                        f'({error.strerror or one_line(error)})') from None
    except Exception as error:  # zipfile, tarfile, NumPy and torch raise nearly anything
        raise UserError(f'{path}: {prefix}it is damaged '
                        f'({type(error).__name__}: {one_line(error)})') from None


class StandIn:
    """What takes the place of a pickled object: `state` is what was pickled of it."""

    def __init__(self, *_):
        self.state = None


class _Global:
    """What a global name becomes: it can be called and passed on, and nothing else."""

    def __init__(self, function, name):
        self.function, self.name = function, name


def map_file(path: str) -> memoryview:
    """The bytes of a regular file, mapped (private, so that tensors over them can be written to
    without harm).

    Raises ForeignPickleError for anything that is no regular file; an OSError or, for an empty
    file, a ValueError.
    """
    if not os.path.isfile(path):                        # a device or a pipe may have no end
        raise ForeignPickleError('it is no regular file')
    with open(path, 'rb') as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


class RestrictedUnpickler:
    """Reads pickles one after the other from `data` (bytes or a view of them), from `position` on.

    `allowed`, {(module, name): function}, has the only names that a pickle may use. Subclasses can
    add to it in `find_class` and read references in `persistent_load`. An instruction is the
    method `op_NAME`; one that has none is refused. Bytes of some length are handed on as views of
    `data`. Sets become lists, texts of Python 2 are latin1.
    """

    def __init__(self, data, allowed: dict, position: int = 0):
        self.data = memoryview(data)
        self.position = position
        self._allowed = allowed
        self._budget = budget.current(len(self.data))
        self._new_bytes = 0

    def load(self):
        """The next object. Raises ForeignPickleError with one line for damaged or unexpected
        content.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            for step in itertools.count():
                if not step % 256:
                    self._budget.spend(256)
                name, reader, method = _INSTRUCTIONS[self.read(1)[0]]
                if name == 'STOP':
                    return self._counted(self._stack.pop())
                if method is None:
                    raise ForeignPickleError('it is no pickle, or uses an instruction that is not '
                                             f'allowed ({name})')
                method(self, reader(self) if reader else None)
        except REFUSALS:
            raise
        except Exception as error:  # damaged pickles raise nearly anything
            raise ForeignPickleError('it is no readable pickle '
                                     f'({type(error).__name__}: {one_line(error)})') from None

    def _counted(self, value):
        """`value`, where it fits into the budget when written out: it may hold one list twice, and
        that another one twice, and so on. (16 letters are a part.)
        """
        sizes, pending = {}, [value]                # parts by id; None: of what is being counted
        while pending:
            item = pending[-1]
            if sizes.get(id(item), 0):
                pending.pop()
                continue
            parts = [*item, *item.values()] if isinstance(item, dict) else [item.state] \
                if hasattr(item, 'state') else item if isinstance(item, list | tuple) else ()
            inner = [part for part in parts
                     if isinstance(part, list | tuple | dict) or hasattr(part, 'state')]
            if id(item) not in sizes:
                sizes[id(item)] = None
                if any(sizes.get(id(part), 0) is None for part in inner):
                    raise budget.TooMuch('it has a part that holds itself')
                pending += [part for part in inner if id(part) not in sizes]
                continue
            letters = sum(len(part) for part in parts if isinstance(part, str))
            size = 1 + len(parts) + letters // 16 + sum(sizes[id(part)] for part in inner)
            if size > self._budget.items:
                raise budget.TooMuch('it has too many parts')
            sizes[id(item)] = size
        return value

    def find_class(self, module: str, name: str):
        """What a global name stands for: a function, or a plain value."""
        if (module, name) not in self._allowed:
            shown = printable(f'{module}.{name}', 100)
            raise ForeignPickleError(f'it asks for {shown}, which is not allowed')
        return self._allowed[module, name]

    def persistent_load(self, pid):
        """The object of a reference to data outside the pickle."""
        raise ForeignPickleError('it refers to data outside the file')

    # --- What the readers of pickletools call ----------------------------------------------------

    def read(self, count: int):
        """The next bytes; many of them as a view."""
        data = self.data[self.position:self.position + count]
        if len(data) < count:
            raise ForeignPickleError('it is cut off, or says that it is longer than it is')
        self.position += count
        return data if count >= _LARGE else bytes(data)

    def readline(self) -> bytes:
        text = bytes(self.data[self.position:self.position + 1000])
        length = text.find(b'\n') + 1
        if not length:
            raise ForeignPickleError('it is cut off, or has a line without end')
        self.position += length
        return text[:length]

    # --- Instructions: (argument) ----------------------------------------------------------------

    def _push(self, value):
        if isinstance(value, int) and value.bit_length() > 4096:
            raise ForeignPickleError(f'it holds a number of {value.bit_length()} bits')
        self._stack.append(value)

    op_INT = op_LONG = op_BININT = op_BININT1 = op_BININT2 = op_LONG1 = op_LONG4 = _push
    op_FLOAT = op_BINFLOAT = op_SHORT_BINSTRING = op_BINSTRING = _push
    op_SHORT_BINBYTES = op_BINBYTES = op_BINBYTES8 = op_BYTEARRAY8 = _push
    op_SHORT_BINUNICODE = op_BINUNICODE = op_BINUNICODE8 = _push

    def _push_new(self, make, _):
        self._stack.append(make())

    op_NONE = partialmethod(_push_new, type(None))
    op_NEWTRUE = partialmethod(_push_new, lambda: True)
    op_NEWFALSE = partialmethod(_push_new, bool)
    op_EMPTY_LIST = op_EMPTY_SET = partialmethod(_push_new, list)
    op_EMPTY_TUPLE = partialmethod(_push_new, tuple)
    op_EMPTY_DICT = partialmethod(_push_new, dict)

    def op_PROTO(self, _):
        pass

    op_FRAME = op_PROTO

    def op_MARK(self, _):
        self._marks.append(len(self._stack))

    def op_POP_MARK(self, _) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def op_POP(self, _):
        self._stack.pop()

    def op_LIST(self, _):
        self._stack.append(self.op_POP_MARK(_))

    op_FROZENSET = op_LIST

    def op_TUPLE(self, _):
        self._stack.append(tuple(self.op_POP_MARK(_)))

    def _push_tuple(self, count, _):
        self._stack[-count:] = [tuple(self._stack[-count:])]

    op_TUPLE1 = partialmethod(_push_tuple, 1)
    op_TUPLE2 = partialmethod(_push_tuple, 2)
    op_TUPLE3 = partialmethod(_push_tuple, 3)

    def op_DICT(self, _):
        items = self.op_POP_MARK(_)
        self._stack.append({})
        self._set_items(items)

    def op_APPEND(self, _):
        self._extend([self._stack.pop()])

    def op_APPENDS(self, _):
        self._extend(self.op_POP_MARK(_))

    op_ADDITEMS = op_APPENDS

    def _extend(self, items: list):
        if type(self._stack[-1]) is not list:
            raise ForeignPickleError('it is damaged (no list to append to)')
        self._stack[-1].extend(items)

    def op_SETITEM(self, _):
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def op_SETITEMS(self, _):
        self._set_items(self.op_POP_MARK(_))

    def _set_items(self, items: list):
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ForeignPickleError('it is damaged (no dictionary to fill)')
        if not all(type(key) in _KEYS for key in items[::2]):
            raise ForeignPickleError('it has a dictionary with strange keys')
        target.update(zip(items[::2], items[1::2], strict=True))

    def op_GLOBAL(self, names):
        self._push_global(*names.split(' ', 1))

    def op_STACK_GLOBAL(self, _):
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(module, name)

    def _push_global(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise ForeignPickleError('it is damaged (a name is no text)')
        value = self.find_class(module, name)
        self._stack.append(_Global(value, f'{module}.{name}') if callable(value) else value)

    def op_REDUCE(self, _):
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise ForeignPickleError('it calls something that is no function')
        self._budget.spend(len(arguments))
        value = function.function(*arguments)
        if isinstance(value, bytes):
            self._new_bytes += len(value)
            if self._new_bytes > len(self.data) + (1 << 20):
                raise ForeignPickleError('it makes more data than it holds')
        self._stack.append(value)

    op_NEWOBJ = op_REDUCE

    def op_BUILD(self, _):
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif isinstance(target, _Global):
            raise ForeignPickleError(f'it tries to change {target.name}')
        elif not isinstance(target, dict):  # attributes of a dictionary (of versions) say nothing
            raise ForeignPickleError(f'it tries to change a {type(target).__name__}')

    def op_BINPERSID(self, _):
        self._stack.append(self.persistent_load(self._stack.pop()))

    def op_PUT(self, index):
        self._memo[index] = self._stack[-1]

    op_BINPUT = op_LONG_BINPUT = op_PUT

    def op_MEMOIZE(self, _):
        self.op_PUT(len(self._memo))

    def op_GET(self, index):
        self._stack.append(self._memo[index])

    op_BINGET = op_LONG_BINGET = op_GET


def _instructions():
    """(code, (name, reader of its argument, method)) of every instruction of the language."""
    # Long texts of Python 2 may be the data of an array, which stay where they are.
    def read_text(machine):
        data = machine.read(pickletools.read_uint4(machine))
        return str(data, 'latin1') if isinstance(data, bytes) else data

    readers = {'BINSTRING': read_text}
    for op in pickletools.opcodes:
        reader = readers.get(op.name, op.arg and op.arg.reader)
        yield ord(op.code), (op.name, reader, getattr(RestrictedUnpickler, f'op_{op.name}', None))


_INSTRUCTIONS = {code: (hex(code), None, None) for code in range(256)} | dict(_instructions())


def load(data, allowed: dict):
    """The object in a pickle, given as bytes. Raises ForeignPickleError with one line for anything
    unexpected.
    """
    return RestrictedUnpickler(data, allowed).load()


# --- Plain values --------------------------------------------------------------------------------


def check_plain(value, what: str, size: int = 1_000_000, largest: int = 1 << 64):
    """`value`, if it consists of dictionaries, lists, strings and numbers and is small when
    written out: of at most `size` parts (16 letters are one), whole numbers at most `largest`.

    A file can hold one list a thousand times in another, and so on: a few bytes that are endless
    for whoever walks through them. Raises ForeignPickleError that names `what`.
    """
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if not isinstance(item, str | int | float | bool | list | tuple | dict | None):
            raise ForeignPickleError(f'{what} holds a {type(item).__name__} instead of plain '
                                     'values')
        children = item if isinstance(item, list | tuple) else ()
        if isinstance(item, dict):
            if not all(type(key) in _KEYS for key in item):
                raise ForeignPickleError(f'{what} has strange keys')
            children = [*item, *item.values()]
        size -= 1 + (len(item) // 16 if isinstance(item, str) else len(children))
        if size < 0 or depth > 16 or (isinstance(item, int) and abs(item) > largest):
            raise ForeignPickleError(f'{what} is too large or too deeply nested')
        pending += [(child, depth + 1) for child in children]
    return value


# --- Arrays of NumPy -----------------------------------------------------------------------------


class NumpyArray(StandIn):
    """Stand-in for numpy.ndarray, which makes the array when asked."""

    def array(self) -> np.ndarray:
        """The array, a view of the file's bytes. Raises TypeError, ValueError or AttributeError
        unless it holds plain numbers.
        """
        _, shape, dtype, fortran, data = self.state
        if isinstance(data, str):  # bytes as Python 3 wrote them for protocol 2
            data = encode(data)
        if not are_lengths(shape):
            raise ValueError(f'an array of shape {list(shape)}'[:100])
        array = np.frombuffer(data, dtype=dtype.numpy())
        return array.reshape(tuple(shape), order='F' if fortran else 'C')


_NUMBERS = {'b1', 'u1', 'u2', 'u4', 'u8', 'i1', 'i2', 'i4', 'i8', 'f2', 'f4', 'f8'}


class NumpyDtype(StandIn):
    """Stand-in for numpy.dtype of plain numbers."""

    def __init__(self, code, *_):
        super().__init__()
        self.code = as_text(code)

    def numpy(self) -> np.dtype:
        if not isinstance(self.code, str) or self.code not in _NUMBERS:
            raise ValueError('numbers of a type that is not known')
        order = as_text(self.state[1]) if self.state else '|'
        if not isinstance(order, str) or order not in ('<', '>', '=', '|'):
            raise ValueError('numbers in an order that is not known')
        return np.dtype((order if order in ('<', '>') else '=') + self.code)


def are_lengths(values) -> bool:
    """Whether these are a shape. What is compared or multiplied may be lists without end."""
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def as_text(value):
    """Texts of Python 2, which may have been written as bytes; all else as it is."""
    return value.decode('latin1') if isinstance(value, bytes) else value


def _from_buffer(data, dtype, shape, order):
    """Stand-in for the function that makes arrays in pickles of protocol 5."""
    array = NumpyArray()
    array.state = (1, shape, dtype, order == 'F', data)
    return array


def encode(text, encoding=None):
    """Stand-in for _codecs.encode, which Python 3 uses to write bytes at protocol 2."""
    return text.encode('latin1')


def scalar(dtype, data):
    """Stand-in for NumPy's scalar: a plain Python number."""
    return _from_buffer(data, dtype, (), 'C').array().item()


def _only_named(*_):
    """Stand-in for a class that is passed as an argument and never made."""
    raise ForeignPickleError('it makes an object of a class that it should only name')


# What a pickle of numbers, strings and containers, with numpy arrays among them, may name.
NUMPY_ARRAYS = {
    ('numpy', 'ndarray'): _only_named,
    ('numpy', 'dtype'): NumpyDtype,
    ('_codecs', 'encode'): encode,
} | {(module, name): function for module in ('numpy.core', 'numpy._core')
     for module, name, function in (
         (f'{module}.multiarray', '_reconstruct', NumpyArray),
         (f'{module}.multiarray', 'scalar', scalar),
         (f'{module}.numeric', '_frombuffer', _from_buffer))}
