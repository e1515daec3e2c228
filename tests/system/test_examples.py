"""The scripts of ``docs/examples``: loops of all kinds that became fault-tolerant with a few lines, and really are."""

import difflib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.cluster import Run, launch, newest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
URLS = {
    "plain": "rings",
    "amp": "curve",
    "fsdp": "counting",
    "compiled": "sums",
    "streamed": "stream",
    "gan": "circle",
    "bandit": "bandit",
}
MOST_LINES = 8


def test_there_is_a_test_for_each():
    """And for each the script that it was before."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == URLS.keys()
    assert {path.stem for path in EXAMPLES.glob("bare/*.py")} == URLS.keys()


@pytest.mark.parametrize("name", list(URLS))
def test_an_example_took_a_few_lines(name):
    """Added or changed, as ``diff`` counts them; the loop, the model and the optimizer are as they were."""
    before, after = (path.read_text().splitlines() for path in (EXAMPLES / "bare" / f"{name}.py", EXAMPLES / f"{name}.py"))
    lines = [line for line in difflib.unified_diff(before, after, n=0) if line.startswith("+") and line[1:].strip()][1:]
    assert len(lines) <= MOST_LINES, lines


def launching(name: str, ranks: int, restarts: int = 0) -> tuple[str, ...]:
    options = (f"--max-restarts={restarts}", f"--nproc-per-node={ranks}")
    return ("-m", "harness", "launch", *options, "--", str(EXAMPLES / f"{name}.py"))


def digests(directory: Path, name: str) -> dict[str, str]:
    """Those of all parts at the end of a run, but for the random states: the scripts do not seed all generators that there
    are, and those begin anywhere."""
    found = newest(directory / "runs" / URLS[name])["digests"]
    return {part: digest for part, digest in found.items() if part != "random"}


@dataclass
class Disturbed:
    """A script's run that had a rank killed, was asked to stop after that, and was started again; and one left alone."""

    directory: Path
    codes: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    stopped_at: int = 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The README's script on two ranks."""
    found = Disturbed(tmp_path_factory.mktemp("plain"))
    command, url = launching("plain", 2, 1), found.directory / "disturbed" / "runs" / URLS["plain"]
    with launch(found.directory / "straight", None, command=command) as run:
        run.succeed()
    with launch(found.directory / "disturbed", None, command=command) as run:
        kill_after_its_first_save(run, url, attempt=1, rank=1)
        run.wait(lambda: any(url.glob("step-*-000002-*/manifest.json")), "the first save after the kill")
        os.kill(run.process.pid, signal.SIGTERM)
        found.codes.append(run.finish())
        found.outputs.append(run.output())
    found.stopped_at = newest(url)["step"]
    with launch(found.directory / "disturbed", None, command=command) as run:
        found.codes.append(run.finish())
        found.outputs.append(run.output())
    return found


def kill_after_its_first_save(run: Run, url: Path, attempt: int, rank: int) -> None:
    run.wait(lambda: url.exists() and any(url.glob(f"step-*-{attempt:06}-*/manifest.json")), "the attempt's first save")
    run.kill_rank(rank)


@pytest.mark.torchrun
def test_killed_it_ends_with_the_same_bits(plain):
    """A rank is SIGKILLed after a save, torchrun starts all again, and the end has every bit of the run that was left alone:
    models, optimizers, what the script keeps for itself, and the ledger of the samples."""
    assert plain.outputs[0].count("resuming from step-") == 1
    assert plain.codes[-1] == 0, plain.outputs[-1]
    assert digests(plain.directory / "disturbed", "plain") == digests(plain.directory / "straight", "plain")


@pytest.mark.torchrun
def test_a_script_that_is_asked_to_stop(plain):
    """Under ``harness launch`` all ranks save the same step, the exit code asks for a new start, and that one goes on."""
    assert plain.codes == [75, 0], plain.outputs
    assert f"asked to stop (SIGTERM) at step {plain.stopped_at}, which is saved" in plain.outputs[0]
    last = plain.outputs[0].splitlines()[-1]
    assert last == "harness launch: exit code 75: stopped as requested; start the same command again to continue"
    assert "Traceback" not in plain.outputs[0].partition("resuming from step-")[2]
    assert f"step {plain.stopped_at}" in plain.outputs[1]
    assert newest(plain.directory / "disturbed" / "runs" / URLS["plain"])["step"] == 500


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.parametrize("name", list(URLS))
def test_killed_often_it_ends_with_the_same_bits(tmp_path, name):
    """The same of every script, on more ranks, after several kills."""
    ranks, kills = 2 if name == "streamed" else 3, 3
    command = launching(name, ranks, kills)
    if name == "streamed":
        pytest.importorskip("torchdata.stateful_dataloader")
    with launch(tmp_path / "straight", None, command=command) as run:
        run.succeed()
    url = tmp_path / "killed" / "runs" / URLS[name]
    with launch(tmp_path / "killed", None, command=command) as run:
        for number in range(1, kills + 1):
            kill_after_its_first_save(run, url, number, -number % ranks)
        run.succeed()
        assert run.output().count("resuming from step-") == kills
    assert digests(tmp_path / "killed", name) == digests(tmp_path / "straight", name)


def test_one_process_needs_no_torchrun(tmp_path):
    """A script without a process group is a run, too; a second start finds nothing left to do."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, harness\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "run = harness.Run('run', {'model': model, 'optimizer': optimizer})\n"
        "for step in run.steps(5):\n"
        "    model(torch.ones(2)).square().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    run.step()\n"
        "print('trained', step)\n"
    )
    with launch(tmp_path, None, command=(str(script),)) as run:
        run.succeed()
        assert "trained 4" in run.output()
    assert newest(tmp_path / "run")["step"] == 5
    script.write_text(script.read_text().replace("print('trained', step)", "print('at', run.global_step)"))
    with launch(tmp_path, None, command=(str(script),)) as run:
        run.succeed()
        assert "resuming from step-000000000005" in run.output()
        assert "at 5" in run.output()
