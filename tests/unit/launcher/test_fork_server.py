"""Ranks that are forked: they are what torchrun would have started, and where they could not be, nobody forks them.

One process is the agent of all tests here. It imports torch once, and starts the ranks that the tests ask it for.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.launcher import fork_server
from harness.launcher.fork_server import ForkServer, Order, Preload, Rank
from harness.runtime.torch_import import import_torch
from tests.support.cluster import alive, environment, wait_until

# --- the agent -------------------------------------------------------------------------------------------------------


def carry_out(started: ForkServer | None, order: dict[str, Any], said: list[str]) -> dict[str, Any]:
    """Starts a rank, does to it what the order says, and waits for its end."""
    out, err = Path(order["folder"], "out"), Path(order["folder"], "err")
    with out.open("w") as stdout, err.open("w") as stderr:
        arguments = [order.get("python", sys.executable), "-u", *order["command"]]
        given = {**os.environ, **order["environment"]}
        rank = started.start(arguments, given, stdout, stderr) if started else None
    if rank is None:
        return {"code": None, "said": said}
    if number := order["signal"]:
        wait_until(out.read_text, "a word of the rank")
        os.killpg(rank.pid, number)
    code = rank.wait(60)
    return {"code": code, "pid": rank.pid, "out": out.read_text(), "err": err.read_text(), "said": said}


def another(order: dict[str, Any]) -> dict[str, Any] | Order:
    """The same with a server of its own, which has imported nothing but torch and what the order says."""
    said: list[str] = []
    fork_server.OF_A_RANK = ()
    started = fork_server.start(Preload(order["preload"], order["folder"]), said.append)
    if isinstance(started, Order):
        return started
    if order["kills"] == "server" and started is not None:
        assert carry_out(started, {**order, "command": ["-m", "this"]}, said)["code"] == 0
        os.kill(started.pid, signal.SIGKILL)
    return carry_out(started, order, said)


def die_with_a_rank(order: dict[str, Any]) -> dict[str, Any] | Order:
    """An agent that is killed while a rank of its own is alive."""
    if agent := os.fork():
        assert os.waitpid(agent, 0)[1] == signal.SIGKILL
        return {"pids": json.loads(Path(order["folder"], "pids").read_text())}
    fork_server.OF_A_RANK = ()
    started = fork_server.start(Preload(), print)
    if isinstance(started, Order):
        return started
    assert started is not None
    rank = started.start([sys.executable, "-u", *order["command"]], os.environ, None, None)
    assert isinstance(rank, Rank)
    Path(order["folder"], "pids").write_text(json.dumps([started.pid, rank.pid]))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def together(started: ForkServer, order: dict[str, Any]) -> dict[str, Any]:
    """Two ranks at a time, which meet."""
    codes = []
    for _ in range(order["rounds"]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [
            started.start([sys.executable, "-u", *order["command"]], {**os.environ, **place, "RANK": str(rank)}, None, None)
            for rank in range(2)
        ]
        codes += [rank.wait(60) if rank else None for rank in ranks]
    return {"codes": codes}


def main() -> None:
    said: list[str] = []
    import_torch("torch")
    started = fork_server.start(Preload(), said.append)
    if isinstance(started, Order):
        fork_server.run(started)
        return
    for line in sys.stdin:
        order = json.loads(line)
        if order["kills"] == "agent":
            found = die_with_a_rank(order)
        elif "rounds" in order:
            assert started is not None
            found = together(started, order)
        else:
            found = another(order) if "preload" in order else carry_out(started, order, said)
        if isinstance(found, Order):
            fork_server.run(found)
            return
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    sys.exit()


class Agent:
    def __init__(self, process: subprocess.Popen, folder: Path) -> None:
        self.process, self.folder = process, folder

    def __call__(
        self, *command: str, env: dict[str, str] | None = None, number: int = 0, kills: str = "", **others: Any
    ) -> dict[str, Any]:
        order = {"command": command, "environment": env or {}, "signal": number, "kills": kills, **others}
        self.process.stdin.write(json.dumps({"folder": str(self.folder), **order}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """The agent, in a folder of its own."""
    folder = tmp_path_factory.mktemp("agent")
    with subprocess.Popen(
        [sys.executable, "-u", __file__],
        env={**environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Agent(process, folder)
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def write(agent):
    """Puts a program into the agent's folder."""

    def write(name: str, text: str) -> str:
        (agent.folder / name).write_text(text)
        return name

    return write


# --- what a rank is --------------------------------------------------------------------------------------------------

SHOWS = """
import json, os, sys
from pathlib import Path

def words(name):
    return Path("/proc/self", name).read_text().split("\\0")

print(json.dumps({
    **{name: repr(globals().get(name)) for name in ("__name__", "__package__", "__cached__", "__annotations__", "__doc__")},
    "file": __file__, "loader": type(__loader__).__name__, "spec": __spec__ and __spec__.name,
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": list(sys.flags), "cwd": os.getcwd(),
    "environment": dict(os.environ), "shown": [words("cmdline"), sorted(words("environ"))],
    "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()], "umask": os.umask(0), "nice": os.nice(0),
    "stdout": [sys.stdout.write_through, sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors],
    "signals": [str(__import__("signal").getsignal(number)) for number in (1, 2, 10, 12, 13, 15)],
}))
"""


@pytest.mark.parametrize("command", [["shows.py", "a", "b c"], ["-m", "shows", "--flag"]])
def test_a_rank_is_what_torchrun_would_have_started(agent, write, command):
    """Its program cannot tell, nor can anybody who looks at it."""
    write("shows.py", SHOWS)
    given = {**environment(), "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "1"}
    plain = subprocess.run(
        [sys.executable, "-u", *command],
        env=given,
        cwd=agent.folder,
        capture_output=True,
        start_new_session=True,
        check=True,
    )
    forked = agent(*command, env={"RANK": "1"})
    assert forked["code"] == 0, forked["err"]
    assert json.loads(forked["out"]) == json.loads(plain.stdout)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        ("import sys; sys.exit(76)", 76, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os; os._exit(7)", 7, ""),
        ("1 / 0", 1, None),
        ("def broken(:", 1, None),
        ("raise KeyboardInterrupt", -signal.SIGINT, None),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("import sys; sys.excepthook = lambda kind, *_: print(kind.__name__, file=sys.stderr); int('x')", 1, "ValueError\n"),
        ("import atexit, sys; atexit.register(print, 'at exit', file=sys.stderr); sys.exit(3)", 3, "at exit\n"),
    ],
)
def test_how_a_rank_ends(agent, write, text, code, words):
    """With Python's own codes; and in Python's own words, where it has any."""
    name = write("ends.py", text + "\n")
    ended = agent(name)
    assert ended["code"] == code, ended
    if words is None and code == 1:
        words = subprocess.run([sys.executable, name], cwd=agent.folder, capture_output=True, text=True, check=False).stderr
    assert words is None or ended["err"] == words
    assert words is not None or ended["err"].endswith("KeyboardInterrupt\n")


def test_what_a_rank_has_begun_is_finished(agent, write):
    """A thread is waited for, and a file that nobody has closed is written, as when Python ends."""
    name = write(
        "late.py",
        """
import threading, time
file = open("late", "w")
file.write("all of it")
threading.Thread(target=lambda: (time.sleep(0.2), print("the thread"))).start()
""",
    )
    ended = agent(name)
    assert (ended["code"], ended["out"]) == (0, "the thread\n")
    assert (agent.folder / "late").read_text() == "all of it"


def test_a_signal_to_its_group_reaches_what_it_has_started(agent, write):
    """torchrun ends a rank by its process group."""
    name = write(
        "waits.py",
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nprint(child.pid, flush=True)\nchild.wait()",
    )
    ended = agent(name, number=signal.SIGKILL)
    assert ended["code"] == -signal.SIGKILL
    wait_until(lambda: not alive(int(ended["out"])), "the end of the rank's own child")


MAIN = """
import json, multiprocessing, pickle, sys

class Sample:
    pass

def name(_):
    return __name__, Sample.__module__

if __name__ == "__main__":
    assert isinstance(pickle.loads(pickle.dumps(Sample())), Sample)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(name, [0]), sys.modules["__main__"].Sample is Sample)
"""


@pytest.mark.parametrize("command", [["main.py"], ["-m", "main"]])
def test_the_program_is_the_main_module(agent, write, command):
    """Its classes can be pickled, and processes that it spawns (loader workers, say) find them."""
    write("main.py", MAIN)
    ended = agent(*command)
    assert ended["code"] == 0, ended["err"]
    assert ended["out"] == "[('__mp_main__', '__mp_main__')] True\n"


def test_ranks_draw_different_numbers(agent, write):
    """Nobody has seeded them: neither they nor a restart may repeat what another one draws."""
    name = write(
        "draws.py",
        "import random, torch, numpy as np\n"
        "print(random.random(), torch.rand(1).item(), np.random.rand(), torch.initial_seed())",
    )
    drawn = [agent(name)["out"].split() for _ in range(3)]
    assert all(len({*column}) == 3 for column in zip(*drawn, strict=True)), drawn


def test_a_rank_has_its_own_number_of_threads(agent, write):
    """torch reads it while it is imported, which was before."""
    name = write("threads.py", "import torch\nprint(torch.get_num_threads())")
    assert [agent(name, env={"OMP_NUM_THREADS": count})["out"] for count in ("1", "2")] == ["1\n", "2\n"]


def test_what_only_torchrun_can_start(agent, write):
    """Another Python, a prefix, what is no script, and what is read while Python starts."""
    name = write("plain.py", "")
    refused = [
        *(agent(name, env=env) for env in ({"LD_PRELOAD": "x.so"}, {"PYTHONHASHSEED": "1"}, {"OMP_NUM_THREADS": "all"})),
        *(agent(name, python="/usr/bin/env"), agent("none.py"), agent(".")),
    ]
    assert [each["code"] for each in refused] == 6 * [None]
    assert agent(name)["code"] == 0


# --- where there is no server ----------------------------------------------------------------------------------------


def test_a_server_that_was_killed_is_not_waited_for(agent, write):
    """The next rank is torchrun's to start; there is nothing to tell."""
    assert agent(write("plain.py", ""), kills="server", preload=[]) == {"code": None, "said": []}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), name='mine', daemon=True).start()",
            "(mine)",
        ),
        ("import torch\ntorch.set_num_threads(2)\na = torch.ones(2000, 2000)\na @ a", r"has started \d+ thread"),
        ("raise ValueError('no such thing')", "raised ValueError: no such thing; so each rank imports all by itself"),
        ("import nothing_of_that_name", "raised ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ],
)
def test_a_module_after_which_nobody_may_fork(agent, write, text, words):
    """It has started a thread, as an operation on tensors does, or cannot be imported: it is named, and nobody is forked."""
    write("heavy.py", text)
    found = agent(write("plain.py", ""), preload=["json", "heavy"])
    assert found["code"] is None
    (said,) = found["said"]
    assert said.startswith("--preload heavy: the import ")
    assert re.search(words if "\\" in words else re.escape(words), said)


def test_files_that_a_driver_has_opened(tmp_path):
    """A process that has opened one of them has used a GPU."""
    with open(tmp_path / "kfd", "w"):
        assert fork_server._opened(("/nowhere", f"{tmp_path}/k")) == [f"{tmp_path}/kfd"]
    assert not fork_server._opened(("/nowhere", f"{tmp_path}/k"))


def test_a_module_that_was_preloaded_is_there(agent, write):
    """Its import is the server's; the rank has it, and its own folder first on the path."""
    write("heavy.py", "import os\nmaker = os.getpid()")
    name = write("uses.py", "import os, sys\nprint('heavy' in sys.modules)\nimport heavy\nprint(heavy.maker != os.getpid())")
    assert agent(name, preload=["heavy"])["out"] == "True\nTrue\n"


def test_a_killed_agent_leaves_nobody(agent, write):
    """Neither the server nor a rank that does not know of harness."""
    pids = agent(write("sleeps.py", "import time\ntime.sleep(600)"), kills="agent")["pids"]
    wait_until(lambda: not any(map(alive, pids)), "the end of the server and of the rank", seconds=10)


@pytest.mark.soak
def test_a_hundred_forked_ranks_compute(agent, write):
    """With a pool of threads, the engine of autograd, and a group: none hangs, as it would after an operation before the
    fork."""
    name = write(
        "computes.py",
        """
import torch
from torch import distributed
torch.set_num_threads(2)
a = torch.randn(600, 600, requires_grad=True)
(a @ a).sum().backward()
distributed.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(600, 600))
model(a.detach()).sum().backward()
distributed.all_reduce(a.grad)
distributed.destroy_process_group()
""",
    )
    assert agent(name, rounds=50)["codes"] == 100 * [0]
