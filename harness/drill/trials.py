"""What a drill tries, one real launch after the other, and what becomes of each."""

import random
from dataclasses import dataclass, replace

from harness.drill.plan import Control, Fault
from harness.drill.record import Record


@dataclass(frozen=True)
class Trial:
    """Some faults, and what they are called. ``why_not`` says why this job cannot be tried so."""

    name: str
    what: str
    faults: tuple[Fault, ...] = ()
    leaves_out: Control = ""
    from_step: int = 0
    """It goes on from what the reference had saved by this step; 0: it begins anew."""
    other_ranks: int = 0
    """The ranks that go on after a stop; 0: as many as before."""
    why_not: str = ""

    @property
    def is_control(self) -> bool:
        """Whether a difference is what is expected."""
        return bool(self.leaves_out)


QUICK = ("rank", "stop", "save")


def of_job(reference: Record, every_steps: int, *, is_launched: bool, is_local: bool) -> list[Trial]:
    """The trials of a job, of which a run without deaths is known."""
    last, ranks = reference.last_step, reference.ranks
    step = min(2 * every_steps + 3, last - 1)  # between two saves, with one before
    save = step // every_steps * every_steps
    rank = (ranks - 1,)
    kill = Fault("kill", step=step)
    stop = Fault("stop", step=every_steps + 1, ranks=(0,))  # early: the ranks agree on it some steps later
    evaluation = next((each for each in reference.evaluated if each >= every_steps), None)
    epoch_end = next((each for each in reference.epoch_ends if each >= every_steps), None)
    loaded = any(line["samples"] for line in reference.of_rank(0))
    one = "SIGKILL of one rank" if is_launched else "SIGKILL"
    alone = "" if is_launched else "there is no launcher"
    return [
        Trial("rank", one, (replace(kill, ranks=rank),)),
        Trial("ranks", "SIGKILL of all ranks", (kill,), why_not="" if ranks > 1 else "there is one rank"),
        Trial("launcher", "SIGKILL of the launcher", (Fault("kill launcher", step=step, ranks=(0,)),), why_not=alone),
        Trial("stop", "SIGTERM", (stop,)),
        Trial("save", "SIGKILL in a save", (Fault("kill", "saving", save, ranks=(0,)),)),
        Trial(
            "evaluation",
            "SIGKILL in an evaluation",
            (Fault("kill", "evaluation", every_steps, ranks=(0,)),),
            why_not="" if evaluation else f"no evaluation after a save in {last} steps",
        ),
        Trial(
            "first step", "SIGKILL, and again in the step after the resume", (kill, Fault("kill", step=save + 1, start=1))
        ),
        Trial(
            "epoch",
            "SIGKILL at an epoch's end",
            (Fault("kill", "epoch end", every_steps, ranks=(0,)),),
            why_not="" if epoch_end else f"no epoch ends after a save in {last} steps (--steps)",
        ),
        Trial("start", "SIGKILL, and again as soon as it has resumed", (kill, Fault("kill", "begun", start=1, ranks=(0,)))),
        Trial(
            "storage",
            "storage that fails for a save, then SIGKILL",
            (Fault("refuse save", "saving", save, ranks=(0,)), replace(kill, step=save + 1)),
            why_not="" if is_local else "it takes a local folder to refuse a save",
        ),
        Trial(
            "world",
            f"{_other(ranks)} rank{'s' * (_other(ranks) > 1)} in place of {ranks}",
            (stop,),
            other_ranks=_other(ranks),
            why_not=alone or ("" if loaded else "no harness.Loader in the state: nobody knows the samples"),
        ),
        Trial("control", "SIGKILL, and a resume that leaves something out", (kill,), leaves_out=_control(reference)),
    ]


def _other(ranks: int) -> int:
    return ranks - 1 if ranks > 1 else 2


def _control(reference: Record) -> Control:
    """What this job would miss most certainly."""
    first, *others = reference.of_rank(0)
    changed = {
        path.partition("/")[0]
        for each in others
        for path in each["parts"]
        if each["parts"][path] != first["parts"].get(path)
    }
    return "random" if "random" in changed else "optimizer"


def of_irreproducible(reference: Record, every_steps: int) -> list[Trial]:
    """Where two runs differ without any death: a process that resumes is compared with the very one that went on."""
    saved = range(every_steps, reference.last_step - every_steps, every_steps)
    return [
        Trial(f"from {step}", f"a resume at step {step}, beside the process that went on", from_step=step)
        for step in saved[:3]
    ]


def drawn(draws: random.Random, reference: Record, every_steps: int) -> Trial:
    """A death of one rank or of all, at any step after the first save."""
    step = draws.randrange(every_steps + 1, reference.last_step - 1)
    ranks = (draws.randrange(reference.ranks),) if reference.ranks > 1 and draws.random() < 0.7 else ()
    whom = f"rank {ranks[0]}" if ranks else "all ranks"
    return Trial(f"soak {step}", f"SIGKILL of {whom} at step {step}", (Fault("kill", step=step, ranks=ranks),))
