"""Calls to a storage: each ends within a deadline, is tried again where that may help, and fails with a message of
harness's.

A call runs in a thread of its own, or in one that several share (``SerialCalls``). When it hangs, its thread is left
behind; when that wakes up later, it finds that nobody waits for it any more (``check_awaited``) and does no harm.
"""

import errno
import math
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

import tenacity

from harness.errors import ConfigError, HarnessError, StoreError
from harness.runtime.threads import Background
from harness.storage.direct_io import Buffer
from harness.storage.urls import with_shown_urls

T = TypeVar("T")
Called = TypeVar("Called")

THREAD = "harness-store"
_JITTER = random.Random()  # not the process's generator, which is the training's: a retry must not draw from it

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
_REFUSED_STATUS = {400, 401, 403}  # S3 answers HEAD with 400, and no word why, when a token has expired
_REFUSED_NAMES = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",  # botocore
    "TokenRetrievalError", "UnauthorizedSSOTokenError", "AuthenticationException",  # botocore, paramiko
    "ClientAuthenticationError", "RefreshError",  # Azure, Google
}  # fmt: skip
_REFUSED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}  # S3's


def call_with_retries(
    where: str,
    function: Callable[[], T],
    tries: int,
    limit_seconds: float,
    on_failure: Callable[[], None] = lambda: None,
    renew: Callable[[], bool] = lambda: False,
) -> T:
    """The result of a call that may need several tries.

    ``on_failure`` is called after each that failed for the moment. ``renew`` is called, once, after one that was refused: it
    says whether there are other credentials to try.
    """
    refused: list[StoreError] = []

    def once() -> T:
        try:
            thread = threading.current_thread()
            if isinstance(thread, SerialCalls):
                return thread.call(where, function, limit_seconds)
            return Background(function, THREAD).result_within(limit_seconds)
        except HarnessError:
            raise
        except Exception as error:
            if _is_wrong_option(error):
                raise ConfigError(f"{where}: {error}; the filesystem's options are checkpoint.storage_options") from None
            if not _is_of_storage(error):
                raise
            told = StoreError(f"{where}: {in_words(error)}", transient=is_transient(error))
            if told.transient:
                on_failure()
            elif not refused and _is_refusal(error) and renew():
                refused.append(told)
            raise told from error

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(tries),
        wait=lambda state: _JITTER.uniform(0, min(10.0, 0.2 * 2 ** (state.attempt_number - 1))),
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, StoreError) and (error.transient or error in refused)
        ),
        reraise=True,
    )
    return retrying(once)


class SerialCalls(Background[T]):
    """Calls that are made one after the other by a function. When one hangs, the function is left behind."""

    where = ""  # the call that is under way,
    limit_seconds = math.inf  # how long it may take,
    latest = math.inf  # and until when, in monotonic time

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(function, THREAD)

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
    if isinstance(this, Background) and this.left_behind:
        raise TimeoutError("cancelled: nothing waits for the result")


# --- what an error means ---------------------------------------------------------------------------------------------


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: adlfs wraps whatever happens to an upload into a ``RuntimeError``."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_storage(error: Exception) -> bool:
    """Whether the storage is to blame: for whatever its filesystem raises, which may be of any class.

    What ends in our own code is our own, what the sender of a put raises is the sender's.
    """
    if any(isinstance(cause, OSError | EOFError) for cause in _causes(error)):  # EOFError: paramiko has lost its connection
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_senders = any(frame.f_code is while_awaited.__code__ for frame in frames)
    return not (isinstance(error, MemoryError) or is_senders or _is_ours(frames[-1]))


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "harness"


def _is_wrong_option(error: Exception) -> bool:
    """Whether a filesystem was given an option that it does not know: some look at them only when they are first used."""
    if not isinstance(error, TypeError) or "unexpected keyword argument" not in str(error):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return not _is_ours(frame)


def _is_refusal(error: Exception) -> bool:
    """Whether somebody was not let in, which renewed credentials may change."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None  # botocore's
        names = {kind.__name__ for kind in type(cause).__mro__}
        if isinstance(cause, PermissionError) or _status(cause) in _REFUSED_STATUS or code in _REFUSED_CODES | {"400"}:
            return True
        if not names.isdisjoint(_REFUSED_NAMES):
            return True
    return False


def lacks_directory(error: Exception) -> bool:
    """Whether an object could not be put because nobody has made its directory: WebDAV calls that a conflict."""
    return any(isinstance(cause, FileNotFoundError) or _status(cause) == 409 for cause in _causes(error))


def cannot(error: BaseException | None) -> bool:
    """Whether a filesystem has said that it does not do such things, now or ever."""
    return any(
        isinstance(cause, NotImplementedError)
        or _status(cause) in (405, 501)
        or (not isinstance(cause, OSError) and re.search(r"read.?only", str(cause), re.IGNORECASE))
        for cause in _causes(error)
    )


def _status(error: BaseException) -> int:
    """HTTP's status, wherever a library keeps it; 0 where there is none."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            if type(status := getattr(holder, name, None)) is int:
                return status
    return 0


def is_transient(error: Exception) -> bool:
    """Whether it may go well next time."""
    return not any(_is_permanent(cause) for cause in _causes(error))


def _is_permanent(error: BaseException) -> bool:
    status = _status(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, (*_PERMANENT_TYPES, NotImplementedError))
        or (isinstance(error, OSError) and error.errno in _PERMANENT)
        or not names.isdisjoint(_PERMANENT_NAMES)
        or (400 <= status < 500 and status not in _TRANSIENT_STATUS)
        or status == 501
    )


def in_words(error: Exception) -> str:
    """An error in words. A library's own text may have the URL with all that is secret in it."""
    told = error.strerror if isinstance(error, OSError) else None
    return with_shown_urls(told or f"{type(error).__name__}: {error}".rstrip(": "))
