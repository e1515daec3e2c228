"""How much memory this process has, and had at most."""

from pathlib import Path


def memory_bytes(kind: str) -> int:
    """``VmRSS`` is what the process has in memory, ``VmHWM`` the most that it had since it was asked to forget."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {kind}")


def forget_the_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")
