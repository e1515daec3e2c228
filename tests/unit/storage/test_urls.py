"""What a URL or a path names: each its own place, exactly, or a sentence that says what is wrong with it."""

import os

import pytest

import harness
from harness.errors import ConfigError
from harness.storage.store import open_store
from harness.storage.urls import shown, with_shown_urls


def place(url: str, **options) -> tuple[str, str]:
    store = open_store(url, options)
    return type(store.filesystem.fs).__name__, store.root


@pytest.mark.parametrize(
    "path",
    [
        "runs/lr::0.1", "lr::0.1", "lr::0.01", "a::b::c", "mem::x", "runs/http://x", "runs/s3::x", "./s3:x", "./s3://x",
        "./C:\\runs", " spaces ", "a%20b", "what?#", "~nobody-of-this-name/run", "ends in space ",
    ],
)  # fmt: skip
def test_a_path_is_taken_as_it_stands(tmp_path, monkeypatch, path):
    """Whatever is in it: two paths that differ are two places."""
    monkeypatch.chdir(tmp_path)
    assert place(path) == ("LocalFileSystem", f"{tmp_path}/{path.removeprefix('./')}")
    assert open_store(path).url == path


@pytest.mark.parametrize(
    ("url", "expected"),
    [(".", ""), ("./", ""), ("run/", "/run"), ("./run//", "/run"), ("file://run", "/run"), ("..", "/..")],
)
def test_a_path_is_relative_to_the_current_directory(tmp_path, monkeypatch, url, expected):
    """Also the one in a file URL."""
    monkeypatch.chdir(tmp_path)
    assert place(url) == ("LocalFileSystem", f"{tmp_path}{expected}")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///tmp/a%20b #c?d::e", "/tmp/a%20b #c?d::e"),
        ("file:/tmp/run/", "/tmp/run"),
        ("local:///tmp/run", "/tmp/run"),
        ("/tmp/run::1://2", "/tmp/run::1://2"),
        ("~/run", os.path.expanduser("~/run")),
        ("dir://run::file:///tmp", "/tmp/run"),
        ("simplecache::file:///tmp/run", "/tmp/run"),
        ("filecache::dir://run::file:///tmp", "/tmp/run"),
    ],
)
def test_a_local_disk_is_one_however_it_is_named(url, expected):
    """It has the care that a disk needs: nothing in its paths is decoded, and a cache in front of it is passed over."""
    assert place(url)[1] == expected
    assert open_store(url).is_local


def test_seams_within_the_path_of_a_store():
    """A store that lies over no other one has ``::`` in its names as any other character."""
    assert place("s3://bucket/lr::0.1", key="k", secret="s") == ("S3FileSystem", "bucket/lr::0.1")
    for lr in ("0.1", "0.01"):
        harness.save(f"memory://urls/lr::{lr}", {"model": {"lr": float(lr)}}, step=int(100 * float(lr)))
    assert harness.latest("memory://urls/lr::0.1") == 10
    assert harness.load("memory://urls/lr::0.01")["model"] == {"lr": 0.01}


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "simplecache::s3://bucket/lr::0.1",
            "expected a filesystem over another one before each '::', found s3://bucket/lr",
        ),
        ("s3::file:///tmp/run", "expected a filesystem over another one before each '::', found s3"),
        ("sumplecache::s3://bucket/run", "expected a filesystem that fsspec knows, found 'sumplecache'"),
        ("s://bucket/run", "expected a filesystem that fsspec knows, found 's'"),
        ("S3://bucket/run", "expected a filesystem that fsspec knows, found 'S3'"),
        ('"s3://bucket/run"', "expected a filesystem that fsspec knows, found '\"s3'"),
        ("s3:/bucket/run", "expected s3://, found s3:/ (pathlib eats a slash)"),
        ("s3:bucket", "expected s3://, found s3:b"),
        (" s3://bucket/run", "no space around it"),
        ("s3://bucket/run\n", "no control character in it"),
        ("runs/a\0b", "no control character in it"),
        ("  ", "expected a URL or a path"),
        ("C:\\runs\\a", "found one of Windows"),
        ("s3://key:secret@bucket/run", "expected a bucket, found a login"),
        ("s3://key:sec/ret@bucket/run", "expected a bucket, found a login"),
        ("s3://bucket/run?versionId=7", "found a version of one"),
        ("sftp://host/run?lr=1", "expected a path without '?'"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(url, told):
    """None of them may become a directory on this machine, or the place of another run. No secret is repeated."""
    with pytest.raises(ConfigError) as caught:
        open_store(url, tries=1)
    assert told in str(caught.value)
    assert "sec" not in str(caught.value).replace("second", "")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sftp://user:p/ss@host/run", "sftp://host/run"),
        ("sftp://user:p/s@s::t@host/run", "sftp://host/run"),
        ("sftp://user:it's p/w@host/run", "sftp://host/run"),
        ("sftp://host:22/run@v1", "sftp://host:22/run@v1"),
        ("s3://bucket/run@v1", "s3://bucket/run@v1"),
        ("s3://arn:aws:s3:us-west-2:1:accesspoint/ap/run@v1", "s3://arn:aws:s3:us-west-2:1:accesspoint/ap/run@v1"),
        ("dir::sftp://u:p/w@one/::sftp://u:p/w@two/", "dir::sftp://one/::sftp://two"),
        ("file:///run?a@b", "file:///run?a@b"),
        ("runs/x://y@z?", "runs/x://y@z?"),
    ],
)
def test_urls_are_shown_without_odd_passwords(url, expected):
    """A slash ends no password, nor does a quote; a port is none."""
    assert shown(url) == expected


def test_what_a_library_says_is_told_without_secrets():
    """Errors of HTTP clients have the whole URL in them, presigned ones too."""
    text = "403, url='http://u:pw@host/x.pth?token=S3CR3T&b=1' (Max retries with url: /x.pth?token=S3CR3T (Caused by x))"
    assert with_shown_urls(text) == "403, url='http://host/x.pth' (Max retries with url: /x.pth (Caused by x))"
