"""The launcher: what it does when a rank dies or a signal comes, and how long it waits."""

import math
import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress

from harness.doctor.case import Case
from harness.doctor.findings import Finding, error, ok, warn
from harness.errors import RankFailure
from harness.runtime import environment
from harness.runtime.environment import is_under_torchrun

_SENSIBLE_TIMEOUT_SECONDS = 1800.0  # torch's own default


def restarts(_case: Case) -> list[Finding]:
    """Whether torchrun starts the ranks again when one dies."""
    count = environment.max_restarts()
    if count is None:
        return []
    tried = "read torchrun's --max-restarts"
    if count == 0:
        return [
            warn(tried, "it is 0 (its default): the first rank that dies ends the run", "give --max-restarts=3, or more")
        ]
    return [ok(tried, f"it is {count}")]


def nodes(_case: Case) -> list[Finding]:
    """Whether torchrun has begun without some of its machines."""
    if not is_under_torchrun():
        return []
    come, least = environment.nodes(), environment.least_nodes()
    tried = "compared torchrun's --nnodes with the machines that have come"
    if come < least:
        advice = (
            "synchronize the clocks (NTP): torchrun's c10d rendezvous considers a machine dead if its clock is 15 s behind"
        )
        return [error(tried, f"{come} of {least} came, and torchrun started without the others", advice, RankFailure)]
    return [ok(tried, f"{come}")]


def rendezvous(_case: Case) -> list[Finding]:
    """Whether a machine that was lost can join again, which torch 2.13 prevents by default."""
    if not is_under_torchrun() or environment.nodes() == 1:
        return []
    tried = "looked whose store the ranks were given"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        what = "torchrun's own, which keeps old addresses: when a machine comes back, the job hangs (torch 2.13)"
        return [warn(tried, what, "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine, as harness launch does")]
    return [ok(tried, "their own")]


def grace(case: Case) -> list[Finding]:
    """Whether a stop ends in order, and saved, before the launcher kills."""
    own_seconds = case.config.stop.grace_seconds
    limits = {"torchrun's --shutdown-timeout": environment.shutdown_grace_seconds(), **_slurm_limits(case)}
    tried = "compared stop.grace_seconds with what the launcher grants and what a save takes"
    found = []
    for name, seconds in limits.items():
        if own_seconds >= seconds:
            what = f"stop.grace_seconds is {own_seconds:g}, but {name} is {seconds:g}; the process would be killed first"
            found.append(warn(tried, what, f"lower the one below {seconds:g}, or raise the other"))
    least_seconds = min(own_seconds, *limits.values())
    if case.save_seconds is not None and case.save_seconds > least_seconds:
        what = (
            f"{_save_in_words(case)}, but only {least_seconds:g} s are allowed after a stop signal; the "
            "process would be killed before the checkpoint commits"
        )
        found.append(warn(tried, what, "raise stop.grace_seconds and what the launcher grants, or save to something faster"))
    granted = [f"{name} {seconds:g}" for name, seconds in limits.items() if seconds < math.inf]
    save = [_save_in_words(case)] if case.save_seconds is not None else []
    return found or [ok(tried, "; ".join([f"{own_seconds:g} s", *granted, *save]))]


def _save_in_words(case: Case) -> str:
    if case.last_save_seconds is not None:
        return f"the last save took {case.last_save_seconds:.2f} s"
    return f"a save will take about {case.save_seconds:.2f} s"


def _slurm_limits(case: Case) -> dict[str, float]:
    """Between Slurm's SIGTERM and its SIGKILL, and between a preemption's notice and its SIGTERM; asked once for the job."""
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    if not case.is_first or "SLURM_JOB_ID" not in os.environ or shutil.which("scontrol") is None:
        return {}
    limits = {}
    if kill_wait := re.search(r"^KillWait\s*=\s*(\d+)", _scontrol("config"), re.MULTILINE):
        limits["Slurm's KillWait"] = float(kill_wait[1])
    about = _scontrol("partition", partition) if partition else ""
    if "PreemptMode=OFF" not in about and (grace_time := re.search(r"\bGraceTime=([1-9]\d*)", about)):
        limits[f"GraceTime of Slurm's partition {partition}"] = float(grace_time[1])
    return limits


def _scontrol(*what: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", *what]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=10).stdout  # noqa: S603  # no shell, and nothing of others
    return ""


def timeouts(case: Case) -> list[Finding]:
    """Whether the limits of a hang are in the right order."""
    config = case.config
    tried = "compared world.timeout_seconds with what a save takes and with the watchdog's"
    seconds, watchdog_seconds = config.world.timeout_seconds, config.watchdog.timeout_seconds
    found = []
    if case.save_seconds is not None and case.save_seconds > seconds:
        what = f"{_save_in_words(case)}, but the other ranks wait only {seconds:g} s for rank 0"
        found.append(error(tried, what, "raise world.timeout_seconds well above a save"))
    if watchdog_seconds is not None and seconds >= watchdog_seconds:
        what = f"{seconds:g} s, but the watchdog ends all ranks after {watchdog_seconds:g} s, before the lost rank is named"
        found.append(warn(tried, what, "lower world.timeout_seconds below watchdog.timeout_seconds"))
    elif seconds > _SENSIBLE_TIMEOUT_SECONDS:
        what = f"{seconds:g} s: all ranks wait this long for a machine that has lost its network"
        found.append(warn(tried, what, f"lower world.timeout_seconds to {_SENSIBLE_TIMEOUT_SECONDS:g} or less"))
    return found or [ok(tried, f"{seconds:g} s")]


def threads(case: Case) -> list[Finding]:
    """Whether sums are made in the same order by one process and by several: by as many threads."""
    if case.device is None or case.device.type != "cpu":
        return []
    tried = "read OMP_NUM_THREADS"
    if not (value := os.environ.get("OMP_NUM_THREADS")):
        what = (
            "it is not set: torchrun sets it to 1 for several processes but not for one, and the results differ "
            "in their last bits"
        )
        return [warn(tried, what, "export OMP_NUM_THREADS=1, or what suits the machine")]
    return [ok(tried, f"it is {value}")]


def address(_case: Case) -> list[Finding]:
    """Whether other machines would find this one by its name; where torchrun has the ranks meet, that has been tried."""
    if is_under_torchrun() or environment.nodes() == 1 or os.environ.get("GLOO_SOCKET_IFNAME"):
        return []
    host = socket.gethostname()
    tried, advice = f"looked {host} up", "export GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) with the name of the interface"
    try:
        found = {str(where[0]) for *_, where in socket.getaddrinfo(host, None)}
    except OSError as problem:
        return [warn(tried, f"{problem.strerror}: gloo needs an address", advice)]
    if all(each.startswith("127.") or each == "::1" for each in found):
        return [
            warn(tried, f"{', '.join(sorted(found))} leads only to itself: other machines cannot reach gloo there", advice)
        ]
    return [ok(tried, ", ".join(sorted(found)))]
