"""What ``from_pretrained`` reads beside weights, kept in each checkpoint. ``harness export`` writes it beside them.

The files are those that the libraries themselves write: the model's configuration, that of its generation, the tokenizer's.
A model of PEFT has a folder for its adapter. Its base model is another one, in ``base/``, unless the adapter names where it
is to be had.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
_ADAPTER_PREFIX = "base_model.model."


class Pretrained:
    """A part of a run's state: ``Run(url, {"model": model, …, "pretrained": Pretrained(model, tokenizer)})``.

    ``processor`` is a tokenizer, or whatever else has a ``save_pretrained``. Both are read when the object is made, which
    all ranks do together; what rank 0 has counts.
    """

    def __init__(self, model: Any, processor: Any = None) -> None:
        found = [_folders_of(model, processor)]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(found)  # PEFT writes sets, whose order differs between processes
        self._folders = found[0]

    def state_dict(self) -> dict[str, Any]:
        """The files, as tensors of bytes."""
        return {"pretrained": self._folders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The program's own count."""


def _folders_of(model: Any, processor: Any) -> dict[str, Any]:
    if not hasattr(model, "save_pretrained"):
        return {}
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        folders = _of_adapters(model)
    else:
        folders = {"": _folder("model", None, _files_of(model, state_dict={}))}
    if folders and hasattr(processor, "save_pretrained"):
        folders.get("", next(iter(folders.values())))["files"] |= _files_of(processor)
    return folders


def _folder(weights: str, names: Mapping[str, str] | None, files: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a folder has: the first word of its weights' name, what these are called there and in the state, its files."""
    return {"weights": weights, "names": None if names is None else _bytes(json.dumps(names).encode()), "files": {**files}}


def _of_adapters(model: Any) -> dict[str, Any]:
    from peft import get_peft_model_state_dict  # noqa: PLC0415  # it is imported already

    state = model.state_dict()
    by_identity = {id(value): name for name, value in state.items()}
    by_place = {value.data_ptr(): name for name, value in state.items() if isinstance(value, torch.Tensor)}
    folders: dict[str, Any] = {}
    own: set[str] = set()
    for adapter, config in model.peft_config.items():
        saved = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
        names = {key: by_identity.get(id(value), by_place.get(value.data_ptr())) for key, value in saved.items()}
        known = {key: name for key, name in names.items() if name is not None}
        if unknown := names.keys() - known.keys():
            log.warning("harness export will not know this adapter: %s is no entry of the model's state", min(unknown))
            return {}
        own |= {*known.values()}
        folder = "" if adapter == "default" else f"{adapter}/"
        files = _files_of(model, selected_adapters=[adapter], within=folder)
        folders[folder] = _folder("adapter_model", known, files)
        if not config.base_model_name_or_path:
            folders["base/"] = {}
    if "base/" in folders:
        base = {_plain(name): name for name in state if name not in own and not _is_adapters(name, [*model.peft_config])}
        folders["base/"] = _folder("model", base, _files_of(model.get_base_model(), state_dict={}))
    return folders


def _plain(name: str) -> str:
    """How an entry of the base model is called without PEFT around it."""
    return name.removeprefix(_ADAPTER_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _is_adapters(name: str, adapters: list[str]) -> bool:
    """Whether an entry came with an adapter, if it is not saved with it."""
    steps = name.split(".")
    return not name.startswith(_ADAPTER_PREFIX) or "modules_to_save" in steps or bool({*steps} & {*adapters})


def _files_of(source: Any, *, within: str = "", **options: Any) -> dict[str, torch.Tensor]:
    """What an object's ``save_pretrained`` writes, without weights and descriptions."""
    with tempfile.TemporaryDirectory(prefix="harness-") as directory:
        source.save_pretrained(directory, **options)
        root = Path(directory, within)
        return {
            str(path.relative_to(root)): _bytes(path.read_bytes())
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix not in _WEIGHTS and path.name != "README.md"
        }


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
