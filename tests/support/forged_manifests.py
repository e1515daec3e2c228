"""Manifests that lie, with a checksum that fits, and what their readers may make of them."""

import json
from collections.abc import Callable
from typing import Any

from harness.checkpoint.format import _last_line
from harness.errors import HarnessError


def with_checksum(text: bytes) -> bytes:
    """A manifest of which the text is all but the last line."""
    return text + _last_line(text)


def sealed(value: Any) -> bytes:
    """A manifest whose checksum fits, whatever it says."""
    body = json.dumps({key: item for key, item in value.items() if key != "checksum"}, indent=1).removesuffix("\n}")
    return with_checksum(body.encode() + b",\n")


def unexpected_error(function: Callable[[], Any]) -> str | None:
    """None when a call returns or raises an error of harness, else the error in words."""
    try:
        function()
    except HarnessError:
        return None
    except Exception as error:
        return repr(error)
    return None
