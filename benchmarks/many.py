"""What a run of many checkpoints and many starts costs: ``ls``, the start of a resume, ``prune``.

    python benchmarks/many.py [--checkpoints 10000] [--attempts 1000] [--s3] [--folder DIRECTORY]

One save is real. The others have its files under names and manifests of their own, and their attempts' lineage: each attempt
stands on all before it. Counted are the seconds, on S3 (a SeaweedFS on this machine) also the requests, by kind. The floors:
on a disk the time in which ``os.scandir`` lists the names, or ``shutil.rmtree`` removes the same directories; on S3 the
list requests that names or objects need at 1,000 in each.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog, further
from harness.checkpoint.format import MANIFEST, Ancestor, Attempt, new_directory
from harness.cli import cli
from harness.storage.store import Store, open_store
from harness.telemetry import crashes

PAGE = 1000  # names or objects that S3 lists in a request
SAME_FAILURES = 3  # as the configuration has it


def build(checkpoints: int, attempts: int, put: Callable[[str, bytes], Any]) -> None:
    """Puts a run there. ``put`` need not be durable."""
    starts = [Attempt(f"{number:06}-{number:08x}") for number in range(1, attempts + 1)]
    state = {"model": {"weight": torch.ones(8)}, "optimizer": {"moment": torch.zeros(8)}, "random": {"0": torch.zeros(4)}}
    elsewhere = open_store("memory://many")  # a server may keep the name of a save that is deleted
    directory, _ = commit.write(elsewhere, state, step=0, attempt=starts[0])
    manifest = Catalog(elsewhere).open(directory)
    files = [(file.name, elsewhere.get(f"{directory}/{file.name}", 1 << 20)) for file in manifest.files]
    each = checkpoints // attempts
    lineage: list[Ancestor] = []

    def saves() -> Iterator[tuple[str, bytes]]:
        for number, attempt in enumerate(starts):
            record = {"attempt": attempt.id, "started": "2026-01-01T00:00:00.000+00:00", "host": "node", "launch": "x"}
            yield f"attempts/{attempt.id}.json", json.dumps(record, indent=1).encode()
            for step in range(number * each + 1, number * each + each + 1):
                name = new_directory(step, attempt)
                yield from ((f"{name}/{file}", data or b"") for file, data in files)
                own = replace(manifest, step=step, attempt=attempt.id, lineage=list(lineage))
                yield f"{name}/{MANIFEST}", own.encode()
            lineage.append(Ancestor(attempt.id, number * each + each))

    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda item: put(*item), saves()):
            pass


def run_verb(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([*arguments], standalone_mode=False)


def start(store: Store) -> None:
    """What rank 0 asks of a store before it reads the checkpoint that a run continues from."""
    catalog = Catalog(store)
    crashes.is_looping(catalog, SAME_FAILURES)
    catalog.attempts.claim({}, resumes=True)
    newest = next(catalog.candidates())
    further(catalog, newest)


def seconds_of(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def on_a_disk(folder: Path, checkpoints: int, attempts: int) -> None:
    url, copied = folder / "run", folder / "floor"

    def put(name: str, data: bytes) -> None:
        (url / name).parent.mkdir(parents=True, exist_ok=True)
        (url / name).write_bytes(data)

    build(checkpoints, attempts, put)
    shutil.copytree(url, copied)
    names = min(seconds_of(lambda: [*os.scandir(url)]) for _ in range(3))
    removed = seconds_of(lambda: shutil.rmtree(copied))
    begun = seconds_of(lambda: start(open_store(str(url))))
    listed = seconds_of(lambda: run_verb("ls", str(url)))
    pruned = seconds_of(lambda: run_verb("prune", str(url), "--keep-last", "1"))
    for what, seconds, floor in (("start", begun, names), ("ls", listed, names), ("prune", pruned, removed)):
        print(f"disk  {what:<6} {seconds:7.2f} s   floor {floor:6.2f} s", flush=True)


class Requests:
    """What a store asks of an S3 server, by kind."""

    def __init__(self, store: Store) -> None:
        self.made: Counter[str] = Counter()
        store.filesystem.fs.connect()
        store.filesystem.fs.s3.meta.events.register("request-created.s3", self._note)

    def _note(self, operation_name: str, **_: Any) -> None:
        self.made[operation_name] += 1


def on_s3(folder: Path, checkpoints: int, attempts: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.support.servers import seaweedfs

    with seaweedfs(folder) as server:
        url, options = server.url("run"), {**server.storage_options}
        store = open_store(url, options)
        fs = store.filesystem.fs
        build(checkpoints, attempts, lambda name, data: fs.pipe_file(f"{store.root}/{name}", data))
        objects = len(store.list())
        requests = Requests(store)  # the verbs open the same filesystem
        settings = [f"--storage-option={key}={value}" for key, value in options.items()]
        for what, function in (
            ("start", lambda: start(open_store(url, options))),
            ("ls", lambda: run_verb("ls", url, *settings)),
            ("prune", lambda: run_verb("prune", url, "--keep-last", "1", *settings)),
        ):
            requests.made.clear()
            seconds = seconds_of(function)
            lists = sum(count for name, count in requests.made.items() if name.startswith("List"))
            floor = -(-(objects if what == "prune" else checkpoints + 1) // PAGE)
            others = {name: count for name, count in requests.made.items() if not name.startswith("List")}
            print(f"S3    {what:<6} {seconds:7.2f} s   {lists} list requests, floor {floor}; others {others}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--checkpoints", type=int, default=10_000)
    options.add_argument("--attempts", type=int, default=1_000)
    options.add_argument("--s3", action="store_true", help="on S3, too")
    options.add_argument("--folder", type=Path, help="where the run is made (default: the folder for temporary files)")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        on_a_disk(Path(folder) / "disk", chosen.checkpoints, chosen.attempts)
        if chosen.s3:
            on_s3(Path(folder), chosen.checkpoints, chosen.attempts)


if __name__ == "__main__":
    main()
