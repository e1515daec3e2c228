"""Which form a value has that others saved, and what of it can be used.

    {name: tensor, …}                                               a state_dict
    {"model_state_dict": …, "optimizer_state_dict": …, "epoch": …, "loss": …}
    {"model_state": …, "optimizer_state": …, "finished_epoch": …}   also in capitals, with EPOCHS_RUN
    {"state_dict": …, "optimizer_states": […], "epoch": …}          Lightning
    {"model": …, "optimizer": …}                                    "optim" in distributed checkpoints
    {"anything": one of these}

and beside them safetensors, and the runs of harness itself. An epoch is the number in the file, whatever its writer counted
with it (some count the epochs from 0, some from 1, some the ones that are done): nothing is derived from it.

**Names.** DDP puts ``module.`` before every name, ``torch.compile`` puts ``_orig_mod.`` before the names of what it wraps,
the whole model or a child. Only names are known here. So ``_orig_mod``, which no model uses for a child of its own, is taken
out wherever it stands, and ``module.`` is taken away once, where *every* name begins with it. A model that owns a child
called ``module``, and nothing else, loses that step; ``load_into`` knows the model and puts it back.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness import torch_private
from harness.checkpoint import load
from harness.checkpoint.catalog import Catalog, Entry
from harness.checkpoint.format import Manifest, parse_directory
from harness.errors import Mismatch, Unsupported
from harness.interchange import files
from harness.storage.store import Store

_MODEL_KEYS = ("model_state_dict", "model_state", "MODEL_STATE", "state_dict", "model")
_OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer_state", "optimizer_states", "optimizer", "optim")
_EPOCH_KEYS = ("epoch", "finished_epoch", "EPOCHS_RUN")


@dataclass(frozen=True)
class Foreign:
    """What others saved, in our terms.

    ``model`` maps plain names to CPU tensors (and ``…_extra_state`` to any plain value); ``versions`` are those of its
    modules, as by ``module_versions``, None where the file does not tell. ``optimizer`` is as torch has it, keyed by
    numbers, or with plain names for the numbers where the file has those. Tensors may be mapped from the file.
    """

    source: str
    what: str  # the form that was recognized, for the log
    model: dict[str, Any]
    versions: dict[str, int | None] | None = None
    optimizer: dict[str, Any] | None = None
    epoch: int | None = None
    loss: float | None = None


def read_foreign(src: str, *, trust: bool = False, storage_options: Mapping[str, Any] | None = None) -> Foreign:
    """Reads a file, a directory or a run (its newest whole checkpoint, or one checkpoint's directory) at a URL or path.

    ``trust`` allows a distributed checkpoint, whose metadata can run code. Raises ``ConfigError`` where there is nothing,
    ``Corrupt`` for what is broken, ``Mismatch`` for what is whole and holds no weights, ``Unsupported`` for code.
    """
    with files.Place(src, storage_options) as place:
        if place.is_file:
            value, what = files.read_file(place.path(), place.url)
        elif any(parse_directory(name) for name in place.store.names()):
            return Catalog(place.store).reading(lambda entry: _of_entry(place.store, entry))
        elif parse_directory(place.store.root.rpartition("/")[2]):
            run, directory = split(place.store)
            return _from_checkpoint(run, directory, Catalog(run).open(directory))
        elif files.DCP_METADATA in place.files:
            value, what = files.read_distributed(place, trust=trust), "torch.distributed.checkpoint"
        elif files.NAMES in place.files:
            value, what = files.read_adapters(place)
        else:
            value, what = files.read_directory(place)
        return _recognize(value, place.url, what)


def split(store: Store) -> tuple[Store, str]:
    """The store of the directory above, and the name in it."""
    root, _, name = store.root.rpartition("/")
    url = store.url.rpartition("/")[0] if "/" in store.url else "."
    return type(store)(store.filesystem.at(root, url), store.calls.tries, store.calls.deadline_seconds), name


def _of_entry(store: Store, entry: Entry) -> Foreign:
    assert entry.manifest is not None, "a whole checkpoint has a manifest"
    return _from_checkpoint(store, entry.directory, entry.manifest)


def _from_checkpoint(store: Store, directory: str, manifest: Manifest) -> Foreign:
    """A checkpoint of harness, every byte verified."""
    source = f"{store.url}/{directory}"
    if "model" not in manifest.parts:
        raise Mismatch(f"{source}: expected a part called model, found {', '.join(manifest.parts) or 'none'}")
    parts = load.read(store, directory, manifest, manifest.parts.keys() & {"model", "optimizer", "training"})
    if not isinstance(parts["model"], Mapping):
        raise Mismatch(f"{source}: expected names in the part called model, found {type(parts['model']).__name__}")
    training, metrics = parts.get("training"), manifest.meta.get("metrics")
    versions = training.get("module_versions") if isinstance(training, Mapping) else None
    last = metrics.get("last") if isinstance(metrics, Mapping) else None
    return Foreign(
        source=source,
        what=f"harness, step {manifest.step}",
        model=dict(parts["model"]),
        versions=versions.get("model") if isinstance(versions, Mapping) else None,
        optimizer=_optimizer(parts.get("optimizer"), str),
        epoch=_integer(manifest.meta.get("epoch")),
        loss=_number(last.get("loss")) if isinstance(last, Mapping) else None,
    )


# --- forms -----------------------------------------------------------------------------------------------------------


def _recognize(value: Any, source: str, what: str, *, within: bool = False) -> Foreign:
    if not isinstance(value, Mapping):
        raise Mismatch(f"{source}: expected a state_dict, found {type(value).__name__}")
    if _is_state_dict(value):
        short = shortener(value)
        return Foreign(source, f"{what}: a state_dict", _model(value, short, source), _versions(value, short))
    found = [key for key in _MODEL_KEYS if _is_state_dict(value.get(key))]
    if not found and len(value) == 1 and not within:
        ((key, inner),) = value.items()
        if isinstance(inner, Mapping):
            return _recognize(inner, source, f"{what}: {key}", within=True)
    if len(found) != 1:
        keys = ", ".join(map(str, found or list(value)[:8])) or "nothing"
        raise Mismatch(f"{source}: expected a state_dict, or one under one of {', '.join(_MODEL_KEYS)}; found {keys}")
    return _from_dictionary(value, found[0], source, what)


def _from_dictionary(value: Mapping[str, Any], model_key: str, source: str, what: str) -> Foreign:
    short = shortener(value[model_key])
    optimizers = {key: state for key in _OPTIMIZER_KEYS if (state := _optimizer(value.get(key), short)) is not None}
    optimizer_key = next(iter(optimizers)) if len(optimizers) == 1 else None
    epochs = {key: epoch for key in _EPOCH_KEYS if (epoch := _integer(value.get(key))) is not None}
    epoch_key = next(iter(epochs), None)
    loss = _number(value.get("loss"))
    used = [model_key, *filter(None, (optimizer_key, epoch_key)), *(["loss"] if loss is not None else [])]
    left_out = [str(key) for key in value if key not in used]
    about = f"{what}: {', '.join(used)}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    return Foreign(
        source=source,
        what=about,
        model=_model(value[model_key], short, source),
        versions=_versions(value[model_key], short),
        optimizer=optimizers[optimizer_key] if optimizer_key else None,
        epoch=epochs[epoch_key] if epoch_key else None,
        loss=loss,
    )


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    extra = {name for name in value if name.rpartition(".")[2] == "_extra_state"}
    return value.keys() > extra and all(isinstance(value[name], torch.Tensor) for name in value.keys() - extra)


def shortener(names: Iterable[str]) -> Callable[[str], str]:
    """What takes out of the names of a file, and out of those of modules, what DDP and ``torch.compile`` put into them.

    See the module's docstring.
    """
    names = list(names)

    def without_compile(name: str) -> str:
        return ".".join(step for step in name.split(".") if step != "_orig_mod")

    def without_both(name: str) -> str:
        short = without_compile(name)
        return "" if short == "module" else short.removeprefix("module.")

    if len({without_compile(name) for name in names}) < len(names):
        return str  # two would have one name
    return without_both if all(without_compile(name).startswith("module.") for name in names) else without_compile


def _versions(value: Mapping[str, Any], short: Callable[[str], str]) -> dict[str, int | None] | None:
    """The versions of the modules, which ``state_dict()`` leaves beside its entries; a file need not have kept them."""
    metadata = torch_private.versions_of(value)
    if not isinstance(metadata, Mapping):
        return None
    found = {raw: about.get("version") for raw, about in metadata.items() if isinstance(about, Mapping)}
    return {
        f"{short(raw)}.".removeprefix("."): version  # for the prefix of the module's names, as in harness.state.modules
        for raw, version in found.items()
        if version is None or (type(version) is int and version != 1)
    }


def _model(value: Mapping[str, Any], short: Callable[[str], str], source: str) -> dict[str, Any]:
    return {short(name): _entry(f"{source}: {name}", item) for name, item in value.items()}


def _entry(where: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or type(tensor) is not torch.Tensor:
        raise Unsupported(f"{where}: expected a dense tensor, found {type(value).__name__} of layout {tensor.layout}")
    return tensor


def _optimizer(value: Any, short: Callable[[str], str]) -> dict[str, Any] | None:
    """An optimizer's state, with plain names for the parameters where the file names them; None where it is not one."""
    if isinstance(value, list) and len(value) == 1:  # Lightning has a list
        value = value[0]
    if not isinstance(value, Mapping):
        return None
    groups, state = value.get("param_groups"), value.get("state", {})  # distributed checkpoints drop what is empty
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        return None
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        return None
    called: dict[Any, Any] = {key: key for group in groups for key in group["params"] if isinstance(key, str | int)}
    if all(isinstance(key, int) for key in called):
        state = {int(key) if isinstance(key, str) and key.isdecimal() else key: item for key, item in state.items()}
    for group in groups:
        written = group.get("param_names")  # of optimizers that were made from named_parameters()
        if isinstance(written, list) and len(written) == len(group["params"]):
            called |= dict(zip(group["params"], written, strict=True))
    if len({type(name) for name in called.values()}) > 1 or len(set(called.values())) != len(called):
        called = {}  # names for some only: keep the numbers
    plain = {key: short(name) if isinstance(name, str) else name for key, name in called.items()}
    return {
        **value,
        "state": {plain.get(key, key): item for key, item in state.items()},
        "param_groups": [
            {**_without_names(group), "params": [plain.get(key, key) for key in group["params"]]} for group in groups
        ],
    }


def _without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "param_names"}


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    try:
        return float(value) if type(value) in (int, float) else None
    except OverflowError:
        return None


def _integer(value: Any) -> int | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return value if type(value) is int else None
