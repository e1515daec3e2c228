"""No secret stands in anything that harness prints or keeps, at whatever level and whichever library says it."""

import base64
import contextlib
import http.server
import io
import json
import logging
import subprocess
import sys
import threading
import traceback
from urllib.parse import quote

import pytest

from harness.checkpoint.catalog import Catalog
from harness.config import load_config, parse_overrides, run_config
from harness.errors import ConfigError, HarnessError
from harness.runtime import console
from harness.secrecy import is_secret_name, learn, without_secrets
from harness.storage.store import open_store, shown
from harness.telemetry import crashes
from tests.support import servers
from tests.support.cluster import environment, harness
from tests.support.store_contract import wait_for_those_left_behind


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """What one test has told of is no secret in the next."""
    monkeypatch.setattr("harness.secrecy._known", ())


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET http://alice:pa55@host:80/run?x=1 200", "GET http://***@host:80/run?x=1 200"),
        ("sftp://u:PA55/W0RD@host/run", "sftp://***@host/run"),
        ("sftp://u:pa@ss#w?rd@host/run", "sftp://***@host/run"),
        ("zip://a::https://u:p@one/::s3://k:s@two/", "zip://a::https://***@one/::s3://***@two/"),
        ("'https://h/x.pth?versionId=7&X-Amz-Signature=abcd12&token=efgh34'", "***"),
        ("https://a.blob/c?sv=2020-08-04&sig=aBc%2Bd%3D", "https://a.blob/c?sv=2020-08-04&sig=***"),
        ("AccountName=me;AccountKey=aGVsbG8=;", "AccountName=me;AccountKey=***;"),
        ("headers={'Authorization': b'AWS4-HMAC-SHA256 Credential=AK/1, Signature=ab', 'Host': 'h'}", "'Host': 'h'"),
        ("[(b'Host', b'h'), (b'Authorization', b'Basic YWxpY2U6cGE1NQ==')]", "(b'Authorization', b'***')]"),
        ("x-amz-security-token:IQoJb3JpZ2luX2Vj\nx-amz-date:1", "x-amz-security-token:***\nx-amz-date:1"),
        ("<SecretAccessKey>wJalrXUtnFEMI</SecretAccessKey>", "<SecretAccessKey>***</SecretAccessKey>"),
        ('{"access_token": "ya29.a0AfH6SM", "expires_in": 3599}', '{"access_token": "***", "expires_in": 3599}'),
    ],
)
def test_what_looks_like_a_secret(text, expected):
    """Nobody has told of it, and it is hidden; what stands beside it is not."""
    found = without_secrets(text)
    hidden = ["alice", "pa55", "PA55", "W0RD", "w?rd", "abcd12", "efgh34", "aBc", "aGVsbG8", "AK/1", "YWxp", "IQoJ", "wJalr"]
    assert not [secret for secret in hidden if secret in found]
    assert expected in found


@pytest.mark.parametrize(
    "text",
    [
        "step 40  loss 0.5  41,140 samples/s",
        "http://127.0.0.1:9000/bucket/a@b",
        "put s3://bucket/run@2/step-1: no answer within 60 s",
        "crash_loop.same_failures=4",
        "task: expected pkg.module:function, found 'a:b@c'",
        "no_tokens=20000",
        "/local/p@th/run",
    ],
)
def test_what_is_none_stays(text):
    """A message must still say where and what."""
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "url", ["sftp://u:PA55/W0RD@host:22/r", "s3://KEY:PA55@host:22/r", "sftp://PA55@host:22/r?sig=PA55"]
)
def test_urls_are_shown_without_passwords(url):
    """Whatever stands in a password."""
    assert shown(url) in ("sftp://host:22/r", "s3://host:22/r")


def test_options_are_known_in_every_form():
    """As they are, in a URL, escaped, as HTTP sends them, nested, line by line; but not the words that say where and how."""
    pem = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqh\nkiG9w0BAQEFAASCBKc\n-----END PRIVATE KEY-----\n"
    learn(
        "memory://x",
        {
            "secret": "q/1+k=Z'x",
            "endpoint_url": "http://minio:9000",
            "token": {"type": "service_account", "private_key": pem, "project_id": "learning"},
            "auth": ("bob", "bobs-w0rd"),
            "client_kwargs": {"region_name": "eu-central-9", "proxies": {"http": "http://p:pr0xyw0rd@proxy"}},
            "config_kwargs": {"signature_version": "s3v4", "s3": {"addressing_style": "virtual"}},
            "pin": "1234",
        },
    )
    secret = "q/1+k=Z'x"
    for form in (
        secret,
        quote(secret),
        quote(secret, safe=""),
        repr([secret]),
        json.dumps(secret),
        "kiG9w0BAQEFAASCBKc",
        "bobs-w0rd",
    ):
        assert "***" in without_secrets(f"begin {form} end"), form
    assert without_secrets(base64.b64encode(b"bob:bobs-w0rd").decode()) == "***"
    assert without_secrets("pr0xyw0rd") == "***"
    shown = "http://minio:9000 service_account learning eu-central-9 s3v4 virtual step 1234 proxy bob"
    assert without_secrets(shown) == shown


def test_what_an_error_says():
    """The text of a library in an error of harness, which a program may print or keep."""
    learn("", {"secret": "h1dd3n-w0rd"})
    assert repr(HarnessError("put s3://b: denied for h1dd3n-w0rd")) == "HarnessError('put s3://b: denied for ***')"


# --- configurations --------------------------------------------------------------------------------------------------

GOOD = {"task": "harness.tasks.linear:build", "train": {"steps": 1, "global_batch_size": 1}}


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.storage_options=key=S3CR3T",
        "checkpoint.storage_options={secret: S3CR3T",
        "checkpoint.storage_options.secret=*S3CR3T",
        "checkpoint.storage_options.secret=!S3CR3T",
        "checkpoint.storage_options: {secret: S3CR3T}",
        "checkpoint.storage_option.secret=S3CR3T",
        "checkpoint.secret=S3CR3T",
        "checkpoint.every_steps=s3://key:S3CR3T@bucket",
    ],
)
def test_a_mistake_in_the_configuration(tmp_path, override):
    """It is named, and its value is not repeated."""
    (tmp_path / "config.yaml").write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "config.yaml"), [override])
    assert "S3CR3T" not in str(caught.value)
    assert "checkpoint." in str(caught.value)


def test_a_mistake_in_a_file(tmp_path):
    """A password that YAML takes for an alias or a tag."""
    for word in ("*S3CR3T", "!S3CR3T"):
        (tmp_path / "config.yaml").write_text(f"checkpoint:\n  storage_options:\n    secret: {word}\n")
        with pytest.raises(ConfigError, match=r"config\.yaml:3:13: not YAML") as caught:
            load_config(str(tmp_path / "config.yaml"))
        assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize("option", ["secret: S3CR3T", "secret=[S3CR3T", "whatever S3CR3T", "a.b=1\0S3CR3T"])
def test_a_mistake_in_an_option(option):
    """All of them may be secret."""
    with pytest.raises(ConfigError) as caught:
        parse_overrides([option], may_be_secret=True)
    assert "S3CR3T" not in str(caught.value)


def test_a_configuration_that_is_printed():
    """A program may print all of it."""
    url, options = "s3://key:S3CR3T@bucket/run", {"secret": "S3CR3T"}
    assert "S3CR3T" not in repr(run_config({"checkpoint": {"url": url, "storage_options": options}}))


def test_which_option_names_are_secret():
    """What opens something, and what says where it is."""
    assert all(
        map(is_secret_name, ["secret", "key", "aws_secret_access_key", "sas_token", "X-Amz-Credential", "sig", "passphrase"])
    )
    assert not any(
        map(is_secret_name, ["endpoint_url", "region", "keep_last", "key_filename", "every_steps", "monkey", "design"])
    )


# --- storages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(caplog):
    """What a program at level DEBUG prints through our console."""
    handler = console.Console()
    handler.setLevel(logging.NOTSET)
    sink = io.StringIO()
    handler.setStream(sink)
    caplog.set_level(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    yield sink
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def refusing():
    """The address of a server that refuses everything over HTTP, and repeats what it was asked."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            body = f"refused: {self.path} {self.headers}".encode()
            self.send_response(403)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PROPFIND", "MKCOL"):
        setattr(Refusing, f"do_{method}", Refusing.refuse)
    with http.server.ThreadingHTTPServer((servers.HOST, 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{servers.HOST}:{server.server_port}"
        server.shutdown()


def use(url: str, storage_options: dict, told: io.StringIO) -> str:
    """Writes and reads at a URL, and has what goes wrong told in every way. Returns all that was told."""
    errors = io.StringIO()
    try:
        store = open_store(url, storage_options, tries=1, deadline_seconds=5)
        with contextlib.suppress(HarnessError):
            store.list()
        store.put("object", lambda: [b"bytes"], 5)
        assert store.get("object", 5) == b"bytes"
    except Exception as error:
        logging.getLogger("theirs").exception("it failed")
        with contextlib.redirect_stderr(errors):
            console.report_error(error)
            console.print_error("".join(traceback.format_exception(error)))
    return told.getvalue() + errors.getvalue()


WORD = "bm90IHRoZS/wYXN+zd29yZA=="


def test_s3(s3, told):
    """A login that is taken, one that is refused, a token, a URL with a login, which S3 knows nothing of."""
    text = use(s3.url("secrecy"), s3.storage_options, told)
    assert "Sending http request" in text, "botocore has been heard"
    text += use(s3.url("secrecy"), {**s3.storage_options, "secret": WORD}, told)
    assert "PermissionError" in text
    text += use(s3.url("secrecy"), {**s3.storage_options, "secret": WORD, "token": "t0ken-of-a-session"}, told)
    text += use("s3://AKIAKEYKEYKEY:pa55w0rd@bucket/run", {"endpoint_url": s3.address}, told)
    assert "found a login; put the login into storage_options" in text
    for secret in (s3.secret, WORD, quote(WORD), "t0ken-of-a-session", "AKIAKEYKEYKEY", "pa55w0rd"):
        assert secret not in text


def test_azure(azure, told):
    """A key that is taken, one that is refused, a signature in the address."""
    text = use(azure.url("secrecy"), azure.storage_options, told)
    assert "Request URL" in text, "azure has been heard"
    for wrong in (f"AccountKey={WORD};", "SharedAccessSignature=sv=2020-08-04&ss=b&sig=c2lnbmF0dXJl%3D;"):
        place = f"BlobEndpoint={azure.address}/{azure.account}"
        said = f"DefaultEndpointsProtocol=http;AccountName={azure.account};{wrong}{place};"
        text += use(azure.url("secrecy"), {"connection_string": said}, told)
    assert "HttpResponseError" in text or "AuthenticationError" in text
    for secret in (azure.account_key, WORD, quote(WORD, safe=""), "c2lnbmF0dXJl"):
        assert secret not in text


def test_sftp(sftp, told):
    """A password as an option, in the URL, and with what ends a part of a URL in it."""
    options = {"look_for_keys": False, "allow_agent": False}
    place = f"{servers.HOST}:{sftp.port}/run"
    text = use(f"sftp://root@{place}", {**options, "password": WORD}, told)
    assert "BadAuthenticationType" in text
    for password in (quote(WORD, safe=""), "F1RST/S3COND", "F1RST#S3COND", "F1RST?S3COND", "F1RST@S3COND"):
        text += use(f"sftp://root:{password}@{place}", options, told)
    assert "Port could not be cast" in text
    for secret in (WORD, quote(WORD, safe=""), "F1RST", "S3COND"):
        assert secret not in text


def test_http(refusing, told):
    """Signed addresses, of which the library's error is made, and a login."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install s3fs")
    text = use(f"http://{refusing}/x.pth?token=S3CR3T", {}, told)
    assert f"{refusing}/x.pth" in text
    text += use(f"http://{refusing}/x.pth?X-Amz-Credential=S3CR3T&X-Amz-Signature=S3CR3T5", {}, told)
    text += use(f"http://alice:S3CR3T@{refusing}/x.pth", {}, told)
    assert "S3CR3T" not in text


def test_webdav(refusing, told):
    """Where httpx tells of each request, with its address."""
    pytest.importorskip("webdav4", reason="webdav4 is not installed: pip install webdav4")
    text = use("webdav://run", {"base_url": f"http://alice:S3CR3T@{refusing}"}, told)
    assert "HTTP Request" in text, "httpx has been heard"
    text += use("webdav://run", {"base_url": f"http://{refusing}", "auth": ("alice", "S3CR3T")}, told)
    assert "S3CR3T" not in text
    assert base64.b64encode(b"alice:S3CR3T").decode() not in text


def test_gcs(refusing, told):
    """A token, and what one is asked for with."""
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install gcsfs")
    token = {
        "access_token": "ya29.S3CR3T",
        "refresh_token": "r3fr3shS3CR3T",
        "client_id": "c",
        "client_secret": "S3CR3Tclient",
        "token_uri": f"http://{refusing}/token",
        "type": "authorized_user",
    }
    text = use("gs://bucket/run", {"token": token, "endpoint_url": f"http://{refusing}", "project": "p"}, told)
    assert gcsfs
    assert "Traceback" in text
    assert "S3CR3T" not in text
    wait_for_those_left_behind()


# --- programs --------------------------------------------------------------------------------------------------------

LEAKING = """
import logging
import os
import torch
from harness import Task

logging.getLogger().setLevel(logging.DEBUG)
logging.getLogger("botocore.hooks").setLevel(logging.INFO)

def build():
    model = torch.nn.Linear(4, 1)

    def loss(model, batch):
        logging.getLogger("theirs").debug("they say %s", os.environ["THEIR_TOKEN"])
        if not model(batch[0]).isfinite().all() or os.path.exists("die"):
            raise RuntimeError(f"the sample is at {os.environ['THEIR_TOKEN']}\\x1b]0;title\\a")
        open("die", "w").close()
        return model(batch[0]).square().mean()

    dataset = torch.utils.data.TensorDataset(torch.rand(64, 4))
    return Task(model=model, dataset=dataset, optimizer=torch.optim.SGD(model.parameters(), 0.01), loss=loss)
"""


def test_a_run_that_dies(tmp_path, s3):
    """Neither its lines at level DEBUG, nor its traceback, nor what it keeps beside the checkpoints."""
    (tmp_path / "leaking.py").write_text(LEAKING)
    run = {"url": s3.url("leaking"), "every_steps": 1, "storage_options": s3.storage_options}
    config = {**GOOD, "task": "leaking.py:build", "checkpoint": run, "log": {"every_steps": 1, "jsonl": "log.jsonl"}}
    config["train"] = {"steps": 4, "global_batch_size": 2}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = harness("train", "config.yaml", cwd=tmp_path, env={"THEIR_TOKEN": "tok/en-of-theirs"})
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: the sample is at ***\\x1b]0;title\\x07" in done.stderr
    assert "they say ***" in done.stderr
    assert "Sending http request" in done.stderr, "others are heard as the program wants it"
    store = open_store(run["url"], s3.storage_options)
    kept = b"".join(store.get(name, 1 << 20) for name in store.list()) + (tmp_path / "log.jsonl").read_bytes()
    assert b"the sample is at ***" in kept
    for secret in (s3.secret, s3.key, "tok/en-of-theirs"):
        assert secret not in done.stderr + done.stdout
        assert secret.encode() not in kept
    catalog = Catalog(store)
    (crash,) = crashes.read_crashes(catalog, catalog.attempts.all()).popitem()[1]
    assert crash.error.startswith("RuntimeError: the sample is at ***")


SCRIPT = """
import logging, sys
import torch
import harness

if "first" in sys.argv:
    logging.basicConfig(level=logging.WARNING, format="OURS %(message)s")
model = torch.nn.Linear(1, 1)
run = harness.Run(None, {"model": model})
logging.getLogger("theirs").info("not to be heard")
logging.getLogger("theirs").warning("theirs is heard")
logging.getLogger("harness.x").info("harness is heard")
logging.getLogger("harness.x").warning("harness warns")
print([type(each).__name__ for each in logging.getLogger().handlers], logging.getLogger().level)
raise RuntimeError("at http://bob:b0bs@host/")
"""


@pytest.mark.parametrize("first", [True, False])
def test_a_program_of_ones_own(tmp_path, first):
    """It keeps the logging that it has. Where it has none, only harness is heard below warnings; the root is not touched."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", *(["first"] if first else [])]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ("['StreamHandler'] 30\n" if first else "[] 30\n")
    lines = done.stderr.splitlines()
    heard = [line for line in lines if "hear" in line or "warns" in line]
    if first:
        assert heard == ["OURS theirs is heard", "OURS harness is heard", "OURS harness warns"]
    else:
        assert [line.partition(" ")[2] for line in heard[1:]] == ["harness is heard", "harness warns"]
        assert heard[0] == "theirs is heard"
    assert lines[-1] == "RuntimeError: at http://***@host/"


def test_which_loggers_harness_train_shows(tmp_path):
    """``harness train`` hears itself and the user's task from INFO on, all others from WARNING on, and leaves no handler."""
    (tmp_path / "task.py").write_text(
        LEAKING.replace("logging.getLogger().setLevel(logging.DEBUG)", "log = logging.getLogger(__name__)").replace(
            'logging.getLogger("theirs").debug("they say %s", os.environ["THEIR_TOKEN"])',
            'log.info("the task"); [logging.getLogger("other").log(each, f"other {each}") for each in (20, 30)]',
        )
    )
    code = "import sys, logging, harness.cli as c\ntry: c.main()\nfinally: print(logging.getLogger().handlers)"
    (tmp_path / "config.yaml").write_text(json.dumps({**GOOD, "task": "task.py:build"}))
    command = [sys.executable, "-c", code, "train", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    said = [line.partition(" ")[2] for line in done.stderr.splitlines()]
    assert said[1:3] == ["the task", "other 30"]
    assert said[-1].startswith("done: step 1")
