"""Downloads into a cache folder: complete or not at all, resumed where they were cut, and not
needed again.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import ipaddress
import itertools
import os
import pathlib
import re
import shutil
import socket
import struct
import threading
import urllib.parse
import zlib

import requests
import urllib3

from dnnlib import budget, progress
from dnnlib.util import UserError, hash_file, one_line, without_secrets, write_json

TIMEOUT = 30    # seconds without a byte
ATTEMPTS = 5    # in which nothing new came, one after the other
REDIRECTIONS = 10
PATIENCE, SLOWEST = 60, 1000    # seconds in which at least so many bytes a second come
LIMIT, LIMIT_OF_UNKNOWN = 64 << 30, 4 << 30     # bytes; the latter where the server says no number
BLOCK = 1 << 15
RECORD = '.fetched.json'        # beside a file of the cache: what it was when it was fetched

CONNECTION_ERRORS = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


class Refused(OSError):
    """An answer that is not taken; another attempt brings no better one."""


class Cut(OSError):
    """An answer that is not complete, or does not fit what is here; another attempt may bring it.
    """


def cache_folder() -> str:
    """Where downloads are kept: $DNNLIB_CACHE_DIR, else ~/.cache/dnnlib."""
    return os.environ.get('DNNLIB_CACHE_DIR') or os.path.expanduser('~/.cache/dnnlib')


def is_url(path) -> bool:
    """True for http:// and https:// addresses."""
    return str(path).startswith(('http://', 'https://'))


def cache_path(url: str) -> str:
    """The file that keeps the download of `url`: a hash of address and query, and its last name.

    Who asks makes no difference, and may be a secret: names and passwords are not in the hash.
    """
    parts = urllib.parse.urlsplit(getattr(url, 'full', url))
    address = parts._replace(netloc=parts.netloc.rpartition('@')[2], fragment='').geturl()
    name = re.sub(r'[^A-Za-z0-9._-]', '_', os.path.basename(parts.path))[-100:]
    digest = hashlib.sha256(address.encode()).hexdigest()
    return os.path.join(cache_folder(), f'{digest[:16]}-{name}')


def check_sha256(path: str, sha256: str, name: str):
    """Raises UserError unless the file `path`, called `name`, has this SHA-256."""
    if not os.path.isfile(path):
        raise UserError(f'{name} is no file')
    _compare(hash_file(path), sha256, name)


def _compare(digest: str, sha256: str, name: str, advice: str = ''):
    if digest != sha256.lower():
        raise UserError(f'{name} has the SHA-256 {digest} instead of {sha256.lower()}; '
                        f'it is another file, or damaged{advice}')


def download(url: str, hint: str = 'download it elsewhere and give the path of the file',
             sha256: str | None = None) -> str:
    """Path of a local copy of `url`, fetched if the cache does not have it. Any other path is
    returned as it is.

    The file appears in the cache only when complete and, with `sha256`, right; whoever fetched it,
    it must be as it was then. What came of a broken download stays beside it, and the next call
    goes on from there if the server still has the same file. Several processes may ask for one
    file: one fetches it. Raises UserError, ending in `hint`, if it cannot be fetched.
    """
    shown = without_secrets(url)
    if sha256 and re.fullmatch('[0-9a-fA-F]{64}', sha256) is None:
        raise UserError('is not 64 hexadecimal digits', field='sha256', value=sha256[:80])
    if not is_url(url):
        if sha256:
            check_sha256(url, sha256, shown)
        return url
    try:
        path = cache_path(url)
        is_new = not os.path.isfile(path) and _fetch(url, path, sha256)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise UserError(f'{shown} cannot be downloaded ({_reason(error)}); {hint}') from None
    if not is_new:
        _check_cached(path, sha256, f'{shown} (in the cache: {path})')
    return path


def _fetch(url: str, path: str, sha256: str | None) -> bool:
    """Fetches a file into the cache; False if another process has done so meanwhile."""
    os.makedirs(cache_folder(), exist_ok=True)
    with _locked(path + '.part') as part:
        if os.path.isfile(path):
            return False
        _Download(url, part, sha256).run()
        os.fsync(part.fileno())
        digest = hash_file(part.name)
        try:
            _compare(digest, sha256 or digest, without_secrets(url))
        except UserError:
            part.truncate(0)
            raise
        _remove(path + RECORD)              # of a file that was removed
        os.replace(part.name, path)
        _record(path, digest)
        _remove(part.name + '.json')
        return True


# --- Files of the cache --------------------------------------------------------------------------


def _stamp(path: str) -> list[int]:
    """What changes with a file; ctime also with its place, and nobody can set it back."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _record(path: str, digest: str):
    """Remembers what a file of the cache is, as far as the folder can be written."""
    with contextlib.suppress(OSError, UserError):
        write_json(path + RECORD, dict(sha256=digest, stamp=_stamp(path)), indent=None)


def _check_cached(path: str, sha256: str | None, name: str):
    """Raises UserError if a file of the cache is not what was fetched, or wanted.

    Files of earlier versions have no record: they are taken as they are first seen.
    """
    record = _read_json(path + RECORD)
    is_same = record.get('stamp') == _stamp(path)
    # Without a record that could be kept, every look would be the first.
    if not sha256 and (is_same or not (record or os.access(cache_folder(), os.W_OK))):
        return
    digest = hash_file(path)
    advice = '; remove it, and the next call fetches it'
    if sha256:
        _compare(digest, sha256, name, advice)
    elif record.get('sha256', digest) != digest:
        raise UserError(f'{name} has changed since it was fetched{advice}')
    if not is_same:
        _record(path, digest)


def _read_json(path: str) -> dict:
    """What this module has written; nothing where it is something else."""
    with contextlib.suppress(OSError, ValueError):
        value = budget.read_json(path, 4096)
        return value if isinstance(value, dict) else {}
    return {}


def _remove(path):
    pathlib.Path(path).unlink(missing_ok=True)


def _size(path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


@contextlib.contextmanager
def _locked(path: str):
    """The file of a download, open and locked: other processes wait. The system drops the lock
    when a process dies.
    """
    while True:
        part = open(path, 'ab', buffering=0, opener=lambda name, flags: os.open(
            name, flags | os.O_NOFOLLOW, 0o644))
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(part, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(part.fileno()), os.stat(path)):
                break
        part.close()                        # another process has moved or removed it meanwhile
    with part:
        try:
            yield part
        finally:
            # Without a validator nothing could be added to it.
            if not _size(path) or not _read_json(path + '.json').get('validator'):
                _remove(path)
                _remove(path + '.json')


# --- The transfer --------------------------------------------------------------------------------


class _Session(requests.Session):
    def get_redirect_target(self, response):
        """None: what a redirection says besides would be read to its end, which it may not have.
        """


def _redirected(url: str, location: str) -> str:
    """Where an answer to `url` leads. Raises Refused for less safe places."""
    target = urllib.parse.urljoin(url, location)
    old, new = map(urllib.parse.urlsplit, (url, target))
    if new.scheme not in ('http', 'https'):
        raise Refused('the server redirects to something that is no web address')
    if (old.scheme, new.scheme) == ('https', 'http'):
        raise Refused('the server redirects from https to http, where the file could be changed '
                      'on its way')
    if _is_link_local(new.hostname):
        raise Refused('the server redirects to an address of this network segment alone')
    if new.netloc == old.netloc.rpartition('@')[2]:
        target = new._replace(netloc=old.netloc).geturl()
    return target


def _is_link_local(host: str) -> bool:
    try:
        addresses = {info[4][0].partition('%')[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):
        return False                        # to which there is no connection either
    addresses = map(ipaddress.ip_address, addresses)
    return any((getattr(address, 'ipv4_mapped', None) or address).is_link_local
               for address in addresses)


class _Download:
    """The transfer of `url` into the file `part`.

    received  bytes that came, over all attempts
    """

    def __init__(self, url: str, part, sha256: str | None):
        self.url = getattr(url, 'full', url)
        self.part = part
        self.sha256 = sha256
        self.received = 0

    def run(self):
        """Returns when the file is complete. Raises Refused if the server is slower than any that
        has something to give: one that sends a byte now and then would keep us for ever.
        """
        done = concurrent.futures.Future()

        def work():
            try:
                done.set_result(self._try())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        while True:
            before = self.received
            concurrent.futures.wait([done], PATIENCE)
            if done.done():
                return done.result()
            if self.received - before < PATIENCE * SLOWEST:
                raise Refused(f'fewer than {SLOWEST} bytes came in a second; try again later')

    def _try(self):
        """Goes on with what is there as long as attempts bring something new."""
        left = ATTEMPTS
        while True:
            before = _size(self.part.name)
            try:
                return self._attempt()
            except (Cut, *CONNECTION_ERRORS) as error:
                after = _size(self.part.name)
                left = ATTEMPTS if after > before else left - 1
                # Without a connection there is nothing to wait for.
                if not left or not (before or after or isinstance(error, Cut)):
                    raise

    def _attempt(self):
        """One connection. The validator of the server's file is kept, so that parts of two
        versions are never joined.
        """
        have = _size(self.part.name)
        state = _read_json(self.part.name + '.json')
        headers = {'Accept-Encoding': 'identity'}
        if have and isinstance(state.get('validator'), str):
            headers |= {'Range': f'bytes={have}-', 'If-Range': state['validator']}
        with _Session() as session, self._answer(session, headers) as response:
            if response.status_code in (206, 416) and not (
                    'Range' in headers and _continues(response, have, state)):
                self._restart()
                raise Cut('the server does not have the part that is missing here')
            response.raise_for_status()
            if response.status_code not in (200, 206):
                raise Refused(f'the server answers {response.status_code}')
            if response.status_code == 200:
                self._restart()
                have = 0
            try:
                self._read(response, have)
            except Refused:
                self._restart()
                raise

    def _restart(self):
        self.part.truncate(0)
        _remove(self.part.name + '.json')

    def _answer(self, session, headers) -> requests.Response:
        url = self.url
        for _ in range(REDIRECTIONS + 1):
            response = session.get(url, stream=True, timeout=TIMEOUT, headers=headers)
            if not response.is_redirect:
                return response
            response.close()
            url = _redirected(url, response.headers['Location'])
        raise Refused(f'it is redirected more than {REDIRECTIONS} times')

    def _read(self, response, have: int):
        """Appends the content of an answer. Raises Cut if it is not complete."""
        raw, name = response.raw, self.part.name
        length = raw.length_remaining                           # None where the server says none
        encoding = response.headers.get('Content-Encoding') or 'identity'
        # Of .gz files some servers say so, and mean the file itself.
        is_plain = encoding == 'identity' or 'gzip' in encoding and name.endswith('gz.part')
        if not is_plain and encoding.lower() not in ('gzip', 'x-gzip', 'deflate'):
            raise Refused('the server sends it compressed in a way that was not asked for')
        total = have + length if length is not None and is_plain else None
        validator = _validator(response) if is_plain else None
        write_json(name + '.json', dict(validator=validator, total=total), indent=None)
        free = shutil.disk_usage(os.path.dirname(name)).free
        limit = min(LIMIT_OF_UNKNOWN if length is None else LIMIT, have + free * 19 // 20)
        before = self.received
        blocks = self._blocks(raw, max(total or 0, length or 0), limit)
        with progress.bar(show=int(os.environ.get('RANK', 0)) == 0, total=total, initial=have,
                          unit='B', unit_scale=True,
                          desc=f'Downloading {os.path.basename(name)[17:-5]}') as bar:
            for block in blocks if is_plain else self._unpacked(blocks):
                if self.part.write(block) < len(block):
                    raise Refused('the disk takes no more')
                bar.update(len(block))
        count = self.received - before
        if length is not None and count != length:
            raise Cut(f'{have + count} of {have + length} bytes came')
        if length is None and is_plain and not raw.chunked and not self.sha256 \
                and not _has_end(name):
            raise Refused('the server does not say how long it is, so it may be cut; give its '
                          'SHA-256 where that can be given')

    def _blocks(self, raw, size: int, limit: int):
        """The bytes of an answer that is to have `size`, as they come. Raises Refused where they,
        or what becomes of them, are more than `limit`, or more than LIMIT over all attempts.
        """
        for block in itertools.chain([b''], raw.stream(BLOCK, decode_content=False)):
            self.received += len(block)
            if max(size, _size(self.part.name) + len(block)) > limit or self.received > LIMIT:
                raise Refused(f'it is longer than the {limit >> 20} MiB that there may be here')
            yield block

    def _unpacked(self, blocks):
        """The content of an answer in gzip or zlib's format. Raises Refused where it is larger
        than honest files get, or damaged.
        """
        decoder = zlib.decompressobj(47)                        # 32 + 15: either of the two
        before = self.received
        for block in blocks:
            is_more = True
            while is_more:
                try:
                    content = decoder.decompress(block, BLOCK)
                except zlib.error:
                    raise Refused('its compressed answer is damaged') from None
                yield content
                block = decoder.unconsumed_tail
                is_more = len(content) == BLOCK
                if decoder.unused_data:                         # gzip may have several parts
                    block = decoder.unused_data
                    decoder = zlib.decompressobj(47)
                    is_more = True
                came = self.received - before
                if _size(self.part.name) > budget.MEMORY + budget.FACTOR * came:
                    raise Refused('it is compressed more than files are')
        if not decoder.eof:
            raise Cut('its compressed answer is not complete')


def _continues(response, have: int, state: dict) -> bool:
    """Whether an answer is what follows the first `have` bytes of the file that they are of."""
    place = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+)', response.headers.get('Content-Range', ''))
    if not place or 'Content-Encoding' in response.headers:
        return False
    first, last, total = map(int, place.groups())
    return (first == have and last + 1 == total and state.get('total') in (None, total)
            and response.raw.length_remaining in (None, total - have)
            and _validator(response) in (None, state.get('validator')))


def _validator(response) -> str | None:
    """What tells the versions of the server's file."""
    tag = response.headers.get('ETag')
    return tag if tag and not tag.startswith('W/') else response.headers.get('Last-Modified')


def _has_end(path: str) -> bool:
    """Whether a file says itself that it is complete: a PNG, or a zip (of torch, .npz, ...) whose
    directory lies where its end says. A zip may hold others, whose ends are none of its own.
    """
    size = _size(path)
    with open(path, 'rb') as file:
        head = file.read(8)
        file.seek(max(0, size - 98))
        tail = file.read()
    if head == b'\x89PNG\r\n\x1a\n':
        return tail.endswith(b'\0\0\0\0IEND\xaeB`\x82')
    end = tail[-22:]
    if not head.startswith(b'PK\3\4') or not end.startswith(b'PK\5\6'):
        return False
    length, offset = struct.unpack_from('<II', end, 12)
    if offset == 0xffffffff and len(tail) == 98:                # of 4 GiB and more
        length, offset = struct.unpack_from('<QQ', tail, 40)
    return offset + length in (size - 22, size - 98)


def _reason(error: Exception) -> str:
    """What went wrong, without the address: it may hold secrets."""
    if isinstance(error, requests.HTTPError):
        return f'the server answers {error.response.status_code} {error.response.reason}'
    if isinstance(error, requests.ConnectionError) and error.request is not None:
        host = urllib.parse.urlsplit(error.request.url).netloc.rpartition('@')[2]
        return f'no connection to {host}'
    if isinstance(error, requests.Timeout | TimeoutError | urllib3.exceptions.TimeoutError):
        return f'nothing came for {TIMEOUT} seconds'
    if isinstance(error, urllib3.exceptions.HTTPError):
        return 'the connection was cut'
    if isinstance(error, ValueError):
        return 'its address, or the answer, is not valid'
    return one_line(error)
