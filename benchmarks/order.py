"""What the order of an epoch costs: the time and the memory to the first batch, and the time of each sample after it.

    python benchmarks/order.py [--sizes 1000000 100000000 1000000000000] [--batch 64] [--rounds 5]

Two algorithms: ``feistel``, which new runs use, and ``randperm``, with which older runs go on. Each figure is the median of
the rounds, each of which is a fresh process. The first batch is that of a position in the middle of an epoch. The memory is
by how much the process's peak grows. A sample's time is that of the processor. ``randperm`` is left out where it would need
more memory than is free. The floor of the first batch is what drawing as many random numbers takes with NumPy, that of a
sample is what drawing one of them takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = 2000  # are timed after the first
BYTES_A_SAMPLE = 16  # of randperm at its peak


def measured(algorithm: str, samples: int, batch: int) -> dict[str, float]:
    """In a process of its own."""
    import numpy as np

    from harness.data.schedule import Cursor, Schedule

    def peak_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10

    if algorithm == "floor":
        generator = np.random.Generator(np.random.Philox(1))
        began = time.perf_counter()
        generator.integers(samples, size=batch)
        first = time.perf_counter() - began
        count = STEPS * batch
        began = time.process_time()
        for start in range(0, count, 4096):
            generator.integers(samples, size=min(4096, count - start))
        return {"first_seconds": first, "memory_bytes": 0, "sample_seconds": (time.process_time() - began) / count}
    warm = Schedule(1000, 1, batch, None, algorithm=algorithm)  # what is imported at the first call
    next(warm.steps(Cursor(), 0, 1))
    Path("/proc/self/clear_refs").write_text("5")
    schedule, before = Schedule(samples, 1, batch, None, algorithm=algorithm), peak_bytes()
    began = time.perf_counter()
    steps = schedule.steps(Cursor(3, samples // 2), 0, 1)
    next(steps)
    first = time.perf_counter() - began
    grown, count = peak_bytes() - before, min(STEPS, samples // 2 // batch - 1)
    began = time.process_time()
    for _ in range(count):
        next(steps)
    return {
        "first_seconds": first,
        "memory_bytes": grown,
        "sample_seconds": (time.process_time() - began) / (count * batch),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**8, 10**12])
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        print(json.dumps(measured(chosen.measure[0], int(chosen.measure[1]), chosen.batch)))
        return
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print("| samples | algorithm | first batch, ms | its memory, MB | a sample, µs |\n| --- | --- | --- | --- | --- |")
    for samples in chosen.sizes:
        for algorithm in ("randperm", "feistel", "floor"):
            if algorithm == "randperm" and samples * BYTES_A_SAMPLE > free_bytes:
                print(f"| {samples:.0e} | {algorithm} | - | {samples * BYTES_A_SAMPLE / 1e6:.0f} | - |", flush=True)
                continue
            command = [sys.executable, __file__, "--batch", str(chosen.batch), "--measure", algorithm, str(samples)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(chosen.rounds)]
            found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(
                f"| {samples:.0e} | {algorithm} | {found['first_seconds'] * 1e3:.2f} | {found['memory_bytes'] / 1e6:.2f} "
                f"| {found['sample_seconds'] * 1e6:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
