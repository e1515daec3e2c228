"""Remembers what attempts died of, beside the checkpoints, so that a run does not die of the same thing for ever.

torchrun's counters cannot tell: they start anew with every launch and differ between nodes. Here an attempt that fails in
training leaves a record with the step, the error and the samples of that step. The same error at the same step in
``same_failures`` attempts in a row is a crash loop. It may come from the checkpoint, so the next attempt takes the one
before; if that fails in the same way, the run stops and names the step and the samples.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.errors import CrashLoop
from harness.secrecy import scrubbed

_RECORD_LIMIT_BYTES = 1 << 20
_MOST_SAMPLES = 64
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b|\d+")  # hexadecimal ones, long ones without 0x, too


@dataclass(frozen=True)
class Crash:
    """What an attempt died of, on one rank, while it trained ``step``."""

    step: int
    error: str
    rank: int
    samples: Sequence[int]

    def is_like(self, other: "Crash") -> bool:
        """Whether both died of the same thing: the numbers in an error (process ids, addresses) may differ."""
        return self.step == other.step and _without_numbers(self.error) == _without_numbers(other.error)


def _without_numbers(error: str) -> str:
    return _NUMBER.sub("#", error)


def record_crash(catalog: Catalog, attempt: Attempt, crash: Crash) -> None:
    """Leaves a record beside the checkpoints. Raises ``StoreError``."""
    text = json.dumps({**scrubbed(asdict(crash)), "samples": list(crash.samples)[:_MOST_SAMPLES]}, indent=1).encode()
    catalog.store.put(f"attempts/{attempt.id}.crash-{crash.rank}.json", lambda: [text], len(text))


def is_looping(catalog: Catalog, same_failures: int) -> bool:
    """Whether the newest ``same_failures`` attempts died of the same thing. Raises ``CrashLoop`` when one more did.

    To be asked before this attempt claims its own number.
    """
    attempts, names = catalog.attempts.names_before_claim()
    newest = attempts[::-1][: same_failures + 1]
    known = _crashes_of(catalog, names, newest)
    died = [known.get(attempt, []) for attempt in newest]
    if not died or not died[0]:
        return False
    last = died[0][0]
    alike = 0
    for crashes in died:
        if not any(crash.is_like(last) for crash in crashes):
            break
        alike += 1
    if alike > same_failures:
        raise CrashLoop(
            f"{catalog.store.url}: step {last.step} failed {alike} times in a row with {last.error!r} on rank "
            f"{last.rank}, the last time from an older checkpoint; its samples there: {list(last.samples)}; fix "
            f"the cause, then start with crash_loop.same_failures={alike + 1}"
        )
    return alike == same_failures


def read_crashes(catalog: Catalog, attempts: Sequence[Attempt]) -> dict[Attempt, list[Crash]]:
    """What attempts died of, where they have left a record of it."""
    return _crashes_of(catalog, catalog.store.list("attempts"), attempts)


def _crashes_of(catalog: Catalog, names: Collection[str], attempts: Sequence[Attempt]) -> dict[Attempt, list[Crash]]:
    return {attempt: found for attempt in attempts if (found := _crashes(catalog, names, attempt))}


def _crashes(catalog: Catalog, names: Collection[str], attempt: Attempt) -> list[Crash]:
    found = []
    for name in sorted(names):
        if name.startswith(f"attempts/{attempt.id}.crash-"):
            text = catalog.store.get(name, _RECORD_LIMIT_BYTES)
            try:
                found.append(Crash(**json.loads(text or b"")))
            except (ValueError, TypeError, RecursionError):  # cut by a death of the writer, or made to do harm
                continue
    return found
