"""The configuration: what is wrong gets one line that says where, what was expected and what was found."""

import pytest
import yaml
from pydantic import ValidationError

from harness.config import Config, RunConfig, load_config, parse_overrides
from harness.errors import ConfigError
from harness.training.run import settings_of

GOOD = """\
task: package.module:build
train:
  steps: 10
  global_batch_size: 8
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a text as the file ``run.yaml``."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> Config:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_config("run.yaml", overrides)

    return load


def refusal(load, text: str, *overrides: str) -> str:
    """The message of the error that a text gets; an error of another kind fails the test."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


# --- what is right ---------------------------------------------------------------------------------------------------


def test_a_small_configuration_is_enough(load):
    """What is not said has its default."""
    config = load(GOOD)
    assert (config.train.steps, config.train.epochs, config.train.global_batch_size) == (10, None, 8)
    assert (config.seed, config.data.workers, config.checkpoint.url, config.train.precision) == (0, 0, None, "fp32")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", ".1e-2", "10e-4"])
def test_a_number_is_a_number_however_it_is_written(load, text):
    """``1e-3`` is text to YAML 1.1, and a number to everybody else."""
    assert load(GOOD + f"args: {{lr: {text}}}\n").args == {"lr": 0.001}
    assert load(GOOD, f"args.lr={text}").args == {"lr": 0.001}


def test_what_only_looks_like_a_number_is_text(load):
    """Names with an e in them stay names."""
    assert load(GOOD + "args: {a: e3, b: 1e, c: 1e-3x, d: '1e-3'}\n").args == {
        "a": "e3",
        "b": "1e",
        "c": "1e-3x",
        "d": "1e-3",
    }


def test_a_whole_number_will_do_for_a_fraction(load):
    """A field of seconds takes ``30``."""
    assert load(GOOD, "checkpoint.url=x", "checkpoint.every_seconds=30").checkpoint.every_seconds == 30


def test_an_override_wins_over_the_file(load):
    """``dotted.key=value`` replaces a value, adds one, makes sections, and its value is YAML."""
    config = load(
        GOOD, "train.steps=20", "args.sizes=[1, 2]", "data.workers=2", "checkpoint.url=s3://bucket/a=b", "args.none="
    )
    assert config.train.steps == 20
    assert config.args == {"sizes": [1, 2], "none": None}
    assert config.data.workers == 2
    assert config.checkpoint.url == "s3://bucket/a=b"


def test_of_two_overrides_the_last_one_wins():
    """As on every command line."""
    assert parse_overrides(["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_null_takes_a_value_back(load):
    """An override can choose epochs where the file chose steps."""
    config = load(GOOD, "train.steps=null", "train.epochs=3")
    assert (config.train.steps, config.train.epochs) == (None, 3)


def test_variables_in_the_names_of_places(load, monkeypatch):
    """They come from the environment: the same file serves every user and every job. In ``args`` a dollar is a dollar."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("JOB_ID", "17")
    config = load(
        GOOD + "init_from: $SCRATCH/base.pth\nargs: {text: $SCRATCH}\n", "checkpoint.url=s3://b/${JOB_ID}-$$JOB_ID-$1$"
    )
    assert config.init_from == "/scratch/me/base.pth"
    assert config.checkpoint.url == "s3://b/17-$JOB_ID-$1$"
    assert config.args == {"text": "$SCRATCH"}
    assert load(GOOD, "metrics.tensorboard=$SCRATCH/tb", "log.jsonl=$SCRATCH/l").metrics.tensorboard == "/scratch/me/tb"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_told(load, monkeypatch, value):
    """An empty one, too: the run would lie somewhere else than anybody thinks."""
    monkeypatch.delenv("SCRATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("SCRATCH", value)
    told = refusal(load, GOOD, "checkpoint.url=${SCRATCH}/run", "init_from=$SCRATCH")
    for key in ("checkpoint.url", "init_from"):
        assert f"{key}: the environment variable SCRATCH is not set, or empty: set it, or write $$ for a $" in told


def test_a_url_in_a_program_is_taken_as_it_stands(monkeypatch):
    """As ``harness.load`` takes it."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert settings_of("runs/$SCRATCH/$$", {}, None).checkpoint.url == "runs/$SCRATCH/$$"
    assert settings_of(None, {}, {"checkpoint": {"url": "$SCRATCH"}}).checkpoint.url == "/scratch/me"


@pytest.mark.parametrize("make", [dict, RunConfig.model_validate])
def test_what_is_given_beside_a_config(make):
    """Counts, is checked like any other setting, and is refused where it is another URL."""
    config = {"checkpoint": {"url": "runs/a", "every_steps": 5, "keep_last": 2}, "stop": {"grace_seconds": 3.0}}
    found = settings_of("runs/a", {"every_steps": 7, "every_epochs": None}, make(config))
    assert (found.checkpoint.every_steps, found.checkpoint.keep_last, found.stop.grace_seconds) == (7, 2, 3.0)
    assert settings_of(None, {}, make(config)).checkpoint.url == "runs/a"
    assert settings_of("runs/$b", {}, make({"stop": {}})).checkpoint.url == "runs/$b"
    with pytest.raises(ConfigError, match=r"checkpoint\.every_steps: "):
        settings_of("runs/a", {"every_steps": 0}, make(config))
    with pytest.raises(ConfigError, match=r"expected one URL, found runs/b and checkpoint\.url runs/a in config"):
        settings_of("runs/b", {}, make(config))


def test_a_configuration_is_frozen(load):
    """Nobody changes a configuration while it runs."""
    config = load(GOOD)
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.train.steps = 1


# --- the digest ------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_what_is_trained(load):
    """Equal wherever it is saved and however it is fetched; different where the result would be."""
    digest = load(GOOD).digest()
    assert digest == "91c7c4acf081d607", "that of an earlier version, whose runs go on"
    same = ("checkpoint.url=x", "data.workers=3", "data.fingerprint=false", "log.every_steps=7", "train.parallel=fsdp")
    for override in (*same, "fsdp.wrap=[Block]"):
        assert load(GOOD, override).digest() == digest, override
    for override in (
        "seed=1",
        "args.lr=2",
        "train.steps=11",
        "train.precision=bf16",
        "train.drop_last=true",
        "fsdp.param_dtype=bf16",
        "task=o:build",
    ):
        assert load(GOOD, override).digest() != digest, override


def test_the_digest_does_not_depend_on_the_order_of_keys(load):
    """Two spellings of one run are one run."""
    assert load(GOOD + "args: {a: 1, b: 2}\n").digest() == load("args: {b: 2, a: 1}\n" + GOOD).digest()


def test_secrets_are_not_shown(load):
    """``storage_options`` can hold a key; it does not appear where a configuration is printed."""
    config = load(GOOD, "checkpoint.url=s3://b/r", "checkpoint.storage_options={secret: hunter2}")
    assert config.checkpoint.storage_options == {"secret": "hunter2"}
    assert "hunter2" not in f"{config} {config!r} {config.checkpoint}"


# --- what is wrong ---------------------------------------------------------------------------------------------------

WRONG = {
    "unknown key": ("train.stepz=3", ["train.stepz", "unknown key", "3", "train.steps"]),
    "unknown section": ("trian={}", ["trian", "unknown key", "an empty section", "train"]),
    "unknown key, far from all": ("checkpoint.zzzzz=1", ["checkpoint.zzzzz", "unknown key", "checkpoint."]),
    "wrong type": ("train.steps=many", ["train.steps", "valid integer", "'many'"]),
    "a fraction for a whole number": ("train.steps=1.5", ["train.steps", "integer", "1.5"]),
    "a number in quotes": ("train.steps='5'", ["train.steps", "valid integer", "'5'"]),
    "a switch for a number": ("seed=true", ["seed", "valid integer", "True"]),
    "a number for text": ("task=5", ["task", "valid string", "5"]),
    "nothing where something must be": ("train.global_batch_size=", ["train.global_batch_size", "integer", "nothing"]),
    "out of range": ("train.steps=0", ["train.steps", "greater than or equal to 1", "0"]),
    "negative": ("data.workers=-1", ["data.workers", "greater than or equal to 0", "-1"]),
    "not one of": ("train.precision=fp8", ["train.precision", "'fp32', 'bf16' or 'fp16'", "'fp8'"]),
    "a value for a section": ("train=3", ["train", "3"]),
    "a section for a value": ("seed={a: 1}", ["seed", "valid integer", "a section with the keys a"]),
    "empty text": ("checkpoint.url=''", ["checkpoint.url", "at least 1 character", "''"]),
    "not a number": ("train.clip_grad_norm=.nan", ["train.clip_grad_norm", "greater than 0", "nan"]),
    "both": ("train.epochs=3", ["train", "train.steps", "train.epochs", "both"]),
    "neither": ("train.steps=", ["train", "train.steps", "train.epochs", "neither"]),
    "micro above global": ("train.micro_batch_size=9", ["train", "micro_batch_size", "global_batch_size", "9 > 8"]),
    "an interval without a place": ("checkpoint.every_steps=5", ["checkpoint.url", "checkpoint.every_steps", "none"]),
    "retention without a place": ("checkpoint.keep_last=5", ["checkpoint.url", "checkpoint.keep_last", "none"]),
    "nccl on the CPU": ("world={backend: nccl, device: cpu}", ["world", "world.device cuda", "world.backend nccl", "cpu"]),
    "a path through a value": ("seed.x=1", ["seed.x=1", "seed is not a section", "0"]),
    "no equals sign": ("train.steps", ["'train.steps'", "expected dotted.key=value"]),
    "no key": ("=3", ["'=3'", "expected dotted.key=value"]),
    "a hole in the path": ("train..steps=3", ["'train..steps=3'", "expected dotted.key=value"]),
    "YAML that ends too soon": ("args.sizes=[1, 2", ["args.sizes=[1, 2", "not YAML"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_for_one_mistake(load, case):
    """The line names the path, what was expected, what was found, and the nearest known key where a key is unknown."""
    override, words = WRONG[case]
    message = refusal(load, "seed: 0\n" + GOOD, override)
    assert "\n" not in message, "one line"
    for word in words:
        assert word in message


def test_the_nearest_known_key(load):
    """Also where the slip is in the section, or the key stands in the wrong one."""
    assert "the nearest known key is checkpoint.every_steps" in refusal(load, GOOD, "checkpoint.every_step=1")
    assert "the nearest known key is train.precision" in refusal(load, GOOD, "precision=bf16")
    assert "the nearest known key is data.workers" in refusal(load, GOOD, "data.worker=2")


def test_every_mistake_gets_its_line(load):
    """All at once, each beginning with the file."""
    lines = refusal(load, GOOD, "seed=x", "data.workers=x", "nonsense=1").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("run.yaml: ") for line in lines)


def test_a_missing_value_is_named(load):
    """Without ``task`` or a batch size there is no run."""
    message = refusal(load, "train: {steps: 1}\n")
    assert "task: expected a value, found none" in message
    assert "train.global_batch_size: expected a value, found none" in message


NOT_YAML = {
    "a tab": "train:\n\tsteps: 1\n",
    "an open bracket": "train: {steps: 1\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "an unknown tag": "task: !python/name:os.system x\n",
    "an alias to nothing": "task: *nothing\n",
    "an impossible date": "seed: 2024-99-99\n",
    "an impossible number": "seed: !!int abc\n",
    "a list as a key": "? [a, b]\n: 1\n",
    "a section as a key": "? {a: b}\n: 1\n",
    "a control character": "task: a\x00b\n",
    "a digit too many": f"seed: {'9' * 5000}\n",
}


@pytest.mark.parametrize("case", NOT_YAML)
def test_a_text_that_is_no_yaml(load, case):
    """One line with the file, and with the place where there is one."""
    message = refusal(load, NOT_YAML[case])
    assert message.startswith("run.yaml")
    assert "\n" not in message


def test_a_key_that_stands_twice(load):
    """YAML readers keep one of the two in silence; which of them was meant is for the author to say."""
    message = refusal(load, GOOD + "seed: 1\nseed: 2\n")
    assert message.startswith("run.yaml:6:1: ")
    assert "duplicate key 'seed'" in message
    assert "duplicate key 'lr'" in refusal(load, GOOD + "args: {lr: 1, lr: 2}\n")


def test_merged_keys_are_not_twins(load):
    """``<<`` is how YAML overrides one section with another."""
    text = "args:\n  base: &base {lr: 1, depth: 2}\n  more: {<<: *base, lr: 3}\n"
    assert load(GOOD + text).args["more"] == {"lr": 3, "depth": 2}


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- a\n", "['a']"), ("just words\n", "'just words'")])
def test_a_file_that_holds_no_keys(load, text, found):
    """What it holds instead is said."""
    assert refusal(load, text) == f"run.yaml: expected keys and values, found {found}"


def test_a_key_that_is_no_text(load):
    """A number as a key is an unknown key, not a crash."""
    message = refusal(load, GOOD + "1: 2\n")
    assert message.startswith("run.yaml: ")
    assert "\n" not in message


def test_a_section_that_contains_itself(load):
    """YAML can say so; a configuration cannot."""
    message = refusal(load, GOOD + "args: &args {again: *args}\n")
    assert message.startswith("run.yaml")
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path):
    """Missing, a directory, not UTF-8: one line with the path."""
    with pytest.raises(ConfigError, match=r"missing\.yaml: No such file or directory"):
        load_config(str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("task: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: .*utf-8"):
        load_config(str(tmp_path / "latin.yaml"))


def test_every_key_says_what_it_means():
    """Each field has its sentence, which is where the documentation takes it from."""

    def undescribed(section, prefix=""):
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                yield from undescribed(inner, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(Config)) == []


def test_the_examples_load():
    """Every file in ``configs/`` is a good configuration, and names a task of its name."""
    from pathlib import Path

    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"gpt", "linear", "convnet"}
    for path in paths:
        assert load_config(str(path)).task == yaml.safe_load(path.read_text())["task"]
        if path.stem in ("gpt", "linear", "convnet"):
            assert load_config(str(path)).task == f"harness.tasks.{path.stem}:build"
