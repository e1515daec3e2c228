"""The starts of a run: what each is numbered, what it was, and which of them may still write. No torch."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from harness.checkpoint.format import MANIFEST_LIMIT_BYTES, Attempt, parse_directory
from harness.errors import Superseded
from harness.storage.store import Store


class Attempts:
    """The starts of the run in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def all(self) -> list[Attempt]:
        """Every start of the run that left a trace, the first one first."""
        names = (name.removeprefix("attempts/").removesuffix(".json") for name in self._store.list("attempts"))
        return sorted(attempt for name in names if (attempt := Attempt.parse(name)))

    def claim(self, about: Mapping[str, Any]) -> Attempt:
        """Numbers this start of the run after all others and leaves a record of it (``about`` is JSON).

        The claim is made before anything is trained: a writer of an earlier attempt has a lower number from then on, even
        if it has yet to write its first checkpoint.
        """
        saved = {each[1] for name in self._store.names() if (each := parse_directory(name))}
        attempt = Attempt.after({*self.all(), *saved})
        record = {"attempt": attempt.id, "started": datetime.now(UTC).isoformat(timespec="milliseconds"), **about}
        text = json.dumps(record, indent=1).encode()
        self._store.put(f"attempts/{attempt.id}.json", lambda: [text], len(text))
        return attempt

    def about(self, attempt: Attempt) -> dict[str, Any]:
        """The record of an attempt; empty where it cannot be read."""
        text = self._store.get(f"attempts/{attempt.id}.json", MANIFEST_LIMIT_BYTES)
        try:
            record = json.loads(text or b"{}")
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def refuse_superseded(self, attempt: Attempt) -> None:
        """Stops who was believed dead, and is not. Raises ``Superseded`` when an attempt after this one trains the run."""
        newest = max(self.all(), default=attempt)
        if newest > attempt:
            about = self.about(newest)
            who = f"started {about.get('started')} on {about.get('host')}"
            raise Superseded(
                f"{self._store.url}: attempt {newest.number} ({who}) has taken over this run; this process "
                "stops without saving"
            )
