"""The training loop of ``harness train``, in training order. What keeps it alive is in ``harness.training.run``."""

import contextlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from harness import interchange
from harness.config import Config
from harness.data.fetching import Step
from harness.data.loader import Loader
from harness.data.nested import to_device
from harness.data.position import SkippedBatch
from harness.data.schedule import Cursor, is_due
from harness.data.seeding import random_state, restore_random_state, seed_everything
from harness.distributed import device
from harness.distributed.world import World
from harness.errors import ConfigError, NonFinite
from harness.runtime.signals import StopRequest
from harness.task import Task
from harness.training import gradients, nonfinite, parallel, resume
from harness.training.run import Run


@dataclass(frozen=True)
class Trained:
    """How far a training has come."""

    step: int
    cursor: Cursor
    last: dict[str, float]  # the newest metrics, the training loss among them
    best: dict[str, float]  # the metrics and the step of the best evaluation
    skipped: list[SkippedBatch] = field(default_factory=list)  # batches that were not trained


def train(config: Config, task: Task, world: World, stop: StopRequest, *, fresh: bool = False) -> Trained:
    """Trains a task to its end, from wherever the run at ``checkpoint.url`` is.

    Every rank calls it with the same arguments. Raises ``Stopped`` when ``stop`` was set on any rank; the step that all
    ranks finished last is saved then.
    """
    trainer = _Trainer(config, task, world)
    run = Run(
        config.checkpoint.url,
        trainer.state(),
        config=config,
        initialize=trainer.initialize,
        about={"seed": config.seed, "samples": trainer.loader.schedule.samples, "config": config.digest()},
        reset_options=config.train.reset_options,
        world=world,
        stop=stop,
        fresh=fresh,
    )
    with contextlib.closing(run):
        try:
            for _ in run.steps(trainer.total_steps):
                metrics = run.boundary.take_half()
                if metrics is None:
                    metrics = {"loss": trainer.advance(run)}
                run.boundary.trained()
                trainer.evaluate_if_due(run, metrics)
                run.step(**metrics)
        except Exception as error:
            run.remember_crash(error)
            raise
    progress, loader = run.state.progress, trainer.loader
    return Trained(progress.step, loader.cursor, progress.last, progress.best, loader.skipped)


class _Trainer:
    """The things that the loop moves along, and each of its moves."""

    def __init__(self, config: Config, task: Task, world: World) -> None:
        self.config, self.task, self.world = config, task, world
        _be_deterministic(config.train.deterministic)
        train = config.train
        self.loader = Loader(
            task.dataset,
            train.global_batch_size,
            seed=config.seed,
            micro_batch_size=train.micro_batch_size,
            workers=config.data.workers,
            collate=task.collate,
            pin_memory=device.of(world.device).is_async,
            drop_last=train.drop_last,
            tells_epoch=True,
            fingerprint=config.data.fingerprint,
            rank=world.rank,
            world_size=world.size,
        )
        self.total_steps = train.steps or (train.epochs or 0) * len(self.loader)
        task.model.to(world.device).train()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16")
        seed_everything(config.seed, world.rank + 1)
        self.model = parallel.spread(task.model, config, world)
        self.optimizer, self.scheduler = task.optimizer_and_scheduler()
        _check_steps(config, task, self.optimizer, self.scheduler)
        self.parameters = list(task.model.parameters())  # walking through the modules takes longer than many a step
        self.loss = torch.zeros(
            (), device="cpu"
        )  # this rank's part of the mean loss over the last global batch; the parts add up

    def state(self) -> dict[str, Any]:
        """What is saved and restored."""
        return {**state_of(self.model, self.optimizer, self.scheduler, self.scaler), "loader": self.loader}

    def initialize(self) -> str | None:
        """Gives a new run the weights that ``init_from`` names."""
        if self.config.init_from is None:
            return None
        foreign = interchange.read_foreign(self.config.init_from)
        optimizer = self.optimizer if self.config.init_optimizer else None
        loaded = interchange.load_into(self.task.model, optimizer, foreign)
        return f"initialized from {foreign.source} ({foreign.what}): {loaded}"

    # --- a step ------------------------------------------------------------------------------------------------------

    def advance(self, run: Run) -> torch.Tensor:
        """Trains the next batch, or skips it. Returns this rank's loss, such that the mean over the ranks is that over the
        global batch."""
        while (micro_batches := self.loader.next_step()) and not self.step(micro_batches):
            if not self.skip(run):
                break
        if self.scheduler is not None and not _waits_for_evaluations(self.scheduler):
            self.scheduler.step()
        return self.loss * self.world.size

    def step(self, micro_batches: Step) -> bool:
        """One optimizer step; False where it was not taken, because the loss or the gradients are not finite."""
        optimizer, scaler, parameters = self.optimizer, self.scaler, self.parameters
        self.loss = self.accumulate(micro_batches)
        limit, looks = self.config.train.clip_grad_norm, self.config.nonfinite.policy != "ignore"
        bad = False
        if limit is not None or looks:
            scaler.unscale_(optimizer)  # the limit is meant for the gradients, not for the scaled ones
            norm = gradients.norm(parameters) if limit is None else gradients.clip(parameters, limit)
            bad = looks and nonfinite.is_bad(self.world, norm, self.loss, has_scaler=scaler.is_enabled())
        if bad:
            scaler.update(scaler.get_scale())  # the scale is not to blame, and stays
        else:
            scaler.step(optimizer)
            scaler.update()
        for parameter in parameters:  # all of them: the optimizer may not own each, and none may pile up
            parameter.grad = None
        return not bad

    def skip(self, run: Run) -> bool:
        """Notes that the batch that was just found bad is not to be trained; goes back to a checkpoint where that is wanted,
        and says whether it has.

        Raises ``NonFinite`` where the configuration, or what has become of the model, does not allow it.
        """
        loader, config = self.loader, self.config.nonfinite
        what, samples = nonfinite.what_is_bad(self.world, self.loss, loader)
        found = f"step {run.global_step + 1}: {what}"
        if config.policy == "stop":
            raise NonFinite(f"{found}; fix the data or the training, or set nonfinite.policy to skip or rollback")
        if len(loader.skipped) >= config.limit:
            raise NonFinite(
                f"{found}; {config.limit} batches were skipped before this one, as many as nonfinite.limit allows"
            )
        run.tell("nonfinite", f"{found}: {config.policy}", step=run.global_step + 1, samples=samples, policy=config.policy)
        loader.position.skip()
        if config.policy == "rollback":
            if not run.can_roll_back():
                raise NonFinite(f"{found}; there is no checkpoint to return to yet")
            skipped = loader.skipped
            seed_everything(self.config.seed, self.world.rank + 1)
            run.roll_back()
            loader.position.skipped = skipped
            return True
        if spoilt := resume.on_first(self.world, lambda: nonfinite.buffers_with_nan(self.task.model)):
            raise NonFinite(
                f"{found}; skipping does not repair the NaN in {', '.join(spoilt)}: set nonfinite.policy to rollback"
            )
        return False

    def accumulate(self, micro_batches: Step) -> torch.Tensor:
        """Adds the gradients of the mean loss over the global batch up; the ranks meet in the last backward pass."""
        parts = []
        if parallel.is_sharded(self.model):
            here = self.loader.position.latest
            assert here is not None, "a batch was handed out"
            micro_batches = parallel.evened(micro_batches, self.loader.schedule.most_micro_batches(here, self.world.size))
        for index, (batch, weight) in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else parallel.without_meeting(self.model):
                with self.autocast():
                    loss = self.task.loss(self.model, to_device(batch, self.world.device))
                # DDP divides by the number of ranks, as if their shares were equal; the weights know better.
                scaled = self.scaler.scale(loss * (weight * self.world.size))
                torch.autograd.backward(scaled, nonfinite.seed_of(scaled, loss))
            parts.append(loss.detach() * weight)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self.config.train.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.world.device.type, dtype)

    # --- at a step boundary ------------------------------------------------------------------------------------------

    def evaluate_if_due(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Evaluates where an interval ends with the step that was just trained, or the run does."""
        every, step = self.config.evaluation, run.global_step + 1
        epochs = (self.loader.position.trained_epoch, self.loader.epoch)
        due = step >= self.total_steps or is_due(step, epochs, every.every_steps, every.every_epochs)
        if self.task.evaluation is not None and due:
            parallel.share_buffers(self.model, self.task.model, self.world)
            run.boundary.evaluating(metrics)
            values = self.evaluate()
            run.evaluated(self.task.evaluation.metric, values, higher_is_better=self.task.evaluation.higher_is_better)
            if _waits_for_evaluations(self.scheduler):
                self.scheduler.step(values[self.task.evaluation.metric])

    def evaluate(self) -> dict[str, float]:
        """Judges the model in ``eval()`` mode and leaves it, and the random states, as they were."""
        before = random_state(self.world.device)
        modes = [(module, module.training) for module in self.task.model.modules()]
        self.task.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                return self.measure()
        finally:
            for module, mode in modes:
                module.training = mode
            restore_random_state(before, self.world.device)

    def measure(self) -> dict[str, float]:
        """The means of the evaluation's metrics over its data set, of which each rank measures a share."""
        evaluation = self.task.evaluation
        assert evaluation is not None
        size, rank, ranks = len(evaluation.dataset), self.world.rank, self.world.size  # type: ignore[arg-type]
        if size == 0:
            raise ConfigError("task: expected an evaluation data set with samples, found an empty one")
        share = range(rank * size // ranks, (rank + 1) * size // ranks)
        most = -(-size // ranks) if parallel.is_sharded(self.model) else len(share)  # of any rank
        sums: dict[str, float] = {}
        for start in range(0, most, evaluation.batch_size):
            indices = share[start : start + evaluation.batch_size]
            samples = [evaluation.dataset[index] for index in indices or [0]]  # one that counts nothing, to go along
            batch = (self.task.collate or torch.utils.data.default_collate)(samples)
            for name, value in evaluation.measure(self.task.model, to_device(batch, self.world.device)).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
        totals: dict[str, float] = {}
        for own in self.world.all_gather(sums):  # a rank without a share knows no names
            for name, value in own.items():
                totals[name] = totals.get(name, 0.0) + value
        return {name: value / size for name, value in totals.items()}


def state_of(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, scaler: torch.amp.GradScaler
) -> dict[str, Any]:
    """What a step changes of a task, and what is saved of it; ``model`` may be wrapped."""
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    return state if scheduler is None else {**state, "scheduler": scheduler}


def _waits_for_evaluations(scheduler: Any) -> TypeGuard[ReduceLROnPlateau]:
    """Whether a scheduler is stepped with what an evaluation has found, not with each step."""
    return isinstance(scheduler, ReduceLROnPlateau)


def _check_steps(config: Config, task: Task, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Raises ``ConfigError`` for an optimizer or a scheduler that the loop could not step."""
    if (closure := inspect.signature(optimizer.step).parameters.get("closure")) and closure.default is closure.empty:
        kind = type(optimizer).__name__
        raise ConfigError(
            f"task: {kind} needs a closure, which harness train does not pass; use it in a loop of your own with harness.Run"
        )
    if _waits_for_evaluations(scheduler):
        every = config.evaluation
        if task.evaluation is None or every.every_steps is every.every_epochs is None:
            raise ConfigError(
                "task: ReduceLROnPlateau needs evaluations; expected Task(evaluation=...) and an interval "
                "(evaluation.every_steps or evaluation.every_epochs), found none"
            )
    elif scheduler is not None:
        try:
            inspect.signature(scheduler.step).bind()
        except TypeError:
            kind = type(scheduler).__name__
            raise ConfigError(
                f"task: expected a scheduler with step(), found {kind}, whose step() requires arguments"
            ) from None


def _be_deterministic(wanted: bool) -> None:
    """Bit-identical results ask for kernels that add in a fixed order."""
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every new tensor costs a pass over its memory and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def build_task(config: Config, builder: Any) -> Task:
    """Calls the user's function with everything seeded, so that it gives the same on every rank and every time."""
    seed_everything(config.seed)
    task = builder(**config.args)
    if not isinstance(task, Task):
        raise ConfigError(f"task: expected {config.task} to return a harness.Task, found {type(task).__name__}")
    if not isinstance(task.optimizer, Optimizer):
        return task  # it is made when the model is where it is trained
    if config.train.parallel != "ddp":
        raise ConfigError(
            f"task: train.parallel {config.train.parallel} needs an optimizer that is made after the model is sharded; "
            "return functions: Task(optimizer=lambda model: AdamW(model.parameters()), scheduler=lambda optimizer: ...)"
        )
    optimizer, scheduler = task.optimizer_and_scheduler()
    _check_steps(config, task, optimizer, scheduler)
    return replace(task, scheduler=scheduler)  # made once: another one would scale the learning rate again
