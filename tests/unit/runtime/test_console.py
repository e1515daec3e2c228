"""What a run says where it was started: on a terminal, on a pipe, to a program."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from harness import save
from harness.runtime import console
from harness.secrecy import learn
from tests.support.cluster import AGENT, PATIENCE_SECONDS, committed, environment, harness, torchrun

pyte = pytest.importorskip("pyte", reason="pyte is not installed: pip install pyte")

TALKING = """
import logging
import time
import torch
from harness import Task

def build():
    model = torch.nn.Linear(4, 1)
    steps = []

    def loss(model, batch):
        time.sleep(0.02)
        steps.append(len(steps) + 1)
        if steps[-1] % 10 == 0:
            logging.getLogger("theirs").error("the program says %d", steps[-1])
        return model(batch[0]).square().mean()

    dataset = torch.utils.data.TensorDataset(torch.rand(64, 4))
    return Task(model=model, dataset=dataset, optimizer=torch.optim.SGD(model.parameters(), 0.01), loss=loss)
"""
CONFIG = {
    "task": "talking.py:build",
    "train": {"steps": 40, "global_batch_size": 4},
    "checkpoint": {"url": "run", "every_steps": 15},
    "log": {"every_steps": 5},
    "world": {"device": "cpu"},
}


class Terminal:
    """A program on a pseudo-terminal, what it has sent so far, and what somebody would see of it."""

    def __init__(self, *command: str, cwd: Path, columns: int = 120) -> None:
        self.sent = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60 if columns else 0, columns, 0, 0))
        env = {**environment(), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)

    def until_the_end(self) -> int:
        """Reads everything, and returns the exit code."""
        with contextlib.suppress(OSError):  # nobody is at the other end any more
            while data := os.read(self.master, 1 << 16):
                self.sent += data
        os.close(self.master)
        return self.process.wait(PATIENCE_SECONDS)

    def screen(self, sent: bytes | None = None) -> list[str]:
        """The lines that are seen after all, or after the first so many bytes."""
        screen = pyte.Screen(120, 60)
        pyte.ByteStream(screen).feed(self.sent if sent is None else sent)
        return [line.rstrip() for line in screen.display if line.strip()]


def write(folder: Path, **sections) -> None:
    (folder / "talking.py").write_text(TALKING)
    (folder / "talking.yaml").write_text(json.dumps({**CONFIG, **sections}))


COMMAND = ("-m", "harness", "train", "talking.yaml")


@pytest.mark.torchrun
def test_a_terminal_has_one_live_line(tmp_path):
    """With step, epoch, loss, speed, the rest of the time and the last save; events and errors stand above it, whole."""
    write(tmp_path)
    terminal = Terminal(*torchrun(2, AGENT), *COMMAND, cwd=tmp_path)
    assert terminal.until_the_end() == 0, terminal.sent.decode()
    words = rb"step \d+/40 +\d+% \|.{16,64}?\| epoch \d+  loss \S+  \S+ samples/s  saved \d+ s ago eta \d\d:\d\d"
    live = re.findall(words, terminal.sent)
    assert len({*live}) >= 3, terminal.sent
    seen = terminal.screen()
    for step in (10, 20, 30, 40):
        assert sum(line.endswith(f"the program says {step}") for line in seen) == 2, seen  # each rank does
    for step in (15, 30, 40):
        assert sum(f"step {step}/40  saved" in line for line in seen) == 1, seen
    assert not any("%|" in line for line in seen), "the line is gone at the end, and left nothing"
    assert "done: step 40" in seen[-1]
    kept = [
        int(step) for line in seen for step in re.findall(r"step (\d+)/40  epoch \d+  loss \S+  lr \S+  \S+ samples/s", line)
    ]
    assert kept[0] == 5, "the first line of training stays on the screen"
    assert kept[1:], "and so does the newest one at each save"
    assert len(kept) <= 4, "but no other in the first minute"


def test_a_pipe_gets_plain_lines(tmp_path):
    """At the intervals that the configuration has, and nothing that belongs on a terminal; it does without tqdm."""
    write(tmp_path)
    (tmp_path / "tqdm.py").write_text("raise ImportError('it is not needed here')")
    command = [sys.executable, *COMMAND]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert re.findall(r"step (\d+)/40  epoch \d+  loss", done.stderr) == [str(step) for step in range(5, 41, 5)]


def test_a_terminal_that_a_run_is_stopped_on(tmp_path):
    """Ctrl-C takes the line away before the last words. This one does not say how wide it is."""
    write(tmp_path, train={"steps": 4000, "global_batch_size": 4})
    terminal = Terminal(*COMMAND, cwd=tmp_path, columns=0)
    while b"s ago" not in terminal.sent:
        terminal.sent += os.read(terminal.master, 1 << 16)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.until_the_end() == 75
    assert "asked to stop (SIGINT) at step" in terminal.screen()[-1]
    assert not any("%|" in line for line in terminal.screen())


@pytest.mark.soak
def test_a_terminal_that_is_closed(tmp_path):
    """The training goes on to its end without it."""
    write(tmp_path, train={"steps": 100, "global_batch_size": 4})
    terminal = Terminal(*COMMAND, cwd=tmp_path)
    while b"s ago" not in terminal.sent:
        terminal.sent += os.read(terminal.master, 1 << 16)
    os.close(terminal.master)
    terminal.process.wait(PATIENCE_SECONDS)  # with Python's own code for a stderr that it cannot flush
    assert 100 in committed(tmp_path / "run")


@pytest.mark.torchrun
def test_lines_for_programs(tmp_path):
    """Each is JSON, with who speaks and from where in the training; an event has its values."""
    write(tmp_path, log={"every_steps": 5, "format": "json"})
    command = [sys.executable, *torchrun(2, AGENT), *COMMAND]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert all({"time", "level", "rank", "host", "attempt", "step", "message"} <= line.keys() for line in lines)
    events = [line["event"] for line in lines if "event" in line]
    assert [event for event in events if event in ("start", "save", "done")] == ["start", "save", "save", "save", "done"]
    assert [line["step"] for line in lines if line.get("event") == "train"] == [*range(5, 41, 5)]
    theirs = [line for line in lines if line["message"].startswith("the program says")]
    assert {line["rank"] for line in theirs} == {0, 1}
    assert {line["level"] for line in theirs} == {"error"}
    (attempt,) = {line["attempt"] for line in lines if "event" in line}
    assert {line["attempt"] for line in theirs} == {attempt}


CLEARING = """
import os, sys
from harness.runtime.console import Clearing
sys.stderr.write("step 3/40 |###   |  loss 0.5")  # as a rank leaves it that is killed
sys.stderr.flush()
sys.stderr = Clearing(sys.stderr)
sys.stderr.write("E1129 the agent ")
sys.stderr.write("speaks\\nin two lines\\n")
print("a traceback", file=sys.stderr)
"""


def test_an_agent_speaks_over_a_dead_ranks_line(tmp_path):
    """What torchrun says on a terminal is not glued to the live line that a rank has left there."""
    (tmp_path / "agent.py").write_text(CLEARING)
    terminal = Terminal("agent.py", cwd=tmp_path)
    assert terminal.until_the_end() == 0
    assert terminal.screen() == ["E1129 the agent speaks", "in two lines", "a traceback"]


def test_what_a_terminal_would_obey(caplog):
    """Is shown escaped, wherever it comes from: the title, colours, the way back, the direction."""
    about = {"msg": "\x1b]0;PWNED\x07 loss\x1b[2K\r %s", "args": ("\x9b31m\u202e0.5",), "levelno": logging.INFO}
    record = logging.makeLogRecord(about)
    text = console.Lines().format(record)
    assert text.endswith(r"\x1b]0;PWNED\x07 loss\x1b[2K\r \x9b31m\u202e0.5")
    assert json.loads(console.Lines("json").format(record))["message"] == record.getMessage()
    assert console.printable("two\nlines\tand ü, 漢, 😀") == "two\nlines\tand ü, 漢, 😀"


def test_colours(monkeypatch):
    """On a terminal a line that deserves attention stands out. NO_COLOR, a pipe and JSON have none."""

    def line(form="text", **about) -> str:
        return console.Lines(form).format(logging.makeLogRecord({"msg": "words", "levelno": logging.INFO, **about}))

    master, slave = pty.openpty()
    with os.fdopen(master), os.fdopen(slave, "w") as terminal:
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert "\x1b" not in line(levelno=logging.ERROR), "no terminal"
        monkeypatch.setattr(sys, "stderr", terminal)
        assert re.fullmatch("\x1b\\[33m.* words\x1b\\[0m", line(levelno=logging.WARNING))
        assert re.fullmatch("\x1b\\[31m.* words\x1b\\[0m", line(levelno=logging.ERROR))
        assert re.fullmatch("\x1b\\[32m.* words\x1b\\[0m", line(values={"event": "save"}))
        assert re.fullmatch("\x1b\\[36m.* words\x1b\\[0m", line(values={"event": "resume"}))
        assert "\x1b" not in line(values={"event": "train"})
        assert "\x1b" not in line("json", levelno=logging.ERROR)
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in line(levelno=logging.ERROR)
        monkeypatch.setenv("NO_COLOR", "")
        assert "\x1b" in line(levelno=logging.ERROR), "an empty variable counts as not set"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (41139.7, "41,140"),
        (0.512345, "0.5123"),
        (999.94, "999.9"),
        (1000.04, "1,000"),
        (1234.5678, "1,235"),
        (-2e6, "-2,000,000"),
        (1.5e20, "1.5e+20"),
        (1e-9, "1e-09"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_for_people(value, text):
    """Four significant digits, and no exponents where there need be none."""
    assert console.number(value, 4) == text
    assert console.number(1234.5678, 5) == "1,234.6"


def test_a_line_that_cannot_be_written(capsys):
    """Is told of without what was to be in it."""
    learn("", {"password": "p4ssw0rd"})
    handler = console.Console()
    handler.setStream(sys.stderr)
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("p4ssw0rd",)}))
    said = capsys.readouterr().err
    assert "a line of the log could not be written" in said
    assert "p4ssw0rd" not in said
    assert "TypeError" in said


FAILING = """
import torch
from harness import Task

def build():
    model = torch.nn.Linear(4, 1)

    def loss(model, batch):
        raise ValueError("the first line\\nthe second line")

    dataset = torch.utils.data.TensorDataset(torch.rand(8, 4))
    return Task(model=model, dataset=dataset, optimizer=torch.optim.SGD(model.parameters(), 0.01), loss=loss)
"""


@pytest.mark.torchrun
def test_each_line_of_an_error_has_its_rank(tmp_path):
    """Two ranks fail at once; of each line somebody can say whose it is, and no error is torn by the other."""
    (tmp_path / "talking.py").write_text(FAILING)
    (tmp_path / "talking.yaml").write_text(json.dumps({**CONFIG, "checkpoint": {}}))
    command = [sys.executable, *torchrun(2, AGENT), *COMMAND]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    spoken = 0
    for rank in (0, 1):
        begin = f"rank {rank} on {platform.node()}: "
        own = [number for number, line in enumerate(lines) if line.startswith(begin)]
        if not own:  # torchrun ended it when the other had failed
            continue
        spoken += 1
        assert lines[own[0]] == f"{begin}Traceback (most recent call last):"
        assert lines[own[-1]] == f"{begin}the second line"
        assert own == list(range(own[0], own[-1] + 1)), "in one piece"
    assert spoken, done.stderr


@pytest.mark.parametrize("command", [("train", "talking.yaml"), ("export", "run", "out.safetensors")])
def test_without_torch(tmp_path, command):
    """One line that says what to install, for whom."""
    write(tmp_path)
    save(str(tmp_path / "run"), {"model": {"weight": torch.zeros(2)}}, step=1)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    done = harness(*command, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"harness: No module named 'torch': PyTorch is needed; install it for {sys.executable}: pip install torch"
