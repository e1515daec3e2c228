"""Loops as people write them, each killed again and again: the end has the same bits, or the log says what has not."""

from pathlib import Path

import pytest

from tests.support.cluster import launch, newest

IDIOMS = Path(__file__).parent / "idioms"
SLOWLY = Path(__file__).parents[1] / "support" / "slow_optimizers.py"
RANKS = {"target_network": 2}
TOLD = {
    "enumerated": "enumerate",
    "target_network": "no optimizer updates",
}  # what the log says where a resume cannot be exact
KILLS = 3

pytestmark = pytest.mark.soak


def command(name: str) -> tuple[str, ...]:
    """One plain process, or a launch."""
    script = (str(SLOWLY), str(IDIOMS / f"{name}.py"))
    return ("-m", "harness", "launch", f"--nproc-per-node={RANKS[name]}", "--", *script) if name in RANKS else script


def digests(url: Path) -> dict[str, str]:
    """Those of all parts but the random states, which begin anywhere where a script seeds only some of the generators."""
    return {part: digest for part, digest in newest(url)["digests"].items() if part != "random"}


@pytest.mark.parametrize("name", sorted(path.stem for path in IDIOMS.glob("*.py")))
def test_a_killed_loop_is_exact_or_the_log_says_why(tmp_path, name):
    """SIGKILL for all of it, each time after one more save than before; then it is left alone until its end."""
    with launch(tmp_path / "straight", None, command=command(name)) as run:
        run.succeed()
    url, said = tmp_path / "killed" / "run", ""
    for number in range(1, KILLS + 1):
        with launch(tmp_path / "killed", None, command=command(name)) as run:
            saves = f"step-*-{number:06}-*/manifest.json"  # of this attempt
            run.wait(lambda saves=saves, number=number: len(list(url.glob(saves))) >= number, "some saves of the attempt")
            run.kill()
            said += run.output()
    with launch(tmp_path / "killed", None, command=command(name)) as run:
        run.succeed()
        said += run.output()
    assert said.count("resuming from step-") == KILLS
    is_exact = digests(url) == digests(tmp_path / "straight" / "run")
    assert is_exact or (name in TOLD and TOLD[name] in said), said
