"""``transformers.Trainer``, in the form that it has since transformers 5: ``trainer = resilient(Trainer(…), url)``.

The trainer's own loop stays. What differs is where it begins (at the position of the newest whole checkpoint), from where it
takes its batches, and that a step boundary is marked after each of the optimizer's steps. ``Trainer`` has no callback for
the first two, so ``resilient`` gives the trainer a class of its own.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from transformers.trainer_callback import ExportableState

import harness
from harness.errors import ConfigError
from harness.integrations.prepared import Prepared
from harness.integrations.pretrained import Pretrained

T = TypeVar("T")

_OVERRIDDEN = ("_init_training_state", "_prepare_for_training", "_run_epoch", "_finalize_training", "get_batch_samples")
# Of a TrainerState: what has become of the training. The rest is what the program asks for.
_HISTORY = (
    *("epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history"),
    *("best_metric", "best_global_step", "best_model_checkpoint"),
)
# Of a Trainer, on each rank: the loss since the last line of the log, and so on.
_COUNTED = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "current_flos")


def resilient(trainer: T, url: str | os.PathLike[str] | None, **options: Any) -> T:
    """Has a ``Trainer`` survive the death of its processes: ``trainer = resilient(Trainer(…), "runs/mine")``.

    ``train()`` then begins, or continues, the run at ``url``. ``options`` are those of ``harness.Run``. Returns the trainer.
    Raises ``ConfigError`` for a trainer that it cannot continue exactly.
    """
    if lacking := [name for name in _OVERRIDDEN if not hasattr(trainer, name)]:
        raise ConfigError(
            f"resilient: expected a Trainer of transformers 5, found {type(trainer).__name__} without {', '.join(lacking)}; "
            "upgrade transformers"
        )
    kind = type(trainer)
    _refuse(trainer)
    trainer.__class__ = type(kind.__name__, (_Resilient, kind), {"__module__": kind.__module__})
    trainer._harness = _Course(trainer, url, options)  # type: ignore[attr-defined]
    return trainer


def _refuse(trainer: Any) -> None:
    """Raises ``ConfigError`` for what would not be exact."""
    args = trainer.args
    found = {
        "auto_find_batch_size": args.auto_find_batch_size,
        "deepspeed": trainer.is_deepspeed_enabled,
        "fsdp": trainer.is_fsdp_enabled,
        "dataloader_persistent_workers": args.dataloader_persistent_workers,
        "use_stateful_dataloader": getattr(trainer.accelerator.dataloader_config, "use_stateful_dataloader", False),
    }
    if names := [name for name, is_set in found.items() if is_set]:
        raise ConfigError(f"resilient: cannot continue a training exactly with {', '.join(names)}; switch it off")


class _Resilient:
    """Comes before a Trainer's own class."""

    _harness: "_Course"

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        if resume_from_checkpoint:
            raise ConfigError(
                "train: the run continues from its own checkpoints; leave resume_from_checkpoint out, or load the weights "
                "before"
            )
        with self._harness.training():
            return super().train(None, *args, **options)  # type: ignore[misc]

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()  # type: ignore[misc]
        self._harness.loader = loader
        return loader

    def _init_training_state(self, max_steps: int, *args: Any, **options: Any) -> tuple[int, int]:
        super()._init_training_state(max_steps, *args, **options)  # type: ignore[misc]
        prepared = super()._prepare_for_training(max_steps, self._harness.loader, None)  # type: ignore[misc]
        return self._harness.begin(prepared, max_steps)

    def _prepare_for_training(self, *_args: Any, **_options: Any) -> Any:
        return self._harness.prepared

    def _run_epoch(self, **options: Any) -> None:
        if self._harness.begin_epoch(options):
            super()._run_epoch(**options)  # type: ignore[misc]
            self._harness.end_epoch(options["epoch"])

    def _load_rng_state(self, _checkpoint: str | None) -> None:
        """The random numbers are restored already."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches = self._harness.batches or epoch_iterator
        return super().get_batch_samples(batches, num_batches, device)  # type: ignore[misc]

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **options)  # type: ignore[misc]
        self._harness.note(loss)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        self._harness.reach_boundary()
        super()._maybe_log_save_evaluate(*args, **options)  # type: ignore[misc]

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **options: Any) -> Any:
        if skip_scheduler and self._harness.run.global_step:  # eval_on_start: it has started
            return {}
        return super()._evaluate(*args, skip_scheduler=skip_scheduler, **options)  # type: ignore[misc]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> Any:
        self._harness.evaluated(metrics)
        return super()._determine_best_metric(metrics=metrics, trial=trial)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        self._harness.finish()
        return super()._finalize_training(*args, **options)  # type: ignore[misc]


class _Course:
    """A run of ``harness``, along a trainer's loop."""

    def __init__(self, trainer: Any, url: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> None:
        self._trainer, self._url, self._options = trainer, url, options
        self.loader: Any = None  # that Accelerate has prepared for training
        self.prepared: Any = None  # the model and the loader
        self.batches: Iterator[Any] | None = None  # of the epoch that is being trained
        self._run: harness.Run | None = None
        self._steps: Iterator[int] = iter(())
        self._has_begun = False
        self._body_is_open = False  # the loop has not done with the step that it was last given
        self._is_over = False  # no step is left
        self._losses: list[torch.Tensor] = []  # of the step that is being trained

    @property
    def run(self) -> harness.Run:
        """That of this call of ``train()``."""
        assert self._run is not None, "train() is under way"
        return self._run

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The time of ``train()``."""
        try:
            yield
        except Exception as error:
            if self._run is not None:
                self._run.remember_crash(error)
            raise
        self.run.close()
        self._run = None

    def begin(self, prepared: Any, max_steps: int) -> tuple[int, int]:
        """Makes the run, which restores what it finds. Returns the epoch to be trained, and no batches to be skipped."""
        trainer = self._trainer
        self.prepared = prepared
        self._position = Prepared("train_dataloader", self.loader, trainer.args.world_size)
        self._position.on_return = self._end_body
        self._counts, self._story = _Counts(trainer), _Story(trainer)
        state = {"model": trainer.model_wrapped, "optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}
        state |= {"trainer": self._story, "counts": self._counts, "position": self._position}
        if trainer.accelerator.scaler is not None:
            state["scaler"] = trainer.accelerator.scaler
        self._run = harness.Run(self._url, state, **self._options)
        self._steps = self._run.steps(max_steps)
        self._is_over = self._has_begun = False
        self._body_is_open = True
        return self._position.epoch, 0

    def begin_epoch(self, options: dict[str, Any]) -> bool:
        """Puts the trainer's loop where the run is. Returns whether anything is left to be trained."""
        if not self._has_begun:
            self._has_begun = True
            self._counts.put_in()
            self._end_body()
            if batches := self._position.batches:  # the loop counts them, and fetches none
                options |= {"resume_from_checkpoint": "harness", "epochs_trained": options["epoch"]}
                options |= {"steps_trained_in_current_epoch": batches}
        if self._is_over or self._story.stops:
            self._trainer.control.should_training_stop = True
            return False
        self._position.set_epoch(options["epoch"])
        self.batches = iter(self._position)
        return True

    def end_epoch(self, epoch: int) -> None:
        """The loop has left an epoch, after all that it does at the end of one."""
        self.batches = None
        self._position.end_epoch()
        self._position.set_epoch(epoch + 1)
        self._end_body()

    def note(self, loss: torch.Tensor) -> None:
        """A part of the step's loss."""
        self._losses.append(loss)

    def reach_boundary(self) -> None:
        """The optimizer has taken its step, unless this is the end of an epoch."""
        if self._trainer.state.global_step > self.run.global_step:
            losses, self._losses = self._losses, []
            self.run.step(loss=torch.stack(losses).sum())
            self._body_is_open = True

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Reports an evaluation."""
        args = self._trainer.args
        best = args.metric_for_best_model or "loss"
        name = best if best.startswith("eval_") else f"eval_{best}"
        timed = ("_runtime", "_per_second", "_time")
        values = {key: each for key, each in metrics.items() if isinstance(each, int | float) and not key.endswith(timed)}
        if name in values:
            self.run.evaluated(name, values, higher_is_better=bool(args.greater_is_better))

    def finish(self) -> None:
        """The loop is over, perhaps before its end."""
        if not self._is_over:
            self._steps.close()  # type: ignore[attr-defined]
            self.run.finish()
            self._is_over = True

    def _end_body(self) -> None:
        """The loop asks for more: it has done with a step, which is when a save, or a stop, happens."""
        if self._body_is_open:
            self._body_is_open = False
            self._is_over = next(self._steps, None) is None


class _Story:
    """What a trainer and its callbacks remember, on rank 0 as on the others."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pretrained = Pretrained(trainer.model, trainer.processing_class)
        self.stops = False
        """Whether a callback has ended the training, before its end."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON, which ``Trainer`` uses for it, too."""
        trainer = self._trainer
        state = {name: getattr(trainer.state, name) for name in _HISTORY}
        callbacks = [[type(each).__name__, each.state()["attributes"]] for each in self._callbacks()]
        is_early = trainer.state.global_step < trainer.state.max_steps
        stops = self.stops or (is_early and trainer.control.should_training_stop)
        story = {"state": json.dumps(state), "callbacks": json.dumps(callbacks), "stops": stops}
        return {**story, **self._pretrained.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Callbacks that the program has no more are left out; new ones begin."""
        for name, value in json.loads(saved["state"]).items():
            setattr(self._trainer.state, name, value)
        callbacks = self._callbacks()
        for kind, attributes in json.loads(saved["callbacks"]):
            found = next((each for each in callbacks if type(each).__name__ == kind), None)
            if found is not None:
                callbacks.remove(found)
                for name, value in attributes.items():
                    setattr(found, name, value)
        self.stops = saved["stops"]

    def _callbacks(self) -> list[Any]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, ExportableState)]


class _Counts:
    """What a trainer adds up between two lines of its log, on each rank."""

    per_rank = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._restored: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Before the first step there is nothing."""
        return {name: getattr(self._trainer, name, None) for name in _COUNTED}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The trainer sets them to zero when its loop begins: they are put in after that."""
        self._restored = saved

    def put_in(self) -> None:
        """The trainer's loop has begun."""
        if not self._restored:
            return
        device = self._trainer.args.device
        for name, value in self._restored.items():
            setattr(self._trainer, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        self._trainer._initial_global_step = 0  # the mean loss of the whole run is shown at its end
        self._restored = {}
