"""Calls to a storage: each ends within a deadline, is tried again where that may help, and fails in words of ours.

A call runs in a thread of its own (``Try``), or in one that several share (``Row``). When it hangs, its thread is left
behind; when that wakes up later, it finds that nobody waits for it any more (``check_awaited``) and does no harm.
"""

import errno
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import tenacity

from harness.checkpoint.threads import Background
from harness.checkpoint.unbuffered import Buffer
from harness.errors import ConfigError, HarnessError, StoreError

T = TypeVar("T")
Called = TypeVar("Called")

THREAD = "harness-store"

_PERMANENT = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EEXIST,
}  # fmt: skip
_PERMANENT_TYPES = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PERMANENT_NAMES = {
    "NoCredentialsError", "PartialCredentialsError", "ParamValidationError",  # botocore
    "AuthenticationException", "BadHostKeyException",  # paramiko
}  # fmt: skip
_TRANSIENT_STATUS = {408, 429}  # the only of HTTP's 4xx that may be otherwise next time
_BACKEND_PACKAGES = {"botocore", "aiobotocore", "aiohttp", "azure", "google", "gcsfs", "paramiko", "asyncssh", "requests"}


def insist(
    where: str, function: Callable[[], T], attempts: int, limit_seconds: float, on_failure: Callable[[], None] = lambda: None
) -> T:
    """The result of a call that may need several tries; ``on_failure`` is called after each that failed for the moment."""

    def attempt() -> T:
        try:
            row = threading.current_thread()
            if isinstance(row, Row):
                return row.call(where, function, limit_seconds)
            return Try(function).result_within(limit_seconds)
        except HarnessError:
            raise
        except Exception as error:
            if _is_wrong_option(error):
                raise ConfigError(f"{where}: {error}; the filesystem's options are checkpoint.storage_options") from None
            if not _is_of_storage(error):
                raise
            if transient := is_transient(error):
                on_failure()
            raise StoreError(f"{where}: {in_words(error)}", transient=transient) from error

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, StoreError) and error.transient),
        reraise=True,
    )
    return retrying(attempt)


class Try(Background[T]):
    """One try of a call. When it hangs, it is left behind."""

    left_behind = False

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(function, THREAD)

    def result_within(self, seconds: float) -> T:
        try:
            self.join(seconds)
        finally:  # also when the caller was interrupted
            self.left_behind = self.is_alive()
        if self.left_behind:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        return self.result()


class Row(Try[T]):
    """Calls that are made one after the other by a function. When one hangs, the function is left behind."""

    where = ""  # the call that is under way,
    limit_seconds = math.inf  # how long it may take,
    latest = math.inf  # and until when, in monotonic time

    def call(self, where: str, function: Callable[[], Called], limit_seconds: float) -> Called:
        """Makes a call; called by the function, in this thread."""
        check_awaited()
        self.where, self.limit_seconds, self.latest = where, limit_seconds, time.monotonic() + limit_seconds
        try:
            return function()
        finally:
            self.latest = math.inf

    def result(self) -> T:
        """What the function returns, or raises; ``StoreError`` when a call takes too long."""
        try:
            while self.is_alive() and (left_seconds := self.latest - time.monotonic()) > 0:
                self.join(min(left_seconds, 1.0))  # the deadline changes with each call
        finally:  # also when the caller was interrupted
            self.left_behind = self.is_alive()
        if self.left_behind:
            raise StoreError(f"{self.where}: no answer within {self.limit_seconds:.0f} s", transient=True)
        return super().result()


def while_awaited(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """The chunks, as long as somebody waits for the call that sends them.

    A put that hung and was given up may wake up when its object has long been sent by another try, and committed, and the
    memory that the chunks are views of holds other values. It must not come as far as to publish those.
    """
    for chunk in chunks:
        yield chunk
        check_awaited()


def check_awaited() -> None:
    """Raises ``TimeoutError`` in a call that was given up."""
    this = threading.current_thread()
    if isinstance(this, Try) and this.left_behind:
        raise TimeoutError("nobody waits for this any more")


# --- what an error means ---------------------------------------------------------------------------------------------


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: adlfs wraps whatever happens to an upload into a ``RuntimeError``."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_storage(error: Exception) -> bool:
    return any(
        isinstance(cause, OSError | EOFError)  # EOFError is paramiko's word for a lost connection
        or type(cause).__module__.partition(".")[0] in _BACKEND_PACKAGES
        for cause in _causes(error)
    )


def _is_wrong_option(error: Exception) -> bool:
    """Whether a filesystem was given an option that it does not know: some look at them only when they are first used."""
    if not isinstance(error, TypeError) or "unexpected keyword argument" not in str(error):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return not str(frame.f_globals["__name__"]).startswith("harness")


def is_transient(error: Exception) -> bool:
    """Whether it may go well next time."""
    return not any(_is_permanent(cause) for cause in _causes(error))


def _is_permanent(error: BaseException) -> bool:
    status = getattr(error, "status_code", None) or 0
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, _PERMANENT_TYPES)
        or (isinstance(error, OSError) and error.errno in _PERMANENT)
        or not names.isdisjoint(_PERMANENT_NAMES)
        or (400 <= status < 500 and status not in _TRANSIENT_STATUS)
    )


def in_words(error: Exception) -> str:
    """An error as it is told to people."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".rstrip(": ")
