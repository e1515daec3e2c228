"""What many tests need: storage servers, started when a test first asks for one and shared by all; an ordinary user."""

import contextlib
import gc
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.runtime.torch_import import import_torch
from tests.support import servers

with contextlib.suppress(ConfigError):  # some files do without it
    import_torch()  # nearly every file does; so it is quick, and the collector passes over it from then on

# Read when gcsfs is imported. With it, a file system looks for Google's own servers by gRPC, for a minute.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that start processes come first, those before all that mostly wait for what they have started: they take the
    longest, and the short ones fill what is left at the end. The folders do not matter."""
    waiting = ("test_slurm.py", "test_hosts.py")
    starting = {item.path for item in items if item.get_closest_marker("torchrun")}
    items.sort(key=lambda item: (item.path.name not in waiting, item.path not in starting, item.path.name))


def pytest_collection_finish() -> None:
    """The collector passes over what all test files have imported, too: a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server: ``url(name)``, ``storage_options``, ``env``. Its program comes with the development extras."""
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory):
    """A real Azure Blob server, where it is installed."""
    pytest.importorskip("adlfs", reason="adlfs is not installed: pip install adlfs")
    yield from _or_skip(servers.azurite, tmp_path_factory.mktemp("azurite"))


@pytest.fixture(scope="session")
def sftp(tmp_path_factory):
    """A real SFTP server, where it is installed."""
    pytest.importorskip("paramiko", reason="paramiko is not installed: pip install paramiko")
    yield from _or_skip(servers.sshd, tmp_path_factory.mktemp("sshd"))


def _or_skip(start, folder):
    try:
        with start(folder) as server:
            yield server
    except servers.Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def browser():
    """A real browser, where one is installed: playwright brings none of its own here."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    programs = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        pytest.skip("no browser is installed: apt-get install chromium-headless-shell")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # which root may not have
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """A function that opens a file and returns its page, and what that asked for or complained of."""

    def opened(path: Path):
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        heard = []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(path.as_uri())
        return page, heard

    return opened


@pytest.fixture
def ordinary_user():
    """A context in which this process may do no more than others: root may do anything, so it is nobody for a while."""

    @contextlib.contextmanager
    def nobody():
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if is_root:
                os.seteuid(0)

    return nobody


@pytest.fixture
def public_path():
    """A directory that every user can reach, and that belongs to this one."""
    place = tempfile.mkdtemp(dir="/tmp")
    os.chmod(place, 0o755)
    yield place
    subprocess.run(["chmod", "-R", "u+rwx", place], check=True)
    shutil.rmtree(place)
