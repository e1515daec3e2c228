"""The command line as people use it: one line for a mistake, an exit code for a script, nothing imported in vain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from harness import Task, save
from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Ancestor, Attempt, new_directory
from harness.storage.store import open_store
from tests.support.cluster import environment, harness, launch, read_json, train_here

TRAIN = {"steps": 4, "global_batch_size": 4}


def build(samples: int = 10, width: int = 3, lr: float = 0.1) -> Task:
    model = nn.Sequential(nn.Linear(1, width), nn.Linear(width, 1))
    dataset = TensorDataset(torch.linspace(-1, 1, samples).unsqueeze(1))
    return Task(
        model,
        dataset,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        lambda model, batch: model(batch[0]).square().mean(),
    )


def broken() -> Task:
    raise RuntimeError("a mistake in the recipe")


def nothing() -> None:
    """Forgets to return its task."""


@pytest.fixture
def write(tmp_path):
    """Writes a configuration and returns its path; keyword arguments replace its sections."""

    def write(**sections) -> str:
        config = {"task": f"{__file__}:build", "train": TRAIN, "checkpoint": {"url": str(tmp_path / "run")}, **sections}
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        return str(tmp_path / "run.yaml")

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The URL of a run of four steps that has ended."""
    url = tmp_path_factory.mktemp("finished") / "run"
    train_here(build, url=url, train=TRAIN, checkpoint={"every_steps": 2})
    return url


# --- mistakes --------------------------------------------------------------------------------------------------------

# What is given on the command line, and the words of the one line that comes back.
MISTAKES = {
    "an unknown key": (["train.stepz=3"], ["train.stepz", "unknown key", "train.steps"]),
    "a wrong type": (["train.steps=many"], ["train.steps: expected a valid integer, found 'many'"]),
    "a contradiction": (["train.epochs=3"], ["expected one of train.steps and train.epochs, found both"]),
    "not an override": (["steps"], ["'steps': expected dotted.key=value"]),
    "an unknown module": (["task=no.such.module:build"], ["task: there is no module 'no'"]),
    "an unknown file": (["task=missing.py:build"], ["task: there is no file 'missing.py'"]),
    "an unknown function": (["task=textwrap:bake"], ["task: textwrap has no function 'bake'"]),
    "no function at all": (["task=harness"], ["task: expected package.module:function or path/to/file.py:function"]),
    "arguments that do not fit": (["task=textwrap:dedent", "args.colour=red"], ["args: textwrap:dedent", "'text'"]),
    "an empty data set": (["args.samples=0"], ["task: expected a data set with samples, found an empty one"]),
    "another object than a task": ([f"task={__file__}:nothing"], ["to return a harness.Task, found NoneType"]),
    "an unknown file system": (["checkpoint.url=nofs://place/run"], ["nofs://place/run", "nofs"]),
    "a file system's wrong option": (["checkpoint.storage_options={nonsense: 1}", "checkpoint.url=s3://b/r"], ["s3://b/r"]),
    "a log that cannot be written": (["log.jsonl=missing/log.jsonl"], ["log.jsonl: cannot append to missing/log.jsonl"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line(write, tmp_path, case):
    """Exit code 2, what was expected and what was found, no traceback, and nothing is begun."""
    overrides, words = MISTAKES[case]
    done = harness("train", write(), *overrides, cwd=tmp_path, warm=True)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("harness: ")]
    assert done.stderr.splitlines() == lines, "nothing else is said"
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.glob("run/step-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there(write):
    """What was asked for, and what the machine has."""
    done = harness("train", write(), "world.device=cuda", warm=True)
    words = "world.device: expected a CUDA device for each of 1 local ranks, found 0"
    assert (done.returncode, done.stderr) == (2, f"harness: {words}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file or directory"),
        ("train: {steps: 1", "not YAML"),
        ("", "expected keys and values, found nothing"),
        ("train: {steps: 1}\n", "task: expected a value, found none"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, words):
    """Missing, unreadable as YAML, empty, incomplete: exit code 2 and the file's name."""
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    done = harness("train", "run.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert all(line.startswith("harness: run.yaml") for line in done.stderr.splitlines())
    assert words in done.stderr


def test_a_checkpoint_that_does_not_fit_the_model(write, finished):
    """Exit code 2, and every name, shape and dtype that differs."""
    done = harness("train", write(checkpoint={"url": str(finished)}, args={"width": 4}), "train.steps=9", warm=True)
    assert done.returncode == 2
    (checkpoint,) = finished.glob("step-000000000004-*")
    assert done.stderr.splitlines() == [
        f"harness: {checkpoint}: the checkpoint does not fit the model (3 differences)",
        "harness:   0.weight: the checkpoint has float32[3, 1], the model has float32[4, 1]",
        "harness:   0.bias: the checkpoint has float32[3], the model has float32[4]",
        "harness:   1.weight: the checkpoint has float32[1, 3], the model has float32[1, 4]",
        (
            "harness: if the change is intended, this is a new run; give it another URL; if the training itself has added "
            "something, add it in Run(..., adapt=...)"
        ),
    ]


def test_fresh_over_a_used_url(write, finished):
    """Exit code 2; the run that is there is as it was."""
    before = sorted(path.name for path in finished.iterdir())
    done = harness("train", write(checkpoint={"url": str(finished)}), "--fresh", warm=True)
    assert done.returncode == 2
    assert done.stderr == f"harness: checkpoint.url: --fresh expects an unused URL, found a run in {finished}\n"
    assert sorted(path.name for path in finished.iterdir()) == before


def test_resume_where_there_is_nothing(write, tmp_path):
    """Exit code 66, and nothing is begun there."""
    done = harness("train", write(checkpoint={"url": str(tmp_path / "typo")}), "--resume", warm=True)
    assert done.returncode == 66
    assert done.stderr.startswith(f"harness: {tmp_path}/typo: expected a run to continue (checkpoint.must_exist), found no")
    assert not (tmp_path / "typo").exists()


def test_a_mistake_in_the_users_code_gets_its_traceback(write):
    """It is theirs to mend: exit code 1."""
    done = harness("train", write(task=f"{__file__}:broken"), warm=True)
    assert done.returncode == 1
    assert "in broken" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: a mistake in the recipe")


def test_a_mistake_on_the_command_line_itself():
    """What is missing, and how it would be right."""
    for arguments in ((), ("train",), ("nonsense",), ("ls",), ("ls", "url", "--nonsense")):
        done = harness(*arguments)
        assert done.returncode == 2, arguments
        assert "Usage: " in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.torchrun
def test_a_mistake_under_torchrun_is_told_once(write, tmp_path):
    """One line for all ranks of a machine, before any process group: the ranks do not even wait for each other."""
    config = json.loads(Path(write()).read_text())
    with launch(tmp_path, config, "train.stepz=3", ranks=2, env={"MASTER_ADDR": "nowhere.invalid"}) as run:
        assert run.finish() == 1  # torchrun's word for any failure
        lines = [line for line in run.output().splitlines() if line.startswith("harness: ")]
    assert len(lines) == 1
    assert "train.stepz: unknown key" in lines[0]


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_then_train_again(write, tmp_path):
    """A run ends with 0; started again it has nothing to do, ends with 0, and its checkpoints are as they were."""
    first = harness("train", write())
    assert first.returncode == 0, first.stderr
    assert "attempt 1: starting in " in first.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("step-*/*")}
    again = harness("train", write(), warm=True)
    assert again.returncode == 0, again.stderr
    assert "attempt 2: resuming from step-000000000004-" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("step-*/*")} == before


def test_under_a_debugger(write):
    """``python -m pdb -m harness train`` stops in front of the program and lets it run; there is no process group."""
    done = subprocess.run(
        [sys.executable, "-m", "pdb", "-m", "harness", "train", write()],
        input="from harness.training import loop\nb loop._Trainer.step\ncontinue\np self.world.size\nclear 1\ncontinue\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Breakpoint 1 at" in done.stdout
    assert "(Pdb) 1\n" in done.stdout, "the world is a world of one"
    assert "done: step 4" in done.stderr


def test_the_installed_command_is_the_same_program():
    """``harness`` is ``python -m harness``."""
    command = Path(sys.executable).with_name("harness")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == harness("--version").stdout.replace("python -m harness", "harness")


# --- reading a run ---------------------------------------------------------------------------------------------------


def test_ls_lists_every_save(finished, tmp_path):
    """Newest first, with its state; a directory without a manifest is unfinished."""
    (finished / "step-000000000009-000001-aaaaaaaa-bbbbbbbb").mkdir(exist_ok=True)
    (finished / "step-000000000009-000001-aaaaaaaa-bbbbbbbb" / "model.safetensors").write_bytes(b"half")
    found = read_json("ls", str(finished))
    assert sorted((entry["step"], entry["state"]) for entry in found) == [(2, "whole"), (4, "whole"), (9, "unfinished")]
    whole = next(entry for entry in found if entry["step"] == 4)
    assert {"directory", "attempt", "created", "bytes", "epoch", "world_size", "in_line"} <= whole.keys()
    lines = harness("ls", str(finished)).stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("whole")] == [
        ["whole", "step", "4"],
        ["whole", "step", "2"],
    ]


def test_what_a_writer_says_does_not_replace_what_harness_found(tmp_path):
    """Keys of ``meta`` that are called as harness's own: those win, in every verb that prints both."""
    lies = {
        "state": "whole",
        "step": 999,
        "directory": "../../etc",
        "problem": "none",
        "in_line": False,
        "files": 0,
        "own": 1,
    }
    directory = save(tmp_path, {"model": {"a": torch.zeros(3)}}, step=5, meta=lies)
    (entry,) = read_json("ls", str(tmp_path))
    found = read_json("inspect", str(tmp_path))
    assert len(found["files"]) == 1
    for each in (entry, found):
        assert (each["step"], each["directory"], each["state"], each["own"]) == (5, directory, "whole", 1)
        assert "problem" not in each
    assert entry["in_line"] is True
    (tmp_path / directory / "model.safetensors").write_bytes(b"")
    done = harness("verify", str(tmp_path), "--json")
    assert done.returncode == 65
    (entry,) = json.loads(done.stdout)
    assert (entry["step"], entry["directory"], entry["state"]) == (5, directory, "corrupt")
    assert "model.safetensors" in entry["problem"]


def test_prune_says_what_stays(tmp_path):
    """An abandoned line that goes further, and what the last attempt may be writing, which ``--unfinished`` deletes."""
    lines = [(1, 10, ()), (1, 40, ()), (2, 20, [(1, 10)]), (2, 30, [(1, 10)])]
    attempts = {number: Attempt(f"00000{number}-0000000{number}") for number in (1, 2)}
    store = open_store(str(tmp_path))
    for number, step, stands_on in lines:
        lineage = [Ancestor(attempts[each].id, until) for each, until in stands_on]
        commit.write(store, {"model": {}}, step=step, attempt=attempts[number], lineage=lineage)
    unfinished = new_directory(50, attempts[2])
    (tmp_path / unfinished).mkdir()
    found = [line.split()[:2] for line in harness("ls", str(tmp_path)).stdout.splitlines()]
    assert [state for state, _ in found] == ["unfinished", "whole", "whole", "abandoned", "whole"]
    done = harness("prune", str(tmp_path), "--keep-last", "1")
    words = [line.split()[:2] for line in done.stdout.splitlines()]
    assert words == [["deleted", "old"], ["deleted", "old"], ["stays", "unfinished"], ["stays", "abandoned"]]
    done = harness("prune", str(tmp_path), "--keep-last", "1", "--unfinished", "--dry-run")
    assert f"would delete  unfinished  {unfinished}" in done.stdout
    done = harness("prune", str(tmp_path), "--keep-last", "1", "--unfinished")
    assert f"deleted  unfinished  {unfinished}" in done.stdout
    assert not (tmp_path / unfinished).exists()


@pytest.mark.parametrize("verb", [("ls",), ("ls", "--json"), ("prune", "--keep-last", "1")])
def test_a_url_where_nothing_is(tmp_path, verb):
    """It is mistyped, more often than not: exit code 66, a sentence, and nothing is made there."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "notes.txt").write_text("mine")
    for url in (tmp_path / "nothing", tmp_path / "others"):
        done = harness(verb[0], str(url), *verb[1:])
        words = f"harness: {url}: no run has ever started here; check the URL for a typo\n"
        assert (done.returncode, done.stdout, done.stderr) == (66, "", words)
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_a_checkpoint_is_a_run(tmp_path):
    """One that has only begun is not taken for a typo."""
    Catalog(open_store(str(tmp_path))).attempts.claim({})
    done = harness("ls", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "no checkpoints\n", "")


STEERING = "\x1b]0;PWNED\x07\x9b2J\r\n\u202egnp"


def test_nothing_steers_the_terminal(tmp_path):
    """What a checkpoint or an attempt holds is shown, and not obeyed; as JSON it comes through as it is."""
    save(tmp_path, {"model": {STEERING: torch.zeros(1)}}, step=3, meta={"epoch": STEERING, f"k{STEERING}": [STEERING]})
    for verb in ("ls", "inspect", "verify"):
        done = harness(verb, str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert all(line.isprintable() for line in done.stdout.split("\n"))
    assert r"\x1b]0;PWNED\x07\x9b2J\r\n\u202egnp" in harness("inspect", str(tmp_path)).stdout
    assert read_json("inspect", str(tmp_path))["epoch"] == STEERING


def test_inspect_says_what_others_build_on(finished):
    """Step, epoch, world size, each file with bytes and checksum, the digests of the model and the optimizer."""
    found = read_json("inspect", str(finished))
    assert (found["step"], found["epoch"], found["world_size"]) == (4, 1, 1)
    for file in found["files"]:
        path = finished / found["directory"] / file["name"]
        assert path.stat().st_size == file["bytes"]
        assert file["checksum"].startswith("xxh3_128:")
    assert {"model.safetensors", "optimizer.safetensors"} <= {file["name"] for file in found["files"]}
    assert found["digest"]["model"] != found["digest"]["optimizer"]
    assert all(digest.startswith("xxh3_128:") for digest in found["digest"].values())


def test_inspect_a_certain_step(finished):
    """One that is not there is said, with exit code 66."""
    assert read_json("inspect", str(finished), "--step", "2")["step"] == 2
    done = harness("inspect", str(finished), "--step", "3")
    assert (done.returncode, done.stderr) == (66, f"harness: {finished}: there is no whole checkpoint of step 3\n")


def test_inspect_for_people(finished):
    """Every field has its line."""
    text = harness("inspect", str(finished)).stdout
    for words in ("step: 4", "world_size: 1", "digest:\n  model  xxh3_128:", "files:\n  model.safetensors  "):
        assert words in text


def test_storage_that_cannot_be_had():
    """Exit code 2 and one line, for the verbs that read, too."""
    done = harness("ls", "nofs://place/run")
    assert done.returncode == 2
    assert done.stderr.startswith("harness: ")
    assert done.stderr.count("\n") == 1


SPY = """\
import sys
from harness.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "test_cli"}))
"""


@pytest.mark.parametrize("verb", [("ls",), ("ls", "--json"), ("inspect",), ("inspect", "--json"), ("verify", "--deep")])
def test_verbs_that_read_import_neither_torch_nor_the_users_code(finished, verb):
    """They answer on a login node, at once."""
    done = subprocess.run(
        [sys.executable, "-c", SPY, verb[0], str(finished), *verb[1:]], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
