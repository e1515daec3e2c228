"""The configuration: YAML and ``dotted.key=value`` to a frozen, typed, strict tree.

Everything that is wrong with it is found before a process group is made, and told in one line each: the dotted path, what
was expected, what was found, and the nearest known key where a key is unknown.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from harness.errors import ConfigError
from harness.secrecy import is_secret_name, without_secrets

C = TypeVar("C", bound=BaseModel)


def _expanded(text: Any) -> Any:
    """With ``$NAME`` and ``${NAME}`` replaced by the environment's values, ``$$`` by a ``$``. A path, or a URL."""

    def value(found: re.Match[str]) -> str:
        name = found["name"] or found["braced"]
        if name is None:
            return "$"
        if not os.environ.get(name):
            raise PydanticCustomError(
                "relation",
                "the environment variable {name} is not set, or empty: set it, or write $$ for a $",
                {"name": name},
            )
        return os.environ[name]

    return _VARIABLE.sub(value, text) if isinstance(text, str) else text


_VARIABLE = re.compile(r"\$(?:\$|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})")
_Place = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]  # of files, as a path or URL


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Without the secrets of URLs; options that may be secret have no ``repr``."""
        for name, value in super().__repr_args__():
            yield name, without_secrets(value) if isinstance(value, str) else value


class TrainConfig(_Section):
    """How long, in what portions, and how exactly to train."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all. Either this or ``epochs``."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data set. Either this or ``steps``."""
    global_batch_size: int = Field(ge=1)
    """Samples behind one optimizer step, over all ranks. The same at any world size."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples that a rank puts through the model at once; more are accumulated. None: a rank's whole share."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or autocast to bf16, or autocast to fp16 with a gradient scaler."""
    drop_last: bool = False
    """Leave the last batch of an epoch out where it would be shorter; each epoch leaves out other samples."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """The largest norm of all gradients together. None: no clipping."""
    reset_options: list[str] = Field(default_factory=list)
    """Options of the optimizer and settings of the scheduler (``lr``, ``weight_decay``, ``T_max``) of which the task's
    values count at a resume."""
    deterministic: bool = True
    """Choose deterministic kernels where torch has them and warn where it has not; off is faster on GPUs, and then a
    resumed run is not bit-identical."""

    @model_validator(mode="after")
    def _related(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise PydanticCustomError("relation", f"expected one of train.steps and train.epochs, found {found}")
        if self.micro_batch_size is not None and self.micro_batch_size > self.global_batch_size:
            sizes = f"{self.micro_batch_size} > {self.global_batch_size}"
            raise PydanticCustomError(
                "relation", f"expected micro_batch_size to be at most global_batch_size, found {sizes}"
            )
        return self


class DataConfig(_Section):
    """How the samples are fetched."""

    workers: int = Field(default=0, ge=0)
    """Loader processes for each rank; 0 fetches in the training process. The samples are the same."""
    fingerprint: bool = True
    """Compare what three samples look like with the checkpoint, and between the ranks. Off: for data that is another on
    purpose, or takes long to fetch."""


class CheckpointConfig(_Section):
    """Where and when to save."""

    url: _Place | None = None
    """Any fsspec URL or a path; one URL is one run. None: the run is not saved."""
    must_exist: bool = False
    """Refuse a ``url`` without a checkpoint (exit code 66): a mistyped one, or a disk that is not mounted, is no new run."""
    every_steps: int | None = Field(default=None, ge=1)
    """Save after so many optimizer steps."""
    every_seconds: float | None = Field(default=None, gt=0)
    """Save after so many seconds, by rank 0's clock."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Save after so many epochs. Whatever the intervals, the end of the run is saved."""
    keep_last: int | None = Field(default=None, ge=1)
    """How many checkpoints to keep; older ones are deleted after a commit. None: all."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Besides the last ones, keep those whose step is a multiple of this."""
    keep_best: bool = False
    """Besides the last ones, keep the one with the best evaluation; each new best is saved."""
    failures_allowed: int = Field(default=3, ge=0)
    """How many saves in a row may fail before the run stops. The last save of a run may not."""
    mode: Literal["async", "sync"] = "async"
    """``async``: beside the training, from a copy in the host's memory; ``sync``: while the training waits, without one."""
    overlap: bool = True
    """Copy what only the optimizer's step changes beside the next forward and backward pass, once the first two saves of an
    attempt have shown that nothing else changes it. Off: copy all at the step boundary."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a save does that is due while the one before is still being written; either way the log says so."""
    memory_limit_bytes: int | None = Field(default=None, ge=0)
    """How large the copy may be; a larger state is saved while the training waits. None: as large as the state."""
    check_snapshots: bool = False
    """Compare every save with the state at the step boundary, at the cost of a pass over it, and end the run where they
    differ. Without it the first two saves of an attempt are compared, and the later ones by version counters."""
    shard_bytes: int | None = Field(default=None, ge=1 << 10)
    """The largest size of a shard. None: 1 GiB on a disk, 128 MiB on an object store."""
    writers: Literal["rank0", "node", "all"] = "rank0"
    """Who writes: rank 0 alone, or each its share: the first rank of each machine (``node``), or every rank (``all``). What
    only the optimizer changes is divided, large tensors too, and must have the same bits on all ranks."""
    streams: int | None = Field(default=None, ge=1)
    """So many shards are sent at once. None: 1 to a disk, 8 to an object store."""
    restore: Literal["auto", "each", "shared"] = "auto"
    """``each``: every rank reads the whole checkpoint; ``shared``: each byte is read once, and handed on between the ranks;
    ``auto``: shared where the storage is remote."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to the fsspec filesystem. May hold secrets; it is never logged or saved."""

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.url is None and "url" not in self.model_fields_set:  # one that is null on purpose switches saving off
            for key in ("every_steps", "every_seconds", "every_epochs", "keep_last"):
                if getattr(self, key) is not None:
                    raise PydanticCustomError("relation", f"expected checkpoint.url beside checkpoint.{key}, found none")
        if self.keep_last is None and (self.keep_every_steps is not None or self.keep_best):
            raise PydanticCustomError("relation", "expected checkpoint.keep_last beside what else is to be kept, found none")
        return self


class EvaluationConfig(_Section):
    """When to evaluate, where the task has an evaluation. The end of the run is always evaluated."""

    every_steps: int | None = Field(default=None, ge=1)
    """After so many optimizer steps."""
    every_epochs: int | None = Field(default=None, ge=1)
    """After so many epochs."""


class LogConfig(_Section):
    """What is told of the progress."""

    every_steps: int | None = Field(default=10, ge=1)
    """A line after so many optimizer steps."""
    every_epochs: int | None = Field(default=None, ge=1)
    """A line after so many epochs."""
    jsonl: _Place | None = None
    """A local file to which rank 0 appends the same records as JSON lines."""
    format: Literal["text", "json"] = "text"
    """``text``: lines for people, and on a terminal one live line; ``json``: each line of the console as JSON, with rank,
    host, attempt and step."""


class MetricsConfig(_Section):
    """Where what is told of the progress is kept, and who else gets it."""

    every_seconds: float | None = Field(default=10, gt=0)
    """Put what was told beside the checkpoints after so many seconds (in a long attempt, after 1 % of its age), and with
    each save. None: keep nothing there, and have no report."""
    tensorboard: bool | _Place = False
    """Write curves for TensorBoard into this directory, or (``true``) into ``tensorboard`` below a local checkpoint.url."""
    prometheus: _Place | None = None
    """Write the newest numbers into this file (``….prom``), for node_exporter's textfile collector."""


class NonFiniteConfig(_Section):
    """What to do about a step whose loss or gradients are not finite. The optimizer does not take it, unless ignored."""

    policy: Literal["stop", "skip", "rollback", "ignore"] = "stop"
    """``stop``: with an error that names the samples; ``skip``: train on without the batch; ``rollback``: go back to the
    newest checkpoint and pass over the batch from there; ``ignore``: do not look."""
    limit: int = Field(default=10, ge=1)
    """So many batches of a run may be passed over; one more stops it."""


class CrashLoopConfig(_Section):
    """When a run that dies is not simply started again."""

    same_failures: int = Field(default=3, ge=1)
    """So many attempts in a row with the same error at the same step: try the checkpoint before, then stop."""


class WatchdogConfig(_Section):
    """When a run counts as hung; then the stacks of all threads are written and the process ends, to be started again."""

    timeout_seconds: float | None = Field(default=1800, gt=0)
    """The longest time from the end of a step to the end of the next, evaluations, saves and rollbacks included.
    None: no watchdog."""
    first_step_seconds: float = Field(default=3600, gt=0)
    """The same for the first step, with everything that comes before it."""


class StragglersConfig(_Section):
    """When a rank that holds the others up is named."""

    factor: float | None = Field(default=1.5, gt=1)
    """Its own work (batches and forward passes) takes so many times the others' median. None: nobody looks."""
    window_seconds: float = Field(default=60, gt=0)
    """Over at least so long; it is looked at when a line is logged."""


class PreemptionConfig(_Section):
    """Whether to ask the cloud if it is about to take the machine away, and stop well before it does."""

    watch: Literal["aws", "gcp", "azure", "none"] = "none"
    """Whose metadata service to ask; one process of each machine does."""
    base_url: str = "http://169.254.169.254"
    """Where the metadata service is."""


class StopConfig(_Section):
    """What happens between a signal and the end."""

    grace_seconds: float = Field(default=25, gt=0)
    """The process is gone so long after a stop signal, saved or not; less than what the launcher grants (torchrun: 30)."""


class WorldConfig(_Section):
    """What to run on; by default what the machine has."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is a device for every local rank, else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """``auto``: NCCL on CUDA, gloo on the CPU."""
    timeout_seconds: float = Field(default=600, gt=0)
    """How long a collective may wait for another rank; must exceed the longest save."""

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.backend == "nccl" and self.device == "cpu":
            raise PydanticCustomError("relation", "expected world.device cuda beside world.backend nccl, found cpu")
        return self


class RunConfig(_Section):
    """What keeps a training alive, whoever has written its loop."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()
    world: WorldConfig = WorldConfig()
    crash_loop: CrashLoopConfig = CrashLoopConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    stragglers: StragglersConfig = StragglersConfig()
    preemption: PreemptionConfig = PreemptionConfig()
    stop: StopConfig = StopConfig()


class Config(RunConfig):
    """A run of ``harness train``."""

    task: str = Field(min_length=1)
    """``package.module:function`` or ``path/to/file.py:function``: returns a ``harness.Task``."""
    init_from: _Place | None = None
    """Where a new run takes its weights from: a file or directory of others (see ``harness import``), or the URL of another
    run. A run that has a checkpoint goes on from that instead."""
    init_optimizer: bool = False
    """Take the optimizer's state from there, too."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the task as keyword arguments."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Everything random derives from it."""
    train: TrainConfig
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    nonfinite: NonFiniteConfig = NonFiniteConfig()

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.nonfinite.policy == "rollback" and self.checkpoint.url is None:
            raise PydanticCustomError("relation", "expected checkpoint.url beside nonfinite.policy rollback, found none")
        return self

    def digest(self) -> str:
        """Identifies what is trained; equal digests mean equal runs, wherever they are saved."""
        included = {"task", "init_from", "init_optimizer", "args", "seed", "train"}
        what = self.model_dump(mode="json", include=included, exclude={"train": {"reset_options"}})
        if not what["train"]["drop_last"]:
            del what["train"]["drop_last"]  # which earlier versions did not have
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and puts ``dotted.key=value`` over it (values are YAML, too). Raises ``ConfigError``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    value = _parse(text, path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys and values, found {_shown(value, '')}")
    parse_overrides(overrides, value)
    return _validated(Config, value, f"{path}: ")


def run_config(sections: Mapping[str, Any]) -> RunConfig:
    """The sections of a configuration that a run in a program's own loop has. Raises ``ConfigError``."""
    return _validated(RunConfig, sections, "config: ")


def _validated(model: type[C], value: Any, where: str) -> C:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}{line}" for line in map(_describe_mistake, error.errors()))) from None


def parse_overrides(
    overrides: Iterable[str], value: dict[str, Any] | None = None, *, may_be_secret: bool = False
) -> dict[str, Any]:
    """Puts each ``dotted.key=value`` into a mapping (a new one by default), and returns it. Raises ``ConfigError``, which
    repeats none that ``may_be_secret``."""
    value = {} if value is None else value
    for override in overrides:
        key = re.match(r"[\w.-]*", override)
        assert key is not None, "it may be empty"
        is_shown = not may_be_secret and not _may_be_secret(key[0])
        _override(value, override, override if is_shown or key[0] == override else f"{key[0]}…")
    return value


def _override(value: dict[str, Any], override: str, shown: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{shown!r}: expected dotted.key=value")
    for index, key in enumerate(keys[:-1]):
        value = value.setdefault(key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{shown!r}: {'.'.join(keys[: index + 1])} is not a section, it is {_shown(value, dotted)}")
    value[keys[-1]] = _parse(text, shown)


def _may_be_secret(path: str) -> bool:
    return "storage_option" in path or is_secret_name(path)


def _describe_mistake(error: ErrorDetails) -> str:
    """One line about one thing that is wrong."""
    path = ".".join(str(key) for key in error["loc"])
    match error["type"]:
        case "relation":
            return f"{path}: {error['msg']}"
        case "extra_forbidden":
            nearest = difflib.get_close_matches(path, _known_keys(Config), n=1, cutoff=0.4)
            hint = f"; the nearest known key is {nearest[0]}" if nearest else ""
            return f"{path}: unknown key (found {_shown(error['input'], path)}){hint}"
        case "missing":
            return f"{path}: expected a value, found none"
    expected = error["msg"].removeprefix("Input should be ")
    return f"{path}: expected {expected}, found {_shown(error['input'], path)}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _shown(value: Any, path: str) -> str:
    if isinstance(value, Mapping):
        return f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    if value is None:
        return "nothing"
    if _may_be_secret(path):
        return f"{type(value).__name__} (not shown: it may be secret)"
    return f"{without_secrets(repr(value)):.80}"


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-3`` is a number (as in YAML 1.2), and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (key.tag, key.value) in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> Any:
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
        json.dumps(value, default=str)  # notices what contains itself
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # PyYAML lets Python's own errors through
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        what = re.sub(r"(alias|tag|constructor for the tag|directive) '.+'", r"\1", what)  # it may be a password: *abc, !abc
        raise ConfigError(f"{where}{place}: not YAML: {what}") from None
    return value
