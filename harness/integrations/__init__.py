"""Where people already train: one file for each library, imported only by who asks for it.

An integration stands on the public surface of ``harness``, and on that of its library as far as that suffices. Nothing else
in ``harness`` imports one.
"""

from typing import Any


def named(name: str, objects: list[Any]) -> dict[str, Any]:
    """One or several objects, as parts of a state."""
    if len(objects) == 1:
        return {name: objects[0]}
    return {f"{name}_{index}": each for index, each in enumerate(objects)}
