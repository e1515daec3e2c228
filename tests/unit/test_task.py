"""Finding the function that builds a task."""

import sys

import pytest

import harness
from harness.errors import ConfigError
from harness.task import Evaluation, Task, find_builder

SOURCE = """\
import neighbour

def build(lr, depth=2):
    return lr, depth, neighbour.VALUE

def anything(**options):
    return options

number = 5
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a file, its neighbour and a package, none of which has been imported before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "recipe.py").write_text(SOURCE)
    (tmp_path / "files" / "neighbour.py").write_text("VALUE = 7\n")
    (tmp_path / "kitchen").mkdir()
    (tmp_path / "kitchen" / "__init__.py").write_text("")
    (tmp_path / "kitchen" / "soup.py").write_text("def build():\n    return 'soup'\n")
    (tmp_path / "kitchen" / "burnt.py").write_text("import no_such_thing\n")
    (tmp_path / "kitchen" / "broken.py").write_text("1 / 0\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(name: str, **args) -> str:
    with pytest.raises(ConfigError) as caught:
        find_builder(name, args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_function_in_a_file(here):
    """``path/to/file.py:function``; the file can import its neighbours."""
    assert find_builder("files/recipe.py:build", {"lr": 1})(lr=1) == (1, 2, 7)
    assert find_builder(f"{here}/files/recipe.py:build", {"lr": 1})(lr=3, depth=1) == (3, 1, 7)


def test_a_function_in_a_module(here):
    """``package.module:function``, from the working directory too."""
    assert find_builder("kitchen.soup:build", {})() == "soup"


def test_a_file_can_be_pickled_by_name(here):
    """What a file defines is found again by its module's name, as loader processes that are not forked must."""
    builder = find_builder("files/recipe.py:build", {"lr": 1})
    assert sys.modules[builder.__module__].build is builder


@pytest.mark.parametrize("name", ["build", "module:", ":build", "", ":"])
def test_a_name_without_two_halves(here, name):
    """What is expected is said with both spellings."""
    message = refusal(name)
    assert "expected package.module:function or path/to/file.py:function" in message
    assert repr(name) in message


def test_a_module_that_is_not_there(here):
    """Whichever part of the dotted name is missing."""
    assert "no module 'no_such_kitchen'" in refusal("no_such_kitchen.soup:build")
    assert "no module 'kitchen.stew'" in refusal("kitchen.stew:build")


def test_a_file_that_is_not_there(here):
    """The working directory is said, since the path is relative to it."""
    message = refusal("files/missing.py:build")
    assert "files/missing.py" in message
    assert str(here) in message


def test_a_function_that_is_not_there(here):
    """A name that is not a function is none, either."""
    assert "no function 'fry'" in refusal("kitchen.soup:fry")
    assert "no function 'number'" in refusal("files/recipe.py:number")


def test_args_that_do_not_fit(here):
    """Missing and unknown arguments are named before anything is built."""
    assert "'lr'" in refusal("files/recipe.py:build")
    assert "'colour'" in refusal("files/recipe.py:build", lr=1, colour="red")
    assert find_builder("files/recipe.py:anything", {"colour": "red"})(colour="red") == {"colour": "red"}


def test_an_error_in_the_users_own_module_is_let_through(here):
    """Its traceback is what the user needs; a missing import within it is not a missing task."""
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        find_builder("kitchen.burnt:build", {})
    with pytest.raises(ZeroDivisionError):
        find_builder("kitchen.broken:build", {})


def test_what_a_user_brings_is_frozen_and_public():
    """``harness.Task`` and ``harness.Evaluation`` are the two classes a task file imports."""
    assert (harness.Task, harness.Evaluation) == (Task, Evaluation)
    evaluation = Evaluation(dataset=[1], measure=lambda model, batch: {}, metric="loss")
    with pytest.raises(AttributeError):
        evaluation.metric = "other"
