"""Everything that a model may hold survives a checkpoint bit for bit, or is refused by name; so do the random states.

Optimizers, schedulers and the gradient scaler are next door, in ``test_state_optimizers.py``.
"""

import contextlib
import copy
import gc
import random
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.checkpoint import commit, load
from harness.checkpoint.format import DATA_ALIGNMENT_BYTES, DTYPES, Attempt, Manifest
from harness.data.seeding import random_state, restore_random_state
from harness.errors import Mismatch, Unsupported
from harness.state.modules import check_model, model_state, module_versions, restore_model, unwrap
from harness.state.optimizers import check_optimizer, optimizer_state, restore_optimizer
from harness.state.parts import Progress
from harness.storage.store import open_store
from tests.support.states import Training

CPU = torch.device("cpu")


def saved(parts: Mapping[str, Any]) -> tuple[dict[str, Any], Manifest]:
    """What a later process would read of what is saved now, and the manifest."""
    store = open_store(f"memory://{uuid.uuid4()}")
    directory, manifest = commit.write(store, parts, step=1, attempt=Attempt.after([]))
    try:
        return load.read(store, directory, manifest), manifest
    finally:
        store.filesystem.fs.rm(store.root, recursive=True)


def through_a_store(model: nn.Module) -> dict[str, Any]:
    """The model's state as a later process would read it."""
    return saved({"model": model_state(model)})[0]["model"]


def bits(value: Any) -> Any:
    """Everything that can be told of a value: equal if and only if types, dtypes, shapes and all bits are."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "tensor", str(value.dtype), tuple(value.shape), raw
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(item) for item in value]
    return type(value).__name__, value.hex() if isinstance(value, float) else value


def assert_resumed(model: nn.Module, twin: nn.Module) -> None:
    """Saves the one and restores it into the other, which must then hold the same bits."""
    state = through_a_store(model)
    expected = bits(model_state(model)), commit.digest_of(model_state(model), "model")
    check_model(twin, state)
    restore_model(twin, state, module_versions(model))
    assert (bits(model_state(twin)), commit.digest_of(model_state(twin), "model")) == expected


# --- wrappers and names ------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "a/b", "a~1b", "ü €", "$tuple", "$:1", "x" * 150, "0", "weight:0", 'quote"\\', "line\nbreak", "module", "_orig_mod",
]  # fmt: skip


class Odd(nn.Module):
    """A model with children that are really called as wrappers call theirs, and every other kind of entry."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self._orig_mod = nn.Linear(3, 3, bias=False)
        self.names = nn.ModuleDict({name: nn.Linear(1, 1) for name in ODD_NAMES})
        self.parameter_list = nn.ParameterList([torch.randn(2), torch.randn(())])
        self.parameter_dict = nn.ParameterDict({name: torch.randn(1) for name in ODD_NAMES})
        self.register_buffer("kept", torch.randn(2))
        self.register_buffer("not_kept", torch.randn(2), persistent=False)
        self.register_buffer("none", None)
        self.stats = {"seen": 1.5}

    def get_extra_state(self) -> Any:
        return self.stats

    def set_extra_state(self, state: Any) -> None:
        self.stats = state


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def around_children(*wrappers: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Wraps two of the children, one of which has a wrapper's name already."""

    def wrap(model: nn.Module) -> nn.Module:
        for wrapper in wrappers:
            model.module = wrapper(model.module)
            model._orig_mod = wrapper(model._orig_mod)
        return model

    return wrap


WRAPPED = {
    "nothing": lambda model: model,
    "ddp": ddp,
    "data_parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled ddp": lambda model: compiled(ddp(model)),
    "ddp of compiled": lambda model: ddp(compiled(model)),
    "compiled data_parallel": lambda model: compiled(nn.DataParallel(model)),
    "children compiled": around_children(compiled),
    "children ddp": around_children(ddp),
    "children ddp of compiled": around_children(compiled, ddp),
    "children compiled ddp, ddp of compiled": lambda model: ddp(compiled(around_children(ddp, compiled)(model))),
}


def odd(wrapping: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = WRAPPED[wrapping](Odd())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_checkpoint_has_the_plain_names_whatever_wraps_the_model(wrapping, one_rank):
    """What was saved under DDP and ``torch.compile`` goes into the plain model, and the other way round."""
    model, optimizer = odd(wrapping, seed=0)
    plain, plains = odd("nothing", seed=1)
    assert list(model_state(model)) == list(plain.state_dict())
    assert optimizer_state(optimizer, model)["param_groups"][0]["params"] == [name for name, _ in plain.named_parameters()]
    assert isinstance(unwrap(model), Odd)
    for (one, its), (other, others) in [((model, optimizer), (plain, plains)), ((plain, plains), odd(wrapping, seed=2))]:
        assert_resumed(one, other)
        state = saved({"optimizer": optimizer_state(its, one)})[0]["optimizer"]
        restore_optimizer(others, check_optimizer(others, other, state))
        assert bits(others.state_dict()) == bits(its.state_dict())


class Namesake(nn.DataParallel):
    """A wrapper that owns an entry with the name of one of the wrapped module's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.weight = nn.Parameter(torch.zeros(1))


def test_two_entries_with_one_plain_name_are_refused():
    """One of two values would be lost: neither is saved, and the message has both names."""
    model = nn.Sequential(Namesake(nn.Linear(2, 2)))
    for function in (model_state, lambda model: optimizer_state(torch.optim.SGD(model.parameters()), model)):
        with pytest.raises(
            Unsupported, match=r"^model/0\.weight: without the wrappers this is both 0\..*weight and 0\..*weight"
        ):
            function(model)


class Dotted(nn.Module):
    """Writes entries whose names have dots of their own, as quantized modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = torch.randn(3)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}packed.params"] = self.packed

    def _load_from_state_dict(self, state_dict, prefix, *_):
        self.packed = state_dict.pop(f"{prefix}packed.params")


def test_an_entry_that_is_no_modules_name_loses_the_wrappers_too():
    """The names that a module makes up are plain as well, so that the checkpoint fits the unwrapped model."""
    model = nn.Sequential(nn.DataParallel(Dotted()))
    assert list(model_state(model)) == ["0.packed.params"]
    assert_resumed(model, nn.Sequential(Dotted()))


# --- values --------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A buffer and a parameter of every layout."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        raw = torch.randint(256, (6, 4 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        whole = (raw % 2 if dtype is torch.bool else raw).view(dtype)
        layouts = {
            "matrix": whole,
            "scalar": whole[0, 0],
            "empty": whole[:0],
            "transposed": whole.t(),
            "strided": whole[::2, 1::2],
        }
        for name, view in layouts.items():
            self.register_buffer(name, copy.deepcopy(view))  # keeps the strides
            self.register_parameter(f"{name}_parameter", nn.Parameter(copy.deepcopy(view), requires_grad=False))


def torch_dtypes() -> list[torch.dtype]:
    return sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_dtype_and_layout_survive(name):
    """Any bits of any dtype, 0-dim and empty ones too; the strides after loading are the model's own."""
    dtype = getattr(torch, name)
    model, twin = Holder(dtype, seed=0), Holder(dtype, seed=1)
    strides = {name: value.stride() for name, value in twin.state_dict().items()}
    assert_resumed(model, twin)
    assert {name: value.stride() for name, value in twin.state_dict().items()} == strides
    views = (twin.transposed, twin.strided, twin.transposed_parameter, twin.strided_parameter)
    assert not any(view.is_contiguous() for view in views)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.* support is experimental:UserWarning")
def test_every_other_dtype_of_torch_is_refused_with_its_path():
    """A dtype that a next torch adds is never written as something else."""
    others = [dtype for dtype in torch_dtypes() if str(dtype).removeprefix("torch.") not in DTYPES]
    assert others
    tried = []
    for dtype in others:
        model = nn.Module()
        with contextlib.suppress(RuntimeError, TypeError):  # torch itself cannot make one
            model.register_buffer("codes", torch.empty(2, dtype=dtype))
            tried.append(dtype)
            with pytest.raises(Unsupported, match=r"^model/codes: "):
                through_a_store(nn.ModuleDict({"codes": model}).codes)
    assert tried


def test_negative_zeros_and_nan_payloads_keep_their_bits():
    """Values that compare equal, or to nothing, are still restored as they were."""
    model, twin = nn.Module(), nn.Module()
    patterns = torch.tensor([0, -(2**31), 0x7FC00001, -0x3FFFFF, 0x7F800000, 1], dtype=torch.int32).view(torch.float32)
    model.register_buffer("odd", patterns)
    twin.register_buffer("odd", torch.ones(6))
    assert_resumed(model, twin)


def test_an_expanded_buffer_is_refused():
    """torch can save a tensor whose elements share memory and cannot load it: this is told before the first step."""
    model = nn.Module()
    model.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
    with pytest.raises(Unsupported, match=r"^model/mask: nothing can be loaded into an expanded tensor"):
        model_state(model)
    model.mask = torch.ones(4).as_strided((1, 4), (0, 1))  # nothing is shared here
    assert_resumed(model, copy.deepcopy(model))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.eye(2).to_sparse(), "a tensor of layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "a tensor on the meta device"),
    ],
)
def test_a_buffer_without_bytes_of_its_own_is_refused_with_its_path(tensor, what):
    """A buffer that no file can hold as it is, is named."""
    model = nn.Sequential(nn.Module())
    model[0].register_buffer("odd", tensor)
    with pytest.raises(Unsupported, match=f"^model/0.odd: {what}"):
        through_a_store(model)


def test_a_model_without_memory_can_be_checked():
    """Whether a checkpoint fits can be asked of a model on the meta device, all of whose tensors are nowhere."""
    with torch.device("meta"):
        empty = Tied(tied=False)
    check_model(empty, through_a_store(Tied(tied=False)))


class Tied(nn.Module):
    """Three names of one parameter."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding, self.head, self.again = (nn.Linear(5, 5, bias=False) for _ in range(3))
        if tied:
            self.head.weight = self.again.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_tied_again():
    """The file has the tensor once, each name has its value, and the live model stays tied."""
    model, twin = Tied(), Tied()
    parts, manifest = saved({"model": model_state(model)})
    assert manifest.parts["model"].aliases == {"head.weight": "embedding.weight", "again.weight": "embedding.weight"}
    assert manifest.bytes == DATA_ALIGNMENT_BYTES + model.head.weight.nbytes
    assert parts["model"]["again.weight"] is parts["model"]["head.weight"]
    assert_resumed(model, twin)
    assert twin.head.weight is twin.embedding.weight is twin.again.weight


def test_two_values_for_one_tied_parameter_are_refused():
    """A model that ties what the checkpoint has apart would keep one and lose the other."""
    loose, tied = Tied(tied=False), Tied()
    before = bits(tied.state_dict())
    state = through_a_store(loose)
    with pytest.raises(Mismatch) as caught:
        check_model(tied, state)
    assert str(caught.value).splitlines()[1:] == [
        f"  {name}.weight: one tensor with embedding.weight in the model, two different ones in the checkpoint"
        for name in ("head", "again")
    ]
    assert bits(tied.state_dict()) == before
    with torch.no_grad():
        for layer in (loose.head, loose.again):
            layer.weight.copy_(loose.embedding.weight)
    check_model(tied, through_a_store(loose))  # apart, but the same


class Extra(nn.Module):
    """State that is whatever the test says."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(1, 1), value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"\x00\xff\n",
        "text",
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(1).expand(4),
        [torch.ones(2, dtype=torch.bfloat16), {"nested": (torch.zeros(0), {3: torch.tensor(1 + 2j)})}],
        {"count": 3, "mean": float("nan"), "tensors": {"a": torch.ones(1)}, 7: {True, False}, "empty": {}, "none": None},
        (1, 2.5, -0.0, 1 << 80),
    ],
    ids=lambda value: type(value).__name__,
)
def test_extra_state_survives(value):
    """Whatever ``get_extra_state`` returns is handed to ``set_extra_state``, tensors in it of any shape."""
    model, twin = nn.Sequential(Extra(value)), nn.Sequential(Extra(torch.ones(9)))
    assert_resumed(model, twin)


@pytest.mark.parametrize(
    ("value", "path", "what"),
    [
        ({"callback": [print]}, "/callback/0", "a value of type builtins.builtin_function_or_method"),
        (object(), "", "a value of type builtins.object"),
        ({("a", 1.5): 2}, "", "a key of type builtins.tuple"),
        ({"sparse": torch.eye(2).to_sparse()}, "/sparse", "a tensor of layout torch.sparse_coo"),
        ([torch.empty(1, device="meta")], "/0", "a tensor on the meta device"),
    ],
)
def test_extra_state_that_cannot_be_written_is_refused_with_its_path(value, path, what):
    """Nothing is pickled: the message says where the value is and of what type."""
    with pytest.raises(Unsupported) as caught:
        through_a_store(nn.Sequential(Extra(value)))
    assert str(caught.value).startswith(f"model/0._extra_state{path}: {what}")


def test_parametrized_weights_survive():
    """Weight norm and spectral norm keep their parts, and the vectors they iterate on."""

    def build() -> nn.Module:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Linear(4, 2)))

    model, twin = build(), build()
    model(torch.randn(5, 3))
    assert "0.parametrizations.weight.original1" in model_state(model)
    assert_resumed(model, twin)
    inputs = torch.randn(5, 3)
    assert bits(twin(inputs)) == bits(model(inputs))


def test_an_averaged_model_beside_the_model_goes_on():
    """An exponential moving average and its count of updates are part of the model that has them."""

    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        return nn.ModuleDict({"live": model, "average": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))})

    def update(both: nn.Module, step: int) -> None:
        with torch.no_grad():
            both.live.weight.add_(step)
        both.average.update_parameters(both.live)

    model, twin = build(), build()
    for step in range(3):
        update(model, step)
    assert_resumed(model, twin)
    assert twin.average.n_averaged == 3
    for both in (model, twin):
        update(both, 4)
    assert bits(twin.state_dict()) == bits(model.state_dict())


def test_a_lazy_module_is_told_of_before_and_after():
    """A parameter without a shape can neither be saved nor loaded into, and the messages say which."""
    lazy, model = nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(Unsupported, match=r"^model/0\.weight: a tensor of the subclass .*UninitializedParameter"):
        through_a_store(lazy)
    with pytest.raises(
        Mismatch, match=r"0\.weight: the checkpoint has float32\[2, 3\], the model has an uninitialized parameter"
    ):
        check_model(lazy, through_a_store(model))
    lazy(torch.ones(1, 3))
    assert_resumed(lazy, model)


class Flipped(nn.Module):
    """A later version of a module, which knows how an earlier one kept its weight."""

    _version = 2

    def __init__(self, version: int | None = 2) -> None:
        super().__init__()
        self.weight, self._version = nn.Parameter(torch.randn(3)), version

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].flip(0)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_learn_the_version_that_wrote_their_state():
    """A module that converts states of its older versions converts those, and only those."""
    for version, flips in ((2, False), (1, True)):
        model = nn.Sequential(nn.DataParallel(Flipped(version)), nn.BatchNorm1d(1))
        twin = nn.Sequential(Flipped(), nn.BatchNorm1d(1))
        state = through_a_store(model)
        versions = saved({"training": {"versions": module_versions(model)}})[0]["training"]["versions"]
        assert versions == {"1.": 2} | ({"0.": 2} if version == 2 else {})
        weight = model[0].module.weight
        for each in (twin, nn.Sequential(nn.DataParallel(twin[0]), twin[1])):
            restore_model(each, state, versions)
            assert bits(twin[0].weight) == bits(weight.flip(0) if flips else weight)


# --- differences ---------------------------------------------------------------------------------------------------------


def test_what_differs_between_two_models_is_listed():
    """The message has every name, shape and dtype that differs; nothing live is touched."""
    model = nn.ModuleDict({"same": nn.Linear(2, 2), "shape": nn.Linear(2, 3), "dtype": nn.Linear(2, 2), "old": Extra()})
    twin = nn.ModuleDict(
        {"same": nn.Linear(2, 2), "shape": nn.Linear(3, 3), "dtype": nn.Linear(2, 2).double(), "new": Extra()}
    )
    before = bits(twin.state_dict())
    with pytest.raises(Mismatch) as caught:
        check_model(twin, through_a_store(model))
    first, *lines = str(caught.value).splitlines()
    assert first == "the checkpoint does not fit the model (9 differences)"
    assert sorted(lines) == [
        "  dtype.bias: the checkpoint has float32[2], the model has float64[2]",
        "  dtype.weight: the checkpoint has float32[2, 2], the model has float64[2, 2]",
        "  new._extra_state: not in the checkpoint; the model has extra state",
        "  new.layer.bias: not in the checkpoint; the model has float32[1]",
        "  new.layer.weight: not in the checkpoint; the model has float32[1, 1]",
        "  old._extra_state: not in the model; the checkpoint has extra state",
        "  old.layer.bias: not in the model; the checkpoint has float32[1]",
        "  old.layer.weight: not in the model; the checkpoint has float32[1, 1]",
        "  shape.weight: the checkpoint has float32[3, 2], the model has float32[3, 3]",
    ]
    assert bits(twin.state_dict()) == before


def test_a_long_list_of_differences_is_cut():
    """A wholly different model does not fill the screen."""
    with pytest.raises(Mismatch) as caught:
        check_model(nn.Sequential(*(nn.Linear(1, 1) for _ in range(40))), {})
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-1] == "  … and 60 more"


def training(seed: int, *, modules: int = 2, width: int = 3, groups: int = 1) -> Training:
    """A whole training state after two steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(modules)), nn.BatchNorm1d(width), Extra({"seed": seed}))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[index::groups]} for index in range(groups)])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    for _ in range(2):
        scaler.scale(model[:-1](torch.randn(4, width)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
    state = Training(model, optimizer, scheduler, scaler)
    state.progress = Progress(seed, 2, {"loss": float("nan")}, {"accuracy": 0.5, "step": seed})
    return state


def test_a_whole_training_state_survives():
    """Model, optimizer, scheduler, scaler, progress: what is captured from the restored state is what was saved."""
    state, twin = training(3), training(5)
    twin.restore(saved(state.capture())[0], 3)
    assert bits(twin.capture()) == bits(state.capture())
    assert twin.digests() == state.digests()
    assert bits(asdict(twin.progress)) == bits(asdict(state.progress))


def test_a_state_keeps_nothing_once_it_is_dropped():
    """A cycle would keep the memory of a model until the garbage collector comes by."""
    gc.collect()
    gc.disable()
    try:
        model = nn.Linear(2, 2)
        alive, state = weakref.ref(model), Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
        state.capture()
        del model, state
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "change",
    [
        {"model": lambda state: training(3, modules=3)},
        {"model": lambda state: training(3, width=2)},
        {"optimizer": lambda state: training(3, groups=2)},
        {"scheduler": lambda state: Training(state.model, state.optimizer, None, state.scaler)},
        {"scaler": lambda state: Training(state.model, state.optimizer, state.scheduler)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_refused_restore_touches_nothing(change):
    """A difference in any part is found before the first live tensor, option or counter is changed."""
    other = training(3)
    other = next(iter(change.values()))(other) or other
    state = training(5)
    before = copy.deepcopy(bits(state.capture())), state.digests(), asdict(state.progress)
    with pytest.raises(Mismatch):
        state.restore(saved(other.capture())[0], 3)
    assert (bits(state.capture()), state.digests()) == before[:2]
    assert bits(asdict(state.progress)) == bits(before[2])


# --- random states -------------------------------------------------------------------------------------------------------


def draw() -> list[Any]:
    """Something from every stream, of every kind that keeps a second value in store."""
    return [
        random.random(), random.gauss(0, 1), random.getrandbits(70), random.sample(range(99), 3),
        np.random.rand(3).tolist(), np.random.standard_normal(3).tolist(), np.random.randint(1 << 40),
        torch.rand(3).tolist(), torch.randn(()).item(), torch.randn(17).tolist(), torch.randperm(9).tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize("drawn", range(4))
def test_all_random_streams_go_on(drawn):
    """Python, NumPy and torch draw on exactly, also from between the two values of a Gaussian pair."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    for _ in range(drawn):
        random.gauss(0, 1)
        np.random.standard_normal()
        torch.randn(())
    state = saved({"random": {"0": random_state(CPU)}})[0]["random"]["0"]
    assert (state["python"]["gauss"] is not None) == bool(drawn % 2) == bool(state["numpy"]["has_gauss"])
    expected = draw()
    draw()
    restore_random_state(state, CPU)
    assert draw() == expected
    restore_random_state(state, CPU)
    assert bits(random_state(CPU)["torch"]) == bits(state["torch"])


def test_another_bit_generator_of_numpy_goes_on():
    """User code may have put another generator behind ``np.random``."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        np.random.randint(1 << 20, dtype=np.int32)
        np.random.standard_normal()
        state = saved({"random": random_state(CPU)})[0]["random"]
        expected = np.random.randint(1 << 20, size=3, dtype=np.int32).tolist(), np.random.standard_normal(3).tolist()
        restore_random_state(state, CPU)
        assert (
            np.random.randint(1 << 20, size=3, dtype=np.int32).tolist(),
            np.random.standard_normal(3).tolist(),
        ) == expected
    finally:
        np.random.set_bit_generator(before)
