"""How a tensor lies in memory is state: it comes back with the strides that it had.

torch's fused optimizers go through the memory of parameter and moments side by side, and a product of matrices may add in
another order where one of them lies transposed.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn, optim

import harness
from harness.checkpoint import commit, load, tree
from harness.checkpoint.format import DTYPES, Attempt, TensorInfo, decode_header, encode_header
from harness.checkpoint.plan import SavePlan, Writers
from harness.errors import Corrupt
from harness.state.capture import State
from harness.state.to_device import sent
from harness.storage.store import open_store
from tests.support.states import Training, bits

ATTEMPT = Attempt("000001-00000000")


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(shape, strides).copy_(numbers(*shape))


LAYOUTS = {
    "channels last": numbers(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "channels last of volumes": numbers(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
    "channels last of points": numbers(4, 3, 1, 1).to(memory_format=torch.channels_last),  # contiguous for torch, too
    "transposed": numbers(5, 7).t(),
    "a row that was a column": numbers(5, 1).t(),
    "a column that was a row": numbers(1, 5).t(),
    "permuted": numbers(2, 3, 4, 5).permute(2, 0, 3, 1),
    "columns first": torch.linalg.qr(numbers(6, 4))[0],
    "columns with gaps": numbers(5, 7).t()[:, 1:4],
    "rows with gaps": numbers(8, 6)[:, :3],
    "every other": numbers(10)[::2],
    "odd strides of sizes that are 1": strided((1, 3, 1), (77, 1, 5)),
    "row-major": numbers(3, 4, 5),
    "a number": torch.tensor(1.0),
    "empty": numbers(0, 4).t(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_survive(name, tmp_path):
    """Dense tensors in any order, and those with gaps of a moderate size, come back with their values and their strides."""
    tensor = LAYOUTS[name]
    harness.save(tmp_path, {"part": {"dictionary": {"x": tensor}, "list": [tensor + 0, (tensor,)]}})
    found = harness.load(tmp_path)["part"]
    assert bits(found["dictionary"]["x"]) == bits(tensor)
    assert found["list"][1][0] is found["dictionary"]["x"] or not tensor.numel()
    assert found["dictionary"]["x"].stride() == (tensor.stride() if tensor.numel() else (1, 1))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_any_dtype_survive(dtype, tmp_path):
    """Bit for bit, of a dtype that torch hardly computes with, too."""
    items = (torch.arange(6 * DTYPES[dtype][1]) % (2 if dtype == "bool" else 251)).to(torch.uint8)
    tensor = items.view(getattr(torch, dtype)).view(2, 3).t()
    harness.save(tmp_path, {"part": {"x": tensor}})
    found = harness.load(tmp_path)["part"]["x"]
    assert (found.dtype, found.stride()) == (tensor.dtype, (1, 3))
    assert bits(found) == bits(tensor)


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.tensor([1.0, 2.0]).expand(3, 2), (2, 1)),  # items that share their place get places of their own
        (torch.tensor([[1.0], [2.0]]).expand(2, 3), (3, 1)),
        (numbers(6).as_strided((3, 3), (1, 1)), (3, 1)),
        (numbers(100, 9)[:, :1], (1, 1)),
        (numbers(100, 90).t()[:3], (1, 3)),  # the gaps go, the order of the dimensions stays
        (numbers(90)[::30], (1,)),
    ],
    ids=["rows", "columns", "diagonals", "a column", "columns first", "every thirtieth"],
)
def test_what_cannot_be_laid_out_again_comes_back_as_torch_copies_it(tensor, strides, tmp_path):
    """Items in one place, and gaps of more than three times the tensor: what comes back is dense, with the same values."""
    harness.save(tmp_path, {"part": {"x": tensor}})
    found = harness.load(tmp_path)["part"]["x"]
    assert (bits(found), found.stride()) == (bits(tensor), strides)
    assert strides == torch.empty_like(tensor).stride() or tensor.dim() == 2


def test_views_of_lazy_conjugates_keep_their_strides(tmp_path):
    """The mark goes, the value and the order stay."""
    values = torch.complex(numbers(3, 2), 1 + numbers(3, 2))
    harness.save(tmp_path, {"part": {"adjoint": values.mH}})
    found = harness.load(tmp_path)["part"]["adjoint"]
    assert torch.equal(found, values.mH)
    assert (found.stride(), found.is_conj()) == (values.mH.stride(), False)


# --- in the format ---------------------------------------------------------------------------------------------------


def test_only_what_is_not_row_major_costs_a_note(tmp_path):
    """A state of tensors as they mostly are has the files that it always had."""
    usual = [TensorInfo("a", "float32", (2, 3)), TensorInfo("b", "float32", (4,))]
    assert b"strides" not in encode_header(usual)
    odd = [dataclasses.replace(usual[0], strides=(1, 2)), usual[1]]
    metadata = json.loads(encode_header(odd)[8:])["__metadata__"]
    assert metadata == {"format": "pt", "strides:a": "1,2"}
    store = open_store(str(tmp_path))
    parts = {"model": {"weight": numbers(4, 5), "bias": numbers(4), "count": torch.tensor(3), "kernel": numbers(2, 1, 1)}}
    directory, manifest = commit.write(store, parts, step=1, attempt=ATTEMPT)
    assert b"strides" not in (tmp_path / directory / "model.safetensors").read_bytes()
    assert "strides" not in manifest.encode().decode()


def test_other_programs_read_the_same_values(tmp_path):
    """The bytes are in row-major order, whatever the strides were, and the digest does not depend on them."""
    weight = LAYOUTS["channels last"]
    directory = harness.save(tmp_path, {"model": {"weight": weight}})
    assert torch.equal(safetensors.torch.load_file(tmp_path / directory / "model.safetensors")["weight"], weight)
    digests = [commit.digest_of({"weight": each}, "model") for each in (weight, weight.contiguous())]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "3,1,1", "1,1", "0,1", "-1,3", "1,x", "1,2.0", "1, 3", "1,30", "99999999999999999999,1", 3, None, [1, 3],
        "٣,1",
    ],
    ids=repr,
)  # fmt: skip
def test_strides_that_cannot_be_are_corrupt(text):
    """A file cannot ask for memory out of proportion to its bytes, nor for items that share a place."""
    entry = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
    header = json.dumps({"__metadata__": {"strides:a": text}, "a": entry}).encode()
    if text is None:  # as good as no note
        assert decode_header(header, 24)[0].strides is None
        return
    with pytest.raises(Corrupt):
        decode_header(header, 24)


@pytest.mark.parametrize("layout", ["points", "transposed"])
def test_large_tensors_keep_their_strides_in_small_shards(layout, tmp_path):
    """One that could be cut into pieces for its bytes is not, where the pieces would not say how it lay."""
    large = torch.randn(2100, 2048)
    tensor = large.t() if layout == "transposed" else large.view(2100, 2048, 1, 1).to(memory_format=torch.channels_last)
    store = open_store(str(tmp_path))
    written = commit.write(store, {"part": {"x": tensor, "y": large}}, step=1, attempt=ATTEMPT, shard_bytes=1 << 20)
    assert [*written[1].parts["part"].slices] == ["y"]
    found = load.read(store, *written)["part"]
    assert torch.equal(found["x"], tensor)
    assert (found["x"].stride(), found["y"].stride()) == (tensor.stride(), large.stride())


def test_several_writers_keep_strides():
    """Each notes those of its share, and a plan is made anew where they have changed."""
    parts = {"part": {str(number): each for number, each in enumerate(LAYOUTS.values())}}
    encoded = commit.encode(parts)
    every = lambda _tensor: True
    plan = SavePlan(encoded, 1 << 20, Writers((0, 1), 1), every)
    noted = {info.path: info.strides for shards in plan.shards.values() for shard in shards for info in shard.tensors}
    assert noted == {path: tree.strides_to_note(tensor) for path, tensor in encoded["part"].tensors.items()}
    assert plan.is_for(commit.encode(parts), 1 << 20, Writers((0, 1), 1), every)
    parts["part"]["0"] = parts["part"]["0"].contiguous()
    assert not plan.is_for(commit.encode(parts), 1 << 20, Writers((0, 1), 1), every)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_large_tensors_are_sent_to_a_gpu_as_they_lie():
    """In several pieces and a rest, transposed, and with gaps."""
    large = torch.arange(40_000_000).view(8000, 5000)
    for tensor in (large.t(), large[:, ::2], large.t()[:3000]):
        found = sent(tensor, torch.device("cuda"))
        assert (found.stride(), found.device.type) == (tensor.stride(), "cuda")
        assert torch.equal(found.cpu(), tensor)


# --- in training -----------------------------------------------------------------------------------------------------


FUSED = {
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.01, fused=True, amsgrad=True),
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.01, fused=True),
}


def convolutional(name: str, memory_format: torch.memory_format, seed: int = 0) -> Training:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)
    model = nn.Sequential(*layers).to(memory_format=memory_format)
    return Training(model, FUSED[name](model.parameters()))


def train(state: Training, steps: range) -> Any:
    for index in steps:
        state.optimizer.zero_grad()
        inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(index))
        state.model(inputs).square().mean().backward()
        state.optimizer.step()
    return bits({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()})


def through_a_file(parts: dict[str, Any], path: Path) -> dict[str, Any]:
    store = open_store(str(path))
    return load.read(store, *commit.write(store, parts, step=1, attempt=ATTEMPT))


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimizer_of_a_channels_last_model_goes_on_bit_for_bit(name, tmp_path):
    """Each moment meets the weight that it belongs to."""
    state, twin = (convolutional(name, torch.channels_last, seed) for seed in (0, 1))
    train(state, range(4))
    twin.restore(through_a_file(state.capture(), tmp_path), 4)
    one, other = (each.optimizer.state[each.model[0].weight] for each in (state, twin))
    assert {key: value.stride() for key, value in other.items()} == {key: value.stride() for key, value in one.items()}
    assert train(twin, range(4, 8)) == train(state, range(4, 8))


def as_by_an_older_version(parts: dict[str, Any]) -> dict[str, Any]:
    """A state whose tensors are all row-major: strides were not noted."""
    if isinstance(parts, torch.Tensor):
        return torch.empty(parts.shape, dtype=parts.dtype).copy_(parts)
    if isinstance(parts, dict):
        return {key: as_by_an_older_version(value) for key, value in parts.items()}
    return copy.deepcopy(parts)


@pytest.mark.parametrize("name", FUSED)
def test_an_older_checkpoint_without_strides_goes_on_bit_for_bit(name, tmp_path):
    """What has the shape of its parameter lies as that does."""
    state, twin = (convolutional(name, torch.channels_last, seed) for seed in (0, 1))
    train(state, range(4))
    twin.restore(through_a_file(as_by_an_older_version(state.capture()), tmp_path), 4)
    assert train(twin, range(4, 8)) == train(state, range(4, 8))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    "formats", [(torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)]
)
def test_a_change_of_the_memory_format_takes_the_state_with_it(name, formats, tmp_path):
    """The program counts: the optimizer's state follows the parameters that it finds."""
    state, twin = convolutional(name, formats[0]), convolutional(name, formats[1], seed=1)
    train(state, range(4))
    twin.restore(through_a_file(state.capture(), tmp_path), 4)
    train(state, range(4, 8))
    train(twin, range(4, 8))
    for one, other in zip(state.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Rotating(optim.Optimizer):
    """Keeps a basis whose vectors lie as its library has left them, and a matrix that does not lie as its parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad.flatten(1), self.state[parameter]
                if not state:
                    state["square"] = torch.eye(len(gradient))
                    state["sums"] = parameter.new_zeros(parameter.shape)  # row-major, whatever the parameter is
                state["square"] = state["square"].lerp(gradient @ gradient.mT, 0.1)
                state["basis"] = torch.linalg.eigh(state["square"])[1]
                state["sums"] += parameter.grad
                moved = state["basis"] @ (state["basis"].mT @ gradient)
                parameter.sub_(group["lr"] * moved.view(parameter.shape))


def test_matrices_keep_their_strides_and_state_that_is_not_like_its_parameter_stays_so(tmp_path):
    """A basis from ``eigh`` has its columns first; sums that are row-major stay so beside a channels-last parameter."""

    def of(seed: int) -> Training:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 9, 3, bias=False), nn.Flatten()).to(memory_format=torch.channels_last)
        return Training(model, Rotating(model.parameters()))

    state, twin = of(0), of(1)
    train(state, range(3))
    twin.restore(through_a_file(state.capture(), tmp_path), 3)
    [before], [after] = state.optimizer.state.values(), twin.optimizer.state.values()
    assert {key: value.stride() for key, value in after.items()} == {key: value.stride() for key, value in before.items()}
    assert before["basis"].stride() == (1, 9) and before["sums"].stride() == (27, 9, 3, 1)
    assert train(twin, range(3, 6)) == train(state, range(3, 6))


class Average:
    """Keeps what it is given."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.values = state


def test_objects_of_any_kind_get_their_tensors_back_as_they_lay(tmp_path):
    """An average of weights that takes the tensors that it is given; a module keeps its own."""
    average, twin = Average(dict(LAYOUTS)), Average({})
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3))
    parts = State({"model": model, "average": average}, torch.device("cpu")).capture()
    State({"model": plain, "average": twin}, torch.device("cpu")).restore(through_a_file(parts, tmp_path), 1)
    del twin.values["empty"]
    assert {name: value.stride() for name, value in twin.values.items()} == {
        name: LAYOUTS[name].stride() for name in twin.values
    }
    assert plain[0].weight.stride() == (27, 9, 3, 1)
    assert torch.equal(plain[0].weight, model[0].weight)
