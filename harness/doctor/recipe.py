"""The recipe: the task, its state, and when that is saved."""

import os
import time
import traceback
from pathlib import Path

import torch

import harness
from harness.checkpoint import tree
from harness.data import Schedule
from harness.doctor.case import Case
from harness.doctor.findings import Finding, error, in_words, ok, warn
from harness.errors import HarnessError
from harness.loop import build_task, state_of
from harness.state import State
from harness.task import Task, find_builder

_LIBRARIES = (str(Path(harness.__file__).parent), str(Path(torch.__file__).parent), "<frozen")


def task(case: Case) -> list[Finding]:
    """Imports and builds the task as ``harness train`` does at every start, on every rank: the data may be missing on one
    machine alone."""
    config = case.config
    tried = f"built {config.task}"
    began = time.monotonic()
    try:
        built = build_task(config, find_builder(config.task, config.args))
        train, samples = config.train, len(built.dataset)  # type: ignore[arg-type]
        schedule = Schedule(samples, config.seed, train.global_batch_size, train.micro_batch_size, train.drop_last)
    except HarnessError as mistake:
        return [error(tried, line) for line in str(mistake).splitlines()]
    except (Exception, SystemExit) as problem:  # the user's own code
        return [error(tried, in_words(problem) + _place(problem), "mend it: no run would come further")]
    case.task = built
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    what = f"{parameters} parameters, {schedule.samples} samples, in {time.monotonic() - began:.1f} s"
    return [ok(tried, what)]


def _place(problem: BaseException) -> str:
    """Where in the user's code an exception came from."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES) and "site-packages" not in frame.filename]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def state(case: Case) -> list[Finding]:
    """Takes the state apart as a save does, on rank 0, and measures it."""
    if case.task is None or not case.is_first:
        return []
    tried = "took the state apart as a save does"
    _fill(case.task)
    scaler = torch.amp.GradScaler("cpu", enabled=case.config.train.precision == "fp16")
    try:
        training = State(state_of(case.task, case.task.model, scaler), torch.device("cpu"))
        parts = {name: tree.encode(part, name) for name, part in training.capture().items()}
    except HarnessError as problem:
        return [
            error(tried, line, "make it something that can be written without pickle") for line in str(problem).splitlines()
        ]
    case.state_bytes = sum(tensor.nbytes for part in parts.values() for tensor in part.tensors.values())
    return [ok(tried, f"a checkpoint has {case.state_bytes / 1e6:.1f} MB")]


def _fill(task: Task) -> None:
    """Gives the optimizer the state that it has after its first step: by a step, with gradients of zero. The task is no good
    for a training after that."""
    for group in task.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        task.optimizer.step()
    except Exception:  # some want a closure, or sparse gradients: then the state is larger than what is measured
        return
    finally:
        task.optimizer.zero_grad(set_to_none=True)


def saving(case: Case) -> list[Finding]:
    """What a death costs at most."""
    checkpoint = case.config.checkpoint
    tried = "read checkpoint.url and the intervals"
    if checkpoint.url is None:
        return [warn(tried, "there is no checkpoint.url: nothing is saved, and every start is from nothing", "set it")]
    intervals = {
        "steps": checkpoint.every_steps,
        "seconds": checkpoint.every_seconds,
        "epochs": checkpoint.every_epochs,
    }
    given = [f"every {value:g} {name}" for name, value in intervals.items() if value is not None]
    if not given:
        advice = "set checkpoint.every_steps, every_seconds or every_epochs"
        return [warn(tried, "there is no interval: only the end is saved, and a death before it costs all", advice)]
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
