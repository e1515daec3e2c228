"""What mkdocs is taught: pages that lie elsewhere in the repository, links to its files, and the configuration's reference.

Links in all pages are those of the repository, so that they work there, too. README.md is the home page. A file of code
that a page links to becomes a page that shows it.
"""

import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))  # the configuration is this repository's, whichever is installed

from harness.config import Config, RunConfig  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "development/contributing.md",
    "SECURITY.md": "development/security.md",
    "CHANGELOG.md": "development/changelog.md",
    "benchmarks/README.md": "explanation/benchmarks.md",
}
CONFIGURATION = "<!-- configuration -->"
_SOURCE_OF = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/, and one for each file of code that some page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text()))
    for file in list(files.documentation_pages()):
        for _, link in _LINK.findall(file.content_string):
            target = _target(file.src_uri, link)
            page = _page_of(target)
            path = REPOSITORY / target
            if page.startswith("source/") and path.is_file() and page not in files.src_uris:
                language = {".sbatch": "bash", ".sh": "bash"}.get(path.suffix, path.suffix[1:])
                about = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---"
                content = f"{about}\n# {target}\n\n````{language}\n{path.read_text()}````\n"
                files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Makes a page's links those of the site, and puts the configuration in its place."""
    if page.file.src_uri.startswith("source/"):
        return markdown  # it is code
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        return found[1] + posixpath.relpath(_page_of(_target(page.file.src_uri, found[2])), here or ".")

    markdown = _LINK.sub(link, markdown)
    return markdown.replace(CONFIGURATION, configuration()) if CONFIGURATION in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings announce an example as reStructuredText does."""
    return html.replace("::</p>", ":</p>")


def _target(page: str, link: str) -> str:
    """The file of the repository to which a page's link leads."""
    source = _SOURCE_OF.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _page_of(target: str) -> str:
    """Where the site has a file of the repository."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/") and not target.endswith(".py"):
        return target.removeprefix("docs/")
    return f"source/{target.lstrip('.')}.md"  # the site leaves out what begins with a dot


# --- the configuration -----------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key: its type, its default, what it means. From the models, whose docstrings are the text."""
    own = [name for name in Config.model_fields if name not in RunConfig.model_fields]
    order = sorted(Config.model_fields, key=lambda name: name not in own)
    sections = [name for name in order if _is_section(Config.model_fields[name].annotation)]
    lines = ["## The top level", ""]
    lines += [line for name in order if name not in sections for line in _key(Config, name, "")]
    for name in sections:
        section = Config.model_fields[name].annotation
        lines += [f"## {name}", "", _text(section.__doc__), ""]
        lines += [line for key in section.model_fields for line in _key(section, key, f"{name}.")]
    return "\n".join(lines)


def _key(section: type[BaseModel], name: str, prefix: str) -> Iterator[str]:
    field = section.model_fields[name]
    schema = section.model_json_schema()["properties"][name]
    default = "required" if field.is_required() else f"default `{_yaml(field.get_default(call_default_factory=True))}`"
    yield f"#### `{prefix}{name}` {{ #{prefix}{name} }}"
    yield ""
    yield f"<span class=key-default markdown>{_type(schema)} · {default}</span>"
    yield ""
    yield _text(field.description)
    yield ""


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(schema: dict) -> str:
    """A type in words: ``integer, at least 1, or null``."""
    if "anyOf" in schema:
        return ", or ".join(_type(each) for each in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    name = {"object": "mapping", "array": "list"}.get(schema["type"], schema["type"])
    bounds = {"minimum": "at least", "exclusiveMinimum": "more than", "exclusiveMaximum": "less than"}
    return ", ".join([name, *(f"{words} {schema[bound]:g}" for bound, words in bounds.items() if bound in schema)])


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split()).replace("``", "`")


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
