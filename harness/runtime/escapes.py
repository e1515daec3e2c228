"""Text of strangers, as each place that shows it takes it: names, messages, hosts, errors, whatever lies in a run's URL.

Anyone who can write a run's URL can put anything there. One function for each place; all of them take any value.
"""

import re
from html import escape

_NO_METRIC = re.compile(r"[^a-zA-Z0-9_]")


def for_terminal(value: object, most: int | None = None, keep: str = "") -> str:
    """One line of a terminal: characters that would steer it, break the line or turn its direction are shown as ``\\x1b``,
    but for those to ``keep``. Text longer than ``most`` characters is cut."""
    text = str(value)
    if most is not None and len(text) > most:
        text = f"{text[:most]}…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escaped(char) for char in text)


def for_html(value: object, most: int | None = None) -> str:
    """The text of an element, or an attribute's value in quotes."""
    return escape(for_terminal(value, most), quote=True)


def for_prometheus_name(*words: str) -> str:
    """A metric's name, which has few characters; several names may become the same one."""
    return "_".join(_NO_METRIC.sub("_", word.replace("/s", "_per_second")) for word in words)


def for_prometheus_label(value: object) -> str:
    """A label's value in quotes."""
    return for_terminal(value).replace("\\", "\\\\").replace('"', '\\"')


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
