"""``harness doctor``: finds what would break a run on this machine and with this launcher, before it starts.

It tries what it can: it builds the task, writes below the run's URL and reads that on every rank, starts loader workers and
sends them torchrun's signal, and lets the ranks meet and compare clocks and versions. What it cannot try (what a reboot
leaves, how long a scheduler waits) it reads from the machine and the launcher, and says so.

Started as the training is (``harness launch ... -- doctor CONFIG.yaml``, or torchrun), it looks at all ranks; as one plain
process, at what one process can see. A script with a ``harness.Run`` is run until it makes that. It leaves nothing behind.
"""

from collections.abc import Callable, Sequence

from harness.config import Config, load_config
from harness.doctor.findings import Finding, error, exit_code, named, ok
from harness.errors import ConfigError
from harness.runtime.environment import size
from harness.runtime.torch_import import import_torch

Emit = Callable[[Sequence[Finding]], None]


def examine(config_file: str, overrides: Sequence[str], emit: Emit, *, fresh: bool = False) -> int:
    """Looks at everything, together with the other ranks, has what was found told (by rank 0: ``emit`` has to see to that),
    and returns the exit code for it, which is the same on every rank that has come to the end.

    What is wrong is a finding, and no exception.
    """
    config, found = _read(config_file, overrides)
    found = named("configuration", found)
    if config is None and size() == 1:  # torch, which takes seconds to import, could add nothing
        emit(found)
        return exit_code(found)
    import_torch()
    from harness.doctor.examination import examine_together  # noqa: PLC0415

    return examine_together(config, found, emit, fresh=fresh)


def examine_script(command: Sequence[str], emit: Emit, leave: Callable[[int], None], *, fresh: bool = False) -> int:
    """The same for a script (or ``-m`` and a module) with its arguments, which is run until it makes its Run. ``leave`` is
    then called with the exit code, on every rank, and must end the program; where the script does not come so far, the code
    is returned."""
    import_torch()
    from harness.doctor import script  # noqa: PLC0415

    return script.examine_script(command, emit, leave, fresh=fresh)


def _read(config_file: str, overrides: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    """The configuration, None where it is wrong, with a finding for each mistake."""
    tried = f"read {config_file}"
    try:
        config = load_config(config_file, overrides)
    except ConfigError as mistakes:
        return None, [error(tried, line) for line in str(mistakes).splitlines()]
    length = f"{config.train.steps} steps" if config.train.steps else f"{config.train.epochs} epochs"
    what = f"{config.task}, {length} of {config.train.global_batch_size} samples, digest {config.digest()}"
    return config, [ok(tried, what)]
