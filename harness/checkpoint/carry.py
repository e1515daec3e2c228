"""Takes what a rank has kept on its machine to the run's URL, where nobody on this machine will go on. No torch.

A kept state is a checkpoint already. So it is copied as it lies, its manifest last, under the rules of every save: a reader
of the URL sees an unfinished save, and afterwards a checkpoint. A restore verifies its bytes.
"""

import functools
import os
from collections.abc import Callable

from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import MANIFEST, MANIFEST_LIMIT_BYTES, Attempt
from harness.checkpoint.kept import KeptPlace, Unusable, kept_of, that_count
from harness.errors import HarnessError
from harness.runtime.console import print_error
from harness.storage.store import Store, open_store

_PIECE_BYTES = 8 << 20
_TRIES, _DEADLINE_SECONDS = 2, 20.0  # who waits for the end of a launch does not wait for long


def carry_and_tell(path: str, tells_of_save: Callable[[Store, Attempt, int], bool]) -> None:
    """Does so at the end of a launch, and prints what has become of it. Raises nothing that a state can cause."""
    try:
        found = carry(path, tells_of_save)
    except (HarnessError, Unusable, OSError) as error:
        print_error(
            f"harness launch: what a rank has kept in {path} could not be copied to the run ({error}); start the same "
            "command on this machine again to continue from it"
        )
        return
    if found is not None:
        step, url = found
        print_error(f"harness launch: step {step}, which a rank has kept on this machine, is a checkpoint in {url} now")


def carry(path: str, tells_of_save: Callable[[Store, Attempt, int], bool]) -> tuple[int, str] | None:
    """Copies the newest state that is kept at a path, if the run would resume from it, and deletes what is kept there.

    Returns its step and the run's URL; None where nothing was copied. ``tells_of_save`` says whether the events of an
    attempt in a store tell of a save. Raises ``HarnessError`` where the run's URL cannot be used, and ``Unusable`` for a
    path that somebody else may have written to.
    """
    place = KeptPlace(os.path.dirname(path), path)
    entries = place.entries()
    if not entries:
        return None
    url = str(kept_of(entries[0]).get("url", ""))
    catalog = Catalog(open_store(url, tries=_TRIES, deadline_seconds=_DEADLINE_SECONDS))
    counting, _ = that_count(catalog, [entries], functools.partial(tells_of_save, catalog.store))
    best = next((entry for entry in catalog.candidates(kept=counting) if entry.state == "whole"), None)
    if best is None or not best.holders:
        return None
    assert best.manifest is not None, "it is whole"
    for file in best.manifest.files:
        _copy(place.store, catalog.store, f"{best.directory}/{file.name}", file.bytes)
    text = place.store.get(f"{best.directory}/{MANIFEST}", MANIFEST_LIMIT_BYTES) or b""
    catalog.store.put(f"{best.directory}/{MANIFEST}", lambda: [text], len(text))
    place.forget()
    return best.step, catalog.store.url


def _copy(source: Store, target: Store, name: str, size_bytes: int) -> None:
    pieces = [(name, start, min(_PIECE_BYTES, size_bytes - start)) for start in range(0, size_bytes, _PIECE_BYTES)]
    target.put(name, lambda: source.pieces(pieces), size_bytes)
