"""ImageNet's 1000 classes, and the class lists of the multi-source study."""

import functools
import pathlib

# Ten classes at each of three similarity levels: sim3 are dogs, sim2 mammals, sim1 anything.
# The first is common to all.
SIMILARITY_LEVELS = {
    'sim3': (171, 182, 198, 208, 215, 231, 236, 244, 245, 258),
    'sim2': (171, 269, 279, 283, 294, 330, 340, 366, 370, 386),
    'sim1': (171, 1, 18, 31, 46, 532, 579, 609, 849, 980),
}


@functools.cache
def classes() -> tuple[tuple[str, str], ...]:
    """(wnid, name) of each class by index: classes()[171] is 'n02091032', 'Italian greyhound'."""
    text = pathlib.Path(__file__).with_name('imagenet-classes.tsv').read_text(encoding='utf-8')
    return tuple(tuple(line.split('\t')[1:]) for line in text.splitlines()[1:])


@functools.cache
def index_of_wnid() -> dict[str, int]:
    """{'n01440764': 0, ...}"""
    return {wnid: index for index, (wnid, _) in enumerate(classes())}
