"""In each rank of a launch: writes down what each step has done, and says when the faults of the plan are due.

A line of a record is written before anything else happens, so it outlives a SIGKILL.
"""

import copy
import functools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from harness.config import RunConfig
from harness.distributed.world import World
from harness.drill.faults import Faults
from harness.drill.hashes import hash_of, of_parts
from harness.drill.plan import Plan, read_records
from harness.drill.reachable import Reachable
from harness.errors import StoreError
from harness.state.modules import unwrap
from harness.training.observer import Observer

if TYPE_CHECKING:
    from harness.training.run import Run

_OTHER_SEED = 918_273_645  # what the control leaves the generators at: nobody's own


class Recorder(Observer):
    """Follows the first Run of a program; others are left alone."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._run: Run | None = None
        self._state: Mapping[str, Any] = {}
        self._path = Path()  # of the record, once the rank is known
        self._start = 0  # how many starts of this rank came before
        self._epoch = 0
        self._inputs = xxhash.xxh3_64()  # of the forward passes in training since the last boundary
        self._samples: list[int] = []  # of the first of them
        self._evaluations = 0  # forward passes in ``eval()`` since then
        self._seeded: list[str] = []  # where the program has seeded a generator since its Run was made
        self._is_half = False  # the next step was trained before the death, and only its evaluation comes now

    # --- what the run says -------------------------------------------------------------------------------------------

    def settings(self, config: RunConfig) -> RunConfig:
        plan = self._plan
        if self._run is not None:
            return config
        checkpoint: dict[str, Any] = {"url": plan.url, "storage_options": {}, "must_exist": False}
        checkpoint |= {"every_steps": plan.every_steps, "every_seconds": None}
        checkpoint |= {"keep_last": None, "keep_every_steps": None, "keep_best": False}
        sections = {
            "checkpoint": config.checkpoint.model_copy(update=checkpoint),
            "log": config.log.model_copy(update={"jsonl": str(plan.events), "every_steps": 1}),
            "metrics": config.metrics.model_copy(update={"tensorboard": False, "prometheus": None}),
            "preemption": config.preemption.model_copy(update={"watch": "none"}),
        }
        return config.model_copy(update=sections)

    def making(self, config: RunConfig, state: Mapping[str, Any], world: World | None, fresh: bool) -> None:  # noqa: ARG002
        if self._run is None:
            self._state = state
            self._as_built = {name: copy.deepcopy(each.state_dict()) for name, each in self._left_out()}

    def begun(self, run: "Run") -> None:
        if self._run is not None:
            return
        self._run, self._path, self._epoch = run, self._plan.records(run.world.rank), run.epoch
        self._start = sum(line["at"] == "begun" for line in read_records(self._path))
        if run.global_step:
            for name, each in self._left_out():
                each.load_state_dict(self._as_built[name])
        self._reachable = Reachable(self._state)
        for module in run.state.modules.values():
            unwrap(module).register_forward_pre_hook(self._before_forward, with_kwargs=True)
        batch = run.loader.schedule.global_batch_size if run.loader is not None else 0
        self._write("begun", step=run.global_step, grace_seconds=run.config.stop.grace_seconds, batch=batch)
        self._faults = Faults(self._plan, run.world.rank, self._start, self._write)
        self._faults.at("begun", run.global_step)
        self._watch_seeds()

    def looping(self, run: "Run") -> None:
        if run is not self._run:
            return
        if self._plan.leaves_out == "random" and run.global_step:
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(_OTHER_SEED + run.world.rank)
        self._is_half = run.state.progress.half is not None
        self._write("loop", step=run.global_step, reach=self._reachable.values())

    def reached(self, run: "Run", metrics: Mapping[str, Any]) -> None:
        if run is not self._run:
            return
        step = run.global_step
        self._write("step", step=step, **self._describe_step(run, metrics))
        self._inputs, self._samples, self._evaluations, self._seeded = xxhash.xxh3_64(), [], 0, []
        self._is_half = False
        self._faults.clear_the_way()
        if run.epoch != self._epoch:
            self._epoch = run.epoch
            self._faults.at("epoch end", step)
        self._faults.at("step", step)
        if step >= (self._plan.stop_at or self._plan.steps) - 1:
            run.stop.ask("the drill's end")  # the ranks agree on it at the next boundary, which is the last one

    def saving(self, directory: str) -> None:
        assert self._run is not None, "who saves was made"
        self._faults.at("saving", self._run.global_step, Path(self._plan.url, directory))

    # --- what is written down ----------------------------------------------------------------------------------------

    def _describe_step(self, run: "Run", metrics: Mapping[str, Any]) -> dict[str, Any]:
        rates = [
            float(group["lr"]) for each in run.state.optimizers.values() for group in each.param_groups if "lr" in group
        ]
        return {
            "metrics": {
                name: float(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in metrics.items()
            },
            "lr": rates,
            "samples": self._samples,
            "inputs": self._inputs.hexdigest(),
            "parts": of_parts({**run.state.capture(), **run.state.capture_rank(run.world.rank)}),
            "reach": self._reachable.values(),
            "evaluations": self._evaluations,
            "seeded": self._seeded,
            "epoch": run.epoch,
            "is_half": self._is_half,
        }

    def _write(self, at: str, **values: Any) -> None:
        assert self._run is not None, "nothing is known before"
        about = {"at": at, "rank": self._run.world.rank, "start": self._start, "time": time.time()}
        line = json.dumps({**about, **values})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StoreError(f"the drill cannot write its record {self._path}: {error.strerror}") from None

    def _before_forward(self, module: nn.Module, arguments: Any, named: Any) -> None:
        assert self._run is not None, "the hook came with it"
        if module.training:
            if self._run.loader is not None and not self._samples:
                self._samples = self._run.loader.samples()
            self._inputs.update(hash_of([*arguments, named]).encode())
            return
        self._evaluations += 1
        self._faults.at("evaluation", self._run.global_step)

    def _watch_seeds(self) -> None:
        """Writes down who seeds a generator from now on, and where."""
        for module, name in ((torch, "manual_seed"), (random, "seed"), (np.random, "seed")):
            setattr(module, name, self._noting(getattr(module, name), f"{module.__name__}.{name}"))

    def _noting(self, seed: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(seed)
        def noting(*arguments: Any, **named: Any) -> Any:
            caller = sys._getframe(1)
            if not caller.f_globals.get("__name__", "").startswith(("harness.", "torch.")):
                self._seeded.append(f"{name} ({os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno})")
            return seed(*arguments, **named)

        return noting

    def _left_out(self) -> Iterator[tuple[str, Any]]:
        """The objects that a resume is not to restore."""
        kinds: dict[str, type] = {"scheduler": LRScheduler, "optimizer": Optimizer}
        kind = kinds.get(self._plan.leaves_out)
        yield from ((name, each) for name, each in self._state.items() if kind is not None and isinstance(each, kind))
