"""The drawings of a report, as SVG that stands in a page: text stays text, nothing is loaded, nothing is run."""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.checkpoint.format import Attempt
from harness.report.numbers import Kind, Life, RunReport
from harness.runtime.escapes import for_html, for_terminal

# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS: dict[Kind, str] = {
    "training": "#0072B2",
    "saving": "#E69F00",
    "loading": "#56B4E9",
    "starting": "#B8B8B8",
    "lost": "#D55E00",
    "down": "#F2F2F2",
}
_INK, _FAINT, _DEATH = "#333333", "#9A9A9A", "#B22222"
_WIDTH_INCHES = 9.0
_MOST_POINTS = 1500  # of a curve: more are not seen, and make the page heavy
_LARGEST = 1e200  # of a value that is drawn: beyond it the axis itself overflows
_LONGEST_NAME = 60  # characters of a metric's name beside its curve
_THINNEST = 1 / 2000  # of the time line: what is narrower is drawn with its neighbour
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "text.color": _INK, "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E6E6E6", "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip

Curve = Sequence[tuple[int, float]]


def losses(report: RunReport, name: str, curves: Mapping[Attempt, Curve]) -> str:
    """A metric over the steps, of all attempts, with each death and each resume."""

    def draw(axes: Axes) -> None:
        by_id = {attempt.id: drawable(points) for attempt, points in curves.items()}
        values = [value for points in by_id.values() for _, value in points if math.isfinite(value)]
        if values and min(values) > 0 and max(values) > 50 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        for life in report.lives:
            points = by_id.get(life.id, ())
            if points:
                points = [*_before(by_id, life), *points]  # from where it resumed
            kept = [(step, value) for step, value in points if step <= (life.kept_step or 0)]
            lost = [*kept[-1:], *((step, value) for step, value in points if step > (life.kept_step or 0))]
            line(axes, lost, color=COLOURS["lost"], **_HALO, gid=f"lost-{life.number}")
            line(axes, kept, color=COLOURS["training"], linewidth=1.4, gid=f"kept-{life.number}")
        for life in report.lives:
            _mark_on_curve(axes, life, by_id)
        label_steps(axes)
        axes.set_ylabel(for_terminal(name, _LONGEST_NAME), parse_math=False)  # a dollar is a dollar
        legend(axes, {"counts": ("-", COLOURS["training"]), "lost": ("-", COLOURS["lost"]), **_MARKS})

    return svg(f"{for_terminal(name, _LONGEST_NAME)} over the steps, with deaths and resumes", 3.4, draw)


def timeline(report: RunReport) -> str:
    """What each attempt did when, the first at the top."""
    lives = report.lives
    start = report.spans[0].begin if report.spans else lives[0].began
    unit, size = _unit(report.wall_seconds)

    def draw(axes: Axes) -> None:
        for row, life in enumerate(lives):
            for kind, bars in _bars(life, report.wall_seconds * _THINNEST).items():
                widths = [((begin - start) / size, (end - begin) / size) for begin, end in bars]
                found = axes.broken_barh(widths, (row - 0.35, 0.7), facecolors=COLOURS[kind], linewidth=0)
                found.set_gid(f"{kind}-{life.number}")
            if life.is_dead:
                _mark(axes, (life.ended - start) / size, row, "death", f"down-{life.number}")
        axes.set_ylim(len(lives) - 0.4, -0.6)
        axes.set_xlim(0, max(report.wall_seconds / size * 1.01, 1e-3))
        axes.set_xlabel(f"time since the start ({unit})")
        axes.set_ylabel("attempt")
        rows = range(0, len(lives), math.ceil(len(lives) / 30))
        axes.set_yticks(rows, [str(lives[row].number) for row in rows])
        axes.grid(visible=False, axis="y")
        entries: dict[str, tuple[str, str]] = {kind: ("s", colour) for kind, colour in COLOURS.items() if kind != "down"}
        legend(axes, {**entries, "death": _MARKS["death"]})

    return svg("what each attempt did when", min(1.3 + 0.24 * len(lives), 9), draw)


def saves(report: RunReport) -> str:
    """How long each save took, and how long the training waited for it."""

    def draw(axes: Axes) -> None:
        steps = [save.step for save in report.saves]
        durations, waits = (
            [max(getattr(save, name), 1e-4) for save in report.saves] for name in ("seconds", "blocked_seconds")
        )
        axes.plot(steps, durations, "o", color=COLOURS["training"], markersize=3.5, gid="durable")
        axes.plot(steps, waits, "v", color=COLOURS["saving"], markersize=3.5, gid="stall")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        label_steps(axes)
        axes.set_ylabel("time (seconds)")
        legend(axes, {"until durable": ("o", COLOURS["training"]), "training waited": ("v", COLOURS["saving"])})

    return svg("seconds until each save was durable, and seconds that the training waited", 2.6, draw)


_HALO: dict[str, Any] = {"linewidth": 4, "alpha": 0.4}  # seen below a curve that was trained again with the same bits
_MARKS = {"death": ("X", _DEATH), "resume": ("o", _INK)}


def _mark_on_curve(axes: Axes, life: Life, curves: Mapping[str, Curve]) -> None:
    """Where on the curve an attempt resumed, and where it died. One that has drawn no curve is marked on the axis."""
    if life.from_step is None:
        return
    own = curves.get(life.id, ())
    if life.from_step > 0:
        value = next((value for _, value in (*_before(curves, life), *own[:1])), None)
        _mark(axes, life.from_step, value, "resume", f"resume-{life.number}")
    if life.is_dead:
        step, value = own[-1] if own else (life.last_step or 0, None)
        _mark(axes, step, value, "death", f"death-{life.number}")


def _before(curves: Mapping[str, Curve], life: Life) -> Curve:
    """The point from which an attempt went on, where an earlier one has logged it."""
    earlier = (points for attempt, points in curves.items() if attempt < life.id)
    return [point for points in earlier for point in points if point[0] == life.from_step][-1:]


def _mark(axes: Axes, x: float, y: float | None, what: str, gid: str) -> None:
    """A death or a resume; on the axis where there is no value to put it beside."""
    shape, colour = _MARKS[what]
    is_death = what == "death"
    style: dict[str, Any] = {"markerfacecolor": colour if is_death else "white", "zorder": 4 if is_death else 3}
    style |= {"markeredgecolor": "white" if is_death else colour, "markeredgewidth": 0.6 if is_death else 1.2}
    if y is None or not math.isfinite(y):
        y, style["transform"] = 0.0, axes.get_xaxis_transform()
    axes.plot([x], [y], shape, markersize=6, clip_on=False, gid=gid, **style)


def line(axes: Axes, points: Curve, **style: Any) -> None:
    """A line through points. More points than a line can show are thinned out; the highest and the lowest stay."""
    if len(points) > _MOST_POINTS:
        size = math.ceil(len(points) / (_MOST_POINTS / 2))
        chunks = (points[start : start + size] for start in range(0, len(points), size))
        points = [point for chunk in chunks for point in sorted({min(chunk, key=_value), max(chunk, key=_value)})]
    if points:
        axes.plot([step for step, _ in points], [value for _, value in points], **style)


def _value(point: tuple[int, float]) -> float:
    return point[1]


def drawable(points: Curve) -> Curve:
    """The points, with a gap in the line where a value is none, or none that an axis can have."""
    return [(step, value if abs(value) < _LARGEST else math.nan) for step, value in points]


def _bars(life: Life, thinnest_seconds: float) -> dict[Kind, list[tuple[float, float]]]:
    """An attempt's times by kind. Short ones are drawn with what comes before them."""
    merged: list[tuple[Kind, float, float]] = []
    for span in life.spans:
        is_short = span.end - span.begin < thinnest_seconds
        if merged and (is_short or merged[-1][0] == span.kind):
            merged[-1] = (merged[-1][0], merged[-1][1], span.end)
        elif not is_short:
            merged.append((span.kind, span.begin, span.end))
    found: dict[Kind, list[tuple[float, float]]] = {}
    for kind, begin, end in merged:
        found.setdefault(kind, []).append((begin, end))
    return found


def label_steps(axes: Axes) -> None:
    """Has the axis below show steps, which are whole numbers."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend(axes: Axes, entries: Mapping[str, tuple[str, str]]) -> None:
    """Above the drawing, where it covers nothing."""
    handles = []
    for name, (shape, colour) in entries.items():
        face = "white" if name == "resume" else colour
        style: dict[str, Any] = {"color": colour, "marker": shape, "markerfacecolor": face, "linestyle": ""}
        if shape == "-":
            style = {"color": colour, **(_HALO if name == "lost" else {})}
        handles += axes.plot([], [], label=name, markersize=6, **style)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(entries), borderaxespad=0.2, handlelength=1.2
    )


def _unit(seconds: float) -> tuple[str, float]:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds > 3 * size:
            return unit, size
    return "seconds", 1.0


def svg(what: str, height_inches: float, draw: Callable[[Axes], None]) -> str:
    """An SVG element with what is drawn, as wide as its place."""
    # It warns of letters that its own font has not: the browser draws the text, and has others.
    with warnings.catch_warnings(action="ignore"), rc_context({**_STYLE, "svg.hashsalt": what}):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    element = re.sub(r' (width|height)="[^"]*"', "", element, count=2)  # its own: it is as large as its place
    return element.replace("<svg", f'<svg role="img" aria-label="{for_html(what)}"', 1)
