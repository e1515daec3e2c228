"""Scripts of ``docs/examples/integrations``, left alone and killed, with the libraries of an environment of their own."""

import importlib.util
import os
from collections.abc import Mapping
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


def end_of(directory: Path) -> Mapping[str, Any]:
    """The newest checkpoint of the run in a directory: its step, its digests and its parts."""
    (url,) = (each for each in (directory / "runs").iterdir() if any(each.glob("step-*")))
    return newest(url)
