"""HTML that escapes whatever is no `Markup`: what comes from a file cannot become part of it."""

import html

from dnnlib.util import without_codes

_VOID = frozenset(('meta', 'img', 'input'))


class Markup(str):
    """A text that is HTML as it stands."""


def join(*parts) -> Markup:
    """Parts one after the other; lists are joined, None is left out, all else is escaped."""
    texts = []
    for part in parts:
        if isinstance(part, Markup):
            texts.append(part)
        elif isinstance(part, list | tuple):
            texts.append(join(*part))
        elif part is not None:
            texts.append(html.escape(without_codes(str(part))))
    return Markup(''.join(texts))


def tag(name: str, /, *content, **attributes) -> Markup:
    """An element: `class_` stands for class, `data_x` for data-x; attributes that are None are
    left out.
    """
    texts = [f' {key.rstrip("_").replace("_", "-")}="{html.escape(without_codes(str(value)))}"'
             for key, value in attributes.items() if value is not None]
    start = f'<{name}{"".join(texts)}>'
    return Markup(start if name in _VOID else f'{start}{join(*content)}</{name}>')
