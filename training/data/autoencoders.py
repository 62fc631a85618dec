"""Autoencoders in folders of this machine. Archives say their last name and what tells their
content; the cache folder of the user knows where they are.
"""

import contextlib
import hashlib
import os
import re

from dnnlib.url import cache_folder
from dnnlib.util import hash_file


def _place(fingerprint: str) -> str:
    return os.path.join(cache_folder(), 'autoencoders', fingerprint)


def _fingerprint(folder: str) -> str:
    """Of the configuration and the weights: 32 hexadecimal digits."""
    pipeline = os.path.join(folder, 'vae')
    folder = pipeline if os.path.isdir(pipeline) else folder
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith(('.json', '.safetensors', '.bin')):
            digest.update(f'{name} {hash_file(os.path.join(folder, name))}\n'.encode())
    return digest.hexdigest()[:32]


def remember(folder: str) -> str:
    """The fingerprint of an autoencoder that the user names; `locate` finds its folder by it."""
    fingerprint = _fingerprint(folder)
    place = _place(fingerprint)
    temp = f'{place}.{os.getpid()}'
    with contextlib.suppress(OSError):                         # then the user must name it again
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.symlink(os.path.abspath(folder), temp)
        os.replace(temp, place)
    return fingerprint


def locate(encoder: dict) -> dict:
    """The configuration of an encoder with the folder of its autoencoder, where that is known and
    has not changed.
    """
    fingerprint = encoder.get('fingerprint')
    if isinstance(fingerprint, str) and re.fullmatch('[0-9a-f]{32}', fingerprint):
        with contextlib.suppress(OSError):
            folder = os.readlink(_place(fingerprint))
            if _fingerprint(folder) == fingerprint:
                return encoder | {'vae_name': folder}
    return encoder
