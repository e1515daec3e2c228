"""What somebody has edited in the program since the checkpoint, and whose word counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from harness.errors import ConfigError
from harness.state.modules import frozen, some
from harness.state.options import Built, Difference, differences
from harness.state.parts import OptimizerPart, Part


class Edits:
    """How this program builds the objects of a state otherwise than the one that wrote the checkpoint.

    Of the ``reset_options`` the program's values count at a resume, of all others the checkpoint's. Raises ``ConfigError``
    for an option that none of the parts has.
    """

    def __init__(self, parts: Mapping[str, Part], reset_options: Sequence[str]) -> None:
        self._parts = parts
        self.differences: list[Difference] = []  # between this program and the one that wrote the checkpoint
        self._built: dict[str, Built] = {name: part.built for name, part in parts.items()}  # as the next checkpoint tells it
        self._reset_options = sorted({*reset_options})
        self._was_frozen: Mapping[str, list[str]] | None = None  # in the checkpoint, where this program builds it otherwise
        known = {key.rpartition(".")[2] for part in parts.values() if part.resets for key in part.built}
        for name in self._reset_options:
            if name not in known:
                raise ConfigError(
                    f"reset_options: no optimizer or scheduler has the option {name!r}; there are {', '.join(sorted(known))}"
                )

    def described(self) -> dict[str, Any]:
        """How the program has built what it trains, for the next checkpoint."""
        return {"built": self._built, "reset_options": self._reset_options, "frozen": self._frozen()}

    def compare(self, saved: Mapping[str, Mapping[str, Any]], training: Mapping[str, Any]) -> None:
        """Notes what this program says otherwise than the one that wrote the checkpoint, and what the next one is to say.

        ``saved`` are the checkpoint's parts, and ``training`` is what ``described`` gave to it.
        """
        was_built, was_reset = training.get("built", {}), training.get("reset_options", [])
        self.differences = []
        for name, part in self._parts.items():
            there = was_built[name] if name in was_built else part.built_of(saved[name])
            found = list(differences(name, part.built, there))
            # Once: an automatic restart of the same program must not undo what has become of the option since.
            part.to_reset = {
                key
                for option in part.built
                if part.resets and (key := option.rpartition(".")[2]) in self._reset_options
                if key not in was_reset or any(each.name == key for each in found)
            }
            for each in found:
                wins = not part.resets or each.name in part.to_reset
                self.differences.append(replace(each, who_counts="program", scheduled="") if wins else each)
            # What an older checkpoint has may be where a schedule was: it is told once, and not kept as what was built.
            kept = {each.option for each in found if part.resets and name in was_built and each.name not in part.to_reset}
            self._built[name] = {key: there[key] if key in kept else here for key, here in part.built.items()}
        was_frozen = training.get("frozen", {})
        self._was_frozen = was_frozen if was_frozen and was_frozen != self._frozen() else None

    def reset(self) -> None:
        """Gives optimizers and schedules, which were restored, those of the program's settings that are to count."""
        rates = {
            id(part.live): [
                (float(group["lr"]), group.get("initial_lr")) for group in part.live.param_groups if "lr" in group
            ]
            for part in self._parts.values()
            if isinstance(part, OptimizerPart)
        }
        changed = {id(part.live) for part in self._parts.values() if {"lr", "max_lr"} & part.to_reset}
        for part in sorted(self._parts.values(), key=lambda part: part.restored):
            part.reset(rates, changed)

    def warn_of_frozen(self, warn: Callable[[str], None]) -> None:
        """After the first step of a resumed run: warns where other parameters are trained than when the checkpoint was
        written, since ``requires_grad`` is restored by nobody but the program."""
        if self._was_frozen is None:
            return
        for name, names in self._frozen().items():
            now, before = {*names}, {*self._was_frozen.get(name, [])}
            lines = [f"{some(sorted(now - before))}: trained then, frozen now"] if now - before else []
            lines += [f"{some(sorted(before - now))}: frozen then, trained now"] if before - now else []
            if lines:
                advice = "requires_grad is not restored; before Run, set it as it is at this step of the training"
                warn(f"{name}: the trained parameters differ from those of the checkpoint: {'; '.join(lines)}. {advice}")

    def _frozen(self) -> dict[str, list[str]]:
        return {name: frozen(part.live) for name, part in self._parts.items() if isinstance(part.live, nn.Module)}
