"""The state of a module under the plain module's names, and back into a live one.

DDP wraps a model as ``module``, ``torch.compile`` as ``_orig_mod``, at the top or around any child; those steps are left out
by looking at the wrappers, never by cutting strings: a model may own a child that is really called ``module``.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness import torch_private
from harness.checkpoint import dtensors, tree
from harness.checkpoint.format import checksum
from harness.errors import Mismatch, Unsupported


def unwrap(module: nn.Module) -> nn.Module:
    """The plain module within DDP, DataParallel and ``torch.compile``."""
    while inner := _wrapped(module):
        module = getattr(module, inner)
    return module


def _wrapped(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps the module that it wraps; None for a module that is no wrapper."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    return "_orig_mod" if torch_private.is_compiled(module) else None


def _prefixes(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every module in the tree, with the prefix of its entries in torch's ``state_dict()``, and in ours."""
    plain, inner = {"": ""}, {"": _wrapped(module)}
    yield module, "", ""
    for path, child in module.named_modules(remove_duplicate=False):
        if path:
            parent, _, name = path.rpartition(".")
            plain[path] = plain[parent] if name == inner[parent] else f"{plain[parent]}{name}."
            inner[path] = _wrapped(child)
            yield child, f"{path}.", plain[path]


def plain_names(module: nn.Module, state: Iterable[str] = ()) -> dict[str, str]:
    """torch's names of the parameters and of the entries of a ``state_dict()`` → plain names."""
    prefixes = {raw: plain for _, raw, plain in _prefixes(module)}
    names: dict[str, str] = {}  # plain → torch's
    for name in dict.fromkeys([*state, *(name for name, _ in module.named_parameters(remove_duplicate=False))]):
        prefix = name[: name.rfind(".") + 1]
        while prefix not in prefixes:  # a module may write entries with dots of its own
            prefix = prefix[: prefix.rfind(".", 0, -1) + 1]
        plain = prefixes[prefix] + name.removeprefix(prefix)
        if (first := names.setdefault(plain, name)) != name:
            raise Unsupported(f"model/{plain}: without the wrappers this is both {first} and {name}; rename one of them")
    return {name: plain for plain, name in names.items()}


def model_state(model: nn.Module) -> dict[str, Any]:
    """The model's ``state_dict()`` under plain names. Raises ``Unsupported`` for what could be saved and not be loaded."""
    model = unwrap(model)
    state = model.state_dict()
    plain = plain_names(model, state)
    for name, value in state.items():
        if _is_expanded(value) and not _is_extra(name):
            raise Unsupported(
                f"model/{plain[name]}: nothing can be loaded into an expanded tensor; register a clone() of it"
            )
        if isinstance(value, torch.Tensor) and tree.is_composed(value) and not _is_extra(name):
            kind = type(value).__name__
            raise Unsupported(
                f"model/{plain[name]}: a tensor of the subclass {kind}: nobody knows what can be loaded into it"
            )
    return {plain[name]: value for name, value in state.items()}


def module_versions(model: nn.Module) -> dict[str, int | None]:
    """The versions of the modules, but for those that have torch's default, 1. Modules load older states by them."""
    found = {plain: torch_private.module_version(module) for module, _, plain in _prefixes(unwrap(model))}
    return {plain: version for plain, version in found.items() if version != 1}


def check_model(model: nn.Module, saved: Mapping[str, Any], what: str = "model") -> None:
    """Raises ``Mismatch`` with every name, shape and dtype that differs between a model and a saved state."""
    live = model_state(model)
    old = {name: kind_of(name, value) for name, value in saved.items()}
    new = {name: kind_of(name, value) for name, value in live.items()}
    lines = [f"{name}: not in the checkpoint; the {what} has {new[name]}" for name in new if name not in old]
    lines += [f"{name}: not in the {what}; the checkpoint has {old[name]}" for name in old if name not in new]
    lines += [
        f"{name}: the checkpoint has {old[name]}, the {what} has {new[name]}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    if not lines:  # the model can hold one of two values that it ties, and would lose the other
        lines = [
            f"{name}: one tensor with {first} in the {what}, two different ones in the checkpoint"
            for first, name in _ties(live)
            if not _same_bytes(saved[first], saved[name])
        ]
    if lines:
        raise Mismatch(listed(f"the checkpoint does not fit the {what}", lines))


# Classes whose objects give each rank a part of what they hold without saying which, by name: their modules are not
# imported for this.
_SHARDING = {
    "FullyShardedDataParallel": "flattens the parameters and gives each rank a piece",
    "ShardedDataParallel": "gives each rank its own shard of the optimizer's state",
    "DeepSpeedEngine": "keeps and saves the state itself",
    "ZeroRedundancyOptimizer": "gives each rank its own shard of the state",
    "OSS": "gives each rank its own shard of the state",
    "DeepSpeedZeroOptimizer": "gives each rank its own shard of the state",
    "DeepSpeedZeroOptimizer_Stage3": "gives each rank its own shard of the parameters",
}


def check_sharding(name: str, each: Any) -> None:
    """Raises ``Unsupported`` for a module or an optimizer of which each rank has a part that nobody can tell the place of,
    in whatever is around it."""
    for path, part in each.named_modules() if isinstance(each, nn.Module) else [("", each)]:
        for kind in type(part).__mro__:
            if what := _SHARDING.get(kind.__name__):
                where = f"{name}{'.' if path else ''}{path}"
                instead = "or DistributedDataParallel" if isinstance(each, nn.Module) else "and the optimizer within it"
                advice = f"use torch.distributed.fsdp.fully_shard, {instead}"
                raise Unsupported(f"{where}: {kind.__name__} {what}, which cannot be saved; {advice}")


def sharding_of(models: Mapping[str, nn.Module]) -> str:
    """How models are sharded, in a word; empty where they are not. Bits depend on it as they do on the number of ranks:
    also on which parameters ``fully_shard`` has put into one group."""
    lines, kinds = [], set()
    for key, model in models.items():
        for name, value in model_state(model).items():
            if dtensors.is_sharded(value):
                kinds.add(kind := dtensors.layout_of(value))
                lines.append(f"{key}/{name} {kind}")
        groups = [path for path, part in unwrap(model).named_modules() if _is_fully_sharded(part)]
        lines += [f"{key}: {path}" for path in groups]
    if not kinds:
        return ""
    return f"{' '.join(sorted(kinds))} {checksum(chr(10).join(lines).encode())[-8:]}"


def _is_fully_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def check_is_whole(name: str, model: nn.Module) -> str | None:
    """Raises ``Unsupported`` for a model that could not be restored from its own ``state_dict()``. Returns what there is to
    warn of: frozen parameters that it leaves out."""
    model = unwrap(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            raise Unsupported(f"{name}.{path}: an uninitialized parameter; run the model once before Run")
    state = model.state_dict()
    kept = {(value.device, dtensors.address_of(value)) for value in state.values() if _is_dense(value)}
    left_out = [path for path in parameters if path not in state]
    lost = [path for path in left_out if (parameters[path].device, dtensors.address_of(parameters[path])) not in kept]
    if learning := [path for path in lost if parameters[path].requires_grad and not _writes_its_own(model, path)]:
        raise Unsupported(
            f"{name}: its state_dict() leaves out parameters that are trained: {some(learning)}. They would be lost; save "
            "them, or freeze them before Run (requires_grad_(False))"
        )
    loads_its_own = type(model).load_state_dict is not nn.Module.load_state_dict
    if left_out or loads_its_own or state.keys() - parameters.keys() - _buffers(model):
        try:
            model.load_state_dict(state, strict=True)  # its own values: nothing changes
        except (RuntimeError, TypeError, KeyError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
            raise Unsupported(f"{name}: its own state_dict() cannot be loaded into it: {reason}") from None
    frozen = [path for path in lost if not parameters[path].requires_grad]
    return f"{name}: its state_dict() leaves out {some(frozen)}: a resume takes what the program builds" if frozen else None


def _writes_its_own(model: nn.Module, path: str) -> bool:
    """Whether the module that owns a parameter has its own way to write and to read it: packed, say."""
    return torch_private.has_own_state(type(model.get_submodule(path.rpartition(".")[0])))


def _buffers(model: nn.Module) -> set[str]:
    """The names of buffers and extra states."""
    found = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return found | {f"{name}{'.' if name else ''}_extra_state" for name, _ in model.named_modules(remove_duplicate=False)}


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def frozen(model: nn.Module) -> list[str]:
    """The plain names of the parameters that are not trained."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return []
    model = unwrap(model)
    plain = plain_names(model)
    return sorted({plain[name] for name, each in model.named_parameters() if not each.requires_grad})


def restore_model(model: nn.Module, saved: Mapping[str, Any], versions: Mapping[str, int | None] | None = None) -> None:
    """Copies a saved state that fits into the model, each tensor to where the model's own is.

    ``versions`` are the modules' as ``module_versions`` gave them; None where nobody knows.
    """
    model = unwrap(model)
    names = list(model.state_dict())
    plain = plain_names(model, names)
    state = OrderedDict((name, saved[plain[name]]) for name in names)
    if versions is not None:  # without them, modules that have changed since take the state for one of their oldest version
        own = {raw.removesuffix("."): versions.get(plain, 1) for _, raw, plain in _prefixes(model)}
        torch_private.set_versions(state, own)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
        raise Mismatch(f"the model's load_state_dict() rejected the checkpoint: {reason}") from None


def _is_extra(name: str) -> bool:
    """Whether this is what a module's ``get_extra_state()`` returned, shape and all its own affair."""
    return name.rpartition(".")[2] == "_extra_state"


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor with memory and strides."""
    has_strides = isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value) and value.layout is torch.strided
    return has_strides and value.device.type != "meta"


def _is_expanded(value: Any) -> bool:
    return _is_dense(value) and any(
        size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )


def kind_of(name: str, value: Any) -> str:
    """The dtype and shape of an entry, or what else it is, as it is told to people."""
    if not isinstance(value, torch.Tensor) or _is_extra(name):
        return "extra state"
    if nn.parameter.is_lazy(value):
        return "an uninitialized parameter (run the model once before it is trained)"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _ties(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each name whose tensor is the same memory as an earlier one's, after that one."""
    firsts: dict[Any, str] = {}
    for name, value in state.items():
        if _is_dense(value):
            address = dtensors.address_of(value)
            if dtensors.is_sharded(value) and not address:  # an empty shard
                continue
            place = (value.device, address, value.dtype, value.shape, value.stride())
            if (first := firsts.setdefault(place, name)) != name:
                yield first, name


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    pairs = zip(tree.raw_bytes(dtensors.local_of(one)), tree.raw_bytes(dtensors.local_of(other)), strict=True)
    return one is other or all(left == right for left, right in pairs)


def listed(what: str, lines: list[str], limit: int = 20) -> str:
    """A message that begins with ``what``, and has the first lines of what differs."""
    more = [f"… and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([f"{what} ({len(lines)} differences)", *lines[:limit], *more])
