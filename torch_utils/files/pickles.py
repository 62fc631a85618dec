"""Reading pickles that other programs wrote, without running anything from them.

A pickle is a program for a small stack machine, and it names functions to call. This is a machine of our own that has
no way to import anything: names are looked up in an allow-list whose entries are inert stand-ins written for the
purpose, and any other name, and any other instruction, ends the reading. What a file can make it do is bounded: steps
are counted, lengths are compared with the file before anything is read, and large strings of bytes are not copied.
"""

import contextlib
import math
import mmap
import os
import pickletools
import stat
import struct

import numpy as np

from dnnlib import UserError

MAX_STEPS = 3_000_000       # of one pickle; the largest published files take a tenth of it
_LARGE = 4096               # strings of bytes from this length on stay where they are
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}


class ForeignPickleError(Exception):
    """A file that is damaged or asks for something that is not on the allow-list."""


@contextlib.contextmanager
def errors_of(path: str, prefix: str = ''):
    """Whatever goes wrong within while the file `path` is read ends in a UserError of one line that names it."""
    try:
        yield
    except UserError:
        raise
    except ForeignPickleError as error:
        raise UserError(f'{path}: {prefix}{error}') from None
    except Exception as error:  # damaged files raise nearly anything, in zipfile, tarfile, NumPy and torch
        reason = ' '.join(str(error).split())[:120]
        raise UserError(f'{path}: {prefix}it is damaged ({type(error).__name__}: {reason})') from None


class StandIn:
    """Base of what takes the place of a pickled object; `set_state` gets its attributes."""

    def set_state(self, state):
        raise ForeignPickleError('it holds a malformed object')


class _Global:
    """What a global name becomes: it can be called and passed on, and nothing else."""

    __slots__ = ('function', 'name')

    def __init__(self, function, name):
        self.function, self.name = function, name


def map_file(path: str) -> memoryview:
    """The bytes of a regular file, mapped (private, so that tensors over them can be written to without harm).

    Raises ForeignPickleError for anything that is no regular file, or is empty.
    """
    try:
        with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):  # a device or a pipe may have no end
                raise ForeignPickleError('it is no regular file')
            if not info.st_size:
                raise ForeignPickleError('it is empty')
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise ForeignPickleError(f'it cannot be read ({error.strerror or error})') from None


class RestrictedUnpickler:
    """Reads pickles one after the other from `data` (bytes or a view of them), from `position` on.

    allowed    {(module, name): function}; the only names that a pickle may use. Subclasses can add to it in
               `find_class` and read references in `persistent_load`
    encoding   of strings that Python 2 wrote: 'bytes' leaves them as bytes

    Bytes of some length are handed on as views of `data`. Sets become lists.
    """

    def __init__(self, data, allowed: dict, encoding='bytes', position=0, max_steps=MAX_STEPS):
        self.data, self.position = memoryview(data), position
        self._allowed, self._encoding, self._steps, self._made = allowed, encoding, max_steps, 0
        self._stack, self._marks, self._memo = [], [], {}

    def load(self):
        """The next object. Raises ForeignPickleError with one line for damaged or unexpected content."""
        self._stack, self._marks, self._memo = [], [], {}
        data, end = self.data, len(self.data)
        try:
            while self._steps:
                self._steps -= 1
                if self.position >= end:
                    raise ForeignPickleError('it is cut off')
                code = data[self.position]
                self.position += 1
                if code == 0x2e:  # STOP
                    return self._stack.pop()
                handler = _HANDLERS.get(code)
                if handler is None:
                    name = _NAMES.get(code)
                    raise ForeignPickleError(f'it uses the instruction {name}, which is not allowed' if name
                                             else f'it is no pickle (instruction {code:#x})')
                handler(self)
            raise ForeignPickleError('it has too many parts')
        except ForeignPickleError:
            raise
        except Exception as error:  # damaged pickles raise nearly anything
            reason = ' '.join(str(error).split())[:100] or 'damaged'
            raise ForeignPickleError(f'it is no readable pickle ({type(error).__name__}: {reason})') from None

    def find_class(self, module: str, name: str):
        """What a global name stands for: a function, or a plain value."""
        if (module, name) not in self._allowed:
            shown = ''.join(c if c.isprintable() else '?' for c in f'{module}.{name}'[:100])
            raise ForeignPickleError(f'it asks for {shown}, which is not allowed')
        return self._allowed[module, name]

    def persistent_load(self, pid):
        """The object of a reference to data outside the pickle."""
        raise ForeignPickleError('it refers to data outside the file')

    # --- Reading -----------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        if count > len(self.data) - self.position:
            raise ForeignPickleError('it is cut off, or says that it is longer than it is')
        self.position += count
        return self.data[self.position - count:self.position]

    def _number(self, form: str):
        return struct.unpack('<' + form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        text = bytes(self.data[self.position:self.position + 1000])
        length = text.find(b'\n')
        if length < 0:
            raise ForeignPickleError('it is cut off, or has a line without end')
        self.position += length + 1
        return text[:length].decode('utf-8')

    def _bytes(self, form: str):
        data = self._take(self._number(form))
        self._stack.append(data if len(data) >= _LARGE else bytes(data))

    def _old_string(self, form: str):
        self._bytes(form)
        if self._encoding != 'bytes' and isinstance(self._stack[-1], bytes):
            self._stack[-1] = self._stack[-1].decode('latin1')

    def _text(self, form: str):
        self._stack.append(str(self._take(self._number(form)), 'utf-8', 'surrogatepass'))

    def _integer(self, count: int):
        if count > 512:
            raise ForeignPickleError(f'it holds a number of {count} bytes')
        self._stack.append(int.from_bytes(self._take(count), 'little', signed=True))

    # --- The machine -------------------------------------------------------------------------------------------------

    def _pop_mark(self) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _tuple(self, count: int):
        if len(self._stack) < count:
            raise ForeignPickleError('it is damaged (too few values)')
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _global(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise ForeignPickleError('it is damaged (a name is no text)')
        found = self.find_class(module, name)
        self._stack.append(_Global(found, f'{module}.{name}') if callable(found) else found)

    def _extend(self, items: list):
        if type(self._stack[-1]) is not list:
            raise ForeignPickleError('it is damaged (no list to append to)')
        self._stack[-1].extend(items)

    def _set_items(self, items: list):
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ForeignPickleError('it is damaged (no dictionary to fill)')
        for key in items[::2]:
            # Other keys never occur, and hashing deeply nested ones overflows the stack of the interpreter.
            if type(key) not in (str, int, bytes, float, bool, type(None)):
                raise ForeignPickleError('it has a dictionary with strange keys')
        target.update(zip(items[::2], items[1::2], strict=True))

    def _call(self):
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise ForeignPickleError('it calls something that is no function')
        made = function.function(*arguments)
        if isinstance(made, bytes):
            self._made += len(made)
            if self._made > len(self.data) + (1 << 20):
                raise ForeignPickleError('it makes more data than it holds')
        self._stack.append(made)

    def _build(self):
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, StandIn):
            target.set_state(state)
        elif isinstance(target, _Global):
            raise ForeignPickleError(f'it tries to change {target.name}')
        elif type(target) is not dict:  # attributes of a dictionary, such as the versions in a state dict, say nothing
            raise ForeignPickleError(f'it tries to change a {type(target).__name__}')

    def _pop(self):
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()


def _truth(line: str):
    return line == '01' if line in ('00', '01') else int(line)


def _handlers() -> dict:
    """Instruction -> method. What is missing here (EXT, INST, OBJ, PERSID, buffers, ...) is refused."""
    R = RestrictedUnpickler
    table = {
        'PROTO': lambda r: r._take(1), 'FRAME': lambda r: r._take(8), 'MARK': lambda r: r._marks.append(len(r._stack)),
        'POP': R._pop, 'POP_MARK': R._pop_mark, 'DUP': lambda r: r._stack.append(r._stack[-1]),
        'NONE': lambda r: r._stack.append(None), 'NEWTRUE': lambda r: r._stack.append(True),
        'NEWFALSE': lambda r: r._stack.append(False), 'INT': lambda r: r._stack.append(_truth(r._line())),
        'LONG': lambda r: r._stack.append(int(r._line().removesuffix('L'))),
        'FLOAT': lambda r: r._stack.append(float(r._line())),
        'BINFLOAT': lambda r: r._stack.append(struct.unpack('>d', r._take(8))[0]),
        'BININT1': lambda r: r._stack.append(r._take(1)[0]),
        'LONG1': lambda r: r._integer(r._number('B')), 'LONG4': lambda r: r._integer(r._number('I')),
        'EMPTY_LIST': lambda r: r._stack.append([]), 'LIST': lambda r: r._stack.append(r._pop_mark()),
        'EMPTY_SET': lambda r: r._stack.append([]), 'FROZENSET': lambda r: r._stack.append(r._pop_mark()),
        'APPEND': lambda r: r._extend([r._stack.pop()]), 'APPENDS': lambda r: r._extend(r._pop_mark()),
        'ADDITEMS': lambda r: r._extend(r._pop_mark()),
        'EMPTY_TUPLE': lambda r: r._stack.append(()), 'TUPLE': lambda r: r._stack.append(tuple(r._pop_mark())),
        'EMPTY_DICT': lambda r: r._stack.append({}),
        'DICT': lambda r: (items := r._pop_mark(), r._stack.append({}), r._set_items(items)),
        'SETITEM': lambda r: r._set_items([r._stack.pop(), r._stack.pop()][::-1]),
        'SETITEMS': lambda r: r._set_items(r._pop_mark()),
        'GLOBAL': lambda r: r._global(r._line(), r._line()),
        'STACK_GLOBAL': lambda r: r._global(*[r._stack.pop(), r._stack.pop()][::-1]),
        'REDUCE': R._call, 'NEWOBJ': R._call, 'BUILD': R._build,
        'BINPERSID': lambda r: r._stack.append(r.persistent_load(r._stack.pop())),
        'MEMOIZE': lambda r: r._memo.__setitem__(len(r._memo), r._stack[-1]),
        'PUT': lambda r: r._memo.__setitem__(int(r._line()), r._stack[-1]),
        'GET': lambda r: r._stack.append(r._memo[int(r._line())]),
    }
    for name, form in {'BININT': 'i', 'BININT2': 'H'}.items():
        table[name] = lambda r, form=form: r._stack.append(r._number(form))
    for name, form in {'SHORT_BINBYTES': 'B', 'BINBYTES': 'I', 'BINBYTES8': 'Q', 'BYTEARRAY8': 'Q'}.items():
        table[name] = lambda r, form=form: r._bytes(form)
    for name, form in {'SHORT_BINSTRING': 'B', 'BINSTRING': 'I'}.items():
        table[name] = lambda r, form=form: r._old_string(form)
    for name, form in {'SHORT_BINUNICODE': 'B', 'BINUNICODE': 'I', 'BINUNICODE8': 'Q'}.items():
        table[name] = lambda r, form=form: r._text(form)
    for count in (1, 2, 3):
        table[f'TUPLE{count}'] = lambda r, count=count: r._tuple(count)
    for name, form in {'BINPUT': 'B', 'LONG_BINPUT': 'I'}.items():
        table[name] = lambda r, form=form: r._memo.__setitem__(r._number(form), r._stack[-1])
    for name, form in {'BINGET': 'B', 'LONG_BINGET': 'I'}.items():
        table[name] = lambda r, form=form: r._stack.append(r._memo[r._number(form)])
    return {code: table[name] for code, name in _NAMES.items() if name in table}


_HANDLERS = _handlers()


def load(data, allowed: dict, encoding='bytes'):
    """The object in a pickle, given as bytes. Raises ForeignPickleError with one line for anything unexpected."""
    return RestrictedUnpickler(data, allowed, encoding).load()


# --- Plain values ----------------------------------------------------------------------------------------------------


def check_plain(value, what: str, max_size: int = 1_000_000, max_depth: int = 16):
    """`value`, if it consists of dictionaries, lists, strings and numbers and is small when written out.

    A file can hold one list a thousand times in another, and so on: a few bytes that are endless for whoever walks
    through them. Raises ForeignPickleError that names `what`.
    """
    size, pending = 0, [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, dict):
            if not all(isinstance(key, str | int | float | bool | None) for key in item):
                raise ForeignPickleError(f'{what} has strange keys')
            children = [*item.values(), *(key for key in item if isinstance(key, str))]
        else:
            children = item if isinstance(item, list | tuple) else ()
            if not isinstance(item, str | int | float | bool | list | tuple | None):
                raise ForeignPickleError(f'{what} holds a {type(item).__name__} instead of plain values')
        size += 1 + (len(item) // 16 if isinstance(item, str) else len(children))
        if size > max_size or depth > max_depth or (isinstance(item, int) and item.bit_length() > 64):
            raise ForeignPickleError(f'{what} is too large or too deeply nested')
        pending += [(child, depth + 1) for child in children]
    return value


# --- Arrays of NumPy -------------------------------------------------------------------------------------------------


class NumpyArray(StandIn):
    """Stand-in for numpy.ndarray: keeps the pickled state, and makes the array when asked."""

    state = None

    def set_state(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        """The array, a view of the file's bytes. Raises ForeignPickleError unless it holds plain numbers."""
        try:
            _, shape, dtype, fortran, data = self.state
            if isinstance(data, str):  # bytes as Python 3 wrote them for protocol 2
                data = data.encode('latin1')
            dtype = dtype.numpy()
            if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
                raise ValueError(f'{len(data)} bytes for the shape {list(shape)}'[:100])
            return np.frombuffer(data, dtype=dtype).reshape(tuple(shape), order='F' if fortran else 'C')
        except (AttributeError, TypeError, ValueError) as error:
            raise ForeignPickleError(f'it holds a malformed array ({error})') from None


class NumpyDtype(StandIn):
    """Stand-in for numpy.dtype of plain numbers."""

    def __init__(self, code, *_):
        self.code, self.order = code, '|'

    def set_state(self, state):
        self.order = _as_text(state[1])

    def numpy(self) -> np.dtype:
        code = _as_text(self.code)
        if len(code) != 2 or code[0] not in 'buif' or code[1] not in '1248' or code in ('f1', 'b2', 'b4', 'b8'):
            raise ValueError(f'type {code[:20]!r}')
        return np.dtype((self.order if self.order in ('<', '>') else '=') + code)


def _as_text(value) -> str:
    return value.decode('latin1') if isinstance(value, bytes) else str(value)


def _new_array(*_):
    return NumpyArray()


def _from_buffer(data, dtype, shape, order):
    """Stand-in for the function that makes arrays in pickles of protocol 5."""
    array = NumpyArray()
    array.set_state((1, shape, dtype, order == 'F', data))
    return array


def encode(text, encoding=None):
    """Stand-in for _codecs.encode, which Python 3 uses to write bytes at protocol 2."""
    return text.encode('latin1')


def scalar(dtype, data):
    """Stand-in for NumPy's scalar: a plain Python number."""
    data = data.encode('latin1') if isinstance(data, str) else data
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, bytes) or len(data) != dtype.numpy().itemsize:
        raise ForeignPickleError('it holds a malformed number')
    return np.frombuffer(data, dtype=dtype.numpy())[0].item()


def _only_named(*_):
    """Stand-in for a class that is passed as an argument and never made."""
    raise ForeignPickleError('it makes an object of a class that it should only name')


# What a pickle of numbers, strings and containers, with numpy arrays among them, may name.
NUMPY_ARRAYS = {
    ('numpy', 'ndarray'): _only_named,
    ('numpy', 'dtype'): NumpyDtype,
    ('_codecs', 'encode'): encode,
} | {(module, name): function for module in ('numpy.core', 'numpy._core') for module, name, function in (
    (f'{module}.multiarray', '_reconstruct', _new_array), (f'{module}.multiarray', 'scalar', scalar),
    (f'{module}.numeric', '_frombuffer', _from_buffer))}
