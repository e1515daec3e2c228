"""Tables and a picture from the results of ``checkpoint.py``.

python benchmarks/report.py benchmarks/results/checkpoint.json      prints the tables
"""

import contextlib
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import BY_NAME, ENTRIES, Entry
from floors import ON_DISK, ON_S3

HERE = Path(__file__).parent
RESULTS = HERE / "results/checkpoint.json"
README = HERE / "README.md"
PICTURE = HERE.parent / "docs/stall.png"
BEGIN, END = "<!-- begin: written by checkpoint.py -->\n", "<!-- end -->\n"
NONE = "-"

Run = dict[str, Any]
Results = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """Something in seconds: where it lies in a run, and the floors of which the lowest counts."""

    name: str
    path: tuple[str, ...]
    disk_floors: tuple[str, ...]
    s3_floors: tuple[str, ...]

    def floors(self, *, s3: bool) -> tuple[str, ...]:
        return self.s3_floors if s3 else self.disk_floors


METRICS = [
    Metric("blocked", ("save", "blocked_seconds"), ("copy_reused",), ("copy_reused",)),
    Metric("added", ("save", "added_seconds"), ("copy_reused",), ("copy_reused",)),
    Metric("durable", ("save", "durable_seconds"), ("write", "write_direct"), ("upload",)),
    Metric("restore", ("restore", "warm", "seconds"), ("read_warm",), ("download",)),
    Metric("restore, step", ("restore", "warm", "with_step_seconds"), ("read_warm",), ("download",)),
    Metric("restore, backed", ("restore", "backed", "seconds"), ("read_warm",), ()),
    Metric("restore, cold", ("restore", "cold", "seconds"), ("read_cold",), ()),
]
BY_METRIC = {metric.name: metric for metric in METRICS}


class Figures:
    """The results, by contender and state."""

    def __init__(self, results: Results) -> None:
        self.runs: list[Run] = results["runs"]
        self.failures: list[Run] = results["failures"]
        self.states = list(dict.fromkeys(run["state"] for run in self.runs))

    def values(self, contender: str, state: str, *path: str) -> dict[int, float]:
        """By round."""
        found = {}
        for run in self.runs:
            value: Any = run if (run["contender"], run["state"]) == (contender, state) else None
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found[run["repeat"]] = value
        return found

    def of(self, entry: Entry, state: str, metric: Metric) -> dict[int, float]:
        """A contender's; those of the one whose checkpoints it writes, where it writes another's."""
        return self.values(entry.restores_as if self.is_shared(entry, metric) else entry.name, state, *metric.path)

    def is_shared(self, entry: Entry, metric: Metric) -> bool:
        return bool(entry.restores_as) and metric.path[0] == "restore"

    def floor(self, state: str, metric: Metric, *, s3: bool) -> dict[int, float]:
        candidates = [self.values("floors", state, "floors", name) for name in metric.floors(s3=s3)]
        return min((found for found in candidates if found), key=lambda found: statistics.median(found.values()), default={})

    def best_peer(self, state: str, metric: Metric, *, s3: bool) -> Entry | None:
        """Of all others; where it is about what is durable, of those that fsync."""
        peers = [
            entry
            for entry in ENTRIES
            if entry.s3 == s3 and not entry.is_ours and self.of(entry, state, metric) and not self.is_shared(entry, metric)
            if metric.name != "durable" or entry.fsync != "no"
        ]
        return min(peers, key=lambda peer: statistics.median(self.of(peer, state, metric).values()), default=None)

    def of_last(self, entry: Entry, states: list[str], value: Callable[[Run], float]) -> tuple[list[float], str]:
        """What a function makes of a contender's runs with the last of the states for which it can, and that state."""
        for state in reversed(states):
            found = []
            for run in self.runs:
                if (run["contender"], run["state"]) == (entry.name, state):
                    with contextlib.suppress(KeyError):  # a run of another kind
                        found.append(value(run))
            if found:
                return found, state
        return [], ""

    def failure(self, entry: Entry, state: str) -> str | None:
        return next(
            (each["reason"] for each in self.failures if (each["contender"], each["state"]) == (entry.name, state)), None
        )


# --- numbers in words ------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Two or three digits that say something."""
    for least, digits in ((10, 1), (1, 2), (0.1, 3), (0.001, 4)):
        if abs(value) >= least:
            return f"{value:.{digits}f}"
    return f"{value:.5f}"


def spread(values: Iterable[float]) -> str:
    """The median, the smallest and the largest."""
    found = sorted(values)
    return f"{number(statistics.median(found))} ({number(found[0])} to {number(found[-1])})" if found else NONE


def ratio(one: dict[int, float], other: dict[int, float]) -> str:
    """That of the medians."""
    if not one or not other or (below := statistics.median(other.values())) <= 0:
        return NONE
    return f"{statistics.median(one.values()) / below:.2f}"


def ratio_with_spread(one: dict[int, float], other: dict[int, float]) -> str:
    """That of the medians, and the smallest and largest of the rounds."""
    rounds = [one[key] / other[key] for key in one.keys() & other.keys() if other[key] > 0]
    return f"**{ratio(one, other)}** ({min(rounds):.2f} to {max(rounds):.2f})" if rounds else NONE


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines) + "\n"


def in_a_line(run: Run) -> str:
    """What is printed while the program works."""
    parts = [f"{run['contender']}, {run['state']}, round {run['repeat'] + 1}:"]
    for metric in METRICS:
        value: Any = run
        for key in metric.path:
            value = value.get(key, {})
        if value != {}:
            parts.append(f"{metric.name} {number(value)} s")
    parts += [
        f"{name} {number(value)} s" for name, value in run.get("floors", {}).items() if name in ON_DISK | ON_S3 and value
    ]
    if "ranks" in run:
        parts.append(f"{run['ranks']['ranks']} ranks read {run['ranks']['read_bytes'] / 1e6:.0f} MB")
    return "  ".join(parts)


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    """All that is written into README.md."""
    figures = Figures(results)
    sections = [conditions(results["machine"], figures), *headline(figures)]
    for state in figures.states:
        for s3 in (False, True):
            sections += everyone(figures, state, s3=s3)
    sections += [*beside_time(figures), *the_floors(figures), *the_failures(figures)]
    return "\n".join(sections)


def conditions(machine: dict[str, Any], figures: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['filesystem']}"
    rounds = len({run["repeat"] for run in figures.runs})
    took = f"It took {rounds} rounds and {machine['minutes']} minutes. The load before was {machine['load_before']}"
    return f"{machine['date']}. {hardware}; Linux {machine['kernel']}. {took}.\n\nVersions: {versions}.\n"


def headline(figures: Figures) -> list[str]:
    """harness, the best of the others, the floor, and the ratios."""
    rows = []
    for ours in (entry for entry in ENTRIES if entry.is_ours):
        for state in figures.states:
            for metric in METRICS:
                own = figures.of(ours, state, metric)
                peer = figures.best_peer(state, metric, s3=ours.s3)
                if not own:
                    continue
                theirs = figures.of(peer, state, metric) if peer else {}
                floor = figures.floor(state, metric, s3=ours.s3)
                rows.append(
                    [
                        f"{state}{' on S3' if ours.s3 else ''}, {metric.name}",
                        spread(own.values()),
                        peer.name if peer else NONE,
                        spread(theirs.values()),
                        ratio_with_spread(own, theirs),
                        spread(floor.values()),
                        ratio_with_spread(own, floor),
                    ]
                )
    if not rows:
        return []
    head = ["seconds", "harness", "best of the others", "its", "ratio", "floor", "ratio"]
    return ["### harness, the best of the others, and the floor\n", table(head, rows)]


def everyone(figures: Figures, state: str, *, s3: bool) -> list[str]:
    """All contenders with one state: seconds, and as a multiple of the best peer's and of the floor's."""
    rows = []
    for entry in ENTRIES:
        if entry.s3 != s3:
            continue
        cells = [cell(figures, entry, state, metric) for metric in METRICS]
        if any(each != NONE for each in cells) or figures.failure(entry, state):
            rows.append([f"**{entry.name}**" if entry.is_ours else entry.name, *cells])
    if not rows:
        return []
    return [f"### {state}{' on S3' if s3 else ''}\n", table(["", *(metric.name for metric in METRICS)], rows)]


def cell(figures: Figures, entry: Entry, state: str, metric: Metric) -> str:
    values = figures.of(entry, state, metric)
    if figures.is_shared(entry, metric):
        return f"as {entry.restores_as}" if values else NONE
    if not values:
        return "failed" if figures.failure(entry, state) and not entry.only_restores else NONE
    peer = figures.best_peer(state, metric, s3=entry.s3)
    to_peer = ratio(values, figures.of(peer, state, metric)) if peer else NONE
    to_floor = ratio(values, figures.floor(state, metric, s3=entry.s3))
    mark = "†" if metric.name == "durable" and entry.fsync == "no" else ""
    return f"{spread(values.values())}{mark} · {to_peer} · {to_floor}"


def beside_time(figures: Figures) -> list[str]:
    """Memory, bytes, tiny tensors, and what each does for them."""
    sized = [state for state in figures.states if not state.endswith("-tensors")]
    tiny = [state for state in figures.states if state.endswith("-tensors")]
    columns: dict[str, tuple[list[str], str, Callable[[Run], float]]] = {
        "memory, saving": (sized, "{:.0f} MB ({})", lambda run: saving_memory_bytes(run["save"]) / 1e6),
        "memory, restoring": (sized, "{:.0f} MB ({})", lambda run: run["restore"]["warm"]["extra_memory_bytes"] / 1e6),
        "stored / state": (sized, "{:.3f}", lambda run: run["save"]["stored_bytes"] / run["save"]["payload_bytes"]),
        "read by 2 ranks / stored": (sized, "{:.2f}", lambda run: run["ranks"]["read_bytes"] / run["ranks"]["stored_bytes"]),
        "bytes for a tiny tensor": (tiny, "{:.0f}", lambda run: run["save"]["stored_bytes"] / run["save"]["tensors"]),
        "µs for one": (tiny, "{:.1f}", lambda run: 1e6 * run["save"]["durable_seconds"] / run["save"]["tensors"]),
    }
    rows = []
    for entry in ENTRIES:
        cells = []
        for states, text, value in columns.values():
            found, state = figures.of_last(entry, states, value)
            cells.append(text.format(statistics.median(found), state) if found else NONE)
        if any(each != NONE for each in cells):
            name = f"**{entry.name}**" if entry.is_ours else entry.name
            rows.append([name, *cells, entry.fsync, entry.checksum, entry.atomic, entry.pickle])
    head = ["", *columns, "fsync", "checksum", "atomic", "pickle"]
    return ["### Memory, bytes and marks\n", table(head, rows)] if rows else []


def saving_memory_bytes(saved: Run) -> float:
    return saved["extra_memory_bytes"] + saved["children_memory_bytes"]


def the_floors(figures: Figures) -> list[str]:
    rows = []
    for name, what in {**ON_DISK, **ON_S3}.items():
        found = [figures.values("floors", state, "floors", name) for state in figures.states]
        if any(found):
            rows.append([what, *(spread(each.values()) for each in found)])
    return ["### Floors, in seconds\n", table(["", *figures.states], rows)] if rows else []


def the_failures(figures: Figures) -> list[str]:
    if not figures.failures:
        return []
    head = ["failed", "state", "round", "reason"]
    rows = [
        [run["contender"], run["state"], str(run["repeat"] + 1), run["reason"].replace("|", "\\|")]
        for run in figures.failures
    ]
    return ["### Failures\n", table(head, rows)]


# --- files -----------------------------------------------------------------------------------------------------------


def write(results: Results, path: Path) -> None:
    """A run in each line, so that two versions can be compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {
        name: "[\n" + ",\n".join(f"  {json.dumps(run)}" for run in results[name]) + "\n ]" for name in ("runs", "failures")
    }
    about = json.dumps(results["machine"])
    path.write_text(f'{{"machine": {about},\n "runs": {lists["runs"]},\n "failures": {lists["failures"]}}}\n')


def publish(results: Results) -> None:
    """Writes the results, the tables between the marks in README.md, and the picture."""
    write(results, RESULTS)
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    picture = "![seconds that a save blocks the training](../docs/stall.png)\n\n"
    README.write_text(f"{before}{BEGIN}\n{picture}{tables(results)}\n{END}{after}")
    draw(results, PICTURE)


def draw(results: Results, path: Path) -> None:
    """How long a save blocks the training, by the size of the state: all systems on the disk."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figures, metric = Figures(results), BY_METRIC["blocked"]
    states = [state for state in figures.states if state.endswith("GB")]
    lines = {
        entry.name: medians(states, lambda state, entry=entry: figures.of(entry, state, metric))
        for entry in ENTRIES
        if not entry.s3
    }
    lines["a copy in memory, nothing else"] = medians(states, lambda state: figures.floor(state, metric, s3=False))
    lines = {name: points for name, points in lines.items() if points}
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="model and optimizer, GB", ylabel="seconds that a save blocks the training")
    heights = spaced({name: points[-1][1] for name, points in lines.items()})
    for name, points in lines.items():
        style = style_of(name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=1.8 + 1.4 * style["linewidth"], **style)
        words = {"color": style["color"], "weight": "bold" if style["linewidth"] > 2 else "normal", "fontsize": 8.5}
        arrow = {
            "arrowstyle": "-",
            "color": style["color"],
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": (0, 0.5),
        }
        label = f"{name}  {number(points[-1][1])} s"
        place = (points[-1][0] * 1.25, heights[name])
        axes.annotate(label, points[-1], place, annotation_clip=False, va="center", arrowprops=arrow, **words)
    sizes = [float(state.removesuffix("GB")) for state in states]
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    shown = [*heights.values(), *(seconds for points in lines.values() for _, seconds in points)]
    axes.set_ylim(min(shown) / 1.5, max(shown) * 1.5)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    whole = io.BytesIO()
    figure.savefig(whole, dpi=100)
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(48).save(path, optimize=True)  # a third of the bytes


def style_of(name: str) -> dict[str, Any]:
    if name in BY_NAME and BY_NAME[name].is_ours:
        return {"color": "#c0392b", "linewidth": 2.6, "zorder": 3}
    if name not in BY_NAME:
        return {"color": "#1f2933", "linewidth": 1.4, "linestyle": "--"}
    return {"color": "#7b8494", "linewidth": 1.2}


def medians(states: list[str], values: Callable[[str], dict[int, float]]) -> list[tuple[float, float]]:
    found = {float(state.removesuffix("GB")): values(state).values() for state in states}
    return [(size, statistics.median(each)) for size, each in found.items() if each]


def spaced(heights: dict[str, float], least_ratio: float = 1.28) -> dict[str, float]:
    """Heights for labels on a logarithmic axis: near their own, in the same order, and none over another."""
    placed: dict[str, float] = {}
    groups: list[tuple[list[str], float]] = []  # names from below, and the logarithm of the lowest one's height
    step = math.log(least_ratio)
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        groups.append(([name], math.log(height)))
        while len(groups) > 1 and groups[-2][1] + step * len(groups[-2][0]) > groups[-1][1]:
            (below, _), (above, _) = groups[-2:]
            names = below + above
            middle = statistics.mean(math.log(heights[each]) for each in names)
            groups[-2:] = [(names, middle - step * (len(names) - 1) / 2)]
    for names, lowest in groups:
        placed |= {name: math.exp(lowest + step * index) for index, name in enumerate(names)}
    return placed


def main() -> None:
    results = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text())
    print(tables(results))


if __name__ == "__main__":
    main()
