"""The secrets that this process was given, and texts without them. No torch.

Libraries repeat in their errors, and at lower levels in their logs, what they were given: URLs with a password, signed
queries, headers. The code that opens a storage registers here what it was given (``learn``). Everything that harness prints
or keeps goes through ``without_secrets``: it hides what is known, and what looks like it (the user of a URL, a signature, a
login).
"""

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote

HIDDEN = "***"
_LEAST_CHARACTERS = 4  # shorter ones stand in every other word
_LINE_CHARACTERS = 16  # of a line of a longer secret, such as a private key
_KEY_CHARACTERS = 12  # of a user name that is the public half of a key

_SECRET_NAME = re.compile(
    r"secret|passw|passphrase|pwd|token|credential|signature|private|connection.?string|auth|cookie"
    r"|access.?key|account.?key|api.?key|(^|[_\W])(key|sig|sas)([_\W]|$)",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|CONNECTION_STRING|(ACCESS|ACCOUNT|API)_KEY)(_KEY|_ID)?$")
# Options whose values are shown, without underscores: where something is, and how, but not what opens it.
_HARMLESS_NAMES = {
    "access", "account", "accountname", "acl", "addressingstyle", "apiversion", "authuri", "baseurl", "blobendpoint",
    "bucket", "cachestorage", "cachetype", "checksumalgorithm", "clientid", "compression", "consistency", "container",
    "defaultcachetype", "defaultendpointsprotocol", "defaultlocation", "directory", "encoding", "endpoint",
    "endpointsuffix", "endpointurl", "engine", "expiration", "fileendpoint", "fileprotocol", "host", "hostname",
    "keyfile", "keyfilename", "locationmode", "mode", "path", "port", "profile", "profilename", "project", "projectid",
    "protocol", "queueendpoint", "region", "regionname", "remoteprotocol", "requestchecksumcalculation",
    "responsechecksumvalidation", "retrymode", "s3endpointurl", "schema", "servername", "serversideencryption",
    "servicename", "sharename", "signatureversion", "ssekmskeyid", "storageclass", "tableendpoint", "targetprotocol",
    "tenantid", "tokenuri", "type", "universedomain", "url", "user", "useragent", "username", "verify", "version",
}  # fmt: skip
_NO_SECRETS = {
    "anon", "anonymous", "auto", "browser", "cache", "cloud", "default", "false", "google_default", "none", "null",
    "path", "true",
}  # fmt: skip

_HEADER = r"proxy-authorization|authorization|x-amz-security-token|x-ms-copy-source-authorization|set-cookie|cookie"
_ASSIGNED = (
    r"[\w.-]*(?:secret|secret_?key|password|passwd|token|signature|credential|access_?key(?:_?id)?|account_?key|api_?key)"
    r"|sharedaccesssignature|private_key|sig"
)
_ANSWERED = r"secret_?access_?key|session_?token|access_?token|refresh_?token|id_token|client_secret|private_key"
# Of a URL: everything up to the last @ before a slash; or else, where a password has a slash itself, up to the last one.
_USER = r"(?<=://)(?:[^/{0}]+@|(?!arn:)[^/@:\[\]{0}]+:(?!\d{{1,5}}(?:[/?#\s]|$))(?:(?!://)[^{0}])*@)"
_USER_OF_URL = re.compile(_USER.format(r"\n"))
_PATTERNS = (
    (re.compile(_USER.format(r"\s'\"<>")), f"{HIDDEN}@"),
    (re.compile(rf"(?i)\b({_HEADER})(['\"]?\s*[:=,]\s*b?['\"]?)(?=[^\s'\"])[^'\"\r\n]+"), rf"\1\2{HIDDEN}"),
    (re.compile(rf"(?i)(?<![\w.-])({_ASSIGNED})=(b?['\"]?)[^\s'\"&;,<>)\]}}]{{4,}}"), rf"\1=\2{HIDDEN}"),
    (re.compile(rf"(?i)\b({_ANSWERED})(['\"]?\s*[:>]\s*b?['\"]?)[^\s'\",<>]{{8,}}"), rf"\1\2{HIDDEN}"),
    (re.compile(r"\b(Bearer|Signature[:=])(\s*)[\w.~+/%=-]{16,}"), rf"\1\2{HIDDEN}"),
)

_known: tuple[str, ...] = ()  # the longest first: one may be a part of another


def learn(url: str = "", *options: Any) -> None:
    """Remembers what is secret in a URL, in the options of a filesystem (nested ones, too) and in the environment."""
    global _known  # noqa: PLW0603  # what a process was given, it was given as a whole
    found = set(_known)
    for text in (*_of_url(url), *_of_options("", options), *_of_options("", _variables())):
        found.update(_forms(text))
    if len(found) > len(_known):
        _known = tuple(sorted(found, key=len, reverse=True))


def without_secrets(text: str) -> str:
    """A text in which what is known to be secret, and what looks like it, is hidden."""
    for secret in _known:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in () if text.isalnum() else _PATTERNS:  # most names are
        text = pattern.sub(replacement, text)
    return text


def scrubbed(value: Any) -> Any:
    """A value of JSON whose texts are without secrets."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {scrubbed(key): scrubbed(item) for key, item in value.items()}
    return [scrubbed(item) for item in value] if isinstance(value, list | tuple) else value


def without_user(url: str) -> str:
    """A URL without the user and the password in it; a chain of several without those of each."""
    return _USER_OF_URL.sub("", url)


def is_secret_name(name: str) -> bool:
    """Whether what has such a name is better not shown."""
    return _plain(name) not in _HARMLESS_NAMES and _SECRET_NAME.search(name) is not None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}


def _of_options(name: str, value: Any) -> Iterator[str]:
    """The secrets in a value of this name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _of_options(str(key), item)
        yield from _logins(value)
    elif isinstance(value, str):
        yield from _of_text(name, value)
    elif isinstance(value, bytes):
        yield from _of_text(name, value.decode("latin-1"))
    elif isinstance(value, Sequence):
        items = value[1:] if _plain(name) in ("auth", "basicauth") and len(value) == 2 else value  # a user and a password
        for item in items:
            yield from _of_options(name, item)
        if len(items) < len(value) and all(isinstance(item, str) for item in value):
            yield from _login(*value)


def _of_text(name: str, value: str) -> Iterator[str]:
    if "://" in value:
        yield from _of_url(value)
    if ";" in value and "=" in value:  # a connection string
        pairs = (pair.partition("=") for pair in value.split(";"))
        yield from (secret for key, _, item in pairs for secret in _of_options(key, item))
    if value.startswith("?") or "sig=" in value:
        yield from _of_query(value.removeprefix("?"))
    is_named = is_secret_name(name)
    is_shown = _plain(name) in _HARMLESS_NAMES or ("://" in value and not is_named) or (value.isdigit() and not is_named)
    if len(value) >= _LEAST_CHARACTERS and not is_shown and value.lower() not in _NO_SECRETS and not os.path.exists(value):
        yield value
        yield from (word for word in value.split(" ")[1:] if len(word) >= _LINE_CHARACTERS)  # Bearer and a token


def _of_url(url: str) -> Iterator[str]:
    """The user and the password of each URL in a chain, and the secrets of its query."""
    for match in _USER_OF_URL.finditer(url):
        user, colon, password = match[0].removesuffix("@").partition(":")
        if not colon:
            continue
        yield match[0].removesuffix("@")
        yield password
        yield from re.split(r"[/@#?:]", password)  # where it has such characters, libraries see an end of something
        yield from _login(unquote(user), unquote(password))
        if len(user) >= _KEY_CHARACTERS:
            yield user
    if "?" in (rest := without_user(url)):
        yield from _of_query(rest.partition("?")[2].partition("#")[0])


def _of_query(query: str) -> Iterator[str]:
    for name, value in parse_qsl(query):
        if is_secret_name(name):
            yield value


def _logins(options: Mapping[Any, Any]) -> Iterator[str]:
    """What becomes of a user and a password that stand beside each other."""
    named = {_plain(str(key)): value for key, value in options.items() if isinstance(value, str)}
    user = next((named[name] for name in ("username", "user", "login") if name in named), None)
    if user is not None and "password" in named:
        yield from _login(user, named["password"])


def _login(user: str, password: str) -> Iterator[str]:
    """As HTTP sends them."""
    yield base64.b64encode(f"{user}:{password}".encode()).decode()


def _forms(text: str) -> Iterator[str]:
    """A secret as it may stand in a text: as it is, escaped, in a URL, line by line."""
    lines = [line for line in text.splitlines() if len(line) >= _LINE_CHARACTERS and not line.startswith("-----")]
    for part in (text, *(lines if len(lines) > 1 else ())):
        for form in (part, repr(part)[1:-1], json.dumps(part)[1:-1], quote(part), quote(part, safe=""), quote_plus(part)):
            if len(form) >= _LEAST_CHARACTERS:
                yield form
        if len(plain := unquote(part)) >= _LEAST_CHARACTERS:
            yield plain
