"""A drill as one HTML page: its trials in a table, and the curve of each run beside that of the run without a death."""

from typing import TYPE_CHECKING

from harness.drill import words
from harness.drill.results import Findings, Result
from harness.report.page import document, drawing, table
from harness.runtime.escapes import for_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def page(findings: Findings, between_deaths_seconds: float) -> str:
    """The page, as HTML. Raises ``ConfigError`` where what draws it is not installed."""
    title = for_html(f"harness drill {findings.command}")
    rows = (
        (each.trial.what, words.outcome(each), each.why or words.in_deaths(each), _difference(each))
        for each in findings.results
    )
    about = f"{findings.steps} steps on {findings.ranks} rank{'s' * (findings.ranks > 1)}"
    parts = [
        f"<h1>{title}</h1><p>{about}</p>",
        *(f"<p><b>{for_html(line)}</b></p>" for line in words.verdict(findings)),
        *(f"<p>{for_html(line)}</p>" for line in words.costs(findings.costs, between_deaths_seconds)),
        f"<h2>Trials</h2>{table(('what was done', 'outcome', 'deaths', 'first difference'), rows, 'trials')}",
        f"<h2>{for_html(findings.metric)}</h2>{_curves(findings)}" if findings.curve else "",
    ]
    return document(title, parts)


def _difference(result: Result) -> str:
    if result.trial.is_control or not result.first_difference:
        return ""
    return f"{result.first_difference}. Most likely cause: {result.cause}"


def _curves(findings: Findings) -> str:
    """The run without a death as a line; the others as dots, which lie on it where they are exact."""

    figures = drawing("drill")

    def draw(axes: "Axes") -> None:
        figures.line(axes, figures.drawable(findings.curve), color=figures.COLOURS["training"], linewidth=1.4)
        for what, points in findings.curves.items():
            style = {"linestyle": "", "marker": "o", "markersize": 3, "alpha": 0.6}
            figures.line(axes, figures.drawable(points), color=figures.COLOURS["lost"], gid=what, **style)
        figures.label_steps(axes)
        axes.set_ylabel(findings.metric, parse_math=False)
        handles = {"no death": ("-", figures.COLOURS["training"]), "killed and resumed": ("o", figures.COLOURS["lost"])}
        figures.legend(axes, handles)

    return str(figures.svg(f"{findings.metric} over the steps, without a death and with", 3.4, draw))
