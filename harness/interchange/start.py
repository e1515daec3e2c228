"""Starting from what others saved: into live objects, or as the first checkpoint of a run."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness.checkpoint import commit, dtensors
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.retention import Pruner
from harness.data.nested import mapped
from harness.errors import ConfigError, Mismatch
from harness.interchange.foreign import Foreign, read_foreign
from harness.state.modules import check_model, listed, model_state, plain_names, restore_model, unwrap
from harness.state.optimizers import optimizer_state, restore_optimizer
from harness.storage.store import Store


def load_into(model: nn.Module, optimizer: Optimizer | None, foreign: Foreign) -> str:
    """Gives a model the saved weights, and an optimizer its saved state where there is one; returns what, for the log.

    Everything is checked before anything live is touched: names, shapes and dtypes must agree, or ``Mismatch`` lists what
    does not. Of the optimizer only the state is taken, moments and step counts; its options (learning rate, weight decay, …)
    stay those of the configuration. Without an ``optimizer`` the weights alone are loaded.
    """
    loaded = ""
    try:
        weights, versions = _named_as(model, foreign)
        check_model(model, weights)
        live = model_state(model)
        weights = {name: dtensors.as_live(value, live[name], name) for name, value in weights.items()}
        if optimizer is not None and foreign.optimizer is not None:
            state = _fitting_state(optimizer, model, foreign.optimizer)
            _try_restoring(optimizer, state)
            loaded = f", the optimizer's state of {len(state['state'])} parameters"
    except Mismatch as error:
        raise Mismatch(f"{foreign.source}: {error}") from None
    restore_model(model, weights, versions)
    return f"{len(weights)} entries of the model{loaded}"


def import_run(
    src: str, store: Store, *, trust: bool = False, storage_options: Mapping[str, Any] | None = None
) -> tuple[str, Foreign]:
    """Writes what lies at ``src`` as the checkpoint of step 0 of a new run; returns its directory and what was read.

    It has the parts that the source has, ``model`` and perhaps ``optimizer``. No run resumes from it, for it has no position
    in any data; a run starts from it as from any other source. ``storage_options`` are those of ``src``.
    """
    catalog = Catalog(store)
    if next(catalog.candidates(), None) is not None:
        raise ConfigError(f"{store.url}: expected an unused URL, found a run")
    foreign = read_foreign(src, trust=trust, storage_options=storage_options)
    training = None if foreign.versions is None else {"module_versions": {"model": foreign.versions}}
    parts = {"model": foreign.model, "optimizer": foreign.optimizer, "training": training}
    about = {"source": foreign.source, "what": foreign.what}
    loss = {"loss": foreign.loss} if foreign.loss is not None and math.isfinite(foreign.loss) else {}
    meta = {"epoch": foreign.epoch, "world_size": None, "metrics": {"last": loss}, "imported": about}
    attempt = catalog.attempts.claim({"imported": about})
    with Pruner(catalog).new_directory(0, attempt) as directory:
        found = {name: part for name, part in parts.items() if part is not None}
        commit.write(store, found, step=0, attempt=attempt, meta=meta, directory=directory)
    return directory, foreign


# --- the model -------------------------------------------------------------------------------------------------------


def _named_as(model: nn.Module, foreign: Foreign) -> tuple[dict[str, Any], dict[str, int | None] | None]:
    """The saved weights and module versions under the model's names, where they can be; else as they are.

    Tried are the names as they are, with ``module.`` (which reading takes away where all have it), and without the first
    step where all share it (Lightning saves the model as a child of its module). Tied weights may be saved once or twice.
    """
    live, alike = model_state(model), _parameters(model)
    ways: list[Callable[[str], str]] = [str, lambda name: f"module.{name}"]
    if len({name.partition(".")[0] for name in foreign.model}) == 1:
        ways.append(lambda name: name.partition(".")[2])
    for rename in ways:
        weights = {rename(name): value for name, value in foreign.model.items()}
        _tie(weights, live, alike)
        if weights.keys() == live.keys():
            break
    else:
        rename, weights = str, dict(foreign.model)
    versions = foreign.versions
    return weights, None if versions is None else {rename(name): version for name, version in versions.items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All of them, tied ones under each of their names."""
    plain = plain_names(model := unwrap(model))
    return {plain[name]: each for name, each in model.named_parameters(remove_duplicate=False)}


def _tie(weights: dict[str, Any], live: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives each name that was not saved the value of one that was, where the model has one tensor under both."""
    places: dict[Any, list[str]] = {}
    for name, value in live.items():
        if name in parameters and dtensors.is_sharded(value):  # its part here may be empty, and have no address
            places.setdefault(id(parameters[name]), []).append(name)
        elif _has_memory(value):
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            places.setdefault(place, []).append(name)
    for names in places.values():
        saved = [name for name in names if name in weights]
        weights |= {name: weights[saved[0]] for name in names if saved and name not in weights}


def _has_memory(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value) or value.is_meta:
        return False
    return value.layout is torch.strided and value.numel() > 0


# --- the optimizer ---------------------------------------------------------------------------------------------------

# Options that came with some version of torch, choose among implementations, or belong to a scheduler: a state that was
# saved with one value of them is good with any other.
_IMMATERIAL = {
    "params", "param_names", "foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay",
    "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr",
}  # fmt: skip
# Options on which it depends what the state has.
_SWITCHES = ("amsgrad", "centered", "momentum")
# Entries of the state that have the shape of their parameter, in torch's optimizers and those modelled on them.
_ELEMENTWISE = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
    "sum", "ax", "prev", "step_size", "variance",
}  # fmt: skip


def _fitting_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state as ``optimizer.load_state_dict`` takes it, with the live options. Raises ``Mismatch``."""
    live = optimizer.state_dict()
    named = optimizer_state(optimizer, model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lines = [f"{key}: only in the file" for key in saved.keys() - named.keys()]
    if saved.get("class", named["class"]) != named["class"]:  # runs of harness tell
        lines.append(f"class: the file has {saved['class']}, the task has {named['class']}")
    old_groups, new_groups = saved["param_groups"], live["param_groups"]
    if len(old_groups) != len(new_groups):
        lines.append(f"parameter groups: the file has {len(old_groups)}, the optimizer has {len(new_groups)}")
    numbers: dict[Any, int] = {}
    for index, (old, new) in enumerate(zip(old_groups, new_groups, strict=False)):
        found = _numbered(old["params"], new["params"], named["param_groups"][index]["params"], numbers)
        lines += [f"group {index}: {line}" for line in (*found, *_option_differences(old, new))]
    if not lines:
        for key, values in saved["state"].items():
            lines += _state_differences(key, values, parameters[numbers[key]] if key in numbers else None)
    if lines:
        raise Mismatch(listed(f"the optimizer's state does not fit {type(optimizer).__name__}", lines))
    state = {
        numbers[key]: {
            name: _copied(value, parameters[numbers[key]] if name in _ELEMENTWISE else None)
            for name, value in values.items()
        }
        for key, values in saved["state"].items()
    }
    return {**live, "state": state}


def _try_restoring(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a state, or leaves the optimizer as it was: which entries a state must have, only the optimizer knows."""
    before = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    try:
        restore_optimizer(optimizer, state)
    except Exception as error:  # whatever an optimizer makes of a state that is not its own
        optimizer.__dict__.update(before)  # loading replaces both, and changes neither
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise Mismatch(
            f"the optimizer's state does not fit {type(optimizer).__name__}: loading it raises {reason}"
        ) from None


def _numbered(old: list[Any], new: list[int], names: list[str], numbers: dict[Any, int]) -> Iterator[str]:
    """Adds to ``numbers`` what the saved parameters of a group are called in the live one; yields what does not fit."""
    if all(isinstance(key, str) for key in old):
        for name in sorted({*old} ^ {*names}):
            yield f"{name} is only in the {'file' if name in old else 'optimizer'}"
        numbers |= dict(zip(names, new, strict=True))
    elif len(old) == len(new):
        numbers |= dict(zip(old, new, strict=True))
    else:
        yield f"the file has {len(old)} parameters, the optimizer has {len(new)}"


def _option_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted((old.keys() ^ new.keys()) - _IMMATERIAL):
        yield f"option {key!r} is only in the {'file' if key in old else 'optimizer'}"
    for key in _SWITCHES:
        if key in old and key in new and bool(old[key]) != bool(new[key]):
            yield f"option {key!r}: the file has {old[key]!r}, the optimizer has {new[key]!r}"


def _state_differences(key: Any, values: Any, parameter: torch.Tensor | None) -> Iterator[str]:
    if parameter is None or not isinstance(values, Mapping):
        yield f"state of {key}: expected entries of a parameter of the optimizer"
        return
    for name, value in values.items():
        if name in _ELEMENTWISE and isinstance(value, torch.Tensor) and value.shape != parameter.shape:
            yield f"{name} of {key}: the file has {list(value.shape)}, the parameter has {list(parameter.shape)}"


def _copied(value: Any, parameter: torch.Tensor | None = None) -> Any:
    """The same with tensors of their own: ``load_state_dict`` keeps those that it is given, and these may lie in a file.

    What belongs to a parameter element by element lies in memory as that does.
    """
    if isinstance(value, torch.Tensor) and parameter is not None:
        if dtensors.is_sharded(parameter):
            return dtensors.as_live(value, parameter, "the optimizer's state")
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value.detach())
    return mapped(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, value)
