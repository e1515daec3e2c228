"""A report as one HTML page that needs nothing else: no network, no script."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from harness.checkpoint.format import Attempt
from harness.errors import ConfigError
from harness.report import numbers, words
from harness.report.numbers import KINDS, RunReport
from harness.report.units import duration
from harness.runtime.escapes import for_html
from harness.telemetry.journal import Record

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #333; background: #fff; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .2rem 0; color: #555; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem 2.5rem; margin: 1.2rem 0; }
.figures b { display: block; font-size: 1.5rem; font-weight: 600; } .figures span { color: #666; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th { text-align: left; font-weight: 600; }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } td.w { overflow-wrap: anywhere; }
i { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border: 1px solid #0002; }
.doubt { color: #B22222; } svg { width: 100%; height: auto; display: block; }
"""

_MOST_CHARACTERS = 2000  # of a cell


def page(report: RunReport, records: Mapping[Attempt, Sequence[Record]]) -> str:
    """The page. Raises ``ConfigError`` where what draws it is not installed."""
    figures = drawing("report")
    name, curves = numbers.curves(records)
    title = for_html(words.headline(report), _MOST_CHARACTERS)
    parts = [
        f"<h1>{for_html(report.url)}</h1><p>{for_html(words.summary(report), _MOST_CHARACTERS)}</p>",
        *(f'<p class="doubt">{for_html(doubt, _MOST_CHARACTERS)}</p>' for doubt in report.doubts),
        _key_figures(report),
        f"<h2>{for_html(name, _MOST_CHARACTERS)}</h2>{figures.losses(report, name, curves)}",
        f"<h2>Attempts</h2>{figures.timeline(report)}{_attempts(report)}",
        *([f"<h2>Deaths</h2>{_deaths(report)}"] if report.known_deaths else []),
        f"<h2>Where the time went</h2>{_times(report, figures.COLOURS)}",
        f"<h2>Saves</h2>{figures.saves(report) if report.saves else ''}{_saves(report)}",
        *_notes(report),
    ]
    return document(title, parts)


def drawing(what: str) -> ModuleType:
    """``harness.report.figures``. Raises ``ConfigError`` where what it draws with is not installed; ``what`` has a page."""
    try:
        from harness.report import figures  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ConfigError(f"the page of a {what} needs matplotlib: pip install matplotlib ({error})") from None
    return figures


def write(path: str, text: str) -> None:
    """Writes a page. Raises ``ConfigError`` where that cannot be."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML that stands by itself."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _key_figures(report: RunReport) -> str:
    found = report.as_json()
    mean = found["mean_time_to_recovery_seconds"]
    shown = {
        "goodput": f"{report.goodput:.1%}",
        "wall time": duration(report.wall_seconds),
        "deaths": str(found["deaths"]),
        "lost steps": words.lost(report.lost_steps, is_exact=report.is_lost_exact),
        "mean time to recovery": "none" if mean is None else duration(mean),
    }
    cells = (
        f'<div id="{key.replace(" ", "-")}"><b>{for_html(value)}</b><span>{for_html(key)}</span></div>'
        for key, value in shown.items()
    )
    return f'<div class="figures">{"".join(cells)}</div>'


def _attempts(report: RunReport) -> str:
    rows = (
        (life.number, life.host, life.ranks or "", words.steps(life), duration(life.ended - life.began), life.ending)
        for life in report.lives
    )
    found = table(("attempt", "host", "ranks", "trained", "#lived", "ended"), rows, "attempts")
    many = len(report.lives) > words.MOST_LINES
    return f"<details><summary>All {len(report.lives)} attempts</summary>{found}</details>" if many else found


def _deaths(report: RunReport) -> str:
    rows = (
        (
            death.life.number,
            "" if death.life.last_step is None else death.life.last_step,
            words.lost(death.life.lost_steps, is_exact=death.life.is_complete),
            words.continued(death),
            death.life.ending,
        )
        for death in report.known_deaths
    )
    return table(("attempt", "#last step", "#steps lost", "what followed", "died of"), rows, "deaths")


def _times(report: RunReport, colours: Mapping[numbers.Kind, str]) -> str:
    wall = max(report.wall_seconds, 1e-9)
    rows = "".join(
        f'<tr><td><i style="background:{colours[kind]}"></i>{kind}</td><td class="n">{report.seconds(kind) / wall:.1%}</td>'
        f'<td class="n">{duration(report.seconds(kind))}</td><td>{for_html(words.MEANINGS[kind])}</td></tr>'
        for kind in KINDS
    )
    return f'<table id="times">{rows}</table>'


def _saves(report: RunReport) -> str:
    return f"<p>{for_html('; '.join(words.saves(report)))}</p>"


def _notes(report: RunReport) -> Iterable[str]:
    for event, title in numbers.NOTES.items():
        if records := report.notes.get(event):
            rows = ((int(str(record["attempt"])[:6]), words.note(record)) for record in records)
            yield f"<h2>{for_html(title.replace('_', ' ').capitalize())}</h2>{table(('attempt', 'what'), rows, event)}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], name: str) -> str:
    """A table; columns whose head begins with # hold numbers."""
    kinds = ["n" if title.startswith("#") else "w" for title in head]
    top = "".join(
        f'<th class="{kind}">{for_html(title.removeprefix("#"))}</th>' for kind, title in zip(kinds, head, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{for_html(cell, _MOST_CHARACTERS)}</td>' for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table id="{for_html(name)}"><tr>{top}</tr>{body}</table>'
