"""Nested values to JSON and tensors and back: everything comes back bit for bit, or is refused with its path.

What models, optimizers and schedulers hold is tried in test_state.py and test_state_optimizers.py, arbitrary JSON as a tree
in test_corruption.py.
"""

import ctypes
import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.format import DTYPES
from harness.checkpoint.tree import decode, encode, info, raw_bytes
from harness.errors import ConfigError, Corrupt, Unsupported
from tests.support.states import bits

MIB = 1 << 20


def through_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor made anew from nothing but another's description and its bytes."""
    data, found = bytearray().join(raw_bytes(tensor)), info("x", tensor)
    assert len(data) == found.nbytes
    fresh = torch.empty(found.shape, dtype=getattr(torch, found.dtype))
    if data:
        fresh.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
    return fresh


def through_json(value: Any) -> Any:
    """What comes back of a value in a part, by way of the JSON text and the bytes of the tensors."""
    encoded = encode({"value": value}, "part")
    tensors = {path: through_bytes(tensor) for path, tensor in encoded.tensors.items()}
    tensors |= {further: tensors[stored] for further, stored in encoded.aliases.items()}
    return decode(json.loads(json.dumps(encoded.tree, allow_nan=False)), tensors)["value"]


# --- what is not a tensor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, None), (True, True), (-(2**70), -(2**70)), (0.1, 0.1), ("é", "é"), ([1, [2]], [1, [2]]), ({}, {}),
        ((1, 2), {"$tuple": [1, 2]}),
        ({2, 1}, {"$set": [1, 2]}),
        (frozenset({1}), {"$frozenset": [1]}),
        (b"ab", {"$bytes": "YWI="}),
        (1 + 2j, {"$complex": "3ff00000000000004000000000000000"}),
        (math.inf, {"$float": "7ff0000000000000"}),
        (Counter({5: 1}), {"$counter": [[5, 1]]}),
        (np.float32(1), {"$numpy": ["<f4", "0000803f"]}),
        ({"$a": 1, 1: 2, None: 3, False: 4}, {"$$a": 1, "$:1": 2, "$:null": 3, "$:false": 4}),
        ({(0, "a"): 1, (): 2}, {'$:[0, "a"]': 1, "$:[]": 2}),
        (torch.bfloat16, {"$dtype": "bfloat16"}),
        (torch.device("cpu"), {"$device": "cpu"}),
        (deque([1, (2,)], maxlen=3), {"$deque": {"maxlen": 3, "items": [1, {"$tuple": [2]}]}}),
    ],
    ids=repr,
)  # fmt: skip
def test_the_tree_is_what_the_specification_says(value, written):
    """The JSON of each kind of value is the documented one."""
    assert encode({"value": value}, "part").tree == {"value": written}
    assert bits(through_json(value)) == bits(value)


@pytest.mark.parametrize(
    "value",
    [
        0.0, -0.0, 5e-324, 1.7976931348623157e308, math.nan, -math.nan, *struct.unpack(">d", b"\x7f\xf0\0\0\0\0\0\1"),
        complex(-0.0, math.nan), 2**63, -(2**200), "", "\0\n\u2028", "\ud800", b"", bytes(range(256)),
        (), [], set(), frozenset(), Counter(), ((),), [[[]]], {"a": {"b": {}}},
        {"$tuple": [1]}, {"$": 1}, {"$:1": 1}, {"$$a": 1}, {"$tensor": True}, {"": {"": ""}}, {"a/b": {"~": {"~1": 1}}},
        {0: 1, "0": 2, "$:0": 3, 0.5: 4, "0.5": 5, True: 6, None: 7, "null": 8, -0.5: 9, 10**20: 10},
        {1, "1", (1, 2), frozenset({1, frozenset({2})}), None, 1.5, b"1"},
        Counter({"a": -1, (1, 2): 10**30, None: 0}),
        np.int8(-1), np.uint64(2**64 - 1), np.bool_(True), np.float16(1.5), np.float64(math.nan), np.complex64(1j),
        np.complex128(-1j), np.float32("nan"),
        torch.Size([1, 2]), OrderedDict(b=1, a=2), deque(), deque([deque([1], 1)]), {(1, 2): {(): 3}},
    ],
    ids=lambda value: "a set" if isinstance(value, set) and value else f"{value!r:.40}",  # a set's order differs by process
)  # fmt: skip
def test_values_survive(value):
    """Every kind of value comes back with its type and its bits, whatever its content looks like."""
    assert bits(through_json(value)) == bits(value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3.5), np.zeros((0, 2)), np.array([], dtype=np.uint16),
        np.arange(12).reshape(3, 4)[::2, ::-1], np.arange(6).reshape(2, 3).T, np.asfortranarray(np.eye(3)),
        np.arange(3, dtype=">i4"), np.arange(3, dtype=">f8")[::-1], np.array([True, False]), np.array([1j], dtype="c8"),
        np.array([1.5, math.nan], dtype=np.float16), np.full(4, 2**63, dtype=np.uint64),
        np.broadcast_to(np.arange(2), (3, 2)), np.random.RandomState(1).get_state()[1],
    ],
    ids=lambda array: f"{array.dtype.str}{list(array.shape)}",
)  # fmt: skip
def test_numpy_arrays_survive(array):
    """Arrays of any order and endianness come back with dtype, shape and bits, and stay arrays."""
    assert bits(through_json(array)) == bits(array)
    assert bits(through_json([(array,)])) == bits([(array,)])


def of_bits(dtype: str, shape: Sequence[int], seed: int = 1) -> torch.Tensor:
    """A tensor of random bits."""
    size = math.prod(shape) * DTYPES[dtype][1]
    data = torch.randint(0, 2 if dtype == "bool" else 256, (size,), generator=seeded(seed), dtype=torch.uint8)
    return data.view(getattr(torch, dtype)).view(tuple(shape))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


keys = st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
hashables = st.recursive(scalars, lambda inner: st.frozensets(inner) | st.tuples(inner, inner), max_leaves=5)
tensors = st.builds(of_bits, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9))
values = st.recursive(
    scalars | tensors | st.sets(hashables) | st.dictionaries(hashables, st.integers()).map(Counter),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(values)
def test_arbitrary_values_survive(value):
    """Whatever can be built of the supported kinds, in whatever nesting, comes back bit for bit."""
    assert bits(through_json(value)) == bits(value)


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_survive(dtype):
    """Any dtype in any layout: 0-dim, empty, transposed, with steps, expanded, and larger than a piece."""
    small, large = of_bits(dtype, [24]), of_bits(dtype, [12, MIB // DTYPES[dtype][1] // 4])
    for tensor in (
        small[5], small[:0], small[:0].view(2, 0, 3), small.view(2, 3, 4), small[::7], small[3:4].expand(5),
        small.view(4, 6).t(), small.view(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
        large, large.t(), large.view(-1)[::2], large.view(2, -1, 2)[:, :, 0], small[:1].expand(large.numel()),
    ):  # fmt: skip
        assert bits(through_json(tensor)) == ("tensor", str(tensor.dtype), "cpu", tuple(tensor.shape), bytes_of(tensor))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order by way of numpy, which takes its items as they are."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    items = np.frombuffer(ctypes.string_at(storage.data_ptr(), storage.nbytes()), f"V{size}")[tensor.storage_offset() :]
    strides = [stride * size for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(items, tuple(tensor.shape), strides).tobytes()


@pytest.mark.parametrize("count", [6, MIB])
def test_lazy_views_are_written_as_what_they_mean(count):
    """Conjugated and negated views are marks on the same memory: what is written is the value."""
    values = torch.complex(torch.randn(count, generator=seeded(1)), torch.randn(count, generator=seeded(2)))
    for view, meant in ((values.conj(), values.conj().resolve_conj()), (values.conj().imag, -values.imag)):
        assert view.is_conj() or view.is_neg()
        assert torch.equal(through_json(view), meant)
        assert torch.equal(through_json(view[::2]), meant[::2])


def test_bytes_come_in_pieces():
    """A tensor of any layout is handed out in pieces of a bounded size: the whole is never copied."""
    tensor = torch.arange(3 * MIB, dtype=torch.int32)
    for view in (tensor, tensor.view(4, -1).t(), tensor[::2], tensor.view(1, 1, -1), tensor.view(3, 2, -1).transpose(0, 1)):
        pieces = [piece.nbytes for piece in raw_bytes(view)]
        assert sum(pieces) == view.nbytes
        assert max(pieces) <= MIB
    assert next(raw_bytes(tensor)).nbytes == MIB
    assert np.frombuffer(next(raw_bytes(tensor)), np.int32).ctypes.data == tensor.data_ptr()


def test_tied_tensors_are_stored_once():
    """The same memory seen in the same way is stored once and comes back as one tensor; anything else is kept apart."""
    weight, empty = torch.arange(6.0), torch.zeros(0)
    value = {
        "a": weight, "b": {"c": [weight, (weight.view(6),)]}, "d": torch.nn.Parameter(weight).detach(),
        "shape": weight.view(2, 3), "half": weight[:3], "dtype": weight.view(torch.int32), "copy": weight.clone(),
        "stride": weight[::2], "empty": empty, "empty too": empty,
    }  # fmt: skip
    encoded = encode(value, "part")
    assert encoded.aliases == {"b/c/0": "a", "b/c/1/0": "a", "d": "a"}
    assert set(encoded.tensors) == {"a", "shape", "half", "dtype", "copy", "stride", "empty", "empty too"}
    back = through_json(value)
    assert bits(back) == bits(value)
    assert back["a"] is back["b"]["c"][0] is back["b"]["c"][1][0] is back["d"]
    distinct = [back[name] for name in encoded.tensors]
    assert len({id(tensor) for tensor in distinct}) == len(distinct)


def test_a_tensor_conjugated_is_not_the_tensor():
    """A view that differs only in its mark is not tied to what it is a view of."""
    values = torch.tensor([1 + 2j])
    encoded = encode({"plain": values, "conj": values.conj(), "real": values.real, "imag": values.imag}, "part")
    assert encoded.aliases == {}
    negated = values.conj().imag
    assert encode({"imag": values.imag, "negated": negated}, "part").aliases == {}


def test_tensors_leave_nothing_in_the_tree():
    """Twenty thousand small tensors cost their names, and not a tree of empty dictionaries."""
    state = {index: {"step": torch.zeros(()), "moments": {"exp_avg": torch.zeros(1)}} for index in range(10_000)}
    encoded = encode({"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}, "optimizer")
    assert encoded.tree == {"param_groups": [{"lr": 0.1, "params": [0]}]}
    assert len(encoded.tensors) == 20_000


def test_paths_tell_keys_apart():
    """Keys with slashes and tildes, numbers beside their text, and nesting: no two tensors share a path."""
    of = torch.tensor
    value = {
        "a": {"b": of(1)}, "a/b": of(2), "a~1b": of(3), "a~b": of(4), "~": {"0": of(5)}, "~0": of(6), 1: of(7), "1": of(8),
        "$:1": of(9), "": {"": of(10)}, "/": of(11), "list": [of(12), {"0": of(13)}], None: of(14),
    }  # fmt: skip
    assert len(encode(value, "part").tensors) == 14
    assert bits(through_json(value)) == bits(value)


class Norm(enum.Enum):
    """A value as some optimizers have it for an option."""

    SPECTRAL = 1


def test_a_member_of_an_enumeration_survives_where_its_class_is_declared_safe():
    """Nothing is imported for it; elsewhere it is refused, with what to do."""
    with torch.serialization.safe_globals([Norm]):
        written = encode({"norm": [Norm.SPECTRAL]}, "part").tree
        assert through_json({"norm": [Norm.SPECTRAL]})["norm"][0] is Norm.SPECTRAL
    assert written == {"norm": [{"$enum": [f"{__name__}.Norm", "SPECTRAL"]}]}
    with pytest.raises(
        Unsupported, match=r"^part/norm/0: a member of the enumeration .*Norm .*add_safe_globals\(\[Norm\]\)"
    ):
        encode({"norm": [Norm.SPECTRAL]}, "part")
    with pytest.raises(
        ConfigError, match=r"^norm/0: the checkpoint holds a value of the class .*Norm, which this program does not know"
    ):
        decode(written, {})


# --- refusals --------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "a b")  # noqa: PYI024  # the untyped kind is what is out there
Subclass = type("Subclass", (torch.Tensor,), {})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "a value of type builtins.object"),
        (print, "a value of type builtins.builtin_function_or_method"),
        (Pair(1, 2), "a value of type .*Pair"),
        (defaultdict(int), "a value of type collections.defaultdict"),
        (type("Text", (str,), {})("x"), "a value of type .*Text"),
        (type("Number", (int,), {})(1), "a value of type .*Number"),
        (type("Dict", (dict,), {})(), "a value of type .*Dict"),
        (bytearray(b"x"), "a value of type builtins.bytearray"),
        (torch.qint8, "a value of type torch.dtype"),
        (np.array(["text"]), "a value of type numpy.ndarray"),
        (np.array([object()]), "a value of type numpy.ndarray"),
        (np.zeros(1, dtype=[("a", "i4")]), "a value of type numpy.ndarray"),
        (np.datetime64("2026-01-01"), "a value of type numpy.datetime64"),
        (np.ma.array([1], mask=[True]), "a value of type numpy.ma.*MaskedArray"),
        ({b"x": 1}, "a key of type builtins.bytes"),
        ({(1.5,): 1}, "a key of type builtins.tuple"),
        ({math.nan: 1}, "a key of type builtins.float"),
        ({math.inf: 1}, "a key of type builtins.float"),
        ({"\ud800": torch.zeros(1)}, "a tensor whose name is not Unicode"),
        ({torch.zeros(1)}, "a tensor in a set"),
        ({(torch.zeros(1), 1)}, "a tensor in a set"),
        (Counter({(torch.zeros(1),): 1}), "a tensor in a set"),
        (Counter({1: torch.zeros(1)}), "a tensor in a set"),
        (10**5000, "a number"),
        (torch.zeros(2).to_sparse(), "a tensor of layout torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "a tensor on the meta device"),
        (torch.zeros(2).as_subclass(Subclass), "a tensor of the subclass .*Subclass"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_written_is_refused_with_its_path(value, what):
    """Nothing is pickled, nothing is guessed: the error says where the value lies and what it is."""
    with pytest.raises(Unsupported, match=rf"^optimizer/state/0(/\S*)?: {what}"):
        encode({"state": [value]}, "optimizer")
    if type(value) is not dict:
        with pytest.raises(Unsupported, match=rf"^optimizer/a~1b/\$:7/1(/\S*)?: {what}"):
            encode({"a/b": {7: (1, value)}}, "optimizer")


def test_a_name_that_a_shard_uses_itself_is_refused():
    """Deeper down it is a name like any other."""
    with pytest.raises(Unsupported, match=r"^model/__metadata__: a tensor of this name"):
        encode({"__metadata__": torch.zeros(1)}, "model")
    assert bits(through_json({"__metadata__": torch.zeros(1)})) == bits({"__metadata__": torch.zeros(1)})


def test_endless_values_are_refused():
    """A value that contains itself, or is nested deeper than can be read again, is no value for a checkpoint."""
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = torch.zeros(1)
    for _ in range(200):
        deep = {"x": deep}
    for value, what in ((endless, "a value that contains itself"), (deep, "a value nested more than 100 levels deep")):
        with pytest.raises(Unsupported, match=rf"^model/value/\S+: {what}"):
            encode({"value": value}, "model")
    shallow: Any = torch.ones(1)
    for _ in range(95):
        shallow = [shallow]
    assert bits(through_json(shallow)) == bits(shallow)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"a": {"$tensor": True}}, []), ({"a": {"$array": "<f4"}}, []), ({"a": [{"$tensor": True}]}, ["a/1"]),
        ({"a": [1]}, ["a/0"]), ({"a": 1}, ["a"]), ({"a": 1}, ["a/b"]), ({"a": None}, ["a/b/c"]),
        ({"a": {"$tuple": [1]}}, ["a/1"]), ({"a": []}, ["a/x"]), ({"a": {"$tuple": 1}}, []), ({"a": {"$tuple": "ab"}}, []),
        ({"a": {"$set": [[]]}}, []), ({"a": {"$set": 1}}, []), ({"a": {"$counter": [[1]]}}, []),
        ({"a": {"$counter": 1}}, []), ({"a": {"$bytes": "!"}}, []), ({"a": {"$bytes": 1}}, []),
        ({"a": {"$float": "7ff0"}}, []), ({"a": {"$float": 1}}, []), ({"a": {"$complex": "00"}}, []),
        ({"a": {"$numpy": ["<f4", "00"]}}, []), ({"a": {"$numpy": ["O", "0000000000000000"]}}, []),
        ({"a": {"$numpy": ["V8", "0000000000000000"]}}, []), ({"a": {"$numpy": []}}, []), ({"a": {"$array": "O"}}, ["a"]),
        ({"a": {"$array": "<f8"}}, ["a"]), ({"a": {"$array": None}}, ["a"]), ({"a": {"$pickle": "x"}}, []),
        ({"a": {"$": 1}}, []), ({"$:[[1]]": 1}, []), ({"$:{": 1}, []), ({}, ["a/b", "a"]),
    ],
    ids=repr,
)  # fmt: skip
def test_trees_that_do_not_fit_are_corrupt(tree, paths):
    """Tensors without a place, places without a tensor, tags that are unknown or hold something else."""
    with pytest.raises(Corrupt):
        decode(tree, {path: torch.zeros(2) for path in paths})


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", [dict, list])
def test_what_contains_itself_is_refused_at_once(kind, times):
    """However often it is in itself; what merely stands in two places is written twice."""
    inner = kind()
    for number in range(times):
        inner.append(inner) if kind is list else inner.update({str(number): inner})
    with pytest.raises(Unsupported, match=r"part/a/b/0: a value that contains itself"):
        encode({"a": {"b": inner}}, "part")
    shared = [1, (2,)]
    encoded = encode({"a": shared, "b": {"c": shared}}, "part")
    assert decode(encoded.tree, {}) == {"a": shared, "b": {"c": shared}}
