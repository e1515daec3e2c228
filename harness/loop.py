"""The training loop, in training order."""

import contextlib
import copy
import functools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import harness
from harness import crashes, data, interchange, nonfinite, resume
from harness.checkpoint.catalog import Catalog, Retention
from harness.checkpoint.saver import Saved, Saver
from harness.checkpoint.staging import HostMemory
from harness.checkpoint.store import open_store
from harness.config import Config
from harness.crashes import Crash
from harness.data import Cursor, Schedule
from harness.environment import is_first_of_node, launch_id, rank, shutdown_grace_seconds
from harness.errors import ConfigError, HarnessError, NonFinite, Stopped, StoreError
from harness.metrics import Reporter, as_json, in_words
from harness.notices import Watcher
from harness.signals import StopRequest
from harness.state import Progress, TrainingState, random_state, restore_random_state
from harness.stragglers import OwnWork, Stragglers
from harness.task import Task
from harness.watchdog import Watchdog
from harness.world import Agreement, World, has_lost_a_peer, leave_at_once

log = logging.getLogger(__name__)

Step = list[tuple[Any, float]]  # the micro-batches of a step on this rank, and the weight of each


def train(config: Config, task: Task, world: World, stop: StopRequest, *, fresh: bool = False) -> Progress:
    """Trains a task to its end, from wherever the run at ``checkpoint.url`` is.

    Every rank calls it with the same arguments. Raises ``Stopped`` when ``stop`` was set on any rank; the step that all
    ranks finished last is saved then.
    """
    cloud = config.preemption.watch if is_first_of_node() else "none"
    with _watching(config) as watchdog, Watcher(cloud, config.preemption.base_url) as watcher:
        run = _Run(config, task, world, fresh=fresh)
        try:
            with contextlib.closing(run):
                return _train(run, stop, watchdog, watcher)
        except Exception as error:
            run.remember_crash(error)
            raise


def _train(run: "_Run", stop: StopRequest, watchdog: Watchdog | None, watcher: Watcher) -> Progress:
    agreement = Agreement(run.world, wants=2)
    while not run.is_over():
        run.advance()
        if (notice := watcher.poll()) is not None and notice.kind == "stop":
            stop.ask(notice.text)
        stopping, save_is_due = agreement.exchange(bool(stop), run.seconds_are_over())
        run.log_if_due()
        run.evaluate_if_due()
        run.save_if_due(now=bool(stopping or save_is_due or run.is_new_best()), must_succeed=bool(stopping))
        if watchdog is not None:
            watchdog.step()
        if stopping and not run.is_over():
            agreement.finish()
            why = stop.reason or "on another rank"
            raise Stopped(f"asked to stop ({why}) at step {run.state.progress.step}, {run.what_is_saved()}")
    agreement.finish()
    progress = run.state.progress
    run.reporter.event("done", f"done: step {progress.step}  {in_words(progress.last)}", step=progress.step)
    return progress


@contextlib.contextmanager
def _watching(config: Config) -> Iterator[Watchdog | None]:
    """A watchdog for the time of the training, where one is wanted."""
    limits = config.watchdog
    if limits.timeout_seconds is None:
        yield None
        return
    watchdog = Watchdog(limits.timeout_seconds, limits.first_step_seconds, _report_hang(config), _leave_hung)
    try:
        yield watchdog
    finally:
        watchdog.stop()


def _report_hang(config: Config) -> Callable[[str], None]:
    """Writes the stacks beside the checkpoints, if the storage still answers."""

    def report(stacks: str) -> None:
        if config.checkpoint.url is None:
            return
        text = stacks.encode()
        name = f"hangs/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-rank-{rank()}.txt"
        try:
            store = open_store(config.checkpoint.url, config.checkpoint.storage_options, attempts=1, deadline_seconds=10)
            store.put(name, lambda: [text], len(text))
        except Exception as error:  # whatever it is, leaving comes first
            print(f"harness: could not write {name}: {error}", file=sys.stderr, flush=True)

    return report


def _leave_hung() -> None:
    time.sleep(1)  # the other ranks hang with this one and finish their reports now; the first to leave ends them all
    leave_at_once(1)


class _Run:
    """The things that the loop moves along, and each of its moves."""

    def __init__(self, config: Config, task: Task, world: World, *, fresh: bool) -> None:
        self.config, self.task, self.world = config, task, world
        _be_deterministic(config.train.deterministic)
        train = config.train
        self.schedule = Schedule(len(task.dataset), config.seed, train.global_batch_size, train.micro_batch_size)  # type: ignore[arg-type]
        self.total_steps = train.steps or (train.epochs or 0) * self.schedule.steps_per_epoch()
        task.model.to(world.device).train()
        scaler = torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16")
        self.state = TrainingState(task.model, task.optimizer, task.scheduler, scaler, world.device)
        data.seed_everything(config.seed, world.rank + 1)
        self.own_work = OwnWork(world.device)
        task.model.register_forward_pre_hook(self.own_work.begin_forward)
        self.model = world.wrap(task.model)
        self.loss = torch.zeros(())  # this rank's part of the mean loss over the last global batch; the parts add up
        self.saver: Saver | None = None  # on rank 0, where the run has a URL
        self.host_memory = HostMemory(pinned=world.device.type == "cuda")
        self.record_crash: Callable[[Crash], None] | None = None  # on every rank, where the run has a URL
        self.save_seconds: float | None = None  # what the last save took, on rank 0
        self.warned_of_slow_saves = False
        self.settle_gradient_order()
        self.open_run(fresh=fresh)
        self.begin_here()

    # --- before the first step ---------------------------------------------------------------------------------------

    def settle_gradient_order(self) -> None:
        """One forward and backward that leave nothing behind, before the state is restored.

        DDP orders its gradient buckets anew after the first backward pass. With three ranks or more the order of a bucket is
        an order of additions, so the first steps after a restart would differ in their last bits from those of the run
        that never stopped.
        """
        if self.model is self.task.model:
            return
        before = random_state(self.world.device)
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.task.model.buffers()]
        extra = copy.deepcopy(
            {name: value for name, value in self.task.model.state_dict().items() if name.endswith("_extra_state")}
        )
        micro_batches = next(self.schedule.steps(Cursor(), self.world.rank, self.world.size))[-1:]
        self.accumulate(next(self.fetch(iter([micro_batches]), workers=0)))
        self.task.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if extra:
            self.task.model.load_state_dict(extra, strict=False)
        restore_random_state(before, self.world.device)

    def open_run(self, *, fresh: bool) -> None:
        """Begins the run's next attempt, or its first."""
        checkpoint, world = self.config.checkpoint, self.world
        if checkpoint.url is None:
            self.reporter = Reporter(self.config.log, active=world.rank == 0)
            self.reporter.event("start", "no checkpoint.url: this run is not saved")
            self.initialize()
            self.check_lockstep()
            return
        self.catalog = catalog = Catalog(open_store(checkpoint.url, checkpoint.storage_options))
        if fresh:
            resume.on_first(world, lambda: resume.refuse_to_reuse(catalog, launch_id()))
        looping = resume.on_first(world, lambda: crashes.is_looping(catalog, self.config.crash_loop.same_failures))
        self.begin_attempt(catalog, pass_over_newest=looping)

    def begin_attempt(self, catalog: Catalog, *, pass_over_newest: bool = False) -> None:
        """Claims an attempt, resumes, and makes sure that all ranks hold the same."""
        checkpoint, world = self.config.checkpoint, self.world
        about = {"launch": launch_id(), "world_size": world.size, "host": platform.node(), "pid": os.getpid()}
        attempt = resume.on_first(world, lambda: catalog.claim_attempt(about))
        self.reporter = Reporter(self.config.log, active=world.rank == 0, attempt=attempt.id)
        self.record_crash = functools.partial(crashes.record, catalog, attempt)
        how = checkpoint.restore
        resumed = resume.resume(world, catalog, self.state, self.identity(), how=how, pass_over_newest=pass_over_newest)
        if resumed is None:
            self.initialize()
        else:
            self.state.progress.passed_over = resumed.passed_over
        self.check_lockstep()
        if world.rank == 0:
            self.saver = Saver(
                catalog=catalog,
                attempt=attempt,
                lineage=resumed.lineage if resumed else [],
                retention=Retention(checkpoint.keep_last, checkpoint.keep_every_steps),
                shard_bytes=checkpoint.shard_bytes or catalog.store.shard_bytes,
                streams=checkpoint.streams or catalog.store.streams,
                failures_allowed=checkpoint.failures_allowed,
                memory=self.host_memory,
                memory_limit_bytes=checkpoint.memory_limit_bytes,
            )
        step = self.state.progress.step
        where = f"resuming from {resumed.directory}" if resumed else f"starting in {catalog.store.url}"
        what = f"{world.size} x {world.device.type} ({world.backend}), step {step} of {self.total_steps}"
        self.reporter.event(
            "resume" if resumed else "start",
            f"attempt {attempt.number}: {where}, {what}",
            step=step,
            directory=resumed.directory if resumed else None,
            world_size=world.size,
        )
        if world.rank == 0 and resumed is not None:
            self.save_seconds = resumed.save_seconds
            self.warn_if_saves_are_slow()

    def begin_here(self) -> None:
        """Has batches come, and the clocks run, from where the state is."""
        config = self.config.stragglers
        hosts = self.world.all_gather(platform.node())
        self.stragglers = (
            Stragglers(hosts, config.factor, config.window_seconds) if config.factor and len(hosts) > 1 else None
        )
        self.parameters = list(self.task.model.parameters())  # walking through the modules takes longer than many a step
        self.batches = self.fetch(self.plan(), workers=self.config.data.workers)
        self.last_saved_time = self.last_logged_time = time.monotonic()
        self.last_logged_step = self.state.progress.step

    def close(self) -> None:
        """Ends the loader's workers, and a save that is under way: one that can be finished soon is worth it."""
        self.batches.close()
        if self.saver is not None:
            self.tell_of(self.saver.give_up_after(self.config.stop.grace_seconds))

    def check_lockstep(self) -> None:
        """Makes sure that all ranks hold the same state, and mean to train the same."""
        resume.check_lockstep(self.world, self.state, {**self.identity(), "config": self.config.digest()})

    def initialize(self) -> None:
        """Gives a new run the weights that ``init_from`` names."""
        if self.config.init_from is not None:
            foreign = interchange.read_foreign(self.config.init_from)
            optimizer = self.task.optimizer if self.config.init_optimizer else None
            loaded = interchange.load_into(self.task.model, optimizer, foreign)
            self.reporter.event("init", f"initialized from {foreign.source} ({foreign.what}): {loaded}")

    def remember_crash(self, error: Exception) -> None:
        """Leaves a record of an error in the training code, or in a sample, for the attempts to come."""
        if isinstance(error, HarnessError) or has_lost_a_peer(error) or self.record_crash is None:
            return
        progress, world = self.state.progress, self.world
        share = next(self.schedule.steps(progress.cursor, world.rank, world.size))
        samples = [index for micro_batch in share for index in micro_batch.indices]
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        with contextlib.suppress(StoreError):  # the error that is under way matters more
            self.record_crash(Crash(progress.step + 1, what, world.rank, samples))

    def identity(self) -> dict[str, Any]:
        """What must not change between the attempts of a run, or the position in the data would mean something else."""
        return {"seed": self.config.seed, "samples": self.schedule.samples}

    # --- a step ------------------------------------------------------------------------------------------------------

    def plan(self) -> Iterator[list[data.MicroBatch]]:
        """What this rank trains, from where the run is, without end; batches that are passed over are not even fetched."""
        cursor = self.state.progress.cursor
        for share in self.schedule.steps(cursor, self.world.rank, self.world.size):
            if cursor not in self.state.progress.passed_over:
                yield share
            cursor = self.schedule.after(cursor)

    def fetch(self, plan: Iterator[list[data.MicroBatch]], *, workers: int) -> Generator[Step]:
        return data.batches(
            self.task.dataset,
            plan,
            seed=self.config.seed,
            workers=workers,
            collate=self.task.collate,
            pin_memory=self.world.device.type == "cuda",
        )

    def advance(self) -> None:
        """Trains the next batch, or passes over it."""
        while self.state.progress.cursor not in self.state.progress.passed_over and not self.step(
            self.own_work.fetch(self.batches)
        ):
            self.pass_over()
        if self.task.scheduler is not None:
            self.task.scheduler.step()
        progress = self.state.progress
        progress.step += 1
        progress.cursor = self.schedule.after(progress.cursor)

    def step(self, micro_batches: Step) -> bool:
        """One optimizer step; False where it was not taken, because the loss or the gradients are not finite."""
        optimizer, scaler, parameters = self.task.optimizer, self.state.scaler, self.parameters
        self.loss = self.accumulate(micro_batches)
        limit, looks = self.config.train.clip_grad_norm, self.config.nonfinite.policy != "ignore"
        bad = False
        if limit is not None or looks:
            scaler.unscale_(optimizer)  # the limit is meant for the gradients, not for the scaled ones
            norm = nonfinite.gradient_norm(parameters) if limit is None else nn.utils.clip_grad_norm_(parameters, limit)
            bad = looks and nonfinite.is_bad(self.world, norm, self.loss, has_scaler=scaler.is_enabled())
        if bad:
            scaler.update(scaler.get_scale())  # the scale is not to blame, and stays
        else:
            if self.saver is not None:
                self.saver.fence()
            scaler.step(optimizer)
            scaler.update()
        for parameter in parameters:  # all of them: the optimizer may not own each, and none may pile up
            parameter.grad = None
        return not bad

    def pass_over(self) -> None:
        """Notes that the batch that was just found bad is not to be trained; goes back to a checkpoint where that is wanted.

        Raises ``NonFinite`` where the configuration, or what has become of the model, does not allow it.
        """
        progress, config = self.state.progress, self.config.nonfinite
        what, samples = nonfinite.what_is_bad(self.world, self.loss, self.schedule, progress.cursor)
        found = f"step {progress.step + 1}: {what}"
        if config.policy == "stop":
            raise NonFinite(f"{found}; mend the data or the training, or choose nonfinite.policy skip or rollback")
        if len(progress.passed_over) >= config.limit:
            raise NonFinite(f"{found}; {config.limit} batches were passed over before this one (nonfinite.limit)")
        self.reporter.event(
            "nonfinite", f"{found}: {config.policy}", step=progress.step + 1, samples=samples, policy=config.policy
        )
        passed_over = [*progress.passed_over, progress.cursor]
        if config.policy == "rollback":
            self.roll_back(found)
        elif spoilt := resume.on_first(self.world, lambda: nonfinite.buffers_with_nan(self.task.model)):
            raise NonFinite(f"{found}; skip does not mend the NaN in {', '.join(spoilt)}: choose nonfinite.policy rollback")
        self.state.progress.passed_over = passed_over

    def roll_back(self, found: str) -> None:
        """Returns all ranks to the newest checkpoint. What follows is an attempt of its own, as after a restart."""

        def check() -> None:
            assert self.saver is not None
            self.tell_of(self.saver.wait())
            self.saver.step_aside()
            if not any(entry.state == "whole" for entry in self.catalog.candidates()):
                raise NonFinite(f"{found}; there is no checkpoint yet to go back to")

        resume.on_first(self.world, check)
        self.batches.close()
        data.seed_everything(self.config.seed, self.world.rank + 1)
        self.begin_attempt(self.catalog)
        self.begin_here()

    def accumulate(self, micro_batches: Step) -> torch.Tensor:
        """Adds the gradients of the mean loss over the global batch up; the ranks meet in the last backward pass."""
        parts = []
        for index, (batch, weight) in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.without_meeting():
                with self.autocast():
                    loss = self.task.loss(self.model, data.to_device(batch, self.world.device))
                self.own_work.end_forward()
                # DDP divides by the number of ranks, as if their shares were equal; the weights know better.
                scaled = self.state.scaler.scale(loss * (weight * self.world.size))
                torch.autograd.backward(scaled, nonfinite.seed_of(scaled, loss))
            parts.append(loss.detach() * weight)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def without_meeting(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self.config.train.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.world.device.type, dtype)

    # --- at a step boundary ------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        return self.state.progress.step >= self.total_steps

    def is_due(self, every_steps: int | None, every_epochs: int | None) -> bool:
        """Whether an interval ends with the step that was just finished; the last step of the run ends all."""
        progress = self.state.progress
        if self.is_over() or (every_steps is not None and progress.step % every_steps == 0):
            return True
        return every_epochs is not None and progress.cursor.offset == 0 and progress.cursor.epoch % every_epochs == 0

    def log_if_due(self) -> None:
        progress, every = self.state.progress, self.config.log
        if not self.is_due(every.every_steps, every.every_epochs):
            return
        self.note_loss()
        now = time.monotonic()
        steps = progress.step - self.last_logged_step
        seconds = (now - self.last_logged_time) / max(steps, 1)
        self.last_logged_time, self.last_logged_step = now, progress.step
        rate = {"lr": self.task.optimizer.param_groups[0]["lr"], "samples/s": self.config.train.global_batch_size / seconds}
        values = {"loss": progress.last["loss"], **{key: float(value) for key, value in rate.items()}}
        place = f"step {progress.step}/{self.total_steps}  epoch {progress.cursor.epoch}"
        self.reporter.event("train", f"{place}  {in_words(values)}", step=progress.step, **values)
        self.name_stragglers()

    def name_stragglers(self) -> None:
        if self.stragglers is not None:
            step = self.state.progress.step
            for found in self.stragglers.look(step, self.world.all_gather(self.own_work.seconds())):
                self.reporter.event("straggler", str(found), step=step, **asdict(found))

    def note_loss(self) -> None:
        self.state.progress.last["loss"] = self.world.sum([float(self.loss)])[0]

    def evaluate_if_due(self) -> None:
        every = self.config.evaluation
        if self.task.evaluation is not None and self.is_due(every.every_steps, every.every_epochs):
            self.evaluate()

    def evaluate(self) -> None:
        """Judges the model in ``eval()`` mode and leaves it, and the random states, as they were."""
        evaluation, progress = self.task.evaluation, self.state.progress
        assert evaluation is not None
        before = random_state(self.world.device)
        modes = [(module, module.training) for module in self.task.model.modules()]
        # DDP overwrites the buffers of the other ranks with rank 0's before the next step. Judge with those.
        self.world.broadcast_tensors([buffer for buffer in self.task.model.buffers() if buffer.numel()])
        self.task.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                values = self.measure()
        finally:
            for module, mode in modes:
                module.training = mode
            restore_random_state(before, self.world.device)
        if evaluation.metric not in values:
            raise ConfigError(f"task: evaluation.metric is {evaluation.metric!r}, measured were {', '.join(values)}")
        progress.last |= values
        value, best = values[evaluation.metric], progress.best.get(evaluation.metric)
        if best is None or (value > best if evaluation.higher_is_better else value < best):
            progress.best = {**values, "step": progress.step}
        message = f"step {progress.step}/{self.total_steps}  evaluation  {in_words(values)}"
        self.reporter.event("evaluate", message, step=progress.step, **values)

    def measure(self) -> dict[str, float]:
        """The means of the evaluation's metrics over its data set, of which each rank measures a share."""
        evaluation = self.task.evaluation
        assert evaluation is not None
        size, rank, ranks = len(evaluation.dataset), self.world.rank, self.world.size  # type: ignore[arg-type]
        if size == 0:
            raise ConfigError("task: expected an evaluation data set with samples, found an empty one")
        share = range(rank * size // ranks, (rank + 1) * size // ranks)
        sums: dict[str, float] = {}
        for start in range(0, len(share), evaluation.batch_size):
            indices = share[start : start + evaluation.batch_size]
            samples = [evaluation.dataset[index] for index in indices]
            batch = (self.task.collate or torch.utils.data.default_collate)(samples)
            for name, value in evaluation.measure(self.task.model, data.to_device(batch, self.world.device)).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
        totals: dict[str, float] = {}
        for own in self.world.all_gather(sums):  # a rank without a share knows no names
            for name, value in own.items():
                totals[name] = totals.get(name, 0.0) + value
        return {name: value / size for name, value in totals.items()}

    def seconds_are_over(self) -> bool:
        """Whether ``checkpoint.every_seconds`` have passed, by rank 0's clock."""
        every = self.config.checkpoint.every_seconds
        return every is not None and self.world.rank == 0 and time.monotonic() - self.last_saved_time >= every

    def is_new_best(self) -> bool:
        """Whether this step's evaluation is the best so far, and such a checkpoint is to be kept."""
        return self.config.checkpoint.keep_best and self.state.progress.best.get("step") == self.state.progress.step

    def save_if_due(self, *, now: bool, must_succeed: bool) -> None:
        """Saves the state as it is at this step boundary. All ranks call it; rank 0 writes."""
        checkpoint = self.config.checkpoint
        if self.saver is not None:
            self.tell_of(self.saver.poll())
        if checkpoint.url is None or not (now or self.is_due(checkpoint.every_steps, checkpoint.every_epochs)):
            return
        self.note_loss()
        states = self.world.gather(random_state(self.world.device))
        self.last_saved_time = time.monotonic()
        if must_succeed or self.is_over():  # no rank goes on before it is done, nor without knowing what has become of it
            resume.on_first(self.world, lambda: self.save(states, must_succeed=True))
        else:
            self.save(states, must_succeed=False)

    def save(self, states: list[Any] | None, *, must_succeed: bool) -> None:
        """Saves beside the training, or, when this is to be the last thing to happen, before it goes on. Rank 0 alone has
        anything to do, and the ranks' random states."""
        if self.saver is None or states is None:
            return
        checkpoint, progress = self.config.checkpoint, self.state.progress
        if self.saver.is_busy and checkpoint.when_busy == "skip" and not must_succeed:
            message = f"step {progress.step}/{self.total_steps}  NOT saved: the save before is still being written"
            self.reporter.event("skip", message, step=progress.step)
            return
        self.tell_of(self.saver.wait())
        parts = {**self.state.capture(), "random": {str(rank): state for rank, state in enumerate(states)}}
        best = int(progress.best["step"]) if checkpoint.keep_best and progress.best else None
        about: dict[str, Any] = {"step": progress.step, "meta": self.meta(), "best_step": best}
        if must_succeed or checkpoint.mode == "sync":
            self.tell_of(self.saver.save(parts, **about, must_succeed=must_succeed))
            return
        if checkpoint.overlap:
            about["is_steady"] = self.state.is_steady()
        self.saver.begin(parts, **about, check=checkpoint.check_snapshots)

    def tell_of(self, saved: Saved | None) -> None:
        """Logs a save that has been committed."""
        if saved is None:
            return
        times = f"in {saved.seconds:.2f} s, of which training waited {saved.blocked_seconds:.3f} s"
        message = f"step {saved.step}/{self.total_steps}  saved {saved.directory} {times}"
        self.reporter.event("save", message, **asdict(saved))
        self.save_seconds = saved.seconds
        self.warn_if_saves_are_slow()

    def warn_if_saves_are_slow(self) -> None:
        """Says once, while there is time to act, that a save would not fit between a stop signal and the end."""
        grace_seconds = min(self.config.stop.grace_seconds, shutdown_grace_seconds())
        if self.save_seconds is not None and self.save_seconds > grace_seconds and not self.warned_of_slow_saves:
            self.warned_of_slow_saves = True
            log.warning(
                "the last save took %.2f s, and a stop has %g s: it would end before it is saved; raise stop.grace_seconds "
                "(%g) and what the launcher grants (torchrun: --shutdown-timeout)",
                self.save_seconds,
                grace_seconds,
                self.config.stop.grace_seconds,
            )

    def what_is_saved(self) -> str:
        return "which is saved" if self.config.checkpoint.url else "and nothing is saved: there is no checkpoint.url"

    def meta(self) -> dict[str, Any]:
        """What the manifest says beside the state."""
        progress = self.state.progress
        return {
            "epoch": progress.cursor.epoch,
            "cursor": asdict(progress.cursor),
            "passed_over": [asdict(cursor) for cursor in progress.passed_over],
            "metrics": {"last": as_json(progress.last), "best": as_json(progress.best)},
            **self.identity(),
            **resume.conditions(self.world),
            "config": self.config.digest(),
            "save_seconds": self.save_seconds,  # the save before this one; None at the first
            "python": platform.python_version(),
            "harness": harness.__version__,
        }


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
    data.seed_everything(config.seed)
    task = builder(**config.args)
    if not isinstance(task, Task):
        raise ConfigError(f"task: expected {config.task} to return a harness.Task, found {type(task).__name__}")
    return task
