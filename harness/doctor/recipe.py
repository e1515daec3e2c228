"""The recipe: the task, its state, and when that is saved."""

import contextlib
import logging
import os
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch.optim import Optimizer

import harness
from harness.checkpoint import tree
from harness.checkpoint.catalog import Catalog
from harness.config import Config
from harness.data.loader import Loader
from harness.doctor.case import Case
from harness.doctor.findings import Finding, describe_error, error, ok, warn
from harness.doctor.storage import open_quickly
from harness.errors import HarnessError
from harness.task import find_builder
from harness.training import parallel
from harness.training.loop import build_task, state_of
from harness.training.resume import resume as resume_run

_LIBRARIES = (*(str(Path(module.__file__).parent) for module in (harness, torch, os) if module.__file__), "<frozen")


def task(case: Case) -> list[Finding]:
    """Imports and builds the task as ``harness train`` does at every start, on every rank: the data may be missing on one
    machine alone."""
    config = case.config
    if not isinstance(config, Config):
        return []
    tried = f"built {config.task}"
    began = time.monotonic()
    try:
        built = build_task(config, find_builder(config.task, config.args))
        parallel.check(built.model, config, case.world.size)
        loader = Loader(
            built.dataset,
            config.train.global_batch_size,
            seed=config.seed,
            micro_batch_size=config.train.micro_batch_size,
            workers=config.data.workers,
            collate=built.collate,
            drop_last=config.train.drop_last,
            tells_epoch=True,
            fingerprint=config.data.fingerprint,
            rank=case.world.rank,
            world_size=case.world.size,
        )
    except HarnessError as mistake:
        return [error(tried, line) for line in str(mistake).splitlines()]
    except (Exception, SystemExit) as problem:  # the user's own code
        return [error(tried, describe_error(problem) + place_of(problem), "fix it; a run would fail here, too")]
    scaler = torch.amp.GradScaler("cpu", enabled=config.train.precision == "fp16")
    optimizer, scheduler = built.optimizer_and_scheduler()
    case.task = replace(built, optimizer=optimizer, scheduler=scheduler)
    case.objects = {**state_of(built.model, optimizer, scheduler, scaler), "loader": loader}
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    what = f"{parameters} parameters, {loader.schedule.samples} samples, in {time.monotonic() - began:.1f} s"
    return [ok(tried, what)]


def place_of(problem: BaseException) -> str:
    """Where in the user's code an exception came from."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES) and "site-packages" not in frame.filename]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def state(case: Case) -> list[Finding]:
    """Takes the state apart as a save does, on every rank, and measures it on rank 0."""
    if case.objects is None:
        return []
    tried = "took the state apart as a save does"
    if case.task is not None and case.is_first:
        _fill(case.task.optimizer_and_scheduler()[0])
    try:
        parts = {name: tree.encode(part, name) for name, part in case.state().capture().items()}
    except HarnessError as problem:
        return [
            error(tried, line, "make it something that can be written without pickle") for line in str(problem).splitlines()
        ]
    if not case.is_first:
        return []
    case.state_bytes = sum(part.info(path).nbytes for part in parts.values() for path in part.tensors)
    without = ", and what the optimizers' first step adds" if case.task is None and not case.saves else ""
    return [ok(tried, f"a checkpoint has {case.state_bytes / 1e6:.1f} MB{without}")]


def sharding(case: Case) -> list[Finding]:
    """Compares which part each rank has of sharded tensors, as the start of a run does."""
    world, tried = case.world, "compared what the ranks have of sharded tensors"
    with contextlib.suppress(HarnessError):  # whatever else is wrong with the state is found later
        if case.objects is not None:
            case.state()
    if not all(world.all_gather(case.has_state)):
        return []
    state = case.state()
    sharded = state.sharded
    if not any(world.all_gather(sharded.in_words)):
        return []
    try:
        sharded.is_sharded_anywhere(world.all_gather)
        sharded.encoded(state.capture, world)
    except HarnessError as problem:
        return [error(tried, str(problem))]
    return [ok(tried, f"the parts make up each tensor: {sharded.in_words}")]


def resume(case: Case) -> list[Finding]:
    """Resumes as the next start would, on all ranks together, into what the task or the script has built: every byte is
    read and compared, and everything that differs from the live state is named. Nothing is written."""
    world = case.world
    wanted, skips = world.broadcast((case.saves > 0 and case.last_save_bytes < _free_memory_bytes() / 2, case.skips_newest))
    if not wanted or not all(world.all_gather(case.objects is not None)):
        return []
    tried = "resumed from it, in memory"
    began = time.monotonic()
    with _Heard("harness.training.resume") as heard:
        try:
            store = case.store or open_quickly(case.config.checkpoint)
            how = case.config.checkpoint.restore
            resumed = resume_run(world, Catalog(store), case.state(), how=how, skip_newest=skips)
        except HarnessError as problem:
            return [error(tried, "; ".join(map(str.strip, str(problem).splitlines())), "", type(problem))]
    took = f"step {resumed.step}, every byte verified, in {time.monotonic() - began:.1f} s"
    advice = f"know that the run goes back to step {resumed.step}"
    return [warn(tried, each, advice) for each in heard.errors] or [ok(tried, took)]


def _free_memory_bytes() -> float:
    """How much memory this machine has left, as far as the system says."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")


class _Heard(logging.Handler):
    """What a logger says of errors meanwhile, which goes nowhere else."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.ERROR)
        self._logger = logging.getLogger(name)
        self._propagates = self._logger.propagate
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagates


def _fill(optimizer: Optimizer) -> None:
    """Gives an optimizer the state that it has after its first step: by a step, with gradients of zero. The task is no good
    for a training after that."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        optimizer.step()
    except Exception:  # some want a closure, or sparse gradients: then the state is larger than what is measured
        return
    finally:
        optimizer.zero_grad(set_to_none=True)


def saving(case: Case) -> list[Finding]:
    """What a death costs at most."""
    checkpoint = case.config.checkpoint
    tried = "read checkpoint.url and the intervals"
    if checkpoint.url is None:
        advice = "set it" if isinstance(case.config, Config) else "give harness.Run a URL"
        return [warn(tried, "checkpoint.url is not set: nothing is saved, and every start begins at step 0", advice)]
    intervals = {
        "steps": checkpoint.every_steps,
        "seconds": checkpoint.every_seconds,
        "epochs": checkpoint.every_epochs,
    }
    given = [f"every {value:g} {name}" for name, value in intervals.items() if value is not None]
    if not given:
        place = "set checkpoint." if isinstance(case.config, Config) else "give harness.Run "
        advice = f"{place}every_steps, every_seconds or every_epochs"
        return [warn(tried, "no interval is set: only the end is saved, and a death before it loses all progress", advice)]
    return [ok(tried, f"saved {' and '.join(given)}")]


def log(case: Case) -> list[Finding]:
    """Opens the record as the run does, on rank 0."""
    path = case.config.log.jsonl
    if path is None or not case.is_first:
        return []
    is_new = not os.path.exists(path)
    tried = f"opened log.jsonl {path}"
    try:
        open(path, "a", encoding="utf-8").close()
        if is_new:
            os.unlink(path)
    except OSError as problem:
        return [error(tried, str(problem.strerror), "make its directory, and let this user write there")]
    return [ok(tried, "it can be appended to")]
