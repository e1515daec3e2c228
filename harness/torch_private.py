"""What harness takes from torch beyond its public interface. No other module touches an underscore of torch's.

``PARTS`` has each part: its names in torch, what harness does with it, a check that the installed torch has it, and what
happens where it does not. Most features then degrade, with one warning. A run without one of the ``is_needed`` parts is
refused before it starts. None of them ends in an ``AttributeError`` in the middle of a run. ``harness doctor`` names the
parts that are missing, and warns of a torch that is older or newer than those in ``TRIED``.

Read against the sources of torch 2.13, 2.14 and 2.15. Since 2.14, process groups have a ``_reconfigure``. It is off unless a
program asks for it (``init_process_group(enable_reconfigure=True)``), and it is marked as experimental. harness does not use
it: a group keeps its ranks from its beginning to its end.
"""

import contextlib
import importlib
import importlib.util
import itertools
import logging
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import distributed, nn
from torch.nn.modules import batchnorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from harness.errors import ConfigError
from harness.runtime.environment import rank

log = logging.getLogger(__name__)

# The versions of torch that harness was tried with, from the oldest to the newest: 2.13 with the whole test suite, the
# others with its main parts, on the CPU.
TRIED = ("2.11", "2.13", "2.15")


def is_tried(version: str) -> bool:
    """Whether a version of torch is one of those in ``TRIED``, or lies between them."""
    oldest, release, newest = (tuple(map(int, re.findall(r"\d+", each)[:2])) for each in (TRIED[0], version, TRIED[-1]))
    return oldest <= release <= newest


@dataclass(frozen=True)
class Part:
    """A part of torch that is not public. ``probe`` returns something false, or raises, where torch does not have it."""

    names: str
    use: str
    without: str
    probe: Callable[[], object]
    is_needed: bool = False

    def is_there(self) -> bool:
        """Whether the installed torch has it."""
        try:
            return bool(self.probe())
        except Exception:  # whatever another torch raises, the part is not as it was
            return False

    def __str__(self) -> str:
        return f"torch {torch.__version__} has no {self.names}"


_warned: set[str] = set()


def has(part: Part) -> bool:
    """Whether torch has a part. Where it does not, rank 0 warns once of what follows."""
    if part.is_there():
        return True
    if part.names not in _warned and rank() == 0:
        _warned.add(part.names)
        log.warning("%s: %s", part, part.without)
    return False


def require(*parts: Part) -> None:
    """Raises ``ConfigError`` where torch lacks one of these parts; of those that every run needs, where none is named."""
    for part in parts or [each for each in PARTS if each.is_needed]:
        if not part.is_there():
            raise ConfigError(f"{part}: {part.without}; install one of the versions that were tried: {', '.join(TRIED)}")


def missing() -> list[Part]:
    """The parts that the installed torch does not have."""
    return [part for part in PARTS if not part.is_there()]


def _getter(name: str, default: Any = None) -> Callable[[Any], Any]:
    """Reads an attribute that another torch, or another class, may not have."""
    return lambda owner: getattr(owner, name, default)


def _setter(name: str) -> Callable[[Any, Any], None]:
    return lambda owner, value: setattr(owner, name, value)


def _wrapper(name: str) -> Callable[[Any, Callable[..., Any]], None]:
    """Puts what a function makes of a method in its place."""
    return lambda owner, wrap: setattr(owner, name, wrap(getattr(owner, name)))


# --- tensors ---------------------------------------------------------------------------------------------------------

VERSION = Part(
    "Tensor._version",
    "tells whether a tensor was changed in place: while a save copies it, and after a step was saved",
    "a copy made during training could be torn without anyone noticing",
    lambda: isinstance(torch.zeros(1)._version, int),
    is_needed=True,
)
version: Callable[[torch.Tensor], int] = operator.attrgetter("_version")  # each change in place makes it larger


# --- modules ---------------------------------------------------------------------------------------------------------

MODULE_HOOKS = Part(
    "Module._forward_hooks, _forward_pre_hooks and _backward_hooks",
    "counts the hooks of a module, which a drill compares between two runs",
    "a drill does not name a hook that only some starts register",
    lambda: hooks_in(nn.Linear(1, 1)) == 0,
)


def hooks_in(module: nn.Module) -> int:
    """How many hooks a module has."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


MODULE_VERSIONS = Part(
    "Module._version and state_dict()._metadata",
    "saves the versions of a model's modules, by which they convert an older state when it is loaded",
    "checkpoints lack the versions of their modules, which then read their state as that of their oldest version",
    lambda: nn.BatchNorm1d(1).state_dict()._metadata[""]["version"] == nn.BatchNorm1d._version,  # type: ignore[attr-defined]
)
OWN_STATE = Part(
    "Module._save_to_state_dict and _load_from_state_dict",
    "finds modules that write a parameter to their state in a way of their own: packed, say",
    "a model whose modules do so is refused, as if it left these parameters out",
    lambda: callable(nn.Module._save_to_state_dict) and callable(nn.Module._load_from_state_dict),
)
COMPILED = Part(
    "torch._dynamo.eval_frame.OptimizedModule",
    "saves a compiled module under the names of the module within it",
    "the names of a compiled module have _orig_mod in a checkpoint, which fits no plain module then",
    lambda: isinstance(sys.modules["torch._dynamo.eval_frame"].OptimizedModule, type) if _has_compiled() else True,
)
BATCH_NORM = Part(
    "torch.nn.modules.batchnorm._BatchNorm",
    "warns where a batch norm may be given a single sample",
    "there is no warning for batch norms that a program derives from torch's base class",
    lambda: issubclass(nn.BatchNorm1d, batchnorm._BatchNorm),
)
module_version = _getter("_version", 1)  # of a module's state; 1 is torch's default
versions_of = _getter("_metadata")  # what ``set_versions``, or torch itself, has noted in a state_dict


def set_versions(state: Any, versions: Mapping[str, int | None]) -> None:
    """Notes in a state_dict the version of each module, by its name."""
    state._metadata = {name: {"version": version} for name, version in versions.items()}


def has_own_state(kind: type[nn.Module]) -> bool:
    """Whether a class of modules has its own way to write its state, and its own way to read it."""
    names = ("_save_to_state_dict", "_load_from_state_dict")
    return all(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def is_compiled(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile`` makes of a module, which it keeps as ``_orig_mod``."""
    return _has_compiled() and isinstance(module, getattr(sys.modules["torch._dynamo.eval_frame"], "OptimizedModule", ()))


def _has_compiled() -> bool:
    """Only a program that has compiled something has imported this, and importing it takes seconds."""
    return "torch._dynamo.eval_frame" in sys.modules


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalizes over the samples of its own process."""
    base = getattr(batchnorm, "_BatchNorm", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    return isinstance(module, base) and not isinstance(module, nn.SyncBatchNorm)


# --- optimizers and schedules ----------------------------------------------------------------------------------------


def _has_schedules() -> bool:
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    with warnings.catch_warnings(action="ignore"):
        parts = [lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
        sequence: Any = lr_scheduler.SequentialLR(optimizer, parts, milestones=[1])  # type: ignore[arg-type]
    is_made_of_them = list(sequence._schedulers) == parts and list(sequence._milestones) == [1]
    known = ("_last_lr", "_get_lr_called_within_step", "_get_closed_form_lr")
    return is_made_of_them and all(hasattr(parts[0], name) for name in known)


STEP_HOOKS = Part(
    "Optimizer._optimizer_step_pre_hooks and step.hooked",
    "waits, before an optimizer changes the parameters, for the copy that a save makes of them",
    "harness could not tell when an optimizer is about to change the parameters",
    lambda: calls_step_hooks(SGD([torch.zeros(1)], lr=0.1)),
    is_needed=True,
)
SCALER = Part(
    "GradScaler._scale and ._growth_tracker",
    "finds gradient scalers that a loop uses and the state lacks, and notes at each step where their search for a scale is",
    "there is no warning if a gradient scaler is missing from the state, and each step waits for the device",
    lambda: all(hasattr(torch.amp.GradScaler("cpu"), name) for name in ("_scale", "_growth_tracker")),
)
SCHEDULES = Part(
    "_schedulers, _milestones, _last_lr, _get_lr_called_within_step and _get_closed_form_lr of schedulers",
    "looks into schedulers that are made of others, and moves a schedule to where the checkpoint was (reset_options)",
    "reset_options cannot move a schedule",
    _has_schedules,
)
scale_of = _getter("_scale")  # of a gradient scaler; None until it has scaled a loss
growth_of = _getter("_growth_tracker")  # of a gradient scaler, likewise: so many steps it has grown for
schedulers_within = _getter("_schedulers", ())  # the schedulers that a scheduler is made of
milestones = _getter("_milestones", ())  # the steps at which a SequentialLR hands on to the next of those within it
set_last_rates = _setter("_last_lr")  # what a scheduler's get_last_lr returns from now on


def calls_step_hooks(optimizer: Any) -> bool:
    """Whether an optimizer's ``step`` calls the hooks that were registered for it."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)


def rates_at_position(scheduler: Any) -> Sequence[Any] | None:
    """The rates of a schedule that has a formula for them; None where it has none."""
    formula: Callable[[], Sequence[Any]] | None = getattr(scheduler, "_get_closed_form_lr", None)
    return formula() if formula is not None else None


def rates_by_get_lr(scheduler: Any) -> Sequence[Any]:
    """What ``get_lr`` returns, without its warning that it is not for programs."""
    before = getattr(scheduler, "_get_lr_called_within_step", False)
    scheduler._get_lr_called_within_step = True
    try:
        rates: Sequence[Any] = scheduler.get_lr()
    finally:
        scheduler._get_lr_called_within_step = before
    return rates


# --- DDP -------------------------------------------------------------------------------------------------------------

_OF_DDP = ("reducer", "static_graph", "find_unused_parameters", "require_backward_grad_sync", "process_group", "_comm_hooks")
_OF_REDUCER = ("prepare_for_forward", "prepare_for_backward")
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _has_buckets() -> bool:
    reducer: Any = getattr(distributed, "Reducer", None)  # where torch was built without torch.distributed, there is no DDP
    has_reducer = reducer is None or all(hasattr(reducer, name) for name in _OF_REDUCER)
    has_model = {*_OF_DDP} <= _names_in(DistributedDataParallel.__init__)
    return has_reducer and has_model and all(hasattr(torch.Tensor, name) for name in _OF_PARAMETERS)


def _names_in(function: Any) -> set[str]:
    """The names that a function mentions, those of functions within it included."""
    codes = [function.__code__]
    for code in codes:
        codes += [each for each in code.co_consts if hasattr(each, "co_names")]
    return {name for code in codes for name in code.co_names}


BUCKETS = Part(
    "DistributedDataParallel.reducer.prepare_for_backward, ._comm_hooks, and the dictionaries of a parameter's hooks",
    "has DDP add up gradients, after a restart, in the order of the run that never stopped",
    "with three ranks or more the first step after a restart may differ in its last bits",
    _has_buckets,
)
parameters_left_out = _getter("parameters_to_ignore", ())  # whose gradients a DDP module does not add up, by name
communication_hooks = _getter("_comm_hooks")  # of a DDP module, each with its state


def lacking_of_ddp(model: DistributedDataParallel) -> str | None:
    """The name of something that settling the buckets of a DDP module needs, and that is not there."""
    for name in _OF_DDP:
        if not hasattr(model, name):
            return f"DistributedDataParallel.{name}"
    lacking = [name for name in _OF_REDUCER if not hasattr(model.reducer, name)]
    lacking += [name for name in _OF_PARAMETERS if not hasattr(torch.Tensor, name)]
    return lacking[0] if lacking else None


def begin_backward(model: DistributedDataParallel) -> None:
    """Has DDP expect gradients, as after a forward pass."""
    model.reducer.prepare_for_forward()
    model.reducer.prepare_for_backward([])


def end_backward(model: DistributedDataParallel) -> None:
    """Has DDP hand out the gradients, where the program has taken that upon itself (torch 2.15)."""
    if getattr(model, "require_manual_backward_finalization", False):
        model.finalize_backward()  # type: ignore[operator]  # from 2.15 on, with that attribute


def hooks_of(parameter: torch.Tensor) -> Iterator[dict[int, Any]]:
    """The hooks of a parameter, and of the node of the graph that adds its gradient up, where it has any. These are the
    dictionaries that torch looks into."""
    for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
        if hooks:
            yield hooks
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *_: None)  # a node shows its hooks to nobody but those who register one
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            yield hooks


# --- torch's loaders -------------------------------------------------------------------------------------------------

_OF_LOADER = ("_get_iterator", "_index_sampler")
_OF_ITERATOR = ("_next_data", "_num_yielded", "_reset", "_index_sampler", "_sampler_iter")


def _iterator() -> Any:
    loader: DataLoader[Any] = DataLoader([0], generator=torch.Generator("cpu"))  # type: ignore[arg-type]
    return iter(loader)


def _workers_iterator() -> Any:
    return torch.utils.data.dataloader._MultiProcessingDataLoaderIter


def _has_loader() -> bool:
    return all(hasattr(DataLoader, name) for name in _OF_LOADER) and all(hasattr(_iterator(), name) for name in _OF_ITERATOR)


LOADER = Part(
    f"DataLoader.{', .'.join(_OF_LOADER)}, or {', '.join(_OF_ITERATOR)} of its iterator",
    "has a loader of torch's kind draw the order of an epoch again after a resume",
    "a loader of torch's kind cannot be in the state, since its order would differ after a resume (use harness.Loader)",
    _has_loader,
)
WORKERS = Part(
    "_shutdown_workers of a DataLoader's iterator",
    "ends the loader's workers before they are killed, so that they leave no files behind",
    "loader workers are killed without a request to end",
    lambda: hasattr(type(_iterator()), "_shutdown_workers") or hasattr(_workers_iterator(), "_shutdown_workers"),
)
set_maker = _setter("_get_iterator")  # a loader gets its iterators from this function
wrap_next = _wrapper("_next_data")  # an iterator gets its batches from what is made of its own function
wrap_reset = _wrapper("_reset")  # an iterator that is used for several epochs begins a further one with what is made of it
given_by = _getter("_num_yielded")  # how many batches of the epoch an iterator has given, those before a resume included
is_finished = _getter("_finished", default=False)  # whether an iterator of torchdata's has come to its end
index_sampler_of = _getter("_index_sampler")  # the sampler that a loader draws from: of batches, or of single samples
set_index_sampler = _setter("_index_sampler")  # the one that an iterator says it draws from


def make_iterator(loader: Any) -> Any:
    """An iterator as the loader's class makes it. Raises ``ConfigError`` for one that is made otherwise than torch's."""
    iterator = type(loader)._get_iterator(loader)
    if lacking := [name for name in _OF_ITERATOR if not hasattr(iterator, name)]:
        raise ConfigError(f"{type(iterator).__name__} has no {lacking[0]}: {LOADER.without}")
    return iterator


def draw_now(iterator: Any, order: Iterator[Any]) -> None:
    """Has an iterator of torchdata's that would skip the batches before a resume later, when it is asked for one, skip them
    now."""
    if isinstance(iterator._sampler_iter, itertools.islice):
        for _ in range(getattr(iterator, "_sampler_iter_yielded", iterator._num_yielded)):
            next(order, None)
        iterator._sampler_iter = order


def end_workers(iterator: Any) -> None:
    """Has the workers of a loader's iterator end, as its finalizer would do, which may come too late."""
    if (end := getattr(iterator, "_shutdown_workers", None)) is not None:
        end()


# --- torchrun --------------------------------------------------------------------------------------------------------

RANKS_END = Part(
    "torch.distributed.elastic.multiprocessing.api.PContext.close, .pids and SignalException",
    "notes that torchrun ends ranks because another one has failed, which they cannot tell from a stop",
    "a rank that torchrun ends because another one has failed looks like one that was stopped",
    lambda: callable(_elastic().PContext.close) and callable(_elastic().PContext.pids) and _elastic().SignalException,
)
RESTARTS = Part(
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._monitor_workers, ._remaining_restarts",
    "reports restarts, and counts again from zero when the ranks have come further",
    "restarts are not reported, and --max-restarts counts all of them, also those with progress in between",
    lambda: (
        "_monitor_workers" in vars(_agent())
        and any("_remaining_restarts" in _names_in(kind.__init__) for kind in _agent().__mro__ if kind is not object)
    ),
)


WATCH = Part(
    "LocalElasticAgent._invoke_run, ._monitor_workers, ._pcontext and ._worker_group, WorkerSpec.monitor_interval",
    "notices the death of a rank at once, and a rank that is suspended",
    "a death is noticed after up to 0.1 s, and a suspended rank not before the others give up",
    lambda: (
        "_monitor_workers" in vars(_agent())
        and {"monitor_interval", "_monitor_workers", "_worker_group"} <= _names_in(_agent()._invoke_run)
        and "_pcontext" in _names_in(_agent().__init__)
    ),
)
DELAY = Part(
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous._delay",
    "has a machine that is alone begin at once",
    "the first start and the first restart take up to 0.3 s longer",
    lambda: callable(_rendezvous()._delay),
)
RANKS_STDERR = Part(
    "SubprocessHandler._popen, ._stdout and ._stderr, PContext._tail_logs",
    "keeps torchrun's own output in a file, the ranks' output on the screen, and forks ranks from a process that has torch",
    "torchrun's own output is shown, as with --verbose, and each rank imports torch by itself",
    lambda: (
        "_popen" in vars(_subprocess())
        and {"_stdout", "_stderr"} <= _names_in(_subprocess().__init__)
        and "_tail_logs" in _names_in(_elastic().PContext.__init__)
    ),
)


def _subprocess() -> Any:
    return importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler").SubprocessHandler


def _elastic() -> Any:
    return importlib.import_module("torch.distributed.elastic.multiprocessing.api")


def _rendezvous() -> Any:
    return importlib.import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous")


def _agent() -> Any:
    return importlib.import_module("torch.distributed.elastic.agent.server.local_elastic_agent").LocalElasticAgent


def before_ranks_are_ended(note: Callable[[Sequence[int]], None]) -> None:
    """Has torchrun, in this process, call ``note`` with the process ids of its ranks before it ends them. It does not
    where torchrun itself was asked to end."""
    if not has(RANKS_END):
        return
    context, signalled = _elastic().PContext, _elastic().SignalException
    close = context.close

    def note_and_close(self: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(sys.exception(), signalled):  # else torchrun passes a signal on
            note(list(self.pids().values()))
        close(self, *args, **kwargs)

    context.close = note_and_close


def when_ranks_fail(left: Callable[[int, int, Mapping[int, int]], int]) -> None:
    """Has torchrun, in this process, call ``left`` when ranks have failed: with the number of restarts that it allows, of
    those that are left, and the exit codes of the ranks that failed here. What it returns is left from then on."""
    if not has(RESTARTS):
        return
    kind = _agent()
    monitor = kind._monitor_workers

    def monitor_and_count(self: Any, group: Any) -> Any:
        result = monitor(self, group)
        if result.state.name in ("FAILED", "UNHEALTHY"):
            codes = {rank: failure.exitcode for rank, failure in (getattr(result, "failures", None) or {}).items()}
            self._remaining_restarts = left(group.spec.max_restarts, self._remaining_restarts, codes)
        return result

    kind._monitor_workers = monitor_and_count


def meet_at_once() -> None:
    """Has torchrun, in this process, begin at once: it waits up to 0.3 s, at random, so that many machines do not come to
    their meeting place together."""
    if not has(DELAY):
        return
    module = _rendezvous()
    delay = module._delay
    module._delay = lambda seconds: None if isinstance(seconds, tuple) else delay(seconds)


def watch_ranks(wait: Callable[[Mapping[int, int], float], None]) -> None:
    """Has torchrun, in this process, call ``wait`` in place of its sleep before it looks after its ranks: with their process
    ids, by the number of the rank, and the seconds that it would sleep."""
    if not has(WATCH):
        return
    kind = _agent()
    invoke, monitor = kind._invoke_run, kind._monitor_workers
    seconds = 0.0

    def invoke_without_sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        spec = self._worker_group.spec
        seconds, spec.monitor_interval = spec.monitor_interval, 0
        return invoke(self, *args, **kwargs)

    def wait_and_monitor(self: Any, group: Any) -> Any:
        pids = self._pcontext.pids() if self._pcontext is not None else {}
        wait({each.global_rank: pids[each.local_rank] for each in group.workers if each.local_rank in pids}, seconds)
        return monitor(self, group)

    kind._invoke_run, kind._monitor_workers = invoke_without_sleep, wait_and_monitor


def start_ranks_by(start: Callable[[Sequence[str], Mapping[str, str], TextIO | None, TextIO | None], Any]) -> None:
    """Has torchrun, in this process, ask ``start`` for each rank: with its command line, its environment, its stdout and
    stderr (None for this process's own). Where that returns None, torchrun starts the rank by itself."""
    if not has(RANKS_STDERR):
        return
    handler = _subprocess()
    popen = handler._popen

    def start_or_popen(self: Any, args: Any, env: Any) -> Any:
        return start(args, env, self._stdout, self._stderr) or popen(self, args, env)

    handler._popen = start_or_popen


def give_ranks(stderr: TextIO) -> bool:
    """Has torchrun, in this process, give its ranks a stderr that is not its own, also for what it copies there (``--tee``).
    Returns whether it does."""
    if not has(RANKS_STDERR):
        return False
    handler, context = _subprocess(), _elastic().PContext
    popen, init = handler._popen, context.__init__

    def popen_with(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._stderr is None:  # else it goes to a file
            self._stderr = open(os.dup(stderr.fileno()), "w")  # noqa: SIM115  # the handler closes it
        return popen(self, *args, **kwargs)

    def init_with(self: Any, *args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stderr(stderr):
            init(self, *args, **kwargs)

    handler._popen, context.__init__ = popen_with, init_with
    return True


DYNAMO = Part(
    "torch._dynamo",
    "imports it before the training has objects of its own, since the first optimizer would import it",
    "the first optimizer takes longer to be made",
    lambda: importlib.util.find_spec("torch._dynamo"),
)

PARTS = (
    *(
        VERSION,
        MODULE_HOOKS,
        MODULE_VERSIONS,
        OWN_STATE,
        COMPILED,
        BATCH_NORM,
        STEP_HOOKS,
        SCALER,
        SCHEDULES,
        BUCKETS,
        LOADER,
        WORKERS,
    ),
    *(RANKS_END, RESTARTS, WATCH, DELAY, RANKS_STDERR, DYNAMO),
)
