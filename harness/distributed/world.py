"""The processes of a run: rank, world size, device, and agreement between them.

``World`` has a twin for one plain process, ``SoloWorld``, so that nothing above asks whether there is a process group.

Two groups are made. The *training* group (NCCL on GPUs) belongs to DDP. Everything that harness itself has to say —
who resumes from what, random states for a checkpoint, whether to stop — goes over a *control* group of its own, gloo on
the CPU: it never waits for a GPU, and never stands in the way of a gradient.
"""

import contextlib
import logging
import math
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import tenacity
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, and not in __all__
from torch.distributed.distributed_c10d import PrefixStore, Store

from harness.config import WorldConfig
from harness.distributed import device as devices
from harness.errors import ConfigError, RankFailure
from harness.runtime.console import here
from harness.runtime.environment import (
    Ranks,
    is_under_torchrun,
    lends_its_store,
    local_rank,
    local_size,
    max_restarts,
    nodes,
    rank,
    ranks,
    size,
    strangers,
)

log = logging.getLogger(__name__)

TEXT_BYTES = 192  # of what ``all_gather_text`` takes
ROW_BYTES, _SIZE_BYTES = 120, 8  # of what each rank sends in a ``gather``: a value, and before it its size
NAME_SECONDS = 5.0  # for a name server that is slow, or starts with the ranks


class World(Protocol):
    """What the rest of harness knows of the other processes."""

    rank: int
    size: int
    device: torch.device
    backend: str

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is to be called in training."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, by rank, on rank 0; None elsewhere."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""

    def all_gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, by rank, on every rank, in float64: as many on each. Ten times as fast as ``all_gather``."""

    def all_gather_text(self, text: str) -> list[str]:
        """Every rank's text, by rank, on every rank: ASCII, at most ``TEXT_BYTES``. Much faster than ``all_gather``."""

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copies rank 0's tensors over everyone's, on the device."""

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        """Fills ``found`` with every rank's bytes, by rank: flat tensors of bytes on the CPU, all of the same size."""

    def hand_out(self, own: torch.Tensor, sizes: list[int], found: torch.Tensor, sizes_found: list[int]) -> None:
        """Gives each rank its part of ``own``, by rank, and fills ``found`` with what each has for this one: flat tensors of
        bytes on the CPU, in parts of these sizes."""

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Begins to find the largest of each value over the ranks, and does not wait: that does what is returned."""

    def close(self) -> None:
        """Waits for all ranks and takes the groups down."""

    def let_go(self) -> None:
        """Takes down what was made here for other ranks to be heard, before Python ends: the threads end with it. One that
        lives on, and has something of Python's to give back while Python ends, takes the process down (torch 2.13), at the
        end of a run that went well."""


class SoloWorld:
    """One plain process: it is rank 0 of 1, and always agrees with itself."""

    rank = 0
    size = 1
    backend = "none"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def all_gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]

    def all_gather_text(self, text: str) -> list[str]:
        return [text]

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        found[0].copy_(own)

    def hand_out(self, own: torch.Tensor, sizes: list[int], found: torch.Tensor, sizes_found: list[int]) -> None:  # noqa: ARG002
        found.copy_(own)

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        return lambda: list(values)

    def close(self) -> None:
        pass

    def let_go(self) -> None:
        pass


class TorchrunWorld:
    """A process among those that torchrun started. Joins the others when it is made, where the program has not done so."""

    has_joined = False  # a group that is there was made here

    def __init__(self, device: torch.device, backend: str, timeout_seconds: float) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        if not dist.is_initialized():
            place = ranks()
            assert place is not None, "it is one of several"
            dist.init_process_group(
                backend,
                store=_fresh_store(place, timeout),
                rank=place.rank,
                world_size=place.size,
                timeout=timeout,
                device_id=device if devices.of(device).is_async else None,
            )
            TorchrunWorld.has_joined = True
        elif not TorchrunWorld.has_joined and dist.get_rank() == 0 and lends_its_store() and max_restarts():
            log.warning(
                "a restart under this torchrun may fail several times (torch 2.13 gives its workers a store with "
                "old addresses): use harness launch, or export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            )
        self.rank, self.size = here.rank, here.ranks = dist.get_rank(), dist.get_world_size()
        self.device = device
        # "cpu:gloo,cuda:nccl", or so; a group that was made without naming any calls itself "undefined".
        backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
        self.backend = backends.get(device.type, "none")
        self._control: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout)

    def wrap(self, model: nn.Module) -> nn.Module:
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise ConfigError(
                "the task's model is sharded (fully_shard, tensor parallelism), which harness train does not train; use "
                "harness.Run in a loop of your own"
            )
        if self.size == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        indices = [self.device.index] if devices.of(self.device).is_async else None
        return nn.parallel.DistributedDataParallel(model, device_ids=indices)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """What does not fit into the row that each rank sends, it sends alone: most values are small, and torch's
        ``gather_object`` meets twice, once for the sizes."""
        data = pickle.dumps(value)
        own = _bytes_tensor(len(data).to_bytes(_SIZE_BYTES, "little") + data[:ROW_BYTES].ljust(ROW_BYTES))
        if self.rank != 0:
            dist.gather(own, dst=0, group=self._control)
            if rest := data[ROW_BYTES:]:
                dist.send(_bytes_tensor(rest), dst=0, group=self._control)
            return None
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.gather(own, rows, dst=0, group=self._control)
        return [value, *(self._received(other, rows[other].numpy().tobytes()) for other in range(1, self.size))]

    def _received(self, other: int, row: bytes) -> Any:
        """What a rank gathers: its row, and what did not fit into it."""
        size_bytes, first = int.from_bytes(row[:_SIZE_BYTES], "little"), row[_SIZE_BYTES:]
        rest = torch.empty(max(size_bytes - len(first), 0), dtype=torch.uint8, device="cpu")
        if len(rest):
            dist.recv(rest, src=other, group=self._control)
        return pickle.loads(first[:size_bytes] + rest.numpy().tobytes())  # noqa: S301  # of this very program

    def all_gather(self, value: Any) -> list[Any]:
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def all_gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device="cpu")
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._control)
        return [each.tolist() for each in found]

    def all_gather_text(self, text: str) -> list[str]:
        assert len(text) <= TEXT_BYTES
        own = _bytes_tensor(text.ljust(TEXT_BYTES).encode("ascii"))
        found = torch.empty((self.size, TEXT_BYTES), dtype=torch.uint8, device="cpu")
        dist.all_gather([*found], own, group=self._control)
        return [bytes(each).decode("ascii").rstrip() for each in found.numpy()]

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)  # gloo knows few dtypes, and all know bytes
            dist.broadcast(raw, src=0)
            tensor.detach().copy_(raw.view(tensor.dtype).view(tensor.shape))

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        dist.all_gather(list(found), own, group=self._control)

    def hand_out(self, own: torch.Tensor, sizes: list[int], found: torch.Tensor, sizes_found: list[int]) -> None:
        dist.all_to_all_single(found, own, sizes_found, sizes, group=self._control)

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        work: Any = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return wait

    def close(self) -> None:
        # torchrun keeps the rendezvous open for five minutes after the first rank has gone: nobody leaves before rank 0 has
        # finished its last save.
        dist.barrier(group=self._control)
        dist.destroy_process_group()
        self.let_go()

    def let_go(self) -> None:
        control, self._control = self._control, None
        if control is not None and dist.is_initialized():  # else the program has taken down all groups itself
            with contextlib.suppress(ValueError):  # and has joined anew since
                dist.destroy_process_group(control)


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def join_world(config: WorldConfig | None = None) -> World:
    """Returns the world of this process: torchrun's ranks, or one plain process.

    Joins the other ranks if the program has not done so. Before that, raises ``ConfigError`` if the configuration asks for
    something that the machine does not have.
    """
    config = config or WorldConfig()
    is_alone = not dist.is_initialized() and ranks() is None
    device = choose_device(config)
    if is_alone:
        return _alone(device)
    if is_under_torchrun() and rank() == 0 and nodes() == 1 and (others := strangers()):
        log.warning(
            "%s, but this torchrun knows of no other: start each with the same --rdzv-endpoint to train together", others
        )
    return TorchrunWorld(device, choose_backend(config, device), config.timeout_seconds)


def world_of_program(device: torch.device, timeout_seconds: float) -> World:
    """The world that the program is already in, with its own device. Raises ``ConfigError`` where it has yet to join it."""
    if dist.is_initialized():
        return TorchrunWorld(device, dist.get_backend(), timeout_seconds)
    if (place := ranks()) is not None and place.size > 1:
        raise ConfigError(
            "expected torch.distributed.init_process_group (or harness.join_world) before harness.Run, found none"
        )
    return _alone(device)


def rank_and_size() -> tuple[int, int]:
    """Which rank this is and how many there are: in the group that the program has joined, or as the launcher says."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (rank(), size())


def _alone(device: torch.device) -> SoloWorld:
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        log.warning(
            "MASTER_ADDR is set, but RANK and WORLD_SIZE are not: this is one plain process; for several ranks, use torchrun"
        )
    return SoloWorld(device)


def leave_at_once(code: int) -> NoReturn:
    """Ends a process whose peers may wait in a collective for ever: without the finalizers, which would wait, too."""
    os._exit(code)


def choose_device(config: WorldConfig) -> torch.device:
    """The device of this rank, which becomes the current one. Raises ``ConfigError`` where the machine has too few."""
    count = devices.count() if config.device in ("auto", devices.kind()) else 0
    if config.device == "cuda" and count < local_size():
        raise ConfigError(f"world.device: expected a CUDA device for each of {local_size()} local ranks, found {count}")
    return torch.device("cpu") if count < local_size() else devices.choose(local_rank())


def choose_backend(config: WorldConfig, device: torch.device) -> str:
    """What the gradients travel over. Raises ``ConfigError`` where the device has no such thing."""
    backend = config.backend if config.backend != "auto" else dist.get_default_backend_for_device(device)
    if backend == "nccl" and device.type != "cuda":  # which is what NCCL is for
        raise ConfigError("world.backend: expected CUDA devices for nccl, found none")
    return backend


def _fresh_store(place: Ranks, timeout: timedelta) -> Store:
    """The store through which the ranks of this very start find each other.

    torchrun (2.13) lends its workers the agent's own store, and it keeps the keys of earlier starts: after a restart, a
    rank that is faster than rank 0 reads rank 0's old address, cannot connect, and burns a restart. So the ranks agree on
    a prefix that nobody has used. Rank 0 cannot just publish one, since the others could not tell it from an old one:
    every rank greets with a word of its own making, and rank 0's answer is filed under that word.
    """
    rank, size, address, port = place.rank, place.size, place.address, place.port
    lent = lends_its_store()
    hosts = rank == 0 and not lent
    _resolve(address, timeout)
    if not hosts and not lent:
        _wait_for_listener(address, port, timeout)
    store = TCPStore(address, port, size, is_master=hosts, timeout=timeout, wait_for_workers=False)
    if not lent or size == 1:
        return PrefixStore(uuid.uuid4().hex, store) if lent else store
    if rank == 0:
        return PrefixStore(_answer_greetings(store, size, timeout), store)
    word = uuid.uuid4().hex
    store.set(f"harness/greeting/{rank}", word)
    prefix = store.get(f"harness/answer/{word}").decode()
    store.set(f"harness/thanks/{prefix}/{rank}", "")
    return PrefixStore(prefix, store)


def _resolve(address: str, timeout: timedelta) -> None:
    """Returns when the name of rank 0's machine leads somewhere. Raises ``RankFailure`` where it does not.

    torchrun has met the other machines by now, so a few tries are enough for it. A cluster that starts the ranks itself may
    publish the name late, with rank 0.
    """
    began = time.monotonic()
    patience_seconds = min(timeout.total_seconds(), NAME_SECONDS if is_under_torchrun() else math.inf)
    warned = False
    while True:
        try:
            socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            return
        except socket.gaierror as error:
            what = f"this machine cannot resolve MASTER_ADDR={address}, the machine of rank 0: {error.strerror}"
        waited_seconds = time.monotonic() - began
        if waited_seconds >= patience_seconds:
            advice = (
                "use a name that all machines can resolve: torchrun --local-addr (localhost on one machine), or MASTER_ADDR"
            )
            raise RankFailure(f"{what} (tried for {waited_seconds:.0f} s); {advice}")
        if waited_seconds >= NAME_SECONDS and not warned:
            warned = True
            log.warning("%s; trying again for up to %.0f s", what, patience_seconds)
        time.sleep(0.2)


def _wait_for_listener(address: str, port: int, timeout: timedelta) -> None:
    """Returns when a connection would be taken. Raises ``RankFailure`` where that takes too long.

    Half of all starts have a rank that is faster than rank 0. torch's own client (2.13) then sleeps for a quarter to three
    quarters of a second before it tries again, and every rank waits with it.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError),
        wait=tenacity.wait_fixed(0.02),  # not a random one: it would draw from the program's generator
        stop=tenacity.stop_after_delay(timeout),
    )
    try:
        retrying(socket.create_connection, (address, port), timeout=5).close()
    except tenacity.RetryError as error:
        seconds = timeout.total_seconds()
        raise RankFailure(f"no answer from {address}:{port} within {seconds:.0f} s: rank 0 has not started") from error


def _answer_greetings(store: Store, size: int, timeout: timedelta) -> str:
    """Rank 0's side: answers every greeting that it finds, old ones too, until all living ranks have thanked it."""
    prefix = uuid.uuid4().hex
    waiting = set(range(1, size))
    answered: set[tuple[int, bytes]] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"harness/greeting/{other}"]):
                word = store.get(f"harness/greeting/{other}")
                if (other, word) not in answered:
                    store.set(f"harness/answer/{word.decode()}", prefix)
                    answered.add((other, word))
            if store.check([f"harness/thanks/{prefix}/{other}"]):
                waiting.discard(other)
        if time.monotonic() > deadline:
            raise RankFailure(f"ranks {sorted(waiting)} did not join within {timeout.total_seconds():.0f} s")
        time.sleep(0.005)
    return prefix


def has_lost_a_peer(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, rather than that something is wrong here."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)  # gloo's own errors have no class


def is_timeout(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank did not come in time, though it may well be alive."""
    return "timeout" in str(error).lower() or "timed out" in str(error).lower()


class Maximum:
    """What all ranks want, known to all at the same step, at no cost to the step.

    Every rank may want things (small numbers; the largest of each counts). Now and then a maximum over the control group is
    begun at a step boundary and read at the next one, so it travels beside a step. The round says itself when
    the next one begins: about every ``interval_seconds``, by the ranks' own measure of a step.
    """

    def __init__(self, world: World, wants: int, interval_seconds: float = 0.05) -> None:
        self._world = world
        self._nothing = [0] * wants
        self._interval_seconds = interval_seconds
        self._pending: Callable[[], list[int]] | None = None  # waits for a round that is under way
        self._steps_to_next = 1
        self._steps_since = 0
        self._began = time.monotonic()

    def exchange(self, *wants: int) -> list[int]:
        """Called by every rank at every step boundary. What was agreed on since the last call; all 0 where nothing was."""
        if self._world.size == 1:
            return list(wants)
        agreed = self._nothing
        if self._pending is not None:
            self._steps_to_next, *agreed = self._pending()
            self._pending = None
        self._steps_since += 1
        if self._steps_since >= self._steps_to_next:  # what was just agreed on is about to happen: nobody wants it again
            self._begin([0 if is_agreed else want for want, is_agreed in zip(wants, agreed, strict=True)])
        return agreed

    def _begin(self, wants: Sequence[int]) -> None:
        now = time.monotonic()
        step_seconds = max((now - self._began) / self._steps_since, 1e-6)
        steps = min(max(int(self._interval_seconds / step_seconds), 1), 10_000)
        self._began, self._steps_since = now, 0
        self._pending = self._world.begin_max([steps, *wants])

    def finish(self) -> None:
        """Waits for a round that is under way, after the last step."""
        if self._pending is not None:
            self._pending()
            self._pending = None
