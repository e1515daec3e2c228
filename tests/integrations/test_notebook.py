"""A loop with ``harness.Run`` in a notebook, in a real kernel of Jupyter."""

import os
import signal
import threading

import pytest

from tests.support.cluster import newest, wait_until
from tests.support.integrations import LIBRARIES, PATIENCE_SECONDS, ROOT, require

pytestmark = pytest.mark.filterwarnings("default")

CELLS = [
    """
import logging, os, signal, sys, threading, time, torch, harness
def installed():
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGHUP]
    hooks = [sys.excepthook, sys.unraisablehook, os._exit, threading.excepthook, torch.utils.data.DataLoader.__iter__]
    return [*map(signal.getsignal, signals), *hooks, *logging.getLogger().handlers, *sys.meta_path]
before = installed()
""",
    """
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
run = harness.Run(URL, {"model": model, "optimizer": optimizer}, every_steps=7)
""",
    """
for step in run.steps(80):
    loss = model(torch.randn(4, 2)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.step(loss=loss)
    time.sleep(SECONDS)
""",
    "run.close()",
]


class Notebook:
    """A kernel, and what runs its cells."""

    def __init__(self, monkeypatch):
        from jupyter_client.manager import start_new_kernel

        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([LIBRARIES, str(ROOT)]))
        self.manager, self.client = start_new_kernel(kernel_name="python3", startup_timeout=PATIENCE_SECONDS)

    def run(self, code: str) -> tuple[str, str]:
        """Whether a cell was ``ok``, and what it has printed, or the last line of its error."""
        printed = []

        def take(message):
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))

        reply = self.client.execute_interactive(code, timeout=PATIENCE_SECONDS, output_hook=take)
        return reply["content"]["status"], "".join(printed)

    def run_all(self, url, seconds: float = 0) -> list[tuple[str, str]]:
        """Each cell, up to the first one that fails."""
        done = [self.run(f"URL, SECONDS = {str(url)!r}, {seconds}")]
        for cell in CELLS:
            if done[-1][0] == "ok":
                done.append(self.run(cell))
        return done

    def interrupt_when(self, found) -> threading.Thread:
        """As the stop button, as soon as something is so."""

        def watch():
            wait_until(found, "what comes before the interrupt", PATIENCE_SECONDS)
            self.manager.interrupt_kernel()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def left(self) -> str:
        """What is installed after the cells and was not before."""
        return self.run("print([each for each in installed() if each not in before])")[1].strip()


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    require("jupyter_client", "ipykernel")
    if LIBRARIES:
        monkeypatch.syspath_prepend(LIBRARIES)
    monkeypatch.chdir(tmp_path)
    made = Notebook(monkeypatch)
    yield made
    made.client.stop_channels()
    made.manager.shutdown_kernel(now=True)


def test_interrupted_restarted_and_killed(notebook, tmp_path):
    """The step is saved, and the same cells go on to the same bits. No cell leaves a handler or a hook in the process."""
    straight, url = tmp_path / "straight", tmp_path / "interrupted"
    assert [each[0] for each in notebook.run_all(straight)] == ["ok"] * 5
    assert notebook.left() == "[]"

    watch = notebook.interrupt_when(lambda: any(url.glob("step-*/manifest.json")))
    *_, (status, said) = notebook.run_all(url, seconds=0.1)
    watch.join()
    assert status == "error"
    assert "KeyboardInterrupt" in said
    assert notebook.left() == "[]"
    first = newest(url)["step"]
    assert f"step {first}/80  saved" in said, "the last step is saved, not an older one"

    watch = notebook.interrupt_when(lambda: newest(url)["step"] > first)
    done = notebook.run_all(url, seconds=0.1)
    watch.join()
    assert f"step {first}\n" in done[2][1], "it goes on in the same kernel"
    assert done[-1][0] == "error"

    notebook.manager.restart_kernel(now=False)
    notebook.client.wait_for_ready(timeout=PATIENCE_SECONDS)
    second = newest(url)["step"]
    killed = threading.Thread(
        target=lambda: (
            wait_until(lambda: newest(url)["step"] > second, "a save", PATIENCE_SECONDS),
            notebook.manager.signal_kernel(signal.SIGKILL),
        )
    )
    killed.start()
    notebook.client.execute(f"URL, SECONDS = {str(url)!r}, 0.1")
    for cell in CELLS:
        notebook.client.execute(cell)
    killed.join()
    notebook.manager.restart_kernel(now=True)
    notebook.client.wait_for_ready(timeout=PATIENCE_SECONDS)
    third = newest(url)["step"]
    assert second < third < 80

    done = notebook.run_all(url)
    assert [each[0] for each in done] == ["ok"] * 5
    assert f"step {third}\n" in done[2][1]
    assert newest(url)["step"] == 80
    for name in ("model", "optimizer"):
        assert newest(url)["digests"][name] == newest(straight)["digests"][name], name
    assert notebook.left() == "[]"
