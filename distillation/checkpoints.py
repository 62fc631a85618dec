"""Checkpoints of distillation: guided diffusion's files, and the cache beside them.

    teacher-state-NNNNNN.cache  the cache (see `distillation.cache.open_cache`); processes after
                                the first have their own, teacher-state-NNNNNN-RANK.cache
"""

import os

from distillation.cache import Cache, open_cache, write_cache
from dnnlib.util import matching_names
from torch_utils import distributed as dist
from training.checkpoint import GuidedCheckpoints

_KEPT_CACHES = 2  # the newest; an older one is needed only if the newest is damaged


class CacheCheckpoints(GuidedCheckpoints):
    """GuidedCheckpoints in which every process writes its share of the cache to a file.

    cache_interval  steps after which a checkpoint holds the cache; below 1: every one does
    """

    prefixes = (*GuidedCheckpoints.prefixes, 'teacher-state-')

    def __init__(self, *args, cache_interval: int = -1):
        super().__init__(*args)
        self.cache_interval = cache_interval

    def save_share(self, nimg, batches):
        rest = dict(batches)
        cache = rest.pop('cache', None)
        step = self.number(nimg)
        if cache is None or (self.cache_interval > 0 and step % self.cache_interval):
            return rest
        rank = f'-{dist.get_rank()}' if dist.get_rank() else ''
        name = f'teacher-state-{step:06d}{rank}.cache'
        description = {'step': step, 'rank': dist.get_rank()}
        write_cache(os.path.join(self.folder, name), [Cache(**cache)], description)
        caches = matching_names(self.folder, rf'teacher-state-(\d{{6,}}){rank}\.cache')
        for old in sorted(caches, key=lambda match: int(match[1]))[:-_KEPT_CACHES]:
            os.remove(os.path.join(self.folder, old[0]))
        return rest | {'cache': name}

    def patterns(self, number):
        return [rf'teacher-state-{number:06d}(-\d+)?\.cache', *super().patterns(number)]

    def read(self, path):
        content = super().read(path)
        for batches in content.get('batches', ()):
            self.load_share(path, batches)
        return content

    def load_share(self, path, batches):
        """Raises UserError if the cache beside the checkpoint is damaged."""
        name = batches.get('cache')
        if isinstance(name, str):
            cache, _ = open_cache(os.path.join(os.path.dirname(path), os.path.basename(name)))
            batches = batches | {'cache': cache.state_dict()}
        return batches
