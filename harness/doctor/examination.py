"""The examination: every rank looks at its own, the ranks look at each other, and rank 0 tells what all have found."""

import contextlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from harness.config import Config, RunConfig
from harness.distributed.world import World, has_lost_a_peer
from harness.doctor import Emit, launcher, machine, ranks, recipe, storage
from harness.doctor.case import Case
from harness.doctor.findings import Finding, describe_error, exit_code, merge, named, warn
from harness.runtime.signals import ignore_stop_signals

Check = Callable[[Case], Sequence[Finding]]
INTERRUPTED = 130

# What is looked at, in this order. A check returns what it found: one line where all is well, several where it is not, none
# where there is nothing to look at. First what each rank must have to be compared with the others:
FIRST: tuple[Check, ...] = (
    machine.device,  # has the machine what the run asks for
    recipe.task,  # can the task be built
)
# then what they do in step, since they talk to each other in it:
TOGETHER: tuple[Check, ...] = (
    ranks.clocks,  # do the machines' clocks agree
    ranks.group,  # can the ranks add up over the backend that will train
    storage.storage,  # can every rank read what rank 0 writes
    storage.run,  # is there a run already, and can it go on
    recipe.sharding,  # is what the ranks have of sharded tensors the whole of each
    recipe.resume,  # does what it has saved fit
)
# and then what each looks at by itself:
ALONE: tuple[Check, ...] = (
    recipe.state,  # can the state be written, and how large is it
    recipe.saving,  # is anything saved before the end
    storage.place,  # are the checkpoints still there after a reboot, and for every node
    storage.space,  # is there room for them
    launcher.restarts,  # does anybody start dead ranks again
    launcher.nodes,  # have all machines come that were asked for
    launcher.rendezvous,  # can a machine that was lost come back
    launcher.grace,  # does a save fit between a stop signal and the kill
    launcher.timeouts,  # are the limits in the right order
    launcher.threads,  # do the bits depend on how many processes there are
    launcher.address,  # does this machine's name lead others to it
    recipe.log,  # can the record be written
    machine.batch,  # can a batch be fetched
    machine.memory,  # is the shared memory large enough for the loader's workers
    machine.workers,  # do they live through the signal that stops the run
    machine.processes,  # and the processes that the task has started
)


def examine_together(config: Config | None, found: list[Finding], emit: Emit, *, fresh: bool = False) -> int:
    """Looks at everything that takes torch, after what was found before; see ``harness.doctor.examine``."""
    return _until_interrupted(lambda: _examine_and_emit(None, config, found, emit, fresh=fresh), found, emit)


def examine_run(
    world: World,
    config: RunConfig,
    objects: Mapping[str, Any],
    device: torch.device,
    found: list[Finding],
    emit: Emit,
    *,
    fresh: bool,
) -> int:
    """The same for a run that a script is about to make, with the state that it has given it."""
    about: dict[str, Any] = {"objects": objects, "device": device, "fresh": fresh}
    return _until_interrupted(lambda: _examine_and_emit(world, config, found, emit, **about), found, emit)


def _until_interrupted(examine: Callable[[], int], found: list[Finding], emit: Emit) -> int:
    try:
        return examine()
    except KeyboardInterrupt:  # by a person, or by torchrun, which ends all ranks when one has died
        ignore_stop_signals()
        emit([*found, *named("ranks", [ranks.interrupted()])])
        return INTERRUPTED


def _examine_and_emit(world: World | None, config: RunConfig | None, found: list[Finding], emit: Emit, **about: Any) -> int:
    try:
        world = world or ranks.join(config)
        hosts = world.all_gather(platform.node())
        found += named("ranks", [ranks.met(world, hosts)])
        whole = _examine(world, hosts, config, found, **about)
    except Exception as problem:
        if world is not None and not has_lost_a_peer(problem):
            raise
        found += named("ranks", [ranks.lost(problem) if world else ranks.not_met(problem)])
        emit(found)
        return exit_code(found)
    emit(whole)
    with contextlib.suppress(Exception):  # all is said; should another rank be gone by now, there is no need to wait for it
        world.close()
    return exit_code(whole)


def _examine(world: World, hosts: list[str], config: RunConfig | None, found: list[Finding], **about: Any) -> list[Finding]:
    """What all ranks have found. ``found`` gets this rank's own as it goes, for the case that there is no end."""
    case = Case(config, world, hosts, **about) if config else None
    if case:
        found += _look(FIRST, case)
    facts = world.all_gather(ranks.facts(case))
    found += named("versions", ranks.versions(facts))
    if not ranks.speak_alike(facts):  # another harness may say other things next, or none
        return found
    if case and ranks.can_go_on(facts):
        found += _look(TOGETHER, case)
        found += _look(ALONE, case)
    everything = world.all_gather([asdict(finding) for finding in found])
    return merge([[Finding(**fields) for fields in own] for own in everything], hosts)


def _look(checks: Sequence[Check], case: Case) -> list[Finding]:
    """What each check finds; one that fails is no reason not to make the others."""
    found: list[Finding] = []
    for check in checks:
        try:
            found += named(check.__name__, check(case))
        except Exception as problem:
            if has_lost_a_peer(problem):
                raise
            found += named(check.__name__, [warn("looked", describe_error(problem), "tell the developers of harness")])
    return found
