"""The names without which a program cannot be resumed, and whether they have changed while it was trained."""

from collections.abc import Callable, Mapping
from typing import Any

from harness.state.modules import listed
from harness.state.parts import ModulePart, Part

Captured = Mapping[str, Mapping[str, Any]]  # by part


class SavedNames:
    """The entries of the modules and the parameters of the optimizers' groups, as they were when the run was made."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = [part for part in parts.values() if part.is_named]
        order = sorted(self._parts, key=lambda part: not isinstance(part, ModulePart))  # as in a capture
        captured = {part.name: part.capture() for part in order}
        self._names, self._sizes = self._names_in(captured), self._sizes_of(captured)

    def warn_of_changes(self, captured: Captured, warn: Callable[[str], None]) -> None:
        """Says at the first save that has other names that the next start will be refused."""
        sizes = self._sizes_of(captured)
        if sizes == self._sizes:
            return
        before, now = self._names, self._names_in(captured)
        lines = [f"{key}: new, {now[key]}" for key in now if key not in before]
        lines += [f"{key}: gone" for key in before if key not in now]
        lines += [f"{key}: {before[key]} before, now {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        self._names, self._sizes = now, sizes
        if lines:
            what = "the names or shapes in the state have changed since Run was made"
            warn(
                f"{listed(what, lines, 10)}\nA program that builds what this one has built cannot be resumed from it: build "
                "it like this before Run, or in a function that Run(..., adapt=...) calls with the checkpoint's names"
            )

    def _names_in(self, captured: Captured) -> dict[str, str]:
        """The names, and what kind each is."""
        return {f"{part.name}: {key}": kind for part in self._parts for key, kind in part.names(captured[part.name]).items()}

    def _sizes_of(self, captured: Captured) -> dict[str, Any]:
        return {part.name: part.size(captured[part.name]) for part in self._parts}
