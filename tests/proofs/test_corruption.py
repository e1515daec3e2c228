"""Every damage to a committed checkpoint is noticed, and the run falls back to the one before, bit for bit.

First every byte of every file, and every other kind of damage at the places that mean something; then random damage by the
thousand. The second half is about files that were made to do harm: their checksums fit, and what they say does not.
"""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.checkpoint import load, tree
from harness.checkpoint.catalog import Catalog, Entry, verify
from harness.checkpoint.format import (
    DTYPES,
    MANIFEST,
    FileInfo,
    Manifest,
    TensorInfo,
    checksum,
    decode_header,
    encode_header,
)
from harness.checkpoint.retention import Pruner, Retention
from harness.errors import CheckpointError, Corrupt, NoCheckpoint
from harness.storage.store import open_store
from tests.support.faults import Life, Objects, Tree, resume_from, silence, write_tree
from tests.support.forged_manifests import sealed, unexpected_error, with_checksum


@pytest.fixture(autouse=True)
def quiet():
    with silence():
        yield


@pytest.fixture(scope="module")
def committed() -> Tree:
    """A run with the checkpoints 10, 20 and 30, of several shards each."""
    objects = Objects({})
    with silence():
        life = Life(objects, keep_last=None)
        for step in (10, 20, 30):
            life.save(step)
    return objects.objects


def files_of(run: Tree, step: int) -> dict[str, bytes]:
    """The objects of a checkpoint, by their names within its directory."""
    return {name.partition("/")[2]: data for name, data in run.items() if name.startswith(f"step-{step:012}-")}


def directory_of(run: Tree, step: int) -> str:
    return next(name.partition("/")[0] for name in run if name.startswith(f"step-{step:012}-"))


# --- damage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What happens to a file of the newest checkpoint; ``after`` is None where the file is gone."""

    kind: str
    file: str
    after: bytes | None


def places(file: str, data: bytes) -> list[int]:
    """Where a byte means something: in a shard the ends of the length, the header and the tensors; all over in JSON."""
    if not file.endswith(".safetensors"):
        return [*range(0, len(data), 7), len(data) - 2, len(data) - 1]
    header = int.from_bytes(data[:8], "little")
    starts = [
        8 + header + info["data_offsets"][0] for name, info in json.loads(data[8 : 8 + header]).items() if name[0] != "_"
    ]
    edges = [0, 7, 8, 9, 8 + header // 2, 8 + header, *starts, len(data)]
    return sorted({place for edge in edges for place in (edge - 1, edge, edge + 1) if 0 <= place < len(data)})


def every_damage(run: Tree) -> Iterator[Damage]:
    """All that can be done to each file of the checkpoint 30."""
    newest = files_of(run, 30)
    for file, data in newest.items():
        for at in range(len(data)):
            yield Damage("flipped", file, data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        for at in places(file, data):
            yield Damage("cut", file, data[:at])
            yield Damage("cut out", file, data[:at] + data[at + 1 :])
            yield Damage("put in", file, data[:at] + b"\0" + data[at:])
            yield Damage("zeros from here", file, data[:at] + bytes(len(data) - at))
        yield Damage("zeros", file, bytes(len(data)))
        yield Damage("doubled", file, data + data)
        for more in (b"\0", b"\n", b" ", bytes(4096), data[-8:]):
            yield Damage("appended", file, data + more)
        yield Damage("missing", file, None)
        yield Damage("empty", file, b"")
        for step in (10, 20):
            yield Damage("that of another checkpoint", file, files_of(run, step)[file])
        for other in newest:
            yield Damage("another file", file, newest[other])


def random_damage(run: Tree, chance: random.Random) -> Damage:
    """Anything at all at a random place of a random file."""
    newest = files_of(run, 30)
    file = chance.choice(sorted(newest))
    data = newest[file]
    start, stop = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    match chance.randrange(8):
        case 0 | 1:
            at = chance.randrange(len(data))
            return Damage("flipped", file, data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
        case 2:
            return Damage("cut", file, data[:start])
        case 3:
            return Damage("cut out", file, data[:start] + data[stop:])
        case 4:
            return Damage("doubled", file, data[:stop] + data[start:])
        case 5:
            return Damage("zeros", file, data[:start] + bytes(stop - start) + data[stop:])
        case 6:
            return Damage("noise", file, data[:start] + chance.randbytes(stop - start) + data[stop:])
        case _:
            other = files_of(run, chance.choice((10, 20)))
            return Damage("that of another checkpoint", file, other[file][: stop or None])


def real_damages(run: Tree, chance: random.Random) -> Iterator[Damage]:
    """Random damage without end; what happens to leave a file as it was is none."""
    before = files_of(run, 30)
    while True:
        if (damage := random_damage(run, chance)).after != before[damage.file]:
            yield damage


@dataclass
class Judge:
    """Checks that damage to the newest checkpoint is noticed, and that the run resumes from the one before."""

    run: Tree
    counts: Counter[str]
    problems: list[str]

    def judge(self, damage: Damage, store: Objects, *, resumes: bool = True) -> None:
        directory = directory_of(self.run, 30)
        if problem := self.noticed(store, directory, damage.file, loads=resumes) or (resumes and self.resumed(store)):
            self.problems.append(f"{damage.file} {damage.kind}: {problem}")
        self.counts[damage.kind] += 1

    def noticed(self, store: Any, directory: str, file: str, *, loads: bool = True) -> str | None:
        """What is wrong with how it was noticed, if anything is."""
        catalog = Catalog(store)
        checks = {"verifying": partial(verify, catalog), "loading": lambda entry: read(catalog, entry)}
        for what, check in [*checks.items()][: None if loads else 1]:
            try:
                check(Entry(directory, 30, None, "whole"))
                return f"not noticed when {what}"
            except CheckpointError as error:
                if file not in str(error):
                    return f"the error does not name the file: {error}"
        return None

    def resumed(self, store: Any) -> str | None:
        """What is wrong with the resume from the checkpoint before, if anything is."""
        resumed, restored = resume_from(store)
        if restored.step != 20 or not restored.exact:
            return f"resumed from {restored.step}"
        digests = {name: part.digest for name, part in Catalog(store).open(resumed.directory).parts.items()}
        before = Manifest.decode(files_of(self.run, 20)[MANIFEST])
        return None if digests == {name: part.digest for name, part in before.parts.items()} else "with other digests"

    def summary(self) -> str:
        return f"{self.counts.total()} damages ({', '.join(f'{kind} {count}' for kind, count in self.counts.items())})"


def read(catalog: Catalog, entry: Entry) -> dict[str, Any]:
    return load.read(catalog.store, entry.directory, catalog.open(entry.directory))


def damaged(run: Tree, damage: Damage) -> dict[str, bytes]:
    name = f"{directory_of(run, 30)}/{damage.file}"
    rest = {other: data for other, data in run.items() if other != name}
    return rest if damage.after is None else rest | {name: damage.after}


@pytest.mark.parametrize("one_in", [pytest.param(64, id="some"), pytest.param(1, id="all", marks=pytest.mark.soak)])
def test_every_damage_is_noticed(committed, capsys, one_in):
    """Each byte flipped; cut, zeroed, doubled, swapped, lost at each place that means something: noticed, fallen back.

    Of flipped bytes, which are many, every one is noticed by verifying, and one in so many by loading, and fallen back from.
    """
    judge = Judge(committed, Counter(), [])
    before = files_of(committed, 30)
    for damage in every_damage(committed):
        if damage.after != before[damage.file]:
            resumes = damage.kind != "flipped" or judge.counts["flipped"] % one_in == 0
            judge.judge(damage, Objects(damaged(committed, damage)), resumes=resumes)
    with capsys.disabled():
        print(f"\n    {judge.summary()}", end="")
    assert not judge.problems, (len(judge.problems), judge.problems[:5])
    assert judge.counts["flipped"] == sum(map(len, before.values()))


def test_random_damage_is_noticed(committed, capsys):
    """Random damage to random files, a thousand times: all of it is noticed, and fallen back from."""
    judge = Judge(committed, Counter(), [])
    for damage in itertools.islice(real_damages(committed, random.Random(1)), 1_000):
        judge.judge(damage, Objects(damaged(committed, damage)))
    with capsys.disabled():
        print(f"\n    {judge.summary()}", end="")
    assert not judge.problems, (len(judge.problems), judge.problems[:5])


@pytest.mark.soak
def test_random_damage_on_a_disk_is_noticed(committed, tmp_path, capsys):
    """The same on a real disk, ten thousand times."""
    write_tree(committed, str(tmp_path))
    store = open_store(str(tmp_path), tries=1)
    judge = Judge(committed, Counter(), [])
    for damage in itertools.islice(real_damages(committed, random.Random(2)), 10_000):
        path = tmp_path / directory_of(committed, 30) / damage.file
        path.write_bytes(damage.after)
        judge.judge(damage, store)
        path.write_bytes(files_of(committed, 30)[damage.file])
    assert resume_from(store)[1].step == 30
    with capsys.disabled():
        print(f"\n    {judge.summary()}", end="")
    assert not judge.problems, (len(judge.problems), judge.problems[:5])


@pytest.mark.parametrize("file", ["manifest.json", "model-00001-of-00002.safetensors"])
def test_when_nothing_is_whole(committed, file):
    """When every checkpoint is corrupt the run stops, rather than start from scratch over it."""
    objects = {name: data[:-1] + b"?" if name.endswith(f"/{file}") else data for name, data in committed.items()}
    with pytest.raises(NoCheckpoint, match="3 corrupt"):
        resume_from(Objects(objects))


def test_damage_to_an_older_checkpoint_changes_nothing(committed):
    """The newest checkpoint is resumed from whatever has become of the others."""
    for step in (10, 20):
        for file, data in files_of(committed, step).items():
            name = f"{directory_of(committed, step)}/{file}"
            _, restored = resume_from(Objects({**committed, name: data[: len(data) // 2]}))
            assert restored.step == 30 and restored.exact, name


# --- manifests that lie ----------------------------------------------------------------------------------------------

WRONG = [
    None, True, False, 0, 1, -1, 2, 1.5, 10**30, 10**400, "", "x", "\ud800", "../x", "/etc/passwd", "000001-00000000",
    [], [None], [[]], ["x"], {}, {"x": None}, {"$tensor": True}, {"$array": "O"}, {"$numpy": ["<f8", "00"]}, {"$x": 1},
    {"$:[]": 1},
]  # fmt: skip


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from spots(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    if isinstance(value, dict):
        return {key: replaced(item, path[1:], other) if key == path[0] else item for key, item in value.items()}
    return [replaced(item, path[1:], other) if key == path[0] else item for key, item in enumerate(value)]


def left_out(value: Any, path: tuple[Any, ...]) -> Any:
    if len(path) > 1:
        return replaced(value, path[:1], left_out(value[path[0]], path[1:]))
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    kept = {key: item for key, item in pairs if key != path[0]}
    return kept if isinstance(value, dict) else list(kept.values())


def renamed(value: Any, path: tuple[Any, ...]) -> Any:
    *parents, last = path
    parent = value
    for key in parents:
        parent = parent[key]
    return replaced(value, tuple(parents), {f"{key}?" if key == last else key: item for key, item in parent.items()})


def every_lie(manifest: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """A manifest with each of its values replaced by each wrong one, left out, or under another name."""
    value = json.loads(manifest)
    for path in list(spots(value))[1:]:
        where = "/".join(map(str, path))
        yield f"{where} left out", left_out(value, path)
        if isinstance(path[-1], str):
            yield f"{where} renamed", renamed(value, path)
        for wrong in WRONG:
            yield f"{where} = {wrong!r:.50}", replaced(value, path, wrong)


def test_a_manifest_that_lies(committed):
    """Any value of a manifest of another type or size, though its checksum fits, gives an error of harness at most."""
    name = f"{directory_of(committed, 30)}/{MANIFEST}"
    wrong = []
    for where, value in every_lie(committed[name]):
        store = Objects({**committed, name: sealed(value)})
        catalog = Catalog(store)
        entry = Entry(directory_of(committed, 30), 30, None, "whole")
        uses = [
            catalog.entries,
            partial(verify, catalog, entry),
            partial(read, catalog, entry),
            partial(resume_from, store),
            partial(Pruner(catalog).prune, Retention(1)),
        ]
        wrong += [f"{where}: {problem}" for use in uses if (problem := unexpected_error(use))]
    assert not wrong, (len(wrong), wrong[:10])


# --- files made to do harm -------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)
fuzz = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_as_manifest(data):
    """Bytes that are no manifest are Corrupt."""
    with pytest.raises(Corrupt):
        Manifest.decode(data)


@fuzz
@given(st.dictionaries(st.sampled_from(["format", "version", *Manifest.__dataclass_fields__]) | st.text(), json_values))
def test_arbitrary_json_as_manifest(value):
    """JSON that is no manifest, under a checksum that fits, is an error of the format."""
    with pytest.raises(CheckpointError):
        Manifest.decode(sealed(value))


shapes = st.lists(st.integers(-1, 5) | st.sampled_from([1 << 31, 1 << 47, 1 << 63, 1 << 64, True, 1.0, None]), max_size=5)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([code for code, _ in DTYPES.values() if code]) | json_values,
        "shape": shapes | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries | json_values, max_size=4)


@fuzz
@given(st.binary() | headers.map(lambda header: json.dumps(header).encode()), st.integers(0, 256))
def test_arbitrary_header(text, data_bytes):
    """A header is Corrupt, or describes exactly the bytes that follow it."""
    try:
        infos = decode_header(text, data_bytes)
    except Corrupt:
        return
    assert sum(info.nbytes for info in infos) == data_bytes


def shard(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def read_shard(data: bytes) -> dict[str, torch.Tensor]:
    """Reads a shard whose checksum fits."""
    return load.read_shard(Objects({"s": data}), "s", FileInfo("s", len(data), checksum(data)))[0]


def a_shard() -> bytes:
    infos = [TensorInfo("a/b", "float32", (2, 3)), TensorInfo("c", "complex128", (1,)), TensorInfo("d", "bool", (0, 4))]
    return encode_header(infos) + bytes(sum(info.nbytes for info in infos))


edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "digit"]), st.integers(0, 255)), max_size=4
)


@fuzz
@given(st.binary(max_size=64) | headers.map(lambda header: shard(json.dumps(header).encode(), bytes(24))), edits)
def test_arbitrary_shard(data, changes):
    """A shard is Corrupt, or its tensors have as many bytes as follow its header, even when the checksum fits."""
    for whole in (data, a_shard()):
        changed = bytearray(whole)
        for place, kind, byte in changes:
            at = int(place * max(len(changed) - 1, 0))
            match kind:
                case "flip":
                    changed[at : at + 1] = bytes([byte])
                case "cut":
                    del changed[at : at + byte % 8]
                case "insert":
                    changed[at:at] = bytes([byte])
                case "digit":
                    changed[at : at + 1] = b"%d" % (byte % 10)
        try:
            tensors = read_shard(bytes(changed))
        except Corrupt:
            continue
        header = int.from_bytes(changed[:8], "little")
        assert sum(tensor.nbytes for tensor in tensors.values()) == len(changed) - 8 - header


tags = [
    "$tensor", "$array", "$tuple", "$set", "$frozenset", "$counter", "$bytes", "$float", "$complex", "$numpy", "$", "$x",
    "$:",
]  # fmt: skip
bodies = st.sampled_from(
    ["<f4", "O", "V100000000", "<U100000000", "f4,f4", "(9", "3ff0000000000000", "YWI=", ["<f8", "00" * 8], True]
)
trees = st.recursive(
    json_values | bodies,
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["a", "$:1", "$:[]", "$:NaN"]), children, max_size=3)
        | st.tuples(st.sampled_from(tags), children).map(lambda pair: {pair[0]: pair[1]})
    ),
    max_leaves=12,
)
paths = st.lists(
    st.sampled_from(["a", "b", "0", "-1", "1_0", "$tuple", "~2", ""]) | st.text(max_size=2), min_size=1, max_size=4
)


@fuzz
@given(trees, st.dictionaries(paths.map("/".join), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), max_size=3))
def test_arbitrary_tree(value, dtypes):
    """Any JSON beside any tensors is Corrupt, or a value that has them all."""
    tensors = {path: torch.zeros(2, dtype=dtype) for path, dtype in dtypes.items()}
    try:
        tree.decode(value, tensors)
    except Corrupt:
        return
    assert len(tensors) <= sum(len(path) for path in spots_of_tensors(tree.decode(value, tensors)))


def spots_of_tensors(value: Any) -> Iterator[str]:
    """One character for each tensor or array within a value."""
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        yield "x"
    elif isinstance(value, dict | list | tuple | set | frozenset):
        for item in [*value.values(), *value] if isinstance(value, dict) else value:
            yield from spots_of_tensors(item)


# --- files made to eat the memory ------------------------------------------------------------------------------------

ROOM_BYTES = 192 << 20  # beside what the interpreter has taken before; each file is smaller than 1 MB


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bombs() -> dict[str, Callable[[], Any]]:
    """Small files that declare, or nest, what no memory can hold."""

    def header(value: dict[str, Any], data: bytes = b"") -> Callable[[], Any]:
        return lambda: read_shard(shard(json.dumps(value).encode(), data))

    def raw(data: bytes) -> Callable[[], Any]:
        return lambda: read_shard(data)

    def value(value: Any, **tensors: torch.Tensor) -> Callable[[], Any]:
        return lambda: tree.decode(value, tensors)

    def nested(levels: int, brackets: str) -> bytes:
        return (brackets[: len(brackets) // 2] * levels + "1" + brackets[len(brackets) // 2 :] * levels).encode()

    deep: Any = 1
    for _ in range(600):
        deep = {"a": deep}
    eight = bytes(8)
    return {
        "a header of 2^63 bytes": raw(b"\xff" * 7 + b"\x7f" + bytes(64)),
        "a header as long as the limit": raw((100_000_000).to_bytes(8, "little") + b"{}"),
        "a tensor of 2^40 items": header({"a": entry([1 << 40], [0, 1 << 42])}),
        "a tensor of 2^40 items in 8 bytes": header({"a": entry([1 << 40], [0, 8])}, eight),
        "no items, in rows of 2^94": header({"a": entry([0, 1 << 47, 1 << 47], [0, 0])}),
        "no items, in 60,000 dimensions": header({"a": entry([0] * 60_000, [0, 0])}),
        "10,000 tensors on the same bytes": header({str(number): entry([2], [0, 8]) for number in range(10_000)}, eight),
        "digits without end": raw(
            shard(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}', eight)
        ),
        "a header nested 100,000 deep": raw(shard(nested(100_000, "[]"), eight)),
        "a manifest nested 100,000 deep": lambda: Manifest.decode(sealed_text(nested(100_000, '{"a":}'))),
        "a manifest nested 900 deep": lambda: Manifest.decode(sealed_text(nested(900, "[]"))),
        "a tree nested 600 deep": value(deep),
        "a key nested 100,000 deep": value({"$:" + "[" * 100_000: 1}),
        "an array with items of 100 MB": value({"a": {"$array": "V100000000"}}, a=torch.zeros(1000, dtype=torch.int8)),
        "an array of text of 400 MB": value({"a": {"$array": "<U100000000"}}, a=torch.zeros(1000, dtype=torch.int8)),
        "a scalar of 100 MB": value({"a": {"$numpy": ["V100000000", "00"]}}),
        "a list at 10^18": value({"a": []}, **{f"a/{10**18}/b": torch.zeros(1)}),
    }


def sealed_text(meta: bytes) -> bytes:
    text = b'{\n "format": "harness-checkpoint",\n "version": 1,\n "meta": ' + meta + b",\n"
    return with_checksum(text)


def detonate() -> None:
    """In a process of its own, with little memory left: reads each file, and prints what came of it."""
    import resource

    read_shard(a_shard())  # everything is imported now, and torch has its arenas
    with open("/proc/self/statm") as file:
        taken_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken_bytes + ROOM_BYTES, taken_bytes + ROOM_BYTES))
    for name, explode in bombs().items():
        try:
            explode()
            print(json.dumps([name, "read"]), flush=True)
        except BaseException as error:
            print(json.dumps([name, type(error).__name__]), flush=True)


def test_small_files_cannot_take_much_memory():
    """A file gets an error, in bounded memory and time, whatever it declares."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, check=False)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found == dict.fromkeys(bombs(), "Corrupt"), done.stderr[-2000:]


if __name__ == "__main__":
    detonate()
