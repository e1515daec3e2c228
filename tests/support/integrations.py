"""Scripts of ``docs/examples/integrations``, left alone and killed, with the libraries of an environment of their own."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import launch, newest, wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples" / "integrations"
LIBRARIES = (
    str(Path(folder).absolute()) if (folder := os.environ.get("INTEGRATION_LIBRARIES")) else ""
)  # where `make test-integrations` has installed them
PATIENCE_SECONDS = 400.0  # importing these libraries takes long on a busy machine


End = Mapping[str, Any]


def require(*names: str) -> None:
    """Skips a test where a library is not installed."""
    for name in names:
        if not (Path(LIBRARIES) / name).is_dir() and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make test-integrations")


def run(directory: Path, script: Path, *arguments: str, ranks: int, kills: int = 0, **env: str) -> str:
    """Runs a script on some ranks to its end, and returns its output. After the first save of each attempt but the last, one
    rank is killed."""
    saved = directory / "runs"
    command = ("-m", "harness", "launch", f"--max-restarts={kills}", f"--nproc-per-node={ranks}", "--", str(script))
    path = os.pathsep.join([*([LIBRARIES] if LIBRARIES else []), str(ROOT)])
    variables = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **env}
    with launch(directory, None, *arguments, command=command, env=variables) as started:
        for number in range(1, kills + 1):
            started.wait(
                lambda number=number: saved.exists() and any(saved.glob(f"*/step-*-{number:06}-*/manifest.json")),  # type: ignore[misc]
                f"the first save of attempt {number}",
                PATIENCE_SECONDS,
            )
            started.kill_rank(-number % ranks)
        wait_until(lambda: started.process.poll() is not None, "the end", PATIENCE_SECONDS)
        output = started.output()
        assert started.process.returncode == 0, output[-6000:]
    if kills:
        assert output.count("resuming from step-") == kills, output[-6000:]
    return output


def killed_thrice(directory: Path, script: Path, ranks: int, *, alike: Sequence[str]) -> tuple[End, End]:
    """The ends of two runs of a script, the second of which lost a rank three times, in the middle of an epoch. They have
    the same step, and the same bits of the parts that are to be ``alike``."""
    run(directory / "straight", script, ranks=ranks)
    run(directory / "killed", script, ranks=ranks, kills=3)
    straight, killed = end_of(directory / "straight"), end_of(directory / "killed")
    assert killed["step"] == straight["step"]
    for name in alike:
        assert killed["digests"][name] == straight["digests"][name], name
    return straight, killed


def end_of(directory: Path) -> End:
    """The newest checkpoint of the run in a directory: its step, its digests and its parts."""
    (url,) = (each for each in (directory / "runs").iterdir() if any(each.glob("step-*")))
    return newest(url)
