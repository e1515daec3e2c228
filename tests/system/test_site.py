"""The documentation site: it builds without a warning, has everything that the program has, and works in a real browser."""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
import yaml
from pydantic import BaseModel

import harness
from harness import errors
from harness.cli import cli
from harness.config import Config

REPOSITORY = Path(harness.__file__).parents[1]
PROSE_RULE = REPOSITORY / "docs" / "hooks" / "prose_rule.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it: a broken link or a missing anchor is an error."""
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_click"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pages_of_the_menu(entries=None) -> list[str]:
    """Every page that the menu leads to."""
    if entries is None:
        entries = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    found = []
    for entry in entries:
        for value in entry.values():
            found += [value.replace(".md", ".html")] if isinstance(value, str) else pages_of_the_menu(value)
    return found


def ids(page: Path) -> set[str]:
    """Every anchor of a page."""
    return set(re.findall(r' id="([^"]+)"', page.read_text()))


def test_every_link_leads_to_a_page_and_an_anchor(site):
    """Also those that mkdocs lets pass: to pages that are left out, or made by a hook."""
    anchors = {page: ids(page) for page in site.rglob("*.html")}
    for page in anchors:
        for link in re.findall(r'(?:href|src)="(?!\w+:|/|\?)([^"]*)"', page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            assert not anchor or anchor in anchors.get(target, {anchor}), f"{page.relative_to(site)}: {link}"


# --- what is in it ---------------------------------------------------------------------------------------------------


def keys(section: type[BaseModel] = Config, prefix: str = ""):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description


def test_every_key_of_the_configuration_is_in_the_reference(site):
    """Under a heading of its own, with what its docstring says."""
    text = (site / "reference" / "configuration.html").read_text()
    headings = re.findall(r'<h4 id="([^"]+)">', text)
    assert sorted(headings) == sorted(key for key, _ in keys())
    plain = " ".join(re.sub(r"<[^>]+>", "", text).split())
    for key, description in keys():
        first = " ".join(description.split()).replace("``", "").partition(".")[0]
        assert first in plain.replace("&quot;", '"').replace("&#39;", "'"), key


def test_every_verb_and_option_is_in_the_reference(site):
    """As click has them."""
    text = (site / "reference" / "command-line.html").read_text()
    assert {found for found in ids(site / "reference" / "command-line.html") if found.startswith("harness-")} == {
        f"harness-{name}" for name in cli.commands
    }
    for command in cli.commands.values():
        for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
            assert all(f"<code>{name}</code>" in text for name in option.opts), option.opts


def test_every_public_name_and_error_is_in_the_reference(site):
    """With its docstring: ``harness.__all__``, and the classes of errors, each of which has an exit code."""
    assert ids(site / "reference" / "api.html") >= {f"harness.{name}" for name in harness.__all__}

    def classes(base=errors.HarnessError):
        yield base
        for each in base.__subclasses__():
            yield from classes(each)

    assert ids(site / "reference" / "exit-codes.html") >= {f"harness.errors.{each.__name__}" for each in classes()}


def modules():
    for path in (REPOSITORY / "harness").rglob("*.py"):
        yield path, ast.parse(path.read_text())


def events() -> set[str]:
    """The names of all events that the code emits, with which a call or a record begins."""
    found = set()
    for _, module in modules():
        for node in ast.walk(module):
            names = []
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("emit", "_emit", "tell", "_tell"):
                names = [each for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)] if node.args else []
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                names = [value for key, value in pairs if getattr(key, "value", "") == "event"]
            found |= {name.value for name in names if isinstance(getattr(name, "value", None), str)}
    return found


def test_every_event_is_in_the_reference():
    """The table of docs/reference/events.md has those that the code emits, and no other."""
    text = (REPOSITORY / "docs" / "reference" / "events.md").read_text()
    table = text[text.index("| event |") :]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert events() - {*rows} == set(), "no row in events.md"
    assert {*rows} - events() == set(), "a row in events.md, and no such event"
    assert len(rows) == len({*rows})


def test_every_environment_variable_is_in_the_reference():
    """Those of launchers, of torch, and harness's own."""
    text = (REPOSITORY / "docs" / "reference" / "environment.md").read_text()
    of_launchers = "RANK|WORLD_SIZE|LOCAL_|MASTER_|GROUP_|TORCHELASTIC_|PET_|SLURM_|SKYPILOT_|OMPI_|MV2_|PMI_"
    name = re.compile(rf"({of_launchers}|TORCH_|OMP_|NO_COLOR|GLOO_|CUBLAS_|HARNESS_)[A-Z0-9_]*")
    texts = {str(node.value) for _, module in modules() for node in ast.walk(module) if isinstance(node, ast.Constant)}
    found = set(filter(name.fullmatch, texts)) - {"PET_"}
    assert len(found) > 20
    assert [name for name in sorted(found) if f"`{name}" not in text] == []


def test_the_picture_of_the_architecture_is_the_contract():
    """It has every layer, each above, or to the left of, those that it may import."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        layers = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]["layers"]
    order = [{name.strip() for name in layer.split(":")} for layer in layers if layer != "__main__"]
    picture = (REPOSITORY / "docs" / "explanation" / "architecture.svg").read_text()
    drawn = re.findall(r'class="name">(\w+)<', picture)
    assert sorted(drawn) == sorted(set().union(*order))
    assert [next(i for i, layer in enumerate(order) if name in layer) for name in drawn] == sorted(
        i for i, layer in enumerate(order) for _ in layer
    )


# --- in a browser ----------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """A test has no log."""


@pytest.fixture(scope="module")
def served(site):
    """Where the site can be reached; the search needs a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_no_page_is_empty_and_the_pictures_load(served, browser):
    """Every page of the menu has a title, text and its pictures, also without JavaScript."""
    with browser.new_context(java_script_enabled=False) as context:
        page, pictures = context.new_page(), 0
        for name in pages_of_the_menu():
            page.goto(served + name)
            assert len(page.locator("article h1").first.inner_text()) > 3, name
            assert len(page.locator("article").inner_text()) > 500, name
            sizes = page.eval_on_selector_all("article img", "all => all.map(each => each.naturalWidth)")
            assert all(sizes), name
            pictures += len(sizes)
    assert pictures >= 3


def test_the_search_finds_and_nothing_comes_from_elsewhere(served, browser):
    """What a user would type leads to the page that answers it, and nobody complains."""
    with browser.new_context() as context:
        page = context.new_page()
        heard, asked = [], []
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("console", lambda message: heard.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        questions = {"full disk": "recovery", "slurm": "launching", "how often to save": "tuning", "75": "exit-codes"}
        for words, answer in questions.items():
            page.locator("input.md-search__input").fill("")
            page.locator("input.md-search__input").press_sequentially(words)
            found = page.locator(f"li.md-search-result__item a[href*='{answer}.html']").first
            found.wait_for(state="attached")
        assert heard == []
        assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []


# --- the words -------------------------------------------------------------------------------------------------------


def test_the_rule_of_prose_finds_what_it_should(tmp_path):
    """A long sentence, also in a table, and a phrase; neither code, nor what is short."""
    if importlib.util.find_spec("pymarkdown") is None:
        pytest.skip("pymarkdown is not installed: pip install pymarkdownlnt")
    long = " ".join(["word"] * 26)
    page = tmp_path / "page.md"
    table = f"| a | b |\n| --- | --- |\n| {long} | whoever |"
    page.write_text(f"# A title\n\nShort. {long}.\n\n{table}\n\nA `{long}` and\n[it]({long[:9]}).\n")
    command = [sys.executable, "-m", "pymarkdown", "--add-plugin", str(PROSE_RULE), "scan", str(page)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    found = [line.partition("[")[2] for line in done.stdout.splitlines() if "HP001" in line]
    assert [line[:8] for line in found] == ["26 words", "26 words", "'whoever"], done.stdout + done.stderr


def test_make_check_scans_every_page():
    """A check that finds no pages finds no faults."""
    if importlib.util.find_spec("pymarkdown") is None:
        pytest.skip("pymarkdown is not installed: pip install pymarkdownlnt")
    recipe = next(line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "pymarkdown" in line)
    command = [sys.executable, "-m", "pymarkdown", "scan", "--list-files", *recipe.partition(" scan ")[2].split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    scanned = {Path(line).resolve() for line in done.stdout.splitlines()}
    places = [
        *REPOSITORY.glob("*.md"),
        *(page for each in ("benchmarks", "docs", "tests") for page in (REPOSITORY / each).rglob("*.md")),
    ]
    assert {page.resolve() for page in places} - scanned == set(), done.stderr


def test_the_readme_is_one_screen():
    """What is longer belongs into the site."""
    text = (REPOSITORY / "README.md").read_bytes()
    assert text.count(b"\n") <= 170
    assert len(text) <= 11 << 10


def test_nothing_says_to_install_a_strangers_package():
    """On PyPI, harness is another project's."""
    for folder in ("harness", "docs", "launch", "configs", "benchmarks", ".github"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh", ".sbatch", ".txt"):
                assert not re.search(r"pip3? install [^\n]*?['\" ]harness\b(?!/)", path.read_text()), path
    for path in (*REPOSITORY.glob("*.md"), REPOSITORY / "Makefile"):
        assert not re.search(r"pip3? install [^\n]*?['\" ]harness\b(?!/)", path.read_text()), path


def test_the_papers_are_of_this_version():
    """The changelog and the citation; the templates can be read."""
    assert f"## [{harness.__version__}] - " in (REPOSITORY / "CHANGELOG.md").read_text()
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == harness.__version__
    for path in (*(REPOSITORY / ".github").rglob("*.yaml"), REPOSITORY / ".pre-commit-config.yaml"):
        assert yaml.safe_load(path.read_text()), path
