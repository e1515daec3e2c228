"""A script with a ``harness.Run``: it is run until it makes that, which is looked at in its place, and it goes no further.

What a script does before (reading its arguments, opening its data, joining the ranks) it does for real; it trains nothing.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.config import RunConfig
from harness.distributed.world import World, world_of_program
from harness.doctor import Emit, ranks
from harness.doctor.examination import INTERRUPTED, examine_run
from harness.doctor.findings import Finding, describe_error, error, exit_code, named, ok
from harness.doctor.recipe import place_of
from harness.errors import HarnessError
from harness.runtime.environment import rank
from harness.runtime.scripts import run_program
from harness.training import observer
from harness.training.run import device_of


def examine_script(command: Sequence[str], emit: Emit, leave: Callable[[int], None], *, fresh: bool) -> int:
    """Runs a script (or ``-m`` and a module) with its arguments, and calls ``leave`` with the exit code where it makes its
    Run, which must end the program. Returns the exit code where it does not come so far."""
    tried = f"ran {' '.join(command[:2] if command[0] == '-m' else command[:1])} until it makes its Run"

    class Examiner(observer.Observer):
        def making(self, config: RunConfig, state: Mapping[str, Any], world: World | None, is_fresh: bool) -> None:
            observer.current = observer.Observer()
            device = device_of(state)
            try:
                world = world or world_of_program(device, config.world.timeout_seconds)
            except HarnessError as problem:
                found = named("ranks", [ranks.not_met(problem)])
                emit(found)
                return leave(exit_code(found))
            found = named("configuration", [ok(tried, f"a state of {', '.join(state)}")])
            return leave(examine_run(world, config, state, device, found, emit, fresh=fresh or is_fresh))

    observer.current = Examiner()
    try:
        run_program(command)
    except KeyboardInterrupt:
        emit(named("ranks", [ranks.interrupted()]))
        return INTERRUPTED
    except (Exception, SystemExit) as problem:  # the user's own code
        return _emit_failure(tried, problem, emit)
    finally:
        observer.current = observer.Observer()
    advice = "give it the arguments with which it trains; harness.save, load and Loader alone are not checked"
    found = named("configuration", [error(tried, "it ended without making a Run", advice)])
    emit(found)
    return exit_code(found)


def _emit_failure(tried: str, problem: BaseException, emit: Emit) -> int:
    """Tells of a script that has failed, and returns the exit code."""
    if isinstance(problem, HarnessError):
        found: list[Finding] = [error(tried, line, "", type(problem)) for line in str(problem).splitlines()]
    else:
        found = [error(tried, describe_error(problem) + place_of(problem), "fix it; a training would fail here, too")]
    found = named("configuration", found)
    if rank():  # rank 0 may be well, and wait
        print(f"harness: rank {rank()}: {found[0].found}", file=sys.stderr, flush=True)
    emit(found)
    return exit_code(found)
