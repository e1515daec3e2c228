"""The configuration: YAML and ``dotted.key=value`` to a frozen, typed, strict tree.

Every mistake is found before a process group is made. One line reports each: the dotted path, what was expected, what was
found, and for an unknown key the nearest known one.
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
    """How long to train, with what batches, and how exactly."""

    steps: int | None = Field(default=None, ge=1)
    """Total number of optimizer steps. Set either this or ``epochs``."""
    epochs: int | None = Field(default=None, ge=1)
    """Number of passes over the data set. Set either this or ``steps``."""
    global_batch_size: int = Field(ge=1)
    """Samples for one optimizer step, over all ranks. The same at any world size."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples that a rank puts through the model at once; gradients of more are accumulated. None: a rank's whole share."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """``fp32``; ``bf16``: autocast to bf16; ``fp16``: autocast to fp16 with a gradient scaler."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """``ddp``: each rank has the whole model. ``fsdp``: each rank has a shard of it. ``hsdp``: each group of ranks has a
    replica, and each rank a shard of that."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it would be shorter. Each epoch leaves out other samples."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Clip the norm of all gradients together to this value. None: no clipping."""
    reset_options: list[str] = Field(default_factory=list)
    """Optimizer options and scheduler settings (``lr``, ``weight_decay``, ``T_max``) that a resume takes from the task, not
    from the checkpoint."""
    deterministic: bool = True
    """Use deterministic kernels if torch has them, and warn if not. Off is faster on GPUs, but a resumed run is then not
    bit-identical."""

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
        if self.parallel != "ddp" and self.precision == "fp16":
            raise PydanticCustomError(
                "relation", f"expected train.precision fp32 or bf16 beside train.parallel {self.parallel}, found fp16"
            )
        return self


class FsdpConfig(_Section):
    """How ``train.parallel: fsdp`` and ``hsdp`` shard the model."""

    wrap: list[str] = Field(default_factory=list)
    """Class names of the modules that are gathered one at a time, such as a transformer's blocks. Empty: the whole model at
    once."""
    shard_size: int | None = Field(default=None, ge=1)
    """``hsdp``: ranks that share one replica of the model. None: those of a machine."""
    param_dtype: Literal["fp32", "bf16"] | None = None
    """Dtype in which gathered parameters compute. None: their own."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Dtype in which gradients are reduced. None: that of the computation."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass, and gather them again for the backward pass."""
    offload: bool = False
    """Keep parameters and optimizer states in host memory."""


class DataConfig(_Section):
    """How samples are fetched."""

    workers: int = Field(default=0, ge=0)
    """Number of loader processes for each rank. 0 fetches in the training process. The samples are the same."""
    fingerprint: bool = True
    """Compare three samples with the checkpoint, and between the ranks. Switch it off for data that differs on purpose, or
    that takes long to fetch."""


class CheckpointConfig(_Section):
    """Where and when to save."""

    url: _Place | None = None
    """Where to save: any fsspec URL or a path. One URL is one run. None: the run is not saved."""
    must_exist: bool = False
    """Refuse a ``url`` without a checkpoint (exit code 66). This finds a mistyped URL or a disk that is not mounted."""
    every_steps: int | None = Field(default=None, ge=1)
    """Save every this many optimizer steps."""
    every_seconds: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    """Save every this many seconds, by rank 0's clock. ``auto``: the interval that loses least time, from what saves cost
    and from the run's own deaths."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Save every this many epochs. The end of the run is always saved."""
    keep_last: int | None = Field(default=None, ge=1)
    """Number of checkpoints to keep. Older ones are deleted after a commit. None: keep all."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Also keep checkpoints whose step is a multiple of this."""
    keep_best: bool = False
    """Also keep the checkpoint with the best evaluation. Each new best is saved."""
    failures_allowed: int = Field(default=3, ge=0)
    """Number of saves in a row that may fail before the run stops. The last save of a run must succeed."""
    mode: Literal["async", "sync"] = "async"
    """``async``: write beside the training, from a copy in host memory. ``sync``: training waits; no copy."""
    overlap: bool = True
    """Copy parameters and optimizer states beside the next forward and backward pass. This begins after two saves of an
    attempt have shown that only the optimizer changes them. Off: copy everything at the step boundary."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What to do if a save is due while the one before is still being written. The log reports both."""
    memory_limit_bytes: int | None = Field(default=None, ge=0)
    """Largest size of the copy. A larger state is saved while the training waits. None: no limit."""
    check_snapshots: bool = False
    """Compare every save with the state at the step boundary, and end the run if they differ. Costs one pass over the state.
    Off: the first two saves of an attempt are compared; later saves compare version counters."""
    shard_bytes: int | None = Field(default=None, ge=1 << 10)
    """Largest size of a shard. None: 1 GiB on a disk, 128 MiB on an object store."""
    writers: Literal["rank0", "node", "all"] = "rank0"
    """``rank0``: rank 0 writes everything. ``node``: the first rank of each machine writes a share. ``all``: every rank
    does. Parameters and optimizer states are divided, and must have the same bits on all ranks."""
    incremental: bool = True
    """Write frozen parameters once: later checkpoints refer to the file of an earlier one while it has the same bytes. Done
    if they are at least 64 MiB and a quarter of the state. Off: each checkpoint lies in one directory."""
    streams: int | None = Field(default=None, ge=1)
    """Number of shards sent at once. None: 1 to a disk, 8 to an object store."""
    restore: Literal["auto", "each", "shared"] = "auto"
    """``each``: every rank reads the whole checkpoint. ``shared``: each byte is read once, and the ranks pass it on.
    ``auto``: ``shared`` if the storage is remote, or the model sharded."""
    random: Literal["derived", "carried"] = "derived"
    """``derived``: at each step boundary, all global generators are seeded from their state when the run began and from the
    step. ``carried``: they run on, and nothing can be kept. A run that began without ``derived`` goes on without it."""
    keep: Literal["auto"] | _Place | None = "auto"
    """Where a rank leaves the state of the last step boundary when another one dies. ``auto``: in its machine's memory
    (``/dev/shm``), if there are several ranks or torchrun restarts them. Or a local directory. None: nowhere."""
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to the fsspec filesystem. May hold secrets; never logged or saved."""

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.url is None and "url" not in self.model_fields_set:  # one that is null on purpose switches saving off
            for key in ("every_steps", "every_seconds", "every_epochs", "keep_last"):
                if getattr(self, key) is not None:
                    raise PydanticCustomError("relation", f"expected checkpoint.url beside checkpoint.{key}, found none")
        if self.keep_last is None and (self.keep_every_steps is not None or self.keep_best):
            raise PydanticCustomError(
                "relation", "expected checkpoint.keep_last together with keep_every_steps or keep_best, found none"
            )
        return self


class EvaluationConfig(_Section):
    """When to evaluate, if the task has an evaluation. The end of the run is always evaluated."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate every this many optimizer steps."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Evaluate every this many epochs."""


class LogConfig(_Section):
    """What to log about the progress."""

    every_steps: int | None = Field(default=10, ge=1)
    """Log a line every this many optimizer steps."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Log a line every this many epochs."""
    jsonl: _Place | None = None
    """Local file to which rank 0 appends all events as JSON lines."""
    format: Literal["text", "json"] = "text"
    """``text``: lines for people, and one live line on a terminal. ``json``: each console line as JSON, with rank, host,
    attempt and step."""


class MetricsConfig(_Section):
    """Where events are kept, and which dashboards get them."""

    every_seconds: float | None = Field(default=10, gt=0)
    """Store new events beside the checkpoints every this many seconds, and with each save. In a long attempt the interval
    grows to 1 % of its age. None: keep no events, and have no report."""
    tensorboard: bool | _Place = False
    """Write curves for TensorBoard into this directory. ``true``: into ``tensorboard`` below a local checkpoint.url."""
    prometheus: _Place | None = None
    """Write the newest numbers into this file (``….prom``) for node_exporter's textfile collector."""
    wandb: dict[str, Any] | None = Field(default=None, repr=False)
    """Send curves to wandb, with these options of its ``init``, such as ``{project: mine}``."""
    mlflow: dict[str, Any] | None = Field(default=None, repr=False)
    """Send curves to MLflow. Options are ``tracking_uri``, ``experiment_name`` and ``run_name``."""


class NonFiniteConfig(_Section):
    """What to do if the loss or gradients of a step are not finite. The optimizer does not take it, unless ignored."""

    policy: Literal["stop", "skip", "rollback", "ignore"] = "stop"
    """``stop``: end with an error that names the samples. ``skip``: continue without the batch. ``rollback``: return to the
    newest checkpoint, and skip the batch from there. ``ignore``: do not check."""
    limit: int = Field(default=10, ge=1)
    """Number of batches that a run may skip. One more stops it."""


class CrashLoopConfig(_Section):
    """When a run that keeps dying is stopped."""

    same_failures: int = Field(default=3, ge=1)
    """After this many attempts in a row with the same error at the same step, try the checkpoint before, then stop."""


class WatchdogConfig(_Section):
    """When a run counts as hung. Then the stacks of all threads are written, and the process ends, to be restarted."""

    timeout_seconds: float | None = Field(default=1800, gt=0)
    """Longest time from the end of a step to the end of the next, including evaluations, saves and rollbacks.
    None: no watchdog."""
    first_step_seconds: float = Field(default=3600, gt=0)
    """The same for the first step, including everything before it."""


class StragglersConfig(_Section):
    """When to name a rank that slows the others down."""

    factor: float | None = Field(default=1.5, gt=1)
    """Report a rank whose own time (batches and forward passes) exceeds this multiple of the others' median. None: no
    check."""
    window_seconds: float = Field(default=60, gt=0)
    """Measure over at least this long. The check runs when a line is logged."""


class PreemptionConfig(_Section):
    """Whether to ask the cloud if it will take the machine away, and to stop before that."""

    watch: Literal["aws", "gcp", "azure", "none"] = "none"
    """Cloud whose metadata service is polled, by one process on each machine."""
    base_url: str = "http://169.254.169.254"
    """Address of the metadata service."""


class StopConfig(_Section):
    """How long a process has between a stop signal and its end."""

    grace_seconds: float = Field(default=25, gt=0)
    """The process ends this long after a stop signal, saved or not. Must be less than what the launcher allows
    (torchrun: 30)."""


class WorldConfig(_Section):
    """Which devices and backend to use. By default, what the machine has."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: an accelerator (CUDA) if there is one for every local rank, else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """``auto``: NCCL on CUDA, gloo on the CPU."""
    timeout_seconds: float = Field(default=600, gt=0)
    """Longest wait of a collective for another rank. Must exceed the longest save."""

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.backend == "nccl" and self.device == "cpu":
            raise PydanticCustomError("relation", "expected world.device cuda beside world.backend nccl, found cpu")
        return self


class RunConfig(_Section):
    """What keeps a training alive, with any loop."""

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
    """Function that returns a ``harness.Task``: ``package.module:function`` or ``path/to/file.py:function``."""
    init_from: _Place | None = None
    """Where a new run takes its weights from: a file or directory (see ``harness import``), or the URL of another run. A run
    with a checkpoint resumes from that instead."""
    init_optimizer: bool = False
    """Also take the optimizer's state from ``init_from``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the task as keyword arguments."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of all random numbers."""
    train: TrainConfig
    fsdp: FsdpConfig = FsdpConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    nonfinite: NonFiniteConfig = NonFiniteConfig()

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.nonfinite.policy == "rollback" and self.checkpoint.url is None:
            raise PydanticCustomError("relation", "expected checkpoint.url beside nonfinite.policy rollback, found none")
        if self.fsdp.shard_size is not None and self.train.parallel != "hsdp":
            raise PydanticCustomError(
                "relation", f"expected train.parallel hsdp beside fsdp.shard_size, found {self.train.parallel}"
            )
        return self

    def digest(self) -> str:
        """Identifies what is trained; equal digests mean equal runs, wherever they are saved."""
        trained = {"task", "init_from", "init_optimizer", "args", "seed", "train", "fsdp"}
        spread = {"train": {"reset_options", "parallel"}, "fsdp": {"wrap", "shard_size", "reshard_after_forward", "offload"}}
        what = self.model_dump(mode="json", include=trained, exclude=spread)
        if not what["train"]["drop_last"]:
            del what["train"]["drop_last"]  # which earlier versions did not have
        if not any(what["fsdp"].values()):
            del what["fsdp"]  # nor these dtypes
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
        raise ConfigError("\n".join(f"{where}{line}" for line in _describe_mistakes(error.errors()))) from None


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


# What pydantic puts behind a key that may have values of several kinds: the one that was tried.
_KIND = re.compile(r"constrained-\w+|literal\[.*\]|function-\w+\[.*\]|str|float|int|bool")


def _describe_mistakes(errors: Iterable[ErrorDetails]) -> Iterator[str]:
    """A line about each thing that is wrong. Where a value of several kinds would do, there is an error for each of them."""
    by_key: dict[tuple[Any, ...], list[ErrorDetails]] = {}
    for error in errors:
        key = error["loc"]
        by_key.setdefault(key[:-1] if len(key) > 1 and _KIND.fullmatch(str(key[-1])) else key, []).append(error)
    for key, found in by_key.items():
        path = ".".join(map(str, key))
        lines = [_describe_mistake(each, path) for each in found]
        expected = [line.partition(": expected ")[2].rpartition(", found ") for line in lines]
        if len(lines) == 1 or not all(separator for _, separator, _ in expected):
            yield from lines
        else:
            yield f"{path}: expected {' or '.join(what for what, _, _ in expected)}, found {expected[0][2]}"


def _describe_mistake(error: ErrorDetails, path: str) -> str:
    """One line about one thing that is wrong."""
    match error["type"]:
        case "relation":
            return f"{path}: {error['msg']}"
        case "extra_forbidden":
            nearest = difflib.get_close_matches(path, _known_keys(Config), n=1, cutoff=0.4)
            hint = f"; the nearest known key is {nearest[0]}" if nearest else ""
            return f"{path}: unknown key (found {_shown(error['input'], path)}){hint}"
        case "missing":
            return f"{path}: expected a value, found none"
    expected = re.sub(r"^(Input should be|\w+ should have) ", "", error["msg"])
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
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
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
