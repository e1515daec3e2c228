"""The format: names, shards, digests, manifests; bytes to values and back, and no value from bytes that are not its own.

test_corruption.py goes on from here with arbitrary bytes and every lie that a manifest can tell.
"""

import dataclasses
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.format import (
    CHECKSUM,
    DTYPES,
    FORMAT,
    VERSION,
    Ancestor,
    Attempt,
    FileInfo,
    Manifest,
    Part,
    TensorInfo,
    checksum,
    decode_header,
    digest,
    encode_header,
    hasher,
    new_directory,
    parse_directory,
    plan_shards,
    shard_name,
)
from harness.errors import Corrupt, UnknownFormat, Unsupported

ATTEMPT = Attempt("000002-1f3a9c2e")
by_example = settings(deadline=None, database=None, derandomize=True)

# --- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_name_their_algorithm():
    """A checksum says how it was computed, so that another version can compute others; an unknown one is refused."""
    assert checksum(b"") == "xxh3_128:99aa06d3014798d86001c324468d497f"
    assert CHECKSUM == "xxh3_128"
    with pytest.raises(UnknownFormat, match=r"'md5'.*xxh3_128"):
        hasher("md5")


# --- names -----------------------------------------------------------------------------------------------------------


def test_attempts_are_numbered_in_order():
    """Each attempt comes after all that there were, as text, too, and two that claim the same number differ."""
    first, second = Attempt.after([]), Attempt.after([Attempt("000041-00000000"), Attempt("000007-ffffffff")])
    assert (first.number, second.number) == (1, 42)
    assert first < second
    assert Attempt.after([]) != Attempt.after([])


def test_directories_say_step_and_attempt():
    """A directory's name gives back its step and its attempt, and no two saves of one step share it."""
    name = new_directory(1200, ATTEMPT)
    assert name.startswith("step-000000001200-000002-1f3a9c2e-")
    assert parse_directory(name) == (1200, ATTEMPT)
    assert name != new_directory(1200, ATTEMPT)
    assert sorted(names := [new_directory(1200, ATTEMPT, number) for number in range(300)]) == names


@pytest.mark.parametrize(
    "name",
    [
        "", "attempts", "step-1-000001-00000000-00000000", "step-000000000001-000001-00000000",
        "step-000000000001-000001-00000000-0000000g", "step--00000000001-000001-00000000-00000000",
        "step-000000000001-000001-00000000-00000000/", "../step-000000000001-000001-00000000-00000000",
        "step-000000000001-000001-00000000-00000000\n", "STEP-000000000001-000001-00000000-00000000",
    ],
)  # fmt: skip
def test_other_directories_are_not_taken_for_checkpoints(name):
    """Only names of exactly our form are."""
    assert parse_directory(name) is None


def test_shards_are_named_as_hugging_face_does():
    """One shard has the part's name, several are counted from 1."""
    assert shard_name("model", 0, 1) == "model.safetensors"
    assert shard_name("model", 0, 3) == "model-00001-of-00003.safetensors"
    assert shard_name("model", 2, 3) == "model-00003-of-00003.safetensors"


# --- shards ----------------------------------------------------------------------------------------------------------

infos = st.lists(
    st.builds(
        TensorInfo,
        path=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda path: path != "__metadata__"),
        dtype=st.sampled_from(sorted(DTYPES)),
        shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    unique_by=lambda info: info.path,
    max_size=20,
)


@by_example
@given(infos, st.integers(1, 400))
def test_shards_hold_every_tensor_once_within_the_limit(tensors, limit_bytes):
    """No tensor is lost or doubled, and only one that is too large by itself makes a shard larger than the limit."""
    shards = plan_shards(tensors, limit_bytes)
    assert sorted(info.path for shard in shards for info in shard) == sorted(info.path for info in tensors)
    for shard in shards:
        assert len(shard) == 1 or sum(info.nbytes for info in shard) <= limit_bytes
        assert shard == sorted(shard, key=lambda info: (-info.itemsize, info.path))


@by_example
@given(infos)
def test_headers_round_trip(tensors):
    """A header gives back the tensors it was made of, in the order of their bytes, each aligned to its items."""
    (shard,) = plan_shards(tensors, 1 << 40) or [[]]
    header = encode_header(shard)
    (length,) = struct.unpack("<Q", header[:8])
    assert len(header) == 8 + length
    assert len(header) % 4096 == 0
    assert sorted(decode_header(header[8:], sum(info.nbytes for info in shard)), key=lambda info: info.path) == sorted(
        shard, key=lambda info: info.path
    )
    offset = 0
    for info in shard:
        assert offset % info.itemsize == 0
        offset += info.nbytes


def header(**entries) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\0" * 8, b"[]", b"null", b"1", b'"text"', b"{", b'{"a"}', b"{}x", b"\xff{}", b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}',
        b'{"a": 1, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}',
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_text_that_is_no_header(text):
    """What is not one JSON object without doubled keys and odd numbers is Corrupt."""
    with pytest.raises(Corrupt):
        decode_header(text, 8)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": None}, {"a": []}, {"a": 1}, {"a": "F32"}, {"a": {}},
        {"a": entry(dtype="F31")}, {"a": entry(dtype=None)}, {"a": entry(dtype=["F32"])},
        {"a": entry(shape=[2.0])}, {"a": entry(shape=[True, 2])}, {"a": entry(shape=["2"])}, {"a": entry(shape=[None])},
        {"a": entry(shape=[-2])}, {"a": entry(shape=[-1, -2])}, {"a": entry() | {"shape": 2}},
        {"a": entry() | {"shape": "2"}},
        {"a": entry(shape=[1 << 62, 4])}, {"a": entry(shape=[10**400])}, {"a": entry(shape=[1] * 65 + [2])},
        {"a": entry(shape=[0, 1 << 63], offsets=[0, 0])},
        {"a": entry(offsets=[0, 4])}, {"a": entry(offsets=[0, 12])}, {"a": entry(offsets=[8, 0])},
        {"a": entry(offsets=[-8, 0])}, {"a": entry(offsets=[8, 16])},
        {"a": entry(offsets=[0])}, {"a": entry(offsets=[])}, {"a": entry(offsets=[0, 4, 8])},
        {"a": entry() | {"data_offsets": None}}, {"a": entry() | {"data_offsets": {"0": 0}}},
        {"a": entry(offsets=["0", "8"])},
        {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[1], offsets=[0, 4])},
        {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[1], offsets=[2, 6])},
        {"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[1], offsets=[8, 12])},
        {"a": entry(shape=[1], offsets=[0, 4])},
        {"a": entry(), "b": entry(shape=[1], offsets=[8, 12])},
        {"__metadata__": []}, {"__metadata__": {"dtype:a": "complex128"}, "a": entry()},
        {"__metadata__": {"dtype:a": "complex128"}, "a": entry("U8", [8], [0, 8])},
        {"__metadata__": {"dtype:a": "complex32"}, "a": entry("U8", [], [0, 1])},
        {"__metadata__": {"dtype:a": "nonsense"}, "a": entry("U8", [8], [0, 8])},
        {"__metadata__": {"dtype:a": ["complex32"]}, "a": entry("U8", [2, 4], [0, 8])},
        {"\ud800": entry()},
    ],
    ids=repr,
)  # fmt: skip
def test_headers_that_lie(entries):
    """Holes, overlaps, impossible sizes, numbers of the wrong type: whatever does not describe these 8 bytes is Corrupt."""
    with pytest.raises(Corrupt):
        decode_header(header(**entries), 8)


# --- digests ---------------------------------------------------------------------------------------------------------


def test_a_digest_is_what_the_specification_says():
    """The text that is hashed is the documented one, so that digests can be compared across versions and tools."""
    tensors = {
        TensorInfo("b/weight", "bfloat16", (2, 3)): checksum(b"twelve bytes"),
        TensorInfo("a", "float32", ()): checksum(b"four"),
    }
    text = (
        f"a float32 [] {checksum(b'four')}\n"
        f"b/weight bfloat16 [2, 3] {checksum(b'twelve bytes')}\n"
        '{"betas":{"$tuple":[0.9,0.999]},"lr":0.1}'
    )
    assert digest(tensors, {"lr": 0.1, "betas": {"$tuple": [0.9, 0.999]}}) == checksum(text.encode())


def test_a_digest_tells_every_difference():
    """Name, dtype, shape, bytes and the rest of the value: a change of any of them changes the digest."""
    info, whole = TensorInfo("a", "float32", (2, 3)), checksum(b"bytes")
    states = [
        ({info: whole}, {}),
        ({info: checksum(b"other")}, {}),
        ({dataclasses.replace(info, path="b"): whole}, {}),
        ({dataclasses.replace(info, dtype="int32"): whole}, {}),
        ({dataclasses.replace(info, shape=(3, 2)): whole}, {}),
        ({info: whole, dataclasses.replace(info, path="b"): whole}, {}),
        ({info: whole}, {"lr": 1}),
        ({info: whole}, {"lr": 1.0}),
        ({}, {}),
    ]
    assert len({digest(tensors, tree) for tensors, tree in states}) == len(states)


# --- the manifest ----------------------------------------------------------------------------------------------------

MANIFEST = Manifest(
    step=1200,
    attempt=ATTEMPT.id,
    files=[FileInfo("model.safetensors", 100, checksum(b"m")), FileInfo("optimizer.safetensors", 0, checksum(b""))],
    parts={
        "model": Part(["model.safetensors"], {}, {"tied": "weight"}, checksum(b"d")),
        "optimizer": Part(["optimizer.safetensors"], {"lr": 0.1, "nan": {"$float": "7ff8000000000000"}}, {}, checksum(b"e")),
    },
    lineage=[Ancestor("000001-00000000", 1000)],
    created="2026-01-01T00:00:00.000+00:00",
    meta={"epoch": 3, "é": ["\n", None, True, 1.5]},
)


def test_manifests_round_trip():
    """A manifest gives back what it was made of, and is JSON that any tool can read."""
    text = MANIFEST.encode()
    assert Manifest.decode(text) == MANIFEST
    assert MANIFEST.bytes == 100
    value = json.loads(text)
    assert (value["format"], value["version"], value["step"]) == (FORMAT, VERSION, 1200)
    assert text.splitlines()[-2].startswith(b' "checksum": "xxh3_128:')


def test_a_manifest_with_any_byte_changed_is_corrupt():
    """Every byte, with its lowest bit, its highest and all of them flipped."""
    text = MANIFEST.encode()
    for place in range(len(text)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(text)
            changed[place] ^= mask
            with pytest.raises(Corrupt):
                Manifest.decode(bytes(changed))


def test_a_manifest_cut_anywhere_is_corrupt():
    """At every length, from the front and from the back."""
    text = MANIFEST.encode()
    for place in range(len(text)):
        for part in (text[:place], text[len(text) - place :]):
            with pytest.raises(Corrupt):
                Manifest.decode(part)


def test_a_manifest_with_more_bytes_is_corrupt():
    """In front, behind, and anywhere in between, harmless as the bytes may look to a JSON parser."""
    text = MANIFEST.encode()
    for place in range(len(text) + 1):
        for extra in (b" ", b"\n", b"\0", b"1"):
            with pytest.raises(Corrupt):
                Manifest.decode(text[:place] + extra + text[place:])
    for twice in (text + text, text[:-2] + text, text + text.splitlines()[-2] + b"\n}"):
        with pytest.raises(Corrupt):
            Manifest.decode(twice)


def sealed(body: str) -> bytes:
    """A manifest's text with a checksum that fits, whatever it says."""
    text = body.removesuffix("\n}").encode() + b",\n"
    return text + f' "checksum": "{checksum(text)}"\n}}'.encode()


def changed(**changes) -> bytes:
    body = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(MANIFEST), **changes}
    return sealed(json.dumps(body, indent=1))


@pytest.mark.parametrize("changes", [{"version": 3}, {"version": "1"}, {"version": None}, {"format": "other"}], ids=str)
def test_another_version_is_not_called_corrupt(changes):
    """A whole manifest of a format that this program does not read is an error of its own, whatever else is in it."""
    assert Manifest.decode(changed()) == MANIFEST
    with pytest.raises(UnknownFormat, match="expected harness-checkpoint version 1"):
        Manifest.decode(changed(**changes, files="who knows", parts=None, more=1))


ONE = dataclasses.asdict(MANIFEST.files[0])
PART = dataclasses.asdict(MANIFEST.parts["model"])
NO_NAMES = [
    "", ".", "..", "../model.safetensors", "/etc/passwd", "a/b", "a\\b", ".hidden", "manifest.json",
    "model\0", "model\n", "modèle", "x" * 300, None, 1, ["x"],
]  # fmt: skip
LAST = dataclasses.asdict(MANIFEST)["files"][1:]


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in (-1, True, 1.0, "1", None, [], 1e400)),
        *({"attempt": value} for value in ("", "1", "000002", "000002-1F3A9C2E", "../../x", None, 2)),
        *({"created": value} for value in (None, 1, [])),
        *({"meta": value} for value in (None, 1, [], "x")),
        *({"lineage": value} for value in (None, 1, "x", [None], [{}], [{"attempt": "x", "until_step": 1}])),
        *({"lineage": [{"attempt": ATTEMPT.id, "until_step": value}]} for value in (-1, True, 1.5, None, "1")),
        {"lineage": [{"attempt": ATTEMPT.id, "until_step": 1, "more": 1}]},
        *({"files": value} for value in (None, 1, "x", {}, [None], [{}], [1])),
        {"files": [ONE, ONE, *LAST]},
        {"files": LAST},
        {"files": [{**ONE, "more": 1}, *LAST]},
        *({"files": [{**ONE, "bytes": value}, *LAST]} for value in (-1, True, False, 1.0, "1", None, [], 1 << 80)),
        *({"files": [{**ONE, "checksum": value}, *LAST]} for value in (None, 1, [])),
        *({"files": [{**ONE, "name": value}, *LAST], "parts": {"model": {**PART, "files": [value]}}} for value in NO_NAMES),
        *({"parts": value} for value in (None, 1, [], "x", {}, {"model": None}, {"model": []}, {"model": {}})),
        {"parts": {"model": PART}, "files": [ONE, *LAST]},
        {"parts": {"model": {**PART, "files": ["model.safetensors", "optimizer.safetensors"]}, "other": PART}},
        *({"parts": {"model": {**PART, "files": value}}} for value in (None, 1, "model.safetensors", [None], ["nothing"])),
        *({"parts": {"model": {**PART, "tree": value}}} for value in (None, 1, [], "x")),
        *({"parts": {"model": {**PART, "aliases": value}}} for value in (None, 1, [], {"a": None}, {"a": ["b"]})),
        *({"parts": {"model": {**PART, "digest": value}}} for value in (None, 1, [])),
        {"parts": {"model": {**PART, "more": 1}}},
        {"more": 1},
    ],
    ids=lambda changes: f"{changes}"[:80],
)
def test_manifests_that_lie(changes):
    """Values of wrong types and sizes, names that lead elsewhere, parts and files that do not fit: Corrupt."""
    if "parts" in changes and "files" not in changes:
        changes = {"files": [ONE], **changes}  # so that nothing else is wrong
    with pytest.raises(Corrupt):
        Manifest.decode(changed(**changes))


def test_the_lies_are_the_only_thing_wrong():
    """What the lies are told about is right before they are told."""
    assert Manifest.decode(changed(files=[ONE], parts={"model": PART})).bytes == 100


@pytest.mark.parametrize(
    "body",
    [
        '{\n "format": "harness-checkpoint",\n "format": "harness-checkpoint"\n}',
        changed().decode().replace('"step": 1200', '"step": 1200,\n "step": 1201').rpartition(",\n")[0] + "\n}",
        changed(meta={"loss": 1}).decode().replace('"loss": 1', '"loss": NaN').rpartition(",\n")[0] + "\n}",
        changed(meta={"loss": 1}).decode().replace('"loss": 1', '"loss": -Infinity').rpartition(",\n")[0] + "\n}",
        changed(meta={"deep": 1}).decode().replace('"deep": 1', '"deep": ' + "[" * 100_000).rpartition(",\n")[0] + "\n}",
        "{" + '"a":{' * 100_000 + "\n}",
        "[\n}",
    ],
    ids=["doubled", "two steps", "nan", "infinity", "deep lists", "deep objects", "a list"],
)
def test_json_with_surprises_is_corrupt(body):
    """Keys that stand twice, numbers that JSON does not have and endless nesting: parsers disagree about them."""
    with pytest.raises(Corrupt):
        Manifest.decode(sealed(body))


def test_numbers_that_json_lacks_are_not_written():
    """A manifest with NaN in it would be refused by its reader: it is refused by its writer."""
    with pytest.raises(Unsupported, match="not JSON compliant"):
        dataclasses.replace(MANIFEST, meta={"loss": float("nan")}).encode()
