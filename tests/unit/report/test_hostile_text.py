"""What anybody may write into a run's URL: it is text wherever it is shown, what cannot be read is counted."""

import json
import re
import uuid
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harness
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.config import RunConfig
from harness.errors import ConfigError
from harness.report import numbers, page, words
from harness.runtime.escapes import for_html, for_terminal
from harness.storage.store import open_store
from harness.telemetry import journal
from harness.telemetry.dashboards import Prometheus, TensorBoard
from harness.telemetry.events import EventLog

ATTEMPTS = [Attempt(f"{number:06}-aaaaaaaa") for number in (1, 2, 3)]
SCRIPT = "\"><script>alert(1)</script><x y='"
NASTY = [
    SCRIPT, "R$^2_$_", "\x1b]0;PWNED\x07", "\u202egnp", "a\nb\r\tc\0", "\ud800",
    "</style></svg><img src=x onerror=alert(1)>", "损失 🦆", "x" * 5000, "]]>--><!--", "{x:g} %s %(a)s", "", "&lt;",
    "\x85\u2028",
]  # fmt: skip


class Elements(HTMLParser):
    """The elements and the attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {tag, *(name for name, _ in attrs)}


PLAIN = {"event": "train", "time": 1000.0, "step": 1, "loss": 1.0}


def record(event: str, time: float, step: int, **values) -> dict:
    return {"event": event, "time": time, "step": step, **values}


def told(text: str) -> list[dict]:
    """Everything that an attempt can say, with a stranger's text in each place that holds text."""
    saved = {"bytes": 10, "seconds": 1.0, "blocked_seconds": 0.1, "retries": 0, "directory": text}
    return [
        record("start", 1000, 0, lineage=[], directory=text),
        record("train", 1001, 1, **{f"x{text}": 1.0}, lr=0.1),
        record("beat", 1001, 1),
        record("evaluate", 1001, 1, **{f"x{text}": 1.0}),
        record("saving", 1002, 2),
        record("save", 1003, 2, **saved),
        record("save_failed", 1003, 2, error=text),
        record("skip", 1003, 3),
        record("fallback", 1003, 3, directory=text, why=text),
        record("nonfinite", 1003, 3, policy=text, samples=[text]),
        record("straggler", 1003, 3, rank=1, host=text, seconds=2.0, median_seconds=1.0),
        record("error", 1004, 3, error=text),
    ]


def told_after(text: str) -> list[dict]:
    """What the attempt says that goes on from what a survivor has kept."""
    return [record("kept", 1010, 3, rank=1, host=text, why=text), record("resume", 1011, 3, lineage=[[ATTEMPTS[0].id, 3]])]


def written(url: str, *lines: list) -> tuple[Catalog, journal.Records]:
    """A run whose attempts told these lines (bytes, or records), as whoever reports on it finds it."""
    store = open_store(url)
    for attempt, own in zip(ATTEMPTS, lines, strict=False):
        data = b"\n".join(each if isinstance(each, bytes) else json.dumps(each).encode() for each in own)
        store.put(f"metrics/{attempt.id}-000000.jsonl", lambda data=data: [data], len(data))
    return Catalog(store), journal.read_records(store)


def shown(catalog: Catalog, records: journal.Records) -> tuple[str, str]:
    """The report on the terminal and as a page; its numbers and its metrics are JSON that strict readers take."""
    found = numbers.read_report(catalog, records, now=2000.0)
    for value in (found.as_json(), [*journal.merged(records, numbers.newest_lineage(catalog))]):
        json.dumps(value, allow_nan=False)
    text = words.short(found)
    assert all(line.isprintable() for line in text.split("\n"))
    return text, page.page(found, records)


@pytest.fixture(scope="module")
def elements():
    """What a page is made of where nobody means harm."""
    return Elements(shown(*written("memory://hostile/plain", told("harmless"), told_after("harmless")))[1]).found


@pytest.mark.parametrize("text", NASTY[:6])  # a page takes a second; the others go through the same functions below
def test_text_is_text_on_the_page_and_on_the_terminal(text, elements):
    """A metric's name, an error, a host, a directory: none adds an element or an attribute to the page, or fails."""
    catalog, records = written(f"memory://hostile/{abs(hash(text))}", told(text), told_after(text))
    about = json.dumps({"host": text, "world_size": text, "launch": text}, default=str).encode()
    catalog.store.put(f"attempts/{ATTEMPTS[0].id}.json", lambda: [about], len(about))
    terminal, html = shown(catalog, records)
    assert records.unreadable == 0
    assert Elements(html).found == elements
    html.encode()
    terminal.encode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", html)


def test_every_event_that_is_read_is_among_them():
    """A report has words for each, and a name that no word runs into."""
    lines = [*told("what"), *told_after("there")]
    assert {each["event"] for each in lines} >= numbers.NOTES.keys() | journal.REQUIRED.keys()
    terminal, _ = shown(*written("memory://hostile/words", lines))
    for event in numbers.NOTES:
        assert re.search(rf"^{event} +(step 3|what|step 2): ", terminal, re.MULTILINE), event


def test_a_metrics_name_is_shown_as_it_is(elements):
    """With its dollars and its brackets, beside its curve."""
    html = shown(*written("memory://hostile/name", told(f"$R^2$ {SCRIPT}")))[1]
    assert html.count("x$R^2$ &quot;&gt;&lt;script&gt;alert(1)") == 2, "the heading, and what is read aloud"
    assert 'x$R^2$ "&gt;&lt;script&gt;alert(1)' in re.sub("<!--.*?-->", "", html), "beside the axis"
    assert "<script" not in html


def test_what_a_terminal_and_a_page_are_given():
    """Controls are shown; everything printable comes through."""
    assert for_terminal("\x1b[2J\x9b\r\n\u202eé 損 🦆 \\") == "\\x1b[2J\\x9b\\r\\n\\u202eé 損 🦆 \\"
    assert for_terminal("ab" * 10, 3) == "aba…"
    assert for_html("<a b='\"\x00'>") == "&lt;a b=&#x27;&quot;\\x00&#x27;&gt;"


# --- lines that are damaged, or made to do harm ----------------------------------------------------------------------

HOSTILE_LINES = {
    "no JSON": b"{",
    "another shape": b"[1]",
    "nothing of a record": b"{}",
    "no step": json.dumps({**PLAIN, "step": None}).encode(),
    "a step in words": json.dumps({**PLAIN, "step": "7"}).encode(),
    "a step that is true": json.dumps({**PLAIN, "step": True}).encode(),
    "a negative step": json.dumps({**PLAIN, "step": -1}).encode(),
    "a step beyond all": json.dumps({**PLAIN, "step": 10**30}).encode(),
    "an event that is a list": json.dumps({**PLAIN, "event": ["train"]}).encode(),
    "a time in words": json.dumps({**PLAIN, "time": "now"}).encode(),
    "a time before time": json.dumps({**PLAIN, "time": -5}).encode(),
    "a time beyond time": b'{"event": "train", "time": 1e300, "step": 1}',
    "no time at all": b'{"event": "train", "time": NaN, "step": 1}',
    "deep nesting": b'{"event": "train", "time": 1, "step": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nesting that Python takes": json.dumps({**PLAIN, "x": [[[[[[[[[[1]]]]]]]]]]}).encode(),
    "a number of a million digits": b'{"event": "train", "time": 1, "step": ' + b"9" * 1_000_000 + b"}",
    "a lineage of nobody": json.dumps({**PLAIN, "event": "resume", "lineage": [["x", 1]]}).encode(),
    "a lineage that is none": json.dumps({**PLAIN, "event": "resume", "lineage": {"a": 1}}).encode(),
    "a save without a size": json.dumps({**PLAIN, "event": "save"}).encode(),
    "a save that took less than no time": json.dumps(
        {**PLAIN, "event": "save", "bytes": 1, "seconds": -1, "blocked_seconds": 0}
    ).encode(),
    "an error that is none": json.dumps({**PLAIN, "event": "error", "error": {"a": 1}}).encode(),
    "a rank without a host": json.dumps({**PLAIN, "event": "kept", "rank": 1}).encode(),
    "another attempt's": json.dumps({**PLAIN, "attempt": ATTEMPTS[2].id}).encode(),
    "other letters": b'{"event": "train", "time": 1, "step": 1, "x": "\xe9"}',
    "no letters": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("case", HOSTILE_LINES)
def test_a_line_that_cannot_be_read_is_counted(case):
    """The report is that of the other lines, and says that one is missing."""
    url = f"memory://hostile/line-{case.replace(' ', '-')}"
    catalog, records = written(url, [told("x")[0], HOSTILE_LINES[case], *told("x")[1:]])
    assert records.unreadable == 1
    assert "could not be read" in words.short(numbers.read_report(catalog, records, now=2000.0))
    assert len(records[ATTEMPTS[0]]) == len(told("x"))


def test_a_line_that_is_too_long_is_not_kept(monkeypatch):
    """It is read in slices, and takes no more memory than they do; what comes after it is there."""
    monkeypatch.setattr(journal, "SLICE_BYTES", 1000)
    monkeypatch.setattr(journal, "LINE_LIMIT_BYTES", 2000)
    long = json.dumps({**PLAIN, "x": "y" * 50_000}).encode()
    _, records = written("memory://hostile/long", [told("x")[0], long, PLAIN])
    assert (records.unreadable, [each["event"] for each in records[ATTEMPTS[0]]]) == (1, ["start", "train"])
    pieces = iter([b"ab\nc", b"", b"d\n\n", b"e"])
    assert list(journal._lines(pieces)) == [b"ab", b"cd", b"", b"e"]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.integers(0, 50),
    st.floats(),
    st.sampled_from([*NASTY, "nan", "inf", ATTEMPTS[0].id, "000009-bbbbbbbb", "9999-99-99T99:99", "0001-01-01T00:00:00"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
FIELDS = (
    "step", "time", "event", "attempt", "lineage", "bytes", "seconds", "blocked_seconds", "retries", "error", "directory",
)  # fmt: skip
FIELDS = (*FIELDS, "why", "policy", "samples", "rank", "host", "median_seconds", "loss", "lr", "uptime_seconds")


@st.composite
def mutated(draw) -> dict:
    """A line that an attempt would write, with a few fields replaced or taken away."""
    line = dict(draw(st.sampled_from([*told("x"), record("resume", 1000, 5, lineage=[[ATTEMPTS[0].id, 5]])])))
    line["time"] = draw(st.floats(0, 1e5))
    line["step"] = draw(st.integers(0, 100))
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=2)):
        line[name] = draw(VALUES)
    if draw(st.integers(0, 9)) == 0:
        line.pop(draw(st.sampled_from(sorted(line))))
    return line


CLAIMS = st.dictionaries(
    st.sampled_from(["began", "started", "host", "world_size", "launch", "restarts", "launcher_began"]), VALUES
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(lines=st.lists(st.lists(mutated(), max_size=12), max_size=3), claims=st.lists(VALUES | CLAIMS, max_size=3))
def test_whatever_lies_in_the_url_makes_a_report(lines, claims):
    """Journals and claims with anything in them: numbers that add up, lines for a terminal, a page."""
    catalog, records = written(f"memory://hostile/{uuid.uuid4().hex}", *lines)
    for attempt, claim in zip(ATTEMPTS, claims, strict=False):
        text = json.dumps(claim).encode()
        catalog.store.put(f"attempts/{attempt.id}.json", lambda text=text: [text], len(text))
    assert sum(map(len, records.values())) + records.unreadable <= sum(map(len, lines))
    if not any(records.values()):
        return
    report = numbers.read_report(catalog, records, now=2000.0)
    assert all(span.end >= span.begin for span in report.spans)
    assert sum(report.seconds(kind) for kind in numbers.KINDS) == pytest.approx(report.wall_seconds)
    shown(catalog, records)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"null", b"[" * 200_000, b'{"began": 1e999, "started": "x", "host": {}, "restarts": -1}', b"\xff"]
)
def test_records_of_attempts_and_crashes_may_hold_anything(text):
    """What cannot be read says nothing."""
    catalog, records = written(f"memory://hostile/claims-{abs(hash(text))}", told("x"))
    for name in (f"{ATTEMPTS[0].id}.json", f"{ATTEMPTS[0].id}.crash-0.json", f"{ATTEMPTS[1].id}.crash-1.json"):
        catalog.store.put(f"attempts/{name}", lambda: [text], len(text))
    assert words.short(numbers.read_report(catalog, records, now=2000.0))


# --- dashboards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY)
def test_prometheus_reads_any_name(text, tmp_path):
    """Names that differ stay apart, whatever they are made of."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    path = tmp_path / "x.prom"
    own = {"event": "train", "time": 5.0, "step": 7}
    Prometheus(str(path)).write({**own, f"a{text}": 1.0, f"a{text}{{b=": 2.0, "a b": 3.0, "a_b": 4.0, "time_seconds": 8.0})
    families = {family.name: family for family in parser.text_string_to_metric_families(path.read_text())}
    samples = [sample for family in families.values() for sample in family.samples]
    assert sorted(sample.value for sample in samples) == [1, 2, 3, 4, 5, 7, 8]
    assert [each.value for each in families["harness_train_time_seconds"].samples if not each.labels] == [5]
    assert families["harness_train_step"].samples[0].value == 7
    assert path.read_text().count("# TYPE harness_train_a_b ") == 1


def test_tensorboard_takes_any_name(tmp_path):
    """One odd name costs no other metric its curve."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    board = TensorBoard(str(tmp_path))
    board.write({"event": "start", "time": 1.0, "step": 0})
    board.write({**PLAIN, **{f"a{text}": 1.0 for text in NASTY}, "z": 2.0})
    board.close()
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"train/z" in data
    assert b"train/a\\x1b]0;PWNED" in data


def test_a_value_never_takes_the_records_own_place(tmp_path):
    """Whoever calls a metric ``time`` or ``attempt`` does not change when, and by whom, it was told."""
    path = tmp_path / "log.jsonl"
    config = RunConfig.model_validate({"log": {"jsonl": str(path)}})
    events = EventLog(config, active=True, attempt=ATTEMPTS[0].id)
    values = {"time": 0.1, "attempt": "x", "name": 1.0, "message": 2.0, "self": 3.0}
    events.emit("train", "", step=1, **{key: value for key, value in values.items() if key != "self"})
    found = json.loads(path.read_text())
    assert (found["event"], found["attempt"], found["name"], found["message"]) == ("train", ATTEMPTS[0].id, 1.0, 2.0)
    assert found["time"] > 1e9


@pytest.mark.parametrize("name", ["step", "event", "message", "time", "attempt", "lr", "\ud800"])
def test_a_step_refuses_such_names(name):
    """At the first step with it, in words; any other name, ``self`` and ``name`` too, is a metric."""
    model = torch.nn.Linear(1, 1)
    run = harness.Run(None, {"model": model}, config={"log": {"every_steps": 1}}, stop=harness.StopRequest())
    for _ in run.steps(1):
        with pytest.raises(ConfigError, match=r"run\.step: the name"):
            run.step(**{name: 1.0})
        run.step(self=1.0, name=2.0, why=3.0)
    assert run.state.progress.last == {"self": 1.0, "name": 2.0, "why": 3.0}


def test_values_that_json_has_not(tmp_path):
    """They are told in words, however deep they lie, and the line is there."""
    path = tmp_path / "log.jsonl"
    events = EventLog(RunConfig.model_validate({"log": {"jsonl": str(path)}}), active=True)
    values = {
        "a": np.float32(0.5),
        "b": torch.tensor(2.0),
        "c": [float("nan"), {"d": float("inf")}],
        "e": object,
        "f": np.int64(3),
    }
    events.emit("train", "", **values)
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["a"], found["b"], found["c"], found["f"]) == (0.5, 2.0, ["nan", {"d": "inf"}], 3)
