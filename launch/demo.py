"""Trains a small GPT on two processes, kills one of them, and compares the end with that of a run that was not killed.

    make demo
    python launch/demo.py [--steps 240] [dotted.key=value ...]

All that it tells was read from what harness writes anyway: the JSON lines of ``log.jsonl``, the record of the attempt, and
``harness inspect --json``. Both runs stay in ``runs/demo-<time>``. The exit code is 0 if they ended with the same bits in
model and optimizer, and 1 otherwise.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gpt.yaml"
RANKS = 2
SHOWN_EVERY_STEPS = 20

Event = dict[str, Any]


@dataclass
class Run:
    """A run under torchrun: where it lies, and what it told."""

    folder: Path
    overrides: Sequence[str]
    seconds: float = 0.0
    killed_time: float | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def url(self) -> Path:
        return self.folder / "checkpoints"

    def train(self, kill_after_step: int | None = None) -> None:
        """Runs to the end. Once past the step, rank 0, which writes the checkpoints, is killed; torchrun does the rest."""
        self.folder.mkdir(parents=True)
        began = time.monotonic()
        process = self.start()
        assert process.stdout is not None
        try:
            with open(self.folder / "torchrun.log", "w", encoding="utf-8") as log:
                for line in process.stdout:
                    log.write(line)
                    _show(line)
                    if kill_after_step is not None and self.killed_time is None:
                        self.kill_if_past(kill_after_step)
        finally:
            process.terminate()  # changes nothing unless we were interrupted
            code = process.wait()
        self.seconds = time.monotonic() - began
        self.read_events()
        if code != 0:
            raise SystemExit(f"demo: torchrun ended with {code}; what it said is in {self.folder / 'torchrun.log'}")

    def start(self) -> "subprocess.Popen[str]":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        settings = [f"checkpoint.url={self.url}", f"log.jsonl={self.folder / 'log.jsonl'}", "log.every_steps=1"]
        command = [*torchrun, "--max-restarts=3", "-m", "harness", "train", str(CONFIG), *settings, *self.overrides]
        # As in launch/local.sh, which says why.
        env = {"OMP_NUM_THREADS": "1", **os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603  # ours

    def kill_if_past(self, step: int) -> None:
        self.read_events()
        if not self.events or self.events[-1].get("step", 0) < step:
            return
        record = self.url / "attempts" / f"{self.events[-1]['attempt']}.json"
        pid = json.loads(record.read_text())["pid"]
        self.killed_time = time.time()
        os.kill(pid, signal.SIGKILL)
        print(f"-------- SIGKILL to process {pid}, rank 0", flush=True)

    def read_events(self) -> None:
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self.events = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be on its way

    # --- what it told ------------------------------------------------------------------------------------------------

    def losses(self, attempt: str) -> dict[int, float]:
        """The loss of every step that an attempt trained."""
        mine = [event for event in self.events if event["attempt"] == attempt and event["event"] == "train"]
        return {event["step"]: event["loss"] for event in mine}

    def first(self, name: str, after_time: float = 0.0) -> Event | None:
        """The first event of a name after a time."""
        return next((event for event in self.events if event["event"] == name and event["time"] > after_time), None)

    def end(self) -> dict[str, Any]:
        """Step and digests of the newest checkpoint, as ``harness inspect`` says."""
        command = [sys.executable, "-m", "harness", "inspect", str(self.url), "--json"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)  # noqa: S603  # ours
        return {"step": found["step"], **found["digest"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="over configs/gpt.yaml, for both runs")
    arguments = parser.parse_args()
    folder = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    overrides = [f"train.steps={arguments.steps}", *arguments.overrides]
    killed, whole = Run(folder / "killed", overrides), Run(folder / "whole", overrides)

    print(f"==== {arguments.steps} steps on {RANKS} processes, one of which is killed in the middle", flush=True)
    killed.train(kill_after_step=arguments.steps // 2)
    print("==== the same without the kill", flush=True)
    whole.train()
    return report(killed, whole)


def report(killed: Run, whole: Run) -> int:
    """Prints the table and returns the exit code."""
    resume = killed.first("resume")
    if killed.killed_time is None or resume is None:
        print(f"demo: it was not killed, or did not resume; see {killed.folder}", file=sys.stderr)
        return 1
    back = killed.first("train", after_time=resume["time"])
    assert back is not None, "a run that ended well and had steps left has trained them"
    before, after = killed.losses(killed.events[0]["attempt"]), killed.losses(resume["attempt"])
    straight = whole.losses(whole.events[0]["attempt"])
    last, first = max(before), back["step"]
    ends = killed.end(), whole.end()

    print()
    _row("", "killed", "not killed")
    _row("steps", ends[0]["step"], ends[1]["step"])
    _row("rank 0 was killed after step", last)
    _row("resumed from the checkpoint of step", resume["step"])
    _row(f"loss before: step {last}", f"{before[last]:.6f}", f"{straight[last]:.6f}")
    _row(f"loss after: step {first}", f"{after[first]:.6f}", f"{straight[first]:.6f}")
    if last in after:
        _row(f"loss of step {last}, trained again", f"{after[last]:.6f}", f"{straight[last]:.6f}")
    _row("seconds from the kill to the next step", f"{back['time'] - killed.killed_time:.1f}")
    _row("seconds in all", f"{killed.seconds:.1f}", f"{whole.seconds:.1f}")
    for part in ("model", "optimizer"):
        _row(f"digest of the {part} at the end", *(end[part].partition(":")[2][:16] for end in ends))
    same_losses = all(losses[step] == straight.get(step) for losses in (before, after) for step in losses)
    same_end = all(ends[0][key] == ends[1][key] for key in ("step", "model", "optimizer"))
    print()
    print(f"  losses, step by step:  {'equal' if same_losses else 'NOT EQUAL'}  ({len(before) + len(after)} compared)")
    print(f"  final digests:         {'equal' if same_end else 'NOT EQUAL'}")
    return 0 if same_end else 1


def _row(name: str, killed: object, whole: object = "") -> None:
    print(f"  {name:<40}{killed!s:>18}{whole!s:>18}".rstrip())


def _show(line: str) -> None:
    """Passes on what the training says, and of its steps every twentieth; torchrun's own words are in the log."""
    said = re.match(r"\d\d:\d\d:\d\d (?:step (\d+)/\d+  epoch)?", line)
    if said and int(said[1] or 0) % SHOWN_EVERY_STEPS == 0:
        print(line, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
