"""The process that ranks are forked from: it has imported what they need, so that a restart imports nothing.

torchrun's agent forks it, once the agent has imported torch and before it has anything else: no thread, no connection, no
operation on a tensor. A rank that is forked twice from it (``_serve``) becomes the agent's own child. So it is, for torchrun
and for harness, as any process that they have started: its exit code, signals, session, group and parent.

What such a rank has from its order instead of from its parent: arguments, environment, stdout and stderr. What it must not
share with its siblings is made anew: the state of the random generators. Its program runs at the bottom of a stack of its
own, as ``__main__``, and ends as Python ends.

A fork copies one thread and none of a driver's state. So the server refuses to serve where an import has started a thread
that does not know of forks, or has touched a GPU. Whenever anything is not as it must be, ``ForkServer.start`` returns None,
and torchrun starts the rank by itself.
"""

import builtins
import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from harness.runtime.console import here
from harness.runtime.environment import rank, size
from harness.runtime.gc_pause import without_collections
from harness.runtime.signals import STOP_SIGNALS, die_with_parent, ignore_stop_signals

VARIABLE = "HARNESS_FORK_SERVER"  # 0: torchrun starts the ranks by itself
PRELOAD_VARIABLE = "HARNESS_PRELOAD"  # from the launcher to the agent
IMPORT_SECONDS = 120.0  # that the first ranks wait for the server's imports, which they would have to make themselves
ANSWER_SECONDS = 1.0  # for a fork
# What a rank of harness imports. They are names: nothing of a training enters the agent.
OF_A_RANK = (
    *("torch._dynamo", "torch.distributed", "encodings.idna"),
    *("harness.cli", "harness.training.loop", "harness.training.run"),
)
# Read while Python, its libraries and their threads start.
_READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_", "MALLOC_", "GLIBC_")
THREADS_VARIABLE = "OMP_NUM_THREADS"
_PRELOADED = "--preload "
_READY = b"ready"
_GO = b"go"
_GPUS = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/dxg")  # what drivers open: NVIDIA's, AMD's, Intel's, of WSL
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14


@dataclass(frozen=True)
class Preload:
    """Modules that the user names, and the folder that is first on the path of the program; empty for that of a module."""

    modules: Sequence[str] = ()
    path: str = ""

    @classmethod
    def take(cls) -> Self:
        """What the launcher has left in the environment."""
        return cls(**json.loads(os.environ.pop(PRELOAD_VARIABLE, "{}")))

    def leave(self) -> dict[str, str]:
        """What the launcher leaves there."""
        return {PRELOAD_VARIABLE: json.dumps(asdict(self))}


@dataclass(frozen=True)
class Order:
    """A rank to be: ``-m``, a module, or else a script, with arguments; its environment; how many threads it computes with,
    where that is not what the server has imported torch with."""

    command: list[str]
    environment: dict[str, str]
    threads: int | None = None


class ForkServer:
    """The agent's side."""

    def __init__(self, pid: int, control: socket.socket, say: Callable[[str], None]) -> None:
        self.pid = pid
        self._control: socket.socket | None = control
        self._say = say
        self._is_ready = False
        self._began_with = dict(os.environ)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: IO[str] | None, stderr: IO[str] | None
    ) -> "Rank | None":
        """A rank, where it would be as one that torchrun starts."""
        order = self._order(arguments, environment)
        if order is None or not self._serves():
            return None
        assert self._control is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Only now: what else loses its parent goes to process 1, which waits for it.
        with ours, theirs, _adopting(), os.fdopen(os.memfd_create("order"), "w+") as written:
            json.dump(asdict(order), written)
            written.flush()
            streams = [each.fileno() if each else number for number, each in ((1, stdout), (2, stderr))]
            try:
                socket.send_fds(self._control, [b"order"], [written.fileno(), *streams, theirs.fileno()])
                theirs.close()  # or its end would never be heard of
                ours.settimeout(ANSWER_SECONDS)
                pid = int(ours.recv(32))
                ours.send(_GO)
            except (OSError, ValueError):  # dead, or too slow: a child that comes too late finds nobody and ends
                return None
        return Rank(list(arguments), pid)

    def _order(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Order | None:
        """None for what only torchrun can start: numactl, another Python, what is no plain script."""
        interpreter, *command = arguments
        if interpreter != sys.executable or command[:1] != ["-u"] or len(command) < 2:
            return None
        command = command[1:]
        if command[0] != "-m" and not (command[0].endswith(".py") and os.path.isfile(command[0])):
            return None
        names = {name for name in {*environment, *self._began_with} if name.startswith(_READ_AT_START)}
        differing = {name for name in names if environment.get(name) != self._began_with.get(name)}
        threads = environment.get(THREADS_VARIABLE, "")
        if differing - {THREADS_VARIABLE} or (
            differing and not (threads.isascii() and threads.isdecimal() and int(threads))
        ):
            return None
        return Order(command, dict(environment), int(threads) if differing else None)

    def _serves(self) -> bool:
        """Whether the server is there. Waits for its imports, and says why it cannot serve."""
        if self._control is None or self._is_ready:
            return self._control is not None
        refusal = b""
        if select.select([self._control], [], [], IMPORT_SECONDS)[0]:
            refusal = self._control.recv(1 << 16)
        if refusal == _READY:
            self._is_ready = True
            return True
        if refusal:
            self._say(refusal.decode(errors="replace"))
        self.close()
        return False

    def close(self) -> None:
        """Ends the server; ranks are not touched."""
        if self._control is None:
            return
        self._control.close()
        self._control = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@dataclass
class Rank:
    """A rank that this process has adopted, with what torchrun uses of ``subprocess.Popen``."""

    args: list[str]
    pid: int
    returncode: int | None = None
    _pidfd: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or ``subprocess.TimeoutExpired``."""
        if self.poll() is None:
            select.select([self._pidfd], [], [], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Sends it a signal, while it is there."""
        if self.poll() is None:
            os.kill(self.pid, number)


@contextlib.contextmanager
def _adopting() -> Any:
    """Has this process adopt what loses its parent among its descendants."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def preset_threads(torchrun_arguments: Sequence[str]) -> bool:
    """Sets how many threads torch is to be imported for, as torchrun will set it for its ranks: one, where there are several
    ranks and the user has said nothing. Whether it was set here."""
    if THREADS_VARIABLE in os.environ or _is_single(torchrun_arguments):
        return False
    os.environ[THREADS_VARIABLE] = "1"
    return True


def _is_single(torchrun_arguments: Sequence[str]) -> bool:
    """Whether there will be a single rank. A wrong guess is noticed when the ranks start."""
    count = os.environ.get("PET_NPROC_PER_NODE", "1")
    for word, following in zip(torchrun_arguments, [*torchrun_arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == "--nproc-per-node":
            count = value if equals else following
            break
    if count in ("auto", "gpu"):
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [*Path("/dev").glob("nvidia[0-9]*")]
        return len(devices) == 1 or (not devices and count == "auto" and os.cpu_count() == 1)
    return count == "1"


def is_wanted() -> bool:
    """Whether this process may fork one: on Linux, started as torchrun starts ranks, unless the user wants none."""
    is_plain = sys.orig_argv[1:3] == ["-u", "-m"]  # no -X, no -W
    return sys.platform == "linux" and is_plain and os.environ.get(VARIABLE) != "0"


def start(preload: Preload, say: Callable[[str], None]) -> "ForkServer | Order | None":
    """Forks the server from this process, which has imported torch and nothing that runs.

    Comes back three times: in the agent with the server (None where there can be none); in each rank with its order.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent = os.getpid()
    if not (server := os.fork()):
        ours.close()
        die_with_parent(agent)
        return _serve(theirs, agent, preload)
    theirs.close()
    found = ForkServer(server, ours, say)
    if trouble := _trouble():  # after a fork: what minds forks has ended its threads before it
        say(f"ranks cannot be forked: importing torch {trouble}")
        found.close()
        return None
    return found


# --- the server's side -----------------------------------------------------------------------------------------------


def _serve(control: socket.socket, agent: int, preload: Preload) -> Order:
    """Forks a rank for each order; comes back in the rank only."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignore_stop_signals()  # Slurm sends them to every process
    refusal = _prepare(preload)
    control.send(refusal.encode()[: 1 << 15] or _READY)
    while not refusal:
        message, descriptors, _, _ = socket.recv_fds(control, len(_READY), 4)
        if not message:
            break
        if not (child := os.fork()):
            middle = os.getpid()
            if os.fork():
                os._exit(0)
            control.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            return _become_rank(middle, agent, descriptors)
        os.waitpid(child, 0)
        for descriptor in descriptors:
            os.close(descriptor)
    os._exit(0)


def _prepare(preload: Preload) -> str:
    """Imports what ranks need; why none can be forked then, if so."""
    with without_collections():
        for name in OF_A_RANK:
            with contextlib.suppress(ModuleNotFoundError):  # torch._dynamo is not public
                importlib.import_module(name)
        if preload.path and not sys.flags.safe_path:
            sys.path[0] = preload.path
        blamed = "what a rank needs"
        for name in preload.modules:
            blamed = f"{_PRELOADED}{name}"
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever somebody's module raises
                return _without(blamed, f"raised {type(error).__name__}: {error}")
            if trouble := _trouble_after_fork():
                return _without(blamed, trouble)
        trouble = _trouble_after_fork()
        gc.freeze()
    return _without(blamed, trouble) if trouble else ""


def _without(blamed: str, trouble: str) -> str:
    advice = ". Leave this module out" if blamed.startswith(_PRELOADED) else ""
    return f"{blamed}: the import {trouble}; so each rank imports all by itself, at each restart{advice}"


def _trouble_after_fork() -> str:
    """As ``_trouble``, once a fork has ended the threads of libraries that mind forks, as OpenBLAS does."""
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    return _trouble()


def _trouble() -> str:
    """What a fork would not survive: another thread, or a GPU in use; empty where there is none."""
    deadline = time.monotonic() + 0.5  # a thread that has ended is gone a little later
    while (count := len(os.listdir("/proc/self/task")) - 1) and time.monotonic() < deadline:
        time.sleep(0.001)
    if count:
        names = [each.name for each in threading.enumerate() if each is not threading.main_thread()]
        return f"has started {count} thread{'s' * (count > 1)} ({', '.join(names) or 'in a library'})"
    torch: Any = sys.modules["torch"]
    kind = torch.accelerator.current_accelerator()  # of those that this torch was made for
    is_initialized = getattr(torch.get_device_module(kind), "is_initialized", None) if kind is not None else None
    if (is_initialized is not None and is_initialized()) or _opened(_GPUS):
        return "has used a GPU"
    return ""


def _opened(prefixes: tuple[str, ...]) -> list[str]:
    """The files of this process whose names begin in one of these ways."""
    found = []
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{each}"))
    return [name for name in found if name.startswith(prefixes)]


# --- the rank --------------------------------------------------------------------------------------------------------


def _become_rank(middle: int, agent: int, descriptors: Sequence[int]) -> Order:
    """Makes this process the agent's child, and what its order says; ends it where the agent has given up waiting."""
    while os.getppid() == middle:
        time.sleep(0.0001)
    die_with_parent(agent)
    os.setsid()
    written, stdout, stderr, answer = descriptors
    with socket.socket(fileno=answer) as line:
        try:
            line.send(b"%d" % os.getpid())
            goes = line.recv(len(_GO)) == _GO
        except OSError:
            goes = False
    if not goes:
        os._exit(0)
    with os.fdopen(written) as file:
        file.seek(0)
        order = Order(**json.load(file))
    for number, descriptor in ((1, stdout), (2, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order.environment)
    here.rank, here.ranks = rank(), size()
    _seed()
    if order.threads is not None:
        sys.modules["torch"].set_num_threads(order.threads)
    _show(order)
    return order


def _seed() -> None:
    """A process that nobody seeds draws numbers of its own. Python sees to that after a fork; NumPy and torch do not."""
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed()
    sys.modules["torch"].default_generator.seed()


def run(order: Order) -> None:
    """Runs the program of a rank as Python would: returns at its end, or raises ``SystemExit``.

    An error goes to ``sys.excepthook`` first, without the frames of harness; then Python ends as after any error.
    """
    command = order.command
    sys.orig_argv[1:] = ["-u", *command]
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    try:
        if command[0] == "-m":
            sys.argv[:] = ["-m", *command[2:]]
            if not sys.flags.safe_path:
                sys.path[0] = os.getcwd()
            runpy._run_module_as_main(command[1])  # type: ignore[attr-defined]  # what Python itself calls
        else:
            sys.argv[:] = command
            _run_script(command[0], main)
    except (SystemExit, KeyboardInterrupt):  # Python knows what to do
        raise
    except BaseException as error:  # an interpreter catches everything
        raised = error
    else:
        return
    trace = raised.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(raised), raised.with_traceback(trace), trace)
    raise SystemExit(1)


def _run_script(name: str, main: types.ModuleType) -> None:
    path = os.path.abspath(name)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(name))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    vars(main).update(__file__=path, __cached__=None, __loader__=loader)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)  # noqa: S102  # the user's program


class _Map(ctypes.Structure):
    """``struct prctl_mm_map`` of linux/prctl.h."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("start_code", "end_code", "start_data", "end_data", "start_brk", "brk")),
        *((name, ctypes.c_uint64) for name in ("start_stack", "arg_start", "arg_end", "env_start", "env_end", "auxv")),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


_shown: list[Any] = []  # what the kernel shows must stay where it is


def _show(order: Order) -> None:
    """Has ``ps`` and /proc show the rank's own arguments and environment, where the kernel lets it."""
    command = [sys.executable, "-u", *order.command]
    arguments, environment = (
        b"".join(os.fsencode(each) + b"\0" for each in words)
        for words in (command, [f"{name}={value}" for name, value in order.environment.items()])
    )
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        text = ctypes.create_string_buffer(arguments + environment)
        begin = ctypes.addressof(text)
        middle, end = begin + len(arguments), begin + len(arguments) + len(environment)
        numbers = ["0", "0", "0", *Path("/proc/self/stat").read_text().rpartition(")")[2].split()]  # as proc(5) counts them
        places = [int(numbers[number]) for number in (26, 27, 45, 46, 47)]
        libc = ctypes.CDLL(None)
        libc.sbrk.restype = ctypes.c_void_p
        found = _Map(*places, libc.sbrk(0), int(numbers[28]), begin, middle, middle, end, 0, 0, 0xFFFFFFFF)
        if not libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(found), ctypes.c_ulong(ctypes.sizeof(found)), 0):
            _shown.append(text)
