"""Lightning 2: ``Trainer(callbacks=[Resilient(url)])``.

The trainer's loops stay. When the training begins, the callback restores the newest whole checkpoint, sets the loops to its
position, and gives them a loader that continues there. The checkpoint has what one of Lightning has: the module, the
optimizers and schedules, the states of the callbacks and of the data module, the gradient scaler.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

import harness
from harness.errors import ConfigError
from harness.integrations import named
from harness.integrations.position import Position

try:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ImportError:  # the package of another name, with the same contents
    from pytorch_lightning import Callback, LightningModule
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

log = logging.getLogger(__name__)


class Resilient(Callback):
    """Has a Lightning training survive the death of its processes: ``Trainer(callbacks=[Resilient("runs/mine")])``.

    ``fit()`` then begins, or continues, the run at ``url``; leave ``ckpt_path`` out. ``options`` are those of
    ``harness.Run``; a step is a batch after which an optimizer has stepped. Raises ``ConfigError`` for a training that it
    cannot continue exactly.
    """

    def __init__(self, url: str | os.PathLike[str] | None, **options: Any) -> None:
        self._url, self._options = url, options
        self._run: harness.Run | None = None
        self._steps: Iterator[int] = iter(())
        self._body_is_open = False  # the loop has not done with the step that it was last given
        self._is_over = False  # no step is left
        self._trained = 0  # the trainer's count of the optimizers' steps

    @property
    def run(self) -> harness.Run:
        """That of this call of ``fit()``."""
        assert self._run is not None, "fit() is under way"
        return self._run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the run, which restores what it finds."""
        fit, loaders = trainer.fit_loop, trainer.fit_loop._combined_loader.flattened
        _refuse(trainer, loaders)
        self._loops = _Loops(trainer, self)
        self._position = _Loader("train_dataloader", loaders[0], trainer.world_size)
        self._position.on_return = self._end_body
        fit._combined_loader.flattened = [self._position]
        iter(fit._data_fetcher)  # fetches nothing: the length of the loader is known
        state: dict[str, Any] = {"module": trainer.strategy.model}
        state |= named("optimizer", trainer.optimizers)
        state |= named("scheduler", [each.scheduler for each in trainer.lr_scheduler_configs])
        state |= _models_of(trainer, self)
        state |= {"loops": self._loops, "position": self._position}
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            state["scaler"] = trainer.precision_plugin.scaler
        self._run = harness.Run(self._url, state, **self._options)
        self._steps = self._run.steps(_steps_in_all(trainer, pl_module))
        self._is_over, self._body_is_open = False, True
        self._loops.go_there()
        self._trained = trainer.global_step

    def on_train_batch_end(self, trainer: Any, _pl_module: Any, outputs: Any, *_: Any) -> None:
        """The optimizer has taken its step, if it has."""
        if trainer.global_step > self._trained:
            self._trained = trainer.global_step
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self.run.step(**({} if loss is None else {"loss": loss.detach()}))
            self._body_is_open = True

    def on_train_end(self, _trainer: Any, _pl_module: Any) -> None:
        """The loop is over, perhaps before its end."""
        self._position.end_epoch()
        self._loops.put_in()
        self._end_body()
        if not self._is_over:
            self._steps.close()  # type: ignore[attr-defined]
            self.run.finish()
        self.run.close()
        self._run = None

    def on_exception(self, _trainer: Any, _pl_module: Any, exception: BaseException) -> None:
        """An error has ended the training."""
        if self._run is not None and isinstance(exception, Exception):
            self._run.remember_crash(exception)

    def _end_body(self) -> None:
        """The loop asks for a batch: it has done with a step, which is when a save, or a stop, happens."""
        self._loops.put_in()
        if self._body_is_open:
            self._body_is_open = False
            self._is_over = next(self._steps, None) is None


def _refuse(trainer: Any, loaders: list[Any]) -> None:
    """Raises ``ConfigError`` for what would not be exact."""
    if trainer.ckpt_path:
        raise ConfigError("Resilient: the run continues from its own checkpoints; leave ckpt_path out of fit()")
    if len(loaders) != 1:
        raise ConfigError(f"Resilient: expected one loader for training, found {len(loaders)}; put their data into one")
    try:
        len(loaders[0])
    except TypeError:
        raise ConfigError(
            "Resilient: expected a training loader with a length, found a stream, of which Lightning fetches a batch ahead; "
            "give its data set a __len__"
        ) from None
    if trainer.reload_dataloaders_every_n_epochs:
        raise ConfigError("Resilient: cannot continue exactly with reload_dataloaders_every_n_epochs; leave it out")


def _models_of(trainer: Any, own: Callback) -> dict[str, nn.Module]:
    """The modules that callbacks have beside the trainer's: an average of the weights. Warns of state that is left out."""
    known = {id(trainer.lightning_module), id(trainer.strategy.model)}
    found: dict[str, nn.Module] = {}
    for index, each in enumerate(trainer.callbacks):
        kind = type(each).__name__
        held = {name: value for name, value in vars(each).items() if isinstance(value, nn.Module) and id(value) not in known}
        found |= {f"{kind}_{index}_{name.strip('_')}": value for name, value in held.items()}
        if each is not own and not held and type(each).on_save_checkpoint is not Callback.on_save_checkpoint:
            _warn_of_hook(kind, trainer)
    module = type(trainer.lightning_module)
    if module.on_save_checkpoint is not LightningModule.on_save_checkpoint:
        _warn_of_hook(module.__name__, trainer)
    return found


def _warn_of_hook(kind: str, trainer: Any) -> None:
    if trainer.is_global_zero:
        log.warning(
            "%s.on_save_checkpoint is not called: what it keeps would start over after a restart. Keep it in the "
            "state_dict() of a callback, or in a buffer of the module",
            kind,
        )


def _steps_in_all(trainer: Any, module: Any) -> int | None:
    """The steps of the whole training, where they are known."""
    if module.automatic_optimization:
        try:
            steps = trainer.estimated_stepping_batches
        except MisconfigurationException:  # a GradientAccumulationScheduler
            return None
        return int(steps) if steps not in (-1, float("inf")) else None
    if trainer.max_steps != -1 or trainer.max_epochs in (None, -1):  # such a step is one of any optimizer
        return None
    return int(trainer.max_epochs * trainer.num_training_batches)


class _Loader(Position):
    """A training loader, as Lightning's loops use one."""

    @property
    def sampler(self) -> Any:
        """Lightning tells it the epoch."""
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        """Likewise, where it has a sampler of its own."""
        return self.loader.batch_sampler

    @property
    def dataset(self) -> Any:
        """That of the loader."""
        return self.loader.dataset


class _Loops:
    """How far the loops of a trainer are, and what belongs to them."""

    def __init__(self, trainer: Any, own: Callback) -> None:
        self._trainer, self._own = trainer, own
        self._restored: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint of Lightning has it."""
        trainer = self._trainer
        fit = {key: each for key, each in trainer.fit_loop.state_dict().items() if key != "state_dict"}
        callbacks = {each.state_key: each.state_dict() for each in self._callbacks()}
        data = trainer.datamodule.state_dict() if trainer.datamodule is not None else {}
        return {"fit": fit, "callbacks": {key: each for key, each in callbacks.items() if each}, "data": data}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The loops are set when they run."""
        self._restored = saved
        for each in self._callbacks():
            if each.state_key in saved["callbacks"]:
                each.load_state_dict(saved["callbacks"][each.state_key])
        if self._trainer.datamodule is not None and saved["data"]:
            self._trainer.datamodule.load_state_dict(saved["data"])

    def go_there(self) -> None:
        """Has the outer loop begin in the middle of the epoch, or at the end, and the inner one as for a new epoch."""
        if self._restored is None:
            return
        fit = self._trainer.fit_loop
        fit.load_state_dict(self._restored["fit"])
        fit.restarting = False
        fit._restarting = True
        fit.reset()

    def put_in(self) -> None:
        """The inner loop asks for its first batch: it is where the checkpoint was made."""
        if self._restored is None:
            return
        restored, self._restored = self._restored, None
        fit = self._trainer.fit_loop
        fit.load_state_dict(restored["fit"])
        fit.restarting = False
        fit._data_fetcher.fetched = fit.epoch_loop.batch_progress.current.ready

    def _callbacks(self) -> list[Callback]:
        return [each for each in self._trainer.callbacks if each is not self._own]
