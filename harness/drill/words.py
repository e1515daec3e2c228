"""What a drill says: a line for each trial, and what follows from all of them."""

from collections.abc import Iterator

from harness.drill.results import Costs, Findings, Result
from harness.report.units import duration

_OUTCOMES = {"exact": "exact", "different": "NOT EXACT", "failed": "FAILED", "not tried": "not tried"}


def line(result: Result) -> str:
    """One trial: what was done, what became of it, and where it is not exact, why."""
    why, *rest = result.why.split("\n")
    text = f"{result.trial.what:<48}  {outcome(result):<11}  {why or in_deaths(result)}".rstrip()
    if result.outcome == "failed":
        return "\n".join([text, *rest])
    if result.outcome == "different" and not result.trial.is_control:
        return f"{text}\n    first difference: {result.first_difference}\n    most likely cause: {result.cause}"
    return text


def outcome(result: Result) -> str:
    """What became of a trial, in a word; a control is to show a difference."""
    if result.trial.is_control and result.outcome in ("exact", "different"):
        return "noticed" if result.outcome == "different" else "NOT NOTICED"
    return _OUTCOMES[result.outcome]


def in_deaths(result: Result) -> str:
    """When ranks died, and where they went on."""
    return ", ".join(
        f"{'stopped' if death.was_asked else 'died'} after step {death.step}, resumed from {death.resumed_from}"
        + (f", next step after {death.seconds_to_next_step:.1f} s" if death.seconds_to_next_step is not None else "")
        for death in result.deaths
    )


def summary(findings: Findings, between_deaths_seconds: float) -> str:
    """What follows from all trials."""
    return "\n".join(["", *verdict(findings), *costs(findings.costs, between_deaths_seconds)])


def verdict(findings: Findings) -> Iterator[str]:
    """Whether the job survives, and is exact."""
    tried = [each for each in findings.results if each.outcome != "not tried" and not each.trial.is_control]
    well = sum(each.is_well for each in tried)
    if findings.irreproducible:
        yield (
            "Two runs without any death differ, so nothing can be compared from start to start. First difference: "
            f"{findings.irreproducible}. Usual suspects: no fixed seed, a seed from the clock, kernels that add in any "
            "order (torch.use_deterministic_algorithms), more threads than one, data in another order."
        )
    if not findings.survives:
        yield f"The job does not survive: {well} of {len(tried)} trials went well."
    elif not findings.is_exact:
        yield f"The job survives, and is NOT exact: {well} of {len(tried)} trials had the same bits."
    elif tried:
        yield f"The job survives, and is exact: {well} of {len(tried)} trials had the same bits as the run without a death."
    if not findings.could_tell:
        yield "A resume that left something out on purpose did not show: this drill could not have told."


def costs(found: Costs, between_deaths_seconds: float) -> Iterator[str]:
    """What saves and deaths take, and what follows for the interval."""
    yield (
        f"A step takes {_seconds(found.step_seconds)}, a save {_seconds(found.save_seconds)}, for which the training waits "
        f"{_seconds(found.blocked_seconds)}."
    )
    if found.recovery_seconds is not None:
        best = found.best_interval_seconds(between_deaths_seconds)
        share = found.share_lost(best, between_deaths_seconds)
        yield (
            f"From a death to the next step: {found.recovery_seconds:.1f} s on average. With a death every "
            f"{duration(between_deaths_seconds)} (--between-deaths), an interval of {duration(best)} "
            f"(checkpoint.every_seconds={best:.0f}) loses least: {share:.2%} of the time."
        )
    if found.save_seconds > found.grace_seconds:
        save = f"a save takes {found.save_seconds:.1f} s"
        yield f"The grace of {found.grace_seconds:g} s after a stop signal (stop.grace_seconds) is too short: {save}."
    else:
        yield f"The grace of {found.grace_seconds:g} s after a stop signal is enough for a save."


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
