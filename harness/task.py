"""What a user brings: a model, its data, an optimizer and a loss."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.runtime.torch_import import import_torch

if TYPE_CHECKING:  # torch is imported by the functions that need it: reading a configuration must not take seconds
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset


@dataclass(frozen=True)
class Evaluation:
    """How a model is judged beside its training loss.

    ``measure(model, batch)`` returns named 0-dim tensors, each the *mean* over the samples of the batch. It runs in
    ``eval()`` mode without gradients, on every rank for its own share of ``dataset``. harness weighs the means by their
    samples, so the result does not depend on the number of ranks (except for rounding). Checkpoints remember the best value
    of ``metric``: the lowest, or with ``higher_is_better`` the highest.
    """

    dataset: "Dataset[Any]"
    measure: "Callable[[nn.Module, Any], Mapping[str, Tensor]]"
    metric: str
    higher_is_better: bool = False
    batch_size: int = 64


@dataclass(frozen=True)
class Task:
    """A training task, as returned by the function that the configuration's ``task`` names.

    ``dataset`` is map-style (``len`` and ``[index]``); each sample is drawn exactly once an epoch. ``collate`` (default:
    torch's) turns a list of samples into a batch. ``loss(model, batch)`` returns a 0-dim tensor, the *mean* over the samples
    of the batch. Call ``model(...)`` in it once: with several ranks it is the DDP wrapper. ``scheduler`` is stepped once
    after every optimizer step.

    ``optimizer`` may be a function that makes the optimizer of a model, and ``scheduler`` one that makes the scheduler of an
    optimizer. A model that ``train.parallel`` shards needs this: its parameters are others before.

    The function that builds a task is called on every rank, on the CPU. The generators of Python, NumPy and torch are seeded
    from the configuration's ``seed``, which is also ``torch.initial_seed()``. The same call must give the same model and the
    same split on every rank and after every restart.
    """

    model: "nn.Module"
    dataset: "Dataset[Any]"
    optimizer: "Optimizer | Callable[[nn.Module], Optimizer]"
    loss: "Callable[[nn.Module, Any], Tensor]"
    scheduler: "LRScheduler | Callable[[Optimizer], LRScheduler] | None" = None
    evaluation: Evaluation | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def optimizer_and_scheduler(self) -> "tuple[Optimizer, LRScheduler | None]":
        """The optimizer and the scheduler, made now where there are functions for them."""
        optimizer: Any = self.optimizer if hasattr(self.optimizer, "step") else self.optimizer(self.model)
        scheduler: Any = self.scheduler
        if scheduler is not None and not hasattr(scheduler, "step"):
            scheduler = scheduler(optimizer)
        return optimizer, scheduler


def find_builder(name: str, args: Mapping[str, Any]) -> Callable[..., Task]:
    """Imports the function that ``name`` means: ``package.module:function`` or ``path/to/file.py:function``.

    Raises ``ConfigError`` when there is no such thing or when it does not take ``args``. An exception inside the
    user's own module is let through: its traceback is what the user needs.
    """
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name:
        raise ConfigError(f"task: expected package.module:function or path/to/file.py:function, found {name!r}")
    module = _load_file(place) if place.endswith(".py") else _import(place)
    builder = getattr(module, function_name, None)
    if not callable(builder):
        raise ConfigError(f"task: {place} has no function {function_name!r}")
    try:
        inspect.signature(builder).bind(**args)
    except TypeError as error:
        raise ConfigError(f"args: {name} cannot be called with them: {error}") from None
    return builder  # type: ignore[no-any-return]  # checked when it has returned


def package_of(name: str) -> str:
    """The package or file of what ``name`` means, as its own loggers are called that are named after modules."""
    place = name.rpartition(":")[0] or name
    return (Path(place).stem if place.endswith(".py") else place.partition(".")[0]) or "harness"


def _import(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed `harness` command finds modules of the working directory as python -m does
    if importlib.util.find_spec(name.partition(".")[0]) is not None:  # a wrong name is told of at once
        import_torch()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there; something that it imports is not
        raise ConfigError(f"task: there is no module {error.name!r} (looked for {name!r})") from None


def _load_file(path: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"task: there is no file {path!r} (working directory {Path.cwd()})")
    import_torch()
    # As if the file were run as a script: its neighbours can be imported, and loader workers that are not forked find it.
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
