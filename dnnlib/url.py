"""Downloads into a cache folder: complete or not at all, resumed where they were cut, and not
needed again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import urllib.parse

import requests
import tqdm

from dnnlib.util import UserError, hash_file, one_line, write_json

TIMEOUT = 30    # seconds without a byte
ATTEMPTS = 5    # in which nothing new came, one after the other


def cache_folder() -> str:
    """Where downloads are kept: $DNNLIB_CACHE_DIR, else ~/.cache/dnnlib."""
    return os.environ.get('DNNLIB_CACHE_DIR') or os.path.expanduser('~/.cache/dnnlib')


def is_url(path) -> bool:
    """True for http:// and https:// addresses."""
    return str(path).startswith(('http://', 'https://'))


def cache_path(url: str) -> str:
    """The file that keeps the download of `url`: its hash and its last name."""
    name = os.path.basename(urllib.parse.urlparse(url).path)
    name = re.sub(r'[^A-Za-z0-9._-]', '_', name)[-100:]
    return os.path.join(cache_folder(), f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}')


def check_sha256(path: str, sha256: str, name: str):
    """Raises UserError unless the file `path`, called `name`, has this SHA-256."""
    if not os.path.isfile(path):
        raise UserError(f'{name} is no file')
    digest = hash_file(path)
    if digest != sha256.lower():
        raise UserError(f'{name} has the SHA-256 {digest} instead of {sha256.lower()}; '
                        'it is another file, or damaged')


def download(url: str, hint: str = 'download it elsewhere and give the path of the file',
             sha256: str | None = None) -> str:
    """Path of a local copy of `url`, fetched if the cache does not have it. Any other path is
    returned as it is.

    The file appears in the cache only when complete and, with `sha256`, right. What came of a
    broken download stays beside it, and the next call goes on from there if the server still has
    the same file. Several processes may ask for one file: one fetches it. Raises UserError, ending
    in `hint`, if it cannot be fetched.
    """
    if sha256 and re.fullmatch('[0-9a-fA-F]{64}', sha256) is None:
        raise UserError('is not 64 hexadecimal digits', field='sha256', value=sha256[:80])
    path = cache_path(url) if is_url(url) else url
    if path == url or os.path.isfile(path):
        if sha256:
            check_sha256(path, sha256, url if path == url else f'{url} (in the cache: {path})')
        return path
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        with _locked(path + '.part') as part:
            if not os.path.isfile(path):  # else another process has just fetched it
                _fetch(url, part)
                try:
                    if sha256:
                        check_sha256(part.name, sha256, url)
                except UserError:
                    part.truncate(0)
                    raise
                os.replace(part.name, path)
                _remove(part.name + '.json')
    except (requests.RequestException, OSError) as error:
        raise UserError(f'{url} cannot be downloaded ({_reason(error)}); {hint}') from None
    return path


def _remove(path):
    pathlib.Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: str):
    """The file of a download, open and locked: other processes wait. The system drops the lock
    when a process dies.
    """
    with open(path, 'ab', buffering=0, opener=lambda name, flags: os.open(
            name, flags | os.O_NOFOLLOW, 0o644)) as part:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(part, fcntl.LOCK_EX)
        try:
            yield part
        finally:
            if not _size(path):
                _remove(path)
                _remove(path + '.json')


def _fetch(url: str, part):
    """Fetches `url` into the file `part`, going on with what is there as long as attempts bring
    something new.
    """
    left = ATTEMPTS
    while True:
        before = _size(part.name)
        try:
            return _attempt(url, part)
        except (requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError):
            after = _size(part.name)
            left = ATTEMPTS if after > before else left - 1
            if not left or not after:  # without a connection there is nothing to wait for
                raise


def _attempt(url: str, part):
    """One connection. The validator of the server's file is kept, so that parts of two versions
    are never joined.
    """
    have, validator = _size(part.name), _read_validator(part.name)
    headers = {'Accept-Encoding': 'identity'}
    if have and validator:
        headers |= {'Range': f'bytes={have}-', 'If-Range': validator}
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
        start = response.headers.get('Content-Range', '')
        resumed = response.status_code == 206 and start.startswith(f'bytes {have}-')
        if not resumed and response.status_code in (206, 416):
            part.truncate(0)
            raise requests.ConnectionError('the server does not have the part that is missing '
                                           'here')
        response.raise_for_status()
        if not resumed:
            part.truncate(0)
            have = 0
        validator = response.headers.get('ETag')
        if not validator or validator.startswith('W/'):
            validator = response.headers.get('Last-Modified')
        write_json(part.name + '.json', dict(url=url, validator=validator))
        # A compressed transfer has fewer bytes on the way than in the file: then the length says
        # nothing.
        length = response.headers.get('Content-Length')
        counted = length and not response.headers.get('Content-Encoding')
        total = have + int(length) if counted else None
        with tqdm.tqdm(total=total, initial=have, unit='B', unit_scale=True,
                       desc=f'Downloading {os.path.basename(part.name)[17:-5]}',
                       disable=int(os.environ.get('RANK', 0)) > 0) as bar:
            for block in response.iter_content(1 << 18):
                part.write(block)
                bar.update(len(block))
        os.fsync(part.fileno())
        if total and _size(part.name) != total:
            raise requests.ConnectionError(f'{_size(part.name)} of {total} bytes came')


def _size(path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _read_validator(part) -> str | None:
    try:
        with open(part + '.json') as file:
            return json.load(file).get('validator')
    except (OSError, ValueError, AttributeError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return f'the server answers {error.response.status_code} {error.response.reason}'
    if isinstance(error, requests.ConnectionError) and error.request is not None:
        return f'no connection to {urllib.parse.urlparse(error.request.url).netloc}'
    return one_line(error)
