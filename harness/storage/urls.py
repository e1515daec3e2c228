"""What a URL or a path names: a filesystem and a place in it, exactly, or a ``ConfigError``. No torch.

What begins with the name of a filesystem that fsspec knows and ``://`` is a URL; what does not is a path of this machine, as
it stands. fsspec's own parser takes every ``::`` for the seam of a chain and drops what it does not understand: of the paths
``lr::0.1`` and ``lr::0.01`` it would make one run. Here a ``::`` is a seam only behind a filesystem that lies over another
one (``dir::s3://bucket/run``), and an ambiguous URL is refused. So is what a URL loses on its way, and what is
written so that it would silently become a directory on this machine: ``s3:/bucket``, ``C:\\runs``, spaces around a URL.
"""

import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec import AbstractFileSystem, available_protocols, get_filesystem_class
from fsspec.implementations.dirfs import DirFileSystem

from harness.errors import ConfigError
from harness.secrecy import without_user

_LOCAL = {"file", "local"}
_BUCKETS = {"s3", "s3a", "gs", "gcs"}
_TARGET = {"fo", "target_protocol"}  # what the constructor of a filesystem over another one takes
_BUILT_IN = (AttributeError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)  # no fault of a storage
_LIKE_A_URL = re.compile(r"[^/]*://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_IF_A_PATH = "a path that begins like this is written with ./ before it"


def connect(url: str, storage_options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL or path, and the path in it. Raises ``ConfigError``, or what the filesystem raises.

    Wrappers that only rename are taken off, so that what they lie over is known for what it is. So are caches: what is read
    has to be what the storage has.
    """
    protocol = protocol_of(url)
    try:
        if protocol in _LOCAL:
            return fsspec.filesystem("file", **storage_options), _local_path(url)
        links = url.split("::")
        if "://" in links[0] and not _lies_over_another(protocol):  # the rest is a part of its path
            root = get_filesystem_class(protocol)._strip_protocol(url)
            _refuse_losses(url, root)
            return fsspec.core.url_to_fs(links[0], **storage_options)[0], root
        for link in links[:-1]:
            if not _lies_over_another(protocol_of(link if "://" in link or "/" in link else f"{link}://")):
                raise ConfigError(
                    f"{shown(url)}: expected a filesystem over another one before each '::', found {shown(link)}"
                )
        return _without_wrappers(*fsspec.core.url_to_fs(url, **storage_options))
    except _BUILT_IN as error:
        advice = "; the filesystem's options are checkpoint.storage_options" if isinstance(error, TypeError) else ""
        raise ConfigError(f"{shown(url)}: {with_shown_urls(str(error)) or type(error).__name__}{advice}") from None


def protocol_of(url: str) -> str:
    """The name of the filesystem, a chain's first one; ``file`` for a path. Raises ``ConfigError`` for what is neither."""
    if not url.strip():
        raise ConfigError(f"{url!r}: expected a URL or a path")
    if _CONTROL.search(url) or (url != url.strip() and _LIKE_A_URL.match(url.strip())):
        raise ConfigError(f"{shown(url.strip())!r}: expected no control character in it and no space around it; take it out")
    name = url[: re.match(r"[^/:]*", url).end()]  # type: ignore[union-attr]  # matches everything
    rest, known = url[len(name) :], name in {*available_protocols(), *fsspec.registry}
    if _LIKE_A_URL.match(url) or (known and rest.startswith("::")):
        if known:
            return name
        raise ConfigError(f"{shown(url)}: expected a filesystem that fsspec knows, found {name!r}; {_IF_A_PATH}")
    if known and rest.startswith(":") and not (name in _LOCAL and rest.startswith(":/")):
        raise ConfigError(f"{url}: expected {name}://, found {name}{rest[:2]} (pathlib eats a slash); {_IF_A_PATH}")
    if re.match(r"[A-Za-z]:[\\/]", url):
        raise ConfigError(f"{url}: expected a path of this machine, found one of Windows; {_IF_A_PATH}")
    return "file"


def _local_path(url: str) -> str:
    """The absolute path of a path, or of a ``file://`` URL: nothing in it is decoded, nothing cut off."""
    path = re.sub(r"^(file|local):(//|(?=/))", "", url)
    if path == url:
        path = os.path.expanduser(path)
    return os.path.join(os.getcwd(), path.removeprefix("./")).rstrip("/").removesuffix("/.")


def _lies_over_another(protocol: str) -> bool:
    kinds = get_filesystem_class(protocol).__mro__
    return any(_TARGET & inspect.signature(kind.__init__).parameters.keys() for kind in kinds if kind is not object)


def _refuse_losses(url: str, root: str) -> None:
    """Two URLs that differ must not be one run."""
    for mark in "?#":
        _, found, rest = url.partition(mark)
        if found and mark + rest.rstrip("/") not in root:
            raise ConfigError(f"{shown(url)}: expected a path without '{mark}'; what follows it would be ignored")
    if re.search(r"\?versionid=", root, re.IGNORECASE):
        raise ConfigError(f"{shown(url)}: expected a place for objects, found a version of one")
    bucket = root.partition("/")[0]
    if protocol_of(url) in _BUCKETS and re.match(r"(?!arn:)[^@:]*[@:]", bucket):
        raise ConfigError(
            f"{shown(url)}: expected a bucket, found a login; put the login into storage_options or the environment"
        )


def _without_wrappers(fs: AbstractFileSystem, root: str) -> tuple[AbstractFileSystem, str]:
    from fsspec.implementations.cached import CachingFileSystem  # noqa: PLC0415  # seldom needed

    while isinstance(fs, DirFileSystem | CachingFileSystem):
        fs, root = fs.fs, fs._join(root) if isinstance(fs, DirFileSystem) else root
    return fs, root


# --- secrets ---------------------------------------------------------------------------------------------------------

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_QUERY = re.compile(r"\?[\w.~%-]+=[^\s'\"<>)]*")


def shown(url: str) -> str:
    """A URL as it may be shown: without user name, password and query, where secrets can stand."""
    if not _LIKE_A_URL.match(url) or url.startswith("file://"):
        return url.rstrip("/")
    return without_user(url).partition("?")[0].rstrip("/")


def with_shown_urls(text: str) -> str:
    """What a library says, with each URL in it as it may be shown."""
    return _QUERY.sub("", _URL.sub(lambda found: shown(found[0]), text))
