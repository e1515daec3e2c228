"""The ranks beside each other: whether they meet, whether they are the same, what their clocks say."""

import hashlib
import math
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import harness
from harness import torch_private
from harness.checkpoint import commit
from harness.config import Config, RunConfig, WorldConfig
from harness.distributed import device as devices
from harness.distributed.world import World, choose_backend, join_world
from harness.doctor.bounded import run_bounded
from harness.doctor.case import Case
from harness.doctor.findings import Finding, describe_error, error, ok, places, warn
from harness.errors import HarnessError, RankFailure
from harness.runtime.environment import is_under_torchrun, rank
from harness.secrecy import without_secrets
from harness.state.modules import model_state

_GROUP_SECONDS = 60.0
_CLOCK_ROUNDS = 10
_ALIKE_SECONDS = 1.0  # clocks that differ by less bother nobody
_BURIED_SECONDS = 10.0  # torchrun's c10d rendezvous: a heartbeat every 5 s, and one that is 15 s old is a dead machine's
_MUST_AGREE = {
    "harness": "install the same everywhere",
    "torch": "install the same everywhere",
    "device": "give every rank the same kind",
    "model": "the task must build the same on every rank; draw random numbers only from the generators that harness seeds",
    "samples": "every rank must see the same data",
}
_SHOULD_AGREE = ("python", "cuda", "threads")

# --- meeting ---------------------------------------------------------------------------------------------------------


def join(config: RunConfig | None) -> World:
    """The world of all ranks, over gloo on CPUs whatever the run will use: it must not fail of what it is to find."""
    timeout_seconds = (config.world if config else WorldConfig()).timeout_seconds
    return join_world(WorldConfig(device="cpu", backend="gloo", timeout_seconds=timeout_seconds))


def met(world: World, hosts: Sequence[str]) -> Finding:
    """Said when all have come."""
    count = len(set(hosts))
    if not is_under_torchrun():
        what = "there is none; start the doctor as you will start the training, so that it checks all ranks"
        return ok("looked for torchrun", what)
    return ok("met over gloo", f"{world.size} rank{'s' * (world.size > 1)} on {count} machine{'s' * (count > 1)}")


def not_met(problem: Exception) -> Finding:
    """Said by each rank for itself."""
    if isinstance(problem, HarnessError):  # one that says itself what to do
        return error(f"looked for the ranks on rank {rank()}", str(problem), "", type(problem))
    advice = "see what the other ranks report; if it is the network, GLOO_SOCKET_IFNAME names the interface to use"
    return error(f"waited on rank {rank()} for the others", describe_error(problem), advice, RankFailure)


def lost(problem: Exception) -> Finding:
    """Said by those that are left."""
    found = f"one is gone ({describe_error(problem)})"
    return error("talked to the other ranks", found, "find out why it ended; the doctor could not finish", RankFailure)


def interrupted() -> Finding:
    """Said when a signal came: a person's, or torchrun's, which ends all ranks when one has died."""
    advice = "find the rank that ended first, and why; the doctor could not finish"
    return error("looked at the ranks", "a signal came", advice, RankFailure)


def group(case: Case) -> list[Finding]:
    """Adds up over the backend and the device that will train, which are not those of ``case.world``."""
    world, device = case.world, case.device
    if not isinstance(case.config, Config):  # a script's ranks are talking over their own backend
        return []
    if world.size == 1 or not all(world.all_gather(device is not None)):
        return []
    assert device is not None, "no rank is without one"
    backend, streams = choose_backend(case.config.world, device), devices.here([device])

    def add_up() -> float:
        longer = timedelta(seconds=2 * _GROUP_SECONDS)  # when its own time is over, NCCL ends the process
        with streams.within():  # this is another thread, whose current device is another one
            number = torch.ones(1, device=device)
            dist.all_reduce(number, group=dist.new_group(backend=backend, timeout=longer))
            return float(number)

    total, problem = run_bounded(add_up, _GROUP_SECONDS)
    if not problem and total != world.size:
        problem = f"{total} came out"
    problems = sorted(set(world.all_gather(problem)) - {""})
    tried = f"added 1 up on {world.size} ranks over {backend} on {device.type}"
    if problems:
        advice = f"{backend.upper()}_SOCKET_IFNAME names the interface to use; NCCL_DEBUG=INFO has NCCL say what it does"
        return [error(tried, "; ".join(problems), advice, RankFailure)]
    return [ok(tried, f"it is {world.size}")]


# --- versions --------------------------------------------------------------------------------------------------------


def facts(case: Case | None) -> dict[str, Any]:
    """What should be the same on every rank, in types that every version knows; ``case`` is None where the configuration is
    wrong."""
    return {
        "host": platform.node(),
        "harness": f"{harness.__version__} (code {_code()})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "threads": torch.get_num_threads(),
        "configuration": _flat(case.config) if case else None,
        "device": case.device.type if case and case.device else None,
        "model": _model(case) if case else None,
        "samples": case.loader.schedule.samples if case and case.loader else None,
    }


def _code() -> str:
    """Identifies the code of harness."""
    root = Path(harness.__file__).parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return code.hexdigest()[:8]


def _model(case: Case) -> str | None:
    """The digest of a new model; None where there is none, or where it cannot be written, which another check reports."""
    models = [each for each in (case.objects or {}).values() if isinstance(each, torch.nn.Module)]
    if not models:
        return None
    try:
        return commit.digest_of(model_state(models[0]), "model")
    except Exception:  # a model is its owner's code
        return None


def _flat(config: RunConfig) -> dict[str, str]:
    """The configuration by dotted keys, without what may be secret."""
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))
        else:
            found[path] = without_secrets(repr(value))[:80]

    walk(config.model_dump(mode="json", exclude={"checkpoint": {"storage_options"}}), "")
    return found


def speak_alike(facts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all ranks run the same code, and so will say the same things in the same order."""
    return len({fact["harness"] for fact in facts}) == 1


def can_go_on(facts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every rank has a configuration, without which there is little to look at."""
    return all(fact["configuration"] is not None for fact in facts)


def versions(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What differs between the ranks; the same on all of them."""
    hosts = [fact["host"] for fact in facts]
    keys = sorted({key for fact in facts for key in fact["configuration"] or ()})
    tried = "compared " + ", ".join(("configuration", *_MUST_AGREE, *_SHOULD_AGREE))
    found = []
    for key in (*_MUST_AGREE, *keys, *_SHOULD_AGREE):
        differing = _differing([_value(fact, key) for fact in facts], hosts)
        if differing and key in _SHOULD_AGREE:
            found.append(warn(tried, f"{key}: {differing}", "make it the same: the bits of a result may depend on it"))
        elif differing:
            found.append(error(tried, f"{key}: {differing}", _MUST_AGREE.get(key, "give every rank the same configuration")))
    found += _untried()
    first = facts[0]
    alike = f"python {first['python']}, torch {first['torch']}, CUDA {first['cuda']}, harness {first['harness']}"
    return found or [ok(tried if len(facts) > 1 else "read the versions", alike)]


def _untried() -> list[Finding]:
    """Where this torch is older or newer than those that harness was tried with, or lacks something that is not public."""
    tried = f"compared torch {torch.__version__} with the versions that harness was tried with"
    versions, advice = ", ".join(torch_private.TRIED), f"install torch {torch_private.TRIED[-1]}"
    found = []
    if not torch_private.is_tried(torch.__version__):
        what = f"harness was not tested with it, but with {versions}"
        found.append(warn(tried, what, f"try a resume before a long run, or {advice}"))
    for part in torch_private.missing():
        say = error if part.is_needed else warn
        found.append(
            say("looked for the private parts of torch that harness uses", f"it has no {part.names}: {part.without}", advice)
        )
    return found


def _value(fact: Mapping[str, Any], key: str) -> Any:
    """What a rank has; None where it does not know."""
    if key in fact:
        return fact[key]
    return None if fact["configuration"] is None else fact["configuration"].get(key, "not there")


def _differing(values: Sequence[Any], hosts: Sequence[str]) -> str:
    """Which ranks have which value; empty where all that have one have the same."""
    holders: dict[Any, list[int]] = {}
    for number, value in enumerate(values):
        if value is not None:  # why there is none is told elsewhere
            holders.setdefault(value, []).append(number)
    return ", ".join(f"{value} ({places(ranks, hosts)})" for value, ranks in holders.items()) if len(holders) > 1 else ""


# --- clocks ----------------------------------------------------------------------------------------------------------


def clocks(case: Case) -> list[Finding]:
    """How far each rank's clock is from rank 0's: it was read between two looks at rank 0's own, so that the way there and
    back bounds the error. Of several rounds the quickest counts."""
    world = case.world
    if world.size == 1:
        return []
    best = [(math.inf, 0.0)] * world.size  # by rank: how far off the measurement may be, and what it says
    for _ in range(_CLOCK_ROUNDS):
        began = time.time()
        world.broadcast(None)
        there = world.gather(time.time())
        half = (time.time() - began) / 2
        if there is not None:
            best = [min(known, (half, own - (began + half))) for known, own in zip(best, there, strict=True)]
    found: list[Finding] = world.broadcast(_judge_clocks(best, case.hosts) if world.rank == 0 else [])
    return found


def _judge_clocks(best: Sequence[tuple[float, float]], hosts: Sequence[str]) -> list[Finding]:
    tried = f"read every rank's clock {_CLOCK_ROUNDS} times between two looks at rank 0's"
    found: dict[str, Finding] = {}  # by host
    for number, (uncertain_seconds, offset_seconds) in enumerate(best):
        off_seconds = abs(offset_seconds) - uncertain_seconds
        if off_seconds < _ALIKE_SECONDS or hosts[number] in found:
            continue
        which = "ahead of" if offset_seconds > 0 else "behind"
        by = f"{abs(offset_seconds):.3f} s (± {uncertain_seconds:.3f})"
        what = f"that of {places([number], hosts)} is {by} {which} that of {places([0], hosts)}"
        if off_seconds < _BURIED_SECONDS:
            found[hosts[number]] = warn(
                tried, what, "synchronize both clocks (NTP); times in logs and manifests cannot be compared"
            )
        else:
            why = "torchrun's c10d rendezvous considers a machine dead if its clock is 15 s behind, and starts without it"
            found[hosts[number]] = error(tried, what, f"synchronize both clocks (NTP): {why}")
    if found:
        return list(found.values())
    within = max(abs(offset) + uncertain for uncertain, offset in best)
    return [ok(tried, f"all within {within:.3f} s")]
