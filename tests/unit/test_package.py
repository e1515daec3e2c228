"""What others may count on, and how the modules hang together."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import harness
from harness import errors
from harness.cli import cli

PACKAGE = Path(harness.__file__).parent
LONGEST_FUNCTION_LINES = 70
LONGEST_CLASS_LINES = 250
MOST_METHODS = 15  # beside properties, and what Python calls


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package under its dotted name."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    return {name: ast.parse(path.read_text(), str(path)) for path, name in paths.items()}


def test_the_public_names():
    """What ``import harness`` offers; a name that comes or goes is a decision."""
    names = "Checkpointer Evaluation HarnessError Loader Run Schedule StopRequest Task join_world latest load"
    names += " random_state restore_random_state save"
    assert harness.__all__ == names.split()
    for name in harness.__all__:
        assert len(getattr(harness, name).__doc__) > 60, f"{name}: say what it is, in what units, and what it raises"


def test_the_public_names_are_listed():
    """``dir(harness)`` and completion show them before they are first used, and nothing is imported for it."""
    code = "import sys, harness; print(set(harness.__all__) <= set(dir(harness)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_importing_harness_imports_no_library_of_others():
    """An integration is imported by who asks for it, and stands on the public surface alone."""
    code = "import harness, sys; [getattr(harness, name) for name in harness.__all__]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in done.stdout.split()} | set(done.stdout.split())
    assert not found & {"transformers", "lightning", "pytorch_lightning", "accelerate", "harness.integrations"}
    for name, module in modules().items():
        imported = [each.module or "" for each in ast.walk(module) if isinstance(each, ast.ImportFrom)]
        ours = {each for each in imported if each.startswith("harness")}
        if name.startswith("integrations."):
            assert all(each == "harness.errors" or each.startswith("harness.integrations") for each in ours), (name, ours)
        else:
            assert not any("integrations" in each for each in ours), name


@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in modules() if "." in name}))
def test_each_package_says_what_lives_there(name):
    """What it is, what it stands on, what never enters: the map of the code is in the packages themselves."""
    text = ast.get_docstring(modules()[f"{name}.__init__"])
    assert text is not None
    assert len(text) > 60


@pytest.mark.parametrize(
    "module",
    [
        *("harness", "harness.cli", "harness.config", "harness.checkpoint.catalog", "harness.launcher.launch"),
        *("harness.doctor", "harness.telemetry.journal", "harness.report.numbers", "harness.report.page"),
    ],
)
def test_importing_is_cheap(module):
    """No torch for those who only look, configure, or launch."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_importing_changes_nothing():
    """No signal handlers, no logging set up, no seeds drawn, no environment."""
    code = """
import logging, os, random, signal

def state():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), dict(os.environ), random.getstate()

before = state()
import harness, harness.cli, harness.config
assert state() == before
assert not logging.getLogger().handlers
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def verbs(group: click.Group = cli, path: str = "") -> dict[str, click.Command]:
    return {path + name: command for name, command in group.commands.items()}


def test_the_verbs():
    """A verb that comes or goes is a decision, too."""
    assert {"train", "launch", "doctor", "ls", "inspect", "verify", "prune"} <= set(verbs())


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_has_help(verb):
    """A first line that ends with a full stop or a usage, and a sentence for every option."""
    command = verbs()[verb]
    assert command.help
    assert len(command.help.splitlines()[0]) > 10
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{verb} {parameter.opts}"
    done = subprocess.run([sys.executable, "-m", "harness", verb, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: python -m harness {verb} ")


@pytest.mark.parametrize("name", sorted(modules()))
def test_functions_fit_a_screen(name):
    """None is longer than 70 lines."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION_LINES, f"{name}.{node.name} has {lines} lines"


def test_classes_have_one_concern():
    """None has more than 15 methods or 250 lines."""
    classes = [node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for each in classes:
        functions = [node for node in each.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        methods = [node for node in functions if not node.name.startswith("__") and not _is_property(node)]
        lines = (each.end_lineno or 0) - each.lineno + 1
        assert len(methods) <= MOST_METHODS, f"{each.name} has {len(methods)} methods"
        assert lines <= LONGEST_CLASS_LINES, f"{each.name} has {lines} lines"


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(each) or ".setter" in ast.unparse(each) for each in function.decorator_list)


def test_exit_codes_are_the_drawn_ones():
    """The tree in the docstring of ``harness.errors`` is the tree, and its numbers are the exit codes."""
    drawn = {}
    for line in errors.__doc__.splitlines():
        words = line.replace("├──", "").replace("└──", "").replace("│", "").split()
        if len(words) >= 2 and words[1].isdigit() and hasattr(errors, words[0]):
            drawn[words[0]] = int(words[1])
    real = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert drawn == real


def test_no_test_file_imports_another():
    """What several share lies in ``tests/support``, under a name that says what it is."""
    for path in (PACKAGE.parent / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = f"{getattr(node, 'module', '')}.{'.'.join(each.name for each in node.names)}".split(".")
                assert not [name for name in names if name.startswith("test_")], f"{path}:{node.lineno}"


def test_every_module_says_what_it_is():
    """Its docstring is the map of the project."""
    silent = [name for name, tree in modules().items() if not ast.get_docstring(tree) and name != "checkpoint.__init__"]
    assert silent == []


# Phrases that a maintainer would not write, and where a text has one with good reason.
FOREIGN = re.compile(r"\b((?:is|are|was|were|be|been) told|whoever|so many|of ours|has it that)\b", re.IGNORECASE)
ALLOWED = {
    "checkpoint.commit": {"so many"},
    "checkpoint.format": {"so many", "be told", "of ours"},  # a specification: "so many spaces that"
    "checkpoint.plan": {"so many"},
    "checkpoint.saver": {"whoever", "is told"},
    "state.modules": {"is told"},
    "state.options": {"so many", "whoever", "is told", "are told", "be told"},
}


@pytest.mark.parametrize("name", sorted(modules()))
def test_messages_and_docstrings_are_in_plain_english(name):
    """``docs/hooks/prose_rule.py`` does the same for the pages."""
    texts = [node for node in ast.walk(modules()[name]) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = {" ".join(each.lower().split()) for node in texts for each in FOREIGN.findall(" ".join(node.value.split()))}
    assert found == ALLOWED.get(name, set()), "write it in plain English, or take the exception out"
