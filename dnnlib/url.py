"""Downloads into a cache folder: complete or not at all, and not needed again."""

import hashlib
import os
import re
import urllib.parse

import requests
import tqdm

from dnnlib import util

TIMEOUT = 30  # seconds without a byte


def cache_folder() -> str:
    """Where downloads are kept: $DNNLIB_CACHE_DIR, else ~/.cache/dnnlib."""
    return os.environ.get('DNNLIB_CACHE_DIR') or os.path.join(os.path.expanduser('~'), '.cache', 'dnnlib')


def is_url(path) -> bool:
    """True for http:// and https:// addresses."""
    return str(path).startswith(('http://', 'https://'))


def cache_path(url: str) -> str:
    """The file that keeps the download of `url`: its hash and its last name."""
    name = os.path.basename(urllib.parse.urlparse(url).path)
    name = re.sub(r'[^A-Za-z0-9._-]', '_', name)[-100:]
    return os.path.join(cache_folder(), f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}')


def download(url: str, hint: str = 'download it elsewhere and give the path of the file') -> str:
    """Path of a local copy of `url`, fetched if the cache does not have it. Any other path is returned as it is.

    The file appears in the cache only when complete. Raises UserError, ending in `hint`, if it cannot be fetched.
    """
    if not is_url(url):
        return url
    path = cache_path(url)
    if os.path.isfile(path):
        return path
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as response, util.atomic_path(path) as temp:
            response.raise_for_status()
            size = int(response.headers.get('Content-Length') or 0)
            # A compressed transfer has fewer bytes on the way than in the file: then the length says nothing.
            exact = size if not response.headers.get('Content-Encoding') else 0
            with open(temp, 'wb') as file, tqdm.tqdm(
                    total=exact or None, unit='B', unit_scale=True, desc=f'Downloading {os.path.basename(path)[17:]}') as bar:
                for block in response.iter_content(1 << 20):
                    file.write(block)
                    bar.update(len(block))
                if exact and file.tell() != exact:
                    raise requests.ConnectionError(f'{file.tell()} of {exact} bytes came')
    except (requests.RequestException, OSError) as error:
        raise util.UserError(f'{url} cannot be downloaded ({_reason(error)}); {hint}') from None
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        return f'the server answers {error.response.status_code} {error.response.reason}'
    if isinstance(error, requests.ConnectionError) and error.request is not None:
        return f'no connection to {urllib.parse.urlparse(error.request.url).netloc}'
    return ' '.join(str(error).split())[:120] or type(error).__name__
