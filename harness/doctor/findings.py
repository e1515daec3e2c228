"""What a check has to say, and how the words of several ranks become one list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.errors import ConfigError, HarnessError
from harness.secrecy import without_secrets


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was tried, what was found, and where that is not well, what to do.

    ``exit_code`` is an error's, that of the exception with which the run would end. ``check`` names what looked, ``where``
    the ranks that found it where it was not all.
    """

    level: Literal["ok", "warn", "error"]
    tried: str
    found: str
    advice: str = ""
    exit_code: int = 0
    check: str = ""
    where: str = ""

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.level:<5}  {self.check:<13}  {self.tried}: {self.found}{where}{advice}"


def ok(tried: str, found: str) -> Finding:
    return Finding("ok", tried, found)


def warn(tried: str, found: str, advice: str) -> Finding:
    """What the run survives, at a price that its owner should know."""
    return Finding("warn", tried, found, advice)


def error(tried: str, found: str, advice: str = "", like: type[HarnessError] = ConfigError) -> Finding:
    """What would keep the run from working, and with which exception it would end."""
    return Finding("error", tried, found, advice, like.exit_code)


def named(check: str, found: Sequence[Finding]) -> list[Finding]:
    """The findings with the name of what looked."""
    return [replace(finding, check=check) for finding in found]


def exit_code(found: Sequence[Finding]) -> int:
    """0 unless there is an error. Of several the lowest number: a configuration is mended before anything else."""
    return min((finding.exit_code for finding in found if finding.level == "error"), default=0)


def merge(found: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """The findings of all ranks, each once, with the ranks that have it if they are not all. What is well appears once
    for all ranks, and not at all if the same check found something on another rank.
    """
    holders: dict[Finding, list[int]] = {}
    for rank, own in enumerate(found):
        for finding in own:
            holders.setdefault(finding, []).append(rank)
    merged: list[Finding] = []
    for check in dict.fromkeys(finding.check for finding in holders):
        mine = {finding: ranks for finding, ranks in holders.items() if finding.check == check}
        bad = [
            replace(finding, where=finding.where if len(ranks) == len(found) else places(ranks, hosts))
            for finding, ranks in mine.items()
            if finding.level != "ok"
        ]
        first = min(ranks[0] for ranks in mine.values())
        merged += bad or [finding for finding, ranks in mine.items() if ranks[0] == first]
    return merged


def places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``rank 1 on a, ranks 2 3 on b``; ``hosts`` has the host of every rank."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return ", ".join(f"rank{'s' * (len(own) > 1)} {' '.join(own)} on {host}" for host, own in by_host.items())


def describe_error(problem: BaseException) -> str:
    """An exception that nobody raised on purpose, in a line."""
    return without_secrets(f"{type(problem).__name__}: {' '.join(str(problem).split())}")[:500].rstrip(": ")
