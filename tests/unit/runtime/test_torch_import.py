"""How a program that trains starts and ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import harness


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=100)
    return done.stdout.strip()


def test_the_collector_passes_over_torch():
    """Over all of it, an optimizer's imports included, and over nothing else."""
    program = """
import gc, sys
from harness.runtime.torch_import import import_torch
import_torch()
frozen = gc.get_freeze_count()
before = set(sys.modules)
import torch
torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
new = [name for name in sys.modules if name not in before]
import_torch()
print(frozen > 200_000, gc.isenabled(), len(new) < 10, gc.get_freeze_count() == frozen)
"""
    assert run(program) == "True True True True"


def test_a_fork_afterwards_finds_no_lock_taken(tmp_path):
    """A thread's last work, which a library does for it once Python is done with it, is over: what a library locks meanwhile
    would stay locked in a fork."""
    (tmp_path / "lasting.py").write_text("""
import ctypes
libc, key = ctypes.CDLL(None), ctypes.c_uint()
libc.pthread_key_create(ctypes.byref(key), ctypes.cast(libc.usleep, ctypes.c_void_p))
libc.pthread_setspecific(key, ctypes.c_void_p(300_000))
""")
    program = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
from harness.runtime.torch_import import import_torch
before = os.listdir("/proc/self/task")
import_torch("lasting")
print(os.listdir("/proc/self/task") == before)
"""
    assert run(program) == "True"


def test_torchrun_itself_starts_so():
    """``harness launch`` runs it as ``harness.launcher.agent``, with torchrun's own command line and its own exit code."""
    program = """
import gc, sys
sys.argv[1:] = ["--standalone", "--nproc-per-node=1", "--no-python", "true"]
import runpy
runpy.run_module("harness.launcher.agent", run_name="__main__", alter_sys=True)
print(gc.get_freeze_count() > 100_000, gc.isenabled())
"""
    assert run(program) == "True True"
    command = [sys.executable, "-m", "harness.launcher.agent", "--standalone", "--nproc-per-node=1", "--no-python", "false"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "ChildFailedError" in done.stderr


def test_an_optimizer_would_import_the_rest():
    """What is imported beforehand costs nothing that would not have been paid for. Should torch change, this is to go."""
    program = "import sys, torch; torch.optim.SGD(torch.nn.Linear(2, 2).parameters()); print('torch._dynamo' in sys.modules)"
    assert run(program) == "True"


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("raise OSError('libcudart.so: cannot open')", "OSError libcudart.so: cannot open"),
        ("raise ModuleNotFoundError('No module', name='torch')", "ConfigError No module: PyTorch is needed; install it for"),
    ],
)
def test_the_first_error_is_the_one_that_is_seen(tmp_path, torch, expected):
    """A second import of a half-imported torch would end in another one."""
    (tmp_path / "torch.py").write_text(torch)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from harness.runtime.torch_import import import_torch
try:
    import_torch()
except Exception as error:
    print(type(error).__name__, error)
"""
    assert run(program).startswith(expected)


def test_what_was_there_before_is_left_alone():
    """A program that has imported torch itself may have made whatever it likes since."""
    imports = "import gc, torch; from harness.runtime.torch_import import import_torch"
    program = f"{imports}; import_torch(); print(gc.get_freeze_count())"
    assert run(program) == "0"


def test_what_a_task_leaves_open_is_flushed(tmp_path):
    """Python collects what refers to itself at the end of a program, a log file that was never closed among it. A task's own
    objects are not frozen."""
    (tmp_path / "task.py").write_text("""
import gc
from pathlib import Path
from harness.tasks.linear import build as build_linear

class Log:
    def __init__(self):
        self.file = Path("log.txt").open("w")
        self.callbacks = [self.write]  # a reference to itself
    def write(self, text):
        self.file.write(text)

of_the_module = Log()
of_the_module.write("module ")

def build():
    task = build_linear()
    task.model.log = Log.__new__(Log)
    task.model.log.file = Path("log2.txt").open("w")
    task.model.log.callbacks = [task.model.log.write]
    task.model.log.write(f"task {gc.get_freeze_count() > 200_000} {gc.isenabled()}")
    return task
""")
    done = harness("train", _config(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log.txt").read_text() == "module "
    assert (tmp_path / "log2.txt").read_text() == "task True True"


def _config(place: Path) -> str:
    (place / "config.yaml").write_text("task: task.py:build\ntrain: {steps: 2, global_batch_size: 4}\n")
    return "config.yaml"
