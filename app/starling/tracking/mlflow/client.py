"""MLflow's client with limits against blocking, a timeout for uploads, the protocol's errors, and a password file.

The password comes from a file, because anyone who may inspect the container can read a variable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from starling.core.budget import BudgetExceeded
from starling.core.errors import StarlingError
from starling.core.files.folder import LinkRefused
from starling.core.files.refusals import FileRefused
from starling.core.files.regular import read_regular
from starling.core.redaction import without_credentials
from starling.core.utf8 import NotUtf8, text_of
from starling.tracking.tracker import TrackerRejectedError, TrackerUnavailableError

CLIENT_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    # A server may neither delay the client without limit nor redirect it.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
    # The client talks to the tracking server only.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Settings of MLflow's client, which otherwise blocks for minutes without a server. The user's take precedence."""

_UPLOAD_TIMEOUT_S = 60
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}


@contextmanager
def patient() -> Iterator[None]:
    """Allow an upload more time than a small request, because a server may answer only after storing the file."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(_UPLOAD_TIMEOUT_S, int(before or 0)))
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def translated(*, refuse: bool = True) -> Iterator[None]:
    """Turn exceptions of MLflow's client into the two errors of the protocol.

    `refuse=False` treats a refusal like an outage: without its run, every later event would be lost.
    """
    try:
        yield
    except (StarlingError, LinkRefused, FileRefused):
        raise
    except Exception as error:
        # Any exception: the client passes on the exceptions of its parsers if a server answers nonsense.
        lines = without_credentials(str(error)).strip().splitlines() or [""]
        message = f"MLflow: {type(error).__name__}: {lines[0][:300]}"
        if refuse and getattr(error, "error_code", "") in _REFUSALS:
            raise TrackerRejectedError(message) from error
        raise TrackerUnavailableError(message) from error


PASSWORD, PASSWORD_FILE = "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_PASSWORD_FILE"
_MOST_BYTES = 1 << 20


def read_password(environment: Mapping[str, str], client: MutableMapping[str, str]) -> None:
    """Copy the password in the file that the variable names to `client`, where MLflow's client reads it.

    The file is read at every connection, so that a changed password is used. Raises TrackerUnavailableError for an
    unreadable file, because the error may be temporary.
    """
    named = environment.get(PASSWORD_FILE)
    if not named:
        return
    try:
        client[PASSWORD] = text_of(read_regular(named, _MOST_BYTES), named).strip()
    except (OSError, NotUtf8, BudgetExceeded) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None)
        reason = reason or "not text of a password's length"
        raise TrackerUnavailableError(f"{PASSWORD_FILE}={named}: cannot be read ({reason})") from None
