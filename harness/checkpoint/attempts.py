"""The starts of a run: what each is numbered, what it was, and which of them may still write. No torch."""

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from harness.checkpoint.format import MANIFEST_LIMIT_BYTES, Attempt, parse_directory
from harness.errors import Superseded
from harness.storage.store import Store


class Attempts:
    """The starts of the run in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listed: Collection[str] | None = None  # for a claim that follows at once
        self._saves: list[str] | None = None  # for a resume that follows at once
        self.first: Attempt | None = None  # of the run, once this process has claimed one

    def all(self) -> list[Attempt]:
        """Every start of the run that left a trace, the first one first."""
        return _among(self._store.list("attempts"))

    def names_before_claim(self) -> tuple[list[Attempt], Collection[str]]:
        """Every start, and the names of all records. The claim that follows at once does not list them again."""
        self._listed = self._store.list("attempts")
        return _among(self._listed), self._listed

    def saves_after_claim(self) -> list[str] | None:
        """The names of the saves as they were right after the claim. They are given once; None where there was no claim."""
        saves, self._saves = self._saves, None
        return saves

    def claim(self, about: Mapping[str, Any], *, resumes: bool = False) -> Attempt:
        """Numbers this start of the run after all others and leaves a record of it (``about`` is JSON).

        The claim is made before anything is trained: a writer of an earlier attempt has a lower number from then on, even
        if it has yet to write its first checkpoint. What lies there is listed after it: what a writer deletes that has not
        seen the claim is older than what this attempt sees. With ``resumes`` ``saves_after_claim`` has the names.
        """
        listed, self._listed = self._listed, None
        attempts = _among(self._store.list("attempts") if listed is None else listed)
        attempt = self._record(Attempt.after(attempts), about)
        names = self._store.names(beginning="step-")
        saved = max((each[1] for name in names if (each := parse_directory(name))), default=None)
        if saved and saved.number >= attempt.number:  # its record was deleted, or it was copied here
            record = f"attempts/{attempt.id}.json"
            attempt = self._record(Attempt.after([saved]), about)
            self._store.delete(record)
        self.first = min([*attempts, attempt])
        if resumes:
            self._saves = names
        return attempt

    def _record(self, attempt: Attempt, about: Mapping[str, Any]) -> Attempt:
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


def _among(names: Iterable[str]) -> list[Attempt]:
    """The starts that have left these records, the first one first."""
    ids = (name.removeprefix("attempts/").removesuffix(".json") for name in names)
    return sorted(attempt for each in ids if (attempt := Attempt.parse(each)))
