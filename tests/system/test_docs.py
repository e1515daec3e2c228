"""What the documentation says: its examples are run, its tables compared with the program, what it names must exist."""

import difflib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from pydantic import BaseModel

from harness import errors
from harness.checkpoint import commit
from harness.checkpoint.format import Attempt
from harness.checkpoint.saver import SaveRequest
from harness.cli import cli
from harness.config import Config
from harness.doctor import examination
from harness.drill.results import SURVIVES_INEXACTLY
from harness.storage.store import open_store
from tests.support.cluster import PATIENCE_SECONDS, environment, harness, newest
from tests.support.saving import saver

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").rglob("*.md"))
PAPERS = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "SECURITY.md"]
PAGES = {page.name: page.read_text() for page in (*PAPERS, *DOCS)}
EVERYTHING = "\n".join(PAGES.values())


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def write_files(page: str, directory: Path) -> None:
    """Writes the page's code blocks that begin with a file's name in a comment."""
    for block in (*blocks(page, "python"), *blocks(page, "yaml")):
        if name := re.match(r"# ([\w.]+)\n", block):
            (directory / name[1]).write_text(block)


def rows(page: str, first: str) -> list[str]:
    """The rows of the table whose head begins with a cell."""
    table = re.search(rf"^\| {re.escape(first)} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    assert table, f"{page} has no table that begins with {first!r}"
    return table[1].splitlines()


def load(path: Path):
    """Imports a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the examples ----------------------------------------------------------------------------------------------------


def test_the_diff_of_the_readme():
    """It is that between the two scripts, which ``test_examples`` runs and kills."""
    examples = REPOSITORY / "docs" / "examples"
    before, after = ((examples / name).read_text().splitlines() for name in ("bare/plain.py", "plain.py"))
    lines = list(difflib.unified_diff(before, after, n=3, lineterm=""))[2:]
    (block,) = blocks("README.md", "diff")
    assert block.splitlines() == ["@@" if line.startswith("@@") else line for line in lines]


def test_the_pieces_alone(tmp_path, monkeypatch, capsys):
    """Saved and loaded in a script without a process group."""
    monkeypatch.chdir(tmp_path)
    kept, pieces, *_ = blocks("your-loop.md", "python")
    exec(kept, names := {})
    exec("kept = Kept(best=1); kept.load_state_dict({'best': 2}); assert kept.state_dict() == {'best': 2}", names)
    exec(pieces, {})
    assert capsys.readouterr().out == "100\n"


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """The README's own model, trained by the README's own command."""
    directory = tmp_path_factory.mktemp("ring")
    write_files("README.md", directory)
    command, under_torchrun = blocks("README.md", "sh")[0].splitlines()
    assert under_torchrun.endswith(command.removeprefix("python "))
    assert command.startswith("python -m harness ")
    done = harness(*shlex.split(command)[3:], cwd=directory)
    assert done.returncode == 0, done.stderr
    assert "done: step 400" in done.stderr
    return directory


def test_a_run_looks_as_the_readme_says(ring):
    """The README's listing has the files of a run, and names directories as they are named."""
    listing = next(block for block in blocks("README.md", "text") if block.startswith("$ ls -R"))
    places = {place.splitlines()[0]: place.splitlines()[1:] for place in listing.split("\n\n") if ":" in place}
    saves = [path for path in (ring / "runs/ring").iterdir() if path.name not in ("attempts", "metrics")]
    assert saves
    step = next(names for place, names in places.items() if place.startswith("step-"))
    for save in saves:
        assert sorted(path.name for path in save.iterdir()) == step
    for name in [*places, *(save.name for save in saves)]:
        assert re.fullmatch(r"\$ ls -R .*|(attempts|metrics):?|step-\d{12}-\d{6}-[0-9a-f]{8}-[0-9a-f]{8}:?", name)


def test_other_programs_read_a_model(ring, monkeypatch):
    """The lines in docs/guides/interchange.md give a model the weights of a checkpoint."""
    monkeypatch.chdir(ring)
    export = re.search(r"`harness (export runs/[^`]*)`", PAGES["interchange.md"])[1]
    done = CliRunner().invoke(cli, shlex.split(export), catch_exceptions=False)
    assert done.exit_code == 0
    saved = newest(ring / "runs/ring")["parts"]["model"]
    directory = next(Path("runs/ring").glob("step-000000000400-*"))
    for block in blocks("interchange.md", "python"):
        model = load(ring / "ring.py").build().model
        exec(re.sub(r"runs/ring/step-[^/]*/", f"{directory}/", block), {"model": model, "torch": torch})
        assert all(saved[name].equal(value) for name, value in model.state_dict().items()), block


def test_the_formats_reader_reads_a_run(ring, tmp_path):
    """The reader in docs/reference/format.md, without harness, finds the newest checkpoint and each of its tensors."""
    from harness.checkpoint.tree import encode

    write_files("format.md", tmp_path)
    reader = load(tmp_path / "reader.py")
    step, tensors = reader.read(reader.newest(ring / "runs/ring"))
    checkpoint = newest(ring / "runs/ring")
    assert step == checkpoint["step"]
    expected = {
        f"{name}/{path}": tensor
        for name, part in checkpoint["parts"].items()
        for path, tensor in encode(part, name).tensors.items()
    }
    assert expected.keys() == tensors.keys()
    assert all((tensors[path] == tensor.numpy()).all() for path, tensor in expected.items())


def test_the_formats_reader_puts_pieces_together(tmp_path, monkeypatch):
    """The reader in docs/reference/format.md reads tensors that lie in pieces."""
    monkeypatch.setattr("harness.checkpoint.format.BLOCK_BYTES", 256)
    write_files("format.md", tmp_path)
    expected = {"large": torch.arange(800.0).view(20, 40), "tied": None, "small": torch.ones(3, dtype=torch.int16)}
    expected["tied"] = expected["large"]
    store = open_store(str(tmp_path / "run"))
    directory, manifest = commit.write(store, {"model": expected}, step=7, attempt=Attempt.after([]), shard_bytes=600)
    assert manifest.parts["model"].slices["large"].offsets == list(range(0, 3200, 512))
    step, tensors = load(tmp_path / "reader.py").read(tmp_path / "run" / directory)
    assert step == 7
    assert all((tensors[f"model/{name}"] == tensor.numpy()).all() for name, tensor in expected.items())


def test_the_formats_reader_finds_files_of_earlier_saves(tmp_path, monkeypatch):
    """The reader in docs/reference/format.md reads a checkpoint that names a file of another one."""
    monkeypatch.setattr("harness.checkpoint.frozen.LEAST_BYTES", 1)
    write_files("format.md", tmp_path)
    writer, base = saver(str(tmp_path / "run")), torch.arange(9.0)
    for step in (7, 8):
        state = {"model": {"base": base, "trained": torch.full((2,), float(step))}}
        request = SaveRequest(step, is_frozen=lambda tensor: tensor.data_ptr() == base.data_ptr())
        writer.save(state, request, must_succeed=True)
    reader = load(tmp_path / "reader.py")
    step, tensors = reader.read(reader.newest(tmp_path / "run"))
    assert step == 8 and (tensors["model/base"] == base.numpy()).all() and (tensors["model/trained"] == 8).all()
    assert len([*(tmp_path / "run").glob("*/model-frozen-*")]) == 1


def test_the_formats_reader_notices_damage(ring, tmp_path):
    """The reader in docs/reference/format.md reads no checkpoint in which a byte was changed, whichever file has it."""
    write_files("format.md", tmp_path)
    reader = load(tmp_path / "reader.py")
    run = shutil.copytree(ring / "runs/ring", tmp_path / "run")
    for file in sorted(reader.newest(run).iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
        with pytest.raises((AssertionError, ValueError)):
            reader.read(file.parent)
        file.write_bytes(data)
    reader.read(reader.newest(run))


def debugged(command: str, commands: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """What a command says to somebody who types this into pdb, and then leaves."""
    return subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=cwd,
        env=environment() | variables,
        input="\n".join([*commands, "quit", ""]),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_a_task_can_be_debugged_with_pdb(tmp_path):
    """The task in docs/guides/tasks.md, under debugging.md's command, stops at its breakpoint and trains to its end."""
    write_files("tasks.md", tmp_path)
    place = re.search(r"`(break [\w.:]+)`", PAGES["debugging.md"])[1]
    steps = [place, "continue", "p 'lr is', lr", "clear 1", "continue"]
    done = debugged(blocks("debugging.md", "sh")[0], steps, tmp_path)
    assert "('lr is', 0.01)" in done.stdout, done.stdout + done.stderr
    assert "done: step 80" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_script_can_be_debugged_with_pdb(tmp_path):
    """The command in docs/guides/debugging.md: a script in a process group stops at a breakpoint, and trains on."""
    words = shlex.split(blocks("debugging.md", "sh")[1])
    variables = dict(word.split("=") for word in words if "=" in word)
    script = REPOSITORY / words[-1]
    line = 1 + next(index for index, text in enumerate(script.read_text().splitlines()) if "run.step(" in text)
    command = shlex.join([*(word for word in words[:-1] if "=" not in word), str(script)])
    steps = [f"break {line}", "continue", "p 'loss', loss.item() > 0", "clear 1", "continue"]
    done = debugged(command, steps, tmp_path, **variables | {"MASTER_PORT": "0"})
    assert "('loss', True)" in done.stdout, done.stdout + done.stderr
    assert "done: step 500" in done.stderr


def test_the_save_interval_that_tuning_computes(tmp_path):
    """What docs/guides/tuning.md computes from a report is what it says in words, and no less than two saves take."""
    write_files("tuning.md", tmp_path)

    def interval(**run: float | None) -> str:
        command = [sys.executable, "interval.py"]
        return subprocess.run(
            command, cwd=tmp_path, input=json.dumps(run), capture_output=True, text=True, check=True
        ).stdout

    lived = {"saves": 10, "wall_seconds": 2 * 4 * 3600, "deaths": 2}
    assert interval(**lived, saving_seconds=1, save_seconds_median=2) == "checkpoint.every_seconds=54\n"
    assert interval(**lived, saving_seconds=400, save_seconds_median=50) == "checkpoint.every_seconds=1073\n"
    assert interval(**lived, saving_seconds=1, save_seconds_median=40) == "checkpoint.every_seconds=80\n"
    young = {"saves": 0, "saving_seconds": 0, "save_seconds_median": None, "wall_seconds": 60, "deaths": 0}
    assert interval(**young) == "checkpoint.every_seconds=0\n"


# --- the tables ------------------------------------------------------------------------------------------------------


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """The dotted name of every key of the configuration."""
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += config_keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def test_keys_that_are_named_exist():
    """Every key of the configuration that a page names is one."""
    keys = set(config_keys())
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = set(re.findall(rf"`((?:{'|'.join(sorted(sections))})\.(?!py\b)[a-z_]+)[`=:]", EVERYTHING))
    assert named
    assert named <= keys


def error_classes(base=errors.HarnessError):
    for cls in base.__subclasses__():
        yield cls
        yield from error_classes(cls)


def test_every_exit_code_is_documented():
    """Every error that harness raises on purpose stands in the table, in the row of its exit code."""
    table = {row.split("|")[1].strip(): row for row in rows("exit-codes.md", "exit code")}
    for cls in error_classes():
        assert f"`{cls.__name__}`" in table[str(cls.exit_code)], cls
    known = {str(cls.exit_code) for cls in error_classes()}
    assert table.keys() == known | {"0", "1", str(SURVIVES_INEXACTLY), "130"}


def test_every_verb_is_documented():
    """Every verb has a row in the table, help of its own, and help for each option: the site shows these."""
    table = rows("command-line.md", "verb")
    for name, command in cli.commands.items():
        assert command.help, name
        assert any(f"`harness {name}`" in row for row in table), f"harness {name}"
        assert all(option.help for option in command.params if isinstance(option, click.Option)), name
    named = re.findall(r"harness (\w+) (?:URL|CONFIG|\[)", EVERYTHING)
    assert set(named) <= cli.commands.keys()


# --- what is named ---------------------------------------------------------------------------------------------------


def test_tests_that_are_named_exist():
    """Every test that a page names as evidence is there."""
    named = re.findall(r"`(test_\w+)::(test_\w+)`", EVERYTHING)
    assert named
    for module, function in named:
        path = next((REPOSITORY / "tests").rglob(f"{module}.py"), None)
        assert path, f"{module}::{function}"
        assert re.search(rf"^\s*def {function}\(", path.read_text(), re.MULTILINE), f"{module}::{function}"


def test_links_lead_somewhere():
    """Every link to a file of the repository leads to one, with the heading that it names."""
    for name, text in PAGES.items():
        base = next(page.parent for page in (*PAPERS, *DOCS) if page.name == name)
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, heading = target.partition("#")
            path = path or name  # a heading of the page itself
            assert (base / path).exists(), f"{name}: {target}"
            if heading and not heading.startswith("harness-"):  # which are generated: `make docs` knows them
                headings = re.findall(r"^#+ (.+)$", (base / path).read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\s-]", "", found.lower()).replace(" ", "-") for found in headings]
                assert heading in slugs, f"{name}: {target}"


def test_make_targets_that_are_named_exist():
    """Every `make` target that a page names is in the Makefile, and so is help for it."""
    makefile = (REPOSITORY / "Makefile").read_text()
    named = set(re.findall(r"^    make (\w+)$|`make (\w+)`", EVERYTHING, re.MULTILINE))
    targets = {first or second for first, second in named}
    assert targets >= {"demo", "test", "check", "soak", "clean"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert f"'make {target} " in makefile, target


def test_every_check_of_the_doctor_is_documented():
    """Each has its place in the table, and there is no other."""
    listed = {name for row in rows("doctor.md", "check") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    checks = [*examination.FIRST, *examination.TOGETHER, *examination.ALONE]
    assert listed == {check.__name__ for check in checks} | {"configuration", "ranks", "versions"}
